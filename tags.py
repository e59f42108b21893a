"""Control tags: answers as tagged text.

An answer is a list of rounds. A round is text, a plan of topics, or both; each topic has one span:

    <topic> habitat 1</topic><topic> food 2</topic>                        the plan
    <async> habitat: Rivers and coasts.</async><async> food: ...</async>   one span a topic
    <sync/> In short: a playful river animal.<eos>                         the next round

The last integer of a topic is its span's length in units of `Tokenizer.unit` tokens
(Planned Diffusion, arXiv 2510.18087, section 3). White space next to a tag does not count.
"""

import re
from dataclasses import dataclass

PAD, MASK = "[PAD]", "[MASK]"
USER, ASSISTANT = "<user>", "<assistant>"
TOPIC, TOPIC_END, ASYNC, ASYNC_END = "<topic>", "</topic>", "<async>", "</async>"
SYNC, EOS = "<sync/>", "<eos>"
TAGS = (PAD, MASK, USER, ASSISTANT, TOPIC, TOPIC_END, ASYNC, ASYNC_END, SYNC, EOS)



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
