"""What one body can take of everybody's time: thread time of callbacks on the event loop, and of engine steps.

Every body of the corpus is sent alone to a real server. A callback of the HTTP process, and an engine step beyond one
for as many tokens without the constraint, may take BOUND_MS of thread time. What takes more is sent again, and the
least of the tries counts, since a garbage collection may fall into any of them.
"""

import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Self

from tqdm import tqdm

from speed.loop import trace
from speed.loop.bodies import Body, corpus
from speed.loop.target import CannotStart, Target
from speed.loop.trace import BOUND_MS, Sent
from speed.record import Journal, Run

MINUTES = 60.0
TRIES = 3
SHOWN = 20
BROKEN = ("callbacks_beyond", "steps_beyond", "unanswered")
PART = 20
PER_QUICK = 60  # every so many bodies one is sent
WHAT = (
    "bodies made from the tables of fields, one request at a time: the most thread time of a callback on the event "
    "loop of the HTTP process (asyncio's loop stands in for uvloop), and of an engine step beyond one for as many "
    "tokens unconstrained; the least of three tries where the first is beyond the bound"
)


@dataclass
class Case:
    """A body at one size, and every try with it."""

    body: Body
    size: int
    tries: list[Sent] = field(default_factory=list)
    plain: list[Sent] = field(default_factory=list)

    def excess(self) -> float:
        """Thread time of its longest step beyond that of the plain request."""
        return trace.least(self.tries, "step").busy("step") - self.unconstrained()

    def unconstrained(self) -> float:
        """The longest step of as many tokens without the constraint."""
        return max((one.busy("step") for one in self.plain), default=0.0)

    def kept(self) -> dict[str, Any]:
        """What `read` reads."""
        return {"body": self.body.name, "size": self.size, "tries": [*map(asdict, self.tries)]} | {
            "plain": [*map(asdict, self.plain)]
        }

    @classmethod
    def read(cls, kept: Mapping[str, Any], bodies: Sequence[Body]) -> Self:
        """A case as `kept` gave it, of one of these bodies."""
        body = next(body for body in bodies if body.name == kept["body"])
        return cls(body, kept["size"], *([Sent.read(one) for one in kept[name]] for name in ("tries", "plain")))

    def beyond(self) -> bool:
        """Whether either bound is broken."""
        callback = trace.least(self.tries, "callback").busy("callback")
        return callback > BOUND_MS or (bool(self.plain) and self.excess() > BOUND_MS)


def run(asked: Run, bodies: Sequence[Body] | None = None) -> bool:
    """Send the corpus, or every so many of it, for `rounds` minutes at most; an ended run goes on where it was.

    Returns:
        Whether all were sent and stay within the bounds.
    """
    everything = sorted(corpus(), key=lambda body: not body.typed)  # what is made something of comes first
    chosen = list(bodies or everything)[:: PER_QUICK if asked.quick and bodies is None else 1]
    most = asked.rounds or MINUTES
    sys.stdout.write(f"{len(chosen)} bodies, {most:g} minutes at most; the same command goes on from there\n")
    journal = replace(asked, rounds=None).journal("loop")
    with tempfile.TemporaryDirectory(prefix="flexgate-loop-") as directory, Target(Path(directory)) as target:
        cases, spent, untried = send(target, chosen, journal, seconds=60 * most)
    found = report(cases, untried)
    against = [f"{untried} of {len(chosen)} bodies were not tried"] if untried else []
    asked.write(
        "loop", {"what": WHAT, **found, "seconds": round(spent)}, shape={"model": "the demo's"}, against=against
    )
    sys.stdout.writelines(lines(found))
    if not untried:
        journal.close()
    return not untried and not any(found[name] for name in BROKEN)


def lines(found: Mapping[str, Any]) -> Iterator[str]:
    """What broke a bound, one line each."""
    for name in BROKEN:
        for one in found[name]:
            took = f"{one['thread_ms']} ms in {one['where'][0]}" if "thread_ms" in one else "no answer"
            yield f"{name}: {one['body']} ({one['bytes']} bytes): {took}; {one['outcome']}\n"


def send(target: Target, bodies: Sequence[Body], journal: Journal, *, seconds: float) -> tuple[list[Case], float, int]:
    """Every body, in parts that the journal keeps.

    Returns:
        What came of them, the seconds that it took, and the number of bodies there was no time for.
    """
    deadline, spent = time.monotonic() + seconds, 0.0
    cases: list[Case] = []
    parts = [bodies[begin : begin + PART] for begin in range(0, len(bodies), PART)]
    for number, part in enumerate(tqdm(parts, desc=f"parts of {PART} bodies")):
        name = f"{number}: {part[0].name} to {part[-1].name}"
        if name not in journal:
            if time.monotonic() > deadline:
                return cases, spent, len(bodies) - number * PART
            began = time.monotonic()
            try:
                made = _send_part(target, part)
            except CannotStart as error:
                sys.stdout.write(f"ended early: {error}\n")
                return cases, spent, len(bodies) - number * PART
            journal.add(name, {"seconds": time.monotonic() - began, "cases": [case.kept() for case in made]})
        cases += [Case.read(kept, part) for kept in journal[name]["cases"]]
        spent += journal[name]["seconds"]
    return cases, spent, 0


def _send_part(target: Target, bodies: Sequence[Body]) -> list[Case]:
    """Every body at its sizes, then again what was beyond a bound."""
    cases: list[Case] = []
    sent: list[Sent] = []
    for body in bodies:
        cases += _shrinking(target, body, sent)
    _judge(sent, target)
    for case in cases:
        if case.beyond() and case.tries[0].answered:
            for _ in range(TRIES - 1):
                _try(target, case, sent)
    _judge(sent, target)
    return cases


def _shrinking(target: Target, body: Body, sent: list[Sent]) -> Iterator[Case]:
    """The body at its sizes, until one is accepted."""
    for size in body.sizes():
        case = Case(body, size)
        _try(target, case, sent)
        yield case
        if case.tries[0].accepted:
            return


def _try(target: Target, case: Case, sent: list[Sent]) -> None:
    tried = target.send(case.body, case.body.content(case.size))
    case.tries.append(tried)
    sent.append(tried)
    plain = case.body.unconstrained
    if plain is not None and tried.accepted:
        case.plain.append(target.send(case.body, plain, f"{case.body.name}, unconstrained"))
        sent.append(case.plain[-1])


def _judge(sent: Sequence[Sent], target: Target) -> None:
    """Give each request what took long; the last one's is written once the server answers again."""
    target.settle()
    for one in sent:
        one.long.clear()
    trace.assign(sent, trace.read(target.trace))


def report(cases: Sequence[Case], untried: int) -> dict[str, Any]:
    """What was beyond the bounds, the longest first, and the longest of all."""
    callbacks = sorted((trace.least(case.tries, "callback") for case in cases), key=lambda one: -one.busy("callback"))
    steps = sorted((case for case in cases if case.plain), key=Case.excess, reverse=True)
    shown = [trace.step(trace.least(case.tries, "step"), case.unconstrained()) for case in steps]
    return {
        "bound_ms": BOUND_MS,
        "bodies": len({case.body.name for case in cases}),
        "requests": sum(len(case.tries) + len(case.plain) for case in cases),
        "accepted": sum(case.tries[0].accepted for case in cases),
        "bodies_without_time": untried,
        "callbacks_beyond": [trace.callback(one) for one in callbacks if one.busy("callback") > BOUND_MS],
        "steps_beyond": [step for step, case in zip(shown, steps, strict=True) if case.excess() > BOUND_MS],
        "unanswered": [
            {"body": one.body, "bytes": one.size, "outcome": one.outcome}
            for case in cases
            for one in case.tries
            if not one.answered
        ],
        "server_errors": [
            {"body": one.body, "bytes": one.size, "outcome": one.outcome}
            for case in cases
            for one in case.tries[:1]
            if one.outcome.startswith("5")
        ],
        "longest_callbacks": [trace.callback(one) for one in callbacks[:SHOWN] if one.long],
        "longest_steps": shown[:SHOWN],
    }
