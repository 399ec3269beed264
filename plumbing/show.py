"""plumbing/show.py - what a person sees: the line of a step, its warnings, a page of traces."""

import json
import os
from statistics import fmean

from plumbing import parallel


def summarize(updates, value_updates):
    """The figures of one RL step: means over the trained tokens of its updates, maxima, and counts."""
    line = {}
    if updates:
        # updates with more tokens count for more
        tokens = max(1, sum(u["trained_tokens"] for u in updates))
        for name in ("loss", "kl", "clip_fraction", "entropy", "gap"):
            line[name] = sum(u[name] * u["trained_tokens"] for u in updates) / tokens
        for name in ("ratio_max", "gap_max", "gradient_norm"):
            line[name] = max(u[name] for u in updates)
        line["trained_tokens"] = tokens
    if value_updates:
        line["value_loss"] = fmean(u["value_loss"] for u in value_updates)
    if updates or value_updates:
        line["skipped_updates"] = sum(u["skipped_updates"] for u in updates + value_updates)
    return line


def describe_line(line):
    """One line of the terminal per RL step; the README explains every name."""
    parts = [f"step {line['step']:3d}", f"reward {line['reward']:.3f}", f"kept {line['kept_groups']:d}",
             f"length {line['length']:.1f}", f"tokens/step {line['tokens_per_step']:.2f}"]
    if "ratio_max" in line:
        parts += [f"ratio max {line['ratio_max']:.2f}", f"clipped {line['clip_fraction']:.3f}",
                  f"KL {line['kl']:.4f}", f"entropy {line['entropy']:.3f}",
                  f"grad {line['gradient_norm']:.2f}", f"drift {line['drift_kl']:.4f}"]
    else:
        parts += ["value model only" if "value_loss" in line else "nothing to learn from: no update"]
    if "value_loss" in line:
        parts += [f"value loss {line['value_loss']:.4f}", f"explained {line['explained_variance']:.3f}"]
    parts += [f"gap {line['gap']:.1e} max {line['gap_max']:.1e}", f"rollout {line['rollout_seconds']:.1f}s",
              f"update {line['update_seconds']:.1f}s"]
    if line.get("skipped_updates"):
        parts.append(f"SKIPPED {line['skipped_updates']} updates")
    if "dev_accuracy" in line:
        parts.append(f"dev accuracy {line['dev_accuracy']:.3f}")
    return "  ".join(parts)


MAX_DRIFT = 0.1  # nats per token in one RL step
MAX_IDLE = 5  # steps in a row without an update


def warn(line, progress):
    """Says what a table of numbers hides: a policy that moves too far, or not at all."""
    if line.get("drift_kl", 0.0) > MAX_DRIFT:
        parallel.say(f"WARNING: step {line['step']} moved the policy by {line['drift_kl']:.2f} nats per "
                     f"token (largest ratio {line['drift_ratio_max']:.1f}): a collapse may follow. "
                     "Lower --lr")
    is_idle = "kl" not in line and "value_loss" not in line
    progress["idle_steps"] = progress.get("idle_steps", 0) + 1 if is_idle else 0
    if progress["idle_steps"] and progress["idle_steps"] % MAX_IDLE == 0:
        parallel.say(f"WARNING: no update in {progress['idle_steps']} steps: all responses to a prompt earn "
                     f"the same (mean reward {line['reward']:.2f}). Problems of another difficulty, a wider "
                     "--keep_range or a larger --group_size would help, if there is still something to learn")


def check_gap(line, args, progress):
    """Stops a run that breaks the replay law: it would train on states the policy never was in.

    A wrong mask, position or step moves log-probabilities by 0.05 nats and more, and many of them. Float32
    rounding stays below 1e-4 / min(T, 1) but for one token in a million: a mean beyond this bound, or ten
    times as much for one token, stops the run. In bfloat16, decoding and training round differently: means of
    1e-3 were seen on the CPU; three steps in a row beyond 0.05 (or --max_gap) stop the run.
    """
    # At T < 1 logits are divided by T, and their rounding grows with them.
    bound = (args.max_gap or (1e-4 if args.dtype == "float32" else 0.05)) / min(args.temperature, 1.0)
    is_law = line["gap"] <= bound and (line["gap_max"] <= 10 * bound or args.dtype != "float32")
    progress["gap_steps"] = 0 if is_law or args.cache != "none" else progress.get("gap_steps", 0) + 1
    if progress["gap_steps"] == 0:
        return
    text = (f"the replay law is broken: replayed and recorded log-probabilities differ by {line['gap']:.1e} "
            f"on average and by up to {line['gap_max']:.1e}, far more than rounding ({bound:.0e}). "
            "Training and sampling disagree about masks, positions, blocks or steps.")
    if args.dtype == "float32" or progress["gap_steps"] >= 3:
        raise RuntimeError(text)
    parallel.say(f"WARNING: {text}")


def plus_minus(found):
    """An accuracy with its standard error, as text (None: the data have no answers)."""
    if found["accuracy"] is None:
        return "no answers"
    error = found["standard_error"]
    return f"{found['accuracy']:.3f} +- " + ("?" if error is None else f"{error:.3f}")


def print_table(before, after, num_problems):
    """Accuracies before and after training, and the means of a reward of one's own."""
    title = f"accuracy on {num_problems} test problems"
    parallel.say(f"\n{title:36s}{'before':>16s}{'after':>18s}")
    for name in before:
        parallel.say(f"  {name:34s}{plus_minus(before[name]):>16s}  {plus_minus(after[name]):>16s}")
    for name in before:
        if "reward" in before[name]:
            numbers = f"{before[name]['reward']:>16.3f}  {after[name]['reward']:>16.3f}"
            parallel.say(f"  mean of your reward, {name:13s}{numbers}")


def print_columns(summary):
    """The figures of an evaluation: a column per strategy, a line per figure."""
    parallel.say(" " * 20 + "".join(f"{strategy:>16s}" for strategy in summary))
    for name in next(iter(summary.values())):
        numbers = [figures[name] for figures in summary.values()]
        cells = ["?" if number is None else f"{number:.3f}" for number in numbers]
        parallel.say(f"  {name:18s}" + "".join(f"{cell:>16s}" for cell in cells))


# ------------------------------------------------------------------------------------------------------------
# A trace, to look at.

PAGE = os.path.join(os.path.dirname(__file__), "trace.html")  # with the words STEP and DATA where these go


def best_and_worst(rollouts):
    """Of every prompt's responses the one with the highest and the one with the lowest reward."""
    groups = {}
    for r in rollouts:
        groups.setdefault(tuple(r.prompt), []).append(r)
    reward = lambda r: r.reward
    return [[max(group, key=reward), min(group, key=reward)][:len(group)] for group in groups.values()]


def write_page(pairs, block_size, tokenizer, path, step=0):
    """Writes lists of responses, each list side by side, as one self-contained page: tokens by the denoising
    step that revealed them, with their numbers. block_size: where to draw borders (0: nowhere). step: the RL
    step, for the title."""
    shown = [[page_data(r, block_size, tokenizer) for r in pair] for pair in pairs]
    with open(PAGE, encoding="utf-8") as file:
        page = file.read()
    with open(path, "w", encoding="utf-8") as file:  # no "<" of a model may end the script
        page = page.replace("STEP", str(step))
        file.write(page.replace("DATA", json.dumps(shown).replace("<", "\\u003c")))


def page_data(r, block_size, tokenizer):
    """A response as the page wants it."""
    columns = dict(step=r.step_map, confidence=r.confidence, logp=r.logp, advantage=r.advantage,
                   value=r.value_old, ratio=r.ratio)
    tokens = [{"text": tokenizer.decode([token])} for token in r.response]
    for name, column in columns.items():
        for token, number in zip(tokens, column):
            token[name] = round(number, 4)
    for place, token in enumerate(tokens):
        token["block"] = (len(r.prompt) + place) // block_size if block_size else 0
    return dict(prompt=tokenizer.decode(r.prompt), reward=r.reward, num_tokens=r.num_tokens, tokens=tokens)
