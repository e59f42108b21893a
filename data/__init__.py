"""What every data set shares: examples, their files, and the check that writes them.

A data set is a folder with train.jsonl, val.jsonl and test.jsonl (one example per line: prompt, tagged answer,
family) and tokenizer.json, written by a prepare.py of its own. data/README.md says how to make one.
"""

import json
import re
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from pathlib import Path

from plumbing.files import atomic
from tags import Example, Round, Span, format_answer, parse_answer, pieces
from tokenizer import Tokenizer, check_length

# ---------------------------------------------------------------- writing


def write_dataset(folder: str | Path, splits: dict[str, list[Example]], vocab_size: int, unit: int) -> None:
    """Train the tokenizer on the train split, fill in span lengths, write all files, report sizes.

    `splits`: name -> examples, `train` among them. `unit`: tokens per unit of planned length.
    Raises ValueError, naming split, prompt and topic, for what could not be read back or trained; then nothing has
    been written. Each file appears whole or not at all.
    """
    _check_splits(splits)
    train = _telling("read for the tokenizer", splits["train"])
    texts = (text for e in train for text in [e.prompt, *pieces(e.rounds), *(s.topic for s in _spans(e))])
    with writing(folder, list(splits), Tokenizer.train(texts, vocab_size, unit)) as add:
        for split, examples in splits.items():
            for example in _telling(f"wrote for {split}", examples):
                add(split, example)


@contextmanager
def writing(folder: str | Path, splits: list[str], tokenizer: Tokenizer) -> Iterator[Callable[[str, Example], None]]:
    """Write a data set example by example, in memory that does not grow with it: yields `add(split, example)`.

    It fills in span lengths and raises what `write_dataset` raises. All files appear when the block ends, or none.
    """
    names = {split: Path(folder) / f"{split}.jsonl" for split in splits}
    sizes = {split: _Sizes() for split in splits}
    with ExitStack() as stack:  # the disk has to hold all files before the first replaces an old one
        stack.enter_context(_new_folder_only_if_written(Path(folder)))
        files = {split: stack.enter_context(atomic(path)).open("wb") for split, path in names.items()}
        written = stack.enter_context(atomic(Path(folder) / "tokenizer.json"))
        stack.callback(lambda: [file.close() for file in files.values()])  # before they replace others, error or not

        def add(split: str, example: Example) -> None:
            with _naming(split, example):
                _check_texts(example)
                example = _with_lengths(example, tokenizer)
                files[split].write(_line(example).encode())
            sizes[split].add(example, tokenizer)

        yield add
        if not sizes["train"].examples:
            raise ValueError(f"{folder} is not written: no example is left for the split 'train'")
        written.write_bytes(tokenizer.to_json().encode())
    print(f"{'split':8}{'examples':>9}{'prompt':>8}{'plan':>8}{'answer':>8}{'pads':>8}  (mean tokens; share of slots)")
    print(*(f"{split:8}{size.row()}\n" for split, size in sizes.items()), sep="", end="")
    print(f"{tokenizer.vocab_size} tokens in {Path(folder) / 'tokenizer.json'}")


@contextmanager
def _new_folder_only_if_written(folder: Path) -> Iterator[None]:
    """Remove a folder that the block made if the block fails and leaves nothing in it."""
    new = not folder.exists()
    try:
        yield
    except BaseException:
        if new:
            with suppress(OSError):
                folder.rmdir()
        raise


def _telling(done: str, examples: list[Example]) -> Iterator[Example]:
    """The examples; on the way it prints every two seconds how many are done."""
    told = time.monotonic()
    for n, example in enumerate(examples, 1):
        yield example
        if time.monotonic() - told > 2:
            told = time.monotonic()
            print(f"{done}: {n:,} of {len(examples):,} examples", flush=True)


def _check_splits(splits: dict[str, list[Example]]) -> None:
    """Raise ValueError for what is no split or no example, before any of it is used."""
    if not splits.get("train"):
        raise ValueError("expected a split 'train' with examples, from which the tokenizer is trained")
    for split, examples in splits.items():
        if not re.fullmatch(r"[\w-]+", split):
            raise ValueError(f"split {split!r}: expected a name of letters, digits, '-' and '_'")
        for example in _telling(f"checked for {split}", examples):
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
    row |= {"gaps": example.gaps} if example.gaps else {}
    return json.dumps(row, ensure_ascii=False) + "\n"


class _Sizes:
    """What the report says of a split: how many examples, and means over them."""

    def __init__(self):
        self.examples = self.prompt = self.plan = self.answer = self.slots = self.filled = 0

    def add(self, example: Example, tokenizer: Tokenizer) -> None:
        count, spans = lambda text: len(tokenizer.encode(text)), _spans(example)
        self.examples += 1
        self.prompt += count(example.prompt)
        self.plan += sum(3 + count(s.topic) for s in spans)
        self.answer += sum(map(count, pieces(example.rounds)))
        self.slots += sum(s.length * tokenizer.unit for s in spans)
        self.filled += sum(count(s.text) for s in spans)

    def row(self) -> str:
        means = (total / max(self.examples, 1) for total in (self.prompt, self.plan, self.answer))
        pads = 1 - self.filled / self.slots if self.slots else 0
        return f"{self.examples:9}{''.join(f'{mean:8.1f}' for mean in means)}{pads:8.1%}"


# ---------------------------------------------------------------- reading


def read_split(path: str | Path, tokenizer: Tokenizer | None = None) -> list[Example]:
    """Examples of a .jsonl file. Raises ValueError that names file and line of what is wrong.

    With a `tokenizer` each span has to fit its planned length. For another one than that of the data set, such as a
    pretrained model's, lengths are counted anew.
    """
    path, examples = Path(path), []
    if not path.exists():
        raise ValueError(f"{path} does not exist: {advice(path)}")
    own = path.with_name("tokenizer.json")
    anew = tokenizer and own.exists() and own.read_text(encoding="utf-8") != tokenizer.to_json()
    for number, line in enumerate(path.read_bytes().splitlines(), 1):  # bytes: a text may hold other line breaks
        try:
            example = _read_line(line)
            examples.append(_with_lengths(example, tokenizer) if anew else example)
            for span in _spans(examples[-1]) if tokenizer else ():
                tokenizer.encode_span(span)  # raises if no plan can ask for it
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: {error}") from None
        except RecursionError:
            raise ValueError(f"{path}, line {number}: JSON nested too deeply") from None
    return examples


def advice(missing: Path) -> str:
    """What to do about a split that is not there."""
    others, script = sorted(path.stem for path in missing.parent.glob("*.jsonl")), missing.with_name("prepare.py")
    if others:
        return f"there are {', '.join(others)}"
    if not missing.parent.exists():
        beside = sorted(path.parent.name for path in missing.parent.parent.glob("*/tokenizer.json"))
        return f"there is no folder {missing.parent}; data sets beside it: {', '.join(beside) or 'none'}"
    return f"`python {script}` writes it" if script.exists() else "a script as in data/README.md writes it"


def _read_line(line: bytes) -> Example:
    row = json.loads(line.decode())
    texts = (row.get("prompt"), row.get("answer"), row.get("family", "")) if isinstance(row, dict) else (None,)
    if not all(isinstance(text, str) for text in texts):
        raise ValueError("expected an object with 'prompt' and 'answer' texts, and perhaps a 'family' text")
    gaps = row.get("gaps", [])
    if not isinstance(gaps, list) or not all(isinstance(gap, str) for gap in gaps):
        raise ValueError("expected a list of texts in 'gaps'")
    "".join([*texts, *gaps]).encode()  # raises for half a surrogate pair, which JSON can escape
    prompt, answer, family = texts
    example = Example(prompt, tuple(parse_answer(answer)), family, tuple(gaps))
    for span in _spans(example):
        check_length(span.length)
    return example
