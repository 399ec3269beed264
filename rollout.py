"""rollout.py - a trace: recorded, then replayed.

TraceRL trains a diffusion language model on the very states it was in while decoding. Here are both halves:

  generate   decodes block by block and records, for every token, the denoising step that revealed it,
             with which confidence and which log-probability;
  replay     rebuilds those states as *views* in one training row, and reads off the same log-probabilities.

`write_page`, last, shows traces in a browser.

With shrink 1 the two numbers are equal to float32 rounding (the replay law). If they are not, then masks,
positions, blocks, cache or step map differ between sampling and training, and the policy gradient is of some
other policy.

Reading order: Rollout, sample, reveal, generate; then merge_steps, the views, Rows, replay.

Left out: approximate prefix and dual caches for full attention (every forward sees the whole canvas: exact,
slower), speculative decoding, classifier-free guidance.
"""

import json
from collections import deque
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F

from model import (
    KVCache, Layout, block_mask, gather_lists, over_processes, policy_logits, processes, token_logprobs,
    tile_mask, unsharded)

ENTROPY_BOUND = 0.35  # of the "entropy" strategy, in nats
STRATEGIES = ("static", "dynamic", "sequential", "entropy")


@dataclass
class Rollout:
    """One response and the trace by which it was decoded. Lists are as long as `response`.

    The response holds whole blocks: tokens after the end of the answer are kept, because the others saw them.
    """

    prompt: list  # token ids
    response: list  # token ids of every decoded block, the last one whole
    num_tokens: int  # trained tokens: up to and including eos, or up to max_new_tokens
    step_map: list  # denoising step that revealed each token, 1-based over the whole response
    confidence: list = field(default_factory=list)  # its probability in the distribution it was drawn from
    logp: list = field(default_factory=list)  # its log softmax(logits / T) then, before top-k and top-p
    canvas: int = 0  # full attention: response positions in view, decoded or not
    is_truncated: bool = False  # no eos within max_new_tokens
    seed: int = 0  # of its draws
    reward: float = 0.0
    token_rewards: list = field(default_factory=list)  # process rewards of the trained tokens, if any
    advantage: list = field(default_factory=list)
    logp_old: list = field(default_factory=list)  # of the start-of-step policy, on the rows that are trained
    value_old: list = field(default_factory=list)  # of the start-of-step value model
    returns: list = field(default_factory=list)
    ratio: list = field(default_factory=list)  # pi_new / pi_old as its update found it


# ------------------------------------------------------------------------------------------------------------
# One denoising step: draw a token for every masked position, then keep some of them.


def uniform(seed, step, position):
    """Draws in [0, 1), float64, from three int64 tensors: a counter-based hash (three rounds of splitmix64).

    A draw depends on nothing but its numbers: a sequence is the same alone, in a batch, on another process.
    """
    x = torch.zeros_like(position)
    for word in (seed, step, position):
        x = (x ^ word) + -0x61C8864680B583EB
        x = (x ^ (x >> 30 & (1 << 34) - 1)) * -0x40A7B892E31B1A47  # >> is arithmetic: the & makes it logical
        x = (x ^ (x >> 27 & (1 << 37) - 1)) * -0x6B2FB644ECCEEE15
        x = x ^ (x >> 31 & (1 << 33) - 1)
    return (x >> 11 & (1 << 53) - 1).double() * 2.0**-53


def filter_probabilities(logp, top_k, top_p):
    """Probabilities (N, V) after top-k, then top-p, renormalised. top_k 0 and top_p 1 keep everything.

    Top-k keeps every token as probable as the k-th, top-p the most probable until their sum exceeds top_p.
    """
    if 0 < top_k < logp.shape[-1]:
        kth = logp.topk(top_k, dim=-1).values[:, -1:]
        logp = logp.masked_fill(logp < kth, float("-inf"))
    p = logp.softmax(-1)
    if top_p < 1:
        sorted_p, order = p.sort(dim=-1, descending=True, stable=True)
        is_out = sorted_p.cumsum(-1) - sorted_p > top_p  # the sum before a token is already over
        is_out[:, 0] = False
        p = p.masked_fill(torch.zeros_like(is_out).scatter(-1, order, is_out), 0)
        p = p / p.sum(-1, keepdim=True)
    return p


def sample(logits, draws, mask_id, temperature=1.0, top_k=0, top_p=1.0):
    """Draws a token at each position by inverse CDF (METHOD: decoding, step 1).

    logits (N, V), draws float64 (N,) in [0, 1) -> token int64 (N,), confidence, logp, entropy, float32 (N,).
    The token is the smallest v whose cumulative probability exceeds the draw. logp is log softmax(logits / T)
    before the filters: they shape what is drawn, not the policy that is trained. Greedy (temperature 0 or
    top_k 1) would make every filtered confidence 1; confidence and entropy, which set the order, then come
    from the unfiltered distribution (T = 1 at T = 0).
    """
    logp = (policy_logits(logits, mask_id) / (temperature or 1.0)).log_softmax(-1)
    if temperature == 0 or top_k == 1:
        token, p = logp.argmax(-1), logp.exp()
    else:
        p = filter_probabilities(logp, top_k, top_p)
        cdf = p.double().cumsum(-1)
        total = cdf[:, -1]
        threshold = torch.minimum(draws.double() * total, total.nextafter(torch.zeros_like(total)))
        token = torch.searchsorted(cdf, threshold[:, None], right=True)[:, 0]
    confidence = p.gather(-1, token[:, None])[:, 0]
    entropy = torch.special.entr(p).sum(-1)
    return token, confidence, logp.gather(-1, token[:, None])[:, 0], entropy


def reveal(confidence, entropy, is_masked, quota, strategy, threshold=0.9, entropy_bound=ENTROPY_BOUND):
    """Which sampled tokens to keep (METHOD: decoding, the table): (B, K) -> bool (B, K), within is_masked.

    quota int64 (B,): n of the table, the fewest tokens a step reveals (all that are left, if fewer are left).
    """
    if strategy == "sequential":
        score = -torch.arange(confidence.shape[1], device=confidence.device).expand_as(confidence).float()
    else:
        score = -entropy if strategy == "entropy" else confidence
    score = score.masked_fill(~is_masked, float("-inf"))
    order = score.argsort(dim=-1, descending=True, stable=True)
    rank = order.argsort(dim=-1)
    if strategy == "entropy":
        total = entropy.masked_fill(~is_masked, float("inf")).gather(-1, order).cumsum(-1)
        quota = (total < entropy_bound).sum(-1).clamp(min=1)
    is_best = (rank < quota[:, None]) & is_masked
    if strategy == "dynamic":
        is_sure = (confidence > threshold) & is_masked
        return torch.where(is_sure.sum(-1, keepdim=True) >= quota[:, None], is_sure, is_best)
    return is_best


# ------------------------------------------------------------------------------------------------------------
# Decoding. Every slot holds one sequence; each forward advances each slot by one denoising step, or writes
# the clean keys and values of its finished block. A slot whose sequence has ended takes the next prompt:
# batches are ragged throughout.


class Decoder:
    """The state of all slots, as tensors (slots, length)."""

    def __init__(self, model, prompts, max_new_tokens, slots):
        self.model, self.config, self.device = model, model.config, model.device
        K = self.config.block_size
        longest = max(map(len, prompts)) + max_new_tokens
        length = longest if self.config.is_full else -(-longest // K) * K
        shape = (slots, length)
        self.token = torch.full(shape, self.config.mask_id, device=self.device)
        self.is_masked = torch.zeros(shape, dtype=torch.bool, device=self.device)
        self.step_map = torch.zeros(shape, dtype=torch.int64, device=self.device)
        self.confidence = torch.zeros(shape, device=self.device)
        self.logp = torch.zeros(shape, device=self.device)
        # per slot: sequence (-1: free), prompt length, end of decoding, block start, steps, steps in block
        self.sequence, self.prompt, self.end, self.start, self.step, self.step_in_block = torch.zeros(
            6, slots, dtype=torch.int64, device=self.device)
        self.sequence -= 1
        self.max_new_tokens = max_new_tokens
        if not self.config.is_full:
            self.cache = KVCache(self.config, slots, length, model.embed.weight.dtype, self.device)

    def admit(self, slots, sequences, prompts):
        """Gives prompts to free slots and prefills the whole blocks of each, in one forward."""
        K, is_full = self.config.block_size, self.config.is_full
        for slot, sequence, prompt in zip(slots, sequences, prompts):
            P = len(prompt)
            end = P + self.max_new_tokens
            self.sequence[slot], self.prompt[slot] = sequence, P
            self.end[slot] = end if is_full else -(-end // K) * K
            self.start[slot] = P if is_full else P // K * K  # a full-attention grid starts at the response
            self.token[slot] = self.config.mask_id
            self.token[slot, :P] = torch.tensor(prompt, device=self.device)
            self.is_masked[slot] = torch.arange(self.token.shape[1], device=self.device) >= P
        slots = torch.tensor(slots, device=self.device)
        for state in (self.step_map, self.confidence, self.logp, self.step, self.step_in_block):
            state[slots] = 0
        longest = int(self.start[slots].max())
        # shorter prompts write some of their masks, too: decoding writes there again
        if not is_full and longest > 0:
            position = torch.arange(longest, device=self.device).expand(len(slots), -1)
            layout = Layout.clean(position, K, False)
            self.model.hidden(self.token[slots, :longest], layout, self.cache.select(slots, position))

    def forward(self, slots, columns):
        """Final states at the current block (B, K) of these slots, to predict the tokens there: (B, K, C)."""
        rows = slots[:, None]
        if not self.config.is_full:
            layout = Layout.clean(columns, self.config.block_size, False)
            return self.model.hidden(
                self.token[rows, columns], layout, self.cache.select(slots, columns), True)
        longest = int(self.end[slots].max())
        position = torch.arange(longest, device=self.device).expand(len(slots), -1)
        document = torch.where(position < self.end[slots, None], 0, -1)  # a shorter canvas is padded
        h = self.model.hidden(self.token[slots, :longest], Layout.clean(position, 1, True, document))
        source = (columns - int(self.config.switches.shifts_logits)).clamp(min=0, max=longest - 1)
        return h[torch.arange(len(slots), device=self.device)[:, None], source]

    def advance(self, choose):
        """One forward of every busy slot. choose(...) picks tokens; see `generate`."""
        K = self.config.block_size
        slots = (self.sequence >= 0).nonzero()[:, 0]
        columns = self.start[slots, None] + torch.arange(K, device=self.device)  # (B, K)
        is_inside = columns < self.end[slots, None]  # the last block of a canvas may be short
        columns = columns.clamp(max=self.token.shape[1] - 1)
        rows = slots[:, None]
        is_masked = self.is_masked[rows, columns] & is_inside
        h = self.forward(slots, columns)
        is_done = ~is_masked.any(-1)  # nothing left to reveal: this forward was the commit of the clean block
        self.start[slots[is_done]] += K
        self.step_in_block[slots[is_done]] = 0
        if is_done.all():
            return
        self.step[slots[~is_done]] += 1
        token, confidence, logp, entropy = (
            torch.zeros(is_masked.shape, dtype=d, device=self.device)
            for d in (torch.int64, torch.float32, torch.float32, torch.float32))
        step = self.step[rows].expand_as(columns)[is_masked]
        draw = choose.draws(self.sequence[rows].expand_as(columns)[is_masked], step, columns[is_masked])
        chunks = [sample(self.model.head(states), draws, self.config.mask_id, choose.temperature,
                         choose.top_k, choose.top_p)
                  for states, draws in zip(h[is_masked].split(256), draw.split(256))]  # (256, V) at a time
        token[is_masked], confidence[is_masked], logp[is_masked], entropy[is_masked] = map(
            torch.cat, zip(*chunks))
        n, extra = divmod(K, choose.denoising_steps)
        quota = n + (self.step_in_block[slots] < extra).long()
        keep = reveal(confidence, entropy, is_masked, quota, choose.strategy, choose.threshold)
        self.step_in_block[slots[~is_done]] += 1
        at = (rows.expand_as(columns)[keep], columns[keep])
        self.token[at], self.confidence[at], self.logp[at] = token[keep], confidence[keep], logp[keep]
        self.step_map[at], self.is_masked[at] = self.step[at[0]], False

    def finished(self, eos_ids):
        """Slots whose block is whole and the last: it has an eos of the response, or the room is used up."""
        slots = (self.sequence >= 0).nonzero()[:, 0]
        columns = self.start[slots, None] + torch.arange(self.config.block_size, device=self.device)
        is_inside = columns < self.end[slots, None]
        columns = columns.clamp(max=self.token.shape[1] - 1)
        rows = slots[:, None]
        is_whole = ~(self.is_masked[rows, columns] & is_inside).any(-1)
        is_response = is_inside & (columns >= self.prompt[slots, None])
        has_eos = (torch.isin(self.token[rows, columns], eos_ids) & is_response).any(-1)
        is_last = self.start[slots] + self.config.block_size >= self.end[slots]
        if self.config.is_full:  # no cache, so no commit: on to the next block at once
            ready = slots[is_whole & ~has_eos & ~is_last]
            self.start[ready] += self.config.block_size
            self.step_in_block[ready] = 0
        return slots[is_whole & (has_eos | is_last)].tolist()

    def release(self, slot, eos_ids):
        """Frees a slot and returns its record."""
        P = int(self.prompt[slot])
        stop = min(int(self.start[slot]) + self.config.block_size, int(self.end[slot]))
        response = self.token[slot, P:stop].tolist()
        limit = min(len(response), self.max_new_tokens)
        num_tokens = next((i + 1 for i, token in enumerate(response[:limit]) if token in eos_ids), 0)
        self.sequence[slot] = -1
        return Rollout(
            prompt=self.token[slot, :P].tolist(), response=response, num_tokens=num_tokens or limit,
            step_map=self.step_map[slot, P:stop].tolist(), confidence=self.confidence[slot, P:stop].tolist(),
            logp=self.logp[slot, P:stop].tolist(), canvas=self.max_new_tokens if self.config.is_full else 0,
            is_truncated=num_tokens == 0)


@dataclass
class Choose:
    """How tokens are drawn and revealed, checked once."""

    strategy: str
    denoising_steps: int
    threshold: float
    temperature: float
    top_k: int
    top_p: float
    seeds: torch.Tensor  # int64, one per sequence
    uniforms: object = None

    def __post_init__(self):
        if self.strategy not in STRATEGIES:
            raise ValueError(f"unknown strategy {self.strategy!r}: choose one of {', '.join(STRATEGIES)}")
        for name, is_good in (("threshold", 0 <= self.threshold <= 1), ("temperature", self.temperature >= 0),
                              ("top_k", self.top_k >= 0), ("top_p", 0 < self.top_p <= 1)):
            if not is_good:
                raise ValueError(f"{name} {getattr(self, name)} is out of range: "
                                 "threshold 0..1, temperature >= 0, top_k >= 0 (0 keeps all), 0 < top_p <= 1")

    def draws(self, sequence, step, position):
        """A draw in [0, 1) for each of N masked positions, float64."""
        if self.uniforms is None:
            return uniform(self.seeds[sequence], step, position)
        draw = torch.empty(len(position), dtype=torch.float64, device=position.device)
        for number in sequence.unique().tolist():
            own = sequence == number
            values = self.uniforms(number, int(step[own][0]), position[own])
            draw[own] = torch.as_tensor(values, dtype=torch.float64, device=draw.device)
        return draw


@torch.no_grad()
def generate(model, prompts, *, max_new_tokens, strategy="dynamic", denoising_steps=None, threshold=0.9,
             temperature=1.0, top_k=0, top_p=1.0, eos_ids=(), seed=0, slots=None, uniforms=None):
    """Decodes a response to every prompt and records its trace -> list[Rollout], in the prompts' order.

    prompts: lists of token ids, none empty. max_new_tokens: room for the response. strategy, denoising_steps
    (per block, default K), threshold, temperature, top_k, top_p: see `reveal` and `sample`. eos_ids: tokens
    that end a response; none of them in a prompt does. seed: one int per prompt, or an int s for s, s + 1,
    ... slots: sequences decoded together (default all); memory grows with it, results do not depend on it.
    uniforms: for tests, a callable (sequence number, 1-based denoising step, absolute positions int64 (n,) of
    the masked tokens) -> n draws in [0, 1). Raises ValueError for an empty prompt, or a setting out of range.
    """
    K = model.config.block_size
    prompts = [list(prompt) for prompt in prompts]
    seeds = [seed + i for i in range(len(prompts))] if isinstance(seed, int) else list(seed)
    if len(seeds) != len(prompts):
        raise ValueError(f"{len(seeds)} seeds for {len(prompts)} prompts: give one each, or a single int")
    if max_new_tokens < 1 or (slots is not None and slots < 1):
        raise ValueError(f"max_new_tokens ({max_new_tokens}) and slots ({slots}) must be at least 1")
    if not 1 <= (denoising_steps or K) <= K:
        raise ValueError(f"denoising_steps {denoising_steps} must be between 1 and the block size, {K}")
    for number, prompt in enumerate(prompts):
        if not prompt:
            raise ValueError(f"prompt {number} is empty: a response needs at least one token before it")
    wrapped = [(s + 2**63) % 2**64 - 2**63 for s in seeds]
    choose = Choose(strategy, denoising_steps or K, threshold, temperature, top_k, top_p,
                    torch.tensor(wrapped, dtype=torch.int64, device=model.device), uniforms)
    if not prompts:
        return []
    eos_set, eos_ids = set(eos_ids), torch.tensor(list(eos_ids), dtype=torch.int64, device=model.device)
    num_slots = min(slots or len(prompts), len(prompts))
    decoder = Decoder(model, prompts, max_new_tokens, num_slots)
    waiting, free, rollouts = deque(range(len(prompts))), list(range(num_slots)), [None] * len(prompts)
    while waiting or len(free) < num_slots:
        if waiting and free:
            taken = [waiting.popleft() for _ in range(min(len(waiting), len(free)))]
            decoder.admit(free[:len(taken)], taken, [prompts[i] for i in taken])
            free = free[len(taken):]
        decoder.advance(choose)
        for slot in decoder.finished(eos_ids):
            number = int(decoder.sequence[slot])
            rollouts[number] = decoder.release(slot, eos_set)
            rollouts[number].seed = wrapped[number]
            free.append(slot)
    return rollouts


@contextmanager
def blocks_of(model, size):
    """Inside, the model decodes and replays in blocks of `size` tokens: the larger blocks of a model are
    trained at first on the rollouts of smaller ones (METHOD: SFT, larger blocks)."""
    own, model.config.block_size = model.config.block_size, size
    try:
        yield
    finally:
        model.config.block_size = own


def generate_everywhere(model, prompts, seeds, **settings):
    """`generate` with the prompts dealt out over all processes; every process gets all rollouts, in order."""
    rank, number = processes()
    with unsharded(model):
        own = generate(model, prompts[rank::number], seed=seeds[rank::number], **settings)
    return gather_lists(own)


# ------------------------------------------------------------------------------------------------------------
# Replay: the states the policy was in, as views.


def merge_steps(steps, span, shrink=1):
    """Denoising steps -> trace steps (METHOD: replay), both int64 (N, L), 0 where nothing was decoded.

    Inside each span of positions (a block; the whole row for full attention) the distinct steps are numbered
    1, 2, ... in order, then every `shrink` neighbours share one number. L must be a multiple of span.
    """
    N, L = steps.shape
    ordered, order = steps.view(N, L // span, span).sort(dim=-1)
    is_new = ordered > 0
    is_new[..., 1:] &= ordered[..., 1:] != ordered[..., :-1]
    number = (is_new.cumsum(-1) + shrink - 1) // shrink  # zeros sort first and stay 0
    return torch.zeros_like(ordered).scatter(-1, order, number).view(N, L)


def trace_views(trace):
    """Views of a trace, one per trace step: int64 (N, L) -> is_masked, is_target, bool (N, S, L).

    The view of step t shows what was revealed before t; its targets are the tokens revealed at t.
    """
    step = torch.arange(1, max(1, int(trace.max())) + 1, device=trace.device)[:, None]
    return trace[:, None] >= step, trace[:, None] == step


@dataclass
class Rows:
    """Training rows (B, T) and the places in them where tokens are predicted. All int64, on one device."""

    tokens: torch.Tensor  # (B, T)
    layout: Layout  # of (B, T); document -1 is padding
    source: torch.Tensor  # (N,) index into the flattened (B * T) whose output predicts the target
    target: torch.Tensor  # (N,) the token to predict
    owner: torch.Tensor  # (N,) which rollout it belongs to
    place: torch.Tensor  # (N,) its index in that rollout's response
    is_packed: bool = False  # several texts in one row, see `packed`

    def to(self, device):
        """The same rows on another device."""
        layout = Layout(*(t.to(device, non_blocking=True) for t in self.layout))
        rest = (getattr(self, name).to(device, non_blocking=True)
                for name in ("source", "target", "owner", "place"))
        return Rows(self.tokens.to(device, non_blocking=True), layout, *rest, is_packed=self.is_packed)

    def select(self, rows):
        """Some of the rows, int64 (n,), cut to the longest of them."""
        T, longest = self.tokens.shape[1], int((self.layout.document[rows] >= 0).sum(-1).max())
        number = torch.full((len(self.tokens),), -1).index_put((rows,), torch.arange(len(rows)))
        row, column = number[self.source // T], self.source % T
        own = row >= 0
        return Rows(self.tokens[rows, :longest], Layout(*(t[rows, :longest] for t in self.layout)),
                    (row * longest + column)[own], self.target[own], self.owner[own], self.place[own])

    def split(self, max_tokens, is_packed=False):
        """Cuts into micro-batches of at most max_tokens tokens (at least one row each), with little padding.
        is_packed: all rows of a micro-batch end to end in one (see `packed`)."""
        lengths = (self.layout.document >= 0).sum(-1).tolist()
        start = 0
        while start < len(lengths):
            stop, longest, total = start + 1, lengths[start], lengths[start]
            while stop < len(lengths):
                longest, total = max(longest, lengths[stop]), total + lengths[stop]
                size = total if is_packed else longest * (stop + 1 - start)
                if size > max_tokens or size > 512 and size - total > total / 32:  # full, or padding prevails
                    break
                stop += 1
            part = self.select(torch.arange(start, stop))
            yield part.packed(-(-max_tokens // 512) * 128) if is_packed else part
            start = stop

    def packed(self, multiple):
        """The same rows end to end as one row, kept apart by their document numbers; padded to a multiple of
        `multiple` tokens, so that kernels are compiled for few lengths."""
        is_token = self.layout.document.flatten() >= 0
        room = -int(is_token.sum()) % multiple
        tokens, position, document, block, view = (
            F.pad(t.flatten()[is_token], (0, room), value=fill)[None]
            for t, fill in zip((self.tokens, *self.layout), (0, 0, -1, 0, 0)))
        view[0, len(view[0]) - room:] = torch.arange(1, room + 1)  # padding sees itself only
        source = (is_token.cumsum(0) - 1)[self.source]
        return Rows(tokens, Layout(position, document, block, view), source, self.target, self.owner,
                    self.place, is_packed=True)

    def states(self, backbone):
        """Final states (N, C) of a BlockDiffusionLM at the places that predict the targets."""
        if self.tokens.is_cuda:
            mask = block_mask(self.layout) if self.is_packed else None
        else:
            mask = tile_mask(self.layout) if self.tokens.shape[1] > 512 else None
        return backbone.hidden(self.tokens, self.layout, mask=mask).flatten(0, 1)[self.source]


def micro_batches(rows, max_tokens, device, is_shared=False):
    """Rows (or None for none) -> a list of micro-batches on `device`, as many on every process.

    is_shared: all processes have the same rows, and each takes its share of them. Sharded layers wait for
    each other, so a process that has fewer micro-batches goes along on one token of padding without targets:
    its losses are sums over nothing, its gradients 0. Packed on a GPU, where FlexAttention skips what lies
    between documents; on a CPU rows of like length together.
    """
    rank, number = processes() if is_shared else (0, 1)
    parts = []
    if rows is not None and rank < len(rows.tokens):
        own = rows.select(torch.arange(rank, len(rows.tokens), number))
        parts = list(own.split(max_tokens, is_packed=device.type == "cuda"))
    one, none = torch.zeros(1, 1, dtype=torch.int64), torch.zeros(0, dtype=torch.int64)
    missing = int(over_processes(max, len(parts))[0]) - len(parts)
    parts += [Rows(one, Layout(one, one - 1, one, one), none, none, none, none)] * missing
    return [part.to(device) for part in parts]


def canvases(rollouts, config):
    """Prompt + response of rollouts, padded alike -> tokens, steps (0: not decoded), (N, L); lengths (N,).

    Full attention: undecoded positions of the canvas are masks that stay masks. Only the order of steps
    counts, so step maps of other code may start at any number.
    """
    texts = [r.prompt + r.response + [config.mask_id] * (r.canvas - len(r.response)) for r in rollouts]
    lengths = [len(text) for text in texts]
    L = max(lengths)
    L = L if config.is_full else -(-L // config.block_size) * config.block_size
    tokens = torch.tensor([text + [config.pad_id] * (L - len(text)) for text in texts])
    steps = torch.zeros_like(tokens)
    for row, r in zip(steps, rollouts):
        row[len(r.prompt):len(r.prompt) + len(r.response)] = torch.tensor(r.step_map) + (1 - min(r.step_map))
    return tokens, steps, torch.tensor(lengths)


def build_rows(tokens, lengths, prompt_lengths, is_masked, is_target, config):
    """Lays out clean text and views as training rows (METHOD: replay, "one forward for all of it").

    tokens (N, L), lengths and prompt_lengths (N,), is_masked and is_target bool (N, S, L) -> Rows, one row
    per text [clean | view | view | ...], views in the order of their blocks. A view without targets is left
    out, and so is clean text after the last block that anyone looks back from. Full attention: no clean text;
    one row per view, a whole canvas.
    """
    N, L = tokens.shape
    S = is_masked.shape[1]
    K = L if config.is_full else config.block_size
    valid = torch.arange(L) < lengths[:, None]
    has_view = is_target.view(N, S, L // K, K).any(-1).transpose(1, 2)  # (N, blocks, S)
    n, b, s, k = (has_view[..., None] & valid.view(N, L // K, 1, K)).nonzero().T  # every token of every view
    position, view = b * K + k, s + 1
    if config.is_full:
        row, b = n * S + s, torch.zeros_like(b)
    else:
        last = (has_view.any(-1) * torch.arange(L // K)).amax(-1)  # the last block with a view, of each text
        clean_n, clean_position = (torch.arange(L) < last[:, None] * K).nonzero().T
        n, position = torch.cat([clean_n, n]), torch.cat([clean_position, position])
        view, b = torch.cat([torch.zeros_like(clean_n), view]), torch.cat([clean_position // K, b])
        order = n.argsort(stable=True)  # clean text, then views, text by text
        n, position, view, b = n[order], position[order], view[order], b[order]
        row = n
    counts = torch.bincount(row)
    row, counts = (torch.cumsum(counts > 0, 0) - 1)[row], counts[counts > 0]  # close the gaps
    order = counts.argsort(stable=True)  # short rows first: little padding after `split`
    row, counts = order.argsort()[row], counts[order]
    by_row = row.argsort(stable=True)
    row, n, position, view, b = row[by_row], n[by_row], position[by_row], view[by_row], b[by_row]
    T = int(counts.max()) if len(counts) else 0
    column = torch.arange(len(row)) - (counts.cumsum(0) - counts)[row]
    shape, flat = (len(counts), T), row * T + column
    shown = torch.where((view > 0) & is_masked[n, (view - 1).clamp(min=0), position], config.mask_id,
                        tokens[n, position])
    fields = [torch.full(shape, fill).flatten().index_put((flat,), value).view(shape)
              for fill, value in ((config.pad_id, shown), (0, position), (-1, row), (0, b), (0, view))]
    is_read = (view > 0) & is_target[n, (view - 1).clamp(min=0), position]
    n, position, flat = n[is_read], position[is_read], flat[is_read]
    shift = (position > 0).long() * config.switches.shifts_logits
    return Rows(fields[0], Layout(*fields[1:]), flat - shift, tokens[n, position], n,
                position - prompt_lengths[n])


def masked_views(rollouts, config, is_coupled):
    """The views of the paper's baselines: masks drawn at random instead of the trace (METHOD: policy loss).

    Each block (full attention: the response) is masked with a ratio of its own from U(0.1, 0.9); the masked
    tokens are the targets. is_coupled adds the complement, so that every token is a target once. The draws
    depend on Rollout.seed alone.
    """
    tokens, steps, _ = canvases(rollouts, config)
    position = torch.arange(tokens.shape[1]).expand_as(tokens)
    seed = torch.tensor([r.seed for r in rollouts])[:, None].expand_as(tokens)
    block = torch.zeros_like(position) if config.is_full else position // config.block_size
    ratio = 0.1 + 0.8 * uniform(seed, torch.full_like(position, -1), block)
    is_masked = (uniform(seed, torch.full_like(position, -2), position) < ratio) & (steps > 0)
    views = [is_masked, ~is_masked & (steps > 0)] if is_coupled else [is_masked]
    return torch.stack(views, dim=1)


def trace_rows(rollouts, config, shrink=1, trained_only=False, post_num=0, objective="tracerl"):
    """The rows of TraceRL: every response token is a target once, in the view of the step that revealed it.

    trained_only: only the first num_tokens (+ post_num) tokens of each response are targets; the others are
    still seen. objective: "tracerl", or the random masks of "random" and "coupled" in place of the trace.
    """
    tokens, steps, lengths = canvases(rollouts, config)
    prompt_lengths = torch.tensor([len(r.prompt) for r in rollouts])
    if objective == "tracerl":
        span = tokens.shape[1] if config.is_full else config.block_size
        is_masked, is_target = trace_views(merge_steps(steps, span, shrink))
    else:
        is_masked = masked_views(rollouts, config, objective == "coupled")
        is_target = is_masked.clone()
    if trained_only:
        end = torch.tensor([len(r.prompt) + min(r.num_tokens + post_num, len(r.response)) for r in rollouts])
        is_target &= (torch.arange(tokens.shape[1]) < end[:, None])[:, None]
    return build_rows(tokens, lengths, prompt_lengths, is_masked, is_target, config)


def forward_rows(model, rows, temperature=1.0):
    """Log-probability and entropy of the targets of one micro-batch, in their order: float32 (N,) each."""
    return token_logprobs(model, rows.states(model), rows.target, temperature)


def replay(model, rollouts, shrink=1, temperature=1.0, max_tokens=16384):
    """Log-probabilities of every response token, given the states in which the trace revealed them.

    One packed forward per max_tokens tokens -> list of float32 tensors, one per rollout, as long as its
    response; with gradient, unless called under no_grad. shrink 1 and the sampling temperature give
    Rollout.logp back (the replay law).
    """
    if not rollouts:
        return []
    longest = max(len(r.response) for r in rollouts)
    flat = torch.zeros(len(rollouts) * longest, device=model.device)
    for rows in trace_rows(rollouts, model.config, shrink).split(max_tokens, model.device.type == "cuda"):
        rows = rows.to(model.device)
        logp, _ = forward_rows(model, rows, temperature)
        flat = flat.index_put((rows.owner * longest + rows.place,), logp)
    return [part[:len(r.response)] for part, r in zip(flat.view(len(rollouts), longest), rollouts)]


# ------------------------------------------------------------------------------------------------------------
# A trace, to look at.


PAGE = """<!doctype html><meta charset="utf-8"><title>traces</title>
<style>body { font: 16px sans-serif; margin: 2em } pre { white-space: pre-wrap; line-height: 1.7 }
span { padding: 2px; border-radius: 3px } .untrained { opacity: 0.45 }</style>
<p>Colour: the denoising step that revealed a token. Point at it for its numbers; pale ones are not trained.
<br><input type="range" min="0" style="width: 30em"> <output></output></p><main></main><script>
const rollouts = DATA, slider = document.querySelector("input");
const last = rollouts.flatMap(r => r.tokens.map(t => t.step)).reduce((a, b) => Math.max(a, b), 0);
slider.max = last; slider.value = last;  // in this order: the first bounds the second
function element(name, text, title = "", style = "", kind = "") {
  return Object.assign(document.createElement(name), { textContent: text, title, style, className: kind });
}
function draw() {
  document.querySelector("output").value = "after step " + slider.value + " of " + last;
  document.querySelector("main").replaceChildren(...rollouts.map(r => {
    const pre = element("pre", `reward ${r.reward}\\n${r.prompt}`);
    pre.append(...r.tokens.map((t, place) => {
      const isShown = t.step <= slider.value, colour = `background: hsl(${300 * t.step / last} 75% 82%)`;
      const numbers = Object.entries(t).map(([name, x]) => name + " " + x).join("\\n");
      const [text, style] = isShown ? [t.text, colour] : ["\u2591", ""];
      return element("span", text, numbers, style, place < r.num_tokens ? "" : "untrained");
    }));
    return pre;
  }));
}
slider.oninput = draw; draw();
</script>"""


def write_page(rollouts, tokenizer, path):
    """Writes traces as one self-contained page: tokens by the step that revealed them, with their numbers."""
    shown = []
    for r in rollouts:
        columns = dict(step=r.step_map, confidence=r.confidence, logp=r.logp, advantage=r.advantage,
                       value=r.value_old, ratio=r.ratio)
        tokens = [{"text": tokenizer.decode([token])} for token in r.response]
        for name, column in columns.items():
            for token, number in zip(tokens, column):
                token[name] = round(number, 4)
        text = tokenizer.decode(r.prompt)
        shown.append(dict(prompt=text, reward=r.reward, num_tokens=r.num_tokens, tokens=tokens))
    with open(path, "w", encoding="utf-8") as file:  # no "<" of a model may end the script
        file.write(PAGE.replace("DATA", json.dumps(shown).replace("<", "\\u003c")))
