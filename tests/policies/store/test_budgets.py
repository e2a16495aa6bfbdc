"""Used tokens are added up over processes, each batch of them once."""

from __future__ import annotations

import sqlalchemy as sa

from flexgate.policies.store import schema
from flexgate.policies.store.budgets import FORGOTTEN_AFTER_S, Batch, add_use, in_period, read_use


def test_a_batch_that_is_written_again_adds_nothing(store):
    for number, times in ((1, 3), (2, 2)):
        for _ in range(times):
            add_use(store.engine, {"t": 10, "k": 1}, Batch("here", number), 1.0)
    add_use(store.engine, {"t": 5}, Batch("there", 1), 1.0)
    assert read_use(store.engine) == {"t": 25, "k": 2}


def test_processes_that_wrote_long_ago_are_forgotten(store):
    add_use(store.engine, {"t": 1}, Batch("old", 1), 1.0)
    add_use(store.engine, {"t": 1}, Batch("new", 1), 2.0 + FORGOTTEN_AFTER_S)
    with store.engine.connect() as connection:
        assert connection.execute(sa.select(schema.use_batches.c.writer)).scalars().all() == ["new"]
    assert read_use(store.engine) == {"t": 2}


def test_the_present_period_of_a_scope_and_the_one_before_are_kept(store):
    names = ("2026-10", "2026-10-30", "2026-10-31")
    for number, used in enumerate(
        [
            {"t": 1, **{in_period("t", name): 1 for name in names}, in_period("t_2", "2026-10-31"): 1},
            {in_period("t", "2026-11-01"): 1},
            {in_period("t", "2026-11-01"): 1, in_period("t", "2026-11"): 1},
        ],
        start=1,
    ):
        add_use(store.engine, used, Batch("here", number), 1.0)
    kept = {"t": 1, "t@2026-10": 1, "t@2026-10-31": 1, "t@2026-11-01": 2, "t@2026-11": 1, "t_2@2026-10-31": 1}
    assert read_use(store.engine) == kept
