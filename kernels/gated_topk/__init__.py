from flexgate.kernels.gated_topk.contract import (
    CLOSED_GATE,
    COMMON_UNIT,
    MASS_SCALE,
    MAX_EXPERTS,
    MAX_UNITS,
    Fill,
    unit_map,
)
from flexgate.kernels.gated_topk.op import gated_topk, gated_topk_implementation
from flexgate.kernels.gated_topk.reference import gated_topk_reference

__all__ = [
    "CLOSED_GATE",
    "COMMON_UNIT",
    "MASS_SCALE",
    "MAX_EXPERTS",
    "MAX_UNITS",
    "Fill",
    "gated_topk",
    "gated_topk_implementation",
    "gated_topk_reference",
    "unit_map",
]
