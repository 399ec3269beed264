"""What the tests share: the fixtures, and small random models whose choices are neither flat nor certain."""

import functools
import gc
import json
import os
import signal
import subprocess
import sys
import sysconfig
from pathlib import Path

# The laws are float32 on the CPU. Only test_gpu.py wants a GPU, and is run alone: see there.
if not any("test_gpu" in word for word in sys.argv):
    os.environ["CUDA_VISIBLE_DEVICES"] = ""

import pytest
import torch
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parent.parent
FIXTURES = Path(__file__).resolve().parent / "fixtures"
sys.path.insert(0, str(ROOT))
torch.set_num_threads(1)
signal.signal(signal.SIGINT, signal.default_int_handler)  # the background jobs of a shell ignore Ctrl-C

import model as lm  # noqa: E402
import rollout  # noqa: E402
from plumbing import checkpoints, engine, kernels, packing, tasks  # noqa: E402
from rollout import PLAIN, Decoding  # noqa: E402

# Python's garbage collector need not look at what the imports have made: the suite is a twentieth faster.
gc.collect()
gc.freeze()

CPU = torch.device("cpu")
FAST = engine.fast(CPU)
COMPUTES = dict(plain=PLAIN, fast=FAST)  # the definitions, and their twins


def random_model(kind="sdar", block_size=4, seed=0, std=0.25, vocab_size=18, head_dim=8):
    """A tiny model of a family (sdar, qwen3, dream, llada), its weights so large that its choices matter."""
    source = dict(
        model_type=kind, block_size=block_size, mask_token_id=2, eos_token_id=1, pad_token_id=0,
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=head_dim,
        intermediate_size=48, vocab_size=vocab_size, tie_word_embeddings=False, rope_theta=1e4)
    if kind == "llada":
        source.update(d_model=32, n_layers=2, n_heads=4, n_kv_heads=4, mlp_hidden_size=48,
                      embedding_size=vocab_size, weight_tying=False)
    model = lm.BlockDiffusionLM(checkpoints.read_config(source))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            base = 1.0 if p.dim() == 1 and "norm" in name else 0.0
            p.copy_(base + torch.randn(p.shape, generator=generator) * (std if "embed" not in name else 1.0))
        model.head.weight[1] *= 0.3  # keeps eos from ending everything at once
    return model.eval()


def random_prompts(lengths, seed=0, vocab_size=18):
    """One prompt of each length, without special tokens."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, vocab_size, (n,), generator=generator).tolist() for n in lengths]


def decode(model, prompts, compute=FAST, seed=0, eos_ids=None, slots=None, cache="none", **settings):
    """Rollouts of prompts; seed: of the first, the others follow. eos_ids: instead of the model's own."""
    if compute is FAST and (slots is not None or cache != "none"):
        compute = engine.fast(model.device, slots=slots, cache=cache)
    own = model.config.eos_ids
    model.config.eos_ids = own if eos_ids is None else eos_ids
    try:
        return compute.generate(model, prompts, [seed + i for i in range(len(prompts))], Decoding(**settings))
    finally:
        model.config.eos_ids = own


@functools.cache
def decoded(name, kind="sdar", K=4, lengths=None, **settings):
    """Rollouts of a random model by the compute of this name, decoded once for all tests. Do not change them.

    lengths: of the prompts. None: every length modulo K, three times. Of these the definition, which is slow,
    decodes the first ten.
    """
    chosen = lengths or [*range(1, 2 * K + 2)] * 3
    if lengths is None and name == "plain":
        chosen = chosen[:10]
    return decode(random_model(kind, K), random_prompts(chosen), COMPUTES[name], **settings)


def small_data(folder, seed=0):
    """A train.jsonl of 60 problems and a test.jsonl of 4 in a folder -> the flags that name them."""
    rows = [json.dumps(dict(problem=row["problem"], answer=row["answer"])) + "\n"
            for row in tasks.arithmetic("train", 64, seed)]
    (folder / "train.jsonl").write_text("".join(rows[4:]))
    (folder / "test.jsonl").write_text("".join(rows[:4]))
    return ["--train_data=train.jsonl", "--eval_data=test.jsonl"]


def side_environment(folder, *packages):
    """A virtual environment that sees this one's packages, with some more installed -> its python."""
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    site = next(Path(folder, "lib").glob("python*/site-packages"))
    (site / "base.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    python = Path(folder, "bin/python")
    subprocess.run([python, "-m", "pip", "install", "-q", *packages], check=True)
    return python


def all_rows(rollouts, config, multiple=None, **settings):
    """All training rows of rollouts as one micro-batch on the CPU; settings: of rollout.build_rows.

    multiple: packed end to end, padded to a multiple of so many tokens; else padded row by row.
    """
    rows = [row for rows in rollout.build_rows(rollouts, config, **settings) for row in rows]
    return lm.pad(rows, config.pad_id, CPU) if multiple is None else packing.pack(
        rows, config.pad_id, CPU, multiple)


def seen(rows):
    """(rollout, response index) of every target, in order."""
    return list(zip(rows.targets.rollout_index.tolist(), rows.targets.response_index.tolist()))


def fixture_cases(name):
    """The cases of tests/fixtures/authors/<name>.json."""
    with open(FIXTURES / "authors" / f"{name}.json", encoding="utf-8") as file:
        return json.load(file)["cases"]


def fixture_tensors(name):
    """The tensors of tests/fixtures/authors/<name>.safetensors."""
    return load_file(FIXTURES / "authors" / f"{name}.safetensors")


@pytest.fixture
def authors_policy(monkeypatch):
    """The authors' policy may also say "mask": with this, ours may, too, and numbers compare."""
    with_mask = lambda model, states: states.float() @ model.head.weight.float().T
    for module in (lm, rollout):
        monkeypatch.setattr(module, "policy_logits", with_mask)
    monkeypatch.setattr(kernels, "masked_logits", lambda states, weight, mask_id: states @ weight.T)
