"""plumbing/memory.py - how many sequences, and how many tokens of a micro-batch, fit into memory."""

import os
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

from plumbing import parallel


def most_logits(device, is_training=False):
    """How many float32 logits may exist at a time. 2**25 of them are 128 MiB.

    On a GPU more may exist, so there are fewer chunks. Every chunk reads the head's weight again, and in
    training also the weight's gradient. So a few large chunks are faster.
    """
    if device.type == "cuda":
        return 2**27 if is_training else 2**26
    return 2**23 if is_training else 2**25


def free_bytes(device):
    """How many bytes this process may still take of its GPU, or of its part of the main memory."""
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + cached
    available = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2  # a guess: half of it is free
    if os.path.exists("/proc/meminfo"):  # Linux says how much is free
        lines = Path("/proc/meminfo").read_text().splitlines()
        available = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    limit = Path("/sys/fs/cgroup/memory.max")  # of a container: a number of bytes, or the word max
    if limit.exists() and limit.read_text().strip().isdigit():
        # Memory that only caches files does not count, as it can be freed. "anon" is the memory of processes.
        used = dict(line.split() for line in limit.with_name("memory.stat").read_text().splitlines())
        available = min(available, int(limit.read_text()) - int(used["anon"]))
    return available // int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def layer_bytes(config, itemsize):
    """About how many bytes one layer computes per token: states, q, k, v, attention, feed-forward."""
    heads = (2 * config.num_heads + 2 * config.num_kv_heads) * config.head_dim
    return (6 * config.hidden_size + heads + 3 * config.intermediate_size) * itemsize


def slot_bytes(config, length, itemsize, has_cache):
    """Bytes of one sequence of `length` tokens while it is decoded.

    They are its cache and its tables, and with full attention what a layer computes for the whole text.
    """
    cache = 2 * config.num_layers * config.num_kv_heads * config.head_dim * itemsize
    # 25 bytes: one entry in each of the five tables of engine.Decoder, 8 + 1 + 8 + 4 + 4.
    return length * (25 + cache * has_cache + layer_bytes(config, itemsize) * config.is_full)


def fit_slots(asked, number, per_slot, config, device):
    """How many of `number` sequences are decoded together: as many as `asked`; None is as many as fit.

    Fewer than `asked` may fit. From the second RL step on, for example, the optimizer's moments take memory.
    The results are the same up to rounding, so this is printed, and is no error. ValueError if not even one
    fits.
    """
    wanted = min(asked or number, number)
    # Each slot needs the logits of one block. The sampler computes them in parts: at most `most_logits` at a
    # time, but at least those of one position. It holds about six float32 copies of one part.
    at_once = min(max(most_logits(device), config.vocab_size), wanted * config.block_size * config.vocab_size)
    logits = at_once * 4 * 6
    if device.type == "cuda":
        logits *= 2  # CUDA graphs have memory of their own
        torch.cuda.empty_cache()  # torch keeps small pieces, and the cache needs a few large ones
    free = free_bytes(device)
    most = int((0.8 * free - logits) // per_slot)  # a fifth is left for prefill and fragments
    if most < 1:
        raise ValueError(f"not one sequence of {per_slot / 2**20:,.0f} MiB fits into the "
                         f"{free / 2**30:.1f} GiB that are free: lower --max_new_tokens")
    if asked and most < wanted:
        parallel.say(f"--slots {asked}: {most} of these sequences, {per_slot / 2**20:,.0f} MiB each, fit "
                     f"into the {free / 2**30:.1f} GiB that are free. So only {most} are decoded together")
    return min(most, wanted)


def plan(model, args, num_models):
    """Prints how much memory training takes, before the weights are read -> tokens per micro-batch.

    model: only its shapes count. num_models: 2 with a value model, else 1. ValueError if training does not
    fit; it says what would help.
    """
    device = parallel.default_device()
    config = model.config
    wide = 2 if args.dtype == "bfloat16" else 4  # bytes of a number while layers compute
    total = sum(p.numel() for p in model.parameters())
    trained = total
    if args.lora_rank:
        linears = [m for m in model.layers.modules() if isinstance(m, nn.Linear)]
        trained = sum(args.lora_rank * (m.in_features + m.out_features) for m in linears)
    own = trained * num_models / parallel.processes()[1]
    has_copy = dist.is_initialized() and not args.lora_rank  # decoding needs a copy of the whole weights
    layer = layer_bytes(config, wide)
    kept = config.hidden_size * wide if args.gradient_checkpointing else layer  # until backward
    per_token = 3 * layer + config.num_layers * kept
    # For the head there must be room for three copies of a chunk's logits, and for two copies of the head's
    # gradient, all in float32. On top come the whole embedding, the whole head and the gradient of one of
    # them, in --dtype: they are not sharded while layers compute.
    head = 3 * 4 * most_logits(device, is_training=True)
    head += config.vocab_size * config.hidden_size * (8 + 3 * wide)
    sizes = dict(weights=own * 4 + (total * wide if args.lora_rank else 0), moments=own * 12, head=head)
    free = free_bytes(device)
    room = 0.85 * free - sum(sizes.values())
    most = 2048 if args.plain else 16384  # the definition holds the logits of a whole micro-batch
    tokens = args.tokens_per_micro_batch or max(1024, min(most, int(room / per_token) // 1024 * 1024))
    sizes["activations"] = tokens * per_token
    cached = 0.85 * free - sizes["weights"] - sizes["moments"] - has_copy * total * wide
    GB = lambda size: f"{size / 2**30:.1f}"
    parallel.say(
        f"plan: {total / 1e9:.2f} billion parameters in {args.dtype}, blocks of {config.block_size}, "
        f"{parallel.processes()[1]} processes. GiB on each process: weights "
        f"{GB(sizes['weights'])}, gradients and moments {GB(sizes['moments'])}, head "
        f"{GB(head)}, activations {GB(sizes['activations'])} ({tokens} tokens per micro-batch). While "
        f"decoding, {GB(max(cached, 0))} are left for sequences. Now {GB(free)} are free")
    if sum(sizes.values()) > 0.85 * free or cached < 0:
        needed = max(sum(sizes.values()), 0.85 * free - cached)
        raise ValueError(f"training needs {GB(needed)} GiB on each process, and may use 85 percent of the "
                         f"{GB(free)} GiB that are free: try --lora_rank 32, "
                         "--gradient_checkpointing (if it is off), a smaller --tokens_per_micro_batch, "
                         "more GPUs, or a smaller model")
    # The longest row: with one token per denoising step, each new token adds itself and a view of K tokens.
    longest = args.max_prompt_tokens + args.max_new_tokens * (1 + config.block_size)
    has_steps = hasattr(args, "group_size")  # sft.py mostly has one view per block, and not one per step
    if has_steps and not config.is_full and longest * per_token > room:
        parallel.say(f"WARNING: a response of {args.max_new_tokens} tokens, decoded one token a step, makes "
                     f"a row of {longest} tokens with {GB(longest * per_token)} GiB of activations. Rows are "
                     "never cut: if memory runs out, lower --max_new_tokens")
    return tokens

