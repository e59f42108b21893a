"""The frontier: quality against latency of every method, trained and measured on equal terms.

    python measure/frontier.py                       # tasks on two cores; --preset hours: three times the updates
    python measure/frontier.py --preset recipes      # real text; --preset gpu: larger models
    python measure/frontier.py --group sensitivity   # the models of that, sampled in other ways
    python measure/frontier.py --group ablations     # planned diffusion trained with one part changed at a time

All methods start from one autoregressive warm-up and get the same number of updates on the same data. Whatever is
done is kept in --out under a key made of code, data and settings: an interrupted call goes on, and nothing
is ever compared with results of other code, data or settings.
"""

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the project's modules

import torch

from files import write_whole
from settings import ROOT

CUDA = ["kernels/attention.cu", "kernels/gpu.h", "kernels/tiles.h"]
CODE = {
    "train.py": ["train.py", "optim.py", "model.py", "attention.py", "methods.py", "noise.py", "masks.py",
                 "tokenizer.py", "tags.py", "data/__init__.py", "kernels/__init__.py", *CUDA],
    # and what training depends on, by the checkpoint's key
    "measure/eval.py": ["measure/eval.py", "sample.py", "grammar.py", "unmask.py", "kernels/graphs.py",
                        "measure/speculate.py"],
}


@dataclass(frozen=True)
class Preset:
    data: str
    warmup: int  # updates of the autoregressive model that all start from
    steps: int  # updates of each method after it
    train: str = ""  # the shape of every model but the smaller one
    common: str = ""  # options of every training
    small: str = ""  # the shape of the smaller autoregressive model, about half the parameters
    judge: str = ""  # the shape of a larger one, under which free text has a perplexity
    limit: int = 0  # test prompts for quality (0: all)
    timed: int = 30  # test prompts for latency at batch 1


HALF_SIZE = "--d_model 96 --n_head 3 --n_kv_head 3 --d_ff 288 --n_layer 5"
PRESETS = {
    "tasks": Preset("data/tasks", 2000, 1000, small=HALF_SIZE, limit=140),
    "hours": Preset("data/tasks", 2000, 3000, small=HALF_SIZE, limit=140),
    "recipes": Preset("data/recipes", 1000, 1000, "--d_model 192 --n_head 6 --n_kv_head 2 --d_ff 512",
                      "", "--d_model 128 --n_head 4 --n_kv_head 2 --d_ff 384 --n_layer 6",
                      "--d_model 256 --n_head 8 --n_kv_head 4 --d_ff 768 --n_layer 6", limit=100, timed=10),
    "gpu": Preset("data/tasks", 3000, 6000, "--d_model 512 --n_head 8 --n_kv_head 4 --d_ff 1536 --n_layer 8",
                  "--batch 32", "--d_model 384 --n_head 6 --n_kv_head 3 --d_ff 1024 --n_layer 8"),
}  # fmt: skip

WARM_UP, JUDGE = "warm-up", "judge"  # the autoregressive models that all others start from, and are read by
MEMORY_AND_COPYING = ("facts", "lookups", "transforms")  # the families of the headline figure
SWEEP = ("--steps_ratio 0.5", "--steps_ratio 0.25", "--steps_ratio 0.1", "--threshold 0.9")
LENGTHS = ("--steps_ratio 0.5 --length_scale 0.5", "--steps_ratio 0.5 --length_scale 0.75",
           "--steps_ratio 0.5 --length_scale 1.5", "--steps_ratio 0.5 --length_scale 2")  # fmt: skip
ORDERS = tuple(f"--steps_ratio 0.5 --order {order}" for order in ("confidence", "margin", "random"))


@dataclass(frozen=True)
class Entry:
    """A line of the comparison: how it is trained, and the settings it is sampled with."""

    train: str
    sample: tuple = ("",)
    of: str = ""  # sample the checkpoint of this entry instead of training one
    draft: str = ""  # with drafts of this one
    small: bool = False
    warm: bool = True  # start from the warm-up


METHODS = {
    "autoregressive": Entry("--method ar"),
    "autoregressive, half size": Entry("--method ar", small=True, warm=False),
    "speculative decoding": Entry("", of="autoregressive", draft="autoregressive, half size"),
    "parallel autoregressive": Entry("--method parallel-ar"),
    "diffusion": Entry("--method diffusion", SWEEP),
    "block diffusion": Entry("--method block", SWEEP),
    "planned diffusion": Entry("--method planned", SWEEP),
    "planned diffusion, dense": Entry("--method dense", SWEEP),
}
HALF = ("--steps_ratio 0.5",)
UNCONSTRAINED = ("--steps_ratio 0.5 --no-constrained",)
HOT = ("--steps_ratio 0.5 --temperature 1", "--threshold 0.9 --temperature 1")
GROUPS = {
    "methods": METHODS,
    "sensitivity": {
        "planned diffusion": Entry("--method planned", HALF + LENGTHS + ORDERS + UNCONSTRAINED + HOT),
        "planned diffusion, dense": Entry("--method dense", HALF + HOT),
    },
    "ablations": {
        "planned diffusion": Entry("--method planned", HALF),
        "topics only numbered": Entry("--topics numbers", HALF),
        "topic not repeated in its span": Entry("--no-repeat_topic", HALF),
        "all in one round": Entry("--rounds one", HALF),
        "noised history": Entry("--history noised", HALF),
        "1/t weights (ELBO)": Entry("--weight elbo", HALF),
        "no warm-up": Entry("--method planned", HALF, warm=False),
    },
}  # fmt: skip


def hashes(folder, names):
    return [hashlib.sha256((folder / name).read_bytes()).hexdigest()[:16] for name in names]


def digest(*parts):
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:12]


def slug(name):
    return "-".join("".join(c if c.isalnum() else " " for c in name).split())


CODE_HASH = {script: hashes(ROOT, files) for script, files in CODE.items()}


class Frontier:
    """Trains and measures the entries of a group; `out` keeps all that is done."""

    def __init__(self, preset, entries, out, workers):
        self.preset, self.entries, self.out, self.workers = preset, entries, Path(out), workers
        folder = ROOT / preset.data
        if not (folder / "train.jsonl").exists():
            subprocess.run([sys.executable, folder / "prepare.py"], check=True)
        if not (folder / "families.py").exists() and not find_spec("sacrebleu"):
            raise SystemExit("frontier.py: the quality of free text is its chrF: pip install sacrebleu")
        self.data = hashes(folder, ["train.jsonl", "val.jsonl", "test.jsonl", "tokenizer.json"])
        self.checker = hashes(folder, ["families.py"] if (folder / "families.py").exists() else [])
        threads = max(1, (os.cpu_count() or 1) // workers)
        self.environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "PYTHONUNBUFFERED": "1"}

    def call(self, script, options, log):
        """What one of the scripts prints; its progress goes to a log."""
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("a") as file:
            file.write(f"{script} {' '.join(options)}\n")
            file.flush()
            out = subprocess.PIPE if script == "measure/eval.py" else file
            process = subprocess.Popen([sys.executable, ROOT / script, *options], stdout=out, stderr=file, text=True,
                                       env=self.environment)  # fmt: skip
            try:
                printed, _ = process.communicate()
            except KeyboardInterrupt:
                process.wait()  # it got the signal too, and saves
                raise
        if process.returncode:
            raise SystemExit(f"frontier.py: {script} {' '.join(options)} failed: see the end of {log}")
        return printed

    def train(self, name, options, init=None):
        """Checkpoint of a training with these options from that one, made now if it is not there."""
        compiler = ["--compile"] if shutil.which("c++") else []
        options = [*compiler, "--data", self.preset.data, *options.split()]
        made_from = hashes(init.parent, [init.name]) if init else []
        folder = self.out / f"{slug(name)}-{digest(CODE_HASH['train.py'], self.data, options, made_from)}"
        path = folder / "model.safetensors"
        if not path.exists():
            print(f"training {name}; follow it in {folder / 'log.txt'}", flush=True)
            start = ["--init", str(init)] if init else []
            self.call("train.py", [*options, *start, "--out", str(folder)], folder / "log.txt")
        if not path.exists():
            raise SystemExit(f"frontier.py: the training of {name} was stopped: see the end of {folder / 'log.txt'}")
        return path

    def checkpoint(self, name):
        """Checkpoint of an entry, of the warm-up, or of the judge."""
        p = self.preset
        if name == WARM_UP:
            return self.train(name, f"{p.train} {p.common} --method ar --steps {p.warmup}")
        if name == JUDGE:
            return self.train(name, f"{p.judge} {p.common} --method ar --steps {p.warmup + p.steps}")
        entry = self.entries[name]
        if entry.of:
            return self.checkpoint(entry.of)
        options = f"{p.small if entry.small else p.train} {p.common} {entry.train}"
        if entry.warm:
            return self.train(entry.train, f"{options} --steps {p.steps}", self.checkpoint(WARM_UP))
        return self.train(f"{entry.train} from scratch", f"{options} --steps {p.warmup + p.steps}")

    def measure(self, name, sample, *how, judge=""):
        """What eval.py says of a trained entry at one setting."""
        models = {"--checkpoint": name, "--draft": self.entries[name].draft, "--judge": judge}
        paths = {flag: self.checkpoint(model) for flag, model in models.items() if model}
        options = ["--data", self.preset.data, *sample.split(), *how, "--json"]
        made_of = {flag: hashes(path.parent, [path.name]) for flag, path in paths.items()}
        key = digest(CODE_HASH["measure/eval.py"], made_of, self.data, self.checker, options)
        path = self.out / "results" / f"{slug(name)}-{key}.json"
        if not path.exists():
            options += [text for pair in paths.items() for text in map(str, pair)]
            write_whole(path, self.call("measure/eval.py", options, path.with_suffix(".log")))
        return json.loads(path.read_text())

    def quality(self, name, sample):
        """A row of the results: an entry at one setting."""
        judge = JUDGE if self.preset.judge else ""
        of = self.measure(name, sample, "--draws", "4", "--limit", str(self.preset.limit), judge=judge)
        return {"name": name, "sample": sample} | of

    def run(self):
        """All rows of the group, in its order. Up to `workers` scripts run at a time, but latency is measured alone."""
        trained = [name for name, entry in self.entries.items() if not entry.of]
        first = [WARM_UP, *(name for name in trained if not self.entries[name].warm)]
        self.together(self.checkpoint, [(name,) for name in [*first, *[JUDGE] * bool(self.preset.judge)]])
        self.together(self.checkpoint, [(name,) for name in trained])
        rows = self.together(self.quality, [(name, s) for name, entry in self.entries.items() for s in entry.sample])
        for row in rows:
            alone = self.measure(row["name"], row["sample"], "--limit", str(self.preset.timed), "--batch", "1")
            row |= {key: alone[key] for key in ("seconds_p50", "seconds_p95", "peak_memory_mb")}
            print(f"{row['name']:28}{row['sample']:42}{headline(row)}", flush=True)
        return rows

    def together(self, function, items):
        """The function of each item, up to `workers` at a time; a failure stops what has not begun."""
        pool = ThreadPoolExecutor(self.workers)
        try:
            futures = [pool.submit(function, *item) for item in items]
            wait(futures, return_when=FIRST_EXCEPTION)
        finally:
            pool.shutdown(cancel_futures=True)
        return [future.result() for future in sorted(futures, key=lambda f: f.cancelled())]  # a failure first


# ---------------------------------------------------------------- report


def mean(row, figure):
    """Mean of a figure over the answers that the quality is of: three families of tasks, or all free text."""
    families = MEMORY_AND_COPYING if row["chrf"] is None else ("all",)
    return sum(row["scores"][family][figure] for family in families) / len(families)


def quality(row):
    """The one figure of the plot: exact answers of the families with one right answer, or chrF."""
    return mean(row, "exact") if row["chrf"] is None else row["chrf"] / 100


def headline(row):
    return f"quality {quality(row):6.1%}  passes {mean(row, 'passes'):6.1f}  {1e3 * row['seconds_p50']:7.1f} ms"


def table(rows):
    """Markdown lines: a row a method and setting."""
    families = [name for name in rows[0]["scores"] if name != "all"] if rows[0]["chrf"] is None else []
    of_text = [name for name in ("perplexity", "distinct_1", "distinct_3") if not families and rows[0][name]]
    columns = ["method", "setting", "quality", *families, *of_text, "passes", "critical path", "positions",
               "tokens a pass", "ms (p50)", "ms (p95)"]  # fmt: skip
    yield "| " + " | ".join(columns) + " |"
    yield "|---" * len(columns) + "|"
    for row in rows:
        cells = [row["name"], row["sample"].replace("--", ""), f"{quality(row):.1%}"]
        cells += [f"{row['scores'][family]['exact']:.0%}" for family in families]
        cells += [f"{row[name]:.3g}" for name in of_text]
        cells += [f"{mean(row, cost):.1f}" for cost in ("passes", "critical_path", "positions")]
        cells += [f"{mean(row, 'content_tokens') / mean(row, 'passes'):.2f}"]
        cells += [f"{1e3 * row[name]:.0f}" for name in ("seconds_p50", "seconds_p95")]
        yield "| " + " | ".join(cells) + " |"


def plot(rows, path):
    """Quality against passes and against latency, a line a method. Needs matplotlib."""
    try:
        import matplotlib.pyplot as plt
    except ImportError:
        print("no plot: pip install matplotlib")
        return
    figure, axes = plt.subplots(1, 2, figsize=(13, 5), sharey=True)
    sides = {
        "forward passes an answer": lambda row: mean(row, "passes"),
        "milliseconds an answer at batch 1 (median)": lambda row: 1e3 * row["seconds_p50"],
    }
    for axis, (label, cost) in zip(axes, sides.items()):
        for n, name in enumerate(dict.fromkeys(row["name"] for row in rows)):
            points = sorted((cost(row), quality(row)) for row in rows if row["name"] == name)
            axis.plot(*zip(*points), "o-", color=f"C{n}", ms=4, lw=1, label=name)
        axis.set(xlabel=label, xscale="log")
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("exact answers" if rows[0]["chrf"] is None else "chrF / 100")
    axes[1].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    print(f"wrote {path}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=PRESETS, default="tasks", help="data, sizes and budget (default: tasks)")
    parser.add_argument("--group", choices=GROUPS, default="methods", help="what is compared (default: methods)")
    parser.add_argument("--out", help="folder of all results (default: runs/frontier-PRESET)")
    parser.add_argument("--workers", type=int, default=1 if torch.cuda.is_available() else 2,
                        help="scripts that run at the same time (default: %(default)s)")  # fmt: skip
    args = parser.parse_args()
    out = Path(args.out or f"runs/frontier-{args.preset}")
    try:
        rows = Frontier(PRESETS[args.preset], GROUPS[args.group], out, args.workers).run()
    except KeyboardInterrupt:
        sys.exit("frontier.py: stopped; the same command goes on from here")
    write_whole(out / f"{args.group}.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    write_whole(out / f"{args.group}.md", "\n".join(table(rows)) + "\n")
    print(f"wrote {out / args.group}.jsonl and .md")
    if args.group == "methods":
        plot(rows, out / "frontier.png")


if __name__ == "__main__":
    main()
