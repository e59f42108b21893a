"""Muon, AdamW and their schedule."""

import numpy as np
import pytest
import torch
from conftest import small_model

from optim import Muon, Optimizer, fast_dtype, orthogonalize
from train import TrainConfig


def test_a_fused_layer_is_updated_as_its_matrices_would_be_apart():
    torch.manual_seed(0)
    fused = torch.nn.Parameter(torch.randn(12, 8))
    fused.grad = torch.randn(12, 8)
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


@pytest.mark.parametrize("dtype, error", [(torch.float32, 1e-3), (torch.bfloat16, 0.05)])
@pytest.mark.parametrize("shape", [(24, 24), (40, 16), (16, 40)])
def test_orthogonalize_keeps_singular_vectors_and_makes_singular_values_about_1(shape, dtype, error):
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


def test_the_rates_rise_for_warmup_updates_and_then_fall_to_zero():
    model = small_model(20, n_layer=1)
    model.embedding.weight.sum().backward()
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer = Optimizer(model, TrainConfig(lr=0.5, adam_lr=0.1, steps=10, warmup=4))
    rates = []
    for step in range(10):
        optimizer.step(step)
        rates.append([part.param_groups[0]["lr"] for part in optimizer.parts])
    share = np.array([0.25, 0.5, 0.75, 1, 6 / 6, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6])
    np.testing.assert_allclose(rates, np.outer(share, [0.5, 0.1]))


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
        assert torch.equal(a, b)
