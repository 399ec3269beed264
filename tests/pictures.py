"""pictures.py - draws the README's pictures, with the project's own code.

    python tests/pictures.py --seed 20

It writes assets/mask.png: the training row of the running example beside the attention mask. The example is
the prompt 894+396= and the block 1 0 1 ; with step_map 1 3 1 2, as in the docstrings. It needs no model.
It also writes assets/decode.gif: a decoding of the tiny model, step by step. Flags are those of rollout.py.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch
from matplotlib import colormaps
from matplotlib.animation import FuncAnimation, PillowWriter
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

import rollout
from model import dense_mask
from plumbing import packing, player, tiny
from rollout import Rollout


def draw_gif(r, tokenizer, path):
    """A decoding as an animated picture: a cell per token, in the colour of its step."""
    last = max(r.step_map)
    texts = [tokenizer.decode([token]) for token in r.prompt + r.response]
    steps = [0] * len(r.prompt) + r.step_map
    figure = Figure(figsize=(0.32 * len(texts), 0.9), dpi=100)
    axes = figure.add_axes((0, 0, 1, 1))

    def draw(step):
        """The picture after a denoising step."""
        axes.clear()
        axes.set(xlim=(0, len(texts)), ylim=(0, 1.5), xticks=[], yticks=[])
        for place, (text, revealed_at) in enumerate(zip(texts, steps)):
            is_shown = revealed_at <= step
            is_drawn = is_shown and revealed_at > 0  # the prompt is there from the start
            colour = colormaps["viridis"](0.35 + 0.65 * revealed_at / last) if is_drawn else "0.92"
            axes.add_patch(Rectangle((place, 0), 0.94, 1, color=colour))
            axes.text(place + 0.47, 0.5, text if is_shown else "?", ha="center", va="center",
                      family="monospace", fontsize=9 if len(text) < 3 or not is_shown else 5)
        axes.text(0.1, 1.15, f"after denoising step {min(step, last)} of {last}", fontsize=8)

    frames = [0, *range(last + 1), *[last] * 4]
    FuncAnimation(figure, draw, frames).save(path, writer=PillowWriter(fps=2))


def running_example(tokenizer):
    """The prompt 894+396= and its first block, 1 0 1 ; with step_map 1 3 1 2."""
    prompt, response = (tokenizer(text, add_special_tokens=False).input_ids for text in ("894+396=", "101;"))
    return Rollout(prompt, response, len(response), [1, 3, 1, 2])


def draw_mask(row, config, tokenizer, path):
    """One training row, [clean text | view | view | ...], beside its attention mask, by model.may_attend."""
    texts = ["?" if token == config.mask_id else tokenizer.decode([token]) for token in row.tokens]
    size = len(texts)
    figure = Figure(figsize=(0.26 * size, 0.26 * size), layout="constrained")
    axes = figure.add_subplot()
    layout = packing.pad([row], config.pad_id, torch.device("cpu")).layout
    axes.imshow(dense_mask(layout)[0, 0], cmap="Blues", vmin=0, vmax=1.6)
    axes.set_xticks(range(size), texts, fontsize=11, family="monospace")
    axes.set_yticks(range(size), texts, fontsize=11, family="monospace")
    for target in row.targets:
        axes.get_xticklabels()[target.logit_index].set_color("C3")
        axes.get_yticklabels()[target.logit_index].set_color("C3")
    axes.xaxis.tick_top()
    for place in range(1, size):
        if (row.block[place], row.view[place]) != (row.block[place - 1], row.view[place - 1]):
            axes.axhline(place - 0.5, color="0.6", linewidth=0.5)
            axes.axvline(place - 0.5, color="0.6", linewidth=0.5)
    text = "dark: seen by the token on the left; red: to be predicted; ? is the mask token"
    axes.set_xlabel(text, fontsize=9)
    figure.savefig(path, dpi=100)


def main(argv=None):
    """Draws both pictures."""
    (ROOT / "assets").mkdir(exist_ok=True)
    config = tiny.tiny_model().config
    example = running_example(tiny.tiny_tokenizer())
    (row,), = rollout.build_rows([example], config)
    draw_mask(row, config, tiny.tiny_tokenizer(), ROOT / "assets/mask.png")
    r, _, tokenizer = player.main(argv)
    draw_gif(r, tokenizer, ROOT / "assets/decode.gif")


if __name__ == "__main__":
    main()
