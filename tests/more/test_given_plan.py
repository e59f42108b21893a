"""Answers under a plan that somebody else has made (`--plan`)."""

import pytest
from conftest import each

from config import MethodConfig, SampleConfig
from plumbing.settings import refuse_idle
from sample import Sampler

PROMPTS = ["Tell me about the food, the river and the craft of Brivok.",
           "The baker finds two plums, then three and later four. How many are there? Count from the end and the start."]  # fmt: skip


def answered(method: str, prompt: str, **settings):
    """What the shipped joint model of the tasks answers."""
    return Sampler.load("checkpoints/tasks/joint.safetensors", SampleConfig(decode=method, **settings)).answer(
        [prompt]
    )[0]


def written(answer) -> list[tuple[str, int]]:
    return [(span.topic, span.length) for span in answer.decoded()[0].spans]


def test_under_its_own_plan_a_model_gives_its_own_answer():
    for method in each(["planned", "parallel-ar"]):
        for prompt in PROMPTS:
            for settings in ({}, {"ahead": 3}):
                own = answered(method, prompt, **settings)
                plan = "; ".join(f"{name} {length}" for name, length in written(own))
                given = answered(method, prompt, plan=plan, **settings)
                assert given.layout == own.layout and given.plan_passes < own.plan_passes and len(plan) > 10
    assert len(own.rounds) == 2  # the second round is the model's own


def test_the_first_round_has_the_given_plan_and_no_more_topics():
    for method in each(["planned", "parallel-ar"]):
        for settings in ({}, {"ahead": 3}, {"temperature": 2.0, "seed": 3}):
            answer = answered(method, PROMPTS[0], plan="food 2;  the old river 1 ; ", **settings)
            assert written(answer) == [("food", 2), ("the old river", 1)] and not answer.rounds[0].text
            assert not answer.broken


def test_a_plan_that_is_none_is_refused_by_name():
    for plan, word in each([("food", "'food'"), ("food 2; 3", "'3'"), ("food 0", "food"), ("food 65", "food"),
                            ("food -1", "food"), ("food 60; river 60", "--max_tokens")]):  # fmt: skip
        with pytest.raises(ValueError, match=word):
            answered("planned", PROMPTS[0], plan=plan)


def test_a_plan_is_refused_where_none_is_followed():
    for method in each(["ar", "block", "diffusion"]):
        with pytest.raises(ValueError, match="--plan food 2: no plan is written"):
            refuse_idle(SampleConfig(plan="food 2"), MethodConfig(method))
    with pytest.raises(ValueError, match="--plan food 2: .*--no-constrained"):
        refuse_idle(SampleConfig(plan="food 2", constrained=False), MethodConfig("planned"))
