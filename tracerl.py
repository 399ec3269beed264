"""tracerl.py - the method: reinforcement learning on the trace by which a diffusion language model decoded.

TraceRL (arXiv 2509.06949) is PPO or GRPO with one question answered. What is the log-probability of a text
that was not written from left to right? TraceRL scores every token in the state in which it was revealed, and
takes the sum. (rollout.py says why this is a surrogate.)

One RL step has six stages. `train` calls them in this order, and the README numbers them in the same way:

  1 roll out    G responses to each prompt, with the trace of every one            roll_out
  2 reward      1 if the boxed answer is right and the response has ended, else 0  eval_math.give_rewards
  3 advantage   how much better than the other responses to the same prompt,       give_advantages
                or than the value model expected
  4 old logp    replay some rollouts to measure the gap. Compute the old            old_logprobs
                log-probabilities of all batches but the first
  5 update      clipped policy gradient on the states of the trace                 learn, update, policy_loss
  6 finish      log, evaluate, save                                                finish_step

An *RL step* is these six stages. An *update* is one step of the optimizer. An RL step makes at most
--minibatches times --epochs updates of the policy. The value model makes updates of its own.

    torchrun tracerl.py                           # a laptop: the tiny model in assets/, additions
    torchrun tracerl.py --plain                   # the same by the definitions alone, without any fast twin
    torchrun --nproc_per_node=8 tracerl.py --model JetLM/SDAR-8B-Chat --train_data gsm8k-train \
        --eval_data math500

Read in this order: group_advantages, policy_loss, train, and then the stages. FORK HERE, in a docstring,
marks what a paper can replace by a function in a file of its own.

Left out:
  1. a frozen reference model. Here the KL is to the policy that made the rollout (examples/ has the other);
  2. rollouts from earlier RL steps, and a second inference engine. Here the weights that train also decode;
  3. reward models.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch

import rollout
import value
from eval_math import Examinee, give_rewards, load_prompts, math_reward
from plumbing import flags, machine, packing, parallel, runs, show
from plumbing.flags import Settings, setting
from plumbing.prompts import Prompting
from plumbing.tasks import EMBEDDED
from rollout import Decoding, mix

# ------------------------------------------------------------------------------------------------------------
# The maths: pure functions of tensors.


def group_advantages(rewards):
    """Standard scores within each group: A = (r - mean) / std, 0 where all rewards are equal.

    rewards: float (groups, G). Of 1 0 0 0 the mean is .25 and the std .433, so A = 1.73 -.58 -.58 -.58. Every
    token of a response has the same A.

    FORK HERE. --advantage file.py:function calls a function of yours. It declares those parameters it needs:
        rewards    float (groups, G)
        rollouts   the records, group by group: step_map, confidence, logp, ... of every response
    It gives one number per response, (groups, G). Or it gives one per token, (groups, G, longest), where
    longest is the largest len(r.response). That counts tokens behind eos, too. A group of zeros is left out
    of the update.
    """
    mean = rewards.mean(-1, keepdim=True)  # (groups, 1)
    std = rewards.std(-1, unbiased=False, keepdim=True)  # divides by G, as the authors do, not by G - 1
    # If all rewards are equal, std is 0, up to rounding. It is then replaced by inf, so A is 0.
    return (rewards - mean) / std.masked_fill(std < 1e-6 * (1 + mean.abs()), torch.inf)


ADVANTAGES = dict(group=group_advantages, value=None)  # --advantage; value: see value.value_advantages


def policy_loss(logp, targets, num_tokens, clip_eps, kl_coef):
    """The clipped policy gradient of PPO with a KL penalty.

        L = 1/N sum_j [ -min(ratio_j A_j, clip(ratio_j, 1 - eps, 1 + eps) A_j) + kl_coef k3_j ]

    with ratio_j = exp(logp_j - logp_old_j). logp: float32 (n,), the targets of one micro-batch under the
    policy that is trained. num_tokens: N, the targets of the WHOLE update, over all micro-batches and
    processes. With this divisor losses and gradients simply add, however the update was split.

    All trained tokens weigh the same. The paper first averages inside each trace step: see examples/forks.py.
    In the first update of an RL step every ratio is 1, so nothing is clipped and k3 is 0.

    k3 = (ratio - 1) - log ratio is never negative. It estimates KL(old || new). For plain draws from the OLD
    policy, the mean of -log ratio is this KL. ratio - 1 then has mean 0, and only lowers the noise. Our
    tokens are not plain draws, since revealing prefers sure tokens. So k3 is an approximation.

    FORK HERE. --loss file.py:function calls a function of yours for each micro-batch. It declares those
    parameters it needs. Besides the parameters of this function, there are
        entropy          float32 (n,), with gradient: of the policy, at each target
        num_responses    of the whole update
        num_groups       groups of the whole update
        rl_step          the RL step, from 1 up: for coefficients that change during a run
    A response stays in one micro-batch if it fits. If your loss declares num_groups, this holds for a whole
    group. With block attention a response is one row. A row is never cut: one that is longer than a
    micro-batch gets a micro-batch of its own. With full attention a response has many rows. If they do not
    fit together, they are spread over several micro-batches. No loss sees a whole update at once. targets is
    a model.Targets: it also holds step, view, group, rollout_index, logp, ...
    """
    # (n,) A ratio of e^10 is a collapse. Beyond it the loss is constant, and no ratio becomes inf.
    log_ratio = (logp - targets.logp_old).clamp(max=10)
    ratio = log_ratio.exp()
    clipped = ratio.clamp(1 - clip_eps, 1 + clip_eps)  # with eps .2: between .8 and 1.2
    # The smaller of the two. Once a ratio has left the range in the direction that its advantage asks for,
    # the gain is constant and its gradient 0. In the other direction a mistake may still be undone.
    gain = torch.minimum(ratio * targets.advantage, clipped * targets.advantage)
    k3 = ratio - 1 - log_ratio  # ratio 1.2: .2 - .182 = .018
    return (kl_coef * k3 - gain).sum() / num_tokens


LOSSES = dict(clip=policy_loss)  # --loss


# ------------------------------------------------------------------------------------------------------------
# What the loop works with.


@dataclass
class Recipe(Settings):
    """The numbers of the method.

    For real checkpoints the defaults are the paper's for SDAR, where it gives them. The head start of the
    value model is ours: neither the paper nor the authors' code has one. One update per RL step is ours,
    too. The paper does not say how many, and the authors' code makes several.
    """

    seed: int = setting(0, "random seed of prompts, rollouts and views")
    steps: int = setting(80, "number of RL steps", tiny=45, low=1, may_change=True)
    prompts: int = setting(64, "prompts per RL step", tiny=32, low=1)
    group_size: int = setting(16, "G, responses per prompt", low=1)
    lr: float = setting(None, "learning rate; None: 1e-6, or 1e-5 with --lora_rank", tiny=1e-4, above=0)
    warmup: int = setting(0, "RL steps in which the learning rate rises to --lr", tiny=10, low=0)
    minibatches: int = setting(1, "updates per pass over the rollouts of an RL step", tiny=2, low=1)
    epochs: int = setting(1, "passes over the rollouts of an RL step", low=1)
    shrink: int = setting(None, "denoising steps per trace step; None: 1, full attention 8", tiny=1, low=1)
    clip_eps: float = setting(0.2, "epsilon: ratios are clipped to 1 - epsilon .. 1 + epsilon", low=0)
    kl_coef: float = setting(0.01, "beta: weight of the KL to the policy that made the rollouts", low=0)
    keep_range: float = setting(None, "keep groups of a mean reward in this range; a value model keeps all. "
                                "None: 0.2, 0.8 for a real model with default reward and advantage", number=2)
    value_lr: float = setting(5e-6, "learning rate of the value model", tiny=4e-3, above=0)
    value_warmup: int = setting(5, "how many first RL steps train the value model alone", tiny=10, low=0)
    value_epochs: int = setting(1, "passes of the value model over the rollouts", tiny=4, low=1)
    value_clip: float = setting(0.2, "clip of a value's change in an RL step; 0: no clip", tiny=0, low=0)
    eval_every: int = setting(10, "RL steps between evaluations on --dev_data; 0: none", tiny=20, low=0,
                              may_change=True)
    max_gap: float = setting(None, "largest mean gap between replayed and recorded log-probabilities, in "
                             "nats; None: 1e-4, or 0.05 in bfloat16", above=0, may_change=True)


class Learners(NamedTuple):
    """What learns: the policy, and the value model if there is one. Each is a model with its optimizer."""

    policy: parallel.Learner
    value: parallel.Learner = None


class Method(NamedTuple):
    """The functions that make the method: what a fork replaces, and how numbers are computed."""

    reward: Callable  # the first four are --reward, --advantage, --loss, --views
    advantage: Callable
    loss: Callable
    views: Callable
    decoding: Decoding
    compute: rollout.Compute  # the definitions (--plain), or their fast twins
    law: rollout.ReplayLaw  # stops a run that does not replay what it sampled


class Task(NamedTuple):
    """The problems to train on, and the development problems on which the policy is evaluated at times."""

    tokenizer: object
    problems: list
    dev_problems: list = None  # for --eval_every
    examinee: Examinee = None  # evaluates the policy on them


def train(learners, method, task, recipe, run):
    """The RL steps, from where `run` stands to recipe.steps.

    All randomness is a function of (seed, step). So three things are the whole state of a run: weights,
    optimizer states, and the few numbers in run.progress. Every process runs this code on the same
    records, and computes a part of the forwards and backwards. RuntimeError when the replay law is broken.
    """
    for step in run.steps(recipe.steps, "tracerl"):
        rollouts, asked = roll_out(learners.policy.model, task.problems, method, recipe, step)  # 1
        give_rewards(rollouts, asked, task.tokenizer, method.reward)  # 2
        kept, line = give_advantages(rollouts, learners.value, method, recipe)  # 3
        batches, gap = old_logprobs(learners, rollouts, kept, method, recipe, step)  # 4
        learnt = learn(learners, batches, rollouts, method, recipe, step)  # 5
        finish_step(dict(step=step) | line | gap | learnt, rollouts, learners, task, recipe, run)  # 6


# ------------------------------------------------------------------------------------------------ 1 roll out


@runs.timed("rollout_seconds")
def roll_out(model, problems, method, recipe, step):
    """G responses to each of this step's prompts -> rollouts, group by group, and the problem of each."""
    # Prompts follow from (seed, step): a resumed run asks what the uninterrupted one would have asked.
    chosen = []
    for i in range((step - 1) * recipe.prompts, step * recipe.prompts):
        epoch, place = divmod(i, len(problems))  # every pass over the data has an order of its own
        chosen.append(problems[parallel.shuffled(len(problems), mix(recipe.seed, epoch))[place]])
    # G times each prompt, side by side: [p0 p0 p0 p0 p1 p1 p1 p1 ...]
    asked = [problem for problem in chosen for _ in range(recipe.group_size)]
    seeds = [mix(recipe.seed, step, i) for i in range(len(asked))]  # each response has draws of its own
    # The weights that train are those that decode: there is no second engine that could lag behind.
    rollouts = rollout.generate_everywhere(
        model, [problem.tokens for problem in asked], seeds, method.decoding, method.compute)
    for i, r in enumerate(rollouts):
        r.rl_step = step
        r.group = i // recipe.group_size  # 0 0 0 0 1 1 1 1 ...
    return rollouts, asked


# ----------------------------------------------------------------------------------------------- 3 advantage


@runs.timed("update_seconds")
def give_advantages(rollouts, value_learner, method, recipe):
    """Sets the advantage of every rollout -> those to train on (maybe none), and numbers for the log.

    Left out are groups whose advantages are all 0 or rounding (equal rewards), and those whose mean reward is
    outside --keep_range. (With a value model every group is kept.) Whole records are kept or dropped. If
    lists of prompts, rewards and step maps were filtered one by one, a response might get its neighbour's
    reward.
    """
    # The flat list as a table: a line per prompt. With G = 4, responses 0 to 3 are line 0, and 4 to 7 line 1.
    rewards = torch.tensor([r.reward for r in rollouts]).view(-1, recipe.group_size)
    if value_learner is not None:
        # Here every group can teach. Even if all its rewards are equal, the value model may have expected
        # others.
        found = value.value_advantages(value_learner.model, rollouts, method.compute, recipe.shrink)
        return rollouts, found | dict(kept_groups=len(rewards))
    if method.advantage in ADVANTAGES.values() and any(r.token_rewards for r in rollouts):
        raise ValueError("the reward function gives a reward per token, and this --advantage takes one per "
                         "response: use --advantage value, one of your own, or a reward that is their sum")
    # A function of yours may draw at random: all processes take what the first one got.
    given = flags.call(method.advantage, rewards=rewards.clone(), rollouts=rollouts)
    advantages = parallel.from_first(torch.as_tensor(given, dtype=torch.float32).cpu())
    longest = max(len(r.response) for r in rollouts)
    if advantages.shape not in (rewards.shape, (*rewards.shape, longest)) or not advantages.isfinite().all():
        raise ValueError(f"--advantage gives NaN, inf or a wrong shape: {tuple(advantages.shape)}. It must "
                         f"give {tuple(rewards.shape)} or {(*rewards.shape, longest)} finite numbers")
    # If no group is left there is no update. The step is logged, and the next one asks other prompts.
    # If all rewards of a group are equal, advantages may be their rounding, and teach nothing, either.
    rounding = 1e-6 * (1 + rewards.abs().amax(-1)) * (rewards.amax(-1) == rewards.amin(-1))
    is_kept = advantages.abs().flatten(1).amax(-1) > rounding  # (groups,)
    low, high = recipe.keep_range or (-torch.inf, torch.inf)  # too easy or too hard problems teach little
    is_kept &= (rewards.mean(-1) >= low) & (rewards.mean(-1) <= high)
    is_kept = parallel.from_first(is_kept)  # another kind of CPU may round another way
    for r, numbers in zip(rollouts, advantages.flatten(0, 1)):
        r.advantage = numbers.expand(longest)[:len(r.response)].tolist()  # one number stands for all tokens
    kept = [r for r, keep in zip(rollouts, is_kept.repeat_interleave(recipe.group_size).tolist()) if keep]
    return kept, dict(kept_groups=int(is_kept.sum()))


# ------------------------------------------------------------------------------------------------ 4 old logp
#
# One process and eight make the same update up to rounding, because
#   1. a random number depends on its response's seed, denoising step and position, and on nothing else;
#   2. every process holds all records of a step, and chooses from them by the same seeded rules;
#   3. only forwards and backwards are dealt out, and each loss is a part of one sum, divided beforehand by
#      the tokens of the WHOLE update.


class Batch(NamedTuple):
    """What one update reads: this process's micro-batches, and what is counted over all processes."""

    rows: list  # micro-batches (model.Rows) for the policy
    value_rows: list  # the same for the value model: always of the trace; [] without one
    num_tokens: int  # N of the loss: targets of `rows` over all processes
    num_value_tokens: int
    num_responses: int
    num_groups: int
    rl_step: int


@torch.no_grad()
@runs.timed("update_seconds")
def old_logprobs(learners, rollouts, kept, method, recipe, step):
    """Measures the gap, and lays the kept rollouts out as rows -> batches, and the gap.

    Each batch makes one update per epoch. RuntimeError if the replay law is broken. Groups are shuffled, and
    dealt whole to at most --minibatches batches. Then Targets.logp_old of all batches but the first is
    computed. The first one needs no pass of its own: its update begins at the old policy, see `update`. With
    one view per denoising step, the recorded log-probabilities would be good enough as old ones. But where
    --shrink merges steps, or views are not of the trace, a token is predicted in another state. And in
    bfloat16, or on a GPU, decoding and training round differently.
    """
    model = learners.policy.model
    temperature = method.decoding.temperature
    # First the replay law. If the gap is too large, a float32 run ends here, before the updates of this step.
    # A bfloat16 run ends at the third such step in a row.
    gap = rollout.replay_gap(model, rollout.probes(rollouts, model.config), method.compute, temperature)
    method.law.enforce(**gap)
    # Groups were kept or dropped as a whole. So with G = 4, each group is the next four rollouts.
    groups = [kept[start:start + recipe.group_size] for start in range(0, len(kept), recipe.group_size)]
    # Groups stay whole, so that an update has positive and negative advantages. The order is seeded. Of
    # five groups, the first of two updates takes the 1st, 3rd and 5th in this order, the second the others.
    groups = [groups[i] for i in parallel.shuffled(len(groups), mix(recipe.seed, step))]
    batches = [make_batch(learners, groups[start::recipe.minibatches], method, recipe, step)
               for start in range(min(recipe.minibatches, len(groups)))]
    # Later updates start from a policy that has moved. So the old log-probabilities of their tokens are
    # computed now. (While the value model learns alone, the policy has no updates.)
    for batch in batches[1:] if step > head_start(learners, recipe) else []:
        for rows in batch.rows:
            logp, _ = rollout.forward_rows(model, rows, method.compute, temperature)
            rows.targets.logp_old.copy_(logp)
    return batches, gap


def make_batch(learners, groups, method, recipe, step):
    """The micro-batches of one update: its responses are dealt out to processes, and laid out as rows."""
    model = learners.policy.model
    is_whole = flags.declares(method.loss, "num_groups")
    units = groups if is_whole else [[r] for group in groups for r in group]
    size = recipe.group_size if is_whole else 1  # of a unit
    # Dealt like cards, the longest first: then every process has about the same work. (The rest of the key
    # breaks ties. Equal responses keep their seeded order.)
    units.sort(key=lambda unit: (-sum(len(r.response) for r in unit), unit[0].prompt, unit[0].response))
    # Item i goes to process i modulo the number of processes.
    own = [r for unit in parallel.deal(units) for r in unit]
    rows, num_tokens = micro_batches_of(own, size, model, method.views, method, recipe)
    value_rows = []
    num_value_tokens = 0
    if learners.value is not None:
        value_rows, num_value_tokens = micro_batches_of(
            own, size, model, rollout.trace_views, method, recipe)
    return Batch(rows, value_rows, num_tokens, num_value_tokens, sum(map(len, groups)), len(groups), step)


def micro_batches_of(rollouts, size, model, views, method, recipe):
    """Micro-batches of this process's rollouts, and the number of targets of all processes.

    size: how many neighbours should stay in one micro-batch: 1, or G if groups stay whole.
    """
    rows_of_each = rollout.build_rows(rollouts, model.config, views, recipe.shrink, trained_only=True)
    return packing.dealt_batches(rows_of_each, method.compute, model, method.loss, size)


# -------------------------------------------------------------------------------------------------- 5 update


@runs.timed("update_seconds")
def learn(learners, batches, rollouts, method, recipe, step):
    """The value model's updates, then the policy's: every batch once per epoch -> numbers for the log.

    The policy waits while the value model has its head start. Then the policy's learning rate rises for
    --warmup RL steps. At the end the drift is measured.
    """
    policy = learners.policy
    value_updates = []
    updates = []
    if learners.value is not None:
        for batch in batches * recipe.value_epochs:
            value_updates.append(update_value(learners.value, batch, method.compute, recipe))
    # A value model that has only begun is a poor baseline. So the policy waits for it.
    num_steps = step - head_start(learners, recipe)  # RL steps of the policy, this one included
    if num_steps > 0:
        ramp = min(1.0, num_steps / max(recipe.warmup, 1))
        parallel.set_learning_rate(policy.optimizer, recipe.lr * ramp)
        # Random views may leave a batch without any target.
        for number, batch in enumerate([batch for batch in batches if batch.num_tokens] * recipe.epochs):
            updates.append(update(policy, batch, method, number == 0, recipe))
    line = show.step_numbers(updates, value_updates)  # {} if there was no update
    if updates:
        line |= rollout.drift(policy.model, rollout.probes(rollouts, policy.model.config), method.compute,
                              method.decoding.temperature)
    return line


def head_start(learners, recipe):
    """RL steps in which the value model learns alone."""
    return recipe.value_warmup if learners.value is not None else 0


def update(policy, batch, method, is_first, recipe):
    """One optimizer step of the policy -> its numbers for the log.

    is_first: no update has come before in this RL step. So the old policy is the present one, and its
    log-probabilities are those of this very forward. They stay in targets.logp_old for later epochs.
    """
    parts = []  # of the micro-batches, for the log
    for rows in batch.rows:
        # One forward of [clean text | view | view | ...], and log-probabilities of its targets only.
        logp, entropy = rollout.forward_rows(policy.model, rows, method.compute, method.decoding.temperature)
        if is_first:  # the ratio is then exactly 1, and its gradient is that of log p
            rows.targets.logp_old.copy_(logp.detach())
        if len(logp):
            loss = flags.call(
                method.loss, logp=logp, entropy=entropy, targets=rows.targets, num_tokens=batch.num_tokens,
                num_responses=batch.num_responses, num_groups=batch.num_groups, rl_step=batch.rl_step,
                clip_eps=recipe.clip_eps, kl_coef=recipe.kl_coef)
            if getattr(loss, "shape", None) != () or not loss.requires_grad:
                raise ValueError(f"--loss gives {loss!r:.200}, and must give one number with a gradient")
        else:
            # A dummy micro-batch: its loss is 0. Its backward must run, because other processes wait for it.
            loss = logp.sum()
        # Losses of micro-batches are parts of one sum: each was divided by the tokens of the whole update. So
        # their gradients add up to that of the update.
        loss.backward()
        parts.append([numbers.detach() for numbers in (loss, logp, entropy, rows.targets.logp_old)])
    # A gradient with NaN or inf: the update is skipped, counted and reported.
    stepped = parallel.optimizer_step(policy)
    return show.own_sums(parts, batch.num_tokens, recipe.clip_eps) | stepped


def update_value(learner, batch, compute, recipe):
    """One optimizer step of the value model -> its numbers for the log."""
    model = learner.model
    total = torch.zeros((), device=model.device)
    for rows in batch.value_rows:
        # The values of the targets, at the outputs at which the policy predicts them.
        loss = value.value_loss(model(rows, compute), rows.targets.value_old, rows.targets.returns,
                                batch.num_value_tokens, recipe.value_clip)
        loss.backward()
        total += loss.detach()
    stepped = parallel.optimizer_step(learner)
    return dict(value_loss=float(total)) | stepped


# -------------------------------------------------------------------------------------------------- 6 finish


def finish_step(line, rollouts, learners, task, recipe, run):
    """Writes `line` (the numbers of this RL step) to the log. In some steps it evaluates and saves, too."""
    step = line["step"]
    # The seconds that the timed stages took go into the line, too: metrics.jsonl has one line for each RL
    # step.
    line |= show.rollout_numbers(rollouts) | runs.take_seconds()
    if task.dev_problems and recipe.eval_every and step % recipe.eval_every == 0:
        found = task.examinee.evaluate(task.dev_problems, seed=recipe.seed)
        line |= {f"dev_{name}": found[name] for name in ("accuracy", "reward") if found.get(name) is not None}
    run.write(line)
    show.say_step(line)  # with a warning if the policy moves too far
    run.progress["gap_max"] = max(run.progress.get("gap_max", 0.0), line["gap_max"])
    save_every = run.settings["save_every"]
    if step == recipe.steps or (save_every and step % save_every == 0):
        run.save(learners)
        show.write_trace(run, rollouts, learners.policy.model.config, task.tokenizer)


# ------------------------------------------------------------------------------------------------------------
# Set-up. The method ends here.


@dataclass
class Choice:
    """Model, data and functions of a run. The last four are a built-in name, or file.py:function."""

    model: str = setting(None, "checkpoint folder or hub id; None: the tiny model in assets/")
    train_data: str = setting(None, "arithmetic, sudoku, gsm8k-train, a file, or a hub id", tiny="arithmetic")
    dev_data: str = setting(None, "problems for --eval_every; arithmetic and sudoku have their own")
    eval_data: str = setting(None, "problems of the tests before and after. Embedded tasks have their own")
    eval_limit: int = setting(200, "how many test problems; 0: all", tiny=0, low=0)
    eval_strategies: str = setting(None, "strategies for test problems. greedy: --strategy at T = 0. None: "
                                   "--strategy. Tiny models add dynamic, static and greedy", number="+")
    name: str = setting("tracerl", "name of the folder under runs/", may_change=True)
    reward: str = setting("math", "math: 1 if right and not truncated, else 0; or file.py:function")
    advantage: str = setting("group", "group: standard score; value: a value model; or file.py:function")
    loss: str = setting("clip", "clip: clipped policy gradient with a KL; or file.py:function")
    views: str = setting("trace", "trace; random, coupled: with random masks; or file.py:function")


GROUPS = {"choice": Choice, "recipe": Recipe, "decoding": Decoding, "prompts": Prompting,
          "machine": machine.Training, "run": runs.RunSettings}


def parse_args(argv=None):
    """The flags of tracerl.py."""
    is_tiny = machine.is_tiny(flags.peek(argv, "--model"))
    parser = flags.make_parser(
        f"TraceRL. These are the defaults for {'a tiny' if is_tiny else 'this'} model.", GROUPS, is_tiny)
    args = runs.parse(parser, GROUPS, argv)
    if args.train_data in EMBEDDED:
        args.dev_data = args.dev_data or f"{args.train_data}-dev"
        args.eval_data = args.eval_data or f"{args.train_data}-test"
    usual = ["dynamic", "static", "greedy"] if is_tiny else []
    args.eval_strategies = args.eval_strategies or list(dict.fromkeys([*usual, args.strategy]))
    if args.lr is None:  # adapters start at zero, and need about ten times that rate
        args.lr = 1e-5 if args.lora_rank else 1e-6
    if args.keep_range is None and (args.reward, args.advantage) == ("math", "group") and not is_tiny:
        args.keep_range = [0.2, 0.8]  # the authors' filter, for rewards from 0 to 1
    if args.train_data is None or args.eval_data is None:
        parser.error("--train_data and --eval_data are needed (arithmetic and sudoku need no --eval_data). "
                     f"Only tiny models have default data. --model is {args.model}: is it there?")
    # Evaluation may be greedy. Training may not.
    if args.temperature == 0 or args.top_k == 1:
        parser.error("--temperature 0 and --top_k 1 are greedy: the same response G times teaches nothing")
    if args.advantage == "group" and args.group_size < 2:
        parser.error("--group_size must be at least 2: the advantage compares responses to one prompt")
    return args


def load_start(args):
    """The policy to start from, and the value model if there is one -> Learners, tokenizer."""
    make_value = value.ValueModel if args.advantage == "value" else None
    model, value_model, tokenizer = machine.load_to_train(machine.start_path(args), args, make_value)
    # Optimizer states live as long as the run. If they were thrown away every step, each step of AdamW would
    # be its first, which uses little but the sign of the gradient.
    learners = Learners(parallel.make_learner(model, args.lr, (0.9, 0.95)))
    if value_model is not None:
        # beta2 0.999: AdamW's second moment remembers the large gradients of earlier failures for a long
        # time. So when failures have become rare, a single one does not move the value model far.
        learners = learners._replace(value=parallel.make_learner(value_model, args.value_lr, (0.9, 0.999)))
    return learners, tokenizer


def main(argv=None):
    """Everything from the flags to the table at the end -> the content of summary.json."""
    args = parse_args(argv)
    recipe, decoding, prompting = (flags.read_flags(group, args) for group in (Recipe, Decoding, Prompting))
    # What a fork replaces: found and imported before anything else, so that a wrong name is reported at once.
    functions = [flags.load_function(getattr(args, name), known, f"--{name}") for name, known in (
        ("reward", dict(math=math_reward)), ("advantage", ADVANTAGES), ("loss", LOSSES),
        ("views", rollout.VIEWS))]
    for name in args.eval_strategies:
        flags.load_function(name, dict(rollout.STRATEGIES, greedy=None), "--eval_strategies")
    machine.start(args)
    with runs.Run(args.name, vars(args), args.resume, GROUPS) as run:
        learners, run.tokenizer = load_start(args)
        model = learners.policy.model
        recipe.shrink = recipe.shrink or (8 if model.config.is_full else 1)
        law = rollout.ReplayLaw(args.dtype == "float32", decoding.temperature, recipe.max_gap)
        compute = machine.choose_compute(args, model, learners.value and learners.value.model)
        method = Method(*functions, decoding, compute, law)
        machine.self_check(model, method)  # the replay law on a few random prompts, before the first test
        load = functools.partial(
            load_prompts, tokenizer=run.tokenizer, prompting=prompting, needs_answer=args.reward == "math")
        examinee = Examinee(model, run.tokenizer, decoding, method.compute, method.reward)
        test = load(args.eval_data)[:args.eval_limit or None]
        dev = load(args.dev_data) if args.dev_data and args.eval_every else None
        task = Task(run.tokenizer, load(args.train_data), dev, examinee)
        # Before and after training: the same problems, and the same draws.
        evaluate_test = lambda: {name: examinee.evaluate(test, name, seed=args.seed) for name in parallel.bar(
            args.eval_strategies, "evaluate")}
        # Settings, model and data have passed their checks. From here on the folder is written to.
        show.announce(recipe, decoding, len(task.problems))
        run.begin(learners)
        run.check_data([task.problems, test], "the problems of --train_data or --eval_data")
        if "before" not in run.progress:  # a resumed run has it from the first time
            run.progress["before"] = evaluate_test()
        train(learners, method, task, recipe, run)
        summary = dict(before=run.progress["before"], after=evaluate_test(), seed=args.seed,
                       replay_gap_max=run.progress.get("gap_max", 0.0))
        run.finish(summary)
    show.print_table(summary["before"], summary["after"], len(test))
    parallel.say(f"the run is in {run.folder}")
    return summary


if __name__ == "__main__":
    runs.run_command(main)
