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
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the project's modules

import torch
import torch.nn.functional as F

from data import read_split
from measure.frontier import PRESETS
from methods import MethodConfig
from model import ModelConfig
from sample import SampleConfig, Sampler
from settings import add_settings, locate, pick
from train import TrainConfig, Trainer, utilization


def synchronized():
    """The time, when the device has done all it was given."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def in_turns(calls, repeats):
    """name -> seconds of each of `repeats` calls, after one that is not counted."""
    seconds = {name: [] for name in calls}
    for repeat in range(repeats + 1):
        for name, call in calls.items():
            start = synchronized()
            call()
            seconds[name] += [synchronized() - start] if repeat else []
    return seconds


def spread(values, form):
    """Median and quartiles for a reader."""
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return f"{form % median} ({form % low} to {form % high})"


# ---------------------------------------------------------------- training


def bench_training(args):
    """Tokens/s of each method's training, and as a share of autoregressive training."""
    print(f"\nTraining on {args.data}, {args.updates} updates a turn: tokens/s, median and quartiles of {args.repeats}")
    preset, parser = PRESETS[args.preset], argparse.ArgumentParser()
    add_settings(parser, TrainConfig, ModelConfig)
    shape = parser.parse_args(f"{preset.train} {preset.common} --data {args.data} --attention {args.attention}".split())
    with tempfile.TemporaryDirectory() as folder:
        trainers = {}
        for method in ("ar", "planned", "dense", "parallel-ar"):
            shape.out, shape.compile = f"{folder}/{method}", args.compile
            trainers[method] = Trainer(pick(TrainConfig, shape), pick(ModelConfig, shape), MethodConfig(method))
        done = {method: [] for method in trainers}

        def train(method):
            trainer = trainers[method]
            tokens, work = trainer.tokens, trainer.work
            for _ in range(args.updates):
                trainer.update()
            done[method].append((trainer.tokens - tokens, trainer.work - work))

        seconds = in_turns({method: lambda m=method: train(m) for method in trainers}, args.repeats)
    speed = {m: [n / s for (n, _), s in zip(done[m][1:], seconds[m])] for m in trainers}
    for method, trainer in trainers.items():
        flops = sum(work for _, work in done[method][1:]) / sum(seconds[method])
        share = statistics.median(speed[method]) / statistics.median(speed["ar"])
        print(f"{method:>12}  {spread(speed[method], '%.0f')}  {share:.2f} of ar {utilization(flops, trainer.device)}")


# ---------------------------------------------------------------- sampling


class Measured(Sampler):
    """A sampler that notes how many positions each pass computes, padding included."""

    def forward(self, live, entries, readings, rows):
        self.widths.append((len(live), max(map(len, entries))))
        return super().forward(live, entries, readings, rows)


def matrix_products(model, widths):
    """Only the products with weights that passes of these (batch, positions) need, without attention or logits."""
    weights = [w for block in model.blocks for w in block.parameters() if w.ndim == 2]
    with torch.inference_mode():
        for batch, positions in widths:
            for weight in weights:
                F.linear(weight.new_zeros(batch, positions, weight.shape[1]), weight)


def bandwidth(device):
    """Bytes/s that the device reads and writes in copying 256 MiB."""
    source = torch.zeros(1 << 26, device=device)
    copy = torch.empty_like(source)
    return 2 * source.nbytes / statistics.median(in_turns({"copy": lambda: copy.copy_(source)}, 5)["copy"])


def bench_sampling(args):
    """Seconds a batch of prompts of both models, and how far they are from what the device could do."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    runs = {
        "ar": (args.ar, SampleConfig()),
        f"planned, steps_ratio {args.steps_ratio}": (args.planned, SampleConfig(steps_ratio=args.steps_ratio)),
        f"planned, threshold {args.threshold}": (args.planned, SampleConfig(threshold=args.threshold)),
    }
    samplers = {name: Measured.load(path, config, device) for name, (path, config) in runs.items()}
    if args.compile:
        for sampler in samplers.values():
            sampler.model.compile(dynamic=True)
    prompts = [e.prompt for e in read_split(locate(args.data) / "test.jsonl") if e.rounds[0].spans][: args.prompts]
    if len(prompts) < max(args.batch):
        raise ValueError(f"--batch {max(args.batch)}: more than the {len(prompts)} prompts of --data and --prompts")
    rate = bandwidth(device)
    print(f"\nSampling {len(prompts)} answers: ms an answer, median and quartiles of {args.repeats}; tokens/s;")
    print("passes; the time beside that of the bare matrix products, and beside that of reading all weights once a")
    print(f"pass, at {rate / 1e9:.0f} GB/s, as fast as the device copies")
    for batch in args.batch:
        answers = {}

        def answer(name):
            samplers[name].widths, parts = [], range(0, len(prompts), batch)
            answers[name] = [a for i in parts for a in samplers[name].answer(prompts[i : i + batch])]

        calls = {name: lambda n=name: answer(n) for name in samplers}
        calls |= {f"{n} products": lambda s=s: matrix_products(s.model, s.widths) for n, s in samplers.items()}
        seconds = in_turns(calls, args.repeats)
        for name, sampler in samplers.items():
            median, bare = (statistics.median(seconds[key]) for key in (name, f"{name} products"))
            tokens = sum(a.result()["content_tokens"] for a in answers[name])
            passes, faster = len(sampler.widths), statistics.median(seconds["ar"]) / median
            floor = passes * sum(weight.nbytes for weight in sampler.model.parameters()) / rate
            print(f"batch {batch:3}  {name:25}{spread([1e3 * s / len(prompts) for s in seconds[name]], '%.1f')} ms  "
                  f"{tokens / median:.0f} tokens/s  {passes} passes of {1e3 * median / passes:.2f} ms  "
                  f"{median / bare:.1f} x products  {median / floor:.0f} x reading  {faster:.2f} x as fast as ar",
                  flush=True)  # fmt: skip


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=("both", "training", "sampling"), default="both", help="(default: both)")
    parser.add_argument("--preset", choices=PRESETS, default="tasks", help="model, of frontier.py (default: tasks)")
    parser.add_argument("--data", default="data/tasks", help="data set (default: %(default)s)")
    parser.add_argument("--attention", default="auto", help="what computes attention in training (default: auto)")
    parser.add_argument("--compile", action="store_true", help="torch.compile what is trained and what samples")
    parser.add_argument("--updates", type=int, default=10, help="of each turn of training (default: %(default)s)")
    parser.add_argument("--planned", default="checkpoints/tasks/planned.safetensors", help="(default: %(default)s)")
    parser.add_argument("--ar", default="checkpoints/tasks/ar.safetensors", help="its baseline (default: %(default)s)")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8], help="prompts at once (default: 1 8)")
    parser.add_argument("--prompts", type=int, default=8, help="answered in a turn (default: %(default)s)")
    parser.add_argument("--steps_ratio", type=float, default=0.5, help="one way to denoise (default: %(default)s)")
    parser.add_argument("--threshold", type=float, default=0.9, help="another way to (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=5, help="turns of everything (default: %(default)s)")
    args = parser.parse_args()
    if args.repeats < 2:
        sys.exit(f"bench.py: --repeats {args.repeats}: expected 2 or more, for there are quartiles")
    cuda = torch.cuda.is_available()
    device = torch.cuda.get_device_name() if cuda else f"{platform.processor() or platform.machine()} CPU"
    print(f"{device}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    try:
        if args.part != "training":  # first: after training, the same sampling took twice as long on a CPU
            bench_sampling(args)
        if args.part != "sampling":
            bench_training(args)
    except ValueError as error:
        sys.exit(f"bench.py: {error}")


if __name__ == "__main__":
    main()
