"""A constraint that was tried, sealed by the API process and opened by the engine core."""

import hmac
from hashlib import sha256

from flexgate.server.engine.protocol.gates import SealKey


class GrammarError(ValueError):
    """What arrived as a constraint is none that this server tried."""


def seal_constraint(tenant: str, kind: str, text: str, key: SealKey) -> str:
    """A constraint that was tried, as the engine core takes it, which learns no tenant's name."""
    tried = f"{_mac('tenant', tenant, key)[:16]}.{kind}.{text}"
    return f"{_mac('constraint', tried, key)}.{tried}"


def open_constraint(sealed: object, key: SealKey) -> tuple[str, str, str]:
    """What tells tenants apart, kind and text of a constraint that was sealed with this key.

    Raises:
        GrammarError: it was not.
    """
    mac, _, tried = sealed.partition(".") if isinstance(sealed, str) else ("", "", "")
    if not hmac.compare_digest(mac.encode(), _mac("constraint", tried, key).encode()):
        raise GrammarError("the request's constraint has no seal of this server")
    tenant, kind, text = tried.split(".", 2)
    return tenant, kind, text


def _mac(what: str, text: str, key: SealKey) -> str:
    return hmac.new(key, f"{what}\0{text}".encode(), sha256).hexdigest()
