"""Laws of supervised fine-tuning: which tokens are hidden, how they are weighted, the authors' loss."""

import json

import pytest
import torch
from conftest import FIXTURES, all_rows, fixture_cases, fixture_tensors, random_model, random_prompts, seen

import eval_math
import model as lm
import rollout
import sft
from plumbing import checkpoints, parallel
from rollout import Rollout


def examples(lengths=((5, 7), (8, 12), (3, 9)), canvas=False):
    prompts = random_prompts([p for p, _ in lengths])
    responses = random_prompts([r for _, r in lengths], seed=1)
    return [Rollout(p, r, len(r), [1] * len(r), canvas=len(r) if canvas else 0)
            for p, r in zip(prompts, responses)]


@pytest.mark.parametrize("P, is_full", [(6, False), (6, True)])
def test_noise_hides_k_uniform_in_1_to_c_of_each_blocks_response_tokens(P, is_full):
    """Response tokens at positions 6..16: blocks with 2, 4, 4, 1 of them, or one response with 11."""
    config = random_model("llada" if is_full else "sdar").config
    hidden_sets = {}
    for seed in range(2000):
        r = Rollout([3] * P, [4] * 11, 11, [1] * 11, canvas=11 if is_full else 0, seed=seed)
        for block, hidden, targets, share in rollout.views_of(r, config, 4, sft.noise_views):
            assert hidden == targets == sorted(set(hidden))
            hidden_sets.setdefault(block, []).append((hidden, share))
    sizes = {0: 11} if is_full else {1: 2, 2: 4, 3: 4, 4: 1}
    assert hidden_sets.keys() == sizes.keys()
    for block, count in sizes.items():
        k = torch.tensor([len(hidden) for hidden, _ in hidden_sets[block]])
        shares = torch.bincount(k, minlength=count + 1)[1:] / 2000
        assert k.min() == 1 and k.max() == count
        assert (shares - 1 / count).abs().max() < 4 * (1 / count / 2000) ** 0.5 + 1e-6
        places = torch.tensor([j for hidden, _ in hidden_sets[block] for j in hidden])
        each = torch.bincount(places - places.min()) / 2000
        assert len(each) == count and (each - (count + 1) / 2 / count).abs().max() < 0.05  # all alike
        assert all(share == len(hidden) / count for hidden, share in hidden_sets[block])


def test_the_weighted_loss_is_unbiased_for_a_model_that_ignores_the_rest():
    """With weight 1 / t the expected sum over masked tokens is the sum over all tokens."""
    config, total = random_model(block_size=8).config, 0.0
    for seed in range(20000):
        r = Rollout([3] * 8, [4] * 8, 8, [1] * 8, seed=seed)
        (_, hidden, _, share), = rollout.views_of(r, config, 8, sft.noise_views)
        logp = -torch.tensor(hidden).float() - 1
        total += sft.sft_loss(logp, torch.full_like(logp, share), 8, True).item()
    assert total / 20000 == pytest.approx(4.5, abs=0.05)


@pytest.mark.parametrize("kind", ["sdar", "llada"])
def test_a_hidden_token_is_predicted_from_its_block_and_the_clean_past(kind):
    model = random_model(kind)
    batch = examples(canvas=kind == "llada")
    rows = all_rows(batch, model.config, views=sft.noise_views)
    logp, _ = rollout.forward_rows(model, rows)
    hidden, K = set(seen(rows)), model.config.block_size
    for value, (n, place) in zip(logp, seen(rows)):
        text, P = batch[n].prompt + batch[n].response, len(batch[n].prompt)
        at = P + place
        stop = len(text) if kind == "llada" else at // K * K + K
        start = 0 if kind == "llada" else at // K * K
        shown = [model.config.mask_id if i >= start and (n, i - P) in hidden else token
                 for i, token in enumerate(text[:stop])]
        logits = lm.policy_logits(model(torch.tensor([shown])), model.config.mask_id)[0, at]
        torch.testing.assert_close(value, logits.log_softmax(-1)[text[at]], atol=1e-5, rtol=1e-5)


def test_the_end_is_filled_with_eos_to_the_block_or_the_canvas():
    tokenizer = sft.tiny_tokenizer()
    problems, _ = eval_math.encode_prompts(
        [eval_math.Problem("12+3=", "15", "5;1;\\boxed{15}")], tokenizer, 99)
    block, = sft.to_examples(problems, tokenizer, random_model().config, 16)
    assert (len(block.prompt) == 5 and block.response[-4:] == [17, 1, 1, 1]
            and (5 + len(block.response)) % 4 == 0)
    full, = sft.to_examples(problems, tokenizer, random_model("llada").config, 16)
    assert full.response[8:] == [1] * 8 and full.canvas == len(full.response) == 16
    assert sft.to_examples(problems, tokenizer, random_model().config, 8) == []


def test_the_update_does_not_depend_on_micro_batches():
    results = []
    for max_tokens in (10, 60, 10_000):
        model = random_model()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        loss, norm = sft.train_step(model, optimizer, examples(), sft.noise_views, True, max_tokens)
        results.append((loss, norm, torch.cat([p.detach().flatten() for p in model.parameters()])))
    for loss, norm, weights in results[1:]:
        assert (loss == pytest.approx(results[0][0], rel=1e-5)
                and norm == pytest.approx(results[0][1], rel=1e-4))
        torch.testing.assert_close(weights, results[0][2], atol=1e-6, rtol=1e-5)


def test_a_few_steps_learn(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    whole = eval_math.arithmetic  # a tenth of the data: making and encoding all of them takes seconds
    monkeypatch.setattr(eval_math, "arithmetic", lambda split, number, *more: whole(
        split, number // 10, *more))
    path = sft.main(["--steps=40", "--cooldown=10", "--eval_every=20", "--name=short"])
    lines = [json.loads(line) for line in open("runs/short/metrics.jsonl")]
    assert len(lines) == 40 and lines[-1]["loss"] < 0.6 * lines[0]["loss"] and "accuracy" in lines[19]
    said = capsys.readouterr().out
    assert "sft: update 20, loss" in said and "sft: update 40, loss" in said
    assert f"the model is in {path}" in said
    model, tokenizer = checkpoints.load_model(path)
    assert tokenizer.eos_token_id in model.config.eos_ids


@pytest.mark.parametrize("kind", ["Qwen3", "Qwen2", "Llama"])
def test_an_autoregressive_checkpoint_becomes_a_block_diffusion_model(kind, tmp_path, monkeypatch):
    """From transformers' own checkpoint, whose tokenizer names a mask token, to a folder that decodes by
    blocks, on data with columns prompt and response, by random masks and by a trace."""
    import transformers
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(
        vocab_size=18, hidden_size=32, intermediate_size=48, num_hidden_layers=1, head_dim=8,
        num_attention_heads=4, num_key_value_heads=2, eos_token_id=1, pad_token_id=0)
    getattr(transformers, f"{kind}ForCausalLM")(config).save_pretrained("ar")
    sft.tiny_tokenizer().save_pretrained("ar")
    rows = [{"prompt": p.problem, "response": p.solution} for p in eval_math.arithmetic("train", 64)]
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, rows)))
    for flags in (["--views=random", "--weighted"], ["--views=trace"]):
        path = sft.main(["--model=ar", "--data=data.jsonl", "--steps=30", "--cooldown=5", "--lr=1e-2",
                         "--batch_size=32", "--max_new_tokens=20", "--overwrite", *flags])
        losses = [json.loads(line)["loss"] for line in open("runs/sft/metrics.jsonl")]
        assert losses[-1] < 0.75 * losses[0]
        model, tokenizer = checkpoints.load_model(path)
        assert model.config.mask_id == 2 and model.config.block_size == 4
        r, = rollout.generate(model, [tokenizer("12+3=").input_ids], max_new_tokens=8)
        assert 2 not in r.response and max(r.step_map) >= 2


def test_a_stopped_run_resumes_to_the_same_bits(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows = [json.dumps({"prompt": p.problem, "response": p.solution})
            for p in eval_math.arithmetic("train", 64)]
    (tmp_path / "data.jsonl").write_text("\n".join(rows))
    flags = ["--model", str(FIXTURES / "tiny"), "--data=data.jsonl", "--steps=6", "--cooldown=3", "--lr=1e-2",
             "--batch_size=24", "--max_new_tokens=20", "--save_every=2"]
    whole, _ = checkpoints.load_model(sft.main([*flags, "--name=whole"]))
    step, calls = sft.train_step, []

    def stop_at_the_fifth(*args):
        calls.append(args)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return step(*args)

    monkeypatch.setattr(sft, "train_step", stop_at_the_fifth)
    with pytest.raises(KeyboardInterrupt):
        sft.main([*flags, "--name=stopped"])
    resumed, _ = checkpoints.load_model(sft.main([*flags, "--name=stopped", "--resume"]))
    assert len(calls) == 5 + 2  # from step 4 on
    assert all(torch.equal(p, q) for p, q in zip(whole.parameters(), resumed.parameters()))
    assert ((tmp_path / "runs/whole/metrics.jsonl").read_text()
            == (tmp_path / "runs/stopped/metrics.jsonl").read_text())


@pytest.mark.parametrize("flags, message", [
    (["--model=x"], "--model needs --data"), (["--warmup=0"], "--warmup"),
    (["--stop_accuracy=0.5", "--model=x", "--data=y"], "--stop_accuracy needs --dev_data"),
])
def test_a_bad_flag_is_refused_by_name(flags, message, capsys):
    with pytest.raises(SystemExit):
        sft.parse_args(flags)
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("K", [4, 8])
def test_the_sft_loss_is_the_authors(K, authors_policy):
    """Theirs is divided by rows and padded length; ours by masked tokens, which are the fixture's."""
    case = next(c for c in fixture_cases("sdar_sft") if c["id"] == f"sft_semiar_b{K}")
    data = fixture_tensors(f"sdar_sft_semiar_b{K}")
    model, _ = checkpoints.load_model(FIXTURES / "authors/sdar", block_size=K)
    batch = [Rollout(p, r, len(r), [1] * len(r)) for p, r in zip(case["prompts"], case["responses"])]
    is_masked = {id(r): row[len(r.prompt):] for r, row in zip(batch, data["p_mask"].tolist())}

    def views(rollout, block, shrink, rng):
        hidden = [j for j in block if is_masked[id(rollout)][j]]
        return [(hidden, hidden)]

    rows = all_rows(batch, model.config, views=views)
    logp, _ = rollout.forward_rows(model, rows)
    theirs = torch.stack([data["logp"][n, len(batch[n].prompt) + j] for n, j in seen(rows)])
    torch.testing.assert_close(logp, theirs, atol=2e-4, rtol=0)
    loss = sft.sft_loss(logp, rows.targets.masked_share, case["n_rows"] * case["L1"], False)
    loss.backward()
    assert loss.item() == pytest.approx(case["loss"], abs=2e-5)
    for name, p in model.named_parameters():
        theirs = checkpoints.family_name(model.config, name)
        assert p.grad.norm().item() == pytest.approx(case["grad_norms"][theirs], rel=1e-4)
        if f"grad.{theirs}" in data:
            assert (p.grad - data[f"grad.{theirs}"]).norm() <= 1e-4 * p.grad.norm()


def test_a_warm_start_is_made_on_the_device_of_its_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sft, "main", lambda argv: argv)
    for chosen in ("cuda", "cpu", None):
        monkeypatch.setitem(parallel.CHOSEN, "device", chosen)
        assert f"--device={chosen or 'cpu'}" in sft.warm_start(0)
