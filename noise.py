"""Training examples: what is predicted, which slots are noised, and how they are weighed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import cached_property

import numpy as np
import torch

from masks import PLAN, PROMPT, SLOT, Layout
from tokenizer import Tokenizer

IGNORE = -100  # target of positions that predict nothing


class Sequence:
    """A layout as arrays, with the autoregressive target of every token that has one.

    At plan and text tokens and at the prompt's last token the target is the next token of the plan
    or text: the spans in between are skipped, so the last `</topic>` predicts `<sync/>` or `<eos>`.
    """

    def __init__(self, layout: Layout):
        def array(column):
            return np.array(column, dtype=np.int64)

        self.token, self.kind, self.round = array(layout.token), array(layout.kind), array(layout.round)
        self.position = array(layout.position)
        self.bounds = np.stack([array(layout.prefix), array(layout.begin), array(layout.end)], axis=1)
        self.span = np.where(array(layout.span) >= 0, self.round * 1000 + array(layout.span), -1)  # unique in sequence
        self.attention = layout.attention
        self.n_rounds = int(self.round[-1]) + 1
        written = np.flatnonzero(self.kind == PLAN)
        before = np.concatenate([np.flatnonzero(self.kind == PROMPT)[-1:], written[:-1]])[: len(written)]
        self.next = np.full(len(self.token), IGNORE)
        self.next[before] = self.token[written]

    def stop(self, round_: int) -> int:
        """Where a sequence that trains this round is cut off."""
        return int(np.flatnonzero(self.round == round_)[-1]) + 1

    def targets_in(self, round_: int) -> int:
        """How many tokens of a round are predicted."""
        predicted = (self.kind == SLOT) | (self.next != IGNORE)
        return int((predicted & (self.round == round_)).sum())


@dataclass
class Batch:
    """Tensors of a training batch; B sequences padded to T tokens."""

    token: torch.Tensor  # (B, T) int64, slots noised
    position: torch.Tensor  # (B, T) int64
    bounds: torch.Tensor  # (B, T, 3) int64: prefix, begin, end (masks.py)
    target: torch.Tensor  # (B, T) int64, IGNORE where nothing is predicted
    in_span: torch.Tensor  # (B, T) bool: slots of the noised round, masked or not
    weight: torch.Tensor  # (B, T) float32, weight of a slot's loss: 1/t or 1
    n_tokens: int  # tokens that are not padding

    @cached_property
    def places(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Where in (B * T) something is predicted: (plan or text, slots)."""
        predicted, in_span = (self.target != IGNORE).flatten(), self.in_span.flatten()
        return (predicted & ~in_span).nonzero()[:, 0], (predicted & in_span).nonzero()[:, 0]

    @property
    def n_keys(self) -> int:
        """How many keys all tokens see together."""
        return int((self.bounds[..., 0] + self.bounds[..., 2] - self.bounds[..., 1]).sum())

    def map(self, function: Callable) -> Batch:
        """The batch with a function applied to each array."""
        columns = {field.name: getattr(self, field.name) for field in fields(self)}
        return Batch(**{name: value if name == "n_tokens" else function(value) for name, value in columns.items()})

    def to(self, device: torch.device | str) -> Batch:
        def move(tensor):
            return (tensor.pin_memory() if str(device).startswith("cuda") else tensor).to(device, non_blocking=True)

        moved = self.map(move)
        moved.places = tuple(map(move, self.places))  # found here: on a GPU the host would have to wait for it
        return moved


def make_batch(sequences: list[Sequence], rounds: list[int], tokenizer: Tokenizer, rng: np.random.Generator,
               weight: str = "elbo", t_min: float = 0.0, history: str = "clean") -> Batch:  # fmt: skip
    """Noise one round of each sequence: what is before it is clean, as in sampling, and what follows is cut off.

    `history` "noised" noises the rounds before it too, as the authors' code does.

    Each span (each round, if dense) draws t ~ U(0, 1], stratified over the batch; each of its slots becomes [MASK]
    with probability t and then predicts its original token. `weight`: "elbo" weighs a slot by 1/t, which makes the
    sum the negative ELBO of masked diffusion (MDLM, arXiv 2406.07524, eq. 10); "uniform" by 1. With `t_min` above 0,
    t ~ U(t_min, 1].
    """
    stops = [s.stop(r) for s, r in zip(sequences, rounds)]
    shape = (len(sequences), max(stops))
    batch = Batch(
        token=np.full(shape, tokenizer.pad), position=np.zeros(shape, np.int64),
        bounds=np.tile([1, 0, 0], (*shape, 1)),  # padding sees the first token: a query that sees nothing is NaN
        target=np.full(shape, IGNORE), in_span=np.zeros(shape, bool), weight=np.ones(shape, np.float32),
        n_tokens=sum(stops),
    )  # fmt: skip
    group = np.full(shape, -1)  # slots of one number share a draw of t
    for b, (s, r, stop) in enumerate(zip(sequences, rounds, stops)):
        batch.token[b, :stop], batch.position[b, :stop] = s.token[:stop], s.position[:stop]
        batch.bounds[b, :stop], batch.target[b, :stop] = s.bounds[:stop], s.next[:stop]
        noised = s.round[:stop] == r if history == "clean" else s.round[:stop] <= r
        batch.in_span[b, :stop] = (s.kind[:stop] == SLOT) & noised
        group[b, :stop] = b * 1_000_000 + (s.round[:stop] * 1000 if s.attention == "dense" else s.span[:stop])
    if sequences[0].attention == "causal":
        return shifted(batch, tokenizer).map(torch.from_numpy)
    slots = batch.in_span
    _, draw = np.unique(group[slots], return_inverse=True)
    n = draw.max(initial=-1) + 1
    t = (rng.permutation(n) + 1 - rng.random(n)) / max(n, 1)  # one draw in each of n equal parts of (0, 1]
    t = (t_min + (1 - t_min) * t)[draw]
    masked = rng.random(len(t)) < t
    batch.target[slots] = np.where(masked, batch.token[slots], IGNORE)
    batch.token[slots] = np.where(masked, tokenizer.mask, batch.token[slots])
    batch.weight[slots] = 1 / t if weight == "elbo" else 1
    return batch.map(torch.from_numpy)


def shifted(batch: Batch, tokenizer: Tokenizer) -> Batch:
    """Causal spans are not noised: each slot, up to the first [PAD], is the target of the token before it."""
    over = (batch.token == tokenizer.pad) & (np.roll(batch.token, 1, axis=1) == tokenizer.pad)
    batch.in_span = np.roll(batch.in_span & ~over, -1, axis=1)
    batch.target = np.where(batch.in_span, np.roll(batch.token, -1, axis=1), batch.target)
    return batch
