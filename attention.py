"""Attention under the mask of three integers per query, computed in one of three ways; `--attention` picks.

| backend  | what computes it                                               | where                       |
|----------|----------------------------------------------------------------|-----------------------------|
| `dense`  | torch's scaled_dot_product_attention with the mask as a matrix | everywhere: the reference   |
| `spans`  | the same for each run of queries that see the same keys        | sampling on a CPU           |
| `flex`   | FlexAttention with a BlockMask, which skips what nobody sees   | a GPU, with torch.compile   |
| `kernel` | our fused CUDA kernel (kernels/README.md)                      | a GPU, bfloat16 and float16 |
"""

from functools import cache

import torch
import torch.nn.functional as F

import kernels
from masks import sees, visible


def dense_mask(ranges, n_keys):
    return visible(ranges, n_keys)[:, None]  # (B, 1, T, S)


def dense(q, k, v, mask):
    dtype = v.dtype if v.is_cuda else torch.float32  # on a CPU bfloat16 takes three times as long
    with torch.autocast("cpu", enabled=False):
        y = F.scaled_dot_product_attention(q.to(dtype), k.to(dtype), v.to(dtype), attn_mask=mask, enable_gqa=True)
    return y.type_as(v)


@torch.compiler.disable
def block_mask(ranges, n_keys):
    from torch.nn.attention.flex_attention import create_block_mask

    prefix, begin, end = ranges.unbind(-1)

    def mask(b, h, query, key):
        return sees(key, prefix[b, query], begin[b, query], end[b, query])

    return create_block_mask(mask, ranges.shape[0], None, ranges.shape[1], n_keys, device=ranges.device)


@cache
def compiled_flex():
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=True)


def flex(q, k, v, mask):
    q, k = q.to(v.dtype), k.to(v.dtype)  # autocast leaves normed queries and keys in float32
    return compiled_flex()(q, k, v, block_mask=mask, enable_gqa=True)


def kernel_ranges(ranges, n_keys):
    return ranges.int()


def kernel(q, k, v, ranges):
    return kernels.attention(q.to(v.dtype), k.to(v.dtype), v, ranges)


def spans_of_queries(ranges, n_keys):
    """Consecutive queries that see the same keys, as (row, first, last + 1, prefix, begin, end); or the dense mask
    where these are so short that a product for each would take longer."""
    changes = (ranges[:, 1:] != ranges[:, :-1]).any(-1)  # (B, T - 1)
    if 16 * int(changes.sum() + len(ranges)) > ranges[..., 0].numel():
        return dense_mask(ranges, n_keys)
    runs = []
    for row, (line, change) in enumerate(zip(ranges.tolist(), changes)):
        borders = [0, *(change.nonzero()[:, 0] + 1).tolist(), len(line)]
        runs += [(row, first, last, *line[first]) for first, last in zip(borders, borders[1:])]
    return runs


def by_span(q, k, v, runs):
    """Each run of queries with just the keys that it sees, so without a mask: spans do not pay for their siblings."""
    if torch.is_tensor(runs):
        return dense(q, k, v, runs)
    y = torch.empty_like(q)
    for row, first, last, prefix, begin, end in runs:
        seen = [torch.cat([x[row, :, :prefix], x[row, :, max(begin, prefix) : end]], dim=1)[None] for x in (k, v)]
        y[row, :, first:last] = F.scaled_dot_product_attention(q[row, None, :, first:last], *seen, enable_gqa=True)[0]
    return y


BACKENDS = {  # what a backend makes of (ranges, n_keys) once per pass, and what it computes with that in each layer
    "dense": (dense_mask, dense),
    "spans": (spans_of_queries, by_span),
    "flex": (block_mask, flex),
    "kernel": (kernel_ranges, kernel),
}


def choose(name: str, device: torch.device | str, dtype: torch.dtype, head_size: int, sampling: bool = False) -> str:
    """The backend of a name; `auto` takes the fastest that works here.

    sampling: without FlexAttention, which takes long to begin with each new shape.
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
        return "spans" if sampling and torch.device(device).type == "cpu" else "dense"
    if kernels.available(dtype, head_size):
        return "kernel"
    return "dense" if dtype == torch.float32 or sampling else "flex"
