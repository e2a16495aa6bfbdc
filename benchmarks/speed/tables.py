"""The committed result files as the README's tables."""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from speed.record import RESULTS
from speed.statistics import ALLOWED

SERVING = 0.95
ITSELF = "ungated again/ungated"
ADDING = 15


def speed(results: Path = RESULTS) -> str:
    """Every ratio beside its bound, then start-up, memory and admission; bold is what misses its bound."""
    return "\n".join((*_engine(results), "", *_serving(results), "", *_single(results), ""))


def _engine(results: Path) -> Iterable[str]:
    yield "| Tokens per second, ratio | Prefill of 1, 8, 32 | Decode of 1, 8, 32 | Bound |"
    yield "|---|---|---|---|"
    for other, what, bound in (
        ("ungated", "gate compiled out", 0.97),
        ("transformers", "vLLM's Transformers backend", 1.0),
    ):
        for mode in ("eager", "compiled"):
            cases = _read(results, f"engine-{mode}")["cases"]
            cells = (
                _cells((case["ratio"][f"gated/{other}"]["median"] for case in cases if case["phase"] == phase), bound)
                for phase in ("prefill", "decode")
            )
            yield f"| gated / {what}, {mode} | {' | '.join(cells)} | ≥ {bound} |"
    for mode in ("eager", "compiled"):
        yield from _itself(mode, _read(results, f"engine-{mode}")["cases"])


def _itself(mode: str, cases: Sequence[dict[str, Any]]) -> Iterable[str]:
    """The noise: what two sets of starts of the same engine differ by."""
    cells = [
        ", ".join(f"{case['ratio'][ITSELF]['median']:.3f}" for case in cases if case["phase"] == phase)
        for phase in ("prefill", "decode")
        if all(ITSELF in case["ratio"] for case in cases)
    ]
    if cells:
        yield f"| gate compiled out / itself (A/A), {mode} | {' | '.join(cells)} | within {ALLOWED:.0%} of 1 |"


def _serving(results: Path) -> Iterable[str]:
    cases = _read(results, "serving")["cases"]
    yield "| `flexgate serve` / vLLM's server, 1, 8, 32 clients | Requests per second | p50 | p99 | Bound |"
    yield "|---|---|---|---|---|"
    for endpoint, stream in sorted({(case["endpoint"], case["stream"]) for case in cases}):
        mine = [case["ratio"] for case in cases if (case["endpoint"], case["stream"]) == (endpoint, stream)]
        cells = (
            _cells((ratio["requests_per_second"]["median"] for ratio in mine), SERVING),
            *(_cells((_value(ratio[name]) for ratio in mine), SERVING) for name in ("p50", "p99")),
        )
        yield f"| {endpoint}{', streamed' * stream} | {' | '.join(cells)} | ≥ {SERVING} |"


def _single(results: Path) -> Iterable[str]:
    startup, pieces = _read(results, "startup"), _read(results, "admission")["pieces"]
    plain, logprobs = (startup["demo"][name] for name in ("first_request", "first_request_with_logprobs"))
    slots = startup["slots"]
    yield "| | Measured | Bound |"
    yield "|---|---|---|"
    worst = max(plain["ready_seconds"]["worst"], logprobs["ready_seconds"]["worst"])
    shown = _most(f"{worst:.0f} s", worst, 60)
    yield f"| `make serve`, once installed, until ready: worst of all starts | {shown} | ≤ 60 s |"
    first = max(plain["first_token_seconds"]["worst"], logprobs["first_token_seconds"]["worst"])
    shown = _most(f"{first:.2f} s", first, 2)
    yield f"| first token of the first request, with log-probabilities or without: worst | {shown} | ≤ 2 s |"
    yield f"| resident memory of the demo's processes | {plain['resident_bytes'] / 1e9:.1f} GB | |"
    measured, planned = slots["resident_bytes_per_slot"] / 1e6, slots["planned_bytes_per_slot"] / 1e6
    yield f"| one expert slot of the benchmarks' checkpoint: measured, announced | {measured:.1f}, {planned:.1f} MB | |"
    yield from _changes(_read(results, "changes"))
    p99 = pieces["all"]["p99_us"]
    yield f"| key, body, decision, limits and seal of a request: p99 | {_most(f'{p99:.0f} µs', p99, 300)} | ≤ 300 µs |"
    for name, rows in (("loop", _loop), ("fairness", _fairness), ("emergency", _emergency), ("ledger", _ledger)):
        if (results / f"{name}.json").exists():
            yield from rows(_read(results, name))


def _loop(report: dict[str, Any]) -> Iterable[str]:
    bodies, bound = report["bodies"], report["bound_ms"]
    longest = max((one["thread_ms"] for one in report["longest_callbacks"]), default=0.0)
    what = f"a callback of any of {bodies:,} hostile bodies on the event loop: longest, thread time"
    yield f"| {what} | {_most(f'{longest:.0f} ms', longest, bound)} | ≤ {bound:.0f} ms |"
    steps = [one["thread_ms"] - one["unconstrained_ms"] for one in report["longest_steps"] if "thread_ms" in one]
    longest = max(steps, default=0.0)
    what = "an engine step of any of them beyond the same tokens unconstrained: longest, thread time"
    yield f"| {what} | {_most(f'{longest:.0f} ms', longest, bound)} | ≤ {bound:.0f} ms |"


def _fairness(report: dict[str, Any]) -> Iterable[str]:
    ratio, bound = report["first_token_ratio"], report["bound"]
    low, high = ratio["ci95"]
    shown = _most(f"{ratio['median']:.2f} × [{low:.2f}, {high:.2f}]", high, bound)
    what = f"first token of a request beside {report['streams']} streams of another project, against an idle server's"
    yield f"| {what} | {shown} | ≤ {bound:.0f} × |"
    itself = report["idle_against_itself"]
    low, high = itself["ci95"]
    yield f"| an idle server's against itself (A/A) | {itself['median']:.2f} × [{low:.2f}, {high:.2f}] | |"


def _ledger(report: dict[str, Any]) -> Iterable[str]:
    rate, cpu, bound = report["requests_per_second"], report["cpu_us_per_request"], report["bound"]
    least, most = bound["requests_per_second"], bound["cpu_us_per_request"]
    shown = f"{rate:,}" if rate >= least else f"**{rate:,}**"
    yield f"| requests recorded per second, each on disk before its response | {shown} | ≥ {least:,} |"
    yield f"| processor time of recording a request | {_most(f'{cpu:.0f} µs', cpu, most)} | ≤ {most} µs |"
    if "cpu_us_per_receipt" in report:
        receipt, both = report["cpu_us_per_receipt"], report["cpu_us_per_request_with_receipt"]
        shown = f"{receipt:.0f} µs, {_most(f'{both:.0f} µs', both, most)}"
        yield f"| processor time of its receipt, and of both | {shown} | ≤ {most} µs |"
        yield f"| receipts made per second, from a queue | {report['receipts_per_second']:,} | |"
    streams = report["streams"]
    what = "a token of one of 64 streams: processor time, and wait for its mark at the median"
    yield f"| {what} | {streams['cpu_us_per_token']:.0f} µs, {streams['wait_ms']['p50']:.1f} ms | |"


def _emergency(report: dict[str, Any]) -> Iterable[str]:
    changes, bound = report["changes"].values(), report["bound_seconds"]
    worst, count = max(one["seconds"]["worst"] for one in changes), sum(one["count"] for one in changes)
    what = f"taking a right away under {report['streams']} streams, {count:,} times: worst"
    yield f"| {what} | {_most(f'{worst:.2f} s', worst, bound)} | ≤ {bound:.0f} s |"


def _changes(report: dict[str, Any]) -> Iterable[str]:
    gaps, cycles = report["gaps"], report["cycles"]
    worst, bound = (1000 * seconds for seconds in (gaps["with_an_add_seconds"]["worst"], gaps["bound_seconds"]))
    size = gaps["package_bytes"] / 1e6
    what = f"gap between two tokens of an answer while an expert of {size:.0f} MB is added: worst"
    yield f"| {what} | {_most(f'{worst:.0f} ms', worst, bound)} | ≤ {bound:.0f} ms |"
    added, read = gaps["add_seconds"]["median"], gaps["read_file_seconds"]["median"]
    shown = _most(f"{added:.2f} s, {read:.2f} s", added, ADDING * read)
    yield f"| adding it, against reading its file from the cache: medians | {shown} | ≤ {ADDING} × |"
    told, count = cycles["revoke_seconds"]["p99"], cycles["cycles"]
    what = f"revoking an expert under load until it is acknowledged, {count:,} times: p99"
    yield f"| {what} | {_most(f'{told:.2f} s', told, 1)} | ≤ 1 s |"
    first, last = (cycles["cycle_seconds"][part]["median"] for part in ("first_tenth", "last_tenth"))
    what = "an addition and a revocation, the first tenth of these times and the last: medians"
    yield f"| {what} | {first:.2f}, {last:.2f} s | |"
    first, last = (f"{cycles['resident_bytes'][index] / 1e9:.2f}" for index in (1, -1))
    what = "resident memory after the first tenth of these adds and revocations, after all"
    yield f"| {what} | {first}, {last} GB | no growth |"


def _cells(ratios: Iterable[float], bound: float) -> str:
    return ", ".join(f"{ratio:.2f}" if ratio >= bound else f"**{ratio:.3f}**" for ratio in ratios)


def _value(ratio: dict[str, Any]) -> float:
    value: float = ratio.get("median", ratio.get("ratio"))
    return value


def _most(shown: str, measured: float, bound: float) -> str:
    return shown if measured <= bound else f"**{shown}**"


def _read(results: Path, name: str) -> dict[str, Any]:
    report: dict[str, Any] = json.loads((results / f"{name}.json").read_text())
    return report
