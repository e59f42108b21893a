"""A small decoder in Llama's shape, with attention by three integers per token and an exact KV cache.

RMSNorm, RoPE, SwiGLU, grouped-query attention, tied embeddings (Touvron et al. 2023, arXiv 2302.13971). What the
published Llama, Qwen2 and Qwen3 have besides is in the last fields of the config (pretrained/llama.py fills them in).
Nothing here knows about plans or spans: `see` (masks.py) says what each token sees.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from masks import visible
from plumbing.settings import check, setting


@dataclass
class ModelConfig:
    """Model."""

    vocab_size: int = 2048  # comes from the data set's tokenizer
    n_layer: int = setting(6, "transformer blocks", at_least=1, at_most=1000)
    n_head: int = setting(4, "attention heads", at_least=1)
    n_kv_head: int = setting(4, "heads of keys and values, each shared by n_head / n_kv_head query heads", at_least=1)
    d_model: int = setting(128, "width of the residual stream", at_least=1)
    d_ff: int = setting(384, "hidden size of SwiGLU", at_least=1)
    rope_theta: float = setting(10000.0, "longest wavelength of RoPE, in positions / 2 pi", above=1)
    qk_norm: bool = setting(True, "RMSNorm on queries and keys (Qwen3); Llama has none")
    head_dim: int = 0  # dimensions per head; 0: d_model / n_head
    qkv_bias: bool = False  # a bias on queries, keys and values (Qwen2)
    tied: bool = True  # the output layer is the embedding
    norm_eps: float = 1e-5
    rope_scaling: dict | None = None  # for long contexts, in the words of a transformers config: linear or llama3
    half: str = "float16"  # type of 16 bits in which weights are shipped and a GPU samples

    def __post_init__(self) -> None:
        check(self)
        if not self.head_dim and self.d_model % (2 * self.n_head):
            raise ValueError(f"--d_model {self.d_model}: expected an even multiple of --n_head {self.n_head}")
        self.head_dim = self.head_dim or self.d_model // self.n_head
        if self.half not in ("float16", "bfloat16"):
            raise ValueError(f"half {self.half!r}: expected float16 or bfloat16")
        if self.rope_scaling:
            slowed(torch.ones(1), **self.rope_scaling)  # TypeError for other words
        if self.n_head % self.n_kv_head:
            raise ValueError(f"--n_head {self.n_head}: expected a multiple of --n_kv_head {self.n_kv_head}")


# ---------------------------------------------------------------- attention


class Backend(NamedTuple):
    """A way to compute attention under the mask; kernels/backends.py has faster ones."""

    prepare: Callable  # what it makes of (ranges, n_keys), once per pass
    attend: Callable  # (q, k, v, what was prepared) -> (B, H, T, hd), in each layer


def dense_mask(ranges: Tensor, n_keys: int) -> Tensor:
    return visible(ranges, n_keys)[:, None]  # (B, 1, T, S)


def dense(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """Attention of q (B, H, T, hd) to k, v (B, Hkv, S, hd) where the mask (B, 1, T, S) is True."""
    dtype = v.dtype if v.is_cuda else torch.float32  # on a CPU bfloat16 takes three times as long
    if not (v.is_cpu or v.is_cuda):  # up to torch 2.7, shared heads abort on a Mac's GPU
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    with torch.autocast("cpu", enabled=False):
        y = F.scaled_dot_product_attention(q.to(dtype), k.to(dtype), v.to(dtype), attn_mask=mask, enable_gqa=True)
    return y.type_as(v)


DENSE = Backend(dense_mask, dense)  # works everywhere: the reference for all others


class KVCache:
    """Keys and values of all layers: entry i holds token i of the layout.

    One entry more than `length`, the last, takes what batch padding writes; nothing ever sees it.
    """

    def __init__(self, config: ModelConfig, batch: int, length: int, device: torch.device | None = None,
                 dtype: torch.dtype | None = None):  # fmt: skip
        shape = (batch, length + 1, config.n_kv_head, config.head_dim)
        zeros = lambda: torch.zeros(shape, device=device, dtype=dtype)  # zeros: masked NaN would still spread
        self.k, self.v = ([zeros() for _ in range(config.n_layer)] for _ in "kv")
        self.batch, self.junk = batch, length
        self.select(torch.arange(batch, device=device), first=True)

    def select(self, rows: Tensor, first: bool = False) -> None:
        """Which rows of the batch the next passes compute, (B,); `first`: they are the first B, so not copied."""
        self.rows, self.read = rows[:, None], slice(len(rows)) if first else rows

    def update(self, layer: int, index: Tensor, k: Tensor, v: Tensor, n_keys: int) -> list[Tensor]:
        """Write k, v (B, Hkv, T, hd) of the selected rows at entries index (B, T); return theirs up to n_keys."""
        caches = self.k[layer], self.v[layer]
        for cache, new in zip(caches, (k, v)):
            cache[self.rows, index] = new.transpose(1, 2).to(cache.dtype)
        return [cache[self.read, :n_keys].transpose(1, 2) for cache in caches]  # (B, Hkv, n_keys, hd) each


def rope(position: Tensor, head_dim: int, theta: float, scaling: dict | None = None) -> tuple[Tensor, Tensor]:
    """The factors of `rotate` (B, 1, T, head_dim) for RoPE (arXiv 2104.09864) at the given positions (B, T)."""
    frequency = theta ** (-torch.arange(0, head_dim, 2, device=position.device) / head_dim)
    if scaling:
        frequency = frequency / scaling["factor"] * slowed(frequency, **scaling)
    angle = position[:, None, :, None] * frequency
    cos, sin = angle.cos(), angle.sin()
    return torch.cat([cos, cos], dim=-1), torch.cat([-sin, sin], dim=-1)


def slowed(frequency: Tensor, rope_type: str, factor: float, low_freq_factor: float = 0, high_freq_factor: float = 0,
           original_max_position_embeddings: int = 0) -> Tensor | float:  # fmt: skip
    """By what to multiply frequencies that were divided by `factor`: 1, or `factor` for those that are kept.

    `llama3` keeps the waves that the model saw more than high_freq_factor times in its original context.
    """
    if rope_type == "linear":
        return 1.0
    times = original_max_position_embeddings * frequency / (2 * math.pi)
    kept = ((times - low_freq_factor) / (high_freq_factor - low_freq_factor)).clamp(0, 1)
    return 1 - kept + factor * kept


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the pairs (x_i, x_{i + hd/2}), as Llama's published weights expect."""
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, dims=-1), sin).type_as(x)


def pick_columns(columns: Tensor | None, *tensors: Tensor) -> tuple[Tensor, ...]:
    """Columns (B, R) of tensors (B, ..., T, D); all of them if `columns` is None."""
    if columns is None:
        return tensors
    index = [columns.view(len(columns), *[1] * (x.ndim - 3), -1, 1) for x in tensors]
    return tuple(x.take_along_dim(i, dim=-2) for x, i in zip(tensors, index))


# ---------------------------------------------------------------- transformer


class Attention(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        self.heads = config.n_head, config.n_kv_head, config.n_kv_head  # of queries, keys and values
        self.head_dim = config.head_dim
        self.qkv = nn.Linear(config.d_model, sum(self.heads) * self.head_dim, config.qkv_bias)
        self.out = nn.Linear(config.n_head * self.head_dim, config.d_model, bias=False)
        self.qk_norm = config.qk_norm
        if self.qk_norm:
            self.q_norm, self.k_norm = (nn.RMSNorm(self.head_dim, config.norm_eps) for _ in "qk")

    def forward(self, x: Tensor, rotation: tuple[Tensor, Tensor], attend: Callable, mask: object, store: Callable,
                columns: Tensor | None = None) -> Tensor:  # fmt: skip
        """Attention of x (B, T, D), or only of its `columns` (B, R) to keys and values of all: (B, T or R, D)."""
        q, k, v = self.qkv(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2).split(self.heads, dim=1)
        (q,), cos_sin = pick_columns(columns, q), pick_columns(columns, *rotation)
        if self.qk_norm:
            dtype = self.q_norm.weight.dtype  # float32 also where autocast multiplies in bfloat16
            q, k = self.q_norm(q.to(dtype)), self.k_norm(k.to(dtype))
        k, v = store(rotate(k, *rotation), v)  # (B, Hkv, S, hd)
        y = attend(rotate(q, *cos_sin), k, v, mask)  # (B, H, T or R, hd)
        return self.out(y.transpose(1, 2).flatten(2))


class Block(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        self.attention_norm, self.ff_norm = (nn.RMSNorm(config.d_model, config.norm_eps) for _ in range(2))
        self.attention = Attention(config)
        self.gate_up = nn.Linear(config.d_model, 2 * config.d_ff, bias=False)
        self.down = nn.Linear(config.d_ff, config.d_model, bias=False)

    def forward(self, x: Tensor, rotation: tuple[Tensor, Tensor], attend: Callable, mask: object, store: Callable,
                columns: Tensor | None = None) -> Tensor:  # fmt: skip
        """x (B, T, D) after this block, or only its `columns` (B, R): (B, R, D)."""
        (kept,) = pick_columns(columns, x)
        x = kept + self.attention(self.attention_norm(x), rotation, attend, mask, store, columns)
        gate, up = self.gate_up(self.ff_norm(x)).chunk(2, dim=-1)
        return x + self.down(F.silu(gate) * up)


class Transformer(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.d_model)  # if tied, also the output layer
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.norm = nn.RMSNorm(config.d_model, config.norm_eps)
        if not config.tied:
            self.output = nn.Embedding(config.vocab_size, config.d_model)
        self.recompute = False  # gradient checkpointing: backward computes a block's activations once more
        self.backend = DENSE  # what computes attention
        self.apply(self._init)

    def _init(self, module: nn.Module) -> None:
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=0.02)
        if isinstance(module, Block):  # residual branches start small (GPT-2)
            for layer in (module.attention.out, module.down):
                nn.init.normal_(layer.weight, std=0.02 / (2 * self.config.n_layer) ** 0.5)

    def forward(self, token: Tensor, position: Tensor, ranges: Tensor, cache: KVCache | None = None,
                index: Tensor | None = None, n_keys: int | None = None, columns: Tensor | None = None) -> Tensor:  # fmt: skip
        """Hidden states (B, T, D) of tokens (B, T) at RoPE positions (B, T) that see the keys of ranges (B, T, 3).

        Without a cache the keys are the tokens themselves. With one, token (b, t) is entry index[b, t] of it,
        `ranges` speaks of entries, and only the first `n_keys` are seen (default: as many as `ranges` says).
        With `columns` (B, R) the result is (B, R, D): the last block computes only what is asked for.
        """
        n_keys = n_keys or (token.shape[1] if cache is None else int(ranges.max()))
        prepare, attend = self.backend
        c, mask, x = self.config, prepare(ranges, n_keys), self.embedding(token)
        rotation = rope(position, c.head_dim, c.rope_theta, c.rope_scaling)
        for layer, block in enumerate(self.blocks):
            if cache is None:
                store = lambda k, v: (k, v)
            else:
                store = lambda k, v, layer=layer: cache.update(layer, index, k, v, n_keys)
            if columns is not None and layer == c.n_layer - 1:
                x = block(x, rotation, attend, prepare(*pick_columns(columns, ranges), n_keys), store, columns)
            elif self.recompute and torch.is_grad_enabled():
                x = checkpoint(block, x, rotation, attend, mask, store, use_reentrant=False)
            else:
                x = block(x, rotation, attend, mask, store)
        return self.norm(x)

    def logits(self, hidden: Tensor, n_tokens: int | None = None) -> Tensor:
        """(..., D) -> (..., n_tokens), logits of the first n_tokens ids (default: all)."""
        layer = self.embedding if self.config.tied else self.output
        return F.linear(hidden, layer.weight[:n_tokens])

    def n_params(self) -> int:
        return sum(p.numel() for p in self.parameters())
