"""Training examples: what is predicted, which slots are noised, and how they are weighed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import cached_property

import numpy as np
import torch

from drafts import IGNORE, Piece, Term, after_text, causal_span, join
from masks import PLAN, PROMPT, SLOT, Layout
from tokenizer import Tokenizer


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
        self.ranges = np.stack([array(layout.prefix), array(layout.begin), array(layout.end)], axis=1)
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
    ranges: torch.Tensor  # (B, T, 3) int64: prefix, begin, end (masks.py)
    target: torch.Tensor  # (B, T) int64, IGNORE where nothing is predicted
    term: torch.Tensor  # (B, T) int64, the drafts.Term of a target; SPAN for all slots noised, masked or not
    weight: torch.Tensor  # (B, T) float32, weight of a slot's loss: 1/t or 1
    n_tokens: int  # tokens that are not padding

    @property
    def in_span(self) -> torch.Tensor:
        """(B, T) bool: slots of the noised round, masked or not, and the tokens that predict those of causal spans."""
        return (self.term == Term.SPAN) | (self.term == Term.CAUSAL) & (self.target != IGNORE)

    @cached_property
    def places(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Where in (B * T) something is predicted: (among the whole vocabulary, among text and [PAD])."""
        predicted, term = (self.target != IGNORE).flatten(), self.term.flatten()
        any_token = (term == Term.PLAN) | (term == Term.PLAN_DRAFT)
        return (predicted & any_token).nonzero()[:, 0], (predicted & ~any_token).nonzero()[:, 0]

    @property
    def n_keys(self) -> int:
        """How many keys all tokens see together."""
        return int((self.ranges[..., 0] + self.ranges[..., 2] - self.ranges[..., 1]).sum())

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
               weight: str = "elbo", t_min: float = 0.0, history: str = "clean", causal: float = 0.0,
               ahead: int = 0) -> Batch:  # fmt: skip
    """Noise one round of each sequence: what is before it is clean, as in sampling, and what follows is cut off.

    `history` "noised" noises the rounds before it too, as the authors' code does.

    Each span (each round, if dense) draws t ~ U(0, 1], stratified over the batch; each of its slots becomes [MASK]
    with probability t and then predicts its original token. `weight`: "elbo" weighs a slot by 1/t, which makes the
    sum the negative ELBO of masked diffusion (MDLM, arXiv 2406.07524, eq. 10); "uniform" by 1. With `t_min` above 0,
    t ~ U(t_min, 1].

    Not noised but causal is each span with probability `causal`; and with `ahead` above 0, so many tokens are drafted
    after random places (drafts.py).
    """
    rows = [arrange(s, r, tokenizer, rng, history, causal, ahead) for s, r in zip(sequences, rounds)]
    batch, group = pad(rows, tokenizer)
    slots = batch.term == Term.SPAN
    _, draw = np.unique(group[slots], return_inverse=True)
    n = draw.max(initial=-1) + 1
    t = (rng.permutation(n) + 1 - rng.random(n)) / max(n, 1)  # one draw in each of n equal parts of (0, 1]
    t = (t_min + (1 - t_min) * t)[draw]
    masked = rng.random(len(t)) < t
    batch.target[slots] = np.where(masked, batch.token[slots], IGNORE)
    batch.token[slots] = np.where(masked, tokenizer.mask, batch.token[slots])
    batch.weight[slots] = 1 / t if weight == "elbo" else 1
    return batch.map(torch.from_numpy)


def arrange(s: Sequence, round_: int, tokenizer: Tokenizer, rng: np.random.Generator, history: str, causal: float,
            ahead: int) -> Piece:  # fmt: skip
    """What trains a round of a sequence: all up to the round's end, but its causal spans, then those, then drafts."""
    stop = s.stop(round_)
    noised = (s.round[:stop] == round_) | ((history == "noised") & (s.attention != "causal"))
    whole = Piece(s.token[:stop], s.position[:stop], s.ranges[:stop], s.next[:stop],
                  term=np.where((s.kind[:stop] == SLOT) & noised, Term.SPAN, Term.PLAN),
                  group=(s.round * 1000 if s.attention == "dense" else s.span)[:stop])  # fmt: skip
    spans = np.unique(s.span[(s.span >= 0) & (s.round == round_)])
    if s.attention != "causal":
        spans = spans[rng.random(len(spans)) < causal] if causal else spans[:0]
    pieces = [whole.keep(~np.isin(s.span[:stop], spans))]
    for number in spans:
        pieces.append(causal_span(s, number, sum(map(len, pieces)), ahead, tokenizer, rng))
    if ahead:
        pieces += after_text(s, stop, sum(map(len, pieces)), ahead, tokenizer, rng)
    return join(pieces)


def pad(rows: list[Piece], tokenizer: Tokenizer) -> tuple[Batch, np.ndarray]:
    """A batch of arrays that holds the rows, and the group (B, T) of each slot: no two rows have one in common."""
    shape = (len(rows), max(map(len, rows)))
    ranges = np.tile([1, 0, 0], (*shape, 1))  # padding sees the first token: a query that sees nothing is NaN
    columns = {"token": np.full(shape, tokenizer.pad), "position": np.zeros(shape, np.int64), "ranges": ranges,
               "target": np.full(shape, IGNORE), "term": np.full(shape, Term.PLAN),
               "group": np.full(shape, -1)}  # fmt: skip
    for b, row in enumerate(rows):
        for name, column in columns.items():
            column[b, : len(row)] = getattr(row, name)
    group = columns.pop("group") + 1_000_000 * np.arange(len(rows))[:, None]
    return Batch(**columns, weight=np.ones(shape, np.float32), n_tokens=sum(map(len, rows))), group
