"""bench_methods.py - does the trace matter? Published estimators under one sampler and one budget.

    python tests/bench_methods.py                              # everything: hours; goes on where it stopped
    python tests/bench_methods.py --settings k4 --arms tracerl random coupled
    python tests/bench_methods.py --settings full --seconds    # seconds of an RL step, on an idle machine
    python tests/bench_methods.py --settings k4 --arms tracerl random rejection --equal_seconds
    python tests/bench_methods.py --settings k4 --variance     # the noise of the gradient, measured directly
    python tests/bench_methods.py --quick                      # a small part, beside tests/evidence.json
    python tests/bench_methods.py --show --out tests/evidence.json --picture assets/methods.png

A setting is a task with a kind of attention. Its starts are made here, by sft.py, one for each seed; they are
in runs/start-SETTING-SEED. An arm is one command line of tracerl.py, which is printed. All arms of a setting
have the same starts, and the same number of RL steps and rollouts.

Each arm's learning rate is one of --lrs. Development problems choose it over the first two seeds; test
problems choose nothing. Among the rates within 0.025 of the best accuracy, the one that earned most on the
way is taken: 800 answers cannot tell these rates apart.

--equal_seconds is a second budget. It measures six further RL steps of each arm. An arm whose steps are over
15 percent cheaper than the first one's then runs more of them, so that both take as long. One arm has this
budget only. It is "rejection": fine-tuning on the right ones among responses of the start. A quarter of its
seconds samples responses, and the rest makes updates of sft.py. Run --seconds before, with nothing else on
the machine.

Several of these commands may run side by side. A run belongs to whoever made its folder under runs/ first,
until it is silent for ten minutes.

Tables and --out hold what is there after training: the mean over the seeds, +- half of a 95 percent
confidence interval (Student's t). "reward" is the mean over all RL steps, so it shows speed. It compares only
arms that decode alike, so not static and just-grpo. "vs" is the difference to the first arm, paired by seed,
and not corrected for the number of arms. "s/step" is the median of rollouts and update together. The value
arm spends its first 10 steps on the value model alone.
"""

import argparse
import dataclasses
import fcntl
import functools
import json
import os
import shutil
import sys
import time
from contextlib import contextmanager
from pathlib import Path
from statistics import fmean, median, stdev
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch
from matplotlib.figure import Figure

import rollout
import sft
import tracerl
from eval_math import Examinee, give_rewards, load_prompts, math_reward
from plumbing import checkpoints, flags, machine, parallel, runs
from plumbing.prompts import Prompting
from rollout import Decoding, mix

SETTINGS = {  # task, K, attention
    "k4": ("arithmetic", 4, "block"),
    "k8": ("arithmetic", 8, "block"),
    "k16": ("arithmetic", 16, "block"),
    "full": ("arithmetic", 4, "full"),
    "sudoku-k4": ("sudoku", 4, "block"),
    "sudoku-k16": ("sudoku", 16, "block"),
    "sudoku-full": ("sudoku", 4, "full"),
}
FORKS = ROOT / "examples/forks.py"
ARMS = {  # what is compared: flags of tracerl.py
    "tracerl": [],
    "random": ["--views=random"],
    "coupled": ["--views=coupled"],
    "value": ["--advantage=value"],
    "value-clip": ["--advantage=value", "--value_clip=0.2"],
    "batch": [f"--advantage={FORKS}:minus_step_mean"],
    "raw": [f"--advantage={FORKS}:raw"],
    "shrink-2": ["--shrink=2"],
    "shrink-4": ["--shrink=4"],
    "static": ["--strategy=static"],
    "some-steps": [f"--views={FORKS}:some_steps"],  # AGRPO
    "diffu-grpo": [f"--views={FORKS}:fully_masked"],
    "wd1": [f"--advantage={FORKS}:softmax_weights", f"--loss={FORKS}:ratio_free"],
    "clip-higher": [f"--loss={FORKS}:clip_higher"],  # DAPO
    "gspo": [f"--loss={FORKS}:sequence_ratio"],
    "dr-grpo": [f"--advantage={FORKS}:centered", f"--loss={FORKS}:constant_length"],
    "just-grpo": ["--strategy=sequential"],
    "as-many-random": [f"--views={FORKS}:as_many_random"],  # random masks at the cost of the trace
    "mean-per-step": [f"--advantage={FORKS}:mean_per_step"],  # the paper's weights
    "no-reward": [f"--reward={FORKS}:always_one", f"--advantage={FORKS}:raw"],  # a control: what sharpening alone does
    "rejection": [],  # see `fine_tune_on_right`
}
VIEWS = ("tracerl", "random", "coupled")
EQUAL = ", equal seconds"
PUBLISHED = ("tracerl", "shrink-4", "some-steps", "random", "coupled", "diffu-grpo", "wd1", "clip-higher",
             "gspo", "dr-grpo", "value", "just-grpo", "as-many-random", "mean-per-step", "no-reward",
             "rejection")
WHICH = dict.fromkeys(SETTINGS, PUBLISHED) | {
    "k4": (*PUBLISHED, "value-clip", "batch", "raw", "shrink-2", "static"), "k8": VIEWS}
STRATEGIES = ("dynamic", "static", "greedy")  # by which test problems are answered
EVIDENCE = ROOT / "tests/evidence.json"
BROKEN = ROOT / "tests/broken.json"
QUESTIONS = ROOT / "tests/questions.json"
LRS = ("1e-4", "3e-4", "1e-3")
STUDENT = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 8: 2.365, 10: 2.262}  # 97.5 percent, by number

# ------------------------------------------------------------------------------------------------------------
# One run.


class Trial(NamedTuple):
    """A run of the comparison."""

    setting: str
    arm: str
    lr: str
    seed: int
    size: object  # RL steps; of rejection: (responses, updates)


def start_of(setting, seed, args):
    """The checkpoint from which a run starts. --more=--model=FOLDER names another one."""
    return flags.peek(args.more, "--model") or f"runs/start-{setting}-{seed}/checkpoint"


def make_start(setting, seed):
    """Fine-tunes a tiny model on the work of a careless pupil, as far as leaves room for improvement."""
    task, block_size, attention = SETTINGS[setting]
    # High enough that most groups hold right and wrong responses, low enough to leave room.
    stop_accuracy = 0.4 if task == "arithmetic" else 0.3
    lr = 6e-3
    if attention == "full":  # learns more slowly, and at 6e-3 not from every seed
        stop_accuracy = 0.2
        lr = 2e-3
    shutil.rmtree(f"runs/start-{setting}-{seed}", ignore_errors=True)  # half of one, if it was stopped
    sft.main([f"--data={task}", f"--block_size={block_size}", f"--attention={attention}", f"--seed={seed}",
              f"--stop_accuracy={stop_accuracy}", f"--lr={lr}", "--save_every=0",
              f"--name=start-{setting}-{seed}"])


def command(trial, args):
    """The flags of tracerl.py for a trial."""
    task, _, _ = SETTINGS[trial.setting]
    steps = 1 if trial.arm == "rejection" else trial.size
    words = [f"--model={start_of(trial.setting, trial.seed, args)}", f"--train_data={task}", *ARMS[trial.arm],
             f"--lr={trial.lr}", f"--seed={trial.seed}", f"--steps={steps}", f"--eval_every={steps}",
             *args.more]
    # Other flags are another run, wherever the project lies.
    mark = runs.mark([trial, " ".join(words).replace(str(ROOT), "")])[:6]
    return [*words, f"--name=methods-{trial.setting}-{trial.arm}-lr{trial.lr}-s{trial.seed}-{mark}"]


def folder_of(trial, args):
    """The folder of a trial's run."""
    return Path("runs") / flags.peek(command(trial, args), "--name")


def read_metrics(folder):
    """The lines of metrics.jsonl."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def read_result(folder):
    """What a finished run left behind -> dict, or None."""
    if not (folder / "summary.json").is_file():
        return None
    lines = read_metrics(folder)
    summary = checkpoints.read_json(folder / "summary.json")
    accuracies = lambda evaluations: {name: e["accuracy"] for name, e in evaluations.items()}
    explained = [line["explained_variance"] for line in lines[4:]
                 if "explained_variance" in line and 0 < line["reward"] < 1]
    return dict(curve=[line["reward"] for line in lines], reward=fmean(line["reward"] for line in lines),
                dev=lines[-1]["dev_accuracy"], explained=explained,
                seconds=median(line["rollout_seconds"] + line["update_seconds"] for line in lines),
                before=accuracies(summary["before"]), **accuracies(summary["after"]))


def run_all(trials, args):
    """Runs what nobody has run yet -> the results, once others have finished theirs."""
    while True:
        results = [read_result(folder_of(trial, args)) for trial in trials]
        if all(results):
            return results
        for trial, result in zip(trials, results):
            if result is None:
                run_if_free(trial, args)
        time.sleep(1)


def run_if_free(trial, args):
    """Runs a trial unless another command is at it."""
    start = start_of(trial.setting, trial.seed, args)
    with one_at_a_time():  # whoever comes first makes the start, and the others wait for it
        if not os.path.isdir(start):
            make_start(trial.setting, trial.seed)
    if not claim(folder_of(trial, args)):
        return
    words = command(trial, args)
    if trial.arm == "rejection":
        fine_tune_on_right(trial, args)
    else:
        print("python tracerl.py " + " ".join(words), flush=True)
        tracerl.main(words)


@contextmanager
def one_at_a_time():
    """Inside, no other of these commands is."""
    os.makedirs("runs", exist_ok=True)
    with open("runs/methods.lock", "w", encoding="utf-8") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # let go of when the file closes, or the process dies
        yield


def claim(folder):
    """Makes a run's folder -> whether it is ours to run. One that is silent for ten minutes is taken over."""
    if (folder / "summary.json").is_file():  # another command has finished it meanwhile
        return False
    if folder.exists():
        newest = max(path.stat().st_mtime for path in [folder, *folder.glob("*.json*")])
        if time.time() - newest > 600:
            shutil.rmtree(folder)
    try:
        folder.mkdir(parents=True)
        return True
    except FileExistsError:
        return False


def fine_tune_on_right(trial, args):
    """Rejection sampling: the start answers training problems, and learns from its right answers alone.

    What it leaves behind is what a run of tracerl.py with one RL step leaves: metrics and a summary.
    """
    num_responses, num_updates = trial.size
    print(f"rejection, {trial.setting}, seed {trial.seed}: {num_responses} responses, then {num_updates} "
          f"updates at learning rate {trial.lr}", flush=True)
    settings = tracerl.parse_args(command(trial, args))
    machine.start(settings)
    model, tokenizer = checkpoints.load_model(settings.model, settings.block_size)
    compute = machine.choose_compute(settings, model)
    examinee = Examinee(model, tokenizer, flags.read_flags(Decoding, settings), compute)
    prompting = flags.read_flags(Prompting, settings)
    load = functools.partial(load_prompts, tokenizer=tokenizer, prompting=prompting)
    test = load(settings.eval_data)
    evaluate = lambda: {name: examinee.evaluate(test, name, seed=trial.seed) for name in STRATEGIES}
    before = evaluate()
    problems = load(settings.train_data)
    asked = [problems[i % len(problems)] for i in range(num_responses)]
    lines = examinee.ask(asked, [mix(trial.seed, i) for i in range(num_responses)])
    started = time.perf_counter()
    # A right response with a <pad> inside is left out: as a text, it cannot be encoded again.
    right = [dataclasses.replace(problem, solution=line["response"]) for problem, line in zip(asked, lines)
             if line["correct"] and "<pad>" not in line["response"]]
    examples = sft.to_examples(right, tokenizer, model.config, settings.max_new_tokens)
    if examples:  # else there is nothing to learn from
        recipe = sft.Recipe(seed=trial.seed, steps=num_updates, batch_size=min(64, len(examples)),
                            lr=float(trial.lr), warmup=max(1, num_updates // 10),
                            cooldown=max(1, num_updates // 3))
        fine_tune(parallel.make_learner(model, recipe.lr, (0.9, 0.98)), examples, recipe, compute)
    seconds = time.perf_counter() - started
    line = dict(step=1, reward=len(right) / num_responses, update_seconds=seconds,
                rollout_seconds=sum(line["seconds"] for line in lines),
                dev_accuracy=examinee.evaluate(load(settings.dev_data), seed=trial.seed)["accuracy"])
    folder = folder_of(trial, args)
    (folder / "metrics.jsonl").write_text(json.dumps(line) + "\n")
    checkpoints.write_json(folder / "summary.json", dict(before=before, after=evaluate(), seed=trial.seed))


def fine_tune(learner, examples, recipe, compute):
    """The loop of sft.py, without its log."""
    decay_start = max(1, recipe.steps - recipe.cooldown)
    for step in range(recipe.steps):
        parallel.set_learning_rate(learner.optimizer, sft.learning_rate(step, recipe, decay_start))
        batch = sft.draw_batch(examples, step, recipe)
        sft.train_step(learner, batch, sft.noise_views, False, compute)


# ------------------------------------------------------------------------------------------------------------
# The comparison. A table is {arm: (learning rate, results by seed)}.


def compare(setting, arms, args):
    """A learning rate for every arm, then all seeds -> a table."""
    return {arm: choose_and_run(setting, arm, args.steps, args) for arm in arms if arm != "rejection"}


def choose_and_run(setting, arm, size, args):
    """Chooses the learning rate of an arm, and runs all seeds -> (learning rate, results)."""
    some = range(min(2, args.seeds))
    trials = {lr: run_all([Trial(setting, arm, lr, seed, size) for seed in some], args) for lr in args.lrs}
    dev = {lr: fmean(r["dev"] for r in results) for lr, results in trials.items()}
    reward = {lr: fmean(r["reward"] for r in results) for lr, results in trials.items()}
    if arm == "rejection":  # its rewards are those of the start
        lr = max(args.lrs, key=dev.get)
    else:
        lr = max((lr for lr in args.lrs if dev[lr] > max(dev.values()) - 0.025), key=reward.get)
    return lr, run_all([Trial(setting, arm, lr, seed, size) for seed in range(args.seeds)], args)


def with_equal_seconds(setting, table, has_rejection, args):
    """The same arms and learning rates, cheap ones with more RL steps, and rejection -> a table."""
    first = next(iter(table))
    cost = {arm: step_cost(setting, arm, args) for arm in table}
    equal = {}
    for arm, (lr, results) in table.items():
        steps = round(args.steps * cost[first] / cost[arm])
        if arm == first:
            equal[arm] = lr, results
        elif steps > 1.15 * args.steps:  # others cost as much, and are in the first table
            trials = [Trial(setting, arm, lr, seed, steps) for seed in range(args.seeds)]
            equal[arm] = lr, run_all(trials, args)
    if has_rejection:
        response, update = rejection_cost(setting, args)
        seconds = args.steps * cost[first]
        size = (max(64, round(seconds / 4 / response)), max(1, round(seconds * 3 / 4 / update)))
        lr, results = choose_and_run(setting, "rejection", size, args)
        # All its seconds, as if they were those of so many RL steps.
        equal["rejection"] = lr, [r | dict(seconds=r["seconds"] / args.steps) for r in results]
    return equal


def step_cost(setting, arm, args):
    """Seconds of an RL step of an arm: the median of six.

    They are those of one core of an idle machine only if nothing else ran while they were measured. The first
    steps of the value arm are not typical.
    """
    result, = run_all([Trial(setting, arm, "3e-4", 0, 6)], args)
    print(f"{setting}, {arm}: {result['seconds']:.2f} seconds per RL step", flush=True)
    return result["seconds"]


def rejection_cost(setting, args):
    """Seconds of a response of the start, and of an update of 64 of them."""
    size = (512, 20)
    trial = Trial(setting, "rejection", "3e-4", 0, size)
    run_all([trial], args)
    line, = read_metrics(folder_of(trial, args))
    response = line["rollout_seconds"] / size[0]
    update = line["update_seconds"] / size[1]
    print(f"{setting}, rejection: {response * 512:.2f} seconds for 512 responses, {update:.3f} for an update",
          flush=True)
    return response, update


def quick(args):
    """Two seeds of two arms again, beside what evidence.json says of them."""
    known = json.loads(EVIDENCE.read_text())
    setting = "sudoku-k4"
    started = time.perf_counter()
    print(f"{setting}: accuracy (dynamic) after {args.steps} RL steps")
    for arm in ("tracerl", "random"):
        lr, results = known[setting][arm]
        again = run_all([Trial(setting, arm, lr, seed, args.steps) for seed in range(2)], args)
        for seed, result in enumerate(again):
            table = results[seed]
            before = table["before"]["dynamic"]
            # The standard errors of both are 0.025.
            verdict = "agrees" if abs(result["dynamic"] - table["dynamic"]) < 0.1 else "DIFFERS"
            here = f"{result['before']['dynamic']:.3f} -> {result['dynamic']:.3f}"
            print(f"  {arm:8s} seed {seed}: {here} here, {before:.3f} -> {table['dynamic']:.3f} in the "
                  f"table: {verdict}")
    print(f"{time.perf_counter() - started:.0f} seconds (another processor rounds differently, which is like "
          "another seed)")


# ------------------------------------------------------------------------------------------------------------
# Tables.


def interval(numbers):
    """Mean, and half the width of its 95 percent confidence interval."""
    if len(numbers) < 2:
        return fmean(numbers), float("nan")
    return fmean(numbers), STUDENT[len(numbers)] * stdev(numbers) / len(numbers) ** 0.5


def difference(table, arm, name="dynamic"):
    """A number of an arm minus that of the first arm, paired by seed: mean, and half of its interval."""
    _, first = next(iter(table.values()))
    _, results = table[arm]
    return interval([r[name] - other[name] for r, other in zip(results, first)])


def print_table(setting, table):
    """One line per arm."""
    first = next(iter(table))
    _, results = table[first]
    before = {name: fmean(r["before"][name] for r in results) for name in STRATEGIES}
    texts = [f"{name} {accuracy:.3f}" for name, accuracy in before.items()]
    print(f"\n{setting}, {len(results)} seeds; before: " + ", ".join(texts))
    print(f"| arm | lr | reward | vs {first} | dynamic | vs {first} | static | greedy | s/step |")
    print("|---" * 9 + "|")
    for arm, (lr, results) in table.items():
        cells = []
        for name in ("reward", *STRATEGIES):
            cells.append("{:.3f} +- {:.3f}".format(*interval([r[name] for r in results])))
            if name in ("reward", "dynamic"):
                gain = difference(table, arm, name)
                cells.append("" if arm == first else "{:+.3f} +- {:.3f}".format(*gain))
        cells.append(f"{median(r['seconds'] for r in results):.2f}")
        print(f"| {arm} | {lr} | " + " | ".join(cells) + " |", flush=True)
    for arm, (_, results) in table.items():
        if all(r["explained"] for r in results):
            mean, half = interval([fmean(r["explained"]) for r in results])
            print(f"{arm}: explained variance, mean over the steps from 5 on: {mean:.2f} +- {half:.2f}")


def print_overview(tables, name):
    """Every arm in every setting, bold where the interval leaves zero out. name: a strategy, or "reward".

    The first arm's before and after (of the reward: its mean), and the others' difference to it. Last, the
    mean over all settings, of arms that ran in all. The intervals of settings, which are independent, are
    added as squares; that is a little too wide.
    """
    print(f"\n| {name} | " + " | ".join(tables) + " | mean |\n" + "|---" * (len(tables) + 2) + "|")
    for arm in dict.fromkeys(arm for table in tables.values() for arm in table):
        cells = []
        gains = []
        for table in tables.values():
            if arm == next(iter(table)):
                _, results = table[arm]
                before = [r["before"][name] for r in results if name in r["before"]]
                start = f"{fmean(before):.3f} -> " if before else ""
                cells.append(f"{start}{fmean(r[name] for r in results):.3f}")
            elif arm in table:
                gains.append(difference(table, arm, name))
                cells.append(bold(*gains[-1]))
            else:
                cells.append("")
        if len(gains) == len(tables):
            half = sum(half ** 2 for _, half in gains) ** 0.5 / len(gains)
            cells.append(bold(fmean(mean for mean, _ in gains), half))
        print(f"| {arm} | " + " | ".join(cells) + " |", flush=True)


def bold(mean, half):
    """A difference as text, bold where its interval leaves zero out."""
    text = f"{mean:+.3f} +- {half:.3f}"
    return f"**{text}**" if abs(mean) > half else text


# ------------------------------------------------------------------------------------------------------------
# The picture.


OFF_TRACE = {"shrink-4": "4 steps merged", "random": "random view", "coupled": "random and complement",
             "diffu-grpo": "masked view"}  # the arms of the left panel


def draw(tables, broken, order, path):
    """Three panels: what it costs to leave the trace, what a broken replay costs, and what the order changes.

    tables: of evidence.json. broken: of broken.json, see bench_broken.py. order: of questions.json, see
    bench_questions.py. An empty one leaves its panel empty. All show an accuracy minus that of a control,
    paired by seed, with 95 percent intervals.
    """
    left = {text: {setting: difference(table, arm) for setting, table in tables.items()
                   if arm in table and not setting.endswith(EQUAL)} for arm, text in OFF_TRACE.items()}
    middle = {}
    for setting, by_steps in broken.items():
        arms = by_steps.get("30", {})
        for arm in [arm for arm in arms if not arm.startswith("none")]:
            control = arms["none_filtered" if arm == "after_filter" else "none"]
            differences = [r["accuracy"][1] - control[seed]["accuracy"][1] for seed, r in arms[arm].items()]
            middle.setdefault(arm.replace("_", " "), {})[setting] = interval(differences)
    right = {}
    for setting, arms in order.items():
        for tested, text in (("dynamic", "tested by confidence"), ("sequential", "tested left to right")):
            for number, name in (("accuracy", "pass@1"), ("pass_at_16", "pass@16")):
                differences = [r[tested][number] - arms["dynamic"][seed][tested][number]
                               for seed, r in arms["sequential"].items()]
                right.setdefault(f"{name}, {text}", {})[setting] = interval(differences)
    figure = Figure(figsize=(16, 4.8), layout="constrained")
    titles = ("accuracy minus that of the trace", "accuracy minus that of an exact replay",
              "trained left to right, minus by confidence")
    for axes, rows, title in zip(figure.subplots(1, 3), (left, middle, right), titles):
        draw_rows(rows, axes)
        axes.set_title(title, fontsize=11)
    labels = {}  # one legend for all panels
    for axes in figure.axes:
        labels |= dict(zip(*reversed(axes.get_legend_handles_labels())))
    figure.legend(labels.values(), labels, loc="outside lower center", ncols=7, fontsize=10)
    figure.savefig(path, dpi=100)


def draw_rows(rows, axes):
    """A line for each row, and in it a point with its interval for each setting.

    rows: label -> {setting: (mean, half)}.
    """
    colours = {setting: f"C{number}" for number, setting in enumerate(SETTINGS)}
    shown = [setting for setting in SETTINGS if any(setting in cells for cells in rows.values())]
    for number, cells in enumerate(rows.values()):
        for place, setting in enumerate(shown):
            if setting in cells:
                mean, half = cells[setting]
                axes.errorbar(mean, number + 0.12 * (place - len(shown) / 2), xerr=half, fmt="o", capsize=2,
                              markersize=4, color=colours[setting], linewidth=1)
    for setting in shown:
        axes.plot([], [], "o", color=colours[setting], markersize=4,
                  label=setting if "sudoku" in setting else f"arithmetic-{setting}")
    axes.axvline(0, color="0.6", linewidth=1)
    axes.set_yticks(range(len(rows)), rows, fontsize=10)
    axes.invert_yaxis()


# ------------------------------------------------------------------------------------------------------------
# Variance of the gradient.


def variance(setting, args):
    """The noise of the policy gradient over resampled rollouts -> {name: (ratio, error, cosine)}.

    Prompts are fixed, and so is the policy: the start of seed 0. Each advantage is tried on the trace, and
    each kind of views with group advantages. Ratio and error: see `noise`. Views, and the group's division by
    its standard deviation, have another mean gradient. So less noise there is not yet a better estimate of
    the same thing: hence the cosine of the mean gradient with that of the raw reward. The errors are over
    rollouts alone.
    """
    trial = Trial(setting, "value", LRS[0], 0, 1)
    start = start_of(setting, 0, args)
    with one_at_a_time():
        if not os.path.isdir(start):
            make_start(setting, 0)
    settings = tracerl.parse_args(command(trial, args))
    machine.start(settings)
    learners, tokenizer = tracerl.load_start(settings)
    model = learners.policy.model
    recipe = flags.read_flags(tracerl.Recipe, settings)
    decoding = flags.read_flags(Decoding, settings)
    method = tracerl.Method(math_reward, None, tracerl.policy_loss, rollout.trace_views, decoding,
                            machine.choose_compute(settings, model), rollout.ReplayLaw(True))
    problems = load_prompts(settings.train_data, tokenizer, flags.read_flags(Prompting, settings))
    explained = train_value(learners, problems, tokenizer, method, recipe, args.value_steps)
    print(f"value model: explained variance {explained:.3f} after {args.value_steps} steps")
    views = dict(rollout.VIEWS)
    views["as-many-random"] = flags.load_function(f"{FORKS}:as_many_random", {}, "--views")
    asked = [problem for problem in problems[:recipe.prompts] for _ in range(recipe.group_size)]
    plug_in = lambda name: flags.load_function(f"{FORKS}:{name}", {}, "--advantage")
    advantages = dict(batch=plug_in("minus_step_mean"), raw=plug_in("raw"), value=None)
    gradients = {}
    for turn in range(args.resamples):
        seeds = [mix(turn, i) for i in range(len(asked))]
        prompts = [problem.tokens for problem in asked]
        rollouts = rollout.generate_everywhere(model, prompts, seeds, decoding, method.compute)
        give_rewards(rollouts, asked, tokenizer)
        for name in ("group", "batch", "raw", "value", "random", "as-many-random", "coupled"):
            changed = method._replace(advantage=advantages.get(name, tracerl.group_advantages),
                                      views=views.get(name, rollout.trace_views))
            value_learner = learners.value if name == "value" else None
            kept, _ = tracerl.give_advantages(rollouts, value_learner, changed, recipe)
            gradients.setdefault(name, []).append(gradient(learners.policy, kept, changed, recipe))
    means = {name: torch.stack(samples).mean(0) for name, samples in gradients.items()}
    return {name: (*noise(samples), float(torch.cosine_similarity(means[name], means["raw"], dim=0)))
            for name, samples in gradients.items()}


def train_value(learners, problems, tokenizer, method, recipe, num_steps):
    """Trains the value model alone, on other prompts and rollouts of the policy -> its explained variance."""
    alone = dataclasses.replace(recipe, prompts=recipe.prompts * recipe.group_size, group_size=1,
                                value_warmup=10**6)  # RL steps in which the policy waits
    line = {}
    for step in range(1000, 1000 + num_steps):
        rollouts, asked = tracerl.roll_out(learners.policy.model, problems, method, alone, step)
        give_rewards(rollouts, asked, tokenizer)
        kept, line = tracerl.give_advantages(rollouts, learners.value, method, alone)
        batches, _ = tracerl.old_logprobs(learners, rollouts, kept, method, alone, step)
        tracerl.learn(learners, batches, rollouts, method, alone, step)
    return line["explained_variance"]


def gradient(policy, rollouts, method, recipe):
    """The policy gradient of one batch of rollouts at the policy that made them, flat."""
    batch = tracerl.make_batch(tracerl.Learners(policy), [rollouts], method, recipe, step=1)
    policy.model.zero_grad(set_to_none=False)
    for rows in batch.rows:
        logp, _ = rollout.forward_rows(policy.model, rows, method.compute, method.decoding.temperature)
        rows.targets.logp_old.copy_(logp.detach())
        tracerl.policy_loss(logp, rows.targets, batch.num_tokens, 0.2, kl_coef=0.0).backward()
    return torch.cat([p.new_zeros(p.numel()) if p.grad is None else p.grad.flatten()
                      for p in policy.model.parameters()])


def noise(gradients):
    """E |g - E g|^2 / |E g|^2 of a list of gradients, both parts without bias -> it, and its standard error.

    The error is a jackknife's. The ratio is NaN where the mean does not stand out.
    """
    g = torch.stack(gradients).double()  # (n, parameters)
    n = len(g)
    left_out = [noise_ratio(torch.cat([g[:i], g[i + 1:]])) for i in range(n)]
    mean = fmean(left_out)
    return noise_ratio(g), ((n - 1) / n * sum((x - mean) ** 2 for x in left_out)) ** 0.5


def noise_ratio(g):
    """The ratio of `noise` for gradients (n, parameters)."""
    spread = float((g - g.mean(0)).square().sum() / (len(g) - 1))
    signal = float(g.mean(0).square().sum()) - spread / len(g)
    return spread / signal if signal > 0 else float("nan")


# ------------------------------------------------------------------------------------------------------------
# The command.


def parse_args(argv=None):
    """The flags."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0], allow_abbrev=False)
    flag = parser.add_argument
    flag("--settings", nargs="+", default=list(SETTINGS), choices=SETTINGS)
    flag("--arms", nargs="+", choices=ARMS, help="others are compared with the first one; None: those of "
         "each setting")
    flag("--seeds", type=int, default=5, choices=STUDENT)
    flag("--steps", type=int, default=30, help="RL steps of every run")
    flag("--lrs", nargs="+", default=LRS, help="learning rates to choose from")
    flag("--more", action="append", default=[], help="one more flag for every run: --more=--prompts=8")
    flag("--variance", action="store_true", help="measure gradients instead of training")
    flag("--resamples", type=int, default=24, help="batches of rollouts for --variance")
    flag("--value_steps", type=int, default=20, help="batches that train its value model")
    flag("--equal_seconds", action="store_true", help="also with equal seconds")
    flag("--seconds", action="store_true", help="measure the seconds of an RL step instead")
    flag("--quick", action="store_true", help="a small part, compared with evidence.json")
    flag("--out", help="JSON file to add results to; None: runs/methods.json, or runs/variance.json")
    flag("--show", action="store_true", help="run nothing: print the tables of --out")
    flag("--picture", help="where to draw what is in --out and in broken.json")
    args = parser.parse_args(argv)
    has_rejection = args.arms is not None and "rejection" in args.arms
    if has_rejection and not args.seconds and (not args.equal_seconds or args.arms[0] == "rejection"):
        parser.error("--arms rejection is compared by seconds: use --equal_seconds, and an arm before it")
    return args


def run_setting(setting, args):
    """Runs what was asked for in one setting -> tables by name."""
    arms = args.arms or WHICH[setting]
    if args.seconds:
        for arm in arms:
            if arm == "rejection":
                rejection_cost(setting, args)
            else:
                step_cost(setting, arm, args)
        return {}
    if args.variance:
        table = variance(setting, args)
        print(f"\n{setting}: noise of the policy gradient, {args.resamples} batches of rollouts")
        for name, (ratio, error, cosine) in table.items():
            print(f"| {name} | {ratio:.4f} +- {error:.4f} | {cosine:.3f} |", flush=True)
        return {setting: table}
    tables = {setting: compare(setting, arms, args)}
    print_table(setting, tables[setting])
    if args.equal_seconds:
        tables[setting + EQUAL] = with_equal_seconds(setting, tables[setting], "rejection" in arms, args)
        print_table(setting + EQUAL, tables[setting + EQUAL])
    return tables


def main(argv=None):
    """Runs, prints, adds to --out, draws -> the new tables by name."""
    args = parse_args(argv)
    torch.set_num_threads(1)
    if args.quick:
        quick(args)
        return {}
    tables = {}
    for setting in [] if args.show else args.settings:
        tables |= run_setting(setting, args)
    path = Path(args.out or f"runs/{'variance' if args.variance else 'methods'}.json")
    known = json.loads(path.read_text()) if path.is_file() else {}
    rounded = json.loads(json.dumps(tables), parse_float=lambda text: round(float(text), 4))
    for name, table in rounded.items():
        known[name] = known.get(name, {}) | table  # other arms stay
    if tables:
        path.write_text(json.dumps(known))
    if args.show:
        for is_equal in (False, True):
            part = {setting: table for setting, table in known.items() if setting.endswith(EQUAL) == is_equal}
            for name in (*STRATEGIES, "reward") if part else []:
                print_overview(part, name)
        for setting, table in known.items():
            print_table(setting, table)
    if args.picture:
        broken, questions = (json.loads(path.read_text()) if path.is_file() else {}
                             for path in (BROKEN, QUESTIONS))
        draw(known, broken, questions.get("order", {}), args.picture)
    return tables


if __name__ == "__main__":
    main()
