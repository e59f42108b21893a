"""The annotator: plans by rules, without a language model.

    structure.py    which parts a text shows
    topics.py       what to call each
    here            which parts are spans, and of which round: what refers back waits for a later one

A text that shows no such structure, or whose plan would cost more than it saves, stays one plain text.
"""

import re
from collections import Counter
from dataclasses import dataclass, replace
from itertools import groupby

from data.instruct.plans import Cut, build
from data.instruct.structure import RULES, TEXT, Part, paragraphs, stem
from data.instruct.topics import lead, name, strip_marker, words_of
from grammar import unnumbered
from tags import Round
from tokenizer import MAX_LENGTH, Tokenizer

COSTS, LEANS = "the plan costs what it saves", "its parts lean on each other"
SAME = "two of its topics differ in their number alone"
PROSE = ("paragraph", "line")  # kinds whose parts may lean on the part before


@dataclass(frozen=True)
class Annotation:
    """An answer with its plan, and the decision: which rule cut it, or why nothing did."""

    rounds: tuple[Round, ...]
    gaps: tuple[str, ...]  # white space between the pieces (plans.restore)
    decision: str

    @property
    def planned(self) -> bool:
        return any(round_.spans for round_ in self.rounds)


def annotate(prompt: str, text: str, tokenizer: Tokenizer) -> Annotation:
    """Cut an answer by the first rule whose plan can be asked for and pays.

    The decision is the rule's name, or why the text stays as it is. Where the plan of a rule costs too much, that of a
    finer one would cost more.
    """
    why = LEANS if ONE_WORK.search(prompt) else "no parallel structure"
    for rule, parts_of in RULES.items() if why != LEANS else ():
        parts = parts_of(text)
        if not any(a.kind == b.kind != TEXT for a, b in zip(parts, parts[1:])):
            continue
        cuts = cuts_from(parts, text, prompt)
        if not any(cut.topic for cut in cuts):
            why = LEANS
            break
        rounds, gaps = build(text, cuts)
        why = objection(rounds, tokenizer)
        if not why:
            return Annotation(rounds, gaps, rule)
        if why == COSTS:
            break
    return as_text(text, f"text: {why}")


def as_text(text: str, decision: str) -> Annotation:
    """An answer without a plan."""
    return Annotation(*build(text, [Cut(0)]), decision)


def objection(rounds: tuple[Round, ...], tokenizer: Tokenizer) -> str:
    """Why a plan cannot be asked for or does not pay, "" if nothing speaks against it.

    A plan pays if plan, text and the longest span of each round are fewer tokens than the answer: the critical path
    is then shorter than one token per pass, even with one denoising step per slot.
    """
    if why := unaskable(rounds, tokenizer):
        return why
    path = total = 0
    for round_ in rounds:
        if len({unnumbered(span.topic) for span in round_.spans}) < len(round_.spans):
            return SAME
        sizes = [len(tokenizer.encode(span.text)) for span in round_.spans]
        plan = sum(3 + len(tokenizer.encode(span.topic)) for span in round_.spans)  # 3: <topic>, length, </topic>
        text = len(tokenizer.encode(round_.text))
        path, total = path + text + plan + max(sizes, default=0), total + text + sum(sizes)
    return "" if path < total else COSTS


def unaskable(rounds: tuple[Round, ...], tokenizer: Tokenizer) -> str:
    """Why no plan can ask for one of the spans, "" if plans can."""
    for span in (span for round_ in rounds for span in round_.spans):
        try:
            tokenizer.encode_span(replace(span, length=tokenizer.units(span.text)))
        except ValueError as error:
            too_long = tokenizer.units(span.text) > MAX_LENGTH
            return f"a span of more than {MAX_LENGTH} units" if too_long else str(error)
    return ""


# ---------------------------------------------------------------- from parts to rounds


def cuts_from(parts: list[Part], text: str, prompt: str) -> list[Cut]:
    """Spans of parts that can be written side by side, text of all else."""
    cuts, parts = [], with_closing(parts, text)
    labels = [lead(text[part.begin : end])[0] for part, end in zip(parts, [*(p.begin for p in parts[1:]), len(text)])]
    for kind, run in groupby(parts, key=lambda part: part.kind):
        run = list(run)
        near = lambda part: run[0].begin <= part.begin <= run[-1].begin or part.kind == kind == "entry"
        kin = [label for part, label in zip(parts, labels) if label and near(part)]
        end = next((part.begin for part in parts if part.begin > run[-1].begin), len(text))
        said, recur = text[run[0].begin : end], len({*kin}) < len(kin)  # labels of speakers, or questions and answers
        tale = kind == TEXT or recur or narrated(said) and kind in PROSE or kind == "step" and EQUATION.search(said)
        for group in [[(run[0].begin, "")]] if tale else rounds_of(kind, run, text[:end], prompt):
            spans = len(group) > 1
            if not spans and cuts and cuts[-1].topic is None:
                continue  # text after text: one piece
            names = named([content for _, content in group], kind in PROSE) if spans else [None]
            sync = bool(cuts) and cuts[-1].topic is not None
            cuts += [Cut(begin, name, sync and i == 0) for i, ((begin, _), name) in enumerate(zip(group, names))]
    return cuts


def with_closing(parts: list[Part], text: str) -> list[Part]:
    """The parts, the last paragraph of the last one apart if it refers back: "Overall, ..." below the last heading."""
    begins = [paragraph.begin for paragraph in paragraphs(text) if parts and paragraph.begin > parts[-1].begin]
    if begins and refers_back(text[begins[-1] :], [text[: begins[-1]]], last=False):
        return [*parts, Part(begins[-1], TEXT)]
    return parts


def rounds_of(kind: str, run: list[Part], text: str, prompt: str) -> list[list[tuple[int, str]]]:
    """Neighbouring parts of one kind as groups of (begin, content), one group per round, in the order of the text.

    A part that refers back begins a new group. In prose what continues the part before belongs to that part, as does a
    paragraph that opens nothing of its own; an introduction is a group of its own.
    """
    ends, groups, before = [*(part.begin for part in run[1:]), len(text)], [[]], []
    for (begin, _), end in zip(run, ends):
        content, prose = text[begin:end], kind in PROSE
        announced = kind != "paragraph" or opens(content, prompt) or refers_back(content, before, last=False)
        if prose and groups[-1] and (continues(content) or not announced):
            start = groups[-1][-1][0]
            groups[-1][-1] = start, text[start:end]
            continue
        later = before and refers_back(content, before, last=prose and end == len(text))
        if groups[-1] and (later or prose and len(before) == 1 and introduces(before[0])):
            groups.append([])
        groups[-1].append((begin, content))
        before.append(content)
    return groups if 3 * len(before) >= 2 * len(run) else [groups[0][:1]]  # more goes on than begins: one tale


def named(contents: list[str], prose: bool = False) -> list[str]:
    """A name for each of the spans of a plan, different from the others. In prose what most speak of names none.

    >>> named(["The otter lives in rivers.", "Another otter eats fish."], prose=True)
    ['lives rivers', 'eats fish']
    """
    names, counts = [], Counter(word for content in contents for word in {*words_of(content)} if prose)
    for content in contents:
        topic, count = name(content, {word for word, n in counts.items() if 2 * n > len(contents)}), 1
        while (topic if count == 1 else f"{topic} {count}") in names:
            count += 1
        names.append(topic if count == 1 else f"{topic} {count}")
    return names


# ---------------------------------------------------------------- what leans on what

SUMS_UP = re.compile(
    r"overall|in (?:conclusion|short|summary|sum|total|general|brief|the end)|to (?:sum|conclude|summari[sz]e|recap)|"
    r"altogether|together|all (?:in all|of (?:these|this|them))|these|those|both|therefore|thus|hence|as a result|"
    r"consequently|in (?:other words|(?:simple|simpler|other) terms)|by (?:following|combining|doing|using) (?:these|this)|with (?:these|this|all)|"
    r"ultimately|so,|conclusion|summary|total|verdict|result|final (?:thoughts|answer|result|verdict)|"
    r"key takeaways?|takeaways?|bottom line|the (?:above|former|latter)|as (?:mentioned|noted|shown|stated)",
    re.IGNORECASE,
)
REPLIES = {"answer", "reply", "response", "solution"}  # labels of what another part asks for
POINTS_BACK = re.compile(
    r"\b(?:the (?:first|previous|other|last) (?:two|three|step|point|one|option|item)s?|(?:step|point|part)s? \d+|"
    r"(?:mentioned|described|listed|shown|given) (?:above|earlier|before)|(?:all|any|each) of the above)\b",
    re.IGNORECASE,
)
CONTINUES = re.compile(
    r"(?:it|its|he|she|his|her|they|their|them|this|that|such|however|but|and|or|yet|nevertheless|instead|otherwise|"
    r"then|so|also|for (?:example|instance)|similarly|conversely|on the other hand|in contrast|afterwards?|"
    r"after (?:that|this)|because of (?:this|that))\b",
    re.IGNORECASE,
)
COUNTS = re.compile(
    r"(?:first|second|third|fourth|fifth|last|final)(?:ly)?\b|one\b|another\b|additionally|moreover|furthermore|besides|"
    r"in addition|in terms of|as for|regarding|when it comes to|on the one hand|likewise",
    re.IGNORECASE,
)
OPENING = 5  # words in which a paragraph says what it is about
ONE_WORK = re.compile(  # a prompt that asks for a text whose parts are not independent, however it looks
    r"\b(?:write|tell|compose|draft|create|continue|finish|invent|make up|read)\b(?:(?!\babout\b|\bof\b)[^.?!:\n]){0,60}"
    r"\b(?:story|tale|fable|myth|legend|novel|chapter|scene|narrative|diary|memoir|poem|haiku|limerick|song|lyrics|rap|"
    r"dialogue|conversation|letter|e-?mail|speech|script|screenplay|toast|eulogy)\b",
    re.IGNORECASE,
)
NARRATES = re.compile(
    r"\b(?:he|she|his|her|him)\b[\w ,'’-]*\b(?:was|were|had|went|came|saw|took|found|began|felt|knew|became|left|\w+ed)\b|"
    r"\b(?:once upon|(?:one|that|the (?:next|following|same)) (?:day|morning|evening|night|year|week)|suddenly|at last|"
    r"(?:years?|days?|weeks?|months?|hours?|minutes?) (?:later|passed|went))\b",
    re.IGNORECASE,
)
SPEECH = re.compile(
    r"[,.!?][\"”] (?:\w+ ){0,3}(?:said|asked|replied|cried)\b|\b(?:said|asked|replied|cried)\b[\w ]*[,:] [\"“]"
)
INTRODUCES = re.compile(r"(?:sure|certainly|of course|absolutely|yes|no|here(?: is| are|['’]s)|below)\b", re.IGNORECASE)


def refers_back(text: str, before: list[str], last: bool) -> bool:
    """Whether a part cannot be written before others are known, so belongs in a later round.

    It sums up, points back, replies, or, as the last part of prose, begins with numbers of one of the others.

    >>> refers_back("Overall, a playful animal.", ["..."], last=True)
    True
    >>> refers_back("4. Mix it with the dough of step 2.", ["..."], last=False)
    True
    >>> refers_back("Ready in 20 minutes with 90 kcal.", ["It has 90 kcal and takes 20 minutes."], last=True)
    True
    >>> refers_back("It has 90 kcal and takes 20 minutes.", ["Cook it for 20 minutes, to 90 kcal."], last=False)
    False
    >>> refers_back("3. Totals are not summed.", ["..."], last=True)
    False
    """
    label, _ = lead(text)
    replies = label in REPLIES or label == "a" and "q" in [lead(other)[0] for other in before]
    sums_up = SUMS_UP.fullmatch(label) or re.match(rf"(?:{SUMS_UP.pattern})\b", words(text), re.IGNORECASE)
    if replies or sums_up or POINTS_BACK.search(words(text)):
        return True
    numbers = set(NUMBERS.findall(re.split(r"(?<=[.!?])\s", words(text))[0]))
    return last and len(numbers) > 1 and any(numbers <= set(NUMBERS.findall(other)) for other in before)


def continues(text: str) -> bool:
    """Whether a part of prose goes on with what the part before says. A step of a calculation does.

    >>> continues("They also eat crabs."), continues("Otters eat crabs."), continues("2x = 4")
    (True, False, True)
    """
    opening = " ".join(words(text).split()[: OPENING + 3])
    return bool(CONTINUES.match(words(text)) or EQUATION.search(text) or NARRATES.search(opening))


def narrated(text: str) -> bool:
    """Whether prose tells what happened: somebody speaks, or a third of the sentences say what a person did, or when.

    >>> narrated("One day a fox met a bear. He asked for fish. It rained."), narrated("Foxes hunt. One fox hunted.")
    (True, False)
    """
    said = re.split(r"(?<=[.!?])\s+", text.strip())
    return bool(SPEECH.search(text)) or sum(bool(NARRATES.search(each)) for each in said) >= max(2, len(said) / 3)


def opens(text: str, prompt: str) -> bool:
    """Whether a paragraph opens a part of its own: it begins with a label, a word that counts, or words of the prompt.

    >>> opens("Another risk is rain.", ""), opens("The bear sleeps.", "Bears and otters?"), opens("The door fell.", "A tale")
    (True, True, False)
    """
    opening = words(text).split()[:OPENING]
    asked = {stem(word) for word in words_of(prompt)}
    found = {stem(word) for word in words_of(" ".join(opening))}
    return bool(lead(text)[0] or COUNTS.match(words(text)) or asked & found)


def introduces(text: str) -> bool:
    """Whether the first part of prose only announces the others.

    >>> introduces("Sure! I can help."), introduces("Two animals:"), introduces("Otters swim.")
    (True, True, False)
    """
    return bool(INTRODUCES.match(words(text))) or text.rstrip(" *_\n").endswith(":")


EQUATION = re.compile(r"[\w)] *= *[-(\d]")
NUMBERS = re.compile(r"\d+(?:[.,]\d+)*")


def words(text: str) -> str:
    """A part from its first word on: no marker, no mark-up before it."""
    return strip_marker(text).lstrip("*_#> \t\n\"'(")
