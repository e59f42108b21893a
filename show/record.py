"""A recording of an answer: a frame per pass, each with all that is known after it. What draws answers draws frames."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from decode import Answer, Denoise, Phase, Reply
from masks import PLAN


@dataclass(frozen=True)
class FrameTopic:
    """A topic of a plan as far as it is written."""

    name: tuple[str, ...]  # text of each token
    length: int  # in units, 0 until it is written


@dataclass(frozen=True)
class FrameRound:
    """A round as far as it is known; each string is the text of one token."""

    text: tuple[str, ...]
    topics: tuple[FrameTopic, ...]
    spans: tuple[tuple[str | None, ...], ...]  # slots of each span: None while masked, "" for [PAD]


@dataclass(frozen=True)
class FrameDraw:
    """A token that a pass drew, or a draft that it checked."""

    part: tuple | None  # what of the answer it is or would have been (see `parts`); None: a tag, or no part of it
    text: str
    probability: float  # that the model gave it, at temperature 1
    outcome: str  # "new"; "unsure": its slot stays masked; "accepted" or "rejected": it was a draft


@dataclass(frozen=True)
class Frame:
    """An answer after one of its passes, what it has cost so far, and what the pass drew."""

    rounds: tuple[FrameRound, ...]
    plan_passes: int
    denoise_passes: int
    critical_path: int
    positions: int
    ending: str  # "" until the last frame, then "finished", "cut" or "broken"
    draws: tuple[FrameDraw, ...] = ()  # only in a recording; what the grammar forces is not drawn

    @property
    def passes(self) -> int:
        return self.plan_passes + self.denoise_passes


def frame(answer: Answer) -> Frame:
    """An answer as it stands between two passes; drafts that are not checked yet are no part of it."""
    tokenizer, ending = answer.tokenizer, ""
    if not answer.phase:
        ending = "broken" if answer.broken else "cut" if answer.cut else "finished"

    def texts(tokens: Sequence[int]) -> tuple[str | None, ...]:
        unknown = {tokenizer.mask: None, tokenizer.pad: ""}
        return tuple(unknown[i] if i in unknown else tokenizer.name(i) for i in tokens)

    rounds = tuple(
        FrameRound(
            text=texts(round_.text),
            topics=tuple(FrameTopic(texts(topic.name), topic.length) for topic in round_.topics),
            spans=tuple(texts(answer.contents(span)) for span in round_.spans),
        )
        for round_ in answer.rounds
    )
    costs = answer.plan_passes, answer.denoise_passes, answer.critical_path, answer.positions
    return Frame(rounds, *costs, ending)


# ---------------------------------------------------------------- a recording


def record(answer: Callable, prompt: str, watch: Callable | None = None) -> list[Frame]:
    """Answer a prompt with `Sampler.answer`. Returns a frame per pass; of an answer that takes no pass, its end.

    `watch`: called with the answer as it is in each frame.
    """
    frames, passes = [], []

    def probe(answer: Answer, replies: list[Reply], logits: Tensor) -> None:
        tokenizer, phase, probabilities = answer.tokenizer, answer.phase, logits.softmax(-1)
        passes.append([(phase.in_spans, entry, "" if token == tokenizer.pad else tokenizer.name(token),
                        probabilities[row, token].item(), outcome)
                       for row, entry, token, outcome in outcomes(phase, replies)])  # fmt: skip

    def watching(answer: Answer) -> None:
        frames.append(frame(answer))
        if watch:
            watch(answer)

    (answered,) = answer([prompt], watching, probe)
    if not frames:
        watching(answered)
    at = places(answered)
    for n, drawn in enumerate(passes):
        draws = (FrameDraw(at.get((in_spans, entry)), *what) for in_spans, entry, *what in drawn)
        frames[n] = replace(frames[n], draws=tuple(draws))
    return frames


def outcomes(phase: Phase, replies: list[Reply]) -> Iterator[tuple[int, int, int, str]]:
    """All that a pass draws or checks: (row of its predictions, layout entry, token, outcome as in FrameDraw).

    Drafts that the grammar forces are left out, as they are from the answer's counts; so are drafts for later passes.
    """
    if isinstance(phase, Denoise):
        filled = [slot for r in replies for slot in zip(r.reading.entries, r.tokens, r.kept)]
        yield from ((row, entry, token, "new" if kept else "unsure") for row, (entry, token, kept) in enumerate(filled))
        return
    last, right = None, True
    for row, reply in enumerate(replies):
        (entry,), draft = reply.reading.entries, getattr(reply.reading, "draft", -1)  # it predicts the next token
        right = right or entry - 1 != last  # another span's first reading: nothing is wrong in it yet
        last, accepted, is_draft = entry, right and draft >= 0 and reply.kept[0], draft >= 0
        forced = is_draft and reply.reading.allowed is not None and reply.reading.allowed.sum() == 1
        if is_draft and not forced:
            yield row, entry + 1, draft, "accepted" if accepted else "rejected"
        if right and not accepted:
            yield row, entry + 1, reply.tokens[0], "new"
        right = accepted


def places(answer: Answer) -> dict[tuple[bool, int], tuple]:
    """(whether it is in a span, layout entry) -> the part of a finished answer that the entry holds; tags are none."""
    layout, tokenizer, found = answer.layout, answer.tokenizer, {}
    for r, round_ in enumerate(answer.rounds):
        for k, span in enumerate(round_.spans):
            found |= {(True, entry): ("slot", r, k, n) for n, entry in enumerate(answer.slots(span))}
        k, n = -1, 0
        for entry, token in enumerate(layout.token):
            if layout.kind[entry] != PLAN or layout.round[entry] != r or token in (tokenizer.sync, tokenizer.topic_end):
                continue
            if token == tokenizer.topic:
                k, n, part = k + 1, -1, ("topic", r, k + 1)
            elif tokenizer.length_of(token):
                part = "length", r, k
            else:
                part = ("text", r, n) if k < 0 else ("name", r, k, n)
            found[False, entry], n = part, n + 1
    return found


# ---------------------------------------------------------------- what pictures have in common


def parts(frame: Frame) -> Iterator[tuple]:
    """A key for each part of an answer that a frame knows."""
    for r, round_ in enumerate(frame.rounds):
        yield from (("text", r, n) for n, _ in enumerate(round_.text))
        for k, topic in enumerate(round_.topics):
            yield "topic", r, k
            yield from (("name", r, k, n) for n, _ in enumerate(topic.name))
            yield from [("length", r, k)] * (topic.length > 0)
        for k, span in enumerate(round_.spans):
            yield "span", r, k
            yield from (("slot", r, k, n) for n, slot in enumerate(span) if slot is not None)


def since(frames: Sequence[Frame]) -> dict[tuple, int]:
    """The pass after which each part is known."""
    found = {}
    for n, frame in enumerate(frames, 1):
        for part in parts(frame):
            found.setdefault(part, n)
    return found


def denoises(before: Frame | None, frame: Frame) -> bool:
    """Whether the pass between two frames filled slots."""
    return frame.denoise_passes > (before.denoise_passes if before else 0)


def action(method: str, before: Frame | None, frame: Frame) -> str:
    """What the pass between two frames does, in words."""
    round_ = frame.rounds[len(before.rounds) - 1 if before else 0]
    if denoises(before, frame):
        n_spans, verb = len(round_.spans), "extends" if method == "parallel-ar" else "denoises"
        return f"{verb} {counted(n_spans, 'span', 'spans')}" + " in parallel" * (n_spans > 1)
    drafts = any(draw.outcome in ("accepted", "rejected") for draw in frame.draws)
    how = "checking drafts" if drafts else "one token per pass"
    return f"writes {'the plan' if round_.topics else 'text'}, {how}"


def counted(n: int, one: str, many: str) -> str:
    return f"{n} {one if n == 1 else many}"


def printable(text: str) -> str:
    """Text without control codes, which a terminal would obey and XML forbids; line breaks stay."""
    return "".join(c if c.isprintable() or c == "\n" else "?" for c in text)
