"""The invented towns: what an answer follows from, what splits share, which colours the checker takes."""

import random
import re
from itertools import permutations

import pytest
from conftest import each

from data.tasks.families import NUMBERS
from data.tasks.prepare import make_splits
from data.towns.families import CLOSING, COLOURS, COUPLED, FAMILIES, MOST, SUM, TRAIN_SHARES, WORLD, check
from data.towns.families import TOWNS as NAMES
from tags import format_answer, parse_answer, pieces, plain_text


@pytest.fixture(scope="module")
def splits():
    return make_splits({"train": 1500, "val": 60, "test": 60}, 0, FAMILIES, TRAIN_SHARES)


def examples_of(splits, family):
    return [example for split in splits.values() for example in split if example.family == family]


def answer_of(prompt, colour):
    """The lines that a prompt asks for, from its words alone."""
    town = next((name for name in NAMES if prompt.endswith(f" of {name}.")), "")
    if prompt.startswith("Tell me about"):
        found = re.findall(r"the ([a-z]+) ([A-Z][a-z]+)", prompt)
        lines = [WORLD[kind][0].format(name=name, town=town) for kind, name in found]
        return [*lines, CLOSING.format(WORLD[found[0][0]][1], WORLD[found[-1][0]][1])]
    if prompt.startswith("Choose one colour"):
        return [COUPLED[thing].format(town=town, colour=colour) for thing in re.findall(r"the ([a-z]+)", prompt)]
    found = [
        (name, NUMBERS.index(a), NUMBERS.index(b)) for name, a, b in re.findall(r"([A-Z]\w+) (\w+) and (\w+)", prompt)
    ]
    lines = [SUM.format(name=name, a=NUMBERS[a], b=NUMBERS[b], total=NUMBERS[a + b]) for name, a, b in found]
    first, second, *_ = sorted(found, key=lambda row: -row[1] - row[2])
    assert sum(first[1:]) > sum(second[1:]), "the winner is clear"
    return [*lines, MOST.format(name=first[0], total=NUMBERS[sum(first[1:])])]


def test_answers_are_read_back_and_follow_from_their_prompts_but_for_the_colour(splits):
    for family in each(FAMILIES):
        colours = set()
        for example in examples_of(splits, family):
            text = plain_text(example.rounds)
            (colour,) = {*re.findall("|".join(COLOURS), text)} or {None} if family == "coupled" else {None}
            colours.add(colour)
            assert text.split("\n") == answer_of(example.prompt, colour)
            unknown = re.sub(r"( )0(</topic>)", r"\g<1>1\2", format_answer(example.rounds))  # lengths come later
            assert pieces(parse_answer(unknown)) == pieces(example.rounds)
        assert colours == ({*COLOURS} if family == "coupled" else {None})


def test_topics_hold_what_tells_spans_apart_and_no_colour(splits):
    for family in each(FAMILIES):
        for example in examples_of(splits, family):
            topics = [span.topic for span in example.rounds[0].spans]
            assert len({*topics}) == len(topics) > 1
            assert all(word in example.prompt for topic in topics for word in topic.split())


def test_no_prompt_is_in_two_splits_and_test_has_equal_shares(splits):
    prompts = [example.prompt for split in splits.values() for example in split]
    assert len({*prompts}) == len(prompts)
    assert {len([e for e in splits["test"] if e.family == family]) for family in FAMILIES} == {20}


def test_coupled_has_so_few_prompts_that_it_says_how_many():
    """Eight towns, two to four of six things in any order."""
    assert len(NAMES) * sum(len([*permutations(COUPLED, n)]) for n in (2, 3, 4)) == 4080
    rng = random.Random(0)
    assert 4070 < len({FAMILIES["coupled"](rng, None).prompt for _ in range(60000)}) <= 4080


def test_any_colour_that_all_spans_share_is_right_and_mixed_ones_are_not(splits):
    for example in examples_of(splits, "coupled")[:40]:
        lines = plain_text(example.rounds).split("\n")
        (own,) = {*re.findall("|".join(COLOURS), "\n".join(lines))}
        for colour in each(COLOURS):
            assert check(example, "\n".join(lines).replace(own, colour)).exact
            mixed = [lines[0].replace(own, colour), *lines[1:]]
            assert check(example, "\n".join(mixed)).exact == (colour == own)
        assert not check(example, "\n".join(lines).replace(own, "mauve")).exact


def test_a_wrong_word_is_wrong_in_its_line_alone(splits):
    for family in each(FAMILIES):
        for example in examples_of(splits, family)[:20]:
            first, *rest = plain_text(example.rounds).split("\n")
            score = check(example, "\n".join([first + " indeed", *rest]))
            assert not score.exact and score.spans == [False] + [True] * len(rest)
