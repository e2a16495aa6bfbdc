"""`flexgate audit`: verify the audit log, take it out of the database, trim its denied requests."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Final

import typer

from flexgate.experts.errors import UsageInvalid
from flexgate.policies.audit import LOGS, REQUESTS, Head, from_line, to_line
from flexgate.policies.audit import verify as verify_entries
from flexgate.policies.errors import AuditBroken
from flexgate.policies.strict_json import no_key_twice
from flexgate.server.cli.store import DatabaseUrl, Demo, StateDir, failing
from flexgate.server.cli.target import TARGETS, Key, Target, Url, administers, where
from flexgate.server.cli.target import target as target_of

_HELP: Final = (
    "Verify the audit log, take it out of the database, trim its denied requests.\n\n"
    "Keep heads somewhere else (`flexgate audit head >> heads.jsonl`, from time to time): with them, "
    "`verify` also notices a log that was cut off or written anew as a whole.\n\n"
    "Exit status: 0 all is well; 1 the log is broken or cannot be read, with one sentence; 2 wrong usage."
)
app = typer.Typer(no_args_is_help=True, add_completion=False, help=_HELP)


@administers(app)
def head(target: Target) -> None:
    """Print the newest change and the newest denied request, each as one line of JSON, to be kept outside."""
    for found in target.audit_heads():
        if found.sequence or found.log != REQUESTS:
            typer.echo(json.dumps(found._asdict()))


@app.command()
def verify(
    context: typer.Context,
    heads: Annotated[Path | None, typer.Option(help="File with lines that 'head' printed before.")] = None,
    file: Annotated[Path | None, typer.Option(help="Verify an export instead of the database.")] = None,
    demo: Demo = None,
    state_dir: StateDir = None,
    database_url: DatabaseUrl = None,
    url: Url = None,
    key: Key = None,
) -> None:
    """Check every entry of the log against the one before it, and against heads kept outside."""
    with failing():
        noted = [] if heads is None else _heads(heads)
        if file is not None:
            _refuse_targets(context)
            with file.open(encoding="utf-8") as lines:
                found = verify_entries(map(from_line, lines), outside=noted)
        else:
            options = {"demo": demo, "state_dir": state_dir, "database_url": database_url, "url": url, "key": key}
            with target_of(**where(context, options)) as target:
                found = verify_entries(target.audit_log(0), outside=noted)
    if heads is None:
        sentences = [f"{found.entries} entries follow from each other"]
        sentences.append("a log that was replaced or cut off is noticed with --heads only")
    else:
        sentences = [
            f"{found.entries} entries verified",
            f"{len(noted) - found.trimmed_heads} heads from outside found",
        ]
    if found.trimmed:
        sentences.append(f"{found.trimmed} entries of denied requests were trimmed, as the log says")
    if found.trimmed_heads:
        sentences.append(f"{found.trimmed_heads} heads from outside are of those, with nothing left to compare")
    typer.echo("; ".join(sentences))


@administers(app)
def export(
    target: Target, after: Annotated[int, typer.Option(min=0, help="Leave out entries up to this number.")] = 0
) -> None:
    """Print the log as JSON Lines, oldest first."""
    for entry in target.audit_log(after):
        sys.stdout.write(to_line(entry) + "\n")


@administers(app)
def trim(
    target: Target,
    older_than_days: Annotated[int, typer.Option(min=1, help="How old denied requests must be to go.")],
) -> None:
    """Remove old denied requests and print how many entries went; an entry says so. Changes are never removed."""
    typer.echo(target.trim_audit(older_than_days))


def _refuse_targets(context: typer.Context) -> None:
    """Refuse a database or a server that was written beside --file; what the environment names is not meant."""
    for option in TARGETS:
        source = context.get_parameter_source(option)
        if source is not None and source.name == "COMMANDLINE":
            raise UsageInvalid(f"--file and --{option.replace('_', '-')} are two places to read from: give one of them")


def _heads(path: Path) -> list[Head]:
    heads = [_head(line) for line in path.read_text().splitlines() if line.strip()]
    if not any(head.sequence for head in heads):
        raise AuditBroken(f"{path} holds no head to compare with: keep what 'flexgate audit head' prints")
    return heads


def _head(line: str) -> Head:
    try:
        head = Head(**json.loads(line, object_pairs_hook=no_key_twice))
        if type(head.sequence) is not int or type(head.hash) is not str or head.log not in LOGS:
            raise TypeError
        return head
    except (TypeError, ValueError):
        raise AuditBroken(f"not a head: {line[:80]!r}") from None
