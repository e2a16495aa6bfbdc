"""What an owner may not change alone: the price of an expert that projects' requests must use."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from flexgate.policies.agreements import Agreement, Compensate
from flexgate.policies.documents import Expert, ExpertSet
from flexgate.policies.errors import ChangeRefused
from flexgate.policies.store.change import Change


def check_price(change: Change, agreement: Agreement, before: Agreement | None) -> None:
    """Raise `ChangeRefused` where the owner's permission begins to price, or prices higher, what is required.

    Projects cannot leave such an expert out. Owners may lower a price, end a permission earlier, and withdraw it.
    """
    if agreement.effect != "permit" or not any(_prices(agreement)):
        return
    if before is not None and _is_no_dearer(agreement, before):
        return
    required = {expert.id for expert in change.all(Expert) if expert.required} | _required_by_agreements(
        change, agreement.assignee
    )
    for expert in sorted(_members(change, agreement.experts) & required):
        raise ChangeRefused(
            f"{expert!r} must be used by projects' requests, so administrators agree its price: leave 'compensate' out "
            "or as it is, and change only that the permission ends earlier; or ask an administrator to make the change"
        )


def _prices(agreement: Agreement) -> Iterator[Compensate]:
    return (duty for duty in agreement.duties if isinstance(duty, Compensate))


def _is_no_dearer(agreement: Agreement, before: Agreement) -> bool:
    """Whether the same uses count under both, or fewer, and no rate is higher.

    Purposes, regions and the start say which of several permissions a use counts under, so that narrowing them can
    also raise what is paid.
    """
    if before.effect != "permit" or not agreement.experts <= before.experts or agreement.ends > before.ends:
        return False
    if any(getattr(agreement, name) != getattr(before, name) for name in ("assignee", "purposes", "regions", "starts")):
        return False
    rates = {(price.unit, price.currency): price.rate for price in _prices(before)}
    return all(price.rate <= rates.get((price.unit, price.currency), -1) for price in _prices(agreement))


def _required_by_agreements(change: Change, assignee: str) -> set[str]:
    """What agreements require, now or later, of projects that an assignee may be."""
    found: set[str] = set()
    for one in change.all(Agreement):
        apart = one.assignee != assignee and all(name.startswith("tenant:") for name in (one.assignee, assignee))
        if one.effect == "require" and one.ends > change.at and not apart:
            found |= _members(change, one.experts)
    return found


def _members(change: Change, references: Iterable[str]) -> set[str]:
    """The experts that references name."""
    found: set[str] = set()
    for reference in references:
        members = change.get(ExpertSet, reference) if reference.startswith("set:") else None
        found |= members.experts if members is not None else {reference}
    return found
