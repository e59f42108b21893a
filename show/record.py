"""A recording of an answer: a frame per pass, each with all that is known after it. What draws answers draws frames."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from decode import Answer, Denoise, Phase, Reply
from masks import GIVEN, PLAN, PROMPT
from unmask import before_text, beside_its_like, certainty


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
    waits: str = ""  # what an unsure slot waits for: "neighbour", "text" (`waiting`); "": it was not certain enough
    likeliest: tuple[tuple[str, float], ...] = ()  # tokens with probabilities, if `record` was asked for them


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


def record(answer: Callable, prompt: str, watch: Callable | None = None, likeliest: int = 0) -> list[Frame]:
    """Answer a prompt with `Sampler.answer`. Returns a frame per pass; of an answer that takes no pass, its end.

    `watch`: called with the answer as it is in each frame. `likeliest`: how many tokens to keep of what each draw was
    drawn from.
    """
    frames, passes = [], []

    def probe(answer: Answer, replies: list[Reply], logits: Tensor) -> None:
        tokenizer, phase, probabilities = answer.tokenizer, answer.phase, logits.softmax(-1)
        ranked, waits = probabilities.topk(min(likeliest, logits.shape[-1])), waiting(answer, replies, logits)
        text = lambda token: "" if token == tokenizer.pad else tokenizer.name(token)
        best = [tuple((text(token), p) for p, token in zip(*row) if p) for row in zip(*map(Tensor.tolist, ranked))]
        passes.append([(phase.in_spans, entry, text(token), probabilities[row, token].item(), outcome, waits[row], best[row])
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


def waiting(answer: Answer, replies: list[Reply], logits: Tensor) -> list[str]:
    """What each prediction of a pass waits for (unmask.fill): "neighbour": one that would get the same token is surer;
    "text": it would get [PAD], and a masked slot before it text; "": nothing. In random order the surer is not known."""
    if not isinstance(answer.phase, Denoise):
        return [""] * len(logits)
    config, pad, slots = answer.config, answer.tokenizer.pad, [(n, *slot) for n, reply in enumerate(replies)
                                 for slot in zip(reply.reading.entries, reply.tokens, reply.kept)]  # fmt: skip
    group, entry, token, kept = torch.tensor(slots).T
    if known := bool(config.threshold) or config.order != "random":
        sure = certainty(logits.cpu(), token, config, [])
    near = beside_its_like(token, sure, group, entry) & (token != pad) if known and config.apart else kept > 1
    late = before_text(token, pad, group, entry) if config.pads_last else kept > 1
    return ["" if k else "neighbour" if n else "text" if t else "" for k, n, t in zip(kept, near, late)]


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


def rows(answer: Answer) -> list[tuple[tuple | None, int, int, int]]:
    """For each layout entry of a finished answer the part that it holds, and its row of the mask as it was when it was
    written: prefix, begin, end. A span's tags and topic are the part ("span", r, k), the prompt is ("prompt",)."""
    layout, at = answer.layout, places(answer)
    others = {PROMPT: lambda r, k: ("prompt",), GIVEN: lambda r, k: ("span", r, k)}
    ends = range(1, len(layout) + 1) if layout.attention == "causal" else layout.end  # finished ones see both ways
    return [(others[kind](r, k) if kind in others else at.get((k >= 0, entry)), prefix, begin, min(end, stop))
            for entry, (kind, r, k, prefix, begin, end, stop) in enumerate(
                zip(layout.kind, layout.round, layout.span, layout.prefix, layout.begin, layout.end, ends))]  # fmt: skip


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
