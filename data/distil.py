r"""Make a data set whose training answers are a model's own (distillation): then more of its drafts are right.

    python measure/eval.py --checkpoint checkpoints/recipes/joint.safetensors --decode parallel-ar --ahead 8 \
      --data data/recipes --split train --draws 1 --answers runs/own.jsonl
    python data/distil.py --data data/recipes --answers runs/own.jsonl --out runs/recipes-own

Real text could go on in many ways, and a model has to guess which; what it writes itself, greedily and left to right,
is easier to foresee (Kim and Rush, arXiv 1606.07947; for parallel decoding Gu et al., 1711.02281). Other splits and the
tokenizer stay as they are. Answers that were cut or broken are left out.
"""

import argparse
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from data import read_split, writing
from plumbing.files import refuse_overwriting
from plumbing.settings import add_settings, check, command, locate, pick, setting
from tags import Example, parse_answer
from tokenizer import Tokenizer


@dataclass
class DistilConfig:
    """A model's own answers as training data."""

    data: str = setting("data/recipes", "folder of the data set whose training prompts were answered")
    answers: str = setting("runs/own.jsonl", "answers to its training split, written by measure/eval.py --answers")
    out: str = setting("runs/recipes-own", "folder of the new data set")

    def __post_init__(self) -> None:
        check(self)


def answered(path: Path, examples: list[Example]) -> Iterator[Example]:
    """The examples with the model's answers, in the order of the file `path`; those cut or broken left out.

    Raises ValueError that names the line of what is no answer to one of the examples.
    """
    if not path.is_file():
        raise ValueError(f"--answers {path}: expected a file that measure/eval.py --answers has written")
    for number, row in enumerate(path.read_text(encoding="utf-8").splitlines()[1:], 2):  # the first holds settings
        try:
            i, result = json.loads(row)
            example, tagged = examples[i], result["tagged"]
            if result["prompt"] != example.prompt:
                raise ValueError("an answer to another prompt: of another split?")
            if not result["cut"] and not result["broken"]:
                yield Example(example.prompt, tuple(parse_answer(tagged)), example.family)
        except (ValueError, TypeError, KeyError, IndexError) as error:
            raise ValueError(f"--answers {path}, line {number}: expected an answer of measure/eval.py --split train: "
                             f"{error}") from None  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add_settings(parser, DistilConfig)
    config = pick(DistilConfig, parser.parse_args())
    folder = locate(config.data)
    refuse_overwriting([folder / "train.jsonl", config.answers], out=config.out)
    splits = {split: read_split(folder / f"{split}.jsonl") for split in ("train", "val", "test")}
    own = list(answered(Path(config.answers), splits["train"]))
    planned = sum(any(round_.spans for round_ in example.rounds) for example in own)
    print(f"{len(own)} of {len(splits['train'])} training prompts have a whole answer, {planned} of these a plan")
    with writing(config.out, list(splits), Tokenizer.load(folder / "tokenizer.json")) as add:
        for split, examples in (splits | {"train": own}).items():
            for example in examples:
                add(split, example)


if __name__ == "__main__":
    command(main)
