"""bench_broken.py - what does a broken replay cost? Each fault of examples/broken.py against the control.

    python tests/bench_broken.py --steps 1                                # the gaps alone
    python tests/bench_broken.py --settings k16 --faults padded --jobs 2  # two runs at once
    python tests/bench_broken.py --show                                   # run nothing: the tables of --out

A run is one command of examples/broken.py in a process of its own, with one thread. A run that has ended is
not repeated. One that was killed begins again. All seeds of a setting have the same start. That of arithmetic
with K = 4 and with full attention lies in assets/. The others are made by sft.py, as in bench_methods.py.

The faults are compared with `none`. after_filter needs a filter in decoding, so `none_filtered` decodes with
the same one, and is its control. Differences are paired by seed, +- half of a 95 percent confidence interval
(Student's t), and bold where it leaves zero out.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import fmean
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import bench_methods
from examples.broken import FAULTS
from plumbing import checkpoints

FILTER = ["--top_p=0.8"]
ARMS = {"none": ["none"], "none_filtered": ["none", *FILTER]}  # what stands behind examples/broken.py
ARMS |= {fault: [fault] for fault in FAULTS} | {"after_filter": ["after_filter", *FILTER]}
IN_BLOCKS = ("cut_at_response", "small_blocks")  # with full attention there are none
STARTS = {"k4": ROOT / "assets/tiny-block", "full": ROOT / "assets/tiny-full"}
LRS = {"sudoku-full": "1e-4"}  # those of `tracerl` in evidence.json; all others 3e-4


class Trial(NamedTuple):
    """A run of the comparison."""

    setting: str
    arm: str
    seed: int
    steps: int


def control_of(arm):
    """The arm that differs from this one by the fault alone."""
    return "none_filtered" if arm == "after_filter" else "none"


def start_of(setting):
    """The checkpoint from which all runs of a setting start."""
    return STARTS.get(setting, f"runs/start-{setting}-0/checkpoint")


def folder_of(trial):
    """The folder of a trial's run."""
    return Path("runs") / f"broken-{trial.setting}-{trial.arm}-s{trial.seed}-{trial.steps}-steps"


def run(trial):
    """Runs a trial, unless it has ended before -> its numbers."""
    task, _, _ = bench_methods.SETTINGS[trial.setting]
    folder = folder_of(trial)
    if not (folder / "summary.json").is_file():
        shutil.rmtree(folder, ignore_errors=True)  # half of a run, if it was stopped
        words = [*ARMS[trial.arm], f"--model={start_of(trial.setting)}", f"--train_data={task}",
                 f"--lr={LRS.get(trial.setting, '3e-4')}", f"--seed={trial.seed}", f"--steps={trial.steps}",
                 "--eval_every=0", "--save_every=0", "--eval_strategies", "dynamic", f"--name={folder.name}"]
        print("python examples/broken.py " + " ".join(words), flush=True)
        subprocess.run([sys.executable, str(ROOT / "examples/broken.py"), *words], check=True,
                       env=os.environ | dict(OMP_NUM_THREADS="1"), stdout=subprocess.DEVNULL)
    lines = bench_methods.read_metrics(folder)
    summary = checkpoints.read_json(folder / "summary.json")
    before, after = (summary[name]["dynamic"]["accuracy"] for name in ("before", "after"))
    curve = [line["reward"] for line in lines]
    return dict(gap=lines[0]["gap"], gap_max=lines[0]["gap_max"], accuracy=[before, after],
                reward=[curve[0], fmean(curve[-5:])])


# ------------------------------------------------------------------------------------------------------------
# Tables. `known` is {setting: {steps: {arm: {seed: numbers}}}}, all keys texts, as in the JSON file.


def gap_cell(by_steps, arm):
    """The gap of the first RL step: its mean, and the largest of all. Runs of any length have it."""
    found = [r for arms in by_steps.values() for r in arms.get(arm, {}).values()]
    if not found:
        return ""
    return f"{fmean(r['gap'] for r in found):.1e}, {max(r['gap_max'] for r in found):.1e}"


def outcome_cell(arms, arm, name):
    """Of a control: a number before and after. Of a fault: the difference to its control, after."""
    results = arms.get(arm, {})
    if arm.startswith("none") and results:
        before, after = (fmean(numbers) for numbers in zip(*(r[name] for r in results.values())))
        return f"{before:.3f} -> {after:.3f}"
    control = arms.get(control_of(arm), {})
    differences = [results[seed][name][1] - control[seed][name][1] for seed in results if seed in control]
    return bench_methods.bold(*bench_methods.interval(differences)) if differences else ""


def print_table(title, columns, cell):
    """A markdown table with a line for every arm; cell: a function of column and arm."""
    print(f"\n| {title} | " + " | ".join(columns) + " |\n" + "|---" * (len(columns) + 1) + "|")
    for arm in ARMS:
        cells = [cell(column, arm) for column in columns]
        if any(cells):
            print(f"| {arm} | " + " | ".join(cells) + " |")


def show(known):
    """Prints all tables."""
    print_table("gap at step 1: mean, largest", list(known),
                lambda setting, arm: gap_cell(known[setting], arm))
    lengths = {steps for by_steps in known.values() for steps in by_steps}
    for steps in sorted(lengths - {"1"}, key=int):  # one step changes nothing that a test could see
        part = {setting: by_steps[steps] for setting, by_steps in known.items() if steps in by_steps}
        for name in ("accuracy", "reward"):  # reward: of step 1, and the mean of the last five
            print_table(f"{name}, {steps} steps", list(part),
                        lambda setting, arm: outcome_cell(part[setting], arm, name))


def parse_args(argv=None):
    """The flags."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0], allow_abbrev=False)
    flag = parser.add_argument
    flag("--settings", nargs="+", default=["k4", "k16", "full", "sudoku-k4", "sudoku-k16", "sudoku-full"],
         choices=bench_methods.SETTINGS)
    flag("--faults", nargs="+", default=list(ARMS), choices=ARMS, help="controls are arms, too: name them")
    flag("--seeds", nargs="+", type=int, default=[0, 1, 2, 3, 4])
    flag("--steps", type=int, default=30, help="RL steps of every run")
    flag("--jobs", type=int, default=1, help="runs at the same time")
    flag("--out", default=str(ROOT / "tests/broken.json"), help="JSON file to add results to")
    flag("--show", action="store_true", help="run nothing: print the tables of --out")
    return parser.parse_args(argv)


def main(argv=None):
    """Runs what is missing, adds it to --out, and prints all tables."""
    args = parse_args(argv)
    path = Path(args.out)
    known = json.loads(path.read_text()) if path.is_file() else {}
    for setting in [] if args.show else args.settings:
        if not os.path.isdir(start_of(setting)):
            bench_methods.make_start(setting, 0)
        trials = [Trial(setting, arm, seed, args.steps) for seed in args.seeds for arm in args.faults
                  if not (setting.endswith("full") and arm in IN_BLOCKS)]
        with ThreadPoolExecutor(args.jobs) as pool:
            results = list(pool.map(run, trials))
        for trial, result in zip(trials, results):
            arms = known.setdefault(setting, {}).setdefault(str(args.steps), {})
            arms.setdefault(trial.arm, {})[str(trial.seed)] = result
        path.write_text(json.dumps(known))  # after every setting, so that little is lost
    show(known)


if __name__ == "__main__":
    main()
