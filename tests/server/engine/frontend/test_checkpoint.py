"""What a start checks is what it loads: ambiguous folders are refused, changed ones are noticed."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from enginekit.checkpoints import Shape, write_random
from enginekit.launched import launched
from safetensors.torch import load_file, save_file

from flexgate.experts.checkpoint.reader import CheckpointReader
from flexgate.experts.errors import LayoutError
from flexgate.server.engine.frontend import canary
from flexgate.server.engine.frontend.calls import ExpertInfo
from flexgate.server.engine.frontend.canary import CanaryError
from flexgate.server.engine.frontend.checkpoint import CheckpointError, read_checkpoint, require_unchanged
from flexgate.server.engine.protocol.slots import SlotMap

NAME = "model.layers.0.mlp.experts.2.up_proj.weight"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One file of weights."""
    return write_random(tmp_path_factory.mktemp("whole"), Shape(layers=1))


@pytest.fixture
def model(whole: Path, tmp_path: Path) -> Path:
    """A copy that a test may spoil."""
    return Path(shutil.copytree(whole, tmp_path / "model"))


def shard(model: Path) -> dict[str, Any]:
    """Turn one file of weights into two shards with an index; returns the index."""
    tensors = load_file(model / "model.safetensors")
    (model / "model.safetensors").unlink()
    names = sorted(tensors)
    places = {name: f"model-0000{1 + (i >= 4)}-of-00002.safetensors" for i, name in enumerate(names)}
    for file in {*places.values()}:
        save_file({name: tensors[name] for name in names if places[name] == file}, model / file, {"format": "pt"})
    index = {"metadata": {}, "weight_map": places}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    return index


def refusal(model: Path) -> str:
    """Why both the server and the tools refuse a folder, in the same words."""
    with pytest.raises(CheckpointError) as refused:
        read_checkpoint(model)
    with pytest.raises(LayoutError) as also:
        CheckpointReader(model)
    assert str(refused.value) == str(also.value)
    return str(refused.value)


def stray_beside_the_file(model: Path) -> None:
    shutil.copy(model / "model.safetensors", model / "model_old.safetensors")


def last_stray(model: Path) -> None:
    save_file({NAME: load_file(model / "model.safetensors")[NAME] * float("nan")}, model / "zz.safetensors")


def mistrals_own(model: Path) -> None:
    shutil.copy(model / "model.safetensors", model / "consolidated.safetensors")


def index_beside_the_file(model: Path) -> None:
    kept = shutil.copy(model / "model.safetensors", model.parent / "kept")
    shard(model)
    shutil.move(kept, model / "model.safetensors")


def stray_beside_shards(model: Path) -> None:
    shard(model)
    save_file({NAME: load_file(model / "model-00001-of-00002.safetensors").popitem()[1]}, model / "extra.safetensors")


def a_tensor_twice(model: Path) -> None:
    index = shard(model)
    first, second = sorted({*index["weight_map"].values()})
    tensors = load_file(model / second)
    name, tensor = load_file(model / first).popitem()
    save_file({**tensors, name: tensor}, model / second, {"format": "pt"})


def an_index_that_lies(model: Path) -> None:
    index = shard(model)
    other = {"model-00001-of-00002.safetensors": "model-00002-of-00002.safetensors"}
    index["weight_map"]["lm_head.weight"] = other[index["weight_map"]["lm_head.weight"]]
    (model / "model.safetensors.index.json").write_text(json.dumps(index))


def an_index_that_forgets(model: Path) -> None:
    index = shard(model)
    del index["weight_map"]["model.norm.weight"]
    (model / "model.safetensors.index.json").write_text(json.dumps(index))


AMBIGUOUS: dict[Callable[[Path], None], str] = {
    stray_beside_the_file: "holds 'model_old.safetensors' beside its weights, and loaders read it too: remove it",
    last_stray: "holds 'zz.safetensors' beside its weights, and loaders read it too: remove it",
    mistrals_own: "holds 'consolidated.safetensors' beside its weights, and loaders read it too: remove it",
    index_beside_the_file: "has both model.safetensors and model.safetensors.index.json: "
    "remove the one that is not meant",
    stray_beside_shards: "holds 'extra.safetensors' beside its weights, and loaders read it too: remove it",
    a_tensor_twice: "which another shard holds",
    an_index_that_lies: "says that model-00002-of-00002.safetensors holds lm_head.weight; "
    "model-00001-of-00002.safetensors does",
    an_index_that_forgets: "says that no shard holds model.norm.weight; model-00002-of-00002.safetensors does",
}


@pytest.mark.parametrize(("spoil", "sentence"), AMBIGUOUS.items(), ids=[spoil.__name__ for spoil in AMBIGUOUS])
def test_a_folder_with_more_than_one_reading_is_refused(
    model: Path, spoil: Callable[[Path], None], sentence: str
) -> None:
    spoil(model)
    assert refusal(model).endswith(sentence)


def test_one_file_and_shards_are_read_alike(model: Path) -> None:
    one = read_checkpoint(model)
    shard(model)
    two = read_checkpoint(model)
    assert (one.architecture, one.stored_dtype) == (two.architecture, two.stored_dtype)


def rewritten(path: Path, name: str) -> None:
    """Other content of the same length, and the old time of change."""
    status = (path / name).stat()
    text = (path / name).read_bytes()
    (path / name).write_bytes(text[:-1] + bytes([text[-1] ^ 1]))
    os.utime(path / name, ns=(status.st_atime_ns, status.st_mtime_ns))


def replaced(path: Path, name: str) -> None:
    """Another file of the same content, length and time of change."""
    shutil.copy2(path / name, path / "new")
    (path / "new").replace(path / name)


def put_back(path: Path, name: str) -> None:
    """The same file, after another was there in its stead."""
    (path / name).rename(path.parent / "kept")
    (path.parent / "kept").rename(path / name)


def removed(path: Path, name: str) -> None:
    (path / name).unlink()


def added(path: Path, name: str) -> None:
    (path / f"a{name}").write_text("")


@pytest.mark.parametrize("change", [rewritten, replaced, put_back, removed, added])
@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json", "chat_template.jinja"])
def test_a_file_that_changes_while_the_server_starts_is_noticed(
    model: Path, name: str, change: Callable[[Path, str], None]
) -> None:
    for text in ("tokenizer.json", "chat_template.jinja"):
        (model / text).write_text("{}")
    checkpoint = read_checkpoint(model)
    require_unchanged(checkpoint)
    change(model, name)
    with pytest.raises(CheckpointError, match=f"{name} was changed while the server started"):
        require_unchanged(checkpoint)


def test_a_link_that_leads_elsewhere_is_another_file(model: Path) -> None:
    target = (model / "config.json").rename(model.parent / "config-1")
    shutil.copy2(target, model.parent / "config-2")
    (model / "config.json").symlink_to(target)
    checkpoint = read_checkpoint(model)
    (model / "config.json").unlink()
    (model / "config.json").symlink_to(model.parent / "config-2")
    with pytest.raises(CheckpointError, match=r"config\.json was changed"):
        require_unchanged(checkpoint)


@pytest.mark.asyncio
async def test_every_expert_is_tried_alone_before_a_start_is_over(monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[str] = []

    async def refuse(*_: Any) -> None:
        return

    async def attempt(_client: Any, *refs: Any) -> None:
        tried.append(" ".join(ref.expert for ref in refs))
        if tried[-1] == "math":
            raise CanaryError("a request for 'math' computed NaN or infinity")

    monkeypatch.setattr(canary, "_must_refuse", refuse)
    monkeypatch.setattr(canary, "try_experts", attempt)
    infos = [ExpertInfo(name, "owner", "", slot, 1, True) for slot, name in enumerate(("public", "news", "math"))]
    client: Any = SimpleNamespace(experts=lambda: infos, slot_map=SlotMap(3, (b"\0\1\2",)))
    with pytest.raises(CanaryError, match="'math'"):
        await canary.self_test(None, client)
    assert tried == ["public", "news", "math"]
    tried.clear()
    client.slot_map = SlotMap(3, (b"\1\1\2", b"\0\1\2"))
    with pytest.raises(CanaryError, match="'math'"):
        await canary.self_test(None, client)
    assert tried == ["news", "math"]
    tried.clear()
    infos.pop()
    for layers, wanted in (
        ((b"\1\1\0", b"\0\1\2"), ["public", "news"]),
        ((b"\0\0\0", b"\0\1\2"), ["public", "public news"]),
        ((b"\2\2\2", b"\0\1\2"), []),
    ):
        client.slot_map = SlotMap(3, layers)
        await canary.self_test(None, client)
        assert tried == wanted
        tried.clear()


SPOILED_AFTER_THE_CHECK = """
check = launch.require_bounded

def spoil(checkpoint, *args):
    from safetensors.torch import load_file, save_file
    check(checkpoint, *args)
    file = checkpoint.path / "model.safetensors"
    tensors = load_file(file)
    tensors["model.layers.0.mlp.experts.2.up_proj.weight"][:] *= {factor}
    save_file(tensors, file, {{"format": "pt"}})

launch.require_bounded = spoil
launch.require_unchanged = {unchanged}
"""


@pytest.mark.engine
@pytest.mark.slow
@pytest.mark.parametrize(
    ("factor", "unchanged", "said"),
    [
        ("1.01", "launch.require_unchanged", "model.safetensors was changed while the server started"),
        ("float('nan')", "lambda checkpoint: None", "a request for 'expert-2' computed NaN or infinity"),
    ],
    ids=["changed", "nan"],
)
def test_weights_that_were_not_checked_do_not_start(
    model: Path, tmp_path: Path, factor: str, unchanged: str, said: str
) -> None:
    run = launched(model, tmp_path, SPOILED_AFTER_THE_CHECK.format(factor=factor, unchanged=unchanged))
    assert "SERVED" not in run.stdout
    assert said in run.stderr
