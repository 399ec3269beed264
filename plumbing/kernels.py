"""plumbing/kernels.py - twins of attention and of the log-probability: the same numbers, faster.

Nothing here knows the project; plumbing/engine.py puts these functions in the place of the definitions.
  masked_attention   twin of model.attention, with masks in three forms
  read_cache         the same over a cache of many sequences, whose keys are read where they are
  chunked_logprobs   twin of model.token_logprobs, which never holds all logits at once
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

# On Hopper torch prefers cuDNN's attention where there is a mask. That makes a plan for every new shape, which
# takes half a second as reported, and our shapes change with every batch of prompts.
torch.backends.cuda.enable_cudnn_sdp(False)

# torch's own switch to go without compiled kernels, where one does not work. It turns CUDA graphs off, too.
IS_EAGER = os.environ.get("TORCH_COMPILE_DISABLE") == "1"
compile_once = functools.cache(torch.compile)


def compiled(function):
    """torch.compile, once for each function, and anew for each length of row.

    Lengths are few, but more than torch's usual limit. Beyond that limit torch would silently compute all
    scores of a long row, which do not fit: hence the error instead. The limit is kept per thread, and a
    backward pass runs in a thread of its own. So it is set at every call.
    """
    config = torch._dynamo.config
    if config.recompile_limit != 64:
        config.recompile_limit = 64
        config.fail_on_recompile_limit_hit = True
    return compile_once(function, dynamic=False)


# ------------------------------------------------------------------------------------------------------------
# Attention under a mask.


def tiles(mask, size=128):
    """A dense mask (B, 1, T, T) cut for long rows: for every `size` queries, the keys that any of them sees.

    -> list of (queries: slice, keys int64 (n,), mask bool (B, 1, size, n)). A view sees the clean text before
    its block and itself, which is a small part of a long row. No score is computed of the rest.
    """
    found = []
    for start in range(0, mask.shape[2], size):
        queries = slice(start, start + size)
        part = mask[:, :, queries]  # (B, 1, size, T)
        keys = part.any(dim=(0, 1, 2)).nonzero()[:, 0]  # (n,)
        found.append((queries, keys, part[..., keys]))
    return found


def flex_mask(rule, layout):
    """A mask for FlexAttention: only WHICH tiles of 128 x 128 are touched is stored.

    rule: a function of two layouts (named tuples of numbers) that gives bool; layout: of (B, T) tensors. Its
    making is compiled as well: uncompiled it would pass through gigabytes for a row of 16,384 tokens.
    """
    _, *numbers = layout
    at = lambda row, place: type(layout)(place, *(number[row, place] for number in numbers))
    may_see = lambda row, head, i, j: rule(at(row, i), at(row, j))
    create = compiled(create_block_mask) if layout.block.is_cuda else create_block_mask
    B, T = layout.block.shape
    with torch.no_grad():
        return create(may_see, B, None, T, T, device=layout.block.device)


def masked_attention(q, k, v, mask):
    """Softmax attention: q (B, H, T, D) -> (B, H, T, D). mask: dense, tiles, of FlexAttention, or None."""
    has_groups = q.shape[1] != k.shape[1]  # several heads share a key
    if isinstance(mask, BlockMask):
        flex = compiled(flex_attention) if q.is_cuda else flex_attention
        return flex(q, k, v, block_mask=mask, enable_gqa=has_groups)
    if isinstance(mask, list):
        parts = [masked_attention(q[:, :, queries], k[:, :, keys], v[:, :, keys], part)
                 for queries, keys, part in mask]
        return torch.cat(parts, dim=2)
    if q.is_cuda and has_groups and mask is not None:
        # Then CUDA's fast kernels want a key for every head.
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
        has_groups = False
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=has_groups)


def uses_flash(q):
    """Whether flash-attn is there, and computes tensors of this kind."""
    return flash_attn_with_kvcache is not None and q.is_cuda and q.dtype in (torch.float16, torch.bfloat16)


def read_cache(q, keys, values, slots, end, is_seen, num_in_place):
    """Attention of rows over a cache: q (B, H, K, D); keys, values (slots, length, H_kv, D) -> (B, H, K, D).

    Row b sees the first end[b] tokens of slot slots[b]; is_seen bool (B, 1, 1, longest) says the same. The
    first num_in_place rows are the slots 0, 1, 2, ...: their keys are read where they are. Those of the other
    rows are copied.
    """
    if uses_flash(q):
        out = flash_attn_with_kvcache(q.transpose(1, 2), keys, values, causal=False,
                                      cache_seqlens=end.int(), cache_batch_idx=slots.int())
        return out.transpose(1, 2)
    # All K queries of a block see the same keys, and H / H_kv heads share each key. So these heads can count
    # as more queries, and no key is copied for them: with H = 4, H_kv = 2, K = 4, (B, 4, 4, D) -> (B, 2, 8, D).
    folded = q.reshape(len(q), keys.shape[2], -1, q.shape[-1])
    longest = is_seen.shape[-1]
    in_place = slice(0, num_in_place)
    others = slice(num_in_place, len(q))
    out = []
    for rows, where in ((in_place, in_place), (others, slots[others])):
        if len(slots[rows]):
            out.append(F.scaled_dot_product_attention(
                folded[rows], keys[where, :longest].transpose(1, 2), values[where, :longest].transpose(1, 2),
                attn_mask=is_seen[rows]))
    return torch.cat(out).reshape(q.shape)


# ------------------------------------------------------------------------------------------------------------
# Log-probabilities.


def float32_product(a, b):
    """a @ b, two matrices, with a float32 result also of bfloat16 factors."""
    if a.dtype == torch.float32:
        return a @ b
    return torch.mm(a, b, out_dtype=torch.float32) if a.is_cuda else a.float() @ b.float()


def masked_logits(states, weight, mask_id):
    """Float32 logits (N, V) of states (N, C) and a head (V, C); one token is ruled out."""
    logits = float32_product(states, weight.T)
    logits[:, mask_id] = -math.inf
    return logits


class ChunkedLogprobs(torch.autograd.Function):
    """Log-probability and entropy, with a backward pass of their own.

    Logits live for one chunk of positions at a time, and are made again in the backward pass. With z the
    logits / T, p their softmax and H its entropy, the two gradients are
        d logp / d z_v = [v is the token] - p_v          d H / d z_v = -p_v (log p_v + H)
    so nothing of size V outlives its chunk but the gradient of the head, which is added up in one place.
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
        ctx.set_materialize_grads(False)  # an entropy that no loss uses has no gradient: None
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
        # Added up in float32: in bfloat16 late chunks would be lost in the sum.
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


def chunked_logprobs(states, weight, tokens, mask_id, temperature, max_logits=None):
    """Log-probabilities of tokens (N,) and entropies, at states (N, C), of a head (V, C): float32 (N,) each.

    At most max_logits logits exist at a time: 2**23 of them are 32 MiB. On a GPU it is 2**27, since the head's
    gradient is read and written once per chunk.
    """
    chunk = max(1, (max_logits or (2**27 if states.is_cuda else 2**23)) // len(weight))
    return ChunkedLogprobs.apply(states, weight, tokens, mask_id, temperature, chunk)
