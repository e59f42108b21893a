"""A run's folder: the checkpoint from which an interrupted run goes on, the log, and the finished model."""

import shlex
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from config import MethodConfig, TrainConfig
from plumbing.settings import locate, one_line
from tags import Example
from training.bookkeeping import Log, Processes, Progress, fold
from training.checkpoint import Weights, save_checkpoint
from training.optim import Optimizer


@dataclass
class State:
    """All that a run needs to go on, and what its examples and its method were."""

    weights: Weights
    optimizer: Optimizer
    progress: Progress
    method: MethodConfig
    examples: str  # digest of the training examples
    trained_on: dict[str, Any]  # what a checkpoint says of its data


def introduce(folder: Path, examples: list[Example]) -> dict[str, Any]:
    """What a checkpoint says of its data: their name, and three short prompts, of as many families as there are."""
    shortest = sorted((e for e in examples if e.prompt), key=lambda e: len(e.prompt))
    of_families = {e.family: e.prompt for e in reversed(shortest)}.values()
    prompts = dict.fromkeys([*sorted(of_families, key=len), *(e.prompt for e in shortest)])
    return {"data": folder.resolve().name, "prompts": [*prompts][:3]}


def how_to_answer(model: Path, trained_on: dict[str, Any]) -> str:
    """The command that answers one of the prompts that a model was trained for."""
    prompt = one_line(next(iter(trained_on["prompts"]), "..."))
    return f"  python sample.py --checkpoint {shlex.quote(str(model))} \\\n    --prompt {shlex.quote(prompt)}"


class Run:
    """A training from its first or last checkpoint to its end. The folder `out` holds all that is needed to go on."""

    def __init__(self, config: TrainConfig, state: State, processes: Processes):
        """Go on with what is in `out`, or begin with `init`. Raises ValueError if neither can be."""
        self.config, self.state, self.processes, self.progress = config, state, processes, state.progress
        self.out, self.say = Path(config.out), processes.say
        self.checkpoint, self.model = self.out / "checkpoint.safetensors", self.out / "model.safetensors"
        self.log: Log | None = None
        if self.checkpoint.exists():
            self.resume()
        elif self.model.exists():
            raise ValueError(f"{self.out} holds a finished model but no checkpoint to go on from: take another --out")
        elif config.init and not locate(config.init).is_dir():
            state.weights.restore(locate(config.init), config.data)

    def resume(self) -> None:
        """Go on with an interrupted run. Raises ValueError if it had other settings."""
        state, path, data = self.state, self.checkpoint, self.config.data
        info, tensors, unit = state.weights.restore(path, data)
        if unit != (given := state.weights.tokenizer.unit):
            raise ValueError(f"{path} counts lengths in units of {unit} tokens, {data} in units of {given}: "
                             "prepare the data as it was, or take another --out")  # fmt: skip
        if info.get("examples", state.examples) != state.examples:  # older files do not say
            raise ValueError(f"{data} has other training examples than when {path} was saved: prepare the "
                             "data as it was, or take another --out")  # fmt: skip
        new = asdict(self.config) | asdict(state.method)
        defaults = {f.name: f.default for cls in (TrainConfig, MethodConfig) for f in fields(cls)}
        try:
            old = {**defaults, **info["train"], **info["method"]}
            free = {"out", "device"} | ({"data"} if "examples" in info else set())  # its examples were compared
            changed = [name for name in new if old[name] != new[name] and name not in free]
            other = [f"{name} ({old[name]}, not {new[name]})" for name in changed]
            if not other:
                state.optimizer.load(tensors)
                self.progress.load(info)
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise ValueError(f"{path} holds no run that can go on ({error!r}): take another --out") from None
        if other:
            raise ValueError(f"{path} is of a run with other {', '.join(other)}: take those or another --out")
        if not self.finished():
            self.say(f"going on with {path} after {self.progress.step} updates")

    def finished(self) -> bool:
        """Whether all updates are done and the model is written."""
        return self.progress.step >= self.config.steps and self.model.exists()

    def __enter__(self) -> "Run":
        """The first process keeps the log. A row that is in it already is not written again."""
        self.wrote = "already finished:" if self.finished() else "wrote"
        if self.processes.rank == 0:
            self.log = Log(self.out / "log.csv", self.progress.step)
            if self.log.last == self.progress.step:
                self.progress.recent = []
        return self

    def __exit__(self, failed: type | None, *_: object) -> None:
        """Of a finished run, say where its model is and what can be done with it."""
        if self.log:
            self.log.close()
            if self.finished() and not failed:
                self.say(f"{self.wrote} {self.model}; answer with:\n{how_to_answer(self.model, self.state.trained_on)}")

    def due(self, every: int) -> bool:
        """Whether what comes every so many updates comes now; at the end all of it does."""
        return self.progress.step % every == 0 or self.progress.step == self.config.steps

    def end_update(self, validate: Callable[[], dict[str, float]], answer: Callable[[Path], dict[str, float]]) -> None:
        """Write the row of an update that has one, validating first if that is due; all of it after saving.

        `answer`: the shares of answers by the saved checkpoint that are complete, and that repeat themselves. Before the first update, say what the model knows already.
        """
        c, progress = self.config, self.progress
        if self.log and progress.step == 0:
            self.say_losses(validate(), [])
        if progress.recent and (self.due(c.log_every) or self.due(c.validate_every)):
            if self.log:
                row = progress.row()
                if self.due(c.validate_every):
                    losses, shares = validate(), answer(self.checkpoint)
                    row |= {f"val_{name}": value for name, value in losses.items()} | shares
                    self.say_losses(losses, [f"{share:.0%} of answers {name}" for name, share in shares.items()])
                self.log.write(row)
            progress.recent = []
        if self.log and progress.step == c.steps and not self.model.exists():  # the run was killed before it wrote that
            self.write(self.model, **self.state.weights.finished(self.out))

    def say_losses(self, losses: dict[str, float], more: list[str]) -> None:
        """Print the losses of a validation."""
        said = (f"{name} {value:.4f}" for name, value in losses.items())
        self.say(fold(["validation:", *said, "nats per token", *more]))

    def save(self) -> None:
        """Write all that the run needs to go on, after what a finished run leaves."""
        if self.log:
            self.progress.row()  # refuses losses that are not finite
            self.log.to_disk()
            if self.progress.step == self.config.steps:
                self.write(self.model, **self.state.weights.finished(self.out))
            self.write(self.checkpoint, state=self.state.optimizer.state(), **self.state.weights.kept())

    def write(self, path: Path, **more: Any) -> None:
        """Save the model and how it was made; `more` goes to save_checkpoint."""
        state = self.state
        info = {"train": asdict(self.config), "method": asdict(state.method), "examples": state.examples}
        info |= {"trained_on": state.trained_on} | self.progress.state()
        save_checkpoint(path, state.weights.model, state.weights.tokenizer, info, **more)
