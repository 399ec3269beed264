"""plumbing/machine.py - the machine of a run: its flags, which functions compute, and what it loads."""

import dataclasses
import os
import random
from dataclasses import dataclass

import torch
import torch.distributed as dist

import rollout
from plumbing import autoregressive, checkpoints, engine, kernels, memory, parallel
from plumbing.flags import setting

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
BEST_DTYPE = "bfloat16" if torch.cuda.is_available() else "float32"


@dataclass
class Machine:
    """What every command may be told about the machine."""

    plain: bool = setting(False, "compute by the definitions of the six files, without their fast twins",
                          may_change=True)
    device: str = setting(None, "None: a GPU if there is one; for the tiny model the CPU", may_change=True,
                          choices=("cpu", "cuda"))
    dtype: str = setting(BEST_DTYPE, "what layers compute in; all that lasts is float32", tiny="float32",
                         choices=("float32", "bfloat16"))
    attention: str = setting(None, "of the tiny model, or of a checkpoint that leaves it open",
                             choices=("block", "full"))
    block_size: int = setting(None, "K; None is the checkpoint's own", low=1)
    slots: int = setting(None, "sequences decoded together on a process; None: as many as fit", tiny=64,
                         low=1, may_change=True)


@dataclass
class Inference(Machine):
    """The machine of a command that only decodes."""

    cache: str = setting("none", "full attention: keep keys and values outside the block (dual) or before it "
                         "(prefix). Faster, and not the same policy", choices=engine.CACHES)


@dataclass
class Training(Machine):
    """The machine of a command that trains."""

    tokens_per_micro_batch: int = setting(None, "tokens of one forward and backward; None: as many as fit",
                                          tiny=4096, low=1, may_change=True)
    gradient_checkpointing: bool = setting(True, "compute activations again in the backward pass: slower by "
                                           "a third, fits far longer rows", tiny=False, may_change=True)
    lora_rank: int = setting(0, "train adapters of this rank; 0 trains everything", low=0)


def start_of(attention):
    """The folder of the tiny model from which a run without --model starts."""
    return os.path.join(ROOT, "assets", "tiny-full" if attention == "full" else "tiny-block")


def is_tiny(path):
    """Whether a checkpoint (None: the one in assets/) is a tiny one: for default settings."""
    if path is None:
        return True
    config = os.path.join(path, "config.json")
    if not os.path.isfile(config):
        return False
    source = checkpoints.read_json(config)
    return (source.get("hidden_size") or source.get("d_model") or 4096) <= 128


def start(args):
    """Joins the process group, by the flags of a training run."""
    parallel.start_processes(args.device, is_tiny(args.model), needs_group=args.dtype == "bfloat16")


def choose_compute(settings, model):
    """The rollout.Compute of a run: the definitions with --plain, else their fast twins."""
    tokens = getattr(settings, "tokens_per_micro_batch", None) or 4096
    if settings.plain:
        return rollout.PLAIN._replace(max_tokens=tokens)
    engine.compile_small_functions(model)
    cache = getattr(settings, "cache", "none")
    if model.device.type == "cuda" or cache != "none":
        say_backend(model, cache)
    return engine.fast(model.device, tokens, settings.slots, cache)


def self_check(model, method):
    """The replay law on a few random prompts, before the first RL step, with the kernels of this run.

    On a GPU or in bfloat16 no two kernels round alike. There this says what the gap is made of: recorded
    numbers against a replay by the definitions, and that replay against its fast twin.
    """
    config = model.config
    rng = random.Random(0)
    # K = 4 divides 64, but not 5, 9 and 30: only these show blocks that are cut in a wrong place.
    prompts = [[rng.randrange(config.vocab_size) for _ in range(n)] for n in (5, 9, 30, 64)]
    short = dataclasses.replace(
        method.decoding, max_new_tokens=min(4 * config.block_size, method.decoding.max_new_tokens))
    rollouts = rollout.generate_everywhere(model, prompts, range(4), short, method.compute)
    temperature = method.decoding.temperature
    fast = rollout.replay_differences(model, rollouts, method.compute, temperature)
    size = lambda differences: float(differences.abs().mean())
    text = f"self-check: replayed and recorded log-probabilities differ by {size(fast):.1e}"
    if model.device.type == "cuda" or not method.law.is_float32:
        plain = rollout.replay_differences(model, rollouts, rollout.PLAIN, temperature)
        text += (f"; replayed by the definitions by {size(plain):.1e}, and the two replays by "
                 f"{size(fast - plain):.1e}")
    parallel.say(text)
    method.law.enforce(gap=size(fast), gap_max=float(fast.abs().max()))


def say_backend(model, cache):
    """Says which kernels decode, and what is only nearly exact."""
    is_broken = getattr(kernels.flash_attn_error, "name", "flash_attn") != "flash_attn"
    if is_broken:
        parallel.say(f"WARNING: flash-attn is installed but cannot be used: {kernels.flash_attn_error}")
    has_cache = not model.config.is_full or cache != "none"
    name = "flash-attn" if has_cache and kernels.uses_flash(model.embed.weight) else "torch's attention"
    parallel.say(f"decoding on {model.device} by {name}")
    if cache != "none":
        parallel.say(f"WARNING: --cache {cache} approximates: responses are drawn from another policy than "
                     "the exact one")


def load_to_answer(args):
    """What answers problems -> model, tokenizer, rollout.Compute; with --ar a left-to-right model."""
    parallel.start_processes(args.device, is_tiny=args.ar is None and is_tiny(args.model))
    if args.ar:
        model, tokenizer = autoregressive.load(args.ar)
        return model, tokenizer, rollout.PLAIN._replace(generate=autoregressive.generate)
    model, tokenizer = checkpoints.load_model(args.model or start_of(args.attention), args.block_size,
                                              getattr(torch, args.dtype), attention=args.attention)
    if tokenizer is None:
        raise ValueError(f"{args.model} has no tokenizer: prompts cannot be encoded")
    return model, tokenizer, choose_compute(args, model)


def load_to_train(path, args, make_value=None):
    """A checkpoint to train, by the flags -> (model, value model or None, tokenizer), sharded over all
    processes.

    make_value: from the policy, not yet filled, to a value model (value.ValueModel). Its weights are those of
    the policy, or the folder's own in value/. Without adapters each process reads its part of every weight,
    as float32. With adapters the frozen weights stay whole on every process, in --dtype.
    """
    folder, config, tokenizer = checkpoints.find_checkpoint(path, args.block_size, args.attention)
    if tokenizer is None:
        raise ValueError(f"{path} has no tokenizer: prompts cannot be encoded")
    if not is_tiny(args.model):
        args.tokens_per_micro_batch = memory.plan(config, args, 1 if make_value is None else 2)
    dtype = getattr(torch, args.dtype)
    model = checkpoints.empty_model(config)
    for layer in model.layers:  # and so of the value model, a copy
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
            if dist.is_initialized():
                part.to_empty(device=parallel.default_device())
            source = saved if part is value_model and has_saved else folder
            checkpoints.load_weights(part, source, torch.float32)
    if has_saved:
        parallel.say(f"value model: {saved} is not used with --lora_rank" if args.lora_rank
                     else f"value model: going on from {saved}")
    return model.eval(), value_model, tokenizer
