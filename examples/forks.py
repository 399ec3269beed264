"""examples/forks.py - published variants of the method, each as a function: examples to copy.

Every function declares the arguments that it needs, and is given them by name. The docstrings marked FORK
HERE in tracerl.py, rollout.py and eval_math.py list all that there are. Below are the flags of each variant.
(The other functions are helpers, or controls of the benches in tests/.)
F stands for examples/forks.py.

    TraceRL as the paper weighs it      --loss F:paper_weights
    DAPO, 2503.14476                    --loss F:clip_higher
    Dr. GRPO, 2503.20783                --advantage F:centered --loss F:constant_length
    GSPO, 2507.18071                    --loss F:sequence_ratio
    truncated importance sampling       --loss F:truncated_importance
    DiPO, 2512.22234                    --loss F:group_mean
    StableDRL, 2603.06743               --advantage F:centered --loss F:self_normalized
    EBPO, 2602.05165                    --advantage F:shrunk_baseline
    LightningRL, 2603.13319             --advantage F:accuracy_and_speed
    wd1, 2507.08838                     --advantage F:softmax_weights --loss F:ratio_free
    ESPO, 2512.03759                    --views F:elbo_views --loss F:elbo_ratio
    EBPO of LLaDA2.1, 2602.08676        --views F:elbo_views --loss F:block_elbo
    BGPO, 2510.11683                    --views F:elbo_views --loss F:linear_bound
    SPG, 2510.09541                     --views F:elbo_views --loss F:sandwiched --advantage F:centered
    GDPO, 2510.08554                    --views F:quadrature_views --loss F:quadrature_ratio
                                        --advantage F:centered
    d1 (diffu-GRPO), 2504.12216         --views F:fully_masked
    AGRPO, 2510.04019                   --views F:some_steps
    JustGRPO, 2601.15165                --strategy sequential

These are only the estimators. Other choices of a paper are left out: sampler, data, learning rate, a KL to a
frozen reference. Some losses need a whole response, or a whole group, in one micro-batch. For long responses,
raise --tokens_per_micro_batch until it fits.
"""

import torch

from rollout import random_views, trace_views
from sft import noise_views
from tracerl import group_advantages, policy_loss

DRAWS = 2  # random masks of each block, for the losses that estimate an ELBO


# ------------------------------------------------------------------------------------------------------------
# Helpers that several of them use.


def sum_by(key, values):
    """Sums of the values (n,) that have equal keys (n,): one sum per key, in rising order of the keys."""
    keys, place = key.unique(return_inverse=True)
    return torch.zeros(len(keys)).to(values).index_add(0, place, values)


def mean_by(key, values):
    """Means of the values (n,) that have equal keys (n,), in the same order."""
    return sum_by(key, values) / sum_by(key, torch.ones_like(values))


def gain(ratio, advantage, low, high):
    """PPO's objective, min(ratio A, clip(ratio, low, high) A). A loss is minus this."""
    return torch.minimum(ratio * advantage, ratio.clamp(low, high) * advantage)


# ------------------------------------------------------------------------------------------------------------
# Losses on the states of the trace.


def paper_weights(logp, targets, num_responses, clip_eps, kl_coef):
    """--loss: the objective of TraceRL as its paper writes it (arXiv 2509.06949).

    It takes the mean over the tokens of each trace step, and sums these means over the steps of a response.
    So every step weighs the same, however many tokens it revealed. A trace step is one view, and all its
    tokens stand in one row. So no micro-batch cuts a step in two, and this is exact.
    """
    step = targets.rollout_index * (targets.view.max() + 1) + targets.view  # one number for each trace step
    log_ratio = (logp - targets.logp_old).clamp(max=10)
    ratio = log_ratio.exp()
    k3 = ratio - 1 - log_ratio
    loss = kl_coef * k3 - gain(ratio, targets.advantage, 1 - clip_eps, 1 + clip_eps)
    return mean_by(step, loss).sum() / num_responses


def clip_higher(logp, targets, num_tokens, clip_eps):
    """--loss: the clip leaves more room upwards, so that rare tokens may become likelier. No KL (DAPO)."""
    ratio = (logp - targets.logp_old).exp()
    return -gain(ratio, targets.advantage, 1 - clip_eps, 1.28).sum() / num_tokens


def constant_length(logp, targets, num_responses, clip_eps):
    """--loss: the sum over a response is divided by a constant, 20, and not by its length (Dr. GRPO)."""
    ratio = (logp - targets.logp_old).exp()
    return -gain(ratio, targets.advantage, 1 - clip_eps, 1 + clip_eps).sum() / (num_responses * 20)


def sequence_ratio(logp, targets, num_responses, clip_eps):
    """--loss: one ratio per response, the geometric mean of its tokens' ratios (GSPO)."""
    ratio = mean_by(targets.rollout_index, logp - targets.logp_old).exp()
    advantage = mean_by(targets.rollout_index, targets.advantage)
    return -gain(ratio, advantage, 1 - clip_eps, 1 + clip_eps).sum() / num_responses


def truncated_importance(logp, targets, num_tokens, clip_eps, kl_coef):
    """--loss: each token's advantage times min(pi_old / pi_recorded, 2).

    Where decoding and training round differently, as in bfloat16 on a GPU, responses come from a slightly
    different policy than the one that is trained. This weight corrects for that (truncated importance
    sampling, as in Espeholt et al., arXiv 1802.01561). It needs --views trace and --shrink 1: other views are
    other states.
    """
    weight = (targets.logp_old - targets.logp).exp().clamp(max=2.0)
    weighed = targets._replace(advantage=targets.advantage * weight)
    return policy_loss(logp, weighed, num_tokens, clip_eps, kl_coef)


def group_mean(logp, targets, num_groups, clip_eps):
    """--loss: the mean over the tokens of a group, then the mean over groups (DiPO, of DiRL).

    The states are those of the trace, and the clip leaves more room upwards, as in their train/dapo.py. Left
    out: their KL to a frozen reference.
    """
    ratio = (logp - targets.logp_old).exp()
    gains = gain(ratio, targets.advantage, 1 - clip_eps, 1.28)
    return -mean_by(targets.group, gains).sum() / num_groups


def self_normalized(logp, targets, num_groups):
    """--loss: a weighted log-likelihood, in which the weights of a group sum to 1 (StableDRL).

    A group adds -sum_i w_i A_i log p_i over its responses, w_i = min(ratio_i, 5) / sum_k min(ratio_k, 5).
    Here ratio_i is the geometric mean over tokens, and log p_i is the mean. No gradient goes through w. A
    ratio is cut at 5 whatever the sign of A. The 5 and the means are those of the authors' code
    (github.com/JianyuanZhong/StableDRL). Left out: the bounds of SPG, which they use in place of log p.
    """
    response = targets.rollout_index
    ratio = mean_by(response, logp - targets.logp_old).exp()
    weight = ratio.detach().clamp(max=5.0)  # (responses,)
    _, group = mean_by(response, targets.group.double()).unique(return_inverse=True)
    weight = weight / sum_by(group, weight)[group]
    advantage = mean_by(response, targets.advantage)
    return -(weight * advantage * mean_by(response, logp)).sum() / num_groups


def ratio_free(logp, targets, num_tokens):
    """--loss for softmax_weights: a weighted log-likelihood, without a ratio (wd1)."""
    return -(targets.advantage * logp).sum() / num_tokens


# ------------------------------------------------------------------------------------------------------------
# Advantages.


def centered(rewards):
    """--advantage: the reward minus the group's mean, not divided by a standard deviation (Dr. GRPO)."""
    mean = rewards.mean(-1, keepdim=True)
    A = rewards - mean
    # If all rewards are equal, for example 85.3, rounding may make A 8e-6 instead of 0. AdamW would make a
    # whole step of that.
    return A.masked_fill(A.abs() < 1e-6 * (1 + mean.abs()), 0)


def minus_step_mean(rewards):
    """--advantage: the reward minus the mean over all responses of the RL step."""
    mean = rewards.mean()
    A = rewards - mean
    return A.masked_fill(A.abs() < 1e-6 * (1 + mean.abs()), 0)  # see centered


def raw(rewards):
    """--advantage: the reward itself. This is plain REINFORCE without a baseline."""
    return rewards


def mean_per_step(rewards, rollouts):
    """--advantage: A / (number of tokens in the denoising step), so that each step weighs the same.

    But the loss still divides by the number of all tokens, and its KL still weighs all tokens the same. See
    paper_weights.
    """
    out = torch.zeros(len(rollouts), max(len(r.response) for r in rollouts))
    for row, A, r in zip(out, group_advantages(rewards).flatten(), rollouts):
        steps = r.step_map[:r.num_tokens]
        row[:len(steps)] = A / torch.tensor([steps.count(step) for step in steps])
    return out.view(*rewards.shape, -1)


def shrunk_baseline(rewards):
    """--advantage: the baseline lies between the group's mean and the mean of all (EBPO, "empirical Bayes").

    baseline = (1 - pull) * (mean of the group) + pull * (mean of all), with pull = noise / (noise + spread).
    noise is (variance of all rewards) / G, and spread is the variance of the group means. The reward minus
    the baseline is then standardized over the RL step (mean 0, standard deviation 1). So a group in which all
    responses fail still has negative advantages, and is trained on. (--keep_range would drop it.) The paper
    keeps these statistics over all steps so far. Here they are those of one RL step.
    """
    means = rewards.mean(-1, keepdim=True)
    noise = rewards.var(unbiased=False) / rewards.shape[1]
    spread = means.var(unbiased=False)
    pull = noise / (noise + spread).clamp(min=1e-6)
    raw = rewards - ((1 - pull) * means + pull * rewards.mean())
    return (raw - raw.mean()) / raw.std(unbiased=False).clamp(min=1e-6)


def accuracy_and_speed(rewards, rollouts):
    """--advantage: the standard score of the reward plus that of the tokens per denoising step (LightningRL).

    Both scores are taken within the group. A group is left out if all its responses are wrong, or if their
    speeds differ by less than 0.01. The paper's loss also has a term for the likelihood of right responses.
    It is left out, since a loss is not given the rewards.
    """
    speed = torch.tensor([r.num_tokens / max(r.step_map) for r in rollouts]).view_as(rewards)
    is_kept = (rewards.amax(-1) > 0) & (speed.amax(-1) - speed.amin(-1) >= 0.01)
    return (group_advantages(rewards) + group_advantages(speed)) * is_kept[:, None]


def softmax_weights(rewards):
    """--advantage for ratio_free: the softmax of the centred rewards minus that of their negatives (wd1)."""
    A = centered(rewards)
    is_equal = (A.abs() < 1e-6).all(-1, keepdim=True)
    return (A.softmax(-1) - (-A).softmax(-1)).masked_fill(is_equal, 0.0)


# ------------------------------------------------------------------------------------------------------------
# Other states than those of the trace.


def fully_masked(block):
    """--views: the whole block (full attention: the response) is masked, and predicted at once (d1).

    Left out: the paper's masks in the prompt.
    """
    return [(block, block)]


def some_steps(rollout, block, shrink, rng):
    """--views: each trace step is kept with probability one half (AGRPO: a random subset of them)."""
    views = trace_views(rollout, block, shrink)
    return [view for view in views if rng.random() < 0.5]


def as_many_random(rollout, block, rng):
    """--views: random masks, one view for each denoising step, as the trace has with --shrink 1.

    So an update costs as much as that of the trace. (With full attention, the authors' baseline also draws
    many masks for each response, namely 35.)
    """
    steps = {rollout.step_map[j] for j in block}
    return [view for _ in steps for view in random_views(block, rng)]


# ------------------------------------------------------------------------------------------------------------
# Losses on a lower bound of the response's log-likelihood, the ELBO. In this section `mask` does not mean the
# token "?", but a random set of tokens of a block that are hidden together. t is the hidden fraction of the
# block. The ELBO is the expected sum of log p / t over the hidden tokens. The fewer tokens are hidden, the
# more each of them counts. If k of the c tokens of a block are hidden, t is k / c, and the sum of 1 / t over
# them is c. So over all blocks it is the length of the response, by which all losses below but block_elbo
# divide. (If the last block holds tokens behind eos, this is true there on average only.) The old and the new
# policy get the same masks.


def elbo_views(block, rng):
    """--views: DRAWS masks of each block. Each hides k of the c tokens of the block, k uniform in 1 to c."""
    return [view for _ in range(DRAWS) for view in noise_views(block, rng)]


def elbo_ratio(logp, targets, num_responses, clip_eps, kl_coef):
    """--loss: one ratio per response, exp((ELBO - ELBO_old) / length), and the KL estimate k2 (ESPO).

    The KL is k2 = (ELBO - ELBO_old)^2 / (2 length). Here it is the KL to the policy that made the rollouts.
    In the paper it is the KL to a frozen reference. Left out: complementary pairs of masks.
    """
    response = targets.rollout_index
    length = sum_by(response, 1 / targets.masked_share) / DRAWS
    difference = sum_by(response, (logp - targets.logp_old) / targets.masked_share) / DRAWS
    ratio = (difference / length).exp()
    gains = gain(ratio, mean_by(response, targets.advantage), 1 - clip_eps, 1 + clip_eps)
    k2 = difference ** 2 / (2 * length)
    return (kl_coef * k2 - gains).sum() / num_responses


def block_elbo(logp, targets, num_responses, clip_eps):
    """--loss: one ratio per response, exp(sum over masks and blocks of w (log p - log p_old)) (EBPO).

    This is equation 5 of the LLaDA2.1 report. The ratio is that of the whole response, and no mean over
    tokens is taken. The report does not say what the weights w are. Here they are those of the ELBO.
    """
    response = targets.rollout_index
    difference = sum_by(response, (logp - targets.logp_old) / targets.masked_share) / DRAWS
    ratio = difference.clamp(-10, 10).exp()
    gains = gain(ratio, mean_by(response, targets.advantage), 1 - clip_eps, 1 + clip_eps)
    return -gains.sum() / num_responses


def linear_bound(logp, targets, num_responses, clip_eps):
    """--loss: a lower bound of elbo_ratio's objective that is a sum over masks (BGPO).

    The n-th masks of all blocks together give an estimate d_n of (new minus old log-likelihood) / length.
    Where A > 0, exp(mean of d_n) is replaced by the mean of 1 + d_n (the tangent). Where A < 0, it is
    replaced by the mean of exp(d_n) (Jensen). Both bound the objective from below. This bound is a sum over
    n. So its parts could be computed one after the other, each in a micro-batch of its own. That saves
    memory, and is the paper's aim. The clip of each part is that of the authors' code.
    """
    # Views of a block: draw 0, draw 1, ... (A view that hides only tokens behind eos is left out. Then later
    # views of its block move up by one number, and count as the draw before.)
    mask = targets.rollout_index * DRAWS + (targets.view - 1) % DRAWS
    weight = 1 / targets.masked_share
    d = sum_by(mask, (logp - targets.logp_old) * weight) / sum_by(mask, weight)
    advantage = mean_by(mask, targets.advantage)
    ratio = torch.where(advantage > 0, 1 + d, d.exp())
    return -gain(ratio, advantage, 1 - clip_eps, 1 + clip_eps).sum() / (num_responses * DRAWS)


def sandwiched(logp, targets, num_responses):
    """--loss: A times a lower bound of log p where A > 0, and times an upper one where A < 0 (SPG).

    The lower bound is the ELBO per token. The upper bound is the mean of (1/beta) log M over the tokens that
    were hidden at least once, with beta = 1.5. M is the mean of a token's p^beta / t over all masks. A mask
    that leaves the token in sight counts as 0. The upper bound is averaged with the lower one, as in the
    authors' code. Here all responses weigh the same. In that code they weigh by length.
    """
    response = targets.rollout_index
    beta = 1.5
    weight = 1 / targets.masked_share
    lower = sum_by(response, weight * logp) / sum_by(response, weight)
    token = response * 2**32 + targets.response_index  # one number for each token of each response
    power = (beta * logp.clamp(min=-40)).exp()  # p^beta; the clamp keeps its logarithm finite
    upper = sum_by(token, weight * power / DRAWS).log() / beta  # one for each token that was masked
    upper = mean_by(token.unique() // 2**32, upper)
    advantage = mean_by(response, targets.advantage)
    return -(advantage * torch.where(advantage > 0, lower, (upper + lower) / 2)).sum() / num_responses


def quadrature_views(block, rng):
    """--views: masks at two fixed fractions, the points of Gauss's quadrature on 0 to 1 (GDPO).

    The paper says that random fractions are what makes an ELBO noisy. Which tokens are masked is still
    random.
    """
    views = []
    for fraction in (0.2113, 0.7887):  # 1/2 -+ 1/(2 sqrt 3), and each has the weight 1/2
        masked = sorted(rng.sample(block, max(1, round(fraction * len(block)))))
        views.append((masked, masked))
    return views


def quadrature_ratio(logp, targets, num_responses, clip_eps):
    """--loss: one ratio per response, exp(ELBO - ELBO_old) (GDPO).

    The gain of each response is divided by the length of the response.

    Left out: their KL to a frozen reference.
    """
    response = targets.rollout_index
    length = sum_by(response, 1 / targets.masked_share) / 2
    difference = sum_by(response, (logp - targets.logp_old) / targets.masked_share) / 2
    ratio = difference.clamp(-10, 10).exp()
    gains = gain(ratio, mean_by(response, targets.advantage), 1 - clip_eps, 1 + clip_eps)
    return -(gains / length).sum() / num_responses


# ------------------------------------------------------------------------------------------------------------
# A control.


def always_one():
    """--reward: every response earns 1. With --advantage raw, a model only becomes surer of its answers."""
    return 1.0
