"""The closed vocabularies of agreements: what a purpose and a region may be, and what covers what.

Purposes form a tree with RSL's usage words (AIPREF's `train-ai` is read as `ai-train`); local
words start with `x-`:

    all ── ai-all ── ai-train | ai-input | ai-index
        ├─ search
        └─ x-…

Regions are ISO 3166 countries (`DE`) and subdivisions (`DE-BY`) under the groups `EU` and `EEA`.
A request that declares nothing stands for the top of the tree: a limited permission does not
reach it, and every prohibition does.
"""

from __future__ import annotations

import re
from functools import lru_cache
from typing import Final, NewType

from flexgate.policies.errors import InvalidName

Purpose = NewType("Purpose", str)
Region = NewType("Region", str)

_PURPOSE_PARENTS: Final = {
    "all": (),
    "ai-all": ("all",),
    "ai-train": ("ai-all", "all"),
    "ai-input": ("ai-all", "all"),
    "ai-index": ("ai-all", "all"),
    "search": ("all",),
}
_PURPOSE_ALIASES: Final = {"train-ai": "ai-train"}
_LOCAL_PURPOSE: Final = re.compile(r"x-[a-z0-9][a-z0-9-]{0,60}")

_EU_CODES: Final = "AT BE BG CY CZ DE DK EE ES FI FR GR HR HU IE IT LT LU LV MT NL PL PT RO SE SI SK"
EU: Final = frozenset(_EU_CODES.split())
EEA: Final = EU | {"IS", "LI", "NO"}
_COUNTRY_CODES: Final = """
    AD AE AF AG AI AL AM AO AQ AR AS AT AU AW AX AZ BA BB BD BE BF BG BH BI BJ BL BM BN BO BQ BR BS
    BT BV BW BY BZ CA CC CD CF CG CH CI CK CL CM CN CO CR CU CV CW CX CY CZ DE DJ DK DM DO DZ EC EE
    EG EH ER ES ET FI FJ FK FM FO FR GA GB GD GE GF GG GH GI GL GM GN GP GQ GR GS GT GU GW GY HK HM
    HN HR HT HU ID IE IL IM IN IO IQ IR IS IT JE JM JO JP KE KG KH KI KM KN KP KR KW KY KZ LA LB LC
    LI LK LR LS LT LU LV LY MA MC MD ME MF MG MH MK ML MM MN MO MP MQ MR MS MT MU MV MW MX MY MZ NA
    NC NE NF NG NI NL NO NP NR NU NZ OM PA PE PF PG PH PK PL PM PN PR PS PT PW PY QA RE RO RS RU RW
    SA SB SC SD SE SG SH SI SJ SK SL SM SN SO SR SS ST SV SX SY SZ TC TD TF TG TH TJ TK TL TM TN TO
    TR TT TV TW TZ UA UG UM US UY UZ VA VC VE VG VI VN VU WF WS YE YT ZA ZM ZW
"""
COUNTRIES: Final = frozenset(_COUNTRY_CODES.split())
_SUBDIVISION: Final = re.compile(r"([A-Z]{2})-[A-Z0-9]{1,3}")


def parse_purpose(text: str) -> Purpose:
    """`text` as a purpose, aliases resolved; raises `InvalidName`."""
    word = _PURPOSE_ALIASES.get(text, text)
    if word in _PURPOSE_PARENTS or _LOCAL_PURPOSE.fullmatch(word):
        return Purpose(word)
    known = ", ".join(sorted(_PURPOSE_PARENTS))
    raise InvalidName(f"{text!r} is not a purpose: use one of {known}, or a local word 'x-…'")


def parse_region(text: str) -> Region:
    """`text` as a region; raises `InvalidName`."""
    if text in COUNTRIES or text in ("EU", "EEA"):
        return Region(text)
    subdivision = _SUBDIVISION.fullmatch(text)
    if subdivision and subdivision[1] in COUNTRIES:
        return Region(text)
    raise InvalidName(
        f"{text!r} is not a region: use an ISO 3166 country ('DE'), a subdivision ('DE-BY'), 'EU' or 'EEA'"
    )


@lru_cache(maxsize=4096)
def purpose_and_above(purpose: Purpose) -> frozenset[str]:
    """The purpose and every purpose that covers it."""
    return frozenset({purpose, *_PURPOSE_PARENTS.get(purpose, ("all",))})


@lru_cache(maxsize=4096)
def region_and_above(region: Region) -> frozenset[str]:
    """The region and every region that covers it."""
    if region in ("EU", "EEA"):
        return frozenset({region, "EEA"})
    country = region[:2]
    groups = {name for name, members in (("EU", EU), ("EEA", EEA)) if country in members}
    return frozenset({region, country} | groups)
