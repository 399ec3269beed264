"""What only a GPU can show: pytest tests/test_gpu.py

Nobody has run this file on a GPU yet. All other tests hide the GPU (conftest.py): their laws are float32 on
the CPU.
"""

from functools import partial

import pytest
import torch
from conftest import all_rows, random_model, random_prompts

import model as lm
import rollout
import tracerl
from plumbing import cuda

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU, and to be run alone")
GPU = "cuda"
SETTINGS = dict(max_new_tokens=40, threshold=0.5, eos_ids=(), seed=3)


def wide_model(kind, dtype=torch.float32):
    """random_model with heads of 16 channels, as narrow as FlexAttention's kernels take them."""
    return random_model(kind, head_dim=16).to(GPU, dtype)


def gap(model, rollouts, is_packed):
    """Mean distance of replayed and recorded log-probabilities."""
    return rollout.replay_gap(model, rollouts, model.config.block_size, 1.0, is_packed=is_packed)["gap"]


@pytest.mark.parametrize("dtype, bound", [(torch.float32, 1e-4), (torch.bfloat16, 0.05)])
@pytest.mark.parametrize("kind", ["sdar", "dream", "llada"])
def test_the_replay_law(kind, dtype, bound):
    """Decoding (CUDA graphs; flash-attn in bfloat16, if installed), and both layouts of replay: packed rows
    by compiled FlexAttention, padded rows by a dense mask."""
    model = wide_model(kind, dtype)
    rollouts = rollout.generate(model, random_prompts([5, 9, 30, 64] * 8), slots=12, **SETTINGS)
    assert gap(model, rollouts, is_packed=False) < bound and gap(model, rollouts, is_packed=True) < bound


@pytest.mark.parametrize("strategy", rollout.STRATEGIES)
def test_recorded_steps_decode_what_plain_ones_do(strategy, monkeypatch):
    model, prompts = wide_model("sdar"), random_prompts([5, 9, 30, 64] * 8)
    monkeypatch.setattr(cuda, "RECORD_AT", 2)
    graphs = rollout.generate(model, prompts, strategy=strategy, slots=12, **SETTINGS)
    monkeypatch.setattr(cuda.Captured, "__call__", lambda self, *inputs: self.denoise(*inputs))
    plain = rollout.generate(model, prompts, strategy=strategy, slots=12, **SETTINGS)
    same = [a.response == b.response for a, b in zip(graphs, plain)]
    assert sum(same) >= len(same) - 1  # one may meet a tie


@pytest.mark.parametrize("kind", ["sdar", "dream"])
def test_an_update_has_the_gradient_of_the_cpu(kind):
    """Packed rows, compiled attention and its backward pass, the head's chunks."""
    gradients, config = [], None
    for device in ("cpu", GPU):
        model = random_model(kind, head_dim=16)
        if config is None:
            config = model.config
            rollouts = rollout.generate(model, random_prompts([5, 9, 30, 64]), **SETTINGS)
            for number, r in enumerate(rollouts):
                r.advantage = [1.0 - number % 2 * 2] * len(r.response)
        model.to(device)
        args = tracerl.parse_args(["--tokens_per_micro_batch=4096"])
        args.shrink = 1
        for rows in tracerl.own_rows(model, rollouts, rollout.trace_views, config.block_size, args):
            logp, _ = rollout.forward_rows(model, rows)
            tracerl.policy_loss(logp, rows.targets, 100, 4).backward()
        gradients.append([p.grad.cpu() for p in model.parameters()])
    for a, b in zip(*gradients):
        torch.testing.assert_close(a, b, atol=1e-3 * float(a.abs().max()), rtol=1e-2)


@torch.no_grad()
def test_flex_attention_sees_what_the_dense_mask_shows():
    model = wide_model("sdar")
    rollouts = rollout.generate(model, random_prompts([5, 9, 30]), **SETTINGS)
    rows = all_rows(rollouts, model.config, multiple=128)
    layout = lm.Layout(*(t.to(GPU) for t in rows.layout))
    dense, flex = (model.hidden(rows.tokens.to(GPU), layout.position, partial(lm.masked_attention, mask=mask))
                   for mask in (lm.dense_mask(layout), lm.block_mask(layout)))
    is_text = (layout.document >= 0)[..., None]
    torch.testing.assert_close(flex * is_text, dense * is_text, atol=1e-3, rtol=1e-2)


def test_decoding_gives_its_memory_back():
    """Caches and graphs go with the call that made them, without the garbage collector."""
    model, used = wide_model("sdar"), []
    for turn in range(3):
        rollout.generate(model, random_prompts([5, 9, 30, 64] * 8), slots=12, **SETTINGS)
        used.append(torch.cuda.memory_allocated())
    assert used[2] <= used[0] + 2**20


def test_fused_functions_are_the_plain_ones():
    x = torch.randn(2, 4, 8, 16, device=GPU)
    cos, sin = lm.rotary(torch.arange(8, device=GPU).expand(2, 8), 16, 1e4)
    torch.testing.assert_close(lm.rotate(x, cos, sin), lm.rotate.__wrapped__(x, cos, sin))
    torch.testing.assert_close(lm.gated(x, x + 1), lm.gated.__wrapped__(x, x + 1))
