"""Attention under the mask of three integers per query, computed in one of three ways; `--attention` picks.

| backend  | what computes it                                               | where                       |
|----------|----------------------------------------------------------------|-----------------------------|
| `dense`  | torch's scaled_dot_product_attention with the mask as a matrix | everywhere: the reference   |
| `flex`   | FlexAttention with a BlockMask, which skips what nobody sees   | a GPU, with torch.compile   |
| `kernel` | our fused CUDA kernel (kernels/README.md)                      | a GPU, bfloat16 and float16 |
"""

from functools import cache

import torch
import torch.nn.functional as F

import kernels
from masks import sees, visible


def dense_mask(bounds, n_keys):
    return visible(bounds, n_keys)[:, None]  # (B, 1, T, S)


def dense(q, k, v, mask):
    dtype = v.dtype if v.is_cuda else torch.float32  # on a CPU bfloat16 takes three times as long
    with torch.autocast("cpu", enabled=False):
        y = F.scaled_dot_product_attention(q.to(dtype), k.to(dtype), v.to(dtype), attn_mask=mask, enable_gqa=True)
    return y.type_as(v)


@torch.compiler.disable
def block_mask(bounds, n_keys):
    from torch.nn.attention.flex_attention import create_block_mask

    prefix, begin, end = bounds.unbind(-1)

    def mask(b, h, query, key):
        return sees(key, prefix[b, query], begin[b, query], end[b, query])

    return create_block_mask(mask, bounds.shape[0], None, bounds.shape[1], n_keys, device=bounds.device)


@cache
def compiled_flex():
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=True)


def flex(q, k, v, mask):
    q, k = q.to(v.dtype), k.to(v.dtype)  # autocast leaves normed queries and keys in float32
    return compiled_flex()(q, k, v, block_mask=mask, enable_gqa=True)


def kernel_bounds(bounds, n_keys):
    return bounds.int()


def kernel(q, k, v, bounds):
    return kernels.attention(q.to(v.dtype), k.to(v.dtype), v, bounds)


BACKENDS = {  # what a backend makes of (bounds, n_keys) once per pass, and what it computes with that in each layer
    "dense": (dense_mask, dense),
    "flex": (block_mask, flex),
    "kernel": (kernel_bounds, kernel),
}


def choose(name: str, device: torch.device | str, dtype: torch.dtype, head_size: int, many_shapes: bool = False) -> str:
    """The backend of a name; `auto` takes the fastest that works here.

    many_shapes: without FlexAttention, which takes long to begin with each new one.
    Raises ValueError if the name is unknown, or if that backend does not work for this device, type or head size.
    """
    on_gpu = torch.device(device).type == "cuda"
    if name not in (*BACKENDS, "auto"):
        raise ValueError(f"--attention {name}: expected one of auto, {', '.join(BACKENDS)}")
    if name == "flex" and not on_gpu:
        raise ValueError(f"--attention flex: trains on a CUDA GPU only, not on {device}: take auto or dense")
    if name == "kernel" and (dtype not in kernels.ELEMENTS or head_size not in kernels.HEAD_SIZES):
        raise ValueError(f"--attention kernel: computes in bfloat16 or float16 with heads of 32, 64 or 128 dimensions, "
                         f"not in {dtype} with heads of {head_size}: take auto or dense")  # fmt: skip
    if name != "auto":
        return name
    if not on_gpu:
        return "dense"
    if kernels.available(dtype, head_size):
        return "kernel"
    return "dense" if dtype == torch.float32 or many_shapes else "flex"
