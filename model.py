"""A small decoder in Llama's shape, with attention by three integers a token and an exact KV cache.

RMSNorm, RoPE, SwiGLU, grouped-query attention, tied embeddings (Touvron et al. 2023, arXiv 2302.13971).
Nothing here knows about plans or spans: `see` (masks.py) says what each token sees.
"""

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from attention import BACKENDS, choose
from settings import setting
from tokenizer import Tokenizer


@dataclass
class ModelConfig:
    """Model."""

    vocab_size: int = 2048  # comes from the data set's tokenizer
    n_layer: int = setting(6, "transformer blocks")
    n_head: int = setting(4, "attention heads")
    n_kv_head: int = setting(4, "heads of keys and values, each shared by n_head / n_kv_head query heads")
    d_model: int = setting(128, "width of the residual stream")
    d_ff: int = setting(384, "hidden size of SwiGLU")
    rope_theta: float = setting(10000.0, "longest wavelength of RoPE, in positions / 2 pi")
    qk_norm: bool = setting(True, "RMSNorm on queries and keys (Qwen3); Llama has none")

    def __post_init__(self):
        sizes = self.vocab_size, self.n_layer, self.n_head, self.n_kv_head, self.d_model, self.d_ff
        if min(sizes) < 1 or self.d_model % (2 * self.n_head) or self.n_head % self.n_kv_head:
            raise ValueError(
                f"all sizes must be 1 or more, d_model {self.d_model} an even multiple of n_head {self.n_head}, "
                f"and n_head a multiple of n_kv_head {self.n_kv_head}"
            )


class KVCache:
    """Keys and values of all layers: entry i holds token i of the layout.

    One entry more than `length`, the last, takes what batch padding writes; nothing ever sees it.
    """

    def __init__(self, config, batch, length, device=None, dtype=None):
        shape = (batch, length + 1, config.n_kv_head, config.d_model // config.n_head)
        zeros = lambda: torch.zeros(shape, device=device, dtype=dtype)  # zeros: masked NaN would still spread
        self.k, self.v = ([zeros() for _ in range(config.n_layer)] for _ in "kv")
        self.batch, self.junk = batch, length
        self.select(torch.arange(batch, device=device), first=True)

    def select(self, rows, first=False):
        """Which rows of the batch the next passes compute, (B,); `first`: they are the first B, so not copied."""
        self.rows, self.read = rows[:, None], slice(len(rows)) if first else rows

    def update(self, layer, index, k, v, n_keys):
        """Write k, v (B, Hkv, T, hd) of the selected rows at entries index (B, T); return theirs up to n_keys."""
        caches = self.k[layer], self.v[layer]
        for cache, new in zip(caches, (k, v)):
            cache[self.rows, index] = new.transpose(1, 2).to(cache.dtype)
        return [cache[self.read, :n_keys].transpose(1, 2) for cache in caches]  # (B, Hkv, n_keys, hd) each


def rope(position, head_dim, theta):
    """The factors of `rotate` (B, 1, T, head_dim) for RoPE (arXiv 2104.09864) at the given positions (B, T)."""
    frequency = theta ** (-torch.arange(0, head_dim, 2, device=position.device) / head_dim)
    angle = position[:, None, :, None] * frequency
    cos, sin = angle.cos(), angle.sin()
    return torch.cat([cos, cos], dim=-1), torch.cat([-sin, sin], dim=-1)


def rotate(x, cos, sin):
    """Rotate the pairs (x_i, x_{i + hd/2}), as Llama's published weights expect."""
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, dims=-1), sin).type_as(x)


def pick_columns(columns, *tensors):
    """Columns (B, R) of tensors (B, ..., T, D); all of them if `columns` is None."""
    if columns is None:
        return tensors
    index = [columns.view(len(columns), *[1] * (x.ndim - 3), -1, 1) for x in tensors]
    return [x.take_along_dim(i, dim=-2) for x, i in zip(tensors, index)]


class Linear(nn.Linear):
    """A linear layer without bias. In sampling on a CPU, oneDNN computes its large products, from weights that are
    packed once: on AMD 10% to 20% faster than MKL, which packs them in each product."""

    LARGE = 1 << 24  # multiplications; smaller products take longer this way

    def __init__(self, n_in, n_out):
        super().__init__(n_in, n_out, bias=False)
        self.packed = None

    def forward(self, x, first=0, last=None):
        """Outputs [first, last) of x (..., n_in): all by default."""
        weight = self.weight if (first, last) == (0, None) else self.weight[first:last]
        large = x.numel() * len(weight) >= self.LARGE
        if self.packed is None or not large or torch.is_grad_enabled() or torch.compiler.is_compiling():
            return F.linear(x, weight)
        if (first, last) not in self.packed:
            self.packed[first, last] = torch.ops.mkldnn._reorder_linear_weight(weight.clone())
        return torch.ops.mkldnn._linear_pointwise(x, self.packed[first, last], None, "none", [], "")


class Attention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.n_head, self.n_kv_head = config.n_head, config.n_kv_head
        self.head_dim = config.d_model // config.n_head
        self.qkv = Linear(config.d_model, (config.n_head + 2 * config.n_kv_head) * self.head_dim)
        self.out = Linear(config.d_model, config.d_model)
        self.qk_norm = config.qk_norm
        if self.qk_norm:
            self.q_norm, self.k_norm = nn.RMSNorm(self.head_dim, 1e-5), nn.RMSNorm(self.head_dim, 1e-5)

    def forward(self, x, rotation, attend, mask, store, columns=None):
        """Attention of x (B, T, D), or only of its `columns` (B, R) to keys and values of all: (B, T or R, D)."""
        (q, k, v), cos_sin = self.project(x, columns), pick_columns(columns, *rotation)
        if self.qk_norm:
            dtype = self.q_norm.weight.dtype  # float32 also where autocast multiplies in bfloat16
            q, k = self.q_norm(q.to(dtype)), self.k_norm(k.to(dtype))
        k, v = store(rotate(k, *rotation), v)  # (B, Hkv, S, hd)
        y = attend(rotate(q, *cos_sin), k, v, mask)
        return self.out(y.transpose(1, 2).flatten(2))

    def project(self, x, columns):
        """Queries (B, H, T or R, hd), keys and values (B, Hkv, T, hd)."""
        heads = lambda y, *n: y.unflatten(-1, (-1, self.head_dim)).transpose(1, 2).split(n, dim=1)
        if columns is None:
            return heads(self.qkv(x), self.n_head, self.n_kv_head, self.n_kv_head)
        n_queries = self.n_head * self.head_dim
        (q,) = heads(self.qkv(*pick_columns(columns, x), 0, n_queries), self.n_head)
        return q, *heads(self.qkv(x, n_queries), self.n_kv_head, self.n_kv_head)


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.attention_norm, self.ff_norm = nn.RMSNorm(config.d_model, 1e-5), nn.RMSNorm(config.d_model, 1e-5)
        self.attention = Attention(config)
        self.gate_up = Linear(config.d_model, 2 * config.d_ff)
        self.down = Linear(config.d_ff, config.d_model)

    def forward(self, x, rotation, attend, mask, store, columns=None):
        """x (B, T, D) after this block, or only its `columns` (B, R): (B, R, D)."""
        (kept,) = pick_columns(columns, x)
        x = kept + self.attention(self.attention_norm(x), rotation, attend, mask, store, columns)
        gate, up = self.gate_up(self.ff_norm(x)).chunk(2, dim=-1)
        return x + self.down(F.silu(gate) * up)


class Transformer(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.d_model)  # tied: also the output layer
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.norm = nn.RMSNorm(config.d_model, 1e-5)
        self.attend_by("dense")
        self.apply(self._init)

    def attend_by(self, backend, dtype=torch.float32, sampling=False):
        """Choose what computes attention (attention.py) of queries in `dtype`."""
        head_size = self.config.d_model // self.config.n_head
        self.backend = BACKENDS[choose(backend, self.embedding.weight.device, dtype, head_size, sampling)]

    def pack(self):
        """Where `Linear` can, compute with packed weights from now on, as the weights are now."""
        weight = self.embedding.weight
        packs = weight.device.type == "cpu" and weight.dtype == torch.float32 and torch.backends.mkldnn.is_available()
        for module in self.modules():
            if isinstance(module, Linear):
                module.packed = {} if packs else None

    def _init(self, module):
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=0.02)
        if isinstance(module, Block):  # residual branches start small (GPT-2)
            for layer in (module.attention.out, module.down):
                nn.init.normal_(layer.weight, std=0.02 / (2 * self.config.n_layer) ** 0.5)

    def forward(self, token, position, ranges, cache=None, index=None, n_keys=None, columns=None):
        """Hidden states (B, T, D) of tokens (B, T) at RoPE positions (B, T) that see the keys of ranges (B, T, 3).

        Without a cache the keys are the tokens themselves. With one, token (b, t) is entry index[b, t] of it,
        `ranges` speaks of entries, and only the first `n_keys` are seen (default: as many as `ranges` says).
        With `columns` (B, R) the result is (B, R, D): the last block computes only what is asked for.
        """
        n_keys = n_keys or (token.shape[1] if cache is None else int(ranges.max()))
        prepare, attend = self.backend
        mask, x = prepare(ranges, n_keys), self.embedding(token)
        rotation = rope(position, self.config.d_model // self.config.n_head, self.config.rope_theta)
        for layer, block in enumerate(self.blocks):
            if cache is None:
                store = lambda k, v: (k, v)
            else:
                store = lambda k, v, layer=layer: cache.update(layer, index, k, v, n_keys)
            if columns is not None and layer == self.config.n_layer - 1:
                x = block(x, rotation, attend, prepare(*pick_columns(columns, ranges), n_keys), store, columns)
            else:
                x = block(x, rotation, attend, mask, store)
        return self.norm(x)

    def logits(self, hidden, n_tokens=None):
        """(..., D) -> (..., n_tokens), logits of the first n_tokens ids (default: all)."""
        return F.linear(hidden, self.embedding.weight[:n_tokens])

    def n_params(self):
        return sum(p.numel() for p in self.parameters())

    def flops_per_token(self, n_keys):
        """Forward FLOPs of a token that sees n_keys keys (multiply-adds count 2; training costs 3x)."""
        return 2 * self.n_params() + 4 * self.config.n_layer * self.config.d_model * n_keys


# ---------------------------------------------------------------- checkpoints


class CheckpointError(ValueError):
    """A file that is not a checkpoint of this project; says what to do."""


def save_checkpoint(path, model, tokenizer, info, state=None, dtype=None):
    """Write model, tokenizer and `info` (a dict for JSON), with optimizer tensors `state`, as one safetensors file.

    It holds tensors and text only, so loading executes no code; it appears whole or not at all.
    `dtype` converts the weights (float16 halves what is shipped).
    """
    tensors = {f"model.{name}": p.detach().to(dtype or p.dtype).contiguous() for name, p in model.state_dict().items()}
    tensors |= {f"state.{name}": value for name, value in (state or {}).items()}
    text = {"config": json.dumps(asdict(model.config)), "tokenizer": tokenizer.to_json(), "info": json.dumps(info)}
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, f"{path}.part", text)
    os.replace(f"{path}.part", path)


def load_checkpoint(path, device="cpu"):
    """Read (model in float32, tokenizer, info, state). Raises CheckpointError."""
    try:
        with safe_open(path, "pt", device=str(device)) as file:
            text = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}
        tokenizer = Tokenizer.from_json(text["tokenizer"])
        model = Transformer(ModelConfig(**json.loads(text["config"]))).to(device)
        weights = {name[6:]: value.float() for name, value in tensors.items() if name.startswith("model.")}
        model.load_state_dict(weights)
        info = json.loads(text["info"])
        if tokenizer.vocab_size != model.config.vocab_size or not isinstance(info, dict):
            raise ValueError("its tokenizer is not its model's, or nothing says how it was made")
    except FileNotFoundError:
        raise CheckpointError(f"{path} does not exist: train one with `python train.py`, or see checkpoints/") from None
    except (SafetensorError, OSError, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"{path} is not a checkpoint of this project ({error})") from None
    return model, tokenizer, info, {name[6:]: value for name, value in tensors.items() if name.startswith("state.")}
