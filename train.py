"""Train a model on a data set: settings, the loop, checkpoints and log.

    python train.py                                         planned diffusion on data/tasks
    python train.py --method ar                             the autoregressive model on the same examples
    torchrun --nproc_per_node 2 train.py --accumulate 2     two processes: the losses of one with --accumulate 2

All randomness is a function of (seed, step), so a run that is interrupted at any moment and started
again continues with the losses that it would have had.
"""

import argparse
from contextlib import ExitStack
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from batches import TrainingData
from drafts import TERMS
from loss import JointLoss, counts, validate, validate_streams
from methods import MethodConfig
from model import ModelConfig, Transformer
from optim import Optimizer, only_new_tokens
from plumbing.bookkeeping import CtrlC, Log, Processes, Progress
from plumbing.checkpoint import load_checkpoint, save_checkpoint
from plumbing.device import CHOICES, fast_dtype
from plumbing.settings import add_settings, check, command, locate, pick, setting
from pretrained.llama import load
from pretrained.lora import adapt, merged, restore, save_adapter, trained


@dataclass
class TrainConfig:
    """Training."""

    data: str = setting("data/tasks", "folder of a data set, written by its prepare.py")
    out: str = setting("runs/tasks", "folder of checkpoint and log; an interrupted run in it is resumed")
    init: str = setting("", "what to start from: a checkpoint, such as an autoregressive model as warm-up, or the folder "
                            "of a pretrained model (docs/your-own-model.md)")  # fmt: skip
    new_only: int = setting(0, "first updates, which train the embeddings of tags and lengths alone", at_least=0)
    lora: int = setting(0, "rank of adapters that are trained in place of a pretrained model's weights; 0: no adapters",
                        at_least=0, at_most=1024)  # fmt: skip
    lora_alpha: float = setting(32.0, "adapters are scaled by lora_alpha / lora", above=0)
    recompute: bool = setting(False, "gradient checkpointing: less memory for a third more time")
    steps: int = setting(10000, "updates", at_least=1)
    batch: int = setting(8, "sequences per micro-batch", at_least=1)
    accumulate: int = setting(1, "micro-batches per update, over all processes", at_least=1)
    weight: str = setting("uniform", "weight of a slot's loss, 1 or 1/t", among=("uniform", "elbo"))
    t_min: float = setting(0.0, "lowest probability that slots are masked with: above 0 more are, but 1/t gives no ELBO",
                           at_least=0, below=1)  # fmt: skip
    history: str = setting("clean", "rounds before the one trained; noised is an ablation", among=("clean", "noised"))
    even_rounds: bool = setting(False, "pick every round of an answer as often, rather than in proportion to what it "
                                       "predicts: helps where a short round is hard")  # fmt: skip
    extra_pads: int = setting(0, "ablation (10 in the authors' code): a training span is its text and 0 to this "
                                 "many [PAD], drawn once per span; 0: it has its planned length",
                              at_least=0, at_most=1000)  # fmt: skip
    span_weight: float = setting(1.0, "weight of the loss of spans beside that of the plan", at_least=0)
    ahead: int = setting(0, "tokens that the model learns to draft ahead; 0: none", at_least=0, at_most=64)
    draft_weight: float = setting(0.3, "weight of the loss of drafts beside that of the plan", at_least=0)
    lr: float = setting(0.005, "peak learning rate of Muon (matrices)", at_least=0)
    adam_lr: float = setting(0.003, "peak learning rate of AdamW (embedding, norms and adapters)", at_least=0)
    weight_decay: float = setting(0.0, "decoupled weight decay of matrices and embedding", at_least=0)
    warmup: int = setting(100, "updates of linear warm-up, at most half of all", at_least=0)
    decay: float = setting(1.0, "share of the updates after the warm-up, the last ones, in which the rates fall linearly "
                                "to 0; before they are constant", above=0, at_most=1)  # fmt: skip
    device: str = setting("auto", f"where to train: {', '.join(CHOICES)}")
    attention: str = setting("auto", "what computes attention: auto, dense, flex, kernel or spans (attention.py)")
    clip: float = setting(1.0, "largest norm of the gradient", above=0)
    compile: bool = setting(False, "torch.compile: faster after a minute, in which Ctrl-C waits; needs a C++ compiler")
    seed: int = setting(0, "seed of initial weights, order, rounds and noise", at_least=0, below=2**63)
    train_on: int = setting(0, "training examples used, the first of the split; 0: all", at_least=0)
    validate_every: int = setting(1000, "updates between validations and checkpoints", at_least=1)
    validate_on: int = setting(128, "validation examples used during training", at_least=1)
    log_every: int = setting(50, "updates between lines of the log", at_least=1)

    def __post_init__(self) -> None:
        check(self)


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
        self.model = self.new_model(model_config, dtype)
        self.model.recompute = config.recompute
        self.model.attend_by(config.attention, dtype)
        if config.compile:
            self.model.compile(dynamic=True)
        self.loss = JointLoss(self.model, self.tokenizer.pad + 1, dtype)
        self.shared_loss = self.processes.exchanging_gradients(self.loss)
        self.optimizer, self.progress = Optimizer(self.model, config), Progress(config.steps, self.device)
        self.stopping = False  # since an update noticed Ctrl-C

    def new_model(self, model_config: ModelConfig, dtype: torch.dtype) -> Transformer:
        """The model that the training begins with, on its device: random, or pretrained, with adapters if asked for."""
        c, pretrained = self.config, self.data.pretrained
        if not pretrained:
            if c.lora:
                raise ValueError(f"--lora {c.lora}: expected --init FOLDER, of a pretrained model")
            return Transformer(replace(model_config, vocab_size=self.tokenizer.vocab_size)).to(self.device)
        if model_config != ModelConfig():
            raise ValueError(f"--init {c.init}: its config.json decides the shape of the model, so leave out --n_layer, "
                             "--d_model and the like")  # fmt: skip
        self.processes.say(f"reading the weights of {c.init}")
        model = load(pretrained, self.device, dtype if c.lora else torch.float32)
        if c.lora:
            adapt(model, c.lora, c.lora_alpha, self.tokenizer.pad)
        return model

    def update(self) -> torch.Tensor:
        """One update. Returns the loss of the global batch by terms, in nats per token, and its share of padding."""
        c, processes, step = self.config, self.processes, self.progress.step
        batches = self.data.micro_batches(step, processes.rank, processes.count)
        sizes = [sum(b.n_tokens for b in batches), sum(b.token.numel() for b in batches), self.ctrl_c.pressed()]
        total = torch.cat([sum(counts(b, c.weight) for b in batches), torch.tensor(sizes).double()])
        total = processes.sum(total)
        targets, (tokens, positions, stopping) = total[: len(TERMS)].clamp(min=1), total[len(TERMS) :].tolist()
        weights = torch.tensor([1.0, *[c.span_weight] * 2, *[c.draft_weight] * 2]) / targets.float()
        weights, losses = weights.to(self.device), torch.zeros(len(TERMS), device=self.device)
        for i, batch in enumerate(batches):
            self.shared_loss.require_backward_grad_sync = i == len(batches) - 1  # exchange gradients once per update
            sums = self.shared_loss(batch.to(self.device))
            # DDP takes the mean over processes, but the targets are already those of all
            (processes.count * (sums * weights).sum()).backward()
            losses += sums.detach()
        losses = processes.sum(losses / targets.float().to(self.device))
        if step < c.new_only:
            only_new_tokens(self.model, self.tokenizer.pad)
        nn.utils.clip_grad_norm_(self.model.parameters(), c.clip)
        self.optimizer.step(step)
        self.model.zero_grad()
        self.stopping = bool(stopping)  # all processes stop after the same update
        losses = torch.cat([losses, torch.tensor([1 - tokens / positions]).to(self.device)])
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
        elif self.model.exists():
            raise ValueError(f"{self.out} holds a finished model but no checkpoint to go on from: take another --out")
        elif self.config.init and not trainer.data.pretrained:
            self.take_weights(locate(self.config.init))

    def take_weights(self, path: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor], int]:
        """Begin with the weights of a checkpoint. Returns its info, its state and its unit of length.

        Raises ValueError if its tokenizer or its model is another one.
        """
        trainer = self.trainer
        model, tokenizer, info, state = load_checkpoint(path, trainer.device)
        if tokenizer.tokens != trainer.tokenizer.tokens:
            raise ValueError(f"{path} has another tokenizer than {self.config.data}: take the --data it was trained on")
        ours, theirs = asdict(trainer.model.config), asdict(model.config)
        if other := [f"{name} ({value}, not {ours[name]})" for name, value in theirs.items() if ours[name] != value]:
            raise ValueError(f"{path} is a model of other {', '.join(other)}: give this run the same")
        trainer.model.load_state_dict(model.state_dict())
        return info, state, tokenizer.unit

    def resume(self) -> None:
        """Go on with an interrupted run. Raises ValueError if it had other settings."""
        adapted, given = self.config.lora > 0, self.trainer.tokenizer.unit
        path, model = self.checkpoint, self.trainer.model
        info, state, unit = restore(path, model) if adapted else self.take_weights(path)
        if unit != given:
            raise ValueError(f"{path} counts lengths in units of {unit} tokens, {self.config.data} in units of {given}: "
                             "prepare the data as it was, or take another --out")  # fmt: skip
        if info.get("examples", self.trainer.data.digest) != self.trainer.data.digest:  # older files do not say
            raise ValueError(f"{self.config.data} has other training examples than when {path} was saved: prepare the "
                             "data as it was, or take another --out")  # fmt: skip
        new = asdict(self.config) | asdict(self.trainer.data.method)
        defaults = {f.name: f.default for cls in (TrainConfig, MethodConfig) for f in fields(cls)}
        try:
            old = {**defaults, **info["train"], **info["method"]}
            free = {"out", "device"} | ({"data"} if "examples" in info else set())  # its examples were compared
            changed = [name for name in new if old[name] != new[name] and name not in free]
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
        """Whether what comes every so many updates comes now; at the end all of it does."""
        return self.progress.step % every == 0 or self.progress.step == self.config.steps

    def open_log(self, at_the_end: ExitStack) -> None:
        """The first process keeps the log. A row that is in it already is not written again."""
        if self.trainer.processes.rank == 0:
            self.log = Log(self.out / "log.csv", self.progress.step)
            at_the_end.callback(self.log.close)
            if self.log.last == self.progress.step:
                self.progress.recent = []

    def save(self) -> None:
        """Write all that the run needs to go on, after what a finished run leaves."""
        if self.log:
            self.progress.row()  # refuses losses that are not finite
            self.log.to_disk()
            if self.progress.step == self.config.steps:
                self.finish()
            adapters = {"weights": trained(self.trainer.model)} if self.config.lora else {}
            self.write(self.checkpoint, state=self.trainer.optimizer.state(), **adapters)

    def finish(self) -> None:
        """Write what a finished run leaves: weights in 16 bits, any adapters merged, and these also as `peft` has them."""
        c, model = self.config, self.trainer.model
        if c.lora:
            save_adapter(self.out / "adapter", model, c.init, c.lora, c.lora_alpha)
        weights = {"weights": merged(model)} if c.lora else {"dtype": getattr(torch, model.config.half)}
        self.write(self.model, **weights)

    def write(self, path: Path, **more: Any) -> None:
        """Save the model and how it was made; `more` goes to save_checkpoint."""
        trainer = self.trainer
        info = {"train": asdict(self.config), "method": asdict(trainer.data.method), "examples": trainer.data.digest}
        info |= self.progress.state()
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
            self.finish()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_settings(parser, TrainConfig, MethodConfig, ModelConfig)
    args = parser.parse_args()
    Run(Trainer(*(pick(config, args) for config in (TrainConfig, ModelConfig, MethodConfig)))).run()


if __name__ == "__main__":
    command(main)
