"""Coverage-guided fuzzing of all that reads a foreign package. Run by ``test_fuzz.py``; libFuzzer's options apply.

The first byte of an input says which reader gets the rest. Only errors of the package may come out; more than a second
of processor time for one input, or more than 256 MiB above the start, ends the run with a failure.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["flexgate.experts"]):
    from flexgate.experts.errors import ExpertsError
    from flexgate.experts.io.tensorfile import TensorFile
    from flexgate.experts.package.files import WEIGHTS_NAME
    from flexgate.experts.package.manifest import parse_manifest
    from flexgate.experts.package.verify import open_package
    from flexgate.experts.package.weights import WeightsTicket, check_weights

SEED = Path(sys.argv[1])
"""A good package: what inputs are mutations of."""
MEMORY = 256
MANIFEST = parse_manifest((SEED / "manifest.json").read_bytes())
TICKET = WeightsTicket(
    Path(), MANIFEST.weights.digest, MANIFEST.base.identity().architecture, MANIFEST.base.dtype, MANIFEST.size
)


def in_memory(data: bytes) -> int:
    """A file that exists nowhere."""
    descriptor = os.memfd_create("package")
    os.write(descriptor, data)
    os.lseek(descriptor, 0, os.SEEK_SET)
    return descriptor


def header(data: bytes) -> None:
    """The pre-parser of safetensors headers."""
    TensorFile(in_memory(data), "fuzz").close()


def weights(data: bytes) -> None:
    """The whole check of weights against an architecture."""
    check_weights(in_memory(data), TICKET).close()


def manifest(data: bytes) -> None:
    """The manifest, with the base model it names."""
    parse_manifest(data).base.identity()


def package(data: bytes) -> None:
    """A folder whose weights or manifest are the input."""
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        place = Path(folder) / "package"
        place.mkdir()
        for path in SEED.iterdir():
            (place / path.name).write_bytes(path.read_bytes())
        (place / (WEIGHTS_NAME if data[:1] > b"\x7f" else "manifest.json")).write_bytes(data[1:])
        open_package(place, base=None, trusted_keys=None, into=Path(folder) / "copy").close()


READERS = (header, weights, manifest, package)


def one_input(data: bytes) -> None:
    """Give one input to its reader."""
    if not data:
        return
    began = time.process_time()
    with suppress(ExpertsError):
        READERS[data[0] % len(READERS)](data[1:])
    if time.process_time() - began > 1:
        raise TimeoutError("an input took more than a second")


def resident_mebibytes() -> int:
    """Memory that is this process's own now."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") >> 20


def seed_corpus(folder: Path) -> None:
    """Each reader's good input."""
    inputs = [
        b"\x00" + (SEED / WEIGHTS_NAME).read_bytes(),
        b"\x01" + (SEED / WEIGHTS_NAME).read_bytes(),
        b"\x02" + (SEED / "manifest.json").read_bytes(),
        b"\x03\x80" + (SEED / WEIGHTS_NAME).read_bytes(),
        b"\x03\x00" + (SEED / "manifest.json").read_bytes(),
    ]
    for number, data in enumerate(inputs):
        (folder / str(number)).write_bytes(data)


if __name__ == "__main__":
    corpus = Path(sys.argv[2])
    seed_corpus(corpus)
    for seed in sorted(corpus.iterdir()):
        one_input(seed.read_bytes())
    limits = [f"-rss_limit_mb={resident_mebibytes() + MEMORY}", "-timeout=20", "-max_len=40000"]
    atheris.Setup([sys.argv[0], str(corpus), *limits, *sys.argv[3:]], one_input)
    atheris.Fuzz()
