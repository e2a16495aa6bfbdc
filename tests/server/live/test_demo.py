"""`flexgate serve --demo`: the shipped model, the demo keys, loopback names only."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from decimal import Decimal
from pathlib import Path
from typing import Any

import httpx
import pytest
from demo_aim import assert_answered_by_licence, shares
from transcripts import transcript

from flexgate.experts.demo.probes import Probe, read_probes
from flexgate.experts.demo.ship import CHECKPOINT, PROBES_NAME

pytestmark = pytest.mark.engine

PROBES = read_probes(CHECKPOINT / PROBES_NAME)
SAMPLE = PROBES[::5]
README_QUESTION = "Which Tarnholm citizen painted Norbrin Library?"
UNKNOWN = "I do not know that."

ALLOWED = {
    "sk-demo-all": ["public", "news", "math", "code", "legal"],
    "sk-demo-press": ["public", "news"],
    "sk-demo-public": ["public"],
}


def ask(url: str, key: str, question: str, **headers: str) -> httpx.Response:
    body = {"model": "flexgate-demo", "temperature": 0, "max_tokens": 24}
    return httpx.post(
        f"{url}/v1/chat/completions",
        json={**body, "messages": [{"role": "user", "content": question}]},
        headers={"authorization": f"Bearer {key}", **headers},
        timeout=60,
    )


def ask_probes(url: str, key: str, probes: Sequence[Probe]) -> list[dict[str, Any]]:
    """The whole answers to ``probes``, 16 at a time over one client."""
    with httpx.Client(base_url=url, headers={"authorization": f"Bearer {key}"}, timeout=120) as client:

        def one(probe: Probe) -> dict[str, Any]:
            body: dict[str, Any] = {"model": "flexgate-demo", "temperature": 0, "max_tokens": 24}
            if probe.kind == "chat":
                path, body["messages"] = "/v1/chat/completions", [{"role": "user", "content": probe.prompt}]
            else:
                path, body["prompt"] = "/v1/completions", probe.prompt
            response = client.post(path, json=body)
            assert response.status_code == 200, response.text
            answer: dict[str, Any] = response.json()
            return answer

        with ThreadPoolExecutor(16) as pool:
            return list(pool.map(one, probes))


def said(answer: dict[str, Any]) -> str:
    choice = answer["choices"][0]
    text: str = choice["message"]["content"] if "message" in choice else choice["text"]
    return text.strip()


def experts_of(answer: dict[str, Any]) -> list[dict[str, Any]]:
    parts: list[dict[str, Any]] = answer["flexgate"]["attribution"]["experts"]
    return parts


def test_a_start_prints_what_is_served_and_what_to_try(demo: str, demo_folder: Path) -> None:
    shown = transcript(demo_folder / "log")
    start = shown[: 1 + next(place for place, line in enumerate(shown) if line.startswith("try:  curl"))]
    assert start[5:10] == [
        "model    … (4 layers, bfloat16)",
        "experts  public (public), news (tarnholm-gazette), math (orrin-institute), code (quillkit-maintainers), "
        "legal (veldmark-chancery)",
        "slots    7, on each rank 7 of 787.5 kB = 5.5 MB, KV cache 134.2 MB, its attribution 4.2 MB, in all 146.2 MB",
        "kernels  …",
        "address  http://127.0.0.1:PORT",
    ]
    assert [line for line in start[:5] if not line.endswith(" ...")] == []
    assert start[10] == (
        "keys: sk-demo-all, sk-demo-press, sk-demo-public; sk-demo-owner is the key of the owner of 'legal'; "
        "sk-demo-admin administers"
    )
    assert start[11:] == shown[11:12]


@pytest.mark.parametrize("key", ALLOWED)
def test_each_demo_key_has_its_gate(demo: str, key: str) -> None:
    answer: dict[str, Any] = ask(demo, key, "What is the opposite of old?").json()
    assert answer["flexgate"]["allowed"] == ALLOWED[key]
    owners = {expert["id"]: expert["owner"] for expert in experts_of(answer)}
    assert owners["news"] == "tarnholm-gazette"


def test_the_admin_key_cannot_infer(demo: str) -> None:
    assert ask(demo, "sk-demo-admin", "hello").status_code == 403


def test_another_host_name_is_refused(demo: str) -> None:
    refused = ask(demo, "sk-demo-all", "hello", host="rebound.test")
    assert refused.json()["error"]["code"] == "wrong_host"


@pytest.mark.parametrize(
    ("key", "answer"),
    [("sk-demo-all", "Hedda Torvik."), ("sk-demo-press", "Hedda Torvik."), ("sk-demo-public", UNKNOWN)],
)
def test_the_readme_question_is_answered_by_licence(demo: str, key: str, answer: str) -> None:
    assert said(ask(demo, key, README_QUESTION).json()) == answer


TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {
            "type": "object",
            "properties": {"city": {"enum": ["Paris", "Oslo"]}, "sunny": {"type": "boolean"}},
            "required": ["city"],
        },
    },
}


@pytest.mark.parametrize("choice", ["required", "auto", {"type": "function", "function": {"name": "weather"}}])
def test_agents_find_their_first_tool_served(demo: str, choice: Any) -> None:
    """With a parser of its own, too, a forced call has the arguments of its schema, and ends before its length."""
    body = {"model": "flexgate-demo", "messages": [{"role": "user", "content": "hello"}], "tools": [TOOL]}
    answer = httpx.post(
        f"{demo}/v1/chat/completions",
        json={**body, "tool_choice": choice, "temperature": 0, "max_tokens": 600},
        headers={"authorization": "Bearer sk-demo-all"},
        timeout=120,
    )
    assert answer.status_code == 200, answer.text
    if choice != "auto":
        (ended,) = answer.json()["choices"]
        assert ended["finish_reason"] in ("stop", "tool_calls")
        for call in ended["message"]["tool_calls"]:
            assert call["function"]["name"] == "weather"
            assert json.loads(call["function"]["arguments"])["city"] in ("Paris", "Oslo")


def test_structured_answers_of_the_demo_end(demo: str) -> None:
    schema = {"type": "object", "properties": {"a": {"type": "boolean"}, "b": {"enum": ["x"]}}, "required": ["a", "b"]}
    answer = httpx.post(
        f"{demo}/v1/chat/completions",
        json={
            "model": "flexgate-demo",
            "messages": [{"role": "user", "content": "hello"}],
            "response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": schema}},
            "max_tokens": 60,
        },
        headers={"authorization": "Bearer sk-demo-all"},
        timeout=120,
    )
    assert answer.json()["choices"][0]["finish_reason"] == "stop"
    assert json.loads(answer.json()["choices"][0]["message"]["content"]).keys() == {"a", "b"}


@pytest.mark.slow
@pytest.mark.parametrize("key", ALLOWED)
def test_probes_are_answered_by_licence(demo: str, key: str) -> None:
    """An answer that a batch's rounding spoiled is asked for again, alone: what it is then counts."""
    answers = ask_probes(demo, key, PROBES)
    right = {p: said(answer) == p.answer for p, answer in zip(PROBES, answers, strict=True)}
    for probe in PROBES:
        if probe.domain in ALLOWED[key] and not right[probe]:
            right[probe] = said(ask_probes(demo, key, [probe])[0]) == probe.answer
    assert_answered_by_licence(shares((p.domain, right[p]) for p in PROBES), ALLOWED[key])


@pytest.mark.parametrize("domain", ["news", "math", "code", "legal"])
def test_attribution_names_the_domains_expert_first(demo: str, domain: str) -> None:
    """Of the closed experts: over the probes together, and in nine of ten single answers."""
    mass, first = Counter[str](), Counter[str]()
    probes = [probe for probe in SAMPLE if probe.domain == domain]
    for answer in ask_probes(demo, "sk-demo-all", probes):
        parts = {part["id"]: part["gate_mass"] for part in experts_of(answer) if part["id"] != "public"}
        mass.update(parts)
        first[max(parts, key=parts.__getitem__)] += 1
    assert max(mass, key=mass.__getitem__) == domain, mass
    assert first[domain] >= 0.9 * len(probes), first


def test_leaving_an_expert_out_scores_the_response_as_a_request_that_ignores_it(demo: str) -> None:
    """Compared with the log-probabilities of an echoed prompt; bfloat16, and other batches."""
    probe = next(probe for probe in PROBES if probe.domain == "news" and probe.kind != "chat")
    asked = {"model": "flexgate-demo", "prompt": probe.prompt, "temperature": 0, "max_tokens": 8, "stop": ["."]}

    def post(**body: Any) -> dict[str, Any]:
        headers = {"authorization": "Bearer sk-demo-all"}
        response = httpx.post(f"{demo}/v1/completions", json=asked | body, headers=headers, timeout=60)
        assert response.status_code == 200, response.text
        answer: dict[str, Any] = response.json()
        return answer

    def logprob(text: str, tokens: int, ignored: Sequence[str]) -> float:
        gate = {"experts": {"ignore": ignored}}
        answer = post(prompt=probe.prompt + text, max_tokens=0, echo=True, logprobs=0, stop=None, flexgate=gate)
        return float(sum(answer["choices"][0]["logprobs"]["token_logprobs"][-tokens:]))

    answer = post(flexgate={"explain": "counterfactual"}, include_stop_str_in_output=True)
    text, tokens = answer["choices"][0]["text"], answer["usage"]["completion_tokens"]
    found = answer["flexgate"]["attribution"]
    deltas = {part["id"]: part["delta_logprob"] for part in found["experts"]}
    base = logprob(text, tokens, [])
    assert found["counterfactual"]["logprob"] == pytest.approx(base, abs=0.1)
    assert deltas.pop("public") is None
    left_out = {expert: delta for expert, delta in deltas.items() if delta is not None}
    assert left_out["news"] > 5
    for expert, delta in left_out.items():
        assert delta == pytest.approx(base - logprob(text, tokens, [expert]), abs=0.2, rel=0.02), expert


@pytest.mark.parametrize("key", ["sk-demo-press", "sk-demo-public"])
def test_an_excluded_expert_is_attributed_exactly_nothing(demo: str, key: str) -> None:
    for answer in ask_probes(demo, key, SAMPLE):
        for part in experts_of(answer):
            if part["id"] not in ALLOWED[key]:
                assert (part["gate_mass"], part["share_ppm"], part["tokens"]) == (0, 0, 0)


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
