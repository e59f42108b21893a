"""The claims of the paper, one function each: what it says, how it is measured here, what we find.

Figures of the paper are those of its second version (March 2026, 7B model, AlpacaEval), second hand from published
reading notes; the abstract of the first version gives the speed-ups (1.27 to 1.81) and the drops in win rate.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from statistics import mean

from data import read_split
from measure import probes
from measure.models import EPOCHS, STUDIED, TOWNS
from measure.quality import checker
from measure.study import Study, sample_config
from plumbing.device import find
from plumbing.settings import locate
from sample import Sampler

CHECKED = ("towns", "sums")  # families with one right answer
SURE = "--threshold 0.9"
SWEEP = ("--steps_ratio 0.5", "--steps_ratio 0.25", "--steps_ratio 0.1", SURE)
POINTS = {  # a line of the frontier: the model, its settings, and a second model that drafts
    "autoregression": ("ar", ("",), ""),
    "autoregression, half size": ("ar half", ("",), ""),
    "speculative decoding by these two": ("ar", ("--ahead 4", "--ahead 8", "--ahead 16", "--ahead 32"), "ar half"),
    "autoregression, drafts of its own": ("ar drafts", ("--ahead 8",), ""),
    "Skeleton-of-Thought": ("skeleton", (), ""),
    "parallel autoregression": ("parallel-ar", ("",), ""),
    "block diffusion": ("block", SWEEP, ""),
    "diffusion of the whole answer": ("diffusion", SWEEP, ""),
    "planned, sparse": ("planned", SWEEP, ""),
    "planned, dense": ("dense", SWEEP, ""),
    "joint as planned, drafts": ("joint", ("--ahead 8 --steps_ratio 0.25", f"--ahead 8 {SURE}"), ""),
    "joint as parallel autoregression, drafts": ("joint", ("--ahead 8 --decode parallel-ar",), ""),
}
TIMED = ("--steps_ratio 0.25", SURE)  # of the sweep
SCALES = ("0.5", "0.75", "1", "1.5", "2", "2.5")
RATIOS, THRESHOLDS = ("0.05", "0.1", "0.25", "0.5", "1"), ("0.5", "0.7", "0.9", "0")


@dataclass
class Claim:
    """A row of the page, and what stands below it. `verdict` begins with agrees, differs, cannot (be told here) or no claim."""

    title: str
    paper: str
    here: str
    verdict: str
    lines: list[str] = field(default_factory=list)  # Markdown
    pictures: list[str] = field(default_factory=list)


class Found:
    """The figures of a study over its seeds."""

    def __init__(self, study: Study, seeds: list[int]):
        self.study, self.seeds = study, seeds

    def reports(self, name: str, sample: str = "", draft: str = "") -> list[dict]:
        if name == "skeleton":
            return [self.skeleton(seed) for seed in self.seeds]
        return [self.study.report(name, seed, sample, draft) for seed in self.seeds]

    def skeleton(self, seed: int) -> dict:
        limit, folder = self.study.limit_of(TOWNS), locate(TOWNS)
        examples = read_split(folder / "test.jsonl")[: limit or None]
        measure = lambda: probes.skeleton_of_thought(self.study.train("skeleton", seed), examples, checker(folder),
                                                     self.study.device)  # fmt: skip
        return self.study.probe(f"skeleton seed {seed}", [self.study.key("skeleton", seed), limit], measure)


# ---------------------------------------------------------------- figures of a report


def over(report: dict, figure: str, families: tuple[str, ...] = CHECKED) -> float:
    return mean(report["scores"][family][figure] for family in families)


def right(report: dict) -> float:
    """Exact answers of the families with one right answer, in per cent."""
    return 100 * over(report, "exact")


def chrf(report: dict) -> float:
    return report["readers"]["chrF"]["value"]


def passes(report: dict) -> float:
    return over(report, "passes") if "towns" in report["scores"] else report["scores"]["all"]["passes"]


def calls(report: dict) -> float:
    """Passes, those of a second model that drafts included."""
    drafts = (report["scores"][family].get("draft_passes", 0) for family in CHECKED)
    return over(report, "passes") + mean(drafts)


def speed(report: dict) -> float:
    """Content tokens per pass."""
    return over(report, "content_tokens") / calls(report)


def spread(values: list[float], form: str = "{:.1f}") -> str:
    """Mean of the seeds and, where they do not all read the same, the lowest and the highest."""
    middle, low, high = (form.format(v) for v in (mean(values), min(values), max(values)))
    return middle if low == high else f"{middle} ({low} to {high})"


def table(heads: list[str], rows: list[list[str]]) -> list[str]:
    return [f"| {' | '.join(row)} |" for row in (heads, ["---"] * len(heads), *rows)]


def shown(sample: str) -> str:
    return sample.replace("--", "").replace("decode parallel-ar", "").strip() or "greedy"


def always(ours: list[float], theirs: list[float]) -> bool:
    """Whether every seed of one is above every seed of the other."""
    return min(ours) > max(theirs)


# ---------------------------------------------------------------- the claims


def ahead_of(points: dict[str, list[tuple[float, float]]], own: tuple[str, ...]) -> list[str]:
    """Methods that beat the points of our `own` ways, from (critical path, right answers).

    They are as often right on as short a path, and better in one, at every setting of ours within 5 points of our best.
    """
    ours = [point for name in own for point in points[name]]
    ours = [point for point in ours if point[1] >= max(good for _, good in ours) - 5]
    beats = lambda theirs, our: theirs != our and theirs[0] <= our[0] and theirs[1] >= our[1]
    return [name for name, theirs in points.items() if "planned" not in name
            and all(any(beats(point, our) for point in theirs) for our in ours)]  # fmt: skip


def frontier(f: Found) -> Claim:
    rows, areas, best = [], {}, max(right(r) for name, (model, settings, draft) in POINTS.items()
                                    for sample in settings or ("",) for r in f.reports(model, sample, draft))  # fmt: skip
    for name, (model, settings, draft) in POINTS.items():
        curves = [[] for _ in f.seeds]
        for n, sample in enumerate(settings or ("",)):
            reports = f.reports(model, sample, draft)
            for curve, report in zip(curves, reports):
                curve.append((speed(report), right(report)))
            cells = [spread([get(r) for r in reports]) for get in (right, passes)]
            costs = [spread([over(r, cost) for r in reports], "{:.0f}") for cost in ("critical_path", "positions")]
            rows.append([name if n == 0 else "", shown(sample), *cells, *costs, ""])
        areas[name] = [probes.aup(curve, best) for curve in curves]
        rows[-1][-1] = spread(areas[name], "{:.0f}")
    learnt = {name: [max(values) for values in zip(*(map(right, f.reports(model, sample, draft)) for sample in settings or ("",)))]
              for name, (model, settings, draft) in POINTS.items()}  # fmt: skip
    behind = [name for name, seeds in learnt.items() if max(seeds) < 60]
    unlucky = [name for name, seeds in learnt.items() if min(seeds) < 60 <= max(seeds)]
    ar, planned = (f.reports(model, sample) for model, sample in (("ar", ""), ("planned", SURE)))
    gain = mean(map(passes, ar)) / mean(map(passes, planned))
    points = {name: [(mean(over(r, "critical_path") for r in reports), mean(map(right, reports)))
                     for reports in (f.reports(model, sample, draft) for sample in settings or ("",))]
              for name, (model, settings, draft) in POINTS.items()}  # fmt: skip
    better, alone = (
        ahead_of(points, own) for own in (("planned, sparse", "joint as planned, drafts"), ("planned, sparse",))
    )
    verdict = told({"": [best]}, f"**differs**: ahead of it: {', '.join(better)}" if better else
                   "**agrees**: nothing else is as often right on as short a critical path"
                   + (f"; without drafts it is behind {', '.join(alone)}" if alone else ""))  # fmt: skip
    drafts, half, dense = (
        f.reports(*which) for which in (("joint", f"--ahead 8 {SURE}"), ("ar half",), ("dense", SURE))
    )
    return Claim(
        "Planned diffusion is on the front of quality against latency",
        "1.27 times (dense) and 1.81 times (sparse) as fast as autoregression, win rates 49.2 and about 44 against 50",
        f"{gain:.1f} times fewer passes than autoregression, with drafts {mean(map(passes, ar)) / mean(map(passes, drafts)):.1f}; "
        f"right answers {spread(list(map(right, planned)))}, with drafts {spread(list(map(right, drafts)))}, dense "
        f"{spread(list(map(right, dense)))}; autoregression {spread(list(map(right, ar)))}, half its size "
        f"{spread(list(map(right, half)))}",
        verdict,
        ["Right answers in per cent, of 200 prompts (`towns` and `sums`). Critical path, picture and AUP count the "
         "passes of a second model that drafts, the column of passes does not. AUP: accuracy under parallelism, the area under "
         "quality over tokens per pass (d3LLM, 2026). "
         + (f"In as many updates as the others these have not learnt the answers: {', '.join(behind)}. " if behind else "")
         + (f"With one seed or two nor have these: {', '.join(unlucky)}." if unlucky else ""),
         "",
         *table(["method", "setting", "right", "passes", "critical path", "positions", "AUP"], rows)],
        ["paper-frontier.png"],
    )  # fmt: skip


def times(f: Found) -> Claim:
    study, seed = f.study, f.seeds[0]
    settings = {f"{name}, {shown(s)}": (model, s) for name, (model, samples, draft) in POINTS.items() if not draft
                for s in samples if s not in SWEEP or s in TIMED}  # fmt: skip
    prompts = [e.prompt for e in read_split(locate(TOWNS) / "test.jsonl") if e.family in CHECKED][:16]

    def measure() -> dict:
        found = {}
        for batch in (1, 8):
            samplers = {}
            for name, (model, sample) in settings.items():
                samplers[name] = Sampler.load(study.train(model, seed), sample_config(sample), find(study.device))
            found[str(batch)] = probes.seconds_per_answer(samplers, prompts, batch)
        return found

    keys = [study.key(model, seed) for model, _ in settings.values()]
    found = study.probe("milliseconds", [keys, sorted(settings), len(prompts)], measure)
    rows = [[name, *(f"{1e3 * found[b][name]:.0f} ({found[b]['autoregression, greedy'] / found[b][name]:.1f})"
                     for b in ("1", "8"))] for name in settings]  # fmt: skip
    gain = {b: found[b]["autoregression, greedy"] / found[b][f"planned, sparse, {shown(SURE)}"] for b in ("1", "8")}
    ar, planned = (mean(over(r, "critical_path") for r in f.reports(*which)) for which in (("ar",), ("planned", SURE)))
    lost = {batch: gain[batch] < 0.95 * ar / planned for batch in gain}
    verdict = (
        "**agrees**: a pass over many slots costs more than one over a token" if any(lost.values()) else "**differs**"
    )
    verdict += "; alone this way loses nothing" if lost == {"1": False, "8": True} else ""
    return Claim(
        "The gain in time is smaller than the gain in critical path",
        "critical path 367 (autoregression), 160 (dense), 155 (sparse): 2.3 times shorter, 1.27 to 1.81 times as fast",
        f"sparse, {shown(SURE)}: critical path {ar / planned:.1f} times shorter, {gain['1']:.1f} times as fast alone, "
        f"{gain['8']:.1f} times eight at once",
        verdict,
        ["Milliseconds per answer on one CPU core, in turns, seed 0 (times as fast as autoregression):", "",
         *table(["", "alone", "eight at once"], rows)],
        ["paper-path.png"],
    )  # fmt: skip


def training(f: Found) -> Claim:
    found = {m: {n: list(map(chrf, f.reports(f"{m} {n} epochs", "--steps_ratio 0.25" if m in ("planned", "dense",
             "diffusion", "joint") else ""))) for n in EPOCHS} for m in STUDIED}  # fmt: skip
    rows = [[method, *(spread(values) for values in by_epoch.values())] for method, by_epoch in found.items()]
    gains = {m: mean(v[EPOCHS[-1]]) - mean(v[EPOCHS[-2]]) for m, v in found.items()}
    behind = mean(found["diffusion"][EPOCHS[-1]]) < mean(found["ar"][EPOCHS[-1]])
    more = min(gains["planned"], gains["diffusion"]) > max(gains["ar"], 0)
    verdict = "**agrees** once autoregression has levelled off (these models were not pretrained)"
    verdict += "; plain diffusion stays behind" if behind else ""
    return Claim(
        "More training helps planned and plain diffusion, not autoregression",
        "2 to 16 epochs: autoregression 50 to 50, planned (dense) 44.9 to 49.2, diffusion 41.1 to 52.6",
        f"chrF on recipes from {EPOCHS[-2]} to {EPOCHS[-1]} epochs: "
        + ", ".join(f"{m} {gain:+.1f}" for m, gain in gains.items()),
        verdict if more else "**differs**",
        ["400 recipes, each model trained from scratch with falling rates for so many epochs; chrF on 64 test recipes, "
         "with `--steps_ratio 0.25` where spans are denoised. The paper's models were pretrained, so its first epochs are "
         "not these; plain diffusion takes a step per token there:", "",
         *table(["", *(f"{n} epochs" for n in EPOCHS)], rows)],
        ["paper-epochs.png"],
    )  # fmt: skip


def changed(f: Found, names: dict[str, str], get: Callable = right, sample: str = SURE) -> tuple[dict, list]:
    """Values and rows of the planned model and of models with a part changed."""
    found = {name: f.reports(name, sample) for name in ("planned", *names)}
    values = {name: list(map(get, reports)) for name, reports in found.items()}
    rows = [[{"planned": "as it is", **names}[name], spread(values[name]), *(spread([over(r, "exact", (family,)) * 100
             for r in reports]) for family in ("towns", "sums", "coupled")), spread(list(map(passes, reports)))]
            for name, reports in found.items()]  # fmt: skip
    return values, rows


def told(values: dict[str, list[float]], verdict: str) -> str:
    """The verdict, if any model has learnt enough for one."""
    return verdict if max(map(max, values.values())) > 0 else "**cannot** be told: no answer is right"


HEADS = ["", "right", "`towns`", "`sums`", "`coupled`", "passes"]


def topics(f: Found) -> Claim:
    values, rows = changed(
        f, {"numbered topics": "topics only numbered", "topic not repeated": "not repeated in its span"}
    )
    worse = always(values["planned"], values["numbered topics"])
    return Claim(
        "Topics matter",
        "win rate 46.65 with topics, 23.33 without",
        f"right answers {spread(values['planned'])} with, {spread(values['numbered topics'])} without",
        told(values, "**agrees**: without its topic a span does not know what it is about" if worse else "**differs**"),
        table(HEADS, rows),
    )


def sync(f: Found) -> Claim:
    names = {"untagged": "`<sync/>` deleted (theirs): the text stands before the plan",
             "one round": "one round (ours): the text becomes a span"}  # fmt: skip
    values, rows = changed(f, names, lambda report: 100 * over(report, "exact", ("sums",)))
    lost = [name for name in names if always(values["planned"], values[name])]
    gained = [name for name in names if always(values[name], values["planned"])]
    verdict = f"**agrees**: every seed with it is above every seed without ({' and '.join(lost)})"
    return Claim(
        "`<sync/>` matters",
        "win rate 46.65 with it, 42.96 without, and then slower (3.23 to 5.81 s)",
        f"right `sums`, whose second round needs the first: {spread(values['planned'])} with it, "
        f"{spread(values['untagged'])} with the tag deleted, {spread(values['one round'])} in one round",
        told(
            values,
            verdict
            if lost
            else "**differs**: every seed without it is above every seed with it"
            if gained
            else "**cannot** be told: the seeds overlap",
        ),
        table(["", *HEADS[2:]], [[name, *cells] for name, _, *cells in rows]),
    )


def scaled(scale: str) -> str:
    """Settings that scale planned lengths and leave the number of steps as it is."""
    return f"--steps_ratio {0.25 / float(scale):.3g} --length_scale {scale}"


def lengths(f: Found) -> Claim:
    curves = {}
    for name, label in (("planned", "towns"), ("extra pads", "towns, 0 to 10 random `[PAD]`")):
        curves[label] = {s: list(map(right, f.reports(name, scaled(s)))) for s in SCALES}
    last = f"planned {EPOCHS[-1]} epochs"
    curves["recipes"] = {s: list(map(chrf, f.reports(last, scaled(s)))) for s in SCALES}
    best = {label: max(curve, key=lambda s: mean(curve[s])) for label, curve in curves.items()}
    return Claim(
        "Planned lengths are right: quality peaks at scale 1",
        "a curve over scales of 0.5, 1, 1.5, 2 and 2.5 with its peak at 1",
        ", ".join(f"{label}: best at {scale}" for label, scale in best.items()),
        "**agrees**" if set(best.values()) == {"1"} else "**differs**: " + ("longer spans cost nothing on recipes but "
                                                                          "passes" if float(best["recipes"]) > 1 else "see the curve"),
        ["Right answers (towns) and chrF (recipes) by the scale of all planned lengths, in equally many steps:", "",
         *table(["", *SCALES], [[label, *(spread(values) for values in curve.values())] for label, curve in curves.items()])],
        ["paper-lengths.png"],
    )  # fmt: skip


def grid_reports(f: Found, tau: str, r: str) -> list[dict]:
    """Of the grid of both knobs; with a threshold of one seed, since nothing is claimed of it but a smooth surface."""
    found = Found(f.study, f.seeds[:1]) if float(tau) else f
    sample = f"--steps_ratio {r}" + (f" --threshold {tau}" if float(tau) else "")
    return found.reports(f"planned {EPOCHS[-1]} epochs", sample)


def knobs(f: Found) -> Claim:
    grid = {}
    for tau in THRESHOLDS:
        for r in RATIOS:
            reports = grid_reports(f, tau, r)
            grid[tau, r] = [mean(map(chrf, reports)), mean(r["scores"]["all"]["denoise_passes"] for r in reports)]
    rows = [[f"threshold {tau}" if float(tau) else "no threshold", *(f"{grid[tau, r][0]:.1f} / {grid[tau, r][1]:.0f}"
             for r in RATIOS)] for tau in THRESHOLDS]  # fmt: skip
    smooth = all(grid["0", a][1] < grid["0", b][1] for a, b in zip(RATIOS, RATIOS[1:]))
    rise = grid["0", RATIOS[-1]][0] - grid["0", RATIOS[0]][0]
    return Claim(
        "Two smooth knobs: step ratio r and threshold tau",
        "a grid on which quality and time rise together",
        f"recipes: from r {RATIOS[0]} to {RATIOS[-1]} chrF {grid['0', RATIOS[0]][0]:.1f} to {grid['0', RATIOS[-1]][0]:.1f}, "
        f"denoising passes {grid['0', RATIOS[0]][1]:.0f} to {grid['0', RATIOS[-1]][1]:.0f}",
        "**differs**: more steps do not give better text" if not (smooth and rise > 0) else
        "**agrees**" + (" on passes; chrF rises by less than its sampling error" if rise < 2 else ""),
        ["chrF / denoising passes on recipes. Each pass fills at least the share that r asks for, and all slots that reach "
         "the threshold. Rows with a threshold are of seed 0:", "", *table(["", *(f"r {r}" for r in RATIOS)], rows)],
        ["paper-knobs.png"],
    )  # fmt: skip


def plans(f: Found) -> Claim:
    rows, found, sound = [], {}, True
    for label, name, sample in (
        ("towns", "planned", SURE),
        ("recipes", f"planned {EPOCHS[-1]} epochs", "--steps_ratio 0.25"),
    ):
        reports = f.reports(name, sample)
        whole = [r["scores"]["all"] for r in reports]
        share = [w["plan_passes"] / w["passes"] for w in whole]
        sound &= min(w["valid"] for w in whole) > 0.95
        found[label] = [
            spread([100 * w["valid"] for w in whole]),
            spread([w["length_error"] for w in whole], "{:.2f}"),
            spread([w["length_bias"] for w in whole], "{:+.2f}"),
        ]
        counts = {n for r in reports for n in r["spans_per_answer"]}
        spans = ", ".join(
            f"{n}: {100 * mean(r['spans_per_answer'].get(n, 0) for r in reports):.0f}%" for n in sorted(counts)
        )
        rows.append([label, *found[label], spread([100 * w["plan_right"] for w in whole]), spans,
                     spread([100 * s for s in share]), spread([100 * r["pad_share"] for r in reports])])  # fmt: skip
    return Claim(
        "Plans are minimal and reliable",
        "plans are nearly always valid, and their lengths unbiased",
        "; ".join(f"{label}: {valid}% valid and whole, lengths off by {off} units, mean {bias}"
                  for label, (valid, off, bias) in found.items()),
        "**agrees** on lengths; validity cannot be told, since the grammar makes every plan valid" if sound else
        "**differs**: plans are cut off",
        table(["", "valid, %", "length off by, units", "mean error (+: too long)", "plan as in the reference, %", "spans per answer",
               "passes for plan and text, % of all", "`[PAD]` in slots, %"], rows),
    )  # fmt: skip
