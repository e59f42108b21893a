"""How good answers are: the figures of one answer, their means, and what can be said of texts."""

import importlib.util
import math
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path

import torch

from data import Example
from loss import JointLoss, validate
from methods import encode, trained_by
from noise import Sequence
from plumbing.checkpoint import load_checkpoint
from plumbing.settings import locate
from tags import Round, plain_text

# What an answer's `result()` says of its cost. Those that a sampler does not report are 0.
COSTS = ("plan_passes", "denoise_passes", "draft_passes", "drafted", "accepted", "critical_path", "positions",
         "content_tokens", "pads")  # fmt: skip

# ---------------------------------------------------------------- the figures of answers


def checker(folder: Path) -> Callable | None:
    """`check(example, text)` of the data set's own families.py, which is run; None if it has no such file.

    It returns `exact`, whether the whole answer is right, and `spans`, whether each line of the reference is.
    """
    path = folder.resolve() / "families.py"
    if not path.exists():
        return None
    spec = importlib.util.spec_from_file_location(f"families of {path.parent}", path)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)  # its dataclasses look it up there
    try:
        spec.loader.exec_module(module)
        return module.check
    except Exception as error:
        raise ValueError(f"{path}: expected Python code with check(example, text), but: {error!r}") from None


def row_of(example: Example, result: dict, check: Callable | None, rounds: Iterable[Round] | None) -> dict:
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


def score(examples: list[Example], results: list[dict], check: Callable | None, rounds: list) -> dict[str, dict]:
    """Means of `row_of` over each family and, last, over all. `rounds`: as for `row_of`, of each example."""
    groups = defaultdict(list)
    for example, result, written in zip(examples, results, rounds):
        for name in dict.fromkeys((example.family, "all")):
            groups[name].append(row_of(example, result, check, written))
    return {name: {key: sum(row[key] for row in rows) / len(rows) for key in rows[0]} | {"n": len(rows)}
            for name, rows in sorted(groups.items(), key=lambda item: item[0] == "all")}  # fmt: skip


def wrong_lines(examples: list[Example], results: list[dict], check: Callable) -> dict[str, dict]:
    """Family -> {"text": [wrong, all], "spans": {topic: [wrong, all]}}: which lines of the references are wrong."""
    families = {e.family: {"text": [0, 0], "spans": defaultdict(lambda: [0, 0])} for e in examples}
    for example, result in zip(examples, results):
        family = families[example.family]
        parts = [part for r in example.rounds for part in [(None, r.text), *((s.topic, s.text) for s in r.spans)]]
        topics = [topic for topic, text in parts if text for _ in text.split("\n")]  # a verdict per line
        for topic, right in zip(topics, check(example, result["text"]).spans):
            count = family["text"] if topic is None else family["spans"][topic]
            count[0], count[1] = count[0] + (not right), count[1] + 1
    return families


def spans_per_answer(results: list[dict]) -> dict[int, float]:
    """Number of planned spans -> share of the answers that have it."""
    counts = Counter(sum(len(r["plan"]) for r in result["rounds"]) for result in results)
    return {n: count / len(results) for n, count in sorted(counts.items())}


# ---------------------------------------------------------------- texts


def chrf(examples: list[Example], results: list[dict]) -> float | None:
    """chrF (Popovic 2015) of all answers against the references, 0 to 100; None without sacrebleu."""
    try:
        from sacrebleu.metrics import CHRF
    except ImportError:
        print("no chrF: pip install sacrebleu", file=sys.stderr)
        return None
    return CHRF().corpus_score([r["text"] for r in results], [[plain_text(e.rounds) for e in examples]]).score


def distinct(results: list[dict], n: int) -> float:
    """Share of an answer's n-grams of words that are different, the mean over answers: low if answers repeat."""
    shares = []
    for result in results:
        words = result["text"].split()
        grams = [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]
        shares.append(len(set(grams)) / max(len(grams), 1))
    return sum(shares) / max(len(shares), 1)


def perplexity(judge: str, examples: list[Example], results: list[dict], device: torch.device) -> float:
    """Perplexity per token of the answers under an autoregressive checkpoint. Raises ValueError if it is another."""
    model, tokenizer, info, _ = load_checkpoint(locate(judge), device)
    method = trained_by(info, judge)
    if method.plan != "none":
        raise ValueError(f"--judge {judge}: expected an autoregressive model: train one with --method ar")
    written = [Example(e.prompt, (Round(r["text"]),)) for e, r in zip(examples, results)]
    sequences = [Sequence(encode(example, tokenizer, method)) for example in written]
    return math.exp(validate(JointLoss(model, tokenizer.pad + 1), sequences, tokenizer, device)[0])
