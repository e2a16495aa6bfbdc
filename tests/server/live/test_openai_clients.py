"""Clients that know nothing of flexgate: the openai package, LangChain, curl."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest
from described import conform

pytestmark = pytest.mark.engine

HELLO: Any = [{"role": "user", "content": "the quick brown fox"}]
SCHEMA = {
    "type": "object",
    "properties": {"answer": {"enum": ["yes", "no"]}},
    "required": ["answer"],
    "additionalProperties": False,
}
TOOL: Any = {"type": "function", "function": {"name": "decide", "parameters": SCHEMA}}
ENOUGH = 400
TO_THE_LIMIT = {"ignore_eos": True}  # the random model draws the end one time in 320


@pytest.fixture(scope="module")
def ai(server: Any) -> Iterator[openai.OpenAI]:
    """Each of its answers is compared with the OpenAPI document, but for streams."""
    http = httpx.Client(event_hooks={"response": [_conforms]}, timeout=60)
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key=server.key("all"), http_client=http) as client:
        yield client


def _conforms(response: httpx.Response) -> None:
    if not response.headers["content-type"].startswith("text/event-stream"):
        response.read()
        conform(response)


def gate_of(answer: Any) -> dict[str, Any]:
    found: dict[str, Any] = answer.model_extra["flexgate"]
    return found


def test_chat(ai: openai.OpenAI) -> None:
    answer = ai.chat.completions.create(model="tiny", messages=HELLO, max_tokens=4, extra_body=TO_THE_LIMIT)
    assert answer.choices[0].message.role == "assistant"
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 4
    attribution = gate_of(answer)["attribution"]
    assert sum(e["share_ppm"] for e in attribution["experts"]) == 1_000_000
    assert {e["id"] for e in attribution["experts"]} == {"public", "news", "math", "code", "secret"}
    shares = [e["share_ppm"] for e in attribution["experts"]]
    assert shares == sorted(shares, reverse=True)


def test_streamed_chat_with_and_without_usage(ai: openai.OpenAI) -> None:
    for options in ({}, {"stream_options": {"include_usage": True}}):
        chunks = list(
            ai.chat.completions.create(model="tiny", messages=HELLO, max_tokens=5, n=3, stream=True, **options)
        )
        carriers = [c for c in chunks if "flexgate" in (c.model_extra or {})]
        assert len(carriers) == 1
        if options:
            assert carriers[0] is chunks[-1]
            assert carriers[0].usage is not None
        else:
            finished = [c for c in chunks if c.choices and c.choices[0].finish_reason]
            assert len(finished) == 3
            assert carriers[0] is finished[-1]


def test_a_stream_says_the_same_as_an_answer(ai: openai.OpenAI) -> None:
    """Same prompt, same gate, greedy: same text and the same attribution."""
    ask: dict[str, Any] = {"model": "tiny", "prompt": "the lazy dog", "max_tokens": 8}
    ask |= {"temperature": 0, "extra_body": {"cache_salt": "alone", "ignore_eos": True}}
    whole = ai.completions.create(**ask)
    ask["extra_body"] = {"cache_salt": "alone-too", "ignore_eos": True}
    chunks = list(ai.completions.create(**ask, stream=True))
    assert "".join(c.choices[0].text for c in chunks) == whole.choices[0].text
    last = next(c for c in chunks if "flexgate" in (c.model_extra or {}))
    assert gate_of(last)["attribution"] == gate_of(whole)["attribution"]


def test_completions_with_echo_logprobs_and_token_ids(ai: openai.OpenAI, server: Any) -> None:
    with server.client() as http:
        ids = http.post("/tokenize", json={"prompt": "the quick fox"}).json()["tokens"]
        assert http.post("/detokenize", json={"tokens": ids}).json() == {"prompt": "the quick fox"}
    answer = ai.completions.create(model="tiny", prompt=ids, max_tokens=1, echo=True, logprobs=1)
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.token_logprobs is not None
    assert len(logprobs.token_logprobs) == len(ids) + 1
    assert answer.choices[0].text.startswith("the quick fox")
    scored = ai.completions.create(model="tiny", prompt=ids, max_tokens=0, echo=True, logprobs=1)
    assert scored.choices[0].text == "the quick fox"


def test_a_stream_of_scored_choices_comes_to_its_end(ai: openai.OpenAI) -> None:
    for _ in range(20):
        chunks = list(
            ai.completions.create(
                model="tiny", prompt="the quick fox", max_tokens=4, n=4, echo=True, logprobs=1, stream=True
            )
        )
        assert {c.choices[0].index for c in chunks if c.choices[0].finish_reason} == {0, 1, 2, 3}


def test_a_scored_prompt_is_billed_as_its_prompt(ai: openai.OpenAI) -> None:
    scored = ai.completions.create(model="tiny", prompt="the quick fox", max_tokens=0, echo=True, logprobs=1)
    assert scored.usage is not None
    assert scored.usage.completion_tokens == 0
    assert scored.usage.total_tokens == scored.usage.prompt_tokens


def test_greedy_choices_are_the_same(ai: openai.OpenAI) -> None:
    answer = ai.completions.create(model="tiny", prompt="the quick fox", max_tokens=4, n=3, temperature=0)
    assert len({choice.text for choice in answer.choices}) == 1
    assert len(answer.choices) == 3


@pytest.mark.parametrize(("token", "text"), [("a", "aaaa"), ("<eos>", "")])
def test_what_was_answered_is_asked_again(ai: openai.OpenAI, server: Any, token: str, text: str) -> None:
    """Also an answer without text: the model ends at once, or draws bytes that make no character."""
    with server.client() as http:
        (id_,) = http.post("/tokenize", json={"prompt": token}).json()["tokens"]
    certain: Any = {"logit_bias": {str(id_): 100}}
    first = ai.chat.completions.create(model="tiny", messages=HELLO, max_tokens=4, extra_body=certain)
    assert first.choices[0].message.content == text
    messages: Any = [*HELLO, first.choices[0].message, *HELLO]
    again = ai.chat.completions.create(model="tiny", messages=messages, max_tokens=4, extra_body=certain)
    assert again.choices[0].message.content == text
    said = ai.responses.create(model="tiny", input=HELLO, max_output_tokens=4, extra_body=certain)
    assert said.output_text == text
    items: Any = [*HELLO, *said.output, *HELLO]
    assert ai.responses.create(model="tiny", input=items, max_output_tokens=4, extra_body=certain).output_text == text


def test_usage_says_what_was_cached(ai: openai.OpenAI) -> None:
    ask: dict[str, Any] = {"model": "tiny", "prompt": "the quick brown fox " * 60, "max_tokens": 1}
    ai.completions.create(**ask)
    answer = ai.completions.create(**ask)
    assert answer.usage is not None
    assert answer.usage.prompt_tokens_details is not None
    assert answer.usage.prompt_tokens_details.cached_tokens == gate_of(answer)["attribution"]["cached_prompt_tokens"]
    assert answer.usage.prompt_tokens_details.cached_tokens


def test_several_prompts_and_choices(ai: openai.OpenAI) -> None:
    answer = ai.completions.create(model="tiny", prompt=["the", "dog"], n=2, max_tokens=2)
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    chunks = list(ai.completions.create(model="tiny", prompt=["the", "dog"], n=2, max_tokens=2, stream=True))
    assert sum("flexgate" in (c.model_extra or {}) for c in chunks) == 1


def test_chat_logprobs(ai: openai.OpenAI) -> None:
    answer = ai.chat.completions.create(model="tiny", messages=HELLO, max_tokens=2, logprobs=True, top_logprobs=3)
    content = answer.choices[0].logprobs and answer.choices[0].logprobs.content
    assert content
    assert all(len(token.top_logprobs) == 3 for token in content)


def test_structured_output(ai: openai.OpenAI) -> None:
    form: Any = {"type": "json_schema", "json_schema": {"name": "s", "schema": SCHEMA}}
    answer = ai.chat.completions.create(model="tiny", messages=HELLO, max_tokens=ENOUGH, response_format=form, seed=1)
    assert json.loads(answer.choices[0].message.content or "")["answer"] in ("yes", "no")
    chosen = ai.completions.create(
        model="tiny",
        prompt="the",
        max_tokens=20,
        extra_body={"structured_outputs": {"choice": ["yes", "no"]}},
    )
    assert chosen.choices[0].text in ("yes", "no")


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "decide"}}])
def test_tools_by_constrained_decoding(ai: openai.OpenAI, choice: Any) -> None:
    ask: dict[str, Any] = {"model": "tiny", "messages": HELLO, "tools": [TOOL]}
    ask |= {"tool_choice": choice, "max_tokens": ENOUGH, "seed": 3}
    answer = ai.chat.completions.create(**ask)
    (call,) = (answer.choices[0].message.tool_calls or [])[:1]
    assert call.function.name == "decide"
    assert json.loads(call.function.arguments)["answer"] in ("yes", "no")


def test_streamed_tools(ai: openai.OpenAI) -> None:
    chunks = list(
        ai.chat.completions.create(
            model="tiny",
            messages=HELLO,
            tools=[TOOL],
            tool_choice={"type": "function", "function": {"name": "decide"}},
            max_tokens=ENOUGH,
            stream=True,
        )
    )
    calls = [c.choices[0].delta.tool_calls for c in chunks if c.choices[0].delta.tool_calls]
    assert calls[0]
    assert calls[0][0].function
    assert calls[0][0].function.name == "decide"
    assert "flexgate" in (chunks[-1].model_extra or {})


def test_responses_plain_and_streamed(ai: openai.OpenAI) -> None:
    answer = ai.responses.create(model="tiny", input="the fox", max_output_tokens=4)
    assert answer.id.startswith("resp_")
    assert gate_of(answer)["allowed"][0] == "public"
    with ai.responses.stream(model="tiny", input="the fox", max_output_tokens=4, extra_body=TO_THE_LIMIT) as stream:
        events = list(stream)
    final: Any = events[-1]  # of a cut-off stream the package's own helper has no final response
    assert gate_of(final.response)["attribution"]["method"] == "gate_mass/v1"
    kinds = [event.type for event in events]
    assert kinds[0] == "response.created"
    assert kinds[-1] == "response.incomplete"
    earlier = [getattr(event, "response", None) for event in events[:-1]]
    assert not [r for r in earlier if r is not None and "flexgate" in (r.model_extra or {})]


def test_models(ai: openai.OpenAI) -> None:
    assert [model.id for model in ai.models.list()] == ["tiny", "alias"]
    assert ai.models.retrieve("alias").owned_by == "flexgate"
    with pytest.raises(openai.NotFoundError):
        ai.models.retrieve("/etc/passwd")


def test_errors_are_the_openai_packages_own(ai: openai.OpenAI, server: Any) -> None:
    press = ai.with_options(api_key=server.key("press"), max_retries=0)
    ask: dict[str, Any] = {"model": "tiny", "prompt": "x", "max_tokens": 1}
    with pytest.raises(openai.AuthenticationError) as unknown_key:
        ai.with_options(api_key="sk-nobody").completions.create(**ask)
    assert unknown_key.value.code == "invalid_api_key"
    filtered = {"flexgate": {"experts": {"only": ["math"]}}}
    with pytest.raises(openai.PermissionDeniedError) as denied:
        press.completions.create(**ask, extra_body=filtered)
    assert denied.value.code == "expert_policy_denied"
    assert "allow list" in denied.value.message
    with pytest.raises(openai.BadRequestError) as refused:
        press.completions.create(**ask, extra_body={"vllm_xargs": {"a": "b"}})
    assert refused.value.param == "vllm_xargs"
    with pytest.raises(openai.BadRequestError, match="maximum context length") as long:
        press.completions.create(model="tiny", prompt="the " * 2000)
    assert (long.value.code, long.value.param) == ("context_length_exceeded", "prompt")
    with pytest.raises(openai.BadRequestError, match="none is left for an answer") as full:
        press.completions.create(model="tiny", prompt=[5] * 1024)
    assert (full.value.code, full.value.param) == ("context_length_exceeded", "prompt")
    with pytest.raises(openai.BadRequestError, match="the 1024 tokens of this model cannot hold more"):
        press.completions.create(model="tiny", prompt="the " * 9000, extra_body={"truncate_prompt_tokens": 4})
    with pytest.raises(openai.BadRequestError) as hopeless:
        press.completions.create(**ask, extra_body={"structured_outputs": {"grammar": "root ::= "}})
    assert hopeless.value.param == "structured_outputs"


def test_langchain(server: Any) -> None:
    chat_models = pytest.importorskip("langchain_openai")
    model = chat_models.ChatOpenAI(model="tiny", base_url=f"{server.url}/v1", api_key=server.key("press"), max_tokens=5)
    assert model.invoke("the fox").response_metadata["model_name"] == "tiny"
    assert list(model.stream("the fox"))
    denied = model.bind(extra_body={"flexgate": {"experts": {"only": ["math"]}}})
    with pytest.raises(openai.PermissionDeniedError):
        denied.invoke("the fox")
    tools = model.bind_tools([TOOL], tool_choice="decide").bind(max_tokens=ENOUGH)
    called = tools.invoke("the fox")
    assert called.tool_calls[0]["name"] == "decide"


def test_curl(server: Any) -> None:
    def curl(body: str, *more: str) -> str:
        command = ["curl", "-sS", f"{server.url}/v1/chat/completions", "-d", body, *more]
        command += ["-H", "content-type: application/json"]
        command += ["-H", f"authorization: Bearer {server.key('public')}"]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout

    body = {"messages": HELLO, "max_tokens": 3}
    plain = json.loads(curl(json.dumps(body)))
    assert plain["flexgate"]["allowed"] == ["public"]
    stream = curl(json.dumps({**body, "stream": True}), "-N")
    assert stream.rstrip().endswith("data: [DONE]")
    assert stream.count('"flexgate":') == 1
    head = curl(json.dumps(body), "-i")
    assert "x-flexgate-experts: public\r\n" in head.replace("\n", "\r\n").replace("\r\r", "\r")
