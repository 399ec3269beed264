"""plumbing/show.py - what a person sees: the line of a step, its warnings, tables, a page of traces."""

import itertools
import json
import math
import os
from statistics import fmean

import torch

from plumbing import parallel, runs


def rollout_numbers(rollouts):
    """Mean reward and length (trained tokens), truncated fraction, tokens revealed per denoising step."""
    return dict(
        reward=fmean(r.reward for r in rollouts),
        length=fmean(r.num_tokens for r in rollouts),
        truncated=fmean(r.is_truncated for r in rollouts),
        # How fast it decodes: 1 is as slow as an autoregressive model, K is a block at once.
        tokens_per_step=sum(len(r.response) for r in rollouts) / sum(max(r.step_map) for r in rollouts))


def own_sums(parts, num_tokens, clip_eps):
    """The numbers of one update for the log, whatever the loss is.

    Most are sums over this process's tokens, for step_numbers to add up. ratio_max is a maximum. num_tokens:
    targets of the whole update, over all processes. parts: loss, log-probability, entropy and old
    log-probability of this process's micro-batches. The first is a number, and the others are (n,).
    """
    losses, *others = zip(*parts)
    logp, entropy, logp_old = (torch.cat(numbers).double() for numbers in others)  # float64: these are sums
    log_ratio = logp - logp_old
    ratio = log_ratio.clamp(-10, 10).exp()
    is_clipped = (ratio - 1).abs() > clip_eps
    # step_numbers divides sums by the tokens of the RL step. The loss was divided beforehand, usually by the
    # tokens of this update. So it is multiplied by them here.
    loss = float(torch.stack(losses).double().sum()) * num_tokens
    return dict(loss=loss, kl=float((ratio - 1 - log_ratio).sum()), clip_fraction=int(is_clipped.sum()),
                entropy=float(entropy.sum()), ratio_max=float(ratio.max()) if len(ratio) else 0.0,
                trained_tokens=num_tokens)


def step_numbers(updates, value_updates):
    """The numbers of an RL step: means over the trained tokens, maxima, counts. {} if there was no update.

    updates, value_updates: of each update, this process's numbers. To be called on every process.
    """
    line = {}
    if updates:
        line["trained_tokens"] = sum(u["trained_tokens"] for u in updates)
        everywhere = parallel.gather(updates)  # of all processes
        for name in ("loss", "kl", "clip_fraction", "entropy"):
            line[name] = sum(u[name] for u in everywhere) / line["trained_tokens"]
        for name in ("ratio_max", "gradient_norm"):
            line[name] = max((u[name] for u in everywhere), key=lambda x: (math.isnan(x), x))  # NaN if any is
    if value_updates:
        line["value_loss"] = sum(parallel.gather([u["value_loss"] for u in value_updates]))
        line["value_loss"] /= len(value_updates)
    if updates or value_updates:
        line["skipped_updates"] = sum(u["skipped_updates"] for u in updates + value_updates)
    return line


# What the line of an RL step shows, and in which form. The README explains the names.
SHOWN = dict(reward=".3f", kept_groups="d", length=".1f", tokens_per_step=".2f", ratio_max=".2f",
             clip_fraction=".3f", kl=".4f", entropy=".3f", gradient_norm=".2f", drift_kl=".4f",
             value_loss=".4f", explained_variance=".3f", gap=".1e", gap_max=".1e", rollout_seconds=".1f",
             update_seconds=".1f", dev_accuracy=".3f")
MAX_DRIFT = 0.1  # nats per token in one RL step


def say_step(line):
    """Prints some numbers of an RL step. Says if there was no update; warns if the policy moved too far."""
    parts = [f"{name} {line[name]:{form}}" for name, form in SHOWN.items() if name in line]
    if "kl" not in line:  # there was no update of the policy
        parts.append("value model only" if "value_loss" in line else "nothing to learn from: no update")
    parallel.say("  ".join([f"step {line['step']:3d}", *parts]))
    if line.get("drift_kl", 0.0) > MAX_DRIFT:
        parallel.say(f"WARNING: step {line['step']} moved the policy by {line['drift_kl']:.2f} nats per "
                     f"token (largest ratio {line['drift_ratio_max']:.1f}): a collapse may follow. "
                     "Lower --lr")


def announce(recipe, decoding, num_problems):
    """Says in plain words what a run will do, and what one RL step costs."""
    responses = recipe.prompts * recipe.group_size
    tokens = responses * decoding.max_new_tokens
    parallel.say(
        f"{recipe.steps} RL steps. Each one asks {recipe.prompts} of {num_problems} problems, decodes "
        f"{recipe.group_size} responses to each ({tokens:,} tokens at most in all), and trains on at most "
        f"{responses} responses, in at most {recipe.minibatches * recipe.epochs} updates")


def plus_minus(found):
    """An accuracy with its standard error, as text (None: the data have no answers)."""
    if found["accuracy"] is None:
        return "no answers"
    error = found["standard_error"]
    return f"{found['accuracy']:.3f} +- " + ("?" if error is None else f"{error:.3f}")


def print_table(before, after, num_problems):
    """Prints accuracies before and after training, and the means of a reward function of the user's."""
    title = f"accuracy on {num_problems} test problems"
    parallel.say(f"\n{title:36s}{'before':>16s}{'after':>18s}")
    for name in after:
        parallel.say(f"  {name:34s}{plus_minus(before[name]):>16s}  {plus_minus(after[name]):>16s}")
    for name in before:
        if "reward" in before[name]:
            numbers = f"{before[name]['reward']:>16.3f}  {after[name]['reward']:>16.3f}"
            parallel.say(f"  mean of your reward, {name:13s}{numbers}")


def print_columns(summary):
    """Prints the numbers of an evaluation: a column per strategy, a line per number."""
    width = max(16, *(len(strategy) + 2 for strategy in summary))
    parallel.say(" " * 20 + "".join(f"{strategy:>{width}s}" for strategy in summary))
    for name in next(iter(summary.values())):
        cells = ["?" if found.get(name) is None else f"{found[name]:.3f}" for found in summary.values()]
        parallel.say(f"  {name:18s}" + "".join(f"{cell:>{width}s}" for cell in cells))


# ------------------------------------------------------------------------------------------------------------
# A trace, to look at.

PAGE = os.path.join(os.path.dirname(__file__), "trace.html")  # a page in which STEP and DATA are replaced


def write_trace(run, rollouts, config, tokenizer):
    """Writes trace.html into a run's folder. It shows the best and the worst response to some prompts."""
    groups = [[*group] for _, group in itertools.groupby(rollouts, lambda r: r.group)]
    reward = lambda r: r.reward
    pairs = [[max(group, key=reward), min(group, key=reward)][:len(group)] for group in groups]
    # Groups with right and wrong responses first: where all rewards are equal there is little to see.
    pairs.sort(key=lambda pair: pair[0].reward == pair[-1].reward)
    if run.is_writer:
        K = 0 if config.is_full else config.block_size
        with runs.replacing(os.path.join(run.folder, "trace.html")) as partial:
            write_page(pairs[:8], K, tokenizer, partial, run.progress["step"])


def write_page(pairs, block_size, tokenizer, path, step=0):
    """Writes one self-contained page.

    pairs: lists of Rollouts. Those of one list stand side by side on the page. Tokens are coloured by the
    denoising step that revealed them. block_size: where to draw borders (0: nowhere). step: the RL step, for
    the title.
    """
    shown = [[page_data(r, block_size, tokenizer) for r in pair] for pair in pairs]
    with open(PAGE, encoding="utf-8") as file:
        page = file.read()
    with open(path, "w", encoding="utf-8") as file:
        page = page.replace("STEP", str(step))
        # "<" is written as \u003c, so that no text of a model can end the script of the page.
        file.write(page.replace("DATA", json.dumps(shown).replace("<", "\\u003c")))


def page_data(r, block_size, tokenizer):
    """A response in the form that the page reads."""
    columns = dict(step=r.step_map, confidence=r.confidence, logp=r.logp, advantage=r.advantage,
                   value=r.value_old)
    tokens = [{"text": tokenizer.decode([token])} for token in r.response]
    for name, column in columns.items():
        for token, number in zip(tokens, column):
            token[name] = round(number, 4)
    for place, token in enumerate(tokens):
        token["block"] = (len(r.prompt) + place) // block_size if block_size else 0
    return dict(prompt=tokenizer.decode(r.prompt), reward=r.reward, num_tokens=r.num_tokens, tokens=tokens)
