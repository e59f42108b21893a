"""The tokenizer: byte pairs, the control tags, and one token per planned length."""

import base64
import json
import math
import re
from collections import Counter
from pathlib import Path

import numpy as np
import regex
import tiktoken

from tags import TAGS

MAX_LENGTH = 64  # longest span a plan can ask for, in units


def span_slots(length, unit, length_scale=1.0):
    """Slots of a span whose plan says `length` units. Training and sampling both ask here."""
    return max(1, math.ceil(length * unit * length_scale))


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
