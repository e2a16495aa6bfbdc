"""Client for a server's experts: upload a package, follow its job, revoke an expert.

An interrupted upload resumes: the server reports how much of each file it has.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

import httpx

from flexgate.experts.cli.api import Api, Json, refused
from flexgate.experts.errors import PackageUnreadable, ServerRefused
from flexgate.experts.package.files import NAMES

CHUNK: Final = 1 << 22
PIECE: Final = 1 << 26
"""Bytes of one request; at most this much is sent again after a broken connection."""
ATTEMPTS: Final = 5
Progress = Callable[[int], None]


class Server(Api):
    """A server's experts, for an administrator's or owner's key."""

    def experts(self) -> list[Json]:
        """What `GET /v1/experts` lists for this key."""
        listed: list[Json] = self.ask("GET", "/v1/experts")["data"]
        return listed

    def upload(self, package: Path, progress: Progress) -> str:
        """Send a package's files; returns the upload's id.

        Raises:
            PackageUnreadable: `package` is not a folder with a package's files.
            ServerRefused: the server refused it; has its message.
        """
        paths = {path.name: path for path in sorted(package.iterdir())} if package.is_dir() else {}
        if not paths or not paths.keys() <= NAMES:
            raise PackageUnreadable(
                f"{package} is not an expert package: it must contain {', '.join(sorted(NAMES))} only"
            )
        sizes = {name: path.stat().st_size for name, path in paths.items()}
        id_: str = self.ask("POST", "/v1/expert_uploads", json={"files": sizes})["id"]
        for name, path in paths.items():
            self._send(id_, name, path, progress)
        return id_

    def add(self, source: Json) -> Json:
        """Start to add ``{"upload": id}`` or ``{"package": name}``; returns the job."""
        return self.ask("POST", "/v1/experts", json=source)

    def follow(self, job: str) -> Iterator[Json]:
        """Every state of a job until it has ended."""
        with self.http.stream("GET", f"/v1/expert_jobs/{job}", params={"stream": "true"}) as response:
            if response.is_error:
                response.read()
                raise refused(response)
            for line in response.iter_lines():
                if line.startswith("data: {"):
                    yield json.loads(line.removeprefix("data: "))

    def revoke(self, expert: str, drain_seconds: float) -> Json:
        """Revoke an expert; returns the record."""
        return self.ask("DELETE", f"/v1/experts/{expert}", params={"drain_seconds": drain_seconds})

    def _send(self, id_: str, name: str, path: Path, progress: Progress) -> None:
        size, failures, shown = path.stat().st_size, 0, 0
        while True:
            offset = self.ask("GET", f"/v1/expert_uploads/{id_}")["files"][name]["received"]
            progress(offset - shown)
            shown = offset
            if offset >= size:
                return
            try:
                content = _pieces(path, offset)
                url = f"/v1/expert_uploads/{id_}/{name}"
                response = self.http.patch(url, params={"offset": offset}, content=content)
            except httpx.TransportError as error:
                failures += 1
                if failures >= ATTEMPTS:
                    raise ServerRefused(
                        f"the connection broke {failures} times while {name} was sent: {error}"
                    ) from error
                time.sleep(failures)
                continue
            if response.is_error:
                raise refused(response)


def _pieces(path: Path, offset: int) -> Iterator[bytes]:
    with path.open("rb") as file:
        file.seek(offset)
        left = PIECE
        while left and (chunk := file.read(min(CHUNK, left))):
            left -= len(chunk)
            yield chunk
