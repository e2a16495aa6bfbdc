"""What tests run on every rank of an engine; each gets the rank's worker."""

import math
from collections.abc import Iterator
from typing import Any


def register_request(worker: Any, request_id: str, sealed: str) -> str | None:
    """Run on every rank: why it does not register a request, or None."""
    from flexgate.server.engine.protocol.gates import GateError
    from flexgate.server.engine.protocol.names import GATE_ARG

    gates = worker.model_runner.get_model().gates
    try:
        gates._register(request_id, {GATE_ARG: sealed})
    except GateError as error:
        return str(error)
    del gates.requests[request_id]
    return None


def overwrite_slots(worker: Any, slots: list[int], kind: str) -> None:
    """Run on every rank: fill what this one holds of the slots."""
    import torch

    generator = torch.Generator().manual_seed(7)
    worker.saved = getattr(worker, "saved", [])
    for part in _parts(worker, slots, weights_only=kind == "nan-weights"):
        worker.saved.append((part, part.clone()))
        if kind == "random":
            part.copy_(torch.randn(part.shape, generator=generator))
        else:
            part.fill_({"nan": math.nan, "nan-weights": math.nan, "1e30": 1e30, "-1e30": -1e30, "zero": 0.0}[kind])


def overwrite_embedding(worker: Any, token: int) -> None:
    """Run on every rank: make whatever reads this token overflow."""
    worker.saved = getattr(worker, "saved", [])
    row = worker.model_runner.get_model().model.model.embed_tokens.weight.data[token]
    worker.saved.append((row, row.clone()))
    row.fill_(1e38)


def overwrite_zero_slot(worker: Any) -> None:
    """Run on every rank: fill the reserved slot with ones."""
    worker.saved = getattr(worker, "saved", [])
    for layer in worker.model_runner.get_model().moe_layers():
        experts = layer.experts.routed_experts
        for weight in (experts.w13_weight, experts.w2_weight):
            part = weight.data[layer.router.zero_slot]
            worker.saved.append((part, part.clone()))
            part.fill_(1.0)


def slot_is_zero(worker: Any, slot: int) -> bool:
    """Run on every rank: whether nothing is left of a slot."""
    parts = list(_parts(worker, [slot], weights_only=False))
    return bool(parts) and not any(part.any() for part in parts)


def compute_without_factors(worker: Any) -> None:
    """Run on every rank: take the last layer's factors from what computes, and leave them where they are kept."""
    _kernels(worker)[-1].fused_experts.smaller = ()


def compute_with_factors(worker: Any) -> None:
    """Run on every rank: undo it."""
    experts = worker.model_runner.get_model().moe_layers()[-1].experts.routed_experts
    _kernels(worker)[-1].fused_experts.smaller = experts.smaller


def _kernels(worker: Any) -> list[Any]:
    layers = worker.model_runner.get_model().moe_layers()
    return [layer.experts.routed_experts.quant_method.moe_kernel for layer in layers]


def restore_slots(worker: Any) -> None:
    """Run on every rank: undo every overwrite."""
    for part, original in reversed(worker.saved):
        part.copy_(original)
    worker.saved = []


def _parts(worker: Any, slots: list[int], *, weights_only: bool) -> Iterator[Any]:
    for layer in worker.model_runner.get_model().moe_layers():
        arrays = layer.slot_arrays()
        for expert in [expert for expert, unit in enumerate(layer.unit_E.tolist()) if unit in slots]:
            router_row, _, *weights = arrays._parts(expert)
            bias = layer.gate.offset_E.data[expert : expert + 1]  # what is added, whatever is cleared
            yield from weights if weights_only else (router_row, bias, *weights)
