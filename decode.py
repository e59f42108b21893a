"""Ways to decode, each a phase that an answer can be in (Planned Diffusion, section 4).

A phase says which layout entries the next forward pass computes (`entries`), which of its predictions are read
(`readings`), how to go on with what was drawn (`take`), and, as the result of `take`, which phase comes next. The
sampler (sample.py) runs the phases of many answers in the same passes. README.md says what a new way to decode needs.
"""

import math
from dataclasses import dataclass
from fractions import Fraction

import torch
from torch import Tensor

from answer import Answer, RoundTokens
from masks import PLAN
from tokenizer import span_slots

DRAFT_CONFIDENCE = 0.05  # drafts are kept while the product of the model's confidences in them is at least this


@dataclass
class Reading:
    """What a pass reads: the predictions at some layout entries, and how many of the tokens drawn there are kept."""

    entries: list[int]
    quota: int = 1  # the most certain tokens that are kept at least; a threshold may keep more
    allowed: Tensor | None = None  # (V,) the tokens that may be drawn; None: any, or in a span text and [PAD]
    draft: int = -1  # the token drafted to follow the entry, to be checked
    draft_probs: Tensor | None = None  # (V,) what the draft was drawn from, above temperature 0
    before: tuple[Tensor | None, ...] = ()  # (V,) probabilities of each slot in the last pass, with --stable
    endless: Tensor | None = None  # (V,) the tokens that might be drawn if the answer could be of any length


@dataclass
class Reply:
    """What was drawn for a reading: of each entry the token, and whether it is kept (a draft: accepted)."""

    tokens: list[int]
    kept: list[bool]
    confidence: float = 1.0  # of the likeliest token, where drafts are made
    probs: Tensor | None = None  # (V,) what a draft was drawn from, above temperature 0; (entries, V) with --stable
    cut: bool = False  # the likeliest token is not allowed, for want of positions alone


class Phase:
    """What an answer does until the next phase."""

    in_spans = False  # whether it predicts slots, which hold text or [PAD], rather than any token
    fills = False  # whether it fills the most certain slots of each reading, rather than the next token of each

    def __init__(self, answer: Answer):
        self.answer, self.layout, self.tokenizer = answer, answer.layout, answer.tokenizer
        self.config = answer.config

    def prepare(self, drafter) -> None:
        """Called before each pass; `drafter` is a second model that drafts (measure/speculate.py), or None."""

    def entries(self) -> list[int]:
        """The layout entries that the next pass computes."""
        raise NotImplementedError

    def readings(self) -> list[Reading]:
        """What that pass predicts."""
        raise NotImplementedError

    def take(self, replies: list[Reply]) -> "Phase | None":
        """Go on with a reply per reading. Returns the next phase, or None if the answer is finished."""
        raise NotImplementedError


# ---------------------------------------------------------------- text that grows from left to right


class Stream:
    """Text that grows from left to right: what is known of it, and what is drafted ahead.

    A pass computes the known entries [cached, known), then the drafts, which it checks, then draft slots: each holds
    [MASK] and predicts one token further ahead. `ends`: the last draft ends the stream, so nothing follows it.
    """

    def __init__(self, cached: int, known: int):
        self.cached, self.known = cached, known
        self.drafts, self.probs, self.counted, self.ends, self.slots = [], [], [], False, 0

    def entries(self) -> range:
        """The layout entries of the next pass."""
        return range(self.cached, self.known + len(self.drafts) - self.ends + self.slots)

    def readings(self, allowed: list | None = None) -> list[Reading]:
        """The token after the last known one and after each draft, then what the draft slots predict.

        allowed: the tokens that may come next, before each draft and after the last.
        """
        drafts = [*zip(self.drafts, self.probs)] + [()] * (not self.ends)
        checked = [Reading([self.known - 1 + n], 1, allowed and allowed[n], *draft) for n, draft in enumerate(drafts)]
        first = self.known + len(self.drafts)
        return checked + [Reading([first + n]) for n in range(self.slots)]

    def check(self, replies: list[Reply], answer: Answer) -> tuple[list[int], int]:
        """The tokens that the pass has shown to be right: accepted drafts, then the model's own next token.

        Returns them and how many were accepted. If all were, what the draft slots predict are the next drafts.
        """
        n_drafts = len(self.drafts)
        accepted = next((n for n in range(n_drafts) if not replies[n].kept[0]), n_drafts)
        all_right = accepted == n_drafts
        own = [] if all_right and self.ends else replies[accepted].tokens
        tokens, self.cached = self.drafts[:accepted] + own, self.known + accepted - (all_right and self.ends)
        answer.drafted += sum(self.counted)
        answer.accepted += sum(self.counted[:accepted])
        self.drafts, self.probs, confidence = [], [], 1.0
        for reply in replies[len(replies) - self.slots :] if all_right and self.slots else []:
            confidence *= reply.confidence
            if confidence < DRAFT_CONFIDENCE:
                break
            self.drafts.append(reply.tokens[0])
            self.probs.append(reply.probs)
        return tokens, accepted


class WrittenPlan(Phase):
    """Stage 1: write plan or text, one token per pass, or with drafts as many as the pass shows to be right."""

    @classmethod
    def begin(cls, answer):
        """The phase that begins a round; None after the last. The pass that reads `<sync/>` computes the finished spans
        before it once more, so the cache stays exact."""
        if answer.rounds:
            if answer.last:
                return None
            answer.layout.write([answer.tokenizer.sync], PLAN, len(answer.rounds))
        answer.rounds.append(RoundTokens())
        return cls(answer).force()

    def __init__(self, answer):
        super().__init__(answer)
        self.stream, self.grammars = Stream(answer.cached, len(self.layout)), []

    def prepare(self, drafter):
        """Write drafts and draft slots behind what is known, until `take` has checked them."""
        stream, answer, ahead = self.stream, self.answer, self.config.ahead
        stream.known = len(self.layout)
        if drafter:
            stream.drafts, stream.probs = drafter.draft(answer)
        self.grammars, proposed, stream.counted = [answer.grammar], stream.drafts, []
        stream.drafts = []
        for n, token in enumerate(proposed):
            grammar = self.grammars[-1]
            forced = grammar.forced() if self.config.constrained else None
            token = token if forced is None else forced
            if not grammar.allowed()[token]:
                break
            if (q := stream.probs[n]) is not None:  # so checked drafts were drawn from what is allowed
                stream.probs[n] = q.where(torch.from_numpy(grammar.allowed()).to(q.device), 0)
            stream.drafts.append(token)
            stream.counted.append(forced is None)
            self.grammars.append(grammar.copy())
            self.grammars[-1].advance(token)
            if token == self.tokenizer.sync:  # what follows is another stream
                break
        stream.ends = self.grammars[-1].done or stream.drafts[-1:] == [self.tokenizer.sync]
        free = answer.max_length - stream.known - len(stream.drafts)
        stream.slots = 0 if stream.ends or drafter else min(ahead, free)
        written = stream.drafts[: len(stream.drafts) - stream.ends] + [self.tokenizer.mask] * stream.slots
        self.layout.write(written, PLAN, len(answer.rounds) - 1)

    def entries(self):
        return [*self.stream.entries()]

    def readings(self):
        if not self.config.constrained:
            return self.stream.readings()
        readings = self.stream.readings([torch.from_numpy(grammar.allowed()) for grammar in self.grammars])
        for reading, grammar in zip(readings, self.grammars):
            reading.endless = torch.from_numpy(grammar.endless())
        return readings

    def take(self, replies):
        self.layout.cut(self.stream.known)
        tokens, accepted = self.stream.check(replies, self.answer)
        self.answer.plan_passes += 1
        # where a draft was the end, the pass wrote no token of its own
        self.answer.critical_path += accepted == len(tokens)
        self.answer.cached = self.stream.cached
        self.answer.cut |= any(reply.cut for reply in replies[: accepted + 1])
        phase = self
        for n, token in enumerate(tokens):
            if phase is self:
                phase = self.write(token, drafted=n < accepted)
        return self.force() if phase is self else phase

    def force(self):
        """Write the tokens to which the grammar leaves no alternative: they cost no pass."""
        phase = self
        while phase is self and self.config.constrained and (forced := self.answer.grammar.forced()) is not None:
            phase = self.write(forced)
            del self.stream.drafts[:1], self.stream.probs[:1]
        return phase

    def write(self, token, drafted=False):
        """Go on with the next token of plan or text. Returns the next phase."""
        answer, tokenizer, round_ = self.answer, self.tokenizer, self.answer.rounds[-1]
        if not answer.grammar.allowed()[token]:  # only without constraints
            answer.broken = True
            return None
        answer.cut |= self.config.constrained and answer.grammar.forced() == tokenizer.eos  # no place for anything else
        answer.critical_path += not drafted
        answer.grammar.advance(token)
        if token in (tokenizer.sync, tokenizer.eos):
            answer.last = token == tokenizer.eos
            return self.spans() if round_.topics else self.begin(answer)
        if token == tokenizer.topic:
            round_.topics.append([[], 0])
        elif tokenizer.length_of(token):
            round_.topics[-1][1] = tokenizer.length_of(token)
        elif token != tokenizer.topic_end:
            (round_.topics[-1][0] if round_.topics else round_.text).append(token)
        self.layout.write([token], PLAN, len(answer.rounds) - 1)
        return self

    def spans(self):
        """The phase that fills the spans of the plan just written."""
        unit, scale, repeat = self.tokenizer.unit, self.config.length_scale, self.answer.method.repeat_topic
        topics = self.answer.rounds[-1].topics
        self.answer.scaffold([(name if repeat else [], span_slots(length, unit, scale)) for name, length in topics])
        return DECODERS[self.answer.method.method].spans(self.answer)


class Extend(Phase):
    """Stage 2 of causal spans: all grow in the same passes, each at its own pace, until [PAD] or the last slot."""

    in_spans = True

    def __init__(self, answer):
        super().__init__(answer)
        self.slots = [answer.slots(span) for span in answer.rounds[-1].spans]
        self.streams = [Stream(start, slots[0]) for (start, _), slots in zip(answer.rounds[-1].spans, self.slots)]
        self.first = answer.rounds[-1].spans[0][0]

    def prepare(self, drafter):
        """Put the drafts in their slots until `take` has checked them; the [MASK] after them are the draft slots."""
        for stream, slots in self.unfinished():
            left = slots[-1] + 1 - stream.known
            stop = stream.drafts.index(self.tokenizer.pad) + 1 if self.tokenizer.pad in stream.drafts else left
            del stream.drafts[min(stop, left) :], stream.probs[min(stop, left) :]
            n_drafts = len(stream.drafts)
            stream.counted = [True] * n_drafts
            stream.ends = n_drafts == left or stream.drafts[-1:] == [self.tokenizer.pad]
            stream.slots = 0 if stream.ends or drafter else min(self.config.ahead, left - n_drafts)
            self.layout.token[stream.known : stream.known + n_drafts] = stream.drafts

    def unfinished(self):
        return [(stream, slots) for stream, slots in zip(self.streams, self.slots) if stream.known <= slots[-1]]

    def entries(self):
        plan = range(self.answer.cached, self.first)
        return [*plan, *(i for stream, _ in self.unfinished() for i in stream.entries())]

    def readings(self):
        return [reading for stream, _ in self.unfinished() for reading in stream.readings()]

    def take(self, replies):
        self.answer.denoise_passes += 1
        self.answer.critical_path += 1
        self.answer.cached = self.first
        for stream, slots in self.unfinished():
            n_readings = len(stream.readings())
            tokens, _ = stream.check(replies[:n_readings], self.answer)
            replies = replies[n_readings:]
            if self.tokenizer.pad in tokens:
                tokens += [self.tokenizer.pad] * (slots[-1] + 1 - stream.known - len(tokens))
            left = slots[-1] + 1 - stream.known - len(tokens)
            self.layout.token[stream.known : slots[-1] + 1] = tokens + [self.tokenizer.mask] * left
            stream.known += len(tokens)
        if self.unfinished():
            return self
        if self.answer.method.in_training.attention != "causal":  # as a joint model was trained
            self.layout.see_both_ways(self.answer.rounds[-1].spans)
        return next_round(self.answer)


# ---------------------------------------------------------------- spans that are denoised


class Denoise(Phase):
    """Stage 2: denoise all spans of a round in the same passes, each by itself.

    After step s of S, ceil(n s / S) of the n slots of a span are filled, the most certain first; or, with a threshold
    or an entropy bound, what that allows. Each pass fills at least one slot of each span that it computes: a pass that
    filled none would be repeated exactly, since nothing that the span sees has changed. So short spans finish before
    long ones (the order sigma^Plan of the paper). A slot that waits for its neighbours (unmask.fill) is made up for in
    the next pass. Finished spans are no longer computed.
    """

    in_spans = fills = True

    def __init__(self, answer):
        super().__init__(answer)
        self.spans = [(span, answer.slots(span)) for span in answer.rounds[-1].spans]  # the unfinished ones
        self.first, self.before = self.spans[0][0][0], {}
        ratio = Fraction(str(self.config.steps_ratio))  # not the binary number next to it
        self.step, self.steps = 1, math.ceil(ratio * max(len(slots) for _, slots in self.spans))

    def entries(self):
        """What the cache lacks before the spans, then all of each unfinished span."""
        return [*range(self.answer.cached, self.first), *(i for span, _ in self.spans for i in range(*span))]

    def masked(self, slots):
        return [i for i in slots if self.layout.token[i] == self.tokenizer.mask]

    def groups(self):
        """The slots that are filled together, the most certain first."""
        return [slots for _, slots in self.spans]

    def readings(self):
        """A reading per group: its masked slots, and how many of them to fill."""
        masked = [(slots, self.masked(slots)) for slots in self.groups()]
        return [Reading(left, self.quota(len(slots), len(left)), before=(*map(self.before.get, left),))
                for slots, left in masked]  # fmt: skip

    def quota(self, slots, left):
        """How many of a group's slots to fill at least, if so many are `left`."""
        if self.config.threshold or self.config.entropy_bound:
            return 1
        return max(1, math.ceil(slots * self.step / self.steps) - (slots - left))

    def take(self, replies):
        """Fill the slots whose tokens are kept. Raises RuntimeError if there are none: the next pass would be the same."""
        filled = 0
        for reading, reply in zip(self.readings(), replies):
            for entry, token, kept in zip(reading.entries, reply.tokens, reply.kept):
                if kept:
                    self.layout.token[entry] = token
                    filled += 1
            if reply.probs is not None:
                self.before |= zip(reading.entries, reply.probs)
        if not filled:
            raise RuntimeError(f"a denoising pass filled no slot of the answer to {self.answer.prompt[:60]!r}")
        self.answer.denoise_passes += 1
        self.answer.critical_path += 1
        self.answer.cached, self.step = self.first, self.step + 1
        unfinished = [(span, slots) for span, slots in self.spans if self.masked(slots)]
        self.leave(unfinished)
        return self if unfinished else next_round(self.answer)

    def leave(self, unfinished):
        self.spans = unfinished


class DenoiseTogether(Denoise):
    """Dense spans see each other: they fill most certain first over the whole round, or they could not agree on
    anything; and all are computed until the round is finished."""

    def groups(self):
        return [[i for _, slots in self.spans for i in slots]]

    def leave(self, unfinished):
        pass


class GivenPlan:
    """Block after block of fixed size, without a written plan, until one holds the [PAD] that ends the answer."""

    @staticmethod
    def begin(answer):
        """The phase that denoises the next block; None after the last, or where max_tokens leaves no slot."""
        if answer.rounds and answer.tokenizer.pad in answer.contents(answer.rounds[-1].spans[0]):
            return None
        size = min(answer.method.block, answer.max_length - len(answer.layout) - 2)  # 2: <async> and </async>
        answer.cut = size < 1
        if answer.cut:
            return None
        answer.rounds.append(RoundTokens())
        answer.scaffold([([], size)])
        return DECODERS[answer.method.method].spans(answer)


# ---------------------------------------------------------------- the table


@dataclass(frozen=True)
class Decoder:
    """What begins a round, and how its spans are filled."""

    plan: type
    spans: type[Phase] | None = None


DECODERS = {
    "planned": Decoder(WrittenPlan, Denoise),
    "dense": Decoder(WrittenPlan, DenoiseTogether),
    "parallel-ar": Decoder(WrittenPlan, Extend),
    "ar": Decoder(WrittenPlan),
    "block": Decoder(GivenPlan, Denoise),
    "diffusion": Decoder(GivenPlan, Denoise),
}


def next_round(answer: Answer) -> Phase | None:
    """The phase that an answer begins with, or goes on with after a round; None if it is finished."""
    return DECODERS[answer.method.method].plan.begin(answer)
