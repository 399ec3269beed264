"""Laws of the update: advantages, the loss, and a gradient that does not depend on how the work is cut."""

import json
import math
import random
from statistics import fmean

import pytest
import torch
from conftest import FIXTURES, all_rows, fixture_cases, fixture_tensors, random_model, random_prompts, seen

import eval_math
import forks
import rollout
import sft
import tracerl
import value
from model import Rows, Targets
from plumbing import checkpoints, parallel, runs, show
from rollout import Rollout, replay
from tracerl import ADVANTAGES, Trainers, give_advantages, group_advantages, policy_loss


def settings(**changes):
    """The flags of the tiny model, with what the tests want otherwise."""
    args = tracerl.parse_args([])
    defaults = dict(shrink=1, tokens_per_micro_batch=16384, max_grad_norm=1e9, minibatches=1, group_size=4,
                    value_warmup=0, value_epochs=1)
    unknown = {*changes} - {*vars(args)}
    assert not unknown, f"no such flags: {unknown}"
    vars(args).update(defaults | changes)
    return args


def plan_of(args, trainers=None, loss=policy_loss, step=1000):
    """The plan of a late step."""
    usual = tracerl.Plan(ADVANTAGES[args.advantage], loss, rollout.VIEWS[args.views])
    return tracerl.plan_step(step, trainers or Trainers(random_model(), None, None, None), usual, args)


def keep(rollouts, advantage="group", group_size=4, keep_range=None, **changes):
    """Step 3 without a value model -> the rollouts that are kept."""
    args = settings(advantage=advantage, group_size=group_size, keep_range=keep_range, **changes)
    return give_advantages(rollouts, None, plan_of(args), args)[0]


def targets_of(logp_old, advantage, rollout_index=None):
    """Targets with these numbers, and zeros."""
    zero, index = torch.zeros_like(logp_old), torch.zeros(len(logp_old), dtype=torch.int64)
    owner = index if rollout_index is None else rollout_index
    return Targets(index, index, owner, index, zero + 1, logp_old, logp_old, advantage, zero, zero)


def rollouts_with_rewards(model, num_groups=3, group_size=4, **settings):
    prompts = [p for p in random_prompts(range(3, 3 + num_groups)) for _ in range(group_size)]
    out = rollout.generate(model, prompts, max_new_tokens=14, threshold=0.4, eos_ids=(1,), **settings)
    for i, r in enumerate(out):
        r.reward = float(i * 7 % 3 == 0)
    return out


# ------------------------------------------------------------------------------------------------- advantages


def test_advantages_may_be_per_token():
    """A fork gives A / (tokens of the step): each step's tokens add up to A."""
    rollouts = rollouts_with_rewards(random_model())
    plan = plan_of(settings())._replace(advantage=forks.mean_per_step)
    kept, _ = give_advantages(rollouts, None, plan, settings())
    A = group_advantages(torch.tensor([r.reward for r in rollouts]).view(-1, 4)).flatten().tolist()
    assert kept and {len(set(r.advantage)) for r in kept} != {1}
    for r, expected in zip(rollouts, A):
        steps = r.step_map[:r.num_tokens]
        for step in set(steps):
            total = sum(a for a, s in zip(r.advantage, steps) if s == step)
            assert total == pytest.approx(expected, abs=1e-5)
        assert r.advantage[r.num_tokens:] == [0.0] * (len(r.response) - r.num_tokens)


def test_group_advantages_are_standard_scores_within_the_group():
    rewards = torch.tensor([[1.0, 0, 0, 1], [0.5, 0.5, 0.5, 0.5], [1, 0, 0, 0]])
    a = group_advantages(rewards)
    torch.testing.assert_close(a[0], torch.tensor([1.0, -1, -1, 1]))
    assert torch.equal(a[1], torch.zeros(4))
    torch.testing.assert_close(a[2], torch.tensor([3.0, -1, -1, -1]) / 3**0.5)


def test_a_group_is_kept_or_dropped_whole():
    make = lambda rewards: [Rollout([1], [2, 3], 2, [1, 2], reward=r) for r in rewards]
    rollouts = make([1.0, 1, 1, 1, 0, 0, 0, 0, 1, 0, 0, 0, 1, 1, 1, 0, 0, 1, 0, 1])
    assert keep(rollouts) == rollouts[8:]
    assert keep(rollouts, keep_range=(0.3, 0.8)) == rollouts[12:]
    assert keep(rollouts[:8]) == []
    assert all(r.advantage == [pytest.approx(3**0.5 if r.reward else -(3**-0.5))] * 2 for r in rollouts[8:12])


def test_batch_and_raw_advantages_keep_every_group_unless_nothing_differs():
    make = lambda rewards: [Rollout([1], [2, 3], 2, [1, 2], reward=float(r)) for r in rewards]
    rollouts = make([1, 1, 0, 0, 0, 0])
    assert keep(rollouts, "batch", 2) == rollouts
    assert [r.advantage[0] for r in rollouts] == pytest.approx([2 / 3, 2 / 3] + [-1 / 3] * 4)
    assert keep(rollouts, "raw", 2) == rollouts and [r.advantage[1] for r in rollouts] == [1, 1, 0, 0, 0, 0]
    assert keep(make([1] * 4), "batch", 2) == [] == keep(make([0] * 4), "raw", 2)


def test_an_advantage_that_is_not_finite_is_refused():
    """The textbook's (r - mean) / std is 0 / 0 where all rewards of a group are equal."""
    textbook = lambda rewards: (rewards - rewards.mean(-1, keepdim=True)) / rewards.std(-1, keepdim=True)
    rollouts = [Rollout([1], [2, 3], 2, [1, 2], reward=1.0) for _ in range(4)]
    with pytest.raises(ValueError, match="some that are not finite"):
        give_advantages(rollouts, None, plan_of(settings())._replace(advantage=textbook), settings())


def test_process_rewards_without_a_value_model_are_refused():
    rollouts = [Rollout([1], [2, 3], 2, [1, 2], reward=1.0, token_rewards=[0.5, 0.5]) for _ in range(4)]
    with pytest.raises(ValueError, match="--advantage group takes one per response: use --advantage value"):
        keep(rollouts)


# --------------------------------------------------------------------------------------------------- the loss


def test_the_loss_is_the_formula():
    logp, old, a = torch.randn(3, 40, generator=torch.Generator().manual_seed(0))
    loss = policy_loss(logp, targets_of(old, a), 50, 5, clip_eps=0.2, kl_coef=0.3)
    total = 0.0
    for x, y, adv in zip(logp.tolist(), old.tolist(), a.tolist()):
        ratio = torch.tensor(x - y).exp().item()
        total += -min(ratio * adv, min(max(ratio, 0.8), 1.2) * adv) + 0.3 * (ratio - 1 - (x - y))
    assert loss.item() == pytest.approx(total / 50, rel=1e-5)


def test_the_figures_of_the_log_are_what_they_say():
    logp, old, recorded = torch.randn(3, 40, generator=torch.Generator().manual_seed(0))
    sums, maxima = tracerl.diagnose(logp, old.abs(), targets_of(old, old)._replace(logp=recorded), 0.2)
    ratio, gap = (logp - old).exp(), (old - recorded).abs()
    k3 = ratio - 1 - (logp - old)
    expected = (k3.sum(), ((ratio - 1).abs() > 0.2).sum(), old.abs().sum(), gap.sum())
    assert sums.tolist() == pytest.approx([float(x) for x in expected], rel=1e-5)
    assert maxima.tolist() == pytest.approx([float(ratio.max()), float(gap.max())], rel=1e-5)
    nothing = targets_of(old[:0], old[:0])
    assert not any(x.any() for x in tracerl.diagnose(old[:0], old[:0], nothing, 0.2))


def test_losses_of_parts_add_up_to_the_loss_of_the_whole():
    logp, old, a = torch.randn(3, 40, generator=torch.Generator().manual_seed(1))
    whole = policy_loss(logp, targets_of(old, a), 40, 4)
    cuts = [slice(i, i + 7) for i in range(0, 40, 7)]
    parts = sum(policy_loss(logp[cut], targets_of(old[cut], a[cut]), 40, 4) for cut in cuts)
    torch.testing.assert_close(whole, parts)


def test_at_ratio_1_the_gradient_is_the_policy_gradient():
    logp = torch.randn(9, requires_grad=True)
    a = torch.randn(9)
    policy_loss(logp, targets_of(logp.detach(), a), 9, 1, kl_coef=0.5).backward()
    torch.testing.assert_close(logp.grad, -a / 9)


def test_beyond_the_clip_there_is_no_gradient_and_k3_is_never_negative():
    logp, a = torch.tensor([0.5, -0.5, 0.5, -0.5], requires_grad=True), torch.tensor([1.0, -1, -1, 1])
    policy_loss(logp, targets_of(torch.zeros(4), a), 4, 1, kl_coef=0.0).backward()
    assert (logp.grad != 0).tolist() == [False, False, True, True]
    for x in torch.linspace(-50, 50, 101):
        targets = targets_of(torch.zeros(1), torch.ones(1))
        assert tracerl.diagnose(x[None], torch.zeros(1), targets, 0.2)[0][0] >= 0
        assert policy_loss(x[None], targets, 1, 1).isfinite()
    far = torch.tensor([-12.0], requires_grad=True)  # the KL pulls back however far the policy has gone
    policy_loss(far, targets_of(torch.zeros(1), torch.zeros(1)), 1, 1, kl_coef=1.0).backward()
    assert far.grad.item() == pytest.approx(-1, abs=1e-3)


# ------------------------------------------------------------------------------------------------- the update


def one_update(model, kept, lr=0.1, loss=policy_loss, **changes):
    """Steps 4 and 5 -> the figures, the weights, and the batches."""
    args = settings(**changes)
    trainers = Trainers(model, torch.optim.SGD(model.parameters(), lr=lr), None, None)
    plan = plan_of(args, trainers, loss)._replace(lr=lr)
    batches = tracerl.make_batches(kept, trainers, plan, args, 1)
    tracerl.old_logprobs(model, batches, plan, args)
    metrics = tracerl.learn(trainers, batches, plan, args)
    return metrics, torch.cat([p.detach().flatten() for p in model.parameters()]), batches


def test_the_first_update_has_ratio_1_and_no_gap():
    model = random_model()
    kept = keep(rollouts_with_rewards(model))
    metrics, _, _ = one_update(model, kept)
    assert metrics["ratio_max"] == 1 and metrics["kl"] == 0 and metrics["clip_fraction"] == 0
    assert metrics["gap_max"] < 1e-4 and metrics["trained_tokens"] == sum(r.num_tokens for r in kept)


@pytest.mark.parametrize("kind", ["sdar", "llada"])
def test_the_gradient_does_not_depend_on_micro_batches(kind):
    results = []
    for tokens in (1, 100, 100_000):
        model = random_model(kind)
        kept = keep(rollouts_with_rewards(model))
        results.append(one_update(model, kept, tokens_per_micro_batch=tokens))
    for metrics, weights, _ in results[1:]:
        torch.testing.assert_close(weights, results[0][1], atol=1e-6, rtol=1e-5)
        for name, number in metrics.items():
            assert number == pytest.approx(results[0][0][name], rel=1e-4, abs=2e-6), name


def test_the_clip_acts_on_the_gradient_of_the_whole_update():
    """With a bound below the norm, the step is lr * bound long, however small the micro-batches are."""
    for tokens in (1, 100_000):
        model = random_model()
        start = torch.cat([p.detach().flatten() for p in model.parameters()])
        kept = keep(rollouts_with_rewards(model))
        metrics, weights, _ = one_update(model, kept, tokens_per_micro_batch=tokens, max_grad_norm=0.05)
        assert metrics["gradient_norm"] > 0.1
        assert (weights - start).norm().item() == pytest.approx(0.1 * 0.05, rel=1e-3)


def test_later_updates_use_the_start_of_step_policy():
    """Two epochs: logp_old is replayed before the first update, and equals the recorded log-probabilities."""
    model = random_model()
    kept = keep(rollouts_with_rewards(model))
    metrics, _, batches = one_update(model, kept, epochs=2, minibatches=2)
    assert metrics["ratio_max"] > 1.001 and metrics["gap_max"] < 1e-4 and len(batches) == 2
    for rows in [rows for batch in batches for rows in batch.rows]:
        torch.testing.assert_close(rows.targets.logp_old, rows.targets.logp, atol=1e-4, rtol=0)


def test_every_kept_rollout_is_trained_once_per_epoch():
    groups = [[Rollout([g + 3], [i + 3], 1, [1]) for i in range(4)] for g in range(7)]
    args, trainers = settings(minibatches=3), Trainers(random_model(), None, None, None)
    deal = lambda kept: tracerl.make_batches(kept, trainers, plan_of(args, trainers), args, 5)
    batches = [batch.rollouts for batch in deal(sum(groups, []))]
    assert len(batches) == 3 and sorted((r.prompt[0], r.response[0]) for b in batches for r in b) == [
        (g + 3, i + 3) for g in range(7) for i in range(4)]
    assert all(len({r.response[0] for r in b if r.prompt == [g + 3]}) in (0, 4)
               for b in batches for g in range(7))
    assert len(deal(groups[0])) == 1 and deal([]) == []


def test_a_gradient_that_is_not_finite_changes_nothing():
    model = random_model()
    kept = keep(rollouts_with_rewards(model))
    start = torch.cat([p.detach().flatten() for p in model.parameters()])
    kept[0].advantage = [float("nan")] * len(kept[0].response)
    metrics, weights, _ = one_update(model, kept)
    assert torch.equal(start, weights) and metrics["skipped_updates"] == 1


def test_an_update_raises_the_probability_of_what_was_rewarded():
    model = random_model()
    kept = keep(rollouts_with_rewards(model))
    total = lambda: sum(logp[:r.num_tokens].sum().item() * r.advantage[0]
                        for r, logp in zip(kept, rollout.replay(model, kept)))
    before = total()
    one_update(model, kept, lr=0.003)
    assert total() > before


def test_larger_blocks_are_learnt_by_imitation_in_both_sizes_then_by_tracerl():
    model = random_model(block_size=8)
    trainers = Trainers(model, None, None, None)
    args = settings(rollout_block_size=4, adapt_steps=10, adapt_lr=0.5, lr=0.1, warmup=2)
    early, late = (plan_of(args, trainers, step=step) for step in (10, 11))
    assert early.block_sizes == (8, 4) and early.rollout_block_size == 4 and early.lr == 0.5
    assert late.block_sizes == (8,) and late.rollout_block_size == 8 and late.lr == 0.05
    rollouts = rollouts_with_rewards(model, block_size=4)
    kept, _ = give_advantages(rollouts, None, early, args)
    assert kept == rollouts and all(set(r.advantage) == {r.reward} for r in kept)
    batch, = tracerl.make_batches(kept, trainers, early, args, 10)
    views = torch.cat([rows.layout.view.flatten() for rows in batch.rows])
    position = torch.cat([rows.layout.position.flatten() for rows in batch.rows])
    assert len(batch.rows) == 2 and (views[position > 0] > 0).any()
    full = Trainers(random_model("llada", block_size=8), None, None, None)
    assert plan_of(args, full, step=10).rollout_block_size == 4
    early, late = plan_of(args, full, step=10), plan_of(args, full)
    assert early._replace(rollout_block_size=8) == late


def test_a_broken_replay_law_stops_a_float32_run():
    args = settings()
    show.check_gap(dict(gap=1e-6, gap_max=2e-4), args, {})
    for line in (dict(gap=1e-3, gap_max=2e-3), dict(gap=1e-5, gap_max=0.1),
                 dict(gap=float("nan"), gap_max=float("nan"))):
        with pytest.raises(RuntimeError, match="replay law"):
            show.check_gap(line, args, {})
        show.check_gap(line, settings(cache="dual"), {})  # an approximation, said at the start


def test_a_wide_gap_in_bfloat16_is_said_and_stops_a_run_in_the_third_step(capsys):
    args, progress = settings(dtype="bfloat16"), {}
    wide, narrow = dict(gap=0.2, gap_max=1.0), dict(gap=0.01, gap_max=0.5)
    for line in (wide, wide, narrow, wide, wide):
        show.check_gap(line, args, progress)
    assert capsys.readouterr().out.count("WARNING: the replay law is broken") == 4
    with pytest.raises(RuntimeError, match="replay law"):
        show.check_gap(wide, args, progress)
    show.check_gap(wide, settings(dtype="bfloat16", max_gap=0.3), {})


@pytest.mark.parametrize("kind", ["sdar", "llada"])
def test_the_self_check_passes_and_finds_what_does_not_replay(kind, monkeypatch, capsys):
    model, args = random_model(kind), settings()
    tracerl.self_check(model, args)
    assert "self-check" in capsys.readouterr().out
    other = random_model(kind, seed=1)
    monkeypatch.setattr(rollout, "replay", lambda model, *more, **settings: replay(other, *more, **settings))
    with pytest.raises(RuntimeError, match="replay law"):
        tracerl.self_check(model, args)


def test_truncated_importance_weighs_every_token_by_what_decoding_recorded():
    """The gradient with weights is that of advantages multiplied by them, at most by 2."""
    model = random_model()
    rollouts = rollouts_with_rewards(model)
    kept, _ = give_advantages(rollouts, None, plan_of(settings()), settings())
    for r in kept:
        shift = [(j % 4 - 1) * 0.4 for j in range(len(r.logp))]  # as if decoding had rounded so
        r.logp = [x - s for x, s in zip(r.logp, shift)]
        r.token_rewards = [min(2.0, math.exp(s)) for s in shift]  # what the weights should be
    plain = model_gradient(model, kept, settings(importance="truncated"))
    for r in kept:
        r.advantage = [a * w for a, w in zip(r.advantage, r.token_rewards)]
    weighted = model_gradient(model, kept, settings())
    for ours, theirs in zip(plain, weighted):
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-3)


def test_what_is_asked_of_the_policy_is_asked_of_the_value_model():
    tiny = str(FIXTURES / "tiny")
    args = tracerl.parse_args([f"--model={tiny}", "--train_data=a", "--eval_data=b", "--advantage=value"])
    trainers, _ = tracerl.load_start(args)
    for layers in (trainers.model.layers, trainers.critic.backbone.layers):
        assert all(layer.has_gradient_checkpointing for layer in layers)  # the default with --model
    assert not trainers.critic.value_head.weight.any()
    with pytest.raises(ValueError, match="--importance truncated needs --views trace and --shrink 1"):
        tracerl.load_start(settings(importance="truncated", shrink=2, model=tiny))


def model_gradient(model, kept, args):
    """The gradient of one update, which moves nothing."""
    gradients = []

    def keep(model, optimizer, max_norm):
        gradients.extend(p.grad.clone() for p in model.parameters())
        model.zero_grad()
        return 1.0, True

    trainers = Trainers(model, None, None, None)
    batch, = tracerl.make_batches(kept, trainers, plan_of(args), args, 1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parallel, "optimizer_step", keep)
        tracerl.update(model, None, batch, policy_loss, True, args)
    return gradients


def test_random_masks_are_theirs_alone_and_coupled_ones_make_every_token_a_target_once():
    model = random_model()
    rollouts = rollouts_with_rewards(model)
    random, coupled = (all_rows(rollouts, model.config, views=rollout.VIEWS[name])
                       for name in ("random", "coupled"))
    assert sorted(seen(coupled)) == [(n, i) for n, r in enumerate(rollouts) for i in range(len(r.response))]
    assert 0.3 < len(seen(random)) / len(seen(coupled)) < 0.7
    alone = all_rows(rollouts[5:6], model.config, views=rollout.random_views)
    assert [j for n, j in seen(random) if n == 5] == [j for _, j in seen(alone)]


@pytest.mark.parametrize("views", ["random", "coupled"])
def test_the_baselines_go_through_the_same_update(views):
    results = []
    for tokens in (1, 100_000):
        model = random_model()
        kept = keep(rollouts_with_rewards(model))
        results.append(one_update(model, kept, views=views, minibatches=2, tokens_per_micro_batch=tokens))
    assert results[0][0]["trained_tokens"] == results[1][0]["trained_tokens"] > 0
    torch.testing.assert_close(results[0][1], results[1][1], atol=1e-6, rtol=1e-5)


def test_a_value_model_learns_the_returns_and_the_policy_waits_for_its_warm_up():
    model = random_model()
    critic, args = value.ValueModel(model), settings(advantage="value", value_warmup=30)
    optimizers = [torch.optim.Adam(m.parameters(), lr=3e-3) for m in (model, critic)]
    trainers = Trainers(model, optimizers[0], critic, optimizers[1])
    start = [p.clone() for p in model.parameters()]
    rollouts = rollouts_with_rewards(model)

    def one_step(step):
        plan = plan_of(args, trainers, step=step)
        kept, line = give_advantages(rollouts, critic, plan, args)
        batches = tracerl.make_batches(kept, trainers, plan, args, 1)
        assert kept == rollouts and plan.updates_policy == (step > 30)
        return line | tracerl.learn(trainers, batches, plan, args)

    lines = [one_step(step) for step in range(1, 31)]
    assert lines[0]["explained_variance"] == 0 and lines[-1]["explained_variance"] > 0.5
    assert lines[-1]["value_loss"] < 0.3 * lines[0]["value_loss"] and "ratio_max" not in lines[-1]
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), start))
    for r in rollouts:  # gamma = lambda = 1: the return is the reward, the advantage what the value missed
        assert r.returns[:r.num_tokens] == pytest.approx([r.reward] * r.num_tokens)
        assert r.advantage[:r.num_tokens] == pytest.approx(
            [r.reward - v for v in r.value_old[:r.num_tokens]], abs=1e-5)
    assert one_step(31)["ratio_max"] == 1
    assert not all(torch.equal(p, q) for p, q in zip(model.parameters(), start))


@pytest.mark.parametrize("post_num", [0, 3])
def test_process_rewards_are_what_is_returned(post_num):
    model = random_model()
    rollouts = rollouts_with_rewards(model, num_groups=1)
    for i, r in enumerate(rollouts):  # each token's own, and not their sum at the end once more
        r.token_rewards = [float((i + j) % 2) for j in range(r.num_tokens)]
        r.reward = sum(r.token_rewards)
    args = settings(post_num=post_num, advantage="value")
    critic = value.ValueModel(model)
    give_advantages(rollouts, critic, plan_of(args, Trainers(model, None, critic, None)), args)
    for r in rollouts:
        steps = sorted(set(r.step_map[:r.num_tokens + post_num]))
        places = [[j for j in range(min(r.num_tokens + post_num, len(r.response))) if r.step_map[j] == t]
                  for t in steps]
        rewards = r.token_rewards + [0.0] * len(r.response)
        later = sum(fmean(rewards[j] for j in at) for at in places[1:])
        assert [r.returns[j] for j in places[0]] == pytest.approx([rewards[j] + later for j in places[0]])


# -------------------------------------------------------------------------------------------------- plug-ins


REWARDS = """
import numpy, torch
def short(problem, text, tokens): return -len(tokens)
def each(problem, text, tokens): return [0.5] * len(tokens)
def record(problem, text, tokens, rollout): return torch.tensor(float(max(rollout.step_map)))
def numpys(problem, text, tokens): return numpy.float32(0.25)
def few(problem, text, tokens): return [1.0]
def nan(problem, text, tokens): return float("nan")
def word(problem, text, tokens): return "good"
def none(problem, text, tokens): return None
"""


def test_a_reward_function_gives_one_number_or_one_per_token(tmp_path):
    (tmp_path / "mine.py").write_text(REWARDS)
    rollouts, problems = [Rollout([3], [4, 5, 1, 1], 3, [1, 2, 3, 4])], [eval_math.Problem("1+1=", "")]

    def rewarded(name):
        function = runs.load_function(f"{tmp_path}/mine.py:{name}", {}, "--reward")
        eval_math.give_rewards(rollouts, problems, sft.tiny_tokenizer(), function)
        return rollouts[0].reward, rollouts[0].token_rewards

    assert rewarded("short") == (-3, []) and rewarded("each") == (1.5, [0.5] * 3)
    assert rewarded("record") == (4.0, []) and rewarded("numpys") == (0.25, [])
    for name, message in (("few", "1 numbers for 3 tokens"),
                          ("nan", "gave nan for '1.1=': a reward is a finite number"), 
                          ("word", "gave 'good'"), ("none", "gave None")):
        with pytest.raises(ValueError, match=message):
            rewarded(name)
    for spec, message in (("nowhere.py:f", "no file 'nowhere.py'"),
                          (f"{tmp_path}/mine.py:g", "no function 'g'"),
                          ("best", "no file 'best'; give file.py:function, or one of math")):
        with pytest.raises(ValueError, match=message):
            runs.load_function(spec, dict(math=None), "--reward")


def test_a_sequence_ratio_sees_whole_responses():
    """GSPO by hand, and the same gradient however the rows are cut."""
    logp, old = torch.randn(2, 7, generator=torch.Generator().manual_seed(0))
    owner = torch.tensor([5, 5, 9, 9, 9, 2, 2])
    advantage = torch.tensor([1.0, 1, -2, -2, -2, 0.5, 0.5])
    total = 0.0
    for n, A in ((5, 1.0), (9, -2.0), (2, 0.5)):
        ratio = (logp - old)[owner == n].mean().exp()
        total -= torch.minimum(ratio * A, ratio.clamp(0.8, 1.2) * A)
    ours = forks.sequence_ratio(logp, targets_of(old, advantage, owner), 7, 3, 0.2, 0.0)
    torch.testing.assert_close(ours, total / 3)
    weights = []
    for tokens in (300, 100_000):
        model = random_model("llada")
        kept = keep(rollouts_with_rewards(model))
        metrics, after, _ = one_update(model, kept, loss=forks.sequence_ratio, tokens_per_micro_batch=tokens)
        assert metrics["skipped_updates"] == 0
        weights.append(after)
    torch.testing.assert_close(*weights, atol=1e-6, rtol=1e-5)


def test_forks_are_what_their_papers_say():

    rewards = torch.tensor([[1.0, 0, 0, 1], [0.5, 0.5, 0.5, 0.5]])
    assert forks.centered(rewards).tolist() == [[0.5, -0.5, -0.5, 0.5], [0] * 4]
    weights = forks.softmax_weights(rewards)
    assert weights.sum(-1).tolist() == pytest.approx([0, 0], abs=1e-6) and not weights[1].any()
    logp, zero = torch.tensor([0.25, 0.25]), torch.zeros(2)
    targets = targets_of(zero, torch.tensor([1.0, -1.0]))
    ratio = 2.718281828**0.25  # 1.284: above 1.28
    assert forks.clip_higher(logp, targets, 1, 1, 0.2, 0).item() == pytest.approx(-1.28 + ratio, abs=1e-6)
    constant = forks.constant_length(logp, targets, 7, 2, 0.2, 0).item()
    assert constant == pytest.approx((-1.2 + ratio) / 40, abs=1e-6)
    assert forks.ratio_free(logp, targets, 4, 1, 0, 0).item() == pytest.approx(0)
    r = Rollout([3], [5, 6, 7, 8], 4, [1, 3, 1, 2])
    assert forks.fully_masked(r, [0, 1, 2, 3], 1, None) == [([0, 1, 2, 3], [0, 1, 2, 3])]
    chosen = forks.some_steps(r, [0, 1, 2, 3], 1, random.Random(1))
    assert 0 < len(chosen) < 3 and all(view in rollout.trace_views(r, [0, 1, 2, 3], 1) for view in chosen)


# --------------------------------------------------------------------------------------- the authors' numbers


def authors_case(stem, name):
    case = next(c for c in fixture_cases(f"{stem}_tracerl") if c["id"] == name)
    data = fixture_tensors(f"{stem}_tracerl_{name}")
    model, _ = checkpoints.load_model(FIXTURES / "authors" / stem, block_size=case.get("block_size"))
    rollouts = [Rollout(p, r, len(r), s, canvas=len(r) if model.config.is_full else 0)
                for p, r, s in zip(case["prompts"], case["responses"], case["step_maps"])]
    return case, data, model, rollouts


def fixture_rows(case, data, owners):
    """Which row of the fixture trains a token -> {(response, place): row}."""
    return {(owners[row], column - case["L0"]): row for row, column in data["p_mask"].nonzero().tolist()}


def at_token(where, rows, table, L0):
    """A (fixture rows, columns) table, or one with a value per row, at our targets, in our order."""
    return torch.stack([table[where[key]] if table.dim() == 1 else table[where[key], key[1] + L0]
                        for key in seen(rows)])


def only(rows, keys):
    """The rows with these targets only."""
    pick = torch.tensor([key in keys for key in seen(rows)])
    return Rows(rows.tokens, rows.layout, Targets(*(t[pick] for t in rows.targets)))


@pytest.mark.parametrize("name", ["aligned_b4", "aligned_b4_clamp", "aligned_b4_advmatrix",
                                  "aligned_b4_shrink2", "aligned_b8_shrink3", "rightpad_b4_postnum1"])
def test_the_block_loss_and_gradient_are_the_authors(name, authors_policy):
    """Theirs: the sum is divided by rows and padded length L1 (ours: trained tokens), and the KL is
    exp(-d) - 1 + d (ours: exp(d) - 1 - d), so the KL part is written out here; the policy part and all
    log-probabilities are ours."""
    case, data, model, rollouts = authors_case("sdar", name)
    # their pads are visible tokens of the trace; the first post_num of each row are trained
    for r in rollouts:
        pad = case["L1"] - len(r.response)
        r.response, r.step_map = r.response + [2] * pad, r.step_map + [max(r.step_map) + 1] * pad
    where = fixture_rows(case, data, case["row_to_response"])
    rows = only(all_rows(rollouts, model.config, shrink=case["shrink"]), where)
    logp, _ = rollout.forward_rows(model, rows)
    old, advantage = (at_token(where, rows, data[name], case["L0"]) for name in ("logp_old", "adv"))
    scale = case["n_rows"] * case["L1"]
    targets = rows.targets._replace(logp_old=old, advantage=advantage)
    policy = policy_loss(logp, targets, scale, 1, clip_eps=case["eps"], kl_coef=0.0)
    d = (logp - old).clamp(-10, 10)
    loss = policy + case["beta"] * ((-d).exp() - 1 + (logp - old)).sum() / scale
    loss.backward()
    assert len(rows.targets.token) == case["n_trained_tokens"]
    assert policy.item() == pytest.approx(case["policy_loss"], abs=1e-5)
    assert loss.item() == pytest.approx(case["loss"], abs=1e-5)
    compare_gradients(model, case, data)


@pytest.mark.parametrize("stem, name", [
    ("dream", "nopad_shrink1"), ("dream", "nopad_shrink3"), ("llada", "nopad_shrink3")])
def test_the_full_attention_loss_and_gradient_are_the_authors(stem, name, authors_policy):
    """Theirs: policy part divided by rows and the row's trained tokens; KL, of the other form, by rows."""
    case, data, model, rollouts = authors_case(stem, name)
    counts = [len(set(r.step_map)) for r in rollouts]
    where = fixture_rows(
        case, data, [n for n, count in enumerate(counts) for _ in range(-(-count // case["shrink"]))])
    rows = all_rows(rollouts, model.config, shrink=case["shrink"])
    logp, _ = rollout.forward_rows(model, rows)
    old = at_token(where, rows, data["logp_old"], case["L0"] - (stem == "dream"))
    reward, at_row = (at_token(where, rows, table, 0)
                      for table in (data["row_reward"], torch.arange(case["n_rows"])))
    per_row = torch.bincount(at_row, minlength=case["n_rows"])[at_row]
    policy = sum(policy_loss(logp[at_row == row], targets_of(old[at_row == row], reward[at_row == row]),
                             per_row[at_row == row][0] * case["n_rows"], 1, clip_eps=case["eps"], kl_coef=0.0)
                 for row in range(case["n_rows"]))
    d = logp - old
    loss = policy + case["beta"] * ((-d).exp() - 1 + d).sum() / case["n_rows"]
    loss.backward()
    assert policy.item() == pytest.approx(case["policy_loss"], abs=1e-5)
    assert loss.item() == pytest.approx(case["loss"], abs=1e-5)
    compare_gradients(model, case, data)


def compare_gradients(model, case, data):
    for name, p in model.named_parameters():
        theirs = checkpoints.family_name(model.config, name)
        if theirs in case["grad_norms"]:
            assert p.grad.norm().item() == pytest.approx(case["grad_norms"][theirs], rel=1e-4, abs=1e-7), name
        if f"grad.{theirs}" in data:
            expected = data[f"grad.{theirs}"]
            assert (p.grad - expected).norm() <= 1e-4 * expected.norm(), name


def test_the_authors_shifted_layout_is_not_ours(authors_policy):
    """Where K does not divide a prompt's length: their blocks start at the response, the sampler's at 0."""
    case, data, model, rollouts = authors_case("sdar", "leftpad_b4")
    ours = rollout.replay(model, rollouts)
    theirs = [torch.zeros(len(r.response)) for r in rollouts]
    for row, owner in enumerate(case["row_to_response"]):
        at = data["p_mask"][row, case["L0"]:][:len(rollouts[owner].response)]
        theirs[owner][at] = data["logp_self"][row, case["L0"]:][:len(at)][at]
    off = torch.cat([(a - b).abs() for a, b in zip(ours, theirs)])
    assert off.mean() > 0.3


# -------------------------------------------------------------------------------------------------- the flags


@pytest.mark.parametrize("flags, message", [
    (["--steps=0"], "--steps: must be at least 1, got 0"), (["--lr=-1"], "--lr: must be above 0"),
    (["--group_size=1"], "--group_size"), (["--keep_range", "0.9", "0.1"], "--keep_range"),
    (["--slots=0"], "--slots"), (["--block_size=0"], "--block_size"), (["--top_p=0"], "--top_p"),
    (["--strategy=best"], "invalid choice"), (["--name=a/b"], "plain folder name"),
    (["--unknown=1"], "unrecognized"), (["--step=5"], "unrecognized"),
    (["--model=x"], "--train_data and --eval_data"), (["--temperature=0"], "--temperature"),
    (["--top_k=1"], "greedy"),
    (["--lr=nan"], "--lr"),
])
def test_a_bad_flag_is_refused_by_name(flags, message, capsys):
    with pytest.raises(SystemExit):
        tracerl.parse_args(flags)
    assert message in capsys.readouterr().err


def test_defaults_are_the_embedded_tasks_or_the_papers():
    assert tracerl.parse_args([]).group_size == 16 and tracerl.parse_args([]).lr == 1e-4
    paper = tracerl.parse_args(["--model=m", "--train_data=a", "--eval_data=b"])
    assert (paper.prompts, paper.group_size, paper.lr, paper.steps, paper.keep_range) == (
        64, 16, 1e-6, 80, [0.2, 0.8])
    real = ["--model=m", "--train_data=a", "--eval_data=b"]
    assert tracerl.parse_args([*real, "--lr=2e-6"]).lr == 2e-6
    assert tracerl.parse_args([*real, "--reward=mine.py:f"]).keep_range is None  # a scale of its own


def test_a_canvas_stays_what_it_was_while_larger_blocks_are_learnt(tmp_path, monkeypatch):
    """Full attention has one canvas whatever the block size: a step of adapting replays what was sampled."""
    monkeypatch.chdir(tmp_path)
    checkpoints.save_checkpoint(random_model("llada"), sft.tiny_tokenizer(), "random")
    (tmp_path / "few.jsonl").write_text('{"problem": "1+1=", "answer": "2"}\n')
    tracerl.main(["--model=random", "--train_data=few.jsonl", "--eval_data=few.jsonl", "--steps=1",
                  "--prompts=1", "--group_size=4", "--max_new_tokens=14", "--block_size=8",
                  "--rollout_block_size=4"])
    assert json.loads(open("runs/tracerl/metrics.jsonl").read())["gap_max"] < 1e-4


def test_all_groups_dropped_is_a_normal_event(tmp_path, monkeypatch):
    """An untrained model is never right: no update, weights unchanged, metrics and summary all the same."""
    monkeypatch.chdir(tmp_path)
    checkpoints.save_checkpoint(random_model(), sft.tiny_tokenizer(), "random")
    (tmp_path / "few.jsonl").write_text('{"problem": "1+1=", "answer": "2"}\n' * 20)
    tracerl.main(["--model=random", "--train_data=few.jsonl", "--eval_data=arithmetic-test",
                  "--dev_data=few.jsonl", "--steps=2", "--prompts=3", "--group_size=2",
                  "--max_new_tokens=8", "--eval_every=1"])
    lines = [json.loads(line) for line in open("runs/tracerl/metrics.jsonl")]
    assert len(lines) == 2 and all(line["kept_groups"] == 0 and line["gap_max"] < 1e-4 for line in lines)
    model, _ = checkpoints.load_model("runs/tracerl/checkpoints/step-2")
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), random_model().parameters()))
    summary = json.load(open("runs/tracerl/summary.json"))
    assert summary["after"]["dynamic"]["n"] == 400 and summary["seed"] == 0
    assert set(summary["before"]) == {"dynamic", "static", "greedy"}
