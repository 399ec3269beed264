"""examples/broken.py - six ways to break the replay, one at a time. What does each look like in the gap?

    python examples/broken.py none                    # the control: tracerl.py as it is
    python examples/broken.py padded --steps 5        # a fault, then any flags of tracerl.py
    python examples/broken.py left_to_right --attention full --lr 3e-4
    python examples/broken.py cut_at_response --model runs/sudoku-start/checkpoint --train_data sudoku

Decoding and evaluation stay as they are (only after_filter sets --top_p 0.8). Each fault replaces one
function of rollout.py: `build_rows`, which makes every training row, or `record`, which keeps what was drawn.
(after_filter also replaces the loss.)
So the gap in the log is that of the broken rows, or of the broken record. The bound on the gap is lifted, or
else the run would stop at once.

Look at the gap of step 1. All faults but after_filter change both sides of a ratio alike. Ratios then begin
at 1, and the loss looks healthy. (`drift_kl` is measured against what was recorded, so it contains the gap.)
Below, a gap has a sign: it is the replayed log-probability minus the recorded one.

    fault             where it makes a gap
    cut_at_response   block attention, unless P is a multiple of K: arithmetic has P = 8, Sudoku has P = 17
    cut_at_eos        where tokens behind eos were revealed before others. With Sudoku in blocks of 4 there
                      are no tokens behind eos
    small_blocks      block attention
    left_to_right     wherever decoding was not from left to right
    after_filter      with --top_k or --top_p
    padded            everywhere
"""

import dataclasses
import math
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import rollout  # noqa: E402
import tracerl  # noqa: E402
from plumbing import runs  # noqa: E402
from rollout import build_rows, record  # noqa: E402

# ------------------------------------------------------------------------------------------------------------
# In place of rollout.build_rows: each of these changes one thing, and then calls the real build_rows.


def cut_at_response(rollouts, config, *how, **more):
    """Training blocks begin at the start of the response. Decoding cuts them at positions 0, K, 2K, ...

    With P = 9 and K = 4, decoding cuts the response into the positions 9 10 11 | 12 13 14 15 | 16 ...
    Training cuts it into 9 10 11 12 | 13 14 15 16 | ... The authors' code for block attention does this.
    Tokens near a border see too much or too little. If the length of the prompt is a multiple of K, both cuts
    are the same, and there is no gap. Otherwise every block has gaps.
    """
    check_blocks(config)
    # Every prompt is made longer, so that it ends where a block ends. For P = 9, that takes 3 tokens.
    missing = [-len(r.prompt) % config.block_size for r in rollouts]
    longer = [dataclasses.replace(r, prompt=[config.pad_id] * number + r.prompt)
              for r, number in zip(rollouts, missing)]
    rows_of_each = build_rows(longer, config, *how, **more)
    for rows, number in zip(rows_of_each, missing):
        for row in rows:
            # The additional tokens are removed again, since nobody may see them. Others keep their blocks.
            for numbers in (row.tokens, row.position, row.block, row.view):
                del numbers[:number]
            row.position = [position - number for position in row.position]
            row.targets = [t._replace(logit_index=t.logit_index - number) for t in row.targets]
    return rows_of_each


def cut_at_eos(rollouts, config, *how, **more):
    """In the last block, what stands behind eos is shown as masks. The sampler may have seen it.

    The authors' code for block attention keeps a response up to eos, and fills it up with padding. The
    padding counts as revealed last, so it is a mask in every trained state. Only tokens of the last block can
    have a gap, and most of them have none. So the mean is small, but the largest gap is not. (The gap in the
    log includes the tokens behind eos, which nobody trains.)
    """
    cut = []
    for r in rollouts:
        num_behind = len(r.response) - r.num_tokens
        last = max(r.step_map) + 1  # a denoising step after all others
        cut.append(dataclasses.replace(r, step_map=r.step_map[:r.num_tokens] + [last] * num_behind))
    return build_rows(cut, config, *how, **more)


def small_blocks(rollouts, config, *how, **more):
    """Training blocks are a quarter of those in decoding: rows of K = 4 for rollouts of K = 16.

    The configuration that LightningRL ships goes further: it decodes in blocks of 32, and trains in blocks of
    4. A token does not see what is to the right of its small block. To the left of the small block it sees
    finished tokens, though some of these were still masks when it was drawn. The gap is large in every block.
    Most gaps are negative: in such a state the token is less probable than when it was drawn.
    """
    check_blocks(config)
    small = dataclasses.replace(config, block_size=max(1, config.block_size // 4))
    return build_rows(rollouts, small, *how, **more)


def left_to_right(rollouts, config, views=None, *how, **more):
    """Every token is predicted from the tokens before it, though it was drawn in another order.

    This is the log-probability of JustGRPO, whose rollouts do go from left to right. A public run with a
    block model of 0.6B parameters used this log-probability for rollouts in any order. That run trained on
    code. Its reward stayed up, while HumanEval fell from 47.0 to 23.8. (In that run a token saw nothing to
    its right. Here it still sees masks there. For rows like those of that run, use small_blocks with K = 4:
    its blocks then hold one token each.) Under left_to_right a token has no gap if it was drawn when just the
    tokens before it were revealed. The others have gaps of either sign.
    """
    return build_rows(rollouts, config, prefix_views, *how, **more)


def prefix_views(block):
    """The views of the block `1 0 1 ;` are ????  1???  10??  101?. Each predicts its first mask."""
    return [(block[n:], [j]) for n, j in enumerate(block)]


def padded(rollouts, config, *how, **more):
    """16 padding tokens (K of them if K is larger) stand in front of every prompt, and all tokens see them.

    The authors' code for LLaDA pads prompts on the left, and hides the padding from no token. The sampler of
    that code pads prompts, too. But its batches differ from those in training, so a prompt gets another
    number of padding tokens. Here the sampler pads nothing. Tokens of every block have a gap, also those of
    the first. Most gaps are negative.
    """
    number = max(16, config.block_size)  # whole blocks for K = 4, 16 and 32: blocks are cut where they were
    longer = [dataclasses.replace(r, prompt=[config.pad_id] * number + r.prompt) for r in rollouts]
    return build_rows(longer, config, *how, **more)


def check_blocks(config):
    """ValueError with full attention, which knows no blocks."""
    if config.is_full:
        raise ValueError("this fault is about blocks: with full attention there is nothing to break")


# ------------------------------------------------------------------------------------------------------------
# In place of rollout.record, and of the loss.


def after_filter(prompt, seed, columns, decoding, config):
    """The sampler hands over log-probabilities after top-k and top-p. Training has none of these filters.

    Engines may report such numbers, and trainers use them as old log-probabilities. TRL, verl and ms-swift
    have issues about this. What a filter keeps becomes more probable, so no gap is positive. With top-p .8
    alone, the kept tokens have at least .8 of the probability, so no gap is below log .8 = -.22. Ratios
    should begin at 1. They begin at the sum of the probabilities that the filter kept.
    """
    r = record(prompt, seed, columns, decoding, config)
    r.logp = [math.log(p) for p in r.confidence]  # p: after the filters
    return r


def recorded_is_old(logp, targets, num_tokens, clip_eps, kl_coef):
    """--loss: the usual one, with the recorded log-probabilities in place of the old ones."""
    targets.logp_old.copy_(targets.logp)  # in place, so that the log shows these ratios, too
    return tracerl.policy_loss(logp, targets, num_tokens, clip_eps, kl_coef)


# ------------------------------------------------------------------------------------------------------------

FAULTS = {  # by name: which functions of rollout.py are replaced, and by what
    "none": {},
    "cut_at_response": dict(build_rows=cut_at_response),
    "cut_at_eos": dict(build_rows=cut_at_eos),
    "small_blocks": dict(build_rows=small_blocks),
    "left_to_right": dict(build_rows=left_to_right),
    "after_filter": dict(record=after_filter),
    "padded": dict(build_rows=padded),
}
ANY_GAP = ["--max_gap=1e9"]  # nats
# A name in FAULTS gets the flags ANY_GAP, unless it has others here. The user's own flags win.
FLAGS = {
    "none": [],  # the replay law is enforced
    "after_filter": [*ANY_GAP, "--top_p=0.8", f"--loss={__file__}:recorded_is_old"],
}


def main(argv=None):
    """Plants a fault, and trains with it -> the content of summary.json."""
    words = sys.argv[1:] if argv is None else argv
    name = words[0] if words else ""
    if name not in FAULTS:
        raise ValueError(f"the first word must be one of {', '.join(FAULTS)}, got {name!r}")
    for replaced, function in FAULTS[name].items():
        setattr(rollout, replaced, function)
    usual = [f"--name=broken-{name}", *FLAGS.get(name, ANY_GAP)]
    return tracerl.main(usual + words[1:])


if __name__ == "__main__":
    runs.run_command(main)
