"""What a receipt says, as salted leaves: each can be shown alone, and tells nothing of the others.

    request   what was used in all, for the tenant, auditors and administrators
    owner     what the experts of one owner did, for that owner, auditors and administrators
    hidden    what the gate left out and the tenant does not see, for auditors and administrators
    none      nothing: leaves are filled up to a multiple of four, so that they tell little of how many took part

The order of the leaves is that of their salts. Numbers that can pass 2⁵³ are decimal strings. Members are written in
the order of their names, so that their JSON is canonical (RFC 8785). What many requests have is written once.
`docs/receipts.md` is the format.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from functools import lru_cache
from itertools import groupby
from typing import Any, Final, NamedTuple

import msgspec

from flexgate.server.ledger.exclusion import excluded_of
from flexgate.server.ledger.receipts.merkle import leaf_hash

SALT_BYTES: Final = 32
FOURS: Final = 4
"""A receipt has a multiple of so many leaves."""
ROOT: Final = b"\x02"
USAGE: Final = (
    "sequence, request, registered_at, ended_at, outcome, tenant, key_id, endpoint, model, policy_version, "
    "weights_epoch, prompt_tokens, cached_tokens, completion_tokens, prompt_sha256, answer_sha256, "
    "(SELECT experts FROM catalogues WHERE number = catalogue), excluded"
)
COUNTS: Final = "completion_mass, completion_positions, prompt_mass, prompt_positions, share_ppm"
"""Of an expert in a request; in the order of their names, as JSON has them."""


class Names(NamedTuple):
    """What an expert was registered as."""

    owner: str | None
    expert: str
    package: str | None
    agreement: str | None
    agreement_version: int | None


class Recorded(NamedTuple):
    """A request as the ledger has it: the columns `USAGE`, and of each expert its names and the columns `COUNTS`."""

    usage: Sequence[Any]
    parts: Sequence[tuple[Names, Sequence[int]]]

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
        return sorted({names.owner for names, _ in self.parts if names.owner is not None})


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
    form = _form(tuple([names for names, _ in recorded.parts]))
    listed, hidden = _excluded(recorded)
    others = len(form.owners) + (hidden is not None)  # also where nothing is hidden: their number tells nothing
    size = others // FOURS * FOURS + FOURS  # with the request's own leaf
    stream = hashlib.shake_256(secret + recorded.request.encode()).digest(SALT_BYTES * (size + 1))
    opening, *salts = [stream[start : start + SALT_BYTES] for start in range(0, len(stream), SALT_BYTES)]
    shares, none, *owned = (form.text % _values(recorded, form, pseudonym)).encode().split(b"\n")
    contents: list[Content] = [("request", None, _of_request(recorded, listed, shares, policy_digest, opening))]
    contents += [("owner", owner, content) for (owner, _), content in zip(form.owners, owned, strict=True)]
    if hidden is not None:
        text = f'{{"excluded":{hidden},"kind":"hidden","receipt":{_text(recorded.request)}}}'
        contents.append(("hidden", None, text.encode()))
    contents += [("none", None, none)] * (size - len(contents))
    leaves = sorted(zip(salts, contents, strict=True))
    return Leaves(leaves, [leaf_hash(salt + content) for salt, (_, _, content) in leaves], opening)


def commitment(opening: bytes, sha256: str | None) -> str | None:
    """The salted digest of a body, by the body's own."""
    return None if sha256 is None else hashlib.sha256(opening + bytes.fromhex(sha256)).hexdigest()


def _excluded(recorded: Recorded) -> tuple[str | None, str | None]:
    """What the gate left out, as JSON: what the tenant is shown, and what is hidden from it; None of older rows."""
    catalogue, marks = recorded.usage[-2:]
    return (None, None) if catalogue is None else _left_out(catalogue, marks or "")


@lru_cache(maxsize=4096)
def _left_out(catalogue: str, marks: str) -> tuple[str, str]:
    listed, hidden = (
        msgspec.json.encode([{"expert": expert, "grade": grade} for expert, grade in grades]).decode()
        for grades in excluded_of(catalogue, marks)
    )
    return listed, hidden


def _of_request(
    recorded: Recorded, listed: str | None, shares: bytes, policy_digest: str | None, opening: bytes
) -> bytes:
    _, receipt, registered_at, ended_at, outcome, tenant, key, endpoint, model, version, epoch, *rest = recorded.usage
    prompt_tokens, cached_tokens, completion_tokens, prompt_sha256, answer_sha256, _, _ = rest
    left_out = "" if listed is None else f'"excluded":{listed},'
    before = (
        f'{{"answer_digest":{_text(commitment(opening, answer_sha256))},"cached_tokens":"{cached_tokens:d}",'
        f'"completion_tokens":"{completion_tokens:d}","ended_at":"{ended_at:d}","endpoint":{_word(endpoint)},'
        f'{left_out}"experts":['
    )
    behind = (
        f'],"key":{_word(key)},"kind":"request","model":{_word(model)},'
        f'"opening_digest":"{hashlib.sha256(opening).hexdigest()}","outcome":{_word(outcome)},'
        f'"policy_digest":{_word(policy_digest)},"policy_version":"{version:d}",'
        f'"prompt_digest":{_text(commitment(opening, prompt_sha256))},"prompt_tokens":"{prompt_tokens:d}",'
        f'"receipt":{_text(receipt)},"registered_at":"{registered_at:d}","tenant":{_word(tenant)},'
        f'"weights_epoch":"{epoch:d}"}}'
    )
    return b"".join((before.encode(), shares, behind.encode()))


class _Form(NamedTuple):
    """What requests have in common in which the same experts took part, under the same agreements.

    Attributes:
        order: places of the parts, by owner and expert.
        owners: each once, with the places of its parts.
        text: for `%`, what the other leaves say, a line each, as canonical JSON has no line breaks: the shares in the
            request's leaf, the leaf of nothing, and the leaf of each owner.
    """

    order: Sequence[int]
    owners: Sequence[tuple[str, Sequence[int]]]
    text: str


@lru_cache(maxsize=512)
def _form(experts: Sequence[Names]) -> _Form:
    """The form of parts with these names."""
    order = sorted(range(len(experts)), key=lambda place: _by_owner(experts[place]))
    lines = [",".join(_share(experts[place].expert, experts[place].owner) for place in order)]
    lines.append('{"kind":"none","receipt":%s}')
    owners = []
    for owner, group in groupby(order, key=lambda place: experts[place].owner):
        if owner is not None:
            places = list(group)
            owners.append((owner, places))
            lines.append(_of_owner(owner, [experts[place] for place in places]))
    return _Form(order, owners, "\n".join(lines))


def _by_owner(names: Names) -> tuple[bool, str, str]:
    """Sorts experts without owners first, then by owner and expert."""
    return names.owner is not None, names.owner or "", names.expert


def _of_owner(owner: str, experts: Sequence[Names]) -> str:
    return (
        f'{{"completion_tokens":"%d","ended_at":"%d","experts":[{",".join(map(_part, experts))}],"kind":"owner",'
        f'"outcome":%s,"owner":{_literal(owner)},"prompt_tokens":"%d","receipt":%s,"tenant":%s}}'
    )


@lru_cache(maxsize=4096)
def _part(names: Names) -> str:
    version = None if names.agreement_version is None else str(names.agreement_version)
    return (
        f'{{"agreement":{_literal(names.agreement)},"agreement_version":{_literal(version)},"completion_mass":"%d",'
        f'"completion_positions":"%d","expert":{_literal(names.expert)},"package":{_literal(names.package)},'
        '"prompt_mass":"%d","prompt_positions":"%d","share_ppm":%d}'
    )


@lru_cache(maxsize=4096)
def _share(expert: str, owner: str | None) -> str:
    return f'{{"expert":{_literal(expert)},"owner":{_literal(owner)},"share_ppm":%d}}'


def _values(recorded: Recorded, form: _Form, pseudonym: Callable[[str, str], str]) -> tuple[Any, ...]:
    """What the text of a form leaves open, in its order."""
    _, receipt, _, ended_at, outcome, tenant, *_, prompt_tokens, _, completion_tokens, _, _, _, _ = recorded.usage
    parts, receipt = recorded.parts, _text(receipt)
    before, behind = (completion_tokens, ended_at), (_word(outcome), prompt_tokens, receipt)
    values: list[Any] = [parts[place][1][-1] for place in form.order]
    values.append(receipt)
    for owner, places in form.owners:
        values += before
        for place in places:
            values += parts[place][1]
        values += behind
        values.append(_word(pseudonym(owner, tenant)))
    return tuple(values)


def _text(value: str | None) -> str:
    """A string, or nothing, as canonical JSON."""
    return msgspec.json.encode(value).decode()


_word = lru_cache(maxsize=4096)(_text)
"""The same of a string that many requests have."""


def _literal(value: str | None) -> str:
    """The same in what is written with `%`."""
    return _text(value).replace("%", "%%")
