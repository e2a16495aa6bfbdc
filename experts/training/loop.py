"""A training loop that survives being killed: seeded, checkpointed, resumed with the same bits, stopped in time.

The order of batches is a function of the seed alone and the state on disk is everything else, so a resumed run ends
with the tensors of an uninterrupted one. The parameters given are all that gradients reach and all that Adam knows.
"""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from itertools import count, islice
from pathlib import Path
from typing import Any, Final, Literal

import torch
from torch import Tensor, nn
from tqdm import tqdm

from flexgate.experts.errors import TrainingRefused
from flexgate.experts.io.output import sync
from flexgate.experts.training.batches import Batch, Example, batches
from flexgate.experts.training.objective import Schedule
from flexgate.experts.training.parallel import ALONE, World, sharded_like

STATE_NAME: Final = "state.pt"
LossOf = Callable[[Batch], Tensor]


@dataclass(frozen=True)
class Plan:
    """How long and how to train. ``patience`` counts evaluations without a better held-out loss; 0 has no end."""

    steps: int = 400
    peak: float = 9e-4
    warmup: int = 20
    tokens_per_batch: int = 2048
    prompt_weight: float = 0.2
    seed: int = 0
    arithmetic: Literal["float32", "bfloat16"] = "float32"
    save_every: int = 50
    evaluate_every: int = 50
    patience: int = 5

    def __post_init__(self) -> None:
        for name in ("steps", "tokens_per_batch", "save_every", "evaluate_every"):
            if getattr(self, name) < 1:
                raise TrainingRefused(f"{name} is {getattr(self, name)}, expected at least 1")
        if not 0 < self.peak < 1:
            raise TrainingRefused(f"the peak learning rate is {self.peak}, expected between 0 and 1")


@dataclass(frozen=True)
class Outcome:
    """What a run ended with."""

    steps: int
    tokens: int
    held_out_loss: float
    """Nats per token, of the tensors that were kept."""


@dataclass
class _State:
    """All that a resumed run needs besides the data."""

    step: int = 0
    tokens: int = 0
    best: float = float("inf")
    worse: int = 0
    best_tensors: dict[str, Tensor] = field(default_factory=dict)


class Run:
    """One training; ``run`` goes on from the state in ``folder``, if there is one of the same run."""

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        loss_of: LossOf,
        plan: Plan,
        folder: Path,
        *,
        name: str,
        pad_id: int,
        after_step: Callable[[], None] = lambda: None,
        world: World = ALONE,
    ) -> None:
        self._parameters = dict(parameters)
        self._loss_of = loss_of
        self._plan = plan
        self._folder = folder
        self._name = name
        self._pad_id = pad_id
        self._after_step = after_step
        self._world = world
        self._optimizer = torch.optim.Adam(self._parameters.values(), lr=plan.peak, betas=(0.9, 0.98))
        self._state = _State()

    def run(self, train: Sequence[Example], held: Sequence[Example], identity: str) -> Outcome:
        """Train, and leave in the parameters those tensors that were best on ``held``.

        Args:
            identity: stands for everything else that decides the outcome; another one does not go on from this state.

        Raises:
            TrainingRefused: ``folder`` holds the state of another run, or the loss is not finite.
        """
        plan = self._plan
        key = hashlib.sha256(f"{identity} {plan}".encode()).hexdigest()
        self._world.agreed(lambda: self._load(key))
        state = self._state
        self._world.require_same(f"{key} {state.step}")
        begun = state.tokens
        schedule = Schedule(plan.peak, plan.steps, plan.warmup)
        with tqdm(
            total=plan.steps, initial=state.step, desc=self._name, mininterval=1.0, disable=not self._world.first
        ) as bar:
            for batch in islice(self._stream(train), state.step, plan.steps):
                if plan.patience and state.worse >= plan.patience:
                    break
                loss = self._step(batch, schedule.at(state.step))
                state.step += 1
                state.tokens += batch.token_count
                if state.step % plan.evaluate_every == 0 or state.step == plan.steps:
                    self._judge(held)
                if state.step % plan.save_every == 0:
                    self._save(key)
                self._show(bar, loss, state.tokens - begun)
        self._restore_best()
        return Outcome(state.step, state.tokens, state.best)

    def _stream(self, examples: Sequence[Example]) -> Iterator[Batch]:
        for epoch in count():
            yield from self._batches(examples, self._plan.seed + epoch)

    def _batches(self, examples: Sequence[Example], seed: int) -> Iterator[Batch]:
        plan = self._plan
        return batches(
            examples,
            tokens_per_batch=plan.tokens_per_batch,
            pad_id=self._pad_id,
            prompt_weight=plan.prompt_weight,
            seed=seed,
        )

    def _step(self, batch: Batch, rate: float) -> float:
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        self._optimizer.zero_grad(set_to_none=True)
        loss = self._loss(batch)
        value = self._world.total(loss)
        if not math.isfinite(value):
            raise TrainingRefused(f"{self._name}: the loss is {value} at step {self._state.step}: lower the peak rate")
        loss.backward()
        self._world.join_gradients(list(self._parameters.values()))
        nn.utils.clip_grad_norm_(self._parameters.values(), 1.0)
        self._optimizer.step()
        self._after_step()
        return value

    def _loss(self, batch: Batch) -> Tensor:
        reduced = self._plan.arithmetic == "bfloat16"
        with torch.autocast(self._world.device.type, torch.bfloat16) if reduced else nullcontext():
            return self._loss_of(self._world.part(batch))

    @torch.no_grad()
    def _judge(self, held: Sequence[Example]) -> None:
        losses = [(self._world.total(self._loss(batch)), batch.token_count) for batch in self._batches(held, 0)]
        mean = sum(loss * tokens for loss, tokens in losses) / max(1, sum(tokens for _, tokens in losses))
        if mean < self._state.best:
            self._state.best, self._state.worse = mean, 0
            self._state.best_tensors = {name: value.detach().clone() for name, value in self._parameters.items()}
        else:
            self._state.worse += 1

    @torch.no_grad()
    def _restore_best(self) -> None:
        for name, value in self._state.best_tensors.items():
            self._parameters[name].copy_(value)

    def _show(self, bar: Any, loss: float, tokens: int) -> None:
        rate = tokens / max(bar.format_dict["elapsed"], 1e-9)
        bar.set_postfix_str(f"loss {loss:.3f}, held out {self._state.best:.3f}, {rate:,.0f} tokens/s", refresh=False)
        bar.update()

    def _save(self, key: str) -> None:
        tensors = {name: value.detach() for name, value in self._parameters.items()}
        state = self._world.gathered(
            {"key": key, "tensors": tensors, "optimizer": self._optimizer.state_dict(), **vars(self._state)}
        )
        if not self._world.first:
            return
        self._folder.mkdir(parents=True, exist_ok=True)
        fresh = self._folder / f"{STATE_NAME}.new"
        with fresh.open("wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(fresh, self._folder / STATE_NAME)
        sync(self._folder)

    @torch.no_grad()
    def _load(self, key: str) -> None:
        path = self._folder / STATE_NAME
        if not path.is_file():
            return
        state = torch.load(path, weights_only=True, mmap=self._world.size > 1)
        if state.pop("key") != key:
            raise TrainingRefused(f"{self._folder} holds a run with other options or texts; remove it to start anew")
        for name, value in state.pop("tensors").items():
            self._parameters[name].copy_(sharded_like(value, self._parameters[name]))
        optimizer = state.pop("optimizer")
        parameters = list(self._parameters.values())
        for number, moments in optimizer["state"].items():
            for name in ("exp_avg", "exp_avg_sq"):
                moments[name] = sharded_like(moments[name], parameters[number])
        self._optimizer.load_state_dict(optimizer)
        best = state.pop("best_tensors")
        best = {name: sharded_like(value, self._parameters[name]) for name, value in best.items()}
        self._state = _State(**state, best_tensors=best)
