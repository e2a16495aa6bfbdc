"""Options made from the fields of settings, where name, variable, default, choices and help are written once."""

from __future__ import annotations

import inspect
from typing import Annotated, Any, get_origin

import typer

from flexgate.server.lifecycle.store_settings import StoreSettings


def parameters(settings: type[StoreSettings], argument: str) -> list[inspect.Parameter]:
    """A keyword for every setting, None unless it is given; the one that is named `argument` has no flag."""
    found = []
    for name, field in settings.model_fields.items():
        shown: Any = typer.Argument if name == argument else typer.Option
        shown = shown(help=described(settings, name), show_default=False)
        shown.metavar = "<str>" if _repeats(settings, name) else None
        kind: Any = list[str] if _repeats(settings, name) else field.annotation
        annotation = Annotated[kind | None, shown]
        found.append(inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation))
    return found


def place_option(name: str, text: str) -> Any:
    """An option for the setting that names a database, with what it is for a command that changes one."""
    kind: Any = StoreSettings.model_fields[name].annotation
    flags = [f"--{name}"] if kind is bool else []
    option = typer.Option(*flags, help=text, envvar=variable(StoreSettings, name), show_default=False)
    return Annotated[kind | None, option]


def given(values: dict[str, Any]) -> dict[str, Any]:
    """The settings that a command was given."""
    return {name: value for name, value in values.items() if value not in (None, [])}


def described(settings: type[StoreSettings], name: str) -> str:
    """A setting's help: its description, its variable, its default."""
    field = settings.model_fields[name]
    notes = [variable(settings, name)]
    if _repeats(settings, name):
        notes = ["may be repeated", f"{notes[0]} as a JSON list"]
    elif isinstance(field.default, bool):
        notes.append(f"default {'yes' if field.default else 'no'}")
    elif field.default is not None:
        notes.append(f"default {field.default}")
    return f"{field.description} ({', '.join(notes)})"


def variable(settings: type[StoreSettings], name: str) -> str:
    """The environment variable of a setting."""
    return f"{settings.model_config['env_prefix']}{name.upper()}"


def _repeats(settings: type[StoreSettings], name: str) -> bool:
    return get_origin(settings.model_fields[name].annotation) is tuple
