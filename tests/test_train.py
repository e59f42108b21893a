"""The joint loss against a naive loop, and runs that are interrupted, split or resumed."""

import copy
import csv
import math
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from conftest import WORDS, random_example

import batches
import train
from data import Example, write_dataset
from masks import SLOT, encode_example
from methods import MethodConfig
from model import ModelConfig
from noise import IGNORE, Batch, Sequence, make_batch
from optim import Optimizer
from sample import SampleConfig, Sampler
from tags import Round, Span
from tokenizer import Tokenizer
from train import JointLoss, Log, Run, TrainConfig, Trainer, counts, validate

SHAPE = dict(n_layer=1, d_model=32, n_head=2, n_kv_head=1, d_ff=32)


def examples(tokenizer, n, first=0, **fixed):
    return [random_example(seed, tokenizer, **fixed) for seed in range(first, first + n)]


@pytest.fixture(scope="module")
def sequences(tokenizer):
    return [Sequence(encode_example(e, tokenizer)) for e in examples(tokenizer, 12)]


@pytest.fixture(scope="module")
def folder(tokenizer, tmp_path_factory):
    """A data set of 22 examples."""
    path = tmp_path_factory.mktemp("data")
    made = examples(tokenizer, 22)
    write_dataset(path, {"train": made[:16], "val": made[16:]}, 256 + 74 + 40, 4)
    return path


def noised(sequences, tokenizer, weight="elbo", seed=0):
    rng = np.random.default_rng(seed)
    return make_batch(sequences, [int(rng.integers(s.n_rounds)) for s in sequences], tokenizer, rng, weight)


# ---------------------------------------------------------------- loss


@torch.no_grad()
def naive_loss(model, batch, pad):
    """Position by position: plan and text over the whole vocabulary, slots over text and [PAD], weighted."""
    logits = model.logits(model(batch.token, batch.position, batch.bounds))
    plan = span = 0.0
    for b, t in (batch.target != IGNORE).nonzero().tolist():
        target = batch.target[b, t]
        if batch.in_span[b, t]:
            span -= float(logits[b, t, : pad + 1].log_softmax(-1)[target] * batch.weight[b, t])
        else:
            plan -= float(logits[b, t].log_softmax(-1)[target])
    return plan, span


@pytest.mark.parametrize("weight", ["elbo", "uniform"])
def test_the_joint_loss_equals_a_loop_over_positions(model, tokenizer, sequences, weight):
    batch = noised(sequences[:6], tokenizer, weight)
    sums = torch.stack(JointLoss(model, tokenizer.pad + 1)(batch))
    assert sums.tolist() == pytest.approx(naive_loss(model, batch, tokenizer.pad), rel=1e-5)


def test_a_slots_weight_never_touches_the_plan_loss(model, tokenizer, sequences):
    batch = noised(sequences[:6], tokenizer)
    loss = JointLoss(model, tokenizer.pad + 1)
    plan, span = loss(batch)
    batch.weight *= 7
    assert loss(batch)[0].item() == plan.item()
    assert loss(batch)[1].item() == pytest.approx(7 * span.item(), rel=1e-5)


def test_plan_and_spans_are_counted_apart(tokenizer, sequences):
    batch = noised(sequences, tokenizer)
    plan = [t for row, spans in zip(batch.target.tolist(), batch.in_span.tolist()) for t, s in zip(row, spans) if not s and t >= 0]
    masked = int((batch.token == tokenizer.mask).sum())
    assert counts(batch, "elbo").tolist() == [len(plan), int(batch.in_span.sum())]
    assert counts(batch, "uniform").tolist() == [len(plan), masked]
    assert masked < int(batch.in_span.sum())


@pytest.fixture
def exact(monkeypatch):
    """Trainers compute in float32, also where bfloat16 is faster."""
    monkeypatch.setattr(train, "fast_dtype", lambda device: torch.float32)


def test_an_update_weighs_the_span_loss_by_span_weight(tokenizer, folder, tmp_path, exact):
    """The gradient that the optimizer gets is that of plan + span_weight x span."""
    trainer = make(folder, tmp_path, span_weight=0.3, clip=1e9)
    reference = copy.deepcopy(trainer.model)
    batch = make_batch(*trainer.data.batches[0], trainer.tokenizer, np.random.default_rng([0, 0, 0]), "uniform")
    plan, span = torch.stack(JointLoss(reference, trainer.tokenizer.pad + 1)(batch)) / counts(batch, "uniform")
    (plan + 0.3 * span).backward()
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


@torch.no_grad()
def test_the_plan_nll_is_that_of_the_clean_sequences_each_round_counted_once(model, tokenizer, sequences):
    total, n = 0.0, 0
    for s in sequences:
        logits = model.logits(model(*(torch.from_numpy(x)[None] for x in (s.token, s.position, s.bounds))))[0]
        for i in np.flatnonzero(s.next != IGNORE):
            total, n = total - float(logits[i].log_softmax(-1)[s.next[i]]), n + 1
    assert max(s.n_rounds for s in sequences) > 2
    assert validate(JointLoss(model, tokenizer.pad + 1), sequences, tokenizer)[0] == pytest.approx(total / n, rel=1e-5)


@torch.no_grad()
def test_the_elbo_of_a_span_of_one_slot_is_its_likelihood_within_its_standard_error(model, tokenizer):
    tokenizer = Tokenizer(tokenizer.tokens, unit=1)
    words = [w for w in dict.fromkeys(WORDS) if len(tokenizer.encode(w)) == 1][:4]
    made = [Example(w, (Round("", (Span("food", word, 1),)),)) for w, word in zip(WORDS, words)]
    sequences, exact = [Sequence(encode_example(e, tokenizer)) for e in made], []
    for s in sequences:
        (slot,) = np.flatnonzero(s.kind == SLOT)
        token = torch.from_numpy(np.where(s.kind == SLOT, tokenizer.mask, s.token))[None]
        hidden = model(token, torch.from_numpy(s.position)[None], torch.from_numpy(s.bounds)[None])[0, slot]
        exact.append(-float(model.logits(hidden, tokenizer.pad + 1).log_softmax(-1)[s.token[slot]]))
    loss = JointLoss(model, tokenizer.pad + 1)
    errors = []
    for draws in (100, 400):
        _, span, error = validate(loss, sequences, tokenizer, draws=draws)
        assert abs(span - np.mean(exact)) < 4 * error
        errors.append(error)
    assert errors[1] < 0.8 * errors[0] < 0.2 * np.mean(exact), "falls about as 1 / sqrt(draws)"
    assert math.isnan(validate(loss, sequences, tokenizer)[2]), "one draw tells no error"


# ---------------------------------------------------------------- runs


def settings(folder, out, **changed):
    few = dict(data=str(folder), out=str(out), batch=2, steps=12, warmup=2, validate_every=4, log_every=1)
    return TrainConfig(**{**few, **changed})


def make(folder, out, method="planned", shape=SHAPE, **changed):
    return Trainer(settings(folder, out, **changed), ModelConfig(**shape), MethodConfig(method))


def run(folder, out, **changed):
    """Train to the end, going on with what is in `out`."""
    Run(make(folder, out, **changed)).run()


def losses(out):
    """log.csv without its clock."""
    return [{k: v for k, v in row.items() if k != "seconds"} for row in csv.DictReader((out / "log.csv").open())]


def command(folder, out, method="planned", **changed):
    """The same run as a command line."""
    options = {**vars(settings(folder, out, **changed)), **SHAPE, "method": method}
    return [f"--{name}={value}" for name, value in options.items() if not isinstance(value, bool)]


@pytest.fixture(scope="module", params=["planned", "ar"])
def whole(request, folder, tmp_path_factory):
    """A run of 12 updates without interruption: (method, losses)."""
    out = tmp_path_factory.mktemp("whole")
    run(folder, out, method=request.param)
    return request.param, losses(out)


def interrupt(trainer, step, how):
    """Let something happen in a run's update number `step`."""
    update = trainer.update

    def interrupted():
        if trainer.progress.step == step:
            how()
        return update()

    trainer.update = interrupted
    Run(trainer).run()


def test_a_run_logs_its_losses_and_leaves_its_weights(whole):
    method, rows = whole
    assert [int(row["step"]) for row in rows] == list(range(1, 13))
    assert [bool(row["val_plan"]) for row in rows] == [step % 4 == 0 for step in range(1, 13)]
    assert any(float(row["span"]) for row in rows) == (method == "planned")


@pytest.mark.parametrize("step", [0, 3, 5, 8])
def test_a_run_stopped_by_ctrl_c_goes_on_as_if_it_had_not_been(whole, folder, tmp_path, step):
    method, expected = whole
    interrupt(make(folder, tmp_path, method=method), step, lambda: signal.raise_signal(signal.SIGINT))
    assert len(losses(tmp_path)) == step + 1, "the update in progress is finished and saved"
    run(folder, tmp_path, method=method)
    assert losses(tmp_path) == expected


def test_ctrl_c_stops_no_compiler_that_a_run_has_called(folder, tmp_path):
    """It would leave half a file. The terminal sends the signal to all of its processes."""
    called = []

    def press():
        compiler = [sys.executable, "-c", "import os, signal; os.kill(os.getpid(), signal.SIGINT); print('done')"]
        called.append(subprocess.run(compiler, capture_output=True, text=True).stdout)
        os.kill(os.getpid(), signal.SIGINT)

    interrupt(make(folder, tmp_path), 2, press)
    assert called == ["done\n"] and len(losses(tmp_path)) == 3
    with pytest.raises(KeyboardInterrupt):  # now it does again what it did
        signal.raise_signal(signal.SIGINT)


class Crash(BaseException):
    """Ends a run on the spot, as a power cut would."""


@pytest.mark.parametrize("steps", [(2,), (4,), (7,), (11,), (5, 9), (6, 5, 4)])
def test_a_run_that_crashes_between_checkpoints_goes_on_as_if_it_had_not(whole, folder, tmp_path, steps):
    def crash():
        raise Crash

    method, expected = whole
    for step in steps:
        with pytest.raises(Crash):
            interrupt(make(folder, tmp_path, method=method), step, crash)
    run(folder, tmp_path, method=method)
    assert losses(tmp_path) == expected


SLOW = "import sys, time, train; u = train.Trainer.update; train.Trainer.update = lambda t: (time.sleep(0.1), u(t))[1]; train.command(train.main)"


def test_a_run_killed_at_any_moment_goes_on_as_if_it_had_not_been(whole, folder, tmp_path):
    method, expected = whole
    process = subprocess.Popen([sys.executable, "-c", SLOW, *command(folder, tmp_path, method=method)],
                               cwd=train.__file__.rpartition(os.sep)[0], stdout=subprocess.DEVNULL)  # fmt: skip
    log, deadline = tmp_path / "log.csv", time.time() + 120
    while process.poll() is None and time.time() < deadline and not (log.exists() and log.read_text().count("\n") > 6):
        time.sleep(0.01)
    time.sleep(0.1 * np.random.default_rng().random())
    process.kill()
    assert process.wait() == -signal.SIGKILL
    run(folder, tmp_path, method=method)
    assert losses(tmp_path) == expected


def test_the_log_of_a_resumed_run_is_whole_from_its_first_moment(tmp_path):
    path = tmp_path / "log.csv"
    log = Log(path, 0)
    for step in (1, 2, 3):
        log.write(dict(step=step, plan=1.0, span=2.0))
    resumed = Log(path, 2)  # noqa: F841  (it stays open, as that of a run that is killed)
    assert [row["step"] for row in losses(tmp_path)] == ["1", "2"]


def test_the_log_is_the_same_when_a_run_stops_between_two_of_its_lines(folder, tmp_path):
    rows = []
    for name, stop in (("whole", None), ("stopped", 5)):
        run = dict(log_every=4)
        if stop:
            interrupt(make(folder, tmp_path / name, **run), stop, lambda: signal.raise_signal(signal.SIGINT))
        run(folder, tmp_path / name, **run)
        rows.append(losses(tmp_path / name))
    assert rows[0] == rows[1]


def test_a_finished_run_does_nothing_more(whole, folder, tmp_path):
    run(folder, tmp_path, steps=2)
    before = losses(tmp_path), (tmp_path / "model.safetensors").read_bytes()
    run(folder, tmp_path, steps=2)
    assert (losses(tmp_path), (tmp_path / "model.safetensors").read_bytes()) == before


def test_other_settings_in_the_same_folder_are_refused(folder, tmp_path):
    run(folder, tmp_path, steps=1)
    with pytest.raises(ValueError, match=r"lr \(0.005, not 0.1\).*another --out"):
        make(folder, tmp_path, steps=1, lr=0.1)
    with pytest.raises(ValueError, match="model"):
        run(folder, tmp_path, steps=1, shape={**SHAPE, "n_layer": 2})


def merged(parts, pad):
    """Micro-batches as one batch."""
    width = max(part.token.shape[1] for part in parts)
    fill = dict(token=pad, position=0, bounds=0, target=IGNORE, in_span=False, weight=1.0)
    columns = {}
    for name, value in fill.items():
        made = []
        for part in parts:
            x = getattr(part, name)
            more = torch.full((x.shape[0], width - x.shape[1], *x.shape[2:]), value, dtype=x.dtype)
            if name == "bounds":
                more[..., 0] = 1
            made.append(torch.cat([x, more], dim=1))
        columns[name] = torch.cat(made)
    return Batch(**columns, n_tokens=sum(part.n_tokens for part in parts))


@pytest.mark.parametrize("weight", ["uniform", "elbo"])
def test_accumulated_micro_batches_are_one_big_batch(folder, tmp_path, weight, exact):
    trainer = make(folder, tmp_path, accumulate=3, weight=weight)
    model = copy.deepcopy(trainer.model)
    parts = [make_batch(*trainer.data.batches[i], trainer.tokenizer, np.random.default_rng([0, 0, i]), weight) for i in range(3)]
    batch = merged(parts, trainer.tokenizer.pad)
    sums = torch.stack(JointLoss(model, trainer.tokenizer.pad + 1)(batch)) / counts(batch, weight)
    sums.sum().backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    Optimizer(model, trainer.config).step(0)
    assert trainer.update()[:2].tolist() == pytest.approx(sums.tolist(), rel=1e-5)
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


def test_two_processes_train_as_one_does(folder, tmp_path):
    run = dict(accumulate=2, steps=4)
    run(folder, tmp_path / "one", **run)
    subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", train.__file__,
                    *command(folder, tmp_path / "two", **run)], check=True, capture_output=True, timeout=600,
                   env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""})  # fmt: skip
    one, two = losses(tmp_path / "one"), losses(tmp_path / "two")
    assert len(one) == len(two) == 4
    for a, b in zip(one, two):
        assert [float(x or 0) for x in a.values()] == pytest.approx([float(x or 0) for x in b.values()], abs=1e-4)


LEARNT = (
    Example("habitat", (Round("", (Span("habitat", "Rivers and lakes."), Span("food", "It eats fish."))), Round("In short: an animal."))),
    Example("kitchen", (Round("Here:", (Span("tips", "sharpen the knife"), Span("rest", "rest the dough"))),)),
    Example("play", (Round("The otter swims."),)),
    Example("lakes", (Round("", (Span("play", ""), Span("coasts", "marshes"))), Round("", (Span("food", "crabs, frogs"),)))),
)


def test_a_model_that_overfits_four_examples_answers_them_exactly(tmp_path):
    write_dataset(tmp_path, {"train": LEARNT, "val": LEARNT}, 256 + 74 + 40, 4)
    config = settings(tmp_path, tmp_path / "run", batch=4, steps=300, warmup=10, lr=0.02, adam_lr=0.01,
                      validate_every=300, log_every=10)  # fmt: skip
    Run(Trainer(config, ModelConfig(n_layer=2, d_model=64, n_head=2, n_kv_head=2, d_ff=128), MethodConfig())).run()
    rows = losses(tmp_path / "run")
    assert float(rows[-1]["plan"]) < 0.1 * float(rows[0]["plan"]) and float(rows[-1]["span"]) < 0.1 * float(rows[0]["span"])
    sampler = Sampler.load(tmp_path / "run" / "model.safetensors", SampleConfig(max_tokens=120))
    for example, answer in zip(LEARNT, sampler.answer([e.prompt for e in LEARNT])):
        made = [Round(r.text, tuple(Span(s.topic, s.text) for s in r.spans)) for r in answer.rounds()]
        assert tuple(made) == example.rounds
