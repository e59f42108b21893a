"""Control tags, tokenizer and grammar: what is written reads back, and what is sampled parses and fits.

Three oracles are written here from the specification alone: a byte-pair trainer that recounts everything after
each merge, a reader of token lists, and the length of the shortest answer that begins with given tokens.
"""

import itertools
import json
import math
import random
import re
from collections import Counter
from fractions import Fraction

import numpy as np
import pytest
import regex

from tags import (
    ASSISTANT, ASYNC, ASYNC_END, EOS, MASK, MAX_LENGTH, MAX_NAME, PAD, SYNC, TAGS, TOPIC, TOPIC_END, USER,
    Grammar, Round, Span, TagError, Tokenizer, format_answer, parse_answer, pieces, plain_text, span_slots,
)  # fmt: skip

OTTER = (
    Round("", (Span("habitat", "Rivers and coasts.", 1), Span("food", "Fish, crabs and frogs.", 2))),
    Round("In short: a playful river animal."),
)
OTTER_TAGGED = (
    "<topic> habitat 1</topic><topic> food 2</topic>"
    "<async> habitat: Rivers and coasts.</async><async> food: Fish, crabs and frogs.</async>"
    "<sync/> In short: a playful river animal.<eos>"
)

ODD_SPACE = [" ", "\n", "\t", "\r\n", "\x0b", "\x1c", "\x85", "\u00a0", "\u2028", "\u3000"]
NASTY = [
    *TAGS, *ODD_SPACE, "\\", "\\\\", "\\" + EOS, "\\\\" + TOPIC, "<topic", "topic>", "<", ">", ":", ": ", "a:", "0", "3", "12",
    "top 5 tips 3", "food 2", "otter", "Straße", "水獺", "🦦", "e\u0301", "\u200b", "\ufeff", "\x00", "\x7f", "٣", "[PAD", "",
]  # fmt: skip


def hostile(rng, pieces=6):
    """Text made to confuse a parser, without white space at its ends (which is not stored)."""
    return "".join(rng.choice(NASTY) for _ in range(rng.randint(0, pieces))).strip()


def hostile_rounds(rng):
    def span():
        return Span(hostile(rng) or "x", hostile(rng), rng.choice([1, 2, 9, 10, MAX_LENGTH]))

    return [
        Round(hostile(rng) if rng.random() < 0.7 else "", tuple(span() for _ in range(rng.choice([0, 0, 1, 2, 4]))))
        for _ in range(rng.randint(1, 4))
    ]


# ---------------------------------------------------------------- answers as tagged text


def test_the_example_of_the_specification_is_written_and_read():
    assert format_answer(OTTER) == OTTER_TAGGED
    assert parse_answer(OTTER_TAGGED) == list(OTTER)


@pytest.mark.parametrize("seed", range(8))
def test_any_answer_reads_back_exactly(seed):
    rng = random.Random(seed)
    for _ in range(250):
        rounds = hostile_rounds(rng)
        assert parse_answer(format_answer(rounds)) == rounds


@pytest.mark.parametrize("text", ["\\", "a\\", "\\\\", "\\<eos>", "\\<eos>\\", "a:\\", "<eos>", "a <sync/>\\"])
def test_backslashes_and_typed_tags_survive_in_every_place(text):
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


@pytest.mark.parametrize(
    "plan, name, length",
    [
        ("top 5 tips 3", "top 5 tips", 3),
        ("top 5 3", "top 5", 3),
        ("5 3", "5", 3),
        ("food 64", "food", 64),
        ("food 120", "food", 120),  # more than two digits
        ("food 007", "food", 7),
        ("food ٣ 3", "food ٣", 3),
        ("3: food 2", "3: food", 2),
    ],
)
def test_the_last_integer_of_a_topic_is_its_length(plan, name, length):
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


@pytest.mark.parametrize("kind", MALFORMED)
def test_malformed_text_is_an_error_that_says_where_and_what_was_expected(kind):
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


# ---------------------------------------------------------------- tokenizer

CORPUS = [
    "The otter eats fish, crabs and frogs; the otters of the coast eat crabs.",
    "Top 5 tips: eat 10 fish, 100 crabs or 1000 frogs!",
    "The river otter lives in rivers, the sea otter lives in the sea.",
    "Straße, Straßen und Flüsse: 水獺吃魚。水獺 eats 🦦🦦?!",
    "banana bandana, bananas and bandanas; aaaaaaaa aaaa aaa abababab",
]
BYTES = [bytes([b]) for b in range(256)]
OVERHEAD = 256 + len(TAGS) + MAX_LENGTH  # ids that no training can save


@pytest.fixture(scope="module")
def tok():
    return Tokenizer.train(CORPUS, OVERHEAD + 60, unit=4)


def naive_merge(word, left, right):
    merged = []
    for part in word:
        if merged and (merged[-1], part) == (left, right):
            merged[-1] = [left + right]  # a list equals no bytes, so a new token waits for the next round
        else:
            merged.append(part)
    return [part[0] if isinstance(part, list) else part for part in merged]


def naive_byte_pairs(texts, merges):
    """Byte-pair training by the book: recount every pair of every word, merge the commonest, again and again."""
    words = [[bytes([b]) for b in word.encode()] for t in texts for word in regex.findall(Tokenizer.PATTERN, " " + t)]
    learned = []
    for _ in range(merges):
        counts = Counter(pair for word in words for pair in zip(word, word[1:]))
        count, pair = max(((count, pair) for pair, count in counts.items()), default=(0, None))
        if count < 2:
            break
        learned.append(pair[0] + pair[1])
        words = [naive_merge(word, *pair) for word in words]
    return learned


def naive_encode(tokens, text):
    """Byte-pair encoding by the book: in each word, merge the adjacent pair of lowest rank until none is a token."""
    rank, ids = {token: i for i, token in enumerate(tokens)}, []
    for word in regex.findall(Tokenizer.PATTERN, " " + text):
        parts = [bytes([b]) for b in word.encode()]
        while pairs := [(rank[a + b], i) for i, (a, b) in enumerate(zip(parts, parts[1:])) if a + b in rank]:
            _, i = min(pairs)
            parts[i : i + 2] = [parts[i] + parts[i + 1]]
        ids += [rank[part] for part in parts]
    return ids


def random_text(rng, length=40):
    """Any unicode but surrogates, which are no characters."""
    ranges = [(0x20, 0x7E), (0x20, 0x7E), (0, 0x2FF), (0x370, 0x1FFF), (0x2000, 0xD7FF), (0xE000, 0x10FFFF)]
    characters = [chr(rng.randint(*rng.choice(ranges))) for _ in range(rng.randint(0, length))]
    return "".join(rng.choice([c, c, c, " ", "\n", rng.choice(NASTY)]) for c in characters)


@pytest.mark.parametrize("merges", [0, 1, 20, 60])
def test_training_agrees_with_a_trainer_that_recounts_everything(merges):
    trained = Tokenizer.train(CORPUS, OVERHEAD + merges)
    learned = naive_byte_pairs(CORPUS, merges)
    assert len(learned) == merges
    assert trained.tokens == list(dict.fromkeys(BYTES + learned))


@pytest.mark.parametrize("seed", range(4))
def test_training_agrees_on_texts_full_of_ties_and_overlaps(seed):
    rng = random.Random(seed)
    texts = [" ".join("".join(rng.choices("ab", k=rng.randint(1, 12))) for _ in range(40)) for _ in range(5)]
    learned = naive_byte_pairs(texts, 150)
    assert len(learned) > 60
    assert Tokenizer.train(texts, OVERHEAD + 150).tokens == list(dict.fromkeys(BYTES + learned))


def test_training_stops_when_no_pair_occurs_twice():
    # the worked example of byte-pair encoding: aaabdaaabac, where aa, aaa and aaab occur twice
    assert Tokenizer.train(["aaabdaaabac"], 2000).tokens == [*BYTES, b"aa", b"aaa", b"aaab"]
    assert Tokenizer.train([], 2000).tokens == BYTES


def test_training_is_deterministic_and_does_not_depend_on_the_order_of_texts(tok):
    texts = list(CORPUS)
    for seed in range(3):
        random.Random(seed).shuffle(texts)
        assert Tokenizer.train(iter(texts), tok.vocab_size, unit=4).to_json() == tok.to_json()


def test_encoding_agrees_with_merging_by_rank(tok):
    rng = random.Random(4)
    for text in [*CORPUS, *(random_text(rng).replace("\n", " ").strip() for _ in range(200))]:
        if text:
            assert tok.encode(text) == naive_encode(tok.tokens, text)


def test_any_text_is_decoded_as_it_was_encoded(tok):
    rng = random.Random(5)
    for text in [*CORPUS, *(random_text(rng) for _ in range(800)), *(hostile(rng) for _ in range(400))]:
        assert tok.decode(tok.encode(text)) == text.strip()


@pytest.mark.parametrize("text", ["a\nb", "a\n\nb", "a\n b", "a \n b", "a\n  b\n\n  c", "a\r\nb", "a\n\tb"])
def test_lines_and_their_indentation_survive(tok, text):
    assert tok.decode(tok.encode(text)) == text


def test_a_word_is_the_same_tokens_wherever_it_stands(tok):
    word = tok.encode("otter")
    assert tok.encode("otter otter") == word + word
    assert tok.encode("otter\notter") == word + [tok.tokens.index(b"\n")] + word
    assert tok.encode("  otter\n") == word


def test_white_space_alone_has_no_tokens(tok):
    assert tok.encode("") == tok.encode(" ") == tok.encode("\n\t ") == []
    assert tok.decode([]) == ""


def test_a_tag_typed_in_a_text_is_text(tok):
    for typed in [*TAGS, "<length 3>", "<|endoftext|>", f"{USER}hi{EOS}{MASK}{PAD}{ASSISTANT}"]:
        for text in [typed, f"a{typed}b", f"a {typed} b", f"\n{typed}\n{typed}"]:
            ids = tok.encode(text)
            assert max(ids) < tok.pad
            assert tok.decode(ids) == text.strip()


def test_a_tokenizer_trained_on_typed_tags_still_reads_them_as_text():
    trained = Tokenizer.train([" ".join(TAGS) * 9] * 9, OVERHEAD + 200)
    assert not set(trained.tokens) & {tag.encode() for tag in TAGS}
    assert max(trained.encode(" ".join(TAGS))) < trained.pad


def test_ids_are_text_then_pad_then_tags_then_lengths(tok):
    assert len(tok.tokens) == len(set(tok.tokens)) == tok.pad == 316
    assert [tok.pad, tok.mask, tok.user, tok.assistant, tok.topic] == list(range(tok.pad, tok.pad + 5))
    assert [tok.topic_end, tok.async_, tok.async_end, tok.sync, tok.eos] == list(range(tok.pad + 5, tok.pad + 10))
    shown = [tok.name(i) for i in range(tok.pad, tok.eos + 1)]
    assert shown == [PAD, MASK, USER, ASSISTANT, TOPIC, TOPIC_END, ASYNC, ASYNC_END, SYNC, EOS]
    assert [tok.length_id(n) for n in range(1, MAX_LENGTH + 1)] == list(range(tok.eos + 1, tok.vocab_size))


def test_every_length_is_one_token(tok):
    for length in range(1, MAX_LENGTH + 1):
        assert tok.length_of(tok.length_id(length)) == length
        assert tok.name(tok.length_id(length)) == f" {length}"
    assert not any(tok.length_of(i) for i in range(tok.eos + 1))


@pytest.mark.parametrize("length", [-1, 0, MAX_LENGTH + 1, 1000])
def test_a_length_that_no_plan_can_ask_for_is_an_error(tok, length):
    with pytest.raises(ValueError, match=f"1 to {MAX_LENGTH} units, not {length}.*larger unit"):
        tok.length_id(length)


def test_decoding_drops_pads_and_refuses_every_other_tag(tok):
    ids = tok.encode("the otter")
    assert tok.decode([tok.pad, *ids, tok.pad, tok.pad]) == "the otter"
    for i in [*range(tok.pad + 1, tok.vocab_size), tok.vocab_size, -1]:
        with pytest.raises(ValueError, match=f"token {i} is .*, not text"):
            tok.decode([*ids, i])


def test_half_a_character_is_decoded_as_a_replacement_and_not_an_error(tok):
    assert tok.decode([tok.tokens.index(b"\xf0")]) == "\ufffd"


def test_the_planned_length_is_the_fewest_units_that_hold_a_text(tok):
    rng = random.Random(6)
    for text in ["", "otter", *(random_text(rng) for _ in range(200))]:
        n, units = len(tok.encode(text)), tok.units(text)
        assert units >= 1 and units * tok.unit >= n
        assert units == 1 or (units - 1) * tok.unit < n
    assert [tok.units(" ".join(["otter"] * n)) for n in (1, 4, 5, 8, 9)] == [1, 1, 2, 2, 3]  # unit = 4


def test_a_tokenizer_reads_back_from_json(tok, tmp_path):
    path = tmp_path / "tokenizer.json"
    path.write_text(tok.to_json())
    for copy in [Tokenizer.from_json(tok.to_json()), Tokenizer.load(path), Tokenizer.load(str(path))]:
        assert (copy.tokens, copy.unit, copy.vocab_size) == (tok.tokens, 4, tok.vocab_size)
        assert copy.to_json() == tok.to_json()
        assert copy.encode(CORPUS[0]) == tok.encode(CORPUS[0])


def test_a_vocabulary_too_small_for_bytes_tags_and_lengths_is_an_error():
    assert Tokenizer.train(CORPUS, OVERHEAD).vocab_size == OVERHEAD
    with pytest.raises(ValueError, match=f"vocab_size {OVERHEAD - 1} is too small.*{OVERHEAD}"):
        Tokenizer.train(CORPUS, OVERHEAD - 1)


@pytest.mark.parametrize(
    "broken",
    [
        "", "{", "null", "5", "[]", "{}", '{"unit": 4}', '{"tokens": ["Og=="]}', '{"unit": 4, "tokens": 5}',
        '{"unit": 4, "tokens": []}', '{"unit": 4, "tokens": [1, 2]}', '{"unit": 4, "tokens": ["O"]}',
        '{"unit": 4, "tokens": ["Og=="]}',  # a colon and no other byte
    ],
)  # fmt: skip
def test_a_broken_tokenizer_file_is_an_error_that_names_the_file(tmp_path, broken):
    path = tmp_path / "tokenizer.json"
    path.write_text(broken)
    with pytest.raises(ValueError, match="tokenizer.json is not a tokenizer.*prepare.py"):
        Tokenizer.load(path)


@pytest.mark.parametrize("unit", [0, -1, 2.5, "4", None])
def test_a_tokenizer_file_with_an_impossible_unit_is_an_error(tok, tmp_path, unit):
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps({**json.loads(tok.to_json()), "unit": unit}))
    with pytest.raises(ValueError, match="tokenizer.json is not a tokenizer"):
        Tokenizer.load(path)


# ---------------------------------------------------------------- grammar

SCALES = [0.5, 0.75, 1.0, 1.25, 2.0]
KINDS = ["text", "topic", "length", "topic_end", "sync", "eos"]

# Section 2 of the specification with a letter a token: a wordy text token, w other text, T <topic>, L a length,
# C </topic>, S <sync/>, E <eos>. The spans of a round are no tokens of the plan.
TOPIC_LETTERS = f"Ta[aw]{{0,{MAX_NAME - 1}}}LC"
ANSWER_LETTERS = regex.compile(f"([aw]*({TOPIC_LETTERS})*S)*[aw]*({TOPIC_LETTERS})*E")


@pytest.fixture(scope="module", params=[2, 10], ids="unit {}".format)
def planner(request):
    return Tokenizer.train(CORPUS, OVERHEAD + 60, unit=request.param)


def kind_of(tok, token):
    if token < tok.pad:
        return "text"
    if tok.eos < token < tok.vocab_size:
        return "length"
    return {tok.topic: "topic", tok.topic_end: "topic_end", tok.sync: "sync", tok.eos: "eos"}.get(token, "never")


def letters(tok, tokens):
    kinds = {"topic": "T", "length": "L", "topic_end": "C", "sync": "S", "eos": "E", "never": "!"}
    wordy = [bool(re.search(rb"[A-Za-z0-9]", token)) for token in tok.tokens]
    return "".join("wa"[wordy[t]] if t < tok.pad else kinds[kind_of(tok, t)] for t in tokens)


def slots(tok, length, scale):
    return max(1, math.ceil(Fraction(length * tok.unit) * Fraction(scale)))


def shortest_answer(tok, tokens, written, scale):
    """Positions of the shortest whole answer that begins with these tokens: plan, text, scaffolds and <eos>.

    `written`: the letters of the tokens.
    """
    positions = len(tokens) + (not written.endswith("E"))
    for topic in re.finditer("T([aw]*)(L?)(C?)", written):
        name = max(1, len(topic[1]))
        length = tok.length_of(tokens[topic.start(2)]) if topic[2] else 1
        positions += (name - len(topic[1])) + (not topic[2]) + (not topic[3])  # what the topic still lacks
        positions += 1 + name + 1 + slots(tok, length, scale) + 1  # <async> name : slots </async>
    return positions


def walk(grammar, choose, room):
    """Tokens that `choose` takes from the allowed ones, up to <eos>."""
    tokens = []
    while len(allowed := np.flatnonzero(grammar.allowed())):
        tokens.append(int(choose(allowed)))
        grammar.advance(tokens[-1])
        assert len(tokens) <= room
    assert grammar.forced() is None
    return tokens


def check_whole_answer(tok, tokens, room, scale):
    written = letters(tok, tokens)
    assert ANSWER_LETTERS.fullmatch(written), written
    assert shortest_answer(tok, tokens, written, scale) <= room


def any_token(rng, tok):
    return lambda allowed: rng.choice(allowed)


def any_kind(rng, tok):
    """Plans and rounds as often as text, of which there are many more tokens."""

    def choose(allowed):
        kinds = {}
        for token in allowed:
            kinds.setdefault(kind_of(tok, token), []).append(token)
        return rng.choice(kinds[rng.choice(sorted(kinds))])

    return choose


def rounds_of(tok, tokens, rng):
    """The answer that a sampler would build from a plan, whatever its spans come to hold."""
    rounds = []
    for part in " ".join(map(str, tokens[:-1])).split(str(tok.sync)):
        text, *topics = part.split(str(tok.topic))
        text = tok.decode(map(int, text.split()))
        spans = []
        for topic in topics:
            *name, length, close = map(int, topic.split())
            assert close == tok.topic_end
            spans.append(Span(tok.decode(name), hostile(rng), tok.length_of(length)))
        rounds.append(Round(text, tuple(spans)))
    return rounds


@pytest.mark.parametrize("choose", [any_token, any_kind])
@pytest.mark.parametrize("rooms", [(1, 60), (61, 300)], ids="rooms {}".format)
def test_every_walk_ends_fits_into_its_room_and_parses(planner, choose, rooms):
    rng = random.Random(7)
    with_plan = 0
    for _ in range(440 if rooms == (1, 60) else 60):
        room, scale = rng.randint(*rooms), rng.choice(SCALES)
        tokens = walk(Grammar(planner, room, scale), choose(rng, planner), room)
        check_whole_answer(planner, tokens, room, scale)
        rounds = rounds_of(planner, tokens, rng)
        assert parse_answer(format_answer(rounds)) == rounds
        with_plan += any(r.spans for r in rounds)
    assert with_plan > 10 or choose == any_token


@pytest.mark.parametrize("extreme", [min, max])
def test_no_preference_leads_a_walk_out_of_its_room(planner, extreme):
    """Every order of preference: always text, always another topic, the longest names, the longest lengths, ..."""
    rng = random.Random(8)
    free = [kind for kind in KINDS if kind not in ("topic_end", "eos")]  # those two are taken when they must be
    for order in itertools.permutations([*free, "eos"]):
        if order[0] == "eos":
            continue
        rank = {kind: i for i, kind in enumerate([*order, "topic_end"])}

        def choose(allowed):
            best = min(rank[kind_of(planner, token)] for token in allowed)
            return extreme(token for token in allowed if rank[kind_of(planner, token)] == best)

        room, scale = rng.choice([rng.randint(1, 60), rng.randint(30, 120)]), rng.choice(SCALES)
        check_whole_answer(planner, walk(Grammar(planner, room, scale), choose, room), room, scale)


def test_always_the_token_that_costs_the_most_room_still_fits(planner):
    for room, scale in itertools.product(range(1, 61), [0.5, 1.0, 2.0]):
        cost = {"topic": 2, "text": 1, "sync": 1, "topic_end": 1, "eos": 0}

        def positions(token):
            length = planner.length_of(token)
            return slots(planner, length, scale) if length else cost[kind_of(planner, token)]

        tokens = walk(Grammar(planner, room, scale), lambda allowed: max(allowed, key=positions), room)
        check_whole_answer(planner, tokens, room, scale)


@pytest.mark.parametrize("room", [-3, 0, 1])
def test_without_room_an_answer_is_its_end_alone(tok, room):
    grammar = Grammar(tok, room)
    assert grammar.forced() == tok.eos
    assert walk(grammar, any_token(random.Random(0), tok), 1) == [tok.eos]


def test_a_token_is_allowed_exactly_if_some_answer_that_fits_goes_on_with_it(planner):
    rng = random.Random(9)
    wordy = np.array([letter == "a" for letter in letters(planner, range(planner.pad))])
    candidates = [int(np.flatnonzero(wordy)[0]), int(np.flatnonzero(~wordy)[0]), *range(planner.pad, planner.vocab_size)]
    choosers = [any_kind(rng, planner)] * 3 + [lambda allowed: rng.choice([allowed[0], allowed[-1]])]
    for number in range(45):
        room, scale, choose = rng.randint(1, 90), rng.choice(SCALES), rng.choice(choosers)
        grammar, tokens, written = Grammar(planner, room, scale), [], ""
        while not written.endswith("E"):
            allowed = grammar.allowed()
            assert allowed.shape == (planner.vocab_size,) and allowed.dtype == bool
            for token, letter in zip(candidates, letters(planner, candidates)):
                legal = ANSWER_LETTERS.fullmatch(written + letter, partial=True)
                fits = shortest_answer(planner, [*tokens, token], written + letter, scale) <= room
                assert allowed[token] == bool(legal and fits), (written, planner.name(token), room, scale)
            text = allowed[: planner.pad]  # text tokens are alike but for the first of a name
            assert (text[wordy] == allowed[candidates[0]]).all() and (text[~wordy] == allowed[candidates[1]]).all()
            tokens.append(int(choose(np.flatnonzero(allowed))))
            written += letters(planner, tokens[-1:])
            grammar.advance(tokens[-1])


def test_the_smallest_room_for_a_topic():
    tok = Tokenizer.train(CORPUS, OVERHEAD, unit=10)
    # <topic> name 1 </topic>  <async> name : ten slots </async>  <eos>
    room = 4 + 3 + 10 + 1 + 1
    assert Grammar(tok, room).allowed()[tok.topic] and not Grammar(tok, room - 1).allowed()[tok.topic]
    assert Grammar(tok, room - 5, length_scale=0.5).allowed()[tok.topic]
    assert not Grammar(tok, room + 9, length_scale=2.0).allowed()[tok.topic]


def test_forced_is_given_exactly_when_one_token_is_allowed(planner):
    rng = random.Random(10)
    seen = Counter()
    for _ in range(60):
        grammar = Grammar(planner, rng.randint(1, 60), rng.choice(SCALES))
        choose = any_kind(rng, planner)
        while len(allowed := np.flatnonzero(grammar.allowed())):
            assert grammar.forced() == (allowed[0] if len(allowed) == 1 else None)
            seen[grammar.forced()] += 1
            grammar.advance(int(choose(allowed)))
    assert seen[None] and seen[planner.topic_end] and seen[planner.eos]


def test_after_a_length_the_end_of_the_topic_is_forced(planner):
    for length in range(1, MAX_LENGTH + 1):
        grammar = Grammar(planner, 5000)
        for token in [planner.topic, *planner.encode("top 5 tips"), planner.length_id(length)]:
            assert grammar.allowed()[token]
            grammar.advance(token)
        assert grammar.forced() == planner.topic_end


def test_a_name_has_a_longest_length_and_a_first_token_that_is_no_white_space(tok):
    grammar = Grammar(tok, 5000)
    grammar.advance(tok.topic)
    assert not grammar.allowed()[tok.encoding.encode_single_token(" ")]
    assert not grammar.allowed()[tok.length_id(1)]
    for _ in range(MAX_NAME):
        grammar.advance(tok.encode("otter")[0])
    assert [kind_of(tok, t) for t in np.flatnonzero(grammar.allowed())] == ["length"] * MAX_LENGTH


def test_an_autoregressive_answer_has_no_plan_and_no_rounds(tok):
    rng = random.Random(11)
    for room in [1, 2, 30, 500]:
        grammar, tokens = Grammar(tok, room, plans=False), []
        while len(allowed := np.flatnonzero(grammar.allowed())):
            assert {kind_of(tok, t) for t in allowed} == ({"text", "eos"} if len(tokens) < room - 1 else {"eos"})
            tokens.append(int(rng.choice(allowed)))
            grammar.advance(tokens[-1])
        assert len(tokens) <= room and regex.fullmatch("[aw]*E", letters(tok, tokens))


def test_a_span_has_length_times_unit_slots():
    for length, unit in itertools.product([1, 2, 3, MAX_LENGTH], [1, 4, 10]):
        assert span_slots(length, unit) == length * unit
    assert [span_slots(3, 5, scale) for scale in (0.5, 0.75, 1.25, 2.0)] == [8, 12, 19, 30]  # rounded up
    assert span_slots(1, 1, 0.01) == 1  # never without a slot
