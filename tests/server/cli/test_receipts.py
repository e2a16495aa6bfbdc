"""`flexgate receipts`: what a server shows is verified from files alone, and what was changed is found."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from typer.testing import CliRunner, Result

from flexgate.server.cli.main import app
from flexgate.server.ledger.entries import COMPLETED, RegisteredExpert, Registration, Used
from flexgate.server.ledger.receipts.book import opened

Run = Callable[..., Any]
EXPERTS = (RegisteredExpert(0, "public", "commons"), RegisteredExpert(1, "news", "gazette", "a-news", 1))
NAMES = [f"dec_{number:032x}" for number in (1, 2, 3)]


async def record(services: Any, name: str) -> None:
    """A request of tenant `t`, with its receipt in a batch of its own."""
    entry = services.ledger.register(Registration(name, 5, "t", "key", "/v1", "tiny", 1, 3, EXPERTS))
    entry.end(COMPLETED, Used(2, 0, 3, [6, 2, 2, 2], [3, 9, 3, 3]))
    await services.ledger.register(Registration(f"after {name}", 5, "z", "k", "", "m", 1, 3, ())).registered()
    await asyncio.to_thread(services.receipts.maker.work)


@pytest_asyncio.fixture
async def run(urls: tuple[str, str], services: Any) -> Run:
    """`await run("show", …, key="sk-t")`: the command beside a server that has made receipts."""
    for name in NAMES:
        await record(services, name)

    async def invoke(*words: str, key: str | None = None) -> Result:
        access = [] if key is None else ["--url", urls[0] if key == "sk-t" else urls[1], "--key", key]
        return await asyncio.to_thread(CliRunner().invoke, app, ["receipts", *words, *access])

    return invoke


@pytest_asyncio.fixture
async def files(run: Run, urls: tuple[str, str], tmp_path: Path) -> Callable[[str], Path]:
    """The server's files: receipts of its three parties, keys, chain and head."""
    wanted = {
        "tenant.json": ("show", NAMES[0], "sk-t"),
        "owner.json": ("show", NAMES[1], "sk-owner"),
        "whole.json": ("show", NAMES[2], "sk-admin"),
        "chain.jsonl": ("chain", None, "sk-auditor"),
        "heads.jsonl": ("head", None, "sk-auditor"),
    }
    for name, (command, receipt, key) in wanted.items():
        found = await run(command, *([] if receipt is None else [receipt]), key=key)
        assert found.exit_code == 0, found.output
        (tmp_path / name).write_text(found.output)
    keys = await asyncio.to_thread(CliRunner().invoke, app, ["receipts", "keys", "--url", urls[0]])
    (tmp_path / "jwks.json").write_text(keys.output)
    return lambda name: tmp_path / name


def verify(*files: Path, jwks: Path, **options: Path) -> Result:
    given = [word for name, path in options.items() for word in (f"--{name}", str(path))]
    return CliRunner().invoke(app, ["receipts", "verify", *map(str, files), "--jwks", str(jwks), *given])


RECEIPTS = ("tenant.json", "owner.json", "whole.json")


@pytest.mark.asyncio
async def test_what_a_server_shows_is_verified_from_files_alone(files: Callable[[str], Path]) -> None:
    found = verify(*map(files, RECEIPTS), files("chain.jsonl"), jwks=files("jwks.json"), heads=files("heads.jsonl"))
    assert found.exit_code == 0, found.stderr
    said = found.output.splitlines()
    assert f"OK: a copy of the receipt '{NAMES[0]}', number 1 of srv_" in said[0]
    assert said[0].endswith("with the request")
    assert said[1].endswith("with what experts of 'gazette' did")
    assert "OK: the whole receipt" in said[2]
    assert said[3].endswith("OK: a chain of 3 batches from batch 1 on, with 3 receipts")
    assert said[4].endswith("OK: 1 of 1 heads are of the batches that were given")


@pytest.mark.asyncio
async def test_a_changed_receipt_is_named_with_what_is_wrong(files: Callable[[str], Path]) -> None:
    file = files("owner.json")
    file.write_text(file.read_text().replace('"share_ppm":', '"share_ppm":1', 1))
    found = verify(file, jwks=files("jwks.json"))
    assert (found.exit_code, found.stdout) == (1, "")
    assert (
        f"{file} is not valid: a leaf is not the one that its receipt has in its place: it was changed" in found.stderr
    )


@pytest.mark.asyncio
async def test_a_chain_that_was_written_anew_or_cut_off_is_found_with_a_head(files: Callable[[str], Path]) -> None:
    chain, heads = files("chain.jsonl"), files("heads.jsonl")
    lines = chain.read_text().splitlines(keepends=True)
    chain.write_text("".join(lines[:2]))
    cut = verify(chain, jwks=files("jwks.json"), heads=heads)
    assert cut.exit_code == 1
    assert "ends at batch 2, and a head or receipt of batch 3 that is not in it was kept elsewhere" in cut.stderr
    chain.write_text("".join(lines))
    heads.write_text(heads.read_text().replace('"hash": "', '"hash": "0').replace('"}', '0"}'))
    anew = verify(chain, jwks=files("jwks.json"), heads=heads)
    assert anew.exit_code == 1
    assert "head or receipt of batch 3 that is not in it" in anew.stderr
    without = verify(files("whole.json"), jwks=files("jwks.json"), heads=heads)
    assert without.exit_code == 1
    assert "is not the one whose head was kept elsewhere" in without.stderr


@pytest.mark.asyncio
async def test_a_chain_is_compared_with_all_that_was_given(files: Callable[[str], Path]) -> None:
    """The chain of three batches, the tenant's receipt in batch 1, the owner's in 2, the whole one in 3, head 3."""
    chain, heads, other = files("chain.jsonl"), files("heads.jsonl"), files("other.jsonl")
    lines = chain.read_text().splitlines(keepends=True)
    server = f"srv_{'f' * 32}"
    other.write_text(json.dumps({**json.loads(heads.read_text()), "server": server}))
    of_another_server = verify(chain, jwks=files("jwks.json"), heads=other)
    assert of_another_server.exit_code == 1
    assert f"the chain of {server} ends at batch 0" in of_another_server.stderr
    nothing_compared = verify(files("tenant.json"), jwks=files("jwks.json"), heads=heads)
    assert nothing_compared.exit_code == 1
    assert "no head is of a batch that was given" in nothing_compared.stderr
    chain.write_text("".join(lines[:2]))
    assert verify(chain, files("owner.json"), jwks=files("jwks.json")).exit_code == 0
    cut_off = verify(chain, files("whole.json"), jwks=files("jwks.json"))
    assert cut_off.exit_code == 1
    assert "of batch 3 that is not in it" in cut_off.stderr
    other.write_text("".join(lines[:1]))
    assert verify(chain, other, jwks=files("jwks.json")).exit_code == 0
    assert verify(chain, other, jwks=files("jwks.json"), heads=heads).exit_code == 1
    chain.write_text("".join(lines[1:]))  # what was before is not said
    assert verify(chain, files("tenant.json"), jwks=files("jwks.json"), heads=heads).exit_code == 0


@pytest.mark.asyncio
async def test_bodies_are_not_those_of_a_chain(files: Callable[[str], Path]) -> None:
    found = verify(files("chain.jsonl"), jwks=files("jwks.json"), prompt=files("tenant.json"))
    assert found.exit_code == 2
    assert "is no receipt" in found.stderr


@pytest.mark.asyncio
async def test_a_batch_left_out_of_a_chain_is_found(files: Callable[[str], Path]) -> None:
    chain = files("chain.jsonl")
    lines = chain.read_text().splitlines(keepends=True)
    chain.write_text(lines[0] + lines[2])
    assert verify(chain, jwks=files("jwks.json")).exit_code == 1


@pytest.mark.asyncio
async def test_a_receipt_left_out_of_its_batch_is_found_by_its_holder(
    files: Callable[[str], Path], services: Any, run: Run, tmp_path: Path
) -> None:
    """The holder of a receipt of batch 2 detects a chain that the server has signed anew without it."""
    with opened(services.receipts.book, read_only=False) as book:
        book._connection.execute("DELETE FROM batches WHERE number > 1")
    services.ledger._connection.execute("DELETE FROM counts WHERE sequence = 2")
    services.ledger._connection.execute("DELETE FROM usage WHERE sequence = 2")
    await asyncio.to_thread(services.receipts.maker.work)
    forged = tmp_path / "forged.jsonl"
    forged.write_text((await run("chain", key="sk-auditor")).output)
    assert verify(forged, jwks=files("jwks.json")).exit_code == 0
    found = verify(forged, files("owner.json"), jwks=files("jwks.json"))
    assert found.exit_code == 1
    assert "has signed two batches 2: its chain is forked" in found.stderr


@pytest.mark.asyncio
@pytest.mark.parametrize(
    ("words", "status", "said"),
    [
        (["show", "dec_nonsense"], 1, "No object with this id is visible to this key"),
        (["verify", "missing.json", "--jwks", "missing.json"], 1, "No such file"),
    ],
)
async def test_what_cannot_be_read_is_one_sentence(run: Run, words: list[str], status: int, said: str) -> None:
    found = await run(*words, key="sk-t" if words[0] == "show" else None)
    assert found.exit_code == status
    assert said in found.stderr


@pytest.mark.asyncio
async def test_bodies_are_of_one_receipt(files: Callable[[str], Path]) -> None:
    both = [files("tenant.json"), files("whole.json")]
    found = verify(*both, jwks=files("jwks.json"), prompt=files("tenant.json"))
    assert found.exit_code == 2
    assert "give one receipt" in found.stderr


def test_a_rotated_key_signs_and_earlier_receipts_stay_valid(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from flexgate.server.ledger.receipts.book import Book
    from flexgate.server.ledger.receipts.signing import KeyFile, thumbprint

    monkeypatch.delenv("FLEXGATE_DATABASE_URL", raising=False)

    def rotate(*options: str) -> Result:
        return CliRunner().invoke(app, ["receipts", "rotate-key", "--demo", "--state-dir", str(tmp_path), *options])

    assert "there are no receipts at" in rotate().stderr
    directory = tmp_path / "demo"
    key, book = KeyFile(directory / "receipts.pem"), Book(directory / "receipts.db")
    key.make()
    first = key.public_key()
    book.add_key(thumbprint(first), first)
    done = rotate()
    assert done.exit_code == 0, done.stderr
    second = key.public_key()
    assert done.output.strip() == thumbprint(second) != thumbprint(first)
    assert book.keys() == [first, second]
    (retired,) = directory.glob("receipts.pem.retired-*")
    retired.rename(key.path)
    back = rotate()
    assert (back.exit_code, len(book.keys())) == (0, 3)  # an earlier key is never taken again
    book.close()
