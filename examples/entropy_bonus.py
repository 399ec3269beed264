"""examples/entropy_bonus.py - a loss that also asks the policy to stay undecided.

    torchrun tracerl.py --loss examples/entropy_bonus.py:loss --name entropy

A policy that has become sure of everything finds nothing new. The bonus works against that. It costs little:
every loss is given the policy's entropy at each target, with its gradient.
"""

from tracerl import policy_loss

COEF = 0.01  # weight of the bonus


def loss(logp, entropy, targets, num_tokens, clip_eps, kl_coef):
    """--loss: the usual one, minus COEF times the mean entropy over all targets of the update."""
    return policy_loss(logp, targets, num_tokens, clip_eps, kl_coef) - COEF * entropy.sum() / num_tokens
