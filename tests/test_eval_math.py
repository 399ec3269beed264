"""Laws of what is asked, and of what counts as right."""

import itertools
import json
import random
import shutil
from pathlib import Path
from statistics import fmean

import jinja2
import pytest
import torch
from conftest import FIXTURES, small_data

import eval_math
import rollout
from eval_math import Examinee, Problem, load_problems
from plumbing import checkpoints, grading, show, tasks, tiny
from plumbing.prompts import Prompting, encode_prompts
from rollout import PLAIN, Decoding, Rollout

TINY = str(FIXTURES / "tiny")

# ------------------------------------------------------------------------------------------------------------
# The embedded tasks.


def is_right(row, page):
    """Whether the grader takes a page for right."""
    return grading.is_correct(grading.extract_answer(page), row["answer"])


@pytest.mark.parametrize("task", tasks.EMBEDDED.values(), ids=tasks.EMBEDDED)
def test_the_splits_of_an_embedded_task_never_share_a_problem(task):
    texts = {name: {row["problem"] for seed in (0, 1) for row in task(name, 50, seed)}
             for name in ("train", "dev", "test")}
    for one, other in itertools.combinations(texts.values(), 2):
        assert one and other and not one & other


def test_a_pupil_who_never_slips_is_always_right():
    for row in tasks.arithmetic("train", 300):
        a, b = row["problem"][:-1].split("+")
        assert int(row["answer"]) == int(a) + int(b) and is_right(row, row["solution"])
    assert tasks.work_out(237, 682, 0, random.Random()) == "090;111;090;\\boxed{919}"


def test_a_pupil_who_slips_is_wrong_when_a_carry_was_due():
    for row in tasks.arithmetic("train", 300, slip=1.0):
        a, b = row["problem"][:-1].split("+")
        has_carry = int(a[2]) + int(b[2]) > 9 or int(a[1]) + int(b[1]) > 9
        assert is_right(row, row["solution"]) == (not has_carry)


def test_sudokus_have_one_solution_and_a_hasty_pupil_spoils_one_row():
    grids = tasks.sudoku_grids()
    assert len(grids) == len(set(grids)) == 288
    for row in tasks.sudoku("train", 60, seed=3):
        fits = [grid for grid in grids if all(c in ("0", d) for c, d in zip(row["problem"], grid))]
        assert fits == [row["answer"]] and row["solution"] == f"\\boxed{{{row['answer']}}}"
    hasty = tasks.sudoku("train", 300, slip=0.6)
    wrong = [row for row in hasty if row["answer"] not in row["solution"]]
    assert 0.15 < len(wrong) / 300 < 0.45
    for row in wrong:
        page = row["solution"][7:-1]
        spoilt = [i for i in range(0, 16, 4) if page[i:i + 4] != row["answer"][i:i + 4]]
        assert len(spoilt) == 1 and sorted(page[spoilt[0]:spoilt[0] + 4]) == list("1234")
        assert all(c in ("0", d) for c, d in zip(row["problem"], page))


def test_an_embedded_task_is_loaded_by_its_name():
    rows = tasks.sudoku("test", 5)
    assert [(p.problem, p.answer) for p in load_problems("sudoku-test")][:5] == [
        (row["problem"], row["answer"]) for row in rows]


# ------------------------------------------------------------------------------------------------------------
# Prompts.


def test_long_prompts_are_skipped_and_counted():
    tokenizer = tiny.tiny_tokenizer()
    problems = [Problem("1+2=", "3"), Problem("1+2+3+4=", "10"), Problem("5+5=", "10")]
    fitting, num_long = encode_prompts(problems, tokenizer, Prompting(max_prompt_tokens=5))
    assert [p.problem for p in fitting] == ["1+2=", "5+5="] and num_long == 1
    with pytest.raises(ValueError, match="none of 3 prompts .*--max_prompt_tokens"):
        encode_prompts(problems, tokenizer, Prompting(max_prompt_tokens=2))


def test_unknown_characters_and_a_missing_template_are_errors():
    tokenizer = tiny.tiny_tokenizer()
    with pytest.raises(ValueError, match="does not know all characters of 'what is 12.3"):
        encode_prompts([Problem("what is 12+3=", "15")], tokenizer)
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match="no chat template: use --prompt_style plain"):
        encode_prompts([Problem("12+3=", "15")], tokenizer)


class Characters:
    """A tokenizer of the Qwen kind whose tokens are characters."""

    chat_template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n"
        "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}"
        "{% endif %}")

    def apply_chat_template(self, chats, tokenize, **settings):
        """The texts of chats."""
        assert not tokenize
        template = jinja2.Template(self.chat_template, keep_trailing_newline=True)
        return [template.render(messages=chat, **settings) for chat in chats]

    bos_token_id = None  # or a character with which every text begins

    def __call__(self, texts, add_special_tokens=True):
        if add_special_tokens:
            return type("Encoding", (), dict(input_ids=[self.bos_token_id] if self.bos_token_id else []))
        return type("Encoding", (), dict(input_ids=[list(text) for text in texts]))


@pytest.mark.parametrize("style, end", [
    ("chat", "<|im_start|>assistant\n"), ("trado", "<|im_start|>assistant"),
    ("trado_think", "<|im_start|>assistant<think>"),
    ("think", "<|im_start|>assistant\n<think>\n"),
    ("no_think", "<|im_start|>assistant\n<think>\n\n</think>\n\n"), ("plain", "within \\boxed{}."),
])
def test_a_prompt_ends_as_its_style_says(style, end):
    problem = Problem("1+1?", "2")
    encode_prompts([problem], Characters(), Prompting(prompt_style=style))
    text = "".join(problem.tokens)
    assert text.endswith(end) and "1+1?\nPlease reason" in text
    assert style == "plain" or text.startswith("<|im_start|>user\n1+1?")


def test_a_prompt_without_a_template_begins_as_the_tokenizer_begins_texts():
    tokenizer = Characters()
    tokenizer.bos_token_id = "^"
    for question, style, start in (("1+1?", "plain", "^1+"), ("^1+1?", "plain", "^1+"), ("1+1?", "chat", "<")):
        problem = Problem(question, "2")
        encode_prompts([problem], tokenizer, Prompting(prompt_style=style))
        assert "".join(problem.tokens).startswith(start)


def test_a_bad_setting_of_prompts_is_refused_by_name():
    with pytest.raises(ValueError, match="prompt_style 'best' is not possible: it must be one of chat"):
        Prompting(prompt_style="best")
    with pytest.raises(ValueError, match="max_prompt_tokens 0 is not possible: it must be at least 1"):
        Prompting(max_prompt_tokens=0)


# ------------------------------------------------------------------------------------------------------------
# Rewards.


def test_a_truncated_response_is_wrong_even_with_the_right_answer():
    tokenizer = tiny.tiny_tokenizer()
    tokens = tokenizer("\\boxed{5}", add_special_tokens=False).input_ids
    rollouts = [Rollout([3], [*tokens, 1], 4, [1] * 4),
                Rollout([3], [*tokens, 1], 4, [1] * 4, is_truncated=True),
                Rollout([3], [*tokens, 1], 2, [1] * 4)]
    eval_math.give_rewards(rollouts, [Problem("", "5")] * 3, tokenizer)
    assert [r.reward for r in rollouts] == [1.0, 0.0, 0.0]


def test_a_reward_reads_special_tokens_but_not_eos_or_what_stands_behind_it():
    tokenizer = tiny.tiny_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<answer>", "</answer>"]})
    tokens = tokenizer("0<answer>23</answer>", add_special_tokens=False).input_ids
    ended = Rollout([3], [*tokens, 1, 7, 7], len(tokens) + 1, [1] * (len(tokens) + 3))
    cut = Rollout([3], [*tokens, 7, 7], len(tokens), [1] * (len(tokens) + 2), is_truncated=True)
    seen = []
    reward = lambda text, tokens: seen.append((text, tokens)) or 0
    eval_math.give_rewards([ended, cut], [Problem("", "5")] * 2, tokenizer, reward)
    assert seen == [("0<answer>23</answer>", [*tokens, 1]), ("0<answer>23</answer>", tokens)]


# ------------------------------------------------------------------------------------------------------------
# Accuracy.


def examinee(generate):
    """One whose rollouts come from a function."""
    return Examinee(torch.nn.Identity(), tiny.tiny_tokenizer(), Decoding(), PLAIN._replace(generate=generate))


def graded(monkeypatch, problems, rewards, num_samples=1):
    """The table of problems whose responses earn these rewards, in order."""
    monkeypatch.setattr(eval_math, "give_rewards", lambda rollouts, *_: [
        setattr(r, "reward", reward) for r, reward in zip(rollouts, rewards, strict=True)])
    one = examinee(lambda model, prompts, seeds, decoding: [Rollout(p, [4, 1], 2, [1, 2]) for p in prompts])
    return one.evaluate(problems, num_samples=num_samples)


def test_accuracy_has_the_standard_error_of_the_mean_over_problems(monkeypatch):
    problems = [Problem(f"{i}+1=", "5") for i in range(4)]
    found = graded(monkeypatch, problems, [1, 1, 1, 0, 0, 0, 1, 1.0], num_samples=2)
    means = torch.tensor([1, 0.5, 0, 1])
    assert found["accuracy"] == pytest.approx(0.625) and found["n"] == 4
    assert found["standard_error"] == pytest.approx(float(means.std() / 2))
    assert found["length"] == 2 and found["tokens_per_step"] == 1 and found["truncated"] == 0
    alone = eval_math.accuracy([[1.0, 0.0]])
    assert alone["standard_error"] is None and show.plus_minus(alone) == "0.500 +- ?"


def test_rows_that_repeat_a_problem_are_one_problem(monkeypatch, tmp_path):
    """AIME files hold each problem 32 times: their error is that of 30 problems, not of 960."""
    monkeypatch.chdir(tmp_path)
    rows = [json.dumps(dict(problem=f"{i % 3}+1=", answer="5")) for i in range(12)]
    Path("repeated.jsonl").write_text("\n".join(rows))
    problems = eval_math.load_prompts("repeated.jsonl", tiny.tiny_tokenizer(), Prompting())
    found = graded(monkeypatch, problems, [1, 1, 0] * 3 + [1, 0, 0.0])  # problem 0 always, 1 thrice, 2 never
    once = eval_math.accuracy([[1, 1, 1, 1], [1, 1, 1, 0], [0, 0, 0, 0]])
    assert found["n"] == 3 and {name: found[name] for name in once} == once


def test_pass_at_k_is_the_mean_over_all_choices_of_k_samples():
    for n in range(1, 7):
        for numbers in itertools.product((0.0, 1.0), repeat=n):
            for k in range(1, n + 1):
                choices = [max(choice) for choice in itertools.combinations(numbers, k)]
                assert eval_math.pass_at(k, numbers) == pytest.approx(fmean(choices))
    found = eval_math.accuracy([[1.0, 0, 0, 0, 0], [0.0] * 7])
    assert {name for name in found if "pass" in name} == {"pass_at_2", "pass_at_4"}
    assert found["pass_at_2"] == pytest.approx(0.2) and found["pass_at_4"] == pytest.approx(0.4)


# ------------------------------------------------------------------------------------------------------------
# The command.


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder to work in, with four problems to ask."""
    monkeypatch.chdir(tmp_path)
    small_data(tmp_path)
    return tmp_path


ASK = ["--model", TINY, "--data=test.jsonl"]


def table(*flags):
    """What an evaluation finds, without its speed."""
    summary = eval_math.main([*ASK, *flags])
    return {name: {key: value for key, value in found.items() if key != "tokens_per_second"}
            for name, found in summary.items()}


def test_an_evaluation_is_a_table_and_a_file_that_can_be_gone_on_with(folder, capsys):
    found = table("--samples=2", "--name=two")
    path = folder / "runs/two/responses.jsonl"
    lines = path.read_text().splitlines()
    assert len(lines) == 16 and {"text", "gold", "answer", "correct", "response", "step_map"} <= set(
        json.loads(lines[0]))
    assert found.keys() == {"static", "dynamic"} and found["static"]["tokens_per_step"] == 1
    for numbers in found.values():
        assert numbers.keys() == {"accuracy", "standard_error", "n", "pass_at_2", "length", "truncated",
                                  "unanswered", "tokens_per_step"}
        assert numbers["n"] == 4 and numbers["pass_at_2"] >= numbers["accuracy"]
    assert json.loads((folder / "runs/two/summary.json").read_text())["static"]["n"] == 4
    # Killed while it wrote a line: that line is asked again, and no other.
    path.write_text("\n".join(lines[:5]) + "\n" + lines[5][:20])
    capsys.readouterr()
    assert table("--samples=2", "--name=two") == found
    assert "static: 5 of 8 responses were there already" in capsys.readouterr().out
    # Finished with one sample, and asked for a second one: the table is that of two at once.
    single = table("--name=more")
    first = (folder / "runs/more/responses.jsonl").read_text()
    assert table("--samples=2", "--name=more", "--slots=3") == found
    assert "static: 4 of 8 responses were there already" in capsys.readouterr().out
    assert (folder / "runs/more/responses.jsonl").read_text().startswith(first)
    assert table("--name=more") == single  # and back again


def test_an_evaluation_never_mixes_two_settings_models_or_data(folder):
    shutil.copytree(TINY, "model")
    ask = ["--model=model", *ASK[2:], "--strategy=static", "--max_new_tokens=8"]
    eval_math.main(ask)
    assert (folder / "runs/eval-model-test.jsonl/responses.jsonl").is_file()
    with pytest.raises(ValueError, match="other settings: temperature was 1.0, is 0.5.*--name"):
        eval_math.main([*ask, "--temperature=0.5"])
    model, tokenizer = checkpoints.load_model("model")
    with torch.no_grad():
        model.head.weight[3] += 0.1
    checkpoints.save_checkpoint(model, tokenizer, "model")
    with pytest.raises(ValueError, match="other settings: weights was '[0-9a-f]+', is"):
        eval_math.main(ask)
    small_data(folder, seed=1)
    with pytest.raises(ValueError, match="problems was"):
        eval_math.main(ask)


def test_two_seeds_of_an_evaluation_share_no_draws(folder, monkeypatch):
    seen = []
    decode = rollout.generate_everywhere

    def generate(model, prompts, seeds, decoding, compute):
        """Notes the seeds."""
        seen.extend(seeds)
        return decode(model, prompts, seeds, decoding, compute)

    monkeypatch.setattr(rollout, "generate_everywhere", generate)
    for seed in (0, 1):
        table(f"--seed={seed}", f"--name=seed{seed}", "--samples=3", "--strategy=dynamic", "--max_new_tokens=4")
    one = examinee(lambda model, prompts, seeds, decoding: [Rollout(p, [1], 1, [1]) for p in prompts])
    for seed in (2, 3):
        one.evaluate([Problem("1+1=", "2", tokens=[3])] * 50, num_samples=3, seed=seed)
    assert len(seen) == len(set(seen)) == 2 * 4 * 3 + 2 * 50 * 3


def test_greedy_samples_are_one_sample(folder):
    found = table("--strategy=greedy", "--samples=3", "--max_new_tokens=20")
    assert found["greedy"]["pass_at_2"] == found["greedy"]["accuracy"]


def test_flags_hold_in_every_mode_and_bad_ones_are_refused_at_the_door(folder, monkeypatch, capsys):
    found = table("--strategy", "static", "greedy", "--denoising_steps=2")  # 4 tokens in 2 steps
    assert found["static"]["tokens_per_step"] == 2 and found["greedy"]["tokens_per_step"] >= 2
    monkeypatch.setattr(checkpoints, "load_model", lambda *_, **__: pytest.fail("this loads a model"))
    with pytest.raises(ValueError, match="--strategy best: no file 'best'; give file.py:function, or one of"):
        table("--strategy", "static", "best")
    for flag in ("--samples=0", "--limit=0", "--slots=0", "--temperature=-1"):
        with pytest.raises(SystemExit):
            table(flag)
        said = capsys.readouterr().err
        assert flag.partition("=")[0] in said and "is not possible: it must be at least" in said
    with pytest.raises(SystemExit):  # a file to grade needs a file for the verdicts
        eval_math.main(["--grade=answers.jsonl"])
    assert "--grade needs --out" in capsys.readouterr().err


def test_an_autoregressive_model_is_scored_under_the_same_prompts(folder):
    """By transformers' own generate, and in the table of a diffusion model."""
    import transformers
    torch.manual_seed(0)
    config = transformers.Qwen3Config(
        vocab_size=18, hidden_size=32, intermediate_size=32, num_hidden_layers=1, head_dim=8,
        num_attention_heads=4, num_key_value_heads=2, eos_token_id=1, pad_token_id=0)
    transformers.Qwen3ForCausalLM(config).save_pretrained("ar")
    tiny.tiny_tokenizer().save_pretrained("ar")
    rows = [dict(problem=text, answer="5") for text in ("1+1=", "12+34=", "1+2+3+4=", "123+456=")]
    Path("ragged.jsonl").write_text("\n".join(map(json.dumps, rows)))
    flags = ["--data=ragged.jsonl", "--max_new_tokens=6", "--samples=2"]
    found, = eval_math.main(["--ar=ar", "--name=ar", *flags]).values()
    diffusion = eval_math.main(["--model", TINY, *flags, "--name=tiny"])["static"]
    assert found.keys() == diffusion.keys() and found["n"] == 4 and found["tokens_per_step"] == 1
    lines = [json.loads(line) for line in open("runs/ar/responses.jsonl", encoding="utf-8")]
    assert len(lines) == 8 and {line["strategy"] for line in lines} == {"autoregressive"}
    # Greedy, the responses are those of a loop that takes the most probable token each time.
    eval_math.main(["--ar=ar", "--name=greedy", *flags[:2], "--temperature=0"])
    model = transformers.AutoModelForCausalLM.from_pretrained("ar").eval()
    tokenizer = tiny.tiny_tokenizer()
    for line in map(json.loads, open("runs/greedy/responses.jsonl", encoding="utf-8")):
        tokens = tokenizer(line["text"], add_special_tokens=False).input_ids
        start = len(tokens)
        while len(tokens) - start < 6 and (len(tokens) == start or tokens[-1] != 1):
            tokens.append(int(model(torch.tensor([tokens])).logits[0, -1].argmax()))
        assert line["response"] == tokenizer.decode([token for token in tokens[start:] if token != 1])
        assert line["length"] == len(tokens) - start and line["truncated"] == (tokens[-1] != 1)


def test_problems_without_an_answer_count_neither_as_right_nor_as_wrong():
    line = lambda text, gold, is_right: dict(
        text=text, gold=gold, correct=is_right, length=3, truncated=False, answer="5", decoded=4,
        step_map=[1, 1, 2, 2], seconds=1.0, reward=1.0)
    lines = [line("2+3=", "5", True), line("2+4=", "6", False), line("A poem.", "", False)]
    found = eval_math.summarize(lines)
    assert (found["accuracy"], found["n"], found["reward"], found["length"]) == (0.5, 2, 1.0, 3)
    assert eval_math.summarize(lines[2:])["accuracy"] is None
