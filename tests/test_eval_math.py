"""Laws of problems and verdicts."""

import json
import random

import pytest
import torch
from conftest import FIXTURES, random_model

import eval_math
import sft
from plumbing import show
from eval_math import Problem, arithmetic, extract_answer, is_correct, load_problems
from rollout import Rollout


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
