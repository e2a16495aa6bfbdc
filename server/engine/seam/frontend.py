"""What the API process starts vLLM with. Kept apart, since no other process of the engine loads it.

``AsyncLLM``, ``AsyncEngineArgs``, ``StructuredOutputsConfig``, ``RequestOutput``
    Public.
``set_ulimit`` (vllm/utils/system_utils.py)
    Raises the limit of open files, as vLLM's own server does.
"""

from vllm.config import StructuredOutputsConfig
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.outputs import RequestOutput
from vllm.utils.system_utils import set_ulimit
from vllm.v1.engine.async_llm import AsyncLLM

__all__ = [
    "AsyncEngineArgs",
    "AsyncLLM",
    "RequestOutput",
    "StructuredOutputsConfig",
    "set_ulimit",
]
