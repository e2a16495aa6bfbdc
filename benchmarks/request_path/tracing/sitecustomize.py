"""Instruments of `request_path`, in every process that a server starts: which functions of ours one request enters.

Python imports a module of this name by itself where its folder is on PYTHONPATH. It does nothing unless
FLEXGATE_PATH names a folder; there, each process appends one JSON list per request: the functions that it entered, in
order, each as its file and name. Comprehensions and generator expressions, which Python 3.11 runs as functions, are
left out; so are the methods that `dataclass` generates, which stand in no file; a coroutine that goes on after it
waited is not entered again. The API process follows the connection and the request's own task, with what that starts,
until the request goes to the engine core, which follows everything of ours from the guard to the router. So send one
request at a time. A profile slows everything down: it begins with the first byte of a request, and in the engine core
with a request that passes the guard.
"""

import contextvars
import json
import os
import sys
from collections.abc import Callable, Sequence
from functools import wraps
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from pathlib import Path
from types import FrameType
from typing import Any

FOLDER = os.environ.get("FLEXGATE_PATH")
PACKAGE = f"{os.sep}flexgate{os.sep}"
# Where each stands now, and where it stood before the folders had their present plan.
CONNECTION = ("server/http/connections.py", "server/connections.py")
MIDDLEWARE = ("server/http/middleware.py", "server/gateway.py")
GUARD = ("server/engine/core/guard.py", "server/engine/guard.py")
HANDOVER = ("server/engine/seam/requests.py", "server/engine/seam.py")
ROUTER = "kernels/gated_topk/"
PARTS_OF_A_FUNCTION = frozenset(["<listcomp>", "<setcomp>", "<dictcomp>", "<genexpr>"])

_mine: contextvars.ContextVar[bool] = contextvars.ContextVar("flexgate_path", default=False)
_names: dict[str, str] = {}
_entered: list[tuple[str, str]] = []
_seen: list[FrameType] = []  # kept, so that no other frame gets the place of one
_in_core = False


def follow(frame: FrameType, event: str, _argument: Any) -> None:
    """Note that a function of ours is entered; one that goes on after it waited is not entered again."""
    global _in_core
    if event != "call":
        return
    file = frame.f_code.co_filename
    name = _names.get(file)
    if name is None:
        name = _names[file] = file.partition(PACKAGE)[2] if file.endswith(".py") else ""
    function = frame.f_code.co_name
    if not name or function in PARTS_OF_A_FUNCTION:
        return
    if name in MIDDLEWARE and function == "__call__":
        _mine.set(True)
    elif name in GUARD and function == "__call__":
        _in_core = True
    elif name in CONNECTION and function == "data_received" and any(file in MIDDLEWARE for file, _ in _entered):
        _forget()  # a request that did not go to the engine
    if (_in_core or name in CONNECTION or _mine.get()) and not any(frame is other for other in _seen):
        _seen.append(frame)
        _entered.append((name, frame.f_code.co_qualname))
        if _in_core and name.startswith(ROUTER):
            _in_core = False
            sys.setprofile(None)
            _write()
        elif name in HANDOVER and function == "add_request" and not _in_core:
            _mine.set(False)
            _write()


def _write() -> None:
    with Path(FOLDER or "", f"{os.getpid()}.jsonl").open("a") as file:
        file.write(json.dumps(_entered) + "\n")
    _forget()


def _forget() -> None:
    _entered.clear()
    _seen.clear()


def profiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, which begins the profile of its thread."""

    @wraps(function)
    def run(*arguments: Any, **named: Any) -> Any:
        sys.setprofile(follow)
        return function(*arguments, **named)

    return run


def profiled_in_core(function: Callable[..., Any]) -> Callable[..., Any]:
    """The same, while a request is between guard and router."""

    @wraps(function)
    def run(*arguments: Any, **named: Any) -> Any:
        if _in_core:
            sys.setprofile(follow)
        return function(*arguments, **named)

    return run


STARTS = {
    "flexgate.server.http.connections": ("BoundedProtocol", "data_received", profiled),
    "flexgate.server.engine.core.guard": ("EngineGuard", "__call__", profiled),
    "flexgate.server.engine.core.scheduler": ("_Gated", "schedule", profiled_in_core),
    "flexgate.server.connections": ("BoundedProtocol", "data_received", profiled),
    "flexgate.server.engine.guard": ("EngineGuard", "__call__", profiled),
    "flexgate.server.engine.scheduler": ("_Gated", "schedule", profiled_in_core),
}


class AfterImport:
    """Wraps a method of a module's class once the module is imported."""

    def find_spec(self, name: str, _path: Sequence[str] | None = None, _target: Any = None) -> ModuleSpec | None:
        """The module's own spec, with a loader that wraps."""
        if name not in STARTS:
            return None
        owner, method, wrap = STARTS.pop(name)
        spec = find_spec(name)
        if spec is not None and spec.loader is not None:
            load = spec.loader.exec_module

            def exec_module(module: Any) -> None:
                load(module)
                kind = getattr(module, owner)
                setattr(kind, method, wrap(getattr(kind, method)))

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


if FOLDER:
    sys.meta_path.insert(0, AfterImport())  # type: ignore[arg-type]
