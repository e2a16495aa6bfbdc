"""``manifest.json``: who made an expert, from what, on which base model, and on which terms it is offered.

Closed and typed like the policies' documents: an unknown field is refused. The offered licence is the owner's
statement; what is in force between owner and tenants is decided by agreements, not by a package.
"""

from __future__ import annotations

import hashlib
from dataclasses import asdict
from typing import Annotated, Final, Literal, Self, TypeVar

from pydantic import AfterValidator, Field, StringConstraints, ValidationError, model_validator

from flexgate.experts.checkpoint.base import BaseArchitecture, BaseIdentity
from flexgate.experts.errors import LayoutError, ManifestInvalid, SizeInvalid
from flexgate.experts.io.tensorfile import parse_json
from flexgate.experts.package.files import MANIFEST_NAME
from flexgate.experts.package.size import FULL, ExpertSize
from flexgate.policies.agreements import (
    Document,
    Duty,
    LicenseExpression,
    ListOf,
    PurposeField,
    RegionField,
    require_executed,
)
from flexgate.policies.field_errors import first_field_error, path_of
from flexgate.policies.ids import PUBLIC, ExpertId, ExpertIdField, OwnerIdField

MAX_MANIFEST: Final = 1 << 20
Format = Literal["flexgate-expert/1", "flexgate-expert/2"]
FORMATS: Final[tuple[Format, Format]] = ("flexgate-expert/1", "flexgate-expert/2")
"""Of full experts, and of those that say their rank or width."""


D = TypeVar("D", bound=Document)


def _printable(text: str) -> str:
    if not text.isprintable():
        raise ValueError("control characters are not allowed")
    return text


def _closed(expert: ExpertId) -> ExpertId:
    if expert == PUBLIC:
        raise ValueError("'public' is the anchor, not an expert")
    return expert


def _executed(duties: tuple[Duty, ...]) -> tuple[Duty, ...]:
    require_executed(duties)
    return duties


Sha256 = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
Words = Annotated[str, StringConstraints(min_length=1, max_length=500), AfterValidator(_printable)]
Name = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_.\[\]-]{1,120}$")]
Count = Annotated[int, Field(ge=0, lt=1 << 53)]
Size = Annotated[int, Field(ge=1, le=1 << 24)]
Finite = Annotated[float, Field(allow_inf_nan=False)]


class Numbers(Document):
    """``BaseArchitecture`` on the wire."""

    vocab_size: Size
    hidden_size: Size
    intermediate_size: Size
    num_hidden_layers: Annotated[int, Field(ge=1, le=1024)]
    num_attention_heads: Size
    num_key_value_heads: Size
    rope_theta: Annotated[float, Field(gt=0, allow_inf_nan=False)]
    rms_norm_eps: Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)]
    norm_topk_prob: Annotated[bool, Field(strict=True)]
    tie_word_embeddings: Annotated[bool, Field(strict=True)] = False


class Base(Document):
    """The base model, so exactly that a difference can be named."""

    architecture: Numbers
    dtype: Literal["F32", "BF16"]
    digest: Sha256
    tensors: Annotated[dict[Name, Sha256], Field(max_length=1 << 14)]

    @classmethod
    def of(cls, identity: BaseIdentity) -> Base:
        """The wire form of an identity."""
        numbers = Numbers(**asdict(identity.architecture))
        return cls.model_validate(
            {
                "architecture": numbers,
                "dtype": identity.dtype,
                "digest": identity.digest,
                "tensors": dict(sorted(identity.tensors.items())),
            }
        )

    def identity(self) -> BaseIdentity:
        """The identity; raises ``ManifestInvalid`` where digest and tensors do not fit together."""
        identity = BaseIdentity(BaseArchitecture(**self.architecture.model_dump()), self.dtype, self.tensors)
        try:
            digest = identity.digest
        except LayoutError as error:
            raise ManifestInvalid(f"{MANIFEST_NAME}: base: {error}") from error
        if digest != self.digest:
            raise ManifestInvalid(f"{MANIFEST_NAME}: base.digest is {self.digest}, its tensors make {digest}")
        return identity


class Training(Document):
    """How the expert came about. ``router`` says whether strict opt-out can hold.

    ``own``: the router row was trained by its owner on own and public text. ``joint``: after a merge, with other
    owners' experts in place. ``unknown``: extracted from a model that does not say.
    """

    data: Words
    documents: Count | None = None
    tokens: Count | None = None
    router: Literal["own", "joint", "unknown"]
    recipe: Annotated[dict[Name, Words], Field(max_length=64, default_factory=dict)]


class Licence(Document):
    """The terms on which the owner offers the expert; words and types are those of agreements.

    Duties that no agreement could have are refused here, too. What is owed is what an agreement says, not a package.
    """

    license_expression: LicenseExpression | None = None
    terms_uri: Annotated[str, StringConstraints(pattern=r"^https://\S{1,2000}$")] | None = None
    terms_sha256: Sha256 | None = None
    purposes: Annotated[ListOf[PurposeField], Field(min_length=1, max_length=64)] | None = None
    regions: Annotated[ListOf[RegionField], Field(min_length=1, max_length=300)] | None = None
    duties: Annotated[ListOf[Duty], Field(max_length=16), AfterValidator(_executed)] = ()


class Figure(Document):
    """One measured number."""

    name: Name
    value: Finite
    unit: Words
    on: Words
    """What was measured, in words."""


class Statement(Document):
    """The part of the manifest that people write."""

    id: Annotated[ExpertIdField, AfterValidator(_closed)]
    version: Annotated[int, Field(ge=1, lt=1 << 31)] = 1
    owner: OwnerIdField
    owner_name: Words | None = None
    domain: Words
    training: Training
    licence: Licence = Licence()
    evaluation: Annotated[ListOf[Figure], Field(max_length=256)] = ()


class Weights(Document):
    """``expert.safetensors``: every tensor, and the whole file (``tensorfile.file_digest``)."""

    digest: Sha256
    bytes: Count
    tensors: Annotated[dict[Name, Sha256], Field(max_length=1 << 13)]


class Manifest(Statement):
    """The whole of ``manifest.json``."""

    format: Format = "flexgate-expert/1"
    rank: int | None = None
    width: int | None = None
    base: Base
    weights: Weights

    @property
    def size(self) -> ExpertSize:
        """How much of an expert the package holds."""
        return ExpertSize(self.rank, self.width)

    @model_validator(mode="after")
    def _check_size(self) -> Self:
        if self.format != (expected := FORMATS[self.size != FULL]):
            said = "without rank and width" if self.size == FULL else f"of {self.size}"
            raise ValueError(f"'format' is {self.format!r}, and that of a package {said} is {expected!r}")
        try:
            self.size.check(BaseArchitecture(**self.base.architecture.model_dump()))
        except SizeInvalid as error:
            raise ValueError(str(error)) from None
        return self

    def to_json(self) -> bytes:
        """The bytes that are written and signed."""
        return (self.model_dump_json(indent=1, exclude_none=True) + "\n").encode()


def parse_manifest(text: bytes) -> Manifest:
    """Read ``manifest.json``; raises ``ManifestInvalid`` with the place and what was expected there."""
    if len(text) > MAX_MANIFEST:
        raise ManifestInvalid(f"{MANIFEST_NAME} has more than {MAX_MANIFEST} bytes")
    return _validated(Manifest, text, MANIFEST_NAME)


def parse_statement(text: bytes, where: str) -> Statement:
    """Read what the owner wrote for a new package; raises ``ManifestInvalid``."""
    return _validated(Statement, text, where)


def sha256(text: bytes) -> str:
    """Hexadecimal SHA-256."""
    return hashlib.sha256(text).hexdigest()


def _validated(kind: type[D], text: bytes, where: str) -> D:
    value = parse_json(text, where, ManifestInvalid)
    try:
        return kind.model_validate(value)
    except ValidationError as error:
        found = first_field_error(error)
        place = (path_of(found.place) or "the document")[:200]
        raise ManifestInvalid(f"{where}: {found.about(f'{place!a}')[:500]}") from error
