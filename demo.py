"""Planned diffusion at work: a prompt, its plan, the spans denoising, and the same prompt answered autoregressively.

Uses the trained checkpoints that come with the project; `make demo` runs it.
"""

import argparse
import statistics
import sys

import torch

from sample import SampleConfig, Sampler
from show.terminal import Screen

PROMPTS = {  # checkpoints that ship: a prompt of the test split
    "tasks": "Tell me about the craft, the food, the ruler, the festival and the animal of Marast.",
    "recipes": "What is the recipe for Cabbage Omelette?",
}


def measure(sampler, prompt, repeats=5):
    """The answer and its median seconds, after one run of warm-up."""
    runs = [sampler.answer([prompt])[0] for _ in range(repeats + 1)][1:]
    return runs[0].result() | {"seconds": statistics.median(run.seconds for run in runs)}


def table(results):
    """Lines that set methods side by side; results: name -> `Answer.result()`."""
    rows = {
        "forward passes": lambda r: f"{r['plan_passes'] + r['denoise_passes']}",
        "  plan and text": lambda r: f"{r['plan_passes']}",
        "  denoising": lambda r: f"{r['denoise_passes']}",
        "critical path": lambda r: f"{r['critical_path']}",
        "positions computed": lambda r: f"{r['positions']}",
        "content tokens": lambda r: f"{r['content_tokens']}",
        "content tokens a pass": lambda r: f"{r['content_tokens'] / (r['plan_passes'] + r['denoise_passes']):.1f}",
        "seconds": lambda r: f"{r['seconds']:.3f}",
    }
    yield f"{'':24}" + "".join(f"{name:>20}" for name in results)
    for name, show in rows.items():
        yield f"{name:24}" + "".join(f"{show(result):>20}" for result in results.values())


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--prompt", help="a prompt of your own for the chosen data set")
    parser.add_argument("--data", choices=PROMPTS, help="show only this data set's models (default: all)")
    parser.add_argument("--delay", type=float, default=0.06, help="seconds a frame stays (default: %(default)s)")
    args = parser.parse_args()
    if args.prompt and not args.data:
        parser.error(f"--prompt needs --data {' or '.join(PROMPTS)}: each model knows one data set")
    torch.set_num_threads(min(2, torch.get_num_threads()))
    for data in [args.data] if args.data else PROMPTS:
        show(data, args.prompt or PROMPTS[data], args.delay)


def show(data, prompt, delay):
    names = {"planned diffusion": "planned", "autoregressive": "ar"}
    samplers = {
        name: Sampler.load(f"checkpoints/{data}/{file}.safetensors", SampleConfig()) for name, file in names.items()
    }
    for name, sampler in samplers.items():
        print(f"\n=== {data}: {name}\n")
        sampler.answer([prompt], watch=Screen(delay=delay))
    threads = torch.get_num_threads()
    print(f"\n=== {data}: side by side (seconds: median of 5 answers after a warm-up, {threads} CPU threads)\n")
    print("\n".join(table({name: measure(sampler, prompt) for name, sampler in samplers.items()})))


if __name__ == "__main__":
    try:
        main()
    except ValueError as error:
        sys.exit(f"demo.py: {error}")
