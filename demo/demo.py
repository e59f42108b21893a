"""Planned diffusion at work: a prompt, its plan, the spans denoising, and the same prompt answered autoregressively.

Uses the trained checkpoints that come with the project; `make demo` runs it.
"""

import argparse
import math
import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the project's modules

import torch

from config import SampleConfig
from plumbing.device import find, name_of
from plumbing.files import refuse_overwriting
from plumbing.settings import command, locate
from sample import Sampler
from show.page import Race, write_page
from show.record import record
from show.terminal import Screen

PROMPTS = {  # data sets with shipped checkpoints: a prompt of the test split
    "tasks": "Tell me about the craft, the food, the ruler, the festival and the animal of Marast.",
    "recipes": "What is the recipe for Cabbage Omelette?",
}

RUNS = {  # name: checkpoint and how it is sampled
    "planned diffusion": ("planned", SampleConfig()),
    "planned, drafts": ("joint", SampleConfig(ahead=8)),
    "autoregressive": ("ar", SampleConfig()),
}


def measure(sampler: Sampler, prompt: str, repeats: int = 5) -> dict:
    """The answer and its median seconds, after one run of warm-up."""
    runs = [sampler.answer([prompt])[0].result() for _ in range(repeats + 1)][1:]
    return runs[0] | {"seconds": statistics.median(run["seconds"] for run in runs)}


def table(results: dict[str, dict]) -> list[str]:
    """Lines that set methods side by side; results: name -> `Answer.result()`."""
    rows = {
        "forward passes": lambda r: f"{r['plan_passes'] + r['denoise_passes']}",
        "  plan and text": lambda r: f"{r['plan_passes']}",
        "  denoising": lambda r: f"{r['denoise_passes']}",
        "critical path": lambda r: f"{r['critical_path']}",
        "positions computed": lambda r: f"{r['positions']}",
        "content tokens": lambda r: f"{r['content_tokens']}",
        "content tokens per pass": lambda r: f"{r['content_tokens'] / (r['plan_passes'] + r['denoise_passes']):.1f}",
        "seconds": lambda r: f"{r['seconds']:.3f}",
    }
    head = f"{'':24}" + "".join(f"{name:>20}" for name in results)
    return [head, *(f"{name:24}" + "".join(f"{cell(r):>20}" for r in results.values()) for name, cell in rows.items())]


def show(data: str, prompt: str, delay: float, device: torch.device) -> Race:
    """Answer a prompt with the models of a data set, and compare what it took. Returns the recordings."""
    answers = []
    samplers = {name: Sampler.load(f"checkpoints/{data}/{file}.safetensors", config, device)
                for name, (file, config) in RUNS.items()}  # fmt: skip
    for name, sampler in samplers.items():
        print(f"\n=== {data}: {name}\n")
        answers.append((name.capitalize(), sampler.method.method, record(sampler.answer, prompt, Screen(delay=delay))))
    where = f"CPU threads: {torch.get_num_threads()}" if device.type == "cpu" else name_of(device)
    print(f"\n=== {data}: side by side (seconds: median of 5 answers after a warm-up, {where})\n")
    print("\n".join(table({name: measure(sampler, prompt) for name, sampler in samplers.items()})))
    return Race(prompt, answers)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--prompt", help="a prompt of your own for the chosen data set")
    parser.add_argument("--data", choices=PROMPTS, help="show only this data set's models (default: all)")
    parser.add_argument("--delay", type=float, default=0.06, help="seconds a frame stays (default: %(default)s)")
    parser.add_argument("--html", metavar="FILE", help="also write a page in which the answers race, pass by pass")
    parser.add_argument("--device", default="auto", help="where to compute (default: %(default)s)")
    args = parser.parse_args()
    if args.prompt is not None and not args.data:
        parser.error(f"--prompt needs --data {' or '.join(PROMPTS)}: each model knows one data set")
    if not 0 <= args.delay < math.inf:
        raise ValueError(f"--delay {args.delay}: expected 0 or more")
    shipped = [locate(f"checkpoints/{data}/{file}.safetensors") for data in PROMPTS for file, _ in RUNS.values()]
    refuse_overwriting(shipped, html=args.html or "")
    device = find(args.device)
    datasets = [args.data] if args.data else PROMPTS
    races = [show(data, PROMPTS[data] if args.prompt is None else args.prompt, args.delay, device) for data in datasets]
    if args.html:
        print(f"\n{write_page(args.html, races)}")


if __name__ == "__main__":
    command(main)
