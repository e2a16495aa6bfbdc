"""Two ownership files, and how tests read them."""

from typing import Any

from flexgate.experts.checkpoint.ownership import Ownership, parse_ownership

WHERE = "model/flexgate.json"
DENSE = (4, 0, 4, 4)
"""Experts of each layer of the checkpoint that these tests are about."""

LISTED: dict[str, Any] = {
    "experts": [
        {"id": "public", "owner": "public", "domain": "all"},
        {"id": "news", "owner": "gazette", "domain": "news", "router": "own", "version": 3},
        {"id": "law", "owner": "chancery", "domain": "law", "router": "joint", "required": True},
        {"id": "math", "owner": "academy", "domain": "", "grade": "shared", "licence": "CC-BY-4.0"},
    ]
}
MAPPED: dict[str, Any] = {
    "ownership": "owners",
    "units": [
        {"id": "public", "owner": None, "domain": "the base model"},
        {"id": "news", "owner": "gazette", "domain": "news", "licence": "CC-BY-4.0", "grade": "removed"},
        {"id": "law", "owner": "chancery", "domain": "law", "required": True},
    ],
    "layers": {"0": [0, 1, 1, 2], "2-3": [2, 1, 0, 0]},
}


def read(content: dict[str, Any], experts_L: tuple[int, ...] = DENSE) -> Ownership:
    return parse_ownership(content, experts_L, WHERE)
