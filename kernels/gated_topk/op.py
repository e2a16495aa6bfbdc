"""`gated_topk` on every device: one operator, `torch.ops.flexgate.gated_topk`, opaque to torch.compile.

Registered through `torch.library.define` rather than the `custom_op` decorator: the schema, the mutation and the fake
implementation are the same, and the decorator's bookkeeping costs more than the whole routing of a decode step.

Shape suffixes: T tokens, E experts of the layer, U units, K chosen experts.
"""

import threading
from typing import Any

import torch
from torch import Tensor

from flexgate.kernels.gated_topk.contract import Fill, check_arguments, empty_results, encode_fill
from flexgate.kernels.gated_topk.cpu import implement_on_cpu

_LIBRARY = torch.library.Library("flexgate", "FRAGMENT")
_NAME, _TRIAL = "gated_topk", "gated_topk_trial"
for _name in (_NAME, _TRIAL):
    _LIBRARY.define(
        f"{_name}(Tensor router_logits_TE, Tensor gate_T, Tensor unit_E, Tensor? bias_E, Tensor(a!) mass_TU, "
        "Tensor(b!) chosen_T, int top_k, bool renormalize, int fill) -> (Tensor weights_TK, Tensor ids_TK)"
    )
_OPERATOR = torch.ops.flexgate.gated_topk.default
_lock = threading.Lock()
_on_cpu = ""


def gated_topk(
    router_logits_TE: Tensor,
    gate_T: Tensor,
    *,
    unit_E: Tensor,
    top_k: int,
    renormalize: bool,
    bias_E: Tensor | None,
    mass_TU: Tensor,
    chosen_T: Tensor,
    fill: Fill,
) -> tuple[Tensor, Tensor]:
    """Choose each token's experts among those whose unit its gate names: weights_TK fp32, ids_TK int32.

    `gated_topk_reference` says what every argument means and is the specification. For inference: no gradient flows.
    Nothing here reads a value back from the device. A program compiled for the CPU needs `gated_topk_implementation`
    to have been called.
    """
    filler = encode_fill(fill, router_logits_TE.shape[-1])
    operands = (router_logits_TE, gate_T, unit_E, bias_E, mass_TU, chosen_T, top_k)
    if torch.compiler.is_compiling():
        weights_TK, ids_TK = _OPERATOR(*operands, renormalize, filler)
        return weights_TK, ids_TK
    if not _on_cpu:
        gated_topk_implementation(router_logits_TE.device)
    try:
        weights_TK, ids_TK = _OPERATOR(*operands, renormalize, filler)
    except RuntimeError:
        # Every kernel checks its operands; the one in C cannot say what it got.
        check_arguments(*operands)
        raise
    return weights_TK, ids_TK


def gated_topk_implementation(device: torch.device) -> str:
    """What computes the operator on `device`, in a word; on CPU it is compiled and registered by the first call."""
    global _on_cpu
    if device.type != "cpu":
        return "Triton"
    with _lock:
        _on_cpu = _on_cpu or implement_on_cpu(_LIBRARY, _NAME, _TRIAL)
    return _on_cpu


def _cuda(*arguments: Any) -> tuple[Tensor, Tensor]:
    check_arguments(*arguments[:7])
    # A process that serves from the CPU never pays for importing Triton's front end.
    from flexgate.kernels.gated_topk.kernel import gated_topk_cuda

    return gated_topk_cuda(*arguments)


def _fake(
    router_logits_TE: Tensor,
    gate_T: Tensor,
    unit_E: Tensor,
    bias_E: Tensor | None,
    mass_TU: Tensor,
    chosen_T: Tensor,
    top_k: int,
    renormalize: bool,  # noqa: ARG001 - the schema's argument names
    fill: int,  # noqa: ARG001
) -> tuple[Tensor, Tensor]:
    check_arguments(router_logits_TE, gate_T, unit_E, bias_E, mass_TU, chosen_T, top_k)
    return empty_results(router_logits_TE, top_k)


_LIBRARY.impl(_NAME, _cuda, "CUDA")
torch.library.register_fake(f"flexgate::{_NAME}", _fake, lib=_LIBRARY)
