"""Laws of problems and verdicts."""

import json
import random
import re
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from conftest import FIXTURES, ROOT, random_model

import eval_math
import sft
from plumbing import grading, show
from eval_math import Problem, arithmetic, extract_answer, is_correct, load_problems
from rollout import Rollout


@pytest.mark.parametrize("text, answer", [
    ("so \\boxed{12}", "12"), ("\\boxed{1} then \\boxed{\\frac{1}{2}}.", "\\frac{1}{2}"), ("\\boxed{}", ""),
    ("no box: 12", None), ("\\boxed{12", None), ("\\boxed{1} and \\boxed{2", None), ("", None),
    ("\\boxed{{a}{b}}", "{a}{b}"),
])
def test_the_answer_is_in_the_last_balanced_box(text, answer):
    assert extract_answer(text) == answer


def test_equal_numbers_are_equal_and_nothing_else_is():
    assert is_correct("12", "12") and is_correct("012", "12") and is_correct("12.0", "12")
    assert not any(is_correct(a, "12") for a in (None, "", "  ", "13", "1 2", "-12", "twelve", "11 or 12"))


def test_the_splits_of_the_embedded_task_never_share_a_problem():
    texts = {name: {p.problem for p in arithmetic(name, 2000, seed)}
             for seed in (0, 1) for name in ("train", "dev", "test")}
    assert (not texts["train"] & texts["test"] and not texts["train"] & texts["dev"]
            and not texts["dev"] & texts["test"])


def test_a_pupil_who_never_slips_is_always_right():
    for p in arithmetic("train", 500):
        a, b = p.problem[:-1].split("+")
        assert int(p.answer) == int(a) + int(b) and is_correct(extract_answer(p.solution), p.answer)
    assert (Problem("237+682=", "919", "090;111;090;\\boxed{919}").solution
            == eval_math.work_out(237, 682, 0, random.Random()))


def test_a_pupil_who_slips_is_wrong_when_a_carry_was_due():
    slipping = arithmetic("train", 4000, slip=1.0)
    for p in slipping:
        a, b = p.problem[:-1].split("+")
        carries = int(a[2]) + int(b[2]) > 9 or int(a[1]) + int(b[1]) > 9
        assert is_correct(extract_answer(p.solution), p.answer) == (not carries)


def test_sudokus_have_one_solution_and_splits_share_none():
    grids = eval_math.sudoku_grids()
    assert len(grids) == len(set(grids)) == 288
    splits = {split: eval_math.sudoku(split, 60, seed=3) for split in ("train", "dev", "test")}
    for p in splits["train"]:
        fits = [g for g in grids if all(c in ("0", d) for c, d in zip(p.problem, g))]
        assert fits == [p.answer] and len(p.problem) == 17 and p.solution == f"\\boxed{{{p.answer}}}"
    texts = {split: {p.problem for p in problems} for split, problems in splits.items()}
    assert not texts["train"] & texts["test"] and not texts["dev"] & texts["test"]
    hasty = eval_math.sudoku("train", 300, slip=0.6)
    wrong = [p for p in hasty if p.answer not in p.solution]
    assert 0.15 < len(wrong) / 300 < 0.45
    for p in wrong:  # one row, whose digits are only in another order
        page = p.solution[7:-1]
        rows = [i for i in range(4) if page[4 * i:4 * i + 4] != p.answer[4 * i:4 * i + 4]]
        assert len(rows) == 1 and sorted(page[4 * rows[0]:][:4]) == list("1234")
        assert all(c in ("0", d) for c, d in zip(p.problem, page))
    assert [p.problem for p in load_problems("sudoku-test")][:5] == [
        p.problem for p in eval_math.sudoku("test", 5)]


def test_a_truncated_response_is_wrong_even_with_the_right_answer():
    tokenizer = sft.tiny_tokenizer()
    tokens = tokenizer("\\boxed{5}", add_special_tokens=False).input_ids
    rollouts = [Rollout([3], [*tokens, 1], 4, [1] * 4),
                Rollout([3], [*tokens, 1], 4, [1] * 4, is_truncated=True),
                Rollout([3], [*tokens, 1], 2, [1] * 4)]
    eval_math.give_rewards(rollouts, [Problem("", "5")] * 3, tokenizer)
    assert [r.reward for r in rollouts] == [1.0, 0.0, 0.0]


def test_accuracy_has_the_standard_error_of_the_mean_over_problems(monkeypatch):
    problems = [Problem("", "5", tokens=[3]) for _ in range(4)]
    rewards = iter([1, 1, 1, 0, 0, 0, 1, 1.0])

    def fake_rewards(rollouts, *_):
        for r in rollouts:
            r.reward = next(rewards)

    monkeypatch.setattr(eval_math, "give_rewards", fake_rewards)
    result = eval_math.evaluate(random_model(), None, problems, num_samples=2, max_new_tokens=4)
    means = torch.tensor([1, 0.5, 0, 1])
    assert result["accuracy"] == pytest.approx(0.625) and result["n"] == 4
    assert result["standard_error"] == pytest.approx(float(means.std() / 2))
    alone = eval_math.accuracy([[1.0, 0.0]])
    assert alone["standard_error"] is None and show.plus_minus(alone) == "0.500 +- ?"


def test_long_prompts_are_skipped_and_counted():
    tokenizer = sft.tiny_tokenizer()
    problems = [Problem("1+2=", "3"), Problem("1+2+3+4=", "10"), Problem("5+5=", "10")]
    fitting, num_long = eval_math.encode_prompts(problems, tokenizer, 5)
    assert [p.problem for p in fitting] == ["1+2=", "5+5="] and num_long == 1
    with pytest.raises(ValueError, match="--max_prompt_tokens"):
        eval_math.encode_prompts(problems, tokenizer, 2)


CHATML = ("{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
          "{% if add_generation_prompt %}<|im_start|>assistant\n"
          "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}"
          "{% endif %}")


@pytest.mark.parametrize("style, end", [
    ("chat", "<|im_start|>assistant\n"), ("trado", "<|im_start|>assistant"),
    ("think", "<|im_start|>assistant\n<think>\n"),
    ("no_think", "<|im_start|>assistant\n<think>\n\n</think>\n\n"), ("plain", "within \\boxed{}."),
])
def test_prompt_styles(style, end):
    class Recorder:
        """A tokenizer whose tokens are its characters."""

        chat_template = CHATML

        def apply_chat_template(self, chat, **settings):
            import jinja2
            settings.pop("tokenize")
            return jinja2.Template(CHATML, keep_trailing_newline=True).render(messages=chat, **settings)

        def __call__(self, text, add_special_tokens):
            assert not add_special_tokens
            return type("Encoding", (), dict(input_ids=list(text)))

    problem = Problem("1+1?", "2")
    eval_math.encode_prompts([problem], Recorder(), 999, style=style, system="be brief")
    text = "".join(problem.tokens)
    assert text.endswith(end) and "1+1?\nPlease reason" in text and text.count("be brief") == 1
    assert style == "plain" or text.startswith(
        "<|im_start|>system\nbe brief<|im_end|>\n<|im_start|>user\n1+1?")
    with pytest.raises(ValueError, match="unknown prompt style 'best'"):
        eval_math.encode_prompts([problem], Recorder(), 999, style="best")


# ------------------------------------------------------------------------------------------------- the grader


def pairs():
    return [json.loads(line) for line in (FIXTURES / "grading/pairs.jsonl").read_text().splitlines()]


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
])
def test_equal_answers_in_other_clothes_are_right(answer, gold):
    assert is_correct(answer, gold)


HOSTILE = """
import json, os, sys, resource, tempfile, time
sys.path.insert(0, sys.argv[1])
from plumbing import grading, show
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
    grading.WORKERS.cache.clear()
    mixed = list(enumerate(cases))
    random.Random(0).shuffle(mixed)
    with ThreadPoolExecutor(8) as pool:
        got = dict(pool.map(lambda item: (item[0], is_correct(*item[1])), mixed))
    assert [got[i] for i in range(len(cases))] == expected
    grading.WORKERS.cache.clear()
    assert [v for v, _ in grading.grade(cases)] == expected


def test_a_check_that_is_killed_is_wrong_and_counted_and_the_next_one_works(monkeypatch):
    workers = grading.Workers()
    assert workers.ask("x+1", "1+x") == (True, "expression")
    monkeypatch.setattr(grading.Workers, "WALL_SECONDS", 0.3)
    stuck = workers.idle.get() or workers.start()
    stuck.send_signal(19)  # SIGSTOP: a worker that sleeps uses no CPU time, so only the wall clock ends it
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


def test_the_cpu_limit_ends_a_check_in_time():
    workers = grading.Workers()
    started = time.perf_counter()
    nested = "(" * 3 + "x+1" + ")^{99}" * 3  # past the guard on purpose: the limits must hold without it
    is_right, how = workers.run(
        f"\\frac{{d}}{{dx}} {nested} + \\sum_{{k=1}}^{{10^{{9}}}} \\frac{{1}}{{k^k}} + 9^{{9^{{9^9}}}}", "1")
    assert not is_right and time.perf_counter() - started < 10


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


def test_an_evaluation_is_a_table_a_file_of_responses_and_resumable(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    flags = ["--model", str(FIXTURES / "tiny"), "--max_new_tokens=20", "--n=2", "--limit=20", "--slots=8"]
    first = eval_math.main(flags)
    path, = tmp_path.glob("runs/eval-*-arithmetic-test/responses.jsonl")
    lines = path.read_text().splitlines()
    assert (len(lines) == 80
            and {"text", "response", "step_map", "correct", "how"} <= set(json.loads(lines[0])))
    for metrics in first.values():
        assert ({"accuracy", "standard_error", "pass_at_k", "length", "truncated", "tokens_per_step",
                 "tokens_per_second", "unanswered", "killed"} <= set(metrics)
                and metrics["pass_at_k"] >= metrics["accuracy"])
    path.write_text("\n".join(lines[:33]) + "\n" + lines[33][:20])
    capsys.readouterr()
    again = eval_math.main(flags)
    assert "33 of 80 responses were there already" in capsys.readouterr().out
    assert {s: m["accuracy"] for s, m in again.items()} == {s: m["accuracy"] for s, m in first.items()}
    with pytest.raises(ValueError, match="temperature was 1.0, is 0.5.*--name"):
        eval_math.main([*flags, "--temperature=0.5"])


def test_an_autoregressive_model_is_scored_under_the_same_prompts(tmp_path, monkeypatch):
    import transformers
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    config = transformers.Qwen3Config(
        vocab_size=18, hidden_size=32, intermediate_size=32, num_hidden_layers=1, head_dim=8,
        num_attention_heads=4, num_key_value_heads=2, eos_token_id=1, pad_token_id=0)
    transformers.Qwen3ForCausalLM(config).save_pretrained("ar")
    sft.tiny_tokenizer().save_pretrained("ar")
    summary = eval_math.main(["--ar=ar", "--max_new_tokens=6", "--limit=9", "--slots=4", "--temperature=0"])
    assert summary["autoregressive"]["n"] == 9 and summary["autoregressive"]["tokens_per_step"] == 1
