"""Laws of supervised fine-tuning: which tokens are hidden, how they are weighted, the authors' loss."""

import json

import pytest
import torch
from conftest import FIXTURES, fixture_cases, fixture_tensors, random_model, random_prompts

import eval_math
import model as lm
import rollout
import sft
from rollout import Rollout


def examples(lengths=((5, 7), (8, 12), (3, 9)), canvas=False):
    prompts = random_prompts([p for p, _ in lengths])
    responses = random_prompts([r for _, r in lengths], seed=1)
    return [Rollout(p, r, len(r), [1] * len(r), canvas=len(r) if canvas else 0)
            for p, r in zip(prompts, responses)]


@pytest.mark.parametrize("span", [4, 20])
def test_noise_hides_k_uniform_in_1_to_c_of_each_spans_response_tokens(span):
    is_response = torch.zeros(2000, 20, dtype=torch.bool)
    is_response[:, 6:17] = True  # spans with 0, 2, 4, 4, 1 response tokens, or one with 11
    is_masked, weight = sft.sft_noise(is_response, span, torch.Generator().manual_seed(0))
    assert not (is_masked & ~is_response).any()
    for start in range(0, 20, span):
        inside = slice(start, start + span)
        count, k = int(is_response[0, inside].sum()), is_masked[:, inside].sum(-1)
        if count == 0:
            assert not k.any()
            continue
        shares = torch.bincount(k, minlength=count + 1)[1:] / 2000
        assert (k.min() == 1 and k.max() == count
                and (shares - 1 / count).abs().max() < 4 * (1 / count / 2000) ** 0.5 + 1e-6)
        each = is_masked[:, inside][is_response[:, inside]].view(2000, count).float().mean(0)
        assert (each - (count + 1) / 2 / count).abs().max() < 0.05  # every token as often as any other
        assert torch.allclose(weight[:, inside], (count / k)[:, None].expand(-1, span))


def test_the_weighted_loss_is_unbiased_for_a_model_that_ignores_the_rest():
    """With weight 1 / t the expected sum over masked tokens is the sum over all tokens."""
    is_response = torch.ones(20000, 8, dtype=torch.bool)
    is_masked, weight = sft.sft_noise(is_response, 8, torch.Generator().manual_seed(0))
    logp = -torch.arange(1.0, 9.0).expand(20000, -1)
    loss = sft.sft_loss(logp[is_masked], weight[is_masked], is_response.sum())
    assert loss.item() == pytest.approx(4.5, abs=0.05)


@pytest.mark.parametrize("kind", ["sdar", "llada"])
def test_a_hidden_token_is_predicted_from_its_block_and_the_clean_past(kind):
    model = random_model(kind)
    batch = examples(canvas=kind == "llada")
    rows, _ = sft.sft_rows(batch, model.config, torch.Generator().manual_seed(3))
    logp, _ = rollout.forward_rows(model, rows)
    hidden = {(n, p) for n, p in zip(rows.owner.tolist(), rows.place.tolist())}
    K = model.config.block_size
    for value, n, place in zip(logp, rows.owner.tolist(), rows.place.tolist()):
        text, P = batch[n].prompt + batch[n].response, len(batch[n].prompt)
        at = P + place
        stop = len(text) if kind == "llada" else at // K * K + K
        start = 0 if kind == "llada" else at // K * K
        shown = [model.config.mask_id if i >= start and (n, i - P) in hidden else token
                 for i, token in enumerate(text[:stop])]
        logits = lm.policy_logits(model(torch.tensor([shown])), model.config.mask_id)[0, at]
        torch.testing.assert_close(value, logits.log_softmax(-1)[text[at]], atol=1e-5, rtol=1e-5)


def test_the_end_is_filled_with_eos_to_the_block_or_the_canvas():
    tokenizer = lm.tiny_tokenizer()
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
        loss, norm = sft.train_step(
            model, optimizer, examples(), seed=1, is_weighted=True, max_tokens=max_tokens)
        results.append((loss, norm, torch.cat([p.detach().flatten() for p in model.parameters()])))
    for loss, norm, weights in results[1:]:
        assert (loss == pytest.approx(results[0][0], rel=1e-5)
                and norm == pytest.approx(results[0][1], rel=1e-4))
        torch.testing.assert_close(weights, results[0][2], atol=1e-6, rtol=1e-5)


def test_a_few_steps_learn(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = sft.main(["--steps=40", "--cooldown=10", "--eval_every=20", "--run=short"])
    lines = [json.loads(line) for line in open("runs/short/metrics.jsonl")]
    assert len(lines) == 40 and lines[-1]["loss"] < 0.6 * lines[0]["loss"] and "accuracy" in lines[19]
    model, tokenizer = lm.load_model(path)
    assert tokenizer.eos_token_id in model.config.eos_ids


def test_an_autoregressive_qwen3_becomes_a_block_diffusion_model(tmp_path, monkeypatch):
    """From transformers' own Qwen3 without a mask token to a folder that decodes by blocks, on data with
    columns prompt and response, by random masks and by a trace."""
    import transformers
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    transformers.Qwen3ForCausalLM(transformers.Qwen3Config(
        vocab_size=18, hidden_size=32, intermediate_size=48, num_hidden_layers=1, head_dim=8,
        num_attention_heads=4, num_key_value_heads=2, eos_token_id=1, pad_token_id=0)).save_pretrained("ar")
    lm.tiny_tokenizer().save_pretrained("ar")
    rows = [{"prompt": p.problem, "response": p.solution} for p in eval_math.arithmetic("train", 64)]
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, rows)))
    for objective in ("random", "trace"):
        path = sft.main(["--model=ar", "--data=data.jsonl", "--steps=30", "--cooldown=5", "--lr=1e-2",
                         "--batch_size=32", f"--objective={objective}", "--max_new_tokens=20", "--weighted"])
        losses = [json.loads(line)["loss"] for line in open("runs/sft/metrics.jsonl")]
        assert losses[-1] < 0.7 * losses[0]
        model, tokenizer = lm.load_model(path)
        assert model.config.mask_id == 18 and model.config.block_size == 4
        r, = rollout.generate(model, [tokenizer("12+3=").input_ids], max_new_tokens=8)
        assert 18 not in r.response and max(r.step_map) >= 2


def test_a_stopped_run_resumes_to_the_same_bits(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows = [json.dumps({"prompt": p.problem, "response": p.solution})
            for p in eval_math.arithmetic("train", 64)]
    (tmp_path / "data.jsonl").write_text("\n".join(rows))
    flags = ["--model", str(FIXTURES / "tiny"), "--data=data.jsonl", "--steps=6", "--cooldown=3", "--lr=1e-2",
             "--batch_size=24", "--max_new_tokens=20", "--save_every=2"]
    whole, _ = lm.load_model(sft.main([*flags, "--run=whole"]))
    step, calls = sft.train_step, []

    def stop_at_the_fifth(*args):
        calls.append(args)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return step(*args)

    monkeypatch.setattr(sft, "train_step", stop_at_the_fifth)
    with pytest.raises(KeyboardInterrupt):
        sft.main([*flags, "--run=stopped"])
    resumed, _ = lm.load_model(sft.main([*flags, "--run=stopped", "--resume"]))
    assert len(calls) == 5 + 2  # from step 4 on
    assert all(torch.equal(p, q) for p, q in zip(whole.parameters(), resumed.parameters()))
    assert ((tmp_path / "runs/whole/metrics.jsonl").read_text()
            == (tmp_path / "runs/stopped/metrics.jsonl").read_text())


@pytest.mark.parametrize("flags, message", [
    (["--model=x"], "--model needs --data"), (["--warmup=0"], "--warmup"),
    (["--stop_accuracy=0.5", "--model=x", "--data=y"], "development problems"),
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
    model, _ = lm.load_model(FIXTURES / "authors/sdar", block_size=K)
    batch = [Rollout(p, r, len(r), [1] * len(r)) for p, r in zip(case["prompts"], case["responses"])]
    tokens, _, lengths = rollout.canvases(batch, model.config)
    prompts = torch.tensor([len(p) for p in case["prompts"]])
    is_masked = data["p_mask"][:, None]
    rows = rollout.build_rows(tokens, lengths, prompts, is_masked, is_masked, model.config)
    logp, _ = rollout.forward_rows(model, rows)
    torch.testing.assert_close(
        logp, data["logp"][rows.owner, rows.place + prompts[rows.owner]], atol=2e-4, rtol=0)
    loss = sft.sft_loss(logp, torch.ones_like(logp), case["n_rows"] * case["L1"])
    loss.backward()
    assert loss.item() == pytest.approx(case["loss"], abs=2e-5)
    for name, p in model.named_parameters():
        theirs = lm.family_name(model.config, name)
        assert p.grad.norm().item() == pytest.approx(case["grad_norms"][theirs], rel=1e-4)
        if f"grad.{theirs}" in data:
            assert (p.grad - data[f"grad.{theirs}"]).norm() <= 1e-4 * p.grad.norm()
