"""Settings of what every command needs: where the policy database and the state are."""

from __future__ import annotations

import json
import os
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any, Self, TypeVar, get_origin

from pydantic import Field, ValidationError, ValidationInfo, field_validator, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from flexgate.policies.field_errors import first_field_error
from flexgate.server.lifecycle.addresses import folder_of, require_database

S = TypeVar("S", bound="StoreSettings")


class SettingsError(ValueError):
    """The settings contradict each other or name something impossible; the message is one sentence."""


class StoreSettings(BaseSettings):
    """Which policy database is used."""

    model_config = SettingsConfigDict(env_prefix="FLEXGATE_", frozen=True, extra="ignore", enable_decoding=False)

    demo: Annotated[bool, Field(description="Serve the shipped demo model with well-known keys, on loopback only.")] = (
        False
    )
    state_dir: Annotated[
        Path | None,
        Field(
            description="State directory, with policy database, ledger, receipts and added experts; by default "
            "~/.local/state/flexgate."
        ),
    ] = None
    database_url: Annotated[
        str | None,
        Field(description="Policy database, as an SQLAlchemy URL; by default SQLite in the state directory."),
    ] = None

    @field_validator("*", mode="before")
    @classmethod
    def _a_list(cls, value: Any, info: ValidationInfo) -> Any:
        """Read a list as a variable has it: options give it as one."""
        if not isinstance(value, str) or get_origin(cls.model_fields[str(info.field_name)].annotation) is not tuple:
            return value
        with suppress(ValueError):
            if isinstance(items := json.loads(value), list):
                return items
        raise ValueError(f'{value[:80]!r} is not a JSON list, such as ["a", "b"]')

    @field_validator("database_url")
    @classmethod
    def _a_database(cls, url: str | None) -> str | None:
        if url is not None:
            require_database(url)
        return url

    @model_validator(mode="after")
    def _one_database(self) -> Self:
        if self.demo and self.database_url is not None:
            raise ValueError(
                "--demo and --database-url name two databases: leave one of them out, or unset FLEXGATE_DEMO "
                "or FLEXGATE_DATABASE_URL"
            )
        return self

    def database(self) -> str:
        """The policy database's URL; the demo's is a file of its own. Makes the directory."""
        if self.database_url is not None:
            return self.database_url
        return f"sqlite:///{self._state() / ('demo.db' if self.demo else 'flexgate.db')}"

    def directory(self) -> Path:
        """Where private copies of packages are kept, for every database apart from others. Makes the directory."""
        return _made(self._state() / ("demo" if self.demo else folder_of(self.database())))

    def _state(self) -> Path:
        return _made((self.state_dir or _default_state_dir()).absolute())


def load_store_settings(**given: Any) -> StoreSettings:
    """Settings of the policy database alone; raises `SettingsError`."""
    return load(StoreSettings, given)


def load(kind: type[S], given: dict[str, Any]) -> S:
    """Settings of a kind from the environment and `given`, of which None means not given; raises `SettingsError`."""
    try:
        return kind(**{name: value for name, value in given.items() if value is not None})
    except ValidationError as error:
        found = first_field_error(error)
    if not found.place:
        raise SettingsError(found.says)
    name = str(found.place[0])
    written = f"--{name.replace('_', '-')}" if given.get(name) is not None else f"FLEXGATE_{name.upper()}"
    raise SettingsError(found.about(written))


def _made(directory: Path) -> Path:
    """The directory, which is made if it is missing."""
    try:
        directory.mkdir(parents=True, exist_ok=True, mode=0o700)
    except OSError as error:
        raise SettingsError(
            f"cannot make the state directory '{directory}' ({error.strerror}); "
            "give --state-dir a folder that can be written"
        ) from error
    return directory


def _default_state_dir() -> Path:
    base = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
    return Path(base) / "flexgate"
