"""Data sets with one thing changed, for what no setting of the method can say. Each keeps prompts, splits and tokenizer.

| variant    | what changes                                                                                          |
|------------|-------------------------------------------------------------------------------------------------------|
| `untagged` | `<sync/>` is deleted, as in the paper's ablation: one round, whose text no longer waits for its spans |
| `coupled`  | of all families this one alone                                                                        |
| `named`    | so, and its topics end with the colour that the spans share: the plan says what they must agree on    |
| `skeleton` | Skeleton-of-Thought as ordinary text: a request for the skeleton, and one for each of its points      |
"""

import hashlib
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

from data import read_split, writing
from data.towns.families import COLOURS
from methods import merged
from plumbing.files import write_whole
from plumbing.settings import locate
from tags import Example, Round
from tokenizer import Tokenizer

SKELETON, POINT = " Name the points.", " Points: {}. Write about {}."


def untagged(example: Example, tokenizer: Tokenizer) -> Iterator[Example]:
    text = " ".join(round_.text for round_ in example.rounds if round_.text)
    yield replace(example, rounds=(Round(text, tuple(span for round_ in example.rounds for span in round_.spans)),))


def coupled(example: Example, tokenizer: Tokenizer) -> Iterator[Example]:
    if example.family == "coupled":
        yield example


def named(example: Example, tokenizer: Tokenizer) -> Iterator[Example]:
    for example in coupled(example, tokenizer):
        spans = [(span, re.search(rf"\b({'|'.join(COLOURS)})\b", span.text)[0]) for span in example.rounds[0].spans]
        yield replace(example, rounds=(Round(spans=tuple(replace(s, topic=f"{s.topic} {c}") for s, c in spans)),))


def skeleton(example: Example, tokenizer: Tokenizer) -> Iterator[Example]:
    """The requests of an example and their answers; what follows a `<sync/>` is one more point, "end"."""
    (round_,) = merged(example.rounds, tokenizer)
    points = ", ".join(span.topic for span in round_.spans)
    yield Example(example.prompt + SKELETON, (Round(points),), example.family)
    for span in round_.spans:
        yield Example(example.prompt + POINT.format(points, span.topic), (Round(span.text),), example.family)


def write_variant(data: str, out: Path, change: Callable[[Example, Tokenizer], Iterator[Example]]) -> None:
    """Write the data set of a folder as a variant, unless it is there and was made of the same."""
    folder, splits, stamp = locate(data), ("train", "val", "test"), out / "made-of.txt"
    files = [*(folder / f"{split}.jsonl" for split in splits), folder / "tokenizer.json", folder / "families.py"]
    made_of = hashlib.sha256(b"".join(path.read_bytes() for path in (*files, Path(__file__)))).hexdigest()
    if stamp.exists() and stamp.read_text() == made_of:
        return
    stamp.unlink(missing_ok=True)
    out.mkdir(parents=True, exist_ok=True)
    shutil.copy(folder / "families.py", out)  # answers are checked as before
    tokenizer = Tokenizer.load(folder / "tokenizer.json")
    with writing(out, list(splits), tokenizer) as add:
        for split in splits:
            for example in read_split(folder / f"{split}.jsonl", tokenizer):
                for changed in change(example, tokenizer):
                    add(split, changed)
    write_whole(stamp, made_of)
