"""plumbing/families.py - what a published config.json means.

One network serves all families. A family is a row of FAMILIES: switches for model.ModelConfig and a table of
weight names. For a new family that fits the network, add a row. A checkpoint that does not fit is refused,
and the message says why.

Read in this order: FAMILIES, read_config.
"""

import os
import re
from typing import NamedTuple

from model import ModelConfig

# ------------------------------------------------------------------------------------------------------------
# The families.


# The name of a module here -> its name in the files. Modules of a layer have a prefix there: the name of
# `layers`, and the number of the layer. Example: up_proj of layer 3 is model.layers.3.mlp.up_proj.
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
    """What all checkpoints of one family have in common. ModelConfig explains has_... and shifts_logits."""

    names: dict  # of modules, see above
    has_qk_norm: bool = False
    has_qkv_bias: bool = False
    shifts_logits: bool = False
    attention: str = "block"  # or "full". "": config.json, the name or --attention must say which
    may_choose: bool = False  # whether --attention may ask for the other kind
    block_size: int = 4  # K, where neither config.json nor the checkpoint's name says it
    masks: tuple = ()  # the usual mask tokens, by id or text, if neither config.json nor tokenizer names one
    architecture: str = ""  # what `architectures` in config.json must say; "": anything


# The key is the model_type of config.json, in lower case. A family that borrows another's model_type has its
# architecture as key.
#
# The last three are autoregressive, and sft.py makes block diffusion models of them. Their weights are loaded
# as they are, and attention becomes block-wise. With K = 1 they are the autoregressive networks themselves.
#
# They have no mask token. So a token id that no text uses becomes the mask token. The embedding has a row for
# it already.
# Qwen's embedding is longer than its vocabulary: the first row beyond the vocabulary is free. Llama 3
# reserves tokens for such purposes. SmolLM2 reserves none, but its vocabulary has special tokens that its
# training never met. In the model of 135M parameters, eleven such tokens have identical
# embeddings. Training on a text with one of them would have changed its row. So training never met them.
# `<empty_output>` is one of these.
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


# ------------------------------------------------------------------------------------------------------------
# config.json.


def read_config(source, block_size=None, attention=None, path="", tokenizer=None):
    """Reads a config.json (a dict) in the spelling of any family -> model.ModelConfig.

    block_size, attention ("block" or "full"): what the user asks for, or None. path: the checkpoint's name,
    which may say block size or attention. tokenizer: may name the mask token. Raises ValueError for an
    unknown model_type, a missing field, or a variant that the network does not have.
    """
    name = str(source.get("model_type", "none")).lower()
    architecture = (source.get("architectures") or [""])[0]
    if architecture.lower() in FAMILIES:
        name = architecture.lower()
    vocabulary = tokenizer.get_vocab() if tokenizer is not None else {}
    # Transformers 5 writes the rope type and rope_theta into rope_parameters. Older versions write the type
    # into rope_scaling, and rope_theta as a field of its own.
    rope = (source.get("rope_parameters") or {}) | (source.get("rope_scaling") or {})
    refuse_other_networks(source, name, architecture, vocabulary, rope)
    family = FAMILIES[name]
    is_llada = family.names is LLADA_NAMES
    wanted = {ours: source.get(llada if is_llada else ours) for ours, llada in LLADA_FIELDS.items()}
    wanted["vocab_size"] = wanted["vocab_size"] or source.get("vocab_size")
    wanted["num_key_value_heads"] = wanted["num_key_value_heads"] or wanted["num_attention_heads"]
    missing = [key for key, value in wanted.items() if value is None and key != "tie_word_embeddings"]
    if missing:
        raise ValueError(f"config.json of family {name!r} lacks {', '.join(missing)}: add it, or fetch the "
                         "file again")
    is_full = find_attention(source, family, attention, path) == "full"
    named = re.search(r"-b(\d+)$", os.path.basename(os.path.normpath(path)))  # JetLM/SDAR-8B-Chat-b32
    own_size = source.get("block_size") or (int(named[1]) if named and not is_full else None)
    eos = as_list(source.get("eos_token_id"))
    pad = source.get("pad_token_id")
    theta = rope.get("rope_theta") or source.get("rope_theta") or 1e4  # the default of transformers
    return ModelConfig(
        vocab_size=wanted["vocab_size"], hidden_size=wanted["hidden_size"],
        num_layers=wanted["num_hidden_layers"], num_heads=wanted["num_attention_heads"],
        num_kv_heads=wanted["num_key_value_heads"],
        head_dim=source.get("head_dim") or wanted["hidden_size"] // wanted["num_attention_heads"],
        intermediate_size=wanted["intermediate_size"], is_full=is_full,
        mask_id=find_mask(source, name, wanted["vocab_size"], tokenizer, vocabulary),
        block_size=block_size or own_size or family.block_size,
        has_qk_norm=family.has_qk_norm, has_qkv_bias=family.has_qkv_bias, shifts_logits=family.shifts_logits,
        rms_norm_eps=source.get("rms_norm_eps", 1e-6), rope_theta=float(theta),
        tie_word_embeddings=bool(wanted["tie_word_embeddings"]),
        pad_id=pad if pad in range(wanted["vocab_size"]) else (eos[0] if eos else 0), eos_ids=tuple(eos),
        family=name, source=dict(source))


def refuse_other_networks(source, name, architecture, vocabulary, rope):
    """ValueError for a checkpoint that needs another network, or another way of decoding."""
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    has_experts = any(value and ("expert" in key or key.startswith("moe_")) for key, value in source.items())
    usual = FAMILIES[name].architecture if name in FAMILIES else ""
    has_code = "auto_map" in source
    is_other = usual != "" and architecture not in ("", usual)
    reasons = {  # what is not supported -> whether the checkpoint has it
        "a mixture of experts": has_experts or "moe" in name,
        f"architecture {architecture or 'unnamed'} in place of {usual}": is_other,
        "code of its own": has_code and usual != "",
        f"rotary positions of rope type {rope_type!r} instead of the plain ones": rope_type != "default",
        "tokens <|expand|> and <|delete|>, by which its text grows and shrinks (DreamOn)":
            {"<|expand|>", "<|delete|>"} <= vocabulary.keys(),
        "sliding windows": source.get("use_sliding_window"),
        f"the activation {source.get('hidden_act')}, not silu": source.get("hidden_act", "silu") != "silu",
    }
    for reason, is_so in reasons.items():
        if is_so:
            raise ValueError(f"this {name} checkpoint is not supported, since it has {reason}")
    if name not in FAMILIES:
        raise ValueError(f"unknown model_type {name!r} in config.json: the known ones are "
                         f"{', '.join(FAMILIES)}")


def find_attention(source, family, asked, path):
    """"block" or "full".

    Some families have only one kind of attention. For the others --attention, config.json, the family's
    default and the name are asked, in this order.
    """
    if not family.may_choose:
        if asked not in (None, family.attention):
            raise ValueError(f"--attention {asked} does not fit a checkpoint of {source['model_type']}. Its "
                             f"attention is always {family.attention}: leave the flag out")
        return family.attention
    name = os.path.basename(os.path.normpath(path)).lower()
    by_name = "block" if "bd3lm" in name else "full" if "mdlm" in name else ""
    attention = asked or source.get("attention") or family.attention or by_name
    if not attention:
        raise ValueError(f"a checkpoint of {source['model_type']} may have block or full attention, and the "
                         f"name {name!r} does not say which: give --attention block, or full")
    return attention


def find_mask(source, name, vocab_size, tokenizer, vocabulary):
    """The mask token's id: what config.json says, else what the tokenizer says, else the family's usual one.

    The usual one must have a row in the embedding, and must be no token of ordinary text. Raises ValueError
    if there is none.
    """
    if source.get("mask_token_id") is not None:
        return source["mask_token_id"]
    ordinary = set()
    if tokenizer is not None:
        if tokenizer.mask_token_id is not None:
            return tokenizer.mask_token_id
        special = {token for token, added in tokenizer.added_tokens_decoder.items() if added.special}
        ordinary = set(vocabulary.values()) - special
    for usual in FAMILIES[name].masks:
        token = vocabulary.get(usual) if isinstance(usual, str) else usual
        if token is not None and token < vocab_size and token not in ordinary:
            return token
    raise ValueError(
        f"this {name} checkpoint names no mask token, and none of the usual ones {FAMILIES[name].masks} is "
        f"free in its vocabulary of {vocab_size}: choose a token that occurs in no text, and write its id "
        "into config.json as mask_token_id")


def as_list(value):
    """None -> [], 3 -> [3], [3, 4] -> [3, 4]: eos ids are written in all three ways."""
    if value is None:
        return []
    return list(value) if isinstance(value, (list, tuple)) else [value]


VALUE_HEAD = "value_head.weight"  # the same name here and in the files


def family_name(config, ours):
    """The name of a weight here -> its name in the family's files.

    layers.3.q_proj.weight -> model.layers.3.self_attn.q_proj.weight, in most families.
    The weights of a value model have the names of its backbone. Only its head has a name of its own.
    """
    if ours == VALUE_HEAD:
        return ours
    names = FAMILIES[config.family].names
    parts = ours.removeprefix("backbone.").split(".")
    if parts[0] == "layers":
        _, number, module, kind = parts
        return f"{names['layers']}.{number}.{names[module]}.{kind}"
    return f"{names[parts[0]]}.{parts[1]}"
