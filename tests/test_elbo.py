"""The span loss, weighted by 1/t, is the negative ELBO: compared with its exact value, by brute force.

The vocabulary is so small that every content of a span and every order of unmasking can be listed:
slots hold ' ', 'a', ':' or [PAD].
"""

from itertools import permutations, product

import numpy as np
import pytest
import torch
from conftest import small_model

from masks import PLAN, SLOT, encode_example
from noise import IGNORE, Sequence, make_batch
from tags import Example, Round, Span
from tokenizer import Tokenizer
from train import JointLoss, validate

FOUR = Tokenizer([b" ", b"a", b":"], unit=1)  # ids 0 to 3 fill slots: three texts and [PAD]
ONE_SPAN = Example("aa", (Round("", (Span("a", "a", 3),)),))  # contents ' ', 'a', [PAD]
TWO_SPANS = Example("aa", (Round("a", (Span("a", "a", 2), Span("aa", ":", 2))),))
TWO_ROUNDS = Example("a", (Round("", (Span("a", "a", 2),)), Round(":", (Span("aa", "a", 3),)), Round("aa")))


@pytest.fixture(scope="module")
def model():
    return small_model(FOUR.vocab_size, seed=2)


# ---------------------------------------------------------------- by brute force


@torch.no_grad()
def conditionals(model, tokenizer, layout, slots, n_tokens):
    """Log-probabilities (n_tokens,) of each masked slot in each state of the slots, as {(state, slot number): ...}.

    A state is a tuple of contents, [MASK] among them.
    """
    states = list(product([*range(n_tokens), tokenizer.mask], repeat=len(slots)))
    token = torch.tensor(layout.token).repeat(len(states), 1)
    token[:, slots] = torch.tensor(states)
    position = torch.tensor(layout.position).expand(token.shape)
    ranges = torch.tensor([layout.prefix, layout.begin, layout.end]).T.expand(*token.shape, 3)
    hidden = model(token, position, ranges)[:, slots]
    log_p = (hidden @ model.embedding.weight.T)[..., :n_tokens].double().log_softmax(-1)
    masked = [(n, k) for n, state in enumerate(states) for k, i in enumerate(state) if i == tokenizer.mask]
    return {(states[n], k): log_p[n, k] for n, k in masked}


def orders_of(content, log_p, mask):
    """The log-probability of a content in each order of unmasking one slot at a time."""
    totals = []
    for order in permutations(range(len(content))):
        state, total = [mask] * len(content), 0.0
        for k in order:
            total += float(log_p[tuple(state), k][content[k]])
            state[k] = content[k]
        totals.append(total)
    return np.array(totals)


def random_order_probabilities(model, tokenizer, layout_with_masks, slots, n_tokens):
    """How often a sampler that unmasks one random slot a step fills the slots with each content.

    `slots`: layout entries, [MASK] in `layout_with_masks`; `n_tokens`: slots draw from the ids below
    it. Returns {tuple of contents: probability}, the mean over all orders of unmasking.
    """
    log_p = conditionals(model, tokenizer, layout_with_masks, slots, n_tokens)
    contents = product(range(n_tokens), repeat=len(slots))
    return {c: float(np.exp(orders_of(c, log_p, tokenizer.mask)).mean()) for c in contents}


def exact_elbo(model, tokenizer, layout, slots):
    """The mean over all orders of unmasking of the sum of the contents' log-probabilities."""
    log_p = conditionals(model, tokenizer, layout, slots, tokenizer.pad + 1)
    return orders_of([layout.token[i] for i in slots], log_p, tokenizer.mask).mean()


def slots_of(layout, span=None, round_=0):
    return [i for i in range(len(layout)) if layout.kind[i] == SLOT
            and layout.round[i] == round_ and span in (None, layout.span[i])]  # fmt: skip


def masked_layout(example, attention="sparse"):
    """An example's layout whose slots are all [MASK]."""
    layout = encode_example(example, FOUR, attention)
    layout.token = [FOUR.mask if kind == SLOT else i for i, kind in zip(layout.token, layout.kind)]
    return layout


# ---------------------------------------------------------------- the exact value


def test_probabilities_over_all_contents_sum_to_1(model):
    layout = masked_layout(ONE_SPAN)
    probabilities = random_order_probabilities(model, FOUR, layout, slots_of(layout), FOUR.pad + 1)
    assert len(probabilities) == 4**3
    assert sum(probabilities.values()) == pytest.approx(1, abs=1e-6)
    assert max(probabilities.values()) > 4 / 4**3, "a model of some opinion"


def test_the_elbo_lies_below_the_log_likelihood_of_unmasking_in_random_order(model):
    layout = encode_example(ONE_SPAN, FOUR)
    slots = slots_of(layout)
    likelihood = random_order_probabilities(model, FOUR, masked_layout(ONE_SPAN), slots, FOUR.pad + 1)
    gap = np.log(likelihood[tuple(layout.token[i] for i in slots)]) - exact_elbo(model, FOUR, layout, slots)
    assert gap > 1e-3, "the orders disagree, so the bound is not tight"


def test_of_a_single_slot_the_elbo_is_the_log_likelihood(model):
    layout = encode_example(Example("a", (Round("", (Span("a", "", 1),)),)), FOUR)
    slots = slots_of(layout)
    likelihood = random_order_probabilities(model, FOUR, layout, slots, FOUR.pad + 1)
    assert np.log(likelihood[(FOUR.pad,)]) == pytest.approx(exact_elbo(model, FOUR, layout, slots))


# ---------------------------------------------------------------- what training and evaluation report


def reported(model, example, attention="sparse", draws=40, copies=64):
    """Plan and span loss, and the latter's error, as `validate` measures them on copies of one example."""
    sequences = [Sequence(encode_example(example, FOUR, attention))] * copies
    found = validate(JointLoss(model, FOUR.pad + 1), sequences, FOUR, draws=draws, batch=copies)
    return found["plan"], found.get("span", found.get("causal")), found.get("span_error")


def assert_converged(measured, error, exact):
    """Within 4 standard errors, and these small enough to tell it from a wrong weight."""
    assert error < 0.06 * exact
    assert abs(measured - exact) < 4 * error


def test_the_span_loss_converges_to_the_exact_elbo(model):
    layout = encode_example(ONE_SPAN, FOUR)
    _, span, error = reported(model, ONE_SPAN)
    assert_converged(span, error, -exact_elbo(model, FOUR, layout, slots_of(layout)) / 3)


def test_with_uniform_weights_it_is_not_the_elbo(model):
    layout = encode_example(ONE_SPAN, FOUR)
    sequences, rng, total = [Sequence(layout)] * 64, np.random.default_rng(0), 0.0
    for _ in range(20):
        with torch.no_grad():
            total += float(JointLoss(model, FOUR.pad + 1)(make_batch(sequences, [0] * 64, FOUR, rng, "uniform"))[1])
    exact = -exact_elbo(model, FOUR, layout, slots_of(layout)) / 3
    assert total / (20 * 64 * 3) < 0.8 * exact


def test_sparse_spans_are_independent_so_their_elbos_add(model):
    layout = encode_example(TWO_SPANS, FOUR)
    exact = -sum(exact_elbo(model, FOUR, layout, slots_of(layout, n)) for n in range(2)) / 4
    _, span, error = reported(model, TWO_SPANS)
    assert_converged(span, error, exact)


def test_dense_spans_are_unmasked_together_and_have_one_elbo(model):
    layout = encode_example(TWO_SPANS, FOUR, "dense")
    exact = -exact_elbo(model, FOUR, layout, slots_of(layout)) / 4
    _, span, error = reported(model, TWO_SPANS, "dense")
    assert_converged(span, error, exact)


def test_the_elbo_of_an_answer_adds_its_rounds_each_after_a_clean_history(model):
    layout = encode_example(TWO_ROUNDS, FOUR)
    exact = -sum(exact_elbo(model, FOUR, layout, slots_of(layout, round_=r)) for r in range(2)) / 5
    _, span, error = reported(model, TWO_ROUNDS)
    assert_converged(span, error, exact)


@torch.no_grad()
def test_the_plan_loss_is_exact_and_counts_each_token_of_an_answer_once(model):
    """Reading token by token what is written outside the spans, with all earlier spans finished."""
    layout, total, count = encode_example(TWO_ROUNDS, FOUR), 0.0, 0
    sequence = Sequence(layout)
    for i in np.flatnonzero(sequence.next != IGNORE):
        end = int(i) + 1
        token, position = torch.tensor([layout.token[:end]]), torch.arange(end)[None]
        ranges = torch.tensor([layout.prefix[:end], layout.begin[:end], layout.end[:end]]).T[None]
        log_p = (model(token, position, ranges)[0, -1] @ model.embedding.weight.T).log_softmax(-1)
        total, count = total - float(log_p[sequence.next[i]]), count + 1
    plan, _, _ = reported(model, TWO_ROUNDS, draws=1, copies=3)
    assert plan == pytest.approx(total / count, rel=1e-4)
    assert count == layout.kind.count(PLAN)


def test_one_seed_gives_one_value_and_one_draw_no_error(model):
    assert reported(model, ONE_SPAN, draws=3) == pytest.approx(reported(model, ONE_SPAN, draws=3), rel=1e-6)
    assert reported(model, ONE_SPAN, draws=1)[2] is None
