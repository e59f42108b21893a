"""The folder of a run: what a run says and leaves there, and what does it no harm."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from conftest import each
from runs import SHAPE, Crash, assert_same, crash, interrupt, losses, make, options_of, run, said

import train
from noise import TERMS
from training import run as run_module
from training.bookkeeping import Log, fold
from training.checkpoint import load_checkpoint


def test_a_run_speaks_at_its_first_update_and_then_as_often_as_it_logs(folder, tmp_path, capsys):
    run(folder, tmp_path, steps=7, log_every=5, validate_every=7)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("reading ")
    pattern = r"step +(\d+)/7  plan \d\.\d+  span \d\.\d+  \d+ tokens/s  \d\.\d min left$"
    steps = [re.match(pattern, line) for line in lines]
    assert [int(match[1]) for match in steps if match] == [1, 5, 7]
    assert [int(row["step"]) for row in losses(tmp_path)] == [5, 7], "a row has the mean of all updates since the last"
    assert all(len(line) <= 80 for line in lines if line.startswith(("step", "validation")))
    model = tmp_path / "model.safetensors"
    wrote, *command = lines[-3:]
    assert wrote == f"wrote {model}; answer with:"
    assert "".join(command).startswith(f"  python sample.py --checkpoint {model} \\    --prompt ")
    run(folder, tmp_path, steps=7, log_every=5, validate_every=7)
    assert f"already finished: {model}; answer with:" in capsys.readouterr().out


def test_what_a_line_has_no_room_for_goes_on_below():
    parts = ["step 10/500", *(f"{name} 1.2345" for name in TERMS), "1234 tokens/s", "1.5 min left"]
    first, second = fold(parts).splitlines()
    assert max(len(first), len(second)) <= 80 and (first + second).split("  ") == parts


def test_validations_and_checkpoints_come_when_they_are_due_whatever_the_log_does(folder, fresh, monkeypatch):
    for log_every, rows in each([(1, [1, 2, 3, 4, 5, 6, 7]), (3, [2, 3, 4, 6, 7]), (50, [2, 4, 6, 7])]):
        tmp_path = fresh()
        with monkeypatch.context() as patch:
            saved, save = [], run_module.save_checkpoint
            noting = lambda path, model, tokenizer, info, *a, **k: (
                saved.append(info["step"]),
                save(path, model, tokenizer, info, *a, **k),
            )
            patch.setattr(run_module, "save_checkpoint", noting)
            run(folder, tmp_path, steps=7, validate_every=2, log_every=log_every)
            assert [int(row["step"]) for row in losses(tmp_path)] == rows
            assert [int(row["step"]) for row in losses(tmp_path) if row["val_plan"]] == [2, 4, 6, 7]
            assert sorted(set(saved)) == [2, 4, 6, 7]


def test_a_finished_run_does_nothing_more(whole, folder, tmp_path):
    run(folder, tmp_path, steps=2)
    before = losses(tmp_path), (tmp_path / "model.safetensors").read_bytes()
    run(folder, tmp_path, steps=2)
    assert (losses(tmp_path), (tmp_path / "model.safetensors").read_bytes()) == before


def test_a_finished_run_without_its_model_writes_that(folder, tmp_path):
    run(folder, tmp_path, steps=2)
    path = tmp_path / "model.safetensors"
    first = load_checkpoint(path)[0].state_dict()
    path.unlink()
    run(folder, tmp_path, steps=2)
    torch.testing.assert_close(load_checkpoint(path)[0].state_dict(), first)


def test_a_run_leaves_its_three_files_with_the_mode_of_any_file(folder, tmp_path):
    run(folder, tmp_path, steps=2)
    (tmp_path / "any").touch()
    modes = {path.name: path.stat().st_mode for path in tmp_path.iterdir()}
    assert (
        modes.keys() == {"checkpoint.safetensors", "model.safetensors", "log.csv", "any"}
        and len(set(modes.values())) == 1
    )


def test_other_settings_in_the_same_folder_are_refused(folder, tmp_path):
    run(folder, tmp_path, steps=1)
    with pytest.raises(ValueError, match=r"lr \(0.005, not 0.1\).*another --out"):
        run(folder, tmp_path, steps=1, lr=0.1)
    with pytest.raises(ValueError, match=r"a model of other n_layer \(1, not 2\): give this run the same"):
        run(folder, tmp_path, steps=1, shape={**SHAPE, "n_layer": 2})
    other = tmp_path / "other"
    shutil.copytree(folder, other)
    text = (other / "tokenizer.json").read_text()
    (other / "tokenizer.json").write_text(re.sub(r'"unit": ?4', '"unit": 8', text))
    with pytest.raises(ValueError, match="in units of 4 tokens.* in units of 8: .*another --out"):
        run(other, tmp_path, steps=1)
    (other / "tokenizer.json").write_text(text)
    run(other, tmp_path, steps=1)  # the same data elsewhere
    rows = (other / "train.jsonl").read_text().splitlines(keepends=True)
    (other / "train.jsonl").write_text("".join(rows[::-1]))
    with pytest.raises(ValueError, match="other training examples than when .*another --out"):
        run(other, tmp_path, steps=1)


def test_a_finished_model_without_its_checkpoint_is_not_overwritten(folder, tmp_path):
    run(folder, tmp_path, steps=1)
    (tmp_path / "checkpoint.safetensors").unlink()
    with pytest.raises(ValueError, match="holds a finished model but no checkpoint to go on from: take another --out"):
        run(folder, tmp_path, steps=2)


def test_ctrl_c_stops_no_compiler_that_a_run_has_called(folder, tmp_path):
    """It would leave half a file. The terminal sends the signal to all of its processes."""
    called = []

    def press():
        compiler = [sys.executable, "-c", "import os, signal; os.kill(os.getpid(), signal.SIGINT); print('done')"]
        called.append(subprocess.run(compiler, capture_output=True, text=True).stdout)
        os.kill(os.getpid(), signal.SIGINT)

    interrupt(make(folder, tmp_path), 2, press)
    assert called == ["done\n"] and len(losses(tmp_path)) == 3
    with pytest.raises(KeyboardInterrupt):  # now it does again what it did
        signal.raise_signal(signal.SIGINT)


def test_where_signals_cannot_be_blocked_ctrl_c_still_waits_for_the_end_of_an_update(folder, tmp_path, monkeypatch):
    """As on Windows."""
    for name in ("pthread_sigmask", "sigpending"):
        monkeypatch.delattr(signal, name)
    interrupt(make(folder, tmp_path), 2, lambda: signal.raise_signal(signal.SIGINT))
    assert len(losses(tmp_path)) == 3
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)


SLOW = """
import time, train
update = train.Trainer.update
train.Trainer.update = lambda trainer: (time.sleep(0.1), update(trainer))[1]
train.command(train.main)
"""


def test_a_run_killed_at_any_moment_goes_on_as_if_it_had_not_been(whole, folder, tmp_path):
    method, expected = whole
    process = subprocess.Popen([sys.executable, "-c", SLOW, *options_of(folder, tmp_path, method=method)],
                               cwd=train.__file__.rpartition(os.sep)[0], stdout=subprocess.DEVNULL)  # fmt: skip
    log, deadline = tmp_path / "log.csv", time.time() + 120
    while process.poll() is None and time.time() < deadline and not (log.exists() and log.read_text().count("\n") > 6):
        time.sleep(0.01)
    time.sleep(0.1 * np.random.default_rng(len(method)).random())
    process.kill()
    assert process.wait() == -signal.SIGKILL
    run(folder, tmp_path, method=method)
    assert_same(losses(tmp_path), expected)


REST = "," * (2 * len(TERMS) - 2 + 2)  # the columns after plan and span, empty


ROW = "1,100,0.5,1.00000,2.00000" + REST


JUNK = [
    ("", 0),
    (ROW, 0),
    (ROW + "\n", 1),
    (ROW + "\n2,200,1.0,1.00000,2.0", 1),
    (ROW + f"\n2,200,1.0,1.0,2.0{REST}", 1),  # as it would be without the rest of its last number
    (ROW + f"\n2,200,1.0,1.0,2.0{REST}\n3,300,1.5,1.0,2.0,3.0", 2),
    (f"step,tokens,seconds,plan,span\n{ROW}\n2,200,1.0,1.0,2.0,0.1,0.2{REST[2:]}\n3,1,1,1,1{REST}\n", 2),
    (f"\x00\x01\n\n,,,,,,\n{ROW}\nfive,1,1,1,1{REST}\n2,1,1,nan,1{REST}\n-1,1,1,1,1{REST}\n2,1,1,1,1\n", 1),
    ("9" * 5000 + f",1,1,1,1{REST}\n", 0),
]  # fmt: skip


def test_only_whole_rows_up_to_the_checkpoint_survive_in_the_log(fresh):
    for junk, kept in each(JUNK):
        tmp_path = fresh()
        path = tmp_path / "log.csv"
        path.write_bytes(junk.encode("latin-1"))
        log = Log(path, 2)
        assert [row["step"] for row in losses(tmp_path)] == ["1", "2"][:kept] and log.last == kept
        log.write(dict(step=3, plan=1.0, span=2.0))
        assert path.read_text().splitlines()[kept + 1] == "3,,,1.00000,2.00000" + REST
        log.close()


DAMAGES = [
    (r"(?s)\n4,.*", "\n", []), (r"(?s)\n4,.*", "\n4,1", []), (r"(?s)\n4,.*", "\n\0", []), (r"\n2,.*", "\n2,x,\0", [2]),
    (r"(?s).*", "junk", [1, 2, 3]),
]  # fmt: skip


def test_a_damaged_log_blocks_no_run_and_the_row_of_its_checkpoint_is_made_again(whole, folder, fresh):
    for pattern, damage, lost in each(DAMAGES):
        tmp_path = fresh()
        method, expected = whole
        with pytest.raises(Crash):
            interrupt(make(folder, tmp_path, method=method), 6, crash)
        log = tmp_path / "log.csv"
        log.write_text(re.sub(pattern, damage, log.read_text(), count=1))
        run(folder, tmp_path, method=method)
        assert_same(losses(tmp_path), [row for row in expected if int(row["step"]) not in lost])


def test_a_learning_rate_that_is_much_too_high_is_said_to_diverge(folder, tmp_path):
    with pytest.raises(ValueError, match="the loss is .* after .* updates: the training has diverged.*lower --lr"):
        run(folder, tmp_path, lr=1e30, adam_lr=1e30)


def test_a_folder_that_cannot_be_written_is_named_before_the_first_update(monkeypatch, folder, tmp_path):
    (tmp_path / "file").touch()
    assert str(tmp_path / "file") in said(monkeypatch, "--batch", 2, "--data", folder, "--out", tmp_path / "file")


def test_a_full_disk_is_said_in_a_line_and_the_last_checkpoint_stays(folder, tmp_path, monkeypatch, capsys):
    """A limit on the size of files, as large as the log needs, fails as a full disk does."""
    resource = pytest.importorskip("resource")
    run(folder, tmp_path, steps=6, validate_every=3, log_every=3)
    whole = load_checkpoint(tmp_path / "checkpoint.safetensors")[2]
    files = {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.name != "log.csv"}
    (tmp_path / "model.safetensors").unlink()
    options = options_of(folder, tmp_path, steps=6, validate_every=3, log_every=3)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (9000, limits[1]))
    try:
        line = said(monkeypatch, *options)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert f"{tmp_path}/model.safetensors" in line and "write elsewhere" in line
    assert {path.name for path in tmp_path.iterdir()} == {"log.csv", "checkpoint.safetensors"}
    assert (tmp_path / "checkpoint.safetensors").read_bytes() == files["checkpoint.safetensors"] and whole["step"] == 6
