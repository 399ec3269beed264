"""Laws of data: every public shape is read, and what is not understood is refused with its row."""

import csv
import decimal
import json
import os
import shutil
import sys
from pathlib import Path

import pytest
from conftest import FIXTURES, small_data

import eval_math
from eval_math import Problem
from plumbing import data, grading, runs
from plumbing.prompts import Prompting, encode_prompts

BOX = "\\boxed{5}"


def write(path, *rows):
    """JSON lines under a name -> the name, as text."""
    Path(path).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def load_problems(source, needs_answer=True):
    """Problems of a source."""
    return eval_math.load_problems(source, needs_answer)


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """An empty folder to work in."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def load_row(row, needs_answer=True):
    """One row -> its Problem."""
    problem, = load_problems(write("row.jsonl", row), needs_answer)
    return problem


# ------------------------------------------------------------------------------------- shapes of public sets


ASK = [{"role": "user", "content": "2+3?"}]
SHAREGPT = [{"from": "system", "value": "s"}, {"from": "human", "value": "2+3?"},
            {"from": "gpt", "value": BOX}]
SHAPES = {
    "MATH-500": {"problem": "2+3?", "solution": f"So {BOX}", "answer": "5", "level": 1},
    "AIME 2024": {"ID": "2024-I-1", "Problem": "2+3?", "Solution": "...", "Answer": 5},
    "GSM8K": {"question": "2+3?", "answer": "2+3 = <<2+3=5>>5 and so on\n#### 5"},
    "MetaMathQA": {"query": "2+3?", "response": "It adds up.\n#### 5\nThe answer is: 5"},
    "MetaMathQA, from MATH": {"query": "2+3?", "response": "We find 2 + 3 = 5.\nThe answer is: 5"},
    "OlympiadBench": {"question": "2+3?", "solution": ["So 5.", "Or 5."], "final_answer": ["5"]},
    "dLLM-RL": {"question": "2+3?", "ground_truth_answer": "5"},
    "OpenMathInstruct-2": {"problem": "2+3?", "generated_solution": "So 5.", "expected_answer": "5"},
    "DAPO-Math-17k": {"prompt": ASK, "reward_model": {"ground_truth": "5", "style": "rule"}},
    "DAPO-Math-17k, processed": {"prompt": "2+3?", "solution": "5", "source_prompt": ASK,
                                 "reward_model": {"ground_truth": "5", "style": "rule"}},
    "verl's GSM8K": {"prompt": ASK, "reward_model": {"style": "rule", "ground_truth": "5"},
                     "extra_info": {"answer": "2+3 = 5\n#### 5", "question": "2+3?"}},
    "Skywork-OR1": {"prompt": ASK, "reward_model": {"ground_truth": '["5"]'}},
    "a list in a csv": {"problem": "2+3?", "answer": "['5']"},
    "messages": {"messages": [*ASK, {"role": "assistant", "content": f"So {BOX}."}]},
    "ShareGPT": {"conversations": SHAREGPT},
    "OpenR1": {"problem": "2+3?", "answer": "5", "solution": "...", "messages": [*ASK, *ASK]},
    "TRL": {"prompt": ASK, "completion": [{"role": "assistant", "content": f"So {BOX}"}]},
    "prompt and completion": {"prompt": "2+3?", "completion": f"So {BOX}"},
    "one message": {"problem": ASK[0], "answer": [5]},
    "empty first column": {"problem": None, "question": "2+3?", "answer": "", "final_answer": "5"},
}


@pytest.mark.parametrize("name", SHAPES)
def test_the_shape_of_a_public_set_is_read(name):
    p = load_row(SHAPES[name])
    asked = p.problem if isinstance(p.problem, str) else p.problem[-1]["content"]
    assert asked == "2+3?" and grading.is_correct("5", p.answer) and p.answer.strip() == "5"


def test_chats_keep_their_turns_and_give_their_last_response():
    talk = [{"role": "system", "content": "s"}, *ASK, {"role": "assistant", "content": "4?"}, *ASK,
            {"role": "assistant", "content": f"No: {BOX}"}]
    p = load_row({"messages": talk})
    assert p.problem == talk[:-1] and p.solution == f"No: {BOX}" and p.answer == "5"
    p = load_row({"conversations": SHAREGPT})
    assert p.problem == [{"role": "system", "content": "s"}, *ASK] and p.solution == BOX
    p = load_row({"prompt": talk[:2], "answer": "4"})  # no response behind the question
    assert p.problem == talk[:2] and p.solution == "" and p.answer == "4"
    response = [{"role": "assistant", "content": "So 5."}]
    assert load_row({"prompt": ASK, "completion": response}, needs_answer=False).solution == "So 5."


def test_solutions_are_kept_as_they_are():
    assert load_row(SHAPES["GSM8K"]).solution == SHAPES["GSM8K"]["answer"]
    assert load_row(SHAPES["OlympiadBench"]).solution == "So 5."
    assert load_row({"problem": "2+3?", "answer": BOX}).solution == ""  # an answer alone is none
    p = load_row({"problem": "2+3?", "answer": f"We add both numbers, which gives {BOX}."})
    assert p.answer == "5" and p.solution.startswith("We add")
    assert load_row({"problem": "2+3?", "solution": "a", "step_map": [1]}, needs_answer=False).step_map == [1]


@pytest.mark.parametrize("name, answer", [
    ("gsm8k", "18"), ("math500", "\\left( 3, \\frac{\\pi}{2} \\right)"), ("aime2024", "204"),
])
def test_the_public_sets_load_as_their_owners_publish_them(name, answer):
    problems = load_problems(str(FIXTURES / f"data/{name}.jsonl"))
    assert len(problems) == 5 and problems[0].answer == answer and len(problems[0].problem) > 50
    assert name != "gsm8k" or "<<16-3-4=9>>" in problems[0].solution


def test_every_published_gold_answer_is_read_as_it_is():
    golds = json.loads((FIXTURES / "data/golds.json").read_text())
    for gold in golds:
        assert data.read_answer(gold, "", True) == gold.removeprefix("#### ").strip(), gold


# --------------------------------------------------------------------------------------- what is the answer


@pytest.mark.parametrize("text, answer", [
    ("It is so.\n#### 7\nThe answer is: 7", "7"),
    ("#### Step 1\nAdd.\n#### Step 2\nSo it is $\\boxed{5}$.", "5"),
    ("#### Step 1\nAdd.\n#### Conclusion\nIt all adds up.", ""),
    ("#### 1. Add\nIt all adds up.", ""), ("#### 2 Adding up\nIt all adds up.", ""),
    ("First \\boxed{5}.\n#### 7", "5"), ("##### 7 ##", ""), ("### 7", ""), ("So\n#### 1,200", "1,200"),
    ("So\n####7", "7"), ("So\n#### $18 dollars\n", "$18 dollars"), ("So\n#### -3.5", "-3.5"), ("#### 7", "7"),
    ("So\n#### \\frac{1}{2}", "\\frac{1}{2}"), ("So\n#### Monday", "Monday"), ("So\n####\n", ""),
    ("Empty \\boxed{}.\n#### 7", "7"), ("So\n#### \\text{no solution}", "\\text{no solution}"),
    ("The answer is clear.", ""), ("So it holds.\nThe answer is: 12", "12"), ("The answer is:\n12", ""),
    ("#### $x$-intercept\nWe add.", ""), ("#### (a) Find x\nWe add.", ""), ("Behind 7 #### 8", ""),
    ("So\n#### 3:00 p.m.", "3:00 p.m."), ("So\r\n#### 7\r\n", "7"), ("#### 7\nSo it is.", ""),
    ("No mark at all, only text.", ""), ("Unclosed \\boxed{5", ""), ("", ""),
])
def test_the_answer_of_a_solution(text, answer):
    assert data.find_answer(text) == answer


@pytest.mark.parametrize("answer", [
    "7", "1/2", "\\frac{1}{2}", "x = 1 or x = 2", "Monday", "no solution", "18 square feet", "x=1\ny=2",
    "The king of France is bald, as anybody can see who looks for him.", True, 0, 2.5,
])
def test_a_column_of_answers_is_taken_at_its_word(answer):
    assert load_row({"problem": "2+3?", "answer": answer}).answer == str(answer)


def test_a_long_text_without_a_mark_is_no_answer():
    with pytest.raises(ValueError, match="row 1: no answer"):
        load_row({"problem": "2+3?", "answer": "One and one " * 20 + "is 2"})


def test_rows_without_an_answer_are_skipped_and_counted(capsys):
    rows = [{"problem": "2+3?", "solution": f"So {BOX}."}, {"problem": "2+2?", "solution": "So \\boxed{}."},
            {"problem": "1+1?", "solution": "We add, and see that it is two. " * 9},
            {"problem": "1+2?", "solution": "We add."}]
    path = write("train.jsonl", *rows)
    assert [p.problem for p in load_problems(path)] == ["2+3?"]
    assert "train.jsonl: skipped 3 rows without an answer" in capsys.readouterr().out
    assert data.read_problems(path)[1] == 3
    numina = write("numina.jsonl", {"problem": "a?", "answer": "proof"}, {"problem": "b?", "answer": "2"})
    assert [p.problem for p in load_problems(numina)] == ["b?"]
    with pytest.raises(ValueError, match="rest.jsonl, row 1: no answer"):  # not one is left
        load_problems(write("rest.jsonl", *rows[1:]))
    assert len(load_problems(path, needs_answer=False)) == 4


def test_a_box_without_braces_is_read():
    assert load_row({"problem": "2+3?", "solution": "We get $\\boxed 5$."}).answer == "5"


@pytest.mark.parametrize("nothing", ["NaN", "Infinity", "null", '""', '" "', "[]", "[NaN]", '[""]'])
def test_nothing_is_no_answer_however_it_is_written(nothing, capsys):
    write("a.jsonl", {"problem": "2+3?", "answer": "nothing"}, {"problem": "1?", "answer": "1"})
    Path("a.jsonl").write_text(Path("a.jsonl").read_text().replace('"nothing"', nothing))
    assert [p.problem for p in load_problems("a.jsonl")] == ["1?"]
    assert "a.jsonl: skipped 1 rows without an answer" in capsys.readouterr().out


# ------------------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize("answer, shown", [
    (["5", "6"], "'5', '6'"), ({"value": "5"}, "value"), ([["5", "6"]], "5"), ('["5", "6"]', "5"),
    ("['5', '6']", "5"),
])
def test_a_list_or_an_object_is_no_answer_for_the_grader(answer, shown):
    message = f"row.jsonl, row 1, column answer: .*{shown}.*write one answer.*--reward"
    with pytest.raises(ValueError, match=message):
        load_row({"problem": "2+3?", "answer": answer})
    text = load_row({"problem": "2+3?", "answer": answer}, needs_answer=False).answer
    assert text == answer if isinstance(answer, str) else json.loads(text) == answer


def test_a_reward_of_ones_own_gets_the_text_of_its_column():
    for text in ("assert f(1) == 2  # the answer is 5", "a long essay " * 99, "5"):
        assert load_row({"problem": "f?", "answer": text}, needs_answer=False).answer == text.strip()
    row = {"problem": "f?", "answer": ["assert f(1) == 2"]}
    assert load_row(row, needs_answer=False).answer == '["assert f(1) == 2"]'
    assert load_row({"problem": "f?"}, needs_answer=False).answer == ""


@pytest.mark.parametrize("problem", [
    12, 1.5, True, ["a", "b"], {"role": ["user"], "content": ["2+3?"]}, {"text": "2+3?"}, [["2+3?", "x"]],
    [{"role": "user", "content": None}], [{"role": "user", "content": [{"type": "image", "url": "x"}]}],
    [{"role": "system", "content": "s"}], [{"role": "assistant", "content": "2+3?"}], [*ASK, "2+3?"],
    [{"value": "2+3?"}], [{"role": "user", "content": " "}], [ASK, ASK], [*ASK, None],
])
@pytest.mark.parametrize("column", ["problem", "messages"])
def test_a_problem_of_an_unknown_shape_is_refused_with_its_row(problem, column):
    rows = [{column: "1+1?", "answer": "2"}, {column: problem, "answer": "5"}]
    with pytest.raises(ValueError, match=rf"(?s)bad.jsonl, row 2, column {column}: .*(write|add|delete)"):
        load_problems(write("bad.jsonl", *rows))


@pytest.mark.parametrize("steps", [5, "1 2", [1.5], {"a": 1}, ["1"]])
def test_a_step_map_is_a_list_of_whole_numbers(steps):
    with pytest.raises(ValueError, match="row 1, column step_map: .* is not a list of whole numbers"):
        load_row({"problem": "1?", "answer": "1", "step_map": steps})
    assert load_row({"problem": "1?", "answer": "1", "step_map": []}).step_map is None


@pytest.mark.parametrize("content, message", [
    ('{"problem": "1+1=", "answer": "2"}\n{"problem": \n', "line 2: broken JSON"),
    ('{"problem": "1+1="}\n', "row 1: no answer"), ("\n", "no problems"),
    ('{"problem": "1+1=", "answer": "2"}\n[1]\n', "row 2: not an object"),
    ('{"problem": "1+1=", "answer": "2"}\n{"text": "1", "answer": "2"}\n',
     "row 2: no problem; columns are text, answer"),
    ('{"problem": "1+1=", "answer": ""}\n', "row 1: no answer"),
    ('{\n  "data": []\n}', "line 1: broken JSON .*write one object per line, or one array of objects"),
    (json.dumps({"problem": "1+1=", "solution": "One and one " * 20 + "is 2."}),
     "row 1: no answer; columns are problem, solution: write it in .* the solution, or rename"),
    ('{"question": ["a", "b"], "answer": ["1", "2"]}', "row 1, column question: 'a' is neither a text nor a"),
    ('{"train": [{"problem": "1"}], "test": [{"problem": "1"}]}', "no problem; columns are train, test"),
    ('[{"problem": "1+1=", "answer": "2"}', "Expecting"),
    ('{"problem": 1' + "0" * 5000 + "}", "line 1: broken JSON"),
])
def test_a_broken_data_file_is_named_with_its_row(content, message):
    Path("data.jsonl").write_text(content)
    with pytest.raises(ValueError, match=f"data.jsonl.*{message}"):
        load_problems("data.jsonl")


def test_a_column_with_an_uncommon_name_is_to_be_renamed():
    for row, message in [
            ({"text": "2+3?", "answer": "5"}, "problem; columns are text, answer: .* one of problem, question"),
            ({"problem": "2+3?", "gold": "5"}, "answer; columns are problem, gold: .* one of answer, final_")]:
        with pytest.raises(ValueError, match=f"row 1: no {message}"):
            load_row(row)


# ---------------------------------------------------------------------------------------------------- sources


ROWS = [{"question": "1+1", "answer": "2", "level": 3}, {"question": "2+2", "answer": "4", "level": 1}]
READ = [("1+1", "2"), ("2+2", "4")]


def pairs(source):
    return [(p.problem, p.answer) for p in load_problems(str(source))]


def write_all_kinds():
    """ROWS in every kind of file -> their names."""
    import pyarrow
    import pyarrow.parquet
    lines = "\n".join(map(json.dumps, ROWS))
    texts = {"a.jsonl": lines, "b.jsonl": json.dumps(ROWS), "c.jsonl": json.dumps(ROWS, indent=1),
             "d.json": json.dumps(ROWS), "e.json": lines,
             "f.csv": "question,answer,level\r\n1+1,2,3\r\n2+2,4,1\r\n"}
    for name, text in texts.items():
        Path(name).write_text(text)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), "g.parquet")
    return [*texts, "g.parquet"]


def test_every_kind_of_file_is_read():
    for name in write_all_kinds():
        assert pairs(name) == READ, name


def test_tables_hold_texts_of_several_lines_and_of_any_length():
    with open("t.csv", "w", newline="") as file:
        rows = [["problem", "answer", "solution"], ["a, b?\n\"c\"", "1/2", "x" * 200_000]]
        csv.writer(file).writerows(rows)
    problem, = load_problems("t.csv")
    assert (problem.problem, problem.answer, len(problem.solution)) == ("a, b?\n\"c\"", "1/2", 200_000)
    Path("more.csv").write_text("problem,answer\n1+1,2\nWhat is 1,2?,3\n")
    with pytest.raises(ValueError, match="more.csv, row 2: not an object with named columns"):
        load_problems("more.csv")


def test_text_files_of_every_kind_are_read_or_named():
    row = json.dumps({"problem": "a\u2028b", "answer": "2"}, ensure_ascii=False)
    Path("data.jsonl").write_text(f"\ufeff{row}\n{row}\n", encoding="utf-8")
    assert [p.problem for p in load_problems("data.jsonl")] == ["a\u2028b"] * 2
    Path("latin.jsonl").write_bytes('{"problem": "é", "answer": "2"}'.encode("latin-1"))
    with pytest.raises(ValueError, match="latin.jsonl is not UTF-8 text"):
        load_problems("latin.jsonl")
    Path("list.json").write_text('[{"problem": "1"')
    with pytest.raises(ValueError, match="list.json.*broken JSON"):
        load_problems("list.json")
    for name in ("a.parquet", "a.csv", "a.jsonl.gz", "a.xyz"):
        Path(name).write_text("none of these")
        with pytest.raises(ValueError, match=name):
            load_problems(name)


def test_a_parquet_file_is_read_itself_and_never_from_a_cache(monkeypatch):
    import pyarrow
    import pyarrow.parquet
    monkeypatch.setenv("HF_HOME", "/proc/nowhere")
    for answer in ("1", "2", float("nan")):
        rows = [dict(question="q", answer=answer), dict(question="r", answer=answer)]
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), "p.parquet")
        os.utime("p.parquet", (1e9, 1e9))  # the same path, the same time, other content
        if answer in ("1", "2"):
            assert pairs("p.parquet") == [("q", answer), ("r", answer)]
    with pytest.raises(ValueError, match="p.parquet, row 1: no answer"):
        load_problems("p.parquet")


def test_a_folder_in_the_hubs_layout_is_read(tmp_path):
    import pyarrow
    import pyarrow.parquet
    Path("set/data").mkdir(parents=True)
    for split, rows in (("train", ROWS), ("test", ROWS[:1])):
        table = pyarrow.Table.from_pylist(rows)
        pyarrow.parquet.write_table(table, f"set/data/{split}-00000-of-00001.parquet")
    for source in ("./set", f"{tmp_path}/set", "set", "set/"):
        assert pairs(source) == READ and pairs(f"{source}::test") == READ[:1]
    with pytest.raises(ValueError, match="set::dev: this is no file, and it could not be read as a folder .*dev"):
        load_problems("./set::dev")
    shutil.rmtree("set/data")
    write("set/train.jsonl", *ROWS[1:])  # no old rows from a cache
    assert pairs("./set") == READ[1:]


def test_a_mistyped_path_is_not_looked_for_on_the_hub(monkeypatch):
    Path("checkpoints").mkdir()
    monkeypatch.setitem(sys.modules, "datasets", None)
    for source in ("nowhere.jsonl", "folder/nowhere.jsonl", "nowhere", "data/x.parquet", "data/x.csv", "./x",
                   "checkpoints/step-45", "/x/y", "../x", "x/y.csv::a", "checkpoints/mine::test"):
        with pytest.raises(FileNotFoundError, match=f"'{source}': no such file or folder, and no hub id"):
            load_problems(source)


def test_what_is_not_on_the_hub_is_no_file_either(monkeypatch):
    import datasets
    for error in (ConnectionError("Couldn't reach"), FileNotFoundError("doesn't exist on the Hub"),
                  ValueError("BuilderConfig 'a' not found. Available: ['main']")):
        def fail(name, config, split, error=error):
            assert (name, config, split) == ("owner/name", "a", "train")
            raise error

        monkeypatch.setattr(datasets, "load_dataset", fail)
        with pytest.raises(ValueError, match=f"owner/name:a: this is no file, .*: {str(error)[:30]}"):
            load_problems("owner/name:a")


# ------------------------------------------------------------------------------ prompts, solutions, repeats


class Recorder:
    """A tokenizer whose tokens are the characters of the messages."""

    chat_template = "any"

    def apply_chat_template(self, chats, **_):
        return ["|".join(f"{message['role']}:{message['content']}" for message in chat) for chat in chats]

    def __call__(self, texts, add_special_tokens=True):
        return type("Encoding", (), dict(input_ids=[list(text) for text in texts]))


def prompt(problem, **settings):
    """The text that encode_prompts makes of a problem."""
    (p,), _ = encode_prompts([Problem(problem, "5")], Recorder(), Prompting(**settings))
    return "".join(p.tokens)


def test_every_prompt_asks_for_the_box_once():
    ask = Prompting().instruction
    assert prompt("2+3?") == f"user:2+3?{ask}"
    assert prompt(ASK) == f"user:2+3?{ask}" and ASK == [{"role": "user", "content": "2+3?"}]
    talk = [{"role": "system", "content": "s"}, *ASK, {"role": "assistant", "content": BOX}, *ASK]
    before = json.dumps(talk)
    assert prompt(talk) == f"system:s|user:2+3?|assistant:{BOX}|user:2+3?{ask}" and json.dumps(talk) == before
    for boxed in ("2+3? Put it in \\boxed{}.", [{"role": "user", "content": "2+3? Put it in \\boxed{}."}],
                  [{"role": "system", "content": "Put it in \\boxed{}."}, *ASK]):
        assert prompt(boxed).count("\\boxed") == 1
    assert prompt(ASK, instruction="") == "user:2+3?" and prompt(ASK, instruction=" Go.") == "user:2+3? Go."
    assert prompt(ASK, prompt_style="plain") == f"2+3?{ask}"


# Two rows of GSM8K's training split (MIT), as published.
GSM8K = [
    "Natalia sold 48/2 = <<48/2=24>>24 clips in May.\nNatalia sold 48+24 = <<48+24=72>>72 clips altogether "
    "in April and May.\n#### 72",
    "Weng earns 12/60 = $<<12/60=0.2>>0.2 per minute.\nWorking 50 minutes, she earned 0.2 x 50 = "
    "$<<0.2*50=10>>10.\n#### 10"]


def test_solutions_of_gsm8k_end_in_a_box_for_fine_tuning():
    assert [data.boxed_solution(text) for text in GSM8K] == [
        "Natalia sold 48/2 = 24 clips in May.\nNatalia sold 48+24 = 72 clips altogether in April and May.\n"
        "The answer is \\boxed{72}.",
        "Weng earns 12/60 = $0.2 per minute.\nWorking 50 minutes, she earned 0.2 x 50 = $10.\n"
        "The answer is \\boxed{10}."]
    for text in GSM8K:
        assert data.find_answer(data.boxed_solution(text)) == data.find_answer(text)
    assert data.boxed_solution("We add.\n#### 7\nThe answer is: 7") == "We add.\nThe answer is \\boxed{7}."
    for text in ("", "No mark.", f"#### Step 1\nSo {BOX}.", f"So {BOX}\n#### 5", "#### Add\nA."):
        assert data.boxed_solution(text) == text


def test_a_fingerprint_knows_other_data(tmp_path):
    small_data(tmp_path)
    problems = load_problems("train.jsonl")
    first = runs.mark(problems)
    assert first == runs.mark(load_problems("train.jsonl")) and len(first) == 12
    others = [problems[::-1], problems[1:]]
    for field, value in dict(problem="1+1=", answer="0", solution="s", tokens=[1]).items():
        changed = load_problems("train.jsonl")
        setattr(changed[7], field, value)
        others.append(changed)
    assert len({first, *map(runs.mark, others)}) == 7


def test_empty_rows_of_a_table_are_no_problems_and_a_short_solution_is_one(tmp_path):
    table = tmp_path / "rows.csv"
    table.write_text("problem,answer\n1+1=,2\n,\n")
    rows, _ = data.read_problems(str(table))
    assert [row["answer"] for row in rows] == ["2"]
    short = tmp_path / "short.jsonl"
    short.write_text('{"question": "3+4?", "answer": "3+4=7\\n#### 7"}\n{"question": "3+5?", "answer": "#### 8"}\n')
    rows, _ = data.read_problems(str(short))
    assert [row["solution"] for row in rows] == ["3+4=7\n#### 7", ""] and rows[0]["answer"] == "7"


def test_a_stated_answer_is_read_and_a_chat_that_is_no_json_is_refused(tmp_path):
    read = lambda row: data.read_fields(row, "set, row 1", True)
    assert read({"question": "2+3?", "answer": "The answer is: 5"})["answer"] == "5"
    assert read({" Question ": "2+3?", " answer": 5})["answer"] == "5"
    assert read({"question": "2+3?", "answer": decimal.Decimal("7.50")})["answer"] == "7.50"
    numpy_text = "[{'role': 'system', 'content': 'Add.'}\n {'role': 'user', 'content': '2+3?'}]"
    with pytest.raises(ValueError, match="row 1, column prompt: .* is a chat that is not JSON: save the data as"):
        read({"prompt": numpy_text, "answer": "5"})
    called = dict(role="assistant", content="", tool_calls=[1])
    with pytest.raises(ValueError, match="calls of tools are not read"):
        read({"messages": [dict(role="user", content="2+3?"), called], "answer": "5"})
    (tmp_path / "a.JSONL").write_text('{"question": "2+3?", "answer": "5"}\n')
    assert len(data.read_file(str(tmp_path / "a.JSONL"))) == 1
