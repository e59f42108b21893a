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

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

from config import METHODS, Method, MethodConfig
from decode import (
    Answer,
    Decoder,
    Denoise,
    DenoiseTogether,
    Phase,
    Reading,
    Reply,
    RoundTokens,
    WrittenPlan,
    next_round,
)
from masks import LINKED, Layout, encode_blocks, encode_example
from tags import Example, Round, Span, plain_text
from tokenizer import Tokenizer

# ---------------------------------------------------------------- which method


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


def fitted(config: MethodConfig, examples: Sequence[Example], tokenizer: Tokenizer) -> MethodConfig:
    """The configuration with the size of its blocks known."""
    block = config.block or METHODS[config.method].block
    if config.plan == "given" and not block:
        longest = max(len(tokenizer.encode(plain_text(e.rounds))) for e in examples)
        block = (longest // tokenizer.unit + 1) * tokenizer.unit  # whole units, and a [PAD] that ends the answer
    return replace(config, block=block)


# ---------------------------------------------------------------- what it learns


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


# ---------------------------------------------------------------- how it decodes: given plans


class GivenPlan:
    """Block after block of fixed size, without a written plan, until one holds the [PAD] that ends the answer."""

    @staticmethod
    def begin(answer: Answer) -> Phase | None:
        """The phase that denoises the next block; None after the last, or where max_tokens leaves no slot."""
        if answer.rounds and answer.tokenizer.pad in answer.contents(answer.rounds[-1].spans[0]):
            return None
        size = min(answer.method.block, answer.max_length - len(answer.layout) - 2)  # 2: <async> and </async>
        answer.cut = size < answer.method.block
        if size < 1:
            return None
        answer.rounds.append(RoundTokens())
        answer.scaffold([([], size)])
        return answer.decoder.spans(answer)


# ---------------------------------------------------------------- how it decodes: spans that grow from left to right


class Stream:
    """A causal span as it grows: a pass computes its entries [cached, known), and reads the token after the last."""

    def __init__(self, cached: int, known: int):
        self.cached, self.known = cached, known

    def entries(self) -> range:
        """The layout entries of the next pass."""
        return range(self.cached, self.known)

    def readings(self) -> list[Reading]:
        return [Reading([self.known - 1])]

    def check(self, replies: Iterator[Reply], answer: Answer) -> list[int]:
        """The next tokens, from the replies to its readings, which it takes off."""
        self.cached = self.known
        return next(replies).tokens


class Extend(Phase):
    """Stage 2 of causal spans: all grow in the same passes, each at its own pace, until [PAD] or the last slot."""

    in_spans = True
    stream = Stream

    def __init__(self, answer: Answer):
        super().__init__(answer)
        spans = answer.rounds[-1].spans
        self.first, self.slots = spans[0][0], [answer.slots(span) for span in spans]
        self.streams = [self.stream(span[0], slots[0]) for span, slots in zip(spans, self.slots)]

    def unfinished(self) -> list[tuple[Stream, int]]:
        """The streams that have empty slots, and how many."""
        left = [slots[-1] + 1 - stream.known for stream, slots in zip(self.streams, self.slots)]
        return [(stream, n) for stream, n in zip(self.streams, left) if n]

    def entries(self) -> list[int]:
        plan = range(self.answer.cached, self.first)
        return [*plan, *(i for stream, _ in self.unfinished() for i in stream.entries())]

    def readings(self) -> list[Reading]:
        return [reading for stream, _ in self.unfinished() for reading in stream.readings()]

    def take(self, replies: list[Reply]) -> Phase | None:
        self.answer.denoise_passes += 1
        self.answer.critical_path += 1
        self.answer.cached, replies, pad = self.first, iter(replies), self.tokenizer.pad
        for stream, left in self.unfinished():
            tokens = stream.check(replies, self.answer)
            filler = pad if pad in tokens else self.tokenizer.mask  # [PAD] ends the text
            stop = stream.known + left
            self.layout.token[stream.known : stop] = tokens + [filler] * (left - len(tokens))
            stream.known = stop if pad in tokens else stream.known + len(tokens)
        if self.unfinished():
            return self
        if self.answer.method.in_training.attention != "causal":  # as a joint model was trained
            self.layout.see_both_ways(self.answer.rounds[-1].spans)
        return next_round(self.answer)


# ---------------------------------------------------------------- the table


def decoder_of(method: Method) -> Decoder:
    """The phases of a method by its plan and its attention; another way to decode is a line of its own in DECODERS."""
    if method.plan == "none":
        return Decoder(WrittenPlan)
    spans = DenoiseTogether if method.attention in LINKED else Extend if method.attention == "causal" else Denoise
    return Decoder(GivenPlan if method.plan == "given" else WrittenPlan, spans)


DECODERS = {name: decoder_of(m) for name, m in METHODS.items() if name in (m.decodes or (name,))}
