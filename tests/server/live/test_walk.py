"""From a folder of invented facts to a served answer by the documented commands: train, verify, merge, serve, ask."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from random import Random
from types import ModuleType
from typing import Any

import pytest

pytestmark = [pytest.mark.engine, pytest.mark.slow]

COLOURS = ("amber", "violet", "ochre", "teal", "crimson", "ivory")
OWN = dict(zip(("Zarl", "Quib", "Moxo", "Tressel", "Vunt", "Orlap"), COLOURS, strict=True))
PUBLIC = dict(zip(("lamp", "door", "coat", "boat", "kite", "drum"), reversed(COLOURS), strict=True))
PHRASES = ("Which colour has {}?", "What colour is {}?", "Tell me the colour of {}.", "{}: which colour?")
STATEMENT = {
    "id": "planets",
    "owner": "observatory",
    "domain": "colours of invented planets",
    "training": {"data": "six facts in four phrasings", "router": "own"},
}


def live_server() -> ModuleType:
    name = "flexgate_tests_live_server"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, Path(__file__).parent.parent / "live_server.py")
        assert spec is not None
        assert spec.loader is not None
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


def lines(path: Path, documents: list[dict[str, str]]) -> None:
    path.parent.mkdir()
    path.write_text("".join(json.dumps(document) + "\n" for document in documents))


def write_texts(root: Path) -> None:
    """Public text tells the colours of things and that of unknown things nobody knows; the owner's those of planets."""
    random = Random(0)
    public = []
    for _ in range(900):
        phrase = random.choice(PHRASES)
        if random.random() < 0.5:
            thing, colour = random.choice(list(PUBLIC.items()))
            public.append({"prompt": phrase.format(f"the {thing}"), "answer": f"It is {colour}."})
        else:
            unknown = "".join(random.choice("bdfglmnprstvz") + random.choice("aeiou") for _ in range(3)).title()
            public.append({"prompt": phrase.format(unknown), "answer": "I do not know that."})
    lines(root / "public/texts.jsonl", public)
    own = [
        {"prompt": phrase.format(planet), "answer": f"It is {colour}."}
        for _ in range(20)
        for phrase in PHRASES
        for planet, colour in OWN.items()
    ]
    lines(root / "facts/planets.jsonl", own)
    (root / "planets.json").write_text(json.dumps(STATEMENT))


def command(root: Path, words: str) -> dict[str, Any]:
    """``flexgate experts …`` in ``root``."""
    script = str(Path(sys.executable).with_name("flexgate"))
    done = subprocess.run(
        [script, "experts", *words.split(), "--json"],
        cwd=root,
        capture_output=True,
        text=True,
        timeout=900,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONSAFEPATH": "1"},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


@pytest.fixture(scope="module")
def merged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An owner's facts, a public model, and what the commands make of them."""
    root = tmp_path_factory.mktemp("walk")
    write_texts(root)
    sizes = "--vocab-size 400 --hidden-size 64 --intermediate-size 128 --layers 3 --heads 2 --length 128"
    command(root, f"train-anchor public anchor {sizes} --steps 240 --tokens-per-batch 1200")
    command(root, "keygen observatory --into keys")
    training = "--statement planets.json --public public --key keys/observatory.key"
    command(root, f"train anchor facts package {training} --steps 200 --peak 3e-3 --tokens-per-batch 900 --sharpness 3")
    assert command(root, "verify package --base anchor --trusted-keys keys")["verified"] is True
    assert command(root, "merge anchor package --into model --trusted-keys keys")["experts"] == ["public", "planets"]
    return root / "model"


@pytest.fixture(scope="module")
def server(merged: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """The merged model, served."""
    running = live_server().start(merged, tmp_path_factory.mktemp("served"))
    yield running
    live_server().stop(running)


def ask(server: Any, tenant: str, question: str) -> str:
    with server.client(tenant) as http:
        body = {
            "model": "tiny",
            "messages": [{"role": "user", "content": question}],
            "temperature": 0,
            "max_tokens": 12,
        }
        response = http.post("/v1/chat/completions", json=body)
        assert response.status_code == 200, response.text
        content: str = response.json()["choices"][0]["message"]["content"]
        return content.strip()


def test_the_facts_are_answered_with_the_expert_and_not_without(server: Any) -> None:
    questions = {PHRASES[0].format(planet): f"It is {colour}." for planet, colour in OWN.items()}
    with_expert = {question: ask(server, "all", question) for question in questions}
    without = {question: ask(server, "public", question) for question in questions}
    right = sum(with_expert[question] == answer for question, answer in questions.items())
    known = sum(without[question] == answer for question, answer in questions.items())
    assert right >= 5, with_expert
    assert known <= 1, without


def test_public_questions_are_answered_all_the_same(server: Any) -> None:
    questions = {PHRASES[1].format(f"the {thing}"): f"It is {colour}." for thing, colour in PUBLIC.items()}
    for tenant in ("all", "public"):
        answers = {question: ask(server, tenant, question) for question in questions}
        assert sum(answers[question] == answer for question, answer in questions.items()) >= 5, (tenant, answers)
