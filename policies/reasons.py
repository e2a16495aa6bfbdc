"""The sentence for every rule that can exclude an expert: which rule, and what would change it.

Sentences that depend on the expert alone are made once, because every decision needs many.
"""

from __future__ import annotations

import math
from datetime import UTC, datetime
from functools import lru_cache
from typing import NamedTuple

from flexgate.policies.compiled.agreements import CompiledAgreement
from flexgate.policies.decision import Reason
from flexgate.policies.documents import Expert
from flexgate.policies.ids import ExpertId, OwnerId

_once = lru_cache(maxsize=16_384)


class Standard(NamedTuple):
    """The reasons that depend on the expert alone, made before they are needed."""

    no_agreement: Reason
    not_on_allow_list: Reason
    on_deny_list: Reason
    not_live: Reason


def standard(expert: Expert) -> Standard:
    id_ = expert.id
    return Standard(no_agreement(id_, expert.owner), not_on_allow_list(id_), on_deny_list(id_), not_live(id_))


def prohibited(expert: Expert, agreement: CompiledAgreement) -> Reason:
    scope = "".join(
        f" {preposition} {_words(words)}"
        for preposition, words in (("for", agreement.purposes), ("in", agreement.regions))
        if words is not None
    )
    changes = f"Its owner, {expert.owner}, terminating it"
    if scope:
        changes += ", or the request declaring a purpose or region outside of it,"
    if agreement.ends < math.inf:
        changes += f" or waiting until {_utc(agreement.ends)}"
    return Reason(
        expert.id,
        "prohibited",
        agreement.rule,
        f"{_agreement(agreement)} prohibits expert '{expert.id}' to this project{scope}. {changes} would change this.",
    )


@_once
def no_agreement(expert: ExpertId, owner: OwnerId) -> Reason:
    return Reason(
        expert,
        "no_agreement",
        "default_deny",
        f"No agreement permits expert '{expert}' to this project. "
        f"An agreement with its owner, {owner}, would change this.",
    )


def purpose_not_permitted(expert: Expert, agreement: CompiledAgreement, purpose: str | None) -> Reason:
    return Reason(
        expert.id,
        "purpose_not_permitted",
        agreement.rule,
        f"{_agreement(agreement)} permits expert '{expert.id}' for {_words(agreement.purposes)} only, "
        f"and the request declares {_declared('purpose', purpose)}. "
        "Declaring a permitted purpose would change this.",
    )


def region_not_permitted(expert: Expert, agreement: CompiledAgreement, region: str | None) -> Reason:
    return Reason(
        expert.id,
        "region_not_permitted",
        agreement.rule,
        f"{_agreement(agreement)} permits expert '{expert.id}' in {_words(agreement.regions)} only, "
        f"and the request declares {_declared('region', region)}. "
        "Declaring a permitted region would change this.",
    )


def not_started(expert: Expert, agreement: CompiledAgreement) -> Reason:
    return Reason(
        expert.id,
        "agreement_not_started",
        agreement.rule,
        f"{_agreement(agreement)} permits expert '{expert.id}' from {_utc(agreement.starts)} on. "
        "Waiting until then would change this.",
    )


def ended(expert: Expert, agreement: CompiledAgreement) -> Reason:
    return Reason(
        expert.id,
        "agreement_ended",
        agreement.rule,
        f"{_agreement(agreement)} permitted expert '{expert.id}' until {_utc(agreement.ends)}. "
        f"A new agreement with its owner, {expert.owner}, would change this.",
    )


@_once
def not_on_allow_list(expert: ExpertId) -> Reason:
    return Reason(
        expert,
        "not_in_allow_list",
        "project/allow_list",
        f"Expert '{expert}' is not on this project's allow list. An administrator adding it would change this.",
    )


@_once
def on_deny_list(expert: ExpertId) -> Reason:
    return Reason(
        expert,
        "in_deny_list",
        "project/deny_list",
        f"Expert '{expert}' is on this project's deny list. An administrator removing it would change this.",
    )


@_once
def not_live(expert: ExpertId) -> Reason:
    return Reason(
        expert,
        "not_live",
        "expert/live",
        f"Expert '{expert}' is not being served. Loading it into the server would change this.",
    )


@_once
def outside_default_set(expert: ExpertId) -> Reason:
    return Reason(
        expert,
        "not_in_default_set",
        "project/default_experts",
        f"Expert '{expert}' is not in this project's default expert set. "
        "Naming it in the request's 'only' would change this.",
    )


@_once
def outside_only(expert: ExpertId) -> Reason:
    return Reason(
        expert,
        "not_requested",
        "request/only",
        f"The request's 'only' does not name expert '{expert}'. Naming it would change this.",
    )


@_once
def ignored(expert: ExpertId) -> Reason:
    return Reason(
        expert,
        "ignored",
        "request/ignore",
        f"The request's 'ignore' names expert '{expert}'. Leaving it out would change this.",
    )


def _agreement(agreement: CompiledAgreement) -> str:
    return f"Agreement '{agreement.agreement_id}' (version {agreement.version})"


def _words(words: frozenset[str] | None) -> str:
    return ", ".join(sorted(words)) if words is not None else "any"


def _declared(kind: str, word: str | None) -> str:
    return f"no {kind}" if word is None else f"'{word}'"


def _utc(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
