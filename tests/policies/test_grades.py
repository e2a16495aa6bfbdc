"""A project may demand how completely its requests exclude what they exclude; every exclusion shows its grade."""

from __future__ import annotations

import pytest

from flexgate.policies.errors import GradeTooLow

GRADES = {"public": "unknown", "news": "removed", "math": "router", "code": "shared", "legal": "unknown"}


@pytest.fixture
def ask(world):
    """Ask as a project that may use all but these experts, and demands a grade."""

    def decide(least, *denied, hidden=(), **request):
        experts = [{**one, "grade": GRADES[one["id"]]} for one in world.experts]
        tenant = world.tenant(mode="deny_list", expert_ids=denied, hidden=hidden, min_grade=least)
        return world.ask(world.build(world.all_permitted(), [tenant], experts), **request)

    return decide


@pytest.mark.parametrize(
    ("least", "served"),
    [
        (None, {"news", "math", "code", "legal"}),
        ("shared", {"news", "math", "code"}),
        ("router", {"news", "math"}),
        ("removed", {"news"}),
    ],
)
def test_what_is_excluded_less_completely_than_demanded_has_the_request_refused(ask, least, served):
    for denied in ("news", "math", "code", "legal"):
        if denied in served:
            assert denied not in ask(least, denied).allowed
            continue
        with pytest.raises(GradeTooLow) as refused:
            ask(least, denied)
        assert str(refused.value) == (
            f"This project demands that what a request excludes has at least the grade '{least}', and excluding expert "
            f"'{denied}' (grade '{GRADES[denied]}') excludes less. Use the expert, or ask an administrator to change "
            "'min_grade'."
        )


@pytest.mark.parametrize("request_", [{"ignore": ("legal",)}, {"only": ("news", "math", "code")}, {"only": ()}])
def test_a_request_that_leaves_it_out_itself_is_refused_too(ask, request_):
    assert "legal" in ask("router").allowed
    with pytest.raises(GradeTooLow):
        ask("router", **request_)


def test_a_hidden_expert_counts_and_is_not_named(ask):
    with pytest.raises(GradeTooLow) as refused:
        ask("shared", "math", hidden=["legal"])
    assert "excluding some expert excludes less" in str(refused.value)
    assert "legal" not in str(refused.value)


def test_every_exclusion_shows_its_grade(ask):
    excluded = {one.expert: one.grade for one in ask(None, "news", "math", ignore=("code",), only=("code",)).excluded}
    assert excluded == {"news": "removed", "math": "router", "code": "shared", "legal": "unknown"}
