"""Time training and sampling of planned diffusion beside autoregression: same code, same sizes, one run.

    python measure/bench.py                                          # the shipped models of data/tasks
    python measure/bench.py --preset gpu --compile                   # training of a larger model, on a GPU
    python measure/bench.py --planned runs/a/model.safetensors --ar runs/b/model.safetensors --batch 1 64 --prompts 64

All that is compared is measured in turns; figures are medians, with quartiles. Warm-up is excluded and the device
synchronised. (kernels/bench.py times attention alone.)
"""

import argparse
import json
import platform
import statistics
import sys
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the project's modules

import torch
import torch.nn.functional as F

from config import METHODS, MethodConfig, SampleConfig, TrainConfig
from data import read_split
from decode import Answer
from kernels.bench import in_turns, on_the_host, quartiles
from measure.quality import aligned
from model import ModelConfig, Transformer
from plumbing.device import find, name_of, utilization
from plumbing.settings import Help, add_settings, command, locate, pick
from sample import Passes, Sampler
from train import Trainer

PRESETS = {  # the shape of what is trained, and its batches
    "tasks": "",
    "gpu": "--d_model 512 --n_head 8 --n_kv_head 4 --d_ff 1536 --n_layer 8 --batch 32",
    "tiny": "--d_model 32 --n_head 1 --n_kv_head 1 --d_ff 32 --n_layer 1 --batch 2",  # to try this script
}


def spread(values: list[float], form: str) -> str:
    """Median and quartiles for a reader."""
    low, median, high = quartiles(values)
    return f"{form % median} ({form % low} to {form % high})"


def show(heads: list[str], rows: list[list[str]], as_json: bool) -> None:
    """Print a table, or a JSON object per row."""
    objects = (json.dumps({"what": f"{name}, {heads[0]}", **dict(zip(heads[1:], row))}) for name, *row in rows)
    print("", *(objects if as_json else aligned(heads, rows)), sep="\n", flush=True)


# ---------------------------------------------------------------- training


def trainers(args: argparse.Namespace) -> dict[str, Trainer]:
    """One per method, of the same model, data and settings."""
    parser = argparse.ArgumentParser()
    add_settings(parser, TrainConfig, ModelConfig)
    where = f"--data {args.data} --attention {args.attention} --device {args.device}"
    shape = parser.parse_args(f"{PRESETS[args.preset]} {where}".split())
    shape.compile = args.compile
    return {method: Trainer(pick(TrainConfig, shape), pick(ModelConfig, shape), MethodConfig(method))
            for method in args.methods}  # fmt: skip


def bench_training(args: argparse.Namespace) -> None:
    """Print tokens/s of each method's training, also as a share of the first one's."""
    trained, tokens, flops = trainers(args), {}, {}
    print(f"\nTraining on {args.data}, {args.updates} updates per turn, median and quartiles of {args.repeats}")

    def train(method: str) -> None:
        trainer = trained[method]
        before = trainer.progress.tokens, trainer.progress.flops
        for _ in range(args.updates):
            trainer.update()
        tokens.setdefault(method, []).append(trainer.progress.tokens - before[0])
        flops.setdefault(method, []).append(trainer.progress.flops - before[1])

    timed = partial(on_the_host, device=find(args.device))
    seconds = in_turns({method: partial(train, method) for method in trained}, args.repeats, timed)
    speed = {m: [n / s for n, s in zip(tokens[m][1:], seconds[m])] for m in trained}  # the first turn warms up
    rows = []
    for method, trainer in trained.items():
        used = utilization(sum(flops[method][1:]) / sum(seconds[method]), trainer.device)
        relative = statistics.median(speed[method]) / statistics.median(speed[args.methods[0]])
        rows.append([method, spread(speed[method], "%.0f"), f"{relative:.2f}", used])
    kind = f"{args.preset}, compiled" if args.compile else args.preset
    show([kind, "tokens/s", f"of {args.methods[0]}", "computed"], rows, args.json)


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
    timed = partial(on_the_host, device=device)
    return 2 * source.nbytes / statistics.median(in_turns({"": lambda: copy.copy_(source)}, 5, timed)[""])


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

        calls = {name: partial(answer, name) for name in compared}
        calls |= {f"{n} products": lambda s=s: matrix_products(s.model, s.passes.widths) for n, s in compared.items()}
        seconds = in_turns(calls, args.repeats, partial(on_the_host, device=device))
        speeds, costs = [], []
        for name, sampler in compared.items():
            median, bare, ar = (statistics.median(seconds[key]) for key in (name, f"{name} products", "ar"))
            tokens, passes = sum(a.result()["content_tokens"] for a in answers[name]), len(sampler.passes.widths)
            floor = passes * sum(weight.nbytes for weight in sampler.model.parameters()) / rate
            per_answer = spread([1e3 * s / len(prompts) for s in seconds[name]], "%.0f")
            speeds.append([name, per_answer, f"{tokens / median:.0f}", f"{ar / median:.2f}"])
            times = f"{1e3 * median / passes:.2f}", f"{median / bare:.1f}", f"{median / floor:.0f}"
            costs.append([name, str(passes), *times])
        show([f"batch {batch}", "ms per answer", "tokens/s", "speed / ar"], speeds, args.json)
        show([f"batch {batch}", "passes", "ms per pass", "/ products", "/ reading"], costs, args.json)


def options() -> argparse.Namespace:
    """The command line. Raises ValueError for numbers with which nothing can be timed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=Help)
    parser.add_argument("--part", choices=("both", "training", "sampling"), default="both", help="(default: both)")
    parser.add_argument(
        "--preset", choices=PRESETS, default="tasks", help="model and batch that train (default: tasks)"
    )
    parser.add_argument("--data", default="data/tasks", help="data set (default: %(default)s)")
    parser.add_argument("--device", default="auto", help="where to compute (default: %(default)s)")
    parser.add_argument("--attention", default="auto", help="what computes attention in training (default: auto)")
    parser.add_argument("--compile", action="store_true", help="torch.compile what is trained and what samples")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=["ar", "planned", "dense", "parallel-ar"],
                        metavar="METHOD", help="trained: %(choices)s; the first is what others are compared with "
                        "(default: %(default)s)")  # fmt: skip
    parser.add_argument("--updates", type=int, default=10, help="per turn of training (default: %(default)s)")
    parser.add_argument("--planned", default="checkpoints/tasks/planned.safetensors", help="(default: %(default)s)")
    parser.add_argument("--ar", default="checkpoints/tasks/ar.safetensors", help="its baseline (default: %(default)s)")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8], help="prompts at once (default: 1 8)")
    parser.add_argument("--prompts", type=int, default=8, help="answered per turn (default: %(default)s)")
    parser.add_argument("--steps_ratio", type=float, default=0.5, help="one way to denoise (default: %(default)s)")
    parser.add_argument("--threshold", type=float, default=0.9, help="another way to (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=5, help="turns of everything (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="print rows as JSON objects")
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
