"""pictures.py - draws the README's pictures of one decoding, with the project's own code.

    python tests/pictures.py --model runs/warm-start-28d06fcd/checkpoint --prompt "894+396=" \
        --max_new_tokens 20 --seed 20

writes assets/decode.gif (the decoding, step by step) and assets/mask.png (the training row of its first two
blocks beside the attention mask). The flags are those of `python rollout.py`; the model is the warm start
that `torchrun tracerl.py` makes.
"""

import sys
from dataclasses import replace
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch
from matplotlib import colormaps
from matplotlib.animation import FuncAnimation, PillowWriter
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

import rollout
from model import Layout, dense_mask
from plumbing import player


def draw_gif(r, tokenizer, path):
    """A decoding as an animated picture: a cell per token, in the colour of its step."""
    prompt, last = [tokenizer.decode([token]) for token in r.prompt], max(r.step_map)
    texts = prompt + [tokenizer.decode([token]) for token in r.response]
    steps = [0] * len(prompt) + r.step_map
    figure = Figure(figsize=(0.32 * len(texts), 0.9), dpi=100)
    axes = figure.add_axes((0, 0, 1, 1))

    def draw(step):
        axes.clear()
        axes.set(xlim=(0, len(texts)), ylim=(0, 1.5), xticks=[], yticks=[])
        for place, (text, at) in enumerate(zip(texts, steps)):
            is_shown, colour = at <= step, colormaps["viridis"](0.35 + 0.65 * at / last)
            box = Rectangle((place, 0), 0.94, 1, color=colour if at and is_shown else "0.92")
            axes.add_patch(box)
            axes.text(place + 0.47, 0.5, text if is_shown else "?", ha="center", va="center",
                      family="monospace", fontsize=9 if len(text) < 3 or not is_shown else 5)
        axes.text(0.1, 1.15, f"after denoising step {min(step, last)} of {last}", fontsize=8)

    frames = [0, *range(last + 1), *[last] * 4]
    FuncAnimation(figure, draw, frames).save(path, writer=PillowWriter(fps=2))


def draw_mask(row, tokenizer, mask_id, path):
    """One training row, [clean text | view | view | ...], beside its attention mask, by model.may_attend."""
    fields = (torch.tensor([values]) for values in (row.position, [0] * len(row.tokens), row.block, row.view))
    texts = ["?" if token == mask_id else tokenizer.decode([token]) for token in row.tokens]
    size, figure = len(texts), Figure(figsize=(0.2 * len(texts),) * 2, layout="constrained")
    axes = figure.add_subplot()
    axes.imshow(dense_mask(Layout(*fields))[0, 0], cmap="Blues", vmin=0, vmax=1.6)
    axes.set_xticks(range(size), texts, fontsize=9, family="monospace")
    axes.set_yticks(range(size), texts, fontsize=9, family="monospace")
    for target in row.targets:
        axes.get_xticklabels()[target[0]].set_color("C3")
        axes.get_yticklabels()[target[0]].set_color("C3")
    axes.xaxis.tick_top()
    for place in range(1, size):
        if (row.block[place], row.view[place]) != (row.block[place - 1], row.view[place - 1]):
            axes.axhline(place - 0.5, color="0.6", linewidth=0.5)
            axes.axvline(place - 0.5, color="0.6", linewidth=0.5)
    axes.set_xlabel("seen by the token on the left; red: tokens to predict; ? is the mask token", fontsize=8)
    figure.savefig(path, dpi=100)


def main(argv=None):
    """Decodes, and draws both pictures."""
    r, model, tokenizer = player.main(rollout, argv)
    (ROOT / "assets").mkdir(exist_ok=True)
    draw_gif(r, tokenizer, ROOT / "assets/decode.gif")
    K = model.config.block_size
    end = rollout.blocks_of(len(r.prompt), len(r.response), K)[1][-1] + 1  # of the second block
    r = replace(r, response=r.response[:end], step_map=r.step_map[:end], logp=r.logp[:end])
    row = rollout.build_rows([r], model.config, K)[0][0]
    draw_mask(row, tokenizer, model.config.mask_id, ROOT / "assets/mask.png")


if __name__ == "__main__":
    main()
