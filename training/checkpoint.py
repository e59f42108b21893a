"""Checkpoints: model, tokenizer and how it was trained, as one safetensors file. Loading one executes no code.

`Weights` is how a run keeps its model in them.
"""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from model import ModelConfig, Transformer
from plumbing.files import UNREADABLE, atomic
from plumbing.settings import one_line
from tokenizer import Tokenizer


class CheckpointError(ValueError):
    """A file that is no checkpoint of this project, or one not to be used; says what to do."""


def save_checkpoint(path: str | Path, model: Transformer, tokenizer: Tokenizer, info: dict[str, Any],
                    state: dict[str, torch.Tensor] | None = None, dtype: torch.dtype | None = None,
                    weights: dict[str, torch.Tensor] | None = None) -> None:  # fmt: skip
    """Write model, tokenizer and `info` (a dict for JSON), with optimizer tensors `state`.

    The file appears whole or not at all. `dtype` converts the weights (float16 halves what is shipped); `weights`
    are saved in place of the model's.
    Raises ValueError if a tensor is not finite, OSError if the file cannot be written; an old file then stays.
    """
    weights = model.state_dict() if weights is None else weights
    tensors = {f"model.{name}": p.detach().to(dtype or p.dtype).contiguous() for name, p in weights.items()}
    tensors |= {f"state.{name}": value for name, value in (state or {}).items()}
    if name := not_finite(tensors):
        raise ValueError(f"{path} is not written: {name} is no longer finite, the training has diverged")
    text = {"config": json.dumps(asdict(model.config)), "tokenizer": tokenizer.to_json(), "info": json.dumps(info)}
    with atomic(path) as temporary:
        save_file(tensors, temporary, text)


def load_checkpoint(
    path: str | Path, device: torch.device | str = "cpu"
) -> tuple[Transformer, Tokenizer, dict[str, Any], dict[str, torch.Tensor]]:
    """Read (model in float32, tokenizer, info, state). Raises CheckpointError.

    The shapes in the file are compared with what its config says before anything of that size is made.
    """
    if (folder := Path(path)).is_dir():
        files = sorted(folder.glob("*.safetensors"), key=lambda file: (file.stem != "model", file))
        named = f"name a file in it: {files[0]}" if files else (
            "no model is in it, or not yet: a training saves its first after --validate_every updates")  # fmt: skip
        raise CheckpointError(f"{path} is a folder: {named}")
    try:
        with safe_open(path, "pt") as file:
            text = file.metadata() or {}
            tokenizer, info = Tokenizer.from_json(text["tokenizer"]), json.loads(text["info"])
            if "model.embedding.new" in file.keys():
                raise ValueError("it holds adapters alone: go on with the --lora of its run, or take another --out")
            if not isinstance(info, dict):
                raise ValueError("nothing says how it was made")
            shapes = {name[6:]: file.get_slice(name).get_shape() for name in file.keys() if name.startswith("model.")}
            model = empty_model(ModelConfig(**json.loads(text["config"])), shapes)
            if tokenizer.vocab_size != model.config.vocab_size:
                raise ValueError("its tokenizer is not its model's")
            tensors = {name: file.get_tensor(name) for name in file.keys()}
        weights = {name[6:]: value.float() for name, value in tensors.items() if name.startswith("model.")}
        state = {name[6:]: value for name, value in tensors.items() if name.startswith("state.")}
        diverged = not_finite(weights) or not_finite(state)
    except FileNotFoundError:
        raise CheckpointError(f"{path} does not exist: train one with `python train.py`, or see checkpoints/") from None
    except UNREADABLE as error:
        raise CheckpointError(f"{path} is not a checkpoint of this project ({error})") from None
    if diverged:
        raise CheckpointError(f"{path}: {diverged} is not finite, its training diverged: take an earlier checkpoint")
    model.load_state_dict(weights, assign=True)
    return model.to(device), tokenizer, info, {name: value.to(device) for name, value in state.items()}


def introduction(path: str | Path) -> str:
    """Lines that say what a checkpoint was trained on, with prompts to try; empty if an older file does not say."""
    try:
        with safe_open(path, "pt") as file:
            known = json.loads(file.metadata()["info"]).get("trained_on")
        if not known:
            return ""
        prompts = "".join(f"  {one_line(prompt)}\n" for prompt in known["prompts"])
        return f"(trained on {one_line(known['data'])!r}: it can answer prompts such as these)\n{prompts}"
    except UNREADABLE as error:
        raise CheckpointError(f"{path} does not say as it should what it was trained on ({error})") from None


def empty_model(config: ModelConfig, shapes: dict[str, list[int]]) -> Transformer:
    """A model without memory for its weights. Raises ValueError if its weights would not have these shapes."""
    layers = len({name.split(".")[1] for name in shapes if name.startswith("blocks.")})
    if layers != config.n_layer:
        raise ValueError(f"its config has {config.n_layer} layers, its weights have {layers}")
    with torch.device("meta"):
        model = Transformer(config)
    expected = {name: list(p.shape) for name, p in model.state_dict().items()}
    for name in {**expected, **shapes}:
        if expected.get(name) != shapes.get(name):
            raise ValueError(f"{name} has the shape {shapes.get(name)}, its config asks for {expected.get(name)}")
    return model


def not_finite(tensors: dict[str, torch.Tensor]) -> str | None:
    """The name of a tensor that holds NaN or infinity, or None."""
    return next((name for name, value in tensors.items() if not bool(value.isfinite().all())), None)


class Weights:
    """How a run keeps its model: whole. With adapters it is another (pretrained/lora.py)."""

    def __init__(self, model: Transformer, tokenizer: Tokenizer):
        self.model, self.tokenizer = model, tokenizer

    def restore(self, path: Path, data: str) -> tuple[dict[str, Any], dict[str, torch.Tensor], int]:
        """Take the weights of a checkpoint. Returns its info, its state and its unit of length.

        Raises ValueError if its tokenizer is not that of `data`, or its model is of another shape.
        """
        model, tokenizer, info, state = load_checkpoint(path, self.model.embedding.weight.device)
        if tokenizer.tokens != self.tokenizer.tokens:
            raise ValueError(f"{path} has another tokenizer than {data}: take the --data it was trained on")
        ours, theirs = asdict(self.model.config), asdict(model.config)
        if other := [f"{name} ({value}, not {ours[name]})" for name, value in theirs.items() if ours[name] != value]:
            raise ValueError(f"{path} is a model of other {', '.join(other)}: give this run the same")
        self.model.load_state_dict(model.state_dict())
        return info, state, tokenizer.unit

    def kept(self) -> dict[str, Any]:
        """What `save_checkpoint` is told so that the run can go on."""
        return {}

    def finished(self, out: Path) -> dict[str, Any]:
        """What it is told of a finished model: weights in 16 bits."""
        return {"dtype": getattr(torch, self.model.config.half)}
