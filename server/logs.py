"""JSON logs without prompt text.

A line has the fields of its record and nothing of a request's body. Exceptions are written as
their type and the places they passed, never with their message, which may quote a request. The
same formatter is given to vLLM's processes through `logging.json`.
"""

from __future__ import annotations

import json
import logging
import logging.config
import os
import time
import traceback
from pathlib import Path
from types import TracebackType
from typing import Any, Final

CONFIG_PATH: Final = Path(__file__).with_name("logging.json")
FIELDS: Final = "flexgate"  # `extra={FIELDS: {...}}` adds these to the line
MAX_FRAMES: Final = 20


class JsonFormatter(logging.Formatter):
    """One JSON object per line."""

    def format(self, record: logging.LogRecord) -> str:
        """The record as JSON."""
        line: dict[str, Any] = {
            "time": _utc(record.created),
            "level": record.levelname.lower(),
            "logger": record.name,
            "event": record.getMessage(),
            **getattr(record, FIELDS, {}),
        }
        if record.exc_info and record.exc_info[0] is not None:
            line["exception"] = record.exc_info[0].__qualname__
            line["at"] = _places(record.exc_info[2])
        return json.dumps(line, ensure_ascii=False, default=str)


def configure(level: str) -> None:
    """Log to standard error as JSON, here and in the processes that vLLM starts."""
    os.environ["VLLM_LOGGING_CONFIG_PATH"] = str(CONFIG_PATH)
    os.environ["VLLM_LOGGING_LEVEL"] = level.upper()
    config = json.loads(CONFIG_PATH.read_text())
    logging.config.dictConfig(config)
    logging.getLogger("flexgate").setLevel(level.upper())


def _places(trace: TracebackType | None) -> list[str]:
    frames = traceback.extract_tb(trace)[-MAX_FRAMES:]
    return [f"{Path(f.filename).name}:{f.lineno} {f.name}" for f in frames]


def _utc(seconds: float) -> str:
    moment = time.gmtime(seconds)
    return time.strftime("%Y-%m-%dT%H:%M:%S", moment) + f".{int(seconds % 1 * 1000):03d}Z"
