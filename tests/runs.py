"""What the tests of training share: small runs, ways to interrupt them, and their logs."""

import csv
import sys

import pytest
from conftest import random_example

import train
from config import MethodConfig, TrainConfig
from data import write_dataset
from model import ModelConfig
from train import Trainer

ANSWER, Trainer.answer = (
    Trainer.answer,
    lambda trainer, checkpoint: {},
)  # they took longer than the trainings; test_run.py has its test
SHAPE = dict(n_layer=1, d_model=32, n_head=2, n_kv_head=1, d_ff=32)


def examples(tokenizer, n, first=0, **fixed):
    return [random_example(seed, tokenizer, **fixed) for seed in range(first, first + n)]


def data_set(path, tokenizer):
    """Write a data set of 22 examples. Returns its folder."""
    written = examples(tokenizer, 22)
    write_dataset(path, {"train": written[:16], "val": written[16:]}, 256 + 74 + 40, 4)
    return path


def settings(folder, out, **changed):
    few = dict(data=str(folder), out=str(out), batch=2, steps=12, warmup=2, validate_every=4, log_every=1)
    return TrainConfig(**{**few, **changed})


def make(folder, out, method="planned", shape=SHAPE, **changed):
    return Trainer(settings(folder, out, **changed), ModelConfig(**shape), MethodConfig(method))


def run(folder, out, **changed):
    """Train to the end, going on with what is in `out`."""
    make(folder, out, **changed).train()


def rows(out):
    return [*csv.DictReader((out / "log.csv").open())]


def losses(out):
    """log.csv without its clock and shares of answers, which are not always made here."""
    return [{k: v for k, v in row.items() if k not in ("seconds", "complete", "looping")} for row in rows(out)]


def assert_same(rows, expected):
    """Rows of a log are the same up to rounding."""
    table = lambda rows: [[float(cell or -1) for cell in row.values()] for row in rows]
    assert table(rows) == [pytest.approx(row, abs=1e-4) for row in table(expected)]


def options_of(folder, out, method="planned", **changed):
    """The same run as a command line."""
    options = {**vars(settings(folder, out, **changed)), **SHAPE, "method": method}
    return [f"--{name}={value}" for name, value in options.items() if not isinstance(value, bool)]


def interrupt(trainer, step, how):
    """Let something happen in a run's update number `step`."""
    update = trainer.update

    def interrupted():
        if trainer.progress.step == step:
            how()
        return update()

    trainer.update = interrupted
    trainer.train()


class Crash(BaseException):
    """Ends a run on the spot, as a power cut would."""


def crash(*args, **more):
    raise Crash


def said(monkeypatch, *options):
    """What train.py says on its way out."""
    monkeypatch.setattr(sys, "argv", ["train.py", *map(str, options)])
    with pytest.raises(SystemExit) as end:
        train.command(train.main)
    assert isinstance(end.value.code, str) and "\n" not in end.value.code
    return end.value.code
