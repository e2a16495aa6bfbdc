"""The engine inside a child process: what :class:`enginekit.scripted.ScriptedEngine` calls by name."""

import math
import os
from typing import Any

from enginekit.ranks import register_request
from enginekit.scripted import Answer, Ask, EngineScript, SlotChange

ANY_BITS = 3  # log-probabilities returned per position


class Engine:
    """One engine and its requests; vLLM is loaded once its environment is set."""

    def __init__(self, script: EngineScript) -> None:
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        os.environ.setdefault("OMP_NUM_THREADS", "1")
        from flexgate.server.engine.frontend import launch
        from flexgate.server.engine.protocol.gates import new_seal_key

        options: dict[str, Any] = {
            "dtype": "float32",
            "enforce_eager": True,
            "kv_cache_memory_bytes": 64 << 20,
            "max_num_seqs": 16,
            "max_num_batched_tokens": 512,
        }
        settings = launch.EngineSettings(
            model=script.model, max_experts=script.max_experts, **(options | script.settings)
        )
        planned = launch.plan(settings)
        self.key = new_seal_key()
        launch.prepare_environment(self.key, settings)
        if script.interpret_kernels:
            from flexgate.kernels.testing.interpreter import interpret_operators

            self.kernel_calls = interpret_operators()
        from vllm.v1.engine.llm_engine import LLMEngine

        from flexgate.server.engine.seam.engine import validate_no_grammar_here
        from flexgate.server.engine.seam.requests import take_output_extras

        validate_no_grammar_here()
        config = launch.engine_config(planned, **script.tuning)
        self.engine = LLMEngine.from_vllm_config(config)
        self.calls: dict[str, Any] = {}  # as the API process keeps them
        self.seen: dict[str, dict[int, Any]] = {}
        take_output_extras(self.engine, self._take)
        self.table = planned.table
        self.model = script.model
        self.count = 0
        self.preempted = 0
        scheduler = self.engine.engine_core.engine_core.scheduler
        preempt = scheduler._preempt_request

        def counted(*args: Any, **kwargs: Any) -> Any:
            self.preempted += 1
            return preempt(*args, **kwargs)

        scheduler._preempt_request = counted

    def run(self, script: list[Ask], changes: list[SlotChange]) -> list[Answer]:
        ids: dict[int, str] = {}
        finished: dict[str, int] = {}
        step = 0
        while len(finished) < len(script):
            self.change([change for change in changes if change.at_step == step])
            for index, ask in enumerate(script):
                if ask.at_step == step:
                    ids[index] = self._submit(ask)
                if ask.abort_at_step == step and ids[index] not in finished:
                    self.engine.abort_request([ids[index]])
                    finished[ids[index]] = step
            for output in self.engine.step() if self.engine.has_unfinished_requests() else []:
                self._see(output)
                if output.finished:
                    finished[output.request_id] = step
            step += 1
        return [self._answer(ids[index], finished[ids[index]]) for index in range(len(script))]

    def _see(self, output: Any) -> None:
        """Keep the newest of each choice."""
        self.seen[output.request_id] |= {completion.index: (completion, output) for completion in output.outputs}

    def _take(self, output: Any, request_id: str | None) -> None:
        extras, output.kv_transfer_params = output.kv_transfer_params, None
        if extras is not None and request_id in self.calls:
            self.calls[request_id].count_usage(request_id, output.request_id, extras["flexgate"])

    def run_beside_a_late_mask(self, late: Ask, beside: Ask, sent: int) -> tuple[Answer, Answer, list[tuple[int, int]]]:
        """Send a signal to what follows ``late`` once that has begun, and run ``beside`` meanwhile.

        Returns:
            The answer of ``beside``; that of ``late``, whose process went on afterwards if it lives; and how many
            tokens each of the two had at each step of ``beside``.
        """
        import signal

        first, tokens, finished = self._submit(late), dict[str, int](), set[str]()

        def step() -> None:
            for output in self.engine.step():
                self._see(output)
                tokens[output.request_id] = len(output.outputs[0].token_ids)
                if output.finished:
                    finished.add(output.request_id)

        while tokens.get(first, 0) < 3:
            step()
        self._signal_followers(sent)
        second, counts = self._submit(beside), list[tuple[int, int]]()
        while second not in finished:
            step()
            counts.append((tokens.get(second, 0), tokens[first]))
        self._signal_followers(signal.SIGCONT)
        while first not in finished:
            step()
        return self._answer(second, 0), self._answer(first, 0), counts

    def followed(self) -> int:
        """Requests that processes follow a constraint for."""
        import gc

        gc.collect()
        followers = self.engine.engine_core.engine_core.scheduler._patience.followers
        return sum(len(follower.followed) for follower in followers._listed)

    def _signal_followers(self, sent: int) -> None:
        import psutil

        forker = self.engine.engine_core.engine_core.scheduler._patience.followers._forker
        for child in psutil.Process(forker.pid).children():
            child.send_signal(sent)

    def on_every_rank(self, what: Any, *args: Any) -> Any:
        return self.engine.collective_rpc(what, args=args)

    def ask_ranks(self, name: str, *args: Any) -> list[Any]:
        from flexgate.server.engine.seam.engine import answers

        return answers(self.engine.collective_rpc(name, args=args))

    def change(self, changes: list[SlotChange]) -> list[Any]:
        return [getattr(self, f"_{change.do}")(change) for change in changes]

    def _fill(self, change: SlotChange) -> None:
        from flexgate.server.engine.protocol.slot_tasks import to_wire

        self.ask_ranks("flexgate_load", change.slot, to_wire(change.ticket))

    def _clear(self, change: SlotChange) -> None:
        self.ask_ranks("flexgate_clear", change.slot)

    def _settle(self, change: SlotChange) -> list[str]:
        import time

        while True:
            reports = self.ask_ranks("flexgate_task", change.slot)
            if all(report["state"] != "running" for report in reports):
                break
            time.sleep(0.001)
        if failed := [report["error"] for report in reports if report["state"] != "done"]:
            raise RuntimeError(failed[0])
        return [report["digest"] for report in reports]

    def _open(self, change: SlotChange) -> None:
        self.ask_ranks("flexgate_open", change.slot, change.slot_epoch)
        self._ask_core("open", change)

    def _close(self, change: SlotChange) -> Any:
        closed = self._ask_core("close", change)
        self.ask_ranks("flexgate_close", change.slot)
        return closed

    def _ask_core(self, do: str, change: SlotChange) -> Any:
        command = {"do": do, "slot": change.slot, "slot_epoch": change.slot_epoch}
        return self.engine.engine_core.engine_core.flexgate_slots(command)

    def digests(self) -> list[list[str]]:
        """Per rank, what every slot holds."""
        return self.ask_ranks("flexgate_digests")

    def reset_cache(self) -> None:
        if not self.engine.reset_prefix_cache():
            raise RuntimeError("the prefix cache was in use")

    def handshake(self) -> Any:
        return self.ask_ranks("flexgate_handshake")

    def calls_of_kernels(self) -> dict[str, int]:
        """How often each interpreted operator has been called."""
        return dict(self.kernel_calls)

    def packs_like_loaded(self, slots: list[int]) -> bool:
        """Whether each layer's `pack` of the checkpoint's tensors equals what was loaded, bit for bit."""
        import torch
        from safetensors.torch import load_file

        stored = load_file(self.model / "model.safetensors")
        same = []
        for index, layer in enumerate(self._moe_layers()):
            held = layer.experts.routed_experts
            for slot in slots:
                name = f"model.layers.{index}.mlp.experts.{slot}.{{}}_proj.weight"
                gate, up, down = (stored[name.format(part)] for part in ("gate", "up", "down"))
                w13, w2 = layer.pack(torch.cat((gate, up)), down)
                same += [torch.equal(w13, held.w13_weight[slot]), torch.equal(w2, held.w2_weight[slot])]
        return len(same) > 0 and all(same)

    def preemptions(self) -> int:
        """Preemptions since the engine started."""
        return self.preempted

    def set_clock_back(self, seconds: float) -> None:
        """The machine's clock, as the engine core reads it, from now on; 0 sets it right."""
        import time

        clock = self.engine.engine_core.engine_core.scheduler._clock
        self._right_clock = getattr(self, "_right_clock", time.time)
        right = self._right_clock
        time.time = clock._machine = lambda: right() - seconds

    def leftovers(self) -> tuple[int, int]:
        """Requests that gates and ledger still hold when nothing runs."""
        scheduler = self.engine.engine_core.engine_core.scheduler
        return len(scheduler._ledger.totals), len(scheduler._held) + len(scheduler._constrained)

    def refusal(self, ask: Ask, how: str) -> str:
        import time

        from flexgate.server.engine.protocol import gates

        request_id = self._new_id()
        gate = self._gate(ask, request_id)
        sealed: Any = gates.seal(gate, self.key)
        if how == "none":
            sealed = None
        elif how == "forged":
            sealed = gates.seal(gate, gates.new_seal_key())
        elif how == "another":
            sealed = gates.seal(self._gate(ask, "another-request"), self.key)
        elif how == "expired":
            late = Ask(ask.prompt, ask.gate, valid_for=-1.0)
            sealed = gates.seal(self._gate(late, request_id), self.key)
        elif how == "stale":
            refs = tuple(gates.SlotRef(s, 99) for s in ask.gate)
            sealed = gates.seal(gates.Gate(request_id, "tenant", refs, time.time() + 60, "salt"), self.key)
        elif how == "free-slot":
            refs = (gates.SlotRef(self.table.total - 1, 1),)
            sealed = gates.seal(gates.Gate(request_id, "tenant", refs, time.time() + 60, "salt"), self.key)
        try:
            self._add(request_id, ask, sealed)
        except gates.GateError as error:
            # The front end has registered what the engine core refused.
            self.engine.output_processor.abort_requests([request_id], internal=False)
            return str(error)
        raise RuntimeError(f"a request with a gate spoiled as {how!r} was accepted")

    def _moe_layers(self) -> Any:
        return self.engine.model_executor.driver_worker.worker.model_runner.get_model().moe_layers()

    def register_on_ranks(self, ask: Ask, request_id: str) -> list[str | None]:
        """Show every rank a request whose gate was sealed for ``request-x``, past the guard."""
        from flexgate.server.engine.protocol import gates

        sealed = gates.seal(self._gate(ask, "request-x"), self.key)
        return self.engine.collective_rpc(register_request, args=(request_id, sealed))

    def _submit(self, ask: Ask) -> str:
        from flexgate.server.engine.protocol import gates

        request_id = self._new_id()
        self._add(request_id, ask, gates.seal(self._gate(ask, request_id), self.key))
        return request_id

    def _add(self, request_id: str, ask: Ask, sealed: Any) -> None:
        from vllm.sampling_params import SamplingParams, StructuredOutputsParams

        from flexgate.server.engine.frontend.calls import GatedCall

        params = SamplingParams(
            n=ask.choices,
            temperature=0.0 if ask.seed is None else 1.0,
            seed=ask.seed,
            max_tokens=ask.max_tokens,
            logprobs=ANY_BITS,
            prompt_logprobs=ANY_BITS if ask.prompt_logprobs else None,
            ignore_eos=ask.regex is None,
            detokenize=False,
            extra_args={"flexgate": sealed} if sealed is not None else None,
        )
        if ask.regex is not None:
            from flexgate.server.engine.protocol.constraints import seal_constraint

            constraint = seal_constraint(ask.tenant, "regex", ask.regex, self.key)
            params.structured_outputs = StructuredOutputsParams(grammar=constraint)
        self.calls[request_id] = call = GatedCall(ask.tenant, (), math.inf)
        call._names = (None,) * self.table.total
        self.seen[request_id] = {}
        self.engine.add_request(request_id, {"prompt_token_ids": list(ask.prompt)}, params, priority=ask.priority)

    def _gate(self, ask: Ask, request_id: str) -> Any:
        import time

        from flexgate.server.engine.protocol import gates

        epochs = ask.epochs or {}
        live = self.engine.engine_core.engine_core.scheduler._table.live
        refs = tuple(gates.SlotRef(slot, epochs.get(slot, live.get(slot, 1))) for slot in ask.gate)
        salt = gates.cache_salt(
            self.key,
            tenant=ask.tenant,
            experts=[(str(ref.slot), ref.slot_epoch) for ref in refs],
            client_salt=ask.client_salt,
        )
        until = time.time() + ask.valid_for
        return gates.Gate(request_id, ask.tenant, refs, until, salt)

    def _new_id(self) -> str:
        self.count += 1
        return f"request-{self.count}"

    def _answer(self, request_id: str, step: int) -> Answer:
        seen, call = self.seen.pop(request_id), self.calls.pop(request_id)
        completion, output = seen.get(0, (None, None))
        cached, *parts = call.usage()
        used = [sum(values) for values in zip(*parts, strict=True)]
        return Answer(
            tokens=tuple(getattr(completion, "token_ids", ())),
            logprobs=_exact(getattr(completion, "logprobs", None)),
            prompt_logprobs=_exact(getattr(output, "prompt_logprobs", None)),
            cached=cached,
            prompt_positions=call.prompt_positions(),
            mass=tuple(used[: len(used) // 2]),
            chosen=tuple(used[len(used) // 2 :]),
            choices=tuple(tuple(completion.token_ids) for _, (completion, _) in sorted(seen.items())),
            finish_reason=getattr(completion, "finish_reason", None),
            stop_reason=getattr(completion, "stop_reason", None),
            step=step,
        )


def _exact(positions: Any) -> tuple[tuple[tuple[int, float], ...], ...]:
    return tuple(
        tuple(sorted((token, value.logprob) for token, value in position.items()))
        for position in positions or ()
        if position is not None
    )
