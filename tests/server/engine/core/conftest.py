"""The processes that follow constraints."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from maskkit import TOKENIZER, VOCABULARY

from flexgate.server.engine.core.followers import Followers


@pytest.fixture(scope="module")
def followers() -> Iterator[Followers]:
    begun = Followers()
    begun.start(TOKENIZER.serialize_json(), VOCABULARY)
    yield begun
    begun.stop()
