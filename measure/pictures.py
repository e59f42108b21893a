"""What the project's plots share: markers that hide nothing, axes a person can read, text where there is room."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from plumbing.files import atomic

MARKERS = "osD^vPX*"
MARGIN = 5  # pixels between a text and the points that it must not cover
FAR = 20  # points between a text and its point from which on a line leads there


@dataclass
class Label:
    """A text that belongs to a point, in data coordinates."""

    text: str
    point: tuple[float, float]
    colour: str
    beside: bool = True  # to the right of the point; if not, anywhere around it


def marker(n: int, lines: int, growth: float = 1.0) -> dict:
    """How line n of several marks its points: hollow, and no two the same, so that none hides another."""
    return dict(marker=MARKERS[n % len(MARKERS)], mfc="none", ms=5 + growth * (lines - n))


def tidy(axis, **scales: str) -> None:
    """Logarithmic axes with plain numbers, and a light grid. scales: xscale="log", yscale="log", both or neither."""
    from matplotlib.ticker import LogLocator

    axis.set(**scales)
    for name, ticks in (("xscale", axis.xaxis), ("yscale", axis.yaxis)):
        if scales.get(name) == "log":
            low, high = ticks.get_view_interval()
            ticks.set_major_locator(LogLocator(subs=(1, 2, 5) if high > 5 * low else range(1, 10)))
            ticks.set_major_formatter("{x:g}")
            ticks.set_minor_formatter("")
    axis.grid(alpha=0.3)
    axis.spines[["top", "right"]].set_visible(False)


def write_labels(axis, labels: list[Label], points: Iterable[tuple[float, float]]) -> None:
    """Write each label as near to its point as it covers no other label and none of the points.

    A thin line leads to labels that are far from their points. The figure has to be laid out (`draw_without_rendering`)
    and its limits have to be final.
    """
    dots, boxes = [axis.transData.transform(point) for point in points], []
    for label in labels:
        text = axis.annotate(label.text, label.point, (0, 0), textcoords="offset points", color=label.colour,
                             fontsize=8, va="center", ha="left" if label.beside else "center")  # fmt: skip
        places = [(x, y) for x in ([12] if label.beside else range(-100, 101, 20)) for y in range(-300, 301, 5)]
        for text_place in sorted(places, key=lambda place: abs(place[0]) + abs(place[1])):
            text.set_position(text_place)
            box = text.get_window_extent()
            wide = box.padded(MARGIN)
            free = not any(box.overlaps(other) for other in boxes) and not any(wide.contains(*dot) for dot in dots)
            if free and axis.bbox.containsx(box.x0) and axis.bbox.y0 < box.y0 and box.y1 < axis.bbox.y1:
                break
        boxes.append(box)
        if max(map(abs, text_place)) > FAR:
            line = {"arrowstyle": "-", "color": label.colour, "lw": 0.6, "alpha": 0.6, "shrinkA": 0, "shrinkB": 4}
            axis.annotate("", label.point, text_place, textcoords="offset points", arrowprops=line)


def save(figure, path: str | Path) -> None:
    """Write a PNG and say so."""
    with atomic(path) as part:
        figure.savefig(part, dpi=110, format="png")
    print(f"wrote {path}")
