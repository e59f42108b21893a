"""Which examples train when: a data set's splits as sequences, and the micro-batches of each update."""

import time
from collections.abc import Callable, Iterator

import numpy as np

from config import MethodConfig, TrainConfig
from methods import encode, fitted
from noise import Arrange, Batch, Sequence, make_batch
from tags import Example
from tokenizer import Tokenizer


class TrainingData:
    """The train and validation splits of a data set, and the noised micro-batches of each update."""

    def __init__(self, config: TrainConfig, method: MethodConfig, tokenizer: Tokenizer, train: list[Example],
                 validation: list[Example], arrange: Arrange, say: Callable[[str], None] = print):  # fmt: skip
        """Encode everything, so that a bad example is found before the training starts.

        `say` is told how far that is. Raises ValueError that names the example or setting that is wrong.
        """
        self.config, self.tokenizer, train = config, tokenizer, train[: config.train_on or None]
        self.method = fitted(method, train, tokenizer)
        self.arrange = arrange  # what a row of a batch trains
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
            batches.append(make_batch(sequences, rounds, self.tokenizer, rng, *noise, self.method.causal, self.arrange))
        return batches


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
