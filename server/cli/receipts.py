"""`flexgate receipts`: show receipts, verify them from files alone, and rotate the key that signs them."""

from __future__ import annotations

import hashlib
import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Final

import httpx
import rfc8785
import typer

from flexgate.experts.cli.api import Api
from flexgate.experts.cli.remote import LOCAL, Url
from flexgate.experts.errors import UsageInvalid
from flexgate.policies.strict_json import no_key_twice
from flexgate.server.cli.heads import lines_of
from flexgate.server.cli.options import place_option
from flexgate.server.cli.store import FAILED, failing
from flexgate.server.ledger.receipts import verify as verifying
from flexgate.server.ledger.receipts.canonical import ReceiptInvalid, parse
from flexgate.server.ledger.receipts.heads import LOG
from flexgate.server.ledger.receipts.verify import SignedBatch
from flexgate.server.ledger.receipts.verify_owners import OwnersSums, verify_owners, verify_parts
from flexgate.server.ledger.receipts.verify_statement import (
    Proof,
    SignedStatement,
    parse_proof,
    verify_statement,
    verify_statements,
)

_HELP: Final = (
    "Show receipts, verify them from files alone, and rotate the key that signs them.\n\n"
    "Exit status: 0 success; 1 a receipt is not valid, or cannot be read, the reason is printed; 2 invalid usage."
)
app = typer.Typer(no_args_is_help=True, add_completion=False, help=_HELP)

Key = Annotated[
    str, typer.Option(help="API key of the tenant, owner, auditor or administrator that asks.", envvar="FLEXGATE_KEY")
]
PENDING: Final = "receipt_pending"
LOOK_SECONDS: Final = 0.1
_PAGE: Final = 1000
_RECEIPT, _CHAIN, _STATEMENT, _PROOF, _OWNERS = (
    f'{{"{name}":'.encode() for name in ("batch", "header", "signature", "format", "owners")
)
"""How files begin, in canonical form."""


@app.command()
def show(
    receipt: Annotated[str, typer.Argument(help="The decision's id, which is in the response.")],
    key: Key,
    url: Url = LOCAL,
    wait: Annotated[float, typer.Option(min=0, help="Seconds to wait for a receipt that is not made yet.")] = 5.0,
) -> None:
    """Print a receipt, as far as it concerns the key's tenant or owner; 'verify' checks what is printed."""
    path, until = f"/v1/receipts/{_quoted(receipt)}", time.monotonic() + wait
    with failing(), Api(url, key) as api:
        while time.monotonic() < until and _is_pending(api, path):
            time.sleep(LOOK_SECONDS)
        sys.stdout.write(canonical(api.ask("GET", path)))


@app.command()
def keys(url: Url = LOCAL) -> None:
    """Print the public keys that the server's receipts are signed with, for 'verify'."""
    with failing(), Api(url, "none") as api:
        sys.stdout.write(canonical(api.ask("GET", "/.well-known/jwks.json")))


@app.command()
def chain(
    key: Key,
    url: Url = LOCAL,
    after: Annotated[int, typer.Option(min=0, help="Print only batches after this number.")] = 0,
) -> None:
    """Print the signed headers of all batches as JSON Lines, for 'verify'."""
    with failing(), Api(url, key) as api:
        for batch in _batches(api, after):
            sys.stdout.write(canonical(batch))


@app.command()
def head(key: Key, url: Url = LOCAL) -> None:
    """Print number and hash of the newest batch as a line of JSON, to keep on another machine for 'verify --heads'."""
    with failing(), Api(url, key) as api:
        for batch in api.ask("GET", "/v1/receipt_batches", params={"newest": True})["data"]:
            newest = batch["header"]
            hash_ = hashlib.sha256(rfc8785.dumps(newest)).hexdigest()
            line = {"log": LOG, "server": newest["server"], "sequence": int(newest["number"]), "hash": hash_}
            sys.stdout.write(json.dumps(line) + "\n")


@app.command()
def verify(
    files: Annotated[
        list[Path],
        typer.Argument(
            help="Receipts as 'show' prints them, chains as 'chain' does, or what 'flexgate statements' prints: signed "
            "statements, their receipts, and proofs."
        ),
    ],
    jwks: Annotated[Path, typer.Option(help="File with the server's public keys; 'keys' prints them.")],
    heads: Annotated[Path | None, typer.Option(help="File with earlier output of 'head', kept elsewhere.")] = None,
    prompt: Annotated[Path | None, typer.Option(help="Body of the request of one receipt, byte for byte.")] = None,
    answer: Annotated[Path | None, typer.Option(help="Body of the response of one receipt, byte for byte.")] = None,
) -> None:
    """Verify receipts, statements and chains, and that they agree with each other. Works offline, from files alone."""
    with failing():
        with _about(jwks):
            public = verifying.parse_keys(jwks.read_bytes())
        if (prompt or answer) and len(files) != 1:
            raise UsageInvalid("--prompt and --answer are the bodies of one request: give one receipt")
        noted = [] if heads is None else _heads(heads)
        given = _Given()
        for file in files:
            with _about(file):
                sentence = given.verify(file, public, {"prompt": prompt, "answer": answer})
            typer.echo(f"{file}: OK: {sentence}")
        with _about(heads or files[0]):
            compared = given.compare(noted)
            for sentence in given.counted():
                typer.echo(f"together: OK: {sentence}")
        if heads is not None:
            typer.echo(f"{heads}: OK: {compared} of {len(noted)} heads are of the batches that were given")


@app.command()
def rotate_key(
    demo: place_option("demo", "Act on the demo's state directory.") = None,  # type: ignore[valid-type]
    state_dir: place_option("state_dir", "Act on this state directory.") = None,  # type: ignore[valid-type]
    database_url: place_option("database_url", "Act on the state of the server that uses this database.") = None,  # type: ignore[valid-type]
    receipt_key: Annotated[
        Path | None, typer.Option(help="The --receipt-key of 'flexgate serve'.", envvar="FLEXGATE_RECEIPT_KEY")
    ] = None,
    receipt_signer: Annotated[
        str | None, typer.Option(help="The --receipt-signer of 'flexgate serve'.", envvar="FLEXGATE_RECEIPT_SIGNER")
    ] = None,
) -> None:
    """Sign receipts with another key from now on, and print its id; a running server follows.

    A key file that is in use is renamed to NAME.retired-ID, and a new key takes its place. If the file or the signer
    has a new key already, that one is used. Receipts that were signed before stay verifiable.
    """
    from flexgate.server.lifecycle.receipts import rotate

    with failing():
        typer.echo(rotate(demo, state_dir, database_url, receipt_key, receipt_signer))


def _is_pending(api: Api, path: str) -> bool:
    try:
        return bool(api.http.get(path).json()["error"]["code"] == PENDING)
    except (httpx.HTTPError, ValueError, LookupError, TypeError):
        return False  # asking again says what is wrong


@dataclass
class _Given:
    """What was given to verify, as far as it is valid."""

    copies: list[verifying.Verified] = field(default_factory=list)
    chain: list[SignedBatch] = field(default_factory=list)
    statements: list[SignedStatement] = field(default_factory=list)
    proofs: list[Proof] = field(default_factory=list)
    owners: list[OwnersSums] = field(default_factory=list)

    def verify(self, file: Path, keys_: verifying.Keys, bodies: dict[str, Path | None]) -> str:
        """Verify a file by itself; returns what it is."""
        text, opened = file.read_bytes(), {name: path for name, path in bodies.items() if path is not None}
        if opened and not text.startswith(_RECEIPT):
            raise UsageInvalid(f"--prompt and --answer are the bodies of a request, and {file} is no receipt")
        if text.startswith(_STATEMENT):
            self.statements.append(verify_statement(text, keys_))
            return f"a {self.statements[-1].name}, which counts {self.statements[-1].receipts} receipts"
        if text.startswith(_OWNERS):
            self.owners.append(verify_owners(text, keys_))
            return f"the {self.owners[-1].name}"
        if text.startswith(_PROOF):
            self.proofs.append(parse_proof(text))
            return f"a proof of '{self.proofs[-1].receipt}', to be compared with its statement"
        if text.startswith(_CHAIN):
            chained = [verifying.verify_batch(parse(line), keys_) for line in text.splitlines()]
            verifying.verify_chain(chained)
            self.chain += chained
            receipts = sum(batch.last - batch.first + 1 for batch in chained)
            return f"a chain of {len(chained)} batches from batch {chained[0].number} on, with {receipts} receipts"
        lines = text.removesuffix(b"\n").split(b"\n")
        if len(lines) > 1 and not opened:
            self.copies += [verifying.verify_receipt(line, keys_) for line in lines]
            return f"{len(lines)} receipts"
        return self._verify_receipt(text, keys_, opened)

    def _verify_receipt(self, text: bytes, keys_: verifying.Keys, opened: dict[str, Path]) -> str:
        found = verifying.verify_receipt(text, keys_)
        self.copies.append(found)
        for name, path in opened.items():
            verifying.verify_opening(found, name, path.read_bytes())
        kinds = ", ".join(_said(leaf) for leaf in found.leaves if leaf["kind"] != "none")
        whole = "the whole receipt" if found.complete else "a copy of the receipt"
        matching = "".join(f"; its {name} is the given one" for name in opened)
        return f"{whole} '{found.receipt}', number {found.number} of {found.batch.server}, with {kinds}{matching}"

    def compare(self, heads: list[verifying.Head]) -> int:
        """Verify that all of it tells one history; returns how many heads are of it."""
        batches = [one.batch for one in self.copies]
        ends = self._ends()
        verifying.verify_order([*self.chain, *batches])
        verifying.verify_ends(ends, [*self.chain, *batches])
        verifying.verify_copies(self.copies)
        if self.chain:
            verifying.verify_contained(self.chain, batches, [*heads, *(head for head, _ in ends if head.number)])
        return verifying.verify_heads([*self.chain, *batches], heads) if heads else 0

    def _ends(self) -> list[tuple[verifying.Head, int]]:
        """Where the histories end that statements and sums are made of, with the numbers of their last receipts."""
        return [*((one.head, one.last) for one in self.statements), *((one.head, one.last) for one in self.owners)]

    def counted(self) -> list[str]:
        """Verify that statements count the receipts; returns what each does, in words."""
        found = verify_statements(self.statements, self.copies, self.proofs)
        parts = verify_parts(self.owners, self.statements)
        named = [f"the {one.name}: {said}" for one, said in zip(self.statements, found, strict=True)]
        return [*named, *([f"statements are their owners' parts of the sums, {parts} of them"] if parts else [])]


def _said(leaf: dict[str, Any]) -> str:
    said = {"request": "the request", "hidden": "what its tenant does not see"}
    return said.get(leaf["kind"]) or f"what experts of '{leaf.get('owner')}' did"


def _heads(path: Path) -> list[verifying.Head]:
    """The heads of receipts in a file, which may hold those of audit logs, too."""
    found = []
    for line in lines_of(path):
        try:
            values = json.loads(line, object_pairs_hook=no_key_twice)
            if values.get("log") == LOG:
                found.append(verifying.Head(str(values["server"]), int(values["sequence"]), str(values["hash"])))
        except (ValueError, KeyError, TypeError, AttributeError):
            raise UsageInvalid(f"{path}: this line is not a head: {line[:80]!r}") from None
    if not found:
        raise UsageInvalid(f"{path} contains no head of receipts")
    return found


def _batches(api: Api, after: int) -> Iterator[dict[str, Any]]:
    while True:
        page = api.ask("GET", "/v1/receipt_batches", params={"after": after, "limit": _PAGE})
        yield from page["data"]
        if not page["has_more"]:
            return
        after = int(page["data"][-1]["header"]["number"])


@contextmanager
def _about(path: Path) -> Iterator[None]:
    """Name the file that is not valid."""
    try:
        yield
    except ReceiptInvalid as error:
        typer.secho(f"flexgate: {path} is not valid: {error}", err=True, fg=typer.colors.RED)
        raise typer.Exit(FAILED) from None


def canonical(value: Any) -> str:
    return rfc8785.dumps(value).decode() + "\n"


def _quoted(id_: str) -> str:
    from urllib.parse import quote

    return quote(id_, safe="")
