"""Train a model on a data set: joint loss, loop, checkpoints.

    python train.py                          planned diffusion on data/tasks
    python train.py --method ar              the autoregressive model on the same examples
    torchrun --nproc_per_node 2 train.py     the same losses on two processes

All randomness is a function of (seed, step), so a run that is interrupted at any moment and started
again continues with the losses that it would have had.
"""

import argparse
import os
import signal
import sys
import time
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from data import read_split
from device import fast_dtype
from files import write_whole
from methods import MethodConfig, encode
from model import ModelConfig, Transformer, load_checkpoint, save_checkpoint
from noise import IGNORE, Sequence, make_batch
from optim import Optimizer
from settings import add_settings, locate, pick, setting
from tokenizer import Tokenizer


@dataclass
class TrainConfig:
    """Training."""

    data: str = setting("data/tasks", "folder of a data set, written by its prepare.py")
    out: str = setting("runs/tasks", "folder of checkpoint and log; an interrupted run in it is resumed")
    init: str = setting("", "checkpoint to start from, such as an autoregressive model as warm-up")
    steps: int = setting(10000, "updates")
    batch: int = setting(8, "sequences a micro-batch")
    accumulate: int = setting(1, "micro-batches an update, over all processes")
    weight: str = setting("uniform", "weight of a slot's loss: uniform, or elbo (1/t)")
    t_min: float = setting(0.0, "smallest share of slots masked; above 0 more of a span is masked, but 1/t is no ELBO")
    history: str = setting("clean", "rounds before the one trained: clean, or noised (ablation)")
    span_weight: float = setting(1.0, "weight of the span loss beside the plan loss")
    lr: float = setting(0.005, "peak learning rate of Muon (matrices)")
    adam_lr: float = setting(0.003, "peak learning rate of AdamW (embedding and norms)")
    weight_decay: float = setting(0.0, "decoupled weight decay of matrices and embedding")
    warmup: int = setting(100, "updates of linear warm-up; then the rates fall linearly to 0")
    attention: str = setting("auto", "what computes attention: auto, dense, flex or kernel (attention.py)")
    clip: float = setting(1.0, "largest norm of the gradient")
    compile: bool = setting(False, "torch.compile: faster after a minute, in which Ctrl-C waits; needs a C++ compiler")
    seed: int = setting(0, "seed of initial weights, order, rounds and noise")
    validate_every: int = setting(1000, "updates between validations and checkpoints")
    validate_on: int = setting(128, "validation examples used during training")
    log_every: int = setting(50, "updates between lines of the log")

    def __post_init__(self):
        for name in ("steps", "batch", "accumulate", "validate_every", "log_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name} {getattr(self, name)}: expected 1 or more")
        if not 0 <= self.t_min < 1:
            raise ValueError(f"--t_min {self.t_min}: expected 0 or more, and less than 1")
        for name, known in {"weight": ("uniform", "elbo"), "history": ("clean", "noised")}.items():
            if getattr(self, name) not in known:
                raise ValueError(f"--{name} {getattr(self, name)}: expected one of {', '.join(known)}")


# ---------------------------------------------------------------- loss


class JointLoss(nn.Module):
    """Sums of the plan loss and of the weighted span loss over a batch, in nats.

    Plan and text positions predict the next token over the whole vocabulary. A masked slot
    predicts itself among text and [PAD]: never a tag (zero masking probability, MDLM section 3.2.3).
    """

    def __init__(self, model, slot_tokens):
        super().__init__()
        self.model, self.slot_tokens = model, slot_tokens

    def forward(self, batch):
        hidden = self.model(batch.token, batch.position, batch.see).flatten(0, 1)  # (B * T, D)
        target, (plan, span) = batch.target.flatten(), batch.places
        plan_loss = F.cross_entropy(self.model.logits(hidden[plan]).float(), target[plan], reduction="sum")
        logits = self.model.logits(hidden[span], self.slot_tokens).float()  # (masked slots, slot_tokens)
        span_loss = F.cross_entropy(logits, target[span], reduction="none") * batch.weight.flatten()[span]
        return plan_loss, span_loss.sum()  # not a product of vectors: autocast would compute that in bfloat16


def counts(batch, weight):
    """What the two sums are divided by: plan targets, and slots (elbo) or masked slots (uniform)."""
    predicted = batch.target != IGNORE
    slots = batch.in_span if weight == "elbo" else predicted & batch.in_span
    return torch.stack([(predicted & ~batch.in_span).sum(), slots.sum()]).double()


@torch.no_grad()
def validate(loss, sequences, tokenizer, device="cpu", draws=1, seed=0, batch=16):
    """Negative log-likelihoods in nats a token: (plan, span, standard error of span).

    Plan and text exactly; spans as the negative ELBO, a Monte-Carlo mean over `draws` noisings of
    each round. [PAD] slots count as tokens of a span.
    """
    rng = np.random.default_rng(seed)
    views = [(s, r) for s in sequences for r in range(s.n_rounds)]
    views.sort(key=lambda view: view[0].stop(view[1]))
    plan, total, spans = 0.0, np.zeros(2), []
    for draw in range(draws):
        spans.append(0.0)
        for i in range(0, len(views), batch):
            part, rounds = zip(*views[i : i + batch])
            noised = make_batch(part, rounds, tokenizer, rng, "elbo")
            last = torch.tensor([r == s.n_rounds - 1 for s, r in zip(part, rounds)])  # it holds the plans of all rounds
            noised.target[~last[:, None] & ~noised.in_span] = IGNORE
            plan_sum, span_sum = loss(noised.to(device))
            spans[-1] += float(span_sum)
            if draw == 0:
                plan, total = plan + float(plan_sum), total + counts(noised, "elbo").numpy()
    spans = np.array(spans) / max(total[1], 1)
    error = spans.std(ddof=1) / len(spans) ** 0.5 if len(spans) > 1 else float("nan")
    return plan / max(total[0], 1), float(spans.mean()), float(error)


# ---------------------------------------------------------------- data


class Batches:
    """Which examples, and which round of each, make a micro-batch: a function of seed and number.

    Each epoch is a new order. Windows of 16 micro-batches are sorted by length, so that little of
    a batch is padding. A round is picked in proportion to how many tokens it predicts.
    """

    def __init__(self, sequences, size, seed):
        if len(sequences) < size:
            raise ValueError(f"the training split has {len(sequences)} examples, fewer than a batch of {size}")
        self.sequences, self.size, self.seed, self.epoch = sequences, size, seed, -1
        self.per_epoch = len(sequences) // size
        self.shares = [np.cumsum([s.targets_in(r) for r in range(s.n_rounds)]) for s in sequences]

    def __getitem__(self, number):
        """Sequences and their rounds of micro-batch `number`, counted over all epochs."""
        epoch, number = divmod(number, self.per_epoch)
        if epoch != self.epoch:
            self._shuffle(epoch)
        picked = self.order[number]
        return [self.sequences[i] for i in picked], [self.rounds[i] for i in picked]

    def _shuffle(self, epoch):
        rng, self.epoch = np.random.default_rng([self.seed, epoch]), epoch
        self.rounds = [int(np.searchsorted(share, rng.random() * share[-1], "right")) for share in self.shares]
        order = rng.permutation(len(self.sequences))[: self.per_epoch * self.size]
        windows = np.array_split(order, range(16 * self.size, len(order), 16 * self.size))
        length = np.array([s.stop(r) for s, r in zip(self.sequences, self.rounds)])
        order = np.concatenate([window[np.argsort(length[window], kind="stable")] for window in windows])
        self.order = rng.permutation(order.reshape(-1, self.size))


# ---------------------------------------------------------------- loop


class Trainer:
    """A run: what it trains, its place, its log. `config.out` holds all that is needed to go on.

    On a GPU an update asks the device for no result, unless several processes share it: while that computes, the
    host makes the next batch.
    """

    PLACE = ("step", "tokens", "seconds", "recent")  # updates, tokens, seconds so far; losses since the last log row

    def __init__(self, config, model_config, method_config):
        self.config, self.out = config, Path(config.out)
        self.rank, self.world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        if config.accumulate % self.world:
            raise ValueError(f"--accumulate {config.accumulate} must be a multiple of the {self.world} processes")
        cuda = torch.cuda.is_available()
        self.device = torch.device(f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if cuda else "cpu")
        self.dtype = fast_dtype(self.device)
        if cuda:
            torch.cuda.set_device(self.device)
        if self.world > 1:
            dist.init_process_group("nccl" if cuda else "gloo")
        self.out.mkdir(parents=True, exist_ok=True)
        data = locate(config.data)
        self.tokenizer = Tokenizer.load(data / "tokenizer.json")
        splits = [read_split(data / f"{split}.jsonl") for split in ("train", "val")]
        self.method = method_config.fitted(splits[0], self.tokenizer)
        self.train_set, self.val_set = ([Sequence(encode(e, self.tokenizer, self.method)) for e in s] for s in splits)
        self.batches = Batches(self.train_set, config.batch, config.seed)
        torch.manual_seed(config.seed)
        self.model = Transformer(replace(model_config, vocab_size=self.tokenizer.vocab_size)).to(self.device)
        self.model.attend_by(config.attention, self.dtype)
        self.optimizer = Optimizer(self.model, config)
        self.step, self.tokens, self.seconds, self.recent = 0, 0, 0.0, []
        self.work = 0  # floating-point operations of this process since it began, attention to masked keys not counted
        self.interrupted = self.stopping = False
        self.start()
        if config.compile:
            self.model.compile(dynamic=True)
        self.loss = JointLoss(self.model, self.tokenizer.pad + 1)
        self.parallel = nn.parallel.DistributedDataParallel(self.loss) if self.world > 1 else self.loss

    def start(self):
        """Go on with the run in `out`, or take the weights of `init`."""
        path = self.out / "checkpoint.safetensors"
        if path.exists():
            model, tokenizer, info, state = load_checkpoint(path, self.device)
            old, new = ({**made.get("train", {}), **made.get("method", {})} for made in (info, self.settings()))
            del new["out"]  # the folder may have moved
            other = [f"{name} ({old.get(name)}, not {new[name]})" for name in new if old.get(name) != new[name]]
            if model.config != self.model.config or tokenizer.tokens != self.tokenizer.tokens:
                other.append("model or tokenizer")
            if other:
                raise ValueError(f"{path} is of a run with other {', '.join(other)}: take those or another --out")
            self.model.load_state_dict(model.state_dict())
            self.optimizer.load(state)
            self.step, self.tokens, self.seconds, recent = (info[name] for name in self.PLACE)
            self.recent = [*torch.tensor(recent, dtype=torch.double, device=self.device)]
            self.say(f"going on with {path} after {self.step} updates")
        elif self.config.init:
            model, tokenizer, _, _ = load_checkpoint(locate(self.config.init), self.device)
            if tokenizer.tokens != self.tokenizer.tokens or model.config != self.model.config:
                raise ValueError(f"{self.config.init} has another model shape or tokenizer than this run")
            self.model.load_state_dict(model.state_dict())

    def settings(self):
        """What a checkpoint says of how it was made."""
        return {"train": asdict(self.config), "method": asdict(self.method)}

    def save(self):
        """Write all that the run needs to go on; a finished one also model.safetensors, its float16 weights alone."""
        if self.rank == 0:
            place = {name: getattr(self, name) for name in self.PLACE}
            info = self.settings() | place | {"recent": [losses.tolist() for losses in self.recent]}
            model, state = (self.model, self.tokenizer, info), self.optimizer.state()
            save_checkpoint(self.out / "checkpoint.safetensors", *model, state)
            if self.step == self.config.steps:
                save_checkpoint(self.out / "model.safetensors", *model, dtype=torch.float16)

    def say(self, text):
        if self.rank == 0:
            print(text, flush=True)

    def update(self):
        """One update. Returns (3,): plan and span loss of the global batch, in nats a token, its share of padding."""
        c, made = self.config, []
        for i in range(self.rank, c.accumulate, self.world):
            sequences, rounds = self.batches[self.step * c.accumulate + i]
            rng = np.random.default_rng([c.seed, self.step, i])
            made.append(make_batch(sequences, rounds, self.tokenizer, rng, c.weight, c.t_min, c.history))
        self.interrupted |= signal.SIGINT in signal.sigpending()
        sizes = [sum(b.n_tokens for b in made), sum(b.token.numel() for b in made), self.interrupted]
        total = torch.cat([sum(counts(b, c.weight) for b in made), torch.tensor(sizes).double()])
        total = self.sum_over_processes(total)
        weights = torch.tensor([1.0, c.span_weight]) / total[:2].clamp(min=1)
        losses = torch.zeros(2, dtype=torch.double, device=self.device)
        for i, batch in enumerate(made):
            self.parallel.require_backward_grad_sync = i == len(made) - 1  # exchange gradients once an update
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.dtype == torch.bfloat16):
                sums = torch.stack(self.parallel(batch.to(self.device)))
            # DDP takes the mean over processes, but total already counts them all
            (self.world * (sums[0] * float(weights[0]) + sums[1] * float(weights[1]))).backward()
            losses += sums.detach()
            self.work += 3 * batch.n_tokens * self.model.flops_per_token(batch.n_keys / batch.n_tokens)
        losses = self.sum_over_processes(losses / total[:2].clamp(min=1).to(self.device))
        nn.utils.clip_grad_norm_(self.model.parameters(), c.clip)
        self.optimizer.step(self.step)
        self.model.zero_grad()
        self.step, self.tokens = self.step + 1, self.tokens + int(total[2])
        self.stopping = bool(total[4])  # all processes stop after the same update
        return torch.cat([losses, (1 - total[2:3] / total[3]).to(self.device)])

    def sum_over_processes(self, tensor):
        if self.world == 1:
            return tensor
        summed = tensor.to(self.device)
        dist.all_reduce(summed)
        return summed.to(tensor.device)

    def run(self):
        """Train to the end, or until Ctrl-C, which ends the run between two updates and saves."""
        c, log = self.config, Log(self.out / "log.csv", self.step) if self.rank == 0 else None
        size = f"{self.model.n_params() / 1e6:.2f}M parameters, {len(self.train_set)} examples"
        self.say(f"{size}, on {self.world} x {self.device}")
        self.started = time.perf_counter() - self.seconds
        self.base = self.seconds, self.tokens, self.step
        with self.ctrl_c_waits():
            while self.step < c.steps and not self.stopping:
                self.recent.append(self.update())
                self.seconds = time.perf_counter() - self.started
                done = self.step == c.steps
                validating = self.step % c.validate_every == 0 or done
                if self.step % c.log_every == 0 or done:
                    row = self.report()
                    if validating:
                        row["val_plan"], row["val_span"] = self.validate()
                    if log:
                        log.write(row)
                    self.recent = []
                if validating or self.stopping:
                    self.save()
            if self.stopping and not done:
                self.say(f"stopped after {self.step} updates; the same command goes on from here")
        if self.world > 1:
            dist.destroy_process_group()

    @contextmanager
    def ctrl_c_waits(self):
        """Ctrl-C is held back till an update looks for it. What the run starts inherits that: a compiler that is
        stopped would leave half a file, on which later runs fail."""
        before = signal.signal(signal.SIGINT, lambda *_: setattr(self, "interrupted", True))
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            yield
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
            signal.signal(signal.SIGINT, before)

    def report(self):
        """Say how the run goes. Returns its row of the log: means since the last one."""
        plan, span, padding = torch.stack(self.recent).mean(0).tolist()
        self.seconds = time.perf_counter() - self.started  # now that the device has done all of it
        seconds, tokens, step = self.base
        passed = self.seconds - seconds
        left = passed / (self.step - step) * (self.config.steps - self.step)
        self.say(f"step {self.step:6}/{self.config.steps}  plan {plan:.4f}  span {span:.4f}  {padding:4.1%} padding  "
                 f"{(self.tokens - tokens) / passed:6.0f} tokens/s{utilization(self.work / passed, self.device)}  "
                 f"{left / 60:.1f} min left")  # fmt: skip
        return {"step": self.step, "tokens": self.tokens, "seconds": round(self.seconds, 1), "plan": plan, "span": span}

    def validate(self):
        examples = self.val_set[: self.config.validate_on]
        plan, span, _ = validate(self.loss, examples, self.tokenizer, self.device)
        self.say(f"validation: plan {plan:.4f}, span ELBO {span:.4f} nats a token")
        return plan, span


PEAKS = {"H100": 989e12, "H200": 989e12, "A100": 312e12}  # FLOP/s in bfloat16, dense, of the data sheets


def utilization(flops, device):
    """FLOP/s for a reader, and as a share of what the device could do (MFU) where that is known."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    peak = next((peak for part, peak in PEAKS.items() if part in name), None)
    return f"  {flops / 1e12:.3g} TFLOP/s" + (f" ({flops / peak:.1%} MFU)" if peak else "")


class Log:
    """log.csv: a row of losses every so many updates; rows that a resumed run writes again are dropped first."""

    COLUMNS = ("step", "tokens", "seconds", "plan", "span", "val_plan", "val_span")

    def __init__(self, path, step):
        rows = path.read_text().splitlines()[1:] if path.exists() else []
        rows = [row for row in rows if int(row.split(",")[0]) <= step]
        write_whole(path, "\n".join([",".join(self.COLUMNS), *rows]) + "\n")
        self.file = path.open("a")

    def write(self, row):
        cells = (row.get(name, "") for name in self.COLUMNS)
        self.file.write(",".join(f"{cell:.5f}" if isinstance(cell, float) else str(cell) for cell in cells) + "\n")
        self.file.flush()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_settings(parser, TrainConfig, MethodConfig, ModelConfig)
    args = parser.parse_args()
    try:
        Trainer(*(pick(config, args) for config in (TrainConfig, ModelConfig, MethodConfig))).run()
    except ValueError as error:
        sys.exit(f"train.py: {error}")


if __name__ == "__main__":
    main()
