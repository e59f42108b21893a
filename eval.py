"""Measure a checkpoint on a test split: quality, passes, likelihoods.

    python eval.py --checkpoint checkpoints/recipes/planned.safetensors --data data/recipes

An answer is exact if every span and text of it is right; data sets with a checker (data/tasks/families.py)
are scored by it. Likelihoods are in nats a token, spans as the negative ELBO.
"""

import argparse
import importlib
import json
import sys
import time
from collections import defaultdict
from dataclasses import dataclass

import torch

from data import read_split
from masks import Sequence
from methods import encode
from sample import SampleConfig, Sampler
from settings import add_settings, locate, pick, setting
from train import JointLoss, validate

COSTS = ("plan_passes", "denoise_passes", "critical_path", "positions", "content_tokens")


@dataclass
class EvalConfig:
    """Evaluation."""

    checkpoint: str = setting("checkpoints/recipes/planned.safetensors", "trained model")
    data: str = setting("data/recipes", "folder of the data set it was trained on, written by its prepare.py")
    split: str = setting("test", "split to measure on")
    limit: int = setting(0, "only so many of its examples (0: all)")
    batch: int = setting(16, "prompts answered together")
    draws: int = setting(8, "noisings a round for the ELBO")
    show: int = setting(0, "print the first so many answers, as Markdown, before the figures")
    device: str = setting("cuda" if torch.cuda.is_available() else "cpu", "where to compute")


def checker(folder):
    """The data set's `check(example, text)`, or None."""
    folder = folder.resolve()
    if not (folder / "families.py").exists():
        return None
    return importlib.import_module(f"data.{folder.name}.families").check


def answer_all(sampler, examples, batch):
    """Answers in the order of the examples; prompts of like length share a batch. Prints progress."""
    order = sorted(range(len(examples)), key=lambda i: len(examples[i].prompt))
    results, start = {}, time.perf_counter()
    for n in range(0, len(order), batch):
        part = order[n : n + batch]
        answers = sampler.answer([examples[i].prompt for i in part])
        results |= {i: answer.result() for i, answer in zip(part, answers)}
        passed = time.perf_counter() - start
        left = passed / len(results) * (len(order) - len(results))
        print(f"\r{len(results)}/{len(order)} answers, {left:.0f} s left ", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    return [results[i] for i in range(len(examples))]


def score(examples, results, check, plans):
    """Means over each family and over all: shares of exact answers, right spans and right plans, passes, tokens."""
    groups = defaultdict(list)
    for example, result in zip(examples, results):
        row = {name: result[name] for name in COSTS}
        row["passes"] = row["plan_passes"] + row["denoise_passes"]
        if check:
            verdict = check(example, result["text"])
            row |= {"exact": float(verdict.exact), "spans": sum(verdict.spans) / max(len(verdict.spans), 1)}
        if plans:
            reference = [(s.topic, s.length) for r in example.rounds for s in r.spans]
            planned = [(t["topic"], t["length"]) for r in result["rounds"] for t in r["plan"]]
            row["plan_right"] = float(reference == planned)
        for name in (example.family, "all"):
            groups[name].append(row)
    return {name: {key: sum(row[key] for row in rows) / len(rows) for key in rows[0]} | {"n": len(rows)}
            for name, rows in sorted(groups.items(), key=lambda item: item[0] == "all")}  # fmt: skip


def table(scores):
    """Markdown lines of `score`."""
    shares = [name for name in ("exact", "spans", "plan_right") if name in scores["all"]]
    columns = ["n", *shares, "passes", *COSTS]
    yield "| family | " + " | ".join(columns) + " |"
    yield "|---" * (len(columns) + 1) + "|"
    for name, row in scores.items():
        cells = [f"{row[c]:.1%}" if c in shares else f"{row[c]:.1f}" for c in columns[1:]]
        yield f"| {name} | {row['n']} | " + " | ".join(cells) + " |"


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
    if args.json:
        print(json.dumps(report))
        return
    print("\n".join([*report["shown"], *table(report["scores"])]))
    print(f"plan and text: {report['plan_nll']:.4f} nats a token")
    if report["span_elbo"]:
        print(f"spans: {report['span_elbo']:.4f} +- {report['span_elbo_error']:.4f} nats a token (negative ELBO)")


def evaluate(config, sample_config):
    """All figures as a dict for JSON. Raises ValueError on bad files or settings."""
    sampler = Sampler.load(config.checkpoint, sample_config, config.device)
    path = locate(config.data) / f"{config.split}.jsonl"
    examples = read_split(path)[: config.limit or None]
    results = answer_all(sampler, examples, config.batch)
    loss = JointLoss(sampler.model, sampler.tokenizer.pad + 1)
    sequences = [Sequence(encode(example, sampler.tokenizer, sampler.method)) for example in examples]
    plan, span, error = validate(loss, sequences, sampler.tokenizer, config.device, config.draws)
    scores = score(examples, results, checker(locate(config.data)), sampler.method.plan == "written")
    shown = [line for result in results[: config.show] for line in markdown(result)]
    return {"scores": scores, "shown": shown, "plan_nll": plan, "span_elbo": span, "span_elbo_error": error}


if __name__ == "__main__":
    main()
