"""The whole protocol, stage by stage; a stage whose file lies in the work directory is not run again."""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from flexgate.experts.demo.tokenizer import EOS_ID, PAD_ID
from flexgate.experts.errors import TrainingRefused
from flexgate.experts.evaluation.measure import (
    DomainTexts,
    choice_accuracy,
    measure,
    nats_per_token,
    routing_accuracy,
)
from flexgate.experts.evaluation.predict import Predict, gated
from merging.bench import Bench
from merging.extraction import extracted
from merging.methods import Method, choosers, everything, others, ours
from merging.settings import VARIANTS, Settings
from merging.summary import summarise
from merging.texts import all_ids, closed_ids


def run(settings: Settings, work: Path) -> dict[str, Any]:
    """Train, tune and measure everything that is not in ``work`` yet, and put the figures together."""
    work.mkdir(parents=True, exist_ok=True)
    _claim(settings, work)
    first = Bench(settings, work, settings.seeds[0])
    peak = _tuned(first, ours(settings))["chosen"]
    methods = (ours(settings), *others(settings, peak))
    tunings = {method.name: _tuned(first, method) for method in methods if method.trials}
    benches = [first, *(Bench(settings, work, seed) for seed in settings.seeds[1:])]
    with tqdm(total=len(benches) * (len(methods) + 3), desc="protocol", position=1) as bar:
        seeds = [_seed(bench, methods, tunings, peak, bar) for bench in benches]
    return {
        "command": "make evaluation",
        "device": f"{platform.machine()}, {torch.get_num_threads()} thread",
        "torch": torch.__version__,
        "settings": asdict(settings),
        "joint_steps": first.joint_steps()[0],
        "training_flops": first.joint_steps()[1],
        "tuning": tunings,
        **summarise(seeds),
        "minutes": round(sum(json.loads(path.read_text()) for path in work.rglob("*.seconds")) / 60, 1),
    }


def _seed(bench: Bench, methods: tuple[Method, ...], tunings: dict[str, Any], peak: float, bar: Any) -> dict[str, Any]:
    """The figures of one seed."""
    rows = {}
    for method in methods:
        value = tunings[method.name]["chosen"] if method.trials else 0.0
        rows[method.name] = _kept(bench.folder / f"row {method.name}.json", partial(_row, bench, method, value))
        bar.update()
    routing = _kept(bench.folder / "routing.json", lambda: _routing(bench, peak))
    bar.update()
    chosen = {name: tuned["chosen"] for name, tuned in tunings.items()}
    placing = _kept(bench.folder / "placing.json", lambda: _placing(bench, peak, chosen))
    bar.update()
    extraction = _kept(bench.folder / "extraction.json", lambda: _extraction(bench, peak))
    bar.update()
    return {"rows": rows, "routing": routing, "placing": placing, "extraction": extraction}


def _row(bench: Bench, method: Method, value: float) -> dict[str, Any]:
    figures = measure(method.make(bench, value), bench.texts.test, PAD_ID)
    return {
        "nats": {name: figure.nats for name, figure in figures.items()},
        "accuracy": {name: figure.accuracy for name, figure in figures.items()},
    }


def _tuned(bench: Bench, method: Method) -> dict[str, Any]:
    """Every trial's loss on development text, and the value that did best."""

    def trial(value: float) -> dict[str, float]:
        return {"value": value, "nats": macro_nats(method.make(bench, value), bench.texts.development)}

    trials = [
        _kept(bench.folder / f"trial {method.name} {value:g}.json", partial(trial, value)) for value in method.trials
    ]
    return {"trials": trials, "chosen": min(trials, key=lambda trial: trial["nats"])["value"]}


def macro_nats(predict: Predict, domains: dict[str, DomainTexts]) -> float:
    """Mean over domains of the loss on held-out text."""
    losses = [nats_per_token(predict, texts.held_out, PAD_ID) for texts in domains.values()]
    return sum(losses) / len(losses)


def _routing(bench: Bench, peak: float) -> dict[str, dict[str, list[float]]]:
    """Per variant and domain, layer by layer, the share of tokens that their own expert leads."""
    return {
        variant: {
            name: routing_accuracy(bench.merged(variant, peak), expert, bench.texts.test[name].held_out, PAD_ID)
            for expert, name in enumerate(all_ids())
        }
        for variant in VARIANTS
    }


def _placing(bench: Bench, peak: float, chosen: dict[str, float]) -> dict[str, dict[str, float]]:
    """Per method that chooses between whole models, the share of every domain's texts that it places there."""
    return {
        method: {
            name: choice_accuracy(choose, own, bench.texts.test[name].held_out) for own, name in enumerate(all_ids())
        }
        for method, choose in choosers(bench, peak, chosen).items()
    }


def _extraction(bench: Bench, peak: float) -> dict[str, dict[str, float]]:
    """Per owner, the share of its attacked texts that comes out of each model."""
    merged = bench.merged("coordinated", peak)
    found = {}
    for owner in closed_ids():
        models = {
            "with": everything(merged),
            "excluded": gated(merged, [name != owner for name in all_ids()]),
            "never had": everything(bench.merged("coordinated", peak, never=owner)),
            "public only": gated(merged, [name == all_ids()[0] for name in all_ids()]),
        }
        found[owner] = {
            name: extracted(
                predict, bench.texts.attacked[owner], bench.tokenizer.decode, bench.settings.attack, eos_id=EOS_ID
            )
            for name, predict in models.items()
        }
    return found


def _kept(path: Path, make: Callable[[], Any]) -> Any:
    """What ``make`` returns, from the file if it is there; the file appears whole, its working time beside it."""
    if not path.is_file():
        began = time.process_time()
        text = json.dumps(make())
        path.with_suffix(".seconds").write_text(json.dumps(time.process_time() - began))
        fresh = path.with_suffix(".new")
        fresh.write_text(text)
        os.replace(fresh, path)
    return json.loads(path.read_text())


def _claim(settings: Settings, work: Path) -> None:
    """A work directory belongs to one set of numbers."""
    said = json.dumps(asdict(settings), indent=1)
    path = work / "settings.json"
    if path.is_file() and path.read_text() != said:
        raise TrainingRefused(f"{work} holds a run with other numbers; give another work directory or remove it")
    path.write_text(said)
