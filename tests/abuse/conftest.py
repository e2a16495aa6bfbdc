"""The abuse suite works on the same application as `tests/server`."""

import importlib.util
import sys
from pathlib import Path

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
snapshot = _shared.snapshot
store = _shared.store
seeded_database = _shared.seeded_database
real_store = _shared.real_store
handler = _shared.handler
ledger = _shared.ledger
receipts = _shared.receipts
services = _shared.services
make_client = _shared.make_client
client = _shared.client
