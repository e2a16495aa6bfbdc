"""A few of the kills that `make verify` does a thousand of, and what their judge sees."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from kills import ledger

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
