"""Grammars in the engine core, followed by processes of their own. Only what this server compiled and sealed is taken.

No step waits for a mask that is late: the request is left out of it, until the mask is there or its process has ended.
"""

import logging
from array import array
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, Final

import torch

from flexgate.server.engine.core.followers import Followers, TenantBusy
from flexgate.server.engine.protocol.constraints import open_constraint
from flexgate.server.engine.protocol.endings import CONSTRAINT_BUSY, CONSTRAINT_FAILED, CONSTRAINT_UNAVAILABLE
from flexgate.server.engine.protocol.gates import SealKey
from flexgate.server.engine.seam.engine import (
    StructuredOutputBackend,
    StructuredOutputGrammar,
    use_grammar_backend,
    xgrammar,
)

logger = logging.getLogger(__name__)

MAX_PATIENCE: Final = 0.005
"""Seconds that steps wait for masks, of one request and of all; once used up, they come back slowly."""
PATIENCE_PER_TOKEN: Final = 0.0005
PATIENCE_PER_STEP: Final = 0.0005
SHORTEST_WAIT: Final = 0.001


def take_sealed_constraints(key: SealKey) -> Followers:
    """Make this engine core follow constraints that were sealed with ``key``, and no others.

    Returns:
        The processes that follow them, which begin with the first constrained request.
    """
    followers = Followers()

    @dataclass
    class SealedConstraints(StructuredOutputBackend):
        """vLLM's compiler, which compiles nothing here."""

        def __post_init__(self) -> None:
            tokenizer = xgrammar.TokenizerInfo.from_huggingface(self.tokenizer, vocab_size=self.vocab_size)
            followers.start(tokenizer.serialize_json(), self.vocab_size)

        def compile_grammar(
            self, _request_type: Any, grammar_spec: str, stop_token_ids: set[int] | None = None
        ) -> "FollowedGrammar":
            """Have a constraint followed; raises `GrammarError` for one that is not sealed."""
            tenant, kind, text = open_constraint(grammar_spec, key)
            job = {"tenant": tenant, "kind": kind, "text": text}
            return FollowedGrammar(followers, grammar_spec, job, sorted(stop_token_ids or ()))

        def allocate_token_bitmask(self, max_num_seqs: int) -> Any:
            """Masks for so many requests."""
            return xgrammar.allocate_token_bitmask(max_num_seqs, self.vocab_size)

        def destroy(self) -> None:
            """End the processes."""
            followers.stop()

    use_grammar_backend(SealedConstraints)
    return followers


class FollowedGrammar(StructuredOutputGrammar):
    """A request's grammar: the mask for its next token, once its process has made it.

    Attributes:
        ready: the mask is there, or there will be none any more.
        failure: why there will be none, if so: the scheduler ends the request.
        patience: seconds that steps may still wait for it.
    """

    def __init__(self, followers: Followers, name: str, job: dict[str, str], stops: list[int]) -> None:
        self.ready = self._ended = False
        self.failure: str | None = None
        self.patience = MAX_PATIENCE
        self._mask: Any = None
        try:
            self._follower, self._number = followers.follow(self, name, job, stops)
        except TenantBusy:
            self.failed(CONSTRAINT_BUSY)
        except Exception:  # of no process or descriptor, for example: no fault of the request's
            logger.exception("cannot begin a process for a constraint")
            self.failed(CONSTRAINT_UNAVAILABLE)

    def check(self, token: int) -> None:
        """Fail if ``token`` is not in the mask that it was sampled under; from an empty mask, any token is sampled."""
        if self._mask is not None and not self._ended and not int(self._mask[token >> 5]) >> (token & 31) & 1:
            self.failed(CONSTRAINT_FAILED)

    def accept_tokens(self, _request_id: str, tokens: list[int]) -> bool:
        """Request the next mask, after the tokens just sampled."""
        if self.failure is None and not self._ended:
            self.ready = False
            self.patience = min(MAX_PATIENCE, self.patience + PATIENCE_PER_TOKEN)
            self._follower.advance(self._number, tokens)
        return True

    def fill_bitmask(self, bitmask: Any, batch_index: int) -> None:
        """Fill one row; without a mask all tokens are allowed, and what is sampled reaches no client."""
        if self._mask is None or not self.ready:
            self.failed(CONSTRAINT_UNAVAILABLE)
        if self.failure is None:
            bitmask[batch_index].copy_(self._mask)
        else:
            bitmask[batch_index].fill_(-1)

    def is_terminated(self) -> bool:
        """Whether the answer is complete."""
        return self._ended

    def masked(self, words: "array[int]") -> None:
        """Take what may come next."""
        self._mask, self.ready = torch.frombuffer(words, dtype=torch.int32), True

    def ended(self) -> None:
        """The answer is complete."""
        self._ended = self.ready = True

    def failed(self, reason: str) -> None:
        """No mask will come."""
        self.failure, self.ready = self.failure or reason, True

    def validate_tokens(self, tokens: list[int]) -> list[int]:
        """For speculative decoding, which constraints are not followed under."""
        raise NotImplementedError

    def rollback(self, num_tokens: int) -> None:
        """For speculative decoding."""
        raise NotImplementedError

    def reset(self) -> None:
        """For speculative decoding."""
        raise NotImplementedError


class Patience:
    """How long steps may still wait for late masks: what each request has, and never more than all have together."""

    def __init__(self, followers: Followers) -> None:
        self.followers = followers
        self.left = MAX_PATIENCE

    def wait(self, grammars: Collection[FollowedGrammar]) -> None:
        """Take the masks that were made, and wait for those of ``grammars`` that are late; once in each step."""
        self.followers.collect((), 0.0)
        self.left = min(MAX_PATIENCE, self.left + PATIENCE_PER_STEP)
        while late := [grammar for grammar in grammars if not grammar.ready and grammar.patience >= SHORTEST_WAIT]:
            if self.left < SHORTEST_WAIT:
                return
            waited = self.followers.collect(late, min(self.left, *(grammar.patience for grammar in late)))
            self.left = max(0.0, self.left - waited)
            for grammar in late:
                grammar.patience = max(0.0, grammar.patience - max(waited, SHORTEST_WAIT))
