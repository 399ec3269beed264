"""bench_methods.py - does the trace matter? Published estimators under one sampler and one budget, on the
embedded tasks, for anyone to rerun.

    python tests/bench_methods.py                              # everything: hours; can be stopped, resumes
    python tests/bench_methods.py --settings k4 --arms tracerl random coupled
    python tests/bench_methods.py --settings k4 --variance     # the noise of the gradient, measured directly
    python tests/bench_methods.py --settings full --seconds    # seconds of a step, one run alone
    python tests/bench_methods.py --quick                      # a small part, beside tests/evidence.json
    python tests/bench_methods.py --show --out tests/evidence.json --picture assets/methods.png

An arm is one command line of tracerl.py (printed). All arms of a setting start from the same warm starts, one
for each seed, and have the same number of RL steps and rollouts. Each arm's learning rate is the one of LRS
with the best accuracy on development problems over the first two seeds (of those within 0.025 of the best,
which 800 answers cannot tell apart at 95 percent, the one that earned most on the way); test problems choose
nothing. Several of these commands may run side by side: a run belongs to whoever made its folder under runs/
first, until it is silent for ten minutes.

Two budgets. Equal steps: as above. --equal_seconds: arms whose steps are over 15 percent cheaper than the
first one's run more of them, so that they take as long, by the seconds of a step in six further steps of each
(run --seconds before, with nothing else on the machine).

Tables and --out: after training, mean over the seeds +- half of a 95 percent confidence interval (Student's
t); "reward" is the mean over all RL steps, so it shows speed (of arms that decode alike: not of static);
"vs" is the difference to the first arm, paired by seed, not corrected for the number of arms; "s/step" is the
median of rollouts and update together. The value arm spends its first 10 steps on the value model alone.
"""

import argparse
import fcntl
import hashlib
import json
import os
import shutil
import sys
import time
from contextlib import contextmanager
from pathlib import Path
from statistics import fmean, median, stdev

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from matplotlib.figure import Figure

import forks
import rollout
import sft
import tracerl
import value
from eval_math import give_rewards, load_prompts
from plumbing import checkpoints, parallel, runs

SETTINGS = {  # where: flags of every arm
    "k4": [],
    "k8": ["--block_size=8"],
    "k16": ["--block_size=16"],
    "full": ["--attention=full"],
    "k4-to-k8": ["--block_size=8", "--rollout_block_size=4", "--adapt_steps=45"],
    "sudoku-k4": ["--train_data=sudoku"],
    "sudoku-k16": ["--train_data=sudoku", "--block_size=16"],
    "sudoku-full": ["--train_data=sudoku", "--attention=full"],
}
FORKS = Path(__file__).resolve().parent / "forks.py"
ARMS = {  # what is compared: flags of one arm
    "tracerl": [],
    "random": ["--views=random"],
    "coupled": ["--views=coupled"],
    "value": ["--advantage=value"],
    "value-clip": ["--advantage=value", "--value_clip=0.2"],
    "batch": ["--advantage=batch"],
    "raw": ["--advantage=raw"],
    "shrink-2": ["--shrink=2"],
    "shrink-4": ["--shrink=4"],
    "static": ["--strategy=static"],
    "some-steps": [f"--views={FORKS}:some_steps"],  # AGRPO
    "diffu-grpo": [f"--views={FORKS}:fully_masked"],
    "wd1": [f"--advantage={FORKS}:softmax_weights", f"--loss={FORKS}:ratio_free"],
    "clip-higher": [f"--loss={FORKS}:clip_higher"],  # DAPO
    "gspo": [f"--loss={FORKS}:sequence_ratio"],
    "just-grpo": ["--strategy=sequential"],
    "as-many-random": [f"--views={FORKS}:as_many_random"],  # random masks at the cost of the trace
    "mean-per-step": [f"--advantage={FORKS}:mean_per_step"],  # the paper's weights
    "no-reward": [f"--reward={FORKS}:always_one", "--advantage=raw"],  # a control: what sharpening alone does
}
VIEWS = ("tracerl", "random", "coupled")
CURVES = ("tracerl", "random", "shrink-4")  # whose learning curves are drawn
EQUAL = ", equal seconds"
PUBLISHED = ("tracerl", "shrink-4", "some-steps", "random", "coupled", "diffu-grpo", "wd1", "clip-higher",
             "gspo", "value", "just-grpo", "as-many-random", "mean-per-step",
             "no-reward")
WHICH = dict.fromkeys(SETTINGS, PUBLISHED) | {
    "k4": (*PUBLISHED, "value-clip", "batch", "raw", "shrink-2", "static"), "k8": VIEWS,
    "k4-to-k8": ("tracerl",)}
EVIDENCE = Path(__file__).resolve().parent / "evidence.json"
LRS = ("1e-4", "3e-4", "1e-3")
STUDENT = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 8: 2.365, 10: 2.262}  # 97.5 percent, by number


def command(setting, arm, lr, seed, args, steps=None):
    """The flags of one run."""
    steps = (steps or args.steps) + (45 if setting == "k4-to-k8" else 0)  # to learn the larger blocks first
    flags = [*SETTINGS[setting], *ARMS[arm], f"--lr={lr}", f"--seed={seed}", f"--steps={steps}",
             f"--eval_every={steps}", *args.more]
    text = " ".join(flags).replace(str(FORKS.parent), "tests")
    name = hashlib.sha256(text.encode()).hexdigest()[:6]  # other flags, another run
    return [*flags, f"--name=methods-{setting}-{arm}-lr{lr}-s{seed}-{name}"]


@contextmanager
def one_at_a_time():
    """Inside, no other of these commands is: a starting model is made once, by whoever comes first."""
    os.makedirs("runs", exist_ok=True)
    with open("runs/methods.lock", "w", encoding="utf-8") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # let go of when the file closes, or the process dies
        yield


def result(flags):
    """What a finished run left behind -> dict, or None."""
    folder = Path("runs") / flags[-1].removeprefix("--name=")
    if not (folder / "summary.json").is_file():
        return None
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    summary = json.loads((folder / "summary.json").read_text())
    return dict(curve=[line["reward"] for line in lines], reward=fmean(line["reward"] for line in lines),
                dev=lines[-1]["dev_accuracy"],
                seconds=median(line["rollout_seconds"] + line["update_seconds"] for line in lines),
                explained=[line["explained_variance"] for line in lines[4:]
                           if "explained_variance" in line and 0 < line["reward"] < 1],
                before={name: e["accuracy"] for name, e in summary["before"].items()},
                **{name: e["accuracy"] for name, e in summary["after"].items()})


def run_all(commands):
    """Runs what nobody has run yet -> the results, waiting for what others are running."""
    while not all(results := [result(flags) for flags in commands]):
        for flags, done in zip(commands, results):
            folder = Path("runs") / flags[-1].removeprefix("--name=")
            if done or not claim(folder):
                continue
            print("python tracerl.py " + " ".join(flags), flush=True)
            args = tracerl.parse_args(flags)
            if args.model is None:
                with one_at_a_time():
                    sft.warm_start(args.seed, args.rollout_block_size or args.block_size or 4,
                                   args.attention or "block", args.train_data)
            tracerl.main(flags)
        time.sleep(1)
    return results


def claim(folder):
    """Makes a run's folder -> whether it is ours to run. One silent for ten minutes is taken over."""
    if folder.exists():
        newest = max(path.stat().st_mtime for path in [folder, *folder.glob("*.json*")])
        if time.time() - newest > 600:
            shutil.rmtree(folder)
    try:
        folder.mkdir(parents=True)
        return True
    except FileExistsError:
        return False


def interval(numbers):
    """Mean, and half the width of its 95 percent confidence interval."""
    if len(numbers) < 2:
        return fmean(numbers), float("nan")
    return fmean(numbers), STUDENT[len(numbers)] * stdev(numbers) / len(numbers) ** 0.5


def compare(setting, arms, args):
    """Learning rate, then all seeds, of every arm -> {arm: (learning rate, results)}."""
    out = {}
    for arm in arms:
        trials = {lr: run_all([command(setting, arm, lr, seed, args) for seed in range(min(2, args.seeds))])
                  for lr in args.lrs}
        dev, reward = ({lr: fmean(r[name] for r in trials[lr]) for lr in args.lrs}
                       for name in ("dev", "reward"))
        lr = max((lr for lr in args.lrs if dev[lr] > max(dev.values()) - 0.025), key=reward.get)
        out[arm] = lr, run_all([command(setting, arm, lr, seed, args) for seed in range(args.seeds)])
    return out


def with_equal_seconds(setting, table, args):
    """The same arms and learning rates, cheap ones with more steps -> {arm: (learning rate, results)}."""
    first, out = next(iter(table)), {}
    cost = seconds_alone(setting, table, args)
    for arm, (lr, results) in table.items():
        steps = round(args.steps * cost[first] / cost[arm])
        if arm == first or steps > 1.15 * args.steps:  # others cost as much, and were compared before
            seeds = range(args.seeds)
            out[arm] = lr, run_all([command(setting, arm, lr, seed, args, steps) for seed in seeds])
    return out


def quick(args):
    """Two seeds of two arms again, beside what evidence.json says of them."""
    known, setting, started = json.loads(EVIDENCE.read_text()), "sudoku-k4", time.perf_counter()
    print(f"{setting}: accuracy (dynamic) after {args.steps} RL steps")
    for arm in ("tracerl", "random"):
        lr, results = known[setting][arm]
        for seed, again in enumerate(run_all([command(setting, arm, lr, s, args) for s in range(2)])):
            before, after = results[seed]["before"]["dynamic"], results[seed]["dynamic"]
            is_near = abs(again["dynamic"] - after) < 0.1  # standard errors are 0.025, and so is the table's
            print(f"  {arm:8s} seed {seed}: {again['before']['dynamic']:.3f} -> {again['dynamic']:.3f} here, "
                  f"{before:.3f} -> {after:.3f} in the table: {'agrees' if is_near else 'DIFFERS'}")
    print(f"{time.perf_counter() - started:.0f} seconds (another processor rounds differently, which is like "
          "another seed)")


def print_table(setting, table):
    """One line per arm."""
    first = next(iter(table))
    number = len(table[first][1])
    before = {name: fmean(r["before"][name] for r in table[first][1])
              for name in ("dynamic", "static", "greedy")}
    print(f"\n{setting}, {number} seeds; before: " + ", ".join(f"{k} {v:.3f}" for k, v in before.items()))
    print(f"| arm | lr | reward | vs {first} | dynamic | vs {first} | static | greedy | s/step |")
    print("|---" * 9 + "|")
    for arm, (lr, results) in table.items():
        cells = []
        for name in ("reward", "dynamic", "static", "greedy"):
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


def print_overview(found):
    """Every arm in every setting, in accuracy (dynamic): the first arm's, and the others' difference to it,
    bold where the interval leaves zero out. Last, the mean over all settings, of arms that ran in all (its
    interval: those of the settings, which are independent, added as squares; a little too wide)."""
    print("\n| | " + " | ".join(found) + " | mean |\n" + "|---" * (len(found) + 2) + "|")
    for arm in dict.fromkeys(arm for table in found.values() for arm in table):
        cells, gains = [], []
        for table in found.values():
            if arm == next(iter(table)):
                before = fmean(r["before"]["dynamic"] for r in table[arm][1])
                cells.append(f"{before:.3f} -> {fmean(r['dynamic'] for r in table[arm][1]):.3f}")
            else:
                gains += [difference(table, arm)] if arm in table else []
                cells.append(bold(*gains[-1]) if arm in table else "")
        if len(gains) == len(found):
            cells.append(bold(fmean(mean for mean, _ in gains),
                              sum(half ** 2 for _, half in gains) ** 0.5 / len(gains)))
        print(f"| {arm} | " + " | ".join(cells) + " |", flush=True)


def bold(mean, half):
    """A difference as text, bold where its interval leaves zero out."""
    text = f"{mean:+.3f} +- {half:.3f}"
    return f"**{text}**" if abs(mean) > half else text


def difference(table, arm, name="dynamic"):
    """A figure of an arm minus that of the first arm, paired by seed: mean, and half of its interval."""
    first = next(iter(table))
    return interval([r[name] - other[name] for r, other in zip(table[arm][1], table[first][1])])


def draw(found, path):
    """For every setting, three to a row: above, each arm's difference to the first in accuracy (paired by
    seed, 95 percent intervals; hollow: with equal seconds); below, the rewards of up to three arms."""
    settings = [name for name in found if not name.endswith(EQUAL)]
    rows = -(-len(settings) // 3)
    figure = Figure(figsize=(11, 5.2 * rows), layout="constrained")
    for group, parts in enumerate(figure.subfigures(rows, 1, squeeze=False)[:, 0]):
        columns = settings[group * 3:group * 3 + 3]
        axes = parts.subplots(2, 3, squeeze=False)
        for column, (upper, lower) in enumerate(axes.T):
            if column < len(columns):
                setting = columns[column]
                draw_differences(found[setting], found.get(setting + EQUAL, {}), upper)
                draw_curves(found[setting], lower)
                upper.set_title(setting if "sudoku" in setting else f"arithmetic-{setting}", fontsize=10)
            else:
                upper.remove(), lower.remove()
    figure.savefig(path, dpi=100)


def draw_differences(table, equal_seconds, axes):
    """A line for every arm but the first, and the control, which is far off."""
    first, *others = (arm for arm in table if arm != "no-reward")
    for row, arm in enumerate(others):
        for one, shift, colour in ((table, 0, "C0"), (equal_seconds, 0.3, "white")):
            if arm in one:
                mean, half = difference(one, arm)
                axes.errorbar(mean, row + shift, xerr=half, fmt="o", capsize=2, color="C0", markersize=4,
                              markerfacecolor=colour, linewidth=1)
    axes.axvline(0, color="0.6", linewidth=1)
    axes.set_yticks(range(len(others)), others, fontsize=8)
    axes.set_xlim(-0.2, 0.12)  # the same everywhere
    axes.locator_params(axis="x", nbins=6)
    axes.invert_yaxis()
    axes.tick_params(axis="x", labelsize=8)
    axes.set_xlabel(f"accuracy minus {first}'s", fontsize=8)


def draw_curves(table, axes):
    """Mean reward against the RL step, with 95 percent intervals, of CURVES (or the first three arms)."""
    for arm in [arm for arm in CURVES if arm in table] or list(table)[:3]:
        results = table[arm][1]
        points = [interval([r["curve"][i] for r in results]) for i in range(len(results[0]["curve"]))]
        steps = range(1, len(points) + 1)
        line, = axes.plot(steps, [mean for mean, _ in points], label=arm, linewidth=1.2)
        axes.fill_between(steps, [m - h for m, h in points], [m + h for m, h in points], alpha=0.12,
                          color=line.get_color(), linewidth=0)
    axes.set_xlabel("RL step", fontsize=8)
    axes.set_ylabel("reward of its rollouts", fontsize=8)
    axes.tick_params(labelsize=8)
    axes.legend(fontsize=7)


def seconds_alone(setting, arms, args):
    """Seconds of an RL step of each arm, the median of its first six, on one core -> dict. They are of an
    idle machine only if nothing else ran when they were measured. (The value arm's first steps are not
    typical.)"""
    cost = {}
    for arm in arms:
        found, = run_all([command(setting, arm, "3e-4", 0, args, steps=6)])
        cost[arm] = found["seconds"]
        print(f"{setting}, {arm}: {cost[arm]:.2f} seconds per step", flush=True)
    return cost


# ------------------------------------------------------------------------------------------------------------
# Variance of the gradient.


def gradient(model, rollouts, views, settings):
    """The policy gradient of one batch of rollouts at the policy that made them, flat."""
    rows = tracerl.own_rows(model, rollouts, views, model.config.block_size, settings)
    num_tokens = sum(len(part.targets.token) for part in rows)
    model.zero_grad(set_to_none=True)
    for part in rows:
        logp, _ = rollout.forward_rows(model, part)
        part.targets.logp_old.copy_(logp.detach())
        tracerl.policy_loss(logp, part.targets, num_tokens, len(rollouts), kl_coef=0.0).backward()
    return torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten()
                      for p in model.parameters()])


def noise(gradients):
    """E |g - E g|^2 / |E g|^2 of a list of gradients, both parts without bias, and its jackknife standard
    error (NaN where the mean does not stand out)."""
    def ratio(g):
        spread = float((g - g.mean(0)).square().sum() / (len(g) - 1))
        signal = float(g.mean(0).square().sum()) - spread / len(g)
        return spread / signal if signal > 0 else float("nan")

    g = torch.stack(gradients).double()
    left_out = [ratio(torch.cat([g[:i], g[i + 1:]])) for i in range(len(g))]
    n, mean = len(g), fmean(left_out)
    return ratio(g), ((n - 1) / n * sum((x - mean) ** 2 for x in left_out)) ** 0.5


def variance(setting, args):
    """For fixed prompts and the warm start as policy: the noise of the gradient over resampled rollouts, for
    each advantage (on the trace) and each kind of views (with group advantages) -> {name: (ratio, error,
    cosine)}: noise(), and the cosine of the mean gradient with that of the raw reward.

    The views, and the group's division by its standard deviation, have other mean gradients, so that
    less noise there is not yet a better estimate of the same thing: hence the cosine. The errors are over
    rollouts alone, of one policy and 32 prompts. The value model is trained beforehand, on other rollouts of
    the policy.
    """
    settings = tracerl.parse_args([*SETTINGS[setting], "--advantage=value", "--value_lr=4e-3", *args.more])
    settings.shrink = settings.shrink or 1
    path = settings.model or sft.warm_start(
        0, settings.block_size or 4, settings.attention or "block", settings.train_data)
    model, tokenizer = checkpoints.load_model(path, settings.block_size, torch.float32)
    K, problems = model.config.block_size, load_prompts(settings.train_data, tokenizer, settings)
    critic = value.ValueModel(model)
    optimizer = parallel.make_optimizer(critic, settings.value_lr, (0.9, 0.999))
    trainers = tracerl.Trainers(model, None, critic, optimizer)
    plan = tracerl.Plan(None, None, rollout.trace_views, (K,), K, updates_policy=False)
    prompts, group_size = settings.prompts, settings.group_size
    settings.prompts, settings.group_size = prompts * group_size, 1  # it learns from other prompts
    for step in range(1000, 1000 + args.value_steps):
        rollouts, asked = tracerl.roll_out(model, problems, K, settings, step)
        give_rewards(rollouts, asked, tokenizer)
        kept, metrics = tracerl.give_advantages(rollouts, critic, plan, settings)
        batches = tracerl.make_batches(kept, trainers, plan, settings, step)
        tracerl.learn(trainers, batches, plan, settings)
    explained = metrics["explained_variance"]
    print(f"value model: explained variance {explained:.3f} after {args.value_steps} steps")
    settings.prompts, settings.group_size, found = prompts, group_size, {}
    for turn in range(args.resamples):
        asked = [p for p in problems[:prompts] for _ in range(group_size)]
        seeds = [turn * 1_000_003 + i for i in range(len(asked))]
        rollouts = rollout.generate_everywhere(
            model, [p.tokens for p in asked], seeds, **runs.decoding_settings(settings))
        give_rewards(rollouts, asked, tokenizer)
        for name in ("group", "batch", "raw", "value", "random", "as-many-random", "coupled"):
            settings.advantage = name if name in ("batch", "raw", "value") else "group"
            plan = plan._replace(advantage=tracerl.ADVANTAGES[settings.advantage])
            kept, _ = tracerl.give_advantages(rollouts, critic if name == "value" else None, plan, settings)
            views = dict(rollout.VIEWS, **{"as-many-random": forks.as_many_random}).get(
                name, rollout.trace_views)
            found.setdefault(name, []).append(gradient(model, kept, views, settings))
    means = {name: torch.stack(gradients).mean(0) for name, gradients in found.items()}
    return {name: (*noise(gradients), float(torch.cosine_similarity(means[name], means["raw"], dim=0)))
            for name, gradients in found.items()}


def parse_args(argv=None):
    """The flags."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], allow_abbrev=False)
    parser.add_argument("--settings", nargs="+", default=list(SETTINGS), choices=SETTINGS)
    parser.add_argument("--arms", nargs="+", default=None, choices=ARMS,
                        help="default: those of each setting")
    parser.add_argument("--seeds", type=int, default=5, choices=STUDENT)
    parser.add_argument("--steps", type=int, default=30, help="RL steps of every run")
    parser.add_argument("--lrs", nargs="+", default=LRS, help="learning rates to choose from")
    parser.add_argument("--more", action="append", default=[],
                        help="one more flag for every run: --more=--prompts=8")
    parser.add_argument("--variance", action="store_true", help="measure gradients instead of training")
    parser.add_argument("--resamples", type=int, default=24, help="batches of rollouts for --variance")
    parser.add_argument("--value_steps", type=int, default=20, help="batches that train its value model")
    parser.add_argument("--equal_seconds", action="store_true", help="also with equal seconds")
    parser.add_argument("--seconds", action="store_true", help="measure the seconds of a step instead")
    parser.add_argument("--quick", action="store_true", help="a small part, compared with evidence.json")
    parser.add_argument("--out", default=None, help="JSON file to add results to (default runs/methods.json, "
                        "or runs/variance.json)")
    parser.add_argument("--show", action="store_true", help="run nothing: print the tables of --out")
    parser.add_argument("--picture", default=None, help="where to draw what is in --out")
    return parser.parse_args(argv)


def main(argv=None):
    """Runs, prints, adds to --out, draws."""
    args = parse_args(argv)
    torch.set_num_threads(1)
    if args.quick:
        return quick(args)
    found = {}
    for setting in [] if args.show else args.settings:
        arms = args.arms or WHICH[setting]
        if args.seconds:
            seconds_alone(setting, arms, args)
        elif args.variance:
            found[setting] = variance(setting, args)
            print(f"\n{setting}: noise of the policy gradient, {args.resamples} batches of rollouts")
            for name, (ratio, error, cosine) in found[setting].items():
                print(f"| {name} | {ratio:.4f} +- {error:.4f} | {cosine:.3f} |", flush=True)
        else:
            found[setting] = compare(setting, arms, args)
            print_table(setting, found[setting])
            if args.equal_seconds:
                found[setting + EQUAL] = with_equal_seconds(setting, found[setting], args)
                print_table(setting + EQUAL, found[setting + EQUAL])
    os.makedirs("runs", exist_ok=True)
    path = args.out or f"runs/{'variance' if args.variance else 'methods'}.json"
    known = json.loads(Path(path).read_text()) if os.path.isfile(path) else {}
    for name, table in json.loads(json.dumps(found), parse_float=lambda x: round(float(x), 4)).items():
        known[name] = known.get(name, {}) | table  # other arms stay
    if found:
        Path(path).write_text(json.dumps(known))
    if args.show:
        for is_equal in (False, True):
            print_overview({name: table for name, table in known.items() if name.endswith(EQUAL) == is_equal})
        for setting, table in known.items():
            print_table(setting, table)
    if args.picture:
        draw(known, args.picture)
    return found


if __name__ == "__main__":
    main()
