"""Questions to the demo, and what its keys may use."""

from __future__ import annotations

from typing import Any

import httpx

from flexgate.experts.demo.probes import read_probes
from flexgate.experts.demo.ship import CHECKPOINT, PROBES_NAME

PROBES = read_probes(CHECKPOINT / PROBES_NAME)
README_QUESTION = "Which Tarnholm citizen painted Norbrin Library?"

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


def said(answer: dict[str, Any]) -> str:
    choice = answer["choices"][0]
    text: str = choice["message"]["content"] if "message" in choice else choice["text"]
    return text.strip()
