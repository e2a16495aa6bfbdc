"""Every recorded request gets one signed receipt, in the order of the ledger, whatever happens to the maker."""

from __future__ import annotations

import json
import os
import random
import signal
import sqlite3
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat

from flexgate.server.ledger.receipts import maker as making
from flexgate.server.ledger.receipts import verify
from flexgate.server.ledger.receipts.book import BookError, opened
from flexgate.server.ledger.receipts.service import ReceiptPending
from flexgate.server.ledger.receipts.signing import KeyFile, Program, SignerUnavailable, thumbprint
from flexgate.server.ledger.retention import Retention

Text = Callable[..., bytes]


def chain(kit: Any) -> list[verify.SignedBatch]:
    """The chain of a kit's receipts, which must verify and follow."""
    with opened(kit.path) as book:
        keys = verify.parse_keys(making.jwks_of(book.keys()))
        entries = book.chain(0, 10_000)
    batches = [
        verify.verify_batch({"header": json.loads(header), "signature": signature.hex()}, keys)
        for header, signature in entries
    ]
    verify.verify_order(batches)
    return batches


def sequences(kit: Any) -> list[int]:
    """The ledger's numbers of all receipts, in the receipts' order."""
    with opened(kit.path) as book:
        rows = book._connection.execute("SELECT last_sequence FROM batches ORDER BY number").fetchall()
        return [number for (last,) in rows for number in book.find(last)[0].sequences]  # type: ignore[index]


def recorded(kit: Any) -> list[int]:
    connection = sqlite3.connect(kit.ledger)
    try:
        return [number for (number,) in connection.execute("SELECT sequence FROM usage ORDER BY sequence")]
    finally:
        connection.close()


def test_requests_get_receipts_in_their_order_and_once(kit: Any, text: Text) -> None:
    kit.record(1, 2)
    first = kit.maker()
    first.work()
    first.work()
    kit.record(3)
    second = kit.maker()
    second.work()
    assert [(batch.number, batch.first, batch.last) for batch in chain(kit)] == [(1, 1, 2), (2, 3, 3)]
    receipts = kit.receipts(second)
    keys = verify.parse_keys(receipts.jwks)
    found = [verify.verify_receipt(text(receipts, number), keys) for number in (1, 2, 3)]
    assert [one.number for one in found] == [1, 2, 3]
    assert kit.digests == [7]  # looked up once


def test_a_long_queue_is_signed_in_batches(kit: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(making, "MOST", 3)
    kit.record(*range(1, 9))
    kit.maker().work()
    assert [(batch.first, batch.last) for batch in chain(kit)] == [(1, 3), (4, 6), (7, 8)]
    assert sequences(kit) == recorded(kit)


def test_numbers_that_the_ledger_gave_to_no_request_leave_no_gap_in_the_receipts(kit: Any) -> None:
    for number in (1, 1, 1, 2):
        kit.record(number)
    kit.maker().work()
    assert recorded(kit) != [1, 2]
    assert sequences(kit) == recorded(kit)
    assert [(batch.first, batch.last) for batch in chain(kit)] == [(1, 2)]


def test_without_its_key_nothing_is_signed_and_later_everything(kit: Any, text: Text) -> None:
    receipts = kit.made(1)
    away = kit.key.path.rename(kit.directory / "away.pem")
    kit.record(2)
    receipts.maker.work()
    assert f"the receipt key {kit.key.path} cannot be read" in receipts.maker.waiting
    assert not kit.key.path.exists()
    with pytest.raises(ReceiptPending, match="cannot be read"):
        text(receipts, 2)
    restarted = kit.maker()
    restarted.work()
    assert "restore the file" in restarted.waiting
    assert not kit.key.path.exists()
    away.rename(kit.key.path)
    receipts.maker.work()
    assert receipts.maker.waiting is None
    assert [(batch.first, batch.last) for batch in chain(kit)] == [(1, 1), (2, 2)]


def test_another_key_signs_nothing_until_it_is_asked_for(kit: Any, text: Text) -> None:
    receipts = kit.made(1)
    before = text(receipts, 1)
    kit.key.path.unlink()
    kit.key.make()
    kit.record(2)
    receipts.maker.work()
    assert "run 'flexgate receipts rotate-key'" in receipts.maker.waiting
    with opened(kit.path, read_only=False) as book:
        book.add_key(thumbprint(kit.key.public_key()), kit.key.public_key())
    receipts.maker.work()
    assert receipts.maker.waiting is None
    keys = verify.parse_keys(receipts.jwks)
    assert len(keys) == 2
    assert text(receipts, 1) == before
    for number in (1, 2):
        assert verify.verify_receipt(text(receipts, number), keys).number == number


def test_a_key_that_others_can_read_is_not_used(kit: Any) -> None:
    receipts = kit.made(1)
    assert kit.key.path.stat().st_mode & 0o777 == 0o600
    kit.key.path.chmod(0o640)
    kit.record(2)
    receipts.maker.work()
    assert "may be read by others (mode 0640)" in receipts.maker.waiting


def test_a_book_that_takes_nothing_leaves_a_queue(kit: Any) -> None:
    receipts = kit.made(1)
    connection = receipts.maker._book._connection
    (pages,) = connection.execute("PRAGMA page_count").fetchone()
    connection.execute(f"PRAGMA max_page_count = {pages}")
    kit.record(*range(2, 160))
    receipts.maker.work()
    assert "cannot be written: database or disk is full; check the file and its disk" in receipts.maker.waiting
    connection.execute("PRAGMA max_page_count = 100000")
    receipts.maker.work()
    assert sequences(kit) == recorded(kit)


def test_a_ledger_that_is_older_than_its_receipts_gets_none(kit: Any) -> None:
    kit.made(1, 2)
    kit.ledger.unlink()
    for rest in kit.directory.glob("ledger.db-*"):
        rest.unlink()
    kit.record(3)
    again = kit.maker()
    again.work()
    assert "it is older than its receipts" in again.waiting
    kit.record(*range(4, 8))
    again.work()
    assert "it is older than its receipts" in again.waiting
    restarted = kit.maker()
    restarted.work()
    assert "it is older than its receipts" in restarted.waiting
    assert sequences(kit) == [1, 2]


def test_looks_become_rare_while_nothing_can_be_made_and_the_cause_is_logged_once(
    kit: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    maker, waits = kit.maker(), []
    monkeypatch.setattr(maker._closing, "wait", lambda seconds: waits.append(seconds) or len(waits) > 10)
    monkeypatch.setattr(maker._book, "end", lambda: 1 / 0)
    maker._run()
    assert waits == [0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 30.0, 30.0, 30.0, 30.0]
    assert caplog.text.count("Traceback") == 1
    monkeypatch.undo()
    kit.record(1)
    maker.work()
    assert maker.waiting is None


def test_usage_without_a_receipt_is_kept_though_it_is_old(kit: Any) -> None:
    receipts = kit.made(1)
    kit.record(2)
    retention = Retention(lambda: 1e9)
    retention.until(lambda: receipts.maker.sequence)
    retention.keep(1)
    connection = sqlite3.connect(kit.ledger)
    retention.trim(connection)
    connection.commit()
    connection.close()
    assert recorded(kit) == [2]
    receipts.maker.work()
    assert receipts.maker.sequence == 2
    assert sequences(kit) == [1, 2]


def test_two_makers_sign_nothing_twice(kit: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    kit.record(1)
    one, other = kit.maker(), kit.maker()
    real = one.signer.__class__.sign

    def sign(self: KeyFile, message: bytes) -> bytes:
        monkeypatch.undo()
        other.work()
        return real(self, message)

    monkeypatch.setattr(KeyFile, "sign", sign)
    one.work()
    assert "batch 1 does not follow batch 1" in (one.waiting or "")
    assert sequences(kit) == recorded(kit) == [1]


@pytest.mark.parametrize(
    ("table", "change"),
    [
        ("usage", "completion_tokens = completion_tokens + 1"),
        ("usage", "tenant = 'proj_b'"),
        ("usage", "prompt_sha256 = NULL"),
        ("counts", "completion_mass = completion_mass + 1 WHERE number = 2"),
        ("experts", "agreement_version = 9 WHERE expert = 'news'"),
        ("experts", "owner = 'academy' WHERE expert = 'sports'"),
    ],
)
def test_a_row_that_was_changed_since_is_told_and_not_shown(kit: Any, text: Text, table: str, change: str) -> None:
    from flexgate.server.ledger.receipts.service import ReceiptDamaged

    receipts = kit.made(1)
    connection = sqlite3.connect(kit.ledger, isolation_level=None)
    connection.execute(f"UPDATE {table} SET {change}")
    connection.close()
    with pytest.raises(ReceiptDamaged, match="does not lead to the root that was signed"):
        text(receipts, 1)


SIGNER = """
import sys
from cryptography.hazmat.primitives.serialization import load_pem_private_key
key = load_pem_private_key(open(sys.argv[1], "rb").read(), None)
print(key.sign(sys.stdin.buffer.read()).hex())
"""


@pytest.fixture
def program(tmp_path: Path) -> Callable[..., Program]:
    """A signing program with a key of its own, or one that does something else."""
    key = Ed25519PrivateKey.generate()
    private, public, script = (tmp_path / name for name in ("outside.pem", "outside.pub.pem", "signer.py"))
    private.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    public.write_bytes(key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo))
    script.write_text(SIGNER)

    def make(command: str | None = None) -> Program:
        return Program(command or f"{sys.executable} {script} {private}", public)

    return make


def test_a_program_signs_as_a_key_file_does(kit: Any, text: Text, program: Callable[..., Program]) -> None:
    kit.record(1)
    maker = kit.maker(program())
    maker.work()
    assert maker.waiting is None
    receipts = kit.receipts(maker)
    assert verify.verify_receipt(text(receipts, 1), verify.parse_keys(receipts.jwks)).number == 1


@pytest.mark.parametrize(
    ("command", "said"),
    [
        ("/nonexistent/signer", "does not answer"),
        ("sh -c 'echo no key >&2; exit 3'", "ended with 3: 'no key'"),
        ("echo abc", "did not print a signature with the key in"),
        (f"echo {'0' * 128}", "did not print a signature with the key in"),
        ("'", "does not answer"),
    ],
)
def test_a_program_that_does_not_sign_is_told(program: Callable[..., Program], command: str, said: str) -> None:
    with pytest.raises(SignerUnavailable, match="receipt signer") as error:
        program(command).sign(b"message")
    assert said in str(error.value)


class Forging:
    """A signer that says it has a key, and signs with none."""

    def __init__(self, key: KeyFile) -> None:
        self.public_key = key.public_key

    def sign(self, message: bytes) -> bytes:
        return bytes(64)


def test_what_a_signer_gives_that_is_no_signature_is_not_kept(kit: Any) -> None:
    kit.made(1)
    kit.record(2)
    maker = kit.maker(Forging(kit.key))
    maker.work()
    assert "a signature with another key" in (maker.waiting or "")
    assert [batch.number for batch in chain(kit)] == [1]


def main_of_a_maker(kit: Any) -> None:
    """Make receipts until it is killed, a few in each batch."""
    making.MOST = 5  # type: ignore[misc]
    maker = kit.maker()
    while True:
        maker.work()


def test_a_maker_that_is_killed_again_and_again_leaves_no_gap_and_nothing_twice(kit: Any) -> None:
    rng = random.Random(5)
    for trial in range(12):
        kit.record(*range(trial * 40, trial * 40 + 40))
        pid = os.fork()
        if not pid:
            try:
                main_of_a_maker(kit)
            finally:
                os._exit(1)
        time.sleep(rng.random() * 0.04)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    kit.maker().work()
    assert sequences(kit) == recorded(kit)
    batches = chain(kit)
    assert (batches[0].first, batches[-1].last) == (1, 480)


@pytest.mark.parametrize("replaced", [False, True], ids=["gone", "replaced"])
def test_no_receipts_are_made_while_their_file_is_another_one(kit: Any, text: Text, replaced: bool) -> None:
    receipts, away = kit.made(1), kit.path.with_suffix(".away")
    kit.path.rename(away)
    if replaced:
        kit.path.write_bytes(b"")
    kit.record(2)
    receipts.maker.work()
    assert "was replaced or deleted while it was in use" in (receipts.maker.waiting or "")
    away.rename(kit.path)
    receipts.maker.work()
    assert receipts.maker.waiting is None
    assert sequences(kit) == [1, 2]


def test_who_asks_for_a_receipt_makes_no_file_of_receipts(kit: Any, text: Text) -> None:
    receipts = kit.made(1)
    kit.path.rename(kit.path.with_suffix(".away"))
    with pytest.raises(BookError, match="cannot be opened"):
        text(receipts, 1)
    with pytest.raises(BookError, match="cannot be opened"):
        receipts.chain(0, 10)
    assert not kit.path.exists()


def test_a_file_that_holds_something_else_is_refused(kit: Any) -> None:
    connection = sqlite3.connect(kit.path)
    connection.execute("CREATE TABLE x (y)")
    connection.close()
    with pytest.raises(BookError, match="holds no receipts of flexgate: move it away"):
        kit.maker()
