"""How good the annotator is, on structure that is known: precision and recall, and its worst cases.

    python data/instruct/judge.py recipes             recipes, a piece per line, their tags stripped
    python data/instruct/judge.py docstrings          parameters of functions: signature in, a description each out
    python data/instruct/judge.py data/mine           any data set of planned answers

Judged are borders (where pieces begin), spans (begin and end), lengths (in units, of spans that begin right) and rounds
(the round of pieces that begin right), each over all answers together whose known plan pays (annotate.objection).
"""

import argparse
import inspect
import re
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from data import read_split
from data.instruct.annotate import COSTS, annotate, objection
from data.instruct.plans import cuts_of, restore
from plumbing.settings import Help, add_settings, check, command, locate, one_line, pick, setting
from tags import Example, Round, Span, pieces
from tokenizer import Tokenizer

KINDS = ("borders", "spans", "lengths", "rounds")


@dataclass
class JudgeConfig:
    """Judging."""

    split: str = setting("val", "split of a data set")
    modules: str = setting("numpy,numpy.linalg,numpy.ma,torch,torch.nn,torch.nn.functional,torch.distributions",
                           "whose docstrings")  # fmt: skip
    form: str = setting("written", "what the annotator sees: all as it is, the descriptions of docstrings as prose, one "
                        "paragraph each, or all pieces joined to one line", among=("written", "prose", "joined"))  # fmt: skip
    limit: int = setting(0, "only the first so many answers (0: all)", at_least=0)
    worst: int = setting(10, "print the answers that are cut worst", at_least=0)

    def __post_init__(self):
        check(self)


# ---------------------------------------------------------------- scores


def facts(rounds: tuple[Round, ...], gaps: tuple[str, ...], tokenizer: Tokenizer) -> dict[str, set]:
    """What a plan says of a text, per kind, as sets that can be compared. The first border, at 0, is no merit."""
    said, number = {kind: set() for kind in KINDS}, 0
    for n, (cut, text) in enumerate(zip(cuts_of(rounds, gaps), pieces(rounds))):
        number += cut.sync
        said["rounds"].add((cut.begin, number))
        said["borders"] |= {cut.begin} if n else set()
        if cut.topic is not None:
            said["spans"].add((cut.begin, cut.begin + len(text)))
            said["lengths"].add((cut.begin, tokenizer.units(text)))
    return said


@dataclass
class Score:
    """Counts of what was found, what should have been, and what is in both."""

    right: int = 0
    found: int = 0
    known: int = 0

    def add(self, found: set, known: set) -> None:
        self.right += len(found & known)
        self.found += len(found)
        self.known += len(known)

    @property
    def precision(self) -> float:
        return self.right / self.found if self.found else 1.0

    @property
    def recall(self) -> float:
        return self.right / self.known if self.known else 1.0

    @property
    def f1(self) -> float:
        return 2 * self.right / (self.found + self.known) if self.found + self.known else 1.0


class Verdict(NamedTuple):
    """An answer, F1 of its spans, and the beginnings of spans that were missed and of those that should not be."""

    f1: float
    prompt: str
    decision: str
    missed: list[str]
    extra: list[str]


def judge(examples: list[Example], tokenizer: Tokenizer) -> tuple[dict[str, Score], list[Verdict]]:
    """Scores per kind, and a verdict on each answer, the worst first."""
    scores, verdicts = {kind: Score() for kind in KINDS}, []
    for example in examples:
        text = restore(example.rounds, example.gaps)
        found = annotate(example.prompt, text, tokenizer)
        ours, known = (facts(some.rounds, some.gaps, tokenizer) for some in (found, example))
        for kind in KINDS:
            scores[kind].add(ours[kind], known[kind])
        own = Score()
        own.add(ours["spans"], known["spans"])
        start = lambda spans: [one_line(" ".join(text[a:b].split())[:40]) for a, b in sorted(spans)]
        missed, extra = start(known["spans"] - ours["spans"]), start(ours["spans"] - known["spans"])
        verdicts.append(Verdict(own.f1, example.prompt, found.decision, missed, extra))
    return scores, sorted(verdicts)


# ---------------------------------------------------------------- docstrings


def docstrings(modules: list[str], form: str) -> Iterator[Example]:
    """Functions with two or more parameters described: their signature, and one span per parameter.

    The borders are the lines that begin with a name of the signature, or with a star: not how a text looks.
    """
    seen = set()
    for name, function in functions(modules):
        text = inspect.getdoc(function) or ""
        names = names_of(function, text)
        section = parameters(text)
        if text in seen or not section:
            continue
        seen.add(text)
        lines = section.split("\n")
        begins = [n for n, line in enumerate(lines) if line[:1] == "*" or set() < described(line) <= names]
        if len(begins) < 2 or begins[0] != 0:
            continue
        entries = ["\n".join(lines[a:b]).strip() for a, b in zip(begins, [*begins[1:], len(lines)])]
        spans = [Span(", ".join(sorted(described(entry.split("\n")[0]))), entry) for entry in entries]
        if form == "prose":
            spans = [Span(span.topic, described_as(span.text)) for span in spans]
        if all(span.text for span in spans):
            prompt = f"{name}({', '.join(sorted(names))})"
            yield Example(prompt, (Round(spans=tuple(spans)),), name.split(".")[0])


def names_of(function: object, text: str) -> set[str]:
    """The parameters of a signature; of functions in C it is the first line of the docstring."""
    try:
        return {*inspect.signature(function).parameters}
    except (ValueError, TypeError):
        first = re.match(r"[\w.]*\((.*?)\)", text, re.DOTALL)
        return set(re.findall(r"\b[A-Za-z_]\w*", first[1])) if first else set()


def functions(modules: list[str]) -> Iterator[tuple[str, object]]:
    """(name, function or class) of all that modules offer under a public name."""
    for module in modules:
        try:
            members = vars(import_module(module))
        except ImportError as error:
            raise ValueError(f"--modules {module}: {error}") from None
        for name, value in sorted(members.items()):
            if callable(value) and not name.startswith("_") and isinstance(getattr(value, "__doc__", None), str):
                yield f"{module}.{name}", value


def parameters(text: str) -> str:
    """The section of a docstring that describes the parameters, without its own indent; "" if there is none."""
    numpy = re.search(r"^Parameters\n-+\n(.*?)(?=\n\n?[^\n]+\n-{3,}\n|\Z)", text, re.DOTALL | re.MULTILINE)
    google = re.search(r"^(?:Args|Arguments|Parameters):\n((?:[ \t]+\S.*\n?|[ \t]*\n)+)", text, re.MULTILINE)
    sphinx = re.search(r"^(:param .*?)(?=\n:(?!param|type)|\Z)", text, re.DOTALL | re.MULTILINE)
    found = numpy or google or sphinx
    return inspect.cleandoc(found[1]) if found else ""


def described(line: str) -> set[str]:
    """The names that a line begins to describe, the empty set if it is within a description.

    >>> sorted(described("x1, *args : int")), sorted(described("dim (int): Axis")), sorted(described("    see x"))
    (['args', 'x1'], ['dim'], [])
    """
    entry = re.match(r"(?::param )?([*\w]+(?:, ?[*\w]+)*)\s*(?:\(.*?\))?\s*(?::|$)", line)
    return {name.strip(" *") for name in entry[1].split(",")} if entry else set()


def described_as(entry: str) -> str:
    """The description alone, in one paragraph, without the line or label that names the parameter."""
    head, _, body = entry.partition("\n")
    after = re.sub(r"^(?::param )?[*\w, ]+(?:\(.*?\))?\s*:\s*", "", head)
    numpy = body.startswith(" ") and " : " in head or ":" not in head
    return " ".join((body if numpy else f"{after} {body}").split())


# ---------------------------------------------------------------- report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=Help)
    parser.add_argument("what", help="recipes, docstrings, or the folder of a data set")
    add_settings(parser, JudgeConfig)
    args = parser.parse_args()
    config = pick(JudgeConfig, args)
    if args.what == "docstrings":
        examples = list(docstrings(config.modules.split(","), config.form))
        tokenizer = Tokenizer.train((text for e in examples for text in pieces(e.rounds)), 4096)
    else:
        folder = locate("data/recipes" if args.what == "recipes" else args.what)
        examples, tokenizer = read_split(folder / f"{config.split}.jsonl"), Tokenizer.load(folder / "tokenizer.json")
    if config.form == "joined":
        examples = [replace(e, gaps=("", *[" "] * (len(pieces(e.rounds)) - 1), "")) for e in examples]
    paying = [e for e in examples[: config.limit or None] if objection(e.rounds, tokenizer) != COSTS]
    if not paying:
        raise ValueError(f"{args.what}: nothing to judge on")
    scores, verdicts = judge(paying, tokenizer)
    known = f"{scores['spans'].known} spans in {scores['rounds'].known} pieces"
    print(f"{len(paying)} of {len(examples)} answers have a plan that pays: {known}")
    print(f"{'':10}{'precision':>10}{'recall':>8}{'F1':>8}")
    for kind, score in scores.items():
        print(f"{kind:10}{score.precision:10.1%}{score.recall:8.1%}{score.f1:8.1%}")
    print(*(f"{n:6} {decision}" for decision, n in Counter(v.decision for v in verdicts).most_common()), sep="\n")
    for verdict in verdicts[: config.worst]:
        print(f"\n{verdict.f1:.0%}  {one_line(verdict.prompt[:100])}   [{verdict.decision}]")
        for word, spans in (("missed", verdict.missed), ("extra", verdict.extra)):
            print("".join(f"  {word:7} {span}\n" for span in [*spans[:4], *["..."] * (len(spans) > 4)]), end="")


if __name__ == "__main__":
    command(main)
