"""plumbing/grading/spelling.py - one spelling for what is written in many ways.

"\\dfrac{1}{2}", "½" and "\\frac12 \\text{ cm}" all become "\\frac{1}{2}". Everything here is text to text, by
regular expressions whose time is linear in a text of at most MAX_ANSWER characters. Nothing is computed but
periodic decimals.

Order matters: signs of Unicode first, then spaces, words behind numbers, fonts, and last the fractions.
"""

import re
import unicodedata
from pathlib import Path

from plumbing.grading.formula import FUNCTIONS

# Characters that are another name for LaTeX.
PLAIN = str.maketrans({
    **dict.fromkeys("−–‒‑﹣－", "-"), **dict.fromkeys("°º˚∘", "^\\circ "), **dict.fromkeys("％¢£€¥₹\"", " "),
    **dict.fromkeys("·⋅∗", r" \cdot "), **dict.fromkeys("\u200b\u2060\ufeff\u200e\u00a0\u202f\u2009", " "),
    **dict(zip("÷⁄∕，；：（）＝＜＞＋∣", "///,;:()=<>+|")),
    **{character: rf"\{name} " for character, name in zip(
        "π∞×≤⩽≥⩾≠±∓∪∩∅∈θαβγδλμφωΔ∖", (
            "pi infty times le le ge ge ne pm mp cup cap emptyset in theta alpha beta gamma delta lambda mu phi "
            "omega Delta setminus").split())},
    "ℝ": r"\mathbb{R}", "ℤ": r"\mathbb{Z}"})
POWERS, INDICES = "⁰¹²³⁴⁵⁶⁷⁸⁹⁻ⁿ", "₀₁₂₃₄₅₆₇₈₉"

COMMANDS = {  # new name: the old names
    r"\frac": "dfrac|tfrac|cfrac", r"\binom": "dbinom|tbinom", r"\le ": "leq|leqslant|leqq",
    r"\ge ": "geq|geqslant|geqq", r"\ne ": "neq", "<": "lt", ">": "gt", r"\emptyset": "varnothing",
    r"\{": "lbrace", r"\}": "rbrace", "[": "lbrack", "]": "rbrack", "|": "[lr]?vert|mid", r"\cup": "bigcup",
    r"\setminus": "backslash|smallsetminus", r"\pi ": "uppi", r"\cdot ": "cdotp|ast", r"\infty ": "infin",
    r"\\ ": "cr", " or ": "lor|vee", " and ": "land|wedge", " ": "quad|qquad|enspace|thinspace",
    "": r"left|right|middle|[bB]igg?[lrm]?|displaystyle|textstyle|limits|large|Large|huge|bf(?!\{)|rm(?!\{)"}
TEXT = (r"\\(?:text|mbox|hbox|textnormal|textbf|textit|textrm|textsf|texttt|emph|mathrm|mathbf|mathit|mathsf|"
        r"mathtt|boldsymbol|bm|bold|underline|operatorname|bf|rm|ensuremath)\s*")
GROUP = r"\{(?:[^{}]|\{[^{}]*\})*\}"
ARGUMENT = rf"(\d|[a-zA-Z]|\\pi(?![a-zA-Z])|{GROUP})"
LARGE = dict(hundred=2, thousand=3, million=6, billion=9, trillion=12)
EXPONENT = r"(?:\s*\^\s*(?:-?\d|\{-?\d\}))?"
WORD = re.compile("[a-zA-Z]+")


def read_units():
    """The words of units.txt, which may stand behind a number."""
    text = (Path(__file__).parent / "units.txt").read_text(encoding="utf-8")
    return {word for line in text.splitlines() if not line.startswith("#") for word in line.split()}


UNITS = read_units()
BEFORE_UNITS = {"square", "cubic", "sq", "cu"}
AMONG_UNITS = {"per", "of", "the", "squared", "cubed", "total", "left", "remaining", "cdot", "circ", *BEFORE_UNITS}


def is_unit(text, nouns=()):
    """Whether all words of a text are units, or nouns of the gold answer: "miles per hour", "kg\\cdot m"."""
    words = WORD.findall(text)
    while words and words[0] in BEFORE_UNITS:
        words = words[1:]
    known = [is_known(word, nouns) for word in words]
    return bool(known) and known[0] and all(k or w in AMONG_UNITS for k, w in zip(known, words)) and not re.search(
        r"(?<!\^)(?<!\^\{)(?<!-)\d", text)


def is_known(word, nouns):
    """Whether a word, or what it is the plural of, is a unit or a noun of the gold answer."""
    names = (word, word.lower(), word.lower().removesuffix("s")) if len(word) > 2 else (word,)
    return any(name in UNITS or name in nouns for name in names)


def periodic(whole, start, period):
    """"0", "91" and "6" of 0.91666... as a fraction."""
    nines = (10 ** len(period) - 1) * 10 ** len(start)
    numerator = int((whole or "0") + start + period) - int((whole or "0") + start)
    return r"\frac{%d}{%d}" % (numerator, nines)


def vulgar(match):
    """½ as \\frac{1}{2}."""
    numerator, denominator = unicodedata.normalize("NFKC", match[0]).split("⁄")
    return rf"\frac{{{numerator}}}{{{denominator}}}"


def open_interval(match):
    """]1,3] as (1,3], and [1,3[ as [1,3)."""
    left, inside, right = match.groups()
    if (left, right) == ("[", "]"):
        return match[0]
    return ("(" if left == "]" else "[") + inside + (")" if right == "[" else "]")


def braced(match):
    """\\frac12 as \\frac{1}{2}."""
    return "\\" + match[1] + "".join(x if x[0] == "{" else "{" + x + "}" for x in match.groups()[1:])


SIGNS = (
    (r"[¼-¾⅐-⅞]", vulgar),
    (r"√\s*(\d+)", r"\\sqrt{\1}"),
    (r"√", r"\\sqrt "),
    (rf"[{POWERS}]+", lambda m: "^{" + "".join("0123456789-n"[POWERS.index(c)] for c in m[0]) + "}"),
    (rf"[{INDICES}]+", lambda m: "_{" + "".join(str(INDICES.index(c)) for c in m[0]) + "}"),
    (r"\\\\\s*\[[\d.]*\s*(?:pt|em|ex|mm|cm)\]", r"\\\\ "),  # a matrix row's extra space
    (r"(?<!\\)\\[\[\]()]", ""),  # the brackets of display mathematics
    (r"(?<=\d)(?:\{,\}(?:\\!)?|\\text\{,\}|,\\!)\s*(?=\d{3}(?!\d))", ""),  # commas that can only be thousands
    (r"(?<=\d)\\[,;]\s*(?=\d{3}(?!\d))", ""),  # and spaces that can only be
    (r"\{([:,])\}", r"\1"),
    (r"\\(?:left|right)\s*\.", ""),
    *((rf"\\(?:{old})(?![a-zA-Z])", lambda m, new=new: new) for new, old in COMMANDS.items()),
    (r"\\!\s*", ""),
    (r"(?<!\\)\\[,;:> ]|~", " "),
    (r"<=", r"\\le "),
    (r">=", r"\\ge "),
    (r"!=|\\not\s*=", r"\\ne "),
    (r"\*\*", "^"),
    (r"\\\{\s*\\\}", r"\\emptyset"),
    (r"\\mathbb\s*([RZ])(?![a-zA-Z])", r"\\mathbb{\1}"),
    (r"\\textcolor\s*\{[^{}]*\}|\\color\s*\{[^{}]*\}", ""),
    (r"\\(?:pounds|euro|yen|texteuro|textdollar|textsterling|mathsterling)(?![a-zA-Z])|\bRs\.? ?(?=\d)", ""),
    (r"\{\s*\\(?:rm|bf|it|sf|tt|text|mathrm)\s+([^{}]*)\}", r"\\text{\1}"),
    (rf"\\frac\s*\{{({TEXT}\{{[^{{}}]*\}})\}}\{{({TEXT}\{{[^{{}}]*\}})\}}", r"\1/\2"),  # a unit of two
    (rf"(?<=\d)\s*(?:\^\s*)?\{{?\s*(?:\^\s*)?\\(?:circ|degree)\s*\}}?\s*(?:{TEXT}\{{\s*[CF]\s*\}}|[CF])\s*$", ""),
    (r"\\?[$%]", ""),
    (r"\^\s*\{\s*\\(?:circ|degree)\s*\}|\{\s*\^\s*\\circ\s*\}|\^\s*\\circ(?![a-zA-Z])", r"\\degree "),
    (r"\\(?:circ|textdegree)(?![a-zA-Z])", r"\\degree "),
)
FORMS = (
    (TEXT + rf"\{{((?:[^{{}}]|\{{[^{{}}]*\}})*)\}}", r"\1"),
    (TEXT + r"\{([^{}]*)\}", r"\1"),  # once more: they nest
    (rf"(?<![\\a-zA-Z])({'|'.join(FUNCTIONS)}|sqrt|pi|infty|infinity|frac)(?![a-zA-Z])", r"\\\1"),
    (r"\\infinity", r"\\infty"),
    (r"\{([a-zA-Z])\}(?=\s*[_^])", r"\1"),
    (r"\+\s*(?=\\infty)", ""),
    (rf"\\(frac|binom)\s*{ARGUMENT}\s*{ARGUMENT}", braced),
    (r"([\[\]])([^\[\](),]+,[^\[\](),]+)([\[\]])", open_interval),
    (r"(?<![\d.}_^])(\d+)\s*(\\frac\{\d+\}\{\d+\})", r"(\1+\2)"),  # mixed numbers
    (r"(?<![\d./])(\d+) (\d+/\d+)(?![\d/])", r"(\1+\2)"),
    (r"(?<![\w.])(\d+(?:\.\d+)?)[eE]([-+]?\d+)(?!\w)", r"\1\\cdot10^{\2}"),
    (r"(?<![\d.])(\d*)\.(\d*)\\(?:overline|bar)\s*\{?(\d+)\}?", lambda m: periodic(*m.groups())),
    (r"(?<![\d.])(\d*)\.(\d*)\((\d+)\)", lambda m: periodic(*m.groups())),
    (r"(?<![\d.])(\d*)\.(\d*)((?:\\dot *\{?\d\}?)(?:\d*\\dot *\{?\d\}?)?)",
     lambda m: periodic(m[1], m[2], re.sub(r"\D", "", m[3]))),
    (r"^\s*(?:\\approx|=)", ""),
)
SIGNS = [(re.compile(pattern), new) for pattern, new in SIGNS]
FORMS = [(re.compile(pattern), new) for pattern, new in FORMS]
LARGE_NUMBER = re.compile(
    rf"(?<=[\d.])\s*({TEXT}\{{)?\s*({'|'.join(LARGE)})\b *([a-zA-Z ]*)(?(1)\}})")  # 15\text{ million dollars}
UNIT_GROUP = re.compile(rf"(?:[\s/]|\\cdot)*{TEXT}({GROUP}){EXPONENT}")
UNIT_GROUPS = re.compile(rf"(?:(?<=[\d}})])|(?<=\\pi))\s*{TEXT}{GROUP}{EXPONENT}(?:{UNIT_GROUP.pattern})*")
BARE_UNIT = re.compile(rf"(?:(?<=[\d}}])|(?<=\\pi )) *([a-zA-Z][a-zA-Z /.]*){EXPONENT}\s*\.?$")


def spell_pair(answer, gold):
    """An answer and the gold answer in one spelling. Nouns of the gold answer may stand in the answer, too."""
    texts = re.findall(rf"{TEXT}\{{([^{{}}]*)\}}", gold)
    nouns = {word.lower() for text in texts for word in WORD.findall(text) if len(word) > 2} - {"and", "not"}
    gold = spell(gold, nouns, 3)
    # "5m" in mathematics may be a product. It is one where the gold answer has letters.
    has_letters = re.search("[a-zA-Z]", re.sub(r"\\[a-zA-Z]+", "", gold))
    return spell(answer, nouns, 99 if has_letters else 2), gold


def spell(text, nouns=(), min_letters=3):
    """One spelling of an answer. The nouns count as units. So do units without \\text and of min_letters."""
    text = replace_all(text.strip().translate(PLAIN), SIGNS)
    if "\\begin" not in text:
        text = re.sub(r"\\\\(?=[a-zA-Z])", r"\\", text)  # \\frac for \frac; in a matrix it ends a row
    text = LARGE_NUMBER.sub(lambda m: rf"\cdot 10^{{{LARGE[m[2]]}}} {m[3]}", text)
    text = UNIT_GROUPS.sub(lambda m: without_units(m[0], nouns), text)
    bare = BARE_UNIT.search(text)
    if bare and is_bare_unit(bare, nouns, min_letters):
        text = text[:bare.start()]
    text = replace_all(text, FORMS)
    if not re.search(r"\\(?:sin|cos|tan|cot|sec|csc)(?![a-z])", text):
        text = text.replace("\\degree", "")  # as units are; in \sin 30^\circ it counts
    text = without_commas(re.sub(r"\s+", " ", text)).strip().rstrip("\\ ")
    text = re.sub(r"(?<![.,]) ?[.,;][\\ ]*$", "", text).strip()
    while len(text) > 1 and text[0] == "{" and closing(text, 0) == len(text) - 1:
        text = text[1:-1].strip()
    return text


def without_units(text, nouns):
    """What is left of "\\text{ kg}\\cdot\\text{m} ..." without the units it begins with."""
    while (group := UNIT_GROUP.match(text)) and is_unit(group[1], nouns):
        text = text[group.end():]
    return " " + text


def is_bare_unit(match, nouns, min_letters):
    """Whether the words that end an answer, as in "5 cm", are units. A single letter needs a space, and a gold
    answer without letters."""
    first = WORD.match(match[1])[0]
    is_single = len(first) == 1
    if is_single and (min_letters > 2 or first not in "mghsLJNWV" or match[0][0] != " "):
        return False
    if not is_single and (len(first) < min_letters or min_letters == 3 and match[0][0] != " "):
        return False
    return is_unit(match[1], nouns)


def replace_all(text, rewrites):
    """Applies (pattern, replacement) pairs in order."""
    for pattern, new in rewrites:
        text = pattern.sub(new, text)
    return text


def without_commas(text):
    """1,234,567 as 1234567 where it stands in no bracket: (1,234) is a pair."""
    depth, depths = 0, []
    for i, c in enumerate(text):
        is_opening = c in "([" or text[i - 1:i + 1] == "\\{"
        is_closing = c in ")]" or text[i - 1:i + 1] == "\\}"
        depth += is_opening - is_closing
        depths.append(depth)
    return re.sub(r"(?<![\d.,])([1-9]\d{0,2}(?:,\d{3})+)(?!\d|,\d)",
                  lambda m: m[0] if depths[m.start()] else m[0].replace(",", ""), text)


def closing(text, start, opening="([{", ending=")]}"):
    """Where the bracket opened at `start` closes, or -1. Any two kinds match, for intervals may be half-open."""
    depth = 0
    for i in range(start, len(text)):
        depth += (text[i] in opening) - (text[i] in ending)
        if depth == 0:
            return i
    return -1


def split_top(text, pattern):
    """The stripped parts between matches of a pattern that stand outside all brackets."""
    parts, start, depth, i = [], 0, 0, 0
    separator = re.compile(pattern)
    while i < len(text):
        depth += (text[i] in "([{") - (text[i] in ")]}")
        match = separator.match(text, i) if depth == 0 else None
        if match:
            parts.append(text[start:i].strip())
            i = start = match.end()
        else:
            i += 1
    return [*parts, text[start:].strip()]
