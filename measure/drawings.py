"""The pictures of the page on the paper, from the same figures as its tables. Needs matplotlib."""

import textwrap
from statistics import mean

from measure.beyond import WAYS
from measure.claims import (
    POINTS,
    RATIOS,
    SCALES,
    SURE,
    THRESHOLDS,
    Found,
    calls,
    chrf,
    grid_reports,
    over,
    right,
    scaled,
    shown,
)
from measure.models import EPOCHS, STUDIED
from measure.pictures import Label, marker, tidy, write_labels

PATH = {"autoregression": ("ar", ""), "parallel autoregression": ("parallel-ar", ""), "planned, dense": ("dense", SURE),
        "planned, sparse": ("planned", SURE), "planned, sparse, 0.25": ("planned", "--steps_ratio 0.25"),
        "joint, drafts": ("joint", f"--ahead 8 {SURE}")}  # fmt: skip


def spans_of(values: list[list[float]]) -> tuple:
    """Of each list of seeds the mean, the lowest and the highest."""
    return tuple(zip(*((mean(v), min(v), max(v)) for v in values)))


def band(axis, x: list, values: list[list[float]], n: int, lines: int, label: str) -> None:
    middle, low, high = spans_of(values)
    axis.plot(x, middle, color=f"C{n}", label=label, lw=1.2, **marker(n, lines, 0.3))
    axis.fill_between(x, low, high, color=f"C{n}", alpha=0.15, lw=0)


def frontier(f: Found, figure) -> None:
    """Right answers against passes: a line per method, its settings from few passes to many."""
    axis, labels, dots = figure.subplots(), [], []
    for n, (name, (model, settings, draft)) in enumerate(POINTS.items()):
        reports = [f.reports(model, sample, draft) for sample in settings or ("",)]
        points = sorted((mean(map(calls, r)), mean(map(right, r))) for r in reports)
        axis.plot(*zip(*points), color=f"C{n % 10}", lw=1, **marker(n, 8, 0.3))
        for r in reports:
            axis.vlines(
                mean(map(calls, r)), min(map(right, r)), max(map(right, r)), color=f"C{n % 10}", lw=3, alpha=0.3
            )
        labels.append(Label(name, points[-1], f"C{n % 10}", beside=False))
        dots += points
    tidy(axis, xscale="log")
    axis.set(
        xlabel="passes per answer, those of a second model included (fewer is faster)",
        ylabel="right answers, %",
        ylim=(-5, 112),
    )
    axis.margins(x=0.25)
    figure.draw_without_rendering()
    write_labels(axis, labels, dots)


def path(f: Found, figure) -> None:
    """What the critical path is made of, beside the milliseconds of an answer."""
    left, time = figure.subplots(1, 2, sharey=True, width_ratios=(2, 1))
    found = next((figure for figure in f.study.used.values() if figure["what"] == "milliseconds"), {})
    for y, (name, (model, sample)) in enumerate(PATH.items()):
        reports = f.reports(model, sample)
        denoise = mean(over(r, "denoise_passes") for r in reports)
        whole = mean(over(r, "critical_path") for r in reports)
        left.barh(y, whole - denoise, color="C0", label="plan and text" if y == 0 else None)
        left.barh(y, denoise, left=whole - denoise, color="C2", label="spans" if y == 0 else None)
        line = next((line for line, (m, s, _) in POINTS.items() if m == model and sample in s), "")
        seconds = found.get("1", {}).get(f"{line}, {shown(sample)}")
        if seconds:
            time.barh(y, 1e3 * seconds, color="C7")
    left.set_yticks(range(len(PATH)), PATH)
    left.invert_yaxis()
    for axis, label in (
        (left, "critical path: tokens and steps, one after another"),
        (time, "ms per answer, one CPU core"),
    ):
        tidy(axis)
        axis.set_xlabel(label)
    left.legend(frameon=False, loc="lower right")  # beside the bars of what is faster


def epochs(f: Found, figure) -> None:
    axis = figure.subplots()
    for n, method in enumerate(STUDIED):
        sample = "" if method == "ar" else "--steps_ratio 0.25"
        values = [list(map(chrf, f.reports(f"{method} {e} epochs", sample))) for e in EPOCHS]
        band(axis, list(EPOCHS), values, n, len(STUDIED), method)
    tidy(axis, xscale="log")
    axis.set(xlabel="epochs", ylabel="chrF of answers to unseen prompts", xticks=EPOCHS)
    axis.legend(frameon=False)


def lengths(f: Found, figure) -> None:
    axes = figure.subplots(1, 2)
    for n, (name, label) in enumerate((("planned", "as planned"), ("extra pads", "trained with 0 to 10 random [PAD]"))):
        values = [list(map(right, f.reports(name, scaled(s)))) for s in SCALES]
        band(axes[0], [*map(float, SCALES)], values, n, 2, label)
    name = f"planned {EPOCHS[-1]} epochs"
    values = [list(map(chrf, f.reports(name, scaled(s)))) for s in SCALES]
    band(axes[1], [*map(float, SCALES)], values, 0, 2, "recipes")
    for axis, label in zip(axes, ("right answers, %: towns", "chrF: recipes")):
        tidy(axis)
        axis.set(xlabel="scale of planned lengths", ylabel=label)
    axes[0].legend(frameon=False)


def knobs(f: Found, figure) -> None:
    axis = figure.subplots()
    for n, tau in enumerate(THRESHOLDS):
        reports = [grid_reports(f, tau, r) for r in RATIOS]
        steps = [mean(r["scores"]["all"]["denoise_passes"] for r in three) for three in reports]
        label = f"threshold {tau}" if float(tau) else "no threshold"
        band(axis, steps, [list(map(chrf, three)) for three in reports], n, len(THRESHOLDS), label)
        for r, x, three in zip(RATIOS, steps, reports) if tau == "0" else ():
            axis.annotate(f"r {r}", (x, mean(map(chrf, three))), (0, -14), textcoords="offset points", fontsize=8)
    tidy(axis, xscale="log")
    axis.set(xlabel="denoising passes per answer", ylabel="chrF: recipes")
    axis.legend(frameon=False)


def independence(f: Found, figure) -> None:
    from data import read_split
    from measure.models import TOWNS
    from measure.probes import independence as bounds
    from plumbing.settings import locate

    axis = figure.subplots()
    for x, (model, sample) in enumerate(WAYS.values()):
        values = [100 * over(r, "exact", ("coupled",)) for r in f.reports(model, f"{sample} --temperature 1")]
        axis.bar(x, mean(values), color="C0", width=0.6)
        axis.vlines(x, min(values), max(values), color="black", lw=1)
    bound = 100 * bounds(read_split(locate(TOWNS) / "test.jsonl"))["apart"]
    axis.axhline(bound, color="C3", lw=1, ls="--")
    axis.annotate("spans drawn apart, each colour as often", (0.6, bound + 2), color="C3", fontsize=9)
    axis.set_xticks(range(len(WAYS)), [textwrap.fill(way, 14) for way in WAYS], fontsize=8)
    tidy(axis)
    axis.set_ylabel("coupled answers that agree, %, temperature 1")


PICTURES = {  # file: what draws it, and its size in inches
    "paper-frontier.png": (frontier, (10, 6)), "paper-path.png": (path, (10, 3.2)), "paper-epochs.png": (epochs, (8, 4.5)),
    "paper-lengths.png": (lengths, (10, 3.6)), "paper-knobs.png": (knobs, (8, 4.5)),
    "paper-independence.png": (independence, (9, 4)),
}  # fmt: skip
