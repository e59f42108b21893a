"""Time the kernel beside what PyTorch offers for the same mask; needs a GPU.

    python kernels/bench.py                                                  # about ten minutes
    python kernels/bench.py --part training --lengths 1024 8192 --repeats 10 --json

Every line of a table is measured in turns: each repetition runs every method once. Times are medians of CUDA events
after warming up, with the quartiles; ratios are to this kernel, so above 1 means that the kernel is faster. They are
times of the GPU: what Python takes to start a call is hidden. Before it is timed, each method is compared with this
kernel.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention as sdpa

import kernels
from kernels import graphs
from masks import ATTENTION, PLAN, PROMPT, Layout, sees, visible
from plumbing.device import name_of, synchronize
from plumbing.settings import command

LENGTHS = (512, 1024, 2048, 4096, 8192, 16384)
SAMPLING = ("64:512", "128:512", "64:2048", "256:2048", "64:8192", "128:8192", "512:8192")  # queries:cached keys
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


# ---------------------------------------------------------------- timing in turns


def on_the_host(call: Callable, device: torch.device) -> float:
    """Seconds of a call, with all that it has the device do."""
    synchronize(device)
    start = time.perf_counter()
    call()
    synchronize(device)
    return time.perf_counter() - start


def on_the_gpu(call: Callable) -> float:
    """Seconds that the GPU takes for a call: what Python takes to start it is hidden."""
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(5_000_000)  # some milliseconds, in which everything below is queued
    start.record()
    call()
    stop.record()
    stop.synchronize()
    return start.elapsed_time(stop) / 1e3


def in_turns(calls: dict[str, Callable], repeats: int, timed: Callable, warm_up: int = 1) -> dict[str, list[float]]:
    """Seconds, as `timed` measures them, of each of `repeats` rounds of calls, after rounds that only warm up."""
    seconds = {name: [] for name in calls}
    for repeat in range(repeats + warm_up):
        for name, call in calls.items():
            took = timed(call)
            seconds[name] += [took] if repeat >= warm_up else []
    return seconds


def quartiles(values: list[float]) -> list[float]:
    """Lower quartile, median, upper quartile."""
    return statistics.quantiles(values, n=4, method="inclusive")


# ---------------------------------------------------------------- methods


def inputs(B, T, S, args):
    g = torch.Generator(args.device).manual_seed(0)
    dtype = getattr(torch, args.dtype)

    def heads(n, length):
        return torch.randn(B, n, length, args.head_size, generator=g, device=args.device).to(dtype)

    return heads(args.heads, T), heads(args.kv_heads, S), heads(args.kv_heads, S)


def forced(backend, call):
    with sdpa_kernel(backend):
        return call()


def flex(q, k, v, bounds, gqa):
    """FlexAttention with its mask, as a function without arguments; on a CPU it is not compiled."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    prefix, begin, end = bounds.unbind(-1)

    def rule(b, h, i, j):
        return sees(j, prefix[b, i], begin[b, i], end[b, i])

    T, S = q.shape[2], k.shape[2]
    block_mask = create_block_mask(rule, len(q), None, T, S, device=q.device, _compile=q.is_cuda)
    attend = torch.compile(flex_attention, dynamic=False) if q.is_cuda else flex_attention
    return partial(attend, q, k, v, block_mask=block_mask, enable_gqa=gqa)


def methods(q, k, v, bounds):
    """name -> a function without arguments that computes attention. Masks are made at the first call at the latest."""
    bounds, gqa = bounds.int(), q.shape[1] != k.shape[1]
    mask = visible(bounds, k.shape[2])[:, None]
    dense = partial(sdpa, q, k, v, attn_mask=mask, enable_gqa=gqa)
    made = cache(lambda: flex(q, k, v, bounds, gqa))
    return {
        "kernel": partial(kernels.attention, q, k, v, bounds),
        "SDPA": dense,
        "cuDNN": partial(forced, SDPBackend.CUDNN_ATTENTION, dense),
        "Flex": lambda: made()(),
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


# ---------------------------------------------------------------- what is timed


class Line(NamedTuple):
    """What was timed: quartiles in microseconds by method, what is to be said of these, and the work of a call."""

    label: str
    times: dict[str, list[float]]
    notes: list[str]
    flops: float


def prepare(calls, change, notes):
    """name -> change(name, call), of those that run; notes why the others do not."""
    kept = {}
    for name, call in calls.items():
        try:
            kept[name] = change(name, call)
        except Exception as error:  # whatever compilers raise
            notes.append(f"{name} does not run: {(str(error).strip() or repr(error)).splitlines()[0]}"[:76])
    return kept


def compared(calls, notes):
    """The calls that run; notes which of them do not compute what the first does."""
    want = calls["kernel"]().float()

    def compare(name, call):
        got = call().float()
        if name != "causal" and not (got - want).norm() <= 2e-2 * want.norm():
            notes.append(f"{name} differs by {float((got - want).norm() / want.norm()):.1e}")
        return call

    return prepare(calls, compare, notes)


def measure(calls, args, divide=1):
    """name -> quartiles in microseconds of each call, all taken in turns."""
    on_gpu = args.device == "cuda"
    timed = on_the_gpu if on_gpu else partial(on_the_host, device=torch.device(args.device))
    seconds = in_turns(calls, args.repeats, timed, warm_up=5 if on_gpu else 0)
    return {name: [1e6 * s / divide for s in quartiles(values)] for name, values in seconds.items()}


def training(args: argparse.Namespace) -> Iterator[Line]:
    """Lines of forward passes and of forward and backward passes, for each length of sequences."""
    for T in args.lengths:
        B, notes = max(1, args.tokens // T), []
        bounds = torch.stack([training_bounds(T, seed, args.attention) for seed in range(B)]).to(args.device)
        pairs = sum(int(visible(row[None], T).sum()) for row in bounds)
        q, k, v = leaves = inputs(B, T, T, args)
        flops = 4 * pairs * args.heads * args.head_size
        calls = methods(q, k, v, bounds)
        calls["causal"], causal_leaves = causal(B, pairs, args)
        calls = compared(calls, notes)
        yield Line(f"{B} x {T}, {pairs / (B * T * T):.0%}, forward", measure(calls, args), notes, flops)
        for x in (*leaves, *causal_leaves):
            x.requires_grad_()
        notes = []
        both = prepare(
            calls, lambda name, call: with_backward(call, causal_leaves if name == "causal" else leaves), notes
        )
        yield Line(f"{B} x {T} and backward", measure(both, args), notes, flops * 3.5)


def sampling(args: argparse.Namespace) -> Iterator[Line]:
    """Lines of calls of a denoising pass, replayed as a graph."""
    for B in (1, 8):
        for T, S in (map(int, shape.split(":")) for shape in args.sampling):
            bounds, notes = sampling_bounds(T, S)[None].repeat(B, 1, 1).to(args.device), []
            ten_times = lambda name, call: graphs.record(lambda: [call() for _ in range(10)][-1])[0]
            replays = prepare(compared(methods(*inputs(B, T, S, args), bounds), notes), ten_times, notes)
            flops = 4 * int(visible(bounds, S).sum()) * args.heads * args.head_size
            yield Line(f"{B} x {T} on {S}", measure(replays, args, divide=10), notes, flops)


# ---------------------------------------------------------------- reports


def report(label, results, flops):
    """A line that says what was timed, and one per method."""
    ours = results["kernel"][1]
    print(label)
    for name, (low, median, high) in results.items():
        print(f"{name:>10} {median:10.1f} us {f'({low:.1f} to {high:.1f})':<22}{flops / median / 1e6:8.1f} TFLOP/s"
              f" {median / ours:7.2f}", flush=True)  # fmt: skip


def as_json(line: Line) -> str:
    """Medians in microseconds, and what is to be said of them."""
    medians = {name: round(median, 1) for name, (_, median, _) in line.times.items()}
    notes = {"notes": "; ".join(line.notes)} if line.notes else {}
    return json.dumps({"what": f"{line.label}, microseconds", **medians, **notes})


PARTS = {
    "training": (training, "Training, {}: time (quartiles), TFLOP/s of visible pairs, time / kernel's time"),
    "sampling": (sampling, "Sampling under CUDA graphs: queries on cached keys, microseconds of one call"),
}


def options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--part", choices=PARTS, nargs="+", default=[*PARTS], help="(default: both)")
    parser.add_argument("--heads", type=int, default=16, help="query heads (default: %(default)s)")
    parser.add_argument("--kv-heads", type=int, default=16, help="heads of keys and values (default: %(default)s)")
    parser.add_argument("--head-size", type=int, default=64, choices=kernels.HEAD_SIZES, help="(default: %(default)s)")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16"), help="(default: %(default)s)")
    parser.add_argument("--attention", default="sparse", choices=ATTENTION, help="the mask (default: %(default)s)")
    parser.add_argument("--tokens", type=int, default=16384, help="per batch, about (default: %(default)s)")
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS, help="of sequences (default: 512 to 16k)")
    parser.add_argument(
        "--sampling", nargs="+", default=SAMPLING, help="queries:cached keys (default: 64:512 and more)"
    )
    parser.add_argument("--repeats", type=int, default=30, help="of each call (default: %(default)s)")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"), help="cpu: a rehearsal under the emulator")
    parser.add_argument("--json", action="store_true", help="print medians as JSON objects")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    args = options(arguments)
    if args.device == "cuda":
        if not torch.cuda.is_available():
            print("kernels/bench.py needs a CUDA GPU: there is nothing to time here.")
            return
        if not kernels.available():  # says why
            raise ValueError("the kernel cannot be built here")
    print(f"{name_of(torch.device(args.device))}, torch {torch.__version__}",
          f"{args.heads} heads ({args.kv_heads} of keys) of {args.head_size}, {args.dtype}", sep="\n")  # fmt: skip
    torch._dynamo.config.recompile_limit = 64  # one compiled FlexAttention per shape
    for part in args.part:
        lines, heading = PARTS[part]
        print(f"\n{heading.format(args.attention)}")
        for line in lines(args):
            if args.json:
                print(as_json(line), flush=True)
                continue
            for note in line.notes:
                print(f"    {note}")
            report(line.label, line.times, line.flops)


if __name__ == "__main__":
    command(main)
