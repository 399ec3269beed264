"""plumbing/checkpoints.py - reads and writes checkpoints in the Hugging Face layout.

What a config.json means, and which weight has which name, is in plumbing/families.py.

Weights are read from safetensors files only, and never from pickled files. Code in a checkpoint folder is
copied into the folders that are saved. It is never run.
"""

import json
import os
from pathlib import Path

import torch
from huggingface_hub import save_torch_state_dict, snapshot_download
from safetensors import SafetensorError, safe_open
from torch.distributed.checkpoint import HuggingFaceStorageReader
from transformers import PreTrainedTokenizerFast, Qwen2Tokenizer

from model import BlockDiffusionLM
from plumbing import parallel
from plumbing.families import FAMILIES, VALUE_HEAD, as_list, family_name, read_config


def read_json(path):
    """The content of a JSON file. ValueError that names the file if it is damaged."""
    try:
        with open(path, encoding="utf-8") as file:
            return json.load(file)
    except ValueError as error:  # broken JSON, or bytes that are not UTF-8
        raise ValueError(f"{path} is damaged ({error}): restore it, or fetch the checkpoint again") from None


def write_json(path, value):
    """Writes a value as JSON, indented so that people can read it."""
    with open(path, "w", encoding="utf-8") as file:
        json.dump(value, file, indent=2)


# ------------------------------------------------------------------------------------------------------------
# Loading.


SMALL_FILES = (".json", ".txt", ".model", ".jinja", ".py")  # of a checkpoint: configuration, tokenizer, code


def find_checkpoint(path_or_id, block_size=None, attention=None):
    """A folder or hub id -> (folder, ModelConfig, tokenizer or None). Errors: see load_model."""
    name = os.fspath(path_or_id)
    path = name if os.path.isdir(name) else download(name)
    if not os.path.isfile(os.path.join(path, "config.json")):
        raise FileNotFoundError(f"{path} has no config.json: give the folder of a checkpoint")
    source = read_json(os.path.join(path, "config.json"))
    tokenizer = load_tokenizer(path)
    config = read_config(source, block_size, attention, name, tokenizer)
    if block_size is None and not source.get("block_size"):
        is_named = not config.is_full and os.path.normpath(name).endswith(f"-b{config.block_size}")
        origin = "was read from the checkpoint's name" if is_named else "is the usual one of this family"
        parallel.say(f"config.json names no block size. K = {config.block_size} {origin}. A wrong K gives no "
                     "error, but with block attention little is learnt: see --block_size")
    # Qwen3 names its padding token in generation_config.json only.
    generation_path = os.path.join(path, "generation_config.json")
    generation = read_json(generation_path) if os.path.isfile(generation_path) else {}
    ids = range(config.vocab_size)
    if source.get("pad_token_id") not in ids and generation.get("pad_token_id") in ids:
        config.pad_id = generation["pad_token_id"]
    config.eos_ids = find_eos_ids([*config.eos_ids, *as_list(generation.get("eos_token_id"))], tokenizer)
    if not set(config.eos_ids) - {config.mask_id}:
        parallel.say(f"WARNING: {path} names no eos token, so no response can end, and all count as wrong: "
                     "write eos_token_id into config.json")
    config.files = {file_name: Path(path, file_name).read_bytes() for file_name in os.listdir(path)
                    if file_name.endswith(SMALL_FILES) and not file_name.endswith(".index.json")}
    return path, config, tokenizer


def download(name):
    """The local copy of a hub id's folder. FileNotFoundError if there is none."""
    if name.startswith((".", "/", "~")) or name.count("/") != 1:
        raise FileNotFoundError(f"no checkpoint folder {name!r} (a hub id looks like JetLM/SDAR-4B-Chat)")
    try:
        return snapshot_download(name, allow_patterns=["*.safetensors", *(f"*{end}" for end in SMALL_FILES)])
    except (OSError, ValueError) as error:  # no such id, no access, no network
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


def find_eos_ids(named, tokenizer):
    """Every token id that ends a response -> tuple.

    named: the ids that config.json and generation_config.json name. The tokenizer may name more. The first id
    of the tuple is the one that sft.py teaches: the end of a chat turn, if the tokenizer has such a token.
    """
    vocabulary = tokenizer.get_vocab() if tokenizer is not None else {}
    ids = [vocabulary.get("<|im_end|>"), vocabulary.get("<|eot_id|>"), *named,
           getattr(tokenizer, "eos_token_id", None), vocabulary.get("<|endoftext|>")]
    return tuple(dict.fromkeys(token for token in ids if token is not None))


def load_model(path_or_id, block_size=None, dtype=None, device=None, attention=None):
    """Loads a checkpoint folder or hub id -> (BlockDiffusionLM, tokenizer or None).

    block_size: K; None is the checkpoint's own. dtype: of the weights in memory; None is the stored one.
    device: None is parallel.default_device(). attention: see read_config. Raises FileNotFoundError or
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


def load_weights(model, folder, dtype=None, device=None):
    """Fills a model, or a value model, from the safetensors files of a folder.

    Torch's reader fills one tensor after the other. If the weights are sharded (parallel.shard), each process
    reads only its own part. Weights on the meta device have no memory yet. They get it on `device`, in
    `dtype`. None is the stored dtype. If the files hold several, the widest one is taken.
    """
    reader = HuggingFaceStorageReader(folder)
    stored = stored_tensors(reader, folder)
    theirs_of = {name: family_name(model.config, name) for name, _ in model.named_parameters()}
    shapes = {theirs_of[name]: p.shape for name, p in model.named_parameters()}
    # The files may hold the policy's head although nobody reads it. If embedding and head are one matrix, the
    # files may hold it twice. And a value model has no use for the policy's head.
    check_stored(stored, shapes, family_name(model.config, "head.weight"), model.config, folder)
    if next(model.parameters()).is_meta:
        kept = [stored[name].properties.dtype for name in shapes if name in stored]
        model.to(dtype or max(kept, key=lambda one: one.itemsize))
        model.to_empty(device=device or parallel.default_device())
    state = {theirs: model.get_parameter(name).data for name, theirs in theirs_of.items()}
    if VALUE_HEAD in state and VALUE_HEAD not in stored:  # a new value model gives 0 everywhere
        state.pop(VALUE_HEAD).zero_()
    parallel.load(state, storage_reader=reader)
    if VALUE_HEAD not in shapes and model.config.tie_word_embeddings:
        model.head.weight = model.embed.weight


def stored_tensors(reader, folder):
    """What the files of a folder hold: name -> its size, its dtype (in .properties) and its pieces (.chunks).

    FileNotFoundError if there is no file. ValueError that names a damaged file.
    """
    files = sorted(Path(folder).glob("*.safetensors"))
    if not files:
        raise FileNotFoundError(f"{folder} holds no .safetensors file: convert its weights to safetensors "
                                "(pickled weights are never read)")
    for file in files:
        try:
            safe_open(file, framework="pt")  # this compares the file's length with its table of contents
        except SafetensorError as error:
            raise ValueError(f"{file} is damaged ({error}): fetch it again") from None
    return reader.read_metadata().state_dict_metadata


def check_stored(stored, shapes, head, config, folder):
    """ValueError unless the files hold every tensor of `shapes` in its shape, and no unknown tensor.

    A value model's head may be missing. The policy's `head` may be in the files without being read.
    """
    missing = sorted(shapes.keys() - stored.keys() - {VALUE_HEAD})
    unexpected = sorted(name for name in stored.keys() - shapes.keys() - {head, VALUE_HEAD}
                        if not name.endswith("rotary_emb.inv_freq"))
    if missing or unexpected:
        raise ValueError(f"{folder} does not hold a {config.family} checkpoint: "
                         f"missing {missing[:5] or 'nothing'}, unexpected {unexpected[:5] or 'nothing'}. "
                         "Is a file missing, or model_type in config.json wrong?")
    for name in sorted(shapes.keys() & stored.keys()):
        if stored[name].size != shapes[name]:
            raise ValueError(f"{folder}: {name} has shape {tuple(stored[name].size)}, config.json asks for "
                             f"{tuple(shapes[name])}: take both files from one checkpoint")


# ------------------------------------------------------------------------------------------------------------
# Saving.


def save_checkpoint(model, tokenizer, folder, dtype=None, max_shard_size="5GB"):
    """Writes weights, config.json and tokenizer in the layout of the model's family.

    Tokenizer files and code that came with the model are written as they were. If no tokenizer came with it,
    `tokenizer` is written. For the weights see save_weights.
    """
    config = model.config
    save_weights(model, folder, dtype, max_shard_size)
    if not parallel.is_first():
        return
    for name, content in config.files.items():  # of the source; its config.json is replaced below
        Path(folder, name).write_bytes(content)
    if tokenizer is not None and "tokenizer_config.json" not in config.files:
        tokenizer.save_pretrained(folder)
    save_config(config, dtype or model.embed.weight.dtype, folder)


def save_weights(model, folder, dtype=None, max_shard_size="5GB"):
    """Writes the weights of a model, or of a value model, under the names of its family.

    dtype: of the written weights. With None they keep their own, and `load_weights` reads the same bits
    again. Adapters (LoRA) are merged into the weights. To be called on every process: only the first one
    writes.
    """
    state = merge_lora(parallel.whole_state(model), dtype)
    if not parallel.is_first():
        return
    if model.config.tie_word_embeddings:
        state.pop("head.weight", None)
    written = {}
    for name in list(state):  # taken out one by one, so that memory never holds all weights in both dtypes
        p = state.pop(name)
        written[family_name(model.config, name)] = p.to(dtype or p.dtype)
    os.makedirs(folder, exist_ok=True)
    save_torch_state_dict(written, folder, max_shard_size=max_shard_size)
    for path in Path(folder).glob("*.safetensors"):
        # safetensors lets only the owner read its files. Here, whoever may read the folder may read the
        # files.
        path.chmod(os.stat(folder).st_mode & 0o666)


def save_config(config, dtype, folder):
    """Writes config.json as it was read, with a few fields changed or added; also generation_config.json."""
    family = FAMILIES[config.family]
    dtype = str(dtype).removeprefix("torch.")
    # Two settings have two names each. Transformers 5 writes `dtype` and `rope_parameters`, and also reads
    # `rope_theta`. Older versions read only `torch_dtype` and `rope_theta`. If a version does not find the
    # name that it reads, it silently takes a default. So all but `rope_parameters` are written.
    changed = {"mask_token_id": config.mask_id, "block_size": config.block_size, "dtype": dtype,
               "torch_dtype": dtype, "rope_theta": config.rope_theta}
    if family.may_choose:  # known only from --attention or the source folder's name, so it is written down
        changed["attention"] = "full" if config.is_full else "block"
    write_json(os.path.join(folder, "config.json"), config.source | changed)
    write_json(os.path.join(folder, "generation_config.json"),
               {"eos_token_id": list(config.eos_ids), "pad_token_id": config.pad_id})


def merge_lora(state, dtype=None):
    """Turns the state of a model with adapters into that of a plain model, in place: W becomes W + 2 B A.

    A and B are dropped. dtype: of the sums; None keeps that of W. (2 is parallel.LORA_SCALE.)
    """
    for name in [name for name in state if name.endswith("lora_A")]:
        linear = name.removesuffix("lora_A")
        W = state[f"{linear}weight"]
        merged = W.float() + parallel.LORA_SCALE * state.pop(f"{linear}lora_B") @ state.pop(name)
        state[f"{linear}weight"] = merged.to(dtype or W.dtype)
    return state
