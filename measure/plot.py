"""Draw the losses of training runs from their log.csv. Needs matplotlib.

python measure/plot.py runs/tasks/log.csv runs/tasks-ar/log.csv --png losses.png
"""

import argparse
import csv
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the project's modules

from plumbing.files import atomic
from plumbing.settings import command

PANELS = {"plan and text": ("plan", "val_plan"), "spans": ("span", "val_span")}
MEANING = {
    "plan": "training",
    "val_plan": "validation",
    "span": "training (masked slots)",
    "val_span": "validation (ELBO)",
}


def read(path: str) -> dict[str, list]:
    """Columns of a log, each a list of (million tokens seen, value). Raises ValueError if it is no log."""
    try:
        rows = list(csv.DictReader(Path(path).open(encoding="utf-8")))
        columns = {name: [(int(r["tokens"]) / 1e6, float(r[name])) for r in rows if r[name]] for name in MEANING}
    except (KeyError, ValueError, TypeError) as error:
        raise ValueError(f"{path}: expected the log.csv of a training run, but: {error!r}") from None
    if not any(columns.values()):
        raise ValueError(f"{path}: no losses yet: it has its first after --log_every updates")
    return {name: points for name, points in columns.items() if any(value for _, value in points)}


def draw(logs: dict[str, dict], figure) -> None:
    """A panel for each of the two losses, a colour for each log."""
    for axis, (title, names) in zip(figure.subplots(1, len(PANELS)), PANELS.items()):
        for n, (path, columns) in enumerate(logs.items()):
            for name in names:
                if name in columns:
                    style = dict(marker="o", ms=3) if name.startswith("val") else dict(alpha=0.35)
                    label = f"{Path(path).parent.name}/{Path(path).stem}: {MEANING[name]}"
                    axis.plot(*zip(*columns[name]), color=f"C{n}", label=label, **style)
        axis.set(title=title, xlabel="million tokens seen", ylabel="nats per token", yscale="log")
        if axis.lines:
            axis.legend(fontsize=7)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("logs", nargs="+", help="log.csv files")
    parser.add_argument("--png", default="losses.png", help="picture to write (default: %(default)s)")
    args = parser.parse_args()
    logs = {path: read(path) for path in args.logs}
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ValueError("matplotlib is missing: pip install matplotlib") from None
    figure = Figure(figsize=(11, 4.2), layout="tight")
    draw(logs, figure)
    with atomic(args.png) as part:
        figure.savefig(part, dpi=110, format="png")
    print(f"wrote {args.png}")


if __name__ == "__main__":
    command(main)
