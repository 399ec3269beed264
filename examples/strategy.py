"""examples/strategy.py - a strategy of decoding with a parameter of its own.

    torchrun tracerl.py --strategy examples/strategy.py:falling --name falling
    torchrun tracerl.py --strategy examples/strategy.py:steep --threshold 0.95 --name steep

A strategy says what a denoising step reveals. It may be anything that looks at the draws: all that follows
(trace, views, replay, update) works from the record of what was revealed when.
"""

import functools

from rollout import reveal_dynamic


def falling(confidence, is_masked, quota, step, threshold, fall=0.1):
    """--strategy: like dynamic, but the threshold falls by `fall` with every step in the block.

    The first tokens of a block are revealed in the dark, so they should be sure. With each of them the others
    see more. confidence, is_masked (B, K); quota, step (B,); step counts from 0 in the block.
    """
    return reveal_dynamic(confidence, is_masked, quota, (threshold - fall * step)[:, None])  # (B, 1) of (B, K)


# The same with another value: a parameter with a default is one that the caller does not have to know.
steep = functools.partial(falling, fall=0.3)
