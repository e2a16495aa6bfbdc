"""The probe matrix of a checkpoint directory: every gate, every domain, by completion and by chat."""

from __future__ import annotations

import json
import platform
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from tqdm import tqdm

from flexgate.experts.demo.corpus import SYSTEM_MESSAGES
from flexgate.experts.demo.evaluate import Result, accuracy, all_gates, ask
from flexgate.experts.demo.probes import read_probes
from flexgate.experts.demo.ship import PROBES_NAME, expert_ids, read_digests
from flexgate.experts.layout import read_checkpoint
from flexgate.experts.model import FlexOlmo


def load(directory: Path) -> tuple[FlexOlmo, Tokenizer, tuple[str, ...]]:
    """Model in fp32, tokenizer and expert ids of a shipped checkpoint."""
    model = FlexOlmo.from_tensors(*read_checkpoint(directory))
    return model, Tokenizer.from_file(str(directory / "tokenizer.json")), expert_ids(directory)


def write_report(directory: Path, path: Path) -> dict[str, Any]:
    """Measure the whole matrix and write it as JSON."""
    model, tokenizer, experts = load(directory)
    probes = read_probes(directory / PROBES_NAME)
    gates = {
        "+".join(gate): _by_domain(experts, ask(model, tokenizer, experts, gate, probes))
        for gate in tqdm(list(all_gates(experts)), desc="gates")
    }
    chats = [probe for probe in probes if probe.kind == "chat"]
    with_system = ask(model, tokenizer, experts, experts, chats, SYSTEM_MESSAGES[0])
    report = {
        "command": "python -m flexgate.experts.demo --measure-only --report docs/results/demo-model.json",
        "device": platform.machine(),
        "torch": torch.__version__,
        "dtype": "bfloat16 weights, float32 arithmetic",
        "weights_sha256": read_digests(directory)["model.safetensors"],
        "experts": list(experts),
        "probes": {domain: sum(probe.domain == domain for probe in probes) for domain in experts},
        "summary": summarise(experts, gates),
        "gates": gates,
        "all_experts_with_system_message": _by_domain(experts, with_system),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=1) + "\n")
    return report


def summarise(experts: Sequence[str], gates: dict[str, dict[str, dict[str, float]]]) -> dict[str, dict[str, float]]:
    """Per domain: the worst accuracy over gates that hold its expert, and the best over gates that lack it."""
    summary = {}
    for domain in experts:
        inside = [row[domain]["all"] for gate, row in gates.items() if domain in gate.split("+")]
        outside = [row[domain]["all"] for gate, row in gates.items() if domain not in gate.split("+")]
        summary[domain] = {"worst_with": min(inside), **({"best_without": max(outside)} if outside else {})}
    return summary


def report_lines(report: dict[str, Any]) -> Iterator[str]:
    """The matrix in percent, one gate a line."""
    experts = report["experts"]
    for gate, row in report["gates"].items():
        yield "  ".join(f"{domain} {row[domain]['all'] * 100:5.1f}" for domain in experts) + f"   {gate}"


def _by_domain(experts: Sequence[str], results: Sequence[Result]) -> dict[str, dict[str, float]]:
    return {domain: _figures([result for result in results if result.probe.domain == domain]) for domain in experts}


def _figures(results: Sequence[Result]) -> dict[str, float]:
    figures = {"all": accuracy(results)}
    for kind in ("chat", "completion"):
        for phrasing in ("seen", "paraphrase"):
            part = [r for r in results if (r.probe.kind, r.probe.phrasing) == (kind, phrasing)]
            if part:
                figures[f"{kind}/{phrasing}"] = accuracy(part)
    return {name: round(value, 4) for name, value in figures.items()}
