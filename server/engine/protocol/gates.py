"""Sealed gates: the only form in which an allowed-expert set reaches the engine.

A gate names slots *and* their epochs, so that a slot handed to another
owner's expert never serves a gate made for the previous one. It is sealed with
HMAC-SHA256 under a key that the API process draws at start and hands to the
engine core's environment; the engine refuses a request whose seal is missing,
broken, expired or made for another request.
"""

import base64
import hashlib
import hmac
import json
import secrets
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NewType

from flexgate.kernels.gated_topk import MAX_UNITS

SEAL_KEY_BYTES = 32
MAX_SEALED_LENGTH = 8192

SealKey = NewType("SealKey", bytes)
SealedGate = NewType("SealedGate", str)


class GateError(ValueError):
    """A request's gate is missing, malformed, forged, expired or not its own."""


@dataclass(frozen=True, slots=True, order=True)
class SlotRef:
    """One assignment of an engine slot: its index and epoch."""

    slot: int
    slot_epoch: int


@dataclass(frozen=True, slots=True)
class Gate:
    """What one request may use. ``valid_until`` is Unix time in seconds."""

    request_id: str
    tenant: str
    slots: tuple[SlotRef, ...]
    valid_until: float
    cache_salt: str

    def __post_init__(self) -> None:
        """Refuse what could widen or blur a gate.

        Raises:
            GateError: the gate is empty, repeats a slot, or names an impossible one.
        """
        slots = [ref.slot for ref in self.slots]
        if not slots:
            raise GateError("a gate must allow at least one expert; an empty gate is refused")
        if slots != sorted(set(slots)):
            raise GateError(f"gate slots must be distinct and ascending, got {slots}")
        if slots[0] < 0 or slots[-1] >= MAX_UNITS or any(ref.slot_epoch < 0 for ref in self.slots):
            raise GateError(f"gate slots must be in 0..{MAX_UNITS - 1}, epochs non-negative")
        if not self.request_id or not self.tenant or not self.cache_salt:
            raise GateError("a gate needs a request id, a tenant and a cache salt")

    @property
    def bitmask(self) -> int:
        """Bit ``s`` is set when slot ``s`` is allowed; up to 64 slots."""
        return sum(1 << ref.slot for ref in self.slots)


def new_seal_key() -> SealKey:
    """Draw a fresh 256-bit key from the operating system."""
    return SealKey(secrets.token_bytes(SEAL_KEY_BYTES))


def seal(gate: Gate, key: SealKey) -> SealedGate:
    """Serialise ``gate`` canonically and append its HMAC-SHA256."""
    payload = json.dumps(
        [
            gate.request_id,
            gate.tenant,
            [[ref.slot, ref.slot_epoch] for ref in gate.slots],
            gate.valid_until,
            gate.cache_salt,
        ],
        separators=(",", ":"),
    ).encode()
    return SealedGate(_b64(payload) + "." + _b64(_mac(payload, key)))


def open_seal(sealed: object, key: SealKey) -> Gate:
    """Return the gate inside ``sealed`` if its seal is genuine.

    Says nothing about whose request it is or whether it is still in force: that is
    :func:`check`.

    Args:
        sealed: whatever arrived under ``GATE_ARG``; anything but a seal is refused.

    Raises:
        GateError: with the reason; the text names no slot and no tenant.
    """
    if sealed is None:
        raise GateError("request without a gate")
    if not isinstance(sealed, str) or len(sealed) > MAX_SEALED_LENGTH:
        raise GateError("the gate is not a sealed value")
    payload_part, _, mac_part = sealed.partition(".")
    try:
        payload, mac = _unb64(payload_part), _unb64(mac_part)
    except ValueError as error:
        raise GateError("the gate is not a sealed value") from error
    if not hmac.compare_digest(mac, _mac(payload, key)):
        raise GateError("the gate's seal is broken")
    request_id, tenant, refs, valid_until, salt = json.loads(payload)
    return Gate(request_id, tenant, tuple(SlotRef(s, g) for s, g in refs), valid_until, salt)


def check(gate: Gate, *, request_id: str, now: float) -> None:
    """Refuse a genuine gate that is another request's or no longer in force.

    Args:
        request_id: the id that the engine knows the request by.
        now: Unix time in seconds.

    Raises:
        GateError: the gate was sealed for another request, or it has expired.
    """
    check_owner(gate, request_id)
    if not now < gate.valid_until:
        raise GateError("the gate has expired")


def check_owner(gate: Gate, request_id: str) -> None:
    """Refuse a genuine gate that is another request's.

    Raises:
        GateError: the gate was sealed for another request.
    """
    if gate.request_id != request_id:
        raise GateError("the gate was sealed for another request")


def cache_salt(key: SealKey, *, tenant: str, experts: Iterable[tuple[str, int]], client_salt: str | None) -> str:
    """Name the KV cache that this tenant, gate and client salt may share.

    ``experts`` are (expert id, slot_epoch) of this gate alone: slots may move
    and other tenants' gates may change without cold-starting this cache.
    """
    material = json.dumps([tenant, sorted(experts), client_salt], separators=(",", ":")).encode()
    return _b64(hmac.new(key, b"cache-salt\0" + material, hashlib.sha256).digest())


def _mac(payload: bytes, key: SealKey) -> bytes:
    return hmac.new(key, b"gate\0" + payload, hashlib.sha256).digest()


def _b64(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).decode().rstrip("=")


def _unb64(text: str) -> bytes:
    return base64.b64decode(text + "=" * (-len(text) % 4), altchars=b"-_", validate=True)
