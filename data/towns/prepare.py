"""Write the small data set of invented towns: train, val and test examples and the tokenizer.

python data/towns/prepare.py            # 10 seconds, no network
"""

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from data import write_dataset
from data.tasks.prepare import make_splits
from data.towns.families import FAMILIES, TRAIN_SHARES
from plumbing.settings import add_settings, check, command, pick, setting


@dataclass
class PrepareConfig:
    """The data set of invented towns."""

    out: Path = setting(Path(__file__).parent, "folder for the .jsonl files and tokenizer.json")
    seed: int = setting(0, "fixes every draw")

    def __post_init__(self) -> None:
        check(self)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add_settings(parser, PrepareConfig)
    config = pick(PrepareConfig, parser.parse_args())
    splits = make_splits({"train": 15000, "val": 150, "test": 300}, config.seed, FAMILIES, TRAIN_SHARES)
    write_dataset(config.out, splits, 1024, 5)  # as many tokens as words and pieces of words need


if __name__ == "__main__":
    command(main)
