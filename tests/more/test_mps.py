"""A Mac's GPU by a stand-in: training and validation put no float64 on it, and attention there has no shared heads."""

import pytest
import torch
from runs import data_set, make
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map_only

DEVICE = torch.device("meta")  # a name that torch needs no driver for


class Elsewhere(torch.Tensor):
    """A tensor that says it is on the device, and holds its numbers on the CPU."""

    def __new__(cls, held):
        made = torch.Tensor._make_wrapper_subclass(cls, held.shape, strides=held.stride(), dtype=held.dtype,
                                                   storage_offset=held.storage_offset(), device=DEVICE)  # fmt: skip
        made.held = held
        return made

    def tolist(self):
        return self.held.tolist()

    @classmethod
    def __torch_dispatch__(cls, op, types, args=(), kwargs=None):
        """Compute on the CPU what mps computes; refuse what it refuses."""
        name, kwargs, given = op.name(), dict(kwargs or {}), tree_leaves((args, kwargs))
        here = any(isinstance(x, cls) for x in given)
        stays = here if kwargs.get("device") is None else torch.device(kwargs["device"]) == DEVICE
        held, named = tree_map_only(cls, lambda x: x.held, (args, kwargs))
        if name == "aten::_fused_sdp_choice":
            return 0  # so that attention is computed step by step
        out = op(*held, **named | ({"device": "cpu"} if "device" in named else {}))
        if not stays:
            return out
        if doubles := [x for x in tree_leaves(out) if torch.is_tensor(x) and x.dtype == torch.float64]:
            raise TypeError(f"{name}: no float64 on mps ({doubles[0].shape})")
        out = tree_map_only(torch.Tensor, cls, out)
        return return_and_correct_aliasing(op, args, kwargs, out) if here else out


class OnMps(TorchDispatchMode):
    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        return Elsewhere.__torch_dispatch__(op, types, args, kwargs)


def test_training_and_validation_put_no_float64_on_it(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr("training.bookkeeping.find", lambda name: DEVICE)
    folder = data_set(tmp_path / "data", tokenizer)
    with OnMps():
        with pytest.raises(TypeError, match="no float64"):
            torch.ones(3).double().to(DEVICE)
        trainer = make(folder, tmp_path / "run", "joint", steps=2, validate_every=1)
        trainer.train()
    assert trainer.model.embedding.weight.device == DEVICE and (tmp_path / "run" / "model.safetensors").exists()
