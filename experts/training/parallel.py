"""Several processes of one training, as torchrun starts them: what each holds, what each works on, what all must know.

FSDP2 shards parameters, gradients and optimizer state, the frozen parts too; every process computes on its rows of each
batch, and losses and gradients are summed, so that a step is the step of one process but for the order of additions.
``ALONE`` is a training without torchrun: nothing is shared, and every method does what its name says with nobody else.

On a machine with GPUs each process takes one; that is unverified. All machines must see the same files.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any, Final, TypeVar, cast

import torch
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.rendezvous import rendezvous
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from flexgate.experts.errors import ExpertsError, ProcessLost, TrainingRefused
from flexgate.experts.training.batches import Batch, part_of
from flexgate.experts.training.model import FlexOlmo
from flexgate.experts.training.objective import average_gradients

PRINTED: Final = "flexgate/printed"
GRACE: Final = timedelta(seconds=10)
"""How long the others wait for the first process to have printed: torchrun ends all as soon as one fails."""

T = TypeVar("T")


class World:
    """The processes of a training; of this class itself, one alone."""

    rank = 0
    size = 1
    device = torch.device("cpu")
    mesh: DeviceMesh | None = None
    """What models are sharded over; None where they are whole."""

    @property
    def first(self) -> bool:
        """Whether this is the process that prints and writes."""
        return self.rank == 0

    def meet(self) -> None:
        """Make ``mesh``; raises ``TrainingRefused`` unless every process has a device of the same kind."""

    def agreed(self, call: Callable[[], T]) -> T:
        """What ``call`` returns here, unless it raised an ``ExpertsError`` anywhere: then all raise the first one."""
        return call()

    def once(self, call: Callable[[], T]) -> T:
        """What ``call`` returns in the first process, which alone calls it; all raise an ``ExpertsError`` of it."""
        return call()

    def require_same(self, value: str) -> None:
        """Raise ``TrainingRefused`` unless ``value``, which stands for the training, is the same in every process."""

    def part(self, batch: Batch) -> Batch:
        """This process's rows of a batch, on its device."""
        return batch

    def total(self, loss: Tensor) -> float:
        """The loss of a batch from the losses of its parts."""
        return loss.item()

    def join_gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        """Between backward pass and optimizer."""
        average_gradients(parameters)

    def gathered(self, value: Any) -> Any:
        """Nested dictionaries with whole tensors on the host for shards; elsewhere than in the first, None for them."""
        return value


ALONE: Final = World()


class Processes(World):
    """Those that torchrun started; the default process group is theirs and speaks gloo."""

    def __init__(self) -> None:
        self.rank, self.size = distributed.get_rank(), distributed.get_world_size()
        if torch.cuda.is_available():
            self.device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))

    def meet(self) -> None:
        self.agreed(lambda: take(self.device, int(os.environ["LOCAL_WORLD_SIZE"])))
        require_one_kind(self._gather(self.device.type))
        self.mesh = init_device_mesh(self.device.type, (self.size,))

    def agreed(self, call: Callable[[], T]) -> T:
        result, error = _tried(call)
        for found in self._gather(error):
            if found is not None:
                raise found
        return cast(T, result)

    def once(self, call: Callable[[], T]) -> T:
        box = [_tried(call) if self.first else None]
        distributed.broadcast_object_list(box, src=0)
        result, error = cast("tuple[T, ExpertsError | None]", box[0])
        if error is not None:
            raise error
        return result

    def require_same(self, value: str) -> None:
        values = self._gather(value)
        for number, other in enumerate(values):
            if other != values[0]:
                raise TrainingRefused(
                    f"process {number} sees another training than process 0: "
                    "anchor, texts, options and saved state must be the same for all"
                )

    def part(self, batch: Batch) -> Batch:
        return part_of(batch, self.rank, self.size).to(self.device)

    def total(self, loss: Tensor) -> float:
        value = loss.detach().double().cpu()
        distributed.all_reduce(value)
        return value.item()

    def join_gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        """Nothing: FSDP2 summed them in the backward pass."""

    def gathered(self, value: Any) -> Any:
        if isinstance(value, DTensor):
            full = value.full_tensor()
            return full.cpu() if self.first else None
        if isinstance(value, dict):
            return {key: self.gathered(item) for key, item in value.items()}
        return value

    def _gather(self, value: T) -> list[T]:
        values: list[Any] = [None] * self.size
        distributed.all_gather_object(values, value)
        return values


@contextmanager
def joined() -> Iterator[World]:
    """The world that torchrun started this process in; ``ALONE`` without torchrun."""
    if not distributed.is_torchelastic_launched():
        yield ALONE
        return
    if os.environ["LOCAL_WORLD_SIZE"] == os.environ["WORLD_SIZE"]:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # what is learnt from closed texts stays in this machine
    store, rank, size = next(rendezvous("env://"))
    distributed.init_process_group("gloo", store=store, rank=rank, world_size=size)
    try:
        yield Processes()
    finally:
        if rank == 0:
            store.set(PRINTED, "")
        with suppress(distributed.DistStoreError):  # where something else went wrong, it may never come
            store.wait([PRINTED], GRACE)
        distributed.destroy_process_group()


@contextmanager
def lost_process_reported() -> Iterator[None]:
    """A connection that broke because another process is gone raises ``ProcessLost``."""
    try:
        yield
    except RuntimeError as error:
        if isinstance(error, distributed.DistError) or "gloo" in str(error):
            raise ProcessLost(
                "another process of this training is gone; started again, it goes on from the last saved state"
            ) from error
        raise


def shard(model: FlexOlmo, mesh: DeviceMesh) -> None:
    """Leave to this process its shard of every parameter.

    A layer's attention and each of its experts are gathered when they compute and dropped right after, so that one of
    them at a time is whole; the rest of the layers, small but for the embedding, is whole during ``hidden``. Call
    ``hidden`` and ``lm_head``, not the model.
    """
    for block in model.model.blocks:
        for module in (block.self_attn, *block.mlp.ffns):
            _shard(module, mesh)
    _shard(model.lm_head, mesh)
    _shard(model, mesh)
    register_fsdp_forward_method(model, "hidden")


def _shard(module: nn.Module, mesh: DeviceMesh) -> None:
    fully_shard(module, mesh=mesh, reshard_after_forward=True)
    sharded = cast(FSDPModule, module)
    sharded.set_gradient_divide_factor(1.0)
    sharded.set_force_sum_reduction_for_comms(True)


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor that may be sharded; every process must ask."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def sharded_like(tensor: Tensor, like: Tensor) -> Tensor:
    """This process's shard of a whole tensor if ``like`` is sharded, else the tensor."""
    return shard_of(tensor, like.device_mesh) if isinstance(like, DTensor) else tensor


def shard_of(tensor: Tensor, mesh: DeviceMesh) -> Tensor:
    """This process's shard of a tensor that every process can read; the whole need not be kept for it."""
    return distribute_tensor(tensor, mesh, [Shard(0)], src_data_rank=None).clone()


def take(device: torch.device, processes: int) -> None:
    """Make ``device`` this process's; raises ``TrainingRefused`` if this machine's ``processes`` have not one each."""
    if device.type == "cpu":
        return
    if processes > torch.cuda.device_count():
        raise TrainingRefused(
            f"{processes} processes on a machine with {torch.cuda.device_count()} GPUs: "
            "start one per GPU, or train on CPUs with CUDA_VISIBLE_DEVICES=''"
        )
    torch.cuda.set_device(device)


def require_one_kind(kinds: Sequence[str]) -> None:
    """Raise ``TrainingRefused`` where some processes have a GPU and others none; ``kinds`` are device types by rank."""
    if len(set(kinds)) > 1:
        raise TrainingRefused(
            f"process {kinds.index('cuda')} has a GPU, process {kinds.index('cpu')} none: "
            "start all on GPUs, or all on CPUs with CUDA_VISIBLE_DEVICES=''"
        )


def _tried(call: Callable[[], T]) -> tuple[T | None, ExpertsError | None]:
    try:
        return call(), None
    except ExpertsError as error:
        return None, error
