"""bench_rollout.py - what decoding costs: with and without a cache, in ragged slots and in waiting batches.

    python tests/bench_rollout.py                        # the tiny model on a CPU, 34M's shape on a GPU
    python tests/bench_rollout.py --preset 0.6B --responses 256

Ratios within one run count, not times. "no cache" runs each denoising step over the whole text so far, as the
plain rule would; "waiting batches" admits new prompts only when all slots are free, as a static batch does.
"""

import argparse
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from bench_update import PRESETS, preset_config

import model as lm
import rollout
import sft
from plumbing import parallel


def uncached(model, r):
    """Denoising steps of one response again, each as a forward of the whole text without a cache."""
    K, text, start = model.config.block_size, r.prompt + r.response, len(r.prompt)
    steps = torch.tensor([0] * start + r.step_map)
    for step in range(1, max(r.step_map) + 1):
        end = (int((steps == step).nonzero().max()) // K + 1) * K
        tokens = torch.where(steps >= step, model.config.mask_id, torch.tensor(text))[:end]
        position = torch.arange(end, device=model.device)[None]
        attend = lm.attend_within(lm.Layout.clean(position, K, False))
        model.head(model.hidden(tokens[None].to(model.device), position, attend)[:, end - K:])


def timed(function, device):
    """Seconds."""
    started = time.perf_counter()
    out = function()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started, out


def main(argv=None):
    """Prints three lines."""
    is_cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], allow_abbrev=False)
    parser.add_argument("--preset", default="34M" if is_cuda else "tiny", choices=PRESETS)
    parser.add_argument("--responses", type=int, default=256 if is_cuda else 64)
    parser.add_argument("--slots", type=int, default=64 if is_cuda else 16)
    parser.add_argument("--max_new_tokens", type=int, default=256)
    parser.add_argument("--threads", type=int, default=1, help="of the CPU")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    device, rng = parallel.default_device(), torch.Generator().manual_seed(0)
    model = lm.BlockDiffusionLM(preset_config(args.preset))
    sft.initialize(model, 0)
    model.to(device, torch.bfloat16 if is_cuda else torch.float32).eval()
    V = model.config.vocab_size
    prompts = [torch.randint(3, V, (int(n),), generator=rng).tolist()
               for n in torch.randint(32, 96, (args.responses,), generator=rng)]
    # ends are drawn like other tokens (the tiny model: every 17 tokens): lengths as ragged as real answers'
    eos = list(range(3, 3 + max(1, round(V / 100))))
    decode = lambda prompts, slots, seed=0: rollout.generate(
        model, prompts, max_new_tokens=args.max_new_tokens, eos_ids=eos, slots=slots,
        denoising_steps=2, seed=seed)
    decode(prompts[:args.slots], args.slots)  # warm up
    seconds, rollouts = timed(lambda: decode(prompts, args.slots), device)
    lengths = [len(r.response) for r in rollouts]
    print(f"{args.preset}, {device}: {len(prompts)} responses of {min(lengths)} to {max(lengths)} tokens, "
          f"{args.slots} slots: {sum(lengths) / seconds:.0f} tokens a second, "
          f"{sum(lengths) / sum(max(r.step_map) for r in rollouts):.2f} tokens a denoising step")
    starts = range(0, len(prompts), args.slots)
    waiting, _ = timed(lambda: [decode(prompts[i:i + args.slots], args.slots, i) for i in starts], device)
    print(f"  ragged slots: {waiting / seconds:.2f} x less time than batches that wait for their longest")
    one = max(rollouts[:args.slots], key=lambda r: len(r.response))
    cached, _ = timed(lambda: decode([one.prompt], 1, one.seed), device)
    with torch.no_grad():
        plain, _ = timed(lambda: uncached(model, one), device)
    print(f"  cache: one response of {len(one.response)} tokens after {len(one.prompt)}, "
          f"{max(one.step_map)} denoising steps: {plain / cached:.2f} x less time than without "
          "(commits and bookkeeping included)")


if __name__ == "__main__":
    main()
