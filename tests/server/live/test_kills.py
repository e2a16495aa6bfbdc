"""A server or its engine is killed while experts change; the full run is `make server-kills`."""

from __future__ import annotations

import pytest
from kills.servers import run

pytestmark = [pytest.mark.engine, pytest.mark.slow]


@pytest.mark.sliced(1)
@pytest.mark.parametrize("seed", range(3))
def test_a_killed_server_comes_back_to_the_old_or_the_new_state(seed: int) -> None:
    verdicts = run(kills=2, seed=seed)
    assert len(verdicts) == 2
    assert [verdict for verdict in verdicts if verdict["wrong"]] == []
