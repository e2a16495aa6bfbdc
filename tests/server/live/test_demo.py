"""`flexgate serve --demo`: the shipped model, the demo keys, loopback names only."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from demo_aim import assert_answered_by_licence, shares
from demo_questions import ALLOWED, PROBES, README_QUESTION, ask, said
from transcripts import transcript

from flexgate.experts.demo.probes import Probe

pytestmark = pytest.mark.engine
SAMPLE = PROBES[::5]
UNKNOWN = "I do not know that."


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
