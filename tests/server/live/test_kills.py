"""A server or its engine is killed while experts change; the full run is `make server-kills`."""

from __future__ import annotations

import pytest
from kills import usage
from kills.servers import run

pytestmark = [pytest.mark.engine, pytest.mark.slow]


@pytest.mark.sliced(1)
@pytest.mark.parametrize("seed", range(3))
def test_a_killed_server_comes_back_to_the_old_or_the_new_state(seed: int) -> None:
    verdicts = run(kills=2, seed=seed)
    assert len(verdicts) == 2
    assert [verdict for verdict in verdicts if verdict["wrong"]] == []


@pytest.mark.sliced(1)
@pytest.mark.parametrize("seed", range(3))
def test_usage_is_what_clients_and_the_engine_count_though_servers_are_killed(seed: int) -> None:
    *trials, recount = usage.run(kills=2, seed=seed, requests=120)
    assert [verdict for verdict in (*trials, recount) if verdict["wrong"]] == []
    found = recount["recount"]
    assert 0 < found["delivered"] <= found["recorded"] <= found["generated"]
    assert found["outcomes"]["completed"] > 60
