"""Statements as files: CSV for accounting, and a page for people."""

from __future__ import annotations

import csv
import io
from datetime import UTC, datetime
from functools import cache
from typing import Final

from jinja2 import Environment, PackageLoader, StrictUndefined, Template
from starlette.responses import Response

from flexgate.server.admin.statements.schemas import Statement, StatementLine

_WHOLE: Final = ("owner_id", "period", "id", "open")
_LINE: Final = tuple(StatementLine.model_fields)
_CORRECTION: Final = ("correction_id", "receipt_id", "reason")
_PAGE_POLICY: Final = "default-src 'none'; style-src 'unsafe-inline'"


class Document(Response):
    """A statement in another format than JSON."""


def csv_of(statement: Statement) -> Document:
    """The lines, and then the corrections, one a row, each with the owner, the period and whether it is open."""
    written = io.StringIO()
    rows = csv.writer(written, lineterminator="\n")
    names = [*_LINE, *_CORRECTION]
    rows.writerow([*_WHOLE, *names])
    whole = [getattr(statement, name) for name in _WHOLE]
    for one in (*statement.lines, *statement.corrections):
        rows.writerow([*whole, *(getattr(one, name, None) for name in names)])
    return Document(written.getvalue(), media_type="text/csv", headers=_named(statement, "csv"))


def page_of(statement: Statement) -> Document:
    """All of it, with the days drawn."""
    most = max((int(day.tokens) for day in statement.days), default=0) or 1
    page = _template().render(statement=statement, most=most)
    return Document(page, media_type="text/html", headers={"content-security-policy": _PAGE_POLICY})


def _named(statement: Statement, ending: str) -> dict[str, str]:
    name = f"statement-{statement.owner_id}-{statement.id}.{ending}"
    return {"content-disposition": f'attachment; filename="{name}"'}


@cache
def _template() -> Template:
    loader = PackageLoader("flexgate.server.admin.statements", "")
    environment = Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    environment.filters["utc"] = _utc
    return environment.get_template("page.html")


def _utc(seconds: float | None, form: str = "%Y-%m-%d %H:%M:%S") -> str:
    return "–" if seconds is None else datetime.fromtimestamp(seconds, UTC).strftime(form)
