r"""What readers of free text see: figures of answers with intervals, and how two evaluations differ.

    python measure/eval.py --data data/recipes --checkpoint checkpoints/recipes/ar.safetensors --json > runs/a.json
    python measure/eval.py --data data/recipes --checkpoint checkpoints/recipes/joint.safetensors --json > runs/b.json
    python measure/readers.py runs/a.json runs/b.json

Every figure is computed from sums over the answers, a few numbers per answer: doubled words and all words, for
instance. An interval comes from drawing answers with replacement and adding up their numbers (bootstrap); two
evaluations of the same prompts are compared on the same draws (paired bootstrap, Koehn 2004).
"""

import argparse
import hashlib
import json
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the project's modules

import numpy as np
import torch

from loss import JointLoss, validate
from measure.quality import aligned, cell, own_function
from methods import encode, trained_by
from noise import Sequence
from plumbing.settings import Help, command, locate, one_line
from pretrained.chat import model_to_sample
from tags import Example, Round, plain_text
from tokenizer import Tokenizer

DRAWS, LEVEL = 2000, 95  # draws of the bootstrap; per cent of them that an interval holds
Count = Callable[[Example, str], dict[str, list]]  # an example and an answer's text -> figure's name -> its numbers

# ---------------------------------------------------------------- the numbers of one answer


ORDERS, BETA = range(1, 7), 2  # of chrF: lengths of n-grams, and how much more recall counts than precision


def overlap(example: Example, text: str) -> dict[str, list[int]]:
    """For chrF (Popovic 2015): per order the n-grams of characters of the answer, of the reference, and common ones.

    As in sacrebleu, white space does not count, nor do an answer's n-grams of an order that the reference lacks.
    """
    numbers = []
    answer, reference = ("".join(t.split()) for t in (text, plain_text(example.rounds)))
    for n in ORDERS:
        ours, theirs = (Counter(t[i : i + n] for i in range(len(t) - n + 1)) for t in (answer, reference))
        numbers += [ours.total() if theirs else 0, theirs.total(), (ours & theirs).total()]
    return {"chrF": numbers}


WORD = r"\w+(?:[-'/.,]\w+)*"
PIECE = re.compile(rf"(?P<word>{WORD})|(?P<ellipsis>(?<!\.)\.\.\.(?!\.))|(?P<mark>[^\w\s])")


def doubled(example: Example, text: str) -> dict[str, list[int]]:
    """Words and marks that repeat the piece before them, each with the number of words.

    A word has letters or digits (upper and lower case are the same); every other character but white space is a mark.
    "the the" is one doubled word, ".." and ". ." are one doubled mark, and an ellipsis of three dots is none.
    """
    pieces = [(m.lastgroup, m[0].casefold()) for m in PIECE.finditer(text)]
    kinds, twice = Counter(kind for kind, _ in pieces), Counter(a[0] for a, b in zip(pieces, pieces[1:]) if a == b)
    counts = {"doubled words": twice["word"], "doubled marks": twice["mark"]}
    counts["doubled words and marks"] = sum(counts.values())
    return {name: [count, kinds["word"]] for name, count in counts.items()}


def judged_by(path: str, device: torch.device | str, folder: Path, own: Tokenizer) -> Count:
    """Nats and tokens of an answer under an autoregressive checkpoint of the same data, or a pretrained model as it is.

    `own`: the tokenizer of the model that answers. Raises ValueError for another checkpoint.
    """
    model, tokenizer, info, around = model_to_sample(locate(path), device)
    method = trained_by(info, path)
    if method.plan != "none":
        raise ValueError(f"--judge {path}: expected an autoregressive model: train one with --method ar")
    file = folder / "tokenizer.json"
    known = {own.to_json(), file.read_text(encoding="utf-8") if file.exists() else ""}
    trained_on = locate(info.get("train", {}).get("data", ""))  # a pretrained model's tokenizer is of no data set
    if not locate(path).is_dir() and tokenizer.to_json() not in known and trained_on.resolve() != folder.resolve():
        raise ValueError(f"--judge {path}: of another data set than {folder}: train one with --data {folder}")
    loss = JointLoss(model, tokenizer.pad + 1)

    def judge(example: Example, text: str) -> dict[str, list[float]]:
        layout, tokens = (
            encode(Example(example.prompt, (Round(text),)), tokenizer, method),
            len(tokenizer.encode(text)) + 1,
        )
        around(layout)
        return {"perplexity": [validate(loss, [Sequence(layout)], tokenizer, device)["plan"] * tokens, tokens]}

    return judge


def counts_of(folder: Path) -> list[tuple[str, Count]]:
    """Kind of figure and what counts for it, for free text: any, and, of a data set with a consistency.py, its own."""
    consistent = own_function(folder, "consistency.py", "count")
    own = [("percent", consistent)] if consistent else []
    return [("chrf", overlap), ("per 1,000 words", doubled), *own]


# ---------------------------------------------------------------- from numbers to figures


def value(kind: str, sums: np.ndarray) -> np.ndarray:
    """The figure for each row of sums (..., numbers); nan where there is nothing to count."""
    if kind == "chrf":
        return f_score(sums)
    with np.errstate(invalid="ignore", divide="ignore"):
        ratio = sums[..., 0] / sums[..., 1]
    return {"percent": 100 * ratio, "per 1,000 words": 1000 * ratio, "perplexity": np.exp(ratio)}[kind]


def f_score(sums: np.ndarray) -> np.ndarray:
    """chrF, 0 to 100: precision and recall are means over the orders that both sides have."""
    ours, theirs, common = np.moveaxis(sums.reshape(*sums.shape[:-1], len(ORDERS), 3), -1, 0)
    orders = np.maximum(((ours > 0) & (theirs > 0)).sum(-1), 1)
    precision, recall = ((common / np.maximum(all_, 1)).sum(-1) / orders for all_ in (ours, theirs))
    return 100 * (1 + BETA**2) * precision * recall / np.maximum(BETA**2 * precision + recall, 1e-16)


def draws(kind: str, numbers: np.ndarray, seed: int = 0) -> np.ndarray:
    """The figure of DRAWS random sets of answers, as many as there are, drawn with replacement.

    numbers: (answers, numbers). The sets depend on the number of answers and the seed alone.
    """
    n = len(numbers)
    times_drawn = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=DRAWS)
    return value(kind, times_drawn @ numbers)


def interval(values: np.ndarray) -> tuple[float, float]:
    low, high = np.nanpercentile(values, [(100 - LEVEL) / 2, (100 + LEVEL) / 2])
    return float(low), float(high)


def figures(examples: list[Example], texts: list[str], counts: list[tuple[str, Count]]) -> dict[str, dict]:
    """Name -> what JSON holds of a figure: its value, its interval, and the value of the references themselves.

    counts: as of `counts_of`. Figures with nothing to count are left out.
    """
    found = {}
    for kind, count in counts:
        answers = [count(example, text) for example, text in zip(examples, texts)]
        references = [count(example, plain_text(example.rounds)) for example in examples]
        for name in answers[0]:
            numbers, own = (np.array([row[name] for row in rows], float) for rows in (answers, references))
            shown, own = (float(value(kind, n.sum(0))) for n in (numbers, own))
            if np.isfinite(shown):
                low, high = interval(draws(kind, numbers))
                found[name] = {"kind": kind, "value": shown, "low": low, "high": high,
                               "references": own if np.isfinite(own) else None,
                               "numbers": numbers.tolist()}  # fmt: skip
    return found


def fingerprint(examples: list[Example]) -> str:
    """Of prompts and references: only figures of the same ones can be compared."""
    return hashlib.sha256(json.dumps([(e.prompt, plain_text(e.rounds)) for e in examples]).encode()).hexdigest()[:16]


def table(found: dict[str, dict]) -> Iterator[str]:
    """Markdown lines of `figures`."""
    rows = []
    for name, row in found.items():
        own = "" if row["references"] is None else f"{row['references']:.2f}"
        shown = f"{row['value']:.2f}", f"{row['low']:.2f} to {row['high']:.2f}", own
        rows.append([cell(title(name, row)), *shown])
    return aligned(["what readers see", "answers", f"{LEVEL}% interval", "references"], rows)


def title(name: str, row: dict) -> str:
    return name + {"percent": ", %", "per 1,000 words": " per 1,000 words"}.get(row["kind"], "")


# ---------------------------------------------------------------- two evaluations


def compare(a: dict[str, dict], b: dict[str, dict]) -> Iterator[tuple[str, float, float, float]]:
    """(title, difference b - a, low, high) of each figure that both have, by a paired bootstrap."""
    for name in a:
        if name in b:
            kind, (ours, theirs) = a[name]["kind"], (np.array(x[name]["numbers"]) for x in (a, b))
            if b[name]["kind"] != kind or ours.shape != theirs.shape:
                raise ValueError(f"{name}: counted otherwise in one report than in the other: make both anew")
            low, high = interval(draws(kind, theirs) - draws(kind, ours))
            yield title(name, a[name]), b[name]["value"] - a[name]["value"], low, high


def read(path: str) -> dict:
    """What a report holds that eval.py printed with --json. Raises ValueError for anything else."""
    try:
        report = json.loads(Path(path).read_text(encoding="utf-8"))
        found = {"readers": report["readers"], "examples": report["examples"], "judge": report.get("judge", "")}
        if not isinstance(found["examples"], str) or not isinstance(found["judge"], str):
            raise ValueError("no text in 'examples' or 'judge'")
        for name, row in found["readers"].items():
            numbers = np.array(row["numbers"])
            if numbers.dtype.kind not in "if" or numbers.ndim != 2:
                raise ValueError(f"{name}: no rows of numbers")
            if not np.isfinite(row["value"]) or not np.isclose(value(row["kind"], numbers.sum(0)), row["value"]):
                raise ValueError(f"{name}: its value is not that of its numbers")
        return found
    except (ValueError, LookupError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise ValueError(f"{path}: expected what `measure/eval.py --json` prints, but: {error!r}") from None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=Help)
    parser.add_argument("a", help="report of eval.py --json")
    parser.add_argument("b", help="another, of the same examples")
    args = parser.parse_args()
    a, b = read(args.a), read(args.b)
    if a["examples"] != b["examples"]:
        raise ValueError(f"{args.a} and {args.b} are of different examples: take the same --data, --split and --limit")
    if a["judge"] and b["judge"] and a["judge"] != b["judge"]:
        raise ValueError(f"{args.a} and {args.b} have perplexities under different judges: take the same --judge")
    rows = [[cell(name), f"{difference:+.2f}", f"{low:+.2f} to {high:+.2f}"]
            for name, difference, low, high in compare(a["readers"], b["readers"])]  # fmt: skip
    print(f"{one_line(args.b)}\nless {one_line(args.a)}\n")
    print(*aligned(["figure", "difference", f"{LEVEL}% interval"], rows), sep="\n")


if __name__ == "__main__":
    command(main)
