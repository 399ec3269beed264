"""bench_update.py - what one policy update costs: packed replay against one row per trace step.

    python tests/bench_update.py                       # 34M preset: packed against the authors' layout
    python tests/bench_update.py --preset 0.6B         # for a GPU; --dtype bfloat16 is its default there
    python tests/bench_update.py --logprobs            # memory of log-probs with a vocabulary of 151,936
    python tests/bench_update.py --growth              # responses of 128 to 2,048 tokens
    python tests/bench_update.py --table               # memory and time by model size and GPUs: computed

Every measurement runs in a process of its own, so that its peak memory is its own. All compared numbers come
from one invocation on one machine; a ratio is worth more than a time.

The authors' layout, written plainly: for every trace step of every response one row [prompt | clean response
| response as it was], everything padded to the longest allowed prompt and response; a dense mask; logits at
every position. Their pass is three-fold: old log-probabilities, forward, backward. "unpadded" is the same
with no padding beyond the batch's longest response.
"""

import argparse
import json
import resource
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

import model as lm
import rollout
import tracerl
from plumbing import packing, parallel

PRESETS = {  # C, layers, heads, kv heads, head_dim, feed-forward, V, tied
    "tiny": (64, 2, 4, 2, 16, 192, 18, False),
    "34M": (512, 8, 8, 4, 64, 1536, 8192, False),
    "0.6B": (1024, 28, 16, 8, 128, 3072, 151936, True),
    "1.7B": (2048, 28, 16, 8, 128, 6144, 151936, False),  # SDAR-1.7B-Chat: untied, 2.03 billion
    "4B": (2560, 36, 32, 8, 128, 9728, 151936, False),
    "8B": (4096, 36, 32, 8, 128, 12288, 151936, False),
}
GPU_FLOPS, GPU_BYTES = 989e12, 80e9  # one H100 or H200, dense bfloat16; memory of the smaller


def preset_config(name, block_size=4):
    """A ModelConfig by shape."""
    C, layers, heads, kv_heads, D, ff, V, tied = PRESETS[name]
    return lm.ModelConfig(V, C, layers, heads, kv_heads, D, ff,
                          mask_id=2, block_size=block_size, tie_word_embeddings=tied)


def counts(config):
    """Numbers of parameters: of the layers' matrices, of one embedding."""
    C, D = config.hidden_size, config.head_dim
    layer = C * D * (2 * config.num_heads + 2 * config.num_kv_heads) + 3 * C * config.intermediate_size
    return layer * config.num_layers, config.vocab_size * C


def made_up(config, number, prompt, low, high, seed=0):
    """Rollouts with random tokens, and traces of 1 to 4 steps per block, 2 on average."""
    rng, K, out = torch.Generator().manual_seed(seed), config.block_size, []
    for n in range(number):
        R = round((low + (high - low) * n / max(1, number - 1)) / K) * K
        steps, last = [], 0
        for _ in range(R // K):
            S = (1, 1, 1, 2, 2, 2, 2, 2, 3, 4)[int(torch.randint(10, (1,), generator=rng))]
            places = torch.cat([torch.arange(S), torch.randint(S, (K - S,), generator=rng)])
            steps += (last + 1 + places[torch.randperm(K, generator=rng)]).tolist()
            last += S
        tokens = torch.randint(3, config.vocab_size, (prompt + R,), generator=rng).tolist()
        out.append(rollout.Rollout(tokens[:prompt], tokens[prompt:], R, steps, logp=[0.0] * R,
                                   advantage=[(-1.0) ** n] * R))
    return out


def author_rows(rollouts, config, prompt, response):
    """The authors' layout as Rows: row t shows, behind a response's clean text, each block before step t."""
    K, rows = config.block_size, []
    for n, r in enumerate(rollouts):
        R, clean = len(r.response), r.prompt + r.response + [0] * (response - len(r.response))
        views = {}  # trace step inside its block -> (hidden, targets) of all blocks
        for block in rollout.blocks_of(prompt, R, K):
            for t, (hidden, targets) in enumerate(rollout.trace_views(r, block, 1)):
                shown = views.setdefault(t, ([], []))
                shown[0].extend(hidden)
                shown[1].extend(targets)
        for hidden, targets in views.values():
            noisy = list(clean[prompt:])
            for j in hidden:
                noisy[j] = config.mask_id
            position = [*range(prompt + response), *range(prompt, prompt + response)]
            view = [0] * (prompt + response) + [1] * response
            values = [(prompt + response + j, r.response[j], n, j, 1.0, 0.0, 0.0, r.advantage[j], 0.0, 0.0)
                      for j in targets]
            rows.append(lm.Row(clean + noisy, position, [p // K for p in position], view, values))
    return packing.collate(rows, 0)


def author_update(model, rows, rows_at_once, num_trained):
    """Old log-probabilities, forward, backward, as plainly as it can be said: all logits of every row."""
    def logprobs(part):
        attend = partial(lm.masked_attention, mask=lm.dense_mask(part.layout))
        logits = model.head(model.hidden(part.tokens, part.layout.position, attend))
        logp = lm.policy_logits(logits, model.config.mask_id).log_softmax(-1).flatten(0, 1)
        return logp[part.targets.logit_index].gather(-1, part.targets.token[:, None])[:, 0]

    T, parts = rows.tokens.shape[1], []
    for start in range(0, len(rows.tokens), rows_at_once):
        row = rows.targets.logit_index // T
        own, cut = (row >= start) & (row < start + rows_at_once), slice(start, start + rows_at_once)
        targets = lm.Targets(*(t[own] for t in rows.targets))
        targets = targets._replace(logit_index=targets.logit_index - start * T)
        part = lm.Rows(rows.tokens[cut], lm.Layout(*(t[cut] for t in rows.layout)), targets)
        parts.append(packing.to_device(part, model.device))
    with torch.no_grad():
        for part in parts:
            part.targets.logp_old.copy_(logprobs(part))
    for part in parts:
        tracerl.policy_loss(logprobs(part), part.targets, num_trained, 1).backward()


def packed_update(model, rollouts, settings, is_replayed):
    """Ours: the update of tracerl.py without its optimizer step; is_replayed: old log-probabilities by a pass
    of their own, as when there are several updates per RL step."""
    parts = tracerl.own_rows(model, rollouts, rollout.trace_views, model.config.block_size, settings)
    if is_replayed:
        with torch.no_grad():
            for rows in parts:
                rows.targets.logp_old.copy_(rollout.forward_rows(model, rows)[0])
    num_trained = sum(len(part.targets.token) for part in parts)
    for rows in parts:
        logp, _ = rollout.forward_rows(model, rows)
        if not is_replayed:
            rows.targets.logp_old.copy_(logp.detach())
        tracerl.policy_loss(logp, rows.targets, num_trained, 1).backward()


def peak_bytes(device):
    """Largest memory of this process so far (on a GPU: of its tensors)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def measure(args):
    """One measurement, in a process of its own -> dict."""
    torch.set_num_threads(args.threads)
    device = parallel.default_device()
    config = preset_config(args.preset)
    with torch.device(device):
        model = lm.BlockDiffusionLM(config)
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(std=0.02) if p.dim() > 1 else p.fill_(1.0)
    model.to(getattr(torch, args.dtype))
    for layer in model.layers:
        layer.has_gradient_checkpointing = args.gradient_checkpointing
    rollouts = made_up(config, args.responses, args.prompt, *args.range)
    settings = tracerl.parse_args([f"--tokens_per_micro_batch={args.tokens_per_micro_batch}", "--shrink=1"])
    if args.layout in ("authors", "unpadded"):
        response = args.padded if args.layout == "authors" else max(len(r.response) for r in rollouts)
        rows = author_rows(rollouts, config, args.prompt, response)
        num_trained, tokens = len(rows.targets.token), rows.tokens.numel()
        at_once = max(1, args.tokens_per_micro_batch // rows.tokens.shape[1])
        once = lambda: author_update(model, rows, at_once, num_trained)
    else:
        parts = tracerl.own_rows(model, rollouts, rollout.trace_views, config.block_size, settings)
        num_trained, tokens = sum(len(p.targets.token) for p in parts), sum(p.tokens.numel() for p in parts)
        once = lambda: packed_update(model, rollouts, settings, args.layout == "replayed")
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    before, times = peak_bytes(device), []
    for _ in range(1 + args.repeats):
        model.zero_grad(set_to_none=False)
        started = time.perf_counter()
        once()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
    matrices, embedding = counts(config)
    passes = {"authors": 4, "unpadded": 4, "packed": 3, "replayed": 4}[args.layout]
    heads = tokens if args.layout in ("authors", "unpadded") else num_trained
    flops = 2 * passes * (matrices * tokens + embedding * heads)  # attention not counted
    return dict(seconds=min(times[1:]), tokens=tokens, trained=num_trained,
                extra_bytes=peak_bytes(device) - before, flops=flops)


def matmul_flops(threads, dtype):
    """What this machine reaches on one large matrix product, per second."""
    torch.set_num_threads(threads)
    device = parallel.default_device()
    a = torch.randn(4096 if device.type == "cuda" else 1536, device=device, dtype=dtype).outer(
        torch.randn(4096 if device.type == "cuda" else 1536, device=device, dtype=dtype))
    best = float("inf")
    for _ in range(8):
        started = time.perf_counter()
        a @ a
        if device.type == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - started)
    return 2 * len(a) ** 3 / best


def logprob_memory(args):
    """Extra peak of log-probabilities and their backward: all positions at once, or ours in chunks. C is 64,
    so that the gradient of the head itself, V x C in either case, hides nothing."""
    torch.set_num_threads(args.threads)
    device = parallel.default_device()
    model = lm.BlockDiffusionLM(lm.ModelConfig(151936, 64, 1, 4, 4, 16, 64, mask_id=2)).to(device)
    h = torch.randn(args.targets, 64, device=device, requires_grad=True)
    target = torch.randint(3, 151936, (args.targets,), device=device)
    model.head.weight.grad = torch.ones_like(model.head.weight)  # there anyway: not part of the extra
    model.head(h[:1]).log_softmax(-1).sum().backward()  # libraries take their own memory at their first call
    before = peak_bytes(device)
    if args.layout == "authors":
        logits = lm.policy_logits(model.head(h), 2)
        logp = logits.log_softmax(-1).gather(-1, target[:, None])
    else:
        logp, _ = lm.token_logprobs(model, h, target)
    logp.sum().backward()
    return dict(extra_bytes=peak_bytes(device) - before)


def child(args, **changes):
    """Runs one measurement in a fresh process -> its dict."""
    flags = [f"--{name}={value}" for name, value in (vars(args) | changes).items()
             if name in ("preset", "threads", "responses", "prompt", "padded", "tokens_per_micro_batch",
                         "repeats", "dtype", "layout", "targets", "measures")]
    flags += ["--range", *map(str, changes.get("range", args.range))]
    flags += ["--gradient_checkpointing"] * args.gradient_checkpointing
    done = subprocess.run([sys.executable, __file__, *flags], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def compare(args):
    """The packed update against the authors' layout."""
    peak = matmul_flops(args.threads, getattr(torch, args.dtype))
    print(f"{args.preset}, {args.dtype}, {parallel.default_device()}: {args.responses} responses of "
          f"{args.range[0]} to {args.range[1]} tokens, prompts of {args.prompt}; "
          f"a matrix product: {peak / 1e12:.2f} TFLOP/s")
    found = {}
    for layout in ("authors", "unpadded", "replayed", "packed"):
        found[layout] = m = child(args, layout=layout, measures="update")
        useful, share = m["trained"] / m["tokens"], m["flops"] / m["seconds"] / peak
        print(f"  {layout:9s} {m['seconds']:8.2f} s  {m['tokens']:7d} tokens a pass, {useful:.2f} useful  "
              f"peak +{m['extra_bytes'] / 2**20:6.0f} MiB  {share:.0%} of the matrix product", flush=True)
    for layout in ("packed", "replayed"):
        faster, fewer = (found["authors"][name] / found[layout][name] for name in ("seconds", "tokens"))
        unpadded = found["unpadded"]["seconds"] / found[layout]["seconds"]
        print(f"  {layout}: {faster:.1f} x less time, {fewer:.2f} x fewer tokens a pass than the authors' "
              f"layout; {unpadded:.1f} x less time than unpadded")
    return found


def growth(args):
    """Cost per token of longer responses."""
    found = {}
    for R in (128, 256, 512, 1024, 2048):
        found[R] = m = child(
            args, layout="packed", measures="update", responses=max(1, 1024 // R), range=(R, R))
        print(f"  {R:5d} tokens a response: {m['seconds'] / m['trained'] * 1e3:.2f} ms a trained token, peak "
              f"+{m['extra_bytes'] / 2**20:.0f} MiB", flush=True)
    return found


def table():
    """Memory of one GPU and time of one RL step, from formulas; nothing here is measured.

    N parameters, g GPUs. Training state: 16 N / g bytes (float32 weights, gradients, two moments); gathered
    for rollouts: 2 N (bfloat16). LoRA: 2 N frozen, the adapters are neglected. Activations with
    --gradient_checkpointing: 2 bytes x C x layers for each of 16,384 tokens, plus one layer's (34 x C x 2
    bytes a token). Cache: 2 bytes x 2 x kv heads x head_dim x layers x 64 slots x 2,784 tokens. Time: 64 x 16
    / g responses of 1,000 tokens after prompts of 200: 4 passes (one again for --gradient_checkpointing) of 2
    N FLOPs over 3,200 tokens each (2 trace steps per block of 4) at 40 percent of 989 TFLOP/s; rollouts,
    bound by memory: 2 N bytes and the cache of 700 tokens in each of 64 slots, for each of 250 blocks x 3
    forwards, at 60 percent of 3.35 TB/s. """
    print("| model | GPUs | training state | whole weights | activations | cache | sum | LoRA "
          "| update | rollout |")
    print("|---|---|---|---|---|---|---|---|---|---|")
    for name in ("0.6B", "1.7B", "4B", "8B"):
        config = preset_config(name)
        matrices, embedding = counts(config)
        N = matrices + embedding * (1 if config.tie_word_embeddings else 2)
        C, layers = config.hidden_size, config.num_layers
        activations = 16384 * 2 * C * (layers + 34)
        cache = 2 * 2 * config.num_kv_heads * config.head_dim * layers * 64 * 2784
        for g in (1, 8, 16):
            state, whole = 16 * N / g, 2 * N
            responses = 64 * 16 / g
            update = 4 * 2 * N * 3200 * responses / (0.4 * GPU_FLOPS)
            rollouts = -(-responses // 64) * 250 * 3 * (2 * N + cache / 2784 * 700) / (0.6 * 3.35e12)
            total = state + whole + max(activations, cache)
            sizes = [f"{x / 2**30:.1f}" for x in (state, whole, activations, cache)]
            fits = "" if total < GPU_BYTES else " (too much)"
            lora = (whole + max(activations, cache)) / 2**30
            print(f"| {name} | {g} | {' | '.join(sizes)} | {total / 2**30:.0f}{fits} | {lora:.0f} "
                  f"| {update:.0f} s | {rollouts:.0f} s |")


def parse_args(argv=None):
    """The flags."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], allow_abbrev=False)
    is_cuda = torch.cuda.is_available()
    parser.add_argument("--preset", default="34M", choices=PRESETS)
    parser.add_argument("--dtype", default="bfloat16" if is_cuda else "float32",
                        choices=("float32", "bfloat16"))
    parser.add_argument("--threads", type=int, default=2, help="of the CPU")
    parser.add_argument("--responses", type=int, default=128 if is_cuda else 8)
    parser.add_argument("--prompt", type=int, default=64, help="tokens")
    parser.add_argument("--range", type=int, nargs=2, default=(96, 160), help="shortest and longest response")
    parser.add_argument("--padded", type=int, default=256, help="response length of the authors' layout")
    parser.add_argument("--tokens_per_micro_batch", type=int, default=16384 if is_cuda else 4608)
    parser.add_argument("--repeats", type=int, default=3,
                        help="timed updates after the first; the best counts")
    parser.add_argument("--gradient_checkpointing", action="store_true")
    parser.add_argument("--targets", type=int, default=4000, help="of --logprobs")
    parser.add_argument("--logprobs", action="store_true")
    parser.add_argument("--growth", action="store_true")
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--layout", default="packed", help="of one measurement (internal)")
    parser.add_argument("--measures", default=None, help="update or logprobs: one measurement (internal)")
    return parser.parse_args(argv)


def main(argv=None):
    """Prints what was asked for."""
    args = parse_args(argv)
    if args.measures:
        print(json.dumps(measure(args) if args.measures == "update" else logprob_memory(args)))
        return None
    if args.logprobs:
        for layout in ("authors", "packed"):
            m = child(args, layout=layout, measures="logprobs")
            how = "all at once" if layout == "authors" else "in chunks"
            print(f"  {args.targets} log-probabilities over 151,936 tokens, forward and backward, {how}: "
                  f"peak +{m['extra_bytes'] / 2**20:.0f} MiB")
        return None
    if args.table:
        return table()
    return growth(args) if args.growth else compare(args)


if __name__ == "__main__":
    main()
