"""plumbing/data.py - problems from files and from the hub, whatever their columns are called."""

import os
import re

import datasets

from plumbing.grading import extract_answer, read_json_rows

HUB = {"math500": "HuggingFaceH4/MATH-500::test", "gsm8k": "openai/gsm8k:main:test",
       "gsm8k-train": "openai/gsm8k:main:train", "aime2024": "Maxwell-Jia/AIME_2024::train"}
COLUMNS = dict(problem=("problem", "question", "prompt", "messages"),
               answer=("answer", "final_answer", "solution", "response"),
               solution=("solution", "response"))


def read_rows(source):
    """The rows of a local file or hub data set, as dicts."""
    # A local file first, by the end of its name; then a name or an id of the hub.
    if os.path.isfile(source):
        if source.endswith((".json", ".jsonl")):
            return read_json_rows(source)
        if source.endswith(".parquet"):
            return list(datasets.Dataset.from_parquet(source, cache_dir=None))
        raise ValueError(f"{source}: the name must end in .jsonl, .json or .parquet")
    # "folder/missing.jsonl" looks like a hub id: a missing file should not be looked for on the hub.
    is_file_name = source.endswith((".json", ".jsonl"))
    is_id = not is_file_name and re.fullmatch(r"[\w.-]+/[\w.-]+(:[\w.-]*){0,2}", source)
    if source not in HUB and not is_id:
        raise FileNotFoundError(f"no data file {source!r}, and no name among {', '.join(HUB)}, "
                                "and not a hub id owner/name")
    # "openai/gsm8k:main:train" -> name, configuration, split; empty ones take the default.
    name, config, split = (HUB.get(source, source) + "::").split(":")[:3]
    return list(datasets.load_dataset(name, config or None, split=split or "train"))


def read_fields(row, where, given, needs_answer):
    """One row of a data set -> the fields of an eval_math.Problem, as a dict."""
    if not isinstance(row, dict):
        raise ValueError(f"{where}: not an object with named columns: {str(row)[:80]!r}")
    columns, found = {name.lower(): name for name in row}, {}
    for field_name, names in COLUMNS.items():
        # The first column with a usual name; case does not matter.
        name = given[field_name] or next((columns[n] for n in names if n in columns), None)
        if name is not None and name not in row:
            raise ValueError(f"{where}: no column {name!r}; it has {', '.join(row)}")
        # a column that is absent may be optional: see below
        found[field_name] = row[name] if name is not None else None
    problem, answer, solution = found["problem"], found["answer"], found["solution"]
    # {"messages": [...]}: the data of chat models.
    # a conversation that ends with the response; one that ends with a question is a prompt
    if isinstance(problem, list) and problem and problem[-1].get("role") == "assistant":
        # Earlier turns stay in the prompt.
        problem, solution = problem[:-1], problem[-1]["content"]
    answer = "" if answer is None else str(answer)
    if "####" in answer:  # GSM8K keeps the whole solution in its answer column
        solution = answer if solution is None else solution
        answer = answer.rsplit("####", 1)[1].strip()  # "... #### 18" -> "18"
    elif (boxed := extract_answer(answer)) is not None:
        answer = boxed
    elif needs_answer and answer == solution and not given["answer"] and len(answer) > 200:
        raise ValueError(f"{where}: the only answer is a text of {len(answer)} characters without a "
                         "\\boxed{}: name the column of the bare answer (--answer_column)")
    # Empty is as bad as absent: it would be an answer that no response can match.
    for name, value, is_needed in (("problem", problem, True), ("answer", answer.strip(), needs_answer)):
        if is_needed and not value:
            raise ValueError(
                f"{where}: no {name}; columns are {', '.join(row)}, looked for {', '.join(COLUMNS[name])}")
    return dict(problem=problem, answer=answer, solution="" if solution is None else str(solution),
                step_map=row.get("step_map"))
