"""Keys that sign packages: made private, and of one kind."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1, generate_private_key
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from flexgate.experts.errors import KeyInvalid, OutputRefused
from flexgate.experts.package.signature import TrustedKeys, generate, read_private_key, read_public_keys


def test_keys_are_made_private_never_overwritten_and_only_ed25519(tmp_path: Path) -> None:
    private, public = generate("acme", tmp_path / "keys")
    assert stat.S_IMODE(private.stat().st_mode) == 0o600
    assert read_public_keys(public)[0] == read_private_key(private).public_key()
    with pytest.raises(OutputRefused, match="exists already"):
        generate("acme", tmp_path / "keys")
    with pytest.raises(KeyInvalid, match="is not an owner id"):
        generate("../acme", tmp_path / "keys")
    other = generate_private_key(SECP256R1()).private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    (tmp_path / "other.key").write_bytes(other)
    with pytest.raises(KeyInvalid, match="another kind, expected Ed25519"):
        read_private_key(tmp_path / "other.key")
    (tmp_path / "keys/acme.pem").write_text("hello")
    with pytest.raises(KeyInvalid, match="must hold PEM public keys"):
        TrustedKeys.from_directory(tmp_path / "keys")
