"""The frontier: quality against latency of every method, trained and measured on equal terms.

    python measure/frontier.py --preset minutes      # two or three minutes: shows how it works; no answer is right yet
    python measure/frontier.py                       # tasks on two cores; --preset hours: three times the updates
    python measure/frontier.py --preset recipes      # real text; --preset gpu: larger models
    python measure/frontier.py --seeds 0 1 2         # everything three times: means, and lowest and highest
    python measure/frontier.py --entries autoregressive "planned diffusion"     # these lines of the comparison only
    python measure/frontier.py --group sensitivity   # the models of that, sampled in other ways
    python measure/frontier.py --group ablations     # planned diffusion trained with one part changed at a time

All methods of a seed start from one autoregressive warm-up and get the same number of updates on the same data.
Trainings and measurements are stored in --out under a hash of code, data and settings: an interrupted call goes on where it was, and
results of other code, data or settings are never mixed with these.
"""

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the project's modules

import torch

from measure.code import fingerprint
from measure.report import headline, plot, table
from plumbing.device import find
from plumbing.files import write_whole
from plumbing.settings import ROOT, command


@dataclass(frozen=True)
class Preset:
    data: str
    warmup: int  # updates of the autoregressive model that all start from
    steps: int  # updates of each method after it
    train: str = ""  # the shape of every model but the smaller one
    common: str = ""  # options of every training
    small: str = ""  # the shape of the smaller autoregressive model, about half the parameters
    judge: str = ""  # the shape of a larger one, under which free text has a perplexity
    only: tuple = ()  # entries of the group that are compared (none: all)
    limit: int = 0  # test prompts for quality (0: all)
    timed: int = 30  # test prompts for latency at batch 1


HALF_SIZE = "--d_model 96 --n_head 3 --n_kv_head 3 --d_ff 288 --n_layer 5"
PRESETS = {
    "minutes": Preset("data/tasks", 250, 250, "--d_model 64 --n_head 2 --n_kv_head 2 --d_ff 192 --n_layer 2",
                      "--no-compile --warmup 20 --validate_on 16", limit=16, timed=3,
                      only=("autoregressive", "planned diffusion")),
    "tasks": Preset("data/tasks", 2000, 1000, small=HALF_SIZE, limit=140),
    "hours": Preset("data/tasks", 2000, 3000, small=HALF_SIZE, limit=140),
    "recipes": Preset("data/recipes", 1000, 1000, "--d_model 192 --n_head 6 --n_kv_head 2 --d_ff 512",
                      "", "--d_model 128 --n_head 4 --n_kv_head 2 --d_ff 384 --n_layer 6",
                      "--d_model 256 --n_head 8 --n_kv_head 4 --d_ff 768 --n_layer 6", limit=100, timed=10),
    "gpu": Preset("data/tasks", 3000, 6000, "--d_model 512 --n_head 8 --n_kv_head 4 --d_ff 1536 --n_layer 8",
                  "--batch 32", "--d_model 384 --n_head 6 --n_kv_head 3 --d_ff 1024 --n_layer 8"),
}  # fmt: skip

WARM_UP, JUDGE = "warm-up", "judge"  # the autoregressive models that all others start from and are judged by
SWEEP = ("--steps_ratio 0.5", "--steps_ratio 0.25", "--steps_ratio 0.1", "--threshold 0.9")
LENGTHS = ("--steps_ratio 0.5 --length_scale 0.5", "--steps_ratio 0.5 --length_scale 0.75",
           "--steps_ratio 0.5 --length_scale 1.5", "--steps_ratio 0.5 --length_scale 2")  # fmt: skip
ORDERS = tuple(f"--steps_ratio 0.5 --order {order}" for order in ("confidence", "margin", "random"))


@dataclass(frozen=True)
class Entry:
    """A line of the comparison: how it is trained, and the settings it is sampled with."""

    train: str
    sample: tuple = ("",)
    checkpoint: str = ""  # sample the checkpoint of this entry instead of training one
    draft: str = ""  # with drafts of this entry's
    small: bool = False
    warm: bool = True  # start from the warm-up


DRAFTED = ("--steps_ratio 0.5 --ahead 8", "--steps_ratio 0.25 --ahead 8", "--threshold 0.9 --ahead 8")
AHEAD = tuple(f"--ahead {tokens}" for tokens in (4, 8, 16, 32))
METHODS = {
    "autoregressive": Entry("--method ar"),
    "autoregressive, half size": Entry("--method ar", small=True, warm=False),
    "speculative decoding": Entry("", AHEAD, checkpoint="autoregressive", draft="autoregressive, half size"),
    "parallel autoregressive": Entry("--method parallel-ar"),
    "diffusion": Entry("--method diffusion", SWEEP),
    "block diffusion": Entry("--method block", SWEEP),
    "planned diffusion": Entry("--method planned", SWEEP),
    "planned diffusion, dense": Entry("--method dense", SWEEP),
    "autoregressive, drafts": Entry("--method ar --ahead 8", ("--ahead 8",)),
    "joint as planned, drafts": Entry("--method joint --ahead 8", DRAFTED),
    "joint as parallel, drafts": Entry("", ("--decode parallel-ar --ahead 8",), checkpoint="joint as planned, drafts"),
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


CODE = {script: fingerprint(ROOT / script) for script in ("train.py", "measure/eval.py")}


def call(script: str, options: list[str], log: Path, threads: int) -> str | None:
    """Run one of the scripts. Returns what eval.py prints; everything else goes to a log. Raises ValueError."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a") as file:
        file.write(f"{script} {' '.join(options)}\n")
        file.flush()
        out = subprocess.PIPE if script == "measure/eval.py" else file
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "PYTHONUNBUFFERED": "1"}
        process = subprocess.Popen([sys.executable, ROOT / script, *options], stdout=out, stderr=file, text=True,
                                   env=environment)  # fmt: skip
        try:
            printed, _ = process.communicate()
        except KeyboardInterrupt:
            process.wait()  # it got the signal too, and saves
            raise
    if process.returncode:
        raise ValueError(f"{script} {' '.join(options)} failed: see the end of {log}")
    return printed


def together(function: Callable, items: list[tuple], workers: int) -> list:
    """The function of each item, up to `workers` at a time; a failure stops what has not begun."""
    pool = ThreadPoolExecutor(workers)
    try:
        futures = [pool.submit(function, *item) for item in items]
        wait(futures, return_when=FIRST_EXCEPTION)
    finally:
        pool.shutdown(cancel_futures=True)
    return [future.result() for future in sorted(futures, key=lambda f: f.cancelled())]  # a failure first


def compared(group: dict[str, Entry], named: list[str] | None, only: tuple) -> dict[str, Entry]:
    """The entries that are compared: those named, else those of the preset. Raises ValueError if one cannot be."""
    if missing := [name for name in named or () if name not in group]:
        raise ValueError(f"--entries {missing[0]!r}: this group has {', '.join(map(repr, group))}")
    chosen = {name: entry for name, entry in group.items() if name in (named or only or group)}
    for name, entry in chosen.items():
        for needed in filter(None, (entry.checkpoint, entry.draft)):
            if needed not in chosen:
                raise ValueError(f"--entries: {name!r} samples the model of {needed!r}: name that too")
    return chosen


class Frontier:
    """Trains and measures the entries of a group; `out` keeps all that is done."""

    def __init__(self, preset: Preset, entries: dict[str, Entry], out: Path, workers: int, device: torch.device,
                 seed: int = 0):  # fmt: skip
        self.preset, self.entries, self.out, self.workers, self.seed = preset, entries, Path(out), workers, seed
        self.where = ["--data", preset.data, "--device", str(device)]
        self.threads = max(1, (os.cpu_count() or 1) // workers)
        folder = ROOT / preset.data
        if not (folder / "train.jsonl").exists():
            if subprocess.run([sys.executable, folder / "prepare.py"]).returncode:
                raise ValueError(
                    f"{preset.data} cannot be prepared, see above; its README.md says how without a network"
                )
        self.data = hashes(folder, ["train.jsonl", "val.jsonl", "test.jsonl", "tokenizer.json"])
        own = (folder / name for name in ("families.py", "consistency.py"))
        self.checks = [fingerprint(path) for path in own if path.exists()]

    def train(self, name: str, options: str, init: Path | None = None, seed: int | None = None) -> Path:
        """Checkpoint of a training with these options that starts from `init`; trained now if it is not there."""
        compiler, seed = ["--compile"] if shutil.which("c++") else [], self.seed if seed is None else seed
        options = [*compiler, *self.where, "--seed", str(seed), *options.split()]
        start = hashes(init.parent, [init.name]) if init else []
        folder = self.out / f"{slug(name)}-{digest(CODE['train.py'], self.data, options, start)}"
        path = folder / "model.safetensors"
        if not path.exists():
            print(f"training {name}; follow it in {folder / 'log.txt'}", flush=True)
            options += ["--init", str(init)] if init else []
            call("train.py", [*options, "--out", str(folder)], folder / "log.txt", self.threads)
        if not path.exists():
            raise ValueError(f"the training of {name} was stopped: see the end of {folder / 'log.txt'}")
        return path

    def checkpoint(self, name: str) -> Path:
        """Checkpoint of an entry, of the warm-up, or of the judge."""
        p = self.preset
        if name == WARM_UP:
            return self.train(name, f"{p.train} {p.common} --method ar --steps {p.warmup}")
        if name == JUDGE:
            options = f"{p.judge} {p.common} --method ar --steps {p.warmup + p.steps}"
            return self.train(name, options, seed=0)  # one judge for all seeds
        entry = self.entries[name]
        if entry.checkpoint:
            return self.checkpoint(entry.checkpoint)
        options = f"{p.small if entry.small else p.train} {p.common} {entry.train}"
        if entry.warm:
            return self.train(entry.train, f"{options} --steps {p.steps}", self.checkpoint(WARM_UP))
        return self.train(f"{entry.train} from scratch", f"{options} --steps {p.warmup + p.steps}")

    def measure(self, name: str, sample: str, *how: str, judge: str = "") -> dict:
        """What eval.py reports for a trained entry at one setting."""
        models = {"--checkpoint": name, "--draft": self.entries[name].draft, "--judge": judge}
        paths = {flag: self.checkpoint(model) for flag, model in models.items() if model}
        options = [*self.where, *sample.split(), *how, "--json"]
        weights = {flag: hashes(path.parent, [path.name]) for flag, path in paths.items()}
        key = digest(CODE["measure/eval.py"], weights, self.data, self.checks, options)
        path = self.out / "results" / f"{slug(name)}-{key}.json"
        if not path.exists():
            options += [text for pair in paths.items() for text in map(str, pair)]
            write_whole(path, call("measure/eval.py", options, path.with_suffix(".log"), self.threads))
        return json.loads(path.read_text())

    def quality(self, name: str, sample: str) -> dict:
        """The report of an entry at one setting."""
        judge = JUDGE if self.preset.judge else ""
        return self.measure(name, sample, "--draws", "4", "--limit", str(self.preset.limit), judge=judge)

    def speed(self, name: str, sample: str) -> dict:
        """Seconds until an answer is complete, alone on the machine: one at a time, and eight at once."""
        single = ("--limit", str(self.preset.timed), "--batch", "1", "--draws", "1")
        eight = ("--limit", str(-(-self.preset.timed // 8) * 8), "--batch", "8", "--draws", "1")  # whole batches
        found = self.measure(name, sample, *single)
        seconds = {key: found[key] for key in ("seconds_p50", "seconds_p95", "peak_memory_mb")}
        return seconds | {"seconds_batch_8": self.measure(name, sample, *eight)["seconds_p50"]}

    def run(self) -> dict[tuple[str, str], dict]:
        """(entry, setting) -> report, in the order of the group.

        Up to `workers` scripts run at a time, but times are measured alone.
        """
        trained = [name for name, entry in self.entries.items() if not entry.checkpoint]
        first = [
            WARM_UP,
            *(name for name in trained if not self.entries[name].warm),
            *[JUDGE] * bool(self.preset.judge),
        ]
        together(self.checkpoint, [(name,) for name in first], self.workers)
        together(self.checkpoint, [(name,) for name in trained], self.workers)
        points = [(name, sample) for name, entry in self.entries.items() for sample in entry.sample]
        reports = dict(zip(points, together(self.quality, points, self.workers)))
        for (name, sample), report in reports.items():
            report |= self.speed(name, sample)
            print(f"seed {self.seed}  {name}  {sample}\n    {headline(report)}", flush=True)
        return reports


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=PRESETS, default="tasks", help="data, sizes and budget (default: tasks)")
    parser.add_argument("--group", choices=GROUPS, default="methods", help="what is compared (default: methods)")
    parser.add_argument("--entries", nargs="+", metavar="NAME", help="lines of the group to compare (default: all)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="a training of each per entry (default: 0)")
    parser.add_argument("--out", help="folder of all results (default: runs/frontier-PRESET)")
    parser.add_argument("--device", default="auto", help="where to train and measure (default: auto)")
    parser.add_argument(
        "--workers", type=int, help="scripts that run at the same time (default: 2 on a CPU, 1 on a GPU)"
    )
    args = parser.parse_args()
    device = find(args.device)
    workers = (2 if device.type == "cpu" else 1) if args.workers is None else args.workers
    if workers < 1:
        raise ValueError(f"--workers {workers}: expected at least 1")
    if min(args.seeds) < 0 or len(set(args.seeds)) < len(args.seeds):
        raise ValueError(f"--seeds {' '.join(map(str, args.seeds))}: expected different whole numbers of at least 0")
    out, preset = Path(args.out or f"runs/frontier-{args.preset}"), PRESETS[args.preset]
    entries = compared(GROUPS[args.group], args.entries, preset.only)
    try:
        found = [Frontier(preset, entries, out, workers, device, seed).run() for seed in args.seeds]
    except KeyboardInterrupt:
        sys.exit("frontier.py: stopped; the same command goes on from here")
    rows = [{"name": name, "sample": sample, "seeds": [reports[name, sample] for reports in found]}
            for name, sample in found[0]]  # fmt: skip
    write_whole(out / f"{args.group}.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    write_whole(out / f"{args.group}.md", "\n".join(table(rows)) + "\n")
    print(f"wrote {out / args.group}.jsonl and .md")
    if args.group == "methods":
        plot(rows, out / "frontier.png")


if __name__ == "__main__":
    command(main)
