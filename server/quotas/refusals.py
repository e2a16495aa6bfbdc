"""How limits are told: OpenAI's `x-ratelimit-*` headers, and 429 with what would change it."""

from __future__ import annotations

import math
from collections.abc import Iterable
from http import HTTPStatus
from typing import NamedTuple

from flexgate.server.errors import ApiError


class Standing(NamedTuple):
    """One limit: how much is left of it, and in how many seconds all of it will be."""

    what: str
    limit: int
    remaining: int
    reset_s: float


def headers(standings: Iterable[Standing]) -> dict[str, str]:
    """The limit of each kind of which least is left."""
    told: dict[str, str] = {}
    for standing in sorted(standings, key=lambda s: -s.remaining):
        told |= {
            f"x-ratelimit-limit-{standing.what}": str(standing.limit),
            f"x-ratelimit-remaining-{standing.what}": str(standing.remaining),
            f"x-ratelimit-reset-{standing.what}": duration(standing.reset_s),
        }
    return told


def duration(seconds: float) -> str:
    """`6m0s`, `20s` or `17ms`, rounded up, as OpenAI's headers have it."""
    milliseconds = math.ceil(seconds * 1000)
    if milliseconds < 1000:
        return f"{milliseconds}ms"
    minutes, rest = divmod(math.ceil(seconds), 60)
    return f"{minutes}m{rest}s" if minutes else f"{rest}s"


def too_many_requests(kind: str, limit: int, wait_s: float) -> ApiError:
    message = f"{kind} may make {limit} requests per minute. {_advice(wait_s)}"
    return _limited(message, "requests", wait_s)


def too_many_tokens(kind: str, limit: int, asked: int, wait_s: float) -> ApiError:
    message = f"{kind} may use {limit} tokens per minute, and this request asks for {asked}. {_advice(wait_s)}"
    return _limited(message, "tokens", wait_s)


def too_many_at_once(kind: str, limit: int) -> ApiError:
    message = f"{kind} may have {limit} requests running at once. {_advice(1.0)}"
    return _limited(message, "requests", 1.0)


def too_many_tokenizing(limit: int) -> ApiError:
    message = f"This project may have {limit} requests for the tokenizer at once. Trying again in 1s would change this."
    return _limited(message, "requests", 1.0)


def over_budget(kind: str, budget: int, spent: int, asked: int) -> ApiError:
    message = (
        f"{kind} has a budget of {budget} tokens, of which {spent} are used or reserved, and this request asks "
        f"for {asked}. An administrator raising the budget would change this."
    )
    return ApiError(message, status=HTTPStatus.TOO_MANY_REQUESTS, code="insufficient_quota", type_="insufficient_quota")


def _advice(wait_s: float) -> str:
    if wait_s == math.inf:
        return "A smaller request, or an administrator raising the limit, would change this."
    return f"Trying again in {duration(wait_s)}, or an administrator raising the limit, would change this."


def _limited(message: str, what: str, wait_s: float) -> ApiError:
    retry = {} if wait_s == math.inf else {"retry-after": str(math.ceil(wait_s))}
    status = HTTPStatus.TOO_MANY_REQUESTS
    return ApiError(message, status=status, code="rate_limit_exceeded", type_=what, headers=retry)
