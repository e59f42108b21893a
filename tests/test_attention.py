"""The ways to compute attention agree: FlexAttention and the kernel (emulated) with the dense mask."""

import shutil

import numpy as np
import pytest
import torch
from conftest import each, random_example, small_model

from kernels import backends
from kernels.backends import BACKENDS, choose
from masks import ATTENTION, encode_example
from model import dense
from noise import Sequence, make_batch


@pytest.fixture
def uncompiled(monkeypatch):
    """FlexAttention without the compiler: slower, but quick to start."""
    from torch.nn.attention.flex_attention import flex_attention

    monkeypatch.setattr(backends, "compiled_flex", lambda: flex_attention)


def batch_of(tokenizer, spans):
    sequences = [Sequence(encode_example(random_example(seed, tokenizer), tokenizer, spans)) for seed in range(3)]
    return make_batch(sequences, [0] * 3, tokenizer, np.random.default_rng(0))


@pytest.mark.parametrize("spans", ATTENTION)
@pytest.mark.filterwarnings("ignore")
@torch.no_grad()
def test_flex_attention_gives_the_hidden_states_of_the_dense_mask(tokenizer, uncompiled, spans):
    model, batch = small_model(tokenizer.vocab_size), batch_of(tokenizer, spans)
    expected = model(batch.token, batch.position, batch.ranges)
    model.backend = BACKENDS["flex"]
    torch.testing.assert_close(model(batch.token, batch.position, batch.ranges), expected, rtol=1e-4, atol=1e-4)


class Elsewhere(torch.Tensor):
    """A tensor that says it is neither on a CPU nor on a CUDA GPU."""

    is_cpu = False


def test_on_a_macs_gpu_shared_heads_are_repeated(monkeypatch):
    """There, up to torch 2.7, attention with heads that are shared aborts."""
    q, k, v = (torch.randn(2, heads, 5, 8) for heads in (4, 2, 2))
    mask, attend, heads = torch.rand(2, 1, 5, 5) > 0.3, torch.nn.functional.scaled_dot_product_attention, []
    expected = dense(q, k, v, mask)
    note = lambda q, k, v, **options: heads.append((q.shape[1], k.shape[1], v.shape[1])) or attend(q, k, v, **options)
    monkeypatch.setattr("torch.nn.functional.scaled_dot_product_attention", note)
    torch.testing.assert_close(
        dense(*(x.as_subclass(Elsewhere) for x in (q, k, v)), mask), expected.as_subclass(Elsewhere)
    )
    dense(q, k, v, mask)
    assert heads == [(4, 4, 4), (4, 2, 2)]


@pytest.mark.skipif(not shutil.which("g++"), reason="the kernel's emulation needs g++")
@torch.no_grad()
def test_the_kernel_gives_what_the_dense_mask_gives(tokenizer):
    ranges, rng = batch_of(tokenizer, "sparse").ranges, torch.Generator().manual_seed(0)
    (B, T, _), S = ranges.shape, int(ranges.max())
    q, k, v = (torch.randn(B, heads, n, 32, generator=rng).bfloat16() for heads, n in ((4, T), (2, S), (2, S)))
    expected, given = (
        attend(q, k, v, prepare(ranges, S)).float() for prepare, attend in (BACKENDS["dense"], BACKENDS["kernel"])
    )
    assert (given - expected).norm() < 0.01 * expected.norm()


def test_auto_is_the_dense_mask_without_a_gpu_and_other_names_are_refused():
    assert choose("auto", "cpu", torch.float32, 32) == "dense"
    with pytest.raises(ValueError, match="--attention fast: expected one of auto, dense, spans, flex, kernel"):
        choose("fast", "cpu", torch.float32, 32)


def test_auto_on_a_gpu_is_the_kernel_or_else_flex_in_16_bits(monkeypatch):
    for made in (True, False):
        monkeypatch.setattr(backends.kernels, "available", lambda dtype, head_size: made)
        assert choose("auto", "cuda", torch.bfloat16, 64) == ("kernel" if made else "flex")
    assert choose("auto", "cuda", torch.float32, 64) == "dense"


def test_a_backend_that_does_not_work_there_is_refused():
    for name, device, dtype, head_size, said in each([
    ("flex", "cpu", torch.float32, 32, "--attention flex.*CUDA GPU.*not on cpu"),
    ("flex", "mps", torch.float32, 32, "--attention flex.*not on mps"),
    ("spans", "cuda", torch.float32, 32, "--attention spans.*CPU only, not on cuda"),
    ("spans", "mps", torch.float32, 32, "--attention spans.*CPU only, not on mps"),
    ("kernel", "cpu", torch.bfloat16, 32, "--attention kernel.*CUDA GPU, not on cpu"),
    ("kernel", "cuda", torch.float32, 32, "--attention kernel.*not in torch.float32"),
    ("kernel", "cuda", torch.bfloat16, 48, "--attention kernel.*heads of 48"),
]):  # fmt: skip
        with pytest.raises(ValueError, match=said):
            choose(name, device, dtype, head_size)


def test_what_is_named_and_works_is_taken():
    assert choose("dense", "cuda", torch.float32, 48) == "dense"
    assert choose("flex", "cuda", torch.float32, 48) == "flex"
    assert choose("kernel", "cuda", torch.bfloat16, 32) == "kernel"
