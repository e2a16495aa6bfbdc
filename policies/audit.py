"""The audit log's hash chain: every entry names the hash of the one before it. Pure.

    hash = SHA-256(canonical JSON of [sequence, at, actor, action, detail, previous hash])

Whoever holds a `Head` from outside the database notices any edit, deletion, reordering or
truncation of what came before it. Without one, a log cut off at its end, or written anew as a
whole, is consistent in itself.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any, Final, NamedTuple

from flexgate.policies.errors import AuditBroken

_NOTHING_BEFORE: Final = "0" * 64


class Head(NamedTuple):
    """The newest entry of a log: keep it somewhere else. `sequence` 0 is the empty log."""

    sequence: int
    hash: str


START: Final = Head(0, _NOTHING_BEFORE)


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """What happened: who (`actor`) did what (`action`, like `tenant.updated`), when, in detail.

    `detail` is JSON; it never holds keys, prompts or answers. `at` is Unix seconds.
    """

    at: float
    actor: str
    action: str
    detail: dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry(Event):
    """An event in its place in the chain."""

    sequence: int
    previous: str
    hash: str


def chain(head: Head, event: Event) -> Entry:
    """The entry that continues the log after `head`."""
    sequence = head.sequence + 1
    return Entry(
        at=event.at,
        actor=event.actor,
        action=event.action,
        detail=event.detail,
        sequence=sequence,
        previous=head.hash,
        hash=_hash(sequence, event, head.hash),
    )


def verify(entries: Iterable[Entry], *, outside: Head | None = None) -> Head:
    """Check a whole log, in order; returns its head, or raises `AuditBroken` with the place.

    `outside` is a head that was kept elsewhere: the log must contain it.
    """
    return verify_with(entries, [] if outside is None else [outside])


def verify_with(entries: Iterable[Entry], noted: Iterable[Head]) -> Head:
    """The same with any number of heads that were kept elsewhere."""
    missing = {head for head in noted if head != START}
    head = START
    for entry in entries:
        if entry.sequence != head.sequence + 1:
            raise AuditBroken(f"entry {entry.sequence} follows entry {head.sequence}")
        if entry.previous != head.hash:
            raise AuditBroken(f"entry {entry.sequence} does not follow from the one before it")
        if entry.hash != _hash(entry.sequence, entry, entry.previous):
            raise AuditBroken(f"entry {entry.sequence} was changed after it was written")
        head = Head(entry.sequence, entry.hash)
        missing.discard(head)
    if missing:
        raise AuditBroken(
            f"the log ends at entry {head.sequence} and does not contain the entry "
            f"{min(missing).sequence} that was noted outside: it was cut off or rewritten"
        )
    return head


def to_line(entry: Entry) -> str:
    """One line of an export (JSON Lines)."""
    return json.dumps(asdict(entry), sort_keys=True, ensure_ascii=False, separators=(",", ":"))


def from_line(line: str) -> Entry:
    """An exported line; raises `AuditBroken`."""
    try:
        return Entry(**json.loads(line, object_pairs_hook=no_key_twice))
    except (TypeError, ValueError) as error:
        raise AuditBroken(f"not an audit entry: {line[:80]!r}") from error


def no_key_twice(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """For `json.loads`: a JSON object, of which every reader reads the same; raises `JSONDecodeError`."""
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = next(key for place, (key, _) in enumerate(pairs) if key in dict(pairs[:place]))
        raise json.JSONDecodeError(f"the key {twice[:80]!r} is there twice", "", 0)
    return found


def _hash(sequence: int, event: Event, previous: str) -> str:
    content = [sequence, event.at, event.actor, event.action, event.detail, previous]
    text = json.dumps(content, sort_keys=True, ensure_ascii=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()
