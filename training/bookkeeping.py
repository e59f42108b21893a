"""What a training keeps count of: its processes, its progress, its log, and whether Ctrl-C was pressed."""

import math
import os
import signal
import textwrap
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from loss import JointLoss
from noise import TERMS, Batch
from plumbing.device import find, utilization
from plumbing.files import write_whole


class Processes:
    """The processes that share a training, one device each. torchrun gives each its number; without it there is one."""

    def __init__(self, device: str):
        self.rank, self.count = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        self.device = find(device)
        if self.count > 1 and self.device.type == "mps":
            raise ValueError("several processes cannot share an mps device: take --device cpu, or one process")
        if self.count > 1 and self.device.type == "cuda":
            self.device = find(f"cuda:{os.environ.get('LOCAL_RANK', 0)}")
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
        if self.count > 1:
            dist.init_process_group("nccl" if self.device.type == "cuda" else "gloo")

    def say(self, text: str) -> None:
        """Print a line, once for all processes."""
        if self.rank == 0:
            print(text, flush=True)

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """The sum of a tensor over all processes, on the tensor's device."""
        if self.count == 1:
            return tensor
        summed = tensor.to(self.device)
        dist.all_reduce(summed)
        return summed.to(tensor.device)

    def totals(self, *numbers: int) -> list[int]:
        """The sums of some numbers over all processes."""
        return self.sum(torch.tensor(numbers)).tolist()

    def exchanging_gradients(self, loss: nn.Module) -> nn.Module:
        """The loss as a module whose backward pass averages gradients over the processes."""
        return nn.parallel.DistributedDataParallel(loss) if self.count > 1 else loss

    def close(self) -> None:
        if self.count > 1:
            dist.destroy_process_group()


def flops_of(loss: JointLoss, batch: Batch) -> float:
    """Floating-point operations of an update with a batch: forward, and twice that backward; multiply-adds count 2.

    Padding, keys that the mask hides and logits that no target needs are not counted.
    """
    c, (any_token, slot_token) = loss.model.config, batch.places
    n_keys = int((batch.ranges[..., 0] + batch.ranges[..., 2] - batch.ranges[..., 1]).sum())  # that all tokens see
    looked_up = c.vocab_size * c.d_model * (1 if c.tied else 2)  # embedding and output layer, counted below
    blocks = 2 * batch.n_tokens * (loss.model.n_params() - looked_up) + 4 * c.n_layer * c.n_head * c.head_dim * n_keys
    logits = 2 * c.d_model * (len(any_token) * c.vocab_size + len(slot_token) * loss.slot_tokens)
    return 3 * (blocks + logits)


def fold(parts: Iterable[str], columns: int = 80) -> str:
    """Parts of a message side by side; what has no room goes on in the next line, never within a part."""
    text = "  ".join(part.replace(" ", "\N{NO-BREAK SPACE}") for part in parts)
    return textwrap.fill(text, columns, subsequent_indent="  ").replace("\N{NO-BREAK SPACE}", " ")


class Progress:
    """What a run has done: updates, tokens, seconds, and the losses since the last row of its log."""

    SAVED = ("step", "tokens", "seconds", "recent")

    def __init__(self, steps: int, device: torch.device):
        self.steps, self.device = steps, device
        self.step, self.tokens, self.seconds = 0, 0, 0.0
        self.recent: list[torch.Tensor] = []  # what update returned, since the last row of the log
        self.flops = 0.0  # of this process since it began
        self.start()

    def start(self) -> None:
        """Time and speed count from here."""
        self.started, self.first = time.perf_counter() - self.seconds, (self.step, self.tokens, self.seconds)

    def add(self, losses: torch.Tensor, tokens: int, flops: float) -> None:
        """Count an update. Its losses stay on the device, which may not have computed them yet."""
        self.step, self.tokens, self.flops = self.step + 1, self.tokens + tokens, self.flops + flops
        self.recent.append(losses)

    def row(self) -> dict[str, float]:
        """Means since the last row, for the log. Raises ValueError if they are not finite."""
        *losses, padding = torch.stack(self.recent).mean(0).tolist()  # waits for the device
        self.seconds = time.perf_counter() - self.started
        if not math.isfinite(sum(losses)):
            raise ValueError(f"the loss is {sum(losses)} after {self.step} updates: the training has diverged. The "
                             "last checkpoint is kept; take a lower --lr and --adam_lr, and another --out")  # fmt: skip
        return {"step": self.step, "tokens": self.tokens, "seconds": round(self.seconds, 1), "padding": padding,
                **dict(zip(TERMS, losses))}  # fmt: skip

    def line(self, row: dict[str, float]) -> str:
        """A row and the speed for a reader, in lines that fit a terminal."""
        step, tokens, seconds = self.first
        passed = max(self.seconds - seconds, 1e-9)
        left = passed / (self.step - step) * (self.steps - self.step)
        used = [utilization(self.flops / passed, self.device)] if self.device.type != "cpu" else []
        return fold([f"step {self.step:{len(str(self.steps))}}/{self.steps}",
                     *(f"{name} {row[name]:.4f}" for name in TERMS if row[name]),
                     f"{(self.tokens - tokens) / passed:.0f} tokens/s", *used, f"{left / 60:.1f} min left"])  # fmt: skip

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps, for JSON."""
        return {name: getattr(self, name) for name in self.SAVED} | {"recent": [x.tolist() for x in self.recent]}

    def load(self, info: dict[str, Any]) -> None:
        self.step, self.tokens, self.seconds, recent = (info[name] for name in self.SAVED)
        self.recent = [*torch.tensor(recent, dtype=torch.float32, device=self.device)]


class Log:
    """log.csv: a row of losses every so many updates. Rows that a resumed run writes again are dropped first."""

    COLUMNS = ("step", "tokens", "seconds", *TERMS, *(f"val_{name}" for name in TERMS), "complete", "looping")

    def __init__(self, path: Path, step: int):
        """Keep the whole rows up to `step`, whatever else is in the file."""
        text = path.read_text("utf-8", "replace") if path.is_file() else ""
        *lines, _ = text.split("\n")  # what follows the last line break was cut off
        rows = {self._step(line): line for line in lines}
        rows = {number: line for number, line in rows.items() if 1 <= number <= step}
        self.last = max(rows, default=0)
        write_whole(path, "\n".join([",".join(self.COLUMNS), *(rows[n] for n in sorted(rows)), ""]))
        self.file = path.open("a", encoding="utf-8", newline="\n")

    def _step(self, line: str) -> int:
        """The update of a row, or 0 if the line is no row."""
        cells = line.split(",")
        try:
            numbers = [float(cell) for cell in cells if cell]
            return int(cells[0]) if len(cells) == len(self.COLUMNS) and all(map(math.isfinite, numbers)) else 0
        except ValueError:
            return 0

    def write(self, row: dict[str, float]) -> None:
        cells = (row.get(name, "") for name in self.COLUMNS)
        self.file.write(",".join(f"{cell:.5f}" if isinstance(cell, float) else str(cell) for cell in cells) + "\n")
        self.file.flush()
        self.last = row["step"]

    def to_disk(self) -> None:
        """Return once a power cut can no longer take the rows."""
        os.fsync(self.file.fileno())

    def close(self) -> None:
        self.file.close()


class CtrlC:
    """Holds Ctrl-C back until an update looks for it, so that a run always ends between two updates.

    Where signals can be blocked, what the run starts inherits that: a compiler that is stopped would leave half a
    file, on which later runs fail.
    """

    def __init__(self):
        self.noted = False

    def __enter__(self) -> "CtrlC":
        self.before = signal.signal(signal.SIGINT, lambda *_: setattr(self, "noted", True))
        self._mask("SIG_BLOCK")
        return self

    def __exit__(self, *_) -> None:
        self._mask("SIG_UNBLOCK")
        signal.signal(signal.SIGINT, self.before)

    def _mask(self, how: str) -> None:
        if hasattr(signal, "pthread_sigmask"):  # not on Windows
            signal.pthread_sigmask(getattr(signal, how), {signal.SIGINT})

    def pressed(self) -> bool:
        self.noted |= hasattr(signal, "sigpending") and signal.SIGINT in signal.sigpending()
        return self.noted
