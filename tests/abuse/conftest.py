"""The abuse suite works on the same application as `tests/server`."""

import importlib.util
import sys
from pathlib import Path

import pytest

from flexgate.policies.agreements import Agreement
from flexgate.policies.documents import ExpertSet
from flexgate.policies.ids import ExpertId, SetId
from flexgate.policies.snapshot import Snapshot

_PATH = Path(__file__).parent.parent / "server" / "conftest.py"
_NAME = "flexgate_tests_server_conftest"


def _server_conftest():  # type: ignore[no-untyped-def]
    if _NAME not in sys.modules:
        spec = importlib.util.spec_from_file_location(_NAME, _PATH)
        assert spec is not None
        assert spec.loader is not None
        sys.modules[_NAME] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[_NAME])
    return sys.modules[_NAME]


_shared = _server_conftest()


@pytest.fixture
def snapshot() -> Snapshot:
    """The servers' snapshot, in which an agreement requires `news` of tenant `t`: nothing it sends leaves that out."""
    known = _shared.build_snapshot()
    terms = {"id": "r", "owner": "gazette", "experts": ["news"], "assignee": "tenant:t", "effect": "require"}
    return Snapshot.build(
        policy_version=known.policy_version,
        experts=known.experts.values(),
        tenants=_shared.TENANTS,
        agreements=[*_shared.agreements(), Agreement.model_validate(terms)],
        sets=[ExpertSet(id=SetId("set:press"), experts=frozenset({ExpertId("news")}))],
        keys=known.keys.values(),
    )


store = _shared.store
seeded_database = _shared.seeded_database
real_store = _shared.real_store
handler = _shared.handler
ledger = _shared.ledger
receipts = _shared.receipts
services = _shared.services
make_client = _shared.make_client
client = _shared.client
