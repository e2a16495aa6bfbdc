"""Used tokens are added up over processes, each batch of them once."""

from __future__ import annotations

import pytest
import sqlalchemy as sa

from flexgate.policies.store import schema
from flexgate.policies.store.budgets import FORGOTTEN_AFTER_S, Batch, add_use, forget, in_period, read_use


def test_a_batch_that_is_written_again_adds_nothing(store):
    for number, times in ((1, 3), (2, 2)):
        for _ in range(times):
            add_use(store.engine, {"t": 10, "k": 1}, Batch("here", number), 1.0)
    add_use(store.engine, {"t": 5}, Batch("there", 1), 1.0)
    assert read_use(store.engine).used == {"t": 25, "k": 2}


def test_processes_that_wrote_long_ago_are_forgotten(store):
    add_use(store.engine, {"t": 1}, Batch("old", 1), 1.0)
    add_use(store.engine, {"t": 1}, Batch("new", 1), 2.0 + FORGOTTEN_AFTER_S)
    forget(store.engine, 2.0 + FORGOTTEN_AFTER_S)
    with store.engine.connect() as connection:
        assert connection.execute(sa.select(schema.use_batches.c.writer)).scalars().all() == ["new"]
    assert read_use(store.engine).used == {"t": 2}


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
        forget(store.engine, 1.0)
    kept = {"t": 1, "t@2026-10": 1, "t@2026-10-31": 1, "t@2026-11-01": 2, "t@2026-11": 1, "t_2@2026-10-31": 1}
    assert read_use(store.engine).used == kept


@pytest.mark.parametrize(("other", "id_"), [("T", "t"), ("a", "b")])
def test_a_new_period_takes_nothing_from_a_scope_whose_id_differs_in_case_only(store, other, id_):
    add_use(store.engine, {f"{other}@2026-11-02": 5, f"{id_}@2026-11-01": 1}, Batch("here", 1), 1.0)
    add_use(store.engine, {f"{id_}@2026-11-02": 1}, Batch("here", 2), 1.0)
    forget(store.engine, 1.0)
    assert read_use(store.engine).used == {f"{other}@2026-11-02": 5, f"{id_}@2026-11-01": 1, f"{id_}@2026-11-02": 1}


def test_periods_of_scopes_that_are_used_no_more_are_forgotten(store):
    add_use(store.engine, {"gone@2026-10-30": 1, "gone@2026-09": 1, "gone": 1}, Batch("here", 1), 1.0)
    for day in (1, 2):
        add_use(store.engine, {f"t@2026-1{day}-01": 1, f"t@2026-1{day}": 1}, Batch("here", 1 + day), 1.0)
        forget(store.engine, 1.0)
    assert read_use(store.engine).used.keys() == {"gone", "t@2026-11-01", "t@2026-12-01", "t@2026-11", "t@2026-12"}


def test_what_500_scopes_used_is_written_at_once_and_revocations_do_not_wait_for_it(store):
    statements = []
    sa.event.listen(store.engine, "before_cursor_execute", lambda _c, _cursor, sql, *_: statements.append(sql))
    for number in (1, 2):
        add_use(store.engine, {f"t{scope}@2026-11-0{number}": 1 for scope in range(500)}, Batch("here", number), 1.0)
    assert len(statements) <= 2 * 4
    assert not any("advisory" in sql for sql in statements)
    assert len(read_use(store.engine).used) == 1000
