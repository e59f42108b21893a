"""What every data set shares: examples, their files, and the check that writes them.

A data set is a folder with train.jsonl, val.jsonl and test.jsonl (one example per line: prompt, tagged answer,
family) and tokenizer.json, written by a prepare.py of its own. data/README.md says how to make one.
"""

import json
import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from plumbing.files import atomic
from tags import Round, Span, format_answer, parse_answer, pieces
from tokenizer import Tokenizer, check_length


@dataclass(frozen=True)
class Example:
    """A prompt and its answer (rounds of text and spans); `family` names the kind of task."""

    prompt: str
    rounds: tuple[Round, ...]
    family: str = ""


# ---------------------------------------------------------------- writing


def write_dataset(folder: str | Path, splits: dict[str, list[Example]], vocab_size: int, unit: int) -> None:
    """Train the tokenizer on the train split, fill in span lengths, write all files, report sizes.

    `splits`: name -> examples, `train` among them. `unit`: tokens per unit of planned length.
    Raises ValueError, naming split, prompt and topic, for what could not be read back or trained; then nothing has
    been written. Each file appears whole or not at all.
    """
    _check_splits(splits)
    texts = (text for e in splits["train"] for text in [e.prompt, *pieces(e.rounds), *(s.topic for s in _spans(e))])
    tokenizer = Tokenizer.train(texts, vocab_size, unit)
    files = {}
    print(f"{'split':8}{'examples':>9}{'prompt':>8}{'plan':>8}{'answer':>8}{'pads':>8}   (mean tokens; share of slots)")
    for split, examples in splits.items():
        planned = []
        for example in examples:
            with _naming(split, example):
                planned.append(_with_lengths(example, tokenizer))
        files[f"{split}.jsonl"] = "".join(map(_line, planned))
        print(_sizes(split, planned, tokenizer))
    files["tokenizer.json"] = tokenizer.to_json()
    with ExitStack() as stack:  # the disk has to hold all of them before the first replaces an old one
        for name, text in files.items():
            stack.enter_context(atomic(Path(folder) / name)).write_bytes(text.encode())
    print(f"{tokenizer.vocab_size} tokens in {Path(folder) / 'tokenizer.json'}")


def _check_splits(splits: dict[str, list[Example]]) -> None:
    """Raise ValueError for what is no split or no example, before any of it is used."""
    if not splits.get("train"):
        raise ValueError("expected a split 'train' with examples, from which the tokenizer is trained")
    for split, examples in splits.items():
        if not re.fullmatch(r"[\w-]+", split):
            raise ValueError(f"split {split!r}: expected a name of letters, digits, '-' and '_'")
        for example in examples:
            with _naming(split, example):
                _check_texts(example)


def _check_texts(example: Example) -> None:
    def several(values: object, kind: type) -> bool:  # an iterator would be empty when it is read again
        return isinstance(values, (tuple, list)) and all(isinstance(value, kind) for value in values)

    rounds = example.rounds if isinstance(example, Example) else None
    if not several(rounds, Round) or not rounds or not all(several(r.spans, Span) for r in rounds):
        raise ValueError("expected an Example with a tuple of one or more Rounds, each with a tuple of Spans")
    topics = [span.topic for span in _spans(example)]
    for text in [
        example.prompt,
        example.family,
        *(r.text for r in rounds),
        *topics,
        *(s.text for s in _spans(example)),
    ]:
        if not isinstance(text, str):
            raise ValueError(f"expected a text, found {text!r:.60}")
        text.encode()  # half a surrogate pair is no character: UnicodeEncodeError, which is a ValueError
    if not all(topic.strip() for topic in topics):
        raise ValueError("expected a name for each topic, found a blank one")


@contextmanager
def _naming(split: str, example: Example) -> Iterator[None]:
    """Say of any ValueError which example it is about."""
    try:
        yield
    except ValueError as error:
        prompt = str(getattr(example, "prompt", example))[:60]
        raise ValueError(f"split {split!r}, prompt {prompt!r}: {error}") from None


def _spans(example: Example) -> list[Span]:
    return [span for round_ in example.rounds for span in round_.spans]


def _with_lengths(example: Example, tokenizer: Tokenizer) -> Example:
    """The example with the planned length of each span. Raises ValueError for a span that no plan can ask for."""

    def planned(span: Span) -> Span:
        span = replace(span, length=tokenizer.units(span.text))
        tokenizer.encode_span(span)
        return span

    return replace(example, rounds=tuple(replace(r, spans=tuple(map(planned, r.spans))) for r in example.rounds))


def _line(example: Example) -> str:
    row = {"prompt": example.prompt, "answer": format_answer(example.rounds), "family": example.family}
    return json.dumps(row, ensure_ascii=False) + "\n"


def _sizes(split: str, examples: list[Example], tokenizer: Tokenizer) -> str:
    """One line of the report: means over the examples of a split."""
    n, prompt, plan, answer, slots, filled = max(len(examples), 1), 0, 0, 0, 0, 0
    for example in examples:
        spans = _spans(example)
        prompt += len(tokenizer.encode(example.prompt))
        plan += sum(3 + len(tokenizer.encode(s.topic)) for s in spans)
        answer += sum(len(tokenizer.encode(text)) for text in pieces(example.rounds))
        slots += sum(s.length * tokenizer.unit for s in spans)
        filled += sum(len(tokenizer.encode(s.text)) for s in spans)
    means = "".join(f"{total / n:8.1f}" for total in (prompt, plan, answer))
    return f"{split:8}{len(examples):9}{means}{1 - filled / max(slots, 1):8.1%}"


# ---------------------------------------------------------------- reading


def read_split(path: str | Path) -> list[Example]:
    """Examples of a .jsonl file. Raises ValueError that names file and line of what is wrong."""
    path, examples = Path(path), []
    if not path.exists():
        raise ValueError(f"{path} does not exist: `python {path.parent / 'prepare.py'}` writes it, or, for data of "
                         "your own, a script as in data/README.md")  # fmt: skip
    for number, line in enumerate(path.read_bytes().splitlines(), 1):  # bytes: a text may hold other line breaks
        try:
            examples.append(_read_line(line))
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: {error}") from None
        except RecursionError:
            raise ValueError(f"{path}, line {number}: JSON nested too deeply") from None
    return examples


def _read_line(line: bytes) -> Example:
    row = json.loads(line.decode())
    texts = (row.get("prompt"), row.get("answer"), row.get("family", "")) if isinstance(row, dict) else (None,)
    if not all(isinstance(text, str) for text in texts):
        raise ValueError("expected an object with 'prompt' and 'answer' texts, and perhaps a 'family' text")
    "".join(texts).encode()  # raises for half a surrogate pair, which JSON can escape
    prompt, answer, family = texts
    example = Example(prompt, tuple(parse_answer(answer)), family)
    for span in _spans(example):
        check_length(span.length)
    return example
