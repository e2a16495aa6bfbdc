"""What the protocol trains: the anchor, owners' experts in four ways, an unrestricted mixture, routers on public text.

Every training goes through ``loop.Run``: seeded, and resumed where it was stopped.

Shapes: N positions with a weight, L layers, H hidden.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from random import Random

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from flexgate.experts.checkpoint.layout import EXPERT_KEYS, ROUTER_KEY, shared_keys
from flexgate.experts.demo.tokenizer import PAD_ID
from flexgate.experts.package.weights import ExpertLayer
from flexgate.experts.training.batches import Batch, Example, batches
from flexgate.experts.training.loop import Plan, Run
from flexgate.experts.training.model import FlexOlmo
from flexgate.experts.training.objective import pair_from_anchor
from flexgate.experts.training.pair import Row, expert_layers, make_pair, trainable, z_loss
from flexgate.experts.training.routing import Samples, collect, fit_rows, set_rows
from flexgate.experts.training.train_anchor import AnchorOptions, Channels, answer_loss, fit_anchor
from flexgate.experts.training.train_expert import Z_WEIGHT
from merging.settings import Settings

PUBLIC_SHARE = 0.25
"""Of the text that a router is trained with by the language-model loss, as in ``experts train``."""
CERTAIN = 30.0
"""A router logit that leaves nothing to the other expert."""


def train_anchor(settings: Settings, examples: Sequence[Example], seed: int, work: Path) -> FlexOlmo:
    """The public model by the demo's recipe: next tokens, and the prompt's key words readable from the channels."""
    options = AnchorOptions(
        plan=_plan(settings.anchor_steps, settings.anchor_peak, settings.anchor_tokens, settings.prompt_weight, seed),
        vocab_size=settings.vocab_size,
        hidden_size=settings.hidden_size,
        intermediate_size=settings.intermediate_size,
        layers=settings.layers,
        heads=settings.heads,
        length=settings.max_length,
        channels=Channels(settings.channels, settings.expert_layers[0], settings.key_weight),
    )
    model = FlexOlmo(options.architecture())
    run = fit_anchor(model, options, work, PAD_ID)
    _go(run, examples, f"anchor {settings}", work)
    return model


class Owner:
    """One owner's training against the frozen anchor; it sees its own and public text."""

    def __init__(
        self,
        settings: Settings,
        anchor: FlexOlmo,
        name: str,
        own: Sequence[Example],
        public: Sequence[Example],
        *,
        peak: float,
        seed: int,
        work: Path,
    ) -> None:
        self._settings = settings
        self._anchor = anchor
        self._name = name
        self._own = own
        self._public = public
        self._peak = peak
        self._seed = seed
        self._work = work

    def train(self, variant: str) -> list[ExpertLayer]:
        """The expert as ``coordinated`` (ours) or one of the ablations makes it."""
        if variant == "uninitialised":
            return self._uninitialised()
        pair = pair_from_anchor(self._anchor)
        biased, coordinated = variant != "unbiased", variant != "uncoordinated"
        upper = self._settings.expert_layers[1:]
        if coordinated:
            self._fit_routers(pair, self._settings.channels, range(self._settings.layers), biased=biased)
        else:
            certain_H = F.one_hot(torch.tensor(0), self._settings.hidden_size) * CERTAIN
            set_rows(pair, dict.fromkeys(range(self._settings.layers), certain_H), sharpness=1.0)
        self._fit_ffns(pair, self._settings.expert_layers, self._settings.owner_steps, self._peak)
        if coordinated:
            self._fit_routers(pair, self._settings.hidden_size - 1, upper, biased=biased)
        self._fit_ffns(pair, upper, self._settings.owner_upper_steps, self._peak * 2 / 3)
        if not coordinated:
            self._fit_routers(pair, self._settings.channels, range(self._settings.layers), biased=biased)
            self._fit_routers(pair, self._settings.hidden_size - 1, upper, biased=biased)
        return list(expert_layers(pair, torch.float32))

    def _uninitialised(self) -> list[ExpertLayer]:
        """Rows start at random and learn with the expert from the language-model loss, on own and public text."""
        settings = self._settings
        generator = torch.Generator().manual_seed(self._seed)
        rows = [Row(0.02 * torch.randn(settings.hidden_size, generator=generator)) for _ in range(settings.layers)]
        pair = make_pair(self._anchor, rows)
        named = trainable(pair, settings.expert_layers, train_router=True)
        wanted = round(len(self._own) * PUBLIC_SHARE / (1 - PUBLIC_SHARE))
        mixed = [*self._own, *Random(self._seed).sample(self._public, min(wanted, len(self._public)))]
        steps = settings.owner_steps + settings.owner_upper_steps
        run = self._run(pair, named, steps, self._peak, extra=lambda batch: Z_WEIGHT * z_loss(pair, batch))
        _go(run, mixed, f"{self._name} uninitialised {settings}", self._work)
        return list(expert_layers(pair, torch.float32))

    def _fit_ffns(self, pair: FlexOlmo, layers: Sequence[int], steps: int, peak: float) -> None:
        if not layers:
            return
        pair.requires_grad_(False)
        ffns = {layer: pair.model.blocks[layer].mlp.ffns[1].requires_grad_() for layer in layers}
        named = {f"{layer}.{name}": value for layer, ffn in ffns.items() for name, value in ffn.named_parameters()}
        run = self._run(pair, named, steps, peak)
        _go(run, self._own, f"{self._name} {layers} {self._settings}", self._work / f"from-{layers[0]}")

    def _run(
        self,
        pair: FlexOlmo,
        named: Mapping[str, nn.Parameter],
        steps: int,
        peak: float,
        extra: Callable[[Batch], Tensor | float] = lambda _: 0.0,
    ) -> Run:
        plan = _plan(steps, peak, self._settings.owner_tokens, 0.0, self._seed)
        work = self._work / f"from-{min(int(name.split('.')[0]) for name in named)}"
        return Run(
            named, lambda batch: answer_loss(pair, batch) + extra(batch), plan, work, name=self._name, pad_id=PAD_ID
        )

    def _fit_routers(self, pair: FlexOlmo, channels: int, layers: Sequence[int], *, biased: bool) -> None:
        settings = self._settings
        public = Random(f"{self._name} {self._seed}").sample(
            self._public, min(2 * settings.router_documents, len(self._public))
        )
        own, other = (_samples(settings, pair, part) for part in (self._own[: settings.router_documents], public))
        if not biased:
            own, other = _without_constant(own), _without_constant(other)
        rows = fit_rows(
            own,
            other,
            channels=channels,
            first_expert_layer=settings.expert_layers[0],
            layers=layers,
            decay=settings.router_decay,
        )
        set_rows(pair, rows, sharpness=settings.sharpness)


def unrestricted(anchor: FlexOlmo, experts: int, top_k: int, seed: int) -> FlexOlmo:
    """A mixture whose experts all start as the anchor's FFN, with a random router, to be trained in every parameter."""
    single = anchor.architecture
    model = FlexOlmo(replace(single, num_experts=experts, num_experts_per_tok=top_k))
    source, generator = anchor.state_dict(), torch.Generator().manual_seed(seed)
    target = {key: source[key] for key in shared_keys(single)}
    for layer in range(single.num_hidden_layers):
        target[ROUTER_KEY.format(layer=layer)] = 0.02 * torch.randn(experts, single.hidden_size, generator=generator)
        for key in EXPERT_KEYS:
            ffn = source[key.format(layer=layer, expert=0)]
            target |= {key.format(layer=layer, expert=expert): ffn for expert in range(experts)}
    model.load_state_dict(target)
    return model


def train_jointly(
    settings: Settings,
    model: FlexOlmo,
    domains: Mapping[str, Sequence[Example]],
    *,
    steps: int,
    peak: float,
    seed: int,
    work: Path,
) -> None:
    """Every parameter of ``model`` on the text of all domains in equal parts."""
    smallest = min(len(examples) for examples in domains.values())
    mixed = [example for examples in domains.values() for example in examples[:smallest]]
    plan = _plan(steps, peak, settings.owner_tokens, 0.0, seed)
    run = Run(
        dict(model.named_parameters()),
        lambda batch: answer_loss(model, batch),
        plan,
        work,
        name="unrestricted",
        pad_id=PAD_ID,
    )
    _go(run, mixed, f"unrestricted {settings}", work)


def _plan(steps: int, peak: float, tokens: int, prompt_weight: float, seed: int) -> Plan:
    return Plan(
        steps=steps,
        peak=peak,
        tokens_per_batch=tokens,
        prompt_weight=prompt_weight,
        seed=seed,
        save_every=200,
        evaluate_every=steps,
        patience=0,
    )


def _go(run: Run, examples: Sequence[Example], identity: str, work: Path) -> None:
    """Train to the last step, whose tensors are kept: nobody stops early."""
    run.run(examples, examples[:8], identity)
    shutil.rmtree(work, ignore_errors=True)


def _samples(settings: Settings, model: FlexOlmo, examples: Sequence[Example]) -> Samples:
    stream: Iterable[Batch] = batches(
        examples,
        tokens_per_batch=settings.anchor_tokens,
        pad_id=PAD_ID,
        prompt_weight=settings.prompt_weight,
        seed=0,
    )
    return collect(model, stream)


def _without_constant(samples: Samples) -> Samples:
    inputs = tuple(F.pad(inputs_NH[:, 1:], (1, 0)) for inputs_NH in samples.inputs_LNH)
    return replace(samples, inputs_LNH=inputs)
