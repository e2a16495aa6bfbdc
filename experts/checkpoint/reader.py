"""A checkpoint directory read as a stream: configuration and headers at once, tensors when asked, one at a time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Final

from torch import Tensor

from flexgate.experts.checkpoint.configuration import read_architecture
from flexgate.experts.checkpoint.layout import CONFIG_NAME, INDEX_NAME, WEIGHTS_NAME, Architecture, check_shapes
from flexgate.experts.errors import LayoutError, TensorFileError
from flexgate.experts.io.tensorfile import TensorFile, TensorInfo, parse_json

MAX_JSON: Final = 1 << 26
MAX_HEADER: Final = 1 << 24


class CheckpointReader:
    """An open checkpoint whose names, shapes and dtype are right; close it, or use it in a ``with`` statement.

    Raises:
        LayoutError: the directory holds no checkpoint of this layout.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._files = ExitStack()
        try:
            self.config = read_json(directory / CONFIG_NAME)
            self.architecture = read_architecture(self.config)
            self._places = open_weights(directory, self._files)
            check_shapes(self.architecture, {name: info.shape for name, info in self.infos()})
            self.dtype = self._one_dtype()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Close every file."""
        self._files.close()

    def __enter__(self) -> CheckpointReader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __contains__(self, name: str) -> bool:
        return name in self._places

    def infos(self) -> Iterator[tuple[str, TensorInfo]]:
        """Every tensor, in no particular order."""
        return ((name, file.tensors[name]) for name, file in self._places.items())

    def files(self) -> list[TensorFile]:
        """The open files, each once."""
        return list(dict.fromkeys(self._places.values()))

    def info(self, name: str) -> TensorInfo:
        """What the header says of one tensor."""
        return self._places[name].tensors[name]

    def chunks(self, name: str, first: int = 0, count: int | None = None) -> Iterator[memoryview]:
        """As ``TensorFile.chunks``."""
        return self._places[name].chunks(name, first, count)

    def read(self, name: str) -> Tensor:
        """As ``TensorFile.read``."""
        return self._places[name].read(name)

    def _one_dtype(self) -> str:
        dtypes = {info.dtype for _, info in self.infos()}
        if len(dtypes) != 1:
            raise LayoutError(f"{self.directory} mixes {' and '.join(sorted(dtypes))}, expected one dtype throughout")
        return dtypes.pop()


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object; raises ``LayoutError``."""
    try:
        if path.stat().st_size > MAX_JSON:
            raise LayoutError(f"{path} is larger than {MAX_JSON} bytes")
        return parse_json(path.read_bytes(), str(path), LayoutError)
    except OSError as error:
        raise LayoutError(f"{path} cannot be read: {error.strerror}") from error


def read_checkpoint(directory: Path) -> tuple[Architecture, dict[str, Tensor]]:
    """Architecture and all tensors of a checkpoint directory, sharded or not, in the stored dtype."""
    with CheckpointReader(directory) as checkpoint:
        return checkpoint.architecture, {name: checkpoint.read(name) for name, _ in checkpoint.infos()}


def open_weights(directory: Path, files: ExitStack) -> dict[str, TensorFile]:
    """The open file of every tensor of a checkpoint.

    Args:
        files: closes what was opened.

    Raises:
        LayoutError: no weights, weights that are not safetensors, or more than one reading of which files are the
            weights, or which of them holds a tensor.
    """
    index = _read_index(directory)
    paths = [directory / WEIGHTS_NAME] if index is None else [directory / name for name in sorted({*index.values()})]
    loose = {path for path in directory.glob("*.safetensors") if not path.name.startswith(".")}
    if stray := sorted(loose - set(paths)):
        raise LayoutError(f"{directory} holds {stray[0].name!r} beside its weights, and loaders read it too: remove it")
    places: dict[str, TensorFile] = {}
    for path in paths:
        try:
            file = files.enter_context(TensorFile.open(path, max_header=MAX_HEADER))
        except TensorFileError as error:
            raise LayoutError(str(error)) from error
        if twice := places.keys() & file.tensors.keys():
            raise LayoutError(f"{path} repeats {min(twice)}, which another shard holds")
        places |= dict.fromkeys(file.tensors, file)
    if index is not None:
        _compare(directory, index, {name: Path(file.name).name for name, file in places.items()})
    return places


def _read_index(directory: Path) -> dict[str, str] | None:
    """The shard of every tensor; None for a checkpoint of one file."""
    index, whole = directory / INDEX_NAME, directory / WEIGHTS_NAME
    if not index.is_file():
        if not whole.is_file():
            raise LayoutError(f"{directory} has neither {WEIGHTS_NAME} nor {INDEX_NAME}")
        return None
    if whole.is_file():
        raise LayoutError(f"{directory} has both {WEIGHTS_NAME} and {INDEX_NAME}: remove the one that is not meant")
    names = read_json(index).get("weight_map")
    if not isinstance(names, dict) or not names:
        raise LayoutError(f"{index} has no weight_map")
    for name in names.values():
        if not isinstance(name, str) or Path(name).name != name:
            raise LayoutError(f"{index} names a file outside its folder: {name!r}")
        if not name.endswith(".safetensors"):
            raise LayoutError(f"{index} names {name!r}, which is not called a safetensors file")
        if not (directory / name).is_file():
            raise LayoutError(f"{directory} lacks the shard {name}")
    return names


def _compare(directory: Path, index: Mapping[str, str], held: Mapping[str, str]) -> None:
    for name in sorted(index.keys() | held.keys()):
        if index.get(name) != held.get(name):
            said, found = index.get(name, "no shard"), held.get(name, "no shard")
            raise LayoutError(f"{directory / INDEX_NAME} says that {said} holds {name}; {found} does")
