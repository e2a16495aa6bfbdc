"""``flexgate experts assign``: record who owns each expert of a checkpoint."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from flexgate.experts.cli.support import Json, print_table, reported
from flexgate.experts.errors import OutputRefused, OwnershipInvalid, UsageInvalid

if TYPE_CHECKING:
    from flexgate.experts.checkpoint.mergekit import Sources
    from flexgate.experts.checkpoint.ownership import Ownership

MAX_YAML: Final = 1 << 20
_COLUMNS: Final = ("unit", "id", "owner", "experts per layer", "grade", "licence", "domain")


def assign(
    model: Annotated[
        Path, typer.Argument(help="Checkpoint folder; its config.json and, if present, mergekit's file are read.")
    ],
    units: Annotated[
        Path | None, typer.Option(help="YAML table of units: their experts, owner, domain, licence, grade.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Overwrite an existing flexgate.json.")] = False,
    as_json: Json = False,
) -> None:
    """Write flexgate.json, which records the owner of each expert of a checkpoint.

    A unit is one owner's contribution: several experts per layer, or one, and
    the same or different ones in each layer. Agreements and responses name a
    unit by its id. The first one is 'public', which every request uses. For a
    model of 32 layers with 8 experts each, the table of --units may be:

    \b
      ownership: owners
      units:
      - id: public
        domain: the base model
        experts: 0
      - id: news
        owner: gazette
        domain: news
        licence: CC-BY-4.0
        grade: removed
        experts: 1-3
      - id: law
        owner: chancery
        domain: statutes
        experts:
        - {layers: 0-15, experts: 4-7}
        - {layers: 16-31, experts: "4, 6-7"}
      - id: math
        owner: academy
        domain: mathematics
        experts:
        - {layers: 16-31, experts: 5}

    With 'ownership: none', for a model whose experts were trained together,
    units have no owner, licence or grade.

    The grade says how completely excluding a unit removes what was learnt from
    its data: 'removed' (all of it), 'router' (all but what other units' router
    rows have learnt), 'shared' (all but what shared weights and the router have
    learnt), or 'unknown'.

    Without --units, a table is proposed from the mergekit_moe_config.yml
    beside the weights: save it, and fill in owners and licences.

    Kinds of models: flex_olmo, olmoe, mixtral, qwen2_moe, qwen3_moe, glm4_moe.
    """
    with reported(as_json) as show:
        from flexgate.experts.checkpoint.assignment import parse_assignment
        from flexgate.experts.checkpoint.families import experts_per_layer
        from flexgate.experts.checkpoint.layout import CONFIG_NAME
        from flexgate.experts.checkpoint.ownership import OWNERSHIP_NAME
        from flexgate.experts.checkpoint.reader import read_json
        from flexgate.experts.io.output import write_whole

        experts_L = experts_per_layer(read_json(model / CONFIG_NAME))
        sources = _sources(model, experts_L)
        if units is None:
            _propose(model, sources, as_json)
            return
        ownership = parse_assignment(_read_yaml(units), experts_L, str(units))
        target = model / OWNERSHIP_NAME
        if not force and (target.exists() or target.is_symlink()):
            raise OutputRefused(f"{target} exists already: give --force to replace it")
        write_whole(target, (json.dumps(ownership.to_json()) + "\n").encode(), replace=force)
        if as_json:
            rows = [dict(zip(_COLUMNS, row, strict=True)) for row in _rows(ownership)]
            show({"written": str(target), "ownership": ownership.kind, "units": rows})
        else:
            print_table(_COLUMNS, [[*map(str, row)] for row in _rows(ownership)], empty="")
            typer.echo(f"written: {target}")


def _rows(ownership: Ownership) -> Iterator[list[Any]]:
    for number, unit in enumerate(ownership.units):
        counts = sorted({*ownership.counts_L(number)})
        span = str(counts[0]) if len(counts) == 1 else f"{counts[0]}-{counts[-1]}"
        yield [number, unit.id, unit.owner or "", span, unit.grade, unit.licence or "unknown", unit.domain]


def _sources(model: Path, experts_L: tuple[int, ...]) -> Sources | None:
    """What mergekit wrote beside the weights; a file that does not fit them is refused."""
    from flexgate.experts.checkpoint.mergekit import MERGEKIT_NAME, parse_mergekit

    path = model / MERGEKIT_NAME
    return parse_mergekit(_read_yaml(path), experts_L, str(path)) if path.is_file() else None


def _propose(model: Path, sources: Sources | None, as_json: bool) -> None:
    from flexgate.experts.checkpoint.mergekit import MERGEKIT_NAME, propose
    from flexgate.experts.io.strict_yaml import dump_yaml

    if sources is None:
        raise UsageInvalid(f"--units: give the table of units: {model} has no {MERGEKIT_NAME} to propose one from")
    table: Mapping[str, Any] = propose(sources)
    if as_json:
        typer.echo(json.dumps(table, indent=1))
        return
    typer.echo(f"# Proposed from {MERGEKIT_NAME}; nothing is written. Fill in owner and licence of each unit.")
    typer.echo(f"# In every answer, and in no unit: attention, embeddings and head of {sources.base}.")
    for shared in sources.shared:
        typer.echo(f"# In every answer, and in no unit: the shared expert, of {shared}.")
    typer.echo(dump_yaml(table), nl=False)


def _read_yaml(path: Path) -> Any:
    from flexgate.experts.io.strict_yaml import parse_yaml

    try:
        with path.open("rb") as file:
            text = file.read(MAX_YAML + 1)
    except OSError as error:
        raise OwnershipInvalid(f"{path} cannot be read: {error.strerror}") from error
    if len(text) > MAX_YAML:
        raise OwnershipInvalid(f"{path} is larger than {MAX_YAML} bytes")
    return parse_yaml(text, str(path), OwnershipInvalid)
