"""tracerl.py - the method: reinforcement learning on the trace by which a diffusion language model decoded.

TraceRL (arXiv 2509.06949) is PPO or GRPO with one question answered: what is the log-probability
of a response that was not written from left to right? Its answer: that of its trace, each token in
the state in which it was revealed.

One RL step has six stages, numbered as in the README and in `train`:

  1 roll out    G responses to each prompt, with the trace of every one           rollout.generate
  2 reward      1 if the boxed answer is right and the response has ended, else 0 eval_math.give_rewards
  3 advantage   how much better than the other responses to the same prompt,      give_advantages
                or than the value model expected, step by step
  4 old logp    replay the traces with the policy that made them (not for the     old_logprobs
                first mini-batch: its own forward in stage 5 gives that)
  5 update      clipped policy gradient on the states of the trace, with a KL     learn, update, policy_loss
  6 log         metrics, evaluation, checkpoint                                   finish_step

Four words to keep apart: a *denoising step* is one forward that reveals tokens; a *trace step* is --shrink of
them taken together (1: the same); an *RL step* is the six stages above; an *update* is one step of the
optimizer, of which an RL step makes --minibatches times --epochs (fewer where few groups are kept; the value
model makes its own).

    torchrun tracerl.py                           # everything on a laptop: a tiny model, embedded arithmetic
    torchrun tracerl.py --model JetLM/SDAR-4B-Chat --train_data gsm8k-train --eval_data math500

Read in this order: group_advantages, policy_loss, train, and then what `train` calls. To change the method
for a paper, look for FORK HERE: advantage and loss here, views in rollout.py, reward in eval_math.py can be
replaced by a function in a file of your own, without editing; decoding (rollout.py) and prompts (here) by a
few lines.

Left out:
  1. a frozen reference model: the KL is to the policy that made the rollout. A KL to a frozen one would be a
     float field at the end of model.Targets, one more empty column in rollout.lay_out, filled by a second
     model in a pass like old_logprobs (which skips the first batch: this must not), and one more term in
     policy_loss. As a penalty in the reward it needs no change: the function gets the Rollout, with its logp,
     and may replay it under another model;
  2. rollouts older than the policy, a second inference engine: the weights that train are those that decode;
  3. reward models.
"""

import functools
import os
import random
import time
from typing import NamedTuple

import torch

import eval_math
import rollout
import sft
import value
from eval_math import give_rewards, math_reward
from plumbing import checkpoints, cuda, packing, parallel, runs, show

# ------------------------------------------------------------------------------------------------------------
# The maths: pure functions of tensors.


# FORK HERE (advantage): from rewards to the A of the loss. Without editing: --advantage
# file.py:function, a function of
#     rewards    float (groups, G)
#     rollouts   the records, group by group: step_map, confidence, logp, ... of every response (only if the
#                function has a second parameter without a default)
# that gives an advantage per response, (groups, G), or per token, (groups, G, tokens of the longest response,
# whole blocks with their filling). A group of zeros is left out of the update. So is one whose mean reward is
# outside --keep_range (default with --model and the math reward: 0.2 to 0.8).
def group_advantages(rewards):
    """Standard scores in the group: A = (r - mean) / population std, 0 where all rewards are equal.

    Rewards 1 0 0 0: mean .25, std .433, A = 1.73 -.58 -.58 -.58. Every token of a response has the same A.
    """
    # Population std (divide by G, not G - 1), as the authors do. Where all are
    # equal it is 0, and 0 / inf = 0.
    std = rewards.std(-1, unbiased=False, keepdim=True)
    return (rewards - rewards.mean(-1, keepdim=True)) / std.masked_fill(std < 1e-6, torch.inf)


def batch_advantages(rewards):
    """The reward minus the mean over all responses of the RL step."""
    return rewards - rewards.mean()


def raw_advantages(rewards):
    """The reward itself: plain REINFORCE without a baseline."""
    return rewards


ADVANTAGES = dict(  # --advantage; value: by GAE, see value_advantages
    group=group_advantages, batch=batch_advantages, raw=raw_advantages, value=None)


# FORK HERE (loss): from log-probabilities and advantages to what is minimised. Without editing:
# --loss file.py:function, called with the same arguments for each micro-batch. A micro-batch
# holds whole responses where they fit (--tokens_per_micro_batch), told apart by
# targets.rollout_index: enough for a ratio of sequences.
def policy_loss(logp, targets, num_tokens, num_responses, clip_eps=0.2, kl_coef=0.01):
    """The clipped policy gradient with a KL penalty (paper, the TraceRL objective; clipping as in PPO):

        L = 1/N sum_j [ -min(ratio_j A_j, clip(ratio_j, 1 - eps, 1 + eps) A_j) + kl_coef k3_j ]

    logp: float32 (n,), the micro-batch's targets under the policy that is trained. targets:
    model.Targets, of which logp_old and advantage are used. num_tokens (N), num_responses: how many the
    WHOLE update has, over all micro-batches and processes. Divide by these, never by what is at hand: then
    losses and gradients simply add, and do not depend on how the update was split. (A mean per micro-batch
    gives tokens of short responses more weight.)

    Here all trained tokens weigh the same. The paper averages inside each trace step first, so that a step of
    three tokens weighs as much as a step of one (as tests/forks.py:mean_per_step). The authors' code does
    the same for full attention; for blocks it divides by the number of rows and the padded length.

    In the first update of an RL step the policy is still the one that made the rollouts: every ratio is 1,
    nothing is clipped, k3 and its gradient are 0, and the gradient is that of -A logp. Clip and KL act from
    the second update on: with --minibatches or --epochs above 1. (With --model both are 1 unless set, so that
    clip and KL never act.)

    k3 = (ratio - 1) - log ratio, never negative, estimates KL(old || new) from samples of the OLD policy: the
    mean of -log ratio is that KL, and ratio - 1, of mean 0, only takes variance away. (The other common form,
    exp(-d) - 1 + d with d = log ratio, is for samples of the new policy.) It has no bias if the choice of
    which draws to keep does not look at the draws (strategies sequential, entropy). Static and dynamic look:
    an unsure draw is thrown away and made anew, so rare tokens are too few in what is trained on, for k3 and
    for the policy gradient alike. This is a property of the method, not of this code.
    """
    # A ratio of e^10 is a collapse; it must not become inf before it is seen. (Beyond that only the linear
    # part of k3 has a gradient: what guards against it is --max_grad_norm, and `drift_kl` in the log.)
    log_ratio = logp - targets.logp_old
    ratio = log_ratio.clamp(-10, 10).exp()
    clipped = ratio.clamp(1 - clip_eps, 1 + clip_eps)  # (n,)
    # The smaller of the two: once a ratio has left the clip range in the direction its advantage
    # asks for, the gain is constant and its gradient 0. In the other direction it is not
    # clipped: a mistake may be undone.
    gain = torch.minimum(ratio * targets.advantage, clipped * targets.advantage)
    k3 = ratio - 1 - log_ratio  # (n,)
    return (kl_coef * k3 - gain).sum() / num_tokens


LOSSES = dict(clip=policy_loss)  # --loss


@torch.no_grad()
def diagnose(logp, entropy, targets, clip_eps):
    """Figures for the log, whatever the loss is -> sums over the targets (4,), maxima (2,), float64.

    Sums: k3, ratios outside the clip range, entropy, gap. Maxima: ratio, gap. The gap is |logp_old - recorded
    logp|: 0 up to rounding on the trace's own states (the replay law).
    """
    # float64: sums over a whole update, and a gap of 1e-6 that should not drown in rounding.
    log_ratio = (logp - targets.logp_old).double()
    ratio, gap = log_ratio.clamp(-10, 10).exp(), (targets.logp_old - targets.logp).abs().double()
    is_clipped = ((ratio - 1).abs() > clip_eps).double()
    sums = torch.stack([(ratio - 1 - log_ratio).sum(), is_clipped.sum(), entropy.double().sum(), gap.sum()])
    nothing = ratio.new_zeros(1)  # a dummy micro-batch has no targets
    return sums, torch.stack([torch.cat([ratio, nothing]).max(), torch.cat([gap, nothing]).max()])


# ------------------------------------------------------------------------------------------------------------
# The loop.


class Trainers(NamedTuple):
    """What learns. critic and critic_optimizer are None without a value model."""

    model: torch.nn.Module
    optimizer: torch.optim.Optimizer
    critic: torch.nn.Module
    critic_optimizer: torch.optim.Optimizer

    def pairs(self):
        """(model, optimizer) pairs, for checkpoints."""
        pairs = (self.model, self.optimizer), (self.critic, self.critic_optimizer)
        return [pair for pair in pairs if pair[0] is not None]


def train(trainers, reward, flags_plan, tokenizer, problems, dev_problems, args, run, progress):
    """The RL steps, from progress["step"] + 1 on -> the progress at the end.

    All randomness is a function of (seed, step), so that weights, optimizer states and progress are the whole
    state of a run. Every process runs this same code on the same records; only forwards and backwards are
    dealt out (see "what is dealt to this process"). RuntimeError when the replay law is broken, or when five
    gradients in a row are not finite.
    """
    model = trainers.model
    for step in parallel.progress(range(progress["step"] + 1, args.steps + 1), "tracerl"):
        plan, times = plan_step(step, trainers, flags_plan, args), [time.perf_counter()]
        # Rollouts: one record per response, in groups of G to a prompt, the same on every process.
        rollouts, asked = roll_out(model, problems, plan.rollout_block_size, args, step)  # 1
        give_rewards(rollouts, asked, tokenizer, reward)  # 2
        times.append(time.perf_counter())
        # From here on only `kept`: groups that can teach something. Each record carries its advantage.
        kept, line = give_advantages(rollouts, trainers.critic, plan, args)  # 3
        # Rows of views: this process's part of every update, with the values of the records copied in.
        batches = make_batches(kept, trainers, plan, args, step)
        old_logprobs(model, batches, plan, args)  # 4
        gap = sampled_gap(model, batches, rollouts, plan, args)
        figures = learn(trainers, batches, plan, args)  # 5
        # `line` becomes this step's line of metrics.jsonl. `gap` stands last: where views are not the trace,
        # the update's own gap compares different states, and is replaced.
        line = dict(step=step) | line | figures | gap
        times.append(time.perf_counter())
        finish_step(line, times, rollouts, kept, trainers, plan, tokenizer, dev_problems, reward, args, run,
                    progress)  # 6
    return progress


class Plan(NamedTuple):
    """What may differ between RL steps. In most: the functions that the flags name, one block size."""

    advantage: object  # functions: --advantage, --loss, --views
    loss: object
    views: object
    block_sizes: tuple = ()  # K of the training rows
    rollout_block_size: int = 0  # K of the rollouts
    lr: float = 0.0  # of the policy
    updates_policy: bool = True  # False while the value model has its head start
    is_replayed: bool = False  # whether the rows are the very states of decoding (views trace, shrink 1)


def plan_step(step, trainers, flags_plan, args):
    """The Plan of a step; flags_plan: one with the functions that the flags name.

    Value model: for --value_warmup steps it learns alone, since one that has only begun is a poor baseline.

    Larger blocks (the paper goes from 4 to 8; the recipe is ours): a model that has only seen blocks of 4 is
    helpless in blocks of 8, so its rollouts there earn nothing and teach nothing. For --adapt_steps
    steps it rolls out in the smaller blocks that it knows, and imitates its own right responses (advantage =
    reward) with random tokens hidden, in blocks of BOTH sizes: in the larger ones to learn them, in the
    smaller ones because the rollouts need them. Then TraceRL goes on in the larger blocks. The traces of the
    smaller blocks alone do not do it: they fill each block of 8 from its left half, and decoding may start
    anywhere in it.
    """
    K, is_full = trainers.model.config.block_size, trainers.model.config.is_full
    is_adapting = args.rollout_block_size is not None and step <= args.adapt_steps
    rollout_K = args.rollout_block_size if is_adapting else K
    if is_adapting and not is_full:  # (full attention: the same canvas whatever the blocks of its decoding)
        return Plan(raw_advantages, policy_loss, sft.noise_views, (K, rollout_K), rollout_K, args.adapt_lr)
    # RL steps before the ramp of the learning rate. (A value model and larger blocks exclude each other.)
    head_start = args.value_warmup if trainers.critic is not None else 0
    if args.rollout_block_size is not None and not is_full:
        head_start = args.adapt_steps
    ramp = min(1.0, max(step - head_start, 0) / max(args.warmup, 1))
    return flags_plan._replace(
        block_sizes=(K,), rollout_block_size=rollout_K, lr=args.lr * ramp, updates_policy=step > head_start,
        is_replayed=flags_plan.views is rollout.trace_views and args.shrink == 1)


# ------------------------------------------------------------------------------------------------ 1 roll out


def roll_out(model, problems, block_size, args, step):
    """G responses to each of this step's prompts -> rollouts, group by group, and their problems."""
    chosen = []
    # Prompts follow from (seed, step): a resumed run asks what the uninterrupted one would have asked.
    # FORK HERE (prompts): a curriculum would choose otherwise (by rewards so far: keep them in progress).
    for i in range((step - 1) * args.prompts, step * args.prompts):  # every epoch in an order of its own
        epoch, place = divmod(i, len(problems))  # which pass over the data, which place in it
        chosen.append(problems[sft.shuffled(len(problems), args.seed * 1_000_003 + epoch)[place]])
    # G times each prompt, side by side: [p0 p0 p0 p0 p1 p1 p1 p1 ...]
    repeated = [p for p in chosen for _ in range(args.group_size)]
    # Large odd factors keep (seed, step, i) apart, so that no two responses of a run share their draws.
    seeds = [(args.seed * 1_000_003 + step) * 1_000_003 + i for i in range(len(repeated))]
    # Decoded with the training weights themselves: there is no second engine that could lag behind.
    rollouts = rollout.generate_everywhere(model, [p.tokens for p in repeated], seeds, block_size=block_size,
                                           **runs.decoding_settings(args))
    return rollouts, repeated


# ----------------------------------------------------------------------------------------------- 3 advantage


def give_advantages(rollouts, critic, plan, args):
    """Sets the advantages of all rollouts -> those to train on, group by group (maybe
    none), and figures for the log.

    With group advantages, groups that teach nothing are left out: rewards all equal, or, with --keep_range, a
    mean outside it (the authors' code: 0.2 to 0.8). That is a normal event. Whole records are kept or
    dropped: separate lists of prompts, rewards and step maps, filtered one by one, are how a response gets
    its neighbour's reward. With values every group is kept, and raw rewards are used.
    """
    # Reading the flat list as a table gives the groups back: row = prompt, column = response. With G = 4,
    # responses 0..3 are row 0, 4..7 row 1.
    rewards = torch.tensor([r.reward for r in rollouts], dtype=torch.float32).view(-1, args.group_size)
    line = dict(reward=rewards.mean().item()) | eval_math.describe(rollouts)
    if critic is not None:
        # With values every group can teach: an equal reward may still be more or less than was expected.
        figures = value_advantages(critic, rollouts, plan.block_sizes[0], args)
        return rollouts, line | figures | dict(kept_groups=len(rewards))
    if args.advantage in ADVANTAGES and any(r.token_rewards for r in rollouts):
        raise ValueError(f"the reward function gives a reward per token, and --advantage {args.advantage} "
                         "takes one per response: use --advantage value or a function of yours, or their sum")
    # (groups, G), or (groups, G, longest). A function of yours may draw: all processes take the first's.
    advantages = parallel.from_first(runs.call(plan.advantage, rewards, rollouts))
    if advantages.shape[:2] != rewards.shape or not advantages.isfinite().all():
        raise ValueError(f"--advantage {args.advantage} gives {tuple(advantages.shape)} numbers for the "
                         f"{tuple(rewards.shape)} responses, or some that are not finite (0 / 0?)")
    # A group of equal rewards has nothing to learn from. If all groups are like that, there is no update: the
    # step is logged ("nothing to learn from"), the weights stay, and the next step asks other prompts.
    is_kept = (advantages != 0).flatten(1).any(-1)  # (groups,)
    if plan.advantage in (batch_advantages, raw_advantages):  # not relative to a group: all groups are kept
        is_kept[:] = advantages.any()
    elif args.keep_range is not None:
        low, high = args.keep_range  # too easy or too hard teaches little
        is_kept &= (rewards.mean(-1) >= low) & (rewards.mean(-1) <= high)
    longest = max(len(r.response) for r in rollouts)
    for r, A in zip(rollouts, advantages.flatten(0, 1)):
        # Mostly the same number for every token: with a single reward at the end, group scores cannot tell
        # tokens apart.
        r.advantage = A.expand(longest)[:len(r.response)].tolist()
    kept = [r for r, keep in zip(rollouts, is_kept.repeat_interleave(args.group_size).tolist()) if keep]
    return kept, line | dict(kept_groups=int(is_kept.sum()))


def value_advantages(critic, rollouts, block_size, args):
    """Advantages from the value model: sets value_old, returns and advantage by GAE over trace steps ->
    figures for the log. (Its rows are of the trace, whatever --views is.)"""
    # Dealt out longest first, so that processes have about the same number of tokens.
    ordered = longest_first(rollouts)
    own = parallel.share(ordered)
    parts = own_rows(critic, own, rollout.trace_views, block_size, args)
    with torch.no_grad():
        packing.write_back(own, "value_old", parts, [critic(rows) for rows in parts])
    for r in own:
        steps = value.trace_steps(r, critic.config, block_size, args.shrink, args.post_num)
        value.estimate(r, steps, args.gamma, args.gae_lambda)
    # Every process then holds the same records.
    for r, fields in zip(ordered, parallel.gather([(r.value_old, r.returns, r.advantage) for r in own])):
        r.value_old, r.returns, r.advantage = fields
    trained = []  # value, return and advantage of every trained token
    for r in rollouts:
        columns = list(zip(r.value_old, r.returns, r.advantage))
        trained += columns[:r.trained_end(args.post_num)]
    values, returns, advantages = torch.tensor(trained, dtype=torch.float64).T  # (N,) each
    return dict(explained_variance=value.explained_variance(values, returns),
                advantage_rms=float(advantages.square().mean().sqrt()))


# ----------------------------------------------------------------------------- what is dealt to this process
#
# One process and eight make the same update, to rounding, because
#   1. a draw depends on its response's seed, denoising step and position, not on who decodes it beside whom;
#   2. every process holds all records of a step, and chooses from them by the same seeded rules;
#   3. only forwards and backwards are dealt out, and each loss is a share of one sum, divided beforehand by
#      the tokens of the WHOLE update: the sum over processes is the sum over micro-batches.


class Batch(NamedTuple):
    """One mini-batch: this process's part of the rollouts of one update."""

    rollouts: list
    rows: list  # micro-batches of model.Rows, for the policy
    value_rows: list  # the same for the value model: always the trace; [] without one


def longest_first(rollouts):
    """An order in which dealing out gives every process about equal work."""
    return sorted(rollouts, key=lambda r: (-len(r.response), r.prompt, r.response))


def own_rows(model, own, views, block_size, args):
    """The micro-batches of this process's rollouts, as many on every process: with sharded weights every
    forward and backward is a meeting of all processes, and one that came less often would leave the others
    waiting. (Dummies fill the gap: a padding token, no targets, zero gradient.)"""
    # trained_only: targets up to eos
    built = rollout.build_rows(own, model.config, block_size, views, args.shrink, True, args.post_num)
    if args.loss not in LOSSES:
        packing.warn_of_cuts(built, args.tokens_per_micro_batch)
    parts = packing.micro_batches(built, args.tokens_per_micro_batch, model.config.pad_id, model.device)
    return packing.with_dummies(parts, model.config.pad_id, model.device)


def make_batches(kept, trainers, plan, args, step):
    """Deals whole groups, in a seeded order, into at most args.minibatches updates
    -> this process's part of each."""
    groups = [kept[i:i + args.group_size] for i in range(0, len(kept), args.group_size)]
    # Groups stay whole: so every mini-batch has positive and negative advantages (of group scores). Five
    # groups in two mini-batches: 0 2 4 and 1 3.
    groups = [groups[i] for i in sft.shuffled(len(groups), args.seed * 1_000_003 + step)]
    batches = []
    for start in range(min(args.minibatches, len(groups))):
        chosen = [r for group in groups[start::args.minibatches] for r in group]
        # The same rule deals out every kind of work: item i goes to process i modulo their number.
        own = parallel.share(longest_first(chosen))
        rows, value_rows = [], []
        for K in plan.block_sizes:
            rows += own_rows(trainers.model, own, plan.views, K, args)
        if trainers.critic is not None and plan.views is rollout.trace_views:
            value_rows = rows
        elif trainers.critic is not None:
            value_rows = own_rows(trainers.critic, own, rollout.trace_views, plan.block_sizes[0], args)
        batches.append(Batch(own, rows, value_rows))
    return batches


# ------------------------------------------------------------------------------------------------ 4 old logp


@torch.no_grad()
def old_logprobs(model, batches, plan, args):
    """Sets Targets.logp_old, the policy at the start of the RL step on the very rows that will be trained,
    from the second mini-batch on. (The first update needs no pass: its policy IS the old one, see `update`.)

    The recorded log-probabilities would do for the trace itself; but other views are other states, and on a
    GPU decoding and training use different kernels.
    """
    for batch in batches[1:] if plan.updates_policy else []:
        for rows in batch.rows:
            logp, _ = rollout.forward_rows(model, rows, args.temperature)
            rows.targets.logp_old.copy_(logp)


def sampled_gap(model, batches, rollouts, plan, args):
    """The replay gap of a sample of the rollouts, before the updates -> figures for the log; {} where the
    rows of the updates are the trace itself: then `update` measures the gap on all trained tokens."""
    is_measured_there = bool(batches) and plan.updates_policy and plan.is_replayed
    return {} if is_measured_there else rollout.replay_gap(
        model, sample(rollouts, model), plan.rollout_block_size, args.temperature,
        args.tokens_per_micro_batch)


def sample(rollouts, model):
    """A sixteenth of the rollouts; with full attention, where every state is a row, a sixty-fourth."""
    return rollouts[::64 if model.config.is_full else 16]


def drift(model, rollouts, plan, args):
    """How far the step's updates have moved the policy: KL(old || new) and the
    largest ratio on a few rollouts, beside what was recorded (in bfloat16 the gap is part of it).

    With one update per step nothing else shows a collapse: the update's own ratios are measured BEFORE it
    moves the weights, so they are 1 whatever comes of it.
    """
    log_ratio = rollout.replayed_minus_recorded(
        model, rollouts, plan.rollout_block_size, args.temperature, args.tokens_per_micro_batch)
    ratio = log_ratio.clamp(-10, 10).exp()
    k3 = ratio - 1 - log_ratio  # as in policy_loss
    return dict(drift_kl=parallel.mean_of(k3), drift_ratio_max=parallel.largest_of(ratio))


# -------------------------------------------------------------------------------------------------- 5 update


def learn(trainers, batches, plan, args):
    """The value model's updates, then the policy's: every mini-batch once per
    epoch -> figures for the log."""
    model, optimizer, critic, critic_optimizer = trainers
    value_updates, updates = [], []
    if critic is not None:
        for batch in batches * args.value_epochs:
            value_updates.append(update_value(critic, critic_optimizer, batch, args))
    if plan.updates_policy:
        # Constant, as in the paper; the ramp at the start (--warmup, 0 with --model) is ours.
        parallel.set_learning_rate(optimizer, plan.lr)
        for number, batch in enumerate(batches * args.epochs):
            updates.append(update(model, optimizer, batch, plan.loss, number == 0, args))
    return show.summarize(updates, value_updates)


def update(model, optimizer, batch, loss, is_first, args):
    """One optimizer step of the policy on one mini-batch -> its figures, over all processes.

    is_first: no update has come before in this RL step, so the old policy is the present one, and its
    log-probabilities are those of this very forward.
    """
    own_size = torch.tensor([packing.count_targets(batch.rows), len(batch.rollouts)], device=model.device)
    # Of the whole update, over all processes, before any loss is made.
    num_tokens, num_responses = parallel.add_up(own_size).tolist()
    total, sums, maxima = (torch.zeros(n, dtype=torch.float64, device=model.device) for n in (1, 4, 2))
    ratios = []
    for rows in batch.rows:
        # One forward of [clean text | view | view | ...] rows: log-probabilities (n,) of their targets only.
        logp, entropy = rollout.forward_rows(model, rows, args.temperature)
        if is_first:
            rows.targets.logp_old.copy_(logp.detach())
        targets = rows.targets
        if args.importance == "truncated":
            # min(c x, c y) = c min(x, y) for c > 0: to multiply the advantage is to multiply the clipped gain
            # (the KL is left as it is).
            weight = (targets.logp_old - targets.logp).exp().clamp(max=2)  # pi_old / what decoding recorded
            targets = targets._replace(advantage=targets.advantage * weight)
        if len(logp):
            part = loss(logp, targets, num_tokens, num_responses, args.clip_eps, args.kl_coef)
        else:
            part = logp.sum()  # a dummy: 0, but with a backward like everybody's
        parallel.backward(part, model, rows is batch.rows[-1])
        part_sums, part_maxima = diagnose(logp, entropy, rows.targets, args.clip_eps)
        total, sums, maxima = total + part.detach(), sums + part_sums, torch.maximum(maxima, part_maxima)
        ratios.append((logp.detach() - rows.targets.logp_old).exp())  # pi_new / pi_old
    packing.write_back(batch.rollouts, "ratio", batch.rows, ratios)  # for trace.html
    # A gradient with NaN or inf: the update is skipped, counted and reported.
    norm, is_finite = parallel.optimizer_step(model, optimizer, args.max_grad_norm)
    loss_value, *sums = parallel.add_up(torch.cat([total, sums])).tolist()
    kl, clip_fraction, entropy, gap = (number / max(num_tokens, 1) for number in sums)
    ratio_max, gap_max = parallel.largest(maxima).tolist()
    return dict(loss=loss_value, trained_tokens=num_tokens, gradient_norm=norm,
                skipped_updates=int(not is_finite), kl=kl, clip_fraction=clip_fraction, entropy=entropy,
                ratio_max=ratio_max, gap=gap, gap_max=gap_max)


def update_value(critic, optimizer, batch, args):
    """One step of the value model on one mini-batch -> its figures."""
    num_tokens = torch.tensor(packing.count_targets(batch.value_rows), device=critic.device)
    num_tokens, total = int(parallel.add_up(num_tokens)), torch.zeros((), device=critic.device)
    for rows in batch.value_rows:
        loss = value.value_loss(
            critic(rows), rows.targets.value_old, rows.targets.returns, num_tokens, args.value_clip)
        parallel.backward(loss, critic, rows is batch.value_rows[-1])
        total += loss.detach()
    _, is_finite = parallel.optimizer_step(critic, optimizer, args.max_grad_norm)
    return dict(value_loss=float(parallel.add_up(total)), skipped_updates=int(not is_finite))


# ----------------------------------------------------------------------------------------------------- 6 log


def finish_step(
        line, times, rollouts, kept, trainers, plan, tokenizer, dev_problems, reward, args, run, progress):
    """Drift, development accuracy, metrics, the check of the replay law, checkpoint.

    times: when the step began, when its rollouts had their rewards, when its updates were done.
    """
    step, model = line["step"], trainers.model
    line |= dict(rollout_seconds=times[1] - times[0], update_seconds=times[2] - times[1])
    if "kl" in line:  # else the policy has not moved
        line |= drift(model, sample(rollouts, model), plan, args)
    if dev_problems and args.eval_every and step % args.eval_every == 0:
        found = eval_math.evaluate(
            model, tokenizer, dev_problems, seed=args.seed, reward=reward, **runs.decoding_settings(args))
        line |= {f"dev_{name}": found[name] for name in ("accuracy", "reward") if found.get(name) is not None}
    run.write(line)
    parallel.say(show.describe_line(line))
    show.warn(line, progress)
    show.check_gap(line, args, progress)
    progress.update(step=step, gap_max=max(progress["gap_max"], line["gap_max"]))
    if step == args.steps or (args.save_every and step % args.save_every == 0):
        # A value model is saved beside the policy, in value/.
        save_more = trainers.critic and functools.partial(checkpoints.save_value_model, trainers.critic)
        run.save(tokenizer, trainers.pairs(), progress, args.keep_checkpoints, save_more)
        # Where nothing was learnt (all rewards equal), an earlier page, with right and wrong responses side
        # by side, shows more. (Ratios are there for this process's own share only.)
        path = os.path.join(run.folder, "trace.html")
        if run.is_writer and (kept or not os.path.exists(path)):
            with runs.writing(path):
                K = 0 if model.config.is_full else plan.block_sizes[0]
                show.write_page(show.best_and_worst(kept or rollouts)[:8], K, tokenizer, path, step)


def self_check(model, args):
    """The replay law on a few random prompts, before the first RL step, with the kernels of this run."""
    started, rng, config = time.perf_counter(), random.Random(args.seed), model.config
    K = args.rollout_block_size or config.block_size
    # K = 4 divides 64, not 5, 9 and 30: only these show blocks that are cut in a wrong place.
    prompts = [[rng.randrange(config.vocab_size) for _ in range(n)] for n in (5, 9, 30, 64)]
    settings = runs.decoding_settings(args) | dict(max_new_tokens=min(4 * K, args.max_new_tokens))
    rollouts = rollout.generate_everywhere(model, prompts, [*range(4)], block_size=K, **settings)
    # On a GPU both ways to lay out rows, with their kernels: packed, and one padded row each.
    for is_packed in {False, model.device.type == "cuda"}:
        figures = rollout.replay_gap(
            model, rollouts, K, args.temperature, args.tokens_per_micro_batch, is_packed)
        show.check_gap(figures, args, {})  # in bfloat16 this warns, and training steps decide
    parallel.say(f"self-check: replayed and recorded log-probabilities differ by {figures['gap']:.1e} "
                 f"({time.perf_counter() - started:.1f} s)")


# ------------------------------------------------------------------------------------------------------------
# Set-up. The method ends here.


TINY = dict(  # defaults of the tiny model
    train_data="arithmetic", steps=45, prompts=32,
    minibatches=2, lr=1e-4, adapt_lr=1e-3, warmup=10, value_lr=4e-3, value_warmup=10, value_epochs=4,
    value_clip=None, max_new_tokens=20, slots=64, eval_every=20, save_every=20,
    tokens_per_micro_batch=4096, dtype="float32", gradient_checkpointing=False)
# Defaults with --model: the paper's for SDAR, for billions of parameters. Ours: one update per RL step (the
# authors' code makes several), beta2 = 0.95 of AdamW (theirs: 0.999), the value model's head start of 5 steps
# (theirs: none), adapt_lr.
REAL = dict(
    steps=80, prompts=64, minibatches=1, adapt_lr=1e-5, warmup=0, value_lr=5e-6, value_warmup=5,
    value_epochs=1, value_clip=0.2, max_new_tokens=2000, eval_every=10, save_every=20,
    gradient_checkpointing=True,
    dtype="bfloat16" if torch.cuda.is_available() else "float32")


def parse_args(argv=None):
    """The flags of tracerl.py."""
    parser = runs.make_parser(
        "TraceRL: reinforcement learning of a diffusion language model on its traces.",
        "The defaults with --model suit billions of parameters. For a model as small as the embedded one: "
        + " ".join(f"--{name} {TINY[name]}" for name in (
            "lr", "warmup", "minibatches", "value_lr", "value_epochs", "max_new_tokens")))
    flag = parser.add_argument_group("most used").add_argument
    flag("--model", help="checkpoint folder or hub id; without it, a tiny model is made and warm-started")
    flag("--train_data", help="problems to train on: embedded arithmetic or sudoku, a file (JSON lines, "
         "JSON, parquet), gsm8k-train, math500, gsm8k, aime2024, or a hub id")
    flag("--dev_data", help="problems for --eval_every; test problems never guide a run")
    flag("--eval_data", help="test problems, scored before and after training only")
    flag("--steps", type=runs.positive_int, help="RL steps")
    flag("--prompts", type=runs.positive_int, help="prompts per step")
    flag("--group_size", type=runs.positive_int, default=16, help="G, responses per prompt")
    flag("--lr", type=runs.positive, help="learning rate of AdamW; None, with --model: 1e-6 (paper), and "
         "1e-5 with --lora_rank: adapters want about ten times as much")
    flag("--attention", choices=("block", "full"),
         help="of the tiny model (None: block), or of a checkpoint that leaves it open (a2d-qwen3)")
    flag("--block_size", type=runs.positive_int, help="K; None is the checkpoint's own, 4 for the tiny model")
    flag = parser.add_argument_group("method: each a built-in name, or file.py:function").add_argument
    flag("--reward", default="math",
         help="math: 1 if the boxed answer is right (accuracy is measured so, whatever this is)")
    flag("--advantage", default="group", help="group: standard score in the group; value: value model with "
         "GAE; batch: minus the mean of the step; raw: the reward")
    flag("--loss", default="clip", help="clip: the clipped policy gradient with a KL")
    flag("--views", default="trace",
         help="trace, or the baselines' random masks: random, coupled (with complement)")
    flag = parser.add_argument_group("policy").add_argument
    flag("--shrink", type=runs.positive_int, help="s, denoising steps merged into one trace step; None is 1, "
         "and 8 for full attention with --model (the tiny task has too few steps for that)")
    flag("--clip_eps", type=runs.not_negative, default=0.2,
         help="epsilon: ratios are clipped to 1 - eps .. 1 + eps")
    flag("--kl_coef", type=runs.not_negative, default=0.01,
         help="beta: weight of the KL to the policy of the rollout")
    flag("--minibatches", type=runs.positive_int, help="updates per pass over the rollouts of a step")
    flag("--epochs", type=runs.positive_int, default=1, help="passes over the rollouts of a step")
    flag("--warmup", type=runs.count, help="RL steps of rising learning rate, from the policy's first")
    flag("--max_grad_norm", type=runs.positive, default=1.0, help="bound on the gradient norm")
    flag("--keep_range", type=float, nargs=2, metavar=("LOW", "HIGH"), help="of group advantages: "
         "mean rewards of groups to keep. None is all unequal ones; with --model and the math reward 0.2 0.8")
    flag("--importance", choices=("none", "truncated"), default="none", help="truncated: weight each token "
         "by min(pi_old / recorded, 2), for bfloat16, where decoding and training round differently")
    flag("--max_gap", type=runs.positive,
         help="bound on the mean gap of the replay law, in nats; None is 1e-4, and 0.05 in bfloat16")
    flag("--post_num", type=runs.count, default=0,
         help="tokens after eos, in its block, that are trained as well")
    flag("--rollout_block_size", type=runs.positive_int, help="for --adapt_steps steps, roll out in "
         "these smaller blocks and imitate right responses in both sizes")
    flag("--adapt_steps", type=runs.count, default=45, help="steps with --rollout_block_size, of --steps")
    flag("--adapt_lr", type=runs.positive, help="learning rate of these steps")
    flag = parser.add_argument_group("value model").add_argument
    flag("--value_lr", type=runs.positive, help="learning rate")
    flag("--value_warmup", type=runs.count, help="RL steps that train the value model only")
    flag("--value_epochs", type=runs.positive_int, help="passes over the rollouts of a step")
    flag("--value_clip", type=runs.positive,
         help="bound on a value's change in its loss; None is none (the paper: 0.2)")
    flag("--gamma", type=runs.share, default=1.0, help="discount per trace step")
    flag("--gae_lambda", type=runs.share, default=1.0, help="lambda of GAE")
    runs.add_decoding_flags(parser, rollout.CACHES)
    parser.add_argument("--strategy", choices=rollout.STRATEGIES, default="dynamic",
                        help="what a denoising step reveals")
    runs.add_prompt_flags(parser, eval_math.PROMPT_STYLES, eval_math.INSTRUCTION)
    runs.add_training_flags(parser, "tracerl")
    parser.add_argument("--eval_every", type=runs.count,
                        help="RL steps between evaluations on --dev_data; 0 is never")
    args = runs.parse(parser, argv, TINY, REAL)
    if args.train_data in eval_math.EMBEDDED:
        args.dev_data = args.dev_data or f"{args.train_data}-dev"
        args.eval_data = args.eval_data or f"{args.train_data}-test"
    # Adapters start at zero and are scaled: a learning rate for all weights hardly moves them.
    if args.lr is None:
        args.lr = 1e-5 if args.lora_rank else 1e-6
    if args.keep_range is None and args.model is not None and args.reward == "math":
        args.keep_range = [0.2, 0.8]
    check_args(args, parser)
    return args


def check_args(args, parser):
    """What no flag's type can see."""
    if args.train_data is None or args.eval_data is None:
        parser.error("--model needs --train_data and --eval_data")
    # Evaluation may be greedy; training may not.
    if args.temperature == 0 or args.top_k == 1:
        parser.error("--temperature 0 and --top_k 1 are greedy: the same response G times teaches nothing")
    if args.advantage == "value" and args.rollout_block_size is not None:
        parser.error("--rollout_block_size needs --advantage group: adapt first, then go on from the "
                     "checkpoint with --model and --advantage value")
    if args.advantage == "group" and args.group_size < 2:
        parser.error("--group_size must be at least 2: the advantage compares responses to one prompt")
    if args.keep_range is not None and args.keep_range[0] > args.keep_range[1]:
        parser.error(f"--keep_range takes two numbers in rising order, got {args.keep_range}")


def load_start(args):
    """The policy to start from, and the value model if there is one, by the flags -> Trainers, tokenizer."""
    saved = parallel.from_first(runs.checkpoints_of(os.path.join("runs", args.name)))
    # (Not with LoRA: a checkpoint holds merged weights, and the restored adapters would count twice.)
    if args.resume and saved and args.model is None and not args.lora_rank:
        path = saved[-1]  # its weights are about to be restored anyway
    else:
        smallest = args.rollout_block_size or args.block_size or 4
        task = args.train_data if args.train_data in eval_math.EMBEDDED else "arithmetic"
        path = args.model or sft.warm_start(args.seed, smallest, args.attention or "block", task)
    model, critic, tokenizer = checkpoints.load_to_train(
        path, args, value.ValueModel if args.advantage == "value" else None)
    # Which kernels decode, and whether they are exact.
    cuda.say_backend(model, args, args.dtype)
    if args.shrink is None:
        # as in the paper for Dream and LLaDA
        args.shrink = 8 if model.config.is_full and args.model is not None else 1
    if args.importance != "none" and (args.views, args.shrink, args.rollout_block_size) != ("trace", 1, None):
        raise ValueError("--importance truncated needs --views trace and --shrink 1, and no larger blocks: "
                         "else what was recorded is of other states than those that are trained")
    K, smallest = model.config.block_size, args.rollout_block_size or model.config.block_size
    if K % smallest or args.rollout_block_size == K:
        raise ValueError(f"--rollout_block_size {smallest} must divide the block size, {K}, and be smaller: "
                         "set --block_size")
    if args.rollout_block_size and not model.config.is_full:
        parallel.say(f"steps 1 to {args.adapt_steps} imitate right responses in blocks of {smallest} and "
                     f"{K}; TraceRL and its flags come after them")
        if args.adapt_steps >= args.steps:
            raise ValueError(f"--adapt_steps {args.adapt_steps} leaves nothing of --steps {args.steps}: "
                             "raise --steps")
    # Optimizer states live as long as the run: with moments thrown away every step, each step of AdamW would
    # be its first, which uses little but the sign of the gradient.
    optimizer, critic_optimizer = parallel.make_optimizer(model, args.lr, (0.9, 0.95)), None
    if critic is not None:
        # a long memory: once failures are rare, one of them must not throw the value model off its path
        critic_optimizer = parallel.make_optimizer(critic, args.value_lr, (0.9, 0.999))
    return Trainers(model, optimizer, critic, critic_optimizer), tokenizer


def main(argv=None):
    """Everything from the flags to the table at the end -> the content of summary.json."""
    args, started = parse_args(argv), time.perf_counter()
    reward = runs.load_function(args.reward, dict(math=math_reward), "--reward")
    flags_plan = Plan(runs.load_function(args.advantage, ADVANTAGES, "--advantage"),
                 runs.load_function(args.loss, LOSSES, "--loss"),
                 runs.load_function(args.views, rollout.VIEWS, "--views"))
    parallel.start_processes(args.device, args.model is None, args.dtype == "bfloat16")
    with runs.Run(args.name, vars(args), args.resume, args.overwrite) as run:  # a taken name is said at once
        trainers, tokenizer = load_start(args)
        model = trainers.model
        if not args.no_self_check:
            self_check(model, args)
        load = functools.partial(
            eval_math.load_prompts, tokenizer=tokenizer, args=args, needs_answer=args.reward == "math")
        problems, test_problems = load(args.train_data), load(args.eval_data)
        dev_problems = load(args.dev_data) if args.dev_data and args.eval_every else []
        # Before and after: the same problems, the same draws.
        evaluate = functools.partial(eval_math.evaluate_all, model, tokenizer, test_problems, reward, args)
        # A resumed run has its "before" from the first time.
        run.begin()
        progress = run.restore(trainers.pairs()) if args.resume else None
        if progress is not None:
            parallel.say(f"resuming {run.folder} after step {progress['step']}")
        progress = progress or dict(step=0, gap_max=0.0, before=evaluate())
        progress = train(trainers, reward, flags_plan, tokenizer, problems, dev_problems, args, run, progress)
        summary = dict(before=progress["before"], after=evaluate(), seconds=time.perf_counter() - started,
                       replay_gap_max=progress["gap_max"], seed=args.seed)
        run.finish(summary)
    show.print_table(summary["before"], summary["after"], len(test_problems))
    since, files = " since --resume" * args.resume, ", ".join(run.files())
    parallel.say(f"{summary['seconds']:.0f} seconds{since}; the run is in {run.folder}: {files}")
    parallel.barrier()  # a process that left early would break the others' connections
    parallel.end_processes()
    return summary


if __name__ == "__main__":
    runs.run_command(main)
