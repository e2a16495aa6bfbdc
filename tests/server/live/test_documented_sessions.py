"""The sessions of README, quickstart and the page of receipts, run with the demo as they are written."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from demo_questions import ALLOWED, PROBES, README_QUESTION, ask, said

pytestmark = pytest.mark.engine


QUICKSTART = Path(__file__).parents[3] / "docs" / "quickstart.md"


def blocks(heading: str) -> list[tuple[str, str]]:
    """Language and text of each block under a heading of the quickstart."""
    section = QUICKSTART.read_text().split(f"\n## {heading}\n")[1].split("\n## ")[0]
    return re.findall(r"```(\w+)\n(.*?)```", section, re.DOTALL)


def commands(text: str) -> Iterator[tuple[str, list[str]]]:
    """Each command of a console block, with the output that is shown below it."""
    for part in re.split(r"^\$ ", text, flags=re.MULTILINE)[1:]:
        lines = part.splitlines()
        length = next(n for n, line in enumerate(lines) if not line.endswith("\\")) + 1
        yield "\n".join(lines[:length]), lines[length:]


Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def run(demo: str, demo_folder: Path, tmp_path: Path) -> Run:
    """Runs a command of the quickstart as it is written, but for the address, in a folder like the checkout."""
    (tmp_path / ".venv").symlink_to(Path(sys.executable).parents[1])
    for name in ("docs", "experts"):
        (tmp_path / name).symlink_to(QUICKSTART.parents[1] / name)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("FLEXGATE_")}
    environment |= {"FLEXGATE_STATE_DIR": str(demo_folder / "state"), "FLEXGATE_URL": demo, "PYTHONSAFEPATH": "1"}

    def run(*command: str) -> subprocess.CompletedProcess[str]:
        command = tuple(part.replace("http://127.0.0.1:8000", demo) for part in command)
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0 or command[0] == "bash", done.stderr
        return done

    return run


def shown_session() -> list[str]:
    """The README's commands that ask, and its program; a test holds that the quickstart begins with the same."""
    return re.findall(
        r"```(?:console|python)\n(.*?)```", QUICKSTART.parents[1].joinpath("README.md").read_text(), re.DOTALL
    )[1:3]


def test_the_first_session_runs_as_it_is_written(run: Run) -> None:
    """Word for word, but for the port."""
    asks, program = shown_session()
    answered = run("bash", "-c", re.sub(r"^\$ ", "", asks, flags=re.MULTILINE)).stdout.splitlines()
    assert [said.strip() for said in answered] == [
        said.strip() for said in re.findall(r'→ "(.+)"$', asks, re.MULTILINE)
    ]
    printed = run(sys.executable, "-c", program).stdout.splitlines()
    assert printed[:2] == re.findall(r"^print\(.*\)  # (.*)$", program, re.MULTILINE)[:2]


@pytest.mark.parametrize(
    ("port", "said", "reason"),
    [("", "The API key is not valid. Check the key, or ask an administrator for one.\n", ""), ("9", "", "curl: (7) ")],
    ids=["wrong key", "no server"],
)
def test_a_question_that_gets_no_answer_prints_one_sentence(run: Run, port: str, said: str, reason: str) -> None:
    asks = re.sub(r"^\$ ", "", shown_session()[0].partition("$ ask sk-")[0], flags=re.MULTILINE)
    asks = asks.replace("127.0.0.1:8000", f"127.0.0.1:{port}") if port else asks
    done = run("bash", "-c", f"{asks}\nask sk-nonsense")
    assert done.stdout == said
    assert done.stderr.startswith(reason)
    assert len(done.stderr.splitlines()) == bool(reason)


def test_a_response_says_what_the_quickstart_shows(demo: str, run: Run) -> None:
    """But for ids, versions and the last digits of routing weights."""
    (_, shown), (_, refused) = blocks("What a response says")
    differ = ("decision_id", "policy_version", "weights_epoch", "cached_prompt_tokens", "gate_mass", "share_ppm")

    def same(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: type(of).__name__ if name in differ else same(of) for name, of in value.items()}
        return [same(one) for one in value] if isinstance(value, list) else value

    answer = ask(demo, "sk-demo-press", README_QUESTION).json()
    assert same(answer["flexgate"]) == same(json.loads(shown))
    ((command, expected),) = commands(refused)
    assert run("bash", "-c", command).stdout.splitlines() == expected


def test_the_quickstarts_policy_section_runs_as_it_is_written(run: Run, tmp_path: Path) -> None:
    """Word for word, but for the port."""
    ran = 0
    for language, text in blocks("Setting a policy"):
        if language == "yaml":
            (tmp_path / "next.yaml").write_text(text)
        elif language == "python":
            expected = re.findall(r"^print\(.*\)  # (.*)$", text, re.MULTILINE)
            assert run(sys.executable, "-c", text).stdout.splitlines() == expected
            ran += 1
        else:
            for command, expected in commands(text):
                done = run("bash", "-c", command)
                found = done.stdout.splitlines()
                if " simulate " in command:  # replays what other tests have asked here, too
                    rows = {tuple(line.split()) for line in expected}
                    expected, found = sorted(rows), sorted(rows & {tuple(line.split()) for line in found})
                assert (found, done.stderr) == (expected, ""), command
                ran += 1
    assert ran == 7


def test_the_quickstarts_revoke_and_add_run_as_they_are_written(demo: str, run: Run) -> None:
    section = QUICKSTART.read_text().split("\n## Revoke an expert, and add it again\n")[1].split("\n## ")[0]
    ((_, text),) = re.findall(r"```(console)\n(.*?)```", section, re.DOTALL)
    (export, _), (revoke, _), (extract, _), (add, _) = commands(text)
    probe = next(probe for probe in PROBES if (probe.domain, probe.kind, probe.phrasing) == ("legal", "chat", "seen"))

    def answer() -> tuple[str, list[str]]:
        body = ask(demo, "sk-demo-all", probe.prompt).json()
        return said(body), body["flexgate"]["allowed"]

    everyone = ALLOWED["sk-demo-all"]
    assert answer() == (probe.answer, everyone)
    revoked = run("bash", "-c", f"{export}; {revoke}")
    assert revoked.returncode == 0, revoked.stderr
    text, allowed = answer()
    assert text != probe.answer
    assert allowed == [expert for expert in everyone if expert != "legal"]
    added = run("bash", "-c", f"{export}; {extract} && {add}")
    assert added.returncode == 0, added.stderr
    assert answer() == (probe.answer, everyone)


README = QUICKSTART.parents[1] / "README.md"


def test_an_owners_day_runs_as_the_readme_says(run: Run, tmp_path: Path) -> None:
    """Word for word, but for the port: each number of the statement follows from what the ledger and receipt say."""
    section = README.read_text().split("\n## An owner's day\n")[1].split("\n## ")[0]
    ((_, text),) = re.findall(r"```(console)\n(.*?)```", section, re.DOTALL)
    said = []
    for command, _ in commands(text):
        done = run("bash", "-c", f"set -euo pipefail; {command}")
        assert (done.returncode, done.stderr) == (0, ""), command
        said.append(done.stdout)
    asked, receipt, verified, statement, costs = said
    answer = json.loads(asked)
    assert answer["choices"][0]["message"]["content"].strip() == "Section 922."
    (leaf,) = json.loads(receipt)["leaves"]
    assert leaf["content"]["receipt"] == answer["flexgate"]["decision_id"]
    (part,) = leaf["content"]["experts"]
    shares = {one["id"]: one["share_ppm"] for one in answer["flexgate"]["attribution"]["experts"]}
    assert (part["expert"], part["agreement"]) == ("legal", "demo-veldmark-chancery")
    assert part["share_ppm"] == shares["legal"] > 0
    assert re.fullmatch(
        r"receipt\.json: OK: a copy of the receipt 'dec_\w+', number \d+ of srv_\w+, "
        r"with what experts of 'veldmark-chancery' did\n",
        verified,
    )
    first, _, line, total = statement.splitlines()
    about = r"veldmark-chancery, \d{4}-\d\d, still open: provisional: [\d,]+ requests, [\d,]+ tokens"
    assert re.fullmatch(about, first)
    agreement, expert, *_, weighted, amount, currency = line.split()
    assert (agreement, expert, currency) == ("demo-veldmark-chancery@1", "legal", "EUR")
    assert Decimal(amount) == 2 * Decimal(weighted) / 1000
    tokens = answer["usage"]["total_tokens"]
    assert Decimal(weighted) >= Decimal(part["share_ppm"] * tokens) / 10**6 > 0
    assert total == f"total {round(Decimal(amount), 2)} EUR"
    (result,) = json.loads(costs)["data"][0]["results"]
    assert (result["owner_id"], result["amount"]["currency"].upper()) == ("veldmark-chancery", "EUR")
    assert Decimal(result["amount"]["exact"]) <= Decimal(amount)


RECEIPTS = QUICKSTART.with_name("receipts.md")


def test_a_day_with_receipts_runs_as_it_is_written(run: Run, tmp_path: Path) -> None:
    """Word for word, but for the port: a tenant and an owner verify their copies of one receipt from files alone."""
    section = RECEIPTS.read_text().split("\n## A day with the demo\n")[1].split("\n## ")[0]
    said = []
    for _, text in re.findall(r"```(console)\n(.*?)```", section, re.DOTALL):
        for command, _ in commands(text):
            done = run("bash", "-c", f"set -euo pipefail; {command}")
            assert (done.returncode, done.stderr) == (0, ""), command
            said.append(done.stdout.strip())
    assert [line for line in said if line] == [said[3], said[5]]
    assert re.fullmatch(
        r"receipt\.json: OK: a copy of the receipt 'dec_[0-9a-f]{32}', number \d+ of srv_[0-9a-f]{32}, "
        r"with the request; its prompt is the given one; its answer is the given one",
        said[3],
    )
    assert re.fullmatch(r"owner\.json: OK: a copy of receipt dec_[0-9a-f]{32}, number \d+: tarnholm-gazette", said[5])
    (leaf,) = json.loads((tmp_path / "owner.json").read_text())["leaves"]
    (expert,) = leaf["content"]["experts"]
    assert (expert["expert"], expert["agreement"]) == ("news", "demo-tarnholm-gazette")
    assert re.fullmatch("[0-9a-f]{64}", expert["package"])
    assert 0 < expert["share_ppm"] < 1_000_000
