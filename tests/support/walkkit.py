"""A folder of invented facts and the documented commands that make a model of it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from random import Random
from typing import Any

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


def make_model(root: Path) -> Path:
    """Train a public model and an owner's expert, verify, merge; in ``root``, which ends up holding ``model``."""
    write_texts(root)
    sizes = "--vocab-size 400 --hidden-size 64 --intermediate-size 128 --layers 3 --heads 2 --length 128"
    command(root, f"train-anchor public anchor {sizes} --steps 240 --tokens-per-batch 1200")
    command(root, "keygen observatory --into keys")
    training = "--statement planets.json --public public --key keys/observatory.key"
    command(root, f"train anchor facts package {training} --steps 200 --peak 3e-3 --tokens-per-batch 900 --sharpness 3")
    assert command(root, "verify package --base anchor --trusted-keys keys")["verified"] is True
    assert command(root, "merge anchor package --into model --trusted-keys keys")["experts"] == ["public", "planets"]
    return root / "model"


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
