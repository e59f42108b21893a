"""Control tags, grammar and tokenizer of planned diffusion.

An answer is a list of rounds. A round is text, a plan of topics, or both; each topic has one span:

    <topic> habitat 1</topic><topic> food 2</topic>                        the plan
    <async> habitat: Rivers and coasts.</async><async> food: ...</async>   one span a topic
    <sync/> In short: a playful river animal.<eos>                         the next round

The last integer of a topic is its span's length in units of `Tokenizer.unit` tokens
(Planned Diffusion, arXiv 2510.18087, section 3). White space next to a tag does not count.
"""

import base64
import json
import math
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import regex
import tiktoken

PAD, MASK = "[PAD]", "[MASK]"
USER, ASSISTANT = "<user>", "<assistant>"
TOPIC, TOPIC_END, ASYNC, ASYNC_END = "<topic>", "</topic>", "<async>", "</async>"
SYNC, EOS = "<sync/>", "<eos>"
TAGS = (PAD, MASK, USER, ASSISTANT, TOPIC, TOPIC_END, ASYNC, ASYNC_END, SYNC, EOS)

MAX_LENGTH = 64  # longest span a plan can ask for, in units
MAX_NAME = 16  # longest topic name a constrained plan can have, in tokens


# ---------------------------------------------------------------- answers as tagged text


@dataclass(frozen=True)
class Span:
    """One topic of a plan and the text that answers it; `length` in units, 0 if not yet known."""

    topic: str
    text: str
    length: int = 0


@dataclass(frozen=True)
class Round:
    """Autoregressive text, then the spans of a plan; either may be empty."""

    text: str = ""
    spans: tuple[Span, ...] = ()


class TagError(ValueError):
    """Tagged text that breaks the grammar: says where, what was found and what was expected."""


_ANY_TAG = re.compile(r"(\\*)(" + "|".join(re.escape(tag) for tag in TAGS) + ")")


def _escape(text):
    """A tag typed in a text gets a backslash, so that parsing finds text again: `\\<eos>`."""
    text = _ANY_TAG.sub(r"\\\1\2", text.strip())
    return text + " " if text.endswith("\\") else text


def format_answer(rounds):
    """Write an answer (list of `Round`) as tagged text; `parse_answer` reads it back exactly.

    Texts are stored without the white space at their ends.
    """
    tagged = []
    for round_ in rounds:
        text = _escape(round_.text)
        topics = [f"{TOPIC} {_escape(f'{s.topic.strip()} {s.length}')}{TOPIC_END}" for s in round_.spans]
        spans = [f"{ASYNC} {_escape(f'{s.topic.strip()}: {s.text.strip()}')}{ASYNC_END}" for s in round_.spans]
        tagged.append((f" {text}" if text else "") + "".join(topics + spans))
    return SYNC.join(tagged).lstrip() + EOS


class _Reader:
    """Tagged text cut into (tag or None, text, place) pieces, read from left to right."""

    def __init__(self, tagged):
        self.tagged, self.pieces, start, text_start, text = tagged, [], 0, 0, ""
        for match in _ANY_TAG.finditer(tagged):
            text += tagged[start : match.start()]
            start = match.end()
            if match[1]:  # escaped: one backslash off, and it is text
                text += match[1][1:] + match[2]
                continue
            self.pieces += [(None, text.strip(), text_start), (match[2], match[2], match.start())]
            text, text_start = "", start
        self.pieces += [(None, (text + tagged[start:]).strip(), text_start), (None, "", len(tagged))]
        self.next = 0

    def text(self):
        """The text up to the next tag (may be empty)."""
        self.next += 1
        return self.pieces[self.next - 1][1]

    def tag(self, *expected):
        """The next tag, which has to be one of `expected`."""
        found, text, place = self.pieces[self.next]
        if found not in expected:
            self.fail(f"expected {' or '.join(expected)}, found {found or text or 'the end'!r}", place)
        self.next += 1
        return found

    def fail(self, message, place):
        line = self.tagged.count("\n", 0, place) + 1
        column = place - self.tagged.rfind("\n", 0, place)
        raise TagError(f"line {line}, column {column}: {message}: ...{self.tagged[max(0, place - 20):place + 20]!r}")


def parse_answer(tagged):
    """Read tagged text (the answer alone, up to `<eos>`) into a list of `Round`.

    Raises TagError with line, column and what was expected.
    """
    reader, rounds, tag = _Reader(tagged), [], SYNC
    while tag != EOS:
        text, topics, spans = reader.text(), [], []
        tag = reader.tag(TOPIC, SYNC, EOS)
        while tag == TOPIC:
            place = reader.pieces[reader.next][2]
            match = re.fullmatch(r"(.*\S)\s+([0-9]{1,9})", reader.text(), re.DOTALL)
            if not match or int(match[2]) == 0:
                reader.fail("expected a topic's name and its length in units, such as ' food 2'", place)
            topics.append((match[1], int(match[2])))
            reader.tag(TOPIC_END)
            tag = _between(reader, TOPIC, ASYNC)
        for topic, length in topics:
            place, content = reader.pieces[reader.next][2], reader.text()
            if not content.startswith(topic + ":"):
                reader.fail(f"expected the span of topic {topic!r} to begin with '{topic}:'", place)
            spans.append(Span(topic, content[len(topic) + 1 :].strip(), length))
            reader.tag(ASYNC_END)
            tag = _between(reader, *((ASYNC,) if len(spans) < len(topics) else (SYNC, EOS)))
        rounds.append(Round(text, tuple(spans)))
    if reader.text():
        reader.fail(f"expected nothing after {EOS}", reader.pieces[reader.next - 1][2])
    if reader.next < len(reader.pieces) - 1:
        reader.fail(f"expected nothing after {EOS}", reader.pieces[reader.next][2])
    return rounds


def _between(reader, *expected):
    """The next tag, with nothing but white space before it."""
    place = reader.pieces[reader.next][2]
    if text := reader.text():
        reader.fail(f"expected {' or '.join(expected)}, found text {text[:20]!r}", place)
    return reader.tag(*expected)


def pieces(rounds):
    """The non-empty texts and spans of an answer, in reading order."""
    return [text for r in rounds for text in (r.text, *(s.text for s in r.spans)) if text]


def plain_text(rounds):
    """What the reader of an answer sees: its pieces, a line each. An autoregressive model learns this text."""
    return "\n".join(pieces(rounds))


# ---------------------------------------------------------------- tokenizer


class Tokenizer:
    """Byte-pair tokenizer (a `tiktoken.Encoding` of our own ranks) plus the tags and lengths.

    Token ids: text, `[PAD]`, the other tags, one token a length 1..MAX_LENGTH. So the slots of a
    span, which hold text or `[PAD]` and nothing else, draw from ids [0, pad]. A length is a token
    of its own, not the text of a number: the plan "top 5 tips 3" has one length, and after it
    `</topic>` is the only token that the grammar allows.
    """

    PATTERN = r" ?\p{L}+| ?\p{N}{1,3}| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"

    def __init__(self, tokens, unit=10):
        """`tokens`: the byte string of each text token, in order of rank. `unit`: tokens a unit of length."""
        self.tokens, self.unit, n = list(tokens), unit, len(tokens)
        names = [*TAGS, *(f"<length {i}>" for i in range(1, MAX_LENGTH + 1))]
        self.encoding = tiktoken.Encoding(
            "planned-diffusion",
            pat_str=self.PATTERN,
            mergeable_ranks={token: rank for rank, token in enumerate(self.tokens)},
            special_tokens={name: n + i for i, name in enumerate(names)},
        )
        self.vocab_size = n + len(names)
        self.pad, self.mask, self.user, self.assistant, self.topic, self.topic_end = range(n, n + 6)
        self.async_, self.async_end, self.sync, self.eos = range(n + 6, n + 10)
        self.colon = self.encoding.encode_single_token(":")
        # a topic's name has to begin with a token that is surely no white space
        self.wordy = np.array([bool(re.search(rb"[A-Za-z0-9]", token)) for token in self.tokens])

    @classmethod
    def train(cls, texts, vocab_size, unit=10):
        """Learn byte pairs from texts up to `vocab_size` tokens, tags and lengths included, or until none occurs twice.

        Merges are counted over the distinct words (Sennrich et al. 2016), which takes seconds.
        """
        counts = Counter(word for text in texts for word in regex.findall(cls.PATTERN, " " + text))
        words = [([bytes([b]) for b in word.encode()], count) for word, count in counts.items()]
        tokens = [bytes([b]) for b in range(256)]
        if vocab_size < len(tokens) + len(TAGS) + MAX_LENGTH:
            raise ValueError(f"vocab_size {vocab_size} is too small: bytes, tags and lengths alone are "
                             f"{len(tokens) + len(TAGS) + MAX_LENGTH}")  # fmt: skip
        pair_count, pair_words = Counter(), {}
        for i, (word, count) in enumerate(words):
            for pair in zip(word, word[1:]):
                pair_count[pair] += count
                pair_words.setdefault(pair, set()).add(i)
        while len(tokens) < vocab_size - len(TAGS) - MAX_LENGTH and pair_count:
            best = max(pair_count, key=lambda pair: (pair_count[pair], pair))
            if pair_count[best] < 2:
                break
            tokens.append(best[0] + best[1])
            for i in pair_words.pop(best):
                word, count = words[i]
                pair_count.subtract({p: n * count for p, n in Counter(zip(word, word[1:])).items()})
                word[:] = _merge(word, best)
                for pair in zip(word, word[1:]):
                    pair_count[pair] += count
                    pair_words.setdefault(pair, set()).add(i)
            del pair_count[best]
        return cls(dict.fromkeys(tokens), unit)

    def encode(self, text):
        """Ids of ordinary text: a tag in it is text. A line's first word gets the space it has inside a sentence."""
        text = text.strip()
        return self.encoding.encode_ordinary(" " + text.replace("\n", "\n ")) if text else []

    def decode(self, ids):
        """The text of text tokens; `[PAD]` is dropped, any other tag is an error."""
        text = self.encoding.decode([self._text_id(i) for i in ids if i != self.pad], errors="replace")
        return text.replace("\n ", "\n").strip()

    def _text_id(self, i):
        if not 0 <= i < self.pad:
            raise ValueError(f"token {i} is {self.name(i)}, not text")
        return i

    def name(self, i):
        """How a token is shown: its text, its tag, or ' 3' for the length 3."""
        if i > self.eos:
            return f" {self.length_of(i)}"
        return TAGS[i - self.pad] if i >= self.pad else self.tokens[i].decode(errors="replace")

    def length_id(self, length):
        """The token of a length in units. Raises ValueError outside 1..MAX_LENGTH."""
        if not 1 <= length <= MAX_LENGTH:
            raise ValueError(f"a span's length must be 1 to {MAX_LENGTH} units, not {length}: "
                             "shorten the span or prepare the data with a larger unit")  # fmt: skip
        return self.eos + length

    def length_of(self, i):
        """The length in units of a length token, or 0 for any other token."""
        return max(0, i - self.eos)

    def units(self, text):
        """The planned length of a text: the fewest units that hold it."""
        return max(1, math.ceil(len(self.encode(text)) / self.unit))

    def to_json(self):
        tokens = [base64.b64encode(token).decode() for token in self.tokens]
        return json.dumps({"unit": self.unit, "tokens": tokens})

    @classmethod
    def from_json(cls, text):
        saved = json.loads(text)
        tokens, unit = [base64.b64decode(token) for token in saved["tokens"]], saved["unit"]
        if tokens[:256] != [bytes([b]) for b in range(256)] or len(set(tokens)) < len(tokens):
            raise ValueError("expected the 256 bytes, then longer tokens, each once")
        if type(unit) is not int or unit < 1:
            raise ValueError(f"expected a unit of 1 token or more, found {unit!r}")
        return cls(tokens, unit)

    @classmethod
    def load(cls, path):
        """Read a tokenizer.json; raises ValueError naming the file if it is not one."""
        try:
            return cls.from_json(Path(path).read_text())
        except FileNotFoundError:
            raise ValueError(f"{path} does not exist: the data set's prepare.py writes it") from None
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path} is not a tokenizer ({error}): write it again with the data set's prepare.py")


def _merge(word, pair):
    merged, i = [], 0
    while i < len(word):
        step = 2 if tuple(word[i : i + 2]) == pair else 1
        merged.append(b"".join(word[i : i + step]))
        i += step
    return merged


# ---------------------------------------------------------------- grammar


def span_slots(length, unit, length_scale=1.0):
    """Slots of a span whose plan says `length` units. Training and sampling both ask here."""
    return max(1, math.ceil(length * unit * length_scale))


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
