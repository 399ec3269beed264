"""eval_math.py - what counts as right.

Problems (embedded, local files, the hub), the prompt around them, the answer in a response, the verdict,
and accuracy with its standard error. The verdict is also the training reward: a wrong one teaches
something false.

    python eval_math.py --model runs/tracerl/checkpoints/step-60 --data arithmetic-test

Reading order: Problem, arithmetic, load_problems, encode_prompts; extract_answer, is_correct; evaluate.
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
import zlib
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from fractions import Fraction
from statistics import fmean

INSTRUCTION = "\nPlease reason step by step, and put your final answer within \\boxed{}."


@dataclass
class Problem:
    """A question, its answer, and, where the data have one, a worked solution (used by SFT only)."""

    problem: str  # or a list of chat messages
    answer: str
    solution: str = ""
    step_map: list = None  # of the solution's tokens, for SFT on a trace
    tokens: list = field(default_factory=list)  # the prompt, once encode_prompts has made it


# ------------------------------------------------------------------------------------------------------------
# The embedded task: three-digit addition, worked out column by column, units first.


def arithmetic(split, number, seed=0, slip=0.0):
    """`number` distinct problems like 237+682= with solutions 090;111;090;\\boxed{919} -> list[Problem].

    split: "train", "dev" or "test"; every sum belongs to one split for good. slip: the probability with which
    the pupil who writes the solutions forgets a carry, and carries on consistently: a bad habit for
    reinforcement learning to remove. The `answer` is always the right one.
    """
    buckets = {"train": range(2, 10), "dev": range(1, 2), "test": range(0, 1)}[split]
    rng, seen = random.Random(f"{split} {seed}"), {}
    while len(seen) < number:
        a, b = rng.randint(100, 999), rng.randint(100, 999)
        text = f"{a}+{b}="
        if zlib.crc32(text.encode()) % 10 in buckets and text not in seen:
            seen[text] = Problem(text, str(a + b), work_out(a, b, slip, rng))
    return list(seen.values())


def work_out(a, b, slip, rng):
    """The pupil's page: for each column, units first, its sum and the carry handed on; then the answer.

    237 + 682: 7 + 2 = 09, hand on 0; 3 + 8 = 11, hand on 1; 2 + 6 + 1 = 09, hand on 0. A pupil who slips
    hands on 0 where a carry is due, so the slip can be seen the moment it is written.
    """
    page, digits, carry = "", "", 0
    for power in (1, 10, 100):
        column = a // power % 10 + b // power % 10 + carry
        carry = column // 10 if power == 100 or rng.random() >= slip else 0
        page, digits = f"{page}{column:02d}{carry};", f"{column % 10 if power < 100 else column}{digits}"
    return f"{page}\\boxed{{{digits}}}"


# ------------------------------------------------------------------------------------------------------------
# Problems from files and from the hub.


HUB = {"math500": "HuggingFaceH4/MATH-500::test", "gsm8k": "openai/gsm8k:main:test",
       "gsm8k-train": "openai/gsm8k:main:train", "aime2024": "Maxwell-Jia/AIME_2024::train"}
COLUMNS = dict(problem=("problem", "question", "prompt", "messages"),
               answer=("answer", "final_answer", "solution", "response"),
               solution=("solution", "response", "answer"))


def load_problems(source, problem_column=None, answer_column=None, needs_answer=True):
    """Problems from any source -> list[Problem].

    source: "arithmetic[-dev|-test]"; a local .jsonl, .json or .parquet file; a name (math500, gsm8k,
    gsm8k-train, aime2024); or a hub id, owner/name[:config[:split]]. Columns are found by name (problem,
    question, prompt or messages; answer; solution or response), or given. In GSM8K's style the answer stands
    behind ####; in a solution without an answer, in the last \\boxed{}. needs_answer: whether a row without
    one is an error (for SFT it is not). Raises FileNotFoundError, or ValueError that names the source and the
    row of what is broken, missing or empty.
    """
    if source in ("arithmetic", "arithmetic-dev", "arithmetic-test"):
        split = source.removeprefix("arithmetic").lstrip("-") or "train"
        return arithmetic(split, 20000 if split == "train" else 400)
    rows = read_rows(source)
    if not rows:
        raise ValueError(f"{source} holds no problems")
    given = dict(problem=problem_column, answer=answer_column, solution=None)
    return [to_problem(row, f"{source}, row {number}", given, needs_answer)
            for number, row in enumerate(rows, 1)]


def read_rows(source):
    """The rows of a local file or hub data set, as dicts (a broken JSON line: ValueError with its number)."""
    if os.path.isfile(source) and source.endswith((".json", ".jsonl")):
        with open(source, encoding="utf-8") as file:
            text = file.read()
        if source.endswith(".json") and text.lstrip().startswith("["):
            return json.loads(text)
        rows = []
        for number, line in enumerate(text.splitlines(), 1):
            if line.strip():
                try:
                    rows.append(json.loads(line))
                except json.JSONDecodeError as error:
                    raise ValueError(f"{source}, line {number}: broken JSON ({error})") from None
        return rows
    import datasets  # slow to import, and seldom needed

    if os.path.isfile(source):
        if not source.endswith(".parquet"):
            raise ValueError(f"{source}: the name must end in .jsonl, .json or .parquet")
        return list(datasets.Dataset.from_parquet(source, cache_dir=None))
    is_file = source.endswith((".json", ".jsonl"))
    is_id = not is_file and re.fullmatch(r"[\w.-]+/[\w.-]+(:[\w.-]*){0,2}", source)
    if source not in HUB and not is_id:
        raise FileNotFoundError(f"no data file {source!r}, and no name among {', '.join(HUB)}, "
                                "and not a hub id owner/name")
    name, config, split = (HUB.get(source, source) + "::").split(":")[:3]
    return list(datasets.load_dataset(name, config or None, split=split or "train"))


def to_problem(row, where, given, needs_answer):
    """One row of a data set as a Problem."""
    if not isinstance(row, dict):
        raise ValueError(f"{where}: not an object with named columns: {str(row)[:80]!r}")
    columns = {name.lower(): name for name in row}
    found = {}
    for field_name, names in COLUMNS.items():
        name = given[field_name] or next((columns[n] for n in names if n in columns), None)
        if name is not None and name not in row:
            raise ValueError(f"{where}: no column {name!r}; it has {', '.join(row)}")
        found[field_name] = row[name] if name is not None else None
    problem, answer, solution = found["problem"], found["answer"], found["solution"]
    if isinstance(problem, list):  # a conversation: the last message is the response
        problem, solution = problem[:-1], problem[-1]["content"]
    if not problem:
        raise ValueError(
            f"{where}: no problem; columns are {', '.join(row)}, looked for {', '.join(COLUMNS['problem'])}")
    answer = "" if answer is None else str(answer)
    if "####" in answer:
        answer = answer.rsplit("####", 1)[1].strip()
    elif (boxed := extract_answer(answer)) is not None:
        answer = boxed
    if needs_answer and not answer.strip():
        raise ValueError(
            f"{where}: no answer; columns are {', '.join(row)}, looked for {', '.join(COLUMNS['answer'])}")
    return Problem(problem, answer, "" if solution is None else str(solution), step_map=row.get("step_map"))


PROMPT_STYLES = ("chat", "trado", "think", "no_think", "plain")


def encode_prompts(
        problems, tokenizer, max_prompt_tokens, instruction=INSTRUCTION, style="chat", system=None):
    """Sets Problem.tokens -> (problems that fit, number of others). system: a message, for chats without one.

    style: how the chat template's text is used (METHOD: evaluation).
      chat      as the template gives it
      trado     without white space after the last "assistant": TraDo was trained on prompts that end there
      think     followed by <think> and a newline (once), the opening of long chains of thought
      no_think  the template's own switch enable_thinking=False (Qwen3: an empty <think></think> follows)
      plain     no template: the problem and the instruction alone, for base models
    """
    if style not in PROMPT_STYLES:
        raise ValueError(f"unknown prompt style {style!r}: choose one of {', '.join(PROMPT_STYLES)}")
    if style != "plain" and not tokenizer.chat_template:
        raise ValueError("this tokenizer has no chat template: use --prompt_style plain")
    switch = dict(enable_thinking=False) if style == "no_think" else {}
    for p in problems:
        chat = p.problem
        if not isinstance(chat, list):
            chat = [{"role": "user", "content": p.problem + instruction}]
        if system is not None and chat[0]["role"] != "system":
            chat = [{"role": "system", "content": system}, *chat]
        if style == "plain":
            text = "\n".join(message["content"] for message in chat)
        else:
            text = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False, **switch)
        if style == "trado":
            text = text.rstrip()
        if style == "think" and not text.rstrip().endswith("<think>"):
            text += "<think>\n"
        p.tokens = tokenizer(text, add_special_tokens=False).input_ids
    fitting = [p for p in problems if len(p.tokens) <= max_prompt_tokens]
    if not fitting:
        raise ValueError(f"none of {len(problems)} prompts has at most {max_prompt_tokens} tokens: "
                         "raise --max_prompt_tokens")
    return fitting, len(problems) - len(fitting)


# ------------------------------------------------------------------------------------------------------------
# The verdict.


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
NOT_UNITS = (r"\s*(?:or|and|not|wrong|plus|minus|million|billion|trillion|thousand|hundred|dozen|"
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
    r"\\(?:sum|prod|int|lim|gcd|lcm|binom|begin)")))
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


class Workers:
    """Two persistent processes that compare expressions, with kernel limits on memory and CPU time per check.

    They are started fresh, when first needed, as `python eval_math.py --worker`: never forked from a process
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
        process = self.idle.get()
        try:
            if process is None:
                process = self.start()
            timer = threading.Timer(self.WALL_SECONDS, process.kill)
            timer.start()
            try:
                process.stdin.write(json.dumps([answer, gold, mode]) + "\n")
                process.stdin.flush()
                reply = process.stdout.readline()
            except BrokenPipeError:
                reply = ""
            finally:
                timer.cancel()
            if reply:
                return json.loads(reply), "expression"
            process.wait()
            process = None
            with self.lock:
                self.killed += 1
            print(f"eval_math: a check was killed by its limits, and counts as wrong: {answer!r}",
                  file=sys.stderr)
            return False, "killed"
        finally:
            self.idle.put(process)

    def start(self):
        """A new worker, ready."""
        process = subprocess.Popen(
            [sys.executable, os.path.abspath(__file__), "--worker"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        process.stdout.readline()
        atexit.register(process.kill)
        return process


WORKERS = Workers()
CHECKS = threading.local()  # of the verdict that this thread is at


def work():
    """The life of a worker: one line in, one line out, until its input closes."""
    import resource

    from latex2sympy2_extended import latex2sympy  # noqa: F401 - before the limits
    sys.setrecursionlimit(2000)
    resource.setrlimit(resource.RLIMIT_AS, (Workers.MEMORY, Workers.MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    print("ready", flush=True)
    for line in sys.stdin:
        used = resource.getrusage(resource.RUSAGE_SELF)
        limit = int(used.ru_utime + used.ru_stime) + 1 + Workers.CPU_SECONDS
        resource.setrlimit(resource.RLIMIT_CPU, (limit, resource.RLIM_INFINITY))
        try:
            same = is_same_expression(*json.loads(line))
        except Exception:  # whatever a parser or sympy throws at text by a model: it is not the right answer
            same = False
        print(json.dumps(bool(same)), flush=True)


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
# Evaluation.


def grade(pairs):
    """`verdict` of many (answer, gold) pairs, in order. Costly ones go to both workers at once."""
    with ThreadPoolExecutor(Workers.NUMBER) as pool:
        return list(pool.map(lambda pair: verdict(*pair), pairs))


def response_text(r, tokenizer):
    """The trained part of a response as text, for the answer checker only."""
    return tokenizer.decode(r.response[:r.num_tokens], skip_special_tokens=True)


def score(rollouts, problems, tokenizer):
    """Sets rewards: 1 if a rollout's answer is right and it was not truncated, else 0 (METHOD: rewards).

    Returns the (verdict, how) of each; a truncated response is wrong whatever it says.
    """
    pairs = [(None if r.is_truncated else extract_answer(response_text(r, tokenizer)), p.answer)
             for r, p in zip(rollouts, problems)]
    verdicts = grade(pairs)
    for r, (is_right, _) in zip(rollouts, verdicts):
        r.reward = float(is_right)
    return verdicts


def evaluate(model, tokenizer, problems, num_samples=1, seed=0, **settings):
    """Samples and scores num_samples responses per problem -> dict with accuracy, standard_error, n and more.

    settings go to rollout.generate. The standard error is that of the mean over problems.
    """
    import model as lm  # not at the top: the checking workers import this file, and do without torch
    import rollout

    repeated = [p for p in problems for _ in range(num_samples)]
    seeds = [seed + i for i in range(len(repeated))]
    rollouts = rollout.generate_everywhere(model, [p.tokens for p in repeated], seeds, **settings)
    rank, number = lm.processes()  # each process judges its share, and all take over the verdicts
    own = rollouts[rank::number]
    score(own, repeated[rank::number], tokenizer)
    rewards = lm.gather_lists([r.reward for r in own])
    samples = [rewards[i:i + num_samples] for i in range(0, len(rewards), num_samples)]
    return accuracy(samples) | describe(rollouts)


def accuracy(rewards):
    """Rewards of each problem's samples -> accuracy, its standard error over problems, n, pass@k (k: all)."""
    means = [fmean(samples) for samples in rewards]
    mean = fmean(means)
    variance = sum((m - mean) ** 2 for m in means) / max(1, len(means) - 1)
    return dict(accuracy=mean, standard_error=(variance / len(means)) ** 0.5, n=len(means),
                pass_at_k=fmean(max(samples) for samples in rewards))


def describe(rollouts):
    """Mean length (trained tokens), share of truncated responses, and tokens revealed per denoising step."""
    return dict(
        length=sum(r.num_tokens for r in rollouts) / len(rollouts),
        truncated=sum(r.is_truncated for r in rollouts) / len(rollouts),
        tokens_per_step=sum(len(r.response) for r in rollouts) / sum(max(r.step_map) for r in rollouts))


# ------------------------------------------------------------------------------------------------------------
# Commands.


def diffusion_responder(args):
    """A function (problems, seeds, strategy) -> responses of a diffusion model, made by all the processes."""
    import model as lm
    import rollout

    model, tokenizer = lm.load_model(args.model, args.block_size)

    def respond(problems, seeds, strategy):
        """Responses to the problems, on every process."""
        rollouts = rollout.generate_everywhere(
            model, [p.tokens for p in problems], seeds, max_new_tokens=args.max_new_tokens, strategy=strategy,
            threshold=args.threshold, temperature=args.temperature, top_k=args.top_k, top_p=args.top_p,
            slots=args.slots, eos_ids=model.config.eos_ids)
        return [dict(response=response_text(r, tokenizer), length=r.num_tokens, truncated=r.is_truncated,
                     decoded=len(r.response), step_map=r.step_map) for r in rollouts]

    return respond, tokenizer


def autoregressive_responder(args):
    """The same of an autoregressive model, by transformers' generate: left-padded batches, token by token."""
    import torch
    import transformers

    import model as lm

    tokenizer = transformers.AutoTokenizer.from_pretrained(args.ar, padding_side="left")
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    model = transformers.AutoModelForCausalLM.from_pretrained(args.ar, dtype="auto")
    model = model.to(lm.default_device()).eval()
    eos = model.generation_config.eos_token_id
    eos = set(eos if isinstance(eos, list) else [eos]) | {tokenizer.eos_token_id}
    sampling = dict(do_sample=False) if args.temperature == 0 else dict(
        do_sample=True, temperature=args.temperature, top_k=args.top_k, top_p=args.top_p)

    def respond(problems, seeds, strategy):
        """Responses to the problems, on every process."""
        rank, number = lm.processes()
        own, out = problems[rank::number], []
        for start in range(0, len(own), args.slots):
            batch = [{"input_ids": p.tokens} for p in own[start:start + args.slots]]
            inputs = tokenizer.pad(batch, return_tensors="pt").to(model.device)
            torch.manual_seed(seeds[rank::number][start])
            tokens = model.generate(**inputs, max_new_tokens=args.max_new_tokens,
                                    pad_token_id=tokenizer.pad_token_id, **sampling)
            for row in tokens[:, inputs["input_ids"].shape[1]:].tolist():
                end = next((i + 1 for i, token in enumerate(row) if token in eos), 0)
                length = end or len(row)
                out.append(dict(
                    response=tokenizer.decode(row[:length], skip_special_tokens=True), length=length,
                    truncated=end == 0, decoded=length, step_map=list(range(1, length + 1))))
        return lm.gather_lists(out)

    return respond, tokenizer


def evaluate_command(args):
    """Samples, grades, tabulates. Responses are in runs/<run>/responses.jsonl at once: a run can resume."""
    import model as lm

    lm.start_processes()
    respond, tokenizer = autoregressive_responder(args) if args.ar else diffusion_responder(args)
    if tokenizer is None:
        raise ValueError(f"{args.model} has no tokenizer: prompts cannot be encoded")
    problems = load_problems(args.data, args.problem_column, args.answer_column)[:args.limit]
    problems, num_long = encode_prompts(problems, tokenizer, args.max_prompt_tokens, args.instruction,
                                        args.prompt_style, args.system)
    strategies = ["autoregressive"] if args.ar else args.strategy
    log = lm.RunLog(os.path.join("runs", args.run), vars(args), "responses.jsonl", is_resumed=True)
    done = {(line["strategy"], line["problem"], line["sample"]): line for line in log.read()}
    work = [(strategy, i, k) for strategy in strategies for i in range(len(problems)) for k in range(args.n)]
    todo = [key for key in work if key not in done]
    lm.say(f"{args.data}: {len(problems)} problems, {num_long} skipped for their length; "
           f"{len(work) - len(todo)} of {len(work)} responses were there already")
    size = args.slots * lm.processes()[1] * 2
    chunks = []
    for strategy in strategies:
        keys = [key for key in todo if key[0] == strategy]
        chunks += [keys[i:i + size] for i in range(0, len(keys), size)]
    for chunk in lm.progress(chunks, "evaluate"):
        started = time.perf_counter()
        seeds = [args.seed + i * args.n + k for _, i, k in chunk]
        responses = respond([problems[i] for _, i, _ in chunk], seeds, chunk[0][0])
        seconds = (time.perf_counter() - started) / len(chunk)
        pairs = [(None if r["truncated"] else extract_answer(r["response"]), problems[i].answer)
                 for r, (_, i, _) in zip(responses, chunk)]
        for key, r, (answer, gold), (is_right, how) in zip(chunk, responses, pairs, grade(pairs)):
            done[key] = dict(strategy=key[0], problem=key[1], sample=key[2], text=problems[key[1]].problem,
                             gold=gold, answer=answer, correct=is_right,
                             how="truncated" if r["truncated"] else how, seconds=seconds, **r)
            log.write(done[key])
    summary = {}
    for strategy in strategies:
        lines = [done[key] for key in work if key[0] == strategy]
        summary[strategy] = accuracy([[float(line["correct"]) for line in lines[i:i + args.n]]
                                      for i in range(0, len(lines), args.n)])
        summary[strategy].update(
            length=fmean(line["length"] for line in lines),
            truncated=fmean(line["truncated"] for line in lines),
            tokens_per_step=sum(line["decoded"] for line in lines)
            / sum(max(line["step_map"]) for line in lines),
            tokens_per_second=sum(line["length"] for line in lines) / sum(line["seconds"] for line in lines),
            unanswered=fmean(line["answer"] is None for line in lines),
            killed=sum(line["how"] == "killed" for line in lines))
    log.finish(summary)
    names = list(summary[strategies[0]])
    lm.say(f"{args.data}, n = {args.n}" + "".join(f"{strategy:>16s}" for strategy in strategies))
    for name in names:
        lm.say(f"  {name:18s}" + "".join(f"{summary[strategy][name]:16.3f}" for strategy in strategies))
    return summary


def grade_command(args):
    """Rows of gold and response -> rows of correct, answer and how in args.out, and a summary with speed."""
    rows = read_rows(args.grade)
    for number, row in enumerate(rows, 1):
        if (not isinstance(row, dict) or not isinstance(row.get("gold"), str)
                or not isinstance(row.get("response"), str)):
            raise ValueError(f"{args.grade}, row {number}: needs the texts gold and response, "
                             f"has {str(row)[:80]!r}")
    is_correct("\\sqrt{2}", "\\sqrt{3}")  # starts a worker: the start is not part of the speed
    started = time.perf_counter()
    answers = [extract_answer(row["response"]) for row in rows]
    verdicts = grade(list(zip(answers, (row["gold"] for row in rows))))
    seconds = time.perf_counter() - started
    with open(args.out, "w", encoding="utf-8") as file:
        for answer, (is_right, how) in zip(answers, verdicts):
            file.write(json.dumps(dict(correct=is_right, answer=answer, how=how)) + "\n")
    hows = Counter(how for _, how in verdicts)
    right = sum(is_right for is_right, _ in verdicts)
    print(f"{right} of {len(rows)} right ({right / max(len(rows), 1):.1%}); decided by " +
          ", ".join(f"{how} {count}" for how, count in hows.most_common()) +
          f"; {len(rows) / seconds:.0f} checks per second; rows in {args.out}")
    return verdicts


def parse_args(argv=None):
    """The flags of eval_math.py. Each: name, type, default, meaning."""
    parser = argparse.ArgumentParser(
        description="Evaluate a model on math problems, or grade a file.", allow_abbrev=False)
    flag = parser.add_argument
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--model", help="diffusion model: checkpoint folder or hub id")
    what.add_argument("--ar", metavar="MODEL", help="autoregressive model, by transformers' generate, "
                      "under the same prompts and grader")
    what.add_argument("--grade", metavar="FILE",
                      help="grade a JSON Lines file of gold and response instead of sampling")
    flag("--out", help="with --grade: where the verdicts go")
    flag("--data", default="arithmetic-test",
         help=f"arithmetic-test, {', '.join(HUB)}, a file, or a hub id owner/name[:config[:split]]")
    flag("--problem_column", help="column of the problem, if it has an uncommon name")
    flag("--answer_column", help="column of the answer, if it has an uncommon name")
    flag("--limit", type=int, default=None, help="only the first problems")
    flag("--n", type=int, default=1, help="samples per problem; pass_at_k has k = n")
    flag("--strategy", nargs="+", default=["static", "dynamic"],
         choices=("static", "dynamic", "sequential", "entropy"))
    flag("--threshold", type=float, default=0.9, help="confidence above which dynamic reveals a token")
    flag("--temperature", type=float, default=1.0, help="0 is greedy")
    flag("--top_k", type=int, default=0, help="draw among the k most probable tokens; 0 is all")
    flag("--top_p", type=float, default=1.0,
         help="draw among the most probable tokens up to this sum; 1 is all")
    flag("--block_size", type=int, default=None, help="K, if not the checkpoint's own")
    flag("--max_new_tokens", type=int, default=2000,
         help="longest response; longer ones are truncated, and wrong")
    flag("--max_prompt_tokens", type=int, default=784, help="longer prompts are skipped and counted")
    flag("--prompt_style", choices=PROMPT_STYLES, default="chat", help="how the chat template is used")
    flag("--instruction", default=INSTRUCTION, help="text after each problem")
    flag("--system", default=None, help="a system message before each problem")
    flag("--slots", type=int, default=64, help="sequences decoded together on one process")
    flag("--seed", type=int, default=0, help="of the first sample")
    flag("--run", "--run_name", default="eval", help="folder under runs/; the same name and flags resume it")
    args = parser.parse_args(argv)
    if args.grade and not args.out:
        parser.error("--grade needs --out")
    if args.n < 1 or args.slots < 1 or args.max_new_tokens < 1:
        parser.error(f"--n {args.n}, --slots {args.slots} and --max_new_tokens {args.max_new_tokens} "
                     "must be at least 1")
    return args


def main(argv=None):
    """Evaluates or grades."""
    args = parse_args(argv)
    return grade_command(args) if args.grade else evaluate_command(args)


if __name__ == "__main__":
    if sys.argv[1:] == ["--worker"]:
        work()
    else:
        main()
