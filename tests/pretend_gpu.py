"""pretend_gpu.py - runs the GPU's path on a machine without one: tensors say "cuda:0" and compute on the CPU.

    python tests/pretend_gpu.py pytest tests/test_gpu.py
    python tests/pretend_gpu.py tracerl.py --device cuda --dtype float32 --steps 2 --name pretended

This finds faults in the order of things, and none of speed. As on a GPU:
  1. an operation on tensors of both devices fails; only numbers and indices may come from the host
  2. host and device meet where a value is read or sent; `MEETINGS` counts that, by function of the project
  3. a CUDA graph is recorded without being computed. It may not meet the host, and it replays on fixed memory

Not as on a GPU: nothing is compiled, FlexAttention is a dense mask, kernels and their rounding are the CPU's.
There is no process group, so training is float32. Copies from pinned memory are counted like all others.
"""

import contextlib
import os
import runpy
import sys
import traceback
from collections import Counter
from pathlib import Path
from unittest import mock

ROOT = str(Path(__file__).resolve().parent.parent)
sys.path[:0] = [ROOT]

import torch
import torch._dynamo  # before functions of torch.cuda are replaced: it makes a table of them
import torch.distributed.checkpoint as dcp
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

from plumbing import checkpoints, engine, kernels

GPU = torch.device("cuda", 0)
aten = torch.ops.aten
READS = {aten._local_scalar_dense, aten.nonzero, aten.masked_select, aten.equal, aten.is_nonzero,
         aten._unique2}
# These take tensors of the host as well: a GPU copies them first.
TAKES_HOST = {aten.copy_, aten.index, aten.index_put_, aten._index_put_impl_}
MEETINGS = Counter()  # (what, function, line) -> times
RECORDING = []  # the graph that is being recorded, if any


def meet(what):
    """Counts a meeting of host and device, by the innermost line of the project."""
    frames = [f for f in traceback.extract_stack() if f.filename.startswith(ROOT) and f.filename != __file__]
    function, where = "", ""
    if frames:
        function, where = frames[-1].name, f"{os.path.relpath(frames[-1].filename, ROOT)}:{frames[-1].lineno}"
    MEETINGS[what, function, where] += 1
    if RECORDING:
        raise RuntimeError(f"while a CUDA graph is recorded, host and device meet: {what} at {where}")


def on_gpu(tensor):
    """What any result becomes: a tensor of the pretended GPU. Other values stay."""
    return Pretended(tensor) if isinstance(tensor, torch.Tensor) else tensor


class Pretended(torch.Tensor):
    """A tensor that says it is on the GPU; `inner` is where it really is."""

    device = property(lambda self: GPU)
    is_cuda = property(lambda self: True)
    is_cpu = property(lambda self: False)
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, inner):
        self = torch.Tensor._make_wrapper_subclass(
            cls, inner.size(), strides=inner.stride(), dtype=inner.dtype,
            storage_offset=inner.storage_offset())
        self.inner = inner
        return self

    def __repr__(self):
        return f"Pretended({self.inner!r})"

    @classmethod
    def __torch_dispatch__(cls, call, kinds, args=(), kwargs=None):
        kind = call.overloadpacket
        outer = {}  # what works in place gives back the tensor that it was given

        def inner(x):
            if isinstance(x, Pretended):
                outer[id(x.inner)] = x
                return x.inner
            if isinstance(x, torch.Tensor) and x.device.type == "cpu" and x.dim():
                if kind not in TAKES_HOST:
                    raise RuntimeError(f"{call}: tensors on cuda:0 and on the CPU (shape {tuple(x.shape)})")
                meet("a tensor of the host")
            return x

        args, kwargs = tree_map(inner, args), tree_map(inner, kwargs or {})
        has_bools = kind is aten.index and any(i is not None and i.dtype == torch.bool for i in args[1])
        if kind in READS or has_bools:
            meet("read")
        if RECORDING:
            out = RECORDING[0].compute(call, args, kwargs)
        else:
            out = compute(call, args, kwargs)
        return tree_map(lambda x: outer[id(x)] if id(x) in outer else on_gpu(x), out)


def compute(call, args, kwargs):
    """An operation, on the CPU."""
    if call is aten.mm.dtype:  # bfloat16 factors and a float32 product: only a GPU has it
        return args[0].to(args[2]) @ args[1].to(args[2])
    return call(*args, **kwargs)


class Moved(torch.autograd.Function):
    """To the other device, and the gradient back."""

    @staticmethod
    def other(x):
        return x.inner.detach().clone() if isinstance(x, Pretended) else Pretended(x.detach().clone())

    forward = staticmethod(lambda ctx, x: Moved.other(x))
    backward = staticmethod(lambda ctx, gradient: Moved.other(gradient))


class Devices(TorchFunctionMode):
    """Catches functions that name a device, or that leave one."""

    def __torch_function__(self, call, kinds, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        name = getattr(call, "__name__", "")
        x = args[0] if args else None
        if name in ("tolist", "numpy") and isinstance(x, Pretended):
            meet("read")
            return call(x.inner, *args[1:], **kwargs)
        if name in ("pin_memory", "record_stream"):
            return x
        if name in ("to", "cuda", "cpu") and isinstance(x, torch.Tensor):
            return move(x, name, [*args[1:], *kwargs.values()], call, args, kwargs)
        device = kwargs.get("device")
        if device is not None and torch.device(device).type == "cuda":
            kwargs["device"] = "cpu"
            if not any(isinstance(a, Pretended) for a in args):  # torch.zeros(..., device="cuda")
                if name in ("tensor", "as_tensor"):
                    meet("send")
                return tree_map(on_gpu, call(*args, **kwargs))
        return call(*args, **kwargs)


def move(x, name, others, call, args, kwargs):
    """x.to(...), x.cuda(), x.cpu()."""
    like = next((other for other in others if isinstance(other, torch.Tensor)), x)
    named = [other for other in others if isinstance(other, (str, torch.device))]
    device = torch.device(name) if name != "to" else torch.device(named[0]) if named else like.device
    dtype = next((other for other in others if isinstance(other, torch.dtype)), like.dtype)
    if "meta" in (device.type, x.device.type):
        return call(*args, **kwargs)
    if device.type != x.device.type:
        meet("send" if device.type == "cuda" else "read")
        x = Moved.apply(x)
    return x if x.dtype == dtype else x.type(dtype)


class Graph:
    """torch.cuda.CUDAGraph: recording changes no memory; a replay computes it on the same memory."""

    def __init__(self):
        self.tape = []
        self.before = {}  # storage -> its content when recording began

    def capture_begin(self, pool=None, capture_error_mode="global"):
        RECORDING.append(self)

    def compute(self, call, args, kwargs):
        """An operation while it is recorded."""
        for spec, x in zip(call._schema.arguments, args):
            if isinstance(x, torch.Tensor) and spec.alias_info is not None and spec.alias_info.is_write:
                storage = x.untyped_storage()
                self.before.setdefault(storage.data_ptr(), (storage, storage.clone()))
        out = compute(call, args, kwargs)
        self.tape.append((call, args, kwargs, out))
        return out

    def capture_end(self):
        RECORDING.clear()
        for storage, before in self.before.values():
            storage.copy_(before)
        MEETINGS["graph recorded", "", ""] += 1

    def replay(self):
        MEETINGS["graph replayed", "", ""] += 1
        for call, args, kwargs, old in self.tape:
            new = compute(call, args, kwargs)
            makes_memory = call._schema.returns and not any(r.alias_info for r in call._schema.returns)
            if makes_memory:  # not a view, and not in place
                tree_map(lambda o, n: o.copy_(n) if isinstance(n, torch.Tensor) else None, old, new)


class DenseMask:
    """In the place of FlexAttention's BlockMask: the same rule, for all pairs of tokens."""

    def __init__(self, rule, B, H, num_queries, num_keys, device):
        row = torch.arange(B, device=device)[:, None, None]
        query = torch.arange(num_queries, device=device)[:, None]
        key = torch.arange(num_keys, device=device)
        self.mask = rule(row, None, query, key)[:, None]


def flex_attention(q, k, v, block_mask, enable_gqa, kernel_options):
    """FlexAttention, of such a mask."""
    return torch.nn.functional.scaled_dot_product_attention(
        q, k, v, attn_mask=block_mask.mask, enable_gqa=enable_gqa)


def on_host(write):
    """A function that writes or reads files, with the tensors where they really are."""
    def call(state, *args, **kwargs):
        state = tree_map(lambda x: x.detach().inner if isinstance(x, Pretended) else x, state)
        with mock.patch("torch.cuda.is_available", lambda: False):
            return write(state, *args, **kwargs)
    return call


@contextlib.contextmanager
def pretended():
    """Puts the GPU in place, for the time of a `with`."""
    nothing, zero = (lambda *args: None), (lambda *args: 0)
    cuda = dict(
        is_available=lambda: True, is_initialized=lambda: True, device_count=lambda: 1, set_device=nothing,
        current_device=zero, synchronize=nothing, empty_cache=nothing, reset_peak_memory_stats=nothing,
        memory_reserved=zero, memory_allocated=zero, max_memory_allocated=zero, max_memory_reserved=zero,
        mem_get_info=lambda *args: (8 * 10**10, 8 * 10**10), graph_pool_handle=lambda: 1, CUDAGraph=Graph,
        Stream=object, stream=contextlib.nullcontext)
    ours = [(kernels, "compiled", lambda function: function), (kernels, "BlockMask", DenseMask),
            (kernels, "create_block_mask", DenseMask), (kernels, "flex_attention", flex_attention),
            (torch.nn.Module, "compile", lambda self, **settings: None)]
    ours += [(module, name, on_host(getattr(module, name))) for module, name in (
        (checkpoints, "save_torch_state_dict"), (dcp, "save"), (dcp, "load"))]
    MEETINGS.clear()
    engine.recording_stream.cache_clear()
    with contextlib.ExitStack() as stack:
        for name, fake in cuda.items():
            stack.enter_context(mock.patch.object(torch.cuda, name, fake))
        for module, name, fake in ours:
            stack.enter_context(mock.patch.object(module, name, fake))
        before = torch.__future__.get_overwrite_module_params_on_conversion()
        stack.callback(torch.__future__.set_overwrite_module_params_on_conversion, before)
        torch.__future__.set_overwrite_module_params_on_conversion(True)
        stack.enter_context(Devices())
        yield
    engine.recording_stream.cache_clear()


def main():
    """Runs pytest or a script on the pretended GPU, and prints where host and device met."""
    sys.argv = sys.argv[1:]
    status = 0
    with pretended():
        try:
            if sys.argv[0] == "pytest":
                status = __import__("pytest").main(sys.argv[1:])
            else:
                runpy.run_path(sys.argv[0], run_name="__main__")
        finally:
            for (what, function, where), times in MEETINGS.most_common():
                print(f"{times:6d}  {what:22s} {function:20s} {where}", file=sys.stderr)
    sys.exit(status)


if __name__ == "__main__":
    main()
