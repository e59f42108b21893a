"""Dependence of spans: what is asked, what it is worth in nats, and how plans are revised. And how plans are judged."""

import random
import runpy
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import OTTER, each, random_example, small_model

from data import read_split, write_dataset
from data.instruct.dependence import LATER, Gain, Judge, Piece, asked, gains, question, revised, table
from data.instruct.judge import Score, docstrings, facts, judge
from data.instruct.plans import cuts_of, restore
from masks import encode_prompt
from tags import Example, Round, Span, pieces
from tokenizer import Tokenizer
from training.checkpoint import save_checkpoint

ROOT = Path(__file__).resolve().parents[2]
TWO = Example(
    "p",
    (
        Round("Hi.", (Span("a", "one", 1), Span("b", "two", 2), Span("c", "three", 1))),
        Round("Bye.", (Span("d", "four", 1),)),
    ),
)


# ---------------------------------------------------------------- questions


def test_a_span_may_need_those_before_it_in_its_round_and_a_later_text_the_round_before():
    found = [(piece.number, piece.topic, piece.given, piece.others) for piece in asked(TWO)]
    spans = ("a: one", "b: two", "c: three")
    assert found == [
        (1, "a", ("Hi.",), ()),
        (2, "b", ("Hi.",), spans[:1]),
        (3, "c", ("Hi.",), spans[:2]),
        (4, LATER, ("Hi.",), spans),
        (5, "d", ("Hi.", *spans, "Bye."), ()),
    ]
    assert {piece.plan for piece in asked(TWO)} == {"a 1, b 2, c 1", "", "d 1"}


def test_the_numbers_of_what_is_asked_are_those_of_the_pieces(tokenizer):
    for seed in range(50):
        example = random_example(seed, tokenizer)
        texts = pieces(example.rounds)
        for piece in asked(example):
            assert texts[piece.number] == piece.text


def test_a_question_shows_prompt_plan_and_what_may_be_known():
    piece = [*asked(TWO)][1]
    assert question("p", piece, piece.others) == Example(
        "p\nPlan: a 1, b 2, c 1\nHi.\na: one\nWrite: b", (Round("two"),)
    )
    assert "one" not in question("p", piece, ()).prompt


# ---------------------------------------------------------------- nats


def test_nats_are_those_of_one_token_after_another(tokenizer, model):
    examples = [Example(f"otter {n}", (Round("fish and crabs " * n),)) for n in (1, 3, 2)]
    for example, nats in zip(examples, Judge(model, tokenizer, batch=2).nats(examples)):
        known, total = encode_prompt(example.prompt, tokenizer), 0.0
        answer = [*tokenizer.encode(example.rounds[0].text), tokenizer.eos]
        for token in answer:
            n = len(known)
            see = torch.tensor([[[i + 1, 0, 0] for i in range(n)]])
            hidden = model(torch.tensor([known]), torch.arange(n)[None], see)
            total -= model.logits(hidden)[0, -1].log_softmax(-1)[token].item()
            known.append(token)
        assert nats == pytest.approx(total / len(answer), rel=1e-4)


class Copyist:
    """Finds a text easy, 1 nat per token instead of 3, if its question shows it."""

    def nats(self, examples):
        return [1.0 if e.rounds[0].text in e.prompt else 3.0 for e in examples]


def test_a_span_that_repeats_another_gains_and_others_do_not():
    spans = (Span("a", "x", 1), Span("b", "y", 1), Span("c", "x", 1), Span("d", "x", 1))
    (found,) = gains([Example("p", (Round("", spans), Round("z")))], Copyist())
    assert [(gain.piece.topic, gain.all, gain.nearest) for gain in found] == [
        ("b", 0, 0),
        ("c", 2, 0),
        ("d", 2, 2),
        (LATER, 0, 0),
    ]
    lines = [*table([found], 0.1)]
    assert [line.split()[-1] for line in lines[1:]] == ["0%", "100%", "100%", "0%"]


# ---------------------------------------------------------------- revised plans


def gain(number, all_, nearest=0.0, topic="x"):
    return Gain(Piece(number, topic, "", "", (), ("y",)), 3.0, all_, nearest)


LONG = [f"{name} lives in the rivers and lakes of the coast and eats all of the fish there." for name in "ABCDE"]
FIVE = Example("p", (Round("Hi.", tuple(Span(text[0], text, 9) for text in LONG[:4])), Round("Bye.")))


REVISED = [
    ([], [["Hi.", "ABCD"], ["Bye.", ""]], "kept"),
    ([gain(2, 0.05), gain(5, 9.0, topic=LATER)], [["Hi.", "ABCD"], ["Bye.", ""]], "kept"),
    ([gain(3, 0.5)], [["Hi.", "AB"], ["", "CD"], ["Bye.", ""]], "later"),
    ([gain(4, 0.5)], [["Hi.", "ABC"], [LONG[3], ""], ["Bye.", ""]], "later"),
    ([gain(3, 0.5, 0.5)], [["Hi.", "ABD"], ["Bye.", ""]], "merged"),
    ([gain(2, 0.5)], [["Hi.\n" + LONG[0], ""], ["", "BCD"], ["Bye.", ""]], "later"),
    ([gain(2, 0.5, 0.5), gain(4, 0.5)], [["Hi.", "AC"], [LONG[3], ""], ["Bye.", ""]], "later"),
    (
        [gain(2, 0.5, 0.5), gain(3, 0.5, 0.5), gain(4, 0.5, 0.5)],
        [["\n".join(["Hi.", *LONG[:4], "Bye."]), ""]],
        "now plain text",
    ),
]


def test_a_span_that_gains_too_much_is_merged_or_waits_and_the_text_stays(tokenizer):
    for found, expected, what in each(REVISED):
        example, done = revised(FIVE, found, 0.1, tokenizer)
        assert done == what
        assert [[r.text, "".join(s.topic for s in r.spans)] for r in example.rounds] == expected
        assert restore(example.rounds, example.gaps) == restore(FIVE.rounds, FIVE.gaps)


def test_the_bounds_of_gains_are_kept_and_of_four_fifths_merged(tokenizer):
    for all_, nearest, what in each([(0.5, 0.5, "kept"), (0.501, 0, "later"), (1, 0.8, "merged"), (1, 0.79, "later"),
                                     (5, 1, "later")]):  # fmt: skip
        assert revised(FIVE, [gain(3, all_, nearest)], 0.5, tokenizer)[1] == what
    lines = [*table([[gain(3, 0.5), gain(3, 0.75)]], 0.5)]
    assert lines[1].split()[-1] == "50%"


def test_an_answer_without_pieces_is_kept(tokenizer):
    for rounds in each([(Round(""),), (Round("", (Span("a", ""),)),)]):
        empty = Example("p", rounds)
        assert restore(rounds) == "" and cuts_of(rounds) == []
        assert revised(empty, [], 0.1, tokenizer) == (empty, "kept")


def test_a_merged_span_holds_both_texts(tokenizer):
    example, _ = revised(FIVE, [gain(3, 0.5, 0.5)], 0.1, tokenizer)
    assert example.rounds[0].spans[1].text == f"{LONG[1]}\n{LONG[2]}"


def test_any_revision_keeps_the_text_and_has_no_lone_span(tokenizer):
    for seed in range(100):
        rng, example = random.Random(seed), random_example(seed, tokenizer)
        if not pieces(example.rounds):
            continue
        found = [
            gain(p.number, rng.choice([0, 1]), rng.choice([0, 1]))
            for p in asked(example)
            if p.others and p.topic != LATER
        ]
        new, done = revised(example, found, 0.5, tokenizer)
        assert restore(new.rounds, new.gaps) == restore(example.rounds, example.gaps)
        assert done == "kept" or all(len(round_.spans) != 1 for round_ in new.rounds)


def test_the_command_writes_questions_and_revised_data(tmp_path, tokenizer, monkeypatch, capsys):
    data = tmp_path / "data"
    write_dataset(data, {name: [OTTER, FIVE, TWO] * 8 for name in ("train", "val", "test")}, 370, 4)
    model = tmp_path / "model.safetensors"

    def run(*args):
        monkeypatch.setattr(sys, "argv", ["dependence.py", str(data), *map(str, args)])
        with (
            pytest.raises(SystemExit) if "--model" not in args and "--questions" not in args else monkeypatch.context()
        ):
            runpy.run_path(str(ROOT / "data/instruct/dependence.py"), run_name="__main__")
        return capsys.readouterr().out

    run()
    run("--questions", tmp_path / "questions")
    asked_for = read_split(tmp_path / "questions" / "train.jsonl")
    assert len(asked_for) == 8 * sum(len([*asked(e)]) for e in (OTTER, FIVE, TWO))
    assert {"a: one" in e.prompt for e in asked_for if e.prompt.endswith("Write: c")} == {True, False}
    own = Tokenizer.load(data / "tokenizer.json")
    for wrong, method in ((tokenizer, "ar"), (own, "planned")):
        save_checkpoint(model, small_model(wrong.vocab_size), wrong, {"method": {"method": method}})
        with pytest.raises(SystemExit, match="--method ar on what --questions wrote"):
            run("--model", model)
    save_checkpoint(model, small_model(own.vocab_size), own, {"method": {"method": "ar"}})
    out = run("--model", model, "--out", tmp_path / "out", "--threshold", 0, "--device", "cpu")
    assert LATER in out and "plans: " in out
    texts = [
        [restore(e.rounds, e.gaps) for e in read_split(folder / "val.jsonl")] for folder in (data, tmp_path / "out")
    ]
    assert texts[0] == texts[1]


# ---------------------------------------------------------------- judging


def test_facts_are_places_in_the_text(tokenizer):
    text = "Hi.\n\nfish, crabs\nfrogs  Bye."
    rounds = (Round("Hi.", (Span("a", "fish, crabs"), Span("b", "frogs"))), Round("Bye."))
    found = facts(rounds, ("", "\n\n", "\n", "  ", ""), tokenizer)
    assert {text[begin:].split()[0] for begin in found["borders"]} == {"fish,", "frogs", "Bye."}
    assert {text[begin:end] for begin, end in found["spans"]} == {"fish, crabs", "frogs"}
    assert {(text[begin], number) for begin, number in found["rounds"]} == {("H", 0), ("f", 0), ("B", 1)}
    assert all(tokenizer.units(text[begin:end]) == dict(found["lengths"])[begin] for begin, end in found["spans"])


def test_scores_are_precision_and_recall():
    score = Score()
    score.add({1, 2, 3, 4}, {3, 4, 5})
    assert (score.precision, score.recall, score.f1) == (0.5, 2 / 3, 4 / 7)
    assert (Score().precision, Score().recall, Score().f1) == (1, 1, 1)


def test_a_plan_that_the_rules_find_is_judged_perfect_and_a_wrong_one_named(tokenizer):
    good = Example("p", (Round("", tuple(Span(text[0], text) for text in LONG)), Round("Overall, fine.")))
    wrong = replace(
        good, rounds=(Round("", good.rounds[0].spans[:2]), *(Round(text) for text in LONG[2:]), good.rounds[1])
    )
    scores, (first, second) = judge([good, wrong], tokenizer)
    assert second.f1 == 1 and not second.missed + second.extra
    assert (
        first.f1 == pytest.approx(4 / 7) and [text[0] for text in first.extra] == ["C", "D", "E"] and not first.missed
    )
    assert scores["spans"].recall == 1 and scores["spans"].precision == 0.7
    assert scores["borders"].f1 == 1 and scores["rounds"].precision < 1


@pytest.mark.parametrize("form", ["written", "prose"])
def test_docstrings_give_a_span_per_parameter(form):
    examples = list(docstrings(["numpy"], form))
    assert len(examples) > 100
    (clip,) = [e for e in examples if e.prompt.startswith("numpy.clip(")]
    assert [span.topic for span in clip.rounds[0].spans[:3]] == ["a", "a_max, a_min", "out"]
    assert (
        clip.rounds[0].spans[0].text
        == {
            "written": "a : array_like\n    Array containing elements to clip.",
            "prose": "Array containing elements to clip.",
        }[form]
    )


def test_docstrings_of_an_unknown_module_are_refused():
    with pytest.raises(ValueError, match="--modules numpy.none: No module"):
        list(docstrings(["numpy", "numpy.none"], "written"))
