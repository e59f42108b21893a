"""The two-stage sampler once more, as simply as it can be said: the oracle of test_sample.py.

One prompt at a time, temperature 0, no cache: every pass computes the whole sequence, with a dense
mask built from the written sentences. What a cache would have cost is counted beside it.
"""

import math
from dataclasses import dataclass

import torch

from model import rope
from tags import Grammar


@dataclass
class Token:
    """`round` counts from 0; `span` is its number in the round, None outside spans; `slot`: not a tag or topic of a span."""

    id: int
    round: int
    span: int = None
    slot: bool = False


def sees(tokens, q, k, attention):
    """Whether token q sees token k, one sentence a line."""
    query, key = tokens[q], tokens[k]
    if query.span is None:  # prompt, plan and text see all that is written before them, finished spans included
        return k <= q
    if key.round < query.round or key.span is None:  # a span sees the rounds before, and prompt, plan and text of its own
        return k < q
    if key.round > query.round:
        return False
    if attention == "dense":  # spans of a round see each other
        return True
    return key.span == query.span and (attention == "sparse" or k <= q)


@torch.no_grad()
def hidden_states(model, tokens, attention):
    """Hidden states (T, D), computed afresh from the model's own blocks."""
    n, config = len(tokens), model.config
    mask = torch.tensor([[sees(tokens, q, k, attention) for k in range(n)] for q in range(n)])
    cos, sin = rope(torch.arange(n)[None], config.d_model // config.n_head, config.rope_theta)
    x = model.embedding(torch.tensor([[t.id for t in tokens]]))
    for block in model.blocks:
        x = block(x, cos, sin, mask[None, None], lambda k, v: (k, v))
    return model.norm(x)[0]


def certainty(p, order):
    if order == "confidence":
        return float(p.max())
    if order == "margin":
        first, second = p.sort(descending=True).values[:2]
        return float(first - second)
    return float((p[p > 0] * p[p > 0].log()).sum())  # negative entropy


class NaiveSampler:
    def __init__(self, model, tokenizer, config, attention="sparse"):
        self.model, self.tok, self.config, self.attention = model, tokenizer, config, attention

    def answer(self, prompt):
        """Returns a dict: `rounds` as (text ids, [(topic ids, length, slot ids) a span]), and the costs."""
        tok, config = self.tok, self.config
        self.tokens = [Token(i, 0) for i in (tok.user, *tok.encode(prompt), tok.assistant)]
        self.computed = 0  # so many tokens a cache would hold
        self.cost = dict(plan_passes=0, denoise_passes=0, critical_path=0, positions=0)
        grammar, rounds, last = Grammar(tok, config.max_tokens, config.length_scale), [], None
        while last != tok.eos:
            text, topics, last = [], [], None
            while last not in (tok.sync, tok.eos):
                last = self.next_token(grammar)
                grammar.advance(last)
                self.cost["critical_path"] += 1
                if last == tok.topic:
                    topics.append([[], 0])
                elif tok.length_of(last):
                    topics[-1][1] = tok.length_of(last)
                elif last < tok.pad:
                    (topics[-1][0] if topics else text).append(last)
                if last not in (tok.sync, tok.eos):
                    self.tokens.append(Token(last, len(rounds)))
            rounds.append((text, self.spans(topics, len(rounds))))
            if last == tok.sync:
                self.tokens.append(Token(tok.sync, len(rounds)))
        kept = [t for text, spans in rounds for t in (*text, *(i for *_, slots in spans for i in slots))]
        return dict(rounds=rounds, content_tokens=sum(i != tok.pad for i in kept), **self.cost)

    def next_token(self, grammar):
        """The likeliest allowed token of plan or text; a forced one costs no pass."""
        allowed = torch.from_numpy(grammar.allowed())
        if allowed.sum() == 1:
            return int(allowed.nonzero()[0])
        logits = self.model.logits(hidden_states(self.model, self.tokens, self.attention)[-1])
        self.cost["plan_passes"] += 1
        self.cost["positions"] += len(self.tokens) - self.computed
        self.computed = len(self.tokens)
        return int(torch.where(allowed, logits, -torch.inf).argmax())

    def spans(self, topics, number):
        """Scaffold and denoise the spans of a round."""
        tok, config, places = self.tok, self.config, []
        plan_end = len(self.tokens)
        for span, (name, length) in enumerate(topics):
            n = max(1, math.ceil(length * tok.unit * config.length_scale))
            start = len(self.tokens)
            self.tokens += [Token(i, number, span) for i in (tok.async_, *name, tok.colon)]
            self.tokens += [Token(tok.mask, number, span, slot=True) for _ in range(n)]
            self.tokens += [Token(tok.async_end, number, span)]
            places.append(range(start, len(self.tokens)))
        slots = [[i for i in place if self.tokens[i].slot] for place in places]
        steps = math.ceil(config.steps_ratio * max(map(len, slots), default=0))
        step = 0
        while any(self.masked(s) for s in slots):
            step += 1
            unfinished = [place for place, s in zip(places, slots) if self.masked(s) or self.attention == "dense"]
            self.cost["denoise_passes"] += 1
            self.cost["critical_path"] += 1
            self.cost["positions"] += plan_end - self.computed + sum(map(len, unfinished))
            self.computed = plan_end
            hidden = hidden_states(self.model, self.tokens, self.attention)
            groups = [[i for s in slots for i in s]] if self.attention == "dense" else slots
            for group in groups:
                self.fill(group, step, steps, hidden)
        return [(name, length, [self.tokens[i].id for i in s]) for (name, length), s in zip(topics, slots)]

    def masked(self, slots):
        return [i for i in slots if self.tokens[i].id == self.tok.mask]

    def fill(self, slots, step, steps, hidden):
        """Fill the most certain slots of a span, or of all spans of a dense round."""
        left, guess = self.masked(slots), {}
        for i in left:
            p = self.model.logits(hidden[i], self.tok.pad + 1).softmax(-1)
            confidence = float(p.max())
            guess[i] = int(p.argmax()), confidence if self.config.threshold else certainty(p, self.config.order), confidence
        left.sort(key=lambda i: -guess[i][1])
        if self.config.threshold:
            chosen = [i for i in left if guess[i][2] >= self.config.threshold] or left[:1]
        else:
            filled = len(slots) - len(left)
            chosen = left[: max(0, math.ceil(len(slots) * step / steps) - filled)]
        for i in chosen:
            self.tokens[i].id = guess[i][0]
