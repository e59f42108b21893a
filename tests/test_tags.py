"""Answers as tagged text: what is written reads back exactly, and what is malformed says where and why."""

import random
import re
from collections import Counter

import pytest
from conftest import NASTY, ODD_SPACE, each, hostile

from tags import (
    ASYNC,
    ASYNC_END,
    EOS,
    SYNC,
    TOPIC,
    TOPIC_END,
    Round,
    Span,
    TagError,
    format_answer,
    parse_answer,
    pieces,
    plain_text,
)
from tokenizer import MAX_LENGTH

OTTER = (
    Round("", (Span("habitat", "Rivers and coasts.", 1), Span("food", "Fish, crabs and frogs.", 2))),
    Round("In short: a playful river animal."),
)
OTTER_TAGGED = (
    "<topic> habitat 1</topic><topic> food 2</topic>"
    "<async> habitat: Rivers and coasts.</async><async> food: Fish, crabs and frogs.</async>"
    "<sync/> In short: a playful river animal.<eos>"
)


def hostile_rounds(rng):
    def span():
        return Span(hostile(rng) or "x", hostile(rng), rng.choice([1, 2, 9, 10, MAX_LENGTH]))

    return [
        Round(hostile(rng) if rng.random() < 0.7 else "", tuple(span() for _ in range(rng.choice([0, 0, 1, 2, 4]))))
        for _ in range(rng.randint(1, 4))
    ]


def test_the_example_of_the_specification_is_written_and_read():
    assert format_answer(OTTER) == OTTER_TAGGED
    assert parse_answer(OTTER_TAGGED) == list(OTTER)


def test_any_answer_reads_back_exactly():
    for seed in each(range(8)):
        rng = random.Random(seed)
        for _ in range(250):
            rounds = hostile_rounds(rng)
            assert parse_answer(format_answer(rounds)) == rounds


def test_backslashes_and_typed_tags_survive_in_every_place():
    for text in each(["\\", "a\\", "\\\\", "\\<eos>", "\\<eos>\\", "a:\\", "<eos>", "a <sync/>\\"]):
        for rounds in [
            [Round(text)],
            [Round(text), Round(text)],
            [Round(text, (Span("food", "fish", 1),))],
            [Round("", (Span("food", text, 1), Span("habitat", text, 1)))],
            [Round("", (Span(text, "fish", 1), Span(text, "frogs", 2)))],
        ]:
            assert parse_answer(format_answer(rounds)) == rounds


def test_empty_spans_and_rounds_read_back():
    for rounds in [
        [Round()],
        [Round(), Round(), Round()],
        [Round("", (Span("food", "", 1),))],
        [Round("a"), Round(), Round("", (Span("food", "", 1), Span("habitat", "", 2))), Round()],
    ]:
        assert parse_answer(format_answer(rounds)) == rounds


def test_a_typed_tag_stays_text_until_it_is_parsed():
    tagged = format_answer([Round("no <eos> here")])
    assert tagged == "no \\<eos> here<eos>"
    assert parse_answer(tagged) == [Round("no <eos> here")]


def test_the_last_integer_of_a_topic_is_its_length():
    for plan, name, length in each(
        [
            ("top 5 tips 3", "top 5 tips", 3),
            ("top 5 3", "top 5", 3),
            ("5 3", "5", 3),
            ("food 64", "food", 64),
            ("food 120", "food", 120),  # more than two digits
            ("food 007", "food", 7),
            ("food ٣ 3", "food ٣", 3),
            ("3: food 2", "3: food", 2),
        ]
    ):
        tagged = f"<topic> {plan}</topic><async> {name}: text</async><eos>"
        assert parse_answer(tagged) == [Round("", (Span(name, "text", length),))]


def test_a_span_begins_with_its_topic_and_a_colon():
    rounds = [Round("", (Span("a:b", "c: d", 1), Span("a", "b: c", 1)))]
    tagged = "<topic> a:b 1</topic><topic> a 1</topic><async> a:b: c: d</async><async> a: b: c</async><eos>"
    assert format_answer(rounds) == tagged and parse_answer(tagged) == rounds


def test_white_space_next_to_a_tag_does_not_count():
    rng = random.Random(0)

    def space():
        return "".join(rng.choice(ODD_SPACE) for _ in range(rng.randint(0, 3)))

    for _ in range(200):
        loose = re.sub(r"</?\w+/?>", lambda tag: space() + tag[0] + space(), OTTER_TAGGED)
        assert parse_answer(loose) == list(OTTER)
        assert format_answer(parse_answer(loose)) == OTTER_TAGGED  # one way to write an answer


def test_formatting_what_was_parsed_gives_the_same_text_again():
    rng = random.Random(1)
    for _ in range(300):
        tagged = format_answer(hostile_rounds(rng))
        assert format_answer(parse_answer(tagged)) == tagged


def test_white_space_at_the_ends_of_a_text_is_not_stored():
    loose = [Round(" a\n", (Span("\tfood ", " fish\u3000", 1),))]
    assert format_answer(loose) == format_answer([Round("a", (Span("food", "fish", 1),))])
    assert parse_answer(format_answer(loose)) == [Round("a", (Span("food", "fish", 1),))]


def test_plain_text_is_the_texts_and_spans_in_reading_order_without_plan_or_tags():
    assert plain_text(OTTER) == "Rivers and coasts.\nFish, crabs and frogs.\nIn short: a playful river animal."
    rounds = [Round("first", (Span("t", "second", 1), Span("u", "", 1))), Round(), Round("third")]
    assert pieces(rounds) == ["first", "second", "third"]
    assert plain_text(rounds) == "first\nsecond\nthird"
    assert plain_text([Round()]) == "" and pieces([]) == []


LONG = 150_000


def test_time_grows_with_the_length_alone():
    """With quadratic time one of these would take an hour."""
    for part in each(["\\", "\\" + EOS, "\\\\\\" + EOS, "<", "<topic", "[PAD", " ", "\n", "a ", "1 ", EOS, "a:", ": "]):
        text = part * (LONG // len(part))
        rounds = [Round(text, (Span("x" + text, text, 1), Span("y", text, 1)))]
        tagged = format_answer(rounds)
        assert format_answer(parse_answer(tagged)) == tagged
        for broken in [text, TOPIC + text, TOPIC + text + TOPIC_END + EOS, PLAN + ASYNC + text + EOS]:
            parses_or_says_why(broken)


PLAN = "<topic> food 2</topic>"
SPAN = "<async> food: fish</async>"
MALFORMED = {  # what is wrong: (tagged text, line, column, parts of the message)
    "nothing at all": ("", 1, 1, ["expected <topic> or <sync/> or <eos>", "the end"]),
    "text without an end": ("hello", 1, 6, ["expected <topic> or <sync/> or <eos>", "the end"]),
    "an escaped end": ("hello\\<eos>", 1, 12, ["expected <topic> or <sync/> or <eos>", "the end"]),
    "an end after an open round": ("a<sync/>", 1, 9, ["expected <topic> or <sync/> or <eos>", "the end"]),
    "a closing tag that nothing opened": ("a</topic><eos>", 1, 2, ["expected <topic> or <sync/>", "'</topic>'"]),
    "a span without a plan": ("<async> food: x</async><eos>", 1, 1, ["expected <topic>", "'<async>'"]),
    "a tag of the prompt": ("<user> hi<eos>", 1, 1, ["expected <topic>", "'<user>'"]),
    "a pad": ("hi [PAD]<eos>", 1, 4, ["expected <topic>", "'[PAD]'"]),
    "a mask in a span": (PLAN + "<async> food: [MASK]</async><eos>", 1, 37, ["expected </async>", "'[MASK]'"]),
    "a topic without a length": ("<topic> food</topic><eos>", 1, 8, ["expected", "its length in units"]),
    "a topic without a name": ("<topic> 2</topic><eos>", 1, 8, ["expected a topic's name"]),
    "an empty topic": ("<topic></topic><eos>", 1, 8, ["expected a topic's name"]),
    "a length of zero": ("<topic> food 0</topic><eos>", 1, 8, ["expected", "its length in units"]),
    "a negative length": ("<topic> food -2</topic><eos>", 1, 8, ["expected", "its length in units"]),
    "a broken length": ("<topic> food 2.5</topic><eos>", 1, 8, ["expected", "its length in units"]),
    "a length that is not last": ("<topic> 2 food</topic><eos>", 1, 8, ["expected", "its length in units"]),
    "a length stuck to the name": ("<topic> food2</topic><eos>", 1, 8, ["expected", "its length in units"]),
    "a length in other digits": ("<topic> food ٣</topic><eos>", 1, 8, ["expected", "its length in units"]),
    "a length of thousands of digits": (f"<topic> a {'9' * 5000}</topic><eos>", 1, 8, ["expected"]),
    "a topic left open": ("<topic> food 2<eos>", 1, 15, ["expected </topic>", "'<eos>'"]),
    "a topic in a topic": ("<topic> a 1<topic> b 2</topic><eos>", 1, 12, ["expected </topic>", "'<topic>'"]),
    "a plan without spans": (PLAN + "<eos>", 1, 23, ["expected <topic> or <async>", "'<eos>'"]),
    "text inside a plan": (PLAN + " and " + PLAN, 1, 23, ["expected <topic> or <async>", "text 'and'"]),
    "a span of another topic": (PLAN + "<async> fodo: x</async><eos>", 1, 30, ["span of topic 'food'", "'food:'"]),
    "a span of another long topic": (f"<topic> {'a' * 999} 1</topic><async> b</async><eos>", 1, 1025, ["aaa", "aaa:'"]),
    "a span without a colon": (PLAN + "<async> food</async><eos>", 1, 30, ["span of topic 'food'", "'food:'"]),
    "spans in another order": (
        "<topic> a 1</topic><topic> b 1</topic><async> b: x</async><async> a: y</async><eos>",
        1, 46, ["span of topic 'a'", "'a:'"],
    ),
    "a span left open": (PLAN + "<async> food: fish<eos>", 1, 41, ["expected </async>", "'<eos>'"]),
    "a span too few": (PLAN + PLAN + SPAN + "<eos>", 1, 71, ["expected <async>", "'<eos>'"]),
    "a span too many": (PLAN + SPAN + SPAN + "<eos>", 1, 49, ["expected <sync/> or <eos>", "'<async>'"]),
    "text after a span": (PLAN + SPAN + " more<eos>", 1, 49, ["expected <sync/> or <eos>", "text 'more'"]),
    "a plan after spans": (PLAN + SPAN + PLAN, 1, 49, ["expected <sync/> or <eos>", "'<topic>'"]),
    "text after the end": ("a<eos> b", 1, 7, ["expected nothing after <eos>"]),
    "a tag after the end": ("a<eos><eos>", 1, 7, ["expected nothing after <eos>"]),
    "a later line": ("one\n\ntwo</async><eos>", 3, 4, ["expected <topic>", "'</async>'"]),
    "a later round": ("one<sync/>\n" + PLAN + "\n  <eos>", 3, 3, ["expected <topic> or <async>", "'<eos>'"]),
}  # fmt: skip


def test_malformed_text_is_an_error_that_says_where_and_what_was_expected():
    for kind in each(MALFORMED):
        tagged, line, column, parts = MALFORMED[kind]
        with pytest.raises(TagError) as error:
            parse_answer(tagged)
        message = str(error.value)
        assert message.startswith(f"line {line}, column {column}: ")
        assert all(part in message for part in parts), message
        assert len(message) < 250


def test_a_tag_error_is_a_value_error():
    assert issubclass(TagError, ValueError)


def parses_or_says_why(tagged):
    """Whether the text parses; any exception but a TagError that names a place in it fails the test."""
    try:
        rounds = parse_answer(tagged)
    except TagError as error:
        place = re.match(r"line (\d+), column (\d+): expected ", str(error))
        assert place, error
        lines = tagged.split("\n")
        assert 1 <= int(place[1]) <= len(lines) and 1 <= int(place[2]) <= len(lines[int(place[1]) - 1]) + 1, error
        return False
    assert parse_answer(format_answer(rounds)) == rounds
    return True


def test_any_mix_of_tags_and_text_parses_or_says_why():
    rng = random.Random(2)
    parts = [*NASTY, *[TOPIC, TOPIC_END, ASYNC, ASYNC_END, SYNC, EOS] * 3, " a 1", " a: x", PLAN, SPAN]
    parsed = sum(
        parses_or_says_why("".join(rng.choice(parts) for _ in range(rng.randint(0, 12))) + rng.choice(["", EOS]))
        for _ in range(3000)
    )
    assert 20 < parsed < 2900  # both outcomes are tried


def test_a_damaged_answer_parses_or_says_why():
    rng = random.Random(3)
    outcomes = Counter()
    for _ in range(1200):
        tagged = format_answer(rng.choice([OTTER, hostile_rounds(rng)]))
        for _ in range(rng.randint(1, 3)):
            a, b = sorted(rng.randint(0, len(tagged)) for _ in range(2))
            cut = rng.choice([tagged[a:b], "", "", rng.choice(NASTY), tagged[a:b] * 2])
            b = min(b, a + 12) if rng.random() < 0.7 else b
            tagged = tagged[:a] + cut + tagged[b:]
        outcomes[parses_or_says_why(tagged)] += 1
    assert min(outcomes[True], outcomes[False]) > 50  # both outcomes are tried
