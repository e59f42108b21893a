"""Distillation: a model's own answers take the place of the training answers, and nothing else changes."""

import json
import sys

import pytest
from conftest import OTTER, SENTENCES, each, small_model

from config import SampleConfig
from data import distil, read_split, write_dataset
from measure.eval import EvalConfig, evaluate
from tags import Example, parse_answer
from tokenizer import Tokenizer
from training.checkpoint import save_checkpoint


@pytest.fixture
def folder(tmp_path):
    """A data set of three training prompts."""
    others = [Example(prompt, OTTER.rounds, "river") for prompt in SENTENCES]
    write_dataset(tmp_path / "data", {"train": others[:3], "val": [OTTER], "test": others[3:]}, 400, unit=4)
    return tmp_path / "data"


def result(example, tagged, **more):
    return {"prompt": example.prompt, "tagged": tagged, "cut": False, "broken": False, **more}


def write_answers(path, rows):
    path.write_text("".join(f"{json.dumps(row)}\n" for row in [{"settings": 1}, *rows]))


def run(monkeypatch, folder):
    out = folder.parent / "own"
    options = {"--data": folder, "--answers": folder.parent / "own.jsonl", "--out": out}
    monkeypatch.setattr(sys, "argv", ["distil.py", *(str(part) for pair in options.items() for part in pair)])
    distil.main()
    return out


OWN = "<topic> food 9</topic><async> food: fish</async><sync/> It eats fish.<eos>"


def test_whole_answers_become_training_data_with_the_lengths_that_their_spans_need(folder, monkeypatch, capsys):
    first, second, third = read_split(folder / "train.jsonl")
    answers = [[2, result(third, OWN)], [0, result(first, OWN, cut=True)], [1, result(second, OWN, broken=True)]]
    write_answers(folder.parent / "own.jsonl", answers)
    out = run(monkeypatch, folder)
    assert "1 of 3 training prompts have a whole answer, 1 of these a plan" in capsys.readouterr().out
    (own,) = read_split(out / "train.jsonl")
    units = Tokenizer.load(folder / "tokenizer.json").units("fish")
    assert (own.prompt, own.family) == (third.prompt, "river") and own.rounds[0].spans[0].length == units < 9
    assert list(own.rounds) == parse_answer(OWN.replace("food 9", f"food {units}"))
    for kept in ("val.jsonl", "test.jsonl", "tokenizer.json"):
        assert (out / kept).read_bytes() == (folder / kept).read_bytes()


def test_it_reads_what_an_evaluation_of_the_training_split_keeps(folder, monkeypatch):
    tokenizer = Tokenizer.load(folder / "tokenizer.json")
    model = folder.parent / "model.safetensors"
    save_checkpoint(model, small_model(tokenizer.vocab_size), tokenizer, {"method": {"method": "parallel-ar"}})
    config = EvalConfig(str(model), str(folder), "train", draws=1, answers=str(folder.parent / "own.jsonl"))
    evaluate(config, SampleConfig(max_tokens=300))
    kept = dict(json.loads(row) for row in (folder.parent / "own.jsonl").read_text().splitlines()[1:])
    whole = sum(not answer["cut"] for answer in kept.values())
    assert len(read_split(run(monkeypatch, folder) / "train.jsonl")) == whole > 0


def test_what_is_no_answer_is_named_by_its_line_and_writes_nothing(folder, monkeypatch):
    for row, said in each([
    ([1, {"prompt": SENTENCES[0]}], "'tagged'"),
    ([0, result(OTTER, OWN)], "an answer to another prompt: of another split?"),
    ([3, result(OTTER, OWN)], "out of range"),
    ([0, result(Example(SENTENCES[0], ()), "<topic> food")], "topic"),
    ("no answer", "too many values"),
]):  # fmt: skip
        write_answers(folder.parent / "own.jsonl", [[0, result(Example(SENTENCES[0], ()), OWN)], row])
        with pytest.raises(ValueError, match=rf"own.jsonl, line 3: expected an answer of .*{said}"):
            run(monkeypatch, folder)
        assert not (folder.parent / "own").exists()


def test_answers_have_to_be_there(folder, monkeypatch):
    with pytest.raises(ValueError, match="own.jsonl: expected a file that measure/eval.py --answers has written"):
        run(monkeypatch, folder)
