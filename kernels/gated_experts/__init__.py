from flexgate.kernels.gated_experts.contract import LowRankExperts, NarrowExperts, Smaller
from flexgate.kernels.gated_experts.op import gated_experts, gated_experts_implementation
from flexgate.kernels.gated_experts.plan import RoutingPlan, routing_plan_reference
from flexgate.kernels.gated_experts.reference import gated_experts_reference

__all__ = [
    "LowRankExperts",
    "NarrowExperts",
    "RoutingPlan",
    "Smaller",
    "gated_experts",
    "gated_experts_implementation",
    "gated_experts_reference",
    "routing_plan_reference",
]
