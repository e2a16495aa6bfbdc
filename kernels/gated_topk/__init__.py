from flexgate.kernels.gated_topk.contract import MASS_SCALE, MAX_SLOTS, Fill
from flexgate.kernels.gated_topk.op import gated_topk
from flexgate.kernels.gated_topk.reference import gated_topk_reference

__all__ = ["MASS_SCALE", "MAX_SLOTS", "Fill", "gated_topk", "gated_topk_reference"]
