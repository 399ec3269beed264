"""examples/frozen_reference.py - a KL to a frozen reference model, in the loss or in the reward.

    REFERENCE=assets/tiny-block torchrun tracerl.py --loss examples/frozen_reference.py:loss \
        --advantage examples/frozen_reference.py:with_reference --name reference
    REFERENCE=assets/tiny-block torchrun tracerl.py --advantage examples/frozen_reference.py:penalized \
        --name penalized

In each RL step, tracerl.py keeps the policy near the one that made the rollouts. Over many steps the policy
may still move far away. Here there is a second model, which never changes. The policy is kept near it for the
whole run. The second model replays the same traces, so both models score each token in the same state. (The
second model takes memory: every process holds all of it. It replays by the fast twins, also with --plain.)

`loss` needs --views trace and --shrink 1, so that both models score the same states. `loss` and
`penalized` need --temperature 1, at which the reference replays. The reference must have the same kind of
attention and the same K. (The policy as it was at the first RL step is --model.)
"""

import functools
import os

import torch

import rollout
from plumbing import checkpoints, engine, parallel
from tracerl import group_advantages, policy_loss

BETA = 0.05  # weight of the KL


@functools.cache
def reference():
    """The frozen model, read when it is first used."""
    path = os.environ.get("REFERENCE")
    if path is None:
        raise ValueError("say which model is the reference: REFERENCE=folder torchrun tracerl.py ...")
    model, _ = checkpoints.load_model(path)
    return model.requires_grad_(False)


@torch.no_grad()
def reference_logp(rollouts):
    """The reference's log-probability of every response token, on every process -> a list per rollout."""
    own = parallel.deal(rollouts)  # each process replays a part
    if reference().config.is_full != bool(rollouts[0].canvas):
        raise ValueError(f"REFERENCE {os.environ['REFERENCE']} has other attention than --model: change it")
    replayed = rollout.replay(reference(), own, engine.fast(reference().device))
    return parallel.gather([logp.tolist() for logp in replayed])


def with_reference(rewards, rollouts):
    """--advantage: the usual one. It also hands the reference's log-probabilities to the loss.

    They are stored in value_old, which a loss gets for each target. So there can be no value model beside
    them. (trace.html then shows them as `value`.)
    """
    for r, logp in zip(rollouts, reference_logp(rollouts)):
        r.value_old = [min(x, -1e-9) for x in logp]  # below 0, also where the reference is quite sure
    return group_advantages(rewards)


def loss(logp, targets, num_tokens, clip_eps, kl_coef):
    """--loss: the usual one, and BETA KL(policy || reference), as GRPO estimates it."""
    if (targets.value_old >= 0).any():
        raise ValueError("this loss needs --advantage examples/frozen_reference.py:with_reference")
    # log(p_reference / p_policy). Above 10 the term is constant, and its gradient 0.
    log_ratio = (targets.value_old - logp).clamp(max=10)
    k3 = log_ratio.exp() - 1 - log_ratio
    return policy_loss(logp, targets, num_tokens, clip_eps, kl_coef) + BETA * k3.sum() / num_tokens


def penalized(rewards, rollouts):
    """--advantage: the usual one, minus BETA times how far the response's KL is above its group's mean.

    The KL of a response is sum_j (log p(j) - log p_reference(j)), as in RLHF. Unlike the reward, it is not
    divided by its standard deviation in the group. Otherwise even tiny differences of the KL would become
    advantages of about 1. A group of equal rewards, which has no other advantage, would then follow the KL at
    full strength.
    """
    kl = []
    for r, logp in zip(rollouts, reference_logp(rollouts)):
        kl.append(sum(r.logp[:r.num_tokens]) - sum(logp[:r.num_tokens]))
    kl = torch.tensor(kl).view_as(rewards)
    return group_advantages(rewards) - BETA * (kl - kl.mean(-1, keepdim=True))
