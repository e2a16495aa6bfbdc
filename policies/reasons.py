"""The sentence for every rule that can exclude an expert: which rule, and what to do.

Sentences that depend on the expert alone are made once, because every decision needs many.
"""

from __future__ import annotations

import math
from datetime import UTC, datetime
from functools import lru_cache
from typing import Final, NamedTuple

from flexgate.policies.compiled.agreements import CompiledAgreement
from flexgate.policies.decision import Reason
from flexgate.policies.documents import Expert, Grade
from flexgate.policies.ids import ExpertId, OwnerId

_once = lru_cache(maxsize=16_384)
LAYER_WITHOUT_EXPERT: Final = (
    "The experts of this request leave a layer of the model without any, so it cannot be answered. "
    "Let more experts take part, or ask an administrator for agreements on more."
)


class Standard(NamedTuple):
    """The reasons that depend on the expert alone, made before they are needed.

    `no_agreement` is None for an expert without an owner, which needs none.
    """

    no_agreement: Reason | None
    not_on_allow_list: Reason
    on_deny_list: Reason
    not_live: Reason


def standard(expert: Expert) -> Standard:
    id_ = expert.id
    missing = None if expert.owner is None else no_agreement(id_, expert.owner, expert.grade)
    return Standard(
        missing, not_on_allow_list(id_, expert.grade), on_deny_list(id_, expert.grade), not_live(id_, expert.grade)
    )


def prohibited(expert: Expert, agreement: CompiledAgreement) -> Reason:
    limits = "; ".join(
        f"{kind}: {_words(words)}"
        for kind, words in (("purposes", agreement.purposes), ("regions", agreement.regions))
        if words is not None
    )
    only = f" ({limits})" if limits else ""
    actions = f"Ask its owner, {expert.owner}, to terminate the agreement"
    if limits:
        actions += ", or declare a purpose or region that it does not cover"
    if agreement.ends < math.inf:
        actions += f", or try again after {_utc(agreement.ends)}"
    return Reason(
        expert.id,
        expert.grade,
        "prohibited",
        agreement.rule,
        f"{_agreement(agreement)} prohibits this project from using expert '{expert.id}'{only}. {actions}.",
    )


@_once
def no_agreement(expert: ExpertId, owner: OwnerId | None, grade: Grade) -> Reason:
    return Reason(
        expert,
        grade,
        "no_agreement",
        "default_deny",
        f"No agreement permits this project to use expert '{expert}'. Ask its owner, {owner}, for one.",
    )


def purpose_not_permitted(expert: Expert, agreement: CompiledAgreement, purpose: str | None) -> Reason:
    return Reason(
        expert.id,
        expert.grade,
        "purpose_not_permitted",
        agreement.rule,
        f"{_agreement(agreement)} permits expert '{expert.id}' for these purposes only: "
        f"{_words(agreement.purposes)}. The request declares {_declared('purpose', purpose)}. "
        "Declare one of them in 'flexgate.purpose'.",
    )


def region_not_permitted(expert: Expert, agreement: CompiledAgreement, region: str | None) -> Reason:
    return Reason(
        expert.id,
        expert.grade,
        "region_not_permitted",
        agreement.rule,
        f"{_agreement(agreement)} permits expert '{expert.id}' in these regions only: "
        f"{_words(agreement.regions)}. The request declares {_declared('region', region)}. "
        "Declare one of them in 'flexgate.region'.",
    )


def not_started(expert: Expert, agreement: CompiledAgreement) -> Reason:
    return Reason(
        expert.id,
        expert.grade,
        "agreement_not_started",
        agreement.rule,
        f"{_agreement(agreement)} permits expert '{expert.id}' only from {_utc(agreement.starts)} on. Try again then.",
    )


def ended(expert: Expert, agreement: CompiledAgreement) -> Reason:
    return Reason(
        expert.id,
        expert.grade,
        "agreement_ended",
        agreement.rule,
        f"{_agreement(agreement)} permitted expert '{expert.id}' until {_utc(agreement.ends)}. "
        f"Ask its owner, {expert.owner}, for a new agreement.",
    )


@_once
def not_on_allow_list(expert: ExpertId, grade: Grade) -> Reason:
    return Reason(
        expert,
        grade,
        "not_in_allow_list",
        "project/allow_list",
        f"Expert '{expert}' is not on this project's allow list. Ask an administrator to add it.",
    )


@_once
def on_deny_list(expert: ExpertId, grade: Grade) -> Reason:
    return Reason(
        expert,
        grade,
        "in_deny_list",
        "project/deny_list",
        f"Expert '{expert}' is on this project's deny list. Ask an administrator to remove it.",
    )


@_once
def not_live(expert: ExpertId, grade: Grade) -> Reason:
    return Reason(
        expert,
        grade,
        "not_live",
        "expert/live",
        f"Expert '{expert}' is not loaded on this server. Ask an administrator to load it.",
    )


@_once
def outside_default_set(expert: ExpertId, grade: Grade) -> Reason:
    return Reason(
        expert,
        grade,
        "not_in_default_set",
        "project/default_experts",
        f"Expert '{expert}' is not in this project's default expert set. Name it in 'flexgate.experts.only' to use it.",
    )


@_once
def outside_only(expert: ExpertId, grade: Grade) -> Reason:
    return Reason(
        expert,
        grade,
        "not_requested",
        "request/only",
        f"'flexgate.experts.only' does not name expert '{expert}'. Name it there to use it.",
    )


@_once
def ignored(expert: ExpertId, grade: Grade) -> Reason:
    return Reason(
        expert,
        grade,
        "ignored",
        "request/ignore",
        f"'flexgate.experts.ignore' names expert '{expert}'. Remove it from there to use it.",
    )


def grade_too_low(listed: list[str], least: Grade) -> str:
    """Why nothing is answered where excluding an expert excludes too little; `listed` are those that may be named."""
    return (
        f"This project demands that what a request excludes has at least the grade '{least}', and excluding "
        f"{'expert ' + ', '.join(listed) if listed else 'some expert'} excludes less. "
        "Use the expert, or ask an administrator to change 'min_grade'."
    )


def named(agreement: CompiledAgreement) -> str:
    """An agreement within a sentence."""
    return f"agreement '{agreement.agreement_id}' (version {agreement.version})"


def _agreement(agreement: CompiledAgreement) -> str:
    return f"A{named(agreement)[1:]}"


def _words(words: frozenset[str] | None) -> str:
    return ", ".join(sorted(words)) if words is not None else "any"


def _declared(kind: str, word: str | None) -> str:
    return f"no {kind}" if word is None else f"'{word}'"


def _utc(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
