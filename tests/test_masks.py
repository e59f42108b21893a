"""Layout, mask, noise and targets, against the sentences that specify them.

Everything expected here is worked out from the tags in a token sequence alone: never from the
columns of a `Layout`.
"""

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from conftest import OTTER, random_example

from data import Example
from masks import (
    ATTENTION,
    GIVEN,
    IGNORE,
    PLAN,
    PROMPT,
    SLOT,
    Layout,
    Sequence,
    encode_example,
    make_batch,
    visible,
)
from tags import Round, Span

# ---------------------------------------------------------------- the tags, read once more


@dataclass(frozen=True)
class Place:
    """What the tags say about one token; `span` is its number within the round, None outside spans."""

    i: int
    name: str
    part: str  # "prompt", "outside" (plan or text) or "span"
    round: int
    span: int = None
    content: bool = False  # a slot: between the scaffold's `<async> topic:` and `</async>`

    def with_sibling(self, other):
        return self.part == other.part == "span" and self.round == other.round and self.span != other.span

    def same_span(self, other):
        return self.part == other.part == "span" and self.round == other.round and self.span == other.span


def read_tags(tokens, tokenizer):
    """Walk a token sequence from tag to tag. Returns a `Place` a token."""
    places, part, round_, span, start, topics = [], "prompt", 0, -1, 0, []
    for i, name in enumerate(tokenizer.name(int(token)) for token in tokens):
        if name == "<sync/>":
            round_, span, topics = round_ + 1, -1, []
        elif name == "<topic>":
            topics.append([])
        elif name == "<async>":
            part, span, start = "span", span + 1, i
        elif part == "outside" and topics and name != "</topic>":
            topics[-1].append(name)  # the topic's name and its length
        inside = part == "span"
        # the scaffold's head is <async>, the topic's name and a colon: as many tokens as name and length, and one more
        content = inside and i - start > len(topics[span]) and name != "</async>"
        places.append(Place(i, name, part, round_, span if inside else None, content))
        if name in ("<assistant>", "</async>"):
            part = "outside"
    return places


def sees(query, key, attention):
    """Whether a token sees another, by the written sentences (method, section 3)."""
    earlier_round = key.round < query.round
    own_plan = key.round == query.round and key.part != "span" and key.name != "<eos>"
    if query.part != "span":
        round_is_over = query.name == "<eos>"
        return earlier_round or (own_plan and key.i <= query.i) or round_is_over
    own_span = query.same_span(key) and (attention != "causal" or key.i <= query.i)
    sibling = attention == "dense" and query.with_sibling(key)
    return earlier_round or own_plan or own_span or sibling


def oracle_mask(places, attention):
    return np.array([[sees(query, key, attention) for key in places] for query in places])


def oracle_target(places, tokens):
    """The next token outside spans, from the prompt's last token on."""
    target = [IGNORE] * len(places)
    for place in places:
        if place.part == "outside" or place.name == "<assistant>":
            following = [later.i for later in places[place.i + 1 :] if later.part == "outside"]
            target[place.i] = int(tokens[following[0]]) if following else IGNORE
    return target


def mask_of(layout):
    see = torch.tensor([layout.prefix, layout.begin, layout.end]).T
    return visible(see[None], len(layout))[0].numpy()


def laid_out(example, tokenizer, attention):
    """Layout, mask and what the tags say of an example."""
    layout = encode_example(example, tokenizer, attention)
    return layout, mask_of(layout), read_tags(layout.token, tokenizer)


def pairs(mask, places, query, key):
    """The mask's entries for queries and keys that the two conditions pick; never none."""
    picked = [mask[q.i, k.i] for q in places if query(q) for k in places if key(q, k)]
    assert picked
    return np.array(picked)


# ---------------------------------------------------------------- layout


def test_the_layout_writes_prompt_plan_scaffold_and_next_round_as_specified(tokenizer):
    example = Example("Tell", (Round("", (Span("food", "fish", 2), Span("top 5 tips", "", 1))), Round("In short")))
    names = [tokenizer.name(i) for i in encode_example(example, tokenizer).token]
    fish = len(tokenizer.encode("fish"))
    assert "".join(names) == (
        "<user> Tell<assistant><topic> food 2</topic><topic> top 5 tips 1</topic>"
        "<async> food: fish" + "[PAD]" * (8 - fish) + "</async><async> top 5 tips:" + "[PAD]" * 4 + "</async>"
        "<sync/> In short<eos>"
    )


def test_the_kind_of_each_token_is_what_the_tags_say(tokenizer):
    for seed in range(50):
        layout, _, places = laid_out(random_example(seed, tokenizer), tokenizer, "sparse")
        kind = {"prompt": PROMPT, "outside": PLAN}
        assert layout.kind == [kind.get(p.part, SLOT if p.content else GIVEN) for p in places]
        assert layout.round == [p.round for p in places]
        assert layout.span == [-1 if p.span is None else p.span for p in places]
        assert layout.position == list(range(len(places)))


def test_the_scaffold_is_given_tags_and_topic(tokenizer):
    layout, _, places = laid_out(OTTER, tokenizer, "sparse")
    for span in {(p.round, p.span) for p in places if p.part == "span"}:
        mine = [p for p in places if (p.round, p.span) == span]
        topic = OTTER.rounds[span[0]].spans[span[1]].topic
        given = [layout.token[p.i] for p in mine if layout.kind[p.i] == GIVEN]
        assert given == [tokenizer.async_, *tokenizer.encode(topic), tokenizer.colon, tokenizer.async_end]


def test_planned_length_is_number_times_unit_always(tokenizer):
    for seed in range(50):
        layout, _, places = laid_out(random_example(seed, tokenizer), tokenizer, "sparse")
        for round_ in range(places[-1].round + 1):
            plan = [layout.token[p.i] for p in places if p.round == round_ and p.part == "outside"]
            planned = [tokenizer.length_of(i) for i in plan if tokenizer.length_of(i)]
            slots = [sum(p.content for p in places if (p.round, p.span) == (round_, n)) for n in range(len(planned))]
            assert slots == [number * tokenizer.unit for number in planned]


def test_a_span_longer_than_planned_is_an_error_that_names_it(tokenizer):
    example = Example("Tell me", (Round("", (Span("habitat", "Rivers and coasts, lakes and marshes", 1),)),))
    slots = len(tokenizer.encode("Rivers and coasts, lakes and marshes"))
    with pytest.raises(ValueError, match=rf"'habitat'.*'Tell me'.*{slots} tokens.*only 4 \(1 x 4\)"):
        encode_example(example, tokenizer)


def test_a_span_that_fills_its_plan_has_no_pads_and_one_token_more_is_an_error(tokenizer):
    fish = "fish " * 2 * tokenizer.unit
    while len(tokenizer.encode(fish)) > 2 * tokenizer.unit:
        fish = fish[:-1]
    layout = encode_example(Example("", (Round("", (Span("food", fish, 2),)),)), tokenizer)
    assert layout.kind.count(SLOT) == 2 * tokenizer.unit and tokenizer.pad not in layout.token
    with pytest.raises(ValueError, match="food"):
        encode_example(Example("", (Round("", (Span("food", fish + "!", 2),)),)), tokenizer)


@pytest.mark.parametrize("attention", ATTENTION)
def test_written_token_by_token_as_the_sampler_does_it_is_the_same_layout(tokenizer, attention):
    for seed in range(40):
        whole, _, places = laid_out(random_example(seed, tokenizer), tokenizer, attention)
        grown = Layout(attention)
        grown.write([whole.token[p.i] for p in places if p.part == "prompt"], PROMPT, 0)
        while len(grown) < len(whole):
            place = places[len(grown)]
            if place.part == "outside":
                grown.write([whole.token[place.i]], PLAN, place.round)
            else:
                scaffold_and_fill(grown, whole, places, tokenizer)
        assert grown == whole


def scaffold_and_fill(grown, whole, places, tokenizer):
    """Append the [MASK] scaffold of the next round's spans, then fill it with the finished tokens."""
    start, round_ = len(grown), places[len(grown)].round
    inside = [p for p in places if p.round == round_ and p.part == "span"]
    masked, expected = [], []
    for number in range(inside[-1].span + 1):
        mine = [p for p in inside if p.span == number]
        head = [whole.token[p.i] for p in mine[1:-1] if not p.content]
        masked.append((head[:-1], [tokenizer.mask] * sum(p.content for p in mine)))
        expected.append((mine[0].i, mine[-1].i + 1))
    assert grown.scaffold(masked, tokenizer, round_) == expected
    for p in inside:
        assert whole.token[p.i] == grown.token[p.i] or (p.content and grown.token[p.i] == tokenizer.mask)
    grown.token[start:] = whole.token[start : len(grown)]


# ---------------------------------------------------------------- the mask


@pytest.mark.parametrize("attention", ATTENTION)
def test_three_integers_a_token_are_the_dense_mask_of_the_written_sentences(tokenizer, attention):
    for seed in range(70):
        _, mask, places = laid_out(random_example(seed, tokenizer), tokenizer, attention)
        assert np.array_equal(mask, oracle_mask(places, attention)), f"seed {seed}"


@pytest.fixture(params=ATTENTION)
def otter(request, tokenizer):
    """Attention, mask and places of an example of two planned rounds and one of text."""
    return request.param, *laid_out(OTTER, tokenizer, request.param)[1:]


def test_prompt_plan_and_text_see_the_rounds_before_and_their_own_up_to_themselves(otter):
    _, mask, places = otter
    outside = lambda q: q.part != "span" and q.name != "<eos>"
    written = lambda k: k.part != "span"
    assert pairs(mask, places, outside, lambda q, k: k.round < q.round).all()
    assert pairs(mask, places, outside, lambda q, k: k.round == q.round and written(k) and k.i <= q.i).all()
    assert not pairs(mask, places, outside, lambda q, k: k.i > q.i).any()


def test_a_plan_token_of_a_later_round_sees_finished_spans(otter):
    _, mask, places = otter
    later = lambda q: q.part == "outside" and q.round > 0
    assert pairs(mask, places, later, lambda q, k: k.part == "span" and k.round < q.round).all()


def test_sync_itself_already_sees_the_spans_that_it_ends(otter):
    _, mask, places = otter
    sync = lambda q: q.name == "<sync/>"
    assert pairs(mask, places, sync, lambda q, k: k.part == "span" and k.i < q.i).all()


def test_no_token_outside_a_span_sees_it_before_its_rounds_sync(otter):
    _, mask, places = otter
    outside = lambda q: q.part != "span"
    assert not pairs(mask, places, outside, lambda q, k: k.part == "span" and k.round >= q.round).any()


def test_a_span_sees_prompt_plan_and_earlier_rounds(otter):
    _, mask, places = otter
    span = lambda q: q.part == "span"
    assert pairs(mask, places, span, lambda q, k: k.part == "prompt").all()
    assert pairs(mask, places, span, lambda q, k: k.part == "outside" and k.round == q.round).all()
    assert pairs(mask, places, span, lambda q, k: k.round < q.round).all()
    assert not pairs(mask, places, span, lambda q, k: k.round > q.round).any()


def test_a_span_sees_itself_in_both_directions_and_causal_up_to_itself(otter):
    attention, mask, places = otter
    span = lambda q: q.part == "span"
    assert pairs(mask, places, span, lambda q, k: q.same_span(k) and k.i <= q.i).all()
    after = pairs(mask, places, span, lambda q, k: q.same_span(k) and k.i > q.i)
    assert not after.any() if attention == "causal" else after.all()


def test_a_span_sees_its_siblings_only_if_dense(otter):
    attention, mask, places = otter
    siblings = pairs(mask, places, lambda q: q.part == "span", lambda q, k: q.with_sibling(k))
    assert siblings.all() if attention == "dense" else not siblings.any()


@pytest.mark.parametrize("tag", ["<async>", "</async>"])
def test_async_and_its_end_belong_to_their_span(otter, tag):
    _, mask, places = otter
    assert pairs(mask, places, lambda q: q.name == "</async>", lambda q, k: k.name == tag and q.same_span(k)).all()
    topic_end = lambda q: q.name == "</topic>"
    assert not pairs(mask, places, topic_end, lambda q, k: k.name == tag and k.round == q.round).any()


# ---------------------------------------------------------------- autoregressive targets


def test_a_plan_or_text_token_predicts_the_next_and_skips_the_spans_in_between(tokenizer):
    for seed in range(100):
        layout, _, places = laid_out(random_example(seed, tokenizer), tokenizer, "sparse")
        assert Sequence(layout).next.tolist() == oracle_target(places, layout.token), f"seed {seed}"


def test_the_last_topics_end_predicts_sync_or_eos(tokenizer):
    for rounds, expected in ((OTTER.rounds, [tokenizer.sync, tokenizer.sync]), (OTTER.rounds[:1], [tokenizer.eos])):
        layout, _, places = laid_out(Example("", rounds), tokenizer, "sparse")
        before_span = [i for i, p in enumerate(places[1:]) if p.name == "<async>" and places[i].name == "</topic>"]
        assert [Sequence(layout).next[i] for i in before_span] == expected


def test_no_loss_on_the_prompt_but_its_last_token_predicts_the_answers_first(tokenizer):
    layout = encode_example(OTTER, tokenizer)
    target, prompt = Sequence(layout).next, layout.kind.count(PROMPT)
    assert layout.token[prompt - 1] == tokenizer.assistant
    assert (target[: prompt - 1] == IGNORE).all()
    assert target[prompt - 1] == layout.token[prompt] == tokenizer.encode("Here:")[0]


def test_every_answer_token_outside_the_spans_is_predicted_exactly_once(tokenizer):
    for seed in range(50):
        layout, _, places = laid_out(random_example(seed, tokenizer), tokenizer, "sparse")
        target = Sequence(layout).next
        assert target[target != IGNORE].tolist() == [layout.token[p.i] for p in places if p.part == "outside"]


# ---------------------------------------------------------------- noise


@dataclass
class Noised:
    """One row of a batch, padding left off, beside the clean sequence that it comes from."""

    clean: np.ndarray
    expected: np.ndarray  # autoregressive targets of the clean sequence
    places: list
    inside: np.ndarray  # the contents of the noised round's spans, by the tags
    token: np.ndarray
    target: np.ndarray
    weight: np.ndarray
    in_span: np.ndarray


def noised_rows(tokenizer, attention="sparse", weight="elbo", seeds=range(25)):
    """The rows of batches of 1 to 5 random examples, with a random round each."""
    for seed in seeds:
        rng = np.random.default_rng(seed)
        examples = [random_example(1000 * seed + n, tokenizer) for n in range(rng.integers(1, 6))]
        layouts = [encode_example(e, tokenizer, attention) for e in examples]
        rounds = [int(rng.integers(len(e.rounds))) for e in examples]
        batch = make_batch([Sequence(y) for y in layouts], rounds, tokenizer, rng, weight)
        for b, (layout, round_) in enumerate(zip(layouts, rounds)):
            places = read_tags(layout.token, tokenizer)
            expected = oracle_target(places, layout.token)
            places = [p for p in places if p.round <= round_]
            n = len(places)
            inside = np.array([p.content and p.round == round_ for p in places])
            columns = [getattr(batch, name)[b, :n].numpy() for name in ("token", "target", "weight", "in_span")]
            yield Noised(np.array(layout.token[:n]), np.array(expected[:n]), places, inside, *columns)


def test_history_is_clean_and_only_slots_of_the_picked_round_are_noised(tokenizer):
    for row in noised_rows(tokenizer):
        assert np.array_equal(row.in_span, row.inside)
        assert np.array_equal(row.token[~row.inside], row.clean[~row.inside])
        changed = row.token != row.clean
        assert (row.token[changed] == tokenizer.mask).all()


def test_what_follows_the_picked_round_is_cut_off(tokenizer):
    layout, _, places = laid_out(OTTER, tokenizer, "sparse")
    for round_ in range(3):
        batch = make_batch([Sequence(layout)], [round_], tokenizer, np.random.default_rng(0))
        assert batch.token.shape == (1, sum(p.round <= round_ for p in places))
        assert batch.n_tokens == batch.token.numel()


def test_a_masked_slot_predicts_itself_and_an_unmasked_one_nothing(tokenizer):
    for row in noised_rows(tokenizer):
        masked = row.inside & (row.token == tokenizer.mask)
        assert np.array_equal(row.target[masked], row.clean[masked])
        assert (row.target[row.inside & ~masked] == IGNORE).all()


def test_targets_outside_the_spans_are_those_of_the_clean_sequence(tokenizer):
    for row in noised_rows(tokenizer):
        assert np.array_equal(row.target[~row.inside], row.expected[~row.inside])


def test_the_end_of_the_picked_round_still_predicts_the_sync_that_was_cut_off(tokenizer):
    sequence = Sequence(encode_example(OTTER, tokenizer))
    for round_, expected in ((0, tokenizer.sync), (1, tokenizer.sync), (2, IGNORE)):
        batch = make_batch([sequence], [round_], tokenizer, np.random.default_rng(0))
        places = read_tags(batch.token[0], tokenizer)
        assert batch.target[0, [p.i for p in places if p.part == "outside"][-1]] == expected


def test_tags_and_topic_of_a_span_are_never_noised_and_never_targets(tokenizer):
    for row in noised_rows(tokenizer):
        given = np.array([p.part == "span" and not p.content for p in row.places], dtype=bool)
        assert np.array_equal(row.token[given], row.clean[given])
        assert (row.target[given] == IGNORE).all() and not row.in_span[given].any()


# ---------------------------------------------------------------- how much noise


def slot_draws(tokenizer, attention, n_batches, weight="elbo"):
    """Two spans of 5 x 4 slots in each of 8 rows: arrays (batches, 8, 2, 20) masked and weight."""
    example = Example("Tell", (Round("", (Span("food", "fish", 5), Span("play", "lakes", 5))),))
    sequences = [Sequence(encode_example(example, tokenizer, attention))] * 8
    rng = np.random.default_rng(0)
    batches = [make_batch(sequences, [0] * 8, tokenizer, rng, weight) for _ in range(n_batches)]
    shape = (n_batches, 8, 2, 20)
    masked = np.stack([(b.token[b.in_span] == tokenizer.mask).numpy() for b in batches])
    return masked.reshape(shape), np.stack([b.weight[b.in_span].numpy() for b in batches]).reshape(shape)


def test_each_span_draws_its_own_t_and_all_its_slots_share_it(tokenizer):
    _, weight = slot_draws(tokenizer, "sparse", 50)
    assert (weight == weight[..., :1]).all()
    assert (weight[:, :, 0, 0] != weight[:, :, 1, 0]).all()


def test_dense_spans_share_the_rounds_t(tokenizer):
    _, weight = slot_draws(tokenizer, "dense", 50)
    assert (weight == weight[:, :, :1, :1]).all()
    assert (weight[:, 1:, 0, 0] != weight[:, :-1, 0, 0]).all()


@pytest.mark.parametrize("attention, draws", [("sparse", 16), ("dense", 8)])
def test_t_is_stratified_one_draw_in_each_equal_part_of_0_to_1(tokenizer, attention, draws):
    _, weight = slot_draws(tokenizer, attention, 100)
    t = 1 / weight[..., : draws // 8, 0].reshape(100, draws)
    parts = np.ceil(t * draws - 1e-4).astype(int)
    assert (np.sort(parts, axis=1) == np.arange(1, draws + 1)).all()
    assert len(np.unique(parts[:, 0])) == draws, "which span draws the largest t has to be random"


def test_t_is_uniform_and_slots_are_masked_with_probability_t(tokenizer):
    masked, weight = slot_draws(tokenizer, "sparse", 400)
    t = 1 / weight[..., 0].ravel()
    assert 0 < t.min() < 0.001 and 0.999 < t.max() <= 1 + 1e-6
    assert np.abs(np.histogram(t, bins=10, range=(0, 1 + 1e-6))[0] / len(t) - 0.1).max() < 0.005
    rate = masked.mean(-1).ravel()
    for low in np.arange(0, 1, 0.1):
        part = (t >= low) & (t < low + 0.1)
        assert abs(rate[part].mean() - t[part].mean()) < 0.02


def test_slots_are_masked_independently_given_t(tokenizer):
    masked, weight = slot_draws(tokenizer, "sparse", 400)
    noise = masked - 1 / weight
    both = (noise[..., :-1] * noise[..., 1:]).mean()
    across = (noise[:, :, 0] * noise[:, :, 1]).mean()
    assert abs(both) < 0.005 and abs(across) < 0.005


def test_weighted_by_1_over_t_each_slot_counts_once_on_average(tokenizer):
    masked, weight = slot_draws(tokenizer, "sparse", 800)
    assert (masked * weight).mean() == pytest.approx(1, abs=0.03)
    assert (masked * weight).mean(axis=(0, 1, 3)) == pytest.approx([1, 1], abs=0.06)


def test_uniform_weights_are_1_and_draw_the_same_noise(tokenizer):
    masked, weight = slot_draws(tokenizer, "sparse", 5, "uniform")
    assert (weight == 1).all()
    assert np.array_equal(masked, slot_draws(tokenizer, "sparse", 5, "elbo")[0])


def test_plan_targets_are_never_weighted_by_1_over_t(tokenizer):
    for row in noised_rows(tokenizer):
        assert (row.weight[~row.inside] == 1).all()


# ---------------------------------------------------------------- batches


def random_batch(tokenizer, seed=0, weight="elbo", attention="sparse"):
    """Five sequences of different lengths and the rounds that a batch noises."""
    examples = [random_example(n, tokenizer, rounds=2) for n in range(5)]
    sequences = [Sequence(encode_example(e, tokenizer, attention)) for e in examples]
    rounds = [0, 1, 1, 0, 1]
    return sequences, rounds, make_batch(sequences, rounds, tokenizer, np.random.default_rng(seed), weight)


def test_the_same_random_state_makes_the_same_batch_and_another_another(tokenizer):
    (_, _, a), (_, _, b), (_, _, c) = (random_batch(tokenizer, seed) for seed in (0, 0, 1))
    for name in ("token", "position", "see", "target", "in_span", "weight"):
        assert torch.equal(getattr(a, name), getattr(b, name))
    assert not torch.equal(a.token, c.token)


def test_padding_predicts_nothing_and_sees_only_the_first_token(tokenizer):
    sequences, rounds, batch = random_batch(tokenizer)
    stops = [s.stop(r) for s, r in zip(sequences, rounds)]
    assert batch.n_tokens == sum(stops) < batch.token.numel()
    for b, stop in enumerate(stops):
        assert (batch.token[b, stop:] == tokenizer.pad).all()
        assert (batch.target[b, stop:] == IGNORE).all() and not batch.in_span[b, stop:].any()
        seen = visible(batch.see[b : b + 1, stop:], batch.token.shape[1])
        assert not seen[..., 1:].any() and seen[..., 0].all()  # a query that sees nothing is NaN


def test_no_token_sees_the_padding(tokenizer):
    for attention in ATTENTION:
        sequences, rounds, batch = random_batch(tokenizer, attention=attention)
        for b, (s, r) in enumerate(zip(sequences, rounds)):
            assert not visible(batch.see, batch.token.shape[1])[b, :, s.stop(r) :].any()


def test_a_row_of_a_batch_has_the_columns_of_its_sequence(tokenizer):
    sequences, rounds, batch = random_batch(tokenizer)
    for b, (s, r) in enumerate(zip(sequences, rounds)):
        n = s.stop(r)
        assert np.array_equal(batch.see[b, :n], s.see[:n])
        assert np.array_equal(batch.position[b, :n], np.arange(n))


def test_a_batch_without_any_span_has_plan_targets_alone(tokenizer):
    sequences = [Sequence(encode_example(random_example(n, tokenizer, spans=0), tokenizer)) for n in range(3)]
    batch = make_batch(sequences, [0, 0, 0], tokenizer, np.random.default_rng(0))
    assert not batch.in_span.any() and (batch.weight == 1).all()
    assert ((batch.target != IGNORE).sum(1) > 0).all()


def test_targets_in_a_round_are_its_slots_and_its_plan_targets(tokenizer):
    for seed in range(20):
        layout, _, places = laid_out(random_example(seed, tokenizer), tokenizer, "sparse")
        expected, sequence = oracle_target(places, layout.token), Sequence(layout)
        for r in range(sequence.n_rounds):
            mine = [p for p in places if p.round == r]
            assert sequence.targets_in(r) == sum(p.content or expected[p.i] != IGNORE for p in mine)
