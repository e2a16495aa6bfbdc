"""The benchmark `loop`: its corpus covers every field, and its instruments name what held a thread."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from speed import loop
from speed.loop import trace
from speed.loop.bodies import DOORS, LARGEST, SIZES, Body, corpus
from speed.loop.trace import Long, Sent
from speed.record import Journal, Run

from flexgate.server.admin.operations import OPERATIONS
from flexgate.server.inference.request.values import Fate

TRACING = Path(loop.__file__).with_name("tracing")
SLOW = """
import asyncio

def held():
    return sum(range(10_000_000))

async def main():
    await asyncio.sleep(0)
    held()
    await asyncio.sleep(0.05)

import uvloop
uvloop.run(main())
"""


@pytest.fixture(scope="module")
def bodies() -> list[Body]:
    return list(corpus())


def test_the_corpus_has_every_field_of_every_door_at_least_once(bodies: list[Body]) -> None:
    assert len({body.name for body in bodies}) == len(bodies) > 200
    for door in DOORS:
        fields = {body.field for body in bodies if body.name.startswith(f"{door.name}:")}
        if door.generic:
            assert fields >= door.table.keys()
    writes = {op.path.replace("{project_id}", "proj_bench") for op in OPERATIONS if op.body.model_fields}
    assert {path for path in writes if "{" not in path} <= {body.path for body in bodies}


def test_what_can_be_long_or_deep_is_sent_with_the_type_that_the_field_takes(bodies: list[Body]) -> None:
    typed = {body.field for body in bodies if body.typed}
    assert typed >= {
        "messages",
        "input",
        "prompt",
        "tools",
        "response_format",
        "structured_outputs",
        "text",
        "flexgate",
    }
    assert typed >= {"stop", "logit_bias", "bad_words", "tokens", "policy", "expert_ids", "experts"}
    honoured = {name for door in DOORS for name, rule in door.table.items() if rule.fate is Fate.HONOURED}
    assert typed - {"policy", "expert_ids", "experts", "name", "assignee"} <= honoured


def test_a_body_is_json_within_the_servers_limit(bodies: list[Body]) -> None:
    made = {id(body.value): body for body in bodies if body.field is not None and body.typed}
    for body in made.values():
        content = body.content(SIZES[2])
        assert len(content) < 2 * SIZES[2] < LARGEST
        if "deep arrays" not in body.name:  # deeper than any reader of JSON goes
            assert body.field in json.loads(content)


def test_a_constrained_body_has_a_twin_without_the_constraint(bodies: list[Body]) -> None:
    body = next(body for body in bodies if body.name == "chat: response_format = enum")
    assert json.loads(body.unconstrained or b"") == {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 4}


def test_the_instruments_name_the_function_that_held_the_event_loop(tmp_path: Path) -> None:
    script = tmp_path / "flexgate"
    script.write_text(SLOW)
    environment = {**os.environ, "PYTHONPATH": str(TRACING), "FLEXGATE_TRACE": str(tmp_path)}
    subprocess.run([sys.executable, str(script)], env=environment, check=True, timeout=60)
    longest = max(trace.read(tmp_path), key=lambda long: long.busy)
    assert longest.kind == "callback"
    assert longest.busy > 50
    assert any(frame.endswith(" held") for frame in longest.where)


def test_without_a_folder_the_instruments_do_nothing(tmp_path: Path) -> None:
    script = tmp_path / "flexgate"
    script.write_text("import asyncio; assert asyncio.Handle._run.__module__ == 'asyncio.events'")
    environment = {**os.environ, "PYTHONPATH": str(TRACING)}
    environment.pop("FLEXGATE_TRACE", None)
    subprocess.run([sys.executable, str(script)], env=environment, check=True, timeout=60)


def test_a_long_callback_belongs_to_the_request_before_it_and_the_least_try_counts() -> None:
    first, second = Sent("a", 1, began=10.0, outcome="200"), Sent("b", 1, began=20.0, outcome="400")
    long = [Long("callback", "x", at, busy, busy, ()) for at, busy in ((9.0, 900.0), (19.9, 70.0), (20.1, 60.0))]
    trace.assign([first, second], long)
    assert (first.busy("callback"), second.busy("callback"), first.busy("step")) == (70.0, 60.0, 0.0)
    assert trace.least([first, second], "callback") is second
    assert first.accepted
    assert not second.accepted


def test_the_start_of_the_next_server_is_not_charged_to_the_body_that_ended_the_last() -> None:
    ended_it = Sent("a", 1, began=10.0, ended=30.0, outcome="no answer within 10 s")
    long = [Long("callback", "x", at, busy, busy, ()) for at, busy in ((11.0, 90.0), (31.0, 900.0))]
    trace.assign([ended_it], long)
    assert ended_it.busy("callback") == 90.0


def test_a_run_that_left_bodies_out_is_not_publishable(
    bodies: list[Body], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Idle:
        trace = tmp_path

        def __init__(self, _directory: Path) -> None: ...
        def __enter__(self) -> Idle:
            return self

        def __exit__(self, *_: object) -> None: ...

    monkeypatch.setattr(loop, "Target", Idle)
    monkeypatch.setattr(loop, "MINUTES", -1.0)
    assert not loop.run(Run(quick=False, results=tmp_path, kept=tmp_path / "kept"), bodies[:3])
    report = json.loads((tmp_path / "loop.json").read_text())
    assert (report["publishable"], report["reasons"]) == (False, ["3 of 3 bodies were not tried"])


def test_a_run_that_was_ended_goes_on_where_it_was(bodies: list[Body], tmp_path: Path) -> None:
    journal, sent = Journal(tmp_path / "kept.jsonl"), list[str]()

    class Answering:
        trace = tmp_path / "trace"

        def send(self, body: Body, _content: bytes, name: str | None = None) -> Sent:
            sent.append(body.name)
            if sent.count(body.name) > 1:
                raise KeyboardInterrupt
            return Sent(name or body.name, 1, time.monotonic(), outcome="400", long=[])

        def settle(self) -> None: ...

    chosen = [body for body in bodies if not body.typed][: 2 * loop.PART]
    target: Any = Answering()
    send = target.send
    target.send = lambda body, content: send(chosen[0] if len(sent) == loop.PART + 3 else body, content)
    with pytest.raises(KeyboardInterrupt):
        loop.send(target, chosen, journal, seconds=60)
    again: Any = Answering()
    sent.clear()
    cases, spent, untried = loop.send(again, chosen, Journal(tmp_path / "kept.jsonl"), seconds=60)
    assert sent == [body.name for body in chosen[loop.PART :]]
    assert [case.body for case in cases] == chosen
    assert (untried, spent > 0) == (0, True)


def test_what_a_case_was_is_read_back_from_the_journal(bodies: list[Body]) -> None:
    sent = Sent("a", 1, 10.0, outcome="200", long=[Long("callback", "x", 1.0, 60.0, 61.0, ("here",))])
    case = loop.Case(bodies[0], 7, [sent], [Sent("b", 1)])
    assert loop.Case.read(json.loads(json.dumps(case.kept())), bodies) == case


def test_a_step_is_judged_beside_the_same_tokens_without_a_constraint(bodies: list[Body]) -> None:
    def case(step: float, plain: float) -> loop.Case:
        ours, other = Sent("a", 1, outcome="200"), Sent("b", 1, outcome="200")
        ours.long.append(Long("step", "", 0.0, step, step, ("here",)))
        other.long.append(Long("step", "", 0.0, plain, plain, ()))
        return loop.Case(bodies[0], 1, [ours], [other])

    found = loop.report([case(190.0, 100.0), case(140.0, 100.0)], untried=3)
    assert [step["thread_ms"] for step in found["steps_beyond"]] == [190.0]
    assert found["longest_steps"][0]["unconstrained_ms"] == 100.0
    assert found["bodies_without_time"] == 3


@pytest.mark.slow
@pytest.mark.engine
def test_the_loop_benchmark_runs_against_a_server(bodies: list[Body], tmp_path: Path) -> None:
    names = ("chat: messages = parts", "chat: response_format = e-mail", "completions: prompt = ids", "/v1/experts")
    chosen = [body for body in bodies if body.name.endswith(names)]
    loop.run(Run(quick=True, results=tmp_path), chosen)
    report = json.loads((tmp_path / "loop.json").read_text())
    assert report["bodies"] == len(chosen) > 2
    assert report["accepted"] > 0
    assert report["longest_callbacks"]
