"""Laws of the value model: time runs over trace steps, and the recursions are those of the paper."""

import pytest
import torch
from conftest import (
    COMPUTES, FIXTURES, all_rows, decode, fixture_cases, fixture_tensors, random_model, random_prompts, seen)

import value
from plumbing import checkpoints
from rollout import PLAIN, Rollout
from value import explained_variance, place_rewards, returns_and_advantages, value_loss


def renumber(steps):
    """Distinct steps of each row as 1, 2, ... in their order; 0 stays 0."""
    return torch.tensor([[sorted({0, *row}).index(t) for t in row] for row in steps.tolist()])


def random_case(seed, N=6, R=14, kind="sequence"):
    generator = torch.Generator().manual_seed(seed)
    steps = torch.randint(1, 7, (N, R), generator=generator)
    steps = torch.where(torch.rand(N, R, generator=generator) < 0.2, 0, steps)
    steps[:, 0] = 1
    steps = renumber(steps)
    values = torch.randn(N, R, generator=generator)
    if kind == "sequence":
        return place_rewards(torch.randn(N, generator=generator), steps), values, steps
    return torch.randn(N, R, generator=generator) * (steps > 0), values, steps


def slow(rewards, values, steps, gamma, lam):
    """The recursions, a token at a time."""
    returns, advantages = torch.zeros_like(rewards), torch.zeros_like(rewards)
    for n in range(len(steps)):
        mean = lambda table, t: (sum(x for x, s in zip(table[n].tolist(), steps[n].tolist()) if s == t)
                                 / max(1, steps[n].tolist().count(t)))
        R_next = A_next = V_next = 0.0
        for t in range(int(steps[n].max()), 0, -1):
            for j in range(steps.shape[1]):
                if steps[n, j] == t:
                    returns[n, j] = rewards[n, j] + gamma * R_next
                    advantages[n, j] = rewards[n, j] - values[n, j] + gamma * V_next + gamma * lam * A_next
            delta = mean(rewards, t) - mean(values, t) + gamma * V_next
            R_next, A_next, V_next = (
                mean(rewards, t) + gamma * R_next, delta + gamma * lam * A_next, mean(values, t))
    return returns, advantages


@pytest.mark.parametrize("kind", ["sequence", "process"])
@pytest.mark.parametrize("gamma, lam", [(1, 1), (1, 0), (0.9, 0.5), (0.99, 0.95), (0, 0)])
def test_the_batched_recursion_is_the_slow_one(gamma, lam, kind):
    case = random_case(3, kind=kind)
    for ours, theirs in zip(returns_and_advantages(*case, gamma, lam), slow(*case, gamma, lam)):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


def test_without_discounting_a_return_is_the_reward_and_an_advantage_what_the_value_missed():
    rewards, values, steps = random_case(0)
    total = rewards.amax(-1) + rewards.amin(-1)  # one of them is 0
    returns, advantages = returns_and_advantages(rewards, values, steps, 1.0, 1.0)
    is_trained = steps > 0
    torch.testing.assert_close(returns, torch.where(is_trained, total[:, None], 0.0))
    torch.testing.assert_close(
        advantages, torch.where(is_trained, total[:, None] - values, 0.0), atol=1e-5, rtol=1e-5)


def test_with_lambda_0_an_advantage_is_one_step_ahead():
    rewards, values, steps = random_case(1)
    _, advantages = returns_and_advantages(rewards, values, steps, 1.0, 0.0)
    for n in range(len(steps)):
        for j, t in enumerate(steps[n].tolist()):
            if t:
                following = values[n][steps[n] == t + 1]
                expected = rewards[n, j] - values[n, j] + (following.mean() if len(following) else 0)
                assert advantages[n, j].item() == pytest.approx(expected.item(), abs=1e-5)


def test_a_sequence_reward_lies_on_the_last_step_that_has_trained_tokens():
    steps = torch.tensor([[1, 2, 2, 0], [1, 0, 0, 0]])
    assert place_rewards(torch.tensor([3.0, 5.0]), steps).tolist() == [[0, 3, 3, 0], [5, 0, 0, 0]]


def test_trace_steps_count_blocks_in_turn_and_skip_steps_without_trained_tokens():
    config = random_model().config
    r = Rollout([7, 7], [3, 4, 5, 6, 1, 8], 5, [2, 1, 4, 3, 6, 5])
    assert value.trace_steps(r, config) == [2, 1, 4, 3, 5, 0]
    assert value.trace_steps(r, config, shrink=2) == [1, 1, 2, 2, 3, 0]
    full = random_model("llada").config
    r.canvas = 8
    assert value.trace_steps(r, full, shrink=3) == [1, 1, 2, 1, 2, 0]


def test_the_picture_at_the_top_of_the_file_is_right():
    steps = torch.tensor([[1, 3, 1, 2]])
    rewards = place_rewards(torch.tensor([1.0]), steps)
    assert rewards.tolist() == [[0, 1, 0, 0]]
    values = torch.tensor([[0.5, 0.9, 0.7, 0.6]])
    for lam, expected in ((1.0, [0.5, 0.1, 0.3, 0.4]), (0.0, [0.1, 0.1, -0.1, 0.3])):
        _, advantages = returns_and_advantages(rewards, values, steps, 1.0, lam)
        torch.testing.assert_close(advantages, torch.tensor([expected]))


@pytest.mark.parametrize("kind", ["sdar", "llada"])
def test_every_response_gets_the_numbers_it_would_get_alone(kind):
    """Values are sorted back to their tokens, however rows are cut and by whatever functions."""
    policy = random_model(kind)
    model = value.ValueModel(policy)
    model.value_head.weight.data.normal_(generator=torch.Generator().manual_seed(1))
    rollouts = decode(policy, random_prompts([3, 6, 8, 9]), max_new_tokens=12, threshold=0.4)
    for number, r in enumerate(rollouts):
        r.reward = float(number)
    lonely = []
    for r in rollouts:
        value.value_advantages(model, [r], PLAIN, 1)
        lonely.append((r.value_old, r.returns, r.advantage))
    for compute in COMPUTES.values():
        value.value_advantages(model, rollouts, compute._replace(max_tokens=60), 1)
        for r, expected in zip(rollouts, lonely):
            ours = torch.tensor([r.value_old, r.returns, r.advantage])
            torch.testing.assert_close(ours, torch.tensor(expected), atol=1e-5, rtol=1e-5)
            assert not ours[:, r.num_tokens:].any() and ours[0, :r.num_tokens].all()


@pytest.mark.parametrize("kind", ["sdar", "dream"])
def test_a_new_value_model_says_0_everywhere_and_its_head_learns_first(kind):
    policy = random_model(kind)
    rollouts = decode(policy, random_prompts([3, 6, 8]), max_new_tokens=12)
    model = value.ValueModel(policy)
    rows = all_rows(rollouts, policy.config)
    values = model(rows, PLAIN)
    assert torch.equal(values, torch.zeros(len(rows.targets.token))) and values.dtype == torch.float32
    value_loss(values, values.detach(), torch.ones_like(values), len(values)).backward()
    assert model.value_head.weight.grad.norm() > 0 and model.backbone.embed.weight.grad.norm() == 0
    assert model.backbone.embed.weight is not policy.embed.weight


def test_explained_variance_knows_good_from_bad():
    returns = torch.tensor([0.0, 1, 0, 1])
    assert explained_variance(returns, returns) == 1 and explained_variance(torch.zeros(4), returns) == 0
    assert explained_variance(-returns, returns) == -3 and explained_variance(returns, torch.ones(4)) == 0
    assert explained_variance(returns / 2 + 7, returns) == 0.75


@pytest.mark.parametrize("kind", ["sdar", "llada"])
def test_a_saved_value_model_comes_back(kind, tmp_path):
    model, other = value.ValueModel(random_model(kind)), value.ValueModel(random_model(kind, seed=1))
    model.value_head.weight.data.normal_()
    checkpoints.save_weights(model, tmp_path / "value")
    checkpoints.load_weights(other, tmp_path / "value")
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), other.parameters(), strict=True))


# --------------------------------------------------------------------------------------- the authors' numbers


@pytest.mark.parametrize("case", fixture_cases("sdar_gae"), ids=lambda c: c["id"])
def test_returns_and_advantages_are_the_authors(case):
    data = fixture_tensors("sdar_gae")
    own = {name: data[f"{case['inputs']}.{name}"] for name in ("old_values", "step_map_collapsed", "trained")}
    R = own["trained"].shape[1]
    steps = renumber(torch.where(own["trained"], own["step_map_collapsed"] + 1, 0))
    if case["reward_kind"] == "scalar":
        rewards = place_rewards(torch.tensor(case["reward"]), steps)
    else:
        rewards = torch.tensor([r + [0.0] * (R - len(r)) for r in case["reward"]])
    returns, advantages = returns_and_advantages(
        rewards, own["old_values"], steps, case["gamma"], case["lam"])
    torch.testing.assert_close(returns, data[f"{case['id']}.returns"], atol=1e-5, rtol=0)
    torch.testing.assert_close(advantages, data[f"{case['id']}.advantages"], atol=1e-5, rtol=0)


def test_the_loss_is_the_larger_error_of_the_value_and_of_its_clip():
    values, old, returns = torch.tensor([[0.1, 0.9, 0.9], [0.0, 0.0, 1.0], [1.0, 1.0, 1.0]])
    # The second value has moved by .9 to 1, which the clip does not believe: it counts as .2.
    assert value_loss(values, old, returns, 6, clip=0.2).item() == pytest.approx((0.81 + 0.64 + 0.01) / 12)
    assert value_loss(values, old, returns, 6).item() == pytest.approx((0.81 + 0.01 + 0.01) / 12)


@pytest.mark.parametrize("K", [4, 8])
def test_the_value_loss_and_gradient_are_the_authors(K):
    """Theirs is divided by rows and padded length L1; ours by trained tokens."""
    case = next(c for c in fixture_cases("sdar_value_loss") if c["block_size"] == K)
    data = fixture_tensors(case["file"].removesuffix(".safetensors"))
    policy, _ = checkpoints.load_model(FIXTURES / "authors/sdar_value", block_size=K)
    model = value.ValueModel(policy)
    checkpoints.load_weights(model, FIXTURES / "authors/sdar_value")
    texts, L0 = data["input_ids"].tolist(), case["L0"]
    step_maps = data["step_map"].tolist()
    rollouts = [Rollout(text[:L0], text[L0:], len(text) - L0, steps) for text, steps in zip(texts, step_maps)]
    rows = all_rows(rollouts, policy.config)
    where = {(int(data["row_to_response"][row]), column - L0): (row, column)
             for row, column in data["p_mask"].nonzero().tolist()}
    keys = [where[key] for key in seen(rows)]
    at = lambda name: torch.stack([data[name][key] for key in keys])
    values = model(rows, PLAIN)
    torch.testing.assert_close(values, at("values"), atol=2e-4, rtol=0)
    loss = value_loss(values, at("old_values"), at("returns"), case["n_rows"] * case["L1"], clip=0.2)
    loss.backward()
    assert loss.item() == pytest.approx(case["loss"], abs=1e-5)
    for name, p in model.named_parameters():
        theirs = ("value_head.weight" if name == "value_head.weight"
                  else checkpoints.family_name(policy.config, name.removeprefix("backbone.")))
        if f"grad.{theirs}" in data:
            expected = data[f"grad.{theirs}"]
            assert (p.grad - expected).norm() <= 1e-4 * expected.norm(), name
