"""The policy store: tenants, keys, agreements, experts and every revision of them, in SQL."""

from flexgate.policies.store.change import Change
from flexgate.policies.store.keys import MintedKey
from flexgate.policies.store.store import Store

__all__ = ["Change", "MintedKey", "Store"]
