"""Draw the losses of training runs from their log.csv. Needs matplotlib.

python measure/plot.py runs/tasks/log.csv runs/tasks-ar/log.csv --png losses.png
"""

import argparse
import csv
import sys
from pathlib import Path

PANELS = {"plan and text": ("plan", "val_plan"), "spans": ("span", "val_span")}
MEANING = {
    "plan": "training",
    "val_plan": "validation",
    "span": "training (masked slots)",
    "val_span": "validation (ELBO)",
}


def read(path):
    """Columns of a log as lists of (tokens seen, value). Raises ValueError if it is no log."""
    try:
        rows = list(csv.DictReader(Path(path).open()))
        columns = {name: [(int(r["tokens"]) / 1e6, float(r[name])) for r in rows if r[name]] for name in MEANING}
    except (OSError, KeyError, ValueError, TypeError) as error:
        raise ValueError(f"{path} is not the log.csv of a training run ({error!r})") from None
    return {name: points for name, points in columns.items() if any(value for _, value in points)}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("logs", nargs="+", help="log.csv files")
    parser.add_argument("--png", default="losses.png", help="picture to write (default: %(default)s)")
    args = parser.parse_args()
    try:
        logs = {path: read(path) for path in args.logs}
        import matplotlib.pyplot as plt
    except ImportError:
        sys.exit("plot.py: matplotlib is missing: pip install matplotlib")
    except ValueError as error:
        sys.exit(f"plot.py: {error}")
    figure, axes = plt.subplots(1, len(PANELS), figsize=(11, 4.2))
    for axis, (title, names) in zip(axes, PANELS.items()):
        for n, (path, columns) in enumerate(logs.items()):
            for name in names:
                if name in columns:
                    style = dict(marker="o", ms=3) if name.startswith("val") else dict(alpha=0.35)
                    label = f"{Path(path).parent.name}/{Path(path).stem}: {MEANING[name]}"
                    axis.plot(*zip(*columns[name]), color=f"C{n}", label=label, **style)
        axis.set(title=title, xlabel="million tokens seen", ylabel="nats a token", yscale="log")
        axis.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(args.png, dpi=110)
    print(f"wrote {args.png}")


if __name__ == "__main__":
    main()
