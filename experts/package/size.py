"""How much of an expert a package holds: a whole FFN, a narrower one, or a difference of low rank to the public FFN.

Sizes: H hidden, F expert intermediate of the model, W width of the package's FFN, R rank.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from flexgate.experts.checkpoint.base import BaseArchitecture
from flexgate.experts.errors import SizeInvalid

PROJECTIONS: Final[Mapping[str, tuple[str, str]]] = {
    "gate_proj": ("W", "H"),
    "up_proj": ("W", "H"),
    "down_proj": ("H", "W"),
}
"""The matrices of an FFN with the sizes of their output and input; the order is that of ``layout.EXPERT_KEYS``."""
WHOLE_KEY: Final = "layers.{layer}.%s.weight"
FACTOR_KEYS: Final = ("layers.{layer}.%s.lora_A.weight", "layers.{layer}.%s.lora_B.weight")
"""A ``[R, input]`` and B ``[output, R]`` of a projection that is the public expert's plus ``B A``; names as in PEFT."""


@dataclass(frozen=True, slots=True)
class ExpertSize:
    """Full, unless it has a rank or a width.

    Attributes:
        rank: every projection is the public expert's plus a product of two factors of this rank.
        width: the FFN has this many intermediate neurons, fewer than the model's experts.
    """

    rank: int | None = None
    width: int | None = None

    def __str__(self) -> str:
        if self.rank is not None:
            return f"rank {self.rank}"
        return "full" if self.width is None else f"width {self.width}"

    def check(self, architecture: BaseArchitecture) -> None:
        """Refuse what no expert of this architecture is; raises ``SizeInvalid``."""
        hidden, intermediate = architecture.hidden_size, architecture.intermediate_size
        if self.rank is not None and self.width is not None:
            raise SizeInvalid(f"an expert has a rank or a width, not both: got rank {self.rank} and width {self.width}")
        if self.rank is not None and not 1 <= self.rank <= min(hidden, intermediate):
            raise SizeInvalid(
                f"rank is {self.rank}; the projections are {intermediate} x {hidden}, so it must be 1 to "
                f"{min(hidden, intermediate)}"
            )
        if self.width is not None and not 1 <= self.width < intermediate:
            raise SizeInvalid(
                f"width is {self.width}; it must be 1 to {intermediate - 1}, since a full expert has {intermediate}"
            )

    def ffn_shapes(self, architecture: BaseArchitecture) -> dict[str, tuple[int, int]]:
        """The tensors of an FFN of this size, as templates with ``{layer}``, and their shapes."""
        letters = {"H": architecture.hidden_size, "W": self.width or architecture.intermediate_size}
        shapes: dict[str, tuple[int, int]] = {}
        for projection, (output, given) in PROJECTIONS.items():
            if self.rank is None:
                shapes[WHOLE_KEY % projection] = (letters[output], letters[given])
                continue
            down, up = FACTOR_KEYS
            shapes[down % projection] = (self.rank, letters[given])
            shapes[up % projection] = (letters[output], self.rank)
        return shapes


FULL: Final = ExpertSize()
