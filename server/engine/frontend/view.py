"""What vLLM's handlers read of an engine, apart from generation: an explicit list, no pass-through."""

from __future__ import annotations

from typing import Any


class EngineView:
    """Read-only facts of an ``AsyncLLM``."""

    def __init__(self, engine: Any) -> None:
        self._engine = engine

    @property
    def vllm_config(self) -> Any:
        """vLLM's configuration."""
        return self._engine.vllm_config

    @property
    def model_config(self) -> Any:
        """vLLM's model configuration."""
        return self._engine.model_config

    @property
    def renderer(self) -> Any:
        """vLLM's prompt renderer."""
        return self._engine.renderer

    @property
    def input_processor(self) -> Any:
        """vLLM's input processor."""
        return self._engine.input_processor

    @property
    def errored(self) -> bool:
        """Whether the engine core died."""
        return bool(self._engine.errored)

    @property
    def dead_error(self) -> BaseException:
        """Why the engine core died."""
        error: BaseException = self._engine.dead_error
        return error

    def check_admission(self, n: int = 1, request_id: str | None = None) -> None:
        """vLLM's queue limits."""
        self._engine.check_admission(n, request_id)
