"""A constraint that was tried, sealed by the API process and opened by the engine core."""

import hmac
from hashlib import sha256

from flexgate.server.engine.protocol.gates import SealKey


class GrammarError(ValueError):
    """What arrived as a constraint is none that this server tried."""


def seal_constraint(kind: str, text: str, key: SealKey) -> str:
    """A constraint that was tried, as the engine core takes it."""
    tried = f"{kind}.{text}"
    return f"{_mac(tried, key)}.{tried}"


def open_constraint(sealed: object, key: SealKey) -> tuple[str, str]:
    """Kind and text of a sealed constraint; raises `GrammarError` unless it was sealed with this key."""
    mac, _, tried = sealed.partition(".") if isinstance(sealed, str) else ("", "", "")
    if not hmac.compare_digest(mac.encode(), _mac(tried, key).encode()):
        raise GrammarError("the request's constraint has no seal of this server")
    kind, _, text = tried.partition(".")
    return kind, text


def _mac(tried: str, key: SealKey) -> str:
    return hmac.new(key, b"constraint\0" + tried.encode(), sha256).hexdigest()
