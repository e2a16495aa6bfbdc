"""``flexgate experts add|revoke|list``: the experts of a running server."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from tqdm import tqdm

from flexgate.experts.cli.support import Json, print_table, reported
from flexgate.experts.errors import ServerRefused

if TYPE_CHECKING:
    from flexgate.experts.cli.server import Server

Url = Annotated[str, typer.Option(envvar="FLEXGATE_URL", help="URL of the server.")]
Key = Annotated[
    str, typer.Option(envvar="FLEXGATE_KEY", help="API key of an admin or of the expert's owner.", show_envvar=True)
]
LOCAL = "http://127.0.0.1:8000"
_COLUMNS = ("id", "owner", "domain", "live", "visibility", "slot", "grade", "allowed", "reason")


def add(
    package: Annotated[str, typer.Argument(help="Folder of a package; with --by-name its name on the server.")],
    key: Key,
    url: Url = LOCAL,
    by_name: Annotated[bool, typer.Option("--by-name", help="The package is in the server's --experts-dir.")] = False,
    as_json: Json = False,
) -> None:
    """Add an expert to a running server: upload, verify, load on every rank, test, make live."""
    with reported(as_json) as show:
        from flexgate.experts.cli.server import Server

        with Server(url, key) as server:
            source = {"package": package} if by_name else {"upload": _upload(server, Path(package))}
            job = _followed(server, server.add(source))
        show({"live": job["expert"], "version": job["version"], **job["result"]})


def revoke(
    expert: Annotated[str, typer.Argument(help="Id of the expert.")],
    key: Key,
    url: Url = LOCAL,
    drain_seconds: Annotated[float, typer.Option(help="Seconds that running requests have to finish.")] = 0.0,
    as_json: Json = False,
) -> None:
    """Revoke an expert on a running server, also after restarts, until it is added again; print the record."""
    with reported(as_json) as show:
        from flexgate.experts.cli.server import Server

        with Server(url, key) as server:
            show(server.revoke(expert, drain_seconds))


def list_experts(
    key: Annotated[str, typer.Option(envvar="FLEXGATE_KEY", help="API key of any role.")],
    url: Url = LOCAL,
    as_json: Json = False,
) -> None:
    """List the experts of a running server that this key may see."""
    with reported(as_json) as show:
        from flexgate.experts.cli.server import Server

        with Server(url, key) as server:
            found = server.experts()
        if as_json:
            show({"experts": found})
        else:
            columns = [name for name in _COLUMNS if any(name in expert for expert in found)]
            rows = [[_cell(expert.get(name)) for name in columns] for expert in found]
            print_table(columns, rows, empty="no experts that this key may see")


def _cell(value: object) -> str:
    match value:
        case None:
            return ""
        case bool():
            return "yes" if value else "no"
        case {"message": str(message)}:
            return message
    return str(value)


def _upload(server: Server, package: Path) -> str:
    total = sum(file.stat().st_size for file in package.iterdir()) if package.is_dir() else 0
    with tqdm(desc="upload", total=total, unit="B", unit_scale=True, disable=None) as bar:
        return server.upload(package, lambda count: bar.update(count) and None)


def _followed(server: Server, job: dict[str, Any]) -> dict[str, Any]:
    """The job's last state; raises ``ServerRefused`` unless the expert is live."""
    state = job
    with _stages() as show:
        for state in server.follow(job["id"]):
            show(state)
    if state["status"] != "succeeded":
        raise ServerRefused(f"at stage '{state['stage']}': {state['error']['message']}")
    return state


@contextmanager
def _stages() -> Iterator[Callable[[dict[str, Any]], None]]:
    """A bar over the stages, with how far the present one is."""
    with tqdm(desc="add", bar_format="{desc} {bar} {n_fmt}/{total_fmt} {postfix}", disable=None) as bar:

        def show(state: dict[str, Any]) -> None:
            bar.total = len(state["stages"])
            bar.n = state["stages"].index(state["stage"]) + 1
            progress = state["progress"]
            within = f" {progress['done']}/{progress['total']} {progress['unit']}" if progress["total"] else ""
            bar.set_postfix_str(f"{state['stage']}{within}")

        yield show
