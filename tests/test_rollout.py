"""Laws of the trace: what was recorded is what a replay finds, whoever else is in the batch."""

import gc
import json
import random
import resource
import weakref

import pytest
import torch
from conftest import FIXTURES, all_rows, fixture_cases, fixture_tensors, random_model, random_prompts, seen
from torch.utils._python_dispatch import TorchDispatchMode

import model as lm
import rollout
import sft
from plumbing import checkpoints, cuda, packing, show
from rollout import Rollout, generate, replay, reveal, sample, trace_views

STRATEGIES = list(rollout.STRATEGIES)


def gap(model, rollouts, **settings):
    with torch.no_grad():
        return max((logp - torch.tensor(r.logp)).abs().max().item()
                   for logp, r in zip(replay(model, rollouts, **settings), rollouts))


def states(r, model, shrink=1):
    """The slow twin of the views: all the decoder's states as plain text -> (tokens, target positions) pairs.

    Block attention: everything before the block is clean; what follows it does not matter and is cut off.
    """
    config, P = model.config, len(r.prompt)
    text = r.prompt + r.response + [config.mask_id] * (r.canvas - len(r.response))
    step = [0] * P + list(r.step_map) + [0] * (r.canvas - len(r.response))
    K = len(text) if config.is_full else config.block_size
    for start in range(0, len(text), K):
        inside = range(start, min(start + K, len(text)))
        distinct = sorted({step[i] for i in inside} - {0})
        for first in range(0, len(distinct), shrink):
            group = distinct[first:first + shrink]
            hidden = [i for i in inside if step[i] >= group[0]]
            tokens = [config.mask_id if i in hidden else text[i] for i in range(inside.stop)]
            yield tokens, [i for i in inside if step[i] in group]


def slow_logprobs(r, model, shrink=1, temperature=1.0):
    """Log-probability of every response token: one whole forward of `model(tokens)` for each state."""
    out = [None] * len(r.response)
    for tokens, targets in states(r, model, shrink):
        logits = lm.policy_logits(model(torch.tensor([tokens])), model.config.mask_id)[0] / temperature
        for i in targets:
            token = (r.prompt + r.response)[i]
            assert out[i - len(r.prompt)] is None
            out[i - len(r.prompt)] = logits[i].log_softmax(-1)[token]
    return torch.stack(out)


# --------------------------------------------------------------------------------------------- the replay law


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("K", [1, 4, 8])
def test_the_replay_law(strategy, K):
    """For every P mod K and every end inside a block, a replay gives the recorded log-probabilities."""
    model = random_model(block_size=K)
    prompts = random_prompts([n for n in range(1, 2 * K + 2) for _ in range(3)])
    rollouts = generate(
        model, prompts, max_new_tokens=19, strategy=strategy, threshold=0.4, eos_ids=(1,), seed=1)
    assert {len(r.prompt) % K for r in rollouts} == set(range(K))
    assert (len({r.num_tokens % K for r in rollouts}) > min(K - 1, 1)
            and {r.is_truncated for r in rollouts} == {True, False})
    assert gap(model, rollouts) < 1e-4


@pytest.mark.parametrize("temperature, top_k, top_p", [
    (0.5, 0, 1.0), (1.5, 5, 1.0), (1.0, 0, 0.7), (0.7, 6, 0.8), (0.0, 0, 1.0), (1.0, 1, 1.0),
])
@pytest.mark.parametrize("kind", ["sdar", "dream"])
def test_the_replay_law_whatever_the_sampler(kind, temperature, top_k, top_p):
    model = random_model(kind)
    rollouts = generate(model, random_prompts(range(3, 9)), max_new_tokens=16, temperature=temperature,
                        top_k=top_k, top_p=top_p, threshold=0.6, eos_ids=(1,))
    assert gap(model, rollouts, temperature=temperature) < 1e-4 / min(temperature or 1.0, 1.0)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("kind", ["dream", "llada"])
def test_the_replay_law_in_full_attention(kind, strategy):
    """Canvases of other lengths, blocks that do not divide the canvas, and Dream's shift."""
    model = random_model(kind, block_size=5)
    for room in (5, 12):
        rollouts = generate(model, random_prompts([1, 4, 9, 6]), max_new_tokens=room, strategy=strategy,
                            threshold=0.4, eos_ids=(1,))
        assert gap(model, rollouts) < 1e-4
        assert all(len(r.response) == room or len(r.response) % 5 == 0 for r in rollouts)


def test_a_wrong_replay_breaks_the_law():
    """The law can fail: another order, another temperature or merged steps give other numbers."""
    model = random_model()
    rollouts = generate(model, random_prompts([5, 6, 7]), max_new_tokens=16, strategy="static", eos_ids=())
    assert gap(model, rollouts) < 1e-4
    assert gap(model, rollouts, temperature=0.9) > 1e-2
    assert gap(model, rollouts, shrink=2) > 1e-2
    for r in rollouts:
        r.step_map = r.step_map[::-1]
    assert gap(model, rollouts) > 1e-2


# ------------------------------------------------------------------ the fast replay against one row per state


@pytest.mark.parametrize("kind, K, shrink", [
    ("sdar", 4, 1), ("sdar", 8, 1), ("sdar", 4, 2), ("sdar", 8, 3), ("sdar", 1, 1),
    ("dream", 4, 1), ("dream", 4, 3), ("llada", 8, 1), ("llada", 8, 8),
])
def test_packed_replay_is_one_row_per_trace_step(kind, K, shrink):
    """Logits and gradients; without cache, without packing, from `model(tokens)` alone."""
    model = random_model(kind, block_size=K)
    rollouts = generate(model, random_prompts([3, 9, 6]), max_new_tokens=13, threshold=0.4, eos_ids=(1,))
    fast = torch.cat(replay(model, rollouts, shrink, max_tokens=64))
    slow = torch.cat([slow_logprobs(r, model, shrink) for r in rollouts])
    torch.testing.assert_close(fast, slow, atol=1e-5, rtol=1e-5)
    weight = torch.randn(len(fast), generator=torch.Generator().manual_seed(0))
    for ours, theirs in zip(*(torch.autograd.grad((weight * x).sum(), list(model.parameters()))
                              for x in (fast, slow))):
        torch.testing.assert_close(ours, theirs, atol=1e-5 * float(theirs.abs().max() + 1), rtol=1e-5)


@pytest.mark.parametrize("kind", ["sdar", "llada"])
def test_every_response_token_is_a_target_exactly_once(kind):
    model = random_model(kind)
    rollouts = generate(model, random_prompts([2, 5, 8, 11]), max_new_tokens=14, threshold=0.3, eos_ids=(1,))
    for shrink in (1, 2, 100):
        rows = all_rows(rollouts, model.config, shrink=shrink)
        assert sorted(seen(rows)) == [(n, i) for n, r in enumerate(rollouts) for i in range(len(r.response))]
        assert rows.targets.token.tolist() == [rollouts[n].response[i] for n, i in seen(rows)]
    trained = all_rows(rollouts, model.config, trained_only=True)
    assert len(trained.targets.token) == sum(r.num_tokens for r in rollouts)
    one_more = all_rows(rollouts, model.config, trained_only=True, post_num=1)
    assert len(one_more.targets.token) == sum(  # after eos, and only where there is one
        min(r.num_tokens + (not r.is_truncated), len(r.response)) for r in rollouts)
    assert {r.is_truncated for r in rollouts} == {True, False}


def test_a_target_carries_what_the_record_says():
    model = random_model()
    rollouts = generate(model, random_prompts([2, 5, 8]), max_new_tokens=14, eos_ids=(1,))
    for n, r in enumerate(rollouts):
        r.advantage = [10.0 * n + i for i in range(len(r.response))]
        r.returns = [-x for x in r.advantage]
    targets = all_rows(rollouts, model.config).targets
    for n, i, logp, advantage, returns, value_old in zip(
            targets.rollout_index.tolist(), targets.response_index.tolist(), targets.logp.tolist(),
            targets.advantage.tolist(), targets.returns.tolist(), targets.value_old.tolist()):
        assert logp == pytest.approx(rollouts[n].logp[i])
        assert advantage == 10 * n + i == -returns and value_old == 0


@pytest.mark.parametrize("kind", ["sdar", "llada"])
def test_micro_batches_hold_the_same_targets_within_their_budget(kind):
    model = random_model(kind)
    rollouts = generate(model, random_prompts(range(1, 30)), max_new_tokens=30, eos_ids=(1,))
    texts = rollout.build_rows(rollouts, model.config, 4, shrink=8)
    parts = packing.micro_batches(texts, 300, 0, torch.device("cpu"))
    assert len(parts) > 3 and all(part.tokens.numel() <= 300 or len(part.tokens) == 1 for part in parts)
    assert sorted(sum(map(seen, parts), [])) == sorted(seen(all_rows(rollouts, model.config)))
    for n, rows in enumerate(texts):  # a response is in one part where it fits
        size = sum(len(row.tokens) for row in rows)
        owners = [part for part in parts if (part.targets.rollout_index == n).any()]
        assert len(owners) == 1 or size > 300, (n, size)


def test_a_larger_block_shows_what_smaller_ones_left_undecoded_as_masks():
    model = random_model(block_size=4)
    rollouts = generate(model, random_prompts([8, 9, 6]), max_new_tokens=10, strategy="static", eos_ids=())
    for r in rollouts:
        rows = all_rows([r], model.config, block_size=8)
        assert len(rows.targets.token) == len(r.response)
        views = rows.layout.view + 100 * rows.layout.block
        assert set(views[rows.layout.view > 0].unique(return_counts=True)[1].tolist()) == {8}
        is_left = (rows.layout.view > 0) & (rows.layout.position >= len(r.prompt) + len(r.response))
        assert is_left.any() == ((len(r.prompt) + len(r.response)) % 8 > 0)
        assert (rows.tokens[is_left] == model.config.mask_id).all()


@pytest.mark.parametrize("kind", ["sdar", "dream"])
@torch.no_grad()
def test_rows_packed_end_to_end_give_the_numbers_of_rows_apart(kind):
    model = random_model(kind)
    rollouts = generate(model, random_prompts(range(2, 12)), max_new_tokens=14, eos_ids=(1,))
    texts = rollout.build_rows(rollouts, model.config, 4)
    rows = [row for text in texts for row in text]
    groups = packing.by_length([(len(row.tokens), 1) for row in rows], 256, is_packed=True)
    packed = [packing.collate([rows[i] for i in group], 0, 256) for group in groups]
    numbers = []
    for parts in ([packing.collate(rows, 0)], packed):
        table = torch.zeros(10, 24)
        for part in parts:
            logp, _ = rollout.forward_rows(model, part)
            table[part.targets.rollout_index, part.targets.response_index] = logp
        numbers.append(table)
    assert all(len(part.tokens) == 1 and part.tokens.numel() == 256 for part in packed) and len(packed) > 3
    torch.testing.assert_close(*numbers, atol=1e-5, rtol=1e-5)


def test_a_trace_step_is_shrink_neighbouring_denoising_steps():
    r = Rollout([3], [5, 6, 7, 8], 4, [1, 3, 1, 2])
    block = [0, 1, 2, 3]
    assert trace_views(r, block, 1) == [([0, 1, 2, 3], [0, 2]), ([1, 3], [3]), ([1], [1])]
    assert trace_views(r, block, 2) == [([0, 1, 2, 3], [0, 2, 3]), ([1], [1])]
    assert trace_views(r, block, 9) == [([0, 1, 2, 3], [0, 1, 2, 3])]
    r.step_map = [7, 30, 7, 12]  # only the order counts
    assert trace_views(r, block, 1) == [([0, 1, 2, 3], [0, 2]), ([1, 3], [3]), ([1], [1])]


def test_blocks_are_cut_at_absolute_positions():
    assert rollout.blocks_of(9, 7, 4) == [[0, 1, 2], [3, 4, 5, 6]]
    assert rollout.blocks_of(8, 8, 4) == [[0, 1, 2, 3], [4, 5, 6, 7]]


def test_a_row_is_the_picture_in_the_docstring():
    """894+396= and 0;10 in two steps, with one token for each character."""
    config = random_model(block_size=4).config
    r = Rollout(list(range(3, 11)), [11, 12, 13, 14], 4, [1, 2, 1, 2])
    (row,), = rollout.build_rows([r], config, 4)
    assert row.tokens == [*range(3, 11), 2, 2, 2, 2, 11, 2, 13, 2]
    assert row.position == [*range(12), 8, 9, 10, 11]
    assert row.block == [0] * 4 + [1] * 4 + [2] * 8 and row.view == [0] * 8 + [1] * 4 + [2] * 4
    assert [target[:4] for target in row.targets] == [
        (8, 11, 0, 0), (10, 13, 0, 2), (13, 12, 0, 1), (15, 14, 0, 3)]


# --------------------------------------------------------------------------------------------------- decoding


@pytest.mark.parametrize("kind", ["sdar", "llada"])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_sequence_is_the_same_alone_and_in_a_ragged_batch(kind, strategy):
    """Few slots, so that sequences join and leave at different times, and many, and one by one."""
    model = random_model(kind)
    prompts, settings = (random_prompts([3, 14, 7, 1, 9, 4, 12]),
                         dict(max_new_tokens=18, strategy=strategy, threshold=0.5, eos_ids=(1,)))
    together = generate(model, prompts, seed=7, **settings)
    few = generate(model, prompts, seed=7, slots=3, **settings)
    alone = [generate(model, [p], seed=7 + i, **settings)[0] for i, p in enumerate(prompts)]
    for a, b, c in zip(together, few, alone):
        assert a.prompt == b.prompt == c.prompt
        assert a.response == b.response == c.response and a.step_map == b.step_map == c.step_map
        torch.testing.assert_close(torch.tensor(a.logp), torch.tensor(c.logp), atol=1e-5, rtol=0)
    assert len({len(r.response) for r in together}) > 1


class SeparateCommits(rollout.Decoder):
    """A slow twin: the clean keys and values of a whole block by a forward of their own."""

    def states(self, columns, commits, longest):
        slots, starts = commits
        if len(slots):
            position = starts[:, None] + self.offset
            attend = self.cache.reading(slots, position, position[:, -1] + 1, longest)
            self.model.hidden(self.token[slots[:, None], position], position, attend)
        return super().states(columns, commits[:, :0], longest)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_commit_that_rides_along_is_a_commit(strategy, monkeypatch):
    model = random_model()
    settings = dict(max_new_tokens=26, strategy=strategy, threshold=0.5, slots=3, seed=4)
    prompts = random_prompts([3, 14, 7, 1, 9, 4, 12])
    ours = generate(model, prompts, **settings)
    monkeypatch.setattr(rollout, "Decoder", SeparateCommits)
    for a, b in zip(ours, generate(model, prompts, **settings)):
        assert a.response == b.response and a.step_map == b.step_map
        torch.testing.assert_close(torch.tensor(a.logp), torch.tensor(b.logp), atol=1e-5, rtol=0)


def test_a_block_costs_its_denoising_steps_and_no_forward_more(monkeypatch):
    model, forwards = random_model(), []
    hidden = model.hidden
    monkeypatch.setattr(model, "hidden", lambda *args: (forwards.append(args), hidden(*args))[1])
    r, = generate(model, random_prompts([5]), max_new_tokens=30, eos_ids=())
    assert len(forwards) == max(r.step_map) + 1  # and one to prefill


def test_sequential_with_one_token_a_step_is_decoding_from_left_to_right():
    """With its trace it is JustGRPO's setting: each token predicted from what stands to its left, and
    masks."""
    model = random_model()
    r, = generate(model, random_prompts([6]), max_new_tokens=14, strategy="sequential", eos_ids=())
    assert r.step_map == list(range(1, 15))
    rows = all_rows([r], model.config)
    for column, i in zip(rows.targets.logit_index.tolist(), rows.targets.response_index.tolist()):
        position, _, block, view = (t[0] for t in rows.layout)
        is_later = (view == view[column]) & (block == block[column]) & (position >= 6 + i)
        assert (rows.tokens[0][is_later] == model.config.mask_id).all()


def test_same_seed_same_trace_other_seed_other_trace():
    model = random_model()
    one, two, other = (generate(model, random_prompts([5]), max_new_tokens=24, seed=s, eos_ids=())[0].response
                       for s in (3, 3, 4))
    assert one == two != other


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_only_masked_positions_are_ever_revealed(strategy):
    generator = torch.Generator().manual_seed(0)
    confidence, entropy = torch.rand(2, 500, 8, generator=generator)
    is_masked = torch.rand(500, 8, generator=generator) < 0.4
    is_masked[:, 3] |= ~is_masked.any(-1)
    for quota in (1, 3, 8):
        keep = reveal(confidence, entropy, is_masked, torch.full((500,), quota), strategy, threshold=0.8)
        assert not (keep & ~is_masked).any() and keep.any(-1).all()
        if strategy in ("static", "sequential"):
            assert torch.equal(keep.sum(-1), is_masked.sum(-1).clamp(max=quota))


def test_what_each_strategy_reveals():
    confidence, entropy = torch.tensor([[0.95, 0.2, 0.93, 0.91]]), torch.tensor([[0.20, 1.5, 0.14, 0.1]])
    is_masked = torch.tensor([[True, True, True, False]])
    table = lambda strategy, n, **more: reveal(
        confidence, entropy, is_masked, torch.tensor([n]), strategy, **more).int().tolist()[0]
    assert table("static", 1) == [1, 0, 0, 0] and table("static", 2) == [1, 0, 1, 0]
    assert table("sequential", 2) == [1, 1, 0, 0]
    assert table("dynamic", 1) == [1, 0, 1, 0] and table("dynamic", 3) == [1, 1, 1, 0]
    assert table("dynamic", 1, threshold=0.99) == [1, 0, 0, 0]
    assert table("entropy", 1) == [1, 0, 1, 0]  # 0.14 + 0.20 < 0.35
    assert table("entropy", 1, entropy_bound=0.01) == [0, 0, 1, 0]  # always at least one


def test_a_response_ends_at_the_first_eos_of_the_response():
    model = random_model()
    prompts = random_prompts([6, 9, 5])
    prompts[0][-1] = prompts[2][-1] = 1  # an eos in the prompt tail ends nothing
    for r in generate(model, prompts * 10, max_new_tokens=21, eos_ids=(1,)):
        assert ((len(r.prompt) + len(r.response)) % 4 == 0
                and len(r.response) == len(r.step_map) == len(r.logp) > 0)
        early = r.response[:21]
        assert r.is_truncated == (1 not in early)
        assert r.num_tokens == (21 if r.is_truncated else early.index(1) + 1)
        if not r.is_truncated:
            assert 0 <= len(r.response) - r.num_tokens < 4
        blocks = [r.step_map[max(0, b - len(r.prompt)):b + 4 - len(r.prompt)]
                  for b in range(len(r.prompt) // 4 * 4, len(r.prompt) + len(r.response), 4)]
        assert (all(max(a) < min(b) for a, b in zip(blocks, blocks[1:]))
                and set(r.step_map) == set(range(1, max(r.step_map) + 1)))


def test_the_mask_token_is_never_sampled():
    model = random_model()
    with torch.no_grad():
        # the mask token would often be the most probable
        model.head.weight[2] = model.head.weight[3:].sum(0) * 3
    rollouts = generate(model, random_prompts([4] * 40), max_new_tokens=16)
    assert all(2 not in r.response for r in rollouts) and gap(model, rollouts) < 1e-4


def test_denoising_steps_set_the_quota_with_the_remainder_first():
    model = random_model(block_size=8)
    settings = dict(strategy="static", denoising_steps=3, eos_ids=())
    r, = generate(model, random_prompts([8]), max_new_tokens=16, **settings)
    assert [r.step_map.count(step) for step in range(1, 7)] == [3, 3, 2, 3, 3, 2]
    r, = generate(model, random_prompts([12]), max_new_tokens=4, **settings)
    assert [r.step_map.count(step) for step in (1, 2)] == [3, 1]  # fewer masks are left than the quota


def test_sampling_is_inverse_cdf_after_top_k_then_top_p():
    p = torch.tensor([[0.4, 0.0, 0.3, 0.2, 0.1]])
    draws = torch.tensor([0.0, 0.39, 0.41, 0.69, 0.71, 0.89, 0.91, 1 - 1e-16], dtype=torch.float64)
    pick = lambda **filters: sample(p.log().expand(len(draws), -1), draws, 1, **filters)[0].tolist()
    assert pick() == [0, 0, 2, 2, 3, 3, 4, 4]
    assert pick(top_k=2) == [0, 0, 0, 2, 2, 2, 2, 2]  # 4/7, 3/7
    assert pick(top_p=0.65) == [0, 0, 0, 2, 2, 2, 2, 2]  # the token that crosses the bound stays
    token, confidence, logp, _ = sample(p.log(), draws[:1], 1, top_k=2)
    assert confidence.item() == pytest.approx(4 / 7) and logp.exp().item() == pytest.approx(0.4)
    token, confidence, logp, _ = sample(p.log(), draws[-1:], 1, temperature=0)
    # greedy: the order comes from the unfiltered
    assert token.item() == 0 and confidence.item() == pytest.approx(0.4)


def test_the_hash_is_uniform_and_its_words_do_not_mix():
    n = torch.arange(100_000)
    for u in (rollout.uniform(n * 0 + 5, n * 0 + 1, n), rollout.uniform(n, n * 0, n * 0),
              rollout.uniform(n * 0, n, n * 0)):
        assert 0 <= u.min() and u.max() < 1 and len(u.unique()) == len(n)
        assert abs(u.mean() - 0.5) < 0.005 and abs((u[1:] * u[:-1]).mean() - 0.25) < 0.005
        assert (torch.histc(u.float(), 20, 0, 1) / 5000 - 1).abs().max() < 0.06


@pytest.mark.parametrize("settings, message", [
    (dict(max_new_tokens=0), "max_new_tokens"),
    (dict(strategy="best"), "strategy 'best' is not possible: it must be one of static"),
    (dict(temperature=-1.0), "temperature -1.0"), (dict(top_p=0.0), "top_p 0.0"),
    (dict(top_k=-3), "top_k -3"), (dict(denoising_steps=5), "denoising_steps 5"),
    (dict(denoising_steps=0), "denoising_steps 0"), (dict(block_size=0), "block_size 0"),
    (dict(seed=[1, 2]), "2 seeds for 1 prompts"), (dict(slots=0), "slots"),
])
def test_bad_settings_are_refused_by_name(settings, message):
    with pytest.raises(ValueError, match=message):
        generate(random_model(), [[3, 4]], **{"max_new_tokens": 4, **settings})


def test_an_empty_prompt_is_refused_and_no_prompts_are_fine():
    with pytest.raises(ValueError, match="prompt 1 is empty"):
        generate(random_model(), [[3], []], max_new_tokens=4)
    assert generate(random_model(), [], max_new_tokens=4) == [] and replay(random_model(), []) == []


# ------------------------------------------------------------------------------------------ the decoding step


class HostReads(TorchDispatchMode):
    """Counts what makes the host wait for the device: values read, and shapes that depend on values."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.overloadpacket in (
                torch.ops.aten._local_scalar_dense, torch.ops.aten.nonzero, torch.ops.aten.masked_select,
                torch.ops.aten.equal) or (function.overloadpacket is torch.ops.aten.index
                                          and any(i is not None and i.dtype == torch.bool for i in args[1])):
            self.names.append(str(function))
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("sampler", [dict(), dict(temperature=0.7, top_k=9, top_p=0.8)])
def test_the_host_reads_once_per_forward(strategy, sampler, monkeypatch):
    """One list per step, one more where sequences have ended; nothing else is asked of the device."""
    lists, calls, tolist, advance = [], [], torch.Tensor.tolist, rollout.Decoder.advance
    monkeypatch.setattr(torch.Tensor, "tolist", lambda x: (lists.append(x.shape), tolist(x))[1])

    def counted(self):
        before, mode = len(lists), HostReads()
        with mode:
            ended = advance(self)
        calls.append((len(lists) - before, mode.names))
        return ended

    monkeypatch.setattr(rollout.Decoder, "advance", counted)
    generate(random_model(), random_prompts([3, 14, 7, 1, 9]), max_new_tokens=18, slots=3, threshold=0.4,
             strategy=strategy, eos_ids=(1,), **sampler)
    assert len(calls) > 10 and all(call == (1, []) for call in calls)


class EagerGraphs(cuda.Captured):
    """What a GPU does, with a call in place of the recorded graph."""

    kinds = []

    def record(self, numbers, commits, *sizes):
        self.kinds.append((numbers.shape, commits.shape, sizes))
        denoise = self.denoise
        return lambda *inputs: denoise(*inputs, *sizes)


class PaddedDecoder(rollout.Decoder):
    """A decoder whose steps are padded and recorded as on a GPU."""

    def __init__(self, model, settings, num_slots, length):
        super().__init__(model, settings, num_slots, length)
        self.denoise = EagerGraphs(self.denoise, num_slots, settings.block_size, length, reach=16)
        self.alive.append(weakref.ref(self))

    alive = []


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_steps_padded_for_graphs_decode_the_same(strategy, monkeypatch):
    model, lengths = random_model(), [3, 14, 7, 1, 9, 4, 12, 2, 2, 20, 5]
    settings = dict(max_new_tokens=26, strategy=strategy, threshold=0.5, slots=5, seed=4, eos_ids=(1,))
    ours = generate(model, random_prompts(lengths), **settings)
    monkeypatch.setattr(rollout, "Decoder", PaddedDecoder)
    monkeypatch.setattr(cuda, "RECORD_AT", 2)
    EagerGraphs.kinds.clear()
    gc.disable()  # a decoder must go with its call, since its cache may be most of a GPU's memory
    padded = generate(model, random_prompts(lengths), **settings)
    assert PaddedDecoder.alive[-1]() is None
    gc.enable()
    for a, b in zip(ours, padded):
        assert a.response == b.response and a.step_map == b.step_map
        torch.testing.assert_close(torch.tensor(a.logp), torch.tensor(b.logp), atol=1e-5, rtol=0)
    # few kinds, although every sequence has a length of its own
    assert EagerGraphs.kinds and {shape[1] for shape, _, _ in EagerGraphs.kinds} <= {1, 2, 4, 5}


def test_a_step_compiles_without_a_break(monkeypatch):
    """fullgraph: one graph from token ids to token ids, as a CUDA graph needs it."""
    class Compiled(rollout.Decoder):
        def __init__(self, *args):
            super().__init__(*args)
            # (backend="inductor" gives the same tokens, and takes a minute)
            self.denoise = torch.compile(self.denoise, fullgraph=True, dynamic=True, backend="eager")

    model, prompts = random_model(), random_prompts([6])
    settings = dict(max_new_tokens=6, strategy="dynamic", threshold=0.5, eos_ids=())
    ours = generate(model, prompts, **settings)
    monkeypatch.setattr(rollout, "Decoder", Compiled)
    assert [r.response for r in generate(model, prompts, **settings)] == [r.response for r in ours]


@pytest.mark.parametrize("cache", ["prefix", "dual"])
@pytest.mark.parametrize("kind", ["llada", "dream"])
def test_approximate_caches_are_exact_where_nothing_is_stale(cache, kind):
    """One block for the whole response: its prefix is the prompt alone. With one denoising step per block
    nothing is ever read from a cache; with more, the prompt's keys are those of the first step."""
    model, prompts = random_model(kind, block_size=8), random_prompts([5, 9, 5])
    settings = dict(max_new_tokens=16, strategy="static", eos_ids=(), seed=3)
    for steps, is_exact in ((1, True), (8, False)):
        exact = generate(model, prompts, denoising_steps=steps, **settings)
        cached = generate(model, prompts, denoising_steps=steps, cache=cache, slots=2, **settings)
        apart = max(abs(x - y) for a, b in zip(exact, cached) for x, y in zip(a.logp, b.logp))
        assert (apart < 1e-5) == is_exact
        first = [[r.response[j] for j in range(8) if r.step_map[j] == 1] for r in exact]
        assert first == [[r.response[j] for j in range(8) if r.step_map[j] == 1] for r in cached]


def test_a_cache_must_be_one_that_the_attention_knows():
    with pytest.raises(ValueError, match="cache 'old'"):
        generate(random_model("llada"), [[3]], max_new_tokens=4, cache="old")
    with pytest.raises(ValueError, match="cache 'dual' .* block attention"):
        generate(random_model("sdar"), [[3]], max_new_tokens=4, cache="dual")


def test_slots_that_do_not_fit_are_refused_with_the_numbers(monkeypatch):
    model, prompts = random_model(), random_prompts([5] * 6)
    settings = dict(max_new_tokens=8, eos_ids=())
    length, logits = 5 + 8 + 4, cuda.MOST_LOGITS * 4 * 6
    per_slot = cuda.slot_bytes(model.config, length, 4, True)
    monkeypatch.setattr(cuda, "free_bytes", lambda device: (logits + 3.5 * per_slot) / 0.8)
    with pytest.raises(ValueError, match="4 slots of .* do not fit .* --slots 3 would"):
        generate(model, prompts, slots=4, **settings)
    decoders, init = [], rollout.Decoder.__init__
    remember = lambda self, *args: (decoders.append(args), init(self, *args))[1]
    monkeypatch.setattr(rollout.Decoder, "__init__", remember)
    assert len(generate(model, prompts, **settings)) == 6 and decoders[0][2] == 3  # as many as fit
    monkeypatch.setattr(cuda, "free_bytes", lambda device: logits)
    with pytest.raises(ValueError, match="lower --max_new_tokens"):
        generate(model, prompts, **settings)


def test_ten_thousand_ragged_prompts_through_64_slots():
    """Each comes back once, in order, whatever the slots; memory does not grow with their number."""
    model = random_model()
    rng = random.Random(0)
    prompts = random_prompts([rng.randint(1, 200) for _ in range(10_000)])
    settings = dict(max_new_tokens=1, strategy="static", denoising_steps=1, eos_ids=())
    generate(model, prompts[:500], slots=64, **settings)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    rollouts = generate(model, prompts, slots=64, seed=0, **settings)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before  # KiB
    assert [r.prompt for r in rollouts] == prompts
    records = 100 * sum(len(r.prompt) + 4 * len(r.response) for r in rollouts) // 1024
    assert grown < records + 20_000
    few = list(range(0, 10_000, 499))
    for i, again in zip(few, generate(model, [prompts[i] for i in few], slots=3, seed=few, **settings)):
        assert again.response == rollouts[i].response


# --------------------------------------------------------------------------------------- the authors' numbers


@pytest.mark.parametrize("case", [c for c in fixture_cases("sdar_generate") if "topk1" not in c["id"]],
                         ids=lambda c: c["id"])
def test_sdar_decoding_is_the_authors(case, authors_policy, monkeypatch):
    """Tokens and reveal steps exactly; log-probabilities and confidences to the fixture's tolerance.

    For the `inverse_cdf` cases the stored uniforms are injected; their logp is at temperature 1, ours at T.
    """
    K, T, P = case["block_length"], case["temperature"], len(case["prompt"])
    model, _ = checkpoints.load_model(FIXTURES / "authors/sdar", block_size=K)
    data = fixture_tensors("sdar_generate")
    draws = data.get(f"{case['id']}.u")
    is_drawn = case["sampling"] == "inverse_cdf"
    if is_drawn:
        monkeypatch.setattr(rollout, "uniform", lambda seed, step, position: draws[step - 1, position % K])
    r, = generate(
        model, [case["prompt"]], max_new_tokens=case["gen_length"], denoising_steps=case["denoising_steps"],
        strategy=case["strategy"].removeprefix("low_confidence_"),
        threshold=case["confidence_threshold"] or 0.9, temperature=T if is_drawn else 0,
        top_k=case["top_k"], top_p=case["top_p"], eos_ids=case["stop_token_ids"] or ())
    end = P + len(r.response)
    assert r.prompt + r.response == case["tokens"][:end] and set(case["tokens"][end:]) <= {119}
    assert r.step_map == case["step_global"][P:end]
    torch.testing.assert_close(
        torch.tensor(r.confidence), data[f"{case['id']}.confidence"][P:end], atol=2e-4, rtol=0)
    if T == 1:
        torch.testing.assert_close(torch.tensor(r.logp), data[f"{case['id']}.logp"][P:end], atol=2e-4, rtol=0)


@pytest.mark.parametrize("case", [
    c for c in fixture_cases("llada_generate") if "_original_" in c["id"]
    or ("_hNone_" in c["id"] and c["id"].endswith("_confidence") and "margin" not in c["id"])
], ids=lambda c: c["id"])
def test_llada_decoding_is_the_authors(case):
    K, P = case["block_length"], len(case["prompt"])
    model, _ = checkpoints.load_model(FIXTURES / "authors/llada", block_size=K)
    threshold = case.get("threshold")
    steps_per_block = case["steps"] * K // case["gen_length"]
    r, = generate(model, [case["prompt"]], max_new_tokens=case["gen_length"], temperature=0,
                  strategy="static" if threshold is None else "dynamic", threshold=threshold or 0.9,
                  denoising_steps=steps_per_block if threshold is None else K, eos_ids=(),
                  cache="prefix" if case.get("use_cache") else "none")
    order = lambda steps: [sorted(set(steps)).index(step) for step in steps]
    assert r.prompt + r.response == case["tokens"] and order(r.step_map) == order(case["unmask_step"][P:])


@pytest.mark.parametrize("name", ["sdar_tracerl_aligned_b4", "sdar_tracerl_aligned_b8_shrink3"])
def test_replayed_log_probabilities_are_the_authors(name, authors_policy):
    case = next(c for c in fixture_cases("sdar_tracerl") if name.endswith("tracerl_" + c["id"]))
    data, L0 = fixture_tensors(name), case["L0"]
    model, _ = checkpoints.load_model(FIXTURES / "authors/sdar", block_size=case["block_size"])
    rollouts = [Rollout(p, r, len(r), s)
                for p, r, s in zip(case["prompts"], case["responses"], case["step_maps"])]
    ours = replay(model, rollouts, case["shrink"])
    for row, owner in enumerate(case["row_to_response"]):
        at = data["p_mask"][row, L0:]
        torch.testing.assert_close(ours[owner][at], data["logp_self"][row, L0:][at], atol=2e-4, rtol=0)


def test_the_page_holds_the_trace_and_no_text_can_break_out_of_it(tmp_path):
    model, tokenizer = random_model(), sft.tiny_tokenizer()
    r, = generate(model, [[5, 6, 7]], max_new_tokens=8, seed=[1])
    tokenizer.decode = lambda ids: "</script><b>" if list(ids) == r.response[:1] else f"{list(ids)}"
    r.advantage, r.reward = [0.5] * r.num_tokens, 1.0
    show.write_page([[r]], 4, tokenizer, tmp_path / "trace.html")
    page = (tmp_path / "trace.html").read_text()
    assert page.count("</script>") == 1
    (shown,), = json.loads(page.split("const pairs = ")[1].split(";\nconst")[0])
    assert [t["step"] for t in shown["tokens"]] == r.step_map and shown["tokens"][0]["text"] == "</script><b>"
    assert [t["logp"] for t in shown["tokens"]] == [round(x, 4) for x in r.logp]
    assert [("advantage" in t) for t in shown["tokens"]] == [j < r.num_tokens for j in range(len(r.response))]
