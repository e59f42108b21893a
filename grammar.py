"""The grammar of plans as an automaton: which tokens may come next in a plan or text."""

import codecs
import copy
import re
from bisect import bisect_right
from collections.abc import Sequence
from functools import lru_cache

import numpy as np

from tags import Span
from tokenizer import MAX_LENGTH, MAX_NAME, Tokenizer, span_slots

WHITE_SPACE = [chr(code).encode() for code in range(0x3001) if chr(code).isspace()]  # Unicode has none above


def unnumbered(name: str) -> str:
    """The name of a topic without the number of its item in a list.

    >>> unnumbered("2 mix flour"), unnumbered("2024")
    ('mix flour', '2024')
    """
    return re.sub(r"^\d+ (?=.)", "", name)


class Grammar:
    """The automaton of constrained decoding: which tokens may come next in a plan or text.

    It never opens what it cannot close in the positions that are left, and pays for a span's scaffold
    when its topic closes (with its name, even if spans do not repeat it), so every plan parses and fits. It allows all that training accepts
    (`Tokenizer.encode_span`): a name is any text of up to MAX_NAME tokens that is not blank. Where
    `allowed` leaves one token, that token needs no forward pass of its own.

    No plan names a topic twice, whatever its number in a list; models that loop do. Whether a name is a second one shows only where it ends: `repeats`
    says so, and `take_back` drops it and ends the plan. To forbid the name would give it an odd ending instead.
    """

    def __init__(self, tokenizer: Tokenizer, positions_left: int, length_scale: float = 1.0, plans: bool = True,
                 given: Sequence[int] = ()):  # fmt: skip
        """`positions_left`: of the whole answer, spans and their tags included. `length_scale`: as in `span_slots`.

        `plans`: whether the answer may have plans and rounds; an autoregressive model writes text alone. `given`: the
        plan of the first round (`plan_tokens`), if somebody else has made it.
        """
        self.given, self.complete = tuple(given), bool(given)  # complete: the plan of this round has no more topics
        self.tokenizer, self.positions_left, self.plans = tokenizer, max(positions_left, 1), plans
        self.slots = _slots(tokenizer.unit, length_scale)
        self.state = "text"
        self.length = 0  # of the open topic, in units
        self.name: tuple[int, ...] = ()  # tokens of its name so far
        self.names: tuple[str, ...] = ()  # of the topics of this plan that are complete, without numbers
        self.blank: bytes | None = b""  # bytes of its name as long as all may be white space, then None
        self._allowed: np.ndarray | None = None

    @property
    def done(self) -> bool:
        """Whether `<eos>` was taken."""
        return self.state == "done"

    def copy(self) -> "Grammar":
        """An independent copy, to try a draft on."""
        return copy.copy(self)  # shallow: nothing that it refers to is ever changed

    def allowed(self) -> np.ndarray:
        """Boolean array (vocab_size,): the tokens that may come next. Do not write to it."""
        if self._allowed is None:
            self._allowed = self._mask()
        return self._allowed

    def forced(self) -> int | None:
        """The only token that may come next, or None."""
        tokens = np.flatnonzero(self.allowed())
        return int(tokens[0]) if len(tokens) == 1 else None

    def out_of_room(self) -> bool:
        """Whether one token may come next, where more could if the answer could be of any length."""
        return self.forced() is not None and bool(self.endless().sum() > 1)

    def endless(self) -> np.ndarray:
        """What `allowed` would be, (vocab_size,), if the answer could be of any length."""
        twin = self.copy()
        twin.positions_left, twin._allowed = 1 << 62, None
        return twin.allowed()

    def advance(self, token: int) -> None:
        """Take a token. Raises ValueError if `allowed` does not allow it."""
        tok = self.tokenizer
        if not self.allowed()[token]:
            raise ValueError(f"the grammar does not allow {tok.name(token)!r} here ({self.state})")
        self.positions_left, self._allowed, self.given = self.positions_left - 1, None, self.given[1:]
        if self.state == "name" and token < tok.pad:
            self.name, self.blank = (*self.name, token), _still_blank(self.blank, tok.tokens[token])
        elif self.state == "name":
            self.state, self.length = "close", tok.length_of(token)
        elif self.state == "close":
            self.positions_left -= _scaffold(len(self.name)) + self.slots[self.length - 1]
            self.state, self.names, self.name, self.blank = "planned", (*self.names, self._called()), (), b""
        elif token == tok.topic:
            self.state = "name"
        elif token == tok.sync:
            self.state, self.complete, self.names = "text", False, ()
        elif token == tok.eos:
            self.state = "done"

    def repeats(self, token: int) -> bool:
        """Whether a token would end a name that this plan already has, in a plan that the model makes."""
        ends = self.state == "name" and token > self.tokenizer.eos and not self.given
        return ends and self._called() in self.names

    def _called(self) -> str:
        return unnumbered(self.tokenizer.decode(self.name))

    def take_back(self) -> None:
        """Drop the topic whose name is open, and allow no more topics in this plan."""
        self.positions_left, self._allowed = self.positions_left + 1 + len(self.name), None  # 1: <topic>
        self.state, self.name, self.blank, self.complete = "planned", (), b"", True

    def _mask(self) -> np.ndarray:
        tok, mask = self.tokenizer, np.zeros(self.tokenizer.vocab_size, dtype=bool)
        if self.state == "close":
            mask[tok.topic_end] = True
        elif self.state == "name":
            mask[: tok.pad] = self._fits(len(self.name) + 1)
            if self.blank is not None:
                mask[: tok.pad] &= ~_blank_after(tok, self.blank) | self._fits(len(self.name) + 2)
            if self.blank is None or self.blank.decode(errors="replace").strip():
                longest = bisect_right(self.slots, self._slots_left(len(self.name)))
                mask[tok.eos + 1 : tok.eos + 1 + longest] = True
        elif self.state != "done":
            mask[tok.eos] = True
            mask[tok.sync] = self.plans and self.positions_left >= 2
            mask[tok.topic] = self.plans and self._fits(1, before=1) and (bool(self.given) or not self.complete)
            mask[: tok.pad] = self.state == "text" and self.positions_left >= 2
        if self.given:
            if not mask[self.given[0]]:
                raise ValueError(
                    "--plan has no room in --max_tokens: give fewer topics or shorter ones, or more tokens"
                )
            mask[:] = np.arange(len(mask)) == self.given[0]
        return mask

    def _fits(self, name_tokens: int, before: int = 0) -> bool:
        """Whether the topic that is open, or opens after `before` tokens, may have a name of that many tokens."""
        return name_tokens <= MAX_NAME and self._slots_left(name_tokens, before) >= self.slots[0]

    def _slots_left(self, name_tokens: int, before: int = 0) -> int:
        """Positions left for the slots of a topic whose name comes to have that many tokens."""
        plan = before + (name_tokens - len(self.name)) + 2  # 2: its length and </topic>
        return self.positions_left - plan - _scaffold(name_tokens) - 1  # 1: <eos>


def plan_tokens(plan: str, tokenizer: Tokenizer) -> list[int]:
    """The tokens of a plan that somebody has typed, such as "habitat 1; food 2". Raises ValueError if it is none."""
    tokens = []
    for topic in filter(str.strip, plan.split(";")):
        if not (typed := re.fullmatch(r"\s*(.*\S)\s+([0-9]+)\s*", topic)):
            raise ValueError(
                f'--plan, {topic.strip()[:60]!r}: expected topics with lengths, such as "habitat 1; food 2"'
            )
        name, _ = tokenizer.encode_span(Span(typed[1], "", int(typed[2])))
        tokens += [tokenizer.topic, *name, tokenizer.length_id(int(typed[2])), tokenizer.topic_end]
    return tokens


def _scaffold(name_tokens: int) -> int:
    """Positions of a span besides its slots: `<async>`, the name, the colon and `</async>`."""
    return 1 + name_tokens + 1 + 1


@lru_cache(maxsize=64)
def _slots(unit: int, length_scale: float) -> list[int]:
    """Slots of each length from 1 to MAX_LENGTH."""
    return [span_slots(length, unit, length_scale) for length in range(1, MAX_LENGTH + 1)]


@lru_cache(maxsize=64)
def _blank_after(tokenizer: Tokenizer, start: bytes) -> np.ndarray:
    """(pad,) which text tokens leave a name blank that began with these bytes."""
    return np.array([not (start + token).decode(errors="replace").strip() for token in tokenizer.tokens])


def _still_blank(start: bytes | None, token: bytes) -> bytes | None:
    """The bytes of a name, less its white space, as long as all of it may still be white space; then None."""
    if start is None:
        return None
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    text, (piece, _) = decoder.decode(start + token), decoder.getstate()  # piece: of a character, not yet complete
    return None if text.strip() or not any(white.startswith(piece) for white in WHITE_SPACE) else piece
