"""Every family at 0.1 billion parameters, random weights, through the whole loop; and SmolLM2's real weights.

    SLOW=1 pytest tests/test_families.py          # ten minutes on two cores; fetches 93 MB

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
from conftest import ROOT, side_environment, small_data

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
    ("qwen2", None, 1, ["--dtype=float32"]),
    ("llama", None, 2, ["--dtype=bfloat16"]),
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


CONVERT = """
import sys
sys.path.insert(0, sys.argv[1])
import smollm2
print(*smollm2.convert(sys.argv[2], sys.argv[3]))
smollm2.write_problems(sys.argv[2])
"""


def test_smollm2_is_read_with_its_real_weights_and_learns_to_fill_masks(tmp_path):
    """K = 1 gives transformers' logits; its mask token is one that its training never met."""
    python = side_environment(tmp_path / "venv", "gguf", "accelerate")
    done = subprocess.run([python, "-c", CONVERT, ROOT / "examples", tmp_path / "smollm2", tmp_path / "cache"],
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    difference, largest = map(float, done.stdout.split()[-2:])
    print(f"K = 1: {difference:.1e} of {largest:.1f}")
    assert difference < 3e-4 and 20 < largest < 60
    model, tokenizer = checkpoints.load_model(tmp_path / "smollm2")
    config = model.config
    assert tokenizer.convert_ids_to_tokens(config.mask_id) == "<empty_output>"
    assert (config.block_size, config.eos_ids, config.family) == (4, (2, 0), "llama")
    # Rows that training never moved are still equal: those of 5, 7, 8, ... 16. <repo_name>, 3, has moved.
    rows = model.embed.weight.float()
    distances = (rows[3:17] - rows[config.mask_id]).norm(dim=1)
    assert distances[[2, *range(4, 14)]].max() < 0.1 and distances[[0, 1, 3]].min() > 0.5
    done = subprocess.run(
        [sys.executable, ROOT / "sft.py", "--model=smollm2", "--data=smollm2/train.jsonl", "--steps=2",
         "--batch_size=4", "--warmup=1", "--cooldown=1", "--max_new_tokens=48", "--name=s"],
        cwd=tmp_path, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stdout + done.stderr
    again, _ = checkpoints.load_model(tmp_path / "runs/s/checkpoint")
    assert again.config.mask_id == config.mask_id
    assert not torch.equal(again.embed.weight[16].float(), model.embed.weight[16].float())
