"""Fused attention for the mask of three integers a query, in CUDA C++ (README.md explains it). Optional.

    if kernels.available():
        y = kernels.attention(q, k, v, ranges)

computes what `scaled_dot_product_attention(q, k, v, attn_mask=visible(ranges, S)[:, None])` does, but visits only the
tiles of the mask that something is seen in. `nvcc` compiles it on first use, for the GPU at hand, into
~/.cache/planned-diffusion. On CPU tensors the same source runs under emulate.h: thousands of times slower, to test it.
"""

import ctypes
import hashlib
import os
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path

import torch

SOURCES = Path(__file__).parent
ELEMENTS = {torch.bfloat16: "bf16", torch.float16: "fp16"}
HEAD_SIZES = (32, 64, 128)
TILE = 64


class BuildError(RuntimeError):
    """The kernel cannot be built or used here; says why."""


# ---------------------------------------------------------------- building


def nvcc():
    """Path of the CUDA compiler: on PATH, in CUDA's folders, or from the package nvidia-cuda-nvcc. None without one."""
    folders = [os.environ.get("CUDA_HOME", ""), "/usr/local/cuda", *Path(torch.__file__).parents[1].glob("nvidia/cu*")]
    found = (shutil.which("nvcc", path=f"{folder}/bin") for folder in folders if folder)
    return shutil.which("nvcc") or next(filter(None, found), None)


def build(command, sources=SOURCES):
    """Run `command` (a compiler and its flags) on attention.cu of a folder, and load the library that it makes.

    It is cached by a hash of the source and the command, and appears whole or not at all.
    """
    text = b"".join(path.read_bytes() for path in sorted(sources.glob("*.[ch]*")))
    key = hashlib.sha256(text + repr(command).encode()).hexdigest()[:16]
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "planned-diffusion"
    library = folder / f"attention-{key}.so"
    if not library.exists():
        folder.mkdir(parents=True, exist_ok=True)
        part = folder / f"{key}-{os.getpid()}.part"
        command = [*command, "-o", str(part), str(sources / "attention.cu")]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise BuildError(f"{command[0]} failed:\n{done.stdout}{done.stderr}")
        os.replace(part, library)
    loaded = ctypes.CDLL(str(library))
    for function in (loaded.attention_forward, loaded.attention_backward):
        function.argtypes = [ctypes.POINTER(_Call), ctypes.c_void_p]
    return loaded


def define(dtype, head_size):
    return [f"-DELEMENT={ELEMENTS[dtype]}", f"-DHEAD_SIZE={head_size}"]


def emulator_command(dtype, head_size):
    compiler = shutil.which("g++")
    if not compiler:
        raise BuildError("there is no g++, which emulates the kernel")
    flags = ["-x", "c++", "-std=c++17", "-O1", "-fPIC", "-shared", "-Wno-unknown-pragmas"]
    return [compiler, *flags, *define(dtype, head_size)]


def nvcc_command(dtype, head_size, arch, output=("-shared", "-Xcompiler", "-fPIC")):
    if not nvcc():
        raise BuildError("there is no nvcc (install the CUDA toolkit, or the package nvidia-cuda-nvcc)")
    return [nvcc(), "-std=c++17", "-O3", f"-arch={arch}", *output, *define(dtype, head_size)]


@cache
def library(device, dtype, head_size):
    """The compiled kernel for a device, a type and a head size, as a ctypes library; on a CPU it is emulated."""
    if device.type == "cpu":
        return build(emulator_command(dtype, head_size))
    capability = torch.cuda.get_device_capability(device)
    if capability < (8, 0):
        raise BuildError(f"the GPU has compute capability {capability[0]}.{capability[1]}; the kernel needs 8.0")
    return build(nvcc_command(dtype, head_size, "sm_{}{}".format(*capability)))


@cache
def available(dtype=torch.bfloat16, head_size=64):
    """Whether `attention` runs on this machine's GPU. Says on stderr, once, why not."""
    try:
        if not torch.cuda.is_available():
            raise BuildError("there is no CUDA GPU")
        if dtype not in ELEMENTS or head_size not in HEAD_SIZES:
            raise BuildError(f"it is not made for {dtype} and heads of {head_size}")
        library(torch.device("cuda"), dtype, head_size)
    except (BuildError, OSError) as error:
        print(f"kernels: not used, {error}", file=sys.stderr)
        return False
    return True


# ---------------------------------------------------------------- calling


class _Tensor(ctypes.Structure):
    """`struct Tensor` of tiles.h."""

    _fields_ = [("data", ctypes.c_void_p), *((name, ctypes.c_longlong) for name in ("batch", "head", "token"))]


class _Call(ctypes.Structure):
    """`struct Call` of tiles.h."""

    _fields_ = [
        *((name, _Tensor) for name in ("q", "k", "v", "o", "grad_o", "grad_q", "grad_k", "grad_v")),
        *((name, ctypes.c_void_p) for name in ("ranges", "lse", "delta", "part_o", "part_lse", "bounds")),
        *((name, ctypes.c_int) for name in ("batches", "heads", "kv_heads", "queries", "keys", "splits")),
        ("scale", ctypes.c_float),
    ]


def _aligned(x):
    """The tensor, or a copy if it does not lie as the kernel reads it: rows contiguous and in units of 16 bytes."""
    strides = [stride for stride, size in zip(x.stride()[:-1], x.shape) if size > 1]
    good = x.stride(-1) == 1 and x.data_ptr() % 16 == 0 and not any(stride % 8 for stride in strides)
    return x if good else x.clone(memory_format=torch.contiguous_format)


def _like(x):
    """An empty tensor of x's shape (B, H, T, D) whose heads lie side by side, as the model's next layer reads them."""
    return x.new_empty(x.transpose(1, 2).shape).transpose(1, 2)


def _run(function, compiled, tensors, arrays, scale, splits=1):
    """Call a function of a compiled library: `tensors` are (B, H, T, D), `arrays` contiguous."""
    q, k = tensors["q"], tensors["k"]
    (batches, heads, queries, head_size), (_, kv_heads, keys, _) = q.shape, k.shape
    call = _Call(batches=batches, heads=heads, kv_heads=kv_heads, queries=queries, keys=keys)
    call.splits, call.scale = splits, scale
    for name, x in tensors.items():
        setattr(call, name, _Tensor(x.data_ptr(), *x.stride()[:-1]))
    for name, x in arrays.items():
        setattr(call, name, x.data_ptr())
    compiled = compiled or library(q.device, q.dtype, head_size)
    with torch.cuda.device_of(q):
        stream = torch.cuda.current_stream().cuda_stream if q.is_cuda else None
        error = getattr(compiled, function)(call, stream)
    if error:
        raise RuntimeError(f"{function} failed with CUDA error {error}")


def best_splits(batches, heads, queries, keys, processors):
    """Into how many parts to cut the keys: 1 if the tiles of queries alone give each processor two blocks."""
    blocks = batches * heads * -(-queries // TILE)
    return max(1, min(2 * processors // blocks, keys // (4 * TILE), 32))  # a part has 4 tiles at least


def forward(q, k, v, ranges, scale, splits=None, compiled=None):
    """The kernel's outputs o (B, H, T, D) and lse (B, H, T); rows that see nothing have 0 and infinity."""
    q, k, v, ranges = _aligned(q), _aligned(k), _aligned(v), ranges.to(torch.int32).contiguous()
    if splits is None:
        processors = torch.cuda.get_device_properties(q.device).multi_processor_count if q.is_cuda else 1
        splits = best_splits(q.shape[0], q.shape[1], q.shape[2], k.shape[2], processors)
    o, arrays = _like(q), {"ranges": ranges, "lse": q.new_empty(q.shape[:-1], dtype=torch.float32)}
    if splits > 1:
        arrays["part_o"] = q.new_empty((splits, *q.shape), dtype=torch.float32)
        arrays["part_lse"] = q.new_empty((splits, *q.shape[:-1]), dtype=torch.float32)
    _run("attention_forward", compiled, {"q": q, "k": k, "v": v, "o": o}, arrays, scale, splits)
    return o, arrays["lse"]


def backward(grad_o, q, k, v, ranges, o, lse, scale, compiled=None):
    """Gradients of q, k and v, given what `forward` returned."""
    q, k, v, ranges = _aligned(q), _aligned(k), _aligned(v), ranges.to(torch.int32).contiguous()
    tensors = {"q": q, "k": k, "v": v, "o": _aligned(o), "grad_o": _aligned(grad_o)}
    grads = {"grad_q": _like(q), "grad_k": _like(k), "grad_v": _like(v)}
    bounds = ranges.new_empty((q.shape[0], -(-q.shape[2] // TILE), 3))
    arrays = {"ranges": ranges, "lse": lse.contiguous(), "delta": torch.empty_like(lse), "bounds": bounds}
    _run("attention_backward", compiled, tensors | grads, arrays, scale)
    return tuple(grads.values())


# ---------------------------------------------------------------- as an operator of torch, which torch.compile keeps


@torch.library.custom_op("planned_diffusion::attention", mutates_args=())
def _attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, ranges: torch.Tensor, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    return forward(q, k, v, ranges, scale)


@_attention.register_fake
def _(q, k, v, ranges, scale):
    return _like(q), q.new_empty(q.shape[:-1], dtype=torch.float32)


@torch.library.custom_op("planned_diffusion::attention_backward", mutates_args=())
def _attention_backward(
    grad_o: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    ranges: torch.Tensor,
    o: torch.Tensor,
    lse: torch.Tensor,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return backward(grad_o, q, k, v, ranges, o, lse, scale)


@_attention_backward.register_fake
def _(grad_o, q, k, v, ranges, o, lse, scale):
    return _like(q), _like(k), _like(v)


def _save(ctx, inputs, output):
    *tensors, ctx.scale = inputs
    ctx.save_for_backward(*tensors, *output)


def _differentiate(ctx, grad_o, grad_lse):
    """lse is there for the backward pass; nothing outside this file gets it, so it has no gradient."""
    return *_attention_backward(grad_o, *ctx.saved_tensors, ctx.scale), None, None


_attention.register_autograd(_differentiate, setup_context=_save)


def attention(q, k, v, ranges, scale=None):
    """softmax(scale * q k^T) v, where query i of a row sees the keys [0, prefix) and [begin, end).

    q (B, H, T, D), k and v (B, Hkv, S, D), Hkv a divisor of H: bfloat16 or float16, D 32, 64 or 128. ranges (B, T, 3):
    prefix, begin, end, best as int32. `scale` is 1 / sqrt(D) by default. A query that sees nothing gets zeros.
    Values in memory that nobody sees must be finite (zero an empty cache): 0 * nan is nan.
    """
    (B, H, T, D), (_, kv_heads, S, _) = q.shape, k.shape
    scale = D**-0.5 if scale is None else scale
    if q.dtype not in ELEMENTS or {k.dtype, v.dtype} != {q.dtype} or D not in HEAD_SIZES:
        raise ValueError(f"q, k, v are {q.dtype}, {k.dtype}, {v.dtype} with heads of {D}: not for this kernel")
    if k.shape != (B, kv_heads, S, D) or v.shape != k.shape or H % kv_heads or ranges.shape != (B, T, 3):
        raise ValueError(f"shapes {[*map(tuple, (q.shape, k.shape, v.shape, ranges.shape))]} do not fit each other")
    if min(B, H, T, S) < 1 or scale <= 0 or {k.device, v.device, ranges.device} != {q.device}:
        raise ValueError("no size may be 0, the scale must be positive, and all tensors be on one device")
    return _attention(q, k, v, ranges, float(scale))[0]
