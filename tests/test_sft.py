"""Laws of supervised fine-tuning: which tokens are masked, how they are weighted, the authors' loss."""

import json
import os

import pytest
import torch
from conftest import (
    COMPUTES, FIXTURES, ROOT, all_rows, fixture_cases, fixture_tensors, random_model, random_prompts, seen)

import eval_math
import rollout
import sft
from eval_math import Problem
from plumbing import checkpoints, parallel, runs, tasks, tiny
from plumbing.prompts import encode_prompts
from rollout import PLAIN, Decoding, Rollout


@pytest.fixture(autouse=True)
def no_curves(monkeypatch):
    """Drawing takes a second, and other tests see it."""
    monkeypatch.setattr(runs.Run, "plot", lambda self: None)


def examples(lengths=((5, 7), (8, 12), (3, 9)), canvas=False):
    """Rollouts with responses of these lengths, each written in one step."""
    prompts = random_prompts([p for p, _ in lengths])
    responses = random_prompts([r for _, r in lengths], seed=1)
    return [Rollout(p, r, len(r), [1] * len(r), canvas=len(r) if canvas else 0)
            for p, r in zip(prompts, responses)]


# --------------------------------------------------------------------------------------------------- examples


def test_the_end_is_filled_with_eos_to_the_block_or_the_canvas():
    tokenizer = tiny.tiny_tokenizer()
    problems, _ = encode_prompts([Problem("12+3=", "15", "5;1;\\boxed{15}")], tokenizer)
    block, = sft.to_examples(problems, tokenizer, random_model().config, 16)
    assert (len(block.prompt) == 5 and block.response[-4:] == [17, 1, 1, 1]
            and (5 + len(block.response)) % 4 == 0)
    full, = sft.to_examples(problems, tokenizer, random_model("llada").config, 16)
    assert full.response[8:] == [1] * 8 and full.canvas == len(full.response) == 16
    assert sft.to_examples(problems, tokenizer, random_model().config, 8) == []


def test_a_canvas_is_filled_with_the_padding_token_where_that_ends_a_response_too():
    """LLaDA: <|eot_id|> ends a turn, and <|endoftext|>, its padding token, fills the canvas."""
    tokenizer = tiny.tiny_tokenizer()
    problems, _ = encode_prompts([Problem("12+3=", "15", "5;1;\\boxed{15}")], tokenizer)
    config = random_model("llada").config
    config.eos_ids = (1, 0)
    config.pad_id = 0
    full, = sft.to_examples(problems, tokenizer, config, 16)
    assert full.response[8:] == [1] + [0] * 7 and full.num_tokens == 9


def test_a_step_map_of_the_data_is_the_trace_and_the_end_comes_after_it():
    tokenizer = tiny.tiny_tokenizer()
    problems, _ = encode_prompts([Problem("12+3=", "15", "5;1;", step_map=[2, 1, 1, 2])], tokenizer)
    r, = sft.to_examples(problems, tokenizer, random_model().config, 16)
    assert r.step_map == [2, 1, 1, 2, 3, 4, 5] and r.num_tokens == 5
    problems[0].step_map = None  # left to right, one token a step
    r, = sft.to_examples(problems, tokenizer, random_model().config, 16)
    assert r.step_map == [1, 2, 3, 4, 5, 6, 7]
    problems[0].step_map = [1, 2]
    with pytest.raises(ValueError, match="2 steps in the step map of 4 tokens"):
        sft.to_examples(problems, tokenizer, random_model().config, 16)


# ------------------------------------------------------------------------------------ masks and their weights


@pytest.mark.parametrize("P, is_full", [(6, False), (6, True)])
def test_noise_masks_k_uniform_in_1_to_c_of_each_blocks_response_tokens(P, is_full):
    """Response tokens at positions 6..16: blocks with 2, 4, 4, 1 of them, or one response with 11."""
    config = random_model("llada" if is_full else "sdar").config
    views = {}
    for seed in range(2000):
        r = Rollout([3] * P, [4] * 11, 11, [1] * 11, canvas=11 if is_full else 0, seed=seed)
        for view in rollout.views_of(r, config, sft.noise_views):
            assert view.masked == view.targets == sorted(set(view.masked))
            views.setdefault(view.block, []).append(view)
    sizes = {0: 11} if is_full else {1: 2, 2: 4, 3: 4, 4: 1}
    assert views.keys() == sizes.keys()
    for block, count in sizes.items():
        k = torch.tensor([len(view.masked) for view in views[block]])
        shares = torch.bincount(k, minlength=count + 1)[1:] / 2000
        assert k.min() == 1 and k.max() == count
        assert (shares - 1 / count).abs().max() < 4 * (1 / count / 2000) ** 0.5 + 1e-6
        places = torch.tensor([j for view in views[block] for j in view.masked])
        each = torch.bincount(places - places.min()) / 2000
        assert len(each) == count and (each - (count + 1) / 2 / count).abs().max() < 0.05  # all alike
        assert all(view.masked_share == len(view.masked) / count for view in views[block])


def test_the_weighted_loss_is_unbiased_for_a_model_that_ignores_the_rest():
    """With weight 1 / t the expected sum over masked tokens is the sum over all tokens."""
    config, total = random_model(block_size=8).config, 0.0
    for seed in range(20000):
        r = Rollout([3] * 8, [4] * 8, 8, [1] * 8, seed=seed)
        view, = rollout.views_of(r, config, sft.noise_views)
        logp = -torch.tensor(view.masked).float() - 1
        total += sft.sft_loss(logp, torch.full_like(logp, view.masked_share), 8, True).item()
    assert total / 20000 == pytest.approx(4.5, abs=0.05)


@pytest.mark.parametrize("kind", ["sdar", "llada"])
def test_a_masked_token_is_predicted_from_its_block_and_the_clean_past(kind):
    model = random_model(kind)
    batch = examples(canvas=kind == "llada")
    rows = all_rows(batch, model.config, views=sft.noise_views)
    logp, _ = rollout.forward_rows(model, rows, PLAIN)
    masked, K = set(seen(rows)), model.config.block_size
    for value, (n, place) in zip(logp, seen(rows)):
        text, P = batch[n].prompt + batch[n].response, len(batch[n].prompt)
        at = P + place
        stop = len(text) if kind == "llada" else at // K * K + K
        start = 0 if kind == "llada" else at // K * K
        shown = [model.config.mask_id if i >= start and (n, i - P) in masked else token
                 for i, token in enumerate(text[:stop])]
        logits = model(torch.tensor([shown]))[0, at]
        logits[model.config.mask_id] = -torch.inf
        torch.testing.assert_close(value, logits.log_softmax(-1)[text[at]], atol=1e-5, rtol=1e-5)


# --------------------------------------------------------------------------------------------------- the loop


@pytest.mark.parametrize("is_weighted", [True, False])
def test_the_update_does_not_depend_on_micro_batches_nor_on_the_twins(is_weighted):
    results = []
    cases = [(PLAIN, 10_000)] + [(compute, most) for compute in COMPUTES.values() for most in (10, 60)]
    for compute, max_tokens in cases:
        model = random_model()
        learner = parallel.Learner(model, torch.optim.SGD(model.parameters(), lr=0.1))
        loss, norm = sft.train_step(learner, examples(), sft.noise_views, is_weighted,
                                    compute._replace(max_tokens=max_tokens))
        results.append((loss, norm, torch.cat([p.detach().flatten() for p in model.parameters()])))
    for loss, norm, weights in results[1:]:
        assert (loss == pytest.approx(results[0][0], rel=1e-5)
                and norm == pytest.approx(results[0][1], rel=1e-4))
        torch.testing.assert_close(weights, results[0][2], atol=1e-6, rtol=1e-5)


def test_the_learning_rate_rises_stays_and_falls_to_a_tenth():
    recipe = sft.Recipe(lr=1.0, warmup=30, cooldown=200)
    rates = [sft.learning_rate(step, recipe, 500) for step in range(701)]
    assert rates[0] == pytest.approx(1 / 30) and rates[29] == rates[499] == 1
    assert rates[599] == pytest.approx(0.55) and rates[699] == rates[700] == pytest.approx(0.1)
    assert rates[:30] == sorted(rates[:30]) and rates[499:] == sorted(rates[499:], reverse=True)


def test_every_epoch_has_an_order_and_masks_of_its_own():
    recipe = sft.Recipe(batch_size=4, seed=3)
    marked = [Rollout([3], [number], 1, [1]) for number in range(10)]
    epochs = [[sft.draw_batch(marked, step, recipe) for step in (start, start + 1)] for start in (0, 2)]
    for first, second in epochs:
        drawn = [r.response[0] for r in first + second]
        assert len(set(drawn)) == 8  # none twice; ten examples are two batches of four, and two are left over
    assert [r.response for r in epochs[0][0]] != [r.response for r in epochs[1][0]]
    assert len({r.seed for epoch in epochs for batch in epoch for r in batch}) == 16


def small_task(split, number, *more, whole=tasks.arithmetic):
    """A part of the embedded data: making and encoding all of them takes seconds."""
    return whole(split, number // 20, *more)


def test_a_few_steps_learn(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(tasks.EMBEDDED, "arithmetic", small_task)
    path = sft.main(["--steps=40", "--cooldown=10", "--eval_every=20", "--batch_size=32", "--name=short"])
    lines = [json.loads(line) for line in open("runs/short/metrics.jsonl")]
    assert len(lines) == 40 and lines[-1]["loss"] < 0.6 * lines[0]["loss"] and "accuracy" in lines[19]
    said = capsys.readouterr().out
    assert "sft: update 20, loss" in said and "sft: update 40, loss" in said
    assert f"the model is in {path}" in said
    model, tokenizer = checkpoints.load_model(path)
    assert tokenizer.eos_token_id in model.config.eos_ids


def test_accuracy_ends_the_training_after_its_cooldown(tmp_path, monkeypatch):
    """From a model that has the skill: the first evaluation starts the cooldown, and training ends with it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(tasks.EMBEDDED, "arithmetic", small_task)
    sft.main(["--model", str(FIXTURES / "tiny"), "--data=arithmetic", "--steps=30", "--warmup=1",
              "--cooldown=3", "--lr=1e-4", "--batch_size=8", "--eval_every=2", "--stop_accuracy=0.1"])
    lines = [json.loads(line) for line in open("runs/sft/metrics.jsonl")]
    assert lines[1]["accuracy"] >= 0.1  # after two updates; three more are the cooldown
    assert [line["lr"] for line in lines] == pytest.approx([1e-4, 1e-4, 7e-5, 4e-5, 1e-5])


@pytest.mark.parametrize("kind, how", [
    ("Qwen3", ["--views=random", "--weighted"]), ("Qwen3", ["--views=trace"]), ("Qwen2", []), ("Llama", [])])
def test_an_autoregressive_checkpoint_becomes_a_block_diffusion_model(kind, how, tmp_path, monkeypatch):
    """From transformers' own checkpoint, whose tokenizer names a mask token, to a folder that decodes by
    blocks, on data with columns prompt and response, by random masks and by a trace."""
    import transformers
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(
        vocab_size=18, hidden_size=32, intermediate_size=48, num_hidden_layers=1, head_dim=8,
        num_attention_heads=4, num_key_value_heads=2, eos_token_id=1, pad_token_id=0)
    getattr(transformers, f"{kind}ForCausalLM")(config).save_pretrained("ar")
    tiny.tiny_tokenizer().save_pretrained("ar")
    rows = [{"prompt": row["problem"], "response": row["solution"]} for row in tasks.arithmetic("train", 64)]
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, rows)))
    path = sft.main(["--model=ar", "--data=data.jsonl", "--steps=30", "--cooldown=5", "--lr=1e-2",
                     "--batch_size=32", "--max_new_tokens=20", *how])
    losses = [json.loads(line)["loss"] for line in open("runs/sft/metrics.jsonl")]
    assert losses[-1] < 0.75 * losses[0]
    model, tokenizer = checkpoints.load_model(path)
    assert model.config.mask_id == 2 and model.config.block_size == 4
    r = rollout.generate(model, tokenizer("12+3=").input_ids, Decoding(max_new_tokens=8))
    assert 2 not in r.response and max(r.step_map) >= 2


def test_a_stopped_run_resumes_to_the_same_bits(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows = [json.dumps({"prompt": row["problem"], "response": row["solution"]})
            for row in tasks.arithmetic("train", 64)]
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
    (["--model=x"], "--model x needs --data"), (["--warmup=0"], "--warmup"),
    (["--stop_accuracy=0.5", "--model=x", "--data=y"], "--stop_accuracy needs --dev_data"),
])
def test_a_bad_flag_is_refused_by_name(flags, message, capsys):
    with pytest.raises(SystemExit):
        sft.parse_args(flags)
    assert message in capsys.readouterr().err


# --------------------------------------------------------------------------------------- the authors' numbers


@pytest.mark.parametrize("K", [4, 8])
def test_the_sft_loss_is_the_authors(K, authors_policy):
    """Theirs is divided by rows and padded length; ours by masked tokens, which are the fixture's."""
    case = next(c for c in fixture_cases("sdar_sft") if c["id"] == f"sft_semiar_b{K}")
    data = fixture_tensors(f"sdar_sft_semiar_b{K}")
    model, _ = checkpoints.load_model(FIXTURES / "authors/sdar", block_size=K)
    batch = [Rollout(p, r, len(r), [1] * len(r)) for p, r in zip(case["prompts"], case["responses"])]
    is_masked = {id(r): row[len(r.prompt):] for r, row in zip(batch, data["p_mask"].tolist())}

    def views(rollout, block):
        masked = [j for j in block if is_masked[id(rollout)][j]]
        return [(masked, masked)]

    rows = all_rows(batch, model.config, views=views)
    logp, _ = rollout.forward_rows(model, rows, PLAIN)
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


@pytest.mark.skipif(not os.environ.get("SLOW"), reason="minutes: SLOW=1")
@pytest.mark.parametrize("name, lowest, highest", [("tiny-block", 0.45, 0.6), ("tiny-full", 0.2, 0.5)])
def test_the_command_in_assets_still_makes_a_start(name, lowest, highest, tmp_path, monkeypatch):
    """Neither too good nor too bad for reinforcement learning; another processor makes another start."""
    monkeypatch.chdir(tmp_path)
    line = next(line for line in open(ROOT / "assets/README.md") if line.rstrip().endswith(name))
    path = sft.main(line.split()[2:])
    found = eval_math.main(["--model", path, "--strategy", "dynamic"])
    assert lowest <= found["dynamic"]["accuracy"] <= highest
