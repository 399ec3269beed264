"""forks.py - published variants of the method, each as one function: examples to copy.

    python tracerl.py --loss tests/forks.py:clip_higher
    python tracerl.py --advantage tests/forks.py:centered --loss tests/forks.py:constant_length
    python tracerl.py --strategy sequential    # left to right, with its trace: JustGRPO, arXiv 2601.15165

What each function is given, and gives, stands at the FORK HERE marks of tracerl.py, rollout.py and
eval_math.py. These are the estimators alone; a paper's other choices (sampler, data, learning rate) are not
part of them.
"""

import torch

from rollout import random_views, trace_views
from tracerl import group_advantages


def clip_higher(logp, targets, num_tokens, num_responses, clip_eps, kl_coef):
    """--loss: more room upwards than downwards, so that rare tokens may grow, and no KL (DAPO, arXiv
    2503.14476)."""
    ratio = (logp - targets.logp_old).exp()
    clipped = ratio.clamp(1 - clip_eps, 1.28)
    return -torch.minimum(ratio * targets.advantage, clipped * targets.advantage).sum() / num_tokens


def sequence_ratio(logp, targets, num_tokens, num_responses, clip_eps, kl_coef):
    """--loss: one ratio per response, the geometric mean of its tokens' (GSPO, arXiv 2507.18071)."""
    _, owner, count = targets.rollout_index.unique(return_inverse=True, return_counts=True)
    per_response = lambda values: torch.zeros(len(count)).to(values).index_add(0, owner, values) / count
    ratio = per_response(logp - targets.logp_old).exp()
    advantage = per_response(targets.advantage)
    clipped = ratio.clamp(1 - clip_eps, 1 + clip_eps)
    return -torch.minimum(ratio * advantage, clipped * advantage).sum() / num_responses


def centered(rewards):
    """--advantage: no division by the group's standard deviation (Dr. GRPO, arXiv 2503.20783)."""
    return rewards - rewards.mean(-1, keepdim=True)


def mean_per_step(rewards, rollouts):
    """--advantage: every denoising step weighs the same, however many tokens it revealed, as in the objective
    of the paper (arXiv 2509.06949): A / (tokens of the step). (The loss still divides by tokens, not by
    steps: the gradient is smaller, by the tokens per step.)"""
    out = torch.zeros(len(rollouts), max(len(r.response) for r in rollouts))
    for row, A, r in zip(out, group_advantages(rewards).flatten(), rollouts):
        steps = r.step_map[:r.num_tokens]
        row[:len(steps)] = A / torch.tensor([steps.count(step) for step in steps])
    return out.view(*rewards.shape, -1)


def constant_length(logp, targets, num_tokens, num_responses, clip_eps, kl_coef):
    """--loss: long and short responses divided by the same constant, 20 tokens (Dr. GRPO)."""
    ratio = (logp - targets.logp_old).exp()
    clipped = ratio.clamp(1 - clip_eps, 1 + clip_eps)
    return -torch.minimum(ratio * targets.advantage, clipped * targets.advantage).sum() / (num_responses * 20)


def softmax_weights(rewards):
    """--advantage for ratio_free: the good ones' weights less the bad ones' (wd1, arXiv 2507.08838)."""
    A = rewards - rewards.mean(-1, keepdim=True)
    is_equal = (A.abs() < 1e-6).all(-1, keepdim=True)
    return (A.softmax(-1) - (-A).softmax(-1)).masked_fill(is_equal, 0.0)


def ratio_free(logp, targets, num_tokens, num_responses, clip_eps, kl_coef):
    """--loss for softmax_weights: a weighted log-likelihood, without a ratio (wd1)."""
    return -(targets.advantage * logp).sum() / num_tokens


def fully_masked(rollout, block, shrink, rng):
    """--views: the whole block (full attention: the response) hidden, and predicted at once (diffu-GRPO of
    d1, arXiv 2504.12216, without its masks in the prompt)."""
    return [(block, block)]


def some_steps(rollout, block, shrink, rng):
    """--views: each trace step with probability one half (AGRPO, arXiv 2510.04019: a random subset)."""
    views = trace_views(rollout, block, shrink)
    return [view for view in views if rng.random() < 0.5]


def as_many_random(rollout, block, shrink, rng):
    """--views: random masks, but as many views of them as the trace has, so that an update costs the same.
    (With full attention the authors' baseline, too, draws many masks for each response: 35.)"""
    steps = {rollout.step_map[j] for j in block}
    return [view for _ in steps for view in random_views(block, rng)]


def always_one(problem):
    """--reward: every response earns the same. A control, with --advantage raw: what becoming surer alone
    does for accuracy."""
    return 1.0
