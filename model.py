"""model.py - a transformer that sees whole blocks.

A block diffusion language model is an ordinary decoder-only transformer with three changes:

  1. It has a mask token, "?" below. The network's output at position i predicts the token AT position i.
     (Dream is different: see shifts_logits below.)
  2. Attention looks back by whole blocks of K tokens, not by single tokens.
  3. A training row holds the clean text and, behind it, *views*. A view is a copy of one block with some or
     all of its tokens masked. In TraceRL it shows the block in a state of its decoding. In fine-tuning the
     masks are random.

Changes 2 and 3 are one rule over three small numbers of every token: its document, its block and its view.
The document is the text to which it belongs. The picture shows the rule for one document. It is the prompt
894+396= with its first response block `1 0 1 ;`, and K is 4. An x means that the token on the left may see
the token on top.

                     clean text          views of block 2
                     894+ 396= 101;      ????  1?1?  1?1;
      894+  block 0  xxxx                                   view 0   A clean token sees the clean blocks
      396=  block 1  xxxx xxxx                              view 0   before it, and its own block.
      101;  block 2  xxxx xxxx xxxx                         view 0
      ????  block 2  xxxx xxxx           xxxx               view 1   A view sees the clean blocks before it,
      1?1?  block 2  xxxx xxxx                 xxxx         view 2   and itself. It sees no other view,
      1?1;  block 2  xxxx xxxx                       xxxx   view 3   and not the finished block 101;

(In a real row the clean block `101;` is there only if more blocks follow. It is drawn to show what it sees.)
The rule has two cases because decoding has two sources: the cache of clean blocks, and the block itself in
its present state. The same rule governs prefill, decoding, replay and fine-tuning. Dream and LLaDA use full
attention, where every token sees every token. For attention the whole text then counts as one block.

Read in this order: ModelConfig, Layout, may_attend, dense_mask, attention, KVCache, Layer, BlockDiffusionLM,
policy_logits, token_logprobs, Targets, Row, pad.

Left out: dropout, rope scaling, sliding windows, mixture-of-experts layers, tensor parallelism.
In other files:
  1. reading and writing checkpoints: plumbing/checkpoints.py; the families: plumbing/families.py;
  2. fast attention and log-probabilities, the same up to rounding: plumbing/kernels.py;
  3. LoRA, and sharding over several GPUs: plumbing/parallel.py.

In shapes, single capital letters are sizes, the same in every file. (In formulas, T is the temperature, R a
return, A an advantage, V a value, and L the loss.)
  B rows            T tokens in a row   P prompt tokens   R response tokens   K tokens per block
  S trace steps     V vocabulary        C channels        H heads             D channels of a head
  G responses per prompt                N items of a list, such as targets
In loss functions, n is the number of targets in one micro-batch, and N that in the whole update.
"""

import math
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint


@dataclass
class ModelConfig:
    """Everything the network needs to know. plumbing/families.py makes one from a config.json."""

    vocab_size: int  # V
    hidden_size: int  # C
    num_layers: int
    num_heads: int  # H
    num_kv_heads: int  # heads of keys and values; H / num_kv_heads query heads share each of them
    head_dim: int  # D
    intermediate_size: int  # channels inside the feed-forward
    mask_id: int  # the token "?"
    is_full: bool = False  # True: every token sees every token (Dream, LLaDA). False: block attention
    block_size: int = 4  # K. With full attention: how many positions are decoded together
    has_qk_norm: bool = True  # RMSNorm on every head of q and k, before the rotation (Qwen3, SDAR)
    has_qkv_bias: bool = False  # True for Qwen2 and Dream
    # Dream was made from an autoregressive model, and kept its habit: the output at position i predicts the
    # token at i + 1. So the prediction for position i is read at output i - 1.
    shifts_logits: bool = False
    rms_norm_eps: float = 1e-6
    rope_theta: float = 1e6
    tie_word_embeddings: bool = False  # True: the embedding and the head are one matrix
    pad_id: int = 0  # fills what is left of a batch. LLaDA also learns to write it behind eos, see sft.py
    eos_ids: tuple = ()  # any of these ends a response; sft.py teaches the first
    family: str = "sdar"  # the family of the checkpoint: how weights are named in its files
    source: dict = field(default_factory=dict)  # config.json as it was read; saving writes it again
    # The tokenizer's files and the code beside the weights: name -> content. Saving writes them again. They
    # are kept here because the folder may be gone by then: a run deletes its older checkpoints.
    files: dict = field(default_factory=dict, repr=False)

    def __post_init__(self):
        """ValueError for settings that do not fit together."""
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
    """Where each token of a batch of rows stands. All four are int64 (B, T).

    position  absolute position in prompt + response, for the rotary embedding
    document  the number of the text to which it belongs. Each `Row` (see below) is one text. A row of the
              tensor may hold several of them, end to end (plumbing/packing.py). -1 is padding
    block     position // K. With full attention it is 0 everywhere
    view      0 for clean text; v > 0 for the v-th view of its text
    """

    position: torch.Tensor
    document: torch.Tensor
    block: torch.Tensor
    view: torch.Tensor

    @classmethod
    def clean(cls, position, block_size, is_full):
        """The layout of plain text without views, by its positions (B, T). Training rows have their own."""
        zero = torch.zeros_like(position)
        # Blocks are cut at ABSOLUTE positions 0, K, 2K, ..., and not at the start of the response. With P = 9
        # and K = 4, positions 8 to 11 are one block: one prompt token and three response tokens.
        block = zero if is_full else position // block_size
        return cls(position, zero, block, zero)


def may_attend(query, key):
    """THE rule: whether a query token may see a key token. Takes Layouts that broadcast, gives bool.

    Inside one document, a token sees the clean tokens of earlier blocks. It also sees its own block in its
    own view. What this means in each use:
    - Plain text, prefill: every token has view 0, so attention is causal by blocks. With K = 1 it is
      ordinary causal attention.
    - Decoding: the block being decoded is one view, and the KV cache holds the clean blocks before it. So the
      cache holds just what the rule allows, and decoding need not call this function.
    - Replay, fine-tuning: many views share one clean text, and no view sees another.
    - Full attention: all is block 0. A view is the whole text, prompt and response, and sees all of itself
      and nothing else.
    """
    is_clean_past = (key.view == 0) & (key.block < query.block)
    is_together = (key.view == query.view) & (key.block == query.block)
    return (key.document == query.document) & (is_clean_past | is_together)


def dense_mask(layout):
    """The rule as a boolean mask (B, 1, T, T): queries down, keys across."""
    query = Layout(*(numbers[:, :, None] for numbers in layout))  # (B, T, 1) each
    key = Layout(*(numbers[:, None, :] for numbers in layout))  # (B, 1, T) each
    return may_attend(query, key)[:, None]


# ------------------------------------------------------------------------------------------------------------
# How the network attends. Its method `states` and every layer are given an `attend`. It is a function of
# (layer number, q, k, v) that returns out, with q and out (B, H, T, D), k and v (B, H_kv, T, D). Three are
# made here:
#     attend_by_rule(layout)   the tokens of each row see one another, by the rule        (training, replay)
#     cache.read               a block with masks sees the cached clean blocks, and itself (denoising)
#     cache.append             a clean block does the same, and then stays in the cache   (after denoising)


def attention(q, k, v, mask=None):
    """Softmax attention: q (B, H, T, D), k and v (B, H_kv, T', D), mask bool or None -> (B, H, T, D)."""
    if q.is_cuda and mask is not None and q.shape[1] != k.shape[1]:
        # With a mask, CUDA's fast kernels need a key for every head of the queries.
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=q.shape[1] != k.shape[1])


def attend_by_rule(layout):
    """An `attend` in which the tokens of each row see one another by the rule."""
    mask = dense_mask(layout)  # made once, and used by every layer
    return lambda layer, q, k, v: attention(q, k, v, mask)


class KVCache:
    """Keys and values of the clean blocks of ONE sequence, layer by layer.

    Clean tokens never see a later block. So their keys and values never change again, and they are computed
    once. A block that still holds masks must not stay here: its keys are those of the mask tokens.
    """

    def __init__(self):
        self.keys = {}  # layer number -> (1, H_kv, tokens so far, D)
        self.values = {}

    def joined(self, layer, k, v):
        """The cached keys and values of a layer, followed by those of the present block."""
        if layer not in self.keys:
            return k, v
        return torch.cat([self.keys[layer], k], dim=2), torch.cat([self.values[layer], v], dim=2)

    def read(self, layer, q, k, v):
        """An `attend` for a block with masks, which is not kept: it sees the cache and itself."""
        # No mask is needed: all that the cache holds lies before this block, and is clean.
        return attention(q, *self.joined(layer, k, v))

    def append(self, layer, q, k, v):
        """An `attend` for a clean block: it sees the cache and itself, and its keys and values are kept."""
        self.keys[layer], self.values[layer] = self.joined(layer, k, v)
        return attention(q, self.keys[layer], self.values[layer])


# ------------------------------------------------------------------------------------------------------------
# The network.


def rotary(position, head_dim, theta):
    """Rotary cosines and sines of positions (B, T) -> two float32 (B, 1, T, D)."""
    exponent = torch.arange(0, head_dim, 2, device=position.device, dtype=torch.float32) / head_dim
    frequency = theta ** -exponent  # (D / 2,)
    angle = position[:, None, :, None].float() * frequency  # (B, 1, T, D / 2)
    angle = torch.cat([angle, angle], dim=-1)  # (B, 1, T, D)
    return angle.cos(), angle.sin()


# The next two have no weights. They are modules so that each can be compiled into one kernel for a GPU.


class Rotation(nn.Module):
    """Turns the channels of q or k by an angle that grows with the position (RoPE)."""

    def forward(self, x, cos, sin):
        """x (B, H, T, D) -> the same shape and dtype, computed in float32."""
        # The checkpoints use the halves convention: channel i turns with channel i + D/2, not with i + 1.
        left, right = x.float().chunk(2, dim=-1)
        return (x * cos + torch.cat([-right, left], dim=-1) * sin).to(x.dtype)


class SwiGLU(nn.Module):
    """The gated activation of the feed-forward: silu(gate) * up."""

    def forward(self, gate, up):
        """Two (B, T, intermediate_size) -> the same shape."""
        return F.silu(gate) * up


class Layer(nn.Module):
    """One transformer layer: attention, then a gated feed-forward. Each normalises its input first."""

    def __init__(self, config, number):
        super().__init__()
        C = config.hidden_size
        D = config.head_dim
        self.number = number
        self.head_dim = D
        self.has_gradient_checkpointing = False  # set by --gradient_checkpointing, see plumbing/machine.py
        self.attention_norm = nn.RMSNorm(C, eps=config.rms_norm_eps)
        self.q_proj = nn.Linear(C, config.num_heads * D, bias=config.has_qkv_bias)
        self.k_proj = nn.Linear(C, config.num_kv_heads * D, bias=config.has_qkv_bias)
        self.v_proj = nn.Linear(C, config.num_kv_heads * D, bias=config.has_qkv_bias)
        self.o_proj = nn.Linear(config.num_heads * D, C, bias=False)
        self.q_norm = nn.RMSNorm(D, eps=config.rms_norm_eps) if config.has_qk_norm else nn.Identity()
        self.k_norm = nn.RMSNorm(D, eps=config.rms_norm_eps) if config.has_qk_norm else nn.Identity()
        self.rotate = Rotation()
        self.mlp_norm = nn.RMSNorm(C, eps=config.rms_norm_eps)
        self.gate_proj = nn.Linear(C, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(C, config.intermediate_size, bias=False)
        self.activation = SwiGLU()
        self.down_proj = nn.Linear(config.intermediate_size, C, bias=False)

    def forward(self, x, cos, sin, attend):
        """x (B, T, C) -> (B, T, C).

        With gradient checkpointing only x is kept, and the backward pass computes everything else again. That
        is slower by about a third, and needs a fraction of the memory.
        """
        if self.has_gradient_checkpointing and torch.is_grad_enabled():
            return checkpoint(self.compute, x, cos, sin, attend, use_reentrant=False,
                              preserve_rng_state=False)
        return self.compute(x, cos, sin, attend)

    def compute(self, x, cos, sin, attend):
        """Attention through `attend`, then feed-forward. Checkpointing calls it a second time in backward."""
        B, T, _ = x.shape
        h = self.attention_norm(x)
        q = self.q_norm(self.q_proj(h).view(B, T, -1, self.head_dim)).transpose(1, 2)  # (B, H, T, D)
        k = self.k_norm(self.k_proj(h).view(B, T, -1, self.head_dim)).transpose(1, 2)  # (B, H_kv, T, D)
        v = self.v_proj(h).view(B, T, -1, self.head_dim).transpose(1, 2)  # (B, H_kv, T, D)
        out = attend(self.number, self.rotate(q, cos, sin), self.rotate(k, cos, sin), v)  # (B, H, T, D)
        x = x + self.o_proj(out.transpose(1, 2).reshape(B, T, -1))
        h = self.mlp_norm(x)  # (B, T, C)
        return x + self.down_proj(self.activation(self.gate_proj(h), self.up_proj(h)))


class BlockDiffusionLM(nn.Module):
    """The language model. `states` is its forward pass, on which rollout, replay and value model build."""

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

    def states(self, tokens, position, attend):
        """Final normalised states of int64 tokens (B, T) at absolute positions (B, T) -> (B, T, C).

        attend: see "How the network attends". The head is not applied here. It is by far the widest layer
        (151,936 outputs for Qwen), and its logits are wanted at few positions only.
        """
        cos, sin = rotary(position, self.config.head_dim, self.config.rope_theta)
        x = self.embed(tokens)  # (B, T, C)
        for layer in self.layers:
            x = layer(x, cos, sin, attend)
        return self.norm(x)

    def forward(self, tokens):
        """Logits (B, T, V) of plain text, int64 tokens (B, T). Used to compare this network with others.

        logits[:, i] predict tokens[:, i] in every family: Dream's outputs are moved by one position here. The
        mask token's logit is left as the network gives it.
        """
        position = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
        layout = Layout.clean(position, self.config.block_size, self.config.is_full)
        logits = self.head(self.states(tokens, position, attend_by_rule(layout)))
        if self.config.shifts_logits:
            # Nothing predicts the token at position 0; it keeps its own output.
            logits = torch.cat([logits[:, :1], logits[:, :-1]], dim=1)
        return logits


# ------------------------------------------------------------------------------------------------------------
# From states to log-probabilities. Decoding and replay both go through `policy_logits`.


def policy_logits(model, states):
    """Logits of the policy at final states (N, C) -> float32 (N, V), with the mask token ruled out.

    If the mask token could be drawn, the text would then contain it for ever. Every later forward would take
    it for a position that is still to be filled.

    The logits are float32, even if the weights are bfloat16. A bfloat16 logit between 16 and 32 is a multiple
    of 0.125. A ratio exp(logp - logp_old) could then only move in steps of 13 percent, and the clip range is
    20 percent.
    """
    logits = states.float() @ model.head.weight.float().T
    logits[..., model.config.mask_id] = -math.inf
    return logits


def token_logprobs(model, states, tokens, temperature=1.0):
    """Log-probabilities of tokens (N,), and entropies of their distributions, at final states (N, C).

    Both are float32 (N,), with gradient. Temperature 0 (greedy decoding) counts as 1, as in `sample`.
    """
    logp = (policy_logits(model, states) / (temperature or 1.0)).log_softmax(-1)  # (N, V)
    p = logp.exp()
    # A token of probability 0 adds nothing to the entropy. Without the fill it would add 0 * -inf = NaN.
    entropy = -(p * logp.masked_fill(p == 0, 0)).sum(-1)
    return logp.gather(-1, tokens[:, None])[:, 0], entropy


# ------------------------------------------------------------------------------------------------------------
# What the network is given to train on. rollout.build_rows makes rows, as lists of numbers. `pad` makes a
# micro-batch of some of them. plumbing/packing.py chooses which, and has a fast twin of `pad` for a GPU.


class Targets(NamedTuple):
    """All that a loss needs to know of each predicted token.

    In a Row, each token to predict has a Targets of its own, made of plain numbers. In a micro-batch a single
    Targets serves all of them: each field is a tensor (N,), int64 for an int and float32 for a float. A float
    is 0 where nobody has filled it in. The fields step, view, group and logp are there for a loss of yours.
    Our own losses read none of them.
    """

    logit_index: int  # the output that predicts it, among T of a Row or B * T of a micro-batch
    token: int  # the token to predict
    rollout_index: int  # the number of its rollout in the list that build_rows was given
    response_index: int  # its index in that rollout's response
    step: int  # the denoising step that revealed it, counted from 1 over the whole response
    view: int  # the view that predicts it, counted from 1. With trace views this is its trace step
    group: int  # the number of its prompt in this RL step: responses of one group share it
    masked_share: float  # the masked fraction of the block's response tokens in this view
    logp: float  # its log-probability, recorded when it was drawn
    logp_old: float  # its log-probability in this view, before the updates of the RL step
    advantage: float  # see tracerl.give_advantages
    value_old: float  # the value model's estimate at the start of the RL step
    returns: float  # what the value model should have said


@dataclass
class Row:
    """One training row: four lists with a number per token, and its targets."""

    tokens: list = field(default_factory=list)
    position: list = field(default_factory=list)
    block: list = field(default_factory=list)
    view: list = field(default_factory=list)
    targets: list = field(default_factory=list)  # of Targets

    def add(self, tokens, block, view):
        """Appends one block: K tokens, or with full attention the whole text as block 0.

        A view gets the positions of the clean block of which it is a copy.
        """
        start = block * len(tokens)  # block 2 of K = 4 begins at position 8
        self.tokens += tokens
        self.position += range(start, start + len(tokens))
        self.block += [block] * len(tokens)
        self.view += [view] * len(tokens)


class Rows(NamedTuple):
    """A micro-batch of rows as tensors: tokens int64 (B, T), their layout, and their targets."""

    tokens: torch.Tensor
    layout: Layout
    targets: Targets


def pad(rows, pad_id, device):
    """Rows -> one micro-batch on a device, each row padded to the longest.

    Rows of 24 and 28 tokens become tensors (2, 28). Row 0 begins at place 0 of the 56 tokens, row 1 at 28.
    """
    longest = max(len(row.tokens) for row in rows)
    starts = [number * longest for number in range(len(rows))]
    return fill_rows(rows, starts, (len(rows), longest), pad_id, device)


def fill_rows(rows, starts, shape, pad_id, device):
    """A micro-batch of a shape (B, T) in which row n begins at place starts[n] of the B * T tokens."""
    size = shape[0] * shape[1]
    # At first all is padding. It belongs to document -1. Each padding token has a view of its own, so it sees
    # itself only. If it saw nothing, its output would be NaN.
    columns = dict(tokens=[pad_id] * size, position=[0] * size, document=[-1] * size, block=[0] * size,
                   view=list(range(1, size + 1)))
    targets = []
    for number, (row, start) in enumerate(zip(rows, starts)):
        stop = start + len(row.tokens)
        for name in ("tokens", "position", "block", "view"):
            columns[name][start:stop] = getattr(row, name)
        columns["document"][start:stop] = [number] * len(row.tokens)  # each row is a text of its own
        targets += [target._replace(logit_index=start + target.logit_index) for target in row.targets]
    tokens, *layout = (torch.tensor(column, device=device).view(shape) for column in columns.values())
    # From one Targets per token to one tensor per field.
    numbers = zip(*targets) if targets else [()] * len(Targets._fields)
    dtypes = [torch.int64 if kind is int else torch.float32 for kind in Targets.__annotations__.values()]
    return Rows(tokens, Layout(*layout), Targets(*(
        torch.tensor(column, dtype=dtype, device=device) for column, dtype in zip(numbers, dtypes))))
