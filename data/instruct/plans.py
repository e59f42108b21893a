"""A plan as cuts in a text: what the rules of annotate.py find, and what plans made elsewhere say.

Pieces keep the order and every character of the text: white space between them is kept aside as `gaps`, so the text
can always be recovered exactly.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from data.instruct.readers import line_rows
from tags import Round, Span, pieces


@dataclass(frozen=True)
class Cut:
    """Where a piece of a text begins, and what it is: a span with a topic, or text."""

    begin: int
    topic: str | None = None
    sync: bool = False  # begins a new round; text after a span always does


def build(text: str, cuts: Iterable[Cut]) -> tuple[tuple[Round, ...], tuple[str, ...]]:
    """The rounds that cuts make of a text, and the gaps: the white space before, between and after its pieces.

    Raises ValueError for cuts that are out of order, leave something out or make an empty piece.

    >>> build("Two:\\n\\n- an otter\\n- a bear", [Cut(0), Cut(6, "otter"), Cut(17, "bear")])[1]
    ('', '\\n\\n', '\\n', '')
    """
    cuts = list(cuts)
    if not cuts or text[: cuts[0].begin].strip():
        raise ValueError("expected the first piece at the text's beginning")
    rounds, gaps, end = [[None, []]], [], 0
    for cut, after in zip(cuts, [*(cut.begin for cut in cuts[1:]), len(text)]):
        content = text[cut.begin : max(after, cut.begin)].strip()
        if not content:
            raise ValueError(f"an empty piece at {text[cut.begin : cut.begin + 30]!r}")
        begin = text.index(content, cut.begin)
        gaps.append(text[end:begin])
        end = begin + len(content)
        now = rounds[-1]
        if (cut.sync or cut.topic is None) and (now[0] or now[1]):
            now = [None, []]
            rounds.append(now)
        if cut.topic is None:
            now[0] = content
        elif not cut.topic.strip():
            raise ValueError("a topic without a name")
        else:
            now[1].append(Span(cut.topic.strip(), content))
    return tuple(Round(said or "", tuple(spans)) for said, spans in rounds), (*gaps, text[end:])


def restore(rounds: Iterable[Round], gaps: Iterable[str] = ()) -> str:
    """The text that was cut. Without gaps, what `tags.plain_text` says: one piece per line."""
    parts = pieces(rounds)
    gaps = tuple(gaps) or ("", *["\n"] * (len(parts) - 1), "")[: len(parts) + 1]
    if len(gaps) != len(parts) + 1:
        raise ValueError(f"{len(parts)} pieces need {len(parts) + 1} gaps, not {len(gaps)}")
    return gaps[0] + "".join(part + gap for part, gap in zip(parts, gaps[1:]))


def cuts_of(rounds: Iterable[Round], gaps: Iterable[str] = ()) -> list[Cut]:
    """The cuts in `restore(rounds, gaps)` of which `build` makes these rounds again; the inverse of `build`."""
    rounds, cuts = list(rounds), []
    gaps = iter(tuple(gaps) or ("", *["\n"] * len(pieces(rounds))))
    at = 0
    for number, round_ in enumerate(rounds):
        own = [(None, round_.text), *((span.topic, span.text) for span in round_.spans)]
        for place, (topic, text) in enumerate(own):
            if text:
                at += len(next(gaps))
                cuts.append(Cut(at, topic, bool(number) and place == int(not round_.text)))
                at += len(text)
    return cuts


# ---------------------------------------------------------------- plans made elsewhere


def quoted(text: str, said: object) -> list[Cut]:
    """Cuts from a list of pieces that each quote how they begin, as prompt.md asks for.

    Raises ValueError if a quote is not in the text, in order.

    >>> quoted("An otter. A bear.", [{"topic": "otter", "begins": "An"}, {"topic": "bear", "begins": "A bear"}])
    [Cut(begin=0, topic='otter', sync=False), Cut(begin=10, topic='bear', sync=False)]
    """
    if not isinstance(said, list) or not all(isinstance(piece, dict) for piece in said):
        raise ValueError(f"expected a list of pieces, found {said!r:.40}")
    cuts, at = [], 0
    for number, piece in enumerate(said, 1):
        begins, topic, sync = piece.get("begins"), piece.get("topic"), piece.get("sync", False)
        quote = isinstance(begins, str) and begins.strip()
        if not quote or not isinstance(topic, str | None) or type(sync) is not bool:
            raise ValueError(
                f"piece {number}: expected 'begins', a quote, and perhaps 'topic', a name, or 'sync': true"
            )
        found = text.find(quote, at)
        if found < 0:
            raise ValueError(f"piece {number}: {begins[:40]!r} is not in the text after piece {number - 1}")
        cuts.append(Cut(found, topic, sync))
        at = found + 1
    return cuts


class Annotations:
    """Plans of a JSONL file, {"record": 3, "pieces": [...]} per line in the order of the records they are for.

    Read along with the records, so that memory does not grow with the file.
    """

    def __init__(self, path: str | Path):
        self.path, self.rows = path, self._read()
        self.next = next(self.rows, None)

    def _read(self) -> Iterator[tuple[int, object]]:
        last = 0
        for row in line_rows(Path(self.path)):
            number = row.fields.get("record") if isinstance(row.fields, dict) else None
            if isinstance(row.fields, str):
                raise ValueError(f"{row.place}: {row.fields}")
            if type(number) is not int or "pieces" not in row.fields:
                raise ValueError(f"{row.place}: expected an object with 'record' and 'pieces'")
            if number <= last:
                raise ValueError(f"{row.place}: record {number} after record {last}: sort the lines by record")
            last = number
            yield number, row.fields["pieces"]

    def of(self, number: int, text: str) -> list[Cut] | None:
        """The cuts of record `number` (counted from 1), None if there are none. Raises ValueError if they do not fit."""
        while self.next and self.next[0] < number:  # of a record that was left out
            self.next = next(self.rows, None)
        if not self.next or self.next[0] != number:
            return None
        said, self.next = self.next[1], next(self.rows, None)
        return quoted(text, said)

    def unused(self) -> int:
        """The first record, of those not read along with, that a plan is for; 0: none."""
        return self.next[0] if self.next else 0
