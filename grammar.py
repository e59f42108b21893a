"""The grammar of plans as an automaton: which tokens may come next in a plan or text."""

import copy

import numpy as np

from tokenizer import MAX_LENGTH, span_slots

MAX_NAME = 16  # longest topic name a constrained plan can have, in tokens


class Grammar:
    """The automaton of constrained decoding: which tokens may come next in a plan or text.

    `room` is how many positions the answer may still take. The automaton never opens what it has
    no room to close, and pays for a span's scaffold when its topic closes, so every plan parses
    and fits. Where `allowed` leaves one token, that token needs no forward pass of its own.
    """

    def __init__(self, tokenizer, room, length_scale=1.0, plans=True):
        """`plans`: whether the answer may have plans and rounds; an autoregressive model writes text alone."""
        self.tokenizer, self.room, self.scale, self.plans = tokenizer, max(room, 1), length_scale, plans
        self.state, self.name, self.length = "text", 0, 0

    def copy(self):
        """Another automaton in the same state."""
        return copy.copy(self)

    @property
    def done(self):
        return self.state == "done"

    def allowed(self):
        """Boolean array (vocab_size,): the tokens that may come next."""
        tok, mask = self.tokenizer, np.zeros(self.tokenizer.vocab_size, dtype=bool)
        if self.state == "close":
            mask[tok.topic_end] = True
        elif self.state == "name":
            if self.name < MAX_NAME and self._fits(1 + 1, self.name + 1, 1):
                mask[: tok.pad] = True if self.name else tok.wordy
            for length in range(1, MAX_LENGTH + 1) if self.name else ():
                mask[tok.length_id(length)] = self._fits(1, self.name, length)
        elif self.state != "done":
            mask[tok.eos] = True
            mask[tok.sync] = self.plans and self.room >= 2
            mask[tok.topic] = self.plans and self._fits(1 + 1 + 1, 1, 1)
            mask[: tok.pad] = self.state == "text" and self.room >= 2
        return mask

    def forced(self):
        """The only token that may come next, or None."""
        tokens = np.flatnonzero(self.allowed())
        return int(tokens[0]) if len(tokens) == 1 else None

    def _fits(self, before_close, name, length):
        """Room for that many tokens, `</topic>`, the scaffold of such a topic, and `<eos>`."""
        return before_close + 1 + self._scaffold(name, length) + 1 <= self.room

    def _scaffold(self, name, length):
        return 1 + name + 1 + span_slots(length, self.tokenizer.unit, self.scale) + 1  # <async> name : slots </async>

    def advance(self, token):
        """Take a token that `allowed` allows."""
        tok = self.tokenizer
        self.room -= 1
        if self.state == "name" and token < tok.pad:
            self.name += 1
        elif self.state == "name":
            self.state, self.length = "close", tok.length_of(token)
        elif self.state == "close":
            self.state, self.room = "planned", self.room - self._scaffold(self.name, self.length)
        elif token == tok.topic:
            self.state, self.name = "name", 0
        elif token == tok.sync:
            self.state = "text"
        elif token == tok.eos:
            self.state = "done"
