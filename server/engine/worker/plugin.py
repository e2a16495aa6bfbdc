"""Entry point ``vllm.general_plugins``: makes vLLM know the gated model.

vLLM loads it in every process and goes on when it fails, so its success is proved by
the handshake, not assumed. Without a seal key in the environment it does nothing: a
plain ``vllm serve`` on the same machine is left alone.
"""

import os

from flexgate.server.engine.protocol.names import SEAL_KEY_VARIABLE
from flexgate.server.engine.seam.models import MODELS


def register() -> None:
    """Register the gated model in place of vLLM's own for every architecture that is served."""
    if SEAL_KEY_VARIABLE not in os.environ:
        return
    from flexgate.server.engine.seam.engine import ModelRegistry
    from flexgate.server.engine.worker.moe import GatedModel

    for architecture in MODELS:
        ModelRegistry.register_model(architecture, GatedModel)
