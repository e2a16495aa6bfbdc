"""What a process that engines are forked from loads, once for all of them, under what is read at import."""

import os

os.environ |= {"VLLM_LOGGING_LEVEL": "ERROR", "OMP_NUM_THREADS": "1", "TORCH_COMPILE_DISABLE": "1"}

import vllm.v1.engine.llm_engine  # noqa: F401

import flexgate.server.engine.worker  # noqa: F401
