"""An answer in the terminal, shown once it is finished: the plan appears, then its spans fill in place, pass by pass.

Since all of it is known by then, each token has its place from the start, and no line moves. In a terminal each frame
overwrites the last one; when piped, a few are printed as plain text.
"""

from __future__ import annotations

import math
import re
import shutil
import sys
import time
import unicodedata
from collections.abc import Iterator, Sequence
from typing import NamedTuple, TextIO

from decode import Answer
from plumbing.settings import printable
from show.record import Frame, FrameRound, action, counted, frame, since

FADED, BOLD, NEW = "2", "1", "7"  # how text looks, in terminal codes: no colour is legible on every background
PAD = "·"
PAUSE = 10  # how many times as long as others a frame stays before what passes do changes
MARGIN = 14  # columns for what a line is: prompt, plan, text, or the topic of a span
WIDTH = 80  # columns where there is no terminal
ENDINGS = {"cut": "(cut: --max_tokens {} has no room left)", "broken": "(broken: it left the grammar here)",
           "looping": "(it repeats itself)"}  # fmt: skip


class Token(NamedTuple):
    """A token, or a piece of one, in its place on the screen."""

    text: str
    begins: float = 0  # the pass after which its place is shown
    known: float = 0  # the pass that fills it; before, it is masked
    style: str = ""


class Screen:
    """Shows answers: pass it as `watch` to `Sampler.answer`. `delay`: seconds that a frame stays, in a terminal."""

    def __init__(self, stream: TextIO | None = None, delay: float = 0.05):
        self.stream, self.delay, self.frames = stream or sys.stdout, delay, []
        self.live = self.stream.isatty()

    def __call__(self, answer: Answer) -> None:
        self.frames.append(frame(answer))
        ending = self.frames[-1].ending
        progress("" if ending else caption(answer.method.method, self.frames, len(self.frames)))
        if ending:
            frames, self.frames = self.frames, []
            self.play(answer, frames)
            said = [text.format(answer.config.max_tokens) for name, text in ENDINGS.items() if getattr(answer, name)]
            self.stream.write("".join(f"{text}\n" for text in said))

    def play(self, answer: Answer, frames: Sequence[Frame]) -> None:
        """Draw the frames of an answer, each over the last one, and at last without what is new; or print some."""
        columns, screen = shutil.get_terminal_size() if self.live else (WIDTH, 0)
        width, height, end = max(2, columns - MARGIN - 1), 0, len(frames) + 1
        lines = [(label, line) for label, tokens in rows(answer, frames) for label, line in wrap(label, tokens, width)]
        says = [caption(answer.method.method, frames, n) for n in range(1, end + 1)]
        for n in [*range(1, end + 1)] if self.live else [*worth_printing(frames), end]:
            begun = max(i for i, (_, line) in enumerate(lines, 1) if line[0].begins <= n)
            shown = [self.draw(*line, n) for line in lines[:begun]]
            if not self.live:
                self.stream.write("\n".join([f"-- {says[n - 1]}", *shown, ""]))
                continue
            room = len(lines) if n == end else min(len(lines), max(1, screen - 2))
            shown = [*shown[-room:], *[""] * (room - len(shown)), " " * MARGIN + says[n - 1][:width]]
            up = f"\x1b[{height}A" if height else ""
            self.stream.write(up + "".join(f"{line}\x1b[K\n" for line in shown))
            self.stream.flush()
            height = len(shown)
            turns = n < end and says[n - 1].partition(": ")[2] != says[n].partition(": ")[2]
            time.sleep(self.delay * (PAUSE if turns else 1))

    def draw(self, label: str, tokens: Sequence[Token], n: int) -> str:
        """A line as it is after n passes."""
        line = self.paint(f"{printable(label)[: MARGIN - 2]:>{MARGIN - 2}}  ", FADED)
        for text, begins, known, style in tokens:
            if n < known:
                text = "".join(c if c == " " else " _"[begins <= n] * columns(c) for c in text)
            style = FADED if n < known else NEW if n == known else style
            word = text.lstrip(" ")
            line += " " * (len(text) - len(word)) + self.paint(word, style)
        return line.rstrip(" ")

    def paint(self, text: str, style: str) -> str:
        return f"\x1b[{style}m{text}\x1b[0m" if style and self.live and text.strip() else text


def progress(text: str) -> None:
    """Say how far a long wait is, where there is a terminal, over what was said last; "" takes it away."""
    if sys.stderr.isatty():
        sys.stderr.write("\r\x1b[K" + text[: shutil.get_terminal_size().columns - 1])
        sys.stderr.flush()


def caption(method: str, frames: Sequence[Frame], n: int) -> str:
    """What the n-th pass did or, after the last one, how many there were."""
    last = frames[-1]
    if n > len(frames) or not last.passes:
        parts = f": {last.plan_passes} for plan and text, {last.denoise_passes} for spans"
        return counted(last.passes, "pass", "passes") + parts * bool(last.denoise_passes)
    total = f" of {len(frames)}" if last.ending else ""
    what = action(method, frames[n - 2] if n > 1 else None, frames[n - 1])
    return f"pass {n}{total}: {what.partition(',')[0]}"


def worth_printing(frames: Sequence[Frame]) -> Iterator[int]:
    """The passes after which spans have just begun, half of their slots have been filled, or a round has ended."""
    stage = None
    for n, now in enumerate(frames[:-1], 1):
        spans = now.rounds[-1].spans if now.rounds else ()
        slots = [slot for span in spans for slot in span]
        before, stage = stage, (len(now.rounds), bool(spans), 2 * slots.count(None) <= len(slots))
        if stage != before and (before or spans):
            yield n


# ---------------------------------------------------------------- where each token is


def rows(answer: Answer, frames: Sequence[Frame]) -> Iterator[tuple[str, list[Token]]]:
    """(label, tokens) of the prompt and of each plan, text and span of a finished answer, and of a legend."""
    born, legend = since(frames), True
    yield "prompt", [Token(answer.prompt, style=BOLD)]
    for r, round_ in enumerate(frames[-1].rounds):
        if round_.text:
            yield "text", [known(text, born["text", r, n]) for n, text in enumerate(round_.text)]
        plan = []
        for k, topic in enumerate(round_.topics):
            texts = ["".join(topic.name[:1]).lstrip(), *topic.name[1:]]
            plan.append(known("  " * (k > 0), born["topic", r, k]))
            plan += [known(text, born["name", r, k, n]) for n, text in enumerate(texts) if text]
            plan += [known(f" {topic.length}", born["length", r, k])] if topic.length else []
        if plan:
            yield "plan", plan
        if legend and round_.spans:
            legend = False
            yield "", [Token(explain(round_, answer.tokenizer.unit), plan[0].begins if plan else 0)]
        for k, span in enumerate(round_.spans):
            label = " ".join("".join(round_.topics[k].name).split()) if round_.topics else ""
            yield label, [Token(" ____" if slot is None else slot or " " * (span[n - 1] != "") + PAD, born["span", r, k],
                                born.get(("slot", r, k, n), math.inf), FADED if slot == "" else "")
                          for n, slot in enumerate(span)]  # fmt: skip


def known(text: str, n: int) -> Token:
    """A token of which nothing is shown before its pass, the n-th."""
    return Token(text, n, n)


def explain(round_: FrameRound, unit: int) -> str:
    """A line that explains what a plan and its spans are drawn with."""
    signs = f"____ masked, {PAD} empty"
    if not round_.topics:
        return f"(a slot holds a token; {signs})"
    topic, slots = round_.topics[0], len(round_.spans[0])
    count = f"{topic.length} x {unit}" if topic.length * unit == slots else slots
    return f"({''.join(topic.name).strip()} {topic.length}: {count} slots, a token each; {signs})"


def wrap(label: str, tokens: Sequence[Token], width: int) -> Iterator[tuple[str, list[Token]]]:
    """(label, tokens) of lines of at most `width` columns, broken between words; a word that is longer is cut."""
    line, used = [], 0
    for word in words(tokens):
        size, gap = sum(columns(piece.text) for piece in word), word[0].text
        if gap == "\n" or (used and used + size > width):
            yield label, line
            label, line, used = "", [], 0
        for piece in word if size <= width else (piece._replace(text=c) for piece in word for c in piece.text):
            text = piece.text.lstrip("\n" if used else " \n")
            if used + columns(text) > width:
                yield label, line
                label, line, used = "", [], 0
            line, used = [*line, piece._replace(text=text)], used + columns(text)
    yield label, line


def words(tokens: Sequence[Token]) -> Iterator[list[Token]]:
    """Words, each with the space before it, and line breaks, in the pieces that tokens contribute to them."""
    word = []
    for token in tokens:
        for text in re.findall(r"\n| ?[^ \n]+| ", printable(token.text)) or [""]:
            if word and (text[:1] in (" ", "\n") or word[0].text == "\n"):
                yield word
                word = []
            word.append(token._replace(text=text))
    if word:
        yield word


def columns(text: str) -> int:
    """How many columns text takes in a terminal: letters of some scripts take two, accents none."""
    return sum(0 if unicodedata.combining(c) else 1 + (unicodedata.east_asian_width(c) in "FW") for c in text)
