"""Time training and sampling of planned diffusion beside autoregression: same code, same sizes, one run.

    python measure/bench.py                                          # the shipped models of data/tasks
    python measure/bench.py --preset gpu --compile                   # training of a larger model, on a GPU
    python measure/bench.py --planned runs/a/model.safetensors --ar runs/b/model.safetensors --batch 1 64 --prompts 64

All that is compared is measured in turns; figures are medians, with quartiles. Warm-up is excluded and the device
synchronised. (kernels/bench.py times attention alone.)
"""

import argparse
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the project's modules

import torch
import torch.nn.functional as F

from config import MethodConfig, SampleConfig, TrainConfig
from data import read_split
from decode import Answer
from measure.frontier import PRESETS
from measure.quality import aligned
from model import ModelConfig, Transformer
from plumbing.device import find, name_of, synchronize, utilization
from plumbing.settings import add_settings, command, locate, pick
from sample import Passes, Sampler
from train import Trainer


def in_turns(calls: dict[str, Callable], repeats: int, device: torch.device) -> dict[str, list[float]]:
    """Seconds of each of `repeats` rounds of calls, after one round that is not counted."""
    seconds = {name: [] for name in calls}
    for repeat in range(repeats + 1):
        for name, call in calls.items():
            synchronize(device)
            start = time.perf_counter()
            call()
            synchronize(device)
            seconds[name] += [time.perf_counter() - start] if repeat else []
    return seconds


def spread(values: list[float], form: str) -> str:
    """Median and quartiles for a reader."""
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return f"{form % median} ({form % low} to {form % high})"


# ---------------------------------------------------------------- training


def trainers(args: argparse.Namespace) -> dict[str, Trainer]:
    """One per method, of the same model, data and settings."""
    preset, parser = PRESETS[args.preset], argparse.ArgumentParser()
    add_settings(parser, TrainConfig, ModelConfig)
    where = f"--data {args.data} --attention {args.attention} --device {args.device}"
    shape = parser.parse_args(f"{preset.train} {preset.common} {where}".split())
    shape.compile = args.compile
    return {method: Trainer(pick(TrainConfig, shape), pick(ModelConfig, shape), MethodConfig(method))
            for method in ("ar", "planned", "dense", "parallel-ar")}  # fmt: skip


def bench_training(args: argparse.Namespace) -> None:
    """Print tokens/s of each method's training, also as a share of autoregressive training."""
    trained, tokens, flops = trainers(args), {}, {}
    print(f"\nTraining on {args.data}, {args.updates} updates per turn, median and quartiles of {args.repeats}")

    def train(method: str) -> None:
        trainer = trained[method]
        before = trainer.progress.tokens, trainer.progress.flops
        for _ in range(args.updates):
            trainer.update()
        tokens.setdefault(method, []).append(trainer.progress.tokens - before[0])
        flops.setdefault(method, []).append(trainer.progress.flops - before[1])

    seconds = in_turns({method: lambda m=method: train(m) for method in trained}, args.repeats, find(args.device))
    speed = {m: [n / s for n, s in zip(tokens[m][1:], seconds[m])] for m in trained}  # the first turn warms up
    rows = []
    for method, trainer in trained.items():
        used = utilization(sum(flops[method][1:]) / sum(seconds[method]), trainer.device)
        relative = statistics.median(speed[method]) / statistics.median(speed["ar"])
        rows.append([method, spread(speed[method], "%.0f"), f"{relative:.2f}", used])
    print(*aligned(["method", "tokens/s", "of ar", "computed"], rows), sep="\n")


# ---------------------------------------------------------------- sampling


class Measured(Passes):
    """Passes that note how many positions each of them computes, padding included."""

    def forward(self, layouts: list, entries: list[list[int]], readings: list, rows: list[int]) -> torch.Tensor:
        self.widths.append((len(rows), max(map(len, entries))))
        return super().forward(layouts, entries, readings, rows)


def matrix_products(model: Transformer, widths: list[tuple[int, int]]) -> None:
    """Only the products with weights that passes of these (batch, positions) need, without attention or logits."""
    weights = [w for block in model.blocks for w in block.parameters() if w.ndim == 2]
    with torch.inference_mode():
        for batch, positions in widths:
            for weight in weights:
                F.linear(weight.new_zeros(batch, positions, weight.shape[1]), weight)


def bandwidth(device: torch.device) -> float:
    """Bytes/s that the device reads and writes in copying 256 MiB."""
    source = torch.zeros(1 << 26, device=device)
    copy = torch.empty_like(source)
    return 2 * source.nbytes / statistics.median(in_turns({"": lambda: copy.copy_(source)}, 5, device)[""])


def samplers(args: argparse.Namespace) -> dict[str, Sampler]:
    """What is compared: the autoregressive model, and the planned one with two ways to denoise."""
    runs = {
        "ar": (args.ar, SampleConfig()),
        f"planned, steps_ratio {args.steps_ratio}": (args.planned, SampleConfig(steps_ratio=args.steps_ratio)),
        f"planned, threshold {args.threshold}": (args.planned, SampleConfig(threshold=args.threshold)),
    }
    loaded = {name: Sampler.load(path, config, find(args.device)) for name, (path, config) in runs.items()}
    for sampler in loaded.values():
        sampler.passes = Measured(sampler.model)
        if args.compile:
            sampler.model.compile(dynamic=True)
    return loaded


def answer_all(sampler: Sampler, prompts: list[str], batch: int) -> list[Answer]:
    sampler.passes.widths = []
    return [a for i in range(0, len(prompts), batch) for a in sampler.answer(prompts[i : i + batch])]


def bench_sampling(args: argparse.Namespace) -> None:
    """Print seconds per batch of prompts of both models, and how far they are from what the device could do."""
    prompts = [e.prompt for e in read_split(locate(args.data) / "test.jsonl") if e.rounds[0].spans][: args.prompts]
    if len(prompts) < max(args.batch):
        raise ValueError(f"--batch {max(args.batch)}: more than the {len(prompts)} prompts of --data and --prompts")
    compared, device = samplers(args), find(args.device)
    rate = bandwidth(device)
    print(f"\nSampling {len(prompts)} answers: median and quartiles of {args.repeats}; the time beside that of the",
          "bare matrix products, and beside that of reading all weights once per pass at",
          f"{rate / 1e9:.0f} GB/s, as fast as the device copies. CPU threads: {torch.get_num_threads()}", sep="\n")  # fmt: skip
    for batch in args.batch:
        answers = {}

        def answer(name: str) -> None:
            answers[name] = answer_all(compared[name], prompts, batch)

        calls = {name: lambda n=name: answer(n) for name in compared}
        calls |= {f"{n} products": lambda s=s: matrix_products(s.model, s.passes.widths) for n, s in compared.items()}
        seconds = in_turns(calls, args.repeats, device)
        speeds, costs = [], []
        for name, sampler in compared.items():
            median, bare, ar = (statistics.median(seconds[key]) for key in (name, f"{name} products", "ar"))
            tokens, passes = sum(a.result()["content_tokens"] for a in answers[name]), len(sampler.passes.widths)
            floor = passes * sum(weight.nbytes for weight in sampler.model.parameters()) / rate
            per_answer = spread([1e3 * s / len(prompts) for s in seconds[name]], "%.0f")
            speeds.append([name, per_answer, f"{tokens / median:.0f}", f"{ar / median:.2f}"])
            times = f"{1e3 * median / passes:.2f}", f"{median / bare:.1f}", f"{median / floor:.0f}"
            costs.append([name, str(passes), *times])
        print("", *aligned([f"batch {batch}", "ms per answer", "tokens/s", "speed / ar"], speeds), sep="\n")
        heads = [f"batch {batch}", "passes", "ms per pass", "/ products", "/ reading"]
        print("", *aligned(heads, costs), sep="\n", flush=True)


def options() -> argparse.Namespace:
    """The command line. Raises ValueError for numbers with which nothing can be timed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=("both", "training", "sampling"), default="both", help="(default: both)")
    parser.add_argument("--preset", choices=PRESETS, default="tasks", help="model, of frontier.py (default: tasks)")
    parser.add_argument("--data", default="data/tasks", help="data set (default: %(default)s)")
    parser.add_argument("--device", default="auto", help="where to compute (default: %(default)s)")
    parser.add_argument("--attention", default="auto", help="what computes attention in training (default: auto)")
    parser.add_argument("--compile", action="store_true", help="torch.compile what is trained and what samples")
    parser.add_argument("--updates", type=int, default=10, help="per turn of training (default: %(default)s)")
    parser.add_argument("--planned", default="checkpoints/tasks/planned.safetensors", help="(default: %(default)s)")
    parser.add_argument("--ar", default="checkpoints/tasks/ar.safetensors", help="its baseline (default: %(default)s)")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8], help="prompts at once (default: 1 8)")
    parser.add_argument("--prompts", type=int, default=8, help="answered per turn (default: %(default)s)")
    parser.add_argument("--steps_ratio", type=float, default=0.5, help="one way to denoise (default: %(default)s)")
    parser.add_argument("--threshold", type=float, default=0.9, help="another way to (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=5, help="turns of everything (default: %(default)s)")
    args = parser.parse_args()
    least = {"repeats": 2, "updates": 1, "prompts": 1}  # 2: for quartiles
    given = [*((name, getattr(args, name), number) for name, number in least.items()),
             *(("batch", batch, 1) for batch in args.batch)]  # fmt: skip
    for name, value, number in given:
        if value < number:
            raise ValueError(f"--{name} {value}: expected at least {number}")
    return args


def main() -> None:
    args = options()
    device, cpu = find(args.device), platform.processor() or platform.machine()
    named = f"{cpu} CPU" if device.type == "cpu" else name_of(device)
    print(f"{named}, torch {torch.__version__}")
    if args.part != "training":  # first: after training, the same sampling took twice as long on a CPU
        bench_sampling(args)
    if args.part != "sampling":
        bench_training(args)


if __name__ == "__main__":
    command(main)
