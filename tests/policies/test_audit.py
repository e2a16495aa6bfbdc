"""Whatever is done to an audit log after it was written is noticed."""

from __future__ import annotations

import copy
import json
import random
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flexgate.policies.audit import (
    CHANGES,
    STARTS,
    Entry,
    Event,
    Head,
    _hash_1,
    chain,
    from_line,
    to_line,
    verify,
)
from flexgate.policies.errors import AuditBroken

START = STARTS[CHANGES]
NODE = shutil.which("node")
VERIFIER = Path(__file__).parents[2] / "docs" / "examples" / "verify-audit-log.mjs"


def _nested(children: Any) -> Any:
    return st.lists(children, max_size=3) | st.dictionaries(st.text(max_size=5), children, max_size=3)


def _log(length: int) -> list[Entry]:
    entries: list[Entry] = []
    head = START
    for number in range(length):
        event = Event(
            at=1000.0 + number / 3,
            actor=f"key_{number % 3}",
            action="tenant.updated",
            detail={
                "id": "acmé\u2028",
                "before": None,
                "after": {"mode": "deny_list", "expert_ids": ["news", number], "on": True},
            },
        )
        entries.append(chain(head, event))
        head = Head(entries[-1].sequence, entries[-1].hash)
    return entries


def _edited_detail(rng, detail):
    detail = copy.deepcopy(detail)
    change = rng.choice(["value", "nested", "type", "missing", "extra"])
    if change == "value":
        detail["id"] = "other"
    elif change == "nested":
        detail["after"]["expert_ids"].append("math")
    elif change == "type":
        detail["after"]["on"] = 1
    elif change == "missing":
        del detail["before"]
    else:
        detail["more"] = None
    return detail


def _edit(rng, log):
    place = rng.randrange(len(log))
    entry = log[place]
    field = rng.choice(["at", "actor", "action", "detail", "sequence", "previous", "hash"])
    new = {
        "at": entry.at + rng.choice([-1, 1e-6, 1]),
        "actor": entry.actor + "x",
        "action": "tenant.deleted",
        "detail": _edited_detail(rng, entry.detail),
        "sequence": entry.sequence + rng.choice([-1, 1]),
        "previous": "f" * 64,
        "hash": "f" * 64,
    }[field]
    return [*log[:place], replace(entry, **{field: new}), *log[place + 1 :]]


def _forge(rng, log):
    """An edit whose own hash is made to fit again."""
    place = rng.randrange(len(log))
    entry = log[place]
    forged = chain(
        Head(entry.sequence - 1, entry.previous),
        Event(at=entry.at, actor="somebody else", action=entry.action, detail=entry.detail),
    )
    return [*log[:place], forged, *log[place + 1 :]]


def _delete(rng, log):
    place = rng.randrange(len(log))
    return log[:place] + log[place + 1 :]


def _reorder(rng, log):
    one, two = rng.sample(range(len(log)), 2)
    swapped = list(log)
    swapped[one], swapped[two] = swapped[two], swapped[one]
    return swapped


def _truncate(rng, log):
    return log[: rng.randrange(len(log))]


def _repeat(rng, log):
    place = rng.randrange(len(log))
    return [*log[: place + 1], *log[place:]]


TAMPERINGS = [_edit, _forge, _delete, _reorder, _truncate, _repeat]


def _all_detected(times):
    rng = random.Random(5)
    log = _log(30)
    head = verify(log).changes
    for number in range(times):
        tampered = TAMPERINGS[number % len(TAMPERINGS)](rng, log)
        assert repr(tampered) != repr(log)
        with pytest.raises(AuditBroken):
            verify(tampered, outside=[head])


def test_single_tamperings_are_detected():
    _all_detected(1_200)


@pytest.mark.slow
def test_twelve_thousand_single_tamperings_are_detected():
    _all_detected(12_000)


def test_log_as_written_verifies():
    log = _log(10)
    assert verify(log).changes == (10, log[-1].hash, "changes")
    assert verify([]).changes == START
    assert verify([], outside=[START]).changes == START


def test_log_that_went_on_still_contains_an_older_head():
    log = _log(10)
    for entry in log:
        assert verify(log, outside=[Head(entry.sequence, entry.hash)]).changes.sequence == 10


def test_log_written_anew_is_told_by_a_head_from_outside():
    head = verify(_log(10)).changes
    other = [chain(START, Event(at=1.0, actor="mallory", action="nothing.happened", detail={}))]
    verify(other)
    with pytest.raises(AuditBroken, match="truncated or rewritten"):
        verify(other, outside=[head])


def test_export_round_trip():
    log = _log(3)
    lines = [to_line(entry) for entry in log]
    assert all("\n" not in line for line in lines)
    assert [from_line(line) for line in lines] == log
    for bad in ("", "[]", "{}", '{"sequence": 1}'):
        with pytest.raises(AuditBroken):
            from_line(bad)


def test_a_log_that_was_begun_under_version_1_goes_on_under_version_2() -> None:
    old = json.loads((Path(__file__).parent / "audit-version-1.json").read_text())
    entries = [from_line(line) for line in old]
    head = Head(entries[-1].sequence, entries[-1].hash)
    entries.append(chain(head, Event(at=2000.123456789, actor="key_a", action="tenant.updated", detail={"id": "a"})))
    verified = verify(entries)
    assert verified.entries == len(old) + 1
    assert entries[-1].at == 2000.123457
    for place, entry in enumerate(entries):
        changed = [*entries[:place], replace(entry, actor="other"), *entries[place + 1 :]]
        with pytest.raises(AuditBroken, match="was changed after it was written"):
            verify(changed)


def test_no_entry_of_version_1_follows_one_of_version_2() -> None:
    first = chain(START, Event(at=1.0, actor="a", action="x.y", detail={}))
    second = chain(Head(first.sequence, first.hash), Event(at=2.0, actor="a", action="x.y", detail={}))
    older = replace(second, hash=_hash_1(second.sequence, second, second.previous, second.log))
    assert verify([first, second]).entries == 2
    with pytest.raises(AuditBroken, match="entry 2 was changed after it was written"):
        verify([first, older])


def test_a_time_within_a_microsecond_is_no_other_time() -> None:
    log = _log(2)
    with pytest.raises(AuditBroken, match="was changed"):
        verify([replace(log[0], at=log[0].at + 2e-7), log[1]])


@given(st.recursive(st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(), _nested))
def test_every_detail_has_a_hash_that_an_export_keeps(value: Any) -> None:
    entry = chain(START, Event(at=1.5, actor="a", action="x.y", detail={"value": value}))
    assert verify([from_line(to_line(entry))]).entries == 1


@pytest.mark.skipif(NODE is None, reason="needs Node")
def test_the_verifier_in_javascript_finds_what_is_changed(tmp_path: Path) -> None:
    old = json.loads((Path(__file__).parent / "audit-version-1.json").read_text())
    head = from_line(old[-1])
    new = [chain(Head(head.sequence, head.hash), Event(at=5.25, actor="é", action="a.b", detail={"x": 1e-7}))]
    for number in range(3):
        detail = {"n": [0.1 * number, '\u2028"', None, True, {"😀": 2**53 - 1}]}
        new.append(chain(Head(new[-1].sequence, new[-1].hash), Event(at=6.1, actor="b", action="a.b", detail=detail)))
    lines = [*old, *map(to_line, new)]
    assert _javascript(tmp_path, lines) == (
        0,
        f"OK: {len(lines)} entries follow from each other; of the first {len(old)} only the links were checked\n",
    )
    rng = random.Random(3)
    for place in range(len(old), len(lines)):
        line = lines[place].encode()
        for _ in range(6):
            at = rng.randrange(len(line))
            changed = bytearray(line)
            changed[at] ^= 1
            text = bytes(changed).decode(errors="replace")
            status, _ = _javascript(tmp_path, [*lines[:place], text, *lines[place + 1 :]])
            assert status == 1, (place, text)
    assert _javascript(tmp_path, [*lines[:-2], lines[-1]])[0] == 1


def _javascript(folder: Path, lines: list[str]) -> tuple[int, str]:
    path = folder / "export.jsonl"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    done = subprocess.run([str(NODE), VERIFIER, path], capture_output=True, text=True, check=False, timeout=60)
    return done.returncode, done.stdout


def test_the_javascript_finds_keys_that_are_there_twice_and_trims_of_nothing(tmp_path: Path) -> None:
    lines = [to_line(entry) for entry in _log(3)]
    assert _javascript(tmp_path, lines)[0] == 0
    twice = lines[1].replace('{"action":', '{"action":"other","action":', 1)
    assert _javascript(tmp_path, [lines[0], twice, lines[2]])[0] == 1
    nested = [
        to_line(chain(START, Event(at=1.0, actor='a":"', action="x.y", detail={'b\\":': [{"c": '"d":'}], "e": {}})))
    ]
    assert _javascript(tmp_path, nested)[0] == 0
    for entries in (0, -1, "1", None):
        detail = {"entries": entries, "through": 0, "hash": START.hash}
        trim = to_line(chain(START, Event(at=1.0, actor="a", action="audit.trimmed", detail=detail)))
        assert _javascript(tmp_path, [trim])[0] == 1
