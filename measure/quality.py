"""How good answers are: the figures of one answer, their means, and what can be said of texts."""

import importlib.util
import sys
import textwrap
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from plumbing.settings import one_line
from tags import Example, Round

# What an answer's `result()` says of its cost. Those that a sampler does not report are 0.
COSTS = ("plan_passes", "denoise_passes", "draft_passes", "drafted", "accepted", "critical_path", "positions",
         "content_tokens", "pads")  # fmt: skip
WIDTH = 80  # columns of a terminal

# ---------------------------------------------------------------- the figures of answers


def own_function(folder: Path, file: str, name: str) -> Callable | None:
    """The function `name` of a file of the data set's own, which is run; None if it has no such file.

    Of families.py `check(example, text)`: its result has `exact`, whether the whole answer is right, and `spans`,
    whether each line of the reference is. Of consistency.py `count(example, text)`, see measure/readers.py.
    """
    path = folder.resolve() / file
    if not path.exists():
        return None
    spec = importlib.util.spec_from_file_location(f"{path.stem} of {path.parent}", path)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)  # its dataclasses look it up there
    try:
        spec.loader.exec_module(module)
        return getattr(module, name)
    except Exception as error:
        raise ValueError(f"{path}: expected Python code with {name}(example, text), but: {error!r}") from None


def checker(folder: Path) -> Callable | None:
    """What says whether an answer is right, where there is one right answer."""
    return own_function(folder, "families.py", "check")


def row_of(example: Example, result: dict, check: Callable | None, rounds: Iterable[Round] | None) -> dict:
    """The figures of one answer. `rounds`: the example's, as the method writes its plan; None if it writes none."""
    row = {name: result.get(name, 0) for name in COSTS}
    row["passes"] = row["plan_passes"] + row["denoise_passes"]
    row["valid"] = float(not result["broken"] and not result["cut"])
    row["looping"] = float(result.get("looping", False))  # older files of answers do not say
    if check:
        verdict = check(example, result["text"])
        row |= {"exact": float(verdict.exact), "right_lines": sum(verdict.spans) / max(len(verdict.spans), 1)}
    if rounds is not None:
        reference = [(s.topic, s.length) for r in rounds for s in r.spans]
        planned = [(t["topic"], t["length"]) for r in result["rounds"] for t in r["plan"]]
        off = [b - a for (topic, a), (other, b) in zip(reference, planned) if topic == other]
        row |= {"plan_right": float(reference == planned), "n_spans": len(planned)}
        row |= {"topics_right": len(off), "length_error": sum(map(abs, off)), "length_bias": sum(off)}
    return row


def cell(text: str) -> str:
    """A text that came from outside as a cell of a table."""
    return one_line(text).replace("|", "/")


def aligned(heads: list[str], rows: Iterable[list[str]]) -> Iterator[str]:
    """Markdown lines of a table that fits a terminal: what is too long in its first column goes on in the next row."""
    rows = [heads, *rows]
    first, *widths = (max(map(len, column)) for column in zip(*rows))
    first = max(1, min(first, WIDTH - 4 - sum(width + 3 for width in widths)))
    for n, (name, *cells) in enumerate(rows):
        for m, part in enumerate(textwrap.wrap(name, first) or [""]):
            shown = (f"{'' if m else cell:>{width}}" for cell, width in zip(cells, widths))
            yield f"| {part:{first}} | {' | '.join(shown)} |"
        if n == 0:
            yield "|" + "|".join("-" * (width + 2) for width in (first, *widths)) + "|"


def family_of(example: Example) -> str:
    """The name of its family in figures, where "all" are those of every example."""
    return "(all)" if example.family == "all" else example.family


def score(examples: list[Example], results: list[dict], check: Callable | None, rounds: list) -> dict[str, dict]:
    """Means of `row_of` over each family and, last, over all; of the error of lengths, over the topics that are right.

    `rounds`: as for `row_of`, of each example.
    """
    groups = defaultdict(list)
    for example, result, written in zip(examples, results, rounds):
        for name in (family_of(example), "all"):
            groups[name].append(row_of(example, result, check, written))
    scores = {name: {key: sum(row[key] for row in rows) / len(rows) for key in rows[0]} | {"n": len(rows)}
              for name, rows in sorted(groups.items(), key=lambda item: item[0] == "all")}  # fmt: skip
    for means in scores.values():
        if means.get("topics_right"):
            means["length_error"] /= means["topics_right"]
            means["length_bias"] /= means["topics_right"]
    return scores


def wrong_lines(examples: list[Example], results: list[dict], check: Callable) -> dict[str, dict]:
    """Family -> {"text": [wrong, all], "spans": {topic: [wrong, all]}}: which lines of the references are wrong."""
    families = {family_of(e): {"text": [0, 0], "spans": defaultdict(lambda: [0, 0])} for e in examples}
    for example, result in zip(examples, results):
        family = families[family_of(example)]
        parts = [part for r in example.rounds for part in [(None, r.text), *((s.topic, s.text) for s in r.spans)]]
        topics = [topic for topic, text in parts if text for _ in text.split("\n")]  # a verdict per line
        for topic, right in zip(topics, check(example, result["text"]).spans):
            count = family["text"] if topic is None else family["spans"][topic]
            count[0], count[1] = count[0] + (not right), count[1] + 1
    return families


def spans_per_answer(results: list[dict]) -> dict[int, float]:
    """Number of planned spans -> share of the answers that have it."""
    counts = Counter(sum(len(r["plan"]) for r in result["rounds"]) for result in results)
    return {n: count / len(results) for n, count in sorted(counts.items())}


# ---------------------------------------------------------------- texts


def distinct(results: list[dict], n: int) -> float:
    """Share of an answer's n-grams of words that are different, the mean over answers with any: low if these repeat."""
    shares = []
    for result in results:
        words = result["text"].split()
        grams = [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]
        shares += [len(set(grams)) / len(grams)] if grams else []
    return sum(shares) / max(len(shares), 1)
