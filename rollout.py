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

THE REPLAY LAW. On the trace's own states (shrink 1), the replayed log-probability of every token equals the
recorded one, to float32 rounding. If it does not, then masks, positions, blocks, cache or step map differ
between sampling and training. Every RL step prints this `gap`. How far off a mistake is, on tiny models:
cutting blocks at the start of the response in training but at position 0 in decoding, 0.16 to 1.1 nats per
token; cutting the last block at eos, 0.06 to 0.56 for its tokens. A training loss shows none of this: both
sides of its ratio are wrong in the same way.

Read in this order: Rollout; sample, reveal, Decoder, generate; then the views, build_rows, replay.

Left out:
  1. approximate prefix and dual caches for full attention: every forward sees the whole canvas, which is
     exact, and slower;
  2. speculative decoding, classifier-free guidance;
  3. tokens re-encoded from text: token ids travel from rollout to update, and text is only for the answer
     checker.
"""

import random
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
import torch.nn.functional as F

from model import KVCache, Layout, attend_within, head_logits, policy_logits, token_logprobs
from plumbing import parallel

STRATEGIES = ("static", "dynamic", "sequential", "entropy")  # see `reveal`
ENTROPY_BOUND = 0.35  # of the "entropy" strategy, in nats


@dataclass
class Rollout:
    """One response and the trace by which it was decoded: the one record from decoding to update.

    Its lists have one entry per response token (`prompt` and `token_rewards` have their own lengths). The
    response holds whole blocks: tokens after the end of the answer are kept, because the tokens before them
    in the same block were drawn with them in sight.
    """

    prompt: list  # token ids
    response: list  # token ids of every decoded block, the last one whole
    num_tokens: int  # trained tokens: up to and including eos, or up to max_new_tokens
    step_map: list  # denoising step that revealed each token, counted from 1 over the whole response
    confidence: list = field(default_factory=list)  # its probability in the distribution it was drawn from
    logp: list = field(default_factory=list)  # its log softmax(logits / T) then, before top-k and top-p
    canvas: int = 0  # full attention: response positions in view, decoded or not
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
        """Where the trained tokens end: after eos and post_num tokens behind it in
        its block, if there is an eos."""
        return self.num_tokens if self.is_truncated else min(self.num_tokens + post_num, len(self.response))


@dataclass
class DecodingSettings:
    """How tokens are drawn and revealed, checked once, at the door."""

    max_new_tokens: int
    block_size: int  # K
    eos_ids: tuple
    strategy: str = "dynamic"
    denoising_steps: int = None  # per block: a step reveals K / denoising_steps tokens; None is K, one each
    threshold: float = 0.9
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self):
        self.denoising_steps = self.denoising_steps or self.block_size
        for name, is_good, wanted in (
                ("strategy", self.strategy in STRATEGIES, f"one of {', '.join(STRATEGIES)}"),
                ("max_new_tokens", self.max_new_tokens >= 1, "at least 1"),
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

    Top-k keeps every token as probable as the k-th, top-p the most probable until their sum exceeds top_p.
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
    """The smallest v whose cumulative probability exceeds the draw: p (N, V), draws float64 (N,) -> (N,).

    Sums are float64, since 152k rounded terms must not sum to less than a draw close to 1; and they are made
    in two levels, since a float64 copy of (N, V) would cost more than the softmax: sums of groups of `size`
    tokens first, then the cumulative sum inside the one group in which the draw falls.
    """
    # V = 152k, size 256: 594 groups. Sum them in float64, find the group, then the token in it.
    groups = F.pad(p, (0, -p.shape[1] % size)).unflatten(1, (-1, size))  # (N, groups, size)
    sums = groups.sum(-1, dtype=torch.float64).cumsum(-1)  # (N, groups)
    threshold = below(draws[:, None] * sums[:, -1:], sums[:, -1:])  # (N, 1)
    # clamp: only NaN finds no group; Decoder.release reports it, and must be reached
    group = torch.searchsorted(sums, threshold, right=True).clamp(max=groups.shape[1] - 1)  # (N, 1)
    before = F.pad(sums, (1, 0)).gather(1, group)  # the sum of all groups before
    inside = groups[torch.arange(len(p), device=p.device), group[:, 0]].double().cumsum(-1)  # (N, size)
    place = torch.searchsorted(inside, below(threshold - before, inside[:, -1:]), right=True)
    return (group * size + place)[:, 0].clamp(max=p.shape[1] - 1)


def below(x, bound):
    """x, or the next number below the bound where rounding has reached it: some
    cumulative sum must exceed x."""
    return torch.minimum(x, bound.nextafter(torch.zeros_like(bound)))


def sample(logits, draws, mask_id, temperature=1.0, top_k=0, top_p=1.0, with_entropy=True):
    """Draws a token at each position by inverse CDF.

    logits (N, V), draws float64 (N,) in [0, 1) -> token int64 (N,), confidence, logp, entropy, float32 (N,).
    The token is the smallest v whose cumulative probability exceeds the draw: probabilities .5 .3 .2 and draw
    .6 give token 1. logp is log softmax(logits / T) BEFORE the filters: they shape what is drawn and the
    confidence, not the policy that is trained.
    """
    logp = (policy_logits(logits, mask_id) / (temperature or 1.0)).log_softmax(-1)  # (N, V)
    if temperature == 0 or top_k == 1:
        # Greedy. Every filtered confidence would be 1 and could order nothing, so that confidence and entropy
        # are those of the unfiltered distribution (T = 1 at T = 0).
        token, p = logp.argmax(-1), logp.exp()
    else:
        p = filter_probabilities(logp, top_k, top_p)
        token = inverse_cdf(p, draws.double())
    confidence = p.gather(-1, token[:, None])[:, 0]
    entropy = torch.special.entr(p).sum(-1) if with_entropy else torch.zeros_like(confidence)
    return token, confidence, logp.gather(-1, token[:, None])[:, 0], entropy


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
# Decoding. Every slot holds one sequence, and each forward advances each slot by one denoising step. A slot
# whose sequence has ended takes the next prompt, so that batches are ragged throughout.


class Decoder:
    """The sequences being decoded. Tables are (slots, length) by absolute position, the rest is (slots,)."""

    def __init__(self, model, settings, num_slots, longest_prompt):
        self.model, self.config, self.settings, self.device = model, model.config, settings, model.device
        # the decoding's own: rollouts may have smaller blocks than the model trains in
        K = settings.block_size
        length = longest_prompt + settings.max_new_tokens + K  # the last block may stick out
        table, state = (num_slots, length), dict(dtype=torch.int64, device=self.device)
        self.token = torch.full(table, self.config.mask_id, **state)
        self.is_masked = torch.zeros(table, dtype=torch.bool, device=self.device)
        self.step_map = torch.zeros(table, **state)
        self.confidence = torch.zeros(table, device=self.device)
        self.logp = torch.zeros(table, device=self.device)
        self.seed = torch.zeros(num_slots, **state)
        self.prompt_length = torch.zeros(num_slots, **state)
        self.end = torch.zeros(num_slots, **state)  # where decoding stops, at the latest
        self.start = torch.zeros(num_slots, **state)  # of the block being decoded
        self.step = torch.zeros(num_slots, **state)  # denoising steps so far
        self.step_in_block = torch.zeros(num_slots, **state)
        self.offset = torch.arange(K, device=self.device)
        self.eos_ids = torch.tensor(settings.eos_ids, **state)
        if not self.config.is_full:
            self.cache = KVCache(self.config, num_slots, length, model.embed.weight.dtype, self.device)

    def admit(self, slots, prompts, seeds):
        """Gives prompts to free slots, and fills the cache with the whole blocks of each."""
        K, is_full = self.settings.block_size, self.config.is_full
        to = torch.tensor(slots, device=self.device)  # (M,)
        longest = max(map(len, prompts))
        padded = [prompt + [self.config.mask_id] * (longest - len(prompt)) for prompt in prompts]
        P = torch.tensor([len(prompt) for prompt in prompts], device=self.device)  # (M,)
        end = P + self.settings.max_new_tokens
        # Block attention: P = 9, K = 4: positions 0..7 are whole blocks and prefilled; decoding starts at 8
        # with one prompt token and three masks. Full attention: the grid of blocks starts at the response.
        self.start[to] = P if is_full else P // K * K
        self.end[to] = end if is_full else (end + K - 1) // K * K  # rounded up to whole blocks
        self.seed[to], self.prompt_length[to] = torch.tensor(seeds, device=self.device), P
        self.token[to] = self.config.mask_id
        self.token[to, :longest] = torch.tensor(padded, device=self.device)
        position = torch.arange(self.token.shape[1], device=self.device)
        self.is_masked[to] = (position >= P[:, None]) & (position < self.end[to, None])
        for state in (self.step_map, self.confidence, self.logp, self.step, self.step_in_block):
            state[to] = 0
        if not is_full:  # a group's prompt is prefilled once, for the first of its slots
            first = {}
            for slot, prompt in zip(slots, prompts):
                if len(prompt) >= K:  # a shorter one has no whole block
                    first.setdefault(tuple(prompt), slot)
            self.prefill(list(first.values()), [len(prompt) // K * K for prompt in first])
            others = [(first[tuple(prompt)], slot) for slot, prompt in zip(slots, prompts)
                      if first.get(tuple(prompt), slot) != slot]
            if others:
                source, target = torch.tensor(others, device=self.device).T
                self.cache.copy(source, target, longest // K * K)

    def prefill(self, slots, lengths, max_tokens=16384):
        """Writes the keys and values of the first `lengths` tokens of slots: like lengths in one forward,
        since one long prompt among 256 short ones would make all of them long."""
        for group in by_length([(length, 1) for length in lengths], max_tokens):
            chosen = torch.tensor([slots[i] for i in group], device=self.device)
            longest = max(lengths[i] for i in group)
            # Shorter ones write some of their masks, too: decoding writes there again.
            position = torch.arange(longest, device=self.device).expand(len(group), -1)
            layout = Layout.clean(position, self.settings.block_size, False)
            self.model.hidden(self.token[chosen, :longest], position, self.cache.filling(chosen, layout))

    def states(self, slots, columns, committing, num_in_place):
        """One forward -> final states (B, K, C) that predict the tokens at `columns` (B, K) of slots (B,).

        committing (M,): slots whose block before this one has just become whole. Its clean tokens ride along
        as a second row of the same slot: keys and values of all rows are written first, then all rows attend.
        So the commit costs no forward of its own, and the cache never keeps a noisy block:

            slots      7  block 8..11  0 ? 0 ?   denoising
                       3  block 4..7   ? ? ? ?   denoising, sees the row below: the clean block 0..3
            committing 3  block 0..3   8 9 4 +   commit
        """
        if self.config.is_full:
            return self.full_states(slots, columns)
        before = self.start[committing, None] - self.settings.block_size + self.offset  # (M, K)
        rows, position = torch.cat([slots, committing]), torch.cat([columns, before])  # (B + M,), (B + M, K)
        attend = self.cache.reading(rows, position, num_in_place)
        return self.model.hidden(self.token[rows[:, None], position], position, attend)[:len(slots)]

    def full_states(self, slots, columns):
        """The same with full attention: every forward sees the whole canvas, the
        masks on the right included."""
        longest = int(self.end[slots].max())
        position = torch.arange(longest, device=self.device).expand(len(slots), -1)
        document = torch.where(position < self.end[slots, None], 0, -1)  # a shorter canvas is padded
        layout = Layout.clean(position, 1, True, document)
        h = self.model.hidden(self.token[slots, :longest], position, attend_within(layout))
        source = columns - int(self.config.shifts_logits)  # Dream: the output at i - 1 predicts token i
        return h.gather(1, source.clamp(0, longest - 1)[..., None].expand(-1, -1, h.shape[-1]))

    def denoise(self, busy, committing):
        """A denoising step of every slot in the list `busy` -> (has_ended, has_moved), lists of bool: whether
        its sequence is complete, or its block whole and the next one begun."""
        # Shapes below: B busy slots, K places of the block of each.
        s, slots = self.settings, torch.tensor(busy, device=self.device)
        committing = torch.tensor(committing, dtype=torch.int64, device=self.device)
        num_in_place, rows = len(busy) if busy[-1] == len(busy) - 1 else 0, slots[:, None]
        columns = self.start[rows] + self.offset  # (B, K) absolute positions of the blocks
        is_masked = self.is_masked[rows, columns]  # (B, K)
        h = self.states(slots, columns, committing, num_in_place)  # (B, K, C)
        self.step[slots] += 1
        token, confidence, logp, entropy = self.propose(h, slots, columns, is_masked)
        tokens_each, remainder = divmod(s.block_size, s.denoising_steps)  # K = 8 in 3 steps: 3, 3, 2
        quota = tokens_each + (self.step_in_block[slots] < remainder).long()
        is_kept = reveal(confidence, entropy, is_masked, quota, s.strategy, s.threshold)  # (B, K)
        # torch.where instead of an index list: what is kept is written, all else stays as it is.
        records = ((self.token, token), (self.confidence, confidence), (self.logp, logp),
                   (self.step_map, self.step[rows]), (self.is_masked, False))
        for table, new in records:
            table[rows, columns] = torch.where(is_kept, new, table[rows, columns])

        # An eos ends a sequence only inside the response (a prompt may end with one, and share the block),
        # and only once its block is whole: the tokens after it are context for those before it.
        # Decided after this step's tokens are in.
        is_whole = ~(is_masked & ~is_kept).any(-1)
        is_eos = torch.isin(self.token[rows, columns], self.eos_ids) & (columns >= self.prompt_length[rows])
        has_eos = is_eos.any(-1)
        has_ended = is_whole & (has_eos | (self.start[slots] + s.block_size >= self.end[slots]))
        has_moved = is_whole & ~has_ended
        self.start[slots] += s.block_size * has_moved
        self.step_in_block[slots] = torch.where(has_moved, 0, self.step_in_block[slots] + 1)
        return torch.stack([has_ended, has_moved]).tolist()

    def propose(self, h, slots, columns, is_masked):
        """Draws a token for every masked position -> token, confidence, logp,
        entropy, (B, K), 0 elsewhere."""
        # The head and the sampler see masked places only: on average half of them.
        s, where = self.settings, is_masked.nonzero(as_tuple=True)
        position, slot = columns[where], slots[where[0]]  # (N,) the masked positions of all blocks
        draws = uniform(self.seed[slot], self.step[slot], position)
        drawn = []
        for states, u in zip(h[where].split(256), draws.split(256)):  # logits (256, V) at a time
            logits = head_logits(self.model, states)
            drawn.append(sample(logits, u, self.config.mask_id, s.temperature, s.top_k, s.top_p,
                                s.strategy == "entropy"))
        in_place = lambda values: values.new_zeros(is_masked.shape).index_put(where, values)
        return [in_place(torch.cat(parts)) for parts in zip(*drawn)]  # token, confidence, logp, entropy

    def release(self, slot, seed):
        """The record of a complete sequence."""
        s, P = self.settings, int(self.prompt_length[slot])
        stop = min(int(self.start[slot]) + s.block_size, int(self.end[slot]))
        # Whole blocks: also what stands behind eos, or beyond max_new_tokens, in the last one.
        response = self.token[slot, P:stop].tolist()
        logp = self.logp[slot, P:stop].tolist()
        if not torch.tensor(logp).isfinite().all():
            raise ValueError("the model's logits are not finite: its weights hold NaN or inf, or overflow")
        limit = min(len(response), s.max_new_tokens)  # tokens that may be trained
        until_eos = next((i + 1 for i, token in enumerate(response[:limit]) if token in s.eos_ids), None)
        return Rollout(
            prompt=self.token[slot, :P].tolist(), response=response, num_tokens=until_eos or limit,
            step_map=self.step_map[slot, P:stop].tolist(), confidence=self.confidence[slot, P:stop].tolist(),
            logp=logp, canvas=s.max_new_tokens if self.config.is_full else 0,
            is_truncated=until_eos is None, seed=seed)


@torch.no_grad()
def generate(model, prompts, *, max_new_tokens, seed=0, slots=None, block_size=None, eos_ids=None, **more):
    """Decodes a response to every prompt and records its trace -> list[Rollout], in the prompts' order.

    prompts: lists of token ids, none empty. max_new_tokens: room for the response. seed: one int per prompt,
    or an int s for s, s + 1, ... slots: sequences decoded together (default all); memory grows with it,
    results do not depend on it. block_size: K (default the model's). eos_ids: tokens that end a response
    (default the model's); an eos inside the prompt ends nothing. more: see DecodingSettings. Raises
    ValueError for an empty prompt, or a setting out of range.
    """
    config, prompts = model.config, [list(prompt) for prompt in prompts]
    # A seed per response: its draws do not depend on who else is in the batch.
    seeds = [seed + i for i in range(len(prompts))] if isinstance(seed, int) else list(seed)
    seeds = [(s + 2**63) % 2**64 - 2**63 for s in seeds]  # into the range of int64
    settings = DecodingSettings(max_new_tokens, block_size or config.block_size,
                                tuple(config.eos_ids if eos_ids is None else eos_ids), **more)
    if len(seeds) != len(prompts):
        raise ValueError(f"{len(seeds)} seeds for {len(prompts)} prompts: give one each, or a single int")
    if slots is not None and slots < 1:
        raise ValueError(f"slots must be at least 1, got {slots}")
    for number, prompt in enumerate(prompts):
        if not prompt:
            raise ValueError(f"prompt {number} is empty: a response needs at least one token before it")
    if not prompts:
        return []
    # More prompts than slots: the others wait, and take the slots of those that end.
    num_slots = min(slots or len(prompts), len(prompts))
    decoder = Decoder(model, settings, num_slots, max(map(len, prompts)))
    waiting, rollouts = list(range(len(prompts))), [None] * len(prompts)  # numbers of prompts
    owner, free, committing = {}, list(range(num_slots)), []  # owner: busy slot -> number of its prompt
    while waiting or owner:
        if waiting and free:
            chosen = [free.pop(0) for _ in range(min(len(free), len(waiting)))]
            taken = [waiting.pop(0) for _ in chosen]
            owner.update(zip(chosen, taken))
            decoder.admit(chosen, [prompts[i] for i in taken], [seeds[i] for i in taken])
        busy = sorted(owner)
        has_ended, has_moved = decoder.denoise(busy, committing)
        # The blocks that have just become whole: their clean tokens ride along with the next forward. A
        # sequence that has ended needs no commit, since nobody will read its cache.
        committing = [slot for slot, moved in zip(busy, has_moved) if moved]
        for slot in [slot for slot, ended in zip(busy, has_ended) if ended]:
            number = owner.pop(slot)
            rollouts[number] = decoder.release(slot, seeds[number])
            free.append(slot)
    return rollouts


def generate_everywhere(model, prompts, seeds, **settings):
    """`generate` with the prompts dealt out over all processes; every process gets all rollouts, in order."""
    # Every process decodes its share with whole weights, without waiting for the others.
    with parallel.unsharded(model):
        own = generate(model, parallel.share(prompts), seed=parallel.share(seeds), **settings)
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
    but the tokens of the later steps are then predicted without those of the earlier ones in sight (which
    moves their log-probabilities by 0.2 to 0.3 nats on the authors' tiny models).

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
    """A baseline of the paper: masks drawn at random in place of the trace. The ratio is U(0.1, 0.9) per
    block (full attention: per response); the masked tokens are the targets."""
    ratio = rng.uniform(0.1, 0.9)
    # May be empty: a view without targets is left out of the row.
    hidden = [j for j in block if rng.random() < ratio]
    return [(hidden, hidden)]


def coupled_views(rollout, block, shrink, rng):
    """Another one: random masks and their complement, so that every token is a target exactly once."""
    (hidden, _), = random_views(rollout, block, shrink, rng)
    others = [j for j in block if j not in set(hidden)]  # the complement
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


class Targets(NamedTuple):
    """What a loss needs to know of every predicted token, copied from the records
    when rows are built. All (N,)."""

    logit_index: torch.Tensor  # int64: which of the rows' flattened (B * T) outputs predicts it
    token: torch.Tensor  # int64: the token to predict
    rollout_index: torch.Tensor  # int64: which rollout it belongs to
    response_index: torch.Tensor  # int64: its index in that rollout's response
    masked_share: torch.Tensor  # float32: t, the share of its block that its view hides (see sft_loss)
    logp: torch.Tensor  # float32: recorded when it was drawn
    logp_old: torch.Tensor  # float32: of the start-of-step policy, on this very row; set in step 4
    advantage: torch.Tensor  # float32
    value_old: torch.Tensor  # float32: for the value model's loss
    returns: torch.Tensor  # float32: for the value model's loss


TARGET_DTYPES = (torch.int64,) * 4 + (torch.float32,) * 6


@dataclass
class Row:
    """One training row: lists over its tokens, and its targets as tuples in the order of Targets."""

    tokens: list = field(default_factory=list)
    position: list = field(default_factory=list)
    block: list = field(default_factory=list)
    view: list = field(default_factory=list)
    targets: list = field(default_factory=list)

    def add(self, tokens, block, view):
        """Appends the tokens of one block."""
        start = block * len(tokens)
        self.tokens += tokens
        self.position += range(start, start + len(tokens))
        self.block += [block] * len(tokens)
        self.view += [view] * len(tokens)


@dataclass
class Rows:
    """A micro-batch on one device: tokens int64 (B, T), their layout, and the targets."""

    tokens: torch.Tensor
    layout: Layout
    targets: Targets

    def states(self, backbone):
        """Final states (N, C) of a BlockDiffusionLM at the places that predict the targets."""
        h = backbone.hidden(self.tokens, self.layout.position, attend_within(self.layout))  # (B, T, C)
        return h.flatten(0, 1)[self.targets.logit_index]


def build_rows(rollouts, config, block_size, views=trace_views, shrink=1, trained_only=False, post_num=0):
    """The training rows of rollouts -> a list for each: one row, or with full attention one row per view.

    trained_only: only the first num_tokens (+ post_num) tokens of a response are targets; the
    others are still seen. A view without targets is left out; of the clean text, only the blocks
    before the last view's block are laid out.

    A row is [clean text | view | view | ...]: one forward for all states. Prompt 894+396=, response 101; of
    which step 1 revealed 1 and 1, and step 2 the rest; K = 4, "?" is the mask token:

        tokens     8  9  4  +    3  9  6  =    ?  ?  ?  ?    1  ?  1  ?
        position   0  1  2  3    4  5  6  7    8  9 10 11    8  9 10 11
        block      0  0  0  0    1  1  1  1    2  2  2  2    2  2  2  2
        view       0  0  0  0    0  0  0  0    1  1  1  1    2  2  2  2
        target                                 1     1          0     ;

    The row has P + R + K * (number of views) tokens, less the last clean block. The authors' layout has
    one row [prompt | response | response as it was] per step number inside a block, padded to the
    longest prompt and response allowed: at P = 100, R = 500, K = 4, one token a step, padded to 300 and
    2000, that is 6.6 times as many tokens. One clean text serves all views, because no clean token and
    no other view sees the masks of a view.

    Full attention has no clean text to share: there, whatever a step reveals is seen by all other tokens.
    """
    texts = []
    for number, r in enumerate(rollouts):
        P, R = len(r.prompt), len(r.response)
        text = r.prompt + r.response + [config.mask_id] * (r.canvas - R)
        K = len(text) if config.is_full else block_size
        # Only where training blocks are larger than those of the decoding: the rest of the last one was not
        # decoded, and looked like that.
        text += [config.mask_id] * (-len(text) % K)
        # Targets stop at eos; what stands behind it is still shown, for it was in sight.
        end = r.trained_end(post_num) if trained_only else R
        logp_old = []  # comes later, from these very rows
        columns = [column + [0.0] * (R - len(column))
                   for column in (r.logp, logp_old, r.advantage, r.value_old, r.returns)]
        values = list(zip(*columns))  # one tuple per response token
        found = []
        for block, hidden, targets, share in views_of(r, config, block_size, views, shrink):
            trained = [j for j in targets if j < end]
            if trained:
                found.append((block, hidden, trained, share))
        rows = []
        for view, (block, hidden, trained, share) in enumerate(found, 1):
            if config.is_full or not rows:  # a new row, with the clean blocks before the last view's
                rows.append(Row())
                for clean in range(found[-1][0]):
                    rows[-1].add(text[clean * K:(clean + 1) * K], clean, 0)
            # column: where this view begins in the row
            shown, column = text[block * K:(block + 1) * K], len(rows[-1].tokens)
            for j in hidden:
                shown[P + j - block * K] = config.mask_id
            rows[-1].add(shown, block, view)
            for j in trained:
                place = column + P + j - block * K
                # Dream predicts a token one place before it; a prompt has a token, so that the place exists.
                logit_index = place - int(config.shifts_logits)
                rows[-1].targets.append((logit_index, r.response[j], number, j, share, *values[j]))
        texts.append(rows)
    return texts


def by_length(sizes, max_tokens, is_packed=False):
    """Groups items for forwards of at most max_tokens tokens (or one item), like lengths together.

    sizes: (length of a row, number of rows) of each item -> lists of item numbers, short ones first. Unless
    packed, rows are padded to the longest of their group; a group ends early where that would waste a
    thirty-second of it.
    """
    # num_rows, num_tokens: of the group being filled, without padding
    groups, num_rows, num_tokens = [], 0, 0
    for item in sorted(range(len(sizes)), key=lambda item: sizes[item][0]):
        length, count = sizes[item]
        num_rows, num_tokens = num_rows + count, num_tokens + count * length
        padded = num_tokens if is_packed else num_rows * length  # the longest so far is this one
        is_wasteful = padded > 512 and padded - num_tokens > num_tokens / 32
        if not groups or padded > max_tokens or is_wasteful:
            groups.append([])
            num_rows, num_tokens = count, count * length
        groups[-1].append(item)
    return groups


def collate(rows, pad_id, multiple=None):
    """Rows as lists -> tensors (Rows): each row padded to the longest; or, with
    `multiple`, all end to end in one row.

    multiple: the one row is padded to a multiple of so many tokens, so that kernels are compiled for few
    lengths; the texts in it are kept apart by their document numbers. Padding is of document -1, and each
    padding token has a view of its own and sees only itself: a token that sees nothing would be NaN.
    """
    lengths = [len(row.tokens) for row in rows]
    is_packed = multiple is not None
    T = -(-sum(lengths) // multiple) * multiple if is_packed else max(lengths)
    B, used = (1 if is_packed else len(rows)), 0
    size = B * T
    # Start with padding everywhere, then write each row over it.
    fields = dict(tokens=[pad_id] * size, position=[0] * size, document=[-1] * size, block=[0] * size,
                  view=list(range(1, size + 1)))
    targets = []
    for number, row in enumerate(rows):
        start = used if is_packed else number * T  # where this row begins among all B * T tokens
        stop = start + lengths[number]
        for name in ("tokens", "position", "block", "view"):
            fields[name][start:stop] = getattr(row, name)
        fields["document"][start:stop] = [number] * lengths[number]
        targets += [(start + logit_index, *rest) for logit_index, *rest in row.targets]
        used = stop  # packed: the next row begins here
    tokens, *layout = (torch.tensor(values).view(B, T) for values in fields.values())
    columns = list(zip(*targets)) or [()] * len(TARGET_DTYPES)
    tensors = [torch.tensor(column, dtype=dtype) for column, dtype in zip(columns, TARGET_DTYPES)]
    return Rows(tokens, Layout(*layout), Targets(*tensors))


def to_device(rows, device):
    """The same micro-batch on another device."""
    move = lambda tensor: tensor.to(device, non_blocking=True)
    return Rows(move(rows.tokens), Layout(*map(move, rows.layout)), Targets(*map(move, rows.targets)))


def micro_batches(texts, max_tokens, pad_id, device):
    """The rows of rollouts (see build_rows) -> micro-batches on `device`, of max_tokens tokens at most.

    Rows of one response stay in one micro-batch where they fit, so that a loss may look at whole responses.
    On a GPU rows are packed end to end, since FlexAttention skips what lies between documents.
    """
    is_packed = device.type == "cuda"
    multiple = -(-max_tokens // 512) * 128 if is_packed else None
    # A full-attention response whose rows do not fit together is cut; all others stay whole.
    pieces = []
    for rows in texts:
        fitting = max(1, max_tokens // len(rows[0].tokens)) if rows else 1
        pieces += [rows[start:start + fitting] for start in range(0, len(rows), fitting)]
    groups = by_length([(len(rows[0].tokens), len(rows)) for rows in pieces], max_tokens, is_packed)
    parts = [collate([row for item in group for row in pieces[item]], pad_id, multiple) for group in groups]
    return [to_device(part, device) for part in parts]


def with_dummies(parts, pad_id, device):
    """This process's micro-batches, and dummies, so that every process has as many.

    Sharded layers (FSDP2) gather their weights from all processes, in forward and backward: a process that
    stopped early would leave the others waiting for ever. So one with fewer micro-batches runs dummies: one
    padding token, no targets, a loss of 0 and gradients of 0. To be called on every process.
    """
    # A question to all processes: who has the most?
    most = int(parallel.largest(torch.tensor(len(parts), device=device)))
    dummy = collate([Row(tokens=[pad_id], position=[0], block=[0], view=[1])], pad_id)
    return parts + [to_device(dummy, device) for _ in range(most - len(parts))]


# ------------------------------------------------------------------------------------------------------------
# Replay.


def forward_rows(model, rows, temperature=1.0):
    """Log-probability and entropy of the targets of one micro-batch, in their order: float32 (N,) each."""
    return token_logprobs(model, rows.states(model), rows.targets.token, temperature)


def replay(model, rollouts, shrink=1, temperature=1.0, block_size=None, max_tokens=16384):
    """Log-probabilities of every response token, given the states in which the trace revealed them.

    -> list of float32 tensors, one per rollout, as long as its response; with gradient, unless called under
    no_grad. A sharded model must be `unsharded` meanwhile: processes may have different numbers of rollouts,
    or none. shrink 1, the sampling temperature and the block size of the decoding give Rollout.logp back (the
    replay law).
    """
    if not rollouts:
        return []
    longest = max(len(r.response) for r in rollouts)
    flat = torch.zeros(len(rollouts) * longest, device=model.device)  # a table (N, longest), flat
    texts = build_rows(rollouts, model.config, block_size or model.config.block_size, shrink=shrink)
    for rows in micro_batches(texts, max_tokens, model.config.pad_id, model.device):
        logp, _ = forward_rows(model, rows, temperature)
        # Targets come sorted by row length; each knows whose token it is, so that it finds its way home.
        place = rows.targets.rollout_index * longest + rows.targets.response_index
        flat = flat.index_put((place,), logp)
    return [part[:len(r.response)] for part, r in zip(flat.view(len(rollouts), longest), rollouts)]
