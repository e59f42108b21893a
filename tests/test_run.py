"""Runs that go on: interrupted, crashed, resumed, diverged. (Their folder: more/test_run_folder.py.)"""

import signal

import pytest
import torch
from conftest import each
from runs import ANSWER, Crash, assert_same, crash, interrupt, losses, make, rows, run

import train
from config import SampleConfig
from data import read_split
from loss import validate
from sample import Sampler
from training import run as run_module
from training.bookkeeping import Log
from training.checkpoint import load_checkpoint


def test_a_run_logs_its_losses_and_leaves_its_weights(whole):
    method, rows = whole
    assert [int(row["step"]) for row in rows] == list(range(1, 13))
    assert [bool(row["val_plan"]) for row in rows] == [step % 4 == 0 for step in range(1, 13)]
    assert any(float(row["span"]) for row in rows) == (method == "planned")


# ---------------------------------------------------------------- Ctrl-C


def test_a_run_stopped_by_ctrl_c_goes_on_as_if_it_had_not_been(whole, folder, fresh):
    for step in each([0, 3, 5, 8]):
        tmp_path = fresh()
        method, expected = whole
        interrupt(make(folder, tmp_path, method=method), step, lambda: signal.raise_signal(signal.SIGINT))
        assert len(losses(tmp_path)) == step + 1, "the update in progress is finished and saved"
        run(folder, tmp_path, method=method)
        assert_same(losses(tmp_path), expected)


def test_the_log_is_the_same_when_a_run_stops_between_two_of_its_lines(folder, tmp_path):
    rows = []
    for name, stop in (("whole", None), ("stopped", 5)):
        options = dict(log_every=4)
        if stop:
            interrupt(make(folder, tmp_path / name, **options), stop, lambda: signal.raise_signal(signal.SIGINT))
        run(folder, tmp_path / name, **options)
        rows.append(losses(tmp_path / name))
    assert_same(rows[0], rows[1])


# ---------------------------------------------------------------- crashes and power cuts


def test_a_run_that_crashes_between_checkpoints_goes_on_as_if_it_had_not(whole, folder, fresh):
    for steps in each([(2,), (4,), (7,), (11,), (5, 9), (6, 5, 4)]):
        tmp_path = fresh()
        method, expected = whole
        for step in steps:
            with pytest.raises(Crash):
                interrupt(make(folder, tmp_path, method=method), step, crash)
        run(folder, tmp_path, method=method)
        assert_same(losses(tmp_path), expected)


def test_so_does_a_run_without_spans(folder, fresh):
    whole, crashed = fresh(), fresh()
    run(folder, whole, method="ar")
    assert not any(float(row["span"]) for row in losses(whole))
    for step in (5, 9):
        with pytest.raises(Crash):
            interrupt(make(folder, crashed, method="ar"), step, crash)
    run(folder, crashed, method="ar")
    assert_same(losses(crashed), losses(whole))


def test_a_checkpoint_is_saved_before_its_validation(whole, folder, tmp_path, monkeypatch):
    """Whatever goes wrong there loses nothing, and a run that goes on makes up for the row of the log."""
    method, expected = whole
    saved = tmp_path / "checkpoint.safetensors"
    monkeypatch.setattr(train, "validate", lambda *args: (crash if saved.exists() else validate)(*args))
    for step in (4, 8, 12):
        with pytest.raises(Crash):
            run(folder, tmp_path, method=method)
        assert load_checkpoint(tmp_path / "checkpoint.safetensors")[2]["step"] == step
        with monkeypatch.context() as working:
            working.setattr(train, "validate", validate)
            trainer = make(folder, tmp_path, method=method)
            interrupt(trainer, step, crash) if step == 12 else pytest.raises(Crash, interrupt, trainer, step, crash)
        assert_same(losses(tmp_path), expected[:step])


@pytest.mark.parametrize("file", ["checkpoint.safetensors", "model.safetensors"])
def test_a_run_killed_before_one_of_its_last_files_writes_both_when_run_again(
    whole, folder, tmp_path, monkeypatch, file
):
    method, expected = whole
    save = run_module.save_checkpoint

    def dying(path, model, tokenizer, info, *more, **named):
        if path.name == file and info["step"] == 12:
            raise Crash
        save(path, model, tokenizer, info, *more, **named)

    monkeypatch.setattr(run_module, "save_checkpoint", dying)
    with pytest.raises(Crash):
        run(folder, tmp_path, method=method)
    monkeypatch.undo()
    run(folder, tmp_path, method=method)
    assert_same(losses(tmp_path), expected)
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint.safetensors", "model.safetensors", "log.csv"}
    steps = [load_checkpoint(tmp_path / f"{name}.safetensors")[2]["step"] for name in ("checkpoint", "model")]
    assert steps == [12, 12]


# ---------------------------------------------------------------- the log


def test_a_few_validation_prompts_are_answered_by_what_was_saved(folder, tmp_path, monkeypatch, capsys):
    prompts, kept = [], [example.prompt for example in read_split(folder / "val.jsonl")]
    begin = Sampler.begin
    monkeypatch.setattr(train.Trainer, "answer", ANSWER)
    threads = []
    monkeypatch.setattr(train, "use_threads", lambda: threads.append("those of training"))
    monkeypatch.setattr(Sampler, "begin", lambda self, asked: prompts.extend(asked) or begin(self, asked))
    run(folder, tmp_path, steps=8)
    monkeypatch.undo()
    log = rows(tmp_path)
    sampler = Sampler.load(tmp_path / "checkpoint.safetensors", SampleConfig(max_tokens=500))
    answers, asked = sampler.answer(prompts[: len(prompts) // 2]), prompts[: len(prompts) // 2]
    assert len(threads) == 3, "at the beginning, and once per validation, after a model of its own was loaded"
    assert {*asked} <= {*kept} and prompts[: len(asked)] == prompts[len(asked) : 2 * len(asked)]
    assert float(log[-1]["looping"]) == sum(answer.looping for answer in answers) / len(answers)
    assert 0 <= float(log[-1]["complete"]) <= 1 and not log[0]["complete"]
    said = capsys.readouterr().out.replace("\n  ", "  ")
    assert "of answers complete" in said and said.index("validation:") < said.index("step 1/8")


def test_the_log_is_on_the_disk_before_the_checkpoint_that_follows_it(folder, tmp_path, monkeypatch):
    events, save, to_disk = [], run_module.save_checkpoint, Log.to_disk
    monkeypatch.setattr(
        run_module, "save_checkpoint", lambda path, *a, **k: (events.append(path.name), save(path, *a, **k))
    )
    monkeypatch.setattr(Log, "to_disk", lambda self: (events.append("log"), to_disk(self)))
    run(folder, tmp_path, steps=8)
    assert events == ["log", "checkpoint.safetensors", "log", "model.safetensors", "checkpoint.safetensors"]


# ---------------------------------------------------------------- what goes wrong


def spoil(trainer, step, value=float("nan")):
    """Have update number `step` leave a weight that is not finite."""
    update = trainer.update

    def spoiling():
        losses = update()
        if trainer.progress.step == step:
            with torch.no_grad():
                trainer.model.embedding.weight[0, 0] = value
        return losses

    trainer.update = spoiling
    return trainer


def test_a_training_that_diverges_stops_and_keeps_its_last_good_checkpoint(folder, fresh):
    """Update 8 is saved: its losses are finite, its weights no longer."""
    for step in each([5, 7, 8]):
        tmp_path = fresh()
        with pytest.raises(ValueError, match="diverged"):
            spoil(make(folder, tmp_path), step).train()
        model, _, info, _ = load_checkpoint(tmp_path / "checkpoint.safetensors")
        assert info["step"] == 4 and all(p.isfinite().all() for p in model.parameters())
        assert [int(row["step"]) for row in losses(tmp_path)] == list(range(1, min(step, 7) + 1))
        assert not (tmp_path / "model.safetensors").exists()
