"""Training moves what it should, nothing else, and comes out the same twice."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from packagekit import bit_equal

from flexgate.experts.checkpoint.layout import Architecture, expert_keys
from flexgate.experts.training.batches import Example, batches, make_batch
from flexgate.experts.training.decode import greedy, says
from flexgate.experts.training.loop import Plan, Run
from flexgate.experts.training.model import FlexOlmo
from flexgate.experts.training.objective import initialise, language_loss, pair_from_anchor, weighted_loss
from flexgate.experts.training.pair import expert_layers, trainable
from flexgate.experts.training.routing import collect, fit_row, key_loss, reserve_channels, set_rows

ONE = Architecture(31, 16, 12, 3, 2, 2, num_experts=1, num_experts_per_tok=1)
EXAMPLES = [Example(tuple(range(2, 4 + size)), 2) for size in range(1, 9)]


def trained_pair(folder: Path) -> tuple[FlexOlmo, FlexOlmo]:
    anchor = FlexOlmo(ONE)
    initialise(anchor, 3)
    reserve_channels(anchor, 4, 1)
    pair = pair_from_anchor(anchor)
    pair.requires_grad_(False)
    set_rows(pair, {0: torch.ones(16), 1: torch.ones(16), 2: torch.ones(5)}, sharpness=2.0)
    plan = Plan(steps=20, peak=1e-2, warmup=2, tokens_per_batch=30, prompt_weight=0.5)
    named = trainable(pair, (1, 2), train_router=False)
    run = Run(named, lambda b: weighted_loss(pair, pair.hidden(b.tokens_BT), b), plan, folder, name="test", pad_id=1)
    run.run(EXAMPLES, EXAMPLES[:2], "test")
    return anchor, pair


def test_only_the_owners_ffn_in_the_chosen_layers_moves(tmp_path: Path) -> None:
    anchor, pair = trained_pair(tmp_path)
    start, end = pair_from_anchor(anchor).state_dict(), pair.state_dict()
    moved = {key for key in end if not bit_equal(start[key], end[key]) and "mlp.gate" not in key}
    assert moved == {key for key in expert_keys(ONE, 1) if "layers.0." not in key}


def test_hidden_states_can_be_continued_from_any_layer(tmp_path: Path) -> None:
    _, pair = trained_pair(tmp_path)
    tokens, taps = torch.arange(2, 12).view(1, 10), list[torch.Tensor]()
    with torch.no_grad():
        whole = pair.hidden(tokens, taps=taps)
        for layer in range(3):
            assert torch.equal(pair.onward(taps[layer], layer), whole)


def test_training_twice_gives_the_same_bits(tmp_path: Path) -> None:
    one, two = (trained_pair(tmp_path / name)[1].state_dict() for name in ("one", "two"))
    assert all(bit_equal(one[key], two[key]) for key in one)


def test_routing_channels_do_not_depend_on_what_experts_compute(tmp_path: Path) -> None:
    _, pair = trained_pair(tmp_path)
    tokens = torch.arange(2, 12).view(1, 10)
    taps: dict[bool, list[torch.Tensor]] = {True: [], False: []}
    with torch.no_grad():
        for both, seen in taps.items():
            pair.hidden(tokens, torch.tensor([[True, both]]), taps=seen)
    assert not torch.allclose(taps[True][2], taps[False][2], atol=1e-3)
    for layer in (1, 2):
        torch.testing.assert_close(taps[True][layer][..., :5], taps[False][layer][..., :5], atol=1e-5, rtol=1e-5)
        assert torch.equal(taps[True][layer][..., :5], taps[True][1][..., :5])
    assert bool((taps[True][0][..., 0] == 1).all())


def test_an_untrained_pair_computes_what_the_anchor_computes() -> None:
    anchor = FlexOlmo(ONE)
    initialise(anchor, 5)
    tokens = torch.arange(12).view(1, 12)
    with torch.no_grad():
        torch.testing.assert_close(pair_from_anchor(anchor)(tokens), anchor(tokens), atol=1e-5, rtol=1e-5)


def test_a_package_holds_what_the_pair_learnt(tmp_path: Path) -> None:
    _, pair = trained_pair(tmp_path)
    for layer, block in zip(expert_layers(pair, torch.float32), pair.model.blocks, strict=True):
        assert bit_equal(layer.up_proj_FH, block.mlp.ffns[1].up_proj.weight)
        assert bit_equal(layer.router_row_H, block.mlp.gate.weight[1])
        assert layer.router_bias is None


def test_the_loss_needs_logits_only_where_they_have_a_weight() -> None:
    model = FlexOlmo(ONE)
    initialise(model, 2)
    batch = make_batch(EXAMPLES, pad_id=1, prompt_weight=0.0)
    with torch.no_grad():
        sparse = weighted_loss(model, model.hidden(batch.tokens_BT), batch)
        torch.testing.assert_close(sparse, language_loss(model(batch.tokens_BT), batch))


def test_a_fitted_row_separates_what_is_separable() -> None:
    generator = torch.Generator().manual_seed(0)
    own = torch.cat((torch.ones(50, 1), torch.randn(50, 3, generator=generator) + 3), dim=1)
    other = torch.cat((torch.ones(90, 1), torch.randn(90, 3, generator=generator) - 3), dim=1)
    row = fit_row(own, torch.ones(50), other, torch.ones(90), decay=1e-4)
    assert bool((own @ row > 0).all())
    assert bool((other @ row < 0).all())


def test_collected_inputs_follow_the_loss_weights() -> None:
    anchor = FlexOlmo(ONE)
    batch = make_batch(EXAMPLES[:3], pad_id=1, prompt_weight=0.5)
    samples = collect(anchor, [batch])
    assert [tuple(layer.shape) for layer in samples.inputs_LNH] == [(batch.token_count, 16)] * 3
    assert samples.weights_N.sum() == batch.weights_BT.sum()


def test_weights_cover_the_prompt_lightly_and_the_answer_fully() -> None:
    batch = make_batch([Example((5, 6, 7, 8), 2), Example((5, 6), 0)], pad_id=1, prompt_weight=0.25)
    assert batch.tokens_BT.tolist() == [[5, 6, 7, 8], [5, 6, 1, 1]]
    assert batch.weights_BT.tolist() == [[0.25, 1.0, 1.0, 0.0], [1.0, 0.0, 0.0, 0.0]]


def test_only_the_prompts_key_tokens_are_marked() -> None:
    batch = make_batch([Example((5, 6, 5, 8, 6), 3, frozenset({6, 9}))], pad_id=1, prompt_weight=0.5)
    assert batch.keys_BT.tolist() == [[False, True, False, False, False]]


def test_key_loss_asks_the_channels_for_every_key_wherever_the_model_answers() -> None:
    """A head that reads keys 6 and 7 from channels 1 and 2 is charged their entropy at answers, nothing elsewhere."""
    head = torch.nn.Linear(2, 31)
    with torch.no_grad():
        head.weight.zero_()
        head.bias.fill_(-100.0)
        head.bias[6] = head.bias[7] = 0.0
        head.weight[6, 0] = head.weight[7, 1] = 1.0
    examples = [Example((6, 7, 5, 8), 3, frozenset({6, 7})), Example((6, 7, 5, 8), 3)]
    batch = make_batch(examples, pad_id=1, prompt_weight=0.5)
    tap_BTH = torch.full((2, 4, 16), float("nan"))
    tap_BTH[0, 2, 1:3] = 3.0
    assert key_loss(head, tap_BTH, batch).item() == pytest.approx(math.log(2))
    tap_BTH[0, 2, 2] = -3.0
    assert key_loss(head, tap_BTH, batch) > 3.0


def test_one_pass_of_batches_holds_every_example_once() -> None:
    rows = [
        row
        for batch in batches(EXAMPLES, tokens_per_batch=25, pad_id=1, prompt_weight=1.0, seed=4)
        for row in batch.tokens_BT
    ]
    assert sorted(tuple(t for t in row.tolist() if t != 1) for row in rows) == sorted(
        example.ids for example in EXAMPLES
    )


def counting(tokens_BT: torch.Tensor) -> torch.Tensor:
    """Every token is followed by the next number; 9 is followed by 0, the end."""
    return torch.nn.functional.one_hot((tokens_BT + 1) % 10, 10).float()


def test_greedy_decoding_stops_at_the_end_token_per_prompt() -> None:
    answers = greedy(counting, [[5], [1, 2, 7], [1]], eos_id=0, max_new=5, batch=2)
    assert answers == [[6, 7, 8, 9], [8, 9], [2, 3, 4, 5, 6]]


def test_greedy_decoding_leaves_a_prompt_that_is_not_worth_going_on() -> None:
    answers = greedy(counting, [[5], [1]], eos_id=0, max_new=5, go_on=lambda place, said: place == 0 or len(said) < 2)
    assert answers == [[6, 7, 8, 9], [2, 3]]


def test_one_pass_shows_whether_greedy_decoding_would_say_an_answer() -> None:
    prompts, answers = [[5], [1, 2, 7], [1]], [[6, 7, 8, 9, 0], [8, 9], [2, 4]]
    assert says(counting, prompts, answers, batch=2) == [True, True, False]
