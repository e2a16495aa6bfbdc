"""The simulation of batch orders, and the figures that the documents take from it."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from flexgate.kernels.bench.ordering import ORDERS, Load, Model, Outcome, loads, simulate
from flexgate.kernels.bench.plot import svg
from flexgate.kernels.bench.roofline import chart, expert_bytes

DOCS = Path(__file__).parents[3] / "docs"
ONE_EACH, RANDOM, ALIKE = (replace(load, requests=60, backlog=30) for load in loads())


def test_gates_that_are_all_alike_leave_nothing_to_order() -> None:
    outcomes = [replace(simulate(ALIKE, order, 8), order="") for order in ORDERS]
    assert outcomes[0] == outcomes[1] == outcomes[2]


def test_a_single_request_at_a_time_takes_what_the_roofline_says() -> None:
    model = Model()
    load = Load("one", (frozenset({0, 1}),), requests=20, prompt=1, answer=50)
    outcome = simulate(load, "arrival", 1, model)
    reading = 32 * 2 * expert_bytes(model.shape) + model.dense_bytes
    assert outcome.experts_per_step == 2
    assert outcome.tokens_per_s == pytest.approx(model.ceilings.bytes_per_s / reading, rel=0.01)


@pytest.mark.parametrize("load", [ONE_EACH, RANDOM], ids=lambda load: load.name)
def test_splitting_a_step_by_gates_reads_more_in_all(load: Load) -> None:
    together, split = simulate(load, "arrival", 8), simulate(load, "split steps", 8)
    assert split.experts_per_step < together.experts_per_step
    assert split.tokens_per_s < together.tokens_per_s


def test_letting_like_gates_in_first_reads_less() -> None:
    assert simulate(ONE_EACH, "like gates", 8).experts_per_step < simulate(ONE_EACH, "arrival", 8).experts_per_step


def test_nobody_waits_for_ever_behind_likelier_gates() -> None:
    """A gate that never fits still gets its turn: with patience, all requests of the load finish."""
    rare = Load("rare", (frozenset({0}), frozenset({0}), frozenset({0}), frozenset(range(7))), requests=200, backlog=20)
    assert simulate(rare, "like gates", 2).p99_s < 20 * simulate(rare, "arrival", 2).median_s


def test_committed_figures_are_what_the_commands_write() -> None:
    stored = json.loads((DOCS / "batch-ordering.json").read_text())
    outcomes = [Outcome(**values) for values in stored["outcomes"]]
    assert len(outcomes) == 72
    for order in ORDERS:
        again = simulate(loads()[0], order, 8)
        assert again in outcomes
    assert (DOCS / "kernels-roofline.svg").read_text() == svg(chart())
