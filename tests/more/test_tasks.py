"""The generated tasks: what the checker accepts, what the splits may share, how long answers are."""

import random
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import each

from data import read_split
from data.tasks import prepare
from data.tasks.families import COLOURS, FAMILIES, TRAIN_SHARES, build_world, check
from tags import pieces, plain_text

PREPARE = Path(prepare.__file__)
SIZES = {"train": 6000, "val": 60, "test": 60}


@pytest.fixture(scope="module")
def splits():
    return prepare.make_splits(SIZES, seed=0)


def examples_of(splits, family):
    return [example for split in splits.values() for example in split if example.family == family]


def words_and_marks(text):
    return re.findall(r"\w+|[^\w\s]", text)


# ---------------------------------------------------------------- the checker


def test_a_reference_answer_is_exact(splits):
    for family in each(FAMILIES):
        for example in examples_of(splits, family):
            score = check(example, plain_text(example.rounds))
            assert score.exact and score.spans == [True] * len(pieces(example.rounds))


def test_a_changed_word_is_wrong_in_its_line_only(splits):
    for family in each(FAMILIES):
        rng = random.Random(1)
        for example in examples_of(splits, family)[:50]:
            lines = pieces(example.rounds)
            wrong = rng.randrange(len(lines))
            words = lines[wrong].split()
            words[rng.randrange(len(words))] = "nothing"
            lines[wrong] = " ".join(words)
            score = check(example, "\n".join(lines))
            assert not score.exact
            assert score.spans == [i != wrong for i in range(len(lines))]


def test_swapped_spans_are_both_wrong(splits):
    for family in each([family for family in FAMILIES if family != "stories"]):
        for example in examples_of(splits, family)[:50]:
            lines = pieces(example.rounds)
            lines[0], lines[2] = lines[2], lines[0]
            score = check(example, "\n".join(lines))
            assert not score.exact
            assert score.spans == [i not in (0, 2) for i in range(len(lines))]


def test_missing_and_extra_lines_are_not_exact(splits):
    for family in each(FAMILIES):
        for example in examples_of(splits, family)[:50]:
            lines = pieces(example.rounds)
            missing = check(example, "\n".join(lines[:-1]))
            assert not missing.exact and missing.spans == [True] * (len(lines) - 1) + [False]
            extra = check(example, "\n".join([*lines, lines[0]]))
            assert not extra.exact and extra.spans == [True] * len(lines)
            assert not any(check(example, "").spans)


def test_white_space_does_not_count(splits):
    for family in each(FAMILIES):
        example = examples_of(splits, family)[0]
        loose = "\n".join("  " + line.replace(" ", "  ") + " " for line in pieces(example.rounds))
        assert check(example, loose + "\n").exact


def test_coupled_accepts_every_colour_that_all_spans_share(splits):
    for example in examples_of(splits, "coupled")[:50]:
        for colour in COLOURS:
            assert check(example, recoloured(example, [colour] * 4)).exact


def test_coupled_flags_the_spans_outside_the_majority(splits):
    for example in examples_of(splits, "coupled")[:50]:
        count = len(pieces(example.rounds))
        score = check(example, recoloured(example, ["red", "blue", "red", "red"]))
        assert not score.exact and score.spans == [True, False, True, True][:count]


def recoloured(example, colours):
    """The reference answer with the colour of each span replaced."""
    any_colour = "|".join(COLOURS)
    lines = pieces(example.rounds)
    return "\n".join(re.sub(rf"\b({any_colour})\b", colour, line) for colour, line in zip(colours, lines))


# ---------------------------------------------------------------- what the splits share


def test_no_prompt_occurs_twice(splits):
    prompts = [example.prompt for split in splits.values() for example in split]
    assert len(set(prompts)) == len(prompts)


def test_lookups_never_show_a_test_name_in_another_split(splits):
    for other in ("train", "val"):
        names = set(build_world(0, other).names)
        assert not names & set(build_world(0, "test").names)
        for example in splits[other]:
            if example.family == "lookups":
                assert re.match(r"About (\w+ \w+) we know", example.prompt)[1] in names


def test_every_fact_of_the_test_split_is_learnable_from_train(splits):
    for family in each(["facts", "transforms"]):
        known, asked = ({span.text for example in splits[split] if example.family == family
                         for span in example.rounds[0].spans} for split in ("train", "test"))  # fmt: skip
        assert asked <= known


def test_only_coupled_leaves_its_answer_open():
    """A prompt that is drawn again gets the same plan, and but for the colour the same text."""
    for family in each(["facts", "stories", "coupled"]):
        rng, world, plans, texts = random.Random(0), build_world(0, "train"), {}, {}
        for _ in range(4000):
            example = FAMILIES[family](rng, world)
            plans.setdefault(example.prompt, set()).add(tuple(s.topic for r in example.rounds for s in r.spans))
            texts.setdefault(example.prompt, set()).add(plain_text(example.rounds))
        assert len(plans) < 4000, "no prompt was drawn twice: this test shows nothing"
        assert all(len(plan) == 1 for plan in plans.values())
        assert any(len(text) > 1 for text in texts.values()) == (family == "coupled")


def test_coupled_draws_every_colour_about_equally_often(splits):
    first = [example.rounds[0].spans[0].text for example in examples_of(splits, "coupled")]
    for colour in COLOURS:
        share = sum(colour in words_and_marks(text) for text in first) / len(first)
        assert 0.09 < share < 0.16  # 1/8, give or take three standard errors of 1000 draws


# ---------------------------------------------------------------- sizes and determinism


def test_sizes_are_in_range(splits):
    for family in each(FAMILIES):
        for example in examples_of(splits, family):
            spans = [span for round_ in example.rounds for span in round_.spans]
            assert (len(spans) == 0) if family == "stories" else (3 <= len(spans) <= 5)
            assert 80 <= len(words_and_marks(plain_text(example.rounds))) <= 200
            assert all(22 <= len(words_and_marks(span.text)) <= 40 for span in spans)
            assert all(re.fullmatch("[a-z]+", span.topic) for span in spans)
            assert 8 <= len(example.prompt.split()) <= 50


def test_the_families_share_a_small_vocabulary(splits):
    """Every word should become one token."""
    words = {word for split in splits.values() for example in split
             for word in words_and_marks(example.prompt + " " + plain_text(example.rounds))}  # fmt: skip
    assert len(words) < 1300


def test_the_families_have_equal_shares_but_in_train(splits):
    for name, split in splits.items():
        for family in FAMILIES:
            share = TRAIN_SHARES[family] / sum(TRAIN_SHARES.values()) if name == "train" else 1 / len(FAMILIES)
            assert sum(example.family == family for example in split) == round(SIZES[name] * share)


def test_the_seed_decides_everything_and_the_test_split_ignores_the_size_of_train(splits):
    small = {"train": 60, "val": 60, "test": 60}
    assert prepare.make_splits(small, seed=0) == prepare.make_splits(small, seed=0)
    assert prepare.make_splits(small, seed=0)["test"] == splits["test"]
    assert prepare.make_splits(small, seed=1)["test"] != splits["test"]


def test_too_large_a_split_says_what_to_do(monkeypatch):
    example = FAMILIES["stories"](random.Random(0), build_world(0, "train"))
    monkeypatch.setitem(FAMILIES, "stories", lambda rng, world: example)
    with pytest.raises(ValueError, match="stories: found only 1 of 10 .* smaller --val"):
        prepare.draw("stories", "val", 10, 0, {})


# ---------------------------------------------------------------- the command


def test_prepare_runs_from_any_directory_and_its_files_check_as_exact(tmp_path):
    command = [sys.executable, PREPARE, "--out", "written", "--train", "300", "--val", "7", "--test", "14"]
    subprocess.run(command, cwd=tmp_path, check=True)
    test = read_split(tmp_path / "written" / "test.jsonl")
    assert len(test) == 14 and (tmp_path / "written" / "tokenizer.json").exists()
    assert all(check(example, plain_text(example.rounds)).exact for example in test)


def test_help_shows_every_setting_with_its_default():
    shown = subprocess.run([sys.executable, PREPARE, "--help"], capture_output=True, text=True, check=True).stdout
    for setting in ["out", "seed", "train", "val", "test", "vocab_size", "unit"]:
        assert re.search(rf"  --{setting} [^(]*\(default: ", shown)


def test_an_impossible_setting_is_one_line_and_writes_nothing(fresh):
    for wrong, said in each([
    (["--train", "0"], "--train 0: expected at least 1"),
    (["--val", "-1"], "--val -1: expected at least 0"),
    (["--unit", "0"], "unit 0: expected a whole number of tokens"),
    (["--vocab_size", "5"], "vocab_size 5: expected a whole number of at least"),
]):  # fmt: skip
        tmp_path = fresh()
        command = [
            sys.executable,
            PREPARE,
            "--out",
            tmp_path / "new",
            "--train",
            "60",
            "--val",
            "7",
            "--test",
            "7",
            *wrong,
        ]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 1 and done.stderr.startswith("prepare.py: ") and said in done.stderr
        assert len(done.stderr.splitlines()) == 1 and not (tmp_path / "new").exists()
