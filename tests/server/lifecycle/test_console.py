"""What an operator is shown at start."""

from __future__ import annotations

import io
import json
import re
import shlex
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from flexgate.policies.store.demo import DEMO_KEYS
from flexgate.server.engine.frontend.memory import SlotPlan
from flexgate.server.lifecycle.bootstrap import _hint
from flexgate.server.lifecycle.console import Progress, Started, shortened


def test_the_demo_names_its_keys_and_a_request_that_can_be_typed() -> None:
    keys, tried = _hint("http://127.0.0.1:8000").splitlines()
    assert all(key in keys for key in DEMO_KEYS)
    program, url, *options = shlex.split(tried.removeprefix("try:  "))
    assert (program, url) == ("curl", "http://127.0.0.1:8000/v1/chat/completions")
    assert json.loads(options[options.index("-d") + 1])["messages"][0]["role"] == "user"
    assert f"Authorization: Bearer {DEMO_KEYS[0]}" in options


PLAN = SlotPlan(7, 7, expert_bytes=787_500, other_bytes=0, kv_bytes=1 << 30, attribution_bytes=33_600_000)


def shown(
    terminal: bool,
    *,
    model: Path = Path("/models/olmo"),
    owner: str | None = "gazette",
    slots: SlotPlan = PLAN,
    **more: Any,
) -> str:
    """What a start prints, on a terminal or elsewhere, 80 columns wide."""
    checkpoint = SimpleNamespace(path=model, architecture=SimpleNamespace(num_hidden_layers=4))
    experts = [SimpleNamespace(id=f"expert-{number}", owner=owner) for number in range(9)]
    client = SimpleNamespace(experts=lambda: experts, kernels="vllm")
    plan = SimpleNamespace(slots=slots, checkpoint=checkpoint, dtype="bfloat16")
    rest = {"admin_address": None, "admin_key": None, "hint": None, "set_aside": (), **more}
    started: Any = Started(plan=plan, client=client, address="http://127.0.0.1:8000", **rest)  # type: ignore[arg-type]
    console = Console(file=io.StringIO(), width=80, force_terminal=terminal)
    with Progress(console) as progress:
        progress.stage("loading vLLM", 0, 0)
        progress.stage("checking weights", 1, 4)
        progress.stage("checking weights", 2, 4)
        progress.ready(started)
    file: Any = console.file
    text: str = file.getvalue()
    return text


def test_low_rank_slots_are_shown_with_what_they_take() -> None:
    lines = shown(False, slots=replace(PLAN, low_rank_bytes=70_000, low_ranks=(64, 8, 64))).splitlines()
    memory = "7 of 787.5 kB = 5.5 MB and 1 of rank 8, 2 of rank 64 = 70.0 kB, KV cache 1.1 GB, "
    assert f"slots    10, on each rank {memory}its attribution 33.6 MB, in all 1.1 GB" in lines


def test_where_there_is_no_terminal_every_line_is_whole() -> None:
    hint = f"try: {'x' * 300}"
    lines = shown(False, admin_key="sk-1", hint=hint, set_aside=[f"a: {'y' * 200}"]).splitlines()
    assert lines[:2] == ["loading vLLM ...", "checking weights ..."]
    assert lines[2] == "model      /models/olmo (4 layers, bfloat16)"
    assert lines[3] == "experts    " + ", ".join(f"expert-{number} (gazette)" for number in range(9))
    assert lines[4] == f"set aside  a: {'y' * 200}"
    memory = "7 of 787.5 kB = 5.5 MB, KV cache 1.1 GB, its attribution 33.6 MB, in all 1.1 GB"
    assert lines[5] == f"slots      7, on each rank {memory}"
    assert lines[6:8] == ["kernels    vllm", "address    http://127.0.0.1:8000"]
    assert lines[8:] == ["first admin key, shown only now: sk-1", hint]


def test_an_expert_without_an_owner_is_shown_as_such() -> None:
    assert "expert-8 (no owner)" in shown(False, owner=None)


def test_on_a_terminal_the_summary_wraps_in_its_column() -> None:
    plain = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", shown(True)).partition("model ")[2]
    lines = [line.rstrip() for line in plain.splitlines()]
    assert all(len(line) <= 80 for line in lines)
    assert lines[2].startswith("         (gazette), expert-")


@pytest.mark.parametrize(
    ("path", "short"),
    [
        ("/srv/models/olmo", "/srv/models/olmo"),
        ("{home}/models/olmo", "~/models/olmo"),
        ("{cwd}/out/olmo", "out/olmo"),
        ("/srv/{long}/experts/demo/checkpoint", "…/experts/demo/checkpoint"),
        ("{cwd}/{long}/experts/demo/checkpoint", "…/experts/demo/checkpoint"),
    ],
)
def test_a_long_path_is_shortened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str, short: str) -> None:
    home, cwd = tmp_path / "home", tmp_path / "cwd"
    cwd.mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(cwd)
    assert shortened(Path(path.format(home=home, cwd=cwd, long="x" * 60))) == short
