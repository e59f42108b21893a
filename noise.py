"""Training examples: what is predicted, which slots are noised, and how they are weighed."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields
from enum import IntEnum
from functools import cached_property

import numpy as np
import torch

from masks import LINKED, PLAN, PROMPT, SLOT, Layout
from tokenizer import Tokenizer

IGNORE = -100  # target of tokens that predict nothing


class Term(IntEnum):
    """The terms of the loss: what a target belongs to."""

    PLAN = 0  # plan and text
    SPAN = 1  # slots of noised spans
    CAUSAL = 2  # spans read left to right
    PLAN_DRAFT = 3  # drafts (drafting/training.py)
    SPAN_DRAFT = 4


TERMS = tuple(term.name.lower() for term in Term)


class Sequence:
    """A layout as arrays, with the autoregressive target of every token that has one.

    At plan and text tokens and at the prompt's last token the target is the next token of the plan
    or text: the spans in between are skipped, so the last `</topic>` predicts `<sync/>` or `<eos>`.
    """

    def __init__(self, layout: Layout):
        array = lambda column: np.array(column, dtype=np.int64)
        self.token, self.kind, self.round = array(layout.token), array(layout.kind), array(layout.round)
        self.position = array(layout.position)
        self.ranges = np.stack([array(layout.prefix), array(layout.begin), array(layout.end)], axis=1)
        self.span = np.full(len(self.token), -1)  # number of the span in the sequence, -1 outside spans
        inside = array(layout.span) >= 0
        pairs = np.stack([self.round, array(layout.span)])[:, inside]  # (round, number in it)
        self.span[inside] = np.unique(pairs, axis=1, return_inverse=True)[1].ravel()
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
    term: torch.Tensor  # (B, T) int64, the Term of a target; SPAN for all slots noised, masked or not
    weight: torch.Tensor  # (B, T) float32, weight of a slot's loss: 1/t or 1
    n_tokens: int  # tokens that are not padding

    @cached_property
    def places(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Where in (B * T) something is predicted: (among the whole vocabulary, among text and [PAD])."""
        predicted, term = (self.target != IGNORE).flatten(), self.term.flatten()
        any_token = (term == Term.PLAN) | (term == Term.PLAN_DRAFT)
        return (predicted & any_token).nonzero()[:, 0], (predicted & ~any_token).nonzero()[:, 0]

    def map(self, function: Callable) -> Batch:
        """The batch with a function applied to each array."""
        columns = {field.name: getattr(self, field.name) for field in fields(self)}
        return Batch(**{name: value if name == "n_tokens" else function(value) for name, value in columns.items()})

    def to(self, device: torch.device | str) -> Batch:
        pinned = lambda tensor: tensor.pin_memory() if str(device).startswith("cuda") else tensor
        move = lambda tensor: pinned(tensor).to(device, non_blocking=True)
        moved = self.map(move)
        moved.places = tuple(map(move, self.places))  # found here: on a GPU the host would have to wait for it
        return moved


def make_batch(sequences: Iterable[Sequence], rounds: Iterable[int], tokenizer: Tokenizer, rng: np.random.Generator,
               weight: str = "elbo", t_min: float = 0.0, history: str = "clean", causal: float = 0.0,
               arrange: Arrange | None = None) -> Batch:  # fmt: skip
    """Noise one round of each sequence: what is before it is clean, as in sampling, and what follows is cut off.
    `history` "noised" noises the rounds before it too, as the authors' code does.

    Each span (each round, if dense) draws t ~ U(0, 1], stratified over the batch; each of its slots becomes [MASK]
    with probability t and then predicts its original token. `weight`: "elbo" weighs a slot by 1/t, which makes the
    sum the negative ELBO of masked diffusion (MDLM, arXiv 2406.07524, eq. 10); "uniform" by 1. With `t_min` above 0,
    t ~ U(t_min, 1].

    Not noised but causal is each span with probability `causal`. `arrange`: what is trained beside that.
    """
    arrange = arrange or Arrange()
    rows = [arrange(s, r, tokenizer, rng, history, causal) for s, r in zip(sequences, rounds)]
    batch, group = pad(rows, tokenizer)
    slots = batch.term == Term.SPAN
    _, draw = np.unique(group[slots], return_inverse=True)
    rate, elbo_weight = (level[draw] for level in noise_levels(draw.max(initial=-1) + 1, t_min, rng))
    masked = rng.random(len(rate)) < rate
    batch.target[slots] = np.where(masked, batch.token[slots], IGNORE)
    batch.token[slots] = np.where(masked, tokenizer.mask, batch.token[slots])
    batch.weight[slots] = elbo_weight if weight == "elbo" else 1
    return batch.map(torch.from_numpy)


def noise_levels(n: int, t_min: float, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """The noise schedule, drawn n times: (masking probabilities, weights of the ELBO), (n,) each.

    The probability is t itself, so the weight is 1/t; of another function a(t) it would be a'(t) / a(t).
    """
    t = (rng.permutation(n) + 1 - rng.random(n)) / max(n, 1)  # one draw in each of n equal parts of (0, 1]
    t = t_min + (1 - t_min) * t
    return t, 1 / t


# ---------------------------------------------------------------- a row of a batch


@dataclass
class Piece:
    """Some tokens of a training sequence, a column per fact."""

    token: np.ndarray  # (n,)
    position: np.ndarray  # (n,), for RoPE
    ranges: np.ndarray  # (n, 3): prefix, begin, end (masks.py)
    target: np.ndarray  # (n,), IGNORE where nothing is predicted
    term: np.ndarray  # (n,), the Term of a target
    group: np.ndarray  # (n,), slots of one number share their noise level; -1: none

    def __len__(self) -> int:
        return len(self.token)

    def keep(self, kept: np.ndarray) -> Piece:
        """The tokens where `kept` (n,) is True; the others must be seen by none of them. The ranges move along."""
        entry = np.concatenate([[0], np.cumsum(kept)])
        columns = {f.name: getattr(self, f.name)[kept] for f in fields(self)}
        return Piece(**columns | {"ranges": entry[columns["ranges"]]})


class Arrange:
    """What trains a round of a sequence: all up to the round's end but its causal spans, then those."""

    def __call__(self, s: Sequence, round_: int, tokenizer: Tokenizer, rng: np.random.Generator, history: str,
                 causal: float) -> Piece:  # fmt: skip
        stop = s.stop(round_)
        noised = (s.round[:stop] == round_) | ((history == "noised") & (s.attention != "causal"))
        whole = Piece(s.token[:stop], s.position[:stop], s.ranges[:stop], s.next[:stop],
                      term=np.where((s.kind[:stop] == SLOT) & noised, Term.SPAN, Term.PLAN),
                      group=(s.round if s.attention in LINKED else s.span)[:stop])  # fmt: skip
        spans = np.unique(s.span[(s.span >= 0) & (s.round == round_)])
        if s.attention != "causal":
            spans = spans[rng.random(len(spans)) < causal] if causal else spans[:0]
        pieces = [whole.keep(~np.isin(s.span[:stop], spans))]
        for number in spans:
            pieces.append(self.causal_span(s, number, sum(map(len, pieces)), tokenizer, rng))
        pieces += self.beside(s, stop, sum(map(len, pieces)), tokenizer, rng)
        columns = {f.name: [getattr(piece, f.name) for piece in pieces] for f in fields(Piece)}
        return Piece(**{name: np.concatenate(parts) for name, parts in columns.items()})

    def causal_span(self, s: Sequence, number: int, entry: int, tokenizer: Tokenizer,
                    rng: np.random.Generator) -> Piece:  # fmt: skip
        """A span read left to right, from entry `entry` on. `number`: of the span in `s.span`."""
        prefix, position, head, text = as_text(s, number, tokenizer)
        target = np.concatenate([np.full(len(head) - 1, IGNORE), text])
        term = np.full(len(target), Term.CAUSAL)
        return grow(entry, prefix, position, np.concatenate([head, text])[:-1], target, term)

    def beside(self, s: Sequence, stop: int, entry: int, tokenizer: Tokenizer,
               rng: np.random.Generator) -> Iterable[Piece]:  # fmt: skip
        """More pieces, from entry `entry` on."""
        return ()


def as_text(s: Sequence, number: int, tokenizer: Tokenizer) -> tuple[int, int, np.ndarray, np.ndarray]:
    """A span as it is read left to right: its prefix, the position of its first token, its tokens before the slots,
    and its text. The text's end is the first [PAD]; where it fills the span, its last token."""
    entries = np.flatnonzero(s.span == number)
    slots = entries[s.kind[entries] == SLOT]
    text = s.token[slots]
    text = text[: int((text != tokenizer.pad).sum()) + 1]
    return s.ranges[entries[0], 0], s.position[entries[0]], s.token[entries[0] : slots[0]], text


def grow(entry: int, prefix: int, position: int, token: np.ndarray, target: np.ndarray, term: np.ndarray) -> Piece:
    """A piece from `entry` on that grows left to right: each token sees [0, prefix) and the piece up to itself.

    `position` is that of the first.
    """
    n = len(token)
    step = np.arange(n)
    ranges = np.stack([np.full(n, prefix), np.full(n, entry), entry + step + 1], axis=1)
    return Piece(token, position + step, ranges, target, term, np.full(n, -1))


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
    group = columns.pop("group")
    group += (group.max() + 1) * np.arange(len(rows))[:, None]
    return Batch(**columns, weight=np.ones(shape, np.float32), n_tokens=sum(map(len, rows))), group
