"""Addresses in settings: databases, hosts, and URLs of other servers."""

from __future__ import annotations

import hashlib
import ipaddress
import re
from typing import Final

_PLACES: Final = frozenset({"dbname", "host", "hostaddr", "options", "port", "service"})
"""Parameters of a PostgreSQL URL that say which database it is; `options` may name a schema."""
_DATABASES: Final = "give sqlite:////FOLDER/flexgate.db or postgresql+psycopg://USER:PASSWORD@HOST/DATABASE"
_WEB: Final = re.compile(r"https?://[^/?#\s@]+([/?#]\S*)?", re.IGNORECASE)
_ORIGIN: Final = re.compile(r"https?://[^/?#\s@]+")


def is_web(url: str) -> bool:
    """Whether it is an http(s) URL without a user name."""
    return _WEB.fullmatch(url) is not None


def is_origin(url: str) -> bool:
    """Whether it is a scheme and a host, as browsers name where a page comes from."""
    return _ORIGIN.fullmatch(url) is not None


def require_database(url: str) -> None:
    """Raise ``ValueError`` for what names no database that could be opened, without repeating a password."""
    from sqlalchemy import make_url
    from sqlalchemy.exc import ArgumentError

    from flexgate.policies.store.database import require_plain_file

    try:
        parsed = make_url(url)
    except (ArgumentError, ValueError):
        raise ValueError(f"not a database's URL; {_DATABASES}") from None
    if parsed.get_backend_name() not in ("sqlite", "postgresql"):
        raise ValueError(f"'{parsed.get_backend_name()}' is not served as a policy database; {_DATABASES}")
    if parsed.get_backend_name() == "sqlite" and parsed.database in (None, "", ":memory:"):
        raise ValueError(f"a database in memory would be lost with the server; {_DATABASES}")
    try:
        require_plain_file(parsed)
    except ValueError as error:
        raise ValueError(f"{error}; {_DATABASES}") from None


def folder_of(url: str) -> str:
    """The name of the folder of what a server keeps for a database."""
    return "served-" + hashlib.sha256(_place(url).encode()).hexdigest()[:12]


def _place(url: str) -> str:
    """What of a URL says which database it is: another password or a demand for TLS makes no other one of it."""
    from sqlalchemy import URL, make_url
    from sqlalchemy.exc import ArgumentError

    try:
        parsed = make_url(url)
    except (ArgumentError, ValueError):
        return url  # opening the store says what is wrong with it
    if parsed.get_backend_name() == "sqlite":
        return url
    query = {name: value for name, value in parsed.query.items() if name in _PLACES}
    place = URL.create(
        parsed.get_backend_name(), parsed.username, None, parsed.host, parsed.port, parsed.database, query
    )
    return place.render_as_string()


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach `host`."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
