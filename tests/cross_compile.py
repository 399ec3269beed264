"""cross_compile.py - compiles the kernels of a training step for a GPU, on a machine that has none.

    pip install triton==3.7.1      # the release for torch 2.13.0. It brings NVIDIA's assembler
    python tests/cross_compile.py      # an H100, the shape of SDAR-8B, bfloat16
    python tests/cross_compile.py --capability 8.9 --preset 0.6B --dtype float32      # an RTX 4090

torch.compile writes Triton kernels for FlexAttention, its mask, rotary embedding and SwiGLU. Here they become
machine code, and a table tells what each needs. So a kernel that cannot be compiled, or that needs more
shared memory than the GPU has, is found without a GPU. Nothing is computed: tensors are "fake", which means
that they have a shape and no numbers. Whether a kernel is right or fast, this cannot say.
"Stack" is memory of a thread, mostly for what did not fit into registers.

How torch is made to believe in a GPU: SHIM, compiled by g++, tells torch's C++ that one GPU exists. The
functions of torch.cuda that ask the driver are replaced. The answers are those of a middle-sized GPU, except
for the capability and the shared memory. torch must be the build for CPUs. Much of this is private to torch
2.13, and may fail with another release.
"""

import argparse
import ctypes
import importlib.util
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

# Shared memory of a block of threads, in bytes, by compute capability (CUDA C++ Programming Guide)
SHARED = {(8, 0): 166912, (8, 6): 101376, (8, 9): 101376, (9, 0): 232448, (10, 0): 232448, (12, 0): 101376}

SHIM = r"""
#include <ATen/ATen.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
using namespace c10;
namespace at {
struct CUDAHooks : CUDAHooksInterface {
  CUDAHooks(CUDAHooksArgs) {}
  void init() const override {}
  bool hasCUDA() const override { return true; }
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
  DeviceIndex deviceCount() const override { return 1; }
  DeviceIndex getCurrentDevice() const override { return 0; }
};
REGISTER_CUDA_HOOKS(CUDAHooks);
}
struct Guard final : impl::DeviceGuardImplInterface {
  Device gpu() const { return Device(kCUDA, 0); }
  DeviceType type() const override { return kCUDA; }
  Device exchangeDevice(Device) const override { return gpu(); }
  Device getDevice() const override { return gpu(); }
  void setDevice(Device) const override {}
  void uncheckedSetDevice(Device) const noexcept override {}
  Stream getStream(Device) const override { return Stream(Stream::DEFAULT, gpu()); }
  Stream exchangeStream(Stream stream) const override { return stream; }
  DeviceIndex deviceCount() const noexcept override { return 1; }
};
C10_REGISTER_GUARD_IMPL(CUDA, Guard);
"""


def load_shim():
    """Compiles SHIM and loads it. This must be done before torch is imported: torch asks for a GPU once."""
    home = Path(importlib.util.find_spec("torch").origin).parent
    with tempfile.TemporaryDirectory() as folder:
        source, library = Path(folder, "shim.cpp"), Path(folder, "shim.so")
        source.write_text(SHIM)
        subprocess.run(["g++", "-std=c++20", "-shared", "-fPIC", f"-I{home}/include", source, "-o", library,
                        f"-L{home}/lib", "-ltorch_cpu", "-lc10", f"-Wl,-rpath,{home}/lib"], check=True)
        ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)


def pretend(capability):
    """Replaces what asks the driver for a GPU of this compute capability, and what would run a kernel.

    -> a list to which each kernel is added, as what Triton's compiler gives
    """
    import torch
    import torch._inductor.fx_passes.joint_graph
    import torch._inductor.fx_passes.post_grad
    import triton
    from torch._dynamo import device_interface
    from torch._inductor.runtime import triton_heuristics, triton_helpers
    from triton.backends.compiler import GPUTarget

    major, minor = capability
    number = 10 * major + minor
    gpu = SimpleNamespace(
        name=f"sm_{number}", major=major, minor=minor, multi_processor_count=108, warp_size=32,
        total_memory=80 << 30, max_threads_per_multi_processor=2048, regs_per_multiprocessor=65536,
        shared_memory_per_block=49152, shared_memory_per_block_optin=SHARED[capability],
        shared_memory_per_multiprocessor=SHARED[capability] + 1024, L2_cache_size=50 << 20, gcnArchName="")
    state = torch.zeros(16, dtype=torch.uint8)  # of a random number generator
    answers = dict(is_available=True, device_count=1, current_device=0, get_device_capability=capability,
                   get_device_properties=gpu, set_device=None, synchronize=None, get_rng_state=state,
                   set_rng_state=None, mem_get_info=(70 << 30, 80 << 30), memory_reserved=0,
                   memory_allocated=0, _lazy_init=None, _exchange_device=0, _maybe_exchange_device=0)
    for name, answer in answers.items():
        setattr(torch.cuda, name, lambda *args, answer=answer, **kwargs: answer)
    torch.accelerator.is_available = lambda: False  # else torch asks for streams
    device_interface.caching_worker_device_properties["cuda"] = [gpu]
    for name, answer in dict(get_device_properties=gpu, get_compute_capability=number, current_device=0,
                             device_count=1, synchronize=None).items():
        setattr(device_interface.CudaInterface, name,
                staticmethod(lambda *args, answer=answer, **kwargs: answer))
    triton.runtime.driver.set_active(SimpleNamespace(
        get_current_target=lambda: GPUTarget("cuda", number, 32), get_current_device=lambda: 0,
        get_active_torch_device=lambda: torch.device("cuda", 0)))
    triton_helpers.set_driver_to_gpu = lambda: None

    torch._inductor.config.compile_threads = 1
    torch._inductor.config.force_disable_caches = True
    torch._inductor.config.use_static_triton_launcher = False
    torch._inductor.config.joint_graph_constant_folding = False  # it would compute on the GPU
    for passes in (torch._inductor.fx_passes.joint_graph, torch._inductor.fx_passes.post_grad):
        passes.lazy_init = lambda *args: None  # so would the patterns that it prepares
    torch._functorch.config.force_non_lazy_backward_lowering = True
    guards = torch._C._dynamo.guards
    guards._empty_strided_cuda = lambda *args: torch.empty_strided(*args[:2], dtype=args[2], device="cuda")
    guards._reinterpret_tensor = lambda x, size, stride, offset=0: x.as_strided(
        size, stride, x.storage_offset() + offset)
    torch._C._cuda_getCurrentRawStream = lambda device: 0
    kernels = []

    def compile_only(self, *args, **kwargs):
        if not hasattr(self, "is_compiled"):
            self.is_compiled = True
            kernels.extend(self._precompile_config(setting).kernel for setting in self.configs)

    triton_heuristics.CachingAutotuner.precompile = compile_only
    triton_heuristics.CachingAutotuner.run = compile_only
    return kernels


def train(preset, dtype, length):
    """Two layers, forward and backward, twice: log-probabilities of a packed row, and their gradients.

    The second row has the same length. It has a mask of its own, and gradient checkpointing is on. It must
    compile nothing.
    """
    import torch
    from torch._dynamo.utils import counters
    from torch._subclasses import FakeTensorMode

    import bench_update
    import model as lm
    from plumbing import engine

    config = bench_update.preset_config(preset)
    config.num_layers = 2
    torch.set_default_dtype(getattr(torch, dtype))
    with FakeTensorMode():
        with torch.device("cuda"):
            model = lm.BlockDiffusionLM(config)
        engine.compile_small_functions(model)
        for number in range(2):
            for layer in model.layers:
                layer.has_gradient_checkpointing = number == 1
            compiled = counters["stats"]["unique_graphs"]
            rows = torch.zeros(4, 1, length, dtype=torch.int64, device="cuda")
            states = model.states(rows[0], rows[0], engine.attend(lm.Layout(*rows)))
            logp, _ = engine.logprobs(model, states[0], rows[0, 0])
            logp.sum().backward()
            assert all(weight.grad is not None for weight in model.parameters())
            compiled = counters["stats"]["unique_graphs"] - compiled
            assert (compiled > 0) == (number == 0), f"row {number}: {compiled} graphs were compiled"


def show(kernels, limit):
    """Prints what each kernel needs -> whether all of them fit."""
    import triton.backends.nvidia
    tool = Path(triton.backends.nvidia.__path__[0], "bin", "cuobjdump")
    print(f"{'kernel':<62} {'registers':>9} {'stack':>8} {'shared':>8}   (bytes; limit {limit})")
    for kernel in kernels:
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(kernel.asm["cubin"])
            file.flush()
            usage = subprocess.check_output([tool, "-res-usage", file.name], text=True)
        numbers = dict(word.split(":") for word in usage.splitlines()[-1].split() if ":" in word)
        print(f"{kernel.metadata.name[:62]:<62} {numbers['REG']:>9} {numbers['STACK']:>8} "
              f"{kernel.metadata.shared:>8}" + ("   TOO MUCH" if kernel.metadata.shared > limit else ""))
    return all(kernel.metadata.shared <= limit for kernel in kernels)


def parse_args(argv=None):
    """The flags."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0], allow_abbrev=False)
    parser.add_argument("--capability", default="9.0", choices=["{}.{}".format(*key) for key in SHARED])
    parser.add_argument("--preset", default="8B", help="a shape of tests/bench_update.py")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--length", type=int, default=4096, help="tokens of the packed row")
    return parser.parse_args(argv)


def main(argv=None):
    """Compiles, and prints the table. Exit status 1: a kernel does not fit."""
    args = parse_args(argv)
    capability = tuple(int(part) for part in args.capability.split("."))
    started = time.time()
    load_shim()
    kernels = pretend(capability)
    train(args.preset, args.dtype, args.length)
    fit = show(kernels, SHARED[capability])
    print(f"{len(kernels)} kernels, {time.time() - started:.0f} s")
    return 0 if fit else 1


if __name__ == "__main__":
    sys.exit(main())
