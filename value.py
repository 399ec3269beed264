"""value.py - a baseline per trace step.

The diffusion value model (paper, section on the diffusion value model; METHOD: value model): a copy of the
policy's backbone with a linear head to one number. It reads the very rows the policy is trained on, at the
very places where the policy predicts, so V_j is the value of the state just before the denoising step that
reveals token j.

Tokens revealed at one step share that state, so time runs over trace steps, not over tokens: rewards and
values are averaged over the trained tokens of a step (a star marks these means), GAE runs over steps, and
each token gets its own share back.

Reading order: ValueModel, global_steps, returns_and_advantages, value_loss, explained_variance.
"""

import copy
import os

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn

import model as lm
import rollout


class ValueModel(nn.Module):
    """The policy's backbone, copied, and a head that starts at zero: before training, every value is 0."""

    def __init__(self, policy):
        super().__init__()
        self.config = policy.config
        # with LoRA the frozen trunk is shared, and only the adapters are copied
        shared = {id(p): p for p in policy.parameters() if not p.requires_grad}
        self.backbone = copy.deepcopy(policy, shared)
        self.backbone.head = None  # a value model predicts no tokens
        self.value_head = nn.Linear(policy.config.hidden_size, 1, bias=False, device=policy.device)
        nn.init.zeros_(self.value_head.weight)

    @property
    def device(self):
        """Where the weights are."""
        return self.backbone.device

    def forward(self, rows):
        """Values, float32 (N,), at the targets of one micro-batch of rollout.Rows, in their order."""
        return F.linear(rows.states(self.backbone).float(), self.value_head.weight.float()).squeeze(-1)


def global_steps(rollouts, config, shrink=1, post_num=0):
    """Trace steps of the trained tokens over the whole response -> int64 (N, R), 0 on untrained tokens.

    1, 2, ... in the order of decoding: blocks one after the other, inside a block the merged steps. Steps
    that revealed no trained token (only the filling after eos) are not counted.
    """
    tokens, steps, _ = rollout.canvases(rollouts, config)
    L = tokens.shape[1]
    span = L if config.is_full else config.block_size
    trace = rollout.merge_steps(steps, span, shrink)
    place = torch.arange(L)[None] - torch.tensor([len(r.prompt) for r in rollouts])[:, None]
    trained = torch.tensor([min(r.num_tokens + post_num, len(r.response)) for r in rollouts])[:, None]
    is_trained = (place >= 0) & (place < trained)
    order = torch.where(is_trained, torch.arange(L) // span * (L + 1) + trace, 0)
    order = rollout.merge_steps(order, L)
    R = max(len(r.response) for r in rollouts)
    out = torch.zeros(len(rollouts), R + 1, dtype=torch.int64)  # last column: outside the response
    return out.scatter(1, torch.where(is_trained, place, R), order)[:, :R]


def place_rewards(rewards, steps):
    """Sequence rewards, float (N,), as token rewards on the trained tokens of the last step; steps (N, R)."""
    is_last = (steps == steps.amax(-1, keepdim=True)) & (steps > 0)
    return torch.where(is_last, rewards[:, None], 0.0)


def returns_and_advantages(rewards, values, steps, gamma=1.0, lam=1.0):
    """Returns and GAE advantages over trace steps (METHOD: value model) -> two float (N, R), 0 if untrained.

    rewards, values: per token, float (N, R). steps: `global_steps`, int64 (N, R), 0 = not trained. For token
    j of step t, with means over the trained tokens of a step marked *, and everything after the last step 0:

        R*_t = r*_t + gamma R*_{t+1}
        A*_t = delta_t + gamma lam A*_{t+1}     with delta_t = r*_t - V*_t + gamma V*_{t+1}
        R_j  = r_j + gamma R*_{t+1}
        A_j  = (r_j - V_j) + gamma V*_{t+1} + gamma lam A*_{t+1}
    """
    N, S = len(steps), int(steps.max())
    # column t is step t; column 0 collects untrained tokens, column S + 1 stays 0
    zeros = rewards.new_zeros(N, S + 2)
    count = zeros.scatter_add(1, steps, torch.ones_like(rewards)).clamp(min=1)
    r = zeros.scatter_add(1, steps, rewards) / count
    v = zeros.scatter_add(1, steps, values) / count
    returns, advantages = zeros.clone(), zeros.clone()
    for t in range(S, 0, -1):
        returns[:, t] = r[:, t] + gamma * returns[:, t + 1]
        delta = r[:, t] - v[:, t] + gamma * v[:, t + 1]
        advantages[:, t] = delta + gamma * lam * advantages[:, t + 1]
    is_trained, next_returns, next_v, next_advantages = steps > 0, *(
        table.gather(1, steps + 1) for table in (returns, v, advantages))
    token_returns = rewards + gamma * next_returns
    token_advantages = rewards - values + gamma * next_v + gamma * lam * next_advantages
    return token_returns * is_trained, token_advantages * is_trained


def value_loss(values, values_old, returns, num_trained, clip=None):
    """0.5 max[(V - R)^2, (clip(V, V_old +- clip) - R)^2], summed and divided by num_trained.

    All float32 (N,). num_trained: trained tokens of the whole update. clip None: plain 0.5 (V - R)^2.
    """
    error = (values - returns) ** 2
    if clip is not None:
        clipped = values_old + (values - values_old).clamp(-clip, clip)
        error = torch.maximum(error, (clipped - returns) ** 2)
    return 0.5 * error.sum() / num_trained


def variance_sums(values, returns):
    """What explained_variance needs, of two float (N,): five sums that may be added over processes."""
    error = (returns - values).double()
    returns = returns.double()
    return [float(x)
            for x in (len(returns), returns.sum(), (returns**2).sum(), error.sum(), (error**2).sum())]


def explained_variance(count, total, squares, error, error_squares):
    """1 - Var(R - V) / Var(R): 1 is perfect, 0 no better than a constant; 0 where all returns are equal."""
    variance = squares / count - (total / count) ** 2
    if variance < 1e-9:
        return 0.0
    return 1 - (error_squares / count - (error / count) ** 2) / variance


def save_value_model(model, folder):
    """Writes folder/value/model.safetensors: the backbone under the family's names (LoRA: merged), and
    value_head.weight. To be called on every process."""
    state = lm.whole_state(model)
    if lm.processes()[0] > 0:
        return
    head = state.pop("value_head.weight")
    state = {name.removeprefix("backbone."): p for name, p in state.items()}
    state = {lm.family_name(model.config, name): p
             for name, p in lm.merge_lora(state, lm.lora_rank(model)).items()}
    os.makedirs(os.path.join(folder, "value"), exist_ok=True)
    save_file({**state, "value_head.weight": head}, os.path.join(folder, "value", "model.safetensors"))


def load_value_model(model, path):
    """Fills a ValueModel from such a file (or from the authors', whose lm_head it does without)."""
    state = load_file(path)
    names = {name: lm.family_name(model.config, name) for name in model.backbone.state_dict()}
    model.backbone.load_state_dict({name: state[theirs] for name, theirs in names.items()})
    model.value_head.load_state_dict({"weight": state["value_head.weight"]})
