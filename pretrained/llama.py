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
from tags import ASSISTANT, EOS, USER
from tokenizer import Tokenizer

TYPES = ("llama", "qwen2", "qwen3")  # model_type of config.json
SCALINGS = {
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}
DEFAULTS = {  # of what a config.json leaves out, where transformers has others than Llama's
    "qwen2": {"num_key_value_heads": 32},
    "qwen3": {"num_key_value_heads": 32, "head_dim": 128},
}
LIMITS = {  # what the numbers of a config may be: whole numbers of a range, or above the first and at most the second
    "vocab_size": range(1, 1 << 24), "hidden_size": range(1, 1 << 24), "intermediate_size": range(1, 1 << 24),
    "num_hidden_layers": range(1, 1001), "num_attention_heads": range(1, 1 << 16),
    "num_key_value_heads": range(1, 1 << 16), "head_dim": range(2, 1 << 16, 2),  # RoPE turns pairs
    "rms_norm_eps": (0, 1), "rope_theta": (1, 1e12), "factor": (0, 1e6), "low_freq_factor": (0, 1e6),
    "high_freq_factor": (0, 1e6), "original_max_position_embeddings": (0, 1e12),
}  # fmt: skip
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
    n_rows: int  # of the published embedding


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
    try:
        ours, n_rows = model_config(config, tokenizer.vocab_size), number(config, "vocab_size")
        return Pretrained(folder, ours, tokenizer, known_rows(config, tokenizer, rows, n_rows), n_rows)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{folder / 'config.json'}: {error}") from None


def known_rows(config: dict[str, Any], tokenizer: Tokenizer, rows: list[int | None], n_rows: int) -> list[int | None]:
    """Rows that the embedding has: a tag beyond them is new, and a sequence begins and ends with what it used to."""
    if (last := max((row for row in rows[: tokenizer.pad] if row is not None), default=0)) >= n_rows:
        raise ValueError(f"vocab_size {n_rows}, but tokenizer.json has a token {last}: it is of another model")
    rows = [None if row is None or row >= n_rows else row for row in rows]
    for name, field in ((USER, "bos_token_id"), (EOS, "eos_token_id")):
        at, known = tokenizer.pad + tokens.names().index(name), config.get(field)
        known = (known or [None])[0] if isinstance(known, list) else known
        if known is not None and (type(known) is not int or not 0 <= known < n_rows):
            raise ValueError(f"{field} {json.dumps(known)[:60]}: expected a whole number below vocab_size {n_rows}")
        rows[at] = known if rows[at] is None else rows[at]
    return rows


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


def number(config: dict[str, Any], name: str, default: float | None = None) -> float:
    """A number of a config; where it is left out or null, the default. Raises ValueError unless LIMITS allow it."""
    value, limits = default if config.get(name) is None else config[name], LIMITS[name]
    if isinstance(limits, range):
        fits = type(value) is int and value in limits
        expected = f"a whole number from {limits[0]} to {limits[-1]}" + ", and even" * (limits.step == 2)
    else:
        fits = type(value) in (int, float) and limits[0] < value <= limits[1]
        expected = f"a number above {limits[0]} and at most {limits[1]:g}"
    if not fits:
        raise ValueError(f"{name} {json.dumps(value)[:60]}: expected {expected}")
    return value


def model_config(config: dict[str, Any], vocab_size: int) -> ModelConfig:
    """Our config for a transformers config. Raises ValueError for what this model does not have."""
    kind = config.get("model_type")
    if kind not in TYPES:
        raise ValueError(f"model_type {kind!r}: expected one of {', '.join(TYPES)}")
    ropes = [config.get(name) or {} for name in ("rope_scaling", "rope_parameters")]  # transformers 4 and 5
    if not all(isinstance(rope, dict) for rope in ropes):
        raise ValueError("rope_scaling or rope_parameters: expected an object")
    rope, config = {**ropes[0], **ropes[1]}, {**DEFAULTS.get(kind, {}), **config}
    for name, only in EXPECTED.items():
        if any(given.get(name) not in (None, only) for given in (config, rope)):
            raise ValueError(f"{name} {str(config.get(name, rope.get(name)))[:60]}: only {only} is supported")
    if kinds := {*map(str, config.get("layer_types") or ())} - {"full_attention"}:
        raise ValueError(f"layer_types {', '.join(kinds)}: only full_attention is supported")
    heads, width = number(config, "num_attention_heads"), number(config, "hidden_size")
    shared = number(config, "num_key_value_heads", heads)
    if heads % shared:
        raise ValueError(f"num_attention_heads {heads}: expected a multiple of num_key_value_heads {shared}")
    if (tied := config.get("tie_word_embeddings") or False) not in (True, False):
        raise ValueError(f"tie_word_embeddings {json.dumps(tied)[:60]}: expected true or false")
    theta = config if config.get("rope_theta") is not None else rope
    dtype = str(config.get("dtype") or config.get("torch_dtype"))
    return ModelConfig(
        vocab_size=vocab_size,
        n_layer=number(config, "num_hidden_layers"),
        n_head=heads,
        n_kv_head=shared,
        d_model=width,
        d_ff=number(config, "intermediate_size"),
        rope_theta=float(number(theta, "rope_theta", 10000.0)),
        qk_norm=kind == "qwen3",
        head_dim=number(config, "head_dim", width // heads),
        qkv_bias=kind == "qwen2",
        tied=bool(tied),
        norm_eps=number(config, "rms_norm_eps", 1e-6),
        rope_scaling=scaling_of(rope),
        half="float16" if dtype == "float16" else "bfloat16",
    )


def scaling_of(rope: dict[str, Any]) -> dict[str, Any] | None:
    """RoPE scaling as ModelConfig has it. Raises ValueError for other types than linear and llama3."""
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind == "default":
        return None
    if kind not in [*SCALINGS]:
        raise ValueError(f"RoPE scaling {str(kind)[:60]!r}: expected default, {' or '.join(SCALINGS)}")
    scaling = {name: number(rope, name) for name in SCALINGS[kind]}
    if scaling.get("low_freq_factor", 0) >= scaling.get("high_freq_factor", 1):
        raise ValueError(f"high_freq_factor {scaling['high_freq_factor']}: expected more than low_freq_factor")
    return {"rope_type": kind} | scaling


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
                weight = with_new_rows(published.get(parts[0][0], (pretrained.n_rows, config.d_model)), pretrained)
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

    def get(self, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        """A tensor in float32. Raises ValueError if there is no such tensor of finite numbers."""
        if name not in self.files:
            raise ValueError(
                f"{self.folder} has no tensor {name}: a file is missing, or config.json is another model's"
            )
        path = self.files[name]
        try:
            if path not in self.opened:
                self.opened[path] = self.enter_context(safe_open(path, "pt"))
            found = self.opened[path].get_slice(name).get_shape()
            if found != list(shape):
                raise ValueError(f"{path}: {name} has the shape {found}, its config.json asks for {list(shape)}")
            tensor = self.opened[path].get_tensor(name).float()
            if not tensor.isfinite().all():
                raise ValueError(f"{path}: {name} holds NaN or infinity: copy it again")
            return tensor
        except FileNotFoundError:
            raise ValueError(f"{path} does not exist, but its index names it: copy it again") from None
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{path} cannot be read ({error}): copy it again") from None


def tensor_files(folder: Path) -> dict[str, Path]:
    """In which file each tensor of a folder is. Raises ValueError if there are no safetensors."""
    index, single = folder / "model.safetensors.index.json", folder / "model.safetensors"
    if index.exists():
        files = read_json(index).get("weight_map")
        if (
            not isinstance(files, dict)
            or not files
            or not all(re.fullmatch(r"[\w.-]+\.safetensors", str(file)) for file in files.values())
        ):
            raise ValueError(f"{index}: expected a 'weight_map' from tensors to safetensors in this folder")
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


def with_new_rows(published: torch.Tensor, pretrained: Pretrained) -> torch.Tensor:
    """An embedding in the order of our tokens: a new token is the mean of the pieces of its name, and noise."""
    rows, tokenizer = pretrained.rows, pretrained.tokenizer
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
            about = tokenizer.encode(words[0]) if words else []
            if named.get(token) == ASSISTANT:  # about what stands before an answer; after its name comes "istant" again
                about = tokenizer.encoding.encode_ordinary("\n\n")
            yield token, [piece for piece in about if rows[piece] is not None]
