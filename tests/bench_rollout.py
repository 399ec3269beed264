"""bench_rollout.py - what decoding costs, beside two plain loops and beside the machine's own limit.

    python tests/bench_rollout.py                        # 34M parameters, 1, 8, 64 and 256 prompts at once
    python tests/bench_rollout.py --quick                # shorter: three minutes for 0.6B on a GPU
    python tests/bench_rollout.py --preset 4B            # for a GPU; also 0.6B, 1.7B, 8B
    python tests/bench_rollout.py --preset tiny --batches 1 64 --prompt_tokens 8 --max_new_tokens 20
    python tests/bench_rollout.py --attention full       # the approximate caches, prefix and dual

What is compared, in turns; numbers are medians: engine         plumbing/engine.py, with 1, 8, ... prompts at
  once definition     rollout.generate, one prompt after the other transformers   what one writes in an
  afternoon: transformers' Qwen3 with the same weights and its DynamicCache, one prompt, one forward per
  denoising step and one for each finished block

For each number of prompts: tokens per second; tokens per denoising step; forwards, which are the denoising
steps of the longest response; times the rate of each loop; percent of the limit; and how often the host reads
from the device per forward. On a GPU also kernels per forward, and the part of the time in which the GPU
waits for the host. Another line says what the cache gains, beside an engine that computes the whole text at
every step.

The limit: decoding takes no less time than its matrix products, at the rate that this machine reaches on
products of these widths and this many rows. It takes no less than the reading of the weights and of the
cache, at the rate of a copy. Attention, sampling and bookkeeping are not in the limit. The last lines say
what an RL step of an 8B model on 8 such devices would take: computed, see bench_update.step_seconds.

--attention full measures something else: the rate with each cache, and its gap. The gap is the mean distance
of the recorded log-probabilities from a replay, in nats. Give a trained --model for that: the
log-probabilities of a random one do not depend on the text.

Weights are random but for one token's, see `make_model`. A dynamic step (threshold 0.5) reveals about 1.6
tokens of a block of 4.
"""

import argparse
import math
import sys
import warnings
from pathlib import Path
from statistics import fmean, median

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch
import torch.nn.functional as F
import transformers
from torch.utils._python_dispatch import TorchDispatchMode

import model as lm
import rollout
from bench_update import (
    PRESETS, SLOTS, attend_densely, copy_rate, counts, preset_config, print_step, processor_name, timed)
from plumbing import checkpoints, engine, parallel
from rollout import Decoding

# transformers' newest versions call it `cache`; older ones do not know that name.
warnings.filterwarnings("ignore", "`past_key_values` is deprecated")

# ------------------------------------------------------------------------------------------------------------
# What is measured.


def make_model(preset, device, is_full=False):
    """A random model that draws one token with probability 0.55 everywhere, and all others alike.

    So its confidences do not depend on the text, and every response decodes equally fast, as those of a
    trained model do on the whole.
    """
    torch.manual_seed(0)
    config = preset_config(preset, 32 if is_full else 4)
    config.is_full = is_full
    with torch.device(device):
        model = lm.BlockDiffusionLM(config)
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() > 1:
                p.normal_(std=0.02)
            else:
                p.fill_(1.0)
        model.embed.weight.add_(1.0)  # a part that all states share, and that survives the layers
        tokens = torch.randint(3, config.vocab_size, (1, 64), device=device)
        position = torch.arange(64, device=device)[None]
        layout = lm.Layout.clean(position, 4, False)
        states = model.states(tokens, position, lm.attend_by_rule(layout))[0]  # (64, C)
        shared = states.mean(0)
        others = model.head(states).logsumexp(-1).mean()  # of all logits
        model.head.weight[5] = shared * (others + math.log(0.55 / 0.45)) / shared.square().sum()
    return model.to(torch.bfloat16 if device.type == "cuda" else torch.float32).eval()


class TransformersLoop:
    """One prompt at a time, by transformers."""

    def __init__(self, model):
        c = model.config
        with torch.device(model.device):
            self.model = transformers.Qwen3ForCausalLM(transformers.Qwen3Config(
                vocab_size=c.vocab_size, hidden_size=c.hidden_size, intermediate_size=c.intermediate_size,
                num_hidden_layers=c.num_layers, num_attention_heads=c.num_heads, head_dim=c.head_dim,
                num_key_value_heads=c.num_kv_heads, rope_theta=c.rope_theta, rms_norm_eps=c.rms_norm_eps,
                tie_word_embeddings=c.tie_word_embeddings, attn_implementation="sdpa"))
        state = {checkpoints.family_name(c, name): p for name, p in model.state_dict().items()}
        self.model.load_state_dict(state)
        self.model.to(model.embed.weight.dtype).eval()
        self.config = c

    @torch.no_grad()
    def generate(self, prompt, decoding):
        """Decodes one response -> its number of denoising steps."""
        K = self.config.block_size
        mask_id = self.config.mask_id
        start, end = rollout.decoded_span(len(prompt), decoding.max_new_tokens, self.config)
        text = torch.full((1, end), mask_id, device=self.model.device)
        text[0, :len(prompt)] = torch.tensor(prompt, device=self.model.device)
        cache = transformers.DynamicCache()
        if start:
            block = torch.arange(start, device=self.model.device) // K
            self.forward(text[:, :start], 0, cache, (block[None] <= block[:, None])[None, None])
        num_steps = 0
        for start in range(start, end, K):
            window = text[:, start:start + K]
            is_masked = window[0] == mask_id  # (K,)
            while is_masked.any():
                logits = self.forward(window, start, cache)[0].float()  # (K, V)
                cache.crop(-K)
                logits[:, mask_id] = -torch.inf
                p = logits.softmax(-1)
                token = torch.multinomial(p, 1)  # (K, 1)
                confidence = p.gather(-1, token)[:, 0].masked_fill(~is_masked, -1)
                is_kept = (confidence > decoding.threshold) & is_masked
                if decoding.strategy == "static" or not is_kept.any():
                    is_kept = torch.zeros_like(is_kept)
                    is_kept[confidence.argmax()] = True
                window[0, is_kept] = token[is_kept, 0]
                is_masked = is_masked & ~is_kept
                num_steps += 1
            self.forward(window, start, cache)  # the finished block stays in the cache
        return num_steps

    def forward(self, tokens, start, cache, mask=None):
        """Logits (1, T, V); keys and values go to the cache. mask None: everything is seen."""
        T = tokens.shape[1]
        position = torch.arange(start, start + T, device=tokens.device)[None]
        if mask is None:
            mask = torch.ones(1, 1, T, start + T, dtype=torch.bool, device=tokens.device)
        return self.model(input_ids=tokens, position_ids=position, past_key_values=cache, use_cache=True,
                          attention_mask=mask).logits


class WithoutCache(engine.Decoder):
    """The engine, but every step computes the whole text up to the end of the block again."""

    def states(self, columns, commits, longest):
        """As engine.Decoder.states; nothing is committed."""
        B = len(columns)
        position = torch.arange(longest, device=self.device).expand(B, -1)
        layout = lm.Layout.clean(position, self.config.block_size, False)
        states = self.model.states(self.token[:B, :longest], position, attend_densely(layout))
        return states.gather(1, columns[..., None].expand(-1, -1, states.shape[-1]))


def generate_without_cache(*arguments):
    """engine.generate by that decoder."""
    usual = engine.Decoder
    engine.Decoder = WithoutCache
    try:
        return engine.generate(*arguments)
    finally:
        engine.Decoder = usual


# ------------------------------------------------------------------------------------------------------------
# What a forward costs the host, and the limit.


TOLIST = torch.Tensor.tolist  # reads past the dispatcher


class CountReads(TorchDispatchMode):
    """Counts how often the host waits for a number from the device."""

    # Else torch would run compiled functions uncompiled in here, and ever after.
    ignore_compile_internals = classmethod(lambda cls: True)

    def __init__(self):
        super().__init__()
        self.num_reads = 0

    def __torch_dispatch__(self, call, types, args=(), kwargs=None):
        name = call.overloadpacket.__name__.removeprefix("aten::")
        self.num_reads += name in ("_local_scalar_dense", "nonzero", "masked_select")
        return call(*args, **(kwargs or {}))

    def tolist(self, tensor):
        """In the place of torch.Tensor.tolist."""
        self.num_reads += 1
        return TOLIST(tensor)


def per_forward(function, num_forwards, device):
    """What a further, unmeasured call costs per forward, as text."""
    with CountReads() as reads:
        torch.Tensor.tolist = lambda tensor: reads.tolist(tensor)
        try:
            function()
        finally:
            torch.Tensor.tolist = TOLIST
    text = f"{reads.num_reads / num_forwards:.2f} reads per forward"
    if device.type == "cuda":
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            seconds, _ = timed(function)
        kernels = [event for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]
        busy = sum(event.self_device_time_total for event in kernels) / 1e6
        idle = max(0, 1 - busy / seconds)
        text += f", {len(kernels) / num_forwards:.0f} kernels, host {idle:.0%} of the time"
    return text


def thin_product_rate(config, num_rows, like):
    """Operations per second on products (rows, C) x (C, feed-forward), with weights read from memory.

    like: a tensor of the dtype and the device.
    """
    C = config.hidden_size
    wide = config.intermediate_size
    like = dict(dtype=like.dtype, device=like.device)
    weights = [torch.randn(wide, C, **like) for _ in range(max(2, 2**25 // (wide * C)))]
    x = torch.randn(num_rows, C, **like)
    multiply_all = lambda: [F.linear(x, weight) for weight in weights]
    seconds = min(timed(multiply_all)[0] for _ in range(5)) / len(weights)
    return 2 * num_rows * C * wide / seconds


def limit_seconds(model, rollouts, batch, products, bandwidth):
    """The least time for these rollouts, decoded `batch` at a time; products, bandwidth: per second.

    Rows are K for each denoising step and for each finished block. The head is needed at masks only. Each
    forward reads the weights, and of each sequence the cache before its block.
    """
    config = model.config
    K = config.block_size
    matrices, embedding = counts(config)
    num_rows = num_drawn = num_seen = num_steps = 0
    for r in rollouts:
        num_rows += len(r.prompt)
        last = 0
        for block in rollout.blocks_of(len(r.prompt), len(r.response), K):
            steps = [r.step_map[j] - last for j in block]  # in which step of its block each token was drawn
            last += max(steps)
            num_drawn += sum(steps)
            num_seen += max(steps) * (len(r.prompt) + block[0])
            num_rows += K * (max(steps) + 1)
        num_steps = max(num_steps, last)
    itemsize = model.embed.weight.element_size()
    token_bytes = 2 * config.num_layers * config.num_kv_heads * config.head_dim * itemsize
    forwards = num_steps * -(-len(rollouts) // batch)
    reading = forwards * (matrices + embedding) * itemsize + num_seen * token_bytes
    operations = 2 * (matrices * num_rows + embedding * num_drawn)
    return max(operations / products, reading / bandwidth)


# ------------------------------------------------------------------------------------------------------------
# The command.


def compare(model, prompts, strategy, bandwidth, args):
    """Prints the lines of one strategy -> the part of the limit that is reached at about SLOTS prompts."""
    device = model.device
    decoding = Decoding(max_new_tokens=args.max_new_tokens, strategy=strategy, threshold=0.5)
    transformers_loop = TransformersLoop(model)
    decode = lambda batch, seed, generate=engine.generate: generate(
        model, prompts[:batch], [seed * 1000 + i for i in range(batch)], decoding)
    loops = dict(transformers=lambda seed: transformers_loop.generate(prompts[0], decoding),
                 definition=lambda seed: rollout.generate(model, prompts[0], decoding, seed))
    # Libraries take their time at the first call. A GPU also records its graphs, for each number of prompts.
    for batch in args.batches if device.type == "cuda" else args.batches[:1]:
        decode(batch, 0)
    for loop in loops.values():
        loop(0)
    seconds = {name: [] for name in (*loops, *args.batches)}
    results = {}
    for seed in range(args.repeats):
        for name, loop in loops.items():
            seconds[name].append(timed(lambda: loop(seed))[0])
        for batch in args.batches:
            spent, results[batch] = timed(lambda: decode(batch, seed))
            seconds[batch].append(spent)
    rates = {name: args.max_new_tokens / median(seconds[name]) for name in loops}
    for name, rate in rates.items():
        print(f"  {strategy:8s} {name:12s} {rate:9.1f} tokens/s")
    if not args.quick:
        print_gain_of_cache(decode, min(args.batches[-1], 8), strategy, args.repeats)
    shares = {}
    for batch, rollouts in results.items():
        spent = median(seconds[batch])
        num_tokens = sum(len(r.response) for r in rollouts)
        num_steps = [max(r.step_map) for r in rollouts]
        products = thin_product_rate(model.config, batch * model.config.block_size, model.embed.weight)
        share = limit_seconds(model, rollouts, batch, products, bandwidth) / spent
        shares[batch] = share
        rate = num_tokens / spent
        times = ", ".join(f"{rate / other:.2f} x {name}" for name, other in rates.items())
        print(f"  {strategy:8s} engine {batch:5d} {rate:9.1f} tokens/s, {num_tokens / sum(num_steps):.2f} "
              f"tokens/step, {max(num_steps)} forwards, {times}, {share:.0%} of the limit "
              f"({products / 1e9:.0f} GFLOP/s), "
              + per_forward(lambda: decode(batch, args.repeats - 1), max(num_steps), device), flush=True)
    return shares[min(shares, key=lambda batch: abs(batch - SLOTS))]


def print_gain_of_cache(decode, batch, strategy, repeats):
    """Says how much faster the engine is with its cache than without, in turns."""
    with_cache = []
    without = []
    for seed in range(repeats):
        with_cache.append(timed(lambda: decode(batch, seed))[0])
        without.append(timed(lambda: decode(batch, seed, generate_without_cache))[0])
    gain = median(without) / median(with_cache)
    print(f"  {strategy:8s} engine {batch:5d} {gain:9.2f} x as fast as without a cache")


def compare_caches(model, prompts, args):
    """Full attention: every forward over the whole canvas, and the two approximations."""
    decoding = Decoding(max_new_tokens=args.max_new_tokens, threshold=0.5)
    for batch in args.batches:
        seconds = {cache: [] for cache in engine.CACHES}
        gaps = {cache: [] for cache in engine.CACHES}
        for seed in range(args.repeats):
            for cache in engine.CACHES:  # in turns
                compute = engine.fast(model.device, cache=cache)
                seeds = [seed * 1000 + i for i in range(batch)]
                spent, rollouts = timed(lambda: compute.generate(model, prompts[:batch], seeds, decoding))
                seconds[cache].append(spent)
                gaps[cache].append(rollout.replay_gap(model, rollouts[:4], compute, 1.0)["gap"])
        rates = {cache: batch * args.max_new_tokens / median(seconds[cache]) for cache in engine.CACHES}
        for cache, rate in rates.items():
            print(f"  batch {batch:4d}  cache {cache:6s}  {rate:8.1f} tokens/s, {rate / rates['none']:.2f} x "
                  f"without, gap {fmean(gaps[cache]):.1e}", flush=True)


def parse_args(argv=None):
    """The flags."""
    is_cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0], allow_abbrev=False)
    flag = parser.add_argument
    flag("--preset", choices=PRESETS, help="None: 34M; with --quick on a GPU 0.6B")
    flag("--batches", type=int, nargs="+", help="numbers of prompts; None: 1 8 64 256; with --quick 1 64")
    flag("--quick", action="store_true", help="the dynamic strategy only, and shorter")
    flag("--model", help="with --attention full: a checkpoint")
    flag("--attention", default="block", choices=("block", "full"))
    flag("--prompt_tokens", type=int, default=64)
    flag("--max_new_tokens", type=int, default=96)
    flag("--threads", type=int, default=2, help="of the CPU")
    flag("--repeats", type=int, default=3, help="the median counts")
    args = parser.parse_args(argv)
    args.preset = args.preset or ("0.6B" if args.quick and is_cuda else "34M")
    args.batches = sorted(args.batches or ([1, 64] if args.quick else [1, 8, 64, 256]))
    if args.quick:
        args.repeats = 1
    return args


def main(argv=None):
    """Prints a line per number of prompts and strategy."""
    args = parse_args(argv)
    torch.set_num_threads(args.threads)
    device = parallel.default_device()
    is_full = args.attention == "full"
    if args.model:
        model, _ = checkpoints.load_model(args.model, block_size=32 if is_full else None)
        model.config.eos_ids = ()
    else:
        model = make_model(args.preset, device, is_full)
    engine.compile_small_functions(model)
    generator = torch.Generator().manual_seed(0)
    prompts = [torch.randint(3, model.config.vocab_size, (args.prompt_tokens,), generator=generator).tolist()
               for _ in range(max(args.batches))]
    bandwidth = copy_rate()
    print(f"{processor_name()}; {args.model or args.preset}, {model.embed.weight.dtype}: prompts of "
          f"{args.prompt_tokens}, responses of {args.max_new_tokens} tokens; copy {bandwidth / 1e9:.1f} GB/s")
    if is_full:
        compare_caches(model, prompts, args)
        return
    for strategy in ("dynamic",) if args.quick else ("static", "dynamic"):
        share = compare(model, prompts, strategy, bandwidth, args)
    products = thin_product_rate(preset_config("8B"), SLOTS * model.config.block_size, model.embed.weight)
    print_step(products, bandwidth, rollout_share=share)  # of the last strategy, which is dynamic


if __name__ == "__main__":
    main()
