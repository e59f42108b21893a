"""What to call a span: its own heading or label if it has one, else the words that tell it from the other spans."""

import math
import re
from collections import Counter

MOST_WORDS, MOST_CHARACTERS = 5, 40  # of a name
MARKER = re.compile(r"\s*(?:[-*+•–]|\(?(?:\d{1,3}|[A-Za-z])[.)]|\|)\s+|\s*#{1,6}\s+|\s*>\s+")
STEP = re.compile(r"\s*(?:step|part|day|week|phase)\s+\d+\b[.:)\s-]*", re.IGNORECASE)
STOP = frozenset(
    """a about above after again all also always am an and any are as at be because been before being below between
    both but by can could did do does doing down during each either else even every few for from further get gets
    give had has have having he her here hers him his how i if in into is it its itself just like make makes many may
    me might more most much must my no nor not now of off often on once one only or other our out over own per same
    she should so some such than that the their them then there these they this those through to too two under until
    up use used using very was we well were what when where whether which while who whom whose why will with within
    without would you your yours""".split()
)


def name(text: str, others: list[str]) -> str:
    """A short name for a span of text beside others; never empty.

    >>> name("- **Food:** fish and crabs", [])
    'food'
    >>> name("The otter eats fish and crabs.", ["The otter lives in rivers."])
    'eats fish'
    """
    label, _ = lead(text)
    return label or telling(text, others)


def lead(text: str) -> tuple[str, str]:
    """The heading or label that a text begins with, cleaned, and the rest; no label: ('', text).

    >>> lead("## Where it lives\\nRivers.")
    ('where it lives', '\\nRivers.')
    >>> lead("2. Step 2: Peel: take off the skin")
    ('peel', ' take off the skin')
    >>> lead("x : int\\n    The place.")
    ('x', ' int\\n    The place.')
    >>> lead("It swims.")
    ('', 'It swims.')
    """
    rest = text.lstrip()
    heading = re.match(r"#{1,6}\s+(.+)", rest)
    if not heading:
        rest = strip_marker(rest)
        heading = (
            re.match(r"(\*\*|__)(?P<title>[^*_\n]{1,60})\1[:.]?", rest)
            or re.match(r":\w+ (?P<title>[\w*]+):", rest)  # :param x:
            or re.match(r"(?P<title>[^\n]{1,60})\n(?:={3,}|-{3,})[ \t]*(?:\n|$)", rest)
            or re.match(r"(?P<title>(?:[^\s:.!?;]+ ){0,4}[^\s:.!?;]+)\s?:(?=\s|$)", rest)
            or re.match(r"(?P<title>\w[^:.!?;,\n]{0,39}?) [–—-] ", rest)
            or re.match(r"(?P<title>[^|\n]{1,40}?)\s*\|", rest)  # first cell of a table's row
            or re.match(r"(?P<title>[*\w., ]{1,40})\n(?=[ \t]+\S)", rest)  # a term, its description indented
        )
    title = tidy(heading[heading.lastindex] if heading else "")
    if not title:
        return "", text
    return title, rest[heading.end() :]


def strip_marker(text: str) -> str:
    """A list item without its bullet or number.

    >>> strip_marker("2) Step 2: Peel")
    'Peel'
    """
    before = None
    while before != text:
        before, text = text, MARKER.sub("", text, count=1) if MARKER.match(text) else text
        text = STEP.sub("", text, count=1) if STEP.match(text) else text
    return text


def tidy(title: str) -> str:
    """A heading as a name: no mark-up, nothing in brackets, in small letters if only its first is a capital, short."""
    title = re.sub(r"(?<=\w)\s*\([^()]*\)", "", title)
    words = re.sub(r"[*_`#\[\]{}<>|\"]+", " ", title).strip(" .:;,-–—()").split()
    title = " ".join(words[:MOST_WORDS])[:MOST_CHARACTERS].strip(" .:;,-–—(")
    return title if title[1:] != title[1:].lower() else title.lower()


def words_of(text: str) -> list[str]:
    """The words of a text that can name it."""
    return [w for w in re.findall(r"[^\W\d_][\w'-]*", text.lower()) if w not in STOP and len(w) > 2]


def telling(text: str, others: list[str], most: int = 2) -> str:
    """The words that are most of this text's and least of the others', in the order of the text."""
    words, elsewhere = words_of(text), Counter(word for other in others for word in set(words_of(other)))
    counts, first = Counter(words), {word: -i for i, word in reversed([*enumerate(words)])}
    weight = {w: (1 + math.log(n)) * math.log((2 + len(others)) / (1 + elsewhere[w])) for w, n in counts.items()}
    best = sorted(weight, key=lambda w: (-weight[w], -first[w]))[:most]
    chosen = " ".join(sorted(best, key=lambda w: -first[w]))[:MOST_CHARACTERS].strip()
    return chosen or tidy(re.sub(r"[^\w\s]", " ", text)) or "part"
