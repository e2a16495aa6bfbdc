"""What becomes of every field of a request: one table per endpoint, and nothing outside of it.

`keep_honoured` goes by them. Fields that no table knows are refused by name. A test
compares the tables with the request types of vLLM and of the `openai` package.
"""

from __future__ import annotations

from types import MappingProxyType
from typing import Any, Final

from flexgate.server.inference.request.values import Fate, Rule, Table

_HONOURED: Final = Rule(Fate.HONOURED)
_IGNORED: Final = Rule(Fate.IGNORED)


def _honour(names: str) -> dict[str, Rule]:
    return dict.fromkeys(names.split(), _HONOURED)


def _ignore(names: str) -> dict[str, Rule]:
    return dict.fromkeys(names.split(), _IGNORED)


def _refuse(names: str, why: str, *neutral: Any) -> dict[str, Rule]:
    return dict.fromkeys(names.split(), Rule(Fate.REFUSED, neutral, why))


_TEXT_ONLY: Final = "only text is served"
_OTHER_SERVER: Final = "this server does not have that feature"
_WHOLE: Final = "send the whole conversation in 'input'"
_RESOURCES: Final = "clients cannot change the scheduling"

_COMMON: Final[Table] = {
    **_honour("model cache_salt flexgate"),
    **_ignore("user metadata store safety_identifier"),
    **_ignore("prompt_cache_key prompt_cache_retention prompt_cache_options"),
    "service_tier": Rule(Fate.IGNORED, ("auto", "default"), "there are no service tiers"),
    **_refuse("vllm_xargs", "it could bypass the check of which experts may be used"),
    **_refuse("kv_transfer_params ec_transfer_params", "caches are not exchanged with other servers"),
    **_refuse("session_id request_id", "the server makes its own ids"),
    **_refuse("priority", _RESOURCES, 0),
    **_refuse("media_io_kwargs mm_processor_kwargs mm_payload return_mm_kwargs", _TEXT_ONLY),
    **_refuse("watermarking", "it is not tested with this model", False),
    **_refuse("moderation", _OTHER_SERVER),
}

_SAMPLING: Final[Table] = {
    **_honour("temperature top_p top_k min_p seed stop stop_token_ids ignore_eos"),
    **_honour("frequency_penalty presence_penalty repetition_penalty logit_bias"),
    **_honour("skip_special_tokens include_stop_str_in_output structured_outputs"),
    **_honour("stream"),
}

_GENERATION: Final[Table] = {
    **_COMMON,
    **_SAMPLING,
    **_honour("n stream_options stream_interval min_tokens max_tokens echo"),
    **_honour("spaces_between_special_tokens truncate_prompt_tokens truncation_side"),
    **_honour("prompt_logprobs logprob_token_ids logprobs allowed_token_ids bad_words"),
    **_honour("add_special_tokens response_format"),
    **_honour("return_tokens_as_token_ids return_token_ids"),
    **_refuse("use_beam_search", "use 'n' for several answers", False),
    **_refuse("length_penalty", "it is for beam search, which is not served", 1.0, 1),
    **_refuse("early_stopping", "it is for beam search, which is not served", False),
    **_refuse("thinking_token_budget", "the model does not reason before it answers"),
    **_refuse("repetition_detection", "it is not tested with this model"),
    **_refuse("routed_experts_prompt_start", "routing is not returned per token", 0),
    **_refuse("return_token_offsets", "it is for rendering, which is not served", False),
    **_refuse("logits_processors", "clients cannot run code in the engine"),
}

CHAT: Final[Table] = MappingProxyType(
    {
        **_GENERATION,
        **_honour("messages max_completion_tokens top_logprobs tools tool_choice"),
        **_honour("parallel_tool_calls reasoning_effort return_prompt_text"),
        **_honour("add_generation_prompt continue_final_message"),
        **_refuse("include_reasoning", "the model does not reason before it answers", True),
        **_refuse("chat_template", "templates come from the operator, not from requests"),
        **_refuse("chat_template_kwargs", "templates come from the operator", {}),
        **_refuse("documents", "the chat template has no place for documents", []),
        **_refuse("functions function_call", "use 'tools' and 'tool_choice'"),
        **_refuse("audio", _TEXT_ONLY),
        **_refuse("modalities", _TEXT_ONLY, ["text"]),
        **_refuse("prediction verbosity web_search_options", _OTHER_SERVER),
    }
)

COMPLETION: Final[Table] = MappingProxyType(
    {
        **_GENERATION,
        **_honour("prompt"),
        **_refuse("prompt_embeds", "embeddings would bypass the tokenizer and its limits"),
        **_refuse("suffix", "the model was not trained to fill in a gap before a suffix", ""),
        **_refuse("best_of", "use 'n'", 1),
    }
)

RESPONSES: Final[Table] = MappingProxyType(
    {
        **_COMMON,
        **_SAMPLING,
        **_honour("input instructions max_output_tokens parallel_tool_calls reasoning text"),
        **_honour("tool_choice tools top_logprobs include truncation"),
        **_refuse("include_reasoning", "the model does not reason before it answers", True),
        **_refuse("background", "responses are not stored", False),
        **_refuse("previous_response_id conversation", f"responses are not stored; {_WHOLE}"),
        **_refuse("background_options context_management", "responses are not stored"),
        **_refuse("max_tool_calls", "there are no built-in tools"),
        **_refuse("prompt", "there are no stored prompts"),
        **_refuse("enable_response_messages", _OTHER_SERVER, False),
        **_refuse("previous_input_messages", _WHOLE),
        **_refuse("chat_template_kwargs", "templates come from the operator", {}),
        **_refuse("image", _TEXT_ONLY),
        **_refuse("access_programs", _OTHER_SERVER),
        **_ignore("stream_options"),
    }
)

_TOKENIZE: Final[Table] = {
    **_honour("model return_token_strs add_special_tokens"),
    **_refuse("media_io_kwargs mm_processor_kwargs", _TEXT_ONLY),
    **_refuse("chat_template", "templates come from the operator, not from requests"),
    **_refuse("chat_template_kwargs", "templates come from the operator", {}),
}
TOKENIZE_PROMPT: Final[Table] = MappingProxyType({**_TOKENIZE, **_honour("prompt")})
TOKENIZE_CHAT: Final[Table] = MappingProxyType(
    {**_TOKENIZE, **_honour("messages tools add_generation_prompt continue_final_message")}
)
DETOKENIZE: Final[Table] = MappingProxyType(_honour("model tokens"))

STRUCTURED_OUTPUTS: Final[Table] = MappingProxyType(
    {
        **_honour("json regex choice grammar json_object"),
        **_refuse("structural_tag", "use 'tools' or 'json'"),
        **_refuse("disable_any_whitespace disable_additional_properties", _OTHER_SERVER, False),
        **_refuse("whitespace_pattern", _OTHER_SERVER),
        **_refuse("_backend _backend_was_auto", "the server chooses the backend"),
    }
)

STREAM_OPTIONS: Final[Table] = MappingProxyType(
    {**_honour("include_usage continuous_usage_stats"), **_ignore("include_obfuscation")}
)


# What stands inside of a request. Responses go back into the next request, so that every field of a response has a
# place here too.

MESSAGE: Final[Table] = MappingProxyType(
    {
        **_honour("role content name refusal tool_calls tool_call_id"),
        **_ignore("annotations"),
        **_refuse("audio function_call", "only text and 'tool_calls' are served"),
        **_refuse("reasoning", "the model does not reason before it answers", ""),
        **_refuse("tools", "name them in the request's own 'tools'"),
        **_refuse("task", "the chat template has no place for it"),
    }
)

TOOL_CALL: Final[Table] = MappingProxyType(
    {
        **_honour("id type function"),
        **_ignore("index"),  # of the parts of a stream, which clients put together
        **_refuse("custom", "only functions can be called"),
    }
)

CALLED_FUNCTION: Final[Table] = MappingProxyType({**_honour("name arguments"), **_ignore("id")})

_PART_NOTES: Final = _ignore("annotations logprobs prompt_cache_breakpoint")
TEXT_PART: Final[Table] = MappingProxyType({**_honour("type text"), **_PART_NOTES})
REFUSAL_PART: Final[Table] = MappingProxyType({**_honour("type refusal"), **_PART_NOTES})

ITEM_MESSAGE: Final[Table] = MappingProxyType({**_honour("type role content id status"), **_ignore("phase")})

_CALL: Final[Table] = {
    **_honour("type id call_id status"),
    **_refuse("caller", "only the model calls functions", {"type": "direct"}),
    **_refuse("namespace", "functions have no namespaces"),
}
ITEM_CALL: Final[Table] = MappingProxyType(
    {**_CALL, **_honour("name arguments"), **_refuse("async", "calls are not asynchronous", False)}
)
ITEM_OUTPUT: Final[Table] = MappingProxyType({**_CALL, **_honour("output"), **_ignore("name")})
