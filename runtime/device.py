"""What the device can do: precision, compiling, speed, memory."""

from errors import UserError
import contextlib
import ctypes
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_leaves, tree_map_only

# Floating-point operations of a run above which torch.compile saves more time than it takes. Compiling takes a minute
# on a GPU and half a minute on a CPU. It then saves a third of the time on a GPU, up to 15% on a CPU (124M: nothing).
COMPILE_PAYS = dict(cuda=5e16, xpu=5e16, cpu=1.5e14)

# Dense matrix peak in 16 bit with float32 accumulation, FLOP/s, from the vendors' data sheets. The first pattern that
# matches the name counts; $ excludes laptops. Of GeForce cards it is 512 × streaming multiprocessors × boost clock, for
# example 128 × 2.52 GHz for an RTX 4090.
PEAK_FLOPS = {
    "GB200": 2500e12, "B200": 2250e12, "GH200": 989e12, "H200 NVL": 835e12, "H200": 989e12,
    "H100 PCIe": 756e12, "H100 NVL": 835e12, "H100": 989e12, "A100": 312e12, "A10G": 70e12, "A10": 125e12,
    "A40": 149.7e12, "L40S": 362e12, "L4": 121e12, "V100-SXM2": 125e12, "T4": 65e12,
    "RTX 5090$": 209.5e12, "RTX 5080$": 112.6e12, "RTX 5070 Ti$": 87.9e12, "RTX 5070$": 61.7e12,
    "RTX 4090$": 165.2e12, "RTX 4080 SUPER$": 104.4e12, "RTX 4080$": 97.5e12, "RTX 4070 Ti SUPER$": 88.2e12,
    "RTX 4070 Ti$": 80.2e12, "RTX 4070 SUPER$": 71e12, "RTX 4070$": 58.3e12, "RTX 4060 Ti$": 44.1e12,
    "RTX 4060$": 30.2e12, "RTX 3090 Ti$": 80e12, "RTX 3090$": 71.2e12, "RTX 3080 Ti$": 68.2e12, "RTX 3060$": 25.5e12,
}  # fmt: skip


def choose_device(name: str) -> str:
    """Return the device of that name, and for auto the fastest one. Raise UserError if there is none."""
    available = dict(cuda=torch.cuda.is_available(), xpu=torch.xpu.is_available())
    available |= dict(mps=torch.backends.mps.is_available(), cpu=True)
    if name == "auto":
        return next(device for device in available if available[device])
    try:
        torch.zeros(1, device=name).item()
    except (RuntimeError, AssertionError, ImportError):  # no such name; no such device; no backend
        raise UserError(f"--device {name}: PyTorch finds no such device here; try --device auto") from None
    return name


def choose_dtype(name: str, device: str) -> str:
    """Return the precision of that name, and for auto the fastest one that the device is built for."""
    if name != "auto":
        return name
    if device == "cuda":
        return "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float16"
    if device == "cpu" and (cpuinfo := Path("/proc/cpuinfo")).exists():
        if {"avx512_bf16", "amx_bf16", "bf16"} & set(cpuinfo.read_text().split()):
            return "bfloat16"
    return "float32"


def eager_reason(choice: str, device: str, flops: float) -> str | None:
    """Return why a run of that many operations is not compiled, or None if it is. choice is auto, on or off."""
    if choice == "off":
        return "--compile off"
    if device == "mps":
        return "torch.compile is not ready for MPS"
    if choice == "auto" and flops < COMPILE_PAYS[device]:
        return "too short a run to save time by it"
    return None


def peak_flops(device: torch.device, dtype: str) -> float | None:
    """Return the device's peak, for the MFU (model FLOPs utilization); None where that is not known."""
    if device.type != "cuda" or dtype == "float32":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for key, peak in PEAK_FLOPS.items() if re.search(rf"\b{key}\b", name)), None)


def free_memory(device: str, local_size: int) -> float:
    """Return the bytes of memory that are free for one of local_size ranks on this host."""
    if device in ("cuda", "xpu"):
        return getattr(torch, device).mem_get_info()[0]
    if device == "mps":
        return torch.mps.recommended_max_memory()
    meminfo = Path("/proc/meminfo")
    if not meminfo.exists():  # not on Linux: assume a laptop
        return 8e9 / local_size
    free = int(re.search(r"MemAvailable: *(\d+)", meminfo.read_text())[1]) * 1024
    limit, used = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")  # in a container
    if limit.exists() and used.exists() and limit.read_text().strip().isdecimal():
        free = min(free, int(limit.read_text()) - int(used.read_text()))
    return free / local_size


def peak_memory(device: torch.device) -> int | None:
    """Return the most bytes of the device's memory that this process has held, or None where that is not known."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if device.type != "cpu" or sys.platform == "win32":
        return None
    import resource  # not on Windows

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def free_memory_at_peak(device: torch.device) -> float:
    """Return the bytes of a GPU's memory that were free when this process used the most of it."""
    # mem_get_info counts all that PyTorch has reserved as used.
    return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device) - peak_memory(device)


def copy_to_cpu(tree):
    """Return the tree with its tensors on the CPU. Copies from a GPU run on their own stream: only the calling thread
    waits for them, and the kernels of other threads continue."""
    on_gpu = any(t.is_cuda for t in tree_leaves(tree) if torch.is_tensor(t))
    with torch.cuda.stream(torch.cuda.Stream()) if on_gpu else contextlib.nullcontext():
        return tree_map_only(torch.Tensor, lambda t: t.cpu(), tree)


def is_out_of_memory(e: Exception) -> bool:
    """Return whether the error means that a device is out of memory."""
    return isinstance(e, torch.OutOfMemoryError | MemoryError) or any(
        text in str(e) for text in ("out of memory", "can't allocate memory", "ALLOC_FAILED")
    )


def classify_error(e: Exception) -> str | None:
    """Return what has failed in a probe step: memory, cudnn, compiler; None if it is none of these."""
    if is_out_of_memory(e):
        return "memory"
    if "cuDNN" in str(e) and torch.backends.cuda.cudnn_sdp_enabled():  # for example, it has no plan for this shape
        return "cudnn"
    # Errors of compiled kernels at run time are not TorchDynamoExceptions.
    at_run_time = type(e).__module__.startswith(("triton.", "torch._inductor."))
    if at_run_time or isinstance(e, torch._dynamo.exc.TorchDynamoException):
        return "compiler"
    return None


def disable_cudnn_sdp() -> None:
    """Disable cuDNN's attention until the process ends, and forget what has been compiled with it."""
    torch.backends.cuda.enable_cudnn_sdp(False)
    torch._dynamo.reset()
    # The cache on the disk does not distinguish which attention a graph contains (pytorch issue 185449).
    torch._functorch.config.enable_autograd_cache = False


def sdpa_without_cudnn() -> contextlib.AbstractContextManager:
    """Return a context manager and decorator that disables cuDNN's attention. cuDNN makes a plan for each new shape, in
    0.06 to 0.4 s."""
    return sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH])


@contextlib.contextmanager
def oom_as_user_error(what: str, hint: str = "a smaller --preset") -> Iterator[None]:
    """Raise UserError, with a hint what to try, if there is not enough memory for what is made in this block."""
    try:
        yield
    except (RuntimeError, MemoryError) as e:
        if not is_out_of_memory(e):
            raise
        raise UserError(f"{what} does not fit into memory: try {hint}") from None


def tune_malloc() -> None:
    """Make glibc keep the memory it has: on a CPU, fresh pages for every large tensor cost as much as arithmetic."""
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4
        libc.mallopt(M_MMAP_MAX, 0)
        libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
        libc.mallopt(M_TOP_PAD, 256 * 2**20)
