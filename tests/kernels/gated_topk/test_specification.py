"""Each implementation computes what the reference says, to the last bit.

Shape suffixes: T tokens, E expert slots, K chosen experts.
"""

from typing import Any

import pytest
import torch


@pytest.mark.parametrize("tokens", [1, 7, 13])
@pytest.mark.parametrize("slots", [1, 2, 7, 9, pytest.param(33, marks=pytest.mark.slow), 64])
@pytest.mark.parametrize(("top_k", "renormalize"), [(1, False), (2, True), (5, True)])
def test_results_and_attribution_equal_the_reference(
    route: Any, specified: Any, random_gate: Any, tokens: int, slots: int, top_k: int, renormalize: bool
) -> None:
    torch.manual_seed(1000 * tokens + 10 * slots + top_k)
    logits_TE, gate_T, bias_E = torch.randn(tokens, slots) * 3, random_gate(tokens, slots), torch.randn(slots)
    arguments = {"top_k": top_k, "renormalize": renormalize, "bias_E": bias_E}
    assert route(logits_TE, gate_T, **arguments).same_bits(specified(logits_TE, gate_T, **arguments))


@pytest.mark.parametrize("slots", [7, 9])
def test_a_prefill_chunk_equals_the_reference(route: Any, specified: Any, random_gate: Any, slots: int) -> None:
    torch.manual_seed(slots)
    logits_TE, gate_T = torch.randn(300, slots), random_gate(300, slots)
    assert route(logits_TE, gate_T, top_k=5).same_bits(specified(logits_TE, gate_T, top_k=5))


def test_no_tokens_is_no_work(route: Any) -> None:
    routed = route(torch.empty(0, 7), torch.empty(0, dtype=torch.int64), top_k=3)
    assert routed.weights_TK.shape == routed.ids_TK.shape == (0, 3)


@pytest.mark.parametrize("fill", ["none", "first", 0, 6])
@pytest.mark.parametrize("allowed", [1, 2, 3, 4, 7])
def test_every_gate_size_below_at_and_above_top_k(route: Any, specified: Any, allowed: int, fill: Any) -> None:
    torch.manual_seed(allowed)
    logits_TE = torch.randn(13, 7)
    gate_T = torch.stack([(1 << torch.randperm(7)[:allowed]).sum() for _ in range(13)])
    routed = route(logits_TE, gate_T, top_k=3, fill=fill)
    assert routed.same_bits(specified(logits_TE, gate_T, top_k=3, fill=fill))
    unused_TK = routed.weights_TK[:, allowed:]
    assert unused_TK.numel() == 0 or bool((unused_TK == 0).all())
    expected = {"none": -1, "first": routed.ids_TK[:, :1]}.get(fill, fill)
    assert bool((routed.ids_TK[:, allowed:] == expected).all())


def test_top_k_beyond_the_number_of_slots_is_filled(route: Any, specified: Any) -> None:
    logits_TE, gate_T = torch.randn(7, 2), torch.tensor([1, 2, 3, 1, 2, 3, 3])
    for fill in ("none", "first", 1):
        routed = route(logits_TE, gate_T, top_k=5, renormalize=True, fill=fill)
        assert routed.same_bits(specified(logits_TE, gate_T, top_k=5, renormalize=True, fill=fill))


def test_ties_go_to_the_lowest_allowed_slot(route: Any) -> None:
    routed = route(torch.zeros(2, 9), torch.tensor([0b111111111, 0b101101100]), top_k=3)
    assert routed.ids_TK.tolist() == [[0, 1, 2], [2, 3, 5]]


def test_renormalised_weights_sum_to_one_and_plain_ones_are_probabilities(route: Any, random_gate: Any) -> None:
    torch.manual_seed(3)
    logits_TE, gate_T = torch.randn(13, 9), random_gate(13, 9)
    allowed_TE = ((gate_T[:, None] >> torch.arange(9)) & 1).bool()
    prob_TE = logits_TE.double().masked_fill(~allowed_TE, float("-inf")).softmax(dim=1)
    routed = route(logits_TE, gate_T, top_k=2)
    picked_TK = prob_TE.gather(1, routed.ids_TK.long()) * (routed.weights_TK > 0)
    torch.testing.assert_close(routed.weights_TK.double(), picked_TK, rtol=3e-7, atol=0)
    summed_T = route(logits_TE, gate_T, top_k=2, renormalize=True).weights_TK.sum(dim=1)
    torch.testing.assert_close(summed_T, torch.ones(13), rtol=3e-7, atol=0)


def test_bias_moves_the_choice_and_the_weights(route: Any) -> None:
    logits_TE, bias_E = torch.zeros(1, 7), torch.arange(7.0)
    routed = route(logits_TE, torch.tensor([0b0111111]), bias_E=bias_E)
    assert routed.ids_TK.tolist() == [[5, 4]]
    assert routed.same_bits(route(bias_E[None], torch.tensor([0b0111111])))


def test_strided_inputs_are_read_by_their_strides(route: Any, random_gate: Any) -> None:
    torch.manual_seed(5)
    wide_TE, gate_T, bias_E = torch.randn(13, 14), random_gate(26, 7)[::2], torch.randn(14)[::2]
    strided = route(wide_TE[:, ::2], gate_T, bias_E=bias_E)
    assert strided.same_bits(route(wide_TE[:, ::2].contiguous(), gate_T.contiguous(), bias_E=bias_E.contiguous()))
