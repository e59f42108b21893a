"""An answer in the terminal while it is made: the plan appears, then its spans fill in place.

In a terminal frames overwrite each other in colours. When piped, a few frames are printed as plain text.
"""

import shutil
import sys
import time

from masks import SLOT

FADED, BOLD, NEW, PLAN_COLOUR = "2", "1", "1;32", "36"
MASKED = " ____"  # a slot not yet filled


class Screen:
    """Shows answers: pass it as `watch` to `Sampler.answer`. `delay`: seconds a frame stays, in a terminal."""

    def __init__(self, stream=sys.stdout, delay=0.06):
        self.stream, self.delay, self.live = stream, delay, stream.isatty()
        self.height, self.before, self.shown = 0, {}, None

    def __call__(self, answer):
        if self.live:
            size = shutil.get_terminal_size()
            lines = self.frame(answer, size.columns)[-(size.lines - 1) :]
            up = f"\x1b[{self.height}A\x1b[J" if self.height else ""
            self.stream.write(up + "\n".join(lines) + "\n")
            self.stream.flush()
            self.height = len(lines) if answer.phase else 0
            time.sleep(self.delay)
        elif self.key_frame(answer):
            passes = f"-- after {answer.plan_passes} plan and {answer.denoise_passes} denoising passes\n"
            self.stream.write(passes + "\n".join(self.frame(answer, 100)) + "\n")

    def key_frame(self, answer):
        """Whether to print a frame if nothing can be overwritten: at a new stage, and halfway through the spans."""
        state = (len(answer.rounds), type(answer.phase), self.halfway(answer))
        self.shown, before = state, self.shown
        return not answer.phase or (state != before and not (before is None and not answer.rounds[-1].spans))

    def halfway(self, answer):
        """Whether half of the newest spans' slots are filled."""
        slots = [i for round_ in answer.rounds[-1:] for span in round_.spans for i in answer.contents(span)]
        return 2 * slots.count(answer.tokenizer.mask) <= len(slots)

    def frame(self, answer, width):
        """The lines of an answer as it stands."""
        lines, now = [], {}
        for label, style, entries in self.rows(answer):
            cells = []
            for key, text, token_style in entries:
                now[key] = text
                fresh = self.before.get(key, MASKED) == MASKED and text != MASKED and style is None
                cells.append((text, NEW if fresh and self.live else token_style))
            lines += self.wrap(label, cells, width)
        self.before = now
        return lines

    def rows(self, answer):
        """(label, style, [(key, text, style) of a token]) of the prompt and of each plan, text and span."""
        tok, layout = answer.tokenizer, answer.layout
        yield "prompt", BOLD, [(None, answer.prompt, BOLD)]
        for number, round_ in enumerate(answer.rounds):
            if round_.text:
                yield "text", None, [((number, n), tok.name(i), None) for n, i in enumerate(round_.text)]
            if round_.topics:
                plan = [f"{tok.decode(name)} {length or ''} " for name, length in round_.topics]
                yield "plan", PLAN_COLOUR, [(None, text + " ", PLAN_COLOUR) for text in plan]
            for (name, _), (start, stop) in zip(round_.topics, round_.spans):
                slots = [(i, layout.token[i]) for i in range(start, stop) if layout.kind[i] == SLOT]
                yield tok.decode(name), None, [(i, *self.slot(tok, token)) for i, token in slots if token != tok.pad]

    def slot(self, tok, token):
        return (MASKED, FADED) if token == tok.mask else (tok.name(token), None)

    def wrap(self, label, cells, width):
        """Lines of at most `width` columns, the label in a column of its own."""
        margin, lines, line, used = 14, [], "", 0
        for text, style in (part for text, style in cells for part in split(text, style, width - margin - 1)):
            if used + len(text) > width - margin - 1 and used:
                lines, line, used = [*lines, line], "", 0
            text = text if used else text.lstrip(" ")
            if text == "\n":
                lines, line, used = [*lines, line], "", 0
                continue
            line, used = line + self.paint(text, style), used + len(text)
        head = self.paint(f"{label[: margin - 2]:>{margin - 2}}  ", FADED)
        return [(head if n == 0 else " " * margin) + line for n, line in enumerate([*lines, line])]

    def paint(self, text, style):
        return f"\x1b[{style}m{text}\x1b[0m" if style and self.live else text


def split(text, style, width):
    """Cut text into line breaks and words of at most `width` characters, as (text, style) each."""
    text = "".join(c if c.isprintable() or c == "\n" else "?" for c in text)  # no control codes to the terminal
    for n, line in enumerate(text.split("\n")):
        if n:
            yield "\n", None
        for m, word in enumerate(line.split(" ")):
            part = (" " if m else "") + word
            for start in range(0, len(part), width):
                yield part[start : start + width], style
