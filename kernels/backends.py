"""Attention under the mask of three integers per query, computed in one of four ways; `--attention` picks.

| backend  | what computes it                                               | where                       |
|----------|----------------------------------------------------------------|-----------------------------|
| `dense`  | torch's scaled_dot_product_attention with the mask as a matrix | everywhere: the reference   |
| `spans`  | the same for each run of queries that see the same keys        | sampling on a CPU           |
| `flex`   | FlexAttention with a BlockMask, which skips what nobody sees   | a GPU, with torch.compile   |
| `kernel` | our fused CUDA kernel (kernels/README.md)                      | a GPU, bfloat16 and float16 |
"""

from collections.abc import Callable
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

import kernels
from masks import sees
from model import DENSE, Backend, Transformer, dense, dense_mask


@torch.compiler.disable
def block_mask(ranges: Tensor, n_keys: int) -> object:
    from torch.nn.attention.flex_attention import create_block_mask

    prefix, begin, end = ranges.unbind(-1)

    def mask(b, h, query, key):
        return sees(key, prefix[b, query], begin[b, query], end[b, query])

    return create_block_mask(mask, ranges.shape[0], None, ranges.shape[1], n_keys, device=ranges.device)


@cache
def compiled_flex() -> Callable:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=True)


def flex(q: Tensor, k: Tensor, v: Tensor, mask: object) -> Tensor:
    q, k = q.to(v.dtype), k.to(v.dtype)  # autocast leaves normed queries and keys in float32
    return compiled_flex()(q, k, v, block_mask=mask, enable_gqa=True)


def kernel_ranges(ranges: Tensor, n_keys: int) -> Tensor:
    return ranges.int()


def kernel(q: Tensor, k: Tensor, v: Tensor, ranges: Tensor) -> Tensor:
    return kernels.attention(q.to(v.dtype), k.to(v.dtype), v, ranges)


def spans_of_queries(ranges: Tensor, n_keys: int) -> list[tuple] | Tensor:
    """For each row of the batch its R runs of queries that see the same keys: (R, N) where the queries are, (R, S)
    where their keys are, (R, 1, 1, S) which of these are no padding, and where the T queries are among the R * N.
    Or the dense mask, where the runs are too short to pay."""
    rows = [row.unique_consecutive(dim=0, return_counts=True) for row in ranges]
    if 16 * sum(len(runs) for runs, _ in rows) > ranges[..., 0].numel():
        return dense_mask(ranges, n_keys)
    return [places_of_runs(runs, lengths, ranges.shape[1]) for runs, lengths in rows]


def places_of_runs(runs: Tensor, lengths: Tensor, n_queries: int) -> tuple[Tensor | None, ...]:
    """`runs` (R, 3): what each sees, `lengths` (R,): how many queries it has. None for what needs no padding."""
    prefix, begin, end = runs[:, :, None].unbind(1)  # (R, 1) each
    begin = begin.maximum(prefix)  # what lies in both parts is seen once
    n_seen = prefix + (end - begin).clamp_min(0)
    number = torch.arange(int(n_seen.max()))
    keys = torch.where(number < prefix, number, begin - prefix + number)
    seen = number < n_seen
    queries = (lengths.cumsum(0) - lengths)[:, None] + torch.arange(int(lengths.max()))
    own = torch.arange(queries.shape[1]) < lengths[:, None]
    return (
        queries.clamp_max(n_queries - 1),
        keys.where(seen, 0),
        None if seen.all() else seen[:, None, None],
        None if own.all() else own.flatten().nonzero()[:, 0],
    )


def by_span(q: Tensor, k: Tensor, v: Tensor, rows: list[tuple] | Tensor) -> Tensor:
    """Each run of queries with just the keys that it sees: spans do not pay for their siblings."""
    if torch.is_tensor(rows):
        return dense(q, k, v, rows)
    outputs = []
    for row, (queries, keys, seen, own) in enumerate(rows):
        pick = lambda x, index: x[row].index_select(1, index.flatten()).unflatten(1, index.shape).transpose(0, 1)
        y = F.scaled_dot_product_attention(pick(q, queries), pick(k, keys), pick(v, keys), seen, enable_gqa=True)
        y = y.transpose(1, 2).flatten(0, 1)  # (R, H, N, hd) -> (R * N, H, hd)
        outputs.append(y if own is None else y[own])
    return torch.stack(outputs).transpose(1, 2)  # (B, H, T, hd)


BACKENDS = {
    "dense": DENSE,
    "spans": Backend(spans_of_queries, by_span),
    "flex": Backend(block_mask, flex),
    "kernel": Backend(kernel_ranges, kernel),
}


def attend_by(model: Transformer, name: str, dtype: torch.dtype, sampling: bool = False) -> None:
    """Have a model compute attention, of queries in `dtype`, by the backend of a name; see `choose`."""
    device = model.embedding.weight.device
    model.backend = BACKENDS[choose(name, device, dtype, model.config.head_dim, sampling)]


def choose(name: str, device: torch.device | str, dtype: torch.dtype, head_size: int, sampling: bool = False) -> str:
    """The name of a backend; `auto` takes the fastest that works here.

    sampling: without FlexAttention, which takes long to begin with each new shape.
    Raises ValueError if the name is unknown, or if that backend does not work for this device, type or head size.
    """
    on_gpu = torch.device(device).type == "cuda"
    if name not in (*BACKENDS, "auto"):
        raise ValueError(f"--attention {name}: expected one of auto, {', '.join(BACKENDS)}")
    if name == "flex" and not on_gpu:
        raise ValueError(f"--attention flex: trains on a CUDA GPU only, not on {device}: take auto or dense")
    if name == "spans" and torch.device(device).type != "cpu":
        raise ValueError(f"--attention spans: computes on a CPU only, not on {device}: take auto or dense")
    if name == "kernel" and not on_gpu:
        raise ValueError(f"--attention kernel: computes on a CUDA GPU, not on {device} (tests emulate it there, thousands "
                         "of times slower): take auto or dense")  # fmt: skip
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
