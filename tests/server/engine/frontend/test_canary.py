"""The canary of an expert that is added to an engine which tenants keep busy."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from enginekit.scripted import Ask, ScriptedEngine

pytestmark = pytest.mark.engine

PLACES = 16  # in the shared engine's batch


def test_a_canary_takes_the_next_free_place_and_nobody_else_changes_places(engine: ScriptedEngine) -> None:
    running = [Ask((20 + i, 5, 6), (0,), max_tokens=10 + 5 * i) for i in range(PLACES)]
    waiting = [Ask((50 + i, 5, 6), (0, 1), max_tokens=30, at_step=1) for i in range(PLACES)]
    canary = Ask((0, 1, 2, 3), (0, 2), max_tokens=2, at_step=2, priority=-1)
    answers = engine.run([*running, *waiting, canary])
    ended = [answer.step for answer in answers]
    queue = ended[PLACES : 2 * PLACES]
    assert ended[-1] < min(ended[1 : 2 * PLACES])
    assert queue == sorted(queue)


CANARIES = """
import asyncio, math, sys, threading, time
from pathlib import Path
from vllm.sampling_params import SamplingParams
from flexgate.server.engine.frontend import launch
from flexgate.server.engine.frontend.canary import CanaryError, CanaryNotScheduled, try_added
from flexgate.server.engine.frontend.calls import CURRENT_CALL, ExpertSlotRef, GatedCall

ADDED = ExpertSlotRef("added", 4, 7)

async def main():
    settings = launch.EngineSettings(
        Path(sys.argv[1]), dtype="float32", enforce_eager=True, kv_cache_memory_bytes=64 << 20, max_num_seqs=2
    )
    async with launch.launch(settings, clock=time.time) as engine:
        public = engine.client.experts()[0].ref
        await engine.slots.open(ADDED.slot, ADDED.slot_epoch)
        begun = []

        async def ask(number, tokens):
            CURRENT_CALL.set(GatedCall("tenant", (public,), math.inf))
            params = SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True, detokenize=False)
            async for _ in engine.client.generate({"prompt_token_ids": [2, 3]}, params, "request"):
                if number not in begun:
                    begun.append(number)

        async def attempt(seconds):
            begun.clear()
            load = [asyncio.create_task(ask(0, 400)), asyncio.create_task(ask(1, 800))]
            while len(begun) < 2:
                await asyncio.sleep(0.001)
            load += [asyncio.create_task(ask(number, 50)) for number in range(2, 6)]
            while await engine.slots.users(public.slot) < 6 and not load[0].done():
                await asyncio.sleep(0.001)
            try:
                await try_added(engine.client, engine.slots, public, ADDED, seconds=seconds)
                return f"answered after {len(begun) - 2} of 4 that waited"
            except (CanaryNotScheduled, CanaryError) as error:
                return str(error)
            finally:
                await asyncio.gather(*load)
                assert await engine.slots.users(ADDED.slot) == 0

        async def attempts(seconds, expected):
            for _ in range(10):  # one is enough, unless this process was halted meanwhile
                if expected in (told := await attempt(seconds)):
                    break
            print("TOLD", told)

        await attempts(0.2, "no place")
        await attempts(60, "answered")
        busy = threading.Event()
        engine.client.renderer._executor.submit(busy.wait)
        try:
            await try_added(engine.client, engine.slots, public, ADDED, seconds=10)
            print("TOLD answered while the tokenizer was busy")
        except CanaryError as error:
            print("TOLD", error)
        finally:
            busy.set()

if __name__ == "__main__":
    asyncio.run(main())
"""


@pytest.mark.slow
def test_a_canary_that_finds_no_place_says_so_and_else_overtakes_whoever_waits(
    checkpoint: Path, tmp_path: Path
) -> None:
    script = tmp_path / "canaries.py"
    script.write_text(CANARIES)
    run = subprocess.run(
        [sys.executable, script, checkpoint], capture_output=True, text=True, timeout=300, env=os.environ
    )
    told = [line[5:] for line in run.stdout.splitlines() if line.startswith("TOLD ")]
    assert run.returncode == 0, run.stderr
    assert told[0] == "no place in the batch was free within 0.2 seconds"
    assert told[2] == "answered while the tokenizer was busy"
    assert told[1] in {f"answered after {count} of 4 that waited" for count in range(4)}
