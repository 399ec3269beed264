"""bench_rollout.py - what decoding costs, beside a plain loop and beside the machine's own limit.

    python tests/bench_rollout.py                        # 34M parameters, batches of 1, 8, 64, 256
    python tests/bench_rollout.py --preset 4B            # for a GPU; also 0.6B, 8B
    python tests/bench_rollout.py --preset tiny --batches 1 64 --max_new_tokens 20
    python tests/bench_rollout.py --attention full       # beside the approximate caches, prefix and dual

Per batch size and strategy: tokens per second, forwards (denoising steps of the longest sequence), tokens per
forward and row, times the plain loop's rate at batch 1, and percent of the limit; then how often the host
reads from the device per forward, and on a GPU kernels per forward and the share of the time in which the GPU
waits for the host; and what the cache gains, beside a decoder that computes the whole text again at every
step. Ours and the plain loop take turns; medians. With full attention, instead of all that: how far the
caches' log-probabilities are from those of a replay (the gap, mean over tokens, in nats; give a trained
--model for that, since a random one's do not depend on the text).

The plain loop is what one writes in an afternoon: transformers' Qwen3 with the same weights and its
DynamicCache, one sequence, one forward per denoising step and one to commit each whole block, logits at all K
places.

The limit: a forward cannot take less time than its matrix products, rows x parameters x 2 operations at the
rate that this machine reaches on such products (measured at these widths and this number of rows), nor less
than reading the weights once (measured as a copy). The rows counted are those that the method needs: K per
denoising step and K per committed block, the head at masked places only. Attention, sampling and bookkeeping
are not in the limit.

Weights are random but for one token's, see make_model: a dynamic step (threshold 0.5) reveals about 1.9
tokens.
"""

import argparse
import math
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from bench_update import PRESETS, counts, preset_config

from torch.utils._python_dispatch import TorchDispatchMode

import model as lm
import rollout
from plumbing import checkpoints, parallel


def make_model(preset, device, is_full=False):
    """A random model that draws one token with probability 0.55 everywhere, and all others alike: its
    confidences do not depend on the text, so that every sequence decodes equally fast, as a trained model's
    do on the whole."""
    torch.manual_seed(0)
    with torch.device(device):
        config = preset_config(preset)
        config.is_full = is_full
        model = lm.BlockDiffusionLM(config)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.fill_(1.0) if p.dim() == 1 else p.normal_(std=0.02)
        model.embed.weight.add_(1.0)  # a part that all states share, and that survives the layers
        tokens = torch.randint(3, model.config.vocab_size, (1, 64), device=device)
        position = torch.arange(64, device=device)[None]
        h = model.hidden(tokens, position, lm.attend_within(lm.Layout.clean(position, 4, False)))[0]
        shared, others = h.mean(0), model.head(h).logsumexp(-1).mean()
        model.head.weight[5] = shared * (others + math.log(0.55 / 0.45)) / shared.square().sum()
    return model.to(torch.bfloat16 if device.type == "cuda" else torch.float32).eval()


class PlainLoop:
    """One sequence at a time, by transformers."""

    def __init__(self, model):
        import transformers
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
        self.config, self.cache_class = c, transformers.DynamicCache

    @torch.no_grad()
    def generate(self, prompt, max_new_tokens, strategy, threshold):
        """-> denoising steps."""
        K, mask_id, device = self.config.block_size, self.config.mask_id, self.model.device
        cache, start, steps = self.cache_class(), len(prompt) // K * K, 0
        end = -(-(len(prompt) + max_new_tokens) // K) * K
        text = torch.full((1, end), mask_id, device=device)
        text[0, :len(prompt)] = torch.tensor(prompt, device=device)
        block = torch.arange(start, device=device) // K
        if start:
            self.forward(text[:, :start], 0, cache, (block[None] <= block[:, None])[None, None])
        while start < end:
            window = text[:, start:start + K]
            is_masked = window == mask_id
            while is_masked.any():
                logits = self.forward(window, start, cache, None)[0].float()
                cache.crop(-K)
                logits[:, mask_id] = -torch.inf
                p = logits.softmax(-1)
                token = torch.multinomial(p, 1)
                confidence = p.gather(-1, token)[:, 0].masked_fill(~is_masked[0], -1)
                keep = (confidence > threshold) & is_masked[0]
                if strategy == "static" or not keep.any():
                    keep[:] = False
                    keep[confidence.argmax()] = True
                window[0, keep] = token[keep, 0]
                is_masked[0, keep] = False
                steps += 1
            self.forward(window, start, cache, None)  # commit
            start += K
        return steps

    def forward(self, tokens, start, cache, mask):
        """Logits (1, T, V); keys and values go to the cache. mask None: everything is seen."""
        position = torch.arange(start, start + tokens.shape[1], device=tokens.device)[None]
        if mask is None:
            shape = (1, 1, tokens.shape[1], start + tokens.shape[1])
            mask = torch.ones(shape, dtype=torch.bool, device=tokens.device)
        return self.model(input_ids=tokens, position_ids=position, past_key_values=cache, use_cache=True,
                          attention_mask=mask).logits


def per_forward(function, forwards, device):
    """What one more, unmeasured call costs per forward, as text: reads by the host; on a GPU also kernels,
    and the share of the time in which it has nothing to do."""
    counts, tolist = [0], torch.Tensor.tolist

    class Reads(TorchDispatchMode):
        # Else torch would run compiled functions uncompiled in here, and ever after.
        ignore_compile_internals = classmethod(lambda cls: True)

        def __torch_dispatch__(self, call, types, args=(), kwargs=None):
            names = ("_local_scalar_dense", "nonzero", "masked_select")
            counts[0] += call.overloadpacket.__name__.removeprefix("aten::") in names
            return call(*args, **(kwargs or {}))

    def counted(tensor):
        counts[0] += 1
        return tolist(tensor)

    torch.Tensor.tolist = counted
    try:
        with Reads():
            function()
    finally:
        torch.Tensor.tolist = tolist
    text = f"{counts[0] / forwards:.2f} reads per forward"
    if device.type == "cuda":
        with torch.profiler.profile() as profile:
            seconds, _ = timed(function, device)
        kernels = [e for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA]
        busy = sum(e.self_device_time_total for e in kernels) / 1e6
        text += f", {len(kernels) / forwards:.0f} kernels, host {max(0, 1 - busy / seconds):.0%} of the time"
    return text


class WithoutCache(rollout.Decoder):
    """Every step computes the whole text up to the block's end again."""

    def states(self, columns, commits, longest):
        B = len(columns)
        position = torch.arange(longest, device=self.device).expand(B, -1)
        layout = lm.Layout.clean(position, self.settings.block_size, False)
        h = self.model.hidden(self.token[:B, :longest], position, lm.attend_within(layout))
        return h.gather(1, columns[..., None].expand(-1, -1, h.shape[-1]))


def timed(function, device):
    """Seconds, result."""
    started = time.perf_counter()
    out = function()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started, out


def matmul_rate(config, rows, dtype, device):
    """Operations per second of this machine on products (rows, C) x (C, feed-forward), weights from
    memory."""
    C, ff = config.hidden_size, config.intermediate_size
    weights = [torch.randn(ff, C, dtype=dtype, device=device) for _ in range(max(2, 2**25 // (ff * C)))]
    x, best = torch.randn(rows, C, dtype=dtype, device=device), float("inf")
    for _ in range(5):
        for multiply in (torch.nn.functional.linear, lambda x, W: (W @ x.T).T):
            seconds, _ = timed(lambda: [multiply(x, W) for W in weights], device)
            best = min(best, seconds / len(weights))
    return 2 * rows * C * ff / best


def copy_rate(device):
    """Bytes read per second."""
    a = torch.empty(2**26, dtype=torch.float32, device=device).fill_(1.0)
    b = torch.empty_like(a)
    return a.numel() * 4 * 2 / min(timed(lambda: b.copy_(a), device)[0] for _ in range(5))


def limit_seconds(model, rollouts, batch, rates):
    """The least time for these rollouts, see the top."""
    config, K = model.config, model.config.block_size
    matrices, embedding = counts(config)
    steps = sum(max(r.step_map) for r in rollouts)
    blocks = sum(len(rollout.blocks_of(len(r.prompt), len(r.response), K)) for r in rollouts)
    rows = K * (steps + blocks) + sum(len(r.prompt) for r in rollouts)
    masked = sum(step for r in rollouts for step in (sorted_steps(r)))
    operations = 2 * (matrices * rows + embedding * masked)
    forwards = max(max(r.step_map) for r in rollouts) * -(-len(rollouts) // batch)
    bytes_read = forwards * (matrices + embedding) * model.embed.weight.element_size()
    return max(operations / rates[0], bytes_read / rates[1])


def sorted_steps(r):
    """For every token, in how many denoising steps of its block it was masked."""
    first = {}
    for block in rollout.blocks_of(len(r.prompt), len(r.response), 4):
        start = min(r.step_map[j] for j in block)
        first.update({j: start for j in block})
    return [r.step_map[j] - first[j] + 1 for j in range(len(r.response))]


def main(argv=None):
    """Prints a line per batch size and strategy."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], allow_abbrev=False)
    parser.add_argument("--preset", default="34M", choices=PRESETS)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 64, 256])
    parser.add_argument("--model", help="with --attention full: a checkpoint")
    parser.add_argument("--attention", default="block", choices=("block", "full"))
    parser.add_argument("--prompt_tokens", type=int, default=64)
    parser.add_argument("--max_new_tokens", type=int, default=96)
    parser.add_argument("--threads", type=int, default=2, help="of the CPU")
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    device = parallel.default_device()
    if args.model:
        model, _ = checkpoints.load_model(args.model)
    else:
        model = make_model(args.preset, device, args.attention == "full")
    rng = torch.Generator().manual_seed(0)
    prompts = [torch.randint(3, model.config.vocab_size, (args.prompt_tokens,), generator=rng).tolist()
               for _ in range(max(args.batches))]
    bandwidth = copy_rate(device)
    print(f"{args.preset}, {device}, {model.embed.weight.dtype}: prompts of {args.prompt_tokens}, responses "
          f"of {args.max_new_tokens} tokens; copy {bandwidth / 1e9:.1f} GB/s")
    if args.attention == "full":
        return compare_caches(model, prompts, args, device)
    plain = PlainLoop(model)
    for strategy in ("static", "dynamic"):
        settings = dict(max_new_tokens=args.max_new_tokens, strategy=strategy, threshold=0.5)
        decode = lambda batch, seed: rollout.generate(
            model, prompts[:batch], eos_ids=(), seed=seed, **settings)
        plain_seconds, seconds, results = [], {batch: [] for batch in args.batches}, {}
        plain.generate(prompts[0], 8, strategy, 0.5)
        decode(1, 0)
        for repeat in range(args.repeats):
            spent, steps = timed(lambda: plain.generate(prompts[0], **settings), device)
            plain_seconds.append(spent)
            for batch in args.batches:
                spent, results[batch] = timed(lambda: decode(batch, repeat), device)
                seconds[batch].append(spent)
        rate = args.max_new_tokens / statistics.median(plain_seconds)
        print(f"  {strategy:8s} plain loop      {rate:8.1f} tokens/s, "
              f"{args.max_new_tokens / steps:.2f} tokens/step")
        keep, batch = rollout.Decoder, min(args.batches[-1], 8)
        own, without = [], []
        for repeat in range(args.repeats):
            own.append(timed(lambda: decode(batch, repeat), device)[0])
            rollout.Decoder = WithoutCache
            without.append(timed(lambda: decode(batch, repeat), device)[0])
            rollout.Decoder = keep
        print(f"  {strategy:8s} batch {batch:4d}      the cache: "
              f"{statistics.median(without) / statistics.median(own):.2f} x as fast as without")
        for batch in args.batches:
            own, rollouts = statistics.median(seconds[batch]), results[batch]
            tokens = sum(len(r.response) for r in rollouts)
            steps = [max(r.step_map) for r in rollouts]
            K = model.config.block_size
            rates = matmul_rate(model.config, batch * K, model.embed.weight.dtype, device), bandwidth
            share = limit_seconds(model, rollouts, batch, rates) / own
            print(f"  {strategy:8s} batch {batch:4d}      {tokens / own:8.1f} tokens/s, "
                  f"{tokens / sum(steps):.2f} tokens/step, {max(steps)} forwards, "
                  f"{tokens / own / rate:.2f} x the plain loop, {share:.0%} of the limit "
                  f"({rates[0] / 1e9:.0f} GFLOP/s), "
                  + per_forward(lambda: decode(batch, args.repeats - 1), max(steps), device), flush=True)


def compare_caches(model, prompts, args, device):
    """Full attention: every forward over the whole canvas, and the two approximations."""
    for batch in args.batches:
        seconds, gaps = {}, {}
        for repeat in range(args.repeats):
            for cache in rollout.CACHES:  # taking turns
                spent, rollouts = timed(lambda: rollout.generate(
                    model, prompts[:batch], max_new_tokens=args.max_new_tokens, threshold=0.5, eos_ids=(),
                    block_size=32, seed=repeat, cache=cache), device)
                seconds.setdefault(cache, []).append(spent)
                gaps[cache] = rollout.replay_gap(model, rollouts[:4], 32, 1.0)["gap"]
        rates = {cache: batch * args.max_new_tokens / statistics.median(s) for cache, s in seconds.items()}
        for cache, rate in rates.items():
            print(f"  batch {batch:4d}  cache {cache:6s}  {rate:8.1f} tokens/s, {rate / rates['none']:.2f} x "
                  f"without, gap {gaps[cache]:.1e}", flush=True)


if __name__ == "__main__":
    main()
