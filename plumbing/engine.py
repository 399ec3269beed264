"""plumbing/engine.py - twin of rollout.generate: the same rollouts, many prompts at once, and faster.

Same draws, same tokens, same step maps; tests hold this file to the definition. What it does beside that:
  - Many sequences are decoded together. One that has ended makes room for the next prompt.
  - The clean keys and values of a finished block are not computed by a forward of their own. They ride along
    with the next denoising step of the same sequence.
  - Responses to one prompt share its prefill.
  - Host and device meet once per denoising step. On a GPU each step is one CUDA graph.
  - For full attention there are two approximate caches, for evaluation only.

`fast` at the end gives all twins together, as a rollout.Compute.
"""

import functools
from collections import Counter
from dataclasses import dataclass

import torch

import rollout
from model import Layout, Rotation, SwiGLU, attention, dense_mask, may_attend
from plumbing import flags, kernels, memory, packing

CACHES = ("none", "prefix", "dual")  # of full attention, see Decoder.full_states


class SlotCache:
    """Twin of model.KVCache for many sequences: (slots, length, H_kv, D) of keys and of values per layer.

    A forward first writes the keys and values of its tokens at their positions, then reads everything up to
    its block's own end. So a block lies in the cache while it is still noisy. That is harmless, since every
    forward overwrites its block before it reads. Once a block is whole, its clean keys and values must be
    written before a later block reads them: see Decoder.states.
    """

    def __init__(self, config, num_slots, length, dtype, device):
        shape = (config.num_layers, num_slots, length, config.num_kv_heads, config.head_dim)
        self.keys = torch.zeros(shape, dtype=dtype, device=device)
        self.values = torch.zeros(shape, dtype=dtype, device=device)
        self.heads_per_key = config.num_heads // config.num_kv_heads

    def write(self, layer, k, v, slots, position):
        """Stores k and v (B, H_kv, T, D) of one layer at slots (B,) and positions (B, T)."""
        self.keys[layer, slots[:, None], position] = k.transpose(1, 2)
        self.values[layer, slots[:, None], position] = v.transpose(1, 2)

    def filling(self, slots, layout):
        """An `attend` for prefill: by the rule within each row; row b is kept in slot slots[b]."""
        mask = kernels.as_added(dense_mask(layout), self.keys.dtype)

        def fill(layer, q, k, v):
            self.write(layer, k, v, slots, layout.position)
            return kernels.masked_attention(q, k, v, mask)
        return fill

    def reading(self, slots, position, end, longest, num_in_place=0):
        """An `attend` for decoding: row b is the tokens at position[b] (T,) of the sequence in slots[b].

        They see all that the slot holds before end[b] (B,). Two rows may be blocks of one slot: all rows
        write before any row reads. longest: an int, no end is beyond it. num_in_place: so many of the first
        rows are the slots 0, 1, 2, ...
        """
        num_queries = position.shape[1] * self.heads_per_key
        reader = kernels.CacheReader(slots, end, longest, num_in_place, num_queries, self.keys)

        def read(layer, q, k, v):
            self.write(layer, k, v, slots, position)
            return reader(q, self.keys[layer], self.values[layer])
        return read

    def copy(self, source, target, length):
        """Copies the first `length` tokens of the slots source (n,) to the slots target (n,)."""
        for keys, values in zip(self.keys, self.values):  # layer by layer: indexing makes a temporary copy
            keys[target, :length] = keys[source, :length]
            values[target, :length] = values[source, :length]


@dataclass
class Lane:
    """A busy slot as the host knows it: whose it is, and how far its decoding is."""

    number: int  # which of the prompts given to `generate`
    prompt: list
    seed: int
    start: int  # absolute position where the block being decoded begins
    end: int  # where decoding stops, at the latest
    num_masked: int  # masks that the block still has
    step: int = 1  # the denoising step that comes next, counted over the whole response
    step_in_block: int = 0  # the same, counted from 0 in its block
    is_committed: bool = True  # whether the cache holds the clean tokens of all blocks before this one


class Decoder:
    """The sequences being decoded. Tables are (slots + 1, length) by absolute position.

    The busy slots are 0 .. n - 1, and lanes[slot] is what the host knows of each. When a sequence ends, a
    later one takes its slot. So a batch is a slice of every table, and is read without being copied.
    """

    def __init__(self, model, decoding, num_slots, length, cache="none"):
        self.model = model
        self.config = model.config
        self.decoding = decoding
        self.device = model.device
        self.cache_kind = cache
        K = self.config.block_size
        # One slot more: CUDA graphs are recorded for few sizes of batch. Idle slots stand in for the missing
        # sequences, and this one for the missing commits.
        table = (num_slots + 1, length)
        self.token = torch.full(table, self.config.mask_id, device=self.device)
        self.is_masked = torch.zeros(table, dtype=torch.bool, device=self.device)
        self.step_map = torch.zeros(table, dtype=torch.int64, device=self.device)  # 0: not revealed, prompt
        self.confidence = torch.zeros(table, device=self.device)
        self.logp = torch.zeros(table, device=self.device)
        self.tables = (self.token, self.is_masked, self.step_map, self.confidence, self.logp)
        self.offset = torch.arange(K, device=self.device)
        self.slots = torch.arange(num_slots, device=self.device)
        self.eos_ids = torch.tensor(self.config.eos_ids, dtype=torch.int64, device=self.device)
        self.lanes = []
        self.cache = None
        if not self.config.is_full or cache != "none":
            self.cache = SlotCache(
                self.config, num_slots + 1, length, model.embed.weight.dtype, self.device)
        if self.device.type == "cuda" and not self.config.is_full and not kernels.IS_EAGER:
            reach = length if kernels.uses_flash(self.cache.keys) else 512
            self.denoise = Captured(self.denoise, num_slots, K, length, reach)

    def admit(self, numbers, prompts, seeds):
        """Gives prompts to the next free slots, and fills the cache with the whole blocks of each."""
        slots = range(len(self.lanes), len(self.lanes) + len(prompts))
        self.place(slots, numbers, prompts, seeds)
        if not self.config.is_full:
            self.prefill_groups(slots, prompts)

    def place(self, slots, numbers, prompts, seeds):
        """Writes prompts and masks into the tables, and makes a lane for each."""
        K = self.config.block_size
        ends = []
        for number, prompt, seed in zip(numbers, prompts, seeds):
            P = len(prompt)
            start, end = rollout.decoded_span(P, self.decoding.max_new_tokens, self.config)
            self.lanes.append(Lane(number, prompt, seed, start, end, min(start + K, end) - P))
            ends.append((P, end))
        rows = slice(slots.start, slots.stop)
        longest = max(map(len, prompts))
        padded = [prompt + [self.config.mask_id] * (longest - len(prompt)) for prompt in prompts]
        for table in self.tables:
            table[rows] = 0
        self.token[rows, longest:] = self.config.mask_id
        self.token[rows, :longest] = to_device(torch.tensor(padded), self.device)
        position = torch.arange(self.token.shape[1], device=self.device)
        prompt_end, response_end = to_device(torch.tensor(ends), self.device).T[..., None]  # (n, 1) each
        self.is_masked[rows] = (position >= prompt_end) & (position < response_end)

    def prefill_groups(self, slots, prompts):
        """Prefills each prompt once, in the first of its slots. The other slots get a copy."""
        K = self.config.block_size
        first = {}  # prompt -> slot
        for slot, prompt in zip(slots, prompts):
            if len(prompt) >= K:  # a shorter one has no whole block
                first.setdefault(tuple(prompt), slot)
        self.prefill(list(first.values()), [len(prompt) // K * K for prompt in first])
        others = [(first[key], slot) for slot, key in zip(slots, map(tuple, prompts))
                  if key in first and first[key] != slot]
        if others:
            source, target = to_device(torch.tensor(others), self.device).T
            # As long as the longest prompt: what is too much is overwritten before it is read.
            self.cache.copy(source, target, max(map(len, prompts)) // K * K)

    def prefill(self, slots, lengths, max_tokens=16384):
        """Writes the keys and values of the first `lengths` tokens of slots.

        Prompts of similar length share a forward. Otherwise one long prompt would pad 256 short ones.
        """
        for group in packing.by_length([(length, 1) for length in lengths], max_tokens):
            chosen = to_device(torch.tensor([slots[i] for i in group]), self.device)
            longest = max(lengths[i] for i in group)
            # Shorter ones write some of their masks, too: decoding writes there again.
            position = torch.arange(longest, device=self.device).expand(len(group), -1)
            layout = Layout.clean(position, self.config.block_size, False)
            self.model.states(self.token[chosen, :longest], position, self.cache.filling(chosen, layout))

    def advance(self):
        """A denoising step of every busy slot -> the slots whose sequence is complete."""
        K = self.config.block_size
        lanes = self.lanes
        # All that the device needs to know of a slot. Slot 0 at the third denoising step of its response, the
        # second of the block of positions 8..11, one token a step, seed 7: (8, 3, 1, 7, 1).
        lines = [(lane.start, lane.step, self.decoding.quota(K, lane.step_in_block), lane.seed,
                  lane.step_in_block) for lane in lanes]
        # Slot 1 has just gone on to the block of positions 12..15. The cache still holds the block before it,
        # 8..11, as it was in its last step, with masks. (1, 8): write that block once more, clean.
        commits = [(slot, lane.start - K, 0, 0, 0) for slot, lane in enumerate(lanes)
                   if not lane.is_committed]
        # One table for both, since each copy to the device costs time.
        found = self.denoise(torch.tensor(lines + commits), len(lanes),
                             sum(lane.num_masked for lane in lanes), max(lane.start for lane in lanes) + K)
        ended = []
        for slot, (lane, num_masked, has_eos) in enumerate(zip(lanes, *found.tolist())):  # the one read
            lane.num_masked = num_masked
            lane.step += 1
            lane.step_in_block += 1
            lane.is_committed = True
            if num_masked:
                continue
            # A sequence that has ended needs no commit: nobody will read its cache.
            if has_eos or lane.start + K >= lane.end:
                ended.append(slot)
            else:
                lane.start += K
                lane.step_in_block = 0
                lane.is_committed = False
                lane.num_masked = min(K, lane.end - lane.start)
        return ended

    def denoise(self, inputs, B, num_masked, longest):
        """A denoising step of the slots 0 .. B - 1 -> int64 (2, B): masks left in each block, and has it an
        eos.

        inputs (B + M, 5): a line for each slot, with start, step, quota, seed and step in the block. Then a
        line for each commit, see `states`. num_masked and longest: how many masks these blocks have together,
        and how far they reach. Larger numbers do no harm. So no shape depends on what the device computes.
        """
        inputs = to_device(inputs, self.device)
        start, step, quota, seed, step_in_block = inputs[:B].T  # (B,) each
        commits = inputs[B:, :2].T  # (2, M)
        K = self.config.block_size
        columns = start[:, None] + self.offset  # (B, K) absolute positions of the blocks
        is_masked = self.is_masked[:B].gather(1, columns)  # (B, K)
        h = self.states(columns, commits, longest)  # (B, K, C)
        # The head and the sampler see masks only: at one token a step five of eight positions, with K = 4.
        # They are sorted to the front. Masks 0 1 0 1 | 1 1 1 1 of slots 0 and 1: places 1 3 4 5 6 7.
        places = is_masked.flatten().argsort(descending=True, stable=True)[:num_masked]  # (N,) of B * K
        slot = places // K  # (N,) whose place it is
        draws = rollout.uniform(seed[slot], step[slot], columns.flatten()[places])
        # (N,) each, back to (B, K), 0 where nothing is masked
        to_blocks = lambda x: x.new_zeros(B * K).scatter(0, places, x).view_as(is_masked)
        token, confidence, logp, entropy = map(to_blocks, self.draw(h.flatten(0, 1)[places], draws))
        is_kept = self.decoding.reveal(confidence, entropy, is_masked, quota, token, step_in_block)  # (B, K)
        # torch.where instead of an index list: what is kept is written, all else stays as it is.
        records = ((self.token, token), (self.confidence, confidence), (self.logp, logp),
                   (self.step_map, step[:, None]), (self.is_masked, torch.zeros_like(is_masked)))
        for table, new in records:
            table[:B].scatter_(1, columns, torch.where(is_kept, new, table[:B].gather(1, columns)))
        # An eos ends a sequence only inside the response: a prompt may end with one, and share the block.
        is_eos = torch.isin(self.token[:B].gather(1, columns), self.eos_ids)
        is_revealed = self.step_map[:B].gather(1, columns) > 0
        return torch.stack([(is_masked & ~is_kept).sum(-1), (is_eos & is_revealed).any(-1)])

    def draw(self, h, draws):
        """Draws tokens for masks, by their states (N, C) -> token, confidence, logp, entropy (N,)."""
        decoding = self.decoding
        parts = []
        chunk = max(1, memory.most_logits(self.device) // self.config.vocab_size)  # V = 152k: 220 positions
        # Entropies are one more pass over all logits: for the strategies that look at them.
        with_entropy = flags.declares(decoding.function, "entropy")
        for states, u in zip(h.split(chunk), draws.split(chunk)):
            logits = kernels.masked_logits(states, self.model.head.weight, self.config.mask_id)
            parts.append(rollout.sample(logits, u, decoding.temperature, decoding.top_k, decoding.top_p,
                                        with_entropy))
        return map(torch.cat, zip(*parts))

    def states(self, columns, commits, longest):
        """One forward -> final states (B, K, C) that predict the tokens at `columns` (B, K) of the slots.

        commits (2, M): slots whose block before this one has just become whole, and where that block starts.
        Its clean tokens ride along as a second row of the same slot. Keys and values of all rows are written
        first, then all rows attend. So the commit costs no forward of its own, only K more tokens:

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
        return self.model.states(self.token[rows[:, None], position], position, attend)[:B]

    def full_states(self, columns):
        """The same with full attention: a forward sees the whole canvas, the masks on the right included.

        Canvases of one length go together: nothing is padded, and no mask is needed.

        Approximate caches (Fast-dLLM, arXiv 2505.22618) break the replay law. The first step of a block
        computes the whole canvas and keeps its keys and values. The other steps compute the block (dual), or
        all from the block on (prefix), and see the rest as it was at that first step. P = 9, room for 8
        tokens, K = 4, the second step of the first block: positions 0..16 are computed without a cache, 9..16
        with prefix, 9..12 with dual. Dream begins one earlier, at 8.
        """
        K = self.config.block_size
        kind = self.cache_kind
        shift = int(self.config.shifts_logits)
        groups = {}  # (first position to compute, the one behind the last, end of the canvas) -> slots
        for slot, lane in enumerate(self.lanes):
            is_whole = kind == "none" or lane.step_in_block == 0
            first = 0 if is_whole else lane.start - shift
            stop = min(lane.start + K, lane.end) if kind == "dual" and not is_whole else lane.end
            groups.setdefault((first, stop, lane.end), []).append(slot)
        out = columns.new_empty(*columns.shape, self.config.hidden_size, dtype=self.model.embed.weight.dtype)
        for (first, stop, end), slots in groups.items():
            slots = to_device(torch.tensor(slots), self.device)
            position = torch.arange(first, stop, device=self.device).expand(len(slots), -1)
            attend = lambda layer, q, k, v: attention(q, k, v)
            if kind != "none":
                attend = self.cache.reading(slots, position, torch.full_like(slots, end), end)
            h = self.model.states(self.token[slots, first:stop], position, attend)
            # Dream: the output at i - 1 predicts token i. clamp: the last block may stick out of the canvas;
            # no position there is a mask, so what is read is not used.
            source = (columns[slots] - shift - first).clamp(0, stop - first - 1)
            out[slots] = h.gather(1, source[..., None].expand(-1, -1, h.shape[-1]))
        return out

    def release(self, ended):
        """Empties the slots of the list `ended` -> their (prompt's number, Rollout).

        The last busy slots move into the gaps. Slots 0 and 2 of five have ended: three stay busy, 3 moves
        into 0 and 4 into 2.
        """
        # One copy and one read for all. float64 holds token ids and float32 alike.
        index = to_device(torch.tensor(ended), self.device)
        columns = self.token, self.step_map, self.confidence, self.logp
        read = torch.stack([table[index].double() for table in columns]).tolist()
        done = []
        for slot, *columns in zip(ended, *read):
            lane = self.lanes[slot]
            response = slice(len(lane.prompt), min(lane.start + self.config.block_size, lane.end))
            tokens, *others = (column[response] for column in columns)
            columns = [int(token) for token in tokens], *others
            done.append((lane.number, rollout.record(lane.prompt, lane.seed, columns, self.decoding,
                                                     self.config)))
        n = len(self.lanes) - len(ended)
        gaps = [slot for slot in ended if slot < n]
        movers = [slot for slot in range(n, len(self.lanes)) if slot not in set(ended)]
        if gaps:
            source, target = to_device(torch.tensor([movers, gaps]), self.device)
            for table in self.tables:
                table[target] = table[source]
            self.is_masked[n:len(self.lanes)] = False  # of an idle slot, which may fill up a batch
            if self.cache is not None:
                self.cache.copy(source, target, max(self.lanes[slot].end for slot in movers))
        for gap, mover in zip(gaps, movers):
            self.lanes[gap] = self.lanes[mover]
        del self.lanes[n:]
        return done


@torch.no_grad()
def generate(model, prompts, seeds, decoding, slots=None, cache="none"):
    """Twin of rollout.generate_each: decodes all prompts, some of them together -> list[Rollout], in order.

    slots: how many sequences are decoded together; None is as many as fit. Results do not depend on it.
    cache: one of CACHES. ValueError for an empty prompt, a prompt without a seed, a cache that the attention
    does not know, and logits that are not finite. The same if memory is too small for one slot.
    """
    config = model.config
    prompts = [list(prompt) for prompt, _ in zip(prompts, seeds, strict=True)]
    for prompt in prompts:
        rollout.check_prompt(prompt, decoding, config)
    if cache not in CACHES:
        raise ValueError(f"cache {cache!r} is not possible: it must be one of {', '.join(CACHES)}")
    if cache != "none" and not config.is_full:
        raise ValueError(f"cache {cache!r} is for full attention: the cache of block attention is exact, and "
                         "always used")
    if not prompts:
        return []
    length = max(map(len, prompts)) + decoding.max_new_tokens + config.block_size  # the last block sticks out
    itemsize = model.embed.weight.element_size()
    per_slot = memory.slot_bytes(config, length, itemsize, not config.is_full or cache != "none")
    num_slots = memory.fit_slots(slots, len(prompts), per_slot, config, model.device)
    decoder = Decoder(model, decoding, num_slots, length, cache)
    waiting = list(range(len(prompts)))[::-1]  # numbers of prompts; the last one is taken first
    if config.is_full:  # canvases of one length are computed together
        waiting.sort(key=lambda number: len(prompts[number]))
    rollouts = [None] * len(prompts)
    while waiting or decoder.lanes:
        free = num_slots - len(decoder.lanes)
        taken = [waiting.pop() for _ in range(min(free, len(waiting)))]
        if taken:
            decoder.admit(taken, [prompts[i] for i in taken], [seeds[i] for i in taken])
        ended = decoder.advance()
        if ended:
            for number, r in decoder.release(ended):
                rollouts[number] = r
    # Graphs and the decoder point at each other. Without this line both would outlive the call.
    decoder.denoise = None
    del decoder
    if model.device.type == "cuda":
        torch.cuda.empty_cache()  # now the cache's memory is free: NCCL cannot use what torch keeps
    return rollouts


def to_device(table, device):
    """A tensor on the device. The host does not wait for the copy, see `pinned`."""
    return pinned(table, device).to(device, non_blocking=True)


def pinned(table, device):
    """A tensor of the host in memory from which a GPU copies by itself: the host need not wait."""
    return table.pin_memory() if device.type == "cuda" and not table.is_cuda else table


# ------------------------------------------------------------------------------------------------------------
# Denoising steps as CUDA graphs.


RECORD_AT = 8  # the call at which a graph is recorded: half of all sizes come up fewer times than ten


@functools.cache
def recording_stream():
    """The stream on which graphs are recorded: one for all, as the matrix library keeps memory for each."""
    return torch.cuda.Stream()


class Captured:
    """Decoder.denoise for a GPU: sizes rounded up to a few, a CUDA graph for each.

    A forward of 36 layers is a thousand kernels and more. For few sequences a GPU finishes them faster than
    Python starts them. A graph starts all of them at once, but only for the sizes and addresses it was
    recorded with. So sequences, commits, masks and reach are rounded up. What is too much computes on idle
    slots, on the spare slot, or on positions that are no masks, and changes nothing.

    The first calls of each sizes run as they are, so that kernels are compiled and chosen. Call RECORD_AT is
    recorded, and from then on replayed.

    Graphs live as long as one call of `generate`. A graph reads fixed addresses: with FSDP2 the whole weights
    are gathered to new ones at each RL step. And the cache that it reads would be missing in the update.
    """

    def __init__(self, denoise, num_slots, block_size, length, reach):
        self.denoise = denoise
        self.num_slots = num_slots
        self.block_size = block_size
        self.length = length
        self.reach = reach  # keys are read up to a multiple of it; graphs are few where it is large
        self.calls = Counter()  # by sizes: how often they came up
        self.recorded = {}  # by sizes: the replay
        self.pool = None  # the memory of all graphs

    def __call__(self, inputs, B, num_masked, longest):
        """As denoise."""
        M = len(inputs) - B
        lanes = min(1 << (B - 1).bit_length(), self.num_slots)  # a power of two
        eighth = -(-lanes // 8)
        extra = -(-M // eighth) * eighth  # commits: a multiple of an eighth of the lanes
        quarter = -(-lanes * self.block_size // 4)
        reach = min(-(-longest // self.reach) * self.reach, self.length)
        sizes = (lanes, -(-num_masked // quarter) * quarter, reach)
        idle = inputs.new_zeros(lanes - B, 5)
        spare = inputs.new_zeros(extra - M, 5)
        spare[:, 0] = self.num_slots  # the spare slot, whose first block may be overwritten
        inputs = torch.cat([inputs[:B], idle, inputs[B:], spare])
        key = (extra, *sizes)
        self.calls[key] += 1
        if self.calls[key] < RECORD_AT:
            return self.denoise(inputs, *sizes)[:, :B]
        if key not in self.recorded:
            self.recorded[key] = self.record(inputs, *sizes)
        graph, held, out = self.recorded[key]
        held.copy_(pinned(inputs, held.device), non_blocking=True)
        graph.replay()
        return out[:, :B]

    def record(self, inputs, *sizes):
        """The step of these sizes as a graph -> the graph, the memory that it reads, and that of its result.

        torch.cuda.graph would do the same. But it gives all cached memory back before each recording, and to
        get that memory again takes longer than to record. While torch records, it cannot take cached memory
        back. So this is done only where less than an eighth of the GPU's memory is free.
        """
        free, total = torch.cuda.mem_get_info()
        if free < total / 8:
            torch.cuda.empty_cache()
        held = inputs.cuda()
        graph = torch.cuda.CUDAGraph()
        # One pool for all: no two replay at once, and what one leaves is read before the next.
        self.pool = self.pool or torch.cuda.graph_pool_handle()
        with torch.cuda.stream(recording_stream()):  # nothing is computed here, so no stream has to wait
            graph.capture_begin(pool=self.pool, capture_error_mode="thread_local")
            try:
                out = self.denoise(held, *sizes)
            finally:
                graph.capture_end()
        return graph, held, out


# ------------------------------------------------------------------------------------------------------------
# All twins together.


def attend(layout):
    """Twin of model.attend_by_rule: the mask in the form that suits the device and the length."""
    B, T = layout.block.shape
    is_cuda = layout.block.is_cuda
    if is_cuda and B == 1 and T % 128 == 0 and not kernels.IS_EAGER:  # packed rows, which have few lengths
        mask = kernels.flex_mask(may_attend, layout)
    elif T > 512 and (kernels.IS_EAGER or not is_cuda):
        mask = kernels.tiles(dense_mask(layout))
    else:
        mask = dense_mask(layout)
    return lambda layer, q, k, v: kernels.masked_attention(q, k, v, mask)


def logprobs(model, states, tokens, temperature=1.0):
    """Twin of model.token_logprobs."""
    max_logits = memory.most_logits(states.device, is_training=True)
    return kernels.chunked_logprobs(
        states, model.head.weight, tokens, model.config.mask_id, temperature or 1.0, max_logits)


def fast(device, max_tokens=4096, slots=None, cache="none"):
    """All twins, as a rollout.Compute. On a GPU rows are packed: FlexAttention skips what it may not see."""
    return rollout.Compute(functools.partial(generate, slots=slots, cache=cache), attend, logprobs,
                           is_packed=device.type == "cuda", max_tokens=max_tokens)


def compile_small_functions(model):
    """On a GPU, makes one kernel of each chain of small operations: rotary embedding, SwiGLU."""
    if model.device.type == "cuda" and not kernels.IS_EAGER:
        for module in model.modules():
            if isinstance(module, (Rotation, SwiGLU)):
                module.compile(dynamic=True)
