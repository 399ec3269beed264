"""plumbing/checkpoints.py - Hugging Face folders in and out.

One network serves all families. A family is a row of FAMILIES: switches for model.ModelConfig and a table of
weight names. A new family that fits the network is a new row.

Weights are read from safetensors files only. Pickled files are never read, and code from a checkpoint is
copied into what is saved, but never run.
"""

import json
import os
import re
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from huggingface_hub import save_torch_state_dict, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn
from torch.distributed.checkpoint import HuggingFaceStorageReader
from torch.distributed.tensor import DTensor
from transformers import PreTrainedTokenizerFast, Qwen2Tokenizer

from model import BlockDiffusionLM, ModelConfig
from plumbing import cuda, parallel

# ------------------------------------------------------------------------------------------------------------
# The families.


# Our name of a module -> its name in the files. Those of a layer stand behind `layers` and its number.
QWEN_NAMES = dict(
    embed="model.embed_tokens", layers="model.layers", norm="model.norm", head="lm_head",
    attention_norm="input_layernorm", mlp_norm="post_attention_layernorm",
    q_proj="self_attn.q_proj", k_proj="self_attn.k_proj", v_proj="self_attn.v_proj",
    q_norm="self_attn.q_norm", k_norm="self_attn.k_norm", o_proj="self_attn.o_proj",
    gate_proj="mlp.gate_proj", up_proj="mlp.up_proj", down_proj="mlp.down_proj")
LLADA_NAMES = dict(
    embed="model.transformer.wte", layers="model.transformer.blocks", norm="model.transformer.ln_f",
    head="model.transformer.ff_out", attention_norm="attn_norm", mlp_norm="ff_norm",
    q_proj="q_proj", k_proj="k_proj", v_proj="v_proj", o_proj="attn_out",
    gate_proj="ff_proj", up_proj="up_proj", down_proj="ff_out")


class Family(NamedTuple):
    """What all checkpoints of one family have in common. The first four are as in model.ModelConfig."""

    names: dict
    has_qk_norm: bool = False
    has_qkv_bias: bool = False
    shifts_logits: bool = False
    attention: str = "block"  # or "full"; "" where only the checkpoint's name or --attention can tell
    may_choose: bool = False  # whether --attention may ask for the other kind
    block_size: int = 4  # K, where neither config.json nor the checkpoint's name says it
    masks: tuple = ()  # mask tokens by id or by text, where neither config.json nor the tokenizer names one
    architecture: str = ""  # the only one that fits; "" where the network is code beside the weights


# By model_type of config.json, in lower case. A network of its own that borrows another's model_type stands
# here under its architecture.
#
# The last three are autoregressive. sft.py makes block diffusion models of them: the weights are loaded as
# they are, attention becomes block-wise, and a row of the embedding that no text uses becomes the mask token.
# With K = 1 they are the autoregressive networks themselves.
#
# Which row is unused? Qwen's embedding is longer than its vocabulary, so the first row beyond it is free.
# Llama 3 reserves tokens for such purposes. SmolLM2 reserves none, but its vocabulary has special tokens that
# its training never met. `<empty_output>` is one of eleven whose rows are still equal (in the 135M model).
FAMILIES = {
    "sdar": Family(QWEN_NAMES, has_qk_norm=True, masks=(151669,)),  # SDAR and TraDo
    "a2d-qwen3": Family(  # dllm's conversions of Qwen
        QWEN_NAMES, has_qk_norm=True, attention="", may_choose=True, block_size=32, masks=(151669,)),
    "a2d-qwen2": Family(
        QWEN_NAMES, has_qkv_bias=True, attention="", may_choose=True, block_size=32, masks=(151665,)),
    "dream": Family(  # Dream and DiffuCoder
        QWEN_NAMES, has_qkv_bias=True, shifts_logits=True, attention="full", block_size=32, masks=(151666,)),
    "llada": Family(LLADA_NAMES, attention="full", may_choose=True, block_size=32, masks=(126336,)),
    "mmada": Family(  # its text part is LLaDA
        LLADA_NAMES, attention="full", may_choose=True, block_size=32, masks=(126336,)),
    "stablediffcoderforcausallm": Family(QWEN_NAMES, masks=(5,)),  # its model_type is llama
    "qwen3": Family(QWEN_NAMES, has_qk_norm=True, masks=(151669,), architecture="Qwen3ForCausalLM"),
    "qwen2": Family(QWEN_NAMES, has_qkv_bias=True, masks=(151665,), architecture="Qwen2ForCausalLM"),
    "llama": Family(QWEN_NAMES, masks=("<|reserved_special_token_0|>", "<empty_output>"),
                    architecture="LlamaForCausalLM"),
}

LLADA_FIELDS = dict(  # Qwen's spelling of a field -> LLaDA's
    vocab_size="embedding_size", hidden_size="d_model", num_hidden_layers="n_layers",
    num_attention_heads="n_heads", num_key_value_heads="n_kv_heads", intermediate_size="mlp_hidden_size",
    tie_word_embeddings="weight_tying")


@dataclass
class CheckpointConfig(ModelConfig):
    """A ModelConfig that remembers the folder it was read from."""

    is_block_size_assumed: bool = False  # K is the family's usual one: nothing in the checkpoint says it
    folder: str = ""
    # The tokenizer's files and the code beside the weights: name -> content. Saving gives them back. They are
    # kept here because the folder may be gone by then, as older checkpoints of a run are.
    files: dict = field(default_factory=dict, repr=False)


# ------------------------------------------------------------------------------------------------------------
# config.json.


def read_config(source, block_size=None, attention=None, path="", tokenizer=None):
    """The fields of a config.json (a dict), whichever family's spelling they have -> CheckpointConfig.

    block_size, attention ("block" or "full"): what the user asks for. path: the checkpoint's name, which may
    say both. tokenizer: may name the mask token. Raises ValueError for an unknown model_type, a missing
    field, or a variant the network does not have.
    """
    name = str(source.get("model_type", "none")).lower()
    architecture = (source.get("architectures") or [""])[0]
    if architecture.lower() in FAMILIES:
        name = architecture.lower()
    vocabulary = tokenizer.get_vocab() if tokenizer is not None else {}
    refuse_other_networks(source, name, architecture, vocabulary)
    family = FAMILIES[name]
    is_llada = family.names is LLADA_NAMES
    wanted = {ours: source.get(llada if is_llada else ours) for ours, llada in LLADA_FIELDS.items()}
    wanted["vocab_size"] = wanted["vocab_size"] or source.get("vocab_size")
    wanted["num_key_value_heads"] = wanted["num_key_value_heads"] or wanted["num_attention_heads"]
    missing = [field for field, value in wanted.items() if value is None and field != "tie_word_embeddings"]
    if missing:
        raise ValueError(f"config.json of family {name!r} lacks {', '.join(missing)}")
    highest = max(vocabulary.values(), default=0)
    if highest >= wanted["vocab_size"]:
        raise ValueError(f"{path}: the tokenizer has a token of id {highest}, and config.json has a vocabulary "
                         f"of {wanted['vocab_size']}: take the tokenizer that belongs to these weights")
    is_full = find_attention(source, family, attention, path) == "full"
    own_size = source.get("block_size") or find_named_size(path, is_full)
    eos, pad = as_list(source.get("eos_token_id")), source.get("pad_token_id")
    rope = source.get("rope_parameters") or {}
    theta = rope.get("rope_theta") or source.get("rope_theta") or 1e4  # 1e4 is what an unnamed one means
    return CheckpointConfig(
        vocab_size=wanted["vocab_size"], hidden_size=wanted["hidden_size"],
        num_layers=wanted["num_hidden_layers"], num_heads=wanted["num_attention_heads"],
        num_kv_heads=wanted["num_key_value_heads"],
        head_dim=source.get("head_dim") or wanted["hidden_size"] // wanted["num_attention_heads"],
        intermediate_size=wanted["intermediate_size"], is_full=is_full,
        mask_id=find_mask(source, name, wanted["vocab_size"], tokenizer),
        block_size=block_size or own_size or family.block_size,
        is_block_size_assumed=not (block_size or own_size),
        has_qk_norm=family.has_qk_norm, has_qkv_bias=family.has_qkv_bias, shifts_logits=family.shifts_logits,
        rms_norm_eps=source.get("rms_norm_eps", 1e-6), rope_theta=float(theta),
        tie_word_embeddings=bool(wanted["tie_word_embeddings"]),
        pad_id=pad if pad is not None else (eos[0] if eos else 0), eos_ids=tuple(eos),
        family=name, source=dict(source))


def refuse_other_networks(source, name, architecture, vocabulary):
    """ValueError for a checkpoint whose network, or way of decoding, is not ours."""
    rope = source.get("rope_parameters") or source.get("rope_scaling") or {}
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    has_experts = any(value and ("expert" in key or key.startswith("moe_")) for key, value in source.items())
    usual = FAMILIES[name].architecture if name in FAMILIES else ""
    is_other = usual and (architecture not in ("", usual) or "auto_map" in source)
    reasons = {  # what it has -> whether it has that
        "a mixture of experts": has_experts or "moe" in name,
        "logits that are shifted by one, across the borders of its blocks": name == "fast_dllm_qwen",
        f"code of its own: it is {architecture or 'unnamed'}, another network under a known name": is_other,
        f"rope type {rope_type!r}, and only plain rotary positions are": rope_type != "default",
        "sliding windows": source.get("use_sliding_window"),
        f"the activation {source.get('hidden_act')}": source.get("hidden_act", "silu") != "silu",
        "biases beyond those of its family": source.get("attention_bias") or source.get("mlp_bias"),
        "tokens <|expand|> and <|delete|>, by which its text grows and shrinks (DreamOn)":
            {"<|expand|>", "<|delete|>"} <= vocabulary.keys(),
    }
    for reason, is_so in reasons.items():
        if is_so:
            raise ValueError(f"this {name} checkpoint is not supported: it has {reason}")
    if name not in FAMILIES:
        raise ValueError(f"unknown model_type {name!r} in config.json: known are {', '.join(FAMILIES)}")


def find_attention(source, family, asked, path):
    """"block" or "full": by family, by --attention, or by the checkpoint's name."""
    if not family.may_choose:
        if asked not in (None, family.attention):
            raise ValueError(f"--attention {asked} does not fit a checkpoint of {source['model_type']}: "
                             f"its attention is {family.attention}")
        return family.attention
    name = os.path.basename(os.path.normpath(path)).lower()
    by_name = "block" if "bd3lm" in name else "full" if "mdlm" in name else ""
    attention = asked or source.get("attention") or family.attention or by_name
    if not attention:
        raise ValueError(f"{source['model_type']} may be of block or of full attention, and the name "
                         f"{name!r} does not say which: give --attention")
    return attention


def find_named_size(path, is_full):
    """K as a checkpoint's name ends in it: JetLM/SDAR-8B-Chat-b32 -> 32. None where the name says nothing."""
    named = re.search(r"-b(\d+)$", os.path.basename(os.path.normpath(path)))
    return int(named[1]) if named and not is_full else None


def find_mask(source, name, vocab_size, tokenizer):
    """The mask token's id: by config.json, by the tokenizer, or the family's usual one.

    The usual one is taken only if it is a row of the embedding, and no token that text is made of.
    """
    if source.get("mask_token_id") is not None:
        return source["mask_token_id"]
    vocabulary, special = {}, set()
    if tokenizer is not None:
        if tokenizer.mask_token_id is not None:
            return tokenizer.mask_token_id
        vocabulary = tokenizer.get_vocab()
        special = {token for token, added in tokenizer.added_tokens_decoder.items() if added.special}
    ordinary = set(vocabulary.values()) - special
    for usual in FAMILIES[name].masks:
        token = vocabulary.get(usual) if isinstance(usual, str) else usual
        if token is not None and token < vocab_size and token not in ordinary:
            return token
    raise ValueError(
        f"this {name} checkpoint names no mask token, and none of the usual ones {FAMILIES[name].masks} is "
        f"unused in its vocabulary of {vocab_size}: choose a token that no text holds, and write its id "
        "into config.json as mask_token_id")


def as_list(value):
    """None -> [], 3 -> [3], [3, 4] -> [3, 4]: eos ids are written in all three ways."""
    if value is None:
        return []
    return list(value) if isinstance(value, (list, tuple)) else [value]


def family_name(config, ours):
    """Our name in the family's spelling: layers.3.q_proj.weight -> model.layers.3.self_attn.q_proj.weight."""
    parts, names = ours.split("."), FAMILIES[config.family].names
    if parts[0] == "layers":
        _, number, module, kind = parts
        return f"{names['layers']}.{number}.{names[module]}.{kind}"
    return f"{names[parts[0]]}.{parts[1]}"


def read_json(path):
    """The content of a JSON file. ValueError that names the file if it is damaged."""
    try:
        with open(path, encoding="utf-8") as file:
            return json.load(file)
    except ValueError as error:  # broken JSON, or bytes that are not UTF-8
        raise ValueError(f"{path} is damaged ({error}): restore it, or fetch the checkpoint again") from None


def write_json(path, value):
    """Writes JSON under a temporary name, then renames: a reader never sees half a file."""
    with open(f"{path}.partial", "w", encoding="utf-8") as file:
        json.dump(value, file, indent=2)
        file.flush()
        os.fsync(file.fileno())  # on the disk before anything older is deleted
    os.replace(f"{path}.partial", path)


# ------------------------------------------------------------------------------------------------------------
# Loading.


TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
    "merges.txt", "tokenizer.model", "chat_template.jinja", "chat_template.json")


def find_checkpoint(path_or_id, block_size=None, attention=None):
    """A folder or hub id -> (folder, CheckpointConfig, tokenizer or None). Errors: see load_model."""
    name = os.fspath(path_or_id)
    path = name if os.path.isdir(name) else download(name)
    if not os.path.isfile(os.path.join(path, "config.json")):
        raise FileNotFoundError(f"{path} has no config.json: not a checkpoint folder")
    source, tokenizer = read_json(os.path.join(path, "config.json")), load_tokenizer(path)
    config = read_config(source, block_size, attention, name, tokenizer)
    if block_size is None and not source.get("block_size"):
        why = "is assumed" if config.is_block_size_assumed else "is taken from the checkpoint's name"
        parallel.say(f"config.json names no block size: {config.block_size} {why}; --block_size sets another")
    config.eos_ids = find_eos_ids(path, config, tokenizer)
    pad_id = generation_config(path).get("pad_token_id")
    if source.get("pad_token_id") is None and pad_id is not None:  # as in Qwen3
        config.pad_id = pad_id
    config.folder = path
    config.files = {file_name: Path(path, file_name).read_bytes() for file_name in os.listdir(path)
                    if file_name in TOKENIZER_FILES or file_name.endswith(".py")}
    return path, config, tokenizer


def download(name):
    """The local copy of a hub id's folder. FileNotFoundError if there is none."""
    is_path = os.path.exists(name) or name.startswith((".", "/", "~")) or name.count("/") != 1
    if is_path:
        raise FileNotFoundError(f"no checkpoint folder {name!r} (a hub id looks like JetLM/SDAR-4B-Chat)")
    try:
        return snapshot_download(name, allow_patterns=[*TOKENIZER_FILES, "*.json", "*.safetensors", "*.py"])
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError) as error:
        reason = " ".join(str(error).split())
        raise FileNotFoundError(f"no checkpoint {name!r}: there is no such folder, and the hub gave none. "
                                f"It said: {reason}") from None


def load_tokenizer(path):
    """The folder's tokenizer, or None if it has none. Never runs code from the checkpoint."""
    if os.path.isfile(os.path.join(path, "tokenizer.json")):
        return PreTrainedTokenizerFast.from_pretrained(path)
    # SDAR and Dream have Qwen2's tokenizer in its older form, under a class of their own.
    if os.path.isfile(os.path.join(path, "vocab.json")) and os.path.isfile(os.path.join(path, "merges.txt")):
        return Qwen2Tokenizer.from_pretrained(path)
    return None


def generation_config(path):
    """What the folder's generation_config.json says, {} where there is none."""
    path = os.path.join(path, "generation_config.json")
    return read_json(path) if os.path.isfile(path) else {}


def find_eos_ids(path, config, tokenizer):
    """Every id that ends a response, from the tokenizer, config.json and generation_config.json.

    The first is the one that sft.py teaches: the end of a chat turn, where the tokenizer has such a token.
    """
    vocabulary = tokenizer.get_vocab() if tokenizer is not None else {}
    ids = [vocabulary[token] for token in ("<|im_end|>", "<|eot_id|>") if token in vocabulary]
    ids += config.eos_ids
    ids += as_list(generation_config(path).get("eos_token_id"))
    if tokenizer is not None:
        ids += [vocabulary[token] for token in (tokenizer.eos_token, "<|endoftext|>") if token in vocabulary]
    return tuple(dict.fromkeys(ids))


def load_model(path_or_id, block_size=None, dtype=None, device=None, attention=None):
    """Loads a checkpoint folder or hub id -> (BlockDiffusionLM, tokenizer or None).

    block_size: K, if not the checkpoint's own. dtype: of the weights in memory (default: as stored). device:
    default this process's GPU, else the CPU. attention: see read_config. Raises FileNotFoundError or
    ValueError that names the missing file, weight, shape, model_type or mask token.
    """
    path, config, tokenizer = find_checkpoint(path_or_id, block_size, attention)
    model = empty_model(config)
    load_weights(model, path, dtype, device)
    return model.eval(), tokenizer


def empty_model(config):
    """A model without memory for its weights."""
    with torch.device("meta"):
        return BlockDiffusionLM(config)


VALUE_HEAD = "value_head.weight"  # ours and in the files


def load_weights(model, folder, dtype=None, device=None):
    """Fills a model, or a value model, from the safetensors files of a folder.

    Torch's own reader reads them, tensor by tensor. Of sharded weights (parallel.shard) each process reads
    its own part only. Weights on the meta device are made, on `device`, in `dtype` or as they are stored.
    """
    device, reader = device or parallel.default_device(), HuggingFaceStorageReader(folder)
    stored = stored_tensors(reader, folder)
    # A value model has the names of its backbone, and a head of its own.
    theirs_of = {name: name if name == VALUE_HEAD else family_name(model.config, name.removeprefix("backbone."))
                 for name, _ in model.named_parameters()}
    head, is_policy = family_name(model.config, "head.weight"), VALUE_HEAD not in theirs_of
    shapes = {theirs_of[name]: p.shape for name, p in model.named_parameters()}
    # Some tied checkpoints hold the matrix twice, as embedding and as head: both must say the same.
    has_two = is_policy and head in stored and head not in shapes
    if has_two:
        shapes[head] = shapes[theirs_of["embed.weight"]]
    check_stored(stored, shapes, {head, VALUE_HEAD}, model.config, folder)
    state = {}
    for name, p in list(model.named_parameters()):
        theirs = theirs_of[name]
        if p.is_meta:
            kept = stored[theirs].properties.dtype if theirs in stored else torch.float32
            p = nn.Parameter(torch.empty(p.shape, dtype=dtype or kept, device=device))
            module, _, kind = name.rpartition(".")
            setattr(model.get_submodule(module), kind, p)
        state[theirs] = p.data
    if not is_policy and VALUE_HEAD not in stored:  # a new value model says 0 everywhere
        state.pop(VALUE_HEAD).zero_()
    if has_two:
        state[head] = torch.empty_like(model.embed.weight.data)
    parallel.load(state, storage_reader=reader)
    if has_two and not torch.equal(own_part(state[head]), own_part(model.embed.weight.data)):
        raise ValueError(f"{folder}: config.json says that head and embedding are one matrix "
                         f"(tie_word_embeddings), and {head} is another one: correct config.json")
    if is_policy and model.config.tie_word_embeddings:
        model.head.weight = model.embed.weight


def stored_tensors(reader, folder):
    """What the files of a folder hold: name -> its size, its dtype (in .properties) and its pieces (.chunks).

    FileNotFoundError if there is no file, ValueError that names a damaged one.
    """
    files = sorted(name for name in os.listdir(folder) if name.endswith(".safetensors"))
    if not files:
        raise FileNotFoundError(f"{folder} holds no .safetensors file (pickled weights are never read)")
    for name in files:
        try:
            with safe_open(os.path.join(folder, name), framework="pt"):
                pass  # opening compares the file's length with its table of contents
        except SafetensorError as error:
            raise ValueError(f"{folder}/{name} is damaged ({error}): fetch it again") from None
    return reader.read_metadata().state_dict_metadata


def check_stored(stored, shapes, may_be_unread, config, folder):
    """ValueError unless the files hold each tensor of `shapes` once, in its shape, and nothing unknown."""
    missing = sorted(shapes.keys() - stored.keys() - {VALUE_HEAD})
    unexpected = sorted(name for name in stored.keys() - shapes.keys() - may_be_unread
                        if not name.endswith("rotary_emb.inv_freq"))
    if missing or unexpected:
        raise ValueError(f"{folder} does not hold a {config.family} checkpoint: "
                         f"missing {missing[:5] or 'nothing'}, unexpected {unexpected[:5] or 'nothing'}")
    for name in sorted(shapes.keys() & stored.keys()):
        if len(stored[name].chunks) > 1:
            raise ValueError(f"{folder}: {name} is in more than one file: are these two checkpoints?")
        if stored[name].size != shapes[name]:
            raise ValueError(f"{folder}: {name} has shape {tuple(stored[name].size)}, config.json asks for "
                             f"{tuple(shapes[name])}")


def own_part(tensor):
    """What this process holds of a tensor: all, unless it is sharded."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def load_to_train(path, args, make_critic=None):
    """A checkpoint to train, by the flags -> (model, critic or None, tokenizer), sharded over all processes.

    make_critic: from the policy, not yet filled, to a value model (value.ValueModel); its weights are those
    of the policy, or the folder's own in value/. Without adapters each process reads its share of every
    weight, as float32. With adapters the frozen trunk stays whole on every process, in --dtype.
    """
    folder, config, tokenizer = find_checkpoint(path, args.block_size, args.attention if args.model else None)
    if tokenizer is None:
        raise ValueError(f"{path} has no tokenizer: prompts cannot be encoded")
    if args.model is not None:
        cuda.plan_memory(config, args, make_critic is not None)
    dtype, model = getattr(torch, args.dtype), empty_model(config)
    for layer in model.layers:  # and so of the value model, a copy
        layer.has_gradient_checkpointing = args.gradient_checkpointing
    if args.lora_rank:
        load_weights(model, folder, dtype)
        parallel.add_lora(model, args.lora_rank, args.seed)
    critic = None if make_critic is None else make_critic(model)
    parallel.shard(model, model.layers, dtype)
    if critic is not None:
        parallel.shard(critic, critic.backbone.layers, dtype)
    saved = os.path.join(folder, "value")
    if not args.lora_rank:
        for part in [model] if critic is None else [model, critic]:
            if dist.is_initialized():
                part.to_empty(device=parallel.default_device())
            has_own = part is critic and os.path.isdir(saved)
            load_weights(part, saved if has_own else folder, torch.float32)
        if critic is not None and os.path.isdir(saved):
            parallel.say(f"value model: going on from {saved}")
    elif critic is not None and os.path.isdir(saved):
        parallel.say(f"value model: {saved} is not used; with --lora_rank it starts from the policy's trunk")
    return model.eval(), critic, tokenizer


# ------------------------------------------------------------------------------------------------------------
# Saving.


def save_checkpoint(model, tokenizer, path, dtype=None, max_shard_size="5GB"):
    """Writes weights, config, tokenizer in the family's own layout; `load_model` reads them back bit for bit
    (dtype None: as they are). Adapters (LoRA) are merged into the weights.

    The folder is written under a temporary name and renamed, so that `path` is whole or absent. To be called
    on every process: the first one writes.
    """
    config, state = model.config, parallel.whole_state(model)
    if not parallel.is_first():
        return
    partial = f"{path}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    os.makedirs(partial)
    try:
        merged = merge_lora(state, parallel.lora_rank(model), dtype)
        state = {name: p.to(dtype or p.dtype) for name, p in merged.items()}
        if config.tie_word_embeddings:
            del state["head.weight"]
        save_torch_state_dict({family_name(config, name): p for name, p in state.items()}, partial,
                              max_shard_size=max_shard_size)
        give_usual_modes(partial)
        save_config(config, str(state["embed.weight"].dtype).removeprefix("torch."), partial)
        if tokenizer is not None:
            save_tokenizer(tokenizer, config, partial)
    except BaseException:  # a full disk, Ctrl-C: nothing half-written stays
        shutil.rmtree(partial, ignore_errors=True)
        raise
    shutil.rmtree(path, ignore_errors=True)
    os.rename(partial, path)


def save_config(config, dtype, folder):
    """Writes config.json as it was read, with what may have changed, the code that it names, and
    generation_config.json."""
    family = FAMILIES[config.family]
    size_name = "embedding_size" if family.names is LLADA_NAMES else "vocab_size"
    # Each of two pairs says one thing twice: transformers 5 reads `dtype` and `rope_parameters`, older ones
    # read `torch_dtype` and `rope_theta`, and without them they take a default in silence.
    changed = {"mask_token_id": config.mask_id, "block_size": config.block_size, "dtype": dtype,
               "torch_dtype": dtype, "rope_theta": config.rope_theta, size_name: config.vocab_size}
    if family.may_choose:  # what --attention or the folder's old name said
        changed["attention"] = "full" if config.is_full else "block"
    write_json(os.path.join(folder, "config.json"), config.source | changed)
    write_json(os.path.join(folder, "generation_config.json"),
               {"eos_token_id": list(config.eos_ids), "pad_token_id": config.pad_id})
    for name, content in config.files.items():
        if name.endswith(".py"):
            Path(folder, name).write_bytes(content)


def save_tokenizer(tokenizer, config, folder):
    """Writes a tokenizer. If it came with the model, its files are copied as they are."""
    if config.folder and tokenizer.name_or_path == config.folder:
        for name in config.files.keys() & set(TOKENIZER_FILES):
            Path(folder, name).write_bytes(config.files[name])
    else:
        tokenizer.save_pretrained(folder)
    spell_for_old_readers(os.path.join(folder, "tokenizer_config.json"))


def spell_for_old_readers(path):
    """Changes a tokenizer_config.json that only transformers 5 can read, so that version 4 can, too."""
    settings = read_json(path) if os.path.isfile(path) else {}
    if settings.get("tokenizer_class") == "TokenizersBackend":  # version 5's new name
        more = settings.pop("extra_special_tokens", None)
        if isinstance(more, list):  # version 4 has a list of tokens under another name
            settings["additional_special_tokens"] = more
        write_json(path, settings | {"tokenizer_class": "PreTrainedTokenizerFast"})


def give_usual_modes(folder):
    """Makes the weights of a folder readable for whoever may read other new files: safetensors writes files
    that only their owner may read."""
    probe = os.path.join(folder, "probe.partial")
    Path(probe).touch()  # its mode is that of any new file
    for name in os.listdir(folder):
        if name.endswith(".safetensors"):
            shutil.copymode(probe, os.path.join(folder, name))
    os.remove(probe)


def merge_lora(state, rank, dtype=None):
    """Adds each B A of a state to its W, in dtype (None: that of W), and drops A and B, in place -> the state
    of a plain model."""
    for name in [name for name in state if rank and name.endswith("lora_A")]:
        A, B = state.pop(name), state.pop(name.removesuffix("A") + "B")
        W = state[name.removesuffix("lora_A") + "weight"]
        merged = W.float() + parallel.LORA_ALPHA * B @ A
        state[name.removesuffix("lora_A") + "weight"] = merged.to(dtype or W.dtype)
    return state


def save_value_model(critic, folder, dtype=None):
    """Writes folder/value/model.safetensors: the backbone under the family's names (LoRA: merged), and
    value_head.weight; load_weights reads it. To be called on every process."""
    state = parallel.whole_state(critic)
    if not parallel.is_first():
        return
    head = state.pop(VALUE_HEAD)
    state = {name.removeprefix("backbone."): p for name, p in state.items()}
    merged = merge_lora(state, parallel.lora_rank(critic), dtype)
    state = {family_name(critic.config, name): p.to(dtype or p.dtype) for name, p in merged.items()}
    os.makedirs(os.path.join(folder, "value"), exist_ok=True)
    save_file({**state, VALUE_HEAD: head}, os.path.join(folder, "value", "model.safetensors"))
    give_usual_modes(os.path.join(folder, "value"))
