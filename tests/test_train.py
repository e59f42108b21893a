"""The joint loss against a naive loop, updates, and what a training refuses."""

import copy
import re

import numpy as np
import pytest
import torch
from conftest import WORDS, each, in_span
from runs import (
    examples,
    losses,
    make,
    said,
    settings,
)

import train
from config import MethodConfig, SampleConfig
from data import write_dataset
from drafting.training import ArrangeDrafts
from masks import SLOT, encode_example
from model import ModelConfig
from noise import IGNORE, Batch, Sequence, Term, make_batch
from sample import Sampler
from tags import Example, Round, Span
from tokenizer import Tokenizer
from train import JointLoss, Trainer, counts, term_weights, validate
from training import batches, bookkeeping
from training.optim import Optimizer


@pytest.fixture(scope="module")
def sequences(tokenizer):
    return [Sequence(encode_example(e, tokenizer)) for e in examples(tokenizer, 12)]


def noised(sequences, tokenizer, weight="elbo", seed=0):
    rng = np.random.default_rng(seed)
    return make_batch(sequences, [int(rng.integers(s.n_rounds)) for s in sequences], tokenizer, rng, weight)


# ---------------------------------------------------------------- loss


@torch.no_grad()
def naive_loss(model, batch, pad):
    """Position by position: plan and text over the whole vocabulary, slots over text and [PAD], weighted."""
    logits = model.logits(model(batch.token, batch.position, batch.ranges))
    plan = span = 0.0
    for b, t in (batch.target != IGNORE).nonzero().tolist():
        target = batch.target[b, t]
        if in_span(batch)[b, t]:
            span -= float(logits[b, t, : pad + 1].log_softmax(-1)[target] * batch.weight[b, t])
        else:
            plan -= float(logits[b, t].log_softmax(-1)[target])
    return plan, span


@pytest.mark.parametrize("weight", ["elbo", "uniform"])
def test_the_joint_loss_equals_a_loop_over_positions(model, tokenizer, sequences, weight):
    batch = noised(sequences[:6], tokenizer, weight)
    sums = JointLoss(model, tokenizer.pad + 1)(batch)[:2]
    assert sums.tolist() == pytest.approx(naive_loss(model, batch, tokenizer.pad), rel=1e-5)


def test_a_slots_weight_never_touches_the_plan_loss(model, tokenizer, sequences):
    batch = noised(sequences[:6], tokenizer)
    loss = JointLoss(model, tokenizer.pad + 1)
    plan, span = loss(batch)[:2]
    batch.weight *= 7
    assert loss(batch)[0].item() == pytest.approx(plan.item(), rel=1e-6)
    assert loss(batch)[1].item() == pytest.approx(7 * span.item(), rel=1e-5)


def test_plan_and_spans_are_counted_apart(tokenizer, sequences):
    batch = noised(sequences, tokenizer)
    plan = [
        t
        for row, spans in zip(batch.target.tolist(), in_span(batch).tolist())
        for t, s in zip(row, spans)
        if not s and t >= 0
    ]
    masked = int((batch.token == tokenizer.mask).sum())
    assert counts(batch, "elbo")[:2].tolist() == [len(plan), int(in_span(batch).sum())]
    assert counts(batch, "uniform")[:2].tolist() == [len(plan), masked]
    assert masked < int(in_span(batch).sum())


@torch.no_grad()
def test_the_plan_nll_is_that_of_the_clean_sequences_each_round_counted_once(model, tokenizer, sequences):
    total, n = 0.0, 0
    for s in sequences:
        logits = model.logits(model(*(torch.from_numpy(x)[None] for x in (s.token, s.position, s.ranges))))[0]
        for i in np.flatnonzero(s.next != IGNORE):
            total, n = total - float(logits[i].log_softmax(-1)[s.next[i]]), n + 1
    assert max(s.n_rounds for s in sequences) > 2
    assert validate(JointLoss(model, tokenizer.pad + 1), sequences, tokenizer)["plan"] == pytest.approx(
        total / n, rel=1e-5
    )


@torch.no_grad()
def test_the_elbo_of_a_span_of_one_slot_is_its_likelihood_within_its_standard_error(model, tokenizer):
    tokenizer = Tokenizer(tokenizer.tokens, unit=1)
    words = [w for w in dict.fromkeys(WORDS) if len(tokenizer.encode(w)) == 1][:4]
    made = [Example(w, (Round("", (Span("food", word, 1),)),)) for w, word in zip(WORDS, words)]
    sequences, exact = [Sequence(encode_example(e, tokenizer)) for e in made], []
    for s in sequences:
        (slot,) = np.flatnonzero(s.kind == SLOT)
        token = torch.from_numpy(np.where(s.kind == SLOT, tokenizer.mask, s.token))[None]
        hidden = model(token, torch.from_numpy(s.position)[None], torch.from_numpy(s.ranges)[None])[0, slot]
        exact.append(-float(model.logits(hidden, tokenizer.pad + 1).log_softmax(-1)[s.token[slot]]))
    loss = JointLoss(model, tokenizer.pad + 1)
    errors = []
    for draws in (100, 400):
        found = validate(loss, sequences, tokenizer, draws=draws)
        span, error = found["span"], found["span_error"]
        assert abs(span - np.mean(exact)) < 4 * error
        errors.append(error)
    assert errors[1] < 0.8 * errors[0] < 0.2 * np.mean(exact), "falls about as 1 / sqrt(draws)"
    assert "span_error" not in validate(loss, sequences, tokenizer), "one draw tells no error"


# ---------------------------------------------------------------- updates


@pytest.fixture
def exact(monkeypatch):
    """Trainers compute in float32, also where bfloat16 is faster."""
    monkeypatch.setattr(train, "fast_dtype", lambda device: torch.float32)


def test_an_update_weighs_spans_and_drafts_beside_the_plan(tokenizer, folder, tmp_path, exact):
    """The gradient that the optimizer gets: denoised and causal spans by span_weight, all drafts by draft_weight."""
    trainer = make(folder, tmp_path, method="joint", ahead=2, span_weight=0.3, draft_weight=0.7, batch=8, clip=1e9)
    reference, rng = copy.deepcopy(trainer.model), np.random.default_rng([0, 0, 0])
    batch = make_batch(*trainer.data.batches[0], trainer.tokenizer, rng, "uniform", 0.0, "clean", 0.5, ArrangeDrafts(2))
    plan, span, causal, *drafts = JointLoss(reference, trainer.tokenizer.pad + 1)(batch) / counts(batch, "uniform")
    assert len({round(loss.item(), 5) for loss in (plan, span, causal, *drafts)}) == 5
    (plan + 0.3 * (span + causal) + 0.7 * sum(drafts)).backward()
    grads = []
    trainer.optimizer.step = lambda step: grads.extend(p.grad.clone() for p in trainer.model.parameters())
    assert trainer.update()[:2].tolist() == pytest.approx((plan.item(), span.item()), rel=1e-5)
    for grad, p in zip(grads, reference.parameters()):
        torch.testing.assert_close(grad, p.grad, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("weight", ["uniform", "elbo"])
def test_the_losses_of_an_update_in_bfloat16_are_near_those_in_float32(folder, tmp_path, monkeypatch, weight):
    """Near: bfloat16 has 8 bits, the sums over tokens are in float32."""
    losses = []
    for dtype in (torch.float32, torch.bfloat16):
        monkeypatch.setattr(train, "fast_dtype", lambda device: dtype)
        losses.append(make(folder, tmp_path / str(dtype), weight=weight).update()[:2].tolist())
    assert losses[1] == pytest.approx(losses[0], rel=3e-4) and losses[1] != losses[0]


def merged(parts, pad):
    """Micro-batches as one batch."""
    width = max(part.token.shape[1] for part in parts)
    fill = dict(token=pad, position=0, ranges=0, target=IGNORE, term=Term.PLAN, weight=1.0)
    columns = {}
    for name, value in fill.items():
        made = []
        for part in parts:
            x = getattr(part, name)
            more = torch.full((x.shape[0], width - x.shape[1], *x.shape[2:]), value, dtype=x.dtype)
            if name == "ranges":
                more[..., 0] = 1
            made.append(torch.cat([x, more], dim=1))
        columns[name] = torch.cat(made)
    return Batch(**columns, n_tokens=sum(part.n_tokens for part in parts))


@pytest.mark.parametrize("weight", ["uniform", "elbo"])
def test_accumulated_micro_batches_are_one_big_batch(folder, tmp_path, weight, exact):
    trainer = make(folder, tmp_path, accumulate=3, weight=weight)
    model = copy.deepcopy(trainer.model)
    parts = [
        make_batch(*trainer.data.batches[i], trainer.tokenizer, np.random.default_rng([0, 0, i]), weight)
        for i in range(3)
    ]
    batch = merged(parts, trainer.tokenizer.pad)
    sums = JointLoss(model, trainer.tokenizer.pad + 1)(batch) / counts(batch, weight).clamp(min=1)
    (sums @ term_weights(1.0, 0.3).to(sums)).backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    Optimizer(model, trainer.config).step(0)
    assert trainer.update()[:-1].tolist() == pytest.approx(sums.tolist(), rel=1e-5)
    for a, b in zip(trainer.model.parameters(), model.parameters()):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


def test_every_micro_batch_of_every_update_has_noise_of_its_own(folder, tmp_path, monkeypatch):
    states, noise = [], batches.make_batch

    def noting(sequences, rounds, tokenizer, rng, *more):
        states.append(str(rng.bit_generator.state))
        return noise(sequences, rounds, tokenizer, rng, *more)

    monkeypatch.setattr(batches, "make_batch", noting)
    trainer = make(folder, tmp_path, accumulate=2)
    for _ in range(3):
        trainer.update()
    assert len(set(states)) == len(states) == 6


# ---------------------------------------------------------------- as on a GPU


def test_training_and_validation_multiply_in_the_type_of_the_device(folder, tmp_path, monkeypatch):
    """And in no float64 on it, which an mps device lacks."""
    monkeypatch.setattr(train, "fast_dtype", lambda device: torch.bfloat16)
    trainer, types = make(folder, tmp_path), []
    trainer.model.blocks[0].down.register_forward_hook(lambda module, args, out: types.append(out.dtype))
    assert trainer.update().dtype == torch.float32
    trainer.validate()
    assert len(types) > 1 and set(types) == {torch.bfloat16}
    trainer.progress.load(trainer.progress.state())
    assert {losses.dtype for losses in trainer.progress.recent} == {torch.float32}


# ---------------------------------------------------------------- settings


NONSENSE = [
    ("lr", "nan"), ("lr", -1), ("adam_lr", "inf"), ("clip", 0), ("clip", "nan"), ("span_weight", -1), ("warmup", -1),
    ("seed", -1), ("seed", 2**63), ("seed", 2**70), ("seed", "9" * 400), ("batch", 0), ("batch", -1), ("steps", 0),
    ("accumulate", 0), ("t_min", 1), ("weight_decay", -1), ("validate_on", 0), ("validate_every", 0), ("log_every", 0),
    ("block", 10**8), ("block", -1), ("rope_theta", 0), ("n_layer", 10**9), ("weight", "heavy"), ("history", "none"),
    ("extra_pads", -1), ("device", "abacus"), ("decay", 0), ("decay", 1.5), ("train_on", -1),
]  # fmt: skip


def test_a_setting_that_makes_no_sense_is_refused_by_name_before_anything_is_read(monkeypatch, capsys):
    for name, value in each(NONSENSE):
        assert re.match(rf"train.py: --{name} {value}(\.0)?: expected", said(monkeypatch, f"--{name}", value))
        assert capsys.readouterr().out == ""


def test_what_does_not_fit_machine_or_data_is_said_in_a_line(monkeypatch, folder, fresh):
    for options, words in each([
    (("--attention", "flex"), "--attention flex"), (("--attention", "kernel"), "--attention kernel"),
    (("--batch", 17), "--batch 17: there are only 16 training examples"),
    (("--init", "none"), "none does not exist"),
    (("--method", "ar", "--extra_pads", 3), "--extra_pads 3: no plan is written with ar"),
]):  # fmt: skip
        tmp_path = fresh()
        assert words in said(monkeypatch, "--device", "cpu", "--data", folder, "--out", tmp_path / "run", *options)
        assert not (tmp_path / "run").exists()


def test_what_several_processes_cannot_do_is_said(monkeypatch, folder, fresh):
    for device, accumulate, words in each([
    ("mps", 2, "several processes cannot share an mps device"),
    ("cpu", 3, "--accumulate 3: expected a multiple of the 2 processes"),
]):  # fmt: skip
        tmp_path = fresh()
        monkeypatch.setenv("WORLD_SIZE", "2")
        monkeypatch.setattr(bookkeeping.dist, "init_process_group", lambda backend: None)
        monkeypatch.setattr(bookkeeping, "find", torch.device)
        with pytest.raises(ValueError, match=words):
            make(folder, tmp_path, device=device, accumulate=accumulate)


# ---------------------------------------------------------------- learning


LEARNT = (
    Example(
        "habitat",
        (
            Round("", (Span("habitat", "Rivers and lakes."), Span("food", "It eats fish."))),
            Round("In short: an animal."),
        ),
    ),
    Example("kitchen", (Round("Here:", (Span("tips", "sharpen the knife"), Span("rest", "rest the dough"))),)),
    Example("play", (Round("The otter swims."),)),
    Example(
        "lakes", (Round("", (Span("play", ""), Span("coasts", "marshes"))), Round("", (Span("food", "crabs, frogs"),)))
    ),
)


def test_a_model_that_overfits_four_examples_answers_them_exactly(tmp_path):
    write_dataset(tmp_path, {"train": LEARNT, "val": LEARNT}, 256 + 74 + 40, 4)
    config = settings(tmp_path, tmp_path / "run", batch=4, steps=300, warmup=10, lr=0.02, adam_lr=0.01,
                      validate_every=300, log_every=10)  # fmt: skip
    Trainer(config, ModelConfig(n_layer=2, d_model=64, n_head=2, n_kv_head=2, d_ff=128), MethodConfig()).train()
    rows = losses(tmp_path / "run")
    assert float(rows[-1]["plan"]) < 0.1 * float(rows[0]["plan"]) and float(rows[-1]["span"]) < 0.1 * float(
        rows[0]["span"]
    )
    sampler = Sampler.load(tmp_path / "run" / "model.safetensors", SampleConfig(max_tokens=120))
    for example, answer in zip(LEARNT, sampler.answer([e.prompt for e in LEARNT])):
        made = [Round(r.text, tuple(Span(s.topic, s.text) for s in r.spans)) for r in answer.decoded()]
        assert tuple(made) == example.rounds
