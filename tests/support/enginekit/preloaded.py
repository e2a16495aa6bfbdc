"""What a process that engines are forked from loads, once for all of them, under what is read at import."""

import os

os.environ |= {
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "TORCH_COMPILE_DISABLE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
    **os.environ,
}

import vllm.v1.engine.llm_engine  # noqa: F401

import flexgate.server.engine.worker.worker  # noqa: F401
