"""Made-up caption corpora: ordinary ones, as people write about COCO's pictures, and hostile ones.

No data is read: a grammar names a scene, and each caption of an image is another sentence about the same scene, so that
scores are in the range of real ones (CIDEr of about 100 to 200) and n-grams are shared within and between images.
Ordinary captions hold what COCO's hold: hyphens, possessives, contractions, quotes, numbers, prices, times,
abbreviations, periods that are there or missing, stray spaces, typing errors. Hostile ones hold what nobody asked for.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import NamedTuple

PEOPLE = (
    "man woman boy girl child person skateboarder surfer skier snowboarder chef policeman tennis-player baby lady guy"
    " bicyclist cowboy toddler pitcher catcher umpire batter businessman mother father grandmother kid teenager"
).split()
ANIMALS = "dog cat horse cow sheep elephant giraffe zebra bear bird duck seagull puppy kitten goat pigeon".split()
THINGS = (
    "bench umbrella skateboard surfboard frisbee kite snowboard bicycle motorcycle bus train truck airplane boat car"
    " pizza sandwich hot-dog donut cake banana apple orange laptop keyboard mouse remote phone toilet sink refrigerator"
    " microwave oven toaster clock vase teddy-bear toothbrush hydrant sign meter backpack handbag tie suitcase racket"
    " bat glove wine-glass bottle cup fork knife spoon bowl chair couch bed table TV"
).split()
ADJECTIVES = (
    "red blue green yellow white black brown gray grey orange pink small large little big old young tall wooden wet"
    " black-and-white half-eaten two-story double-decker well-dressed red-haired open-faced multi-colored 3-tiered"
    " stuffed empty parked snow-covered colourful plaid striped rusty shiny"
).split()
VERBS = (
    "riding|holding|eating|sitting on|standing next to|walking past|looking at|playing with|jumping over|lying on"
    "|posing with|leaning against|carrying|throwing|catching|watching|driving|cutting|pulling"
).split("|")
PLACES = (
    "on the beach|in a park|on a city street|in the snow|in a kitchen|at night|in front of a building|on top of a hill"
    "|under a tree|near the ocean|by the side of the road|in a living room|on a sunny day|in the middle of a field"
    "|at an intersection|on a tennis court|inside of a store|behind a fence|next to a river|at the zoo"
).split("|")
WORDS_ON_SIGNS = "stop,one way,no parking,Welcome,open,Dr. Pepper,happy birthday,do not enter,Main St.,EXIT".split(",")
BRANDS = "U.S. Navy|McDonald's|Coca-Cola|O'Hare|Levi's|Toys R Us|Ben & Jerry's|google.com|www.flickr.com|Yahoo!".split(
    "|"
)
AMPERSANDS = "M&M's|m&ms|rock & roll|R&B|AT&T|B&W|mac & cheese|Q&A".split("|")
LISTS = (
    "forks, knives, and spoons|apples,oranges and pears|tomatoes , onions and cheese|fries, etc.|dogs, cats etc".split(
        "|"
    )
)
HYPHENATED = (
    "t-shirt T-shirt x-ray close-up u-turn V-neck sun-dress 10-speed 4x4 F-16 B-52 747 5-star 20-something".split()
)
NUMBERED = ("no. 5|No. 12|Bldg. 4|Rte. 66|Hwy 101|I-95|flight 12-B|Fig. 3|Mt. Rushmore|Ft. Lauderdale").split("|")
DECADES = ("1950s", "1950's", "'90s", "90's", "80s")
NEGATIONS = ("can't", "doesn't", "won't", "didn't", "wouldn't", "cannot")
PRONOUNS = ("he's", "she's", "it's", "they're", "we're", "I'm", "you've", "he'd", "she'll", "there's")
SIZES = ("6' 2", "5'10", "12'", "10 ft.", "6ft", "20 lbs.", '7"', '5"x7"')
EXTRAS: tuple[Callable[[random.Random], str], ...] = (
    lambda r: f'with a sign that says "{r.choice(WORDS_ON_SIGNS)}"',
    lambda r: f"with a '{r.choice(WORDS_ON_SIGNS[:4])}' sign",
    lambda r: f"near a {r.choice(PEOPLE)}'s {r.choice(THINGS)}",
    lambda r: f"near the {r.choice(PEOPLE)}s' {r.choice(THINGS)}",
    lambda r: f"at {r.randint(1, 12)}:{r.randint(0, 59):02d}",
    lambda r: f"at {r.randint(1, 12)}:{r.randint(0, 59):02d} {r.choice(['a.m.', 'p.m.', 'am', 'pm', 'AM', 'P.M.'])}",
    lambda r: f"at {r.randint(1, 12)}:{r.randint(0, 59):02d}{r.choice(['am', 'pm', 'PM'])}",
    lambda r: f"at {r.randint(1, 12)} o'clock",
    lambda r: f"for ${r.randint(1, 99)}.{r.randint(0, 99):02d}",
    lambda r: f"for ${r.randint(1, 9)}",
    lambda r: f"for {r.randint(1, 99)} cents",
    lambda r: f"at {r.randint(1, 99)}% off",
    lambda r: f"on {r.choice(['Main', '5th', '42nd', 'Elm'])} {r.choice(['St.', 'Ave.', 'Blvd.', 'street', 'Rd.'])}",
    lambda r: f"in {r.choice(['St. Louis', 'Washington D.C.', 'the U.S.', 'the U.S.A.', 'New York', 'L.A.', 'the UK'])}",
    lambda r: f"by {r.choice(['Mr.', 'Mrs.', 'Dr.', 'Ms.'])} {r.choice(['Smith', 'Jones', 'Potter'])}",
    lambda r: "and watching T.V.",
    lambda r: "on a 1/2 pipe",
    lambda r: f"number {r.randint(1, 999)}",
    lambda r: f"#{r.randint(1, 99)}",
    lambda r: f"from the {r.choice(DECADES)}",
    lambda r: f"with {r.randint(2, 20)} other {r.choice(PEOPLE)}s",
    lambda r: f"({r.choice(['left', 'right', 'not pictured', 'a toy'])})",
    lambda r: f"and/or a {r.choice(THINGS)}",
    lambda r: f"w/ {r.choice(THINGS)}",
    lambda r: f"- {r.choice(PLACES)}",
    lambda r: f"-- {r.choice(PLACES)}",
    lambda r: f"; {r.choice(PLACES)}",
    lambda r: f": {r.choice(PLACES)}",
    lambda r: f"... {r.choice(PLACES)}",
    lambda r: f"...{r.choice(PLACES)}",
    lambda r: f"while it isn't {r.choice(['raining', 'looking', 'moving'])}",
    lambda r: f"but {r.choice(['he', 'she', 'they', 'it'])} {r.choice(NEGATIONS)} see",
    lambda r: f"because {r.choice(PRONOUNS)} happy",
    lambda r: f"{r.choice(['getting ready to', 'gonna', 'going to', 'wanna'])} jump",
    lambda r: f"and {r.choice(AMPERSANDS)}",
    lambda r: f"with {r.choice(LISTS)}",
    lambda r: f"in a {r.choice(HYPHENATED)}",
    lambda r: f"in {r.choice(['1984', '2,000', '1,000,000', '10.5', '3.14', '1st', '2nd', '3rd', '100th'])}",
    lambda r: f"{r.choice(SIZES)} tall",
    lambda r: f"of {r.choice(NUMBERED)}",
    lambda r: f"{r.choice(['i.e.', 'e.g.', 'aka', 'a.k.a.', 'vs.', 'vs', 'etc'])} the {r.choice(ANIMALS)}",
    lambda r: f"that reads {r.choice(BRANDS)}",
)  # fmt: skip


class Scene(NamedTuple):
    """What is in a picture."""

    who: str
    look: str
    verb: str
    what: str
    place: str


def _scene(r: random.Random) -> Scene:
    # The first of each list are the commonest, as in real captions.
    def pick(words: Sequence[str]) -> str:
        return words[min(int(r.expovariate(4) * len(words)), len(words) - 1)]

    who = pick(PEOPLE) if r.random() < 0.7 else pick(ANIMALS)
    return Scene(who, pick(ADJECTIVES), pick(VERBS), pick(THINGS), pick(PLACES))


def _article(word: str) -> str:
    return ("an " if word[0] in "aeiou" else "a ") + word


def _about(r: random.Random, scene: Scene) -> str:
    who, look, verb, what, place = (
        value if r.random() < 0.8 else other for value, other in zip(scene, _scene(r), strict=True)
    )
    text = r.choice([
        f"{_article(who)} {verb} {_article(look)} {what} {place}",
        f"{_article(who)} {verb} {_article(what)} {place}",
        f"{_article(look)} {what} with {_article(who)} {place}",
        f"the {who} is {verb} the {look} {what}",
        f"there is {_article(who)} that is {verb} {_article(what)}",
        f"{_article(who)}, {verb} {_article(look)} {what}, {place}",
        f"a picture of {_article(who)} {verb} {_article(what)} {place}",
        f"two {who}s are {verb} a {what} {place}",
        f"{_article(who)} and {_article(look)} {what} {place}",
        f"{place}, {_article(who)} is {verb} {_article(what)}",
    ])  # fmt: skip
    while r.random() < 0.3:
        text += " " + r.choice(EXTRAS)(r)
    return text


def _typo(r: random.Random, text: str) -> str:
    at = r.randrange(len(text))
    return r.choice([
        text[:at] + text[at + 1 :], text[:at] + text[at] + text[at:], text[:at] + " " + text[at:], text.replace(", ", ","),
        text.replace(" ", "  ", 1), text[:at] + text[at : at + 2][::-1] + text[at + 2 :],
    ])  # fmt: skip


def ordinary(r: random.Random, scene: Scene) -> str:
    """A caption as people write them."""
    text = _about(r, scene)
    if r.random() < 0.7:
        text = text[0].upper() + text[1:]
    if r.random() < 0.03:
        text = _typo(r, text) or text
    if r.random() < 0.02:
        text = text.upper()
    if r.random() < 0.03:
        text = f"{text}. {_about(r, scene).capitalize()}"
    return text + r.choices([".", "", " .", ". ", " ", "!", "..", "...", "?", ","], [60, 20, 5, 5, 4, 2, 1, 1, 1, 1])[0]


SCRAPS = (
    "😀|🐶🐱|❤|☕️|✓|→|日本語 の 犬|собака на скамейке|ΑΒΓ|café|naïve|Zürich|İstanbul|ß|ﬁsh|½|1½|£5|€6.50|¥100|¢5|50¢"
    "|“dog”|‘cat’|«chien»|dog’s|don’t|it’s|o’clock|…|–|a–b|a — b|http://a.com/b?c=d&e=f|https://example.org"
    "|www.example.com/x|bob@example.com|a.b@c.org|#nofilter|#dog #cat|@user|@a_b|1 1/2|3/4|1/2|24/7"
    "|(555) 123-4567|555-1234|1-800-555-1234|12/25/2014|2014-12-25|[sic]|{a}|((b))|(a|b)|<b>bold</b>|<br/>"
    "|<unk>|<s>|</s>|a < b|a > b|&amp;|&lt;3|&nbsp;|&quot;x&quot;|\"a 'b' c\"|'a \"b\" c'|``a''|`a`|\"\"|''|'"
    "|\"|....|. . .|!!!|?!|?!?|:)|:-(|;)|:D|:P|<3|C++|C#|A&B|a&b|x=y|a+b|2+2=4|100%|-5|+5|5°C|a_b|_a_"
    "|snake_case_word|a/b/c|/|\\|\\n|*bold*|**|~|^|^_^|a|b|$|$$|US$5|A$5|$.50|5$|\u00a0|a\u00a0b|\u200b"
    "|a\u200bb|\ufeff|\u00ad|a\u00adb|\t|\r|\v|\f|\u2028|\u2029|\u0085|\x00|\x1b[0m|\x7f|\ufffd|\u202e"
    "|e\u0301|क्षि|ไทย|한국어|שלום|مرحبا|١٢٣|photo.jpg|img_001.png|a.txt|v2.0|1.2.3|192.168.0.1|10:30:15|1,2,3"
    "|1.000,50|'em|'til|rock'n'roll|y'all|ma'am|d'oh|c'mon|ol'|'tis|'90s|jack-o'-lantern|mother-in-law's|x--y"
    "|--|---|-|- -|a- b|a -b|Ph.D.|M.D.|B.C.|e.g.,|i.e.|etc..|U.S.-based|Mr.Smith|St.Louis|J. R. R. Tolkien"
    "|no.5|No. 5|p. 12|pp. 3-4|vol. 2|6\"|5'|5'6\"|8x10|8\"x10\"|1st|2nd.|1980's|9-5|a.|a..|A. The|I. It|II."
    "|x.|O.K.|OK.|e-mail|Wi-Fi|3D|4k|H2O"
).split("|")  # fmt: skip


def hostile(r: random.Random, scene: Scene) -> str:
    """A caption with scraps that tokenizers trip over, glued on or not."""
    words = ordinary(r, scene).split(" ")
    for _ in range(r.randint(1, 4)):
        at = r.randrange(len(words) + 1)
        scrap = r.choice(SCRAPS)
        if r.random() < 0.25 and at < len(words):
            words[at] = r.choice([words[at] + scrap, scrap + words[at]])
        else:
            words.insert(at, scrap)
    return " ".join(words)


class Corpus(NamedTuple):
    """Captions by image id."""

    predictions: dict[str, str]
    references: dict[str, list[str]]


def make_corpus(
    images: int,
    caption: Callable[[random.Random, Scene], str] = ordinary,
    num_references: int = 5,
    seed: int = 0,
) -> Corpus:
    """A corpus; the same for the same arguments."""
    r = random.Random(seed)
    predictions, references = {}, {}
    for number in range(images):
        scene = _scene(r)
        predictions[str(number)] = caption(r, scene)
        references[str(number)] = [caption(r, scene) for _ in range(num_references)]
    return Corpus(predictions, references)
