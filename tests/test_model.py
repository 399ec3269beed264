"""Laws of the network: who sees whom, cache or no cache, the families' own numbers, checkpoints."""

import pytest
import torch
import transformers
from conftest import FIXTURES, fixture_tensors, random_model, random_prompts

import model as lm
from model import Layout


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
    position, document, block, view = (t[0].tolist() for t in layout)
    for i in range(len(position)):
        for j in range(len(position)):
            sees = document[i] == document[j]
            if view[j] == 0:  # clean text: earlier blocks, or the own block of a clean token
                sees = sees and (block[j] < block[i] or (block[j] == block[i] and view[i] == 0))
            else:  # a view: only itself
                sees = sees and view[i] == view[j] and block[i] == block[j]
            assert mask[i, j] == sees, (i, j)


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
    packed = model.head(model.hidden(both, Layout.clean(position, 4, False, document)))
    torch.testing.assert_close(packed[:, :8], model(torch.tensor([a])), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(packed[:, 8:20], model(torch.tensor([b])), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("is_tied", [False, True])
def test_block_size_1_equals_transformers_qwen3(is_tied):
    theirs_config = transformers.Qwen3Config(
        vocab_size=40, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, rope_theta=1e6, tie_word_embeddings=is_tied, attn_implementation="eager")
    torch.manual_seed(0)
    theirs = transformers.Qwen3ForCausalLM(theirs_config).eval()
    for p in theirs.parameters():
        p.data += 0.1 * torch.randn_like(p)
    config = lm.ModelConfig.from_dict({**theirs_config.to_dict(), "mask_token_id": 39}, block_size=1)
    model = lm.BlockDiffusionLM(config)
    state = theirs.state_dict()
    model.load_state_dict({name: state[lm.family_name(config, name)] for name in model.state_dict()})
    tokens = torch.randint(0, 40, (2, 17))
    torch.testing.assert_close(model(tokens), theirs(tokens).logits, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("K", [4, 8])
def test_sdar_logits_are_the_authors(K):
    model, tokenizer = lm.load_model(FIXTURES / "authors/sdar", block_size=K)
    data = fixture_tensors("sdar_logits")
    torch.testing.assert_close(model(data["input_ids"]), data[f"logits_b{K}"], atol=2e-4, rtol=0)
    assert tokenizer is None and model.config.eos_ids == (3,) and model.config.mask_id == 119


@pytest.mark.parametrize("name, logits", [("dream", "shifted_logits"), ("llada", "logits")])
def test_full_attention_logits_are_the_authors(name, logits):
    model, _ = lm.load_model(FIXTURES / "authors" / name)
    data = fixture_tensors(f"{name}_logits")
    torch.testing.assert_close(model(data["input_ids"]), data[logits], atol=2e-4, rtol=0)


def test_token_logprobs_are_log_softmax_without_the_mask_token():
    model = random_model()
    h, tokens = torch.randn(50, 32, requires_grad=True), torch.randint(3, 18, (50,))
    logits = model.head(h)
    logits = torch.cat([logits[:, :2], logits[:, 3:]], dim=1) / 0.7  # the mask token is number 2
    expected = logits.log_softmax(-1)
    picked = expected.gather(1, (tokens - 1)[:, None])[:, 0]
    logp, entropy = lm.token_logprobs(model, h, tokens, temperature=0.7, chunk=7)
    torch.testing.assert_close(logp, picked)
    torch.testing.assert_close(entropy, -(expected.exp() * expected).sum(-1))
    ours, = torch.autograd.grad(logp.sum(), h, retain_graph=True)
    torch.testing.assert_close(ours, torch.autograd.grad(picked.sum(), h)[0])


def test_log_probabilities_are_float32_whatever_the_weights_are():
    model = random_model().bfloat16()
    logp, entropy = lm.token_logprobs(model, torch.randn(3, 32).bfloat16(), torch.tensor([3, 4, 5]))
    assert logp.dtype == entropy.dtype == torch.float32


# ---------------------------------------------------------------------------------------------------- checkpoints


@pytest.mark.parametrize("kind", ["sdar", "qwen3", "dream", "llada"])
def test_save_then_load_gives_every_bit_back(kind, tmp_path):
    model = random_model(kind)
    lm.save_checkpoint(model, lm.tiny_tokenizer(), tmp_path / "one", max_shard_size="20KB")
    again, tokenizer = lm.load_model(tmp_path / "one")
    assert len(list((tmp_path / "one").glob("*.safetensors"))) > 1
    for (name, p), (_, q) in zip(model.named_parameters(), again.named_parameters(), strict=True):
        assert torch.equal(p, q), name
    assert tokenizer.encode("12+3=") == lm.tiny_tokenizer().encode("12+3=")
    assert (again.config.mask_id, again.config.block_size, again.config.eos_ids) == (2, 4, (1,))


def test_the_tiny_tokenizer_gives_its_text_back():
    tokenizer = lm.tiny_tokenizer()
    text = "09;11;09;\\boxed{919}"
    ids = tokenizer(text, add_special_tokens=False).input_ids
    assert len(ids) == 14 and tokenizer.decode([*ids, 1], skip_special_tokens=True) == text
    prompt = [{"role": "user", "content": "237+682=\nPlease reason step by step."}]
    assert tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True) == "237+682="


@pytest.mark.parametrize("change, message", [
    (dict(model_type="gpt2"), "unknown model_type 'gpt2'"),
    (dict(hidden_size=None), "lacks hidden_size"),
    (dict(mask_token_id=None), "names no mask token"),
    (dict(rope_scaling=dict(type="yarn", factor=4.0)), "rope type"),
    (dict(hidden_size=40), "has shape"),
    (dict(num_hidden_layers=3), "missing"),
    (dict(num_hidden_layers=1), "unexpected"),
])
def test_a_checkpoint_that_does_not_fit_says_why(change, message, tmp_path):
    import json
    lm.save_checkpoint(random_model(), None, tmp_path / "c")
    path = tmp_path / "c" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(ValueError, match=message):
        lm.load_model(tmp_path / "c")


def test_a_missing_checkpoint_says_so(tmp_path):
    with pytest.raises(FileNotFoundError, match="no checkpoint folder"):
        lm.load_model(tmp_path / "nothing")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="config.json"):
        lm.load_model(tmp_path / "empty")
