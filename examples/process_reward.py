"""examples/process_reward.py - a reward for each right step of a solution, and not for its answer alone.

    torchrun tracerl.py --advantage value --reward examples/process_reward.py:columns --name process

The solution of 894+396= is 101;191;121;\\boxed{1290}. For each column it holds the sum and the carry handed
on, and then the answer. Each of these four parts that is right earns a quarter, in the denoising step that
completes it. So the value model can learn from every column, and not only from the end.
"""

import random
import re

from plumbing.tasks import work_out

TOKEN = r"\\boxed\{|<\w+>|[\s\S]"  # how the tiny tokenizer cuts a text


def columns(problem, text, tokens, rollout):
    """--reward: a list with a number for each token, for --advantage value.

    A return is a sum over trace steps (here denoising steps). Each step adds the MEAN reward of its tokens.
    If a part is to earn a quarter, this mean must be a quarter. So every token of the step that completes the
    part gets a quarter. (With a larger --shrink a trace step also holds tokens of other denoising steps. If
    these get 0, the mean of the step is smaller.) In the log, `reward` counts each of these tokens, so it may
    exceed 1.
    """
    a, b = map(int, re.findall(r"\d+", problem.problem))
    right = work_out(a, b, 0.0, random.Random(0)).split(";")  # four parts, by a pupil who never slips
    earned = {}  # denoising step -> what it earns
    start = 0  # the token at which the part begins
    for expected, part in zip(right, text.split(";")):
        size = len(re.findall(TOKEN, part)) + 1  # and one token behind it: a semicolon, or eos at the end
        steps = rollout.step_map[start:min(start + size, len(tokens))]
        is_last = expected is right[-1]  # behind it must stand the end of the response
        has_end = not is_last or start + size == len(tokens) and not rollout.is_truncated
        if part == expected and len(steps) == size and has_end:
            earned[max(steps)] = earned.get(max(steps), 0.0) + 1 / len(right)
        start += size
    return [earned.get(step, 0.0) for step in rollout.step_map[:len(tokens)]]
