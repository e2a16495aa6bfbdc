"""The names of a package's files. Knows nothing of tensors, so that who only sends a package loads no PyTorch."""

from __future__ import annotations

from typing import Final

MANIFEST_NAME: Final = "manifest.json"
SIGNATURE_NAME: Final = "manifest.sig"
WEIGHTS_NAME: Final = "expert.safetensors"
NAMES: Final = frozenset({MANIFEST_NAME, SIGNATURE_NAME, WEIGHTS_NAME})
