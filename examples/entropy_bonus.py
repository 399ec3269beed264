"""examples/entropy_bonus.py - a loss that also asks the policy to stay undecided.

    torchrun tracerl.py --loss examples/entropy_bonus.py:loss --name entropy

The entropy of the policy is given to every loss, at each target and with its gradient. A policy that has
become sure of everything finds nothing new. The bonus works against that, and costs nothing.
"""

from tracerl import policy_loss

COEF = 0.01  # weight of the bonus


def loss(logp, entropy, targets, num_tokens, clip_eps, kl_coef):
    """--loss: the usual one, minus COEF times the mean entropy. Its divisor is that of the whole update."""
    return policy_loss(logp, targets, num_tokens, clip_eps, kl_coef) - COEF * entropy.sum() / num_tokens
