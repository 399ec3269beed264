"""bench_update.py - what one policy update costs: one row per response against one row per trace step.

    python tests/bench_update.py                       # 34M parameters: four layouts of the same update
    python tests/bench_update.py --preset 0.6B         # for a GPU; --dtype bfloat16 is its default there
    python tests/bench_update.py --logprobs            # memory of log-probabilities over 151,936 tokens
    python tests/bench_update.py --growth              # responses of 128 to 2,048 tokens
    python tests/bench_update.py --table               # memory and seconds by model size and GPUs: computed

Four layouts are measured: authors    one row [prompt | clean response | response as it was] for every trace
  step of every response, all padded to the longest prompt and response that are allowed. The mask is dense,
  and there are logits at every position. Old log-probabilities take a forward of their own. unpadded   the
  same, but padded to the longest response of the batch only replayed   the rows of this project, and old
  log-probabilities by a forward of their own packed     the same without that forward, as in the first update
  of an RL step

Every measurement runs in a process of its own, so that its peak of memory is its own. Compare only numbers of
one invocation on one machine. The last lines say what an RL step of an 8B model on 8 such devices would take.
They are computed from the measured rates, see `step_seconds`.
"""

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch

import model as lm
import rollout
import tracerl
from plumbing import engine, kernels, memory, packing, parallel

PRESETS = {  # C, layers, heads, kv heads, head_dim, feed-forward, V, tied
    "tiny": (64, 2, 4, 2, 16, 192, 18, False),
    "34M": (512, 8, 8, 4, 64, 1536, 8192, False),
    "0.6B": (1024, 28, 16, 8, 128, 3072, 151936, True),
    "1.7B": (2048, 28, 16, 8, 128, 6144, 151936, False),  # SDAR-1.7B-Chat: untied, 2.03 billion
    "4B": (2560, 36, 32, 8, 128, 9728, 151936, False),
    "8B": (4096, 36, 32, 8, 128, 12288, 151936, False),
}
LAYOUTS = ("authors", "unpadded", "replayed", "packed")
DTYPES = ("float32", "bfloat16")


def preset_config(name, block_size=4):
    """A ModelConfig by shape. It has no eos, so that every response has the longest length."""
    C, layers, heads, kv_heads, D, feed_forward, V, is_tied = PRESETS[name]
    return lm.ModelConfig(V, C, layers, heads, kv_heads, D, feed_forward, mask_id=2, block_size=block_size,
                          tie_word_embeddings=is_tied)


def counts(config):
    """Numbers of parameters: of the layers' matrices, and of one embedding."""
    C = config.hidden_size
    heads = 2 * config.num_heads + 2 * config.num_kv_heads
    layer = C * config.head_dim * heads + 3 * C * config.intermediate_size
    return layer * config.num_layers, config.vocab_size * C


# ------------------------------------------------------------------------------------------------------------
# The machine.


def processor_name():
    """The CPU's name, such as "AMD EPYC 7763 64-Core Processor"; with a GPU its name, too."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    name = names[0] if names else "unknown CPU"
    if parallel.default_device().type == "cuda":
        name = f"{torch.cuda.get_device_name()}, {name}"
    return name


def timed(function):
    """Seconds that a function takes, and its result."""
    started = time.perf_counter()
    out = function()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - started, out


def product_rate(dtype):
    """Operations per second that the device reaches on one large matrix product."""
    device = parallel.default_device()
    size = 4096 if device.type == "cuda" else 1536
    a = torch.randn(size, size, device=device, dtype=dtype)
    return 2 * size ** 3 / min(timed(lambda: a @ a)[0] for _ in range(8))


def copy_rate():
    """Bytes per second that the device reads and writes when it copies."""
    a = torch.empty(2**26, device=parallel.default_device()).fill_(1.0)
    b = torch.empty_like(a)
    return 2 * a.numel() * a.element_size() / min(timed(lambda: b.copy_(a))[0] for _ in range(5))


def peak_bytes():
    """Largest memory of this process so far; on a GPU, of its tensors."""
    if parallel.default_device().type == "cuda":
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


# ------------------------------------------------------------------------------------------------------------
# One RL step of a large model, computed.


PROMPTS, GROUP, PROMPT_TOKENS, RESPONSE_TOKENS = 64, 16, 200, 2000  # of the RL step that is computed
TOKENS_PER_STEP = 2  # revealed in a denoising step
SLOTS = 64  # sequences that a device decodes together
TOKENS_AT_ONCE = 16384  # of a micro-batch


def step_seconds(config, num_devices, products, bandwidth):
    """The least seconds of one RL step on each device, by what takes them -> dict.

    products: operations per second. bandwidth: bytes per second. Weights and cache are bfloat16. Each
    denoising step reads all weights and the cache of all sequences; each response has 200 + 1,000 tokens in
    the cache on average. The update makes four passes (forward, again for gradient checkpointing, and two
    backward) over the prompt, the clean response, and a view for every denoising step. Not counted:
    attention's products, sampling, the traffic between devices, grading.
    """
    matrices, embedding = counts(config)
    K = config.block_size
    num_responses = PROMPTS * GROUP / num_devices
    steps = RESPONSE_TOKENS / TOKENS_PER_STEP  # denoising steps of a response
    # A denoising step computes K tokens, and each finished block once more. Only masks need the head: from K
    # down to the last TOKENS_PER_STEP of a block.
    decoded = PROMPT_TOKENS + K * steps + RESPONSE_TOKENS
    drawn = steps * (K + TOKENS_PER_STEP) / 2
    replayed = PROMPT_TOKENS + RESPONSE_TOKENS + K * steps
    forwards = steps * max(1, num_responses / SLOTS)
    token_bytes = 2 * 2 * config.num_layers * config.num_kv_heads * config.head_dim  # keys and values
    cached = num_responses * steps * (PROMPT_TOKENS + RESPONSE_TOKENS / 2) * token_bytes
    return dict(
        products=2 * num_responses * (matrices * decoded + embedding * drawn) / products,
        weights=2 * forwards * (matrices + embedding) / bandwidth,
        cache=cached / bandwidth,
        update=8 * num_responses * (matrices * replayed + embedding * RESPONSE_TOKENS) / products)


def print_step(products, bandwidth, rollout_share=None, update_share=None):
    """Says what an RL step of 8B would take on 8 devices like this one, and what dominates.

    A share is the measured part of the limit that a stage reaches. Without one its line gives the limit.
    """
    step = step_seconds(preset_config("8B"), 8, products, bandwidth)
    reading = step["weights"] + step["cache"]
    rollouts = max(step["products"], reading)
    print(f"computed: an RL step of 8B on 8 such devices, {PROMPTS} x {GROUP} responses of "
          f"{RESPONSE_TOKENS:,} tokens, {TOKENS_PER_STEP} tokens a denoising step")
    print(f"  rollout  {describe(rollouts, rollout_share)}: products {step['products']:.0f} s, beside "
          f"reading of weights {step['weights']:.0f} s and cache {step['cache']:.0f} s")
    print(f"  update   {describe(step['update'], update_share)}: products", flush=True)


def describe(limit, share):
    """Seconds of a stage as text."""
    if share is None:
        return f"at least {limit:.0f} s"
    return f"{limit / share:.0f} s, at the measured {share:.0%} of its limit of {limit:.0f} s"


def table():
    """Memory of one GPU of 80 GB, and seconds of one RL step by `step_seconds`; nothing here is measured.

    N parameters, g GPUs, GiB. Training state: 16 N / g bytes, which are float32 weights, gradients and two
    moments. Weights to decode with: 2 N. Activations of a micro-batch, the head, and cache: as in
    plumbing/memory.py. Needed: the training state, and the larger of what decoding and what the update take.
    LoRA: the same with 2 N of frozen weights; the adapters are neglected. Seconds: the update reaches 40
    percent of 989 TFLOP/s, and rollouts, which reading bounds, 60 percent of 3.35 TB/s.
    """
    print("| model | GPUs | training state | weights | activations | head | cache | needed | LoRA | update "
          "| rollout |")
    print("|---" * 11 + "|")
    for name in ("0.6B", "1.7B", "4B", "8B"):
        config = preset_config(name)
        C = config.hidden_size
        matrices, embedding = counts(config)
        N = matrices + embedding * (1 if config.tie_word_embeddings else 2)
        weights = 2 * N
        activations = TOKENS_AT_ONCE * (3 * memory.layer_bytes(config, 2) + 2 * C * config.num_layers)
        head = 3 * 4 * 2**27 + embedding * (8 + 3 * 2)
        length = PROMPT_TOKENS + RESPONSE_TOKENS + config.block_size
        cache = SLOTS * memory.slot_bytes(config, length, 2, True)
        lora = weights + max(cache, activations + head)
        for num_gpus in (1, 8, 16):
            state = 16 * N / num_gpus
            needed = state + max(weights + cache, activations + head)
            step = step_seconds(config, num_gpus, 0.4 * 989e12, 0.6 * 3.35e12)
            sizes = (state, weights, activations, head, cache, needed)
            cells = [f"{size / 2**30:.1f}" for size in sizes]
            cells[-1] += "" if needed < 0.85 * 80e9 else " (too much)"
            rollouts = max(step["products"], step["weights"] + step["cache"])
            print(f"| {name} | {num_gpus} | {' | '.join(cells)} | {lora / 2**30:.1f} | {step['update']:.0f} "
                  f"s | {rollouts:.0f} s |")


# ------------------------------------------------------------------------------------------------------------
# The update in four layouts.


def made_up(config, number, prompt_tokens, low, high):
    """Rollouts with random tokens, and traces of 1 to 4 steps per block, 2 on average."""
    generator = torch.Generator().manual_seed(0)
    draw = lambda high, count: torch.randint(high, (count,), generator=generator)
    K = config.block_size
    rollouts = []
    for n in range(number):
        R = round((low + (high - low) * n / max(1, number - 1)) / K) * K
        steps = []
        last = 0
        for _ in range(R // K):
            num_steps = (1, 1, 1, 2, 2, 2, 2, 2, 3, 4)[int(draw(10, 1))]
            step = torch.cat([torch.arange(num_steps), draw(num_steps, K - num_steps)])
            steps += (last + 1 + step[torch.randperm(K, generator=generator)]).tolist()
            last += num_steps
        tokens = torch.randint(3, config.vocab_size, (prompt_tokens + R,), generator=generator).tolist()
        rollouts.append(rollout.Rollout(tokens[:prompt_tokens], tokens[prompt_tokens:], R, steps,
                                        logp=[0.0] * R, advantage=[(-1.0) ** n] * R))
    return rollouts


def author_rows(rollouts, config, response_tokens):
    """The authors' layout: row t shows, behind a response's clean text, each block before its step t."""
    K = config.block_size
    rows = []
    for index, r in enumerate(rollouts):
        P = len(r.prompt)
        clean = r.prompt + r.response + [config.pad_id] * (response_tokens - len(r.response))
        shown = {}  # the number of a trace step in its block -> masked and predicted indices of all blocks
        for block in rollout.blocks_of(P, len(r.response), K):
            for t, (masked, targets) in enumerate(rollout.trace_views(r, block, 1)):
                all_masked, all_targets = shown.setdefault(t, ([], []))
                all_masked += masked
                all_targets += targets
        for masked, targets in shown.values():
            noisy = clean[P:]
            for j in masked:
                noisy[j] = config.mask_id
            position = [*range(len(clean)), *range(P, len(clean))]
            view = [0] * len(clean) + [1] * response_tokens
            row = lm.Row(clean + noisy, position, [p // K for p in position], view)
            row.targets = [lm.Targets(
                logit_index=len(clean) + j, token=r.response[j], rollout_index=index, response_index=j,
                step=r.step_map[j], view=1, group=0, masked_share=1.0, logp=0.0, logp_old=0.0,
                advantage=r.advantage[j], value_old=0.0, returns=0.0) for j in targets]
            rows.append(row)
    return rows


def attend_densely(layout):
    """An `attend` under a dense mask, by torch's fastest kernel for it."""
    mask = lm.dense_mask(layout)
    return lambda layer, q, k, v: kernels.masked_attention(q, k, v, mask)


def author_logprobs(model, rows):
    """Log-probabilities of the targets, with the logits of every position of every row."""
    states = model.states(rows.tokens, rows.layout.position, attend_densely(rows.layout))
    logits = model.head(states).float()  # (B, T, V)
    logits[..., model.config.mask_id] = -torch.inf
    logp = logits.log_softmax(-1).flatten(0, 1)
    return logp[rows.targets.logit_index].gather(-1, rows.targets.token[:, None])[:, 0]


def author_update(model, rows, rows_at_once):
    """Old log-probabilities, forward, backward, as plainly as it can be said."""
    parts = [lm.pad(rows[start:start + rows_at_once], model.config.pad_id, model.device)
             for start in range(0, len(rows), rows_at_once)]
    num_tokens = sum(len(part.targets.token) for part in parts)
    with torch.no_grad():
        for part in parts:
            part.targets.logp_old.copy_(author_logprobs(model, part))
    for part in parts:
        tracerl.policy_loss(author_logprobs(model, part), part.targets, num_tokens, 0.2, 0.01).backward()


def own_parts(model, rollouts, compute):
    """The micro-batches of this project."""
    rows = rollout.build_rows(rollouts, model.config, trained_only=True)
    return packing.micro_batches(rows, compute, model)


def own_update(model, rollouts, compute, is_replayed):
    """The update of tracerl.py without its optimizer step.

    is_replayed: old log-probabilities take a forward of their own.
    """
    parts = own_parts(model, rollouts, compute)
    num_tokens = sum(len(part.targets.token) for part in parts)
    if is_replayed:
        with torch.no_grad():
            for part in parts:
                part.targets.logp_old.copy_(rollout.forward_rows(model, part, compute)[0])
    for part in parts:
        logp, _ = rollout.forward_rows(model, part, compute)
        if not is_replayed:
            part.targets.logp_old.copy_(logp.detach())
        tracerl.policy_loss(logp, part.targets, num_tokens, 0.2, 0.01).backward()


def measure(args):
    """One layout, in a process of its own -> dict."""
    device = parallel.default_device()
    config = preset_config(args.preset)
    with torch.device(device):
        model = lm.BlockDiffusionLM(config)
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() > 1:
                p.normal_(std=0.02)
            else:
                p.fill_(1.0)
    model.to(getattr(torch, args.dtype))
    for layer in model.layers:
        layer.has_gradient_checkpointing = args.gradient_checkpointing
    engine.compile_small_functions(model)
    rollouts = made_up(config, args.responses, args.prompt, *args.range)
    compute = engine.fast(device, args.tokens_per_micro_batch)
    if args.layout in ("authors", "unpadded"):
        longest = args.padded if args.layout == "authors" else max(len(r.response) for r in rollouts)
        rows = author_rows(rollouts, config, longest)
        num_tokens = sum(len(row.tokens) for row in rows)
        num_trained = sum(len(row.targets) for row in rows)
        num_heads = num_tokens  # logits at every position
        rows_at_once = max(1, args.tokens_per_micro_batch // len(rows[0].tokens))
        update = lambda: author_update(model, rows, rows_at_once)
    else:
        parts = own_parts(model, rollouts, compute)
        num_tokens = sum(part.tokens.numel() for part in parts)
        num_trained = num_heads = sum(len(part.targets.token) for part in parts)
        update = lambda: own_update(model, rollouts, compute, args.layout == "replayed")
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    before = peak_bytes()
    seconds = []
    for _ in range(1 + args.repeats):
        model.zero_grad(set_to_none=False)
        seconds.append(timed(update)[0])
    matrices, embedding = counts(config)
    passes = (3 if args.layout == "packed" else 4) + args.gradient_checkpointing
    operations = 2 * passes * (matrices * num_tokens + embedding * num_heads)  # attention is not counted
    return dict(seconds=min(seconds[1:]), tokens=num_tokens, trained=num_trained, operations=operations,
                extra_bytes=peak_bytes() - before)


def measure_logprobs(args):
    """Extra peak of memory of log-probabilities and their backward pass -> dict.

    layout packed: the chunks of this project; else all positions at once. C is only 64, so that the gradient
    of the head, which is V x C either way, hides nothing.
    """
    device = parallel.default_device()
    model = lm.BlockDiffusionLM(lm.ModelConfig(151936, 64, 1, 4, 4, 16, 64, mask_id=2)).to(device)
    states = torch.randn(args.targets, 64, device=device, requires_grad=True)
    tokens = torch.randint(3, 151936, (args.targets,), device=device)
    model.head.weight.grad = torch.ones_like(model.head.weight)  # there anyway: no part of what is extra
    model.head(states[:1]).log_softmax(-1).sum().backward()  # libraries take memory at their first call
    before = peak_bytes()
    if args.layout == "packed":
        logp, _ = engine.logprobs(model, states, tokens)
    else:
        logp = lm.policy_logits(model, states).log_softmax(-1).gather(-1, tokens[:, None])
    logp.sum().backward()
    return dict(extra_bytes=peak_bytes() - before)


def in_a_process(args, **changes):
    """Runs one measurement in a fresh process -> its dict."""
    settings = vars(args) | changes
    words = []
    for name in ("preset", "dtype", "threads", "responses", "prompt", "padded", "tokens_per_micro_batch",
                 "repeats", "targets", "layout", "measures"):
        words.append(f"--{name}={settings[name]}")
    words += ["--range", *map(str, settings["range"])]
    words += ["--gradient_checkpointing"] * args.gradient_checkpointing
    done = subprocess.run([sys.executable, __file__, *words], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


# ------------------------------------------------------------------------------------------------------------
# The command.


def compare(args):
    """The four layouts -> {layout: dict}."""
    products = product_rate(getattr(torch, args.dtype))
    print(f"{processor_name()}; {args.preset}, {args.dtype}: {args.responses} responses of {args.range[0]} "
          f"to {args.range[1]} tokens, prompts of {args.prompt}; product {products / 1e12:.2f} TFLOP/s")
    measured = {}
    for layout in LAYOUTS:
        m = in_a_process(args, layout=layout, measures="update")
        measured[layout] = m
        m["share"] = m["operations"] / m["seconds"] / products
        print(f"  {layout:9s} {m['seconds']:8.2f} s  {m['tokens']:7d} tokens a pass, "
              f"{m['trained'] / m['tokens']:.2f} trained  peak +{m['extra_bytes'] / 2**20:6.0f} MiB  "
              f"{m['share']:.0%} of the matrix product", flush=True)
    authors, unpadded = measured["authors"], measured["unpadded"]
    for layout in ("packed", "replayed"):
        m = measured[layout]
        print(f"  {layout}: {authors['seconds'] / m['seconds']:.1f} x less time and "
              f"{authors['tokens'] / m['tokens']:.2f} x fewer tokens a pass than the authors' layout; "
              f"{unpadded['seconds'] / m['seconds']:.1f} x less time than unpadded")
    print_step(products, copy_rate(), update_share=measured["packed"]["share"])
    return measured


def growth(args):
    """Cost per token of longer responses -> {length: dict}."""
    measured = {}
    for R in (128, 256, 512, 1024, 2048):
        m = in_a_process(
            args, layout="packed", measures="update", responses=max(1, 1024 // R), range=(R, R))
        measured[R] = m
        print(f"  {R:5d} tokens a response: {m['seconds'] / m['trained'] * 1e3:.2f} ms a trained token, peak "
              f"+{m['extra_bytes'] / 2**20:.0f} MiB", flush=True)
    return measured


def logprobs(args):
    """Memory of log-probabilities, all at once and in chunks."""
    for layout, how in (("authors", "all at once"), ("packed", "in chunks")):
        m = in_a_process(args, layout=layout, measures="logprobs")
        print(f"  {args.targets} log-probabilities over 151,936 tokens, forward and backward, {how}: "
              f"peak +{m['extra_bytes'] / 2**20:.0f} MiB")


def parse_args(argv=None):
    """The flags."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0], allow_abbrev=False)
    is_cuda = torch.cuda.is_available()
    flag = parser.add_argument
    flag("--preset", default="34M", choices=PRESETS)
    flag("--dtype", default="bfloat16" if is_cuda else "float32", choices=DTYPES)
    flag("--threads", type=int, default=2, help="of the CPU")
    flag("--responses", type=int, default=128 if is_cuda else 8)
    flag("--prompt", type=int, default=64, help="tokens of a prompt")
    flag("--range", type=int, nargs=2, default=(96, 160), help="shortest and longest response")
    flag("--padded", type=int, default=256, help="response length of the authors' layout")
    flag("--tokens_per_micro_batch", type=int, default=TOKENS_AT_ONCE if is_cuda else 4608)
    flag("--repeats", type=int, default=3, help="timed updates after the first; the best counts")
    flag("--gradient_checkpointing", action="store_true")
    flag("--targets", type=int, default=4000, help="of --logprobs")
    flag("--logprobs", action="store_true", help="measure the memory of log-probabilities instead")
    flag("--growth", action="store_true", help="measure longer responses instead")
    flag("--table", action="store_true", help="compute memory and seconds of larger models instead")
    flag("--layout", default="packed", choices=LAYOUTS, help="of one measurement (internal)")
    flag("--measures", choices=("update", "logprobs"), help="one measurement (internal)")
    return parser.parse_args(argv)


def main(argv=None):
    """Prints what was asked for."""
    args = parse_args(argv)
    torch.set_num_threads(args.threads)
    if args.measures:
        print(json.dumps(measure(args) if args.measures == "update" else measure_logprobs(args)))
    elif args.logprobs:
        logprobs(args)
    elif args.table:
        table()
    elif args.growth:
        growth(args)
    else:
        compare(args)


if __name__ == "__main__":
    main()
