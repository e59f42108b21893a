"""The results of frontier.py for readers: one figure of quality per row, a table, and a picture.

A row is one method and setting; with several seeds it holds one report of eval.py per seed.
"""

from collections.abc import Callable, Iterator
from pathlib import Path

from measure.pictures import Label, marker, save, tidy, write_labels
from measure.quality import cell

MEMORY_AND_COPYING = ("facts", "lookups", "transforms")  # the families of the headline figure


def free_text(report: dict) -> bool:
    """Whether there is no checker that says which answers are right."""
    return "chrF" in report["readers"]


def mean(report: dict, figure: str) -> float:
    """Mean of a figure over the answers that `quality` is taken from: three families of tasks, or all free text."""
    families = ("all",) if free_text(report) else MEMORY_AND_COPYING
    return sum(report["scores"][family][figure] for family in families) / len(families)


def quality(report: dict) -> float:
    """The one figure of the picture: exact answers of the families with one right answer, or chrF / 100."""
    return report["readers"]["chrF"]["value"] / 100 if free_text(report) else mean(report, "exact")


def tokens_per_pass(report: dict) -> float:
    return mean(report, "content_tokens") / max(mean(report, "passes"), 1)


def headline(report: dict) -> str:
    return f"quality {quality(report):6.1%}  passes {mean(report, 'passes'):6.1f}  {milliseconds(report):7.1f} ms"


def milliseconds(report: dict) -> float:
    return 1e3 * report["seconds_p50"]


Figure = tuple[str, Callable[[dict], float]]  # how it is written, and how it is got from a report


def columns(report: dict) -> dict[str, Figure]:
    """The figures of the table by their names."""
    text = free_text(report)
    shown = {"chrF" if text else "quality": ("{:.1%}", quality)}
    for family in () if text else report["scores"]:
        if family != "all":
            shown[family] = "{:.0%}", lambda r, f=family: r["scores"][f]["exact"]
    for name in report["readers"] if text else ():
        if name != "chrF":
            shown[name] = "{:.3g}", lambda r, n=name: r["readers"][n]["value"]
    for name in ("distinct_1", "distinct_3") if text else ():
        shown[name] = "{:.3g}", lambda r, n=name: r[n]
    for cost in ("passes", "critical_path", "positions"):
        shown[cost.replace("_", " ")] = "{:.1f}", lambda r, c=cost: mean(r, c)
    shown["tokens per pass"] = "{:.2f}", tokens_per_pass
    return shown | {
        "ms (p50)": ("{:.0f}", milliseconds),
        "ms (p95)": ("{:.0f}", lambda r: 1e3 * r["seconds_p95"]),
        "ms (p50) at batch 8": ("{:.0f}", lambda r: 1e3 * r["seconds_batch_8"]),
    }


def spread(values: list[float], form: str) -> str:
    """Mean of the seeds and, where they do not all read the same, the lowest and the highest."""
    middle, low, high = (form.format(v) for v in (sum(values) / len(values), min(values), max(values)))
    return middle if low == high else f"{middle} ({low} to {high})"


def table(rows: list[dict]) -> Iterator[str]:
    """Markdown lines, one row per method and setting."""
    shown = columns(rows[0]["seeds"][0])
    yield "| " + " | ".join(["method", "setting", *map(cell, shown)]) + " |"
    yield "|---" * (2 + len(shown)) + "|"
    for row in rows:
        cells = [spread([get(report) for report in row["seeds"]], form) for form, get in shown.values()]
        yield "| " + " | ".join([row["name"], row["sample"].replace("--", ""), *cells]) + " |"


# ---------------------------------------------------------------- picture


def plot(rows: list[dict], path: Path) -> None:
    """Write the picture. Without matplotlib, say so."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print("no picture: pip install matplotlib")
        return
    figure = Figure(figsize=(13, 5), layout="tight")
    draw(rows, figure)
    save(figure, path)


SIDES = {
    "forward passes per answer": lambda report: mean(report, "passes"),
    "milliseconds per answer at batch 1 (median)": milliseconds,
}


def draw(rows: list[dict], figure) -> None:
    """Quality against passes and against latency, one line per method with its name at its end.

    A point is the mean of the seeds; bars reach from the lowest to the highest, of quality and of cost.
    """
    axes = figure.subplots(1, len(SIDES), sharey=True)
    names, drawn = list(dict.fromkeys(row["name"] for row in rows)), []
    for axis, (label, cost) in zip(axes, SIDES.items()):
        lines = {name: points([row for row in rows if row["name"] == name], cost) for name in names}
        for n, line in enumerate(lines.values()):
            x, y, x_bars, y_bars = zip(*line)
            axis.plot(x, y, color=f"C{n}", lw=1, **marker(n, len(lines)))
            axis.hlines(y, *zip(*x_bars), color=f"C{n}", lw=3, alpha=0.4)
            axis.vlines(x, *zip(*y_bars), color=f"C{n}", lw=3, alpha=0.4)
        costs = [x for line in lines.values() for x, *_ in line]
        low, high = min(costs), max(costs)
        tidy(axis, xscale="log")
        axis.set(xlabel=label, xlim=(low / 1.2, high * max(high / low, 2) ** 0.6))  # to the right: names
        axis.margins(y=0.2)
        drawn.append(lines)
    axes[0].set_ylabel("chrF / 100" if free_text(rows[0]["seeds"][0]) else "exact answers")
    figure.draw_without_rendering()  # settles where things are
    for axis, lines in zip(axes, drawn):
        labels = [Label(name, line[-1][:2], f"C{n}") for n, (name, line) in enumerate(lines.items())]
        write_labels(axis, labels, [point[:2] for line in lines.values() for point in line])


def points(rows: list[dict], cost: Callable[[dict], float]) -> list[tuple]:
    """Of each row (mean cost, mean quality, lowest and highest cost, lowest and highest quality), the cheapest first."""
    found = []
    for row in rows:
        both = [[get(report) for report in row["seeds"]] for get in (cost, quality)]
        found.append((*(sum(seeds) / len(seeds) for seeds in both), *((min(seeds), max(seeds)) for seeds in both)))
    return sorted(found)
