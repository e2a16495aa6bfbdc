"""A small FlexOlmo in plain PyTorch, for training and for checking; its logits equal transformers'
``FlexOlmoForCausalLM``.

Block (FlexOlmo, section 3, after OLMo 2): ``x += norm(attention(x))``, ``x += norm(moe(x))``, with RMS-normalised
queries and keys. Routing: softmax over all allowed logits, then top-k, without renormalisation. An excluded
expert's logit is minus infinity before the softmax.

The module tree spells the names of the checkpoint layout, so ``state_dict()`` is a checkpoint.

Shapes: B sequences, T positions, N = B * T tokens, E experts, H hidden, F expert intermediate, D head size, V
vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from flexgate.experts.checkpoint.layout import ROUTER_BIAS_KEY, Architecture, check_tensors


class RMSNorm(nn.Module):
    """Root-mean-square norm computed in fp32."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """``x / rms(x) * weight`` over the last dimension."""
        x_float = x.float()
        scaled = x_float * torch.rsqrt(x_float.square().mean(-1, keepdim=True) + self.eps)
        return (self.weight * scaled).to(x.dtype)


class Attention(nn.Module):
    """Causal attention; queries and keys are normalised over the whole projection, then rotated."""

    def __init__(self, architecture: Architecture) -> None:
        super().__init__()
        sizes, eps = architecture.sizes, architecture.rms_norm_eps
        self.head_size = architecture.head_size
        self.q_proj = nn.Linear(sizes["H"], sizes["Q"], bias=False)
        self.k_proj = nn.Linear(sizes["H"], sizes["K"], bias=False)
        self.v_proj = nn.Linear(sizes["H"], sizes["K"], bias=False)
        self.o_proj = nn.Linear(sizes["Q"], sizes["H"], bias=False)
        self.q_norm = RMSNorm(sizes["Q"], eps)
        self.k_norm = RMSNorm(sizes["K"], eps)

    def forward(self, x_BTH: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
        """Attend over earlier positions; ``rotation`` holds cosines and sines ``[T, D]``."""
        batch, length, _ = x_BTH.shape

        def heads(x: Tensor) -> Tensor:
            return x.view(batch, length, -1, self.head_size).transpose(1, 2)

        q = rotate(heads(self.q_norm(self.q_proj(x_BTH))), rotation)
        k = rotate(heads(self.k_norm(self.k_proj(x_BTH))), rotation)
        v = heads(self.v_proj(x_BTH))
        grouped = q.shape[1] != k.shape[1]
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped)
        mixed: Tensor = self.o_proj(out.transpose(1, 2).reshape(batch, length, -1))
        return mixed


class ExpertFFN(nn.Module):
    """One expert of one layer: a SwiGLU feed-forward network."""

    def __init__(self, hidden: int, intermediate: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden, intermediate, bias=False)
        self.up_proj = nn.Linear(hidden, intermediate, bias=False)
        self.down_proj = nn.Linear(intermediate, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """``down(silu(gate(x)) * up(x))``."""
        out: Tensor = self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return out


class Router(nn.Module):
    """One row per expert, an optional bias per expert."""

    def __init__(self, architecture: Architecture, *, biased: bool) -> None:
        super().__init__()
        self.top_k = architecture.num_experts_per_tok
        self.renormalise = architecture.norm_topk_prob
        self.weight = nn.Parameter(torch.zeros(architecture.num_experts, architecture.hidden_size))
        self.bias = nn.Parameter(torch.zeros(architecture.num_experts)) if biased else None

    def forward(self, x_NH: Tensor, allowed_NE: Tensor | None) -> Tensor:
        """Weights ``[N, E]``: zero for experts that are excluded or not among the top-k."""
        logits_NE = F.linear(x_NH, self.weight, self.bias)
        if allowed_NE is not None:
            logits_NE = logits_NE.masked_fill(~allowed_NE, float("-inf"))
        shares_NE = logits_NE.softmax(-1, dtype=torch.float32)
        top_NK, index_NK = shares_NE.topk(min(self.top_k, shares_NE.shape[-1]), dim=-1)
        if self.renormalise:
            top_NK = top_NK / top_NK.sum(-1, keepdim=True)
        return torch.zeros_like(shares_NE).scatter(-1, index_NK, top_NK).to(x_NH.dtype)


class MoE(nn.Module):
    """Router and experts of one layer, computed densely: right for few small experts."""

    def __init__(self, architecture: Architecture, *, biased: bool) -> None:
        super().__init__()
        hidden, intermediate = architecture.hidden_size, architecture.intermediate_size
        self.gate = Router(architecture, biased=biased)
        self.experts = nn.ModuleList(ExpertFFN(hidden, intermediate) for _ in range(architecture.num_experts))

    @property
    def ffns(self) -> list[ExpertFFN]:
        """The experts by index, typed."""
        return [cast(ExpertFFN, expert) for expert in self.experts]

    def forward(self, x_BTH: Tensor, allowed_BE: Tensor | None) -> Tensor:
        """Weighted sum of the chosen experts' outputs."""
        if len(self.experts) == 1:
            only: Tensor = self.ffns[0](x_BTH)
            return only
        x_NH = x_BTH.flatten(0, 1)
        allowed_NE = None if allowed_BE is None else allowed_BE.repeat_interleave(x_BTH.shape[1], dim=0)
        weights_NE = self.gate(x_NH, allowed_NE)
        out_NH = torch.zeros_like(x_NH)
        for number, expert in enumerate(self.ffns):
            if allowed_BE is None or bool(allowed_BE[:, number].any()):
                out_NH = out_NH + weights_NE[:, number, None] * expert(x_NH)
        return out_NH.view_as(x_BTH)


class Block(nn.Module):
    """Attention and MoE, each normalised after, not before."""

    def __init__(self, architecture: Architecture, *, biased: bool) -> None:
        super().__init__()
        self.self_attn = Attention(architecture)
        self.mlp = MoE(architecture, biased=biased)
        self.post_attention_layernorm = RMSNorm(architecture.hidden_size, architecture.rms_norm_eps)
        self.post_feedforward_layernorm = RMSNorm(architecture.hidden_size, architecture.rms_norm_eps)

    def attend(self, x_BTH: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
        """The residual stream after attention: what this layer's router sees."""
        out: Tensor = x_BTH + self.post_attention_layernorm(self.self_attn(x_BTH, rotation))
        return out

    def feed(self, x_BTH: Tensor, allowed_BE: Tensor | None) -> Tensor:
        """The residual stream after the experts."""
        out: Tensor = x_BTH + self.post_feedforward_layernorm(self.mlp(x_BTH, allowed_BE))
        return out


class Embedding(nn.Embedding):
    """Token embeddings, with which a tied head projects back."""

    def unembed(self, x: Tensor) -> Tensor:
        """Inner products ``[..., V]`` with every token's embedding."""
        return F.linear(x, self.weight)


class Decoder(nn.Module):
    """Embedding, blocks and final norm."""

    def __init__(self, architecture: Architecture, *, biased: bool) -> None:
        super().__init__()
        self.embed_tokens = Embedding(architecture.vocab_size, architecture.hidden_size)
        self.layers = nn.ModuleList(Block(architecture, biased=biased) for _ in range(architecture.num_hidden_layers))
        self.norm = RMSNorm(architecture.hidden_size, architecture.rms_norm_eps)

    @property
    def blocks(self) -> list[Block]:
        """The layers in order, typed."""
        return [cast(Block, layer) for layer in self.layers]


class TiedHead(nn.Module):
    """The embedding as head: a module without a parameter of its own, so that a checkpoint has none either."""

    def __init__(self, embedding: Embedding) -> None:
        super().__init__()
        self._embedding = (embedding,)  # in a tuple, where torch registers no second owner of the weight

    def forward(self, x: Tensor) -> Tensor:
        """Logits ``[..., V]`` of hidden states."""
        logits: Tensor = self._embedding[0].unembed(x)
        return logits


class FlexOlmo(nn.Module):
    """The whole model; ``allowed_BE`` is the gate of every sequence (None: all experts), or ``[L, B, E]`` that of every
    layer.
    """

    def __init__(self, architecture: Architecture, *, biased: bool = False) -> None:
        super().__init__()
        self.architecture = architecture
        self.model = Decoder(architecture, biased=biased)
        self.lm_head: nn.Module
        if architecture.tie_word_embeddings:
            self.lm_head = TiedHead(self.model.embed_tokens)
        else:
            self.lm_head = nn.Linear(architecture.hidden_size, architecture.vocab_size, bias=False)

    def hidden(self, tokens_BT: Tensor, allowed_BE: Tensor | None = None, taps: list[Tensor] | None = None) -> Tensor:
        """Final hidden states ``[B, T, H]``, normalised; every layer's router input is appended to ``taps``."""
        first = self.model.blocks[0].attend(self.model.embed_tokens(tokens_BT), self._rotation(tokens_BT))
        return self.onward(first, 0, allowed_BE, taps)

    def onward(
        self, x_BTH: Tensor, start: int, allowed_BE: Tensor | None = None, taps: list[Tensor] | None = None
    ) -> Tensor:
        """Final hidden states from what the router of layer ``start`` sees."""
        rotation = self._rotation(x_BTH)
        per_layer = allowed_BE is not None and allowed_BE.dim() == 3
        for number, layer in enumerate(self.model.blocks[start:], start):
            if number > start:
                x_BTH = layer.attend(x_BTH, rotation)
            if taps is not None:
                taps.append(x_BTH)
            x_BTH = layer.feed(x_BTH, allowed_BE[number] if allowed_BE is not None and per_layer else allowed_BE)
        out: Tensor = self.model.norm(x_BTH)
        return out

    def _rotation(self, x_BT: Tensor) -> tuple[Tensor, Tensor]:
        cosine, sine = rotary(self.architecture, x_BT.shape[1])
        return cosine.to(x_BT.device), sine.to(x_BT.device)

    def forward(self, tokens_BT: Tensor, allowed_BE: Tensor | None = None) -> Tensor:
        """Logits ``[B, T, V]``."""
        logits_BTV: Tensor = self.lm_head(self.hidden(tokens_BT, allowed_BE))
        return logits_BTV

    @classmethod
    def from_tensors(cls, architecture: Architecture, tensors: Mapping[str, Tensor]) -> FlexOlmo:
        """A model in fp32 from checkpoint tensors of any float dtype."""
        check_tensors(architecture, tensors)
        model = cls(architecture, biased=ROUTER_BIAS_KEY.format(layer=0) in tensors)
        model.load_state_dict({key: tensor.float() for key, tensor in tensors.items()})
        return model


def rotary(architecture: Architecture, length: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines ``[T, D]`` of the rotary embedding, halves duplicated."""
    size = architecture.head_size
    frequencies = architecture.rope_theta ** -(torch.arange(0, size, 2, dtype=torch.float32) / size)
    angles = torch.outer(torch.arange(length, dtype=torch.float32), frequencies)
    both = torch.cat((angles, angles), dim=-1)
    return both.cos(), both.sin()


def rotate(x: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
    """Rotate ``[..., T, D]`` by position (RoPE, half-split convention)."""
    cosine, sine = rotation
    first, second = x.chunk(2, dim=-1)
    return x * cosine + torch.cat((-second, first), dim=-1) * sine
