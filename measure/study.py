"""Trainings and measurements by name, each done once: they are kept under a hash of code, data and settings.

The weights stay in a folder; the figures are in one JSON file, from which tables and pictures can be made without
training again. An interrupted call goes on where it was.
"""

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from threading import Lock

from measure.code import TRAINING, fingerprint, sources
from plumbing.settings import ROOT, locate

DATA_FILES = ("train.jsonl", "val.jsonl", "test.jsonl", "tokenizer.json")


@dataclass(frozen=True)
class Model:
    """A training: the folder of its data, its options, and the model that it starts from, if any."""

    data: str
    train: str
    start: str = ""


def digest(*parts: object) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:12]


def call(script: str, options: list[str], log: Path) -> str:
    """Run one of the project's scripts; what it says goes to a log. Returns what it prints. Raises ValueError."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a") as file:
        file.write(f"{script} {' '.join(options)}\n")
        file.flush()
        out = subprocess.PIPE if script != "train.py" else file
        environment = {"OMP_NUM_THREADS": "1", **os.environ, "PYTHONUNBUFFERED": "1"}
        process = subprocess.Popen([sys.executable, ROOT / script, *options], stdout=out, stderr=file, text=True,
                                   env=environment)  # fmt: skip
        try:
            printed, _ = process.communicate()
        except KeyboardInterrupt:
            process.wait()  # it got the signal too, and saves
            raise
    if process.returncode:
        raise ValueError(f"{script} {' '.join(options)} failed: see the end of {log}")
    return printed or ""


def together(function: Callable, items: list[tuple], workers: int) -> list:
    """The function of each item, up to `workers` at a time; a failure stops what has not begun."""
    pool = ThreadPoolExecutor(workers)
    try:
        futures = [pool.submit(function, *item) for item in items]
        wait(futures, return_when=FIRST_EXCEPTION)
    finally:
        pool.shutdown(cancel_futures=True)
    return [future.result() for future in sorted(futures, key=lambda f: f.cancelled())]  # a failure first


class Study:
    """Trains `models` in `out` and measures them; `kept` is the JSON file of the figures."""

    def __init__(self, models: dict[str, Model], out: Path, kept: Path, device: str = "auto"):
        self.models, self.out, self.kept, self.device = models, out, kept, device
        self.figures = json.loads(kept.read_text()) if kept.exists() else {}
        self.code = {"train": fingerprint(TRAINING), "eval": fingerprint(sources(ROOT / "measure/eval.py"))}
        self.hashes: dict[str, list[str]] = {}
        self.lock = Lock()

    def data(self, folder: str) -> list[str]:
        """Hashes of a data set's files."""
        if folder not in self.hashes:
            missing = [name for name in DATA_FILES if not (locate(folder) / name).exists()]
            if missing:
                raise ValueError(f"{folder} has no {missing[0]}: python {folder}/prepare.py writes it")
            texts = [(locate(folder) / name).read_bytes() for name in DATA_FILES]
            self.hashes[folder] = [hashlib.sha256(text).hexdigest()[:16] for text in texts]
        return self.hashes[folder]

    def key(self, name: str, seed: int) -> str:
        """What a training is kept under: all that decides its weights."""
        model = self.models[name]
        start = self.key(model.start, seed) if model.start else ""
        return digest(self.code["train"], self.data(model.data), model.train, seed, start)

    def folder(self, name: str, seed: int) -> Path:
        return self.out / f"{name.replace(' ', '-')}-{seed}-{self.key(name, seed)}"

    def train(self, name: str, seed: int) -> Path:
        """The checkpoint of a training, which is run now if it is not there."""
        model, folder = self.models[name], self.folder(name, seed)
        path = folder / "model.safetensors"
        if path.exists():
            return path
        options = ["--data", model.data, *model.train.split(), "--seed", str(seed), "--device", self.device]
        options += ["--init", str(self.train(model.start, seed))] if model.start else []
        print(f"training {name}, seed {seed}; follow it in {folder / 'log.txt'}", flush=True)
        call("train.py", [*options, "--out", str(folder)], folder / "log.txt")
        if not path.exists():
            raise ValueError(f"the training of {name} was stopped: see the end of {folder / 'log.txt'}")
        (folder / "checkpoint.safetensors").unlink(missing_ok=True)  # a finished run needs no more than its model
        return path
