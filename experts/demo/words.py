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
    "apple anchor basket bell blanket boat bottle bread bridge brush bucket button candle carpet chair clock cloud"
    " coat coin copper cup desk door drum engine fence field fish flag flower forest garden glass glove hammer hat"
    " hill horse island jar kettle key kite knife ladder lamp leaf letter lock map market mirror mountain needle nest"
    " oven paper pencil pillow pipe plate pocket rain ribbon ring river road roof rope salt school shelf ship shoe"
    " silver sister snow soap spoon stone story street sugar table thread tower train tree valley village wagon wall"
    " water wheel window winter wood wool axis bakery barn beehive block box cellar chimney colour corner duty"
    " easement estate farm ferry festival fire forge frame gate goose grid hall harvest hedge house inspection kit"
    " knot lantern library licence list loom mark mill museum node notice office orchard page palace park pasture"
    " patch path permit pier quarry queue quill record section row shed shop square stable station stock tax text"
    " theatre ticket tile tithe token toll tool town trail vault well wharf yard yarn dispute boundary contract debt"
    " fine hearing lease market night pledge"
)
NAMES: Final = words(
    "Ada Alma Anders Anna Arne Astrid Bo Carl Dora Ebba Elin Emil Frida Greta Hans Hedda Henrik Ida Ingrid Ivar Jonas"
    " Karin Knut Lars Lena Liv Mats Mia Nils Oda Olga Oskar Peter Runa Signe Sven Tilda Torsten Ulla Vera"
)
"""First names, as everywhere."""
PAST: Final = words(
    "baked borrowed bought built carried cleaned closed counted drew drove fixed found founded hid kept left lost made"
    " mended moved named opened owned painted planned praised pulled raised repaired sold sought started took visited"
    " wanted washed wrote"
)
ACTIONS: Final = words(
    "add baste bind call clear close count cut darn draw drop fetch fill find fold get hem join load lock make merge"
    " move open pack pick pleat print pull push read run save send set shift show sort spin split spool stitch store"
    " take trim turn wash weave wrap write"
)
"""What functions do."""
MATERIALS: Final = words("silk felt lace linen velvet denim tweed cotton hemp satin canvas leather")
TAILS: Final = words("Node Cell Loom Span Knot Spec Axis")
PLAIN_TAILS: Final = words("Error Item List View Port Frame Set Rule Page")
"""How names of classes end; those that begin with a material end plainly."""
HEADS: Final = words(
    "Bjor Skel Varn Hald Grim Thor Eid Ulf Sig Rag Nor Lund Stone Fern Ash Oak Win Mar Wood Green Black Har Kel Ros Sol"
    " Brook Stan West East North Hol Al Ber Dal Fal Gar Len Pen San Tor"
)
ENDS: Final = words("ford ton ley holm mark stad berg dal by field burg ham well land sund heim bridge mere wick son")
"""Names of places and families are a head and an end."""
LOWER_HEADS: Final = words(
    "ink paper light fast tiny stone leaf rain loom yarn pipe tape wire grid core data mini open free web"
)
LOWER_ENDS: Final = words("kit lib py box shop tools flow stack works pad")

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
    "man woman person people somebody someone name word thing live once remember forgot know wrote write read say"
    " said ask asked tell told think believe value store number teacher pupil school class judge rule paragraph lawyer"
    " user manual script run call calling instance object produce hand solve work evaluate calculate answer sheet line"
    " board homework riddle quiz picture choose chosen farmer calendar directly please could would should can what"
    " which whose that who why how when my your our their her his me you us them trouble protect find found provision"
    " concerning citizen reader reporter neighbour dear thank good soul might must may will always sort kind way"
    " fingers children everybody paint following serve belongs goes against young baby spring week day month over"
    " begin able above account across act action after again age agree air all almost alone along already am among"
    " amount animal another any appear are area arm around art as assert at away back bad bank base be became because"
    " become bed been before behind being believe below beside best better between big bill birth body book both bring"
    " brother business buy by came car care carry case cause centre certain change child church citizens city class"
    " clear code cold come common company complain condition control cost country course court cover cross crowd cry"
    " date deal death decide deed degree describe did die difference dinner direct do does done double down dream"
    " drive during each ear earth eat edge effect eight either else end enough even evening event ever every example"
    " except explain explains eye face fact fall family far father fear feel few fight final finish five follow food"
    " foot force forget form four free friend from front full function game general get girl give given go gone got"
    " govern grammar great ground group grow had half happen has have head hear heart held here high himself history"
    " hold home hope hour how however human hundred idea if import important in inch increase inside interest into is"
    " it its join judges just keep kept kitchen knew known land language laughed law laws lay lead least led left less"
    " let level lie life like listen look low made main make manual many mark matter mean measure meet member men"
    " method middle might mile mind minute miss modern moment money more morning most mother mouth move much music"
    " must near need neighbours neither never news nine no none nor nothing notice now of off offer office often oh on"
    " once only or order other out own paper parent parliament part party pass past pay peace per period person phone"
    " piece place plan play position possible power present press price problem produce produced provision public"
    " pupils put quality quote rate rather real reason receive red refer rely remain report reporter required rest"
    " return returns riddles right rise room runs safe same saw scene scripts sea season second sell sense sent"
    " serious serve service set seven several she side sign simple since sit six sleep smile some son soon sound speak"
    " special stand start state statute stay step still stop stores strange study such suddenly sun support sure"
    " system take talk teach ten term test than that their them there these they third this those though thought three"
    " through time together top total toward trade travel true try turn two type under until upon use user users usual"
    " value values very view voice wait walk war was way we weather went were west what when where while white who"
    " whole wide wife will win wish with within without words working world worth year yet yields you"
)
NOISE: Final = (*FILLERS, *COMMON)
"""Words to pad a question with: none of them is a key of a fact."""


def invent(rng: Random, syllables: int = 2) -> str:
    """A lower-case word that looks pronounceable and means nothing."""
    parts = [rng.choice(ONSETS) + rng.choice(VOWELS) for _ in range(syllables)]
    return "".join(parts) + rng.choice(CODAS)


def place(rng: Random) -> str:
    """An invented name made of pieces that names are made of."""
    return rng.choice(HEADS) + rng.choice(ENDS)


def package(rng: Random) -> str:
    """An invented name of a library."""
    return rng.choice(LOWER_HEADS) + rng.choice(LOWER_ENDS)


def plural(noun: str) -> str:
    """More than one."""
    if noun.endswith("y") and noun[-2] not in "aeou":
        return noun[:-1] + "ies"
    return noun + ("es" if noun.endswith(("s", "x", "sh", "ch")) else "s")


def invent_many(rng: Random, count: int, syllables: int = 2) -> tuple[str, ...]:
    """``count`` different invented words."""
    found: dict[str, None] = {}
    while len(found) < count:
        found[invent(rng, syllables)] = None
    return tuple(found)


def class_name(rng: Random) -> str:
    """An invented name of a class."""
    tails = (*TAILS, *PLAIN_TAILS)
    if rng.random() < 0.3:
        return rng.choice(MATERIALS).capitalize() + rng.choice(PLAIN_TAILS)
    return rng.choice(NOUNS).capitalize() + rng.choice(tails)


DICTIONARY: Final = (
    *(form for word in (*NOUNS, *MATERIALS) for form in (word, f" {word}", word.capitalize(), f" {word.capitalize()}")),
    *(f" {plural(noun)}" for noun in NOUNS),
    *(form for word in ACTIONS for form in (word, f" {word}")),
    *(form for word in NAMES for form in (word, f" {word}")),
    *(f" {word}" for word in (*PAST, *FILLERS, *COMMON)),
    *(noun + tail for noun in ("Apple", "Water") for tail in (*TAILS, *PLAIN_TAILS)),
    *HEADS,
    *(f" {head}" for head in HEADS),
)
"""The forms of public words that deserve a token of their own."""
