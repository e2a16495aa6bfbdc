"""Mass and picks per token and slot: integers that add up, whatever the order, and never count a filler.

Shape suffixes: T tokens, E expert slots, K chosen experts.
"""

from typing import Any

import torch

from flexgate.kernels.gated_topk import MASS_SCALE


def test_mass_is_the_rounded_weight_of_each_real_pick(route: Any, random_gate: Any) -> None:
    torch.manual_seed(0)
    logits_TE, gate_T = torch.randn(13, 9) * 6, random_gate(13, 9)
    for renormalize in (False, True):
        routed = route(logits_TE, gate_T, top_k=4, renormalize=renormalize, fill="none")
        expected_TE = torch.zeros(13, 9, dtype=torch.int64)
        for token, rank in (routed.ids_TK >= 0).nonzero().tolist():
            # Python rounds half to even, and fp32 · 2**32 is exact in a float.
            weight = float(routed.weights_TK[token, rank])
            expected_TE[token, int(routed.ids_TK[token, rank])] = round(weight * MASS_SCALE)
        assert torch.equal(routed.mass_TU, expected_TE)


def test_small_weights_round_half_to_even(route: Any) -> None:
    # exp(−ln 2 · 33.6) · 2**32 is a fraction below one; around −20 there are fraction bits to round away.
    logits_TE = torch.cat([torch.zeros(40, 1), -torch.linspace(4, 24, 40)[:, None]], dim=1)
    routed = route(logits_TE, torch.full((40,), 0b11), top_k=2)
    expected_T = [round(weight * MASS_SCALE) for weight in routed.weights_TK[:, 1].double().tolist()]
    assert routed.mass_TU[:, 1].tolist() == expected_T
    assert any((weight * MASS_SCALE) % 1 > 0.5 for weight in routed.weights_TK[:, 1].double().tolist())
    assert any(0 < (weight * MASS_SCALE) % 1 < 0.5 for weight in routed.weights_TK[:, 1].double().tolist())


def test_chosen_names_exactly_the_real_picks_up_to_the_sign_bit(route: Any) -> None:
    logits_TE = torch.zeros(2, 64)
    logits_TE[0, 63], logits_TE[0, 31], logits_TE[1, 32] = 5, 4, 6
    gate_T = torch.tensor([-(2**63) | 1 << 31, 1 << 32])
    routed = route(logits_TE, gate_T, top_k=3)
    assert routed.ids_TK.tolist() == [[63, 31, 63], [32, 32, 32]]
    assert torch.equal(routed.chosen_T, gate_T)


def test_fillers_never_count(route: Any) -> None:
    torch.manual_seed(1)
    logits_TE = torch.randn(7, 7)
    for fill in ("none", "first", 0, 3, 6):
        routed = route(logits_TE, torch.full((7,), 0b0001000), top_k=5, fill=fill)
        assert routed.mass_TU.tolist() == [[0, 0, 0, MASS_SCALE, 0, 0, 0]] * 7
        assert routed.chosen_T.tolist() == [0b0001000] * 7


def test_layers_accumulate_in_any_order(route: Any) -> None:
    torch.manual_seed(2)
    layers = [torch.randn(7, 9) for _ in range(5)]
    gate_T = torch.full((7,), 0b101110111)
    together = route.layers(layers, gate_T, top_k=2)
    turned = route.layers([layers[layer] for layer in (3, 1, 4, 0, 2)], gate_T, top_k=2)
    alone = [route(logits_TE, gate_T, top_k=2) for logits_TE in layers]
    assert torch.equal(together.mass_TU, sum(routed.mass_TU for routed in alone))
    assert torch.equal(together.mass_TU, turned.mass_TU)
    assert torch.equal(together.chosen_T, turned.chosen_T)
    assert torch.equal(together.mass_TU > 0, ((together.chosen_T[:, None] >> torch.arange(9)) & 1).bool())
