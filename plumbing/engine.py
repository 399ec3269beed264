"""plumbing/engine.py - twin of rollout.generate: the same rollouts, for many prompts at once, and faster.

It makes the same draws, tokens and step maps, and tests compare it with the definition. It differs in this:
  - Many sequences are decoded together. One that has ended makes room for the next prompt.
  - The definition computes the clean keys and values of a finished block by a forward of their own. Here they
    are computed in the forward of the sequence's next denoising step. This is called a commit.
  - Responses to one prompt that begin together share its prefill: keys and values of its whole blocks.
  - The host (CPU) waits for the device once per denoising step, and once more when sequences end. With block
    attention on a GPU, a CUDA graph starts all kernels of a step.
  - For full attention there are two approximate caches, for evaluation only.

A slot is the room for one sequence in the tables and in the cache. It is busy while it holds a sequence.
`fast` at the end gives all twins together, as a rollout.Compute.
"""

import contextlib
import functools
from collections import Counter
from dataclasses import dataclass

import torch

import rollout
from model import Layout, Rotation, SwiGLU, dense_mask, may_attend
from plumbing import flags, kernels, memory, packing

CACHES = ("none", "prefix", "dual")  # of full attention, see Decoder.full_states


class SlotCache:
    """Twin of model.KVCache for many sequences: (slots, length, H_kv, D) of keys and of values per layer.

    A forward first writes the keys and values of its tokens at their positions. Then it reads everything up
    to the end of its own block (with full attention, the whole text). So a block lies in the cache while it
    still holds masks. That is harmless, since every forward overwrites its block before it reads. Once a
    block is clean, its keys and values must be written again before a later block reads them: see
    Decoder.states.
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
        """An `attend` for prefill: each row follows the rule, and row b is stored in slot slots[b]."""
        mask = kernels.as_added(dense_mask(layout), self.keys.dtype)

        def fill(layer, q, k, v):
            self.write(layer, k, v, slots, layout.position)
            return kernels.masked_attention(q, k, v, mask)
        return fill

    def reading(self, slots, position, end, longest, num_in_place=0):
        """An `attend` for decoding: row b is the tokens at position[b] (T,) of the sequence in slots[b].

        They see all that the slot holds before end[b] (B,). Two rows may be blocks of one slot: all rows
        write before any row reads. longest: an int that no end exceeds. The first rows may be the slots 0, 1,
        2, ... in this order, whose keys can be read without a copy. num_in_place is the number of such rows.
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
    """What the host knows of a busy slot: its prompt, and how far decoding has come."""

    number: int  # which of the prompts given to `generate`
    prompt: list
    seed: int
    start: int  # absolute position where the block being decoded begins
    end: int  # where decoding stops, at the latest
    num_masked: int  # how many masks the block still has
    step: int = 1  # the denoising step that comes next, counted over the whole response
    step_in_block: int = 0  # the same, counted from 0 in its block
    is_committed: bool = True  # whether the cache holds the clean tokens of all blocks before this one


class Decoder:
    """The sequences that are being decoded. Tables (slots + 1, length) have a line for each slot.

    A line has a column for each position. The last line is of a spare slot, see `__init__`.

    The busy slots are 0 .. n - 1, and lanes[slot] is what the host knows of each. When a sequence ends, the
    sequence in a later slot moves into the slot that has become free. So a batch is a slice of every table,
    and need not be copied.
    """

    def __init__(self, model, decoding, num_slots, length, cache="none"):
        self.model = model
        self.config = model.config
        self.decoding = decoding
        self.device = model.device
        self.cache_kind = cache
        K = self.config.block_size
        # CUDA graphs are recorded for a few sizes of batch only, so a batch is filled up to such a size. If
        # sequences are missing, idle slots are computed in their place. If commits are missing, the spare
        # slot is computed in their place. It is the last line of every table.
        table = (num_slots + 1, length)
        self.token = torch.full(table, self.config.mask_id, device=self.device)
        self.is_masked = torch.zeros(table, dtype=torch.bool, device=self.device)
        self.step_map = torch.zeros(table, dtype=torch.int64, device=self.device)  # 0: mask or prompt
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
        """Writes prompts and masks into the next free slots, and computes keys and values of whole blocks."""
        K = self.config.block_size
        slots = range(len(self.lanes), len(self.lanes) + len(prompts))
        ends = []
        for number, prompt, seed in zip(numbers, prompts, seeds):
            P = len(prompt)
            start, end = rollout.decoded_span(P, self.decoding.max_new_tokens, self.config)
            self.lanes.append(Lane(number, prompt, seed, start, end, min(start + K, end) - P))
            ends.append((P, end))
        lines = slice(slots.start, slots.stop)  # of the tables
        longest = max(map(len, prompts))
        padded = [prompt + [self.config.mask_id] * (longest - len(prompt)) for prompt in prompts]
        for table in self.tables:
            table[lines] = 0
        self.token[lines, longest:] = self.config.mask_id
        self.token[lines, :longest] = to_device(torch.tensor(padded), self.device)
        position = torch.arange(self.token.shape[1], device=self.device)
        prompt_end, response_end = to_device(torch.tensor(ends), self.device).T[..., None]  # (n, 1) each
        self.is_masked[lines] = (position >= prompt_end) & (position < response_end)
        if not self.config.is_full:
            self.prefill_groups(slots, prompts)

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
            # One call makes all copies, so each is as long as the whole blocks of the longest prompt. What it
            # copies beyond a shorter prompt is overwritten by decoding before it is read.
            self.cache.copy(source, target, max(map(len, prompts)) // K * K)

    def prefill(self, slots, lengths, max_tokens=16384):
        """Computes the keys and values of the first tokens of slots; lengths: how many, for each slot.

        Prompts of similar length share a forward. Otherwise 256 short prompts might be padded to a long one.
        """
        for group in packing.by_length([(length, 1) for length in lengths], max_tokens):
            chosen = to_device(torch.tensor([slots[i] for i in group]), self.device)
            longest = max(lengths[i] for i in group)
            # A shorter prompt also stores keys of tokens behind its whole blocks. Decoding overwrites them
            # before it reads.
            position = torch.arange(longest, device=self.device).expand(len(group), -1)
            layout = Layout.clean(position, self.config.block_size, False)
            self.model.states(self.token[chosen, :longest], position, self.cache.filling(chosen, layout))

    def advance(self):
        """Makes one denoising step in every busy slot -> the slots whose sequence has ended."""
        K = self.config.block_size
        lanes = self.lanes
        # All that the device needs to know of a slot: start, step, quota, seed, step in the block. Say that
        # slot 0 decodes the block that starts at position 8. It is at denoising step 3 of the response, and
        # at step 1 (counted from 0) of this block. It is to reveal 1 token, and has seed 7. Then its line is
        # (8, 3, 1, 7, 1).
        lines = [(lane.start, lane.step, self.decoding.quota(K, lane.step_in_block), lane.seed,
                  lane.step_in_block) for lane in lanes]
        # Say that slot 1 has just begun the block of positions 12..15. The cache still holds the block 8..11
        # as it was in its last step, with masks. The commit (1, 8) writes that block once more, clean.
        commits = [(slot, lane.start - K, 0, 0, 0) for slot, lane in enumerate(lanes)
                   if not lane.is_committed]
        # One table for both, since each copy to the device costs time.
        found = self.denoise(torch.tensor(lines + commits), len(lanes),
                             sum(lane.num_masked for lane in lanes), max(lane.start for lane in lanes) + K)
        ended = []
        # In a denoising step the host waits for the device only here, at tolist. `release` waits once more.
        for slot, (lane, num_masked, has_eos) in enumerate(zip(lanes, *found.tolist())):
            lane.num_masked = num_masked
            lane.step += 1
            lane.step_in_block += 1
            lane.is_committed = True
            if num_masked:
                continue
            # A sequence that has ended needs no commit, since nobody will read its cache.
            if has_eos or lane.start + K >= lane.end:
                ended.append(slot)
            else:
                lane.start += K
                lane.step_in_block = 0
                lane.is_committed = False
                lane.num_masked = min(K, lane.end - lane.start)
        return ended

    def denoise(self, inputs, B, num_masked, longest):
        """One denoising step of the slots 0 .. B - 1 -> int64 (2, B), read by `advance`.

        The first line says how many masks each block still has, the second whether it holds an eos.

        inputs, for B slots and M commits: (B + M, 5). First comes a line for each slot, with start, step,
        quota, seed and step in the block. Then a line for each commit, see `states`. num_masked: how many
        masks these blocks have together. longest: the largest end of these blocks. Both are numbers of the
        host, so no shape depends on what the device computes. They may be too large, since `Captured` rounds
        them up.
        """
        inputs = to_device(inputs, self.device)
        start, step, quota, seed, step_in_block = inputs[:B].T  # (B,) each
        commits = inputs[B:, :2].T  # (2, M)
        K = self.config.block_size
        columns = start[:, None] + self.offset  # (B, K) absolute positions of the blocks
        is_masked = self.is_masked[:B].gather(1, columns)  # (B, K)
        h = self.states(columns, commits, longest)  # (B, K, C)
        # Only masks go through the head and the sampler. With K = 4 and one token a step, a block has 4, 3, 2
        # and then 1 of them, so 2.5 of its 4 positions on average. The sort brings them to the front: if
        # is_masked is 0 1 0 1 for slot 0 and 1 1 1 1 for slot 1, places are 1 3 4 5 6 7.
        places = is_masked.flatten().argsort(descending=True, stable=True)[:num_masked]  # (N,) of B * K
        slot = places // K  # (N,) the slot of each mask
        draws = rollout.uniform(seed[slot], step[slot], columns.flatten()[places])
        # Puts the computed numbers (N,) back to their places in the blocks (B, K). All else is 0. If N was
        # rounded up, some of the places are no masks: `reveal` ignores these.
        to_blocks = lambda x: x.new_zeros(B * K).scatter(0, places, x).view_as(is_masked)
        token, confidence, logp, entropy = map(to_blocks, self.draw(h.flatten(0, 1)[places], draws))
        is_kept = self.decoding.reveal(confidence, entropy, is_masked, quota, token, step_in_block)  # (B, K)
        # Where a token is kept, the new number is written. Elsewhere the old number is written again. To
        # write at the kept places only would need a list of indices. The host would have to wait for its
        # length.
        records = ((self.token, token), (self.confidence, confidence), (self.logp, logp),
                   (self.step_map, step[:, None]), (self.is_masked, torch.zeros_like(is_masked)))
        for table, new in records:
            table[:B].scatter_(1, columns, torch.where(is_kept, new, table[:B].gather(1, columns)))
        # Only an eos of the response ends a sequence. A prompt may end with an eos, in the same block.
        is_eos = torch.isin(self.token[:B].gather(1, columns), self.eos_ids)
        is_revealed = self.step_map[:B].gather(1, columns) > 0
        return torch.stack([(is_masked & ~is_kept).sum(-1), (is_eos & is_revealed).any(-1)])

    def draw(self, h, draws):
        """Draws tokens for masks, from their states (N, C) -> token, confidence, logp, entropy, (N,) each."""
        decoding = self.decoding
        parts = []
        # This many masks go through the head at a time. On a CPU with V = 152k it is 220.
        chunk = max(1, memory.most_logits(self.device) // self.config.vocab_size)
        # Entropies take one more pass over all logits. They are only computed if the strategy declares them.
        with_entropy = flags.declares(decoding.function, "entropy")
        for states, u in zip(h.split(chunk), draws.split(chunk)):
            logits = kernels.masked_logits(states, self.model.head.weight, self.config.mask_id)
            parts.append(rollout.sample(logits, u, decoding.temperature, decoding.top_k, decoding.top_p,
                                        with_entropy))
        return map(torch.cat, zip(*parts))

    def states(self, columns, commits, longest):
        """One forward -> final states (B, K, C) that predict the tokens at `columns` (B, K) of the slots.

        commits (2, M): slots whose previous block has just become clean, and where that block starts. The
        clean tokens of that block are a second row of the same slot. Keys and values of all rows are written
        first, and then all rows attend. So a commit needs no forward of its own, only K more tokens:

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
        """The same with full attention: a forward sees the whole text, prompt and all response positions.

        Texts of equal length share a forward. So nothing is padded, and no attention mask is needed.

        Approximate caches (Fast-dLLM, arXiv 2505.22618) break the replay law. The first step of a block
        computes the whole text and keeps its keys and values. The other steps compute only the block
        (dual), or all from the block on (prefix). They see the rest as it was at that first step. Take P = 9,
        8 new tokens and K = 4. The second step of the first block computes positions 0..16 without a cache,
        9..16 with prefix, and 9..12 with dual. For Dream the last two begin one position earlier, at 8.
        """
        K = self.config.block_size
        kind = self.cache_kind
        shift = int(self.config.shifts_logits)
        groups = {}  # (first position to compute, the one behind the last, end of the text) -> slots
        for slot, lane in enumerate(self.lanes):
            is_whole = kind == "none" or lane.step_in_block == 0
            first = 0 if is_whole else lane.start - shift
            stop = min(lane.start + K, lane.end) if kind == "dual" and not is_whole else lane.end
            groups.setdefault((first, stop, lane.end), []).append(slot)
        out = columns.new_empty(*columns.shape, self.config.hidden_size, dtype=self.model.embed.weight.dtype)
        for (first, stop, end), slots in groups.items():
            slots = to_device(torch.tensor(slots), self.device)
            position = torch.arange(first, stop, device=self.device).expand(len(slots), -1)
            attend = lambda layer, q, k, v: kernels.masked_attention(q, k, v, None)
            if kind != "none":
                attend = self.cache.reading(slots, position, torch.full_like(slots, end), end)
            h = self.model.states(self.token[slots, first:stop], position, attend)
            # In Dream the output at i - 1 predicts token i. The last block may reach beyond the text, where
            # the clamp takes another output. No position there is a mask, so that output is not used.
            source = (columns[slots] - shift - first).clamp(0, stop - first - 1)
            out[slots] = h.gather(1, source[..., None].expand(-1, -1, h.shape[-1]))
        return out

    def release(self, ended):
        """Frees the slots in the list `ended` -> for each, the number of its prompt and its Rollout.

        The last busy slots move into the free ones. If slots 0 and 2 of five have ended, three stay busy:
        slot 3 moves into 0, and slot 4 into 2.
        """
        # What a record needs comes to the host in one copy. float64 holds token ids and float32 numbers
        # exactly.
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
            # `Captured` may compute an idle slot. Masks in it would take the places of real masks.
            self.is_masked[n:len(self.lanes)] = False
            if self.cache is not None:
                self.cache.copy(source, target, max(self.lanes[slot].end for slot in movers))
        for gap, mover in zip(gaps, movers):
            self.lanes[gap] = self.lanes[mover]
        del self.lanes[n:]
        return done


@torch.no_grad()
def generate(model, prompts, seeds, decoding, slots=None, cache="none"):
    """Twin of rollout.generate_each: decodes all prompts, some of them together -> list[Rollout], in order.

    slots: how many sequences are decoded together; None is as many as fit. Results depend on it only by
    rounding. cache: one of CACHES. ValueError for an empty prompt, a prompt without a seed, a cache that does
    not fit the attention, logits that are not finite, and too little memory for one slot.
    """
    config = model.config
    prompts = [list(prompt) for prompt, _ in zip(prompts, seeds, strict=True)]
    for prompt in prompts:
        rollout.check_prompt(prompt, decoding, config)
    if cache not in CACHES:
        raise ValueError(f"cache {cache!r} is not possible: it must be one of {', '.join(CACHES)}")
    if cache != "none" and not config.is_full:
        raise ValueError(f"cache {cache!r} is for full attention only. The cache of block attention is exact "
                         "and always used: leave out --cache")
    if not prompts:
        return []
    length = max(map(len, prompts)) + decoding.max_new_tokens + config.block_size  # the last block is whole
    itemsize = model.embed.weight.element_size()
    per_slot = memory.slot_bytes(config, length, itemsize, not config.is_full or cache != "none")
    num_slots = memory.fit_slots(slots, len(prompts), per_slot, config, model.device)
    decoder = Decoder(model, decoding, num_slots, length, cache)
    waiting = list(range(len(prompts)))[::-1]  # numbers of prompts; `pop` takes the last one
    if config.is_full:  # texts of one length are computed together
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
    # The decoder and its CUDA graphs refer to each other. Without this line Python would keep both longer.
    decoder.denoise = None
    return rollouts


def to_device(table, device):
    """Copies a tensor to the device. The host does not wait for the copy, see `pinned`."""
    return pinned(table, device).to(device, non_blocking=True)


def pinned(table, device):
    """Moves a tensor of the host to memory from which a GPU copies by itself. The host need not wait."""
    return table.pin_memory() if device.type == "cuda" and not table.is_cuda else table


# ------------------------------------------------------------------------------------------------------------
# Denoising steps as CUDA graphs.


RECORD_AT = 8  # the call at which a graph is recorded. For sizes that come up seldom, recording would not pay


@functools.cache
def recording_stream():
    """The stream on which all graphs are recorded. There is only one, since cuBLAS takes memory for each."""
    return torch.cuda.Stream()


class Captured:
    """Twin of Decoder.denoise for a GPU: sizes are rounded up to a few, and each gets a CUDA graph.

    A forward of 36 layers is more than a thousand kernels. For few sequences a GPU finishes them faster than
    Python starts them. A graph starts all of them at once, but only for the sizes and addresses with which it
    was recorded. So the numbers of sequences, commits, masks and keys are rounded up. The surplus is computed
    on idle slots, on the spare slot, or at positions that are no masks. It changes nothing.

    The first calls of a size run without a graph, so that kernels are compiled and chosen. Call number
    RECORD_AT is recorded, and from then on the graph runs.

    Graphs are kept for one call of `generate` only. A graph reads fixed addresses, but FSDP2 gathers the
    whole weights to new addresses in each RL step. A graph that is kept would also keep the KV cache, whose
    memory the update needs.
    """

    def __init__(self, denoise, num_slots, block_size, length, reach):
        self.denoise = denoise
        self.num_slots = num_slots
        self.block_size = block_size
        self.length = length
        self.reach = reach  # keys are read up to a multiple of it. A larger one makes fewer graphs
        self.calls = Counter()  # sizes -> how often they came up
        self.recorded = {}  # sizes -> what `record` gives
        self.pool = None  # the memory of all graphs

    def __call__(self, inputs, B, num_masked, longest):
        """The same as Decoder.denoise."""
        M = len(inputs) - B
        lanes = min(1 << (B - 1).bit_length(), self.num_slots)  # a power of two, or all
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
        """Records a step of these sizes -> the graph, the tensor that it reads, and the one that it writes.

        torch.cuda.graph would do the same, but it first frees all memory that torch keeps. To get that memory
        again takes longer than to record. While torch records, it cannot free memory. So here it is freed
        beforehand, and only if less than 4 GiB are free.
        """
        if torch.cuda.mem_get_info()[0] < 2**32:
            torch.cuda.empty_cache()
        held = inputs.cuda()
        graph = torch.cuda.CUDAGraph()
        # All graphs share one pool of memory. They run one at a time, and the result of one is read before
        # the next runs.
        self.pool = self.pool or torch.cuda.graph_pool_handle()
        with torch.cuda.stream(recording_stream()):  # recording computes nothing, so no stream has to wait
            graph.capture_begin(pool=self.pool, capture_error_mode="thread_local")
            try:
                out = self.denoise(held, *sizes)
            except BaseException as error:
                with contextlib.suppress(RuntimeError):  # it would only say that recording has failed
                    graph.capture_end()
                if not isinstance(error, RuntimeError) or isinstance(error, torch.OutOfMemoryError):
                    raise
                raise RuntimeError(f"a denoising step could not be recorded as a CUDA graph ({error}): see "
                                   "whether your --strategy makes the host wait, or set "
                                   "TORCH_COMPILE_DISABLE=1, which decodes without graphs") from error
            graph.capture_end()
        return graph, held, out


# ------------------------------------------------------------------------------------------------------------
# All twins together.


def attend(layout):
    """Twin of model.attend_by_rule. The form of the mask depends on the device and the length of the rows."""
    B, T = layout.block.shape
    is_cuda = layout.block.is_cuda
    if is_cuda and B == 1 and T % 128 == 0 and not kernels.IS_EAGER:
        # These rows are packed. They have only a few lengths, so few kernels are compiled.
        mask = kernels.flex_mask(may_attend, layout)
    elif T > 512 and (kernels.IS_EAGER or not is_cuda):  # in long rows, most tokens do not see each other
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
    """All twins, as a rollout.Compute.

    On a GPU rows are packed. This costs nothing, because FlexAttention skips the tiles between different
    rows.
    """
    return rollout.Compute(functools.partial(generate, slots=slots, cache=cache), attend, logprobs,
                           is_packed=device.type == "cuda", max_tokens=max_tokens)


def compile_small_functions(model):
    """On a GPU, compiles rotary embedding and SwiGLU into one kernel each."""
    if model.device.type == "cuda" and not kernels.IS_EAGER:
        for module in model.modules():
            if isinstance(module, (Rotation, SwiGLU)):
                module.compile(dynamic=True)
