"""What only a GPU can show: pytest tests/test_gpu.py

Nobody has run this file on a GPU yet. tests/pretend_gpu.py runs it without one, see there. All other tests
hide the GPU (conftest.py): their laws are float32 on the CPU.
"""

import json

import pytest
import torch
import torch.distributed as dist
from conftest import FIXTURES, all_rows, decode, random_model, random_prompts

import eval_math
import model as lm
import rollout
import sft
import tracerl
from plumbing import engine, kernels, packing, parallel
from plumbing.checkpoints import load_model
from rollout import PLAIN

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU, and to be run alone")
GPU = torch.device("cuda", 0)
LENGTHS = [5, 9, 30, 64] * 4
SETTINGS = dict(max_new_tokens=24, threshold=0.5, eos_ids=(), seed=3, slots=6)


def wide_model(kind, dtype=torch.float32, device=GPU):
    """random_model with heads of 16 channels: FlexAttention takes none narrower."""
    model = random_model(kind, head_dim=16).to(device, dtype)
    engine.compile_small_functions(model)
    return model


# --------------------------------------------------------------------------------------------------- decoding


@pytest.mark.parametrize("dtype, bound", [(torch.float32, 1e-4), (torch.bfloat16, 0.05)])
@pytest.mark.parametrize("kind", ["sdar", "dream", "llada"])
def test_the_replay_law(kind, dtype, bound):
    """CUDA graphs, and flash-attn in bfloat16 if it is there; packed rows, padded rows, and the definition."""
    model = wide_model(kind, dtype)
    rollouts = decode(model, random_prompts(LENGTHS), **SETTINGS)
    fast = engine.fast(GPU)
    for compute in (fast, fast._replace(is_packed=False), PLAIN):
        assert rollout.replay_gap(model, rollouts[::2], compute, 1.0)["gap"] < bound


@pytest.mark.parametrize("kind", ["sdar", "dream", "llada"])
def test_the_definition_and_its_twin_decode_the_same(kind):
    model = wide_model(kind)
    prompts = random_prompts([5, 9])
    fast = decode(model, prompts, **SETTINGS)
    plain = decode(model, prompts, PLAIN, **SETTINGS | dict(slots=None))
    assert [r.step_map for r in fast] == [r.step_map for r in plain]
    assert [r.response for r in fast] == [r.response for r in plain]


@pytest.mark.parametrize("strategy", rollout.STRATEGIES)
def test_recorded_steps_decode_what_others_do(strategy, monkeypatch):
    model, prompts = wide_model("sdar"), random_prompts(LENGTHS)
    monkeypatch.setattr(engine, "RECORD_AT", 2)
    graphs = decode(model, prompts, strategy=strategy, **SETTINGS)
    monkeypatch.setattr(engine, "RECORD_AT", 10**9)
    others = decode(model, prompts, strategy=strategy, **SETTINGS)
    same = [a.response == b.response for a, b in zip(graphs, others)]
    assert sum(same) >= len(same) - 1  # one may meet a tie


@pytest.mark.parametrize("cache", ["prefix", "dual"])
def test_approximate_caches_decode(cache):
    rollouts = decode(wide_model("llada"), random_prompts([5, 9, 5]), cache=cache, **SETTINGS)
    assert all(len(r.response) == 24 for r in rollouts)


def test_decoding_gives_its_memory_back():
    """Caches and graphs go with the call that made them: neither tensors nor what torch keeps grow."""
    model = wide_model("sdar")
    used = []
    for _ in range(3):
        decode(model, random_prompts(LENGTHS), **SETTINGS)
        used.append((torch.cuda.memory_allocated(), torch.cuda.memory_reserved()))
    assert used[2][0] <= used[0][0] + 2**20
    assert used[2][1] <= used[0][1] + 2**25


def test_more_slots_than_fit_are_as_many_as_fit(monkeypatch, capsys):
    model = wide_model("sdar")
    prompts = random_prompts(LENGTHS)
    logits = 6 * model.config.block_size * model.config.vocab_size * 4 * 6 * 2  # bytes, see memory.fit_slots
    monkeypatch.setattr(engine.memory, "free_bytes", lambda device: logits / 0.8 + 200_000)
    assert len(decode(model, prompts, **SETTINGS)) == len(prompts)
    assert "--slots 6: 3 of" in capsys.readouterr().out


# --------------------------------------------------------------------------------------------------- training


@pytest.mark.parametrize("kind", ["sdar", "dream"])
def test_an_update_has_the_gradient_of_the_cpu(kind):
    """Packed rows, compiled attention and its backward pass, the head's chunks; the definition on the CPU."""
    rollouts = decode(wide_model(kind, device="cpu"), random_prompts([5, 9, 30, 64]), **SETTINGS)
    for number, r in enumerate(rollouts):
        r.advantage = [1.0 - number % 2 * 2] * len(r.response)
    gradients = []
    for device, compute in (("cpu", PLAIN), (GPU, engine.fast(GPU))):
        model = wide_model(kind, device=device)
        for rows in packing.micro_batches(rollout.build_rows(rollouts, model.config), compute, model):
            logp, entropy = rollout.forward_rows(model, rows, compute)
            rows.targets.logp_old.copy_(rows.targets.logp)
            (tracerl.policy_loss(logp, rows.targets, 100, 0.2, 0.01) + 0.01 * entropy.sum()).backward()
        gradients.append([p.grad.cpu() for p in model.parameters()])
    for a, b in zip(*gradients):
        torch.testing.assert_close(a, b, atol=1e-3 * float(a.abs().max()), rtol=1e-2)


@torch.no_grad()
def test_flex_attention_sees_what_the_dense_mask_shows():
    model = wide_model("sdar")
    rollouts = decode(model, random_prompts([5, 9, 30]), **SETTINGS)
    rows = all_rows(rollouts, model.config, multiple=128)
    layout = lm.Layout(*(t.to(GPU) for t in rows.layout))
    assert isinstance(kernels.flex_mask(lm.may_attend, layout), kernels.BlockMask)
    flex, dense = (model.states(rows.tokens.to(GPU), layout.position, attend(layout))
                   for attend in (engine.attend, lm.attend_by_rule))
    is_text = (layout.document >= 0)[..., None]
    torch.testing.assert_close(flex * is_text, dense * is_text, atol=1e-3, rtol=1e-2)


def test_fused_functions_are_the_plain_ones():
    fused = wide_model("sdar").layers[0]
    plain = random_model("sdar", head_dim=16).layers[0].to(GPU)
    for B, T in ((2, 8), (3, 4), (1, 1)):
        x = torch.randn(B, 4, T, 16, device=GPU)
        cos, sin = lm.rotary(torch.arange(T, device=GPU).expand(B, T), 16, 1e4)
        torch.testing.assert_close(fused.rotate(x, cos, sin), plain.rotate(x, cos, sin))
        torch.testing.assert_close(fused.activation(x, x + 1), plain.activation(x, x + 1))


# ---------------------------------------------------------------------------------------------------- commands


def run(name, *flags):
    """A short run of tracerl.py on the GPU -> its log, and the weights of its end."""
    tracerl.main([
        f"--model={FIXTURES / 'tiny'}", "--train_data=arithmetic", "--device=cuda", "--dtype=float32",
        "--prompts=3", "--group_size=4", "--steps=2", "--eval_limit=3", "--eval_every=0", "--eval_strategies=dynamic",
        "--value_warmup=1", f"--name={name}", *flags])
    with open(f"runs/{name}/metrics.jsonl", encoding="utf-8") as file:
        lines = [json.loads(line) for line in file]
    model, _ = load_model(f"runs/{name}/checkpoints/step-{lines[-1]['step']}", device="cpu")
    return lines, dict(model.named_parameters())


@pytest.fixture
def at_home(tmp_path, monkeypatch):
    """In a folder of its own; no device is chosen for later tests, and no process group is left."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(parallel.CHOSEN, "device", None)
    yield
    parallel.end_processes()


def check_equal(ours, theirs):
    """The same weights, to what two steps of AdamW make of rounding."""
    for name in theirs:
        torch.testing.assert_close(ours[name], theirs[name], atol=2e-4, rtol=0, msg=name)


@pytest.mark.parametrize("flags", [
    [], ["--advantage=value"], ["--lora_rank=2"], ["--plain", "--prompts=2"], ["--attention=full"]],
    ids=["groups", "value", "lora", "plain", "full"])
def test_a_run_has_the_weights_of_the_cpu(flags, at_home):
    if "--attention=full" in flags:
        flags = [*flags, f"--model={FIXTURES.parent.parent / 'assets' / 'tiny-full'}"]
    lines, ours = run("gpu", *flags)
    assert all(line["gap"] < 1e-4 for line in lines)
    check_equal(ours, run("cpu", *flags, "--device=cpu")[1])


@pytest.mark.parametrize("flags", [[], ["--advantage=value", "--lora_rank=2"]], ids=["groups", "value lora"])
def test_a_resumed_run_is_the_uninterrupted_one(flags, at_home):
    _, whole = run("whole", *flags)
    run("parts", "--steps=1", *flags)
    lines, parts = run("parts", "--resume", "--steps=2", *flags)
    assert [line["step"] for line in lines] == [1, 2]
    check_equal(parts, whole)


@pytest.mark.parametrize("attention", ["block", "full"])
def test_fine_tuning_runs(attention, at_home):
    start = FIXTURES.parent.parent / "assets" / f"tiny-{attention}"
    sft.main([f"--model={start}", "--data=arithmetic", "--device=cuda", "--dtype=float32", "--steps=3",
              "--batch_size=8", "--name=sft"])
    with open("runs/sft/metrics.jsonl", encoding="utf-8") as file:
        assert json.loads(file.readlines()[-1])["loss"] > 0


def test_evaluation_in_bfloat16(at_home):
    assert eval_math.main([
        f"--model={FIXTURES / 'tiny'}", "--device=cuda", "--dtype=bfloat16", "--limit=20"])


# ------------------------------------------------------------------------------------------- one process, NCCL


has_nccl = pytest.mark.skipif(not dist.is_nccl_available(), reason="needs NCCL")


@has_nccl
def test_a_sharded_run_has_the_weights_of_an_unsharded_one(at_home):
    """FSDP2 with one process: sharded weights, gathered for decoding, and a checkpoint of them."""
    _, alone = run("alone")
    parallel.start_processes("cuda", needs_group=True)
    check_equal(run("sharded", "--device=cuda")[1], alone)


@has_nccl
@pytest.mark.parametrize("flags", [[], ["--advantage=value"], ["--lora_rank=2"]],
                         ids=["groups", "value", "lora"])
def test_a_sharded_run_in_bfloat16_resumes(flags, at_home):
    run("half", "--dtype=bfloat16", "--steps=1", *flags)
    parallel.end_processes()
    lines, _ = run("half", "--dtype=bfloat16", "--resume", "--steps=2", *flags)
    assert [line["step"] for line in lines] == [1, 2] and all(line["gap"] < 0.05 for line in lines)
