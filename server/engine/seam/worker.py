"""What a rank's worker extends. Written for vLLM 0.32.0.

``Worker`` (vllm/v1/worker/gpu_worker.py), ``CPUWorker`` (vllm/v1/worker/cpu_worker.py)
    The class that ``--worker-cls`` names takes the place of one of them; which one depends on the platform.
"""

from typing import TYPE_CHECKING

from vllm.platforms import current_platform

if TYPE_CHECKING or not current_platform.is_cpu():
    from vllm.v1.worker.gpu_worker import Worker
else:
    from vllm.v1.worker.cpu_worker import CPUWorker as Worker

__all__ = ["Worker"]
