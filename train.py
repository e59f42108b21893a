"""Train a model on a data set: the update, the loop, and the command line.

    python train.py                 planned diffusion on data/tasks
    python train.py --method ar     autoregression on the same examples
    torchrun --nproc_per_node 2 train.py --accumulate 2
        two processes: the losses of one with --accumulate 2

config.py has the settings. All randomness is a function of (seed, step), so a
run that is interrupted at any moment and started again continues with the
losses that it would have had.
"""

import argparse
import hashlib
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from config import MethodConfig, SampleConfig, TrainConfig
from data import advice, read_split
from drafting.training import ArrangeDrafts
from kernels.backends import attend_by
from loss import JointLoss, counts, term_weights, validate
from methods import encode
from model import ModelConfig, Transformer
from noise import TERMS, Arrange
from plumbing.device import fast_dtype, use_threads
from plumbing.settings import Help, add_settings, command, locate, pick, refuse_idle
from pretrained.llama import Pretrained, load, look
from pretrained.lora import Adapters
from sample import Sampler
from tags import Example
from tokenizer import Tokenizer
from training.batches import TrainingData
from training.bookkeeping import CtrlC, Processes, Progress, flops_of
from training.optim import Optimizer, only_new_tokens
from training.run import Run, State, Weights, introduce

FEW = 8  # validation prompts that are answered


def read(folder: Path, init: str) -> tuple[Tokenizer, Pretrained | None, list[Example], list[Example]]:
    """The tokenizer, the pretrained model that `init` may name, and the training and validation examples of a folder.

    Raises ValueError if some are missing or do not fit the tokenizer.
    """
    if not folder.exists():
        raise ValueError(advice(folder / "train.jsonl"))
    tokenizer, start = Tokenizer.load(folder / "tokenizer.json"), locate(init or ".")
    pretrained = look(start, tokenizer.unit) if init and start.is_dir() else None
    tokenizer = pretrained.tokenizer if pretrained else tokenizer
    train, validation = (read_split(folder / f"{split}.jsonl", tokenizer) for split in ("train", "val"))
    if not train or not validation:
        raise ValueError(f"{folder} has {len(train)} training and {len(validation)} validation examples: "
                         "expected some of each")  # fmt: skip
    return tokenizer, pretrained, train, validation


class Trainer:
    """Model, data and optimizer, and the update that brings them together."""

    def __init__(self, config: TrainConfig, model_config: ModelConfig, method_config: MethodConfig):
        """Read data and, from a pretrained folder, weights. Raises ValueError that says what is wrong with them."""
        refuse_idle(method_config, method_config)
        refuse_idle(config, method_config)
        self.config, self.processes, self.ctrl_c = config, Processes(config.device), CtrlC()
        self.device, say, folder = self.processes.device, self.processes.say, locate(config.data)
        if config.accumulate % (count := self.processes.count):
            raise ValueError(f"--accumulate {config.accumulate}: expected a multiple of the {count} processes")
        say(f"reading {folder}. {use_threads()}")
        self.tokenizer, pretrained, *splits = read(folder, config.init)
        self.examples = hashlib.sha256((folder / "train.jsonl").read_bytes()).hexdigest()
        self.trained_on = introduce(folder, splits[1])
        self.few = splits[1][:: -(-len(splits[1]) // FEW)]
        arrange = ArrangeDrafts(config.ahead) if config.ahead else Arrange()
        self.data = TrainingData(config, method_config, self.tokenizer, *splits, arrange, say)
        torch.manual_seed(config.seed)
        dtype = fast_dtype(self.device)
        self.weights = self.new_weights(model_config, pretrained, dtype)
        self.model = self.weights.model
        self.model.recompute = config.recompute
        attend_by(self.model, config.attention, dtype)
        if config.compile:
            self.model.compile(dynamic=True)
        self.loss = JointLoss(self.model, self.tokenizer.pad + 1, dtype)
        self.shared_loss = self.processes.exchanging_gradients(self.loss)
        self.optimizer, self.progress = Optimizer(self.model, config), Progress(config.steps, self.device)
        self.stopping = False  # since an update noticed Ctrl-C

    def new_weights(self, model_config: ModelConfig, pretrained: Pretrained | None, dtype: torch.dtype) -> Weights:
        """The model that the training begins with, on its device: random, or pretrained, with adapters if asked for."""
        c = self.config
        if c.lora and not pretrained:
            raise ValueError(f"--lora {c.lora}: expected --init FOLDER, of a pretrained model")
        if not pretrained:
            shape = replace(model_config, vocab_size=self.tokenizer.vocab_size)
            return Weights(Transformer(shape).to(self.device), self.tokenizer)
        if model_config != ModelConfig():
            raise ValueError(f"--init {c.init}: its config.json decides the shape of the model, so leave out --n_layer, "
                             "--d_model and the like")  # fmt: skip
        self.processes.say(f"reading the weights of {c.init}")
        model = load(pretrained, self.device, dtype if c.lora else torch.float32)
        return Adapters(model, self.tokenizer, c) if c.lora else Weights(model, self.tokenizer)

    def update(self) -> torch.Tensor:
        """One update. Returns the loss of the global batch by terms, in nats per token, and its share of padding.

        On a GPU it asks for no result, unless processes share it: the host makes the next batch while the device works.
        """
        c, processes, step = self.config, self.processes, self.progress.step
        batches = self.data.micro_batches(step, processes.rank, processes.count)
        targets = processes.sum(sum(counts(b, c.weight) for b in batches)).clamp(min=1).float()
        sizes = sum(b.n_tokens for b in batches), sum(b.token.numel() for b in batches)
        tokens, positions, stopping = processes.totals(*sizes, self.ctrl_c.pressed())
        weight = (term_weights(c.span_weight, c.draft_weight) / targets).to(self.device)
        losses = torch.zeros(len(TERMS), device=self.device)
        for i, batch in enumerate(batches):
            self.shared_loss.require_backward_grad_sync = i == len(batches) - 1  # exchange gradients once per update
            sums = self.shared_loss(batch.to(self.device))
            # DDP takes the mean over processes, but the targets are already those of all
            (processes.count * (sums * weight).sum()).backward()
            losses += sums.detach()
        losses = processes.sum(losses / targets.to(self.device))
        if step < c.new_only:
            only_new_tokens(self.model, self.tokenizer.pad)
        nn.utils.clip_grad_norm_(self.model.parameters(), c.clip)
        self.optimizer.step(step)
        self.model.zero_grad()
        self.stopping = stopping > 0  # all processes stop after the same update
        losses = torch.cat([losses, torch.tensor([1 - tokens / positions]).to(self.device)])
        self.progress.add(losses, tokens, sum(flops_of(self.loss, batch) for batch in batches))
        return losses

    def validate(self) -> dict[str, float]:
        """The terms of the loss on the validation examples, in nats per token; of noised spans the ELBO."""
        data = self.data
        return validate(self.loss, data.validation, self.tokenizer, self.device, data.method.causal,
                        data.arrange if self.config.ahead else None)  # fmt: skip

    def answer(self, checkpoint: Path) -> dict[str, float]:
        """Of a few validation prompts the shares whose answers are complete, and repeat themselves; by what was saved.

        Losses fall long before an answer ends by itself.
        """
        longest = max(len(encode(example, self.tokenizer, self.data.method)) for example in self.few)
        settings = SampleConfig(max_tokens=min(2 * longest, SampleConfig.max_tokens))
        answers = Sampler.load(checkpoint, settings, self.device).answer([example.prompt for example in self.few])
        use_threads()  # loading has chosen those of sampling
        complete = [not answer.cut and not answer.broken for answer in answers]
        return {"complete": sum(complete) / len(answers), "looping": sum(a.looping for a in answers) / len(answers)}

    def train(self) -> None:
        """Train to the end, or until Ctrl-C, which ends the run between two updates and saves."""
        c, progress, say = self.config, self.progress, self.processes.say
        state = State(self.weights, self.optimizer, progress, self.data.method, self.examples, self.trained_on)
        with ExitStack() as at_the_end:
            at_the_end.callback(self.processes.close)
            run = at_the_end.enter_context(Run(c, state, self.processes))
            say(f"{self.model.n_params() / 1e6:.2f}M parameters, {len(self.data.train)} examples, "
                f"on {self.processes.count} x {self.device}")  # fmt: skip
            progress.start()
            at_the_end.enter_context(self.ctrl_c)
            run.end_update(
                self.validate, self.answer
            )  # what a run that was killed after its last checkpoint had still to do
            while progress.step < c.steps and not self.stopping:
                self.update()
                if progress.step == 1 or run.due(c.log_every):
                    say(progress.line(progress.row()))
                if run.due(c.validate_every) or self.stopping:
                    run.save()
                run.end_update(self.validate, self.answer)
        if self.stopping and progress.step < c.steps:
            say(f"stopped after {progress.step} updates; the same command goes on from here")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=Help)
    add_settings(parser, TrainConfig, MethodConfig, ModelConfig)
    args = parser.parse_args()
    Trainer(*(pick(config, args) for config in (TrainConfig, ModelConfig, MethodConfig))).train()


if __name__ == "__main__":
    command(main)
