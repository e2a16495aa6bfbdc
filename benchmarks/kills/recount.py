"""Count again what servers that were killed have recorded, from what clients got and what the engine generated.

It shares no code with the server: the ledger is read with sqlite3. A client's key asks one thing after the other, so a
row of the ledger belongs to the request of its key that was under way when the row was registered.
"""

from __future__ import annotations

import sqlite3
from bisect import bisect_right
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any

PPM = 1_000_000
SCALE = 1 << 32
ROUNDED = 1 + 1e-6
"""How far the weights of a position may be over one: they are rounded one by one."""


@dataclass
class Asked:
    """One request as its client saw it; times in Unix seconds."""

    number: int
    key: str
    began: float
    prompt: int
    ended: float = 0.0
    delivered: int = 0
    status: int | None = None
    finished: bool = False
    about: dict[str, Any] | None = None
    """The `flexgate` object, once it came."""


@dataclass
class Counted:
    """What the engine counted of one request: prompts it took, and tokens that it generated, of all choices."""

    prompts: int = 0
    generated: int = 0


@dataclass
class Row:
    """One request in the ledger, with the numbers of each expert's part."""

    request: str
    key: str
    registered: float
    ended: float
    outcome: str
    prompt: int
    completion: int
    parts: dict[str, dict[str, int]] = field(default_factory=dict)


def counted(path: Path, number_of: Any) -> dict[int, Counted]:
    """What the engines counted, by the number of the client's request, which `number_of` finds in its last tokens."""
    found: dict[int, Counted] = defaultdict(Counted)
    numbers: dict[str, int] = {}
    for line in path.read_text().splitlines():
        what, name, *rest = line.split()
        if what == "takes":
            number = number_of([int(token) for token in rest[1].split(",")])
            if number is not None:
                numbers[name] = number
                found[number].prompts += 1
        elif name in numbers:
            found[numbers[name]].generated += int(rest[0])
    return found


def rows_of(path: Path) -> list[Row]:
    """The ledger's rows by sequence."""
    with closing(sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True)) as connection:
        connection.row_factory = sqlite3.Row
        rows = {
            row["sequence"]: Row(
                row["request"],
                row["key_id"],
                row["registered_at"] / 1e6,
                row["ended_at"] / 1e6,
                row["outcome"],
                row["prompt_tokens"],
                row["completion_tokens"],
            )
            for row in connection.execute("SELECT * FROM usage ORDER BY sequence")
        }
        for part in connection.execute("SELECT * FROM parts"):
            kept = {name: part[name] for name in part.keys() if name.endswith(("mass", "positions", "ppm"))}
            rows[part["sequence"]].parts[part["expert"]] = kept
        if connection.execute("SELECT count(*) FROM running").fetchone()[0]:
            raise ValueError("requests still run in a ledger that was opened after the last kill")
    return list(rows.values())


def matched(asked: list[Asked], rows: list[Row]) -> Iterator[tuple[Asked | None, list[Row]]]:
    """Each client's request with the rows that are its own, and rows that are no one's."""
    by_key: dict[str, list[Asked]] = defaultdict(list)
    for one in sorted(asked, key=lambda one: one.began):
        by_key[one.key].append(one)
    found: dict[int, list[Row]] = defaultdict(list)
    for row in rows:
        mine = by_key[row.key]
        place = bisect_right([one.began for one in mine], row.registered) - 1
        if place < 0 or row.registered > mine[place].ended:
            yield None, [row]
        else:
            found[mine[place].number].append(row)
    for one in asked:
        yield one, found[one.number]


def judge(asked: list[Asked], engine: dict[int, Counted], rows: list[Row], *, layers: int) -> Iterator[str]:
    """What is wrong, a sentence each."""
    for one, mine in matched(asked, rows):
        if one is None:
            yield f"{mine[0].request}: no client asked for it"
            continue
        name, generated = f"request {one.number}", engine.get(one.number, Counted())
        if len(mine) > 1:
            yield f"{name}: recorded {len(mine)} times"
        if not mine:
            if one.delivered or one.about is not None:
                yield f"{name}: {one.delivered} tokens were delivered and nothing is recorded"
            continue
        yield from _judge(name, one, generated, mine[0], layers)
    times = [row.ended for row in rows]
    if times != sorted(times):
        yield "ends go back in time"


def _judge(name: str, one: Asked, generated: Counted, row: Row, layers: int) -> Iterator[str]:
    if not one.delivered <= row.completion <= generated.generated:
        numbers = one.delivered, row.completion, generated.generated
        yield f"{name} ({row.outcome}): tokens delivered, recorded and generated are {numbers}"
    least = one.prompt if one.delivered else 0
    if not least <= row.prompt <= (one.prompt if generated.prompts else 0):
        yield f"{name} ({row.outcome}): {row.prompt} tokens of a prompt of {one.prompt} are recorded"
    whole = row.outcome in ("completed", "interrupted")  # where the server was killed after the last byte
    if one.finished and not (whole and row.completion == one.delivered):
        yield f"{name}: a whole response of {one.delivered} tokens is recorded as {row.outcome} with {row.completion}"
    if row.outcome == "completed" and not one.finished and one.status == 200 and generated.generated != row.completion:
        yield f"{name}: completed with {row.completion} of {generated.generated} tokens"
    for what, tokens in (("prompt", row.prompt), ("completion", row.completion)):
        most = max((part[f"{what}_positions"] for part in row.parts.values()), default=0)
        mass = sum(part[f"{what}_mass"] for part in row.parts.values())
        if most > tokens or mass > tokens * layers * SCALE * ROUNDED or (most == 0) != (mass == 0):
            yield f"{name}: its experts' {what} positions {most} and mass {mass} do not fit {tokens} tokens"
    shares = _shares(row)
    if any("share_ppm" in part and part["share_ppm"] != shares[expert] for expert, part in row.parts.items()):
        yield f"{name}: its shares are not those of its masses, {shares}"
    if one.about is not None:
        yield from _compare(name, one.about, row, shares, layers)


def _compare(name: str, about: dict[str, Any], row: Row, shares: dict[str, int], layers: int) -> Iterator[str]:
    """The response's attribution with the recorded parts."""
    if about["decision_id"] != row.request:
        yield f"{name}: the response is {about['decision_id']}, the row {row.request}"
    for expert in about["attribution"]["experts"]:
        part = row.parts.get(expert["id"], Counter())
        mass = part["prompt_mass"] + part["completion_mass"]
        recorded = (mass / (SCALE * layers), part["prompt_positions"] + part["completion_positions"])
        told = expert["gate_mass"], expert["tokens"]
        if told != recorded or expert["share_ppm"] != shares.get(expert["id"], 0):
            yield f"{name}: {expert['id']} is shown {told}, {expert['share_ppm']} ppm; recorded {recorded}, {shares}"


def _shares(row: Row) -> dict[str, int]:
    """Whole parts per million by largest remainder; which of equal remainders gets the last one is not judged here."""
    masses = {expert: part["prompt_mass"] + part["completion_mass"] for expert, part in row.parts.items()}
    total = sum(masses.values())
    if not total:
        return dict.fromkeys(masses, 0)
    exact = {expert: Fraction(mass * PPM, total) for expert, mass in masses.items()}
    shares = {expert: int(share) for expert, share in exact.items()}
    left = sorted(exact, key=lambda expert: (shares[expert] - exact[expert], expert))
    for expert in left[: PPM - sum(shares.values())]:
        shares[expert] += 1
    return shares
