"""`gated_topk` on every device: one operator, `torch.ops.flexgate.gated_topk`, opaque to torch.compile.

Registered through `torch.library.define` rather than the `custom_op` decorator: the schema, the mutation and the fake
implementation are the same, and the decorator's bookkeeping costs more than the whole routing of a decode step.

Shape suffixes: T tokens, E experts of the layer, U units, K chosen experts.
"""

from typing import Any

import torch
from torch import Tensor

from flexgate.kernels.gated_topk.contract import Fill, check_arguments, empty_results, encode_fill
from flexgate.kernels.gated_topk.cpu import gated_topk_cpu

_LIBRARY = torch.library.Library("flexgate", "FRAGMENT")
_LIBRARY.define(
    "gated_topk(Tensor router_logits_TE, Tensor gate_T, Tensor unit_E, Tensor? bias_E, Tensor(a!) mass_TU, "
    "Tensor(b!) chosen_T, int top_k, bool renormalize, int fill) -> (Tensor weights_TK, Tensor ids_TK)"
)


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

    `gated_topk_reference` says what every argument means and is the specification. For inference: no gradient flows,
    and inputs that require one are refused. Nothing here reads a value back from the device.
    """
    check_arguments(router_logits_TE, gate_T, unit_E, bias_E, mass_TU, chosen_T, top_k)
    filler = encode_fill(fill, router_logits_TE.shape[1])
    arguments = (router_logits_TE, gate_T, unit_E, bias_E, mass_TU, chosen_T, top_k, renormalize, filler)
    if _is_plain_on_cpu(router_logits_TE):
        return gated_topk_cpu(*arguments)
    weights_TK, ids_TK = _OPERATOR(*arguments)
    return weights_TK, ids_TK


def _is_plain_on_cpu(tensor: Tensor) -> bool:
    """Whether the dispatcher would only find the CPU's implementation: a quarter of a small call's time."""
    return (
        type(tensor) is Tensor
        and tensor.device.type == "cpu"
        and not tensor.requires_grad
        and not torch.compiler.is_compiling()
    )


def _cuda(*arguments: Any) -> tuple[Tensor, Tensor]:
    # A process that serves from the CPU never pays for importing Triton's front end.
    from flexgate.kernels.gated_topk.kernel import gated_topk_cuda

    return gated_topk_cuda(*arguments)


def _fake(
    router_logits_TE: Tensor,
    gate_T: Tensor,  # noqa: ARG001 - the schema's argument names
    unit_E: Tensor,  # noqa: ARG001
    bias_E: Tensor | None,  # noqa: ARG001
    mass_TU: Tensor,  # noqa: ARG001
    chosen_T: Tensor,  # noqa: ARG001
    top_k: int,
    renormalize: bool,  # noqa: ARG001
    fill: int,  # noqa: ARG001
) -> tuple[Tensor, Tensor]:
    return empty_results(router_logits_TE, top_k)


_LIBRARY.impl("gated_topk", gated_topk_cpu, "CPU")
_LIBRARY.impl("gated_topk", _cuda, "CUDA")
torch.library.register_fake("flexgate::gated_topk", _fake, lib=_LIBRARY)
_OPERATOR = torch.ops.flexgate.gated_topk.default
