"""The CUDA kernel: every head size, faults put into its source, and what needs nvcc or a GPU."""

import os
import re
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from test_kernels import BOUND, check, dense, hard_problem, layout_ranges, problem, random_ranges, run

import kernels

pytestmark = pytest.mark.skipif(not shutil.which("g++"), reason="emulating the kernel needs g++, and so does nvcc")
gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


needs_nvcc = pytest.mark.skipif(not kernels.nvcc(), reason="needs nvcc (on PATH, in $CUDA_HOME, or nvidia-cuda-nvcc)")


@pytest.mark.parametrize("dtype", BOUND, ids=str)
@pytest.mark.parametrize("head_size", kernels.HEAD_SIZES)
def test_head_sizes_and_types(head_size, dtype):
    p = problem(random_ranges(head_size, 1, 66, 131), 131, dtype, head_size)
    check(run(p), dense(p), BOUND[dtype])


FAULTS = [  # (what is wrong, source, replaced by, which occurrence)
    *((f"{kernel}: no {which} {what}", what, ";", 2 * i + j)
      for i, kernel in enumerate(("forward", "backward_q", "backward_kv"))
      for j, which in enumerate(("first", "second"))
      for what in ("copy_wait();", "__syncthreads();")),
    ("nothing seen: inf - inf", "best[half] == -INFINITY ? 0 : best[half] * scale", "best[half] * scale", 0),
    ("sums do not shrink", "exp2_fast(most[half] * scale - base[half])", "1.0f", 0),
    ("nothing seen: division by 0", "sum > 0 ? 1 / sum : 0", "1 / sum", 0),
    ("nothing seen: lse -inf", "sum > 0 ? lse : INFINITY", "lse", 0),
    ("the second backward pass skips spans", "min_begin < key0 + TILE && key0 < max_end", "false", 0),
    ("the last tile of the prefix is skipped", "(bounds.max_prefix + TILE - 1) / TILE", "bounds.max_prefix / TILE", 0),
    ("the last tile of the spans is skipped", "(bounds.max_end + TILE - 1) / TILE", "bounds.max_end / TILE", 0),
    ("tiles of prefix and span count twice", "max(in_prefix, bounds.min_begin / TILE)", "bounds.min_begin / TILE", 0),
    ("the gap between prefix and span is visited", "ranges.begin >= ranges.end", "false", 0),
    ("half of the rows do not count for the bounds", "max(a.prefix, b.prefix)", "a.prefix", 0),
    ("tiles seen in part are not masked", "key0 + TILE <= prefix", "key0 < prefix", 0),
    ("spans are not masked", "begin <= key0 && key0 + TILE <= end", "begin < key0 + TILE && key0 < end", 0),
    ("rows past the end are read", "row0 + row < rows", "true", 0),
    ("rows past the end are written", "if (row >= rows) continue;", ";", 0),
    ("always the first query head of a group", "head = (head + 1) % share;", "head = 0;", 0),
    ("no delta", "grad_p[i / 4][i % 4] - delta[half]", "grad_p[i / 4][i % 4]", 0),
    ("delta of a quarter of the row", "delta[half] = row_sum(delta[half]);", ";", 0),
    ("the row's maximum over a quarter of it", "best[half] = row_max(best[half]);", ";", 0),
    ("a part of the keys is left out", "visits.n * (split + 1) / call.splits", "visits.n * split / call.splits", 0),
    ("the last part has no weight", "split < call.splits && most > -INFINITY", "split + 1 < max(2, call.splits)", 0),
]  # fmt: skip


@pytest.fixture(scope="module")
def faulty(tmp_path_factory):
    """A library with all faults in it, each behind a switch."""
    folder = tmp_path_factory.mktemp("faulty")
    texts = {path.name: path.read_text() for path in kernels.SOURCES.glob("*.[ch]*")}
    cuts = []
    for number, (_, old, new, which) in enumerate(FAULTS, 1):
        places = [(name, m.start()) for name in ("attention.cu", "tiles.h")
                  for m in re.finditer(re.escape(old), texts[name])]  # fmt: skip
        assert len(places) > which, f"not in the source any more: {old}"
        statement = f"{{ if (FAULT == {number}) {{ {new} }} else {{ {old} }} }}"
        cuts.append((*places[which], old, statement if old.endswith(";") else f"(FAULT == {number} ? {new} : ({old}))"))
    for name, start, old, switch in sorted(cuts, key=lambda cut: cut[1], reverse=True):
        texts[name] = texts[name][:start] + switch + texts[name][start + len(old) :]
    texts["tiles.h"] = 'static int FAULT = 0;\nextern "C" void set_fault(int n) { FAULT = n; }\n' + texts["tiles.h"]
    for name, text in texts.items():
        (folder / name).write_text(text)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder))
        return kernels.build(kernels.emulator_command(torch.bfloat16, 32), folder)


@cache
def fault_problems():
    """Small problems that together touch every line: gaps, empty rows, ragged tiles, many tiles, grouped heads."""
    many = problem(torch.tensor([[*([200, 0, 0],) * 3, [0, 130, 200]]]).repeat(1, 33, 1), 210, torch.bfloat16, 32)
    many.q[:, :, :60] *= 30  # sharp maxima, which leave their tile's sums far behind
    return [(*hard_problem(), (1, 3)), (many, dense(many), (1,))]


def caught(library):
    for seed in range(6):
        library.emulate_seed(seed)
        for p, want, splits in fault_problems():
            try:
                for n in splits:
                    check(run(p, n, library), want, BOUND[torch.bfloat16])
            except (AssertionError, RuntimeError) as error:
                return str(error) or "caught"
    return None


def test_seeded_faults_are_caught(faulty):
    faulty.set_fault(0)
    assert not caught(faulty)
    for number, (what, *_) in enumerate(FAULTS, 1):
        faulty.set_fault(number)
        assert caught(faulty), what


@needs_nvcc
@pytest.mark.parametrize("head_size", kernels.HEAD_SIZES)
@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
def test_compiles_without_spills(arch, head_size, tmp_path):
    command = kernels.nvcc_command(torch.bfloat16, head_size, arch, ("-cubin", "-Xptxas", "-v"))
    command += ["-o", tmp_path / "attention.cubin", kernels.SOURCES / "attention.cu"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    spills = re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", done.stderr)
    registers = re.findall(r"Used (\d+) registers", done.stderr)
    limit = 168 if head_size <= 64 else 255  # of 65536: room for three blocks, for two
    assert len(registers) == 5 and max(map(int, registers)) <= limit and set(spills) == {("0", "0")}, done.stderr


def gpu_problem(T, head_size, dtype, seed=0):
    spans = (T // 8 - 3,) * 4
    ranges = layout_ranges("sparse", T // 8, T // 16, spans, T - T // 8 - T // 16 - 4 * (T // 8), rounds=1)
    p = problem(ranges, T, dtype, head_size, (8, 4), seed)
    return SimpleNamespace(**{name: x.cuda() if torch.is_tensor(x) else x for name, x in vars(p).items()})


@gpu
@needs_nvcc
@pytest.mark.parametrize("dtype", BOUND, ids=str)
@pytest.mark.parametrize("head_size", kernels.HEAD_SIZES)
@pytest.mark.parametrize("T", [511, 2048])
def test_on_a_gpu(T, head_size, dtype):
    p = gpu_problem(T, head_size, dtype)
    want = dense(p)
    for splits in (1, 5):
        first = run(p, splits)
        check(first, want, BOUND[dtype])
        for _ in range(5):
            assert all(map(torch.equal, first, run(p, splits)))


@gpu
@needs_nvcc
@pytest.mark.skipif(not shutil.which("compute-sanitizer"), reason="compute-sanitizer is not on PATH")
@pytest.mark.parametrize("tool", ["memcheck", "racecheck", "synccheck"])
def test_compute_sanitizer(tool):
    code = "import test_kernels_faults as t, torch; t.run(t.gpu_problem(200, 64, torch.bfloat16), 3)"
    command = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "9", sys.executable, "-c", code]
    paths = {
        "PYTHONPATH": os.pathsep.join(
            map(str, (kernels.SOURCES.parent, Path(__file__).parents[1], Path(__file__).parent))
        )
    }
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | paths)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
