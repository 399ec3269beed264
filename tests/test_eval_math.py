"""Laws of problems and verdicts."""

import random

import pytest
import torch
from conftest import random_model

import eval_math
import model as lm
from eval_math import Problem, arithmetic, extract_answer, is_correct
from rollout import Rollout


@pytest.mark.parametrize("text, answer", [
    ("so \\boxed{12}", "12"), ("\\boxed{1} then \\boxed{\\frac{1}{2}}.", "\\frac{1}{2}"), ("\\boxed{}", ""),
    ("no box: 12", None), ("\\boxed{12", None), ("\\boxed{1} and \\boxed{2", None), ("", None), ("\\boxed{{a}{b}}", "{a}{b}"),
])
def test_the_answer_is_in_the_last_balanced_box(text, answer):
    assert extract_answer(text) == answer


def test_equal_numbers_are_equal_and_nothing_else_is():
    assert is_correct("12", "12") and is_correct("012", "12") and is_correct("12.0", "12")
    assert not any(is_correct(a, "12") for a in (None, "", "  ", "13", "1 2", "-12", "twelve", "11 or 12"))


def test_the_splits_of_the_embedded_task_never_share_a_problem():
    texts = {name: {p.problem for p in arithmetic(name, 2000, seed)} for seed in (0, 1) for name in ("train", "dev", "test")}
    assert not texts["train"] & texts["test"] and not texts["train"] & texts["dev"] and not texts["dev"] & texts["test"]


def test_a_pupil_who_never_slips_is_always_right():
    for p in arithmetic("train", 500):
        a, b = p.problem[:-1].split("+")
        assert int(p.answer) == int(a) + int(b) and is_correct(extract_answer(p.solution), p.answer)
    assert Problem("237+682=", "919", "09;11;09;\\boxed{919}").solution == eval_math.work_out(237, 682, 0, random.Random())


def test_a_pupil_who_slips_is_wrong_when_a_carry_was_due():
    slipping = arithmetic("train", 4000, slip=1.0)
    for p in slipping:
        a, b = p.problem[:-1].split("+")
        carries = int(a[2]) + int(b[2]) > 9 or int(a[1]) + int(b[1]) > 9
        assert is_correct(extract_answer(p.solution), p.answer) == (not carries)


def test_a_truncated_response_is_wrong_even_with_the_right_answer():
    tokenizer = lm.tiny_tokenizer()
    tokens = tokenizer("\\boxed{5}", add_special_tokens=False).input_ids
    rollouts = [Rollout([3], [*tokens, 1], 4, [1] * 4), Rollout([3], [*tokens, 1], 4, [1] * 4, is_truncated=True),
                Rollout([3], [*tokens, 1], 2, [1] * 4)]
    eval_math.score(rollouts, [Problem("", "5")] * 3, tokenizer)
    assert [r.reward for r in rollouts] == [1.0, 0.0, 0.0]


def test_accuracy_has_the_standard_error_of_the_mean_over_problems(monkeypatch):
    problems = [Problem("", "5", tokens=[3]) for _ in range(4)]
    rewards = iter([1, 1, 1, 0, 0, 0, 1, 1.0])

    def fake_score(rollouts, *_):
        for r in rollouts:
            r.reward = next(rewards)

    monkeypatch.setattr(eval_math, "score", fake_score)
    result = eval_math.evaluate(random_model(), None, problems, num_samples=2, max_new_tokens=4)
    means = torch.tensor([1, 0.5, 0, 1])
    assert result["accuracy"] == pytest.approx(0.625) and result["n"] == 4
    assert result["standard_error"] == pytest.approx(float(means.std() / 2))


def test_long_prompts_are_skipped_and_counted():
    tokenizer = lm.tiny_tokenizer()
    problems = [Problem("1+2=", "3"), Problem("1+2+3+4=", "10"), Problem("5+5=", "10")]
    fitting, num_long = eval_math.encode_prompts(problems, tokenizer, 5)
    assert [p.problem for p in fitting] == ["1+2=", "5+5="] and num_long == 1
    with pytest.raises(ValueError, match="--max_prompt_tokens"):
        eval_math.encode_prompts(problems, tokenizer, 2)


@pytest.mark.parametrize("content, message", [
    ('{"problem": "1+1=", "answer": "2"}\n{"problem": \n', "line 2"), ('{"problem": "1+1="}\n', "line 1"), ("\n", "no problems"),
    ('{"problem": "1+1=", "answer": "2"}\n[1]\n', "line 2"),
])
def test_a_broken_data_file_is_named_with_its_line(content, message, tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text(content)
    with pytest.raises(ValueError, match=f"data.jsonl.*{message}"):
        eval_math.load_problems(str(path))
    with pytest.raises(FileNotFoundError, match="nowhere"):
        eval_math.load_problems("nowhere.jsonl")
