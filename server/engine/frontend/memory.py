"""How many slots fit beside the KV cache; arithmetic only.

All sizes are in bytes per rank.
"""

from dataclasses import dataclass

from flexgate.kernels.gated_topk import MAX_EXPERTS, MAX_UNITS
from flexgate.server.engine.frontend.checkpoint import Checkpoint, CheckpointError

DTYPE_BYTES = {"float32": 4, "bfloat16": 2}
CPU_KV_BLOCK_TOKENS = 128  # vLLM's block on CPU; a request holds whole blocks
ATTRIBUTION_BYTES = 8  # of a position of the KV cache: routed mass of each slot, and once which slots were chosen
SPARE_SLOTS = 2  # free slots that a default start leaves for experts to be added


@dataclass(frozen=True, slots=True)
class SlotPlan:
    """The engine's slots, the experts that they are made of, and what these cost.

    Attributes:
        slots: number of slots: those of the checkpoint's units, and free ones of one expert a layer.
        low_ranks: of the low-rank slots, which come in addition.
        low_rank_bytes: all of those.
        held: experts of a layer that one rank holds; with expert parallelism its share and one of zeros.
        expert_bytes: one expert over all layers, as far as one rank holds it.
        other_bytes: everything that is not an expert (attention, embeddings, norms, head).
        kv_bytes: KV cache.
        attribution_bytes: what the experts did for each position of the KV cache, for requests that read it from there.
    """

    slots: int
    held: int
    expert_bytes: int
    other_bytes: int
    kv_bytes: int
    attribution_bytes: int
    low_rank_bytes: int = 0
    low_ranks: tuple[int, ...] = ()

    @property
    def total_bytes(self) -> int:
        """Weights, slots and KV cache together."""
        experts = self.held * self.expert_bytes + self.low_rank_bytes
        return experts + self.other_bytes + self.kv_bytes + self.attribution_bytes


def plan_slots(
    checkpoint: Checkpoint,
    *,
    dtype: str,
    kv_bytes: int,
    available_bytes: int,
    max_experts: int | None = None,
    least: int = 0,
    low_ranks: tuple[int, ...] = (),
    ranks: int = 1,
    expert_parallel: bool = False,
    prefix_caching: bool = True,
) -> SlotPlan:
    """Choose the number of slots, or say with the arithmetic why the model does not fit.

    Args:
        dtype: ``float32`` or ``bfloat16``, as served.
        max_experts: slots asked for; by default the checkpoint's units + 2, or as many
            of those as fit.
        least: slots that are taken in any case, by experts added after the checkpoint.
        low_ranks: the ranks of further slots, for low-rank experts.
        available_bytes: of one rank.
        ranks: tensor-parallel ranks that share every expert.
        expert_parallel: ranks hold whole experts, dealt out in turn, and one of zeros each.
        prefix_caching: requests read positions of the KV cache from it, and what experts did for them.

    Raises:
        CheckpointError: fewer slots asked for than the checkpoint has units, more than
            64, or more than fit.
    """
    a, units = checkpoint.architecture, len(checkpoint.experts)
    width = DTYPE_BYTES[dtype]
    sharing, dealing = (1, ranks) if expert_parallel else (ranks, 1)
    expert_bytes = checkpoint.parameters_per_expert * width // sharing
    attention = 2 * a.hidden_size * (a.sizes["Q"] + a.sizes["K"])
    embeddings = 1 if a.tie_word_embeddings else 2
    other = a.num_hidden_layers * attention + embeddings * a.vocab_size * a.hidden_size
    other += checkpoint.parameters_beside_experts
    other_bytes = other * width // ranks
    reserved = 1 if dealing > 1 else 0
    shared = a.num_experts - units  # experts that the checkpoint has in a layer beyond one of each unit
    positions = kv_bytes // _kv_bytes_of_one_token(checkpoint, dtype, ranks) if prefix_caching else 0

    of_rank_1 = 3 * a.num_hidden_layers * (a.hidden_size + a.intermediate_size) * width
    low_rank_bytes = sum(low_ranks) * of_rank_1

    def with_slots(slots: int) -> SlotPlan:
        held = -(-(slots + shared) // dealing) + reserved
        attribution_bytes = positions * ATTRIBUTION_BYTES * (slots + len(low_ranks) + 1)
        return SlotPlan(slots, held, expert_bytes, other_bytes, kv_bytes, attribution_bytes, low_rank_bytes, low_ranks)

    taken, most = max(units, least), min(MAX_UNITS, MAX_EXPERTS - shared) - len(low_ranks)
    if not checkpoint.kind.packages:
        _refuse_more_slots(checkpoint, max(taken, max_experts or 0))
        most = units
    wanted = max_experts if max_experts is not None else min(taken + SPARE_SLOTS, most)
    if not taken <= wanted <= most:
        raise CheckpointError(
            f"--max-experts {wanted}: the checkpoint has {units} experts, {taken} slots are taken, "
            f"and flexgate serves at most {most}"
        )
    plan = with_slots(wanted)
    while max_experts is None and plan.total_bytes > available_bytes and plan.slots > taken:
        plan = with_slots(plan.slots - 1)
    if plan.total_bytes > available_bytes:
        raise CheckpointError(
            f"{plan.held} experts of {human(expert_bytes)} + {human(other_bytes)} of shared weights "
            + (f"+ {human(low_rank_bytes)} of low-rank slots " if low_ranks else "")
            + f"+ {human(kv_bytes)} of KV cache + {human(plan.attribution_bytes)} of its attribution "
            f"= {human(plan.total_bytes)} do not fit into {human(available_bytes)}"
        )
    return plan


def _refuse_more_slots(checkpoint: Checkpoint, slots: int) -> None:
    """Refuse slots that no package could come into."""
    units, name = len(checkpoint.experts), checkpoint.kind.fields.name
    if slots > units:
        raise CheckpointError(
            f"--max-experts {slots}: the checkpoint has {units} experts, and {name} takes no packages "
            "that other slots would be for"
        )


def kv_bytes_of_one_request(checkpoint: Checkpoint, tokens: int, *, dtype: str, ranks: int = 1) -> int:
    """KV cache that a request of ``tokens`` tokens holds on one rank, on CPU."""
    blocks = -(-tokens // CPU_KV_BLOCK_TOKENS) + 1  # vLLM keeps one block empty
    return blocks * CPU_KV_BLOCK_TOKENS * _kv_bytes_of_one_token(checkpoint, dtype, ranks)


def _kv_bytes_of_one_token(checkpoint: Checkpoint, dtype: str, ranks: int) -> int:
    a = checkpoint.architecture
    return 2 * a.num_hidden_layers * a.sizes["K"] // ranks * DTYPE_BYTES[dtype]


def human(size: float) -> str:
    """``8.7 GB``: decimal units, as model sizes are quoted."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(size) < 1000:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} TB"
