"""plumbing/grading/spelling.py - one spelling for what is written in many ways.

"\\dfrac{1}{2}", "½" and "\\frac12 \\text{ cm}" all become "\\frac{1}{2}". This file works on text alone. The
only numbers that it computes are periodic decimals. Most of the work is done by the table of regular
expressions in forms.txt. The words that may stand behind a number are in units.txt.
"""

import re
from functools import lru_cache
from pathlib import Path

from plumbing.grading.formula import FUNCTIONS, GROUP

TEXT = (r"\\(?:text|mbox|hbox|textnormal|textbf|textit|textrm|textsf|texttt|emph|mathrm|mathbf|mathit|mathsf|"
        r"mathtt|boldsymbol|bm|bold|underline|operatorname|bf|rm|ensuremath|fbox)\s*")
SCRIPTS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁻ⁿ₀₁₂₃₄₅₆₇₈₉", "0123456789-n0123456789")
WORD = re.compile("[a-zA-Z]+")
NUMERAL = re.compile(r"(?i)\b(?:zero|one|two|three|four|five|six|seven|eight|nine|ten|eleven|twelve|\w+teen|"
                     r"twenty|thirty|forty|fifty|sixty|seventy|eighty|ninety|hundred|thousand|half)s?\b")
EXPONENT = r"(?:\s*\^\s*(?:-?\d|\{-?\d\}))?"
UNIT = re.compile(rf"(?:[\s/]|\\cdot)*{TEXT}({GROUP}){EXPONENT}")
# A unit between two numbers stays. Otherwise 5\text{ feet }\frac12 would become the mixed number 5\frac12. And
# 2\mathrm{sin}x is no 2x.
UNITS_IN_TEXT = re.compile(rf"(?:(?<=[\d}})])|(?<=\\pi))\s*{TEXT}{GROUP}{EXPONENT}(?:{UNIT.pattern})*"
                           r"(?!\s*(?:[\da-zA-Z(]|\\d?frac))")
# A choice such as (B) or \text{B}, behind which a word is no unit: \text{B}\text{C} is not B with the unit C.
CHOICE = re.compile(rf"^[\s{{(]*[A-H][).:]*[\s}}]*$|{TEXT}\{{[^{{}}\d]*\}}[\s}}]*$")
BARE_UNIT = re.compile(rf"(?:(?<=[\d}}])|(?<=\\pi )) *([a-zA-Z][a-zA-Z /.]*){EXPONENT}\s*\.?$")
# Words of a gold answer that change its number: 7\text{ tenths} is not 7. (41\text{ fourth graders} are 41.)
CHANGES_NUMBER = re.compile("halves|thirds|(?:four|fif|six|seven|eigh|nin|ten|hundred|thousand)ths|"
                            "dozens?|tens|squared|cubed|below|less|minus|twice|otherwise|remainder")
BEFORE_UNITS = {"square", "cubic", "sq", "cu", "different", "distinct", "possible", "real", "positive",
                "lattice", "additional"}
AMONG_UNITS = {"per", "the", "squared", "cubed", "total", "left", "remaining", "each", "old", "long", "tall",
               "wide", "high", "deep", "away", "cdot", *BEFORE_UNITS}


def periodic(match):
    """0.91\\overline{6} as \\frac{825}{900}."""
    whole = match[1] or "0"
    start = match[2]
    period = re.sub(r"\D", "", match[3])
    nines = (10 ** len(period) - 1) * 10 ** len(start)
    return r"\frac{%d}{%d}" % (int(whole + start + period) - int(whole + start), nines)


def read_table(name):
    """The lines of a table in this folder, without comments, part by part. "# ===" begins a new part."""
    parts = re.split("\n# ===.*", (Path(__file__).parent / name).read_text(encoding="utf-8"))
    return [[line for line in part.split("\n") if line and not line.startswith("# ")] for part in parts]


def form(line):
    """A line of forms.txt as a pattern and its replacement."""
    pattern, new = line.split("\t")
    for name, value in (("TEXT", TEXT), ("GROUP", GROUP), ("FUNCTIONS", FUNCTIONS)):
        pattern = pattern.replace(name, value)
    return re.compile(pattern), globals()[new[1:]] if new[:1] == "@" else new


UNITS = {word for line in read_table("units.txt")[0] for word in line.split()}
# "KWH" and "usd" count as units, too. Words of two letters keep their case: "PA" is not "Pa".
UNITS |= {word.lower() for word in UNITS if len(word) > 2}
SIGNS, FORMS = ([form(line) for line in part] for part in read_table("forms.txt"))


def spell_pair(answer, gold):
    """An answer and the gold answer in one spelling. Words of a \\text{} in the gold answer are units."""
    texts = re.findall(rf"{TEXT}\{{([^{{}}]*)\}}", gold)
    words = {word.lower() for text in texts for word in WORD.findall(text) if len(word) > 2}
    nouns = frozenset(word for word in words - {"and", "not"} if not CHANGES_NUMBER.fullmatch(word))
    units = {re.sub("e?s?$", "", re.sub(rf"{TEXT}|[\s{{}}~.,]", "", match[0]).lower())
             for match in UNITS_IN_TEXT.finditer(gold)}
    if len(units - {"and", "or"}) > 1:  # 3 wins, 2 losses: the words say which number is which, so they stay
        return spell(answer, None, bare_units="none"), spell(gold, None, bare_units="none")
    gold = spell(gold, nouns, bare_units="spaced")
    # "5 m" may be five metres, or a product. If the gold answer has letters, it is taken for a product.
    has_letters = re.search("[a-zA-Z]", re.sub(r"\\[a-zA-Z]+", "", gold))
    return spell(answer, nouns, bare_units="none" if has_letters else "all"), gold


@lru_cache(maxsize=10_000)
def spell(text, nouns, bare_units):
    """One spelling of an answer.

    nouns: more words that count as units, from the gold answer. None: no units in \\text are removed.
    bare_units: which units without \\text are removed behind a number. "all": in "5cm", "5 cm" and "5 m".
    "spaced": only in "5 cm". "none": nowhere.
    """
    if text.isascii() and text.isdigit():  # isascii, because "5²".isdigit() is True
        return text
    if "\\begin" not in text:
        text = re.sub(r"\\\\(?=[a-zA-Z])", r"\\", text)  # \\frac is \frac; but \\ ends a matrix row
    text = replace(text.strip(), SIGNS).translate(SCRIPTS)
    if bare_units == "all":  # there is no letter in the gold answer, so 2e-3 is 0.002, and not 2e - 3
        text = re.sub(r"(?<![\w.])(\d+\.?\d*)[eE]\+?(-?\d+)(?!\w)", r"\1\\cdot10^{\2}", text)
    if nouns is not None:
        text = UNITS_IN_TEXT.sub(lambda match: without_units(match, nouns), text)
    bare = BARE_UNIT.search(text)
    if bare and bare_units != "none" and is_bare_unit(bare, nouns, bare_units == "all"):
        text = text[:bare.start()]
    text = replace(text, FORMS)
    if not re.search(r"\\(?:sin|cos|tan|cot|sec|csc)(?![a-z])", text):
        text = text.replace("\\degree", "")  # a unit, but not in \sin 30^\circ
    text = re.sub(r"\s+", " ", text).strip().rstrip("\\ ")
    if not re.search(r"[(\[]|\\\{", text):  # 1,234 is a number, but (1,234) is a pair
        text = re.sub(r"(?<![\d.,])[1-9]\d{0,2}(?:,\d{3})+(?!\d|,\d)", lambda m: m[0].replace(",", ""), text)
    text = re.sub(r"(?<![.,]) ?[.,;][\\ ]*$", "", text).strip()
    while re.fullmatch(GROUP, text):
        text = text[1:-1].strip()
    return text


def replace(text, forms):
    """Applies (pattern, replacement) pairs in order."""
    for pattern, new in forms:
        text = pattern.sub(new, text)
    return text


def is_unit(text, nouns):
    """Whether a text is a unit, as "miles per hour" or "kg\\cdot m". Nouns of the gold answer count as units.

    Words behind "of" may be any but numerals: "cups of flour".
    """
    start, _, rest = text.partition(" of ")
    if NUMERAL.search(rest):  # "percent of sixty" is another number
        return False
    words = WORD.findall(start)
    while words and words[0] in BEFORE_UNITS:
        words = words[1:]
    if not words or re.search(r"(?<!\^)(?<!\^\{)(?<!-)\d", text):
        return False
    known = [is_known(word, nouns) for word in words]
    # "15 left", "15 apples each", "\$15 per hour"
    may_begin = known[0] or words[0] in ("each", "left", "remaining") or words[0] == "per" and len(words) > 1
    return may_begin and all(known or word in AMONG_UNITS for known, word in zip(known, words))


def is_known(word, nouns):
    """Whether a word or its singular is a unit or one of the nouns. Case counts in short words: "m", "Pa"."""
    names = {word, word.lower(), word.lower().removesuffix("s")} if len(word) > 2 else {word}
    return bool(names & UNITS or names & nouns)


def without_units(match, nouns):
    """A text such as "\\text{ kg}\\cdot\\text{m} ..." without the units with which it begins."""
    text = match[0]
    if CHOICE.search(match.string, 0, match.start()):
        return text
    while (unit := UNIT.match(text)) and is_unit(unit[1], nouns):
        text = text[unit.end():]
    return " " + text


def is_bare_unit(match, nouns, is_any):
    """Whether the words at the end of an answer, as in "5 cm", are units.

    is_any: also in "5cm", and in "5 m" for a few letters.
    """
    first = WORD.match(match[1])[0]
    has_space = match[0][0] == " "
    is_fit = has_space or is_any
    if len(first) == 1:
        is_fit = has_space and is_any and first in "mghsLJNWV"
    return is_fit and is_unit(match[1], nouns)
