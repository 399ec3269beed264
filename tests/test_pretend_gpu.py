"""The GPU's path on a pretended GPU: the order of things, meetings of host and device, recorded graphs.

    SLOW=1 pytest tests/test_pretend_gpu.py          # all of test_gpu.py as well: eight minutes
"""

import os
import subprocess
import sys
import weakref
from collections import Counter

import pretend_gpu
import pytest
import torch
from conftest import ROOT, decode, random_model, random_prompts

import model as lm
import rollout
import tracerl
from plumbing import engine, kernels, packing, runs
from pretend_gpu import GPU, MEETINGS

SETTINGS = dict(max_new_tokens=12, threshold=0.5, eos_ids=(), slots=3)
LENGTHS = [5, 9, 14, 3, 8]


@pytest.fixture
def gpu(monkeypatch):
    """A pretended GPU, on which graphs are recorded early."""
    monkeypatch.setattr(engine, "RECORD_AT", 2)
    with pretend_gpu.pretended():
        yield


@pytest.mark.parametrize("kind, settings", [
    ("sdar", dict(strategy="dynamic")), ("sdar", dict(strategy="entropy", top_p=0.9)), ("dream", {}),
    ("llada", dict(cache="dual"))])
def test_a_gpu_decodes_what_a_cpu_does(kind, settings, gpu):
    prompts = random_prompts(LENGTHS)
    settings = SETTINGS | settings
    theirs = decode(random_model(kind), prompts, **settings)
    ours = decode(random_model(kind).to(GPU), prompts, **settings)
    for a, b in zip(ours, theirs):
        assert (a.response, a.step_map) == (b.response, b.step_map)
    assert (MEETINGS["graph replayed", "", ""] > 0) == (kind == "sdar")


def test_host_and_device_meet_twice_per_denoising_step(gpu, monkeypatch):
    """One copy in and one read, whether the step is recorded or not."""
    steps = []
    advance = engine.Decoder.advance

    def counted(self):
        before = Counter(MEETINGS)
        ended = advance(self)
        step = Counter()
        for (what, _, _), times in (MEETINGS - before).items():
            step[what] += times
        steps.append(step)
        return ended

    monkeypatch.setattr(engine.Decoder, "advance", counted)
    decode(random_model().to(GPU), random_prompts(LENGTHS), **SETTINGS)
    replayed = [step for step in steps if step["graph replayed"] and not step["graph recorded"]]
    others = [step for step in steps if not step["graph replayed"]]
    assert len(replayed) > 5 and len(others) > 5
    assert all(step == {"a tensor of the host": 1, "read": 1, "graph replayed": 1} for step in replayed)
    assert all(step == {"send": 1, "read": 1} for step in others)


def test_the_cache_is_free_before_memory_is_given_back(gpu, monkeypatch):
    """Memory that something still refers to cannot be given back."""
    decoders, is_alive = [], []
    make = engine.Decoder.__init__
    monkeypatch.setattr(engine.Decoder, "__init__",
                        lambda self, *args: (decoders.append(weakref.ref(self)), make(self, *args))[1])
    look = lambda: is_alive.append([ref() is not None for ref in decoders])
    monkeypatch.setattr(torch.cuda, "empty_cache", look)
    model = random_model().to(GPU)
    settings = rollout.Decoding(max_new_tokens=16)
    rollout.generate_everywhere(model, random_prompts(LENGTHS), range(5), settings, engine.fast(model.device))
    assert MEETINGS["graph recorded", "", ""] > 0 and is_alive[-1] == [False]


def test_the_peaks_of_both_stages_are_metrics(gpu, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: None)
    peaks = iter([5 * 2**30, 2 * 2**30, 4 * 2**30])
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: next(peaks))
    runs.take_seconds()
    for name in ("rollout_seconds", "update_seconds", "update_seconds"):
        runs.timed(name)(lambda: None)()
    taken = runs.take_seconds()
    assert (taken["rollout_gib"], taken["update_gib"]) == (5, 4)
    assert runs.take_seconds() == {}


def test_an_operation_on_both_devices_and_a_read_in_a_graph_fail(gpu):
    x = torch.ones(3, device=GPU)
    with pytest.raises(RuntimeError, match="tensors on cuda:0 and on the CPU"):
        x + torch.ones(3)
    graph = pretend_gpu.Graph()
    graph.capture_begin()
    with pytest.raises(RuntimeError, match="host and device meet: read"):
        bool(x.sum() > 0)
    x += 1
    graph.capture_end()
    assert x.tolist() == [1.0] * 3  # recording computes nothing
    graph.replay()
    assert x.tolist() == [2.0] * 3


@pytest.mark.parametrize("kind", ["sdar", "dream"])
def test_an_update_has_the_gradient_of_the_cpu(kind, gpu):
    """Packed rows, FlexAttention's mask, the head's chunks."""
    rollouts = decode(random_model(kind), random_prompts(LENGTHS[:3]), **SETTINGS)
    for r in rollouts:
        r.advantage = [1.0] * len(r.response)
    gradients = []
    for device, compute in ((torch.device("cpu"), rollout.PLAIN), (GPU, engine.fast(GPU))):
        model = random_model(kind).to(device)
        for rows in packing.micro_batches(rollout.build_rows(rollouts, model.config), compute, model):
            logp, _ = rollout.forward_rows(model, rows, compute)
            tracerl.policy_loss(logp, rows.targets._replace(logp_old=rows.targets.logp), 100, 0.2, 0.01).backward()
        gradients.append([p.grad.cpu() for p in model.parameters()])
    for a, b in zip(*gradients):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


def test_a_step_that_cannot_be_recorded_names_its_cause(gpu, tmp_path):
    (tmp_path / "mine.py").write_text(
        "def waits(confidence, is_masked):\n    return is_masked if is_masked.any() else is_masked\n")
    with pytest.raises(RuntimeError, match="could not be recorded .*host and device meet.* your --strategy"):
        decode(random_model("sdar").to(GPU), random_prompts(LENGTHS),
               **SETTINGS | dict(strategy=f"{tmp_path}/mine.py:waits"))


def test_masked_or_in_float32_every_head_has_a_key_of_its_own(gpu, monkeypatch):
    """Only then may CUDA choose a kernel that does not hold the scores of all pairs."""
    asked = []
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention",
                        lambda q, k, v, attn_mask=None, enable_gqa=False: asked.append(enable_gqa) or q)
    q, k = torch.zeros(1, 4, 8, 16, device=GPU), torch.zeros(1, 2, 8, 16, device=GPU)
    mask = torch.ones(8, 8, dtype=torch.bool, device=GPU)
    lm.attention(q, k, k, mask)
    kernels.masked_attention(q, k, k, mask)
    kernels.masked_attention(q, k, k, None)
    assert asked == [False] * 3
    kernels.masked_attention(q.bfloat16(), k.bfloat16(), k.bfloat16(), None)
    assert asked[3:] == [True]


@torch.no_grad()
def test_two_blocks_of_a_slot_in_one_row_see_what_two_rows_see(gpu):
    """kernels.CacheReader: a slot's own block, its commit, and commits of a spare slot."""
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(shape, generator=generator)
    q, keys, values = draw(6, 4, 4, 8), draw(4, 21, 2, 8), draw(4, 21, 2, 8)
    slots, end = torch.tensor([0, 1, 2, 1, 3, 0]), torch.tensor([12, 16, 4, 12, 4, 8])
    reader = lambda device, keys: kernels.CacheReader(slots.to(device), end.to(device), 19, 3, 8, keys)
    theirs = reader("cpu", keys)(q, keys, values)
    ours = reader(GPU, keys.to(GPU))(q.to(GPU), keys.to(GPU), values.to(GPU)).cpu()
    is_used = torch.tensor([0, 1, 2, 3, 5])
    torch.testing.assert_close(ours[is_used], theirs[is_used], atol=1e-6, rtol=0)
    for row, (slot, stop) in enumerate(zip(slots.tolist(), end.tolist())):
        seen = [x[slot, :stop].transpose(0, 1)[None] for x in (keys, values)]
        definition = lm.attention(q[row:row + 1], *seen)[0]
        torch.testing.assert_close(theirs[row], definition, atol=1e-6, rtol=0)


@pytest.mark.skipif(not os.environ.get("SLOW"), reason="takes minutes: SLOW=1")
def test_all_of_test_gpu_passes():
    command = [sys.executable, "tests/pretend_gpu.py", "pytest", "-q", "-p", "no:cacheprovider",
               "tests/test_gpu.py"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:]
