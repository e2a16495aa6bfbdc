"""The benchmarks run and their arithmetic holds; how fast anything is, no test says."""

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from speed import (
    admission,
    changes,
    compare,
    counterfactual,
    decisions,
    emergency,
    enforcement,
    engine_speed,
    fairness,
    mixture,
    packages,
    quiet,
    record,
    serving,
    startup,
    tables,
    tracing,
    versions,
)
from speed.engines import Batch
from speed.plot import draw
from speed.record import Journal, Run
from speed.statistics import Ratio


def test_contenders_take_turns_in_alternating_order() -> None:
    order: list[str] = []
    contenders = {"a": lambda: order.append("a"), "b": lambda: order.append("b")}
    compare.take_turns(contenders, 3)
    assert "".join(order) == "abbaab"


@pytest.fixture
def asked(tmp_path: Path) -> Run:
    return Run(quick=True, rounds=1, results=tmp_path / "results", kept=tmp_path / "kept")


def test_what_was_measured_is_there_after_a_kill_and_what_was_cut_off_is_not(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "j.jsonl")
    journal.add("start 0", {"ours": [1.5]})
    with (tmp_path / "j.jsonl").open("a") as file:
        file.write('{"start 1": {"ou')
    again = Journal(tmp_path / "j.jsonl")
    assert "start 1" not in again
    assert again["start 0"] == {"ours": [1.5]}
    again.add("start 1", 2)
    assert Journal(tmp_path / "j.jsonl")["start 1"] == 2
    again.close()
    assert "start 0" not in Journal(tmp_path / "j.jsonl")


def test_other_options_and_other_code_do_not_go_on_from_a_journal(asked: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    asked.journal("x").add("start 0", 1)
    assert "start 0" in asked.journal("x")
    assert "start 0" not in replace(asked, starts=9).journal("x")
    monkeypatch.setattr(record, "_commit", lambda: ("another", ""))
    assert "start 0" not in asked.journal("x")


def test_a_baseline_unlike_itself_is_written_beside_the_result_file(
    asked: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    good, bad = Ratio(1.0, 0.995, 1.005, 5, 50), Ratio(1.03, 1.02, 1.04, 5, 50)
    run = replace(asked, quick=False)
    assert run.write("x", {"value": 1}, shape={}, itself=[("decode", good)]).name == "x.json"
    beside = run.write("x", {"value": 2}, shape={}, itself=[("decode", good), ("prefill", bad)])
    first, second = (json.loads(path.read_text()) for path in (beside.with_name("x.json"), beside))
    assert (first["value"], first["publishable"]) == (1, True)
    assert (second["value"], second["publishable"]) == (2, False)
    assert "prefill: the baseline against itself is 1.030 [1.020, 1.040]" in second["reasons"][0]
    assert "not published" in capsys.readouterr().out


def test_a_result_file_names_machine_load_commit_and_time(asked: Run) -> None:
    report = json.loads(asked.write("x", {}, shape={}).read_text())
    assert report["machine"]["cores"] > 0
    assert len(report["load"]["before"]) == len(report["load"]["after"]) == 3
    assert report["commit"]
    assert report["seconds"] >= 0


def test_no_result_that_must_not_be_published_is_committed() -> None:
    committed = {path.name: json.loads(path.read_text()) for path in record.RESULTS.glob("*.json")}
    assert [name for name, report in committed.items() if not report.get("publishable", True)] == []
    assert [name for name in committed if "unpublishable" in name] == []


def test_the_minutes_are_those_of_the_committed_file_times_what_was_asked_for(
    asked: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(record, "RESULTS", tmp_path)
    (tmp_path / "x.json").write_text('{"seconds": 600, "starts": 5, "rounds": 4}')
    run = replace(asked, quick=False, rounds=None)
    assert record.minutes("x", run) == "x: about 10 minutes"
    assert record.minutes("x", replace(run, starts=10, rounds=8)) == "x: about 40 minutes"
    assert "does not say" in record.minutes("y", run)


def measured(start: int) -> dict[str, Any]:
    """Made-up turns of engines: every engine a little faster than the one before it."""
    return {
        name: [(1.0 + place / 10 + start / 100, 2.0, 3.0, 4.0) for _ in range(3)]
        for place, name in enumerate(engine_speed.CONTENDERS)
    }


def test_an_engine_report_has_the_baseline_against_itself_beside_every_ratio(asked: Run) -> None:
    cases = [("prefill", Batch(1, 8, 1), 3)]
    journal = asked.journal("engine-eager")
    for start in range(3):
        journal.add(f"start {start}, case 0", measured(start))
    report, ((name, itself),) = engine_speed.report(journal, 3, cases)
    ratios = report["cases"][0]["ratio"]
    assert name == "prefill of 1"
    assert ratios["gated/ungated"]["median"] > 1  # the gated engine took the least time
    assert ratios[engine_speed.ITSELF]["median"] == pytest.approx(itself.value, abs=1e-3)
    assert itself.value < 1
    assert ratios["gated/ungated"]["starts"] == report["starts"] == 3


def test_the_readmes_table_shows_the_baseline_against_itself_once_it_is_measured() -> None:
    case = {"phase": "decode", "ratio": {tables.ITSELF: {"median": 1.0042}}}
    assert list(tables._itself("eager", [case])) == [
        "| gate compiled out / itself (A/A), eager |  | 1.004 | within 1% of 1 |"
    ]
    assert list(tables._itself("eager", [{"phase": "decode", "ratio": {}}])) == []


def test_the_admission_benchmark_writes_a_file_that_names_its_machine(asked: Run) -> None:
    admission.run(replace(asked, rounds=20))
    report = json.loads((asked.results / "admission.json").read_text())
    assert report["command"] == 'make bench BENCH="admission --rounds 20"'
    assert {"device", "versions", "model", "calls"} <= report.keys()
    assert 0 < report["pieces"]["all"]["p50_us"] <= report["pieces"]["all"]["p99_us"]


def test_the_tracing_benchmark_says_what_spans_cost(asked: Run) -> None:
    tracing.run(replace(asked, rounds=2))
    report = json.loads((asked.results / "tracing.json").read_text())
    assert (report["ratio"]["rounds"], report["spans"]) == (2, {"sent": 2 * tracing.ROUND * 6})
    assert 0 < report["off_p50_us"] < 2 * report["on_p50_us"]


def test_the_packages_benchmark_compares_with_copying(asked: Run) -> None:
    packages.run(asked)
    report = json.loads((asked.results / "packages.json").read_text())
    assert all(report[name]["ratio"]["median"] > 0 for name in ("extract", "verify", "merge"))
    assert report["merge"]["bytes"] > report["extract"]["bytes"] > report["verify"]["bytes"]


def test_the_decisions_benchmark_tells_cached_from_computed(asked: Run) -> None:
    decisions.run(asked)
    report = json.loads((asked.results / "decisions.json").read_text())
    assert 0 < report["cached_dated_us"] < report["decide_dated_us"]
    assert report["tenants"]["1000"]["revise_one_tenant_ms"] > 0


@pytest.mark.slow
def test_the_enforcement_benchmark_sees_every_change_arrive(asked: Run) -> None:
    enforcement.run(replace(asked, rounds=3))
    report = json.loads((asked.results / "enforcement.json").read_text())
    assert 0 < report["sqlite"]["enforced_seconds"]["max"] < 2


@pytest.mark.slow
@pytest.mark.engine
@pytest.mark.sliced(1, family="engines")
def test_the_engine_and_the_serving_benchmarks_run_and_can_be_drawn(asked: Run) -> None:
    engine_speed.run("eager", asked)
    serving.run(asked)
    draw(asked.results)
    assert "transformers" in (asked.results / "speed.svg").read_text()


@pytest.mark.slow
@pytest.mark.engine
@pytest.mark.sliced(1, family="engines")
def test_the_mixture_benchmark_compares_with_vllms_own_class(asked: Run) -> None:
    mixture.run("eager", asked)
    report = json.loads((asked.results / "mixture-eager.json").read_text())
    assert {*report["cases"][0]["ratio"]} == {"gated/ungated", engine_speed.ITSELF}


@pytest.mark.slow
@pytest.mark.engine
@pytest.mark.sliced(1, family="engines")
def test_the_counterfactual_benchmark_compares_with_as_many_scoring_passes(asked: Run) -> None:
    counterfactual.run(asked)
    report = json.loads((asked.results / "counterfactual.json").read_text())
    assert 2 <= report["passes"] <= 4
    assert report["ratio"]["median"] > 0


def made_round(others: float, *, loaded: float = 0.04) -> fairness.Round:
    return fairness.Round({"idle": [0.02, 0.02], "loaded": [loaded, loaded], "again": [0.02, 0.02]}, others)


def test_first_tokens_are_compared_over_the_rounds_that_other_programs_disturbed_least() -> None:
    found = [[made_round(0.9, loaded=0.4), made_round(0.1), made_round(0.0)]] * 3
    results, itself, held = fairness.report(found, rounds=2)
    assert results["first_token_ratio"]["median"] == pytest.approx(2.0)
    assert (results["rounds_disturbed"], itself.value, held) == (3, pytest.approx(1.0), True)
    assert fairness._against(found, rounds=2) == []


def test_first_tokens_beside_other_programs_are_not_published_and_the_reason_says_how_much_they_used() -> None:
    (why,) = fairness._against([[made_round(0.8)] * 6, [made_round(0.0)] * 2], rounds=2)
    assert why.startswith("in 1 of 2 starts")
    assert "0.80 cores" in why


def test_the_bound_holds_where_the_whole_interval_does() -> None:
    found = [[made_round(0.0, loaded=loaded)] for loaded in (0.02, 0.04, 0.11)]
    results, _, held = fairness.report(found, rounds=1)
    assert results["first_token_ratio"]["median"] < fairness.BOUND
    assert not held


def test_what_others_use_is_what_neither_the_server_nor_the_benchmark_used() -> None:
    before, after = quiet.Used(10.0, 100.0, 40.0), quiet.Used(12.0, 103.0, 42.0)
    assert after.others_since(before) == pytest.approx(0.5)
    now = quiet.Used.now(os.getpid())
    assert now.machine > now.ours > 0


@pytest.mark.slow
@pytest.mark.engine
@pytest.mark.sliced(1, family="engines")
def test_the_emergency_benchmark_sees_what_each_change_waited_for(asked: Run) -> None:
    emergency.run(asked)
    report = json.loads((asked.results / "emergency.json").read_text())
    assert len(report["changes"]) == 6
    assert all(one["passes"]["median"] >= 1 and one["seconds"]["worst"] > 0 for one in report["changes"].values())
    assert report["statuses_of_streams"]["200"] >= 200


@pytest.mark.slow
@pytest.mark.engine
@pytest.mark.sliced(1, family="engines")
def test_the_fairness_benchmark_runs(asked: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fairness, "REQUESTS", 2)
    fairness.run(asked)
    report = json.loads((asked.results / "fairness.json").read_text())
    assert report["first_token_ratio"]["median"] > 0
    assert report["publishable"] is False


@pytest.mark.slow
@pytest.mark.engine
@pytest.mark.sliced(1, family="engines")
def test_a_version_beside_itself_is_measured_in_every_case(asked: Run) -> None:
    versions.run(replace(asked, before=versions.ROOT))
    report = json.loads((asked.results / "versions.json").read_text())
    assert report["command"] == 'make bench BENCH="versions --before FOLDER --rounds 1"'
    assert {"start", "decode of 8", "chat, 1 clients"} <= {case["case"] for case in report["cases"]}
    assert all(case["now/before"]["median"] > 0 for case in report["cases"])


def test_a_folder_without_an_environment_is_no_version(asked: Run, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="in a checkout of the older commit first"):
        versions.run(replace(asked, before=tmp_path))


@pytest.mark.slow
@pytest.mark.engine
@pytest.mark.sliced(1, family="engines")
def test_the_startup_benchmark_runs(asked: Run) -> None:
    startup.run(asked)
    slots = json.loads((asked.results / "startup.json").read_text())["slots"]
    assert slots["slots"][0] < slots["slots"][1]


@pytest.mark.slow
@pytest.mark.engine
@pytest.mark.sliced(1, family="engines")
def test_the_changes_benchmark_runs_and_no_token_comes_after_a_revocation(asked: Run) -> None:
    changes.run(asked)
    draw(asked.results)
    assert "while an expert is added" in (asked.results / "changes.svg").read_text()
    cycles = json.loads((asked.results / "changes.json").read_text())["cycles"]
    assert cycles["users_ended_and_others_unharmed"] == cycles["cycles"] == 3
    assert cycles["tokens_after_the_answer"] == 0
    assert cycles["prompt_tokens_hit_in_the_cache_of_a_revoked_expert"] == 0
