"""Planned diffusion at work: a prompt, its plan, the spans denoising, and the same prompt answered autoregressively.

Uses the trained checkpoints that come with the project; `make demo` runs it.
"""

import argparse
import math
import shutil
import statistics
import sys
import textwrap
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the project's modules

import torch

from config import SampleConfig
from plumbing.device import find, name_of
from plumbing.files import refuse_overwriting
from plumbing.settings import Help, command, locate
from sample import Sampler
from show.page import Race, write_page
from show.record import record
from show.terminal import Screen, progress

PROMPTS = {  # of the test splits
    "tasks": "Tell me about the craft, the food, the ruler, the festival and the animal of Marast.",
    "recipes": "What is the recipe for Fluffy Protein Steamed Omelette?",  # the first of its split, however it turns out
}


class Run(NamedTuple):
    """A model of a data set, and how it answers."""

    title: str
    checkpoint: str
    config: SampleConfig
    what: str  # in a sentence


RUNS = {
    "tasks": (
        Run("planned diffusion", "planned", SampleConfig(threshold=0.9),
            "A plan, one token per pass; then each pass fills all slots that it is sure of."),
        Run("planned, with drafts", "joint", SampleConfig(threshold=0.9, ahead=8),
            "The same, but a pass over plan or text drafts 8 tokens, which the next one checks."),
        Run("autoregressive", "ar", SampleConfig(), "No plan, one token per pass."),
    ),
    "recipes": (
        Run("planned, with drafts", "joint", SampleConfig(ahead=8),
            "Real text is harder: each pass fills the slots that it is surest of."),
        Run("parallel-ar, with drafts", "joint", SampleConfig(decode="parallel-ar", ahead=8),
            "The same model writes its spans left to right, all at once: the text reads better."),
        Run("autoregressive, with drafts", "ar-drafts", SampleConfig(ahead=8), "No plan, but drafts."),
    ),
}  # fmt: skip


def measure(sampler: Sampler, title: str, prompt: str, repeats: int = 3) -> dict:
    """The answer and its median seconds."""
    runs = []
    for n in range(1, repeats + 1):
        progress(f"timing {title}: answer {n} of {repeats}")
        runs.append(sampler.answer([prompt])[0].result())
    progress("")
    return runs[0] | {"seconds": statistics.median(run["seconds"] for run in runs)}


def table(results: dict[str, dict]) -> list[str]:
    """Lines of 60 columns that set methods side by side; results: title -> `Answer.result()`."""
    passes = lambda r: r["plan_passes"] + r["denoise_passes"]
    rows = {
        "passes": lambda r: f"{passes(r)}",
        " plan and text": lambda r: f"{r['plan_passes']}",
        " spans": lambda r: f"{r['denoise_passes']}",
        "tokens": lambda r: f"{r['content_tokens']}",
        " per pass": lambda r: f"{r['content_tokens'] / passes(r):.1f}",
        "positions": lambda r: f"{r['positions']}",
        "seconds": lambda r: f"{r['seconds']:.2f}",
    }
    heads = [title.replace(",", "").partition(" ")[::2] for title in results]
    cells = [*zip(*heads), *([cell(r) for r in results.values()] for cell in rows.values())]
    lines = [f"{name:14}" + "".join(f"{cell:>15}" for cell in line) for name, line in zip(["", "", *rows], cells)]
    return [line.rstrip() for line in lines]


def say(text: str) -> None:
    """Print a paragraph in lines no longer than the terminal's."""
    print(textwrap.fill(text, min(80, shutil.get_terminal_size().columns)))


def show(data: str, prompt: str, delay: float, device: torch.device) -> Race:
    """Answer a prompt with the models of a data set, and compare what it took. Returns the recordings."""
    answers, results = [], {}
    for title, checkpoint, config, what in RUNS[data]:
        print(f"\n=== {data}: {title}\n")
        say(what)
        print()
        sampler = Sampler.load(f"checkpoints/{data}/{checkpoint}.safetensors", config, device)
        frames = record(sampler.answer, prompt, Screen(delay=delay))
        answers.append((title.capitalize(), sampler.method.method, frames))
        results[title] = measure(sampler, title, prompt)
    print("\n".join([f"\n=== {data}: side by side\n", *table(results), ""]))
    where = f"CPU threads: {torch.get_num_threads()}" if device.type == "cpu" else name_of(device)
    say(f"Seconds: median of 3 answers, {where}. On a CPU a pass over many positions takes longer: compare passes.")
    return Race(prompt, answers)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=Help)
    parser.add_argument("--prompt", help="a prompt of your own for the chosen data set")
    parser.add_argument("--data", choices=PROMPTS, help="show only this data set's models (default: all)")
    parser.add_argument("--delay", type=float, default=0.05, help="seconds a frame stays (default: %(default)s)")
    parser.add_argument("--html", metavar="FILE", help="also write a page in which the answers race, pass by pass")
    parser.add_argument("--device", default="auto", help="where to compute (default: %(default)s)")
    args = parser.parse_args()
    if args.prompt is not None and not args.data:
        parser.error(f"--prompt needs --data {' or '.join(PROMPTS)}: each model knows one data set")
    if not 0 <= args.delay < math.inf:
        raise ValueError(f"--delay {args.delay}: expected 0 or more")
    shipped = [locate(f"checkpoints/{data}/{file}.safetensors") for data, runs in RUNS.items() for _, file, *_ in runs]
    refuse_overwriting(shipped, html=args.html or "")
    device = find(args.device)
    datasets = [args.data] if args.data else PROMPTS
    races = [show(data, PROMPTS[data] if args.prompt is None else args.prompt, args.delay, device) for data in datasets]
    if args.html:
        print(f"\n{write_page(args.html, races)}")


if __name__ == "__main__":
    command(main)
