"""What stored documents may say changes only with the schema's number, by which an older version knows a newer store.

After such a change: add a migration, which may be empty, and run this file.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from alembic.script import ScriptDirectory

from flexgate.policies.documents import KeyRecord
from flexgate.policies.errors import StoreFromNewerVersion
from flexgate.policies.store import Store
from flexgate.policies.store.database import writing
from flexgate.policies.store.documents import KINDS
from flexgate.policies.store.migrate import _config

FORMS = Path(__file__).parent / "forms"
"""One file for each migration with which documents changed."""


def forms() -> dict[str, Any]:
    """The schema of each kind of stored document, without what only people read."""
    found = {kind.__name__: _plain(kind.model_json_schema()) for kind in KINDS}
    return found | {KeyRecord.__name__: sorted(KeyRecord.__dataclass_fields__)}


def _plain(schema: Any) -> Any:
    if isinstance(schema, list):
        return [_plain(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    named = schema.keys() >= {"properties"}
    return {
        name: {field: _plain(part) for field, part in value.items()}
        if named and name == "properties"
        else _plain(value)
        for name, value in schema.items()
        if name not in ("title", "description")
    }


def newest() -> Path:
    return max(FORMS.glob("*.json"))


def head() -> str:
    return str(ScriptDirectory.from_config(_config(None)).get_current_head())


def test_documents_are_as_they_were_at_their_last_migration():
    assert forms() == json.loads(newest().read_text()), "add a migration, and record the forms: see this file's head"


def test_forms_are_recorded_of_migrations_that_there_are():
    known = {script.revision for script in ScriptDirectory.from_config(_config(None)).walk_revisions()}
    assert {path.stem for path in FORMS.glob("*.json")} <= known


def test_a_version_that_does_not_know_the_newest_forms_says_that_the_store_is_newer(url, monkeypatch):
    """And not that it is damaged, though its documents do not parse."""
    store = Store.open(url)
    store.migrate()
    with writing(store.engine) as connection:
        row = '{"id": "acme", "name": "Acme", "a_later_field": null}'
        connection.execute(sa.text("INSERT INTO tenants VALUES ('acme', 1, :row)"), {"row": row})
    known = {script.revision for script in ScriptDirectory.from_config(_config(None)).walk_revisions()}
    older = frozenset(revision for revision in known if revision < newest().stem)
    monkeypatch.setattr("flexgate.policies.store.migrate._known", lambda: older)
    for read in (store.snapshot, lambda: store.confirm(None)):
        with pytest.raises(StoreFromNewerVersion, match="start the newer version that migrated it"):
            read()
    store.close()


def write() -> None:
    """Record the forms under the newest migration, which must be one that changes them."""
    path = FORMS / f"{head()}.json"
    if path.exists() and json.loads(path.read_text()) != forms():
        raise SystemExit(f"{path.name} has other forms: add a migration, which may be empty, for yours")
    FORMS.mkdir(exist_ok=True)
    path.write_text(json.dumps(forms(), indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    write()
