"""What only a GPU can show: pytest tests/test_gpu.py

Nobody has run this file on a GPU yet. All other tests hide the GPU (conftest.py): their laws are float32 on
the CPU.
"""

import pytest
import torch
from conftest import decode, random_model, random_prompts

import model as lm
import rollout
import tracerl
from plumbing import engine, kernels, packing
from rollout import PLAIN, Decoding

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU, and to be run alone")
GPU = torch.device("cuda")
SETTINGS = dict(max_new_tokens=40, threshold=0.5)
PROMPTS = random_prompts([5, 9, 30, 64] * 8)


def wide_model(kind, dtype=torch.float32):
    """random_model on the GPU, without an eos. Heads have 16 channels: FlexAttention takes none narrower."""
    model = random_model(kind, head_dim=16).to(GPU, dtype)
    model.config.eos_ids = ()
    engine.compile_small_functions(model)
    return model


def decode_fast(model, **changes):
    """Rollouts of PROMPTS by the engine, in few slots."""
    return engine.generate(model, PROMPTS, range(len(PROMPTS)), Decoding(**SETTINGS | changes), slots=12)


@pytest.mark.parametrize("dtype, bound", [(torch.float32, 1e-4), (torch.bfloat16, 0.05)])
@pytest.mark.parametrize("kind", ["sdar", "dream", "llada"])
def test_the_replay_law(kind, dtype, bound):
    """Decoding (CUDA graphs; flash-attn in bfloat16, if installed), and three ways to replay: packed rows by
    compiled FlexAttention, padded rows by a dense mask, and the definitions."""
    model = wide_model(kind, dtype)
    rollouts = decode_fast(model)
    fast = engine.fast(GPU)
    for compute in (fast, fast._replace(is_packed=False), PLAIN):
        assert rollout.replay_gap(model, rollouts, compute, 1.0)["gap"] < bound


@pytest.mark.parametrize("strategy", rollout.STRATEGIES)
def test_recorded_steps_decode_what_plain_ones_do(strategy, monkeypatch):
    model = wide_model("sdar")
    monkeypatch.setattr(engine, "RECORD_AT", 2)
    graphs = decode_fast(model, strategy=strategy)
    monkeypatch.setattr(engine.Captured, "__call__", lambda self, *inputs: self.denoise(*inputs))
    plain = decode_fast(model, strategy=strategy)
    same = [a.response == b.response for a, b in zip(graphs, plain)]
    assert sum(same) >= len(same) - 1  # one may meet a tie


@pytest.mark.parametrize("kind", ["sdar", "dream", "llada"])
def test_the_engine_gives_the_definitions_rollouts(kind):
    model = wide_model(kind)
    theirs = rollout.generate_each(model, PROMPTS[:4], range(4), Decoding(**SETTINGS))
    same = [a.response == b.response for a, b in zip(decode_fast(model), theirs)]
    assert sum(same) >= len(same) - 1  # one may meet a tie


@pytest.mark.parametrize("kind", ["sdar", "dream"])
def test_an_update_has_the_gradient_of_the_cpu(kind):
    """Packed rows, compiled attention and its backward pass, the head's chunks; beside the definitions."""
    gradients = []
    rollouts = decode(random_model(kind, head_dim=16), PROMPTS[:4], eos_ids=(), **SETTINGS)
    for number, r in enumerate(rollouts):
        r.advantage = [1.0 - number % 2 * 2] * len(r.response)
    for device, compute in ((torch.device("cpu"), PLAIN), (GPU, engine.fast(GPU))):
        model = random_model(kind, head_dim=16).to(device)
        built = rollout.build_rows(rollouts, model.config, trained_only=True)
        for rows in packing.micro_batches(built, compute, model):
            logp, _ = rollout.forward_rows(model, rows, compute)
            rows.targets.logp_old.copy_(logp.detach())
            tracerl.policy_loss(logp, rows.targets, num_tokens=100).backward()
        gradients.append([p.grad.cpu() for p in model.parameters()])
    for a, b in zip(*gradients):
        torch.testing.assert_close(a, b, atol=1e-3 * float(a.abs().max()), rtol=1e-2)


@torch.no_grad()
def test_flex_attention_sees_what_the_dense_mask_shows():
    model = wide_model("sdar")
    built = rollout.build_rows(decode_fast(model)[:3], model.config)
    rows = packing.pack([row for rows in built for row in rows], 0, GPU, multiple=128)
    flex = kernels.flex_mask(lm.may_attend, rows.layout)
    under_flex = lambda layer, q, k, v: kernels.masked_attention(q, k, v, flex)
    ours, theirs = (model.states(rows.tokens, rows.layout.position, attend)
                    for attend in (under_flex, lm.attend_by_rule(rows.layout)))
    is_text = (rows.layout.document >= 0)[..., None]
    torch.testing.assert_close(ours * is_text, theirs * is_text, atol=1e-3, rtol=1e-2)


def test_decoding_gives_its_memory_back():
    """Caches and graphs go with the call that made them, without the garbage collector."""
    model, used = wide_model("sdar"), []
    for turn in range(3):
        decode_fast(model)
        used.append(torch.cuda.memory_allocated())
    assert used[2] <= used[0] + 2**20


def test_compiled_small_functions_are_the_plain_ones():
    compiled = wide_model("sdar").layers[0]
    plain = random_model("sdar", head_dim=16).layers[0].to(GPU)
    for B, T in ((2, 8), (3, 4)):
        x = torch.randn(B, 4, T, 16, device=GPU)
        cos, sin = lm.rotary(torch.arange(T, device=GPU).expand(B, T), 16, 1e4)
        torch.testing.assert_close(compiled.rotate(x, cos, sin), plain.rotate(x, cos, sin))
        torch.testing.assert_close(compiled.activation(x, x + 1), plain.activation(x, x + 1))
