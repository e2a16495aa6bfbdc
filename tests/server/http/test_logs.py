"""JSON logs, and what they never have."""

from __future__ import annotations

import json
import logging
import logging.config
import os
import subprocess
import sys
from typing import Any

import pytest

from flexgate.server.http import logs
from flexgate.server.http.logs import CONFIG_PATH, FIELDS, JsonFormatter, TextFormatter


def line(**values: object) -> dict[str, object]:
    record = logging.LogRecord("flexgate.x", logging.INFO, "f.py", 1, "hello %s", ("you",), None)
    for name, value in values.items():
        setattr(record, name, value)
    found: dict[str, object] = json.loads(JsonFormatter().format(record))
    return found


def test_a_line_is_one_json_object_with_its_fields() -> None:
    found = line(**{FIELDS: {"request": "req_1", "status": 200}})
    assert found == {
        "time": found["time"],
        "level": "info",
        "logger": "flexgate.x",
        "event": "hello you",
        "request": "req_1",
        "status": 200,
    }


def test_an_exception_is_its_type_and_places_never_its_words() -> None:
    try:
        raise ValueError("the prompt")
    except ValueError:
        found = line(exc_info=sys.exc_info())
    assert found["exception"] == "ValueError"
    assert found["at"]
    assert "test_logs.py" in str(found["at"])
    assert "the prompt" not in json.dumps(found)


def test_a_line_break_in_a_message_stays_in_its_line() -> None:
    record = logging.LogRecord("x", logging.INFO, "f", 1, "a\nb", (), None)
    assert "\n" not in JsonFormatter().format(record)


def test_vllm_does_not_dump_requests_when_it_dies() -> None:
    config = json.loads(CONFIG_PATH.read_text())
    dump = config["loggers"]["vllm.logging_utils.dump_input"]
    assert dump == {"handlers": [], "propagate": False, "level": "CRITICAL"}


def test_the_configuration_that_vllms_processes_read_is_valid() -> None:
    handlers = logging.getLogger().handlers[:]
    config = json.loads(CONFIG_PATH.read_text())
    del config["root"], config["loggers"]
    logging.config.dictConfig(config)
    assert logging.getLogger().handlers == handlers


def test_a_line_for_people_has_the_same_fields_and_steers_no_terminal() -> None:
    record = logging.LogRecord("flexgate.x", logging.WARNING, "f.py", 1, "hello\n\x1b[2J", (), None)
    setattr(record, FIELDS, {"status": 200})
    record.created = 0.0
    assert TextFormatter().format(record) == "00:00:00 warning hello??[2J status=200 (flexgate.x)"


def test_an_exception_for_people_is_its_type_and_places_never_its_words() -> None:
    try:
        raise ValueError("the prompt")
    except ValueError:
        record = logging.LogRecord("x", logging.ERROR, "f", 1, "failed", (), sys.exc_info())
    text = TextFormatter().format(record)
    assert "exception=ValueError" in text
    assert " < test_logs.py:" in text
    assert "the prompt" not in text


@pytest.mark.parametrize(
    ("style", "terminal", "kind"),
    [
        ("auto", True, TextFormatter),
        ("auto", False, JsonFormatter),
        ("json", True, JsonFormatter),
        ("text", False, TextFormatter),
    ],
)
def test_text_is_for_terminals_unless_an_option_says_otherwise(
    style: str, terminal: bool, kind: type[logging.Formatter], monkeypatch: pytest.MonkeyPatch
) -> None:
    configured: list[Any] = []
    monkeypatch.setattr(logs.logging.config, "dictConfig", configured.append)
    monkeypatch.setattr(logs.sys.stderr, "isatty", lambda: terminal, raising=False)
    levels = ("VLLM_LOGGING_LEVEL", "TORCH_CPP_LOG_LEVEL", "PYTHONWARNINGS")
    for name in (logs.FORMAT, "VLLM_LOGGING_CONFIG_PATH", *levels):
        monkeypatch.setenv(name, "")
    logs.configure("info", style)
    assert type(logs.chosen_formatter()) is kind
    assert configured[0]["formatters"]["json"] == {"()": "flexgate.server.http.logs.chosen_formatter"}


@pytest.mark.parametrize(("level", "silent"), [("info", True), ("debug", False)])
def test_warnings_of_libraries_are_for_debugging(level: str, silent: bool) -> None:
    """Here and in processes that are started later, which read variables."""
    program = (
        "import subprocess, sys, warnings; from flexgate.server.http import logs; logs.configure(sys.argv[1]);"
        "warnings.warn('ours');"
        "subprocess.run([sys.executable, '-c', 'import warnings; warnings.warn(\"a child\")'])"
    )
    variables = {name: value for name, value in os.environ.items() if name != "PYTHONWARNINGS"}
    done = subprocess.run([sys.executable, "-c", program, level], env=variables, capture_output=True, text=True)
    assert done.returncode == 0
    assert [said in done.stderr for said in ("ours", "a child")] == [not silent, not silent]
