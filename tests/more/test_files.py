"""Files appear whole or not at all: whatever fails, the old file stays and nothing else is left behind."""

import contextlib
import errno
import itertools
import os
import re
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import each
from safetensors.torch import load_file, save_file

from plumbing.files import atomic, refuse_overwriting, write_whole

ROOT = Path(__file__).resolve().parents[2]


def files_of(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_file_is_written_whole_and_its_folders_are_made(tmp_path):
    path = tmp_path / "new" / "folder" / "a.txt"
    write_whole(path, "old 水獺\n")
    assert files_of(path.parent) == {"a.txt": "old 水獺\n".encode()}
    write_whole(str(path), "new\r\n\n")  # line breaks stay as they are
    assert files_of(path.parent) == {"a.txt": b"new\r\n\n"}


def test_the_old_file_stays_until_the_new_one_is_complete(tmp_path):
    path = tmp_path / "a.txt"
    write_whole(path, "old")
    with atomic(path) as temporary:
        assert temporary.parent == path.parent and temporary != path
        temporary.write_text("new")
        assert path.read_text() == "old"
    assert files_of(tmp_path) == {"a.txt": b"new"}


def test_any_failure_leaves_the_old_file_and_nothing_else(fresh, monkeypatch):
    for failure, where in each(
        itertools.product(
            [KeyboardInterrupt(), OSError(errno.ENOSPC, "No space left on device"), SystemExit()],
            ["the block", "fsync", "replace"],
        )
    ):
        tmp_path = fresh()
        with monkeypatch.context() as patch:
            path = tmp_path / "a.txt"
            write_whole(path, "old")

            def fail(*_):
                raise failure

            if where != "the block":
                patch.setattr(os, where, fail)
            with pytest.raises(type(failure)):
                with atomic(path) as temporary:
                    temporary.write_text("half")
                    if where == "the block":
                        fail()
            assert files_of(tmp_path) == {"a.txt": b"old"}


def test_half_a_character_leaves_the_old_file_and_nothing_else(tmp_path):
    write_whole(tmp_path / "a.txt", "old")
    with pytest.raises(UnicodeEncodeError):
        write_whole(tmp_path / "a.txt", "new" * 100_000 + "\ud800")
    assert files_of(tmp_path) == {"a.txt": b"old"}


def test_a_full_disk_leaves_the_old_file_and_nothing_else(tmp_path):
    """A limit on the size of files is as good as a full disk: the write stops midway."""
    script = ("import resource, signal, sys, torch; from plumbing import files; from safetensors.torch import save_file\n"
              "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
              "files.write_whole(sys.argv[1], 'old')\n"
              "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"
              "def tensors():\n"
              "    with files.atomic(sys.argv[1]) as path: save_file({'a': torch.zeros(1000)}, path)\n"
              "for write in (lambda: files.write_whole(sys.argv[1], 'new' * 1000), tensors):\n"
              "    try: write()\n"
              "    except OSError as error: print(error)\n")  # fmt: skip
    run = subprocess.run([sys.executable, "-c", script, tmp_path / "a.txt"], cwd=ROOT, capture_output=True, text=True)
    assert "File too large" in run.stdout and re.search(r"a.txt cannot be written .*free some space", run.stdout)
    assert files_of(tmp_path) == {"a.txt": b"old"}


def test_what_a_killed_process_left_is_in_nobody_s_way(tmp_path):
    script = "import os, sys; from plumbing import files\nwith files.atomic(sys.argv[1]) as t: t.write_text('half'); os.kill(os.getpid(), 9)"
    subprocess.run([sys.executable, "-c", script, tmp_path / "a.txt"], cwd=ROOT)
    (left,) = tmp_path.iterdir()
    left.chmod(0o400)
    write_whole(tmp_path / "a.txt", "new")
    assert files_of(tmp_path) == {"a.txt": b"new"}


def test_file_then_name_reach_the_disk_in_this_order(tmp_path, monkeypatch):
    done = []

    def synchronize(descriptor, fsync=os.fsync):
        done.append("folder" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else f"{os.fstat(descriptor).st_size} bytes")
        fsync(descriptor)

    def replace(old, new, replace=os.replace):
        done.append("replace")
        replace(old, new)

    monkeypatch.setattr(os, "fsync", synchronize)
    monkeypatch.setattr(os, "replace", replace)
    write_whole(tmp_path / "a.txt", "four")
    assert done == ["4 bytes", "replace", "folder"]


def test_files_get_ordinary_modes_even_from_a_library_that_writes_private_ones(tmp_path):
    (tmp_path / "ordinary").touch()
    write_whole(tmp_path / "text", "text")
    with atomic(tmp_path / "tensors") as temporary:
        save_file({"a": torch.arange(3)}, temporary)
        temporary.chmod(0o600)  # as some versions of safetensors do
    assert len({path.stat().st_mode for path in tmp_path.iterdir()}) == 1
    assert load_file(tmp_path / "tensors")["a"].tolist() == [0, 1, 2]


def test_a_folder_or_a_device_is_not_replaced(tmp_path):
    (tmp_path / "folder").mkdir()
    for path in [tmp_path / "folder", Path(os.devnull)]:
        with pytest.raises(ValueError, match=f"{path} is not a file"):
            write_whole(path, "text")
    assert stat.S_ISCHR(os.stat(os.devnull).st_mode)


def test_what_is_read_is_not_overwritten(fresh, monkeypatch):
    for read, written, refused in each([
    ("data/train.jsonl", "data", True), ("data/train.jsonl", "data/train.jsonl", True), ("data", "other/../data", True),
    ("data/train.jsonl", "data/new", False), ("data/train.jsonl", "other", False), ("data/train.jsonl", "", False),
]):  # fmt: skip
        tmp_path = fresh()
        monkeypatch.chdir(tmp_path)
        (tmp_path / "other").mkdir()
        with pytest.raises(ValueError, match=f"--out {written}: holds .*data") if refused else contextlib.nullcontext():
            refuse_overwriting([tmp_path / read], out=written, requests="")
