"""A recording of an answer: a frame per pass, each with all that is known after it. What draws answers draws frames."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from answer import Answer
    from sample import Sampler


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
class Frame:
    """An answer after one of its passes, and what it has cost so far."""

    rounds: tuple[FrameRound, ...]
    plan_passes: int
    denoise_passes: int
    critical_path: int
    positions: int
    ending: str  # "" until the last frame, then "finished", "cut" or "broken"

    @property
    def passes(self) -> int:
        return self.plan_passes + self.denoise_passes


def frame(answer: Answer) -> Frame:
    """An answer as it stands between two passes; drafts that are not checked yet are no part of it."""
    tokenizer, ending = answer.tokenizer, ""
    if not answer.phase:
        ending = "broken" if answer.broken else "cut" if answer.cut else "finished"

    def texts(tokens):
        unknown = {tokenizer.mask: None, tokenizer.pad: ""}
        return tuple(unknown[i] if i in unknown else tokenizer.name(i) for i in tokens)

    rounds = tuple(
        FrameRound(
            text=texts(round_.text),
            topics=tuple(FrameTopic(texts(name), length) for name, length in round_.topics),
            spans=tuple(texts(answer.contents(span)) for span in round_.spans),
        )
        for round_ in answer.rounds
    )
    costs = answer.plan_passes, answer.denoise_passes, answer.critical_path, answer.positions
    return Frame(rounds, *costs, ending)


def record(sampler: Sampler, prompt: str) -> list[Frame]:
    """Answer a prompt. Returns a frame per pass."""
    frames = []
    sampler.answer([prompt], watch=lambda answer: frames.append(frame(answer)))
    return frames


def printable(text: str) -> str:
    """Text without control codes, which a terminal would obey and XML forbids; line breaks stay."""
    return "".join(c if c.isprintable() or c == "\n" else "?" for c in text)
