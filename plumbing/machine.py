"""plumbing/machine.py - flags about the machine, choice of definitions or twins, loading of models."""

import dataclasses
import os
import random
from dataclasses import dataclass

import torch

import rollout
from plumbing import autoregressive, checkpoints, engine, kernels, memory, parallel, runs
from plumbing.flags import setting

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
BEST_DTYPE = "bfloat16" if torch.cuda.is_available() else "float32"


@dataclass
class Machine:
    """The flags about the machine that every command has."""

    plain: bool = setting(False, "compute by the plain definitions in the six files, not by their fast twins",
                          may_change=True)
    device: str = setting(None, "None: a GPU if there is one, but the CPU for the tiny model",
                          may_change=True, choices=("cpu", "cuda"))
    dtype: str = setting(BEST_DTYPE, "number format in which layers compute; weights that are trained are "
                         "always kept in float32", tiny="float32", choices=("float32", "bfloat16"))
    attention: str = setting(None, "which tiny model to take; or the attention of a checkpoint that leaves "
                             "it open", choices=("block", "full"))
    block_size: int = setting(None, "K, tokens per block; None: the checkpoint's own", low=1)
    slots: int = setting(None, "sequences that each process decodes together; None: as many as fit into "
                         "memory", tiny=64, low=1, may_change=True)


@dataclass
class Inference(Machine):
    """The machine of a command that only decodes."""

    cache: str = setting("none", "full attention only: reuse keys and values of tokens outside the block "
                         "(dual) or before it (prefix). Faster, but not exactly the same policy",
                         choices=engine.CACHES)


@dataclass
class Training(Machine):
    """The machine of a command that trains."""

    tokens_per_micro_batch: int = setting(None, "tokens in one forward and backward pass; None: as many as "
                                          "fit into memory, at most 16384 (--plain: 2048)", tiny=4096, low=1,
                                          may_change=True)
    gradient_checkpointing: bool = setting(True, "compute activations again in the backward pass: a third "
                                           "slower, but far longer rows fit into memory", tiny=False,
                                           may_change=True)
    lora_rank: int = setting(0, "train LoRA adapters of this rank, with the weights frozen; 0: train the "
                             "weights", low=0)


def start_of(attention):
    """The folder of the tiny model from which a run without --model starts."""
    return os.path.join(ROOT, "assets", "tiny-full" if attention == "full" else "tiny-block")


def start_path(args):
    """The checkpoint that a training run loads.

    A resumed run may find no folder at --model: it is gone, or --model is a hub id. Then this is the run's
    own newest checkpoint. With adapters --model must still be there, since its weights are frozen and not
    saved for --resume.
    """
    saved = runs.checkpoints_of(os.path.join("runs", args.name)) if args.resume else []
    if saved and args.model and not os.path.isdir(args.model) and not args.lora_rank:
        return saved[-1]
    return args.model or start_of(args.attention)


def is_tiny(path):
    """Whether a checkpoint has at most 128 channels. Then it gets the defaults for tiny models.

    None stands for the one in assets/. A hub id never counts as tiny.
    """
    if path is None:
        return True
    config = os.path.join(path, "config.json")
    if not os.path.isfile(config):
        return False
    source = checkpoints.read_json(config)
    return (source.get("hidden_size") or source.get("d_model") or 4096) <= 128


def start(args):
    """Joins the process group, as the flags of a training run ask."""
    # In bfloat16 it is FSDP2 that keeps trained weights in float32 (see parallel.shard), and FSDP2 needs a
    # process group. So a single process makes a group of one.
    parallel.start_processes(args.device, is_tiny(start_path(args)), needs_group=args.dtype == "bfloat16")


def choose_compute(settings, model, value_model=None):
    """The rollout.Compute of a run: the definitions with --plain, else their fast twins."""
    tokens = getattr(settings, "tokens_per_micro_batch", None) or 4096
    cache = getattr(settings, "cache", "none")
    if settings.plain and cache != "none":
        raise ValueError(f"the definitions know no --cache {cache}: leave out --plain or --cache")
    if settings.plain:
        return rollout.PLAIN._replace(max_tokens=tokens)
    for part in filter(None, (model, value_model)):
        engine.compile_small_functions(part)
    if model.device.type == "cuda" or cache != "none":
        say_backend(model, getattr(torch, settings.dtype), cache)
    return engine.fast(model.device, tokens, settings.slots, cache)


def self_check(model, method):
    """Checks the replay law on a few random prompts, with the kernels of this run, before the first RL step.

    On a GPU or in bfloat16 different kernels round differently. There two more numbers are printed. They say
    how far a replay by the definitions is from the recorded numbers, and how far from the fast replay.
    """
    config = model.config
    rng = random.Random(0)
    # K = 4 does not divide 5, 9 and 30. Only prompts of such lengths show blocks that are cut wrongly.
    prompts = [[rng.randrange(config.vocab_size) for _ in range(n)] for n in (5, 9, 30, 64)]
    short = dataclasses.replace(
        method.decoding, max_new_tokens=min(4 * config.block_size, method.decoding.max_new_tokens))
    rollouts = rollout.generate_everywhere(model, prompts, range(4), short, method.compute)
    temperature = method.decoding.temperature
    fast = rollout.replay_differences(model, rollouts, method.compute, temperature)
    size = lambda differences: float(differences.abs().mean())
    text = f"self-check: replayed and recorded log-probabilities differ by {size(fast):.1e} on average"
    if model.device.type == "cuda" or not method.law.is_float32:
        plain = rollout.replay_differences(model, rollouts, rollout.PLAIN, temperature)
        text += (f"; with a replay by the plain definitions they differ by {size(plain):.1e}; the two "
                 f"replays differ from each other by {size(fast - plain):.1e}")
    parallel.say(text)
    method.law.enforce(gap=size(fast), gap_max=float(fast.abs().max()))
    method.law.num_wide = 0  # only RL steps count


def say_backend(model, dtype, cache):
    """Says which attention kernels decode in this dtype, and warns of an approximate cache."""
    # ImportError.name is the module that was not found. If it is flash_attn, the package is just not there.
    is_broken = getattr(kernels.flash_attn_error, "name", "flash_attn") != "flash_attn"
    if is_broken:
        parallel.say(f"WARNING: flash-attn is installed but cannot be used: {kernels.flash_attn_error}. "
                     "Install it again, or go on with torch's attention")
    has_cache = not model.config.is_full or cache != "none"
    uses_flash = kernels.uses_flash(torch.empty(0, dtype=dtype, device=model.device))
    name = "flash-attn" if has_cache and uses_flash else "torch's attention"
    parallel.say(f"decoding on {model.device} with {name}")
    if cache != "none":
        parallel.say(f"WARNING: --cache {cache} is an approximation: responses come from a slightly "
                     "different policy. Leave it out for exact results")


def load_to_answer(args):
    """Loads a model that answers problems -> model, tokenizer, rollout.Compute. --ar: autoregressive."""
    parallel.start_processes(args.device, is_tiny=args.ar is None and is_tiny(args.model))
    if args.ar:
        model, tokenizer = autoregressive.load(args.ar, getattr(torch, args.dtype))
        return model, tokenizer, rollout.PLAIN._replace(generate=autoregressive.generate)
    model, tokenizer = checkpoints.load_model(args.model or start_of(args.attention), args.block_size,
                                              getattr(torch, args.dtype), attention=args.attention)
    if tokenizer is None:
        raise ValueError(f"{args.model} has no tokenizer to encode prompts: copy its files into the folder")
    return model, tokenizer, choose_compute(args, model)


def load_to_train(path, args, make_value=None):
    """Loads a checkpoint to train, sharded over all processes -> (model, value model or None, tokenizer).

    make_value: makes a value model of the policy (value.ValueModel). Without adapters, each process reads its
    part of every weight, as float32. The value model reads the folder's value/ if there is one, or else the
    policy's weights. With adapters, the frozen weights stay whole on every process, in --dtype, and the value
    model starts from the policy.
    """
    folder, config, tokenizer = checkpoints.find_checkpoint(path, args.block_size, args.attention)
    if tokenizer is None:
        raise ValueError(f"{path} has no tokenizer to encode prompts: copy its files into the folder")
    dtype = getattr(torch, args.dtype)
    model = checkpoints.empty_model(config)
    if not is_tiny(path):
        args.tokens_per_micro_batch = memory.plan(model, args, 1 if make_value is None else 2)
    for layer in model.layers:  # before the value model is made: it copies them
        layer.has_gradient_checkpointing = args.gradient_checkpointing
    if args.lora_rank:
        checkpoints.load_weights(model, folder, dtype)
        parallel.add_lora(model, args.lora_rank, args.seed)
    value_model = None if make_value is None else make_value(model)
    parallel.shard(model, model.layers, dtype)
    if value_model is not None:
        parallel.shard(value_model, value_model.backbone.layers, dtype)
    saved = os.path.join(folder, "value")
    has_saved = value_model is not None and os.path.isdir(saved)
    if not args.lora_rank:
        for part in (model, value_model) if value_model is not None else (model,):
            source = saved if part is value_model and has_saved else folder
            checkpoints.load_weights(part, source, torch.float32)
    if has_saved:
        parallel.say(f"value model: {saved} is not used with --lora_rank" if args.lora_rank
                     else f"value model: it starts from {saved}")
    return model.eval(), value_model, tokenizer
