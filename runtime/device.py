"""What the device can do: precision, compiling, speed, memory."""

from errors import UserError

import ctypes
import re
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from model import GPT2_VOCAB_SIZE
from recipe import TrainConfig
from runtime.distributed import Ranks


def choose_dtype(dtype: str, device: torch.device) -> str:
    """The precision of matrix products: as asked, or the fastest that this device is built for."""
    if dtype != "auto":
        return dtype
    if device.type == "cuda":
        return "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float16"
    if device.type == "cpu" and (cpuinfo := Path("/proc/cpuinfo")).exists():
        if {"avx512_bf16", "amx_bf16", "bf16"} & set(cpuinfo.read_text().split()):
            return "bfloat16"
    return "float32"


# Compiling takes a minute on a GPU, half of one on a CPU, a few seconds where it was done before. Then it saves a third
# of the time on a GPU, on a CPU up to 15% (tiny; 124M nothing): it pays in runs of more operations than these.
COMPILE_PAYS = dict(cuda=5e16, cpu=1.5e14)


def why_eager(config: TrainConfig, device: torch.device, flops: float) -> str | None:
    """Why a run of so many floating-point operations is not compiled, or None if compiling is to be tried."""
    if config.compile == "off":
        return "--compile off"
    if device.type == "mps":
        return "torch.compile is not ready for MPS"
    if config.compile == "auto" and flops < COMPILE_PAYS[device.type]:
        return "compiling would take longer than it saves in so short a run"
    return None


# Dense matrix peak in 16 bit with float32 accumulation, FLOP/s, from the vendors' data sheets, by patterns of names.
PEAK_FLOPS = {
    "B200": 2250e12, "H200": 989e12, "H100 PCIe": 756e12, "H100 NVL": 835e12, "H100": 989e12, "GH200": 989e12,
    "A100": 312e12, "A10G": 70e12, "A10": 125e12, "A40": 149.7e12, "L40S": 362e12, "L4": 121e12, "V100-SXM2": 125e12,
    "T4": 65e12, "RTX 4090$": 165.2e12, "RTX 3090$": 71e12,
}  # fmt: skip


def peak_flops(device: torch.device, dtype: str) -> float | None:
    """What this device could do at most, for the MFU (model FLOPs utilisation); None where that is not known."""
    if device.type != "cuda" or dtype == "float32":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for key, peak in PEAK_FLOPS.items() if re.search(rf"\b{key}\b", name)), None)


def out_of_memory(e: Exception) -> bool:
    """Whether this is some device's way to say so."""
    return isinstance(e, torch.OutOfMemoryError | MemoryError) or any(
        s in str(e) for s in ("out of memory", "can't allocate memory", "ALLOC_FAILED")
    )


def if_it_fits(fn: Callable, what: str):
    """Call fn; raises UserError if there is no memory for what it makes."""
    try:
        return fn()
    except (RuntimeError, MemoryError) as e:
        if out_of_memory(e):
            raise UserError(f"{what} does not fit into memory: try a smaller --preset") from None
        raise


def rows_that_fit(config: TrainConfig, ranks: Ranks) -> int:
    """An estimate of the largest micro-batch, from the memory that is free now. (Too large a one is halved later.)

    Weights, gradients and Adam's moments take 16 bytes a parameter. A token's activations in mixed precision take
    about 48 bytes a channel and layer, and its logits, with their copies and gradients, 18 bytes an entry.
    """
    if ranks.device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(ranks.device)
    elif ranks.device.type == "mps":
        free = torch.mps.recommended_max_memory()
    else:
        meminfo = Path("/proc/meminfo")  # elsewhere than on Linux, assume a laptop
        lines = dict(line.split(":") for line in meminfo.read_text().splitlines()) if meminfo.exists() else {}
        free = int(lines.get("MemAvailable", "8000000 kB").split()[0]) * 1024 / ranks.local_size
    parameters = 12 * config.n_layer * config.n_embd**2 + (GPT2_VOCAB_SIZE + config.seq_len) * config.n_embd
    per_token = 48 * config.n_layer * config.n_embd + 18 * GPT2_VOCAB_SIZE
    return int((0.8 * free - 16 * parameters) / (per_token * config.seq_len))


def peak_memory(device: torch.device) -> int | None:
    """The most bytes of the device's memory that this process has held, or None where that is not known."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")  # Linux
    if device.type != "cpu" or not status.exists():
        return None
    return int(dict(line.split(":\t") for line in status.read_text().splitlines())["VmHWM"].split()[0]) * 1024


def keep_pages() -> None:
    """Tell glibc to keep the memory it has: on a CPU, fresh pages for every large tensor cost as much as arithmetic."""
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4
        libc.mallopt(M_MMAP_MAX, 0)
        libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
        libc.mallopt(M_TOP_PAD, 256 * 2**20)
