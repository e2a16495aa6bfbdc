"""Detached Ed25519 signatures over ``manifest.json``, which names the digest of every other byte of a package.

Keys are ordinary PEM files (``openssl pkey`` reads them). Trust is a folder with one file ``OWNER.pem`` per owner,
which may hold several public keys: a key is trusted for its owner's packages only. Nothing here uses a network or a
clock.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
    load_pem_public_key,
)

from flexgate.experts.errors import KeyInvalid, SignatureInvalid
from flexgate.experts.io.output import require_absent, write_new

SIGNATURE_BYTES: Final = 64
MAX_KEY_FILE: Final = 1 << 16
_OWNER: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")
_FORM: Final = "1 to 63 characters from A-Z, a-z, 0-9, '.', '_' and '-', beginning with a letter or digit"
_PUBLIC_KEYS: Final = re.compile(rb"-----BEGIN PUBLIC KEY-----.*?-----END PUBLIC KEY-----\s*", re.DOTALL)


@dataclass(frozen=True)
class TrustedKeys:
    """The public keys of every owner whose packages may be used."""

    by_owner: Mapping[str, tuple[Ed25519PublicKey, ...]]

    @classmethod
    def from_directory(cls, directory: Path) -> TrustedKeys:
        """Read ``OWNER.pem`` files; raises ``KeyInvalid`` for anything that is none."""
        if not directory.is_dir():
            raise KeyInvalid(f"{directory} is not a folder of trusted keys (one OWNER.pem per owner)")
        paths = sorted(directory.glob("*.pem"))
        return cls({_owner(path): read_public_keys(path) for path in paths})

    def signer(self, owner: str, message: bytes, signature: bytes) -> str:
        """The id of the owner's key that signed ``message``; raises ``SignatureInvalid`` if none did."""
        keys = self.by_owner.get(owner, ())
        if not keys:
            raise SignatureInvalid(f"no key of the owner {owner!r} is trusted")
        for key in keys:
            try:
                key.verify(signature, message)
            except InvalidSignature:
                continue
            return key_id(key)
        raise SignatureInvalid(f"the signature is by no trusted key of {owner!r}, or the manifest was changed after it")


def key_id(key: Ed25519PublicKey) -> str:
    """The first 16 hexadecimal digits of the SHA-256 of the raw public key."""
    return hashlib.sha256(key.public_bytes(Encoding.Raw, PublicFormat.Raw)).hexdigest()[:16]


def generate(owner: str, directory: Path) -> tuple[Path, Path]:
    """Make a new pair and write it."""
    return write_keys(owner, directory, Ed25519PrivateKey.generate())


def write_keys(owner: str, directory: Path, key: Ed25519PrivateKey) -> tuple[Path, Path]:
    """Write a pair as ``OWNER.key`` (mode 0600) and ``OWNER.pem``; never over existing files."""
    if not _OWNER.fullmatch(owner):
        raise KeyInvalid(f"{owner!r} is not an owner id; use {_FORM}")
    private = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    public = key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    paths = directory / f"{owner}.key", directory / f"{owner}.pem"
    for path in paths:
        require_absent(path)
    directory.mkdir(parents=True, exist_ok=True)
    write_new(paths[0], private, mode=0o600)
    write_new(paths[1], public)
    return paths


def read_private_key(path: Path) -> Ed25519PrivateKey:
    """An unencrypted PEM private key; raises ``KeyInvalid``."""
    try:
        key = load_pem_private_key(_read(path), password=None)
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise KeyInvalid(f"{path} is not an unencrypted PEM private key: {error}") from error
    if not isinstance(key, Ed25519PrivateKey):
        raise KeyInvalid(f"{path} holds a key of another kind, expected Ed25519")
    return key


def read_public_keys(path: Path) -> tuple[Ed25519PublicKey, ...]:
    """One or more PEM public keys; raises ``KeyInvalid``."""
    text = _read(path)
    blocks = _PUBLIC_KEYS.findall(text)
    if not blocks or b"".join(blocks).strip() != text.strip():
        raise KeyInvalid(f"{path} must hold PEM public keys and nothing else")
    keys = []
    for block in blocks:
        try:
            key = load_pem_public_key(block)
        except (ValueError, UnsupportedAlgorithm) as error:
            raise KeyInvalid(f"{path} holds a damaged public key: {error}") from error
        if not isinstance(key, Ed25519PublicKey):
            raise KeyInvalid(f"{path} holds a key of another kind, expected Ed25519")
        keys.append(key)
    return tuple(keys)


def _owner(path: Path) -> str:
    if not _OWNER.fullmatch(path.stem):
        raise KeyInvalid(f"{path}: {path.stem!r} is not an owner id; use {_FORM}")
    return path.stem


def _read(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            text = file.read(MAX_KEY_FILE + 1)
    except OSError as error:
        raise KeyInvalid(f"{path} cannot be read: {error.strerror}") from error
    if len(text) > MAX_KEY_FILE:
        raise KeyInvalid(f"{path} is too large for a key file")
    return text
