"""The benchmarks run and their arithmetic holds; how fast anything is, no test says."""

import json
from pathlib import Path

import pytest
from speed import admission, changes, compare, decisions, enforcement, engine_speed, packages, serving, startup
from speed.plot import draw


def test_contenders_take_turns_in_alternating_order() -> None:
    order: list[str] = []
    contenders = {"a": lambda: order.append("a"), "b": lambda: order.append("b")}
    compare.take_turns(contenders, 3)
    assert "".join(order) == "abbaab"


def test_a_ratio_is_taken_within_each_round_so_that_drift_cancels() -> None:
    drifting = [1.0, 2.0, 4.0, 8.0]
    assert compare.ratio([0.9 * value for value in drifting], drifting)["ci95"] == [0.9, 0.9]


def test_an_interval_covers_the_median_and_narrows_with_rounds() -> None:
    few, many = [0.9, 1.0, 1.1] * 2, [0.9, 1.0, 1.1] * 200
    low, high = compare.median_interval(few)
    assert low <= 1.0 <= high
    assert compare.median_interval(many) == [1.0, 1.0]


def test_pooled_quantiles_weigh_every_request_alike() -> None:
    slow, fast = [[2.0] * 9 + [20.0]], [[1.0] * 9 + [10.0]]
    assert compare.pooled_quantile_ratio(slow, fast, 0.5)["ratio"] == 2.0


def test_the_admission_benchmark_writes_a_file_that_names_its_machine(tmp_path: Path) -> None:
    admission.run(quick=True, rounds=20, results=tmp_path)
    report = json.loads((tmp_path / "admission.json").read_text())
    assert report["command"] == 'make bench BENCH="admission --rounds 20"'
    assert {"device", "versions", "model", "calls"} <= report.keys()
    assert 0 < report["pieces"]["all"]["p50_us"] <= report["pieces"]["all"]["p99_us"]


def test_the_packages_benchmark_compares_with_copying(tmp_path: Path) -> None:
    packages.run(quick=True, rounds=1, results=tmp_path)
    report = json.loads((tmp_path / "packages.json").read_text())
    assert all(report[name]["ratio"]["median"] > 0 for name in ("extract", "verify", "merge"))
    assert report["merge"]["bytes"] > report["extract"]["bytes"] > report["verify"]["bytes"]


def test_the_decisions_benchmark_tells_cached_from_computed(tmp_path: Path) -> None:
    decisions.run(quick=True, rounds=1, results=tmp_path)
    report = json.loads((tmp_path / "decisions.json").read_text())
    assert 0 < report["cached_dated_us"] < report["decide_dated_us"]
    assert report["tenants"]["1000"]["revise_one_tenant_ms"] > 0


@pytest.mark.slow
def test_the_enforcement_benchmark_sees_every_change_arrive(tmp_path: Path) -> None:
    enforcement.run(quick=True, rounds=3, results=tmp_path)
    report = json.loads((tmp_path / "enforcement.json").read_text())
    assert 0 < report["sqlite"]["enforced_seconds"]["max"] < 2


@pytest.mark.slow
@pytest.mark.engine
@pytest.mark.sliced(1, family="engines")
def test_the_engine_and_the_serving_benchmarks_run_and_can_be_drawn(tmp_path: Path) -> None:
    engine_speed.run("eager", quick=True, rounds=1, results=tmp_path)
    serving.run(quick=True, rounds=1, results=tmp_path)
    draw(tmp_path)
    assert "transformers" in (tmp_path / "speed.svg").read_text()


@pytest.mark.slow
@pytest.mark.engine
@pytest.mark.sliced(1, family="engines")
def test_the_startup_benchmark_runs(tmp_path: Path) -> None:
    startup.run(quick=True, rounds=1, results=tmp_path)
    slots = json.loads((tmp_path / "startup.json").read_text())["slots"]
    assert slots["slots"][0] < slots["slots"][1]


@pytest.mark.slow
@pytest.mark.engine
@pytest.mark.sliced(1, family="engines")
def test_the_changes_benchmark_runs_and_no_token_comes_after_a_withdrawal(tmp_path: Path) -> None:
    changes.run(quick=True, rounds=1, results=tmp_path)
    draw(tmp_path)
    assert "while an expert is added" in (tmp_path / "changes.svg").read_text()
    cycles = json.loads((tmp_path / "changes.json").read_text())["cycles"]
    assert cycles["users_ended_and_others_unharmed"] == cycles["cycles"] == 3
    assert cycles["tokens_after_the_answer"] == 0
    assert cycles["prompt_tokens_hit_in_the_cache_of_a_withdrawn_expert"] == 0
