"""Low-rank adapters (LoRA, Hu et al. 2021, arXiv 2106.09685): W stays, W + alpha / r * B A is used.

Trained are A and B of every linear layer, and the embeddings of tags and lengths. Names and files are those of `peft`.
"""

import json
import math
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from config import TrainConfig
from model import Transformer
from plumbing.files import UNREADABLE, atomic, write_whole
from plumbing.settings import locate
from pretrained.llama import load, look, places
from tokenizer import Tokenizer
from training.checkpoint import Weights, empty_model

LAYERS = ("attention.qkv", "attention.out", "gate_up", "down")  # of a block


class Adapted(nn.Module):
    """A linear layer that stays as it is, and adapters for each of the matrices in it."""

    def __init__(self, base: nn.Linear, rows: list[int], rank: int, alpha: float):
        """`rows`: how many outputs each of its matrices has."""
        super().__init__()
        self.base, self.scale, place = base, alpha / rank, base.weight.device
        self.a = nn.ParameterList(torch.empty(rank, base.in_features, device=place) for _ in rows)
        self.b = nn.ParameterList(torch.zeros(n, rank, device=place) for n in rows)  # so that training begins with W
        for a in self.a:
            nn.init.kaiming_uniform_(a, math.sqrt(5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.to(self.base.weight.dtype)  # once: autocast would make, and keep, a copy per adapter
        added = torch.cat([F.linear(F.linear(x, a), b) for a, b in zip(self.a, self.b)], dim=-1)
        return self.base(x) + self.scale * added

    def merged(self) -> torch.Tensor:
        """The weights of a plain layer that computes the same, in float32."""
        return self.base.weight.float() + self.scale * torch.cat([b @ a for a, b in zip(self.a, self.b)])


class NewRows(nn.Module):
    """An embedding of which only the last rows, those of new tokens, are trained."""

    def __init__(self, base: nn.Embedding, first: int):
        super().__init__()
        self.old = nn.Parameter(base.weight.detach()[:first].clone(), requires_grad=False)
        self.new = nn.Parameter(base.weight.detach()[first:].float())

    @property
    def weight(self) -> torch.Tensor:
        return torch.cat([self.old, self.new.to(self.old.dtype)])

    def forward(self, token: torch.Tensor) -> torch.Tensor:
        return F.embedding(token, self.weight).to(self.new.dtype)


def adapt(model: Transformer, rank: int, alpha: float, first_new: int) -> None:
    """Give a model adapters, and train nothing else but the embeddings of the tokens from `first_new` on."""
    for p in model.parameters():
        p.requires_grad_(False)
        p.data = p.data.float() if p.ndim == 1 else p.data  # norms and biases: small, and not multiplied in 16 bits
    table = places(model.config)
    for n, block in enumerate(model.blocks):
        for name in LAYERS:
            owner, _, layer = name.rpartition(".")
            owner, rows = block.get_submodule(owner), [rows for _, rows in table[f"blocks.{n}.{name}.weight"]]
            setattr(owner, layer, Adapted(getattr(owner, layer), rows, rank, alpha))
    model.embedding = NewRows(model.embedding, first_new)
    if not model.config.tied:
        model.output = NewRows(model.output, first_new)


def trained(model: Transformer) -> dict[str, torch.Tensor]:
    """What is trained of an adapted model, by name."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def merged(model: Transformer, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The weights of a plain Transformer that computes the same, on the CPU."""
    weights = {}
    for name in places(model.config):
        layer, _, kind = name.rpartition(".")
        module = model.get_submodule(layer)
        if isinstance(module, Adapted):
            value = module.merged() if kind == "weight" else module.base.bias
        else:
            value = getattr(module, kind)
        weights[name] = value.detach().to("cpu", dtype)
    return weights


def restore(path: Path, model: Transformer) -> tuple[dict[str, Any], dict[str, torch.Tensor], int]:
    """Take what a checkpoint holds of an adapted model (`trained`).

    Returns its info, its state and its unit of length. Raises ValueError.
    """
    try:
        with safe_open(path, "pt") as file:
            info, tokenizer = (json.loads(file.metadata()[part]) for part in ("info", "tokenizer"))
            unit, tensors = tokenizer["unit"], {name: file.get_tensor(name) for name in file.keys()}
        targets = trained(model)
        if {f"model.{name}": p.shape for name, p in targets.items()} != {
            name: value.shape for name, value in tensors.items() if name.startswith("model.")
        }:
            raise ValueError("it holds other adapters than this run trains")
    except UNREADABLE as error:
        raise ValueError(
            f"{path} is no checkpoint of this run ({error}): take the same settings, or another --out"
        ) from None
    with torch.no_grad():
        for name, p in targets.items():
            p.copy_(tensors[f"model.{name}"])
    device = model.norm.weight.device
    return info, {name[6:]: value.to(device) for name, value in tensors.items() if name.startswith("state.")}, unit


def holds_adapters(path: Path) -> bool:
    """Whether a file is a checkpoint that holds adapters alone: of a run that was interrupted, or one to be shared."""
    try:
        with safe_open(path, "pt") as file:
            return "model.embedding.new" in file.keys()
    except UNREADABLE:  # load_checkpoint says what is wrong
        return False


def load_adapted(path: Path, device: torch.device | str) -> tuple[Transformer, Tokenizer, dict[str, Any]]:
    """The model of a checkpoint that holds adapters alone, merged into what its run began with; its tokenizer, and how it
    was made. Raises ValueError that names the pretrained folder if it is missing or another one."""
    with safe_open(path, "pt") as file:
        text = file.metadata()
    config, tokenizer = TrainConfig(**json.loads(text["info"])["train"]), Tokenizer.from_json(text["tokenizer"])
    if not (base := locate(config.init)).is_dir():
        raise ValueError(
            f"{path} holds adapters for {config.init}, which is not here: docs/your-own-model.md says how to get it"
        )
    pretrained = look(base, tokenizer.unit)
    if pretrained.tokenizer.tokens != tokenizer.tokens:
        raise ValueError(
            f"{path} holds adapters for another model than that of {config.init}: it has another tokenizer"
        )
    model = load(pretrained, device, torch.float32)
    adapt(model, config.lora, config.lora_alpha, tokenizer.pad)
    info, *_ = restore(path, model)
    weights = merged(model, torch.float32)
    plain = empty_model(model.config, {name: [*value.shape] for name, value in weights.items()})
    plain.load_state_dict(weights, assign=True)
    return plain.to(device), tokenizer, info


class Adapters(Weights):
    """How a run with adapters keeps its model: checkpoints hold what is trained, a finished run all of it, merged."""

    def __init__(self, model: Transformer, tokenizer: Tokenizer, config: TrainConfig):
        super().__init__(model, tokenizer)
        self.config = config
        adapt(model, config.lora, config.lora_alpha, tokenizer.pad)

    def restore(self, path: Path, data: str) -> tuple[dict[str, Any], dict[str, torch.Tensor], int]:
        return restore(path, self.model)

    def kept(self) -> dict[str, Any]:
        return {"weights": trained(self.model)}

    def finished(self, out: Path) -> dict[str, Any]:
        """Writes the adapters as `peft` has them, too."""
        save_adapter(out / "adapter", self.model, self.config.init, self.config.lora, self.config.lora_alpha)
        return {"weights": merged(self.model, getattr(torch, self.model.config.half))}


# ---------------------------------------------------------------- peft


def save_adapter(folder: Path, model: Transformer, base: str, rank: int, alpha: float) -> None:
    """Write an adapted model's adapters as `peft` loads them, on top of what pretrained/export.py makes of `base`."""
    tensors, targets = {}, set()
    for name, parts in places(model.config).items():
        module = model.get_submodule(name.rpartition(".")[0])
        names = ["base_model.model." + theirs.removesuffix(".weight") for theirs, _ in parts]
        if isinstance(module, NewRows):
            tensors[f"{names[0]}.token_adapter.trainable_tokens_delta"] = module.new
        elif isinstance(module, Adapted) and name.endswith(".weight"):
            for theirs, a, b in zip(names, module.a, module.b):
                targets.add(theirs.rpartition(".")[2])
                tensors |= {f"{theirs}.lora_A.weight": a, f"{theirs}.lora_B.weight": b}
    new = [*range(len(model.embedding.old), model.config.vocab_size)]
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": sorted(targets),
        "trainable_token_indices": {"embed_tokens": new} | ({} if model.config.tied else {"lm_head": new}),
        "inference_mode": True,
    }
    with atomic(folder / "adapter_model.safetensors") as temporary:
        save_file({name: p.detach().cpu().contiguous() for name, p in tensors.items()}, temporary, {"format": "pt"})
    write_whole(folder / "adapter_config.json", json.dumps(config, indent=2) + "\n")
