"""Training in two processes and, emulated, as a GPU does it."""

import os
import shutil
import signal
import socket
import subprocess
import sys

import pytest
import torch
from runs import (
    assert_same,
    interrupt,
    losses,
    make,
    options_of,
    run,
)

import train

RANKS = """
import os, sys, train
for rank in "01":  # as torchrun does, but torch is loaded once
    if not os.fork():
        os.environ |= {"RANK": rank, "LOCAL_RANK": rank}
        train.command(train.main)
        sys.exit()
sys.exit(any(os.wait()[1] for _ in "01"))
"""


def test_two_processes_train_as_one_does(folder, tmp_path):
    options = dict(accumulate=2, steps=4)
    run(folder, tmp_path / "one", **options)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        ranks = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    subprocess.run([sys.executable, "-c", RANKS, *options_of(folder, tmp_path / "two", **options)], check=True,
                   cwd=train.__file__.rpartition(os.sep)[0], capture_output=True, timeout=600,
                   env={**os.environ, **ranks, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""})  # fmt: skip
    one, two = losses(tmp_path / "one"), losses(tmp_path / "two")
    assert len(one) == len(two) == 4
    for a, b in zip(one, two):
        assert [float(x or 0) for x in a.values()] == pytest.approx([float(x or 0) for x in b.values()], abs=1e-4)


needs_emulator = pytest.mark.skipif(not shutil.which("g++"), reason="the kernel's emulation needs g++")


AS_ON_A_GPU = dict(shape=dict(n_layer=1, d_model=64, n_head=2, n_kv_head=1, d_ff=32), steps=4, validate_every=2)


@needs_emulator
def test_the_whole_of_a_training_works_with_the_kernel_in_bfloat16(folder, tmp_path, monkeypatch):
    """Training, validation, saving and going on, as a GPU does it: the kernel is emulated."""
    monkeypatch.setattr(train, "fast_dtype", lambda device: torch.bfloat16)
    monkeypatch.setattr("kernels.backends.choose", lambda *args: "kernel")
    run(folder, tmp_path / "whole", **AS_ON_A_GPU)
    interrupt(make(folder, tmp_path / "stopped", **AS_ON_A_GPU), 2, lambda: signal.raise_signal(signal.SIGINT))
    run(folder, tmp_path / "stopped", **AS_ON_A_GPU)
    assert_same(losses(tmp_path / "stopped"), losses(tmp_path / "whole"))
    monkeypatch.undo()
    run(folder, tmp_path / "exact", **{**AS_ON_A_GPU, "attention": "dense", "device": "cpu"})
    for row, exact in zip(losses(tmp_path / "whole"), losses(tmp_path / "exact")):
        for name in ("plan", "span", "val_plan", "val_span"):
            assert float(row[name] or 0) == pytest.approx(float(exact[name] or 0), rel=0.01)
