"""Nothing that a client can write changes a gate, another tenant's state or a request's id.

Whatever is refused is refused before a handler; whatever is served is served under the gate that
the policy gives a request that says nothing.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from flexgate.server.inference.request import fields

BASE: dict[str, tuple[fields.Table, dict[str, Any]]] = {
    "/v1/chat/completions": (fields.CHAT, {"messages": [{"role": "user", "content": "x"}]}),
    "/v1/completions": (fields.COMPLETION, {"prompt": "x"}),
    "/v1/responses": (fields.RESPONSES, {"input": "x"}),
}
SEALED = "WyJyIl0.bWFj"
WISHES: list[Any] = [
    {"flexgate": SEALED},
    {"flexgate": {"experts": {"only": ["math", "secret"]}}},
    {"experts": {"only": []}},
    {"experts": {"only": ["public"]}},
    {"experts": {"ignore": ["news"]}},
    {"experts": {"only": ["public"], "ignore": ["set:press"]}},
    {"extra_args": {"flexgate": SEALED}},
    {"cache_salt": "other-tenant"},
    {"tenant": "other", "allowed": ["math", "secret"]},
    ["math", "secret"],
    "math",
    "sk-admin",
    SEALED,
    True,
    1,
    -1,
    {},
    [],
]
HEADERS = [
    "x-flexgate-experts",
    "x-flexgate-tenant",
    "x-flexgate-gate",
    "x-request-id",
    "x-session-id",
    "x-vllm-priority",
    "x-data-parallel-rank",
    "x-forwarded-for",
    "x-original-url",
    "x-http-method-override",
    "openai-organization",
    "openai-project",
    "cookie",
    "x-api-key",
    "api-key",
    "endpoint-load-metrics-format",
    "traceparent",
]
ALLOWED = ["public", "news"]
"""What `t` may use, and what it must."""
TOP_LEVEL = [
    "extra_args",
    "sampling_params",
    "gate",
    "experts",
    "only",
    "tenant",
    "slots",
    "refs",
]
TOP_LEVEL += ["__class__", "constructor", "extra_body", "lora_request", "data_parallel_rank"]


def corpus() -> Iterator[tuple[str, str, Any]]:
    for path, (table, _) in BASE.items():
        for name in [*table, *fields.STRUCTURED_OUTPUTS, *TOP_LEVEL]:
            for wish in WISHES:
                yield path, name, wish


def unchanged(handler: Any) -> None:
    """Every call that reached a handler has the tenant's own gate, and all of it, since all is required."""
    for request, call in zip(handler.seen, handler.calls, strict=True):
        assert [ref.expert for ref in call.experts] == ALLOWED
        assert call.tenant == "t"
        for name in ("vllm_xargs", "kv_transfer_params", "ec_transfer_params", "cache_salt"):
            assert getattr(request, name, None) is None
        assert not request.priority
        assert not request.session_id
        assert not request.model_extra
        assert len(request.request_id.removeprefix("resp_")) == 32


@pytest.mark.asyncio
@pytest.mark.parametrize("path", BASE)
async def test_no_field_changes_a_gate(client: httpx.AsyncClient, handler: Any, path: str) -> None:
    handler.result = ValueError("reached")
    table, base = BASE[path]
    statuses: set[int] = set()
    for _, name, wish in (case for case in corpus() if case[0] == path):
        if name in base:
            continue
        response = await client.post(path, json={**base, name: wish})
        statuses.add(response.status_code)
        if name not in table:
            assert response.status_code == 400
            assert response.json()["error"]["param"] == name
    assert statuses <= {400, 403, 404}
    assert handler.seen, "the corpus reached no handler: it proves nothing"
    unchanged(handler)


@pytest.mark.asyncio
async def test_no_header_changes_a_gate_or_an_id(client: httpx.AsyncClient, handler: Any) -> None:
    handler.result = ValueError("reached")
    for name in HEADERS:
        for value in ("math,secret", "sk-admin", SEALED, "1", "../../x", "mine"):
            for path, (_, base) in BASE.items():
                await client.post(path, json=base, headers={name: value})
    assert len(handler.seen) == len(HEADERS) * 6 * len(BASE)
    unchanged(handler)
    assert all([e.expert for e in call.experts] == ALLOWED for call in handler.calls)
    assert len({request.request_id for request in handler.seen}) == len(handler.seen)


@pytest.mark.asyncio
async def test_no_query_changes_a_gate(client: httpx.AsyncClient, handler: Any) -> None:
    handler.result = ValueError("reached")
    for query in ("experts=math", "api_key=sk-admin", "flexgate=%7B%7D", "model=x&tenant=other"):
        await client.post(f"/v1/completions?{query}", json={"prompt": "x"})
    assert len(handler.seen) == 4
    unchanged(handler)


ONCE = {
    "authorization": ("Bearer sk-t", "Bearer sk-u"),
    "host": ("test", "evil.test"),
    "content-type": ("application/json", "text/plain"),
    "content-encoding": ("identity", "gzip"),
    "content-length": ("15", "16"),
    "transfer-encoding": ("identity", "chunked"),
    "x-flexgate-experts": ("public", "math"),
}


@pytest.mark.asyncio
@pytest.mark.parametrize("name", ONCE)
@pytest.mark.parametrize("same", [False, True])
async def test_a_header_that_is_there_twice_is_refused(services: Any, handler: Any, name: str, same: bool) -> None:
    """By whichever of the two a proxy in front has judged the request."""
    handler.result = ValueError("reached")
    first, second = ONCE[name]
    headers = {"authorization": "Bearer sk-t", "host": "test", "content-type": "application/json", name: first}
    raw = [(key.encode(), value.encode()) for key, value in headers.items()]
    twice = (name.encode(), (first if same else second).encode())
    for order in ([*raw, twice], [twice, *raw]):
        status, body = await bare(services, order)
        assert (status, body["error"]["code"]) == (400, "duplicate_header")
        assert f"'{name}'" in body["error"]["message"]
    assert not handler.seen


async def bare(services: Any, headers: list[tuple[bytes, bytes]]) -> tuple[int, dict[str, Any]]:
    """The answer to a completion with exactly these headers."""
    from flexgate.server.lifecycle.app import build_app

    sent: list[Any] = []
    scope = {"type": "http", "method": "POST", "path": "/v1/completions", "raw_path": b"/v1/completions"}
    scope |= {"query_string": b"", "headers": headers, "http_version": "1.1", "scheme": "http", "root_path": ""}

    messages = iter([{"type": "http.request", "body": b'{"prompt": "x"}', "more_body": False}])

    async def receive() -> Any:
        return next(messages, {"type": "http.disconnect"})

    async def send(message: Any) -> None:
        sent.append(message)

    await build_app(services)(scope, receive, send)
    return sent[0]["status"], json.loads(sent[1]["body"])


@pytest.mark.asyncio
@pytest.mark.parametrize("place", ["%s", '{"prompt": "x", "a": [%s]}'], ids=["top", "deep"])
async def test_a_key_that_is_there_twice_is_refused(client: httpx.AsyncClient, handler: Any, place: str) -> None:
    handler.result = ValueError("reached")
    inner = '{"experts": {"only": ["math"]}}'
    for first, second in ((inner, "null"), ("null", inner), ("null", "null")):
        body = place % f'{{"prompt": "x", "flexgate": {first}, "flexgate": {second}}}'
        response = await client.post("/v1/completions", content=body, headers={"content-type": "application/json"})
        assert (response.status_code, response.json()["error"]["code"]) == (400, "invalid_body")
        assert "'flexgate' twice" in response.json()["error"]["message"]
    assert not handler.seen


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
NAMES = sorted({name for table, _ in BASE.values() for name in table} | set(TOP_LEVEL))


@settings(
    max_examples=300,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(path=st.sampled_from(sorted(BASE)), extra=st.dictionaries(st.sampled_from(NAMES), JSON))
@pytest.mark.asyncio
async def test_no_body_does_more_than_be_refused(
    make_client: Callable[..., httpx.AsyncClient], handler: Any, path: str, extra: dict[str, Any]
) -> None:
    handler.result = ValueError("reached")
    handler.seen.clear()
    handler.calls.clear()
    try:
        body = json.dumps({**BASE[path][1], **extra}).encode()
    except (ValueError, OverflowError):
        return
    async with make_client() as http:
        response = await http.post(path, content=body, headers={"content-type": "application/json"})
    assert response.status_code in (400, 403, 404, 503), response.text
    assert response.json()["error"].keys() == {"message", "type", "param", "code"}
    unchanged(handler)
