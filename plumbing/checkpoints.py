"""plumbing/checkpoints.py - Hugging Face folders in and out.

One network serves all families. A family is a row of switches for model.ModelConfig and a table of weight
names; a new one that fits the network is a new row of FAMILIES.

Weights are read from safetensors only: never pickled files, never code from a checkpoint.
"""

import json
import os
import re
import shutil
from typing import NamedTuple

import torch
import torch.distributed as dist
from huggingface_hub import save_torch_state_dict, snapshot_download
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedTokenizerFast, Qwen2Tokenizer

from model import BlockDiffusionLM, ModelConfig
from plumbing import parallel

QWEN_NAMES = {  # ours -> theirs; "#" is the layer number
    "embed": "model.embed_tokens",
    "layers.#.attention_norm": "model.layers.#.input_layernorm",
    "layers.#.q_proj": "model.layers.#.self_attn.q_proj",
    "layers.#.k_proj": "model.layers.#.self_attn.k_proj",
    "layers.#.v_proj": "model.layers.#.self_attn.v_proj",
    "layers.#.o_proj": "model.layers.#.self_attn.o_proj",
    "layers.#.q_norm": "model.layers.#.self_attn.q_norm",
    "layers.#.k_norm": "model.layers.#.self_attn.k_norm",
    "layers.#.mlp_norm": "model.layers.#.post_attention_layernorm",
    "layers.#.gate_proj": "model.layers.#.mlp.gate_proj",
    "layers.#.up_proj": "model.layers.#.mlp.up_proj",
    "layers.#.down_proj": "model.layers.#.mlp.down_proj",
    "norm": "model.norm",
    "head": "lm_head",
}
LLADA_NAMES = {
    "embed": "model.transformer.wte",
    "layers.#.attention_norm": "model.transformer.blocks.#.attn_norm",
    "layers.#.q_proj": "model.transformer.blocks.#.q_proj",
    "layers.#.k_proj": "model.transformer.blocks.#.k_proj",
    "layers.#.v_proj": "model.transformer.blocks.#.v_proj",
    "layers.#.o_proj": "model.transformer.blocks.#.attn_out",
    "layers.#.mlp_norm": "model.transformer.blocks.#.ff_norm",
    "layers.#.gate_proj": "model.transformer.blocks.#.ff_proj",
    "layers.#.up_proj": "model.transformer.blocks.#.up_proj",
    "layers.#.down_proj": "model.transformer.blocks.#.ff_out",
    "norm": "model.transformer.ln_f",
    "head": "model.transformer.ff_out",
}


class Family(NamedTuple):
    """What the checkpoints of one family have in common; the fields of ModelConfig of the same name."""

    has_qk_norm: bool
    has_qkv_bias: bool
    shifts_logits: bool
    is_full: bool  # None: both exist, see read_config
    mask_id: int  # of the published checkpoints, where config.json does not say
    names: dict


FAMILIES = {  # by model_type of config.json, in lower case
    "sdar": Family(True, False, False, False, 151669, QWEN_NAMES),  # SDAR and TraDo
    "qwen3": Family(True, False, False, False, 151669, QWEN_NAMES),  # autoregressive: sft.py changes that
    "a2d-qwen3": Family(True, False, False, None, 151669, QWEN_NAMES),  # dllm's conversions of Qwen
    "a2d-qwen2": Family(False, True, False, None, 151665, QWEN_NAMES),
    "dream": Family(False, True, True, True, 151666, QWEN_NAMES),  # Dream and DiffuCoder
    "llada": Family(False, False, False, True, 126336, LLADA_NAMES),
    "mmada": Family(False, False, False, True, 126336, LLADA_NAMES),  # its text part is LLaDA
}

REFUSED = {  # model_type -> what it has that this network has not
    "fast_dllm_qwen": "block attention whose logits are shifted by one, across the blocks' borders",
    "llada2_moe": "a mixture of experts", "sdar_moe": "a mixture of experts"}

# ------------------------------------------------------------------------------------------------------------
# config.json.


LLADA_FIELDS = dict(  # Qwen's spelling of a field -> LLaDA's
    vocab_size="embedding_size", hidden_size="d_model", num_hidden_layers="n_layers",
    num_attention_heads="n_heads", num_key_value_heads="n_kv_heads", intermediate_size="mlp_hidden_size",
    tie_word_embeddings="weight_tying")


def read_config(source, block_size=None, attention=None, path=""):
    """The fields of a config.json (a dict), whichever family's spelling they have -> ModelConfig.

    attention: "block" or "full", where the family leaves it open; without it the checkpoint's name decides
    (path: bd3lm or mdlm in it). Raises ValueError for an unknown model_type, a missing field, or a variant
    the network does not have.
    """
    name = str(source.get("model_type", "none")).lower()
    if name in REFUSED:
        raise ValueError(f"model_type {name!r} is not supported: it has {REFUSED[name]}")
    architecture = (source.get("architectures") or ["Qwen3ForCausalLM"])[0]
    if name == "qwen3" and (architecture != "Qwen3ForCausalLM" or "auto_map" in source):
        raise ValueError(f"this calls itself qwen3, but is {architecture} with code of its own: another "
                         "network, which is not supported")
    if name not in FAMILIES:
        raise ValueError(f"unknown model_type {name!r} in config.json: known are {', '.join(FAMILIES)}")
    family = FAMILIES[name]
    is_llada = family.names is LLADA_NAMES
    wanted = {ours: source.get(llada if is_llada else ours) for ours, llada in LLADA_FIELDS.items()}
    wanted["vocab_size"] = wanted["vocab_size"] or source.get("vocab_size")
    wanted["num_key_value_heads"] = wanted["num_key_value_heads"] or wanted["num_attention_heads"]
    missing = [field for field, value in wanted.items() if value is None and field != "tie_word_embeddings"]
    if missing:
        raise ValueError(f"config.json of family {name!r} lacks {', '.join(missing)}")
    rope = source.get("rope_parameters") or source.get("rope_scaling") or {}
    if rope.get("rope_type", rope.get("type", "default")) != "default":
        raise ValueError(f"rope type {rope} is not supported: only plain rotary positions are")
    if source.get("use_sliding_window") or source.get("hidden_act", "silu") != "silu":
        raise ValueError("sliding windows and activations other than silu are not supported")
    is_full = find_attention(source, family, attention, path)
    mask_id, vocab_size = find_mask(source, name, wanted["vocab_size"])
    eos, pad = as_list(source.get("eos_token_id")), source.get("pad_token_id")
    theta = rope.get("rope_theta") or source.get("rope_theta") or (5e5 if is_llada else 1e6)
    return ModelConfig(
        vocab_size=vocab_size, hidden_size=wanted["hidden_size"], num_layers=wanted["num_hidden_layers"],
        num_heads=wanted["num_attention_heads"], num_kv_heads=wanted["num_key_value_heads"],
        head_dim=source.get("head_dim") or wanted["hidden_size"] // wanted["num_attention_heads"],
        intermediate_size=wanted["intermediate_size"], mask_id=mask_id, is_full=is_full,
        block_size=block_size or source.get("block_size") or (4 if family.is_full is False else 32),
        has_qk_norm=family.has_qk_norm, has_qkv_bias=family.has_qkv_bias, shifts_logits=family.shifts_logits,
        rms_norm_eps=source.get("rms_norm_eps", 1e-6), rope_theta=float(theta),
        tie_word_embeddings=bool(wanted["tie_word_embeddings"]),
        pad_id=pad if pad is not None else (eos[0] if eos else 0), eos_ids=tuple(eos),
        family=name, source=dict(source))


def find_attention(source, family, attention, path):
    """Whether every token sees every token: by family, by --attention, or by the checkpoint's name."""
    if family.is_full is not None:
        if attention not in (None, "full" if family.is_full else "block"):
            raise ValueError(f"--attention {attention} does not fit a checkpoint of {source['model_type']}")
        return family.is_full
    name = os.path.basename(os.path.normpath(path)).lower()
    by_name = "block" if "bd3lm" in name else "full" if "mdlm" in name else None
    attention = attention or source.get("attention") or by_name
    if attention is None:
        raise ValueError(f"{source['model_type']} may be of block or of full attention, and the name "
                         f"{name!r} does not say which: give --attention")
    return attention == "full"


def find_mask(source, family, vocab_size):
    """The mask token's id, and the size of the vocabulary with it."""
    if source.get("mask_token_id") is not None:
        return source["mask_token_id"], vocab_size
    usual = FAMILIES[family].mask_id
    if usual < vocab_size:
        return usual, vocab_size
    if family == "qwen3":  # autoregressive, so it has none: it gets a row of its own
        return vocab_size, vocab_size + 1
    raise ValueError(f"this checkpoint names no mask token: config.json has no mask_token_id, and {family}'s "
                     f"usual {usual} is outside its vocabulary of {vocab_size}")


def as_list(value):
    """None -> [], 3 -> [3], [3, 4] -> [3, 4]: eos ids are written in all three ways."""
    if value is None:
        return []
    return list(value) if isinstance(value, (list, tuple)) else [value]


def family_name(config, ours):
    """Our name in the family's spelling: layers.3.q_proj.weight -> model.layers.3.self_attn.q_proj.weight."""
    module, _, kind = ours.rpartition(".")
    parts, names = module.split("."), FAMILIES[config.family].names
    if parts[0] != "layers":
        return f"{names[module]}.{kind}"
    return names[f"layers.#.{parts[2]}"].replace("#", parts[1]) + f".{kind}"


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


def find_checkpoint(path_or_id, block_size=None, attention=None):
    """A folder or hub id -> (folder, ModelConfig, tokenizer or None). Errors: see load_model."""
    path = name = os.fspath(path_or_id)
    if not os.path.isdir(path):
        if os.path.exists(path) or path.startswith((".", "/", "~")) or path.count("/") != 1:
            raise FileNotFoundError(f"no checkpoint folder {path!r} (a hub id looks like JetLM/SDAR-4B-Chat)")
        path = snapshot_download(path, allow_patterns=["*.json", "*.safetensors", "*.txt", "*.jinja"])
    if not os.path.isfile(os.path.join(path, "config.json")):
        raise FileNotFoundError(f"{path} has no config.json: not a checkpoint folder")
    config = read_config(read_json(os.path.join(path, "config.json")), block_size, attention, name)
    tokenizer = load_tokenizer(path, config)
    config.eos_ids = find_eos_ids(path, config, tokenizer)
    pad_id = generation_config(path).get("pad_token_id")
    if config.source.get("pad_token_id") is None and pad_id is not None:  # as in Qwen3
        config.pad_id = pad_id
    return path, config, tokenizer


def load_model(path_or_id, block_size=None, dtype=None, device=None, attention=None):
    """Loads a checkpoint folder or hub id -> (BlockDiffusionLM, tokenizer or None).

    block_size: K, if not the checkpoint's own. dtype: of the weights in memory (default: as stored). device:
    default this process's GPU, else the CPU. attention: see read_config. Weights go one by one to where they
    are used; there is never a second copy. Raises FileNotFoundError or ValueError that names the missing
    file, weight, shape, model_type or mask token.
    """
    path, config, tokenizer = find_checkpoint(path_or_id, block_size, attention)
    model = empty_model(config)
    load_weights(model, path, dtype, device)
    return model.eval(), tokenizer


def empty_model(config):
    """A model without memory for its weights."""
    with torch.device("meta"):
        return BlockDiffusionLM(config)


def load_weights(model, folder, dtype=None, device=None):
    """Fills a model, or a value model, from the safetensors files of a folder.

    Weights on the meta device are made, on `device`; of sharded ones (parallel.shard), each process reads its
    own rows only, so that no process ever holds a whole model.
    """
    config, device = model.config, str(device or parallel.default_device())
    shards = sorted(name for name in os.listdir(folder) if name.endswith(".safetensors"))
    if not shards:
        raise FileNotFoundError(f"{folder} holds no .safetensors file (pickled weights are never read)")
    # A value model has the names of its backbone, and a head of its own.
    head, value_head = family_name(config, "head.weight"), "value_head.weight"
    ours = {value_head if name == value_head else family_name(config, name.removeprefix("backbone.")): name
            for name, _ in model.named_parameters()}
    is_policy, parameters = value_head not in ours, dict(model.named_parameters())
    found, unexpected, heads = set(), [], []
    for shard in shards:
        try:
            file = safe_open(os.path.join(folder, shard), framework="pt", device=device)
        except SafetensorError as error:
            raise ValueError(f"{folder}/{shard} is damaged ({error}): fetch it again") from None
        with file:
            for theirs in file.keys():
                where = f"{folder}: {theirs}"
                if theirs not in ours:
                    if theirs == head and is_policy:  # in the file of a tied checkpoint: compared below
                        embedding = parameters["embed.weight"]
                        heads.append(read_rows(file.get_slice(theirs), embedding, config, where))
                    elif theirs != head and not theirs.endswith(("rotary_emb.inv_freq", value_head)):
                        unexpected.append(theirs)
                    continue
                name = ours[theirs]
                if name in found:
                    raise ValueError(f"{where} is in more than one file: are these two checkpoints?")
                found.add(name)
                tensor = read_rows(file.get_slice(theirs), parameters[name], config, where)
                if isinstance(parameters[name], DTensor):
                    parameters[name].to_local().data.copy_(tensor)
                else:
                    module, _, kind = name.rpartition(".")
                    weight = torch.empty_like(tensor, dtype=dtype or tensor.dtype).copy_(tensor)
                    setattr(model.get_submodule(module), kind, nn.Parameter(weight))
    missing = [theirs for theirs, name in ours.items() if name not in found and theirs != value_head]
    if missing or unexpected:
        raise ValueError(f"{folder} does not hold a {config.family} checkpoint: "
                         f"missing {missing[:5] or 'nothing'}, unexpected {unexpected[:5] or 'nothing'}")
    if value_head in ours and value_head not in found:  # a new value model says 0 everywhere
        if isinstance(parameters[value_head], DTensor):
            nn.init.zeros_(parameters[value_head])
        else:
            model.value_head.weight = nn.Parameter(torch.zeros(1, config.hidden_size, device=device))
    if is_policy and config.tie_word_embeddings:
        model.head.weight = model.embed.weight
        embedding = model.embed.weight
        embedding = embedding.to_local() if isinstance(embedding, DTensor) else embedding
        if any(not torch.equal(tensor.to(embedding), embedding) for tensor in heads):
            raise ValueError(f"{folder}: config.json says that head and embedding are one matrix "
                             f"(tie_word_embeddings), and {head} is another one: correct config.json")


def read_rows(part, parameter, config, where):
    """The rows of a tensor in a file that this process's parameter holds: all, unless it is sharded."""
    shape, wanted = part.get_shape(), list(parameter.shape)
    rows = parallel.own_rows(parameter) if isinstance(parameter, DTensor) else slice(0, wanted[0])
    lacks_mask = (wanted[0] == config.vocab_size == shape[0] + 1 and len(wanted) == 2
                  and config.source.get("vocab_size") == shape[0])
    if shape != wanted and not lacks_mask:
        raise ValueError(f"{where} has shape {tuple(shape)}, config.json asks for {tuple(wanted)}")
    tensor = part[rows.start:min(rows.stop, shape[0])]
    if rows.stop > shape[0]:  # the mask token of an autoregressive model starts as the mean token
        tensor = torch.cat([tensor, part[:].mean(0, keepdim=True)])
    return tensor


def load_tokenizer(path, config):
    """The folder's tokenizer, or None if it has none. Never runs code from the checkpoint."""
    if os.path.isfile(os.path.join(path, "tokenizer.json")):
        return PreTrainedTokenizerFast.from_pretrained(path)
    # SDAR, Dream: Qwen2's tokenizer
    if os.path.isfile(os.path.join(path, "vocab.json")) and FAMILIES[config.family].names is QWEN_NAMES:
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


# ------------------------------------------------------------------------------------------------------------
# Saving.


def save_checkpoint(model, tokenizer, path, dtype=None, max_shard_size="5GB"):
    """Writes weights, config, tokenizer in the family's own layout; `load_model` reads them back bit for bit
    (dtype None: as they are).

    The folder is written under a temporary name and renamed, so that `path` is whole or absent. To be called
    on every process: the first one writes. LoRA: the merged weights, and the adapter alone in path/adapter,
    in the layout of the peft library.
    """
    config, state = model.config, parallel.whole_state(model)
    if not parallel.is_first():
        return
    partial, rank = f"{path}.partial", parallel.lora_rank(model)
    shutil.rmtree(partial, ignore_errors=True)
    os.makedirs(partial)
    try:
        if rank:
            save_adapter(config, state, rank, os.path.join(partial, "adapter"))
        state = {name: p.to(dtype or p.dtype) for name, p in merge_lora(state, rank, dtype).items()}
        if config.tie_word_embeddings:
            del state["head.weight"]
        save_torch_state_dict({family_name(config, name): p for name, p in state.items()}, partial,
                              max_shard_size=max_shard_size)
        save_config(config, str(state["embed.weight"].dtype).removeprefix("torch."), partial)
        if tokenizer is not None:
            tokenizer.save_pretrained(partial)
    except BaseException:  # a full disk, Ctrl-C: nothing half-written stays
        shutil.rmtree(partial, ignore_errors=True)
        raise
    shutil.rmtree(path, ignore_errors=True)
    os.rename(partial, path)


def save_config(config, dtype, folder):
    """Writes config.json as it was read, with what may have changed, and generation_config.json."""
    source = {name: value for name, value in config.source.items() if name != "auto_map"}  # (remote code)
    is_llada = FAMILIES[config.family].names is LLADA_NAMES
    if FAMILIES[config.family].is_full is None:  # what the folder's old name said
        source["attention"] = "full" if config.is_full else "block"
    source |= {"mask_token_id": config.mask_id, "block_size": config.block_size, "dtype": dtype,
               "torch_dtype": dtype, "embedding_size" if is_llada else "vocab_size": config.vocab_size}
    write_json(os.path.join(folder, "config.json"), source)
    write_json(os.path.join(folder, "generation_config.json"),
               {"eos_token_id": list(config.eos_ids), "pad_token_id": config.pad_id})


def merge_lora(state, rank, dtype=None):
    """Adds each B A of a state to its W, in dtype (None: that of W), and drops A and B, in place -> the state
    of a plain model."""
    for name in [name for name in state if rank and name.endswith("lora_A")]:
        A, B = state.pop(name), state.pop(name.removesuffix("A") + "B")
        W = state[name.removesuffix("lora_A") + "weight"]
        merged = W.float() + parallel.LORA_ALPHA * B @ A
        state[name.removesuffix("lora_A") + "weight"] = merged.to(dtype or W.dtype)
    return state


def save_adapter(config, state, rank, folder):
    """Writes the adapters of a state as adapter_model.safetensors and adapter_config.json."""
    os.makedirs(folder)
    tensors = {}
    for name, p in state.items():
        module, _, kind = name.rpartition(".")
        if kind.startswith("lora_"):
            theirs = family_name(config, f"{module}.{kind}")  # model.layers.0.self_attn.q_proj.lora_A
            tensors[f"base_model.model.{theirs}.weight"] = p.contiguous()
    save_file(tensors, os.path.join(folder, "adapter_model.safetensors"))
    targets = [re.escape(theirs).replace(r"\#", r"\d+")
               for ours, theirs in FAMILIES[config.family].names.items() if ours.endswith("_proj")]
    write_json(os.path.join(folder, "adapter_config.json"), dict(
        peft_type="LORA", task_type="CAUSAL_LM", base_model_name_or_path=None, r=rank, bias="none",
        lora_alpha=parallel.LORA_ALPHA * rank, target_modules="|".join(targets)))


def save_value_model(critic, folder, dtype=None):
    """Writes folder/value/model.safetensors: the backbone under the family's names (LoRA: merged), and
    value_head.weight; load_weights reads it. To be called on every process."""
    state = parallel.whole_state(critic)
    if not parallel.is_first():
        return
    head = state.pop("value_head.weight")
    state = {name.removeprefix("backbone."): p for name, p in state.items()}
    merged = merge_lora(state, parallel.lora_rank(critic), dtype)
    state = {family_name(critic.config, name): p.to(dtype or p.dtype) for name, p in merged.items()}
    os.makedirs(os.path.join(folder, "value"), exist_ok=True)
    save_file({**state, "value_head.weight": head}, os.path.join(folder, "value", "model.safetensors"))
