"""Which tokens are drawn and which slots keep theirs: against a loop over groups, and against exact probabilities."""

import itertools
from collections import Counter

import pytest
import torch
from conftest import each
from naive_sampler import CERTAINTY, NaiveSampler, Token, hidden_states
from test_sample import PROMPTS, ids, steered

from config import ORDERS, MethodConfig, SampleConfig
from decode import Answer, Denoise, RoundTokens
from masks import PLAN, PROMPT, SLOT, Layout, encode_prompt
from methods import DECODERS
from sample import Predictions, Sampler
from tokenizer import Tokenizer
from unmask import fill, probabilities


@pytest.fixture(scope="module")
def planner(tokenizer):
    return steered(tokenizer)


DEFINITE = [order for order in ORDERS if order != "random"]
GROUPS = [[5, 1, 3], [4], [2, 2, 6, 0, 7]]  # sizes of groups: a batch has several, of one answer or of more


def test_of_each_group_the_most_certain_are_kept_and_all_above_a_threshold():
    cases = itertools.product(GROUPS, [0.0, 0.4], DEFINITE, [False, True], [False, True])
    for sizes, threshold, order, apart, pads_last in each(cases):
        torch.manual_seed(sum(sizes))
        n, pad = sum(sizes), 2
        config = SampleConfig(order=order, threshold=threshold, apart=apart, pads_last=pads_last)
        probs, entry = (torch.randn(n, 4) * 2).softmax(-1), torch.arange(n) + (torch.rand(n) < 0.3).cumsum(0)
        group = torch.tensor([n for n, size in enumerate(sizes) for _ in range(size)])
        kind, guess = "confidence" if threshold else order, probs.argmax(-1).tolist()
        sure = [CERTAINTY[kind](*slot) for slot in zip(probs, guess, entry.tolist())]

        def waits(i):
            """By the definitions: a neighbour would get the same text token and is more certain (of equals the left one is);
            or it would get [PAD] and one before it, in the same row of neighbours, text."""
            near = [
                j for j in range(n) if abs(entry[j] - entry[i]) == 1 and group[j] == group[i] and guess[j] == guess[i]
            ]
            if apart and guess[i] != pad and any((sure[j], -j) > (sure[i], -i) for j in near):
                return True
            row = [j for j in range(i) if group[j] == group[i] and entry[i] - entry[j] == i - j]  # all masked up to i
            return pads_last and guess[i] == pad and any(guess[j] != pad for j in row)

        for share in range(4):
            token, kept = fill(probs.log(), group, entry, torch.full_like(group, share), pad, config, [])
            assert token.tolist() == guess
            expected = set()
            for mine in ([i for i in range(n) if group[i] == g and not waits(i)] for g in range(len(sizes))):
                expected |= {*sorted(mine, key=lambda i: -sure[i])[:share]}
            expected |= {i for i in range(n) if threshold and probs[i].max() >= threshold}
            assert {*kept.nonzero()[:, 0].tolist()} == expected


def kept(tokens, sure, apart=True, quota=9, **settings):
    """Which slots of one group are filled, if each predicts a token with a probability; token 0 is [PAD]."""
    probs = torch.full((len(tokens), 10), 0.0)
    for row, token, p in zip(probs, tokens, sure):
        row += (1 - p) / 9
        row[token] = p
    group, config = (
        torch.zeros(len(tokens), dtype=torch.long),
        SampleConfig(apart=apart, order="confidence", **settings),
    )
    entry, quota = torch.arange(len(tokens)), torch.full_like(group, quota)
    return fill(probs.log(), group, entry, quota, 0, config, [])[1].int().tolist()


def test_of_neighbours_with_the_same_token_only_the_more_certain_is_filled():
    assert kept([5, 5, 6], [0.5, 0.6, 0.4]) == [0, 1, 1]
    assert kept([5, 5, 6], [0.5, 0.6, 0.4], apart=False) == [1, 1, 1]
    assert kept([5, 5, 5, 5], [0.5, 0.6, 0.7, 0.6]) == [0, 0, 1, 0]
    assert kept([5, 6, 5], [0.5, 0.6, 0.7]) == [1, 1, 1]  # not neighbours
    assert kept([0, 0, 0], [0.5, 0.6, 0.7]) == [1, 1, 1]  # [PAD] follows [PAD]
    assert kept([5, 5, 6], [0.5, 0.6, 0.4], quota=2) == [0, 1, 1]  # the next most certain takes its place
    assert kept([5, 5, 6], [0.92, 0.95, 0.4], threshold=0.9) == [1, 1, 1]  # as certain as a threshold asks for
    assert kept([5, 5, 6], [0.8, 0.95, 0.4], threshold=0.9, quota=1) == [0, 1, 0]


def test_pad_waits_for_the_text_before_it():
    alone = dict(apart=False, quota=1)
    assert kept([5, 0, 0], [0.5, 0.9, 0.8], **alone) == [1, 0, 0]  # however certain
    assert kept([5, 0, 0], [0.5, 0.9, 0.8], pads_last=False, **alone) == [0, 1, 0]
    assert kept([0, 0, 5], [0.5, 0.9, 0.8], **alone) == [0, 1, 0]  # no text before it
    assert kept([5, 0, 6, 0], [0.5, 0.9, 0.4, 0.8], apart=False) == [1, 0, 1, 0]  # also if the quota is not reached
    assert kept([5, 0, 0], [0.5, 0.95, 0.8], threshold=0.9, **alone) == [1, 1, 0]  # as certain as a threshold asks for
    probs, entry = torch.tensor([[0.1, 0.6], [0.9, 0.1]]), torch.tensor([3, 5])  # known text is between the two
    given = torch.tensor([0, 0]), entry, torch.tensor([1, 1]), 0, SampleConfig(order="confidence"), []
    assert fill(probs.log(), *given)[1].tolist() == [0, 1]


def test_of_equally_certain_slots_the_first_are_kept():
    group, share = torch.tensor([0, 0, 0, 1, 1]), torch.tensor([2, 2, 2, 1, 1])
    fills = lambda apart: fill(
        torch.zeros(5, 4), group, torch.arange(5), share, 3, SampleConfig(apart=apart, pads_last=False), []
    )[1]
    assert fills(False).tolist() == [1, 1, 0, 1, 0]
    assert fills(True).tolist() == [1, 0, 0, 1, 0]  # all would get token 0


@pytest.mark.parametrize("method, attention", [("planned", "sparse"), ("dense", "dense")])
def test_answers_filled_in_any_order_are_the_naive_ones(planner, tokenizer, method, attention):
    for order in each(DEFINITE):
        config = SampleConfig(max_tokens=60, steps_ratio=0.6, order=order)
        (answer,) = Sampler(planner, tokenizer, config, MethodConfig(method)).answer(PROMPTS[:1])
        assert ids(answer) == NaiveSampler(planner, tokenizer, config, attention).answer(PROMPTS[0])["rounds"]


@pytest.mark.parametrize("order", ORDERS)
def test_a_seed_is_an_answer_and_answer_i_of_a_batch_has_seed_plus_i(planner, tokenizer, order):
    def answers(n, seed):
        config = SampleConfig(temperature=1.0, seed=seed, max_tokens=40, order=order)
        return [ids(a) for a in Sampler(planner, tokenizer, config).answer(["the otter"] * n)]

    batch = answers(4, seed=3)
    assert [answers(1, seed=3 + i)[0] for i in range(4)] == batch
    assert answers(4, seed=3) == batch
    assert all(a != b for a, b in itertools.combinations(batch, 2))


def test_temperature_flattens_and_the_nucleus_keeps_the_likeliest_that_hold_top_p():
    logits = torch.tensor([[0.1, 0.25, 0.5, 0.15]]).log()
    for given, expected in [
        (dict(temperature=1.0, top_p=0.6), [0, 1 / 3, 2 / 3, 0]),
        (dict(temperature=0.5), [0.01 / 0.345, 0.0625 / 0.345, 0.25 / 0.345, 0.0225 / 0.345]),
    ]:
        torch.testing.assert_close(
            probabilities(logits, SampleConfig(**given)), torch.tensor([expected], dtype=torch.float)
        )


def test_a_tiny_nucleus_is_greedy(planner, tokenizer):
    greedy = SampleConfig(max_tokens=60, steps_ratio=0.01)  # one step a round, as the nucleus hides who is more certain
    nucleus = SampleConfig(max_tokens=60, steps_ratio=0.01, temperature=1.0, top_p=1e-6)
    for a, b in zip(*(Sampler(planner, tokenizer, config).answer(PROMPTS) for config in (greedy, nucleus))):
        assert ids(a) == ids(b)


@torch.no_grad()
def order_probabilities(model, tokenizer, prompt, name, slots, tokens, orders):
    """Exact probability of each content of a span, the only one of its plan, if slots are drawn one by one in one of `orders`."""
    layout = Layout()
    layout.write(encode_prompt(prompt, tokenizer), PROMPT, 0)
    layout.write([tokenizer.topic, *name, tokenizer.length_id(1), tokenizer.topic_end], PLAN, 0)
    layout.scaffold([(name, [tokenizer.mask] * slots)], tokenizer, 0)
    places = [n for n, kind in enumerate(layout.kind) if kind == SLOT]

    def given(content):  # probabilities of each slot given those already filled
        sequence = [Token(i, r, None if s < 0 else s) for i, r, s in zip(layout.token, layout.round, layout.span)]
        for place, token in zip(places, content):
            sequence[place].id = token
        return model.logits(hidden_states(model, sequence, "sparse")[places], tokenizer.pad + 1).softmax(-1).tolist()

    table = {c: given(c) for c in itertools.product((*tokens, tokenizer.mask), repeat=slots)}
    exact = dict.fromkeys(itertools.product(tokens, repeat=slots), 0.0)
    for content, order in itertools.product(exact, orders):
        p, state = 1 / len(orders), [tokenizer.mask] * slots
        for slot in order:
            p *= table[tuple(state)][slot][content[slot]]
            state[slot] = content[slot]
        exact[content] += p
    return exact


def test_one_slot_a_step_in_random_order_draws_what_the_order_free_model_says(tokenizer):
    tokenizer, n, slots = Tokenizer(tokenizer.tokens, unit=3), 3000, False
    (name,), tokens = (
        tokenizer.encode("a")[-1:],
        (*tokenizer.encode("the")[-1:], *tokenizer.encode("of")[-1:], tokenizer.pad),
    )
    model = steered(tokenizer, 1, 0.25, topic=999.0, length=999.0, lengths=1)
    logits, only = model.logits, torch.full((tokenizer.vocab_size,), -999.0)
    only[list(tokens)] = 0
    only[[name, tokenizer.topic, tokenizer.length_id(1), tokenizer.eos]] = torch.tensor([300.0, 0, 0, 0])
    only_slots = only.index_fill(0, torch.tensor([name]), -999.0)
    model.logits = lambda hidden, n=None: logits(hidden, n) + (only_slots if slots else only)[:n]

    class Staged(Predictions):
        def predict(self, live, hidden, reads):
            nonlocal slots
            slots = live[0].phase.in_spans
            return super().predict(live, hidden, reads)

    config = SampleConfig(temperature=1.0, order="random", steps_ratio=1.0, max_tokens=12, pads_last=False)
    sampler = Sampler(model, tokenizer, config)
    sampler.predictions = Staged(model, tokenizer)
    drawn = Counter(tuple(a.contents(a.rounds[0].spans[0])) for a in sampler.answer([""] * n))
    slots = True

    def chi_square(orders):
        exact = order_probabilities(model, tokenizer, "", [name], 3, tokens, orders)
        assert sum(exact.values()) == pytest.approx(1) and drawn.keys() <= exact.keys()
        return sum((drawn[content] - n * p) ** 2 / (n * p) for content, p in exact.items())

    orders = list(itertools.permutations(range(3)))
    assert chi_square(orders) < 55, "26 degrees of freedom exceed 55 once in 1000 cases"
    assert min(chi_square([order]) for order in orders) > 110, "and this tells all orders from any single one"


def test_certainty_does_not_depend_on_how_tokens_are_drawn():
    """It is the model's at temperature 1: a low temperature or a small nucleus would make every token certain."""
    for order, threshold in each(itertools.product(DEFINITE, [0.0, 0.3, 0.6])):
        torch.manual_seed(0)
        logits, group, quota = torch.randn(12, 9), torch.arange(12) // 6, torch.full((12,), 2)
        entry = torch.arange(12)
        greedy = fill(logits, group, entry, quota, 0, SampleConfig(order=order, threshold=threshold), [])
        for given in (dict(temperature=0.01), dict(temperature=1.0, top_p=1e-6), dict(temperature=0.0, top_p=0.1)):
            config = SampleConfig(order=order, threshold=threshold, **given)
            token, kept = fill(logits, group, entry, quota, 0, config, [(torch.Generator().manual_seed(0), 12)])
            assert torch.equal(token, greedy[0]) and torch.equal(kept, greedy[1])


def test_a_low_temperature_takes_the_passes_of_temperature_0(planner, tokenizer):
    """Before, a threshold of 0.9 filled everything at once at temperature 0.05."""
    passes = [[a.denoise_passes for a in Sampler(planner, tokenizer, SampleConfig(max_tokens=60, threshold=0.6,
               temperature=t)).answer(PROMPTS)] for t in (0.0, 0.01)]  # fmt: skip
    assert passes[0] == passes[1] and max(passes[0]) > 2


def test_the_steps_are_those_of_the_decimal_ratio(tokenizer):
    """In binary 0.56 * 50 is more than 28."""
    for ratio, slots, steps in each([(0.56, 50, 28), (0.28, 50, 14), (0.07, 100, 7), (0.5, 7, 4)]):
        answer = Answer("x", tokenizer, SampleConfig(steps_ratio=ratio), MethodConfig(), DECODERS["planned"])
        answer.rounds.append(RoundTokens())
        answer.scaffold([([], slots)])
        assert Denoise(answer).steps == steps
