"""rollout.py - a trace: recorded, then replayed.

TraceRL (arXiv 2509.06949) trains a diffusion language model on the very states it was in while it decoded.
This file holds both halves of that: `generate` decodes and records, `replay` goes back to what was recorded.

A glossary of twelve words:
  mask            the token "?" that stands where a token is still to be chosen
  block           K neighbouring tokens, which are decoded together; blocks follow one another left to right
  denoising step  one forward of the network, which draws a token for every mask of the block
  reveal          to keep a drawn token: from then on it stands in the text. The others stay masks
  clean           of a block: all its tokens are revealed. They never change again
  trace           which denoising step revealed which token; `step_map` holds the number of that step
  view            a copy of a block as it was before one denoising step, or before several merged ones
  trace step      the denoising steps that share one view: at most as many as --shrink says (usually 1)
  row             one training input: the clean text, and behind it the views. Full attention: one view alone
  replay          to compute the log-probability of every token again, in the state in which it was drawn
  group           the G responses to one prompt
  gap             the distance between a replayed log-probability and the recorded one; it should be zero

Single capital letters, such as K, P or N, are sizes. The first page of model.py lists them. This is one block
of K = 4 tokens while it is decoded, and what the record keeps of it:

    before step 1    ? ? ? ?     step 1 reveals 1 and 1     token                1      0      1      ;
    before step 2    1 ? 1 ?     step 2 reveals ;           step_map             1      3      1      2
    before step 3    1 ? 1 ;     step 3 reveals 0           log-probability  -.002  -.007 -1.302  -.000
    clean            1 0 1 ;                                when drawn

(These numbers are real: examples/walk.py prints them. The third token is the carry, which the model mostly
forgets. It had the probability .27. The order was fixed by hand: the usual strategy would have revealed the
sure tokens first.)

The three states with masks are the views of this block. The token 0 was drawn while 1, 1 and ; were in
sight. In another state it has another probability. That number is the wrong one to train on: the policy did
not draw the token there.

TraceRL uses the sum of these log-probabilities as the log-probability of the trace. Strictly it is a
surrogate. Whether a token is revealed depends on the draw, and draws that are not revealed are thrown
away. So uncertain tokens are rarer among the trained tokens than among the draws. And the choice of what to
reveal gets no gradient: a confidence decides it, and the loss has no term for that decision.

THE REPLAY LAW. In the states of the trace, one view per denoising step, the replayed log-probability of every
token equals the recorded one, up to rounding. If it does not, then sampling and training disagree about
masks, positions, blocks, cache or step map. A training loss does not show this: both sides of its ratio are
wrong in the same way. So every RL step prints the gap.

Read in this order: Rollout, Decoding; sample, the strategies, generate; views, build_rows, lay_out; replay.
The definitions here decode one prompt at a time. plumbing/engine.py does the same for many at once, and tests
compare it with these functions. These calls into plumbing/ matter here and in the files that follow:
  parallel.deal, gather      a process's part of a list; the whole list again, on every process
  packing.micro_batches      turns rows into micro-batches of tensors. `dealt_batches` also gives every
                             process equally many micro-batches, and counts the targets (masked tokens to
                             predict) of all processes
  parallel.optimizer_step    clips the gradient to norm 1, and moves the weights
  flags.call                 calls a function, and passes only the arguments that it declares
"""

import math
import random
import runpy
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from model import KVCache, Row, Targets, attend_by_rule, attention, policy_logits, token_logprobs
from plumbing import flags, packing, parallel
from plumbing.flags import Settings, setting


@dataclass
class Rollout:
    """One response and the trace by which it was decoded. Decoding fills it in, and the update reads it.

    Lists have one entry per response token, unless their comment says otherwise. With block attention the
    response ends with a whole block. Tokens behind the end of the answer are kept, since they were in sight
    when others were drawn.
    """

    prompt: list  # token ids of the prompt
    response: list  # token ids of every decoded block
    num_tokens: int  # how many there are up to and including eos. These earn the reward, and are trained
    step_map: list  # the denoising step that revealed each token, counted from 1 over the whole response
    confidence: list = field(default_factory=list)  # how probable each was: see `sample`
    logp: list = field(default_factory=list)  # its log-probability when it was drawn
    canvas: int = 0  # full attention: number of response positions in every forward. Else 0
    is_truncated: bool = False  # no eos among the first max_new_tokens tokens. Then num_tokens is that number
    seed: int = 0  # of its draws, and of its masks where views are random
    # Filled in between decoding and the update, by tracerl.py, eval_math.py and value.py:
    rl_step: int = 0  # the RL step in which it was decoded; 0 outside of RL
    group: int = 0  # the number of its prompt in this RL step
    reward: float = 0.0
    token_rewards: list = field(default_factory=list)  # process rewards, one per trained token, if any
    advantage: list = field(default_factory=list)  # what the policy loss weighs each token by
    value_old: list = field(default_factory=list)  # the value model's estimates before this RL step's updates
    returns: list = field(default_factory=list)  # what the value model learns to predict


# ------------------------------------------------------------------------------------------------------------
# One denoising step: draw a token for every masked position, then reveal some of them.


def uniform(seed, step, position):
    """Random numbers in [0, 1), float64, of the shape of `position`.

    Each is a hash of seed, step and position.

    position is a tensor. seed and step may be tensors, too, or single numbers. uniform(7, 3, tensor([11])) is
    the draw of the response with seed 7 at its denoising step 3 for position 11. It depends on nothing else:
    not on the batch, not on the process. torch.multinomial would not do: its generator moves on with every
    draw. A response would then get other draws in another batch.
    """
    x = torch.zeros_like(position)
    for word in (seed, step, position):  # a round of splitmix64 for each; int64 arithmetic wraps around
        x = (x ^ word) + -0x61C8864680B583EB
        x = (x ^ (x >> 30 & (1 << 34) - 1)) * -0x40A7B892E31B1A47  # the & makes >> a logical shift
        x = (x ^ (x >> 27 & (1 << 37) - 1)) * -0x6B2FB644ECCEEE15
        x = x ^ (x >> 31 & (1 << 33) - 1)
    return (x >> 11 & (1 << 53) - 1).double() * 2.0**-53  # the upper 53 bits, as many as a float64 holds


def mix(*numbers):
    """One seed made of several whole numbers, such as (seed of the run, RL step, number of the response).

    A large odd factor keeps them apart, so that no two training rollouts of a run share their draws.
    """
    seed = 0
    for number in numbers:
        seed = seed * 1_000_003 + number
    return (seed + 2**63) % 2**64 - 2**63  # into the range of int64


def filter_probabilities(logp, top_k, top_p):
    """Probabilities (N, V) after top-k, then top-p, renormalised. top_k 0 and top_p 1 keep everything.

    Top-k keeps every token at least as probable as the k-th. Top-p keeps the most probable ones until their
    sum exceeds top_p. Of .5 .3 .2, top_p .6 keeps .5 and .3, which become .625 and .375.
    """
    if 0 < top_k < logp.shape[-1]:
        kth = logp.topk(top_k, dim=-1).values[:, -1:]
        logp = logp.masked_fill(logp < kth, -math.inf)
    p = logp.softmax(-1)
    if top_p < 1:
        sorted_p, order = p.sort(dim=-1, descending=True, stable=True)  # order: which token each of them is
        is_dropped = sorted_p.cumsum(-1) - sorted_p > top_p  # the sum before this token is already beyond it
        is_dropped[:, 0] = False  # the most probable token always stays
        p = p.masked_fill(torch.zeros_like(is_dropped).scatter(-1, order, is_dropped), 0)
        p = p / p.sum(-1, keepdim=True)
    return p


def inverse_cdf(p, draws):
    """The first token whose cumulative probability exceeds the draw: p (N, V), draws (N,) -> int64 (N,).

    p = .5 .3 .2 has the cumulative probabilities .5 .8 1., so the draw .6 gives token 1.
    """
    cdf = p.cumsum(-1, dtype=torch.float64)  # float64: in a sum of 151,936 terms float32 would round too much
    total = cdf[:, -1:]
    target = draws[:, None] * total
    # The target must stay below the total. Otherwise no cumulative probability would exceed it.
    target = torch.minimum(target, total.nextafter(torch.zeros_like(total)))
    # If p is NaN, the search gives V, which is no token. `record` reports the NaN later.
    return torch.searchsorted(cdf, target, right=True)[:, 0].clamp(max=p.shape[1] - 1)


def sample(logits, draws, temperature=1.0, top_k=0, top_p=1.0, with_entropy=True):
    """Draws a token at each position: logits (N, V), draws float64 (N,) -> token, confidence, logp, entropy.

    All four are (N,). The confidence is the token's probability after the filters, in the distribution from
    which it was drawn. (Greedy decoding: before the filters.) It says how sure the draw was. The entropy is
    of the same distribution. logp is log softmax(logits / T) BEFORE the filters, because that is the policy
    which the loss trains. With filters the tokens are no longer exact draws from that policy; the replay law
    holds all the same.
    with_entropy: False saves time where no strategy needs the entropy, which is then 0.
    """
    logp = (logits / (temperature or 1.0)).log_softmax(-1)  # (N, V)
    if temperature == 0 or top_k == 1:
        # Greedy. After the filter every confidence would be 1, and a strategy could not rank the positions.
        # So confidence and entropy are those of the unfiltered distribution. Temperature 0 counts as 1 there.
        token = logp.argmax(-1)
        p = logp.exp()
    else:
        p = filter_probabilities(logp, top_k, top_p)
        token = inverse_cdf(p, draws)
    confidence = p.gather(-1, token[:, None])[:, 0]
    entropy = torch.special.entr(p).sum(-1) if with_entropy else torch.zeros_like(confidence)
    return token, confidence, logp.gather(-1, token[:, None])[:, 0], entropy


# The strategies: what a denoising step reveals. Tensors are (B, K): one block of each of B responses. quota
# (B,) says how many tokens the step is to reveal in each block. The docstrings below call this number n.


def reveal_static(confidence, is_masked, quota):
    """The n most confident masked positions."""
    return best(confidence, is_masked, quota)


def reveal_dynamic(confidence, is_masked, quota, threshold):
    """Every masked position with confidence > threshold. If there are fewer than n, the n most confident."""
    is_sure = (confidence > threshold) & is_masked
    has_enough = is_sure.sum(-1, keepdim=True) >= quota[:, None]
    return torch.where(has_enough, is_sure, best(confidence, is_masked, quota))


def reveal_sequential(is_masked, quota):
    """The n leftmost masked positions. With n = 1 this is decoding from left to right."""
    position = torch.arange(is_masked.shape[1], device=is_masked.device)
    return best(-position.expand_as(is_masked).float(), is_masked, quota)


def reveal_entropy(entropy, is_masked):
    """Masked positions by rising entropy, while the sum of their entropies stays below 0.35; at least one.

    The idea is EB-Sampler's (arXiv 2505.24857). 0.35 nats is the bound of TraceRL's authors.
    """
    rising = entropy.masked_fill(~is_masked, math.inf).sort(-1).values
    number = (rising.cumsum(-1) < 0.35).sum(-1).clamp(min=1)
    return best(-entropy, is_masked, number)


def best(score, is_masked, number):
    """The `number` (B,) masked positions of each block with the highest scores -> bool (B, K)."""
    order = score.masked_fill(~is_masked, -math.inf).argsort(dim=-1, descending=True, stable=True)
    rank = order.argsort(dim=-1)  # scores .2 .9 .5: order 1 2 0, rank 2 0 1
    # Where fewer masks are left than asked for, the best include positions that are no masks. Without the &
    # a revealed token, or one of the prompt, would be overwritten.
    return (rank < number[:, None]) & is_masked


STRATEGIES = dict(static=reveal_static, dynamic=reveal_dynamic, sequential=reveal_sequential,
                  entropy=reveal_entropy)  # --strategy


@dataclass
class Decoding(Settings):
    """How tokens are drawn and revealed. ValueError for what is out of range.

    Each field is a flag of the commands. `setting` gives its default, its help and its bounds. Where the tiny
    model has another default, `tiny` gives it.
    """

    max_new_tokens: int = setting(
        2000, "maximum tokens of a response; a longer one is truncated. With full attention every forward "
        "sees this number of response positions", tiny=20, low=1)
    strategy: str = setting(
        "dynamic", "what a denoising step reveals: static, dynamic, sequential, entropy, or file.py:function")
    threshold: float = setting(0.9, "probability above which dynamic reveals a token", low=0, high=1)
    denoising_steps: int = setting(
        None, "most denoising steps that a block takes; None: K. In a step, static and sequential reveal "
        "about K / denoising_steps tokens, dynamic at least that number. entropy ignores this flag", low=1)
    temperature: float = setting(1.0, "T, of decoding and of the trained policy; 0: greedy", low=0)
    top_k: int = setting(0, "draw among the k most probable tokens; 0: among all", low=0)
    top_p: float = setting(1.0, "draw among the most probable tokens up to this sum; 1: all", above=0, high=1)

    def __post_init__(self):
        """Checks the ranges, and finds the function that `reveal` calls."""
        super().__post_init__()
        self.function = flags.load_function(self.strategy, STRATEGIES, "--strategy")

    def quota(self, K, step_in_block):
        """How many tokens a step is to reveal. K = 8 in 3 steps: 3, 3, 2. ValueError beyond K steps."""
        if step_in_block >= K:  # with a token or more in each step, K steps are always enough
            raise ValueError(f"--strategy {self.strategy} must reveal a mask of every block in every step")
        each, remainder = divmod(K, self.denoising_steps or K)
        return each + (step_in_block < remainder)

    def reveal(self, confidence, entropy, is_masked, quota, token, step):
        """Which of the drawn tokens to keep, bool (B, K). The others stay masked, and are drawn again.

        FORK HERE. --strategy file.py:function calls a function of yours. It declares those parameters that it
        needs:
            confidence, entropy, token    of the draws, (B, K). 0 at positions without a mask
            is_masked                     (B, K)
            quota                         how many tokens the step is to reveal, (B,)
            step                          the denoising step, here counted from 0 in its block, (B,)
            threshold                     the flag of that name
        It must reveal at least one mask of every block that has one. A token that was revealed is never
        masked again, whatever the function gives for it. Use tensor operations only: `if x.any()` makes a GPU
        wait, and cannot be part of a CUDA graph. Do not draw random numbers: a resumed run would draw others.
        """
        # Draws that do not count become 0, so that a sum over the block is right. A mean is this sum, divided
        # by is_masked.sum(-1).
        confidence, entropy, token = (torch.where(is_masked, x, 0) for x in (confidence, entropy, token))
        chosen = flags.call(self.function, confidence=confidence, entropy=entropy, is_masked=is_masked,
                            quota=quota, token=token, step=step, threshold=self.threshold)
        if getattr(chosen, "dtype", None) != torch.bool or chosen.shape != is_masked.shape:
            raise ValueError(f"--strategy gives {chosen!r:.200}, and must give a bool tensor (B, K)")
        return chosen & is_masked


# ------------------------------------------------------------------------------------------------------------
# Decoding: the definition.


@torch.no_grad()
def generate(model, prompt, decoding, seed=0):
    """Decodes a response to one prompt (token ids) and records its trace -> Rollout.

    Block attention: the text is cut at absolute positions. With P = 9 and K = 4, positions 0 to 7 hold only
    prompt tokens, and are clean from the start. Decoding begins at position 8, with one prompt token and
    three masks. Full attention: the first block begins where the response begins. The masks of the whole
    response are in sight from the start.
    ValueError for an empty prompt, and for logits that are not finite.
    """
    config = model.config
    K = config.block_size
    P = len(prompt)
    check_prompt(prompt, decoding, config)
    start, end = decoded_span(P, decoding.max_new_tokens, config)
    tokens = torch.full((end,), config.mask_id, device=model.device)
    tokens[:P] = torch.tensor(prompt)
    trace = torch.zeros(3, end, dtype=torch.float64, device=model.device)
    step_map, confidence, logp = trace  # one number for each position; 0 where nothing was drawn
    cache = KVCache()
    if not config.is_full:  # the whole blocks of the prompt are clean from the start
        for clean in range(0, start, K):
            block_states(model, tokens, torch.arange(clean, clean + K, device=model.device), cache.append)
    step = 0  # denoising steps so far, over the whole response
    for start in range(start, end, K):
        block = torch.arange(start, start + K, device=model.device)  # its absolute positions
        is_masked = (block >= P) & (block < end)
        block = block.clamp(max=end - 1)  # with full attention the last block may reach beyond the canvas
        step_in_block = 0
        while is_masked.any():
            step += 1
            # One forward: what would the network write at each position of this block?
            states = block_states(model, tokens, block, cache.read)
            draws = uniform(seed, step, block)  # (K,)
            drawn = sample(policy_logits(model, states), draws, decoding.temperature, decoding.top_k,
                           decoding.top_p)
            token, sure, token_logp, entropy = (numbers[None] for numbers in drawn)  # (1, K): one block
            # (1,) each: how many tokens to reveal now, and the number of this step in the block.
            numbers = [[decoding.quota(K, step_in_block)], [step_in_block]]
            quota, step_here = torch.tensor(numbers, device=model.device)
            is_kept = decoding.reveal(sure, entropy, is_masked[None], quota, token, step_here)[0]
            # Revealed tokens are written into the text. The others are forgotten, and drawn again.
            revealed = block[is_kept]
            tokens[revealed] = token[0, is_kept]
            step_map[revealed] = step
            confidence[revealed] = sure[0, is_kept].double()
            logp[revealed] = token_logp[0, is_kept].double()
            is_masked = is_masked & ~is_kept
            step_in_block += 1
        # The block is clean. Only now may an eos end the response. The tokens behind it in this block were in
        # sight when others were drawn, so a replay needs the whole block. An eos of the prompt ends nothing.
        if set(tokens[block[block >= P]].tolist()) & set(config.eos_ids):
            break
        if not config.is_full:
            # One more forward. The one of the last denoising step still saw masks. But later blocks must
            # read keys and values of the clean tokens.
            block_states(model, tokens, block, cache.append)
    response = slice(P, int(block[-1]) + 1)
    columns = tokens[response].tolist(), *trace[:, response].tolist()
    return record(prompt, seed, columns, decoding, config)


def check_prompt(prompt, decoding, config):
    """ValueError for a prompt or a setting with which no decoding can begin."""
    if not prompt:
        raise ValueError("a prompt is empty: a response needs at least one token before it")
    if max(prompt) >= config.vocab_size:
        raise ValueError(f"token id {max(prompt)} is outside the vocabulary of {config.vocab_size} tokens: "
                         "is this the tokenizer of another model?")
    if decoding.denoising_steps is not None and decoding.denoising_steps > config.block_size:
        raise ValueError(f"denoising_steps {decoding.denoising_steps} is not possible: it must be from 1 to "
                         f"the block size, {config.block_size}")


def decoded_span(P, max_new_tokens, config):
    """The absolute positions where decoding begins and where it ends at the latest."""
    if config.is_full:
        return P, P + max_new_tokens
    # Blocks are whole: the start is rounded down to a multiple of K, and the end is rounded up. With P = 9, 6
    # new tokens and K = 4 they are 8 and 16.
    K = config.block_size
    return P // K * K, -(-(P + max_new_tokens) // K) * K


def block_states(model, tokens, block, attend):
    """One forward -> the last hidden states (K, C), which predict the tokens at positions `block` of a text.

    Block attention: the forward is of this block alone. `attend` is cache.read, or cache.append if the block
    is clean and is to stay in the cache: see "How the network attends" in model.py. Full attention: the
    forward is of the whole text, and `attend` is not used.
    """
    if not model.config.is_full:
        return model.states(tokens[block][None], block[None], attend)[0]
    # No cache is possible, since each revealed token changes the keys and values of all the others.
    position = torch.arange(len(tokens), device=model.device)
    see_all = lambda layer, q, k, v: attention(q, k, v)
    states = model.states(tokens[None], position[None], see_all)[0]  # (P + max_new_tokens, C)
    return states[block - int(model.config.shifts_logits)]


def record(prompt, seed, columns, decoding, config):
    """The Rollout of a decoded response; columns: its tokens, steps, confidences and log-probabilities.

    The first eos says where it ends: the tokens up to there earn the reward, and are trained.
    """
    response, step_map, confidence, logp = columns
    if not all(map(math.isfinite, logp)):
        raise ValueError("the model's logits are not finite: its weights hold NaN or inf, or overflow")
    limit = min(len(response), decoding.max_new_tokens)  # the last block may reach further
    num_tokens = next((i + 1 for i, token in enumerate(response[:limit]) if token in config.eos_ids), None)
    return Rollout(
        prompt=list(prompt), response=response, num_tokens=num_tokens or limit,
        step_map=[int(step) for step in step_map], confidence=confidence, logp=logp,
        canvas=decoding.max_new_tokens if config.is_full else 0, is_truncated=num_tokens is None, seed=seed)


def generate_each(model, prompts, seeds, decoding):
    """`generate` for a list of prompts, one after the other. ValueError unless each has a seed.

    Its fast twin, engine.generate, decodes many at once. `Compute`, further down, holds this function or the
    twin.
    """
    return [generate(model, prompt, decoding, seed) for prompt, seed in zip(prompts, seeds, strict=True)]


# ------------------------------------------------------------------------------------------------------------
# Views: the states in which the policy was, and which tokens were drawn there.


class View(NamedTuple):
    """One block in the state that the network sees, and the tokens that the network must predict in it."""

    block: int  # absolute number of the block; 0 with full attention
    masked: list  # response indices that are masks in this view
    targets: list  # response indices to predict, all of them among `masked`
    masked_share: float  # the masked fraction of the block's response tokens


def trace_views(rollout, block, shrink):
    """The views of TraceRL: one per trace step, whose targets are the tokens that this step revealed.

    FORK HERE. --views file.py:function calls a function of yours for every block of every response. With full
    attention it is called once, for the whole response. It declares those parameters that it needs:
        rollout   the record: prompt, response, step_map, confidence, ...
        block     the response indices of one block, for example [3, 4, 5, 6]
        shrink    the flag of that name
        rng       random.Random, seeded by the rollout: it draws the same on every process
    It gives a list of (masked, targets): the indices that are masks in a view, and those to predict there.

    With step_map 1 3 1 2, the block 1 0 1 ; has the views below. With shrink 2 two denoising steps share one
    view. The token ; is then predicted in the state ????, although it was drawn in the state 1?1?. So its
    log-probability differs from the recorded one. In return there are fewer views: rows are shorter, and with
    full attention there are fewer of them. (The gap is measured with shrink 1, whatever the flag says.)

        shrink 1   ([0, 1, 2, 3], [0, 2])   ([1, 3], [3])   ([1], [1])
        shrink 2   ([0, 1, 2, 3], [0, 2, 3])   ([1], [1])
    """
    steps = sorted({rollout.step_map[j] for j in block})  # only their order counts
    views = []
    for start in range(0, len(steps), shrink):
        trace_step = steps[start:start + shrink]
        masked = [j for j in block if rollout.step_map[j] >= trace_step[0]]
        targets = [j for j in masked if rollout.step_map[j] <= trace_step[-1]]
        views.append((masked, targets))
    return views


def random_views(block, rng):
    """A baseline of the paper: masks drawn at random, in place of the trace. The masked tokens are targets.

    Each token is masked with the same probability. It is drawn from U(0.1, 0.9) for each block (full
    attention: for the response).
    """
    probability = rng.uniform(0.1, 0.9)
    masked = [j for j in block if rng.random() < probability]  # may be empty: then the view is left out
    return [(masked, masked)]


def coupled_views(block, rng):
    """A second baseline: random masks and their complement, so that every token is a target exactly once."""
    (masked, _), = random_views(block, rng)
    others = [j for j in block if j not in masked]
    return [(masked, masked), (others, others)]


VIEWS = dict(trace=trace_views, random=random_views, coupled=coupled_views)  # --views


def blocks_of(prompt_length, response_length, K):
    """Response indices block by block, with blocks cut at absolute positions.

    With P = 9, R = 7 and K = 4, positions 9 10 11 | 12 13 14 15 are the indices [0, 1, 2], [3, 4, 5, 6].
    """
    ends = range(K - prompt_length % K, response_length + K, K)  # where blocks end: 3, 7
    return [list(range(max(end - K, 0), min(end, response_length))) for end in ends]


def views_of(rollout, config, views=trace_views, shrink=1):
    """All views of a response, in the order of its blocks -> list[View]."""
    P = len(rollout.prompt)
    R = len(rollout.response)
    K = config.block_size
    blocks = [list(range(R))] if config.is_full else blocks_of(P, R, K)
    rng = random.Random(rollout.seed)  # the same views on every process, and after every resume
    found = []
    for block in blocks:
        for masked, targets in flags.call(views, rollout=rollout, block=block, shrink=shrink, rng=rng):
            if not set(targets) <= set(masked) <= set(block):
                raise ValueError(f"--views masks {masked} and predicts {targets} in the block {block}: what "
                                 "is predicted must be masked, and what is masked must be of the block")
            number = 0 if config.is_full else (P + block[0]) // K
            found.append(View(number, masked, targets, len(masked) / len(block)))
    return found


# ------------------------------------------------------------------------------------------------------------
# Rows: views laid out for the network, with all that a loss needs to know of each target.


def build_rows(rollouts, config, views=trace_views, shrink=1, trained_only=False):
    """The training rows of rollouts -> a list of Row for each rollout. It holds one row, or with full
    attention one for each view.

    trained_only: only the first num_tokens tokens of a response are targets; the others are still seen. A
    view without targets is left out. A rollout without views has no row. ValueError for a view that predicts
    what it shows.
    """
    rows_of_each = []
    for index, r in enumerate(rollouts):
        # What stands behind eos was in sight, so it is shown. It earned nothing, so it is not trained.
        end = r.num_tokens if trained_only else len(r.response)
        found = []
        for view in views_of(r, config, views, shrink):
            targets = [j for j in view.targets if j < end]
            if targets:
                found.append(view._replace(targets=targets))
        rows_of_each.append(lay_out(r, index, found, config))
    return rows_of_each


def lay_out(r, rollout_index, views, config):
    """The rows of one rollout -> list[Row].

    Block attention needs one row, [clean text | view | view | ...]: one forward for all states. Here is that
    row for the prompt 894+396= and the block 1 0 1 ; with step_map 1 3 1 2 and K = 4:

        tokens     8  9  4  +    3  9  6  =    ?  ?  ?  ?    1  ?  1  ?    1  ?  1  ;
        position   0  1  2  3    4  5  6  7    8  9 10 11    8  9 10 11    8  9 10 11
        block      0  0  0  0    1  1  1  1    2  2  2  2    2  2  2  2    2  2  2  2
        view       0  0  0  0    0  0  0  0    1  1  1  1    2  2  2  2    3  3  3  3
        target                                 1     1                ;       0

    The clean text ends before the block of the last view, since no view looks further. If another block were
    decoded after this one, the clean 1 0 1 ; would stand before the views. One clean text serves all views,
    because it sees none of them. With full attention every token sees the masks of its state. So its
    keys and values differ in every state, and no text can be shared. Each view is a row of its own: the
    prompt and the room for the whole response. It costs a whole forward.
    """
    P = len(r.prompt)
    R = len(r.response)
    text = r.prompt + r.response + [config.mask_id] * (r.canvas - R)
    size = len(text) if config.is_full else config.block_size  # of a block
    # Fills the last block. In our own rollouts it is whole already. The trace of another engine, which
    # rollout.py --check reads, may end earlier.
    text += [config.mask_id] * (-len(text) % size)
    # These numbers of each response token are copied into its Targets. A list not filled yet counts as zeros.
    known = {name: getattr(r, name) or [0.0] * R for name in ("logp", "advantage", "value_old", "returns")}
    rows = []
    for view_number, view in enumerate(views, 1):
        if config.is_full or not rows:
            rows.append(Row())
            for clean in range(views[-1].block):  # none with full attention, whose only block is number 0
                rows[-1].add(text[clean * size:(clean + 1) * size], clean, 0)
        row = rows[-1]
        first = view.block * size  # the absolute position where the block begins
        shown = text[first:first + size]
        for j in view.masked:
            shown[P + j - first] = config.mask_id
        view_start = len(row.tokens)
        row.add(shown, view.block, view_number)
        for j in view.targets:
            # Take the target `;` of the drawing above. Its view begins at place 12 of the row. The token has
            # position 11, and its block begins at 8. So its place is 12 + 3.
            place = view_start + P + j - first
            row.targets.append(Targets(
                logit_index=place - int(config.shifts_logits),  # Dream predicts a token one place before it
                token=r.response[j], rollout_index=rollout_index, response_index=j, step=r.step_map[j],
                view=view_number, group=r.group, masked_share=view.masked_share, logp_old=0.0,
                **{name: numbers[j] for name, numbers in known.items()}))
    return rows


# ------------------------------------------------------------------------------------------------------------
# How numbers are computed: by the definitions, or by their fast twins.


class Compute(NamedTuple):
    """The functions that have a fast twin, and how much is computed at once.

    Definition and twin give the same numbers up to rounding.
    """

    generate: Callable  # (model, prompts, seeds, decoding) -> list[Rollout]
    attend: Callable  # layout -> attend, see model.py
    logprobs: Callable  # (model, states, tokens, temperature) -> logp, entropy
    is_packed: bool = False  # True: rows stand end to end. False: each row is padded to the longest
    max_tokens: int = 4096  # of a micro-batch


# --plain. The fast twins come from `fast` in plumbing/engine.py.
PLAIN = Compute(generate_each, attend_by_rule, token_logprobs)


def generate_everywhere(model, prompts, seeds, decoding, compute):
    """Rollouts of all prompts, in their order, on every process. Each process decodes a part of them."""
    # Every process decodes with whole weights, so that none waits for another.
    with parallel.unsharded(model) as whole:
        own = compute.generate(whole, parallel.deal(prompts), parallel.deal(seeds), decoding)
    return parallel.gather(own)


# ------------------------------------------------------------------------------------------------------------
# Replay.


def states_at(model, rows, compute):
    """Final states (N, C) of a model at the outputs that predict the targets of a micro-batch."""
    states = model.states(rows.tokens, rows.layout.position, compute.attend(rows.layout))  # (B, T, C)
    return states.flatten(0, 1)[rows.targets.logit_index]


def forward_rows(model, rows, compute, temperature=1.0):
    """Log-probability and entropy of the targets of a micro-batch, in their order: float32 (N,) each."""
    return compute.logprobs(model, states_at(model, rows, compute), rows.targets.token, temperature)


def replay(model, rollouts, compute=PLAIN, temperature=1.0, shrink=1):
    """Log-probabilities of every response token, in the states in which the trace revealed them.

    -> a float32 tensor for each rollout, as long as its response, with gradient. With shrink 1 and the
    temperature of the decoding, they equal Rollout.logp: the replay law.
    """
    built = build_rows(rollouts, model.config, shrink=shrink)
    parts = packing.micro_batches(built, compute, model)
    logps = [forward_rows(model, rows, compute, temperature)[0] for rows in parts]
    return per_response(rollouts, parts, logps)


def per_response(rollouts, parts, numbers):
    """Numbers of the targets of micro-batches, sorted back to their tokens -> a tensor for each rollout.

    A response index that is no target gets 0.
    """
    longest = max((len(r.response) for r in rollouts), default=0)
    table = torch.zeros(len(rollouts) * longest)  # one line per rollout, end to end
    for rows, values in zip(parts, numbers):
        place = rows.targets.rollout_index * longest + rows.targets.response_index
        table = table.to(values.device).index_put((place,), values)
    return [line[:len(r.response)] for line, r in zip(table.view(len(rollouts), longest), rollouts)]


@torch.no_grad()
def replay_differences(model, rollouts, compute, temperature):
    """Replayed minus recorded log-probability of all tokens of rollouts, float64 (N,), on every process."""
    own = parallel.deal(rollouts)
    # With sharded weights every process would have to join every forward. But processes may have different
    # numbers of rollouts, so each replays with whole weights.
    with parallel.unsharded(model) as whole:
        replayed = replay(whole, own, compute, temperature)
    differences = [logp.cpu().double() - torch.tensor(r.logp).double() for logp, r in zip(replayed, own)]
    return torch.cat(parallel.gather(differences))


def replay_gap(model, rollouts, compute, temperature):
    """How far the replay law is broken: the mean and the largest |replayed - recorded log-probability|."""
    gap = replay_differences(model, rollouts, compute, temperature).abs()
    return dict(gap=gap.mean().item(), gap_max=gap.max().item())


def drift(model, rollouts, compute, temperature):
    """How far updates have moved the policy since these rollouts: KL(old || new), and the largest ratio.

    An update's own ratios are measured BEFORE it moves the weights. With one update per RL step they are
    always 1, so they cannot show a collapse. So some rollouts are replayed after the updates,
    and compared with what was recorded. In bfloat16 the drift contains the gap, too.
    """
    log_ratio = replay_differences(model, rollouts, compute, temperature)
    ratio = log_ratio.clamp(-10, 10).exp()
    return dict(drift_kl=(ratio - 1 - log_ratio).mean().item(), drift_ratio_max=ratio.max().item())


def probes(rollouts, config):
    """The rollouts on which gap and drift are measured: a sixteenth of them, with full attention a 64th.

    A replay costs a forward, with full attention one per step. A part is enough to see a fault.
    """
    return rollouts[::64 if config.is_full else 16]


@dataclass
class ReplayLaw:
    """Stops a run whose gap is more than rounding: it would train on states in which the policy never was.

    Most faults in masks, positions or steps move the mean by far more than 0.05 nats. Some move it less. In
    float32, rounding stays below 1e-4 on average, and below ten times that for the worst token. In bfloat16,
    decoding and training round differently: on CPUs means of about 1e-3 were seen. A bfloat16 run stops after
    the third step in a row whose mean is above 0.05. So try a new setting in float32 first. (A resumed run
    counts anew.)
    """

    is_float32: bool
    temperature: float = 1.0
    max_gap: float = None  # bound on the mean; None is 1e-4, and 0.05 in bfloat16
    num_wide: int = 0  # steps in a row beyond the bound

    def enforce(self, gap, gap_max):
        """RuntimeError if the law is broken. In bfloat16 only the third step in a row stops the run."""
        # At T < 1 logits are divided by T, and their rounding grows with them.
        bound = (self.max_gap or (1e-4 if self.is_float32 else 0.05)) / min(self.temperature, 1.0)
        is_law = gap <= bound and (gap_max <= 10 * bound or not self.is_float32)
        self.num_wide = 0 if is_law else self.num_wide + 1
        if is_law:
            return
        text = (f"the replay law is broken: replayed and recorded log-probabilities differ by {gap:.1e} on "
                f"average (allowed: {bound:.0e}) and up to {gap_max:.1e} (in float32: {10 * bound:.0e}): "
                "training and sampling disagree about masks, positions, blocks or steps (see --max_gap)")
        if self.is_float32 or self.num_wide >= 3:
            raise RuntimeError(text)
        parallel.say(f"WARNING: {text}")


# ------------------------------------------------------------------------------------------------------------
# The method ends here. `python rollout.py` decodes one prompt and plays it in the terminal. That program is
# plumbing/player.py, which imports this file.

if __name__ == "__main__":
    runpy.run_module("plumbing.player", run_name="__main__")
