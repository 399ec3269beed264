"""plumbing/kernels.py - twins of attention and of the log-probability: the same numbers, faster.

This file imports nothing of the project. plumbing/engine.py uses its functions in place of the definitions.
  masked_attention   twin of model.attention, with masks in three forms
  CacheReader        twin of model.KVCache.read for many sequences; it avoids copies of keys where it can
  chunked_logprobs   twin of model.token_logprobs; it never holds all logits at once
"""

import functools
import math
import os

import torch
import torch.nn.functional as F
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

try:  # optional: it needs CUDA and a compiler, and makes decoding faster
    from flash_attn import flash_attn_with_kvcache
    flash_attn_error = None
except ImportError as error:  # not installed, or broken
    flash_attn_with_kvcache = None
    flash_attn_error = error

# On Hopper GPUs torch prefers cuDNN's attention if there is a mask. cuDNN makes a plan for every new shape,
# which is reported to take half a second. Our shapes change with every batch of prompts.
torch.backends.cuda.enable_cudnn_sdp(False)
# Parts of a sum over many numbers are added in float32, also in bfloat16. So decoding and training, whose
# products are split into different parts, agree better.
torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False

# torch's own switch against compiled kernels, for machines on which one fails. It also stops our CUDA graphs.
IS_EAGER = os.environ.get("TORCH_COMPILE_DISABLE") == "1"
compile_once = functools.cache(torch.compile)


def compiled(function):
    """Compiles a function with torch.compile, anew for each length of row.

    There are few lengths, but more than the number of compilations that torch allows by default. So the limit
    is raised to 128. Beyond it torch would silently run the function uncompiled. Uncompiled FlexAttention
    holds the scores of all pairs of tokens of a row, which do not fit into memory. So going beyond the limit
    is made an error. The limit is set at every call, because each thread has its own, and a backward pass
    runs in another thread.
    """
    config = torch._dynamo.config
    if config.recompile_limit != 128:
        config.recompile_limit = 128
        config.fail_on_recompile_limit_hit = True
    return compile_once(function, dynamic=False)


# ------------------------------------------------------------------------------------------------------------
# Attention under a mask.


def tiles(mask, size=128):
    """Cuts a dense mask (B, 1, T, T) into tiles of `size` queries, each with the keys that any of them sees.

    -> list of (queries: slice, keys int64 (n,), mask bool (B, 1, size, n)). A view sees itself, and the clean
    text before its block: a small part of a long row. Scores of other keys are not computed.
    """
    found = []
    for start in range(0, mask.shape[2], size):
        queries = slice(start, start + size)
        part = mask[:, :, queries]  # (B, 1, size, T)
        keys = part.any(dim=(0, 1, 2)).nonzero()[:, 0]  # (n,)
        found.append((queries, keys, part[..., keys]))
    return found


def flex_mask(rule, layout):
    """A mask for FlexAttention. It stores which tiles of 128 x 128 are needed.

    A tile of 128 queries and 128 keys is needed if one of the queries may see one of the keys.

    rule: a function of two layouts (named tuples of numbers) that gives bool. layout: such a tuple of (B, T)
    tensors. On a GPU the making of the mask is compiled, too. Uncompiled it would need gigabytes for a row of
    16,384 tokens.
    """
    # The rule does not read the first field of a layout, the position. `at` fills it with the place in the
    # row, just to have a number there. The others get 32 bits, which takes fewer registers of the kernel.
    _, *numbers = (number.int() for number in layout)
    at = lambda row, place: type(layout)(place, *(number[row, place] for number in numbers))
    may_see = lambda row, head, i, j: rule(at(row, i), at(row, j))
    create = compiled(create_block_mask) if layout.block.is_cuda else create_block_mask
    B, T = layout.block.shape
    with torch.no_grad():
        return create(may_see, B, None, T, T, device=layout.block.device)


def masked_attention(q, k, v, mask):
    """Softmax attention: q (B, H, T, D) -> the same. mask: a dense mask, a result of `tiles`
    or of `flex_mask`, or None.
    """
    has_groups = q.shape[1] != k.shape[1]  # several heads share a key
    if isinstance(mask, BlockMask):
        flex = compiled(flex_attention) if q.is_cuda else flex_attention
        # In float32 the tiles that torch chooses need more shared memory than smaller GPUs have.
        tile = dict(BLOCK_M=32, BLOCK_N=32) if q.dtype == torch.float32 else None
        return flex(q, k, v, block_mask=mask, enable_gqa=has_groups, kernel_options=tile)
    if isinstance(mask, list):
        parts = [masked_attention(q[:, :, queries], k[:, :, keys], v[:, :, keys], part)
                 for queries, keys, part in mask]
        return torch.cat(parts, dim=2)
    if q.is_cuda and has_groups and (mask is not None or q.dtype == torch.float32):
        # With a mask or in float32, CUDA's fast kernels need a key for every head of the queries.
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
        has_groups = False
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=has_groups)


def as_added(mask, dtype):
    """Turns a dense bool mask into what CUDA's kernels take: numbers to add to the scores, 0 or -inf.

    The kernels would otherwise convert the bools again in every layer. Lines of the mask must lie a multiple
    of eight numbers apart in memory. On a CPU the mask stays as it is.
    """
    if not mask.is_cuda:
        return mask
    width = mask.shape[-1]
    padded = F.pad(mask, (0, -width % 8))
    return torch.zeros_like(padded, dtype=dtype).masked_fill(~padded, -math.inf)[..., :width]


def uses_flash(q):
    """Whether flash-attn is installed, and can compute tensors of the kind of q."""
    return flash_attn_with_kvcache is not None and q.is_cuda and q.dtype in (torch.float16, torch.bfloat16)


class CacheReader:
    """Attention of rows over a cache of many sequences: made once per forward, and called by every layer.

    A slot holds the keys of one sequence. A row is what a forward computes of a slot: one block, or with full
    attention often more. Row b sees the first end[b] tokens of slot slots[b], and no end exceeds `longest`.
    The first num_in_place rows are the slots 0, 1, 2, ..., whose keys are read in place. With block attention
    the rows after them are commits: blocks that have just become clean, and are computed once more (see
    plumbing/engine.py). With full attention num_in_place is 0, and no row is read in place.

    How the keys are reached:
      1. Where flash-attn is installed, and numbers have 16 bits, it computes all rows. It finds the keys of
         each by itself. Without it, the first num_in_place rows are read in place. For the other rows:
      2. On a GPU without flash-attn, a commit is computed together with the row of its slot, since both read
         the same keys. Both are put into one row of attention, here called a line. Their queries alternate:
         one of the slot's block, then one of its commit. A slot that commits nothing gets zeros as queries of
         a commit, and their results are dropped.
      3. Otherwise the keys of their slots are copied.
    The second way, drawn:

        rows:     slot 0 (end 12)      slot 1 (end 16)      commit of slot 1 (end 12)
        become:   line 0   first query of slot 0, zeros, second query of slot 0, zeros, ...
                  line 1   first query of slot 1, first query of its commit, second query of slot 1, ...
    """

    def __init__(self, slots, end, longest, num_in_place, num_queries, cache):
        """num_queries: how many queries of a row read one head of keys, see `__call__`. cache: all keys."""
        self.slots = slots
        self.longest = longest
        self.num_in_place = num_in_place
        self.has_pairs = cache.is_cuda and num_in_place > 0
        if uses_flash(cache):
            self.flash = dict(cache_seqlens=end.int(), cache_batch_idx=slots.int(), causal=False)
            return
        if self.has_pairs:
            # engine.Captured adds dummy commits of the spare slot, whose number is beyond all lines. `clamp`
            # sends them to an extra line at the end, which is dropped before attention is computed.
            self.line = slots[num_in_place:].clamp(max=num_in_place)  # (M,) of the commits
            pairs = F.pad(end[:num_in_place, None].expand(-1, 2), (0, 0, 0, 1))  # (lines + 1, 2)
            pairs[self.line, 1] = end[num_in_place:]
            # (lines, 2 num_queries): the end of the slot, that of its commit, and so on
            end = pairs[:num_in_place].repeat(1, num_queries)
        is_seen = torch.arange(longest, device=end.device) < end[..., None]
        # (rows, 1, 1, longest), or (lines, 1, 2 num_queries, longest)
        self.mask = as_added(is_seen.view(len(end), 1, -1, longest), cache.dtype)

    def __call__(self, q, keys, values):
        """q (B, H, K, D); keys, values (slots, length, H_kv, D) of one layer -> (B, H, K, D)."""
        # All K queries of a block see the same keys, and H / H_kv heads share each key. So these heads can
        # count as more queries, and no key is copied for them. With H = 4, H_kv = 2 and K = 4:
        # (B, 4, 4, D) -> (B, 2, 8, D).
        folded = q.reshape(len(q), keys.shape[2], -1, q.shape[-1])
        if uses_flash(q):  # flash-attn folds heads by itself only if a row has a single query
            out = flash_attn_with_kvcache(folded.transpose(1, 2), keys, values, **self.flash)
            return out.transpose(1, 2).reshape(q.shape)
        in_place = slice(0, self.num_in_place)
        if self.has_pairs:
            return self.read_pairs(folded, keys[in_place], values[in_place]).reshape(q.shape)
        others = slice(self.num_in_place, len(q))
        out = []
        for rows, where in ((in_place, in_place), (others, self.slots[others])):
            if len(self.slots[rows]):
                out.append(F.scaled_dot_product_attention(
                    folded[rows], keys[where, :self.longest].transpose(1, 2),
                    values[where, :self.longest].transpose(1, 2), attn_mask=self.mask[rows]))
        return torch.cat(out).reshape(q.shape)

    def read_pairs(self, folded, keys, values):
        """The second way. folded (rows, H_kv, Q, D): queries of rows and commits -> the same shape."""
        B = self.num_in_place
        _, heads, number, D = folded.shape
        pairs = folded.new_zeros(B + 1, heads, number, 2, D)
        pairs[:B, :, :, 0] = folded[:B]
        pairs[self.line, :, :, 1] = folded[B:]
        out = F.scaled_dot_product_attention(
            pairs[:B].flatten(2, 3), keys[:, :self.longest].transpose(1, 2),
            values[:, :self.longest].transpose(1, 2), attn_mask=self.mask)
        own, second = out.view(B, heads, number, 2, D).unbind(3)
        # Dummy commits read the last line, and nobody uses what they get.
        return torch.cat([own, second[self.line.clamp(max=B - 1)]])


# ------------------------------------------------------------------------------------------------------------
# Log-probabilities.


def float32_product(a, b):
    """a @ b for two matrices. The result is float32, also if the factors are bfloat16."""
    if a.dtype == torch.float32:
        return a @ b
    return torch.mm(a, b, out_dtype=torch.float32) if a.is_cuda else a.float() @ b.float()


def masked_logits(states, weight, mask_id):
    """Float32 logits (N, V) of states (N, C) and a head (V, C), with the mask token ruled out."""
    logits = float32_product(states, weight.T)
    logits[:, mask_id] = -math.inf
    return logits


class ChunkedLogprobs(torch.autograd.Function):
    """Log-probability and entropy, with a backward pass of their own.

    Logits exist for one chunk of positions at a time. The backward pass computes them again. Let z be the
    logits / T, p their softmax, and H the entropy of p. Then the two gradients are
        d logp / d z_v = [v is the token] - p_v          d H / d z_v = -p_v (log p_v + H)
    Of all tensors with V in their shape, only the head's gradient (V, C) is kept from chunk to chunk. It is a
    sum over chunks.
    """

    @staticmethod
    def forward(ctx, states, weight, tokens, mask_id, temperature, chunk):
        """states (N, C), weight (V, C), tokens (N,) -> log-probability and entropy, float32 (N,)."""
        logp, entropy = states.new_empty(2, len(states), dtype=torch.float32)
        for start in range(0, len(states), chunk):
            part = slice(start, start + chunk)
            logits = masked_logits(states[part], weight, mask_id).div_(temperature)  # (chunk, V)
            total = logits.logsumexp(-1, keepdim=True)  # (chunk, 1)
            logp[part] = (logits.gather(-1, tokens[part, None]) - total)[:, 0]
            entropy[part] = torch.special.entr(logits.sub_(total).exp_()).sum(-1)
        ctx.save_for_backward(states, weight, tokens, entropy)
        ctx.settings = mask_id, temperature, chunk
        ctx.set_materialize_grads(False)  # if no loss uses the entropy, its gradient is None
        return logp, entropy

    @staticmethod
    def backward(ctx, grad_logp, grad_entropy):
        """Gradients of states and, unless the head is frozen, of its weight."""
        states, weight, tokens, entropy = ctx.saved_tensors
        mask_id, temperature, chunk = ctx.settings
        if grad_logp is None:
            grad_logp = torch.zeros_like(entropy)
        grad_states = torch.zeros_like(states)
        needs_weight = ctx.needs_input_grad[1]
        # The sum is float32. In bfloat16 the last chunks would be too small to change it.
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if needs_weight else None
        for start in range(0, len(states), chunk):
            part = slice(start, start + chunk)
            logits = masked_logits(states[part], weight, mask_id).div_(temperature)
            p = logits.softmax(-1)  # (chunk, V)
            of_token = grad_logp[part, None] / temperature  # (chunk, 1)
            d = p * -of_token
            d.scatter_add_(-1, tokens[part, None], of_token)
            if grad_entropy is not None:
                surprise = logits.log_softmax(-1).masked_fill(p == 0, 0) + entropy[part, None]
                d -= grad_entropy[part, None] / temperature * p * surprise
            d = d.to(states.dtype)  # d loss / d logits
            grad_states[part] = d @ weight
            if needs_weight:
                grad_weight += float32_product(d.T, states[part])
        return grad_states, grad_weight.to(weight.dtype) if needs_weight else None, None, None, None, None


def chunked_logprobs(states, weight, tokens, mask_id, temperature, max_logits):
    """Log-probabilities of tokens (N,), and entropies, at states (N, C) with the head (V, C): float32 (N,).

    At most max_logits logits exist at a time. Each chunk reads and writes the whole gradient of the
    head, so larger chunks are faster.
    """
    chunk = max(1, max_logits // len(weight))
    return ChunkedLogprobs.apply(states, weight, tokens, mask_id, temperature, chunk)
