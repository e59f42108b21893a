"""The methods of the comparison: each cuts an answer in another way, over the same layout, mask, loss and sampler.

| method        | plan                  | spans         | within a span       | also known as                     |
|---------------|-----------------------|---------------|---------------------|-----------------------------------|
| `planned`     | the model's           | many a round  | both directions     | planned diffusion                 |
| `dense`       | the model's           | many a round  | both, across spans  | PD-DA                             |
| `parallel-ar` | the model's           | many a round  | left to right       | Skeleton-of-Thought, APAR, PASTA  |
| `ar`          | none                  | none          |                     | autoregressive decoding           |
| `block`       | given: the next block | one a round   | both directions     | BD3LM; with a threshold Fast-dLLM |
| `diffusion`   | given: one span       | one an answer | both directions     | LLaDA, MDLM                       |
"""

from dataclasses import dataclass, replace

from masks import encode_blocks, encode_example
from settings import setting
from tags import Round, Span, plain_text


@dataclass(frozen=True)
class Method:
    plan: str  # written by the model, none (plain text), or given (spans of a fixed size)
    attention: str = "sparse"  # how span tokens see spans (masks.ATTENTION)
    block: int = 0  # slots of a given span; 0: as many as the longest answer needs


METHODS = {
    "planned": Method("written"),
    "dense": Method("written", "dense"),
    "parallel-ar": Method("written", "causal"),
    "ar": Method("none"),
    "block": Method("given", block=32),
    "diffusion": Method("given"),
}


@dataclass(frozen=True)
class MethodConfig:
    """Method."""

    method: str = setting("planned", f"what is learnt and sampled: {', '.join(METHODS)}")
    block: int = setting(0, "slots of a given span; 0: 32 for block, the longest training answer for diffusion")
    topics: str = setting("names", "what a plan calls its spans: names, or numbers (ablation: 'topic 1', 'topic 2')")
    repeat_topic: bool = setting(True, "repeat the topic at the head of its span")
    rounds: str = setting("many", "many, or one (ablation: what follows a <sync/> becomes one more span)")

    def __post_init__(self):
        for name, known in {"method": METHODS, "topics": ("names", "numbers"), "rounds": ("many", "one")}.items():
            if getattr(self, name) not in known:
                raise ValueError(f"--{name} {getattr(self, name)}: expected one of {', '.join(known)}")
        if self.block < 0:
            raise ValueError(f"--block {self.block}: expected 0 or more")

    @property
    def plan(self):
        return METHODS[self.method].plan

    @property
    def attention(self):
        return METHODS[self.method].attention

    def fitted(self, examples, tokenizer):
        """This configuration with the size of its blocks known."""
        if self.plan != "given" or self.block:
            return self
        longest = max(len(tokenizer.encode(plain_text(e.rounds))) for e in examples)
        whole = (longest // tokenizer.unit + 1) * tokenizer.unit  # whole units, with room for the [PAD] that ends it
        return replace(self, block=METHODS[self.method].block or whole)


def trained_by(info, path):
    """The method of a checkpoint from its `info`. Raises ValueError if it does not say."""
    try:
        return MethodConfig(**info["method"])
    except (KeyError, TypeError):
        raise ValueError(f"{path} does not say by which method it was trained: train it again") from None


def encode(example, tokenizer, config):
    """Layout of an example as a method writes it. Raises ValueError if a span's text is too long for it."""
    if config.plan == "given":
        return encode_blocks(example.prompt, plain_text(example.rounds), tokenizer, config.block)
    rounds = rewrite(example.rounds, tokenizer, config)
    return encode_example(replace(example, rounds=rounds), tokenizer, config.attention, config.repeat_topic)


def rewrite(rounds, tokenizer, config):
    """The rounds of an answer as a method without given plan writes them."""
    if config.plan == "none":
        return (Round(plain_text(rounds)),)
    rounds = merged(rounds, tokenizer) if config.rounds == "one" else rounds
    return tuple(numbered(rounds) if config.topics == "numbers" else rounds)


def merged(rounds, tokenizer):
    """One round of all spans; the text of each later round becomes a span, topic "end"."""
    spans = list(rounds[0].spans)
    for round_ in rounds[1:]:
        spans += [Span("end", round_.text, tokenizer.units(round_.text))] if round_.text else []
        spans += round_.spans
    return [Round(rounds[0].text, tuple(spans))]


def numbered(rounds):
    """Topics that only count: "topic 1", "topic 2"; nothing in the plan says what a span is about."""
    return [replace(r, spans=tuple(replace(s, topic=f"topic {n}") for n, s in enumerate(r.spans, 1))) for r in rounds]
