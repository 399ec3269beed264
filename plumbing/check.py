"""plumbing/check.py - `python rollout.py --check traces.jsonl --model M` replays traces of another engine.

Each line of the file is one response: {"prompt": [token ids], "response": [token ids], "step_map": [...],
"logp": [...]}. step_map says which denoising step revealed each token, and logp is the log-probability that
the engine recorded. With full attention, "canvas" may say how many response positions every forward saw.

The replay should give the same numbers. If it does not, usual mistakes are tried one by one: three ways to
cut blocks, other block sizes, and other temperatures. A mistake that makes the gap vanish is named as the
cause. Two more mistakes can only be suspected: log-probabilities after a filter, and a last block that is not
whole.
"""

import dataclasses

import torch

import rollout
from plumbing import grading
from rollout import Rollout

FIELDS = ("prompt", "response", "step_map", "logp")
# Mistakes that another engine may have made: in words, and as the arguments with which `differences` repeats
# the mistake.
MISTAKES = {
    "blocks were cut at the start of the response, and not at position 0": dict(is_cut_at_response=True),
    "the last block was cut at eos, so the tokens behind eos were not in sight": dict(is_cut_at_eos=True),
    "blocks were cut at the start of the response, and the last block was cut at eos":
        dict(is_cut_at_response=True, is_cut_at_eos=True),
}
BLOCK_SIZES = (1, 2, 4, 8, 16, 32, 64)
TEMPERATURES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.1, 1.2, 1.3, 1.5, 2.0)


def read_traces(path, config):
    """The traces of a file -> list[Rollout]. ValueError that names the row."""
    rollouts = []
    for number, row in enumerate(grading.read_json_rows(path), 1):
        where = f"{path}, row {number}"
        try:
            prompt, response, step_map, logp = (list(row[name]) for name in FIELDS)
            torch.tensor(logp, dtype=torch.float64)  # TypeError unless all are numbers
            if not all(isinstance(number, int) for number in prompt + response + step_map):
                raise TypeError("tokens and steps are whole numbers")
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(f"{where}: this is no JSON object with {', '.join(FIELDS)} ({error}): "
                             "write one such object per line") from None
        if not len(response) == len(step_map) == len(logp) or not prompt or not response:
            raise ValueError(f"{where}: {len(response)} tokens, {len(step_map)} steps and {len(logp)} "
                             f"log-probabilities behind {len(prompt)} prompt tokens. Every response "
                             "token needs a step and a log-probability, and neither prompt nor response may "
                             "be empty")
        outside = [token for token in prompt + response if not 0 <= token < config.vocab_size]
        if outside:
            raise ValueError(f"{where}: token id {outside[0]} is outside the vocabulary of "
                             f"{config.vocab_size} tokens: is --model the model of these traces?")
        ends = [i + 1 for i, token in enumerate(response) if token in config.eos_ids]
        canvas = row.get("canvas", len(response)) if config.is_full else 0
        rollouts.append(Rollout(prompt, response, min(ends, default=len(response)), step_map, logp=logp,
                                canvas=canvas))
    if not rollouts:
        raise ValueError(f"{path} holds no traces: write one JSON object per line")
    return rollouts


@torch.no_grad()
def differences(model, rollouts, compute, temperature=1.0, block_size=None, is_cut_at_response=False,
                is_cut_at_eos=False):
    """Replayed minus recorded log-probability of every response token -> float32 (N,).

    block_size: another K than the model's. is_cut_at_response, is_cut_at_eos: repeat this mistake of another
    engine, see MISTAKES. With is_cut_at_eos only the tokens up to eos are compared.
    """
    config = dataclasses.replace(model.config, block_size=block_size or model.config.block_size)
    found = []
    for r in rollouts:
        # To repeat is_cut_at_response, the prompt gets padding in front, so that it ends where a block ends.
        # For P = 9 and K = 4 that takes 3 tokens. Nobody sees them, and all real tokens keep their positions.
        shift = -len(r.prompt) % config.block_size if is_cut_at_response else 0
        moved = dataclasses.replace(r, prompt=[config.pad_id] * shift + r.prompt)
        moved.response = r.response[:r.num_tokens] if is_cut_at_eos else r.response
        rows, = rollout.build_rows([moved], config)
        known = len(moved.response)
        values = torch.zeros(known)
        for part in rollout.packing.micro_batches([rows], compute, model):
            layout = part.layout
            end = len(moved.prompt) + known
            # Nobody may see the padding, nor what stands behind eos if the last block is cut there. Each of
            # these tokens gets document -1 and a view of its own, so it sees only itself.
            is_nowhere = (layout.position < shift) | (layout.position >= end) & bool(is_cut_at_eos)
            document = layout.document.masked_fill(is_nowhere, -1)
            alone = torch.arange(layout.view.shape[1], device=layout.view.device) + 1000000
            view = torch.where(is_nowhere, alone, layout.view)
            part = part._replace(layout=layout._replace(
                position=(layout.position - shift).clamp(min=0), document=document, view=view))
            logp, _ = rollout.forward_rows(model, part, compute, temperature)
            values[part.targets.response_index.cpu()] = logp.cpu()
        found.append(values - torch.tensor(r.logp[:known]))
    return torch.cat(found)


def is_rounding(model, found):
    """Whether differences are only rounding. In float32: all below 1e-3 nats. Else: below 0.02 on average."""
    if model.embed.weight.dtype == torch.float32:
        return bool(found.abs().max() < 1e-3)
    return bool(found.abs().mean() < 0.02)


def check(model, path, compute, temperature):
    """Prints the gap of a file of traces, also by position in the block, and its likely cause -> mean gap."""
    config = model.config
    rollouts = read_traces(path, config)
    found = differences(model, rollouts, compute, temperature)
    gap = float(found.abs().mean())
    print(f"{len(rollouts)} traces: replayed and recorded log-probabilities differ by {gap:.1e} on average, "
          f"by up to {found.abs().max():.1e}")
    # For every token: its position, and the position behind the last token of its text. With full attention
    # both are counted from the start of the response, where the first block begins.
    position, end = torch.tensor([(start + j, start + len(r.response)) for r in rollouts
                                  for start in [0 if config.is_full else len(r.prompt)]
                                  for j in range(len(r.response))]).T
    for place in (position % config.block_size).unique().tolist():
        gap_here = found[position % config.block_size == place].abs().mean()
        print(f"  tokens at position {place} of a block: {gap_here:.1e}")
    if is_rounding(model, found):
        print("The replay agrees with what was recorded.")
        return gap
    tries = {}  # cause -> arguments of `differences`
    if not config.is_full:  # with full attention there are no blocks to cut
        tries |= MISTAKES
        tries |= {f"blocks were of size {size}, not {config.block_size} (--block_size {size})":
                  dict(block_size=size) for size in BLOCK_SIZES}
    tries |= {f"the log-probabilities were recorded at temperature {other}, not {temperature} (--temperature "
              f"{other})": dict(temperature=other) for other in TEMPERATURES}
    usual = dict(temperature=temperature)
    found_causes = [text for text, mistake in tries.items()
                    if is_rounding(model, differences(model, rollouts, compute, **usual | mistake))]
    is_open = position // config.block_size == end // config.block_size  # in a last block that is not whole
    is_last_alone = is_open.any() and not is_open.all() and is_rounding(model, found[~is_open])
    if is_last_alone and not config.is_full and not found_causes:
        found_causes.append("perhaps tokens behind eos are missing. They were in sight when others were "
                            "drawn, so a trace must hold the whole last block")
    # A filter makes every token that it keeps more probable. So no recorded number is below the replayed one.
    # Wrong masks or blocks give differences of either sign.
    if found.max() < 1e-3:
        found_causes.append("perhaps the log-probabilities were recorded after top-k or top-p, since none is "
                            "below the replayed one. Record them before these filters")
    for text in found_causes or ["not one of those that are known here"]:
        print(f"Cause: {text}.")
    return gap
