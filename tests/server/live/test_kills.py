"""A server or its engine is killed while experts change; the full run is `make server-kills`."""

from __future__ import annotations

import pytest
from kills.servers import run

pytestmark = [pytest.mark.engine, pytest.mark.slow]


def test_a_killed_server_comes_back_to_the_old_or_the_new_state() -> None:
    verdicts = run(kills=3, seed=7)
    assert len(verdicts) == 3
    assert [verdict for verdict in verdicts if verdict["wrong"]] == []
