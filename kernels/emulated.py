"""Run a script on a CPU as a GPU would run it: the kernel under its emulator, a GPU's types, and a stand-in for graphs.

python kernels/emulated.py train.py --steps 2 --batch 1 --n_layer 1 --out runs/emulated    # slow: keep it small
"""

import runpy
import sys
from collections.abc import Callable
from functools import partialmethod
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the project's modules

import torch

from kernels import backends, graphs
from plumbing import device
from plumbing.settings import ROOT, command


def record(function: Callable) -> tuple[Callable, torch.Tensor]:
    """In place of a graph: calls the function again, and puts what it returns where its first output is."""
    output = function()
    return lambda: output.copy_(function()), output


def pretend() -> None:
    """Before a script is imported: have the project take the CPU for a GPU."""
    choose = backends.choose

    def kernel_first(name: str, *where: object, **more: object) -> str:
        return "kernel" if name in ("auto", "kernel") else choose(name, *where, **more)

    backends.choose, graphs.record = kernel_first, record
    device.has_graphs = lambda _: True
    device.sampling_dtype, device.fast_dtype = lambda _: torch.float16, lambda _: torch.bfloat16
    compiled = torch.nn.Module.compile  # traced as ever, but no C++ is built from it, which would take a minute
    torch.nn.Module.compile = partialmethod(compiled, backend="aot_eager")


def main() -> None:
    if len(sys.argv) < 2:
        raise ValueError("expected a script and its options, such as: train.py --steps 2")
    pretend()
    sys.argv = [str(ROOT / sys.argv[1]), *sys.argv[2:]]
    runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    command(main)
