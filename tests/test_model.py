"""Laws of the network: who sees whom, cache or no cache, log-probabilities, adapters, what fits."""

import re

import pytest
import torch
from conftest import CPU, all_rows, decode, random_model, random_prompts

import model as lm
import rollout
import tracerl
import value
from model import KVCache, Layout, Row, attend_by_rule
from plumbing import checkpoints, memory, parallel
from rollout import PLAIN


def random_layout(seed, K=4, is_full=False):
    """A row of two documents and some padding, with clean text and several views of some blocks."""
    generator = torch.Generator().manual_seed(seed)
    tokens = []  # (position, document, block, view)
    for document, length in enumerate((11, 8)):
        if not is_full:
            tokens += [(p, document, p // K, 0) for p in range(length)]
        for view in range(1, 4):
            for block in range(1 if is_full else -(-length // K)):
                if torch.rand((), generator=generator) < 0.6:
                    span = range(length) if is_full else range(block * K, min(block * K + K, length))
                    tokens += [(p, document, block, view) for p in span]
    tokens += [(0, -1, 0, 0)] * 3
    return Layout(*torch.tensor(tokens).T[:, None])


@pytest.mark.parametrize("is_full", [False, True])
@pytest.mark.parametrize("seed", range(4))
def test_the_mask_is_the_rule_told_by_a_double_loop(seed, is_full):
    layout = random_layout(seed, is_full=is_full)
    mask = lm.dense_mask(layout)[0, 0]
    position, document, block, view = (numbers[0].tolist() for numbers in layout)
    for i in range(len(position)):
        for j in range(len(position)):
            sees = document[i] == document[j]
            if view[j] == 0:  # clean text: earlier blocks, or the own block of a clean token
                sees = sees and (block[j] < block[i] or (block[j] == block[i] and view[i] == 0))
            else:  # a view: only itself
                sees = sees and view[i] == view[j] and block[i] == block[j]
            assert mask[i, j] == sees, (i, j)


def test_the_mask_is_the_picture_on_top_of_model_py():
    """Twelve clean tokens and three views of the last block; an x is a token that is seen."""
    lines = lm.__doc__.splitlines()
    shown = "894+ 396= 101; ???? 1?1? 1?1;".split()
    top = next(number for number, line in enumerate(lines) if line.split() == shown)
    columns = [match.start() for match in re.finditer(r"\S", lines[top])]  # of the text, token by token
    tokens = []  # (position, document, block, view)
    told = []
    for line in lines[top + 1:top + 7]:
        text, block, view = re.match(r" +(\S{4})  block (\d) .* view (\d)", line).groups()
        assert text == shown[len(told) // 4]
        tokens += [(4 * int(block) + place, 0, int(block), int(view)) for place in range(4)]
        told += [[line[column] == "x" for column in columns]] * 4
    assert len(told) == len(columns) == 24
    assert lm.dense_mask(Layout(*torch.tensor(tokens).T[:, None]))[0, 0].tolist() == told


def test_block_size_1_is_causal_attention():
    position = torch.arange(9)[None]
    assert torch.equal(lm.dense_mask(Layout.clean(position, 1, False))[0, 0], torch.ones(9, 9).tril().bool())


@pytest.mark.parametrize("K", [1, 4, 8])
def test_a_later_block_never_changes_an_earlier_logit(K):
    model = random_model(block_size=K)
    tokens = torch.tensor(random_prompts([24]))
    changed = tokens.clone()
    changed[:, 16:] = torch.tensor(random_prompts([8], seed=1))
    before, after = model(tokens), model(changed)
    assert torch.equal(before[:, :16], after[:, :16])
    assert not torch.allclose(before[:, 16:], after[:, 16:])


def test_a_token_sees_its_whole_block():
    model = random_model(block_size=4)
    tokens = torch.tensor(random_prompts([8]))
    changed = tokens.clone()
    changed[0, 7] = 3 + (tokens[0, 7] - 2) % 15
    assert (model(tokens)[0, 4] - model(changed)[0, 4]).abs().max() > 1e-3


def test_the_network_does_not_know_how_its_rows_are_packed():
    """A document sharing a row with another, or with padding, has the logits it has alone."""
    model = random_model()
    a, b = random_prompts([8, 12])
    both = torch.tensor([a + b + [0, 0]])
    position = torch.tensor([[*range(8), *range(12), 0, 0]])
    document = torch.tensor([[0] * 8 + [1] * 12 + [-1] * 2])
    layout = Layout.clean(position, 4, False)._replace(document=document)
    packed = model.head(model.states(both, position, attend_by_rule(layout)))
    torch.testing.assert_close(packed[:, :8], model(torch.tensor([a])), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(packed[:, 8:20], model(torch.tensor([b])), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("K", [1, 4, 8])
@torch.no_grad()
def test_a_cache_gives_the_states_of_one_forward(K):
    """Block after block: what is read is not kept, what is appended is."""
    model = random_model(block_size=K)
    tokens = torch.tensor(random_prompts([24]))
    expected = model(tokens)
    cache = KVCache()
    logits_of = lambda tokens, attend: model.head(model.states(tokens, block, attend))
    for start in range(0, 24, K):
        block = torch.arange(start, start + K)[None]
        clean = tokens[:, start:start + K]
        noisy = torch.full_like(clean, model.config.mask_id)
        assert not torch.allclose(logits_of(noisy, cache.read), expected[:, start:start + K], atol=0.1)
        for attend in (cache.read, cache.read, cache.append):
            logits = logits_of(clean, attend)
            torch.testing.assert_close(logits, expected[:, start:start + K], atol=1e-5, rtol=1e-5)
        assert cache.keys[1].shape[2] == cache.values[1].shape[2] == start + K


# ----------------------------------------------------------------------------------------- log-probabilities


def test_token_logprobs_are_log_softmax_without_the_mask_token():
    model = random_model()
    states, tokens = torch.randn(50, 32, requires_grad=True), torch.randint(3, 18, (50,))
    for temperature in (0.7, 0):  # greedy decoding counts as temperature 1
        logits = model.head(states) / (temperature or 1)
        without_mask = torch.cat([logits[:, :2], logits[:, 3:]], dim=1)  # the mask token is number 2
        expected = without_mask.log_softmax(-1)
        picked = expected.gather(1, (tokens - 1)[:, None])[:, 0]
        logp, entropy = lm.token_logprobs(model, states, tokens, temperature)
        for ours, theirs in ((logp, picked), (entropy, -(expected.exp() * expected).sum(-1))):
            torch.testing.assert_close(ours, theirs)
            gradients = [torch.autograd.grad(x.sum(), states, retain_graph=True)[0] for x in (ours, theirs)]
            torch.testing.assert_close(*gradients)


def test_log_probabilities_are_float32_whatever_the_weights_are():
    """Not only in type: bfloat16 logits of this size would be rounded to multiples of 0.125."""
    model = random_model().bfloat16()
    model.head.weight.data *= 20
    states, tokens = torch.randn(300, 32).bfloat16(), torch.randint(3, 18, (300,))
    logp, entropy = lm.token_logprobs(model, states.requires_grad_(), tokens)
    assert logp.dtype == entropy.dtype == lm.policy_logits(model, states).dtype == torch.float32
    logits = (states.double() @ model.head.weight.double().T).index_fill(1, torch.tensor([2]), -torch.inf)
    exact = logits.log_softmax(-1).gather(1, tokens[:, None])[:, 0]
    assert (logp - exact).abs().max() < 1e-4 * exact.abs().max()
    logp.sum().backward()
    gradient = (torch.nn.functional.one_hot(tokens, 18) - logits.softmax(-1)).T @ states.double()
    assert (model.head.weight.grad - gradient).norm() < 0.01 * gradient.norm()


def rows_of_views(model):
    """A micro-batch of the traces of a few responses."""
    rollouts = decode(model, random_prompts(range(2, 7)), max_new_tokens=14, threshold=0.4)
    return all_rows(rollouts, model.config)


def test_computing_activations_again_changes_no_gradient():
    gradients = []
    for recomputes in (False, True):
        model = random_model()
        for layer in model.layers:
            layer.has_gradient_checkpointing = recomputes
        logp, _ = rollout.forward_rows(model, rows_of_views(model), PLAIN)
        logp.sum().backward()
        gradients.append([p.grad for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients))


def test_micro_batches_of_nothing_have_gradients_of_zero():
    """What a process without work goes along on: every parameter takes part, none moves."""
    model = random_model("sdar")
    rows = lm.pad([Row([0], [0], [0], [1])], 0, CPU)
    assert len(rows.targets.token) == 0
    logp, _ = rollout.forward_rows(model, rows, PLAIN)
    logp.sum().backward()
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters())


# ----------------------------------------------------------------------------------------------------- LoRA


@pytest.mark.parametrize("kind", ["sdar", "dream", "llada"])
def test_adapters_start_as_nothing_and_are_all_that_learns(kind, tmp_path):
    model, plain = random_model(kind), random_model(kind)
    parallel.add_lora(model, 3)
    tokens = torch.randint(3, 18, (2, 12))
    assert torch.equal(model(tokens), plain(tokens))
    learner = parallel.make_learner(model, 0.1, (0.9, 0.95))
    for _ in range(2):
        model(tokens).square().sum().backward()
        assert {name.rpartition(".")[2] for name, p in model.named_parameters() if p.grad is not None} == {
            "lora_A", "lora_B"}
        parallel.optimizer_step(learner)
    assert not torch.allclose(model(tokens), plain(tokens), atol=1e-2)
    checkpoints.save_checkpoint(model, None, tmp_path / "merged")
    merged, _ = checkpoints.load_model(tmp_path / "merged")
    torch.testing.assert_close(merged(tokens), model(tokens), atol=1e-4, rtol=1e-4)


def test_policy_and_value_model_share_the_frozen_trunk():
    policy = random_model()
    parallel.add_lora(policy, 2)
    value_model = value.ValueModel(policy)
    for (name, p), q in zip(policy.layers.named_parameters(), value_model.backbone.layers.parameters()):
        assert (p is q) == ("lora" not in name), name
    learner = parallel.make_learner(value_model, 0.1, (0.9, 0.95))
    start = [p.clone() for p in policy.parameters()]
    rows = rows_of_views(policy)
    for _ in range(3):
        (value_model(rows, PLAIN) - 1).square().sum().backward()
        parallel.optimizer_step(learner)
    assert value_model(rows, PLAIN).abs().mean() > 0.1
    assert all(torch.equal(p, q) for p, q in zip(policy.parameters(), start))


# ------------------------------------------------------------------------------------------- what fits


def test_a_plan_is_said_and_what_cannot_fit_is_refused_with_what_would(monkeypatch, capsys):
    config = checkpoints.read_config(dict(
        model_type="sdar", vocab_size=151936, hidden_size=2560, num_hidden_layers=36, num_attention_heads=32,
        head_dim=128, num_key_value_heads=8, intermediate_size=9728, tie_word_embeddings=False))
    usual = ["--model=JetLM/SDAR-4B-Chat", "--train_data=a", "--eval_data=b", "--dtype=bfloat16"]

    def plan(gib, *more):
        """Tokens per micro-batch on a machine with so many GiB."""
        monkeypatch.setattr(memory, "free_bytes", lambda device: gib * 2**30)
        return memory.plan(checkpoints.empty_model(config), tracerl.parse_args([*usual, *more]), num_models=1)

    assert plan(80, "--lora_rank=32") == 16384
    assert "plan: 4.41 billion parameters in bfloat16" in capsys.readouterr().out
    assert 1024 <= plan(18, "--lora_rank=32") < 16384  # what fits
    with pytest.raises(ValueError, match=r"training needs 7\d\.\d GiB .* try --lora_rank 32"):
        plan(60)
    with pytest.raises(ValueError, match="a smaller --tokens_per_micro_batch, more GPUs"):
        plan(18, "--lora_rank=32", "--tokens_per_micro_batch=99999")
