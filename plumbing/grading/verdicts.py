"""plumbing/grading/verdicts.py - is this answer right? For one answer, for many, for a file of them."""

import json
import os
import re
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction

from plumbing.grading.extract import MAX_ANSWER, extract_answer
from plumbing.grading.formula import FUNCTIONS
from plumbing.grading.spelling import spell_pair
from plumbing.grading.workers import WORKERS, Workers

PLAIN_NUMBER = re.compile(r"-?(?:\d+\.?\d*|\.\d+)")
CALCULATION = re.compile(r"\d[}) ]*(?:[-+*^]|\\times|\\cdot|\\div)[({ ]*\d")
# Words that change what an answer says: "not x = 5", "5 if n is even".
DENIAL = re.compile(r"(?i)(?<![\\a-z])(?:not|no|never|if|unless|wrong|false|twice|half|assume|minus|negative|"
                    r"double|triple|except|cannot|opposite|reciprocal)(?![a-z])")
# What may not stand behind a choice, since (C) + 1 is none. (C) -5 is one: its text is the number -5.
OPERATION = r"(?:[+*/^_!=<>{]|-(?! ?[\d.\\])|\\(?:cdot|times|div|pm|ne|le|ge)(?![a-z]))"
APPLIED = re.compile(r"(?<![a-zA-Z\\])f'*\((?!.*(?:=|\\in(?![a-z])))")  # y = f(2x), but not f(2x) = 3
WORD = re.compile(rf"(?<![\\a-zA-Z])(?!(?:{FUNCTIONS}|and)(?![a-zA-Z]))[a-zA-Z]{{3,}}")


def verdict(answer, gold):
    """Whether an answer equals the gold one, and how that was decided -> (bool, str).

    how: "none" (no answer), "text" (by the spelling alone), "number" (exactly, by fractions), "expression"
    (in a worker), "guard" (too long to try), "killed" (tried, and ended by a limit).
    """
    if answer is None or not answer.strip("$ \n\t"):
        return False, "none"
    gold = gold.rsplit("####", 1)[-1]  # in GSM8K the answer stands behind ####
    if len(answer) > MAX_ANSWER or len(gold) > MAX_ANSWER:
        return False, "guard"
    answer, gold = spell_pair(answer, gold)
    if not answer or not gold:
        return False, "text"
    if without_spaces(answer) == without_spaces(gold):
        return True, "text"
    # D: x > 3 is no choice, but the domain of a function.
    letters, texts = zip(choice(answer), choice("" if ":" in gold else gold))
    if all(letters) and ("" in texts or texts[0] == texts[1]):
        return letters[0] == letters[1], "text"
    if PLAIN_NUMBER.fullmatch(answer) and PLAIN_NUMBER.fullmatch(gold):
        return Fraction(answer) == Fraction(gold), "number"
    is_words = not re.search(r"[\\+*/^=<>]", gold) and WORD.search(gold)  # "Even", "east"
    # IV is no product of I and V, and f(2x) is no product, either.
    if is_words or re.fullmatch("(?i:no)|[IVX]{2,}", gold) or APPLIED.search(gold):
        return without_spaces(answer).casefold() == without_spaces(gold).casefold(), "text"
    if DENIAL.search(answer) and not DENIAL.search(gold):
        return False, "text"
    return WORKERS.ask(answer, gold)


def without_spaces(text):
    """The text without spaces, but for those between digits: 1 2 is not 12. Also x^{2} becomes x^2."""
    text = re.sub(r"(?<=[\^_])\{(\w)\}(?!\s*\d)", r"\1", text)
    return re.sub(r"(?<!\d) | (?!\d)", "", text)


def choice(text):
    """The letter and the text of a multiple choice: C, (C), C. 42, (C) 42 or Option C. Of others: "" and "".

    A text with another such letter is no choice: C or D.
    """
    match = re.fullmatch(
        rf"(?:(?i:option|choice|answer) )?\(?([A-H])(?:[).:](?! ?{OPERATION}) ?(.*))?", text)
    if not match or re.search(r"(?<![a-zA-Z\\])[A-H](?![a-zA-Z])", match[2] or ""):
        return "", ""
    return match[1], match[2] or ""


def is_correct(answer, gold):
    """Whether an extracted answer (or None) equals the gold one. Any thread may call this."""
    return verdict(answer, gold)[0]


def is_copied(answer, gold, question):
    """Whether an answer only repeats a calculation of the question, where the gold answer is a number.

    To "What is 894+396?" the answer 894+396 has the right value, but nobody has computed it. question: a
    text, or chat messages.
    """
    spelled, gold = spell_pair(answer or "", gold)  # without units: 36\text{ cm}^2 is no calculation
    if not CALCULATION.search(spelled) or not PLAIN_NUMBER.fullmatch(gold):
        return False
    texts = [question] if isinstance(question, str) else [message["content"] for message in question]
    return re.sub(r"\s", "", answer.strip("$() ")) in re.sub(r"\s", "", "".join(texts))


def grade(pairs):
    """The verdicts on many (answer, gold) pairs, in order. All workers share the work."""
    with ThreadPoolExecutor(Workers.NUMBER) as pool:
        return list(pool.map(lambda pair: verdict(*pair), pairs))


def read_json_rows(path):
    """The rows of JSON lines, or of one array. A ValueError names the file, and the line of a mistake."""
    rows = []
    place = ""
    try:
        with open(path, encoding="utf-8-sig") as file:  # -sig: with or without a byte order mark
            text = file.read()
        if text.lstrip().startswith("["):
            return json.loads(text)
        for number, line in enumerate(text.split("\n"), 1):  # not splitlines: JSON strings may hold U+2028
            place = f", line {number}"
            if line.strip():
                rows.append(json.loads(line))
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text ({error}): save it as UTF-8") from None
    except ValueError as error:
        raise ValueError(f"{path}{place}: broken JSON ({error}): write one object per line, or one array of "
                         "objects") from None
    return rows


def grade_file(path, out):
    """Grades rows of gold and response. Writes rows to `out`: correct, answer, how. Prints a summary."""
    if os.path.exists(out) and os.path.samefile(path, out):
        raise ValueError(f"{out} is the file to be graded, and would be overwritten: give another name")
    rows = read_json_rows(path)
    for number, row in enumerate(rows, 1):
        texts = (row.get("gold"), row.get("response")) if isinstance(row, dict) else (None,)
        if not all(isinstance(text, str) for text in texts):
            raise ValueError(
                f"{path}, row {number}: needs the texts gold and response, but it is {str(row)[:80]!r}")
    is_correct("\\sqrt{2}", "\\sqrt{3}")  # starts a worker: the start is not part of the speed
    with open(f"{out}.partial", "w", encoding="utf-8") as file:  # opened first: a wrong path costs no time
        started = time.perf_counter()
        answers = [extract_answer(row["response"]) for row in rows]
        verdicts = grade(list(zip(answers, (row["gold"] for row in rows))))
        seconds = time.perf_counter() - started
        for answer, (is_right, how) in zip(answers, verdicts):
            file.write(json.dumps(dict(correct=is_right, answer=answer, how=how)) + "\n")
    os.replace(f"{out}.partial", out)
    hows = Counter(how for _, how in verdicts)
    right = sum(is_right for is_right, _ in verdicts)
    print(f"{right} of {len(rows)} right ({right / max(len(rows), 1):.1%}); decided by " +
          ", ".join(f"{how} {count}" for how, count in hows.most_common()) +
          f"; {len(rows) / seconds:.0f} checks per second; the verdicts are in {out}")
    return verdicts
