"""rollout.py - a trace: recorded, then replayed.

TraceRL (arXiv 2509.06949) trains a diffusion language model on the very states it was in while
decoding. Here are both halves of that:

  generate   decodes block by block, and records for every token the denoising step that revealed it, with
             which confidence and which log-probability;
  replay     rebuilds those states as *views* in one training row, and reads off the same log-probabilities.

One block of K = 4 tokens while it is decoded (? is the mask token), and what the record keeps of it:

    before step 1    ? ? ? ?     step 1 reveals 1 and 1        token             1    0    1    ;
    before step 2    1 ? 1 ?     step 2 reveals ;              step_map          1    3    1    2
    before step 3    1 ? 1 ;     step 3 reveals 0              logp at its step  -.02 -.31 -.01 -.05
    whole            1 0 1 ;

The trace of this block is the three states on the left. The token 0 was drawn with 1, 1 and ; in sight: its
probability "in general", or under random masks, is another number, and a policy gradient with that number is
the gradient of some other policy. (One forward per state would be slow; `build_rows` does all states in one.)

THE REPLAY LAW. On the trace's own states (one view per denoising step), the replayed log-probability of every
token equals the recorded one, to float32 rounding. If it does not, then masks, positions, blocks, cache or
step map differ between sampling and training. Every RL step prints this gap. How far off a mistake is, with
the authors' code and small models, random or briefly trained: cutting blocks at the start of the response in
training but at position 0 in decoding, 0.16 to 1.1 nats per token; cutting the last block at eos, 0.06 to
0.56 for its tokens. A training loss shows none of this: both sides of its ratio are wrong in the same way.

Read in this order: Rollout; sample, reveal, Decoder, generate; then the views, build_rows, lay_out, replay.

Left out:
  1. speculative decoding, classifier-free guidance;
  2. tokens re-encoded from text: token ids travel from rollout to update, and text is only for the answer
     checker.
"""

import functools
import math
import random
import sys
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F

from model import (
    IS_EAGER, KVCache, Layout, Row, flash_attn_with_kvcache, head_logits, masked_attention, policy_logits,
    token_logprobs)
from plumbing import cuda, parallel, player, runs
from plumbing.packing import by_length, micro_batches

STRATEGIES = ("static", "dynamic", "sequential", "entropy")  # see `reveal`
CACHES = ("none", "prefix", "dual")  # of full attention, see Decoder.full_states
ENTROPY_BOUND = 0.35  # of the "entropy" strategy, in nats


@dataclass
class Rollout:
    """One response and the trace by which it was decoded: the one record from decoding to update.

    Its lists have one entry per response token (`prompt` and `token_rewards` have their own lengths). The
    response holds whole blocks: tokens after the end of the answer are kept, because the tokens before them
    in the same block were drawn with them in sight.

    Without an eos in the first max_new_tokens (one that comes later, in the last block, is too late):
    is_truncated, math_reward gives 0, those max_new_tokens are trained, and what the last block holds beyond
    them is only shown.
    """

    prompt: list  # token ids
    response: list  # token ids of every decoded block, whole (full attention: up to max_new_tokens)
    num_tokens: int  # up to and including eos, or max_new_tokens: what earns the reward, and is trained
    step_map: list  # denoising step that revealed each token, counted from 1 over the whole response
    confidence: list = field(default_factory=list)  # its probability in what it was drawn from (see `sample`)
    logp: list = field(default_factory=list)  # its log softmax(logits / T) then, before top-k and top-p
    canvas: int = 0  # full attention: places of the response that every forward sees (max_new_tokens)
    is_truncated: bool = False  # no eos within max_new_tokens
    seed: int = 0  # of its draws
    # filled in on the way to the update (tracerl.py):
    reward: float = 0.0
    token_rewards: list = field(default_factory=list)  # process rewards of the trained tokens, if any
    advantage: list = field(default_factory=list)
    value_old: list = field(default_factory=list)  # of the value model before this RL step
    returns: list = field(default_factory=list)
    ratio: list = field(default_factory=list)  # pi_new / pi_old, before the step of its last update

    def trained_end(self, post_num):
        """Where the trained tokens end: after eos, or post_num tokens behind it in the same block: an option
        of the authors' code, to teach also what follows the end. (Default 0: nothing is earned there.)"""
        return self.num_tokens if self.is_truncated else min(self.num_tokens + post_num, len(self.response))


@dataclass
class DecodingSettings:
    """How tokens are drawn and revealed. ValueError, when it is made, for what is out of range."""

    max_new_tokens: int
    block_size: int  # K
    eos_ids: tuple
    strategy: str = "dynamic"
    # Steps per block: static reveals K / denoising_steps tokens in each step (K = 8 in 3: 3, 3, 2), dynamic
    # at least so many. None: K steps, one token in each. (The strategy "entropy" does not look at it.)
    denoising_steps: int = None
    threshold: float = 0.9  # of the strategy "dynamic"
    # One number, here and in replay and training. One that varies from step to step would have to become a
    # field of model.Targets, or the replay law breaks.
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    cache: str = "none"  # full attention: see Decoder.full_states

    def __post_init__(self):
        if self.denoising_steps is None:
            self.denoising_steps = self.block_size
        for name, is_good, wanted in (
                ("strategy", self.strategy in STRATEGIES, f"one of {', '.join(STRATEGIES)}"),
                ("cache", self.cache in CACHES, f"one of {', '.join(CACHES)}"),
                ("max_new_tokens", self.max_new_tokens >= 1, "at least 1"),
                ("block_size", self.block_size >= 1, "at least 1"),
                ("denoising_steps", 1 <= self.denoising_steps <= self.block_size,
                 f"from 1 to the block size, {self.block_size}"),
                ("threshold", 0 <= self.threshold <= 1, "from 0 to 1"),
                ("temperature", self.temperature >= 0, "0 or above"),
                ("top_k", self.top_k >= 0, "0 or above (0 keeps all)"),
                ("top_p", 0 < self.top_p <= 1, "above 0, up to 1")):
            if not is_good:
                raise ValueError(f"{name} {getattr(self, name)!r} is not possible: it must be {wanted}")


# ------------------------------------------------------------------------------------------------------------
# One denoising step: draw a token for every masked position, then keep some of them.


def uniform(seed, step, position):
    """Draws in [0, 1), float64, from three int64 tensors: a counter-based hash (three rounds of splitmix64).

    A draw depends on nothing but its three numbers: uniform(7, 3, 11) is the draw of the sequence with seed 7
    at its denoising step 3 for position 11, alone, in any batch, in any slot, on any process. A generator
    that is advanced draw by draw would give each sequence other draws in another batch.
    """
    x = torch.zeros_like(position)
    for word in (seed, step, position):
        x = (x ^ word) + -0x61C8864680B583EB  # int64 arithmetic wraps around, as the hash wants
        x = (x ^ (x >> 30 & (1 << 34) - 1)) * -0x40A7B892E31B1A47  # >> is arithmetic: the & makes it logical
        x = (x ^ (x >> 27 & (1 << 37) - 1)) * -0x6B2FB644ECCEEE15
        x = x ^ (x >> 31 & (1 << 33) - 1)
    return (x >> 11 & (1 << 53) - 1).double() * 2.0**-53  # the upper 53 bits: all a float64 holds


def filter_probabilities(logp, top_k, top_p):
    """Probabilities (N, V) after top-k, then top-p, renormalised. top_k 0 and top_p 1 keep everything.

    Top-k keeps every token at least as probable as the k-th, top-p the most probable until their sum exceeds
    top_p: of .5 .3 .2, top_p .6 keeps .5 and .3, which become .625 and .375.
    """
    if 0 < top_k < logp.shape[-1]:
        # Ties with the k-th stay in.
        logp = logp.masked_fill(logp < logp.topk(top_k, dim=-1).values[:, -1:], float("-inf"))
    p = logp.softmax(-1)
    if top_p < 1:
        # (N, V) most probable first; order says which token each is
        sorted_p, order = p.sort(dim=-1, descending=True, stable=True)
        is_out = sorted_p.cumsum(-1) - sorted_p > top_p  # the sum before a token is already over
        is_out[:, 0] = False  # the most probable always stays
        p = p.masked_fill(torch.zeros_like(is_out).scatter(-1, order, is_out), 0)
        p = p / p.sum(-1, keepdim=True)
    return p


def inverse_cdf(p, draws, size=256):
    """The smallest v whose cumulative probability exceeds the draw.

    p (N, V), draws float64 (N,) -> int64 (N,).

    Sums are float64, since 152k rounded terms must not sum to less than a draw close to 1; and they are made
    in two levels, since a float64 copy of (N, V) would cost more than the softmax: sums of groups of `size`
    tokens first, then the cumulative sum inside the one group in which the draw falls.
    """
    # p = .1 .2 | .3 .1 | .2 .1, size 2, draw .65: sums of groups .3 .7 1.0, so group 1, and in it the first
    # to exceed .65 - .3 = .35 is the second: token 3. (V = 152k, size 256: 594 groups.)
    groups = F.pad(p, (0, -p.shape[1] % size)).unflatten(1, (-1, size))  # (N, groups, size)
    sums = groups.sum(-1, dtype=torch.float64).cumsum(-1)  # (N, groups)
    target = below(draws[:, None] * sums[:, -1:], sums[:, -1:])  # (N, 1) the cumulative sum to exceed
    # clamp: only NaN finds no group; Decoder.record reports it, and must be reached
    group = torch.searchsorted(sums, target, right=True).clamp(max=groups.shape[1] - 1)  # (N, 1)
    before = F.pad(sums, (1, 0)).gather(1, group)  # the sum of all groups before
    inside = groups[torch.arange(len(p), device=p.device), group[:, 0]].double().cumsum(-1)  # (N, size)
    place = torch.searchsorted(inside, below(target - before, inside[:, -1:]), right=True)
    return (group * size + place)[:, 0].clamp(max=p.shape[1] - 1)


def below(x, bound):
    """The smaller of x and the largest float64 under the bound, the last cumulative sum: so that a search for
    the first sum beyond x always ends at a place."""
    return torch.minimum(x, bound.nextafter(torch.zeros_like(bound)))


def sample(logits, draws, mask_id, temperature=1.0, top_k=0, top_p=1.0, with_entropy=True):
    """Draws a token at each position by inverse CDF.

    logits (N, V), draws float64 (N,) in [0, 1) -> token int64 (N,), confidence, logp, entropy, float32 (N,).
    The token is the smallest v whose cumulative probability exceeds the draw: probabilities .5 .3 .2 and draw
    .6 give token 1.

    confidence: its probability in the distribution it was drawn from, after the filters, as in the authors'
    decoder: it says how sure the draw was. logp: log softmax(logits / T) BEFORE the filters. The loss
    computes the unfiltered policy again and compares with this; filtered, a token that the new policy drops
    would have -inf. (So with top-k or top-p the draws are not quite the trained policy's.)
    """
    logp = (policy_logits(logits, mask_id) / (temperature or 1.0)).log_softmax(-1)  # (N, V)
    if temperature == 0 or top_k == 1:
        # Greedy. Every filtered confidence would be 1 and could order nothing, so confidence and entropy are
        # those of the unfiltered distribution (T = 1 at T = 0).
        token, p = logp.argmax(-1), logp.exp()
    else:
        p = filter_probabilities(logp, top_k, top_p)
        token = inverse_cdf(p, draws.double())
    confidence = p.gather(-1, token[:, None])[:, 0]
    entropy = torch.special.entr(p).sum(-1) if with_entropy else torch.zeros_like(confidence)
    return token, confidence, logp.gather(-1, token[:, None])[:, 0], entropy


# FORK HERE (decoding): what a denoising step reveals. Strategies differ here and nowhere else: they are given
# the same draws until one keeps more than another. Add a branch, and its name to STRATEGIES. In every slot
# that has a mask it must reveal at least one (or decoding never ends), and only masked places. Tensor
# operations only: a value read by the host (`if x.any()`) cannot be part of a CUDA graph. Replay and training
# need no change: they follow the step map.
def reveal(confidence, entropy, is_masked, quota, strategy, threshold=0.9, entropy_bound=ENTROPY_BOUND):
    """Which of the sampled tokens to keep, (B, K) -> bool (B, K). The others stay masked, and are drawn anew.

    strategy     reveals, with n = quota (int64, (B,)) = K / denoising_steps
    static       the n most confident masked positions
    dynamic      every masked position with confidence > threshold; if fewer than n, the n most confident
    sequential   the n leftmost masked positions: with n = 1, decoding from left to right
    entropy      masked positions by rising entropy while their sum stays under a bound, at least one
    """
    if strategy == "sequential":
        score = -torch.arange(confidence.shape[1], device=confidence.device).expand_as(confidence).float()
    else:
        score = -entropy if strategy == "entropy" else confidence
    # What is not masked comes last in the order.
    score = score.masked_fill(~is_masked, float("-inf"))
    order = score.argsort(dim=-1, descending=True, stable=True)
    rank = order.argsort(dim=-1)  # scores .2 .9 .5: order 1 2 0, rank 2 0 1
    if strategy == "entropy":
        total = entropy.masked_fill(~is_masked, float("inf")).gather(-1, order).cumsum(-1)
        quota = (total < entropy_bound).sum(-1).clamp(min=1)
    # "& is_masked": where fewer than n are left, the n best include positions that are not masked, and a
    # revealed token, or one of the prompt, would be overwritten.
    is_best = (rank < quota[:, None]) & is_masked
    if strategy == "dynamic":
        is_sure = (confidence > threshold) & is_masked
        return torch.where(is_sure.sum(-1, keepdim=True) >= quota[:, None], is_sure, is_best)
    return is_best


# ------------------------------------------------------------------------------------------------------------
# Decoding. Every slot holds one sequence, and each forward advances each slot by one denoising step. A
# sequence that has ended makes room for the next prompt, so batches are of mixed lengths all the time.


@dataclass
class Lane:
    """A busy slot as the host knows it: whose it is, and how far its decoding is."""

    number: int  # which of the prompts given to `generate`
    prompt: list
    seed: int
    start: int  # absolute position where the block being decoded begins
    end: int  # where decoding stops, at the latest
    num_masked: int  # places of the block that are still masked
    step: int = 1  # the denoising step that comes next, counted over the whole response
    step_in_block: int = 0  # the same, counted from 0 in its block
    is_committed: bool = True  # whether the cache holds the clean tokens of all blocks before this one


class Decoder:
    """The sequences being decoded. Tables are (slots + 1, length) by absolute position.

    The busy slots are 0 .. n - 1, and lanes[slot] is what the host knows of each; when a sequence ends, a
    later one takes its slot. So a batch is a slice of every table, and is read without being copied.

    Device and host meet once per forward: `denoise` is a function of tensors whose shapes the host knows
    beforehand, and gives two small numbers per slot, which the host reads. Every further question (how many
    places are masked? has this sequence ended?) would let a GPU wait while the host thinks.
    """

    def __init__(self, model, settings, num_slots, length):
        self.model, self.config, self.settings, self.device = model, model.config, settings, model.device
        # the decoding's own: rollouts may have smaller blocks than the model trains in
        K = settings.block_size
        # One slot more: CUDA graphs are recorded for few sizes of batch. Idle slots stand in for the missing
        # sequences, and this one for the missing commits.
        table = (num_slots + 1, length)
        self.token = torch.full(table, self.config.mask_id, device=self.device)
        self.is_masked = torch.zeros(table, dtype=torch.bool, device=self.device)
        self.step_map = torch.zeros(table, dtype=torch.int64, device=self.device)  # 0: not revealed, prompt
        self.confidence, self.logp = torch.zeros(2, *table, device=self.device)
        self.tables = (self.token, self.is_masked, self.step_map, self.confidence, self.logp)
        self.offset, self.slots = (torch.arange(n, device=self.device) for n in (K, num_slots))
        self.eos_ids = torch.tensor(settings.eos_ids, dtype=torch.int64, device=self.device)
        self.lanes, self.cache = [], None
        if not self.config.is_full or settings.cache != "none":
            self.cache = KVCache(
                self.config, num_slots + 1, length, model.embed.weight.dtype, self.device)
        if self.device.type == "cuda" and not self.config.is_full and not IS_EAGER:
            is_flash = flash_attn_with_kvcache is not None and self.cache.keys.dtype != torch.float32
            self.denoise = cuda.Captured(
                self.denoise, num_slots, K, length, length if is_flash else 512)

    def admit(self, numbers, prompts, seeds):
        """Gives prompts to the next free slots, and fills the cache with the whole blocks of each."""
        K, mask_id, first_slot, ends = self.settings.block_size, self.config.mask_id, len(self.lanes), []
        for number, prompt, seed in zip(numbers, prompts, seeds):
            P, end = len(prompt), len(prompt) + self.settings.max_new_tokens
            # Block attention: P = 9, K = 4: positions 0..7 are whole blocks and prefilled; decoding starts at
            # 8 with one prompt token and three masks. Full attention: the grid of blocks starts at the
            # response.
            start = P if self.config.is_full else P // K * K
            end = end if self.config.is_full else -(-end // K) * K  # rounded up to whole blocks
            self.lanes.append(Lane(number, prompt, seed, start, end, min(start + K, end) - P))
            ends.append((P, end))
        slots, longest = range(first_slot, len(self.lanes)), max(map(len, prompts))
        rows = slice(first_slot, len(self.lanes))
        padded = [prompt + [mask_id] * (longest - len(prompt)) for prompt in prompts]
        for table in self.tables:
            table[rows] = 0
        self.token[rows, longest:] = mask_id
        self.token[rows, :longest] = torch.tensor(padded, device=self.device)
        position = torch.arange(self.token.shape[1], device=self.device)
        # (n, 1) each, compared with position (length,): masked is what lies between the two.
        prompt_end, response_end = torch.tensor(ends, device=self.device).T[..., None]
        self.is_masked[rows] = (position >= prompt_end) & (position < response_end)
        # A group's prompt is prefilled once, in the first of its slots; the other slots get a copy of its
        # keys and values (as long as the longest prompt: what is too much is overwritten before it is read).
        if not self.config.is_full:
            first = {}  # prompt -> slot
            for slot, prompt in zip(slots, prompts):
                if len(prompt) >= K:  # a shorter one has no whole block
                    first.setdefault(tuple(prompt), slot)
            self.prefill(list(first.values()), [len(prompt) // K * K for prompt in first])
            others = [(first[key], slot) for slot, key in zip(slots, map(tuple, prompts))
                      if key in first and first[key] != slot]
            if others:
                source, target = torch.tensor(others, device=self.device).T
                self.cache.copy(source, target, longest // K * K)

    def prefill(self, slots, lengths, max_tokens=16384):
        """Writes the keys and values of the first `lengths` tokens of slots. Prompts of similar length share
        a forward: otherwise one long prompt would pad 256 short ones to its length."""
        for group in by_length([(length, 1) for length in lengths], max_tokens):
            chosen = torch.tensor([slots[i] for i in group], device=self.device)
            longest = max(lengths[i] for i in group)
            # Shorter ones write some of their masks, too: decoding writes there again.
            position = torch.arange(longest, device=self.device).expand(len(group), -1)
            layout = Layout.clean(position, self.settings.block_size, False)
            self.model.hidden(self.token[chosen, :longest], position, self.cache.filling(chosen, layout))

    def advance(self):
        """A denoising step of every busy slot -> the slots whose sequence is complete."""
        s, K, lanes = self.settings, self.settings.block_size, self.lanes
        each, remainder = divmod(K, s.denoising_steps)  # K = 8 in 3 steps: 3, 3, 2
        # All that the device needs to know of a slot. Slot 0 at the third denoising step of its response, in
        # the block of positions 8..11, one token a step, seed 7: (8, 3, 1, 7).
        numbers = [(lane.start, lane.step, each + (lane.step_in_block < remainder), lane.seed)
                   for lane in lanes]
        # Slot 1 has just gone on to the block of positions 12..15. The cache still holds the block before it,
        # 8..11, as it was in its last step, with masks. (1, 8): write it once more, clean.
        commits = [(slot, lane.start - K) for slot, lane in enumerate(lanes) if not lane.is_committed]
        found = self.denoise(
            torch.tensor(numbers, device=self.device).T,  # (4, B)
            torch.tensor(commits, dtype=torch.int64, device=self.device).view(-1, 2).T,  # (2, M)
            sum(lane.num_masked for lane in lanes), max(lane.start for lane in lanes) + K)
        ended = []
        for slot, (lane, num_masked, has_eos) in enumerate(zip(lanes, *found.tolist())):  # the one read
            lane.num_masked, lane.step, lane.is_committed = num_masked, lane.step + 1, True
            lane.step_in_block += 1
            if num_masked:
                continue
            # The block is whole. Only now may an eos end the sequence: the tokens after it are context for
            # those before it. (A sequence that has ended needs no commit: nobody will read its cache.)
            if has_eos or lane.start + K >= lane.end:
                ended.append(slot)
            else:
                lane.start, lane.step_in_block, lane.is_committed = lane.start + K, 0, False
                lane.num_masked = min(K, lane.end - lane.start)
        return ended

    def denoise(self, numbers, commits, num_masked, longest):
        """A denoising step of the slots 0 .. B - 1 -> int64 (2, B): how many places of each slot's block are
        still masked, and whether there is an eos in it.

        numbers (4, B): start, step, quota (see `reveal`), seed of each slot. commits (2, M): see `states`.
        num_masked (N), longest: ints, how many places of these blocks are masked, and how far the blocks
        reach; larger numbers do no harm. So no shape depends on what the device computes.
        """
        s, (start, step, quota, seed), B = self.settings, numbers, numbers.shape[1]
        columns = start[:, None] + self.offset  # (B, K) absolute positions of the blocks
        is_masked = self.is_masked[:B].gather(1, columns)  # (B, K)
        h = self.states(columns, commits, longest)  # (B, K, C)
        # The head and the sampler see masked places only: at one token a step five of eight, with K = 4. They
        # are sorted to the front. Masks 0 1 0 1 | 1 1 1 1 of slots 0 and 1: places 1 3 4 5 6 7.
        places = is_masked.flatten().argsort(descending=True, stable=True)[:num_masked]  # (N,) of B * K
        slot = places // s.block_size  # (N,) whose place it is
        draws = uniform(seed[slot], step[slot], columns.flatten()[places])
        # (N,) each, back to (B, K), 0 where nothing is masked
        spread = lambda x: x.new_zeros(B * s.block_size).scatter(0, places, x).view_as(is_masked)
        token, confidence, logp, entropy = map(spread, self.propose(h.flatten(0, 1)[places], draws))
        is_kept = reveal(confidence, entropy, is_masked, quota, s.strategy, s.threshold)  # (B, K)
        # torch.where instead of an index list: what is kept is written, all else stays as it is.
        records = ((self.token, token), (self.confidence, confidence), (self.logp, logp),
                   (self.step_map, step[:, None]), (self.is_masked, torch.zeros_like(is_masked)))
        for table, new in records:
            table[:B].scatter_(1, columns, torch.where(is_kept, new, table[:B].gather(1, columns)))
        # An eos ends a sequence only inside the response: a prompt may end with one, and share the block.
        is_eos = torch.isin(self.token[:B].gather(1, columns), self.eos_ids)
        is_revealed = self.step_map[:B].gather(1, columns) > 0
        return torch.stack([(is_masked & ~is_kept).sum(-1), (is_eos & is_revealed).any(-1)])

    def propose(self, h, draws):
        """Draws tokens for masked places, by their states (N, C) -> token, confidence, logp, entropy (N,)."""
        s, parts = self.settings, []
        chunk = max(1, cuda.MOST_LOGITS // self.config.vocab_size)  # V = 152k: logits of 220 places at a time
        # Entropies are one more pass over all logits: for the strategies that look at them.
        for states, u in zip(h.split(chunk), draws.split(chunk)):
            parts.append(sample(head_logits(self.model, states), u, self.config.mask_id, s.temperature,
                                s.top_k, s.top_p, s.strategy not in ("static", "dynamic", "sequential")))
        return map(torch.cat, zip(*parts))

    def states(self, columns, commits, longest):
        """One forward -> final states (B, K, C) that predict the tokens at `columns` (B, K) of the slots.

        commits (2, M): slots whose block before this one has just become whole, and where that block starts.
        Its clean tokens ride along as a second row of the same slot: keys and values of all rows are written
        first, then all rows attend. So the commit costs no forward of its own (only K more tokens in one that
        runs anyhow), and no later block ever reads a noisy one:

            slots    0  block 8..11   0 ? 0 ?   denoising
                     1  block 12..15  ? ? ? ?   denoising, sees the row below: the clean block 8..11
            commit   1  block 8..11   1 0 1 ;
        """
        if self.config.is_full:
            return self.full_states(columns)
        B = len(columns)
        rows = torch.cat([self.slots[:B], commits[0]])  # (B + M,)
        position = torch.cat([columns, commits[1, :, None] + self.offset])  # (B + M, K)
        attend = self.cache.reading(rows, position, position[:, -1] + 1, longest, num_in_place=B)
        return self.model.hidden(self.token[rows[:, None], position], position, attend)[:B]

    def full_states(self, columns):
        """The same with full attention: a forward sees the whole canvas, the masks on the right included.
        Canvases of one length go together: nothing is padded, and no mask is needed.

        Approximate caches (Fast-dLLM, arXiv 2505.22618): the first step of a block computes the whole canvas
        and keeps its keys and values; its other steps compute the block (dual), or all from the block on
        (prefix), and see the rest as it was at that first step. They break the replay law: they are for
        evaluation.

        P = 9, room for 8 tokens, K = 4, the second step of the first block: positions 0..16 are computed
        without a cache, 9..16 with prefix, 9..12 with dual; Dream begins one earlier, at 8.
        """
        K, kind, shift = self.settings.block_size, self.settings.cache, int(self.config.shifts_logits)
        groups = {}  # (first place to compute, the one behind the last, end of the canvas) -> slots
        for slot, lane in enumerate(self.lanes):
            is_whole = kind == "none" or lane.step_in_block == 0
            first = 0 if is_whole else lane.start - shift
            stop = min(lane.start + K, lane.end) if kind == "dual" and not is_whole else lane.end
            groups.setdefault((first, stop, lane.end), []).append(slot)
        out = columns.new_empty(*columns.shape, self.config.hidden_size, dtype=self.model.embed.weight.dtype)
        for (first, stop, end), slots in groups.items():
            slots = torch.tensor(slots, device=self.device)
            position = torch.arange(first, stop, device=self.device).expand(len(slots), -1)
            attend = functools.partial(masked_attention, mask=None)
            if kind != "none":
                attend = self.cache.reading(slots, position, torch.full_like(slots, end), end)
            h = self.model.hidden(self.token[slots, first:stop], position, attend)
            # Dream: the output at i - 1 predicts token i (so `first` is one place earlier, too). clamp: the
            # last block may stick out of the canvas; no place there is masked, so what is read is not used.
            source = (columns[slots] - shift - first).clamp(0, stop - first - 1)
            out[slots] = h.gather(1, source[..., None].expand(-1, -1, h.shape[-1]))
        return out

    def release(self, ended):
        """Empties the slots of the list `ended` -> their (prompt's number, record); the last busy slots move
        into the gaps."""
        # One read for all. float64 holds token ids and float32 alike.
        columns = self.token, self.step_map, self.confidence, self.logp
        read = torch.stack([table[ended].double() for table in columns])
        done = [(self.lanes[slot].number, self.record(self.lanes[slot], *columns))
                for slot, *columns in zip(ended, *read.tolist())]
        # Slots 0 and 2 of five have ended: three stay busy, 3 moves into 0 and 4 into 2.
        n = len(self.lanes) - len(ended)
        gaps = [slot for slot in ended if slot < n]
        movers = [slot for slot in range(n, len(self.lanes)) if slot not in set(ended)]
        if gaps:
            source, target = torch.tensor([movers, gaps], device=self.device)
            for table in self.tables:
                table[target] = table[source]
            self.is_masked[n:len(self.lanes)] = False  # of an idle slot, which may fill up a batch
            if self.cache is not None:
                self.cache.copy(source, target, max(self.lanes[slot].end for slot in movers))
        for gap, mover in zip(gaps, movers):
            self.lanes[gap] = self.lanes[mover]
        del self.lanes[n:]
        return done

    def record(self, lane, tokens, steps, confidence, logp):
        """The Rollout of a complete sequence; the four columns are lists of floats, by absolute position."""
        s, P = self.settings, len(lane.prompt)
        cut = slice(P, min(lane.start + s.block_size, lane.end))
        response, logp = list(map(int, tokens[cut])), logp[cut]
        if not all(map(math.isfinite, logp)):
            raise ValueError("the model's logits are not finite: its weights hold NaN or inf, or overflow")
        limit = min(len(response), s.max_new_tokens)  # tokens that may be trained
        until_eos = next((i + 1 for i, token in enumerate(response[:limit]) if token in s.eos_ids), None)
        return Rollout(
            prompt=lane.prompt, response=response, num_tokens=until_eos or limit,
            step_map=list(map(int, steps[cut])), confidence=confidence[cut], logp=logp,
            canvas=s.max_new_tokens if self.config.is_full else 0, is_truncated=until_eos is None,
            seed=lane.seed)


@torch.no_grad()
def generate(model, prompts, *, max_new_tokens, seed=0, slots=None, block_size=None, eos_ids=None, **more):
    """Decodes a response to every prompt and records its trace -> list[Rollout], in the prompts' order.

    prompts: lists of token ids, none empty. max_new_tokens: room for the response. seed: one int per prompt,
    or an int s for s, s + 1, ... slots: sequences decoded together (default as many as fit); memory grows
    with it, results do not depend on it. block_size: K (default the model's). eos_ids: what ends a response
    (default the model's); an eos inside the prompt ends nothing. more: see DecodingSettings. Raises
    ValueError for an empty prompt, a wrong number of seeds, a setting out of range, more slots than memory,
    and logits that are not finite.
    """
    config, prompts = model.config, [list(prompt) for prompt in prompts]
    seeds = [seed + i for i in range(len(prompts))] if isinstance(seed, int) else list(seed)
    seeds = [(s + 2**63) % 2**64 - 2**63 for s in seeds]  # into the range of int64
    settings = DecodingSettings(max_new_tokens, config.block_size if block_size is None else block_size,
                                tuple(config.eos_ids if eos_ids is None else eos_ids), **more)
    if len(seeds) != len(prompts):
        raise ValueError(f"{len(seeds)} seeds for {len(prompts)} prompts: give one each, or a single int")
    for number, prompt in enumerate(prompts):
        if not prompt:
            raise ValueError(f"prompt {number} is empty: a response needs at least one token before it")
    if settings.cache != "none" and not config.is_full:
        raise ValueError(f"cache {settings.cache!r} is for full attention: the cache of block attention is "
                         "exact, and always used")
    if not prompts:
        return []
    # More prompts than slots: the others wait, and take the slots of those that end.
    length = max(map(len, prompts)) + max_new_tokens + settings.block_size  # the last block may stick out
    itemsize = model.embed.weight.element_size()
    per_slot = cuda.slot_bytes(config, length, itemsize, not config.is_full or settings.cache != "none")
    num_slots = cuda.fit_slots(slots, len(prompts), per_slot, config, model.device)
    decoder = Decoder(model, settings, num_slots, length)
    # numbers of prompts; the last one is taken first
    waiting, rollouts = list(range(len(prompts)))[::-1], [None] * len(prompts)
    if config.is_full:  # canvases of one length are computed together
        waiting.sort(key=lambda number: len(prompts[number]))
    while waiting or decoder.lanes:
        if waiting and len(decoder.lanes) < num_slots:
            taken = [waiting.pop() for _ in range(min(num_slots - len(decoder.lanes), len(waiting)))]
            decoder.admit(taken, [prompts[i] for i in taken], [seeds[i] for i in taken])
        if ended := decoder.advance():
            for number, r in decoder.release(ended):
                rollouts[number] = r
    decoder.denoise = None  # on a GPU it points back at the decoder, and the cache would outlive this call
    return rollouts


def generate_everywhere(model, prompts, seeds, **settings):
    """`generate` with the prompts dealt out over all processes; every process gets all rollouts, in order."""
    # Every process decodes its share with whole weights, without waiting for the others.
    with parallel.unsharded(model) as whole:
        own = generate(whole, parallel.share(prompts), seed=parallel.share(seeds), **settings)
    if model.device.type == "cuda":
        torch.cuda.empty_cache()  # gives the KV cache's memory back: NCCL cannot use what torch keeps
    return parallel.gather(own)


# ------------------------------------------------------------------------------------------------------------
# Views: the states the policy was in, and which tokens were drawn there.


# FORK HERE (views): which states to train on. Without editing: --views file.py:function. The function is
# called once for every block of every response (full attention: once for the whole response):
#     rollout   the record: prompt, response, step_map, confidence, ...
#     block     response indices of one block, e.g. [3, 4, 5, 6]
#     shrink    the flag of that name
#     rng       random.Random seeded by the rollout: the same views on any process
# and gives a list of views (hidden, targets): which of these indices are masks in the
# view, and which are predicted.
def trace_views(rollout, block, shrink, rng=None):
    """The views of TraceRL: one per trace step, its targets the tokens that this
    step revealed (paper, section 4).

    A trace step is `shrink` neighbouring denoising steps merged into one: fewer views, so less to compute,
    but the tokens of the later steps are then predicted without those of the earlier ones in sight: states
    the policy was not in. (With the authors' code and small random models, shrink 2 moves log-probabilities
    by 0.2 to 0.3 nats on average; with a trained model that is sure of itself, hardly.)

    step_map 1 3 1 2 of the block 1 0 1 ; with indices 0 to 3:
        shrink 1   ([0, 1, 2, 3], [0, 2])   ([1, 3], [3])   ([1], [1])
        shrink 2   ([0, 1, 2, 3], [0, 2, 3])   ([1], [1])
    """
    # Only the order of the steps counts, so that step maps of other code may start anywhere.
    steps = sorted({rollout.step_map[j] for j in block})
    views = []
    for start in range(0, len(steps), shrink):
        merged = steps[start:start + shrink]  # one trace step
        hidden = [j for j in block if rollout.step_map[j] >= merged[0]]  # not revealed before this trace step
        views.append((hidden, [j for j in hidden if rollout.step_map[j] <= merged[-1]]))
    return views


def random_views(rollout, block, shrink, rng):
    """A baseline, as in the paper: masks drawn at random in place of the trace. Their share is U(0.1, 0.9)
    per block (full attention: per response); the masked tokens are the targets. The authors' code draws 35
    such masks per response with full attention: for that, see tests/forks.py:as_many_random.
    (sft.noise_views, called random there, is made for learning: it hides a whole block as often as a single
    token.)

    A policy gradient wants log pi(token | the state in which it was drawn). Under random masks it is another
    state, in which perhaps nobody would have drawn this token: the gradient is that of another policy."""
    share = rng.uniform(0.1, 0.9)
    # May be empty: a view without targets is left out of the row.
    hidden = [j for j in block if rng.random() < share]
    return [(hidden, hidden)]


def coupled_views(rollout, block, shrink, rng):
    """A second baseline: random masks and their complement, so that every token is a target exactly once."""
    (hidden, _), = random_views(rollout, block, shrink, rng)
    others = [j for j in block if j not in set(hidden)]
    return [(hidden, hidden), (others, others)]


VIEWS = dict(trace=trace_views, random=random_views, coupled=coupled_views)  # --views


def blocks_of(prompt_length, response_length, block_size):
    """Response indices, block by block, blocks cut at absolute positions.

    P = 9, R = 7, K = 4: positions 9 10 11 | 12 13 14 15 are the indices [0, 1, 2], [3, 4, 5, 6].
    """
    blocks, start = [], 0  # start: response index
    while start < response_length:
        stop = min(start + block_size - (prompt_length + start) % block_size, response_length)
        blocks.append(list(range(start, stop)))
        start = stop
    return blocks


def views_of(rollout, config, block_size, views=trace_views, shrink=1):
    """(block number, hidden, targets, masked share) of every view of a response,
    in the order of the blocks."""
    P, R = len(rollout.prompt), len(rollout.response)
    blocks = [list(range(R))] if config.is_full else blocks_of(P, R, block_size)
    # The views of a response are the same on any process, in any micro-batch, after any resume.
    rng, found = random.Random(rollout.seed), []
    for block in blocks:
        for hidden, targets in views(rollout, block, shrink, rng):
            if not set(targets) <= set(hidden) <= set(block):
                raise ValueError(f"--views: of the block {block}, {hidden} are hidden and {targets} "
                                 "predicted; what is predicted must be hidden, and of the block")
            number = 0 if config.is_full else (P + block[0]) // block_size
            found.append((number, hidden, targets, len(hidden) / len(block)))
    return found


# ------------------------------------------------------------------------------------------------------------
# Rows: views laid out for the network, with all that a loss needs to know of each target.


def build_rows(rollouts, config, block_size, views=trace_views, shrink=1, trained_only=False, post_num=0):
    """The training rows of rollouts -> a list for each: one row, or with full attention one row per view
    (none if no view has a target). ValueError for a view that predicts what it shows.

    trained_only: only the first num_tokens (+ post_num) tokens of a response are targets; the
    others are still seen. A view without targets is left out; of the clean text, only the blocks
    before the last view's block are laid out.

    A row is [clean text | view | view | ...]: one forward for all states. Prompt 894+396=, response "101;"
    (four tokens). Step 1 revealed both 1s, step 2 the rest; K = 4, "?" is the mask token:

        tokens     8  9  4  +    3  9  6  =    ?  ?  ?  ?    1  ?  1  ?
        position   0  1  2  3    4  5  6  7    8  9 10 11    8  9 10 11
        block      0  0  0  0    1  1  1  1    2  2  2  2    2  2  2  2
        view       0  0  0  0    0  0  0  0    1  1  1  1    2  2  2  2
        target                                 1     1          0     ;

    The row has P + R + K * (number of views) tokens, less the last view's own clean block (R: whole blocks,
    with what fills the last one). The authors' layout has one row [prompt | response | response as it was]
    per step number inside a block, padded to the longest prompt and response allowed: at P = 100, R = 500,
    K = 4, one token a step, padded to 300 and 2000, that is 4 rows of 4,300 = 17,200 tokens instead of
    100 + 500 + 4 * 500 - 4 = 2,596. One clean text serves all views, because no clean token and no other view
    sees the masks of a view.

    Full attention has no clean text to share: there, whatever a step reveals is seen by all other tokens. So
    the cost is a whole canvas, P + max_new_tokens, per view: hence --shrink 8 with --model (Dream, LLaDA).
    """
    rows_of_all = []
    for rollout_index, r in enumerate(rollouts):
        # What stands behind eos is shown, for it was in sight; it is not trained, for it is not part of the
        # answer that earns the reward.
        end = r.trained_end(post_num) if trained_only else len(r.response)
        found = [(block, hidden, [j for j in targets if j < end], share)
                 for block, hidden, targets, share in views_of(r, config, block_size, views, shrink)]
        found = [view for view in found if view[2]]
        rows_of_all.append(lay_out(r, rollout_index, found, config, block_size))
    return rows_of_all


def lay_out(r, rollout_index, found, config, block_size):
    """The rows of one rollout, from its views, tuples like those of views_of -> list[Row]."""
    P, R, rows = len(r.prompt), len(r.response), []
    text = r.prompt + r.response + [config.mask_id] * (r.canvas - R)
    size = len(text) if config.is_full else block_size  # of a block; full attention: all is one block
    # Training blocks may be larger than those of the decoding. Then the end of the last one was never
    # decoded: it is shown as masks.
    text += [config.mask_id] * (-len(text) % size)
    # values[j]: logp, logp_old, advantage, value_old, returns of token j; 0 where a list is not filled yet.
    # (logp_old never is: it will be computed from these very rows.)
    columns = [column + [0.0] * (R - len(column))
               for column in (r.logp, [], r.advantage, r.value_old, r.returns)]
    values = list(zip(*columns))
    for view, (block, hidden, targets, share) in enumerate(found, 1):
        # Block attention: one row for all views; it begins with the clean blocks before the last view's. Full
        # attention: a row for each view, and no clean text, since its only block is number 0.
        if config.is_full or not rows:
            rows.append(Row())
            last_block = found[-1][0]
            for clean in range(last_block):
                rows[-1].add(text[clean * size:(clean + 1) * size], clean, 0)
        shown, view_start = text[block * size:(block + 1) * size], len(rows[-1].tokens)
        for j in hidden:
            shown[P + j - block * size] = config.mask_id
        rows[-1].add(shown, block, view)
        for j in targets:
            # In this row (packing adds where the row begins). In the picture, j = 1 in the second view:
            # 12 + 8 + 1 - 2 * 4 = 13.
            place = view_start + P + j - block * size
            # Dream predicts a token one place before it; a prompt has a token, so that the place exists.
            logit_index = place - int(config.shifts_logits)
            rows[-1].targets.append(  # in the order of model.Targets
                (logit_index, r.response[j], rollout_index, j, share, *values[j]))
    return rows


# ------------------------------------------------------------------------------------------------------------
# Replay.


def forward_rows(model, rows, temperature=1.0):
    """Log-probability and entropy of the targets of one micro-batch, in their order: float32 (N,) each."""
    return token_logprobs(model, rows.states(model), rows.targets.token, temperature)


def replay(model, rollouts, shrink=1, temperature=1.0, block_size=None, max_tokens=16384, is_packed=None):
    """Log-probabilities of every response token, given the states in which the trace revealed them.

    -> list of float32 tensors, one per rollout, as long as its response; with gradient, unless called under
    no_grad. Of a sharded model, give what parallel.unsharded gives: processes may have different numbers of
    rollouts, or none. shrink 1, the sampling temperature and the block size of the decoding give Rollout.logp
    back (the replay law).
    """
    if not rollouts:
        return []
    longest = max(len(r.response) for r in rollouts)
    flat = torch.zeros(len(rollouts) * longest, device=model.device)  # a table (N, longest), flat
    built = build_rows(rollouts, model.config, block_size or model.config.block_size, shrink=shrink)
    for rows in micro_batches(built, max_tokens, model.config.pad_id, model.device, is_packed):
        logp, _ = forward_rows(model, rows, temperature)
        # Targets come sorted by row length; each knows whose token it is, and so its place in the table.
        place = rows.targets.rollout_index * longest + rows.targets.response_index
        flat = flat.index_put((place,), logp)
    return [part[:len(r.response)] for part, r in zip(flat.view(len(rollouts), longest), rollouts)]


@torch.no_grad()
def replayed_minus_recorded(model, rollouts, block_size, temperature, max_tokens, is_packed=None):
    """Replayed less recorded log-probability, float64, of every token of this process's share of rollouts."""
    own = parallel.share(rollouts)
    with parallel.unsharded(model) as whole:  # processes may have other numbers of rollouts
        replayed = replay(whole, own, 1, temperature, block_size, max_tokens, is_packed)
    differences = [logp.cpu() - torch.tensor(r.logp) for logp, r in zip(replayed, own)]
    return torch.cat([torch.zeros(0), *differences]).double().to(model.device)


def replay_gap(model, rollouts, block_size, temperature, max_tokens=16384, is_packed=None):
    """The replay law on a few rollouts: |replayed - recorded logp|, its mean and maximum."""
    # One process may have none of the few rollouts: sums and maxima over all.
    gap = replayed_minus_recorded(model, rollouts, block_size, temperature, max_tokens, is_packed).abs()
    return dict(gap=parallel.mean_of(gap), gap_max=parallel.largest_of(gap))


# ------------------------------------------------------------------------------------------------------------
# The method ends here. `python rollout.py --model PATH --prompt "12+34="` plays a decoding in the terminal.


if __name__ == "__main__":
    runs.run_command(functools.partial(player.main, sys.modules["__main__"]))
