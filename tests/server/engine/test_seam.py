"""What the seam asks of the operating system."""

import subprocess
import sys

import pytest
import torch

ASK = """
import ctypes, sys
import torch
from flexgate.server.engine.seam import allow_amx_tiles

def permitted():
    mask = ctypes.c_uint64()
    ctypes.CDLL(None).syscall(158, 0x1022, ctypes.byref(mask))  # arch_prctl(ARCH_GET_XCOMP_PERM)
    return bool(mask.value >> 18 & 1)

before = permitted()
allow_amx_tiles()
print(before, permitted())
"""


@pytest.mark.skipif(not torch.cpu._is_amx_tile_supported(), reason="this processor has no AMX tiles")
def test_amx_tiles_are_asked_for() -> None:
    """Linux ends a process that uses them without having asked; importing vLLM does not ask."""
    said = subprocess.run([sys.executable, "-c", ASK], capture_output=True, text=True, check=True).stdout
    assert said.splitlines()[-1] == "False True"


def test_a_refusal_of_amx_tiles_is_told_before_they_are_used(monkeypatch: pytest.MonkeyPatch) -> None:
    from flexgate.server.engine.seam import allow_amx_tiles

    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True)
    monkeypatch.setattr(torch.cpu, "_init_amx", lambda: False)
    with pytest.raises(RuntimeError, match="use --dtype float32"):
        allow_amx_tiles()
