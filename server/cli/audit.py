"""`flexgate audit`: verify, export and trim the audit log."""

from __future__ import annotations

import inspect
import json
import sys
from pathlib import Path
from typing import Annotated, Any, Final

import typer

from flexgate.experts.errors import UsageInvalid
from flexgate.policies.audit import LOGS, REQUESTS, Head, from_line, to_line
from flexgate.policies.audit import verify as verify_entries
from flexgate.policies.errors import AuditBroken
from flexgate.policies.strict_json import no_key_twice
from flexgate.server.cli.heads import lines_of
from flexgate.server.cli.store import failing
from flexgate.server.cli.target import READER, Target, administers, typed_options, with_target_options
from flexgate.server.cli.target import target as target_of
from flexgate.server.ledger.receipts.heads import LOG as RECEIPTS

_HELP: Final = (
    "Verify, export and trim the audit log.\n\n"
    "Keep heads on another machine (`flexgate audit head >> heads.jsonl`, from time to time): with them, "
    "`verify` also detects a log that was truncated or replaced as a whole.\n\n"
    "Exit status: 0 success; 1 the log is broken or cannot be read, the reason is printed; 2 invalid usage."
)
app = typer.Typer(no_args_is_help=True, add_completion=False, help=_HELP)


@administers(app, roles=READER)
def head(target: Target) -> None:
    """Print number and hash of the newest entry of each part of the audit log, to keep on another machine.

    The parts are the changes and the denied requests; each has a hash chain of its own, and gives a line of JSON.
    """
    for found in target.audit_heads():
        if found.sequence or found.log != REQUESTS:
            typer.echo(json.dumps(found._asdict()))


def verify(
    context: typer.Context,
    options: dict[str, Any],
    heads: Annotated[Path | None, typer.Option(help="File with earlier output of 'head'.")] = None,
    file: Annotated[Path | None, typer.Option(help="Verify an exported log instead of the database.")] = None,
) -> None:
    """Check the hash chain of the log, and whether it contains the heads of --heads."""
    with failing():
        noted = [] if heads is None else _heads(heads)
        if file is not None:
            _refuse_targets(context)
            with file.open(encoding="utf-8") as lines:
                found = verify_entries(map(from_line, lines), outside=noted)
        else:
            with target_of(context, options) as target:
                found = verify_entries(target.audit_log(0), outside=noted)
    if heads is None:
        sentences = [f"OK: the hash chain of {found.entries} entries is intact"]
        sentences.append("without --heads, a replaced or truncated log is not detected")
    else:
        sentences = [f"OK: the hash chain of {found.entries} entries is intact"]
        sentences.append(f"it contains {len(noted) - found.trimmed_heads} of {len(noted)} given heads")
    if found.trimmed:
        sentences.append(f"{found.trimmed} entries of denied requests were trimmed, as recorded in the log")
    if found.trimmed_heads:
        sentences.append(f"{found.trimmed_heads} of the given heads are trimmed entries and cannot be checked")
    typer.echo("; ".join(sentences))


_OWN: Final = list(inspect.signature(verify, eval_str=True).parameters.values())[2:]
with_target_options(app, verify, _OWN, "verify", READER)


@administers(app, roles=READER)
def export(
    target: Target,
    after: Annotated[int, typer.Option(min=0, help="Print only entries after this sequence number.")] = 0,
) -> None:
    """Print the log as JSON Lines, oldest entry first."""
    for entry in target.audit_log(after):
        sys.stdout.write(to_line(entry) + "\n")


@administers(app)
def trim(
    target: Target,
    older_than_days: Annotated[int, typer.Option(min=1, help="Delete entries that are older than this.")],
) -> None:
    """Delete old entries of denied requests and print their number.

    The deletion is itself recorded. Entries of changes are never deleted.
    """
    typer.echo(target.trim_audit(older_than_days))


def _refuse_targets(context: typer.Context) -> None:
    """Refuse a typed database or server beside --file; one that only the environment names is not used."""
    for option in sorted(typed_options(context)):
        raise UsageInvalid(f"give either --file or --{option.replace('_', '-')}, not both")


def _heads(path: Path) -> list[Head]:
    lines = lines_of(path)
    heads = [_head(line) for line in lines if not _is_of_receipts(line)]
    if not any(head.sequence for head in heads):
        raise AuditBroken(f"{path} contains no head: give a file with the output of 'flexgate audit head'")
    return heads


def _is_of_receipts(line: str) -> bool:
    """Whether a line is a head for 'flexgate receipts verify', which a server appends to the same file."""
    try:
        return bool(json.loads(line, object_pairs_hook=no_key_twice)["log"] == RECEIPTS)
    except (TypeError, ValueError, LookupError):
        return False


def _head(line: str) -> Head:
    try:
        head = Head(**json.loads(line, object_pairs_hook=no_key_twice))
        if type(head.sequence) is not int or type(head.hash) is not str or head.log not in LOGS:
            raise TypeError
        return head
    except (TypeError, ValueError):
        raise AuditBroken(f"this line is not output of 'flexgate audit head': {line[:80]!r}") from None
