"""What an operator is shown at start."""

from __future__ import annotations

import json
import shlex

from flexgate.policies.store.demo import DEMO_KEYS
from flexgate.server.lifecycle.bootstrap import _hint


def test_the_demo_names_its_keys_and_a_request_that_can_be_typed() -> None:
    keys, tried = _hint("http://127.0.0.1:8000").splitlines()
    assert all(key in keys for key in DEMO_KEYS)
    program, url, *options = shlex.split(tried.removeprefix("try:  "))
    assert (program, url) == ("curl", "http://127.0.0.1:8000/v1/chat/completions")
    assert json.loads(options[options.index("-d") + 1])["messages"][0]["role"] == "user"
    assert f"Authorization: Bearer {DEMO_KEYS[0]}" in options
