"""What an agreement's file may not be."""

from __future__ import annotations

from collections.abc import Callable

from typer.testing import Result

from flexgate.policies.store import Store


def test_a_key_that_is_given_twice_is_refused_by_name(flexgate: Callable[..., Result], real_store: Store) -> None:
    text = '{"id": "a", "owner": "o", "assignee": "everyone", "effect": "prohibit", "effect": "permit"}'
    before = real_store.snapshot().policy_version
    refused = flexgate("agreements", "create", "-", stdin=text)
    assert refused.exit_code == 1
    assert "the key 'effect' is given twice" in refused.output
    assert real_store.snapshot().policy_version == before
