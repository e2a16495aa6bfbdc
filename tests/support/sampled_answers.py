"""Answers sampled from the masks of a compiled constraint, byte by byte."""

from __future__ import annotations

import random

import torch
import xgrammar

LONGEST = 400
VOCABULARY = [bytes([byte]) for byte in range(256)]
END = len(VOCABULARY)
TOKENIZER = xgrammar.TokenizerInfo([*VOCABULARY, b"<end>"], stop_token_ids=[END])
COMPILER = xgrammar.GrammarCompiler(TOKENIZER, max_threads=1, cache_enabled=False)
TYPICAL = b'{}[]",:0123456789abcxyzABXZ-+.@_/ eE'
CLOSING = b'"}]'


def sample(grammar: xgrammar.CompiledGrammar, chance: random.Random) -> bytes | None:
    """An answer that takes tokens from the masks at random; None when it grows too long."""
    matcher, text = xgrammar.GrammarMatcher(grammar), bytearray()
    mask = xgrammar.allocate_token_bitmask(1, END + 1)
    while len(text) < LONGEST:
        mask.fill_(-1)
        matcher.fill_next_token_bitmask(mask)
        bits = (mask[0].unsqueeze(1) >> torch.arange(32)) & 1
        allowed = bits.flatten()[: END + 1].nonzero().flatten().tolist()
        if END in allowed and (len(allowed) == 1 or chance.random() < 0.3):
            return bytes(text)
        tokens = [token for token in allowed if token < 128] or allowed  # whole characters, where there is a choice
        closing = [token for token in tokens if token in CLOSING]
        typical = [token for token in tokens if token in TYPICAL]
        likely = closing if closing and chance.random() < 0.2 + len(text) / LONGEST else typical
        token = chance.choice(likely if likely and chance.random() < 0.9 else [t for t in tokens if t != END] or tokens)
        assert matcher.accept_token(token)
        text.append(token)
    return None
