"""eval_math.py - what is asked, and what counts as right.

Problems (an embedded task, local files, the hub), the prompt around them, the reward of a response, and
accuracy with its standard error.

    Problem("237+682=", "919") -> prompt tokens -> Rollout -> "090;111;090;\\boxed{919}" -> "919" -> reward 1

    python eval_math.py --model runs/tracerl/checkpoints/step-45 --max_new_tokens 20 --n 3
    python eval_math.py --grade answers.jsonl --out verdicts.jsonl

Read in this order: Problem, arithmetic, load_problems, encode_prompts, math_reward, give_rewards, evaluate.
The last part, from "The evaluation command" on, is a program around `evaluate`: skip it.

Left out:
  1. the comparison of two answers, "1/2" and "0.5": plumbing/grading/;
  2. few-shot prompts, majority votes.
"""

import functools
import hashlib
import itertools
import json
import random
import re
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from statistics import fmean

import torch

import rollout
from plumbing import autoregressive, cuda, data, grading, parallel, runs, show
from plumbing.checkpoints import load_model
from plumbing.grading import extract_answer, is_correct

INSTRUCTION = "\nPlease reason step by step, and put your final answer within \\boxed{}."


@dataclass
class Problem:
    """A question, its answer, and, where the data have one, a worked solution (used by sft.py only)."""

    problem: str  # or a list of chat messages
    answer: str
    solution: str = ""
    step_map: list = None  # of the solution's tokens, for fine-tuning on a trace
    tokens: list = field(default_factory=list)  # the prompt, once encode_prompts has made it


# ------------------------------------------------------------------------------------------------------------
# The embedded tasks. First three-digit addition, worked out column by column, units first.


def is_of(split, text):
    """Whether a problem belongs to a split."""
    # A hash of the text deals every problem to one of ten buckets, whatever the seed: no seed of the training
    # data can ever contain a test problem.
    buckets = {"train": range(2, 10), "dev": range(1, 2), "test": range(0, 1)}[split]
    return zlib.crc32(text.encode()) % 10 in buckets


def arithmetic(split, number, seed=0, slip=0.0):
    """`number` distinct problems like 237+682= with solutions 090;111;090;\\boxed{919} -> list[Problem].

    split: "train", "dev" or "test"; every sum belongs to one split for good. slip: the probability with which
    the pupil who writes the solutions forgets a carry, and goes on as if there had been none. That is a bad
    habit for reinforcement learning to remove: a model that imitates the pupil can add, and slips. The
    `answer` is always the right one.
    """
    rng, seen = random.Random(f"{split} {seed}"), {}  # seen: text -> Problem
    while len(seen) < number:
        a, b = rng.randint(100, 999), rng.randint(100, 999)  # three digits each
        text = f"{a}+{b}="
        if is_of(split, text) and text not in seen:
            seen[text] = Problem(text, str(a + b), work_out(a, b, slip, rng))
    return list(seen.values())


def work_out(a, b, slip, rng):
    """The pupil's page: for each column, units first, its sum and the carry handed on; then the answer.

    237 + 682: 7 + 2 = 09, hand on 0; 3 + 8 = 11, hand on 1; 2 + 6 + 1 = 09, hand on 0. A pupil who slips
    hands on 0 where a carry is due: 090;110;080;\\boxed{819}. The slip can be seen the moment it is written.
    """
    page, digits, carry = "", "", 0  # digits of the answer, found from the right
    for power in (1, 10, 100):
        # the digits of this column, and what was handed on to it
        column = a // power % 10 + b // power % 10 + carry
        # The slip: no carry where one is due. The last column has no next one: both digits of its sum go into
        # the answer.
        carry = column // 10 if power == 100 or rng.random() >= slip else 0
        page += f"{column:02d}{carry};"  # 11 and 1 handed on: "111;"
        digits = f"{column % 10 if power < 100 else column}{digits}"
    return f"{page}\\boxed{{{digits}}}"


# A second task, in which tokens depend on each other in any order: 4 x 4 Sudoku.


@functools.cache
def sudoku_grids():
    """All 288 grids of 4 x 4 in which every row, column and 2 x 2 box holds 1 2 3 4, as strings of 16."""
    rows = list(itertools.permutations("1234"))
    # two rows whose boxes are right, then two such bands whose columns are right
    bands = [(a, b) for a in rows for b in rows if not {*a[:2]} & {*b[:2]} and not {*a[2:]} & {*b[2:]}]
    return ["".join(map("".join, (*top, *low))) for top in bands for low in bands
            if all(len({*column}) == 4 for column in zip(*top, *low))]


def sudoku(split, number, seed=0, slip=0.0):
    """`number` distinct puzzles like 0030100434000040= (0 is empty) with solutions \\boxed{4231132434122143}.

    Every puzzle has one solution. slip: the probability with which the pupil is hasty in one row: its empty
    cells get the digits that it lacks in any order, whatever stands in their columns and boxes.
    """
    rng, seen, grids = random.Random(f"sudoku {split} {seed}"), {}, sudoku_grids()
    while len(seen) < number:
        # With 4 clues 4 puzzles in 100 have one solution only, with 6 half of them, with 8 four of five.
        answer, clues = rng.choice(grids), rng.sample(range(16), rng.randint(6, 8))
        text = "".join(answer[i] if i in clues else "0" for i in range(16)) + "="
        if not is_of(split, text) or text in seen:
            continue
        if sum(all(grid[i] == answer[i] for i in clues) for grid in grids) > 1:
            continue  # more than one solution
        # The hasty row: right digits for the row, in an order that may break columns and boxes.
        page, row = list(answer), 4 * rng.randrange(4)
        if rng.random() < slip:
            empty = [i for i in range(row, row + 4) if i not in clues]
            for i, digit in zip(empty, rng.sample([answer[i] for i in empty], len(empty))):
                page[i] = digit
        seen[text] = Problem(text, answer, f"\\boxed{{{''.join(page)}}}")
    return list(seen.values())


EMBEDDED = dict(arithmetic=arithmetic, sudoku=sudoku)


# ------------------------------------------------------------------------------------------------------------
# Problems from files and from the hub.


def load_problems(source, problem_column=None, answer_column=None, needs_answer=True):
    """Problems from any source -> list[Problem].

    source: "arithmetic[-dev|-test]", "sudoku[-dev|-test]"; a local .jsonl, .json or .parquet file; a name
    (math500, gsm8k, gsm8k-train, aime2024); or a hub id, owner/name[:config[:split]]. Columns are found by
    name (problem, question, prompt or messages; answer; solution or response), or given. In GSM8K's style the
    answer stands behind ####; in a solution without an answer, in the last \\boxed{}. needs_answer: whether a
    row without one is an error (for SFT it is not). Raises FileNotFoundError, or ValueError that names the
    source and the row of what is broken, missing or empty.
    """
    task, _, split = source.partition("-")  # "sudoku-dev" -> sudoku, dev; "sudoku" is for training
    if task in EMBEDDED and split in ("", "dev", "test"):
        # The same 400 or 20,000 for everyone: seed 0, and no slips.
        return EMBEDDED[task](split or "train", 400 if split else 20000)
    rows = data.read_rows(source)  # dicts
    if not rows:
        raise ValueError(f"{source} holds no problems")
    # The solution's column cannot be named: it is for fine-tuning, whose data have the usual names.
    given = dict(problem=problem_column, answer=answer_column, solution=None)
    return [Problem(**data.read_fields(row, f"{source}, row {number}", given, needs_answer))
            for number, row in enumerate(rows, 1)]


# ------------------------------------------------------------------------------------------------------------
# The prompt.


PROMPT_STYLES = ("chat", "trado", "think", "no_think", "plain")


def encode_prompts(
        problems, tokenizer, max_prompt_tokens, instruction=INSTRUCTION, style="chat", system=None):
    """Sets Problem.tokens -> (problems that fit, number of others). system: a message, for chats without one.

    style: how the chat template's text is used. A model is good at prompts like those it was trained on; one
    newline too many can cost points.
      chat      as the template gives it
      trado     without white space after the last "assistant": TraDo was trained on prompts that end there
      think     followed by <think> and a newline (once), the opening of long chains of thought
      no_think  the template's own switch enable_thinking=False (Qwen3: an empty <think></think> follows)
      plain     no template: the problem and the instruction alone, for base models
    """
    if style not in PROMPT_STYLES:
        raise ValueError(f"unknown prompt style {style!r}: choose one of {', '.join(PROMPT_STYLES)}")
    if style != "plain" and not tokenizer.chat_template:
        raise ValueError("this tokenizer has no chat template: use --prompt_style plain")
    # Templates without such a switch ignore it.
    switch = dict(enable_thinking=False) if style == "no_think" else {}
    for p in problems:
        chat = p.problem
        if not isinstance(chat, list):
            chat = [{"role": "user", "content": p.problem + instruction}]
        if system is not None and chat[0]["role"] != "system":
            # A system message of the data's own replaces ours.
            chat = [{"role": "system", "content": system}, *chat]
        if style == "plain":
            # A base model has seen no chat markup: it would only be noise to it.
            text = "\n".join(message["content"] for message in chat)
        else:
            text = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False, **switch)
        if style == "trado":
            text = text.rstrip()  # no newline after the last "assistant"
        if style == "think" and not text.rstrip().endswith("<think>"):
            text += "<think>\n"
        # add_special_tokens is off: the template has written all special tokens that belong there.
        p.tokens = encode(text, tokenizer)
    fitting = [p for p in problems if len(p.tokens) <= max_prompt_tokens]  # the others are counted and said
    if not fitting:
        raise ValueError(f"none of {len(problems)} prompts has at most {max_prompt_tokens} tokens: "
                         "raise --max_prompt_tokens")
    return fitting, len(problems) - len(fitting)


def encode(text, tokenizer):
    """Text -> token ids. ValueError where the tokenizer does not know a character: it would be lost."""
    tokens = tokenizer(text, add_special_tokens=False).input_ids
    # Byte-level tokenizers (Qwen, LLaDA) know every character; the tiny one has 18 tokens.
    unknown = getattr(tokenizer, "unk_token_id", None)
    if unknown is not None and unknown in tokens:
        raise ValueError(f"the tokenizer does not know all characters of {text[:80]!r}: these are data for "
                         "another model")
    return tokens


def load_prompts(source, tokenizer, args, needs_answer=True):
    """load_problems and encode_prompts, by the flags -> list[Problem]; says how many there are."""
    problems = load_problems(source, args.problem_column, args.answer_column, needs_answer)
    problems, num_long = encode_prompts(problems, tokenizer, args.max_prompt_tokens, args.instruction,
                                        args.prompt_style, args.system)
    skipped = f"; skipped {num_long} with a prompt over {args.max_prompt_tokens} tokens" if num_long else ""
    parallel.say(f"{source}: {len(problems)} problems{skipped}")
    return problems


# ------------------------------------------------------------------------------------------------------------
# The reward.


# FORK HERE (reward): what a response earns. Without editing: --reward file.py:function. The function is
# called for one response after the other, with as many of these, in this order, as it has parameters
# without a default:
#     problem    the Problem; its answer is the text of the data's column, where a list is written as Python
#                writes it (tests of a program, for example)
#     text       the response before eos
#     tokens     the same as token ids, with eos
#     rollout    the record: step map, truncation (which is not punished unless the function does)
# It gives a number; or a number per token: process rewards, for --advantage value or an advantage of your
# own. With values, returns are sums over trace steps of their MEAN in the step: give every token of a step
# the reward of the step. (The log shows the sum over tokens.) --instruction "" does not ask for a box.
def math_reward(problem, text, tokens, rollout):
    """1 if the last \\boxed{} is right and the response has ended, else 0.

    A truncated response is wrong whatever it says: otherwise a model learns to box a guess early and never to
    stop.
    """
    return float(not rollout.is_truncated and is_correct(extract_answer(text), problem.answer))


def give_rewards(rollouts, problems, tokenizer, reward=math_reward):
    """Sets Rollout.reward and token_rewards (stage 2 of tracerl.py).

    Each process judges its share, and all then hold the same rewards: a verdict that a time limit decided, or
    a random reward, must be the same on every process, or they would train on different groups. Raises
    ValueError for a reward that is no finite number.
    """
    # the grader's checks run in two workers; a user's function may not like threads
    num_threads = grading.Workers.NUMBER if reward is math_reward else 1
    own = parallel.share(list(zip(rollouts, problems)))  # (rollout, problem) pairs of this process
    with ThreadPoolExecutor(num_threads) as pool:
        judged = list(pool.map(lambda pair: judge(*pair, tokenizer, reward), own))
    for r, (sequence_reward, token_rewards) in zip(rollouts, parallel.gather(judged)):
        r.reward, r.token_rewards = sequence_reward, token_rewards


def judge(r, problem, tokenizer, reward):
    """One response's reward, and process rewards if the function gives those -> (float, list of float)."""
    # up to and including eos: what stands behind it is filling
    tokens = r.response[:r.num_tokens]
    got = runs.call(reward, problem, response_text(r, tokenizer), tokens, r)
    try:  # numbers of any kind: Python's, numpy's, 0-d tensors
        # One type for all of them; strings, None and lists of lists fail here.
        values = torch.as_tensor(got, dtype=torch.float64)
    except (TypeError, ValueError, RuntimeError):
        values = torch.tensor(torch.nan)  # not a number: refused below
    if not values.isfinite().all():  # one NaN would make the whole group's advantages NaN
        raise ValueError(f"the reward function gave {got!r} for {problem.problem!r}: a reward is a finite "
                         "number, or a list with one for each token")
    if values.dim() == 0:
        return values.item(), []
    if values.shape != (len(tokens),):
        raise ValueError(f"the reward function gave {values.numel()} numbers for {len(tokens)} tokens")
    return values.sum().item(), values.tolist()


def response_text(r, tokenizer):
    """The trained part of a response as text, to be judged or read: nothing is ever encoded again."""
    return tokenizer.decode(r.response[:r.num_tokens], skip_special_tokens=True)


# ------------------------------------------------------------------------------------------------------------
# Accuracy.


def evaluate(model, tokenizer, problems, num_samples=1, seed=0, reward=None, **settings):
    """Samples and scores num_samples responses per problem -> dict with accuracy, standard_error, n and more.

    settings go to rollout.generate. reward: a function of one's own, whose mean is added as "reward".
    """
    # samples of one problem side by side, each with a seed of its own
    repeated = [p for p in problems for _ in range(num_samples)]
    # Fixed seeds: before and after training the same draws meet another policy.
    seeds = [seed + i for i in range(len(repeated))]
    rollouts = rollout.generate_everywhere(model, [p.tokens for p in repeated], seeds, **settings)
    give_rewards(rollouts, repeated, tokenizer)  # accuracy is always the grader's
    found = accuracy(grouped([r.reward for r in rollouts], num_samples)) | describe(rollouts)
    if not any(p.answer for p in problems):  # with a reward of one's own: nothing is right or wrong
        found |= dict(accuracy=None, standard_error=None, pass_at_k=None)
    if reward not in (None, math_reward):
        give_rewards(rollouts, repeated, tokenizer, reward)
        found["reward"] = fmean(r.reward for r in rollouts)
    return found


def evaluate_all(model, tokenizer, problems, reward, args):
    """Test problems, decoded dynamic, static with one token per step, greedy (the most probable tokens,
    revealed as --strategy says), and by --strategy -> {name: what `evaluate` gives}."""
    # They are scored twice, before and after: no checkpoint is chosen by them.
    modes = dict(dynamic=dict(strategy="dynamic"), static=dict(strategy="static", denoising_steps=None),
                 greedy=dict(temperature=0.0))
    modes |= {} if args.strategy in modes else {args.strategy: {}}
    settings = runs.decoding_settings(args)
    return {name: evaluate(model, tokenizer, problems, reward=reward, **settings | changes)
            for name, changes in parallel.progress(modes.items(), "evaluate")}


def grouped(numbers, size):
    """A list cut into lists of `size`: the samples of each problem."""
    return [numbers[i:i + size] for i in range(0, len(numbers), size)]


def accuracy(rewards):
    """Rewards of each problem's samples -> accuracy, its standard error over problems, n, pass@k (k: all).

    The error is over problems: samples of one problem are alike, and count as one observation together. One
    problem alone says nothing about others: its standard error is None.
    """
    # Two problems, three samples each: [1, 1, 0] and [0, 0, 0] are the means .67 and 0, accuracy .33, n = 2.
    means = [fmean(samples) for samples in rewards]
    mean, n = fmean(means), len(means)
    # n - 1: the mean is estimated, too
    variance = sum((m - mean) ** 2 for m in means) / (n - 1) if n > 1 else None
    return dict(accuracy=mean, standard_error=(variance / n) ** 0.5 if n > 1 else None, n=n,
                pass_at_k=fmean(max(samples) for samples in rewards))


def describe(rollouts):
    """Mean length (trained tokens), share of truncated responses, and tokens revealed per denoising step."""
    return dict(
        length=fmean(r.num_tokens for r in rollouts),
        truncated=fmean(r.is_truncated for r in rollouts),
        # How fast it decodes: 1 is as slow as an autoregressive model, K is a block at once.
        tokens_per_step=sum(len(r.response) for r in rollouts) / sum(max(r.step_map) for r in rollouts))


# ------------------------------------------------------------------------------------------------------------
# The evaluation command. The method ends here.


def diffusion_responses(model, tokenizer, problems, seeds, strategy, args):
    """Responses of a diffusion model to problems, as dicts, on every process."""
    rollouts = rollout.generate_everywhere(
        model, [p.tokens for p in problems], seeds, **runs.decoding_settings(args) | dict(strategy=strategy))
    return [dict(response=response_text(r, tokenizer), length=r.num_tokens, truncated=r.is_truncated,
                 decoded=len(r.response), step_map=r.step_map) for r in rollouts]


def fingerprint(model, problems):
    """Short hashes of weights and data: an evaluation is continued only if both are still the same."""
    # A sum per weight matrix: a training step changes some of them, and they are quick even for billions.
    sums = [f"{float(p.detach().sum(dtype=torch.float64)):.6g}" for p in model.parameters()]
    data = [(p.problem, p.answer, p.tokens) for p in problems]  # text, answer and prompt style
    return {name: hashlib.sha256(json.dumps(content).encode()).hexdigest()[:12]
            for name, content in (("weights", sums), ("problems", data))}


def evaluate_command(args):
    """Samples, grades, tabulates. Responses are in runs/<name>/responses.jsonl at once: a run can go on."""
    parallel.start_processes(args.device)
    if args.ar:
        # The yardstick goes through the same prompts, the same grader and the same table.
        model, tokenizer = autoregressive.load(args.ar)
    else:
        dtype = args.dtype or ("bfloat16" if parallel.default_device().type == "cuda" else "float32")
        model, tokenizer = load_model(
            args.model, args.block_size, getattr(torch, dtype), attention=args.attention)
        cuda.say_backend(model, args, dtype)
    if tokenizer is None:
        raise ValueError(f"{args.model} has no tokenizer: prompts cannot be encoded")
    problems = load_prompts(args.data, tokenizer, args)[:args.limit]
    # Both take the same arguments, and give the same dicts.
    respond = autoregressive.responses if args.ar else diffusion_responses
    strategies = ["autoregressive"] if args.ar else args.strategy
    # "runs/x/checkpoints/step-45" and "test.jsonl" -> eval-runs-x-checkpoints-step-45-test.jsonl
    name = args.name or re.sub(r"[^\w.-]+", "-", f"eval-{args.ar or args.model}-{args.data}").strip("-.")
    # The settings in args.json hold the fingerprints: other weights under the same path are refused.
    with runs.Run(name, vars(args) | fingerprint(model, problems), resume=True, log="responses.jsonl") as run:
        run.begin()
        # What an earlier, interrupted call has answered is not asked again.
        done = {(line["strategy"], line["problem"], line["sample"]): line for line in run.read()}
        work = list(itertools.product(strategies, range(len(problems)), range(args.n)))
        todo = [key for key in work if key not in done]
        parallel.say(f"{len(work) - len(todo)} of {len(work)} responses were there already")
        # A chunk is what is lost when the command is stopped: two rounds of the slots of all processes.
        chunks, size = [], (args.slots or 64) * parallel.processes()[1] * 2
        for strategy in strategies:
            chunks += grouped([key for key in todo if key[0] == strategy], size)
        for chunk in parallel.progress(chunks, "evaluate"):
            started = time.perf_counter()
            seeds = [args.seed + i * args.n + k for _, i, k in chunk]  # the same whatever was there already
            asked, strategy = [problems[i] for _, i, _ in chunk], chunk[0][0]
            responses = respond(model, tokenizer, asked, seeds, strategy, args)
            # grading is not part of a model's speed
            seconds = (time.perf_counter() - started) / len(chunk)
            answers = [None if r["truncated"] else extract_answer(r["response"]) for r in responses]
            pairs = [(answer, p.answer) for answer, p in zip(answers, asked)]
            # All processes hold the same responses; one judges, or a check that ran into its time limit on
            # one machine alone would make their tables differ.
            verdicts = parallel.from_first(grading.grade(pairs) if parallel.is_first() else None)
            for key, p, r, answer, (is_right, how) in zip(chunk, asked, responses, answers, verdicts):
                how = "truncated" if r["truncated"] else how
                done[key] = dict(
                    strategy=strategy, problem=key[1], sample=key[2], text=p.problem, gold=p.answer,
                    answer=answer, correct=is_right, how=how, seconds=seconds, **r)
                run.write(done[key])
        summary = {strategy: summarize([done[key] for key in work if key[0] == strategy], args.n)
                   for strategy in strategies}
        run.finish(summary)
    parallel.say(f"{args.data}, n = {args.n}: responses and summary are in {run.folder}")
    show.print_columns(summary)
    return summary


def summarize(lines, n):
    """The figures of one strategy's responses, n to a problem."""
    return accuracy(grouped([float(line["correct"]) for line in lines], n)) | dict(
        length=fmean(line["length"] for line in lines),
        truncated=fmean(line["truncated"] for line in lines),
        tokens_per_step=sum(line["decoded"] for line in lines) / sum(max(line["step_map"]) for line in lines),
        tokens_per_second=sum(line["length"] for line in lines) / sum(line["seconds"] for line in lines),
        unanswered=fmean(line["answer"] is None for line in lines),
        killed=sum(line["how"] == "killed" for line in lines))


def parse_args(argv=None):
    """The flags of eval_math.py."""
    parser = runs.make_parser("Evaluate a model on math problems, or grade a file.")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--model", help="diffusion model: checkpoint folder or hub id")
    what.add_argument("--ar", metavar="MODEL", help="autoregressive model, by transformers' generate, "
                      "under the same prompts and grader")
    what.add_argument("--grade", metavar="FILE",
                      help="grade JSON lines of gold and response instead of sampling")
    flag = parser.add_argument
    flag("--out", help="with --grade: where the verdicts go")
    flag("--data", default="arithmetic-test",
         help=f"arithmetic-test, {', '.join(data.HUB)}, a file, or a hub id owner/name[:config[:split]]")
    flag("--limit", type=runs.positive_int, help="only the first problems")
    flag("--n", type=runs.positive_int, default=1, help="samples per problem; pass_at_k has k = n")
    flag("--strategy", nargs="+", default=["static", "dynamic"], choices=rollout.STRATEGIES)
    flag("--block_size", type=runs.positive_int, help="K, if not the checkpoint's own")
    flag("--attention", choices=("block", "full"), help="of a checkpoint that leaves it open (a2d-qwen3)")
    flag("--device", choices=("cpu", "cuda"), help="None: a GPU if there is one")
    flag("--dtype", choices=("float32", "bfloat16"), help="None: bfloat16 on a GPU, float32 on the CPU")
    flag("--seed", type=int, default=0, help="of the first sample")
    flag("--name", type=runs.folder_name,
         help="folder under runs/ (default: from model and data); the same name and flags go on with it")
    flag("--debug", action="store_true", help="show the traceback of an error")
    runs.add_prompt_flags(parser, PROMPT_STYLES, INSTRUCTION)
    runs.add_decoding_flags(parser, rollout.CACHES)
    args = parser.parse_args(argv)
    if args.grade and not args.out:
        parser.error("--grade needs --out")
    return args


def main(argv=None):
    """Evaluates or grades."""
    args = parse_args(argv)
    return grading.grade_file(args.grade, args.out) if args.grade else evaluate_command(args)


if __name__ == "__main__":
    runs.run_command(main)
