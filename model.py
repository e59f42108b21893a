"""A small decoder in Llama's shape, with attention by three integers a token and an exact KV cache.

RMSNorm, RoPE, SwiGLU, grouped-query attention, tied embeddings (Touvron et al. 2023, arXiv 2302.13971).
Nothing here knows about plans or spans: `see` (masks.py) says what each token sees.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from attention import BACKENDS, choose
from settings import check, setting


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

    def __post_init__(self) -> None:
        check(self)
        if self.d_model % (2 * self.n_head):
            raise ValueError(f"--d_model {self.d_model}: expected an even multiple of --n_head {self.n_head}")
        if self.n_head % self.n_kv_head:
            raise ValueError(f"--n_head {self.n_head}: expected a multiple of --n_kv_head {self.n_kv_head}")


class KVCache:
    """Keys and values of all layers: entry i holds token i of the layout.

    One entry more than `length`, the last, takes what batch padding writes; nothing ever sees it.
    """

    def __init__(self, config, batch, length, device=None, dtype=None):
        shape = (batch, config.n_kv_head, length + 1, config.d_model // config.n_head)
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
            cache[self.rows, :, index] = new.transpose(1, 2).to(cache.dtype)
        return [cache[self.read, :, :n_keys] for cache in caches]  # (B, Hkv, n_keys, hd) each


def rope(position, head_dim, theta):
    """cos and sin (B, 1, T, head_dim / 2) of RoPE (arXiv 2104.09864) at the given positions (B, T)."""
    frequency = theta ** (-torch.arange(0, head_dim, 2, device=position.device) / head_dim)
    angle = position[:, None, :, None] * frequency
    return angle.cos(), angle.sin()


def rotate(x, cos, sin):
    """Rotate the pairs (x_i, x_{i + hd/2}), as Llama's published weights expect."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1).type_as(x)


class Attention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.n_head, self.n_kv_head = config.n_head, config.n_kv_head
        self.head_dim = config.d_model // config.n_head
        self.qkv = nn.Linear(config.d_model, (config.n_head + 2 * config.n_kv_head) * self.head_dim, bias=False)
        self.out = nn.Linear(config.d_model, config.d_model, bias=False)
        self.qk_norm = config.qk_norm
        if self.qk_norm:
            self.q_norm, self.k_norm = nn.RMSNorm(self.head_dim, 1e-5), nn.RMSNorm(self.head_dim, 1e-5)

    def forward(self, x, cos, sin, attend, mask, store):
        B, T, _ = x.shape
        qkv = self.qkv(x).view(B, T, -1, self.head_dim).transpose(1, 2)  # (B, H + 2 Hkv, T, hd)
        q, k, v = qkv.split([self.n_head, self.n_kv_head, self.n_kv_head], dim=1)
        if self.qk_norm:
            dtype = self.q_norm.weight.dtype  # float32 also where autocast multiplies in bfloat16
            q, k = self.q_norm(q.to(dtype)), self.k_norm(k.to(dtype))
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        k, v = store(k, v)  # (B, Hkv, S, hd)
        y = attend(q, k, v, mask)
        return self.out(y.transpose(1, 2).reshape(B, T, -1))


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.attention_norm, self.ff_norm = nn.RMSNorm(config.d_model, 1e-5), nn.RMSNorm(config.d_model, 1e-5)
        self.attention = Attention(config)
        self.gate_up = nn.Linear(config.d_model, 2 * config.d_ff, bias=False)
        self.down = nn.Linear(config.d_ff, config.d_model, bias=False)

    def forward(self, x, *attention_inputs):
        x = x + self.attention(self.attention_norm(x), *attention_inputs)
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

    def attend_by(self, backend, dtype=torch.float32, many_shapes=False):
        """Choose what computes attention (attention.py) of queries in `dtype`."""
        head_size = self.config.d_model // self.config.n_head
        self.backend = BACKENDS[choose(backend, self.embedding.weight.device, dtype, head_size, many_shapes)]

    def _init(self, module):
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=0.02)
        if isinstance(module, Block):  # residual branches start small (GPT-2)
            for layer in (module.attention.out, module.down):
                nn.init.normal_(layer.weight, std=0.02 / (2 * self.config.n_layer) ** 0.5)

    def forward(self, token, position, see, cache=None, index=None, n_keys=None):
        """Hidden states (B, T, D) of tokens (B, T) at RoPE positions (B, T) that see keys by see (B, T, 3).

        Without a cache the keys are the tokens themselves. With one, token (b, t) is entry
        index[b, t] of it, `see` speaks of entries, and only the first `n_keys` are seen (default: as many as see says).
        """
        n_keys = n_keys or (token.shape[1] if cache is None else int(see.max()))
        prepare, attend = self.backend
        mask = prepare(see, n_keys)
        cos, sin = rope(position, self.config.d_model // self.config.n_head, self.config.rope_theta)
        x = self.embedding(token)
        for layer, block in enumerate(self.blocks):
            if cache is None:
                store = lambda k, v: (k, v)
            else:
                store = lambda k, v, layer=layer: cache.update(layer, index, k, v, n_keys)
            x = block(x, cos, sin, attend, mask, store)
        return self.norm(x)

    def logits(self, hidden, n_tokens=None):
        """(..., D) -> (..., n_tokens), logits of the first n_tokens ids (default: all)."""
        return F.linear(hidden, self.embedding.weight[:n_tokens])

    def n_params(self):
        return sum(p.numel() for p in self.parameters())

    def flops_per_token(self, n_keys):
        """Forward FLOPs of a token that sees n_keys keys (multiply-adds count 2; training costs 3x)."""
        return 2 * self.n_params() + 4 * self.config.n_layer * self.config.d_model * n_keys
