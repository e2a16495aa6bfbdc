"""Statements that are signed in tests, and both verifiers' judgement of them."""

from __future__ import annotations

import base64
import json
import shutil
import subprocess
from collections.abc import Collection
from pathlib import Path
from typing import Any

import rfc8785

from flexgate.policies.agreements import Agreement
from flexgate.server.ledger.receipts import verify
from flexgate.server.ledger.receipts.canonical import ReceiptInvalid
from flexgate.server.ledger.receipts.service import Receipts
from flexgate.server.ledger.receipts.statements import Statements
from flexgate.server.ledger.receipts.verify_statement import parse_proof, verify_statement, verify_statements
from flexgate.server.ledger.statements import Period
from flexgate.server.ledger.terms import Terms, Version

NODE = shutil.which("node")
JUDGE = Path(__file__).parents[1] / "server/ledger/receipts/judge-statement.mjs"
MONTH = Period.of("1970-01")
EUR = [
    {"kind": "compensate", "rate": "0.1", "currency": "EUR", "unit": "request"},
    {"kind": "compensate", "rate": "1.005", "currency": "EUR", "unit": "thousand_share_weighted_tokens"},
]
JPY = [{"kind": "compensate", "rate": "77.7", "currency": "JPY", "unit": "million_tokens"}]
CORRECTION = {
    "amount": "-0.5",
    "at": "9500000",
    "currency": "EUR",
    "id": "cor_1",
    "reason": "counted twice",
    "receipt": f"dec_{1:032x}",
}


def terms_of(counted: Collection[Terms]) -> dict[Version, Agreement]:
    """One agreement in euros, one in yen."""
    found = {}
    for (id_, version), _ in counted:
        duties = EUR if id_ == "a-news" else JPY
        fields = {"id": id_, "version": version, "owner": "gazette", "experts": ["x"], "assignee": "everyone"}
        found[id_, version] = Agreement.model_validate({**fields, "effect": "permit", "duties": duties})
    return found


def statements_of(receipts: Receipts) -> Statements:
    """As after a restart: rows that are changed in a test have left nothing behind."""
    return Statements(Receipts(receipts.ledger, receipts.book, receipts.maker, receipts._pseudonym))


def signed(receipts: Receipts, *, owner: str = "gazette", ended: bool = True, at: float = 9e6) -> bytes:
    return rfc8785.dumps(statements_of(receipts).sign(owner, MONTH, terms_of, at=at, ended=ended))


def page(receipts: Receipts, owner: str = "gazette") -> list[bytes]:
    """All of an owner's receipts."""
    return [rfc8785.dumps(one) for one in Statements(receipts).page(owner, MONTH, after=0, limit=100)]


def proof(receipts: Receipts, name: str, *, last: int | None = None) -> bytes:
    return rfc8785.dumps(statements_of(receipts).prove("gazette", MONTH, name, last=last))


def resigned(kit: Any, text: bytes, **changes: Any) -> bytes:
    """What a server signs that says something else."""
    said = {**json.loads(text)["statement"], **changes}
    return rfc8785.dumps({"signature": kit.key.sign(rfc8785.dumps(said)).hex(), "statement": said})


def python_says(jwks: bytes, bundle: tuple[bytes, ...]) -> str:
    statements, copies, proofs = [], [], []
    try:
        keys = verify.parse_keys(jwks)
        for text in bundle:
            if text.startswith(b'{"signature":'):
                statements.append(verify_statement(text, keys))
            elif text.startswith(b'{"format":'):
                proofs.append(parse_proof(text))
            else:
                copies.append(verify.verify_receipt(text, keys))
        verify.verify_copies(copies)
        verify.verify_ends([(one.head, one.last) for one in statements], [one.batch for one in copies])
        verify_statements(statements, copies, proofs)
    except ReceiptInvalid as error:
        return str(error)
    return ""


def both(jwks: bytes, *bundles: tuple[bytes, ...]) -> list[bool]:
    """Which are valid, to both verifiers."""
    assert NODE is not None, "Node 20 is needed"
    lines = b"".join(base64.b64encode(text) + b"\n" for text in [jwks, *(b"\n".join(one) for one in bundles)])
    done = subprocess.run([NODE, "--no-warnings", JUDGE], input=lines, capture_output=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr.decode()
    others = done.stdout.decode().split("\n")[:-1]
    ours = [python_says(jwks, bundle) for bundle in bundles]
    assert len(ours) == len(others)
    differing = [(one, other) for one, other in zip(ours, others, strict=True) if bool(one) != bool(other)]
    assert differing == []
    return [not wrong for wrong in ours]
