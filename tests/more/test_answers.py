"""Answers in great numbers, and under every setting of the sampler."""

import pytest
from conftest import each
from test_methods import ALL
from test_methods_answers import PROMPTS
from test_sample import costs, steered

from config import SampleConfig
from plumbing.settings import refuse_idle
from sample import Sampler
from tags import parse_answer


@pytest.fixture(scope="module")
def planner(tokenizer):
    return steered(tokenizer, topic=8.0, length=9.0, sync=6.0, eos=4.0, pad=9.0)


@pytest.fixture(scope="module")
def writer(tokenizer):
    """A model that fills a few blocks before its first [PAD]."""
    return steered(tokenizer, 1, pad=6.0)


CHANGES = [dict(steps_ratio=0.1), dict(threshold=0.1), dict(order="random"), dict(apart=False),
           dict(pads_last=False), dict(length_scale=2.0), dict(ahead=2), dict(constrained=False),
           dict(temperature=1.0, top_p=0.5), dict(threshold=0.1, order="margin"), dict(threshold=0.1, steps_ratio=0.1),
           dict(top_p=0.5), dict(threshold=0.9, apart=False), dict(threshold=0.9, pads_last=False)]  # fmt: skip


def test_a_setting_that_would_change_no_answer_is_refused(planner, writer, tokenizer):
    """What is refused changes nothing, checked by sampling without the check; what acts somewhere is taken there."""
    for method in each(ALL):
        model, taken = writer if method.plan == "given" else planner, []
        for change in CHANGES:
            try:
                refuse_idle(SampleConfig(**change), method)
                taken.append(change)
            except ValueError as error:
                name = str(error).removeprefix("--").removeprefix("no-").split(":")[0].split()[0]
                without = {setting: value for setting, value in change.items() if setting != name}
                configs = (SampleConfig(max_tokens=40, **settings) for settings in (without, change))
                before, after = (Sampler(model, tokenizer, config, method).answer(PROMPTS[:2]) for config in configs)
                assert [(a.layout, costs(a)) for a in before] == [(a.layout, costs(a)) for a in after]
        noised = 8 if method.plan != "none" and method.attention != "causal" else 0
        assert len(taken) == noised + 1 + (method.plan == "written") + 2 * (method.plan != "given")
        refuse_idle(SampleConfig(), method)


@pytest.mark.parametrize("bias", [dict(pad=0.0), dict(topic=4.0, length=3.0, sync=3.0)])
def test_hundreds_of_plans_of_an_untrained_model_all_parse(tokenizer, bias):
    planned = 0
    for seed in range(0, 250, 50):
        config = SampleConfig(temperature=1.5, max_tokens=40, steps_ratio=0.01, length_scale=0.5, seed=seed)
        for answer in Sampler(steered(tokenizer, seed, 0.2, **bias), tokenizer, config).answer([""] * 50):
            result = answer.result()
            rounds = [{"text": r.text, "plan": [{"topic": s.topic, "length": s.length} for s in r.spans],
                       "spans": [s.text for s in r.spans]} for r in parse_answer(result["tagged"])]  # fmt: skip
            assert rounds == result["rounds"]
            planned += sum(bool(r["plan"]) for r in rounds)
    assert planned > 10
