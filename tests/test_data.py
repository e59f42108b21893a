"""Examples and their files: what is written reads back, and what is broken is named by file and line."""

import json
import os
import random
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from data import Example, read_split, write_dataset
from tags import Round, Span, format_answer
from tokenizer import Tokenizer

ROOT = Path(__file__).resolve().parent.parent
UNIT = 3
WORDS = ["otter", "river", "fish", "top 5 tips 3", "a <eos> typed", "<topic>", "back\\slash", "水獺", "one\ntwo"]
ODD = ["next\x85line", "line\u2028break", "paragraph\u2029break", "feed\x0cand\x1cmark", 'quote"and\\', "tab\there"]


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


@pytest.mark.parametrize("odd", ODD)
def test_odd_line_breaks_and_quotes_inside_texts_read_back(tmp_path, odd):
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
    script = "import sys, test_data as t; t.write_dataset(sys.argv[1], t.make_splits(), 400, t.UNIT)"
    for seed in ["1", "2"]:  # Python orders sets of strings by this seed
        env = {**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])}
        subprocess.run([sys.executable, "-c", script, str(tmp_path / seed)], env=env, check=True, capture_output=True)
    assert files_of(tmp_path / "1") == files_of(tmp_path / "2")


def test_the_report_counts_examples_tokens_and_pads(tmp_path, capsys):
    train = [Example("fish", (Round("fish fish", (Span("fish", "fish " * 4),)),))] * 3  # 2 units of 3 hold 4 tokens
    write_dataset(tmp_path, {"train": train}, 400, UNIT)
    header, row, end = capsys.readouterr().out.splitlines()
    assert header.split()[:6] == ["split", "examples", "prompt", "plan", "answer", "pads"]
    assert row.split() == ["train", "3", "1.0", "4.0", "6.0", "33.3%"]
    assert end.startswith(f"{Tokenizer.load(tmp_path / 'tokenizer.json').vocab_size} tokens in ")


# ---------------------------------------------------------------- interrupted writes


def test_an_interrupted_data_set_leaves_every_file_whole(tmp_path):
    write_dataset(tmp_path, make_splits(0), 400, UNIT)
    old = files_of(tmp_path)
    new = make_splits(1)
    new["val"].append(Example("half a character: \ud800", (Round("x"),)))
    with pytest.raises(UnicodeEncodeError):
        write_dataset(tmp_path, new, 400, UNIT)
    assert (tmp_path / "val.jsonl").read_bytes() == old["val.jsonl"]
    for name in ["train", "val", "test"]:
        assert read_split(tmp_path / f"{name}.jsonl")
    Tokenizer.load(tmp_path / "tokenizer.json")


# ---------------------------------------------------------------- broken files

GOOD = json.dumps({"prompt": "p", "answer": "a<eos>"})


def test_a_line_needs_a_prompt_and_an_answer_and_may_have_a_family(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(f'{GOOD}\n{{"answer": "b<eos>", "prompt": "q", "family": "f", "more": 1}}\n')
    assert read_split(path) == [Example("p", (Round("a"),)), Example("q", (Round("b"),), "f")]
    path.write_text(GOOD)  # without a last line break
    assert read_split(path) == [Example("p", (Round("a"),))]


@pytest.mark.parametrize(
    "line, said",
    [
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
    ],
)
def test_a_broken_line_is_an_error_that_names_file_and_line(tmp_path, line, said):
    path = tmp_path / "broken.jsonl"
    path.write_text("\n".join([GOOD, GOOD, line, GOOD]) + "\n")
    with pytest.raises(ValueError) as error:
        read_split(path)
    assert str(error.value).startswith(f"{path}, line 3: ") and said in str(error.value)


def test_a_file_that_is_no_text_is_an_error_that_names_the_file(tmp_path):
    path = tmp_path / "broken.jsonl"
    path.write_bytes(GOOD.encode() + b'\n{"prompt": "\xff", "answer": "a<eos>"}\n')
    with pytest.raises(ValueError, match="broken.jsonl"):
        read_split(path)


def test_a_missing_file_is_an_error_that_says_what_to_run(tmp_path):
    with pytest.raises(ValueError, match="train.jsonl does not exist: run `python .*prepare.py` first"):
        read_split(tmp_path / "train.jsonl")
    with pytest.raises(ValueError, match="does not exist"):
        read_split(str(tmp_path / "train.jsonl"))


def test_what_a_file_holds_is_the_tagged_answer(tmp_path):
    rounds = (Round("Hi.", (Span("food", "fish", 1),)), Round("Bye."))
    write_dataset(tmp_path, {"train": [Example("p", rounds, "f")]}, 400, unit=10)
    row = json.loads((tmp_path / "train.jsonl").read_text(encoding="utf-8"))
    assert row == {"prompt": "p", "answer": format_answer(rounds), "family": "f"}
    assert row["answer"] == "Hi.<topic> food 1</topic><async> food: fish</async><sync/> Bye.<eos>"
