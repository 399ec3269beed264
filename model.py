"""model.py - a transformer that sees whole blocks, and where it runs.

A block diffusion language model is an ordinary decoder-only transformer with three changes:

  1. it has a mask token, and its logits at position i predict the token AT position i (Dream: at i + 1);
  2. attention looks back by whole blocks of K tokens, not by single tokens (Dream and LLaDA: everywhere);
  3. beside the clean text a training row holds *views*: copies of a block as it was while it was decoded.

All three, in prefill, decoding, replay and fine-tuning, are one attention rule over four small integers per
token: see `Layout` and `may_attend`, the only place in this project that knows who sees whom.

Reading order: ModelConfig, Layout and may_attend, KVCache, Layer, BlockDiffusionLM, token_logprobs; then
checkpoints (load_model, save_checkpoint), the tiny model, and last where all this runs (processes, optimizer
step, run folder).

Left out on purpose: dropout, rope scaling, sliding windows, mixture-of-experts layers, tensor parallelism.

Sizes, used with one meaning everywhere:
  B rows   T tokens in a row   P prompt   R response   L prompt + response   K tokens per block
  S trace steps   V vocabulary   C channels   H heads   D channels of a head   G responses per prompt
  N items of a list
"""

import functools
import json
import math
import os
import re
import shutil
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from huggingface_hub import save_torch_state_dict, snapshot_download
from matplotlib.figure import Figure
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions, get_model_state_dict, get_state_dict, set_state_dict)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.distributed.fsdp import (
    FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method)
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast, Qwen2Tokenizer

# ------------------------------------------------------------------------------------------------------------
# Configuration: one network, four families. A family is a row of switches and a table of weight names.


QWEN_NAMES = {  # ours -> theirs; "#" is the layer number
    "embed": "model.embed_tokens",
    "layers.#.attention_norm": "model.layers.#.input_layernorm",
    "layers.#.q_proj": "model.layers.#.self_attn.q_proj",
    "layers.#.k_proj": "model.layers.#.self_attn.k_proj",
    "layers.#.v_proj": "model.layers.#.self_attn.v_proj",
    "layers.#.o_proj": "model.layers.#.self_attn.o_proj",
    "layers.#.q_norm": "model.layers.#.self_attn.q_norm",
    "layers.#.k_norm": "model.layers.#.self_attn.k_norm",
    "layers.#.mlp_norm": "model.layers.#.post_attention_layernorm",
    "layers.#.gate_proj": "model.layers.#.mlp.gate_proj",
    "layers.#.up_proj": "model.layers.#.mlp.up_proj",
    "layers.#.down_proj": "model.layers.#.mlp.down_proj",
    "norm": "model.norm",
    "head": "lm_head",
}
LLADA_NAMES = {
    "embed": "model.transformer.wte",
    "layers.#.attention_norm": "model.transformer.blocks.#.attn_norm",
    "layers.#.q_proj": "model.transformer.blocks.#.q_proj",
    "layers.#.k_proj": "model.transformer.blocks.#.k_proj",
    "layers.#.v_proj": "model.transformer.blocks.#.v_proj",
    "layers.#.o_proj": "model.transformer.blocks.#.attn_out",
    "layers.#.mlp_norm": "model.transformer.blocks.#.ff_norm",
    "layers.#.gate_proj": "model.transformer.blocks.#.ff_proj",
    "layers.#.up_proj": "model.transformer.blocks.#.up_proj",
    "layers.#.down_proj": "model.transformer.blocks.#.ff_out",
    "norm": "model.transformer.ln_f",
    "head": "model.transformer.ff_out",
}


class Family(NamedTuple):
    """What the checkpoints of one family have in common (METHOD: models)."""

    has_qk_norm: bool  # RMSNorm on every head of q and k, before the rotation
    has_qkv_bias: bool
    shifts_logits: bool  # the network's output at i predicts the token at i + 1
    attention: str  # "block" or "full"
    mask_id: int  # of the published checkpoints, where config.json does not say
    names: dict


FAMILIES = {  # by model_type of config.json, in lower case
    "sdar": Family(True, False, False, "block", 151669, QWEN_NAMES),  # SDAR and TraDo
    "qwen3": Family(True, False, False, "block", 151669, QWEN_NAMES),  # autoregressive: sft.py changes that
    "dream": Family(False, True, True, "full", 151666, QWEN_NAMES),  # Dream and DiffuCoder
    "llada": Family(False, False, False, "full", 126336, LLADA_NAMES),
    "mmada": Family(False, False, False, "full", 126336, LLADA_NAMES),  # its text part is LLaDA
}


@dataclass
class ModelConfig:
    """Everything the network needs to know, from a Hugging Face config.json (`from_dict`) or by hand."""

    family: str
    vocab_size: int  # V
    hidden_size: int  # C
    num_layers: int
    num_heads: int  # H
    num_kv_heads: int
    head_dim: int  # D
    intermediate_size: int
    mask_id: int
    block_size: int = 4  # K: of attention and decoding ("block"), of decoding alone ("full")
    rms_norm_eps: float = 1e-6
    rope_theta: float = 1e6
    tie_word_embeddings: bool = False
    pad_id: int = 0
    eos_ids: tuple = ()
    source: dict = field(default_factory=dict)  # config.json as it was read: saving gives it back

    @property
    def switches(self):
        """The Family of this checkpoint."""
        return FAMILIES[self.family]

    @property
    def is_full(self):
        """True when every token sees every token (Dream, LLaDA)."""
        return self.switches.attention == "full"

    def __post_init__(self):
        if self.family not in FAMILIES:
            raise ValueError(f"unknown model_type {self.family!r}: this project knows {', '.join(FAMILIES)}")
        if not 0 <= self.mask_id < self.vocab_size:
            raise ValueError(f"mask id {self.mask_id} is outside the vocabulary of {self.vocab_size} tokens")
        if self.block_size < 1:
            raise ValueError(f"block_size must be at least 1, got {self.block_size}")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"{self.num_heads} heads do not divide among {self.num_kv_heads} kv heads")

    @classmethod
    def from_dict(cls, source, block_size=None):
        """Reads the fields of a config.json, whichever family's spelling they have.

        Raises ValueError for an unknown model_type, a missing field, or a variant the network does not have.
        """
        family = str(source.get("model_type", "none")).lower()
        if family not in FAMILIES:
            raise ValueError(f"unknown model_type {family!r} in config.json: known are {', '.join(FAMILIES)}")
        spelling = dict(vocab_size="embedding_size", hidden_size="d_model", num_hidden_layers="n_layers",
                        num_attention_heads="n_heads", num_key_value_heads="n_kv_heads",
                        intermediate_size="mlp_hidden_size", tie_word_embeddings="weight_tying")
        is_llada = FAMILIES[family].names is LLADA_NAMES
        wanted = {ours: source.get(llada if is_llada else ours) for ours, llada in spelling.items()}
        wanted["vocab_size"] = wanted["vocab_size"] or source.get("vocab_size")
        rope = source.get("rope_parameters") or source.get("rope_scaling") or {}
        if rope.get("rope_type", rope.get("type", "default")) != "default":
            raise ValueError(f"rope type {rope} is not supported: only plain rotary positions are")
        if source.get("use_sliding_window") or source.get("hidden_act", "silu") != "silu":
            raise ValueError("sliding windows and activations other than silu are not supported")
        wanted["num_key_value_heads"] = wanted["num_key_value_heads"] or wanted["num_attention_heads"]
        missing = [name for name, value in wanted.items() if value is None and name != "tie_word_embeddings"]
        if missing:
            raise ValueError(f"config.json of family {family!r} lacks {', '.join(missing)}")
        default_theta = 5e5 if is_llada else 1e6
        eos = source.get("eos_token_id")
        eos = eos if isinstance(eos, (list, tuple)) else [] if eos is None else [eos]
        pad = source.get("pad_token_id")
        mask_id = source.get("mask_token_id")
        if mask_id is None:
            mask_id = FAMILIES[family].mask_id
            if mask_id >= wanted["vocab_size"] and family == "qwen3":  # autoregressive: gets a row of its own
                mask_id = wanted["vocab_size"]
                wanted["vocab_size"] += 1
            elif mask_id >= wanted["vocab_size"]:
                raise ValueError(
                    "this checkpoint names no mask token: config.json has no mask_token_id, "
                    f"and {family}'s usual {mask_id} is outside its vocabulary of {wanted['vocab_size']}")
        default_block = 32 if FAMILIES[family].attention == "full" else 4
        return cls(
            family=family, vocab_size=wanted["vocab_size"], hidden_size=wanted["hidden_size"],
            num_layers=wanted["num_hidden_layers"], num_heads=wanted["num_attention_heads"],
            num_kv_heads=wanted["num_key_value_heads"], intermediate_size=wanted["intermediate_size"],
            head_dim=source.get("head_dim") or wanted["hidden_size"] // wanted["num_attention_heads"],
            mask_id=mask_id,
            block_size=block_size if block_size is not None else source.get("block_size") or default_block,
            rms_norm_eps=source.get("rms_norm_eps", 1e-6),
            tie_word_embeddings=bool(wanted["tie_word_embeddings"]),
            rope_theta=float(rope.get("rope_theta") or source.get("rope_theta") or default_theta),
            pad_id=pad if pad is not None else (eos[0] if eos else 0), eos_ids=tuple(eos),
            source=dict(source))


# ------------------------------------------------------------------------------------------------------------
# The one attention rule.


class Layout(NamedTuple):
    """Where each token of a batch of rows stands. All int64 (B, T).

    position  absolute position in prompt + response, for the rotary embedding
    document  which text the token belongs to, if a row holds several; -1 is padding
    block     position // K; 0 everywhere for full attention
    view      0 for clean text; v > 0 for the v-th picture of that block (full attention: of the whole canvas)
    """

    position: torch.Tensor
    document: torch.Tensor
    block: torch.Tensor
    view: torch.Tensor

    @classmethod
    def clean(cls, position, block_size, is_full, document=None):
        """The layout of plain text without views: ordinary block (or full) attention."""
        zero = torch.zeros_like(position)
        return cls(position, zero if document is None else document,
                   zero if is_full else position // block_size, zero)


def may_attend(query, key):
    """Whether a token sees another: THE rule (METHOD: replay). Layouts or numbers that broadcast -> bool.

    Inside one document, a token sees the clean text of earlier blocks, and its own block in its own view.
    - prefill, plain text: every token is in view 0, so this is block-causal attention (K = 1: causal);
    - decoding: the block being decoded is one view, the cache is the clean text before it;
    - replay, fine-tuning: many views of many blocks share one clean text, and none sees another;
    - full attention: one block, so a view is a whole canvas that sees all of itself and nothing else.
    """
    is_clean_past = (key.view == 0) & (key.block < query.block)
    is_together = (key.view == query.view) & (key.block == query.block)
    return (key.document == query.document) & (is_clean_past | is_together)


def dense_mask(layout):
    """The rule as a boolean mask (B, 1, T, T): queries down, keys across."""
    query = Layout(*(t[:, :, None] for t in layout))
    key = Layout(*(t[:, None, :] for t in layout))
    return may_attend(query, key)[:, None]


@functools.cache
def compiled(function):
    """torch.compile, once for each function; one compilation for every length of row (see Rows.packed).

    Lengths are few, but more than dynamo's usual limit; beyond it, it would fall back to the dense scores.
    """
    torch._dynamo.config.recompile_limit, torch._dynamo.config.fail_on_recompile_limit_hit = 64, True
    return torch.compile(function, dynamic=False)


def block_mask(layout):
    """The rule for FlexAttention: the mask is never stored, only which tiles of 128 x 128 it touches.

    Views follow one another in the order of their blocks, so most tiles are empty and cost nothing. Compiled
    on a GPU, where the dense mask of a packed row would take a gigabyte while it is made.
    """
    _, document, block, view = layout

    def rule(row, head, i, j):
        return may_attend(Layout(i, document[row, i], block[row, i], view[row, i]),
                          Layout(j, document[row, j], block[row, j], view[row, j]))

    create = compiled(create_block_mask) if layout.block.is_cuda else create_block_mask
    B, T = layout.block.shape
    return create(rule, B, None, T, T, device=layout.block.device)


def tile_mask(layout, size=128):
    """The rule for a CPU: for every `size` queries, the keys that any of them sees, and the mask between.

    -> list of (queries: slice, keys int64 (n,), bool (B, 1, size, n)). A view sees the clean text before its
    block and itself, a small part of a long row: the rest is never touched.
    """
    mask, tiles = dense_mask(layout), []
    for start in range(0, mask.shape[2], size):
        part = mask[:, :, start:start + size]
        keys = part.any(dim=(0, 1, 2)).nonzero()[:, 0]
        tiles.append((slice(start, start + size), keys, part[..., keys]))
    return tiles


def attend(q, k, v, mask):
    """Softmax attention. q (B, H, T, D), k and v (B, H_kv, T_key, D).

    mask: bool, broadcast to (B, H, T, T_key); or its tiles; or, on a GPU, the BlockMask of packed rows.
    """
    if isinstance(mask, list):
        return torch.cat([attend(q[:, :, queries], k[:, :, keys], v[:, :, keys], part)
                          for queries, keys, part in mask], dim=2)
    if isinstance(mask, BlockMask):
        flex = compiled(flex_attention) if q.is_cuda else flex_attention
        return flex(q, k, v, block_mask=mask, enable_gqa=q.shape[1] != k.shape[1])
    # with a mask, CUDA's fast kernels want as many kv heads as heads
    if q.is_cuda and k.shape[1] != q.shape[1]:
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=q.shape[1] != k.shape[1])


class KVCache:
    """Keys and values of every slot's sequence so far, (slots, length, H_kv, D) per layer.

    The cache needs no bookkeeping: a forward writes its keys and values at the positions of its tokens, and
    reads everything before its own end. A block under denoising therefore lies in the cache while it is
    noisy, but only its own next forward comes before it is written again; the last writing, once no mask is
    left, is the clean one.
    """

    def __init__(self, config, num_slots, length, dtype, device):
        shape = (config.num_layers, num_slots, length, config.num_kv_heads, config.head_dim)
        self.keys = torch.zeros(shape, dtype=dtype, device=device)
        self.values = torch.zeros(shape, dtype=dtype, device=device)

    def select(self, slots, position):
        """Aims the next forward at these slots (B,) and positions (B, T): one row per slot."""
        self.slots, self.position = slots, position
        self.length = int(position.max()) + 1
        key_position = torch.arange(self.length, device=position.device)
        self.mask = (key_position <= position[:, -1:])[:, None, None]  # (B, 1, 1, length): to its block's end
        return self

    def write(self, layer, k, v):
        """Stores k and v (B, H_kv, T, D) of one layer at the selected slots and positions."""
        self.keys[layer, self.slots[:, None], self.position] = k.transpose(1, 2)
        self.values[layer, self.slots[:, None], self.position] = v.transpose(1, 2)

    def attend(self, layer, q, k, v):
        """Attention of one block per slot, q (B, H, K, D), over all the slot holds up to the block's end."""
        if flash_attn_with_kvcache is not None and q.is_cuda and q.dtype in (torch.float16, torch.bfloat16):
            # writes k and v at cache_seqlens, attends to everything up to there and to the whole new block
            return flash_attn_with_kvcache(
                q.transpose(1, 2), self.keys[layer], self.values[layer], k.transpose(1, 2), v.transpose(1, 2),
                cache_seqlens=self.position[:, 0].int(), cache_batch_idx=self.slots.int(),
                causal=False).transpose(1, 2)
        self.write(layer, k, v)
        keys = self.keys[layer, self.slots, :self.length].transpose(1, 2)
        values = self.values[layer, self.slots, :self.length].transpose(1, 2)
        return attend(q, keys, values, self.mask)


try:  # optional: needs CUDA and a compiler
    from flash_attn import flash_attn_with_kvcache
except ImportError:
    flash_attn_with_kvcache = None

# ------------------------------------------------------------------------------------------------------------
# The network.


def rotary(position, head_dim, theta):
    """Rotary cosines and sines, in the halves convention: position (B, T) -> two float32 (B, 1, T, D)."""
    frequency = theta ** (
        -torch.arange(0, head_dim, 2, device=position.device, dtype=torch.float32) / head_dim)
    angle = position[:, None, :, None].float() * frequency  # (B, 1, T, D / 2)
    angle = torch.cat([angle, angle], dim=-1)
    return angle.cos(), angle.sin()


def rotate(x, cos, sin):
    """Turns x (B, H, T, D) by its position, computed in float32."""
    left, right = x.float().chunk(2, dim=-1)
    return (x * cos + torch.cat([-right, left], dim=-1) * sin).to(x.dtype)


class Layer(nn.Module):
    """One transformer layer: attention, then a gated feed-forward, each behind its RMSNorm."""

    def __init__(self, config, number):
        super().__init__()
        C, D = config.hidden_size, config.head_dim
        bias = config.switches.has_qkv_bias
        self.number, self.head_dim = number, D
        self.recomputes = False  # --recompute: keep the input alone, and compute the activations again
        self.attention_norm = nn.RMSNorm(C, eps=config.rms_norm_eps)
        self.q_proj = nn.Linear(C, config.num_heads * D, bias=bias)
        self.k_proj = nn.Linear(C, config.num_kv_heads * D, bias=bias)
        self.v_proj = nn.Linear(C, config.num_kv_heads * D, bias=bias)
        self.o_proj = nn.Linear(config.num_heads * D, C, bias=False)
        if config.switches.has_qk_norm:
            self.q_norm = nn.RMSNorm(D, eps=config.rms_norm_eps)
            self.k_norm = nn.RMSNorm(D, eps=config.rms_norm_eps)
        else:
            self.q_norm = self.k_norm = nn.Identity()
        self.mlp_norm = nn.RMSNorm(C, eps=config.rms_norm_eps)
        self.gate_proj = nn.Linear(C, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(C, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, C, bias=False)

    def forward(self, x, cos, sin, mask, cache):
        """x (B, T, C) -> (B, T, C). With a cache, k and v are stored in it; without a mask, read from it."""
        if self.recomputes and torch.is_grad_enabled():
            return checkpoint(self.compute, x, cos, sin, mask, cache, use_reentrant=False)
        return self.compute(x, cos, sin, mask, cache)

    def compute(self, x, cos, sin, mask, cache):
        """The layer itself."""
        B, T, _ = x.shape
        h = self.attention_norm(x)
        # (B, H, T, D)
        q = rotate(self.q_norm(self.q_proj(h).view(B, T, -1, self.head_dim)).transpose(1, 2), cos, sin)
        k = rotate(self.k_norm(self.k_proj(h).view(B, T, -1, self.head_dim)).transpose(1, 2), cos, sin)
        v = self.v_proj(h).view(B, T, -1, self.head_dim).transpose(1, 2)
        if mask is None:
            out = cache.attend(self.number, q, k, v)
        else:
            out = attend(q, k, v, mask)
            if cache is not None:
                cache.write(self.number, k, v)
        x = x + self.o_proj(out.transpose(1, 2).reshape(B, T, -1))
        h = self.mlp_norm(x)
        return x + self.down_proj(F.silu(self.gate_proj(h)) * self.up_proj(h))


class BlockDiffusionLM(nn.Module):
    """The language model. `model(tokens)` gives logits; rollout, replay and value model build on `hidden`."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config, number) for number in range(config.num_layers))
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.head.weight = self.embed.weight

    @property
    def device(self):
        """Where the weights are."""
        return self.embed.weight.device

    def hidden(self, tokens, layout, cache=None, reads_cache=False, mask=None):
        """Final normalised states of rows laid out by `layout`: tokens int64 (B, T) -> (B, T, C).

        cache: a KVCache after `select`; keys and values are stored in it. reads_cache: the tokens are one
        block per slot and see the cache up to their own end (decoding) instead of one another by the rule
        (prefill). mask: the rule in another form than the dense one, from `block_mask`.
        """
        cos, sin = rotary(layout.position, self.config.head_dim, self.config.rope_theta)
        if mask is None and not reads_cache:
            mask = dense_mask(layout)
        x = self.embed(tokens)
        for layer in self.layers:
            x = layer(x, cos, sin, mask, cache)
        return self.norm(x)

    def forward(self, tokens):
        """Logits (B, T, V) for int64 tokens (B, T) under the model's own attention.

        logits[:, i] predict tokens[:, i] in every family: Dream's output is moved by one here (its position
        0, which nothing predicts, keeps its own). The mask token's logit is left as the network gives it.
        """
        position = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
        logits = self.head(self.hidden(
            tokens, Layout.clean(position, self.config.block_size, self.config.is_full)))
        if self.config.switches.shifts_logits:
            logits = torch.cat([logits[:, :1], logits[:, :-1]], dim=1)
        return logits


def policy_logits(logits, mask_id):
    """Float32 logits with the mask token ruled out: a policy never says it, in decoding and replay alike."""
    logits = logits.to(torch.float32, copy=True)
    logits[..., mask_id] = -math.inf
    return logits


def scaled_logits(h, weight, mask_id, temperature):
    """policy_logits / T of final states h (N, C): float32 (N, V), in memory of their own."""
    return policy_logits(F.linear(h, weight), mask_id).div_(temperature)


class TokenLogprobs(torch.autograd.Function):
    """token_logprobs with its own backward pass: logits live for one chunk at a time, and are made again.

    d logp / d logits = (one-hot of the token - softmax) / T, so nothing of size V outlives its chunk but the
    gradient of the head, which is added up in one place.
    """

    @staticmethod
    def forward(ctx, h, weight, tokens, mask_id, temperature, chunk):
        """h (N, C), weight (V, C), tokens (N,) -> log-probability and entropy, float32 (N,)."""
        ctx.save_for_backward(h, weight, tokens)
        ctx.settings = mask_id, temperature, chunk
        logp, entropy = h.new_empty(2, len(h), dtype=torch.float32)
        for start in range(0, len(h), chunk):
            cut = slice(start, start + chunk)
            logits = scaled_logits(h[cut], weight, mask_id, temperature)
            total = logits.logsumexp(-1, keepdim=True)
            logp[cut] = (logits.gather(-1, tokens[cut, None]) - total)[:, 0]
            entropy[cut] = torch.special.entr(logits.sub_(total).exp_()).sum(-1)
        ctx.mark_non_differentiable(entropy)  # a figure for the log, never trained on
        return logp, entropy

    @staticmethod
    def backward(ctx, grad, _):
        """Gradients of h and, unless the head is frozen, of its weight."""
        (h, weight, tokens), (mask_id, temperature, chunk) = ctx.saved_tensors, ctx.settings
        grad_h = torch.zeros_like(h)
        grad_weight = torch.zeros_like(weight) if ctx.needs_input_grad[1] else None
        for start in range(0, len(h), chunk):
            cut = slice(start, start + chunk)
            share = grad[cut, None] / temperature
            d = scaled_logits(h[cut], weight, mask_id, temperature).softmax(-1).mul_(-share)
            d = d.scatter_add_(-1, tokens[cut, None], share).to(h.dtype)
            grad_h[cut] = d @ weight
            if grad_weight is not None:
                grad_weight.addmm_(d.T, h[cut])
        return grad_h, grad_weight, None, None, None, None


def token_logprobs(model, h, tokens, temperature=1.0, max_logits=None):
    """Float32 log-probabilities of `tokens` (N,) and their distributions' entropies at final states h (N, C).

    At most max_logits logits live at a time (default 32 MiB, on a GPU 128): with V = 152k, those of 4,000
    positions with their gradient would take 9 GB. Temperature 0 stands for 1, as in decoding.
    """
    chunk = max(1, (max_logits or (2**25 if h.is_cuda else 2**23)) // model.config.vocab_size)
    return TokenLogprobs.apply(h, model.head.weight, tokens, model.config.mask_id, temperature or 1.0, chunk)


# ------------------------------------------------------------------------------------------------------------
# Checkpoints, in the layout Hugging Face gave each family.


def family_name(config, ours):
    """Our name in the family's spelling: layers.3.q_proj.weight -> model.layers.3.self_attn.q_proj.weight."""
    module, _, kind = ours.rpartition(".")
    parts = module.split(".")
    if parts[0] != "layers":
        return f"{config.switches.names[module]}.{kind}"
    return config.switches.names[f"layers.#.{parts[2]}"].replace("#", parts[1]) + f".{kind}"


def load_model(path_or_id, block_size=None, dtype=None, device=None):
    """Loads a checkpoint folder or hub id -> (BlockDiffusionLM, tokenizer or None).

    block_size: K, if not the checkpoint's own. dtype: of the weights in memory (default: as stored). device:
    default this process's GPU, else the CPU. Weights go shard by shard to where they are used; there is never
    a second copy. Raises FileNotFoundError or ValueError that names the missing file, weight, shape,
    model_type or mask token.
    """
    path = os.fspath(path_or_id)
    if not os.path.isdir(path):
        if os.path.exists(path) or path.startswith((".", "/", "~")) or path.count("/") != 1:
            raise FileNotFoundError(f"no checkpoint folder {path!r} (a hub id looks like JetLM/SDAR-4B-Chat)")
        path = snapshot_download(path, allow_patterns=["*.json", "*.safetensors", "*.txt", "*.jinja"])
    if not os.path.isfile(os.path.join(path, "config.json")):
        raise FileNotFoundError(f"{path} has no config.json: not a checkpoint folder")
    with open(os.path.join(path, "config.json"), encoding="utf-8") as file:
        config = ModelConfig.from_dict(json.load(file), block_size)
    tokenizer = load_tokenizer(path, config)
    config.eos_ids = find_eos_ids(path, config, tokenizer)
    with torch.device("meta"):
        model = BlockDiffusionLM(config)
    load_weights(model, path, dtype, torch.device(device) if device is not None else default_device())
    return model.eval(), tokenizer


def load_weights(model, path, dtype, device):
    """Fills a model built on the meta device from the safetensors shards of a folder."""
    shards = sorted(name for name in os.listdir(path) if name.endswith(".safetensors"))
    if not shards:
        raise FileNotFoundError(f"{path} holds no .safetensors file (pickled weights are never read)")
    shapes = {name: p.shape for name, p in model.named_parameters()}
    ours = {family_name(model.config, name): name for name in shapes}
    tied = family_name(model.config, "head.weight") if model.config.tie_word_embeddings else None
    len_source = model.config.source.get("vocab_size")
    found, unexpected = {}, []
    for shard in shards:
        with safe_open(os.path.join(path, shard), framework="pt", device=str(device)) as file:
            for theirs in file.keys():
                if theirs == tied or theirs.endswith(("rotary_emb.inv_freq", "value_head.weight")):
                    continue  # the same tensor as the embedding; a constant; the value model's own (value.py)
                if theirs not in ours:
                    unexpected.append(theirs)
                    continue
                name, tensor = ours[theirs], file.get_tensor(theirs)
                if name in found:
                    raise ValueError(f"{path}: {theirs} is in more than one file: "
                                     "is this two checkpoints in one folder?")
                if (name in ("embed.weight", "head.weight")
                        and len(tensor) == len_source < model.config.vocab_size):
                    # the mask token starts as the mean token
                    tensor = torch.cat([tensor, tensor.mean(0, keepdim=True)])
                if tensor.shape != shapes[name]:
                    raise ValueError(f"{path}: {theirs} has shape {tuple(tensor.shape)}, "
                                     f"config.json asks for {tuple(shapes[name])}")
                found[name] = torch.empty_like(tensor, dtype=dtype or tensor.dtype).copy_(tensor)
    missing = [theirs for theirs, name in ours.items() if name not in found]
    if missing or unexpected:
        raise ValueError(f"{path} does not hold a {model.config.family} checkpoint: "
                         f"missing {missing[:5] or 'nothing'}, unexpected {unexpected[:5] or 'nothing'}")
    if model.config.tie_word_embeddings:
        found["head.weight"] = found["embed.weight"]
    model.load_state_dict(found, assign=True)
    if model.config.tie_word_embeddings:  # load_state_dict made two parameters of one tensor
        model.head.weight = model.embed.weight
    model.requires_grad_(True)


def load_tokenizer(path, config):
    """The folder's tokenizer, or None if it has none. Never runs code from the checkpoint."""
    if os.path.isfile(os.path.join(path, "tokenizer.json")):
        return PreTrainedTokenizerFast.from_pretrained(path)
    # SDAR, Dream: Qwen2's tokenizer
    if os.path.isfile(os.path.join(path, "vocab.json")) and config.switches.names is QWEN_NAMES:
        return Qwen2Tokenizer.from_pretrained(path)
    return None


def find_eos_ids(path, config, tokenizer):
    """Every id that ends a response, from the tokenizer, config.json and generation_config.json.

    The first is the one that sft.py teaches: the end of a chat turn, where the tokenizer has such a token.
    """
    vocabulary = tokenizer.get_vocab() if tokenizer is not None else {}
    ids = ([vocabulary[token] for token in ("<|im_end|>", "<|eot_id|>") if token in vocabulary]
           + list(config.eos_ids))
    generation = os.path.join(path, "generation_config.json")
    if os.path.isfile(generation):
        with open(generation, encoding="utf-8") as file:
            eos = json.load(file).get("eos_token_id")
        ids += eos if isinstance(eos, list) else [] if eos is None else [eos]
    if tokenizer is not None:
        ids += [vocabulary[token] for token in (tokenizer.eos_token, "<|endoftext|>") if token in vocabulary]
    return tuple(dict.fromkeys(ids))


def save_checkpoint(model, tokenizer, path, max_shard_size="5GB"):
    """Writes weights, config, tokenizer in the family's own layout; `load_model` reads them back bit for bit.

    The folder is written under a temporary name and renamed, so that `path` is whole or absent. To be called
    on every process: the first one writes. LoRA: the merged weights, and the adapter alone in path/adapter,
    in the layout of the peft library.
    """
    config, state = model.config, whole_state(model)
    if processes()[0] > 0:
        return
    # its code is not in this folder
    source = {name: value for name, value in config.source.items() if name != "auto_map"}
    source |= {"mask_token_id": config.mask_id, "block_size": config.block_size}
    source["embedding_size" if config.switches.names is LLADA_NAMES else "vocab_size"] = config.vocab_size
    partial = f"{path}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    os.makedirs(partial)
    if rank := lora_rank(model):
        save_adapter(config, state, rank, os.path.join(partial, "adapter"))
    state = merge_lora(state, rank)
    if config.tie_word_embeddings:
        del state["head.weight"]
    dtype = str(state["embed.weight"].dtype).removeprefix("torch.")
    save_torch_state_dict({family_name(config, name): p for name, p in state.items()}, partial,
                          max_shard_size=max_shard_size)
    source["dtype"] = source["torch_dtype"] = dtype
    with open(os.path.join(partial, "config.json"), "w", encoding="utf-8") as file:
        json.dump(source, file, indent=2)
    with open(os.path.join(partial, "generation_config.json"), "w", encoding="utf-8") as file:
        json.dump({"eos_token_id": list(config.eos_ids), "pad_token_id": config.pad_id}, file, indent=2)
    if tokenizer is not None:
        tokenizer.save_pretrained(partial)
    shutil.rmtree(path, ignore_errors=True)
    os.rename(partial, path)


def whole_state(model):
    """Parameters by our names, whole, of a model that may be sharded; on the first process only, if there
    are several. To be called on every process."""
    if not dist.is_initialized():
        return model.state_dict()
    return get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))


# ------------------------------------------------------------------------------------------------------------
# LoRA: the trunk stays as it is and takes no gradient; two thin matrices beside each linear layer learn.


LORA_ALPHA = 2  # times the rank: what B A x is scaled by, as is usual


class LoRALinear(nn.Linear):
    """W x + b + 2 B A x, frozen W and b; A (rank, in), B (out, rank), 0 at the start (arXiv 2106.09685)."""

    def forward(self, x):
        """x (..., in) -> (..., out)."""
        return super().forward(x) + LORA_ALPHA * F.linear(
            F.linear(x, self.lora_A.to(x.dtype)), self.lora_B.to(x.dtype))


def add_lora(model, rank, seed=0):
    """Freezes a BlockDiffusionLM; trainable float32 adapters go beside every linear layer but the head."""
    model.requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    for linear in [m for m in model.layers.modules() if isinstance(m, nn.Linear)]:
        linear.__class__ = LoRALinear
        A = torch.randn(rank, linear.in_features, generator=generator) / math.sqrt(linear.in_features)
        linear.lora_A = nn.Parameter(A.to(model.device))
        linear.lora_B = nn.Parameter(torch.zeros(linear.out_features, rank, device=model.device))


def lora_rank(model):
    """The rank of the model's adapters; 0 without."""
    return next((len(m.lora_A) for m in model.modules() if isinstance(m, LoRALinear)), 0)


def merge_lora(state, rank):
    """Adds each B A of a state to its W and drops A and B, in place -> the state of a plain model."""
    for name in [name for name in state if rank and name.endswith("lora_A")]:
        A, B = state.pop(name), state.pop(name.removesuffix("A") + "B")
        W = state[name.removesuffix("lora_A") + "weight"]
        state[name.removesuffix("lora_A") + "weight"] = (W.float() + LORA_ALPHA * B @ A).to(W.dtype)
    return state


def save_adapter(config, state, rank, folder):
    """Writes the adapters of a state as adapter_model.safetensors and adapter_config.json."""
    os.makedirs(folder)
    tensors = {}
    for name, p in state.items():
        module, _, kind = name.rpartition(".")
        if kind.startswith("lora_"):
            theirs = family_name(config, f"{module}.{kind}")  # model.layers.0.self_attn.q_proj.lora_A
            tensors[f"base_model.model.{theirs}.weight"] = p.contiguous()
    save_file(tensors, os.path.join(folder, "adapter_model.safetensors"))
    targets = [re.escape(theirs).replace(r"\#", r"\d+")
               for ours, theirs in config.switches.names.items() if ours.endswith("_proj")]
    write_json(os.path.join(folder, "adapter_config.json"), dict(
        peft_type="LORA", task_type="CAUSAL_LM", base_model_name_or_path=None, r=rank, bias="none",
        lora_alpha=LORA_ALPHA * rank, target_modules="|".join(targets)))


# ------------------------------------------------------------------------------------------------------------
# The tiny model of the embedded default: a checkpoint like any other, only small.


def tiny_tokenizer():
    """One token per character of the embedded arithmetic, and one for \\boxed{. A Hugging Face tokenizer.

    Its chat template keeps the first line of a message: the instruction that follows the problem in a real
    prompt ("Please reason step by step ...") would be unknown words to a model of 18 tokens.
    """
    words = ["<pad>", "<eos>", "<mask>", *"0123456789", "+", "=", ";", "\\boxed{", "}"]
    backend = Tokenizer(models.WordLevel(
        {word: number for number, word in enumerate(words)}, unk_token="<pad>"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"\\boxed\{|[\s\S]"), "isolated")
    backend.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>",
                                        mask_token="<mask>")
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'].split('\\n')[0] }}{% endfor %}"
    return tokenizer


def tiny_model(seed=0, block_size=4, attention="block"):
    """A randomly initialised model for the tokenizer above, about 100k parameters, float32 on the CPU."""
    num_layers, hidden_size, vocab_size = 2, 64, len(tiny_tokenizer())
    source = dict(block_size=block_size, mask_token_id=2, eos_token_id=1, pad_token_id=0,
                  rms_norm_eps=1e-6, rope_theta=1e4, hidden_act="silu")
    if attention == "full":
        source.update(model_type="llada", d_model=hidden_size, n_layers=num_layers, n_heads=4, n_kv_heads=4,
                      mlp_hidden_size=3 * hidden_size, embedding_size=vocab_size, weight_tying=False)
    else:
        source.update(model_type="sdar", hidden_size=hidden_size, num_hidden_layers=num_layers,
                      num_attention_heads=4, num_key_value_heads=2, head_dim=hidden_size // 4,
                      intermediate_size=3 * hidden_size, vocab_size=vocab_size, tie_word_embeddings=False,
                      architectures=["SDARForCausalLM"])
    model = BlockDiffusionLM(ModelConfig.from_dict(source))
    initialize(model, seed)
    return model


def initialize(model, seed):
    """Fills all weights: norms 1, biases 0, matrices N(0, 0.02), residual outputs smaller, as in GPT-2."""
    generator = torch.Generator().manual_seed(seed)
    for name, p in model.named_parameters():
        if p.dim() == 1:
            nn.init.constant_(p, 0.0 if name.endswith("bias") else 1.0)
        else:
            std = (0.02 / math.sqrt(2 * model.config.num_layers)
                   if "o_proj" in name or "down_proj" in name else 0.02)
            nn.init.normal_(p, std=std, generator=generator)


# ------------------------------------------------------------------------------------------------------------
# Where it runs: processes, the optimizer step, the run folder.


def start_processes(is_tiny=False, needs_group=False):
    """Joins torchrun's process group, if there is one. needs_group: makes a group of one, if there is none.

    is_tiny: one thread per process. For 100k parameters a second core saves a fifth of the time, and costs
    fifty times as much as soon as another program wants it (threads that wait for each other spin).
    """
    if is_tiny:
        torch.set_num_threads(1)
    is_alone = int(os.environ.get("WORLD_SIZE", 1)) == 1
    if is_alone and not needs_group or dist.is_initialized():
        return
    is_cuda, local = torch.cuda.is_available(), int(os.environ.get("LOCAL_RANK", 0))
    if is_cuda and local >= torch.cuda.device_count():
        raise ValueError(
            f"process {local} of this machine has no GPU: there are {torch.cuda.device_count()}. "
            "Start fewer processes, or hide the GPUs with CUDA_VISIBLE_DEVICES= to run on the CPU")
    if is_cuda:
        torch.cuda.set_device(local)
    alone = dict(store=dist.HashStore(), rank=0, world_size=1) if is_alone else {}
    # two hours: the others wait for the longest rollout
    dist.init_process_group("nccl" if is_cuda else "gloo", timeout=timedelta(hours=2), **alone)


def end_processes():
    """Leaves the process group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()


def default_device():
    """This process's GPU if there is one, else the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    return torch.device("cpu")


def processes():
    """(rank, number of processes); (0, 1) without torchrun."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def gather_lists(own):
    """All processes' lists, dealt out as items[rank::number], in the original order, on every process."""
    rank, number = processes()
    if number == 1:
        return own
    parts = [None] * number
    dist.all_gather_object(parts, own)
    merged = [None] * sum(map(len, parts))
    for rank, part in enumerate(parts):
        merged[rank::number] = part
    return merged


def over_processes(combine, *numbers):
    """`combine` (sum or max) of Python numbers over all processes, as floats."""
    return [float(combine(column)) for column in zip(*gather_lists([numbers]))]


def shard(model, layers, dtype=torch.float32):
    """Shards parameters, gradients and optimizer states over all processes (FSDP2), layer by layer, in place.

    dtype: what layers compute in. The sharded weights are float32 whatever it is, and gradients are added up
    in float32: they are sums over tokens (see `optimizer_step`), so no process average is taken. Frozen
    weights (LoRA) stay whole on every process. Without a process group this does nothing.
    """
    if not dist.is_initialized():
        return
    mesh = init_device_mesh(default_device().type, (processes()[1],))
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    frozen = {p for p in model.parameters() if not p.requires_grad}
    for module in [*layers, model]:
        for p in module.parameters():
            p.data = p.data.float() if p.requires_grad and not isinstance(p, DTensor) else p.data
        fully_shard(module, mesh=mesh, mp_policy=policy, ignored_params=frozen)
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)
    if hasattr(model, "hidden"):
        register_fsdp_forward_method(model, "hidden")


@contextmanager
def unsharded(model):
    """Inside, every process holds the whole weights, and may run as many forwards as it likes: no layer
    waits for another process. Nothing to do for a model that is not sharded."""
    parts = [module for module in model.modules() if isinstance(module, FSDPModule)]
    for part in parts:
        part.unshard()
        part.set_reshard_after_forward(False, recurse=False)
    try:
        yield
    finally:
        for part in parts:
            part.set_reshard_after_forward(part is not model, recurse=False)
            part.reshard()


MAX_SKIPPED = 5  # updates in a row whose gradient is not finite, before the run stops


def optimizer_step(model, optimizer, max_norm):
    """Clips the gradient to a norm common to all processes and steps -> (norm, whether it stepped).

    The losses are sums over this process's tokens divided by the number of tokens of ALL processes, so
    gradients add, they are not averaged (`shard` sees to that during the backward pass). A norm that is not
    finite skips the update, on every process alike; RuntimeError after MAX_SKIPPED in a row.
    """
    norm = nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], max_norm)
    norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
    is_finite = bool(norm.isfinite())
    optimizer.num_skipped = 0 if is_finite else getattr(optimizer, "num_skipped", 0) + 1
    if is_finite:
        optimizer.step()
    else:
        say(f"the gradient norm is {float(norm)}: update skipped ({optimizer.num_skipped} in a row)")
    optimizer.zero_grad(set_to_none=True)
    if optimizer.num_skipped >= MAX_SKIPPED:
        raise RuntimeError(f"{MAX_SKIPPED} updates in a row had a gradient that is not finite: "
                           "lower the learning rate")
    return float(norm), is_finite


def make_optimizer(model, lr, betas, weight_decay=0.0):
    """AdamW on the trainable parameters; decay on matrices only."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [dict(params=[p for p in parameters if p.dim() >= 2], weight_decay=weight_decay),
              dict(params=[p for p in parameters if p.dim() < 2], weight_decay=0.0)]
    return torch.optim.AdamW(groups, lr=lr, betas=betas, fused=True)


def add_flag(parser, name, kind, embedded, paper, text, *other_names, **more):
    """A flag with two defaults: of the embedded task, and of a run with --model. Both None: see the text."""
    if kind is bool:
        parser.add_argument(name, action="store_true", help=text)
        return
    both = f"{embedded!r}" if embedded == paper else f"{embedded!r}, with --model {paper!r}"
    action = parser.add_argument(name, *other_names, type=kind, default=None,
                                 help=f"{text} (default {both})".replace("%", "%%"), **more)
    action.pair = (embedded, paper)


def fill_defaults(parser, argv):
    """Parses, and gives every flag that was not set its default for the case at hand."""
    args = parser.parse_args(argv)
    for action in parser._actions:
        if hasattr(action, "pair") and getattr(args, action.dest) is None:
            setattr(args, action.dest, action.pair[args.model is not None])
    return args


def load_to_train(args, path=None):
    """load_model for training, by --dtype, --lora_rank and --recompute. Not sharded yet: see `shard`.

    Full training on several GPUs reads the checkpoint as it is into main memory, from where `shard` takes
    each process's part. A frozen trunk has the dtype of its computations, and stays whole on every GPU.
    """
    if args.lora_rank or not dist.is_initialized():
        dtype, device = getattr(torch, args.dtype if args.lora_rank else "float32"), None
    else:
        dtype, device = None, "cpu"
    model, tokenizer = load_model(path or args.model, args.block_size, dtype, device)
    if args.lora_rank:
        add_lora(model, args.lora_rank, args.seed)
    for layer in model.layers:
        layer.recomputes = args.recompute
    return model, tokenizer


def barrier():
    """Waits for the other processes."""
    if processes()[1] > 1:
        dist.barrier()


def progress(items, name):
    """A tqdm bar on the first process, if someone is watching a terminal."""
    return tqdm(items, desc=name, disable=None if processes()[0] == 0 else True, mininterval=1)


def say(text):
    """Prints on the first process only, above a progress bar if there is one."""
    if processes()[0] == 0:
        tqdm.write(text)


def write_json(path, value):
    """Writes JSON under a temporary name, then renames: a reader never sees half a file."""
    with open(f"{path}.partial", "w", encoding="utf-8") as file:
        json.dump(value, file, indent=2)
    os.replace(f"{path}.partial", path)


# of LoRA, the adapters alone: the frozen trunk is in --model already
TRAINED_ONLY = StateDictOptions(ignore_frozen_params=True, strict=False)


def train_state(trainers):
    """Weights and optimizer states of (model, optimizer) pairs, for torch.distributed.checkpoint."""
    out = {}
    for number, (model, optimizer) in enumerate(trainers):
        is_fresh = not optimizer.state
        weights, moments = get_state_dict(model, optimizer, options=TRAINED_ONLY)
        out[str(number)] = dict(model=weights, optimizer=moments)
        for state in optimizer.state.values() if is_fresh else []:
            state["step"].zero_()  # get_state_dict made a step of size 0 to have moments: it does not count
    return out


class RunLog:
    """runs/<name>/ on the first process: args.json, and a file of JSON lines.

    is_resumed: lines that are there already are kept, if they come from the same settings; else an error.
    """

    def __init__(self, folder, args, name="metrics.jsonl", is_resumed=False):
        self.folder, self.path, self.is_writer = folder, os.path.join(folder, name), processes()[0] == 0
        if not self.is_writer:
            return
        try:
            os.makedirs(folder, exist_ok=True)
            open(self.path, "a", encoding="utf-8").close()
        except OSError as error:
            raise ValueError(f"cannot write to {folder} ({error.strerror}): "
                             "run this from a folder of your own, or free the name") from error
        settings = os.path.join(folder, "args.json")
        if is_resumed and os.path.isfile(settings):
            with open(settings, encoding="utf-8") as file:
                old = json.load(file)
            if old != json.loads(json.dumps(args)):
                changed = sorted(name for name in {*old, *args} if old.get(name) != args.get(name))
                raise ValueError(f"{folder} holds a run with other settings ({', '.join(changed)}): "
                                 "choose another --run_name")
        write_json(settings, args)
        if not is_resumed:  # a new run of the same name: nothing of the old one stays to be mixed up with it
            shutil.rmtree(os.path.join(folder, "checkpoints"), ignore_errors=True)
            for old in {"summary.json", "curves.png", "trace.html"} & set(os.listdir(folder)):
                os.remove(os.path.join(folder, old))
            open(self.path, "w", encoding="utf-8").close()

    def write(self, line):
        """Appends one line."""
        if self.is_writer:
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")

    def read(self):
        """The lines so far, on every process; a last line that was cut off by a crash is dropped."""
        lines = []
        if self.is_writer and os.path.isfile(self.path):
            with open(self.path, encoding="utf-8") as file:
                whole = [line for line in file if line.endswith("\n")]
            lines = [json.loads(line) for line in whole]
            with open(self.path, "w", encoding="utf-8") as file:
                file.writelines(whole)
        if processes()[1] > 1:
            box = [lines]
            dist.broadcast_object_list(box)
            lines = box[0]
        return lines

    def checkpoints(self):
        """Paths of the whole checkpoints, by step. (A half-written one is still called .partial.)"""
        folder = os.path.join(self.folder, "checkpoints")
        names = os.listdir(folder) if os.path.isdir(folder) else []
        steps = sorted(int(name.removeprefix("step-")) for name in names if re.fullmatch(r"step-\d+", name))
        return [os.path.join(folder, f"step-{step}") for step in steps]

    def save_checkpoint(self, tokenizer, trainers, progress, keep, write_more=None):
        """Saves checkpoints/step-<progress["step"]>: the first model of `trainers` in its Hugging Face
        layout, and in train_state/ all that `restore` needs. Written aside, then renamed; all but the newest
        `keep` are deleted after.

        trainers: (model, optimizer) pairs. progress: JSON values. write_more(folder) may add its own files.
        """
        path = os.path.join(self.folder, "checkpoints", f"step-{progress['step']}")
        try:
            save_checkpoint(trainers[0][0], tokenizer, f"{path}.partial")
            if write_more is not None:
                write_more(f"{path}.partial")
            barrier()
            dcp.save(train_state(trainers), checkpoint_id=os.path.join(f"{path}.partial", "train_state"),
                     no_dist=not dist.is_initialized())
            barrier()
            if self.is_writer:
                write_json(os.path.join(f"{path}.partial", "train_state", "progress.json"), progress)
                shutil.rmtree(path, ignore_errors=True)
                os.rename(f"{path}.partial", path)
        except (OSError, SafetensorError, CheckpointException) as error:
            shutil.rmtree(f"{path}.partial", ignore_errors=True)
            shutil.rmtree(f"{path}.partial.partial", ignore_errors=True)
            raise RuntimeError(
                f"{path} could not be written ({error}): free some space and go on with --resume; "
                f"earlier checkpoints are whole: {self.checkpoints()}") from error
        if self.is_writer:
            for old in self.checkpoints()[:-keep]:
                shutil.rmtree(old)
        barrier()

    def restore(self, trainers):
        """Loads the newest checkpoint into the models and optimizers, and cuts metrics.jsonl back to its step
        -> its progress, or None where there is no checkpoint yet. Raises ValueError for a checkpoint without
        train state."""
        barrier()
        if not (paths := self.checkpoints()):
            if self.is_writer:
                open(self.path, "w", encoding="utf-8").close()
            return None
        folder = os.path.join(paths[-1], "train_state")
        if not os.path.isfile(os.path.join(folder, "progress.json")):
            raise ValueError(f"{paths[-1]} has no train_state to resume from: "
                             "use it with --model, or remove it")
        state = train_state(trainers)
        try:
            dcp.load(state, checkpoint_id=folder, no_dist=not dist.is_initialized())
            for (model, optimizer), part in zip(trainers, state.values()):
                set_state_dict(model, optimizer, model_state_dict=part["model"],
                               optim_state_dict=part["optimizer"], options=TRAINED_ONLY)
        except (OSError, CheckpointException, RuntimeError, ValueError) as error:
            reason = str(error).strip().partition("\n")[0]
            raise ValueError(f"{paths[-1]} cannot be resumed from ({reason}): it is of another model, "
                             "or damaged. Move it away to go on from the one before") from error
        with open(os.path.join(folder, "progress.json"), encoding="utf-8") as file:
            progress = json.load(file)
        lines = [line for line in self.read() if line["step"] <= progress["step"]]
        if self.is_writer:
            with open(self.path, "w", encoding="utf-8") as file:
                file.writelines(json.dumps(line) + "\n" for line in lines)
        barrier()
        return progress

    def finish(self, summary):
        """Writes summary.json."""
        if not self.is_writer:
            return
        write_json(os.path.join(self.folder, "summary.json"), summary)

    def plot(self):
        """Draws every number of the log against the step, in curves.png."""
        if not self.is_writer:
            return
        with open(self.path, encoding="utf-8") as file:
            lines = [json.loads(line) for line in file]
        names = sorted({name for line in lines for name in line} - {"step"})
        figure = Figure(figsize=(12, 2.2 * -(-len(names) // 3)), layout="constrained")
        for number, name in enumerate(names):
            axes = figure.add_subplot(-(-len(names) // 3), 3, number + 1)
            points = [(line["step"], line[name]) for line in lines if name in line]
            axes.plot(*zip(*points), marker="." if len(points) < 30 else None)
            axes.set_title(name, fontsize=9)
        figure.savefig(os.path.join(self.folder, "curves.png"), dpi=80)

    def files(self):
        """What the folder holds."""
        return sorted(os.listdir(self.folder)) if self.is_writer else []
