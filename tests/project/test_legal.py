"""The licence and the way to report a vulnerability are there, and the metadata and images agree with them."""

import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
LICENSE = (ROOT / "LICENSE").read_text()
SECURITY = (ROOT / "SECURITY.md").read_text()


def test_the_licence_is_the_whole_apache_licence_that_the_metadata_name() -> None:
    assert (PROJECT["license"], PROJECT["license-files"]) == ("Apache-2.0", ["LICENSE"])
    assert re.findall(r"^   ([1-9])\. ", LICENSE, re.MULTILINE) == list("123456789")
    assert LICENSE.split(maxsplit=4)[:4] == ["Apache", "License", "Version", "2.0,"]
    assert "END OF TERMS AND CONDITIONS" in LICENSE


def test_the_image_is_built_with_the_licence() -> None:
    (copied,) = re.findall(r"^COPY (pyproject\.toml .*) \./$", (ROOT / "Dockerfile").read_text(), re.MULTILINE)
    assert "LICENSE" in copied.split()


def test_the_security_page_says_how_to_report_what_is_in_scope_and_which_versions_get_fixes() -> None:
    sections = re.findall(r"^## (.+)$", SECURITY, re.MULTILINE)
    assert sections == ["Report a vulnerability", "In scope", "Not in scope", "Supported versions"]
    links = re.findall(r"\]\(([^)]+)\)", SECURITY)
    assert "docs/threat-model.md" in links
    assert [link for link in links if not (ROOT / link).is_file()] == []


def test_the_supported_versions_name_the_present_one() -> None:
    minor = PROJECT["version"].rpartition(".")[0]
    assert f"| {minor}.x |" in SECURITY
