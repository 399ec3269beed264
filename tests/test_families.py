"""Every family at 0.1 billion parameters, random weights, through the whole loop.

    SLOW=1 pytest tests/test_families.py          # nine minutes on two cores

Load, plan, self-check, roll out, two updates, save, resume, evaluate; on one process and on two, all weights
and adapters, float32 and bfloat16.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT, small_data

import model as lm
from plumbing import checkpoints, tiny

pytestmark = pytest.mark.skipif(not os.environ.get("SLOW"), reason="takes minutes: set SLOW=1")

SIZES = dict(
    vocab_size=4096, hidden_size=768, num_hidden_layers=12, num_attention_heads=12, num_key_value_heads=4,
    head_dim=64, intermediate_size=2048, mask_token_id=2, eos_token_id=1, pad_token_id=0, rope_theta=1e4,
    tie_word_embeddings=False)
LLADA = dict(SIZES, d_model=768, n_layers=12, n_heads=12, n_kv_heads=12, mlp_hidden_size=2048,
             embedding_size=4096, weight_tying=False)


@pytest.mark.parametrize("family, attention, processes, more", [
    ("sdar", None, 1, ["--dtype=float32"]),
    ("sdar", None, 2, ["--dtype=bfloat16", "--advantage=value", "--value_warmup=0"]),
    ("qwen3", None, 1, ["--dtype=bfloat16", "--lora_rank=8"]),
    ("a2d-qwen3", "block", 2, ["--dtype=float32", "--lora_rank=8"]),
    ("a2d-qwen2", "full", 1, ["--dtype=bfloat16", "--shrink=4"]),
    ("dream", None, 2, ["--dtype=bfloat16"]),
    ("dream", None, 1, ["--dtype=float32", "--lora_rank=8", "--advantage=value", "--value_warmup=0"]),
    ("llada", None, 2, ["--dtype=float32"]),
    ("llada", None, 1, ["--dtype=bfloat16", "--lora_rank=8", "--shrink=1"]),
])
def test_the_whole_loop(family, attention, processes, more, tmp_path):
    torch.manual_seed(0)
    source = dict(LLADA if family == "llada" else SIZES, model_type=family)
    model = lm.BlockDiffusionLM(checkpoints.read_config(source, block_size=4, attention=attention))
    tiny.initialize(model, 0)
    assert 0.08e9 < sum(p.numel() for p in model.parameters()) < 0.13e9
    checkpoints.save_checkpoint(model.bfloat16(), tiny.tiny_tokenizer(), tmp_path / "start")
    (tmp_path / "mine.py").write_text("def f(problem, text, tokens):\n    return float(sum(tokens) % 7)\n")

    def run(script, *flags):
        done = subprocess.run(
            [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}",
             str(ROOT / script), *flags], cwd=tmp_path, capture_output=True, text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=900)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    said = run("tracerl.py", "--model=start", *small_data(tmp_path), "--reward=mine.py:f", "--steps=1",
               "--prompts=2", "--group_size=4", "--minibatches=2", "--max_new_tokens=16", "--eval_every=0",
               "--max_prompt_tokens=20", "--lr=1e-5", "--name=r", *more)
    assert "plan: 0." in said and "self-check" in said
    run("tracerl.py", "--resume", "--name=r", "--steps=2")
    lines = [json.loads(line) for line in Path(tmp_path / "runs/r/metrics.jsonl").read_text().splitlines()]
    assert len(lines) == 2
    for line in lines:
        assert line["skipped_updates"] == 0 and line["gradient_norm"] > 0 and line["trained_tokens"] > 50
        assert line["gap"] < (1e-5 if "--dtype=float32" in more else 0.02)
    said = run("eval_math.py", "--model=runs/r/checkpoints/step-2", "--data=test.jsonl", "--max_new_tokens=8",
               "--strategy=dynamic", "--limit=2")
    assert "accuracy" in said
