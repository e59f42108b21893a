"""Train a model on a data set: settings, the loop, checkpoints and log.

    python train.py                          planned diffusion on data/tasks
    python train.py --method ar              the autoregressive model on the same examples
    torchrun --nproc_per_node 2 train.py     the same losses on two processes

All randomness is a function of (seed, step), so a run that is interrupted at any moment and started
again continues with the losses that it would have had.
"""

import argparse
import math
import os
import signal
import time
from contextlib import ExitStack
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from batches import TrainingData
from checkpoint import load_checkpoint, save_checkpoint
from device import CHOICES, fast_dtype, find, utilization
from drafts import TERMS
from files import write_whole
from loss import JointLoss, counts, validate, validate_streams
from methods import MethodConfig
from model import ModelConfig, Transformer
from optim import Optimizer
from settings import add_settings, check, command, locate, pick, setting


@dataclass
class TrainConfig:
    """Training."""

    data: str = setting("data/tasks", "folder of a data set, written by its prepare.py")
    out: str = setting("runs/tasks", "folder of checkpoint and log; an interrupted run in it is resumed")
    init: str = setting("", "checkpoint to start from, such as an autoregressive model as warm-up")
    steps: int = setting(10000, "updates", at_least=1)
    batch: int = setting(8, "sequences per micro-batch", at_least=1)
    accumulate: int = setting(1, "micro-batches per update, over all processes", at_least=1)
    weight: str = setting("uniform", "weight of a slot's loss, 1 or 1/t", among=("uniform", "elbo"))
    t_min: float = setting(0.0, "smallest share of slots masked; above 0 more of a span is masked, but 1/t is no ELBO",
                           at_least=0, below=1)  # fmt: skip
    history: str = setting("clean", "rounds before the one trained; noised is an ablation", among=("clean", "noised"))
    extra_pads: int = setting(0, "ablation, as the authors' code with 10: a training span is its text and 0 to this "
                                 "many [PAD], drawn once per span; 0: it has its planned length",
                              at_least=0, at_most=1000)  # fmt: skip
    span_weight: float = setting(1.0, "weight of the loss of spans beside that of the plan", at_least=0)
    ahead: int = setting(0, "tokens that the model learns to draft ahead; 0: none", at_least=0, at_most=64)
    draft_weight: float = setting(1.0, "weight of the loss of drafts beside that of the plan", at_least=0)
    lr: float = setting(0.005, "peak learning rate of Muon (matrices)", at_least=0)
    adam_lr: float = setting(0.003, "peak learning rate of AdamW (embedding and norms)", at_least=0)
    weight_decay: float = setting(0.0, "decoupled weight decay of matrices and embedding", at_least=0)
    warmup: int = setting(100, "updates of linear warm-up; then the rates fall linearly to 0", at_least=0)
    device: str = setting("auto", f"where to train: {', '.join(CHOICES)}")
    attention: str = setting("auto", "what computes attention: auto, dense, flex or kernel (attention.py)")
    clip: float = setting(1.0, "largest norm of the gradient", above=0)
    compile: bool = setting(False, "torch.compile: faster after a minute, in which Ctrl-C waits; needs a C++ compiler")
    seed: int = setting(0, "seed of initial weights, order, rounds and noise", at_least=0, below=2**63)
    validate_every: int = setting(1000, "updates between validations and checkpoints", at_least=1)
    validate_on: int = setting(128, "validation examples used during training", at_least=1)
    log_every: int = setting(50, "updates between lines of the log", at_least=1)

    def __post_init__(self) -> None:
        check(self)


# ---------------------------------------------------------------- who trains, how far it is


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

    def exchanging_gradients(self, loss: JointLoss) -> nn.Module:
        return nn.parallel.DistributedDataParallel(loss) if self.count > 1 else loss

    def close(self) -> None:
        if self.count > 1:
            dist.destroy_process_group()


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
        """A row and the speed for a reader."""
        step, tokens, seconds = self.first
        passed = max(self.seconds - seconds, 1e-9)
        left = passed / (self.step - step) * (self.steps - self.step)
        losses = "  ".join(f"{name} {row[name]:.4f}" for name in TERMS if row[name])
        return (f"step {self.step:6}/{self.steps}  {losses}  {row['padding']:4.1%} padding  "
                f"{(self.tokens - tokens) / passed:6.0f} tokens/s  {utilization(self.flops / passed, self.device)}  "
                f"{left / 60:.1f} min left")  # fmt: skip

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps, for JSON."""
        return {name: getattr(self, name) for name in self.SAVED} | {"recent": [x.tolist() for x in self.recent]}

    def load(self, info: dict[str, Any]) -> None:
        self.step, self.tokens, self.seconds, recent = (info[name] for name in self.SAVED)
        self.recent = [*torch.tensor(recent, dtype=torch.float32, device=self.device)]


class Log:
    """log.csv: a row of losses every so many updates. Rows that a resumed run writes again are dropped first."""

    COLUMNS = ("step", "tokens", "seconds", *TERMS, *(f"val_{name}" for name in TERMS))

    def __init__(self, path: Path, step: int):
        """Keep the whole rows up to `step`, whatever else is in the file."""
        text = path.read_text("utf-8", "replace") if path.is_file() else ""
        *lines, _ = text.split("\n")  # what follows the last line break was cut off
        rows = {self._step(line): line for line in lines}
        rows = {number: line for number, line in rows.items() if 1 <= number <= step}
        self.last = max(rows, default=0)
        write_whole(path, "\n".join([",".join(self.COLUMNS), *(rows[n] for n in sorted(rows)), ""]))
        self.file = path.open("a")

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


# ---------------------------------------------------------------- the training


class Trainer:
    """Model, data and optimizer, and the update that brings them together.

    On a GPU an update asks the device for no result, unless several processes share it: while the device computes,
    the host makes the next batch.
    """

    def __init__(self, config: TrainConfig, model_config: ModelConfig, method_config: MethodConfig):
        self.config, self.processes, self.ctrl_c = config, Processes(config.device), CtrlC()
        self.device = self.processes.device
        if config.accumulate % (count := self.processes.count):
            raise ValueError(f"--accumulate {config.accumulate}: expected a multiple of the {count} processes")
        self.data = TrainingData(config, method_config, self.processes.say)
        self.tokenizer, dtype = self.data.tokenizer, fast_dtype(self.device)
        torch.manual_seed(config.seed)
        self.model = Transformer(replace(model_config, vocab_size=self.tokenizer.vocab_size)).to(self.device)
        self.model.attend_by(config.attention, dtype)
        if config.compile:
            self.model.compile(dynamic=True)
        self.loss = JointLoss(self.model, self.tokenizer.pad + 1, dtype)
        self.shared_loss = self.processes.exchanging_gradients(self.loss)
        self.optimizer, self.progress = Optimizer(self.model, config), Progress(config.steps, self.device)
        self.stopping = False  # since an update noticed Ctrl-C

    def update(self) -> torch.Tensor:
        """One update. Returns the loss of the global batch by terms, in nats per token, and its share of padding."""
        c, processes, step = self.config, self.processes, self.progress.step
        batches = self.data.micro_batches(step, processes.rank, processes.count)
        sizes = [sum(b.n_tokens for b in batches), sum(b.token.numel() for b in batches), self.ctrl_c.pressed()]
        total = torch.cat([sum(counts(b, c.weight) for b in batches), torch.tensor(sizes).double()])
        total = processes.sum(total)
        targets, (tokens, places, stopping) = total[: len(TERMS)].clamp(min=1), total[len(TERMS) :].tolist()
        weights = torch.tensor([1.0, *[c.span_weight] * 2, *[c.draft_weight] * 2]) / targets.float()
        weights, losses = weights.to(self.device), torch.zeros(len(TERMS), device=self.device)
        for i, batch in enumerate(batches):
            self.shared_loss.require_backward_grad_sync = i == len(batches) - 1  # exchange gradients once per update
            sums = self.shared_loss(batch.to(self.device))
            # DDP takes the mean over processes, but the targets are already those of all
            (processes.count * (sums * weights).sum()).backward()
            losses += sums.detach()
        losses = processes.sum(losses / targets.float().to(self.device))
        nn.utils.clip_grad_norm_(self.model.parameters(), c.clip)
        self.optimizer.step(step)
        self.model.zero_grad()
        self.stopping = bool(stopping)  # all processes stop after the same update
        losses = torch.cat([losses, torch.tensor([1 - tokens / places]).to(self.device)])
        self.progress.add(losses, int(tokens), sum(map(self.loss.flops, batches)))
        return losses

    def validate(self) -> dict[str, float]:
        """The terms of the loss on the validation examples, in nats per token; of noised spans the ELBO."""
        inputs, method = (self.loss, self.data.validation, self.tokenizer, self.device), self.data.method
        plan, span, _ = validate(*inputs)
        losses = {"plan": plan, "causal" if method.attention == "causal" else "span": span}
        return losses | validate_streams(*inputs, method.causal, self.config.ahead)


class Run:
    """A training from its first or last checkpoint to its end. The folder `out` holds all that is needed to go on."""

    def __init__(self, trainer: Trainer):
        self.trainer, self.config, self.progress = trainer, trainer.config, trainer.progress
        self.out, self.say = Path(self.config.out), trainer.processes.say
        self.checkpoint, self.model = self.out / "checkpoint.safetensors", self.out / "model.safetensors"
        self.log: Log | None = None
        if self.checkpoint.exists():
            self.resume()
        elif self.config.init:
            self.take_weights(locate(self.config.init))

    def take_weights(self, path: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
        """Begin with the weights of a checkpoint. Returns its info and state."""
        trainer = self.trainer
        model, tokenizer, info, state = load_checkpoint(path, trainer.device)
        if tokenizer.tokens != trainer.tokenizer.tokens or model.config != trainer.model.config:
            raise ValueError(f"{path} has another tokenizer or another size of model than this run: give it the same")
        trainer.model.load_state_dict(model.state_dict())
        return info, state

    def resume(self) -> None:
        """Go on with an interrupted run. Raises ValueError if it had other settings."""
        info, state = self.take_weights(self.checkpoint)
        new = asdict(self.config) | asdict(self.trainer.data.method)
        defaults = {f.name: f.default for cls in (TrainConfig, MethodConfig) for f in fields(cls)}
        try:
            old = {**defaults, **info["train"], **info["method"]}
            changed = [name for name in new if old[name] != new[name] and name not in ("out", "device")]
            other = [f"{name} ({old[name]}, not {new[name]})" for name in changed]
            if not other:
                self.trainer.optimizer.load(state)
                self.progress.load(info)
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise ValueError(f"{self.checkpoint} holds no run that can go on ({error!r}): take another --out") from None
        if other:
            raise ValueError(
                f"{self.checkpoint} is of a run with other {', '.join(other)}: take those or another --out"
            )
        self.say(f"going on with {self.checkpoint} after {self.progress.step} updates")

    def run(self) -> None:
        """Train to the end, or until Ctrl-C, which ends the run between two updates and saves."""
        c, trainer, progress = self.config, self.trainer, self.progress
        with ExitStack() as at_the_end:
            at_the_end.callback(trainer.processes.close)
            self.open_log(at_the_end)
            self.say(f"{trainer.model.n_params() / 1e6:.2f}M parameters, {len(trainer.data.train)} examples, "
                     f"on {trainer.processes.count} x {trainer.device}")  # fmt: skip
            progress.start()
            at_the_end.enter_context(trainer.ctrl_c)
            self.end_update()  # what a run that was killed after its last checkpoint had still to do
            while progress.step < c.steps and not trainer.stopping:
                trainer.update()
                if progress.step == 1 or self.due(c.log_every):
                    self.say(progress.line(progress.row()))
                if self.due(c.validate_every) or trainer.stopping:
                    self.save()
                self.end_update()
        if trainer.stopping and progress.step < c.steps:
            self.say(f"stopped after {progress.step} updates; the same command goes on from here")

    def due(self, every: int) -> bool:
        return self.progress.step % every == 0 or self.progress.step == self.config.steps

    def open_log(self, at_the_end: ExitStack) -> None:
        """The first process keeps the log. A row that is in it already is not written again."""
        if self.trainer.processes.rank == 0:
            self.log = Log(self.out / "log.csv", self.progress.step)
            at_the_end.callback(self.log.close)
            if self.log.last == self.progress.step:
                self.progress.recent = []

    def save(self) -> None:
        """Write all that the run needs to go on, after what a finished run leaves: float16 weights alone."""
        if self.log:
            self.progress.row()  # refuses losses that are not finite
            self.log.to_disk()
            if self.progress.step == self.config.steps:
                self.write(self.model, dtype=torch.float16)
            self.write(self.checkpoint, state=self.trainer.optimizer.state())

    def write(self, path: Path, **more: Any) -> None:
        trainer = self.trainer
        info = {"train": asdict(self.config), "method": asdict(trainer.data.method)} | self.progress.state()
        save_checkpoint(path, trainer.model, trainer.tokenizer, info, **more)

    def end_update(self) -> None:
        """Write the row of an update that has one, validating first if that is due; all of it after saving."""
        c, progress = self.config, self.progress
        if progress.recent and (self.due(c.log_every) or self.due(c.validate_every)):
            if self.log:
                row = progress.row()
                if self.due(c.validate_every):
                    losses = self.trainer.validate()
                    row |= {f"val_{name}": value for name, value in losses.items()}
                    said = ", ".join(f"{name} {value:.4f}" for name, value in losses.items())
                    self.say(f"validation: {said} nats per token")
                self.log.write(row)
            progress.recent = []
        if self.log and progress.step == c.steps and not self.model.exists():  # the run was killed before it wrote that
            self.write(self.model, dtype=torch.float16)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_settings(parser, TrainConfig, MethodConfig, ModelConfig)
    args = parser.parse_args()
    Run(Trainer(*(pick(config, args) for config in (TrainConfig, ModelConfig, MethodConfig)))).run()


if __name__ == "__main__":
    command(main)
