"""Laws of the trace: what was recorded is what a replay finds, by the definitions and by their fast twins."""

import ast
import functools
import json
import re
from dataclasses import replace

import pytest
import torch
from conftest import (
    COMPUTES, FAST, FIXTURES, all_rows, decode, decoded, fixture_cases, fixture_tensors, random_model,
    random_prompts, seen)
from torch.nn.utils.rnn import pad_sequence

import model as lm
import rollout
from plumbing import checkpoints, packing, show, tiny
from rollout import PLAIN, Decoding, ReplayLaw, Rollout, replay, sample, trace_views

STRATEGIES = list(rollout.STRATEGIES)
both = pytest.mark.parametrize("compute", COMPUTES)  # the definitions, and their twins


def gap(model, rollouts, compute=PLAIN, **settings):
    """The largest distance between a replayed log-probability and the recorded one."""
    with torch.no_grad():
        replayed = replay(model, rollouts, compute, **settings)
    return max((logp - torch.tensor(r.logp)).abs().max().item() for logp, r in zip(replayed, rollouts))


def states(r, model, shrink=1):
    """The slow twin of the views: all the decoder's states as plain text -> (tokens, target positions) pairs.

    Block attention: everything before the block is clean. What follows it does not matter and is cut off.
    """
    config, P = model.config, len(r.prompt)
    text = r.prompt + r.response + [config.mask_id] * (r.canvas - len(r.response))
    step = [0] * P + list(r.step_map) + [0] * (r.canvas - len(r.response))
    K = len(text) if config.is_full else config.block_size
    for start in range(0, len(text), K):
        inside = range(start, min(start + K, len(text)))
        distinct = sorted({step[i] for i in inside} - {0})
        for first in range(0, len(distinct), shrink):
            merged = distinct[first:first + shrink]
            masked = [i for i in inside if step[i] >= merged[0]]
            tokens = [config.mask_id if i in masked else text[i] for i in range(inside.stop)]
            yield tokens, [i for i in inside if step[i] in merged]


def slow_logprobs(r, model, shrink=1):
    """Log-probability of every response token: one whole forward of `model(tokens)` for each state."""
    out = [None] * len(r.response)
    without_mask = torch.arange(model.config.vocab_size) == model.config.mask_id
    for tokens, targets in states(r, model, shrink):
        logits = model(torch.tensor([tokens]))[0].masked_fill(without_mask, -torch.inf)
        for i in targets:
            token = (r.prompt + r.response)[i]
            assert out[i - len(r.prompt)] is None
            out[i - len(r.prompt)] = logits[i].log_softmax(-1)[token]
    return torch.stack(out)


# --------------------------------------------------------------------------------------------- the replay law


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("K", [1, 4, 8])
@both
def test_the_replay_law(compute, K, strategy):
    """For every P mod K and every end inside a block, a replay gives the recorded log-probabilities."""
    rollouts = decoded(compute, K=K, max_new_tokens=19, strategy=strategy, threshold=0.4, seed=1)
    assert {len(r.prompt) % K for r in rollouts} == set(range(K))
    assert len({r.num_tokens % K for r in rollouts}) > min(K - 1, 1)
    assert {r.is_truncated for r in rollouts} == {True, False}
    assert gap(random_model(block_size=K), rollouts, COMPUTES[compute]) < 1e-4


SAMPLERS = [(0.5, 0, 1.0), (1.5, 5, 1.0), (1.0, 0, 0.7), (0.7, 6, 0.8), (0.0, 0, 1.0), (1.0, 1, 1.0)]


@pytest.mark.parametrize("temperature, top_k, top_p", SAMPLERS)
@pytest.mark.parametrize("kind", ["sdar", "dream"])
@both
def test_the_replay_law_whatever_the_sampler(compute, kind, temperature, top_k, top_p):
    rollouts = decoded(compute, kind, lengths=tuple(range(3, 9)), max_new_tokens=16, temperature=temperature,
                       top_k=top_k, top_p=top_p, threshold=0.6)
    bound = 1e-4 / min(temperature or 1.0, 1.0)
    assert gap(random_model(kind), rollouts, COMPUTES[compute], temperature=temperature) < bound


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("kind", ["dream", "llada"])
@both
def test_the_replay_law_in_full_attention(compute, kind, strategy):
    """Canvases of other lengths, blocks that do not divide the canvas, and Dream's shift."""
    for room in (5, 12):
        rollouts = decoded(compute, kind, K=5, lengths=(1, 4, 9, 6), max_new_tokens=room, strategy=strategy,
                           threshold=0.4)
        assert gap(random_model(kind, block_size=5), rollouts, COMPUTES[compute]) < 1e-4
        assert all(len(r.response) == room or len(r.response) % 5 == 0 for r in rollouts)


@both
def test_a_wrong_replay_breaks_the_law(compute):
    """The law can fail: another order, another temperature or merged steps give other numbers."""
    model, compute = random_model(), COMPUTES[compute]
    prompts = random_prompts([5, 6, 7])
    rollouts = decode(model, prompts, compute, max_new_tokens=16, strategy="static", eos_ids=())
    assert gap(model, rollouts, compute) < 1e-4
    assert gap(model, rollouts, compute, temperature=0.9) > 1e-2
    assert gap(model, rollouts, compute, shrink=2) > 1e-2
    for r in rollouts:
        r.step_map = r.step_map[::-1]
    assert gap(model, rollouts, compute) > 1e-2


def test_a_gap_beyond_rounding_stops_a_run_in_float32():
    law = ReplayLaw(is_float32=True)
    law.enforce(gap=1e-6, gap_max=2e-4)
    for gap, gap_max in ((1e-3, 2e-3), (1e-5, 0.1), (torch.nan, torch.nan)):
        with pytest.raises(RuntimeError, match="the replay law is broken"):
            law.enforce(gap, gap_max)
    ReplayLaw(is_float32=True, temperature=0.1).enforce(gap=5e-4, gap_max=5e-3)  # logits are divided by T
    with pytest.raises(RuntimeError, match="the replay law is broken"):
        ReplayLaw(is_float32=True, temperature=2.0).enforce(gap=2e-4, gap_max=2e-4)  # but it does not shrink
    ReplayLaw(is_float32=True, max_gap=0.01).enforce(gap=1e-3, gap_max=2e-3)


def test_a_wide_gap_in_bfloat16_is_said_and_stops_a_run_in_the_third_step(capsys):
    law = ReplayLaw(is_float32=False)
    wide, narrow = dict(gap=0.2, gap_max=1.0), dict(gap=0.01, gap_max=0.9)
    for gaps in (wide, wide, narrow, wide, wide):
        law.enforce(**gaps)
    assert capsys.readouterr().out.count("WARNING: the replay law is broken") == 4
    with pytest.raises(RuntimeError, match=r"by 2.0e-01 on average \(allowed: 5e-02\) and up to 1.0e"):
        law.enforce(**wide)
    ReplayLaw(is_float32=False, max_gap=0.3).enforce(**wide)


# ---------------------------------------------------------------------- the replay against one row per state


@pytest.mark.parametrize("kind, K, shrink", [
    ("sdar", 4, 1), ("sdar", 8, 1), ("sdar", 4, 2), ("sdar", 8, 3), ("sdar", 1, 1),
    ("dream", 4, 1), ("dream", 4, 3), ("llada", 8, 1), ("llada", 8, 8),
])
def test_a_replay_is_one_row_per_trace_step(kind, K, shrink):
    """Log-probabilities and gradients, padded and packed; the slow twin is `model(tokens)` alone."""
    model = random_model(kind, block_size=K)
    rollouts = decode(model, random_prompts([3, 9, 6]), max_new_tokens=13, threshold=0.4)
    weight = torch.randn(sum(len(r.response) for r in rollouts), generator=torch.Generator().manual_seed(0))
    gradients = lambda logp: torch.autograd.grad((weight * logp).sum(), list(model.parameters()))
    slow = torch.cat([slow_logprobs(r, model, shrink) for r in rollouts])
    of_slow = gradients(slow)
    for compute in (PLAIN, FAST, FAST._replace(is_packed=True)):
        ours = torch.cat(replay(model, rollouts, compute._replace(max_tokens=64), shrink=shrink))
        torch.testing.assert_close(ours, slow, atol=1e-5, rtol=1e-5)
        for mine, theirs in zip(gradients(ours), of_slow):
            torch.testing.assert_close(mine, theirs, atol=1e-5 * float(theirs.abs().max() + 1), rtol=1e-5)


@pytest.mark.parametrize("kind", ["sdar", "llada"])
def test_every_response_token_is_a_target_exactly_once(kind):
    model = random_model(kind)
    rollouts = decode(model, random_prompts([2, 5, 8, 11]), max_new_tokens=14, threshold=0.3)
    for shrink in (1, 2, 100):
        rows = all_rows(rollouts, model.config, shrink=shrink)
        assert sorted(seen(rows)) == [(n, i) for n, r in enumerate(rollouts) for i in range(len(r.response))]
        assert rows.targets.token.tolist() == [rollouts[n].response[i] for n, i in seen(rows)]
    trained = all_rows(rollouts, model.config, trained_only=True)
    assert sorted(seen(trained)) == [(n, i) for n, r in enumerate(rollouts) for i in range(r.num_tokens)]
    assert {r.is_truncated for r in rollouts} == {True, False}


def test_a_target_carries_what_the_record_says():
    model = random_model()
    rollouts = decode(model, random_prompts([2, 5, 8]), max_new_tokens=14)
    for n, r in enumerate(rollouts):
        r.group = 7 - n
        r.advantage = [10.0 * n + i for i in range(len(r.response))]
        r.returns = [-x for x in r.advantage]
    targets = all_rows(rollouts, model.config).targets
    assert len(targets.token) == sum(len(r.response) for r in rollouts)
    for numbers in zip(*(column.tolist() for column in targets)):
        t = lm.Targets(*numbers)
        r, i = rollouts[t.rollout_index], t.response_index
        assert (t.token, t.step, t.group) == (r.response[i], r.step_map[i], r.group)
        assert t.logp == pytest.approx(r.logp[i])
        assert t.advantage == 10 * t.rollout_index + i == -t.returns and t.value_old == 0 == t.logp_old
        block = next(block for block in rollout.blocks_of(len(r.prompt), len(r.response), 4) if i in block)
        num_masked = sum(r.step_map[j] >= r.step_map[i] for j in block)
        assert t.masked_share == pytest.approx(num_masked / len(block))


@pytest.mark.parametrize("is_packed", [False, True])
@pytest.mark.parametrize("kind, number", [("sdar", 24), ("llada", 10)])
def test_micro_batches_hold_the_same_targets_within_their_budget(kind, number, is_packed):
    model = random_model(kind)
    rollouts = decode(model, random_prompts(range(1, number + 1)), max_new_tokens=30, eos_ids=())
    built = rollout.build_rows(rollouts, model.config, shrink=8)
    compute = PLAIN._replace(max_tokens=512, is_packed=is_packed)
    parts = packing.micro_batches(built, compute, model)
    assert len(parts) > 3 and all(part.tokens.numel() <= 512 or len(part.tokens) == 1 for part in parts)
    assert sorted(sum(map(seen, parts), [])) == sorted(seen(all_rows(rollouts, model.config)))
    for n, rows in enumerate(built):  # a response is in one part where it fits
        size = sum(len(row.tokens) for row in rows)
        owners = [part for part in parts if (part.targets.rollout_index == n).any()]
        assert len(owners) == 1 or size > 512, (n, size)


def test_a_group_that_fits_is_packed_into_one_micro_batch():
    """Its longest row, times the number of rows, would not fit. But nothing is padded to the longest."""
    model = random_model()
    rollouts = [decode(model, random_prompts([P]), max_new_tokens=16, eos_ids=())[0] for P in (150, 9, 5, 7)]
    built = rollout.build_rows(rollouts, model.config)
    group = [row for rows in built for row in rows]
    size = sum(len(row.tokens) for row in group)
    compute = PLAIN._replace(max_tokens=size, is_packed=True)
    part, = packing.micro_batches([group], compute, model)
    assert len(set(part.targets.rollout_index.tolist())) == 4
    assert len(packing.micro_batches([group], compute._replace(is_packed=False), model)) > 1


def test_a_larger_block_shows_what_smaller_ones_left_undecoded_as_masks():
    """Traces of K = 4 may teach a model of K = 8."""
    model = random_model(block_size=4)
    rollouts = decode(model, random_prompts([8, 9, 6]), max_new_tokens=10, strategy="static", eos_ids=())
    config = replace(model.config, block_size=8)
    for r in rollouts:
        rows = all_rows([r], config)
        assert len(rows.targets.token) == len(r.response)
        views = rows.layout.view + 100 * rows.layout.block
        assert set(views[rows.layout.view > 0].unique(return_counts=True)[1].tolist()) == {8}
        is_left = (rows.layout.view > 0) & (rows.layout.position >= len(r.prompt) + len(r.response))
        assert is_left.any() == ((len(r.prompt) + len(r.response)) % 8 > 0)
        assert (rows.tokens[is_left] == config.mask_id).all()


def test_views_that_predict_what_they_show_are_refused():
    r = Rollout([3], [5, 6, 7, 8], 4, [1, 3, 1, 2])
    config = random_model().config
    for views in (lambda block: [([block[0]], block)], lambda block: [([j + 1 for j in block], [])]):
        with pytest.raises(ValueError, match="what is predicted must be masked, and what is masked must be of"):
            rollout.build_rows([r], config, views)


# ---------------------------------------------------------------------------------------- the running example
#
# The prompt 894+396= and its first block 1 0 1 ; with the step map 1 3 1 2, in the tokens of the tiny model.

EXAMPLE = tiny.tiny_tokenizer()("894+396=101;", add_special_tokens=False).input_ids
RUNNING = Rollout(EXAMPLE[:8], EXAMPLE[8:], 4, [1, 3, 1, 2])


def as_text(tokens):
    """Tokens of the tiny model as they stand in the pictures, a character each; "?" is the mask."""
    return ["?" if token == 2 else tiny.tiny_tokenizer().decode([token]) for token in tokens]


def test_a_trace_step_is_shrink_neighbouring_denoising_steps():
    """The views in the docstring of trace_views, and those of merged steps."""
    block = [0, 1, 2, 3]
    told = {int(shrink): [ast.literal_eval(view) for view in re.findall(r"\(\[.*?\], \[.*?\]\)", views)]
            for shrink, views in re.findall(r"shrink (\d)   (.*)", trace_views.__doc__)}
    assert told[1] == [([0, 1, 2, 3], [0, 2]), ([1, 3], [3]), ([1], [1])]
    assert told[2] == [([0, 1, 2, 3], [0, 2, 3]), ([1], [1])]
    for shrink in (1, 2):
        assert trace_views(RUNNING, block, shrink) == told[shrink]
    assert trace_views(RUNNING, block, 9) == [([0, 1, 2, 3], [0, 1, 2, 3])]
    gaps = replace(RUNNING, step_map=[7, 30, 7, 12])  # only the order counts
    assert trace_views(gaps, block, 1) == told[1]


def test_the_block_on_top_of_rollout_py_is_decoded_as_it_says():
    shown = re.findall(r"before step (\d) +(\S \S \S \S) +step \1 reveals (.*?)  ", rollout.__doc__)
    step_map = re.search(r"step_map +(\d) +(\d) +(\d) +(\d)", rollout.__doc__)
    assert list(map(int, step_map.groups())) == RUNNING.step_map
    views = trace_views(RUNNING, [0, 1, 2, 3], 1)
    assert len(shown) == len(views) == 3
    for (step, tokens, revealed), (masked, targets) in zip(shown, views):
        text = as_text(RUNNING.response)
        assert revealed.split(" and ") == [text[j] for j in targets]
        assert {RUNNING.step_map[j] for j in targets} == {int(step)}
        assert tokens.split() == ["?" if j in masked else text[j] for j in range(4)]


def test_a_row_is_the_picture_in_the_docstring_of_lay_out():
    lines = {line.split()[0]: line for line in rollout.lay_out.__doc__.splitlines()
             if line.strip().startswith(("tokens ", "position ", "block ", "view ", "target "))}
    told = {name: line.split()[1:] for name, line in lines.items()}
    (row,), = rollout.build_rows([RUNNING], random_model(block_size=4).config)
    assert told["tokens"] == as_text(row.tokens) and len(row.tokens) == 20
    for name in ("position", "block", "view"):
        assert list(map(int, told[name])) == getattr(row, name), name
    # A target stands under the place whose output predicts it.
    first = lines["tokens"].index("8  9")
    characters = lambda name: re.finditer(r"\S", lines[name][first:])
    columns = {match.start(): number for number, match in enumerate(characters("tokens"))}
    targets = {columns[match.start()]: match[0] for match in characters("target")}
    assert {t.logit_index: as_text([t.token])[0] for t in row.targets} == targets
    assert [t.response_index for t in row.targets] == [0, 2, 3, 1] and list(targets.values()) == list("11;0")


def test_blocks_are_cut_at_absolute_positions():
    assert rollout.blocks_of(9, 7, 4) == [[0, 1, 2], [3, 4, 5, 6]]
    assert rollout.blocks_of(8, 8, 4) == [[0, 1, 2, 3], [4, 5, 6, 7]]


# --------------------------------------------------------------------------------------------------- decoding


@both
def test_sequential_with_one_token_a_step_is_decoding_from_left_to_right(compute):
    """With its trace it is JustGRPO's setting: each token is predicted from those on its left and masks."""
    model = random_model()
    settings = dict(max_new_tokens=14, strategy="sequential", eos_ids=())
    r, = decode(model, random_prompts([6]), COMPUTES[compute], **settings)
    assert r.step_map == list(range(1, 15))
    rows = all_rows([r], model.config)
    for column, i in zip(rows.targets.logit_index.tolist(), rows.targets.response_index.tolist()):
        position, _, block, view = (numbers[0] for numbers in rows.layout)
        is_later = (view == view[column]) & (block == block[column]) & (position >= 6 + i)
        assert (rows.tokens[0][is_later] == model.config.mask_id).all()


@both
def test_same_seed_same_trace_other_seed_other_trace(compute):
    one, two, other = (decode(random_model(), random_prompts([5]), COMPUTES[compute], seed, eos_ids=(),
                              max_new_tokens=24)[0] for seed in (3, 3, 4))
    assert one == two and one.response != other.response


def reveal(strategy, confidence, entropy, is_masked, quota, **settings):
    """What a strategy reveals of blocks: the tensors are (B, K), quota an int for all."""
    quota = torch.full((len(confidence),), quota)
    token = torch.zeros_like(is_masked, dtype=torch.int64)
    return Decoding(strategy=strategy, **settings).reveal(
        confidence, entropy, is_masked, quota, token, torch.zeros_like(quota))


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_only_masked_positions_are_ever_revealed(strategy):
    generator = torch.Generator().manual_seed(0)
    confidence, entropy = torch.rand(2, 500, 8, generator=generator)
    is_masked = torch.rand(500, 8, generator=generator) < 0.4
    is_masked[:, 3] |= ~is_masked.any(-1)
    for quota in (1, 3, 8):
        is_kept = reveal(strategy, confidence, entropy, is_masked, quota, threshold=0.8)
        assert not (is_kept & ~is_masked).any() and is_kept.any(-1).all()
        if strategy in ("static", "sequential"):
            assert torch.equal(is_kept.sum(-1), is_masked.sum(-1).clamp(max=quota))


def test_what_each_strategy_reveals():
    confidence = torch.tensor([[0.95, 0.2, 0.93, 0.91]])
    entropy = torch.tensor([[0.20, 1.5, 0.14, 0.1]])
    is_masked = torch.tensor([[True, True, True, False]])
    table = lambda strategy, quota, entropy=entropy, **more: reveal(
        strategy, confidence, entropy, is_masked, quota, **more).int().tolist()[0]
    assert table("static", 1) == [1, 0, 0, 0] and table("static", 2) == [1, 0, 1, 0]
    assert table("sequential", 2) == [1, 1, 0, 0]
    assert table("dynamic", 1) == [1, 0, 1, 0] and table("dynamic", 3) == [1, 1, 1, 0]
    assert table("dynamic", 1, threshold=0.99) == [1, 0, 0, 0]
    assert table("entropy", 1) == [1, 0, 1, 0]  # 0.14 + 0.20 < 0.35
    assert table("entropy", 1, entropy=entropy + 0.4) == [0, 0, 1, 0]  # always at least one


MINE = """
def reveal(is_masked, token, step):
    is_leftmost = is_masked & (is_masked.cumsum(-1) == 1)
    is_even = is_masked & (token % 2 == 0) & (step > 0)[:, None]
    return is_leftmost | is_even


def sharp(confidence, sharpness):
    return confidence > sharpness
"""


@both
def test_a_strategy_of_ones_own_is_given_the_tokens_and_the_step_in_the_block(compute, tmp_path):
    """The leftmost mask of every block, and from the block's second step on every even token."""
    (tmp_path / "mine.py").write_text(MINE)
    model = random_model(block_size=8)
    settings = dict(max_new_tokens=24, strategy=f"{tmp_path}/mine.py:reveal", eos_ids=())
    rollouts = decode(model, random_prompts([3, 8, 13]), COMPUTES[compute], **settings)
    assert gap(model, rollouts, COMPUTES[compute]) < 1e-4
    num_even = 0
    for r in rollouts:
        for block in rollout.blocks_of(len(r.prompt), len(r.response), 8):
            for number, (masked, targets) in enumerate(trace_views(r, block, 1)):
                assert targets[0] == masked[0]
                assert number > 0 or len(targets) == 1
                assert all(r.response[j] % 2 == 0 for j in targets[1:])
                num_even += len(targets) - 1
    assert num_even > 5


def test_a_strategy_that_cannot_be_called_says_what_is_missing(tmp_path):
    (tmp_path / "mine.py").write_text(MINE)
    with pytest.raises(ValueError, match="--strategy .*mine.py has no function 'blunt'"):
        Decoding(strategy=f"{tmp_path}/mine.py:blunt")
    with pytest.raises(ValueError, match="sharp asks for sharpness, which it cannot be given: there are"):
        reveal(f"{tmp_path}/mine.py:sharp", *torch.rand(2, 1, 4), torch.ones(1, 4).bool(), 1)


@both
def test_a_response_ends_at_the_first_eos_of_the_response(compute):
    prompts = random_prompts([6, 9, 5])
    prompts[0][-1] = prompts[2][-1] = 1  # an eos in the last block of the prompt ends nothing
    for r in decode(random_model(), prompts * (10 if compute == "fast" else 4), COMPUTES[compute],
                    max_new_tokens=21):
        assert (len(r.prompt) + len(r.response)) % 4 == 0
        assert len(r.response) == len(r.step_map) == len(r.logp) == len(r.confidence) > 0
        early = r.response[:21]
        assert r.is_truncated == (1 not in early)
        assert r.num_tokens == (21 if r.is_truncated else early.index(1) + 1)
        if not r.is_truncated:
            assert 0 <= len(r.response) - r.num_tokens < 4
        blocks = rollout.blocks_of(len(r.prompt), len(r.response), 4)
        steps = [[r.step_map[j] for j in block] for block in blocks]
        assert all(max(a) < min(b) for a, b in zip(steps, steps[1:]))
        assert set(r.step_map) == set(range(1, max(r.step_map) + 1))


@both
def test_the_mask_token_is_never_sampled(compute):
    model = random_model()
    with torch.no_grad():  # the mask token would often be the most probable
        model.head.weight[2] = model.head.weight[3:].sum(0) * 3
    number = 40 if compute == "fast" else 10
    rollouts = decode(model, random_prompts([4] * number), COMPUTES[compute], max_new_tokens=16)
    assert all(2 not in r.response for r in rollouts) and gap(model, rollouts, COMPUTES[compute]) < 1e-4


@both
def test_denoising_steps_set_the_quota_with_the_remainder_first(compute):
    model = random_model(block_size=8)
    settings = dict(strategy="static", denoising_steps=3, eos_ids=())
    r, = decode(model, random_prompts([8]), COMPUTES[compute], max_new_tokens=16, **settings)
    assert [r.step_map.count(step) for step in range(1, 7)] == [3, 3, 2, 3, 3, 2]
    r, = decode(model, random_prompts([12]), COMPUTES[compute], max_new_tokens=4, **settings)
    assert [r.step_map.count(step) for step in (1, 2)] == [3, 1]  # fewer masks are left than the quota


def test_sampling_is_inverse_cdf_after_top_k_then_top_p():
    p = torch.tensor([[0.4, 0.0, 0.3, 0.2, 0.1]])
    draws = torch.tensor([0.0, 0.39, 0.41, 0.69, 0.71, 0.89, 0.91, 1 - 1e-16], dtype=torch.float64)
    pick = lambda **filters: sample(p.log().expand(len(draws), -1), draws, **filters)[0].tolist()
    assert pick() == [0, 0, 2, 2, 3, 3, 4, 4]
    assert pick(top_k=2) == [0, 0, 0, 2, 2, 2, 2, 2]  # 4/7, 3/7
    assert pick(top_p=0.65) == [0, 0, 0, 2, 2, 2, 2, 2]  # the token that crosses the bound stays
    token, confidence, logp, _ = sample(p.log(), draws[:1], top_k=2)
    assert confidence.item() == pytest.approx(4 / 7) and logp.exp().item() == pytest.approx(0.4)
    token, confidence, logp, _ = sample(p.log(), draws[-1:], temperature=0)
    # greedy: the order comes from the unfiltered distribution
    assert token.item() == 0 and confidence.item() == pytest.approx(0.4)


def test_a_token_of_probability_0_is_never_drawn():
    """Neither between others nor at the end of 152,000, where sums of float32 would reach 1 too early."""
    p = torch.rand(4, 151_936, generator=torch.Generator().manual_seed(0))
    p[:, ::3] = 0
    p[:, -1000:] = 0
    p /= p.sum(-1, keepdim=True)
    for draw in (0.0, 0.5, 1 - 2.0**-53):
        token = rollout.inverse_cdf(p, torch.full((4,), draw, dtype=torch.float64))
        assert (p.gather(1, token[:, None]) > 0).all()


def test_the_hash_is_uniform_and_its_words_do_not_mix():
    n = torch.arange(100_000)
    for u in (rollout.uniform(n * 0 + 5, n * 0 + 1, n), rollout.uniform(n, n * 0, n * 0),
              rollout.uniform(n * 0, n, n * 0)):
        assert 0 <= u.min() and u.max() < 1 and len(u.unique()) == len(n)
        assert abs(u.mean() - 0.5) < 0.005 and abs((u[1:] * u[:-1]).mean() - 0.25) < 0.005
        assert (torch.histc(u.float(), 20, 0, 1) / 5000 - 1).abs().max() < 0.06
    # numbers and tensors
    assert torch.equal(rollout.uniform(7, 3, n), rollout.uniform(n * 0 + 7, n * 0 + 3, n))


@pytest.mark.parametrize("settings, message", [
    (dict(max_new_tokens=0), "max_new_tokens 0 is not possible: it must be at least 1"),
    (dict(strategy="best"), "--strategy best: .* one of static, dynamic, sequential, entropy"),
    (dict(temperature=-1.0), "temperature -1.0"), (dict(temperature=torch.inf), "temperature inf"),
    (dict(top_p=0.0), "top_p 0.0"), (dict(top_p=1.5), "top_p 1.5"), (dict(top_k=-3), "top_k -3"),
    (dict(threshold=1.5), "threshold 1.5"), (dict(denoising_steps=0), "denoising_steps 0"),
    (dict(denoising_steps=5), "denoising_steps 5 is not possible: it must be from 1 to the block size, 4"),
])
def test_bad_settings_are_refused_by_name(settings, message):
    for compute in COMPUTES.values():
        with pytest.raises(ValueError, match=message):
            decode(random_model(), [[3, 4]], compute, **{"max_new_tokens": 4, **settings})


def test_a_block_size_of_0_is_refused():
    with pytest.raises(ValueError, match="block_size must be at least 1, got 0"):
        replace(random_model().config, block_size=0)


@both
def test_an_empty_prompt_and_a_missing_seed_are_refused_and_no_prompts_are_fine(compute):
    generate = COMPUTES[compute].generate
    with pytest.raises(ValueError, match="a prompt is empty"):
        decode(random_model(), [[3], []], COMPUTES[compute], max_new_tokens=4)
    for seeds in ([1], [1, 2, 3]):
        with pytest.raises(ValueError):
            generate(random_model(), [[3], [4]], seeds, Decoding(max_new_tokens=4))
    assert generate(random_model(), [], [], Decoding(max_new_tokens=4)) == []
    assert replay(random_model(), [], COMPUTES[compute]) == []


@both
def test_weights_that_are_not_finite_are_refused(compute):
    model = random_model()
    with torch.no_grad():
        model.head.weight[5, 0] = torch.nan
    for strategy in STRATEGIES:
        with pytest.raises(ValueError, match="the model's logits are not finite"):
            decode(model, [[3, 4]], COMPUTES[compute], max_new_tokens=4, strategy=strategy)


# --------------------------------------------------------------------------------------- the authors' numbers


@functools.cache
def authors_model(name, K):
    """A checkpoint of the authors' code, with blocks of K."""
    return checkpoints.load_model(FIXTURES / "authors" / name, block_size=K)[0]


SDAR = {}  # name -> the cases that differ in their prompt only: b4_argmax_static is b4_p3_argmax_static, ...
for found in fixture_cases("sdar_generate"):
    if "topk1" not in found["id"]:
        SDAR.setdefault(re.sub(r"_p\d+", "", found["id"], count=1), []).append(found)


@pytest.mark.parametrize("name", SDAR)
@both
def test_sdar_decoding_is_the_authors(compute, name, authors_policy, monkeypatch):
    """Tokens and reveal steps exactly; log-probabilities and confidences to the fixture's tolerance.

    For the `inverse_cdf` cases the stored uniforms are injected. Their logp is at temperature 1, ours at T.
    """
    case = SDAR[name][0]
    K, T = case["block_length"], case["temperature"]
    data = fixture_tensors("sdar_generate")
    is_drawn = case["sampling"] == "inverse_cdf"
    if is_drawn:
        stored = [data[f"{case['id']}.u"] for case in SDAR[name]]
        draws = pad_sequence(stored, batch_first=True)  # (cases, steps, K)
        monkeypatch.setattr(
            rollout, "uniform", lambda seed, step, position: draws[seed, step - 1, position % K])
    rollouts = decode(
        authors_model("sdar", K), [case["prompt"] for case in SDAR[name]], COMPUTES[compute],
        max_new_tokens=case["gen_length"], denoising_steps=case["denoising_steps"],
        strategy=case["strategy"].removeprefix("low_confidence_"),
        threshold=case["confidence_threshold"] or 0.9, temperature=T if is_drawn else 0,
        top_k=case["top_k"], top_p=case["top_p"], eos_ids=case["stop_token_ids"] or ())
    for r, case in zip(rollouts, SDAR[name], strict=True):
        P = len(r.prompt)
        end = P + len(r.response)
        assert r.prompt + r.response == case["tokens"][:end] and set(case["tokens"][end:]) <= {119}
        assert r.step_map == case["step_global"][P:end]
        confidence, logp = (data[f"{case['id']}.{column}"][P:end] for column in ("confidence", "logp"))
        torch.testing.assert_close(torch.tensor(r.confidence), confidence, atol=2e-4, rtol=0)
        if T == 1:
            torch.testing.assert_close(torch.tensor(r.logp), logp, atol=2e-4, rtol=0)


@pytest.mark.parametrize("case", [
    c for c in fixture_cases("llada_generate") if "_original_" in c["id"]
    or ("_hNone_" in c["id"] and c["id"].endswith("_confidence") and "margin" not in c["id"])
], ids=lambda c: c["id"])
@both
def test_llada_decoding_is_the_authors(compute, case):
    """With their prefix cache, too, which only the engine has."""
    if case.get("use_cache") and compute == "plain":
        pytest.skip("the definition has no such cache")
    K, P = case["block_length"], len(case["prompt"])
    model = authors_model("llada", K)
    threshold = case.get("threshold")
    steps_per_block = case["steps"] * K // case["gen_length"]
    r, = decode(model, [case["prompt"]], COMPUTES[compute], max_new_tokens=case["gen_length"], temperature=0,
                strategy="static" if threshold is None else "dynamic", threshold=threshold or 0.9,
                denoising_steps=steps_per_block if threshold is None else K, eos_ids=(),
                cache="prefix" if case.get("use_cache") else "none")
    order = lambda steps: [sorted(set(steps)).index(step) for step in steps]
    assert r.prompt + r.response == case["tokens"] and order(r.step_map) == order(case["unmask_step"][P:])


@pytest.mark.parametrize("name", ["sdar_tracerl_aligned_b4", "sdar_tracerl_aligned_b8_shrink3"])
@both
def test_replayed_log_probabilities_are_the_authors(compute, name, authors_policy):
    case = next(c for c in fixture_cases("sdar_tracerl") if name.endswith("tracerl_" + c["id"]))
    data, L0 = fixture_tensors(name), case["L0"]
    model = authors_model("sdar", case["block_size"])
    rollouts = [Rollout(p, r, len(r), s)
                for p, r, s in zip(case["prompts"], case["responses"], case["step_maps"])]
    ours = replay(model, rollouts, COMPUTES[compute], shrink=case["shrink"])
    for row, owner in enumerate(case["row_to_response"]):
        at = data["p_mask"][row, L0:]
        torch.testing.assert_close(ours[owner][at], data["logp_self"][row, L0:][at], atol=2e-4, rtol=0)


def test_the_page_holds_the_trace_and_no_text_can_break_out_of_it(tmp_path):
    tokenizer = tiny.tiny_tokenizer()
    r, = decode(random_model(), [[5, 6, 7]], max_new_tokens=8, seed=1)
    tokenizer.decode = lambda ids: "</script><b>" if list(ids) == r.response[:1] else f"{list(ids)}"
    r.advantage, r.reward = [0.5] * r.num_tokens, 1.0
    show.write_page([[r]], 4, tokenizer, tmp_path / "trace.html")
    page = (tmp_path / "trace.html").read_text()
    assert page.count("</script>") == 1
    (shown,), = json.loads(page.split("const pairs = ")[1].split(";\nconst")[0])
    assert [t["step"] for t in shown["tokens"]] == r.step_map and shown["tokens"][0]["text"] == "</script><b>"
    assert [t["logp"] for t in shown["tokens"]] == [round(x, 4) for x in r.logp]
    assert [("advantage" in t) for t in shown["tokens"]] == [j < r.num_tokens for j in range(len(r.response))]
