"""The two-stage sampler once more, as simply as it can be said: the oracle of test_sample.py and test_methods.py.

One prompt at a time, no cache: every pass computes the whole sequence, with a dense mask built from
the written sentences. What a cache would have cost is counted beside it. Tokens are drawn at any
temperature, but where several spans are denoised in both directions only at temperature 0.
"""

import math
from dataclasses import dataclass
from fractions import Fraction

import torch

from grammar import Grammar
from model import dense, rope


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
    if (
        key.round < query.round or key.span is None
    ):  # a span sees the rounds before, and prompt, plan and text of its own
        return k < q
    if key.round > query.round:
        return False
    if attention == "dense":  # spans of a round see each other
        return True
    if attention == "joint":  # left to right while they grow, in both directions once they are finished
        attention = "causal" if query.round == tokens[-1].round else "sparse"
    return key.span == query.span and (attention == "sparse" or k <= q)


@torch.no_grad()
def hidden_states(model, tokens, attention):
    """Hidden states (T, D), computed afresh from the model's own blocks."""
    n, config = len(tokens), model.config
    mask = torch.tensor([[sees(tokens, q, k, attention) for k in range(n)] for q in range(n)])
    cos, sin = rope(torch.arange(n)[None], config.d_model // config.n_head, config.rope_theta)
    x = model.embedding(torch.tensor([[t.id for t in tokens]]))
    for block in model.blocks:
        x = block(x, (cos, sin), dense, mask[None, None], lambda k, v: (k, v))
    return model.norm(x)[0]


CERTAINTY = {  # by the order: how certain the slot at a place is, by its probabilities and the token it would get
    "entropy": lambda p, token, place: float((p[p > 0] * p[p > 0].log()).sum()),  # of negative sign
    "confidence": lambda p, token, place: float(p[token]),
    "margin": lambda p, token, place: float(p.max() - p.sort().values[-2]),
}


class NaiveSampler:
    def __init__(self, model, tokenizer, config, attention="sparse", repeat_topic=True):
        self.model, self.tok, self.config, self.attention = model, tokenizer, config, attention
        self.repeat_topic = repeat_topic

    def begin(self, prompt):
        tok = self.tok
        self.tokens = [Token(i, 0) for i in (tok.user, *tok.encode(prompt), tok.assistant)]
        self.computed = 0  # so many tokens a cache would hold
        self.cost = dict(plan_passes=0, denoise_passes=0, critical_path=0, positions=0)
        self.generator = torch.Generator().manual_seed(self.config.seed)

    def answer_blocks(self, prompt, size):
        """Under a given plan: `blocks` of slot ids up to the first with a [PAD], `cut` if room ended before or shrank the last, and costs."""
        self.begin(prompt)
        room, blocks, cut = self.config.max_tokens, [], False
        while not cut and not (blocks and self.tok.pad in blocks[-1]):
            slots = min(size, room - 2)  # the two tags
            cut = slots < size
            if slots > 0:
                start = len(self.tokens)
                place = self.scaffold([], slots, 0, len(blocks))
                self.denoise([place], start)
                blocks.append([self.tokens[i].id for i in place if self.tokens[i].slot])
                room -= slots + 2
        kept = sum(i != self.tok.pad for slots in blocks for i in slots)
        return dict(blocks=blocks, cut=cut, content_tokens=kept, **self.cost)

    def answer(self, prompt):
        """Returns a dict: `rounds` as (text ids, [(topic ids, length, slot ids) a span]), `cut`, and the costs."""
        self.begin(prompt)
        tok, config = self.tok, self.config
        grammar, rounds, last, before = Grammar(tok, config.max_tokens, config.length_scale), [], None, ()
        self.endless = Grammar(tok, 1_000_000, config.length_scale)  # as if there were positions enough
        self.cut = False
        while last != tok.eos:
            text, topics, last = [], [], None
            while last not in (tok.sync, tok.eos):
                last = self.next_token(grammar)
                self.cost["critical_path"] += 1
                said = [tok.decode(name) for name, _ in topics]
                said = [name.split(" ", 1)[-1] if name.split(" ")[0].isdecimal() else name for name in said]
                if tok.length_of(last) and said[-1] in said[:-1]:  # a second time: taken back
                    del self.tokens[-1 - len(topics.pop()[0]) :]
                    grammar, self.endless = before
                    for g in before:
                        g.complete, g._allowed = True, None
                    self.computed = min(self.computed, len(self.tokens) - 1)
                    continue
                if last == tok.topic:
                    before = grammar.copy(), self.endless.copy()
                grammar.advance(last)
                self.endless.advance(last)
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
        return dict(rounds=rounds, cut=self.cut, content_tokens=sum(i != tok.pad for i in kept), **self.cost)

    def draw(self, logits):
        """A token of each row of logits, all rows drawn together."""
        if self.config.temperature == 0:
            return logits.argmax(-1).tolist()
        probs = (logits / self.config.temperature).softmax(-1)
        return torch.multinomial(probs, 1, generator=self.generator)[:, 0].tolist()

    def next_token(self, grammar):
        """The next allowed token of plan or text; a forced one costs no pass. Notes what does not fit any more."""
        allowed, endless = (torch.from_numpy(g.allowed()) for g in (grammar, self.endless))
        if allowed.sum() == 1:
            token = int(allowed.nonzero()[0])
            self.cut |= bool(endless.sum() > 1)
            return token
        logits = self.model.logits(hidden_states(self.model, self.tokens, self.attention)[-1])
        self.cost["plan_passes"] += 1
        self.cost["positions"] += len(self.tokens) - self.computed
        self.computed = len(self.tokens)
        self.cut |= not allowed[torch.where(endless, logits, -torch.inf).argmax()]
        return self.draw(torch.where(allowed, logits, -torch.inf)[None])[0]

    def spans(self, topics, number):
        """Scaffold and denoise the spans of a round."""
        tok, places, plan_end = self.tok, [], len(self.tokens)
        for span, (name, length) in enumerate(topics):
            n = max(1, math.ceil(length * tok.unit * self.config.length_scale))
            places.append(self.scaffold([*name, tok.colon] if self.repeat_topic else [], n, span, number))
        (self.extend if self.attention in ("causal", "joint") else self.denoise)(places, plan_end)
        slots = [[self.tokens[i].id for i in place if self.tokens[i].slot] for place in places]
        return [(name, length, ids) for (name, length), ids in zip(topics, slots)]

    def scaffold(self, head, n, span, number):
        """Append a span of n slots; returns its place."""
        tok, start = self.tok, len(self.tokens)
        self.tokens += [Token(i, number, span) for i in (tok.async_, *head)]
        self.tokens += [Token(tok.mask, number, span, slot=True) for _ in range(n)]
        self.tokens += [Token(tok.async_end, number, span)]
        return range(start, len(self.tokens))

    def pay(self, plan_end, entries):
        """A pass over spans: what the cache lacks before them, and so many entries of them."""
        self.cost["denoise_passes"] += 1
        self.cost["critical_path"] += 1
        self.cost["positions"] += plan_end - self.computed + entries
        self.computed = plan_end

    def extend(self, places, plan_end):
        """Causal spans: each pass writes one slot of each unfinished span, read off the token before it."""
        slots, step = [[i for i in place if self.tokens[i].slot] for place in places], 0
        while unfinished := [n for n, s in enumerate(slots) if self.masked(s)]:
            before = [slots[n][step] - 1 for n in unfinished]
            self.pay(plan_end, sum(1 if step else i + 1 - places[n].start for n, i in zip(unfinished, before)))
            hidden = hidden_states(self.model, self.tokens, self.attention)
            for n, token in zip(unfinished, self.draw(self.slot_logits(hidden[before]))):
                for i in slots[n][step:] if token == self.tok.pad else slots[n][step : step + 1]:
                    self.tokens[i].id = token
            step += 1

    def denoise(self, places, plan_end):
        slots = [[i for i in place if self.tokens[i].slot] for place in places]
        ratio = self.config.steps_ratio or (None if self.config.threshold else 0.5)
        steps = math.ceil(Fraction(str(ratio)) * max(map(len, slots), default=0)) if ratio else math.inf
        step = 0
        while any(self.masked(s) for s in slots):
            step += 1
            unfinished = [place for place, s in zip(places, slots) if self.masked(s) or self.attention == "dense"]
            self.pay(plan_end, sum(map(len, unfinished)))
            hidden = hidden_states(self.model, self.tokens, self.attention)
            groups = [[i for s in slots for i in s]] if self.attention == "dense" else slots
            for group in groups:
                self.fill(group, step, steps, hidden)

    def slot_logits(self, hidden):
        """Slots hold text or [PAD], never a tag."""
        return self.model.logits(hidden)[:, : self.tok.pad + 1]

    def masked(self, slots):
        return [i for i in slots if self.tokens[i].id == self.tok.mask]

    def fill(self, slots, step, steps, hidden):
        """Fill the most certain slots of a span, or of all spans of a dense round."""
        left, guess = self.masked(slots), {}
        logits = self.slot_logits(hidden[left])
        for i, p, token in zip(left, logits.softmax(-1), self.draw(logits)):
            sure = float(p[token])
            guess[i] = token, sure if self.config.threshold else CERTAINTY[self.config.order](p, token, i), sure
        waiting = [(self.config.apart, self.beside_its_like), (self.config.pads_last, self.before_text)]
        first = [i for i in left if not any(waits(i, guess) for asked, waits in waiting if asked)]
        first.sort(key=lambda i: -guess[i][1])
        filled = len(slots) - len(left)
        chosen = first[: max(1, math.ceil(len(slots) * step / steps) - filled)]
        chosen += [i for i in left if self.config.threshold and guess[i][2] >= self.config.threshold]
        for i in chosen:
            self.tokens[i].id = guess[i][0]

    def before_text(self, i, guess):
        """Whether it would get [PAD] although a slot before it, with only masked ones between, would get text."""
        j, tokens = i, []
        while (j := j - 1) in guess:
            tokens.append(guess[j][0])
        return guess[i][0] == self.tok.pad and any(token != self.tok.pad for token in tokens)

    def beside_its_like(self, i, guess):
        """Whether a neighbour would get the same token, and is more certain of it, or as certain and on the left."""
        token, sure, _ = guess[i]
        left, right = (guess.get(j, (None, 0, 0)) for j in (i - 1, i + 1))
        return token != self.tok.pad and (left[0] == token and left[1] >= sure or right[0] == token and right[1] > sure)
