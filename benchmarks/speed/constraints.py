"""What a constraint costs to compile and to follow, on a vocabulary as large as those of real models.

The vocabulary is made up: every byte, then words, numbers, punctuation and other scripts, half of them behind a space.
Times are of the processor.
"""

import asyncio
import json
import random
import resource
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import xgrammar
from xgrammar.tvm_ffi_binding import _ffi_api as bindings

from flexgate.server.engine.frontend.constraints.compiler import Compiler
from flexgate.server.engine.frontend.constraints.errors import ConstraintError
from flexgate.server.engine.frontend.constraints.made import Constraint
from flexgate.server.engine.frontend.constraints.schemas import enforceable
from flexgate.server.engine.grammars.native import compile_constraint
from flexgate.server.inference.openai.forced import calls
from speed.record import Run

TOKENS = 128_000
STEPS = 60
LETTERS, DIGITS = "etaoinshrdlcumwfgypbvkjxqz", "0123456789"
MARKS, OTHERS = "{}[]()<>.,:;\"'=+-*/ \n\t_#", "äöüéèабвгде漢字仮名中文"
ADDRESS = {"type": "string", "pattern": r"^[a-zA-Z0-9._%+-]{1,64}@[a-zA-Z0-9.-]{1,255}\.[a-z]{2,}$"}
SEARCH = {
    "type": "object",
    "properties": {"query": {"type": "string"}, "n": {"type": "integer"}},
    "required": ["query"],
}
WHAT = (
    "processor seconds to compile a constraint, the bytes of what was made, the bytes of the same serialised, and "
    "milliseconds of the slowest and the median mask of two walks over it; why it is refused when it is tried, if it is"
)


def run(asked: Run) -> None:
    """Every case once."""
    tokens = vocabulary(4_000 if asked.quick else TOKENS)
    info = xgrammar.TokenizerInfo(tokens, stop_token_ids=[len(tokens) - 1])
    tokenizer = bindings.TokenizerInfo.deserialize_json(info.serialize_json())
    asked_for = list(cases(asked.quick))
    measured = {name: measure(tokenizer, kind, text) for name, kind, text in asked_for}
    for name, refused in asyncio.run(tried(info.serialize_json(), asked_for)).items():
        measured[name] |= {"refused": refused}
    asked.write("constraints", {"what": WHAT, **measured}, shape={"tokens": len(tokens)})


def vocabulary(size: int) -> list[bytes]:
    """So many tokens, the last of which ends an answer."""
    chance, tokens = random.Random(1), dict.fromkeys(bytes([byte]) for byte in range(256))
    while len(tokens) < size - 1:
        length = min(15, 1 + int(chance.expovariate(0.2)))
        letters, most = chance.choices([(LETTERS, 15), (DIGITS, 3), (MARKS, 5), (OTHERS, 5)], [75, 7, 10, 8])[0]
        word = "".join(chance.choices(letters, range(len(letters), 0, -1), k=min(length, most)))
        tokens[(" " * (chance.random() < 0.5) + word).encode()] = None
    return [*tokens, b"<end>"]


def cases(quick: bool) -> Iterator[tuple[str, str, str]]:
    """Names, kinds and texts of constraints."""
    for length in (100, 1_000):
        yield f"a string of at most {length}", "json", json.dumps(enforceable({"type": "string", "maxLength": length}))
    yield "an e-mail address", "json", json.dumps(enforceable(ADDRESS))
    for count in (16, 32) if quick else (16, 32, 128):
        forced = calls({f"{'n' * 59}{number:05}": SEARCH for number in range(count)}, parallel=True)
        yield f"{count} forced tools", "json", json.dumps(enforceable(forced))
    yield "slow masks", "regex", "(" + "|".join(["a?", *["a?b"] * 400]) + "){256}"


async def tried(tokenizer: str, constraints: list[tuple[str, str, str]]) -> dict[str, str | None]:
    """Why the process that tries constraints refuses each, by name; None for what it lets through."""
    compiler, refused = Compiler(), dict[str, str | None]()
    await compiler.start(tokenizer)
    for name, kind, text in constraints:
        try:
            await compiler.check("tenant", Constraint(kind, text))
            refused[name] = None
        except ConstraintError as error:
            refused[name] = str(error)
    await compiler.stop()
    return refused


def measure(tokenizer: Any, kind: str, text: str) -> dict[str, Any]:
    """One constraint."""
    began = time.process_time()
    compiled = compile_constraint(bindings, tokenizer, kind, text)
    compiling = time.process_time() - began
    masks = sorted(mask for walk in range(2) for mask in walked(compiled, tokenizer.vocab_size(), walk))
    held = {"bytes": len(text), "compiled_bytes": compiled.memory_size_bytes()}
    return held | {
        "compile_s": round(compiling, 3),
        "serialized_bytes": len(str(compiled.serialize_json())),
        "slowest_mask_ms": round(masks[-1] * 1e3, 2),
        "median_mask_ms": round(masks[len(masks) // 2] * 1e3, 2),
        "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10,
    }


def walked(compiled: Any, tokens: int, walk: int) -> Iterator[float]:
    """Seconds of each mask, along the first token that is allowed or along any."""
    chance, mask = random.Random(walk), np.zeros((1, (tokens + 31) // 32), dtype=np.int32)
    matcher = bindings.GrammarMatcher(compiled, None, False, -1, None)
    for _ in range(STEPS):
        mask[:] = -1
        began = time.thread_time()
        matcher.fill_next_token_bitmask(mask, 0, False)
        yield time.thread_time() - began
        allowed = np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little")[:tokens])
        matcher.accept_token(int(chance.choice(allowed) if walk else allowed[0]), False)
        if matcher.is_terminated():
            return
