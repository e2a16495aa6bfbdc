"""Worst cases of small foreign inputs, measured: each is refused within a second and 256 MiB."""

from __future__ import annotations

import json
import os
import struct
import time
import tracemalloc
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flexgate.experts.errors import ExpertsError, ManifestInvalid, TensorFileError
from flexgate.experts.io.tensorfile import MAX_HEADER, TensorFile, make_header, parse_header
from flexgate.experts.package.manifest import parse_manifest

MEBIBYTE = 1 << 20


def fill(part: bytes, first: bytes = b"", last: bytes = b"") -> bytes:
    return first + part * ((MEBIBYTE - len(first) - len(last)) // len(part)) + last


def names(count: int, value: str) -> bytes:
    return ("{" + ",".join(f'"{number}":{value}' for number in range(count)) + "}").encode()


BOMBS = {
    "objects": fill(b"{},", b'{"a":[', b"0]}"),
    "numbers": fill(b"1,", b'{"a":[', b"1]}"),
    "names": names(90_000, "1"),
    "one name twice at the end": names(90_000, "1")[:-1] + b',"89999":1}',
    "deep": fill(b"["),
    "deep objects": fill(b'{"a":'),
    "digits": fill(b"9", b'{"a":', b"}"),
    "escapes": fill(b"\\ud800", b'{"a":"', b'"}'),
    "tensors": names(15_000, '{"dtype":"F32","shape":[1],"data_offsets":[0,4]}'),
    "overlapping": names(15_000, '{"dtype":"F32","shape":[1],"data_offsets":[0,4]}'),
    "huge shapes": names(
        10_000, '{"dtype":"F32","shape":[9223372036854775807,9223372036854775807],"data_offsets":[0,4]}'
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", BOMBS)
@pytest.mark.parametrize("reader", ["header", "manifest"])
def test_a_bomb_is_refused_within_a_second_and_256_mib(name: str, reader: str) -> None:
    bomb = BOMBS[name][:MAX_HEADER]
    read: Callable[[], object] = (
        (lambda: parse_header(bomb, len(bomb) + 8, "x")) if reader == "header" else (lambda: parse_manifest(bomb))
    )
    spent = []
    for _ in range(3):  # what others do on the machine slows some of them, a hang all
        began = time.process_time()
        with pytest.raises((TensorFileError, ManifestInvalid)):
            read()
        spent.append(time.process_time() - began)
    assert min(spent) < 1
    tracemalloc.start()
    try:
        with pytest.raises((TensorFileError, ManifestInvalid)):
            read()
        assert tracemalloc.get_traced_memory()[1] < 256 * MEBIBYTE
    finally:
        tracemalloc.stop()


def from_bytes(data: bytes) -> TensorFile:
    descriptor = os.memfd_create("header")
    os.write(descriptor, data)
    return TensorFile(descriptor, "x")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "ends at byte 0"),
        (b"\0" * 7, "ends at byte 7"),
        (struct.pack("<Q", 2**63), "announces a header of 9223372036854775808 bytes, at most 1048576 are read"),
        (struct.pack("<Q", MAX_HEADER + 1) + b" " * (MAX_HEADER + 1), "at most 1048576"),
        (struct.pack("<Q", 100) + b"{}", "has 10 bytes and announces a header of 100"),
        (struct.pack("<Q", 2) + b"{}" + b"\0", "has 11 bytes, its header explains 10"),
    ],
)
def test_a_length_that_lies_is_refused(data: bytes, message: str) -> None:
    with pytest.raises(TensorFileError, match=message):
        from_bytes(data)


def entry(**changes: object) -> dict[str, object]:
    return {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]} | changes


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"a": entry(dtype="F16")}, "dtype 'F16', expected one of F32, BF16"),
        ({"a": entry(dtype=["F32"])}, "has dtype"),
        ({"a": entry(shape=[])}, "expected 1 to 8 positive sizes"),
        ({"a": entry(shape=[1] * 9)}, "expected 1 to 8 positive sizes"),
        ({"a": entry(shape=[0])}, "expected 1 to 8 positive sizes"),
        ({"a": entry(shape=[-2])}, "expected 1 to 8 positive sizes"),
        ({"a": entry(shape=[2.0])}, "expected 1 to 8 positive sizes"),
        ({"a": entry(shape=[True, 2])}, "expected 1 to 8 positive sizes"),
        ({"a": entry(data_offsets=[0])}, "expected two positions"),
        ({"a": entry(data_offsets=[8, 0])}, "spans -8 bytes"),
        ({"a": entry(data_offsets=[0, 12])}, "spans 12 bytes, which F32"),
        ({"a": entry(data_offsets=[4, 12])}, "begins at byte"),
        ({"a": entry(), "b": entry()}, "'b' begins at byte"),
        ({"a": entry(), "b": entry(data_offsets=[12, 20])}, "'b' begins at byte"),
        ({"a": entry(extra=1)}, "exactly dtype, shape and data_offsets"),
        ({"a": []}, "exactly dtype, shape and data_offsets"),
        ({"a": entry(), "__metadata__": {"x": 1}}, "__metadata__ must map names to texts"),
        ({"a": entry(), "__metadata__": []}, "__metadata__ must map names to texts"),
    ],
)
def test_a_header_that_explains_nothing_is_refused(tensors: dict[str, object], message: str) -> None:
    header = json.dumps(tensors).encode()
    with pytest.raises(TensorFileError, match=message):
        from_bytes(struct.pack("<Q", len(header)) + header + b"\0" * 8)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)
OBJECTS = st.dictionaries(st.text(max_size=10), JSON, max_size=5)
ENTRIES = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "BF16", "I8"]) | JSON,
        "shape": st.lists(st.integers(-1, 9), max_size=3) | JSON,
        "data_offsets": st.lists(st.integers(-4, 400), min_size=2, max_size=2) | JSON,
    }
)


@settings(max_examples=100)
@given(st.dictionaries(st.text(max_size=10), ENTRIES | JSON, max_size=4), st.integers(0, 500))
def test_any_json_is_either_contiguous_tensors_or_an_error_of_ours(tensors: dict[str, object], size: int) -> None:
    header = json.dumps(tensors).encode()
    try:
        found = parse_header(header, size, "x")
    except TensorFileError:
        return
    position = 8 + len(header)
    for info in found.values():
        assert info.begin == position < info.end
        position = info.end
    assert position == size


@settings(max_examples=100)
@given(st.binary(max_size=400))
def test_any_bytes_are_a_tensor_file_or_an_error_of_ours(data: bytes) -> None:
    try:
        from_bytes(data).close()
    except TensorFileError:
        return


@settings(max_examples=60)
@given(
    st.dictionaries(st.text(max_size=10), JSON, max_size=5).map(json.dumps).map(str.encode) | st.binary(max_size=200)
)
def test_anything_is_a_manifest_or_an_error_of_ours(data: bytes) -> None:
    try:
        parse_manifest(data)
    except ExpertsError:
        return


@settings(max_examples=40)
@given(
    st.dictionaries(
        st.text(min_size=1, max_size=12).filter(lambda name: name != "__metadata__" and name.isprintable()),
        st.tuples(st.sampled_from(["F32", "BF16"]), st.lists(st.integers(1, 5), min_size=1, max_size=3).map(tuple)),
        max_size=5,
    )
)
def test_what_is_written_is_read(tensors: dict[str, tuple[str, tuple[int, ...]]]) -> None:
    whole = make_header(tensors)
    last = json.loads(whole[8:])
    size = max((item["data_offsets"][1] for name, item in last.items() if name != "__metadata__"), default=0)
    found = parse_header(whole[8:], len(whole) + size, "x")
    assert {name: (info.dtype, info.shape) for name, info in found.items()} == tensors
