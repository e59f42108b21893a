"""Draw one prompt being answered twice, planned and token by token, as an animated picture (SVG, no scripts).

    python demo/svg.py --out docs/answer.svg

Both answers advance in lockstep, one pass of the network per step. The picture needs no network and no fonts, follows
light and dark mode, and stands still on its last frame for a reader who prefers reduced motion.
"""

import argparse
import re
import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import NamedTuple
from xml.sax.saxutils import escape

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from config import METHODS, SampleConfig
from demo.demo import PROMPTS
from plumbing import device as devices
from plumbing.files import refuse_overwriting, write_whole
from plumbing.settings import Help, command, locate, printable
from sample import Sampler
from show.record import Frame, FrameTopic, action, counted, denoises, record, since

START, STEP, END = 0.8, 0.1, 5.0  # seconds: before the first pass, per pass, and after the last
WIDTH, MARGIN, GAP = 760, 16, 24  # pixels: of the picture, around it, and between the panels
CHARACTER, LINE = 7.8, 18  # pixels: width of a character and height of a line, at font size 13
PANEL = (WIDTH - 2 * MARGIN - GAP) / 2
PAD = "\u00b7"
HOW = {"planned": " (--steps_ratio 0.5)"}  # the settings of SampleConfig()
LEGEND = [  # kind of box, what is in it, and what it means
    ("topic", "craft 4", "topic, length in units of 10 slots"),
    ("rule", "", "span"),
    ("new", "word", "new in this pass"),
    ("", PAD, "[PAD]"),
    ("slot", "", "masked slot, as wide as its token"),
    ("", "positions", "tokens computed so far"),
    ("write", "", "pass that writes plan or text"),
    ("denoise", "", "pass that fills spans"),
    ("empty", "", "no pass"),
]
STYLE = """
.page{fill:#fff;stroke:#d1d9e0}
text{font:13px ui-monospace,SFMono-Regular,Menlo,Consolas,'Liberation Mono',monospace;white-space:pre;fill:#1f2328}
.strong{font-weight:bold}.note{fill:#59636e}.empty,.rule,.slot{fill:#d1d9e0}.new{fill:#fae17d}
.write{fill:#0969da}.denoise{fill:#1a7f37}.write,.denoise{shape-rendering:crispEdges}.topic{fill:none;stroke:#0969da}
@media(prefers-color-scheme:dark){
.page{fill:#0d1117;stroke:#3d444d}
text{fill:#f0f6fc}.note{fill:#9198a1}.empty,.rule,.slot{fill:#3d444d}.new{fill:#7a5b00}
.write{fill:#4493f8}.denoise{fill:#3fb950}.topic{stroke:#4493f8}
}
"""


# ---------------------------------------------------------------- when


class Film:
    """Shapes, each visible from one pass until another. The only place that turns passes into times."""

    def __init__(self, passes: int):
        self.passes, self.seconds = passes, START + passes * STEP + END
        self.shapes = defaultdict(list)

    def add(self, shape: str, first: int = 0, last: int | None = None) -> None:
        """Show a shape after pass `first` (0: from the beginning) and until pass `last` is done (None: to the end)."""
        if first != last:
            self.shapes[first, last].append(shape)

    def percent(self, n_passes: int) -> str:
        """The time at which `n_passes` are done, as a CSS percentage."""
        return f"{100 * (START + n_passes * STEP) / self.seconds:.6g}%"

    def name(self, first: int, last: int | None) -> str:
        return f"from{first}" if last is None else f"from{first}to{last}"

    def keyframes(self, first: int, last: int | None) -> str:
        steps = [("0%", "hidden" if first else "visible")]
        if first:
            steps.append((self.percent(first), "visible"))
        if last is not None:
            steps.append((self.percent(last), "hidden"))
        return "".join(f"{time}{{visibility:{value}}}" for time, value in steps)

    def style(self) -> str:
        """CSS of the animation. Without it the picture is its last frame."""
        moving = [times for times in self.shapes if times != (0, None)]
        named = (f"@keyframes {self.name(*times)}{{{self.keyframes(*times)}}}" for times in moving)
        still = ".until{visibility:hidden}@media(prefers-reduced-motion:reduce){.from,.until{animation:none!important}}"
        return "\n".join([f".from,.until{{animation:{self.seconds:.6g}s step-end infinite}}", *named, still])

    def layers(self) -> list[tuple]:
        """The shapes, those that go again below those that stay: (first and last pass, shapes)."""
        return sorted(self.shapes.items(), key=lambda item: item[0][1] is None)

    def at(self, n: int) -> list[str]:
        """The shapes that are visible after pass n."""
        return [shape for (first, last), shapes in self.layers() if first <= n < (last or n + 1) for shape in shapes]

    def groups(self) -> Iterator[str]:
        for (first, last), shapes in self.layers():
            moving = f' class="{"from" if last is None else "until"}" style="animation-name:{self.name(first, last)}"'
            yield f"<g{moving if (first, last) != (0, None) else ''}>" + "".join(shapes) + "</g>"


# ---------------------------------------------------------------- where


def flow(tokens: Sequence[str], columns: int) -> Iterator[tuple[int, int, int, str]]:
    """Where tokens go in lines of `columns` characters: (number of the token, line, column, text) of each piece.

    Lines break between words; white space at a break is not drawn.
    """
    owner = [n for n, token in enumerate(tokens) for _ in token]
    line, column, places = 0, 0, []
    for word in re.finditer(r"\n| *[^ \n]+| +", "".join(tokens)):
        if column and column + len(word[0]) > columns:
            line, column = line + 1, 0
        for n, character in zip(owner[word.start() : word.end()], word[0]):
            if character == "\n" or column == columns:
                line, column = line + 1, 0
            if character != "\n" and (character != " " or column):
                places.append((n, line, column, character))
                column += 1
    for (n, line), piece in groupby(places, lambda place: place[:2]):
        piece = list(piece)
        content = "".join(character for *_, character in piece)
        if content.strip():
            yield n, line, piece[0][2] + len(content) - len(content.lstrip()), content.strip()


def text(x: float, y: float, content: str, kind: str = "") -> str:
    """One line of text, as wide in every font."""
    kind = f' class="{kind}"' if kind else ""
    width = f' textLength="{len(content) * CHARACTER:.6g}"' if len(content) > 1 else ""
    return f'<text{kind} x="{x:.6g}" y="{y:.6g}"{width}>{escape(printable(content))}</text>'


def box(x: float, y: float, width: float, height: float, kind: str, radius: int = 2) -> str:
    return f'<rect class="{kind}" x="{x:.6g}" y="{y:.6g}" width="{width:.6g}" height="{height}" rx="{radius}"/>'


# ---------------------------------------------------------------- what


class Word(NamedTuple):
    """A token to draw."""

    text: str
    since: int | None  # pass after which it is known; None: never
    slot: int | None = None  # pass after which it has a slot, masked until it is known
    kind: str = ""


def place(film: Film, words: Sequence[Word], x: float, y: float, columns: int) -> float:
    """Draw words from the base line `y` on. Returns the height of their lines."""
    line = -1
    for n, line, column, content in flow([word.text for word in words], columns):
        _, since, slot, kind = words[n]
        left, base, width = x + column * CHARACTER, y + line * LINE, len(content) * CHARACTER
        if slot is not None:
            film.add(box(left, base - 11, width - 1, 14, "slot"), slot, since)
        if since:
            film.add(box(left - 1, base - 12, width + 2, 16, "new"), since, since + 1)
        if since is not None:
            film.add(text(left, base, content, kind), since)
    return (line + 1) * LINE


class Panel:
    """One answer, drawn onto a film from top to bottom; `y` is the base line of what comes next."""

    def __init__(self, film: Film, method: str, frames: Sequence[Frame], x: float, y: float):
        self.film, self.method, self.frames, self.x, self.y = film, method, frames, x, y
        self.steps = [*zip([None, *frames], frames)]  # (frame before, frame after) of each pass
        self.since = since(frames)

    def draw(self) -> None:
        self.film.add(text(self.x, self.y, METHODS[self.method].title + HOW.get(self.method, ""), "strong"))
        self.count()
        self.narrate()
        for r, round_ in enumerate(self.frames[-1].rounds):
            words = [Word(token, self.since["text", r, n]) for n, token in enumerate(round_.text)]
            self.y += place(self.film, words, self.x, self.y, int(PANEL / CHARACTER))
            self.plan(r, round_.topics)
            for k, span in enumerate(round_.spans):
                topic = "".join(round_.topics[k].name).strip() + ":" if round_.topics else ""
                self.span(r, k, topic, span)

    def count(self) -> None:
        """Passes and positions so far, and a bar that grows with each pass."""
        top, width = self.y + LINE + 10, PANEL / self.film.passes
        self.film.add(box(self.x, top, PANEL, 8, "empty"))
        self.film.add(text(self.x, self.y + LINE + 2, "0 passes", "strong"), 0, 1)
        for n, (before, frame) in enumerate(self.steps, 1):
            until = n + 1 if n < len(self.steps) else None
            self.film.add(text(self.x, self.y + LINE + 2, counted(frame.passes, "pass", "passes"), "strong"), n, until)
            positions = counted(frame.positions, "position", "positions")
            self.film.add(text(self.x + 12 * CHARACTER, self.y + LINE + 2, positions, "note"), n, until)
            kind = "denoise" if denoises(before, frame) else "write"
            self.film.add(box(self.x + (n - 1) * width, top, width, 8, kind, 0), n)
        self.y = top + 8 + LINE

    def narrate(self) -> None:
        """What the network does now, and how the answer ended."""
        n, last = 0, self.frames[-1]
        for words, steps in groupby(self.steps, lambda step: action(self.method, *step)):
            first, n = n, n + len(list(steps))
            self.film.add(text(self.x, self.y, words), first, n)
        ending = f"{last.ending} after {counted(last.passes, 'pass', 'passes')}"
        self.film.add(text(self.x, self.y, ending, "strong"), n)
        self.y += LINE + 10

    def plan(self, r: int, topics: Sequence[FrameTopic]) -> None:
        """A box per topic, side by side; its name and length appear in it."""
        x, end = self.x, self.x + PANEL
        for k, topic in enumerate(topics):
            words = [Word(token, self.since["name", r, k, n]) for n, token in enumerate(topic.name)]
            words.append(Word(f" {topic.length}", self.since.get(("length", r, k))))
            columns = len("".join(word.text for word in words).strip())
            if x > self.x and x + (columns + 1) * CHARACTER > end:
                x, self.y = self.x, self.y + LINE + 8
            self.film.add(box(x, self.y - 14, (columns + 1) * CHARACTER, 20, "topic", 4), self.since["topic", r, k])
            place(self.film, words, x + CHARACTER / 2, self.y, columns)
            x += (columns + 2) * CHARACTER
        self.y += (LINE + 12) * bool(topics)

    def span(self, r: int, k: int, topic: str, slots: Sequence[str | None]) -> None:
        """A span beside a rule, its topic first."""
        scaffold, shown = self.since["span", r, k], {None: " ____", "": f" {PAD}"}
        words = [Word(topic, scaffold, kind="strong")]
        since = [self.since.get(("slot", r, k, n)) for n, _ in enumerate(slots)]
        words += [Word(shown.get(slot, slot), known, scaffold) for slot, known in zip(slots, since)]
        height = place(self.film, words, self.x + 10, self.y, int((PANEL - 10) / CHARACTER))
        self.film.add(box(self.x, self.y - 12, 3, height - 3, "rule", 1), scaffold)
        self.y += height + 6


def legend(film: Film, y: float, rows: Sequence[tuple[str, str, str]] = LEGEND, width: int = WIDTH) -> float:
    """Lines that say what the picture's signs mean. Returns the height of the picture."""
    x, bar = MARGIN, (9, 24, 8, 0)  # of a box: its top above the base line, width, height and radius
    boxes = {"rule": (12, 3, 15, 1), "slot": (11, 30, 14), "write": bar, "denoise": bar, "empty": bar}
    for kind, sample, meaning in rows:
        up, wide, *size = boxes.get(kind, (13, len(sample) * CHARACTER + 8, 18, 4))
        if x + wide + 6 + len(meaning) * CHARACTER > width - MARGIN:
            x, y = MARGIN, y + LINE + 6
        if kind:
            film.add(box(x, y - up, wide, *size[:1], kind, *size[1:]))
        if sample:
            film.add(text(x + 4, y, sample))
        film.add(text(x + wide + 6, y, meaning, "note"))
        x += wide + 6 + (len(meaning) + 2) * CHARACTER
    return y + MARGIN


def page(title: str, width: int, height: float, style: str, shapes: Iterable[str]) -> str:
    """A picture as SVG text."""
    return "\n".join([
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height:.0f}" '
        f'viewBox="0 0 {width} {height:.0f}" role="img">',
        f"<title>{escape(printable(title))}</title>",
        f"<style>{style}</style>",
        f'<rect class="page" x=".5" y=".5" width="{width - 1}" height="{height - 1:.0f}" rx="6"/>',
        *shapes,
        "</svg>\n",
    ])  # fmt: skip


def draw(prompt: str, answers: Sequence[tuple[str, Sequence[Frame]]]) -> str:
    """The picture as SVG text; `answers`: (method, frames) of the panels, from left to right."""
    film, y = Film(max(len(frames) for _, frames in answers)), MARGIN + 14
    words = [Word(prompt, 0, kind="strong")]
    y += place(film, words, MARGIN, y, int((WIDTH - 2 * MARGIN) / CHARACTER)) + 18
    panels = [Panel(film, *answer, MARGIN + n * (PANEL + GAP), y) for n, answer in enumerate(answers)]
    for panel in panels:
        panel.draw()
    height = legend(film, max(panel.y for panel in panels) + 10)
    ways = (
        f"{METHODS[method].title.lower()} in {counted(len(frames), 'pass', 'passes')}" for method, frames in answers
    )
    title = f"{prompt} Answered by {', by '.join(ways)}"
    return page(title, WIDTH, height, STYLE + film.style(), film.groups())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=Help)
    shown = "(default: %(default)s)"
    parser.add_argument("--prompt", default=PROMPTS["tasks"], help=f"what both models answer {shown}")
    parser.add_argument("--planned", default="checkpoints/tasks/planned.safetensors", help=f"model on the left {shown}")
    parser.add_argument("--ar", default="checkpoints/tasks/ar.safetensors", help=f"model on the right {shown}")
    parser.add_argument("--out", default="answer.svg", help=f"file to write {shown}")
    parser.add_argument("--device", default="auto", help=f"{', '.join(devices.CHOICES)} {shown}")
    args = parser.parse_args()
    refuse_overwriting([locate(args.planned), locate(args.ar)], out=args.out)
    answers = []
    for path in (args.planned, args.ar):
        sampler = Sampler.load(path, SampleConfig(), devices.find(args.device))
        answers.append((sampler.method.method, record(sampler.answer, args.prompt)))
    write_whole(Path(args.out), draw(args.prompt, answers))
    counts = " and ".join(counted(len(frames), "pass", "passes") for _, frames in answers)
    print(f"{args.out}: {counts}")


if __name__ == "__main__":
    command(main)
