"""Layout, mask and targets, against the sentences that specify them (the oracle is naive_masks.py)."""

import numpy as np
import pytest
from conftest import OTTER, random_example
from naive_masks import laid_out, oracle_mask, oracle_target, pairs

from masks import ATTENTION, GIVEN, LINKED, PLAN, PROMPT, SLOT, Layout, encode_example
from noise import IGNORE, Sequence
from tags import Example, Round, Span

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
    with pytest.raises(ValueError, match=rf"'Tell me'.*'habitat'.*{slots} tokens.*only 4 \(1 x 4\)"):
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
    for seed in range(40):
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


def test_a_span_sees_siblings_only_if_they_are_linked(otter):
    attention, mask, places = otter
    siblings = pairs(mask, places, lambda q: q.part == "span", lambda q, k: q.with_sibling(k))
    assert siblings.any() == (attention in LINKED) and siblings.all() == (attention == "dense")


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
