"""eval_math.py - what is asked, and what counts as right.

    Problem("894+396=", "1290") -> prompt tokens -> Rollout -> "...\\boxed{1290}" -> "1290" -> reward 1

Problems come from an embedded task, a local file or the hub. A template makes a prompt of each. A response is
right if it has ended and its last \\boxed{} equals the answer. Accuracy is the mean over problems, with its
standard error.

    python eval_math.py                                                # the tiny model, 400 test problems
    python eval_math.py --model JetLM/SDAR-4B-Chat --data math500 --samples 3
    python eval_math.py --grade answers.jsonl --out verdicts.jsonl     # grade a file, without a model

Read in this order: Problem, load_problems; math_reward, give_rewards; Examinee, accuracy.

Left out: few-shot prompts, majority votes. In other files:
  1. the embedded tasks, arithmetic and Sudoku: plumbing/tasks.py;
  2. reading data files: plumbing/data.py; chat templates: plumbing/prompts.py;
  3. comparing two answers, "1/2" and "0.5": plumbing/grading/.
"""

import dataclasses
import math
import re
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from statistics import fmean, stdev

import torch

import rollout
from plumbing import data, flags, grading, machine, parallel, runs, show
from plumbing.flags import setting
from plumbing.prompts import Prompting, encode_prompts
from plumbing.tasks import EMBEDDED
from rollout import Decoding, mix

# ------------------------------------------------------------------------------------------------------------
# What is asked.


@dataclass
class Problem:
    """A question and its answer."""

    problem: str  # or a list of chat messages
    answer: str
    solution: str = ""  # a worked solution, where the data have one; sft.py learns from it
    step_map: list = None  # of the solution's tokens, where the data have one
    tokens: list = field(default_factory=list)  # the prompt, once load_prompts has made it


def load_problems(source, needs_answer=True):
    """Problems from any source -> list[Problem].

    source: "arithmetic[-dev|-test]", "sudoku[-dev|-test]"; a local file or folder; a name (math500, gsm8k,
    gsm8k-train, aime2024, aime2025); or a hub id, owner/name[:config[:split]]. needs_answer: rows without an
    answer are skipped and counted. Errors name the source, the row and the column.
    """
    # "sudoku-dev" -> sudoku, dev. "sudoku" alone is for training.
    task, _, split = source.partition("-")
    if task in EMBEDDED and split in ("", "dev", "test"):
        # The same 400 or 20,000 problems for everyone: seed 0, and a pupil who never slips.
        rows = EMBEDDED[task](split or "train", 400 if split else 20000)
        return [Problem(**row) for row in rows]
    rows, num_skipped = data.read_problems(source, needs_answer)
    if num_skipped:
        parallel.say(f"{source}: skipped {num_skipped} rows without an answer")
    return [Problem(**row) for row in rows]


def load_prompts(source, tokenizer, prompting, needs_answer=True):
    """Calls load_problems and encode_prompts -> list[Problem]. Prints how many there are."""
    problems = load_problems(source, needs_answer)
    problems, num_long = encode_prompts(problems, tokenizer, prompting)
    skipped = f"; skipped {num_long} longer than {prompting.max_prompt_tokens} tokens" if num_long else ""
    parallel.say(f"{source}: {len(problems)} problems{skipped}")
    return problems


# ------------------------------------------------------------------------------------------------------------
# What counts as right.


def math_reward(problem, text, rollout):
    """1 if the last \\boxed{} is right and the response has ended, else 0.

    A truncated response is wrong whatever it says. Otherwise a model learns to box a guess early, and never
    to stop. A copied question is wrong, too: \\boxed{894+396} has the value 1290.

    FORK HERE. --reward file.py:function calls a function of yours for each response. It declares those
    parameters it needs:
        problem    the Problem
        text       the response before eos
        tokens     token ids of the response, eos included
        rollout    the record: step_map, is_truncated, ... (A truncated response does not get 0 by
                   itself: your function must give 0.) rollout.rl_step is for rewards that change during a
                   run. It is 0 in evaluations, which report the mean of your reward, too
    Rows of the data without an answer are kept then: problem.answer is "". The function gives a number, or a
    list with one number per token. It must not change the record: each response is judged on one process
    only, and the others would not see the change.

    A list is a process reward, for --advantage value or an advantage of your own. With a value model, the
    return of a token is its own reward plus the MEAN reward of each later trace step. So to give a step the
    reward x, give x to each of its tokens. (In the log, `reward` is the sum over tokens: with three tokens
    this step adds 3 x.)
    """
    # "...\\boxed{1290}" -> "1290", which is compared with the problem's answer as a number or a formula.
    answer = grading.extract_answer(text)  # of the last box; None if there is none
    is_copied = grading.is_copied(answer, problem.answer, problem.problem)
    is_valid = not rollout.is_truncated and not is_copied
    return float(is_valid and grading.is_correct(answer, problem.answer))


def give_rewards(rollouts, problems, tokenizer, reward=math_reward):
    """Sets Rollout.reward and token_rewards, on every process. ValueError for a reward that is not finite.

    Each response is judged once, and all processes share the verdict. If every process judged for
    itself, a time limit might strike on one of them only. Then they would train on different groups.
    """
    pairs = parallel.deal(list(zip(rollouts, problems)))  # (rollout, problem) pairs of this process
    # The grader's checks run in worker processes, and many threads can wait for them at the same time. A
    # user's own function runs in the main thread, as it may not be safe in others. Also, it may use signals,
    # for a time limit, and Python has these in the main thread only.
    with ThreadPoolExecutor(grading.Workers.NUMBER) as pool:
        apply = pool.map if reward is math_reward else map
        judged = list(apply(lambda pair: judge(*pair, tokenizer, reward), pairs))
    for r, (sequence_reward, token_rewards) in zip(rollouts, parallel.gather(judged)):
        r.reward = sequence_reward
        r.token_rewards = token_rewards


def judge(r, problem, tokenizer, reward):
    """One response's reward, and its process rewards if there are any -> (float, list of float)."""
    tokens = r.response[:r.num_tokens]  # up to and including eos. What stands behind is no answer
    given = flags.call(reward, problem=problem, text=response_text(r, tokenizer), tokens=tokens, rollout=r)
    try:
        values = torch.as_tensor(given, dtype=torch.float64)  # numbers of any kind, or a list of them
    except (TypeError, ValueError, RuntimeError):
        values = torch.tensor(math.nan)  # not a number: refused below
    if not values.isfinite().all():  # one NaN would make the whole group's advantages NaN
        raise ValueError(f"the reward function gave {given!r} for {problem.problem!r}: a reward is a finite "
                         "number, or a list with one for each token")
    if values.dim() == 0:
        return values.item(), []
    # One number for each token up to eos: a process reward. The response as a whole earns their sum.
    if values.shape != (len(tokens),):
        raise ValueError(f"the reward function gave {values.numel()} numbers for {len(tokens)} tokens")
    return values.sum().item(), values.tolist()


def response_text(r, tokenizer):
    """The response before eos as text, to be judged or read. It is never turned back into tokens.

    Special tokens stay, since a reward may look for one such as </think>.
    """
    return tokenizer.decode(r.response[:r.num_tokens - (not r.is_truncated)])


# ------------------------------------------------------------------------------------------------------------
# Accuracy.


@dataclass
class Examinee:
    """A model that answers problems, with the tokenizer, decoding and computation that it uses."""

    model: torch.nn.Module
    tokenizer: object
    decoding: Decoding
    compute: rollout.Compute
    reward: Callable = None  # a function of one's own, whose mean is reported beside the accuracy

    def evaluate(self, problems, strategy=None, num_samples=1, seed=0):
        """Accuracy on problems -> a dict with accuracy, standard_error, n and more, see `summarize`."""
        # Fixed seeds: before and after training, the same draws meet another policy.
        keys = [(number, sample) for number in range(len(problems)) for sample in range(num_samples)]
        seeds = [mix(seed, number, sample) for number, sample in keys]
        return summarize(self.ask([problems[number] for number, _ in keys], seeds, strategy))

    def ask(self, problems, seeds, strategy=None):
        """One response to each problem, graded -> a dict for each.

        strategy: if given, it replaces that of self.decoding. "greedy" sets the temperature to 0 instead.
        """
        # The same decoding as in training, or another one for comparison.
        change = dict(temperature=0.0) if strategy == "greedy" else dict(strategy=strategy)
        decoding = dataclasses.replace(self.decoding, **change) if strategy else self.decoding
        # Every process decodes a part of the prompts, and gets all rollouts.
        started = time.perf_counter()
        rollouts = rollout.generate_everywhere(
            self.model, [p.tokens for p in problems], seeds, decoding, self.compute)
        seconds = (time.perf_counter() - started) / max(len(problems), 1)  # without grading
        give_rewards(rollouts, problems, self.tokenizer)  # accuracy is always the grader's
        lines = []  # what responses.jsonl keeps of each response
        for r, p in zip(rollouts, problems):
            text = response_text(r, self.tokenizer)
            lines.append(dict(
                text=p.problem, gold=p.answer, answer=grading.extract_answer(text), correct=bool(r.reward),
                truncated=r.is_truncated, length=r.num_tokens, decoded=len(r.response), step_map=r.step_map,
                seconds=seconds, response=text))
        if self.reward not in (None, math_reward):
            give_rewards(rollouts, problems, self.tokenizer, self.reward)
            lines = [line | dict(reward=r.reward) for line, r in zip(lines, rollouts)]
        return lines


def summarize(lines):
    """What a table shows of many responses: accuracy, lengths, speed."""
    samples = {}  # by problem; a file may hold the same problem many times
    for line in lines:
        if line["gold"]:  # without an answer, a response is neither right nor wrong
            samples.setdefault((str(line["text"]), line["gold"]), []).append(float(line["correct"]))
    # {("894+396=", "1290"): [1., 0., 1.], ...} -> accuracy, standard_error, n, pass_at_2
    found = accuracy(list(samples.values()))
    if "reward" in lines[0]:
        found["reward"] = fmean(line["reward"] for line in lines)
    return found | dict(
        length=fmean(line["length"] for line in lines),
        truncated=fmean(line["truncated"] for line in lines),
        unanswered=fmean(line["answer"] is None for line in lines),
        # How fast it decodes: 1 is as slow as an autoregressive model, K is a block at once.
        tokens_per_step=sum(line["decoded"] for line in lines) / sum(max(line["step_map"]) for line in lines),
        tokens_per_second=sum(line["length"] for line in lines) / sum(line["seconds"] for line in lines))


def accuracy(samples):
    """Lists of each problem's samples (1 right, 0 wrong) -> accuracy, its standard error, n, and pass@k.

    n is the number of problems. The standard error is over problems, too: samples of one problem are alike,
    and count as one observation. Two problems with the samples 1 1 0 and 0 0 0 have the means .67 and 0, so
    accuracy .33, n = 2.
    """
    means = [fmean(numbers) for numbers in samples]
    mean = fmean(means) if means else None  # every problem counts the same, however many samples it has
    n = len(means)
    error = stdev(means) / n**0.5 if n > 1 else None  # one problem alone says nothing about others
    # pass@k for k = 2, 4, 8, ..., up to the smallest number of samples of a problem.
    fewest = min((len(numbers) for numbers in samples), default=0)
    found = {f"pass_at_{k}": fmean(pass_at(k, numbers) for numbers in samples)
             for k in (2, 4, 8, 16, 32, 64, 128, 256) if k <= fewest}
    return dict(accuracy=mean, standard_error=error, n=n) | found


def pass_at(k, numbers):
    """Probability that among k samples, chosen at random, at least one is right (arXiv 2107.03374).

    This is the unbiased estimator of pass@k. Of four samples one is right. Two samples can be chosen in 6
    ways. In 3 of these the right one is among them, so pass@2 is .5.
    """
    # One minus the probability that all k of them are wrong.
    num_wrong = sum(not number for number in numbers)
    return 1 - math.comb(num_wrong, k) / math.comb(len(numbers), k)


# ------------------------------------------------------------------------------------------------------------
# The command. The method ends here.


def evaluate_command(args):
    """Samples, grades, and prints a table. Responses are written in chunks: a stopped call can go on."""
    strategies = ["autoregressive"] if args.ar else args.strategy
    for name in args.strategy:  # report a wrong name before a model is loaded
        flags.load_function(name, dict(rollout.STRATEGIES, greedy=None), "--strategy")
    # With --ar this is a left-to-right model. Prompts, grader and table stay the same.
    model, tokenizer, compute = machine.load_to_answer(args)
    # The same problems, in the same order, whenever this command is called again.
    problems = load_prompts(args.data, tokenizer, flags.read_flags(Prompting, args))[:args.limit]
    examinee = Examinee(model, tokenizer, flags.read_flags(Decoding, args, strategy="dynamic"), compute)
    # The folder's default name says what was asked of whom:
    # "runs/x/checkpoints/step-45" and "test.jsonl" -> eval-runs-x-checkpoints-step-45-test.jsonl
    name = f"eval-{args.ar or args.model or 'tiny'}-{args.data}"
    name = args.name or re.sub(r"[^\w.-]+", "-", name).strip("-.")
    # The settings in args.json hold fingerprints: other weights under the same path are refused.
    marks = dict(weights=runs.weight_mark(model.parameters()), problems=runs.mark(problems))
    with runs.Run(name, vars(args) | marks, resume=True, groups=GROUPS, log="responses.jsonl") as run:
        run.begin()
        # What an earlier call answered is not asked again. So a call may be stopped, or --samples raised.
        done = {(line["strategy"], line["problem"], line["sample"]): line for line in run.read()}
        summary = {}
        for strategy in strategies:
            keys = [(strategy, i, sample) for i in range(len(problems)) for sample in range(args.samples)]
            todo = [key for key in keys if key not in done]
            parallel.say(f"{strategy}: {len(keys) - len(todo)} of {len(keys)} responses were there already")
            # Responses are saved chunk by chunk, so at most one chunk is lost. A process decodes --slots
            # responses at a time (None: as many as fit), and a chunk holds twice that many of each process.
            size = (args.slots or 64) * parallel.processes()[1] * 2
            chunks = [todo[start:start + size] for start in range(0, len(todo), size)]
            for chunk in parallel.bar(chunks, strategy):
                # A sample's draws follow from its problem and its number, whatever was there already.
                seeds = [mix(args.seed, number, sample) for _, number, sample in chunk]
                asked = [problems[number] for _, number, _ in chunk]
                lines = examinee.ask(asked, seeds, None if args.ar else strategy)
                # Each line is written with its strategy, its problem and its number.
                for key, line in zip(chunk, lines):
                    done[key] = dict(strategy=key[0], problem=key[1], sample=key[2]) | line
                    run.write(done[key])
            # All responses that were asked for, whenever they were made.
            summary[strategy] = summarize([done[key] for key in keys])
        run.finish(summary)
    parallel.say(f"{args.data}, {args.samples} responses per problem: they and a summary are in {run.folder}")
    show.print_columns(summary)
    return summary


@dataclass
class Evaluation:
    """The flags that say which model is asked which problems, or which file is graded."""

    model: str = setting(None, "diffusion model: checkpoint folder or hub id; None: the tiny model")
    ar: str = setting(None, "evaluate this autoregressive model instead, decoded by transformers")
    data: str = setting("arithmetic-test", f"{', '.join(data.HUB)}, sudoku-test, a file, or a hub id")
    limit: int = setting(None, "ask only this number of problems, the first ones; None: all", low=1)
    samples: int = setting(1, "responses per problem; a later call may raise it", low=1, may_change=True)
    strategy: str = setting(("static", "dynamic"), "how to decode: any --strategy of tracerl.py, or greedy "
                            "(dynamic at temperature 0)", number="+")
    seed: int = setting(0, "random seed of the responses")
    name: str = setting(None, "folder under runs/. To go on, repeat name and flags", may_change=True)
    grade: str = setting(None, "grade this file instead: JSON lines with gold and response")
    out: str = setting(None, "with --grade: file for the verdicts")


GROUPS = {"evaluation": Evaluation, "decoding": Decoding, "prompts": Prompting, "machine": machine.Inference}


def main(argv=None):
    """Evaluates or grades."""
    is_tiny = flags.peek(argv, "--ar") is None and machine.is_tiny(flags.peek(argv, "--model"))
    parser = flags.make_parser("Evaluate a model on math problems, or grade a file.", GROUPS, is_tiny)
    args = flags.parse(parser, GROUPS, argv)
    # Without --grade a model is asked. With it, a file of answers is graded, and no model is loaded.
    if args.grade is None:
        return evaluate_command(args)
    if args.out is None:
        parser.error("--grade needs --out")
    return grading.grade_file(args.grade, args.out)


if __name__ == "__main__":
    runs.run_command(main)
