"""Laws of the network: who sees whom, cache or no cache, the families' own numbers, checkpoints."""

import json
import os
import subprocess
import sys
import threading
import time
from functools import partial

import pytest
import torch
import transformers
from conftest import FIXTURES, ROOT, all_rows, fixture_tensors, random_model, random_prompts
from safetensors.torch import load_file, save_file

import model as lm
import rollout
import sft
import tracerl
import value
from model import Layout
from plumbing import checkpoints, cuda, packing, parallel


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
    attend = lm.attend_within(Layout.clean(position, 4, False, document))
    packed = model.head(model.hidden(both, position, attend))
    torch.testing.assert_close(packed[:, :8], model(torch.tensor([a])), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(packed[:, 8:20], model(torch.tensor([b])), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("is_tied", [False, True])
def test_block_size_1_equals_transformers_qwen3(is_tied):
    theirs_config = transformers.Qwen3Config(
        vocab_size=40, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, rope_theta=1e6, tie_word_embeddings=is_tied,
        attn_implementation="eager")
    torch.manual_seed(0)
    theirs = transformers.Qwen3ForCausalLM(theirs_config).eval()
    for p in theirs.parameters():
        p.data += 0.1 * torch.randn_like(p)
    config = checkpoints.read_config({**theirs_config.to_dict(), "mask_token_id": 39}, block_size=1)
    model = lm.BlockDiffusionLM(config)
    state = theirs.state_dict()
    model.load_state_dict({name: state[checkpoints.family_name(config, name)] for name in model.state_dict()})
    tokens = torch.randint(0, 40, (2, 17))
    torch.testing.assert_close(model(tokens), theirs(tokens).logits, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("K", [4, 8])
def test_sdar_logits_are_the_authors(K):
    model, tokenizer = checkpoints.load_model(FIXTURES / "authors/sdar", block_size=K)
    data = fixture_tensors("sdar_logits")
    torch.testing.assert_close(model(data["input_ids"]), data[f"logits_b{K}"], atol=2e-4, rtol=0)
    assert tokenizer is None and model.config.eos_ids == (3,) and model.config.mask_id == 119


@pytest.mark.parametrize("name, logits", [("dream", "shifted_logits"), ("llada", "logits")])
def test_full_attention_logits_are_the_authors(name, logits):
    model, _ = checkpoints.load_model(FIXTURES / "authors" / name)
    data = fixture_tensors(f"{name}_logits")
    torch.testing.assert_close(model(data["input_ids"]), data[logits], atol=2e-4, rtol=0)


def test_token_logprobs_are_log_softmax_without_the_mask_token():
    model = random_model()
    h, tokens = torch.randn(50, 32, requires_grad=True), torch.randint(3, 18, (50,))
    logits = model.head(h)
    logits = torch.cat([logits[:, :2], logits[:, 3:]], dim=1) / 0.7  # the mask token is number 2
    expected = logits.log_softmax(-1)
    picked = expected.gather(1, (tokens - 1)[:, None])[:, 0]
    logp, entropy = lm.token_logprobs(model, h, tokens, temperature=0.7, max_logits=7 * 18)
    torch.testing.assert_close(logp, picked)
    torch.testing.assert_close(entropy, -(expected.exp() * expected).sum(-1))
    ours, = torch.autograd.grad(logp.sum(), h, retain_graph=True)
    torch.testing.assert_close(ours, torch.autograd.grad(picked.sum(), h)[0])


def test_log_probabilities_are_float32_whatever_the_weights_are():
    """Not only in type: bfloat16 logits of this size would be rounded to multiples of 0.125."""
    model = random_model().bfloat16()
    model.head.weight.data *= 20
    h, tokens = torch.randn(300, 32).bfloat16(), torch.randint(3, 18, (300,))
    logp, entropy = lm.token_logprobs(model, h.requires_grad_(), tokens, max_logits=7 * 18)
    assert logp.dtype == entropy.dtype == lm.head_logits(model, h).dtype == torch.float32
    exact = (h.double() @ model.head.weight.double().T).index_fill(1, torch.tensor([2]), -torch.inf)
    exact = exact.log_softmax(-1).gather(1, tokens[:, None])[:, 0]
    assert (logp - exact).abs().max() < 1e-4 * exact.abs().max()
    logp.sum().backward()
    p = (h.double() @ model.head.weight.double().T).index_fill(1, torch.tensor([2]), -torch.inf).softmax(-1)
    gradient = (torch.nn.functional.one_hot(tokens, 18) - p).T @ h.double()
    assert (model.head.weight.grad - gradient).norm() < 0.01 * gradient.norm()


# ------------------------------------------------------------------------------------------------ checkpoints


@pytest.mark.parametrize("kind", ["sdar", "qwen3", "dream", "llada"])
def test_save_then_load_gives_every_bit_back(kind, tmp_path):
    model = random_model(kind)
    checkpoints.save_checkpoint(model, sft.tiny_tokenizer(), tmp_path / "one", max_shard_size="20KB")
    again, tokenizer = checkpoints.load_model(tmp_path / "one")
    assert len(list((tmp_path / "one").glob("*.safetensors"))) > 1
    for (name, p), (_, q) in zip(model.named_parameters(), again.named_parameters(), strict=True):
        assert torch.equal(p, q), name
    assert tokenizer.encode("12+3=") == sft.tiny_tokenizer().encode("12+3=")
    assert (again.config.mask_id, again.config.block_size, again.config.eos_ids) == (2, 4, (1,))
    source = json.loads((tmp_path / "one/config.json").read_text())
    (tmp_path / "one/config.json").write_text(json.dumps(source | dict(pad_token_id=None)))
    (tmp_path / "one/generation_config.json").write_text('{"eos_token_id": [3], "pad_token_id": 7}')
    config = checkpoints.find_checkpoint(tmp_path / "one")[1]
    assert config.eos_ids[-1] == 3 and config.pad_id == 7


def test_the_tiny_tokenizer_gives_its_text_back():
    tokenizer = sft.tiny_tokenizer()
    text = "090;111;090;\\boxed{919}"
    ids = tokenizer(text, add_special_tokens=False).input_ids
    assert len(ids) == 17 and tokenizer.decode([*ids, 1], skip_special_tokens=True) == text
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
    checkpoints.save_checkpoint(random_model(), None, tmp_path / "c")
    path = tmp_path / "c" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(ValueError, match=message):
        checkpoints.load_model(tmp_path / "c")


def test_a_missing_checkpoint_says_so(tmp_path):
    with pytest.raises(FileNotFoundError, match="no checkpoint folder"):
        checkpoints.load_model(tmp_path / "nothing")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="config.json"):
        checkpoints.load_model(tmp_path / "empty")


def test_transformers_own_qwen3_loads_what_we_save(tmp_path):
    model = random_model("sdar", block_size=1)
    checkpoints.save_checkpoint(model, None, tmp_path / "c")
    config = transformers.Qwen3Config(**{k: v for k, v in model.config.source.items() if k != "model_type"})
    theirs = transformers.Qwen3ForCausalLM.from_pretrained(tmp_path / "c", config=config, dtype=torch.float32)
    tokens = torch.tensor(random_prompts([12]))
    torch.testing.assert_close(theirs(tokens).logits, model(tokens), atol=1e-4, rtol=1e-4)


def test_a_qwen3_checkpoint_without_a_mask_token_gets_a_row_for_one(tmp_path):
    torch.manual_seed(0)
    config = transformers.Qwen3Config(
        vocab_size=18, hidden_size=32, intermediate_size=48, num_hidden_layers=1, head_dim=8,
        num_attention_heads=4, num_key_value_heads=2, eos_token_id=1)
    theirs = transformers.Qwen3ForCausalLM(config)
    theirs.save_pretrained(tmp_path / "ar")
    model, _ = checkpoints.load_model(tmp_path / "ar", block_size=1)
    assert model.config.mask_id == 18 and model.config.vocab_size == 19 and model.config.eos_ids == (1,)
    torch.testing.assert_close(model.embed.weight[18], theirs.model.embed_tokens.weight.mean(0))
    tokens = torch.tensor(random_prompts([9]))
    torch.testing.assert_close(model(tokens)[..., :18], theirs(tokens).logits, atol=1e-4, rtol=1e-4)
    checkpoints.save_checkpoint(model, None, tmp_path / "again")
    again, _ = checkpoints.load_model(tmp_path / "again")
    assert (again.config.mask_id == 18
            and all(torch.equal(p, q) for p, q in zip(model.parameters(), again.parameters())))


@pytest.mark.parametrize("family", ["dream", "sdar"])
def test_a_tokenizer_that_names_remote_code_loads_as_qwen2s(family, tmp_path):
    """Dream's and SDAR's folders name a tokenizer class of their own; it is Qwen2's, and no code is run."""
    import json

    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    checkpoints.save_checkpoint(random_model(family), None, tmp_path / "c")
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.train_from_iterator(["so the answer is 12"] * 9, trainers.BpeTrainer(
        vocab_size=300, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    backend.model.save(str(tmp_path / "c"))
    added = {str(300 + i): dict(content=text, special=True, lstrip=False, rstrip=False,
                                normalized=False, single_word=False)
             for i, text in enumerate(("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|mask|>"))}
    (tmp_path / "c/tokenizer_config.json").write_text(json.dumps(dict(
        tokenizer_class="DreamTokenizer",
        auto_map=dict(AutoTokenizer=["tokenization_dream.DreamTokenizer", None]), added_tokens_decoder=added,
        eos_token="<|endoftext|>", pad_token="<|endoftext|>", mask_token="<|mask|>",
        chat_template="{% for m in messages %}<|im_start|>{{ m['content'] }}<|im_end|>\n{% endfor %}")))
    model, tokenizer = checkpoints.load_model(tmp_path / "c")
    ids = tokenizer("<|im_start|>so the answer", add_special_tokens=False).input_ids
    assert (tokenizer.decode(ids) == "<|im_start|>so the answer"
            and ids[0] == tokenizer.convert_tokens_to_ids("<|im_start|>"))
    assert set(model.config.eos_ids) == {1, *tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])}
    checkpoints.save_checkpoint(model, tokenizer, tmp_path / "again")
    _, again = checkpoints.load_model(tmp_path / "again")
    assert again("<|im_start|>so the answer", add_special_tokens=False).input_ids == ids


def test_published_configurations_are_understood():
    """The fields of the published config.json files that matter here."""
    sdar = checkpoints.read_config(dict(
        model_type="sdar", vocab_size=151936, hidden_size=2560, num_hidden_layers=36, num_attention_heads=32,
        head_dim=128, num_key_value_heads=8, intermediate_size=9728, rope_theta=1000000,
        tie_word_embeddings=False, eos_token_id=151643))
    assert (sdar.mask_id, sdar.block_size, sdar.is_full, sdar.head_dim) == (151669, 4, False, 128)
    dream = checkpoints.read_config(dict(
        model_type="Dream", vocab_size=152064, hidden_size=3584, num_hidden_layers=28, num_attention_heads=28,
        mask_token_id=151666, num_key_value_heads=4, intermediate_size=18944, rope_theta=1000000.0,
        tie_word_embeddings=False, eos_token_id=151643))
    assert (dream.mask_id, dream.block_size, dream.is_full, dream.head_dim) == (151666, 32, True, 128)
    assert dream.shifts_logits and dream.has_qkv_bias and not dream.has_qk_norm
    llada = checkpoints.read_config(dict(
        model_type="llada", vocab_size=126464, embedding_size=126464, d_model=4096, n_layers=32, n_heads=32,
        n_kv_heads=32, mlp_hidden_size=12288, rope_theta=500000.0, weight_tying=False,
        mask_token_id=126336, eos_token_id=126081))
    assert (llada.mask_id, llada.rope_theta, llada.num_kv_heads, llada.eos_ids) == (
        126336, 5e5, 32, (126081,))
    new = checkpoints.read_config(
        {**sdar.source, "rope_parameters": dict(rope_type="default", rope_theta=123.0)})
    assert new.rope_theta == 123.0


LOAD = """
import sys, threading, time
sys.path.insert(0, sys.argv[1])
import torch
from plumbing import checkpoints
def anonymous():
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) * 1024
checkpoints.load_model(sys.argv[3], device="cpu")  # what the libraries set up once
start, peak, running = anonymous(), 0, True
def watch():
    global peak
    while running:
        peak = max(peak, anonymous())
        time.sleep(0.002)
thread = threading.Thread(target=watch)
thread.start()
model, _ = checkpoints.load_model(sys.argv[2], device="cpu")
running = False
thread.join()
size = sum(p.numel() * p.element_size() for p in model.parameters())
print((max(peak, anonymous()) - start) / size)
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="reads Linux memory figures")
def test_loading_never_holds_a_second_copy(tmp_path):
    """Of TEST_LOAD_MILLIONS million parameters in bfloat16 (default 60; the smallest real model has 500)."""
    millions = int(os.environ.get("TEST_LOAD_MILLIONS", 60))
    layers = max(1, millions // 15)
    with torch.device("meta"):
        shape = lm.BlockDiffusionLM(checkpoints.read_config(dict(
            model_type="sdar", vocab_size=8000, hidden_size=1024, num_hidden_layers=layers,
            num_attention_heads=16, head_dim=64, num_key_value_heads=8, intermediate_size=3072,
            mask_token_id=7999, eos_token_id=1, tie_word_embeddings=True)))
    model = shape.to_empty(device="cpu").bfloat16()
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(0.01)
    checkpoints.save_checkpoint(model, None, tmp_path / "big", max_shard_size="50MB")
    done = subprocess.run([sys.executable, "-c", LOAD, str(ROOT), str(tmp_path / "big"),
                           str(FIXTURES / "authors/sdar")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 1.3


# ------------------------------------------------------------------------------------------- the fast paths


def rows_of_views(model, number=5, multiple=None):
    rollouts = rollout.generate(
        model, random_prompts(range(2, 2 + number)), max_new_tokens=14, threshold=0.4, eos_ids=(1,))
    return all_rows(rollouts, model.config, multiple=multiple)


@pytest.mark.parametrize("kind", ["sdar", "dream"])
@torch.no_grad()
def test_flex_attention_sees_what_the_dense_mask_shows(kind):
    """The GPU's attention, run without its compiler: packed rows, padding, grouped heads."""
    model = random_model(kind)
    rows = rows_of_views(model, multiple=128)
    assert rows.tokens.shape[1] % 128 == 0 and (rows.layout.document == -1).any()
    is_text = (rows.layout.document >= 0)[..., None]
    attends = [partial(lm.masked_attention, mask=mask(rows.layout))
               for mask in (lm.dense_mask, lm.block_mask)]
    dense, flex = (model.hidden(rows.tokens, rows.layout.position, attend) for attend in attends)
    torch.testing.assert_close(flex * is_text, dense * is_text, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", ["sdar", "dream"])
def test_tiles_see_what_the_dense_mask_shows(kind):
    numbers = []
    for is_tiled in (False, True):
        model = random_model(kind)
        rows = rows_of_views(model)
        tiles = lm.tile_mask(rows.layout, size=16)
        attend = partial(lm.masked_attention, mask=tiles if is_tiled else lm.dense_mask(rows.layout))
        h = model.hidden(rows.tokens, rows.layout.position, attend).flatten(0, 1)[rows.targets.logit_index]
        h.square().sum().backward()
        numbers.append([h, *(p.grad for p in model.layers.parameters())])
    for ours, theirs in zip(*numbers):
        torch.testing.assert_close(ours, theirs, atol=1e-4 * float(theirs.detach().abs().max()), rtol=1e-4)
    T = rows.tokens.shape[1]
    if kind == "sdar":  # most of a long row is never touched
        assert sum(part.shape[2] * len(keys) for _, keys, part in tiles) < 0.8 * T**2


def test_block_masks_are_traced_once_for_each_length():
    """What torch.compile meets on a GPU, with its backend left out: no graph break, no second compilation for
    other rows of the same length."""
    rows = [rows_of_views(random_model(seed=seed), multiple=1024).layout for seed in range(2)]
    created, create_block_mask = [], lm.create_block_mask

    def remember(rule, *sizes, device):
        created.append(rule)
        return create_block_mask(rule, *sizes, device=device)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lm, "create_block_mask", remember)
        plain = [lm.block_mask(layout) for layout in rows]
    compiled = torch.compile(create_block_mask, backend="aot_eager", fullgraph=True, dynamic=False)
    T = rows[0].block.shape[1]
    for rule, mask, stance in zip(created, plain, ("default", "fail_on_recompile")):
        with torch.compiler.set_stance(stance):
            again = compiled(rule, 1, None, T, T, device=torch.device("cpu"))
        assert torch.equal(again.kv_num_blocks, mask.kv_num_blocks)


def test_computing_activations_again_changes_no_gradient():
    gradients = []
    for recomputes in (False, True):
        model = random_model()
        for layer in model.layers:
            layer.has_gradient_checkpointing = recomputes
        logp, _ = rollout.forward_rows(model, rows_of_views(model))
        logp.sum().backward()
        gradients.append([p.grad for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients))


def test_micro_batches_of_nothing_have_gradients_of_zero():
    """What a process without work goes along on: every parameter takes part, none moves."""
    model = random_model("sdar")
    rows = packing.collate([lm.Row([0], [0], [0], [1])], 0)
    assert len(rows.targets.token) == 0
    logp, _ = rollout.forward_rows(model, rows)
    logp.sum().backward()
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters())


# ----------------------------------------------------------------------------------------------------- LoRA


@pytest.mark.parametrize("kind", ["sdar", "dream", "llada"])
def test_adapters_start_as_nothing_and_are_all_that_learns(kind, tmp_path):
    model, plain = random_model(kind), random_model(kind)
    parallel.add_lora(model, 3)
    tokens = torch.randint(3, 18, (2, 12))
    assert torch.equal(model(tokens), plain(tokens))
    optimizer = parallel.make_optimizer(model, 0.1, (0.9, 0.95))
    for _ in range(2):
        model(tokens).square().sum().backward()
        assert {name.rpartition(".")[2] for name, p in model.named_parameters() if p.grad is not None} == {
            "lora_A", "lora_B"}
        parallel.optimizer_step(model, optimizer, 1.0)
    assert not torch.allclose(model(tokens), plain(tokens), atol=1e-2)
    checkpoints.save_checkpoint(model, None, tmp_path / "merged")
    merged, _ = checkpoints.load_model(tmp_path / "merged")
    torch.testing.assert_close(merged(tokens), model(tokens), atol=1e-4, rtol=1e-4)
    adapter = load_file(tmp_path / "merged/adapter/adapter_model.safetensors")
    settings = json.loads((tmp_path / "merged/adapter/adapter_config.json").read_text())
    assert len(adapter) == 2 * 7 * 2 and settings["r"] == 3 and settings["lora_alpha"] == 6
    name = checkpoints.family_name(model.config, "layers.1.down_proj.lora_A")
    assert torch.equal(adapter[f"base_model.model.{name}.weight"], model.layers[1].down_proj.lora_A)


def test_small_changes_of_adapters_outlive_a_bfloat16_trunk():
    """W = 1, where half a step of bfloat16 is 2e-3, and B A = 1e-4: doubled (alpha is 2), and all there."""
    state = lambda: {"x.weight": torch.ones(4, 4, dtype=torch.bfloat16),
                     "x.lora_A": torch.full((1, 4), 1e-2), "x.lora_B": torch.full((4, 1), 1e-2)}
    assert torch.equal(checkpoints.merge_lora(state(), 1)["x.weight"], state()["x.weight"])
    merged = checkpoints.merge_lora(state(), 1, torch.float32)["x.weight"]
    torch.testing.assert_close(merged, torch.full((4, 4), 1 + 2e-4), atol=1e-7, rtol=0)


def test_policy_and_value_model_share_the_frozen_trunk():
    policy = random_model()
    parallel.add_lora(policy, 2)
    critic = value.ValueModel(policy)
    for (name, p), q in zip(policy.layers.named_parameters(), critic.backbone.layers.parameters()):
        assert (p is q) == ("lora" not in name), name
    optimizer = parallel.make_optimizer(critic, 0.1, (0.9, 0.95))
    start = [p.clone() for p in policy.parameters()]
    rows = rows_of_views(policy)
    for _ in range(3):
        (critic(rows) - 1).square().sum().backward()
        parallel.optimizer_step(critic, optimizer, 1.0)
    assert critic(rows).abs().mean() > 0.1
    assert all(torch.equal(p, q) for p, q in zip(policy.parameters(), start))


# ------------------------------------------------------------------------------- checkpoints people can get


A2D = dict(vocab_size=18, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2,
           head_dim=8, intermediate_size=48, mask_token_id=2, eos_token_id=1, tie_word_embeddings=True)


@pytest.mark.parametrize("kind", ["a2d-qwen3", "a2d-qwen2"])
def test_converted_qwens_say_their_attention_by_name_or_are_asked(kind, tmp_path):
    read = lambda path, **more: checkpoints.read_config(dict(model_type=kind, **A2D), path=path, **more)
    assert not read("dllm-hub/Qwen3-0.6B-diffusion-bd3lm-v0.1").is_full
    assert read("dllm-hub/Qwen3-0.6B-diffusion-mdlm-v0.1/").is_full
    with pytest.raises(ValueError, match="give --attention"):
        read("models/mine")
    block, full = (read("models/mine", attention=attention) for attention in ("block", "full"))
    assert (block.is_full, block.block_size) == (False, 32) and full.is_full
    assert (block.has_qk_norm, block.has_qkv_bias) == ((True, False) if kind[-1] == "3" else (False, True))
    model = lm.BlockDiffusionLM(full)  # what is saved remembers it
    checkpoints.save_checkpoint(model, None, tmp_path / "c")
    assert checkpoints.load_model(tmp_path / "c")[0].config.is_full
    usual = {**A2D, "vocab_size": 151936, "mask_token_id": None}
    assert checkpoints.read_config(dict(model_type=kind, **usual), attention="full").mask_id == (
        151669 if kind[-1] == "3" else 151665)


def test_other_networks_under_known_names_are_refused_by_name():
    for change, message in (
            (dict(model_type="qwen3", architectures=["ReFusionForCausalLM"]), "is ReFusionForCausalLM"),
            (dict(model_type="qwen3", auto_map={"AutoModel": "modeling.X"}), "code of its own"),
            (dict(model_type="Fast_dLLM_Qwen"), "logits are shifted by one"),
            (dict(model_type="llada2_moe"), "a mixture of experts")):
        with pytest.raises(ValueError, match=message):
            checkpoints.read_config({**A2D, **change})
    with pytest.raises(ValueError, match="--attention full does not fit"):
        checkpoints.read_config({**A2D, "model_type": "sdar"}, attention="full")


def test_a_head_that_config_json_calls_tied_must_be_the_embedding(tmp_path):
    checkpoints.save_checkpoint(random_model(), None, tmp_path / "c")
    config = json.loads((tmp_path / "c/config.json").read_text())
    (tmp_path / "c/config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
    with pytest.raises(ValueError, match="lm_head.weight is another one: correct config.json"):
        checkpoints.load_model(tmp_path / "c")
    state = load_file(tmp_path / "c/model.safetensors")
    state["lm_head.weight"] = state["model.embed_tokens.weight"].clone()  # some checkpoints hold both
    save_file(state, tmp_path / "c/model.safetensors")
    model, _ = checkpoints.load_model(tmp_path / "c")
    assert model.head.weight is model.embed.weight


def test_a_plan_is_said_and_what_cannot_fit_is_refused_with_what_would(monkeypatch, capsys):
    config = checkpoints.read_config(dict(
        model_type="sdar", vocab_size=151936, hidden_size=2560, num_hidden_layers=36, num_attention_heads=32,
        head_dim=128, num_key_value_heads=8, intermediate_size=9728, tie_word_embeddings=False))
    flags = ["--model=JetLM/SDAR-4B-Chat", "--train_data=a", "--eval_data=b", "--dtype=bfloat16"]

    def plan(gib, *more):
        args = tracerl.parse_args([*flags, *more])
        monkeypatch.setattr(cuda, "free_bytes", lambda device: gib * 2**30)
        cuda.plan_memory(config, args, has_critic=False)
        return args.tokens_per_micro_batch

    assert plan(80, "--lora_rank=32") == 16384
    assert "plan: 4.41 billion parameters in bfloat16" in capsys.readouterr().out
    assert 1024 <= plan(18, "--lora_rank=32") < 16384  # what fits
    with pytest.raises(ValueError, match=r"training needs 7\d\.\d GiB .* try --lora_rank 32"):
        plan(60)
    with pytest.raises(ValueError, match="a smaller --tokens_per_micro_batch"):
        plan(18, "--lora_rank=32", "--tokens_per_micro_batch=99999")


def test_settings_of_the_compiler_hold_in_every_thread():
    seen = []
    lm.compiled(lm.rotate)
    threading.Thread(target=lambda: (lm.compiled(lm.rotate), seen.append(
        torch._dynamo.config.recompile_limit))).start()
    while not seen:
        time.sleep(0.01)
    assert seen == [64]


def test_a_fused_function_compiles_for_all_shapes_at_once():
    """What `fused` hands to the compiler on a GPU, without its backend."""
    for function in (lm.rotate, lm.gated):
        whole = torch.compile(function.__wrapped__, dynamic=True, fullgraph=True, backend="eager")
        for B, T in ((2, 4), (3, 8)):
            x = torch.randn(B, 2, T, 6)
            others = lm.rotary(torch.arange(T).expand(B, T), 6, 1e4) if function is lm.rotate else (x + 1,)
            assert torch.equal(whole(x, *others), function(x, *others))
