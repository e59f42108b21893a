"""Memory that training a pretrained model takes: computed, and measured where it fits.

    python measure/memory.py                                    # the table, computed
    python measure/memory.py --measure SmolLM2-360M --tokens 512 --recompute
    python measure/memory.py --measure SmolLM2-135M --lora 16 --device cuda

Measured is the training of random weights of that shape on one sequence: an update, and the gradients of the next.
"""

import argparse
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
from torch import nn

from config import Acts, TrainConfig
from kernels.backends import attend_by
from loss import JointLoss
from masks import encode_example
from measure.quality import aligned
from model import ModelConfig, Transformer
from noise import Batch, Sequence, make_batch
from plumbing.device import CHOICES, PEAKS, fast_dtype, find, name_of, peak_memory
from plumbing.settings import Help, add_settings, check, command, pick, refuse_idle, setting
from pretrained.lora import adapt, trained
from tags import Example, Round, Span
from tokenizer import Tokenizer
from training.optim import Optimizer

GIB, FLOAT32 = 2**30, 4
SHAPES = {  # from their config.json; as models of this project, with the tags as new tokens
    "SmolLM2-135M": dict(vocab_size=49226, n_layer=30, n_head=9, n_kv_head=3, d_model=576, d_ff=1536),
    "SmolLM2-360M": dict(vocab_size=49226, n_layer=32, n_head=15, n_kv_head=5, d_model=960, d_ff=2560),
    "Qwen2.5-1.5B": dict(vocab_size=151717, n_layer=28, n_head=12, n_kv_head=2, d_model=1536, d_ff=8960, qkv_bias=True),
    "Qwen2.5-7B": dict(vocab_size=151717, n_layer=28, n_head=28, n_kv_head=4, d_model=3584, d_ff=18944, qkv_bias=True,
                       tied=False),
}  # fmt: skip
NEW = 74  # tags and lengths
MEASURED = Acts(lambda config, method: config.measure, "only with --measure")


@dataclass
class MemoryConfig:
    """Memory."""

    tokens: int = setting(
        4096, "tokens of a micro-batch; half of them are taken to be targets", at_least=64, at_most=2**24
    )
    lora: int = setting(0, "rank of adapters when measuring; 0: all weights are trained", at_least=0, at_most=1024,
                        acts=[MEASURED])  # fmt: skip
    recompute: bool = setting(False, "gradient checkpointing when measuring", acts=[MEASURED])
    measure: str = setting("", "shape to measure", among=("", *SHAPES))
    device: str = setting("auto", f"where to measure: {', '.join(CHOICES)}", acts=[MEASURED])

    def __post_init__(self) -> None:
        check(self)
        refuse_idle(self)


# ---------------------------------------------------------------- computed


def empty(config: ModelConfig, lora: int) -> Transformer:
    """The model without memory for its weights."""
    with torch.device("meta"):
        model = Transformer(config)
        if lora:
            adapt(model, lora, 1.0, config.vocab_size - NEW)
    return model


def activations(config: ModelConfig, half: int, length: int = 0) -> int:
    """Bytes per token that a block keeps for its backward pass. `half`: bytes of a number that matrices multiply.

    On a CPU attention computes in float32, with a mask that each block keeps: `length` tokens in a sequence there.
    """
    c, q, kv = config, config.n_head * config.head_dim, config.n_kv_head * config.head_dim
    norms = 2 * (FLOAT32 + half) * c.d_model  # inputs, and outputs as the next layer multiplies them
    # with norms on queries and keys, what goes into them and what comes out, in float32
    attention = half * (q + 2 * kv) + half * (q + kv) + 2 * half * q + 2 * FLOAT32 * (q + kv) * c.qk_norm
    if length:
        attention = FLOAT32 * (2 * q + 2 * kv + length) + half * q
    return norms + attention + half * 4 * c.d_ff  # gate, up, silu(gate) and their product


def step_temporaries(config: ModelConfig) -> int:
    """Bytes that Muon needs while it makes the updates of its largest group, gate and up of all blocks, orthogonal."""
    c = config
    n, square = 2 * c.n_layer * c.d_ff * c.d_model, 2 * c.n_layer * min(c.d_ff, c.d_model) ** 2
    return 2 * FLOAT32 * n + 2 * (4 * n + 3 * square)  # updates and their stack; five steps in bfloat16


def memory(config: ModelConfig, tokens: int, lora: int = 0, recompute: bool = False, half: int = 2,
           length: int = 0) -> dict[str, float]:  # fmt: skip
    """Bytes of each part, and their `peak`, for a micro-batch of `tokens`; `half` and `length` as in `activations`."""
    c, model = config, empty(config, lora)
    every, learnt = model.n_params(), sum(p.numel() for p in trained(model).values())
    embeddings = (1 if c.tied else 2) * c.vocab_size * c.d_model
    embedding = half * c.vocab_size * c.d_model
    copies = half * (every - embeddings) + embedding if half < FLOAT32 else 0  # that autocast makes of the weights
    kept = activations(c, half, length) * tokens
    parts = {
        "weights": half * (every - learnt) + FLOAT32 * learnt,
        "optimizer": FLOAT32 * (2 * learnt if lora else every + embeddings),  # momentum; AdamW has two moments
        "gradients": FLOAT32 * learnt,
        "copies": 4 * embedding if lora else copies,  # with adapters: old and new rows as one, per use, and gradients
        "activations": c.n_layer * FLOAT32 * c.d_model * tokens + kept if recompute else c.n_layer * kept,
        "logits": tokens // 2 * c.vocab_size * (3 * FLOAT32 + 2 * half),  # three in float32: as they are, log, gradient
        "step": 0 if lora else step_temporaries(c),
    }
    forward = parts["copies"] + parts["activations"] + parts["logits"]
    parts["peak"] = parts["weights"] + parts["optimizer"] + max(forward, parts["gradients"] + parts["step"])
    return parts


def hours(config: ModelConfig, tokens: float = 1e8, rate: float = 0.4 * PEAKS["H100"]) -> float:
    """Hours for so many tokens at that many FLOP/s, with every block computed twice forward and once backward."""
    looked_up = 0 if config.tied else config.vocab_size * config.d_model  # without arithmetic
    return 8 * (empty(config, 0).n_params() - looked_up) * tokens / rate / 3600


def table(tokens: int) -> Iterator[str]:
    """Markdown lines: for each shape peaks in GiB by way to train, and hours."""
    ways = {"all weights": {}, "--recompute": dict(recompute=True), "and --lora 16": dict(lora=16, recompute=True)}
    rows = []
    for name, shape in SHAPES.items():
        config = ModelConfig(**shape, qk_norm=False)
        peaks = [f"{memory(config, tokens, **way)['peak'] / GIB:.1f} GiB" for way in ways.values()]
        rows.append([name, f"{empty(config, 0).n_params() / 1e6:,.0f}M", *peaks, f"{hours(config):.1f}"])
    return aligned(["model", "size", *ways, "hours"], rows)


# ---------------------------------------------------------------- measured


def some_batch(tokens: int) -> Batch:
    """A micro-batch of one sequence with about that many tokens, half of them targets."""
    tokenizer = Tokenizer([bytes([b]) for b in range(256)])
    left, spans = tokens * 9 // 10, []
    while left > 0:
        spans.append(Span("a", "a" * min(left, 600), min(left, 600) // 10 + 1))
        left -= 600
    example = Example("a" * (tokens // 20), (Round("", tuple(spans)),))
    return make_batch([Sequence(encode_example(example, tokenizer))], [0], tokenizer, np.random.default_rng(0))


def measured(config: ModelConfig, batch: Batch, lora: int, recompute: bool, place: torch.device) -> float:
    """Peak bytes of an update and of the gradients of the next, beyond what the process held before."""
    before, dtype = (peak_memory(place) or 0) * 2**20, fast_dtype(place)
    with torch.device("meta"):
        model = Transformer(config).to(dtype if lora else torch.float32)
    model.to_empty(device=place)
    for p in model.parameters():
        nn.init.normal_(p, std=0.02)
    if lora:
        adapt(model, lora, 1.0, config.vocab_size - NEW)
    model.recompute = recompute
    attend_by(model, "auto", dtype)
    loss, optimizer = JointLoss(model, config.vocab_size - NEW + 1, dtype), Optimizer(model, TrainConfig(steps=4))
    loss(batch.to(place)).sum().backward()
    optimizer.step(0)
    model.zero_grad()
    loss(batch.to(place)).sum().backward()
    return (peak_memory(place) or 0) * 2**20 - before


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=Help)
    add_settings(parser, MemoryConfig)
    config = pick(MemoryConfig, parser.parse_args())
    if not config.measure:
        print(f"Peak memory on a GPU, computed for micro-batches of {config.tokens} tokens;",
              "hours on an H100 for 100M tokens with --recompute:\n", *table(config.tokens), sep="\n")  # fmt: skip
        return
    shape, place, batch = (
        ModelConfig(**SHAPES[config.measure], qk_norm=False),
        find(config.device),
        some_batch(config.tokens),
    )
    half, options = torch.finfo(fast_dtype(place)).bits // 8, (config.lora, config.recompute)
    parts = memory(shape, batch.n_tokens, *options, half, batch.n_tokens * (place.type == "cpu"))
    print(f"{config.measure}, {batch.n_tokens} tokens, {name_of(place)}", *(f"{k:12} {v / GIB:7.2f} GiB" for k, v in parts.items()),
          f"{'measured':12} {measured(shape, batch, *options, place) / GIB:7.2f} GiB", sep="\n")  # fmt: skip


if __name__ == "__main__":
    command(main)
