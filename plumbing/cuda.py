"""plumbing/cuda.py - what only a GPU needs: captured decoding steps, and memory planned before it is used.

No GPU has run this file yet. So the part that needs one is small (record, below); padding, sizes and plans
are tested on the CPU.
"""

import os
from collections import Counter

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from model import BlockDiffusionLM, flash_attn_error, flash_attn_with_kvcache
from plumbing import parallel


# On Hopper torch prefers cuDNN's attention where there is a mask. That makes a plan for every new shape (0.44
# s each, as reported for a B200), and ours change with every batch of prompts. Other kernels serve all.
torch.backends.cuda.enable_cudnn_sdp(False)
RECORD_AT = 8  # the call at which a graph is recorded: half of all sizes come up fewer times than ten


# ------------------------------------------------------------------------------------------------------------
# Decoding steps as CUDA graphs.


class Captured:
    """rollout.Decoder.denoise for a GPU: sizes rounded up to a few, a CUDA graph for each.

    A forward of 36 layers is a thousand kernels and more, which for few sequences a GPU finishes faster than
    Python starts them. A graph starts all of them at once, but only for the sizes and addresses it was
    recorded with. So sequences, commits, masked places and reach are rounded up: what is too much computes on
    idle slots, on the spare slot, or on places that are not masked, and changes nothing.

    The first calls of each sizes run as they are, so that kernels are compiled and chosen; call RECORD_AT is
    recorded; from then on it is replayed.
    """

    def __init__(self, denoise, num_slots, block_size, length, reach=256):
        self.denoise, self.num_slots, self.block_size, self.length = denoise, num_slots, block_size, length
        self.reach = reach  # keys are read up to a multiple of it; graphs are few where it is large
        self.calls, self.recorded = Counter(), {}  # by sizes: how often they came up; the replay
        self.pool = None  # the memory of all graphs

    def __call__(self, numbers, commits, num_masked, longest):
        """As denoise."""
        (_, B), (_, M) = numbers.shape, commits.shape
        lanes = min(power_of(2, B), self.num_slots)
        extra = min(power_of(4, M), lanes) if M else 0
        quarter = -(-lanes * self.block_size // 4)
        reach = min(-(-longest // self.reach) * self.reach, self.length)
        sizes = (-(-num_masked // quarter) * quarter, reach)
        numbers, commits = F.pad(numbers, (0, lanes - B)), F.pad(commits, (0, extra - M))
        commits[0, M:] = self.num_slots  # the spare slot, whose first block may be overwritten
        key = (lanes, extra, *sizes)
        self.calls[key] += 1
        if self.calls[key] < RECORD_AT:
            return self.denoise(numbers, commits, *sizes)[:, :B]
        if key not in self.recorded:
            self.recorded[key] = self.record(numbers, commits, *sizes)
        return self.recorded[key](numbers, commits)[:, :B]

    def record(self, numbers, commits, *sizes):
        """A function of (numbers, commits) that replays the step of these sizes."""
        held, graph = (numbers.clone(), commits.clone()), torch.cuda.CUDAGraph()
        # One pool for all: no two replay at once, and what one leaves is read before the next.
        self.pool = self.pool or torch.cuda.graph_pool_handle()
        with torch.cuda.graph(graph, self.pool, capture_error_mode="thread_local"):  # computes nothing
            out = self.denoise(*held, *sizes)

        def replay(*inputs):
            for kept, new in zip(held, inputs):
                kept.copy_(new)
            graph.replay()
            return out
        return replay


def power_of(base, number):
    """The smallest power of `base` that is at least `number`."""
    power = 1
    while power < number:
        power *= base
    return power


# ------------------------------------------------------------------------------------------------------------
# Memory.


MOST_LOGITS = 2**25  # that the sampler holds at a time


def free_bytes(device):
    """What this process may still take: of its GPU, or its share of the machine's main memory."""
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + cached
    available = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    if os.path.exists("/proc/meminfo"):  # Linux says it exactly
        with open("/proc/meminfo", encoding="ascii") as file:
            available = next(int(line.split()[1]) * 1024 for line in file if line.startswith("MemAvailable"))
    return available // int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def layer_bytes(config, itemsize):
    """Bytes per token of what one layer computes, about: states, q, k, v, attention, feed-forward."""
    heads = (2 * config.num_heads + 2 * config.num_kv_heads) * config.head_dim
    return (6 * config.hidden_size + heads + 3 * config.intermediate_size) * itemsize


def slot_bytes(config, length, itemsize, has_cache):
    """Bytes of one sequence of `length` tokens while it is decoded: its cache and its tables, and with full
    attention what a layer computes for the whole canvas."""
    cache = 2 * config.num_layers * config.num_kv_heads * config.head_dim * itemsize
    return length * (25 + cache * has_cache + layer_bytes(config, itemsize) * config.is_full)


def fit_slots(asked, number, per_slot, config, device):
    """How many of `number` sequences are decoded together: as many as asked (None: as fit). ValueError, with
    the numbers, before anything is decoded."""
    if asked is not None and asked < 1:
        raise ValueError(f"slots must be at least 1, got {asked}")
    logits = max(MOST_LOGITS, config.vocab_size) * 4 * 6  # of the sampler, see Decoder.propose
    free = free_bytes(device)
    most = max(0, int((0.8 * free - logits) // per_slot))  # the rest: prefill, and what fragments
    wanted = min(asked or number, number)
    if most >= wanted:
        return wanted
    if asked or not most:
        remedy = f"--slots {most} would" if most else "lower --max_new_tokens"
        raise ValueError(f"{wanted} slots of {per_slot / 2**20:,.0f} MiB each do not fit into the "
                         f"{free / 2**30:.1f} GiB that are free: {remedy}")
    return most


def plan_memory(config, args, has_critic):
    """Says what training takes of this process's memory, before the weights are read, and sets
    args.tokens_per_micro_batch if it is None. ValueError where it cannot fit, with what would."""
    device, wide = parallel.default_device(), 2 if args.dtype == "bfloat16" else 4
    with torch.device("meta"):
        model = BlockDiffusionLM(config)
    total = trained = sum(p.numel() for p in model.parameters())
    if args.lora_rank:
        linears = [m for m in model.layers.modules() if isinstance(m, nn.Linear)]
        trained = sum(args.lora_rank * (m.in_features + m.out_features) for m in linears)
    own = trained * (1 + has_critic) / parallel.processes()[1]  # with a value model, twice
    has_copy = dist.is_initialized() and not args.lora_rank  # of the whole weights, while decoding
    layer, C = layer_bytes(config, wide), config.hidden_size
    per_token = 3 * layer + config.num_layers * (C * wide if args.gradient_checkpointing else layer)
    # Logits of a chunk; the head's gradient in float32, twice; embedding, head and a gradient are whole.
    head = 3 * 4 * 2**(27 if device.type == "cuda" else 23) + config.vocab_size * C * (8 + 3 * wide)
    sizes = dict(weights=own * 4 + (total * wide if args.lora_rank else 0), states=own * 12, head=head)
    free = free_bytes(device)
    room = 0.85 * free - sum(sizes.values())
    tokens = args.tokens_per_micro_batch or max(1024, min(16384, int(room / per_token) // 1024 * 1024))
    sizes["activations"] = tokens * per_token
    cached = 0.85 * free - sizes["weights"] - sizes["states"] - has_copy * total * wide
    GB = lambda size: f"{size / 2**30:.1f}"
    parallel.say(
        f"plan: {total / 1e9:.2f} billion parameters in {args.dtype}, {parallel.processes()[1]} processes; "
        f"GiB on each: weights {GB(sizes['weights'])}, gradients and moments {GB(sizes['states'])}, head "
        f"{GB(head)}, activations {GB(sizes['activations'])} ({tokens} tokens per micro-batch); while "
        f"decoding {GB(max(cached, 0))} for sequences; free {GB(free)}")
    if sum(sizes.values()) > 0.85 * free or cached < 0:
        remedies = ["a smaller --tokens_per_micro_batch"] * (tokens > 1024)
        remedies += ["--gradient_checkpointing"] * (not args.gradient_checkpointing)
        remedies += ["--lora_rank 32"] * (not args.lora_rank) + ["more GPUs"] * (device.type == "cuda")
        needed = max(sum(sizes.values()), 0.85 * free - cached)
        raise ValueError(f"training needs {GB(needed)} GiB on each process, and may use 85 percent of the "
                         f"{GB(free)} GiB that are free: try {', '.join(remedies) or 'a smaller model'}")
    longest = args.max_prompt_tokens + args.max_new_tokens * (1 + config.block_size)  # one token a step
    if not config.is_full and longest * per_token > room:
        parallel.say(f"WARNING: {args.max_new_tokens} tokens decoded one token a step are a row of {longest} "
                     f"tokens, and rows are never cut: {GB(longest * per_token)} GiB of activations")
    args.tokens_per_micro_batch = tokens


def say_backend(model, args, dtype):
    """Says which kernels decode, and what is only nearly exact."""
    if model.device.type != "cuda":
        kernels = "torch's attention"
    elif getattr(flash_attn_error, "name", "flash_attn") != "flash_attn":  # it is there, and broken
        parallel.say(f"WARNING: flash-attn is installed but cannot be used: {flash_attn_error}")
        kernels = "torch's attention"
    else:
        reads_cache = not model.config.is_full or args.cache != "none"
        has_flash = flash_attn_with_kvcache is not None and dtype == "bfloat16" and reads_cache
        kernels = "flash-attn" if has_flash else "torch's attention"
    graphs = ", CUDA graphs" if model.device.type == "cuda" and not model.config.is_full else ""
    if args.model is not None:
        parallel.say(f"decoding on {model.device} by {kernels}{graphs}")
    if args.cache != "none":
        parallel.say(f"WARNING: --cache {args.cache} approximates: responses are drawn from another policy "
                     "than the exact one; in training, `gap` says by how much")
