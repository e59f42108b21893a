"""What to call a span: its number, then its own heading or label, or else the first words that say something.

A span cannot count what it does not see: items written side by side are numbered right only if their topics are.
"""

import re
from collections.abc import Set
from itertools import groupby
from textwrap import shorten

MOST_WORDS, MOST_CHARACTERS = 3, 40  # of a name, its number aside
MARKER = re.compile(r"\s*(?:[-*+•–]|\(?(?:\d{1,3}|[A-Za-z])[.)]|\|)\s+|\s*#{1,6}\s+|\s*>\s+")
STEP = re.compile(r"\s*(?:step|part|day|week|phase)\s+\d+\b[.:)\s-]*", re.IGNORECASE)
NUMBER = re.compile(  # of an item, a heading or a step
    r"[\s#>*_+•–-]*(?:(?:step|part|day|week|phase)\s+(\d+)\b|\(?(\d{1,3}|[a-z](?=[.)]))[.):]+(?=[\s*_]))", re.IGNORECASE
)
WORD = re.compile(r"[^\W_]+(?:(?!['’]s\b)[-'’][^\W_]+)*")  # without a possessive's end
STOP = frozenset(
    """a about above additionally after again all also always am an and another any are as at be because been before
    begin being below between both but by can consider could did do does doing down during each either else ensure even
    every few finally first firstly for from further furthermore get gets give had has have having he her here hers him
    his how i if in into is it its itself just keep last lastly let like make makes many may me might more moreover most
    much must my no nor not now of off often on once one only or other our out over own per same second secondly she
    should so some start such sure terms than that the their them then there these they third thirdly this those through to
    too try two under until up use used using very was we well were what when where whether which while who whom whose
    why will with within without would you your yours""".split()
)


def name(text: str, dull: Set[str] = frozenset()) -> str:
    """A short name for a span of text; never empty; without the words `dull`, if others name it.

    >>> name("- **Food:** fish and crabs"), name("2. Preheat the oven to 200 degrees.")
    ('food', '2 preheat oven degrees')
    """
    called = lead(text)[0] or first_phrases(text, dull) or first_phrases(text) or tidy(text) or "part"
    found = NUMBER.match(text)
    number = found[found.lastindex].lower() if found else ""
    return called if number in called.split() else f"{number} {called}".strip()


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
    """A heading as a name: no mark-up, number or brackets, in small letters if only its first is a capital, short.

    >>> tidy("2. The **history** of the old castle (1200)"), tidy("__Step 1__"), tidy("a_min, DNA")
    ('history old castle', 'step 1', 'a_min, DNA')
    """
    title = re.sub(r"(?<=\w)\s*\([^()]*\)", "", title)
    title = re.sub(r"[*`#\[\]{}<>|\"]+|(?<![^\W_])_|_(?![^\W_])", " ", title).strip()
    words = (strip_marker(title) or title).strip(" .:;,-–—()").split()
    dull = STOP if len(words) > MOST_WORDS else ("a", "an", "the")
    title = short([word for word in words if word.lower() not in dull] or words)
    return title if title[1:] != title[1:].lower() else title.lower()


def short(words: list[str]) -> str:
    """Words as a name, cut inside one only if it is too long by itself."""
    said = " ".join(words[:MOST_WORDS])
    return (shorten(said, MOST_CHARACTERS, placeholder="") or said[:MOST_CHARACTERS]).strip(" .:;,-–—(")


def words_of(text: str) -> list[str]:
    """The words of a text that can name it."""
    return [word for word in WORD.findall(text.lower()) if tells(word)]


def tells(word: str) -> bool:
    """Whether a word says something: no stop word, number, or contraction such as "we've"."""
    return word not in STOP and len(word) > 2 and not re.search(r"['’]|^\d+$", word)


def first_phrases(text: str, dull: Set[str] = frozenset()) -> str:
    """The first phrases that fit a name, two words or more, of the first clause that has any. Stop words part phrases.

    >>> first_phrases("- Remove the plant from its old pot."), first_phrases("Finally, meet the 12-year-old's dog.")
    ('remove plant', 'meet 12-year-old dog')
    """
    for clause in re.split(r"[.,:;!?](?:\s|$)|\n", strip_marker(text).lower()):
        words = []
        for can, phrase in groupby(WORD.findall(clause), key=lambda word: tells(word) and word not in dull):
            phrase = [*phrase] if can else []
            if words[1:] and len(words + phrase) > MOST_WORDS:
                break
            words += phrase
        if words:
            return short(words)
    return ""
