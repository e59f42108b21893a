"""The methods of the comparison: each cuts an answer in another way, over the same layout, mask, loss and sampler.

| method        | plan            | spans          | within a span      | closest published method                 |
|---------------|-----------------|----------------|--------------------|------------------------------------------|
| `planned`     | the model's     | many per round | both directions    | planned diffusion                        |
| `dense`       | the model's     | many per round | both, across spans | planned diffusion's dense variant, PD-DA |
| `parallel-ar` | the model's     | many per round | left to right      | PASTA (promises within the text)         |
| `joint`       | the model's     | many per round | either, by a coin  | `planned` and `parallel-ar` in one model |
| `ar`          | none            | none           |                    | autoregressive decoding                  |
| `block`       | given: a block  | one per round  | both directions    | BD3LM (1/t weights)                      |
| `diffusion`   | given: one span | one per answer | both directions    | LLaDA (1/t weights)                      |

Relatives: of `parallel-ar`, Skeleton-of-Thought is prompting without training and APAR forks without a plan; of
`block` with a threshold, Fast-dLLM v2, whose targets are shifted by one; of `diffusion`, MDLM, which has no prompt.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from data import Example
from masks import Layout, encode_blocks, encode_example
from plumbing.settings import check, setting
from tags import Round, Span, plain_text
from tokenizer import Tokenizer


@dataclass(frozen=True)
class Method:
    plan: str  # written by the model, none (plain text), or given (spans of a fixed size)
    attention: str = "sparse"  # how span tokens see spans (masks.ATTENTION)
    block: int = 0  # slots of a given span; 0: as many as the longest answer needs
    causal: float = 0.0  # share of training spans that are causal although the attention is sparse
    decodes: tuple[str, ...] = ()  # the methods that a model so trained can be sampled by; (): its own


METHODS = {
    "planned": Method("written"),
    "dense": Method("written", "dense"),
    "parallel-ar": Method("written", "causal"),
    "joint": Method("written", causal=0.5, decodes=("planned", "parallel-ar")),
    "ar": Method("none"),
    "block": Method("given", block=32),
    "diffusion": Method("given"),
}


@dataclass(frozen=True)
class MethodConfig:
    """Method."""

    method: str = setting("planned", "what is learnt and sampled", among=METHODS)
    block: int = setting(0, "slots of a given span; 0: 32 for block, the longest training answer for diffusion",
                         at_least=0, at_most=4096)  # fmt: skip
    topics: str = setting("names", "what a plan calls its spans; numbers ('topic 1', 'topic 2') are an ablation",
                          among=("names", "numbers"))  # fmt: skip
    repeat_topic: bool = setting(True, "repeat the topic at the head of its span")
    rounds: str = setting("many", "rounds of an answer; one (ablation): what follows a <sync/> becomes one more span",
                          among=("many", "one"))  # fmt: skip
    trained: str = ""  # the method of the training; empty: this one

    def __post_init__(self) -> None:
        check(self)

    @property
    def plan(self) -> str:
        return METHODS[self.method].plan

    @property
    def attention(self) -> str:
        return METHODS[self.method].attention

    @property
    def in_training(self) -> "MethodConfig":
        """The method of the training: finished spans see themselves as they did there (masks.py)."""
        return replace(self, method=self.trained or self.method)

    @property
    def causal(self) -> float:
        """Share of the spans that train left to right."""
        return 1.0 if self.attention == "causal" else METHODS[self.method].causal

    def fitted(self, examples: Sequence[Example], tokenizer: Tokenizer) -> "MethodConfig":
        """This configuration with the size of its blocks known."""
        block = self.block or METHODS[self.method].block
        if self.plan == "given" and not block:
            longest = max(len(tokenizer.encode(plain_text(e.rounds))) for e in examples)
            block = (longest // tokenizer.unit + 1) * tokenizer.unit  # whole units, and a [PAD] that ends the answer
        return replace(self, block=block)


def trained_by(info: dict[str, Any], path: str) -> MethodConfig:
    """The method of a checkpoint from its `info`. Raises ValueError if it does not say."""
    try:
        return MethodConfig(**info["method"])
    except (KeyError, TypeError):
        raise ValueError(f"{path} does not say by which method it was trained: train it again") from None


def decoded_as(config: MethodConfig, name: str) -> MethodConfig:
    """The method by which a model trained by `config` is sampled; `name` picks one, "" takes the first.

    Raises ValueError if the model was not trained for it.
    """
    known = METHODS[config.method].decodes or (config.method,)
    if name and name not in known:
        raise ValueError(
            f"--decode {name}: a model trained with --method {config.method} decodes as {', '.join(known)}"
        )
    return replace(config, method=name or known[0], trained=config.method)


def encode(example: Example, tokenizer: Tokenizer, config: MethodConfig,
           draw_pads: Callable[[], int] | None = None) -> Layout:  # fmt: skip
    """Layout of an example as a method writes it; for `draw_pads` see encode_example.

    Raises ValueError if a span's text is too long for its plan.
    """
    if config.plan == "given":
        return encode_blocks(example.prompt, plain_text(example.rounds), tokenizer, config.block)
    rewritten = replace(example, rounds=rewrite(example.rounds, tokenizer, config))
    return encode_example(rewritten, tokenizer, config.attention, config.repeat_topic, draw_pads)


def rewrite(rounds: Sequence[Round], tokenizer: Tokenizer, config: MethodConfig) -> tuple[Round, ...]:
    """The rounds of an answer as a method without given plan writes them."""
    if config.plan == "none":
        return (Round(plain_text(rounds)),)
    rounds = merged(rounds, tokenizer) if config.rounds == "one" else rounds
    return tuple(numbered(rounds) if config.topics == "numbers" else rounds)


def merged(rounds: Sequence[Round], tokenizer: Tokenizer) -> list[Round]:
    """One round of all spans; the text of each later round becomes a span, topic "end"."""
    spans = list(rounds[0].spans)
    for round_ in rounds[1:]:
        spans += [Span("end", round_.text, tokenizer.units(round_.text))] if round_.text else []
        spans += round_.spans
    return [Round(rounds[0].text, tuple(spans))]


def numbered(rounds: Sequence[Round]) -> list[Round]:
    """Topics that only count: "topic 1", "topic 2"; nothing in the plan says what a span is about."""
    return [replace(r, spans=tuple(replace(s, topic=f"topic {n}") for n, s in enumerate(r.spans, 1))) for r in rounds]
