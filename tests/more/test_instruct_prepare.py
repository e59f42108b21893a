"""From instruction files to a data set that trains: nothing is lost silently, splits do not mix, memory is bounded."""

import json
import os
import runpy
import subprocess
import sys
import tracemalloc
from collections import Counter
from pathlib import Path

import pytest
from conftest import each

from data import read_split
from data.instruct.plans import restore
from data.instruct.prepare import PROMPT, PrepareConfig, Survey
from tags import PAD, plain_text
from tokenizer import Tokenizer

ROOT = Path(__file__).resolve().parents[2]
ANIMALS = "otter bear fox wolf lynx heron crane stork badger mole".split()
FACTS = ("It lives in the rivers and lakes of the north.", "Fish, crabs and frogs are what it eats most of all.",
         "In the evening it slides on the mud and swims.")  # fmt: skip


def alpaca(n=50):
    """Made-up records: numbered lists with a conclusion, sections, plain sentences."""
    rows = []
    for i in range(n):
        animal = ANIMALS[i % len(ANIMALS)]
        steps = "".join(
            f"{k}. **{name}**: {fact} So does the {animal}.\n"
            for k, (name, fact) in enumerate(zip(("Home", "Food", "Play"), FACTS), 1)
        )
        parts = "\n\n".join(
            f"## {name}\n{fact} So does the {animal}." for name, fact in zip(("Home", "Food", "Play"), FACTS)
        )
        output = [
            f"About the {animal}:\n\n{steps}\nOverall, the {animal} is playful.",
            parts,
            f"The {animal} is an animal.",
        ][i % 3]
        rows.append({"instruction": f"Tell me about {animal} {i}.", "input": "", "output": output})
    return rows


@pytest.fixture
def run(monkeypatch, capsys):
    """Run a script as the command line does: (exit code or message, stdout, stderr)."""

    def call(script, *args):
        monkeypatch.setattr(sys, "argv", [script, *map(str, args)])
        code = 0
        try:
            runpy.run_path(str(ROOT / script), run_name="__main__")
        except SystemExit as exit_:
            code = exit_.code or 0
        return code, *capsys.readouterr()

    return call


@pytest.fixture
def prepare(run):
    return lambda *args: run("data/instruct/prepare.py", *args, "--vocab_size", 500)


def written(folder):
    return {split: read_split(folder / f"{split}.jsonl") for split in ("train", "val", "test")}


def save(path, rows):
    path.write_text(json.dumps(rows) if path.suffix == ".json" else "".join(json.dumps(row) + "\n" for row in rows))
    return path


# ---------------------------------------------------------------- the whole way


def test_what_is_prepared_trains_samples_and_is_measured(run, prepare, tmp_path):
    code, out, _ = prepare(save(tmp_path / "alpaca.json", alpaca()), "--out", tmp_path / "set")
    assert code == 0 and "50 records, 0 more cannot be used" in out
    size = ["--n_layer", 1, "--n_head", 2, "--n_kv_head", 2, "--d_model", 32, "--d_ff", 48]
    code, out, err = run("train.py", "--data", tmp_path / "set", "--out", tmp_path / "run", "--steps", 20, *size)
    assert code == 0 and "step 20/20" in " ".join(out.split()), err
    model = tmp_path / "run" / "model.safetensors"
    code, out, err = run(
        "sample.py", "--checkpoint", model, "--prompt", "Tell me about otter 3.", "--max_tokens", 60, "--json"
    )
    assert code == 0 and "text" in json.loads(out), err
    code, out, err = run(
        "measure/eval.py",
        "--checkpoint",
        model,
        "--data",
        tmp_path / "set",
        "--draws",
        1,
        "--limit",
        2,
        "--max_tokens",
        60,
    )
    assert code == 0 and "| items |" in out + err or "| sections |" in out or "| text |" in out, err


def test_every_record_is_written_once_and_its_text_can_be_recovered(prepare, tmp_path):
    rows = alpaca()
    prepare(save(tmp_path / "a.jsonl", rows), "--out", tmp_path / "set")
    splits = written(tmp_path / "set")
    found = {e.prompt: restore(e.rounds, e.gaps) for examples in splits.values() for e in examples}
    assert found == {row["instruction"]: row["output"] for row in rows}
    assert {split: len(examples) for split, examples in splits.items()} == {"train": 40, "val": 5, "test": 5}
    families = {e.prompt: e.family for examples in splits.values() for e in examples}
    assert [families[row["instruction"]] for row in rows[:3]] == ["items", "sections", "text"]


def test_lengths_are_those_of_the_tokenizer_that_is_written(prepare, tmp_path):
    prepare(save(tmp_path / "a.jsonl", alpaca()), "--out", tmp_path / "set", "--unit", 4)
    tokenizer = Tokenizer.load(tmp_path / "set" / "tokenizer.json")
    spans = [span for e in written(tmp_path / "set")["train"] for round_ in e.rounds for span in round_.spans]
    assert tokenizer.unit == 4 and len(spans) > 50
    assert all(span.length == tokenizer.units(span.text) for span in spans)


def test_the_same_files_give_the_same_bytes_and_another_tokenizer_can_be_given(prepare, tmp_path):
    path = save(tmp_path / "a.jsonl", alpaca())
    prepare(path, "--out", tmp_path / "one")
    prepare(path, "--out", tmp_path / "two", "--tokenizer", tmp_path / "one" / "tokenizer.json", "--unit", 7)
    one, two = ({file.name: file.read_bytes() for file in (tmp_path / name).iterdir()} for name in ("one", "two"))
    assert one == two


def test_all_that_is_known_of_one_prompt_is_in_one_split(prepare, tmp_path):
    rows = [{"prompt": f"p{i % 20}", "completion": f"answer {i}"} for i in range(200)]
    talk = [{"role": role, "content": f"{i}"} for i, role in enumerate(["user", "assistant"] * 3)]
    rows += [{"messages": [{"role": "user", "content": f"talk {i}"}, *talk[1:]]} for i in range(40)]
    for seed in range(3):
        prepare(save(tmp_path / "a.jsonl", rows), "--out", tmp_path / "set", "--seed", seed)
        splits = written(tmp_path / "set")
        groups = [{e.prompt.split("\n")[0].removeprefix("User: ") for e in examples} for examples in splits.values()]
        assert all(groups) and sum(map(len, groups)) == len(set.union(*groups)) == 60
        assert sum(map(len, splits.values())) == 200 + 3 * 40


def test_splits_do_not_overlap_and_have_the_sizes_asked_for(tmp_path):
    path = save(tmp_path / "a.jsonl", [{"prompt": f"p{i}", "completion": "a"} for i in range(300)])
    for val, test in each([(1, 1), (7, 5), (20, 10), (200, 200)]):
        survey = Survey([path], PrepareConfig(val=val, test=test))
        assert not survey.val & survey.test
        assert (len(survey.val), len(survey.test)) == (min(val, 30), min(test, 30))


def test_each_record_is_as_likely_in_the_sample(tmp_path):
    path = save(tmp_path / "a.jsonl", [{"prompt": f"p{i}", "completion": "a"} for i in range(4)])
    counts = Counter(
        r.prompt for seed in range(1500) for r in Survey([path], PrepareConfig(sample=2, seed=seed)).sample
    )
    assert all(abs(n - 750) < 80 for n in counts.values()) and len(counts) == 4  # 80: four standard deviations


# ---------------------------------------------------------------- what is not used


def test_bad_and_left_out_records_are_counted_and_listed(prepare, tmp_path):
    rows = alpaca(20)
    rows[3] = {"instruction": "no output"}
    rows[7]["output"] = "word " * 5000
    rows[9]["output"] = "<topic> a 1</topic><async> b: x</async><eos>"
    path = save(tmp_path / "a.jsonl", rows)
    code, out, err = prepare(path, "--out", tmp_path / "set")
    assert code == 0 and "18 records, 2 more cannot be used" in out
    assert sum(map(len, written(tmp_path / "set").values())) == 17
    rejected = (tmp_path / "set" / "rejected.txt").read_text().splitlines()
    assert [line.split(": ")[0] for line in rejected] == [f"{path}, line {n}" for n in (4, 8, 10)]
    assert "fields of no form" in rejected[0] and "longer than 1024 tokens" in rejected[1] and "'a:'" in rejected[2]
    assert f"{path}, line 4: " in err
    assert "left out: longer than 1024 tokens" in out


def test_too_many_bad_records_are_an_error_and_nothing_is_written(prepare, tmp_path):
    path = save(tmp_path / "a.jsonl", [{"q": 1}, *alpaca(9), {"q": 2}])
    code, _, _ = prepare(path, "--out", tmp_path / "set", "--max_bad", 1)
    assert f"{path}, line 11: found fields of no form: q (" in code and "--max_bad 1" in code
    assert not (tmp_path / "set").exists()


@pytest.mark.parametrize("content, said", [("", "no record that can be used"), ("[]", "no record that can be used")])
def test_a_file_without_records_is_one_line(prepare, tmp_path, content, said):
    (tmp_path / "a.json").write_text(content)
    code, _, _ = prepare(tmp_path / "a.json", "--out", tmp_path / "set")
    assert said in code and "a.json" in code


def test_a_file_with_nothing_left_to_train_on_is_one_line_and_makes_no_data_set(prepare, tmp_path):
    code, _, _ = prepare(save(tmp_path / "a.json", alpaca(5)), "--out", tmp_path / "set", "--max_tokens", 1)
    assert "no example is left for the split 'train'" in code
    assert [path.name for path in (tmp_path / "set").iterdir()] == ["rejected.txt"], "which says why"


def test_tagged_answers_keep_their_plan(prepare, tmp_path):
    tagged = "Hi.<topic> b 9</topic><topic> a 9</topic><async> b: one</async><async> a: two</async><sync/> Bye.<eos>"
    rows = [{"prompt": f"p{i}", "answer": tagged} for i in range(12)]
    _, out, _ = prepare(save(tmp_path / "a.jsonl", rows), "--out", tmp_path / "set")
    (first, *_) = written(tmp_path / "set")["train"]
    assert plain_text(first.rounds) == "Hi.\none\ntwo\nBye." and first.family == "tagged" and first.gaps == ()
    assert [(span.topic, span.length) for span in first.rounds[0].spans] == [("b", 1), ("a", 1)]
    assert "tagged" in out


def test_what_is_lost_counts_and_what_is_ignored_is_told(prepare, tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("id,prompt,completion\n" + "".join(f"{i},p,{'a' if i != 50 else chr(34)}\n" for i in range(90)))
    code, _, _ = prepare(path, "--out", tmp_path / "set", "--max_bad", 39)
    assert f"{path}, line 52: " in code and "40 lines" in code and not (tmp_path / "set").exists()
    code, out, _ = prepare(path, "--max_bad", 40)
    assert code == 0 and "50 records, 40 more cannot be used" in out and "ignored fields: id (50)" in out


def test_reports_are_text_whatever_the_file_holds(prepare, tmp_path):
    name = os.fsdecode(b"a\xe9.jsonl")
    rows = [*alpaca(12), {"q\udce9\n\x1b[2J": 1}, {"prompt": "p", "completion": "\x1b[2J " * 300}]
    code, out, err = prepare(save(tmp_path / name, rows), "--out", tmp_path / "set", "--show", 20)
    assert code == 0 and "\x1b" not in out + err and "ignored fields" not in out
    (line,) = (tmp_path / "set" / "rejected.txt").read_text(encoding="utf-8").splitlines()
    assert "a?.jsonl, line 13: found fields of no form: q? ?[2J (expected" in line


def test_requests_are_not_written_over_the_data_set(prepare, tmp_path):
    path = save(tmp_path / "a.jsonl", alpaca(12))
    for name in each(["train.jsonl", "tokenizer.json.part", "../set/rejected.txt"]):
        code, _, _ = prepare(path, "--out", tmp_path / "set", "--requests", tmp_path / "set" / name)
        assert "--requests" in code and "not in --out" in code and not (tmp_path / "set" / "train.jsonl").exists()


def test_the_tokenizer_is_trained_on_what_is_not_left_out(prepare, tmp_path):
    rows = alpaca(12)
    long = [{"prompt": "p", "completion": text} for text in ("zq" * 20_000, "xj " * 2000)]
    prepare(save(tmp_path / "a.jsonl", rows), "--out", tmp_path / "one", "--max_tokens", 500)
    prepare(save(tmp_path / "b.jsonl", rows + long), "--out", tmp_path / "two", "--max_tokens", 500)
    one, two = ((tmp_path / name / "tokenizer.json").read_text() for name in ("one", "two"))
    assert one == two


# ---------------------------------------------------------------- plans made elsewhere


def test_plans_made_elsewhere_are_used_where_they_fit(prepare, tmp_path):
    path = save(tmp_path / "a.jsonl", alpaca(12))
    quotes = [
        {"begins": "About"},
        {"topic": "all of it", "begins": "1. "},
        {"topic": "its play", "begins": "3. "},
        {"begins": "Overall"},
    ]
    plans = [{"record": 1, "pieces": quotes}, {"record": 4, "pieces": [{"begins": "Nothing such"}]}]
    _, out, _ = prepare(path, "--out", tmp_path / "set", "--annotations", save(tmp_path / "plans.jsonl", plans))
    examples = {e.prompt: e for part in written(tmp_path / "set").values() for e in part}
    first, fourth = examples["Tell me about otter 0."], examples["Tell me about wolf 3."]
    assert [span.topic for span in first.rounds[0].spans] == ["all of it", "its play"] and first.family == "annotations"
    assert [span.topic for span in fourth.rounds[0].spans] == ["1 home", "2 food", "3 play"]
    assert (
        "line 4: its annotation is not used: piece 1: 'Nothing such' is not in the text"
        in (tmp_path / "set" / "rejected.txt").read_text()
    )


def test_plans_for_no_record_are_an_error(prepare, tmp_path):
    plans = save(tmp_path / "plans.jsonl", [{"record": 99, "pieces": [{"begins": "x"}]}])
    code, _, _ = prepare(save(tmp_path / "a.jsonl", alpaca(12)), "--annotations", plans)
    assert "record 99" in code


def test_requests_hold_the_prompt_the_answer_and_the_number(prepare, tmp_path):
    rows = alpaca(12)
    prepare(save(tmp_path / "a.jsonl", rows), "--requests", tmp_path / "requests.jsonl")
    requests = [json.loads(line) for line in (tmp_path / "requests.jsonl").read_text().splitlines()]
    assert [request["record"] for request in requests] == [*range(1, 13)]
    for request, row in zip(requests, rows):
        assert row["instruction"] in request["request"] and row["output"] in request["request"]
        assert (
            f'{{"record": {request["record"]}, "pieces"' in request["request"] and "{prompt}" not in request["request"]
        )
    row = {"instruction": "Fill in {answer} and {record}.", "output": "It is {prompt}."}
    prepare(save(tmp_path / "b.jsonl", [row]), "--requests", tmp_path / "braces.jsonl")
    asked = json.loads((tmp_path / "braces.jsonl").read_text())["request"]
    assert row["instruction"] in asked and row["output"] in asked, "what a user wrote is text"
    assert "--requests" in PROMPT.read_text() and "--requests" not in requests[0]["request"]


# ---------------------------------------------------------------- output and memory


def test_examples_are_shown_cut_or_not_without_colours_in_a_pipe(prepare, tmp_path):
    rows = [{"question": "How many?", "answer": "Three."}, *alpaca(12)]
    _, out, _ = prepare(save(tmp_path / "a.jsonl", rows), "--show", 3)
    assert "How many?   [text: no parallel structure]\nThree.\n" in out and "\x1b" not in out
    assert "Tell me about otter 0.   [items]" in out and "── sync ──" in out and "[sections]" in out


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="asks git")
def test_what_the_guides_write_into_the_project_is_ignored_by_git():
    own = ["race.html", "data/mine/rejected.txt", "data/mine-checked/val.jsonl", "hw3/HANDOUT.md", "course-2027/hw1/x",
           "models/SmolLM2-135M/config.json", "runs/mine/log.csv"]  # fmt: skip
    asked = ["git", "-C", str(ROOT), "check-ignore", "--no-index", *own, "data/towns/prepare.py", "show/player.html"]
    assert subprocess.run(asked, capture_output=True, text=True).stdout.split() == own


def test_memory_does_not_grow_with_the_records(prepare, tmp_path):
    def peak(n):
        path = save(tmp_path / f"{n}.jsonl", [{"prompt": f"p{i}", "completion": "word " * 60} for i in range(n)])
        tracemalloc.start()
        prepare(path, "--out", tmp_path / "set", "--sample", 50, "--val", 10, "--test", 10)
        most = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return most

    peak(60)  # what is loaded once
    few, many = peak(150), peak(900)  # 50 and 300 kB of text
    assert many < few + 100_000


def test_control_tags_in_a_plain_answer_stay_text(prepare, tmp_path):
    rows = [
        {"prompt": f"p{i}", "completion": f"The tags {PAD} and <topic> are text, as is \\<eos> here."}
        for i in range(12)
    ]
    prepare(save(tmp_path / "a.jsonl", rows), "--out", tmp_path / "set")
    assert all(plain_text(e.rounds) == rows[0]["completion"] for e in written(tmp_path / "set")["train"])
