"""plumbing/data.py - problems from files and from the hub, whatever their columns are called.

    {"question": "3 + 4?", "answer": "3 + 4 = <<3+4=7>>7\\n#### 7"}      GSM8K
    {"prompt": [{"role": "user", "content": "3 + 4?"}],                  verl, DAPO-Math
     "reward_model": {"ground_truth": "7"}}
    {"conversations": [{"from": "human", "value": "3 + 4?"},             ShareGPT
                       {"from": "gpt", "value": "So \\\\boxed{7}."}]}

Each of these becomes a problem (a text or chat messages), the answer "7", and a worked solution if there is
one. An answer that is read wrongly makes every reward 0, and nothing else would show it. So a row that is not
understood is refused. The message names source, row and column, and says what to do.

Read in this order: COLUMNS, read_problems, read_fields, read_answer, find_answer. The second part makes
chats and boxed solutions. The last part turns a source into rows.
"""

import ast
import csv
import json
import math
import numbers
import os
import re

from plumbing.grading import extract_answer, read_json_rows

HUB = {"math500": "HuggingFaceH4/MATH-500::test", "gsm8k": "openai/gsm8k:main:test",
       "gsm8k-train": "openai/gsm8k:main:train", "aime2024": "Maxwell-Jia/AIME_2024::train",
       "aime2025": "math-ai/aime25::test"}
FILES = (".jsonl", ".json", ".csv", ".parquet")

# The columns in which public data keep each field of a problem. If a row has several of them, the first that
# is not empty counts. Names may be in upper or lower case. verl keeps ground_truth inside its column
# reward_model.
COLUMNS = dict(
    problem=("problem", "question", "query", "prompt", "messages", "conversation", "conversations"),
    solution=("solution", "response", "completion", "generated_solution"),
    answer=("answer", "final_answer", "ground_truth_answer", "expected_answer", "ground_truth"),
    step_map=("step_map",))
# A chat message has a role and a content. ShareGPT calls them "from" and "value". Two of its roles
# have other names.
ROLES = dict(human="user", gpt="assistant")

# How a solution without a box ends: in GSM8K with the line "#### 72". MetaMathQA has "The answer is: 72"
# instead of this line, or as one more line after it. A line of three or five hashes is only a heading.
END = r"(?m)(?:^####(?!#)[^\n]*\n)?^(?:####(?!#)|The answer is:) *([^\n]+?)\s*\Z"
LIST_TEXT = r"(?s)\s*\[\s*(['\"])(.*)\1\s*\]\s*"  # a list that was written as a text: "['34']"
MAX_ANSWER = 200  # characters: a longer text is a solution, not an answer
NO_ANSWER = ("proof", "notfound")  # what NuminaMath-1.5 writes in place of an answer


# ------------------------------------------------------------------------------------------------------------
# From rows to problems.


def read_problems(source, needs_answer=True):
    """The problems of a source -> (dicts with the fields of eval_math.Problem, number of rows skipped).

    source: a local file, a local folder in the hub's layout, or a data set on the hub. needs_answer: rows
    without an answer are skipped, and a source without any answer is refused. Without needs_answer an answer
    may be "". It may also be a list or an object: a reward function of the user's gets it as JSON text.
    Raises FileNotFoundError or ValueError.
    """
    rows = read_file(source) if os.path.isfile(source) else read_set(source)
    if not rows:
        raise ValueError(f"{source} holds no problems: it has no rows. Give another file or split")
    problems = [read_fields(row, f"{source}, row {number}", needs_answer)
                for number, row in enumerate(rows, 1)]
    answered = [problem for problem in problems if problem["answer"] or not needs_answer]
    if not answered:
        raise ValueError(f"{source}, row 1: no answer; columns are {', '.join(rows[0])}: write it in "
                         f"\\boxed{{}} in the solution, or rename a column to one of "
                         f"{', '.join(COLUMNS['answer'])}")
    return answered, len(problems) - len(answered)


def read_fields(row, where, needs_answer):
    """One row -> dict with problem, answer, solution, step_map.

    where: source and row, for messages. A missing answer is "". Raises ValueError for every other fault.
    """
    if not isinstance(row, dict) or None in row:  # a key None: a CSV line has more cells than columns
        raise ValueError(f"{where}: not an object with named columns: {str(row)[:80]!r}. Write one JSON "
                         "object per row; in a CSV file, put quotes around a cell that holds a comma")
    columns = {name.strip().lower(): cell for name, cell in row.items()}
    if isinstance(columns.get("reward_model"), dict):
        columns |= columns["reward_model"]
    cells = {}
    for field, usual in COLUMNS.items():
        name = next((name for name in usual if not is_empty(columns.get(name))), None)
        cells[field] = columns.get(name), f"{where}, column {name}"
    problem, response = read_prompt(*cells["problem"])
    solution = read_solution(*cells["solution"]) or response
    answer = read_answer(*cells["answer"], needs_answer)
    written = cells["answer"][0]
    if is_empty(written):  # without a column for the answer, it is what the solution states
        answer = find_answer(solution)
    elif not solution and isinstance(written, str):
        is_worked = len(written) > len(answer) + 20 or "\n####" in written.strip()
        solution = written if is_worked else ""  # GSM8K's column "answer" holds the whole solution
    if not problem:
        raise ValueError(f"{where}: no problem; columns are {', '.join(row)}: rename a column in the data to "
                         f"one of {', '.join(COLUMNS['problem'])}")
    steps = read_step_map(*cells["step_map"])
    return dict(problem=problem, answer=answer, solution=solution, step_map=steps)


def is_empty(cell):
    """Whether a cell is empty. NaN and infinity count as empty, too."""
    is_nan = isinstance(cell, float) and not math.isfinite(cell)
    return cell is None or is_nan or cell in ([], {}) or isinstance(cell, str) and not cell.strip()


def as_text(cell, place, remedy="write one text"):
    """A text, a number, or a list with one of these -> str, "" if empty. ValueError for anything else."""
    while isinstance(cell, list) and len(cell) == 1:
        cell = cell[0]
    if is_empty(cell):
        return ""
    if not isinstance(cell, (str, numbers.Number)):
        raise ValueError(f"{place}: {str(cell)[:80]!r} is neither one text nor one number: {remedy}")
    return str(cell)


def read_prompt(cell, place):
    """The cell of the problem -> (text or chat messages, the response at the end of the chat or "")."""
    if isinstance(cell, str) and re.match(r"\s*\[\s*\{", cell):  # a CSV file has chats as texts
        for parse in (json.loads, ast.literal_eval):  # pandas writes them in Python's spelling
            try:
                cell = [read_message(message, place) for message in parse(cell)]
                break
            except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
                pass
        else:  # maybe a problem whose text begins like a list
            if re.match(r"\s*\[\s*\{\s*['\"]role['\"]", cell):
                raise ValueError(f"{place}: {cell[:80]!r} is a chat that is not JSON: save the data as "
                                 "JSON Lines or parquet")
    if isinstance(cell, str) or is_empty(cell):
        return as_text(cell, place), ""
    messages = cell if isinstance(cell, list) else [cell]
    chat = [read_message(message, place) for message in messages]
    # If a chat ends with a message of the assistant, that message is the solution. The assistant's earlier
    # messages stay in the prompt.
    response = chat.pop()["content"] if chat[-1]["role"] == "assistant" else ""
    if not any(message["role"] == "user" and message["content"].strip() for message in chat):
        raise ValueError(f"{place}: no message of the user asks anything: add one, or delete the row")
    return chat, response


def read_message(message, place):
    """A chat message, in the usual spelling or in ShareGPT's -> dict(role, content)."""
    found = message if isinstance(message, dict) else {}
    role = found.get("role", found.get("from"))
    content = found.get("content", found.get("value"))
    if not isinstance(role, str) or not isinstance(content, str) or found.get("tool_calls"):
        raise ValueError(f"{place}: {str(message)[:80]!r} is neither a text nor a chat message (calls of "
                         "tools are not read): write one problem per row, a text in quotes or "
                         '[{"role": "user", "content": "..."}]')
    if found.get("reasoning_content"):  # as a template of a thinking model would write it
        content = f"<think>\n{found['reasoning_content']}\n</think>\n\n{content}"
    return dict(role=ROLES.get(role, role), content=content)


def read_solution(cell, place):
    """The cell of the solution -> str. It is a text or a chat message.

    Of a list of texts the first counts. Of a list of messages it is the last.
    """
    if isinstance(cell, list) and cell:
        cell = cell[-1] if isinstance(cell[0], dict) else cell[0]
    return as_text(read_message(cell, place)["content"] if isinstance(cell, dict) else cell, place)


def read_step_map(cell, place):
    """The cell of the step map -> list of int, or None if it is empty."""
    if is_empty(cell):
        return None
    if not isinstance(cell, list) or not all(isinstance(step, int) for step in cell):
        raise ValueError(f"{place}: {str(cell)[:80]!r} is not a list of whole numbers: write one for each "
                         "token of the solution, or leave the column out")
    return cell


def read_answer(cell, place, needs_answer):
    """The cell of the answer -> the answer, "" if there is none."""
    if isinstance(cell, (list, dict)) and not needs_answer:
        return json.dumps(cell, ensure_ascii=False, default=str)  # the tests of a program, for example
    # "['34']" becomes the list ["34"], and as_text takes its only item.
    as_list = re.fullmatch(LIST_TEXT, cell) if isinstance(cell, str) else None
    items = re.split(r"['\"]\s*,\s*['\"]", as_list[2].replace("\\\\", "\\")) if as_list else []
    is_python = len(items) == 1 and as_list[1] == "'"  # ["..."] is JSON, which a user's reward may want
    if needs_answer and items or is_python:
        cell = items
    text = as_text(cell, place, "write one answer, give the name "
                   f"{COLUMNS['answer'][0]!r} to a column that holds one, or use a reward of your own "
                   "(--reward)").strip()
    if needs_answer and text.lower() in NO_ANSWER:  # else \boxed{proof} would earn 1
        return ""
    is_solution = "\\boxed" in text or "####" in text or re.search(END, text)
    if is_solution or needs_answer and len(text) > MAX_ANSWER:
        return find_answer(text) or ("" if needs_answer else text)
    return text


def find_answer(text):
    """The answer in the last \\boxed{}, or else the one that the last line states (see END), or ""."""
    end = re.search(END, text)
    return (extract_answer(text) or "").strip() or (end[1].strip() if end else "")


# ------------------------------------------------------------------------------------------------------------
# From problems to chats and boxed solutions.


def as_chat(problem, instruction):
    """A text or chat messages -> new chat messages. The instruction follows the user's last message.

    An instruction that asks for a \\boxed{} is left out if a message of the data already asks for one.
    """
    chat = [{"role": "user", "content": problem}] if isinstance(problem, str) else list(problem)
    asked = [message["content"] for message in chat if message["role"] != "assistant"]
    if "\\boxed" not in instruction or "\\boxed" not in "".join(asked):
        last = max(i for i, message in enumerate(chat) if message["role"] == "user")
        chat[last] = chat[last] | dict(content=chat[last]["content"] + instruction)
    return chat


def boxed_solution(text):
    """If a solution ends as those of GSM8K do, puts its answer into a \\boxed{}. Others stay the same.

    "48/2 = <<48/2=24>>24 clips.\\n#### 24" -> "48/2 = 24 clips.\\nThe answer is \\boxed{24}."
    """
    end = re.search(END, text)
    if not end or "\\boxed" in text:
        return text
    # <<48/2=24>> told a calculator of GSM8K's authors what to compute. It is no part of the text.
    work = re.sub(r"<<[^<>]*>>", "", text[:end.start()])
    return f"{work}The answer is \\boxed{{{end[1]}}}."


# ------------------------------------------------------------------------------------------------------------
# From a source to rows: lists of dicts.


def read_set(source):
    """The rows of a local folder or of a data set on the hub. FileNotFoundError if `source` names neither."""
    name, config, split = (HUB.get(source, source) + "::").split(":")[:3]
    # "data/mistyped.csv" looks like a hub id, and so does "data/mistyped" beside a folder data/. Neither
    # should be looked for on the hub.
    is_path = name.endswith(FILES) or os.path.isdir(os.path.dirname(name))
    is_id = source in HUB or re.fullmatch(r"\w[\w.-]*/[\w.-]+", name) and not is_path
    if not is_id and not os.path.isdir(name):
        raise FileNotFoundError(f"no data file {source!r}: no such file or folder, and no hub id. Hub ids "
                                f"are {', '.join(HUB)}, and owner/name[:config[:split]] if there is no local "
                                "folder called owner")
    import datasets  # not at the top of the file: it takes a second, and most runs do not need it
    try:
        return list(datasets.load_dataset(name, config or None, split=split or "train"))
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise ValueError(f"{source}: this is no file, and it could not be read as a folder or a hub id "
                         f"(name:config:split): {error}") from None


def read_file(path):
    """The rows of one file. The ending of its name says its kind. ValueError says what is broken."""
    ending = os.path.splitext(path)[1].lower()
    if ending not in FILES:
        raise ValueError(f"{path}: the name must end in {', '.join(FILES)}")
    try:
        if ending == ".parquet":  # read directly: `datasets` would first copy it into a cache
            import pyarrow.parquet  # not at the top, as above
            return pyarrow.parquet.ParquetFile(path).read().to_pylist()
        if ending == ".csv":
            csv.field_size_limit(1 << 30)  # solutions may be long
            with open(path, encoding="utf-8-sig", newline="") as file:  # -sig: maybe with a byte order mark
                return [row for row in csv.DictReader(file, strict=True) if any(row.values())]
    except (ValueError, OSError, csv.Error) as error:
        raise ValueError(f"{path}: {error}: write the file as UTF-8, a CSV file with commas") from None
    return read_json_rows(path)
