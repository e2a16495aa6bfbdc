"""One vLLM engine per variant, each in a process of its own, asked in turns for one batch at a time.

The engine core is a process below that one, as it is when serving, so what travels with every
output is part of what is measured.
"""

import math
import multiprocessing
import os
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

CPUCLOCK_SCHED = 2  # Linux: a process's id and this make the clock of its processor time


@dataclass(frozen=True)
class Batch:
    """Requests that arrive together, each with a prompt of its own."""

    requests: int
    prompt_tokens: int
    new_tokens: int


@dataclass(frozen=True)
class Timed:
    """Until every request had its first token, and from there to the last one.

    Wall-clock seconds, and processor seconds of the engine and its front end together: on a
    shared machine the second are the steadier measure.
    """

    prefill: float
    decode: float
    prefill_cpu: float
    decode_cpu: float


class Engine:
    """The parent's handle on a variant."""

    def __init__(self, connection: Any) -> None:
        self._connection = connection

    def wait_until_started(self) -> None:
        """Wait once before the first batch; raises `RuntimeError` with what stopped it."""
        started = self._connection.recv()
        if started is not None:
            raise RuntimeError(started)

    def run(self, batch: Batch) -> Timed:
        """Run one batch to its end."""
        self._connection.send(batch)
        answer = self._connection.recv()
        if not isinstance(answer, Timed):
            raise RuntimeError(answer)
        return answer


@contextmanager
def engine(variant: str, model: Path, *, eager: bool) -> Iterator[Engine]:
    """Begin to start a variant, and end it."""
    context = multiprocessing.get_context("spawn")
    parent, child = context.Pipe()
    process = context.Process(target=_child, args=(child, variant, model, eager))
    process.start()
    child.close()
    try:
        yield Engine(parent)
        parent.send(None)
        process.join(60)
    finally:
        if process.is_alive():
            process.kill()
        process.join()


def _child(connection: Any, variant: str, model: Path, eager: bool) -> None:
    running = None
    try:
        running = _Running(variant, model, eager)
        connection.send(None)
        while (batch := connection.recv()) is not None:
            connection.send(running.run(batch))
    except BaseException:
        connection.send(traceback.format_exc())
    finally:
        if running is not None:
            running.engine.engine_core.shutdown()  # ends the engine core, which is waited for


class _Running:
    def __init__(self, variant: str, model: Path, eager: bool) -> None:
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
        from flexgate.server.engine.frontend import launch
        from flexgate.server.engine.protocol import gates

        settings = launch.EngineSettings(model=model, enforce_eager=eager)
        planned = launch.plan(settings)
        self.key = gates.new_seal_key()
        launch.prepare_environment(self.key, settings)
        tuning: dict[str, Any] = {}
        if variant != "gated":
            os.environ["VLLM_PLUGINS"] = ""
            tuning = {"scheduler_cls": None, "worker_cls": "auto"}
        if variant == "ungated":
            import speed.ungated  # noqa: F401 - registers its model

            tuning["worker_cls"] = "speed.ungated.PlainWorker"
        from vllm.v1.engine.llm_engine import LLMEngine

        self.gated = variant == "gated"
        self.table = planned.table
        self.vocabulary = planned.checkpoint.architecture.vocab_size
        self.engine = LLMEngine.from_vllm_config(launch.engine_config(planned, **tuning))
        processes = [os.getpid(), *(child.pid for child in psutil.Process().children(recursive=True))]
        self.cpu_clocks = [(~pid << 3) | CPUCLOCK_SCHED for pid in processes]
        self.count = 0
        self.run(Batch(2, 32, 4))

    def run(self, batch: Batch) -> Timed:
        import numpy as np

        drawn = np.random.default_rng(self.count).integers(4, self.vocabulary, (batch.requests, batch.prompt_tokens))
        prompts = drawn.tolist()
        began = self._clocks()
        waiting = {self._add(prompt, batch.new_tokens) for prompt in prompts}
        first = None
        while self.engine.has_unfinished_requests():
            waiting -= {output.request_id for output in self.engine.step()}
            if first is None and not waiting:
                first = self._clocks()
        if first is None:
            raise RuntimeError("a batch ended without tokens")
        ended = self._clocks()
        return Timed(first[0] - began[0], ended[0] - first[0], first[1] - began[1], ended[1] - first[1])

    def _clocks(self) -> tuple[float, float]:
        """Wall-clock and processor seconds."""
        return time.perf_counter(), sum(time.clock_gettime(clock) for clock in self.cpu_clocks)

    def _add(self, prompt: list[int], new_tokens: int) -> str:
        from vllm.sampling_params import SamplingParams

        self.count += 1
        request_id = f"request-{self.count}"
        extra = {"flexgate": self._sealed(request_id)} if self.gated else None
        params = SamplingParams(
            temperature=0.0, max_tokens=new_tokens, ignore_eos=True, detokenize=False, extra_args=extra
        )
        self.engine.add_request(request_id, {"prompt_token_ids": prompt}, params)
        return request_id

    def _sealed(self, request_id: str) -> str:
        """A gate that allows every expert, so that all variants do the same arithmetic."""
        from flexgate.server.engine.protocol import gates

        refs = tuple(self.table.ref(slot) for slot in sorted(self.table.live))
        return gates.seal(gates.Gate(request_id, "bench", refs, math.inf, "salt"), self.key)
