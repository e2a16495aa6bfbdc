"""The models of vLLM's that are served, and the two names in their modules that flexgate puts its own in place of.

Written for vLLM 0.32.0. Nothing of vLLM is imported before a model is built.

``GateLinear`` in vllm/model_executor/models/*.py
    The linear layer that gives router logits. Some models call it and hand its result on; others hand the layer itself
    to the experts' runner, which calls it before it dispatches tokens to other ranks.
``FusedMoEFactory`` in the same modules
    Makes router, experts and the runner that holds both.

Both are looked up in the model's module when a layer is built, so that a model is gated as it stands, attention, norms,
shared experts and loading included. Both are named by every module of `MODELS`: the start fails where one is not.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module
from typing import Any, Final

MODELS: Final[Mapping[str, str]] = {
    "FlexOlmoForCausalLM": "flexgate.server.engine.worker.model",
    "OlmoeForCausalLM": "vllm.model_executor.models.olmoe",
    "MixtralForCausalLM": "vllm.model_executor.models.mixtral",
    "Qwen3MoeForCausalLM": "vllm.model_executor.models.qwen3_moe",
    "Qwen2MoeForCausalLM": "vllm.model_executor.models.qwen2_moe",
    "Glm4MoeForCausalLM": "vllm.model_executor.models.glm4_moe",
}
"""The module of each architecture's class. vLLM has none of its own for FlexOlmo."""

ROUTER, EXPERTS = "GateLinear", "FusedMoEFactory"


def class_of(architecture: str) -> str:
    """The full name of the class that computes an architecture."""
    return f"{MODELS[architecture]}.{architecture}"


def build_model(architecture: str, router: Callable[..., Any], experts: Callable[..., Any], **arguments: Any) -> Any:
    """An architecture's model with ``router`` and ``experts`` in the place of vLLM's; for one thread at a time.

    Raises:
        AttributeError: its module does not have one of the two names.
    """
    module = import_module(MODELS[architecture])
    with _replaced(module, {ROUTER: router, EXPERTS: experts}):
        return getattr(module, architecture)(**arguments)


@contextmanager
def _replaced(module: Any, names: Mapping[str, Any]) -> Iterator[None]:
    usual = {name: getattr(module, name) for name in names}
    try:
        for name, value in names.items():
            setattr(module, name, value)
        yield
    finally:
        for name, value in usual.items():
            setattr(module, name, value)
