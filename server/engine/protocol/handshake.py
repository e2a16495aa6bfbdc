"""The handshake: what every rank must prove before the server is ready."""

import hashlib
import math
from collections.abc import Sequence
from typing import Any, TypedDict

import torch

from flexgate.server.engine.protocol.slots import SlotTable
from flexgate.server.engine.seam.engine import VLLM_VERSION, zero_blocks
from flexgate.server.engine.seam.models import class_of

NULL_BLOCK = 0  # of vLLM's KV cache: what unused entries of block tables name; no request's


class HandshakeError(RuntimeError):
    """A rank does not run the gated model, hook and key that it should."""


class RankReport(TypedDict):
    """One rank's answer; plain data, since it crosses a process boundary."""

    rank: int
    vllm_version: str
    model: str
    computes: str
    hook: str
    moe_layers: int
    ungated: list[str]
    routing: list[Any]
    monolithic: bool
    moe_kernels: str
    computed_by: str
    routed_by: str
    slots: dict[str, Any]
    units: list[str]
    low_ranks: list[int]
    experts_here: list[int]
    zero_slot: bool
    clears_blocks: bool
    key_digest: str


def report_rank(worker: Any) -> RankReport:
    """Report what ``worker`` really holds, not what it was asked to hold."""
    model = worker.model_runner.get_model()
    layers = model.moe_layers()
    choices, programs = zip(*(layer.kernels for layer in layers), strict=True)
    if worker.use_v2_model_runner:
        hook = type(worker.model_runner.model_state).__name__
    else:
        hook = type(worker.model_runner).__name__
    return RankReport(
        rank=worker.rank,
        vllm_version=VLLM_VERSION,
        model=_class(model),
        computes=_class(model.model),
        hook=hook,
        moe_layers=len(layers),
        ungated=ungated_layers(layers, worker.vllm_config.compilation_config.static_all_moe_layers, model.model),
        routing=_same([layer.routing for layer in layers]),
        monolithic=any(layer.is_monolithic for layer in layers),
        moe_kernels=_one(choices),
        computed_by=_one(programs),
        routed_by=_one([layer.routed_by for layer in layers]),
        slots=model.gates.table.to_config(),
        units=[bytes(layer.unit_E.tolist()).hex() for layer in layers],
        low_ranks=_same([layer.low_ranks for layer in layers]),
        experts_here=_same([layer.experts_here() for layer in layers]),
        zero_slot=all(layer.zero_slot_holds_zeros() for layer in layers),
        clears_blocks=clears_blocks(worker.model_runner, model.kv_caches()),
        key_digest=key_digest(model.gates.key),
    )


def ungated_layers(layers: Sequence[Any], built: Sequence[str], model: Any) -> list[str]:
    """Layers of experts that no gate routes for, and those that vLLM does not know.

    Args:
        layers: those that have a gate.
        built: the names of all that vLLM has built and keeps.
        model: vLLM's, whose blocks call gates and experts.
    """
    gated = {layer.name for layer in layers if layer.is_routed_by_the_gate(model)}
    return sorted((gated ^ {*built}) | ({layer.name for layer in layers} - gated))


def _class(instance: object) -> str:
    return f"{type(instance).__module__}.{type(instance).__qualname__}"


def clears_blocks(runner: Any, caches: Sequence[torch.Tensor]) -> bool:
    """Whether blocks of the KV cache are zeroed when they are handed out, tried on the one that never is.

    Args:
        runner: of either version.
        caches: each layer's, a row per block, or several where the kernel's blocks are smaller.
    """
    config = runner.kv_cache_config
    blocks = [cache[: len(cache) // config.num_blocks] for cache in caches]
    for block in blocks:
        block.fill_(math.nan)
    zero_blocks(runner, [NULL_BLOCK])
    zeroed = not any(bool(block.any()) for block in blocks)
    for block in blocks:
        block.zero_()
    return bool(config.needs_kv_cache_zeroing) and zeroed


def key_digest(key: bytes) -> str:
    """Name a seal key without showing it."""
    return hashlib.sha256(b"seal-key\0" + key).hexdigest()


def describe_kernels(reports: Sequence[RankReport]) -> str:
    """What computes the experts and routes to them on all ranks, for the start-up summary."""
    return _one(
        [f"{report['moe_kernels']} ({report['computed_by']}), routing in {report['routed_by']}" for report in reports]
    )


def _same(values: Sequence[list[Any]]) -> list[Any]:
    """The list that all layers share; where they differ, one that matches no expectation."""
    return values[0] if all(value == values[0] for value in values) else ["layers differ"]


def _one(values: Sequence[str]) -> str:
    """The value that all share; where they differ, every one of them, which matches no expectation."""
    return " + ".join(sorted(set(values)))


def verify(
    reports: Sequence[object],
    *,
    world_size: int,
    table: SlotTable,
    layers: int,
    key: bytes,
    moe_kernels: str,
    architecture: str,
    routing: Sequence[Any],
    expert_parallel: bool = False,
) -> None:
    """Compare every rank's report with what the launcher asked for.

    Args:
        layers: how many have experts.
        architecture: as ``config.json`` names it.
        routing: how many experts a token gets, and what a router does with their weights; the same in all layers.
        expert_parallel: experts are dealt out to the ranks in turn, and each rank has a reserved one of zeros.

    Raises:
        HandshakeError: naming the rank and what is wrong with it.
    """
    if len(reports) != world_size:
        raise HandshakeError(f"{len(reports)} of {world_size} ranks answered the handshake")
    expected = {
        "model": "flexgate.server.engine.worker.moe.GatedModel",
        "computes": class_of(architecture),
        "moe_layers": layers,
        "ungated": [],
        "routing": routing,
        "monolithic": False,
        "moe_kernels": moe_kernels,
        "slots": table.to_config(),
        "units": [unit_E.hex() for unit_E in table.map.moe_layers],
        "low_ranks": list(table.map.low_ranks),
        "zero_slot": True,
        "clears_blocks": True,
        "key_digest": key_digest(key),
        "vllm_version": VLLM_VERSION,
    }
    step = world_size if expert_parallel else 1
    for rank, report in enumerate(reports):
        if not isinstance(report, dict):
            raise HandshakeError(f"rank {rank} gave no report")
        here = {"experts_here": list(range(rank % step, table.map.experts, step))}
        for name, value in (expected | here).items():
            if _plain(report.get(name)) != _plain(value):
                raise HandshakeError(f"rank {rank}: {name} is {report.get(name)!r}, expected {value!r}")
        if not str(report.get("hook")).startswith("Gated"):
            raise HandshakeError(f"rank {rank}: gates are not hooked into {report.get('hook')!r}")


def _plain(value: Any) -> Any:
    """Tuples become lists on the way through a message queue."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value
