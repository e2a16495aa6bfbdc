"""What a receipt says, as salted leaves: each can be shown alone, and tells nothing of the others.

    request   what was used in all, for the tenant, auditors and administrators
    owner     what the experts of one owner did, for that owner, auditors and administrators
    none      nothing: leaves are filled up to a multiple of four, so that they tell little of how many took part

The order of the leaves is that of their salts. Numbers that can pass 2⁵³ are decimal strings. Members are written in
the order of their names, so that their JSON is canonical (RFC 8785). What many requests have is written once.
`docs/receipts.md` is the format.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from typing import Any, Final, NamedTuple

import msgspec

from flexgate.server.ledger.receipts.merkle import leaf_hash

SALT_BYTES: Final = 32
FOURS: Final = 4
"""A receipt has a multiple of so many leaves."""
ROOT: Final = b"\x02"
USAGE: Final = (
    "sequence, request, registered_at, ended_at, outcome, tenant, key_id, endpoint, model, policy_version, "
    "weights_epoch, prompt_tokens, cached_tokens, completion_tokens, prompt_sha256, answer_sha256"
)
PARTS: Final = (
    "sequence, owner, expert, package, agreement, agreement_version, share_ppm, prompt_mass, prompt_positions, "
    "completion_mass, completion_positions"
)


class Recorded(NamedTuple):
    """A request as the ledger has it: the columns `USAGE`, and of each part `PARTS`, by owner and expert."""

    usage: Sequence[Any]
    parts: Sequence[Sequence[Any]]

    @property
    def sequence(self) -> int:
        """Its number in the ledger."""
        return int(self.usage[0])

    @property
    def request(self) -> str:
        """The id of its decision, which is its receipt's."""
        return str(self.usage[1])

    @property
    def tenant(self) -> str:
        """Whose request it is."""
        return str(self.usage[5])

    @property
    def policy_version(self) -> int:
        """Of the policy that decided about it."""
        return int(self.usage[9])

    @property
    def owners(self) -> list[str]:
        """The owners of experts that took part."""
        return sorted({part[1] for part in self.parts} - {None})


Content = tuple[str, str | None, bytes]
"""A leaf's kind, its owner if it is an owner's, and what it says as canonical JSON."""


class Leaves(NamedTuple):
    """The leaves of a receipt by place, each behind its salt; their hashes; what opens the digests of both bodies."""

    leaves: Sequence[tuple[bytes, Content]]
    hashes: Sequence[bytes]
    opening: bytes

    @property
    def root(self) -> bytes:
        """What stands for the receipt in its batch."""
        return hashlib.sha256(ROOT + b"".join(self.hashes)).digest()


def grow(
    recorded: Recorded, *, secret: bytes, policy_digest: str | None, pseudonym: Callable[[str, str], str]
) -> Leaves:
    """The leaves of a request; always the same ones for the same request and secret.

    Args:
        secret: 32 bytes that salts and openings are made from, of this server alone.
        pseudonym: an owner's name for a tenant, by owner and tenant.
    """
    receipt, owned = recorded.request, list(_owned(recorded, pseudonym))
    size = len(owned) // FOURS * FOURS + FOURS  # with the request's own leaf
    stream = hashlib.shake_256(secret + receipt.encode()).digest(SALT_BYTES * (size + 1))
    opening, *salts = [stream[start : start + SALT_BYTES] for start in range(0, len(stream), SALT_BYTES)]
    contents: list[Content] = [("request", None, _of_request(recorded, policy_digest, opening)), *owned]
    contents += [("none", None, f'{{"kind":"none","receipt":{_text(receipt)}}}'.encode())] * (size - len(contents))
    leaves = sorted(zip(salts, contents, strict=True))
    return Leaves(leaves, [leaf_hash(salt + content) for salt, (_, _, content) in leaves], opening)


def commitment(opening: bytes, sha256: str | None) -> str | None:
    """The salted digest of a body, by the body's own."""
    return None if sha256 is None else hashlib.sha256(opening + bytes.fromhex(sha256)).hexdigest()


def _of_request(recorded: Recorded, policy_digest: str | None, opening: bytes) -> bytes:
    _, receipt, registered_at, ended_at, outcome, tenant, key, endpoint, model, version, epoch, *rest = recorded.usage
    prompt_tokens, cached_tokens, completion_tokens, prompt_sha256, answer_sha256 = rest
    shares = [_share(part[2], part[1]) % part[6] for part in recorded.parts]
    return (
        f'{{"answer_digest":{_text(commitment(opening, answer_sha256))},"cached_tokens":"{cached_tokens:d}",'
        f'"completion_tokens":"{completion_tokens:d}","ended_at":"{ended_at:d}","endpoint":{_word(endpoint)},'
        f'"experts":[{",".join(shares)}],"key":{_word(key)},"kind":"request","model":{_word(model)},'
        f'"opening_digest":"{hashlib.sha256(opening).hexdigest()}","outcome":{_word(outcome)},'
        f'"policy_digest":{_word(policy_digest)},"policy_version":"{version:d}",'
        f'"prompt_digest":{_text(commitment(opening, prompt_sha256))},"prompt_tokens":"{prompt_tokens:d}",'
        f'"receipt":{_text(receipt)},"registered_at":"{registered_at:d}","tenant":{_word(tenant)},'
        f'"weights_epoch":"{epoch:d}"}}'
    ).encode()


def _owned(recorded: Recorded, pseudonym: Callable[[str, str], str]) -> Iterator[Content]:
    """The leaf of each owner; parts are by owner."""
    _, receipt, _, ended_at, outcome, tenant, *_, prompt_tokens, _, completion_tokens, _, _ = recorded.usage
    before = f'{{"completion_tokens":"{completion_tokens:d}","ended_at":"{ended_at:d}","experts":['
    between = f'],"kind":"owner","outcome":{_word(outcome)},"owner":'
    behind = f',"prompt_tokens":"{prompt_tokens:d}","receipt":{_text(receipt)},"tenant":'
    experts: list[str] = []
    for number, part in enumerate(recorded.parts, start=1):
        owner = part[1]
        experts.append(_part(*part[2:6]) % _numbers(part))
        if number == len(recorded.parts) or recorded.parts[number][1] != owner:
            if owner is not None:
                named = f"{_word(owner)}{behind}{_word(pseudonym(owner, tenant))}}}"
                yield "owner", owner, f"{before}{','.join(experts)}{between}{named}".encode()
            experts = []


def _numbers(part: Sequence[Any]) -> tuple[int, ...]:
    """The numbers of an expert's part, in the order of their names."""
    _, _, _, _, _, _, share, prompt_mass, prompt_positions, mass, positions = part
    return mass, positions, prompt_mass, prompt_positions, share


@lru_cache(maxsize=4096)
def _share(expert: str, owner: str | None) -> str:
    return f'{{"expert":{_literal(expert)},"owner":{_literal(owner)},"share_ppm":%d}}'


@lru_cache(maxsize=4096)
def _part(expert: str, package: str | None, agreement: str | None, version: int | None) -> str:
    agreed = _literal(None if version is None else str(version))
    return (
        f'{{"agreement":{_literal(agreement)},"agreement_version":{agreed},"completion_mass":"%d",'
        f'"completion_positions":"%d","expert":{_literal(expert)},"package":{_literal(package)},'
        f'"prompt_mass":"%d","prompt_positions":"%d","share_ppm":%d}}'
    )


def _text(value: str | None) -> str:
    """A string, or nothing, as canonical JSON."""
    return msgspec.json.encode(value).decode()


_word = lru_cache(maxsize=4096)(_text)
"""The same of a string that many requests have."""


def _literal(value: str | None) -> str:
    """The same within a format."""
    return _text(value).replace("%", "%%")
