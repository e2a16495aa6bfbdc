"""The audit log's hash chains: every entry names the hash of the one before it in its log. Pure.

    hash = SHA-256(RFC 8785 form of {action, actor, at, detail, format, log, previous, sequence})

`at` is a string of whole microseconds, `format` is `flexgate-audit/2`, and in `detail` a whole number beyond ±(2⁵³ − 1)
is a string, so that every language makes the same hash. Earlier entries have the hash of version 1, which only Python
makes; they stay valid.

There are two logs, numbered together: `changes`, of which nothing is ever removed, and `requests`, the denied requests,
whose oldest entries may be trimmed. Each trimming is an entry of `changes`
that says how many entries went, and the hash that the rest goes on from.

A `Head` that was kept outside the database betrays any edit, deletion, reordering or truncation of what came before it
in its log. Without one, a log cut off at its end, or written anew as a whole, is consistent in itself.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Final, NamedTuple

import rfc8785

from flexgate.policies.errors import AuditBroken
from flexgate.policies.strict_json import no_key_twice

_NOTHING_BEFORE: Final = "0" * 64
FORMAT: Final = "flexgate-audit/2"
MICROSECONDS: Final = 1_000_000
SAFE: Final = 2**53 - 1
CHANGES: Final = "changes"
REQUESTS: Final = "requests"
LOGS: Final = (CHANGES, REQUESTS)
DENIED: Final = "request.denied"
TRIMMED: Final = "audit.trimmed"


class Head(NamedTuple):
    """The newest entry of a log, to be kept in another place. `sequence` 0 is the empty log."""

    sequence: int
    hash: str
    log: str = CHANGES


STARTS: Final = {log: Head(0, _NOTHING_BEFORE, log) for log in LOGS}


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """What happened: who (`actor`) did what (`action`, like `tenant.updated`), when, in detail.

    `detail` is JSON; it never holds keys, prompts or answers. `at` is Unix seconds.
    """

    at: float
    actor: str
    action: str
    detail: dict[str, Any]

    @property
    def kind(self) -> str:
        """The log that it belongs to."""
        return REQUESTS if self.action == DENIED else CHANGES


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry(Event):
    """An event in its place in the chain."""

    sequence: int
    previous: str
    hash: str
    log: str = CHANGES


class Verified(NamedTuple):
    """The result of a verification: heads, number of entries, and how many were trimmed.

    `trimmed_heads` counts outside heads of trimmed entries, which cannot be compared.
    """

    changes: Head
    requests: Head
    entries: int
    trimmed: int
    trimmed_heads: int

    @property
    def heads(self) -> tuple[Head, Head]:
        """Of the changes and of the denied requests."""
        return self.changes, self.requests


def chain(head: Head, event: Event, *, newest: int | None = None) -> Entry:
    """The entry that continues a log after `head`; `newest` is the number of the newest entry of either log."""
    sequence = (head.sequence if newest is None else newest) + 1
    event = replace(event, at=_microseconds(event.at) / MICROSECONDS)
    return Entry(
        at=event.at,
        actor=event.actor,
        action=event.action,
        detail=event.detail,
        sequence=sequence,
        previous=head.hash,
        hash=_new_hash(sequence, event, head),
        log=head.log,
    )


def trimming(at: float, actor: str, *, before: float, entries: int, through: Head) -> Event:
    """The event of removing the oldest `entries` of the denied requests, up to and with `through`."""
    detail = {"log": through.log, "before": before, "entries": entries, "through": through.sequence}
    return Event(at=at, actor=actor, action=TRIMMED, detail={**detail, "hash": through.hash})


def verify(entries: Iterable[Entry], *, outside: Iterable[Head] = ()) -> Verified:
    """Check a whole log, in order; raises `AuditBroken` with the place.

    `outside` are heads that were kept elsewhere: the log must contain them, or say that it trimmed them.
    """
    walk = _Walk({head for head in outside if head.sequence})
    for entry in entries:
        walk.step(entry)
    return walk.end()


class _Trim(NamedTuple):
    """How many entries were removed, and the last of them."""

    entries: int
    through: Head

    @classmethod
    def of(cls, entry: Entry) -> _Trim:
        detail = entry.detail
        entries, through, hash_ = (detail.get(name) for name in ("entries", "through", "hash"))
        if type(entries) is not int or type(through) is not int or type(hash_) is not str or entries < 1:
            raise AuditBroken(f"entry {entry.sequence} does not name what was trimmed")
        return cls(entries, Head(through, hash_, REQUESTS))


@dataclass(slots=True)
class _Walk:
    """State of a verification."""

    missing: set[Head]
    heads: dict[str, Head] = field(default_factory=lambda: dict(STARTS))
    newest: int = 0
    entries: int = 0
    absent: int = 0  # numbers without an entry
    gap: tuple[int, int] = (0, 0)  # the last of them lies between these entries
    resumed: str = _NOTHING_BEFORE  # the hash that the requests go on from
    trims: list[_Trim] = field(default_factory=list)
    versions: list[Callable[[int, Event, str, str], str | None]] = field(default_factory=lambda: [_hash, _hash_1])

    def step(self, entry: Entry) -> None:
        if entry.sequence <= self.newest or entry.log not in self.heads:
            raise AuditBroken(f"entry {entry.sequence} follows entry {self.newest}")
        if entry.sequence > self.newest + 1:
            self.absent += entry.sequence - self.newest - 1
            self.gap = self.newest, entry.sequence
        head = self.heads[entry.log]
        if entry.log == REQUESTS and head == STARTS[REQUESTS]:
            self.resumed = entry.previous
        elif entry.previous != head.hash:
            if entry.sequence > self.newest + 1:
                raise AuditBroken(f"entry {entry.sequence} follows entry {self.newest}")
            raise AuditBroken(f"entry {entry.sequence} does not follow from the one before it")
        if not self._fits(entry):
            raise AuditBroken(f"entry {entry.sequence} was changed after it was written")
        if entry.action == TRIMMED:
            self.trims.append(_Trim.of(entry))
        self.heads[entry.log] = Head(entry.sequence, entry.hash, entry.log)
        self.missing.discard(self.heads[entry.log])
        self.newest = entry.sequence
        self.entries += 1

    def _fits(self, entry: Entry) -> bool:
        """Whether an entry has its hash, of version 1 only where no entry of version 2 was before it."""
        for version in self.versions:
            if entry.hash == version(entry.sequence, entry, entry.previous, entry.log):
                self.versions = [_hash] if version is _hash else [_hash_1, _hash]
                return True
        return False

    def end(self) -> Verified:
        last = self.trims[-1].through if self.trims else STARTS[REQUESTS]
        trimmed = sum(trim.entries for trim in self.trims)
        if trimmed != self.absent or self.gap[1] > last.sequence + 1:
            raise AuditBroken(
                f"entries between {self.gap[0]} and {self.gap[1]} are missing, and no trim is recorded for them"
            )
        if self.heads[REQUESTS].sequence and self.resumed != last.hash:
            raise AuditBroken("the first denied request that is left does not match the recorded trim")
        gone = {head for head in self.missing if head.log == REQUESTS and head.sequence < last.sequence}
        left = self.missing - gone - {last}
        if left:
            raise AuditBroken(
                f"the log ends at entry {self.newest} and does not contain the entry "
                f"{min(left).sequence} that was kept outside: it was truncated or rewritten"
            )
        return Verified(self.heads[CHANGES], self.heads[REQUESTS], self.entries, trimmed, len(gone))


def to_line(entry: Entry) -> str:
    """One line of an export (JSON Lines)."""
    return json.dumps(asdict(entry), sort_keys=True, ensure_ascii=False, separators=(",", ":"))


def from_line(line: str) -> Entry:
    """An exported line; raises `AuditBroken`."""
    try:
        return Entry(**json.loads(line, object_pairs_hook=no_key_twice))
    except (TypeError, ValueError) as error:
        raise AuditBroken(f"not an audit entry: {line[:80]!r}") from error


def _hash(sequence: int, event: Event, previous: str, log: str) -> str | None:
    """Of version 2; None for a time that is not of whole microseconds."""
    at = _microseconds(event.at)
    if at / MICROSECONDS != event.at:
        return None
    content = {
        "action": event.action,
        "actor": event.actor,
        "at": str(at),
        "detail": event.detail,
        "format": FORMAT,
        "log": log,
        "previous": previous,
        "sequence": sequence,
    }
    return hashlib.sha256(rfc8785.dumps(_portable(content))).hexdigest()


def _new_hash(sequence: int, event: Event, head: Head) -> str:
    hash_ = _hash(sequence, event, head.hash, head.log)
    if hash_ is None:
        raise AuditBroken(f"the time {event.at} of entry {sequence} is not of whole microseconds")
    return hash_


def _hash_1(sequence: int, event: Event, previous: str, log: str) -> str:
    content = [sequence, event.at, event.actor, event.action, event.detail, previous]
    if log != CHANGES:
        content.append(log)
    text = json.dumps(content, sort_keys=True, ensure_ascii=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def _microseconds(seconds: float) -> int:
    return round(seconds * MICROSECONDS)


def _portable(value: Any) -> Any:
    """JSON that every language reads alike: as strings what are no numbers there, and unpaired surrogates escaped."""
    if isinstance(value, dict):
        return {_portable(str(name)): _portable(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [_portable(one) for one in value]
    if isinstance(value, str):
        return value.encode("utf-8", "backslashreplace").decode()
    beyond = type(value) is int and abs(value) > SAFE
    return str(value) if beyond or (isinstance(value, float) and not math.isfinite(value)) else value
