"""The closed vocabularies of agreements: what a purpose and a region may be, and what covers what.

Purposes form a tree with RSL's usage words (AIPREF's `train-ai` is read as `ai-train`); local
words start with `x-`:

    all ── ai-all ── ai-train | ai-input | ai-index
        ├─ search
        └─ x-…

Regions are ISO 3166 countries (`DE`) and subdivisions (`DE-BY`) under the groups `EU` and `EEA`.
Licenses are SPDX expressions (`CC-BY-4.0`); they are labels and decide nothing. Currencies are those of ISO 4217.
A request that declares nothing stands for the top of the tree: a limited permission does not
reach it, and every prohibition does.

The lists of regions, licenses and currencies come with libraries and change. New documents are checked against them;
stored ones are read as they are.
"""

from __future__ import annotations

import re
from functools import lru_cache
from typing import Final, NewType

import pycountry
from packaging.licenses import InvalidLicenseExpression, canonicalize_license_expression

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
_COUNTRIES: Final = frozenset(country.alpha_2 for country in pycountry.countries)
_SUBDIVISIONS: Final = frozenset(subdivision.code for subdivision in pycountry.subdivisions)
_REGION: Final = re.compile(r"EEA|[A-Z]{2}(-[A-Z0-9]{1,3})?")
_LONGEST_LICENSE: Final = 200
_NO_MONEY: Final = frozenset("XAG XAU XBA XBB XBC XBD XDR XPD XPT XSU XTS XUA XXX".split())
_CURRENCIES: Final = frozenset(currency.alpha_3 for currency in pycountry.currencies) - _NO_MONEY
_MINOR_DIGITS: Final = {
    **dict.fromkeys("BIF CLP DJF GNF ISK JPY KMF KRW PYG RWF UGX UYI VND VUV XAF XOF XPF".split(), 0),
    **dict.fromkeys("BHD IQD JOD KWD LYD OMR TND".split(), 3),
    **dict.fromkeys("CLF UYW".split(), 4),
}


def parse_purpose(text: str) -> Purpose:
    """`text` as a purpose, aliases resolved; raises `InvalidName`."""
    word = _PURPOSE_ALIASES.get(text, text)
    if word in _PURPOSE_PARENTS or _LOCAL_PURPOSE.fullmatch(word):
        return Purpose(word)
    known = ", ".join(sorted(_PURPOSE_PARENTS))
    raise InvalidName(f"{text!r} is not a purpose; use one of {known}, or a purpose of your own that starts with 'x-'")


def parse_region(text: str) -> Region:
    """`text` as a region; raises `InvalidName`."""
    if _is_known(text):
        return Region(text)
    raise InvalidName(
        f"{text!r} is not a region; use an ISO 3166 country ('DE'), a subdivision ('DE-BY'), 'EU' or 'EEA'"
    )


def parse_stored_region(text: str) -> Region:
    """`text` as a region of a stored document; raises `InvalidName`. The lists may have dropped it since."""
    if _REGION.fullmatch(text):
        return Region(text)
    raise InvalidName(f"{text!r} is not written like a region")


def restricted_regions(regions: frozenset[Region]) -> frozenset[Region] | None:
    """The regions that a prohibition or requirement is about; None is everywhere.

    A region that the lists do not have stands for its country, and without a known country for everywhere.
    """
    found = set()
    for region in regions:
        if not _is_known(region) and region[:2] not in _COUNTRIES:
            return None
        found.add(region if _is_known(region) else Region(region[:2]))
    return frozenset(found)


def _is_known(text: str) -> bool:
    return text in _COUNTRIES or text in _SUBDIVISIONS or text in ("EU", "EEA")


def parse_license_expression(text: str) -> str:
    """`text`, as it was written, if it is an SPDX license expression; raises `InvalidName`."""
    reason = f"it has more than {_LONGEST_LICENSE} characters"
    if len(text) <= _LONGEST_LICENSE:
        try:
            canonicalize_license_expression(text)
        except InvalidLicenseExpression as error:
            reason = str(error)
        else:
            return text
    raise InvalidName(
        f"{text[:80]!r} is not an SPDX license expression ({reason}); use ids of the SPDX list, or 'LicenseRef-…'"
    )


def parse_currency(text: str) -> str:
    """`text` as a currency that amounts can be paid in; raises `InvalidName`."""
    if text in _CURRENCIES:
        return text
    raise InvalidName(f"{text!r} is not a currency: use a code of ISO 4217, such as 'EUR'")


def minor_digits(currency: str) -> int:
    """Decimal digits of a currency's smallest unit, by ISO 4217: 2 of EUR, 0 of JPY."""
    return _MINOR_DIGITS.get(currency, 2)


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
