"""What a rank's worker extends. Written for vLLM 0.32.0.

``Worker`` (vllm/v1/worker/gpu_worker.py), ``CPUWorker`` (vllm/v1/worker/cpu_worker.py)
    The class that ``--worker-cls`` names takes the place of one of them; which one depends on the platform.
``GPUModelRunner._sample / _bookkeeping_sync`` (vllm/v1/worker/gpu_model_runner.py)
    Model Runner V1 samples a token also after a part of a prompt, and drops it. A seeded request's generator then goes
    back by an offset, which generators on CPU do not have: the engine would end, with everyone's requests.
"""

from typing import TYPE_CHECKING, Any

import torch
from vllm.platforms import current_platform

if TYPE_CHECKING or not current_platform.is_cpu():
    from vllm.v1.worker.gpu_worker import Worker
else:
    from vllm.v1.worker.cpu_worker import CPUWorker as Worker

__all__ = ["Worker", "rewind_generators"]


def rewind_generators(runner_cls: type[Any]) -> type[Any]:
    """Subclass a V1 model runner so that generators on CPU go back to where they were before a dropped token."""

    class RewindingModelRunner(runner_cls):
        """V1 runner whose seeded requests may have their prompts computed in parts."""

        _rewound: dict[int, torch.Generator]

        def _sample(self, *args: Any, **kw: Any) -> Any:
            dropped = self.discard_request_mask.np[: self.input_batch.num_reqs].nonzero()[0]
            generators = self.input_batch.generators
            self._rewound = {index: generators[index] for index in map(int, dropped) if index in generators}
            before = {index: generator.get_state() for index, generator in self._rewound.items()}
            output = super()._sample(*args, **kw)
            for index, state in before.items():
                generators[index].set_state(state)
            return output

        def _bookkeeping_sync(self, *args: Any, **kw: Any) -> Any:
            generators = self.input_batch.generators
            for index in self._rewound:
                del generators[index]
            try:
                return super()._bookkeeping_sync(*args, **kw)
            finally:
                generators.update(self._rewound)

    return RewindingModelRunner
