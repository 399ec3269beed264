"""Laws of examples/: each variant is the formula of its paper, and each diff runs and does what it says."""

import contextlib
import dataclasses
import functools
import io
import json
import math
import random
import re
import shlex
import sys
import time
from types import SimpleNamespace

import pytest
import torch
from conftest import (
    COMPUTES, FAST, FIXTURES, ROOT, decode, random_model, random_prompts, small_data)
from test_engine import is_twin
from test_tracerl import flat, groups_of, keep, method_of, one_update, targets_of

import eval_math
import model as lm
import rollout
import sft
import tracerl
import value
from examples import (
    broken, code_reward, entropy_bonus, forks, frozen_reference, process_reward, strategy, walk)
from plumbing import check, checkpoints, flags, runs, tasks, tiny
from rollout import PLAIN, ReplayLaw, Rollout
from tracerl import group_advantages, policy_loss

# --------------------------------------------------------- forks.py: formulas, against slow loops over tokens


def made_up(seed=0):
    """Tokens of seven responses in three groups, with two masks of each block, in no order."""
    rng = random.Random(seed)
    tokens = []
    for owner, group in ((5, 0), (9, 0), (2, 0), (7, 1), (1, 1), (30, 4), (31, 4)):
        advantage = rng.gauss(0, 1)
        for block in range(2):
            for draw in range(2):
                for j in rng.sample(range(4), rng.randint(1, 4)):
                    old = -rng.random() * 2
                    tokens.append(SimpleNamespace(
                        owner=owner, group=group, j=4 * block + j, view=2 * block + draw + 1, draw=draw,
                        share=rng.choice((0.25, 0.5, 1.0)), A=advantage, old=old, logp=old + rng.gauss(0, 0.3),
                        recorded=old + rng.gauss(0, 0.8)))
    rng.shuffle(tokens)
    return tokens


def as_targets(tokens):
    """logp, which takes a gradient, and the Targets of made-up tokens."""
    column = lambda name, dtype=torch.float32: torch.tensor([getattr(t, name) for t in tokens], dtype=dtype)
    whole = functools.partial(column, dtype=torch.int64)
    targets = targets_of(column("old"), column("A"), rollout_index=whole("owner"), group=whole("group"),
                         response_index=whole("j"), view=whole("view"), masked_share=column("share"),
                         logp=column("recorded"))
    return column("logp").requires_grad_(), targets


def gathered(tokens, *names):
    """Lists of the tokens that agree in these attributes."""
    lists = {}
    for t in tokens:
        lists.setdefault(tuple(getattr(t, name) for name in names), []).append(t)
    return list(lists.values())


def mean(numbers):
    """Of any iterable."""
    numbers = list(numbers)
    return sum(numbers) / len(numbers)


def best(ratio, A, low=0.8, high=1.2):
    """PPO's smaller one of two."""
    return min(ratio * A, min(max(ratio, low), high) * A)


def ratio_of(t):
    """Of one token."""
    return math.exp(t.logp - t.old)


def k3(t):
    """Of one token."""
    return ratio_of(t) - 1 - (t.logp - t.old)


def elbo(tokens, name):
    """The sum of log p / t, a mean over the two masks of each block."""
    return sum(getattr(t, name) / t.share for t in tokens) / 2


def length(tokens):
    """The same of ones."""
    return sum(1 / t.share for t in tokens) / 2


def slow_stable(tokens):
    """StableDRL, group by group."""
    total = 0.0
    for group in gathered(tokens, "group"):
        responses = gathered(group, "owner")
        weights = [min(math.exp(mean(t.logp - t.old for t in r)), 5) for r in responses]
        for r, weight in zip(responses, weights):
            total += weight / sum(weights) * r[0].A * mean(t.logp for t in r)
    return -total / 3


def slow_bound(tokens):
    """BGPO, mask by mask."""
    total = 0.0
    for mask in gathered(tokens, "owner", "draw"):
        d = sum((t.logp - t.old) / t.share for t in mask) / sum(1 / t.share for t in mask)
        total += best(1 + d if mask[0].A > 0 else math.exp(d), mask[0].A)
    return -total / (8 * 2)


def slow_sandwich(tokens):
    """SPG, response by response."""
    total = 0.0
    for r in gathered(tokens, "owner"):
        lower = elbo(r, "logp") / length(r)
        upper = mean(math.log(sum(math.exp(1.5 * t.logp) / t.share for t in token) / 2) / 1.5
                     for token in gathered(r, "j"))
        total += r[0].A * (lower if r[0].A > 0 else (upper + lower) / 2)
    return -total / 8


def slow_ratio(tokens, root, divided):
    """A ratio per response from its ELBO; root: of its length; divided: the gain by the length."""
    total = 0.0
    for r in gathered(tokens, "owner"):
        d = elbo(r, "logp") - elbo(r, "old")
        gain = best(math.exp(d / length(r) if root else d), r[0].A)
        total += gain / length(r) if divided else gain
    return -total / 8


# Each is told of 40 tokens, 8 responses and 3 groups, and of epsilon .2 and beta .3.
SLOW = {
    "paper_weights": lambda ts: sum(
        mean(0.3 * k3(t) - best(ratio_of(t), t.A) for t in step) for step in gathered(ts, "owner", "view")) / 8,
    "clip_higher": lambda ts: -sum(best(ratio_of(t), t.A, 0.8, 1.28) for t in ts) / 40,
    "constant_length": lambda ts: -sum(best(ratio_of(t), t.A) for t in ts) / (8 * 20),
    "sequence_ratio": lambda ts: -sum(
        best(math.exp(mean(t.logp - t.old for t in r)), r[0].A) for r in gathered(ts, "owner")) / 8,
    "truncated_importance": lambda ts: sum(
        0.3 * k3(t) - best(ratio_of(t), t.A * min(math.exp(t.old - t.recorded), 2)) for t in ts) / 40,
    "group_mean": lambda ts: -sum(
        mean(best(ratio_of(t), t.A, 0.8, 1.28) for t in group) for group in gathered(ts, "group")) / 3,
    "self_normalized": slow_stable,
    "ratio_free": lambda ts: -sum(t.A * t.logp for t in ts) / 40,
    "elbo_ratio": lambda ts: slow_ratio(ts, True, False) + 0.3 / 8 * sum(
        (elbo(r, "logp") - elbo(r, "old")) ** 2 / (2 * length(r)) for r in gathered(ts, "owner")),
    "block_elbo": lambda ts: slow_ratio(ts, False, False),
    "linear_bound": slow_bound,
    "sandwiched": slow_sandwich,
    "quadrature_ratio": lambda ts: slow_ratio(ts, False, True),
}
NUMBERS = dict(num_tokens=40, num_responses=8, num_groups=3, clip_eps=0.2, kl_coef=0.3)


@pytest.mark.parametrize("name", SLOW)
def test_a_loss_is_the_formula_of_its_paper(name):
    for seed in range(3):
        tokens = made_up(seed)
        logp, targets = as_targets(tokens)
        loss = flags.call(getattr(forks, name), logp=logp, entropy=None, targets=targets, **NUMBERS)
        assert loss.item() == pytest.approx(SLOW[name](tokens), rel=1e-4, abs=1e-6)
        gradient, = torch.autograd.grad(loss, logp)
        for place in (0, 17) if name != "self_normalized" else ():  # see below
            up, down = (SLOW[name](with_shift(tokens, place, shift)) for shift in (1e-4, -1e-4))
            assert gradient[place].item() == pytest.approx((up - down) / 2e-4, rel=1e-3, abs=1e-5)


def with_shift(tokens, place, shift):
    """The same tokens, one of them with another log-probability."""
    changed = SimpleNamespace(**vars(tokens[place]) | dict(logp=tokens[place].logp + shift))
    return [*tokens[:place], changed, *tokens[place + 1:]]


def test_no_gradient_goes_through_self_normalized_weights():
    tokens = made_up()
    logp, targets = as_targets(tokens)
    forks.self_normalized(logp, targets, 3).backward()
    for group in gathered(tokens, "group"):
        responses = gathered(group, "owner")
        weights = [min(math.exp(mean(t.logp - t.old for t in r)), 5) for r in responses]
        for r, weight in zip(responses, weights):
            expected = -weight / sum(weights) * r[0].A / len(r) / 3
            assert all(logp.grad[tokens.index(t)].item() == pytest.approx(expected, rel=1e-4) for t in r)


def test_the_linear_bound_lies_below_its_objective_and_touches_it_where_policies_agree():
    call = lambda loss, logp: flags.call(
        loss, logp=logp, targets=targets, num_responses=7, clip_eps=100.0)  # so wide that nothing is clipped
    for seed in range(5):
        logp, targets = as_targets(made_up(seed))
        assert call(forks.linear_bound, logp) > call(unbounded, logp)  # losses: a bound from above
        logp = targets.logp_old.clone().requires_grad_()
        bound, exact = call(forks.linear_bound, logp), call(unbounded, logp)
        assert bound.item() == pytest.approx(exact.item(), abs=1e-6)
        torch.testing.assert_close(*(torch.autograd.grad(loss, logp) for loss in (bound, exact)))


def unbounded(logp, targets, num_responses):
    """What BGPO bounds: one ratio per response, of the mean over its two masks of the difference per token."""
    mask = targets.rollout_index * 2 + (targets.view - 1) % 2
    weight = 1 / targets.masked_share
    d = forks.sum_by(mask, (logp - targets.logp_old) * weight) / forks.sum_by(mask, weight)
    ratio = forks.mean_by(mask.unique() // 2, d).exp()
    return -(ratio * forks.mean_by(targets.rollout_index, targets.advantage)).sum() / num_responses


def test_advantages_are_what_their_papers_say():
    rewards = torch.tensor([[1.0, 0, 0, 1], [0.5, 0.5, 0.5, 0.5], [0, 0, 0, 0]])
    assert forks.centered(rewards).tolist() == [[0.5, -0.5, -0.5, 0.5], [0] * 4, [0] * 4]
    assert not forks.centered(torch.full((4, 6), 85.3)).any()
    weights = forks.softmax_weights(rewards)
    assert weights.sum(-1).tolist() == pytest.approx([0, 0, 0], abs=1e-6) and not weights[1].any()

    every = [r for row in rewards.tolist() for r in row]
    means = [mean(row) for row in rewards.tolist()]
    variance = lambda numbers: mean((x - mean(numbers)) ** 2 for x in numbers)
    pull = variance(every) / 4 / (variance(every) / 4 + variance(means))
    raw = [r - ((1 - pull) * m + pull * mean(every)) for row, m in zip(rewards.tolist(), means) for r in row]
    expected = [(x - mean(raw)) / variance(raw) ** 0.5 for x in raw]
    shrunk = forks.shrunk_baseline(rewards)
    assert shrunk.flatten().tolist() == pytest.approx(expected, abs=1e-5)
    assert (shrunk[2] < 0).all()  # a group that failed learns, too
    assert not forks.shrunk_baseline(torch.ones(2, 4)).any()

    speeds = [[4, 2, 1, 4], [2, 2, 2, 2], [4, 2, 1, 1]]  # tokens per step: 1 2 4 1, 2 2 2 2, 1 2 4 4
    rollouts = [Rollout([3], [4] * 4, 4, [steps] * 4) for row in speeds for steps in row]
    both = forks.accuracy_and_speed(rewards, rollouts)
    torch.testing.assert_close(both[0], group_advantages(rewards)[0] + group_advantages(
        torch.tensor([[1.0, 2, 4, 1]]))[0])
    assert not both[1:].any()  # as fast as each other; all wrong


def test_mean_per_step_gives_each_denoising_step_the_same():
    rollouts = groups_of(random_model())
    kept = keep(rollouts, method_of(advantage=forks.mean_per_step))
    A = group_advantages(torch.tensor([r.reward for r in rollouts]).view(-1, 4)).flatten().tolist()
    assert kept and {len(set(r.advantage)) for r in kept} != {1}
    for r, expected in zip(rollouts, A):
        steps = r.step_map[:r.num_tokens]
        for step in set(steps):
            total = sum(a for a, s in zip(r.advantage, steps) if s == step)
            assert total == pytest.approx(expected, abs=1e-5)
        assert r.advantage[r.num_tokens:] == [0.0] * (len(r.response) - r.num_tokens)


def test_views_are_what_their_papers_say():
    r = Rollout([3], [5, 6, 7, 8], 4, [1, 3, 1, 2])
    block = [0, 1, 2, 3]
    rng = random.Random(1)
    assert forks.fully_masked(block) == [(block, block)]
    chosen = forks.some_steps(r, block, 1, rng)
    assert 0 < len(chosen) < 3 and all(view in rollout.trace_views(r, block, 1) for view in chosen)
    assert len(forks.as_many_random(r, block, rng)) == 3
    sizes = lambda c: [len(masked) for masked, _ in forks.quadrature_views(list(range(c)), rng)]
    assert sizes(16) == [3, 13] and sizes(4) == [1, 3] and sizes(1) == [1, 1]
    points = [0.5 - 12**-0.5, 0.5 + 12**-0.5]
    assert points == pytest.approx([0.2113, 0.7887], abs=1e-4)
    for degree in range(4):  # this quadrature is exact for them
        assert mean(t**degree for t in points) == pytest.approx(1 / (degree + 1))
    config = random_model().config
    whole = Rollout([3] * 4, [4] * 8, 8, [1] * 8)
    for views in (forks.elbo_views, forks.quadrature_views):
        found = rollout.views_of(whole, config, views)
        assert [view.block for view in found] == [1, 1, 2, 2]
        assert all(sum(1 / view.masked_share for _ in view.masked) == pytest.approx(4) for view in found)


# ---------------------------------------------------------------------------------- forks.py: a whole RL step


@functools.cache
def shared_rollouts(kind="sdar"):
    """Rollouts of the random model: decoded once, copied for each test."""
    return groups_of(random_model(kind))


def copies(kind="sdar"):
    """Records of their own."""
    return [dataclasses.replace(r) for r in shared_rollouts(kind)]


VARIANTS = [  # loss, advantage, views: the commands of forks.py
    ("paper_weights", None, None), ("clip_higher", None, "some_steps"), ("constant_length", "centered", None),
    ("sequence_ratio", None, None), ("truncated_importance", None, None), ("group_mean", None, None),
    ("self_normalized", "centered", None), (None, "shrunk_baseline", None), (None, "accuracy_and_speed", None),
    ("ratio_free", "softmax_weights", None), ("elbo_ratio", None, "elbo_views"),
    ("block_elbo", None, "elbo_views"), ("linear_bound", None, "elbo_views"),
    ("sandwiched", "centered", "elbo_views"), ("quadrature_ratio", "centered", "quadrature_views"),
    (None, "mean_per_step", "as_many_random"), (None, None, "fully_masked")]


@pytest.mark.parametrize("names", VARIANTS, ids=lambda names: "-".join(filter(None, names)))
def test_a_variant_moves_the_policy_the_same_however_the_rows_are_cut(names):
    """Two epochs, so that ratios are not all 1; micro-batches of all rows, and of one group at most."""
    chosen = {part: getattr(forks, name) for part, name in zip(("loss", "advantage", "views"), names) if name}
    start = flat(random_model())
    results = []
    for max_tokens in (100_000, 500):
        model = random_model()
        method = method_of(**chosen)
        method = method._replace(compute=method.compute._replace(max_tokens=max_tokens))
        kept = keep(copies(), method)
        line, weights, _ = one_update(model, kept, method, lr=0.01, epochs=2)
        assert line["skipped_updates"] == 0 and math.isfinite(line["loss"]) and line["gap_max"] < 1e-4
        assert weights.isfinite().all() and not torch.equal(weights, start)
        results.append(weights)
    torch.testing.assert_close(*results, atol=1e-6, rtol=1e-5)


def test_a_sequence_ratio_sees_whole_responses_in_full_attention():
    weights = []
    for tokens in (300, 100_000):
        model = random_model("llada")
        method = method_of(loss=forks.sequence_ratio)
        method = method._replace(compute=method.compute._replace(max_tokens=tokens))
        weights.append(one_update(model, keep(copies("llada"), method), method)[1])
    torch.testing.assert_close(*weights, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("shrink", [1, 3])
def test_the_papers_weights_follow_trace_steps_whatever_shrink_is(shrink):
    """At ratio 1 the loss is minus the sum over trace steps of A; the steps are those of value.py."""
    model = random_model("llada")
    kept = keep(copies("llada"))
    line, _, _ = one_update(model, kept, method_of(loss=forks.paper_weights), shrink=shrink)
    steps = [max(value.trace_steps(r, model.config, shrink)) for r in kept]
    expected = -sum(n * r.advantage[0] for n, r in zip(steps, kept)) / len(kept)
    assert line["loss"] == pytest.approx(expected, rel=1e-4)


# ----------------------------------------------------------------------------------------- the runnable diffs


@pytest.fixture
def frozen(tmp_path, monkeypatch):
    """Another random model as the frozen reference."""
    model = random_model(seed=1)
    checkpoints.save_checkpoint(model, tiny.tiny_tokenizer(), tmp_path / "frozen")
    monkeypatch.setenv("REFERENCE", str(tmp_path / "frozen"))
    frozen_reference.reference.cache_clear()
    yield model
    frozen_reference.reference.cache_clear()


def test_a_frozen_reference_is_in_the_loss_with_its_own_log_probabilities(frozen):
    model = random_model()
    method = method_of(advantage=frozen_reference.with_reference, loss=frozen_reference.loss)
    kept = keep(copies(), method)
    plain = keep(copies())
    assert [r.advantage for r in kept] == [r.advantage for r in plain]
    with torch.no_grad():
        for r, logp in zip(kept, rollout.replay(frozen, kept)):
            assert r.value_old == pytest.approx(logp.tolist(), abs=1e-4)
    trained = [(logp, ref) for r in kept for logp, ref in zip(r.logp[:r.num_tokens], r.value_old)]
    k3 = mean(math.exp(ref - logp) - 1 - (ref - logp) for logp, ref in trained)
    line, weights, _ = one_update(model, kept, method)
    without, other, _ = one_update(random_model(), plain)
    assert line["loss"] - without["loss"] == pytest.approx(0.05 * k3, rel=1e-3) and k3 > 0.1
    assert weights.isfinite().all() and not torch.equal(weights, other)
    logp, targets = as_targets(made_up())
    for number in (0.0, 0.7):  # nothing; what a value model expects
        with pytest.raises(ValueError, match="this loss needs --advantage .*with_reference"):
            values = torch.full_like(logp, number)
            frozen_reference.loss(logp, targets._replace(value_old=values), 40, 0.2, 0.0)


def test_a_token_far_below_the_reference_is_not_pushed_further_away():
    logp, targets = as_targets(made_up())
    logp = (logp.detach() - 20).requires_grad_()  # the reference's may not be above 0
    far = targets._replace(value_old=logp.detach() + 14, advantage=torch.zeros_like(logp))
    near = targets._replace(value_old=logp.detach() + 1, advantage=torch.zeros_like(logp))
    for given, is_pulled in ((far, False), (near, True)):
        gradient, = torch.autograd.grad(frozen_reference.loss(logp, given, 40, 0.2, 0.0), logp)
        assert (gradient < 0).all() if is_pulled else (gradient == 0).all()


def test_a_frozen_reference_penalizes_the_reward(frozen, monkeypatch):
    rollouts = copies()
    kept = keep(rollouts, method_of(advantage=frozen_reference.penalized))
    with torch.no_grad():
        kl = torch.stack([(torch.tensor(r.logp) - logp)[:r.num_tokens].sum()
                          for r, logp in zip(rollouts, rollout.replay(frozen, rollouts))]).view(-1, 4)
    rewards = torch.tensor([r.reward for r in rollouts]).view(-1, 4)
    expected = group_advantages(rewards) - 0.05 * (kl - kl.mean(-1, keepdim=True))
    assert [r.advantage[0] for r in rollouts] == pytest.approx(expected.flatten().tolist(), abs=1e-4)
    assert kept == rollouts  # equal rewards, unequal KL
    monkeypatch.delenv("REFERENCE")
    frozen_reference.reference.cache_clear()
    with pytest.raises(ValueError, match="say which model is the reference"):
        keep(rollouts, method_of(advantage=frozen_reference.penalized))


def test_an_entropy_bonus_raises_the_entropy(monkeypatch):
    logp, targets = as_targets(made_up())
    entropy = torch.rand(len(logp))
    bonus = entropy_bonus.loss(logp, entropy, targets, 40, 0.2, 0.3) - policy_loss(logp, targets, 40, 0.2, 0.3)
    assert bonus.item() == pytest.approx(-0.01 * entropy.sum().item() / 40, rel=1e-3)
    found = []
    for coef in (0.0, 10.0):
        monkeypatch.setattr(entropy_bonus, "COEF", coef)
        model = random_model()
        one_update(model, keep(copies()), method_of(loss=entropy_bonus.loss), lr=0.01)
        moved = method_of(law=ReplayLaw(True, max_gap=9.0))  # the rollouts are of the policy before
        line, _, _ = one_update(model, keep(copies()), moved, lr=1e-9)
        found.append(line["entropy"])
    assert found[1] > found[0] + 0.01


ADD = "Here it is:\n```python\ndef add(a, b):\n    {}\n```\nThat is all."


@pytest.mark.parametrize("body, expected", [
    ("return a + b", 1), ("return a - b", 0), ("return", 0), ("syntax error", 0),
    ("import sys; sys.exit(0)", 0), ("import os; os._exit(0)", 0),  # no test was passed
    ("everything = bytearray(1 << 30); return a + b", 0),  # a GiB
    ("print('x' * (1 << 22)); return a + b", 0),  # a flood
    ("import os; return a + b + ('SECRET' in os.environ) + len(os.listdir('.'))", 1),  # nothing is there
])
def test_code_earns_only_by_passing_its_tests(body, expected, monkeypatch):
    monkeypatch.setenv("SECRET", "1")
    problem = eval_math.Problem("Write add.", "assert add(1, 2) == 3")
    r = Rollout([3], [4], 1, [1])
    assert flags.call(code_reward.passes_tests, problem=problem, text=ADD.format(body), rollout=r) == expected
    r.is_truncated = True
    assert code_reward.passes_tests(problem, ADD.format(body), r) == 0
    with pytest.raises(ValueError, match="no tests for 'Write add.'"):
        code_reward.passes_tests(eval_math.Problem("Write add.", ""), ADD.format(body), r)


@pytest.mark.parametrize("answer, expected", [
    ("assert add(1, 2) == 3", 1), ("assert add(1, 2) == 4", 0),
    ('["x = 3", "assert add(1, 2) == x"]', 1), ("[x] = [3]\nassert add(1, 2) == x", 1), ('["assert add(1, 2) == 3", "assert add(1, 2) == 4"]', 0),
])
def test_code_is_found_between_other_blocks_and_tests_may_be_a_list(answer, expected):
    text = "Like\n```text\n1 + 2\n```\nit is\n```python\ndef add(a, b):\n    return a + b\n```\n```\n"
    problem = eval_math.Problem("Write add.", answer)
    for name in ("python", "python3", "Python", "py", ""):
        named = text[:-4].replace("```python\n", f"```{name}\n")
        assert code_reward.passes_tests(problem, named, Rollout([3], [4], 1, [1])) == expected


def test_code_ends_in_time_with_all_that_it_has_started(tmp_path, monkeypatch):
    monkeypatch.setattr(code_reward, "SECONDS", 0.5)
    started = time.perf_counter()
    assert not code_reward.succeeds("while True: pass", "")
    assert time.perf_counter() - started < 2
    later = f"import time; time.sleep(1); open({str(tmp_path / 'alive')!r}, 'w')"
    code = f"import subprocess, sys\nsubprocess.Popen([sys.executable, '-c', {later!r}])\n"
    assert code_reward.succeeds(code, "")  # it has ended well, and what it has started ends with it
    assert not code_reward.succeeds(code + "import time\ntime.sleep(60)", "")
    time.sleep(1.2)
    assert not (tmp_path / "alive").exists()


def test_a_falling_threshold_reveals_more_with_every_step():
    confidence = torch.tensor([[0.85, 0.75, 0.95, 0.6]] * 3)
    is_masked = torch.tensor([[True, True, True, False]] * 3)
    reveal = lambda function: flags.call(
        function, confidence=confidence, entropy=None, is_masked=is_masked, quota=torch.tensor([1, 1, 1]),
        token=None, step=torch.tensor([0, 1, 2]), threshold=0.9).tolist()
    assert reveal(strategy.falling) == [[False, False, True, False], [True, False, True, False],
                                        [True, True, True, False]]
    assert reveal(strategy.steep)[1] == [True, True, True, False]
    steep = flags.load_function(f"{ROOT}/examples/strategy.py:steep", {}, "--strategy")
    assert steep.keywords == dict(fall=0.3)
    settings = dict(max_new_tokens=14, threshold=0.6, strategy=f"{ROOT}/examples/strategy.py:falling")
    model = random_model()
    prompts = random_prompts([3, 6, 9])
    found = [decode(model, prompts, compute, **settings) for compute in COMPUTES.values()]
    assert [r.step_map for r in found[0]] == [r.step_map for r in found[1]]
    for rollouts in found:
        assert rollout.replay_gap(model, rollouts, PLAIN, 1.0)["gap_max"] < 1e-4


def test_every_right_column_earns_a_quarter_in_the_step_that_completes_it():
    tokenizer = tiny.tiny_tokenizer()

    def earned(text, steps, is_truncated=False):
        tokens = tokenizer(text).input_ids + [1] * (not is_truncated)
        r = Rollout([3], [*tokens, 1, 1], len(tokens), [*steps, 98, 99], is_truncated=is_truncated)
        return flags.call(process_reward.columns, problem=eval_math.Problem("894+396=", "1290"),
                          text=eval_math.response_text(r, tokenizer), tokens=tokens, rollout=r)

    steps = [1, 3, 1, 2, 4, 4, 4, 4, 5, 6, 5, 6, 7, 7, 7, 7, 7, 7, 7]
    right = "101;191;121;\\boxed{1290}"
    assert earned(right, steps) == [0, .25, 0, 0, .25, .25, .25, .25, 0, .25, 0, .25] + [.25] * 7
    slipped = "100;181;121;\\boxed{1280}"  # a carry is forgotten, and the third column happens to be right
    assert earned(slipped, steps) == [0] * 9 + [.25, 0, .25] + [0] * 7
    assert earned("101;191;", [1] * 8, is_truncated=True) == [.5] * 8
    assert earned("101;191;121;\\boxed{1290", [1] * 12 + [2] * 5, is_truncated=True) == [.75] * 12 + [0] * 5
    assert earned(f"{right};;", [1] * 20, is_truncated=True) == [.75] * 20  # it does not end
    for text in ("", ";;;;;", "<pad>101;", right + ";1", "101"):
        assert len(earned(text, range(1, 30))) == len(tokenizer(text).input_ids) + 1
    rewards = torch.tensor([earned(right, steps)])
    returns, _ = value.returns_and_advantages(rewards, 0 * rewards, torch.tensor([steps]))
    assert returns[0, 0].item() == pytest.approx(1) and returns[0, -1].item() == pytest.approx(0.25)


def commands_of(script, **variables):
    """The commands of grow_blocks.sh, with other numbers than its own -> lists of words, and its Python."""
    text = (ROOT / "examples" / script).read_text()
    defaults = dict(re.findall(r"^(\w+)=\$\{\1:-(.*)\}$", text, re.MULTILINE))
    python = re.search(r"<<'PY'\n(.*?)^PY$", text, re.DOTALL | re.MULTILINE)[1]
    for name, number in (defaults | variables).items():
        text = text.replace(f"${name}", str(number))
    lines = text.replace("\\\n", " ").splitlines()
    return [shlex.split(line) for line in lines if re.match(r"(python|torchrun) \w", line)], python


def test_blocks_grow_from_answers_in_small_blocks(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(runs.Run, "plot", lambda self: None)  # slow, and seen by other tests
    small = lambda split, number, *more: tasks.arithmetic(split, min(number, 80), *more)
    monkeypatch.setitem(tasks.EMBEDDED, "arithmetic", small)
    commands, python = commands_of("grow_blocks.sh", MODEL=FIXTURES / "tiny", PROBLEMS=60, UPDATES=2, STEPS=1)
    assert [words[1] for words in commands] == ["eval_math.py", "sft.py", "tracerl.py"]
    eval_math.main(commands[0][2:])
    monkeypatch.setenv("NAME", "grow")
    exec(python, {})
    rows = [json.loads(line) for line in open("runs/grow-answers/right.jsonl")]
    lines = [json.loads(line) for line in open("runs/grow-answers/responses.jsonl")]
    assert len(lines) == 120 and 20 < len(rows) == sum(line["correct"] for line in lines)
    assert all(row["solution"].endswith(f"\\boxed{{{row['answer']}}}") for row in rows)
    sft.main([*commands[1][2:], "--batch_size=16"])
    tracerl.main([*commands[2][2:], "--prompts=2", "--group_size=2", "--eval_limit=2"])
    model, _ = checkpoints.load_model("runs/grow/checkpoints/step-1")
    assert model.config.block_size == 8


# ------------------------------------------------------------------------------------------- the walk through


@pytest.fixture(scope="module")
def walked():
    """What walk.py prints, and (file, name) of all functions that ran.

    -> the tables by the number of their section, each a list of lines, and a line a list of words.
    """
    functions = set()
    output = io.StringIO()
    sys.setprofile(lambda frame, event, argument: functions.add(frame.f_code))
    try:
        with contextlib.redirect_stdout(output):
            walk.main()
    finally:
        sys.setprofile(None)
    sections = re.split(r"\n(?=\d\. )", output.getvalue())[1:]
    tables = {int(section[0]): [text.split() for text in section.splitlines() if text.startswith("    ")]
              for section in sections}
    return tables, {(code.co_filename, code.co_name) for code in functions}


def test_the_walk_shows_the_example_of_the_readme(walked):
    tables, _ = walked
    assert list(tables) == [1, 2, 3, 4, 5, 6, 7, 8]
    assert [words[1] for words in tables[5][1:5]] == ["1", "3", "1", "2"]
    tokens, position, block, view, target = (words[1:] for words in tables[3])
    assert "".join(tokens) == "894+396=101;????1?1?1?1;"
    assert "".join(target) == "." * 12 + "1.1....;.0.."
    assert all(token == "?" for token, expected in zip(tokens, target) if expected != ".")
    assert [int(p) // 4 for p in position] == [int(b) for b in block]
    assert view == [str(number) for number in (0, 0, 0, 1, 2, 3) for _ in range(4)]


def test_the_walk_shows_the_rule_as_its_mask(walked):
    tables, _ = walked
    block, view = tables[3][2][1:], tables[3][3][1:]
    for i, words in enumerate(tables[4][1:]):
        assert words[:3] == [tables[3][0][1 + i], "view", view[i]]
        for j, sign in enumerate(words[3:]):
            is_past = view[j] == "0" and block[j] < block[i]
            assert (sign == "x") == (is_past or (view[j] == view[i] and block[j] == block[i]))


def test_the_walk_replays_what_it_recorded(walked):
    tables, _ = walked
    *tokens, gap = tables[5][1:]
    assert len(tokens) == 20 and all(abs(float(words[2]) - float(words[3])) < 1e-4 for words in tokens)
    mean_gap, largest = (float(word) for word in gap if re.match(r"\d", word))
    assert mean_gap <= largest < 1e-4
    # The trace has the same numbers, in the order of the steps.
    traced = [float(word) for words in tables[2][1:] for word in words if re.fullmatch(r"-?\d\.\d{3}", word)]
    recorded = sorted((int(words[1]), number, float(words[2])) for number, words in enumerate(tokens))
    assert traced == pytest.approx([logp for _, _, logp in recorded], abs=6e-4)


def test_the_update_of_the_walk_raises_right_responses_against_wrong_ones(walked):
    tables, _ = walked
    rewards = torch.tensor([[float(words[2]) for words in tables[6][1:]]])
    advantages = [float(words[3]) for words in tables[6][1:]]
    assert 0 < rewards.mean() < 1  # the group holds right and wrong responses
    assert advantages == pytest.approx(group_advantages(rewards)[0].tolist(), abs=1e-3)
    _, before, after, change = zip(*(map(float, words[1:5]) for words in tables[8][1:]))
    assert [new - old for new, old in zip(after, before)] == pytest.approx(change, abs=2e-3)
    change = torch.tensor(change)
    assert change[rewards[0] == 1].mean() > change[rewards[0] == 0].mean() + 0.05
    assert change[rewards[0] == 1].mean() > 0 > change[rewards[0] == 0].mean()
    num_tokens, _, _, _, loss, _, _, _, _, norm = tables[7][0]
    assert int(num_tokens) == 8 * 19 and abs(float(loss.rstrip(","))) < 1e-6 and float(norm) > 0.1


def test_the_walk_runs_the_definitions_and_no_twin(walked):
    _, functions = walked
    assert not [function for function in functions if is_twin(function)]
    assert {(rollout.__file__, "generate"), (lm.__file__, "attend_by_rule"), (lm.__file__, "token_logprobs"),
            (tracerl.__file__, "policy_loss")} <= functions


# --------------------------------------------------------------------------------- broken.py, fault by fault


@functools.cache
def broken_rollouts(kind):
    """A random model, and rollouts of it. Some end with tokens behind eos; one prompt fills its blocks."""
    model = random_model(kind)
    return model, decode(model, random_prompts([5, 9, 6, 8, 11]), max_new_tokens=14, threshold=0.4, seed=3)


def plant(name, monkeypatch):
    """Replaces what a fault replaces, until the test ends."""
    for part, function in broken.FAULTS[name].items():
        monkeypatch.setattr(rollout, part, function)


def shown(r, j, name, config):
    """Tokens as a fault shows them for the prediction of response token j, and their block size."""
    K = 1 if name == "small_blocks" else config.block_size
    P, R = len(r.prompt), len(r.response)
    start = max(0, (P + j) // K * K - P)  # the response indices of its block
    end = (P + j) // K * K - P + K
    if config.is_full:
        start, end = 0, R
    is_masked = lambda i: r.step_map[i] >= r.step_map[j]
    if name == "left_to_right":
        is_masked = lambda i: i >= j
    if name == "cut_at_eos":
        is_masked = lambda i: i >= r.num_tokens or r.step_map[i] >= r.step_map[j]
    block = [config.mask_id if is_masked(i) else r.response[i] for i in range(start, end)]
    front = [config.pad_id] * 16 if name == "padded" else []
    return front + r.prompt + r.response[:start] + block + [config.mask_id] * (r.canvas - R), K


@torch.no_grad()
@pytest.mark.parametrize("kind", ["sdar", "llada"])
@pytest.mark.parametrize("name", ["none", "cut_at_eos", "small_blocks", "left_to_right", "padded"])
def test_a_fault_replays_the_states_that_it_says_and_has_a_gap(name, kind, monkeypatch):
    model, rollouts = broken_rollouts(kind)
    plant(name, monkeypatch)
    if name == "small_blocks" and kind == "llada":
        with pytest.raises(ValueError, match="there is nothing to break"):
            rollout.replay(model, rollouts, FAST)
        return
    for r, replayed in zip(rollouts, rollout.replay(model, rollouts, FAST)):
        for j in range(r.num_tokens):
            tokens, K = shown(r, j, name, model.config)
            with monkeypatch.context() as patch:
                patch.setattr(model.config, "block_size", K)
                logits = model(torch.tensor([tokens]))[0, (16 if name == "padded" else 0) + len(r.prompt) + j]
            logits[model.config.mask_id] = -math.inf
            assert replayed[j].item() == pytest.approx(logits.log_softmax(-1)[r.response[j]].item(), abs=1e-4)
    gap = rollout.replay_gap(model, rollouts, FAST, 1.0)["gap"]
    assert gap < 1e-5 if name == "none" else gap > 1e-3


def test_blocks_cut_at_the_response_are_those_that_the_check_of_traces_looks_for(monkeypatch):
    model, rollouts = broken_rollouts("sdar")
    expected = [check.differences(model, [r], PLAIN, is_cut_at_response=True).tolist() for r in rollouts]
    plant("cut_at_response", monkeypatch)
    for r, logp, differences in zip(rollouts, rollout.replay(model, rollouts), expected):
        found = logp.detach() - torch.tensor(r.logp)
        assert found.tolist() == pytest.approx(differences, abs=1e-4)
        found = found.abs()
        assert found.max() < 1e-5 if len(r.prompt) == 8 else found.mean() > 1e-3
    with pytest.raises(ValueError, match="there is nothing to break"):
        rollout.replay(*broken_rollouts("llada"))


@pytest.mark.parametrize("name", broken.FAULTS)
def test_a_fault_trains_the_same_tokens_with_the_same_numbers(name, monkeypatch):
    """Only what they see is another: the states, and so the views and their sizes."""
    model, rollouts = broken_rollouts("sdar")
    config = model.config
    numbers = lambda built: sorted(t._replace(logit_index=0, view=0, masked_share=0.0)
                                   for rows in built for row in rows for t in row.targets)
    right = numbers(rollout.build_rows(rollouts, config, trained_only=True))
    plant(name, monkeypatch)
    rows = rollout.build_rows(rollouts, config, rollout.trace_views, 1, trained_only=True)
    assert numbers(rows) == right
    flat_rows = [row for each in rows for row in each]
    assert all(row.tokens[t.logit_index] == config.mask_id for row in flat_rows for t in row.targets)


@pytest.mark.parametrize("name", [name for name in broken.FAULTS if name not in ("none", "after_filter")])
def test_a_fault_reaches_the_update_and_no_ratio_shows_it(name, monkeypatch):
    usual, weights, _ = one_update(random_model(), keep(copies()))
    plant(name, monkeypatch)
    line, other, _ = one_update(random_model(), keep(copies()), method_of(law=ReplayLaw(True, max_gap=1e9)))
    assert line["trained_tokens"] == usual["trained_tokens"] and line["ratio_max"] == 1
    assert not torch.allclose(other, weights, atol=1e-4)


def test_log_probabilities_after_a_filter_are_too_high_and_are_the_old_ones(monkeypatch):
    model = random_model()
    settings = dict(prompts=random_prompts([5, 9, 6]), max_new_tokens=14, top_p=0.8)
    usual = decode(model, **settings)
    plant("after_filter", monkeypatch)
    for compute in COMPUTES.values():
        rollouts = decode(model, compute=compute, **settings)
        assert [(r.response, r.step_map) for r in rollouts] == [(r.response, r.step_map) for r in usual]
        difference = rollout.replay_differences(model, rollouts, FAST, 1.0)
        assert math.log(0.8) - 1e-5 < difference.min() and difference.max() < 1e-5
        assert difference.mean() < -1e-3
    logp, targets = as_targets(made_up())
    loss = broken.recorded_is_old(logp, targets, 40, 0.2, 0.3)
    assert loss == policy_loss(logp, targets._replace(logp_old=targets.logp), 40, 0.2, 0.3)


def test_a_broken_run_goes_on_and_its_log_shows_the_gap_and_the_ratio(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(runs.Run, "plot", lambda self: None)
    small = ["--model", str(FIXTURES / "tiny"), *small_data(tmp_path), "--steps=1", "--prompts=4",
             "--group_size=4", "--minibatches=1", "--eval_every=0", "--eval_strategies", "dynamic"]
    lines = {}
    for name, words in (("none", ["--top_p=0.8"]), ("after_filter", [])):
        with monkeypatch.context() as patch:
            patch.setattr(rollout, "record", rollout.record)  # so that the fault ends here
            before = broken.main([name, *small, *words])["before"]
        lines[name] = json.loads((tmp_path / f"runs/broken-{name}/metrics.jsonl").read_text())
        assert lines[name]["reward"] == lines["none"]["reward"] and before["dynamic"]["n"] == 4
    assert lines["none"]["gap"] < 1e-5 and lines["none"]["kl"] == 0
    assert lines["after_filter"]["gap"] > 1e-4  # where the law stops a run
    assert lines["after_filter"]["kl"] > 0
    with pytest.raises(ValueError, match="the first word must be one of none"):
        broken.main(["--steps=1"])


def test_a_diff_is_one_that_the_commands_at_its_top_name():
    """Every command in a docstring names files and functions that are there, and each file is short."""
    scripts = {"smollm2.py", "walk.py", "broken.py"}  # run by themselves
    for path in sorted((ROOT / "examples").glob("*.py")):
        if path.name in scripts:
            continue
        text = path.read_text()
        module = text.split('"""')[1]
        named = re.findall(r"(examples/\w+\.py|F):(\w+)", module)
        assert named, path
        for file, function in named:
            target = ROOT / ("examples/forks.py" if file == "F" else file)
            flags.load_function(f"{target}:{function}", {}, "--loss")
        code = [line for line in text.split('"""', 2)[2].splitlines() if line.strip()]
        assert path.name == "forks.py" or len(code) <= 60, f"{path.name} has {len(code)} lines"
