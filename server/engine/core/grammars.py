"""Grammars in the engine core: made of nothing but what the API process had compiled elsewhere first, and sealed.

Masks are made beside the step, which goes on without one that is late; the scheduler ends that request.
"""

import threading
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

from flexgate.server.engine.core.step_thread import StepThread, TooLate
from flexgate.server.engine.protocol.constraints import open_constraint
from flexgate.server.engine.protocol.gates import SealKey
from flexgate.server.engine.seam.engine import (
    StructuredOutputOptions,
    XgrammarBackend,
    XgrammarGrammar,
    use_grammar_backend,
    xgrammar,
)

MAX_KEPT_BYTES: Final = 256 << 20
"""Of compiled grammars that no request may need any more."""
_KINDS: Final = {
    "json": StructuredOutputOptions.JSON,
    "regex": StructuredOutputOptions.REGEX,
    "grammar": StructuredOutputOptions.GRAMMAR,
    "structural_tag": StructuredOutputOptions.STRUCTURAL_TAG,
}


def take_sealed_constraints(key: SealKey) -> None:
    """Make this engine core compile constraints that were sealed with ``key``, and no others."""

    @dataclass
    class SealedConstraints(XgrammarBackend):
        """vLLM's compiler for sealed constraints alone, which works beside the steps."""

        def __post_init__(self) -> None:
            super().__post_init__()
            # As it was tried. xgrammar's own cache fails on repeats within a schema that compile without it.
            tokenizer = xgrammar.TokenizerInfo.from_huggingface(self.tokenizer, vocab_size=self.vocab_size)
            self.compiler = xgrammar.GrammarCompiler(tokenizer, max_threads=1, cache_enabled=False)
            self._made = MadeGrammars(MAX_KEPT_BYTES)

        def compile_grammar(
            self, _request_type: Any, grammar_spec: str, stop_token_ids: set[int] | None = None
        ) -> "WatchedGrammar":
            """Compile a sealed constraint, unless it is kept; raises `GrammarError`."""
            kind, text = open_constraint(grammar_spec, key)
            compiled = self._made.get(grammar_spec, lambda: self._compiled(kind, text))
            matcher = xgrammar.GrammarMatcher(compiled, override_stop_tokens=sorted(stop_token_ids or ()) or None)
            return WatchedGrammar(vocab_size=self.vocab_size, matcher=matcher, ctx=compiled)

        def _compiled(self, kind: str, text: str) -> Any:
            return super().compile_grammar(_KINDS[kind], text).ctx

    use_grammar_backend(SealedConstraints)


class MadeGrammars:
    """Compiled grammars by their sealed constraints, the least used of which go first; safe from any thread."""

    def __init__(self, most_bytes: int) -> None:
        self._most, self._bytes = most_bytes, 0
        self._made: OrderedDict[str, Any] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, name: str, compile_it: Callable[[], Any]) -> Any:
        """The grammar of that name; two threads may compile it at once."""
        with self._lock:
            if name in self._made:
                self._made.move_to_end(name)
                return self._made[name]
        made = compile_it()
        with self._lock:
            if name not in self._made:
                self._made[name] = made
                self._bytes += made.memory_size_bytes
            while self._bytes > self._most:
                _, gone = self._made.popitem(last=False)
                self._bytes -= gone.memory_size_bytes
        return made


class WatchedGrammar(XgrammarGrammar):
    """A grammar whose native work is done beside the step, and which gives up once that is late.

    Attributes:
        slow: it has given up: it follows nothing any more, and the scheduler ends its request.
    """

    slow = False

    def fill_bitmask(self, bitmask: Any, idx: int) -> None:
        """Fill one row; with everything, if that is late: what is sampled under it reaches no client."""
        row = xgrammar.allocate_token_bitmask(1, self.vocab_size)
        if self._in_time(lambda: self.matcher.fill_next_token_bitmask(row, 0)) is _LATE:
            row.fill_(-1)
        bitmask[idx].copy_(row[0])

    def accept_tokens(self, request_id: str, tokens: list[int]) -> bool:
        """Go on by what was sampled."""
        accepted = self._in_time(lambda: super(WatchedGrammar, self).accept_tokens(request_id, tokens))
        return accepted is _LATE or bool(accepted)

    def _in_time(self, work: Callable[[], Any]) -> Any:
        if self.slow:
            return _LATE
        try:
            return _thread().run(work)
        except TooLate:
            self.slow = True
            return _LATE


_LATE: Final = object()
_threads = threading.local()


def _thread() -> StepThread:
    """The thread that works for this one."""
    if not hasattr(_threads, "own"):
        _threads.own = StepThread()
    own: StepThread = _threads.own
    return own
