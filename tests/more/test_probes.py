"""Probes of the page on the paper, each beside a naive version, a stand-in for the sampler, or numbers by hand."""

import itertools
import json
import math
import random
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import each

from config import SampleConfig
from data.tasks.families import build_world, lookups
from data.towns.families import COLOURS, FAMILIES, check
from measure import probes, variants
from plumbing.settings import ROOT
from tags import Example, Round, Span, plain_text
from tokenizer import Tokenizer


def naive_aup(points, best):
    """The area under a polygon, by many thin strips."""
    points = sorted(points)
    points = [point for point in points if point[1] >= points[0][1] - 5]
    x, y = np.array(points).T
    weight = np.exp(-3 * (1 - y / best))
    strips = np.linspace(x[0], x[-1], 200001)
    return x[0] * y[0] + np.interp(strips, x, y * weight).mean() * (x[-1] - x[0])


def test_the_area_under_quality_over_parallelism():
    for points, best, area in each([
        ([(2, 80)], 100, 160),  # one setting: its rectangle
        ([(1, 50), (2, 50)], 50, 100), ([(2, 50), (1, 50)], 50, 100),
        ([(1, 100), (3, 98)], 100, 100 + 100 + 98 * math.exp(-0.06)),
        ([(1, 100), (3, 98), (9, 94.9)], 100, 100 + 100 + 98 * math.exp(-0.06)),  # more than 5 points lost
        ([(1, 0), (2, 0)], 0, 0),
    ]):  # fmt: skip
        assert probes.aup(points, best) == pytest.approx(area)
    rng = random.Random(0)
    for _ in range(20):
        points = [(rng.uniform(1, 9), rng.uniform(88, 100)) for _ in range(6)]
        assert probes.aup(points, 100) == pytest.approx(naive_aup(points, 100), rel=1e-3)
    assert probes.aup([(1, 90), (4, 90)], 100) < probes.aup([(1, 90), (4, 90)], 90), "far from the best counts less"


def test_what_independence_costs_is_what_the_joint_distribution_says():
    n, entropy = len(COLOURS), lambda p: -sum(q * math.log(q) for q in p if q)
    for k in each((2, 3)):
        joint = {colours: (len({*colours}) == 1) / n for colours in itertools.product(range(n), repeat=k)}
        alone = [[sum(p for c, p in joint.items() if c[i] == colour) for colour in range(n)] for i in range(k)]
        apart = sum(math.prod(alone[i][c[i]] for i in range(k)) for c in joint if len({*c}) == 1)
        example = Example("", (Round(spans=(Span("flag", ""),) * k),), "coupled")
        found = probes.independence([example, Example("", (Round("text"),), "sums")])
        assert found["total_correlation"] == pytest.approx(sum(map(entropy, alone)) - entropy(joint.values()))
        assert found["apart"] == pytest.approx(apart)


class Script:
    """A sampler whose answers are written down: prompt or plan -> a result, or spans."""

    def __init__(self, results):
        self.results, self.asked, self.config = results, [], SampleConfig()

    def answer(self, prompts):
        self.asked.append(prompts)
        found = [self.results[self.config.plan if self.config.plan in self.results else prompt] for prompt in prompts]
        return [SimpleNamespace(result=lambda r=r: r, decoded=lambda r=r: [Round(spans=r)]) for r in found]


def scripted(monkeypatch, results):
    sampler = Script(results)
    monkeypatch.setattr(probes, "Sampler", SimpleNamespace(load=lambda path, config, device: sampler))
    return sampler


def test_skeleton_of_thought_asks_what_its_model_was_shown_and_counts_the_points_as_one_batch(monkeypatch):
    example = FAMILIES["sums"](random.Random(0), None)
    shown = [*variants.skeleton(example, Tokenizer.train([plain_text(example.rounds)], 400, 5))]
    result = lambda n, e: {
        "text": plain_text(e.rounds),
        "plan_passes": 10 + n,
        "positions": 100 + n,
        "content_tokens": n + 1,
    }
    sampler = scripted(monkeypatch, {e.prompt: result(n, e) for n, e in enumerate(shown)})
    scores = probes.skeleton_of_thought("", [example] * 2, check, "cpu")["scores"]["sums"]
    assert sampler.asked == [[shown[0].prompt], [e.prompt for e in shown[1:]]] * 2 and len(shown) == 5
    assert (scores["passes"], scores["positions"], scores["content_tokens"]) == (10 + 14, 510, 14)
    assert scores["exact"] == 1
    sampler.results[shown[2].prompt]["text"] = "wrong"
    assert probes.skeleton_of_thought("", [example], check, "cpu")["scores"]["sums"]["exact"] == 0


def test_changed_plans_differ_from_the_reference_in_what_they_say():
    spans = tuple(Span(topic, "", length) for topic, length in (("a", 1), ("b", 2), ("c", 3), ("d", 5)))
    right, foreign = [(s.topic, s.length) for s in spans], Span("foreign", "", 7)
    seen = []
    for seed in range(20):
        plans = probes.changed_plans(Example("", (Round(spans=spans),)), foreign, random.Random(seed))
        assert plans["the reference plan"] == right and sorted(plans["topics shuffled"]) == right
        others = [(n, pair) for n, pair in enumerate(plans["a topic of another prompt"]) if pair != right[n]]
        assert [pair for _, pair in others] == [("foreign", 7)] and len(plans["a topic of another prompt"]) == 4
        assert plans["lengths halved"] == [("a", 1), ("b", 1), ("c", 2), ("d", 3)]
        assert plans["lengths doubled"] == [("a", 2), ("b", 4), ("c", 6), ("d", 10)]
        seen.append((others[0][0], *plans["topics shuffled"]))
    assert len({*seen}) > 10 and {place for place, *_ in seen} == {0, 1, 2, 3}


def test_under_its_own_plan_a_missing_topic_is_a_wrong_span_and_a_foreign_one_is_not_counted(monkeypatch):
    made = lambda **texts: tuple(Span(topic, text, 2) for topic, text in texts.items())
    examples = [
        Example("one", (Round(spans=made(a="A", b="B")),), "f"),
        Example("two", (Round(spans=made(c="C", d="D")),), "f"),
    ]
    scripted(monkeypatch, {"one": made(a="A", more="M"), "two": made(c="C", d="D"), "a 2; b 2": made(a="A", b="wrong"),
                           "a 2; c 2": made(a="A", c="x"), "c 2; b 2": made(c="x", b="B")})  # fmt: skip
    found = probes.under_plans("", examples, SampleConfig(), "cpu", 0)
    assert found["its own plan"] == 3 / 4 and found["the reference plan"] == 3 / 4
    assert found["a topic of another prompt"] == 1


def test_the_shipped_model_follows_plans_that_others_made():
    """Its spans know their topic and need their length; their order does not matter to them."""
    path, rng, world = ROOT / "checkpoints/tasks/planned.safetensors", random.Random(5), build_world(0, "test")
    tokenizer = probes.Sampler.load(path, SampleConfig(), "cpu").tokenizer
    examples = [lookups(rng, world) for _ in range(3)]
    examples = [replace(e, rounds=(Round(spans=tuple(replace(s, length=tokenizer.units(s.text))
                                                     for s in e.rounds[0].spans)),)) for e in examples]  # fmt: skip
    found = probes.under_plans(path, examples, SampleConfig(threshold=0.9), "cpu", 0)
    assert found["its own plan"] == found["the reference plan"] == found["topics shuffled"] == 1
    assert found["lengths halved"] == 0


def test_seconds_are_measured_in_turns_and_per_answer(monkeypatch):
    order = []

    class Timed:
        device = "cpu"

        def __init__(self, name):
            self.answer = lambda prompts: order.append((name, len(prompts)))

    clock = itertools.count()
    monkeypatch.setattr("time.perf_counter", lambda: next(clock))  # each call takes a second
    found = probes.seconds_per_answer({name: Timed(name) for name in "ab"}, ["prompt"] * 5, 2, repeats=2)
    assert order == [(name, n) for _ in range(3) for name in "ab" for n in (2, 2, 1)]
    assert found == {"a": 1 / 5, "b": 1 / 5} and json.dumps(found)
