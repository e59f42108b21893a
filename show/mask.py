"""Draw the hybrid mask of an example, in the terminal or as a picture.

    python show/mask.py --attention causal
"""

import argparse
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from masks import ATTENTION, GIVEN, PLAN, PROMPT, SLOT, encode_example, visible
from tags import Round, Span, pieces
from tokenizer import Tokenizer


def otter(attention):
    """The example of every picture: two rounds, the first with two spans. Returns its layout and tokenizer."""
    spans = (Span("habitat", "rivers and quiet coasts", 2), Span("food", "fish", 1))
    example = SimpleNamespace(prompt="tell me about otters", rounds=(Round("", spans), Round("playful river animals")))
    words = [example.prompt, *pieces(example.rounds), "habitat food"]
    tokenizer = Tokenizer.train(words * 2, 450, unit=3)
    return encode_example(example, tokenizer, attention), tokenizer


def show(layout, tokenizer, colours=False):
    """Lines of the mask: a row a query, a column a key, drawn by the kind of the key."""
    see = torch.tensor([*zip(layout.prefix, layout.begin, layout.end)])
    inks = {PROMPT: ("░░", 37), PLAN: ("▒▒", 36), GIVEN: ("▓▓", 33), SLOT: ("██", 32)}
    inks = {kind: f"\x1b[{colour}m{ink}\x1b[0m" if colours else ink for kind, (ink, colour) in inks.items()}
    for token, row in zip(layout.token, visible(see[None], len(layout))[0].tolist()):
        cells = (inks[kind] if seen else "· " for seen, kind in zip(row, layout.kind))
        yield f"{tokenizer.name(token).strip():>12} " + "".join(cells)
    names = ("prompt", "plan and text", "tags and topic of a span", "slot")
    yield "rows see columns: " + "  ".join(f"{ink} {name}" for ink, name in zip(inks.values(), names))


def save_png(path, layouts, tokenizer):
    """The masks of several layouts (name -> Layout) side by side, as a picture. Needs matplotlib."""
    import matplotlib.pyplot as plt

    palette = np.array([[1, 1, 1], [0.6, 0.6, 0.6], [0.2, 0.6, 0.75], [0.9, 0.7, 0.25], [0.35, 0.7, 0.35]])
    figure, axes = plt.subplots(1, len(layouts), figsize=(6 * len(layouts), 6.6), squeeze=False)
    for axis, (name, layout) in zip(axes[0], layouts.items()):
        see = torch.tensor([*zip(layout.prefix, layout.begin, layout.end)])[None]
        axis.imshow(palette[visible(see, len(layout))[0].numpy() * (np.array(layout.kind) + 1)])
        names = [tokenizer.name(token).strip() for token in layout.token]
        axis.set_xticks(range(len(names)), names, rotation=90, fontsize=7)
        axis.set_yticks(range(len(names)), names, fontsize=7)
        axis.set_title(f"{name}: rows see columns")
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main():
    parser = argparse.ArgumentParser(description="Draw the mask of an example: who sees whom.")
    about = "how span tokens see spans (default: %(default)s)"
    parser.add_argument("--attention", choices=ATTENTION, default=ATTENTION[0], help=about)
    parser.add_argument("--png", help="also draw all three variants into this file (needs matplotlib)")
    args = parser.parse_args()
    print("\n".join(show(*otter(args.attention), sys.stdout.isatty())))
    if args.png:
        save_png(args.png, {name: otter(name)[0] for name in ATTENTION}, otter("sparse")[1])


if __name__ == "__main__":
    main()
