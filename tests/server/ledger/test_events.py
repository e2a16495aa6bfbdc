"""A consumer of CloudEvents gets each request of the ledger, by its id, whatever happens to it or to the server."""

from __future__ import annotations

import asyncio
import json
import shutil
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from cloudevents.core.formats.json import JSONFormat
from smalldisk import mounted

from flexgate.server.ledger import events
from flexgate.server.ledger.entries import COMPLETED, RegisteredExpert, Registration, Used
from flexgate.server.ledger.errors import LedgerError
from flexgate.server.ledger.events import Exporter, FileSink, HttpSink, Unreachable
from flexgate.server.ledger.journal import Journal

REQUESTS = 250
SECONDS = 20


@pytest.fixture(scope="module")
def ledger(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of requests that two experts took part in; the larger mass is beyond what a double holds."""
    path = tmp_path_factory.mktemp("ledger") / "ledger.db"
    journal = Journal(path, clock=lambda: 1_795_000_000.000001)

    async def fill() -> None:
        experts = (RegisteredExpert(0, "public", None), RegisteredExpert(1, "news", "gazette", "a1", 3))
        for number in range(REQUESTS):
            one = Registration(f"dec_{number}", number, "t", "k", "/v1/completions", "m", 7, 2, experts)
            journal.register(one)
            journal.end(one, COMPLETED, Used(5, 1, 2, [1, 2**53 + 1, 5, 4], [1, 1, 2, 2]))

    asyncio.run(fill())
    journal.close()
    return path


class Consumer(ThreadingHTTPServer):
    """Takes batches; `answers` are the statuses of the next requests, 0 for a connection that breaks off after it."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.answers: list[int] = []
        self.never: frozenset[str] = frozenset()
        self.received: list[Any] = []
        self.tokens: set[str | None] = set()
        self.most = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/events"

    def ids(self) -> Counter[str]:
        return Counter(event.get_id() for event in self.received)


class Handler(BaseHTTPRequestHandler):
    server: Consumer
    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["content-length"]))
        assert self.headers["content-type"] == "application/cloudevents-batch+json; charset=UTF-8"
        self.server.tokens.add(self.headers["authorization"])
        batch = [JSONFormat().read(None, json.dumps(one)) for one in json.loads(body)]
        self.server.most = max(self.server.most, len(batch))
        status = self.server.answers.pop(0) if self.server.answers else 204
        if any(event.get_id() in self.server.never for event in batch):
            status = 400
        if status in (0, 204):
            self.server.received += batch
        if status == 0:
            self.close_connection = True
            return
        self.send_response(status)
        self.send_header("content-length", "0")
        self.end_headers()

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def consumer(monkeypatch: pytest.MonkeyPatch) -> Iterator[Consumer]:
    monkeypatch.setattr(events, "LOOK_EVERY_SECONDS", 0.01)
    monkeypatch.setattr(events, "LONGEST_WAIT_SECONDS", 0.05)
    server = Consumer()
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def until(done: Callable[[], bool]) -> None:
    waited = threading.Event()
    for _ in range(SECONDS * 100):
        if done():
            return
        waited.wait(0.01)
    raise AssertionError(f"not within {SECONDS} seconds")


@contextmanager
def exporting(ledger: Path, url: str, folder: Path, **more: Any) -> Iterator[Exporter]:
    exporter = Exporter(ledger, HttpSink(url, "secret"), folder, **more)
    exporter.start()
    try:
        yield exporter
    finally:
        exporter.stop()


def test_each_event_arrives_once_by_its_id_after_outages(ledger: Path, consumer: Consumer, tmp_path: Path) -> None:
    consumer.answers = [503, 0, 429, 500, 204, 0, 401]
    counted = Counter[str]()
    with exporting(ledger, consumer.url, tmp_path, count=lambda outcome, n: counted.update({outcome: n})) as exporter:
        until(lambda: exporter.sent == REQUESTS)
    assert set(consumer.ids()) == {f"dec_{number}" for number in range(REQUESTS)}
    assert max(consumer.ids().values()) > 1, "two batches arrived and were not acknowledged"
    assert consumer.most <= events.BATCH
    assert consumer.tokens == {"Bearer secret"}
    assert counted == {"sent": REQUESTS}
    order = list(dict.fromkeys(event.get_id() for event in consumer.received))
    assert order == [f"dec_{number}" for number in range(REQUESTS)]


def test_an_event_says_what_each_expert_did(ledger: Path, consumer: Consumer, tmp_path: Path) -> None:
    with exporting(ledger, consumer.url, tmp_path) as exporter:
        until(lambda: exporter.sent == REQUESTS)
    event = consumer.received[3]
    assert (event.get_type(), event.get_source(), event.get_subject()) == ("flexgate.request.ended", events.SOURCE, "t")
    assert event.get_time().isoformat() == "2026-11-18T11:06:40.000001+00:00"
    data = event.get_data()
    assert (data["prompt_tokens"], data["cached_tokens"], data["completion_tokens"]) == (5, 1, 2)
    public, news = sorted(data["experts"], key=lambda part: part["expert"] != "public")
    assert (public["owner"], public["agreement"]) == (None, None)
    assert (news["owner"], news["agreement"], news["agreement_version"]) == ("gazette", "a1", 3)
    assert news["prompt_mass"] == str(2**53 + 1)
    assert public["share_ppm"] + news["share_ppm"] == 1_000_000


def test_a_server_that_starts_again_goes_on_where_it_stopped(ledger: Path, consumer: Consumer, tmp_path: Path) -> None:
    consumer.answers = [204] + [503] * 10_000
    with exporting(ledger, consumer.url, tmp_path) as exporter:
        until(lambda: exporter.sent == events.BATCH)
    consumer.answers = []
    with exporting(ledger, consumer.url, tmp_path) as exporter:
        until(lambda: exporter.sent == REQUESTS)
    assert consumer.ids() == {f"dec_{number}": 1 for number in range(REQUESTS)}
    with exporting(ledger, consumer.url, tmp_path) as exporter:
        assert exporter.sent == REQUESTS


def test_what_is_never_taken_is_kept_and_holds_up_nothing(ledger: Path, consumer: Consumer, tmp_path: Path) -> None:
    consumer.never = frozenset({"dec_7", "dec_130"})
    counted = Counter[str]()
    with exporting(ledger, consumer.url, tmp_path, count=lambda outcome, n: counted.update({outcome: n})) as exporter:
        until(lambda: exporter.sent == REQUESTS)
    kept = [json.loads(line) for line in exporter.refused.read_text().splitlines()]
    assert [event["id"] for event in kept] == ["dec_7", "dec_130"]
    assert set(consumer.ids()) == {f"dec_{number}" for number in range(REQUESTS)} - consumer.never
    assert counted == {"sent": REQUESTS - 2, "refused": 2}


def test_an_event_that_the_sink_has_is_taken(ledger: Path, consumer: Consumer, tmp_path: Path) -> None:
    consumer.answers = [409, 409]  # the batch, and its first event alone
    counted = Counter[str]()
    with exporting(ledger, consumer.url, tmp_path, count=lambda outcome, n: counted.update({outcome: n})) as exporter:
        until(lambda: exporter.sent == REQUESTS)
    assert counted == {"sent": REQUESTS}
    assert set(consumer.ids()) == {f"dec_{number}" for number in range(1, REQUESTS)}


def test_a_sink_that_refuses_everything_is_not_given_all_at_once(
    ledger: Path, consumer: Consumer, tmp_path: Path
) -> None:
    consumer.never = frozenset(f"dec_{number}" for number in range(REQUESTS))
    exporter = Exporter(ledger, HttpSink(consumer.url), tmp_path)
    with pytest.raises(Unreachable, match="refused 100 events one after another"):
        exporter._send_next()
    assert exporter.sent == events.MOST_REFUSED
    with pytest.raises(Unreachable, match="refused 101"):
        exporter._send_next()
    consumer.never = frozenset()
    assert exporter._send_next()
    assert exporter.sent == events.MOST_REFUSED + 1 + events.BATCH


def test_a_password_of_a_sink_is_written_nowhere(ledger: Path, consumer: Consumer, tmp_path: Path) -> None:
    sink = HttpSink(consumer.url.replace("//", "//user:hunter2@"))
    assert sink.name == consumer.url
    exporter = Exporter(ledger, sink, tmp_path)
    assert exporter._send_next()
    assert "hunter2" not in exporter._place.read_text()


def filled(path: Path, names: range) -> None:
    journal = Journal(path, clock=lambda: 2.0)

    async def fill() -> None:
        for number in names:
            one = Registration(f"dec_{number}", 1, "t", "k", "/v1/completions", "m", 7, 2, ())
            journal.register(one)
            journal.end(one, COMPLETED, Used(5, 1, 2, [], []))

    asyncio.run(fill())
    journal.close()


def sent_of(ledger: Path, folder: Path) -> list[str]:
    """What a server sends that starts now."""
    path = folder / "events.jsonl"
    path.unlink(missing_ok=True)
    exporter = Exporter(ledger, FileSink(path), folder)
    while exporter._send_next():
        pass
    return [json.loads(line)["id"] for line in path.read_text().splitlines()] if path.exists() else []


def test_a_new_ledger_is_sent_from_its_beginning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    ledger = tmp_path / "ledger.db"
    filled(ledger, range(3))
    assert sent_of(ledger, tmp_path) == ["dec_0", "dec_1", "dec_2"]
    for file in tmp_path.glob("ledger.db*"):
        file.unlink()
    filled(ledger, range(10, 12))
    assert sent_of(ledger, tmp_path) == ["dec_10", "dec_11"]
    assert "is not the one whose events were sent" in caplog.text
    assert sent_of(ledger, tmp_path) == []


def test_a_ledger_that_was_put_back_leaves_no_event_out(tmp_path: Path) -> None:
    ledger, backup = tmp_path / "ledger.db", tmp_path / "backup.db"
    filled(ledger, range(3))
    shutil.copy(ledger, backup)
    filled(ledger, range(3, 6))
    assert len(sent_of(ledger, tmp_path)) == 6
    shutil.copy(backup, ledger)
    filled(ledger, range(20, 25))
    assert sent_of(ledger, tmp_path) == [f"dec_{number}" for number in (*range(3), *range(20, 25))]


def test_a_place_of_an_older_version_is_taken_over(ledger: Path, tmp_path: Path) -> None:
    exporter = Exporter(ledger, FileSink(tmp_path / "events.jsonl"), tmp_path)
    exporter._place.write_text('{"sink": "events.jsonl", "sent": 240}')
    assert sent_of(ledger, tmp_path) == [f"dec_{number}" for number in range(240, REQUESTS)]
    assert sent_of(ledger, tmp_path) == []


def test_a_file_gets_a_line_for_each_event_and_begins_anew_once_it_is_moved_away(ledger: Path, tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    exporter = Exporter(ledger, FileSink(path), tmp_path)
    assert exporter._send_next()
    path.rename(tmp_path / "events.1")
    while exporter._send_next():
        pass
    lines = [*(tmp_path / "events.1").read_text().splitlines(), *path.read_text().splitlines()]
    assert [JSONFormat().read(None, line).get_id() for line in lines] == [f"dec_{number}" for number in range(REQUESTS)]


def test_a_disk_that_is_full_leaves_no_half_of_a_line(ledger: Path, tmp_path: Path) -> None:
    with mounted(tmp_path / "disk", 1) as disk:
        path = disk.path / "events.jsonl"
        exporter = Exporter(ledger, FileSink(path), tmp_path)
        assert exporter._send_next()
        disk.fill(leave=8192)
        with pytest.raises(Unreachable, match="No space left on device"):
            exporter._send_next()
        assert exporter.sent == events.BATCH
        assert len(path.read_text().splitlines()) == events.BATCH
        disk.free()
        while exporter._send_next():
            pass
        ids = [json.loads(line)["id"] for line in path.read_text().splitlines()]
    assert ids == [f"dec_{number}" for number in range(REQUESTS)]


def test_a_line_that_was_cut_off_is_written_again(ledger: Path, tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    exporter = Exporter(ledger, FileSink(path), tmp_path)
    assert exporter._send_next()
    whole = path.read_bytes()
    path.write_bytes(whole + b'{"specversion":"1.0","id":"dec_100"')
    while exporter._send_next():
        pass
    assert path.read_bytes().startswith(whole)
    assert [json.loads(line)["id"] for line in path.read_text().splitlines()] == [f"dec_{n}" for n in range(REQUESTS)]


def test_a_stop_waits_for_one_event_and_not_for_all_of_a_batch(
    ledger: Path, consumer: Consumer, tmp_path: Path
) -> None:
    consumer.never = frozenset(f"dec_{number}" for number in range(REQUESTS))
    exporter = Exporter(ledger, HttpSink(consumer.url), tmp_path, count=lambda *_: exporter._stop.set())
    exporter.start()
    until(lambda: not exporter._thread.is_alive())
    assert exporter.sent == 1
    with exporting(ledger, consumer.url, tmp_path) as again:
        until(lambda: again.sent == REQUESTS)
    assert len(again.refused.read_text().splitlines()) == REQUESTS


def test_a_place_that_cannot_be_read_is_said_before_anything_is_sent(ledger: Path, tmp_path: Path) -> None:
    sink = FileSink(tmp_path / "events.jsonl")
    for content in ("", "{}", '{"sent": -1}', '{"sent": "1"}'):
        Exporter(ledger, sink, tmp_path)._place.write_text(content)
        with pytest.raises(LedgerError, match="move it away"):
            Exporter(ledger, sink, tmp_path)
        next(tmp_path.glob("usage-events-*.json")).unlink()
