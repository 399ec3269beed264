"""tracerl.py - the method: reinforcement learning on the trace by which a diffusion language model decoded.

One RL step, numbered as in the README and in `train`:

  1 roll out    G responses to each prompt, with the trace of every one               (rollout.generate)
  2 reward      1 if the boxed answer is right and the response was not truncated     (give_rewards)
  3 advantage   how much better than the other responses to the same prompt           (set_advantages)
                or than the value model expected, step by step                        (value_advantages)
  4 old logp    replay the traces with the policy that made them                      (old_logprobs)
  5 update      clipped policy gradient on the very states of the trace, with KL      (policy_loss, update)
  6 log         metrics, evaluation, checkpoint

    torchrun tracerl.py                           # everything on a laptop: a tiny model, embedded arithmetic
    torchrun tracerl.py --model JetLM/SDAR-4B-Chat --train_data gsm8k-train --eval_data math500

To change the method for a paper, look for the three marks FORK HERE: reward, advantage, loss.

Left out: a frozen reference model (the KL is to the policy that made the rollout), rollouts that are older
than the policy, a second inference engine, reward models.
"""

import argparse
import functools
import importlib.util
import os
import time
from statistics import fmean

import torch

import eval_math
import model as lm
import rollout
import sft
import value

# ------------------------------------------------------------------------------------------------------------
# The maths: pure functions of tensors.


# FORK HERE (advantage): from rewards to the A of the loss.
def group_advantages(rewards):
    """A = (r - mean) / population std in the group, 0 where all rewards are equal. float (N, G) -> same."""
    std = rewards.std(-1, unbiased=False, keepdim=True)
    return (rewards - rewards.mean(-1, keepdim=True)) / std.masked_fill(std < 1e-6, torch.inf)


# FORK HERE (loss): from log-probabilities and advantages to what is minimised.
def policy_loss(logp, logp_old, advantage, num_trained, clip=0.2, beta=0.01):
    """The clipped policy gradient with a KL penalty (METHOD: policy loss; paper, the TraceRL objective).

    logp, logp_old, advantage: float32 (N,), the trained tokens at hand. num_trained: how many the WHOLE
    update has, over all micro-batches and processes, so that their losses and gradients simply add. clip:
    epsilon. beta: weight of the KL. Returns the loss and a dict of detached sums over the tokens (and maxima)
    for the log.

    The samples come from the old policy, so KL(old || new) is estimated by k3 = (ratio - 1) - log ratio,
    which is never negative. The log-ratio is clamped to 10: a ratio of e^10 is a collapse, and must not
    become inf before it is seen.
    """
    log_ratio = (logp - logp_old).clamp(-10, 10)
    ratio = log_ratio.exp()
    gain = torch.minimum(ratio * advantage, ratio.clamp(1 - clip, 1 + clip) * advantage)
    k3 = ratio - 1 - log_ratio
    loss = (beta * k3 - gain).sum() / num_trained
    with torch.no_grad():
        deviation = (ratio - 1).abs()
        stats = dict(kl=k3.sum(), clip_fraction=(deviation > clip).sum(),
                     ratio_max=ratio.amax() if len(ratio) else 0.0)
    return loss, stats


# ------------------------------------------------------------------------------------------------------------
# One update.


def own_share(rollouts):
    """This process's part of a mini-batch: longest first, dealt out in turn, so that work is about equal."""
    rank, number = lm.processes()
    return sorted(rollouts, key=lambda r: (-len(r.response), r.prompt, r.response))[rank::number]


def minibatches(rollouts, group_size, number, seed):
    """Deals whole groups, in a seeded order, into at most `number` mini-batches -> lists of Rollout."""
    groups = [rollouts[i:i + group_size] for i in range(0, len(rollouts), group_size)]
    order = sft.shuffled(len(groups), seed)
    batches = [[r for i in order[start::number] for r in groups[i]] for start in range(number)]
    return [batch for batch in batches if batch]


def field_tables(rollouts, *names, device):
    """Per-token fields of rollouts as float32 tables (N, longest), to be read at [rows.owner, rows.place]."""
    longest = max((len(r.response) for r in rollouts), default=0)
    pad = lambda values: (values + [0.0] * longest)[:longest]
    return [torch.tensor([pad(getattr(r, name)) for r in rollouts]).view(len(rollouts), longest).to(device)
            for name in names]


def train_rows(model, rollouts, settings, objective):
    """The micro-batches of this process's rollouts (maybe none), on the model's device."""
    rows = rollout.trace_rows(
        rollouts, model.config, settings.shrink, True, settings.post_num, objective) if rollouts else None
    return rollout.micro_batches(rows, settings.micro_tokens, model.device)


@torch.no_grad()
def predict(function, parts, rollouts):
    """function(rows) at all targets of micro-batches -> float32 (rollouts, longest), 0 elsewhere, CPU."""
    table = torch.zeros(len(rollouts), max((len(r.response) for r in rollouts), default=0))
    for rows in parts:
        table[rows.owner.cpu(), rows.place.cpu()] = function(rows).cpu()
    return table


def set_field(rollouts, name, table):
    """Gives every rollout its row of a table."""
    for r, row in zip(rollouts, table.tolist()):
        setattr(r, name, row[:len(r.response)])


def old_logprobs(model, rollouts, settings):
    """Step 4: sets Rollout.logp_old, of the start-of-step policy, on the very rows that will be trained."""
    parts = train_rows(model, rollouts, settings, settings.objective)
    logp = predict(lambda rows: rollout.forward_rows(model, rows, settings.temperature)[0], parts, rollouts)
    set_field(rollouts, "logp_old", logp)


def value_advantages(critic, rollouts, settings):
    """Step 3 with values: sets value_old, returns and advantage of this process's rollouts -> what to log.

    Raw rewards, no filter and no normalisation (METHOD: value model). Values are of the trace's own states.
    """
    sums, square, count = [0.0] * 5, 0.0, 0
    values = predict(critic, train_rows(critic, rollouts, settings, "tracerl"), rollouts)
    if rollouts:
        steps = value.global_steps(rollouts, critic.config, settings.shrink, settings.post_num)
        rewards = value.place_rewards(torch.tensor([r.reward for r in rollouts]), steps)
        for row, r in zip(rewards, rollouts):
            if r.token_rewards:
                row.zero_()[:len(r.token_rewards)] = torch.tensor(r.token_rewards)
        returns, advantages = value.returns_and_advantages(
            rewards, values, steps, settings.gamma, settings.lam)
        for name, table in (("value_old", values), ("returns", returns), ("advantage", advantages)):
            set_field(rollouts, name, table)
        is_trained = steps > 0
        sums = value.variance_sums(values[is_trained], returns[is_trained])
        square, count = float((advantages[is_trained] ** 2).sum()), int(is_trained.sum())
    *sums, square, count = lm.over_processes(sum, *sums, square, count)
    return dict(explained_variance=value.explained_variance(*sums), advantage_rms=(square / count) ** 0.5)


def update_value(critic, optimizer, batch, settings):
    """One step of the value model on one mini-batch -> its loss, and whether it was skipped."""
    own, total = own_share(batch), 0.0
    parts = train_rows(critic, own, settings, "tracerl")
    num_trained = lm.over_processes(sum, sum(len(rows.target) for rows in parts))[0]
    value_old, returns = field_tables(own, "value_old", "returns", device=critic.device)
    for rows in parts:
        at = rows.owner, rows.place
        loss = value.value_loss(critic(rows), value_old[at], returns[at], num_trained, settings.value_clip)
        loss.backward()
        total += loss.detach()
    _, is_finite = lm.optimizer_step(critic, optimizer, settings.max_norm)
    return lm.over_processes(sum, float(total))[0], not is_finite


def update(model, optimizer, batch, is_first, settings):
    """One optimizer step on one mini-batch -> its metrics, over all processes; see the README's glossary.

    is_first: no update has come before in this RL step, so the old policy is the present one and needs no
    replay of its own.
    """
    own = own_share(batch)
    parts = train_rows(model, own, settings, settings.objective)
    num_trained = int(lm.over_processes(sum, sum(len(rows.target) for rows in parts))[0])
    sums = dict.fromkeys(("loss", "kl", "clip_fraction", "entropy", "gap"), 0.0)
    maxima = dict(ratio_max=0.0, gap_max=0.0)
    old, advantage, recorded = field_tables(own, "logp_old", "advantage", "logp", device=model.device)
    ratio = torch.ones_like(recorded)
    for rows in parts:
        at = rows.owner, rows.place
        logp, entropy = rollout.forward_rows(model, rows, settings.temperature)
        logp_old = logp.detach() if is_first else old[at]
        loss, stats = policy_loss(logp, logp_old, advantage[at], num_trained, settings.clip, settings.beta)
        loss.backward()
        ratio[at] = (logp.detach() - logp_old).exp()
        gap = (logp_old - recorded[at]).abs()
        stats.update(loss=loss.detach() * num_trained, entropy=entropy.sum(), gap=gap.sum(),
                     gap_max=gap.max() if len(gap) else 0.0)
        sums = {name: total + float(stats[name]) for name, total in sums.items()}
        maxima = {name: max(top, float(stats[name])) for name, top in maxima.items()}
    set_field(own, "ratio", ratio)
    norm, is_finite = lm.optimizer_step(model, optimizer, settings.max_norm)
    sums = dict(zip(sums, lm.over_processes(sum, *sums.values())))
    maxima = dict(zip(maxima, lm.over_processes(max, *maxima.values())))
    return sums | maxima | dict(tokens=num_trained, gradient_norm=norm, skipped_updates=int(not is_finite))


def summarize(updates):
    """The metrics of one RL step: means over the trained tokens of its updates, maxima, and counts."""
    if not updates:
        return {}
    tokens = max(1, sum(u["tokens"] for u in updates))
    line = {name: sum(u[name] for u in updates) / tokens
            for name in ("loss", "kl", "clip_fraction", "entropy", "gap")}
    line |= {name: max(u[name] for u in updates) for name in ("ratio_max", "gap_max", "gradient_norm")}
    return line | dict(trained_tokens=tokens, skipped_updates=sum(u["skipped_updates"] for u in updates))


@torch.no_grad()
def replay_gap(model, rollouts, temperature):
    """The replay law on shrink-1 views: |replayed - recorded log-probability| -> its mean and maximum."""
    own = own_share(rollouts)
    with lm.unsharded(model):
        replayed = rollout.replay(model, own, temperature=temperature)
    gaps = [abs(a - b) for r, logp in zip(own, replayed) for a, b in zip(logp.tolist(), r.logp)]
    total, count = lm.over_processes(sum, sum(gaps), len(gaps))
    return dict(gap=total / max(count, 1), gap_max=lm.over_processes(max, max(gaps, default=0.0))[0])


# ------------------------------------------------------------------------------------------------------------
# The loop.


def roll_out(model, problems, args, step):
    """Step 1: G responses to each of this step's prompts -> rollouts, group by group, and their problems."""
    chosen = []
    for i in range((step - 1) * args.prompts, step * args.prompts):  # every epoch in an order of its own
        epoch, place = divmod(i, len(problems))
        chosen.append(problems[sft.shuffled(len(problems), args.seed * 1_000_003 + epoch)[place]])
    repeated = [p for p in chosen for _ in range(args.group_size)]
    seeds = [(args.seed * 1_000_003 + step) * 1_000_003 + i for i in range(len(repeated))]
    return rollout.generate_everywhere(
        model, [p.tokens for p in repeated], seeds, **sampling(args, model)), repeated


def sampling(args, model, **changes):
    """The settings of rollout.generate, from the flags."""
    names = ("max_new_tokens", "strategy", "threshold", "temperature", "top_k", "top_p",
             "denoising_steps", "slots")
    return {name: getattr(args, name) for name in names} | dict(eos_ids=model.config.eos_ids) | changes


def set_advantages(rollouts, kind, group_size, keep_range):
    """Step 3 without values: sets the advantages -> the rollouts to train on, group by group; maybe none.

    kind "group": standard scores; groups that teach nothing or fall outside keep_range are dropped (METHOD:
    advantages). "batch": the reward minus the mean of the batch. "none": the reward. The last two, and
    "value" (set later), keep every group, unless no advantage differs from 0. Whole records are kept or
    dropped, so nothing can fall out of step.
    """
    rewards = torch.tensor([r.reward for r in rollouts], dtype=torch.float32).view(-1, group_size)
    is_kept = torch.ones(len(rewards), dtype=torch.bool)
    advantages = rewards
    if kind == "group":
        advantages, mean = group_advantages(rewards), rewards.mean(-1)
        is_kept = (rewards != rewards[:, :1]).any(-1) & (mean >= keep_range[0]) & (mean <= keep_range[1])
    elif kind == "batch":
        advantages = rewards - rewards.mean()
    if kind != "value" and not advantages.any():
        return []
    for r, advantage in zip(rollouts, advantages.flatten().tolist() if kind != "value" else []):
        r.advantage = [advantage] * len(r.response)
    return [r for r, kept in zip(rollouts, is_kept.repeat_interleave(group_size).tolist()) if kept]


def learn(model, optimizer, critic, critic_optimizer, kept, args, step):
    """Steps 3 (with values) to 5: every mini-batch once per epoch -> metrics. Old means start-of-step."""
    batches = minibatches(kept, args.group_size, args.minibatches, seed=args.seed * 1_000_003 + step)
    line, updates, value_updates = {}, [], []
    if critic is not None:
        line = value_advantages(critic, [r for batch in batches for r in own_share(batch)], args)
    is_warming_up = critic is not None and step <= args.value_warmup
    for batch in batches if args.epochs > 1 else batches[1:]:
        if not is_warming_up:
            old_logprobs(model, own_share(batch), args)
    for batch in batches * args.value_epochs if critic is not None else []:
        value_updates.append(update_value(critic, critic_optimizer, batch, args))
    for number, batch in enumerate(batches * args.epochs if not is_warming_up else []):
        updates.append(update(model, optimizer, batch, is_first=number == 0, settings=args))
    line |= summarize(updates)
    if value_updates:
        losses, skipped = zip(*value_updates)
        line |= dict(value_loss=fmean(losses), skipped_updates=line.get("skipped_updates", 0) + sum(skipped))
    return line


def train(model, tokenizer, problems, dev_problems, reward, args, log, before):
    """The RL steps, from the start or from where --resume finds them -> the progress at the end.

    before() evaluates the start, once. All randomness is a function of (seed, step), so that weights,
    optimizer states and the step number are the whole state of a run.
    """
    critic = value.ValueModel(model) if args.advantage == "value" else None
    saved = os.path.join(args.model or "", "value", "model.safetensors")
    if critic is not None and not args.lora_rank and os.path.isfile(saved):
        lm.say(f"value model: going on from {saved}")
        value.load_value_model(critic, saved)
    lm.shard(model, model.layers, getattr(torch, args.dtype))
    if critic is not None:
        lm.shard(critic, critic.backbone.layers, getattr(torch, args.dtype))
    optimizer = lm.make_optimizer(model, args.lr, (0.9, 0.95))
    # a long memory: once failures are rare, one of them must not throw the value model off its path
    critic_optimizer = lm.make_optimizer(critic, args.value_lr, (0.9, 0.999)) if critic is not None else None
    trainers = [(model, optimizer)] + ([(critic, critic_optimizer)] if critic is not None else [])
    progress = log.restore(trainers) if args.resume else None
    if progress is None:
        progress = dict(step=0, gap_max=0.0, before=before())
    else:
        lm.say(f"resuming {log.folder} after step {progress['step']}")
    for step in lm.progress(range(progress["step"] + 1, args.steps + 1), "tracerl"):
        started = time.perf_counter()
        head_start = args.value_warmup if critic is not None else 0  # steps of the value model alone
        for group in optimizer.param_groups:
            group["lr"] = args.lr * min(1.0, max(step - head_start, 0) / max(args.warmup, 1))
        is_adapting = args.rollout_block_size is not None and step <= args.adapt_steps
        rollout_K = args.rollout_block_size if is_adapting else model.config.block_size
        with rollout.blocks_of(model, rollout_K):
            rollouts, repeated = roll_out(model, problems, args, step)  # 1
        is_cut = is_adapting and not model.config.is_full
        for r in rollouts if is_cut else []:  # the last large block shows what was not decoded as masks
            r.canvas = len(r.response) + -(len(r.prompt) + len(r.response)) % model.config.block_size
        give_rewards(rollouts, repeated, tokenizer, reward)  # 2
        rolled_out = time.perf_counter()
        kept = set_advantages(rollouts, args.advantage, args.group_size, args.keep_range)  # 3
        line = dict(step=step, reward=fmean(r.reward for r in rollouts),
                    kept_groups=len(kept) // args.group_size, **eval_math.describe(rollouts))
        is_update = bool(kept) and step > head_start
        if is_update and args.shrink == 1 and args.objective == "tracerl" and not is_adapting:
            gap = {}  # the update itself replays every trained token
        else:
            with rollout.blocks_of(model, rollout_K):
                gap = replay_gap(model, rollouts[::16], args.temperature)
        if kept:
            line |= learn(model, optimizer, critic, critic_optimizer, kept, args, step)  # 3, 4, 5
        line |= gap
        line |= dict(rollout_seconds=rolled_out - started, update_seconds=time.perf_counter() - rolled_out)
        if dev_problems and args.eval_every and step % args.eval_every == 0:  # 6
            line["dev_accuracy"] = eval_math.evaluate(
                model, tokenizer, dev_problems, seed=args.seed, **sampling(args, model))["accuracy"]
        log.write(line)
        lm.say(describe_line(line))
        check_gap(line, args)
        progress |= dict(step=step, gap_max=max(progress["gap_max"], line["gap_max"]))
        if step == args.steps or (args.save_every and step % args.save_every == 0):
            log.save_checkpoint(
                tokenizer, trainers, progress, args.keep_checkpoints,
                functools.partial(value.save_value_model, critic) if critic is not None else None)
            if log.is_writer:  # those that this process trained on have all their numbers
                shown = [r for r in kept if r.ratio or r.value_old] or rollouts
                rollout.write_page(shown[:8], tokenizer, os.path.join(log.folder, "trace.html"))
    return progress


# FORK HERE (reward): without editing, --reward file.py:function.
def load_reward(spec):
    """The function of "file.py:function", the user's own file. ValueError names what is missing."""
    path, _, name = spec.partition(":")
    if not os.path.isfile(path):
        raise ValueError(f"--reward {spec!r}: no file {path!r}; give file.py:function")
    module_spec = importlib.util.spec_from_file_location("reward", path)
    module = importlib.util.module_from_spec(module_spec)
    module_spec.loader.exec_module(module)
    if not callable(getattr(module, name, None)):
        raise ValueError(f"--reward {spec!r}: {path} has no function {name!r}")
    return getattr(module, name)


def apply_reward(function, rollouts, problems, tokenizer):
    """Rewards by function(problem, text, token ids): a float, or one per trained token (process rewards)."""
    for r, p in zip(rollouts, problems):
        tokens = r.response[:r.num_tokens]
        got = function(p, eval_math.response_text(r, tokenizer), tokens)
        if hasattr(got, "__len__"):
            r.token_rewards = [float(x) for x in got]
            r.reward = sum(r.token_rewards)
            if len(r.token_rewards) != len(tokens):
                raise ValueError(f"the reward function gave {len(r.token_rewards)} numbers "
                                 f"for {len(tokens)} tokens")
        else:
            r.reward, r.token_rewards = float(got), []


def give_rewards(rollouts, problems, tokenizer, function=None):
    """Step 2: the math grader, or the user's function. Each process judges its share, and all then hold the
    same rewards: a verdict that a time limit decided, or a random reward, must not differ elsewhere."""
    rank, number = lm.processes()
    own, own_problems = rollouts[rank::number], problems[rank::number]
    if function is None:
        eval_math.score(own, own_problems, tokenizer)
    else:
        apply_reward(function, own, own_problems, tokenizer)
    for r, (reward, token_rewards) in zip(
            rollouts, lm.gather_lists([(r.reward, r.token_rewards) for r in own])):
        r.reward, r.token_rewards = reward, token_rewards


def check_gap(line, args):
    """Stops a float32 run that breaks the replay law: it would train on states the policy never was in.

    A wrong mask, position or step moves log-probabilities by 0.05 nats and more, and many of them. Rounding
    stays below 1e-4 / min(T, 1) for all but one token in a million, which is no reason to stop.
    """
    bound = 1e-4 / min(args.temperature, 1.0)
    is_law = line["gap"] <= bound and line["gap_max"] <= 10 * bound
    if args.dtype == "float32" and not is_law:
        raise RuntimeError(
            f"the replay law is broken: replayed and recorded log-probabilities differ by {line['gap']:.1e} "
            f"on average and by up to {line['gap_max']:.1e}, far more than rounding ({bound:.0e}). "
            "Training and sampling disagree about masks, positions, blocks or steps.")


def describe_line(line):
    """One line of the terminal per RL step; the README explains every name."""
    parts = [f"step {line['step']:3d}", f"reward {line['reward']:.3f}", f"kept {line['kept_groups']:d}",
             f"length {line['length']:.1f}", f"tokens/step {line['tokens_per_step']:.2f}"]
    if "ratio_max" in line:
        parts += [f"ratio max {line['ratio_max']:.2f}", f"clipped {line['clip_fraction']:.3f}",
                  f"KL {line['kl']:.4f}", f"entropy {line['entropy']:.3f}",
                  f"grad {line['gradient_norm']:.2f}"]
    else:
        parts += ["value model only" if "value_loss" in line else "nothing to learn from: no update"]
    if "value_loss" in line:
        parts += [f"value loss {line['value_loss']:.4f}", f"explained {line['explained_variance']:.3f}"]
    parts += [f"gap {line['gap_max']:.1e}", f"rollout {line['rollout_seconds']:.1f}s",
              f"update {line['update_seconds']:.1f}s"]
    if line.get("skipped_updates"):
        parts.append(f"SKIPPED {line['skipped_updates']} updates")
    if "dev_accuracy" in line:
        parts.append(f"dev accuracy {line['dev_accuracy']:.3f}")
    return "  ".join(parts)


def evaluate_all(model, tokenizer, problems, args):
    """Accuracy on the test problems: dynamic as trained, static one token per step, and greedy."""
    modes = dict(dynamic=dict(strategy="dynamic"), static=dict(strategy="static", denoising_steps=None),
                 greedy=dict(strategy="dynamic", temperature=0.0))
    return {name: eval_math.evaluate(model, tokenizer, problems, seed=0, **sampling(args, model, **changes))
            for name, changes in lm.progress(modes.items(), "evaluate")}


def parse_args(argv=None):
    """The flags of tracerl.py. Two defaults: of the embedded task, and with --model the paper's for SDAR."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], allow_abbrev=False)
    flag = functools.partial(lm.add_flag, parser)
    flag("--model", str, None, None,
         "checkpoint folder or hub id; without it, a tiny model is made and warm-started")
    flag("--train_data", str, "arithmetic", None, "problems to train on: embedded arithmetic or a file")
    flag("--dev_data", str, "arithmetic-dev", None,
         "problems for --eval_every; test problems never guide a run")
    flag("--eval_data", str, "arithmetic-test", None, "test problems, scored before and after training only")
    flag("--run", str, "tracerl", "tracerl", "name of the folder under runs/ "
         "(torchrun refuses the short form, which it reads as the start of a flag of its own)", "--run_name")
    flag("--steps", int, 45, 80, "RL steps")
    flag("--prompts", int, 32, 64, "prompts per step")
    flag("--group_size", int, 16, 16, "G, responses per prompt")
    flag("--minibatches", int, 2, 1, "updates per pass over the rollouts of a step")
    flag("--epochs", int, 1, 1, "passes over the rollouts of a step")
    flag("--lr", float, 1e-4, 1e-6, "learning rate of AdamW")
    flag("--warmup", int, 10, 0, "RL steps of rising learning rate, counted from the policy's first")
    flag("--clip", float, 0.2, 0.2, "epsilon of the ratio")
    flag("--beta", float, 0.01, 0.01, "weight of the KL to the policy of the rollout")
    flag("--max_norm", float, 1.0, 1.0, "bound on the gradient norm")
    flag("--shrink", int, 1, None, "s, denoising steps merged into one trace step; None is 1, "
         "and 8 for full attention (the tiny task has too few steps for that)")
    flag("--objective", str, "tracerl", "tracerl", "views: the trace, or the baselines' random masks, "
         "without or with complement", choices=("tracerl", "random", "coupled"))
    flag("--advantage", str, "group", "group", "standard score in the group; value model with GAE; "
         "minus the batch mean; raw reward", choices=("group", "value", "batch", "none"))
    flag("--value_lr", float, 4e-3, 5e-6, "learning rate of the value model")
    flag("--value_warmup", int, 10, 5, "RL steps that train the value model only")
    flag("--value_epochs", int, 4, 1, "passes of the value model over the rollouts of a step")
    flag("--value_clip", float, None, 0.2,
         "bound on the change of a value in its loss; None is no clipping (the paper: 0.2)")
    flag("--post_num", int, 0, 0, "tokens after eos, in its block, that are trained as well")
    flag("--gamma", float, 1.0, 1.0, "discount per trace step")
    flag("--lam", float, 1.0, 1.0, "lambda of GAE")
    flag("--reward", str, None, None, "file.py:function of (problem, response text, tokens) -> a float "
         "or one per token, in place of the math grader (which still evaluates)")
    flag("--keep_range", float, (0.0, 1.0), (0.2, 0.8), "mean rewards of the groups to keep; "
         "equal rewards always drop", nargs=2, metavar=("LOW", "HIGH"))
    flag("--strategy", str, "dynamic", "dynamic", "what a denoising step reveals", choices=rollout.STRATEGIES)
    flag("--threshold", float, 0.9, 0.9, "confidence above which dynamic reveals a token")
    flag("--denoising_steps", int, None, None,
         "steps per block that the quota of revealed tokens is made for; None is K")
    flag("--temperature", float, 1.0, 1.0, "T, of rollouts and of the policy that is trained")
    flag("--top_k", int, 0, 0, "draw among the k most probable tokens; 0 is all")
    flag("--top_p", float, 1.0, 1.0, "draw among the most probable tokens up to this sum; 1 is all")
    flag("--rollout_block_size", int, None, None, "roll out in these smaller blocks for --adapt_steps steps "
         "while training in blocks of --block_size")
    flag("--adapt_steps", int, 20, 40,
         "RL steps with --rollout_block_size; after them, rollouts have --block_size too")
    flag("--max_new_tokens", int, 20, 2000, "longest response; full attention: length of the canvas")
    flag("--slots", int, None, 64, "sequences decoded together on one process; None is all")
    sft.add_common_flags(flag)
    flag("--eval_every", int, 20, 10, "RL steps between evaluations on development problems; 0 is never")
    flag("--save_every", int, 20, 20, "RL steps between checkpoints; 0 is at the end only")
    flag("--keep_checkpoints", int, 3, 3, "the newest ones to keep")
    args = lm.fill_defaults(parser, argv)
    if args.reward and args.keep_range in ((0.0, 1.0), (0.2, 0.8)):
        args.keep_range = (-1e9, 1e9)  # a reward of one's own has a scale of its own
    check_args(args, parser)
    return args


def check_args(args, parser):
    """Bad values die at the door."""
    if args.train_data is None or args.eval_data is None:
        parser.error("--model needs --train_data and --eval_data")
    for name in ("steps", "prompts", "group_size", "minibatches", "epochs", "lr", "max_norm", "temperature",
                 "value_lr", "value_epochs", "keep_checkpoints", "max_new_tokens",
                 "max_prompt_tokens", "micro_tokens"):
        if not getattr(args, name) > 0:
            parser.error(f"--{name} must be above 0, got {getattr(args, name)}")
    for name in ("value_warmup", "warmup", "adapt_steps", "lora_rank", "post_num", "beta", "clip", "top_k",
                 "eval_every", "save_every"):
        if not getattr(args, name) >= 0:
            parser.error(f"--{name} must not be negative, got {getattr(args, name)}")
    if args.shrink is not None and args.shrink < 1:
        parser.error(f"--shrink must be at least 1, got {args.shrink}")
    for name in ("gamma", "lam"):
        if not 0 <= getattr(args, name) <= 1:
            parser.error(f"--{name} must be in [0, 1], got {getattr(args, name)}")
    if args.advantage == "group" and args.group_size < 2:
        parser.error("--group_size must be at least 2: the advantage compares responses to one prompt")
    for name in ("block_size", "rollout_block_size", "slots", "denoising_steps", "value_clip"):
        if getattr(args, name) is not None and not getattr(args, name) > 0:
            parser.error(f"--{name} must be above 0, got {getattr(args, name)}")
    if not args.keep_range[0] <= args.keep_range[1]:
        parser.error(f"--keep_range takes two numbers in rising order, got {args.keep_range}")
    if not 0 < args.top_p <= 1 or not 0 <= args.threshold <= 1:
        parser.error(f"--top_p {args.top_p} must be in (0, 1] and --threshold {args.threshold} in [0, 1]")
    if os.path.basename(args.run) != args.run or args.run in ("", ".", ".."):
        parser.error(f"--run {args.run!r} must be a plain folder name")


def load_data(source, tokenizer, args):
    """Problems whose prompts fit -> list[Problem]; the others are counted and said."""
    problems = eval_math.load_problems(source, needs_answer=args.reward is None)
    problems, num_long = eval_math.encode_prompts(problems, tokenizer, args.max_prompt_tokens,
                                                  args.instruction, args.prompt_style, args.system)
    lm.say(f"{source}: {len(problems)} problems" + (
        f"; skipped {num_long} with a prompt over {args.max_prompt_tokens} tokens" if num_long else ""))
    return problems


def main(argv=None):
    """Everything from the flags to the table at the end -> the content of summary.json."""
    args, started = parse_args(argv), time.perf_counter()
    reward = load_reward(args.reward) if args.reward else None
    lm.start_processes(args.model is None, args.dtype == "bfloat16")
    path = args.model or sft.warm_start(
        args.seed, args.rollout_block_size or args.block_size or 4, args.attention)
    model, tokenizer = lm.load_to_train(args, path)
    args.shrink = args.shrink or (8 if model.config.is_full else 1)
    smallest = args.rollout_block_size or model.config.block_size
    if model.config.block_size % smallest:
        raise ValueError(f"--rollout_block_size {smallest} must divide the block size, "
                         f"{model.config.block_size}: set --block_size")
    if not 1 <= (args.denoising_steps or 1) <= smallest:
        raise ValueError(f"--denoising_steps {args.denoising_steps} must be between 1 "
                         f"and the block size, {smallest}")
    if tokenizer is None:
        raise ValueError(f"{path} has no tokenizer: prompts cannot be encoded")
    problems, test_problems = (
        load_data(source, tokenizer, args) for source in (args.train_data, args.eval_data))
    dev_problems = load_data(args.dev_data, tokenizer, args) if args.dev_data and args.eval_every else []
    settings = {name: value for name, value in vars(args).items() if name != "resume"} | dict(model=path)
    log = lm.RunLog(os.path.join("runs", args.run), settings, is_resumed=args.resume)
    evaluate = functools.partial(evaluate_all, model, tokenizer, test_problems, args)
    progress = train(model, tokenizer, problems, dev_problems, reward, args, log, before=evaluate)
    before, after = progress["before"], evaluate()
    summary = dict(before=before, after=after, seconds=time.perf_counter() - started,
                   replay_gap_max=progress["gap_max"], seed=args.seed)
    log.finish(summary)
    log.plot()
    lm.say(
        f"\n{'accuracy on ' + str(len(test_problems)) + ' test problems':36s}{'before':>16s}{'after':>18s}")
    for name in before:
        cells = [f"{e[name]['accuracy']:.3f} +- {e[name]['standard_error']:.3f}" for e in (before, after)]
        lm.say(f"  {name:34s}{cells[0]:>16s}  {cells[1]:>16s}")
    lm.say(f"{summary['seconds']:.0f} seconds; the run is in {log.folder}: {', '.join(log.files())}")
    lm.end_processes()
    return summary


if __name__ == "__main__":
    main()
