"""Word lists and invented words: the raw material of every generated text."""

from __future__ import annotations

from random import Random
from typing import Final


def words(text: str) -> tuple[str, ...]:
    """The words of a text."""
    return tuple(text.split())


ONSETS: Final = words("b br c cr d dr f fl g gr h j k kl l m n p pl qu r s sk sl st t tr v w y z sh th")
VOWELS: Final = words("a e i o u ai ea oo ou")
CODAS: Final = ("", "", *words("n r l s m k t rn nd ll x p sh lm st"))

NOUNS: Final = words(
    "apple anchor basket bell blanket boat bottle bread bridge brush bucket button candle carpet chair clock"
    " cloud coat coin copper cup desk door drum engine fence field fish flag flower forest garden glass glove"
    " hammer hat hill horse island jar kettle key kite knife ladder lamp leaf letter lock map market mirror"
    " mountain needle nest oven paper pencil pillow pipe plate pocket rain ribbon ring river road roof rope salt"
    " school shelf ship shoe silver sister snow soap spoon stone story street sugar table thread tower train"
    " tree valley village wagon wall water wheel window winter wood wool"
)
ADJECTIVES: Final = words(
    "blue brave bright broken busy calm careful cheap clean clever cold curious dark deep dry early empty"
    " famous fast friendly gentle golden green happy heavy hidden honest huge hungry kind large late lazy light"
    " little long loud lucky narrow new noisy old open plain polite poor proud quick quiet red rich round secret"
    " sharp short silent slow small smooth soft strange strong sweet tall thin tired warm wet wide wild wise"
    " wooden yellow young"
)
VERBS: Final = words(
    "bakes borrows builds buys carries catches cleans closes collects cooks counts cuts draws drops fills finds"
    " fixes follows forgets gives hears helps hides holds keeps learns leaves lifts likes loses makes meets"
    " mends moves needs offers opens paints plants pulls pushes reads remembers repairs sees sells sends shows"
    " sings starts stops takes teaches throws visits wants washes watches writes"
)
FILLERS: Final = words(
    "well now about the for us a bit of on this again today really perhaps kindly just simply maybe also then"
    " so quite thing matter point detail fact note item here there still only any some more less very next last"
    " first"
)

COMMON: Final = words(
    "man woman person people somebody someone name word thing live once remember forgot know wrote write read"
    " say said ask asked tell told think believe value store number teacher pupil school class judge rule"
    " paragraph lawyer user manual script run call calling instance object produce hand solve work evaluate"
    " calculate answer sheet line board homework riddle quiz picture choose chosen farmer calendar directly"
    " please could would should can what which whose that who why how when my your our their her his me you us"
    " them trouble protect find found provision concerning citizen reader reporter neighbour dear thank good"
    " soul might must may will always sort kind way fingers children everybody paint following serve belongs"
    " goes against young baby spring week day month over begin"
)
NOISE: Final = (*FILLERS, *COMMON)
"""Words to pad a question with: none of them is a key of a fact."""


def invent(rng: Random, syllables: int = 2) -> str:
    """A lower-case word that looks pronounceable and means nothing."""
    parts = [rng.choice(ONSETS) + rng.choice(VOWELS) for _ in range(syllables)]
    return "".join(parts) + rng.choice(CODAS)


def invent_many(rng: Random, count: int, syllables: int = 2) -> tuple[str, ...]:
    """``count`` different invented words."""
    found: dict[str, None] = {}
    while len(found) < count:
        found[invent(rng, syllables)] = None
    return tuple(found)
