"""Write the data set of generated tasks: train, val and test examples and the tokenizer.

python data/tasks/prepare.py            # 20 seconds, no network
"""

import argparse
import random
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from data import write_dataset
from data.tasks.families import FAMILIES, TRAIN_SHARES, build_world
from plumbing.settings import add_settings, check, command, pick, setting
from tags import Example


@dataclass
class PrepareConfig:
    """The data set of generated tasks."""

    out: Path = setting(Path(__file__).parent, "folder for the .jsonl files and tokenizer.json")
    seed: int = setting(0, "fixes the world and every draw")
    train: int = setting(30000, "examples for training", at_least=1)
    val: int = setting(700, "examples for validation", at_least=0)
    test: int = setting(700, "examples for the final test", at_least=0)
    vocab_size: int = setting(2048, "entries of the tokenizer")
    unit: int = setting(10, "tokens per unit of a span's length")

    def __post_init__(self) -> None:
        check(self)


def draw(family: str, split: str, count: int, seed: int, owners: dict[str, str],
         families: dict[str, Callable] = FAMILIES) -> tuple[list[Example], Counter]:  # fmt: skip
    """Draw `count` examples of one of the families with new prompts, and count why others were dropped.

    `owners` says which split each known prompt belongs to; the prompts drawn here are added.
    Raises ValueError if the family has too few different prompts.
    """
    rng = random.Random(f"{family} {split} {seed}")  # a string seeds alike in every process
    world = build_world(seed, split)
    kept, dropped = [], Counter()
    while len(kept) < count:
        example = families[family](rng, world)
        if example.prompt not in owners:
            owners[example.prompt] = split
            kept.append(example)
            continue
        dropped["duplicate" if owners[example.prompt] == split else "other split"] += 1
        if dropped.total() > 10 * count:
            raise ValueError(
                f"{family}: found only {len(kept)} of {count} different prompts; ask for a smaller --{split}"
            )
    return kept, dropped


def make_splits(sizes: dict[str, int], seed: int, families: dict[str, Callable] = FAMILIES,
                train_shares: dict[str, float] = TRAIN_SHARES) -> dict[str, list[Example]]:  # fmt: skip
    """`train_shares` of the families in train, equal shares in val and test, shuffled; prints what was kept and dropped.

    The test split is drawn first, so that it stays the same whatever the size of train is.
    """
    owners, splits = {}, {}
    print(f"{'split':<8}{'family':<12}{'kept':>8}{'duplicate':>12}{'other split':>14}")
    for split in sorted(sizes, key=["test", "val", "train"].index):
        splits[split] = []
        shares = train_shares if split == "train" else dict.fromkeys(families, 1)
        for family in families:
            share = round(sizes[split] * shares[family] / sum(shares.values()))
            kept, dropped = draw(family, split, share, seed, owners, families)
            splits[split] += kept
            print(f"{split:<8}{family:<12}{share:>8}{dropped['duplicate']:>12}{dropped['other split']:>14}")
        random.Random(f"order {split} {seed}").shuffle(splits[split])
    return splits


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add_settings(parser, PrepareConfig)
    config = pick(PrepareConfig, parser.parse_args())
    splits = make_splits({"train": config.train, "val": config.val, "test": config.test}, config.seed)
    write_dataset(config.out, splits, config.vocab_size, config.unit)


if __name__ == "__main__":
    command(main)
