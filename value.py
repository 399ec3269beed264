"""value.py - a baseline per trace step.

The diffusion value model (arXiv 2509.06949, section on the diffusion value model): a copy of the policy's
backbone with a linear head to one number. It reads rows of the trace, whatever views the policy is trained
on, at the very places where the policy predicts. So V_j is the value of the state just BEFORE the trace
step (one denoising step, or --shrink of them taken as one) that reveals token j: what a baseline must be,
since it may know the state but not the token that is about to be drawn.

Tokens of one trace step are predicted from one state. So time runs over trace steps, not over tokens: rewards
and values are averaged over the trained tokens of a step (a star marks these means), GAE runs over steps, and
each token then gets its own share back:

    step_map of a response      1   1   2   3   3          reward 1, all of it at the last step
    token rewards r_j           0   0   0   1   1
    values V_j                 .5  .7  .6  .9  .7
    step means V*              .6      .6  .8              (steps 1, 2, 3)
    gamma = lambda = 1:  A_j   .5  .3  .4  .1  .3          = 1 - V_j: what the value model did not expect
    gamma 1, lambda 0:   A_j   .1 -.1  .2  .1  .3          = r_j - V_j + V* of the next step

Read in this order: ValueModel, trace_steps, place_rewards, returns_and_advantages, estimate, value_loss.

Left out:
  1. a value model smaller than the policy, or one that shares its trunk (LoRA: the frozen part is shared);
  2. saving and loading: plumbing/checkpoints.py.
"""

import copy

import torch
from torch import nn

import rollout


class ValueModel(nn.Module):
    """The policy's backbone, copied, and a head that starts at zero: before training, every value is 0."""

    def __init__(self, policy):
        super().__init__()
        self.config = policy.config
        # With LoRA the frozen trunk is shared with the policy, and only the adapters are copied.
        shared = {id(p): p for p in policy.parameters() if not p.requires_grad}
        self.backbone = copy.deepcopy(policy, shared)
        self.backbone.head = None  # a value model predicts no tokens
        self.value_head = nn.Linear(policy.config.hidden_size, 1, bias=False, device=policy.device)
        # Zero, so that the first advantages are plain rewards and not the noise of a random head.
        nn.init.zeros_(self.value_head.weight)

    @property
    def device(self):
        """Where the weights are."""
        return self.backbone.device

    def forward(self, rows):
        """Values, float32 (N,), at the targets of one micro-batch of model.Rows, in their order."""
        # Dream's shift by one is in the rows' logit_index, and holds here as well.
        h = rows.states(self.backbone)  # (N, C)
        return h.float() @ self.value_head.weight[0].float()


def trace_steps(r, config, block_size, shrink=1, post_num=0):
    """The trace step of every trained token of a rollout, over the whole response
    -> list of int, 0 if untrained.

    1, 2, ... in the order of decoding: blocks one after the other, inside a block the merged steps. A step
    that revealed no trained token (only the filling after eos) is not counted: nothing waits for it.
    """
    # Tokens after eos were context and are in the views, but nothing is earned or learnt there.
    end = r.trained_end(post_num)
    steps, count = [0] * len(r.response), 0  # count: trace steps so far
    for _, _, targets, _ in rollout.views_of(r, config, block_size, shrink=shrink):
        trained = [j for j in targets if j < end]
        count += bool(trained)
        for j in trained:
            steps[j] = count
    return steps


def place_rewards(rewards, steps):
    """Sequence rewards, float (N,), as token rewards on the trained tokens of the last step; steps (N, R) ->
    float (N, R)."""
    # Each trained token of that step gets the whole reward; the step's mean r* is then the
    # reward once, not a multiple of it.
    is_last = (steps == steps.amax(-1, keepdim=True)) & (steps > 0)
    return torch.where(is_last, rewards[:, None], 0.0)


def returns_and_advantages(rewards, values, steps, gamma=1.0, lam=1.0):
    """Returns and GAE advantages over trace steps -> two float (N, R), 0 where nothing is trained.

    rewards, values: per token, float (N, R). steps: int64 (N, R), from 1 up without gaps (a gap would be a
    step more of discount), 0 = not trained. For token j of step t, with means over the trained tokens of a
    step marked *, and everything after the last step 0 (paper, value model):

        R*_t = r*_t + gamma R*_{t+1}
        A*_t = delta_t + gamma lam A*_{t+1}     with delta_t = r*_t - V*_t + gamma V*_{t+1}
        R_j  = r_j + gamma R*_{t+1}
        A_j  = (r_j - V_j) + gamma V*_{t+1} + gamma lam A*_{t+1}
    """
    N, S = len(steps), int(steps.max())
    # Column t is step t. Column 0 collects untrained tokens, and column S + 1, after the last step, stays 0.
    zeros = rewards.new_zeros(N, S + 2)
    # (N, S + 2) tokens of each step; 1 where none, to divide by
    count = zeros.scatter_add(1, steps, torch.ones_like(rewards)).clamp(min=1)
    r = zeros.scatter_add(1, steps, rewards) / count  # (N, S + 2) r*
    v = zeros.scatter_add(1, steps, values) / count  # V*
    returns, advantages = zeros.clone(), zeros.clone()
    # From the last step to the first: each needs what comes after it.
    for t in range(S, 0, -1):
        returns[:, t] = r[:, t] + gamma * returns[:, t + 1]
        delta = r[:, t] - v[:, t] + gamma * v[:, t + 1]  # what this step alone brought beyond the expected
        advantages[:, t] = delta + gamma * lam * advantages[:, t + 1]
    # Back from steps to tokens: what follows step t is the same for all tokens of it, only
    # r_j and V_j are a token's own.
    following = steps + 1
    token_returns = rewards + gamma * returns.gather(1, following)
    token_advantages = (rewards - values + gamma * v.gather(1, following)
                        + gamma * lam * advantages.gather(1, following))
    is_trained = steps > 0  # 0 after eos, and where rows are padded
    return token_returns * is_trained, token_advantages * is_trained


def estimate(r, steps, gamma, lam):
    """Sets a Rollout's returns and advantage, from its value_old, its rewards and its `trace_steps`."""
    steps, values = torch.tensor([steps]), torch.tensor([r.value_old])  # (1, R): a batch of one
    rewards = place_rewards(torch.tensor([r.reward]), steps)
    if r.token_rewards:  # process rewards take its place: each token's own
        rewards.zero_()[0, :len(r.token_rewards)] = torch.tensor(r.token_rewards)
    returns, advantages = returns_and_advantages(rewards, values, steps, gamma, lam)
    r.returns, r.advantage = returns[0].tolist(), advantages[0].tolist()


def value_loss(values, values_old, returns, num_tokens, clip=None):
    """0.5 max[(V - R)^2, (clip(V, V_old +- clip) - R)^2], summed and divided by num_tokens.

    All float32 (N,). num_tokens: trained tokens of the WHOLE update, over all micro-batches and processes, so
    that their losses and gradients simply add. clip None: plain 0.5 (V - R)^2.
    """
    # The clip works like PPO's for the policy: a value that has already moved by more than `clip` in this
    # step gets no credit for moving on.
    error = (values - returns) ** 2
    if clip is not None:
        clipped = values_old + (values - values_old).clamp(-clip, clip)
        error = torch.maximum(error, (clipped - returns) ** 2)
    return 0.5 * error.sum() / num_tokens


def explained_variance(values, returns):
    """1 - Var(R - V) / Var(R), of float64 (N,) each: 1 is perfect, 0 no better than a constant (or all
    returns are equal)."""
    variance = returns.var(unbiased=False)
    return 1 - float((returns - values).var(unbiased=False) / variance) if variance > 1e-9 else 0.0
