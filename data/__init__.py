"""What every data set shares: examples, their files, and the check that writes them.

A data set is a folder with a prepare.py that writes train.jsonl, val.jsonl, test.jsonl (one example a
line: prompt, tagged answer, family) and tokenizer.json.
"""

import json
from dataclasses import dataclass, replace
from pathlib import Path

from files import write_whole
from tags import Round, TagError, format_answer, parse_answer, pieces
from tokenizer import Tokenizer


@dataclass(frozen=True)
class Example:
    """A prompt and its answer (rounds of text and spans); `family` names the kind of task."""

    prompt: str
    rounds: tuple[Round, ...]
    family: str = ""


def write_dataset(folder, splits, vocab_size, unit):
    """Train the tokenizer on the train split, fill in span lengths, write all files, report sizes.

    `splits`: name -> list of Example. `unit`: tokens a unit of planned length. Files are written
    whole or not at all.
    """
    texts = (text for e in splits["train"] for text in [e.prompt, *pieces(e.rounds), *_topics(e)])
    tokenizer = Tokenizer.train(texts, vocab_size, unit)
    folder = Path(folder)
    print(f"{'split':8}{'examples':>9}{'prompt':>8}{'plan':>8}{'answer':>8}{'pads':>8}   (mean tokens; share of slots)")
    for name, examples in splits.items():
        examples = [_with_lengths(example, tokenizer) for example in examples]
        lines = [json.dumps({"prompt": e.prompt, "answer": format_answer(e.rounds), "family": e.family},
                            ensure_ascii=False) for e in examples]  # fmt: skip
        write_whole(folder / f"{name}.jsonl", "".join(line + "\n" for line in lines))
        print(_sizes(name, examples, tokenizer))
    write_whole(folder / "tokenizer.json", tokenizer.to_json())
    print(f"{tokenizer.vocab_size} tokens in {folder / 'tokenizer.json'}")


def _topics(example):
    return [span.topic for round_ in example.rounds for span in round_.spans]


def _with_lengths(example, tokenizer):
    def known(span):
        tokenizer.length_id(length := tokenizer.units(span.text))  # raises ValueError for too long a span
        return replace(span, length=length)

    return replace(example, rounds=tuple(replace(r, spans=tuple(map(known, r.spans))) for r in example.rounds))


def _sizes(name, examples, tokenizer):
    """One line of the report: means over the examples of a split."""
    n, prompt, plan, answer, slots, filled = max(len(examples), 1), 0, 0, 0, 0, 0
    for example in examples:
        prompt += len(tokenizer.encode(example.prompt))
        plan += sum(3 + len(tokenizer.encode(topic)) for topic in _topics(example))
        answer += sum(len(tokenizer.encode(text)) for text in pieces(example.rounds))
        spans = [s for r in example.rounds for s in r.spans]
        slots += sum(s.length * tokenizer.unit for s in spans)
        filled += sum(len(tokenizer.encode(s.text)) for s in spans)
    means = "".join(f"{total / n:8.1f}" for total in (prompt, plan, answer))
    return f"{name:8}{len(examples):9}{means}{1 - filled / max(slots, 1):8.1%}"


def read_split(path):
    """Examples of a .jsonl file. Raises ValueError that names file and line of what is wrong."""
    path = Path(path)
    if not path.exists():
        raise ValueError(f"{path} does not exist: run `python {path.parent / 'prepare.py'}` first")
    examples = []
    for number, line in enumerate(path.read_bytes().splitlines(), 1):  # bytes: a text may hold other line breaks
        try:
            row = json.loads(line.decode())
            rounds = tuple(parse_answer(row["answer"]))
            if not isinstance(row["prompt"], str):
                raise TypeError
            examples.append(Example(row["prompt"], rounds, str(row.get("family", ""))))
        except (UnicodeDecodeError, json.JSONDecodeError, TagError) as error:
            raise ValueError(f"{path}, line {number}: {error}") from None
        except (KeyError, TypeError, AttributeError):
            raise ValueError(f"{path}, line {number}: expected an object with 'prompt' and 'answer' texts") from None
    return examples
