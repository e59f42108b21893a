"""Training to draft ahead: streams, and the slots that are drafted after them.

A stream is text that grows left to right: the plan and text of an answer, or one causal span. The token at a place
of a stream predicts the one at the next place. A draft slot is a [MASK] right after the known tokens of a stream. It
has the position of the token in its place, sees what that token would see (the known tokens and the draft slots
before it), and predicts the token after it. So a model that drafts K tokens ahead gets K more tokens out of a pass,
which its next pass can check (Stern et al. 2018, arXiv 1811.03115; shifted, verify and draft in one pass: I-DLM, arXiv
2604.11035).

A training sequence holds its draft slots after all else, in groups: nothing but the rest of its group sees one.
"""

from collections.abc import Iterator

import numpy as np

from noise import IGNORE, Arrange, Piece, Sequence, Term, as_text, grow
from tokenizer import Tokenizer

WHOLE = 0.3  # share of causal spans that train all their text; the others are cut, and drafted from there
TARGETS_PER_GROUP, FEWEST_GROUPS = 16, 3  # plan and text: one group of draft slots for so many targets


class ArrangeDrafts(Arrange):
    """What trains a round, and with it drafts of `ahead` tokens."""

    def __init__(self, ahead: int):
        self.ahead = ahead

    def causal_span(self, s: Sequence, number: int, entry: int, tokenizer: Tokenizer,
                    rng: np.random.Generator) -> Piece:  # fmt: skip
        """A span as a stream from `entry` on, cut at a random place of its text and drafted from there.

        Its last target is the end of the text. Of a share of WHOLE of the spans all text is known.
        """
        prefix, position, head, text = as_text(s, number, tokenizer)
        known = len(text)  # how many of its tokens are predicted by known tokens
        if rng.random() >= WHOLE and known > 1:
            known = int(rng.integers(1, known))
        target = np.concatenate([np.full(len(head) - 1, IGNORE), text[: known + self.ahead]])
        token = np.concatenate([head, text])[: len(head) - 1 + known]
        term = np.where(np.arange(len(target)) < len(token), Term.CAUSAL, Term.SPAN_DRAFT)
        token = np.concatenate([token, np.full(len(target) - len(token), tokenizer.mask)])
        return grow(entry, prefix, position, token, target, term)

    def beside(self, s: Sequence, stop: int, entry: int, tokenizer: Tokenizer,
               rng: np.random.Generator) -> Iterator[Piece]:  # fmt: skip
        """Groups of draft slots after random places of the plan and text before `stop`, from `entry` on.

        What follows in the stream skips the spans, as `Sequence.next` does.
        """
        places = np.flatnonzero(s.next[:stop] != IGNORE)
        stream = s.next[places]  # the token after each place
        groups = max(FEWEST_GROUPS, len(places) // TARGETS_PER_GROUP)
        for n in rng.permutation(len(places) - 1)[:groups]:  # the token after the last place is all it could draft
            known, target = places[n], stream[n + 1 : n + 1 + self.ahead]
            token, term = np.full(len(target), tokenizer.mask), np.full(len(target), Term.PLAN_DRAFT)
            yield grow(entry, known + 1, s.position[known] + 1, token, target, term)
            entry += len(target)
