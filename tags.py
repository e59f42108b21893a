"""Control tags: answers as tagged text.

An answer is a list of rounds. A round is text, a plan of topics, or both; each topic has one span:

    <topic> habitat 1</topic><topic> food 2</topic>                        the plan
    <async> habitat: Rivers and coasts.</async><async> food: ...</async>   one span per topic
    <sync/> In short: a playful river animal.<eos>                         the next round

The last integer of a topic is its span's length in units of `Tokenizer.unit` tokens
(Planned Diffusion, arXiv 2510.18087, section 3). White space next to a tag does not count.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NoReturn

PAD, MASK = "[PAD]", "[MASK]"
USER, ASSISTANT = "<user>", "<assistant>"
TOPIC, TOPIC_END, ASYNC, ASYNC_END = "<topic>", "</topic>", "<async>", "</async>"
SYNC, EOS = "<sync/>", "<eos>"
TAGS = (PAD, MASK, USER, ASSISTANT, TOPIC, TOPIC_END, ASYNC, ASYNC_END, SYNC, EOS)


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


@dataclass(frozen=True)
class Example:
    """A prompt and its answer (rounds of text and spans); `family` names the kind of task."""

    prompt: str
    rounds: tuple[Round, ...]
    family: str = ""
    gaps: tuple[str, ...] = ()  # white space between the pieces of a text that was cut (data/instruct/plans.py)


class TagError(ValueError):
    """Tagged text that breaks the grammar: says where, what was found and what was expected."""


_TAG = re.compile("(" + "|".join(map(re.escape, TAGS)) + ")")
_TOPIC = re.compile(r"(.*\S)\s+([0-9]{1,9})", re.DOTALL)  # a name and a length in units


def _escape(text: str) -> str:
    """A tag typed in a text gets a backslash, so that parsing finds text again: `\\<eos>`."""
    text = _TAG.sub(r"\\\1", text.strip())
    return text + " " if text.endswith("\\") else text


def format_answer(rounds: Iterable[Round]) -> str:
    """Write an answer as tagged text; `parse_answer` reads it back exactly.

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
    """Tagged text as a list of pieces, text and tag in turn, read from left to right; the last tag is "", the end."""

    def __init__(self, tagged: str):
        self.tagged, self.pieces, self.places, self.next = tagged, [], [], 0
        parts, held, place, start = [*_TAG.split(tagged), ""], [], 0, 0  # text, tag, text, ..., text, ""
        for words, tag in zip(parts[::2], parts[1::2]):
            place += len(words)
            if tag and words.endswith("\\"):  # escaped: one backslash off, and it is text
                held += words[:-1], tag
            else:
                self.pieces += "".join([*held, words]).strip(), tag
                self.places += start, place
                held, start = [], place + len(tag)
            place += len(tag)

    def text(self) -> str:
        """The text up to the next tag (may be empty)."""
        self.next += 1
        return self.pieces[self.next - 1]

    def tag(self, *expected: str) -> str:
        """The next tag, which has to be one of `expected`."""
        found = self.pieces[self.next]
        if found not in expected:
            self.fail(f"expected {' or '.join(expected)}, found {found or 'the end'!r}", self.next)
        self.next += 1
        return found

    def tag_alone(self, *expected: str) -> str:
        """The next tag, with nothing but white space before it."""
        if text := self.text():
            self.fail(f"expected {' or '.join(expected)}, found text {text[:20]!r}", self.next - 1)
        return self.tag(*expected)

    def fail(self, message: str, piece: int) -> NoReturn:
        """Raise TagError for the piece of this number."""
        place = self.places[piece]
        line = self.tagged.count("\n", 0, place) + 1
        column = place - self.tagged.rfind("\n", 0, place)
        raise TagError(f"line {line}, column {column}: {message}: ...{self.tagged[max(0, place - 20) : place + 20]!r}")


def parse_answer(tagged: str) -> list[Round]:
    """Read tagged text (the answer alone, up to `<eos>`) into a list of rounds.

    Raises TagError with line, column and what was expected.
    """
    reader, rounds, tag = _Reader(tagged), [], SYNC
    while tag != EOS:
        text, topics, spans = reader.text(), [], []
        tag = reader.tag(TOPIC, SYNC, EOS)
        while tag == TOPIC:
            match = _TOPIC.fullmatch(reader.text())
            if not match or int(match[2]) == 0:
                reader.fail("expected a topic's name and its length in units, such as ' food 2'", reader.next - 1)
            topics.append((match[1], int(match[2])))
            reader.tag(TOPIC_END)
            tag = reader.tag_alone(TOPIC, ASYNC)
        for number, (topic, length) in enumerate(topics, 1):
            content = reader.text()
            if not content.startswith(topic + ":"):
                reader.fail(f"expected the span of topic {topic[:40]!r} to begin with '{topic[:40]}:'", reader.next - 1)
            spans.append(Span(topic, content[len(topic) + 1 :].strip(), length))
            reader.tag(ASYNC_END)
            tag = reader.tag_alone(ASYNC) if number < len(topics) else reader.tag_alone(SYNC, EOS)
        rounds.append(Round(text, tuple(spans)))
    if reader.text():
        reader.fail(f"expected nothing after {EOS}", reader.next - 1)
    if reader.pieces[reader.next]:
        reader.fail(f"expected nothing after {EOS}", reader.next)
    return rounds


def pieces(rounds: Iterable[Round]) -> list[str]:
    """The non-empty texts and spans of an answer, in reading order."""
    return [text for r in rounds for text in (r.text, *(s.text for s in r.spans)) if text]


def plain_text(rounds: Iterable[Round]) -> str:
    """What the reader of an answer sees: its pieces, one per line. An autoregressive model learns this text."""
    return "\n".join(pieces(rounds))
