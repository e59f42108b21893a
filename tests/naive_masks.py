"""The oracle of layout and mask: what a token is and sees, worked out from the tags in its sequence alone.

Nothing here reads the columns of a `Layout`.
"""

from dataclasses import dataclass

import numpy as np
import torch

from masks import encode_example, visible
from noise import IGNORE


@dataclass(frozen=True)
class Place:
    """What the tags say about one token; `span` is its number within the round, None outside spans."""

    i: int
    name: str
    part: str  # "prompt", "outside" (plan or text) or "span"
    round: int
    span: int = None
    content: bool = False  # a slot: between the scaffold's `<async> topic:` and `</async>`

    def with_sibling(self, other):
        return self.part == other.part == "span" and self.round == other.round and self.span != other.span

    def same_span(self, other):
        return self.part == other.part == "span" and self.round == other.round and self.span == other.span


def read_tags(tokens, tokenizer):
    """Walk a token sequence from tag to tag. Returns a `Place` a token."""
    places, part, round_, span, start, topics = [], "prompt", 0, -1, 0, []
    for i, name in enumerate(tokenizer.name(int(token)) for token in tokens):
        if name == "<sync/>":
            round_, span, topics = round_ + 1, -1, []
        elif name == "<topic>":
            topics.append([])
        elif name == "<async>":
            part, span, start = "span", span + 1, i
        elif part == "outside" and topics and name != "</topic>":
            topics[-1].append(name)  # the topic's name and its length
        inside = part == "span"
        # the scaffold's head is <async>, the topic's name and a colon: as many tokens as name and length, and one more
        content = inside and i - start > len(topics[span]) and name != "</async>"
        places.append(Place(i, name, part, round_, span if inside else None, content))
        if name in ("<assistant>", "</async>"):
            part = "outside"
    return places


def sees(query, key, attention):
    """Whether a token sees another, by the written sentences (method, section 3)."""
    earlier_round = key.round < query.round
    own_plan = key.round == query.round and key.part != "span" and key.name != "<eos>"
    if query.part != "span":
        round_is_over = query.name == "<eos>"
        return earlier_round or (own_plan and key.i <= query.i) or round_is_over
    own_span = query.same_span(key) and (attention != "causal" or key.i <= query.i)
    sibling = attention == "dense" and query.with_sibling(key)
    return earlier_round or own_plan or own_span or sibling


def oracle_mask(places, attention):
    return np.array([[sees(query, key, attention) for key in places] for query in places])


def oracle_target(places, tokens):
    """The next token outside spans, from the prompt's last token on."""
    target = [IGNORE] * len(places)
    for place in places:
        if place.part == "outside" or place.name == "<assistant>":
            following = [later.i for later in places[place.i + 1 :] if later.part == "outside"]
            target[place.i] = int(tokens[following[0]]) if following else IGNORE
    return target


def mask_of(layout):
    ranges = torch.tensor([layout.prefix, layout.begin, layout.end]).T
    return visible(ranges[None], len(layout))[0].numpy()


def laid_out(example, tokenizer, attention):
    """Layout, mask and what the tags say of an example."""
    layout = encode_example(example, tokenizer, attention)
    return layout, mask_of(layout), read_tags(layout.token, tokenizer)


def pairs(mask, places, query, key):
    """The mask's entries for queries and keys that the two conditions pick; never none."""
    picked = [mask[q.i, k.i] for q in places if query(q) for k in places if key(q, k)]
    assert picked
    return np.array(picked)
