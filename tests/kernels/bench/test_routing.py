"""The command that times a routing call on a CPU."""

import json
from pathlib import Path

import pytest
import torch

from flexgate.kernels.bench import routing


def test_every_contender_is_timed_in_every_shape(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(routing, "TOKENS", (1, 3))
    monkeypatch.setattr(routing, "EXPERTS", (8,))
    monkeypatch.setattr(routing, "WARM_CALLS", 2)
    monkeypatch.setattr("sys.argv", ["routing", str(tmp_path / "routing.json"), "--rounds", "2"])
    threads = torch.get_num_threads()
    try:
        routing.main()
    finally:
        torch.set_num_threads(threads)
    result = json.loads((tmp_path / "routing.json").read_text())
    assert result["computed_by"] == "C"
    assert [(shape["tokens"], shape["experts"]) for shape in result["shapes"]] == [(1, 8), (3, 8)]
    for shape in result["shapes"]:
        assert shape["warm"].keys() == shape["cold"].keys() == routing.contenders(1, 8).keys()
        assert shape["warm"][routing.SOFTMAX]["ratio"] == 1
        assert all(of["us"] > 0 for of in shape["warm"].values())
    assert len(capsys.readouterr().out.splitlines()) == 3


def test_contenders_choose_the_same_experts() -> None:
    calls = routing.contenders(8, 64)
    ids = {name: call()[1].sort(dim=1).values.int() for name, call in calls.items()}  # type: ignore[index]
    assert all(torch.equal(chosen, ids[routing.TOPK]) for chosen in ids.values())
