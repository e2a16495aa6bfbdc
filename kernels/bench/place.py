"""Where the benchmark runs: a GPU, which is timed, or the interpreter, which only shows that everything runs."""

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from flexgate.kernels.gated_experts.launch import Kernels, device_kernels, device_names
from flexgate.kernels.gated_topk.contract import FILL_NONE, unit_map
from flexgate.kernels.gated_topk.kernel import gated_topk_kernel, launch_gated_topk

Run = Callable[[], object]

_SAMPLE_SECONDS = 0.04
_FLUSH_BYTES = 256 << 20  # several times the L2 of any GPU so far


@dataclass(frozen=True)
class Place:
    """A device, our kernels on it, and a way to launch anybody's kernel there."""

    device: torch.device
    name: str
    tables: tuple[str, str]
    """(device, family) under which tile tables are stored."""
    experts: Kernels
    topk: Any
    launchable: Callable[[Any], Any]
    measured: bool
    """Whether times mean anything; if not, they are None everywhere."""

    def route(self, logits_TE: Tensor, gate_T: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
        """Weights and ids of gated_topk, unused picks −1."""
        mass_TU, unit_E = torch.zeros_like(logits_TE, dtype=torch.int64), self.own_units(logits_TE.shape[1])
        return launch_gated_topk(
            self.topk, logits_TE, gate_T, unit_E, None, mass_TU, torch.zeros_like(gate_T), top_k, False, FILL_NONE
        )

    def own_units(self, experts: int) -> Tensor:
        """The map of a layer whose every expert is a unit of its own."""
        return unit_map(range(experts)).to(self.device)

    def median_us(self, run: Run) -> float | None:
        """Median time of `run` with cold L2, replayed as a CUDA graph; None where nothing is measured."""
        if not self.measured:
            run()
            return None
        return _median_us(_captured(run), self.device)


def gpu() -> Place:
    """The current CUDA device."""
    device = torch.device("cuda", torch.cuda.current_device())
    return Place(
        device,
        torch.cuda.get_device_name(device),
        device_names(device),
        device_kernels(device),
        gated_topk_kernel,
        lambda kernel: kernel,
        measured=True,
    )


def interpreter() -> Place:
    """CPU memory and Triton's interpreter."""
    from flexgate.kernels.testing.interpreter import Interpreted, interpreted_experts

    return Place(
        torch.device("cpu"),
        "interpreter",
        ("interpreter", "interpreter"),
        interpreted_experts(),
        Interpreted(gated_topk_kernel),
        Interpreted,
        measured=False,
    )


def _captured(run: Run) -> Run:
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def _median_us(replay: Run, device: torch.device) -> float:
    cold = torch.empty(_FLUSH_BYTES, dtype=torch.int8, device=device)
    first = _sample_us(replay, cold, 3)
    samples = max(5, min(60, int(_SAMPLE_SECONDS * 1e6 / first)))
    return _sample_us(replay, cold, samples)


def _sample_us(replay: Run, cold: Tensor, samples: int) -> float:
    pairs = []
    for _ in range(samples):
        cold.zero_()
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        replay()
        end.record()
        pairs.append((start, end))
    torch.cuda.synchronize()
    return statistics.median(start.elapsed_time(end) for start, end in pairs) * 1e3
