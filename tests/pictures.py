"""pictures.py - draws the README's pictures with the project's own code.

    python tests/pictures.py
    python tests/pictures.py --words runs/smollm2-tracerl/checkpoints/step-40      # see examples/smollm2.py

The first command writes assets/decode.gif, which shows a decoding step by step. It also writes assets/mask.png,
which shows the training row of its first block beside the attention mask. The tiny model decodes 894+396=. A
strategy of this file reveals the tokens of every block in the order of the text's example: step_map 1 3 1 2.

The second command writes assets/words.gif: a model that knows English answers a word problem.
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
from plumbing import checkpoints, machine
from rollout import Decoding

PROMPT = "894+396="
RESPONSE = "101;191;121;\\boxed{1290}"
ORDER = torch.tensor([0, 2, 0, 1])  # the step in its block that reveals each token, counted from 0


def as_in_the_text(is_masked, step):
    """A --strategy: the order of the example in every block."""
    return is_masked & (ORDER <= step[:, None])


def draw_gif(r, tokenizer, path):
    """A decoding as an animated picture: a cell per token, in the colour of its step."""
    last = max(r.step_map)
    texts = [tokenizer.decode([token]) for token in r.prompt + r.response]
    steps = [0] * len(r.prompt) + r.step_map
    title = ""
    if len(r.prompt) > 9:  # a prompt in words stands above the cells
        title = tokenizer.decode(r.prompt).replace("\n", "  ")
        texts = texts[len(r.prompt):]
        steps = r.step_map
    texts = [text.strip() or text for text in texts]
    widths = [max(2.5, len(text) + 1.2) for text in texts]  # in characters
    starts = [sum(widths[:place]) for place in range(len(texts))]
    size = sum(widths)
    figure = Figure(figsize=(0.115 * size, 1.1 if title else 0.9), dpi=100)
    axes = figure.add_axes((0, 0, 1, 1))

    def draw(step):
        axes.clear()
        axes.set(xlim=(0, size), ylim=(0, 2.1 if title else 1.5), xticks=[], yticks=[])
        for start, width, text, at in zip(starts, widths, texts, steps):
            is_shown = at <= step
            colour = colormaps["viridis"](0.35 + 0.65 * at / last) if at and is_shown else "0.92"
            axes.add_patch(Rectangle((start, 0), width - 0.2, 1, color=colour))
            axes.text(start + width / 2, 0.5, text if is_shown else "?", ha="center", va="center",
                      family="monospace", fontsize=9)
        axes.text(0.4, 1.15, f"after denoising step {min(step, last)} of {last}", fontsize=8)
        axes.text(0.4, 1.65, title, fontsize=9)

    frames = [0, *range(last + 1), *[last] * 4]
    FuncAnimation(figure, draw, frames).save(path, writer=PillowWriter(fps=2))


def draw_mask(row, tokenizer, mask_id, path):
    """One training row, [clean text | view | view | ...], beside its attention mask, by model.may_attend."""
    numbers = (row.position, [0] * len(row.tokens), row.block, row.view)
    layout = Layout(*(torch.tensor([column]) for column in numbers))
    texts = ["?" if token == mask_id else tokenizer.decode([token]) for token in row.tokens]
    size = len(texts)
    figure = Figure(figsize=(0.2 * size + 1, 0.2 * size), layout="constrained")
    axes = figure.add_subplot()
    axes.imshow(dense_mask(layout)[0, 0], cmap="Blues", vmin=0, vmax=1.6)
    axes.set_xticks(range(size), texts, fontsize=9, family="monospace")
    axes.set_yticks(range(size), texts, fontsize=9, family="monospace")
    for target in row.targets:
        axes.get_xticklabels()[target.logit_index].set_color("C3")
        axes.get_yticklabels()[target.logit_index].set_color("C3")
    axes.xaxis.tick_top()
    starts = [0]  # of each block in each view
    for place in range(1, size):
        if (row.block[place], row.view[place]) != (row.block[place - 1], row.view[place - 1]):
            starts.append(place)
            axes.axhline(place - 0.5, color="0.6", linewidth=0.5)
            axes.axvline(place - 0.5, color="0.6", linewidth=0.5)
    for start, stop in zip(starts, [*starts[1:], size]):
        name = f"view {row.view[start]}" if row.view[start] else "clean text"
        axes.text(size, (start + stop - 1) / 2, f"block {row.block[start]}, {name}", va="center", fontsize=8)
    axes.set_xlabel("seen by the token on the left; red: tokens to predict; ? is the mask token", fontsize=8)
    figure.savefig(path, dpi=100)


def example():
    """The decoding of the running example -> Rollout, model, tokenizer."""
    model, tokenizer = checkpoints.load_model(machine.start_of("block"))
    prompt = tokenizer(PROMPT).input_ids
    decoding = Decoding(max_new_tokens=20, strategy=f"{__file__}:as_in_the_text")
    for seed in range(200):  # until the pupil forgets no carry
        r = rollout.generate(model, prompt, decoding, seed)
        if tokenizer.decode(r.response[:r.num_tokens - 1]) == RESPONSE and r.step_map[:4] == [1, 3, 1, 2]:
            return r, model, tokenizer
    raise ValueError(f"no seed gives {RESPONSE} in the order of the example")


QUESTION = "Tom has 8 cards, buys 6 more and finds 2. How many cards does Tom have?\nAnswer:"


def draw_words(checkpoint):
    """A checkpoint of examples/smollm2.py answers a question, in assets/words.gif."""
    model, tokenizer = checkpoints.load_model(checkpoint)
    r = rollout.generate(model, tokenizer(QUESTION).input_ids, Decoding(max_new_tokens=48), seed=1)
    print(tokenizer.decode(r.response))
    # The tokens behind eos are cut off: nobody would read them.
    r = replace(r, response=r.response[:r.num_tokens], step_map=r.step_map[:r.num_tokens])
    draw_gif(r, tokenizer, ROOT / "assets/words.gif")


def main():
    """Decodes, and draws both pictures."""
    if "--words" in sys.argv:
        return draw_words(sys.argv[-1])
    r, model, tokenizer = example()
    draw_gif(r, tokenizer, ROOT / "assets/decode.gif")
    first = replace(r, response=r.response[:4], step_map=r.step_map[:4], logp=r.logp[:4])
    (row,), = rollout.build_rows([first], model.config)
    draw_mask(row, tokenizer, model.config.mask_id, ROOT / "assets/mask.png")


if __name__ == "__main__":
    main()
