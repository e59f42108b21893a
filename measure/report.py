"""The results of frontier.py for readers: one figure of quality per row, a table, and a picture."""

from collections.abc import Callable, Iterator
from pathlib import Path

from plumbing.files import atomic

MEMORY_AND_COPYING = ("facts", "lookups", "transforms")  # the families of the headline figure
MARKERS = "osD^vPX*"


def mean(row: dict, figure: str) -> float:
    """Mean of a figure over the answers that `quality` is taken from: three families of tasks, or all free text."""
    families = MEMORY_AND_COPYING if row["chrf"] is None else ("all",)
    return sum(row["scores"][family][figure] for family in families) / len(families)


def quality(row: dict) -> float:
    """The one figure of the picture: exact answers of the families with one right answer, or chrF / 100."""
    return mean(row, "exact") if row["chrf"] is None else row["chrf"] / 100


def headline(row: dict) -> str:
    return f"quality {quality(row):6.1%}  passes {mean(row, 'passes'):6.1f}  {1e3 * row['seconds_p50']:7.1f} ms"


def table(rows: list[dict]) -> Iterator[str]:
    """Markdown lines, one row per method and setting."""
    families = [name for name in rows[0]["scores"] if name != "all"] if rows[0]["chrf"] is None else []
    of_text = [name for name in ("perplexity", "distinct_1", "distinct_3") if not families and rows[0][name]]
    columns = ["method", "setting", "quality", *families, *of_text, "passes", "critical path", "positions",
               "tokens per pass", "ms (p50)", "ms (p95)"]  # fmt: skip
    yield "| " + " | ".join(columns) + " |"
    yield "|---" * len(columns) + "|"
    for row in rows:
        cells = [row["name"], row["sample"].replace("--", ""), f"{quality(row):.1%}"]
        cells += [f"{row['scores'][family]['exact']:.0%}" for family in families]
        cells += [f"{row[name]:.3g}" for name in of_text]
        cells += [f"{mean(row, cost):.1f}" for cost in ("passes", "critical_path", "positions")]
        cells += [f"{mean(row, 'content_tokens') / max(mean(row, 'passes'), 1):.2f}"]
        cells += [f"{1e3 * row[name]:.0f}" for name in ("seconds_p50", "seconds_p95")]
        yield "| " + " | ".join(cells) + " |"


def plot(rows: list[dict], path: Path) -> None:
    """Write the picture. Without matplotlib, say so."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print("no picture: pip install matplotlib")
        return
    figure = Figure(figsize=(13, 5), layout="tight")
    draw(rows, figure)
    with atomic(path) as part:
        figure.savefig(part, dpi=110, format="png")
    print(f"wrote {path}")


def draw(rows: list[dict], figure) -> None:
    """Quality against passes and against latency, one line per method with its name at its end.

    Markers are hollow and all different, so that none hides another where methods meet.
    """
    from matplotlib.ticker import LogLocator

    axes = figure.subplots(1, 2, sharey=True)
    sides = {
        "forward passes per answer": lambda row: mean(row, "passes"),
        "milliseconds per answer at batch 1 (median)": lambda row: 1e3 * row["seconds_p50"],
    }
    names = list(dict.fromkeys(row["name"] for row in rows))
    for axis, (label, cost) in zip(axes, sides.items()):
        axis.set(xlabel=label, xscale="log")
        axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.xaxis.set_major_formatter("{x:g}")
        axis.xaxis.set_minor_formatter("")
        axis.grid(alpha=0.3)
        lines = {name: points(rows, name, cost) for name in names}
        for n, (name, line) in enumerate(lines.items()):
            marker = dict(marker=MARKERS[n % len(MARKERS)], mfc="none", ms=5 + 1.5 * (len(names) - n))
            axis.plot(*zip(*line), color=f"C{n}", lw=1, **marker)
        costs = [x for line in lines.values() for x, _ in line]
        low, high = min(costs), max(costs)
        axis.set_xlim(low / 1.2, high * max(high / low, 2) ** 0.6)  # to the right: names
        axis.set_ylim(-0.05, 1.05)
    axes[0].set_ylabel("exact answers" if rows[0]["chrf"] is None else "chrF / 100")
    figure.draw_without_rendering()  # settles where things are
    for axis, cost in zip(axes, sides.values()):
        label_ends(axis, {name: points(rows, name, cost) for name in names})


def points(rows: list[dict], name: str, cost: Callable) -> list[tuple[float, float]]:
    """(cost, quality) of a method's rows, the cheapest first."""
    return sorted((cost(row), quality(row)) for row in rows if row["name"] == name)


def label_ends(axis, lines: dict[str, list]) -> None:
    """Write each line's name beside its last point, at the nearest height where it covers no name and no point."""
    dots, boxes = [axis.transData.transform(point) for line in lines.values() for point in line], []
    for n, (name, line) in enumerate(lines.items()):
        text = axis.annotate(
            name, line[-1], (12, 0), textcoords="offset points", color=f"C{n}", fontsize=8, va="center"
        )
        for height in sorted(range(-300, 301, 5), key=abs):
            text.set_position((12, height))
            box = text.get_window_extent()
            free = not any(box.overlaps(other) for other in boxes) and not any(box.contains(*dot) for dot in dots)
            if free and axis.bbox.y0 < box.y0 and box.y1 < axis.bbox.y1:
                break
        boxes.append(box)
