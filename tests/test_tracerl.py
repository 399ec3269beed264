"""Laws of the update: advantages, the loss, and a gradient that does not depend on how the work is cut."""

import argparse
import json
from statistics import fmean

import pytest
import torch
from conftest import FIXTURES, fixture_cases, fixture_tensors, random_model, random_prompts

import eval_math
import model as lm
import rollout
import tracerl
from rollout import Rollout
from tracerl import group_advantages, policy_loss, set_advantages

SETTINGS = dict(dtype="float32", post_num=0, temperature=1.0, shrink=1, micro_tokens=16384,
                clip=0.2, beta=0.01, max_norm=1e9, minibatches=1, epochs=1, group_size=4, seed=0,
                objective="tracerl", gamma=1.0, lam=1.0, value_clip=None, value_warmup=0, value_epochs=1)


def settings(**changes):
    return argparse.Namespace(**(SETTINGS | changes))


def rollouts_with_rewards(model, num_groups=3, group_size=4, temperature=1.0):
    prompts = [p for p in random_prompts(range(3, 3 + num_groups)) for _ in range(group_size)]
    out = rollout.generate(
        model, prompts, max_new_tokens=14, threshold=0.4, eos_ids=(1,), temperature=temperature)
    for i, r in enumerate(out):
        r.reward = float(i * 7 % 3 == 0)
    return out


# ------------------------------------------------------------------------------------------------- advantages


def test_group_advantages_are_standard_scores_within_the_group():
    rewards = torch.tensor([[1.0, 0, 0, 1], [0.5, 0.5, 0.5, 0.5], [1, 0, 0, 0]])
    a = group_advantages(rewards)
    torch.testing.assert_close(a[0], torch.tensor([1.0, -1, -1, 1]))
    assert torch.equal(a[1], torch.zeros(4))
    torch.testing.assert_close(a[2], torch.tensor([3.0, -1, -1, -1]) / 3**0.5)


def test_a_group_is_kept_or_dropped_whole():
    make = lambda rewards: [Rollout([1], [2, 3], 2, [1, 2], reward=r) for r in rewards]
    rollouts = make([1.0, 1, 1, 1, 0, 0, 0, 0, 1, 0, 0, 0, 1, 1, 1, 0, 0, 1, 0, 1])
    assert set_advantages(rollouts, "group", 4, (0.0, 1.0)) == rollouts[8:]
    assert set_advantages(rollouts, "group", 4, (0.3, 0.8)) == rollouts[12:]
    assert set_advantages(rollouts[:8], "group", 4, (0.0, 1.0)) == []
    assert all(r.advantage == [pytest.approx(3**0.5 if r.reward else -(3**-0.5))] * 2 for r in rollouts[8:12])


# --------------------------------------------------------------------------------------------------- the loss


def test_the_loss_is_the_formula():
    logp, old, a = torch.randn(3, 40, generator=torch.Generator().manual_seed(0))
    loss, stats = policy_loss(logp, old, a, 50, clip=0.2, beta=0.3)
    total = 0.0
    for x, y, adv in zip(logp.tolist(), old.tolist(), a.tolist()):
        ratio = torch.tensor(x - y).exp().item()
        total += -min(ratio * adv, min(max(ratio, 0.8), 1.2) * adv) + 0.3 * (ratio - 1 - (x - y))
    assert loss.item() == pytest.approx(total / 50, rel=1e-5)
    ratio = (logp - old).exp()
    assert stats["clip_fraction"] == ((ratio - 1).abs() > 0.2).sum() and stats["ratio_max"] == ratio.max()


def test_losses_of_parts_add_up_to_the_loss_of_the_whole():
    logp, old, a = torch.randn(3, 40, generator=torch.Generator().manual_seed(1))
    whole = policy_loss(logp, old, a, 40)[0]
    parts = sum(policy_loss(logp[i:i + 7], old[i:i + 7], a[i:i + 7], 40)[0] for i in range(0, 40, 7))
    torch.testing.assert_close(whole, parts)


def test_at_ratio_1_the_gradient_is_the_policy_gradient():
    logp = torch.randn(9, requires_grad=True)
    a = torch.randn(9)
    policy_loss(logp, logp.detach(), a, 9, beta=0.5)[0].backward()
    torch.testing.assert_close(logp.grad, -a / 9)


def test_beyond_the_clip_there_is_no_gradient_and_k3_is_never_negative():
    logp, a = torch.tensor([0.5, -0.5, 0.5, -0.5], requires_grad=True), torch.tensor([1.0, -1, -1, 1])
    policy_loss(logp, torch.zeros(4), a, 4, beta=0.0)[0].backward()
    assert (logp.grad != 0).tolist() == [False, False, True, True]
    x = torch.linspace(-50, 50, 101)
    assert all(policy_loss(v[None], torch.zeros(1), torch.zeros(1), 1)[1]["kl"] >= 0 for v in x)
    assert all(policy_loss(v[None], torch.zeros(1), torch.ones(1), 1)[0].isfinite() for v in x)


def test_batch_and_raw_advantages_keep_every_group_unless_nothing_differs():
    make = lambda rewards: [Rollout([1], [2, 3], 2, [1, 2], reward=float(r)) for r in rewards]
    rollouts = make([1, 1, 0, 0, 0, 0])
    assert set_advantages(rollouts, "batch", 2, (0, 1)) == rollouts
    assert [r.advantage[0] for r in rollouts] == pytest.approx([2 / 3, 2 / 3] + [-1 / 3] * 4)
    assert (set_advantages(rollouts, "none", 2, (0, 1)) == rollouts
            and [r.advantage[1] for r in rollouts] == [1, 1, 0, 0, 0, 0])
    assert (set_advantages(make([1] * 4), "batch", 2, (0, 1)) == []
            == set_advantages(make([0] * 4), "none", 2, (0, 1)))
    equal = make([1] * 4)
    assert set_advantages(equal, "value", 2, (0.2, 0.8)) == equal


# ------------------------------------------------------------------------------------------------- the update


def one_update(model, batch, lr=0.1, **changes):
    args = settings(**changes)
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    metrics = tracerl.learn(model, optimizer, None, None, batch, args, step=1)
    return metrics, torch.cat([p.detach().flatten() for p in model.parameters()])


def test_the_first_update_has_ratio_1_and_no_gap():
    model = random_model()
    kept = set_advantages(rollouts_with_rewards(model), "group", 4, (0, 1))
    metrics, _ = one_update(model, kept)
    assert metrics["ratio_max"] == 1 and metrics["kl"] == 0 and metrics["clip_fraction"] == 0
    assert metrics["gap_max"] < 1e-4 and metrics["trained_tokens"] == sum(r.num_tokens for r in kept)


@pytest.mark.parametrize("kind", ["sdar", "llada"])
def test_the_gradient_does_not_depend_on_micro_batches(kind):
    results = []
    for micro_tokens in (1, 100, 100_000):
        model = random_model(kind)
        kept = set_advantages(rollouts_with_rewards(model), "group", 4, (0, 1))
        results.append(one_update(model, kept, micro_tokens=micro_tokens))
    for metrics, weights in results[1:]:
        torch.testing.assert_close(weights, results[0][1], atol=1e-6, rtol=1e-5)
        for name, value in metrics.items():
            assert value == pytest.approx(results[0][0][name], rel=1e-4, abs=2e-6), name


def test_the_clip_acts_on_the_gradient_of_the_whole_update():
    """With a bound below the norm, the step is lr * bound long, however small the micro-batches are."""
    for micro_tokens in (1, 100_000):
        model = random_model()
        start = torch.cat([p.detach().flatten() for p in model.parameters()])
        kept = set_advantages(rollouts_with_rewards(model), "group", 4, (0, 1))
        metrics, weights = one_update(model, kept, micro_tokens=micro_tokens, max_norm=0.05)
        assert metrics["gradient_norm"] > 0.1
        assert (weights - start).norm().item() == pytest.approx(0.1 * 0.05, rel=1e-3)


def test_later_updates_use_the_start_of_step_policy():
    """Two epochs: logp_old is replayed before the first update, and equals the recorded log-probabilities."""
    model = random_model()
    kept = set_advantages(rollouts_with_rewards(model), "group", 4, (0, 1))
    metrics, _ = one_update(model, kept, epochs=2, minibatches=2)
    assert metrics["ratio_max"] > 1.001 and metrics["gap_max"] < 1e-4
    for r in kept:
        torch.testing.assert_close(
            torch.tensor(r.logp_old)[:r.num_tokens], torch.tensor(r.logp)[:r.num_tokens], atol=1e-4, rtol=0)


def test_every_kept_rollout_is_trained_once_per_epoch():
    groups = [[Rollout([g], [i], 1, [1]) for i in range(4)] for g in range(7)]
    batches = tracerl.minibatches(sum(groups, []), 4, 3, seed=5)
    assert len(batches) == 3 and sorted((r.prompt[0], r.response[0]) for b in batches for r in b) == [
        (g, i) for g in range(7) for i in range(4)]
    assert all(len({r.response[0] for r in b if r.prompt == [g]}) in (0, 4)
               for b in batches for g in range(7))
    assert (len(tracerl.minibatches(groups[0], 4, 3, seed=5)) == 1
            and tracerl.minibatches([], 4, 3, seed=5) == [])


def test_a_gradient_that_is_not_finite_changes_nothing():
    model = random_model()
    kept = set_advantages(rollouts_with_rewards(model), "group", 4, (0, 1))
    start = torch.cat([p.detach().flatten() for p in model.parameters()])
    kept[0].advantage = [float("nan")] * len(kept[0].response)
    metrics, weights = one_update(model, kept)
    assert torch.equal(start, weights) and metrics["skipped_updates"] == 1


def test_an_update_raises_the_probability_of_what_was_rewarded():
    model = random_model()
    kept = set_advantages(rollouts_with_rewards(model), "group", 4, (0, 1))
    total = lambda: sum(logp[:r.num_tokens].sum().item() * r.advantage[0]
                        for r, logp in zip(kept, rollout.replay(model, kept)))
    before = total()
    one_update(model, kept, lr=0.003)
    assert total() > before


def test_a_broken_replay_law_stops_a_float32_run():
    args = settings()
    tracerl.check_gap(dict(gap=1e-6, gap_max=2e-4), args)
    for line in (dict(gap=1e-3, gap_max=2e-3), dict(gap=1e-5, gap_max=0.1),
                 dict(gap=float("nan"), gap_max=float("nan"))):
        with pytest.raises(RuntimeError, match="replay law"):
            tracerl.check_gap(line, args)
    tracerl.check_gap(dict(gap=0.1, gap_max=1.0), settings(dtype="bfloat16"))


def test_random_masks_are_theirs_alone_and_coupled_ones_make_every_token_a_target_once():
    model = random_model()
    rollouts = rollouts_with_rewards(model)
    random, coupled = (rollout.trace_rows(rollouts, model.config, objective=name)
                       for name in ("random", "coupled"))
    seen = lambda rows: sorted(zip(rows.owner.tolist(), rows.place.tolist()))
    assert seen(coupled) == [(n, i) for n, r in enumerate(rollouts) for i in range(len(r.response))]
    assert 0.3 < len(random.target) / len(coupled.target) < 0.7
    alone = rollout.trace_rows(rollouts[5:6], model.config, objective="random")
    assert [place for owner, place in seen(random) if owner == 5] == [place for _, place in seen(alone)]


@pytest.mark.parametrize("objective", ["random", "coupled"])
def test_the_baselines_go_through_the_same_update(objective):
    results = []
    for micro_tokens in (1, 100_000):
        model = random_model()
        kept = set_advantages(rollouts_with_rewards(model), "group", 4, (0, 1))
        results.append(one_update(model, kept, objective=objective, minibatches=2, micro_tokens=micro_tokens))
    assert results[0][0]["trained_tokens"] == results[1][0]["trained_tokens"] > 0
    torch.testing.assert_close(results[0][1], results[1][1], atol=1e-6, rtol=1e-5)


def test_a_value_model_learns_the_returns_and_the_policy_waits_for_its_warm_up():
    model = random_model()
    critic = tracerl.value.ValueModel(model)
    optimizers = [torch.optim.Adam(m.parameters(), lr=3e-3) for m in (model, critic)]
    start = [p.clone() for p in model.parameters()]
    kept = set_advantages(rollouts_with_rewards(model), "value", 4, (0, 1))
    lines = [tracerl.learn(model, optimizers[0], critic, optimizers[1], kept, settings(value_warmup=30), step)
             for step in range(1, 31)]
    assert lines[0]["explained_variance"] == 0 and lines[-1]["explained_variance"] > 0.5
    assert lines[-1]["value_loss"] < 0.3 * lines[0]["value_loss"] and "ratio_max" not in lines[-1]
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), start))
    for r in kept:  # gamma = lambda = 1: the return is the reward, the advantage what the value missed
        assert r.returns[:r.num_tokens] == pytest.approx([r.reward] * r.num_tokens)
        assert r.advantage[:r.num_tokens] == pytest.approx(
            [r.reward - v for v in r.value_old[:r.num_tokens]], abs=1e-5)
    line = tracerl.learn(model, optimizers[0], critic, optimizers[1], kept, settings(value_warmup=30), 31)
    assert line["ratio_max"] == 1 and not all(torch.equal(p, q) for p, q in zip(model.parameters(), start))


@pytest.mark.parametrize("post_num", [0, 3])
def test_process_rewards_are_what_is_returned(post_num):
    model = random_model()
    rollouts = rollouts_with_rewards(model, num_groups=1)
    for i, r in enumerate(rollouts):  # each token's own, and not their sum at the end once more
        r.token_rewards = [float((i + j) % 2) for j in range(r.num_tokens)]
        r.reward = sum(r.token_rewards)
    critic = tracerl.value.ValueModel(model)
    tracerl.value_advantages(critic, rollouts, settings(post_num=post_num))
    for r in rollouts:
        steps = sorted(set(r.step_map[:r.num_tokens + post_num]))
        places = [[j for j in range(min(r.num_tokens + post_num, len(r.response))) if r.step_map[j] == t]
                  for t in steps]
        rewards = r.token_rewards + [0.0] * len(r.response)
        later = sum(fmean(rewards[j] for j in at) for at in places[1:])
        assert [r.returns[j] for j in places[0]] == pytest.approx([rewards[j] + later for j in places[0]])


def test_a_reward_function_gives_one_number_or_one_per_token(tmp_path):
    (tmp_path / "mine.py").write_text("def short(problem, text, tokens):\n    return -len(tokens)\n\n"
                                      "def each(problem, text, tokens):\n    return [0.5] * len(tokens)\n\n"
                                      "def bad(problem, text, tokens):\n    return [1.0]\n")
    rollouts = [Rollout([3], [4, 5, 1, 1], 3, [1, 2, 3, 4])]
    problems, tokenizer = [eval_math.Problem("", "")], lm.tiny_tokenizer()
    tracerl.apply_reward(tracerl.load_reward(f"{tmp_path}/mine.py:short"), rollouts, problems, tokenizer)
    assert rollouts[0].reward == -3 and rollouts[0].token_rewards == []
    tracerl.apply_reward(tracerl.load_reward(f"{tmp_path}/mine.py:each"), rollouts, problems, tokenizer)
    assert rollouts[0].reward == 1.5 and rollouts[0].token_rewards == [0.5] * 3
    with pytest.raises(ValueError, match="1 numbers for 3 tokens"):
        tracerl.apply_reward(tracerl.load_reward(f"{tmp_path}/mine.py:bad"), rollouts, problems, tokenizer)
    for spec, message in (("nowhere.py:f", "no file 'nowhere.py'"),
                          (f"{tmp_path}/mine.py:g", "no function 'g'")):
        with pytest.raises(ValueError, match=message):
            tracerl.load_reward(spec)


# --------------------------------------------------------------------------------------- the authors' numbers


def authors_case(stem, name):
    case = next(c for c in fixture_cases(f"{stem}_tracerl") if c["id"] == name)
    data = fixture_tensors(f"{stem}_tracerl_{name}")
    model, _ = lm.load_model(FIXTURES / "authors" / stem, block_size=case.get("block_size"))
    rollouts = [Rollout(p, r, len(r), s, canvas=len(r) if model.config.is_full else 0)
                for p, r, s in zip(case["prompts"], case["responses"], case["step_maps"])]
    return case, data, model, rollouts


def fixture_rows(case, data, owners):
    """Which row of the fixture trains a token -> {(response, place): row}."""
    return {(owners[row], column - case["L0"]): row for row, column in data["p_mask"].nonzero().tolist()}


def at_token(where, rows, table, L0):
    """A (fixture rows, columns) table, or one with a value per row, at our targets, in our order."""
    keys = list(zip(rows.owner.tolist(), rows.place.tolist()))
    return torch.stack([table[where[key]] if table.dim() == 1 else table[where[key], key[1] + L0]
                        for key in keys])


def only(rows, keys):
    """The rows with these targets only."""
    pick = torch.tensor([key in keys for key in zip(rows.owner.tolist(), rows.place.tolist())])
    return rollout.Rows(rows.tokens, rows.layout,
                        *(t[pick] for t in (rows.source, rows.target, rows.owner, rows.place)))


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
    rows = only(rollout.trace_rows(rollouts, model.config, case["shrink"]), where)
    logp, _ = rollout.forward_rows(model, rows)
    old, advantage = (at_token(where, rows, data[name], case["L0"]) for name in ("logp_old", "adv"))
    scale = case["n_rows"] * case["L1"]
    policy, _ = policy_loss(logp, old, advantage, scale, clip=case["eps"], beta=0.0)
    d = (logp - old).clamp(-10, 10)
    loss = policy + case["beta"] * ((-d).exp() - 1 + (logp - old)).sum() / scale
    loss.backward()
    assert len(rows.target) == case["n_trained_tokens"]
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
    rows = rollout.trace_rows(rollouts, model.config, case["shrink"])
    logp, _ = rollout.forward_rows(model, rows)
    old = at_token(where, rows, data["logp_old"], case["L0"] - (stem == "dream"))
    reward, at_row = (at_token(where, rows, table, 0)
                      for table in (data["row_reward"], torch.arange(case["n_rows"])))
    per_row = torch.bincount(at_row, minlength=case["n_rows"])[at_row]
    policy = sum(policy_loss(logp[at_row == row], old[at_row == row], reward[at_row == row],
                             per_row[at_row == row][0] * case["n_rows"], clip=case["eps"], beta=0.0)[0]
                 for row in range(case["n_rows"]))
    d = logp - old
    loss = policy + case["beta"] * ((-d).exp() - 1 + d).sum() / case["n_rows"]
    loss.backward()
    assert policy.item() == pytest.approx(case["policy_loss"], abs=1e-5)
    assert loss.item() == pytest.approx(case["loss"], abs=1e-5)
    compare_gradients(model, case, data)


def compare_gradients(model, case, data):
    for name, p in model.named_parameters():
        theirs = lm.family_name(model.config, name)
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
    (["--steps=0"], "--steps must be above 0"), (["--lr=-1"], "--lr must be above 0"),
    (["--group_size=1"], "--group_size"), (["--keep_range", "0.9", "0.1"], "--keep_range"),
    (["--slots=0"], "--slots"), (["--block_size=0"], "--block_size"), (["--top_p=0"], "--top_p"),
    (["--strategy=best"], "invalid choice"), (["--run=a/b"], "plain folder name"),
    (["--unknown=1"], "unrecognized"), (["--step=5"], "unrecognized"),
    (["--model=x"], "--train_data and --eval_data"), (["--temperature=0"], "--temperature"),
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
        64, 16, 1e-6, 80, (0.2, 0.8))
    assert tracerl.parse_args(["--model=m", "--train_data=a", "--eval_data=b", "--lr=2e-6"]).lr == 2e-6


def test_a_canvas_stays_what_it_was_while_larger_blocks_are_learnt(tmp_path, monkeypatch):
    """Full attention has one canvas whatever the block size: a step of adapting replays what was sampled."""
    monkeypatch.chdir(tmp_path)
    lm.save_checkpoint(random_model("llada"), lm.tiny_tokenizer(), "random")
    (tmp_path / "few.jsonl").write_text('{"problem": "1+1=", "answer": "2"}\n')
    tracerl.main(["--model=random", "--train_data=few.jsonl", "--eval_data=few.jsonl", "--steps=1",
                  "--prompts=1", "--group_size=4", "--max_new_tokens=14", "--block_size=8",
                  "--rollout_block_size=4"])
    assert json.loads(open("runs/tracerl/metrics.jsonl").read())["gap_max"] < 1e-4


def test_all_groups_dropped_is_a_normal_event(tmp_path, monkeypatch):
    """An untrained model is never right: no update, weights unchanged, metrics and summary all the same."""
    monkeypatch.chdir(tmp_path)
    lm.save_checkpoint(random_model(), lm.tiny_tokenizer(), "random")
    (tmp_path / "few.jsonl").write_text('{"problem": "1+1=", "answer": "2"}\n' * 20)
    tracerl.main(["--model=random", "--train_data=few.jsonl", "--eval_data=arithmetic-test",
                  "--dev_data=few.jsonl", "--steps=2", "--prompts=3", "--group_size=2",
                  "--max_new_tokens=8", "--eval_every=1"])
    lines = [json.loads(line) for line in open("runs/tracerl/metrics.jsonl")]
    assert len(lines) == 2 and all(line["kept_groups"] == 0 and line["gap_max"] < 1e-4 for line in lines)
    model, _ = lm.load_model("runs/tracerl/checkpoints/step-2")
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), random_model().parameters()))
    summary = json.load(open("runs/tracerl/summary.json"))
    assert summary["after"]["dynamic"]["n"] == 400 and summary["seed"] == 0
    assert set(summary["before"]) == {"dynamic", "static", "greedy"}
