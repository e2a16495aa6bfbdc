"""Every rank proves what it runs; one that cannot stops the start."""

from pathlib import Path
from typing import Any

import pytest
from enginekit.launched import launched

from flexgate.experts.checkpoint.families import Routing
from flexgate.server.engine.protocol.gates import new_seal_key
from flexgate.server.engine.protocol.handshake import HandshakeError, key_digest, verify
from flexgate.server.engine.protocol.slots import SlotMap, SlotTable

KEY = new_seal_key()
ROUTING = [2, *Routing(renormalize=False).facts]
TABLE = SlotTable.at_start(SlotMap(6, (bytes(range(6)),) * 3), 4)


def report(**changes: Any) -> dict[str, Any]:
    import vllm

    good = {
        "rank": 0,
        "vllm_version": vllm.__version__,
        "model": "flexgate.server.engine.worker.moe.GatedModel",
        "computes": "flexgate.server.engine.worker.model.FlexOlmoForCausalLM",
        "hook": "GatedCPUModelRunner",
        "moe_layers": 3,
        "ungated": [],
        "routing": ROUTING,
        "monolithic": False,
        "moe_kernels": "vllm",
        "computed_by": "CPUUnquantizedExperts",
        "routed_by": "C",
        "slots": TABLE.to_config(),
        "units": [unit_E.hex() for unit_E in TABLE.map.unit_LE],
        "low_ranks": [],
        "experts_here": list(range(6)),
        "zero_slot": True,
        "clears_blocks": True,
        "key_digest": key_digest(KEY),
    }
    return good | changes


def check(*reports: object, world_size: int = 2, expert_parallel: bool = False) -> None:
    verify(
        reports,
        world_size=world_size,
        table=TABLE,
        layers=3,
        key=KEY,
        moe_kernels="vllm",
        architecture="FlexOlmoForCausalLM",
        routing=ROUTING,
        expert_parallel=expert_parallel,
    )


def test_ranks_that_all_gate_pass() -> None:
    check(report(), report(rank=1))


@pytest.mark.parametrize(
    "changes",
    [
        {"model": "vllm.model_executor.models.transformers.TransformersMoEForCausalLM"},
        {"computes": "vllm.model_executor.models.olmoe.OlmoeForCausalLM"},
        {"ungated": ["model.layers.1.mlp.experts"]},
        {"routing": [1, *ROUTING[1:]]},
        {"routing": [2, True, *ROUTING[2:]]},
        {"routing": []},
        {"hook": "CPUModelRunner"},
        {"moe_layers": 2},
        {"monolithic": True},
        {"moe_kernels": "flexgate"},
        {"moe_kernels": "flexgate + vllm"},
        {"slots": SlotTable.at_start(TABLE.map, 5).to_config()},
        {"units": ["000102030405", "000102030405", "000102030504"]},
        {"low_ranks": [8]},
        {"experts_here": [0, 2, 4]},
        {"zero_slot": False},
        {"clears_blocks": False},
        {"key_digest": key_digest(new_seal_key())},
        {"vllm_version": "0.31.0"},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_a_rank_that_differs_is_named_with_what_is_wrong(changes: dict[str, Any]) -> None:
    (name,) = changes
    with pytest.raises(HandshakeError, match=f"^rank 1: .*{changes[name] if name == 'hook' else name}"):
        check(report(), report(rank=1, **changes))


def test_expert_parallel_ranks_must_hold_every_other_slot() -> None:
    even, odd = report(experts_here=[0, 2, 4]), report(rank=1, experts_here=[1, 3, 5])
    check(even, odd, expert_parallel=True)
    for reports in ((odd, even), (report(), report(rank=1)), (even, even)):
        with pytest.raises(HandshakeError, match="experts_here"):
            check(*reports, expert_parallel=True)


@pytest.mark.parametrize("reports", [(), (report(),), (report(), None), (report(), {})])
def test_a_rank_that_does_not_answer_is_missed(reports: tuple[object, ...]) -> None:
    with pytest.raises(HandshakeError):
        check(*reports)


WITHOUT_PLUGIN = """
prepare = launch.prepare_environment

def without_plugin(key, settings):
    prepare(key, settings)
    os.environ["VLLM_PLUGINS"] = "none"

launch.prepare_environment = without_plugin
"""


@pytest.mark.engine
@pytest.mark.slow
def test_an_engine_whose_plugin_is_missing_does_not_start(checkpoint: Path, tmp_path: Path) -> None:
    run = launched(checkpoint, tmp_path, WITHOUT_PLUGIN)
    assert run.returncode != 0
    assert "SERVED" not in run.stdout


# Read by every process of the engine: a gate for whatever asks, its own or not.
GATES_FOR_ALL = """
import math
from flexgate.server.engine.protocol import gates

def open_seal(sealed, key):
    return gates.Gate("any", "any", (gates.SlotRef(0, 1),), math.inf, "any")

gates.open_seal = open_seal
gates.check = gates.check_owner = lambda *args, **named: None
"""


@pytest.mark.engine
@pytest.mark.slow
@pytest.mark.parametrize("guarded", [True, False])
def test_an_engine_that_answers_without_a_gate_does_not_start(checkpoint: Path, tmp_path: Path, guarded: bool) -> None:
    (tmp_path / "sitecustomize.py").write_text("" if guarded else GATES_FOR_ALL)
    run = launched(checkpoint, tmp_path)
    assert (run.returncode == 0) == guarded
    assert ("SERVED" in run.stdout) == guarded
    assert ("the engine answered a request without a gate" in run.stderr) != guarded
