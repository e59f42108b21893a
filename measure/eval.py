"""Measure a checkpoint on a test split: quality, likelihoods, what an answer costs.

    python measure/eval.py --checkpoint checkpoints/tasks/planned.safetensors --data data/tasks
    python measure/eval.py --checkpoint checkpoints/recipes/planned.safetensors --data data/recipes --batch 1

An answer is exact if every span and text of it is right; data sets with a checker (data/tasks/families.py) are
scored by it, others by chrF. A broken or cut answer counts as it is: mostly wrong, and in the time. Likelihoods
are in nats a token, spans as the negative ELBO.
"""

import argparse
import hashlib
import importlib
import json
import math
import resource
import sys
import time
from collections import Counter, defaultdict
from dataclasses import asdict, dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the project's modules

import numpy as np
import torch

from checkpoint import load_checkpoint
from data import Example, read_split
from measure.speculate import Drafter
from methods import encode, rewrite, trained_by
from noise import Sequence
from sample import SampleConfig, Sampler
from settings import add_settings, locate, pick, setting
from tags import Round, plain_text
from train import JointLoss, validate

COSTS = ("plan_passes", "denoise_passes", "draft_passes", "critical_path", "positions", "content_tokens", "pads")


@dataclass
class EvalConfig:
    """Evaluation."""

    checkpoint: str = setting("checkpoints/tasks/planned.safetensors", "trained model")
    data: str = setting("data/tasks", "folder of the data set it was trained on, written by its prepare.py")
    split: str = setting("test", "split to measure on")
    limit: int = setting(0, "only so many of its examples (0: all)")
    batch: int = setting(16, "prompts answered together; 1 for the latency of a single user")
    draws: int = setting(8, "noisings a round for the ELBO")
    draft: str = setting("", "smaller checkpoint that drafts the --ahead tokens that are checked: speculative decoding")
    judge: str = setting("", "larger autoregressive checkpoint: perplexity of the answers under it")
    answers: str = setting("", "file (.jsonl) that keeps the answers; an interrupted evaluation goes on with it")
    show: int = setting(0, "print the first so many answers, as Markdown, before the figures")
    device: str = setting("cuda" if torch.cuda.is_available() else "cpu", "where to compute")


# ---------------------------------------------------------------- answers


class Answers:
    """Results of prompts by their number, in memory or also in a file, whose first line says what they are of."""

    def __init__(self, path, settings):
        self.path, self.of = Path(path) if path else None, {}
        if not path:
            return
        head = json.dumps(settings)
        first, *rows = self.path.read_text(encoding="utf-8").split("\n") if self.path.exists() else [""]
        if rows and first != head:
            raise ValueError(f"{path} holds answers of another checkpoint, data or settings: name another file")
        whole = (len(rows) - 1) // settings["batch"] * settings["batch"]  # batches; the last row is empty or cut off
        rows = rows[: max(whole, 0)]
        self.of = dict(map(json.loads, rows))
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text("\n".join([head, *rows]) + "\n", encoding="utf-8")

    def add(self, numbered):
        self.of |= numbered
        if self.path:
            with self.path.open("a", encoding="utf-8") as file:
                file.writelines(json.dumps(pair) + "\n" for pair in numbered.items())


def answer_all(sampler, examples, batch, answers):
    """Results in the order of the examples; prompts of like length share a batch. Prints progress."""
    order = sorted(range(len(examples)), key=lambda i: len(examples[i].prompt))
    order, start, done = [i for i in order if i not in answers.of], time.perf_counter(), 0
    sampler.answer([examples[i].prompt for i in order[:1]])  # warm-up, not in any figure
    for n in range(0, len(order), batch):
        part = order[n : n + batch]
        results = [answer.result() for answer in sampler.answer([examples[i].prompt for i in part])]
        answers.add(dict(zip(part, results)))
        done += len(part)
        left = (time.perf_counter() - start) / done * (len(order) - done)
        print(f"\r{len(answers.of)}/{len(examples)} answers, {left:.0f} s left ", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    return [answers.of[i] for i in range(len(examples))]


# ---------------------------------------------------------------- quality


def checker(folder):
    """The data set's `check(example, text)`, or None."""
    folder = folder.resolve()
    if not (folder / "families.py").exists():
        return None
    return importlib.import_module(f"data.{folder.name}.families").check


def chrf(examples, results):
    """chrF (Popovic 2015) of all answers against the references, 0 to 100; None without sacrebleu."""
    try:
        from sacrebleu.metrics import CHRF
    except ImportError:
        print("no chrF: pip install sacrebleu", file=sys.stderr)
        return None
    return CHRF().corpus_score([r["text"] for r in results], [[plain_text(e.rounds) for e in examples]]).score


def distinct(results, n):
    """Share of different n-grams of words among all of an answer, the mean over answers; low if answers repeat."""
    shares = []
    for result in results:
        words = result["text"].split()
        grams = [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]
        shares.append(len(set(grams)) / max(len(grams), 1))
    return sum(shares) / max(len(shares), 1)


def perplexity(judge, examples, results, device):
    """Perplexity a token of the answers under an autoregressive checkpoint."""
    model, tokenizer, info, _ = load_checkpoint(locate(judge), device)
    method = trained_by(info, judge)
    if method.plan != "none":
        raise ValueError(f"{judge} is not an autoregressive model: train one with --method ar")
    written = [Example(e.prompt, (Round(r["text"]),)) for e, r in zip(examples, results)]
    sequences = [Sequence(encode(example, tokenizer, method)) for example in written]
    return math.exp(validate(JointLoss(model, tokenizer.pad + 1), sequences, tokenizer, device)[0])


def row_of(example, result, check, rounds):
    """The figures of one answer. `rounds`: the example's, as the method writes its plan; None if it writes none."""
    row = {name: result.get(name, 0) for name in COSTS}
    row["passes"] = row["plan_passes"] + row["denoise_passes"]
    row["valid"] = float(not result["broken"] and not result["cut"])
    if check:
        verdict = check(example, result["text"])
        row |= {"exact": float(verdict.exact), "spans": sum(verdict.spans) / max(len(verdict.spans), 1)}
    if rounds is not None:
        reference = [(s.topic, s.length) for r in rounds for s in r.spans]
        planned = [(t["topic"], t["length"]) for r in result["rounds"] for t in r["plan"]]
        off = [abs(a - b) for (topic, a), (other, b) in zip(reference, planned) if topic == other]
        row |= {"plan_right": float(reference == planned), "n_spans": len(planned)}
        row["length_error"] = sum(off) / len(off) if off else 0.0
    return row


def score(examples, results, check, rounds):
    """Means over each family and over all: shares of exact answers, right spans and right plans, costs."""
    groups = defaultdict(list)
    for example, result, written in zip(examples, results, rounds):
        for name in dict.fromkeys((example.family, "all")):
            groups[name].append(row_of(example, result, check, written))
    return {name: {key: sum(row[key] for row in rows) / len(rows) for key in rows[0]} | {"n": len(rows)}
            for name, rows in sorted(groups.items(), key=lambda item: item[0] == "all")}  # fmt: skip


def spans_an_answer(results):
    """Share of the answers with so many planned spans."""
    counts = Counter(sum(len(r["plan"]) for r in result["rounds"]) for result in results)
    return {n: count / len(results) for n, count in sorted(counts.items())}


def evaluate(config, sample_config):
    """All figures as a dict for JSON. Raises ValueError on bad files or settings."""
    sampler = Sampler.load(config.checkpoint, sample_config, config.device)
    if config.draft:
        sampler.drafter = Drafter.load(config.draft, sampler.tokenizer, config.device)
    path = locate(config.data) / f"{config.split}.jsonl"
    examples = read_split(path)[: config.limit or None]
    if not examples:
        raise ValueError(f"{path} has no examples")
    tokenizer, method = sampler.tokenizer, sampler.method
    sequences = [Sequence(encode(example, tokenizer, method)) for example in examples]
    files = [locate(name) for name in (config.checkpoint, config.draft, path) if name]
    hashes = [hashlib.sha256(file.read_bytes()).hexdigest()[:16] for file in files]
    batch = config.batch
    made_by = {"files": hashes, "limit": config.limit, "batch": batch, "device": config.device}
    answers = Answers(config.answers, made_by | asdict(sample_config))
    results = answer_all(sampler, examples, batch, answers)
    rounds = [rewrite(e.rounds, tokenizer, method) if method.plan == "written" else None for e in examples]
    loss = JointLoss(sampler.model, tokenizer.pad + 1)
    plan, span, error = validate(loss, sequences, tokenizer, config.device, config.draws)
    check, seconds = checker(locate(config.data)), [result["seconds"] for result in results]
    report = {
        "scores": score(examples, results, check, rounds),
        "plan_nll": plan, "span_elbo": span, "span_elbo_error": error if config.draws > 1 else None,
        "distinct_1": distinct(results, 1), "distinct_3": distinct(results, 3),
        "chrf": None if check else chrf(examples, results),
        "perplexity": perplexity(config.judge, examples, results, config.device) if config.judge else None,
        "spans_an_answer": spans_an_answer(results),
        "pad_share": sum(r["pads"] for r in results) / max(sum(r["slots"] for r in results), 1),
        "batch": batch, "seconds_p50": np.quantile(seconds, 0.5), "seconds_p95": np.quantile(seconds, 0.95),
        "peak_memory_mb": peak_memory(config.device),
        "shown": [line for result in results[: config.show] for line in markdown(result)],
    }  # fmt: skip
    return report


def peak_memory(device):
    """Most memory held so far, in MiB: on a GPU by tensors, on the CPU by the process."""
    if str(device).startswith("cuda"):
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


# ---------------------------------------------------------------- report


def table(scores):
    """Markdown lines of `score`."""
    shares = [name for name in ("exact", "spans", "plan_right", "valid") if name in scores["all"]]
    columns = ["n", *shares, "passes", *COSTS[:-1]]
    columns.remove("draft_passes")
    yield "| family | " + " | ".join(columns) + " |"
    yield "|---" * (len(columns) + 1) + "|"
    for name, row in scores.items():
        cells = [f"{row[c]:.1%}" if c in shares else f"{row[c]:.1f}" for c in columns[1:]]
        yield f"| {name} | {row['n']} | " + " | ".join(cells) + " |"


def lines(report):
    """The report as lines for a reader."""
    yield from [*report["shown"], *table(report["scores"])]
    whole = report["scores"]["all"]
    if report["plan_nll"]:
        yield f"plan and text: {report['plan_nll']:.4f} nats a token"
    if report["span_elbo"]:
        error = f" +- {report['span_elbo_error']:.4f}" if report["span_elbo_error"] is not None else ""
        yield f"spans: {report['span_elbo']:.4f}{error} nats a token (negative ELBO)"
        yield f"pads: {report['pad_share']:.1%} of all slots"
    if "n_spans" in whole:
        shares = ", ".join(f"{n}: {share:.0%}" for n, share in report["spans_an_answer"].items())
        yield f"spans an answer: {shares}; length off by {whole['length_error']:.2f} units a topic"
    if whole["draft_passes"]:
        yield f"passes of the drafting model: {whole['draft_passes']:.1f} an answer"
    if report["chrf"] is not None:
        yield f"chrF: {report['chrf']:.1f}"
    if report["perplexity"]:
        yield f"perplexity under the judge: {report['perplexity']:.2f}"
    yield f"different words: {report['distinct_1']:.1%}; different triples of words: {report['distinct_3']:.1%}"
    yield f"content tokens a pass: {whole['content_tokens'] / max(whole['passes'], 1):.2f}"
    yield (f"seconds an answer at batch {report['batch']}: median {report['seconds_p50']:.3f}, "
           f"95th percentile {report['seconds_p95']:.3f}; peak memory {report['peak_memory_mb']:.0f} MiB")  # fmt: skip


def markdown(result):
    """Lines that show an answer: the prompt, each topic with its span, each text."""
    yield f"**{result['prompt']}**\n"
    for round_ in result["rounds"]:
        if round_["text"]:
            yield f"- {round_['text']}"
        for topic, span in zip(round_["plan"], round_["spans"]):
            yield f"- *{topic['topic']} {topic['length']}*: {span}"
    yield f"\n{result['plan_passes']} plan and {result['denoise_passes']} denoising passes\n"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_settings(parser, EvalConfig, SampleConfig)
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of tables")
    args = parser.parse_args()
    try:
        report = evaluate(pick(EvalConfig, args), pick(SampleConfig, args))
    except ValueError as error:
        sys.exit(f"eval.py: {error}")
    print(json.dumps(report) if args.json else "\n".join(lines(report)))


if __name__ == "__main__":
    main()
