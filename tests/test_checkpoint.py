"""Checkpoints: whole or not at all, exact, and nothing in them is executed."""

import itertools
import json
import os
import pickle
from dataclasses import asdict

import numpy as np
import pytest
import torch
from conftest import OTTER, each, small_model
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from config import TrainConfig
from masks import encode_example
from noise import Sequence, make_batch
from train import JointLoss
from training import checkpoint
from training.checkpoint import CheckpointError, load_checkpoint, save_checkpoint
from training.optim import Optimizer


def trained(model, tokenizer, steps, optimizer=None):
    """Run some updates of both optimizers on one fixed batch. Returns the optimizer."""
    optimizer = optimizer or Optimizer(model, TrainConfig(steps=20, warmup=2))
    batch = make_batch([Sequence(encode_example(OTTER, tokenizer))], [0], tokenizer, np.random.default_rng(0))
    for step in steps:
        model.zero_grad()
        sum(JointLoss(model, tokenizer.pad + 1)(batch)).backward()
        optimizer.step(step)
    return optimizer


def weights(model):
    return {name: p.detach().clone() for name, p in model.state_dict().items()}


@pytest.fixture
def saved(tmp_path, tokenizer):
    """Path of a good checkpoint, and its model."""
    model, path = small_model(tokenizer.vocab_size), tmp_path / "model.safetensors"
    save_checkpoint(path, model, tokenizer, {"step": 3, "train": {"data": "tasks"}}, {"0.1.momentum": torch.ones(2, 3)})
    return path, model


def test_a_checkpoint_holds_model_tokenizer_info_and_state(saved, tokenizer):
    path, model = saved
    loaded, its_tokenizer, info, state = load_checkpoint(path)
    assert loaded.config == model.config and info == {"step": 3, "train": {"data": "tasks"}}
    torch.testing.assert_close(weights(loaded), weights(model), rtol=0, atol=0)
    assert its_tokenizer.tokens == tokenizer.tokens and its_tokenizer.unit == tokenizer.unit
    assert list(state) == ["0.1.momentum"] and torch.equal(state["0.1.momentum"], torch.ones(2, 3))


def test_training_goes_on_from_a_checkpoint_as_if_it_had_not_stopped(tmp_path, tokenizer):
    model = small_model(tokenizer.vocab_size)
    optimizer = trained(model, tokenizer, range(3))
    save_checkpoint(tmp_path / "c.safetensors", model, tokenizer, {}, optimizer.state())
    trained(model, tokenizer, range(3, 5), optimizer)
    again, _, _, state = load_checkpoint(tmp_path / "c.safetensors")
    optimizer = Optimizer(again, TrainConfig(steps=20, warmup=2))
    optimizer.load(state)
    trained(again, tokenizer, range(3, 5), optimizer)
    torch.testing.assert_close(weights(again), weights(model), rtol=1e-5, atol=1e-6)


def test_float16_weights_halve_the_file_and_load_as_float32(saved, tokenizer, tmp_path):
    _, model = saved
    save_checkpoint(tmp_path / "half", model, tokenizer, {}, dtype=torch.float16)
    assert {tensor.dtype for tensor in load_file(tmp_path / "half").values()} == {torch.float16}
    loaded, *_ = load_checkpoint(tmp_path / "half")
    assert all(p.dtype == torch.float32 for p in loaded.parameters())
    torch.testing.assert_close(weights(loaded), weights(model), rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("moment", ["while writing", "before renaming"])
def test_a_save_that_dies_in_the_middle_leaves_the_old_file_whole(saved, tokenizer, monkeypatch, moment):
    path, _ = saved
    before = path.read_bytes()

    def die(*args):
        if moment == "while writing":
            with open(args[1], "wb") as file:
                file.write(before[: len(before) // 2])
        raise KeyboardInterrupt

    if moment == "while writing":
        monkeypatch.setattr(checkpoint, "save_file", die)
    else:
        monkeypatch.setattr(os, "replace", die)
    with pytest.raises(KeyboardInterrupt):
        save_checkpoint(path, small_model(tokenizer.vocab_size, seed=1), tokenizer, {})
    monkeypatch.undo()
    assert path.read_bytes() == before
    load_checkpoint(path)
    save_checkpoint(path, small_model(tokenizer.vocab_size, seed=1), tokenizer, {"step": 4})
    assert load_checkpoint(path)[2] == {"step": 4}, "what the dead save left does not stand in the way"


def refused(path):
    """The message of the CheckpointError that loading raises; it names the file."""
    with pytest.raises(CheckpointError) as error:
        load_checkpoint(path)
    assert str(path) in str(error.value)
    return str(error.value)


def test_a_missing_checkpoint_says_how_to_make_one(tmp_path):
    assert "train.py" in refused(tmp_path / "none.safetensors")


def test_garbage_empty_and_truncated_files_are_not_checkpoints(saved, tmp_path):
    path, _ = saved
    whole = path.read_bytes()
    for content in (b"", b"hello", b"\xff" * 1000, b"{}", np.random.default_rng(0).bytes(5000)):
        (tmp_path / "bad").write_bytes(content)
        refused(tmp_path / "bad")
    for length in (1, 7, 8, 100, len(whole) // 2, len(whole) - 1):
        (tmp_path / "bad").write_bytes(whole[:length])
        refused(tmp_path / "bad")


def test_a_folder_is_not_a_checkpoint(tmp_path):
    refused(tmp_path)


def rewritten(path, out, tensors=None, **text):
    """Write a checkpoint again with other tensors (a function of the old) or texts; None leaves a text out."""
    with safe_open(path, "pt") as file:
        text = {**file.metadata(), **text}
    kept = load_file(path)
    save_file(tensors(kept) if tensors else kept, out, {k: v for k, v in text.items() if v is not None})
    return out


def test_a_checkpoint_without_one_of_its_texts_is_refused(saved, tmp_path):
    for name, text in each(itertools.product(["config", "tokenizer", "info"], [None, "", "not JSON"])):
        refused(rewritten(saved[0], tmp_path / "bad", **{name: text}))


FORMATS = [
    ("config", "[1, 2]"), ("config", '{"width": 3}'), ("config", '{"d_model": "wide"}'), ("config", '{"d_model": 30}'),
    ("tokenizer", "[]"), ("tokenizer", '{"unit": 10}'), ("tokenizer", '{"unit": 10, "tokens": []}'),
    ("tokenizer", '{"unit": 10, "tokens": [1]}'), ("tokenizer", '{"unit": 10, "tokens": ["?"]}'),
]  # fmt: skip


def test_a_checkpoint_with_another_config_or_tokenizer_format_is_refused(saved, tmp_path):
    for name, text in each(FORMATS):
        refused(rewritten(saved[0], tmp_path / "bad", **{name: text}))


def test_wrong_missing_and_surplus_tensors_are_refused_by_name(saved, tmp_path):
    path, name = saved[0], "model.blocks.1.down.weight"
    without = lambda tensors: {n: t for n, t in tensors.items() if n != name}
    assert name[6:] in refused(rewritten(path, tmp_path / "bad", without))
    assert "32, 47" in refused(rewritten(path, tmp_path / "bad", lambda t: {**t, name: torch.zeros(32, 47)}))
    assert "extra" in refused(rewritten(path, tmp_path / "bad", lambda t: {**t, "model.extra": torch.zeros(1)}))
    wider = json.dumps({**asdict(saved[1].config), "d_model": 64})
    assert "embedding.weight" in refused(rewritten(path, tmp_path / "bad", config=wider))


def test_a_config_of_another_size_is_refused_before_anything_of_that_size_is_made(saved, tmp_path, monkeypatch):
    """Neither a billion layers nor a billion numbers."""
    for size in each([{"n_layer": 10**9}, {"n_layer": 900}, {"n_layer": 10**400}, {"d_model": 2**40},
                                  {"vocab_size": 2**50}, {"d_ff": 2**62}]):  # fmt: skip
        with monkeypatch.context() as patch:
            layers, real = [], checkpoint.Transformer

            def noting(config):
                layers.append(config.n_layer)
                assert torch.empty(0).is_meta, "made without memory for its weights"
                return real(config)

            patch.setattr(checkpoint, "Transformer", noting)
            refused(rewritten(saved[0], tmp_path / "bad", config=json.dumps({**asdict(saved[1].config), **size})))
            assert set(layers) <= {saved[1].config.n_layer}


def test_texts_that_break_a_json_parser_are_refused(saved, tmp_path):
    for text, name in each(
        itertools.product(
            ["[" * 200_000, '{"n_layer": %s}' % ("9" * 5000), '{"a":' * 100_000, '{"unit": 1e999}'],
            ["config", "tokenizer", "info"],
        )
    ):
        if (name, text) != ("info", '{"unit": 1e999}'):  # which is an odd but possible object
            refused(rewritten(saved[0], tmp_path / "bad", **{name: text}))


def test_what_is_not_finite_is_neither_saved_nor_loaded(saved, tokenizer, tmp_path):
    path, model = saved
    before, clean = path.read_bytes(), {name: p.clone() for name, p in weights(model).items()}
    names = ["model.blocks.1.down.weight", "state.0.1.momentum"]
    for value, name in each(itertools.product([float("nan"), float("inf"), -float("inf")], names)):

        def spoilt(tensors):
            tensors[name].view(-1)[1] = value
            return tensors

        assert (
            name.partition(".")[2] in (said := refused(rewritten(path, tmp_path / "bad", spoilt)))
            and "diverged" in said
        )
        tensors = spoilt({f"model.{n}": p.clone() for n, p in clean.items()} | {"state.0.1.momentum": torch.ones(2, 3)})
        model.load_state_dict({n[6:]: p for n, p in tensors.items() if n.startswith("model.")})
        with pytest.raises(ValueError, match=f"{name} is no longer finite.*diverged"):
            save_checkpoint(path, model, tokenizer, {}, {"0.1.momentum": tensors["state.0.1.momentum"]})
        assert path.read_bytes() == before
        assert sorted(os.listdir(path.parent)) == ["bad", path.name]


def test_a_disk_that_is_full_is_named_and_leaves_the_old_file(saved, tokenizer, monkeypatch):
    path, model = saved
    before = path.read_bytes()

    def full(tensors, file, text):
        file.write_bytes(before[:1000])
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(OSError, match=rf"{path} cannot be written.*No space left.*free some space"):
        save_checkpoint(path, model, tokenizer, {})
    assert path.read_bytes() == before and os.listdir(path.parent) == [path.name]


def test_loading_draws_no_random_numbers(saved):
    torch.manual_seed(0)
    load_checkpoint(saved[0])
    drawn = torch.rand(3)
    torch.manual_seed(0)
    assert torch.equal(drawn, torch.rand(3))


class Malicious:
    """Unpickling it makes a folder."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


def test_loading_a_pickle_is_refused_and_executes_nothing(tmp_path):
    marker = tmp_path / "executed"
    (tmp_path / "raw.pt").write_bytes(pickle.dumps(Malicious(marker)))
    torch.save({"model": Malicious(marker)}, tmp_path / "zip.pt")
    for name in ("raw.pt", "zip.pt"):
        refused(tmp_path / name)
        assert not marker.exists()
    pickle.loads((tmp_path / "raw.pt").read_bytes())
    assert marker.exists(), "the file is one that does harm when it is unpickled"
