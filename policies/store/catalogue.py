"""Bring the catalogue up to date with a checkpoint."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple

from flexgate.policies.documents import Expert, Grade, weakest
from flexgate.policies.errors import ChangeRefused
from flexgate.policies.store.change import Change


class ManifestExpert(NamedTuple):
    """One expert of the checkpoint's manifest."""

    id: str
    owner: str | None
    domain: str
    required: bool = False
    grade: Grade = "unknown"
    empty_layers: frozenset[int] = frozenset()


def put_catalogue(
    change: Change, experts: Iterable[ManifestExpert], *, epoch: int, held: Mapping[str, Grade] | None = None
) -> list[Expert]:
    """Add unknown experts, which no tenant may use yet, and set which ones are live.

    Every start does it, before its first snapshot. Experts that are not served stay in the catalogue, not live. Their
    grade is the one that the checkpoint states. Where it states none the stored one stays, because shared weights may
    have learnt from what the checkpoint no longer names.

    Args:
        experts: what will be served, in slot order, `public` among them.
        epoch: the weights epoch at which `experts` was read.
        held: the grades that the checkpoint states, of what is served or not; None states nothing.

    Returns:
        The live experts.

    Raises:
        ChangeRefused: an expert changed its owner while an agreement names it, or experts came or went since `epoch`.
    """
    if change.weights_epoch() != epoch:
        raise ChangeRefused("experts were changed while this server started: start it again")
    held, live = held or {}, []
    for manifest in experts:
        known = change.get(Expert, manifest.id)
        visibility = known.visibility if known else "listed"
        required = manifest.required or (known is not None and known.required)
        grade = weakest(manifest.grade, held.get(manifest.id, manifest.grade))
        said = manifest._replace(required=required, grade=grade)
        expert = Expert.model_validate({**said._asdict(), "visibility": visibility})
        change.put(expert)
        live.append(expert)
    present = {expert.id for expert in live}
    for expert in change.all(Expert):
        if expert.id not in present:
            change.put(expert.model_copy(update={"live": False, "grade": held.get(expert.id, expert.grade)}))
    return live
