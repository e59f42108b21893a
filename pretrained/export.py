"""A model as the folder that `transformers` loads: config.json, model.safetensors, tokenizer.json.

    python pretrained/export.py --model runs/mine/model.safetensors --out exported
    python pretrained/export.py --model SmolLM2-135M --out base       a pretrained model with the tags as new tokens

transformers reads the tokens left to right, as in the method `ar`; the mask of plans and spans is this project's.
"""

import argparse
import json
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from config import LONGEST
from model import Transformer
from plumbing.files import atomic, refuse_overwriting, write_whole
from plumbing.settings import Help, add_settings, check, command, locate, pick, setting
from pretrained import tokens
from pretrained.llama import load, look, places, transformers_config
from tokenizer import Tokenizer
from training.checkpoint import load_checkpoint, not_finite


@dataclass
class ExportConfig:
    """Exporting."""

    model: str = setting("", "checkpoint of this project, or folder of a pretrained model")
    out: str = setting("", "folder to write")
    dtype: str = setting("float32", "type of the weights", among=("float32", "float16", "bfloat16"))

    def __post_init__(self) -> None:
        check(self)
        if not self.model or not self.out:
            raise ValueError("expected --model CHECKPOINT and --out FOLDER")


def export(model: Transformer, tokenizer: Tokenizer, folder: Path, dtype: str) -> None:
    """Write the folder. Raises ValueError for a model that no published architecture, or `dtype`, can hold."""
    config = transformers_config(model.config, tokenizer, dtype, LONGEST)
    weights, table = model.state_dict(), places(model.config)
    tensors = {theirs: part.to(getattr(torch, dtype)).contiguous() for ours, parts in table.items()
               for (theirs, rows), part in zip(parts, weights[ours].split([rows for _, rows in parts]))}  # fmt: skip
    if name := not_finite(tensors):
        raise ValueError(f"{folder} is not written: {name} is not finite in {dtype}: take another --dtype")
    with atomic(folder / "model.safetensors") as temporary:
        save_file(tensors, temporary, {"format": "pt"})
    special = {"bos_token": tokenizer.user, "eos_token": tokenizer.eos, "pad_token": tokenizer.pad}
    special = {kind: tokenizer.name(token) for kind, token in special.items()}
    special["unk_token"] = None  # left out, transformers 5 gives a Qwen2 folder one more token, without an embedding
    texts = {
        "tokenizer.json": tokens.written(tokenizer),
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_input_names": ["input_ids", "attention_mask"],  # all that `generate` takes
            **special,
        },
        "config.json": config,
    }
    for name, value in texts.items():
        write_whole(folder / name, json.dumps(value, ensure_ascii=False, indent=2) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=Help)
    add_settings(parser, ExportConfig)
    config = pick(ExportConfig, parser.parse_args())
    path = locate(config.model)
    refuse_overwriting([path / "config.json" if path.is_dir() else path], out=config.out)
    if path.is_dir():
        pretrained = look(path)
        model, tokenizer = load(pretrained), pretrained.tokenizer
    else:
        model, tokenizer, *_ = load_checkpoint(path)
    export(model, tokenizer, Path(config.out), config.dtype)
    print(f"{model.n_params() / 1e6:.2f}M parameters and {tokenizer.vocab_size} tokens in {config.out}")
    if model.config.qkv_bias and not tokens.cuts_as_qwen2(tokenizer):
        print("transformers 5 cuts texts for such a model by Qwen2's rules, whatever tokenizer.json says: load this one "
              "with PreTrainedTokenizerFast.from_pretrained, not AutoTokenizer")  # fmt: skip


if __name__ == "__main__":
    command(main)
