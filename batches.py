"""Which examples train when: a data set's splits as sequences, and the micro-batches of each update."""

import hashlib
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import numpy as np

from data import Example, read_split
from methods import MethodConfig, encode
from noise import Batch, Sequence, make_batch
from plumbing.settings import locate, refuse_idle
from pretrained.llama import look
from tokenizer import Tokenizer

if TYPE_CHECKING:
    from train import TrainConfig


class TrainingData:
    """The train and validation splits of a data set, and the noised micro-batches of each update."""

    def __init__(self, config: "TrainConfig", method_config: MethodConfig, say: Callable[[str], None] = print):
        """Read and encode everything, so that a bad example is found before the training starts.

        `say` is told how far that is. Raises ValueError that names the file, example or setting that is wrong.
        """
        expect_effect(config, method_config)
        folder, self.config = locate(config.data), config
        say(f"reading {folder}")
        self.tokenizer, init = Tokenizer.load(folder / "tokenizer.json"), locate(config.init or ".")
        self.pretrained = look(init, self.tokenizer.unit) if config.init and init.is_dir() else None
        if self.pretrained:
            self.tokenizer = self.pretrained.tokenizer
        train, validation = (read_split(folder / f"{split}.jsonl", self.tokenizer) for split in ("train", "val"))
        if not train or not validation:
            raise ValueError(f"{folder} has {len(train)} training and {len(validation)} validation examples: "
                             "expected some of each")  # fmt: skip
        self.digest = hashlib.sha256((folder / "train.jsonl").read_bytes()).hexdigest()
        train = train[: config.train_on or None]
        self.method = method_config.fitted(train, self.tokenizer)
        self.train = list(self._encoded(train, say, config.extra_pads))
        self.validation = list(self._encoded(validation[: config.validate_on], say))
        self.batches = Batches(self.train, config.batch, config.seed, config.even_rounds)

    def _encoded(self, examples: list[Example], say: Callable[[str], None], extra_pads: int = 0) -> Iterator[Sequence]:
        """The examples as sequences. `extra_pads`: a span has 0 to this many [PAD] after its text, drawn by seed."""
        rng, told = np.random.default_rng(self.config.seed), time.monotonic()
        draw_pads = (lambda: int(rng.integers(extra_pads + 1))) if extra_pads else None
        for n, example in enumerate(examples):
            yield Sequence(encode(example, self.tokenizer, self.method, draw_pads))
            if time.monotonic() - told > 2:
                told = time.monotonic()
                say(f"encoded {n + 1:,} of {len(examples):,} examples")

    def micro_batches(self, step: int, rank: int = 0, world: int = 1) -> list[Batch]:
        """What process `rank` of `world` computes of update number `step`: a function of seed and step alone."""
        c, batches = self.config, []
        for i in range(rank, c.accumulate, world):
            sequences, rounds = self.batches[step * c.accumulate + i]
            rng = np.random.default_rng([c.seed, step, i])
            noise = c.weight, c.t_min, c.history
            batches.append(make_batch(sequences, rounds, self.tokenizer, rng, *noise, self.method.causal, c.ahead))
        return batches


def expect_effect(config: "TrainConfig", method: MethodConfig) -> None:
    """Raise ValueError for a setting that would change nothing in training by this method."""
    planned, noised = method.plan == "written", method.plan != "none" and method.causal < 1
    acts = {"writes no plan": (planned, "extra_pads", "topics", "repeat_topic", "rounds", "span_weight"),
            "denoises no spans": (noised, "weight", "t_min"),
            "has no earlier rounds that are noised": (planned and noised, "history"),
            "has no blocks": (method.plan == "given", "block"),
            "writes nothing left to right": (method.plan != "given", "ahead"),
            "has one round": (planned, "even_rounds")}  # fmt: skip
    acts = {f"--method {method.method} {reason}": value for reason, value in acts.items()}
    acts |= {"nothing is drafted without --ahead": (config.ahead, "draft_weight"),
             "with --rounds one an answer has no other rounds": (method.rounds == "many", "history", "even_rounds"),
             "there are no adapters without --lora": (config.lora, "lora_alpha"),
             "adapters are trained by AdamW alone, without decay": (not config.lora, "lr", "weight_decay")}  # fmt: skip
    refuse_idle((method, config), acts)


class Batches:
    """Which examples, and which round of each, make a micro-batch: a function of seed and number.

    Each epoch is a new order. Windows of 16 micro-batches are sorted by length, so that little of
    a batch is padding. A round is picked in proportion to how many tokens it predicts; with `even_rounds` each that
    predicts any is as likely.
    """

    def __init__(self, sequences: list[Sequence], size: int, seed: int, even_rounds: bool = False):
        if len(sequences) < size:
            raise ValueError(f"--batch {size}: there are only {len(sequences)} training examples")
        self.sequences, self.size, self.seed, self.epoch = sequences, size, seed, -1
        self.per_epoch = len(sequences) // size
        most = 1 if even_rounds else None
        self.shares = [np.cumsum(np.clip([s.targets_in(r) for r in range(s.n_rounds)], 0, most)) for s in sequences]

    def __getitem__(self, number: int) -> tuple[list[Sequence], list[int]]:
        """Sequences and their rounds of micro-batch `number`, counted over all epochs."""
        epoch, number = divmod(number, self.per_epoch)
        if epoch != self.epoch:
            self._shuffle(epoch)
        picked = self.order[number]
        return [self.sequences[i] for i in picked], [self.rounds[i] for i in picked]

    def _shuffle(self, epoch: int) -> None:
        rng, self.epoch = np.random.default_rng([self.seed, epoch]), epoch
        self.rounds = [int(np.searchsorted(upto, rng.random() * upto[-1], "right")) for upto in self.shares]
        order = rng.permutation(len(self.sequences))[: self.per_epoch * self.size]
        windows = np.array_split(order, range(16 * self.size, len(order), 16 * self.size))
        length = np.array([s.stop(r) for s, r in zip(self.sequences, self.rounds)])
        order = np.concatenate([window[np.argsort(length[window], kind="stable")] for window in windows])
        self.order = rng.permutation(order.reshape(-1, self.size))
