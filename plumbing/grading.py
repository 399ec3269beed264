"""plumbing/grading.py - is this answer equal to that one?

The verdict is the training reward, so a wrong one teaches something false. Three stages, cheapest first: one
spelling for what is written in many ways (`normalize`), exact fractions (`number`) and structure (lists,
tuples, intervals, matrices, relations), and last computer algebra, in worker processes that may be killed:
text by a model never meets sympy in the training process. math-verify's parser reads LaTeX; the comparison is
our own (see is_same_expression).

    python -m plumbing.grading answers.jsonl verdicts.jsonl    # rows of "gold" and "response"
    python -m plumbing.grading                                 # a worker: one question per line of its input

This file does without torch: a worker starts in a second and takes little memory.
"""

import argparse
import ast
import atexit
import json
import operator
import os
import queue
import random
import re
import subprocess
import sys
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction


def extract_answer(response):
    """What stands in the last \\boxed{...} with balanced braces, or None: no box, one unclosed or endless."""
    start = max(response.rfind("\\boxed{"), response.rfind("\\boxed {"))
    if start < 0:
        return None
    start = response.index("{", start)
    end = closing(response[:start + MAX_ANSWER + 2], start, "{", "}")
    return None if end < 0 else response[start + 1:end]


MAX_ANSWER = 1000  # characters of an answer worth reading

# The spelling table. First single characters, then LaTeX commands that are another name (or none) for the
# same thing, then REWRITES, regular expressions applied in order; each says what it is for.
PLAIN = str.maketrans({
    **dict.fromkeys("−–‒‑﹣－", "-"), **dict.fromkeys("°º˚∘％¢£€¥₹\"", " "), **dict.fromkeys("·⋅∗", r" \cdot "),
    **dict.fromkeys("\u200b\u2060\ufeff\u200e\u00a0\u202f\u2009", " "),
    **dict(zip("÷⁄∕，；：（）＝＜＞＋", "///,;:()=<>+")),
    **{c: rf"\{name} " for c, name in zip(
        "π∞×≤⩽≥⩾≠±∓∪∅∈θαβγλφω", ("pi infty times le le ge ge ne pm mp cup emptyset in "
                                 "theta alpha beta gamma lambda phi omega").split())},
    **{c: rf"\frac{{{a}}}{{{b}}}" for c, a, b in ("½12", "⅓13", "⅔23", "¼14", "¾34", "⅕15", "⅛18", "⅙16")},
    "ℝ": r"\mathbb{R}"})
POWERS, INDICES = "⁰¹²³⁴⁵⁶⁷⁸⁹⁻", "₀₁₂₃₄₅₆₇₈₉"
COMMANDS = {  # new name (or text): old names
    r"\frac": "dfrac|tfrac|cfrac", r"\le ": "leq|leqslant|leqq", r"\ge ": "geq|geqslant|geqq", r"\ne ": "neq",
    "<": "lt", ">": "gt", r"\emptyset": "varnothing", r"\{": "lbrace", r"\}": "rbrace", r"\cup": "bigcup",
    r"\\ ": "cr", " ": "quad|qquad",
    "": r"left|right|[bB]igg?[lr]?|displaystyle|textstyle|limits|large|Large|huge|bf(?!\{)|rm(?!\{)"}
FUNCTIONS = "arcsin|arccos|arctan|sin|cos|tan|cot|sec|csc|log|ln|exp|sinh|cosh|tanh|sqrt|max|min"
WRAPPERS = (
    r"\\(?:text|mbox|hbox|textnormal|textbf|textit|textrm|textsf|texttt|emph|mathrm|mathbf|mathit|mathsf|"
    r"mathtt|boldsymbol|bm|bold|underline|operatorname|bf|rm|ensuremath)\s*")
UNITS = (
    "degrees?|miles?|hours?|minutes?|seconds?|days?|weeks?|months?|years?|cents?|dollars?|inch(?:es)?|feet|"
    "foot|yards?|meters?|metres?|cm|mm|km|m|kg|grams?|g|pounds?|lbs?|ounces?|liters?|units?|square|cubic|"
    "per|mph|percent|people|ways")
NOT_UNITS = (r"\s*(?:or|and|not|is|are|does|do|wrong|plus|minus|squared|cubed|divided|factorial|halves|"
             r"thirds|quarters|tenths|million|billion|trillion|thousand|hundred|dozen|"
             r"[a-fi-ln-rt-zA-Z](?![a-zA-Z.]))\b")  # text behind a number that changes it
AFTER_NUMBER = r"(?:(?<=[\d})])|(?<=\\pi)|(?<=\\pi ))\s*"
SQUARED = r"(?:\s*\^\s*(?:\d|\{\d\}))?"
GROUP = r"\{(?:[^{}]|\{[^{}]*\})*\}"
ARGUMENT = rf"(\d|[a-zA-Z]|\\pi(?![a-zA-Z])|{GROUP})"
REWRITES = [(re.compile(pattern), new) for pattern, new in (
    (r"√\s*(\d+)", r"\\sqrt{\1}"),
    (r"√\s*\(([^()]*)\)", r"\\sqrt{\1}"),
    (r"√", r"\\sqrt"),
    (rf"[{POWERS}]+", lambda m: "^{" + "".join("0123456789-"[POWERS.index(c)] for c in m[0]) + "}"),
    (rf"[{INDICES}]+", lambda m: "_{" + "".join(str(INDICES.index(c)) for c in m[0]) + "}"),
    (r"\\\\\s*\[[\d.]*\s*(?:pt|em|ex|mm|cm)\]", r"\\\\ "),  # a matrix row's extra space
    (r"(?<!\\)\\[\[\]()]", ""),  # the brackets of display mathematics
    (r"(?<=\d)(?:\{,\}(?:\\!)?|\\text\{,\}|,\\!)\s*(?=\d{3}(?!\d))", ""),  # commas that can only be thousands
    (r"(?<=\d)\\[,;]\s*(?=\d{3}(?!\d))", ""),  # and spaces that can only be
    (r"\\\\(?=[a-zA-Z])", r"\\"),  # \\frac for \frac
    (r"\\(?:left|right)\s*\.", ""),
    *((rf"\\(?:{old})(?![a-zA-Z])", lambda m, new=new: new) for new, old in COMMANDS.items()),
    (r"\\!\s*", ""),
    (r"(?<!\\)\\[,;:> ]|~", " "),
    (r"<=", r"\\le "),
    (r">=", r"\\ge "),
    (r"!=|\\not\s*=", r"\\ne "),
    (r"\\\{\s*\\\}", r"\\emptyset"),
    (r"\\mathbb\s*R(?![a-zA-Z])", r"\\mathbb{R}"),
    (r"\^\s*(?:\{\s*\\(?:circ|degree)\s*\}|\\circ(?![a-zA-Z]))|\{\s*\^\s*\\circ\s*\}", ""),  # degrees
    (r"\\(?:degree|circ|textdegree)(?![a-zA-Z])", ""),
    (r"\\?[$%]", ""),
    (AFTER_NUMBER + rf"\\(?:text|mbox|hbox|textnormal|textrm|mathrm)\s*\{{(?!{NOT_UNITS})[a-zA-Z ./()-]*\}}"
     + SQUARED, " "),
    (WRAPPERS + r"\{((?:[^{}]|\{[^{}]*\})*)\}", r"\1"),
    (WRAPPERS + r"\{([^{}]*)\}", r"\1"),  # once more: they nest
    (AFTER_NUMBER + rf"(?:(?:{UNITS})\b\s*/?\s*)+" + SQUARED + r"\s*$", ""),
    (rf"(?<![\\a-zA-Z])({FUNCTIONS}|pi|infty|frac)(?![a-zA-Z])", r"\\\1"),
    (r"\\sqrt\s*\(([^()]*)\)", r"\\sqrt{\1}"),
    (r"\\sqrt\s*(\d|[a-zA-Z](?![a-zA-Z]))", r"\\sqrt{\1}"),
    (r"(\\sqrt\s*\[\w\])\s*(\w)", r"\1{\2}"),
    (r"\+\s*(?=\\infty)", ""),
    (rf"\\frac\s*{ARGUMENT}\s*{ARGUMENT}",
     lambda m: r"\frac" + "".join(x if x[0] == "{" else "{" + x + "}" for x in m.groups())),
    (r"\^\s*(\\frac\{[^{}]*\}\{[^{}]*\})", r"^{\1}"),
    (r"(?<![\d.}_^])(\d+)\s*(\\frac\{\d+\}\{\d+\})", r"(\1+\2)"),  # mixed numbers
    (r"(?<![\d./])(\d+) (\d+/\d+)(?![\d/])", r"(\1+\2)"),
    (r"(?<![\w.])(\d+(?:\.\d+)?)[eE]([-+]?\d+)(?!\w)", r"\1\\cdot10^{\2}"),
    (r"(\d*)\.(\d*)\\(?:overline|bar)\s*\{?(\d+)\}?", lambda m: repeating(*m.groups())),
    (r"^\s*(?:\\approx|=)", ""),
)]


def repeating(whole, start, period):
    """0.91 overline 6 as a fraction."""
    nines = (10 ** len(period) - 1) * 10 ** len(start)
    return r"\frac{%d}{%d}" % (int((whole or "0") + start + period) - int((whole or "0") + start), nines)


def thousands(text):
    """Takes out the commas of 1,234,567 where they stand in no bracket: (1,234) is a pair."""
    depth, depths = 0, []
    for i, c in enumerate(text):
        depth += (c in "([" or text[i - 1:i + 1] == "\\{") - (c in ")]" or text[i - 1:i + 1] == "\\}")
        depths.append(depth)
    return re.sub(r"(?<![\d.,])([1-9]\d{0,2}(?:,\d{3})+)(?!\d|,\d)",
                  lambda m: m[0] if depths[m.start()] else m[0].replace(",", ""), text)


def normalize(text):
    """One spelling for what is written in many ways: signs, spacing, sizes, fractions, units, $ and %,
    thousands, a final period. Linear in the length of the text, which the caller has bounded."""
    text = text.strip().translate(PLAIN)
    for pattern, new in REWRITES:
        text = pattern.sub(new, text)
    text = thousands(re.sub(r"\s+", " ", text)).strip().rstrip("\\ ")
    text = re.sub(r"(?<![.,]) ?[.,;][\\ ]*$", "", text).strip()
    while len(text) > 1 and text[0] == "{" and closing(text, 0) == len(text) - 1:
        text = text[1:-1].strip()
    return text


def closing(text, start, opening="([{", ending=")]}"):
    """Where the bracket opened at `start` closes, or -1. Any two kinds match: intervals are half-open."""
    depth = 0
    for i in range(start, len(text)):
        depth += (text[i] in opening) - (text[i] in ending)
        if depth == 0:
            return i
    return -1


def split_top(text, pattern):
    """Splits at matches of a pattern that stand outside all brackets -> list of stripped parts."""
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


def number(text):
    """Rational arithmetic (digits, + - * / ^, \\frac, brackets, mixed numbers) as an exact Fraction, or None.

    Python's parser reads the syntax; only the few operations of `fold` are evaluated; no float is ever made.
    """
    if len(text) > 500 or re.search(
            r"[^\d\s.+\-*/^(){}]", re.sub(r"\\(?:frac|cdot|times|div)(?![a-zA-Z])", "", text)):
        return None
    text = re.sub(r"(\d+) ?\\frac ?\{(\d+)\} ?\{(\d+)\}", r"(\1+\2/\3)", text)  # mixed numbers
    before = None
    while text != before:  # from the inside out
        before, text = text, re.sub(r"\^ ?\{([^{}\\]*)\}", r"^(\1)", text)
        text = re.sub(r"\\frac ?\{([^{}\\]*)\} ?\{([^{}\\]*)\}", r"((\1)/(\2))", text)
    text = re.sub(r"(?<=[\d)]) ?(?=\()|(?<=\)) ?(?=\d)", "*", text)  # juxtaposed factors
    for old, new in (("{", "("), ("}", ")"), ("^", "**"), ("\\cdot", "*"), ("\\times", "*"), ("\\div", "/")):
        text = text.replace(old, new)
    text = re.sub(r"\d+\.?\d*|\.\d+", lambda m: "({}/{})".format(*Fraction(m[0]).as_integer_ratio()), text)
    try:
        return fold(ast.parse(text.strip(), mode="eval").body)
    except (SyntaxError, ValueError, ZeroDivisionError, RecursionError, MemoryError):
        return None


def fold(node):
    """The value of a syntax tree of integers, signs, + - * / and bounded powers; else raises ValueError."""
    match node:
        case ast.Constant(value=int()):
            return Fraction(node.value)
        case ast.UnaryOp(op=ast.USub() | ast.UAdd()):
            return fold(node.operand) * (-1 if isinstance(node.op, ast.USub) else 1)
        case ast.BinOp(op=ast.Pow()):
            base, exponent = fold(node.left), fold(node.right)
            size = max(abs(base.numerator), base.denominator).bit_length() * abs(exponent)
            if exponent.denominator != 1 or size > 20000:
                raise ValueError("exponent")
            return base ** int(exponent)
        case ast.BinOp(op=ast.Add() | ast.Sub() | ast.Mult() | ast.Div()):
            operation = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul,
                         ast.Div: operator.truediv}
            return operation[type(node.op)](fold(node.left), fold(node.right))
    raise ValueError("not rational arithmetic")


RELATION = r"\\le(?![a-z])|\\ge(?![a-z])|\\ne(?![a-z])|<|>|="
NAME = r"(?:[a-zA-Z]+(?:_\{?\w+\}?)?'?|\\[a-z]+)"


def strip_name(text):
    """x = 5 -> (x, 5); (p,q) = (3,2) -> (p,q), (3,2); x \\in [0,1] -> x, [0,1]; others -> None, text."""
    match = re.fullmatch(rf"({NAME}|\\angle ?{NAME}|[a-zA-Z]\((?:{NAME}|\d+)\)|\({NAME}(?:, ?{NAME})+\)) "
                         rf"?(?:=|\\in(?![a-z])) ?([^=<>]+)", text)
    return (match[1].replace(" ", ""), match[2].strip()) if match else (None, text)


LIST = r"[,;] *(?:or|and)(?![a-zA-Z])|,|;|(?<![a-zA-Z\\])(?:or|and)(?![a-zA-Z])"


def parts_of(text):
    """The kind of an answer: ("matrix", rows, columns), ("union",), ("list",) or ("(", "]"); and its parts.

    Bare lists, sets and single answers are one kind, in any order; tuples, intervals keep brackets and order.
    """
    text = re.sub(r"^[(\[] ?(\\begin.*\\end ?\{(?:array|matrix)\}) ?[)\]]$", r"\1", text)
    matrix = re.fullmatch(r"\\begin ?\{([pbvB]?matrix|smallmatrix|array)\}(?:\{[clr|]*\})?(.*)\\end ?\{\1\}",
                          text, re.DOTALL)
    if matrix:
        rows = [row.split("&") for row in re.split(r"\\\\", matrix[2].strip().removesuffix("\\\\"))]
        return ("matrix", len(rows), len(rows[0])), [normalize(cell) for row in rows for cell in row]
    if len(split := split_top(text, r"\\cup(?![a-z])")) > 1:
        return ("union",), split
    if len(split := split_top(text, LIST)) > 1:
        return ("list",), split
    opened = re.match(r"\\\{|[(\[]", text)
    if opened and closing(text, opened.end() - 1) == len(text) - 1:
        inside = text[opened.end():-1].rstrip("\\").strip()
        split = [thousands(part) for part in split_top(inside, r", |; ?" if ", " in inside else r",|;")]
        if opened.group() == "\\{":
            return ("list",), split
        if len(split) > 1:
            return (opened.group(), text[-1]), split
        if text[0] == "(" and text[-1] == ")":
            return parts_of(inside)
    if "\\pm" in text:
        return ("list",), [text.replace("\\pm", sign) for sign in "+-"]
    return ("list",), [text]


def expand(parts):
    """A list whose elements with \\pm are written out."""
    return [part.replace("\\pm", sign) for part in parts for sign in ("+-" if "\\pm" in part else "+")]


NUMBERS = dict(two=2, three=3, four=4, five=5, six=6, seven=7, eight=8, nine=9, ten=10, twelve=12, sixteen=16)


def in_base(text):
    """204_5, (204)_{5}, 204_{five} -> ("", "204", "5"), sign first; None for what has no base."""
    match = re.fullmatch(r"(-?)[({]?([0-9a-zA-Z.]+)[)}]? ?_ ?\{? ?\(?(\d+|[a-z]+)\)? ?\}?", text)
    if not match or not (match[2][0].isdigit() or match[2].isupper() and match[2][1:]):
        return None
    return match[1], match[2].upper().replace(",", ""), str(NUMBERS.get(match[3], match[3]))


def compare(answer, gold, depth=0):
    """(verdict, how) for two normalised answers; the verdict may need the two workers (`ask`)."""
    if not answer or not gold or depth > 4:
        return False, "text"
    if answer == gold:
        return True, "text"
    x, y = number(answer), number(gold)
    if x is not None and y is not None:
        return x == y, "number"
    (name_a, value_a), (name_g, value_g) = strip_name(answer), strip_name(gold)
    if name_a and name_a == name_g or (
            bool(name_a) != bool(name_g) and not re.search(RELATION, gold if name_a else answer)):
        return compare(value_a, value_g, depth + 1)
    if name_a and name_g and (number(value_a) is not None or "(" in name_a + name_g):
        return False, "structure"
    a, g = in_base(answer), in_base(gold)
    if a or g:
        return a == g, "structure"
    sides_a, sides_g = split_top(answer, RELATION), split_top(gold, RELATION)
    if len(split_top(answer, LIST)) > 1 or len(split_top(gold, LIST)) > 1:
        sides_a = sides_g = ()
    if len(sides_a) > 1 or len(sides_g) > 1:
        return compare_relations(answer, gold, sides_a, sides_g, depth), "structure"
    (kind_a, parts_a), (kind_g, parts_g) = parts_of(answer), parts_of(gold)
    if kind_a == ("list",):
        parts_a, parts_g = expand(parts_a), expand(parts_g)
    if kind_a != kind_g or len(parts_a) != len(parts_g) or len(parts_g) > 100:
        return False, "structure"
    if len(parts_g) == 1 and (parts_a, parts_g) == ([answer], [gold]):
        return compare_expressions(answer, gold)
    if kind_a in (("list",), ("union",)):
        return is_same_bag(parts_a, parts_g, depth), "structure"
    return all(compare(a, g, depth + 1)[0] for a, g in zip(parts_a, parts_g)), "structure"


def is_same_bag(parts_a, parts_g, depth):
    """Whether every part of one list equals another part of the other."""
    left = list(parts_g)
    for a in parts_a:
        found = next((g for g in left if compare(a, g, depth + 1)[0]), None)
        if found is None:
            return False
        left.remove(found)
    return True


def compare_relations(answer, gold, sides_a, sides_g, depth):
    """Equations and inequalities: the same signs, turned to point one way, and sides of equal difference."""
    signs_a, signs_g = (re.findall(RELATION, text) for text in (answer, gold))
    turned = {">": "<", "\\ge": "\\le"}
    if signs_a and all(sign in turned for sign in signs_a):
        signs_a, sides_a = [turned[sign] for sign in reversed(signs_a)], sides_a[::-1]
    if signs_g and all(sign in turned for sign in signs_g):
        signs_g, sides_g = [turned[sign] for sign in reversed(signs_g)], sides_g[::-1]
    if signs_a != signs_g or len(sides_a) != len(sides_g):
        return False
    if any(all(compare(a, g, depth + 1)[0] for a, g in zip(sides, sides_g))
           for sides in ([sides_a, sides_a[::-1]] if signs_a in (["="], ["\\ne"]) else [sides_a])):
        return True
    if len(signs_a) > 1 or any(not side for side in sides_a + sides_g):
        return False
    a, g = (f"({sides[1]})-({sides[0]})" for sides in (sides_a, sides_g))
    return compare_expressions(a, g, {"=": "scaled", "\\ne": "scaled"}.get(signs_a[0], "positive"))[0]


WORD = re.compile(rf"(?<![\\a-zA-Z])(?!(?:{FUNCTIONS})(?![a-zA-Z]))[a-zA-Z]{{3,}}")
COSTLY = re.compile("|".join((
    r"\^\s*(?:\{[^{}]*\^|\([^()]*\^|(?:\d+|\w|\{[^{}]*\})\s*\^)",  # towers of powers
    r"\^\s*\{?\s*[-+]?\s*\d{3,}|\d{41,}|!\s*!|\d{4,}\s*!|_\s*\{?\s*\d{3,}",
    r"\\(?:sum|prod|int|lim|gcd|lcm|begin)")))
# What the parser would drop or misread: unknown signs, subscripts of numbers, tails that say "about".
STRANGE = re.compile(
    r"[^\w\s\\{}()\[\]+\-*/^.|!]|[^\x00-\x7f]|\d[)}]?\s*_|[!_^] \d|\\(?:approx|[lc]?dots|sim|phantom)|\.\.")


def compare_expressions(answer, gold, mode="equal"):
    """The last resort: words as text; expressions, if cheap enough, by computer algebra in a worker."""
    if WORD.search(answer) or WORD.search(gold):
        return answer.casefold() == gold.casefold(), "text"
    for text in (answer, gold):
        is_long = len(text) > 200 or text.count("{") + text.count("(") > 20
        if is_long or STRANGE.search(text) or COSTLY.search(text):
            return answer.replace(" ", "") == gold.replace(" ", ""), "guard"
    return WORKERS.ask(answer, gold, mode)


def verdict(answer, gold):
    """Whether an answer equals the gold one, and how that was decided -> (bool, str).

    how: "none" (nothing in a box), "text", "number" (exactly, by fractions), "structure" (lists, tuples,
    intervals, matrices, relations, bases), "expression" (computer algebra), "guard" (too costly to try),
    "killed" (tried, and ended by a limit).
    """
    if answer is None or not answer.strip("$ \n\t"):
        return False, "none"
    gold, CHECKS.count = gold.rsplit("####", 1)[-1], 0
    if len(answer) > MAX_ANSWER or len(gold) > MAX_ANSWER:
        return False, "guard"
    return compare(normalize(answer), normalize(gold))


def is_correct(answer, gold):
    """Whether an extracted answer (or None) equals the gold one; the same from any thread, under any load."""
    return verdict(answer, gold)[0]


# ------------------------------------------------------------------------------------------------------------
# The workers: model text meets a computer algebra system only in processes that may be killed.


ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


class Workers:
    """Two persistent processes that compare expressions, with kernel limits on memory and CPU time per check.

    They are started fresh, when first needed, as `python -m plumbing.grading`: never forked from a process
    with threads or CUDA. A check that dies is wrong, and counted; its worker is replaced. CPU time, not wall
    time, decides, so the load of the machine does not; the wall clock is a backstop for checks that sleep.
    """

    NUMBER, CPU_SECONDS, WALL_SECONDS, MEMORY, MOST_CHECKS = 2, 2, 20, 1 << 30, 12

    def __init__(self):
        self.idle, self.lock, self.started, self.killed = queue.Queue(), threading.Lock(), 0, 0
        self.cache = {}

    def ask(self, *question):
        """(verdict, how) of two expressions; after MOST_CHECKS checks within one verdict, a plain no."""
        if question not in self.cache:
            CHECKS.count = getattr(CHECKS, "count", 0) + 1
            if CHECKS.count > self.MOST_CHECKS:
                return False, "guard"
            if len(self.cache) > 100_000:
                self.cache.clear()
            self.cache[question] = self.run(*question)
        return self.cache[question]

    def run(self, answer, gold, mode="equal"):
        """One check in the next idle worker."""
        with self.lock:
            if self.started < self.NUMBER:
                self.started += 1
                self.idle.put(None)
        process, reply = self.idle.get(), ""
        try:
            if process is not None and process.poll() is not None:  # it died while idle: no verdict on anyone
                self.bury(process)
                process = None
            process = process or self.start()
            timer = threading.Timer(self.WALL_SECONDS, process.kill)
            timer.start()
            try:
                process.stdin.write(json.dumps([answer, gold, mode]) + "\n")
                process.stdin.flush()
                reply = process.stdout.readline()
            except BrokenPipeError:
                pass
            finally:
                timer.cancel()
        finally:
            # Dead, or interrupted: with its reply unread it would answer the next question with this verdict.
            if process is not None and not reply:
                process.kill()
                self.bury(process)
                process = None
            self.idle.put(process)
        if reply:
            return json.loads(reply), "expression"
        print(f"grading: a check was killed by its limits, and counts as wrong: {answer!r}", file=sys.stderr)
        return False, "killed"

    def start(self):
        """A new worker, ready."""
        process = subprocess.Popen(
            [sys.executable, "-m", "plumbing.grading"], cwd=ROOT, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        if process.stdout.readline() != "ready\n":  # else every answer it should check would count as wrong
            raise RuntimeError("the grading worker does not start: `python -m plumbing.grading` shows why")
        atexit.register(process.kill)
        return process

    def bury(self, process):
        """Counts a worker that died, and closes what it held: 500 deaths must not
        use up a run's open files."""
        process.wait()
        atexit.unregister(process.kill)
        process.stdout.close()
        try:
            process.stdin.close()
        except BrokenPipeError:  # it still had a question in it
            pass
        with self.lock:
            self.killed += 1


WORKERS = Workers()
CHECKS = threading.local()  # of the verdict that this thread is at


def work():
    """The life of a worker: one line in, one line out, until its input closes."""
    import resource

    from latex2sympy2_extended import latex2sympy  # noqa: F401 - before the limits
    sys.setrecursionlimit(2000)
    resource.setrlimit(resource.RLIMIT_AS, (Workers.MEMORY, Workers.MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    replies = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what a library prints is no reply
    print("ready", file=replies)
    for line in sys.stdin:
        used = resource.getrusage(resource.RUSAGE_SELF)
        limit = int(used.ru_utime + used.ru_stime) + 1 + Workers.CPU_SECONDS
        resource.setrlimit(resource.RLIMIT_CPU, (limit, resource.RLIM_INFINITY))
        try:
            same = is_same_expression(*json.loads(line))
        except Exception:  # whatever a parser or sympy throws at text by a model: it is not the right answer
            same = False
        print(json.dumps(bool(same)), file=replies)


DIGITS = 250


def is_same_expression(answer, gold, mode="equal"):
    """Whether two LaTeX expressions are the same function of their letters (run in a worker only); or, for
    equations and inequalities, the same but for a constant (mode "scaled") or positive ("positive") factor.

    math-verify's parser reads them; equality is decided here, at random rational points to DIGITS digits.
    math-verify's own comparison rounds to six digits, and so takes 6.283185 for 2 pi and 2^-99 for 2^-98.
    """
    import sympy
    from latex2sympy2_extended import latex2sympy
    from latex2sympy2_extended.latex2sympy2 import ConversionConfig

    conversion = ConversionConfig(interpret_as_mixed_fractions=False, lowercase_symbols=False)
    a, g = (sympy.nsimplify(latex2sympy(text, conversion_config=conversion), rational=True)
            for text in (answer, gold))
    if a == g:
        return True
    imaginary = {sympy.Symbol("i"): sympy.I}
    a, g = a.subs(imaginary), g.subs(imaginary)
    letters = sorted(a.free_symbols | g.free_symbols, key=str)
    rng, agreed, ratio = random.Random(0), 0, None
    for _ in range(8 if letters else 1):
        point = {letter: sympy.Rational(rng.randint(-4000, 4000), 1009) for letter in letters}
        x, y = (sympy.N(side.subs(point), DIGITS) for side in (a, g))
        if not (x.is_number and y.is_number and x.is_finite and y.is_finite):
            continue
        if mode != "equal" and abs(y) > 1e-99:
            ratio = x / y if ratio is None else ratio
            if abs(ratio) < 1e-99 or mode == "positive" and not ratio.is_positive:
                return False
            y *= ratio
        if abs(x - y) > sympy.Float(f"1e-{DIGITS - 30}", DIGITS) * (abs(x + y) + sympy.Float("1e-20")):
            return False
        agreed += 1
    return agreed >= (3 if letters else 1)


# ------------------------------------------------------------------------------------------------------------
# A file of answers.


def grade(pairs):
    """`verdict` of many (answer, gold) pairs, in order. Costly ones go to both workers at once."""
    with ThreadPoolExecutor(Workers.NUMBER) as pool:
        return list(pool.map(lambda pair: verdict(*pair), pairs))


def read_json_rows(path):
    """The rows of a .json array or of JSON lines. ValueError that names the file,
    and the line of what is broken."""
    try:
        with open(path, encoding="utf-8-sig") as file:  # -sig: with or without a byte order mark
            text = file.read()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text ({error}): save it as UTF-8") from None
    if path.endswith(".json") and text.lstrip().startswith("["):
        try:
            return json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}: broken JSON ({error})") from None
    rows = []
    for number, line in enumerate(text.split("\n"), 1):  # not splitlines: JSON strings may hold U+2028
        if line.strip():
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError as error:
                raise ValueError(f"{path}, line {number}: broken JSON ({error})") from None
    return rows


def grade_file(path, out):
    """Rows of gold and response -> rows of correct, answer and how in the file
    `out`, and a summary with speed."""
    if os.path.exists(out) and os.path.samefile(path, out):
        raise ValueError(f"{out} is the file to be graded, and would be overwritten: give another name")
    rows = read_json_rows(path)
    for number, row in enumerate(rows, 1):
        is_dict = isinstance(row, dict)
        if not is_dict or not isinstance(row.get("gold"), str) or not isinstance(row.get("response"), str):
            raise ValueError(f"{path}, row {number}: needs the texts gold and response, "
                             f"has {str(row)[:80]!r}")
    is_correct("\\sqrt{2}", "\\sqrt{3}")  # starts a worker: the start is not part of the speed
    started = time.perf_counter()
    answers = [extract_answer(row["response"]) for row in rows]
    verdicts = grade(list(zip(answers, (row["gold"] for row in rows))))
    seconds = time.perf_counter() - started
    with open(f"{out}.partial", "w", encoding="utf-8") as file:
        for answer, (is_right, how) in zip(answers, verdicts):
            file.write(json.dumps(dict(correct=is_right, answer=answer, how=how)) + "\n")
    os.replace(f"{out}.partial", out)
    hows = Counter(how for _, how in verdicts)
    right = sum(is_right for is_right, _ in verdicts)
    print(f"{right} of {len(rows)} right ({right / max(len(rows), 1):.1%}); decided by " +
          ", ".join(f"{how} {count}" for how, count in hows.most_common()) +
          f"; {len(rows) / seconds:.0f} checks per second; rows in {out}")
    return verdicts


def main(argv=None):
    """Grades a file, or works."""
    parser = argparse.ArgumentParser(prog="python -m plumbing.grading", allow_abbrev=False,
                                     description="Grade a JSON Lines file of gold and response.")
    parser.add_argument("file", nargs="?", help="rows of gold and response; without it, this is a worker")
    parser.add_argument("out", nargs="?", help="where the verdicts go")
    args = parser.parse_args(argv)
    if args.file and not args.out:
        parser.error(f"where should the verdicts of {args.file} go? Give a second file")
    try:
        return grade_file(args.file, args.out) if args.file else work()
    except (OSError, ValueError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
