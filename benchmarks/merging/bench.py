"""One seed of the protocol: its texts and models, each made when first asked for and kept in the work directory."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from functools import cache, cached_property
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

from flexgate.experts.demo.tokenizer import PAD_ID
from flexgate.experts.evaluation.predict import Classifier, fit_classifier
from flexgate.experts.training.batches import make_batch
from flexgate.experts.training.loop import Plan
from flexgate.experts.training.model import FlexOlmo
from flexgate.experts.training.objective import pair_from_anchor
from flexgate.experts.training.pair import trainable
from flexgate.experts.training.train_anchor import answer_loss
from flexgate.experts.training.tune_router import fit_routers
from merging import models
from merging.settings import Settings
from merging.texts import PUBLIC, Texts, all_ids, closed_ids, draw, make_tokenizer
from merging.training import Owner, train_anchor, train_jointly, unrestricted


class Bench:
    """Paths name what a model is; one that exists is not made again."""

    def __init__(self, settings: Settings, work: Path, seed: int) -> None:
        self.settings = settings
        self.seed = seed
        self.folder = work / f"seed-{seed}"
        self.folder.mkdir(parents=True, exist_ok=True)
        self.tokenizer = make_tokenizer(settings, work / "tokenizer.json")

    @cached_property
    def texts(self) -> Texts:
        """What this seed draws."""
        return draw(self.settings, self.tokenizer, self.seed)

    def anchor(self) -> Path:
        """The public model."""
        target = self.folder / "anchor"
        if not target.is_dir():
            model = train_anchor(self.settings, self.texts.train[PUBLIC], self.seed, self.folder / ".anchor")
            models.save(model, target)
        return target

    def expert(self, variant: str, owner: str, peak: float) -> Path:
        """One owner's package."""
        target = self.folder / f"{variant}-{peak:g}" / owner
        if not target.is_dir():
            anchor = self.anchor()
            training = Owner(
                self.settings,
                models.load(anchor),
                owner,
                self.texts.train[owner],
                self.texts.train[PUBLIC],
                peak=peak,
                seed=self.seed,
                work=self.folder / f".{variant}-{peak:g}-{owner}",
            )
            models.package(target, owner, anchor, training.train(variant))
        return target

    def merged(self, variant: str, peak: float, *, never: str | None = None) -> FlexOlmo:
        """The merge of every owner's expert, but that of ``never``."""
        target = self.folder / f"{variant}-{peak:g}" / (f"without-{never}" if never else "merged")
        if not target.is_dir():
            packages = [self.expert(variant, owner, peak) for owner in closed_ids() if owner != never]
            models.merge(target, self.anchor(), packages, top_k=self.settings.top_k)
        return models.load(target)

    def unrestricted(self, peak: float, steps: int) -> FlexOlmo:
        """A mixture trained on everybody's text."""
        target = self.folder / f"unrestricted-{peak:g}"
        if not target.is_dir():
            model = unrestricted(models.load(self.anchor()), len(all_ids()), self.settings.top_k, self.seed)
            work = self.folder / f".unrestricted-{peak:g}"
            train_jointly(self.settings, model, self.texts.train, steps=steps, peak=peak, seed=self.seed, work=work)
            models.save(model, target)
        return models.load(target)

    def rerouted(self, start: str, peak: float, owner_peak: float) -> FlexOlmo:
        """Our merge with routers trained on public text: from random rows (``btx``) or from the owners' (``tuned``)."""
        target = self.folder / f"{start}-{peak:g}"
        if not target.is_dir():
            model, settings, public = self.merged("coordinated", owner_peak), self.settings, self.texts.train[PUBLIC]
            if start == "btx":
                randomise_routers(model, self.seed)
            plan = Plan(
                steps=settings.router_steps,
                peak=peak,
                tokens_per_batch=settings.router_tokens,
                prompt_weight=settings.prompt_weight,
                seed=self.seed,
                evaluate_every=settings.router_steps,
                patience=0,
            )
            work = self.folder / f".{start}-{peak:g}"
            fit_routers(model, public, public[:8], plan, work, pad_id=PAD_ID)
            shutil.rmtree(work, ignore_errors=True)
            models.save(model, target)
        return models.load(target)

    @cache  # noqa: B019 - a bench lives as long as the run
    def classifier(self, decay: float) -> Classifier:
        """A domain classifier that has seen everybody's text."""
        domains = [self.texts.train[name][: self.settings.router_documents] for name in all_ids()]
        return fit_classifier(domains, self.settings.vocab_size, decay=decay)

    @cache  # noqa: B019
    def joint_steps(self) -> tuple[int, dict[str, float]]:
        """Steps that give the unrestricted mixture the owners' training FLOPs, and the figures behind."""
        settings, anchor = self.settings, models.load(self.anchor())
        phases = [(settings.expert_layers, settings.owner_steps)]
        if upper := settings.expert_layers[1:]:
            phases.append((upper, settings.owner_upper_steps))
        ours = len(closed_ids()) * sum(self._flops(anchor, layers) * steps for layers, steps in phases)
        joint = self._flops(anchor, None)
        count = round(ours / joint)
        return count, {"owners": ours, "unrestricted": joint * count, "unrestricted_per_step": joint}

    def _flops(self, anchor: FlexOlmo, layers: Sequence[int] | None) -> float:
        """Of one step of two active experts: the owner's FFNs in ``layers``, or (None) every parameter, trained."""
        pair = pair_from_anchor(anchor).requires_grad_(layers is None)
        if layers is not None:
            trainable(pair, layers, train_router=False)
        batch = make_batch(self.texts.train[closed_ids()[0]][:32], pad_id=PAD_ID, prompt_weight=0.0)
        with FlopCounterMode(display=False) as counter:
            answer_loss(pair, batch).backward()
        return float(counter.get_total_flops())


@torch.no_grad()
def randomise_routers(model: FlexOlmo, seed: int) -> None:
    """Rows of standard deviation 0.02, as Hugging Face initialises them; biases zero."""
    generator = torch.Generator().manual_seed(seed)
    for block in model.model.blocks:
        block.mlp.gate.weight.normal_(0.0, 0.02, generator=generator)
        if block.mlp.gate.bias is not None:
            block.mlp.gate.bias.zero_()
