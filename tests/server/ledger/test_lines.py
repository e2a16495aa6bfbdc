"""Lines are appended whole or not at all, whatever is at the end of the file."""

from __future__ import annotations

import errno
import io
import json
from pathlib import Path

import pytest

from flexgate.server.ledger import lines
from flexgate.server.ledger.lines import append_lines

OLD, NEW = b'{"number":1}', b'{"number":2}'
TORN = b'{"number":15'


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "lines.jsonl"


def test_lines_follow_one_another_in_a_new_file(file: Path) -> None:
    append_lines(file, [OLD])
    append_lines(file, [NEW, NEW])
    assert file.read_bytes() == OLD + b"\n" + NEW + b"\n" + NEW + b"\n"


@pytest.mark.parametrize("before", [b"", OLD + b"\n"])
@pytest.mark.parametrize("torn", [TORN, b'{"te\xc3', b"{", b'"'])
def test_what_was_broken_off_is_cut_off(file: Path, before: bytes, torn: bytes) -> None:
    file.write_bytes(before + torn)
    append_lines(file, [NEW])
    assert file.read_bytes() == before + NEW + b"\n"


def test_a_whole_line_without_its_break_is_kept(file: Path) -> None:
    file.write_bytes(OLD)
    append_lines(file, [NEW])
    assert file.read_bytes() == OLD + b"\n" + NEW + b"\n"


def test_where_nothing_can_be_cut_off_a_new_line_begins(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a file that the operator may only append to."""

    class AppendOnly(io.FileIO):
        def truncate(self, _size: int | None = None) -> int:
            raise PermissionError(errno.EPERM, "operation not permitted")

    file.write_bytes(TORN)
    with monkeypatch.context() as kept:
        kept.setattr(Path, "open", lambda path, *_, **__: AppendOnly(path, "a+"))
        append_lines(file, [NEW])
    assert file.read_bytes() == TORN + b"\n" + NEW + b"\n"


def test_lines_that_do_not_reach_the_disk_are_not_left_in_part(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    append_lines(file, [OLD])

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "no space left on device")

    with monkeypatch.context() as disk:
        disk.setattr("os.fsync", full)
        with pytest.raises(OSError, match="no space left"):
            append_lines(file, [NEW])
    assert file.read_bytes() == OLD + b"\n"


def test_a_file_that_has_no_lines_is_left_as_it_is(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lines, "LONGEST_LINE", 100)
    image = bytes(range(128, 256)) * 2
    file.write_bytes(image)
    with pytest.raises(OSError, match="is not a file of lines"):
        append_lines(file, [NEW])
    assert file.read_bytes() == image
    file.write_bytes(json.dumps({"long": "x" * 50}).encode() + b"\n")
    append_lines(file, [NEW])
    assert file.read_bytes().endswith(NEW + b"\n")
