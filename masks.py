"""Where everything is in a sequence, who sees whom, what is noised and what is predicted.

`Layout` is the one place that knows where prompt, plans, spans and rounds are. Every token has three
integers: as a query it sees the keys [0, prefix) and [begin, end) (Planned Diffusion, section 3):

    prompt, plan, text at i    prefix = i + 1                         nothing more
    span token                 prefix = first <async> of its round    its own span, both directions
      dense (PD-DA)            the same                               all spans of its round
      causal (parallel AR)     the same                               its own span up to itself

Run `python masks.py` to see the mask of an example.
"""

import argparse
import sys
from dataclasses import dataclass, field, fields
from functools import cached_property
from types import SimpleNamespace

import numpy as np
import torch

from tags import Round, Span, Tokenizer, pieces, span_slots

PROMPT, PLAN, GIVEN, SLOT = range(4)  # kinds of token; PLAN is plan or text, GIVEN a span's tags and topic
IGNORE = -100  # target of positions that predict nothing
ATTENTION = ("sparse", "dense", "causal")  # how span tokens see spans


# ---------------------------------------------------------------- layout


@dataclass
class Layout:
    """A sequence built from left to right, a column a fact; `attention` is one of ATTENTION.

    Training writes a whole example; the sampler writes tokens as they come and scaffolds as they
    are planned. Token i of the layout is entry i of the KV cache.
    """

    attention: str = "sparse"
    token: list = field(default_factory=list)
    kind: list = field(default_factory=list)
    round: list = field(default_factory=list)
    span: list = field(default_factory=list)  # number of the span within its round, -1 outside spans
    position: list = field(default_factory=list)  # for RoPE
    prefix: list = field(default_factory=list)
    begin: list = field(default_factory=list)
    end: list = field(default_factory=list)

    def __len__(self):
        return len(self.token)

    def write(self, tokens, kind, round_):
        """Append prompt, plan or text tokens: each sees all before it and itself."""
        start, n = len(self), len(tokens)
        self._columns(tokens, [kind] * n, round_, -1, start)
        self.prefix += range(start + 1, start + n + 1)
        self.begin += [0] * n
        self.end += [0] * n

    def scaffold(self, spans, tokenizer, round_, at=None):
        """Append the spans of a round's plan: `<async> topic:`, slots, `</async>` each.

        `spans`: a (topic tokens, slot tokens) pair a span; the slots may hold text, [PAD] or [MASK],
        and without topic tokens the span has no head. Returns where each span begins and ends, its tags included.
        With `at`, span n is a copy of the one at entry at[n]: it has the same positions and sees what is before that.
        """
        first, places = len(self), []
        for number, (topic, slots) in enumerate(spans):
            head, start = [tokenizer.async_, *([*topic, tokenizer.colon] if topic else [])], len(self)
            tokens = [*head, *slots, tokenizer.async_end]
            kinds = [GIVEN] * len(head) + [SLOT] * len(slots) + [GIVEN]
            self._columns(tokens, kinds, round_, number, start if at is None else at[number])
            stop, n = len(self), len(tokens)
            places.append((start, stop))
            self.prefix += [first if at is None else at[number]] * n
            self.begin += [first if self.attention == "dense" else start] * n
            self.end += range(start + 1, stop + 1) if self.attention == "causal" else [stop] * n
        if self.attention == "dense":
            self.end[first:] = [len(self)] * (len(self) - first)
        return places

    def _columns(self, tokens, kinds, round_, span, position):
        n = len(tokens)
        self.token += tokens
        self.kind += kinds
        self.round += [round_] * n
        self.span += [span] * n
        self.position += range(position, position + n)


def encode_prompt(prompt, tokenizer):
    return [tokenizer.user, *tokenizer.encode(prompt), tokenizer.assistant]


def encode_example(example, tokenizer, attention="sparse", repeat_topic=True):
    """Layout of a whole example (`prompt`, `rounds`), its last token `<eos>`.

    `repeat_topic`: whether a span begins with its topic. Raises ValueError if a span's text is longer than planned.
    """
    layout, number = Layout(attention), 0
    layout.write(encode_prompt(example.prompt, tokenizer), PROMPT, 0)
    for number, round_ in enumerate(example.rounds):
        if number:
            layout.write([tokenizer.sync], PLAN, number)
        layout.write(tokenizer.encode(round_.text), PLAN, number)
        spans = []
        for span in round_.spans:
            topic, slots = tokenizer.encode(span.topic), tokenizer.encode(span.text)
            planned = span_slots(span.length, tokenizer.unit)
            if len(slots) > planned:
                raise ValueError(f"the span {span.topic!r} of the prompt {example.prompt[:60]!r} has {len(slots)} "
                                 f"tokens, its plan only {planned} ({span.length} x {tokenizer.unit})")  # fmt: skip
            layout.write([tokenizer.topic, *topic, tokenizer.length_id(span.length), tokenizer.topic_end], PLAN, number)
            spans.append((topic if repeat_topic else [], slots + [tokenizer.pad] * (planned - len(slots))))
        layout.scaffold(spans, tokenizer, number)
    layout.write([tokenizer.eos], PLAN, number)
    return layout


def encode_blocks(prompt, text, tokenizer, size):
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


def sees(key, prefix, begin, end):
    """The rule: whether a query with these three integers sees a key (numbers or tensors)."""
    return (key < prefix) | ((key >= begin) & (key < end))


def visible(see, n_keys):
    """The dense mask. see: (B, T, 3) integers prefix, begin, end. Returns (B, T, n_keys), True where query sees key."""
    prefix, begin, end = see.unsqueeze(-2).unbind(-1)  # (B, T, 1) each
    key = torch.arange(n_keys, device=see.device)
    return sees(key, prefix, begin, end)


# ---------------------------------------------------------------- training examples


class Sequence:
    """A layout as arrays, with the autoregressive target of every token that has one.

    At plan and text tokens and at the prompt's last token the target is the next token of the plan
    or text: the spans in between are skipped, so the last `</topic>` predicts `<sync/>` or `<eos>`.
    """

    def __init__(self, layout):
        def array(column):
            return np.array(column, dtype=np.int64)

        self.token, self.kind, self.round = array(layout.token), array(layout.kind), array(layout.round)
        self.position = array(layout.position)
        self.see = np.stack([array(layout.prefix), array(layout.begin), array(layout.end)], axis=1)
        self.span = np.where(array(layout.span) >= 0, self.round * 1000 + array(layout.span), -1)  # unique in sequence
        self.attention = layout.attention
        self.n_rounds = int(self.round[-1]) + 1
        written = np.flatnonzero(self.kind == PLAN)
        reads = np.concatenate([np.flatnonzero(self.kind == PROMPT)[-1:], written[:-1]])[: len(written)]
        self.next = np.full(len(self.token), IGNORE)
        self.next[reads] = self.token[written]

    def stop(self, round_):
        """Where a sequence that trains this round is cut off."""
        return int(np.flatnonzero(self.round == round_)[-1]) + 1

    def targets_in(self, round_):
        """How many tokens of a round are predicted."""
        mine = self.round == round_
        return int((mine & (self.kind == SLOT)).sum() + (mine & (self.next != IGNORE)).sum())


@dataclass
class Batch:
    """Tensors of a training batch; B sequences padded to T tokens."""

    token: torch.Tensor  # (B, T) int64, slots noised
    position: torch.Tensor  # (B, T) int64
    see: torch.Tensor  # (B, T, 3) int64: prefix, begin, end
    target: torch.Tensor  # (B, T) int64, IGNORE where nothing is predicted
    in_span: torch.Tensor  # (B, T) bool: slots of the noised round, masked or not
    weight: torch.Tensor  # (B, T) float32, weight of a slot's loss: 1/t or 1
    n_tokens: int  # tokens that are not padding

    @cached_property
    def places(self):
        """Where in (B * T) something is predicted: (plan or text, slots)."""
        predicted, in_span = (self.target != IGNORE).flatten(), self.in_span.flatten()
        return (predicted & ~in_span).nonzero()[:, 0], (predicted & in_span).nonzero()[:, 0]

    @property
    def n_keys(self):
        """How many keys all tokens see together."""
        return int((self.see[..., 0] + self.see[..., 2] - self.see[..., 1]).sum())

    def map(self, function):
        """The batch with a function applied to each array."""
        columns = {field.name: getattr(self, field.name) for field in fields(self)}
        return Batch(**{name: value if name == "n_tokens" else function(value) for name, value in columns.items()})

    def to(self, device):
        def move(tensor):
            return (tensor.pin_memory() if str(device).startswith("cuda") else tensor).to(device, non_blocking=True)

        moved = self.map(move)
        moved.places = tuple(map(move, self.places))  # found here: on a GPU the host would have to wait for it
        return moved


def make_batch(sequences, rounds, tokenizer, rng, weight="elbo", t_min=0.0, history="clean"):
    """Noise one round of each sequence: what is before it is clean, as in sampling, and what follows is cut off.

    `history` "noised" noises the rounds before it too, as the authors' code does.

    Each span (each round, if dense) draws t ~ U(0, 1], stratified over the batch; each of its slots
    becomes [MASK] with probability t and then predicts itself. `weight`: "elbo" weighs a slot by
    1/t, which makes the sum the negative ELBO of masked diffusion (MDLM, arXiv 2406.07524, eq. 10);
    "uniform" by 1. With `t_min` above 0, t ~ U(t_min, 1]. `rng`: numpy Generator.
    """
    stops = [s.stop(r) for s, r in zip(sequences, rounds)]
    shape = (len(sequences), max(stops))
    batch = Batch(
        token=np.full(shape, tokenizer.pad), position=np.zeros(shape, np.int64), see=np.tile([1, 0, 0], (*shape, 1)),
        target=np.full(shape, IGNORE), in_span=np.zeros(shape, bool), weight=np.ones(shape, np.float32),
        n_tokens=sum(stops),
    )  # fmt: skip
    group = np.full(shape, -1)  # which draw of t a slot shares
    for b, (s, r, stop) in enumerate(zip(sequences, rounds, stops)):
        batch.token[b, :stop], batch.position[b, :stop] = s.token[:stop], s.position[:stop]
        batch.see[b, :stop], batch.target[b, :stop] = s.see[:stop], s.next[:stop]
        noised = s.round[:stop] == r if history == "clean" else s.round[:stop] <= r
        batch.in_span[b, :stop] = (s.kind[:stop] == SLOT) & noised
        group[b, :stop] = b * 1_000_000 + (s.round[:stop] * 1000 if s.attention == "dense" else s.span[:stop])
    if sequences[0].attention == "causal":
        return shifted(batch, tokenizer).map(torch.from_numpy)
    slots = batch.in_span
    _, draw = np.unique(group[slots], return_inverse=True)
    n = draw.max(initial=-1) + 1
    t = (rng.permutation(n) + 1 - rng.random(n)) / max(n, 1)  # one draw in each of n equal parts of (0, 1]
    t = (t_min + (1 - t_min) * t)[draw]
    masked = rng.random(len(t)) < t
    batch.target[slots] = np.where(masked, batch.token[slots], IGNORE)
    batch.token[slots] = np.where(masked, tokenizer.mask, batch.token[slots])
    batch.weight[slots] = 1 / t if weight == "elbo" else 1
    return batch.map(torch.from_numpy)


def shifted(batch, tokenizer):
    """Causal spans are not noised: each slot, up to the first [PAD], is the target of the token before it."""
    over = (batch.token == tokenizer.pad) & (np.roll(batch.token, 1, axis=1) == tokenizer.pad)
    batch.in_span = np.roll(batch.in_span & ~over, -1, axis=1)
    batch.target = np.where(batch.in_span, np.roll(batch.token, -1, axis=1), batch.target)
    return batch


# ---------------------------------------------------------------- pictures


def otter(attention):
    """The example of every picture: two rounds, the first with two spans. Returns its layout and tokenizer."""
    spans = (Span("habitat", "rivers and quiet coasts", 2), Span("food", "fish", 1))
    example = SimpleNamespace(prompt="tell me about otters", rounds=(Round("", spans), Round("playful river animals")))
    words = [example.prompt, *pieces(example.rounds), "habitat food"]
    tokenizer = Tokenizer.train(words * 2, 450, unit=3)
    return encode_example(example, tokenizer, attention), tokenizer


def show(layout, tokenizer, colours=False):
    """Lines of the mask: a row a query, a column a key, drawn by the kind of the key."""
    see = torch.tensor([*zip(layout.prefix, layout.begin, layout.end)])
    inks = {PROMPT: ("░░", 37), PLAN: ("▒▒", 36), GIVEN: ("▓▓", 33), SLOT: ("██", 32)}
    inks = {kind: f"\x1b[{colour}m{ink}\x1b[0m" if colours else ink for kind, (ink, colour) in inks.items()}
    for token, row in zip(layout.token, visible(see[None], len(layout))[0].tolist()):
        cells = (inks[kind] if seen else "· " for seen, kind in zip(row, layout.kind))
        yield f"{tokenizer.name(token).strip():>12} " + "".join(cells)
    names = ("prompt", "plan and text", "tags and topic of a span", "slot")
    yield "rows see columns: " + "  ".join(f"{ink} {name}" for ink, name in zip(inks.values(), names))


def save_png(path, layouts, tokenizer):
    """The masks of several layouts (name -> Layout) side by side, as a picture. Needs matplotlib."""
    import matplotlib.pyplot as plt

    palette = np.array([[1, 1, 1], [0.6, 0.6, 0.6], [0.2, 0.6, 0.75], [0.9, 0.7, 0.25], [0.35, 0.7, 0.35]])
    figure, axes = plt.subplots(1, len(layouts), figsize=(6 * len(layouts), 6.6), squeeze=False)
    for axis, (name, layout) in zip(axes[0], layouts.items()):
        see = torch.tensor([*zip(layout.prefix, layout.begin, layout.end)])[None]
        axis.imshow(palette[visible(see, len(layout))[0].numpy() * (np.array(layout.kind) + 1)])
        names = [tokenizer.name(token).strip() for token in layout.token]
        axis.set_xticks(range(len(names)), names, rotation=90, fontsize=7)
        axis.set_yticks(range(len(names)), names, fontsize=7)
        axis.set_title(f"{name}: rows see columns")
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main():
    parser = argparse.ArgumentParser(description="Draw the mask of an example: who sees whom.")
    about = "how span tokens see spans (default: %(default)s)"
    parser.add_argument("--attention", choices=ATTENTION, default=ATTENTION[0], help=about)
    parser.add_argument("--png", help="also draw all three variants into this file (needs matplotlib)")
    args = parser.parse_args()
    print("\n".join(show(*otter(args.attention), sys.stdout.isatty())))
    if args.png:
        save_png(args.png, {name: otter(name)[0] for name in ATTENTION}, otter("sparse")[1])


if __name__ == "__main__":
    main()
