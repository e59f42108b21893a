"""Drafting ahead: the phases of plan, text and causal spans that draft several tokens and check them in the next pass.

A pass over text that grows from left to right computes the known entries [cached, known), then the drafts of the last
pass, which it checks, then draft slots: each holds [MASK] and predicts one token further ahead. With nothing to draft
these phases are the plain ones (decode.py, methods.py).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

import torch
import torch.nn.functional as F
from torch import Tensor

from config import SampleConfig
from decode import Answer, Phase, Reading, Reply, WrittenPlan
from masks import PLAN
from methods import DECODERS, Extend, Stream
from unmask import Generators, draw, probabilities, uniform

DRAFT_CONFIDENCE = 0.05  # drafts are kept while the product of the model's confidences in them is at least this


@dataclass
class DraftReading(Reading):
    """What a pass reads to check a draft, or, of a draft slot, to make one. Kept are right and confident drafts."""

    draft: int = -1  # the token drafted to follow the entry; -1: none
    draft_probs: Tensor | None = None  # (V,) what it was drawn from, above temperature 0
    ahead: int = 0  # of the first, second, ... draft slot of a stream 1, 2, ...; 0: a draft is checked
    drawn_from: Tensor | None = None  # (V,) what the pass drew its token from, above temperature 0


# ---------------------------------------------------------------- the check


def draw_checked(logits: Tensor, readings: list[DraftReading], config: SampleConfig, generators: Generators,
                 pad: int) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The next token of each reading, (N,), and whether that is its accepted draft, or a draft to go on with."""
    draft, probs = torch.tensor([reading.draft for reading in readings], device=logits.device), None
    if config.temperature:
        # where a grammar left no choice the draft was certain, and was not drawn
        certain = F.one_hot(draft.clamp_min(0), logits.shape[-1]).where(draft[:, None] >= 0, 0).float()
        rows = zip(readings, certain)
        probs = torch.stack([q if reading.draft_probs is None else reading.draft_probs for reading, q in rows])
    token, kept, p = check_drafts(logits, draft, probs, config, generators)
    for reading, row in zip(readings, p if config.temperature else ()):
        reading.drawn_from = row
    ahead = torch.tensor([reading.ahead for reading in readings])
    if not ahead.any():
        return token, kept
    stream = (ahead <= 1).cumsum(0) - 1  # rows of a table with a column per draft slot
    confidence = torch.ones(int(stream[-1]) + 1, int(ahead.max()) + 1, device=logits.device)
    stream, ahead = stream.to(logits.device), ahead.to(logits.device)
    confidence[stream, ahead] = logits.softmax(-1).amax(-1).where(ahead > 0, 1)
    return token, torch.where(ahead > 0, confidence.cumprod(1)[stream, ahead] >= DRAFT_CONFIDENCE, kept)


def check_drafts(logits: Tensor, draft: Tensor, draft_probs: Tensor | None, config: SampleConfig,
                 generators: Generators) -> tuple[Tensor, Tensor, Tensor | None]:  # fmt: skip
    """The next token after each of N tokens, where a draft (N,) for it may exist (-1: none).

    A draft is accepted with probability min(1, p / q); a rejected one is replaced by a draw from max(0, p - q),
    normalised: tokens are distributed as if drawn from p (Leviathan et al. 2023, arXiv 2211.17192). `draft_probs`
    (N, V) is q, what the draft was drawn from, not normalised: 0 for tokens that would not have been checked.
    Returns tokens (N,), accepted (N,), and p (N, V) (None at temperature 0).
    """
    if not config.temperature:
        token = logits.argmax(-1)
        return token, token == draft, None
    p = probabilities(logits, config)
    q = draft_probs / draft_probs.sum(-1, keepdim=True).clamp_min(1e-30)
    at = draft.clamp_min(0)[:, None]
    accepted = (draft >= 0) & (uniform(generators, p.device) * q.gather(1, at)[:, 0] < p.gather(1, at)[:, 0])
    return torch.where(accepted, draft, draw(residual(p, q), generators)), accepted, p


def residual(p: Tensor, q: Tensor) -> Tensor:
    """(N, V) what replaces a rejected draft is drawn from, not normalised."""
    left = (p - q).clamp_min(0)
    return torch.where(left.sum(-1, keepdim=True) > 0, left, p)  # where p is q, nothing is rejected


# ---------------------------------------------------------------- streams


class DraftStream(Stream):
    """A stream with drafts. `ends`: the last draft ends the stream, so nothing follows it."""

    def __init__(self, cached: int, known: int):
        super().__init__(cached, known)
        self.drafts: list[int] = []
        self.probs: list[Tensor | None] = []  # what each was drawn from, above temperature 0
        self.counted: list[bool] = []  # whether each is a draft of the model's, rather than forced by the grammar
        self.ends, self.slots = False, 0  # slots: how many are drafted from in this pass

    def entries(self) -> range:
        """The layout entries of the next pass: known ones, drafts but for one that ends the stream, draft slots."""
        return range(self.cached, self.known + len(self.drafts) - self.ends + self.slots)

    def readings(self) -> list[DraftReading]:
        """The token after the last known one and after each draft, then what the draft slots predict."""
        checks = [*zip(self.drafts, self.probs)] + [()] * (not self.ends)
        first = self.known + len(self.drafts) - 1
        drafts = [DraftReading([first + n], ahead=n) for n in range(1, self.slots + 1)]
        return [DraftReading([self.known - 1 + n], 1, None, None, *check) for n, check in enumerate(checks)] + drafts

    def check(self, replies: Iterator[Reply], answer: Answer) -> list[int]:
        """The tokens that the pass has shown to be right: accepted drafts, then the model's own next token."""
        return self.checked(replies, answer)[0]

    def checked(self, replies: Iterator[Reply], answer: Answer) -> tuple[list[int], list[Reply]]:
        """These tokens, and the replies that they come from: one less where the last draft was the end.

        If all drafts were right, what the draft slots predict are the next drafts, as many as are confident enough
        together; otherwise they were made after a wrong token, and are dropped.
        """
        n_drafts = len(self.drafts)
        checks = [*islice(replies, n_drafts + (not self.ends))]
        made = [*islice(replies, self.slots)]
        accepted = next((n for n in range(n_drafts) if not checks[n].kept[0]), n_drafts)
        all_right = accepted == n_drafts
        own = [] if all_right and self.ends else checks[accepted].tokens
        tokens, self.cached = self.drafts[:accepted] + own, self.known + accepted - (all_right and self.ends)
        answer.drafted += sum(self.counted)
        answer.accepted += sum(self.counted[:accepted])
        self.drafts, self.probs = [], []
        for reply in made if all_right else []:
            if not reply.kept[0]:
                break
            self.drafts += reply.tokens
            self.probs.append(reply.reading.drawn_from)
        return tokens, checks[: accepted + 1]


# ---------------------------------------------------------------- phases


class DraftedPlan(WrittenPlan):
    """Stage 1: write plan or text, as many tokens per pass as the pass shows to be right."""

    draw = staticmethod(draw_checked)

    def __init__(self, answer: Answer):
        super().__init__(answer)
        self.stream, self.grammars = DraftStream(answer.cached, len(self.layout)), []

    def proposed(self) -> tuple[list[int], list[Tensor | None]]:
        """The next drafts, and what each was drawn from."""
        return self.stream.drafts, self.stream.probs

    def n_slots(self) -> int:
        """How many draft slots a pass has, where there is room."""
        return self.config.ahead

    def prepare(self) -> None:
        """Write drafts and draft slots behind what is known, until `take` has checked them."""
        stream, answer, sync = self.stream, self.answer, self.tokenizer.sync
        stream.cached, stream.known = answer.cached, len(self.layout)
        (proposed, stream.probs), stream.drafts, stream.counted = self.proposed(), [], []
        self.grammars = [answer.grammar]
        for n, token in enumerate(proposed):
            grammar = self.grammars[-1]
            forced = grammar.forced() if self.config.constrained else None
            token = token if forced is None else forced
            if not grammar.allowed()[token] or grammar.repeats(token):
                break
            if (q := stream.probs[n]) is not None:  # so checked drafts were drawn from what is allowed
                stream.probs[n] = q.where(torch.from_numpy(grammar.allowed()).to(q.device), 0)
            stream.drafts.append(token)
            stream.counted.append(forced is None)
            self.grammars.append(grammar.copy())
            self.grammars[-1].advance(token)
            if token == sync:  # what follows is another stream
                break
        stream.ends = self.grammars[-1].done or stream.drafts[-1:] == [sync]
        free = answer.max_length - stream.known - len(stream.drafts)
        stream.slots = 0 if stream.ends else min(self.n_slots(), free)
        written = stream.drafts[: len(stream.drafts) - stream.ends] + [self.tokenizer.mask] * stream.slots
        self.layout.write(written, PLAN, len(answer.rounds) - 1)

    def entries(self) -> list[int]:
        return [*self.stream.entries()]

    def readings(self) -> list[DraftReading]:
        readings = self.stream.readings()
        for reading, grammar in zip(readings, self.grammars):  # of the checks; draft slots may hold any token
            self.constrain(reading, grammar)
        return readings

    def take(self, replies: list[Reply]) -> Phase | None:
        answer = self.answer
        self.layout.cut(self.stream.known)
        tokens, checks = self.stream.checked(iter(replies), answer)
        answer.plan_passes += 1
        answer.critical_path += 1  # for all of its tokens
        answer.cached = self.stream.cached
        answer.cut |= any(reply.cut for reply in checks)
        phase = self
        for token in tokens:
            phase = phase.write(token) if phase is self else phase
        return self.force() if phase is self else phase

    def force(self) -> Phase | None:
        """Write the tokens to which the grammar leaves no alternative; they are no drafts any more."""
        before, phase = len(self.layout), super().force()
        n_forced = len(self.layout) - before
        del self.stream.drafts[:n_forced], self.stream.probs[:n_forced]
        return phase


class DraftedExtend(Extend):
    """Stage 2 of causal spans, with drafts."""

    stream = DraftStream
    draw = staticmethod(draw_checked)

    def prepare(self) -> None:
        """Put the drafts in their slots until `take` has checked them; the [MASK] after them are the draft slots."""
        pad = self.tokenizer.pad
        for stream, left in self.unfinished():
            stop = min(stream.drafts.index(pad) + 1 if pad in stream.drafts else left, left)
            del stream.drafts[stop:], stream.probs[stop:]
            n_drafts = len(stream.drafts)
            stream.counted = [True] * n_drafts
            stream.ends = n_drafts == left or stream.drafts[-1:] == [pad]
            stream.slots = 0 if stream.ends else min(self.config.ahead, left - n_drafts)
            self.layout.token[stream.known : stream.known + n_drafts] = stream.drafts


DRAFTED = {WrittenPlan: DraftedPlan, Extend: DraftedExtend}
DECODERS_AHEAD = {name: decoder._replace(plan=DRAFTED.get(decoder.plan, decoder.plan),
                                         spans=DRAFTED.get(decoder.spans, decoder.spans))
                  for name, decoder in DECODERS.items()}  # fmt: skip
