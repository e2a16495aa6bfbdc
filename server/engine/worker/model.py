"""FlexOlmo as a native vLLM model, which vLLM does not have; the gates are put into it as into vLLM's own models.

Architecture: arXiv 2507.07024, section 3; OLMo-2 blocks (norms after attention and
feed-forward, RMS norm over the whole query and key projections), a mixture of experts
as feed-forward. Checkpoint layout: Hugging Face ``flex_olmo``.

Legend: T tokens, H hidden size.
"""

from collections.abc import Iterable
from functools import partial
from typing import Any, ClassVar

import torch
from torch import nn
from vllm.compilation.decorators import support_torch_compile
from vllm.config import VllmConfig
from vllm.distributed import (
    get_tensor_model_parallel_rank,
    get_tensor_model_parallel_world_size,
    tensor_model_parallel_all_gather,
)
from vllm.distributed.utils import split_tensor_along_last_dim
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.fused_moe import FusedMoEFactory, GateLinear
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.linear import QKVParallelLinear, RowParallelLinear
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.rotary_embedding import get_rope
from vllm.model_executor.layers.vocab_parallel_embedding import (
    ParallelLMHead,
    VocabParallelEmbedding,
)
from vllm.model_executor.models.utils import AutoWeightsLoader, WeightsMapper


class FlexOlmoAttention(nn.Module):
    """Self-attention with RMS norm over the whole query and key projections."""

    def __init__(self, vllm_config: VllmConfig, prefix: str) -> None:
        """Shard heads over the tensor-parallel ranks."""
        super().__init__()
        config = vllm_config.model_config.hf_config
        self.tp_size = get_tensor_model_parallel_world_size()
        self.tp_rank = get_tensor_model_parallel_rank()
        heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
        self.q_size = heads // self.tp_size * head_dim
        self.kv_size = kv_heads // self.tp_size * head_dim
        self.qkv_proj = QKVParallelLinear(
            config.hidden_size,
            head_dim,
            heads,
            kv_heads,
            bias=config.attention_bias,
            prefix=f"{prefix}.qkv_proj",
        )
        self.q_norm = RMSNorm(heads * head_dim, eps=config.rms_norm_eps)
        self.k_norm = RMSNorm(kv_heads * head_dim, eps=config.rms_norm_eps)
        self.o_proj = RowParallelLinear(
            heads * head_dim,
            config.hidden_size,
            bias=config.attention_bias,
            prefix=f"{prefix}.o_proj",
        )
        self.rotary_emb = get_rope(
            head_dim,
            max_position=config.max_position_embeddings,
            rope_parameters=config.rope_parameters,
            is_neox_style=True,
        )
        self.attn = Attention(
            heads // self.tp_size,
            head_dim,
            head_dim**-0.5,
            num_kv_heads=kv_heads // self.tp_size,
            cache_config=vllm_config.cache_config,
            prefix=f"{prefix}.attn",
        )

    def forward(self, positions_T: torch.Tensor, x_TH: torch.Tensor) -> torch.Tensor:
        """Attend over the request's own KV cache."""
        qkv, _ = self.qkv_proj(x_TH)
        q, k, v = qkv.split([self.q_size, self.kv_size, self.kv_size], dim=-1)
        q, k = self._norm(self.q_norm, q), self._norm(self.k_norm, k)
        q, k = self.rotary_emb(positions_T, q, k)
        output: torch.Tensor = self.o_proj(self.attn(q, k, v))[0]
        return output

    def _norm(self, norm: RMSNorm, part: torch.Tensor) -> torch.Tensor:
        """Normalise over all ranks' heads: the mean square is of the whole projection."""
        if self.tp_size == 1:
            return norm(part.contiguous())
        whole = norm(tensor_model_parallel_all_gather(part.contiguous()))
        split = partial(split_tensor_along_last_dim, num_partitions=self.tp_size)
        return split(whole)[self.tp_rank].contiguous()


class FlexOlmoMoE(nn.Module):
    """Router and experts, built by the two names that `seam.models` puts gated ones in place of."""

    def __init__(self, config: Any, quant_config: Any, prefix: str) -> None:
        """``config`` is the checkpoint's FlexOlmoConfig."""
        super().__init__()
        self.gate = GateLinear(config.hidden_size, config.num_experts, prefix=f"{prefix}.gate")
        self.experts = FusedMoEFactory(
            num_experts=config.num_experts,
            top_k=config.num_experts_per_tok,
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            renormalize=config.norm_topk_prob,
            quant_config=quant_config,
            prefix=f"{prefix}.experts",
        )

    def forward(self, x_TH: torch.Tensor) -> torch.Tensor:
        """Combine the chosen experts' outputs, [T, H]."""
        routed, _ = self.gate(x_TH)
        output: torch.Tensor = self.experts(hidden_states=x_TH, router_logits=routed)
        return output


class FlexOlmoLayer(nn.Module):
    """Attention and experts, each normalised after, not before."""

    def __init__(self, vllm_config: VllmConfig, prefix: str) -> None:
        """Built by vLLM on every rank."""
        super().__init__()
        config = vllm_config.model_config.hf_config
        self.self_attn = FlexOlmoAttention(vllm_config, f"{prefix}.self_attn")
        self.mlp = FlexOlmoMoE(config, vllm_config.quant_config, f"{prefix}.mlp")
        self.post_attention_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_feedforward_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(self, positions_T: torch.Tensor, x_TH: torch.Tensor) -> torch.Tensor:
        """One block."""
        x_TH = x_TH + self.post_attention_layernorm(self.self_attn(positions_T, x_TH))
        return x_TH + self.post_feedforward_layernorm(self.mlp(x_TH))


@support_torch_compile
class FlexOlmoModel(nn.Module):
    """Embeddings, blocks, final norm."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        """Built by vLLM on every rank."""
        super().__init__()
        config = vllm_config.model_config.hf_config
        self.embed_tokens = VocabParallelEmbedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(
            FlexOlmoLayer(vllm_config, f"{prefix}.layers.{index}") for index in range(config.num_hidden_layers)
        )
        self.norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def embed_input_ids(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Token embeddings, [T, H]."""
        embedded: torch.Tensor = self.embed_tokens(input_ids)
        return embedded

    def forward(
        self,
        input_ids: torch.Tensor | None,
        positions: torch.Tensor,
        intermediate_tensors: Any | None = None,  # noqa: ARG002
        inputs_embeds: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Hidden states, [T, H]; the argument names are vLLM's."""
        x_TH = inputs_embeds if inputs_embeds is not None else self.embed_tokens(input_ids)
        for layer in self.layers:
            x_TH = layer(positions, x_TH)
        return self.norm(x_TH)


class FlexOlmoForCausalLM(nn.Module):
    """Model and head."""

    packed_modules_mapping: ClassVar[dict[str, list[str]]] = {"qkv_proj": ["q_proj", "k_proj", "v_proj"]}
    hf_to_vllm_mapper = WeightsMapper(
        orig_to_new_stacked={
            ".q_proj": (".qkv_proj", "q"),
            ".k_proj": (".qkv_proj", "k"),
            ".v_proj": (".qkv_proj", "v"),
        }
    )

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        """Built by vLLM on every rank."""
        super().__init__()
        self.config = vllm_config.model_config.hf_config
        self.model = FlexOlmoModel(vllm_config=vllm_config, prefix=f"{prefix}model")
        self.lm_head = ParallelLMHead(self.config.vocab_size, self.config.hidden_size, prefix=f"{prefix}lm_head")
        if self.config.tie_word_embeddings:
            self.lm_head = self.lm_head.tie_weights(self.model.embed_tokens)
        self.logits_processor = LogitsProcessor(self.config.vocab_size)

    def embed_input_ids(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Token embeddings, [T, H]."""
        return self.model.embed_input_ids(input_ids)

    def forward(
        self,
        input_ids: torch.Tensor | None,
        positions: torch.Tensor,
        intermediate_tensors: Any | None = None,
        inputs_embeds: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Hidden states, [T, H]."""
        hidden: torch.Tensor = self.model(input_ids, positions, intermediate_tensors, inputs_embeds)
        return hidden

    def compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor | None:
        """Logits over the vocabulary for the positions that are sampled."""
        logits: torch.Tensor | None = self.logits_processor(self.lm_head, hidden_states)
        return logits

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """Load the tensors that there are; returns the names of parameters that were loaded."""
        loaded: set[str] = AutoWeightsLoader(self).load_weights(weights, mapper=self.hf_to_vllm_mapper)
        return loaded
