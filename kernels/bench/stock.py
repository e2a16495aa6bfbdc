"""vLLM's Triton kernel for experts, run without vLLM: its function is taken from a copy of vLLM's source file.

The machine that measures need not have vLLM's compiled extensions, which vLLM's Python modules ask for when they are
imported, so the file is not imported: the functions are cut out and compiled by themselves. vLLM's layer also aligns,
activates and sums, in kernels that are in those extensions; they are left out of the time, which favours vLLM.

Shape suffixes: T tokens, K chosen experts, M aligned rows, H hidden, F expert intermediate, G = 2F.
"""

import ast
import importlib.util
import sys
import tempfile
from dataclasses import dataclass
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn.functional import silu

from flexgate.kernels.bench.place import Place
from flexgate.kernels.bench.problem import Batch, Weights

_WANTED = ("write_zeros_to_output", "fused_moe_kernel", "get_default_config")
_HEAD = """
from types import SimpleNamespace
import triton
import triton.language as tl
envs = SimpleNamespace(VLLM_BATCH_INVARIANT=False)
current_platform = SimpleNamespace(is_rocm=lambda: False)
"""
Config = dict[str, int]


def find_source() -> Path | None:
    """The file in an installed vLLM, whether or not that vLLM can be imported."""
    found = importlib.util.find_spec("vllm")
    if found is None or not found.submodule_search_locations:
        return None
    path = Path(found.submodule_search_locations[0]) / "model_executor/layers/fused_moe/fused_moe.py"
    return path if path.is_file() else None


def load_stock(source: Path) -> ModuleType:
    """The wanted functions of vLLM's `fused_moe.py` as a module of their own."""
    text = source.read_text(encoding="utf-8")
    lines = text.splitlines()
    pieces = [
        "\n".join(lines[min([node.lineno, *(d.lineno for d in node.decorator_list)]) - 1 : node.end_lineno])
        for node in ast.parse(text).body
        if isinstance(node, ast.FunctionDef) and node.name in _WANTED
    ]
    if len(pieces) != len(_WANTED):
        raise ValueError(f"{source} does not define {', '.join(_WANTED)}; take the file from vLLM 0.32.0")
    # Triton reads a kernel's text from its file.
    path = Path(tempfile.mkdtemp(prefix="flexgate-stock-")) / "stock_fused_moe.py"
    path.write_text("\n\n\n".join((_HEAD, *pieces)), encoding="utf-8")
    module = ModuleType(path.stem)
    sys.modules[path.stem] = module
    SourceFileLoader(path.stem, str(path)).exec_module(module)
    return module


def default_config(stock: ModuleType, layer: Weights, tokens: int) -> Config:
    """What vLLM takes where nobody tuned the shape."""
    shape = layer.shape
    config: Config = stock.get_default_config(
        tokens, shape.slots, shape.intermediate, shape.hidden, shape.top_k, None, None
    )
    return config


def tuning_space(tokens: int) -> list[Config]:
    """Configurations worth trying, of the kind that vLLM's own tables hold for large experts on Hopper."""
    if tokens <= 64:
        cuts = [(16, 64, 128, 1, 4, 4), (16, 128, 128, 1, 4, 5), (16, 128, 64, 1, 4, 5), (16, 64, 256, 1, 4, 3)]
        cuts += [(32, 128, 128, 1, 4, 4), (64, 128, 64, 1, 4, 4)]
    else:
        cuts = [(64, 128, 64, 8, 4, 4), (64, 256, 64, 8, 8, 4), (128, 128, 64, 16, 8, 4)]
        cuts += [(128, 256, 64, 16, 8, 4), (128, 256, 64, 32, 8, 3), (256, 128, 64, 16, 8, 4)]
    names = ("BLOCK_SIZE_M", "BLOCK_SIZE_N", "BLOCK_SIZE_K", "GROUP_SIZE_M", "num_warps", "num_stages")
    return [dict(zip(names, cut, strict=True)) for cut in cuts]


@dataclass(frozen=True)
class StockLayer:
    """vLLM's two products for one batch."""

    place: Place
    kernel: Any
    layer: Weights
    batch: Batch
    config: Config

    def products(self) -> "StockProducts":
        """Buffers and alignment, and the hidden activation once, so that the second product has its input."""
        aligned = _align(self.batch.ids_TK, self.config["BLOCK_SIZE_M"])
        shape, tokens = self.layer.shape, self.batch.tokens
        picks = tokens * shape.top_k
        gate_up = self.batch.x_TH.new_zeros(tokens, shape.top_k, 2 * shape.intermediate)
        hidden = self.batch.x_TH.new_zeros(picks, shape.intermediate)
        expert = self.batch.x_TH.new_zeros(tokens, shape.top_k, shape.hidden)
        made = StockProducts(self, aligned, gate_up, hidden, expert)
        made.first()
        gate, up = gate_up.view(picks, -1).chunk(2, dim=1)
        hidden.copy_(silu(gate) * up)
        return made


@dataclass(frozen=True)
class StockProducts:
    """What `StockLayer` launches."""

    owner: StockLayer
    aligned: tuple[Tensor, Tensor, Tensor]
    gate_up_TKG: Tensor
    hidden_PF: Tensor
    expert_TKH: Tensor

    def first(self) -> None:
        """Gate and up, not activated."""
        owner = self.owner
        self._launch(owner.batch.x_TH, owner.layer.w13_EGH, self.gate_up_TKG, owner.layer.shape.top_k, weighted=False)

    def both(self) -> None:
        """Both products, the second on the activation that is already there: what is timed."""
        self.first()
        self._launch(self.hidden_PF, self.owner.layer.w2_EHF, self.expert_TKH, 1, weighted=True)

    def output(self) -> Tensor:
        """The layer's output, [T, H]."""
        self.both()
        return self.expert_TKH.float().sum(1).to(self.expert_TKH.dtype)

    def _launch(self, left: Tensor, right_ERC: Tensor, out_TKR: Tensor, top_k: int, *, weighted: bool) -> None:
        row_M, slot_M, rows_1 = self.aligned
        config = dict(self.owner.config)
        config.pop("SPLIT_K", None)
        _, rows, columns = right_ERC.shape
        grid = (triton.cdiv(len(row_M), config["BLOCK_SIZE_M"]) * triton.cdiv(rows, config["BLOCK_SIZE_N"]),)
        strides = (*left.stride(), right_ERC.stride(0), right_ERC.stride(2), right_ERC.stride(1))
        compute_type = tl.bfloat16 if left.dtype is torch.bfloat16 else tl.float32
        self.owner.place.launchable(self.owner.kernel)[grid](
            left, right_ERC, out_TKR, None, None, None, self.owner.batch.weights_TK, row_M, slot_M, rows_1,
            rows, columns, len(row_M), self.owner.batch.ids_TK.numel(), *strides, *out_TKR.stride()[1:],
            0, 0, 0, 0, 0, 0, 0, 0, 0,
            naive_block_assignment=False, MUL_ROUTED_WEIGHT=weighted, top_k=top_k, compute_type=compute_type,
            use_fp8_w8a8=False, use_int8_w8a8=False, use_int8_w8a16=False, per_channel_quant=False, HAS_BIAS=False,
            SPLIT_K=1, SWAP_AB=False, USE_TD=False, **config,
        )  # fmt: skip


def _align(ids_TK: Tensor, block_m: int) -> tuple[Tensor, Tensor, Tensor]:
    """(picks sorted by slot and padded with T·K to whole blocks, each block's slot, padded rows); on the host."""
    flat = ids_TK.reshape(-1).tolist()
    rows: list[int] = []
    slots: list[int] = []
    for slot in sorted(set(flat) - {-1}):
        own = [pick for pick, chosen in enumerate(flat) if chosen == slot]
        own += [len(flat)] * (-len(own) % block_m)
        rows += own
        slots += [slot] * (len(own) // block_m)
    made = (torch.tensor(values, dtype=torch.int32, device=ids_TK.device) for values in (rows, slots, [len(rows)]))
    row_M, slot_M, rows_1 = made
    return row_M, slot_M, rows_1
