"""The benchmark's own run, without a GPU: everything is executed in the interpreter, nothing is timed."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import flexgate.kernels.bench.__main__ as command
from flexgate.kernels.bench.checks import bit_checks, value_checks
from flexgate.kernels.bench.place import Place, interpreter
from flexgate.kernels.bench.problem import random_weights
from flexgate.kernels.bench.report import UNMEASURED
from flexgate.kernels.bench.stock import find_source, load_stock
from flexgate.kernels.gated_experts.tiles import TUNING, read_tile_table
from flexgate.kernels.testing.configurations import Shape

TABLE = read_tile_table(TUNING / "default.json")
SMALL = Shape(hidden=32, intermediate=48, slots=3, top_k=2)


@pytest.mark.slow
def test_a_dry_run_checks_everything_runs_every_baseline_and_times_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command.main(["--interpret", "--out", str(tmp_path)]) == 0
    result = json.loads((tmp_path / "bench.json").read_text())
    assert result["measured"] is False
    assert len(result["checks"]) == 18
    assert all(check["passed"] for check in result["checks"])
    assert {row["kernel"] for row in result["compiled"]} == {"gate_up", "down", "combine"}
    assert all(row["local_bytes"] == 0 for row in result["compiled"])
    assert [(cell["tokens"], cell["allowed"]) for cell in result["cells"]] == [
        (tokens, allowed) for allowed in (4, 3, 2, 1) for tokens in (1, 5)
    ]
    for cell in result["cells"]:
        assert cell["failed"] == {}
        assert len(cell["times_us"]) == 6
        assert set(cell["times_us"].values()) == {None}
        assert cell["floor_us"] is None
    assert result["skipped"] == []
    assert UNMEASURED in capsys.readouterr().out
    assert not list(tmp_path.glob("*.svg"))


class Spoiled:
    """A kernel that adds a little to one element of its output, in large batches only."""

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel

    def __getitem__(self, grid: Any) -> Any:
        def launch(*arguments: Any, **constants: Any) -> None:
            self.kernel[grid](*arguments, **constants)
            expert_PH = arguments[2]
            if len(expert_PH) > 8:
                expert_PH[0, 0] *= 1.01

        return launch


@pytest.fixture
def spoiled() -> Place:
    place = interpreter()
    return replace(place, experts=replace(place.experts, down=Spoiled(place.experts.down)))


def test_the_kernels_pass_the_bit_checks() -> None:
    place = interpreter()
    layer = random_weights(place, SMALL)
    assert all(check.passed for check in bit_checks(place, TABLE, layer, 9))


def test_a_kernel_that_sees_its_batch_fails_the_bit_checks_only(spoiled: Place) -> None:
    layer = random_weights(spoiled, SMALL)
    failed = [check.name for check in bit_checks(spoiled, TABLE, layer, 9) if not check.passed]
    assert "token 0 alone = in a batch of 9" in failed
    assert all(check.passed for check in value_checks(spoiled, TABLE, layer, (7,), [(0, 1, 2)]))


def test_a_failed_check_ends_the_run_before_anything_is_timed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, spoiled: Place, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(command, "interpreter", lambda: spoiled)
    monkeypatch.setattr(command, "DRY", command.Plan({"tiny": SMALL}, (1,), (1,), 9))
    monkeypatch.setattr(command, "_compiled", lambda *_: [])
    assert command.main(["--interpret", "--out", str(tmp_path)]) == 1
    result = json.loads((tmp_path / "bench.json").read_text())
    assert result["cells"] == []
    assert result["skipped"] == ["all times: a check failed"]
    assert "FAILED tiny: token 0 alone" in capsys.readouterr().out


def test_the_time_limit_leaves_cells_out_and_says_so(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(command, "DRY", command.Plan({"tiny": SMALL}, (1,), (1, 2), 3))
    monkeypatch.setattr(command, "_compiled", lambda *_: [])
    assert command.main(["--interpret", "--out", str(tmp_path), "--seconds", "0"]) == 0
    assert "skipped: 6 cells of tiny: the time was up" in capsys.readouterr().out


def test_poison_in_a_slot_that_is_read_is_noticed() -> None:
    place = interpreter()
    layer = random_weights(place, SMALL).without([0])
    assert not all(check.passed for check in value_checks(place, TABLE, layer, (3,), [(0, 1)]))


def test_another_file_than_vllms_is_refused(tmp_path: Path) -> None:
    source = tmp_path / "fused_moe.py"
    source.write_text("def fused_moe_kernel(): pass\n")
    with pytest.raises(ValueError, match=r"take the file from vLLM 0\.32\.0"):
        load_stock(source)


def test_vllms_source_is_found_without_importing_vllm() -> None:
    import sys

    before = set(sys.modules)
    path = find_source()
    assert path is not None
    assert callable(load_stock(path).get_default_config)
    assert not {name for name in set(sys.modules) - before if name.split(".")[0] == "vllm"}


def test_routing_of_the_problem_stays_within_the_gate() -> None:
    from flexgate.kernels.bench.problem import random_batch

    batch = random_batch(interpreter(), SMALL, 40, (0, 2))
    assert batch.used() == [0, 2]
    assert batch.picks() == 80
    assert torch.isfinite(batch.weights_TK).all()
