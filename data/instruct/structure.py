"""The parallel structure that a text shows, coarsest first: each rule cuts a text into parts of a kind.

sections     headings of one level, with what is below them
items        list items, numbered steps, rows of a table, labelled entries
paragraphs   paragraphs; in a text of one paragraph its lines
"""

import re
from collections import Counter
from collections.abc import Callable, Iterator
from typing import NamedTuple


class Part(NamedTuple):
    """A part of a text begins at character `begin`; of two or more in a row of one kind but TEXT spans are made."""

    begin: int
    kind: str


TEXT = "text"
WRAPPED = 100  # characters of the longest line of a text whose line breaks may be there for the looks
FENCE = re.compile(r"\s*(```|~~~)")
BULLET = re.compile(r"([ \t]*)[-*+•–][ \t]+\S")
NUMBER = re.compile(r"([ \t]*)(?:\*\*)?(?:step\s+)?\(?(\d{1,3}|[a-z](?=[.)]\s))[.):](?:\s|\*\*)", re.IGNORECASE)
ROW = re.compile(r"[ \t]*\|.*\|[ \t]*$")
BOLD = re.compile(r"(\*\*|__)[^*_]+(?:\1:?|:\1)")
LABEL = re.compile(r"(?:[A-Z][^\s:]*(?: [^\s:.,;!?]+){0,3}:|[a-z_*][\w*]*(?: \([^()\n]*\))? ?:)\s+\S|:\w+ [\w*]+:")


class Line(NamedTuple):
    """A line, where it begins, and whether it is inside a fence of code."""

    begin: int
    text: str
    code: bool


def lines(text: str) -> Iterator[Line]:
    """The lines of a text, their line breaks left out."""
    begin, code = 0, False
    for line in text.split("\n"):
        fence = FENCE.match(line)
        yield Line(begin, line, code or bool(fence))
        code ^= bool(fence)
        begin += len(line) + 1


# ---------------------------------------------------------------- rules


def sections(text: str) -> list[Part]:
    """Parts under the headings of the highest level that occurs twice; what is above the first is text.

    >>> cut("# Otters\\n## Home\\nRivers.\\n## Food\\nFish.", sections)
    [('# Otters', 'text'), ('## Home\\nRivers.', 'section'), ('## Food\\nFish.', 'section')]
    """
    found, all_lines = [], list(lines(text))
    for line, after in zip(all_lines, [*all_lines[1:], Line(0, "", True)]):
        if level := heading_level(line, after):
            found.append((level, line.begin))
    levels = Counter(level for level, _ in found)
    level = min((level for level, count in levels.items() if count > 1), default=0)
    if not level:
        return []
    parts = [Part(begin, "section" if own == level else TEXT) for own, begin in found if own <= level]
    return parts if not text[: parts[0].begin].strip() else [Part(0, TEXT), *parts]


def heading_level(line: Line, after: Line) -> int:
    """1 to 6 as in Markdown, 7 for a line in bold, 8 for a few words and a colon; 0: no heading."""
    if line.code:
        return 0
    if marks := re.match(r"(#{1,6})\s+\S", line.text):
        return len(marks[1])
    if line.text.strip() and re.fullmatch(r"={3,}|-{3,}", after.text.strip()) and not ROW.match(line.text):
        return 1 if "=" in after.text else 2
    if BOLD.fullmatch(line.text.strip()):
        return 7
    return 8 * bool(re.fullmatch(r"[A-Z][^\s:]*(?: [^\s:.,;!?]+){0,3}:\s*", line.text))


def items(text: str) -> list[Part]:
    """List items, steps, rows and entries; what is between them is text.

    >>> [(said[:1], kind) for said, kind in cut("Eat:\\n- fish\\n- crabs\\n  and more\\n\\nBye", items)]
    [('E', 'text'), ('-', 'item'), ('-', 'item'), ('B', 'text')]
    """
    parts, indent, all_lines = [], 0, list(lines(text))
    for number, line in enumerate(all_lines):
        if not line.text.strip():
            continue
        kind, own = item_kind(all_lines, number), len(line.text) - len(line.text.lstrip())
        now = parts[-1].kind if parts else TEXT
        below_step = now == "step" and kind == "item" and more_steps(all_lines, number)
        if now != TEXT and (line.code or own > indent or below_step):
            continue  # it belongs to the item
        blank = number == 0 or not all_lines[number - 1].text.strip()
        if kind != TEXT:
            parts.append(Part(line.begin, kind))
            indent = own
        elif not parts or (now != TEXT and (blank or now in ("row", "entry"))):
            parts.append(Part(line.begin, TEXT))
    return parts


def item_kind(all_lines: list[Line], number: int) -> str:
    """Which kind of part a line begins, TEXT if none.

    >>> [item_kind(list(lines(s)), 0) for s in ("* x", "2) x", "Pros: x", "x : int", "Eat:", "x\\n    Its place.")]
    ['item', 'step', 'entry', 'entry', 'text', 'entry']
    """
    line = all_lines[number]
    if line.code:
        return TEXT
    if BULLET.match(line.text):
        return "item"
    if NUMBER.match(line.text):
        return "step"
    if ROW.match(line.text):
        header = number + 1 < len(all_lines) and is_rule(all_lines[number + 1].text)
        return TEXT if header or is_rule(line.text) else "row"
    below = all_lines[number + 1].text if number + 1 < len(all_lines) else ""
    term = below[:1] in (" ", "\t") and below.strip() and not BULLET.match(below) and line.text[-1] not in ".!?:"
    labelled = LABEL.match(line.text) or re.match(BOLD.pattern + r"\S*\s+\S", line.text)
    return "entry" if line.text[:1].strip() and (term or labelled) else TEXT


def is_rule(line: str) -> bool:
    """Whether a line is the one below the header of a table."""
    return "--" in line and not line.strip(" \t:|-")


def more_steps(all_lines: list[Line], number: int) -> bool:
    """Whether the numbering that this line interrupts goes on below it, so that the line belongs to a step."""
    steps = lambda some: [match[2] for line in some if (match := NUMBER.match(line.text))]
    before, below = steps(reversed(all_lines[:number])), steps(all_lines[number:])
    if not before or not before[0].isdigit():
        return False
    return not below and all_lines[number - 1].text.strip() != "" or str(int(before[0]) + 1) in below[:1]


def paragraphs(text: str) -> list[Part]:
    """Paragraphs; in a text of one paragraph its lines, where they are not wrapped. Lines of code stay together.

    >>> cut("An otter.\\nIt swims.\\n\\nA bear.", paragraphs)
    [('An otter.\\nIt swims.', 'paragraph'), ('A bear.', 'paragraph')]
    >>> cut("An otter\\nswims.\\nA bear.", paragraphs)
    [('An otter\\nswims.', 'line'), ('A bear.', 'line')]
    """
    kind = "paragraph" if re.search(r"\n[ \t]*\n", text.strip()) else "line"
    parts, before, width = [], "", max(len(line) for line in text.split("\n"))
    for line in lines(text):
        begins = not before.strip() or (kind == "line" and not wrapped(before, line.text, width))
        if line.text.strip() and (not parts or (begins and not line.code)):
            parts.append(Part(line.begin, kind))
        before = line.text
    return parts


def wrapped(before: str, line: str, width: int) -> bool:
    """Whether a line goes on with the one before, which is full or ends no sentence.

    >>> wrapped("The otter is an", "animal.", 99), wrapped("It swims (as we", "saw). It", 15), wrapped("An otter.", "It", 99)
    (True, True, False)
    """
    full = width <= WRAPPED and len(before) + 1 + len((line.split() or [""])[0]) > width
    return line[:1].isspace() or (full and line[:1].islower()) or not re.search(r"[.!?:;][\"')*_`]*\s*$", before)


def stem(word: str) -> str:
    """A word without an ending that an answer may change, such as a plural's."""
    return re.sub(r"(?<=\w{3})(?:ies|es|s|ing|ed|y)$", "", word)


RULES = {"sections": sections, "items": items, "paragraphs": paragraphs}


def cut(text: str, rule: Callable[[str], list[Part]]) -> list[tuple[str, str]]:
    """(text, kind) of each part, for examples."""
    parts = rule(text)
    ends = [*(part.begin for part in parts[1:]), len(text)]
    return [(text[part.begin : end].strip(), part.kind) for part, end in zip(parts, ends)]
