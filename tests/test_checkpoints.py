"""Laws of checkpoints: every family's own logits, what is refused and why, and what a saved folder gives back.

    SLOW=1 pytest tests/test_checkpoints.py       # also: how much memory loading takes; transformers 4.57, which
                                                  # is installed for it, reads what is saved
"""

import json
import multiprocessing
import os
import shutil
import subprocess
import sys
import traceback

import pytest
import torch
import torch.distributed as dist
import transformers
from conftest import FIXTURES, ROOT, fixture_tensors, random_model, random_prompts, side_environment
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

import model as lm
import value
from plumbing import checkpoints, parallel, tiny

TINY = FIXTURES / "tiny"
SIZES = dict(vocab_size=40, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
             num_key_value_heads=2, head_dim=8, eos_token_id=1, pad_token_id=0)
# The fields that every family of Qwen's spelling has, for read_config.
FIELDS = dict(vocab_size=18, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2,
              head_dim=8, intermediate_size=48, mask_token_id=2, eos_token_id=1, tie_word_embeddings=True)


def edit(path, **changes):
    """Changes fields of a JSON file; None takes a field out."""
    fields = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({name: field for name, field in fields.items() if field is not None}))


def byte_tokenizer(folder, special=(), **settings):
    """Writes Qwen's kind of tokenizer in its older form: vocab.json, merges.txt and tokenizer_config.json
    -> the id of the first of the tokens `special`."""
    folder.mkdir(exist_ok=True)
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.train_from_iterator(["so the answer is 12"] * 9, trainers.BpeTrainer(
        vocab_size=300, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    backend.model.save(str(folder))
    names = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *special]
    start = backend.get_vocab_size()
    added = {str(start + i): dict(content=text, special=True, lstrip=False, rstrip=False, normalized=False,
                                single_word=False) for i, text in enumerate(names)}
    # Dream's and SDAR's folders name a class of their own. It is Qwen2's, and no code has to be run for it.
    (folder / "tokenizer_config.json").write_text(json.dumps(dict(
        tokenizer_class="DreamTokenizer", added_tokens_decoder=added, eos_token="<|endoftext|>",
        auto_map=dict(AutoTokenizer=["tokenization_dream.DreamTokenizer", None]), pad_token="<|endoftext|>",
        chat_template="{% for m in messages %}<|im_start|>{{ m['content'] }}<|im_end|>\n{% endfor %}",
        **settings)))
    return start + 3


# ------------------------------------------------------------------------------------------------ the families


def their_checkpoint(kind, is_tied, folder):
    """A random model of transformers' own, saved by transformers -> the model."""
    name = dict(qwen3="Qwen3", qwen2="Qwen2", llama="Llama", diffcoder="Llama")[kind]
    rope = dict(rope_type="default", rope_theta=5e5)
    config = getattr(transformers, f"{name}Config")(
        **SIZES, rope_parameters=rope, tie_word_embeddings=is_tied, attn_implementation="eager")
    torch.manual_seed(0)
    theirs = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    for p in theirs.parameters():  # biases as well, which start as 0
        p.data += 0.1 * torch.randn_like(p)
    theirs.save_pretrained(folder)
    more = {}
    if kind == "diffcoder":
        more = dict(architectures=["StableDiffcoderForCausalLM"],
                    auto_map={"AutoModelForCausalLM": "modeling_seed_diffcoder.StableDiffcoderForCausalLM"})
    else:
        more = dict(mask_token_id=39)
    edit(folder / "config.json", **more)
    return theirs


@pytest.mark.parametrize("is_tied", [False, True])
@pytest.mark.parametrize("kind", ["qwen3", "qwen2", "llama", "diffcoder"])
def test_block_size_1_is_the_autoregressive_network_and_4_only_sees_more(kind, is_tied, tmp_path):
    theirs = their_checkpoint(kind, is_tied, tmp_path)
    tokens = torch.randint(0, 40, (2, 17))
    position = torch.arange(17)
    for K in (1, 4):
        model, _ = checkpoints.load_model(tmp_path, block_size=K)
        is_seen = position // K <= position[:, None] // K
        mask = torch.where(is_seen, 0.0, torch.finfo(torch.float32).min).expand(2, 1, 17, 17)
        logits = theirs(tokens, attention_mask=mask).logits
        torch.testing.assert_close(model(tokens), logits, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(
        checkpoints.load_model(tmp_path, block_size=1)[0](tokens), theirs(tokens).logits, atol=1e-4, rtol=1e-4)
    config = checkpoints.load_model(tmp_path)[0].config
    assert (config.block_size, config.is_full, config.shifts_logits) == (4, False, False)
    assert config.mask_id == (5 if kind == "diffcoder" else 39) and config.rope_theta == 5e5
    assert (config.has_qk_norm, config.has_qkv_bias) == (kind == "qwen3", kind == "qwen2")


@pytest.mark.parametrize("kind", ["qwen3", "qwen2", "llama", "diffcoder"])
def test_transformers_reads_back_what_was_saved_from_its_own_checkpoint(kind, tmp_path):
    their_checkpoint(kind, True, tmp_path / "theirs")
    model, _ = checkpoints.load_model(tmp_path / "theirs", block_size=1)
    model.embed.weight.data *= 1.1
    checkpoints.save_checkpoint(model, None, tmp_path / "ours")
    edit(tmp_path / "ours/config.json", auto_map=None)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours", dtype=torch.float32)
    tokens = torch.randint(0, 40, (2, 9))
    torch.testing.assert_close(again(tokens).logits, model(tokens), atol=1e-4, rtol=1e-4)


def test_transformers_own_qwen3_loads_what_we_save(tmp_path):
    model = random_model("sdar", block_size=1)
    checkpoints.save_checkpoint(model, None, tmp_path / "c")
    config = transformers.Qwen3Config(**{k: v for k, v in model.config.source.items() if k != "model_type"})
    theirs = transformers.Qwen3ForCausalLM.from_pretrained(tmp_path / "c", config=config, dtype=torch.float32)
    tokens = torch.tensor(random_prompts([12]))
    torch.testing.assert_close(theirs(tokens).logits, model(tokens), atol=1e-4, rtol=1e-4)


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
        n_kv_heads=32, mlp_hidden_size=12288, rope_theta=500000.0, weight_tying=False, pad_token_id=126081,
        mask_token_id=126336, eos_token_id=126081))
    assert (llada.mask_id, llada.rope_theta, llada.num_kv_heads, llada.eos_ids, llada.pad_id) == (
        126336, 5e5, 32, (126081,), 126081)
    new = checkpoints.read_config(
        {**sdar.source, "rope_parameters": dict(rope_type="default", rope_theta=123.0)})
    assert new.rope_theta == 123.0
    math = checkpoints.read_config(dict(
        model_type="qwen2", architectures=["Qwen2ForCausalLM"], vocab_size=151936, hidden_size=1536,
        num_hidden_layers=28, num_attention_heads=12, num_key_value_heads=2, intermediate_size=8960,
        rope_theta=10000.0, tie_word_embeddings=True, eos_token_id=151643, use_sliding_window=False))
    assert (math.mask_id, math.block_size, math.head_dim, math.rope_theta) == (151665, 4, 128, 1e4)
    assert math.has_qkv_bias and not math.has_qk_norm


@pytest.mark.parametrize("kind", ["a2d-qwen3", "a2d-qwen2"])
def test_converted_qwens_say_their_attention_by_name_or_are_asked(kind, tmp_path):
    read = lambda path, **more: checkpoints.read_config(dict(model_type=kind, **FIELDS), path=path, **more)
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
    usual = {**FIELDS, "vocab_size": 151936, "mask_token_id": None}
    assert checkpoints.read_config(dict(model_type=kind, **usual), attention="full").mask_id == (
        151669 if kind[-1] == "3" else 151665)


def test_llada_weights_may_have_block_attention_if_it_is_asked_for(tmp_path):
    """As dLLM-Var has them; what is saved remembers it."""
    checkpoints.save_checkpoint(random_model("llada"), None, tmp_path / "c")
    assert checkpoints.load_model(tmp_path / "c")[0].config.is_full
    model, _ = checkpoints.load_model(tmp_path / "c", block_size=4, attention="block")
    tokens = torch.tensor(random_prompts([12]))
    changed = torch.cat([tokens[:, :8], tokens[:, 8:].flip(1)], dim=1)
    assert torch.equal(model(tokens)[:, :8], model(changed)[:, :8])
    checkpoints.save_checkpoint(model, None, tmp_path / "var")
    again, _ = checkpoints.load_model(tmp_path / "var")
    assert not again.config.is_full and torch.equal(again(tokens), model(tokens))


@pytest.mark.parametrize("change, message", [
    (dict(model_type="qwen3", architectures=["ReFusionForCausalLM"]), "architecture ReFusionForCausalLM in place of Qwen3ForCausalLM"),
    (dict(model_type="llama", architectures=["OtherForCausalLM"]), "architecture OtherForCausalLM in place of LlamaForCausalLM"),
    (dict(model_type="qwen3", auto_map={"AutoModel": "modeling.X"}), "code of its own"),
    (dict(model_type="Fast_dLLM_Qwen"), "unknown model_type"),
    (dict(model_type="llada2_moe"), "a mixture of experts"),
    (dict(model_type="llada", num_experts=64, moe_router_topk=8), "a mixture of experts"),
    (dict(model_type="sdar", num_local_experts=8), "a mixture of experts"),
    (dict(model_type="sdar", n_routed_experts=8), "a mixture of experts"),
    (dict(model_type="llama", rope_scaling=dict(rope_type="llama3", factor=8.0)), "rope type 'llama3'"),
    (dict(model_type="llama", hidden_act="gelu"), "the activation gelu"),
])
def test_other_networks_under_known_names_are_refused_by_name(change, message):
    with pytest.raises(ValueError, match=message):
        checkpoints.read_config({**FIELDS, **change})


def test_attention_that_a_family_does_not_have_is_refused():
    for kind, attention in (("sdar", "full"), ("llama", "full"), ("dream", "block")):
        with pytest.raises(ValueError, match=f"--attention {attention} does not fit"):
            checkpoints.read_config({**FIELDS, "model_type": kind}, attention=attention)


# --------------------------------------------------------------------------------------------- the block size


def test_a_text_that_grows_and_shrinks_is_refused_by_its_vocabulary(tmp_path):
    """DreamOn is Dream, with two tokens more."""
    checkpoints.save_checkpoint(random_model("dream", vocab_size=320), None, tmp_path)
    byte_tokenizer(tmp_path, ["<|mask|>", "<|expand|>", "<|delete|>"])
    with pytest.raises(ValueError, match="DreamOn"):
        checkpoints.load_model(tmp_path)


@pytest.mark.parametrize("name, own, asked, K", [
    ("JetLM/SDAR-8B-Chat-b32", None, None, 32),
    ("models/SDAR-8B-Chat-b32/", None, None, 32),
    ("JetLM/SDAR-8B-Chat-b32", 16, None, 16),
    ("JetLM/SDAR-8B-Chat-b32", None, 8, 8),
    ("JetLM/SDAR-4B-Chat", None, None, 4),
    ("models/b32-mine", None, None, 4),
])
def test_the_block_size_is_the_users_or_the_configs_or_the_names(name, own, asked, K):
    config = checkpoints.read_config({**FIELDS, "model_type": "sdar", "block_size": own}, asked, path=name)
    assert config.block_size == K


def test_a_block_size_that_config_json_does_not_name_is_said_in_one_line(tmp_path, capsys):
    def said(name, K=None):
        checkpoints.find_checkpoint(tmp_path / name, K)
        return capsys.readouterr().out

    for kind in ("sdar", "qwen3", "qwen2", "llama"):
        checkpoints.save_checkpoint(random_model(kind), None, tmp_path / kind)
        assert said(kind) == ""
        edit(tmp_path / kind / "config.json", block_size=None)
        assert said(kind) == (
            "config.json names no block size. K = 4 is the usual one of this family. A wrong K gives no "
            "error, but with block attention little is learnt: see --block_size\n")
        assert said(kind, 4) == ""
    shutil.copytree(tmp_path / "sdar", tmp_path / "mine-b8")
    assert "K = 8 was read from the checkpoint's name" in said("mine-b8")


# --------------------------------------------------------------------------------------------- the mask token


def test_the_tokenizer_names_the_mask_token_before_the_familys_usual_one(tmp_path):
    model = random_model(vocab_size=320)
    checkpoints.save_checkpoint(model, None, tmp_path)
    mask = byte_tokenizer(tmp_path, ["<|mask|>"], mask_token="<|mask|>")
    assert checkpoints.find_checkpoint(tmp_path)[1].mask_id == 2  # config.json's own word comes first
    edit(tmp_path / "config.json", mask_token_id=None)
    assert checkpoints.find_checkpoint(tmp_path)[1].mask_id == mask
    tokenizer = checkpoints.load_tokenizer(tmp_path)
    large = dict(FIELDS, model_type="sdar", mask_token_id=None, vocab_size=152000)
    assert checkpoints.read_config(large).mask_id == 151669
    assert checkpoints.read_config(large, tokenizer=tokenizer).mask_id == mask


def test_a_usual_mask_token_must_be_a_row_that_no_text_uses(tmp_path):
    """SmolLM2 has <empty_output>, a special token; Llama 3 reserves some; an ordinary token is never taken."""
    read = lambda kind, tokenizer, vocab_size=320: checkpoints.read_config(
        dict(FIELDS, model_type=kind, mask_token_id=None, vocab_size=vocab_size), tokenizer=tokenizer)
    first = byte_tokenizer(tmp_path / "smol", ["<repo_name>", "<empty_output>"])
    byte_tokenizer(tmp_path / "llama3", ["<|reserved_special_token_0|>"])
    byte_tokenizer(tmp_path / "none")
    smol, llama3, none = (checkpoints.load_tokenizer(tmp_path / name) for name in ("smol", "llama3", "none"))
    assert (read("llama", smol).mask_id, read("llama", llama3).mask_id) == (first + 1, first)
    for tokenizer in (none, None):
        with pytest.raises(ValueError, match="llama checkpoint names no mask token.*write its id into config"):
            read("llama", tokenizer)
    family = checkpoints.FAMILIES["qwen2"]._replace(masks=(99, 301))
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(checkpoints.FAMILIES, "qwen2", family)
        assert read("qwen2", none).mask_id == 301  # 99 is a token of ordinary text
        assert read("qwen2", None).mask_id == 99


def test_a_qwen3_without_room_for_a_mask_token_is_refused_with_the_remedy(tmp_path):
    their_checkpoint("qwen3", True, tmp_path)
    edit(tmp_path / "config.json", mask_token_id=None)
    with pytest.raises(ValueError, match=r"qwen3 checkpoint.* vocabulary of 40.* as mask_token_id"):
        checkpoints.load_model(tmp_path)


# ----------------------------------------------------------------------------------------------- the tokenizer


def test_the_tiny_tokenizer_gives_its_text_back():
    tokenizer = tiny.tiny_tokenizer()
    text = "090;111;090;\\boxed{919}"
    ids = tokenizer(text, add_special_tokens=False).input_ids
    assert len(ids) == 17 and tokenizer.decode([*ids, 1], skip_special_tokens=True) == text
    prompt = [{"role": "user", "content": "237+682=\nPlease reason step by step."}]
    assert tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True) == "237+682="


@pytest.mark.parametrize("family", ["dream", "sdar"])
def test_a_tokenizer_that_names_remote_code_loads_as_qwen2s(family, tmp_path):
    """Its files are saved as they were, with the code that they name, also if the source is gone by then."""
    checkpoints.save_checkpoint(random_model(family, vocab_size=320), None, tmp_path / "c")
    byte_tokenizer(tmp_path / "c", ["<|mask|>"])
    code = "raise RuntimeError('this was run')\n"
    (tmp_path / "c/tokenization_dream.py").write_text(code)
    edit(tmp_path / "c/config.json", auto_map={"AutoConfig": "configuration.Mine"})
    model, tokenizer = checkpoints.load_model(tmp_path / "c")
    ids = tokenizer("<|im_start|>so the answer", add_special_tokens=False).input_ids
    assert tokenizer.decode(ids) == "<|im_start|>so the answer"
    assert ids[0] == tokenizer.convert_tokens_to_ids("<|im_start|>")
    assert set(model.config.eos_ids) == {1, *tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])}
    kept = {path.name: path.read_bytes() for path in (tmp_path / "c").iterdir() if "model" not in path.name}
    shutil.rmtree(tmp_path / "c")
    checkpoints.save_checkpoint(model, tokenizer, tmp_path / "again")
    for name in ("vocab.json", "merges.txt", "tokenizer_config.json", "tokenization_dream.py"):
        assert (tmp_path / "again" / name).read_bytes() == kept[name], name
    assert json.loads((tmp_path / "again/config.json").read_text())["auto_map"] == {
        "AutoConfig": "configuration.Mine"}
    _, again = checkpoints.load_model(tmp_path / "again")
    assert again("<|im_start|>so the answer", add_special_tokens=False).input_ids == ids


# ------------------------------------------------------------------------------------------- weights of a folder


@pytest.mark.parametrize("kind", ["sdar", "qwen3", "qwen2", "llama", "dream", "llada"])
def test_save_then_load_gives_every_bit_back(kind, tmp_path):
    model = random_model(kind)
    checkpoints.save_checkpoint(model, tiny.tiny_tokenizer(), tmp_path / "one", max_shard_size="20KB")
    again, tokenizer = checkpoints.load_model(tmp_path / "one")
    assert len(list((tmp_path / "one").glob("*.safetensors"))) > 1
    for (name, p), (_, q) in zip(model.named_parameters(), again.named_parameters(), strict=True):
        assert torch.equal(p, q), name
    assert tokenizer.encode("12+3=") == tiny.tiny_tokenizer().encode("12+3=")
    assert (again.config.mask_id, again.config.block_size, again.config.eos_ids) == (2, 4, (1,))
    edit(tmp_path / "one/config.json", pad_token_id=None)
    (tmp_path / "one/generation_config.json").write_text('{"eos_token_id": [3], "pad_token_id": 7}')
    config = checkpoints.find_checkpoint(tmp_path / "one")[1]
    assert config.eos_ids[-1] == 3 and config.pad_id == 7


def test_weights_keep_the_type_they_are_stored_in_unless_one_is_asked_for(tmp_path):
    model = random_model().bfloat16()
    model.norm.float()
    checkpoints.save_checkpoint(model, None, tmp_path)
    again, _ = checkpoints.load_model(tmp_path)
    assert {p.dtype for p in again.parameters()} == {torch.float32}  # the longest, so that no bit is lost
    assert torch.equal(again.head.weight, model.head.weight.float())
    model.norm.bfloat16()
    checkpoints.save_checkpoint(model, None, tmp_path)
    again, _ = checkpoints.load_model(tmp_path)
    assert {p.dtype for p in again.parameters()} == {torch.bfloat16}
    assert torch.equal(again.head.weight, model.head.weight)
    wide, _ = checkpoints.load_model(tmp_path, dtype=torch.float32)
    assert {p.dtype for p in wide.parameters()} == {torch.float32}


@pytest.mark.parametrize("change, message", [
    (dict(model_type="gpt2"), "unknown model_type 'gpt2'"),
    (dict(hidden_size=None), "lacks hidden_size"),
    (dict(mask_token_id=None), "names no mask token"),
    (dict(rope_scaling=dict(type="yarn", factor=4.0)), "rope type"),
    (dict(hidden_size=40), r"lm_head.weight has shape \(18, 32\), config.json asks for \(18, 40\)"),
    (dict(num_hidden_layers=3), "missing"),
    (dict(num_hidden_layers=1), "unexpected"),
    (dict(mask_token_id=18), "mask id 18 is outside the vocabulary of 18"),
])
def test_a_checkpoint_that_does_not_fit_says_why(change, message, tmp_path):
    checkpoints.save_checkpoint(random_model(), None, tmp_path)
    edit(tmp_path / "config.json", **change)
    with pytest.raises(ValueError, match=message):
        checkpoints.load_model(tmp_path)


def test_a_damaged_file_and_pickled_weights_are_named(tmp_path):
    checkpoints.save_checkpoint(random_model(), None, tmp_path, max_shard_size="20KB")
    first = sorted(tmp_path.glob("*.safetensors"))[0]
    whole = first.read_bytes()
    for content in (b"", whole[:100], whole[:-1], b"x" * 100):
        first.write_bytes(content)
        with pytest.raises(ValueError, match=f"{first.name} is damaged"):
            checkpoints.load_model(tmp_path)
    for path in tmp_path.glob("*.safetensors"):
        path.unlink()
    torch.save({}, tmp_path / "pytorch_model.bin")
    with pytest.raises(FileNotFoundError, match="pickled weights are never read"):
        checkpoints.load_model(tmp_path)


def test_a_missing_checkpoint_says_so(tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match="no checkpoint folder"):
        checkpoints.load_model(tmp_path / "nothing")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="config.json"):
        checkpoints.load_model(tmp_path / "empty")

    def absent(name, allow_patterns):
        raise LocalEntryNotFoundError("Cannot find an appropriate\ncached snapshot folder.")

    monkeypatch.setattr(checkpoints, "snapshot_download", absent)  # a name that may be a hub id, too
    with pytest.raises(FileNotFoundError, match="'checkpoints/step-45': there is no such folder, and the hub"):
        checkpoints.load_model("checkpoints/step-45")


def test_a_head_that_config_json_calls_tied_is_the_embedding_though_both_are_stored(tmp_path):
    checkpoints.save_checkpoint(random_model(), None, tmp_path)
    edit(tmp_path / "config.json", tie_word_embeddings=True)
    model, _ = checkpoints.load_model(tmp_path)
    assert model.head.weight is model.embed.weight
    stored = load_file(tmp_path / "model.safetensors")
    assert torch.equal(model.embed.weight, stored["model.embed_tokens.weight"])


def load_sharded(rank, size, folder, errors):
    """One of several processes: a policy and a value model, sharded, must be the files' bits."""
    try:
        dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=size)
        for name in ("tied", "untied"):
            config = checkpoints.find_checkpoint(folder / name)[1]
            policy = checkpoints.empty_model(config)
            critic = value.ValueModel(policy)
            stored = load_file(folder / name / "model.safetensors")
            for model, layers in ((policy, policy.layers), (critic, critic.backbone.layers)):
                parallel.shard(model, layers)
                model.to_empty(device="cpu")
                checkpoints.load_weights(model, folder / name, torch.float32)
                for ours, p in model.named_parameters():
                    whole = p.full_tensor()
                    if ours == checkpoints.VALUE_HEAD:
                        assert not whole.any()
                    else:
                        theirs = checkpoints.family_name(config, ours.removeprefix("backbone."))
                        assert torch.equal(whole, stored[theirs]), ours
    except BaseException:
        errors.put(traceback.format_exc())
        raise


@pytest.mark.parametrize("size", [1, 3, 4])
def test_every_process_reads_its_own_part(size, tmp_path):
    """18 tokens and a value head of one row divide neither by 3 nor by 4."""
    state = random_model().state_dict()
    model = random_model()
    checkpoints.save_checkpoint(model, None, tmp_path / "untied")
    shutil.copytree(tmp_path / "untied", tmp_path / "tied")
    edit(tmp_path / "tied/config.json", tie_word_embeddings=True)
    stored = load_file(tmp_path / "tied/model.safetensors")
    save_file(stored | {"lm_head.weight": state["embed.weight"].clone()}, tmp_path / "tied/model.safetensors")
    context = multiprocessing.get_context("fork")
    errors = context.SimpleQueue()
    processes = [context.Process(target=load_sharded, args=(rank, size, tmp_path, errors))
                 for rank in range(size)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert errors.empty() and all(process.exitcode == 0 for process in processes), errors.get()


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
@pytest.mark.skipif(not os.environ.get("SLOW"), reason="takes five seconds: set SLOW=1")
def test_loading_never_holds_a_second_copy(tmp_path):
    """Of TEST_LOAD_MILLIONS million parameters in bfloat16 (default 30; the smallest real model has 500)."""
    millions = int(os.environ.get("TEST_LOAD_MILLIONS", 30))
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
    said = done.stdout.splitlines()  # that the block size is assumed, and then the number
    assert float(said[-1]) < 1.3


# ----------------------------------------------------------------------------------------------------- saving


def test_others_may_read_saved_weights(tmp_path):
    checkpoints.save_checkpoint(random_model(), tiny.tiny_tokenizer(), tmp_path / "c")
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "c").glob("*.safetensors")} == {0o644}


def test_a_saved_theta_stands_where_old_and_new_readers_look(tmp_path):
    """Transformers 4 reads rope_theta, 5 reads rope_parameters; either falls back to 10000 in silence."""
    their_checkpoint("qwen3", True, tmp_path / "new")
    assert "rope_theta" not in json.loads((tmp_path / "new/config.json").read_text())
    model, _ = checkpoints.load_model(tmp_path / "new")
    checkpoints.save_checkpoint(model, None, tmp_path / "saved")
    saved = json.loads((tmp_path / "saved/config.json").read_text())
    assert saved["rope_theta"] == saved["rope_parameters"]["rope_theta"] == 5e5
    assert transformers.AutoConfig.from_pretrained(tmp_path / "saved").rope_parameters["rope_theta"] == 5e5


def test_small_changes_of_adapters_outlive_a_bfloat16_trunk():
    """W = 1, where half a step of bfloat16 is 2e-3, and B A = 1e-4: doubled (alpha is 2), and all there."""
    state = lambda: {"x.weight": torch.ones(4, 4, dtype=torch.bfloat16),
                     "x.lora_A": torch.full((1, 4), 1e-2), "x.lora_B": torch.full((4, 1), 1e-2)}
    assert torch.equal(checkpoints.merge_lora(state())["x.weight"], state()["x.weight"])
    merged = checkpoints.merge_lora(state(), torch.float32)["x.weight"]
    torch.testing.assert_close(merged, torch.full((4, 4), 1 + 2e-4), atol=1e-7, rtol=0)


# ------------------------------------------------------------------------------------ other programs read them


OLD = """
import sys
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, __version__
assert __version__ == "4.57.1", __version__
folder = sys.argv[1]
source, again = (AutoTokenizer.from_pretrained(f"{folder}/{name}") for name in ("qwen2", "qwen2-again"))
text = "<|im_start|>so the answer"
assert type(source) is type(again) and source(text).input_ids == again(text).input_ids
assert AutoConfig.from_pretrained(f"{folder}/theta").rope_theta == 500000.0
config = AutoConfig.from_pretrained(f"{folder}/remote", trust_remote_code=True)  # written by the test itself
assert type(config).__name__ == "Mine" and config.hidden_size == 32
numbers = torch.load(f"{folder}/logits.pt")
theirs = AutoModelForCausalLM.from_pretrained(f"{folder}/theta", dtype=torch.float32)
gap = float((theirs(numbers["tokens"]).logits - numbers["logits"]).abs().max())
print("gap", gap)
assert gap < 1e-4
"""


@pytest.mark.skipif(not os.environ.get("SLOW"), reason="installs transformers 4.57: set SLOW=1")
def test_transformers_4_reads_what_is_saved(tmp_path):
    """Tokenizers, theta and code of its own, in an environment of its own beside this one's torch."""
    checkpoints.save_checkpoint(random_model("dream", vocab_size=320), None, tmp_path / "qwen2")
    byte_tokenizer(tmp_path / "qwen2", ["<|mask|>"])
    edit(tmp_path / "qwen2/tokenizer_config.json", tokenizer_class="Qwen2Tokenizer", auto_map=None)
    checkpoints.save_checkpoint(*checkpoints.load_model(tmp_path / "qwen2"), tmp_path / "qwen2-again")
    for name in ("qwen2", "qwen2-again"):  # a Dream config would ask for its code first
        edit(tmp_path / name / "config.json", model_type="qwen2")

    their_checkpoint("qwen3", True, tmp_path / "source")
    model, _ = checkpoints.load_model(tmp_path / "source", block_size=1)
    checkpoints.save_checkpoint(model, None, tmp_path / "theta")
    tokens = torch.randint(0, 40, (2, 17))
    torch.save(dict(tokens=tokens, logits=model(tokens).detach()), tmp_path / "logits.pt")

    checkpoints.save_checkpoint(random_model(), None, tmp_path / "code")
    edit(tmp_path / "code/config.json", auto_map={"AutoConfig": "configuration_mine.Mine"})
    (tmp_path / "code/configuration_mine.py").write_text(
        "from transformers import PretrainedConfig\n\n\nclass Mine(PretrainedConfig):\n"
        '    model_type = "sdar"\n')
    checkpoints.save_checkpoint(checkpoints.load_model(tmp_path / "code")[0], None, tmp_path / "remote")

    python = side_environment(tmp_path / "venv", "transformers==4.57.1")
    done = subprocess.run([python, "-c", OLD, tmp_path], capture_output=True, text=True,
                          env={**os.environ, "HF_HOME": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1"})
    assert done.returncode == 0, done.stdout + done.stderr
    print(done.stdout)
