"""Only a package that is right in every byte can be opened; what can be opened is a private copy."""

from __future__ import annotations

import hashlib
import json
import os
import stat
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from packagekit import ONE, make_package, write_model
from safetensors.torch import load_file, save_file

from flexgate.experts.checkpoint.base import BaseIdentity, base_identity
from flexgate.experts.errors import (
    BaseMismatch,
    DigestMismatch,
    ManifestInvalid,
    OutputRefused,
    PackageError,
    PackageUnreadable,
    SignatureInvalid,
    WeightsInvalid,
)
from flexgate.experts.io.tensorfile import file_digest
from flexgate.experts.package.files import WEIGHTS_NAME
from flexgate.experts.package.manifest import parse_manifest
from flexgate.experts.package.signature import TrustedKeys, generate
from flexgate.experts.package.verify import VerifiedPackage, open_package
from flexgate.experts.package.weights import CheckedWeights, open_weights
from flexgate.experts.package.write import sign_package

Open = Callable[[Path], VerifiedPackage]


def resign(package: Path, stock: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change the manifest as the owner could, and sign it again."""
    manifest = json.loads((package / "manifest.json").read_text())
    change(manifest)
    (package / "manifest.json").write_text(json.dumps(manifest))
    (package / "manifest.sig").unlink()
    sign_package(package, stock / "keys/acme.key")


def rewrite(package: Path, stock: Path, tensors: dict[str, torch.Tensor], *, honest: bool = True) -> None:
    """Replace the weights as the owner could: digests and signature fit the new file."""
    save_file(tensors, package / WEIGHTS_NAME, metadata={"format": "pt"})
    whole = (package / WEIGHTS_NAME).read_bytes()

    def change(manifest: dict[str, Any]) -> None:
        digests = {
            name: hashlib.sha256(tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()).hexdigest()
            for name, tensor in tensors.items()
        }
        header = whole[8 : 8 + int.from_bytes(whole[:8], "little")]
        order = sorted(digests, key=lambda name: json.loads(header)[name]["data_offsets"])
        digest = file_digest(header, {name: digests[name] for name in order})
        manifest["weights"] = {"digest": digest, "bytes": len(whole), "tensors": digests}

    resign(package, stock, change)


def test_a_good_package_opens_with_its_layers_and_signer(stock: Path, opened: Open, tmp_path: Path) -> None:
    tensors = load_file(stock / "news" / WEIGHTS_NAME)
    with opened(stock / "news") as package:
        assert package.manifest.id == "news"
        assert package.manifest.owner == "acme"
        assert package.signer is not None
        layer = package.layer(1)
        assert torch.equal(layer.gate_proj_FH, tensors["layers.1.gate_proj.weight"])
        assert torch.equal(layer.up_proj_FH, tensors["layers.1.up_proj.weight"])
        assert torch.equal(layer.down_proj_HF, tensors["layers.1.down_proj.weight"])
        assert torch.equal(layer.router_row_H, tensors["layers.1.router.weight"])
        assert layer.router_bias is None
        assert package.directory == tmp_path / "copy"
    assert stat.S_IMODE((tmp_path / "copy").stat().st_mode) == 0o700
    assert {stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "copy").iterdir()} == {0o600}


def test_the_copy_is_used_when_the_source_changes_afterwards(package: Path, opened: Open) -> None:
    before = load_file(package / WEIGHTS_NAME)["layers.0.router.weight"].clone()  # it is mapped to the file
    with opened(package) as verified:
        (package / WEIGHTS_NAME).write_bytes(b"\xff" * 100)
        assert torch.equal(verified.layer(0).router_row_H, before)


def test_another_process_reopens_the_copy_by_its_ticket(package: Path, opened: Open) -> None:
    with opened(package) as verified, open_weights(verified.ticket) as again:
        assert again.digests == verified.weights.digests
        assert torch.equal(again.layer(0).up_proj_FH, verified.layer(0).up_proj_FH)


def test_a_copy_changed_after_the_check_is_refused_at_reopening(package: Path, opened: Open) -> None:
    with opened(package) as verified:
        path = verified.ticket.path
        damaged = bytearray(path.read_bytes())
        damaged[-1] ^= 1
        path.write_bytes(damaged)
        with pytest.raises(DigestMismatch, match="has digest"):
            open_weights(verified.ticket)


def test_nobody_else_can_make_a_verified_package(opened: Open, package: Path) -> None:
    with opened(package) as verified:
        with pytest.raises(TypeError, match="open_package"):
            VerifiedPackage(object(), verified.manifest, None, package, verified.weights)
        with pytest.raises(WeightsInvalid, match="open_package"):
            CheckedWeights(object(), verified.weights.file(), verified.ticket, {})


@pytest.mark.parametrize("name", ["manifest.json", "manifest.sig", "expert.safetensors"])
def test_a_symbolic_link_is_refused(name: str, package: Path, opened: Open, tmp_path: Path) -> None:
    (package / name).rename(tmp_path / name)
    (package / name).symlink_to(tmp_path / name)
    with pytest.raises(PackageUnreadable, match=name):
        opened(package)


@pytest.mark.parametrize("name", ["manifest.json", "manifest.sig", "expert.safetensors"])
def test_a_pipe_or_folder_in_the_place_of_a_file_is_refused_without_waiting(
    name: str, package: Path, opened: Open
) -> None:
    (package / name).unlink()
    os.mkfifo(package / name)
    with pytest.raises(PackageUnreadable, match=f"{name} is not a regular file"):
        opened(package)
    (package / name).unlink()
    (package / name).mkdir()
    with pytest.raises(PackageUnreadable, match=f"{name} is not a regular file"):
        opened(package)


def test_a_linked_package_folder_is_refused(package: Path, opened: Open, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(package)
    with pytest.raises(PackageUnreadable, match="is not a package folder"):
        opened(tmp_path / "link")


def test_a_file_too_many_is_refused(package: Path, opened: Open) -> None:
    (package / "model.py").write_text("")
    with pytest.raises(PackageUnreadable, match=r"holds 'model.py'; a package has only expert.safetensors"):
        opened(package)


@pytest.mark.parametrize("name", ["manifest.json", "expert.safetensors"])
def test_a_missing_file_is_named(name: str, package: Path, opened: Open) -> None:
    (package / name).unlink()
    with pytest.raises(PackageUnreadable, match=f"{name} cannot be opened: No such file"):
        opened(package)


def test_an_unsigned_package_opens_only_for_those_who_ask_for_no_signature(
    package: Path, opened: Open, base: BaseIdentity, tmp_path: Path
) -> None:
    (package / "manifest.sig").unlink()
    with pytest.raises(SignatureInvalid, match=r"is not signed: it has no manifest.sig"):
        opened(package)
    with open_package(package, base=base, trusted_keys=None, into=tmp_path / "own") as verified:
        assert verified.signer is None


def test_a_key_is_trusted_for_its_own_owner_only(package: Path, stock: Path, opened: Open) -> None:
    (package / "manifest.sig").unlink()
    sign_package(package, stock / "keys/other.key")
    with pytest.raises(SignatureInvalid, match="by no trusted key of 'acme'"):
        opened(package)


def test_an_owner_without_a_trusted_key_is_refused(package: Path, base: BaseIdentity, tmp_path: Path) -> None:
    with pytest.raises(SignatureInvalid, match="no key of the owner 'acme' is trusted"):
        open_package(package, base=base, trusted_keys=TrustedKeys({}), into=tmp_path / "copy")


def test_either_of_two_keys_of_an_owner_is_trusted(
    package: Path, stock: Path, base: BaseIdentity, tmp_path: Path
) -> None:
    generate("acme", tmp_path / "new")
    both = (tmp_path / "new/acme.pem").read_bytes() + (stock / "keys/acme.pem").read_bytes()
    (tmp_path / "new/acme.pem").write_bytes(both)
    trusted = TrustedKeys.from_directory(tmp_path / "new")
    open_package(package, base=base, trusted_keys=trusted, into=tmp_path / "copy").close()


def test_an_expert_of_another_base_is_refused_by_the_name_of_the_tensor(
    package: Path, opened: Open, stock: Path, tmp_path: Path
) -> None:
    write_model(tmp_path / "anchor", seed=1)
    make_package(tmp_path / "foreign", tmp_path / "anchor", key=stock / "keys/acme.key")
    with pytest.raises(BaseMismatch, match=r"another base model: shared tensor lm_head.weight differs"):
        opened(tmp_path / "foreign")


def test_a_base_of_another_width_or_dtype_is_refused_by_the_number(opened: Open, stock: Path, tmp_path: Path) -> None:
    write_model(tmp_path / "wide", replace(ONE, intermediate_size=20))
    make_package(tmp_path / "one", tmp_path / "wide", key=stock / "keys/acme.key")
    with pytest.raises(BaseMismatch, match="intermediate_size is 20, expected 12"):
        opened(tmp_path / "one")
    write_model(tmp_path / "half", dtype="bfloat16")
    make_package(tmp_path / "two", tmp_path / "half", key=stock / "keys/acme.key")
    with pytest.raises(BaseMismatch, match="stored as BF16, expected F32"):
        opened(tmp_path / "two")


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (float("nan"), "NaN or infinity"),
        (float("inf"), "NaN or infinity"),
        (-float("inf"), "NaN or infinity"),
        (3e4, r"magnitude 3e\+04, at most 10000"),
    ],
)
def test_values_that_would_poison_are_refused(
    value: float, message: str, package: Path, stock: Path, opened: Open
) -> None:
    tensors = load_file(package / WEIGHTS_NAME)
    tensors["layers.1.down_proj.weight"][3, 2] = value
    rewrite(package, stock, tensors)
    with pytest.raises(WeightsInvalid, match=rf"layers.1.down_proj.weight .*{message}"):
        opened(package)


def test_a_tensor_that_is_large_throughout_is_refused(package: Path, stock: Path, opened: Open) -> None:
    tensors = load_file(package / WEIGHTS_NAME)
    tensors["layers.0.router.weight"] += 500.0
    rewrite(package, stock, tensors)
    with pytest.raises(WeightsInvalid, match=r"layers.0.router.weight has root mean square 500.*, at most 100"):
        opened(package)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("layers.1.up_proj.weight"), r"lacks 'layers.1.up_proj.weight'|by the manifest"),
        (lambda t: t.update({"layers.2.router.weight": torch.ones(16)}), r"unknown tensor 'layers.2.router.weight'"),
        (lambda t: t.update({"../../etc/passwd": torch.ones(1)}), r"'weights.tensors.../../etc/passwd'"),
        (lambda t: t.update({"layers.0.router.bias": torch.zeros(1)}), r"lacks 'layers.1.router.bias'"),
        (lambda t: t.update({"layers.0.router.weight": torch.ones(17)}), r"has shape \[17\], expected \[16\]"),
        (lambda t: t.update({"layers.0.router.weight": torch.ones(1, 16)}), r"has shape \[1, 16\], expected \[16\]"),
        (
            lambda t: t.update({"layers.0.router.weight": torch.ones(16, dtype=torch.bfloat16)}),
            "stored as BF16, expected F32|by the manifest",
        ),
        (lambda t: t.update({"layers.0.router.weight": torch.ones(16, dtype=torch.int32)}), "has dtype 'I32'"),
        (lambda t: t.update({"layers.0.extra": torch.ones(0)}), r"shape \[0\], expected 1 to 8 positive sizes"),
    ],
)
def test_other_tensors_than_the_architectures_are_refused(
    change: Callable[[dict[str, torch.Tensor]], None], message: str, package: Path, stock: Path, opened: Open
) -> None:
    tensors = load_file(package / WEIGHTS_NAME)
    change(tensors)
    rewrite(package, stock, tensors)
    with pytest.raises(PackageError, match=message):
        opened(package)


def test_a_positive_bias_is_refused_and_a_zero_one_is_left_out(package: Path, stock: Path, opened: Open) -> None:
    tensors = load_file(package / WEIGHTS_NAME)
    for value, message in ((0.5, "a router bias is at most 0"), (0.0, "leave it out")):
        biases = {f"layers.{layer}.router.bias": torch.full((1,), value) for layer in (0, 1)}
        rewrite(package, stock, tensors | biases)
        with pytest.raises(WeightsInvalid, match=message):
            opened(package)


def test_a_negative_bias_is_read_with_its_layer(stock: Path, opened: Open, tmp_path: Path) -> None:
    _, tensors = make_package(tmp_path / "b", stock / "anchor", key=stock / "keys/acme.key", biased=True)
    with opened(tmp_path / "b") as verified:
        bias = verified.layer(1).router_bias
        assert bias is not None
        assert torch.equal(bias, tensors["layers.1.router.bias"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.update(surprise=1), "'surprise' is not a known field"),
        (lambda m: m.pop("training"), "'training' is required"),
        (lambda m: m.update(format="flexgate-expert/3"), "'format' must be 'flexgate-expert/1' or 'flexgate-expert/2'"),
        (lambda m: m.update(id="public"), "'public' is the anchor"),
        (lambda m: m.update(id="../news"), "is not an expert id"),
        (lambda m: m.update(domain="news\x1b[2J"), "control characters"),
        (lambda m: m.update(version=0), "'version'"),
        (lambda m: m["base"]["architecture"].update(num_hidden_layers=10**9), "num_hidden_layers"),
        (lambda m: m["base"].update(digest="0" * 64), "base.digest is 0000"),
        (lambda m: m["base"]["tensors"].pop("lm_head.weight"), "see 'lm_head.weight'"),
        (lambda m: m["training"].update(router="mine"), "'training.router'"),
        (lambda m: m.update(licence={"purposes": ["world-domination"]}), "is not a purpose"),
        (lambda m: m.update(licence={"duties": [{"kind": "pay"}]}), r"licence.duties\[0\]"),
    ],
)
def test_a_manifest_outside_the_format_is_refused_with_its_place(
    change: Callable[[dict[str, Any]], None], message: str, package: Path, stock: Path, opened: Open
) -> None:
    resign(package, stock, change)
    with pytest.raises(ManifestInvalid, match=message):
        opened(package)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b'{"id": "a", "id": "b"}', "duplicate key 'id'"),
        (b'{"value": NaN}', "NaN is not JSON"),
        (b"[" * 500_000, "recursion"),
        (b"\xff\xfe", "utf-8"),
        (b"[]", "must be a JSON object"),
        (b" " * (1 << 20) + b"{}", "more than 1048576 bytes"),
        (b'{"version": ' + b"9" * 10_000 + b"}", "digits"),
        (b"", "strict JSON"),
    ],
)
def test_json_bombs_and_trickery_are_refused(text: bytes, message: str, package: Path, opened: Open) -> None:
    (package / "manifest.json").write_bytes(text)
    with pytest.raises(PackageError, match=message):
        opened(package)


def test_a_digest_of_another_tensor_is_refused_by_name(package: Path, stock: Path, opened: Open) -> None:
    resign(package, stock, lambda m: m["weights"]["tensors"].update({"layers.0.router.weight": "0" * 64}))
    with pytest.raises(DigestMismatch, match=r"layers.0.router.weight does not have the SHA-256"):
        opened(package)


def test_weights_shorter_or_longer_than_the_manifest_says_are_refused(package: Path, opened: Open) -> None:
    whole = (package / WEIGHTS_NAME).read_bytes()
    for text in (whole[:-1], whole + b"\0", b""):
        (package / WEIGHTS_NAME).write_bytes(text)
        with pytest.raises(PackageUnreadable, match=f"has {len(text)} bytes, the manifest names {len(whole)}"):
            opened(package)


def test_a_refused_package_leaves_nothing_and_a_good_one_overwrites_nothing(
    package: Path, stock: Path, opened: Open, tmp_path: Path
) -> None:
    (package / WEIGHTS_NAME).write_bytes(b"")
    before = sorted(tmp_path.iterdir())
    with pytest.raises(PackageError):
        opened(package)
    assert sorted(tmp_path.iterdir()) == before
    (tmp_path / "copy").mkdir()
    with pytest.raises(OutputRefused, match="exists already"):
        opened(stock / "news")


def test_an_expert_whose_values_swap_between_check_and_use_never_shows_the_swapped_ones(
    package: Path, stock: Path, base: BaseIdentity, tmp_path: Path
) -> None:
    """A hostile owner exchanges the file while it is being copied: refused, or the checked bytes are the used ones."""
    good = (package / WEIGHTS_NAME).read_bytes()
    bad = bytearray(good)
    bad[-4:] = b"\0\0\xc0\x7f"
    trusted = TrustedKeys.from_directory(stock / "keys")
    seen = 0

    def swap(_count: int) -> None:
        nonlocal seen
        seen += 1
        (package / WEIGHTS_NAME).write_bytes(bad if seen % 2 else good)

    with open_package(package, base=base, trusted_keys=trusted, into=tmp_path / "copy", progress=swap) as verified:
        assert (verified.directory / WEIGHTS_NAME).read_bytes() == good
    assert seen > 1


def test_a_file_swapped_in_the_middle_of_copying_is_refused(
    package: Path, opened: Open, monkeypatch: pytest.MonkeyPatch, stock: Path, base: BaseIdentity, tmp_path: Path
) -> None:
    monkeypatch.setattr("flexgate.experts.package.intake.CHUNK", 1000)
    size = (package / WEIGHTS_NAME).stat().st_size

    def swap(_count: int) -> None:
        (package / WEIGHTS_NAME).write_bytes(b"\0" * size)

    trusted = TrustedKeys.from_directory(stock / "keys")
    with pytest.raises(DigestMismatch):
        open_package(package, base=base, trusted_keys=trusted, into=tmp_path / "copy", progress=swap)
    assert not (tmp_path / "copy").exists()


def test_base_identity_is_the_same_from_anchor_and_from_files_sharded_otherwise(
    stock: Path, base: BaseIdentity, tmp_path: Path
) -> None:
    write_model(tmp_path / "sharded", shard_bytes=3000)
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 2
    assert base_identity(tmp_path / "sharded").digest == base.digest


def test_a_manifest_round_trips(stock: Path) -> None:
    text = (stock / "news/manifest.json").read_bytes()
    assert parse_manifest(text).to_json() == text
