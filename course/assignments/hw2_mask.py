"""Assignment 2: where everything is in a sequence, and who sees whom."""

import small
from checks import Wrong, check, draw_mask, draw_rows

TITLE = "Layout and hybrid mask"
HOURS = "5 to 7"
TESTS_TAKE = 0.2
FUNCTIONS = {"masks.py": ("Layout.write", "Layout.scaffold", "encode_example", "sees", "visible")}
HANDOUT = """
One network both writes the plan from left to right and denoises all spans at once. What makes that possible is the
mask: a span sees the plan and itself, but not its siblings, so they can be computed together, in any order, or one by
one, with the same result. You write the mask as three integers per token, and the layout that knows them.

## Read

1. README.md, "The method", up to the table of the mask. docs/mask.png has it drawn.
2. minimal.py: `scaffold`, `write_example` and `hybrid_mask`, which is the mask sentence by sentence, as a matrix.
3. Section 3 of [the paper](https://arxiv.org/abs/2510.18087), on the attention mask.
4. masks.py: the docstrings; `_columns`, `cut` and `see_both_ways` are given.
5. tokenizer.py: `encode_span` and the token ids in `Tokenizer.__init__`.

Before you begin, draw the mask of the README's example on squared paper: prompt, two topics, two spans of three
slots, `<sync/>`, two words. Rows are queries, columns are keys.

## Build

**The rule** (`sees`, `visible`). A query with the integers prefix, begin and end sees the keys [0, prefix) and
[begin, end). `visible` makes the dense mask of a whole batch of them.

**Writing** (`Layout.write`). Prompt, plan and text see all that is before them, and themselves. Finished spans of
earlier rounds are before them, too. `_columns` fills the other columns; outside spans, `span` is -1. Positions are
counted through: whatever is written continues `position` where the entry before it ended, spans included, so siblings
follow each other and the next round follows the last span.

**The scaffold** (`Layout.scaffold`). All spans of a round, each `<async>`, topic, colon, slots, `</async>`. Tags,
topic and colon are GIVEN, the rest are SLOT. The prefix of every span of the round ends where the first `<async>` is.
`begin` and `end` are the span itself; for `attention` "dense" all spans of the round; for "causal" the span up to the
token itself. The argument `at` is for block diffusion (`encode_blocks`): where it is given, a span has the positions
of another one, and its prefix ends where that begins. It is tested as well, but do it last.

**A whole example** (`encode_example`). The prompt, then each round: `<sync/>` before all but the first, text, the
plan, the spans; `<eos>` at the end, which belongs to the last round. A span has exactly the slots that its plan says,
`Tokenizer.encode_span` pads it.

## Hints, in steps

1. `visible`: `ranges` is (B, T, 3), keys are (n_keys,). Which shapes broadcast to (B, T, n_keys)?
2. `write`: the first token written is number len(self). How many keys does it see?
3. `scaffold`: note where the first span begins before you write anything. Note where each span begins and ends: that
   is also what you return.
4. Dense: only when the last span is written do you know where they all end.
5. `encode_example`: a topic in the plan is `<topic>`, its tokens, one token for the length, `</topic>`. Catch the
   ValueError of `encode_span` and say which prompt it is about.
6. `python show/mask.py --attention causal` draws a mask in the terminal.
"""


def mask(layout, tok, queries=lambda layout, i: True):
    """The mask of a layout, of the queries that a condition picks, and the names of these."""
    import torch

    from masks import visible

    ranges = torch.tensor([layout.prefix, layout.begin, layout.end]).T
    picked = [i for i in range(len(layout)) if queries(layout, i)]
    rows = visible(ranges[None], len(layout))[0][picked].int()
    return {"mask": rows, "names": [tok.name(layout.token[i]) for i in picked]}


def in_span(layout, i):
    return layout.span[i] >= 0


@check(points=10, idea="the mask is prefix or span: a query sees the keys [0, prefix) and [begin, end)", draw=draw_mask)
def rule(rng, size):
    import torch

    from masks import visible

    n = 8 * size
    prefix, begin, end = (torch.from_numpy(rng.integers(0, n + 1, (2, n))) for _ in range(3))
    both = visible(torch.stack([prefix, begin, end], dim=-1), n).int()
    return both.flatten(0, 1)  # (2 * n, n): two sequences, one below the other


@check(points=10, idea="a token of prompt, plan or text sees everything before it, and itself", draw=draw_mask)
def text(rng, size):
    from masks import PLAN, PROMPT, Layout

    tok, layout = small.tokenizer(), Layout()
    layout.write(tok.encode("Tell me about the otter"), PROMPT, 0)
    for round_ in range(size):
        layout.write(rng.integers(0, tok.pad, 4).tolist(), PLAN, round_)
    return mask(layout, tok)


@check(points=20, idea="a span's tags, topic and colon are given, and it has as many slots as its plan says",
       draw=draw_rows)  # fmt: skip
def layout(rng, size):
    from masks import encode_example

    tok = small.tokenizer()
    drawn = encode_example(small.example(rng, tok, [2, 0, 3][: size + 1]), tok)
    columns = {"token": drawn.token, "kind": drawn.kind, "round": drawn.round, "span": drawn.span}
    return {"names": [tok.name(i) for i in drawn.token], **columns, "position": drawn.position}


@check(points=15, idea="a span sees all up to the first `<async>` of its round, and itself in both directions",
       draw=draw_mask)  # fmt: skip
def one_span(rng, size):
    from masks import encode_example

    tok = small.tokenizer()
    return mask(encode_example(small.example(rng, tok, [1]), tok), tok, in_span)


@check(points=15, idea="sibling spans must stay hidden from each other", draw=draw_mask)
def siblings(rng, size):
    from masks import encode_example

    tok = small.tokenizer()
    return mask(encode_example(small.example(rng, tok, [1 + size]), tok), tok, in_span)


@check(points=10, idea="later rounds see the spans of earlier ones; no text sees a span before its `<sync/>`",
       draw=draw_mask)  # fmt: skip
def later_rounds(rng, size):
    from masks import encode_example

    tok = small.tokenizer()
    drawn = encode_example(small.example(rng, tok, [2, 1, 2][: size + 1]), tok)
    return mask(drawn, tok, lambda layout, i: layout.span[i] < 0)


def draw_variants(expected, came):
    return "\n\n".join(f"{kind}: {draw_mask(expected[kind], came[kind])}" for kind in expected)


@check(points=10, idea="dense: spans see all spans of their round; causal: a span sees itself only up to each token",
       draw=draw_variants)  # fmt: skip
def variants(rng, size):
    from masks import encode_example

    tok = small.tokenizer()
    drawn = small.example(rng, tok, [2] * size)
    return {kind: mask(encode_example(drawn, tok, kind), tok, in_span) for kind in ("dense", "causal")}


@check(points=5, idea="a copy of a span has its positions and sees what is before the original", draw=draw_rows)
def copies(rng, size):
    from masks import encode_blocks

    tok = small.tokenizer()
    words = " ".join(small.PARTS[rng.integers(2)] for _ in range(2 * size))
    drawn = encode_blocks("Tell", words, tok, 4)
    columns = {"position": drawn.position, "prefix": drawn.prefix, "begin": drawn.begin, "end": drawn.end}
    return {"names": [tok.name(i) for i in drawn.token], **columns}


WRONG = (
    Wrong("sibling span leaked", "masks.py",
          "self.begin += [first if ", "self.begin += [first if True or ", loses="siblings"),
    Wrong("prefix up to the own async", "masks.py",
          "self.prefix += [first if at is None else original] * (stop - start)",
          "self.prefix += [original] * (stop - start)", loses="siblings"),
    Wrong("prefix one short", "masks.py",
          "self.prefix += [first if at is None else original] * (stop - start)",
          "self.prefix += [first - 1 if at is None else original] * (stop - start)", loses="one_span"),
    Wrong("a token does not see itself", "masks.py",
          "self.prefix += range(start + 1, start + n + 1)", "self.prefix += range(start, start + n)", loses="text"),
    Wrong("both conditions have to hold", "masks.py",
          "(key < prefix) | ((key >= begin)", "(key < prefix) & ((key >= begin)", loses="rule"),
    Wrong("end is seen", "masks.py", "(key < end))", "(key <= end))", loses="rule"),
    Wrong("causal spans in both directions", "masks.py",
          'range(start + 1, stop + 1) if self.attention == "causal" else [stop] * (stop - start)',
          "[stop] * (stop - start)", loses="variants"),
    Wrong("dense spans see only earlier siblings", "masks.py",
          "self.end[first:] = [len(self)] * (len(self) - first)", "pass", loses="variants"),
    Wrong("head is noised like slots", "masks.py",
          "[GIVEN] * len(head) + [SLOT] * len(slots) + [GIVEN]",
          "[SLOT] * len(head) + [SLOT] * len(slots) + [SLOT]", loses="layout"),
    Wrong("a span is as long as its text", "masks.py",
          "spans.append((topic if repeat_topic else [], slots))",
          "spans.append((topic if repeat_topic else [], [i for i in slots if i != tokenizer.pad]))", loses="layout"),
    Wrong("copies keep their own positions", "masks.py",
          "original = start if at is None else at[number]", "original = start", loses="copies"),
)  # fmt: skip
