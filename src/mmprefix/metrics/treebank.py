r"""A tokenizer in the manner of the Penn Treebank that gives what Stanford's gives on captions.

A description of behaviour, not of the program's text, which is under the GPL: which words, abbreviations and characters are
special was found by asking the official program (CoreNLP 3.4.1) for the tokens of word lists, of every character and of made
captions, and can be found so again. On ordinary captions the tokens are the same (`benchmarks/metrics.py` counts); on others
the known differences are listed in docs/metrics.md.

Two facts shape it. At each position the longest match of all rules wins, lookahead included, as in a lexer generator;
and of what it yields, quotation marks, single punctuation marks and dashes are dropped by the next step anyway, so
which of two quotation marks one is does not matter here.

Characters outside ASCII are first exchanged, one for one, for a representative of their class, so that the rules are
about a dozen characters:

    é letter    U+0300 combining or modifier letter    U+0660 digit    U+0001 what the program does not know (a space)
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Sequence
from functools import cache, lru_cache
from typing import NamedTuple

LETTER, MARK, DIGIT, UNKNOWN, SYMBOL = "é", "\u0300", "\u0660", "\x01", "¡"

# Kept as they are, because a rule names them.
_NAMED = frozenset("\xa0\xad\u2010\u2011\u2044’‘‛\x91\x92")
# Those that are tokens; all others, and all of what lies beyond U+FFFF, vanish.
_SYMBOLS = tuple(
    (ord(pair[0]), ord(pair[1]))
    for pair in (
        "¡¡ ¥© ¬¬ ®³ ´´ ¶¹ ¼¿ ×× ÷÷ ;; ·· ᾽᾽ ‖‗ ‚‚ „‟ †• ‰‸ ※※ ‾⁂ ⁴⁾ ⁰⁰ ₀₎ ₤₤ ℀℁ ℃℆ ℈℉ ℔℔ №℘ ℞℣ ℥℥ ℧℧ ℩℩ ℮℮ ℺℻ ⅀⅄"
        " ⅊⅍ ⅏⅏ ⅓⅞ ←⯿ 、。 〒〒 ・・"
        " ！／ ：＠ ［｀ ｛･ ￠￡ ￥￦ ¢£"
    ).split()
)
# Quotation marks, dashes, the ellipsis: they part words, and the next step drops them.
_DROPPED = frozenset("“”«»‹›\x93\x94\u2013\u2014\u2015\x96\x97…\x85")
_QUOTES = _DROPPED | frozenset("\"'’‘‛`\x91\x92")
_WRITTEN = {
    "£": "#", "€": "$", "¤": "$", "\u20a0": "$", "\x80": "$", "¢": "cents",
    "¼": "1/4", "½": "1/2", "¾": "3/4", "⅓": "1/3", "⅔": "2/3",
    "(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-",
}  # fmt: skip
_ENTITIES = {"amp": "&", "lt": "<", "gt": ">"}


@cache
def _class_of(character: str) -> str:
    """What stands for a character outside ASCII; see the module."""
    if character in _NAMED:
        return character
    if character in _DROPPED or character in _WRITTEN:
        return SYMBOL
    code, category = ord(character), unicodedata.category(character)
    if any(first <= code <= last for first, last in _SYMBOLS):
        return SYMBOL
    if category == "Zs":
        return " "
    if category == "Nd" and code <= 0xFFFF:
        return DIGIT
    if category in ("Lu", "Ll", "Lt", "Lm", "Lo") and code <= 0xFFFF:
        return LETTER
    if category in ("Mn", "Mc", "Sk") and code < 0x0F00:
        return MARK
    return UNKNOWN


# --- rules

L = rf"[A-Za-z{LETTER}{MARK}\xad]"  # may stand in a word
P = rf"[A-Za-z{LETTER}]"  # letters alone
D = rf"[0-9{DIGIT}]"
LD = rf"[A-Za-z0-9{LETTER}{MARK}{DIGIT}\xad]"
PD = rf"[A-Za-z0-9{LETTER}{DIGIT}]"
APOSTROPHE = "['’\x92]"
ANY_APOSTROPHE = "['’\x92‘\x91‛`]"
SPACE = r"[ \t\xa0]"


def _none_of(marks: str) -> str:
    """A character that is neither a space nor one of ``marks``."""
    return f"[^ \\t\\xa0{re.escape(marks)}]"


# Of URLs and addresses: what no part of one is, and marks that part or end a clause.
_AROUND, _CLAUSE = '"|<>()', ".,!?{}"
ADDRESS = _none_of(_AROUND)
NO_STOP = f"(?<![{re.escape(_CLAUSE + '-')}])"
SITE = rf"www(?:\.{_none_of(_AROUND + _CLAUSE)}+)+\.[A-Za-z]{{2,4}}"
DOMAIN = rf"(?:[a-z{LETTER}]+\.)+(?:{'|'.join(('com', 'edu', 'net', 'org'))})"
LABEL = _none_of(_AROUND + ".")

WORD = rf"{L}{LD}*(?:[.!?]{L}{LD}*)*"
NUMBER = rf"(?:{D}*(?:[.:,\xad]{D}+)+|{D}+)"
ACRONYM = r"[A-Za-z](?:\.[A-Za-z])+"
GAP = "[- \xa0]"  # inside of telephone numbers and mixed fractions
DIALLED = rf"(?:\({D}{{2,3}}\)[ \xa0]?|\+{{0,2}}{D}{{2,4}}{GAP}(?:{D}{{2,4}}{GAP})?)"
SMALL, SLASH = rf"{D}{{1,4}}", r"(?:\\?/|\u2044)"  # of fractions and dates
HYPHEN = "[-_\u058a\u2010\u2011]"
ELIDED = rf"[dDoOlL]{ANY_APOSTROPHE}{P}"  # d'Angelo, o'clock
THING = rf"(?:{ELIDED})?{PD}+(?:{HYPHEN}(?:{ELIDED})?{PD}+)*"
COMPOUND = "[A-Za-z0-9]+(?:-[A-Za-z]+){0,2}"

ATTRIBUTE = r"""[A-Za-z][A-Za-z0-9_:.-]*(?: *= *(?:'[^']*'|"[^"]*"|[A-Za-z][A-Za-z0-9_:.-]*))?"""
TAG = rf"<(?:[A-Za-z][A-Za-z0-9:._-]*(?: +{ATTRIBUTE})* */?|/[A-Za-z][A-Za-z0-9:._-]* *)>"

# Words that an apostrophe cuts and that stay whole. Capitals count but where it is said.
CUT_BEFORE = ("cause", "em", "till", "til")  # the longer one first: the first that fits is taken
CUT_BEHIND = ("[Dd]unkin", "[Oo]l", "somethin")
CUT_INSIDE = (
    "(?i:o o)",
    "(?i:e er)",
    "(?i:li l)",
    "(?i:s) mores",
    "[Nn]or easter",
    "cap n",
    r"cont d\.",
    "ev ry",
    "nat l",
)
DECADE = "[2-9]0[Ss]"
VOWELS = "aeiou"
EYES, NOSES, MOUTHS = (re.escape(marks) for marks in ("=:;", "o-'", "()[]{|\\3DPdp"))

# Abbreviations: a period that belongs to them stays. Some are words when they are written small, some otherwise.
ABBREVIATIONS = (
    "adj adm adv ala al alex apr ariz assn assoc asst atty attys aug ave bhd bldg blvd brig bros calif capt cf cie cmdr"
    " col colo comdr conn corp cos co cpl ct dak dec dept det drs dr elec ens esq est etc ext feb fla fri ft ga gen govs"
    " gov hon inc ind insp intl invt jan jos jr jul jun kans kan ky lieut ltd lt maj mar md messrs mich minn mlle mme mon"
    " mont mo mrs mr msgr ms mt natl neb nev nov oct okla penn pfc ph plc pres profs prof pvt rd reps rep rev rt sens sen"
    " sept sep seq sfc sgt spc sq sr ste st supt sys tel tenn thurs thu treas tues tue univ va vs vt wed wisc wis wm wyo"
).split()
CAPITALISED = "Ark Az Del Ill La Mass Miss Ore Pa Tex Wash".split()
UNLESS_UPPER = "mfg mtg ppte ppty ptes pte ptys pty".split()
BEFORE_A_NUMBER = "art ca figs fig nos no op pp prop".split()
# Behind an initial, these begin a sentence, and the initial's period ends one.
SENTENCE_STARTS = (
    "A About According Additionally After An As At But Earlier He Her Here However If In It Last Many More Now Once One"
    " Other Our She Since So Some Such That The Their Then There These They This We What When While Yet You"
).split()
EXTENSIONS = (
    "bat bmp cgi class cpp c dll docx doc exe gif gz html htm h jar java jpeg jpg mov mp3 pdf php pl png ppt ps py sql tar"
    " txt wav xml x zip"
).split()


SENTENCE_START = "|".join([*SENTENCE_STARTS, *(word.upper() for word in SENTENCE_STARTS)])


def _any_case(words: list[str]) -> str:
    return "|".join("".join(f"[{c.upper()}{c}]" for c in word) for word in words)


_UPPER = "|".join(word.upper() for word in CAPITALISED)
ABBREVIATION = (
    rf"(?:{_any_case(ABBREVIATIONS)}|{'|'.join(CAPITALISED)}|{_UPPER}|"
    rf"{'|'.join(f'[{word[0].upper()}{word[0]}]{word[1:]}' for word in UNLESS_UPPER)})\."
)


def _symbol(character: str) -> str:
    """A character by itself, as the Treebank writes it; what the next step drops is one apostrophe."""
    return "'" if character in _QUOTES else _WRITTEN.get(character, character)


class Rule(NamedTuple):
    """One kind of token. What stands behind the group ``t`` must follow, counts as length, and is read again."""

    pattern: re.Pattern[str]
    write: Callable[[str], str]


def _as_it_is(text: str) -> str:
    return text


def _rule(pattern: str, write: Callable[[str], str] = _as_it_is) -> Rule:
    return Rule(re.compile(pattern), write)


def _joined(text: str) -> str:
    """One token with spaces in it: they become no-break spaces, at which BLEU and CIDEr split, and ROUGE does not."""
    return re.sub(r"[ \t\u2000-\u200a\u3000]", "\xa0", text)


def _round_brackets(text: str) -> str:
    return text.replace("(", "-lrb-").replace(")", "-rrb-")


def _telephone(text: str) -> str:
    return _round_brackets(_joined(text))


def _plain_apostrophe(text: str) -> str:
    return re.sub("[’\x92‘\x91‛]", "'", text)


RULES = (
    # can not, gon na
    _rule(r"(?P<t>[cC][aA][nN])[nN][oO][tT](?![A-Za-z])"),
    _rule(r"(?P<t>[gG][oO][nN]|[wW][aA][nN])[nN][aA](?![A-Za-z])"),
    _rule(r"(?P<t>[gG][oO][tT])[tT][aA](?![A-Za-z])"),
    _rule(r"(?P<t>[gG][iI][mM]|[lL][eE][mM])[mM][eE](?![A-Za-z])"),
    # Words.
    _rule(rf"(?P<t>{WORD})"),
    _rule(rf"(?P<t>{THING})"),
    # Words with an apostrophe.
    _rule(rf"(?P<t>{APOSTROPHE}[nN](?:{APOSTROPHE}|(?![A-Za-z])))"),
    # O'Brien, n'importe; but "I'm" and "Y'all" are two words
    _rule(rf"(?P<t>(?:(?![IY])[A-Z]|n){ANY_APOSTROPHE}{P}{{2,}})"),
    _rule(rf"(?P<t>(?i:[djl]){APOSTROPHE})"),
    _rule(rf"(?P<t>(?:{'|'.join(CUT_BEHIND)}){APOSTROPHE})(?!m)"),
    _rule(rf"(?P<t>{APOSTROPHE}(?:{'|'.join(CUT_BEFORE)}|{DECADE}))"),
    _rule(rf"(?P<t>[yY]{APOSTROPHE})(?:[A-Za-z])"),
    _rule(rf"(?P<t>(?i:c){ANY_APOSTROPHE}(?i:mon))"),
    _rule(rf"(?P<t>{'|'.join(word.replace(' ', APOSTROPHE) for word in CUT_INSIDE)})"),
    # do n't, dog 's
    _rule(rf"(?P<t>[A-Za-z{LETTER}]*?[A-MO-Za-mo-z])[nN]{ANY_APOSTROPHE}[tT]"),
    _rule(rf"(?P<t>[nN]{ANY_APOSTROPHE}[tT])", _plain_apostrophe),
    _rule(rf"(?P<t>{L}{LD}*){APOSTROPHE}(?:[msdMSD]|[rR][eE]|[vV][eE]|[lL][lL])(?![A-Za-z])"),
    _rule(r"(?P<t>'(?:[msdMSD]|[rR][eE]|[vV][eE]|[lL][lL]))(?:[^A-Za-z]|$)"),
    _rule(r"(?P<t>')[A-Za-z][^ \t\xa0]"),  # opens a quotation
    _rule(rf"(?P<t>{APOSTROPHE}(?:[msdMSD]|[rR][eE]|[vV][eE]|[lL][lL]))", _plain_apostrophe),
    _rule(r"(?P<t>'[tT])(?:[iI][sS]|[wW][aA][sS])"),
    _rule(rf"(?P<t>[A-Za-z]+(?i:[{VOWELS}y]){ANY_APOSTROPHE}(?:[{VOWELS}]|[A-Z])[A-Za-z]*)"),
    _rule(rf"(?P<t>{APOSTROPHE}{D}{D})(?:{SPACE}|$)"),
    # Periods that belong to a token.
    _rule(rf"(?P<t>{ACRONYM}\.)"),
    _rule(r"(?P<t>[A-Za-z]\.)"),
    _rule(rf"(?P<t>[A-Za-z])\.{SPACE}+(?!</){TAG}"),
    _rule(rf"(?P<t>[A-Za-z])\.{SPACE}+(?:{SENTENCE_START})(?:{SPACE}|$)"),
    _rule(rf"(?P<t>[pP][hH]\.[dD]\.|{ABBREVIATION})"),
    _rule(rf"(?P<t>(?:{_any_case(BEFORE_A_NUMBER)})\.){SPACE}?{D}"),
    _rule(rf"(?P<t>[A-Za-z0-9][A-Za-z0-9.,\xad]*(?:-(?:{ACRONYM}\.|[A-Za-z0-9\xad]+))+)"),
    _rule(rf"(?P<t>{LD}+(?:\.{LD}+)*\.(?:{'|'.join(EXTENSIONS)}))(?=[ \t\xa0.?!,]|$)"),
    # Before a comma it ends no sentence.
    _rule(rf"(?P<t>(?:{WORD}|{THING})\.)[,;:]"),
    # Numbers.
    _rule(rf"(?P<t>[-+]?{NUMBER})"),
    _rule(rf"(?P<t>(?:{SMALL}{GAP})?{SMALL}{SLASH}{SMALL})", _joined),
    # Telephone numbers: (555) 123-4567, 1-800-555-1234, 555.123.4567
    _rule(rf"(?P<t>{DIALLED}{D}{{3,4}}{GAP}?{D}{{3,5}})", _telephone),
    _rule(rf"(?P<t>(?:\+{{0,2}}{D}{{2,4}}\.)?{D}{{2,4}}\.{D}{{3,4}}\.{D}{{3,5}})"),
    _rule(r"(?P<t>[A-Z]*\$)"),
    # Combinations.
    _rule(rf"(?P<t>{COMPOUND}(?:\\?/{COMPOUND}){{1,2}})"),
    _rule(r"(?P<t>[A-Z]+(?:(?:[+&]|&amp;)[A-Z]+)+)", lambda text: text.replace("&amp;", "&")),
    _rule(r"(?P<t>[cC]\+\+|[cC]#)"),
    # The network.
    _rule(rf"(?P<t>[hH][tT][tT][pP][sS]?://{ADDRESS}{{2,}}{NO_STOP})"),
    _rule(rf"(?P<t>(?:{SITE}|{DOMAIN})(?:/{ADDRESS}{{2,}}{NO_STOP})?)"),
    _rule(rf"(?P<t><?[A-Za-z0-9]{ADDRESS}*@{LABEL}+(?:\.{LABEL}+)*>?)"),
    _rule(r"(?P<t>@[A-Za-z_][A-Za-z_0-9]*)"),
    _rule(rf"(?P<t>#{P}+)"),
    # Markup and faces.
    _rule(r"(?P<t><[!?][A-Za-z-][^>]*>)", _joined),
    _rule(rf"(?P<t>{TAG})", _joined),
    _rule(r"(?P<t>&(?:amp|lt|gt);)", lambda text: _ENTITIES[text[1:-1]]),
    _rule(r"(?P<t>&(?:quot|mdash|ndash|apos|nbsp);)", lambda text: "'"),
    _rule(r"(?P<t>&#[0-9]+;)"),
    _rule(rf"(?P<t>[<>]?[{EYES}][{NOSES}]?[{MOUTHS}])(?![A-Za-z0-9])", _round_brackets),
    _rule(r"(?P<t>\^_\^|-_-)"),
    # Runs that stay together.
    _rule(r"(?P<t>-{2,})", lambda text: "--"),
    _rule(r"(?P<t>\.\.\.|\. \. \.)", lambda text: "..."),
    _rule(r"(?P<t>[!?]{2,}|\\?\*+|#+|@+|_+|<<+|>>+|[²³¹⁰⁴-⁹₀-₉]+)"),
    _rule(rf"(?P<t>[^ \t\xa0{UNKNOWN}])", _symbol),
)  # fmt: skip

# Where a token may depend on more than what stands between two spaces.
_WIDE = re.compile(
    r"[\t\xa0\u1680\u2000-\u200a\u202f\u205f\u3000]|<|\. \. \.|[0-9]\)? +[(+]?[0-9]"
    rf"|(?<![A-Za-z])(?:[A-Za-z]|{'|'.join(BEFORE_A_NUMBER)})\. +[A-Z0-9]",
    re.IGNORECASE,
)
# No rule goes on over the space behind a plain word, and these six are all that are parted.
_PLAIN = re.compile("[A-Za-z]+(?= |$)")
_PARTED = frozenset("cannot gonna wanna gotta gimme lemme".split())
_INITIAL_AT_END = re.compile(rf"(?:.*[^A-Za-z0-9.])?[A-Za-z]\.{SPACE}*")
_STARTS_SENTENCE = re.compile(rf"(?:{SENTENCE_START})(?:{SPACE}|$)")


def split_captions(captions: Sequence[str]) -> list[list[str]]:
    """Tokens of each caption, lower case.

    Args:
        captions: in the order of the official program's lines, on which a few tokens depend: where a caption ends in a
            letter and a period, and the next begins with one of `SENTENCE_STARTS`, the period is none of the letter's.
    """
    tokens = [split_caption(caption) for caption in captions]
    for number, caption in enumerate(captions[:-1]):
        if _INITIAL_AT_END.fullmatch(caption) and _STARTS_SENTENCE.match(captions[number + 1]):
            tokens[number][-1] = tokens[number][-1].removesuffix(".")
    return tokens


def split_caption(caption: str) -> list[str]:
    """Tokens of one caption by itself, lower case.

    Args:
        caption: one line.
    """
    if _WIDE.search(caption):
        return _lex(caption)
    tokens: list[str] = []
    for part in caption.split(" "):
        tokens += _part(part)
    return tokens


@lru_cache(maxsize=1 << 17)
def _part(text: str) -> list[str]:
    """Of a caption, what stands between two spaces; the same words come again and again."""
    return _lex(text)


def forget() -> None:
    """Empties the memory of words: benchmarks start without it."""
    _part.cache_clear()


def _lex(text: str) -> list[str]:
    shadow = text if text.isascii() else "".join([c if c.isascii() else _class_of(c) for c in text])
    position, end = 0, len(shadow)
    tokens = []
    while position < end:
        if shadow[position] <= " " or shadow[position] in "\x7f\xa0":
            position += 1
            continue
        if (plain := _PLAIN.match(shadow, position)) and (word := plain[0].lower()) not in _PARTED:
            tokens.append(word)
            position = plain.end()
            continue
        longest, stop = -1, position + 1
        write: Callable[[str], str] = _as_it_is
        for rule in RULES:
            found = rule.pattern.match(shadow, position)
            if found and found.end() > longest:
                longest, stop, write = found.end(), found.end("t"), rule.write
        if token := write(text[position:stop]).lower().replace("\xad", ""):
            tokens.append(token)
        position = stop
    return tokens
