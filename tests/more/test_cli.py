"""The commands as a user meets them: their help, their output, and what they say when something is wrong."""

import io
import itertools
import json
import re
import runpy
import subprocess
import sys
from dataclasses import asdict, fields
from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import each, random_example, small_model
from safetensors.torch import save_file

from config import MethodConfig, SampleConfig, TrainConfig
from data import write_dataset
from measure import bench
from measure.eval import EvalConfig
from model import ModelConfig
from plumbing.settings import Help, one_line, printable
from training.checkpoint import save_checkpoint

ROOT = Path(__file__).resolve().parents[2]
RESULT = {
    "text",
    "rounds",
    "plan_passes",
    "denoise_passes",
    "critical_path",
    "positions",
    "content_tokens",
    "slots",
    "pads",
    "seconds",
}


@pytest.fixture(scope="module")
def files(tokenizer, tmp_path_factory):
    """A folder with a data set, a checkpoint of a random model, and files that are no checkpoints."""
    folder = tmp_path_factory.mktemp("cli")
    examples = [random_example(seed, tokenizer) for seed in range(8)]
    write_dataset(folder, {"train": examples, "val": examples[:2], "test": examples[:2]}, 256 + 74 + 40, 4)
    model = small_model(tokenizer.vocab_size)
    whole = folder / "model.safetensors"
    save_checkpoint(whole, model, tokenizer, {"method": asdict(MethodConfig())})
    save_checkpoint(folder / "block.safetensors", model, tokenizer, {"method": asdict(MethodConfig("block", 4))})
    (folder / "cut.safetensors").write_bytes(whole.read_bytes()[:5000])
    (folder / "empty.safetensors").write_bytes(b"")
    (folder / "text.safetensors").write_text("not a model")
    save_file({"w": model.embedding.weight.detach()}, folder / "other.safetensors")
    return folder


@pytest.fixture
def cli(monkeypatch, capsys, files):
    """Run a script as the command line does: (exit code, stdout, stderr). An exception that escapes fails the test."""

    def run(script, *args, columns=500):  # so many that argparse breaks no line
        monkeypatch.setattr(sys, "argv", [str(script), *(str(a).replace("FILES", str(files)) for a in args)])
        monkeypatch.setenv("COLUMNS", str(columns))
        code = 0
        try:
            runpy.run_path(str(ROOT / script), run_name="__main__")
        except SystemExit as exit_:
            code = exit_.code or 0
            if isinstance(code, str):  # as Python does on its way out
                print(code, file=sys.stderr)
                code = 1
        return code, *capsys.readouterr()

    return run


# ---------------------------------------------------------------- help


def test_help_shows_every_setting_with_its_default(cli):
    for script, classes in each(
        [
            ("train.py", (TrainConfig, MethodConfig, ModelConfig)),
            ("sample.py", (SampleConfig,)),
            ("measure/eval.py", (EvalConfig, SampleConfig)),
        ]
    ):
        code, out, _ = cli(script, "--help")
        assert code == 0
        words = " ".join(out.split())
        for f in (f for cls in classes for f in fields(cls) if "help" in f.metadata):
            assert f" --{f.name}" in words and f"{f.metadata['help']} (default: {f.default})" in words


def test_help_of_the_small_scripts(cli):
    for script, options in each(
        [
            ("demo/demo.py", ("prompt", "data", "delay", "device")),
            ("show/mask.py", ("attention", "png")),
            ("measure/plot.py", ("png",)),
            ("measure/bench.py", ("device", "repeats")),
            ("measure/paper.py", ("only", "preset", "seeds", "out")),
        ]
    ):
        code, out, _ = cli(script, "--help")
        assert code == 0 and all(f"--{option}" in out for option in options)


def test_every_help_fits_a_terminal(cli, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "course"))  # its scripts find each other there
    paths = [path.relative_to(ROOT) for path in sorted(ROOT.glob("[a-z]*/**/*.py")) + sorted(ROOT.glob("*.py"))]
    ours = [path for path in paths if path.parts[0] not in ("runs", "tests")]
    scripts = [path for path in ours if "ArgumentParser(" in (ROOT / path).read_text(encoding="utf-8")]
    assert len(scripts) > 25
    for script in each(scripts):
        code, out, err = cli(script, "--help", columns=80)
        assert (code, err) == (0, "") and max(map(len, out.splitlines())) <= 80


def test_help_wraps_paragraphs_and_keeps_indented_lines():
    text = "Two lines\nare one.\n\n    python a.py        first\n    python b.py    second word\nThe end.\n"
    kept = "Two lines are one.\n\n    python a.py        first\n    python b.py    second word\nThe end."
    assert Help("x")._fill_text(text, 40, "") == kept
    broken = "Two lines are one.\n\n    python a.py        first\n    python b.py\n        second word\nThe end."
    assert Help("x")._fill_text(text, 28, "") == broken


# ---------------------------------------------------------------- sample.py


def test_json_is_one_object_a_prompt_with_the_answer_and_its_costs(cli):
    args = (
        "--checkpoint",
        "FILES/model.safetensors",
        "--json",
        "--max_tokens",
        20,
        "--prompt",
        "otter",
        "--prompt",
        "\u00e9\u2028x",
    )
    code, out, err = cli("sample.py", *args)
    results = [json.loads(line) for line in out.removesuffix("\n").split("\n")]
    assert (code, err) == (0, "")
    assert [r["prompt"] for r in results] == ["otter", "\u00e9\u2028x"]
    for result in results:
        assert RESULT <= result.keys()
        assert all(isinstance(result[name], (int, float)) for name in RESULT - {"text", "rounds"})
        assert isinstance(result["text"], str) and {"text", "plan", "spans"} == result["rounds"][0].keys()


def test_each_prompt_has_a_seed_of_its_own_however_answers_are_printed(cli):
    args = ("--checkpoint", "FILES/model.safetensors", "--temperature", 1, "--max_tokens", 40, "--seed", 3)
    twice = (*args, "--prompt", "otter", "--prompt", "otter")
    first, second = [json.loads(line)["text"] for line in cli("sample.py", *twice, "--json")[1].splitlines()]
    shown = cli("sample.py", *twice)[1]
    assert first != second
    alone = [cli("sample.py", *args[:-1], seed, "--prompt", "otter")[1] for seed in (3, 4)]
    assert shown == "".join(alone)


def test_piped_from_another_folder_it_prints_plain_text(files, tmp_path):
    command = [
        sys.executable,
        ROOT / "sample.py",
        "--checkpoint",
        files / "model.safetensors",
        "--prompt",
        "otter",
        "--max_tokens",
        "20",
    ]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")
    assert "otter" in done.stdout and "\x1b" not in done.stdout


# ---------------------------------------------------------------- what is wrong is said in a line

MODEL = ("--checkpoint", "FILES/model.safetensors")
BENCH = ("--data", "FILES", "--planned", "FILES/model.safetensors", "--ar", "FILES/model.safetensors")
SAMPLE, EVAL = ("--prompt", "x", *MODEL), (*MODEL, "--data", "FILES")
TRAIN = ("--data", "FILES", "--out", "FILES/out", "--batch", 2)
WRONG = {  # script: (arguments, what the line names)
    "sample.py": [
        *((("--prompt", "x", "--checkpoint", f"FILES/{file}.safetensors"), [f"{file}.safetensors"])
          for file in ("none", "text", "cut", "empty", "other")),
        (("--prompt", "x", "--checkpoint", "FILES"), ["FILES"]),
        ((*SAMPLE, "--html", "FILES/model.safetensors"), ["--html FILES/model.safetensors: holds", "which is read"]),
        ((*SAMPLE, "--steps_ratio", -1), ["--steps_ratio -1.0"]),
        ((*SAMPLE, "--order", "best"), ["best", "entropy, confidence, margin, random"]),
        ((*SAMPLE, "--max_tokens", "many"), ["--max_tokens", "many"]),
        ((*SAMPLE, "--device", "abacus"), ["abacus"]),
        (MODEL, ["--prompt"]),
        (("--prompt", "x", "--checkpoint", "FILES/block.safetensors", "--ahead", 2), ["--ahead 2", "block"]),
    ],
    "measure/eval.py": [
        (("--checkpoint", "FILES/none.safetensors"), ["none.safetensors"]),
        ((*MODEL, "--data", "FILES/none"), ["none/test.jsonl"]),
        ((*EVAL, "--split", "exam"), ["exam.jsonl", "test, train, val"]),
        ((*EVAL, "--top_p", 2), ["--top_p 2.0"]),
        *(((*EVAL, f"--{name}", value), [f"--{name} {value}"]) for name, value in
          [("batch", 0), ("batch", -1), ("limit", -1), ("draws", -1), ("show", -1), ("ahead", -1)]),
        ((*EVAL, "--device", "abacus"), ["--device abacus"]),
        ((*EVAL, "--answers", "FILES"), ["--answers"]),
        ((*EVAL, "--answers", "FILES/text.safetensors"), ["text.safetensors"]),
        ((*EVAL, "--answers", "FILES/text.safetensors/a"), ["text.safetensors"]),
    ],
    "measure/plot.py": [((f"FILES/{file}",), [file]) for file in ("none.csv", "text.safetensors", "model.safetensors")],
    "measure/paper.py": [
        (("--seeds", 0, 0), ["--seeds 0 0"]), (("--seeds", -1), ["--seeds -1"]),
        (("--preset", "days"), ["--preset", "days", "minutes"]), (("--only", "all"), ["--only", "all", "topics"]),
    ],
    "train.py": [
        (("--data", "FILES/none", "--out", "FILES/out"), ["none"]),
        ((*TRAIN, "--batch", 9), ["--batch 9"]),
        *(((*TRAIN, f"--{name}", 0), [f"--{name} 0"]) for name in ("batch", "accumulate", "log_every")),
        ((*TRAIN, "--init", "FILES/none"), ["none"]),
        ((*TRAIN, "--n_head", 3), ["n_head 3"]),
        (("--method", "magic"), ["--method magic", "planned, dense"]),
        (("--weight", "heavy"), ["--weight heavy", "uniform, elbo"]),
        (("--lr", "fast"), ["--lr", "fast"]),
    ],
    "demo/demo.py": [
        (("--prompt", "x"), ["--prompt", "--data"]), (("--delay", "nan"), ["--delay nan"]),
        (("--device", "abacus"), ["--device abacus"]),
    ],
    "demo/svg.py": [(("--planned", "x", "--ar", "FILES/model.safetensors", "--out", "FILES/model.safetensors"), ["--out FILES/model"])],
    "show/mask.py": [(("--attention", "some"), ["--attention", "sparse"])],
    "measure/bench.py": [
        *(((*BENCH, "--part", "sampling", name, *values), [f"{name} {values[-1]}"]) for name, *values in
          [("--repeats", 1), ("--updates", 0), ("--prompts", -1), ("--batch", 1, 0), ("--batch", 99)]),
        ((*BENCH, "--device", "abacus"), ["--device abacus"]), ((*BENCH, "--part", "sampling", "--batch", 1, "--threshold", 2), ["threshold 2"]),
    ],
}  # fmt: skip


@pytest.mark.parametrize("script", WRONG)
def test_what_is_wrong_is_said_in_one_line_that_names_it(cli, files, script):
    for args, named in each(WRONG[script]):
        code, out, err = cli(script, *args)
        assert code not in (0, None)
        if "bench" not in script:  # which first says on what it measures
            assert re.sub(r"^reading .*\n", "", out) == ""
        *usage, line = err.splitlines()
        assert all(u.startswith(("usage:", " ")) for u in usage)
        assert line.startswith(f"{Path(script).name}: ")
        for name in named:
            assert name.replace("FILES", str(files)) in line


def test_what_came_from_outside_is_said_without_control_codes(cli, tmp_path):
    """A terminal would obey them; lines stay lines in an error, and become one in a cell of a table."""
    text = "a\x1b[2J\x9b\r\u202e\udce9\tb\n\u2028c"
    assert printable(text) == "a?[2J?????b\n?c" and one_line(text) == "a?[2J? ?? b  c"
    (tmp_path / "bad.jsonl").write_text(json.dumps({"prompt": "x", "answer": "<topic> \x1b[2J"}) + "\n")
    for args in (("--data", tmp_path, "--split", "bad\x1b"), ("--data", tmp_path, "--split", "bad")):
        code, _, err = cli("measure/eval.py", *MODEL, *args)
        assert code == 1 and err.startswith("eval.py: ") and printable(err) == err


DEVICES = [
    ("measure/eval.py", (*MODEL, "--data", "FILES")),
    ("measure/bench.py", ()),
    ("measure/paper.py", ()),
    ("demo/demo.py", ()),
]


def test_a_device_that_is_not_there_is_named_as_such(cli, monkeypatch):
    for (kind, found), (script, args) in each(
        itertools.product([("cuda", torch.cuda), ("mps", torch.backends.mps)], DEVICES)
    ):
        with monkeypatch.context() as patch:
            patch.setattr(found, "is_available", lambda: False)
            code, out, err = cli(script, *args, "--device", kind)
            assert (code, out) == (1, "") and "\n" not in err.strip()
            assert (
                err.startswith(f"{Path(script).name}: --device {kind}: this torch") and "take another, or auto" in err
            )


PICTURES = [("show/mask.py", ()), ("measure/plot.py", ("FILES/log.csv",))]


@pytest.mark.parametrize("script, args", PICTURES, ids=[script for script, _ in PICTURES])
def test_a_picture_needs_matplotlib_and_a_place_where_it_can_be_written(
    cli, files, tmp_path, monkeypatch, script, args
):
    (files / "log.csv").write_text(
        "step,tokens,seconds,plan,span,val_plan,val_span\n1,100,1,2.5,0,,\n2,200,2,2,0,2.2,0\n"
    )
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "matplotlib.figure", None)
        code, _, err = cli(script, *args, "--png", tmp_path / "a.png")
        assert code == 1 and "pip install matplotlib" in err and err.count("\n") == 1
    pytest.importorskip("matplotlib")
    wrong = {tmp_path: "is not a file", files / "log.csv" / "a.png": "log.csv"}
    for path, said in wrong.items():
        code, _, err = cli(script, *args, "--png", path)
        assert code == 1 and err.startswith(f"{Path(script).name}: ") and said in err and err.count("\n") == 1
    assert not any(tmp_path.iterdir())
    assert cli(script, *args, "--png", tmp_path / "new" / "a.picture")[0] == 0
    assert (tmp_path / "new" / "a.picture").read_bytes().startswith(b"\x89PNG")


LEFT = """
import os, runpy, shlex, sys, measure.eval
for command in sys.argv[1:]:
    if not os.fork():  # a process for each; what takes seconds is loaded once
        reading, writing = os.pipe()
        os.close(reading)
        os.dup2(writing, 1)
        sys.argv = shlex.split(command)
        runpy.run_path(sys.argv[0], run_name="__main__")
        sys.exit()
    print(os.waitstatus_to_exitcode(os.wait()[1]), flush=True)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="needs fork")
def test_a_reader_who_leaves_ends_a_script_without_a_word():
    commands = ["show/mask.py", "measure/eval.py --help", "measure/paper.py --help",
                "sample.py --device cpu --prompt otter --max_tokens 8"]  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", LEFT, *commands], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.stderr == "" and [status in "01" for status in done.stdout.split()] == [True] * 4


def test_every_script_that_imports_the_project_ends_by_the_same_function():
    """`command`: a wrong input is one line, a reader who leaves is no error. (minimal.py is read alone, child.py is no command.)"""
    skipped = {".venv", "runs", "tests", "minimal.py", "child.py"}
    for path in each(sorted(path for path in ROOT.rglob("*.py") if not skipped & {*path.relative_to(ROOT).parts})):
        text = path.read_text(encoding="utf-8")
        if '__name__ == "__main__"' in text:
            assert text.endswith('if __name__ == "__main__":\n    command(main)\n')


def test_a_terminal_without_utf_8_gets_letters_for_shades(cli, monkeypatch):
    _, shaded, _ = cli("show/mask.py")
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding="ascii"))
    assert cli("show/mask.py")[0] == 0
    sys.stdout.flush()
    plain, letters = sys.stdout.buffer.getvalue(), str.maketrans("\u2591\u2592\u2593\u2588\u00b7", "ptgs.")
    assert "\u2588 slot" in shaded and plain.decode("ascii") == shaded.translate(letters)


# ---------------------------------------------------------------- bench.py


def test_bench_times_training_and_sampling_beside_autoregression(cli, files, monkeypatch, capsys):
    """The same model twice: it takes as many passes, so the ratio is of the machine's noise alone."""
    few = ("--preset", "tiny", "--updates", "1", "--repeats", "2", "--batch", "1", "--prompts", "2")
    monkeypatch.setattr(sys, "argv", ["bench.py", *(a.replace("FILES", str(files)) for a in BENCH), *few])
    monkeypatch.setattr(bench, "SampleConfig", partial(SampleConfig, max_tokens=40))
    bench.main()
    out = capsys.readouterr().out
    assert "torch" in out.splitlines()[0]
    assert max(len(line) for line in out.splitlines() if str(files) not in line) <= 80
    training = re.findall(r"^\| (\S+) +\| +\d+ \(\d+ to \d+\) \| +([\d.]+) \| +\S+ TFLOP/s", out, re.MULTILINE)
    assert [name for name, _ in training] == ["ar", "planned", "dense", "parallel-ar"] and training[0][1] == "1.00"
    names = ["ar", "planned, steps_ratio 0.5", "planned, threshold 0.9"]
    speeds = re.findall(r"^\| (\S.*?) +\| +\d+ \(\d+ to \d+\) \| +\d+ \| +([\d.]+) \|$", out, re.MULTILINE)
    assert [name for name, _ in speeds] == names and speeds[0][1] == "1.00"
    passes = re.findall(r"^\| (\S.*?) +\| +(\d+) \| +[\d.]+ \| +[\d.]+ \| +\d+ \|$", out, re.MULTILINE)
    assert [name for name, _ in passes] == names and len({number for _, number in passes}) == 1
