"""The parts of gpu.py that no other script does. Each prints what it finds as JSON objects, one per line."""

import argparse
import csv
import json
import platform
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the project's modules

from measure.gpu import PARTS, command_of
from plumbing.settings import ROOT, Help, command, locate  # a part imports what else it needs: packages may be missing

# ways to sample each shipped model: settings, and a method that it was not trained for, for which its texts are nonsense
WAYS: dict[str, dict[str, tuple[dict[str, Any], str]]] = {
    "ar": {"token by token": ({}, ""), "drawn": ({"temperature": 0.7, "top_p": 0.9}, "")},
    "planned": {
        "half the steps": ({"steps_ratio": 0.5}, ""),
        "threshold 0.9": ({"threshold": 0.9}, ""),
        "drawn": ({"threshold": 0.9, "temperature": 0.7}, ""),
        "as dense": ({"threshold": 0.9}, "dense"),
        "as block": ({"threshold": 0.9}, "block"),
        "as diffusion": ({"threshold": 0.9}, "diffusion"),
    },
    "joint": {
        "as planned": ({"threshold": 0.9}, ""),
        "as planned, drafts": ({"threshold": 0.9, "ahead": 8}, ""),
        "as parallel-ar": ({"decode": "parallel-ar"}, ""),
        "as parallel-ar, drafts": ({"decode": "parallel-ar", "ahead": 8}, ""),
    },
    "trained": {"threshold 0.9": ({"threshold": 0.9}, "")},
}
LEARNT = ("facts", "lookups", "transforms")  # what the shipped models answer without an error (docs/results.md)


def say(what: str, **figures: Any) -> None:
    print(json.dumps({"what": what, **figures}), flush=True)


@contextmanager
def going_on(what: str) -> Iterator[None]:
    """What fails is said, and what follows is tried."""
    try:
        yield
    except Exception as error:
        traceback.print_exc()
        say(what, failed=f"{type(error).__name__}: {(str(error).strip() or '-').splitlines()[0]}")


# ---------------------------------------------------------------- the machine


def versions(args: argparse.Namespace) -> None:
    """Packages, compilers, and the device."""
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    there, missing = {"python": platform.python_version()}, []
    for line in (line for line in lines if line and not line.startswith("#")):
        name = re.match(r"[\w-]+", line)[0]
        try:
            there[name] = version(name)
        except PackageNotFoundError:
            missing.append(shlex.quote(line))
    say("packages", **there)
    if missing:
        say("packages are missing", failed=f"pip install {' '.join(missing)}")
    import torch

    from kernels import nvcc
    from plumbing.device import find, name_of

    say("compilers", **{"nvcc": nvcc() or "none", "g++": shutil.which("g++") or "none"})
    device, more = find(args.device), {}
    if device.type == "cuda":
        at_hand = torch.cuda.get_device_properties(device)
        more = {"multiprocessors": at_hand.multi_processor_count, "GiB": at_hand.total_memory >> 30}
    say("computes on", device=name_of(device), cuda=torch.version.cuda, **more)


def prepared(args: argparse.Namespace) -> None:
    """The data set: as it is there, or prepared now."""
    folder = locate(args.data)
    if not (folder / "train.jsonl").exists():
        subprocess.run([sys.executable, folder / "prepare.py"], check=True)
    say(
        str(args.data),
        **{split: sum(1 for _ in (folder / f"{split}.jsonl").open()) for split in ("train", "val", "test")},
    )


def built(args: argparse.Namespace) -> None:
    """The kernel for each type and head size, side by side."""
    import torch

    import kernels

    def build(dtype: torch.dtype, head_size: int) -> None:
        with going_on(f"{dtype}, heads of {head_size}"):
            start = time.perf_counter()
            kernels.library(torch.device(args.device), dtype, head_size)
            say(f"{kernels.ELEMENTS[dtype]}, heads of {head_size}", seconds=round(time.perf_counter() - start, 1))

    sizes = kernels.HEAD_SIZES if args.device == "cuda" else kernels.HEAD_SIZES[:1]
    with ThreadPoolExecutor() as pool:
        [*pool.map(lambda variant: build(*variant), [(d, n) for d in kernels.ELEMENTS for n in sizes])]


# ---------------------------------------------------------------- training


def losses(folder: Path) -> list[dict[str, float]]:
    """The rows of a log so far, without its clock."""
    path = folder / "log.csv"
    rows = csv.DictReader(path.open()) if path.exists() else ()
    return [{name: float(cell or 0) for name, cell in row.items() if cell and name != "seconds"} for row in rows]


def resumed(args: argparse.Namespace) -> None:
    """Stop a training by Ctrl-C, go on with it, and compare its losses with those of the one that ran through."""
    training = next(part for part in PARTS if part.name == "training")
    whole, folder = args.out / "trainings/whole", args.out / "trainings/stopped"
    words = [*command_of(training, args), "--out", str(folder)]
    process = subprocess.Popen(words, cwd=ROOT)
    while process.poll() is None and not losses(folder):
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    if process.wait():
        raise ValueError("the training that was to be stopped failed")
    at = int(losses(folder)[-1]["step"])
    subprocess.run(words, cwd=ROOT, check=True)
    expected, found = losses(whole), losses(folder)
    if [row["step"] for row in expected] != [row["step"] for row in found]:
        raise ValueError(f"the logs in {whole} and {folder} have other rows")
    pairs = [(row["step"], abs(row[name] - other[name])) for row, other in zip(expected, found) for name in row]
    parts = {"before": [off for step, off in pairs if step <= at], "after": [off for step, off in pairs if step > at]}
    figures = {f"largest difference {name}": f"{max(offs, default=0):.5f}" for name, offs in parts.items()}
    wrong = max(off for _, off in pairs) > 0.05 or not parts["after"]
    say("losses of both", **{"stopped after update": at}, **figures, **({"failed": "they differ"} if wrong else {}))


# ---------------------------------------------------------------- sampling


def sampled(args: argparse.Namespace) -> None:
    """Answers of a model in all ways and batch sizes: how many are right, and what they cost once graphs are recorded."""
    from config import MethodConfig, SampleConfig
    from data import read_split
    from measure.eval import likelihoods
    from plumbing.device import find
    from sample import Sampler

    trained = args.out / "trainings/whole/model.safetensors"
    path = trained if args.model == "trained" else Path(args.checkpoints) / f"{args.model}.safetensors"
    every = read_split(locate(args.data) / "test.jsonl")
    examples = [e for e in every if e.family in LEARNT] or every
    for name, (settings, method) in WAYS[args.model].items():
        config = SampleConfig(max_tokens=args.max_tokens, **settings)
        with going_on(name):
            sampler = Sampler.load(path, config, find(args.device))
            if method:
                block = {"block": 32} if method in ("block", "diffusion") else {}
                sampler = Sampler(sampler.model, sampler.tokenizer, config, MethodConfig(method, **block))
            texts = {}
            for batch in args.batch:
                say(
                    f"{name}, batch {batch}",
                    **figures(sampler, examples[: max(batch, args.prompts)], batch, args, texts),
                )
            if not method and not {"temperature", "ahead"} & settings.keys():
                found = likelihoods(sampler, examples[: args.prompts], 1)
                say(f"{name}, nats per token", **{n: f"{found[n]:.5f}" for n in ("plan_nll", "span_elbo") if found[n]})


def figures(
    sampler: Any, examples: list, batch: int, args: argparse.Namespace, texts: dict[str, str]
) -> dict[str, Any]:
    """Quality and cost of answers; `texts`: those of the first batch size, by prompt."""
    from kernels.bench import on_the_host
    from measure.eval import quality
    from measure.quality import checker

    def answer() -> None:
        results[:] = [a.result() for i in range(0, len(prompts), batch) for a in sampler.answer(prompts[i : i + batch])]

    prompts, results = [e.prompt for e in examples], []
    first, again = (on_the_host(answer, sampler.device) for _ in range(2))
    scores = quality(sampler, examples, results, checker(locate(args.data)))["scores"]["all"]
    same = [texts.setdefault(r["prompt"], r["text"]) == r["text"] for r in results]
    right = {"right": f"{round(scores['exact'] * len(results))} of {len(results)}"} if "exact" in scores else {}
    greedy = {"same texts": f"{sum(same)} of {len(same)}"} if not sampler.config.temperature else {}
    return right | greedy | {
        "passes": f"{scores['passes']:.1f}", "ms per answer": f"{1e3 * again / len(prompts):.1f}",
        "tokens/s": f"{scores['content_tokens'] * len(prompts) / again:.0f}", "s at first": f"{first:.1f}",
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=Help)
    for name in ("device", "data", "checkpoints"):
        parser.add_argument(name)
    parser.add_argument("out", type=Path)
    parts = {part.__name__: part for part in (versions, prepared, built, resumed, sampled)}
    parser.add_argument("part", choices=parts)
    parser.add_argument("--model", choices=WAYS, help="that is sampled")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8, 64], help="prompts at once")
    parser.add_argument("--prompts", type=int, default=8, help="that are answered at least")
    parser.add_argument("--max_tokens", type=int, default=512, help="of an answer")
    args = parser.parse_args()
    parts[args.part](args)


if __name__ == "__main__":
    command(main)
