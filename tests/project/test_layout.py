"""The four folders, the package list and the wheel say the same."""

import importlib.util
import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FOLDERS = ("policies", "kernels", "experts", "server")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def packages_on_disk() -> set[str]:
    return {
        "flexgate." + ".".join(folder.relative_to(ROOT).parts)
        for top in FOLDERS
        for folder in [ROOT / top, *(ROOT / top).rglob("*")]
        if folder.is_dir() and folder.name != "__pycache__" and any(folder.glob("*.py"))
    }


def shipped_files() -> set[str]:
    return {
        "flexgate/" + path.relative_to(ROOT).as_posix()
        for top in FOLDERS
        for path in (ROOT / top).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }


def test_every_folder_with_code_is_listed_as_a_package() -> None:
    assert set(PROJECT["tool"]["setuptools"]["packages"]) == packages_on_disk()


def test_no_folder_at_the_root_shadows_the_package() -> None:
    assert not (ROOT / "flexgate").exists()


def test_the_root_is_not_importable_so_hugging_face_kernels_stays_itself() -> None:
    assert str(ROOT) not in sys.path
    found = importlib.util.find_spec("kernels")
    assert found is None or ROOT not in Path(str(found.origin)).parents


def test_shipped_code_imports_itself_by_its_full_name() -> None:
    pattern = re.compile(r"^\s*(?:from|import) (?:\.|policies\b|kernels\b|experts\b|server\b)", re.MULTILINE)
    found = [path for top in FOLDERS for path in (ROOT / top).rglob("*.py") if pattern.search(path.read_text())]
    assert found == []


def test_nothing_that_ships_imports_a_benchmark() -> None:
    names = "|".join(sorted(folder.name for folder in (ROOT / "benchmarks").iterdir() if any(folder.glob("*.py"))))
    pattern = re.compile(rf"^\s*(?:from|import) (?:benchmarks|{names})\b", re.MULTILINE)
    found = [path for top in FOLDERS for path in (ROOT / top).rglob("*.py") if pattern.search(path.read_text())]
    assert found == []


@pytest.mark.slow
def test_the_wheel_holds_every_file_of_the_four_folders(tmp_path: Path) -> None:
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", tmp_path, ROOT],
        check=True,
        timeout=300,
    )
    (wheel,) = tmp_path.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    assert shipped_files() - names == set()
