"""A plan names no topic twice: where a model writes a name again, the topic is taken back and the plan ends."""

from collections import Counter

import numpy as np
import pytest
from conftest import SENTENCES, each
from naive_sampler import NaiveSampler
from test_sample import steered

from config import MethodConfig, SampleConfig
from grammar import Grammar
from measure.speculate import Drafter, drafted_by
from sample import Sampler
from show.page import Race, page
from show.record import record

PROMPTS = [SENTENCES[3], SENTENCES[0], "the otter swims", "", "play"]


@pytest.fixture(scope="module")
def repeating(tokenizer):
    """A model that plans much, with names of three tokens."""
    model = steered(tokenizer, topic=16.0, length=15.0, sync=12.0, eos=8.0, pad=11.0)
    logits = model.logits

    def favoured(hidden, n=None):
        scores = logits(hidden, n)
        scores[..., 40:43] += 12
        return scores

    model.logits = favoured
    return model


@pytest.fixture
def taken_back(monkeypatch):
    """Counts how often a topic is taken back."""
    count, take_back = Counter(), Grammar.take_back
    monkeypatch.setattr(Grammar, "take_back", lambda grammar: (count.update(n=1), take_back(grammar)))
    return count


def names(answer):
    return [[tuple(topic.name) for topic in round_.topics] for round_ in answer.rounds]


def answered(model, tokenizer, method=MethodConfig("planned"), prompts=PROMPTS, **settings):
    return Sampler(model, tokenizer, SampleConfig(**{"max_tokens": 120} | settings), method).answer(prompts)


def test_a_name_that_ends_is_a_second_one_only_if_the_same_plan_has_it(tok):
    a, b = b"ab"  # tokens of single bytes
    grammar = Grammar(tok, 500)
    topic = lambda name, length: [tok.topic, *name, tok.length_id(length), tok.topic_end]
    for token in [*topic([a], 1), *topic([a, b], 2), tok.topic, a]:
        assert not grammar.repeats(token)
        grammar.advance(token)
    assert grammar.repeats(tok.length_id(1)) and grammar.repeats(tok.length_id(7)) and not grammar.repeats(b)
    grammar.advance(b)
    assert grammar.repeats(tok.length_id(1))
    grammar.advance(b)
    assert not grammar.repeats(tok.length_id(1))
    for token in [tok.length_id(1), tok.topic_end, tok.sync, tok.topic, a]:
        grammar.advance(token)
    assert not grammar.repeats(tok.length_id(1)), "another round is another plan"


def test_a_number_in_a_list_makes_no_other_name(tok):
    for first, second, same in each([("1 otter", "2 otter", True), ("otter", "12 otter", True), ("1", "2", False),
                                     ("1 otter", "2 Otter", False), ("otter 1", "otter 2", False), ("1 2", "3 2", True)]):  # fmt: skip
        grammar = Grammar(tok, 500)
        for token in [tok.topic, *first.encode(), tok.length_id(1), tok.topic_end, tok.topic, *second.encode()]:
            grammar.advance(token)
        assert grammar.repeats(tok.length_id(1)) == same


def test_what_is_taken_back_leaves_all_as_it_was_but_the_plan_has_no_more_topics(tok):
    before = Grammar(tok, 90)
    for token in [tok.topic, 65, tok.length_id(1), tok.topic_end]:
        before.advance(token)
    after = before.copy()
    for token in [tok.topic, 65]:
        after.advance(token)
    after.take_back()
    assert [*np.flatnonzero(before.allowed() ^ after.allowed())] == [tok.topic]
    for token in [tok.sync, tok.topic, 65]:
        before.advance(token)
        after.advance(token)
        assert (before.allowed() == after.allowed()).all(), "nothing of it is left in the next round"


def test_answers_are_those_of_the_naive_sampler(repeating, tokenizer, taken_back):
    for max_tokens in each([30, 60, 120]):
        for answer in answered(repeating, tokenizer, max_tokens=max_tokens):
            naive = NaiveSampler(repeating, tokenizer, answer.config).answer(answer.prompt)
            contents = [
                ([*t.name], t.length, answer.contents(s)) for r in answer.rounds for t, s in zip(r.topics, r.spans)
            ]
            assert contents == [(name, length, ids) for _, spans in naive["rounds"] for name, length, ids in spans]
            for cost in ("plan_passes", "denoise_passes", "critical_path", "positions"):
                assert getattr(answer, cost) == naive[cost], cost
            for plan in names(answer):
                assert len({*plan}) == len(plan)
    assert taken_back["n"] > 5


def test_drafts_and_a_second_model_that_drafts_change_nothing(repeating, tokenizer, taken_back):
    for method in each(["planned", "parallel-ar", "dense"]):
        config = MethodConfig(method, trained="joint" if method == "parallel-ar" else "")
        alone = answered(repeating, tokenizer, config)
        drafts = drafted_by(Drafter(repeating))
        second = Sampler(repeating, tokenizer, SampleConfig(max_tokens=120, ahead=4), config, drafts).answer(PROMPTS)
        for others in (answered(repeating, tokenizer, config, ahead=3), second,
                       [answered(repeating, tokenizer, config, [prompt])[0] for prompt in PROMPTS]):  # fmt: skip
            assert [answer.layout for answer in others] == [answer.layout for answer in alone]
            assert not any(answer.broken for answer in others)
    assert taken_back["n"] > 20


def test_a_recording_ends_with_the_answer_and_can_be_shown_as_a_page(repeating, tokenizer, taken_back):
    for settings in each([{}, {"ahead": 3}]):
        for prompt in PROMPTS:
            sampler = Sampler(repeating, tokenizer, SampleConfig(max_tokens=120, **settings), MethodConfig("planned"))
            frames = record(sampler.answer, prompt)
            (answer,) = sampler.answer([prompt])
            planned = [[len(topic.name) for topic in round_.topics] for round_ in frames[-1].rounds]
            assert planned == [[len(topic.name) for topic in round_.topics] for round_ in answer.rounds]
            assert page([Race(prompt, [("Planned diffusion", "planned", frames)])])
    assert taken_back["n"]


def test_a_given_plan_may_name_a_topic_twice(repeating, tokenizer, taken_back):
    (answer,) = answered(repeating, tokenizer, prompts=["play"], plan="food 1; food 1")
    assert len(names(answer)[0]) == 2 and len({*names(answer)[0]}) == 1
