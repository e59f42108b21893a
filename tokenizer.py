"""The tokenizer: byte pairs, the control tags, and one token per planned length."""

import base64
import json
import math
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from fractions import Fraction
from heapq import heapify, heappop, heappush
from pathlib import Path

import regex
import tiktoken

from tags import TAGS, Span

MAX_LENGTH = 64  # longest span a plan can ask for, in units
MAX_NAME = 64  # longest name of a topic, in tokens
LONGEST_RUN = 100_000  # characters of white space
MAX_UNIT = 1024  # more would make a sequence of every span that no model can read


def span_slots(length: int, unit: int, length_scale: float = 1.0) -> int:
    """Slots of a span whose plan says `length` units, rounded up. Training and sampling both ask here."""
    return max(1, math.ceil(length * unit * Fraction(str(length_scale))))  # as typed: 1.1 is no exact binary number


def loops(tokens: Sequence[int]) -> bool:
    """Whether tokens repeat themselves: of some 16 in a row at most 5 differ. In our data sets more do."""
    return any(len(set(tokens[n : n + 16])) <= 5 for n in range(len(tokens) - 15))


def check_length(length: int) -> None:
    """Raise ValueError for a length that no plan can ask for."""
    if not 1 <= length <= MAX_LENGTH:
        raise ValueError(f"a span's length must be 1 to {MAX_LENGTH} units, not {length}: "
                         "shorten the span or prepare the data with a larger unit")  # fmt: skip


class Vocabulary:
    """Byte pairs (a `tiktoken.Encoding` of our own ranks) plus the tags and lengths, to and from text.

    Token ids: text, `[PAD]`, the other tags, one token per length 1..MAX_LENGTH. So the slots of a
    span, which hold text or `[PAD]` and nothing else, draw from ids [0, pad]. A length is a token
    of its own, not the text of a number: the plan "top 5 tips 3" has one length, and after it
    `</topic>` is the only token that the grammar allows.
    """

    PATTERN = r" ?\p{L}+| ?\p{N}{1,3}| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"

    def __init__(self, tokens: Iterable[bytes], unit: int = 10, pattern: str | None = None, normal: str | None = None):
        """`tokens`: the byte string of each text token, in order of rank. `unit`: tokens per unit of length.

        Of a pretrained model (pretrained/tokens.py): `pattern`, by which it cuts text into words, and `normal`, the
        Unicode normal form that it puts text into first. Its lines do not begin with a space.
        """
        if type(unit) is not int or not 1 <= unit <= MAX_UNIT:
            raise ValueError(f"unit {unit!r}: expected a whole number of tokens, 1 to {MAX_UNIT}")
        self.tokens, self.unit, self.pattern, self.normal = list(tokens), unit, pattern, normal
        n, names = len(self.tokens), [*TAGS, *(f"<length {i}>" for i in range(1, MAX_LENGTH + 1))]
        self.encoding = tiktoken.Encoding(
            "planned-diffusion",
            pat_str=pattern or self.PATTERN,
            mergeable_ranks={token: rank for rank, token in enumerate(self.tokens)},
            special_tokens={name: n + i for i, name in enumerate(names)},
        )
        self.vocab_size = n + len(names)
        self.pad, self.mask, self.user, self.assistant, self.topic, self.topic_end = range(n, n + 6)
        self.async_, self.async_end, self.sync, self.eos = range(n + 6, n + 10)
        self.colon = self.encoding.encode_single_token(":")

    def encode(self, text: str) -> list[int]:
        """Ids of ordinary text: a tag typed in it is text. White space at its ends is dropped."""
        text = _spaced(text) if self.pattern is None else text.strip()
        text = unicodedata.normalize(self.normal, text) if self.normal else text
        return [i for part in _parts(text) for i in self.encoding.encode_ordinary(part)]

    def decode(self, ids: Iterable[int]) -> str:
        """The text of text tokens; `[PAD]` is dropped, any other tag is a ValueError.

        `decode(encode(text))` is `text.strip()`, in normal form; bytes that are no character become U+FFFD.
        """
        text = self.encoding.decode([self._text_id(i) for i in ids if i != self.pad], errors="replace")
        return (text.replace("\n ", "\n") if self.pattern is None else text).strip()

    def _text_id(self, i: int) -> int:
        if not 0 <= i < self.pad:
            raise ValueError(f"token {i} is {self.name(i)}, not text")
        return i

    def name(self, i: int) -> str:
        """How a token is shown: its text, its tag, or ' 3' for the length 3."""
        if i > self.eos:
            return f" {self.length_of(i)}"
        return TAGS[i - self.pad] if i >= self.pad else self.tokens[i].decode(errors="replace")

    def length_of(self, i: int) -> int:
        """The length in units of a length token, or 0 for any other token."""
        return max(0, i - self.eos)

    def to_json(self) -> str:
        """The tokenizer as ASCII text; `from_json` reads it back exactly."""
        tokens = [base64.b64encode(token).decode() for token in self.tokens]
        pretrained = {"pattern": self.pattern, "normal": self.normal} if self.pattern is not None else {}
        return json.dumps({"unit": self.unit, **pretrained, "tokens": tokens})

    @classmethod
    def from_json(cls, text: str) -> "Tokenizer":
        """Read what `to_json` wrote. Raises ValueError for anything else."""
        try:
            saved = json.loads(text)
            tokens, unit = [base64.b64decode(token, validate=True) for token in saved["tokens"]], saved["unit"]
            pattern, normal = saved.get("pattern"), saved.get("normal")
        except (KeyError, TypeError, RecursionError):
            raise ValueError("expected an object with 'unit', a number, and 'tokens', base64 texts") from None
        if not isinstance(pattern, str | None) or normal not in (None, "NFC", "NFD", "NFKC", "NFKD"):
            raise ValueError("expected a regular expression in 'pattern' and a Unicode normal form in 'normal'")
        if tokens[:256] != [bytes([b]) for b in range(256)] or b"" in tokens or len(set(tokens)) < len(tokens):
            raise ValueError("expected the 256 bytes, then longer tokens, each once")
        return cls(tokens, unit, pattern, normal)

    @classmethod
    def load(cls, path: str | Path) -> "Tokenizer":
        """Read a tokenizer.json. Raises ValueError naming the file if it is not one."""
        try:
            return cls.from_json(Path(path).read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise ValueError(f"{path} does not exist: the data set's prepare.py writes it") from None
        except ValueError as error:
            raise ValueError(
                f"{path} is not a tokenizer ({error}): write it again with the data set's prepare.py"
            ) from None


class Tokenizer(Vocabulary):
    """A vocabulary that is learnt from texts, and the rule of how many slots a span has."""

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int, unit: int = 10) -> "Tokenizer":
        """Learn byte pairs from texts up to `vocab_size` tokens, tags and lengths included, or until none occurs twice.

        Merges are counted over the distinct words (Sennrich et al. 2016), in time linear in the text.
        Raises ValueError if `vocab_size` or `unit` (tokens per unit of length) is impossible.
        """
        tokens = [bytes([b]) for b in range(256)]
        smallest = cls(tokens, unit).vocab_size
        if type(vocab_size) is not int or vocab_size < smallest:
            raise ValueError(f"vocab_size {vocab_size!r}: expected a whole number of at least {smallest}, which is "
                             "the bytes, tags and lengths alone")  # fmt: skip
        counts = Counter(word for text in texts for word in regex.findall(cls.PATTERN, _spaced(text)))
        tokens += learn_pairs(counts, vocab_size - smallest)
        return cls(dict.fromkeys(tokens), unit)

    def length_id(self, length: int) -> int:
        """The token of a length in units. Raises ValueError outside 1..MAX_LENGTH."""
        check_length(length)
        return self.eos + length

    def units(self, text: str) -> int:
        """The planned length of a text: the fewest units that hold it."""
        return max(1, math.ceil(len(self.encode(text)) / self.unit))

    def encode_span(self, span: Span) -> tuple[list[int], list[int]]:
        """The tokens of a span's topic, and those of its slots: its text, then [PAD] up to the planned length.

        Raises ValueError, naming the topic, if no plan can ask for this span: what passes can be trained and sampled.
        """
        topic, slots, planned = self.encode(span.topic), self.encode(span.text), span_slots(span.length, self.unit)
        try:
            check_length(span.length)
            if not 1 <= len(topic) <= MAX_NAME:
                raise ValueError(f"a topic's name must have 1 to {MAX_NAME} tokens, not {len(topic)}")
            if len(slots) > planned:
                raise ValueError(f"its span has {len(slots)} tokens, its plan only {planned} "
                                 f"({span.length} x {self.unit})")  # fmt: skip
        except ValueError as error:
            raise ValueError(f"topic {span.topic[:60]!r}: {error}") from None
        return topic, slots + [self.pad] * (planned - len(slots))


def _parts(text: str) -> Iterator[str]:
    """The text, cut where LONGEST_RUN characters of white space end: at a million tiktoken would panic."""
    begin = 0
    for run in re.finditer(rf"\s{{1,{LONGEST_RUN}}}", text) if len(text) > LONGEST_RUN else ():
        if run.end() - run.start() == LONGEST_RUN:
            yield text[begin : run.end()]
            begin = run.end()
    yield text[begin:]


def _spaced(text: str) -> str:
    """Text as it is cut into words: the first word of each line gets the space that it has inside a sentence."""
    text = text.strip()
    return " " + text.replace("\n", "\n ") if text else ""


class _Most(tuple):
    """(count, pair) in a heap that gives the largest first."""

    __lt__ = tuple.__gt__


def learn_pairs(counts: dict[str, int], n_tokens: int) -> list[bytes]:
    """The first `n_tokens` byte pairs of these words, the most frequent first, or fewer where none occurs twice.

    All words lie in one row of parts. A merge changes the two pairs beside it alone, so the time is linear in the text.
    """
    parts, weight = [None], [0]  # None: a border between words, or merged into the part before
    for word, count in counts.items():
        parts += [*(bytes([b]) for b in word.encode()), None]
        weight += [count] * (len(parts) - len(weight))
    before, after = list(range(-1, len(parts) - 1)), list(range(1, len(parts) + 1))
    pair_count, places, tokens = Counter(), {}, []

    def add(i: int, sign: int = 1) -> tuple | None:
        """Count the pair that begins at part `i`, if there is one, or take it back."""
        pair = parts[i], parts[after[i]]
        if None in pair:
            return None
        pair_count[pair] += sign * weight[i]
        if sign > 0:
            places.setdefault(pair, []).append(i)
        return pair

    for i in range(len(parts) - 1):
        add(i)
    heap = [_Most((count, pair)) for pair, count in pair_count.items()]
    heapify(heap)
    while len(tokens) < n_tokens and heap and heap[0][0] > 1:
        count, pair = heappop(heap)
        if pair_count[pair] < count:  # since it was put there
            heappush(heap, _Most((pair_count[pair], pair)))
            continue
        tokens.append(pair[0] + pair[1])
        grown = set()
        for i in sorted(places.pop(pair)):
            j = after[i]
            if (parts[i], parts[j]) == pair:
                add(before[i], -1), add(j, -1)
                parts[i], parts[j], after[i] = tokens[-1], None, after[j]
                before[after[i]] = i
                grown |= {add(before[i]), add(i)}
        del pair_count[pair]
        for new in grown - {None}:
            heappush(heap, _Most((pair_count[new], new)))
    return tokens
