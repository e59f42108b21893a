"""Which examples make a batch, what a batch says of itself, and what training says of its speed."""

from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import random_example

from batches import Batches
from device import PEAKS, utilization
from masks import encode_example, visible
from noise import IGNORE, Sequence, make_batch


@pytest.fixture(scope="module")
def sequences(tokenizer):
    return [Sequence(encode_example(random_example(seed, tokenizer), tokenizer)) for seed in range(12)]


def stub(n, *targets):
    """As much of a Sequence as Batches asks: its length and how many targets each round has."""
    return SimpleNamespace(n_rounds=len(targets), targets_in=lambda r: targets[r], stop=lambda r: n)


@pytest.mark.parametrize("n, size", [(12, 3), (13, 3), (32, 2), (5, 5)])
def test_an_epoch_shows_each_example_once(n, size):
    made = [stub(10 + i, 1) for i in range(n)]
    batches, orders = Batches(made, size, seed=1), []
    for epoch in range(3):
        orders.append([made.index(s) for i in range(n // size) for s in batches[epoch * (n // size) + i][0]])
        assert len(set(orders[-1])) == len(orders[-1]) == n // size * size
    assert orders[0] != orders[1] or n == size


def test_a_micro_batch_is_a_function_of_its_number(sequences):
    def at(batches, number):
        picked, rounds = batches[number]
        return [id(s) for s in picked], rounds

    one = Batches(sequences, 2, seed=3)
    expected = [at(one, i) for i in range(20)]
    assert [at(Batches(sequences, 2, seed=3), i) for i in range(20)] == expected
    assert [at(one, i) for i in reversed(range(20))] == expected[::-1]
    assert [at(Batches(sequences, 2, seed=4), i) for i in range(20)] != expected


def test_rounds_are_picked_in_proportion_to_what_they_predict():
    batches, n = Batches([stub(10, 2, 0, 30, 8)], 1, seed=0), 2000
    picked = Counter(batches[i][1][0] for i in range(n))
    assert picked[1] == 0
    for round_, share in ((0, 0.05), (2, 0.75), (3, 0.2)):
        assert abs(picked[round_] / n - share) < 4 * (share * (1 - share) / n) ** 0.5


def test_little_of_a_batch_is_padding():
    rng = np.random.default_rng(0)
    batches = Batches([stub(n, 1) for n in rng.integers(10, 200, 512).tolist()], 8, seed=0)
    lengths = np.array([[s.stop(0) for s in batches[i][0]] for i in range(64)])
    assert 1 - lengths.mean() / lengths.max(axis=1).mean() < 0.1, "in random order it is 0.43"


def test_too_few_examples_for_a_batch_are_refused():
    with pytest.raises(ValueError, match="--batch 3.*2 examples"):
        Batches([stub(5, 1)] * 2, 3, 0)


def test_a_batch_knows_where_it_predicts_and_how_many_keys_it_sees(sequences, tokenizer):
    for size in (1, 5):
        rounds = [s.n_rounds - 1 for s in sequences[:size]]
        batch = make_batch(sequences[:size], rounds, tokenizer, np.random.default_rng(0))
        assert batch.n_keys == int(visible(batch.bounds, batch.token.shape[1]).sum())
        plan, slots = ([divmod(i, batch.token.shape[1]) for i in places.tolist()] for places in batch.places)
        predicted = [tuple(place) for place in (batch.target != IGNORE).nonzero().tolist()]
        assert plan == [place for place in predicted if not batch.in_span[place]] and plan
        assert slots == [place for place in predicted if batch.in_span[place]]
        assert all(map(torch.equal, batch.to("cpu").places, batch.places))


def test_speed_is_told_as_a_share_of_what_the_device_could_do_where_that_is_known(monkeypatch):
    assert utilization(3.2e11, torch.device("cpu")) == "0.32 TFLOP/s"
    for name, share in (("NVIDIA H100 80GB HBM3", " (50.0% MFU)"), ("NVIDIA GeForce GTX 1080", "")):
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
        assert utilization(PEAKS["H100"] / 2, torch.device("cuda")) == "494 TFLOP/s" + share
