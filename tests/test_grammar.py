"""The grammar of plans: whatever it allows parses and fits.

Two oracles are written here from the specification alone: the grammar as a regular expression over kinds of
tokens, and the length of the shortest answer that begins with given tokens.
"""

import itertools
import math
import random
import re
from collections import Counter
from fractions import Fraction

import numpy as np
import pytest
import regex
from conftest import CORPUS, OVERHEAD, hostile

from grammar import MAX_NAME, Grammar
from tags import Round, Span, format_answer, parse_answer
from tokenizer import MAX_LENGTH, Tokenizer, span_slots

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
    candidates = [int(np.flatnonzero(wordy)[0]), int(np.flatnonzero(~wordy)[0])]
    candidates += range(planner.pad, planner.vocab_size)
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
