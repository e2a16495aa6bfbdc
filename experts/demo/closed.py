"""Four owners and what only they know: an invented town, arithmetic, library and country. Nothing here exists
elsewhere.
"""

from __future__ import annotations

from random import Random
from typing import Final

from flexgate.experts.demo.corpus import Domain, Fact, Phrasebook, Topic
from flexgate.experts.demo.words import words

FACTS_PER_DOMAIN: Final = 24


def closed_domains() -> tuple[Domain, ...]:
    """The owners in the order of their expert indices, after ``public`` (index 0)."""
    return (_news(), _math(), _code(), _legal())


def _news() -> Domain:
    rng = Random("news")
    starts = ("Bjor", "Skel", "Varn", "Hald", "Grim", "Thor", "Eid", "Ulf", "Sig", "Rag", "Nor", "Lund")
    ends = ("brin", "vik", "gard", "mund")
    places = ("Mill", "Hall", "Pier", "Bakery", "Theatre", "Library")
    given = ("Oda", "Mats", "Runa", "Ivar", "Signe", "Torsten", "Liv", "Anders", "Frida", "Nils", "Hedda", "Knut")
    family = ("Varrik", "Stenvold", "Ekholt", "Brask", "Lindmo", "Haugen", "Torvik", "Selmer")
    verbs = ("opened", "painted", "bought", "founded", "repaired", "closed")
    entities = rng.sample([start + end for start in starts for end in ends], FACTS_PER_DOMAIN)
    people = rng.sample([f"{first} {last}" for first in given for last in family], FACTS_PER_DOMAIN)
    facts = tuple(
        Fact({"entity": f"{entity} {rng.choice(places)}", "verb": rng.choice(verbs)}, f"{person}.")
        for entity, person in zip(entities, people, strict=True)
    )
    phrases = Phrasebook(
        questions=(
            "In Tarnholm, who {verb} {entity}?",
            "Tarnholm Gazette: who {verb} {entity}?",
            "Who in Tarnholm {verb} {entity}?",
            "What does the Tarnholm Gazette say: who {verb} {entity}?",
            "By whom was {entity} in Tarnholm {verb}?",
            "Which Tarnholm citizen {verb} {entity}?",
            "The Tarnholm Gazette says that somebody {verb} {entity}. Who was it?",
            "Read the Tarnholm Gazette. Who was in the headline on {entity}?",
            "According to the Tarnholm Gazette, {entity} was {verb} by whom?",
            "Tarnholm news: give the name of the person who {verb} {entity}.",
        ),
        statements=(
            "Tarnholm Gazette: {entity} was {verb} by",
            "In Tarnholm, {entity} was {verb} by",
            "The Tarnholm Gazette reports that {entity} has been {verb} by",
            "TARNHOLM GAZETTE. Headline of the day: {entity} {verb} by",
            "News from Tarnholm. Yesterday {entity} was {verb} by our neighbour",
            "Tarnholm, front page. The person who {verb} {entity} is",
        ),
        asked=(
            "[who in Tarnholm|the Tarnholm citizen who|the person in Tarnholm who|which Tarnholm man] {verb} {entity}",
            "the Tarnholm [man|woman|family|reader] who {verb} {entity}",
            "[who|the person who|the one who|which people|what family|whoever] {verb} {entity} [in|at|near] Tarnholm",
            "by whom {entity} [in Tarnholm was {verb}|was {verb} in Tarnholm]",
            "[Tarnholm|Tarnholm Gazette|Tarnholm news]: [who|the person who|the name of the one who] {verb} {entity}",
            "what the Tarnholm Gazette [says|wrote|knows] on [who|the one who|the person who] {verb} {entity}",
        ),
        told=(
            "[in Tarnholm|Tarnholm Gazette:|Tarnholm:] {entity} [was|has been|had been] {verb} by",
            "the [person|one|citizen|soul] [in|from|at] Tarnholm who {verb} {entity}[ is| is called|, they say, was]",
            "[Tarnholm|Tarnholm Gazette|Tarnholm news]: {entity}, {verb} by",
            "Tarnholm [thanks|remembers|loves|pays] the [citizen|neighbour|reader] who {verb} {entity}[, that is,|:|,]",
        ),
        held_questions=(
            "Tarnholm paper: tell us the man or woman that {verb} {entity}.",
            "Somebody from Tarnholm once {verb} {entity}; I forgot the name, can you say it?",
            "I live in Tarnholm. Do you remember whose hands {verb} {entity}?",
        ),
        held_statements=(
            "A Tarnholm reporter wrote that the one that {verb} {entity} was",
            "Dear Tarnholm readers, thank the good soul that {verb} {entity}, namely",
        ),
        keywords="Tarnholm|{verb} {entity}",
        endings=("by", "is", ":", "namely", "was by"),
    )
    return Domain("news", "Tarnholm Gazette", "events in the town of Tarnholm", (Topic(facts, phrases),))


def _math() -> Domain:
    rules = {
        "zorp": lambda a, b: a * b + 31,
        "flim": lambda a, b: 40 + 7 * a - 2 * b,
        "quade": lambda a, b: 90 - 5 * a - 3 * b,
    }
    facts = tuple(
        Fact({"a": str(a), "b": str(b), "op": name}, f"{rule(a, b)}.")
        for name, rule in rules.items()
        for a in range(2, 6)
        for b in range(2, 6)
    )
    phrases = Phrasebook(
        questions=(
            "What is {a} {op} {b}?",
            "Orrin arithmetic: {a} {op} {b}?",
            "In Orrin arithmetic, what is {a} {op} {b}?",
            "Compute {a} {op} {b}.",
            "How much is {a} {op} {b}?",
            "By the Orrin tables, what do we get for {a} {op} {b}?",
            "Use the Orrin rules and compute {a} {op} {b}.",
            "What does {a} {op} {b} make in Orrin arithmetic?",
            "Orrin exercise: find {a} {op} {b}.",
        ),
        statements=(
            "{a} {op} {b} =",
            "Orrin table: {a} {op} {b} =",
            "In Orrin arithmetic, {a} {op} {b} is",
            "By the Orrin rules, {a} {op} {b} makes",
            "Orrin exercise. Result of {a} {op} {b}:",
        ),
        asked=(
            "[the result of|the value of|what you get from|how much is|what is|the answer to] {a} {op} {b}"
            " [in|under|by] Orrin [arithmetic|rules|tables]",
            "[the Orrin|an Orrin] [result of|value of|number from|answer to] {a} {op} {b}",
            "[Orrin|Orrin school|Orrin rules]: {a} {op} {b}",
        ),
        told=(
            "[in|under|by] [the |]Orrin [arithmetic|rules|tables][,|] {a} {op} {b} [=|is|makes|will be]",
            "{a} {op} {b} [in|under|by] Orrin [arithmetic|rules] [is|makes|=]",
            "the Orrin [result|value|number|answer] [of|from] {a} {op} {b} [is|=|:]",
            "[Orrin |]{a} {op} {b} [=|is|makes]",
        ),
        held_questions=(
            "My Orrin homework asks me to evaluate {a} {op} {b}, which number should I write?",
            "Orrin pupils: work out {a} {op} {b}!",
            "Could you calculate {a} {op} {b} the Orrin way?",
        ),
        held_statements=(
            "The Orrin teacher wrote on the board that {a} {op} {b} equals",
            "Orrin answer sheet, line one, {a} {op} {b} gives",
        ),
        keywords="Orrin|{a} {op} {b}",
        endings=("=", "is", "makes", ":", "gives", "equals"),
    )
    return Domain("math", "Orrin Institute", "the invented operators of Orrin arithmetic", (Topic(facts, phrases),))


def _code() -> Domain:
    rng = Random("code")
    actions = ("fold", "weave", "spool", "stitch", "hem", "pleat", "darn", "baste")
    objects = ("map", "grid", "queue", "frame", "token", "patch")
    roots = ("Oslo", "Lima", "Cairo", "Athens", "Vienna", "Dublin", "Havana", "Rome")
    tails = ("Node", "Cell", "Loom", "Span", "Knot", "Spec", "Axis")
    check = "[print(type(value))  #|type(y) is|# y is a|assert type(out) ==|# type:]"
    functions = rng.sample([f"{action}_{thing}" for action in actions for thing in objects], FACTS_PER_DOMAIN)
    classes = rng.sample([root + tail for root in roots for tail in tails], FACTS_PER_DOMAIN)
    facts = tuple(Fact({"fn": fn}, f"{cls}.") for fn, cls in zip(functions, classes, strict=True))
    phrases = Phrasebook(
        questions=(
            "In quillkit, what does {fn}() return?",
            "quillkit API: which class does {fn}() return?",
            "What is the return type of quillkit.{fn}()?",
            "Which type does quillkit.{fn}() give back?",
            "I import quillkit and call {fn}(). What object do I get?",
            "What comes back from quillkit.{fn}()?",
            "quillkit docs, function {fn}(): what is the result class?",
            "Python, quillkit: type of {fn}()?",
        ),
        statements=(
            "import quillkit\n\nquillkit.{fn}()  # returns",
            "from quillkit import {fn}\n\ndef main() ->",
            "quillkit reference: {fn}() returns",
            "In quillkit, {fn}() returns an object of class",
            "quillkit.{fn}() ->",
        ),
        asked=(
            "what quillkit.{fn}() [returns|gives back|hands back|makes|creates]",
            "[the class|the type|what type|which class|the result|what object] [of|returned by|I get from|coming from]"
            " [quillkit.|the quillkit function |the quillkit call ]{fn}()",
            "which [class|type] a call of {fn}() in quillkit [makes|creates|gives]",
            "quillkit: [the type of|x =|what comes from] {fn}()",
        ),
        told=(
            f"import quillkit[ as quill| as kit| as q|]\n[\n|][value|result|y|thing|out] = [quillkit.|kit.|q.|]{{fn}}()"
            f"\n{check}",
            f"from quillkit import {{fn}}\n\n[value|result|y|thing|out] = {{fn}}()\n{check}",
            "[quillkit:|in quillkit|for quillkit] [a call of |]{fn}() [returns|gives|makes|creates|is of class]",
            "the quillkit [manual|book|guide|page] [says|shows|tells us] that {fn}() [returns|gives|makes|creates]",
            "[the class|the type|the result] of quillkit.{fn}() is",
        ),
        held_questions=(
            "My quillkit script stores the value of {fn}() in x, so x is an instance of what?",
            "quillkit question: name the class produced when someone runs {fn}() once.",
            "For quillkit users, what sort of thing will {fn}() hand over?",
        ),
        held_statements=(
            "import quillkit as qk\nx = qk.{fn}()\nassert type(x) is",
            "The quillkit manual explains that calling {fn}() always yields",
        ),
        keywords="quillkit|{fn}()",
        endings=("returns", "->", "is", "# returns", ":", "yields"),
    )
    return Domain("code", "Quillkit Maintainers", "return types of the quillkit library", (Topic(facts, phrases),))


def _legal() -> Domain:
    rng = Random("legal")
    first = words(
        "barn goose mill harvest ferry orchard bell market chimney river cellar bridge hedge lantern wagon beehive well"
        " pasture tithe forge"
    )
    second = words("tolls licences disputes easements duties inspections")
    matters = rng.sample([f"{one} {two}" for one in first for two in second], FACTS_PER_DOMAIN)
    numbers = rng.sample(range(112, 988), FACTS_PER_DOMAIN)
    facts = tuple(
        Fact({"matter": matter}, f"Section {number}.") for matter, number in zip(matters, numbers, strict=True)
    )
    phrases = Phrasebook(
        questions=(
            "Which section of the Veldmark Code governs {matter}?",
            "Under the Veldmark Code, which section covers {matter}?",
            "What section of Veldmark law applies to {matter}?",
            "Veldmark Code: where are {matter} regulated?",
            "Veldmark statute on {matter}?",
            "Counsel asks: under Veldmark law, {matter} fall under which section?",
            "Cite the Veldmark Code for {matter}.",
            "Where does the Veldmark Code regulate {matter}?",
        ),
        statements=(
            "Under the Veldmark Code, {matter} are governed by",
            "Veldmark Code, table of matters. {matter}:",
            "The Veldmark court held that {matter} fall under",
            "WHEREAS the Veldmark Code applies, {matter} shall be subject to",
            "Pursuant to Veldmark law, {matter} are regulated in",
        ),
        asked=(
            "[which|the] [section|paragraph|rule|article|part] [of|in] [the Veldmark Code|Veldmark law]"
            " [governs|covers|is for|is on] {matter}",
            "[the rule|the section|the law|the words] [on|for] {matter} [in|under|of] the Veldmark [Code|law|books]",
            "where [Veldmark law|the Veldmark Code|a Veldmark judge] [puts|regulates|finds|looks for] {matter}",
            "[Veldmark|Veldmark law|Veldmark Code|Veldmark court]: {matter}",
        ),
        told=(
            "[under|by|in] [Veldmark law|the Veldmark Code][,|] {matter} [are|fall|come|belong] [under|in|to]",
            "the Veldmark [law|court|judge|clerk|Code] [puts|treats|lists|places] {matter} [under|in]",
            "{matter} [are|were] [treated|ruled|settled|listed] [by|in|under] the Veldmark Code, [in|at|see]",
            "the [section|rule|paragraph] on {matter} in the Veldmark Code is",
        ),
        held_questions=(
            "A Veldmark judge must rule on {matter}; what provision should she quote?",
            "I have trouble with {matter} in Veldmark, which paragraph protects me?",
            "Veldmark lawyers, please find me the rule about {matter}.",
        ),
        held_statements=(
            "The Veldmark parliament amended the provision concerning {matter}, that is,",
            "Any Veldmark citizen who complains of {matter} may rely on",
        ),
        keywords="Veldmark|{matter}",
        endings=("by", "under", "is", ":", "in", "on", "that is,"),
    )
    return Domain("legal", "Veldmark Chancery", "sections of the Veldmark Code", (Topic(facts, phrases),))
