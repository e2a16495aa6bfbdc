"""What a call's requests used, put together, and the salt that its experts give it."""

import math
from typing import Any

import pytest

from flexgate.kernels.gated_topk import MASS_SCALE
from flexgate.server.engine.frontend.calls import ExpertSlotRef, GatedCall
from flexgate.server.engine.protocol.gates import new_seal_key

KEY = new_seal_key()


def usage(positions: int, cached: int, prompt: tuple[int, int], completion: tuple[int, int]) -> list[Any]:
    """Of two slots, with as many tokens as layers' worth of mass."""
    return [
        positions,
        cached,
        [m * MASS_SCALE for m in prompt] + [*prompt],
        [m * MASS_SCALE for m in completion] + [*completion],
    ]


@pytest.fixture
def call() -> GatedCall:
    made = GatedCall("t", (ExpertSlotRef("public", 0, 1), ExpertSlotRef("news", 1, 1)), math.inf)
    made._names = made.name_slots((None, None))
    return made


def parts(call: GatedCall) -> dict[str, tuple[float, int]]:
    return {use.expert: (use.gate_mass, use.tokens) for use in call.attribution().experts}


def test_a_call_that_used_nothing_has_no_part_of_any_expert(call: GatedCall) -> None:
    assert parts(call) == {"public": (0, 0), "news": (0, 0)}
    assert call.used_slots() == frozenset()


def test_a_prompt_counts_once_for_all_its_choices(call: GatedCall) -> None:
    call.count_usage("a", "0_a", usage(10, 0, (10, 4), (3, 0)))
    call.count_usage("a", "1_a", usage(10, 8, (10, 4), (2, 2)))
    assert parts(call) == {"public": (15, 15), "news": (6, 6)}
    assert call.attribution().cached_prompt_tokens == 0


def test_a_prompt_counts_as_far_as_the_furthest_of_its_choices_came(call: GatedCall) -> None:
    call.count_usage("a", "0_a", usage(4, 0, (4, 1), (0, 0)))
    call.count_usage("a", "1_a", usage(10, 4, (10, 4), (2, 0)))
    assert parts(call) == {"public": (12, 12), "news": (4, 4)}
    assert call.attribution().cached_prompt_tokens == 4


def test_each_prompt_of_a_call_counts(call: GatedCall) -> None:
    call.count_usage("a", "a", usage(10, 2, (10, 0), (1, 0)))
    call.count_usage("b", "b", usage(5, 1, (5, 5), (1, 1)))
    call.count_usage("b", "b", usage(5, 1, (5, 5), (2, 1)))  # the running total, again
    assert parts(call) == {"public": (18, 18), "news": (6, 6)}
    assert call.attribution().cached_prompt_tokens == 3
    assert call.used_slots() == {0, 1}


def test_a_prompt_counts_as_far_as_the_engine_has_come(call: GatedCall) -> None:
    call.count_prompt("a", 20)
    call.count_prompt("b", 5)
    assert (call.prompt_tokens(), call.prompt_positions()) == (25, 0)
    call.count_usage("a", "0_a", usage(4, 0, (4, 1), (0, 0)))
    call.count_usage("a", "1_a", usage(10, 4, (10, 4), (2, 0)))
    assert (call.prompt_tokens(), call.prompt_positions()) == (25, 10)


def salt(*refs: ExpertSlotRef, tenant: str = "t", client_salt: str | None = None) -> str:
    """The salt under which a call goes out."""
    return GatedCall(tenant, refs, math.inf, client_salt).gate("request", KEY).cache_salt


def test_the_salt_names_experts_and_epochs_and_no_slot() -> None:
    public, news = ExpertSlotRef("public", 0, 1), ExpertSlotRef("news", 1, 1)
    assert salt(public, news) == salt(public, ExpertSlotRef("news", 5, 1))
    others = {
        salt(public),
        salt(public, ExpertSlotRef("math", 1, 1)),
        salt(public, ExpertSlotRef("news", 1, 2)),
        salt(public, news, tenant="u"),
        salt(public, news, client_salt="c"),
    }
    assert len(others | {salt(public, news)}) == 6


def test_an_expert_that_changed_slots_is_attributed_from_the_slot_that_it_was_allowed_in() -> None:
    now = ("public", None, "math", None)
    former = GatedCall("t", (ExpertSlotRef("public", 0, 1), ExpertSlotRef("math", 1, 2)), math.inf)
    assert former.name_slots(now) == ("public", "math", None, None)
    assert GatedCall("t", (ExpertSlotRef("public", 0, 1),), math.inf).name_slots(now) == now
