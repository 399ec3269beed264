"""Laws of the fast twins: the same rollouts, numbers and updates; with --plain none of them runs."""

import functools
import gc
import random
import resource
import sys
import threading
import time
import weakref
from types import SimpleNamespace

import pytest
import torch
from conftest import (
    CPU, FAST, FIXTURES, all_rows, decode, decoded, random_model, random_prompts, seen, small_data)
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode

import model as lm
import rollout
import tracerl
from plumbing import checkpoints, engine, kernels, memory, packing, runs, tiny
from rollout import PLAIN

STRATEGIES = list(rollout.STRATEGIES)


def check_same(ours, theirs):
    """The same records: tokens, steps and ends exactly, log-probabilities and confidences to rounding."""
    assert len(ours) == len(theirs) > 0
    for a, b in zip(ours, theirs):
        for name in ("prompt", "response", "step_map", "num_tokens", "canvas", "is_truncated", "seed"):
            assert getattr(a, name) == getattr(b, name), name
        for name in ("logp", "confidence"):
            torch.testing.assert_close(
                torch.tensor(getattr(a, name)), torch.tensor(getattr(b, name)), atol=1e-5, rtol=0)


# -------------------------------------------------------------------------- decoding: as the definition does


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("K", [1, 4, 8])
def test_the_engine_gives_the_definitions_rollouts(K, strategy):
    """Prompts of every length modulo K, decoded among many others; ends everywhere in a block, truncation."""
    settings = dict(max_new_tokens=19, strategy=strategy, threshold=0.4, seed=1)
    theirs = decoded("plain", K=K, **settings)
    check_same(decoded("fast", K=K, **settings)[:len(theirs)], theirs)
    assert {len(r.prompt) % K for r in theirs} == set(range(K))
    assert {r.is_truncated for r in theirs} == {True, False}


@pytest.mark.parametrize("temperature, top_k, top_p", [
    (0.5, 0, 1.0), (1.5, 5, 1.0), (1.0, 0, 0.7), (0.7, 6, 0.8), (0.0, 0, 1.0), (1.0, 1, 1.0)])
@pytest.mark.parametrize("kind", ["sdar", "dream"])
def test_the_engine_gives_the_definitions_rollouts_whatever_the_sampler(kind, temperature, top_k, top_p):
    settings = dict(lengths=tuple(range(3, 9)), max_new_tokens=16, temperature=temperature, top_k=top_k,
                    top_p=top_p, threshold=0.6)
    check_same(decoded("fast", kind, **settings), decoded("plain", kind, **settings))


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("kind", ["dream", "llada"])
def test_the_engine_gives_the_definitions_rollouts_in_full_attention(kind, strategy):
    for room in (5, 12):
        settings = dict(K=5, lengths=(1, 4, 9, 6), max_new_tokens=room, strategy=strategy, threshold=0.4)
        check_same(decoded("fast", kind, **settings), decoded("plain", kind, **settings))


@pytest.mark.parametrize("kind, strategy", [("sdar", name) for name in STRATEGIES] + [("llada", "dynamic")])
def test_a_sequence_is_the_same_alone_in_few_slots_and_in_many(kind, strategy):
    """Few slots: sequences join and leave at different times. An eos inside a prompt ends nothing."""
    model = random_model(kind)
    prompts = random_prompts([3, 14, 7, 1, 9, 4, 12])
    prompts[0][-1] = prompts[1][-2] = prompts[4][0] = 1
    settings = dict(max_new_tokens=18, strategy=strategy, threshold=0.5, seed=3)
    alone = decode(model, prompts, PLAIN, **settings)
    assert len({len(r.response) for r in alone}) > 1
    for slots in (1, 3, 7):
        check_same(decode(model, prompts, slots=slots, **settings), alone)


def test_a_strategy_of_ones_own_reveals_the_same_in_both(tmp_path):
    """It sees tokens, entropies and the step in the block, and is given no more than it asks for."""
    (tmp_path / "mine.py").write_text(
        "def reveal(is_masked, token, step, entropy):\n"
        "    is_leftmost = is_masked & (is_masked.cumsum(-1) == 1)\n"
        "    is_easy = is_masked & (token % 2 == 0) & (entropy < 1) & (step > 0)[:, None]\n"
        "    return is_leftmost | is_easy\n")
    settings = dict(max_new_tokens=24, strategy=f"{tmp_path}/mine.py:reveal", seed=2)
    for kind in ("sdar", "llada"):
        model, prompts = random_model(kind, block_size=8), random_prompts([3, 8, 13])
        check_same(decode(model, prompts, slots=2, **settings), decode(model, prompts, PLAIN, **settings))


def write_above_mean(folder):
    """A strategy that takes means over whole blocks, without looking where the masks are -> its flag."""
    (folder / "mean.py").write_text(
        "from rollout import best\n"
        "def above_mean(confidence, entropy, token, is_masked, quota):\n"
        "    score = confidence - entropy / 9 + token / 99\n"
        "    is_sure = (score > score.mean(-1, keepdim=True)) & is_masked\n"
        "    return is_sure | best(confidence, is_masked, quota)\n")
    return f"{folder}/mean.py:above_mean"


@pytest.mark.parametrize("kind", ["sdar", "llada"])
def test_a_strategy_sees_no_draw_that_does_not_count(kind, tmp_path, monkeypatch):
    """Neither at revealed positions, nor behind the canvas, nor where a batch is filled up for a graph."""
    model, prompts = random_model(kind), random_prompts([3, 14, 7, 1, 9, 4])
    settings = dict(max_new_tokens=18, strategy=write_above_mean(tmp_path), seed=4)
    plain = decode(model, prompts, PLAIN, **settings)
    check_same(decode(model, prompts, slots=5, **settings), plain)
    if kind == "sdar":
        monkeypatch.setattr(engine, "Decoder", PaddedDecoder)
        monkeypatch.setattr(engine, "RECORD_AT", 2)
        check_same(decode(model, prompts, slots=5, **settings), plain)


# ----------------------------------------------------------------------------------- decoding: what it costs


class SeparateCommits(engine.Decoder):
    """A slow twin: the clean keys and values of a whole block by a forward of their own."""

    def states(self, columns, commits, longest):
        slots, starts = commits
        if len(slots):
            position = starts[:, None] + self.offset
            attend = self.cache.reading(slots, position, position[:, -1] + 1, longest)
            self.model.states(self.token[slots[:, None], position], position, attend)
        return super().states(columns, commits[:, :0], longest)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_commit_that_rides_along_is_a_commit(strategy, monkeypatch):
    model, prompts = random_model(), random_prompts([3, 14, 7, 1, 9, 4, 12])
    settings = dict(max_new_tokens=26, strategy=strategy, threshold=0.5, slots=3, seed=4, eos_ids=())
    ours = decode(model, prompts, **settings)
    monkeypatch.setattr(engine, "Decoder", SeparateCommits)
    check_same(ours, decode(model, prompts, **settings))


def watch_forwards(model, monkeypatch):
    """A list that grows by the tokens (B, T) of every forward of a model."""
    forwards, states = [], model.states

    def watched(tokens, *others):
        forwards.append(tokens)
        return states(tokens, *others)

    monkeypatch.setattr(model, "states", watched)
    return forwards


def test_a_block_costs_its_denoising_steps_and_no_forward_more(monkeypatch):
    """The definition needs one more for each clean block: two of the prompt, eight of the response."""
    model = random_model()
    forwards = watch_forwards(model, monkeypatch)
    r, = decode(model, random_prompts([9]), max_new_tokens=31, eos_ids=())
    assert len(forwards) == max(r.step_map) + 1  # and one to prefill
    forwards.clear()
    decode(model, random_prompts([9]), PLAIN, max_new_tokens=31, eos_ids=())
    assert len(forwards) == max(r.step_map) + 2 + 8


def test_responses_to_one_prompt_share_its_prefill(monkeypatch):
    """Three responses to each of two prompts: what is computed is two prompts."""
    model = random_model()
    a, b = random_prompts([9, 14])
    settings = dict(max_new_tokens=8, seed=3, eos_ids=())
    theirs = decode(model, [a, a, a, b, b, b], PLAIN, **settings)
    assert len({tuple(r.response) for r in theirs}) == 6
    forwards = watch_forwards(model, monkeypatch)
    check_same(decode(model, [a, a, a, b, b, b], **settings), theirs)
    prefills = [tokens for tokens in forwards if tokens.shape[1] > 4]
    assert sorted(map(len, sum((tokens.tolist() for tokens in prefills), []))) in ([8, 12], [12, 12])
    check_same(decode(model, [a, a, a, b, b, b], slots=2, **settings), theirs)


def test_a_long_prompt_does_not_pad_the_short_ones(monkeypatch):
    model = random_model()
    prompts = random_prompts([30] * 20 + [301] + [30] * 20)
    settings = dict(max_new_tokens=4, strategy="static", denoising_steps=1, eos_ids=())
    long, = decode(model, prompts[20:21], PLAIN, seed=20, **settings)
    forwards = watch_forwards(model, monkeypatch)
    rollouts = decode(model, prompts, **settings)
    check_same(rollouts[20:21], [long])
    prefilled = sum(tokens.numel() for tokens in forwards if tokens.shape[1] > 4)
    assert prefilled == 300 + 40 * 28  # padded it would be 41 * 300, for which a forward has room


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


@pytest.mark.parametrize("strategy, sampler", [
    *((name, {}) for name in STRATEGIES), ("dynamic", dict(temperature=0.7, top_k=9, top_p=0.8)),
    ("static", dict(temperature=0.0))])
def test_the_host_reads_once_per_step(strategy, sampler, monkeypatch):
    """One list per step, one more where sequences have ended; nothing else is asked of the device."""
    lists, calls, tolist, advance = [], [], torch.Tensor.tolist, engine.Decoder.advance
    monkeypatch.setattr(torch.Tensor, "tolist", lambda x: (lists.append(x.shape), tolist(x))[1])

    def counted(self):
        before, mode = len(lists), HostReads()
        with mode:
            ended = advance(self)
        calls.append((len(lists) - before, mode.names))
        return ended

    monkeypatch.setattr(engine.Decoder, "advance", counted)
    prompts = random_prompts([3, 14, 7, 1, 9])
    num_lists = len(lists)
    decode(random_model(), prompts, max_new_tokens=18, slots=3, threshold=0.4, strategy=strategy, **sampler)
    assert len(calls) > 10 and all(call == (1, []) for call in calls)
    assert len(lists) - num_lists <= len(calls) + len(prompts)


class EagerGraphs(engine.Captured):
    """What a GPU does, with a call in place of the recorded graph."""

    kinds = []

    def record(self, inputs, *sizes):
        self.kinds.append(sizes)
        denoise, held, out = self.denoise, inputs.clone(), torch.zeros(2, sizes[0], dtype=torch.int64)
        return SimpleNamespace(replay=lambda: out.copy_(denoise(held, *sizes))), held, out


class PaddedDecoder(engine.Decoder):
    """A decoder whose steps are padded and recorded as on a GPU."""

    alive = []

    def __init__(self, model, decoding, num_slots, length, cache):
        super().__init__(model, decoding, num_slots, length, cache)
        self.denoise = EagerGraphs(self.denoise, num_slots, model.config.block_size, length, reach=16)
        self.alive.append(weakref.ref(self))


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_steps_padded_for_graphs_decode_the_same(strategy, monkeypatch):
    model, prompts = random_model(), random_prompts([3, 14, 7, 1, 9, 4, 12, 2, 2, 20, 5])
    settings = dict(max_new_tokens=26, strategy=strategy, threshold=0.5, slots=5, seed=4)
    ours = decode(model, prompts, **settings)
    monkeypatch.setattr(engine, "Decoder", PaddedDecoder)
    monkeypatch.setattr(engine, "RECORD_AT", 2)
    EagerGraphs.kinds.clear()
    gc.disable()  # a decoder must go with its call, since its cache may be most of a GPU's memory
    padded = decode(model, prompts, **settings)
    assert PaddedDecoder.alive[-1]() is None
    gc.enable()
    check_same(padded, ours)
    # few kinds, although every sequence has a length of its own
    assert EagerGraphs.kinds and {lanes for lanes, _, _ in EagerGraphs.kinds} <= {1, 2, 4, 5}


class CompiledDecoder(engine.Decoder):
    """A decoder whose first step with commits is traced whole. fullgraph: a break is an error."""

    num_compiled = 0

    def denoise(self, inputs, B, *sizes):
        step = super().denoise
        if len(inputs) > B and not self.num_compiled:
            CompiledDecoder.num_compiled += 1
            # (backend="inductor" gives the same tokens, and takes a minute)
            step = torch.compile(step, fullgraph=True, dynamic=False, backend="eager")
        return step(inputs, B, *sizes)


@pytest.mark.filterwarnings("ignore")  # the tracer sees through functools.cache, and says so
def test_a_step_compiles_without_a_break(monkeypatch):
    """One graph from token ids to token ids, as a CUDA graph needs it."""
    model, prompts = random_model(), random_prompts([6, 9, 10])
    settings = dict(max_new_tokens=12, strategy="dynamic", threshold=0.5, denoising_steps=2, eos_ids=())
    ours = decode(model, prompts, **settings)
    monkeypatch.setattr(engine, "Decoder", CompiledDecoder)
    check_same(decode(model, prompts, **settings), ours)
    assert CompiledDecoder.num_compiled == 1


@pytest.mark.parametrize("cache", ["prefix", "dual"])
@pytest.mark.parametrize("kind", ["llada", "dream"])
def test_approximate_caches_are_exact_where_nothing_is_stale(cache, kind):
    """One denoising step per block reads no cache. Of more steps the first is exact, and draws the same."""
    model, prompts = random_model(kind, block_size=8), random_prompts([5, 9, 5])
    settings = dict(max_new_tokens=16, strategy="static", eos_ids=(), seed=3)
    for steps, is_exact in ((1, True), (8, False)):
        exact = decode(model, prompts, denoising_steps=steps, **settings)
        cached = decode(model, prompts, denoising_steps=steps, cache=cache, slots=2, **settings)
        apart = max(abs(x - y) for a, b in zip(exact, cached) for x, y in zip(a.logp, b.logp))
        assert (apart < 1e-5) == is_exact
        first = [[r.response[j] for j in range(8) if r.step_map[j] == 1] for r in exact]
        assert first == [[r.response[j] for j in range(8) if r.step_map[j] == 1] for r in cached]


def test_a_cache_must_be_one_that_the_attention_knows():
    with pytest.raises(ValueError, match="cache 'old' is not possible: it must be one of none, prefix, dual"):
        decode(random_model("llada"), [[3]], max_new_tokens=4, cache="old")
    with pytest.raises(ValueError, match="cache 'dual' .* cache of block attention is exact"):
        decode(random_model("sdar"), [[3]], max_new_tokens=4, cache="dual")


def test_of_slots_that_do_not_fit_as_many_as_fit_are_taken(monkeypatch, capsys):
    model, prompts = random_model(), random_prompts([5] * 6)
    settings = dict(max_new_tokens=8, eos_ids=())
    per_slot = memory.slot_bytes(model.config, 5 + 8 + 4, 4, True)
    logits = 4 * 18 * 4 * 6  # bytes of a slot: K positions, V tokens
    made, init = [], engine.Decoder.__init__
    remember = lambda self, *args: (made.append(args), init(self, *args))[1]
    monkeypatch.setattr(engine.Decoder, "__init__", remember)
    for slots, said in ((None, ""), (4, "--slots 4: 3 of ")):
        monkeypatch.setattr(
            memory, "free_bytes", lambda device: ((slots or 6) * logits + 3.5 * per_slot) / 0.8)
        assert len(decode(model, prompts, slots=slots, **settings)) == 6 and made[-1][2] == 3
        assert said in capsys.readouterr().out
    monkeypatch.setattr(memory, "free_bytes", lambda device: 6 * logits)
    with pytest.raises(ValueError, match="lower --max_new_tokens"):
        decode(model, prompts, **settings)


def test_a_thousand_ragged_prompts_through_64_slots():
    """Each comes back once, in order, whatever the slots; memory does not grow with their number."""
    model, rng = random_model(), random.Random(0)
    prompts = random_prompts([rng.randint(1, 200) for _ in range(1000)])
    settings = dict(max_new_tokens=1, strategy="static", denoising_steps=1, eos_ids=())
    decode(model, prompts[:100], slots=64, **settings)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    rollouts = decode(model, prompts, slots=64, **settings)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before  # KiB
    assert [r.prompt for r in rollouts] == prompts and [r.seed for r in rollouts] == list(range(1000))
    records = 100 * sum(len(r.prompt) + 4 * len(r.response) for r in rollouts) // 1024
    assert grown < records + 20_000
    for i in range(0, 1000, 49):
        check_same(decode(model, [prompts[i]], slots=3, seed=i, **settings), [rollouts[i]])


# ----------------------------------------------------------------------------------------- log-probabilities


def chunks_of_7(model, states, tokens, temperature=1.0):
    """engine.logprobs, with the logits of 7 positions at a time."""
    V, _ = model.head.weight.shape
    return kernels.chunked_logprobs(
        states, model.head.weight, tokens, model.config.mask_id, temperature, max_logits=7 * V)


@pytest.mark.parametrize("has_entropy", [False, True])
@pytest.mark.parametrize("is_frozen", [False, True])
def test_chunked_logprobs_are_the_definitions(is_frozen, has_entropy):
    """Values and gradients, of the entropy, too; chunks of 7 positions that do not divide 50."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(3, 18, (50,), generator=generator)
    weights = torch.randn(2, 50, generator=generator)
    states = torch.randn(50, 32, generator=generator)
    for temperature in (1.0, 0.7):
        found = []
        for logprobs in (lm.token_logprobs, chunks_of_7):
            model = random_model()
            model.head.weight.requires_grad_(not is_frozen)
            own = states.clone().requires_grad_()
            logp, entropy = logprobs(model, own, tokens, temperature)
            loss = (weights[0] * logp).sum()
            if has_entropy:
                loss = loss + (weights[1] * entropy).sum()
            loss.backward()
            assert (model.head.weight.grad is None) == is_frozen
            found.append([logp, entropy, own.grad, *([] if is_frozen else [model.head.weight.grad])])
        for ours, theirs in zip(*found):
            scale = max(1.0, float(theirs.detach().abs().max()))
            torch.testing.assert_close(ours, theirs, atol=1e-5 * scale, rtol=1e-5)


def test_the_gradient_of_an_entropy_alone_is_the_definitions():
    model, tokens = random_model(), torch.arange(3, 18)
    states = torch.randn(15, 32, generator=torch.Generator().manual_seed(1), requires_grad=True)
    ours, theirs = (torch.autograd.grad(logprobs(model, states, tokens)[1].sum(), [states, model.head.weight])
                    for logprobs in (engine.logprobs, lm.token_logprobs))
    for a, b in zip(ours, theirs):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


def test_chunked_logprobs_of_bfloat16_weights_are_float32():
    """Values to 1e-5. Gradients are bfloat16 themselves, which has three digits: they agree to those."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(3, 18, (300,), generator=generator)
    states = torch.randn(300, 32, generator=generator).bfloat16()
    weights = torch.randn(2, 300, generator=generator)
    found = []
    for logprobs in (lm.token_logprobs, chunks_of_7):
        model = random_model().bfloat16()
        own = states.clone().requires_grad_()
        numbers = logprobs(model, own, tokens)
        (weights[0] * numbers[0] + weights[1] * numbers[1]).sum().backward()
        found.append((numbers, own.grad, model.head.weight.grad))
    theirs, ours = found
    for a, b in zip(ours[0], theirs[0]):
        assert a.dtype == torch.float32
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
    for a, b in zip(ours[1:], theirs[1:]):
        assert a.dtype == torch.bfloat16 and (a - b).float().norm() < 2**-8 * b.float().norm()


# ------------------------------------------------------------------------------------- attention and packing


def rows_of_views(model, number=5, multiple=None):
    """A micro-batch of the traces of a few responses."""
    rollouts = decode(model, random_prompts(range(2, 2 + number)), max_new_tokens=14, threshold=0.4)
    return all_rows(rollouts, model.config, multiple=multiple)


def attend_under(mask):
    """An `attend` under a mask in any of its forms."""
    return lambda layer, q, k, v: kernels.masked_attention(q, k, v, mask)


@pytest.mark.parametrize("kind", ["sdar", "dream"])
@torch.no_grad()
def test_flex_attention_sees_what_the_dense_mask_shows(kind):
    """The GPU's attention, run without its compiler: packed rows, padding, grouped heads."""
    model = random_model(kind)
    rows = rows_of_views(model, multiple=128)
    assert rows.tokens.shape[1] % 128 == 0 and (rows.layout.document == -1).any()
    is_text = (rows.layout.document >= 0)[..., None]
    attends = (lm.attend_by_rule(rows.layout), attend_under(kernels.flex_mask(lm.may_attend, rows.layout)))
    dense, flex = (model.states(rows.tokens, rows.layout.position, attend) for attend in attends)
    torch.testing.assert_close(flex * is_text, dense * is_text, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", ["sdar", "dream"])
def test_tiles_see_what_the_dense_mask_shows(kind):
    numbers = []
    for is_tiled in (False, True):
        model = random_model(kind)
        rows = rows_of_views(model)
        tiles = kernels.tiles(lm.dense_mask(rows.layout), size=16)
        attend = attend_under(tiles) if is_tiled else lm.attend_by_rule(rows.layout)
        states = model.states(rows.tokens, rows.layout.position, attend).flatten(0, 1)
        states = states[rows.targets.logit_index]
        states.square().sum().backward()
        numbers.append([states, *(p.grad for p in model.layers.parameters())])
    for ours, theirs in zip(*numbers):
        torch.testing.assert_close(ours, theirs, atol=1e-4 * float(theirs.detach().abs().max()), rtol=1e-4)
    T = rows.tokens.shape[1]
    if kind == "sdar":  # most of a long row is never touched
        assert sum(part.shape[2] * len(keys) for _, keys, part in tiles) < 0.8 * T**2


@torch.no_grad()
def test_a_long_row_is_cut_into_tiles_and_gives_the_definitions_states(monkeypatch):
    model = random_model()
    rows = all_rows(decode(model, random_prompts([9]), max_new_tokens=160, eos_ids=()), model.config)
    assert rows.tokens.shape[1] > 512
    cuts, tiles = [], kernels.tiles
    monkeypatch.setattr(kernels, "tiles", lambda mask: (cuts.append(mask.shape), tiles(mask))[1])
    ours, theirs = (model.states(rows.tokens, rows.layout.position, attend(rows.layout))
                    for attend in (engine.attend, lm.attend_by_rule))
    assert len(cuts) == 1
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


def test_block_masks_are_traced_once_for_each_length(monkeypatch):
    """What torch.compile meets on a GPU, with its backend left out: no graph break, no second compilation for
    other rows of the same length."""
    layouts = [rows_of_views(random_model(seed=seed), multiple=1024).layout for seed in range(2)]
    created, create_block_mask = [], kernels.create_block_mask

    def remember(rule, *sizes, device):
        created.append(rule)
        return create_block_mask(rule, *sizes, device=device)

    with monkeypatch.context() as patch:
        patch.setattr(kernels, "create_block_mask", remember)
        plain = [kernels.flex_mask(lm.may_attend, layout) for layout in layouts]
    compiled = torch.compile(create_block_mask, backend="aot_eager", fullgraph=True, dynamic=False)
    T = layouts[0].block.shape[1]
    for rule, mask, stance in zip(created, plain, ("default", "fail_on_recompile")):
        with torch.compiler.set_stance(stance):
            again = compiled(rule, 1, None, T, T, device=torch.device("cpu"))
        assert torch.equal(again.kv_num_blocks, mask.kv_num_blocks)


def test_settings_of_the_compiler_hold_in_every_thread():
    found = []
    kernels.compiled(lm.rotary)
    threading.Thread(target=lambda: (kernels.compiled(lm.rotary), found.append(
        torch._dynamo.config.recompile_limit))).start()
    while not found:
        time.sleep(0.01)
    assert found == [128]


def test_a_small_function_compiles_for_all_shapes_at_once():
    """What compile_small_functions hands to the compiler on a GPU, without its backend."""
    for module in (lm.Rotation(), lm.SwiGLU()):
        whole = torch.compile(module.forward, dynamic=True, fullgraph=True, backend="eager")
        for B, T, stance in ((2, 4, "default"), (5, 9, "fail_on_recompile")):
            x = torch.randn(B, 3, T, 6)
            is_rotation = isinstance(module, lm.Rotation)
            others = lm.rotary(torch.arange(T).expand(B, T), 6, 1e4) if is_rotation else (x + 1,)
            with torch.compiler.set_stance(stance):
                assert torch.equal(whole(x, *others), module(x, *others))


@pytest.mark.parametrize("kind", ["sdar", "dream"])
@torch.no_grad()
def test_rows_packed_end_to_end_give_the_numbers_of_padded_rows(kind):
    model = random_model(kind)
    rollouts = decode(model, random_prompts(range(2, 12)), max_new_tokens=14)
    rows = [row for rows in rollout.build_rows(rollouts, model.config) for row in rows]
    groups = packing.by_length([(len(row.tokens), 1) for row in rows], 256, is_packed=True)
    packed = [packing.pack([rows[i] for i in group], 0, CPU, 256) for group in groups]
    assert all(part.tokens.shape == (1, 256) for part in packed) and len(packed) > 3
    numbers = []
    for parts, compute in (([lm.pad(rows, 0, CPU)], PLAIN), (packed, FAST)):
        table = torch.zeros(2, 10, 24)
        for part in parts:
            at = slice(None), part.targets.rollout_index, part.targets.response_index
            table[at] = torch.stack(rollout.forward_rows(model, part, compute))
        numbers.append(table)
    torch.testing.assert_close(*numbers, atol=1e-5, rtol=1e-5)
    assert sorted(sum(map(seen, packed), [])) == sorted(seen(lm.pad(rows, 0, CPU)))


def test_packed_rows_have_few_lengths():
    """Kernels are compiled for each: the multiples of 128 up to 1024, then four for each power of two."""
    row = lambda size: lm.Row([5] * size, [0] * size, [0] * size, [0] * size)
    length = lambda *sizes: packing.pack([row(size) for size in sizes], 0, CPU, 128).tokens.shape
    assert [length(1), length(100, 29), length(512), length(513), length(900, 130), length(4097)] == [
        (1, 128), (1, 256), (1, 512), (1, 640), (1, 1280), (1, 5120)]
    lengths = {size: length(size)[1] for size in range(1025, 16384, 401)}
    assert len(set(lengths.values())) <= 4 * 4 and all(lengths[size] <= 1.25 * size for size in lengths)


# -------------------------------------------------------------------------------------------------- the loop


def train(attention, advantage, is_plain):
    """Two RL steps of two updates each, in a folder with small_data and mine.py.

    -> weights by name at the start and at the end, and (file, name) of all functions that ran.
    """
    start = str(FIXTURES / "tiny") if attention == "block" else "full"
    name = f"{attention}-{advantage}-{'plain' if is_plain else 'fast'}"
    argv = [f"--model={start}", f"--name={name}", "--train_data=train.jsonl", "--eval_data=test.jsonl",
            "--eval_limit=1", "--eval_strategies", "dynamic", "--eval_every=0", "--reward=mine.py:f",
            "--steps=2", "--prompts=2", "--group_size=3", "--max_new_tokens=12", f"--advantage={advantage}",
            "--value_warmup=0", "--value_epochs=1", "--value_lr=0.01", "--lr=0.01", "--warmup=0",
            "--save_every=0"]
    functions = set()
    sys.setprofile(lambda frame, event, argument: functions.add(frame.f_code))
    try:
        tracerl.main(argv + ["--plain"] * is_plain)
    finally:
        sys.setprofile(None)
    end = f"runs/{name}/checkpoints/step-2"
    weights = load_file(f"{end}/model.safetensors")
    if advantage == "value":
        value = load_file(f"{end}/value/model.safetensors")
        weights |= {f"value.{key}": tensor for key, tensor in value.items()}
    names = {(code.co_filename, code.co_name) for code in functions}
    return load_file(f"{start}/model.safetensors"), weights, names


@pytest.fixture(scope="module")
def two_steps(tmp_path_factory):
    """The function `train`, in a folder where it works; what it gave is kept."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("loop")
        patch.chdir(folder)
        small_data(folder)
        (folder / "mine.py").write_text("def f(tokens):\n    return float(sum(tokens) % 7)\n")
        checkpoints.save_checkpoint(random_model("llada"), tiny.tiny_tokenizer(), "full")
        # Adam divides by the size of the gradient. Where the gradient is zero but for rounding, rounding
        # would become a step of full size. A larger epsilon keeps small what is small.
        patch.setattr(torch.optim, "AdamW", functools.partial(torch.optim.AdamW, eps=1e-2))
        patch.setattr(runs.Run, "plot", lambda run: None)  # takes longer than all the rest
        yield functools.cache(train)


def is_twin(function):
    """Whether a function, (file, name), is one of the fast twins."""
    file, name = function
    return file in (engine.__file__, kernels.__file__) or function == (packing.__file__, "pack")


def test_plain_runs_no_line_of_the_twins(two_steps):
    for advantage in ("group", "value"):
        _, _, functions = two_steps("block", advantage, True)
        assert not [function for function in functions if is_twin(function)]
        definitions = {(rollout.__file__, "generate"), (lm.__file__, "attend_by_rule"),
                       (lm.__file__, "token_logprobs"), (lm.__file__, "pad")}
        assert definitions <= functions
        _, _, functions = two_steps("block", advantage, False)
        assert not functions & (definitions - {(lm.__file__, "pad")})
        assert {(engine.__file__, "generate"), (engine.__file__, "attend"),
                (kernels.__file__, "chunked_logprobs")} <= functions


@pytest.mark.parametrize("advantage", ["group", "value"])
@pytest.mark.parametrize("attention", ["block", "full"])
def test_two_rl_steps_with_and_without_plain_end_with_the_same_weights(attention, advantage, two_steps):
    start, plain, _ = two_steps(attention, advantage, True)
    _, fast, _ = two_steps(attention, advantage, False)
    for name in plain:
        torch.testing.assert_close(fast[name], plain[name], atol=1e-5, rtol=0, msg=name)
    moved = torch.cat([(plain[name] - start[name]).abs().flatten() for name in start])
    assert moved.max() > 1e-3 and (moved > 1e-4).float().mean() > 0.2


def nothing(is_masked):
    """A --strategy that forgets to reveal."""
    return is_masked & False


def test_a_strategy_that_reveals_nothing_is_named():
    for compute in (PLAIN, FAST):
        with pytest.raises(ValueError, match="nothing must reveal a mask of every block in every step"):
            decode(random_model(), random_prompts([5]), compute, strategy=f"{__file__}:nothing")
