"""What is noised, cut off and predicted in a training batch, against the sentences that specify it."""

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from conftest import OTTER, each, in_span, random_example
from naive_masks import laid_out, oracle_target, read_tags

import noise
from masks import ATTENTION, encode_example, visible
from noise import IGNORE, Sequence, make_batch
from tags import Example, Round, Span

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
            columns = [x[b, :n].numpy() for x in (batch.token, batch.target, batch.weight, in_span(batch))]
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


# ---------------------------------------------------------------- the schedule


def cosine(n, t_min, rng):
    """Another schedule: what is tested of any has to hold for it too."""
    t = t_min + (1 - t_min) * (rng.permutation(n) + 1 - rng.random(n)) / max(n, 1)
    return 1 - np.cos(np.pi / 2 * t), np.pi / 2 / np.tan(np.pi / 4 * t)


@pytest.fixture(params=[noise.noise_levels, cosine])
def schedule(request, monkeypatch):
    """The schedule of noise.py, and another in its place."""
    monkeypatch.setattr(noise, "noise_levels", request.param)
    return request.param


@pytest.fixture
def rates_shown(schedule, monkeypatch):
    """A slot weighs what it is masked with, so that a batch shows it."""
    monkeypatch.setattr(noise, "noise_levels", lambda *given: 2 * schedule(*given)[:1])


def test_the_schedule_is_linear():
    """The one here: t is uniform, slots are masked with probability t, and weigh 1/t. Another has its own test."""
    for t_min in each([0.0, 0.3, 0.8]):
        rate, weight = noise.noise_levels(1000, t_min, np.random.default_rng(0))
        assert np.sort(rate) == pytest.approx(np.linspace(t_min, 1, 1000), abs=0.001)
        assert weight == pytest.approx(1 / rate)


def test_a_schedule_masks_with_probabilities_from_0_to_1_one_in_each_of_n_parts(schedule):
    rng = np.random.default_rng(0)
    for n in each([0, 1, 2, 16]):
        rate, weight = (np.stack(x) for x in zip(*(schedule(n, 0.0, rng) for _ in range(400))))
        assert rate.shape == weight.shape == (400, n) and ((0 < rate) & (rate <= 1)).all() and (weight > 0).all()
        parts = np.sort(rate, axis=1)
        assert (parts[:, :-1].max(0, initial=0) <= parts[:, 1:].min(0, initial=1)).all(), "no two in one part"
        assert len({*rate.argmax(1)}) == n if n else True, "who is masked most has to be random"


def test_a_schedule_weighs_by_its_elbo(schedule):
    """Whatever a slot loses at a masking probability a, its mean has to be the integral of loss / a over a from 0 to 1.
    Tried with a, a^2, a^3 and a^4: 1, 1/2, 1/3 and 1/4. Of these only weights a'(t) / a(t) give all."""
    rate, weight = schedule(20_000, 0.0, np.random.default_rng(0))
    for power in each([1, 2, 3, 4]):
        assert (weight * rate**power).mean() == pytest.approx(1 / power, rel=1e-3)


def test_with_t_min_the_levels_are_those_of_a_t_above_it(schedule):
    rng = np.random.default_rng(0)
    levels = np.sort(schedule(10_000, 0.0, rng)[0])
    for t_min in each([0.3, 0.8]):
        among = np.linspace(t_min, 1, 1000)
        assert np.sort(schedule(1000, t_min, rng)[0]) == pytest.approx(np.quantile(levels, among), abs=0.003)


# ---------------------------------------------------------------- how much noise


def slot_draws(tokenizer, attention, n_batches, weight="elbo", t_min=0.0):
    """Two spans of 5 x 4 slots in each of 8 rows: arrays (batches, 8, 2, 20) masked and weight."""
    example = Example("Tell", (Round("", (Span("food", "fish", 5), Span("play", "lakes", 5))),))
    sequences = [Sequence(encode_example(example, tokenizer, attention))] * 8
    rng = np.random.default_rng(0)
    batches = [make_batch(sequences, [0] * 8, tokenizer, rng, weight, t_min) for _ in range(n_batches)]
    shape = (n_batches, 8, 2, 20)
    masked = np.stack([(b.token[in_span(b)] == tokenizer.mask).numpy() for b in batches])
    return masked.reshape(shape), np.stack([b.weight[in_span(b)].numpy() for b in batches]).reshape(shape)


def test_each_span_draws_its_own_level_and_all_its_slots_share_it(tokenizer, schedule):
    _, weight = slot_draws(tokenizer, "sparse", 50)
    assert (weight == weight[..., :1]).all()
    assert (weight[:, :, 0, 0] != weight[:, :, 1, 0]).all()


def test_dense_spans_share_the_rounds_level(tokenizer, schedule):
    _, weight = slot_draws(tokenizer, "dense", 50)
    assert (weight == weight[:, :, :1, :1]).all()
    assert (weight[:, 1:, 0, 0] != weight[:, :-1, 0, 0]).all()


@pytest.mark.parametrize("attention, draws", [("sparse", 16), ("dense", 8)])
def test_levels_are_stratified_over_the_batch(tokenizer, rates_shown, attention, draws):
    _, rate = slot_draws(tokenizer, attention, 100)
    parts = np.sort(rate[..., : draws // 8, 0].reshape(100, draws), axis=1)
    assert (parts[:, :-1].max(0) <= parts[:, 1:].min(0)).all()


def test_slots_are_masked_with_the_probability_of_their_span(tokenizer, rates_shown):
    masked, rate = slot_draws(tokenizer, "sparse", 400)
    assert masked.mean() == pytest.approx(rate.mean(), abs=0.005)
    share, rate = masked.mean(-1).ravel(), rate[..., 0].ravel()
    for low in np.arange(0, 1, 0.1):
        part = (rate >= low) & (rate < low + 0.1)
        assert abs(share[part].mean() - rate[part].mean()) < 0.02


def test_slots_are_masked_independently_given_their_level(tokenizer, rates_shown):
    masked, rate = slot_draws(tokenizer, "sparse", 400)
    off = masked - rate
    both = (off[..., :-1] * off[..., 1:]).mean()
    across = (off[:, :, 0] * off[:, :, 1]).mean()
    assert abs(both) < 0.005 and abs(across) < 0.005


def test_weighted_by_its_level_each_slot_counts_once_on_average(tokenizer, schedule):
    masked, weight = slot_draws(tokenizer, "sparse", 800)
    assert (masked * weight).mean() == pytest.approx(1, abs=0.03)
    assert (masked * weight).mean(axis=(0, 1, 3)) == pytest.approx([1, 1], abs=0.06)


def test_uniform_weights_are_1_and_draw_the_same_noise(tokenizer, schedule):
    masked, weight = slot_draws(tokenizer, "sparse", 5, "uniform")
    assert (weight == 1).all()
    assert np.array_equal(masked, slot_draws(tokenizer, "sparse", 5, "elbo")[0])


def test_with_t_min_no_span_is_masked_less(tokenizer, rates_shown):
    rate = slot_draws(tokenizer, "sparse", 50, t_min=0.5)[1]
    lowest = noise.noise_levels(10_000, 0.5, np.random.default_rng(0))[0].min()
    assert lowest - 0.001 < rate.min() < lowest + 0.01


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
    for name in ("token", "position", "ranges", "target", "term", "weight"):
        assert torch.equal(getattr(a, name), getattr(b, name))
    assert not torch.equal(a.token, c.token)


def test_padding_predicts_nothing_and_sees_only_the_first_token(tokenizer):
    sequences, rounds, batch = random_batch(tokenizer)
    stops = [s.stop(r) for s, r in zip(sequences, rounds)]
    assert batch.n_tokens == sum(stops) < batch.token.numel()
    for b, stop in enumerate(stops):
        assert (batch.token[b, stop:] == tokenizer.pad).all()
        assert (batch.target[b, stop:] == IGNORE).all() and not in_span(batch)[b, stop:].any()
        seen = visible(batch.ranges[b : b + 1, stop:], batch.token.shape[1])
        assert not seen[..., 1:].any() and seen[..., 0].all()  # a query that sees nothing is NaN


def test_no_token_sees_the_padding(tokenizer):
    for attention in ATTENTION:
        sequences, rounds, batch = random_batch(tokenizer, attention=attention)
        for b, (s, r) in enumerate(zip(sequences, rounds)):
            assert not visible(batch.ranges, batch.token.shape[1])[b, :, s.stop(r) :].any()


def test_a_row_of_a_batch_has_the_columns_of_its_sequence(tokenizer):
    sequences, rounds, batch = random_batch(tokenizer)
    for b, (s, r) in enumerate(zip(sequences, rounds)):
        n = s.stop(r)
        assert np.array_equal(batch.ranges[b, :n], s.ranges[:n])
        assert np.array_equal(batch.position[b, :n], np.arange(n))


def test_a_batch_without_any_span_has_plan_targets_alone(tokenizer):
    sequences = [Sequence(encode_example(random_example(n, tokenizer, spans=0), tokenizer)) for n in range(3)]
    batch = make_batch(sequences, [0, 0, 0], tokenizer, np.random.default_rng(0))
    assert not in_span(batch).any() and (batch.weight == 1).all()
    assert ((batch.target != IGNORE).sum(1) > 0).all()


def test_targets_in_a_round_are_its_slots_and_its_plan_targets(tokenizer):
    for seed in range(20):
        layout, _, places = laid_out(random_example(seed, tokenizer), tokenizer, "sparse")
        expected, sequence = oracle_target(places, layout.token), Sequence(layout)
        for r in range(sequence.n_rounds):
            mine = [p for p in places if p.round == r]
            assert sequence.targets_in(r) == sum(p.content or expected[p.i] != IGNORE for p in mine)
