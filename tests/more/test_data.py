"""Examples and their files: what is written reads back, and what is broken is named by file and line."""

import errno
import itertools
import json
import os
import random
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import each, hostile

from data import read_split, write_dataset
from masks import encode_example
from tags import Example, Round, Span, format_answer, pieces, plain_text
from tokenizer import Tokenizer

ROOT = Path(__file__).resolve().parents[2]
UNIT = 3
WORDS = ["otter", "river", "fish", "top 5 tips 3", "a <eos> typed", "<topic>", "back\\slash", "水獺", "one\ntwo"]
ODD = ["next\x85line", "line\u2028break", "paragraph\u2029break", "feed\x0cand\x1cmark", 'quote"and\\', "tab\there"]


@pytest.fixture(autouse=True)
def without_waiting_for_the_disk(monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)  # test_files.py tests that it is called


def example(rng, words=WORDS):
    def text(most):
        return " ".join(rng.choice(words) for _ in range(rng.randint(0, most)))

    def round_():
        spans = tuple(Span(rng.choice(words), text(12), 99) for _ in range(rng.choice([0, 1, 3])))
        return Round(text(4), spans)

    return Example(text(5), tuple(round_() for _ in range(rng.randint(1, 3))), rng.choice(["", "guide"]))


def make_splits(seed=0, words=WORDS):
    rng = random.Random(seed)
    return {name: [example(rng, words) for _ in range(n)] for name, n in [("train", 30), ("val", 7), ("test", 5)]}


def without_lengths(examples):
    return [
        replace(e, rounds=tuple(replace(r, spans=tuple(replace(s, length=0) for s in r.spans)) for r in e.rounds))
        for e in examples
    ]


def files_of(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# ---------------------------------------------------------------- writing and reading back


def test_a_data_set_reads_back_as_it_was_written(tmp_path):
    splits = make_splits()
    write_dataset(tmp_path / "new" / "set", splits, 400, UNIT)
    for name, examples in splits.items():
        back = read_split(tmp_path / "new" / "set" / f"{name}.jsonl")
        assert without_lengths(back) == without_lengths(examples)
        assert all(isinstance(e.rounds, tuple) for e in back)
    assert sorted(files_of(tmp_path / "new" / "set")) == ["test.jsonl", "tokenizer.json", "train.jsonl", "val.jsonl"]


def test_odd_line_breaks_and_quotes_inside_texts_read_back(fresh):
    for odd in each(ODD):
        tmp_path = fresh()
        splits = {"train": [Example(odd, (Round(odd, (Span(odd, odd),)),), odd)] * 2}
        write_dataset(tmp_path, splits, 400, UNIT)
        assert without_lengths(read_split(tmp_path / "train.jsonl")) == splits["train"]


def test_an_empty_split_reads_back_empty(tmp_path):
    write_dataset(tmp_path, {**make_splits(), "val": []}, 400, UNIT)
    assert read_split(tmp_path / "val.jsonl") == []


def test_span_lengths_are_the_fewest_units_that_hold_the_text(tmp_path):
    write_dataset(tmp_path, make_splits(), 400, UNIT)
    tokenizer = Tokenizer.load(tmp_path / "tokenizer.json")
    assert tokenizer.unit == UNIT
    seen = set()
    for name in ["train", "val", "test"]:
        for span in [s for e in read_split(tmp_path / f"{name}.jsonl") for r in e.rounds for s in r.spans]:
            n = len(tokenizer.encode(span.text))
            assert span.length * UNIT >= n
            assert (span.length - 1) * UNIT < n or (n == 0 and span.length == 1)
            seen.add(span.length)
    assert len(seen) > 5


def test_the_tokenizer_is_trained_on_prompts_texts_topics_and_spans_of_the_train_split_alone(tmp_path):
    train = [Example("pppp", (Round("qqqq", (Span("rrrr", "ssss"),)),))] * 2
    other = [Example("vvvv", (Round("wwww", (Span("xxxx", "yyyy"),)),))] * 9
    write_dataset(tmp_path, {"train": train, "val": other, "test": other}, 400, UNIT)
    tokenizer = Tokenizer.load(tmp_path / "tokenizer.json")
    assert [len(tokenizer.encode(word)) for word in ["pppp", "qqqq", "rrrr", "ssss"]] == [1] * 4
    assert [len(tokenizer.encode(word)) for word in ["vvvv", "wwww", "xxxx", "yyyy"]] == [5] * 4


def test_the_same_examples_give_the_same_bytes(tmp_path):
    for folder in ["one", "two"]:
        write_dataset(tmp_path / folder, make_splits(), 400, UNIT)
    assert files_of(tmp_path / "one") == files_of(tmp_path / "two")
    write_dataset(tmp_path / "one", make_splits(), 400, UNIT)  # over what is there
    assert files_of(tmp_path / "one") == files_of(tmp_path / "two")


def test_the_same_examples_give_the_same_bytes_in_another_process(tmp_path):
    """Python orders sets of strings by a seed, which here is another one."""
    script = "import sys, test_data as t; t.write_dataset(sys.argv[1], t.make_splits(), 400, t.UNIT)"
    seed = "2" if os.environ.get("PYTHONHASHSEED") == "1" else "1"
    folders = [str(ROOT), str(ROOT / "tests"), str(ROOT / "tests" / "more")]
    env = {**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": os.pathsep.join(folders)}
    subprocess.run([sys.executable, "-c", script, str(tmp_path / "1")], env=env, check=True, capture_output=True)
    write_dataset(tmp_path / "2", make_splits(), 400, UNIT)
    assert files_of(tmp_path / "1") == files_of(tmp_path / "2")


def test_the_report_counts_examples_tokens_and_pads(tmp_path, capsys, monkeypatch):
    clock = iter(range(10**6))
    monkeypatch.setattr("data.time.monotonic", lambda: next(clock))  # a second per example
    train = [Example("fish", (Round("fish fish", (Span("fish", "fish " * 4),)),))] * 3  # 2 units of 3 hold 4 tokens
    write_dataset(tmp_path, {"train": train}, 400, UNIT)
    *progress, header, row, end = capsys.readouterr().out.splitlines()
    steps = ("checked for train", "read for the tokenizer", "wrote for train")
    assert progress == [f"{step}: 3 of 3 examples" for step in steps] and len(header) <= 80
    assert header.split()[:6] == ["split", "examples", "prompt", "plan", "answer", "pads"]
    assert row.split() == ["train", "3", "1.0", "4.0", "6.0", "33.3%"]
    assert end.startswith(f"{Tokenizer.load(tmp_path / 'tokenizer.json').vocab_size} tokens in ")


# ---------------------------------------------------------------- interrupted writes


@pytest.mark.parametrize("failing", range(4))
def test_a_disk_that_fills_up_leaves_the_old_data_set_and_nothing_else(tmp_path, monkeypatch, failing):
    write_dataset(tmp_path, make_splits(0), 400, UNIT)
    old, written, open_ = files_of(tmp_path), [], Path.open

    def full(path, *args, **kwargs):
        if len(written) == failing:
            raise OSError(errno.ENOSPC, "No space left on device")
        written.append(path)
        return open_(path, *args, **kwargs)

    monkeypatch.setattr(Path, "open", full)
    with pytest.raises(OSError, match="No space left"):
        write_dataset(tmp_path, make_splits(1), 400, UNIT)
    monkeypatch.undo()
    assert files_of(tmp_path) == old


# ---------------------------------------------------------------- what is refused before anything is written


UNLIKE = "".join(chr(0x4E00 + i) for i in range(200))  # no two alike, so training cannot make them few tokens


def topic(name, text="fish"):
    return (Round("", (Span(name, text),)),)


REFUSED = {  # what is wrong: (an example with the prompt "odd", parts of the message)
    "a blank topic": (Example("odd", topic("")), ["name for each topic"]),
    "a topic of white space": (Example("odd", topic(" \u3000\t")), ["name for each topic"]),
    "a long name": (Example("odd", topic(UNLIKE)), ["topic '一丁", "1 to 64 tokens, not"]),
    "a long span": (Example("odd", topic("food", UNLIKE * 2)), ["topic 'food'", "1 to 64 units", "larger unit"]),
    "no rounds": (Example("odd", ()), ["one or more Rounds"]),
    "half a character": (Example("odd", (Round("\ud800"),)), ["surrogates"]),
    "half a character in a topic": (Example("odd", topic("\udfff")), ["surrogates"]),
    "a number": (Example("odd", topic("food", 5)), ["expected a text, found 5"]),
    "no text": (Example("odd", (Round(None),)), ["expected a text, found None"]),
    "an odd family": (Example("odd", topic("food"), 7), ["expected a text, found 7"]),
    "a round that is no tuple": (Example("odd", Round("x")), ["tuple of one or more Rounds"]),
    "a span that is no tuple": (Example("odd", (Round("x", Span("a", "b")),)), ["tuple of Spans"]),
    "an iterator": (Example("odd", (Round("x", iter([Span("a", "b")])),)), ["tuple of Spans"]),
    "a text for rounds": (Example("odd", "x"), ["tuple of one or more Rounds"]),
    "no example": ("odd", ["expected an Example"]),
}


def test_an_example_that_cannot_be_trained_is_refused_by_name_before_anything_is_written(fresh):
    for split, wrong in each(itertools.product(["train", "val"], REFUSED)):
        tmp_path = fresh()
        example, parts = REFUSED[wrong]
        splits = make_splits()
        splits[split].append(example)
        with pytest.raises(ValueError) as error:
            write_dataset(tmp_path / "new", splits, 400, UNIT)
        assert str(error.value).startswith(f"split '{split}', prompt 'odd': ")
        assert all(part in str(error.value) for part in parts) and len(str(error.value).splitlines()) == 1
        assert not (tmp_path / "new").exists()


def test_a_prompt_that_is_no_text_is_refused(fresh):
    for prompt in each([5, None]):
        tmp_path = fresh()
        with pytest.raises(ValueError, match=f"prompt '{prompt}': expected a text"):
            write_dataset(tmp_path / "new", {"train": [Example(prompt, (Round("x"),))]}, 400, UNIT)


def test_a_data_set_needs_examples_to_train(fresh):
    for splits in each([{}, {"val": make_splits()["val"]}, {"train": []}]):
        tmp_path = fresh()
        with pytest.raises(ValueError, match="expected a split 'train' with examples"):
            write_dataset(tmp_path / "new", splits, 400, UNIT)
        assert not (tmp_path / "new").exists()


def test_a_split_needs_a_name_that_a_file_can_have(fresh):
    for name in each(["", "../val", "a/b", ".", "a b", "val.jsonl"]):
        tmp_path = fresh()
        with pytest.raises(ValueError, match="expected a name of letters"):
            write_dataset(tmp_path / "new", {**make_splits(), name: []}, 400, UNIT)
        assert not (tmp_path / "new").exists()


def test_an_impossible_unit_or_vocabulary_is_refused(fresh):
    for unit in each([1.5, 0, -1, "10", None]):
        tmp_path = fresh()
        with pytest.raises(ValueError, match="unit .*: expected a whole number"):
            write_dataset(tmp_path / "new", make_splits(), 400, unit)
        with pytest.raises(ValueError, match="vocab_size .*: expected a whole number"):
            write_dataset(tmp_path / "new", make_splits(), unit, UNIT)
        assert not (tmp_path / "new").exists()


def test_whatever_is_written_reads_back_and_can_be_trained(fresh):
    for seed in each(range(2)):
        tmp_path = fresh()
        rng, refused = random.Random(seed), 0
        for number in range(60):

            def any_text(most):
                return (
                    rng.choice(["", " ", "x"]) + hostile(rng, rng.choice([0, 2, most])) + rng.choice(["", "\n", "\\"])
                )

            def any_example():
                spans = [tuple(Span(any_text(30), any_text(200)) for _ in range(rng.randint(0, 2))) for _ in range(2)]
                return Example(
                    any_text(9), tuple(Round(any_text(9), s) for s in spans[: rng.randint(1, 2)]), any_text(2)
                )

            splits = {"train": [any_example()], "val": [any_example() for _ in range(rng.randint(0, 1))]}
            folder = tmp_path / str(number)
            try:
                write_dataset(folder, splits, 400, UNIT)
            except ValueError as error:
                assert re.match("split '(train|val)', prompt ", str(error)) and not folder.exists()
                refused += 1
                continue
            tokenizer = Tokenizer.load(folder / "tokenizer.json")
            for split, examples in splits.items():
                back = read_split(folder / f"{split}.jsonl")
                assert [plain_text(e.rounds) for e in back] == [
                    "\n".join(text.strip() for text in pieces(e.rounds) if text.strip()) for e in examples
                ]
                for example in back:
                    assert encode_example(example, tokenizer).token[-1] == tokenizer.eos
        assert 5 < refused < 55


def test_training_names_prompt_and_topic_of_a_span_that_no_plan_can_ask_for(tmp_path):
    write_dataset(tmp_path, make_splits(), 400, UNIT)
    tokenizer = Tokenizer.load(tmp_path / "tokenizer.json")
    for span, said in [
        (Span("food", "fish " * 50, 2), "its plan only 6"),
        (Span("food", "", 65), "1 to 64 units, not 65"),
        (Span("food" * 50, "", 1), "1 to 64 tokens"),
    ]:
        with pytest.raises(ValueError, match=f"prompt 'odd', topic 'food.*': .*{said}"):
            encode_example(Example("odd", (Round("", (span,)),)), tokenizer)


# ---------------------------------------------------------------- broken files

GOOD = json.dumps({"prompt": "p", "answer": "a<eos>"})


def test_a_line_needs_a_prompt_and_an_answer_and_may_have_a_family(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(f'{GOOD}\n{{"answer": "b<eos>", "prompt": "q", "family": "f", "more": 1}}\n')
    assert read_split(path) == [Example("p", (Round("a"),)), Example("q", (Round("b"),), "f")]
    path.write_text(GOOD)  # without a last line break
    assert read_split(path) == [Example("p", (Round("a"),))]


BROKEN = [
    ("{", "Expecting"),
    ("", "Expecting"),
    ("{'prompt': 'p'}", "Expecting"),
    (GOOD + GOOD, "Extra data"),
    ("5", "'prompt' and 'answer'"),
    ("null", "'prompt' and 'answer'"),
    ("[]", "'prompt' and 'answer'"),
    ('"text"', "'prompt' and 'answer'"),
    ('{"prompt": "p"}', "'prompt' and 'answer'"),
    ('{"answer": "a<eos>"}', "'prompt' and 'answer'"),
    ('{"prompt": "p", "answer": null}', "'prompt' and 'answer'"),
    ('{"prompt": "p", "answer": ["a"]}', "'prompt' and 'answer'"),
    ('{"prompt": null, "answer": "a<eos>"}', "'prompt' and 'answer'"),
    ('{"prompt": 5, "answer": "a<eos>"}', "'prompt' and 'answer'"),
    ('{"prompt": "p", "answer": "a"}', "line 1, column 2: expected <topic>"),
    ('{"prompt": "p", "answer": "<topic> a</topic><eos>"}', "expected a topic's name and its length"),
    ('{"prompt": "p", "answer": "a\\n</async><eos>"}', "line 2, column 1: expected <topic>"),
    (json.dumps({"prompt": "p", "answer": f"<topic> a {'9' * 5000}</topic><eos>"}), "expected"),
    ('{"prompt": "p", "answer": "<topic> a 65</topic><async> a: b</async><eos>"}', "1 to 64 units, not 65"),
    ('{"prompt": "p", "answer": "a<eos>", "family": 3}', "'family'"),
    ('{"prompt": "p", "answer": "a<eos>", "family": NaN}', "'family'"),
    ('{"prompt": NaN, "answer": "a<eos>"}', "'prompt' and 'answer'"),
    ('{"prompt": "p", "answer": "a<eos>", "more": ' + "9" * 5000 + "}", "4300 digits"),
    ('{"prompt": "p", "answer": "a<eos>", "more": ' + "[" * 200_000, "nested too deeply"),
    ('{"prompt": "\\ud800", "answer": "a<eos>"}', "surrogates"),
    ('{"prompt": "p", "answer": "\\udc00<eos>"}', "surrogates"),
    ("\ufeff" + GOOD, "BOM"),
    ('{"prompt": "\x01", "answer": "a<eos>"}', "control character"),
]


def test_a_broken_line_is_an_error_that_names_file_and_line(fresh):
    for line, said in each(BROKEN):
        tmp_path = fresh()
        path = tmp_path / "broken.jsonl"
        path.write_text("\n".join([GOOD, GOOD, line, GOOD]) + "\n", encoding="utf-8")
        with pytest.raises(ValueError) as error:
            read_split(path)
        assert str(error.value).startswith(f"{path}, line 3: ") and said in str(error.value)
        assert len(str(error.value).splitlines()) == 1 and len(str(error.value)) < 400


def test_a_damaged_file_reads_or_says_where_and_why(tmp_path):
    write_dataset(tmp_path, make_splits(), 400, UNIT)
    rng, path, whole, broken = random.Random(3), tmp_path / "train.jsonl", (tmp_path / "train.jsonl").read_bytes(), 0
    odd = [b"", b"[", b'"', b"\xff", b"NaN", b"1e999", b"{}", b"\\", b"\n", b"\r", b"<eos>", b"\\ud800", b"</topic>"]
    for _ in range(400):
        damaged, at = bytearray(whole), rng.randrange(len(whole))
        damaged[at : at + rng.choice([0, 1, 1, 5, 500])] = rng.choice(odd)
        path.write_bytes(damaged)
        try:
            read_split(path)
        except ValueError as error:
            assert re.match(rf"{re.escape(str(path))}, line \d+: ", str(error))
            broken += 1
    assert 50 < broken < 400


def test_a_file_that_is_no_text_is_an_error_that_names_the_file(tmp_path):
    path = tmp_path / "broken.jsonl"
    path.write_bytes(GOOD.encode() + b'\n{"prompt": "\xff", "answer": "a<eos>"}\n')
    with pytest.raises(ValueError, match="broken.jsonl"):
        read_split(path)


def test_a_missing_file_is_an_error_that_says_what_to_run(tmp_path):
    with pytest.raises(ValueError, match="train.jsonl does not exist: a script as in data/README.md writes it"):
        read_split(tmp_path / "train.jsonl")
    (tmp_path / "prepare.py").touch()
    with pytest.raises(ValueError, match="does not exist: `python .*prepare.py` writes it"):
        read_split(str(tmp_path / "train.jsonl"))
    (tmp_path / "tokenizer.json").touch()
    with pytest.raises(ValueError, match=f"there is no folder .*taks; data sets beside it: .*{tmp_path.name}"):
        read_split(tmp_path.parent / "taks" / "train.jsonl")


def test_what_a_file_holds_is_the_tagged_answer(tmp_path):
    rounds = (Round("Hi.", (Span("food", "fish", 1),)), Round("Bye."))
    write_dataset(tmp_path, {"train": [Example("p", rounds, "f")]}, 400, unit=10)
    row = json.loads((tmp_path / "train.jsonl").read_text(encoding="utf-8"))
    assert row == {"prompt": "p", "answer": format_answer(rounds), "family": "f"}
    assert row["answer"] == "Hi.<topic> food 1</topic><async> food: fish</async><sync/> Bye.<eos>"


# ---------------------------------------------------------------- the documentation


def test_the_example_of_the_readme_runs_as_printed(tmp_path):
    (script,) = re.findall(r"```python\n(.*?)```", (ROOT / "data" / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    (tmp_path / "own.py").write_text(script, encoding="utf-8")
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "own.py"], cwd=tmp_path, env=env, check=True, capture_output=True)
    (folder,) = (path for path in tmp_path.rglob("*") if path.name == "own")
    tokenizer = Tokenizer.load(folder / "tokenizer.json")
    for split in ["train", "val", "test"]:
        examples = read_split(folder / f"{split}.jsonl")
        assert examples and all(e.rounds[0].spans for e in examples)
        for example in examples:
            encode_example(example, tokenizer)
