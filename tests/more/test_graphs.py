"""CUDA graphs: what is recorded, how often, and that answers do not change; without a GPU with a stand-in that repeats
the recorded function on the memory that it was recorded with."""

import pytest
import torch
from test_sample import METHOD, PROMPTS, costs, ids, steered

from config import SampleConfig
from kernels.graphs import Replayed, bucket
from plumbing.settings import ROOT
from sample import Sampler

MODEL = ROOT / "checkpoints" / "tasks" / "planned.safetensors"
QUESTIONS = (
    "Tell me about the river, the food and the ruler of Brivok.",
    "Tell me about the animal of Marast.",
    "Tell me about the craft, the food, the ruler, the festival and the animal of Marast.",
)


def test_buckets_are_few_and_waste_at_most_a_third():
    sizes = range(1, 5000)
    assert all(n <= bucket(n) and 3 * (bucket(n) - n) <= bucket(n) for n in sizes)
    assert all(bucket(n) <= bucket(n + 1) and bucket(bucket(n)) == bucket(n) for n in sizes)
    assert len({bucket(n) for n in sizes}) == 25


def test_a_shape_is_recorded_once_and_then_repeated_with_what_is_given(recordings):
    double = Replayed(lambda x, y, times: times * (x + y))
    for n in (3, 2, 3, 3, 2):
        x, y = torch.rand(n), torch.rand(n)
        assert torch.equal(double(x, y, times=2), 2 * (x + y))
    assert len(recordings) == 2
    assert torch.equal(double(x, y, times=3), 3 * (x + y)) and len(recordings) == 3


def test_what_was_given_may_change_later_and_the_output_is_the_next_call_s(recordings):
    same = Replayed(lambda x: x + 0)
    given = torch.ones(2)
    first = same(given)
    given.fill_(5)
    assert first.tolist() == [1, 1]
    assert same(given) is first and first.tolist() == [5, 5]


@pytest.mark.parametrize("attention, settings", [
    ("sparse", dict()), ("dense", dict(threshold=0.6)), ("sparse", dict(order="random", temperature=0.7)),
])  # fmt: skip
def test_answers_are_those_without_graphs(request, tokenizer, attention, settings):
    config = SampleConfig(max_tokens=90, **settings)
    plain_sampler = Sampler(steered(tokenizer), tokenizer, config, METHOD[attention])
    request.getfixturevalue("as_on_a_gpu")
    samplers = plain_sampler, Sampler(steered(tokenizer), tokenizer, config, METHOD[attention])
    for prompts in (PROMPTS, PROMPTS[2:], PROMPTS[:1], PROMPTS):
        plain, replayed = (sampler.answer(prompts) for sampler in samplers)
        assert [ids(a) for a in replayed] == [ids(a) for a in plain]
        assert [costs(a) for a in replayed] == [costs(a) for a in plain]


def test_graphs_are_few_and_kept_for_the_next_answers_until_these_need_a_larger_cache(
    as_on_a_gpu, recordings, tokenizer
):
    sampler = Sampler(steered(tokenizer), tokenizer, SampleConfig(max_tokens=90))
    passes = sum(a.plan_passes + a.denoise_passes for a in sampler.answer(PROMPTS))
    few, cache = len(recordings), sampler.passes.cache
    assert few < passes / 2
    sampler.answer(PROMPTS)
    assert len(recordings) == few and sampler.passes.cache is cache
    sampler.answer(PROMPTS * 2)
    assert len(recordings) > few and sampler.passes.cache.batch == 12, "10 answers have 12 rows"


def test_float16_of_a_trained_model_gives_the_answers_of_float32():
    """The precision on a GPU, here without one: checkpoints are float16, and sums of attention float32."""
    plain, half = (Sampler.load(MODEL, SampleConfig(threshold=0.9)) for _ in range(2))
    half.model.half()
    assert [ids(a) for a in half.answer(QUESTIONS)] == [ids(a) for a in plain.answer(QUESTIONS)]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("settings", [dict(threshold=0.9), dict(steps_ratio=0.25)])
def test_on_a_gpu_a_trained_model_answers_as_on_the_cpu(settings):
    answers = [Sampler.load(MODEL, SampleConfig(**settings), device).answer(QUESTIONS) for device in ("cpu", "cuda")]
    on_cpu, on_gpu = ([ids(a) for a in part] for part in answers)
    assert on_gpu == on_cpu
