"""`/.well-known/jwks.json`: the public keys of receipts, for anyone."""

from __future__ import annotations

from typing import Literal, Protocol

from starlette.requests import Request
from starlette.responses import Response

from flexgate.server.http.schemas import Shown


class Signed(Protocol):
    """What is signed with the keys."""

    @property
    def jwks(self) -> bytes: ...


class Keys(Protocol):
    """The services that have keys."""

    @property
    def receipts(self) -> Signed: ...


class Jwk(Shown):
    """An Ed25519 key (RFC 8037); `kid` is its thumbprint (RFC 7638)."""

    alg: Literal["EdDSA"]
    crv: Literal["Ed25519"]
    kid: str
    kty: Literal["OKP"]
    use: Literal["sig"]
    x: str


class JwkSet(Shown):
    """All keys that receipts were ever signed with, the present one last."""

    keys: list[Jwk]


class KeySet:
    """The route."""

    def __init__(self, services: Keys) -> None:
        self._services = services

    async def respond(self, request: Request) -> Response:  # noqa: ARG002 - a route's signature
        """The keys, which are in memory."""
        return Response(self._services.receipts.jwks, media_type="application/json")
