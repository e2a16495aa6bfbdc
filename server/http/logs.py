"""Logs without prompt text: JSON for programs, or text for people at a terminal.

A line has the fields of its record and nothing of a request's body. Exceptions are written as
their type and the places they passed, never with their message, which may quote a request. The
same formatter is given to vLLM's processes through `logging.json`; `FLEXGATE_LOG_FORMAT` tells them which.
"""

from __future__ import annotations

import json
import logging
import logging.config
import os
import sys
import time
import traceback
import warnings
from pathlib import Path
from types import TracebackType
from typing import Any, Final

CONFIG_PATH: Final = Path(__file__).with_name("logging.json")
FORMAT: Final = "FLEXGATE_LOG_FORMAT"
FIELDS: Final = "flexgate"  # `extra={FIELDS: {...}}` adds these to the line
MAX_FRAMES: Final = 20


class JsonFormatter(logging.Formatter):
    """One JSON object per line."""

    def format(self, record: logging.LogRecord) -> str:
        """The record as JSON."""
        return json.dumps(_line(record), ensure_ascii=False, default=str)


class TextFormatter(logging.Formatter):
    """One line of text; what is not printable is shown as `?`, so that no line steers the terminal."""

    def format(self, record: logging.LogRecord) -> str:
        """Time of day, level, event, then the fields, the exception and where it was raised."""
        line = _line(record)
        time_, level, logger, event = (str(line.pop(name)) for name in ("time", "level", "logger", "event"))
        places = line.pop("at", [])
        fields = "".join(f" {name}={value}" for name, value in line.items())
        text = f"{time_[11:19]} {level:<7} {event}{fields} ({logger})" + "".join(f" < {p}" for p in reversed(places))
        return "".join(character if character.isprintable() else "?" for character in text)


def chosen_formatter() -> logging.Formatter:
    """The formatter that `FLEXGATE_LOG_FORMAT` names; used by `logging.json`."""
    return TextFormatter() if os.environ.get(FORMAT) == "text" else JsonFormatter()


def configure(level: str, style: str = "json") -> None:
    """Log to standard error, here and in the processes that vLLM starts.

    Args:
        style: `json`, `text`, or `auto`: text if standard error is a terminal.
    """
    if style == "auto":
        style = "text" if sys.stderr.isatty() else "json"
    os.environ[FORMAT] = style
    os.environ["VLLM_LOGGING_CONFIG_PATH"] = str(CONFIG_PATH)
    os.environ["VLLM_LOGGING_LEVEL"] = level.upper()
    if level != "debug":
        _silence_libraries()
    config = json.loads(CONFIG_PATH.read_text())
    logging.config.dictConfig(config)
    logging.getLogger("flexgate").setLevel(level.upper())


def _silence_libraries() -> None:
    """Keep warnings of Python and torch, which are for developers, off standard error, here and in later processes."""
    os.environ.setdefault("PYTHONWARNINGS", "ignore")
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    if not sys.warnoptions:
        warnings.simplefilter("ignore")


def _line(record: logging.LogRecord) -> dict[str, Any]:
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
    return line


def _places(trace: TracebackType | None) -> list[str]:
    frames = traceback.extract_tb(trace)[-MAX_FRAMES:]
    return [f"{Path(f.filename).name}:{f.lineno} {f.name}" for f in frames]


def _utc(seconds: float) -> str:
    moment = time.gmtime(seconds)
    return time.strftime("%Y-%m-%dT%H:%M:%S", moment) + f".{int(seconds % 1 * 1000):03d}Z"
