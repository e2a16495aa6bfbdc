"""A whole start of an engine, as the server makes it, in a process of its own."""

import os
import subprocess
import sys
from pathlib import Path

START = """
import asyncio, multiprocessing, os, sys, time
from pathlib import Path
from flexgate.server.engine.frontend import launch
# what changes it

async def start():
    settings = launch.EngineSettings(
        Path(sys.argv[1]), dtype="float32", enforce_eager=True, kv_cache_memory_bytes=64 << 20
    )
    async with launch.launch(settings, clock=time.time):
        print("SERVED", *(process.pid for process in multiprocessing.active_children()))

if __name__ == "__main__":
    asyncio.run(start())
"""


def launched(checkpoint: Path, folder: Path, changed: str = "") -> "subprocess.CompletedProcess[str]":
    """Start an engine and end it; prints ``SERVED`` and the engine core's process id once it would serve.

    Args:
        folder: where the program goes; what lies there is on the path of every process.
        changed: lines that change ``launch`` first.
    """
    (folder / "start.py").write_text(START.replace("# what changes it", changed))
    path = os.pathsep.join(filter(None, (str(folder), os.environ.get("PYTHONPATH"))))
    return subprocess.run(
        [sys.executable, folder / "start.py", checkpoint],
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | {"PYTHONPATH": path},
    )
