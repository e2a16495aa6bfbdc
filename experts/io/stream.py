"""Large outputs: streamed into a folder that gets its name when it is whole, and resumed after an interruption.

The work goes on in ``.NAME.partial`` beside the target. Its journal says how much of each file is on the disk, and what
the plan was: the same command goes on after the last recorded tensor, another plan starts from nothing.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Final

from flexgate.experts.errors import OutputRefused
from flexgate.experts.io.hashing import Digests
from flexgate.experts.io.output import require_absent, settle, sync, write_all, write_new
from flexgate.experts.io.progress import Progress, silent
from flexgate.experts.io.tensorfile import CHUNK, DTYPES, TensorFile, file_digest, make_header

JOURNAL: Final = "journal.json"
NEW_JOURNAL: Final = "journal.new"
RECORD_EVERY: Final = 1 << 28
"""Bytes between two records, and so what an interruption can lose."""


@dataclass(frozen=True)
class Piece:
    """One tensor to write; ``chunks`` gives its bytes, and is called when its turn comes."""

    dtype: str
    shape: tuple[int, ...]
    chunks: Callable[[], Iterable[memoryview]]


@dataclass(frozen=True)
class Written:
    """A finished file; without digests where none were asked for."""

    size: int
    digest: str
    tensors: Mapping[str, str]


class Job:
    """An output folder in the making; use it in a ``with`` statement and call ``finish``.

    Raises:
        OutputRefused: the target exists, another process makes it, or the disk refused something.
    """

    def __init__(self, target: Path, plan: str) -> None:
        """``plan`` stands for everything that decides the output's bytes."""
        self.target = target
        self.folder = target.parent / f".{target.name}.partial"
        self._plan = hashlib.sha256(plan.encode()).hexdigest()
        self._done: dict[str, int] = {}
        self.resumed = False
        """Whether an earlier run wrote some of it; known once the job is entered."""
        self._waiting = 0
        self._recorder = ThreadPoolExecutor(1)
        self._recording: Future[None] | None = None

    def __enter__(self) -> Job:
        require_absent(self.target)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock = os.open(self.folder, os.O_RDONLY | os.O_DIRECTORY)
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            os.close(self._lock)
            raise OutputRefused(f"another process is writing {self.target}") from error
        except OSError as error:
            raise OutputRefused(f"{self.target} cannot be made: {error.strerror}") from error
        self._resume()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self._recorder.shutdown()
        os.close(self._lock)
        if isinstance(error, OSError):
            raise OutputRefused(f"{self.target} cannot be written: {error.strerror}; run it again to go on") from error

    def write_file(
        self, name: str, pieces: Mapping[str, Piece], *, digests: bool = False, progress: Progress = silent
    ) -> Written:
        """Write a safetensors file, or the rest of one."""
        header = make_header({key: (piece.dtype, piece.shape) for key, piece in pieces.items()})
        descriptor = os.open(self.folder / name, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            with Digests(enabled=digests) as sums:
                self._start(descriptor, name, header, pieces, sums, progress)
                self._fill(descriptor, name, pieces, sums, progress)
            size = os.lseek(descriptor, 0, os.SEEK_CUR)
        finally:
            try:
                self._wait_for_record()
            finally:
                os.close(descriptor)
        tensors = {key: sums.hex(key) for key in pieces} if digests else {}
        return Written(size, file_digest(header[8:], tensors) if digests else "", tensors)

    def write_text(self, name: str, text: bytes) -> None:
        """Write a small file, anew if an earlier run wrote it."""
        path = self.folder / name
        path.parent.mkdir(exist_ok=True)
        path.unlink(missing_ok=True)
        write_new(path, text)

    def finish(self) -> None:
        """Give the folder its name."""
        self._forget()
        settle(self.folder, self.target)

    def abandon(self) -> None:
        """Leave nothing behind: what was written must not be gone on with."""
        self._forget()
        shutil.rmtree(self.folder, ignore_errors=True)

    def _forget(self) -> None:
        for name in (JOURNAL, NEW_JOURNAL):
            (self.folder / name).unlink(missing_ok=True)

    def _resume(self) -> None:
        try:
            journal: Any = json.loads((self.folder / JOURNAL).read_text())
            if journal["plan"] == self._plan:
                self._done = {str(name): int(count) for name, count in journal["files"].items()}
                self.resumed = True
                return
        except (OSError, ValueError, KeyError, TypeError):
            pass
        for path in self.folder.iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()

    def _start(
        self, descriptor: int, name: str, header: bytes, pieces: Mapping[str, Piece], sums: Digests, progress: Progress
    ) -> None:
        """Keep what an earlier run recorded, reading it again where digests are wanted; else write the header."""
        done = list(pieces)[: self._done.get(name, 0)]
        end = len(header) + sum(nbytes(pieces[key]) for key in done)
        if not done or os.fstat(descriptor).st_size < end:
            self._done[name] = 0
            os.ftruncate(descriptor, 0)
            write_all(descriptor, header)
            return
        position = len(header)
        for key in done:
            stop = position + nbytes(pieces[key])
            for chunk in _read(descriptor, position, stop) if sums.enabled else ():
                sums.add(key, chunk)
            progress(stop - position)
            position = stop
        if os.fstat(descriptor).st_size > end:
            os.ftruncate(descriptor, end)
        os.lseek(descriptor, end, os.SEEK_SET)

    def _fill(self, descriptor: int, name: str, pieces: Mapping[str, Piece], sums: Digests, progress: Progress) -> None:
        for number, (key, piece) in enumerate(pieces.items(), start=1):
            if number <= self._done[name]:
                continue
            written = 0
            for chunk in piece.chunks():
                sums.add(key, chunk)
                write_all(descriptor, chunk)
                written += len(chunk)
                progress(len(chunk))
            if written != nbytes(piece):
                raise ValueError(f"{key}: got {written} bytes, expected {nbytes(piece)}")
            self._waiting += written
            self._done[name] = number
            if self._waiting >= RECORD_EVERY:
                self._waiting = 0
                self._wait_for_record()
                self._recording = self._recorder.submit(self._record, descriptor, dict(self._done))
        self._wait_for_record()
        os.fsync(descriptor)

    def _record(self, descriptor: int, done: dict[str, int]) -> None:
        """Write down what is ``done``, once it is on the disk, as all earlier files are; writing goes on."""
        os.fsync(descriptor)
        journal = json.dumps({"plan": self._plan, "files": done})
        (self.folder / NEW_JOURNAL).write_text(journal)
        os.replace(self.folder / NEW_JOURNAL, self.folder / JOURNAL)
        sync(self.folder)

    def _wait_for_record(self) -> None:
        if self._recording is not None:
            self._recording.result()
            self._recording = None  # only now: whoever is interrupted here waits again before the file is closed


def one_chunk(chunk: memoryview) -> Callable[[], Iterable[memoryview]]:
    """Chunks of what is in memory."""
    return lambda: (chunk,)


def fingerprint(files: Iterable[TensorFile]) -> list[list[object]]:
    """What tells whether source files changed between two runs."""
    return [[file.name, *file.stamp()] for file in files]


def nbytes(piece: Piece) -> int:
    """Bytes of a tensor to write."""
    count = DTYPES[piece.dtype].itemsize
    for size in piece.shape:
        count *= size
    return count


def _read(descriptor: int, begin: int, end: int) -> Iterator[memoryview]:
    for position in range(begin, end, CHUNK):
        yield memoryview(os.pread(descriptor, min(CHUNK, end - position), position))
