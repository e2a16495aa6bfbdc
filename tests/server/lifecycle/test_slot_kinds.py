"""`--slots` is read as it is written, or refused in a sentence."""

from __future__ import annotations

import pytest

from flexgate.server.lifecycle.slot_kinds import SlotKinds, parse_slot_kinds


@pytest.mark.parametrize(
    ("text", "kinds"),
    [
        ("full=2,r64=3", SlotKinds(2, (64, 64, 64))),
        ("r8=1, full=0 ,r64=1", SlotKinds(0, (8, 64))),
        ("r8=2", SlotKinds(0, (8, 8))),
        ("full=5", SlotKinds(5, ())),
        ("full=0,r8=0", SlotKinds(0, ())),
    ],
)
def test_kinds_are_read_in_their_order_and_what_is_not_named_has_no_slots(text: str, kinds: SlotKinds) -> None:
    assert parse_slot_kinds(text) == kinds


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "'' is not a kind and a number, as in full=2,r64=8"),
        ("full", "'full' is not a kind"),
        ("full=2,", "'' is not a kind"),
        ("full=-1", "'full=-1' is not a kind"),
        ("r0=1", "'r0=1' is not a kind"),
        ("r=1", "'r=1' is not a kind"),
        ("w5=1", "'w5=1' is not a kind"),
        ("r64=1,r64=2", "names r64 twice"),
        ("full=1,full=1", "names full twice"),
        ("full=60,r8=4", "asks for more than 63 slots"),
        ("r99999999=1", "is not a kind"),
    ],
)
def test_what_is_no_kind_of_slot_is_refused_in_a_sentence(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=f"--slots .*{message}"):
        parse_slot_kinds(text)
