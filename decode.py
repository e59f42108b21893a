"""Ways to decode, each a phase that an answer can be in (Planned Diffusion, section 4).

A phase says which layout entries the next forward pass computes (`entries`), which of its predictions are read
(`readings`), how tokens are drawn from them (`draw`), how to go on with what was drawn (`take`), and, as the result of
`take`, which phase comes next. The sampler (sample.py) runs the phases of many answers in the same passes.
methods.py has the phases of other methods, and drafting/decoding.py those that draft ahead.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any, NamedTuple

import torch
from torch import Tensor

from config import MethodConfig, SampleConfig
from grammar import Grammar, plan_tokens
from masks import PLAN, PROMPT, SLOT, Layout, encode_prompt
from tags import Round, Span, format_answer, plain_text
from tokenizer import Tokenizer, loops, span_slots
from unmask import Generators, draw, fill, probabilities

# ---------------------------------------------------------------- an answer


@dataclass
class TopicTokens:
    """A topic of a plan: its name's tokens, and its length in units, 0 until that is written."""

    name: list[int] = field(default_factory=list)
    length: int = 0


@dataclass
class RoundTokens:
    """A round in token ids."""

    text: list[int] = field(default_factory=list)
    topics: list[TopicTokens] = field(default_factory=list)
    spans: list[tuple[int, int]] = field(default_factory=list)  # (first layout entry, last + 1) per span


class Answer:
    """What all ways to decode share: the layout so far, the phase that the answer is in (None once it is finished), and
    what it has cost. `device`: of the generator that draws its tokens."""

    def __init__(self, prompt: str, tokenizer: Tokenizer, config: SampleConfig, method: MethodConfig, decoder: Decoder,
                 seed: int = 0, device: torch.device | str = "cpu"):  # fmt: skip
        self.prompt, self.tokenizer, self.config, self.method, self.decoder = prompt, tokenizer, config, method, decoder
        self.layout, self.rounds = Layout(method.attention), []
        self.phase: Phase | None = None
        self.layout.write(encode_prompt(prompt, tokenizer), PROMPT, 0)
        self.max_length = len(self.layout) + config.max_tokens  # of the layout, <eos> included
        given, plans = plan_tokens(config.plan, tokenizer), method.plan == "written"
        self.grammar = Grammar(tokenizer, config.max_tokens, config.length_scale, plans, given)
        self.generator = torch.Generator(device).manual_seed(seed)
        self.cached = 0  # layout entries [0, cached) are in the KV cache as a fresh forward would compute them
        self.cut = self.broken = False  # cut: max_tokens had no room for more; broken: a token outside the grammar
        self.plan_passes = self.denoise_passes = self.draft_passes = self.critical_path = self.positions = 0
        self.drafted = self.accepted = 0  # tokens
        self.seconds = 0.0

    @property
    def looping(self) -> bool:
        """Whether what is written so far repeats itself."""
        written = zip(self.layout.token, self.layout.kind)
        return loops([token for token, kind in written if kind != PROMPT and token != self.tokenizer.pad])

    def scaffold(self, spans: list[tuple[list[int], int]]) -> None:
        """Append spans of [MASK] to the layout; `spans` holds pairs of topic tokens and number of slots."""
        masked = [(topic, [self.tokenizer.mask] * n_slots) for topic, n_slots in spans]
        self.rounds[-1].spans = self.layout.scaffold(masked, self.tokenizer, len(self.rounds) - 1)

    def slots(self, span: tuple[int, int]) -> list[int]:
        """The layout entries of a span's slots."""
        return [i for i in range(*span) if self.layout.kind[i] == SLOT]

    def contents(self, span: tuple[int, int]) -> list[int]:
        """The tokens of a span's slots, [PAD] and [MASK] included."""
        return [self.layout.token[i] for i in self.slots(span)]

    def decoded(self) -> list[Round]:
        """The answer as a list of `Round`; what is written under a given plan is one text."""
        decode, rounds = self.tokenizer.decode, []
        if self.method.plan == "given":
            return [Round(decode([i for round_ in self.rounds for span in round_.spans for i in self.contents(span)]))]
        for r in self.rounds:
            spans = [Span(decode(topic.name), decode(self.contents(span)), topic.length)
                     for topic, span in zip(r.topics, r.spans)]  # fmt: skip
            rounds.append(Round(decode(r.text), tuple(spans)))
        return rounds

    def result(self) -> dict[str, Any]:
        """What `--json` prints."""
        rounds = self.decoded()
        contents = [i for round_ in self.rounds for span in round_.spans for i in self.contents(span)]
        pads = contents.count(self.tokenizer.pad)
        facts = ("cut", "broken", "looping", "plan_passes", "denoise_passes", "draft_passes", "drafted", "accepted",
                 "critical_path", "positions")  # fmt: skip
        return {
            "prompt": self.prompt,
            "text": plain_text(rounds),
            "tagged": format_answer(rounds),
            "rounds": [{"text": r.text, "plan": [{"topic": s.topic, "length": s.length} for s in r.spans],
                        "spans": [s.text for s in r.spans]} for r in rounds],
            **{name: getattr(self, name) for name in facts},
            "content_tokens": sum(len(round_.text) for round_ in self.rounds) + len(contents) - pads,
            "slots": len(contents), "pads": pads, "seconds": round(self.seconds, 4),
        }  # fmt: skip


# ---------------------------------------------------------------- phases


@dataclass
class Reading:
    """What a pass reads: the predictions at some layout entries, and how many of the tokens drawn there are kept."""

    entries: list[int]
    quota: int = 1  # the most certain tokens that are kept at least; a threshold may keep more
    allowed: Tensor | None = None  # (V,) the tokens that may be drawn; None: any, or in a span text and [PAD]
    endless: Tensor | None = None  # (V,) the tokens that might be drawn if the answer could be of any length


@dataclass
class Reply:
    """What was drawn for a reading: of each entry the token, and whether it is kept."""

    reading: Reading
    tokens: list[int]
    kept: list[bool]
    cut: bool = False  # the likeliest token is not allowed, for want of positions alone


class Phase:
    """What an answer does until the next phase."""

    in_spans = False  # whether it predicts slots, which hold text or [PAD], rather than any token

    def __init__(self, answer: Answer):
        self.answer, self.layout, self.tokenizer = answer, answer.layout, answer.tokenizer
        self.config = answer.config

    def prepare(self) -> None:
        """Called before each pass."""

    def entries(self) -> list[int]:
        """The layout entries that the next pass computes."""
        raise NotImplementedError

    def readings(self) -> list[Reading]:
        """What that pass predicts."""
        raise NotImplementedError

    @staticmethod
    def draw(logits: Tensor, readings: list[Reading], config: SampleConfig, generators: Generators,
             pad: int) -> tuple[Tensor, Tensor]:  # fmt: skip
        """Tokens (N,) from the logits (N, V) of all that the readings of some answers ask for, and which are kept.
        Here a reading asks for one token, and keeps it."""
        token = draw(probabilities(logits, config), generators) if config.temperature else logits.argmax(-1)
        return token, torch.ones_like(token, dtype=torch.bool)

    def take(self, replies: list[Reply]) -> Phase | None:
        """Go on with a reply per reading. Returns the next phase, or None if the answer is finished."""
        raise NotImplementedError


class Decoder(NamedTuple):
    """What begins a round, and how its spans are filled."""

    plan: Any  # a class with `begin(answer) -> Phase | None`
    spans: type[Phase] | None = None


def next_round(answer: Answer) -> Phase | None:
    """The phase that an answer begins with, or goes on with after a round; None if it is finished."""
    return answer.decoder.plan.begin(answer)


class WrittenPlan(Phase):
    """Stage 1: write plan or text, one token per pass."""

    @classmethod
    def begin(cls, answer: Answer) -> Phase | None:
        """The phase that begins a round; None after the last. The pass that reads `<sync/>` computes the finished spans
        before it once more, so the cache stays exact."""
        if answer.rounds:
            if answer.last:
                return None
            answer.layout.write([answer.tokenizer.sync], PLAN, len(answer.rounds))
        answer.rounds.append(RoundTokens())
        return cls(answer).force()

    def entries(self) -> list[int]:
        return [*range(self.answer.cached, len(self.layout))]

    def readings(self) -> list[Reading]:
        return [self.constrain(Reading([len(self.layout) - 1]), self.answer.grammar)]

    def constrain(self, reading: Reading, grammar: Grammar) -> Reading:
        """The reading, of which only what the grammar allows may be drawn."""
        if self.config.constrained:
            reading.allowed, reading.endless = map(torch.from_numpy, (grammar.allowed(), grammar.endless()))
        return reading

    def take(self, replies: list[Reply]) -> Phase | None:
        answer, (reply,) = self.answer, replies
        answer.plan_passes += 1
        answer.critical_path += 1
        answer.cached = len(self.layout)
        answer.cut |= reply.cut
        phase = self.write(reply.tokens[0])
        return self.force() if phase is self else phase

    def force(self) -> Phase | None:
        """Write the tokens to which the grammar leaves no alternative: they cost no pass."""
        phase = self
        while phase is self and self.config.constrained and (forced := self.answer.grammar.forced()) is not None:
            self.answer.critical_path += 1
            phase = self.write(forced)
        return phase

    def write(self, token: int) -> Phase | None:
        """Go on with the next token of plan or text. Returns the next phase."""
        answer, tokenizer, round_ = self.answer, self.tokenizer, self.answer.rounds[-1]
        if not answer.grammar.allowed()[token]:  # only without constraints
            answer.broken = True
            return None
        if self.config.constrained and answer.grammar.repeats(token):
            name = round_.topics.pop().name
            self.layout.cut(len(self.layout) - len(name) - 1)  # 1: <topic>
            answer.cached = min(answer.cached, len(self.layout) - 1)  # the pass before the topic is done once more
            answer.grammar.take_back()
            return self
        answer.cut |= self.config.constrained and answer.grammar.out_of_room()
        answer.grammar.advance(token)
        if token in (tokenizer.sync, tokenizer.eos):
            answer.last = token == tokenizer.eos
            return self.spans() if round_.topics else next_round(answer)
        if token == tokenizer.topic:
            round_.topics.append(TopicTokens())
        elif tokenizer.length_of(token):
            round_.topics[-1].length = tokenizer.length_of(token)
        elif token != tokenizer.topic_end:
            (round_.topics[-1].name if round_.topics else round_.text).append(token)
        self.layout.write([token], PLAN, len(answer.rounds) - 1)
        return self

    def spans(self) -> Phase:
        """The phase that fills the spans of the plan just written."""
        unit, scale, repeat = self.tokenizer.unit, self.config.length_scale, self.answer.method.repeat_topic
        self.answer.scaffold([(topic.name if repeat else [], span_slots(topic.length, unit, scale))
                              for topic in self.answer.rounds[-1].topics])  # fmt: skip
        return self.answer.decoder.spans(self.answer)


# ---------------------------------------------------------------- spans that are denoised


class Unfinished(NamedTuple):
    """A span with masked slots."""

    span: tuple[int, int]  # from layout entry to layout entry
    slots: list[int]  # the entries of its slots, filled or not


class Denoise(Phase):
    """Stage 2: denoise all spans of a round in the same passes, each by itself.

    After step s of S, ceil(n s / S) of the n slots of a span are filled, the most certain first, and with a threshold all
    that reach it. Each pass fills at least one slot of each span that it computes: a pass that filled none would be
    repeated exactly, since nothing that the span sees has changed. So short spans finish before long ones (the paper's
    order sigma^Plan). A slot that waits for its neighbours (unmask.fill) is made up for in the next pass.
    """

    in_spans = True

    def __init__(self, answer: Answer):
        super().__init__(answer)
        self.unfinished = [Unfinished(span, answer.slots(span)) for span in answer.rounds[-1].spans]
        self.first = self.unfinished[0].span[0]
        default = 0 if self.config.threshold else 0.5
        ratio = Fraction(str(self.config.steps_ratio or default))  # not the binary number next to it
        self.step, self.steps = 1, math.ceil(ratio * max(len(slots) for _, slots in self.unfinished))

    def entries(self) -> list[int]:
        """What the cache lacks before the spans, then all of each unfinished span."""
        return [*range(self.answer.cached, self.first), *(i for span, _ in self.unfinished for i in range(*span))]

    def masked(self, slots: list[int]) -> list[int]:
        return [i for i in slots if self.layout.token[i] == self.tokenizer.mask]

    def groups(self) -> list[list[int]]:
        """The slots that are filled together, the most certain first."""
        return [slots for _, slots in self.unfinished]

    def readings(self) -> list[Reading]:
        """A reading per group: its masked slots, and how many of them to fill."""
        masked = [(len(slots), self.masked(slots)) for slots in self.groups()]
        return [Reading(left, self.quota(size, len(left))) for size, left in masked]

    def quota(self, size: int, left: int) -> int:
        """How many slots of a group of `size` to fill at least, if so many are `left`."""
        share = math.ceil(size * self.step / self.steps) if self.steps else 0
        return max(1, share - (size - left))

    @staticmethod
    def draw(logits: Tensor, readings: list[Reading], config: SampleConfig, generators: Generators,
             pad: int) -> tuple[Tensor, Tensor]:  # fmt: skip
        """Tokens (N,) for masked slots, and which of them are filled (unmask.fill)."""
        sizes = torch.tensor([len(reading.entries) for reading in readings])
        group = torch.arange(len(readings)).repeat_interleave(sizes)
        quota = torch.tensor([reading.quota for reading in readings])[group]
        entry = torch.tensor([entry for reading in readings for entry in reading.entries])
        group, entry, quota = torch.stack([group, entry, quota]).to(logits.device)
        return fill(logits, group, entry, quota, pad, config, generators)

    def take(self, replies: list[Reply]) -> Phase | None:
        """Fill the slots whose tokens are kept. Raises RuntimeError if there are none: the next pass would be the same."""
        filled = [(entry, token) for reply in replies
                  for entry, token, kept in zip(reply.reading.entries, reply.tokens, reply.kept) if kept]  # fmt: skip
        if not filled:
            raise RuntimeError(f"a denoising pass filled no slot of the answer to {self.answer.prompt[:60]!r}")
        for entry, token in filled:
            self.layout.token[entry] = token
        self.answer.denoise_passes += 1
        self.answer.critical_path += 1
        self.answer.cached, self.step = self.first, self.step + 1
        unfinished = [one for one in self.unfinished if self.masked(one.slots)]
        self.retire(unfinished)
        return self if unfinished else next_round(self.answer)

    def retire(self, unfinished: list[Unfinished]) -> None:
        """Compute finished spans no longer: nothing sees them before `<sync/>`. Where siblings do, they have to stay."""
        self.unfinished = unfinished


class DenoiseTogether(Denoise):
    """Dense spans see each other: they fill most certain first over the whole round, or they could not agree on
    anything; and all are computed until the round is finished."""

    def groups(self) -> list[list[int]]:
        return [[i for _, slots in self.unfinished for i in slots]]

    def retire(self, unfinished: list[Unfinished]) -> None:
        pass
