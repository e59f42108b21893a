"""The CUDA kernel, without a GPU: emulate.h runs its source as unkindly as CUDA may; dense attention is the judge.

More head sizes, seeded faults, and what needs nvcc or a GPU: more/test_kernels_faults.py.
"""

import shutil
import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import each

import kernels
from kernels import bench
from masks import PLAN, PROMPT, Layout, visible

BOUND = {torch.bfloat16: 1e-2, torch.float16: 2e-3}  # of |error| / |reference|
pytestmark = pytest.mark.skipif(not shutil.which("g++"), reason="emulating the kernel needs g++, and so does nvcc")
FREE = SimpleNamespace(async_=0, async_end=0, colon=0)  # a layout does not look at its tokens


# ---------------------------------------------------------------- problems


def layout_ranges(attention, prompt=37, plan=21, spans=(30, 9, 44), text=9, rounds=2):
    """ranges (1, T, 3) of a sequence of several rounds."""
    layout = Layout(attention)
    layout.write([0] * prompt, PROMPT, 0)
    for number in range(rounds):
        layout.write([0] * plan, PLAN, number)
        layout.scaffold([([0], [0] * n) for n in spans], FREE, number)
    layout.write([0] * text, PLAN, rounds - 1)
    return torch.tensor([*zip(layout.prefix, layout.begin, layout.end)])[None]


def random_ranges(seed, B, T, S):
    """Any prefixes and intervals, empty and reversed ones too; some rows see nothing."""
    g = torch.Generator().manual_seed(seed)
    ranges = torch.randint(0, S + 1, (B, T, 3), generator=g)
    ranges[:, :, 0] //= torch.randint(1, 9, (B, T), generator=g)
    ranges[torch.rand(B, T, generator=g) < 0.1] = 0
    return ranges


def hard_ranges():
    """Queries with a gap between prefix and span, among others with an empty span; nobody sees keys 192 to 255."""
    ranges = torch.zeros(1, 130, 3, dtype=torch.int64)
    i = torch.arange(130)
    ranges[0, :64, 0] = i[:64] % 5 * 24  # the first of five sees no prefix
    ranges[0, :40:2, 1], ranges[0, :40:2, 2] = 260 + i[:40:2], 333  # the keys go on past the last tile's end
    ranges[0, 64:120, 0] = 10 + i[:56]  # up to 65: only the last row reaches the second tile of keys
    ranges[0, 100:110, 1], ranges[0, 100:110, 2] = 130, 180
    return ranges  # and the last ten see nothing


def inside_nan(x):
    """x (B, H, T, D) in memory as (B, T, H, D) with gaps, and NaN all around it."""
    B, H, T, D = x.shape
    buffer = torch.full((B + 2, T + 64, H + 1, D), float("nan"), dtype=x.dtype, device=x.device)
    view = buffer[1:-1, :T, :H].transpose(1, 2)
    view.copy_(x)
    return view, buffer


def problem(ranges, n_keys, dtype, head_size, heads=(2, 1), seed=0):
    """Random inputs of attention with a mask."""
    g = torch.Generator().manual_seed(seed)
    (B, T, _), (H, kv_heads) = ranges.shape, heads
    shapes = ((H, T), (kv_heads, n_keys), (kv_heads, n_keys), (H, T))
    q, k, v, grad = (inside_nan(torch.randn(B, h, n, head_size, generator=g).to(dtype))[0] for h, n in shapes)
    return SimpleNamespace(q=q, k=k, v=v, ranges=ranges, grad=grad, scale=head_size**-0.5)


def dense(p):
    """Outputs, lse and the gradients of q, k, v in float64."""
    q, k, v = (x.detach().double().requires_grad_() for x in (p.q, p.k, p.v))
    share, seen = q.shape[1] // k.shape[1], visible(p.ranges, k.shape[2])[:, None]
    score = (q @ k.repeat_interleave(share, 1).mT * p.scale).masked_fill(~seen, -torch.inf)
    some = seen.any(-1, keepdim=True)
    weight = torch.where(some, score, 0).softmax(-1) * some
    o = weight @ v.repeat_interleave(share, 1)
    lse = torch.where(some[..., 0], score.logsumexp(-1), torch.inf)
    return [o.detach(), lse.detach(), *torch.autograd.grad(o, (q, k, v), p.grad.double())]


def run(p, splits=1, compiled=None):
    """The kernel's outputs, lse and gradients; everything it writes is allocated amid NaN that must stay."""
    margins = []

    def like(x):
        view, buffer = inside_nan(torch.full_like(x, float("nan")))
        margins.append((view, buffer))
        return view

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "_like", like)
        o, lse = kernels.forward(p.q, p.k, p.v, p.ranges, p.scale, splits, compiled)
        grads = kernels.backward(p.grad, p.q, p.k, p.v, p.ranges, o, lse, p.scale, compiled)
    got = [x.clone() for x in (o, lse, *grads)]
    for view, buffer in margins:
        view.fill_(float("nan"))
        assert buffer.isnan().all(), "written outside of its rows"
    return got


def check(got, want, bound):
    for name, x, y in zip(("o", "lse", "grad_q", "grad_k", "grad_v"), got, want):
        some = y.isfinite()
        assert torch.equal(x.isfinite(), some) and torch.equal(x[~some].double(), y[~some]), f"{name} is not finite"
        error, size = (x[some].double() - y[some]).norm(), y[some].norm()
        assert error <= bound * size + 1e-5, f"{name} of norm {size:.1e} is off by {error:.1e}"


# ---------------------------------------------------------------- under emulation

RANGES = {name: layout_ranges(name) for name in ("sparse", "dense", "causal")}
RANGES["two rounds, ragged"] = torch.cat([layout_ranges("sparse")[:, :149], layout_ranges("dense", prompt=80)[:, :149]])
RANGES["random"] = random_ranges(1, 2, 70, 100)


def test_masks():
    for name in each(RANGES):
        ranges = RANGES[name]
        p = problem(ranges, max(int(ranges.max()), 100), torch.bfloat16, 32)
        check(run(p), dense(p), BOUND[p.q.dtype])


def test_odd_sizes_and_grouped_queries():
    for T, S, heads in each([
    (1, 1, (1, 1)), (1, 257, (2, 2)), (64, 64, (2, 1)), (63, 65, (6, 2)), (65, 63, (3, 1)), (128, 200, (2, 2)),
    (150, 40, (4, 1)),
]):  # fmt: skip
        p = problem(random_ranges(S, 1, T, S), S, torch.float16, 32, heads)
        check(run(p), dense(p), BOUND[p.q.dtype])


def hard_problem():
    """`hard_ranges`, and NaN in the keys and values of the tile that nobody sees: it may not even be read."""
    p = problem(hard_ranges(), 335, torch.bfloat16, 32)
    want = dense(p)
    p.k[:, :, 192:256] = p.v[:, :, 192:256] = float("nan")
    return p, want


def test_tiles_that_nobody_sees_are_skipped():
    p, want = hard_problem()
    for splits in (1, 3):
        check(run(p, splits), want, BOUND[p.q.dtype])


def test_unseen_keys_may_be_nan_in_visited_tiles():
    p = problem(random_ranges(6, 1, 70, 100), 120, torch.bfloat16, 32)
    want = dense(p)[:2]
    p.k[:, :, 100:] = float("nan")  # values may not: 0 * nan is nan
    check(kernels.forward(p.q, p.k, p.v, p.ranges, p.scale, 1), want, BOUND[p.q.dtype])


def test_splitting_the_keys_changes_nothing():
    for splits in each([2, 3, 7]):
        p = problem(random_ranges(3, 2, 20, 300), 300, torch.float16, 32)
        want, got = run(p), run(p, splits)
        check(got, [x.double() for x in want], 1e-3)
        check(got, dense(p), BOUND[p.q.dtype])


def test_splits_fill_the_processors():
    assert kernels.best_splits(8, 16, 4096, 4096, 132) == 1
    assert kernels.best_splits(1, 16, 64, 8192, 132) == 16
    assert kernels.best_splits(1, 16, 64, 512, 132) == 2  # parts of 4 tiles, not less
    assert kernels.best_splits(1, 1, 1, 100, 132) == 1


def test_any_strides():
    p = problem(random_ranges(4, 2, 70, 70), 70, torch.bfloat16, 32)
    want = dense(p)
    packed = torch.cat([p.q, p.k, p.v], dim=1).transpose(1, 2).contiguous().transpose(1, 2)
    p.q, p.k, p.v = packed.split([2, 1, 1], dim=1)
    check(run(p), want, BOUND[p.q.dtype])
    p.q, p.k = p.q.mT.contiguous().mT, p.k.expand(2, 1, 70, 32)  # last stride not 1
    shifted = torch.empty(p.v.numel() + 1, dtype=p.v.dtype)[1:].view(p.v.shape)  # not aligned to 16 bytes
    p.v = shifted.copy_(p.v)
    p.grad = torch.ones(2, 2, 1, 1, dtype=p.q.dtype).expand(2, 2, 70, 32)  # all strides 0, as of sum()
    check(run(p), dense(p), BOUND[p.q.dtype])


def test_every_schedule_gives_the_same_bits():
    p, library, first = hard_problem()[0], kernels.library(torch.device("cpu"), torch.bfloat16, 32), {}
    for seed in range(4):
        library.emulate_seed(seed)
        for splits in (1, 3):
            got = run(p, splits)
            assert all(map(torch.equal, got, first.setdefault(splits, got)))


def test_misaligned_pointers_are_an_error(monkeypatch):
    monkeypatch.setattr(kernels, "_aligned", lambda x: x)
    p = problem(random_ranges(4, 1, 8, 8), 8, torch.bfloat16, 32)
    p.k = torch.zeros(1 + p.k.numel(), dtype=p.k.dtype)[1:].view(p.k.shape)
    with pytest.raises(RuntimeError, match="CUDA error 716"):
        run(p)


# ---------------------------------------------------------------- as an operator


def test_operator():
    p = problem(random_ranges(2, 1, 9, 12), 12, torch.bfloat16, 32)
    inputs, want = [x.clone().requires_grad_() for x in (p.q, p.k, p.v)], dense(p)
    o = kernels.attention(*inputs, p.ranges)
    assert o.transpose(1, 2).is_contiguous()  # the output layer reads it without a copy
    check([o.detach(), want[1], *torch.autograd.grad(o, inputs, p.grad)], want, BOUND[p.q.dtype])
    torch.library.opcheck(kernels._attention, (*inputs, p.ranges, p.scale))


def test_compiled_without_graph_breaks():
    p = problem(random_ranges(2, 1, 9, 12), 12, torch.bfloat16, 32)
    q = p.q.clone().requires_grad_()

    def loss(q):
        return kernels.attention(q + 1, p.k, p.v, p.ranges).sum()

    (compiled,) = torch.autograd.grad(torch.compile(loss, backend="aot_eager", fullgraph=True)(q), q)
    assert torch.equal(compiled, *torch.autograd.grad(loss(q), q))


def test_what_does_not_fit_is_refused():
    for change in each([
    {"q": torch.zeros(1, 2, 4, 32)}, {"k": torch.zeros(1, 1, 4, 32)}, {"v": torch.zeros(1, 1, 5, 32).half()},
    {"ranges": torch.zeros(1, 3, 3)}, {"q": torch.zeros(1, 2, 4, 48).half()}, {"scale": 0.0},
    {"q": torch.zeros(1, 0, 4, 32).half()},
]):  # fmt: skip
        kv = torch.zeros(1, 1, 4, 32).half()
        call = {"q": torch.zeros(1, 2, 4, 32).half(), "k": kv, "v": kv, "ranges": torch.zeros(1, 4, 3), "scale": 1.0}
        with pytest.raises(ValueError):
            kernels.attention(**(call | change))


def test_available_says_why_not(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    kernels.available.cache_clear()
    assert not kernels.available() and not kernels.available()
    assert capsys.readouterr().err == "kernels: not used, there is no CUDA GPU\n"
    kernels.available.cache_clear()


def test_a_failed_build_says_what_the_compiler_said(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(kernels.BuildError, match="no such flag"):
        kernels.build([sys.executable, "-c", "print('no such flag'); raise SystemExit(1)"])


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_lines_of_the_bench_fit_a_terminal(capsys):
    bench.report("512 x 16384, 100%, forward", {"kernel": (123456.7,) * 3, "causal": (234567.8,) * 3}, 10**16)
    assert max(map(len, capsys.readouterr().out.splitlines())) <= 80


def test_bench_says_so_without_a_gpu(capsys):
    bench.main([])
    said = capsys.readouterr().out
    assert said.count("\n") == 1 and "GPU" in said
