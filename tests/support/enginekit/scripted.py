"""A real engine in a child process, driven step by step under a scripted schedule.

One vLLM engine fits into a process, so every configuration gets a child of its own; the
parent sends it commands over a pipe. Requests arrive at given steps, so two runs of the
same script have the same batches, and bits can be compared.
"""

import functools
import math
import multiprocessing
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing import forkserver
from pathlib import Path
from typing import Any
from unittest import mock

from enginekit.ranks import overwrite_slots, restore_slots


@dataclass(frozen=True)
class Ask:
    """One request of a script."""

    prompt: tuple[int, ...]
    gate: tuple[int, ...]
    max_tokens: int = 8
    at_step: int = 0
    tenant: str = "tenant"
    client_salt: str | None = None
    prompt_logprobs: bool = False
    valid_for: float = math.inf
    epochs: dict[int, int] | None = None  # other than the live ones
    priority: int = 0
    regex: str | None = None  # which the answer has to match
    choices: int = 1
    seed: int | None = None  # sampled by it, not the likeliest
    abort_at_step: int | None = None  # just before it, as where a client left


@dataclass(frozen=True)
class Answer:
    """What came back: exact token ids and log-probabilities of the first choice, and what all used."""

    tokens: tuple[int, ...]
    logprobs: tuple[tuple[tuple[int, float], ...], ...]
    prompt_logprobs: tuple[tuple[tuple[int, float], ...], ...]
    cached: int
    prompt_positions: int
    mass: tuple[int, ...]
    chosen: tuple[int, ...]
    choices: tuple[tuple[int, ...], ...]  # the tokens of each
    finish_reason: str | None
    stop_reason: Any
    step: int = field(compare=False)  # after which it was complete


@dataclass(frozen=True)
class SlotChange:
    """A change of a slot just before a step: ``fill``, ``settle``, ``open``, ``close`` or ``clear``.

    ``fill`` and ``clear`` start in the background; ``settle`` waits for them and fails where they failed.
    """

    at_step: int
    do: str
    slot: int = 0
    slot_epoch: int = 0
    ticket: Any = None


@dataclass
class EngineScript:
    """How the child builds its engine."""

    model: Path
    max_experts: int | None = None
    tuning: dict[str, Any] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    environment: dict[str, str] = field(default_factory=dict)
    interpret_triton: bool = False  # lets Model Runner V2 run on CPU
    interpret_kernels: bool = False  # our Triton kernels in place of what computes CPU tensors

    @property
    def needs_its_own_imports(self) -> bool:
        """Whether something is set that vLLM, torch or Triton read when they are imported, or other ranks inherit."""
        compiled = not self.settings.get("enforce_eager", True)
        return bool(compiled or self.environment or self.interpret_triton or self.interpret_kernels)


class ScriptedEngine:
    """The parent's handle on a child with one engine."""

    def __init__(self, connection: Any) -> None:
        self._connection = connection

    def call(self, name: str, *args: Any) -> Any:
        self._connection.send((name, args))
        ok, value = self._connection.recv()
        if not ok:
            raise RuntimeError(value)
        return value

    def run(self, script: Sequence[Ask], changes: Sequence[SlotChange] = ()) -> list[Answer]:
        """Run a script to its end, with slots changing on the way; return the answers in order."""
        answers: list[Answer] = self.call("run", list(script), list(changes))
        return answers

    def change(self, *changes: SlotChange) -> list[Any]:
        """Change slots while nothing runs; what each change returned, in order."""
        results: list[Any] = self.call("change", list(changes))
        return results

    def solo(self, ask: Ask) -> Answer:
        """Run one request alone."""
        (answer,) = self.run([ask])
        return answer

    def overwrite(self, slots: Sequence[int], kind: str) -> None:
        """Fill slots' FFN, router row and bias with ``nan``, ``1e30``, ``-1e30``, ``random`` or ``zero``.

        ``nan-weights`` leaves router row and bias, so that not every token meets it.
        """
        self.call("on_every_rank", overwrite_slots, list(slots), kind)

    def restore(self) -> None:
        """Undo every overwrite."""
        self.call("on_every_rank", restore_slots)

    def reset_cache(self) -> None:
        """Forget all cached prefixes."""
        self.call("reset_cache")

    def refusal(self, ask: Ask, how: str) -> str:
        """Submit ``ask`` with a gate spoiled as ``how`` says; return the refusal's text."""
        text: str = self.call("refusal", ask, how)
        return text


@functools.cache
def _preloaded() -> Any:
    """Forks of one process that has loaded vLLM, because loading it takes longer than starting an engine."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["enginekit.preloaded"])
    path = os.pathsep.join([str(Path(__file__).parents[1]), *os.environ.get("PYTHONPATH", "").split(os.pathsep)])
    with mock.patch.dict(os.environ, PYTHONPATH=path.strip(os.pathsep)):
        forkserver.ensure_running()
    return context


@contextmanager
def scripted_engine(script: EngineScript) -> Iterator[ScriptedEngine]:
    """Start a child with one engine, and end it."""
    context = multiprocessing.get_context("spawn") if script.needs_its_own_imports else _preloaded()
    parent, child = context.Pipe()
    process = context.Process(target=_child, args=(child, script))
    process.start()
    child.close()
    try:
        ok, value = parent.recv()
        if not ok:
            raise RuntimeError(value)
        yield ScriptedEngine(parent)
        parent.send(("stop", ()))
        process.join(60)
    finally:
        if process.is_alive():
            process.kill()
        process.join()


def _child(connection: Any, script: EngineScript) -> None:
    import traceback

    os.environ.update(script.environment)
    try:
        from enginekit.child import Engine

        if script.interpret_triton:
            _stand_in_for_a_triton_device()
        engine = Engine(script)
    except BaseException:
        connection.send((False, traceback.format_exc()))
        return
    connection.send((True, None))
    while True:
        name, args = connection.recv()
        if name == "stop":
            os._exit(0)
        try:
            connection.send((True, getattr(engine, name)(*args)))
        except BaseException:
            connection.send((False, traceback.format_exc()))


def _stand_in_for_a_triton_device() -> None:
    """Make Triton report one active driver, and interpret its kernels."""
    import types

    os.environ["TRITON_INTERPRET"] = "1"
    os.environ["VLLM_USE_V2_MODEL_RUNNER"] = "1"
    import triton.backends

    driver = type("Driver", (), {"is_active": staticmethod(lambda: True)})
    triton.backends.backends["cpu"] = types.SimpleNamespace(driver=driver, compiler=None)
