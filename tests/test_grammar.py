"""The grammar of plans: whatever it allows parses and fits, and it allows whatever training accepts.

Oracles are written here from the specification alone: the grammar as a regular expression over kinds of tokens,
what makes a name blank, and the length of the shortest answer that begins with given tokens.
"""

import itertools
import math
import random
import re
import sys
from collections import Counter
from decimal import Decimal

import numpy as np
import pytest
import regex
from conftest import CORPUS, OVERHEAD, each, hostile

from grammar import MAX_NAME, WHITE_SPACE, Grammar
from tags import Round, Span, format_answer, parse_answer
from tokenizer import MAX_LENGTH, Tokenizer, span_slots

SCALES = [0.5, 0.75, 1.0, 1.25, 2.0]
KINDS = ["text", "topic", "length", "topic_end", "sync", "eos"]

# Section 2 of the specification with a letter per token: a text, T <topic>, L a length, C </topic>, S <sync/>, E <eos>.
# The spans of a round are no tokens of the plan.
TOPIC_LETTERS = f"Ta{{1,{MAX_NAME}}}LC"
ANSWER_LETTERS = regex.compile(f"(a*({TOPIC_LETTERS})*S)*a*({TOPIC_LETTERS})*E")
SPACES = [
    b" ",
    b"\n",
    b"\t ",
    b"\xc2\xa0",
    b"\xe3\x80\x80",
    b"\xc2",
    b"\xa0",
    b"\xe3",
    b"\xe3\x80",
    b"\x80",
    b"\xe2\x80",
]
PIECES = [b"e", b"\xd0", b"\xd0\xbc", b"\xc3\xa9", b"\xef\xbf", b"\xf0\x9f", b'"', b"#", b" \xe9\xa3\x9f"]
MERGES = [token for token in SPACES + PIECES if len(token) > 1]


@pytest.fixture(scope="module", params=[2, 10], ids="unit {}".format)
def planner(request):
    return Tokenizer.train(CORPUS, OVERHEAD + 60, unit=request.param)


@pytest.fixture(scope="module")
def spacy():
    """A tokenizer with tokens that are white space, or pieces of characters that may become white space or not."""
    return Tokenizer([bytes([b]) for b in range(256)] + MERGES, unit=2)


def kind_of(tok, token):
    if token < tok.pad:
        return "text"
    if tok.eos < token < tok.vocab_size:
        return "length"
    return {tok.topic: "topic", tok.topic_end: "topic_end", tok.sync: "sync", tok.eos: "eos"}.get(token, "never")


def letters(tok, tokens):
    kinds = {"text": "a", "topic": "T", "length": "L", "topic_end": "C", "sync": "S", "eos": "E", "never": "!"}
    return "".join(kinds[kind_of(tok, token)] for token in tokens)


def is_blank(tok, name):
    return not b"".join(tok.tokens[token] for token in name).decode(errors="replace").strip()


def slots(tok, length, scale):
    return max(1, math.ceil(Decimal(int(length) * tok.unit) * Decimal(repr(scale))))


def shortest_answer(tok, tokens, written, scale):
    """Positions of the shortest whole answer that begins with these tokens: plan, text, scaffolds and <eos>.

    `written`: the letters of the tokens. Infinite if there is none, because a name is blank or too long.
    """
    positions = len(tokens) + (not written.endswith("E"))
    for topic in re.finditer("T(a*)(L?)(C?)", written):
        blank = is_blank(tok, tokens[topic.start(1) : topic.end(1)])
        name = len(topic[1]) + (blank and not topic[2])  # one more token always makes a name of a blank one
        if blank and topic[2] or name > MAX_NAME:
            return math.inf
        length = tok.length_of(tokens[topic.start(2)]) if topic[2] else 1
        positions += (name - len(topic[1])) + (not topic[2]) + (not topic[3])  # what the topic still lacks
        positions += 1 + name + 1 + slots(tok, length, scale) + 1  # <async> name : slots </async>
    return positions


def walk(grammar, choose, positions):
    """Tokens that `choose` takes from the allowed ones, up to <eos>."""
    tokens = []
    while len(allowed := np.flatnonzero(grammar.allowed())):
        tokens.append(int(choose(allowed)))
        grammar.advance(tokens[-1])
        assert len(tokens) <= positions
    assert grammar.forced() is None and grammar.done
    return tokens


def check_whole_answer(tok, tokens, positions, scale):
    written = letters(tok, tokens)
    assert ANSWER_LETTERS.fullmatch(written), written
    assert shortest_answer(tok, tokens, written, scale) <= positions


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


def test_every_walk_ends_fits_and_parses(planner):
    for choose, (least, most) in each(itertools.product([any_token, any_kind], [(1, 60), (61, 300)])):
        rng = random.Random(7)
        with_plan = 0
        for _ in range(440 if most == 60 else 60):
            positions, scale = rng.randint(least, most), rng.choice(SCALES)
            tokens = walk(Grammar(planner, positions, scale), choose(rng, planner), positions)
            check_whole_answer(planner, tokens, positions, scale)
            rounds = rounds_of(planner, tokens, rng)
            assert parse_answer(format_answer(rounds)) == rounds
            with_plan += any(r.spans for r in rounds)
        assert with_plan > 10 or choose == any_token


def test_no_preference_leads_a_walk_out_of_its_positions(planner):
    """Every order of preference: always text, always another topic, the longest names, the longest lengths, ..."""
    for extreme in each([min, max]):
        rng = random.Random(8)
        free = [kind for kind in KINDS if kind not in ("topic_end", "eos")]  # those two are taken when they must be
        for order in itertools.permutations([*free, "eos"]):
            if order[0] == "eos":
                continue
            rank = {kind: i for i, kind in enumerate([*order, "topic_end"])}

            def choose(allowed):
                best = min(rank[kind_of(planner, token)] for token in allowed)
                return extreme(token for token in allowed if rank[kind_of(planner, token)] == best)

            positions, scale = rng.choice([rng.randint(1, 60), rng.randint(30, 120)]), rng.choice(SCALES)
            check_whole_answer(planner, walk(Grammar(planner, positions, scale), choose, positions), positions, scale)


def test_always_the_token_that_costs_the_most_positions_still_fits(planner):
    for positions, scale in itertools.product(range(1, 61), [0.5, 1.0, 2.0]):
        cost = {"topic": 2, "text": 1, "sync": 1, "topic_end": 1, "eos": 0}

        def cost_of(token):
            length = planner.length_of(token)
            return slots(planner, length, scale) if length else cost[kind_of(planner, token)]

        tokens = walk(Grammar(planner, positions, scale), lambda allowed: max(allowed, key=cost_of), positions)
        check_whole_answer(planner, tokens, positions, scale)


def test_without_positions_an_answer_is_its_end_alone(tok):
    for positions in each([-3, 0, 1]):
        grammar = Grammar(tok, positions)
        assert grammar.forced() == tok.eos
        assert walk(grammar, any_token(random.Random(0), tok), 1) == [tok.eos]


def check_every_choice(tok, rng, choosers, candidates, walks, longest):
    """Along walks: each candidate is allowed exactly if some answer that fits goes on with it."""
    for _ in range(walks):
        positions, scale, choose = rng.randint(1, longest), rng.choice(SCALES), rng.choice(choosers)
        grammar, tokens, written = Grammar(tok, positions, scale), [], ""
        while not written.endswith("E"):
            allowed = grammar.allowed()
            assert allowed.shape == (tok.vocab_size,) and allowed.dtype == bool
            for token, letter in zip(candidates, letters(tok, candidates)):
                legal = ANSWER_LETTERS.fullmatch(written + letter, partial=True)
                fits = shortest_answer(tok, [*tokens, token], written + letter, scale) <= positions
                assert allowed[token] == bool(legal and fits), (written, tokens, tok.name(token), positions, scale)
            tokens.append(int(choose(np.flatnonzero(allowed))))
            written += letters(tok, tokens[-1:])
            grammar.advance(tokens[-1])


def test_a_token_is_allowed_exactly_if_some_answer_that_fits_goes_on_with_it(planner):
    rng = random.Random(9)
    candidates = [planner.tokens.index(b"a"), planner.tokens.index(b" "), *range(planner.pad, planner.vocab_size)]
    choosers = [any_kind(rng, planner)] * 3 + [lambda allowed: rng.choice([allowed[0], allowed[-1]])]
    check_every_choice(planner, rng, choosers, candidates, walks=45, longest=90)


def test_so_it_is_in_names_of_white_space_and_pieces_of_characters(spacy):
    rng = random.Random(12)
    some = [spacy.tokens.index(token) for token in SPACES + PIECES if token in spacy.tokens]
    candidates = [*some, spacy.topic, spacy.length_id(1), spacy.length_id(3), spacy.eos]

    def spaces(allowed):
        """Names, and in them white space as long as it is allowed."""
        best = [t for t in allowed if t in some[: len(SPACES)]] if spacy.topic not in allowed else [spacy.topic]
        return rng.choice(best if best and rng.random() < 0.8 else [t for t in allowed if t in candidates] or allowed)

    check_every_choice(spacy, rng, [spaces], candidates, walks=120, longest=60)
    check_every_choice(spacy, rng, [spaces], candidates, walks=6, longest=400)


def test_white_space_is_what_python_calls_so():
    assert WHITE_SPACE == [chr(i).encode() for i in range(sys.maxunicode + 1) if chr(i).isspace()]


def test_the_fewest_positions_for_a_topic():
    tok = Tokenizer.train(CORPUS, OVERHEAD, unit=10)
    # <topic> name 1 </topic>  <async> name : ten slots </async>  <eos>
    positions = 4 + 3 + 10 + 1 + 1
    assert Grammar(tok, positions).allowed()[tok.topic] and not Grammar(tok, positions - 1).allowed()[tok.topic]
    assert Grammar(tok, positions - 5, length_scale=0.5).allowed()[tok.topic]
    assert not Grammar(tok, positions + 9, length_scale=2.0).allowed()[tok.topic]


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


def test_a_name_has_a_longest_length_and_is_not_blank(tok):
    grammar = Grammar(tok, 5000)
    grammar.advance(tok.topic)
    space, otter = tok.encoding.encode_single_token(" "), tok.encode("otter")[0]
    for _ in range(MAX_NAME - 1):
        assert grammar.allowed()[otter] and grammar.allowed()[space] and not grammar.allowed()[tok.length_id(1)]
        grammar.advance(space)
    assert grammar.allowed()[otter] and not grammar.allowed()[space]
    grammar.advance(otter)
    assert [kind_of(tok, t) for t in np.flatnonzero(grammar.allowed())] == ["length"] * MAX_LENGTH


NAMES = ["место", "école", "食物", '"quoted"', "#1", "-", "\u200b", "🦦", "\ufeff", "٣", "<eos>", "\\", "a\nb", "\x00"]


def takes(tok, name):
    """Whether the grammar takes a topic of this name, token by token."""
    grammar = Grammar(tok, 5000)
    tokens = [tok.topic, *tok.encode(name), tok.length_id(1), tok.topic_end]
    return all(grammar.allowed()[token] and (grammar.advance(token) or True) for token in tokens)


def test_a_topic_may_begin_with_anything_but_white_space(tok):
    for name in each(NAMES):
        assert takes(tok, name)


def test_the_grammar_takes_exactly_the_topics_that_training_accepts(tok, spacy):
    rng, outcomes = random.Random(13), Counter()
    for _ in range(1500):
        name = (
            rng.choice(["", " ", "\u3000", "x"]) + hostile(rng, rng.choice([0, 1, 2, 6, 30])) + rng.choice(["", "\n"])
        )
        for tokenizer in (tok, spacy):
            try:
                tokenizer.encode_span(Span(name, "fish", 5))
                accepted = True
            except ValueError as error:
                assert f"1 to {MAX_NAME} tokens" in str(error)
                accepted = False
            assert accepted == (bool(name.strip()) and len(tokenizer.encode(name)) <= MAX_NAME)
            assert accepted == takes(tokenizer, name)
            outcomes[accepted, bool(name.strip())] += 1
    assert len(outcomes) == 3 and min(outcomes.values()) > 20  # accepted, too long, blank


def test_every_walk_through_white_space_and_pieces_of_characters_fits_and_parses(spacy):
    rng, names = random.Random(14), set()
    some = {spacy.tokens.index(token) for token in SPACES + PIECES if token in spacy.tokens}
    for _ in range(500):
        positions, scale, kind = rng.randint(1, 80), rng.choice(SCALES), any_kind(rng, spacy)
        tokens = walk(Grammar(spacy, positions, scale), lambda allowed: kind([t for t in allowed if t in some or
                      t >= spacy.pad] or allowed), positions)  # fmt: skip
        check_whole_answer(spacy, tokens, positions, scale)
        rounds = rounds_of(spacy, tokens, rng)
        assert parse_answer(format_answer(rounds)) == rounds
        names |= {span.topic for r in rounds for span in r.spans}
    assert len(names) > 50 and "\ufffd" in "".join(names)


def test_a_token_that_is_not_allowed_is_refused_and_changes_nothing(tok):
    grammar = Grammar(tok, 30)
    grammar.advance(tok.topic)
    before = grammar.allowed().copy()
    for token in np.flatnonzero(~before):
        with pytest.raises(ValueError, match="the grammar does not allow"):
            grammar.advance(int(token))
    assert (grammar.allowed() == before).all() and grammar.positions_left == 29


def test_a_copy_goes_its_own_way(planner):
    rng, seen = random.Random(15), Counter()
    for _ in range(40):
        grammar, choose = Grammar(planner, rng.randint(20, 80), rng.choice(SCALES)), any_kind(rng, planner)
        for _ in range(rng.randint(0, 8)):
            if not grammar.done:
                grammar.advance(int(choose(np.flatnonzero(grammar.allowed()))))
        other, twin, allowed = grammar.copy(), grammar.copy(), grammar.allowed().copy()
        walk(other, choose, 100)
        assert (grammar.allowed() == allowed).all() and (twin.allowed() == allowed).all()
        seen[grammar.state] += 1
        random_state = rng.getstate()
        rest = walk(grammar, choose, 100)
        rng.setstate(random_state)
        assert walk(twin, choose, 100) == rest
    assert {"text", "name"} <= set(seen)


def test_done_is_said_after_the_end_alone(planner):
    grammar = Grammar(planner, 50)
    for token in [planner.encode("otter")[0], planner.sync, planner.eos]:
        assert not grammar.done
        grammar.advance(token)
    assert grammar.done and not grammar.allowed().any()


def test_the_mask_is_made_once_per_token(planner, monkeypatch):
    calls, mask = [], Grammar._mask
    monkeypatch.setattr(Grammar, "_mask", lambda self: calls.append(1) or mask(self))
    grammar = Grammar(planner, 40)
    for token in [planner.topic, planner.encode("otter")[0], planner.length_id(1), planner.topic_end, planner.eos]:
        calls.clear()
        grammar.forced(), grammar.allowed(), grammar.copy().allowed()
        grammar.advance(token)
        assert len(calls) == 1


def test_an_autoregressive_answer_has_no_plan_and_no_rounds(tok):
    rng = random.Random(11)
    for positions in [1, 2, 30, 500]:
        grammar, tokens = Grammar(tok, positions, plans=False), []
        while len(allowed := np.flatnonzero(grammar.allowed())):
            assert {kind_of(tok, t) for t in allowed} == ({"text", "eos"} if len(tokens) < positions - 1 else {"eos"})
            tokens.append(int(rng.choice(allowed)))
            grammar.advance(tokens[-1])
        assert len(tokens) <= positions and regex.fullmatch("a*E", letters(tok, tokens))


def test_a_span_has_length_times_unit_slots():
    for length, unit in itertools.product([1, 2, 3, MAX_LENGTH], [1, 4, 10]):
        assert span_slots(length, unit) == length * unit
    assert [span_slots(3, 5, scale) for scale in (0.5, 0.75, 1.25, 2.0)] == [8, 12, 19, 30]  # rounded up
    assert span_slots(1, 1, 0.01) == 1  # never without a slot


def test_a_scale_is_the_decimal_number_that_was_typed():
    assert span_slots(5, 10, 1.1) == 55  # 50 * 1.1 is 55.00000000000001 in floating point
    for percent, length, unit in itertools.product(range(1, 300), [1, 5, 7, MAX_LENGTH], [1, 3, 10]):
        assert span_slots(length, unit, percent / 100) == max(1, -(-length * unit * percent // 100))
