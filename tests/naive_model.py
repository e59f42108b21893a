"""The transformer token by token and head by head, in double precision."""

import math
from functools import partial

import torch


def naive_norm(x, weight, eps=1e-5):
    return x / (x.pow(2).mean() + eps) ** 0.5 * weight


def naive_scaling(frequency, rope_type, factor, low_freq_factor=0, high_freq_factor=0,
                  original_max_position_embeddings=0):  # fmt: skip
    """As in Llama's published code: by the wavelength, long waves are stretched, short ones kept."""
    wavelength = 2 * math.pi / frequency
    if rope_type == "linear" or wavelength > original_max_position_embeddings / low_freq_factor:
        return frequency / factor
    if wavelength < original_max_position_embeddings / high_freq_factor:
        return frequency
    smooth = original_max_position_embeddings / wavelength - low_freq_factor
    smooth /= high_freq_factor - low_freq_factor
    return (1 - smooth) * frequency / factor + smooth * frequency


def naive_rope(x, position, theta, scaling=None):
    """Turn each pair (x_i, x_{i + half}), a complex number, by position * theta^(-2i / head_dim) radians."""
    half = len(x) // 2
    frequencies = [theta ** (-2 * i / len(x)) for i in range(half)]
    frequencies = [naive_scaling(f, **scaling) for f in frequencies] if scaling else frequencies
    turn = torch.tensor([position * f for f in frequencies], dtype=torch.double)
    turned = torch.complex(x[:half], x[half:]) * torch.exp(1j * turn)
    return torch.cat([turned.real, turned.imag])


def naive_attention(block, x, position, ranges, config):
    """A softmax per query and head over the keys that its three integers name."""
    T, hd, group = len(x), config.head_dim, config.n_head // config.n_kv_head
    heads = (x @ block.qkv.weight.T + (block.qkv.bias if config.qkv_bias else 0)).view(T, -1, hd)
    kv = config.n_head + config.n_kv_head
    q, k, v = heads[:, : config.n_head], heads[:, config.n_head : kv], heads[:, kv:]
    out = torch.zeros(T, config.n_head, hd, dtype=x.dtype)
    for h in range(config.n_head):
        norms = (block.q_norm.weight, block.k_norm.weight) if config.qk_norm else (None, None)
        turned = [[naive_rope(row if w is None else naive_norm(row, w, config.norm_eps), int(p), config.rope_theta,
                              config.rope_scaling)
                   for row, p in zip(rows, position)] for rows, w in zip((q[:, h], k[:, h // group]), norms)]  # fmt: skip
        for i, (prefix, begin, end) in enumerate(ranges.tolist()):
            keys = sorted({*range(prefix), *range(begin, end)})
            score = torch.stack([turned[0][i] @ turned[1][j] for j in keys]) / hd**0.5
            out[i, h] = score.softmax(0) @ v[keys, h // group]
    return out.reshape(T, -1) @ block.out.weight.T


def naive_forward(model, token, position, ranges):
    """Hidden states (T, D) of one sequence, in double precision."""
    x, norm = model.embedding.weight[token], partial(naive_norm, eps=model.config.norm_eps)
    for block in model.blocks:
        normed = torch.stack([norm(row, block.attention_norm.weight) for row in x])
        x = x + naive_attention(block.attention, normed, position, ranges, model.config)
        normed = torch.stack([norm(row, block.ff_norm.weight) for row in x])
        gate, up = (normed @ block.gate_up.weight.T).chunk(2, dim=-1)
        x = x + (gate * torch.sigmoid(gate) * up) @ block.down.weight.T
    return torch.stack([norm(row, model.norm.weight) for row in x])
