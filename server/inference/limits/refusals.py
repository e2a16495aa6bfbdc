"""How limits are shown: OpenAI's `x-ratelimit-*` headers, and 429 with when to retry."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import NamedTuple

from flexgate.policies.documents import BILLION
from flexgate.server.http.errors import ApiError, TooMany, Unavailable


class Standing(NamedTuple):
    """One limit: how much is left of it, and in how many seconds all of it will be."""

    what: str
    limit: int
    remaining: int
    reset_s: float


class Refused(NamedTuple):
    """A refused reservation: `amount` does not fit beside what others have `used` or reserved for `wait_s` seconds.

    With a currency, all three are in billionths of it.
    """

    kind: str
    limit: int
    used: int
    amount: int
    wait_s: float
    currency: str = ""

    @property
    def nothing_left(self) -> bool:
        """Whether no request would fit, however small."""
        return self.used >= self.limit


def headers(standings: Iterable[Standing]) -> dict[str, str]:
    """The limit of each kind of which least is left."""
    found: dict[str, str] = {}
    for standing in sorted(standings, key=lambda s: -s.remaining):
        found |= {
            f"x-ratelimit-limit-{standing.what}": str(standing.limit),
            f"x-ratelimit-remaining-{standing.what}": str(standing.remaining),
            f"x-ratelimit-reset-{standing.what}": duration(standing.reset_s),
        }
    return found


def duration(seconds: float) -> str:
    """`6m0s`, `20s` or `17ms`, rounded up, as OpenAI's headers have it."""
    milliseconds = math.ceil(seconds * 1000)
    if milliseconds < 1000:
        return f"{milliseconds}ms"
    minutes, rest = divmod(math.ceil(seconds), 60)
    return f"{minutes}m{rest}s" if minutes else f"{rest}s"


def too_many_requests(refused: Refused) -> ApiError:
    message = f"{refused.kind} has reached its limit of {refused.limit} requests per minute. {_advice(refused.wait_s)}"
    return _limited(message, "requests", refused.wait_s)


def too_many_tokens(refused: Refused) -> ApiError:
    if refused.nothing_left and refused.amount <= refused.limit:
        again = "Ask" if refused.wait_s == math.inf else f"Try again in {duration(refused.wait_s)}, or ask"
        message = (
            f"{refused.kind} has reached its limit of {refused.limit} tokens per minute. {again} an administrator to "
            "raise the limit."
        )
        return _limited(message, "tokens", refused.wait_s)
    message = (
        f"{refused.kind} would exceed its limit of {refused.limit} tokens per minute: this request needs "
        f"{refused.amount}. "
        f"{_advice(refused.wait_s)}"
    )
    return _limited(message, "tokens", refused.wait_s)


def too_many_at_once(refused: Refused) -> ApiError:
    message = f"{refused.kind} has reached its limit of {refused.limit} requests running at once. {_advice(1.0)}"
    return _limited(message, "requests", 1.0)


def too_many_queued(limit: int, wait_s: float) -> ApiError:
    again = _again(wait_s)
    message = f"This project has reached its limit of {limit} prompts waiting for the engine. Try again in {again}s."
    return _limited(message, "requests", again)


def queue_full(wait_s: float) -> ApiError:
    return Unavailable(
        "The server's queue is full. Try again later.",
        code="queue_full",
        retry_after=_again(wait_s),
    )


def too_many_tokenizing(limit: int) -> ApiError:
    message = f"This project has reached its limit of {limit} tokenizer requests at once. Try again in 1s."
    return _limited(message, "requests", 1.0)


def over_budget(refused: Refused) -> ApiError:
    return _over(refused, f"{refused.limit} tokens")


def over_period(unit: str, kind: str, refused: Refused) -> ApiError:
    again = f"A new {kind} begins, in UTC, in {duration(refused.wait_s)}. " if refused.wait_s < math.inf else ""
    limit = f"{_money(refused.limit)} {refused.currency}" if refused.currency else f"{refused.limit} {unit}"
    return _over(refused, f"{limit} per {kind}", again, can_be_lower=unit != "requests")


def _over(refused: Refused, budget: str, again: str = "", *, can_be_lower: bool = True) -> ApiError:
    """A budget's refusal; what nothing is left of has no room for less, either."""
    if refused.nothing_left:
        message = (
            f"{refused.kind} has nothing left of its budget of {budget}: all of it is used, or reserved by running "
            f"requests. {again}Ask an administrator to raise the budget."
        )
    else:
        lower = "Send less, or a lower 'max_tokens', or ask" if can_be_lower else "Ask"
        message = (
            f"{refused.kind} would exceed its budget of {budget}: {_used(refused)}. "
            f"{again}{lower} an administrator to raise the budget."
        )
    return TooMany(message, code="insufficient_quota", type_="insufficient_quota")


def _used(refused: Refused) -> str:
    if refused.currency:
        used, amount = (f"{_money(number)} {refused.currency}" for number in (refused.used, refused.amount))
        return f"{used} is used or reserved, and this request may cost {amount}"
    return f"{refused.used} are used or reserved, and this request needs {refused.amount}"


def _money(billionths: int) -> str:
    """Billionths as a decimal number, without digits that say nothing."""
    whole, rest = divmod(billionths, BILLION)
    return f"{whole}.{rest:09d}".rstrip("0").rstrip(".")


def _again(wait_s: float) -> int:
    """Seconds until a queue has moved on, by what the last prompt has waited in it."""
    return min(60, max(1, math.ceil(wait_s)))


def _advice(wait_s: float) -> str:
    if wait_s == math.inf:
        return "Send a smaller request (a lower 'max_tokens'), or ask an administrator to raise the limit."
    return f"Try again in {duration(wait_s)}, or ask an administrator to raise the limit."


def _limited(message: str, what: str, wait_s: float) -> ApiError:
    retry = {} if wait_s == math.inf else {"retry-after": str(math.ceil(wait_s))}
    return TooMany(message, code="rate_limit_exceeded", type_=what, headers=retry)
