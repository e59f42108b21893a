"""Trainings and measurements by name, each done once: they are kept under a hash of code, data and settings.

The weights stay in a folder; the figures are in one JSON file, from which page and pictures are made without training
again. An interrupted call goes on where it was.
"""

import fcntl
import hashlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from config import SampleConfig
from measure.code import TRAINING, bare, fingerprint, sources
from measure.eval import EvalConfig, evaluate
from plumbing.files import write_whole
from plumbing.settings import ROOT, locate

DATA_FILES = ("train.jsonl", "val.jsonl", "test.jsonl", "tokenizer.json")
KEPT = ("scores", "readers", "pad_share", "spans_per_answer")  # of a report


@dataclass(frozen=True)
class Model:
    """A training: the folder of its data, its options, and the model that it starts from, if any."""

    data: str
    train: str
    start: str = ""


def digest(*parts: object) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:12]


def sample_config(options: str) -> SampleConfig:
    """Settings from options as sample.py takes them."""
    words, default = options.replace("--", "").split(), SampleConfig()
    return SampleConfig(**{key: type(getattr(default, key))(value) for key, value in zip(words[::2], words[1::2])})


def rounded(value: Any) -> Any:
    """A value for JSON with numbers of five digits."""
    if isinstance(value, dict):
        return {key: rounded(part) for key, part in value.items()}
    if isinstance(value, list):
        return [rounded(part) for part in value]
    return float(f"{value:.5g}") if isinstance(value, float) else value


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Wait until no other process, or part of this one, is in such a block of the same folder, which is made."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


class Study:
    """Trains `models` in `out` and measures them; the figures are kept in `kept`.

    `limit`: data set -> how many test prompts are answered, where not all are; "": of every other.
    """

    def __init__(self, models: dict[str, Model], out: Path, kept: Path, limit: dict[str, int], device: str = "auto"):
        self.models, self.out, self.kept, self.limit, self.device = models, out, kept, limit, device
        self.figures = json.loads(kept.read_text()) if kept.exists() else {}
        self.used: dict[str, dict] = {}  # figures that this call has asked for
        self.code = {"train": fingerprint(TRAINING), "eval": fingerprint(sources(ROOT / "measure/eval.py"))}
        self.code["probes"] = fingerprint(ROOT / f"measure/{name}.py" for name in ("probes", "variants"))
        self.hashes: dict[str, list[str]] = {}

    def data(self, folder: str) -> list[str]:
        """Hashes of a data set's files."""
        if folder not in self.hashes:
            missing = [name for name in DATA_FILES if not (locate(folder) / name).exists()]
            if missing:
                raise ValueError(f"{folder} has no {missing[0]}: python {folder}/prepare.py writes it")
            texts = [(locate(folder) / name).read_bytes() for name in DATA_FILES]
            self.hashes[folder] = [hashlib.sha256(text).hexdigest()[:16] for text in texts]
        return self.hashes[folder]

    def checker(self, folder: str) -> str:
        """A hash of what says which answers are right."""
        script = locate(folder) / "families.py"
        return digest(*(bare(path) for path in sorted(sources(script)))) if script.exists() else ""

    def limit_of(self, data: str) -> int:
        """How many test prompts of a data set are answered; 0: all."""
        return self.limit.get(data, self.limit.get("", 0))

    def key(self, name: str, seed: int) -> str:
        """What a training is kept under: all that decides its weights."""
        model = self.models[name]
        start = self.key(model.start, seed) if model.start else ""
        return digest(self.code["train"], self.data(model.data), model.train, seed, start)

    def train(self, name: str, seed: int) -> Path:
        """The checkpoint of a training, which is run now if it is not there. Raises ValueError if it fails."""
        model, called = self.models[name], re.sub(r"\W+", "-", name)
        folder = self.out / f"{called}-{seed}-{self.key(name, seed)}"
        path = folder / "model.safetensors"
        if path.exists():
            return path
        options = ["--data", model.data, *model.train.split(), "--seed", str(seed), "--device", self.device]
        options += ["--init", str(self.train(model.start, seed))] if model.start else []
        with alone(folder):
            return path if path.exists() else self.run(options, path, f"{name}, seed {seed}")

    def run(self, options: list[str], path: Path, name: str) -> Path:
        """Run train.py until it has written `path`, or go on with what is in its folder."""
        folder, log = path.parent, path.with_name("log.txt")
        print(f"training {name}; follow it in {log}", flush=True)
        environment = {"OMP_NUM_THREADS": "1", **os.environ, "PYTHONUNBUFFERED": "1"}
        with log.open("a") as file:
            process = subprocess.Popen([sys.executable, ROOT / "train.py", *options, "--out", folder], stdout=file,
                                       stderr=file, env=environment)  # fmt: skip
            try:
                process.wait()
            except KeyboardInterrupt:
                process.wait()  # it got the signal too, and saves
                raise
        if process.returncode or not path.exists():
            raise ValueError(f"the training of {name} ended before its time: see the end of {log}")
        (folder / "checkpoint.safetensors").unlink(missing_ok=True)  # a finished run needs no more than its model
        return path

    def figure(self, what: str, parts: list, measure: Callable[[], dict]) -> dict:
        """What `measure` returns, kept under what it is and all `parts` that decide it besides the sampling code."""
        key = digest(self.code["eval"], what, parts)
        if key not in self.figures:
            print(f"measuring {what}", flush=True)
            figure = {"what": what} | rounded(measure())
            with alone(self.out):  # another call may write the same file
                self.figures = (json.loads(self.kept.read_text()) if self.kept.exists() else {}) | {key: figure}
                rows = ",\n".join(f"{json.dumps(k)}: {json.dumps(self.figures[k])}" for k in sorted(self.figures))
                write_whole(self.kept, "{\n" + rows + "\n}\n")
        self.used[key] = self.figures[key]
        return self.figures[key]

    def probe(self, what: str, parts: list, measure: Callable[[], dict]) -> dict:
        """A figure that measure/probes.py measures."""
        return self.figure(what, [self.code["probes"], *parts], measure)

    def report(self, name: str, seed: int, sample: str = "", draft: str = "", data: str = "") -> dict:
        """What eval.py reports of a model, sampled with the given options, on its data set or on another."""
        data = data or self.models[name].data
        limit, keys = self.limit_of(data), [self.key(model, seed) for model in (name, draft) if model]

        def measure() -> dict:
            drafter = str(self.train(draft, seed)) if draft else ""
            found = evaluate(EvalConfig(str(self.train(name, seed)), data, limit=limit, draws=0, draft=drafter,
                                        device=self.device), sample_config(sample))  # fmt: skip
            return {key: found[key] for key in KEPT}

        parts = [keys, self.data(data), self.checker(data), sample, limit]
        return self.figure(f"{name} {sample} seed {seed}", parts, measure)
