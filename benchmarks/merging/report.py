"""The protocol's figures as Markdown, beside the paper's."""

from __future__ import annotations

from typing import Any, Final

from flexgate.experts.evaluation.markdown import percent, scaled, table
from merging.methods import ABLATIONS, MERGING, OURS, TUNED, UNRESTRICTED
from merging.summary import MACRO

PAPER: Final = {
    "public only": 36.9,
    "model soup": 39.6,
    "model soup, weighted": 42.2,
    "BTM, top-2": 43.4,
    "domain classifier": 40.8,
    "BTX-style router": 40.0,
    UNRESTRICTED: 46.3,
    OURS: 46.7,
    TUNED: 47.8,
    "no bias": 45.8,
    "no domain initialisation": 44.4,
    "no coordination": 38.8,
}
"""arXiv 2507.07024, Table 1: averages over its eight task groups. Its row without domain initialisation lacks the bias
too, and its domain classifier is a language model that is asked for the domain."""


def report(found: dict[str, Any]) -> str:
    """Every table."""
    return "\n".join(
        (_setting(found), _aims(found["aims"]), _methods(found), _matrix(found), _routing(found), _extraction(found))
    )


def heatmap_rows(found: dict[str, Any]) -> dict[str, dict[str, float]]:
    """The opt-out matrix of mean accuracies."""
    return {
        name: {domain: value["mean"] for domain, value in found["rows"][name]["accuracy"].items()}
        for name in _gates(found)
    }


def _setting(found: dict[str, Any]) -> str:
    settings, flops = found["settings"], found["training_flops"]
    trials = [
        [name, *(f"{t['value']:g}: {t['nats']:.3f}" for t in tuned["trials"]), f"{tuned['chosen']:g}"]
        for name, tuned in found["tuning"].items()
    ]
    return (
        f"Measured on {found['device']}, PyTorch {found['torch']}, in {found['minutes']} minutes of processor time; "
        f"seeds {', '.join(map(str, settings['seeds']))}. Width {settings['hidden_size']}, {settings['layers']} layers,"
        f" {settings['vocab_size']} tokens. Training costs {flops['owners']:.3g} FLOPs for the four owners together, "
        f"{flops['unrestricted']:.3g} for the unrestricted mixture. Ranges are 95 % intervals over seeds.\n\n"
        "## Trials\n\nOf the one number that a method has to choose, by the loss (nats per token, mean over domains) "
        "on development text of the first seed.\n\n" + table(["Method", "trial", "trial", "trial", "chosen"], trials)
    )


def _aims(aims: dict[str, Any]) -> str:
    best, joint = aims["best merging baseline"], aims["unrestricted"]
    rows = [
        [
            f"beats every merging baseline (best: {best['name']})",
            f"{percent(best['ours_less'])} points",
            _met(aims["beats every merging baseline"]),
        ],
        ["within 2 % of the unrestricted MoE", f"{percent(joint['ours_less'])} points", _met(joint["within 2 %"])],
    ]
    for name, factor, unit in (
        ("other domains, accuracy", 100, "points"),
        ("other domains, perplexity", 100, "%"),
        ("own domain as if never merged, nats", 1, "nats"),
        ("extraction, excluded less never had", 100, "points"),
    ):
        judged = aims[name]
        greatest, mean, bound = (f"{factor * judged[key]:.3g}" for key in ("greatest", "mean", "bound"))
        rows.append([name, f"greatest {greatest}, mean {mean} {unit} (at most {bound})", _met(judged["met"])])
    return "## Aims\n\n" + table(["Aim", "figure", "met"], rows)


def _methods(found: dict[str, Any]) -> str:
    domains = list(found["rows"][OURS]["accuracy"])
    rows = []
    for name in (OURS, TUNED, *MERGING, UNRESTRICTED, *ABLATIONS, "public only"):
        row = found["rows"][name]
        less = "" if name == OURS else percent(found["ours_less"][name])
        paper = f"{PAPER[name]:.1f}" if name in PAPER else "–"
        accuracies = [percent(row["accuracy"][domain]) for domain in domains]
        rows.append([name, *accuracies, less, scaled(row["nats"][MACRO], 1, 2), paper])
    head = ["Method", *domains, "ours less", "nats, macro", "paper"]
    return (
        "## Methods\n\nExact answers to probes in %, the loss in nats per token, and the paper's averages over its "
        "eight task groups (arXiv 2507.07024, Table 1), which are other tasks on a model 10⁵ times as large: its order "
        "is comparable, its numbers are not.\n\n" + table(head, rows)
    )


def _matrix(found: dict[str, Any]) -> str:
    parts = []
    for title, kind, show in (
        ("Opt-out matrix: exact answers, %", "accuracy", percent),
        ("Opt-out matrix: loss on held-out text, nats per token", "nats", lambda value: scaled(value, 1, 3)),
    ):
        domains = list(found["rows"][OURS][kind])
        rows = [[name, *(show(found["rows"][name][kind][domain]) for domain in domains)] for name in _gates(found)]
        parts.append(f"## {title}\n\n" + table(["Experts", *domains], rows))
    return "\n".join(parts)


def _routing(found: dict[str, Any]) -> str:
    rows = []
    for variant, domains in found["routing"].items():
        for layer in range(len(next(iter(domains.values())))):
            rows.append([f"{variant}, layer {layer}", *(percent(shares[layer]) for shares in domains.values())])
    head = ["Experts", *found["routing"]["coordinated"]]
    placed = [[method, *map(percent, shares.values())] for method, shares in found["placing"].items()]
    return (
        "## Tokens that lead to their own expert, %\n\n"
        + table(head, rows)
        + "\nMethods that choose between whole models: texts given to their own domain when the answer begins, %.\n\n"
        + table(["Method", *head[1:]], placed)
    )


def _extraction(found: dict[str, Any]) -> str:
    kinds = list(next(iter(found["extraction"].values())))
    rows = [[owner, *(percent(row[kind]) for kind in kinds)] for owner, row in found["extraction"].items()]
    attack = found["settings"]["attack"]
    return (
        f"## Extraction of trained text, %\n\nThe share of trained texts of which one of {attack['samples']} sampled "
        f"continuations (k = {attack['top_k']}, p = {attack['top_p']}, temperature {attack['temperature']:g}) is at "
        f"least {attack['threshold']:g} similar. The paper's attack finds 0.1 % in its public model and 0.7 % with all "
        "experts.\n\n" + table(["Owner", *kinds], rows)
    )


def _gates(found: dict[str, Any]) -> list[str]:
    return [OURS, *(name for name in found["rows"] if name.startswith(("without ", "only ", "public only")))]


def _met(met: bool) -> str:
    return "yes" if met else "no"
