"""Where to compute, in which type, and with how many threads: the one place that decides."""

import contextlib
import os
from collections.abc import Callable

import torch

CHOICES = ("auto", "cpu", "cuda", "mps")
SMALL = 20_000_000  # parameters of models so small that threads wait for each other longer than they work
PEAKS = {"H100": 989e12, "H200": 989e12, "A100": 312e12}  # FLOP/s in bfloat16, dense, from the data sheets


def find(name: str = "auto") -> torch.device:
    """The device of a `--device` option; `auto` takes a GPU if there is one. Raises ValueError if it is not there."""
    there = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if name == "auto":
        name = next(kind for kind in ("cuda", "mps", "cpu") if there[kind])
    kind, _, number = name.partition(":")
    if kind not in there or (number and not number.isdigit()):
        raise ValueError(f"--device {name}: expected one of {', '.join(CHOICES)}, or cuda:1 for the second GPU")
    if not there[kind]:
        raise ValueError(
            f"--device {name}: this torch ({torch.__version__}) finds no such device: take another, or auto"
        )
    if kind == "cuda" and int(number or 0) >= torch.cuda.device_count():
        raise ValueError(f"--device {name}: there are only {torch.cuda.device_count()} GPUs, counted from cuda:0")
    return torch.device(name)


def use_threads(parameters: int = 0) -> str:
    """Choose a number of CPU threads that is never far from the best, on idle cores and on busy ones.

    One for sampling models of up to SMALL `parameters`; for larger ones and for training (0) half of the cores, from 1
    to 4: where a core is shared, threads wait for the slowest. OMP_NUM_THREADS wins. Returns the number in words.
    """
    if "OMP_NUM_THREADS" not in os.environ:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        torch.set_num_threads(1 if 0 < parameters <= SMALL else max(1, min(4, cores // 2)))
    return f"CPU threads: {torch.get_num_threads()} (OMP_NUM_THREADS sets them)"


def fast_dtype(device: torch.device | str) -> torch.dtype:
    """The type in which a training step multiplies: bfloat16 where the device has units for it, else float32.

    GPUs before Ampere (a T4, say) only emulate bfloat16, and float16 would need its losses scaled.
    """
    kind = torch.device(device).type
    if kind == "cuda":
        fast = torch.cuda.get_device_capability(device) >= (8, 0)
    else:
        asks = ("_is_amx_tile_supported", "_is_avx512_bf16_supported")  # there since torch 2.6
        fast = kind == "cpu" and any(getattr(torch.cpu, ask, bool)() for ask in asks)
    return torch.bfloat16 if fast else torch.float32


def sampling_dtype(device: torch.device | str) -> torch.dtype:
    """The type that a model samples in: float16 on a CUDA GPU, as checkpoints are stored, else float32."""
    return torch.float16 if torch.device(device).type == "cuda" else torch.float32


def has_graphs(device: torch.device | str) -> bool:
    """Whether passes can be recorded and replayed (kernels/graphs.py), for which shapes have to be few."""
    return torch.device(device).type == "cuda"


def autocast(device: torch.device, dtype: torch.dtype) -> contextlib.AbstractContextManager:
    """Matrix products in `dtype` while weights, norms and losses stay float32."""
    if dtype == torch.float32:
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype)


def synchronize(device: torch.device) -> None:
    """Wait until the device has done all that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def peak_memory(device: torch.device) -> float | None:
    """Most memory held so far, in MiB: by tensors on a GPU, by the process on a CPU; None where that is not known."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    if device.type == "mps":
        return torch.mps.driver_allocated_memory() / 2**20
    try:
        import resource
        import sys
    except ImportError:  # Windows
        return None
    unit = 1 if sys.platform == "darwin" else 2**10  # macOS counts bytes, Linux KiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20


def name_of(device: torch.device) -> str:
    """What to call the device in a report."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def utilization(flops: float, device: torch.device) -> str:
    """FLOP/s for a reader, and as a share of what the device could do (MFU) where that is known."""
    peak = next((peak for part, peak in PEAKS.items() if part in name_of(device)), None)
    return f"{flops / 1e12:.3g} TFLOP/s" + (f" ({flops / peak:.1%} MFU)" if peak else "")


def keep_freed_memory() -> Callable | None:
    """Have the C library keep what tensors free for the next pass: giving it back to Linux costs page faults.

    Does nothing where there is no glibc.
    """
    import ctypes

    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return None
    trim_threshold, mmap_threshold = -1, -3  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD of malloc.h
    mallopt(mmap_threshold, 1 << 30)
    mallopt(trim_threshold, 1 << 30)
    return mallopt
