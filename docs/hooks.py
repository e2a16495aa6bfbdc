"""What mkdocs adds to the pages: the references, which are generated, and links that leave the site.

Generated pages are written for each build and are not in the repository: the command line's from Typer,
the API's from its OpenAPI document, the error codes from the source, the list of decisions from their titles.
"""

from __future__ import annotations

import ast
import importlib
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final, TypeGuard

import typer
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT: Final = Path(__file__).parents[1]
_SHIPPED: Final = ("server", "experts", "policies")
_LINK: Final = re.compile(r"(?<!!)\[([^\]]+)\]\(((?!https?:|#|mailto:)[^)\s]+)\)")
_METHODS: Final = ("get", "post", "put", "patch", "delete")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the generated pages."""
    pages = {
        "reference/cli.md": command_line(),
        "reference/api.md": api(),
        "reference/errors.md": error_codes(),
        "decisions/index.md": decisions(),
    }
    for path, text in pages.items():
        files.append(File.generated(config, path, content=text))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, **_: object) -> str:
    """Show a link to a file outside the site as that file's path in the repository."""
    folder = (Path(config.docs_dir) / page.file.src_uri).parent

    def shown(link: re.Match[str]) -> str:
        text, target = link[1], (folder / link[2].partition("#")[0]).resolve()
        if target.is_relative_to(config.docs_dir) and not target.is_dir():
            return link[0]
        if not target.exists():
            raise ValueError(f"{page.file.src_uri} links to '{link[2]}', which does not exist")
        place = f"`{target.relative_to(ROOT).as_posix()}`"
        return text if text.strip("`") == place.strip("`") else f"{text} ({place})"

    return _LINK.sub(shown, markdown)


def decisions() -> str:
    """The list of design decisions."""
    rows = []
    for path in sorted((ROOT / "docs" / "decisions").glob("[0-9]*.md")):
        title = path.read_text().partition("\n")[0].lstrip("# ")
        rows.append(f"- [{title}]({path.name})")
    return "\n".join(["# Design decisions", "", "Each says what was decided, why, and what holds it.", "", *rows, ""])


def command_line() -> str:
    """Every command with its arguments and options, as Typer knows them."""
    from flexgate.server.cli.main import SUBCOMMANDS

    lines = ["# Command line", "", "`flexgate COMMAND --help` prints the same.", ""]
    for name, (module, _) in SUBCOMMANDS.items():
        command = typer.main.get_command(importlib.import_module(module).app)
        lines += _commands(command, typer.Context(command, info_name=f"flexgate {name}"))
    return "\n".join(lines)


def _commands(command: Any, context: typer.Context) -> Iterator[str]:
    if hasattr(command, "list_commands"):
        for name in command.list_commands(context):
            child = command.get_command(context, name)
            if not child.hidden:
                yield from _commands(child, typer.Context(child, info_name=name, parent=context))
        return
    yield f"## {context.command_path}"
    yield ""
    yield (command.help or "").strip()
    yield ""
    rows = [row for parameter in command.params if (row := _parameter(parameter)) is not None]
    yield from _table(("Option or argument", "What it does"), rows)


def _parameter(parameter: Any) -> tuple[str, str] | None:
    if getattr(parameter, "hidden", False) or parameter.name == "help":
        return None
    argument = parameter.param_type_name == "argument"
    names = [parameter.metavar or str(parameter.name)] if argument else [*parameter.opts, *parameter.secondary_opts]
    text = getattr(parameter, "help", None) or ""
    return f"`{', '.join(names)}`", f"{text}{' Required.' if parameter.required else ''}"


def api() -> str:
    """Every route: its roles, parameters, body and responses; then the types that they are made of."""

    from flexgate.server.lifecycle.app import document

    described = document()
    schemas = described["components"]["schemas"]
    lines = [
        "# API",
        "",
        "Generated from the document that a running server gives at `GET /v1/openapi.json`. Requests carry",
        "`Authorization: Bearer KEY`; each route says which roles' keys it takes.",
        "",
    ]
    for path, methods in sorted(described["paths"].items()):
        for method in (name for name in _METHODS if name in methods):
            lines += _route(f"{method.upper()} {path}", methods[method], schemas)
    lines += ["# Types", ""]
    for name, schema in sorted(schemas.items()):
        lines += _type(name, schema)
    return "\n".join(lines)


def _route(title: str, route: Mapping[str, Any], schemas: Mapping[str, Any]) -> Iterator[str]:
    yield f"## {title}"
    yield ""
    yield " ".join(part for part in (route["summary"], route.get("description", "")) if part)
    yield ""
    fields = [(f"`{p['name']}`", p["in"], _kind(p["schema"])) for p in route["parameters"]]
    body = route.get("requestBody", {}).get("content", {}).get("application/json", {}).get("schema", {})
    body = _resolved(body, schemas)
    required = set(body.get("required", ()))
    for name, of in body.get("properties", {}).items():
        fields.append((f"`{name}`", "body, required" if name in required else "body", _kind(of)))
    yield from _table(("Field", "In", "Type"), fields)
    answers = [
        (f"`{status}`", media, _kind(content.get("schema", {}), link=True))
        for status, response in route["responses"].items()
        for media, content in response.get("content", {}).items()
    ]
    yield from _table(("Status", "Media type", "Response"), answers)


def _type(name: str, schema: Mapping[str, Any]) -> Iterator[str]:
    """A type's own section, which responses link to."""
    yield f"## {name}"
    yield ""
    if "description" in schema:
        yield " ".join(schema["description"].split())
        yield ""
    required = set(schema.get("required", ()))
    fields = schema.get("properties", {}).items()
    yield from _table(
        ("Field", "Type", "Always there"),
        [(f"`{field}`", _kind(of, link=True), "yes" if field in required else "no") for field, of in fields],
    )


def _resolved(schema: Mapping[str, Any], schemas: Mapping[str, Any]) -> Mapping[str, Any]:
    reference = schema.get("$ref")
    return schema if reference is None else schemas[reference.rpartition("/")[2]]


def _kind(schema: Mapping[str, Any], *, link: bool = False) -> str:
    """A type in words; with `link`, names lead to their sections."""
    if "$ref" in schema:
        name = str(schema["$ref"].rpartition("/")[2])
        return f"[{name}](#{name.lower()})" if link else name
    options = schema.get("anyOf") or schema.get("oneOf")
    if options:
        return " or ".join(dict.fromkeys(_kind(option, link=link) for option in options))
    if "enum" in schema or "const" in schema:
        return ", ".join(f"`{value}`" for value in schema.get("enum") or [schema["const"]])
    kind = schema.get("type", "any")
    if kind == "array" and "items" in schema:
        return f"list of {_kind(schema['items'], link=link)}"
    if kind == "object" and isinstance(schema.get("additionalProperties"), dict):
        return f"map of {_kind(schema['additionalProperties'], link=link)}"
    return " or ".join(kind) if isinstance(kind, list) else str(kind)


def error_codes() -> str:
    """Every `code` that an error can have, with its messages and the modules that make it."""
    made: dict[str, set[str]] = defaultdict(set)
    messages: dict[str, set[str]] = defaultdict(set)
    trees = {path: ast.parse(path.read_text()) for folder in _SHIPPED for path in (ROOT / folder).rglob("*.py")}
    shared = {name: value for tree in trees.values() for name, value in _assigned(tree).items() if name.isupper()}
    for path, tree in trees.items():
        for code, message in _codes(tree, shared):
            made[code].add(path.relative_to(ROOT).as_posix())
            messages[code] |= {message} - {""}
    rows = [
        (f"`{code}`", "<br>".join(sorted(messages[code])), ", ".join(f"`{place}`" for place in sorted(made[code])))
        for code in sorted(made)
    ]
    return "\n".join(
        [
            "# Error codes",
            "",
            'An error is `{"error": {"message", "type", "param", "code"}}`. The message says what is wrong, where, and',
            "what to do; `code` is for programs. Generated from the source: … stands for a value; messages that are",
            "composed in another place are missing.",
            "",
            *_table(("Code", "Messages", "Made in"), rows),
        ]
    )


def _assigned(tree: ast.Module) -> dict[str, ast.expr]:
    """What a module assigns to names, at any depth."""
    return {
        target.id: node.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Assign | ast.AnnAssign) and node.value is not None
        for target in (node.targets if isinstance(node, ast.Assign) else [node.target])
        if isinstance(target, ast.Name)
    }


def _codes(tree: ast.Module, shared: Mapping[str, ast.expr]) -> Iterator[tuple[str, str]]:
    """The strings that calls pass as `code`, each with the call's message.

    A name stands for what its module assigns to it, or for the constant of another module.
    """
    assigned = {**shared, **_assigned(tree)}
    nodes = list(ast.walk(tree))
    for call in (node for node in nodes if isinstance(node, ast.Call) and not _is_label(node)):
        for value in (keyword.value for keyword in call.keywords if keyword.arg == "code"):
            names = [node.id for node in ast.walk(value) if isinstance(node, ast.Name)]
            for source in [value, *(assigned[name] for name in names if name in assigned)]:
                for node in ast.walk(source):
                    if isinstance(node, ast.Constant) and _is_code(node.value):
                        yield node.value, _message(call)


def _message(call: ast.Call) -> str:
    """The call's first argument where it is a sentence, with … for the values in it; empty otherwise."""
    match call.args:
        case [ast.Constant(value=str(text)), *_]:
            parts = [text]
        case [ast.JoinedStr(values=values), *_]:
            parts = [str(part.value) if isinstance(part, ast.Constant) else "…" for part in values]
        case _:
            return ""
    text = "".join(parts)
    return text if " " in text else ""


def _is_label(call: ast.Call) -> bool:
    return isinstance(call.func, ast.Attribute) and call.func.attr == "labels"


def _is_code(value: object) -> TypeGuard[str]:
    return isinstance(value, str) and re.fullmatch(r"[a-z]+(_[a-z]+)+", value) is not None


def _table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> Iterator[str]:
    rows = list(rows)
    if not rows:
        return
    yield f"| {' | '.join(head)} |"
    yield "|" + "---|" * len(head)
    for row in rows:
        yield "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in row) + " |"
    yield ""
