"""bench_questions.py - three questions about TraceRL, each answered by runs of tracerl.py from one start.

    python tests/bench_questions.py order     # left to right, or by confidence? Trained and tested crosswise
    python tests/bench_questions.py values    # when does a value model pay?
    python tests/bench_questions.py large     # does TraceRL collapse in blocks of 16 and 32?
    python tests/bench_questions.py order --settings k4 sudoku-k4 --seeds 0 1 --jobs 2
    python tests/bench_questions.py values --show      # run nothing: the tables of tests/questions.json

Every run is a command in a process of its own, with one thread. It is printed, so that it can be repeated. A
run that has ended is not repeated. One that was killed begins again. All seeds of a setting have one start:
see `start_of`. Differences are paired by seed, +- half of a 95 percent confidence interval (Student's t), and
bold where it leaves zero out.
"""

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import fmean, median
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import bench_broken
import bench_methods
from examples.process_reward import columns
from plumbing import checkpoints, runs, tasks

FORKS = ROOT / "examples/forks.py"
OUT = ROOT / "tests/questions.json"
LARGE = ("large-k16", "large-k32")  # settings of `large`; those of `order` are bench_methods.SETTINGS
SETTINGS = dict(order=("k4", "k16", "full", "sudoku-k4", "sudoku-k16", "sudoku-full"), values=("k4",),
                large=LARGE)


class Trial(NamedTuple):
    """A run."""

    question: str
    setting: str
    arm: str
    seed: int


# ------------------------------------------------------------------------------------------------------------
# What is run: an arm is a script, and flags.

ORDERS = ("dynamic", "sequential")  # by confidence; from left to right


def value_arms():
    """Groups of 16, 4 and 1 with and without a value model, always 256 rollouts an RL step.

    A value model first trains alone for 10 RL steps, on rollouts of the start. All arms then have 30 RL steps
    of the policy.
    """
    mean = f"--advantage={FORKS}:minus_step_mean"
    value = ["--advantage=value", "--value_warmup=10", "--steps=40"]
    process = f"--reward={ROOT}/examples/process_reward.py:columns"
    total = f"--reward={Path(__file__).resolve()}:sum_of_columns"
    arms = {}
    for G in (16, 4, 1):
        size = [f"--group_size={G}", f"--prompts={256 // G}", "--steps=30"]
        if G > 1:
            arms[f"group {G}"] = size
        arms[f"mean {G}"] = [*size, mean]
        arms[f"value {G}"] = [*size, *value]
    for G in (16, 1):
        size = [f"--group_size={G}", f"--prompts={256 // G}", "--steps=30"]
        arms[f"mean {G}, columns"] = [*size, mean, total]
        arms[f"value {G}, columns"] = [*size, *value, process]
    return arms


def sum_of_columns(problem, text, tokens, rollout):
    """--reward: what the right parts of a solution earn together, as one number for the response."""
    rewards = columns(problem, text, tokens, rollout)
    return sum(dict(zip(rollout.step_map, rewards)).values())  # each denoising step once


ARMS = dict(
    order={"start": None, **{order: [f"--strategy={order}", "--steps=30"] for order in ORDERS}},
    values=value_arms(),
    large={"tracerl": ["--steps=100"], "shrink 4": ["--steps=100", "--shrink=4"],
           "small blocks": ["--steps=100"]})  # the fault of examples/broken.py


def start_of(setting):
    """The checkpoint from which all runs of a setting begin, made if it is missing."""
    if setting not in LARGE:
        path = bench_broken.start_of(setting)
        if not os.path.isdir(path):
            bench_methods.make_start(setting, 0)
        return path
    path = f"runs/start-{setting}/checkpoint"
    if not os.path.isdir(path):
        import sft  # here, because it starts torch

        write_long_problems()
        sft.main(["--data=runs/long-sft.jsonl", "--dev_data=runs/long-dev.jsonl", "--max_new_tokens=40",
                  f"--block_size={setting.removeprefix('large-k')}", "--stop_accuracy=0.4", "--save_every=0",
                  f"--name=start-{setting}"])
    return path


def write_long_problems():
    """Sums of two six-digit numbers: files under runs/. A pupil's solutions are those that sft.py reads."""
    os.makedirs("runs", exist_ok=True)
    for name, number, slip in (("sft", 20000, 0.3), ("train", 20000, 0), ("dev", 200, 0), ("test", 400, 0)):
        rng = random.Random(f"long {name}")
        with open(f"runs/long-{name}.jsonl", "w", encoding="utf-8") as file:
            while number:
                a = rng.randint(100_000, 999_999)
                b = rng.randint(100_000, 999_999)
                text = f"{a}+{b}="
                if tasks.is_of(name if name in ("dev", "test") else "train", text):
                    row = dict(problem=text, answer=str(a + b), solution=tasks.work_out(a, b, slip, rng))
                    file.write(json.dumps(row) + "\n")
                    number -= 1


def command_of(trial):
    """Script and flags of a trial."""
    words = [*ARMS[trial.question][trial.arm], f"--model={start_of(trial.setting)}", f"--seed={trial.seed}",
             f"--lr={bench_broken.LRS.get(trial.setting, '3e-4')}", "--eval_every=0", "--save_every=0",
             f"--name={name_of(trial)}"]
    if trial.setting in LARGE:
        words += ["--train_data=runs/long-train.jsonl", "--eval_data=runs/long-test.jsonl",
                  "--max_new_tokens=40"]
    else:
        words += [f"--train_data={bench_methods.SETTINGS[trial.setting][0]}"]
    words += ["--eval_strategies", "dynamic"]
    if trial.arm == "small blocks":
        return ["examples/broken.py", "small_blocks", *words]
    return ["tracerl.py", *words]


def name_of(trial):
    """The name of a trial's folder under runs/."""
    return f"questions-{trial.setting}-{trial.arm.replace(', ', '-').replace(' ', '-')}-s{trial.seed}"


def call(words):
    """Runs a command of this project."""
    print("python " + " ".join(map(str, words)), flush=True)
    subprocess.run([sys.executable, str(ROOT / words[0]), *words[1:]], check=True, stdout=subprocess.DEVNULL,
                   env=os.environ | dict(OMP_NUM_THREADS="1"))


def run(trial):
    """Runs a trial, unless it has ended before -> its numbers."""
    folder = Path("runs") / name_of(trial)
    if trial.arm != "start" and not (folder / "summary.json").is_file():
        shutil.rmtree(folder, ignore_errors=True)
        call(command_of(trial))
    return examine(trial, folder) if trial.question == "order" else read(folder)


def examine(trial, folder):
    """How a policy does in each order: 16 responses to each of 200 test problems -> {order: numbers}."""
    model = start_of(trial.setting) if trial.arm == "start" else runs.checkpoints_of(folder)[-1]
    name = name_of(trial) + "-eval"
    task, _, _ = bench_methods.SETTINGS[trial.setting]
    if not (Path("runs") / name / "summary.json").is_file():
        call(["eval_math.py", f"--model={model}", f"--data={task}-test", "--limit=200", "--samples=16",
              f"--seed={trial.seed}", f"--name={name}", "--strategy", *ORDERS])
    summary = checkpoints.read_json(Path("runs") / name / "summary.json")
    return {order: {key: summary[order][key] for key in ("accuracy", "pass_at_4", "pass_at_16")}
            for order in ORDERS}


def read(folder):
    """The numbers of a run of tracerl.py."""
    lines = bench_methods.read_metrics(folder)
    summary = checkpoints.read_json(folder / "summary.json")
    before, after = (summary[name]["dynamic"]["accuracy"] for name in ("before", "after"))
    curve = [line["reward"] for line in lines][-30:]  # without the head start that a value model has
    explained = [line["explained_variance"] for line in lines[10:] if "explained_variance" in line]
    return dict(before=before, accuracy=after, gap_max=max(line["gap_max"] for line in lines), curve=curve,
                lowest=min(fmean(curve[i:i + 5]) for i in range(len(curve) - 4)), reward=fmean(curve),
                jump=fmean(abs(b - a) for a, b in zip(curve, curve[1:])),
                explained=fmean(explained) if explained else None,
                seconds=median(line["rollout_seconds"] + line["update_seconds"] for line in lines[10:]))


# ------------------------------------------------------------------------------------------------------------
# Tables. `arms` is {arm: {seed: numbers}} of one setting.


def spread(numbers):
    """Mean +- half of an interval, as text."""
    return "{:.3f} +- {:.3f}".format(*bench_methods.interval(numbers))


def versus(results, control, number):
    """A number of an arm minus that of another one, paired by seed."""
    differences = [number(results[seed]) - number(control[seed]) for seed in results if seed in control]
    return bench_methods.bold(*bench_methods.interval(differences))


def show_order(setting, arms):
    """A line for each training and test."""
    print(f"\n{setting}\n| trained | tested | pass@1 | pass@4 | pass@16 | pass@16, minus the start's |\n"
          + "|---" * 6 + "|")
    for arm, results in arms.items():
        for order in ORDERS:
            cells = [spread([r[order][key] for r in results.values()])
                     for key in ("accuracy", "pass_at_4", "pass_at_16")]
            cells.append("" if arm == "start" else
                         versus(results, arms["start"], lambda r: r[order]["pass_at_16"]))
            print(f"| {arm} | {order} | " + " | ".join(cells) + " |")
    if all(order in arms for order in ORDERS):
        for order in ORDERS:
            cells = [versus(arms["sequential"], arms["dynamic"], lambda r: r[order][key])
                     for key in ("accuracy", "pass_at_4", "pass_at_16")]
            print(f"| left to right minus by confidence | {order} | " + " | ".join(cells) + " | |")


def show_runs(setting, arms):
    """A line for each arm; rewards are of the last 30 RL steps, in which the policy learns.

    values: `vs` is the accuracy minus that of `mean` with this size of groups. large: minus that of `tracerl`.
    """
    print(f"\n{setting}\n| arm | before | accuracy | vs | reward | lowest of five steps | "
          "step to step | explained | s/step | largest gap |\n" + "|---" * 10 + "|")
    for arm, results in arms.items():
        first = f"mean {arm.partition(',')[0].split()[-1]}" if "mean 16" in arms else "tracerl"
        column = lambda key: [r[key] for r in results.values()]
        explained = "" if column("explained")[0] is None else f"{fmean(column('explained')):.2f}"
        print(f"| {arm} | {fmean(column('before')):.3f} | {spread(column('accuracy'))} | "
              + ("" if arm == first else versus(results, arms[first], lambda r: r["accuracy"]))
              + f" | {spread(column('reward'))} | {fmean(column('lowest')):.3f} | "
              f"{fmean(column('jump')):.3f} | {explained} | {fmean(column('seconds')):.2f} | "
              f"{max(column('gap_max')):.1e} |")


def parse_args(argv=None):
    """The flags."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0], allow_abbrev=False)
    flag = parser.add_argument
    flag("question", choices=ARMS)
    flag("--settings", nargs="+", help="None: all of the question")
    flag("--arms", nargs="+", help="None: all of the question")
    flag("--seeds", nargs="+", type=int, default=[0, 1, 2, 3, 4])
    flag("--jobs", type=int, default=1, help="runs at the same time")
    flag("--out", default=str(OUT), help="JSON file to add results to")
    flag("--show", action="store_true", help="run nothing: print the tables of --out")
    return parser.parse_args(argv)


def main(argv=None):
    """Runs what is missing, adds it to --out, and prints the tables."""
    args = parse_args(argv)
    path = Path(args.out)
    read_known = lambda: json.loads(path.read_text()) if path.is_file() else {}
    for setting in [] if args.show else args.settings or SETTINGS[args.question]:
        start_of(setting)
        trials = [Trial(args.question, setting, arm, seed) for seed in args.seeds
                  for arm in args.arms or ARMS[args.question]]
        with ThreadPoolExecutor(args.jobs) as pool:
            results = list(pool.map(run, trials))
        known = read_known()  # another command may have written meanwhile
        arms = known.setdefault(args.question, {}).setdefault(setting, {})
        for trial, result in zip(trials, results):
            arms.setdefault(trial.arm, {})[str(trial.seed)] = result
        path.write_text(json.dumps(known))
    for setting, arms in read_known().get(args.question, {}).items():
        (show_order if args.question == "order" else show_runs)(setting, arms)


if __name__ == "__main__":
    main()
