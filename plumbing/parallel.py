"""plumbing/parallel.py - many processes: the group, sharding (FSDP2), the optimizer step, LoRA layers.

torchrun starts the processes, and they form one group. Work is dealt out by one rule, `deal`: item i goes to
process i modulo the number of processes. Losses are sums over a process's own tokens, divided by the token
count of ALL processes. So gradients are added up, never averaged. One process or eight compute the same
update, up to rounding.
"""

import functools
import math
import os
import sys
import warnings
from collections import OrderedDict
from contextlib import contextmanager
from datetime import timedelta
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method)
from torch.distributed.tensor import DTensor
from tqdm import tqdm

# ------------------------------------------------------------------------------------------------------------
# The group.


CHOSEN = dict(device=None)  # set by start_processes: "cpu", "cuda", or None for a GPU if there is one


def start_processes(device=None, is_tiny=False, needs_group=False):
    """Joins torchrun's process group, if it has several processes. needs_group: one process has a group, too.

    device: "cpu" or "cuda". None takes a GPU if there is one, but not for the tiny model, which gains nothing
    there. is_tiny: each process gets one thread. With 100k parameters a second core would save only a fifth
    of the time. If another program uses that core, the threads wait for each other, and everything takes far
    longer.
    """
    CHOSEN["device"] = device or ("cpu" if is_tiny else None)
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: torch sees no GPU on this machine. Leave the flag out, or install "
                         "a torch for your GPU")
    if is_tiny:
        torch.set_num_threads(1)
    is_alone = int(os.environ.get("WORLD_SIZE", 1)) == 1
    if dist.is_initialized() or (is_alone and not needs_group):
        return
    is_cuda = default_device().type == "cuda"
    local = int(os.environ.get("LOCAL_RANK", 0))
    if is_cuda and local >= torch.cuda.device_count():
        raise ValueError(
            f"process {local} of this machine has no GPU: there are {torch.cuda.device_count()}. "
            "Start fewer processes, or run on the CPU (--device cpu)")
    if is_cuda:
        torch.cuda.set_device(local)
    alone = dict(store=dist.HashStore(), rank=0, world_size=1) if is_alone else {}
    # Python objects are exchanged on the CPU, so that a GPU needs no memory for them.
    backend = "cpu:gloo,cuda:nccl" if is_cuda else "gloo"
    # The timeout is long, since all processes wait for the one that has the longest rollout.
    dist.init_process_group(backend, timeout=timedelta(hours=2), **alone)


def end_processes():
    """Leaves the process group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()


def default_device():
    """This process's GPU if there is one and start_processes has not chosen otherwise, else the CPU."""
    if CHOSEN["device"] != "cpu" and torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    return torch.device("cpu")


def processes():
    """(rank, number of processes); (0, 1) without torchrun."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def is_first():
    """Whether this is the process that writes and prints."""
    return not dist.is_initialized() or dist.get_rank() == 0


def deal(items):
    """This process's part of a list that every process has: dealt like cards, one after the other."""
    rank, number = processes()
    return items[rank::number]


def gather(own):
    """Undoes `deal`: every process's part -> the whole list, in its order, on every process.

    So sum(gather([x])) is the sum of a number over all processes.
    """
    number = processes()[1]
    if number == 1:
        return own
    parts = [None] * number
    dist.all_gather_object(parts, own)
    whole = [None] * sum(map(len, parts))
    for rank, part in enumerate(parts):
        whole[rank::number] = part
    return whole


def from_first(value):
    """The first process's value, on every process."""
    if processes()[1] == 1:
        return value
    box = [value]  # not by `gather`, which would send as many bytes from every process as from the first
    dist.broadcast_object_list(box)
    return box[0]


@functools.lru_cache(maxsize=2)
def shuffled(number, seed):
    """A random order of range(number) that follows from the seed, so it is the same on every process."""
    return torch.randperm(number, generator=torch.Generator().manual_seed(seed)).tolist()


def barrier():
    """Waits for the other processes."""
    if processes()[1] > 1:
        dist.barrier()


def bar(items, name):
    """Goes through items, with a progress bar on the first process if the output is a terminal."""
    return tqdm(items, desc=name, disable=None if is_first() else True, mininterval=1)


def say(text):
    """Prints on the first process only, above a progress bar if there is one."""
    if is_first():
        tqdm.write(text)
        sys.stdout.flush()  # in a file, lines would otherwise come late


# ------------------------------------------------------------------------------------------------------------
# Sharding.


def shard(model, layers, dtype=torch.float32):
    """Shards parameters, gradients and optimizer states over all processes (FSDP2), layer by layer, in place.

    dtype: what layers compute in. The sharded weights are always float32. Gradients are sums over tokens (see
    tracerl.policy_loss). So processes add them up, in float32, and take no average. Frozen weights (LoRA)
    stay whole on every process. Without a process group this does nothing.
    """
    if not dist.is_initialized():
        return
    mesh = init_device_mesh(default_device().type, (processes()[1],))
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    frozen = {p for p in model.parameters() if not p.requires_grad}
    for module in [*layers, model]:
        for p in module.parameters():
            if p.requires_grad and not isinstance(p, DTensor):
                p.data = p.data.float()
        fully_shard(module, mesh=mesh, mp_policy=policy, ignored_params=frozen)
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)
    if hasattr(model, "states"):
        register_fsdp_forward_method(model, "states")


def load(state, **source):
    """Fills the tensors of a state, in place, from files that torch.distributed.checkpoint can read.

    Each process reads its own part, and waits for nobody. source: arguments of torch's `load` that say where
    to read, such as a storage_reader. ValueError if the files do not hold this state.
    """
    try:
        with warnings.catch_warnings():  # torch warns that each process reads for itself, as it should here
            warnings.filterwarnings("ignore", "torch.distributed is disabled")
            dcp.load(state, no_dist=True, **source)
    except CheckpointException as error:
        raise ValueError(cause_of(error)) from error


def cause_of(error):
    """What went wrong while a checkpoint was read or written, in one line."""
    if isinstance(error, CheckpointException):  # torch puts the errors of all processes into this one
        error, _ = next(iter(error.failures.values()))
    return getattr(error, "strerror", None) or str(error).strip().partition("\n")[0]


@contextmanager
def unsharded(model):
    """Inside a `with`: a model with whole weights on this process.

    Its forwards wait for no other process, so each process may run as many as it needs. A model that is not
    sharded is given as it is.
    """
    parts = [module for module in model.modules() if isinstance(module, FSDPModule)]
    for part in parts:
        part.unshard()
    try:
        yield without_hooks(model) if parts else model
    finally:
        for part in parts:
            part.reshard()
        # Torch holds back the memory of the freed weights and KV cache. NCCL could not use it.
        torch.cuda.empty_cache()


def without_hooks(module):
    """The same weights in modules without the hooks of FSDP2.

    The hooks take longer than a small layer, and a CUDA graph cannot record them.
    """
    # FSDP2 has made a class FSDPLayer(FSDPModule, Layer). Of its __mro__, number 2 is Layer.
    plain = type(module).__mro__[2] if isinstance(module, FSDPModule) else type(module)
    twin = plain.__new__(plain)
    twin.__dict__.update(module.__dict__)
    twin.__dict__.pop("states", None)  # `shard` has wrapped it; the class has the plain one
    twin._forward_hooks = OrderedDict()
    twin._forward_pre_hooks = OrderedDict()
    twin._modules = {name: child and without_hooks(child) for name, child in module._modules.items()}
    return twin


def whole_state(model):
    """Parameters by name, whole and contiguous, of a model that may be sharded.

    If there are several processes, only the first one gets them. To be called on every process.
    """
    if not dist.is_initialized():
        return model.state_dict()
    state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    # If a dimension is not divisible by the number of processes (18 tokens on 4), gathered tensors are views
    # of padded storage. safetensors then cannot tell whole tensors from parts. So copies are made.
    for name in list(state):  # one at a time: there is never a second whole model in memory
        state[name] = state[name].clone(memory_format=torch.contiguous_format)
    return state


# ------------------------------------------------------------------------------------------------------------
# The optimizer step.


MAX_SKIPPED = 5  # updates in a row whose gradient is not finite, before the run stops


class Learner(NamedTuple):
    """A network that learns, and its optimizer."""

    model: nn.Module
    optimizer: torch.optim.Optimizer


def make_learner(model, lr, betas, weight_decay=0.0):
    """A model with AdamW for its trainable parameters. Weight decay acts on matrices only."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [dict(params=[p for p in parameters if p.dim() >= 2], weight_decay=weight_decay),
              dict(params=[p for p in parameters if p.dim() < 2], weight_decay=0.0)]
    return Learner(model, torch.optim.AdamW(groups, lr=lr, betas=betas, fused=True))


def set_learning_rate(optimizer, lr):
    """Sets the learning rate of all parameters."""
    for group in optimizer.param_groups:
        group["lr"] = lr


def optimizer_step(learner, max_grad_norm=1.0):
    """Clips the gradient and moves the weights -> the norm before clipping, and 1 if the update was skipped.

    The norm is that over all processes. If it is not finite, every process skips the update. RuntimeError
    after MAX_SKIPPED such updates in a row. If the norm is 0, nothing was learnt, and the weights stay.
    """
    model, optimizer = learner
    norm = nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], max_grad_norm)
    norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
    is_finite = bool(norm.isfinite())
    optimizer.num_skipped = 0 if is_finite else getattr(optimizer, "num_skipped", 0) + 1
    if norm > 0 and is_finite:
        optimizer.step()
    if not is_finite:
        say(f"the gradient norm is {float(norm)}: update skipped ({optimizer.num_skipped} in a row)")
    optimizer.zero_grad(set_to_none=True)
    if optimizer.num_skipped >= MAX_SKIPPED:
        raise RuntimeError(f"{MAX_SKIPPED} updates in a row had a gradient that is not finite: "
                           "lower the learning rate (--lr)")
    return dict(gradient_norm=float(norm), skipped_updates=int(not is_finite))


# ------------------------------------------------------------------------------------------------------------
# LoRA: the weights are frozen. Two thin matrices beside each linear layer learn instead.


LORA_SCALE = 2  # the factor of B A x. Other code writes it as alpha / rank. So here alpha is 2 rank


class LoRALinear(nn.Linear):
    """W x + b + 2 B A x with W and b frozen (arXiv 2106.09685). A (rank, in); B (out, rank) starts at 0."""

    def forward(self, x):
        """x (..., in) -> (..., out)."""
        thin = F.linear(F.linear(x, self.lora_A.to(x.dtype)), self.lora_B.to(x.dtype))
        return super().forward(x) + LORA_SCALE * thin


def add_lora(model, rank, seed=0):
    """Freezes a language model, and adds trainable float32 adapters to each linear layer but the head."""
    model.requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    for linear in [m for m in model.layers.modules() if isinstance(m, nn.Linear)]:
        linear.__class__ = LoRALinear
        A = torch.randn(rank, linear.in_features, generator=generator) / math.sqrt(linear.in_features)
        linear.lora_A = nn.Parameter(A.to(model.device))
        linear.lora_B = nn.Parameter(torch.zeros(linear.out_features, rank, device=model.device))
