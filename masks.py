"""Where everything is in a sequence, and who sees whom: the hybrid mask.

`Layout` is the one place that knows where prompt, plans, spans and rounds are. Every token has three integers, its
ranges: as a query it sees the keys [0, prefix) and [begin, end) (Planned Diffusion, section 3):

    prompt, plan, text at i    prefix = i + 1                         nothing more
    span token                 prefix = first <async> of its round    its own span, both directions
      dense (PD-DA)            the same                               all spans of its round
      causal (parallel AR)     the same                               its own span up to itself

A joint model writes causal spans too; once finished, they see themselves in both directions, as in its training.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from tags import Example
from tokenizer import Tokenizer

PROMPT, PLAN, GIVEN, SLOT = range(4)  # kinds of token; PLAN is plan or text, GIVEN a span's tags and topic
ATTENTION = ("sparse", "dense", "causal")  # how span tokens see spans
LINKED = ("dense",)  # where spans see siblings: they share a noise level, and stay computed until all are full


@dataclass
class Layout:
    """A sequence built from left to right, one column per fact; `attention` is one of ATTENTION.

    Training writes a whole example; the sampler writes tokens as they come and scaffolds as they
    are planned. Token i of the layout is entry i of the KV cache.
    """

    attention: str = "sparse"
    token: list[int] = field(default_factory=list)
    kind: list[int] = field(default_factory=list)  # PROMPT, PLAN, GIVEN or SLOT
    round: list[int] = field(default_factory=list)
    span: list[int] = field(default_factory=list)  # number of the span within its round, -1 outside spans
    position: list[int] = field(default_factory=list)  # for RoPE
    prefix: list[int] = field(default_factory=list)
    begin: list[int] = field(default_factory=list)
    end: list[int] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.token)

    def write(self, tokens: Sequence[int], kind: int, round_: int) -> None:
        """Append prompt, plan or text tokens: each sees all before it and itself."""
        start, n = len(self), len(tokens)
        self._columns(tokens, [kind] * n, round_, -1, start)
        self.prefix += range(start + 1, start + n + 1)
        self.begin += [0] * n
        self.end += [0] * n

    def scaffold(self, spans: Sequence[tuple[Sequence[int], Sequence[int]]], tokenizer: Tokenizer, round_: int,
                 at: Sequence[int] | None = None) -> list[tuple[int, int]]:  # fmt: skip
        """Append the spans of a round's plan: `<async> topic:`, slots, `</async>` each.

        `spans`: a pair (topic tokens, slot tokens) per span; the slots may hold text, [PAD] or [MASK], and without
        topic tokens the span has no head. Returns where each span begins and ends, its tags included. With `at`,
        span n is a copy of the one at entry at[n]: it has the same positions and sees what is before that.
        """
        first, places = len(self), []
        for number, (topic, slots) in enumerate(spans):
            start = len(self)
            head = [tokenizer.async_, *topic, tokenizer.colon] if topic else [tokenizer.async_]
            kinds = [GIVEN] * len(head) + [SLOT] * len(slots) + [GIVEN]
            original = start if at is None else at[number]
            self._columns([*head, *slots, tokenizer.async_end], kinds, round_, number, original)
            stop = len(self)
            places.append((start, stop))
            self.prefix += [first if at is None else original] * (stop - start)
            self.begin += [first if self.attention == "dense" else start] * (stop - start)
            self.end += range(start + 1, stop + 1) if self.attention == "causal" else [stop] * (stop - start)
        if self.attention == "dense":
            self.end[first:] = [len(self)] * (len(self) - first)
        return places

    def see_both_ways(self, places: Sequence[tuple[int, int]]) -> None:
        """From now on causal spans, from entry to entry each, see themselves in both directions."""
        for start, stop in places:
            self.end[start:stop] = [stop] * (stop - start)

    def cut(self, length: int) -> None:
        """Drop all entries from `length` on."""
        for column in (self.token, self.kind, self.round, self.span, self.position, self.prefix, self.begin, self.end):
            del column[length:]

    def _columns(self, tokens: Sequence[int], kinds: list[int], round_: int, span: int, position: int) -> None:
        n = len(tokens)
        self.token += tokens
        self.kind += kinds
        self.round += [round_] * n
        self.span += [span] * n
        self.position += range(position, position + n)


def encode_prompt(prompt: str, tokenizer: Tokenizer) -> list[int]:
    return [tokenizer.user, *tokenizer.encode(prompt), tokenizer.assistant]


def encode_example(example: Example, tokenizer: Tokenizer, attention: str = "sparse", repeat_topic: bool = True,
                   draw_pads: Callable[[], int] | None = None) -> Layout:  # fmt: skip
    """Layout of a whole example (`prompt`, `rounds`), its last token `<eos>`.

    `repeat_topic`: whether a span begins with its topic. A span's slots are as many as its plan says, [PAD] after its
    text; with `draw_pads` they are its text and as many [PAD] as that returns, one at least if it has no text, whatever
    the plan says.
    Raises ValueError, naming prompt and topic, if no plan could ask for one of the spans.
    """
    layout, number = Layout(attention), 0
    layout.write(encode_prompt(example.prompt, tokenizer), PROMPT, 0)
    for number, round_ in enumerate(example.rounds):
        if number:
            layout.write([tokenizer.sync], PLAN, number)
        layout.write(tokenizer.encode(round_.text), PLAN, number)
        spans = []
        for span in round_.spans:
            try:
                topic, slots = tokenizer.encode_span(span)
            except ValueError as error:
                raise ValueError(f"prompt {example.prompt[:60]!r}, {error}") from None
            layout.write([tokenizer.topic, *topic, tokenizer.length_id(span.length), tokenizer.topic_end], PLAN, number)
            if draw_pads is not None:
                text = [i for i in slots if i != tokenizer.pad]
                slots = text + [tokenizer.pad] * max(draw_pads(), not text)
            spans.append((topic if repeat_topic else [], slots))
        layout.scaffold(spans, tokenizer, number)
    layout.write([tokenizer.eos], PLAN, number)
    return layout


def encode_blocks(prompt: str, text: str, tokenizer: Tokenizer, size: int) -> Layout:
    """Layout of an answer under a given plan, block after block of `size` slots, that trains all its blocks at once.

    Each block but the last (whose [PAD] ends the answer) stands there twice: later blocks see its clean copy, and
    its other copy, for the loss, sees the clean ones before it (block diffusion, arXiv 2503.09573, section 3.1).
    """
    layout, tokens = Layout(), tokenizer.encode(text)
    layout.write(encode_prompt(prompt, tokenizer), PROMPT, 0)
    blocks = [tokens[start : start + size] for start in range(0, len(tokens) + 1, size)]
    blocks[-1] += [tokenizer.pad] * (size - len(blocks[-1]))
    at = [len(layout) + n * (size + 2) for n in range(len(blocks))]  # 2: <async> and </async>
    for block in blocks[:-1]:
        layout.scaffold([([], block)], tokenizer, 0)
    layout.kind = [GIVEN if kind == SLOT else kind for kind in layout.kind]
    layout.scaffold([([], block) for block in blocks], tokenizer, 0, at)
    return layout


def sees(key: Any, prefix: Any, begin: Any, end: Any) -> Any:
    """The rule: whether a query with these ranges sees a key (all numbers, or all tensors)."""
    return (key < prefix) | ((key >= begin) & (key < end))


def visible(ranges: torch.Tensor, n_keys: int) -> torch.Tensor:
    """The dense mask (B, T, n_keys), True where query sees key. ranges: (B, T, 3), a query's prefix, begin, end."""
    prefix, begin, end = ranges.unsqueeze(-2).unbind(-1)  # (B, T, 1) each
    key = torch.arange(n_keys, device=ranges.device)
    return sees(key, prefix, begin, end)
