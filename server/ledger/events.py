"""Usage as CloudEvents 1.0: each request that has ended is one event, in the order of the ledger.

An event's id is the id of the request's decision. What was accepted by the sink is noted after it was, so that an event
may come again, with the same id, and none is left out.
"""

from __future__ import annotations

import json
import logging
import os
import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime, timedelta
from hashlib import sha256
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any, Final, Protocol

import httpx

from flexgate.server.ledger.errors import LedgerError
from flexgate.server.ledger.lines import append_lines
from flexgate.server.ledger.reading import is_older_copy, opened

TYPE: Final = "flexgate.request.ended"
SOURCE: Final = "/flexgate/ledger"
BATCH: Final = 100
"""Events in one request to a sink."""
LOOK_EVERY_SECONDS: Final = 1.0
LONGEST_WAIT_SECONDS: Final = 60.0
TIMEOUT_SECONDS: Final = 10.0
REFUSED: Final = frozenset({400, 413, 422})
"""What a sink answers to an event that it will never take; everything else is tried again."""
TAKEN_BEFORE: Final = 409
"""What a sink may answer to an event whose id it has."""
MOST_REFUSED: Final = 100
"""Events that a sink may refuse one after another; then one is tried in each `LONGEST_WAIT_SECONDS`."""
_USAGE: Final = (
    "request",
    "registered_at",
    "ended_at",
    "outcome",
    "tenant",
    "key_id",
    "endpoint",
    "model",
    "policy_version",
    "weights_epoch",
    "prompt_tokens",
    "cached_tokens",
    "completion_tokens",
)
_PARTS: Final = (
    "expert",
    "owner",
    "share_ppm",
    "prompt_positions",
    "completion_positions",
    "agreement",
    "agreement_version",
)
_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)
Event = dict[str, Any]

logger = logging.getLogger(__name__)


class Refused(Exception):
    """A sink will never take what it was given."""


class Unreachable(Exception):
    """A sink does not take anything now; the message says why."""

    def __init__(self, why: str, wait: float = 0.0) -> None:
        super().__init__(why)
        self.wait = wait


@dataclass(frozen=True, slots=True)
class Place:
    """The last request of a ledger that a sink has: its sequence and its id."""

    sent: int = 0
    request: str | None = None


class Sink(Protocol):
    """Where events go."""

    name: str
    """Without a password: it is logged, and names the file of the place."""

    def send(self, events: Sequence[Event]) -> None:
        """Return once all are safe there; raises `Refused` or `Unreachable`. Blocks."""

    def close(self) -> None:
        """Let go of what it holds."""


class FileSink:
    """A file to which each event is appended as a line of JSON; it may be moved away and begins anew then."""

    def __init__(self, path: Path) -> None:
        self.name = str(path.absolute())
        self._path = path

    def send(self, events: Sequence[Event]) -> None:
        """Append them, and wait for the disk; raises `Unreachable`."""
        try:
            append_lines(self._path, map(_encoded, events))
        except OSError as error:
            raise Unreachable(f"{self._path} cannot be written: {error.strerror or error}") from error

    def close(self) -> None:
        """Nothing is held."""


class HttpSink:
    """An endpoint that takes batches of CloudEvents in JSON."""

    def __init__(self, url: str, token: str | None = None) -> None:
        headers = {"content-type": "application/cloudevents-batch+json; charset=UTF-8"}
        if token is not None:
            headers["authorization"] = f"Bearer {token}"
        self._url = httpx.URL(url)
        self.name = str(self._url.copy_with(username=None, password=None))
        self._client = httpx.Client(headers=headers, timeout=TIMEOUT_SECONDS, trust_env=False)

    def send(self, events: Sequence[Event]) -> None:
        """Post them; raises `Refused` or `Unreachable`."""
        body = b"[" + b",".join(map(_encoded, events)) + b"]"
        try:
            response = self._client.post(self._url, content=body)
        except httpx.HTTPError as error:
            raise Unreachable(f"no answer: {type(error).__name__}") from error
        if response.status_code == TAKEN_BEFORE and len(events) == 1:
            return
        if response.status_code in REFUSED or response.status_code == TAKEN_BEFORE:
            raise Refused(f"status {response.status_code}")
        if not response.is_success:
            wait = response.headers.get("retry-after", "")
            raise Unreachable(f"status {response.status_code}", float(wait) if wait.isdecimal() else 0.0)

    def close(self) -> None:
        """Close its connections."""
        self._client.close()


def sink_of(place: str, token: str | None) -> Sink:
    """The sink at a URL, or in a file."""
    return HttpSink(place, token) if place.lower().startswith(("http://", "https://")) else FileSink(Path(place))


class Exporter:
    """Sends what the ledger has, from where it stopped, in a thread of its own."""

    def __init__(
        self, ledger: Path, sink: Sink, folder: Path, *, count: Callable[[str, int], None] = lambda *_: None
    ) -> None:
        """Read where it stopped.

        Args:
            ledger: the file of the journal, which stands.
            folder: where the place in the ledger is kept, apart for each sink, and events that the sink refuses.
            count: told how many events were `sent` or `refused`.

        Raises:
            LedgerError: the ledger, or where it stopped, cannot be read.
        """
        digest = sha256(sink.name.encode()).hexdigest()[:12]
        self.refused = folder / f"usage-events-{digest}.refused.jsonl"
        self._place = folder / f"usage-events-{digest}.json"
        self._ledger = ledger
        self._sink = sink
        self._count = count
        self._stop = threading.Event()
        self._refused_in_a_row = 0
        self._at = self._fitting(self._read_place())
        self._thread = threading.Thread(target=self._run, name="flexgate-usage-events", daemon=True)

    def start(self) -> None:
        """Begin to send."""
        self._thread.start()

    def stop(self) -> None:
        """Send no more; what is left is sent after the next start. Blocks for what is being sent, for some seconds."""
        self._stop.set()
        self._thread.join(TIMEOUT_SECONDS)
        if self._thread.is_alive():
            logger.warning("%s does not answer; what it was sent last is sent again", self._sink.name)
        else:
            self._sink.close()

    @property
    def sent(self) -> int:
        """The sequence in the ledger up to which every event was sent, or refused for good."""
        return self._at.sent

    def _run(self) -> None:
        told, wait = False, 0.0
        while not self._stop.wait(wait):
            try:
                wait = 0.0 if self._send_next() else LOOK_EVERY_SECONDS
                told = False
            except Exception as error:
                if not told:
                    expected = isinstance(error, LedgerError | OSError | Unreachable)
                    logger.warning("usage events wait for %s: %s", self._sink.name, error, exc_info=not expected)
                told = True
                asked = error.wait if isinstance(error, Unreachable) else 0.0
                wait = min(LONGEST_WAIT_SECONDS, max(asked, LOOK_EVERY_SECONDS, 2 * wait))

    def _send_next(self) -> bool:
        """Send what comes next; whether there was anything."""
        found = read_events(self._ledger, self._at.sent, BATCH)
        if not found:
            return False
        try:
            self._sink.send([event for _, event in found])
            self._count("sent", len(found))
        except Refused:
            for sequence, event in found:  # each alone: which it is, and the others arrive
                if self._stop.is_set():
                    return False
                self._send_one(event)
                self._keep_place(sequence, event["id"])
                if self._refused_in_a_row >= MOST_REFUSED:
                    raise Unreachable(
                        f"it refused {self._refused_in_a_row} events one after another", LONGEST_WAIT_SECONDS
                    ) from None
        else:
            self._keep_place(found[-1][0], found[-1][1]["id"])
            self._refused_in_a_row = 0
        return True

    def _send_one(self, event: Event) -> None:
        try:
            self._sink.send([event])
            self._refused_in_a_row = 0
            self._count("sent", 1)
        except Refused as error:
            self._refused_in_a_row += 1
            logger.error("usage event %s was refused (%s), and is kept in %s", event["id"], error, self.refused)
            FileSink(self.refused).send([event])
            self._count("refused", 1)

    def _read_place(self) -> Place:
        try:
            kept = json.loads(self._place.read_text())
            place = Place(kept["sent"], kept.get("request"))
        except FileNotFoundError:
            return Place()
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise LedgerError(
                f"{self._place} cannot be read: {error}; move it away to send every event of the ledger again"
            ) from error
        if type(place.sent) is not int or place.sent < 0:
            raise LedgerError(f"{self._place} has no place in the ledger; move it away to send every event again")
        return place

    def _fitting(self, place: Place) -> Place:
        """The place, or the beginning of a ledger that never had the request which was sent last."""
        if place.request is None:
            return place
        with opened(self._ledger) as ledger:
            if not is_older_copy(ledger, place.sent, place.request):
                return place
        logger.warning(
            "the ledger %s is not the one whose events were sent to %s up to number %d: all of its events are sent, "
            "also those that were sent before",
            self._ledger,
            self._sink.name,
            place.sent,
        )
        return Place()

    def _keep_place(self, sent: int, request: str) -> None:
        place = Place(sent, request)
        part = self._place.with_suffix(".part")
        with part.open("w") as file:
            json.dump({"sink": self._sink.name, **asdict(place)}, file)
            file.flush()
            os.fsync(file.fileno())
        part.replace(self._place)
        self._at = place


def read_events(ledger: Path, after: int, most: int) -> list[tuple[int, Event]]:
    """The next events after a sequence, with theirs; raises `LedgerError`. Blocks."""
    with opened(ledger) as connection:
        requests = connection.execute(
            f"SELECT sequence, {', '.join(_USAGE)} FROM usage WHERE sequence > ? ORDER BY sequence LIMIT ?",
            (after, most),
        ).fetchall()
        last = requests[-1][0] if requests else after
        parts = connection.execute(
            f"SELECT sequence, {', '.join(_PARTS)}, CAST(prompt_mass AS TEXT), CAST(completion_mass AS TEXT) "
            "FROM parts WHERE sequence > ? AND sequence <= ? ORDER BY sequence, expert",
            (after, last),
        ).fetchall()
    of = {sequence: [row[1:] for row in rows] for sequence, rows in groupby(parts, key=itemgetter(0))}
    return [(row[0], _event(row[1:], of.get(row[0], []))) for row in requests]


def _event(row: Sequence[Any], parts: Iterable[Sequence[Any]]) -> Event:
    """One request as an event; masses are decimal strings in 1/2³²: JSON's numbers are doubles."""
    data = dict(zip(_USAGE, row, strict=True))
    names = (*_PARTS, "prompt_mass", "completion_mass")
    data["experts"] = [dict(zip(names, part, strict=True)) for part in parts]
    return {
        "specversion": "1.0",
        "type": TYPE,
        "source": SOURCE,
        "id": data["request"],
        "subject": data["tenant"],
        "time": _time(data["ended_at"]),
        "datacontenttype": "application/json",
        "data": data | {"registered_at": _time(data["registered_at"]), "ended_at": _time(data["ended_at"])},
    }


def _time(microseconds: int) -> str:
    """RFC 3339 in UTC."""
    return (_EPOCH + timedelta(microseconds=microseconds)).isoformat(timespec="microseconds").replace("+00:00", "Z")


def _encoded(event: Event) -> bytes:
    return json.dumps(event, ensure_ascii=False, separators=(",", ":")).encode()
