"""Which kernels compute the experts, chosen with ``--moe-kernels``, and how they want weights to lie in memory.

``vllm`` leaves the layer to vLLM: its prepacked CPU kernel, its Triton kernel on CUDA. ``flexgate``
puts :func:`flexgate.kernels.gated_experts.gated_experts` in its place: Triton on CUDA; on CPU the
operator's torch reference, which is exact and slow. Nothing falls back: a choice that cannot be
kept ends the start, and the handshake compares what every rank really holds with what was asked.

Legend: E experts of this rank, T tokens, H hidden, F expert intermediate, G = 2F.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from flexgate.kernels.gated_experts import LowRankExperts, Smaller, gated_experts, gated_experts_implementation
from flexgate.server.engine.protocol.names import MOE_KERNELS_KEY
from flexgate.server.engine.seam.engine import (
    CPUUnquantizedExperts,
    FusedMoEActivationFormat,
    FusedMoEExpertsModular,
    MoEActivation,
    RoutedExperts,
    TopKWeightAndReduceNoOP,
    TritonExperts,
    UnquantizedFusedMoEMethod,
    UnquantizedMoeBackend,
    cpu_prepack_moe_weight,
    get_current_vllm_config,
)
from flexgate.server.engine.worker.slot_arrays import Pack, low_rank_experts, plain


class UnknownLayoutError(RuntimeError):
    """vLLM chose a kernel whose weight layout flexgate does not know."""


class FlexgateExperts(FusedMoEExpertsModular):
    """flexgate's operator as vLLM's modular experts: plan, products and combine in one call.

    Attributes:
        smaller: low-rank experts, whose ids follow those of vLLM's arrays.
    """

    smaller: Smaller = ()

    def process_weights_after_loading(self, layer: Any) -> None:
        """Take over the factors that the layer holds; the argument is vLLM's."""
        super().process_weights_after_loading(layer)
        self.smaller = layer.smaller

    @staticmethod
    def activation_format() -> FusedMoEActivationFormat:
        """Tokens in rows, not sorted by expert."""
        return FusedMoEActivationFormat.Standard

    @staticmethod
    def _supports_current_device() -> bool:
        return True  # `gated_experts_implementation` has spoken

    @staticmethod
    def _supports_no_act_and_mul() -> bool:
        return False

    @staticmethod
    def _supports_quant_scheme(weight_key: Any, activation_key: Any) -> bool:
        return weight_key is None and activation_key is None

    @staticmethod
    def _supports_activation(activation: MoEActivation) -> bool:
        return activation is MoEActivation.SILU

    @staticmethod
    def _supports_parallel_config(moe_parallel_config: Any) -> bool:
        return not moe_parallel_config.use_all2all_kernels

    def workspace_shapes(self, tokens: int, _rows: int, hidden: int, *_: Any) -> tuple[tuple[int, ...], ...]:
        """No scratch space of vLLM's; the output is [T, H]."""
        return (0,), (0,), (tokens, hidden)

    def finalize_weight_and_reduce_impl(self) -> TopKWeightAndReduceNoOP:
        """Weighted and added up already, in slot order."""
        return TopKWeightAndReduceNoOP()

    def apply(
        self,
        output: Tensor,
        hidden_states: Tensor,
        w1: Tensor,
        w2: Tensor,
        topk_weights: Tensor,
        topk_ids: Tensor,
        **_: Any,
    ) -> None:
        """Write the layer's output; the argument names are vLLM's. Ids are this rank's own, see ``RoutedTopK``."""
        weights_TK, ids_TK = topk_weights.float(), topk_ids.to(torch.int32)
        gated_experts(hidden_states, w1, w2, weights_TK, ids_TK, smaller=self.smaller, out_TH=output)


class FlexgateMethod(UnquantizedFusedMoEMethod):
    """vLLM's method for unquantised experts with our kernels in place of the one it would choose."""

    def __init__(self, moe: Any) -> None:
        """Refuse what the kernels do not compute."""
        super().__init__(moe)
        supported, reason = FlexgateExperts.is_supported_config(
            FlexgateExperts, moe, None, None, FlexgateExperts.activation_format()
        )
        if not supported:
            raise ValueError(f"--moe-kernels flexgate: {reason}")
        gated_experts_implementation(torch.device(moe.device))
        # The Triton backend is the one that leaves weights as the checkpoint has them.
        self.unquantized_backend = UnquantizedMoeBackend.TRITON
        self.experts_cls = FlexgateExperts


class FlexgateRoutedExperts(RoutedExperts):
    """vLLM's holder of expert weights, with our method.

    Attributes:
        smaller: low-rank experts, all zero until a package is loaded.
    """

    smaller: Sequence[LowRankExperts] = ()

    def keep_factors(self, ranks: Sequence[int]) -> None:
        """Make room for an expert of each of ``ranks``, after vLLM's own."""
        self.smaller = low_rank_experts(ranks, self.w2_weight)

    def _get_quant_method(self, prefix: str, quant_config: Any, moe_config: Any) -> FlexgateMethod:
        if quant_config is not None:
            raise ValueError(f"--moe-kernels flexgate: {prefix} is quantised")
        return FlexgateMethod(moe_config)


def chosen_routed_experts() -> type[RoutedExperts]:
    """The class to build layers of, as the start of this engine asked."""
    choice = get_current_vllm_config().additional_config[MOE_KERNELS_KEY]
    return {"flexgate": FlexgateRoutedExperts, "vllm": RoutedExperts}[choice]


def held_kernels(experts: RoutedExperts) -> tuple[str, str]:
    """(choice, what computes) that a loaded layer really holds."""
    kernel = experts.quant_method.moe_kernel.fused_experts
    if isinstance(kernel, FlexgateExperts):
        return "flexgate", gated_experts_implementation(experts.w13_weight.device)
    return "vllm", type(kernel).__name__


def computed_with(experts: RoutedExperts) -> Smaller:
    """The low-rank experts that a loaded layer's kernel is given, which need not be those that the layer keeps."""
    kernel = experts.quant_method.moe_kernel.fused_experts
    return kernel.smaller if isinstance(kernel, FlexgateExperts) else ()


def pack_of(experts: RoutedExperts) -> Pack:
    """How one expert has to be laid out for the kernel that a loaded layer holds.

    Raises:
        UnknownLayoutError: the kernel is none whose layout is known here.
    """
    kernel = experts.quant_method.moe_kernel.fused_experts
    if isinstance(kernel, FlexgateExperts | TritonExperts):
        return plain
    if isinstance(kernel, CPUUnquantizedExperts) and not kernel._use_zentorch:
        isa = kernel.isa

        def prepacked(w13_GH: Tensor, w2_HF: Tensor) -> tuple[Tensor, Tensor]:
            w13, w2 = (cpu_prepack_moe_weight(part[None].contiguous(), isa)[0] for part in (w13_GH, w2_HF))
            return w13, w2

        return prepacked
    raise UnknownLayoutError(f"the weight layout of vLLM's {type(kernel).__name__} is not known")
