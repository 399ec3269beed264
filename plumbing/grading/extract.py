"""plumbing/grading/extract.py - where the answer stands in a response.

The instruction asks for the answer in \\boxed{}. Only the last box counts, so a model may correct itself.
"""

import re

MAX_ANSWER = 1000  # characters: a longer answer is not read
BOX = re.compile(r"\\boxed(?=\s*\{)|\\boxed\s*(?=-?[\d.])|\\boxed\s+(?=-?[a-zA-Z]\b)")
# An escape is a backslash with the character behind it. It is matched first, so the brace in \} is no brace.
UNESCAPED_BRACE = re.compile(r"\\.|[{}]", re.DOTALL)
ANY_BRACE = re.compile(r"[{}]")


def extract_answer(response):
    """The text in the last \\boxed{...}, or behind a \\boxed without braces.

    None where there is no box, or where the last box is empty or unclosed. A box of more than MAX_ANSWER + 20
    characters counts as unclosed.
    """
    box = None
    for box in BOX.finditer(response):
        pass
    if box is None:
        return None
    text = response[box.end():box.end() + MAX_ANSWER + 20].lstrip()
    if not text.startswith("{"):  # "\boxed 5" or "\boxed 2$"
        return re.match(r"[^\s${}]*", text)[0].rstrip(".,;:!\\)") or None
    # In \boxed{\{1,2\}} the escaped braces are part of the answer. Some models close the box itself with an
    # escaped brace, as in \boxed{185\}. This reading is tried second.
    for braces in (UNESCAPED_BRACE, ANY_BRACE):
        depth = 0
        for match in braces.finditer(text):
            depth += {"{": 1, "}": -1}.get(match[0], 0)
            if depth == 0:
                answer = text[1:match.start()]
                return answer if answer.strip() else None
    return None
