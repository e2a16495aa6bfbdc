"""A bounded run of the fuzzer over every reader of foreign packages: no crash, no second lost, no 256 MiB taken."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from packagekit import make_package

from flexgate.experts.package.size import FULL, ExpertSize

HERE = Path(__file__).parent
INPUTS = 25_000
SIZES = {7: ExpertSize(rank=3), 8: ExpertSize(width=5)}
"""What some seeds begin with in place of a full expert."""
APART = ("/bin/sh", "-c", '"$@"; exit $?', "fuzz")
"""A process counts the memory of whoever started it as its own peak: start it from a small one."""


def fuzz(package: Path, folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    (folder / "corpus").mkdir()
    return subprocess.run(
        [
            *APART,
            sys.executable,
            str(HERE / "fuzz_package.py"),
            str(package),
            str(folder / "corpus"),
            f"-dict={HERE / 'json.dict'}",
            f"-artifact_prefix={folder}/",
            *options,
        ],
        capture_output=True,
        text=True,
        timeout=300,
        cwd=folder,
    )


@pytest.mark.slow
@pytest.mark.sliced(1)
@pytest.mark.parametrize("seed", range(1, 9))
def test_no_input_crashes_hangs_or_bloats_a_reader(stock: Path, tmp_path: Path, seed: int) -> None:
    make_package(tmp_path / "news", stock / "anchor", key=stock / "keys/acme.key", size=SIZES.get(seed, FULL))
    done = fuzz(tmp_path / "news", tmp_path, f"-seed={seed}", f"-runs={INPUTS}", "-print_final_stats=1")
    assert done.returncode == 0, done.stderr[-3000:]
    executed = re.search(r"stat::number_of_executed_units: (\d+)", done.stderr)
    assert executed is not None
    assert int(executed[1]) == INPUTS
    covered = [int(found) for found in re.findall(r"cov: (\d+)", done.stderr)]
    assert covered[-1] > 100


@pytest.mark.slow
def test_the_fuzzer_would_notice(stock: Path, tmp_path: Path) -> None:
    """With a reader that lets one error of Python through, the run fails: the fuzzer is connected to the readers."""
    line = "    began = time.process_time()\n"
    program = (HERE / "fuzz_package.py").read_text()
    assert line in program
    broken = tmp_path / "broken.py"
    broken.write_text(program.replace(line, line + "    if b'dtypf' in data:\n        raise KeyError\n"))
    (tmp_path / "corpus").mkdir()
    # Seeded, and with the word to try, so that what it takes to find it does not depend on chance or on the machine.
    (tmp_path / "words").write_text('"dtypf"\n')
    options = ("-seed=1", f"-dict={tmp_path / 'words'}", "-runs=1000000")
    done = subprocess.run(
        [sys.executable, str(broken), str(stock / "news"), str(tmp_path / "corpus"), *options],
        capture_output=True,
        text=True,
        timeout=240,
        cwd=tmp_path,
    )
    assert done.returncode != 0
    assert "KeyError" in done.stdout + done.stderr
