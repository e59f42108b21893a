"""Instruction data as planned answers: a data set for train.py from files as people have them.

    python data/instruct/prepare.py alpaca.json --out data/mine
    python data/instruct/prepare.py a.jsonl b.csv --out data/mine --show 20

The first reading counts, and trains the tokenizer on a sample; the second annotates and writes. Memory does not grow
with the files. docs/your-own-data.md leads from here to a trained model.
"""

import argparse
import hashlib
import io
import json
import random
import re
import sys
import time
from bisect import insort
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from data import writing
from data.instruct.annotate import Annotation, annotate, objection, unaskable
from data.instruct.forms import FORMS, Bad, Record, answers
from data.instruct.plans import Annotations, build, restore
from data.instruct.show import shown
from plumbing.files import atomic, refuse_overwriting
from plumbing.settings import Help, add_settings, check, command, locate, one_line, pick, setting
from pretrained.tokens import read
from tags import Example, plain_text
from tokenizer import Tokenizer

PROMPT = Path(__file__).with_name("prompt.md")


@dataclass
class PrepareConfig:
    """Preparing."""

    out: str = setting("", "folder for train, val, test and tokenizer; empty: only read and report")
    form: str = setting("", "form of the records, if their fields do not tell", among=("", *FORMS))
    annotations: str = setting("", "file (.jsonl) of plans made elsewhere, used where they fit (prompt.md)")
    requests: str = setting("", "file (.jsonl) to write what to ask a large model for such plans")
    tokenizer: str = setting("", "what to use: tokenizer.json of an earlier data set, or folder of a pretrained model; "
                                 "empty: train one")  # fmt: skip
    show: int = setting(0, "print the first so many examples, cut or not, and which rule decided", at_least=0)
    max_bad: int = setting(100, "most records that may be unusable", at_least=0)
    max_tokens: int = setting(1024, "leave out records with more tokens of prompt and answer", at_least=1)
    val: int = setting(200, "prompts for validation, at most about a tenth of all", at_least=1)
    test: int = setting(200, "prompts for the test, at most about a tenth of all", at_least=1)
    sample: int = setting(20_000, "records that the tokenizer is trained on, drawn at random", at_least=1)
    vocab_size: int = setting(4096, "tokens in the tokenizer", at_least=330)
    unit: int = setting(10, "tokens in one unit of planned length", at_least=1)
    seed: int = setting(0, "decides which prompts are held out")

    def __post_init__(self):
        check(self)


class Progress:
    """One line on stderr that is rewritten once per second, for files that take longer; in a log a line per minute."""

    def __init__(self, doing: str):
        self.doing, self.count, self.start = doing, 0, time.monotonic()
        self.last, self.live = self.start, sys.stderr.isatty()

    def step(self, share: float) -> None:
        self.count, now = self.count + 1, time.monotonic()
        if now - self.last > (1 if self.live else 60):
            self.last, passed = now, now - self.start
            left = passed * (1 - share) / max(share, 1e-9)
            line = f"{self.doing}: {self.count:,} records, {share:4.0%} of the file, {self.count / passed:,.0f} per second, "
            line += f"{left:.0f} s left"
            print(f"\r{line}   " if self.live else line, end="" if self.live else "\n", file=sys.stderr, flush=True)

    def done(self) -> None:
        if self.live and self.last > self.start:
            print(file=sys.stderr)


def digest(record: Record, seed: int) -> int:
    """A number of the prompt (of a conversation: its first) that decides its split, the same on every machine."""
    return int.from_bytes(hashlib.sha256(f"{seed} {record.group}".encode()).digest()[:8], "big")


# ---------------------------------------------------------------- first reading


class Survey:
    """What the first reading finds: how many records there are, a sample of them, and which prompts are held out."""

    def __init__(self, paths: list[Path], config: PrepareConfig):
        self.good, self.bad, self.sample = 0, 0, []
        rng, progress, lowest = random.Random(config.seed), Progress("reading"), []
        for record in answers(paths, config.form):
            progress.step(record.share)
            if isinstance(record, Bad):
                self.count_bad(record, config.max_bad)
                continue
            self.good += 1
            if len(self.sample) < config.sample:  # reservoir sampling: each record with the same probability
                self.sample.append(record)
            elif (at := rng.randrange(self.good)) < config.sample:
                self.sample[at] = record
            number = digest(record, config.seed)
            if (len(lowest) < config.val + config.test or number < lowest[-1]) and number not in lowest:
                insort(lowest, number)
                del lowest[config.val + config.test :]
        progress.done()
        if not self.good:
            raise ValueError(f"{', '.join(map(str, paths))}: no record that can be used")
        full = len(lowest) == config.val + config.test  # then how dense the lowest are says how many prompts there are
        tenth = max(1, (int(len(lowest) * 2**64 / (lowest[-1] + 1)) if full else len(lowest)) // 10)
        self.test = {*lowest[: min(config.test, tenth)]}
        self.val = {*lowest[len(self.test) : len(self.test) + min(config.val, tenth)]}

    def count_bad(self, record: Bad, most: int) -> None:
        """Name the first bad records. Raises ValueError if there are too many."""
        named, self.bad = one_line(f"{record.place}: {record.reason}"), self.bad + record.lost
        if self.bad > most:
            raise ValueError(f"{named} (more than --max_bad {most} records cannot be used)")
        if self.bad - record.lost < 10:
            print(named, file=sys.stderr)

    def split(self, number: int) -> str:
        return "test" if number in self.test else "val" if number in self.val else "train"

    def tokenizer(self, config: PrepareConfig) -> Tokenizer:
        """Trained on the sample without what it will find too long: without all that looks so, then on what it keeps."""

        def trained(kept: list[Record]) -> Tokenizer:
            texts = (text for r in kept for text in (r.prompt, plain_text(r.rounds) or r.answer))
            return Tokenizer.train(texts, config.vocab_size, config.unit)

        short = [r for r in self.sample if len(r.prompt + r.answer) <= LIKELY * config.max_tokens]
        tokenizer = trained(short)
        kept = [r for r in self.sample if tokens_of(r, tokenizer) <= config.max_tokens]
        return tokenizer if kept == short else trained(kept)


LIKELY = 16  # characters per token: a text with more is rarely one that fits


def tokens_of(record: Record, tokenizer: Tokenizer) -> int:
    """Tokens of prompt and answer."""
    return len(tokenizer.encode(record.prompt)) + len(tokenizer.encode(record.answer))


# ---------------------------------------------------------------- second reading


class Decider:
    """Decides what becomes of each record, and counts."""

    def __init__(self, config: PrepareConfig, tokenizer: Tokenizer):
        self.config, self.tokenizer, self.number = config, tokenizer, 0
        self.annotations = Annotations(config.annotations) if config.annotations else None
        self.answers, self.spans, self.ignored = Counter(), Counter(), Counter()  # by decision; by field

    def decide(self, record: Record) -> tuple[Annotation | None, str]:
        """The answer with its plan, None if the record is left out; and what was wrong with it or its plan, or ""."""
        self.number += 1
        self.ignored.update(record.ignored)
        annotation, complaint = None, f"longer than {self.config.max_tokens} tokens"
        if tokens_of(record, self.tokenizer) <= self.config.max_tokens:
            annotation, complaint = self.plan(record)
        if annotation is None:
            self.answers[f"left out: {re.sub('.*: ', '', one_line(complaint))}"] += 1
            return None, complaint
        self.answers[annotation.decision] += 1
        self.spans[annotation.decision] += sum(len(round_.spans) for round_ in annotation.rounds)
        return annotation, complaint

    def plan(self, record: Record) -> tuple[Annotation | None, str]:
        """The plan that the record brings, that was made elsewhere, or that the rules make."""
        if record.rounds:
            why = unaskable(record.rounds, self.tokenizer)
            return (None, why) if why else (Annotation(record.rounds, (), "tagged"), "")
        complaint = ""
        try:
            cuts = self.annotations and self.annotations.of(self.number, record.answer)
            if cuts:
                rounds, gaps = build(record.answer, cuts)
                complaint = objection(rounds, self.tokenizer)
                if not complaint:
                    return Annotation(rounds, gaps, "annotations"), ""
        except ValueError as error:
            complaint = str(error)
        annotation = annotate(record.prompt, record.answer, self.tokenizer)
        return annotation, complaint and f"its annotation is not used: {complaint}"

    def table(self) -> str:
        """The decisions and how often each was taken, then the fields that were not read."""
        rows = [f"{'decision':52}{'answers':>9}{'spans':>9}"]
        rows += [f"{what:52}{n:9,}{self.spans[what] or '':>9}" for what, n in self.answers.most_common()]
        fields = ", ".join(f"{one_line(name)} ({n:,})" for name, n in self.ignored.most_common())
        return "\n".join([*rows, *([f"ignored fields: {fields}"] if fields else [])])


def example_of(record: Record, annotation: Annotation) -> Example:
    """What is written; the gaps only where line breaks between the pieces would give another text."""
    same = record.rounds or restore(annotation.rounds) == record.answer
    family = record.family or (annotation.decision if annotation.planned else "text")
    return Example(record.prompt, annotation.rounds, family, () if same else annotation.gaps)


def request(number: int, record: Record) -> str:
    """A line of --requests: what to ask a large model about this record."""
    fields = {"{record}": str(number), "{prompt}": record.prompt, "{answer}": record.answer}
    ask = PROMPT.read_text(encoding="utf-8").split("\n---\n\n", 1)[1]
    ask = re.sub("|".join(map(re.escape, fields)), lambda match: fields[match[0]], ask)  # not within what was filled in
    return json.dumps({"record": number, "request": ask}, ensure_ascii=False) + "\n"


def write(paths: list[Path], config: PrepareConfig, survey: Survey, tokenizer: Tokenizer) -> Decider:
    """The second reading: annotate all records, write what was asked for, print examples. Returns who decided."""
    decider, progress, left = Decider(config, tokenizer), Progress("annotating"), config.show
    with ExitStack() as stack:
        add = stack.enter_context(writing(config.out, ["train", "val", "test"], tokenizer)) if config.out else None
        rejected = stack.enter_context(appearing(config.out and Path(config.out) / "rejected.txt"))
        requests = stack.enter_context(appearing(config.requests))
        for record in answers(paths, config.form):
            progress.step(record.share)
            if isinstance(record, Bad):
                rejected.write(one_line(f"{record.place}: {record.reason}") + "\n")
                continue
            annotation, complaint = decider.decide(record)
            if complaint:
                rejected.write(one_line(f"{record.place}: {complaint}") + "\n")
            if annotation is None:
                continue
            if not record.rounds and config.requests:
                requests.write(request(decider.number, record))
            example = example_of(record, annotation)
            if add:
                add(survey.split(digest(record, config.seed)), example)
            if left:
                print(*shown(example, annotation.decision, sys.stdout.isatty()), sep="\n")
                left -= 1
        progress.done()
    return decider


@contextmanager
def appearing(path: str | Path) -> Iterator[IO]:
    """A text file that appears whole when the block ends; without a path what is written is dropped."""
    if not path:
        yield io.StringIO()
        return
    with atomic(path) as temporary, temporary.open("w", encoding="utf-8") as file:
        yield file


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=Help)
    parser.add_argument("files", nargs="+", type=Path, help=".json, .jsonl, .csv, .tsv or .parquet files")
    add_settings(parser, PrepareConfig)
    args = parser.parse_args()
    config = pick(PrepareConfig, args)
    read_too = [name for name in (config.annotations, config.tokenizer) if name]
    refuse_overwriting([*args.files, *read_too], out=config.out, requests=config.requests)
    if config.out and config.requests and Path(config.requests).resolve().parent == Path(config.out).resolve():
        raise ValueError(f"--requests {config.requests}: expected a file that is not in --out {config.out}")
    survey = Survey(args.files, config)
    if config.tokenizer:
        path = locate(config.tokenizer)
        tokenizer = read(path, config.unit)[0] if path.is_dir() else Tokenizer.load(path)
    else:
        tokenizer = survey.tokenizer(config)
    decider = write(args.files, config, survey, tokenizer)
    print(f"{survey.good:,} records, {survey.bad:,} more cannot be used", decider.table(), sep="\n")
    if config.annotations and (first := decider.annotations.unused()):
        raise ValueError(f"{config.annotations}: its lines from record {first} on are for no record")


if __name__ == "__main__":
    command(main)
