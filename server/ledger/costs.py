"""Sums over the ledger by the agreement that uses count under: what is owed for them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from flexgate.server.ledger.amounts import Uses
from flexgate.server.ledger.reading import Source
from flexgate.server.ledger.terms import Terms
from flexgate.server.ledger.usage import COLUMNS, Group, Sought, conditions, read

MOST_SECONDS: Final = 60.0
MOST_ROWS: Final = 200_000
"""More than of other sums: there is one for each version of an agreement, and owners make the versions."""
UNDER: Final = ("agreement", "agreement_version", "duties_sha256")
"""What a use counts under."""
_USES: Final = (
    "count(*), sum(prompt_positions + completion_positions), sum(share_ppm * (prompt_tokens + completion_tokens))"
)


@dataclass(frozen=True, slots=True)
class AgreementUses:
    """What one group used in one bucket of time under one version of an agreement."""

    start: int
    group: Mapping[Group, str | None]
    terms: Terms
    uses: Uses


def uses(where: str, by: Sequence[str], *more: str) -> str:
    """The query of the uses of experts in requests: `by` and `more` are columns, the former those of a group."""
    grouped = ", ".join(by)
    shown = ", ".join([grouped, _USES, *more])
    return f"SELECT {shown} FROM usage JOIN parts USING (sequence) WHERE {where} GROUP BY {grouped} ORDER BY {grouped}"


def uses_by_agreement(source: Source, sought: Sought) -> list[AgreementUses]:
    """The sums of every bucket that has any, by time, group and agreement. Blocks.

    Raises:
        LedgerError: usage cannot be read.
        TooMuchAsked: there are too many sums, or they take too long.
    """
    where, values = conditions(sought)
    columns = [sought.bucket, *(COLUMNS[group] for group in sought.groups), *UNDER]
    query = uses(f"{where} AND agreement IS NOT NULL", columns)
    rows = read(source, query, values, seconds=MOST_SECONDS, most=MOST_ROWS)
    return list(_named(rows, sought))


def _named(rows: list[tuple[int, ...]], sought: Sought) -> Iterator[AgreementUses]:
    for start, *names, agreement, version, duties, requests, tokens, weighted in rows:
        group = dict(zip(sought.groups, map(_text, names), strict=True))
        terms = Terms((str(agreement), version), _text(duties))
        yield AgreementUses(start, group, terms, Uses(requests, tokens, weighted))


def _text(name: object) -> str | None:
    return None if name is None else str(name)
