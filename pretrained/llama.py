"""Published weights in Llama's shape (Llama, SmolLM, Qwen2, Qwen2.5, Qwen3) as our model, and our model as such.

A folder as `transformers` writes it: config.json, tokenizer.json, and model.safetensors or its shards. Nothing in it
is executed.
"""

import json
import re
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from model import ModelConfig, Transformer
from pretrained import tokens
from tags import EOS, USER
from tokenizer import Tokenizer

TYPES = ("llama", "qwen2", "qwen3")  # model_type of config.json
SCALINGS = {
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}
EXPECTED = {  # what else a config may say, and the only value that this model has
    "hidden_act": "silu", "attention_bias": False, "mlp_bias": False, "use_sliding_window": False,
    "rope_interleaved": False, "partial_rotary_factor": 1.0, "quantization_config": None,
}  # fmt: skip
NOISE = 0.1  # standard deviation of what tells new embeddings apart, as a share of that of the old ones


@dataclass(frozen=True)
class Pretrained:
    """A pretrained model that was looked at but not loaded: its config and tokenizer, with the tags as new tokens."""

    folder: Path
    config: ModelConfig
    tokenizer: Tokenizer
    rows: list[int | None]  # of the published embedding, one per token; None: a new token


# ---------------------------------------------------------------- names


def places(config: ModelConfig) -> dict[str, list[tuple[str, int]]]:
    """For each of our tensors those of `transformers` that it holds, one below the other, and the rows of each."""
    c, kv = config, config.n_kv_head * config.head_dim
    rows_of_qkv = {"q": c.n_head * c.head_dim, "k": kv, "v": kv}
    in_block = {
        "attention_norm.weight": [("input_layernorm.weight", c.d_model)],
        "attention.qkv.weight": [(f"self_attn.{x}_proj.weight", n) for x, n in rows_of_qkv.items()],
        "attention.qkv.bias": [(f"self_attn.{x}_proj.bias", n) for x, n in rows_of_qkv.items()] * c.qkv_bias,
        "attention.q_norm.weight": [("self_attn.q_norm.weight", c.head_dim)] * c.qk_norm,
        "attention.k_norm.weight": [("self_attn.k_norm.weight", c.head_dim)] * c.qk_norm,
        "attention.out.weight": [("self_attn.o_proj.weight", c.d_model)],
        "ff_norm.weight": [("post_attention_layernorm.weight", c.d_model)],
        "gate_up.weight": [("mlp.gate_proj.weight", c.d_ff), ("mlp.up_proj.weight", c.d_ff)],
        "down.weight": [("mlp.down_proj.weight", c.d_model)],
    }
    table = {"embedding.weight": [("model.embed_tokens.weight", c.vocab_size)]}
    for n in range(c.n_layer):
        for ours, theirs in in_block.items():
            table[f"blocks.{n}.{ours}"] = [(f"model.layers.{n}.{name}", rows) for name, rows in theirs]
    table["norm.weight"] = [("model.norm.weight", c.d_model)]
    table["output.weight"] = [("lm_head.weight", c.vocab_size)] * (not c.tied)
    return {ours: theirs for ours, theirs in table.items() if theirs}


# ---------------------------------------------------------------- config.json


def look(folder: str | Path, unit: int = 10) -> Pretrained:
    """Read config and tokenizer of a folder. Raises ValueError, naming the file, if this model cannot hold it."""
    folder = Path(folder)
    config, (tokenizer, rows) = read_json(folder / "config.json"), tokens.read(folder, unit)
    for name, token in ((USER, "bos_token_id"), (EOS, "eos_token_id")):  # a sequence begins and ends as it used to
        at, known = tokenizer.pad + tokens.names().index(name), config.get(token)
        known = known[0] if isinstance(known, list) and known else known
        rows[at] = known if rows[at] is None and isinstance(known, int) else rows[at]
    try:
        return Pretrained(folder, model_config(config, tokenizer.vocab_size), tokenizer, rows)
    except KeyError as error:
        raise ValueError(f"{folder / 'config.json'} lacks {error}: copy it again") from None
    except (TypeError, ValueError, ZeroDivisionError) as error:
        raise ValueError(f"{folder / 'config.json'}: {error}") from None


def read_json(path: Path) -> dict[str, Any]:
    try:
        read = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{path} does not exist: name the folder of a model as transformers writes it, with "
                         "config.json, tokenizer.json and .safetensors") from None  # fmt: skip
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON ({error}): copy it again") from None
    if not isinstance(read, dict):
        raise ValueError(f"{path}: expected an object")
    return read


def model_config(config: dict[str, Any], vocab_size: int) -> ModelConfig:
    """Our config for a transformers config. Raises ValueError for what this model does not have."""
    kind = config.get("model_type")
    if kind not in TYPES:
        raise ValueError(f"model_type {kind!r}: expected one of {', '.join(TYPES)}")
    for name, only in EXPECTED.items():
        if (config.get(name) or only) != only:
            raise ValueError(f"{name} {str(config[name])[:60]}: only {only} is supported")
    if kinds := set(config.get("layer_types") or ()) - {"full_attention"}:
        raise ValueError(f"layer_types {', '.join(map(str, kinds))}: only full_attention is supported")
    for name in ("num_hidden_layers", "num_attention_heads", "hidden_size", "intermediate_size"):
        if type(config[name]) is not int or config[name] < 1:
            raise ValueError(f"{name} {config[name]!r}: expected a whole number above 0")
    rope = {**(config.get("rope_scaling") or {}), **(config.get("rope_parameters") or {})}  # transformers 4 and 5
    dtype = str(config.get("dtype") or config.get("torch_dtype"))
    return ModelConfig(
        vocab_size=vocab_size,
        n_layer=config["num_hidden_layers"],
        n_head=config["num_attention_heads"],
        n_kv_head=config.get("num_key_value_heads") or config["num_attention_heads"],
        d_model=config["hidden_size"],
        d_ff=config["intermediate_size"],
        rope_theta=float(config.get("rope_theta") or rope.get("rope_theta") or 10000.0),
        qk_norm=kind == "qwen3",
        head_dim=config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"],
        qkv_bias=kind == "qwen2",
        tied=config.get("tie_word_embeddings", False),
        norm_eps=config.get("rms_norm_eps", 1e-6),
        rope_scaling=scaling_of(rope),
        half="float16" if dtype == "float16" else "bfloat16",
    )


def scaling_of(rope: dict[str, Any]) -> dict[str, Any] | None:
    """RoPE scaling as ModelConfig has it. Raises ValueError for other types than linear and llama3."""
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind == "default":
        return None
    if kind not in SCALINGS:
        raise ValueError(f"RoPE scaling {kind!r}: expected default, {' or '.join(SCALINGS)}")
    return {"rope_type": kind} | {name: float(rope[name]) for name in SCALINGS[kind]}


def transformers_config(config: ModelConfig, tokenizer: Tokenizer, dtype: str, longest: int) -> dict[str, Any]:
    """A model's config as the object of a config.json. Raises ValueError for what no published architecture has."""
    c = config
    if c.qk_norm and c.qkv_bias:
        raise ValueError("a model with both qk_norm and biases cannot be exported: no published architecture has both")
    kind, name = ("qwen3", "Qwen3") if c.qk_norm else ("qwen2", "Qwen2") if c.qkv_bias else ("llama", "Llama")
    rope = {"rope_theta": c.rope_theta, **(c.rope_scaling or {"rope_type": "default"})}
    return {
        "architectures": [f"{name}ForCausalLM"],
        "model_type": kind,
        "vocab_size": c.vocab_size,
        "hidden_size": c.d_model,
        "intermediate_size": c.d_ff,
        "num_hidden_layers": c.n_layer,
        "num_attention_heads": c.n_head,
        "num_key_value_heads": c.n_kv_head,
        "head_dim": c.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": longest,
        "rms_norm_eps": c.norm_eps,
        "tie_word_embeddings": c.tied,
        "rope_parameters": rope,  # transformers 5
        "rope_theta": c.rope_theta,  # transformers 4
        "rope_scaling": c.rope_scaling,
        "bos_token_id": tokenizer.user,
        "eos_token_id": tokenizer.eos,
        "pad_token_id": tokenizer.pad,
        "dtype": dtype,
        "torch_dtype": dtype,
    }


# ---------------------------------------------------------------- weights


def load(pretrained: Pretrained, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> Transformer:
    """The model with its published weights and new embeddings, in `dtype`.

    One tensor at a time is held twice. Raises ValueError, naming the file, for weights that do not fit the config.
    """
    folder, config = pretrained.folder, pretrained.config
    with torch.device("meta"):
        model = Transformer(config)
    shapes, weights = {name: p.shape for name, p in model.state_dict().items()}, {}
    with Tensors(folder) as published:
        names = {theirs for parts in places(config).values() for theirs, _ in parts}
        for name, path in published.files.items():
            if name not in names and not re.search(r"rotary_emb\.inv_freq$|^lm_head\.weight$", name):
                raise ValueError(f"{path} has the tensor {name}, for which this model has no place: config.json is of "
                                 "another model, or the architecture is not supported")  # fmt: skip
        for ours, parts in places(config).items():
            if ours in ("embedding.weight", "output.weight"):
                weight = with_new_rows(published.get(parts[0][0], (None, config.d_model)), pretrained, parts[0][0])
            else:
                weight = torch.cat([published.get(theirs, (rows, *shapes[ours][1:])) for theirs, rows in parts])
            weights[ours] = weight.to(device, dtype)
    model.load_state_dict(weights, assign=True)
    return model


class Tensors(ExitStack):
    """The tensors of a folder, whose files are open inside the `with` block; `files` has the file of each."""

    def __init__(self, folder: Path):
        super().__init__()
        self.folder, self.files, self.opened = folder, tensor_files(folder), {}

    def get(self, name: str, shape: tuple[int | None, ...]) -> torch.Tensor:
        """A tensor in float32; None in the shape allows any size. Raises ValueError if there is no such tensor."""
        if name not in self.files:
            raise ValueError(
                f"{self.folder} has no tensor {name}: a file is missing, or config.json is another model's"
            )
        path = self.files[name]
        try:
            if path not in self.opened:
                self.opened[path] = self.enter_context(safe_open(path, "pt"))
            found = self.opened[path].get_slice(name).get_shape()
            if len(found) != len(shape) or any(n not in (None, m) for n, m in zip(shape, found)):
                raise ValueError(f"{path}: {name} has the shape {found}, its config.json asks for {list(shape)}")
            return self.opened[path].get_tensor(name).float()
        except FileNotFoundError:
            raise ValueError(f"{path} does not exist, but its index names it: copy it again") from None
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{path} cannot be read ({error}): copy it again") from None


def tensor_files(folder: Path) -> dict[str, Path]:
    """In which file each tensor of a folder is. Raises ValueError if there are no safetensors."""
    index, single = folder / "model.safetensors.index.json", folder / "model.safetensors"
    if index.exists():
        files = read_json(index).get("weight_map")
        if not isinstance(files, dict) or not files or any(Path(str(f)).name != f for f in files.values()):
            raise ValueError(f"{index}: expected a 'weight_map' from tensors to files in this folder")
        return {name: folder / file for name, file in files.items()}
    if not single.exists():
        pickled = [path.name for path in folder.iterdir() if path.suffix in (".bin", ".pt", ".pth")]
        if pickled:
            raise ValueError(f"{folder} has only pickled weights ({pickled[0]}), and unpickling executes code; if you trust "
                             "them, write them anew: python -c \"from transformers import AutoModelForCausalLM as M; "
                             f"M.from_pretrained('{folder}').save_pretrained('NEW')\"")  # fmt: skip
        raise ValueError(f"{folder} has no weights, expected model.safetensors or model.safetensors.index.json with its "
                         "files: download all files of the model")  # fmt: skip
    try:
        with safe_open(single, "pt") as file:
            return dict.fromkeys(file.keys(), single)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{single} cannot be read ({error}): copy it again") from None


def with_new_rows(published: torch.Tensor, pretrained: Pretrained, name: str) -> torch.Tensor:
    """An embedding in the order of our tokens: a new token is the mean of the pieces of its name, and noise."""
    rows, tokenizer = pretrained.rows, pretrained.tokenizer
    if (last := max(row for row in rows if row is not None)) >= len(published):
        raise ValueError(f"{pretrained.folder}: {name} has {len(published)} rows, but tokenizer.json a token {last}: it is "
                         "of another model")  # fmt: skip
    old = published[torch.tensor([0 if row is None else row for row in rows])]
    generator = torch.Generator().manual_seed(0)
    for token, pieces in new_tokens(rows, tokenizer):
        mean = old[pieces].mean(0) if pieces else published.mean(0)
        old[token] = mean + NOISE * published.std() * torch.randn(mean.shape, generator=generator)
    return old


def new_tokens(rows: list[int | None], tokenizer: Tokenizer) -> Iterator[tuple[int, list[int]]]:
    """Each token that the published model lacks, and the known pieces of its name: `<length 12>` is about 12."""
    named = dict(zip(range(tokenizer.pad, tokenizer.vocab_size), tokens.names()))
    for token, row in enumerate(rows):
        if row is None:
            words = re.search(r"\d+|[a-zA-Z]+(?!.*\d)", named.get(token, ""))
            yield token, [piece for piece in tokenizer.encode(words[0]) if rows[piece] is not None] if words else []
