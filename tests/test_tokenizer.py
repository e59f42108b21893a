"""The tokenizer, against a byte-pair trainer that recounts everything after each merge."""

import json
import random
import time
from collections import Counter

import pytest
import regex
from conftest import BYTES, CORPUS, NASTY, OVERHEAD, each, hostile

from tags import ASSISTANT, ASYNC, ASYNC_END, EOS, MASK, PAD, SYNC, TAGS, TOPIC, TOPIC_END, USER, Span
from tokenizer import MAX_LENGTH, MAX_UNIT, Tokenizer, learn_pairs


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


def test_training_agrees_with_a_trainer_that_recounts_everything():
    for merges in each([0, 1, 20, 60]):
        trained = Tokenizer.train(CORPUS, OVERHEAD + merges)
        learned = naive_byte_pairs(CORPUS, merges)
        assert len(learned) == merges
        assert trained.tokens == list(dict.fromkeys(BYTES + learned))


def test_training_agrees_on_texts_full_of_ties_and_overlaps():
    for seed in each(range(4)):
        rng = random.Random(seed)
        texts = [" ".join("".join(rng.choices("ab", k=rng.randint(1, 12))) for _ in range(40)) for _ in range(5)]
        texts.append("".join(rng.choices("ab ", weights=[9, 9, 0.1], k=400)))  # long words
        learned = naive_byte_pairs(texts, 150)
        assert len(learned) > 60
        assert Tokenizer.train(texts, OVERHEAD + 150).tokens == list(dict.fromkeys(BYTES + learned))


def test_learning_takes_time_linear_in_the_longest_word():
    def seconds(n):
        word, start = "".join(random.Random(0).choices("abcdefgh", k=n)), time.process_time()
        learn_pairs({word: 1}, 10**6)
        return time.process_time() - start

    assert min(seconds(16_000) for _ in range(3)) < 9 * min(seconds(4_000) for _ in range(3))


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


def test_lines_and_their_indentation_survive(tok):
    for text in each(["a\nb", "a\n\nb", "a\n b", "a \n b", "a\n  b\n\n  c", "a\r\nb", "a\n\tb"]):
        assert tok.decode(tok.encode(text)) == text


def test_a_word_is_the_same_tokens_wherever_it_stands(tok):
    word = tok.encode("otter")
    assert tok.encode("otter otter") == word + word
    assert tok.encode("otter\notter") == word + [tok.tokens.index(b"\n")] + word
    assert tok.encode("  otter\n") == word


def test_a_million_spaces_are_text_as_any_other(tok):
    for text in each(
        [f"a{' ' * 1_000_000}b", "a" + "\n" * 500_000 + "b", "a" + " \t" * 500_000 + "b" + " " * 100_000 + "c"]
    ):
        assert tok.decode(tok.encode(text)) == text


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


def test_a_length_that_no_plan_can_ask_for_is_an_error(tok):
    for length in each([-1, 0, MAX_LENGTH + 1, 1000]):
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
    with pytest.raises(ValueError, match=f"vocab_size {OVERHEAD - 1}: expected .* at least {OVERHEAD}"):
        Tokenizer.train(CORPUS, OVERHEAD - 1)
    for odd in ["2048", 2048.0, None, True]:
        with pytest.raises(ValueError, match="vocab_size .*: expected a whole number"):
            Tokenizer.train(CORPUS, odd)


def test_an_impossible_unit_is_an_error():
    for unit in each([0, -1, 1.5, "4", None, True, MAX_UNIT + 1, float("nan")]):
        for make in (lambda: Tokenizer(BYTES, unit), lambda: Tokenizer.train(CORPUS, OVERHEAD, unit)):
            with pytest.raises(ValueError, match=f"unit .*: expected a whole number of tokens, 1 to {MAX_UNIT}"):
                make()


def test_training_learns_the_words_that_encoding_meets():
    """White space at the ends does not count, and a line's first word is the word it is inside a sentence."""
    plain = Tokenizer.train([" otter otter", "fish fish fish"], 2000)
    assert {b" otter", b" fish"} < set(plain.tokens)
    for texts in (["otter\notter", "fish\nfish\nfish"], ["  otter otter\n", "\n\tfish fish fish "]):
        assert Tokenizer.train(texts, 2000).tokens == plain.tokens
    lines = Tokenizer.train(["otter\n\n\notter\n\n\n\notter", "\n \n"], 2000)
    assert lines.encode("otter\notter")[::2] == [lines.tokens.index(b" otter")] * 2


# ---------------------------------------------------------------- spans


def test_a_span_is_its_topic_and_its_slots_up_to_the_planned_length(tok):
    topic, slots = tok.encode_span(Span("food", "otter otter", 2))
    assert topic == tok.encode("food") and len(slots) == 2 * tok.unit
    assert slots == tok.encode("otter otter") + [tok.pad] * (2 * tok.unit - len(tok.encode("otter otter")))
    assert tok.encode_span(Span("food", "", 1))[1] == [tok.pad] * tok.unit


def test_a_span_that_no_plan_can_ask_for_is_an_error_that_names_its_topic(tok):
    for span, said in each(
        [
            (Span("", "fish", 9), "must have 1 to 64 tokens, not 0"),
            (Span(" \u3000\n", "fish", 9), "must have 1 to 64 tokens, not 0"),
            (Span("🍎" * 22, "fish", 9), r"must have 1 to 64 tokens, not \d\d"),
            (Span("food", "fish", 0), "must be 1 to 64 units, not 0"),
            (Span("food", "fish", 65), "must be 1 to 64 units, not 65: .*larger unit"),
            (Span("food", "fish " * 20, 2), r"has 20 tokens, its plan only 8 \(2 x 4\)"),
        ]
    ):
        with pytest.raises(ValueError, match=said) as error:
            tok.encode_span(span)
        assert str(error.value).startswith(f"topic {span.topic[:60]!r}: ")


# ---------------------------------------------------------------- files


BROKEN = [
        "", "{", "null", "5", "[]", "{}", '{"unit": 4}', '{"tokens": ["Og=="]}', '{"unit": 4, "tokens": 5}',
        '{"unit": 4, "tokens": []}', '{"unit": 4, "tokens": [1, 2]}', '{"unit": 4, "tokens": ["O"]}',
        '{"unit": 4, "tokens": ["Og=="]}',  # a colon and no other byte
        "[" * 200_000, '{"unit": ' + "9" * 5000 + "}", '{"unit": NaN, "tokens": []}', '\ufeff{"unit": 4}', "\x00",
    ]  # fmt: skip


def test_a_broken_tokenizer_file_is_an_error_that_names_the_file(fresh):
    for broken in each(BROKEN):
        tmp_path = fresh()
        path = tmp_path / "tokenizer.json"
        path.write_text(broken, encoding="utf-8")
        with pytest.raises(ValueError, match="tokenizer.json is not a tokenizer.*prepare.py") as error:
            Tokenizer.load(path)
        assert len(str(error.value).splitlines()) == 1 and len(str(error.value)) < 400


def test_a_tokenizer_file_with_impossible_tokens_is_an_error(tok, fresh):
    for change in each(
        [
            lambda tokens: [*tokens, ""],  # no bytes
            lambda tokens: [*tokens, tokens[65]],  # one twice
            lambda tokens: tokens[1:],
            lambda tokens: [*tokens, "YWJjZGVm!"],  # not base64, though a lenient reader takes it
            lambda tokens: [*tokens, None],
        ]
    ):
        tmp_path = fresh()
        path, saved = tmp_path / "tokenizer.json", json.loads(tok.to_json())
        path.write_text(json.dumps({**saved, "tokens": change(saved["tokens"])}))
        with pytest.raises(ValueError, match="tokenizer.json is not a tokenizer"):
            Tokenizer.load(path)


def test_a_damaged_tokenizer_file_loads_or_says_why(tok, tmp_path):
    rng, path, whole = random.Random(7), tmp_path / "tokenizer.json", tok.to_json().encode()
    for _ in range(300):
        damaged, at = bytearray(whole), rng.randrange(len(whole))
        damaged[at : at + rng.choice([0, 1, 1, 5, 500])] = rng.choice(
            [b"", b"[", b'"', b"\xff", b"NaN", b"1e999", b"{}"]
        )
        path.write_bytes(damaged)
        try:
            Tokenizer.load(path)
        except ValueError as error:
            assert str(error).startswith(f"{path} is not a tokenizer (")


def test_a_tokenizer_file_with_an_impossible_unit_is_an_error(tok, fresh):
    for unit in each([0, -1, 2.5, "4", None]):
        tmp_path = fresh()
        path = tmp_path / "tokenizer.json"
        path.write_text(json.dumps({**json.loads(tok.to_json()), "unit": unit}))
        with pytest.raises(ValueError, match="tokenizer.json is not a tokenizer"):
            Tokenizer.load(path)
