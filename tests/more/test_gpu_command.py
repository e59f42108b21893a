"""measure/gpu.py: the whole of it on a CPU, small and with the kernel emulated; and what it does when a part fails."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from importlib.metadata import PackageNotFoundError

import pytest
import torch
from conftest import each, random_example, small_model
from test_documents import options_of

from config import METHODS, MethodConfig, SampleConfig
from data import write_dataset
from measure import gpu, gpu_parts
from methods import decoded_as
from plumbing.settings import ROOT, refuse_idle
from tokenizer import Tokenizer
from training.checkpoint import save_checkpoint

SHAPE = {"n_layer": 1, "d_model": 32, "n_head": 1, "n_kv_head": 1, "d_ff": 32}
FORKED = """
import os, runpy, sys, traceback
import pytest, torch, torch._dynamo, torch.nn.attention.flex_attention  # once, for all parts
import kernels.bench, measure.eval  # but not train.py, which picks its type as it is imported
from measure import gpu

def run(words, log, seconds):
    child = os.fork()
    if not child:
        os.dup2(os.open(log, os.O_CREAT | os.O_WRONLY), 1)
        os.dup2(1, 2)
        sys.argv = words[2:] if words[1] == "-m" else words[1:]
        try:
            runpy.run_module(words[2], None, "__main__") if words[1] == "-m" else runpy.run_path(words[1], None, "__main__")
            code = 0
        except SystemExit as end:
            code = int(end.code or 0) if isinstance(end.code, (int, type(None))) else print(end.code) or 1
        except BaseException:
            code = traceback.print_exc() or 1
        sys.stdout.flush()
        os._exit(code)  # python takes seconds to clean up
    return "failed" if os.waitpid(child, 0)[1] else "ok"

gpu.run = run
gpu.command(gpu.main)
"""


@pytest.fixture
def folder(tokenizer, fresh):
    """A data set, and checkpoints of untrained models for it."""
    folder = fresh()
    examples = [random_example(seed, tokenizer, rounds=2, spans=2) for seed in range(12)]
    write_dataset(folder, {"train": examples, "val": examples[:2], "test": examples[:3]}, 400, 4)
    tokenizer = Tokenizer.load(folder / "tokenizer.json")
    for method in ("planned", "ar", "joint"):
        info = {"method": vars(MethodConfig(method))}
        save_checkpoint(folder / f"{method}.safetensors", small_model(tokenizer.vocab_size, **SHAPE), tokenizer, info)
    return folder


@pytest.mark.skipif(not shutil.which("g++"), reason="emulating the kernel needs g++")
def test_all_parts_run_on_a_cpu_with_the_kernel_emulated(folder, tmp_path):
    options = ["--device", "cpu", "--data", folder, "--checkpoints", folder, "--out", tmp_path / "out"]
    settings = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", FORKED, *options], cwd=ROOT, env=settings, capture_output=True)
    report = json.loads((tmp_path / "out/report.json").read_text())
    assert [(p["part"], p["state"], p["said"]) for p in report["parts"] if p["state"] != "ok"] == []
    assert [p["part"] for p in report["parts"]] == [p.name for p in gpu.PARTS] and report["device"] == "cpu"
    rows = {p["part"]: p["rows"] for p in report["parts"]}
    assert all(rows[name] for name in rows if name not in ("tests of the kernel", "training", "paper page"))
    for model, ways in gpu_parts.WAYS.items():
        said = [row["what"] for row in rows[f"sampling: {model}"]]
        assert {f"{way}, batch {batch}" for way in ways for batch in (1, 2)} <= {*said}
    (both,) = rows["training, stopped and resumed"]
    assert both["stopped after update"] < 6 and both["largest difference after"] == "0.00000"
    assert all(row["same texts"] == "2 of 2" for name in rows for row in rows[name] if "same texts" in row)
    for name in ("kernel beside others: training", "kernel beside others: sampling"):
        assert all({"kernel", "SDPA"} <= row.keys() and "differs" not in row["notes"] for row in rows[name])
    table = (tmp_path / "out/report.md").read_text()
    assert table.count("\n|") == 2 + sum(max(1, len(p["rows"])) for p in report["parts"]) and "**" not in table


# ---------------------------------------------------------------- parts that fail


def called(monkeypatch, out, parts, *options):
    """The report of these parts, each a piece of Python, and how the command ended."""
    for name, _, code in parts:
        (out / f"{name}.py").write_text(code)
    monkeypatch.setattr(gpu, "PARTS", [gpu.Part(name, seconds, f"'{out}/{name}.py'") for name, seconds, _ in parts])
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--out", str(out), *options])
    with pytest.raises(SystemExit) as end:
        gpu.main()
    return json.loads((out / "report.json").read_text()), end.value.code


def test_a_part_that_fails_is_a_row_and_the_next_one_runs(monkeypatch, tmp_path):
    parts = [
        ("breaks", 60, 'import json; print(json.dumps(dict(what="first", passes=3))); 1 / 0'),
        ("says so", 60, 'import json; print(json.dumps(dict(what="x | y", failed="not right")))'),
        ("works", 60, 'import json; print("half way", json.dumps(dict(what="a", device="abacus")), sep="\\r")'),
    ]
    report, code = called(monkeypatch, tmp_path, parts)
    assert code == 1 and [p["state"] for p in report["parts"]] == ["failed", "failed", "ok"]
    assert report["parts"][0]["rows"] == [{"what": "first", "passes": 3}]
    assert report["parts"][0]["said"][-1] == "ZeroDivisionError: division by zero" and report["device"] == "abacus"
    table = (tmp_path / "report.md").read_text()
    assert "| breaks | **failed** | 0 | first | passes 3 |" in table and "    ZeroDivisionError" in table
    assert "| x / y | **failed not right** |" in table and "# abacus" in table


def beating(beat):
    """Code that starts a process which touches a file again and again, and waits for it."""
    child = f"import time, pathlib\nwhile True: time.sleep(0.05); pathlib.Path({str(beat)!r}).touch()"
    return f"import subprocess, sys; subprocess.Popen([sys.executable, '-c', {child!r}])"


def beats(beat):
    last = beat.stat().st_mtime
    time.sleep(0.3)
    return beat.stat().st_mtime > last


def test_a_part_that_hangs_ends_with_all_that_it_has_started(monkeypatch, tmp_path):
    parts = [("hangs", 2, beating(tmp_path / "beat") + ".wait()"), ("works", 10, "print(1)")]
    report, code = called(monkeypatch, tmp_path, parts, "--minutes", "0.2")
    assert code == 1 and [p["state"] for p in report["parts"]] == ["stopped after 2 s", "ok"]
    assert not beats(tmp_path / "beat")


def test_whoever_ends_the_command_ends_its_part(monkeypatch, tmp_path):
    ends = f"{beating(tmp_path / 'beat')}; import os, time; time.sleep(1); os.kill(os.getppid(), 15); time.sleep(9)"
    before = signal.getsignal(signal.SIGTERM)
    try:
        with pytest.raises(KeyboardInterrupt):
            called(monkeypatch, tmp_path, [("ends", 20, ends)], "--minutes", "0.3")
    finally:
        signal.signal(signal.SIGTERM, before)
    assert not beats(tmp_path / "beat")


def test_what_no_longer_fits_is_left_out(monkeypatch, tmp_path):
    report, code = called(monkeypatch, tmp_path, [("short", 10, "print(1)"), ("long", 100, "")], "--minutes", "0.5")
    assert code == 1 and [p["state"].split(":")[0] for p in report["parts"]] == ["ok", "left out"]
    assert "s were left** | 0 |" in (tmp_path / "report.md").read_text()


def test_the_report_is_there_after_each_part(monkeypatch, tmp_path):
    look = f'import json; print(len(json.load(open("{tmp_path}/report.json"))["parts"]))'
    report, code = called(monkeypatch, tmp_path, [("first", 60, "print(1)"), ("second", 60, look), ("third", 60, look)])
    assert code == 0 and [p["said"] for p in report["parts"]] == [["1"], ["1"], ["2"]]


def test_only_some_parts(monkeypatch, tmp_path):
    parts = [(name, 60, "print(1)") for name in ("kernel, built", "training", "kernel, timed")]
    report, _ = called(monkeypatch, tmp_path, parts, "--only", "timed", "train")
    assert [p["part"] for p in report["parts"]] == ["training", "kernel, timed"]


# ---------------------------------------------------------------- a bare machine


def test_it_begins_without_any_package():
    done = subprocess.run([sys.executable, "-S", ROOT / "measure/gpu.py", "--help"], capture_output=True, text=True)
    assert done.returncode == 0 and "--minutes" in done.stdout, done.stderr


def test_missing_packages_are_named_with_what_installs_them(monkeypatch, capsys):
    def version(name):
        if name in ("tiktoken", "pytest"):
            raise PackageNotFoundError(name)
        return "1.0"

    monkeypatch.setattr(gpu_parts, "version", version)
    monkeypatch.setattr(sys, "argv", ["gpu_parts.py", "cpu", "data/tasks", "checkpoints/tasks", "out", "versions"])
    gpu_parts.main()
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert rows[1]["failed"] == "pip install 'tiktoken>=0.8,<1' 'pytest>=8,<10'"
    assert rows[-1]["device"] == "cpu"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_ends_at_once(tmp_path):
    done = subprocess.run([sys.executable, ROOT / "measure/gpu.py", "--out", tmp_path], capture_output=True, text=True)
    assert done.returncode == 1 and "nothing to compute on" in done.stdout
    assert len(json.loads((tmp_path / "report.json").read_text())["parts"]) == 1


# ---------------------------------------------------------------- what would run on a GPU


def test_scripts_take_the_options_of_each_part(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--out", str(tmp_path)])
    args = gpu.options()
    for part in each(gpu.PARTS):
        _, script, *words = gpu.command_of(part, args)
        if script != "-m":
            options_of(script, words, monkeypatch)


def test_no_way_to_sample_has_a_setting_that_does_nothing():
    for model, ways in gpu_parts.WAYS.items():
        for settings, method in each(ways.values()):
            trained = MethodConfig(model if model in METHODS else "planned")
            config = SampleConfig(**settings)
            refuse_idle(config, MethodConfig(method) if method else decoded_as(trained, config.decode))
