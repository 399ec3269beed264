"""Laws of the grader: what counts as the same answer, and that no text can hang, fill or run anything."""

import json
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from conftest import FIXTURES, ROOT

import eval_math
from plumbing import grading
from plumbing.grading import workers as grading_workers
from plumbing.grading import extract_answer, is_correct


@pytest.mark.parametrize("text, answer", [
    ("so \\boxed{12}", "12"), ("\\boxed{1} then \\boxed{\\frac{1}{2}}.", "\\frac{1}{2}"), ("\\boxed{}", None),
    ("no box: 12", None), ("\\boxed{12", None), ("\\boxed{1} and \\boxed{2", None), ("", None),
    ("\\boxed{{a}{b}}", "{a}{b}"), ("\\boxed{ }", None), ("\\boxed{5} or \\boxed{}", None),
    # an escaped brace is no brace, unless the box would not close without it
    ("\\boxed{\\sqrt{2} \\} 3}", "\\sqrt{2} \\} 3"),
    ("\\boxed{\\left\\{ x \\right.}", "\\left\\{ x \\right."),
    ("\\boxed{\\{1,2\\}}", "\\{1,2\\}"), ("\\boxed{185\\}", "185\\"), ("\\boxed{\\{1,2\\}", None),
    ("\\boxed{1\\\\}", "1\\\\"),
    # without braces
    ("is $\\boxed 5$.", "5"), ("so \\boxed 2$", "2"), ("\\boxed 12.", "12"), ("\\boxed -3 ", "-3"),
    ("\\boxed5", "5"), ("\\boxed" + 2000 * " " + "{5}", None),
    ("\\boxed x$", "x"), ("in a \\boxed way", None), ("the answer is \\boxed", None),
])
def test_the_answer_is_in_the_last_balanced_box(text, answer):
    assert extract_answer(text) == answer


def test_equal_numbers_are_equal_and_nothing_else_is():
    assert is_correct("12", "12") and is_correct("012", "12") and is_correct("12.0", "12")
    assert not any(is_correct(a, "12") for a in (None, "", "  ", "13", "1 2", "-12", "twelve", "11 or 12"))


def read(name):
    """The rows of a file of graded answers."""
    text = (FIXTURES / "grading" / name).read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def wrong_verdicts(rows):
    """The rows whose verdict is not the expected one: (right ones graded wrong, wrong ones graded right)."""
    verdicts = grading.grade([(extract_answer(row["response"]), row["gold"]) for row in rows])
    wrong = [row for row, (verdict, _) in zip(rows, verdicts) if verdict != row["expected"]]
    return [row for row in wrong if row["expected"]], [row for row in wrong if not row["expected"]]


def test_answers_of_every_kind_meet_their_bar():
    missed, rewarded = wrong_verdicts(read("kinds.jsonl"))
    assert rewarded == [] and len(missed) <= 0.03 * 96, missed


def test_our_own_answers_of_every_kind_are_graded_as_expected():
    rows = [row | dict(response=f"so $\\boxed{{{row['answer']}}}$.") for row in read("answers.jsonl")]
    assert len(rows) > 600 and wrong_verdicts(rows) == ([], [])


def pairs():
    """Pairs of every category. Where a model could learn to exploit it, no wrong answer may be rewarded."""
    return read("pairs.jsonl")


def test_the_grader_meets_its_bars_on_the_pairs():
    never = {"no_boxed", "empty_boxed", "unclosed_boxed", "reward_hack", "bases", "intervals", "thousands",
             "tuples", "negatives", "decimals", "sets_lists", "scientific", "mixed_numbers"}
    results = [(p, is_correct(extract_answer(p["response"]), p["gold"])) for p in pairs()]
    wrong = [(p["category"], p["gold"], p["response"], verdict) for p, verdict in results
             if verdict != p["expected"]]
    true = [(p, verdict) for p, verdict in results if p["expected"]]
    assert len(wrong) <= 0.01 * len(results), wrong
    assert sum(verdict for _, verdict in true) >= 0.98 * len(true), wrong
    assert not [p for p, verdict in results if verdict and not p["expected"] and p["category"] in never]


def style_variants(gold):
    yield gold
    yield f" {gold} "
    yield gold + "."
    yield gold.replace("\\frac", "\\dfrac")
    yield gold.replace("\\frac", "\\tfrac")
    yield f"${gold}$"
    yield f"\\displaystyle {gold}"
    yield "{" + gold + "}"
    if "\\left" not in gold:
        yield re.sub(r"(?<!\\)\(", r"\\left(", gold).replace(")", "\\right)")
    if re.fullmatch(r"[a-zA-Z ]+|[-\d.]+", gold):
        yield f"\\text{{{gold}}}"


def test_every_published_gold_answer_equals_itself_in_every_style():
    for gold in json.loads((FIXTURES / "data/golds.json").read_text()):
        for variant in style_variants(gold.removeprefix("#### ")):
            assert is_correct(extract_answer(f"so $\\boxed{{{variant}}}$"), gold), (variant, gold)


@pytest.mark.parametrize("answer, gold", [
    ("2^{-98}", "2^{-99}"), ("\\frac{1}{2^{99}}", "\\frac{1}{2^{98}}"), ("6.283185", "2\\pi"),
    ("0.3333333333", "\\frac{1}{3}"), ("204_6", "204_5"), ("204", "204_5"), ("(1,2]", "(1,2)"),
    ("(2,1)", "(1,2)"), ("1,2,3", "1,2"), ("1,2", "1,2,3"), ("1,2,3,4,5", "3"),
    ("3 or 4", "3"), ("3\\text{ or 4}", "3"), ("3\\text{ or } 4", "3"), ("\\text{the gold}", "3"),
    ("3+10^{-30}", "3"), ("\\sqrt{2}+10^{-20}", "\\sqrt{2}"), ("1 234", "1234"), ("1, 234", "1234"),
    ("3\\frac{1}{2}", "\\frac{31}{2}"), ("seat", "east"), ("|x|", "x"), ("\\sqrt{x^2}", "x"), ("x=5", "y=5"),
    ("-5", "5"), ("\\pm 5", "5"), ("5\\pm 0", "5"), ("\\text{5}6", "5"), ("\\frac{5}{0}", "5"), ("nan", "5"),
    ("\\infty", "5"), ("5\\infty", "5"), ("[1,2]", "\\{1,2\\}"),
    ("5\\text{ squared}", "5"), ("5\\text{ is wrong}", "5"), ("\\binom{n}{2}", "\\frac{n(n+1)}{2}"),
    ("-x=5", "x=5"), ("-x=5", "5"), ("|x|=5", "x=5"), ("\\sqrt{x}=5", "x=5"), ("y=2x+1", "-y=2x+1"),
    ("-x<x", "\\emptyset"), ("|x|\\le x", "\\mathbb{R}"), ("\\sqrt{x}<1", "x<1"),
    ("2/\\begin{pmatrix}2\\\\4\\end{pmatrix}", "\\begin{pmatrix}1\\\\2\\end{pmatrix}"),
])
def test_known_traps_are_wrong(answer, gold):
    assert not is_correct(answer, gold)


@pytest.mark.parametrize("answer, gold", [
    ("\\frac{3}{6}", "0.5"), ("2,1", "\\{1,2\\}"), ("3\\tfrac12", "\\frac{7}{2}"),
    ("10\\,080", "10,\\!080"), ("1+\\sqrt 2", "\\sqrt2+1"),
    ("\\begin{bmatrix}1\\\\2\\end{bmatrix}", "\\begin{pmatrix} 1 \\\\ 2 \\end{pmatrix}"),
    ("x\\in[-2,7]", "[-2,7]"), ("2\\ge x", "x\\le 2"), ("y=0.5x-3", "y=\\frac12 x-3"),
    ("\\cos^2 x", "1-\\sin^2 x"), ("-\\frac{1}{2}", "\\frac{-1}{2}"),
    ("4\\pm\\sqrt3", "4+\\sqrt3, 4-\\sqrt3"), ("5\\text{ cm}^2", "5"), ("$18", "18"), ("50\\%", "50"),
    ("(C)", "\\text{C}"), ("4210_5", "4210_{5}"), ("i+1", "1+i"), ("2 \\cdot 10^{3}", "2000"),
    ("(1,2) \\cup (3,4)", "(3,4)\\cup(1,2)"), ("\\binom{n}{2}", "\\frac{n(n-1)}{2}"),
    ("|AB|=5", "AB=5"), ("\\tan\\theta=2", "2"), ("f(2)=5", "5"), ("x=5", "5"), ("-x=-5", "x=5"),
    ("5²", "25"), ("10⁶", "1000000"), ("5²", "5^2"), ("2x<6", "x<3"), ("x<3", "(-\\infty,3)"),
    ("\\begin{pmatrix}2\\\\4\\end{pmatrix}/2", "\\begin{pmatrix}1\\\\2\\end{pmatrix}"),
])
def test_equal_answers_in_other_clothes_are_right(answer, gold):
    assert is_correct(answer, gold)


HOSTILE = """
import json, os, sys, resource, tempfile, time
sys.path.insert(0, sys.argv[1])
from plumbing import grading
from plumbing.grading import workers as grading_workers
canary, before, out = tempfile.mkdtemp(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, []
for line in open(sys.argv[2]):
    case = json.loads(line)
    text = "".join(s * n for s, n in case["build"]).replace("{canary}", canary)
    started = time.perf_counter()
    answer = grading.extract_answer(text if case["raw"] else f"The answer is \\\\boxed{{{text}}}")
    is_right = grading.is_correct(answer, case["gold"])
    out.append((case["id"], case["must"], is_right, time.perf_counter() - started))
grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
workers = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024
print(json.dumps([out, grown, os.listdir(canary), workers]))
"""


def test_hostile_answers_neither_hang_nor_grow_nor_run():
    done = subprocess.run([sys.executable, "-c", HOSTILE, str(ROOT), str(FIXTURES / "grading/hostile.jsonl")],
                          text=True, capture_output=True, timeout=60)
    assert done.returncode == 0, done.stderr
    results, grown_mib, canary, worker_mib = json.loads(done.stdout)
    assert len(results) > 40 and canary == [] and grown_mib < 100 and worker_mib < 1024
    for case, must, is_right, seconds in results:
        assert must == "any" or str(is_right).lower() == must, case
        assert seconds < 6, case  # 3 on a quiet machine


def test_verdicts_do_not_depend_on_order_batch_or_thread():
    cases = [(extract_answer(p["response"]), p["gold"]) for p in pairs()] * 2
    expected = [is_correct(*case) for case in cases]
    grading.WORKERS.ask.cache_clear()
    mixed = list(enumerate(cases))
    random.Random(0).shuffle(mixed)
    with ThreadPoolExecutor(8) as pool:
        got = dict(pool.map(lambda item: (item[0], is_correct(*item[1])), mixed))
    assert [got[i] for i in range(len(cases))] == expected
    grading.WORKERS.ask.cache_clear()
    assert [v for v, _ in grading.grade(cases)] == expected


def test_a_check_that_is_killed_is_wrong_and_counted_and_the_next_one_works(monkeypatch):
    workers = grading.Workers()
    assert workers.ask("x+1", "1+x") == (True, "expression")
    monkeypatch.setattr(grading.Workers, "WALL_SECONDS", 0.3)
    stuck = workers.idle.get() or workers.start()
    stuck.send_signal(signal.SIGSTOP)  # a worker that sleeps uses no CPU time, so only the wall clock ends it
    workers.idle.put(stuck)
    results = [workers.run("\\sqrt{5}", "\\sqrt{5}") for _ in range(4)]
    assert sorted(results) == [(False, "killed")] + [(True, "expression")] * 3 and workers.killed == 1


def test_a_worker_that_dies_while_idle_costs_nobody_a_verdict():
    workers = grading.Workers()
    assert workers.run("x+1", "1+x") == (True, "expression")
    for _ in range(2):  # both kinds of slot come round
        process = workers.idle.get()
        if process is not None:
            process.kill()
            process.wait()
        workers.idle.put(process)
    assert [workers.run("\\sqrt{3}", "\\sqrt{3}") for _ in range(3)] == [(True, "expression")] * 3


def test_an_interrupted_check_leaves_no_verdict_for_the_next():
    """An unread reply would be taken for the next question's."""
    class Interrupted:
        close = staticmethod(lambda: None)

        def readline(self):
            raise KeyboardInterrupt

    workers = grading.Workers()
    workers.started = workers.NUMBER  # one worker alone
    process = workers.start()
    process.stdout, pipe = Interrupted(), process.stdout
    workers.idle.put(process)
    with pytest.raises(KeyboardInterrupt):
        workers.run("\\sqrt{7}", "\\sqrt{7}")
    pipe.close()
    assert workers.run("\\sqrt{5}", "\\sqrt{7}") == (False, "expression")


@pytest.mark.parametrize("body, expected", [
    ("while True: pass", (False, "killed")), ("bytearray(3 << 29)", (False, "expression"))])
def test_the_kernel_ends_a_check(body, expected, monkeypatch):
    """By its CPU time, and by its memory. The comparison does what a hostile answer might do."""
    lines = ("import plumbing.grading.compare as c", "def f(answer, gold):", f"    {body}", "    return True",
             "c.is_same = f", "from plumbing.grading.workers import Workers",
             "Workers.CPU_SECONDS = 0",
             grading_workers.COMMAND)
    monkeypatch.setattr(grading_workers, "COMMAND", "\n".join(lines))
    started = time.perf_counter()
    assert grading.Workers().run("x", "y") == expected and time.perf_counter() - started < 10


def test_the_interpreter_exits_promptly_with_workers_running():
    code = (f"import sys; sys.path.insert(0, {str(ROOT)!r}); from plumbing import grading; "
            "grading.is_correct('x+1', '1+x'); print('done')")
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "done\n"
    started = time.perf_counter()
    process.wait(timeout=10)
    assert time.perf_counter() - started < 2 and process.returncode == 0
    assert threading.active_count() < 50


def test_the_grader_is_a_command(tmp_path, capsys):
    rows = [{"gold": p["gold"], "response": p["response"]} for p in pairs()[:40]]
    (tmp_path / "in.jsonl").write_text("\n".join(map(json.dumps, rows)))
    eval_math.main(["--grade", str(tmp_path / "in.jsonl"), "--out", str(tmp_path / "out.jsonl")])
    assert "checks per second" in capsys.readouterr().out
    out = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert len(out) == 40 and all(set(line) == {"correct", "answer", "how"} for line in out)
    (tmp_path / "in.jsonl").write_text('{"gold": "1"}\n')
    with pytest.raises(ValueError, match="row 1: needs the texts gold and response"):
        grading.grade_file(str(tmp_path / "in.jsonl"), str(tmp_path / "out.jsonl"))


def test_a_graded_file_never_overwrites_its_input(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("answers.jsonl").write_text('{"gold": "1", "response": "\\\\boxed{1}"}\n')
    before = Path("answers.jsonl").read_text()
    with pytest.raises(ValueError, match="would be overwritten"):
        eval_math.main(["--grade=answers.jsonl", "--out=./answers.jsonl"])
    assert Path("answers.jsonl").read_text() == before


def test_killed_checks_leave_no_open_files():
    workers = grading.Workers()
    workers.run("x+1", "1+x")
    opened = None
    for _ in range(4):
        process = workers.idle.get() or workers.start()
        process.kill()
        workers.idle.put(process)
        process.wait()
        for _ in range(workers.NUMBER):
            workers.run("\\sqrt{3}", "\\sqrt{3}")
        now = len(os.listdir("/dev/fd"))
        opened = opened or now
    assert now <= opened + 4 and workers.killed == 4


def test_the_grader_needs_nothing_of_the_project_and_no_algebra_to_be_imported():
    code = (f"import sys; sys.path.insert(0, {str(ROOT)!r}); "
            "sys.modules.update(dict.fromkeys(['math_verify', 'sympy', 'mpmath', 'torch'])); "
            "from plumbing import grading; assert grading.is_correct('1{,}000', '1000.0'); "
            "files = {name: str(getattr(module, '__file__', '')) for name, module in sys.modules.items()}; "
            f"print([name for name, file in files.items() if file.startswith({str(ROOT) + os.sep!r}) "
            "and 'site-packages' not in file and not name.startswith('plumbing.grading')])")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "['plumbing']", done.stderr


def test_checks_work_under_limits_that_may_not_be_raised():
    code = ("import resource, sys; sys.path.insert(0, sys.argv[1]); "
            "resource.setrlimit(resource.RLIMIT_CPU, (100, 100)); "
            "resource.setrlimit(resource.RLIMIT_AS, (1 << 29, 1 << 29)); "
            "from plumbing.grading import verdict; print(verdict('x+1', '1+x'), verdict('x+2', '1+x'))")
    done = subprocess.run([sys.executable, "-c", code, str(ROOT)], capture_output=True, text=True)
    assert done.stdout.strip() == "(True, 'expression') (False, 'expression')", done.stderr


def test_the_package_is_a_command(tmp_path):
    row = dict(gold="\\frac12", response="so \\boxed{0.5}")
    (tmp_path / "in.jsonl").write_text(json.dumps(row))
    command = [sys.executable, "-m", "plumbing.grading", "--grade", str(tmp_path / "in.jsonl"), "--out"]
    done = subprocess.run([*command, str(tmp_path / "out.jsonl")], cwd=ROOT, capture_output=True, text=True)
    assert "1 of 1 right" in done.stdout, done.stderr
    verdict = json.loads((tmp_path / "out.jsonl").read_text())
    assert verdict == dict(correct=True, answer="0.5", how="expression")
    done = subprocess.run([*command, str(tmp_path / "in.jsonl")], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and "would be overwritten" in done.stderr


@pytest.mark.parametrize("text", [
    "1 2", "x 2", "\\frac{1}{2}3", "2^3^4", "n!^2", "\\unknown{x}", "x..y", "(1", "1)", "\\sum_{k=1}^n k",
    "5 # 3", "x @ y",
    "__import__('os')", "\\int x dx", "x \\to 3",
])
def test_what_is_not_understood_is_refused(text):
    """Also where it stands beside something that is understood: a misread formula may be rewarded."""
    from plumbing.grading.compare import is_same
    with pytest.raises(ValueError):
        is_same(text, "x")


@pytest.mark.parametrize("answer, gold, is_right", [
    ("2AB = 30", "30", False), ("2xy = 30", "30", False), ("\\frac12 AB = 20", "20", False),
    ("2\\angle ABC = 60^\\circ", "60", False), ("AB = 5", "5", True), ("f(2) = 5", "5", True),
    ("(--\\infty,0]", "(-\\infty,0]", False), ("(-\\infty,0]", "x \\le 0", True)])
def test_a_multiple_is_no_name_and_two_signs_are_no_minus(answer, gold, is_right):
    assert grading.is_correct(answer, gold) == is_right
