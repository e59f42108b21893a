"""Measure a checkpoint on a test split: quality, likelihoods, what an answer costs.

    python measure/eval.py --checkpoint checkpoints/tasks/planned.safetensors --data data/tasks
    python measure/eval.py --checkpoint checkpoints/recipes/planned.safetensors --data data/recipes --batch 1

An answer is exact if each of its lines is right: data sets with a checker (data/tasks/families.py) are scored by
it, others by chrF and what else readers see (measure/readers.py). A broken or cut answer counts as it is: mostly
wrong, and in the time. "same plan" is the share of plans that equal the reference's word for word. Costs are means per answer; "plan" is the passes that write plan and text, "draft" those of a
--draft model. Likelihoods are in nats per token, those of denoised spans as the negative ELBO.
"""

import argparse
import hashlib
import json
import math
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the project's modules

import numpy as np

from config import SampleConfig
from data import read_split
from decode import Answer
from loss import JointLoss, validate
from measure import readers
from measure.quality import COSTS, WIDTH, aligned, cell, checker, distinct, score, spans_per_answer, wrong_lines
from measure.speculate import Drafter, drafted_by
from methods import encode, rewrite
from noise import Sequence
from plumbing.device import CHOICES, find, peak_memory
from plumbing.files import write_whole
from plumbing.settings import Help, add_settings, check, command, locate, pick, printable, setting
from sample import Sampler
from tags import Example


@dataclass
class EvalConfig:
    """Evaluation."""

    checkpoint: str = setting("checkpoints/tasks/planned.safetensors", "trained model, or folder of a pretrained one")
    data: str = setting(
        "data/tasks", "folder of the data set it was trained on; runs its families.py and consistency.py"
    )
    split: str = setting("test", "split to measure on")
    limit: int = setting(0, "measure on the first examples only, this many (0: all)", at_least=0)
    batch: int = setting(16, "prompts answered together; 1 for the latency of a single user", at_least=1)
    draws: int = setting(8, "noisings per round for the ELBO (0: no likelihoods)", at_least=0)
    draft: str = setting("", "smaller checkpoint that drafts the --ahead tokens of plan and text: speculative decoding")
    judge: str = setting(
        "",
        "autoregressive checkpoint of the same data, or a pretrained model's folder: perplexity of the answers under it",
    )
    answers: str = setting("", "file (.jsonl) that keeps the answers; an interrupted evaluation goes on with it")
    show: int = setting(0, "print this many answers, as Markdown, before the figures", at_least=0)
    device: str = setting("auto", f"where to compute: {', '.join(CHOICES)}")

    def __post_init__(self):
        check(self)


# ---------------------------------------------------------------- answers


RESULT = {  # what is read of a result
    "prompt": str, "text": str, "seconds": float, "slots": int, "pads": int, "cut": bool, "broken": bool,
    "rounds": [{"text": str, "plan": [{"topic": str, "length": int}], "spans": [str]}],
    **dict.fromkeys(COSTS, int),
}  # fmt: skip


def fits(value: Any, shape: Any) -> bool:
    """Whether a value of JSON has a shape: a type, a list of one shape, or a dict of shapes by name; numbers count."""
    if isinstance(shape, dict):
        return isinstance(value, dict) and all(fits(value.get(name), part) for name, part in shape.items())
    if isinstance(shape, list):
        return isinstance(value, list) and all(fits(part, shape[0]) for part in value)
    return type(value) is shape and (shape in (str, bool) or 0 <= value < math.inf)


class Answers:
    """Results by the number of their prompt, kept in memory and, if `path` is not empty, in a file.

    The file's first line holds the settings, each further one a number and a result. What an interrupted evaluation
    did not finish is dropped: half a line, and the rest of its batch, so that the batches stay the same.
    Raises ValueError for a file of other settings, or with something else in it.
    """

    def __init__(self, path: str, settings: dict, size: int):
        self.path, self.results = Path(path) if path else None, {}
        if not path:
            return
        if self.path.exists() and not self.path.is_file():
            raise ValueError(f"--answers {path}: expected a file, or a name for a new one")
        head = json.dumps(settings)
        text = self.path.read_text(encoding="utf-8", errors="replace") if self.path.exists() else ""
        first, *rows = text.split("\n")
        if first != head if rows else not head.startswith(first):
            raise ValueError(f"--answers {path}: holds answers of another checkpoint, data or settings, or something "
                             "else: name another file")  # fmt: skip
        for number, row in enumerate(rows[:-1], 2):  # the last row is empty, or cut off
            i, result = self.parse(row, number, size)
            self.results[i] = result
        kept = len(self.results) // settings["batch"] * settings["batch"] if len(self.results) < size else size
        self.results = dict(list(self.results.items())[:kept])
        write_whole(self.path, "\n".join([head, *rows[:kept]]) + "\n")

    def parse(self, row: str, number: int, size: int) -> tuple[int, dict]:
        """Prompt number and result of a line of the file."""
        try:
            i, result = json.loads(row)
            if i not in range(size) or i in self.results or not fits(result, RESULT):
                raise ValueError("not the number and result of a prompt")
        except (ValueError, TypeError, RecursionError) as error:
            raise ValueError(f"--answers {self.path}, line {number}: expected an answer of eval.py ({error}): "
                             "remove the file, or name another") from None  # fmt: skip
        return i, result

    def add(self, numbered: dict[int, dict]) -> None:
        self.results |= numbered
        if self.path:
            try:
                with self.path.open("a", encoding="utf-8") as file:
                    file.writelines(json.dumps(pair) + "\n" for pair in numbered.items())
            except OSError as error:
                error.filename = error.filename or str(self.path)  # a full disk does not say
                raise


def passes_so_far() -> Callable[[Answer], None] | None:
    """A `watch` that says, in a terminal and at most once a second, how far a batch is; None elsewhere."""
    start = told = time.monotonic()

    def watch(answer: Answer) -> None:
        nonlocal told
        if (now := time.monotonic()) - told > 1:
            told, passes = now, answer.plan_passes + answer.denoise_passes
            said = f"\rthis batch: {passes} passes, {now - start:.0f} s"
            print(f"{said:40}", end="", file=sys.stderr, flush=True)

    return watch if sys.stderr.isatty() else None


def answer_all(sampler: Sampler, examples: list[Example], batch: int, answers: Answers) -> list[dict]:
    """Results in the order of the examples; prompts of similar length share a batch. Prints progress.

    Each prompt has a seed of its own: that of the sampler plus its place in the order by length.
    """
    order = sorted(range(len(examples)), key=lambda i: len(examples[i].prompt))
    order, start, done = [i for i in order if i not in answers.results], time.perf_counter(), 0
    first = sampler.config
    if order:
        sampler.answer([examples[order[0]].prompt])  # warm-up, not in any figure
    for n in range(0, len(order), batch):
        part = order[n : n + batch]
        sampler.config = replace(first, seed=first.seed + len(answers.results))
        answered = sampler.answer([examples[i].prompt for i in part], passes_so_far())
        results = [answer.result() for answer in answered]
        answers.add(dict(zip(part, results)))
        done += len(part)
        left = (time.perf_counter() - start) / done * (len(order) - done)
        progress = f"\r{len(answers.results)}/{len(examples)} answers, {left:.0f} s left "
        print(f"{progress:40}", end="", file=sys.stderr, flush=True)
    sampler.config = first
    print(file=sys.stderr)
    return [answers.results[i] for i in range(len(examples))]


# ---------------------------------------------------------------- figures


def hashes_of(path: Path) -> list[str]:
    """Of a file, or of all files in a folder."""
    files = sorted(path.glob("*.*")) if path.is_dir() else [path]
    return [hashlib.sha256(file.read_bytes()).hexdigest()[:16] for file in files]


def evaluate(config: EvalConfig, sample_config: SampleConfig) -> dict:
    """All figures, for JSON. Raises ValueError for bad files or settings."""
    place = find(config.device)
    if config.draft and not sample_config.ahead:
        raise ValueError(f"--draft {config.draft}: expected --ahead, how many tokens it drafts")
    sampler = Sampler.load(config.checkpoint, sample_config, place)
    if config.draft:
        sampler.decoders = drafted_by(Drafter.load(config.draft, sampler.tokenizer, place))
    folder = locate(config.data)
    path = folder / f"{config.split}.jsonl"
    examples = read_split(path, sampler.tokenizer)[: config.limit or None]
    if not examples:
        raise ValueError(f"{path} has no examples: name another --split")
    hashes = [hash_ for name in (config.checkpoint, config.draft, path) if name for hash_ in hashes_of(locate(name))]
    settings = {"files": hashes, "limit": config.limit, "batch": config.batch}
    settings |= {"seeds": "of each prompt"}  # older files hold answers of which one per batch shared a seed
    answers = Answers(config.answers, settings | {"device": str(place)} | asdict(sample_config), len(examples))
    check_answer = checker(folder)  # before the answers take their time: it may be broken
    counts = [] if check_answer else readers.counts_of(folder)
    if config.judge:
        counts.append(("perplexity", readers.judged_by(config.judge, place, folder, sampler.tokenizer)))
    results = answer_all(sampler, examples, config.batch, answers)
    memory = peak_memory(place)  # before the likelihoods, which take memory of their own
    return {
        **quality(sampler, examples, results, check_answer),
        "examples": readers.fingerprint(examples),
        "judge": " ".join(hashes_of(locate(config.judge))) if config.judge else "",
        "readers": readers.figures(examples, [r["text"] for r in results], counts),
        **likelihoods(sampler, examples, config.draws),
        "batch": config.batch,
        **{f"seconds_p{q}": float(np.percentile([r["seconds"] for r in results], q)) for q in (50, 95)},
        "peak_memory_mb": memory,
        "shown": [line for result in results[: config.show] for line in markdown(result)],
    }


def quality(sampler: Sampler, examples: list[Example], results: list[dict], check_answer: Callable | None) -> dict:
    """How good the answers are and what they cost. `check_answer`: the data set's checker."""
    planned = sampler.method.plan == "written"
    rounds = [rewrite(e.rounds, sampler.tokenizer, sampler.method) if planned else None for e in examples]
    return {
        "scores": score(examples, results, check_answer, rounds),
        "wrong_lines": wrong_lines(examples, results, check_answer) if check_answer else {},
        "distinct_1": distinct(results, 1),
        "distinct_3": distinct(results, 3),
        "spans_per_answer": spans_per_answer(results),
        "pad_share": sum(r["pads"] for r in results) / max(sum(r["slots"] for r in results), 1),
    }


def likelihoods(sampler: Sampler, examples: list[Example], draws: int) -> dict:
    """Nats per token of the reference answers; 0 without draws."""
    if not draws:
        return {"plan_nll": 0.0, "span_elbo": 0.0, "span_elbo_error": None, "spans_exact": False}
    tokenizer, method = sampler.tokenizer, sampler.method
    layouts = [encode(example, tokenizer, method.in_training) for example in examples]
    for layout in layouts:
        sampler.around(layout)
    sequences = [Sequence(layout) for layout in layouts]
    loss, exact = JointLoss(sampler.model, tokenizer.pad + 1), method.attention == "causal"
    draws = 1 if exact or method.plan == "none" else draws  # no noise, nothing to repeat
    print(f"computing likelihoods of {len(examples)} reference answers", file=sys.stderr, flush=True)
    found = validate(loss, sequences, tokenizer, sampler.device, float(exact), draws=draws)
    span = found.get("causal" if exact else "span", 0.0)
    return {"plan_nll": found.get("plan", 0.0), "span_elbo": span, "span_elbo_error": found.get("span_error"),
            "spans_exact": exact}  # fmt: skip


# ---------------------------------------------------------------- report


SAID = {"plan_right": "same plan"}  # as the reference, word for word


def table(scores: dict[str, dict]) -> Iterator[str]:
    """Markdown lines of `score`: quality, then costs; those that no answer has are left out."""
    whole = scores["all"]
    shares = [name for name in ("exact", "right_lines", "plan_right", "valid") if name in whole]
    costs = ["plan_passes", "denoise_passes", "draft_passes", "critical_path", "positions"]
    for form, columns in (("{:.1%}", ["n", *shares]), ("{:.1f}", ["passes", *(c for c in costs if whole[c])])):
        heads = [SAID.get(name, name.removesuffix("_passes").replace("_", " ")) for name in ("family", *columns)]
        yield from aligned(heads, ([cell(name), *(str(row[c]) if c == "n" else form.format(row[c]) for c in columns)]
                                   for name, row in scores.items()))  # fmt: skip
        yield ""


def wrong(families: dict[str, dict]) -> Iterator[str]:
    """A line of `wrong_lines` for each family that has any."""
    for family, found in families.items():
        topics = {topic: n for topic, (n, _) in sorted(found["spans"].items()) if n}
        if topics or found["text"][0]:
            spans = f"{sum(topics.values())} of {sum(n for _, n in found['spans'].values())} spans"
            which = f" ({', '.join(f'{topic}: {n}' for topic, n in topics.items())})" if topics else ""
            yield f"wrong lines of {cell(family)}: {spans}{which}, {found['text'][0]} of {found['text'][1]} texts"


def lines(report: dict) -> Iterator[str]:
    """The report as lines for a reader."""
    yield from [*report["shown"], *table(report["scores"]), *wrong(report["wrong_lines"])]
    whole = report["scores"]["all"]
    drafts = f"; drafted: {whole['drafted']:.1f}, accepted: {whole['accepted']:.1f}" if whole["drafted"] else ""
    yield f"content tokens per answer: {whole['content_tokens']:.1f}{drafts}"
    yield f"content tokens per pass: {whole['content_tokens'] / max(whole['passes'], 1):.2f}"
    if whole["looping"]:
        yield f"answers that repeat themselves: {whole['looping']:.1%}"
    if report["plan_nll"]:
        yield f"plan and text: {report['plan_nll']:.4f} nats per token"
    if report["span_elbo"]:
        error = report["span_elbo_error"]
        error = "" if error is None else f" +- {error:.4f}, of its noise alone"
        kind = "exact" if report["spans_exact"] else "negative ELBO"
        yield f"spans: {report['span_elbo']:.4f} nats per token ({kind}{error})"
        yield f"pads: {report['pad_share']:.1%} of all slots"
    if "n_spans" in whole:
        shares = ", ".join(f"{n}: {share:.0%}" for n, share in report["spans_per_answer"].items())
        yield f"spans per answer: {shares}"
        yield f"length off by {whole['length_error']:.2f} units per topic, with its sign by {whole['length_bias']:+.2f}"
    yield from ["", *readers.table(report["readers"]), ""] if report["readers"] else ()
    yield f"different words: {report['distinct_1']:.1%}; different triples of words: {report['distinct_3']:.1%}"
    yield (f"seconds per answer at batch {report['batch']}: median {report['seconds_p50']:.3f}, "
           f"95th percentile {report['seconds_p95']:.3f}")  # fmt: skip
    if report["peak_memory_mb"]:
        yield f"peak memory: {report['peak_memory_mb']:.0f} MiB"


def markdown(result: dict) -> Iterator[str]:
    """Lines that show an answer: the prompt, each topic with its span, each text."""
    yield f"**{result['prompt']}**\n"
    for round_ in result["rounds"]:
        if round_["text"]:
            yield f"- {round_['text']}"
        for topic, span in zip(round_["plan"], round_["spans"]):
            yield f"- *{topic['topic']} {topic['length']}*: {span}"
    yield f"\n{result['plan_passes']} plan and {result['denoise_passes']} denoising passes\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=Help)
    add_settings(parser, EvalConfig, SampleConfig)
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of tables")
    args = parser.parse_args()
    report = evaluate(pick(EvalConfig, args), pick(SampleConfig, args))
    if args.json:
        return print(json.dumps(report))
    for line in lines(report):
        print(printable(line if line in report["shown"] else textwrap.fill(line, WIDTH, subsequent_indent="  ")))


if __name__ == "__main__":
    command(main)
