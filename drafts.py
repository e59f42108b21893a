"""Training to draft ahead: the terms of the loss, streams, and the slots that are drafted after them.

A stream is text that grows left to right: the plan and text of an answer, or one causal span. The token at a place
of a stream predicts the one at the next place. A draft slot is a [MASK] right after the known tokens of a stream. It
has the position of the token in its place, sees what that token would see (the known tokens and the draft slots
before it), and predicts the token after it. So a model that drafts K tokens ahead gets K more tokens out of a pass,
which its next pass can check (Stern et al. 2018, arXiv 1811.03115; shifted, verify and draft in one pass: I-DLM, arXiv
2604.11035).

A training sequence holds its draft slots after all else, in groups: nothing but the rest of its group sees one.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields
from enum import IntEnum
from typing import TYPE_CHECKING

import numpy as np

from masks import SLOT
from tokenizer import Tokenizer

if TYPE_CHECKING:
    from noise import Sequence

IGNORE = -100  # target of tokens that predict nothing
WHOLE = 0.3  # share of causal spans that train all their text; the others are cut, and drafted from there
TARGETS_PER_GROUP, FEWEST_GROUPS = 16, 3  # plan and text: one group of draft slots for so many targets


class Term(IntEnum):
    """The terms of the loss: what a target belongs to."""

    PLAN = 0  # plan and text
    SPAN = 1  # slots of noised spans
    CAUSAL = 2  # spans read left to right
    PLAN_DRAFT = 3
    SPAN_DRAFT = 4


TERMS = tuple(term.name.lower() for term in Term)


@dataclass
class Piece:
    """Some tokens of a training sequence, a column per fact."""

    token: np.ndarray  # (n,)
    position: np.ndarray  # (n,), for RoPE
    ranges: np.ndarray  # (n, 3): prefix, begin, end (masks.py)
    target: np.ndarray  # (n,), IGNORE where nothing is predicted
    term: np.ndarray  # (n,), the Term of a target
    group: np.ndarray  # (n,), slots of one number share their noise level

    def __len__(self) -> int:
        return len(self.token)

    def keep(self, kept: np.ndarray) -> Piece:
        """The tokens where `kept` (n,) is True; the others must be seen by none of them. The ranges move along."""
        entry = np.concatenate([[0], np.cumsum(kept)])
        columns = {f.name: getattr(self, f.name)[kept] for f in fields(self)}
        return Piece(**columns | {"ranges": entry[columns["ranges"]]})


def join(pieces: list[Piece]) -> Piece:
    return Piece(**{f.name: np.concatenate([getattr(piece, f.name) for piece in pieces]) for f in fields(Piece)})


def grow(entry: int, prefix: int, position: int, known: np.ndarray, target: np.ndarray, term: np.ndarray,
         tokenizer: Tokenizer) -> Piece:  # fmt: skip
    """A piece from `entry` on that grows left to right: known tokens, then draft slots up to the last target.

    Each token sees [0, prefix) and the piece up to itself; `position` is that of the first.
    """
    n = len(target)
    step = np.arange(n)
    return Piece(
        token=np.concatenate([known, np.full(n - len(known), tokenizer.mask)]),
        position=position + step,
        ranges=np.stack([np.full(n, prefix), np.full(n, entry), entry + step + 1], axis=1),
        target=target,
        term=term,
        group=np.full(n, -1),
    )


def after_text(sequence: Sequence, stop: int, entry: int, ahead: int, tokenizer: Tokenizer,
               rng: np.random.Generator) -> Iterator[Piece]:  # fmt: skip
    """Groups of up to `ahead` draft slots after random places of the plan and text before `stop`, from `entry` on.

    What follows in the stream skips the spans, as `Sequence.next` does.
    """
    places = np.flatnonzero(sequence.next[:stop] != IGNORE)
    stream = sequence.next[places]  # the token after each place
    groups = max(FEWEST_GROUPS, len(places) // TARGETS_PER_GROUP)
    for n in rng.permutation(len(places) - 1)[:groups]:  # the token after the last place is all that it could draft
        known, target = places[n], stream[n + 1 : n + 1 + ahead]
        term = np.full(len(target), Term.PLAN_DRAFT)
        yield grow(entry, known + 1, sequence.position[known] + 1, target[:0], target, term, tokenizer)
        entry += len(target)


def causal_span(sequence: Sequence, number: int, entry: int, ahead: int, tokenizer: Tokenizer,
                rng: np.random.Generator, whole: float = WHOLE) -> Piece:  # fmt: skip
    """A span as a stream from `entry` on: its head and text, with `ahead` cut at a random place and drafted from there.

    Its last target is the first [PAD] or, where the text fills the span, the text's last token. Of a share of `whole`
    of the spans all text is known. `number`: of the span in `sequence.span`.
    """
    entries = np.flatnonzero(sequence.span == number)
    token, slots = sequence.token[entries], np.flatnonzero(sequence.kind[entries] == SLOT)
    text = token[slots]
    text = text[: int((text != tokenizer.pad).sum()) + 1]  # with the first [PAD]
    known = len(text)  # how many of its tokens are predicted by known tokens
    if ahead and rng.random() >= whole and known > 1:
        known = int(rng.integers(1, known))
    target = np.concatenate([np.full(slots[0] - 1, IGNORE), text[: known + ahead]])
    token = token[: slots[0] - 1 + known]
    term = np.where(np.arange(len(target)) < len(token), Term.CAUSAL, Term.SPAN_DRAFT)
    return grow(entry, sequence.ranges[entries[0], 0], sequence.position[entries[0]], token, target, term, tokenizer)
