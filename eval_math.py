"""eval_math.py - what counts as right.

Problems (embedded, local files, the hub), the prompt around them, the answer in a response, the verdict, and accuracy
with its standard error. The verdict is also the training reward: a wrong one teaches something false.

    python eval_math.py --model runs/tracerl/checkpoints/step-40 --data arithmetic-test

Reading order: Problem, the embedded arithmetic, load_problems, encode_prompts; extract_answer, is_correct; evaluate.
"""

import json
import os
import random
import re
import zlib
from dataclasses import dataclass, field
from fractions import Fraction

import rollout

INSTRUCTION = "\nPlease reason step by step, and put your final answer within \\boxed{}."


@dataclass
class Problem:
    """A question, its answer, and, where the data have one, a worked solution (used by SFT only)."""

    problem: str
    answer: str
    solution: str = ""
    tokens: list = field(default_factory=list)  # the prompt, once encode_prompts has made it


# ------------------------------------------------------------------------------------------------------------------
# The embedded task: three-digit addition, worked out column by column, units first.


def arithmetic(split, number, seed=0, slip=0.0):
    """`number` distinct problems like 237+682= with worked solutions 09;11;09;\\boxed{919} -> list[Problem].

    split: "train", "dev" or "test"; every sum belongs to one split for good. slip: the probability with which the pupil who
    writes the solutions forgets a carry, and carries on consistently: a bad habit for reinforcement learning to remove.
    The `answer` is always the right one.
    """
    buckets = {"train": range(2, 10), "dev": range(1, 2), "test": range(0, 1)}[split]
    rng, seen = random.Random(f"{split} {seed}"), {}
    while len(seen) < number:
        a, b = rng.randint(100, 999), rng.randint(100, 999)
        text = f"{a}+{b}="
        if zlib.crc32(text.encode()) % 10 in buckets and text not in seen:
            seen[text] = Problem(text, str(a + b), work_out(a, b, slip, rng))
    return list(seen.values())


def work_out(a, b, slip, rng):
    """The pupil's page: the sum of each column with the carry into it, then the answer the columns spell."""
    columns, carry = [], 0
    for power in (1, 10, 100):
        column = a // power % 10 + b // power % 10 + carry
        columns.append(column)
        carry = 1 if column >= 10 and rng.random() >= slip else 0
    answer = columns[2] * 100 + columns[1] % 10 * 10 + columns[0] % 10
    return "".join(f"{column:02d};" for column in columns) + f"\\boxed{{{answer}}}"


# ------------------------------------------------------------------------------------------------------------------
# Problems from files.


def load_problems(source):
    """Problems from "arithmetic[-dev|-test]", or a JSON Lines file of {"problem", "answer"} -> list[Problem].

    Raises ValueError naming the file and line of a broken or incomplete row, FileNotFoundError for a missing file.
    """
    if source in ("arithmetic", "arithmetic-dev", "arithmetic-test"):
        return arithmetic(source.removeprefix("arithmetic").lstrip("-") or "train", 400 if "-" in source else 20000)
    if not os.path.isfile(source):
        raise FileNotFoundError(f"no data file {source!r}")
    problems = []
    with open(source, encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
                problems.append(Problem(str(row["problem"]), str(row["answer"]), str(row.get("solution", ""))))
            except (json.JSONDecodeError, KeyError, TypeError) as error:
                raise ValueError(f"{source}, line {number}: not a row with problem and answer ({error!r})") from None
    if not problems:
        raise ValueError(f"{source} holds no problems")
    return problems


def encode_prompts(problems, tokenizer, max_prompt_tokens):
    """Sets Problem.tokens by the chat template -> (the problems that fit, how many did not)."""
    for p in problems:
        message = [{"role": "user", "content": p.problem + INSTRUCTION}]
        p.tokens = tokenizer.apply_chat_template(message, add_generation_prompt=True, tokenize=True, return_dict=False)
    fitting = [p for p in problems if len(p.tokens) <= max_prompt_tokens]
    if not fitting:
        raise ValueError(f"none of {len(problems)} prompts has at most {max_prompt_tokens} tokens: "
                         "raise --max_prompt_tokens")
    return fitting, len(problems) - len(fitting)


# ------------------------------------------------------------------------------------------------------------------
# The verdict.


def extract_answer(response):
    """What stands in the last \\boxed{...} with balanced braces, or None."""
    start = response.rfind("\\boxed{")
    if start < 0:
        return None
    depth, begin = 1, start + len("\\boxed{")
    for i in range(begin, len(response)):
        depth += {"{": 1, "}": -1}.get(response[i], 0)
        if depth == 0:
            return response[begin:i]
    return None


def is_correct(answer, gold):
    """Whether an extracted answer equals the gold one: as text, or exactly as a number."""
    if answer is None or not answer.strip():
        return False
    if answer.strip() == gold.strip():
        return True
    number = re.compile(r"[+-]?\d{1,50}(\.\d{1,50})?")
    return all(number.fullmatch(x.strip()) for x in (answer, gold)) and Fraction(answer.strip()) == Fraction(gold.strip())


# ------------------------------------------------------------------------------------------------------------------
# Evaluation.


def score(rollouts, problems, tokenizer):
    """Sets the reward of each rollout: 1 if its answer is right and it was not truncated, else 0 (METHOD: rewards)."""
    for r, p in zip(rollouts, problems):
        text = tokenizer.decode(r.response[:r.num_tokens], skip_special_tokens=True)
        r.reward = float(not r.is_truncated and is_correct(extract_answer(text), p.answer))


def evaluate(model, tokenizer, problems, num_samples=1, seed=0, **settings):
    """Samples num_samples responses per problem and scores them -> dict with accuracy, standard_error, n and more.

    settings go to rollout.generate. The standard error is that of the mean over problems.
    """
    repeated = [p for p in problems for _ in range(num_samples)]
    seeds = [seed + i for i in range(len(repeated))]
    rollouts = rollout.generate_everywhere(model, [p.tokens for p in repeated], seeds, **settings)
    score(rollouts, repeated, tokenizer)
    means = [sum(r.reward for r in rollouts[i:i + num_samples]) / num_samples
             for i in range(0, len(rollouts), num_samples)]
    accuracy = sum(means) / len(means)
    variance = sum((m - accuracy) ** 2 for m in means) / max(1, len(means) - 1)
    return dict(accuracy=accuracy, standard_error=(variance / len(means)) ** 0.5, n=len(problems), **describe(rollouts))


def describe(rollouts):
    """Mean length (trained tokens), share of truncated responses, and tokens revealed per denoising step."""
    return dict(length=sum(r.num_tokens for r in rollouts) / len(rollouts),
                truncated=sum(r.is_truncated for r in rollouts) / len(rollouts),
                tokens_per_step=sum(len(r.response) for r in rollouts) / sum(max(r.step_map) for r in rollouts))
