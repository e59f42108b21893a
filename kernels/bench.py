"""Time the kernel beside what PyTorch offers for the same mask; needs a GPU.

    python kernels/bench.py              # about ten minutes; --help shows what can be changed

Every line of a table is measured in turns: each repetition runs every method once. Times are medians of CUDA events
after warming up, with the quartiles; ratios are to this kernel, so above 1 means that the kernel is faster. They are
times of the GPU: what Python takes to start a call is hidden. Before it is timed, each method is compared with this
kernel.
"""

import argparse
import statistics
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from torch.nn.functional import scaled_dot_product_attention as sdpa

import kernels
from kernels.graphs import record
from masks import ATTENTION, PLAN, PROMPT, Layout, sees, visible
from plumbing.settings import command

LENGTHS = (512, 1024, 2048, 4096, 8192, 16384)
SAMPLING = [(64, 512), (128, 512), (64, 2048), (256, 2048), (64, 8192), (128, 8192), (512, 8192)]
FREE = SimpleNamespace(async_=0, async_end=0, colon=0)  # a layout does not look at its tokens


# ---------------------------------------------------------------- masks


def training_bounds(T, seed, attention):
    """Bounds (T, 3) of a prompt, a plan, three to eight spans of unequal lengths, and another such round."""
    g = torch.Generator().manual_seed(seed)
    layout = Layout(attention)
    layout.write([0] * (T // 16 + int(torch.randint(T // 8, (), generator=g))), PROMPT, 0)
    for number, stop in enumerate((T * 5 // 8, T - T // 16)):
        n = int(torch.randint(3, 9, (), generator=g))
        layout.write([0] * (6 * n), PLAN, number)
        share = torch.rand(n, generator=g) + 0.3
        slots = (share / share.sum() * (stop - len(layout))).int() - 3  # its tags and topic are 4 tokens
        layout.scaffold([([0], [0] * max(1, int(length))) for length in slots], FREE, number)
    layout.write([0] * (T - len(layout)), PLAN, 1)
    return torch.tensor([*zip(layout.prefix, layout.begin, layout.end)])[:T]


def sampling_bounds(n_queries, n_keys, n_spans=4):
    """Bounds (n_queries, 3) of a denoising pass: all tokens of a round's spans, after a cached prompt and plan."""
    layout = Layout()
    layout.write([0] * (n_keys - n_queries), PROMPT, 0)
    layout.scaffold([([0], [0] * (n_queries // n_spans - 4))] * n_spans, FREE, 0)
    return torch.tensor([*zip(layout.prefix, layout.begin, layout.end)])[-n_queries:]


# ---------------------------------------------------------------- methods


def inputs(B, T, S, args):
    g = torch.Generator("cuda").manual_seed(0)
    dtype = getattr(torch, args.dtype)

    def heads(n, length):
        return torch.randn(B, n, length, args.head_size, generator=g, device="cuda").to(dtype)

    return heads(args.heads, T), heads(args.kv_heads, S), heads(args.kv_heads, S)


def forced(backend, call):
    with sdpa_kernel(backend):
        return call()


def methods(q, k, v, bounds):
    """name -> a function without arguments that computes attention. The masks themselves are made beforehand."""
    (B, H, T, _), S = q.shape, k.shape[2]
    bounds, gqa = bounds.int(), H != k.shape[1]
    mask = visible(bounds, S)[:, None]
    prefix, begin, end = bounds.unbind(-1)

    def rule(b, h, i, j):
        return sees(j, prefix[b, i], begin[b, i], end[b, i])

    block_mask = create_block_mask(rule, B, None, T, S, device="cuda", _compile=True)
    flex = torch.compile(flex_attention, dynamic=False)
    dense = partial(sdpa, q, k, v, attn_mask=mask, enable_gqa=gqa)
    return {
        "kernel": partial(kernels.attention, q, k, v, bounds),
        "SDPA": dense,
        "cuDNN": partial(forced, SDPBackend.CUDNN_ATTENTION, dense),
        "Flex": partial(flex, q, k, v, block_mask=block_mask, enable_gqa=gqa),
    }


def causal(B, pairs, args):
    """Causal flash attention of the same number of visible pairs: what the mask would cost if it were a triangle."""
    T = max(64, round((2 * pairs / B) ** 0.5 / 64) * 64)
    q, k, v = inputs(B, T, T, args)
    call = partial(sdpa, q, k, v, is_causal=True, enable_gqa=args.heads != args.kv_heads)
    return partial(forced, SDPBackend.FLASH_ATTENTION, call), (q, k, v)


def with_backward(call, leaves):
    """The call and its gradients; run once, to see that it can."""
    grad = torch.ones_like(call())

    def both():
        return torch.autograd.grad(call(), leaves, grad)

    both()
    return both


# ---------------------------------------------------------------- timing


def prepare(calls, change):
    """name -> change(name, call), of those that run; says why the others do not."""
    kept = {}
    for name, call in calls.items():
        try:
            kept[name] = change(name, call)
        except (RuntimeError, ValueError, NotImplementedError) as error:
            print(f"    {name} does not run: {str(error).strip().splitlines()[0]}"[:80])
    return kept


def compared(calls):
    """The calls that run; says which of them do not compute what the first does."""
    want = calls["kernel"]().float()

    def compare(name, call):
        got = call().float()
        if name != "causal" and (got - want).norm() > 2e-2 * want.norm():
            print(f"    {name} differs by {float((got - want).norm() / want.norm()):.1e}")
        return call

    return prepare(calls, compare)


def measure(calls, repeats, divide=1):
    """name -> (quartile, median, quartile) in microseconds of each call, all taken in turns."""
    times = {name: [] for name in calls}
    for repeat in range(repeats + 5):
        for name, call in calls.items():
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda._sleep(5_000_000)  # some milliseconds, in which everything below is queued
            start.record()
            call()
            stop.record()
            stop.synchronize()
            if repeat >= 5:  # the first ones warm up
                times[name].append(start.elapsed_time(stop) * 1000 / divide)
    return {name: statistics.quantiles(values, n=4) for name, values in times.items()}


def report(label, results, flops):
    """A line that says what was timed, and one per method."""
    ours = results["kernel"][1]
    print(label)
    for name, (low, median, high) in results.items():
        print(f"{name:>10} {median:10.1f} us {f'({low:.1f} to {high:.1f})':<22}{flops / median / 1e6:8.1f} TFLOP/s"
              f" {median / ours:7.2f}", flush=True)  # fmt: skip


def bench_training(args):
    print(f"\nTraining, {args.attention}: time (quartiles), TFLOP/s of visible pairs, time / kernel's time")
    for T in args.lengths:
        B = max(1, args.tokens // T)
        bounds = torch.stack([training_bounds(T, seed, args.attention) for seed in range(B)]).cuda()
        pairs = sum(int(visible(row[None], T).sum()) for row in bounds)
        q, k, v = leaves = inputs(B, T, T, args)
        flops = 4 * pairs * args.heads * args.head_size
        calls = methods(q, k, v, bounds)
        calls["causal"], causal_leaves = causal(B, pairs, args)
        calls, seen = compared(calls), pairs / (B * T * T)
        report(f"{B} x {T}, {seen:.0%}, forward", measure(calls, args.repeats), flops)
        for x in (*leaves, *causal_leaves):
            x.requires_grad_()
        both = prepare(calls, lambda name, call: with_backward(call, causal_leaves if name == "causal" else leaves))
        report("and backward", measure(both, args.repeats), flops * 3.5)


def bench_sampling(args):
    print("\nSampling under CUDA graphs: queries on cached keys, microseconds of one call")
    for B in (1, 8):
        for T, S in SAMPLING:
            bounds = sampling_bounds(T, S)[None].repeat(B, 1, 1).cuda()
            q, k, v = inputs(B, T, S, args)
            ten_times = lambda name, call: record(lambda: [call() for _ in range(10)])[0]
            graphs = prepare(compared(methods(q, k, v, bounds)), ten_times)
            flops = 4 * int(visible(bounds, S).sum()) * args.heads * args.head_size
            report(f"{B} x {T} on {S}", measure(graphs, args.repeats, divide=10), flops)


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--heads", type=int, default=16, help="query heads (default: %(default)s)")
    parser.add_argument("--kv-heads", type=int, default=16, help="heads of keys and values (default: %(default)s)")
    parser.add_argument("--head-size", type=int, default=64, choices=kernels.HEAD_SIZES, help="(default: %(default)s)")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16"), help="(default: %(default)s)")
    parser.add_argument("--attention", default="sparse", choices=ATTENTION, help="the mask (default: %(default)s)")
    parser.add_argument(
        "--tokens", type=int, default=16384, help="per batch, as far as possible (default: %(default)s)"
    )
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS, help="of sequences (default: 512 to 16k)")
    parser.add_argument("--repeats", type=int, default=30, help="of each call (default: %(default)s)")
    args = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("kernels/bench.py needs a CUDA GPU: there is nothing to time here.")
        return
    if not kernels.available():  # says why
        return
    device = torch.cuda.get_device_properties(0)
    print(f"{device.name}, {device.multi_processor_count} multiprocessors, torch {torch.__version__}",
          f"{args.heads} heads ({args.kv_heads} of keys) of {args.head_size}, {args.dtype}", sep="\n")  # fmt: skip
    torch._dynamo.config.recompile_limit = 64  # one compiled FlexAttention per shape
    bench_training(args)
    bench_sampling(args)


if __name__ == "__main__":
    command(main)
