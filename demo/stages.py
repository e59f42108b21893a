"""Draw the stages of one answer as a picture (SVG): its plan, its scaffold, each denoising pass, and the next round.

    python demo/stages.py --out docs/stages.svg

All that the picture shows comes from a recording of the sampler. It denoises in few steps, so that each can be drawn.
The prompt is the first of the tasks' test split whose answer has a second round.
"""

import argparse
import math
import sys
from collections.abc import Sequence
from fractions import Fraction
from itertools import groupby
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from config import SampleConfig
from demo.svg import CHARACTER, LEGEND, LINE, MARGIN, PAD, STYLE, Film, Word, box, legend, page, place, text
from plumbing.device import find
from plumbing.files import refuse_overwriting, write_whole
from plumbing.settings import Help, command, locate
from sample import Sampler
from show.record import Frame, FrameRound, counted, denoises, record, since

CHECKPOINT, CONFIG = "checkpoints/tasks/planned.safetensors", SampleConfig(steps_ratio=0.07)
PROMPT = ("The singer finds five onions, then five and later four. How many are there? Count from the end, the start "
          "and the outer.")  # fmt: skip
WIDTH = 640  # pixels
COLUMNS = int((WIDTH - 2 * MARGIN) / CHARACTER)
PLAN = "One token per pass. The grammar forces </topic>, which takes no pass; the last pass chooses <sync/>."
SPANS = ("{0} steps (--steps_ratio {1}). After step s at least s/{0} of each span's slots are filled, the most certain "
         "first. Spans do not see each other; prompt and plan do not see them.")  # fmt: skip
NEXT = "The pass that reads <sync/> computes the finished spans once more: the text sees them without masks."


class Stages:
    """The picture from top to bottom; `y` is the base line of what comes next."""

    def __init__(self, prompt: str, frames: Sequence[Frame]):
        self.frames, self.since, self.shapes, self.y = frames, since(frames), [], MARGIN + 14.0
        self.heading("Prompt")
        self.write([Word("<user>", 0, kind="note"), Word(f" {prompt}", 0), Word(" <assistant>", 0, kind="note")])
        steps = enumerate(zip([None, *frames], frames), 1)
        for (r, filling), group in groupby(steps, lambda step: stage(*step[1])):
            passes = [n for n, _ in group]
            round_ = frames[-1].rounds[r]
            name = "Spans" if filling else "Plan" if round_.topics else "Text"
            name += " of the next round" * (r > 0 and not filling)
            self.heading(f"{name}, {f'passes {passes[0]} to {passes[-1]}' if passes[1:] else f'pass {passes[0]}'}")
            if filling:
                self.denoise(r, passes)
            else:
                self.note(NEXT if r else PLAN)
                self.write(tagged(round_, r, frames[-1].ending == "finished" and r == len(frames[-1].rounds) - 1))

    def heading(self, words: str) -> None:
        self.y += 14 * bool(self.shapes)
        self.shapes.append(text(MARGIN, self.y, words, "strong"))
        self.y += LINE + 4

    def note(self, words: str) -> None:
        self.write([Word(words, 0, kind="note")])

    def write(self, words: Sequence[Word], n: int = 0, indent: int = 0) -> None:
        """Words as they are after pass n; indented ones beside a rule."""
        film = Film(len(self.frames))
        height = place(film, words, MARGIN + indent, self.y, COLUMNS - 2 * bool(indent))
        if indent:
            film.add(box(MARGIN, self.y - 12, 3, height - 3, "rule", 1))
        self.shapes += film.at(n)
        self.y += height + 4

    def denoise(self, r: int, passes: Sequence[int]) -> None:
        """The spans of a round before its first pass and after each."""
        spans = self.frames[-1].rounds[r].spans
        steps = math.ceil(Fraction(str(CONFIG.steps_ratio)) * max(map(len, spans)))
        self.note(SPANS.format(steps, CONFIG.steps_ratio))
        for n in (passes[0] - 1, *passes):
            self.y += 4
            now = self.frames[n - 1].rounds[r].spans
            filled = " + ".join(str(len(span) - span.count(None)) for span in now)
            label = f"after pass {n}: {filled} of {sum(map(len, now))} slots filled"
            self.note(label if n in passes else f"scaffold: {' + '.join(str(len(span)) for span in now)} masked slots")
            for k, span in enumerate(spans):
                self.write(self.span(r, k, span, n), n, 10)

    def span(self, r: int, k: int, slots: Sequence[str], n: int) -> list[Word]:
        topic = "".join(self.frames[-1].rounds[r].topics[k].name)
        words = [Word("<async>", 0, kind="note"), Word(f"{topic}:", 0, kind="strong")]
        known = [self.since.get(("slot", r, k, i)) for i, _ in enumerate(slots)]
        words += [Word(slot or f" {PAD}", since, 0) for slot, since in zip(slots, known)]
        return [*words, Word(" </async>", 0, kind="note")]


def stage(before: Frame | None, frame: Frame) -> tuple[int, bool]:
    """What the pass between two frames works on: its round, and whether on spans."""
    return len(before.rounds) - 1 if before else 0, denoises(before, frame)


def tagged(round_: FrameRound, r: int, last: bool) -> list[Word]:
    """Text and plan of a round with their tags."""
    pieces = [("<sync/>", "note")] * (r > 0) + [(token, "") for token in round_.text]
    for topic in round_.topics:
        name = "".join(topic.name)
        pieces += [("<topic>", "note"), (name, "strong"), (f" {topic.length}", ""), ("</topic>", "note")]
    return [Word(piece, 0, kind=kind) for piece, kind in pieces + [("<eos>", "note")] * last]


def draw(prompt: str, frames: Sequence[Frame]) -> str:
    """The picture as SVG text, of a recording that was sampled with `CONFIG`."""
    stages, key = Stages(prompt, frames), Film(len(frames))
    height = legend(key, stages.y + 14, LEGEND[1:5], WIDTH)
    title = f"{prompt} The stages of an answer in {counted(len(frames), 'pass', 'passes')}"
    return page(title, WIDTH, height, STYLE, stages.shapes + key.at(0))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=Help)
    parser.add_argument("--out", default="stages.svg", help="file to write (default: %(default)s)")
    args = parser.parse_args()
    refuse_overwriting([locate(CHECKPOINT)], out=args.out)
    frames = record(Sampler.load(CHECKPOINT, CONFIG, find("cpu")).answer, PROMPT)
    write_whole(Path(args.out), draw(PROMPT, frames))
    print(f"{args.out}: {counted(len(frames), 'pass', 'passes')}")


if __name__ == "__main__":
    command(main)
