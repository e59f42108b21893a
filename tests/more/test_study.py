"""Studies: each training and each figure is made once, under all that decides it; and the variants of a data set."""

import json
import signal
import subprocess
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
from conftest import each
from runs import SHAPE, data_set

from config import SampleConfig
from data import read_split, write_dataset
from data.tasks.prepare import make_splits
from data.towns.families import COLOURS, FAMILIES, TRAIN_SHARES
from measure import study as module
from measure import variants
from measure.claims import chrf, over, passes
from measure.quality import checker
from measure.study import KEPT, Model, Study, sample_config
from methods import merged
from plumbing.settings import ROOT
from tags import SYNC, format_answer, plain_text
from tokenizer import Tokenizer

FILES = ("train.jsonl", "val.jsonl", "test.jsonl", "tokenizer.json")

# ---------------------------------------------------------------- trainings

TRAINER = """
import os, signal, sys, time
from pathlib import Path
options = dict(zip(sys.argv[1::2], sys.argv[2::2]))
out = Path(options["--out"])
print(*sys.argv[1:])
how = options.get("--how")
if how == "fail" or how == "idle":
    sys.exit(how == "fail")
if how == "stop" and not (out / "checkpoint.safetensors").exists():
    os.kill(os.getppid(), signal.SIGINT)  # as a terminal does to both
    time.sleep(1.5)  # Python alone would wait 0.25 s
    (out / "checkpoint.safetensors").write_text("half")
    sys.exit()
time.sleep(0.2)
(out / "model.safetensors").write_text(" ".join(sys.argv[1:]))
"""


@pytest.fixture
def make(tmp_path, monkeypatch):
    """A function that makes a study of a small folder of data, with a script in place of train.py."""
    data, script = tmp_path / "data", tmp_path / "train.py"
    data.mkdir()
    for name in (*FILES, "families.py"):
        (data / name).write_text(f"text = {name!r}")
    script.write_text(TRAINER)
    run = subprocess.Popen
    monkeypatch.setattr(module.subprocess, "Popen", lambda call, **more: run([call[0], script, *call[2:]], **more))
    monkeypatch.setattr(module, "fingerprint", lambda files: "code")  # test_code.py has the real one
    signal.signal(signal.SIGINT, signal.default_int_handler)  # it is ignored in what a shell runs in the background

    def make(how="", limit=None, **changed):
        models = {"warm-up": Model(str(data), "--steps 5"), "other": Model(str(data), "--steps 3"),
                  "the model": Model(str(data), f"--steps 9 {how}", "warm-up")} | changed  # fmt: skip
        return Study(models, tmp_path / "out", tmp_path / "figures.json", limit or {}, "cpu")

    make.data = data
    return make


def said(study):
    """What the calls of the script printed, by the name of their training."""
    return {path.parent.name.rsplit("-", 2)[0]: path.read_text().splitlines() for path in study.out.glob("*/log.txt")}


def test_a_training_runs_once_after_the_one_that_it_starts_from(make):
    for _ in range(2):  # a second study finds what the first has done
        study = make()
        path, start = study.train("the model", 3), study.train("warm-up", 3)
        (line,), (first,) = (said(study)[name] for name in ("the-model", "warm-up"))
        where = f"--data {make.data} --steps"
        assert line == f"{where} 9 --seed 3 --device cpu --init {start} --out {path.parent}"
        assert first == f"{where} 5 --seed 3 --device cpu --out {start.parent}"


def test_an_interrupted_training_goes_on_in_its_folder_and_leaves_its_model_alone(make):
    study = make("--how stop")
    with pytest.raises(KeyboardInterrupt):
        study.train("the model", 0)
    assert [*study.out.glob("the-model*/checkpoint.safetensors")], "it was waited for until it had saved"
    path = make("--how stop").train("the model", 0)
    first, second = said(make())["the-model"]
    assert first == second and not path.with_name("checkpoint.safetensors").exists()


def test_of_two_studies_side_by_side_one_trains_and_the_other_waits(make):
    with ThreadPoolExecutor() as pool:
        paths = [*pool.map(lambda study: study.train("the model", 0), [make(), make()])]
    assert paths[0] == paths[1] and {name: len(lines) for name, lines in said(make()).items()} == {
        "warm-up": 1,
        "the-model": 1,
    }


def test_a_training_that_fails_or_leaves_no_model_is_an_error_that_names_its_log(make):
    for how in each(["fail", "idle"]):
        with pytest.raises(
            ValueError, match="the training of the model, seed 0 ended before its time: see the end of .*log.txt"
        ):
            make(f"--how {how}").train("the model", 0)


def test_all_that_decides_the_weights_changes_what_a_training_is_kept_under(make):
    """Code, data, options, seed and the model that it starts from, with all of its own; and nothing else."""
    key = lambda study, seed=0: study.key("the model", seed)
    before, found = key(make()), {"seed": key(make(), 1)}
    models = make().models
    found["options"] = key(make(**{"the model": replace(models["the model"], train="--steps 8")}))
    found["start"] = key(make(**{"the model": replace(models["the model"], start="other")}))
    found["options of the start"] = key(make(**{"warm-up": replace(models["warm-up"], train="--steps 4")}))
    study = make()
    study.code["train"] = "other"
    found["code"] = key(study)
    for name in FILES:
        (make.data / name).write_text("other")
        found[name] = key(make())
        (make.data / name).write_text(f"text = {name!r}")
    assert len({before, *found.values()}) == 1 + len(found), found
    study = make(limit={"": 7}, other=Model("elsewhere", "--steps 1"))
    study.code |= {"eval": "other", "probes": "other"}
    (make.data / "families.py").write_text("other = 1")
    assert key(study) == before


def test_data_that_is_not_there_is_an_error_that_says_what_writes_it(make):
    (make.data / "test.jsonl").unlink()
    with pytest.raises(ValueError, match="has no test.jsonl: python .*data/prepare.py writes it"):
        make().key("the model", 0)


# ---------------------------------------------------------------- figures


@pytest.fixture
def evaluations(monkeypatch):
    """What eval.py was asked for; it reports how often."""
    asked = []

    def evaluate(config, sample):
        asked.append((config, sample))
        return {**dict.fromkeys(KEPT, len(asked)), "pad_share": 1 / 3, "shown": ["not kept"]}

    monkeypatch.setattr(module, "evaluate", evaluate)
    return asked


def test_a_figure_is_measured_once_with_the_settings_that_it_names(make, evaluations):
    for _ in range(2):
        report = make(limit={"": 5}).report("the model", 0, "--threshold 0.9 --ahead 4 --decode planned", "other")
        assert {name: report[name] for name in KEPT} == dict.fromkeys(KEPT, 1) | {"pad_share": 0.33333}
        assert report["what"].startswith("the model --threshold 0.9") and "shown" not in report
    ((config, sample),) = evaluations
    assert sample == SampleConfig(threshold=0.9, ahead=4, decode="planned") == sample_config(
        "--threshold 0.9 --ahead 4 --decode planned")  # fmt: skip
    assert "the-model-0" in config.checkpoint and "other-0" in config.draft
    assert (config.data, config.limit, config.device) == (str(make.data), 5, "cpu")


def test_all_that_decides_a_figure_measures_it_anew_and_nothing_else_does(make, evaluations):
    report = lambda study, sample="", draft="", seed=0: study.report("the model", seed, sample, draft)
    warm_up = Model(str(make.data), "--steps 4")
    anew = {"sample": lambda: report(make(), "--threshold 0.5"), "seed": lambda: report(make(), seed=1),
            "draft": lambda: report(make(), draft="other"), "limit": lambda: report(make(limit={str(make.data): 2})),
            "training": lambda: report(make(**{"warm-up": warm_up}))}  # fmt: skip
    report(make())
    for n, name in enumerate(each(anew), 2):
        anew[name]()
        assert len(evaluations) == n
    study = make()
    study.code["probes"] = "other"
    report(study)
    assert len(evaluations) == n
    for name in each([*FILES, "families.py"]):
        (make.data / name).write_text("other = 2")
        report(make())
        assert len(evaluations) == (n := n + 1)
        (make.data / name).write_text(f"text = {name!r}")
    study.code["eval"] = "other"
    report(study)
    assert len(evaluations) == n + 1


def test_a_probe_is_measured_anew_after_a_change_of_its_own_code(make):
    for code, value in each([("one", 1), ("one", 1), ("other", 2), ("one", 1)]):
        study = make()
        study.code["probes"] = code
        assert study.probe("a probe", ["part"], lambda: {"value": value})["value"] == value
    assert len(json.loads(study.kept.read_text())) == 2


def test_two_studies_that_write_the_same_file_keep_the_figures_of_both(make):
    first, second = make(), make()
    first.figure("a", [], lambda: {"value": 1 / 3})
    second.figure("b", [], lambda: {"value": [2.0000001]})
    first.figure("c", [], lambda: {})
    kept = json.loads(first.kept.read_text()).values()
    assert sorted(kept, key=lambda f: f["what"]) == [
        {"what": "a", "value": 0.33333}, {"what": "b", "value": [2.0]}, {"what": "c"}]  # fmt: skip
    assert {figure["what"] for figure in first.used.values()} == {"a", "c"}


def test_train_py_and_eval_py_do_what_a_study_asks_of_them(tokenizer, tmp_path):
    """And a report has what claims read of it."""
    data = data_set(tmp_path / "data", tokenizer)
    (data / "test.jsonl").write_bytes((data / "val.jsonl").read_bytes())
    options = "--batch 2 --steps 1 --warmup 1 " + " ".join(f"--{name} {value}" for name, value in SHAPE.items())
    models = {"a": Model(str(data), f"{options} --method ar"), "b": Model(str(data), options, "a")}
    study = Study(models, tmp_path / "out", tmp_path / "figures.json", {"": 2}, "cpu")
    report = study.report("b", 0, "--max_tokens 20 --threshold 0.9")
    assert passes(report) > 0 and over(report, "positions", ("all",)) > 0 and chrf(report) >= 0
    assert report["scores"]["all"]["n"] == 2 and not [*study.out.glob("*/checkpoint.safetensors")]


# ---------------------------------------------------------------- variants


@pytest.fixture(scope="module")
def towns(tmp_path_factory):
    """A small data set of invented towns."""
    folder = tmp_path_factory.mktemp("towns")
    write_dataset(folder, make_splits({"train": 100, "val": 6, "test": 12}, 0, FAMILIES, TRAIN_SHARES), 700, 5)
    (folder / "families.py").write_bytes((ROOT / "data/towns/families.py").read_bytes())
    return folder


def test_untagged_has_one_round_with_all_texts_before_all_spans(towns):
    tokenizer = Tokenizer.load(towns / "tokenizer.json")
    for example in each(read_split(towns / "train.jsonl")):
        (other,) = variants.untagged(example, tokenizer)
        tagged, text = format_answer(other.rounds), " ".join(r.text for r in example.rounds if r.text)
        assert (
            SYNC not in tagged
            and tagged.startswith(text)
            and (other.prompt, other.family) == (example.prompt, example.family)
        )
        assert other.rounds[0].spans == example.rounds[0].spans


def test_named_ends_the_topics_of_coupled_with_the_colour_of_their_span_and_leaves_out_other_families(towns):
    for example in each(read_split(towns / "train.jsonl")):
        if example.family != "coupled":
            assert not [*variants.named(example, None), *variants.coupled(example, None)]
            continue
        (other,), (same,) = variants.named(example, None), variants.coupled(example, None)
        assert same == example
        for old, new in zip(example.rounds[0].spans, other.rounds[0].spans, strict=True):
            assert new.topic.startswith(old.topic) and new.text == old.text
            assert new.topic.removeprefix(old.topic).strip() in {*COLOURS} and f" {new.topic.split()[-1]}" in new.text
        assert len({span.topic.split()[-1] for span in other.rounds[0].spans}) == 1


def test_skeleton_asks_for_the_points_and_then_for_each_so_that_the_answers_make_up_the_answer(towns):
    tokenizer = Tokenizer.load(towns / "tokenizer.json")
    for example in each(read_split(towns / "train.jsonl")):
        outline, *points = variants.skeleton(example, tokenizer)
        names = plain_text(outline.rounds).split(", ")
        assert names == [span.topic for span in merged(example.rounds, tokenizer)[0].spans]
        assert outline.prompt.startswith(example.prompt) and len({p.prompt for p in points}) == len(names)
        assert all(f"Write about {name}." in point.prompt for name, point in zip(names, points, strict=True))
        assert "\n".join(plain_text(point.rounds) for point in points) == plain_text(example.rounds)


def test_a_variant_is_written_once_and_again_when_its_data_change(towns, tmp_path, capsys):
    out, sources = tmp_path / "variant", tmp_path / "towns"
    sources.mkdir()
    for path in towns.iterdir():
        (sources / path.name).write_bytes(path.read_bytes())
    write = lambda: (
        variants.write_variant(str(sources), out, variants.untagged) or "tokens in" in capsys.readouterr().out
    )
    assert [write(), write()] == [True, False]
    assert (out / "tokenizer.json").read_bytes() == (towns / "tokenizer.json").read_bytes()
    for split in ("train", "val", "test"):
        old, new = (read_split(folder / f"{split}.jsonl") for folder in (towns, out))
        assert [e.prompt for e in new] == [e.prompt for e in old]
    assert checker(out)(new[0], plain_text(new[0].rounds)).exact
    for name, end in each([("test.jsonl", (towns / "val.jsonl").read_text()), ("families.py", "# more\n")]):
        (sources / name).write_text((sources / name).read_text() + end)
        assert [write(), write()] == [True, False]
    assert len(read_split(out / "test.jsonl")) == 18 and (out / "families.py").read_text().endswith("# more\n")
