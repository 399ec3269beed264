"""eval_math.py - what is asked, and what counts as right.

    Problem("894+396=", "1290") -> prompt tokens -> Rollout -> "...\\boxed{1290}" -> "1290" -> reward 1

Problems come from an embedded task, a local file or the hub. A prompt is put around each. A response is right
if its last \\boxed{} equals the answer. Accuracy is the mean over problems, with its standard error.

    python eval_math.py                                                # the tiny model on its 400 test problems
    python eval_math.py --model JetLM/SDAR-4B-Chat --data math500 --n 3
    python eval_math.py --grade answers.jsonl --out verdicts.jsonl     # grade a file, without a model

Read in this order: Problem, load_problems, encode_prompts; math_reward, give_rewards; ask, evaluate, accuracy.

Left out:
  1. the embedded tasks, arithmetic and Sudoku: plumbing/tasks.py;
  2. reading data files: plumbing/data.py; comparing two answers, "1/2" and "0.5": plumbing/grading/;
  3. few-shot prompts, majority votes.
"""

import dataclasses
import functools
import math
import re
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from statistics import fmean

import torch

import rollout
from plumbing import autoregressive, checkpoints, data, flags, grading, machine, parallel, runs, show
from plumbing.flags import setting
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
    tokens: list = field(default_factory=list)  # the prompt, once encode_prompts has made it


PROMPT_STYLES = ("chat", "trado", "think", "no_think", "plain")


@dataclass
class Prompting:
    """How problems become prompts. A model must be trained and tested on the same kind of prompt."""

    max_prompt_tokens: int = setting(784, "longer prompts are skipped and counted", low=1)
    prompt_style: str = setting(
        "chat", "chat: the chat template; trado: without its last newline; think: followed by <think>; "
        "no_think: the template's own switch; plain: no template, for base models", choices=PROMPT_STYLES)
    instruction: str = setting(
        "\nPlease reason step by step, and put your final answer within \\boxed{}.",
        "text after each problem; empty for data with whole prompts")
    system: str = setting(None, "a system message before each problem")
    problem_column: str = setting(None, "column of the problem, if it has an uncommon name")
    answer_column: str = setting(None, "column of the answer, if it has an uncommon name")
    strict: bool = setting(False, "refuse data that have rows without an answer")

    def __post_init__(self):
        flags.check(self)


def load_problems(source, prompting=Prompting(), needs_answer=True):
    """Problems from any source -> list[Problem].

    source: "arithmetic[-dev|-test]", "sudoku[-dev|-test]"; a local file or folder; a name (math500, gsm8k,
    gsm8k-train, aime2024); or a hub id, owner/name[:config[:split]]. needs_answer: rows without an answer are
    skipped and counted. Errors name the source, the row and the column.
    """
    task, _, split = source.partition("-")  # "sudoku-dev" -> sudoku, dev; "sudoku" alone is for training
    if task in EMBEDDED and split in ("", "dev", "test"):
        # The same 400 or 20,000 problems for everyone: seed 0, and a pupil who never slips.
        rows = EMBEDDED[task](split or "train", 400 if split else 20000)
        return [Problem(**row) for row in rows]
    rows, num_skipped = data.read_problems(
        source, prompting.problem_column, prompting.answer_column, needs_answer, prompting.strict)
    if num_skipped:
        parallel.say(f"{source}: skipped {num_skipped} rows without an answer")
    return [Problem(**row) for row in rows]


def encode_prompts(problems, tokenizer, prompting=Prompting()):
    """Sets Problem.tokens -> (problems that fit, how many do not).

    A model is good at prompts like those it was trained on; one newline too many can cost points. TraDo was
    trained on prompts that end with the word "assistant", hence the style of that name.
    """
    style = prompting.prompt_style
    if style != "plain" and not tokenizer.chat_template:
        raise ValueError("this tokenizer has no chat template: use --prompt_style plain")
    switch = dict(enable_thinking=False) if style == "no_think" else {}  # templates without it ignore it
    for p in problems:
        chat = data.as_chat(p.problem, prompting.instruction)  # ends with the user's message
        if prompting.system is not None and chat[0]["role"] != "system":  # the data's own message wins
            chat = [dict(role="system", content=prompting.system), *chat]
        if style == "plain":
            text = "\n".join(message["content"] for message in chat)
        else:
            text = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False, **switch)
        if style == "trado":
            text = text.rstrip()
        if style == "think" and not text.rstrip().endswith("<think>"):
            text += "<think>\n"
        p.tokens = encode(text, tokenizer)
    fitting = [p for p in problems if len(p.tokens) <= prompting.max_prompt_tokens]
    if not fitting:
        raise ValueError(f"none of {len(problems)} prompts has at most {prompting.max_prompt_tokens} tokens: "
                         "raise --max_prompt_tokens")
    return fitting, len(problems) - len(fitting)


def encode(text, tokenizer):
    """Text -> token ids. ValueError where the tokenizer does not know a character: it would be lost."""
    tokens = tokenizer(text, add_special_tokens=False).input_ids  # a template has written the special ones
    # Byte-level tokenizers (Qwen, LLaDA) know every character; the tiny one has 18 tokens.
    unknown = getattr(tokenizer, "unk_token_id", None)
    if unknown is not None and unknown in tokens:
        raise ValueError(f"the tokenizer does not know all characters of {text[:80]!r}: these are data for "
                         "another model")
    return tokens


def load_prompts(source, tokenizer, prompting, needs_answer=True):
    """load_problems and encode_prompts -> list[Problem]; says how many there are."""
    problems = load_problems(source, prompting, needs_answer)
    problems, num_long = encode_prompts(problems, tokenizer, prompting)
    skipped = f"; skipped {num_long} with a prompt over {prompting.max_prompt_tokens} tokens" if num_long else ""
    parallel.say(f"{source}: {len(problems)} problems{skipped}")
    num_different = len(data.group_repeats(problems))
    if num_different < len(problems):
        parallel.say(f"{source}: {len(problems)} rows are {num_different} problems; an error is over problems")
    return problems


# ------------------------------------------------------------------------------------------------------------
# What counts as right.


def math_reward(problem, text, rollout):
    """1 if the last \\boxed{} is right and the response has ended, else 0.

    A truncated response is wrong whatever it says. Otherwise a model learns to box a guess early, and never to
    stop.

    FORK HERE. --reward file.py:function calls a function of yours for each response, by the names of its
    parameters:
        problem    the Problem
        text       the response before eos
        tokens     the same as token ids, with eos
        rollout    the record: step_map, is_truncated, ... (truncation costs nothing unless you make it)
    It gives a number, or a list with one number per token. The list is a process reward, for --advantage value
    or an advantage of your own. Give every token of a denoising step the reward of that step: returns are sums
    over trace steps of the MEAN in the step.
    """
    return float(not rollout.is_truncated and grading.is_correct(grading.extract_answer(text), problem.answer))


def give_rewards(rollouts, problems, tokenizer, reward=math_reward):
    """Sets Rollout.reward and token_rewards, on every process. ValueError for a reward that is not finite.

    Each process judges a part. A verdict that a time limit decided must be the same on every process: else
    they would train on different groups.
    """
    # The grader's checks run in worker processes. A function of the user's may not like threads.
    num_threads = grading.Workers.NUMBER if reward is math_reward else 1
    pairs = parallel.deal(list(zip(rollouts, problems)))
    with ThreadPoolExecutor(num_threads) as pool:
        judged = list(pool.map(lambda pair: judge(*pair, tokenizer, reward), pairs))
    for r, (sequence_reward, token_rewards) in zip(rollouts, parallel.gather(judged)):
        r.reward = sequence_reward
        r.token_rewards = token_rewards


def judge(r, problem, tokenizer, reward):
    """One response's reward, and its process rewards if the function gives those -> (float, list of float)."""
    tokens = r.response[:r.num_tokens]  # up to and including eos: what stands behind it is filling
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
    if values.shape != (len(tokens),):
        raise ValueError(f"the reward function gave {values.numel()} numbers for {len(tokens)} tokens")
    return values.sum().item(), values.tolist()


def response_text(r, tokenizer):
    """The response before eos as text, to be judged or read. Nothing is ever encoded again.

    Special tokens stay, since a reward may look for one such as </think>.
    """
    return tokenizer.decode(r.response[:r.num_tokens - (not r.is_truncated)])


# ------------------------------------------------------------------------------------------------------------
# Accuracy.


def ask(respond, tokenizer, problems, seeds, reward=None):
    """One response to each problem, graded -> a dict for each.

    respond: a function of (prompts, seeds) that gives rollouts, such as generate_everywhere with its other
    arguments filled in. reward: a function of one's own, whose value is added.
    """
    started = time.perf_counter()
    rollouts = respond([p.tokens for p in problems], seeds)
    seconds = (time.perf_counter() - started) / max(len(problems), 1)  # grading is not a model's speed
    give_rewards(rollouts, problems, tokenizer)  # accuracy is always the grader's
    lines = []
    for r, p in zip(rollouts, problems):
        text = response_text(r, tokenizer)
        lines.append(dict(
            text=p.problem, gold=p.answer, answer=grading.extract_answer(text), correct=bool(r.reward),
            truncated=r.is_truncated, length=r.num_tokens, decoded=len(r.response), step_map=r.step_map,
            seconds=seconds, response=text))
    if reward not in (None, math_reward):
        give_rewards(rollouts, problems, tokenizer, reward)
        lines = [line | dict(reward=r.reward) for line, r in zip(lines, rollouts)]
    return lines


def evaluate(respond, tokenizer, problems, num_samples=1, seed=0, reward=None):
    """Accuracy on problems -> a dict with accuracy, standard_error, n and more, see `summarize`."""
    # Fixed seeds: before and after training, the same draws meet another policy.
    keys = [(number, sample) for number in range(len(problems)) for sample in range(num_samples)]
    seeds = [mix(seed, number, sample) for number, sample in keys]
    return summarize(ask(respond, tokenizer, [problems[number] for number, _ in keys], seeds, reward))


def summarize(lines):
    """What a table shows of many responses: accuracy, lengths, speed."""
    samples = {}  # by problem; a file may hold the same problem many times
    for line in lines:
        samples.setdefault(str(line["text"]), []).append(float(line["correct"]))
    found = accuracy(list(samples.values()))
    if not any(line["gold"] for line in lines):  # with a reward of one's own: nothing is right or wrong
        found = dict.fromkeys(found)
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

    The error is over problems: samples of one problem are alike, and count as one observation together. Two
    problems with the samples 1 1 0 and 0 0 0 have the means .67 and 0, so accuracy .33, n = 2.
    """
    means = [fmean(numbers) for numbers in samples]
    mean = fmean(means)
    n = len(means)
    error = None  # one problem alone says nothing about others
    if n > 1:
        variance = sum((m - mean) ** 2 for m in means) / (n - 1)  # n - 1: the mean is estimated, too
        error = (variance / n) ** 0.5
    found = dict(accuracy=mean, standard_error=error, n=n)
    fewest = min(len(numbers) for numbers in samples)
    k = 2
    while k <= fewest:
        found[f"pass_at_{k}"] = fmean(pass_at(k, numbers) for numbers in samples)
        k *= 2
    return found


def pass_at(k, numbers):
    """Probability that k of these samples, chosen at random, hold a right one (unbiased, arXiv 2107.03374).

    Of four samples one is right: two of them hold it in 3 of 6 choices, so pass@2 is .5.
    """
    num_wrong = sum(not number for number in numbers)
    return 1 - math.comb(num_wrong, k) / math.comb(len(numbers), k)


def mode(name, decoding):
    """The Decoding of an evaluation mode: a strategy, or "greedy", the most probable tokens."""
    if name == "greedy":
        return dataclasses.replace(decoding, temperature=0.0)
    is_own = name == decoding.strategy
    return dataclasses.replace(decoding, strategy=name,
                               denoising_steps=decoding.denoising_steps if is_own else None)


# ------------------------------------------------------------------------------------------------------------
# The command. The method ends here.


def evaluate_command(args):
    """Samples, grades, tabulates. Each response is in runs/<name>/responses.jsonl at once: a run can go on."""
    parallel.start_processes(args.device, is_tiny=args.ar is None and machine.is_tiny(args.model))
    settings = flags.read_flags(machine.Inference, args)
    modes = read_modes(args)
    if args.ar:  # the yardstick goes through the same prompts, the same grader and the same table
        model, tokenizer = autoregressive.load(args.ar)
        compute = rollout.PLAIN._replace(generate=autoregressive.generate)
    else:
        model, tokenizer = machine.load_model(args.model or machine.start_of(args.attention), settings)
        compute = machine.choose_compute(settings, model)
    if tokenizer is None:
        raise ValueError(f"{args.model or args.ar} has no tokenizer: prompts cannot be encoded")
    problems = load_prompts(args.data, tokenizer, flags.read_flags(Prompting, args))[:args.limit]
    # "runs/x/checkpoints/step-45" and "test.jsonl" -> eval-runs-x-checkpoints-step-45-test.jsonl
    name = f"eval-{args.ar or args.model or 'tiny'}-{args.data}"
    name = args.name or re.sub(r"[^\w.-]+", "-", name).strip("-.")
    # The settings in args.json hold fingerprints: other weights under the same path are refused.
    marks = dict(weights=runs.weight_mark(model), problems=data.fingerprint(problems))
    may_change = {"n", "debug"} | flags.changeable(machine.Inference)
    with runs.Run(name, vars(args) | marks, resume=True, log="responses.jsonl", may_change=may_change) as run:
        run.begin()
        done = {(line["strategy"], line["problem"], line["sample"]): line for line in run.read()}
        for strategy, decoding in modes.items():
            if args.n > 1 and (decoding.temperature == 0 or decoding.top_k == 1):
                parallel.say(f"WARNING: {strategy} is greedy: all {args.n} samples of a problem are the same")
            respond = functools.partial(
                rollout.generate_everywhere, model, decoding=decoding, compute=compute)
            keys = [(strategy, number, sample) for number in range(len(problems)) for sample in range(args.n)]
            todo = [key for key in keys if key not in done]
            parallel.say(f"{strategy}: {len(keys) - len(todo)} of {len(keys)} responses were there already")
            # A chunk is what is lost when the command is stopped: two rounds of all slots.
            size = (args.slots or 64) * parallel.processes()[1] * 2
            chunks = [todo[start:start + size] for start in range(0, len(todo), size)]
            for chunk in parallel.bar(chunks, strategy):
                seeds = [mix(args.seed, number, sample) for _, number, sample in chunk]
                lines = ask(respond, tokenizer, [problems[number] for _, number, _ in chunk], seeds)
                for key, line in zip(chunk, lines):
                    done[key] = dict(strategy=key[0], problem=key[1], sample=key[2]) | line
                    run.write(done[key])
        strategies = list(dict.fromkeys(key[0] for key in done))
        summary = {strategy: summarize([line for key, line in done.items() if key[0] == strategy])
                   for strategy in strategies}
        run.finish(summary)
    parallel.say(f"{args.data}, n = {args.n}: responses and summary are in {run.folder}")
    show.print_columns(summary)
    return summary


def read_modes(args):
    """The Decoding of every mode that is asked for, by name. The other flags hold in all of them."""
    modes = {}
    for name in args.strategy if not args.ar else ["autoregressive"]:
        strategy = "dynamic" if name in ("greedy", "autoregressive") else name
        modes[name] = flags.read_flags(Decoding, args, strategy=strategy)
        if name == "greedy":
            modes[name] = mode(name, modes[name])
    return modes


def parse_args(argv=None):
    """The flags of eval_math.py."""
    parser = flags.make_parser("Evaluate a model on math problems, or grade a file.")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--model", help="diffusion model: checkpoint folder or hub id; None: the tiny model")
    what.add_argument("--ar", metavar="MODEL", help="autoregressive model, by transformers' generate, under the "
                      "same prompts and grader")
    what.add_argument("--grade", metavar="FILE", help="grade JSON lines of gold and response")
    flag = parser.add_argument
    flag("--out", help="with --grade: where the verdicts go")
    flag("--data", default="arithmetic-test",
         help=f"arithmetic-test, {', '.join(data.HUB)}, a file, or a hub id owner/name[:config[:split]]")
    flag("--limit", type=flags.positive, help="only the first problems")
    flag("--n", type=flags.positive, default=1, help="samples per problem")
    flag("--strategy", nargs="+", default=["static", "dynamic"], help="also greedy")
    flag("--seed", type=int, default=0, help="of the samples")
    flag("--name", type=runs.folder_name, help="folder under runs/; the same name and flags go on with it")
    flag("--debug", action="store_true", help="show the traceback of an error")
    is_tiny = machine.is_tiny(flags.peek(argv, "--model"))
    flags.add_flags(parser, "machine", machine.Inference, is_tiny)
    flags.add_flags(parser, "prompts", Prompting, is_tiny)
    flags.add_flags(parser, "decoding", Decoding, is_tiny, skip=("strategy",))
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
