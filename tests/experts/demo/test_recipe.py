"""The whole way of the demo in small: anchor, signed packages, merge, checkpoint."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from flexgate.experts.checkpoint.base import base_identity
from flexgate.experts.demo.closed import closed_domains
from flexgate.experts.demo.measure import load
from flexgate.experts.demo.recipe import train
from flexgate.experts.demo.settings import Settings, plan
from flexgate.experts.demo.ship import digests, read_digests
from flexgate.experts.demo.stages import ANCHOR, KEYS, PACKAGES, seconds
from flexgate.experts.errors import SignatureInvalid
from flexgate.experts.package.extract import extract_expert
from flexgate.experts.package.signature import TrustedKeys
from flexgate.experts.package.verify import open_package
from flexgate.experts.training.train_anchor import Channels

pytestmark = pytest.mark.slow

SMALL = replace(
    Settings(),
    anchor=replace(
        Settings().anchor,
        plan=plan(3, 1e-3, 300),
        vocab_size=400,
        hidden_size=16,
        intermediate_size=12,
        layers=2,
        heads=2,
        channels=Channels(count=4, first_expert_layer=0, key_weight=0.3),
    ),
    tokenizer_documents=200,
    dictionary_weight=1,
    anchor_documents=60,
    registers=5,
    expert_layers=(0, 1),
    owner_documents=60,
    held_documents=20,
    owner=plan(2, 1e-3, 300),
    owner_upper=plan(2, 1e-3, 300),
    router_documents=30,
    router_public_documents=30,
)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Work directory and checkpoint."""
    root = tmp_path_factory.mktemp("demo")
    train(SMALL, root / "work", root / "checkpoint")
    return root / "work", root / "checkpoint"


def test_every_owners_package_is_signed_and_comes_back_out_of_the_merge(
    trained: tuple[Path, Path], tmp_path: Path
) -> None:
    work, checkpoint = trained
    trusted, base = TrustedKeys.from_directory(work / KEYS), base_identity(work / ANCHOR)
    for owner in closed_domains():
        package = work / PACKAGES / owner.id
        open_package(package, base=base, trusted_keys=trusted, into=tmp_path / owner.id).close()
        extract_expert(checkpoint, owner.id, tmp_path / f"{owner.id}-again")
        for path in package.iterdir():
            assert path.read_bytes() == (tmp_path / f"{owner.id}-again" / path.name).read_bytes()
    assert base_identity(checkpoint) == base


def test_the_checkpoint_is_whole_and_names_owners_and_digests(trained: tuple[Path, Path]) -> None:
    _, checkpoint = trained
    assert digests(checkpoint) == read_digests(checkpoint)
    model, _, experts = load(checkpoint)
    assert experts == ("public", "news", "math", "code", "legal")
    assert model.architecture.num_experts == 5
    manifest = json.loads((checkpoint / "flexgate.json").read_text())
    assert manifest["strictly_separable"] is True
    assert manifest["experts"][1]["owner"] == "tarnholm-gazette"


def test_a_stage_that_is_done_is_not_run_again(trained: tuple[Path, Path], tmp_path: Path) -> None:
    work, checkpoint = trained
    before = seconds(work)
    assert before.keys() == {"anchor", "news", "math", "code", "legal"}
    train(SMALL, work, tmp_path / "again")
    assert seconds(work) == before
    assert digests(tmp_path / "again") == digests(checkpoint)


def test_a_package_that_was_changed_is_not_merged(trained: tuple[Path, Path], tmp_path: Path) -> None:
    import shutil

    work = Path(shutil.copytree(trained[0], tmp_path / "work"))
    shutil.rmtree(work / "merged")
    manifest = work / PACKAGES / "code" / "manifest.json"
    manifest.write_text(manifest.read_text().replace("quillkit", "otherkit"))
    with pytest.raises(SignatureInvalid):
        train(SMALL, work, tmp_path / "checkpoint")
    assert not (tmp_path / "checkpoint").exists()


def test_the_same_seed_gives_the_same_files(trained: tuple[Path, Path], tmp_path: Path) -> None:
    train(SMALL, tmp_path / "work", tmp_path / "checkpoint")
    assert digests(tmp_path / "checkpoint") == digests(trained[1])
