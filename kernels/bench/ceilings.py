"""What this device really reaches: the denominators of every percentage."""

import torch

from flexgate.kernels.bench.place import Place
from flexgate.kernels.bench.roofline import Ceilings

_STREAM_BYTES = 4 << 30
_MATRIX = 8192


def measured_ceilings(place: Place) -> Ceilings | None:
    """The faster of a copy and a sum for bytes, a square bfloat16 product for arithmetic; None in the interpreter."""
    source = torch.ones(_STREAM_BYTES // 4 if place.measured else 1, device=place.device)
    target = torch.empty_like(source)
    left = torch.randn(_MATRIX, _MATRIX, device=place.device, dtype=torch.bfloat16) if place.measured else source
    copied, summed = place.median_us(lambda: target.copy_(source)), place.median_us(source.sum)
    multiplied = place.median_us(lambda: left @ left)
    if copied is None or summed is None or multiplied is None:
        return None
    bytes_per_s = max(2 * _STREAM_BYTES / copied, _STREAM_BYTES / summed) * 1e6
    return Ceilings(f"measured on {place.name}", bytes_per_s, 2 * _MATRIX**3 / multiplied * 1e6)
