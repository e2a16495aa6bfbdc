"""Receipts of a state directory: what signs them, and another key for it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path
from typing import Final

from flexgate.policies.store.audit import policy_digest
from flexgate.policies.store.pseudonyms import Pseudonyms, read_pseudonym_key
from flexgate.policies.store.store import Store
from flexgate.server.ledger.journal import NAME as LEDGER
from flexgate.server.ledger.receipts.book import BookError, opened
from flexgate.server.ledger.receipts.service import NAME, Receipts, kept
from flexgate.server.ledger.receipts.signing import KeyFile, Program, Signer, SignerUnavailable, thumbprint
from flexgate.server.lifecycle.settings import Settings
from flexgate.server.lifecycle.store_settings import SettingsError, StoreSettings, load_store_settings

KEY: Final = "receipts.pem"


@contextmanager
def kept_receipts(settings: Settings, store: Store, clock: Callable[[], float]) -> Iterator[Receipts]:
    """The receipts of this server's usage; closed after the ledger, so that its last rows get theirs."""
    directory = settings.directory()
    key = cache(lambda: read_pseudonym_key(store.engine))
    with kept(
        directory,
        directory / LEDGER,
        signer_of(settings, settings.receipt_key, settings.receipt_signer),
        clock=clock,
        policy_digest=partial(policy_digest, store.engine),
        pseudonym=lambda owner, tenant: Pseudonyms(key(), owner).of(tenant),
    ) as receipts:
        yield receipts


def signer_of(settings: StoreSettings, key: Path | None, program: str | None) -> Signer:
    """What signs the receipts of a state directory: a program, or a key file."""
    if program is not None and key is not None:
        return Program(program, key)
    return KeyFile(key or settings.directory() / KEY)


def rotate(
    demo: bool | None, state_dir: Path | None, database_url: str | None, key: Path | None, program: str | None
) -> str:
    """Sign with another key from now on; returns its id.

    Raises:
        SettingsError: there are no receipts yet, or no other key.
    """
    settings = load_store_settings(demo=demo, state_dir=state_dir, database_url=database_url)
    path, signer = settings.directory() / NAME, signer_of(settings, key, program)
    if not path.is_file():
        raise SettingsError(f"there are no receipts at '{path}': start the server once, or name its --state-dir")
    try:
        with opened(path, read_only=False) as book:
            used = [thumbprint(public) for public in book.keys()]
            if isinstance(signer, KeyFile) and (not signer.path.exists() or _is_used(signer, used)):
                _replace(signer)
            public = signer.public_key()
            if used and used[-1] == thumbprint(public):
                raise SettingsError(f"the receipt signer still has the key {used[-1]}: give it another one first")
            book.add_key(thumbprint(public), public)
            return thumbprint(public)
    except (BookError, SignerUnavailable) as error:
        raise SettingsError(str(error)) from error


def _is_used(signer: KeyFile, used: list[str]) -> bool:
    return thumbprint(signer.public_key()) in used


def _replace(signer: KeyFile) -> None:
    if signer.path.exists():
        retired = f"{signer.path.name}.retired-{thumbprint(signer.public_key())[:12]}"
        signer.path.rename(signer.path.with_name(retired))
    signer.make()
