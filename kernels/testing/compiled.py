"""Compile a kernel for a GPU that is not there, and count what came out: registers, spills, shared memory, opcodes.

Uses the assembler and disassemblers that Triton brings along; needs no driver.
"""

import functools
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

SM_90 = GPUTarget("cuda", 90, 32)
SHARED_LIMIT_SM_90 = 227 * 1024
"""Bytes of shared memory that one program may have on Hopper (CUDA programming guide, compute capability 9.0)."""

_USAGE = re.compile(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)")
# One instruction of nvdisasm's listing: an address comment, perhaps a predicate, the opcode.
_INSTRUCTION = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Za-z0-9_.]*)", re.MULTILINE)


@dataclass(frozen=True)
class Binary:
    """One compiled kernel."""

    registers: int
    local_bytes: int
    """Per thread; spilled registers live here."""
    shared_bytes: int
    opcodes: Mapping[str, int]
    """How often each SASS instruction stands in the program, by full name (`HGMMA.64x64x16.F32.BF16`)."""

    def count(self, prefix: str) -> int:
        """Instructions whose name is `prefix`, with or without modifiers."""
        return sum(times for name, times in self.opcodes.items() if name.split(".")[0] == prefix)


def compile_kernel(
    kernel: Any, signature: Mapping[str, str], constants: Mapping[str, Any], options: Mapping[str, Any]
) -> Binary:
    """`kernel` compiled for Hopper: `signature` types its run-time arguments, every other argument is a constant."""
    types = {name: signature.get(name, "constexpr") for name in kernel.arg_names}
    source = ASTSource(kernel, signature=types, constexprs=dict(constants), attrs=_alignment(types))
    compiled = triton.compile(source, target=SM_90, options=dict(options))
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(compiled.asm["cubin"])
        usage = _USAGE.search(_run(_tool("cuobjdump"), "-res-usage", file.name))
        listing = _run(_tool("nvdisasm"), file.name)
    if usage is None:
        raise RuntimeError("cuobjdump printed no resource usage")
    registers, _, _, local_bytes = (int(number) for number in usage.groups())
    return Binary(registers, local_bytes, compiled.metadata.shared, Counter(_INSTRUCTION.findall(listing)))


def _alignment(types: Mapping[str, str]) -> dict[tuple[int, ...], list[list[Any]]]:
    # What the launcher finds out about every tensor that torch allocates: its address divides by 16.
    return {(index,): [["tt.divisibility", 16]] for index, kind in enumerate(types.values()) if kind.startswith("*")}


@functools.cache
def _tool(name: str) -> str:
    return str(getattr(knobs.nvidia, name).path)


def _run(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout
