"""``flexgate experts …`` in one of several processes, which leaves behind what it did, and may die at a step.

Usage, under torchrun: ``observed_training.py REPORT RANK:STEP HOW WORD …``; RANK is a number, ``all`` or ``none``, HOW
is ``kill`` or ``error``. A training that ends well leaves ``REPORT.<rank>.json``: the loss of every step, the rows
computed on, what of the model is held, what has gradients and moments.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from flexgate.experts.cli.main import app
from flexgate.experts.training import train_expert
from flexgate.experts.training.batches import Batch
from flexgate.experts.training.loop import Run
from flexgate.experts.training.parallel import Processes

report, death, how, *words = sys.argv[1:]
rank = os.environ["RANK"]
losses: list[float] = []
rows: list[list[list[int]]] = []
models: list[nn.Module] = []
runs: list[Run] = []
run_step, part_of_batch, make_sharded_pair = Run._step, Processes.part, train_expert.make_sharded_pair


def step(self: Run, batch: Batch, rate: float) -> float:
    if death in (f"{rank}:{self._state.step}", f"all:{self._state.step}"):
        if how == "error":
            raise ValueError("unforeseen")
        os.kill(os.getpid(), signal.SIGKILL)
    losses.append(run_step(self, batch, rate))
    runs[:] = [self]
    return losses[-1]


def part(self: Processes, batch: Batch) -> Batch:
    own = part_of_batch(self, batch)
    if torch.is_grad_enabled():
        weighty = own.weights_BT.sum(-1) > 0
        rows.append(own.tokens_BT[weighty].tolist())
    return own


def sharded_pair(*given: Any) -> nn.Module:
    models[:] = [make_sharded_pair(*given)]
    return models[0]


def local(tensors: list[Tensor]) -> int:
    """Numbers that this process holds of sharded tensors."""
    return sum(tensor.to_local().numel() for tensor in tensors if isinstance(tensor, DTensor))


Run._step, Processes.part, train_expert.make_sharded_pair = step, part, sharded_pair  # type: ignore[method-assign, assignment]
status = 0
try:
    app(words)
except SystemExit as end:
    status = int(end.code or 0)
if not status:
    parameters = dict(models[0].named_parameters())
    moments = [value for state in runs[0]._optimizer.state.values() for value in state.values() if value.dim()]
    with open(f"{report}.{rank}.json", "w") as file:
        json.dump(
            {
                "losses": losses,
                "rows": rows,
                "numbers": sum(value.numel() for value in parameters.values()),
                "held": local(list(parameters.values())),
                "gradients": sorted(name for name, value in parameters.items() if value.grad is not None),
                "moments": sum(value.numel() for value in moments),
                "moments_held": local(moments),
            },
            file,
        )
sys.exit(status)
