"""An owner's documents from a folder of text and JSON lines.

``*.txt`` and ``*.md`` are one document each. A line of ``*.jsonl`` is ``{"text": …}`` or ``{"prompt": …, "answer":
…}``; other fields are left alone. Files are read in the order of their paths, so that the same folder is the same
training. Nothing outside the folder is read and nothing hidden: links are not followed. What is left out is named in a
warning.
"""

from __future__ import annotations

import json
import logging
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Final

from flexgate.experts.errors import TextsInvalid

SUFFIXES: Final = (".txt", ".md", ".jsonl")
MAX_DEPTH: Final = 64
"""Folders within folders; each is an open file while what it holds is read."""
_NAMED: Final = 3
_OPEN: Final = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Document:
    """What is asked and what is answered; plain text has no prompt."""

    prompt: str
    answer: str


def read_documents(folder: Path) -> list[Document]:
    """Every document below ``folder``; warns of what is not read.

    Raises:
        TextsInvalid: no folder, no documents, undecodable text or a line that is no document, with its place.
    """
    reading = _Reading(folder)
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        raise TextsInvalid(f"{folder} is not a folder of texts: {error.strerror}") from error
    documents = [document for document in reading.below(descriptor, PurePath()) if document.answer.strip()]
    skipped = reading.skipped()
    if not documents:
        suffixes = ", ".join("*" + suffix for suffix in SUFFIXES)
        raise TextsInvalid(f"{folder} holds no text in {suffixes}" + (f"; not read: {skipped}" if skipped else ""))
    if skipped:
        logger.warning("not read in %s: %s", folder, skipped)
    return documents


def read_file(path: Path) -> list[Document]:
    """Every document of one file.

    Raises:
        TextsInvalid: it cannot be read, is of another kind, holds no text, or a line is no document, with its place.
    """
    if path.suffix not in SUFFIXES:
        raise TextsInvalid(f"{path} must be a file of texts: {', '.join('*' + suffix for suffix in SUFFIXES)}")
    try:
        content = path.read_bytes()
    except OSError as error:
        raise TextsInvalid(f"{path} cannot be read: {error.strerror}") from error
    documents = [document for document in _parse(content, path) if document.answer.strip()]
    if not documents:
        raise TextsInvalid(f"{path} holds no text")
    return documents


class _Reading:
    """One pass through a folder, every entry opened from its parent and none through a link."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._skipped: dict[str, list[str]] = {}

    def skipped(self) -> str:
        """How much was not read and why, with a few names of each kind; empty if everything was."""
        return "; ".join(
            f"{len(names)} {why} ({', '.join(names[:_NAMED])}{', …' if len(names) > _NAMED else ''})"
            for why, names in sorted(self._skipped.items())
        )

    def below(self, descriptor: int, inside: PurePath) -> Iterator[Document]:
        """The documents of an open folder, which is closed at the end."""
        if len(inside.parts) > MAX_DEPTH:
            os.close(descriptor)
            raise TextsInvalid(f"{self._folder} has folders in more than {MAX_DEPTH} others: move the texts up")
        try:
            for name in sorted(os.listdir(descriptor)):
                yield from self._entry(descriptor, name, inside / name)
        finally:
            os.close(descriptor)

    def _entry(self, parent: int, name: str, inside: PurePath) -> Iterator[Document]:
        place = self._folder / inside
        try:
            mode = os.stat(name, dir_fd=parent, follow_symlinks=False).st_mode
            if why := _reason_to_skip(name, mode):
                self._skipped.setdefault(why, []).append(ascii(str(inside))[1:-1])
            elif stat.S_ISDIR(mode):
                yield from self.below(os.open(name, _OPEN | os.O_DIRECTORY, dir_fd=parent), inside)
            else:
                with open(os.open(name, _OPEN, dir_fd=parent), "rb") as file:
                    yield from _parse(file.read(), place)
        except OSError as error:
            raise TextsInvalid(f"{place} cannot be read: {error.strerror}") from error


def _reason_to_skip(name: str, mode: int) -> str | None:
    if name.startswith("."):
        return "hidden"
    if stat.S_ISLNK(mode):
        return "linked, which is not followed"
    if stat.S_ISDIR(mode) or (stat.S_ISREG(mode) and PurePath(name).suffix in SUFFIXES):
        return None
    return "of other kinds"


def _parse(content: bytes, path: Path) -> Iterator[Document]:
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise TextsInvalid(
            f"{path} is not UTF-8 text: byte {error.start} is {error.object[error.start]:#04x}"
        ) from error
    if path.suffix != ".jsonl":
        yield Document("", text)
        return
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            yield _document(line, f"{path}, line {number}")


def _document(line: str, where: str) -> Document:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise TextsInvalid(f"{where} is not JSON: {error}") from error
    fields = value if isinstance(value, dict) else {}
    match fields:
        case {"text": str(text)}:
            return Document("", text)
        case {"prompt": str(prompt), "answer": str(answer)}:
            return Document(prompt, answer)
    raise TextsInvalid(f'{where} must be {{"text": "…"}} or {{"prompt": "…", "answer": "…"}}')
