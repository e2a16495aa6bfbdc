"""Keys that sign receipts: a file, or a program that has the key elsewhere; and public keys as a JWK set (RFC 8037)."""

from __future__ import annotations

import base64
import hashlib
import os
import shlex
import stat
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Protocol

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat

from flexgate.experts.errors import ExpertsError
from flexgate.experts.io.output import write_new
from flexgate.experts.package.signature import read_private_key, read_public_keys

SECONDS: Final = 10.0
"""How long a signing program may take."""
MOST_BYTES: Final = 1024


class SignerUnavailable(Exception):
    """Nothing can be signed now; the message says why and what to do."""


class Signer(Protocol):
    """What signs with one key."""

    def public_key(self) -> bytes:
        """The raw Ed25519 key, 32 bytes; raises `SignerUnavailable`."""

    def sign(self, message: bytes) -> bytes:
        """A signature of 64 bytes; raises `SignerUnavailable`."""


@dataclass(frozen=True, slots=True)
class KeyFile:
    """A PEM file with an Ed25519 private key. It is read for each signature, so that another key in it is noticed."""

    path: Path

    def public_key(self) -> bytes:
        return raw_public_key(self._key().public_key())

    def sign(self, message: bytes) -> bytes:
        return self._key().sign(message)

    def make(self) -> None:
        """Write a new key, which only this user may read; raises `SignerUnavailable` where the file exists."""
        private = Ed25519PrivateKey.generate().private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
        try:
            write_new(self.path, private, mode=0o600)
        except ExpertsError as error:
            raise SignerUnavailable(f"the receipt key cannot be made: {error}") from error

    def _key(self) -> Ed25519PrivateKey:
        try:
            mode = stat.S_IMODE(self.path.stat().st_mode)
            key = read_private_key(self.path)
        except OSError as error:
            raise SignerUnavailable(
                f"the receipt key {self.path} cannot be read: {error.strerror}; restore the file"
            ) from error
        except ExpertsError as error:
            raise SignerUnavailable(f"the receipt key cannot be used: {error}; restore the file") from error
        if mode & 0o077:
            raise SignerUnavailable(
                f"the receipt key {self.path} may be read by others (mode {mode:04o}): change its mode to 0600, and "
                "rotate it where others may have read it"
            )
        return key


@dataclass(frozen=True, slots=True)
class Program:
    """A program that gets the message on its standard input, and prints the signature in hexadecimal.

    Its public key is in a PEM file. It gets no environment but PATH and HOME.
    """

    command: str
    public: Path

    def public_key(self) -> bytes:
        try:
            keys = read_public_keys(self.public)
        except ExpertsError as error:
            raise SignerUnavailable(f"the public key of the receipt signer cannot be used: {error}") from error
        if len(keys) != 1:
            raise SignerUnavailable(
                f"{self.public} holds {len(keys)} public keys: leave the receipt signer's alone in it"
            )
        return raw_public_key(keys[0])

    def sign(self, message: bytes) -> bytes:
        environment = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
        try:
            done = subprocess.run(
                shlex.split(self.command),
                input=message,
                capture_output=True,
                timeout=SECONDS,
                env=environment,
                check=False,
            )
        except (OSError, ValueError, subprocess.TimeoutExpired) as error:
            raise SignerUnavailable(f"the receipt signer '{self.command}' does not answer: {error}") from error
        if done.returncode:
            said = done.stderr.decode(errors="replace").strip()[-200:]
            raise SignerUnavailable(f"the receipt signer '{self.command}' ended with {done.returncode}: {said!r}")
        try:
            signature = bytes.fromhex(done.stdout[:MOST_BYTES].decode("ascii").strip())
        except ValueError:
            signature = b""
        if not is_signed(self.public_key(), message, signature):
            raise SignerUnavailable(
                f"the receipt signer '{self.command}' did not print a signature with the key in {self.public}: "
                "128 hexadecimal digits are expected"
            )
        return signature


def raw_public_key(key: Ed25519PublicKey) -> bytes:
    """32 bytes."""
    return key.public_bytes(Encoding.Raw, PublicFormat.Raw)


def is_signed(public_key: bytes, message: bytes, signature: bytes) -> bool:
    """Whether a signature is that of a message."""
    try:
        Ed25519PublicKey.from_public_bytes(public_key).verify(signature, message)
    except (InvalidSignature, ValueError):
        return False
    return True


def base64url(data: bytes) -> str:
    """Without padding."""
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


def thumbprint(public_key: bytes) -> str:
    """The key's id: its JWK thumbprint (RFC 7638)."""
    text = f'{{"crv":"Ed25519","kty":"OKP","x":"{base64url(public_key)}"}}'
    return base64url(hashlib.sha256(text.encode()).digest())


def jwk(public_key: bytes) -> dict[str, Any]:
    """A public key as others read it; its members are in the order of their names."""
    return {
        "alg": "EdDSA",
        "crv": "Ed25519",
        "kid": thumbprint(public_key),
        "kty": "OKP",
        "use": "sig",
        "x": base64url(public_key),
    }
