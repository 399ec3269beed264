"""examples/strategy.py - a strategy of decoding with a parameter of its own.

    torchrun tracerl.py --strategy examples/strategy.py:falling --name falling
    torchrun tracerl.py --strategy examples/strategy.py:steep --threshold 0.95 --name steep

A strategy says what a denoising step reveals. It may be any function of the draws. All that follows (trace,
views, replay, update) only uses the record of what was revealed in which step.
"""

import functools

from rollout import reveal_dynamic


def falling(confidence, is_masked, quota, step, threshold, fall=0.1):
    """--strategy: like dynamic, but the threshold falls by `fall` with every step in the block.

    When the first tokens of a block are revealed, all others are still masks. So the model should be sure of
    these first tokens. Each token that is revealed helps to draw the others. confidence, is_masked (B, K);
    quota, step (B,). step counts from 0 in the block.
    """
    fallen = threshold - fall * step  # (B,) .9 .8 .7 in the first three steps of a block
    return reveal_dynamic(confidence, is_masked, quota, fallen[:, None])  # (B, 1), for all K positions


# The same with another value. tracerl.py passes only the arguments that it knows. So a parameter of your own
# needs a default.
steep = functools.partial(falling, fall=0.3)
