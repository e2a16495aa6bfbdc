"""A ledger with a few requests, and receipts of it."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import rfc8785

from flexgate.server.ledger.entries import COMPLETED, RegisteredExpert, Registration, Used
from flexgate.server.ledger.exclusion import catalogue_of, marks_of
from flexgate.server.ledger.journal import Journal
from flexgate.server.ledger.receipts.book import Book
from flexgate.server.ledger.receipts.maker import Maker
from flexgate.server.ledger.receipts.service import Reader, Receipts
from flexgate.server.ledger.receipts.signing import KeyFile

EXPERTS = (
    RegisteredExpert(0, "public", None),
    RegisteredExpert(1, "news", "gazette", "a-news", 3, "b" * 64),
    RegisteredExpert(2, "sports", "gazette", "a-sports", 1, None),
    RegisteredExpert(3, "math", "academy", "a-math", 2, "c" * 64),
)
GRADES = (
    ("public", "removed"),
    ("news", "shared"),
    ("sports", "shared"),
    ("math", "removed"),
    ("poems", "router"),
    ("vault", "unknown"),
)
"""Every expert; outside the gate, a tenant is shown `poems`, and the others are hidden from it."""
REQUEST_BODY, RESPONSE_BODY = b'{"prompt":"x"}', b'{"choices":[]}'


def name(number: int) -> str:
    """The id of a request's decision."""
    return f"dec_{number:032x}"


def pseudonym(owner: str, tenant: str) -> str:
    return f"anon-{hashlib.sha256(f'{owner}:{tenant}'.encode()).hexdigest()[:20]}"


def record(
    path: Path,
    *numbers: int,
    tenant: str = "proj_a",
    experts: Any = EXPERTS,
    suffix: str = "",
    grades: tuple[tuple[str, str], ...] = GRADES,
) -> None:
    """Let requests begin and end in a ledger; their ids end in `suffix`."""
    ids = [expert for expert, _ in grades]
    marks = marks_of(ids, [one.expert for one in experts if one.expert in ids], [one for one in ids if one == "poems"])

    async def serve() -> None:
        journal = Journal(path, clock=lambda: 9.5)
        for number in numbers:
            body = hashlib.sha256(REQUEST_BODY).hexdigest()
            registration = Registration(
                name(number) + suffix,
                5,
                tenant,
                "key_a",
                "/v1/completions",
                "tiny",
                7,
                3,
                experts,
                prompt_sha256=body,
                catalogue=catalogue_of(grades),
                excluded=marks,
            )
            entry = journal.register(registration)
            await entry.registered()
            prompt, completion = [1 << 60, 5, 3, 0, 9, 9, 3, 0], [7, 1 << 40, 2, 11, 4, 4, 1, 4]
            answer = hashlib.sha256(RESPONSE_BODY).hexdigest()
            entry.end(COMPLETED, Used(9, 1, 4, prompt, completion, answer))
        journal.close()

    asyncio.run(serve())


class Kit:
    """A state directory with a ledger and receipts."""

    request_body, response_body = REQUEST_BODY, RESPONSE_BODY
    experts, grades = EXPERTS, GRADES

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.ledger, self.path = directory / "ledger.db", directory / "receipts.db"
        self.key = KeyFile(directory / "receipts.pem")
        self.digests: list[int] = []
        self._makers: list[Maker] = []

    def record(self, *numbers: int, **options: Any) -> None:
        record(self.ledger, *numbers, **options)

    def maker(self, signer: Any = None) -> Maker:
        """Of another run of the server."""
        made = Maker(
            self.ledger,
            Book(self.path),
            signer or self.key,
            clock=lambda: 12.0,
            policy_digest=self._digest,
            pseudonym=pseudonym,
        )
        self._makers.append(made)
        return made

    def receipts(self, maker: Maker) -> Receipts:
        return Receipts(self.ledger, self.path, maker, pseudonym)

    def made(self, *numbers: int, **options: Any) -> Receipts:
        """Receipts of requests that were recorded first, in one batch."""
        self.record(*numbers, **options)
        maker = self.maker()
        maker.work()
        assert maker.waiting is None
        return self.receipts(maker)

    def close(self) -> None:
        for maker in self._makers:
            maker.close()

    def _digest(self, version: int) -> str:
        self.digests.append(version)
        return "d" * 64


@pytest.fixture
def make_kit(tmp_path: Path) -> Iterator[Callable[[str], Kit]]:
    """Servers by their names."""
    kits = []

    def make(name: str) -> Kit:
        (tmp_path / name).mkdir()
        kits.append(Kit(tmp_path / name))
        return kits[-1]

    yield make
    for made in kits:
        made.close()


@pytest.fixture
def kit(make_kit: Callable[[str], Kit]) -> Kit:
    return make_kit("server")


@pytest.fixture
def text() -> Callable[..., bytes]:
    """A reader's copy as it is sent."""

    def show(receipts: Receipts, number: int, **reader: str) -> bytes:
        return rfc8785.dumps(receipts.show(name(number), Reader(**reader)))

    return show


@pytest.fixture(name="name")
def name_of() -> Callable[[int], str]:
    """The id of a request's decision, by its number."""
    return name
