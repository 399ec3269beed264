"""model.py - a transformer that sees whole blocks.

A block diffusion language model is an ordinary decoder-only transformer with three changes:

  1. it has a mask token, and its logits at position i predict the token AT position i (Dream: at i + 1);
  2. attention looks back by whole blocks of K tokens, not by single tokens (Dream and LLaDA: everywhere);
  3. beside the clean text, a training row holds *views*: copies of a block as it was while it was decoded.

Changes 2 and 3 are one rule over three small integers per token (document, block, view). The same
rule is prefill, decoding, replay and fine-tuning, for both kinds of attention. With K = 4, "?" the mask
token, and "x" where the token on the left sees the token on top:

                     clean text          views of the last block
                     894+ 396= 101;      ????  1?1?
      894+  block 0  xxxx                             view 0    a clean token sees the clean blocks before it,
      396=  block 1  xxxx xxxx                        view 0    and its own block in both directions
      101;  block 2  xxxx xxxx xxxx                   view 0
      ????  block 2  xxxx xxxx           xxxx         view 1    a view sees the clean blocks before it, and
      1?1?  block 2  xxxx xxxx                 xxxx   view 2    itself: neither other views nor the clean 101;

(A training row leaves the last clean block, "101;", out: no later view looks back at it.)

Read in this order: ModelConfig, Layout and may_attend, the masks, KVCache, Layer,
BlockDiffusionLM, Targets, Row, Rows, token_logprobs.

Left out on purpose:
  1. dropout, rope scaling, sliding windows, mixture-of-experts layers, tensor parallelism;
  2. checkpoints, tokenizers and the families' weight names: plumbing/checkpoints.py;
  3. LoRA and sharding over GPUs: plumbing/parallel.py.

Shapes are single capital letters. (In formulas, not in shapes, T is the temperature, R a return, A an
advantage.)
  B rows   T tokens in a row   P prompt   R response   K tokens per block
  S trace steps   V vocabulary   C channels   H heads (H_kv: of keys and values)   D channels of a head
  G responses per prompt   M blocks to commit (see rollout.Decoder)
  N items of a list: targets, masked places, rollouts   n a part of such a list
"""

import functools
import math
import os
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention
from torch.utils.checkpoint import checkpoint

try:  # optional: it needs CUDA and a compiler, and makes decoding faster
    from flash_attn import flash_attn_with_kvcache
    flash_attn_error = None
except ImportError as error:  # not installed, or broken: plumbing/cuda.py says which
    flash_attn_with_kvcache, flash_attn_error = None, error


@dataclass
class ModelConfig:
    """Everything the network needs to know. plumbing/checkpoints.py makes one from a config.json."""

    vocab_size: int  # V
    hidden_size: int  # C
    num_layers: int
    num_heads: int  # H
    num_kv_heads: int  # each is shared by H / num_kv_heads heads (grouped-query attention)
    head_dim: int  # D
    intermediate_size: int
    mask_id: int
    is_full: bool = False  # True: every token sees every token (Dream, LLaDA); False: block attention
    block_size: int = 4  # K; with full attention, of decoding alone
    has_qk_norm: bool = True  # RMSNorm on every head of q and k, before the rotation (Qwen3, SDAR)
    has_qkv_bias: bool = False  # (Qwen2, Dream)
    # Dream: the output at position i predicts the token at i + 1. Whoever reads an output looks one place
    # earlier: BlockDiffusionLM.forward, rollout.Decoder.full_states, rollout.lay_out; nobody else knows.
    shifts_logits: bool = False
    rms_norm_eps: float = 1e-6
    rope_theta: float = 1e6
    tie_word_embeddings: bool = False  # one matrix for the embedding and the head
    pad_id: int = 0
    eos_ids: tuple = ()  # any of these ends a response; the first is the one that sft.py teaches
    family: str = "sdar"  # whose weight names a checkpoint has
    source: dict = field(default_factory=dict)  # config.json as it was read: saving gives it back

    def __post_init__(self):
        if not 0 <= self.mask_id < self.vocab_size:
            raise ValueError(f"mask id {self.mask_id} is outside the vocabulary of {self.vocab_size} tokens")
        if self.block_size < 1:
            raise ValueError(f"block_size must be at least 1, got {self.block_size}")
        if self.shifts_logits and not self.is_full:
            raise ValueError("shifted logits are only supported with full attention (Dream)")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"{self.num_heads} heads do not divide among {self.num_kv_heads} kv heads")


# ------------------------------------------------------------------------------------------------------------
# The one attention rule.


class Layout(NamedTuple):
    """Where each token of a batch of rows stands. All int64 (B, T).

    position  absolute position in prompt + response, for the rotary embedding
    document  which text the token belongs to, if a row holds several; -1 is padding: no text sees it, and it
              sees itself, since a softmax over no key at all is NaN
    block     position // K; 0 everywhere for full attention
    view      0 for clean text; v > 0 for the v-th view of its text
    """

    position: torch.Tensor
    document: torch.Tensor
    block: torch.Tensor
    view: torch.Tensor

    @classmethod
    def clean(cls, position, block_size, is_full, document=None):
        """The layout of plain text without views: ordinary block (or full) attention."""
        zero = torch.zeros_like(position)
        # With block attention, blocks are cut at ABSOLUTE positions 0, K, 2K, ..., never at the start of the
        # response. (With full attention K only orders the decoding, and begins there.) With P = 9 and K = 4
        # the block of positions 8..11 holds one prompt token and three of the response. Code that cuts at the
        # response start in training, and at 0 in decoding, trains a conditional that was never sampled from,
        # for all prompts whose length K does not divide.
        block = zero if is_full else position // block_size
        return cls(position, zero if document is None else document, block, zero)


def may_attend(query, key):
    """Whether a token sees another: THE rule. Layouts, or numbers, that broadcast -> bool.

    Inside one document, a token sees the clean text of earlier blocks, and its own block in its own view:
    - prefill, plain text: every token is in view 0, so this is block-causal attention (K = 1: causal);
    - decoding: the block being decoded is one view, the cache is the clean text before it (so the rule
      becomes "every place before the block's own end": KVCache.reading);
    - replay, fine-tuning: many views of many blocks share one clean text, and none sees another: the masks of
      a view are seen by that view alone;
    - full attention: all is one block, so a view is a whole canvas (the prompt and every place that the
      response may fill, revealed or masked), which sees all of itself and nothing else.
    """
    # Clean: of a finished block, as it stays. It is all that a later block reads.
    is_clean_past = (key.view == 0) & (key.block < query.block)
    is_together = (key.view == query.view) & (key.block == query.block)
    return (key.document == query.document) & (is_clean_past | is_together)


# ------------------------------------------------------------------------------------------------------------
# The rule in three forms, for three kinds of hardware and length. Tests hold the first against a double loop,
# and the others against the first.


def dense_mask(layout):
    """The rule as a boolean mask (B, 1, T, T): queries down, keys across. For short rows, and for prompts."""
    query = Layout(*(t[:, :, None] for t in layout))  # (B, T, 1)
    key = Layout(*(t[:, None, :] for t in layout))  # (B, 1, T)
    return may_attend(query, key)[:, None]


def tile_mask(layout, size=128):
    """The rule for long rows without FlexAttention: for every `size` queries, the keys that any of them sees.

    -> list of (queries: slice, keys int64 (n,), mask bool (B, 1, size, n)). A view sees the clean text before
    its block and itself, a small part of a long row: no score is computed of the rest.
    """
    mask, tiles = dense_mask(layout), []
    for start in range(0, mask.shape[2], size):
        part = mask[:, :, start:start + size]  # (B, 1, size, T)
        keys = part.any(dim=(0, 1, 2)).nonzero()[:, 0]  # (n,)
        tiles.append((slice(start, start + size), keys, part[..., keys]))
    return tiles


# torch's own switch to go without compiled kernels, where one does not work. It turns CUDA graphs off, too.
IS_EAGER = os.environ.get("TORCH_COMPILE_DISABLE") == "1"
compile_once = functools.cache(torch.compile)


def compiled(function, dynamic=False):
    """torch.compile, once for each function. dynamic False: one compilation for every length of row;
    True: one for all lengths.

    Lengths are few (see plumbing/packing.py), but more than torch's usual limit of recompilations. Beyond
    that limit torch would silently go back to the dense scores, which do not fit: hence the error instead.
    The settings are per thread, and a backward pass computes activations again in a thread of its own: so
    they are set at every call.
    """
    config = torch._dynamo.config
    if config.recompile_limit != 64:
        config.recompile_limit, config.fail_on_recompile_limit_hit = 64, True
    return compile_once(function, dynamic=dynamic)


def fused(function):
    """A decorator: on a GPU a chain of small operations is compiled into one kernel, else it is left as it
    is. Its first argument is a tensor. (nn.RMSNorm is one kernel of torch's own.)"""
    @functools.wraps(function)
    def call(x, *others):
        return (compiled(function, dynamic=True) if x.is_cuda else function)(x, *others)
    return call


def block_mask(layout):
    """The rule for FlexAttention on a GPU: only WHICH tiles of 128 x 128 are touched is stored.

    Views follow one another in the order of their blocks, so most tiles are empty and cost nothing. Its
    making is compiled as well: uncompiled it would pass through gigabytes for a packed row of 16,384 tokens.
    """
    _, document, block, view = layout

    def rule(row, head, i, j):
        return may_attend(Layout(i, document[row, i], block[row, i], view[row, i]),
                          Layout(j, document[row, j], block[row, j], view[row, j]))

    # On a CPU (tests) the same function runs uncompiled.
    create = compiled(create_block_mask) if layout.block.is_cuda else create_block_mask
    B, T = layout.block.shape
    return create(rule, B, None, T, T, device=layout.block.device)


# ------------------------------------------------------------------------------------------------------------
# How the network attends. Its forward takes an `attend`: a function of (layer number, q, k, v) -> out, with
# q and out (B, H, T, D), k and v (B, H_kv, T, D). There are three ways to make one:
#     attend_within(layout)              the tokens of each row see one another, by the rule
#     cache.filling(slots, layout)       the same, and keys and values are kept           (prefill)
#     cache.reading(slots, position, ...)  one block per row sees what the cache holds    (decoding)
# Full attention without padding needs none of them: there it is masked_attention with mask=None.


def attend_within(layout, is_prefill=False):
    """An `attend` in which the tokens of each row see one another by the rule."""
    B, T = layout.block.shape
    # Packed rows have few lengths. Prompts have many, and FlexAttention would be compiled for each.
    # (Uncompiled it would make every score of a row, a hundred gigabytes: so never without a compiler.)
    if layout.block.is_cuda and B == 1 and T % 128 == 0 and not is_prefill and not IS_EAGER:
        mask = block_mask(layout)
    elif T > 512 and (IS_EAGER or not layout.block.is_cuda):
        mask = tile_mask(layout)
    else:
        mask = dense_mask(layout)
    return functools.partial(masked_attention, mask=mask)


def masked_attention(layer, q, k, v, mask):
    """Softmax attention under a mask in any of the three forms, or none: q (B, H, T, D) -> (B, H, T, D). The
    number of the layer is not used: it is here because every `attend` is given one."""
    has_groups = q.shape[1] != k.shape[1]  # several heads share a key
    if isinstance(mask, BlockMask):
        flex = compiled(flex_attention) if q.is_cuda else flex_attention
        return flex(q, k, v, block_mask=mask, enable_gqa=has_groups)
    if isinstance(mask, list):
        tiles = [masked_attention(layer, q[:, :, queries], k[:, :, keys], v[:, :, keys], part)
                 for queries, keys, part in mask]
        return torch.cat(tiles, dim=2)
    if q.is_cuda and has_groups and mask is not None:  # then CUDA's fast kernels want a kv head per head
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=q.shape[1] != k.shape[1])


class KVCache:
    """Keys and values of the sequences being decoded, (slots, length, H_kv, D) per layer.

    A forward first writes the keys and values of its tokens at their positions, then reads everything up to
    its block's own end. So a block lies in the cache while it is still noisy; that is harmless, since
    every forward overwrites its block before it reads. What must hold: once a block is whole, its CLEAN
    keys and values are written before a later block reads them. When block n begins, block n - 1 is still in
    the cache as it was in its last step, with masks. The first forward of block n writes it clean before
    anything is read (rollout.Decoder.states: the commit). From then on: 0 .. n - 1 clean, n as it is now.
    """

    def __init__(self, config, num_slots, length, dtype, device):
        # Every slot has room for the longest sequence: no paging, no allocation while decoding.
        shape = (config.num_layers, num_slots, length, config.num_kv_heads, config.head_dim)
        self.keys = torch.zeros(shape, dtype=dtype, device=device)
        self.values = torch.zeros(shape, dtype=dtype, device=device)

    def write(self, layer, k, v, slots, position):
        """Stores k and v (B, H_kv, T, D) of one layer at slots (B,) and positions (B, T)."""
        self.keys[layer, slots[:, None], position] = k.transpose(1, 2)
        self.values[layer, slots[:, None], position] = v.transpose(1, 2)

    def filling(self, slots, layout):
        """An `attend` for prefill: by the rule within each row; row b is kept in slot slots[b]."""
        within = attend_within(layout, is_prefill=True)
        return functools.partial(self.fill, slots=slots, position=layout.position, within=within)

    def fill(self, layer, q, k, v, slots, position, within):
        """Prefill of one layer."""
        self.write(layer, k, v, slots, position)
        return within(layer, q, k, v)

    def copy(self, source, target, length):
        """Copies the first `length` tokens of slots source to slots target: (M,) each, or a number each."""
        for keys, values in zip(self.keys, self.values):  # layer by layer: indexing makes a temporary copy
            keys[target, :length], values[target, :length] = keys[source, :length], values[source, :length]

    def reading(self, slots, position, end, longest, num_in_place=0):
        """An `attend` for decoding: row b is the tokens at position[b] (T,), one block mostly, of the
        sequence in slots[b] (B,); they see all that the slot holds before end[b] (B,).

        Two rows may be blocks of the same slot: all rows write before any row reads. longest: an int, no end
        is beyond it (the host knows one, so that the device need not be asked). num_in_place: how many of
        the first rows are the slots 0, 1, 2, ...; their keys are read where they are, others are copied.
        """
        key_position = torch.arange(longest, device=position.device)
        is_seen = (key_position < end[:, None])[:, None, None]  # (B, 1, 1, longest)
        return functools.partial(self.read, slots=slots, position=position, end=end, is_seen=is_seen,
                                 num_in_place=num_in_place)

    def read(self, layer, q, k, v, slots, position, end, is_seen, num_in_place):
        """Decoding of one layer: q (B, H, K, D) over all that its slot holds -> (B, H, K, D)."""
        self.write(layer, k, v, slots, position)
        if flash_attn_with_kvcache is not None and q.is_cuda and q.dtype in (torch.float16, torch.bfloat16):
            out = flash_attn_with_kvcache(
                q.transpose(1, 2), self.keys[layer], self.values[layer], causal=False,
                cache_seqlens=end.int(), cache_batch_idx=slots.int())
            return out.transpose(1, 2)
        # All K queries of a block see the same keys, and H / H_kv heads share each key: so these heads can be
        # treated as additional queries, and no key has to be copied for them. H = 4, H_kv = 2, K = 4:
        # q (B, 4, 4, D) becomes (B, 2, 8, D).
        folded = q.reshape(len(q), k.shape[1], -1, q.shape[-1])  # (B, H_kv, H / H_kv * K, D)
        longest, out = is_seen.shape[-1], []
        # First the rows whose keys are read where they are, then the others.
        for rows, where in ((slice(0, num_in_place), slice(0, num_in_place)),
                            (slice(num_in_place, len(q)), slots[num_in_place:])):
            if len(slots[rows]):
                keys = self.keys[layer, where, :longest].transpose(1, 2)  # (B, H_kv, longest, D)
                values = self.values[layer, where, :longest].transpose(1, 2)
                out.append(F.scaled_dot_product_attention(
                    folded[rows], keys, values, attn_mask=is_seen[rows]))
        return torch.cat(out).reshape(q.shape)


# ------------------------------------------------------------------------------------------------------------
# The network.


def rotary(position, head_dim, theta):
    """Rotary cosines and sines, in the halves convention: position (B, T) -> two float32 (B, 1, T, D)."""
    exponent = torch.arange(0, head_dim, 2, device=position.device, dtype=torch.float32) / head_dim
    frequency = theta ** -exponent  # (D / 2,)
    angle = position[:, None, :, None].float() * frequency  # (B, 1, T, D / 2)
    angle = torch.cat([angle, angle], dim=-1)  # (B, 1, T, D)
    return angle.cos(), angle.sin()


@fused
def rotate(x, cos, sin):
    """Turns x (B, H, T, D) by its position, computed in float32."""
    # Halves convention (as in the checkpoints): channel i turns with channel
    # i + D/2, not with its neighbour.
    left, right = x.float().chunk(2, dim=-1)
    return (x * cos + torch.cat([-right, left], dim=-1) * sin).to(x.dtype)


@fused
def gated(gate, up):
    """SwiGLU's product, silu(gate) * up."""
    return F.silu(gate) * up


class Linear(nn.Linear):
    """A linear layer that is fast for few rows on a CPU: decoding one sequence is K = 4 rows at a time.

    x W^T and (W x^T)^T are the same numbers, but for few rows torch's CPU kernels are faster in the second
    form: 1.6 to 4.4 times for 4 rows (in a model of 34M parameters), up to 1.8 times for 8, not at all for
    more. Rows in training are many, so it is for decoding only.
    """

    def forward(self, x):
        """x (..., in) -> (..., out)."""
        has_few_rows = x.numel() <= 8 * x.shape[-1]
        if x.is_cuda or torch.is_grad_enabled() or not has_few_rows:
            return super().forward(x)
        y = (self.weight @ x.flatten(0, -2).T).T.unflatten(0, x.shape[:-1])
        return y if self.bias is None else y + self.bias


class Layer(nn.Module):
    """One transformer layer: attention, then a gated feed-forward (SwiGLU), each behind its RMSNorm."""

    def __init__(self, config, number):
        super().__init__()
        C, D, bias = config.hidden_size, config.head_dim, config.has_qkv_bias
        self.number, self.head_dim = number, D
        self.has_gradient_checkpointing = False
        self.attention_norm = nn.RMSNorm(C, eps=config.rms_norm_eps)
        self.q_proj = Linear(C, config.num_heads * D, bias=bias)
        self.k_proj = Linear(C, config.num_kv_heads * D, bias=bias)
        self.v_proj = Linear(C, config.num_kv_heads * D, bias=bias)
        self.o_proj = Linear(config.num_heads * D, C, bias=False)
        self.q_norm = nn.RMSNorm(D, eps=config.rms_norm_eps) if config.has_qk_norm else nn.Identity()
        self.k_norm = nn.RMSNorm(D, eps=config.rms_norm_eps) if config.has_qk_norm else nn.Identity()
        self.mlp_norm = nn.RMSNorm(C, eps=config.rms_norm_eps)
        self.gate_proj = Linear(C, config.intermediate_size, bias=False)
        self.up_proj = Linear(C, config.intermediate_size, bias=False)
        self.down_proj = Linear(config.intermediate_size, C, bias=False)

    def forward(self, x, cos, sin, attend):
        """x (B, T, C) -> (B, T, C). Gradient checkpointing keeps only x, and computes the rest again in the
        backward pass: slower by about a third, in a fraction of the memory."""
        if self.has_gradient_checkpointing and torch.is_grad_enabled():
            return checkpoint(self.compute, x, cos, sin, attend, use_reentrant=False)
        return self.compute(x, cos, sin, attend)

    def compute(self, x, cos, sin, attend):
        """The layer itself."""
        B, T, _ = x.shape
        h = self.attention_norm(x)
        q = self.q_norm(self.q_proj(h).view(B, T, -1, self.head_dim)).transpose(1, 2)  # (B, H, T, D)
        k = self.k_norm(self.k_proj(h).view(B, T, -1, self.head_dim)).transpose(1, 2)  # (B, H_kv, T, D)
        v = self.v_proj(h).view(B, T, -1, self.head_dim).transpose(1, 2)  # (B, H_kv, T, D)
        out = attend(self.number, rotate(q, cos, sin), rotate(k, cos, sin), v)  # (B, H, T, D)
        x = x + self.o_proj(out.transpose(1, 2).reshape(B, T, -1))
        h = self.mlp_norm(x)  # (B, T, C)
        return x + self.down_proj(gated(self.gate_proj(h), self.up_proj(h)))


class BlockDiffusionLM(nn.Module):
    """The language model. `model(tokens)` gives logits; rollout, replay and value model build on `hidden`."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config, number) for number in range(config.num_layers))
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.head = Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.head.weight = self.embed.weight

    @property
    def device(self):
        """Where the weights are."""
        return self.embed.weight.device

    def hidden(self, tokens, position, attend):
        """Final normalised states: int64 tokens (B, T) at absolute positions (B, T) -> (B, T, C).

        attend: see "How the network attends". The head is not applied: it is by far the widest layer (152k
        outputs for Qwen), and its logits are wanted at few places only.
        """
        cos, sin = rotary(position, self.config.head_dim, self.config.rope_theta)
        x = self.embed(tokens)  # (B, T, C)
        for layer in self.layers:
            x = layer(x, cos, sin, attend)
        return self.norm(x)

    def forward(self, tokens):
        """Logits (B, T, V) of plain text, int64 tokens (B, T), under the model's own attention.

        logits[:, i] predict tokens[:, i] in every family: Dream's output is moved by one here (its position
        0, which nothing predicts, keeps its own). The mask token's logit is left as the network gives it.
        """
        position = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
        layout = Layout.clean(position, self.config.block_size, self.config.is_full)
        logits = self.head(self.hidden(tokens, position, attend_within(layout)))
        if self.config.shifts_logits:
            logits = torch.cat([logits[:, :1], logits[:, :-1]], dim=1)
        return logits


# ------------------------------------------------------------------------------------------------------------
# Rows: what the network is given to train on, and what a loss needs to know of each token it predicts there.
# rollout.build_rows makes them; plumbing/packing.py pads or packs them to micro-batches.


class Targets(NamedTuple):
    """What a loss needs to know of every predicted token, taken from the records
    when rows are built (logp_old is filled in later). All (N,)."""

    logit_index: torch.Tensor  # int64: which of the batch's flattened (B * T) outputs predicts it
    token: torch.Tensor  # int64: the token to predict
    rollout_index: torch.Tensor  # int64: which rollout it belongs to
    response_index: torch.Tensor  # int64: its index in that rollout's response
    masked_share: torch.Tensor  # float32: t, the share of its block that its view hides (see sft_loss)
    logp: torch.Tensor  # float32: recorded when it was drawn
    # float32: of the policy at the start of the RL step, on this very row. The first update of a step sets it
    # from its own forward; tracerl.old_logprobs sets it for all other mini-batches before any update.
    logp_old: torch.Tensor
    advantage: torch.Tensor  # float32
    value_old: torch.Tensor  # float32: for the value model's loss
    returns: torch.Tensor  # float32: the same


TARGET_DTYPES = (torch.int64,) * 4 + (torch.float32,) * (len(Targets._fields) - 4)


@dataclass
class Row:
    """One training row: lists over its tokens, and its targets as tuples in the order of Targets."""

    tokens: list = field(default_factory=list)
    position: list = field(default_factory=list)
    block: list = field(default_factory=list)
    view: list = field(default_factory=list)
    targets: list = field(default_factory=list)

    def add(self, tokens, block, view):
        """Appends the tokens of a block: K of them, or (full attention) the whole canvas as block 0."""
        start = block * len(tokens)  # block b begins at position b K
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


# ------------------------------------------------------------------------------------------------------------
# From states to log-probabilities.


def policy_logits(logits, mask_id):
    """Float32 logits with the mask token ruled out: a policy never says it, in decoding and replay alike.

    Left in, it can be drawn: then the text holds a mask token for good, which every later forward takes for a
    place that is still hidden.
    """
    logits = logits.to(torch.float32, copy=True)
    logits[..., mask_id] = -math.inf
    return logits


def float32_product(a, b):
    """a @ b, two matrices, with a float32 result, also of bfloat16 factors.

    A bfloat16 logit between 16 and 32 is a multiple of 0.125: a ratio exp(logp - logp_old) would move in
    steps of about 13 percent, more than half of the clip range of 0.2. Sums inside the product are float32
    anyway; what matters is not to round them at the end.
    """
    if a.dtype == torch.float32:
        return a @ b
    return torch.mm(a, b, out_dtype=torch.float32) if a.is_cuda else a.float() @ b.float()


def head_logits(model, h):
    """Logits, float32 (N, V), of final states h (N, C), in decoding. Replay computes the same product in
    scaled_logits."""
    return model.head(h) if h.dtype == torch.float32 else float32_product(h, model.head.weight.T)


def scaled_logits(h, weight, mask_id, temperature):
    """policy_logits / T of final states h (N, C): float32 (N, V), in memory of their own."""
    return policy_logits(float32_product(h, weight.T), mask_id).div_(temperature)


class TokenLogprobs(torch.autograd.Function):
    """token_logprobs with its own backward pass: logits live for one chunk at a time, and are made again.

    d logp / d logits = (one-hot of the token - softmax) / T, so nothing of size V outlives its chunk but the
    gradient of the head, which is added up in one place.
    """

    @staticmethod
    def forward(ctx, h, weight, tokens, mask_id, temperature, chunk):
        """h (N, C), weight (V, C), tokens (N,) -> log-probability and entropy, float32 (N,)."""
        # States, not logits: (N, C) instead of (N, V), for the price of one more
        # product in the backward pass.
        ctx.save_for_backward(h, weight, tokens)
        ctx.settings = mask_id, temperature, chunk
        logp, entropy = h.new_empty(2, len(h), dtype=torch.float32)
        for start in range(0, len(h), chunk):  # N = 10, chunk 4: states 0..3, 4..7, 8..9
            cut = slice(start, start + chunk)
            logits = scaled_logits(h[cut], weight, mask_id, temperature)  # (chunk, V)
            total = logits.logsumexp(-1, keepdim=True)  # (chunk, 1)
            logp[cut] = (logits.gather(-1, tokens[cut, None]) - total)[:, 0]
            entropy[cut] = torch.special.entr(logits.sub_(total).exp_()).sum(-1)
        # A figure for the log, never trained on. (An entropy bonus would need its gradient in `backward`:
        # of a logit, -p (log p + entropy) / T.)
        ctx.mark_non_differentiable(entropy)
        return logp, entropy

    @staticmethod
    def backward(ctx, grad, _):
        """Gradients of h and, unless the head is frozen, of its weight."""
        h, weight, tokens = ctx.saved_tensors
        mask_id, temperature, chunk = ctx.settings
        grad_h = torch.zeros_like(h)
        needs_weight = ctx.needs_input_grad[1]  # not of a frozen head (LoRA)
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if needs_weight else None
        for start in range(0, len(h), chunk):
            cut = slice(start, start + chunk)
            # d loss / d logp of each token, spread over its logits: + at the token, - softmax everywhere.
            share = grad[cut, None] / temperature  # (chunk, 1)
            d = scaled_logits(h[cut], weight, mask_id, temperature).softmax(-1).mul_(-share)
            d = d.scatter_add_(-1, tokens[cut, None], share).to(h.dtype)  # (chunk, V) d loss / d logits
            grad_h[cut] = d @ weight
            if needs_weight:  # added up in float32: in bfloat16 late chunks would be lost in the sum
                grad_weight += float32_product(d.T, h[cut])
        return grad_h, grad_weight.to(weight.dtype) if needs_weight else None, None, None, None, None


def token_logprobs(model, h, tokens, temperature=1.0, max_logits=None):
    """Log-probabilities of `tokens` (N,) and entropies of their distributions, at final states h (N, C).

    Float32 (N,) both, whatever the weights are. Logits are made for a chunk of positions at a time, at most
    max_logits numbers (default 2**23, 32 MiB a copy; on a GPU 2**27: the head's gradient is read and
    written once per chunk, which would be most of the memory traffic of small chunks: counted, not
    measured). All at once, those of 4,000 positions over V = 152k took 9 GiB, forward and backward: logits,
    log-softmax, their gradients.
    Temperature 0 stands for 1, as in decoding.
    """
    chunk = max(1, (max_logits or (2**27 if h.is_cuda else 2**23)) // model.config.vocab_size)
    return TokenLogprobs.apply(h, model.head.weight, tokens, model.config.mask_id, temperature or 1.0, chunk)
