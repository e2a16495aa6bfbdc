"""The documentation builds, its links hold, and the commands that it shows can be typed."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import typer

from flexgate.experts.io.strict_yaml import parse_yaml
from flexgate.policies.errors import ChangeRefused
from flexgate.policies.store.gitops import parse_file
from flexgate.server.cli.main import app

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted(page for page in (ROOT / "docs").glob("*.md"))]
SHOWN = [
    (page.name, words)
    for page in PAGES
    for words in re.findall(r"^\$ (?:export \S+; )?(?:\.venv/bin/)?flexgate (.+)$", page.read_text(), re.MULTILINE)
]


@pytest.mark.slow
def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stderr[-4000:]
    assert "flexgate experts revoke" in (tmp_path / "reference" / "cli.html").read_text()
    assert "/v1/agreements/{agreement_id}" in (tmp_path / "reference" / "api.html").read_text()
    codes = (tmp_path / "reference" / "errors.html").read_text()
    assert "expert_policy_denied" in codes
    assert "context_length_exceeded" in codes  # a constant of another module than those that use it


def test_the_readme_is_one_page() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 130


def test_the_quickstart_begins_with_the_readmes_session() -> None:
    def session(page: Path) -> list[str]:
        return re.findall(r"```(?:console|python)\n.*?```", page.read_text(), re.DOTALL)[:3]

    assert session(ROOT / "README.md") == session(ROOT / "docs" / "quickstart.md")


@pytest.mark.parametrize(("page", "words"), SHOWN, ids=[f"{page}: {words[:40]}" for page, words in SHOWN])
def test_a_command_that_is_shown_can_be_typed(page: str, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLEXGATE_KEY", "sk-demo-admin")  # as the pages do first
    monkeypatch.setenv("FLEXGATE_URL", "http://127.0.0.1:8000")
    words = re.split(r"\s(?:[|>]|2>)\s?", words)[0].replace("VERSION", "3").rstrip("\\ ")
    group = typer.main.get_command(app)
    context = typer.Context(group)
    name, *arguments = shlex.split(words, comments=True)
    while True:
        command = group.get_command(context, name)  # type: ignore[attr-defined]
        assert command is not None, f"{page}: {words}"
        context = command.make_context(name, list(arguments), resilient_parsing=arguments == ["--help"])
        group = context.command
        if not hasattr(group, "get_command"):
            return
        name, *arguments = arguments


def test_the_policy_guide_shows_a_file_that_is_one() -> None:
    page = (ROOT / "docs" / "policy-guide.md").read_text()
    shown = re.findall(r"```yaml\n(.*?)```", page, re.DOTALL)
    assert shown
    for text in shown:
        parse_file(parse_yaml(text.encode(), "policy-guide.md", ChangeRefused))


def test_a_page_has_one_name() -> None:
    names = re.findall(r"- ([^:\n]+): ([\w-]+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE)
    assert len(names) >= 12
    headings = {page: (ROOT / "docs" / page).read_text().partition("\n")[0] for _, page in names if page != "index.md"}
    assert headings == {page: f"# {name}" for name, page in names if page != "index.md"}


def test_the_operations_guide_explains_codes_and_log_lines_that_exist() -> None:
    section = (ROOT / "docs" / "operations.md").read_text().split("\n## When something fails\n")[1].split("\n## ")[0]
    first = [line.split("|")[1] for line in section.splitlines() if line.startswith("| ")][1:]
    codes = {code for cell in first for code in re.findall(r"`([a-z]+(?:_[a-z]+)+)`", cell)}
    sources = "".join(path.read_text() for path in (ROOT / "server").rglob("*.py"))
    assert len(codes) >= 10
    assert sorted(code for code in codes if f'"{code}"' not in sources) == []
    assert [line for line in re.findall(r'log line "([^"]+)"', section) if line not in sources] == []
