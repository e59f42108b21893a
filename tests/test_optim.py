"""Muon, AdamW and their schedule."""

import itertools

import numpy as np
import pytest
import torch
from conftest import each, small_model

from config import TrainConfig
from training import optim
from training.optim import Muon, Optimizer, fast_dtype, orthogonalize


def test_a_fused_layer_is_updated_as_its_matrices_would_be_apart():
    rng = torch.Generator().manual_seed(0)
    fused = torch.nn.Parameter(torch.randn(12, 8, generator=rng))
    fused.grad = torch.randn(12, 8, generator=rng)
    apart = [torch.nn.Parameter(part.detach().clone()) for part in fused.split([4, 8])]
    for part, gradient in zip(apart, fused.grad.split([4, 8])):
        part.grad = gradient.clone()
    Muon([fused], lr=0.1, rows=[4, 8]).step()
    Muon(apart, lr=0.1).step()
    torch.testing.assert_close(fused, torch.cat(apart))


def test_matrices_of_one_shape_are_made_orthogonal_together_as_they_would_be_alone():
    scales = torch.tensor([1e-3, 1, 1e3])[:, None, None]
    stack = scales * torch.randn(3, 16, 24, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(orthogonalize(stack), torch.stack([orthogonalize(g) for g in stack]))


def test_orthogonalize_keeps_singular_vectors_and_makes_singular_values_about_1():
    for (dtype, error), shape in each(
        itertools.product([(torch.float32, 1e-3), (torch.bfloat16, 0.05)], [(24, 24), (40, 16), (16, 40)])
    ):
        g = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 0.01
        u, s, v = torch.linalg.svd(g, full_matrices=False)
        core = u.T @ orthogonalize(g.to(dtype)).float() @ v.T
        large = s > 0.02 * s.max()  # five steps lift a share of 0.02 and more
        assert ((0.6 < core.diag()) & (core.diag() < 1.25))[large].all()
        assert (core - core.diag().diag()).abs().max() < error


def test_muon_moves_tall_matrices_further_and_pulls_weights_to_zero():
    for rows, decay in ((8, 0.0), (32, 0.0), (8, 0.5)):
        p = torch.nn.Parameter(torch.ones(rows, 8))
        before, p.grad = p.detach().clone(), torch.randn(rows, 8, generator=torch.Generator().manual_seed(1))
        Muon([p], lr=0.1, weight_decay=decay).step()
        exact = orthogonalize(p.grad.to(fast_dtype("cpu"))).float()
        expected = before * (1 - 0.1 * decay) - 0.1 * (rows / 8) ** 0.5 * exact
        torch.testing.assert_close(p.detach(), expected, rtol=0.01, atol=0.001)


@pytest.mark.parametrize(("decay", "fallen"), [(1, [6 / 6, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6]),
                                               (0.5, [1, 1, 1, 3 / 3, 2 / 3, 1 / 3])])  # fmt: skip
def test_the_rates_rise_for_warmup_updates_and_fall_to_zero_in_the_last_ones(decay, fallen):
    model = small_model(20, n_layer=1)
    model.embedding.weight.sum().backward()
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer = Optimizer(model, TrainConfig(lr=0.5, adam_lr=0.1, steps=10, warmup=4, decay=decay))
    rates = []
    for step in range(10):
        optimizer.step(step)
        rates.append([part.param_groups[0]["lr"] for part in optimizer.parts])
    share = np.array([0.25, 0.5, 0.75, 1, *fallen])
    np.testing.assert_allclose(rates, np.outer(share, [0.5, 0.1]))


def test_a_warm_up_is_at_most_half_of_a_short_training():
    optimizer = Optimizer(small_model(20, n_layer=1), TrainConfig(lr=0.5, steps=8, warmup=100))
    rates = []
    for step in range(8):
        optimizer.step(step)
        rates.append(optimizer.parts[0].param_groups[0]["lr"])
    np.testing.assert_allclose(rates, 0.5 * np.array([0.25, 0.5, 0.75, 1, 1, 0.75, 0.5, 0.25]))


def test_the_optimizers_state_survives_saving(tokenizer):
    config = TrainConfig(steps=20, warmup=0, weight_decay=0.1)
    models = [small_model(30, n_layer=1) for _ in range(2)]
    optimizers = [Optimizer(m, config) for m in models]
    for step in range(5):
        if step == 3:  # the second goes on from what the first one saved
            models[1].load_state_dict(models[0].state_dict())
            optimizers[1].load({name: value.clone() for name, value in optimizers[0].state().items()})
        for model, optimizer in list(zip(models, optimizers))[: 1 if step < 3 else 2]:
            for n, p in enumerate(model.parameters()):
                p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(100 * step + n))
            optimizer.step(step)
    for a, b in zip(models[0].parameters(), models[1].parameters()):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_the_state_of_another_model_is_refused():
    small, large = (Optimizer(small_model(30, n_layer=n), TrainConfig()) for n in (1, 2))
    wide = Optimizer(small_model(30, n_layer=1, d_ff=32), TrainConfig())
    for optimizer in (large, wide):
        for part in optimizer.parts:
            for p in (p for group in part.param_groups for p in group["params"]):
                p.grad = torch.zeros_like(p)
        optimizer.step(0)
        with pytest.raises(ValueError, match="of another model"):
            small.load(optimizer.state())


# ---------------------------------------------------------------- three updates, written naively in double precision


def naive_orthogonal(g):
    """Five Newton-Schulz steps with the coefficients of Jordan et al., on the wide side."""
    if len(g) > len(g[0]):
        return naive_orthogonal(g.T).T
    x = g / np.sqrt((g**2).sum())
    for _ in range(5):
        a = x @ x.T
        x = 3.4445 * x - 4.775 * (a @ x) + 2.0315 * (a @ a @ x)
    return x


def naive_muon(w, grads, rates, decay, momentum=0.95):
    """Nesterov: the momentum is looked ahead by one step; every matrix by itself."""
    m = np.zeros_like(w)
    for g, rate in zip(grads, rates):
        m = momentum * m + (1 - momentum) * g
        ahead = momentum * m + (1 - momentum) * g
        w = w - rate * decay * w - rate * max(1, len(w) / len(w[0])) ** 0.5 * naive_orthogonal(ahead)
    return w


def naive_adamw(w, grads, rates, decay, beta1=0.9, beta2=0.99):
    m, v = np.zeros_like(w), np.zeros_like(w)
    for step, (g, rate) in enumerate(zip(grads, rates), 1):
        m, v = beta1 * m + (1 - beta1) * g, beta2 * v + (1 - beta2) * g**2
        w = w - rate * decay * w
        w = w - rate * (m / (1 - beta1**step)) / (np.sqrt(v / (1 - beta2**step)) + 1e-8)
    return w


def matrices_of(name, config):
    """How many rows each matrix of a fused layer has."""
    head = config.d_model // config.n_head
    q, kv = config.n_head * head, config.n_kv_head * head
    fused = {"qkv.weight": [q, kv, kv], "gate_up.weight": [config.d_ff] * 2}
    return next((rows for ending, rows in fused.items() if name.endswith(ending)), None)


def test_three_updates_are_those_of_the_naive_optimizers(monkeypatch):
    """Gradients of different sizes in q, k and v, and from update to update."""
    monkeypatch.setattr(optim, "fast_dtype", lambda device: torch.float32)
    config = TrainConfig(lr=0.04, adam_lr=0.2, weight_decay=0.5, steps=6, warmup=2)
    model, rng = small_model(40, n_layer=2), np.random.default_rng(0)
    optimizer, before = (
        Optimizer(model, config),
        {n: p.detach().double().numpy().copy() for n, p in model.named_parameters()},
    )
    grads = {n: [rng.normal(size=w.shape) * 10.0 ** rng.integers(-2, 2) for _ in range(3)] for n, w in before.items()}
    for name in grads:
        if rows := matrices_of(name, model.config):
            for g in grads[name]:
                g *= np.repeat(10.0 ** np.arange(len(rows)), rows)[:, None]
    for step in range(3):
        for name, p in model.named_parameters():
            p.grad = torch.tensor(grads[name][step], dtype=torch.float32)
        optimizer.step(step)
    fractions = (1 / 2, 2 / 2, 4 / 4)
    for name, p in model.named_parameters():
        w = before[name]
        by_adam = w.ndim == 1 or name == "embedding.weight"
        if by_adam:
            rates, decay = [0.2 * fraction for fraction in fractions], 0.5 if w.ndim == 2 else 0.0
            expected = naive_adamw(w, grads[name], rates, decay)
        else:
            cuts = np.cumsum(matrices_of(name, model.config) or [len(w)])[:-1]
            parts = zip(np.split(w, cuts), zip(*(np.split(g, cuts) for g in grads[name])))
            expected = np.concatenate(
                [naive_muon(part, g, [0.04 * fraction for fraction in fractions], 0.5) for part, g in parts]
            )
        np.testing.assert_allclose(
            p.detach().numpy(), expected, rtol=1e-4, atol=1e-5 if by_adam else 2e-4, err_msg=name
        )
