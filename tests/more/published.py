"""What the tests of pretrained models share: small folders as `transformers` writes them, and awkward texts."""

import copy
import json

import pytest
import torch
from conftest import CORPUS
from safetensors.torch import save_file

from pretrained import tokens
from tokenizer import Tokenizer

LLAMA3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
QWEN = LLAMA3.replace("{1,3}", "")
SPLIT = {"type": "Split", "behavior": "Isolated", "invert": False}
BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
CUTS = {  # the pre_tokenizer, normalizer and ignore_merges of published models
    "llama3": ([SPLIT | {"pattern": {"Regex": LLAMA3}}, BYTES | {"use_regex": False}], None, True),
    "qwen": ([SPLIT | {"pattern": {"Regex": QWEN}}, BYTES | {"use_regex": False}], {"type": "NFC"}, False),
    "smollm": ([{"type": "Digits", "individual_digits": True}, BYTES | {"use_regex": True}], None, False),
    "gpt2": ([BYTES | {"use_regex": True}], None, False),
}
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
AWKWARD = [
    " ", "  ", "   ", "\n", "\n\n", "\t", "\r\n", "\u00a0", "\u3000", "\u2028", "\x85", "\x0b", "\x00", "\u200b", "\ufeff",
    "the", " the", "The", "'s", "'S", "'ll", "'LL", "'ſ", "don't", "it's", "1", "12", "123", "12345", "٣", "½", "²",
    "e\u0301", "é", "\u0301", "ﬁ", "水獺", "吃魚。", "한국어", "हिन्दी", "🦦", "👩‍👩‍👧", "🇩🇪", "def f(x):\n    return x[1:]", "====", "------",
    "aaaaaaa", "<", "user", ">", "_", "...", "?!", "$1,234.50", "https://a.b/c?d=e", "\\n", *SPECIAL, "<eos>", "[PAD]",
]  # fmt: skip


def awkward(rng):
    """Text made to confuse a tokenizer."""
    return "".join(rng.choice(AWKWARD) for _ in range(rng.randint(1, 8)))


def tokenizer_json(cut="qwen", size=80):
    """The object of a tokenizer.json in the style of a published model, learnt on a few sentences."""
    learnt = Tokenizer.train(CORPUS, 256 + 74 + size)
    steps, normalizer, whole = copy.deepcopy(CUTS[cut])
    saved = tokens.written(learnt)
    ids = {text: i + 3 for text, i in saved["model"]["vocab"].items()}  # SmolLM's special tokens come first
    added = [saved["added_tokens"][0] | {"id": i, "content": text} for i, text in enumerate(SPECIAL)]
    saved["model"] |= {"vocab": {**{t: i for i, t in enumerate(SPECIAL)}, **ids}, "ignore_merges": whole}
    return saved | {
        "added_tokens": added,
        "normalizer": normalizer,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": steps} if len(steps) > 1 else steps[0],
    }


SIZES = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "hidden_size": 32,
         "intermediate_size": 48, "vocab_size": 400, "rms_norm_eps": 1e-6}  # fmt: skip
KINDS = {  # what config.json of each kind of model says besides
    "llama": {"model_type": "llama", "rope_theta": 1e4, "tie_word_embeddings": False},
    "llama3": {"model_type": "llama", "rope_theta": 5e5, "tie_word_embeddings": True,
               "rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                                "original_max_position_embeddings": 64}},
    "linear": {"model_type": "llama", "rope_scaling": {"type": "linear", "factor": 2.0}, "tie_word_embeddings": True},
    "qwen2": {"model_type": "qwen2", "rope_theta": 1e6, "tie_word_embeddings": True, "sliding_window": 32768,
              "use_sliding_window": False},
    "qwen2.5": {"model_type": "qwen2", "rope_theta": 1e6, "tie_word_embeddings": False, "max_window_layers": 2},
    "qwen3": {"model_type": "qwen3", "rope_theta": 1e6, "tie_word_embeddings": True, "head_dim": 16, "attention_bias": False},
}  # fmt: skip


def published_tensors(config):
    """Random tensors under the names of `transformers`, which are written out here once more."""
    c, generator = SIZES | config, torch.Generator().manual_seed(0)
    d, ff, hd = (
        c["hidden_size"],
        c["intermediate_size"],
        c.get("head_dim", c["hidden_size"] // c["num_attention_heads"]),
    )
    q, kv = c["num_attention_heads"] * hd, c["num_key_value_heads"] * hd
    shapes = {"model.embed_tokens.weight": (c["vocab_size"], d), "model.norm.weight": (d,)}
    shapes |= {} if c.get("tie_word_embeddings") else {"lm_head.weight": (c["vocab_size"], d)}
    for n in range(c["num_hidden_layers"]):
        block = {"input_layernorm": (d,), "post_attention_layernorm": (d,), "self_attn.q_proj": (q, d),
                 "self_attn.k_proj": (kv, d), "self_attn.v_proj": (kv, d), "self_attn.o_proj": (d, q),
                 "mlp.gate_proj": (ff, d), "mlp.up_proj": (ff, d), "mlp.down_proj": (d, ff)}  # fmt: skip
        block |= {"self_attn.q_norm": (hd,), "self_attn.k_norm": (hd,)} if c["model_type"] == "qwen3" else {}
        shapes |= {f"model.layers.{n}.{name}.weight": shape for name, shape in block.items()}
        if c["model_type"] == "qwen2":
            biases = {"q_proj": q, "k_proj": kv, "v_proj": kv}
            shapes |= {f"model.layers.{n}.self_attn.{name}.bias": (size,) for name, size in biases.items()}
    draw = lambda shape: torch.randn(shape, generator=generator) * (0.3 if len(shape) == 2 else 0.2) + (len(shape) == 1)
    return {name: draw(shape) for name, shape in shapes.items()}


def published(folder, kind="qwen2", cut="qwen", shards=1, **config):
    """Write a folder as `transformers` does. Returns it."""
    folder.mkdir(parents=True, exist_ok=True)
    config = KINDS[kind] | config
    tensors = published_tensors(config)
    (folder / "config.json").write_text(json.dumps(SIZES | {"bos_token_id": 1, "eos_token_id": [2, 0]} | config))
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer_json(cut)), encoding="utf-8")
    if shards == 1:
        save_file(tensors, folder / "model.safetensors")
        return folder
    files = {name: f"model-{1 + n % shards:05}-of-{shards:05}.safetensors" for n, name in enumerate(sorted(tensors))}
    for file in set(files.values()):
        save_file({name: t for name, t in tensors.items() if files[name] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))
    return folder


def library(name):
    """A library that the project itself does without; the test is skipped where it is not installed."""
    return pytest.importorskip(name, reason=f"compares with the library {name}: pip install {name}")
