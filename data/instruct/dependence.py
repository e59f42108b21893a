"""Whether spans are as independent as their plan claims, measured with an autoregressive model.

The model writes each span twice, given prompt and plan: with the spans before it in its round, and without. By the
chain rule the differences sum to the total correlation of a round's spans: what no planned model can know, whatever its
size. Above a threshold a span is merged with the one before it or waits for a later round.

    python data/instruct/dependence.py data/mine --questions runs/check-data      1. a data set of such questions
    python train.py --method ar --data runs/check-data --out runs/check           2. a model that answers them
    python data/instruct/dependence.py data/mine --model runs/check/model.safetensors --out data/mine-checked      3.
"""

import argparse
import random
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
import torch
import torch.nn.functional as F

from data import read_split, writing
from data.instruct.annotate import as_text, objection
from data.instruct.plans import build, cuts_of, restore
from masks import encode_example
from methods import trained_by
from model import Transformer
from noise import IGNORE, Sequence, make_batch
from plumbing import device as devices
from plumbing.files import refuse_overwriting
from plumbing.settings import Help, add_settings, check, command, locate, one_line, pick, setting
from tags import Example, Round
from tokenizer import Tokenizer
from training.checkpoint import load_checkpoint

SPLITS = ("train", "val", "test")
LATER = "(text of a later round)"  # a control: it should depend on the spans before it


@dataclass
class DependenceConfig:
    """Dependence."""

    questions: str = setting("", "folder to write the data set of questions to, for which a model is trained")
    model: str = setting("", "autoregressive checkpoint trained on those questions")
    out: str = setting("", "folder to write the data set to with plans revised")
    threshold: float = setting(0.2, "most nats per token that a span may gain from the spans before it", at_least=0)
    split: str = setting("val", "split of the table", among=SPLITS)
    limit: int = setting(0, "only the first so many examples of the split (0: all)", at_least=0)
    batch: int = setting(16, "questions computed together", at_least=1)
    seed: int = setting(0, "decides which questions show the other spans, where half of them do")
    device: str = setting("auto", f"where to compute: {', '.join(devices.CHOICES)}")

    def __post_init__(self):
        check(self)
        if not self.questions and not self.model:
            raise ValueError("expected --questions FOLDER or --model CHECKPOINT")
        if self.questions and (self.model or self.out):
            raise ValueError("--questions: expected neither --model nor --out beside it; the model is trained on them")


# ---------------------------------------------------------------- questions


@dataclass(frozen=True)
class Piece:
    """A piece whose dependence is asked for: entry `number` of the example's pieces, and what is known beside it."""

    number: int
    topic: str
    text: str
    plan: str  # topics and lengths of its round
    given: tuple[str, ...]  # pieces before it that it may see in any case
    others: tuple[str, ...]  # those that its plan says it does not need


def asked(example: Example) -> Iterator[Piece]:
    """All spans, and the first text after spans, which is a control: others are the spans of the round before."""
    number, given, before = 0, [], []
    for round_ in example.rounds:
        if round_.text:
            if before:
                yield Piece(number, LATER, round_.text, "", tuple(given[: -len(before)]), tuple(before))
            given.append(round_.text)
            number += 1
        plan, spans = ", ".join(f"{span.topic} {span.length}" for span in round_.spans), []
        for span in round_.spans:
            if span.text:
                yield Piece(number, span.topic, span.text, plan, tuple(given), tuple(spans))
                spans.append(f"{span.topic}: {span.text}")
                number += 1
        given, before = given + spans, spans


def question(prompt: str, piece: Piece, others: tuple[str, ...]) -> Example:
    """The example that asks for a piece as plain text, given prompt, plan, and some other pieces."""
    known = "\n".join([*piece.given, *others])
    return Example(f"{prompt}\nPlan: {piece.plan}\n{known}\nWrite: {piece.topic}", (Round(piece.text),))


def write_questions(data: Path, config: DependenceConfig) -> None:
    """A data set of questions, half of which show the other pieces, with the tokenizer of the data set."""
    rng = random.Random(config.seed)
    with writing(config.questions, list(SPLITS), Tokenizer.load(data / "tokenizer.json")) as add:
        for split in SPLITS:
            for example in read_split(data / f"{split}.jsonl"):
                for piece in asked(example):
                    add(split, question(example.prompt, piece, piece.others if rng.random() < 0.5 else ()))


# ---------------------------------------------------------------- measuring


class Judge:
    """An autoregressive model that says how likely a text is."""

    def __init__(self, model: Transformer, tokenizer: Tokenizer, batch: int):
        self.model, self.tokenizer, self.batch = model.eval(), tokenizer, batch
        self.device = model.embedding.weight.device

    @torch.inference_mode()
    def nats(self, examples: list[Example]) -> list[float]:
        """Negative log-likelihood per token, `<eos>` included, of the answers of plain text, given their prompts."""
        sequences = [Sequence(encode_example(example, self.tokenizer)) for example in examples]
        order = sorted(range(len(sequences)), key=lambda i: len(sequences[i].token))
        found = [0.0] * len(sequences)
        for start in range(0, len(order), self.batch):
            rows = order[start : start + self.batch]
            batch = make_batch([sequences[i] for i in rows], [0] * len(rows), self.tokenizer, np.random.default_rng(0))
            batch = batch.to(self.device)
            logits = self.model.logits(self.model(batch.token, batch.position, batch.ranges)).float()  # (B, T, V)
            loss = F.cross_entropy(logits.flatten(0, 1), batch.target.flatten(), ignore_index=IGNORE, reduction="none")
            sums = loss.view(batch.target.shape).sum(1) / (batch.target != IGNORE).sum(1)
            for row, value in zip(rows, sums.tolist()):
                found[row] = value
        return found


@dataclass
class Gain:
    """What a piece gains, in nats per token, from the others before it, and from the nearest of them alone."""

    piece: Piece
    without: float
    all: float
    nearest: float


def gains(examples: list[Example], judge: Judge) -> list[list[Gain]]:
    """For each example the gains of the pieces that have others before them."""
    pieces = [(e.prompt, piece, n) for n, e in enumerate(examples) for piece in asked(e) if piece.others]
    views = [lambda piece: (), lambda piece: piece.others, lambda piece: piece.others[-1:]]
    nats = [judge.nats([question(prompt, piece, view(piece)) for prompt, piece, _ in pieces]) for view in views]
    found = [[] for _ in examples]
    for (_, piece, n), without, with_all, with_nearest in zip(pieces, *nats):
        found[n].append(Gain(piece, without, without - with_all, without - with_nearest))
    return found


def table(found: list[list[Gain]], threshold: float, most: int = 12) -> Iterator[str]:
    """Mean gains by topic, the most frequent first, those of other topics together."""
    by_topic = defaultdict(list)
    counts = Counter(gain.piece.topic for own in found for gain in own)
    frequent = {topic for topic, _ in counts.most_common(most)}
    for gain in (gain for own in found for gain in own):
        by_topic[gain.piece.topic if gain.piece.topic in frequent else "(others)"].append(gain)
    yield f"{'topic':26}{'n':>7}{'alone':>9}{'gain':>9}{'nearest':>9}{f'> {threshold:g}':>9}   (nats per token)"
    for topic, own in sorted(by_topic.items(), key=lambda pair: -len(pair[1])):
        alone, gain, nearest = (np.mean([getattr(g, name) for g in own]) for name in ("without", "all", "nearest"))
        above = np.mean([g.all > threshold for g in own])
        yield f"{one_line(topic)[:25]:26}{len(own):7,}{alone:9.3f}{gain:9.3f}{nearest:9.3f}{above:9.0%}"


# ---------------------------------------------------------------- revising plans


def revised(example: Example, found: list[Gain], threshold: float, tokenizer: Tokenizer) -> tuple[Example, str]:
    """The example with no span that gains more than `threshold` from the spans before it, and what was done.

    A span that gains most of it from the nearest is merged with that; else it and what follows wait for a new round.
    """
    text, cuts, done = restore(example.rounds, example.gaps), cuts_of(example.rounds, example.gaps), "kept"
    for gain in found:
        if gain.all > threshold and gain.piece.topic != LATER:
            merge = gain.nearest >= 0.8 * gain.all
            cuts[gain.piece.number] = None if merge else replace(cuts[gain.piece.number], sync=True)
            done = "merged" if merge and done != "later" else "later"
    if done == "kept":
        return example, done
    rounds, gaps = build(text, without_lone([cut for cut in cuts if cut]))
    if objection(rounds, tokenizer):
        plain = as_text(text, "")
        rounds, gaps, done = plain.rounds, plain.gaps, "now plain text"
    return replace(example, rounds=rounds, gaps=gaps), done


def without_lone(cuts: list) -> list:
    """The cuts with spans that are alone in their round made text, joined to the text before them in it."""
    kept = []
    for i, cut in enumerate(cuts):
        after = cuts[i + 1] if i + 1 < len(cuts) else None
        first = cut.topic is not None and (not i or cut.sync or cuts[i - 1].topic is None)
        if first and (after is None or after.topic is None or after.sync):
            if i and not cut.sync:
                continue
            cut = replace(cut, topic=None)
        kept.append(cut)
    return kept


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=Help)
    parser.add_argument("data", help="folder of a data set")
    add_settings(parser, DependenceConfig)
    args = parser.parse_args()
    config, data = pick(DependenceConfig, args), locate(args.data)
    refuse_overwriting([data / "train.jsonl"], questions=config.questions, out=config.out)
    if config.questions:
        write_questions(data, config)
        return
    model, tokenizer, info, _ = load_checkpoint(locate(config.model), devices.find(config.device))
    devices.use_threads(model.n_params())
    same = tokenizer.tokens == Tokenizer.load(data / "tokenizer.json").tokens
    if not same or trained_by(info, config.model).plan != "none":
        raise ValueError(f"--model {config.model}: expected a model trained with --method ar on what --questions wrote")
    judge = Judge(model, tokenizer, config.batch)
    examples = read_split(data / f"{config.split}.jsonl")[: config.limit or None]
    print(*table(gains(examples, judge), config.threshold), sep="\n")
    if config.out:
        tokenizer, done = Tokenizer.load(data / "tokenizer.json"), Counter()
        with writing(config.out, list(SPLITS), tokenizer) as add:
            for split in SPLITS:
                examples = read_split(data / f"{split}.jsonl")
                for start in range(0, len(examples), 256):
                    part = examples[start : start + 256]
                    for example, found in zip(part, gains(part, judge)):
                        example, what = revised(example, found, config.threshold, tokenizer)
                        done[what] += 1
                        add(split, example)
        print("plans: " + ", ".join(f"{n:,} {what}" for what, n in done.most_common()))


if __name__ == "__main__":
    command(main)
