"""An answer in the terminal while it is made: the plan appears, then its spans fill in place.

In a terminal each frame overwrites the last one, in colours. When piped, a few frames are printed as plain text.
"""

from __future__ import annotations

import re
import shutil
import sys
import time
import unicodedata
from collections.abc import Iterator
from typing import TextIO

from decode import Answer
from show.record import Frame, frame, printable

FADED, BOLD, NEW, PLAN = "2", "1", "1;32", "36"  # how text looks, in terminal codes
MASKED = " ____"  # a slot not yet filled
MARGIN = 14  # columns for what a line is: prompt, plan, text, or the topic of a span
ENDINGS = {"cut": "(cut: --max_tokens {} has no room left)",
           "broken": "(broken: it left the grammar here)"}  # fmt: skip
PIPED_WIDTH = 100  # columns where there is no terminal


class Screen:
    """Shows answers: pass it as `watch` to `Sampler.answer`. `delay`: seconds that a frame stays, in a terminal."""

    def __init__(self, stream: TextIO | None = None, delay: float = 0.06):
        self.stream, self.delay = stream or sys.stdout, delay
        self.live = self.stream.isatty()
        self.forget()

    def forget(self) -> None:
        """Begin another answer below what is on the screen."""
        self.height, self.texts, self.stage = 0, {}, None  # of the last frame: lines, text of each token, stage

    def __call__(self, answer: Answer) -> None:
        now = frame(answer)
        if self.live:
            self.overwrite(answer.prompt, now)
        elif self.worth_printing(now):
            passes = f"-- after {now.plan_passes} plan and {now.denoise_passes} denoising passes"
            self.stream.write("\n".join([passes, *self.lines(answer.prompt, now, PIPED_WIDTH)]) + "\n")
        if now.ending in ENDINGS:
            self.stream.write(ENDINGS[now.ending].format(answer.config.max_tokens) + "\n")
        if now.ending:
            self.forget()

    def overwrite(self, prompt: str, now: Frame) -> None:
        """Draw a frame over the last one. Until the end only as many lines as can be overwritten."""
        size = shutil.get_terminal_size()
        lines = self.lines(prompt, now, size.columns)
        if not now.ending:
            lines = lines[-max(1, size.lines - 1) :]
        up = f"\x1b[{self.height}A\x1b[J" if self.height else ""
        self.stream.write(up + "\n".join(lines) + "\n")
        self.stream.flush()
        self.height = len(lines)
        time.sleep(self.delay)

    def worth_printing(self, now: Frame) -> bool:
        """Whether spans have just begun, half of their slots have been filled, or a round or the answer has ended."""
        spans = now.rounds[-1].spans if now.rounds else ()
        slots = [slot for span in spans for slot in span]
        halfway = 2 * slots.count(None) <= len(slots)
        stage, last = (len(now.rounds), bool(spans), halfway), self.stage
        self.stage = stage
        return bool(now.ending) or (stage != last and (last is not None or bool(spans)))

    def lines(self, prompt: str, now: Frame, width: int) -> list[str]:
        """The lines of a frame, each of at most `width` columns; tokens that are new in it stand out."""
        lines, texts = [], {}
        for label, style, tokens in rows(prompt, now):
            texts.update(tokens)
            styles = [style or self.style(key, text) for key, text in tokens]
            lines += self.wrap(label, [(text, style) for (_, text), style in zip(tokens, styles)], width)
        self.texts = texts
        return lines

    def style(self, key: tuple, text: str) -> str:
        """How a token of text or of a span looks."""
        if text == MASKED:
            return FADED
        return NEW if self.texts.get(key, MASKED) == MASKED else ""

    def wrap(self, label: str, cells: list[tuple[str, str]], width: int) -> list[str]:
        """Lines of (text, style) cells, with the label in a margin of its own."""
        lines, line, used, free = [], "", 0, max(2, width - MARGIN - 1)
        for text, style in (part for text, style in cells for part in split(text, style, free)):
            if text == "\n" or (used and used + columns(text) > free):
                lines, line, used = [*lines, line], "", 0
            text = text.lstrip(" \n") if not used else text
            line, used = line + self.paint(text, style), used + columns(text)
        head = self.paint(f"{printable(label)[: MARGIN - 2]:>{MARGIN - 2}}  ", FADED)
        return [(head if n == 0 else " " * MARGIN) + line for n, line in enumerate([*lines, line])]

    def paint(self, text: str, style: str) -> str:
        return f"\x1b[{style}m{text}\x1b[0m" if style and self.live and text else text


def rows(prompt: str, now: Frame) -> Iterator[tuple[str, str, list[tuple]]]:
    """(label, style, [(key, text) of each token]) of the prompt and of each plan, text and span."""
    yield "prompt", BOLD, [(("prompt",), prompt)]
    for r, round_ in enumerate(now.rounds):
        if round_.text:
            yield "text", "", [((r, n), text) for n, text in enumerate(round_.text)]
        if round_.topics:
            topics = [f"{''.join(topic.name)} {topic.length or ''}  ".lstrip() for topic in round_.topics]
            yield "plan", PLAN, [((r, "plan", n), text) for n, text in enumerate(topics)]
        for k, span in enumerate(round_.spans):
            label = " ".join("".join(round_.topics[k].name).split()) if round_.topics else ""
            slots = [((r, k, n), MASKED if slot is None else slot) for n, slot in enumerate(span)]
            yield label, "", [(key, text) for key, text in slots if text]  # without [PAD]


def split(text: str, style: str, width: int) -> Iterator[tuple[str, str]]:
    """Cut text into line breaks and words, each of at most `width` columns, as (text, style)."""
    for word in re.findall(r"\n| ?[^ \n]*", printable(text)):
        while columns(word) > width:
            end = next(n for n in range(len(word), 0, -1) if columns(word[:n]) <= width)
            yield word[:end], style
            word = word[end:]
        if word:
            yield word, style


def columns(text: str) -> int:
    """How many columns text takes in a terminal: letters of some scripts take two, accents none."""
    return sum(0 if unicodedata.combining(c) else 1 + (unicodedata.east_asian_width(c) in "FW") for c in text)
