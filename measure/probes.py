"""What the page on the paper measures besides quality and cost: a baseline of prompts, plans that others made, bounds."""

import math
import random
import statistics
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from config import SampleConfig
from data.towns.families import COLOURS
from kernels.bench import in_turns, on_the_host
from measure.variants import POINT, SKELETON
from plumbing.device import find
from sample import Sampler
from tags import Example, Span

# ---------------------------------------------------------------- Skeleton-of-Thought


def skeleton_of_thought(path: Path, examples: list[Example], check: Callable, device: str) -> dict:
    """Quality and cost of Skeleton-of-Thought (Ning et al., arXiv 2307.15337) with a model that was shown its requests.

    One request for the skeleton, then one for each point, all points in the same batch. A pass is one of the batch.
    """
    sampler, rows = Sampler.load(path, SampleConfig(max_tokens=200), find(device)), []
    for example in examples:
        (outline,) = sampler.answer([example.prompt + SKELETON])
        points = outline.result()["text"].split(", ")
        answers = sampler.answer([example.prompt + POINT.format(", ".join(points), point) for point in points])
        results = [answer.result() for answer in (outline, *answers)]
        passes = results[0]["plan_passes"] + max(result["plan_passes"] for result in results[1:])
        text = "\n".join(result["text"] for result in results[1:])
        rows.append({"family": example.family, "exact": check(example, text).exact, "passes": passes,
                     "critical_path": passes, "positions": sum(result["positions"] for result in results),
                     "content_tokens": sum(result["content_tokens"] for result in results[1:])})  # fmt: skip
    return {"scores": {family: {key: statistics.mean(row[key] for row in rows if row["family"] == family)
                                for key in rows[0] if key != "family"}
                       for family in dict.fromkeys(row["family"] for row in rows)}}  # fmt: skip


# ---------------------------------------------------------------- plans made by others


def changed_plans(example: Example, foreign: Span, rng: random.Random) -> dict[str, list[tuple[str, int]]]:
    """Name -> a plan of the example's first round, as pairs of topic and length."""
    right = [(span.topic, span.length) for span in example.rounds[0].spans]
    place = rng.randrange(len(right))
    return {
        "the reference plan": right,
        "topics shuffled": rng.sample(right, len(right)),
        "a topic of another prompt": [*right[:place], (foreign.topic, foreign.length), *right[place + 1 :]],
        "lengths halved": [(topic, math.ceil(length / 2)) for topic, length in right],
        "lengths doubled": [(topic, 2 * length) for topic, length in right],
    }


def under_plans(path: Path, examples: list[Example], config: SampleConfig, device: str, seed: int) -> dict[str, float]:
    """Share of right spans among those that the prompt asks for and the plan has, under each of `changed_plans`."""
    sampler, rng, right = Sampler.load(path, config, find(device)), random.Random(seed), {}
    for example in examples:
        foreign = rng.choice([e for e in examples if e.family == example.family and e != example]).rounds[0].spans[0]
        wanted = {span.topic: span.text for span in example.rounds[0].spans}
        for name, plan in {"its own plan": None, **changed_plans(example, foreign, rng)}.items():
            sampler.config = config
            if plan:
                sampler.config = replace(config, plan="; ".join(f"{topic} {length}" for topic, length in plan))
            spans = sampler.answer([example.prompt])[0].decoded()[0].spans
            found = [span.text == wanted[span.topic] for span in spans if span.topic in wanted]
            missing = [topic for topic in wanted if plan is None and topic not in {span.topic for span in spans}]
            right.setdefault(name, []).extend([*found, *[False] * len(missing)])
    return {name: statistics.mean(verdicts) for name, verdicts in right.items()}


# ---------------------------------------------------------------- what independence costs


def independence(examples: list[Example]) -> dict[str, float]:
    """Of `coupled`, per answer: the total correlation of its spans given prompt and plan, in nats, and the share of
    answers that are right if each span is drawn apart from the others, as often in each colour as in the data.

    The colour is uniform over n, and all K spans have the same: each span alone has entropy log n, all of them
    together log n, so their total correlation is (K - 1) log n. Spans drawn apart agree with probability n^(1 - K);
    more often only if they prefer a colour, which the data do not.
    """
    spans = [len(example.rounds[0].spans) for example in examples if example.family == "coupled"]
    n = len(COLOURS)
    return {"total_correlation": statistics.mean((k - 1) * math.log(n) for k in spans),
            "apart": statistics.mean(n ** (1 - k) for k in spans)}  # fmt: skip


# ---------------------------------------------------------------- time


def seconds_per_answer(
    samplers: dict[str, Sampler], prompts: list[str], batch: int, repeats: int = 3
) -> dict[str, float]:
    """Median seconds of each way to sample, all measured in turns."""

    def answer_all(sampler: Sampler) -> None:
        for start in range(0, len(prompts), batch):
            sampler.answer(prompts[start : start + batch])

    calls = {name: lambda sampler=sampler: answer_all(sampler) for name, sampler in samplers.items()}
    device = torch.device(next(iter(samplers.values())).device)
    return {name: statistics.median(times) / len(prompts)
            for name, times in in_turns(calls, repeats, partial(on_the_host, device=device)).items()}  # fmt: skip


# ---------------------------------------------------------------- one number per method


def aup(points: list[tuple[float, float]], best: float) -> float:
    """Accuracy under parallelism (d3LLM, Qian et al. 2026) of (tokens per pass, quality in per cent), `best` of all.

    The area under the curve of quality over tokens per pass: a rectangle up to the slowest setting, then trapezoids, in
    which each quality counts exp(-3 (1 - quality / best)) times. Settings more than 5 points below the slowest are left out.
    """
    points = sorted(points)
    points = [(speed, quality) for speed, quality in points if quality >= points[0][1] - 5]
    weighed = [(speed, quality * math.exp(-3 * (1 - quality / best)) if quality else 0) for speed, quality in points]
    area = points[0][0] * points[0][1]
    for (x0, y0), (x1, y1) in zip(weighed, weighed[1:]):
        area += (x1 - x0) * (y0 + y1) / 2
    return area
