r"""Draw the losses of training runs from their log.csv. Needs matplotlib.

    python measure/plot.py runs/tasks/log.csv runs/tasks-ar/log.csv --png losses.png
    python measure/plot.py planned=runs/a/log.csv planned=runs/b/log.csv ar=runs/c/log.csv \
      --x epochs --updates_per_epoch 517 --losses plan span

A panel per loss. Thin lines are the training loss, lines with markers the validation loss, whose best value is written
beside a filled marker. Logs of the same label are seeds: the line is their mean, the band reaches from the lowest to the
highest.
"""

import argparse
import csv
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the project's modules

import numpy as np

from measure.pictures import Label, marker, save, tidy, write_labels
from plumbing.files import refuse_overwriting
from plumbing.settings import Help, command

LOSSES = {
    "plan": "plan and text",
    "span": "spans, denoised (validation: ELBO)",
    "causal": "spans, left to right",
    "plan_draft": "drafts of plan and text",
    "span_draft": "drafts of spans",
}
VALIDATION = "val_"
LARGEST = 1e18  # of steps or tokens; more is no log, and nothing that an axis can hold
X = {"updates": ("step", 1, "updates"), "tokens": ("tokens", 1e6, "million tokens")}
Curve = tuple[np.ndarray, np.ndarray]  # x (n,), and values (seeds, n)


def read(path: str, column: str = "step", unit: float = 1) -> dict[str, dict[float, float]]:
    """Loss -> {column / unit: its value}, of a log. Losses that are 0 throughout are left out.

    Raises ValueError if the file is no log, or holds no losses.
    """
    found = {}
    try:
        with Path(path).open(encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        if rows and column not in rows[0]:
            raise ValueError(f"it has no column {column}")
        for name in (start + loss for loss in LOSSES for start in ("", VALIDATION)):
            values = {float(row[column]) / unit: float(row[name]) for row in rows if row.get(name)}
            if not all(0 <= x < LARGEST and abs(y) < LARGEST for x, y in values.items()):
                raise ValueError(f"{column} of {name}: expected numbers from 0 to below {LARGEST:.0e}")
            found |= {name: values} if any(values.values()) else {}
    except (KeyError, ValueError, TypeError, csv.Error) as error:
        raise ValueError(f"{path}: expected the log.csv of a training run, but: {error!r}") from None
    if not found:
        raise ValueError(f"{path}: no losses yet: it has its first after --log_every updates")
    return found


def gather(logs: list[tuple[str, dict]]) -> dict[str, dict[str, Curve]]:
    """Label -> loss -> curve, where all logs of the label have the loss. Raises ValueError if they never have it."""
    by_label = {}
    for label, log in logs:
        by_label.setdefault(label, []).append(log)
    curves = {}
    for label, seeds in by_label.items():
        curves[label] = {}
        for name in dict.fromkeys(name for log in seeds for name in log):
            common = sorted(set.intersection(*(set(log.get(name, ())) for log in seeds)))
            if not common:
                raise ValueError(f"{label}: its {len(seeds)} logs have no value of {name} at the same place: "
                                 "give them different labels")  # fmt: skip
            curves[label][name] = np.array(common), np.array([[log[name][x] for x in common] for log in seeds])
    return curves


def draw(curves: dict[str, dict[str, Curve]], losses: list[str], x_label: str, figure) -> None:
    """A panel for each of the losses, a colour for each label; every curve has its name at its end."""
    columns, rows = grid(len(losses))
    axes = figure.subplots(rows, columns, squeeze=False).flatten()
    drawn = [draw_panel(axis, curves, loss) for axis, loss in zip(axes, losses)]
    for axis, loss, (_, points) in zip(axes, losses, drawn):
        tidy(axis, yscale="log")
        xs = [x for x, _ in points]
        axis.set_xlim(min(xs) - 0.03 * np.ptp(xs), max(xs) + 0.45 * max(np.ptp(xs), 1e-9))  # to the right: names
        axis.set(title=LOSSES[loss], xlabel=x_label)
    for axis in axes[::columns]:
        axis.set_ylabel("nats per token")
    for axis in axes[len(losses) :]:
        axis.remove()
    figure.draw_without_rendering()  # settles where things are
    for axis, (labels, points) in zip(axes, drawn):
        write_labels(axis, labels, points)


def grid(panels: int) -> tuple[int, int]:
    """Columns, up to three, and rows of the picture."""
    return min(panels, 3), -(-panels // 3)


def draw_panel(axis, curves: dict[str, dict[str, Curve]], loss: str) -> tuple[list[Label], list[tuple]]:
    """Draw a loss of every label; returns the labels to write and the points that they must not cover."""
    labels, points = [], []
    for n, (label, found) in enumerate(curves.items()):
        for name in (loss, VALIDATION + loss):
            if name not in found:
                continue
            x, values = found[name]
            mean, colour, valid = values.mean(0), f"C{n}", name.startswith(VALIDATION)
            every = max(1, len(x) // 10)
            style = {"lw": 1.5, **marker(n, len(curves), 0.7)} if valid else {"lw": 0.8, "alpha": 0.6}
            axis.plot(x, mean, color=colour, **style, markevery=(n % every, every))
            if len(values) > 1:
                axis.fill_between(x, values.min(0), values.max(0), color=colour, alpha=0.15, lw=0)
            points += zip(x, mean)
            labels.append(Label(label if valid else f"{label}, training", (x[-1], mean[-1]), colour))
            if valid:
                best = mean.argmin()
                axis.plot(x[best], mean[best], color=colour, **style | {"mfc": colour})
                labels.append(Label(f"{mean[best]:.3f} at {x[best]:.4g}", (x[best], mean[best]), colour, beside=False))
    return labels, points


def named(text: str) -> tuple[str, str]:
    """Label and path of an argument: LABEL=PATH, or a path alone, whose label is its folder or its own name."""
    path = Path(text)
    if "=" in text and not path.exists():
        label, _, rest = text.partition("=")
        return label, rest
    return path.absolute().parent.name if path.stem == "log" else path.stem, text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=Help)
    parser.add_argument("logs", nargs="+", help="log.csv files, each with or without LABEL= before it")
    parser.add_argument("--x", choices=[*X, "epochs"], default="updates", help="(default: %(default)s)")
    parser.add_argument("--updates_per_epoch", type=float, default=0, help="examples / batch, for --x epochs")
    parser.add_argument("--losses", nargs="+", choices=LOSSES, metavar="LOSS",
                        help="panels: %(choices)s (default: all that a log has)")  # fmt: skip
    parser.add_argument("--png", default="losses.png", help="picture to write (default: %(default)s)")
    args = parser.parse_args()
    if args.x == "epochs" and not args.updates_per_epoch > 0:
        raise ValueError(f"--updates_per_epoch {args.updates_per_epoch}: expected more than 0 for --x epochs")
    column, unit, x_label = X.get(args.x, ("step", args.updates_per_epoch, "epochs"))
    logs = [*map(named, args.logs)]
    refuse_overwriting([path for _, path in logs], png=args.png)
    curves = gather([(label, read(path, column, unit)) for label, path in logs])
    names = {name.removeprefix(VALIDATION) for found in curves.values() for name in found}
    losses = [loss for loss in LOSSES if loss in names and loss in (args.losses or LOSSES)]
    if not losses:
        raise ValueError(f"--losses {' '.join(args.losses)}: the logs have only {', '.join(sorted(names))}")
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ValueError("matplotlib is missing: pip install matplotlib") from None
    columns, rows = grid(len(losses))
    figure = Figure(figsize=(5.5 * columns, 4.6 * rows), layout="tight")
    draw(curves, losses, x_label, figure)
    save(figure, args.png)


if __name__ == "__main__":
    command(main)
