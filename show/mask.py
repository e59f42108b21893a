"""Draw the hybrid mask of an example, in the terminal or as a picture.

python show/mask.py --attention causal
"""

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from masks import ATTENTION, GIVEN, PLAN, PROMPT, SLOT, Layout, encode_example, visible
from plumbing.files import atomic
from plumbing.settings import command
from tags import Round, Span, pieces
from tokenizer import Tokenizer

KINDS = {  # of a key: its name, how a terminal draws it, with letters alone, its colour there and in a picture
    PROMPT: ("prompt", "░", "p", 37, "#8c959f"),
    PLAN: ("plan and text", "▒", "t", 36, "#218bff"),
    GIVEN: ("tags and topic of a span", "▓", "g", 33, "#d4a72c"),
    SLOT: ("slot", "█", "s", 32, "#2da44e"),
}
INK = "#747c86"  # text that can be read on light and on dark pages


def otter(attention: str) -> tuple[Layout, Tokenizer]:
    """The example of every picture, and a tokenizer for it: two rounds, the first with two spans."""
    spans = (Span("habitat", "rivers and quiet coasts", 2), Span("food", "fish", 1))
    example = SimpleNamespace(prompt="tell me about otters", rounds=(Round("", spans), Round("playful river animals")))
    words = [example.prompt, *pieces(example.rounds), "habitat food"]
    tokenizer = Tokenizer.train(words * 2, 450, unit=3)
    return encode_example(example, tokenizer, attention), tokenizer


def seen(layout: Layout) -> torch.Tensor:
    """(T, T) bool: which key (column) each query (row) of a layout sees."""
    ranges = torch.tensor([*zip(layout.prefix, layout.begin, layout.end)])
    return visible(ranges[None], len(layout))[0]


def show(layout: Layout, tokenizer: Tokenizer, colours: bool = False, blocks: bool = True) -> Iterator[str]:
    """Lines of the mask, within 80 columns: a row per query, a column per key, drawn by the kind of the key.

    blocks: whether what is written to can encode block characters.
    """
    ink = {kind: block if blocks else letters for kind, (_, block, letters, *_) in KINDS.items()}
    if colours:
        ink = {kind: f"\x1b[{KINDS[kind][3]}m{cell}\x1b[0m" for kind, cell in ink.items()}
    none = "·" if blocks else "."
    for token, row in zip(layout.token, seen(layout).tolist()):
        cells = (ink[kind] if sees else none for sees, kind in zip(row, layout.kind))
        yield f"{tokenizer.name(token).strip():>12} " + "".join(cells)
    yield "rows see columns: " + "  ".join(f"{ink[kind]} {name}" for kind, (name, *_) in KINDS.items())


def encodes_blocks(encoding: str | None) -> bool:
    try:
        "·░▒▓█".encode(encoding or "ascii")
    except (UnicodeEncodeError, LookupError):
        return False
    return True


def save_png(path: str, layouts: dict[str, Layout], tokenizer: Tokenizer) -> None:
    """Draw the masks of up to three layouts (name -> Layout) and a key, on no background.

    Raises ValueError without matplotlib.
    """
    try:
        from matplotlib.colors import to_rgba
        from matplotlib.figure import Figure
        from matplotlib.patches import Patch
    except ImportError:
        raise ValueError("--png needs matplotlib: pip install matplotlib") from None

    colours = {kind: to_rgba(colour) for kind, (*_, colour) in KINDS.items()}
    figure = Figure(figsize=(8.4, 8.6), layout="constrained", facecolor="none")
    *axes, last = figure.subplots(2, 2).flat
    for axis, (name, layout) in zip(axes, layouts.items()):
        sees, n = seen(layout), len(layout)
        axis.imshow(
            [[colours[kind] if see else to_rgba(INK, 0.1) for see, kind in zip(row, layout.kind)] for row in sees]
        )
        names = [tokenizer.name(token).strip() for token in layout.token]
        axis.set_xticks(range(n), names, rotation=90)
        axis.set_yticks(range(n), names)
        axis.tick_params(labelsize=7, length=0, pad=2, colors=INK)
        axis.set_title(name, color=INK, fontweight="bold")
        axis.set_frame_on(False)
    last.set_axis_off()
    key = [Patch(color=colours[kind], label=label) for kind, (label, *_) in KINDS.items()]
    key.append(Patch(color=to_rgba(INK, 0.1), label="not seen"))
    box = last.legend(handles=key, loc="center", labelcolor=INK, frameon=False, fontsize=11)
    box.set_title("A row sees a column that is")
    box.get_title().set_color(INK)
    with atomic(Path(path)) as part:
        figure.savefig(part, dpi=160, format="png")


def main() -> None:
    parser = argparse.ArgumentParser(description="Draw the mask of an example: who sees whom.")
    about = "how span tokens see spans (default: %(default)s)"
    parser.add_argument("--attention", choices=ATTENTION, default=ATTENTION[0], help=about)
    parser.add_argument("--png", help="also draw all three variants into this file (needs matplotlib)")
    args = parser.parse_args()
    print("\n".join(show(*otter(args.attention), sys.stdout.isatty(), encodes_blocks(sys.stdout.encoding))))
    if args.png:
        save_png(args.png, {name: otter(name)[0] for name in ATTENTION}, otter("sparse")[1])


if __name__ == "__main__":
    command(main)
