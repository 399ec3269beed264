"""value.py - a baseline for each token, computed over trace steps.

The diffusion value model of arXiv 2509.06949 is a copy of the policy's backbone, with a linear head that
gives one number. Its input is the rows of the trace. V_j is its output at the place where the policy predicts
token j. There token j is still masked. So V_j estimates the value of the state just BEFORE the trace step
that reveals token j. A baseline may know the state, but not the token that is about to be drawn. (For exact
draws from the policy, a baseline leaves the mean gradient as it is. Revealed tokens are not exact draws, as
rollout.py says. So here it changes the mean gradient a little.)

Time runs over trace steps, not over tokens, because all tokens of one trace step are predicted from one
state. The value model is read at the position of each token, so V differs between the tokens of one step.
Each token has its own baseline V_j. Their mean V* is the value of the whole step. Earlier steps use V* when
they look ahead to this step. In the table, the whole response is 1 0 1 ; with step_map 1 3 1 2, and its
reward is 1. The last two lines are its advantages, with gamma = 1.

    token                  1    0    1    ;
    step_map               1    3    1    2
    token rewards r_j      0    1    0    0      the reward lies on the last step
    values V_j            .5   .9   .7   .6
    step means V*         .6   .9   .6   .6      step 1: (.5 + .7) / 2
    lambda = 1:  A_j      .5   .1   .3   .4      1 - V_j: what the value model did not expect
    lambda = 0:  A_j      .1   .1  -.1   .3      r_j - V_j + V* of the next step

Read in this order: ValueModel, trace_steps, place_rewards, returns_and_advantages, value_advantages,
value_loss.

Left out: a smaller value model. (With LoRA, ours shares the frozen weights of the policy.)
"""

import copy

import torch
from torch import nn
from torch.nn.utils.rnn import pad_sequence

import rollout
from plumbing import packing, parallel


class ValueModel(nn.Module):
    """A copy of the policy's backbone, and a head that starts at zero: before training every value is 0."""

    def __init__(self, policy):
        super().__init__()
        self.config = policy.config
        # With LoRA the frozen weights are shared with the policy, and only the adapters are copied.
        shared = {id(p): p for p in policy.parameters() if not p.requires_grad}
        self.backbone = copy.deepcopy(policy, shared)
        self.backbone.head = None  # a value model predicts no tokens
        self.value_head = nn.Linear(policy.config.hidden_size, 1, bias=False, device=policy.device)
        # Zero, so that values start at 0, and not at the noise of a random head.
        nn.init.zeros_(self.value_head.weight)

    @property
    def device(self):
        """Where the weights are."""
        return self.backbone.device

    def forward(self, rows, compute):
        """Values of the targets of a micro-batch, in their order: float32 (N,)."""
        # The same outputs at which the policy predicts. (Dream's shift by one is part of the rows.)
        states = rollout.states_at(self.backbone, rows, compute)  # (N, C)
        return states.float() @ self.value_head.weight[0].float()  # (N, C) @ (C,) -> (N,)


def trace_steps(r, config, shrink=1):
    """The trace step of every response token, over the whole response -> list of int, 0 if not trained.

    Steps are numbered 1, 2, ... in the order of decoding. Denoising steps that --shrink merges share a
    number. A step that revealed no trained token is not counted. It revealed only tokens behind eos or beyond
    max_new_tokens.
    """
    steps = [0] * len(r.response)
    number = 0  # trace steps so far
    for view in rollout.views_of(r, config, shrink=shrink):  # one view per trace step, in their order
        trained = [j for j in view.targets if j < r.num_tokens]
        if trained:
            number += 1
        for j in trained:
            steps[j] = number
    return steps


def place_rewards(rewards, steps):
    """Rewards of responses, float (N,), as token rewards on the trained tokens of the last step.

    steps: int64 (N, R) -> float (N, R). Each of these tokens gets the whole reward. The mean over the step is
    then exactly the reward, however many tokens the step has.
    """
    is_last = (steps == steps.amax(-1, keepdim=True)) & (steps > 0)
    return torch.where(is_last, rewards[:, None], 0.0)


def returns_and_advantages(rewards, values, steps, gamma=1.0, lam=1.0):
    """Returns and GAE advantages over trace steps -> two float (N, R), 0 where nothing is trained.

    rewards, values: one number per token, float (N, R). steps: int64 (N, R), from 1 up without gaps; 0 is not
    trained.

    gamma is the discount per trace step, lam the lambda of GAE. The paper sets both to 1. A fork that wants
    others changes these defaults.

    Take token j of step t. A star marks a mean over the trained tokens of a step. After the
    last step every starred number is 0.

        R*_t = r*_t + gamma R*_{t+1}
        A*_t = delta_t + gamma lam A*_{t+1}     with delta_t = r*_t - V*_t + gamma V*_{t+1}
        R_j  = r_j + gamma R*_{t+1}
        A_j  = (r_j - V_j) + gamma V*_{t+1} + gamma lam A*_{t+1}
    """
    N = len(steps)
    S = int(steps.max())
    # Column t is step t. Column 0 collects the tokens that are not trained. Column S + 1 comes after the last
    # step, and stays 0.
    zeros = rewards.new_zeros(N, S + 2)
    count = zeros.scatter_add(1, steps, torch.ones_like(rewards)).clamp(min=1)  # (N, S + 2) tokens of a step
    r = zeros.scatter_add(1, steps, rewards) / count  # r*
    v = zeros.scatter_add(1, steps, values) / count  # V*
    returns = zeros.clone()
    advantages = zeros.clone()
    for t in range(S, 0, -1):  # from the last step to the first: each needs what comes after it
        returns[:, t] = r[:, t] + gamma * returns[:, t + 1]
        delta = r[:, t] - v[:, t] + gamma * v[:, t + 1]  # what this step alone brought beyond the expected
        advantages[:, t] = delta + gamma * lam * advantages[:, t + 1]
    # Back from steps to tokens. What follows step t is the same for all its tokens; r_j and V_j are their
    # own.
    following = steps + 1
    token_returns = rewards + gamma * returns.gather(1, following)
    token_advantages = (rewards - values + gamma * v.gather(1, following)
                        + gamma * lam * advantages.gather(1, following))
    is_trained = steps > 0
    return token_returns * is_trained, token_advantages * is_trained


@torch.no_grad()
def value_advantages(value_model, rollouts, compute, shrink):
    """Sets value_old, returns and advantage of all rollouts, on every process -> numbers for the log.

    The value model reads the rows of the trace, whatever views the policy is trained on.
    """
    own = parallel.deal(rollouts)  # this process computes the values of these
    config = value_model.config
    built = rollout.build_rows(own, config, shrink=shrink, trained_only=True)
    parts, _ = packing.dealt_batches(built, compute, value_model)
    values = rollout.per_response(own, parts, [value_model(rows, compute) for rows in parts])
    steps = [torch.tensor(trace_steps(r, config, shrink)) for r in own]
    found = estimate(own, [r_values.cpu() for r_values in values], steps)
    # Every process then holds the same records.
    for r, (value_old, returns, advantage) in zip(rollouts, parallel.gather(found)):
        r.value_old = value_old
        r.returns = returns
        r.advantage = advantage
    # Numbers for the log, over all trained tokens.
    trained = [(r.value_old[j], r.returns[j], r.advantage[j]) for r in rollouts for j in range(r.num_tokens)]
    values, returns, advantages = torch.tensor(trained, dtype=torch.float64).T  # (N,) each
    return dict(explained_variance=explained_variance(values, returns),
                advantage_rms=float(advantages.square().mean().sqrt()))


def estimate(rollouts, values, steps):
    """Values, returns and advantages of responses -> for each, three lists with a number for each token.

    values, steps: a tensor for each response. Its reward lies on its last trace step. Process rewards lie on
    their own tokens.
    """
    if not rollouts:
        return []
    # As tables, with zeros behind shorter responses. A token of step 0 is not trained.
    values = pad_sequence(values, batch_first=True)  # (N, R)
    steps = pad_sequence(steps, batch_first=True)
    rewards = place_rewards(torch.tensor([r.reward for r in rollouts]), steps)
    for line, r in zip(rewards, rollouts):
        if r.token_rewards:  # process rewards: each token has its own
            line.zero_()[:len(r.token_rewards)] = torch.tensor(r.token_rewards)
    tables = values, *returns_and_advantages(rewards, values, steps)
    return [[table[n, :len(r.response)].tolist() for table in tables] for n, r in enumerate(rollouts)]


def value_loss(values, values_old, returns, num_tokens, clip=0):
    """0.5 max[(V - R)^2, (V_clipped - R)^2], summed and divided by num_tokens.

    All float32 (n,), of one micro-batch. num_tokens: trained tokens of the WHOLE update, over all
    micro-batches and processes. So losses and gradients simply add. V_clipped is V, kept
    within `clip` of V_old. clip 0: plain 0.5 (V - R)^2.
    """
    error = (values - returns) ** 2
    if clip:
        # As in PPO's clip: a value that has already moved by more than `clip` gains nothing by moving on.
        clipped = values_old + (values - values_old).clamp(-clip, clip)
        error = torch.maximum(error, (clipped - returns) ** 2)
    return 0.5 * error.sum() / num_tokens


def explained_variance(values, returns):
    """1 - Var(R - V) / Var(R), float64 (N,) each: 1 is perfect, 0 no better than a constant."""
    variance = returns.var(unbiased=False)
    return 1 - float((returns - values).var(unbiased=False) / variance) if variance > 1e-9 else 0.0
