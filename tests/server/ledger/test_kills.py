"""A few of the kills that `make verify` does a thousand of, and what their judge sees."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
from kills import ledger, recount, usage

from flexgate.server.ledger.entries import COMPLETED, RegisteredExpert, Registration, Used
from flexgate.server.ledger.journal import Journal


def test_what_clients_got_is_recorded_and_no_more_than_was_generated() -> None:
    (verdict,) = ledger.run(8, seed=3)
    assert verdict["wrong"] == []
    assert verdict["kills"] == 8
    assert verdict["requests"]["interrupted"] > 0


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        (["generated a 5", "delivered a 5"], []),
        (["generated a 5", "delivered a 4"], []),
        (["generated a 6", "delivered a 6"], ["a (completed): delivered, recorded and generated are (6, 5, 6)"]),
        (["generated a 4", "delivered a 4"], ["a (completed): delivered, recorded and generated are (4, 5, 4)"]),
        (
            ["generated a 5", "generated b 3", "delivered b 2"],
            ["b: 2 tokens were delivered and nothing is recorded"],
        ),
    ],
)
def test_the_judge_sees_what_does_not_fit(tmp_path: Path, lines: list[str], said: list[str]) -> None:
    async def record() -> None:
        journal = Journal(tmp_path / "ledger.db", clock=lambda: 1.0)
        experts = (RegisteredExpert(0, "public", "commons"), RegisteredExpert(1, "news", "gazette", "a-news", 4))
        entry = journal.register(Registration("a", 1, "p", "k", "completions", "m", 1, 1, experts))
        prompt = [ledger.PROMPT, 0, ledger.PROMPT, 0]
        entry.end(COMPLETED, Used(ledger.PROMPT, 0, 5, prompt, [5, 5, 5, 5]))
        journal.close()

    asyncio.run(record())
    (tmp_path / "transcript").write_text("\n".join(lines))
    assert list(ledger.judge(tmp_path / "ledger.db", tmp_path / "transcript")) == said


def part(prompt: int, completion: int, ppm: int) -> dict[str, int]:
    """Of a model with one layer, where one expert is chosen at each position."""
    numbers = {"prompt_mass": prompt << 32, "completion_mass": completion << 32}
    return numbers | {"prompt_positions": prompt, "completion_positions": completion, "share_ppm": ppm}


def response(**shares: tuple[int, int]) -> dict[str, object]:
    """What a response says of each expert: positions and ppm."""
    experts = [{"id": id_, "gate_mass": float(n), "tokens": n, "share_ppm": ppm} for id_, (n, ppm) in shares.items()]
    return {"decision_id": "dec_a", "attribution": {"experts": experts}}


ASKED = {"number": 1, "key": "k", "began": 10.0, "ended": 20.0, "prompt": 7, "delivered": 5, "status": 200}
ROW = {"request": "dec_a", "key": "k", "registered": 11.0, "ended": 12.0, "outcome": "completed"}
NUMBERS = {"prompt": 7, "completion": 5, "parts": {"news": part(0, 3, 250_000), "public": part(7, 2, 750_000)}}
WHOLE = {"finished": True, "about": response(news=(3, 250_000), public=(9, 750_000), math=(0, 0))}


@pytest.mark.parametrize(
    ("asked", "rows", "said"),
    [
        (WHOLE, [{}], []),
        ({}, [{"outcome": "interrupted"}], []),
        ({"delivered": 0}, [], []),
        ({}, [], ["request 1: 5 tokens were delivered and nothing is recorded"]),
        ({}, [{}, {}], ["request 1: recorded 2 times"]),
        ({}, [{"registered": 21.0}], ["dec_a: no client asked for it", "request 1: 5 tokens were delivered"]),
        ({}, [{"completion": 4}], ["request 1 (completed): tokens delivered, recorded and generated are (5, 4, 5)"]),
        ({}, [{"completion": 6}], ["request 1 (completed): tokens delivered, recorded and generated are (5, 6, 5)"]),
        (
            {},
            [{"prompt": 6}],
            ["request 1 (completed): 6 tokens of a prompt of 7 are recorded", "request 1: its experts' prompt"],
        ),
        ({}, [{"prompt": 8}], ["request 1 (completed): 8 tokens of a prompt of 7 are recorded"]),
        (
            {"finished": True},
            [{"outcome": "stopped"}],
            ["request 1: a whole response of 5 tokens is recorded as stopped"],
        ),
        ({}, [{"parts": {"public": part(7, 5, 999_999)}}], ["request 1: its shares are not those of its masses"]),
        (
            {"about": response(news=(4, 250_000))},
            [{}],
            ["request 1: news is shown (4.0, 4), 250000 ppm; recorded (3.0, 3)"],
        ),
        (
            {"about": response(news=(3, 250_001))},
            [{}],
            ["request 1: news is shown (3.0, 3), 250001 ppm; recorded (3.0, 3)"],
        ),
        ({"about": response() | {"decision_id": "dec_b"}}, [{}], ["request 1: the response is dec_b, the row dec_a"]),
    ],
)
def test_the_recount_sees_what_does_not_fit(asked: dict[str, Any], rows: list[dict[str, Any]], said: list[str]) -> None:
    engine = {1: recount.Counted(prompts=1, generated=5)}
    recorded = [recount.Row(**{**ROW, **NUMBERS, **row}) for row in rows]
    found = list(recount.judge([recount.Asked(**{**ASKED, **asked})], engine, recorded, layers=1))
    assert bool(found) == bool(said)
    assert all(any(one.startswith(wanted) for one in found) for wanted in said)


def test_the_recount_sees_ends_that_go_back() -> None:
    rows = [recount.Row(**{**ROW, **NUMBERS, "ended": at}) for at in (12.0, 11.5)]
    engine = {1: recount.Counted(prompts=1, generated=5)}
    assert "ends go back in time" in list(recount.judge([recount.Asked(**ASKED)], engine, rows, layers=1))


def test_kills_of_servers_go_on_with_what_an_earlier_run_has_noted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(usage, "write_checkpoint", lambda place: place.mkdir())
    first = usage.World(tmp_path, seed=1)
    first.keys = [("key_1", "secret")]
    for number in range(2):
        with first.trial() as verdict:
            asked = first.begin("key_1")
            asked.delivered, asked.about = 3, {"decision_id": f"dec_{number}"}
            verdict |= {"victim": "engine", "wrong": []}
    again = usage.World(tmp_path, seed=1)
    assert (again.asked, again.verdicts, again.keys) == (first.asked, first.verdicts, first.keys)
    assert again.begin("key_1").number == 2
    with pytest.raises(ZeroDivisionError), again.trial():
        raise ZeroDivisionError
    with pytest.raises(SystemExit, match="in the midst of a kill"):
        usage.World(tmp_path, seed=1)
