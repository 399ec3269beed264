"""Laws of the update: advantages, the loss, and a gradient that does not depend on how the work is cut."""

import functools
import json
from statistics import fmean

import pytest
import torch
from conftest import (
    COMPUTES, FAST, FIXTURES, all_rows, decode, fixture_cases, fixture_tensors, random_model, random_prompts,
    seen)

import eval_math
import rollout
import tracerl
import value
from model import Rows, Targets
from plumbing import checkpoints, flags, machine, parallel, runs, show, tiny
from rollout import PLAIN, Decoding, ReplayLaw, Rollout
from tracerl import Learners, Method, Recipe, give_advantages, group_advantages, policy_loss

DECODING = Decoding(max_new_tokens=14, threshold=0.4)


def recipe_of(**changes):
    """The numbers of a late step, with what the tests want otherwise."""
    return Recipe(**dict(group_size=4, shrink=1, lr=0.1, value_warmup=0) | changes)


def method_of(**changes):
    """The usual functions, and the fast twins."""
    usual = Method(eval_math.math_reward, group_advantages, policy_loss, rollout.trace_views, DECODING, FAST,
                   ReplayLaw(is_float32=True))
    return usual._replace(**changes)


def learners_of(model, lr=0.1):
    """The policy alone, moved by plain gradients."""
    return Learners(parallel.Learner(model, torch.optim.SGD(model.parameters(), lr=lr)))


def flat(model):
    """All weights in one row."""
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def targets_of(logp_old, advantage, **others):
    """Targets with these numbers; others: more of them. The rest are zeros."""
    zero = torch.zeros_like(logp_old)
    fields = {name: zero.long() for name in Targets._fields} | dict(
        masked_share=zero + 1, logp=logp_old, value_old=zero, returns=zero, logp_old=logp_old,
        advantage=advantage)
    return Targets(**fields | others)


def groups_of(model, num_groups=3, group_size=4, **settings):
    """Rollouts of several prompts, group by group, with rewards of 0 and 1."""
    prompts = [p for p in random_prompts(range(3, 3 + num_groups)) for _ in range(group_size)]
    rollouts = decode(model, prompts, max_new_tokens=14, threshold=0.4, **settings)
    for i, r in enumerate(rollouts):
        r.group = i // group_size
        r.reward = float(i * 7 % 3 == 0)
    return rollouts


def keep(rollouts, method=None, **changes):
    """Stage 3 without a value model -> the rollouts that are kept."""
    return give_advantages(rollouts, None, method or method_of(), recipe_of(**changes))[0]


@pytest.fixture
def unclipped(monkeypatch):
    """Updates as long as their gradient."""
    monkeypatch.setattr(
        parallel, "optimizer_step", functools.partial(parallel.optimizer_step, max_grad_norm=1e9))


def one_update(model, kept, method=None, lr=0.1, **changes):
    """Stages 4 and 5 -> the numbers of the log, the weights, and the batches."""
    method = method or method_of()
    recipe = recipe_of(lr=lr, **changes)
    batches, gap = tracerl.old_logprobs(learners_of(model), kept, kept, method, recipe, 1)
    line = tracerl.learn(learners_of(model), batches, kept, method, recipe, 1)
    return line | gap, flat(model), batches


# ------------------------------------------------------------------------------------------------- advantages


def test_group_advantages_are_standard_scores_within_the_group():
    rewards = torch.tensor([[1.0, 0, 0, 1], [0.5, 0.5, 0.5, 0.5], [1, 0, 0, 0]])
    a = group_advantages(rewards)
    torch.testing.assert_close(a[0], torch.tensor([1.0, -1, -1, 1]))
    assert torch.equal(a[1], torch.zeros(4))
    torch.testing.assert_close(a[2], torch.tensor([3.0, -1, -1, -1]) / 3**0.5)
    for reward in (85.3, -1e6, 1 / 3):  # the mean of equal numbers may differ from them by rounding
        assert not group_advantages(torch.full((1, 16), reward)).any()


def test_a_group_is_kept_or_dropped_whole():
    make = lambda rewards: [Rollout([1], [2, 3], 2, [1, 2], reward=r) for r in rewards]
    rollouts = make([1.0, 1, 1, 1, 0, 0, 0, 0, 1, 0, 0, 0, 1, 1, 1, 0, 0, 1, 0, 1])
    assert keep(rollouts) == rollouts[8:]
    assert keep(rollouts, keep_range=(0.3, 0.8)) == rollouts[12:]
    assert keep(rollouts[:8]) == []
    assert all(r.advantage == [pytest.approx(3**0.5 if r.reward else -(3**-0.5))] * 2 for r in rollouts[8:12])


def test_advantages_may_be_per_token_and_see_the_records():
    """One function gives each token its own; a token behind the end of the answer gets none of another's."""
    model = random_model()
    rollouts = groups_of(model)

    def by_step(rewards, rollouts):
        out = torch.zeros(len(rollouts), max(len(r.response) for r in rollouts))
        for row, r in zip(out, rollouts):
            row[:r.num_tokens] = torch.tensor(r.step_map[:r.num_tokens]) * (r.reward - 0.5)
        return out.view(*rewards.shape, -1)

    assert keep(rollouts, method_of(advantage=by_step)) == rollouts
    for r in rollouts:
        trained = [step * (r.reward - 0.5) for step in r.step_map[:r.num_tokens]]
        assert r.advantage == pytest.approx(trained + [0.0] * (len(r.response) - r.num_tokens))


def test_an_advantage_that_does_not_fit_is_refused():
    """The textbook's (r - mean) / std is 0 / 0 where all rewards of a group are equal."""
    rollouts = [Rollout([1], [2, 3], 2, [1, 2], reward=1.0) for _ in range(4)]
    textbook = lambda rewards: (rewards - rewards.mean(-1, keepdim=True)) / rewards.std(-1, keepdim=True)
    for advantage in (textbook, lambda rewards: rewards[:, :2]):
        with pytest.raises(ValueError, match=r"--advantage gives .* must give \(1, 4\) or \(1, 4, 2\)"):
            keep(rollouts, method_of(advantage=advantage))


def test_process_rewards_without_a_value_model_are_refused():
    rollouts = [Rollout([1], [2, 3], 2, [1, 2], reward=1.0, token_rewards=[0.5, 0.5]) for _ in range(4)]
    with pytest.raises(ValueError, match="takes one per response: use --advantage value"):
        keep(rollouts)
    own = lambda rollouts: torch.tensor([[r.token_rewards for r in rollouts]])
    assert keep(rollouts, method_of(advantage=own)) == rollouts and rollouts[0].advantage == [0.5, 0.5]


# --------------------------------------------------------------------------------------------------- the loss


def test_the_loss_is_the_formula():
    logp, old, a = torch.randn(3, 40, generator=torch.Generator().manual_seed(0))
    loss = policy_loss(logp, targets_of(old, a), 50, clip_eps=0.2, kl_coef=0.3)
    total = 0.0
    for x, y, adv in zip(logp.tolist(), old.tolist(), a.tolist()):
        ratio = torch.tensor(x - y).exp().item()
        total += -min(ratio * adv, min(max(ratio, 0.8), 1.2) * adv) + 0.3 * (ratio - 1 - (x - y))
    assert loss.item() == pytest.approx(total / 50, rel=1e-5)


STEPPED = dict(gradient_norm=0.0, skipped_updates=0)  # what optimizer_step gives


def test_the_numbers_of_the_log_are_what_they_say():
    logp, old = torch.randn(2, 40, generator=torch.Generator().manual_seed(0))
    parts = [(torch.tensor(0.25), logp[half], old[half].abs(), old[half])
             for half in (slice(0, 7), slice(7, 40), slice(0, 0))]  # the last: a dummy, without targets
    found = show.step_numbers([show.own_sums(parts, 40, 0.2) | STEPPED], [])
    ratio = (logp - old).exp()
    k3 = ratio - 1 - (logp - old)
    expected = dict(loss=0.75, kl=k3.mean(), clip_fraction=((ratio - 1).abs() > 0.2).float().mean(),
                    entropy=old.abs().mean(), ratio_max=ratio.max(), trained_tokens=40,
                    gradient_norm=0, skipped_updates=0)
    assert found == pytest.approx({name: float(x) for name, x in expected.items()}, rel=1e-5)
    assert show.own_sums(parts[2:], 0, 0.2)["ratio_max"] == 0  # a process without targets


def test_losses_of_parts_add_up_to_the_loss_of_the_whole():
    logp, old, a = torch.randn(3, 40, generator=torch.Generator().manual_seed(1))
    whole = policy_loss(logp, targets_of(old, a), 40, 0.2, 0.01)
    cuts = [slice(i, i + 7) for i in range(0, 40, 7)]
    torch.testing.assert_close(whole, sum(policy_loss(logp[cut], targets_of(old[cut], a[cut]), 40, 0.2, 0.01)
                                          for cut in cuts))


def test_at_ratio_1_the_gradient_is_the_policy_gradient():
    logp = torch.randn(9, requires_grad=True)
    a = torch.randn(9)
    policy_loss(logp, targets_of(logp.detach(), a), 9, 0.2, kl_coef=0.5).backward()
    torch.testing.assert_close(logp.grad, -a / 9)


def test_beyond_the_clip_there_is_no_gradient_and_k3_is_never_negative():
    logp, a = torch.tensor([0.5, -0.5, 0.5, -0.5], requires_grad=True), torch.tensor([1.0, -1, -1, 1])
    policy_loss(logp, targets_of(torch.zeros(4), a), 4, 0.2, kl_coef=0.0).backward()
    assert (logp.grad != 0).tolist() == [False, False, True, True]
    for x in torch.linspace(-50, 50, 101):
        targets = targets_of(torch.zeros(1), torch.ones(1))
        parts = [(torch.zeros(()), x[None], torch.zeros(1), torch.zeros(1))]
        assert show.own_sums(parts, 1, 0.2)["kl"] >= 0
        assert policy_loss(x[None], targets, 1, 0.2, 0.01).isfinite()
    # The KL pulls back from below however far the policy has gone. From above it never pushes on.
    for x, slope in ((-12.0, -1), (9.0, torch.tensor(9.0).exp() - 1), (11.0, 0)):
        far = torch.tensor([x], requires_grad=True)
        policy_loss(far, targets_of(torch.zeros(1), torch.zeros(1)), 1, 0.2, kl_coef=1.0).backward()
        assert far.grad.item() == pytest.approx(float(slope), rel=1e-3, abs=1e-3)


# ------------------------------------------------------------------------------ what a loss of one's own gets


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("name", COMPUTES)
def test_the_entropy_given_to_a_loss_has_its_gradient(name, temperature):
    """Against autograd through log_softmax at every target's own state, alone and beside a log-probability."""
    model = random_model()
    rollouts = groups_of(model, 1)
    rows = all_rows(rollouts, model.config, trained_only=True)
    weight = torch.randn(2, len(rows.targets.token), generator=torch.Generator().manual_seed(0))
    logp, entropy = rollout.forward_rows(model, rows, COMPUTES[name], temperature)
    states = rollout.states_at(model, rows, PLAIN)
    logits = states @ model.head.weight.T / temperature
    logits[:, model.config.mask_id] = -1e9
    every = logits.log_softmax(-1)  # (N, V)
    slow_logp = every.gather(-1, rows.targets.token[:, None])[:, 0]
    slow_entropy = -(every.exp() * every).sum(-1)
    torch.testing.assert_close(entropy, slow_entropy, atol=1e-5, rtol=1e-5)
    for w in ((0, 1), (1, 1)):
        ours, theirs = (torch.autograd.grad((w[0] * weight[0] * x + w[1] * weight[1] * h).sum(),
                                            list(model.parameters()), retain_graph=True)
                        for x, h in ((logp, entropy), (slow_logp, slow_entropy)))
        for p, q in zip(ours, theirs):
            torch.testing.assert_close(p, q, atol=1e-5 * float(q.abs().max() + 1), rtol=1e-4)


def test_a_function_gets_by_name_what_it_declares():
    """Each of the loss's numbers is that of the whole update, and the views and the reward get theirs."""
    model = random_model()
    kept = keep(groups_of(model))
    got = {}

    def loss(entropy, num_groups, targets, num_responses, logp, num_tokens, kl_coef, rl_step, mine=7):
        got.update(loss=(num_tokens, num_responses, num_groups, kl_coef, rl_step, mine))
        assert len(entropy) == len(logp) == len(targets.step) and entropy.requires_grad and logp.requires_grad
        return -(targets.advantage * logp).sum() / num_tokens

    def views(block, rollout, rng, shrink):
        got.update(views=(shrink, rng.random() < 1, block[0] < len(rollout.response)))
        return [(block, block)]

    one_update(model, kept, method_of(loss=loss, views=views), kl_coef=0.3, shrink=2)
    num_tokens = sum(r.num_tokens for r in kept)
    num_groups = len({r.group for r in kept})
    assert got == dict(loss=(num_tokens, len(kept), num_groups, 0.3, 1, 7), views=(2, True, True))
    assert flags.call(lambda a, **more: more, a=1, b=2) == dict(b=2)


@pytest.mark.parametrize("loss", [lambda logp: logp, lambda logp: 0.0, lambda logp: None,
                                  lambda logp: (logp.sum(), {}), lambda logp: torch.zeros(())])
def test_a_loss_that_is_not_one_number_with_a_gradient_is_refused(loss):
    model = random_model()
    with pytest.raises(ValueError, match="(?s)--loss gives .*must give one number with a gradient"):
        one_update(model, keep(groups_of(model)), method_of(loss=loss))


def test_an_advantage_may_change_its_rewards_in_place():
    def centered(rewards):
        rewards -= rewards.mean(-1, keepdim=True)
        return rewards

    rollouts = [Rollout([1], [2, 3], 2, [1, 2], reward=float(n % 2)) for n in range(8)]
    assert keep(rollouts, method_of(advantage=centered), keep_range=(0.2, 0.8)) == rollouts


@pytest.mark.parametrize("plug_in", [
    dict(loss=lambda logp, rewards: logp.sum()), dict(views=lambda block, steps: [(block, block)])])
def test_an_unknown_parameter_is_a_clear_error(plug_in):
    model = random_model()
    kept = keep(groups_of(model))
    name = "rewards" if "loss" in plug_in else "steps"
    with pytest.raises(ValueError, match=f"asks for {name}, which it cannot be given: there are "):
        one_update(model, kept, method_of(**plug_in))
    with pytest.raises(ValueError, match="asks for targets, .* there are rewards, rollouts"):
        keep(kept, method_of(advantage=lambda rewards, targets: rewards))


@pytest.mark.parametrize("number", [1, 2, 3])
@pytest.mark.parametrize("kind", ["sdar", "llada"])
def test_a_loss_that_asks_for_groups_sees_them_whole(kind, number, monkeypatch):
    """Where a group fits into a micro-batch, and on however many processes."""
    model = random_model(kind)
    rollouts = groups_of(model, 4)
    for r in rollouts:
        r.advantage = [1.0] * len(r.response)
    sizes = {r.group: 0 for r in rollouts}  # trained tokens of each group
    for r in rollouts:
        sizes[r.group] += r.num_tokens
    met = []

    def watch(logp, targets, num_groups):
        for group in targets.group.unique().tolist():
            met.append(group)
            assert (targets.group == group).sum() == sizes[group], "a part of a group"
        assert num_groups == 4
        return logp.sum()

    for rank in range(number):
        monkeypatch.setattr(parallel, "deal", lambda items: items[rank::number])
        for max_tokens in (2000, 100_000):
            met.clear()
            method = method_of(loss=watch, compute=FAST._replace(max_tokens=max_tokens))
            batch = tracerl.make_batch(learners_of(model), list(by_group(rollouts)), method,
                                       recipe_of(), 1)
            tracerl.update(learners_of(model).policy, batch, method, True, recipe_of())
            assert len(met) == len(set(met)) == len(range(rank, 4, number))


def by_group(rollouts):
    """Lists of the responses to one prompt."""
    for group in sorted({r.group for r in rollouts}):
        yield [r for r in rollouts if r.group == group]


REWARDS = """
import numpy, torch
def short(problem, text, tokens): return -len(tokens)
def each(problem, text, tokens): return [0.5] * len(tokens)
def record(rollout): return torch.tensor(float(max(rollout.step_map)))
def numpys(text): return numpy.float32(0.25)
def few(problem, text, tokens): return [1.0]
def nan(problem): return float("nan")
def word(problem): return "good"
def none(problem): return None
def unknown(problem, answer): return 1.0
"""


def test_a_reward_function_gives_one_number_or_one_per_token(tmp_path):
    (tmp_path / "mine.py").write_text(REWARDS)
    rollouts, problems = [Rollout([3], [4, 5, 1, 1], 3, [1, 2, 3, 4])], [eval_math.Problem("1+1=", "")]

    def rewarded(name):
        function = flags.load_function(f"{tmp_path}/mine.py:{name}", {}, "--reward")
        eval_math.give_rewards(rollouts, problems, tiny.tiny_tokenizer(), function)
        return rollouts[0].reward, rollouts[0].token_rewards

    assert rewarded("short") == (-3, []) and rewarded("each") == (1.5, [0.5] * 3)
    assert rewarded("record") == (4.0, []) and rewarded("numpys") == (0.25, [])
    for name, message in (("few", "1 numbers for 3 tokens"),
                          ("nan", "gave nan for '1.1=': a reward is a finite number"),
                          ("word", "gave 'good'"), ("none", "gave None"),
                          ("unknown", "unknown asks for answer, .* there are problem, text, tokens, rollout")):
        with pytest.raises(ValueError, match=message):
            rewarded(name)
    for spec, message in (("nowhere.py:f", "no file 'nowhere.py'"),
                          (f"{tmp_path}/mine.py:g", "no function 'g'"),
                          ("best", "no file 'best'; give file.py:function, or one of math")):
        with pytest.raises(ValueError, match=message):
            flags.load_function(spec, dict(math=None), "--reward")


# ------------------------------------------------------------------------------------------------- the update


def test_the_first_update_has_ratio_1_and_no_gap():
    model = random_model()
    kept = keep(groups_of(model))
    line, _, _ = one_update(model, kept)
    assert line["ratio_max"] == 1 and line["kl"] == 0 and line["clip_fraction"] == 0
    assert line["gap_max"] < 1e-4 and line["trained_tokens"] == sum(r.num_tokens for r in kept)


@pytest.mark.parametrize("kind", ["sdar", "llada"])
def test_the_gradient_does_not_depend_on_micro_batches_nor_on_the_twins(kind, unclipped):
    cases = [PLAIN._replace(max_tokens=100_000)]
    cases += [compute._replace(max_tokens=tokens) for compute in COMPUTES.values() for tokens in (1, 100)]
    cases += [FAST._replace(max_tokens=1000, is_packed=True)]
    results = []
    for compute in cases:
        model = random_model(kind)
        kept = keep(groups_of(model, 2))
        results.append(one_update(model, kept, method_of(compute=compute)))
    for line, weights, _ in results[1:]:
        torch.testing.assert_close(weights, results[0][1], atol=1e-6, rtol=1e-5)
        for name, number in line.items():
            assert number == pytest.approx(results[0][0][name], rel=1e-4, abs=2e-6), name


@pytest.mark.parametrize("views", ["random", "coupled"])
def test_the_baselines_go_through_the_same_update(views, unclipped):
    results = []
    for tokens in (1, 100_000):
        model = random_model()
        method = method_of(views=rollout.VIEWS[views], compute=FAST._replace(max_tokens=tokens))
        results.append(one_update(model, keep(groups_of(model)), method, minibatches=2))
    assert results[0][0]["trained_tokens"] == results[1][0]["trained_tokens"] > 0
    torch.testing.assert_close(results[0][1], results[1][1], atol=1e-6, rtol=1e-5)


def test_the_clip_acts_on_the_gradient_of_the_whole_update(monkeypatch):
    """With a bound below the norm, the step is lr * bound long, however small the micro-batches are."""
    monkeypatch.setattr(
        parallel, "optimizer_step", functools.partial(parallel.optimizer_step, max_grad_norm=0.05))
    for tokens in (1, 100_000):
        model = random_model()
        start = flat(model)
        kept = keep(groups_of(model))
        line, weights, _ = one_update(model, kept, method_of(compute=FAST._replace(max_tokens=tokens)))
        assert line["gradient_norm"] > 0.1
        assert (weights - start).norm().item() == pytest.approx(0.1 * 0.05, rel=1e-3)


def test_later_updates_use_the_start_of_step_policy(unclipped):
    """Two epochs: logp_old is replayed before the first update, and equals the recorded log-probabilities."""
    model = random_model()
    kept = keep(groups_of(model))
    line, _, batches = one_update(model, kept, epochs=2, minibatches=2)
    assert line["ratio_max"] > 1.001 and line["gap_max"] < 1e-4 and len(batches) == 2
    for rows in [rows for batch in batches for rows in batch.rows]:
        torch.testing.assert_close(rows.targets.logp_old, rows.targets.logp, atol=1e-4, rtol=0)


def test_every_kept_rollout_is_trained_once_per_epoch_and_groups_stay_together(monkeypatch):
    groups = [[Rollout([g + 3], [i + 3], 1, [1], group=g) for i in range(4)] for g in range(7)]
    monkeypatch.setattr(tracerl, "make_batch", lambda learners, groups, method, recipe, step: groups)
    monkeypatch.setattr(rollout, "replay_gap", lambda *more: dict(gap=0.0, gap_max=0.0))

    def batches(kept, step):
        learners = learners_of(random_model())._replace(value=True)  # in its head start nothing is replayed
        recipe = recipe_of(minibatches=3, value_warmup=99)
        return tracerl.old_logprobs(learners, kept, kept, method_of(), recipe, step)[0]

    found = batches(sum(groups, []), 5)
    assert sorted(map(len, found)) == [2, 2, 3]
    assert sorted(group[0].group for batch in found for group in batch) == list(range(7))
    assert all(group == groups[group[0].group] for batch in found for group in batch)
    assert found == batches(sum(groups, []), 5) != batches(sum(groups, []), 6)
    assert len(batches(groups[0], 5)) == 1 and batches([], 5) == []


def test_a_gradient_that_is_not_finite_changes_nothing():
    model = random_model()
    kept = keep(groups_of(model))
    start = flat(model)
    kept[0].advantage = [float("nan")] * len(kept[0].response)
    line, weights, _ = one_update(model, kept)
    assert torch.equal(start, weights) and line["skipped_updates"] == 1


def test_an_update_raises_the_probability_of_what_was_rewarded(unclipped):
    model = random_model()
    kept = keep(groups_of(model))
    total = lambda: sum(logp[:r.num_tokens].sum().item() * r.advantage[0]
                        for r, logp in zip(kept, rollout.replay(model, kept)))
    before = total()
    line, _, _ = one_update(model, kept, lr=0.003)
    assert total() > before
    assert line["ratio_max"] == 1 != line["drift_ratio_max"] and line["kl"] == 0 < line["drift_kl"]


def test_random_masks_are_theirs_alone_and_coupled_ones_make_every_token_a_target_once():
    model = random_model()
    rollouts = groups_of(model)
    random, coupled = (all_rows(rollouts, model.config, views=rollout.VIEWS[name])
                       for name in ("random", "coupled"))
    assert sorted(seen(coupled)) == [(n, i) for n, r in enumerate(rollouts) for i in range(len(r.response))]
    assert 0.3 < len(seen(random)) / len(seen(coupled)) < 0.7
    alone = all_rows(rollouts[5:6], model.config, views=rollout.random_views)
    assert [j for n, j in seen(random) if n == 5] == [j for _, j in seen(alone)]


# --------------------------------------------------------------------------------------------- the replay law


@pytest.mark.parametrize("kind", ["sdar", "llada"])
def test_the_self_check_passes_and_finds_what_does_not_replay(kind, monkeypatch, capsys):
    model, other = random_model(kind), random_model(kind, seed=1)
    machine.self_check(model, method_of())
    assert "self-check" in capsys.readouterr().out
    replay = rollout.replay
    monkeypatch.setattr(rollout, "replay", lambda model, *more, **settings: replay(other, *more, **settings))
    with pytest.raises(RuntimeError, match="replay law"):
        machine.self_check(model, method_of())
    with pytest.raises(RuntimeError, match="replay law"):  # and so does every step, before it is trained on
        one_update(model, keep(groups_of(model)))


# -------------------------------------------------------------------------------------------- the value model


def test_a_value_model_learns_the_returns_and_the_policy_waits_for_its_head_start():
    model = random_model()
    models = (model, value.ValueModel(model))
    learners = Learners(*(parallel.Learner(m, torch.optim.Adam(m.parameters(), lr=3e-3)) for m in models))
    recipe = recipe_of(lr=3e-3, value_warmup=30, value_clip=None)
    start = flat(model)
    rollouts = groups_of(model)

    def one_step(step):
        kept, line = give_advantages(rollouts, learners.value, method_of(), recipe)
        assert kept == rollouts and line["kept_groups"] == 3
        batches, _ = tracerl.old_logprobs(learners, rollouts, kept, method_of(), recipe, step)
        return line | tracerl.learn(learners, batches, rollouts, method_of(), recipe, step)

    lines = [one_step(step) for step in range(1, 31)]
    assert lines[0]["explained_variance"] == 0 and lines[-1]["explained_variance"] > 0.5
    assert lines[-1]["value_loss"] < 0.3 * lines[0]["value_loss"] and "ratio_max" not in lines[-1]
    assert torch.equal(flat(model), start)
    for r in rollouts:  # gamma = lambda = 1: the return is the reward, the advantage what the value missed
        assert r.returns[:r.num_tokens] == pytest.approx([r.reward] * r.num_tokens)
        assert r.advantage[:r.num_tokens] == pytest.approx(
            [r.reward - v for v in r.value_old[:r.num_tokens]], abs=1e-5)
    assert one_step(31)["ratio_max"] == 1
    assert not torch.equal(flat(model), start)


def test_process_rewards_are_what_is_returned():
    model = random_model()
    rollouts = groups_of(model, 1)
    for i, r in enumerate(rollouts):  # each token's own, and not their sum at the end once more
        r.token_rewards = [float((i + j) % 2) for j in range(r.num_tokens)]
        r.reward = sum(r.token_rewards)
    give_advantages(rollouts, parallel.Learner(value.ValueModel(model), None), method_of(), recipe_of())
    for r in rollouts:
        steps = sorted(set(r.step_map[:r.num_tokens]))
        places = [[j for j in range(r.num_tokens) if r.step_map[j] == t] for t in steps]
        later = sum(fmean(r.token_rewards[j] for j in at) for at in places[1:])
        assert [r.returns[j] for j in places[0]] == pytest.approx(
            [r.token_rewards[j] + later for j in places[0]])


def test_what_is_asked_of_the_policy_is_asked_of_the_value_model():
    args = tracerl.parse_args(["--advantage=value", "--gradient_checkpointing"])
    args.model = str(FIXTURES / "tiny")
    learners, _ = tracerl.load_start(args)
    for layers in (learners.policy.model.layers, learners.value.model.backbone.layers):
        assert all(layer.has_gradient_checkpointing for layer in layers)
    assert not learners.value.model.value_head.weight.any() and None not in learners


# --------------------------------------------------------------------------------------- the authors' numbers


def authors_case(stem, name):
    """A case of the fixtures: its settings, tensors, model and rollouts."""
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


@pytest.mark.parametrize("compute", COMPUTES)
@pytest.mark.parametrize("name", ["aligned_b4", "aligned_b4_clamp", "aligned_b4_advmatrix",
                                  "aligned_b4_shrink2", "aligned_b8_shrink3"])
def test_the_block_loss_and_gradient_are_the_authors(name, compute, authors_policy):
    """Theirs: the sum is divided by rows and padded length L1 (ours: trained tokens), and the KL is
    exp(-d) - 1 + d (ours: exp(d) - 1 - d), so the KL part is written out here; the policy part and all
    log-probabilities are ours."""
    case, data, model, rollouts = authors_case("sdar", name)
    for r in rollouts:  # their pads are visible tokens of the trace
        pad = case["L1"] - len(r.response)
        r.response, r.step_map = r.response + [2] * pad, r.step_map + [max(r.step_map) + 1] * pad
    where = fixture_rows(case, data, case["row_to_response"])
    rows = only(all_rows(rollouts, model.config, shrink=case["shrink"]), where)
    logp, _ = rollout.forward_rows(model, rows, authors_compute(compute))
    old, advantage = (at_token(where, rows, data[name], case["L0"]) for name in ("logp_old", "adv"))
    scale = case["n_rows"] * case["L1"]
    targets = rows.targets._replace(logp_old=old, advantage=advantage)
    policy = policy_loss(logp, targets, scale, clip_eps=case["eps"], kl_coef=0.0)
    d = (logp - old).clamp(-10, 10)
    loss = policy + case["beta"] * ((-d).exp() - 1 + (logp - old)).sum() / scale
    loss.backward()
    assert len(rows.targets.token) == case["n_trained_tokens"]
    assert policy.item() == pytest.approx(case["policy_loss"], abs=1e-5)
    assert loss.item() == pytest.approx(case["loss"], abs=1e-5)
    compare_gradients(model, case, data)


def authors_compute(name):
    """The definitions or the twins, for the authors' policy, which may also say "mask"."""
    return COMPUTES[name] if name == "plain" else FAST._replace(logprobs=PLAIN.logprobs)


@pytest.mark.parametrize("stem, name", [
    ("dream", "nopad_shrink1"), ("dream", "nopad_shrink3"), ("llada", "nopad_shrink3")])
def test_the_full_attention_loss_and_gradient_are_the_authors(stem, name, authors_policy):
    """Theirs: policy part divided by rows and the row's trained tokens; KL, of the other form, by rows."""
    case, data, model, rollouts = authors_case(stem, name)
    counts = [len(set(r.step_map)) for r in rollouts]
    where = fixture_rows(
        case, data, [n for n, count in enumerate(counts) for _ in range(-(-count // case["shrink"]))])
    rows = all_rows(rollouts, model.config, shrink=case["shrink"])
    logp, _ = rollout.forward_rows(model, rows, PLAIN)
    old = at_token(where, rows, data["logp_old"], case["L0"] - (stem == "dream"))
    reward, at_row = (at_token(where, rows, table, 0)
                      for table in (data["row_reward"], torch.arange(case["n_rows"])))
    per_row = torch.bincount(at_row, minlength=case["n_rows"])[at_row]
    policy = sum(policy_loss(logp[at_row == row], targets_of(old[at_row == row], reward[at_row == row]),
                             per_row[at_row == row][0] * case["n_rows"], clip_eps=case["eps"], kl_coef=0.0)
                 for row in range(case["n_rows"]))
    d = logp - old
    loss = policy + case["beta"] * ((-d).exp() - 1 + d).sum() / case["n_rows"]
    loss.backward()
    assert policy.item() == pytest.approx(case["policy_loss"], abs=1e-5)
    assert loss.item() == pytest.approx(case["loss"], abs=1e-5)
    compare_gradients(model, case, data)


def compare_gradients(model, case, data):
    """The model's gradients are those of the fixture."""
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


# --------------------------------------------------------------------------------- the flags, and a whole run


@pytest.mark.parametrize("arguments, message", [
    (["--steps=0"], "--steps 0 is not possible: it must be at least 1"), (["--lr=-1"], "--lr -1.0 is not possible: it must be above 0"),
    (["--group_size=1"], "--group_size"), (["--slots=0"], "--slots"), (["--block_size=0"], "--block_size"),
    (["--top_p=0"], "--top_p"), (["--unknown=1"], "unrecognized"), (["--step=5"], "unrecognized"),
    (["--model=x"], "--train_data and --eval_data"), (["--temperature=0"], "--temperature"),
    (["--top_k=1"], "greedy"), (["--lr=nan"], "--lr"), (["--keep_range", "0.9"], "--keep_range"),
])
def test_a_bad_flag_is_refused_by_name(arguments, message, capsys):
    with pytest.raises(SystemExit):
        tracerl.parse_args(arguments)
    assert message in capsys.readouterr().err


def test_a_range_that_keeps_nothing_is_refused():
    with pytest.raises(ValueError, match="keep_range .0.9, 0.1. .*keeps nothing"):
        Recipe(keep_range=(0.9, 0.1))


def test_defaults_are_the_embedded_tasks_or_the_papers():
    assert tracerl.parse_args([]).group_size == 16 and tracerl.parse_args([]).lr == 1e-4
    paper = tracerl.parse_args(["--model=m", "--train_data=a", "--eval_data=b"])
    assert (paper.prompts, paper.group_size, paper.lr, paper.steps, paper.keep_range) == (
        64, 16, 1e-6, 80, [0.2, 0.8])
    real = ["--model=m", "--train_data=a", "--eval_data=b"]
    assert tracerl.parse_args([*real, "--lr=2e-6"]).lr == 2e-6
    assert tracerl.parse_args([*real, "--reward=mine.py:f"]).keep_range is None  # a scale of its own


def test_all_groups_dropped_is_a_normal_event(tmp_path, monkeypatch):
    """An untrained model is never right: no update, weights unchanged, metrics and summary all the same."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(runs.Run, "plot", lambda self: None)  # slow, and seen by other tests
    checkpoints.save_checkpoint(random_model(), tiny.tiny_tokenizer(), "random")
    (tmp_path / "few.jsonl").write_text('{"problem": "1+1=", "answer": "2"}\n' * 20)
    tracerl.main(["--model=random", "--train_data=few.jsonl", "--eval_data=arithmetic-test",
                  "--dev_data=few.jsonl", "--steps=2", "--prompts=3", "--group_size=2",
                  "--max_new_tokens=8", "--eval_every=1", "--eval_limit=10"])
    lines = [json.loads(line) for line in open("runs/tracerl/metrics.jsonl")]
    assert len(lines) == 2 and all(line["kept_groups"] == 0 and line["gap_max"] < 1e-4 for line in lines)
    model, _ = checkpoints.load_model("runs/tracerl/checkpoints/step-2")
    assert torch.equal(flat(model), flat(random_model()))
    summary = json.load(open("runs/tracerl/summary.json"))
    assert summary["after"]["dynamic"]["n"] == 10 and summary["seed"] == 0
    assert set(summary["before"]) == {"dynamic", "static", "greedy"}
