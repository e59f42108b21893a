"""Which examples make a batch, what a batch says of itself, and what training says of its speed."""

import json
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import each, in_span, random_example, small_model

from config import METHODS, MethodConfig, TrainConfig
from data import write_dataset
from loss import JointLoss
from masks import PLAN, SLOT, encode_example, visible
from methods import encode
from model import ModelConfig
from noise import IGNORE, Sequence, make_batch
from plumbing.device import PEAKS, fast_dtype, utilization
from plumbing.settings import refuse_idle
from tags import Example, Round, Span
from train import Trainer
from training import batches
from training.batches import Batches
from training.bookkeeping import flops_of


@pytest.fixture(scope="module")
def sequences(tokenizer):
    return [Sequence(encode_example(random_example(seed, tokenizer), tokenizer)) for seed in range(12)]


def stub(n, *targets):
    """As much of a Sequence as Batches asks: its length and how many targets each round has."""
    return SimpleNamespace(n_rounds=len(targets), targets_in=lambda r: targets[r], stop=lambda r: n)


def test_an_epoch_shows_each_example_once():
    for n, size in each([(12, 3), (13, 3), (32, 2), (5, 5)]):
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


@pytest.mark.parametrize("even, shares", [(False, (0.05, 0, 0.75, 0.2)), (True, (1 / 3, 0, 1 / 3, 1 / 3))])
def test_rounds_are_picked_in_proportion_to_what_they_predict_or_evenly(even, shares):
    """Never one that predicts nothing."""
    batches, n = Batches([stub(10, 2, 0, 30, 8)], 1, seed=0, even_rounds=even), 2000
    picked = Counter(batches[i][1][0] for i in range(n))
    assert picked[1] == 0
    for round_, share in enumerate(shares):
        assert abs(picked[round_] / n - share) <= 4 * (share * (1 - share) / n) ** 0.5


def test_little_of_a_batch_is_padding():
    rng = np.random.default_rng(0)
    batches = Batches([stub(n, 1) for n in rng.integers(10, 200, 512).tolist()], 8, seed=0)
    lengths = np.array([[s.stop(0) for s in batches[i][0]] for i in range(64)])
    assert 1 - lengths.mean() / lengths.max(axis=1).mean() < 0.1, "in random order it is 0.43"


def test_windows_of_16_batches_are_sorted_by_length():
    """So the 8 of a batch span about a 16th of all lengths, whatever the number of examples: an epoch is no sorted list."""
    batches = Batches([stub(n, 1) for n in range(512)], 8, seed=0)
    lengths = [[s.stop(0) for s in batches[i][0]] for i in range(64)]
    spans = [max(some) - min(some) for some in lengths]
    assert 512 / 16 * 0.6 < np.mean(spans) < 512 / 16 * 1.1
    middles = [np.mean(some) for some in lengths]
    assert abs(np.corrcoef(middles, range(64))[0, 1]) < 0.4, "batches are shuffled again"


def test_too_few_examples_for_a_batch_are_refused():
    with pytest.raises(ValueError, match="--batch 3: .*2 training examples"):
        Batches([stub(5, 1)] * 2, 3, 0)


def test_work_counts_the_products_that_are_needed_and_no_others(sequences, tokenizer):
    """Per token all matrices of the blocks, per visible key the attention, per target its own logits."""
    model = small_model(tokenizer.vocab_size)
    loss, c = JointLoss(model, tokenizer.pad + 1), model.config
    batch = make_batch(sequences[:5], [0] * 5, tokenizer, np.random.default_rng(0))
    matrices = sum(p.numel() for block in model.blocks for p in block.parameters() if p.ndim == 2)
    keys = int(
        sum(visible(batch.ranges, batch.token.shape[1])[b, : s.stop(0)].sum() for b, s in enumerate(sequences[:5]))
    )
    predicted = batch.target != IGNORE
    plan, slots = int((predicted & ~in_span(batch)).sum()), int((predicted & in_span(batch)).sum())
    logits = 2 * c.d_model * (plan * tokenizer.vocab_size + slots * (tokenizer.pad + 1))
    forward = 2 * matrices * sum(s.stop(0) for s in sequences[:5]) + 4 * c.n_layer * c.d_model * keys + logits
    assert flops_of(loss, batch) == pytest.approx(3 * forward, rel=0.02)  # norms are counted as if they were matrices
    unpredicted = make_batch(sequences[:5], [0] * 5, tokenizer, np.random.default_rng(0))
    unpredicted.target[:] = IGNORE
    assert (
        flops_of(loss, batch) - flops_of(loss, unpredicted) == pytest.approx(3 * logits, rel=1e-6)
        and logits > 0.1 * forward
    )


# ---------------------------------------------------------------- the data set


def planned(n):
    """Examples of two rounds with two spans each."""
    words = ["otter", "fish", "river", "crab", "coast"]
    rounds = lambda i: tuple(Round("", (Span("food", words[i % 5]), Span("play", words[i % 3]))) for _ in range(2))
    return [Example(f"{words[i % 5]} {i}", rounds(i)) for i in range(n)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("data")
    write_dataset(path, {"train": planned(60), "val": planned(5)}, 256 + 74 + 40, 4)
    return path


def training_data(folder, method="planned", **changed):
    shape = ModelConfig(n_layer=1, d_model=8, n_head=1, n_kv_head=1, d_ff=8)
    return Trainer(TrainConfig(data=str(folder), batch=2, **changed), shape, MethodConfig(method)).data


def pads_of(sequence, tokenizer):
    """Of each span: how many [PAD] its text is followed by, and how many its plan asks for."""
    lengths = [tokenizer.length_of(int(i)) for i in sequence.token if tokenizer.length_of(int(i))]
    for span, length in zip(np.unique(sequence.span[sequence.span >= 0]), lengths):
        slots = sequence.token[(sequence.span == span) & (sequence.kind == SLOT)]
        text = int((slots != tokenizer.pad).sum())
        assert (slots[text:] == tokenizer.pad).all()
        yield len(slots) - text, length * tokenizer.unit - text


def test_spans_are_padded_to_their_planned_length(folder):
    data = training_data(folder)
    for sequence in data.train + data.validation:
        pads, planned = zip(*pads_of(sequence, data.tokenizer))
        assert pads == planned


def test_only_the_first_examples_train_if_a_number_is_given(folder):
    few, all_of_them = training_data(folder, train_on=7), training_data(folder)
    assert [s.token.tolist() for s in few.train] == [s.token.tolist() for s in all_of_them.train[:7]]
    assert len(all_of_them.train) == 60 and len(few.validation) == len(all_of_them.validation)


def test_with_extra_pads_training_spans_are_padded_at_random_but_plans_and_validation_are_as_before(folder):
    data, exact = training_data(folder, extra_pads=10), training_data(folder)
    pads = [pair for sequence in data.train for pair in pads_of(sequence, data.tokenizer)]
    counted = Counter(drawn for drawn, _ in pads)
    assert set(counted) == set(range(11)) and max(counted.values()) < 0.2 * len(pads)
    assert any(drawn > planned for drawn, planned in pads) and any(drawn < planned for drawn, planned in pads)
    for with_pads, without in zip(data.train, exact.train):
        written = lambda s: s.token[s.kind == PLAN].tolist()
        assert written(with_pads) == written(without)
    assert all(np.array_equal(a.token, b.token) for a, b in zip(data.validation, exact.validation))
    again = training_data(folder, extra_pads=10)
    assert all(np.array_equal(a.token, b.token) for a, b in zip(data.train, again.train))


@pytest.mark.parametrize("method", ["planned", "parallel-ar"])
def test_with_extra_pads_a_span_without_text_keeps_a_slot(tokenizer, method):
    """Or there would be nothing in it to predict."""
    example = Example("p", (Round(spans=(Span("food", "", 1), Span("play", "fish", 1))),))
    layout = encode(example, tokenizer, MethodConfig(method), lambda: 0)
    assert [tokenizer.name(t) for t, kind in zip(layout.token, layout.kind) if kind == SLOT][0] == "[PAD]"
    make_batch([Sequence(layout)], [0], tokenizer, np.random.default_rng(0), causal=float(method == "parallel-ar"))


NO_EFFECT = [
    ("ar", dict(topics="numbers")), ("ar", dict(rounds="one")), ("ar", dict(repeat_topic=False)), ("ar", dict(t_min=0.5)),
    ("ar", dict(weight="elbo")), ("ar", dict(history="noised")), ("ar", dict(block=8)), ("planned", dict(block=8)),
    ("parallel-ar", dict(t_min=0.5)), ("parallel-ar", dict(weight="elbo")), ("parallel-ar", dict(history="noised")),
    ("block", dict(topics="numbers")), ("block", dict(rounds="one")), ("diffusion", dict(history="noised")),
    ("ar", dict(even_rounds=True)), ("block", dict(even_rounds=True)), ("planned", dict(draft_weight=1.0)),
    ("joint", dict(lora_alpha=64.0)), ("ar", dict(span_weight=2.0)), ("block", dict(span_weight=2.0)), ("planned", dict(lr=1.0, lora=8)),
    ("planned", dict(weight_decay=0.1, lora=8)), ("planned", dict(history="noised", rounds="one")),
    ("planned", dict(even_rounds=True, rounds="one")),
]  # fmt: skip


def test_a_setting_that_would_change_nothing_is_refused(folder):
    for method, settings in each(NO_EFFECT):
        name = next(iter(settings))
        config = TrainConfig(**{k: v for k, v in settings.items() if hasattr(TrainConfig, k)})
        chosen = MethodConfig(method, **{k: v for k, v in settings.items() if hasattr(MethodConfig, k)})
        why = f"--(no-)?{name}.*: .*{method}|--(no-)?{name}.*(with|by|without) (--|AdamW)"
        with pytest.raises(ValueError, match=why):
            refuse_idle(chosen, chosen)
            refuse_idle(config, chosen)


def test_what_changes_something_is_not_refused():
    """Every setting that may be refused is taken by some method, and each method takes its defaults."""
    for method in each(METHODS):
        refuse_idle(TrainConfig(), MethodConfig(method))
        changes = [dict(extra_pads=3), dict(weight="elbo"), dict(t_min=0.5), dict(history="noised"), dict(ahead=2)]
        chosen, taken = MethodConfig(method), {"written": 5, "given": 2, "none": 1}
        expected = 2 if chosen.causal == 1 else taken[chosen.plan]
        assert sum(not refused(TrainConfig(**changed), chosen) for changed in changes) == expected


def refused(*configs):
    try:
        refuse_idle(*configs)
    except ValueError:
        return True


def test_extra_pads_without_a_plan_of_the_models_own_are_refused(folder):
    for method in each(["ar", "block", "diffusion"]):
        with pytest.raises(ValueError, match=f"--extra_pads 3: no plan is written with {method}"):
            training_data(folder, method, extra_pads=3)


def test_reading_and_encoding_say_how_far_they_are(folder, monkeypatch, capsys):
    clock = iter(range(10**6))
    monkeypatch.setattr(batches.time, "monotonic", lambda: next(clock))
    training_data(folder)
    said = capsys.readouterr().out.splitlines()
    assert said[0].startswith(f"reading {folder}. CPU threads: ")
    assert said[1:4] == [f"encoded {n} of 60 examples" for n in (3, 6, 9)]


def test_a_bad_example_is_found_before_the_training_starts(folder, tmp_path):
    for name in ("tokenizer.json", "train.jsonl", "val.jsonl"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    row = {"prompt": "Otters", "answer": "<topic> food 1</topic><async> food: otter fish river crab coast</async><eos>"}
    with (tmp_path / "train.jsonl").open("a") as file:
        file.write(json.dumps(row) + "\n")
    with pytest.raises(ValueError, match="train.jsonl, line 61: topic 'food'"):
        training_data(tmp_path)
    (tmp_path / "val.jsonl").write_text("")
    (tmp_path / "train.jsonl").write_bytes((folder / "train.jsonl").read_bytes())
    with pytest.raises(ValueError, match="60 training and 0 validation examples"):
        training_data(tmp_path)


def test_processes_share_the_micro_batches_of_an_update(folder):
    data = training_data(folder, accumulate=4)
    whole = data.micro_batches(3)
    shared = [data.micro_batches(3, rank, 2) for rank in range(2)]
    for i, batch in enumerate(whole):
        assert torch.equal(shared[i % 2][i // 2].token, batch.token)


def test_a_batch_knows_where_it_predicts(sequences, tokenizer):
    for size in (1, 5):
        rounds = [s.n_rounds - 1 for s in sequences[:size]]
        batch = make_batch(sequences[:size], rounds, tokenizer, np.random.default_rng(0))
        plan, slots = ([divmod(i, batch.token.shape[1]) for i in places.tolist()] for places in batch.places)
        predicted = [tuple(place) for place in (batch.target != IGNORE).nonzero().tolist()]
        assert plan == [place for place in predicted if not in_span(batch)[place]] and plan
        assert slots == [place for place in predicted if in_span(batch)[place]]
        assert all(map(torch.equal, batch.to("cpu").places, batch.places))


def test_speed_is_told_as_a_share_of_what_the_device_could_do_where_that_is_known(monkeypatch):
    assert utilization(3.2e11, torch.device("cpu")) == "0.32 TFLOP/s"
    for name, share in (("NVIDIA H100 80GB HBM3", " (50.0% MFU)"), ("NVIDIA GeForce GTX 1080", "")):
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
        assert utilization(PEAKS["H100"] / 2, torch.device("cuda")) == "494 TFLOP/s" + share


@pytest.mark.parametrize(("amx", "bf16"), [(False, False), (True, True), (False, True)])
def test_a_cpu_that_multiplies_in_bfloat16_trains_in_it(monkeypatch, amx, bf16):
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx, raising=False)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: bf16, raising=False)
    assert fast_dtype("cpu") == (torch.bfloat16 if amx or bf16 else torch.float32)
