"""Assignment 6: the forward pass of the attention kernel in CUDA C++, under an emulator on the CPU."""

import re
from pathlib import Path

from checks import Wrong, check, draw_mask

TITLE = "Attention in CUDA C++, without a GPU"
HOURS = 14
TESTS_TAKE = 1.5
FUNCTIONS = {"kernels/tiles.h": ("tile_bounds", "Visits"), "kernels/attention.cu": ("forward", "combine")}
HANDOUT = """
You write the forward pass of a fused attention kernel: it never builds the T x T mask, skips the tiles of it that
nobody sees, and computes the softmax while scores arrive tile by tile. You need `g++`, but no GPU: the tests run the
kernel's source under `kernels/emulate.h`, which treats it as badly as CUDA's rules allow.

## Read first (two hours)

1. `dense` in model.py: what you compute, with the whole mask. Then kernels/README.md, down to "Online softmax", and
   "Splitting the keys".
2. [FlashAttention-2](https://arxiv.org/abs/2307.08691), sections 2.3 and 3.1.
3. `kernels/gpu.h`, the comment at the top: which lane holds which element of a matrix. (On the CPU, `emulate.h` has
   the same functions.)
4. `kernels/tiles.h`, all: it has the pieces that your kernel is made of. `copy_tile`, `Rows`, `dot`, `add_product`,
   `write_rows`, `row_sum` and `row_max` are there.
5. `backward_q` in `kernels/attention.cu`. It is there, and walks over tiles of keys as your `forward` has to, but
   with known maxima and sums.

Before you write code: a row's scores are 1, 2, then in the next tile 4. Compute its output and its sum by hand,
relative to the greatest score so far, tile by tile. Which two numbers must change when the 4 arrives, and by which
factor?

## Build, in this order

**Step 1: which tiles are visited** (`tiles.h`). `tile_bounds`: what the 64 queries of a tile see, taken together.
Each lane of a warp reads two of the 64; `__reduce_max_sync` and `__reduce_min_sync` join the lanes. `Visits` numbers
the tiles of keys: first those that some prefix reaches, then those of the spans which are not among them. No tile
twice.

**Step 2: one tile of keys** (`forward`). A block of 4 warps owns 64 queries of a head, each warp 16 rows. Shared
memory has the tile of q, then two stages with a tile of k and a tile of v each. `grid.x` counts tiles of queries
(take them in reverse: late queries see most), `grid.y` heads, `grid.z` is batch * splits + split. Query heads share
key heads. Copy, wait, meet at a barrier, then 16 keys at a time: scores by `dot`, and outputs by `add_product`. At
the end divide by the row's sum, and write lse, the logarithm of the sum of exp(score * scale).

**Step 3: many tiles.** Walk over the visits `visits.n * split / splits` to `visits.n * (split + 1) / splits`; keep
maximum and sum per row, and rescale. While one tile is computed the next one is copied to the other stage.

**Step 4: the mask and empty rows.** Compare keys with the three integers only where some row of the warp sees a part
of the tile. A row that sees nothing gets zeros and an lse of infinity; a part that sees nothing has an lse of minus
infinity.

**Step 5: join the parts** (`combine`). With SPLIT a block writes its output and lse as float32 to `part_o` (splits,
batch, heads, queries, D) and `part_lse`; a warp per row joins them, weighted.

## Hints

1. *Where is my element?* A lane's two rows are `group_row()` and `group_row() + 8`. Element i of `float c[2][4]`, as
   `c[i / 4][i % 4]`, is in row half `i % 4 / 2` and column `i / 4 * 8 + pair_column() + i % 2`.
2. *A row's maximum* is spread over 4 lanes: `row_max` after the lane's own. The sum can wait until the end.
3. *exp2.* exp(x) = exp2(x log2 e), and exp2 is one instruction: multiply the scale by `LOG2_E` once.
4. *inf - inf.* As long as a row has seen nothing its maximum is minus infinity. Subtract 0 then.
5. *A template is compiled where it is used:* errors name the line. `__builtin_trap()` in what is not written ends the
   process.
6. *`schedules` fails now and then, the others never.* Each wait and each barrier has a reason: copies are there after
   `copy_wait` in the thread that started them, and for the others after the next `__syncthreads`. Who may still read
   the stage into which you copy?
7. *NaN everywhere:* shared memory starts as NaN, and memory around the tensors is NaN. Which row past the end do you
   read?
8. `python -m pytest tests/test_kernels.py -k "masks or splits"` has more, some of which needs the backward pass: that
   works once `forward` does.

## On a GPU (optional, no points)

`python -m pytest tests/test_kernels.py` then compiles the kernel with nvcc and runs it; `python kernels/bench.py`
times it beside PyTorch's own. How far is it from the fastest, and where does the time go?
"""

BOUND = 1e-2  # of |error| / |reference| in bfloat16
VISITS = """
#include "tiles.h"

// Notes for each tile of queries how many tiles of keys it visits, and which.
__global__ void note(Call call) {
    const Visits visits(tile_bounds(call, 0, blockIdx.x * TILE));
    int *out = call.bounds + blockIdx.x * call.splits;
    if (threadIdx.x) return;
    out[0] = visits.n;
    for (int i = 0; i < visits.n && i + 1 < call.splits; i++) out[i + 1] = visits.key0(i);
}

extern "C" int attention_forward(const Call *call, void *stream) {
    return launch(note, dim3((call->queries + TILE - 1) / TILE), THREADS, 0, stream, *call);
}

extern "C" int attention_backward(const Call *, void *) { return 0; }
"""


def need(*functions):
    """Raise NotImplementedError for functions that are still as they were handed out."""
    for file, name in functions:
        if re.search(rf"\b{name}\([^;{{]*\)\s*\{{\s*__builtin_trap\(\)", Path("kernels", file).read_text()):
            raise NotImplementedError(f"kernels/{file}: {name} is not written yet")


def emulated(folder=None):
    """The kernel for bfloat16 and heads of 32, compiled for the CPU from a folder of sources (default: kernels/)."""
    import torch

    import kernels

    command = kernels.emulator_command(torch.bfloat16, 32)
    library = kernels.build(command, folder or kernels.SOURCES)
    library.emulate_seed(0)
    return library


def layout_ranges(rng, prompt, rounds):
    """Ranges (T, 3) of a prompt and rounds of plan and spans of random sizes, as in masks.py."""
    import torch

    rows = [(i + 1, 0, 0) for i in range(prompt)]
    for _ in range(rounds):
        rows += [(i + 1, 0, 0) for i in range(len(rows), len(rows) + int(rng.integers(5, 30)))]
        first = len(rows)
        for size in rng.integers(8, 70, int(rng.integers(2, 5))):
            rows += [(first, len(rows), len(rows) + int(size))] * int(size)
    return torch.tensor(rows)


def random_ranges(rng, queries, keys):
    """Any prefixes and intervals, empty and reversed ones too; some rows see nothing."""
    import torch

    ranges = torch.from_numpy(rng.integers(0, keys + 1, (queries, 3)))
    ranges[:, 0] //= torch.from_numpy(rng.integers(1, 9, queries))
    ranges[rng.random(queries) < 0.15] = 0
    return ranges


@check(
    points=15,
    idea="visited are the tiles of keys that some query of the tile sees, each once: prefixes, then spans",
    draw=draw_mask,
    seconds=60,
)
def visited_tiles(rng, size):
    import tempfile

    import torch

    import kernels

    need(("tiles.h", "tile_bounds"), ("tiles.h", "Visits"))
    with tempfile.TemporaryDirectory() as folder:
        for path in kernels.SOURCES.glob("*.h"):
            Path(folder, path.name).write_bytes(path.read_bytes())
        Path(folder, "attention.cu").write_text(VISITS)
        library = emulated(Path(folder))
    found = {"names": [], "mask": [], "visited": []}
    far = torch.zeros(70, 3, dtype=torch.long)
    far[:, 0] = int(rng.integers(1, 64))
    far[32:, 0] += 64  # half of the rows see a tile that the others do not
    far[35::7, 1], far[35::7, 2] = 200, int(rng.integers(260, 400))
    for name, ranges in (("layout", layout_ranges(rng, int(rng.integers(30, 90)), size)), ("far", far)):
        queries, keys = len(ranges), int(ranges.max())
        tiles, width = -(-queries // 64), -(-keys // 64)
        ranges, out = ranges.int().contiguous(), torch.zeros(tiles, width + 9, dtype=torch.int32)
        call = kernels._Call(batches=1, heads=1, kv_heads=1, queries=queries, keys=keys, splits=width + 9)
        call.ranges, call.bounds = ranges.data_ptr(), out.data_ptr()
        if error := library.attention_forward(call, None):
            raise RuntimeError(f"the emulator stopped with CUDA error {error}")
        for tile, (n, *first) in enumerate(out.tolist()):
            found["names"].append(f"{name} {tile * 64}")
            found["mask"].append([key0 in first[:n] for key0 in range(0, width * 64, 64)])
            found["visited"].append(first[:n] if n < width + 9 else f"{n} tiles, of {width}")
    return found


def inside_nan(x):
    """x (B, H, T, D) in memory as (B, T, H, D) with gaps, and NaN all around it."""
    import torch

    B, H, T, D = x.shape
    view = torch.full((B + 2, T + 64, H + 1, D), float("nan"), dtype=x.dtype)[1:-1, :T, :H].transpose(1, 2)
    view.copy_(x)
    return view


def compared(rng, ranges, keys, splits=1, heads=(2, 1), sharp=False, seeds=(0,)):
    """Whether the kernel's outputs and lse are those of dense attention in float64.

    `sharp`: scores grow along the keys, so that maxima change from tile to tile.
    """
    import torch

    import kernels
    from masks import visible

    need(("tiles.h", "tile_bounds"), ("tiles.h", "Visits"), ("attention.cu", "forward"))
    if splits > 1:
        need(("attention.cu", "combine"))
    library, (H, kv_heads) = emulated(), heads
    draw = lambda h, n: torch.from_numpy(rng.standard_normal((1, h, n, 32))).bfloat16()
    q, k, v = draw(H, len(ranges)), draw(kv_heads, keys), draw(kv_heads, keys)
    if sharp:
        q[..., 0], k[..., 0] = 6, torch.linspace(-6, 6, keys).bfloat16()
    q, k, v = map(inside_nan, (q, k, v))
    score = q.double() @ k.double().repeat_interleave(H // kv_heads, 1).mT * 32**-0.5
    seen = visible(ranges[None], keys)[:, None]
    score = score.masked_fill(~seen, -torch.inf)
    some = seen.any(-1)
    weight = torch.where(some[..., None], score, 0).softmax(-1) * some[..., None]
    want = weight @ v.double().repeat_interleave(H // kv_heads, 1)
    lse = torch.where(some, score.logsumexp(-1), torch.inf)
    found = {}
    for seed in seeds:
        library.emulate_seed(seed)
        o, got = kernels.forward(q, k, v, ranges[None], 32**-0.5, splits, library)
        size = want.norm(dim=-1) + 0.05
        good = (o.double() - want).norm(dim=-1) <= 3 * BOUND * size
        found[f"schedule {seed}, outputs"] = rows(good, o.isnan().any(-1))
        found[f"schedule {seed}, lse"] = rows((got == lse) | ((got - lse).abs() < 1e-3), got.isnan())
    return found


def rows(good, nan):
    """Whether all rows (1, H, T) are right, and a picture, a line per tile of queries, if they are not."""
    if good.all():
        return {"right": True, "picture": ""}
    lines = []
    for head, (right, none) in enumerate(zip(good[0].tolist(), nan[0].tolist())):
        for first in range(0, len(right), 64):
            ink = ["." if r else "N" if n else "X" for r, n in zip(right[first : first + 64], none[first : first + 64])]
            warps = " ".join("".join(ink[i : i + 16]) for i in range(0, len(ink), 16))
            lines.append(f"head {head} {first:4} {warps}")
    return {"right": False, "picture": "\n".join(lines)}


def draw_wrong(expected, came):
    """The first picture of wrong rows."""
    name = next(name for name in came if not came[name]["right"])
    said = "head, first query, queries (16 of a warp together): . right, X wrong, N NaN"
    return f"{name}\n{said}\n{came[name]['picture']}"


def all_seen(queries, keys):
    """Ranges of queries that all see all keys."""
    import torch

    return torch.tensor([[keys, 0, 0]] * queries)


@check(
    points=15,
    idea="one tile: softmax(scale * q k) v, and lse, the logarithm of its sum in units of exp",
    draw=draw_wrong,
    seconds=60,
)
def one_tile(rng, size):
    return compared(rng, all_seen(64, 64), 64, heads=(2 * size, size))


@check(
    points=20,
    idea="when a greater score arrives, sum and output so far shrink by exp(old maximum - new maximum)",
    draw=draw_wrong,
    seconds=60,
)
def many_tiles(rng, size):
    return compared(rng, all_seen(64 * size, 256), 256, sharp=True) | compared(
        rng, all_seen(64, 128 * size), 128 * size
    )


@check(
    points=15,
    idea="a query sees exactly the keys [0, prefix) and [begin, end), also inside a tile",
    draw=draw_wrong,
    seconds=60,
)
def masks_within_tiles(rng, size):
    ranges = layout_ranges(rng, int(rng.integers(30, 90)), size)
    return compared(rng, ranges, len(ranges), heads=(2, 2))


@check(
    points=10,
    idea="a row that sees nothing gives 0 and an lse of infinity; rows past the end are neither read nor written",
    draw=draw_wrong,
    seconds=60,
)
def empty_rows(rng, size):
    keys = int(rng.integers(70, 90 + 40 * size))
    ranges = random_ranges(rng, 40 + 40 * size, keys)
    ranges[:5], ranges[16:32] = 0, 0
    return compared(rng, ranges, keys)


@check(
    points=10,
    idea="parts of the keys are joined by their shares of the row's sum: exp(lse of the part - lse of all)",
    draw=draw_wrong,
    seconds=60,
)
def split_keys(rng, size):
    keys = 330 + 64 * size
    ranges = random_ranges(rng, 20 + 30 * size, keys)
    found = {}
    for splits in (2, 3, 7):
        part = compared(rng, ranges, keys, splits, sharp=splits == 3)
        found |= {f"{splits} parts, {name}": text for name, text in part.items()}
    return found


@check(
    points=10,
    idea="a tile is read after its copy has arrived for all warps, and overwritten after all warps have read it",
    draw=draw_wrong,
    seconds=60,
)
def schedules(rng, size):
    return compared(rng, all_seen(64, 320), 320, heads=(1, 1), seeds=range(1, 6 + 4 * size))


WRONG = (
    Wrong("softmax not rescaled between tiles", "kernels/attention.cu",
          "const float shrink = exp2_fast(most[half] * scale - base[half]);", "const float shrink = 1;", "many_tiles"),
    Wrong("sum rescaled but not the output", "kernels/attention.cu",
          "out[n][2 * half] *= shrink, out[n][2 * half + 1] *= shrink;", "out[n][2 * half] *= 1;", "many_tiles"),
    Wrong("last keys of a tile not masked", "kernels/attention.cu", "if (masked && !ranges[half](key)) s = -INFINITY;",
          "if (masked && !ranges[half](key & ~7)) s = -INFINITY;", "masks_within_tiles"),
    Wrong("no mask within tiles", "kernels/attention.cu", "if (masked && !ranges[half](key)) s = -INFINITY;", ";",
          "masks_within_tiles"),
    Wrong("infinity less infinity", "kernels/attention.cu", "best[half] == -INFINITY ? 0 : best[half] * scale",
          "best[half] * scale", "empty_rows"),
    Wrong("division by an empty sum", "kernels/attention.cu", "sum > 0 ? 1 / sum : 0", "1 / sum", "empty_rows"),
    Wrong("lse without the scale", "kernels/attention.cu", "most[half] * call.scale + logf(sum)",
          "most[half] + logf(sum)", ("one_tile", "many_tiles")),
    Wrong("maximum over a quarter of the row", "kernels/attention.cu", "best[half] = row_max(best[half]);", ";",
          ("one_tile", "many_tiles")),
    Wrong("no barrier before the next tile", "kernels/attention.cu",
          "__syncthreads();  // the next tile is here, and no warp reads this one any more", ";", "schedules"),
    Wrong("no wait for the first copy", "kernels/attention.cu",
          "if (first < last) copy_visit(first);\n    copy_wait();", "if (first < last) copy_visit(first);",
          "schedules"),
    Wrong("a tile visited twice", "kernels/tiles.h", "max(in_prefix, bounds.min_begin / TILE)",
          "bounds.min_begin / TILE", "visited_tiles"),
    Wrong("last tile of the prefix left out", "kernels/tiles.h", "(bounds.max_prefix + TILE - 1) / TILE",
          "bounds.max_prefix / TILE", "visited_tiles"),
    Wrong("bounds of half of the rows", "kernels/tiles.h", "max(a.prefix, b.prefix)", "a.prefix", "visited_tiles"),
    Wrong("parts weighted equally", "kernels/attention.cu",
          "const float weight = exp2_fast((call.part_lse[split * rows + row] - most) * LOG2_E);",
          "const float weight = 1;", "split_keys"),
    Wrong("the rest of a division left out", "kernels/attention.cu", "last = visits.n * (split + 1) / call.splits",
          "last = first + visits.n / call.splits", "split_keys"),
)  # fmt: skip
