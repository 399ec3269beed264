"""examples/walk.py - one prompt's whole way through an RL step, with its numbers.

    python examples/walk.py

The tiny model in assets/ answers 894+396= eight times. Sections 1 to 5 follow the first response: how it was
decoded, and how its trace becomes a training row. Sections 6 to 8 take all eight from their rewards to one
update. Read this file beside its output, or step through it in a debugger: python -m pdb examples/walk.py

The words are those of the glossary in rollout.py. All numbers come from the plain functions in the six files,
and not from their fast twins in plumbing/. Left out is what tracerl.py adds: many prompts, several processes,
and further RL steps.

These are the sections. `head` prints the text of each: title, what you see, and the names of the columns.

1. THE PROMPT (the tokenizer)
The model reads the ids of these tokens. The tokens are cut into blocks of four, from the first token on.

2. THE TRACE (rollout.generate)
Each denoising step sees a block with masks, and reveals tokens. The numbers are their log-probabilities.
    block  step  before the step          revealed in the first, second, third and fourth place

3. THE TRAINING ROW (rollout.build_rows)
Behind the clean text stand the views. Shown are the clean text up to block 2, and the views of that block.
The line `target` shows, under a mask, the token to predict there.

4. THE ATTENTION MASK (model.may_attend)
A token on the left sees the tokens on top that have an x. A view sees itself, and earlier clean blocks.

5. THE REPLAY (rollout.replay)
One forward of the row gives every log-probability of the trace again. The difference should be rounding only.
    token     step    recorded    replayed  difference

6. REWARDS AND ADVANTAGES (eval_math.math_reward, tracerl.group_advantages)
A response earns 1 if it is right, else 0. Its advantage is (reward - mean) / std, over the group.
    seed  response                    reward  advantage

7. THE LOSS AND THE UPDATE (tracerl.policy_loss)
All ratios are 1, all responses equally long. So the advantages cancel: the loss is 0. The gradient is not.

8. AFTER THE UPDATE (rollout.replay)
The log-probability of a response is the sum over its trained tokens. Two carries make up most of the change.
    seed  reward    before     after    change  1st carry  2nd carry   response
"""

import sys
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the six files are in the folder above

import torch  # noqa: E402

import rollout  # noqa: E402
from eval_math import Problem, math_reward, response_text  # noqa: E402
from model import Layout, dense_mask  # noqa: E402
from plumbing import checkpoints, machine  # noqa: E402
from tracerl import group_advantages, policy_loss  # noqa: E402


def as_in_the_readme(is_masked, step):
    """A strategy: it reveals the tokens of every block in the order of the README's example, 1 3 1 2."""
    # The usual strategy asks how sure the model is. Here a token only waits for its step, counted from 0.
    return is_masked & (torch.tensor([0, 2, 0, 1]) <= step[:, None])


def head(number):
    """Prints what the docstring at the top says about a section."""
    # Each section is one paragraph there. It begins with the number of the section.
    print("\n" + next(text for text in __doc__.strip().split("\n\n") if text.startswith(f"{number}. ")))


def line(name, items):
    """Prints a name, and behind it one column for each token."""
    print(f"    {name:<10}" + "".join(f"{item:>3}" for item in items))


def main():
    """Prints the eight sections."""
    # The model was fine-tuned on sums in which some carries are forgotten.
    model, tokenizer = checkpoints.load_model(machine.start_of("block"), device="cpu")
    K = model.config.block_size  # tokens per block
    # words[4] is the text of token 4. The mask token is printed as "?".
    words = [tokenizer.decode([token]).replace("<mask>", "?") for token in range(model.config.vocab_size)]

    head(1)
    prompt = tokenizer("894+396=").input_ids
    line("token", [words[token] for token in prompt])
    line("id", prompt)
    line("block", [position // K for position in range(len(prompt))])

    head(2)
    # Eight responses to one prompt are a group: G is 8. A seed decides all draws of its response. These seeds
    # were found by trying, so that some responses are right and some are wrong. A strategy of one's own is
    # named by its file and its function.
    decoding = rollout.Decoding(max_new_tokens=20, strategy=f"{__file__}:as_in_the_readme")
    rollouts = [rollout.generate(model, prompt, decoding, seed) for seed in range(15, 23)]
    r = rollouts[0]  # the response that sections 2 to 5 follow
    text = [words[token] for token in r.response]
    # Blocks 0 and 1 are the prompt. `blocks_of` gives the response indices of the others: first [0, 1, 2, 3].
    for number, block in enumerate(rollout.blocks_of(len(prompt), len(r.response), K), start=2):
        # The step map says which step revealed each token. For block 2 it is 1 3 1 2.
        for step in sorted({r.step_map[j] for j in block}):
            # Tokens of earlier steps already stand in the text. All others are still masks.
            before = " ".join(text[j] if r.step_map[j] < step else "?" for j in block)
            # The log-probability is the one that was recorded when the token was drawn.
            drawn = [f"{text[j]} {r.logp[j]:.3f}" if r.step_map[j] == step else "." for j in block]
            print(f"    {number:>5}{step:>6}  {before:<15}" + "".join(f"{item:>16}" for item in drawn))

    head(3)
    row = rollout.build_rows([r], model.config, trained_only=True)[0][0]
    # The row is long. Shown is what concerns block 2: the clean text up to its end, and its three views.
    part = [i for i in range(len(row.tokens)) if row.block[i] <= 2]
    line("token", [words[row.tokens[i]] for i in part])
    # A view has the positions and the number of its block. Only the view number tells the copies apart.
    for name in ("position", "block", "view"):
        line(name, [getattr(row, name)[i] for i in part])
    # Every trained token is a target once, in the view of the step that revealed it.
    targets = {target.logit_index: words[target.token] for target in row.targets}
    line("target", [targets.get(i, ".") for i in part])

    head(4)
    # The rule compares document, block and view of two tokens. One text is one document, here number 0. The
    # table of numbers is (4, T). `[:, None]` gives each of the four lines a batch dimension: (1, T).
    layout = Layout(*torch.tensor([row.position, [0] * len(row.tokens), row.block, row.view])[:, None])
    mask = dense_mask(layout)[0, 0]  # (T, T)
    line("", [words[row.tokens[i]] for i in part])
    for i in part:
        line(f"{words[row.tokens[i]]}  view {row.view[i]}", ["x" if mask[i, j] else "." for j in part])

    head(5)
    # Decoding took one forward per step. It took one more for each clean block but the last, to fill the
    # cache. Replay takes one forward for the whole row, without a cache. The result is a tensor for each
    # response, with the gradient that section 7 needs.
    replayed = rollout.replay(model, rollouts)
    for token, step, old, new in zip(text, r.step_map, r.logp, replayed[0].tolist()):
        print(f"    {token:<10}{step:>4}{old:>12.6f}{new:>12.6f}{new - old:>12.1e}")
    # The gap is the difference without its sign. tracerl.py stops if the gap is more than rounding.
    gap = rollout.replay_gap(model, rollouts, rollout.PLAIN, temperature=1.0)
    print(f"    gap of the whole group: {gap['gap']:.1e} on average, {gap['gap_max']:.1e} at most")

    head(6)
    # A response is right if it has ended, and its last box holds 1290.
    rewards = [math_reward(Problem("894+396=", "1290"), response_text(r, tokenizer), r) for r in rollouts]
    # The rewards are a table with a line for each prompt. Here there is one line.
    advantages = group_advantages(torch.tensor([rewards]))[0]  # (G,)
    for r, reward, advantage in zip(rollouts, rewards, advantages):
        print(f"    {r.seed:>4}  {response_text(r, tokenizer):<26}{reward:>8.0f}{advantage:>11.3f}")

    head(7)
    # The tokens of all responses up to eos stand in one long list of N tokens. Tokens behind eos were in
    # sight, but they are not trained.
    lengths = torch.tensor([r.num_tokens for r in rollouts])  # (G,)
    logp = torch.cat([logp[:length] for logp, length in zip(replayed, lengths)])  # (N,)
    # tracerl.py adds up the same loss over micro-batches. There `targets` is a record of many fields. The
    # loss reads only two of them, logp_old and advantage. The policy has not moved yet, so its
    # log-probabilities are the old ones. Every token has the advantage of its response.
    targets = SimpleNamespace(logp_old=logp.detach(), advantage=advantages.repeat_interleave(lengths))
    loss = policy_loss(logp, targets, num_tokens=len(logp), clip_eps=0.2, kl_coef=0.01)
    loss.backward()
    # A gradient longer than 1 would be shortened to 1. lr=1e-4 is the learning rate of tracerl.py after its
    # warm-up.
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.0).step()
    print(f"    {len(logp)} trained tokens, loss {loss:.1e}, length of the gradient {norm:.3f}")

    head(8)
    # The first carry (of 4 + 6 = 10) is the third token of a response, and the second carry (of 9 + 9 + 1 =
    # 19) is the seventh. A response that forgets a carry has 0 there. The one with seed 19 forgets only the
    # first carry.
    for r, reward, old, new in zip(rollouts, rewards, replayed, rollout.replay(model, rollouts)):
        before = old[:r.num_tokens].sum()
        after = new[:r.num_tokens].sum()
        print(f"{r.seed:>8}{reward:>8.0f}{before:>10.3f}{after:>10.3f}{after - before:>+10.3f}"
              f"{new[2] - old[2]:>+11.3f}{new[6] - old[6]:>+11.3f}   {response_text(r, tokenizer)}")


if __name__ == "__main__":
    main()
