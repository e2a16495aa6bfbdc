"""Client of a running server's HTTP interface: one key, and one sentence per error."""

from __future__ import annotations

from collections.abc import Iterator
from types import TracebackType
from typing import Any, Self

import httpx

from flexgate.experts.errors import ServerRefused, UsageInvalid

Json = dict[str, Any]


class Api:
    """Requests to one server with one key."""

    def __init__(self, url: str, key: str) -> None:
        """Prepare a connection; raises ``UsageInvalid`` for a URL or key that no server accepts."""
        check_access(url, key)
        headers = {"authorization": f"Bearer {key}"}
        self.http = httpx.Client(base_url=url, headers=headers, timeout=httpx.Timeout(60, read=None))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.http.close()

    def text(self, method: str, path: str, **options: Any) -> str:
        """The response's text; raises ``ServerRefused``."""
        return self._answer(method, path, **options).text

    def ask(self, method: str, path: str, **options: Any) -> Json:
        """The response's JSON object; raises ``ServerRefused``."""
        response = self._answer(method, path, **options)
        try:
            answer = response.json()
        except ValueError:
            raise ServerRefused(f"{self.http.base_url} is not a flexgate server: its response is not JSON") from None
        if not isinstance(answer, dict):
            raise ServerRefused(f"{self.http.base_url} is not a flexgate server: its response is not a JSON object")
        return answer

    def _answer(self, method: str, path: str, **options: Any) -> httpx.Response:
        try:
            response = self.http.request(method, path, **options)
        except httpx.TransportError as error:
            raise ServerRefused(f"{self.http.base_url} does not answer: {error}") from error
        if response.is_error:
            raise refused(response)
        return response

    def pages(self, path: str, **query: Any) -> Iterator[Json]:
        """Every object of a list, page after page."""
        while True:
            page = self.ask("GET", path, params={"limit": 100, **query})
            yield from page["data"]
            if not page.get("has_more") or not page["data"]:
                return
            query["after"] = page["data"][-1]["id"]


def check_access(url: str, key: str) -> None:
    """Check a URL and a key without connecting.

    Raises:
        UsageInvalid: the URL has no scheme or host, or the key is empty or cannot be sent.
    """
    try:
        parsed = httpx.URL(url)
    except httpx.InvalidURL as error:
        raise UsageInvalid(f"--url: '{url}' is not a server's URL: {error}") from error
    if parsed.scheme not in ("http", "https") or not parsed.host:
        raise UsageInvalid(f"--url: '{url}' has no scheme or host: give a URL such as http://127.0.0.1:8000")
    if not key.strip():
        raise UsageInvalid("--key: the key is empty: give one here or in FLEXGATE_KEY")
    if not key.isascii() or not key.isprintable() or " " in key:
        raise UsageInvalid(
            "--key: the key has characters that are not allowed in keys: check for spaces and line breaks"
        )


def refused(response: httpx.Response) -> ServerRefused:
    """The server's error message as an exception."""
    try:
        message = response.json()["error"]["message"]
    except (ValueError, KeyError, TypeError):
        message = f"HTTP {response.status_code}"
    return ServerRefused(f"the server says: {message}")
