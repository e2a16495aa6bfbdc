"""What one call of `gated_topk` costs on a CPU, beside torch's own top-k: `python -m flexgate.kernels.bench.routing`.

All contenders take turns in one process, so that a ratio does not depend on what else the machine does; the operator
stands against itself as well, which shows the noise. Times are of one thread, in microseconds per call: warm, call
after call, and cold, each after other memory has been read, as between the experts of two layers.

Shape suffixes: T tokens, E experts of the layer.
"""

import argparse
import json
import os
import platform
import time
from collections.abc import Callable
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch

from flexgate.kernels.gated_topk import MAX_UNITS, gated_topk, gated_topk_implementation, unit_map
from flexgate.kernels.gated_topk.contract import FILL_FIRST
from flexgate.kernels.gated_topk.vectorised import gated_topk_vectorised

TOKENS, EXPERTS, TOP_K = (1, 8, 32), (8, 64, 512), 8
OPERATOR, ITSELF, EAGER, NUMPY = "operator", "operator again", "gated_topk (Python)", "NumPy"
TOPK, SOFTMAX = "aten.topk", "aten.softmax + topk"
WARM_CALLS = 64
COLD_BYTES = 16 << 20

Call = Callable[[], object]


def main() -> None:
    """Measure every shape and print a table; write it as JSON where a file is named."""
    parser = argparse.ArgumentParser(prog="flexgate.kernels.bench.routing", description=__doc__)
    parser.add_argument("file", nargs="?", type=Path, help="where results are written as JSON")
    parser.add_argument("--rounds", type=int, default=200, help="turns of every contender")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    computed_by = gated_topk_implementation(torch.device("cpu"))
    shapes = [_measure(tokens, experts, asked.rounds) for tokens, experts in product(TOKENS, EXPERTS)]
    machine = {"processor": _processor(), "load": os.getloadavg(), "torch": torch.__version__}
    print(f"operator: {computed_by}; {machine}")  # noqa: T201 - the command's output
    for shape in shapes:
        print(_line(shape))  # noqa: T201
    if asked.file is not None:
        result = {"computed_by": computed_by, "rounds": asked.rounds, **machine, "shapes": shapes}
        asked.file.write_text(json.dumps(result, indent=1) + "\n")


def contenders(tokens: int, experts: int) -> dict[str, Call]:
    """One call of each, on the same operands; every expert allowed, as is dearest."""
    logits_TE = torch.randn(tokens, experts, generator=torch.Generator().manual_seed(0))
    units, top_k = min(experts, MAX_UNITS), min(TOP_K, experts)
    gate_T, unit_E = torch.full((tokens,), -1), unit_map([expert % units for expert in range(experts)])
    mass_TU, chosen_T = torch.zeros(tokens, units, dtype=torch.int64), torch.zeros(tokens, dtype=torch.int64)
    operands = (logits_TE, gate_T, unit_E, None, mass_TU, chosen_T, top_k, False, FILL_FIRST)
    operator = partial(torch.ops.flexgate.gated_topk.default, *operands)
    eager = partial(
        gated_topk, logits_TE, gate_T,
        unit_E=unit_E, top_k=top_k, renormalize=False, bias_E=None, mass_TU=mass_TU, chosen_T=chosen_T, fill="first",
    )  # fmt: skip
    return {
        OPERATOR: operator,
        ITSELF: operator,
        EAGER: eager,
        NUMPY: partial(gated_topk_vectorised, *operands),
        TOPK: partial(torch.topk, logits_TE, top_k),
        SOFTMAX: lambda: torch.topk(torch.softmax(logits_TE, dim=1), top_k),
    }


def _measure(tokens: int, experts: int, rounds: int) -> dict[str, Any]:
    calls = contenders(tokens, experts)
    times: dict[str, dict[str, list[float]]] = {kind: {name: [] for name in calls} for kind in ("warm", "cold")}
    elsewhere = np.ones(COLD_BYTES // 8)
    for turn in range(rounds):
        # The first contender of every turn would pay for what ran before it.
        for name in np.roll(list(calls), turn).tolist():
            calls[name]()
            times["warm"][name].append(_microseconds(calls[name], WARM_CALLS))
            elsewhere.sum()
            times["cold"][name].append(_microseconds(calls[name], 1))
    return {"tokens": tokens, "experts": experts} | {kind: _summary(of) for kind, of in times.items()}


def _summary(times: dict[str, list[float]]) -> dict[str, Any]:
    """Of every contender its median time, and its ratio to softmax and top-k: the median of those of all turns."""
    base = np.array(times[SOFTMAX])
    return {
        name: {"us": round(float(np.median(of)), 2), "ratio": round(float(np.median(np.array(of) / base)), 2)}
        for name, of in times.items()
    }


def _microseconds(call: Call, times: int) -> float:
    start = time.perf_counter()
    for _ in range(times):
        call()
    return (time.perf_counter() - start) / times * 1e6


def _line(shape: dict[str, Any]) -> str:
    cells = [
        f"{name} {shape['warm'][name]['us']:.1f}/{shape['cold'][name]['us']:.1f} ({shape['warm'][name]['ratio']:.2f})"
        for name in shape["warm"]
    ]
    return f"T={shape['tokens']} E={shape['experts']}: " + "; ".join(cells)


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


if __name__ == "__main__":
    main()
