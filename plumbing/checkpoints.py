"""plumbing/checkpoints.py - Hugging Face folders in and out.

What a config.json means, and which weight has which name, is in plumbing/families.py.

Weights are read from safetensors files only. Pickled files are never read, and code from a checkpoint is
copied into what is saved, but never run.
"""

import json
import os
import shutil
from pathlib import Path

import torch
from huggingface_hub import save_torch_state_dict, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn
from torch.distributed.checkpoint import HuggingFaceStorageReader
from torch.distributed.tensor import DTensor
from transformers import PreTrainedTokenizerFast, Qwen2Tokenizer

from model import BlockDiffusionLM
from plumbing import parallel
from plumbing.families import FAMILIES, LLADA_NAMES, as_list, family_name, read_config


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
    source = read_json(os.path.join(path, "config.json"))
    tokenizer = load_tokenizer(path)
    try:
        config = read_config(source, block_size, attention, name, tokenizer)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    if block_size is None and not source.get("block_size"):
        why = "is assumed" if config.is_block_size_assumed else "is taken from the checkpoint's name"
        parallel.say(f"config.json names no block size: {config.block_size} {why}; --block_size sets another")
    # Qwen3 names its padding token here only.
    generation_path = os.path.join(path, "generation_config.json")
    generation = read_json(generation_path) if os.path.isfile(generation_path) else {}
    if source.get("pad_token_id") is None and generation.get("pad_token_id") is not None:
        config.pad_id = generation["pad_token_id"]
    config.eos_ids = find_eos_ids([*config.eos_ids, *as_list(generation.get("eos_token_id"))], tokenizer)
    config.tokenizer_state = state_of(tokenizer)
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


def state_of(tokenizer):
    """What differs if a tokenizer is not the one that was loaded, or has changed since."""
    if tokenizer is None:
        return ()
    return tokenizer.name_or_path, len(tokenizer), tokenizer.chat_template, tokenizer.special_tokens_map


def find_eos_ids(named, tokenizer):
    """Every id that ends a response: those that config.json and generation_config.json name, and those of the
    tokenizer.

    The first is the one that sft.py teaches: the end of a chat turn, where the tokenizer has such a token.
    """
    vocabulary = tokenizer.get_vocab() if tokenizer is not None else {}
    last = tokenizer.eos_token if tokenizer is not None else None
    ids_of = lambda tokens: [vocabulary[token] for token in tokens if token in vocabulary]
    return tuple(dict.fromkeys([*ids_of(["<|im_end|>", "<|eot_id|>"]), *named, *ids_of([last, "<|endoftext|>"])]))


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
    device = device or parallel.default_device()
    reader = HuggingFaceStorageReader(folder)
    stored = stored_tensors(reader, folder)
    # A value model has the names of its backbone, and a head of its own.
    theirs_of = {name: name if name == VALUE_HEAD else family_name(model.config, name.removeprefix("backbone."))
                 for name, _ in model.named_parameters()}
    head = family_name(model.config, "head.weight")
    is_policy = VALUE_HEAD not in theirs_of
    shapes = {theirs_of[name]: p.shape for name, p in model.named_parameters()}
    # Some tied checkpoints hold the matrix twice, as embedding and as head. The two must be equal.
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
    """Writes a tokenizer. If it is the one that came with the model, its files are copied as they are."""
    if state_of(tokenizer) == config.tokenizer_state:
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
    """Lets everybody read the weights who may read other new files. (safetensors makes files that only their
    owner may read.)"""
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
