"""The frontier: what is trained and measured, on equal terms, and that nothing is done twice or taken for another."""

import itertools
import json
import shutil
import signal
import subprocess
import sys
import time
from argparse import ArgumentParser
from dataclasses import replace
from itertools import count
from pathlib import Path

import pytest
from conftest import each

from config import MethodConfig, SampleConfig, TrainConfig
from measure import code, frontier
from measure.code import bare, fingerprint, sources
from measure.eval import EvalConfig
from measure.frontier import CODE, GROUPS, PRESETS, Entry, Frontier, Preset, compared
from measure.report import quality
from model import ModelConfig
from plumbing.settings import ROOT, add_settings, command, pick

TOY = Preset("data/toy", 100, 300, "--d_model 32", "--t_min 0.5", "--d_model 16", limit=9, timed=3)
ENTRIES = {
    "autoregressive": Entry("--method ar"),
    "small": Entry("--method ar", small=True, warm=False),
    "speculative": Entry("", checkpoint="autoregressive", draft="small"),
    "planned": Entry("--method planned", ("--steps_ratio 1", "--threshold 0.7")),
    "ordered": Entry("", ("--order random",), checkpoint="planned"),
}
FILES = ("train.jsonl", "val.jsonl", "test.jsonl", "tokenizer.json", "families.py")
SAVE = "import sys; open(sys.argv[-1] + '/model.safetensors', 'w'); print('trained')"
TRAINED, MEASURED = 4, 6  # trainings, the warm-up included, and points
ALL = TRAINED, MEASURED, 2 * MEASURED
SETTINGS = {"train.py": (TrainConfig, MethodConfig, ModelConfig), "measure/eval.py": (EvalConfig, SampleConfig)}


def report_of(exact=0.5, seconds=1):
    """A made-up report of eval.py."""
    whole = {"exact": exact, "passes": 4, "critical_path": 3, "positions": 50, "content_tokens": 20}
    times = {"seconds_p50": seconds, "seconds_p95": 2 * seconds, "peak_memory_mb": 1}
    text = {"readers": {}, "distinct_1": 0.25, "distinct_3": 0.75}
    return {"scores": dict.fromkeys(("facts", "lookups", "transforms", "stories", "all"), whole), **text, **times}


def parsed(script, options):
    """Options as the script itself understands them; wrong ones raise."""
    parser = ArgumentParser()
    add_settings(parser, *SETTINGS[script])
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args(options)
    return [pick(cls, args) for cls in SETTINGS[script]] and args


@pytest.fixture
def root(tmp_path, monkeypatch):
    """A project's folder with made-up data; recipes have no checker."""
    for data in ("toy", "tasks", "recipes"):
        (tmp_path / "data" / data).mkdir(parents=True)
        for name in FILES[: 4 if data == "recipes" else 5]:
            (tmp_path / "data" / data / name).write_text(f"{data!r}, {name!r}")
    monkeypatch.setattr(frontier, "ROOT", tmp_path)
    return tmp_path


@pytest.fixture
def calls(root, monkeypatch):
    """The calls of scripts, none of which is run: (script, options). Each measurement of times takes other seconds."""
    made, number = [], count(1)

    def call(script, options, log, threads):
        made.append((script, options))
        log.parent.mkdir(parents=True, exist_ok=True)
        if script == "measure/eval.py":
            return json.dumps(report_of(0, 1000 + next(number)) if "--batch" in options else report_of())
        (Path(options[-1]) / "model.safetensors").write_bytes(repr(options).encode())

    monkeypatch.setattr(frontier, "call", call)
    return made


@pytest.fixture
def run(root, calls):
    """Run entries: their rows, and what train.py and eval.py were called with."""

    def run(preset=TOY, entries=ENTRIES, device="cpu", seed=0):
        calls.clear()
        reports = Frontier(preset, entries, root / "out", 2, device, seed).run()
        rows = [{"name": name, "sample": sample} | report for (name, sample), report in reports.items()]
        return rows, *([parsed(s, options) for s, options in calls if s == script] for script in SETTINGS)

    return run


def test_every_entry_is_trained_once_after_the_warm_up_that_all_but_cold_ones_start_from(run):
    _, made, _ = run()
    assert sorted(bool(args.init) for args in made) == [bool(args.init) for args in made]
    warm_up, *trained = sorted(made, key=lambda args: args.steps)  # it may begin beside the cold one, in any order
    assert (warm_up.method, warm_up.d_model, warm_up.init, warm_up.steps) == ("ar", 32, "", 100)
    found, start = sorted((t.method, t.d_model, t.init, t.steps) for t in trained), f"{warm_up.out}/model.safetensors"
    assert found == [("ar", 16, "", 400), ("ar", 32, start, 300), ("planned", 32, start, 300)]
    assert {(args.data, args.t_min) for args in trained} == {("data/toy", 0.5)}
    assert run(entries={"of another group": ENTRIES["planned"]})[1] == []


def test_all_get_equal_numbers_of_updates_with_options_that_the_scripts_know(root, run):
    for preset, group in each(itertools.product(PRESETS, GROUPS)):
        shutil.rmtree(root / "out", ignore_errors=True)
        rows, trained, measured = run(PRESETS[preset], GROUPS[group])
        of_none = sum(not e.checkpoint for e in GROUPS[group].values())
        assert len(trained) == 1 + of_none + bool(PRESETS[preset].judge), (
            "entries that sample the checkpoint of another train nothing"
        )
        assert 3 * len(rows) == len(measured) == 3 * sum(len(e.sample) for e in GROUPS[group].values())
        made = {f"{args.out}/model.safetensors": args for args in trained}
        used = [made[path] for m in measured for path in (m.checkpoint, m.draft, m.judge) if path]
        updates = {args.steps + (made[args.init].steps if args.init else 0) for args in used}
        assert updates == {PRESETS[preset].warmup + PRESETS[preset].steps}


def test_each_point_is_measured_in_batches_and_for_its_times_alone(run):
    rows, trained, measured = run()
    assert [(row["name"], row["sample"]) for row in rows] == [(n, s) for n, e in ENTRIES.items() for s in e.sample]
    model = {"": "", **{f"{args.out}/model.safetensors": f"{args.method} {args.steps}" for args in trained}}
    found = sorted((model[m.checkpoint], model[m.draft], m.limit, m.batch) for m in measured)
    points = [("ar 300", ""), ("ar 300", "ar 400"), ("ar 400", ""), *[("planned 300", "")] * 3]
    assert found == sorted((*point, *how) for point in points for how in ((9, EvalConfig.batch), (3, 1), (8, 8)))
    assert {(quality(row), row["seconds_p95"] / row["seconds_p50"]) for row in rows} == {(0.5, 2)}
    times = [row[name] for row in rows for name in ("seconds_p50", "seconds_batch_8")]
    assert len(set(times)) == 2 * MEASURED and min(times) > 1000, "of the measurements alone, each its own"


def test_all_is_done_on_one_device_and_what_another_has_done_is_not_taken_for_it(run):
    _, trained, measured = run(device="cuda:1")
    assert {args.device for args in trained + measured} == {"cuda:1"}
    assert [len(found) for found in run()[1:]] == [TRAINED, 3 * MEASURED]


def test_a_larger_judge_reads_the_answers_but_has_no_part_in_their_time(run):
    _, trained, measured = run(replace(TOY, judge="--d_model 64"))
    (judge,) = (f"{args.out}/model.safetensors" for args in trained if (args.method, args.d_model) == ("ar", 64))
    assert {(m.batch, m.judge) for m in measured} == {(EvalConfig.batch, judge), (1, ""), (8, "")}


@pytest.mark.parametrize("done", [0, 1, 3, 4, 5, 10, 15])
def test_after_an_interruption_only_what_is_missing_is_called_and_then_nothing(root, calls, run, monkeypatch, done):
    """The call after so many is interrupted."""

    def interrupted(*args, call=frontier.call):
        if len(calls) == done:
            raise KeyboardInterrupt
        return call(*args)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(frontier, "call", interrupted)
        Frontier(TOY, ENTRIES, root / "out", 1, "cpu").run()
    before = [args[-1] for script, args in calls if script == "train.py"]
    rows, trained, measured = run()
    assert len({*before, *(args.out for args in trained)}) == len(before) + len(trained) == TRAINED
    assert len(before) == min(done, TRAINED) and len(measured) == 3 * MEASURED - max(done - TRAINED, 0)
    assert run() == (rows, [], [])


CHANGES = {  # what changes: trainings, measurements of quality and of latency that have to be made again
    "train.jsonl": ALL, "val.jsonl": ALL, "test.jsonl": ALL, "tokenizer.json": ALL, "train.py": ALL, "warmup": ALL,
    "common": ALL, "families.py": (0, MEASURED, 2 * MEASURED), "measure/eval.py": (0, MEASURED, 2 * MEASURED),
    "limit": (0, MEASURED, 0), "timed": (0, 0, 2 * MEASURED), "steps": (TRAINED - 1, MEASURED, 2 * MEASURED),
    "train": (TRAINED - 1, MEASURED - 1, 2 * MEASURED - 2), "small": (1, 2, 4),
    "judge": (1, MEASURED, 0),
}  # fmt: skip


def test_what_depends_on_changed_data_code_or_options_is_made_again(root, run, monkeypatch):
    """And only that. What was made before is kept for when the change is undone."""
    for change in each(CHANGES):
        shutil.rmtree(root / "out", ignore_errors=True)
        old, preset, file = run()[0], TOY, root / "data" / "toy" / change
        with monkeypatch.context() as patch:
            if file.exists():
                file.write_text("other")
            elif change in frontier.CODE:
                patch.setitem(frontier.CODE, change, "other")
            else:
                value = getattr(TOY, change)
                preset = replace(TOY, **{change: value + 8 if isinstance(value, int) else value + " --n_layer 3"})
            new, trained, measured = run(preset)
        alone = sum(args.batch != EvalConfig.batch for args in measured)
        assert (len(trained), len(measured) - alone, alone) == CHANGES[change]
        assert 2 * sum(row not in old for row in new) == CHANGES[change][2], (
            "each measurement of latency takes other seconds"
        )
        if file.exists():
            file.write_text(f"'toy', {change!r}")
        assert run() == (old, [], [])


@pytest.fixture
def scripts(root, monkeypatch):
    """Real scripts, if short, and frontier.py for them, called from another folder."""
    (root / "train.py").write_text(SAVE)
    (root / "measure").mkdir()
    (root / "measure/eval.py").write_text(f"print({json.dumps(report_of())!r})")
    monkeypatch.chdir(root / "data")
    monkeypatch.setitem(frontier.PRESETS, "tasks", TOY)
    monkeypatch.setitem(frontier.GROUPS, "ablations", {f"seed {n}": Entry(f"--seed {n}") for n in range(2)})
    monkeypatch.setattr(
        sys, "argv", ["measure/frontier.py", "--group", "ablations", "--out", "some/where", "--workers", "1"]
    )
    signal.signal(signal.SIGINT, signal.default_int_handler)  # it is ignored in what a shell runs in the background
    return root


def test_a_relative_out_is_in_the_folder_that_one_is_in(scripts):
    """What train.py prints goes to its log, what eval.py prints is read."""
    frontier.main()
    rows = [json.loads(line) for line in Path("some/where/ablations.jsonl").read_text().splitlines()]
    scores = [(row["name"], *(report["scores"] for report in row["seeds"])) for row in rows]
    assert scores == [(f"seed {n}", report_of()["scores"]) for n in range(2)]
    assert ["trained" in path.read_text() for path in Path("some/where").glob("*/log.txt")] == [True] * 3
    assert "| seed 1 |" in Path("some/where/ablations.md").read_text()


def test_a_preset_may_compare_some_entries_only(scripts, monkeypatch):
    assert set(PRESETS["minutes"].only) <= GROUPS["methods"].keys()
    monkeypatch.setitem(frontier.PRESETS, "tasks", replace(TOY, only=("seed 1", "of another group")))
    frontier.main()
    rows = [json.loads(line) for line in Path("some/where/ablations.jsonl").read_text().splitlines()]
    assert [row["name"] for row in rows] == ["seed 1"]


def test_named_entries_are_compared_in_the_order_of_the_group():
    """A name wins over what the preset would compare."""
    assert [*compared(GROUPS["methods"], ["block diffusion", "autoregressive"], ("diffusion",))] == [
        "autoregressive", "block diffusion"]  # fmt: skip
    assert compared(GROUPS["methods"], None, ()) == GROUPS["methods"]


def test_entries_that_cannot_be_compared_are_refused():
    for names, said in each([
    (["autoregression"], "--entries 'autoregression': this group has 'autoregressive', "),
    (["autoregressive", "speculative decoding"], "'speculative decoding' samples the model of .*half size'"),
    (["joint as parallel, drafts"], "'joint as parallel, drafts' samples the model of 'joint as planned, drafts'"),
]):  # fmt: skip
        with pytest.raises(ValueError, match=said):
            compared(GROUPS["methods"], names, ())


@pytest.mark.parametrize("script, text, said", [
    ("train.py", "exit('out of memory')", "train.py .* failed: see the end of .*log.txt"),
    ("measure/eval.py", "exit('out of memory')", "measure/eval.py .* failed: see the end of .*results"),
    ("train.py", "print('out of memory, so to say')", "the training of warm-up was stopped: see the end of .*log.txt"),
])  # fmt: skip
def test_a_script_that_fails_or_is_stopped_ends_all_with_a_message_that_names_its_log(scripts, script, text, said):
    (scripts / script).write_text(text)
    with pytest.raises(SystemExit, match=f"^frontier.py: {said}") as stopped:
        command(frontier.main)
    assert "out of memory" in Path(str(stopped.value).split()[-1]).read_text()


@pytest.mark.parametrize("when", ["'--init' not in sys.argv", "'--init' in sys.argv"])  # the warm-up; those after it
def test_ctrl_c_lets_a_training_save_and_begins_no_other(scripts, when):
    """The terminal sends the signal to both; the script needs longer for it than Python would wait on its own."""
    send = f"import os, signal, sys, time\nif {when}: os.kill(os.getppid(), signal.SIGINT); time.sleep(0.6)\n"
    (scripts / "train.py").write_text(send + SAVE)
    with pytest.raises(SystemExit, match="frontier.py: stopped; the same command goes on from here"):
        frontier.main()
    logs = [path.read_text() for path in Path("some/where").glob("*/log.txt")]
    assert len(logs) == 1 + ("not" not in when) and all("trained" in text for text in logs)
    (scripts / "train.py").write_text(SAVE)
    frontier.main()
    assert all(path.read_text().count("trained") == 1 for path in Path("some/where").glob("*/log.txt"))


def test_a_failure_stops_what_has_not_begun():
    """One that the worker took up before the failure was heard of may still end."""

    def work(number):
        begun.append(number)
        time.sleep(0.2 * number) if number else sys.exit("the first failed")

    begun = []
    with pytest.raises(SystemExit, match="the first failed"):
        frontier.together(work, [(n,) for n in range(6)], workers=1)
    assert len(begun) <= 2


def test_seeds_train_all_but_the_judge_and_share_nothing_else(run):
    """Each has its own warm-up; the judge is one for all, so that perplexities compare."""
    made = [run(replace(TOY, judge="--d_model 64"), seed=seed) for seed in (0, 1)]
    (_, first, measured), (_, second, measured_2) = made
    assert {args.seed for args in first} == {0} and {args.seed for args in second} == {1}
    assert (len(first), len(second)) == (TRAINED + 1, TRAINED) and len(measured) == len(measured_2)
    assert {args.init for args in second if args.init} == {
        f"{args.out}/model.safetensors" for args in second if args.steps == TOY.warmup}  # fmt: skip
    judges = {args.judge for args in measured + measured_2 if args.judge}
    assert judges == {f"{args.out}/model.safetensors" for args in first if args.d_model == 64}
    assert {args.checkpoint for args in measured}.isdisjoint(args.checkpoint for args in measured_2)


def test_rows_hold_a_report_per_seed_in_their_order(scripts, monkeypatch):
    """Here a model is its seed, and eval.py takes as many seconds."""
    (scripts / "train.py").write_text(
        "import sys; a = sys.argv; open(a[-1] + '/model.safetensors', 'w').write(a[a.index('--seed') + 1])"
    )
    (scripts / "measure/eval.py").write_text(
        "import sys, json; a = sys.argv; seed = int(open(a[a.index('--checkpoint') + 1]).read())\n"
        f"print(json.dumps({report_of()!r} | {{'seconds_p50': 1 + seed}}))"
    )
    monkeypatch.setitem(frontier.GROUPS, "ablations", {"one": Entry("--d_ff 8")})
    monkeypatch.setattr(sys, "argv", [*sys.argv, "--seeds", "4", "2"])
    frontier.main()
    (row,) = map(json.loads, Path("some/where/ablations.jsonl").read_text().splitlines())
    assert [report["seconds_p50"] for report in row["seeds"]] == [5, 3]
    assert "| 4000 (3000 to 5000) |" in Path("some/where/ablations.md").read_text()


@pytest.mark.parametrize("seeds", [["0", "0"], ["-1"]])
def test_seeds_that_would_be_one_or_none_are_refused(scripts, monkeypatch, seeds):
    monkeypatch.setattr(sys, "argv", [*sys.argv, "--seeds", *seeds])
    with pytest.raises(SystemExit, match=f"^frontier.py: --seeds {' '.join(seeds)}: expected different whole numbers"):
        command(frontier.main)


# ---------------------------------------------------------------- what a result is made of


def test_the_hash_of_a_script_is_made_of_all_modules_that_it_loads_and_the_cuda_sources():
    """Python itself says what it has loaded. Settings, files and what shows answers change no result."""
    command = [sys.executable, "-c", LOADED, *CODE]
    loaded = subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout.splitlines()
    for script, paths in each(zip(CODE, loaded, strict=True)):
        wanted = {ROOT / path for path in paths.split()} - {
            ROOT / "plumbing/settings.py",
            ROOT / "plumbing/files.py",
        }
        found = sources(ROOT / script)
        assert ROOT / script in found and ROOT / "model.py" in wanted and all(path.exists() for path in found)
        assert {path for path in wanted if path.parent != ROOT / "show"} <= found
        assert {path.name for path in found} >= {"attention.cu", "gpu.h", "tiles.h"}
        assert (
            not {ROOT / "plumbing/settings.py", ROOT / "show" / "terminal.py", ROOT / "tests" / "conftest.py"} & found
        )


LOADED = """
import os, runpy, sys, torch._dynamo
from pathlib import Path
for script in sys.argv[1:]:
    if not os.fork():  # a process for each; torch, which takes seconds, is loaded once
        runpy.run_path(script)
        paths = [Path(m.__file__).resolve() for m in list(sys.modules.values()) if getattr(m, "__file__", None)]
        print(*(path.relative_to(Path.cwd()) for path in paths
                if Path.cwd() in path.parents and path.suffix == ".py" and path.exists() and not ".venv" in path.parts),
              flush=True)
        os._exit(0)
    os.wait()
"""
PYTHON = 'def f(a, b):\n    """Says."""\n    x = "# no comment"  # why\n    return a + b, x\n'
CUDA = 'int x = 1;  // why\n/* and\nhow */ const char *s = "// no comment";\n'


TEXTS = [
    ("a.py", PYTHON, ('"""Says."""', '"""Says\n\n    more."""'), ("a + b", "a - b")),
    ("a.py", PYTHON, ('    """Says."""\n', ""), ("no comment", "a comment")),
    ("a.py", PYTHON, ("# why", "# why not"), ("b):", "b=0):")),
    ("a.py", PYTHON, ("    return a + b, x", "\n    return (\n        a + b, x,\n    )"), ("a + b, x", "a + b")),
    ("a.cu", CUDA, ("// why", "// why not"), ("x = 1", "x = 2")),
    ("a.cu", CUDA, ("how */ ", "why */\n\n  "), ("// no comment", "// a comment")),
    ("a.h", CUDA, (";  // why", ";"), ("int x", "long x")),
]  # fmt: skip


def test_comments_docstrings_and_layout_change_no_hash_and_everything_else_does(fresh):
    for name, text, same, other in each(TEXTS):
        tmp_path = fresh()
        found = []
        for old, new in (("", ""), same, other):
            assert old in text
            (tmp_path / name).write_text(text.replace(old, new))
            found.append(bare(tmp_path / name))
        assert found[0] == found[1] != found[2]


def test_the_hash_of_a_script_changes_with_what_it_imports(tmp_path, monkeypatch):
    """`import b` inside a function, `from d import c` of a package, and not what nobody imports."""
    monkeypatch.setattr(code, "ROOT", tmp_path)
    (tmp_path / "d").mkdir()
    texts = {"a.py": "def f():\n    import b\n", "b.py": "from d import c\n", "d/__init__.py": "", "d/c.py": "1\n",
             "d/k.cu": "int x;\n", "e.py": ""}  # fmt: skip
    for name, text in texts.items():
        (tmp_path / name).write_text(text)
    before, changed = fingerprint(tmp_path / "a.py"), {}
    for name, text in texts.items():
        (tmp_path / name).write_text(text + "int y;" if name == "d/k.cu" else text + "y = 2\n")
        changed[name] = fingerprint(tmp_path / "a.py") != before
        (tmp_path / name).write_text(text)
    assert changed == {name: name != "e.py" for name in texts} and fingerprint(tmp_path / "a.py") == before
