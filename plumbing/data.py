"""plumbing/data.py - problems from files and from the hub, whatever their columns are called.

    {"question": "3 + 4?", "answer": "3 + 4 = <<3+4=7>>7\\n#### 7"}      GSM8K
    {"prompt": [{"role": "user", "content": "3 + 4?"}],                  verl, DAPO-Math
     "reward_model": {"ground_truth": "7"}}
    {"conversations": [{"from": "human", "value": "3 + 4?"},             ShareGPT
                       {"from": "gpt", "value": "So \\\\boxed{7}."}]}

Each of these becomes a problem (a text or chat messages), the answer "7", and a worked solution if there is
one. An answer that is read wrongly makes every reward 0, and nothing else would show it. So a row that is not
understood is refused. The message names source, row and column, and says what to do.

Read in this order: COLUMNS, read_problems, read_fields, read_answer, find_answer, bare_answer. The second
part serves prompts, solutions and tables. The last part turns a source into rows.
"""

import csv
import gzip
import hashlib
import io
import json
import math
import numbers
import os
import re
import tempfile
import zlib

from plumbing.grading import extract_answer

HUB = {"math500": "HuggingFaceH4/MATH-500::test", "gsm8k": "openai/gsm8k:main:test",
       "gsm8k-train": "openai/gsm8k:main:train", "aime2024": "Maxwell-Jia/AIME_2024::train"}
FILES = ("jsonl", "ndjson", "json", "parquet", "csv", "tsv")  # each may have .gz behind it
# What is taken for the name of a file, and so is never looked for on the hub.
FILE_NAME = r"(?i)\.(jsonl?|ndjson|parquet|[ct]sv|txt|arrow|gz|zip|zst|xz|bz2|xlsx?|pkl)$"

# The table of shapes: the columns in which public data keep the fields of a problem. The first that is not
# empty counts. Case does not matter. "reward_model.ground_truth" is a column inside a column.
COLUMNS = dict(
    problem=("problem", "question", "query", "prompt", "messages", "conversation", "conversations"),
    solution=("solution", "response", "completion", "generated_solution"),
    answer=("answer", "final_answer", "ground_truth_answer", "expected_answer", "ground_truth",
            "reward_model.ground_truth"),
    step_map=("step_map",))
# A chat message has a role and a content. ShareGPT calls them "from" and "value", and some roles otherwise.
ROLES = dict(human="user", gpt="assistant", chatgpt="assistant", bot="assistant", model="assistant")

# What announces the answer in a solution without a box. Three or five hashes are only headings.
MARKS = (r"(?<!#)####(?!#)", r"(?im)\bthe (?:final )?answer is:?|^\W*(?:final )?answer:")
# A word has two letters or more. LaTeX commands, and what stands in \text{}, are no words.
WORD = r"\\(?:text|mbox|mathrm)\w*\s*\{[^{}]*\}|\\[a-zA-Z]+|([a-zA-Z]{2,})"
# Signs that a line is no answer: "So it is 5", "5 is even.", "Step 2", "2. Add", "2 Adding up", an empty box.
PROSE = (r"(?i:\b(?:is|are|we|so|the|thus|hence|step|case|part|proof|answer|conclusion|summary)\b)"
         r"|[a-z]{2}[.:]$|^\d+[.):]?\s+[A-Z][a-z]|\\boxed|####")
LIST_TEXT = r"(?s)\s*\[\s*(['\"])(.*)\1\s*\]\s*"  # a list that became a text: ["34"]
MAX_BARE = 200  # characters: a longer text without a mark is a solution, and no answer


class MissingAnswer(ValueError):
    """A row that has no answer. Such rows are skipped and counted, unless that is forbidden."""


# What a row without a problem, or without an answer, raises.
ERRORS = dict(problem=ValueError, answer=MissingAnswer)

# ------------------------------------------------------------------------------------------------------------
# From rows to problems.


def read_problems(source, problem_column=None, answer_column=None, needs_answer=True, strict=False):
    """The problems of a source -> (dicts with the fields of eval_math.Problem, number of rows skipped).

    needs_answer: rows without an answer are skipped, or refused if strict. A source without any is refused.
    Without needs_answer, an answer may be "", and a list or an object is handed on as JSON text: a reward
    function of one's own can read it. Raises FileNotFoundError or ValueError.
    """
    problems, missing, given = [], [], dict(problem=problem_column, answer=answer_column)
    for number, row in enumerate(read_rows(source), 1):
        where = f"{source}, row {number}"
        try:
            problems.append(read_fields(row, where, given, needs_answer))
        except MissingAnswer as error:
            missing.append(error)
    # A mistyped --answer_column is missing in every row. In MATH's training split a few rows have no answer.
    if missing and (strict or not needs_answer or not problems):
        raise missing[0]
    if not problems:
        raise ValueError(f"{source} holds no problems")
    return problems, len(missing)


def read_fields(row, where, given, needs_answer):
    """One row -> dict with problem, answer, solution, step_map.

    where: source and row, for messages. given: the names of columns that the user has named, by field.
    Raises MissingAnswer where a needed answer is missing, and ValueError for every other fault.
    """
    if not isinstance(row, dict) or None in row:  # None: more cells in a line of a table than it has names
        raise ValueError(f"{where}: not an object with named columns: {str(row)[:80]!r}")
    columns, cells = flatten(row), {}
    for field, usual in COLUMNS.items():
        name = given.get(field) or next((name for name in usual if not is_empty(columns.get(name))), None)
        if name and name not in columns:
            raise ERRORS[field](f"{where}: no column {name!r}; it has {', '.join(row)}")
        cells[field] = columns.get(name), f"{where}, column {name}"
    problem, response = read_prompt(*cells["problem"])
    solution = read_solution(*cells["solution"]) or response
    answer = read_answer(*cells["answer"], given.get("answer"), needs_answer)
    written = cells["answer"][0]
    if is_empty(written):  # no column of its own: the answer is what the solution arrives at
        answer = find_answer(solution) or bare_answer(solution) or ("" if needs_answer else solution.strip())
    elif not solution and isinstance(written, str) and len(written) > len(answer) + 20:
        solution = written  # GSM8K's column of the answer holds more than the answer and a box
    prose = f"; the only answer is a text of {len(solution)} characters without a \\boxed{{}}"
    for field, value, is_needed in (("problem", problem, True), ("answer", answer, needs_answer)):
        if is_needed and not value:
            raise ERRORS[field](f"{where}: no {field}; columns are {', '.join(row)}, looked for "
                                f"{', '.join(COLUMNS[field])}{prose if solution else ''}: name the column "
                                f"(--{field}_column)")
    steps = read_step_map(*cells["step_map"])
    return dict(problem=problem, answer=answer, solution=solution, step_map=steps)


def flatten(row):
    """{"Answer": "2", "a": {"b": 3}} -> the same columns, with "answer" and "a.b" as further names."""
    columns = dict(row)
    for name, cell in row.items():
        columns.setdefault(name.lower(), cell)
        inner = cell if isinstance(cell, dict) else {}
        columns |= {f"{name}.{inner_name}".lower(): inner_cell for inner_name, inner_cell in inner.items()}
    return columns


def is_empty(cell):
    """Whether a cell says nothing. NaN is what other programs write for nothing; no answer is infinite."""
    is_nan = isinstance(cell, float) and not math.isfinite(cell)
    return cell is None or is_nan or cell in ([], {}) or isinstance(cell, str) and not cell.strip()


def as_text(cell, place, remedy="write one text"):
    """A text, a number, or a list of one of these -> str; "" if empty. ValueError for everything else."""
    while isinstance(cell, list) and len(cell) == 1:
        cell = cell[0]
    if not is_empty(cell) and not isinstance(cell, (str, numbers.Number)):
        raise ValueError(f"{place}: {str(cell)[:80]!r} is neither one text nor one number: {remedy}")
    text = "" if is_empty(cell) else str(cell)
    if re.search("[\ud800-\udfff]", text):  # half of an emoji, for example: no tokenizer takes it
        raise ValueError(f"{place}: {text[:80]!r} holds half of a character: mend or delete the row")
    return text


def read_prompt(cell, place):
    """The cell of the problem -> (text or chat messages, the response at their end or "")."""
    if isinstance(cell, list) and len(cell) == 1:
        cell = cell[0]
    if isinstance(cell, str) or is_empty(cell):
        return as_text(cell, place), ""
    messages = cell if isinstance(cell, list) else [cell]
    chat = [read_message(message, place) for message in messages]
    # A chat that ends with a message of the assistant: that is the solution. Earlier ones stay in the prompt.
    response = chat.pop()["content"] if chat[-1]["role"] == "assistant" else ""
    if not any(message["role"] == "user" and message["content"].strip() for message in chat):
        raise ValueError(f"{place}: no message of the user asks anything: add one, or delete the row")
    return chat, response


def read_message(message, place):
    """A chat message in either spelling -> dict(role, content)."""
    found = message if isinstance(message, dict) else {}
    role, content = found.get("role", found.get("from")), found.get("content", found.get("value"))
    if not isinstance(role, str) or not isinstance(content, str):
        raise ValueError(f"{place}: {str(message)[:80]!r} is neither a text nor a chat message: write one "
                         'problem per row, a text in quotes or [{"role": "user", "content": "..."}]')
    return dict(role=ROLES.get(role.lower(), role.lower()), content=as_text(content, place))


def read_solution(cell, place):
    """The cell of the solution -> str: a text, or a chat message; of several solutions the first."""
    while isinstance(cell, list) and cell:
        cell = cell[0]
    return as_text(read_message(cell, place)["content"] if isinstance(cell, dict) else cell, place)


def read_step_map(cell, place):
    """The cell of the step map -> list of int, or None if it is empty."""
    is_step_map = isinstance(cell, list) and all(isinstance(step, int) for step in cell)
    if not is_empty(cell) and not is_step_map:
        raise ValueError(f"{place}: {str(cell)[:80]!r} is not a list of whole numbers: write one for each "
                         "token of the solution, or leave the column out")
    return None if is_empty(cell) else cell


def read_answer(cell, place, is_given, needs_answer):
    """The cell of the answer -> the answer, or "". is_given: the user has named this column."""
    if isinstance(cell, (list, dict)) and not needs_answer:
        return json.dumps(cell, ensure_ascii=False, default=str)  # the tests of a program, for example
    as_list = re.fullmatch(LIST_TEXT, cell) if isinstance(cell, str) and needs_answer else None
    if as_list:
        cell = re.split(r"['\"]\s*,\s*['\"]", as_list[2].replace("\\\\", "\\"))
    text = as_text(cell, place, "name a column of one answer (--answer_column, for example "
                   "reward_model.ground_truth), or use a reward of your own (--reward)").strip()
    is_marked = "\\boxed" in text or "####" in text
    if not needs_answer and not is_marked:
        return text
    is_solution = is_marked or len(text) > MAX_BARE and not is_given
    return find_answer(text) or ("" if needs_answer and is_solution else text)


def find_answer(text):
    """The answer that a solution states, or "": in its last \\boxed{}; without one, behind the last mark."""
    answer = (extract_answer(text) or "").strip()
    for mark in MARKS:
        parts = re.split(mark, text)
        if not answer and len(parts) > 1:
            answer = bare_answer(parts[-1])
    return answer


def bare_answer(text):
    """The first line of a text if it looks like an answer, else "".

    7 and 18 dollars do, whatever follows. Monday does if nothing follows. Headings and sentences never do.
    """
    line, _, rest = text.strip().partition("\n")
    line = line.strip(" \t\r*")  # * is bold in Markdown
    num_words = sum(bool(word) for word in re.findall(WORD, line))
    # With something behind the line, words are allowed only behind a number: they are its unit.
    max_words = 3 if re.match(r"[-+$.]*\d", line) or not rest.strip() else 0
    is_answer = num_words <= max_words and len(line) <= MAX_BARE and not re.search(PROSE, line)
    return re.sub(r"(?<![a-zA-Z])\.$", "", line) if is_answer else ""


# ------------------------------------------------------------------------------------------------------------
# For prompts, solutions and tables.


def as_chat(problem, instruction):
    """A text or chat messages -> new chat messages, the last of the user's with the instruction.

    Where a message of the data already asks for a \\boxed{}, nothing is added.
    """
    chat = [{"role": "user", "content": problem}] if isinstance(problem, str) else list(problem)
    asked = [message["content"] for message in chat if message["role"] != "assistant"]
    if "\\boxed" not in instruction or "\\boxed" not in "".join(asked):
        last = max(i for i, message in enumerate(chat) if message["role"] == "user")
        chat[last] = chat[last] | dict(content=chat[last]["content"] + instruction)
    return chat


def boxed_solution(text):
    """A solution in GSM8K's style, as the instruction asks for it. Every other solution stays as it is.

    "48/2 = <<48/2=24>>24 clips.\\n#### 24" -> "48/2 = 24 clips.\\nThe answer is \\boxed{24}."
    """
    # MetaMathQA has one more line behind the mark: The answer is: 24. The new sentence replaces it.
    end = re.search(r"\s*(?<!#)####[ \t]*([^\n#]+?)\s*(\nThe answer is[^\n]*)?\s*$", text)
    if not end or not bare_answer(end[1]) or "\\boxed" in text:
        return text
    # <<48/2=24>> is for a calculator that the authors of GSM8K had beside their model.
    work = re.sub(r"<<[^<>]*>>", "", text[:end.start()])
    return f"{work}\nThe answer is \\boxed{{{bare_answer(end[1])}}}."


def fingerprint(problems):
    """A short hash of problems, answers, solutions and prompt tokens: other data give another one."""
    content = [(p.problem, p.answer, p.solution, p.step_map, p.tokens) for p in problems]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:12]


# ------------------------------------------------------------------------------------------------------------
# From a source to rows.


def read_rows(source):
    """The rows of a local file, a local folder in the hub's layout, or a set on the hub -> list of dicts."""
    try:
        return read_file(source) if os.path.isfile(source) else read_set(source)
    except ImportError as error:
        raise ValueError(f"{source}: {error}: pip install datasets, or give JSON lines") from None


def read_set(source):
    """The rows of a local folder, or of a set on the hub. FileNotFoundError where there is neither."""
    name, config, split = (HUB.get(source, source) + "::").split(":")[:3]
    is_folder = os.path.isdir(name)
    # "data/mistyped.csv" and "./mistyped" look like ids, and should not be looked for on the hub.
    is_id = re.fullmatch(r"[\w.-]+/[\w.-]+(:[\w.-]*){0,2}", source) and not re.search(FILE_NAME, name)
    if source not in HUB and not is_folder and (not is_id or os.path.isdir(os.path.dirname(name))):
        raise FileNotFoundError(f"no data file {source!r}: no such file or folder, and no hub id. Those are "
                                f"{', '.join(HUB)}, and owner/name[:config[:split]] unless owner is a folder")
    import datasets  # not at the top: JSON lines are read on machines without this library
    with tempfile.TemporaryDirectory() as cache:
        # A folder is read as it is now: the usual cache may be out of date, or on a disk that is read-only.
        settings = dict(streaming=True, cache_dir=cache) if is_folder else {}
        try:
            return list(datasets.load_dataset(name, config or None, split=split or "train", **settings))
        except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
            if is_folder or not isinstance(error, (FileNotFoundError, ConnectionError)):
                raise ValueError(f"{source} cannot be read as name:config:split ({error})") from None
            raise FileNotFoundError(
                f"{source}: no such file or folder, and not on the hub ({error})") from None


def read_file(path):
    """The rows of one file, by the end of its name. ValueError that names the file and what is broken."""
    opener = gzip.open if path.lower().endswith(".gz") else open
    kind = path.lower().removesuffix(".gz").rpartition(".")[2]
    if kind not in FILES:
        raise ValueError(f"{path}: the name must end in .{', .'.join(FILES)}, or in one of these and .gz")
    try:
        with opener(path, "rb") as file:
            content = file.read()
        if kind == "parquet":  # from the file itself: `datasets` would first copy it to a cache
            import pyarrow.parquet  # not at the top, as above
            return pyarrow.parquet.ParquetFile(io.BytesIO(content)).read().to_pylist()
        text = content.decode("utf-8-sig")  # -sig: with or without a byte order mark
        if kind in ("csv", "tsv"):
            csv.field_size_limit(1 << 30)  # solutions may be long
            lines = io.StringIO(text, newline="")
            return list(csv.DictReader(lines, delimiter="," if kind == "csv" else "\t", strict=True))
        return read_json(text)
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text ({error}): save it as UTF-8") from None
    except (ValueError, OSError, EOFError, zlib.error, csv.Error) as error:
        raise ValueError(f"{path}: {error}") from None


def read_json(text):
    """The rows of JSON lines, of one array, or of the one array in an object: {"data": [...]}."""
    try:
        whole = json.loads(text)
    except (ValueError, RecursionError):  # JSON lines, or broken
        is_array, whole = text.lstrip().startswith("["), []
        # not splitlines: JSON strings may hold U+2028
        for number, part in enumerate([text] if is_array else text.split("\n"), 1):
            try:
                if part.strip():
                    whole.append(json.loads(part))
            except (ValueError, RecursionError) as error:
                place = "" if is_array else f"line {number}: "
                raise ValueError(f"{place}broken JSON ({error})") from None
    if isinstance(whole, dict) and not set(flatten(whole)) & set(COLUMNS["problem"]):
        arrays = [value for value in whole.values() if isinstance(value, list) and value]
        whole = arrays[0] if len(arrays) == 1 and isinstance(arrays[0][0], dict) else whole
    return whole if isinstance(whole, list) else [whole]
