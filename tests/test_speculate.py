"""Speculative decoding writes what the larger model writes alone, in fewer of its passes."""

import pytest
import torch
from conftest import SENTENCES, small_model

from checkpoint import save_checkpoint
from measure.speculate import Speculator
from methods import MethodConfig
from sample import SampleConfig, Sampler
from tokenizer import Tokenizer

AR = MethodConfig("ar")


def related(tokenizer, seed, noise):
    """A random model and a worse copy of it: its weights plus noise."""
    large, small = small_model(tokenizer.vocab_size, seed), small_model(tokenizer.vocab_size, seed)
    weight = torch.randn(tokenizer.vocab_size, 32, generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        for n, p in enumerate(small.parameters()):
            p += noise * torch.randn(p.shape, generator=torch.Generator().manual_seed(n))
    for model in (large, small):
        model.logits = lambda hidden, n=None: hidden @ weight[:n].T
    return large, small


@pytest.mark.parametrize("noise", [0, 0.02, 1])
@pytest.mark.parametrize("max_tokens", [1, 2, 3, 5, 40])
def test_the_text_is_what_the_larger_model_writes_alone(tokenizer, noise, max_tokens):
    for seed in range(3):
        large, small = related(tokenizer, seed, noise)
        sampler = Sampler(large, tokenizer, SampleConfig(max_tokens=max_tokens), AR)
        for alone, drafted in zip(sampler.answer(SENTENCES), Speculator(sampler, small).answer(SENTENCES)):
            assert drafted.layout.token == alone.layout.token
            assert (drafted.stage, drafted.cut) == (alone.stage, alone.cut)


@pytest.mark.parametrize("ahead", [1, 3, 4])
def test_a_perfect_draft_costs_one_pass_of_the_larger_model_for_all_its_tokens_and_one_more(tokenizer, ahead):
    large, small = related(tokenizer, 0, 0)
    sampler = Sampler(large, tokenizer, SampleConfig(max_tokens=1 + 40 * (ahead + 1)), AR)
    (answer,) = Speculator(sampler, small, ahead).answer([SENTENCES[0]])
    assert len(answer.drafts[0].text) == 40 * (ahead + 1), "the model is to write until the limit"
    assert answer.plan_passes == 40 and answer.result()["draft_passes"] == 40 * ahead


def test_a_hopeless_draft_costs_a_pass_a_token_and_positions_count_what_the_larger_model_computed(tokenizer):
    large, small = related(tokenizer, 0, 0)
    small.logits = lambda hidden, n=None: -large.logits(hidden, n)
    sampler = Sampler(large, tokenizer, SampleConfig(max_tokens=30), AR)
    (alone,), (drafted,) = sampler.answer([SENTENCES[0]]), Speculator(sampler, small, 2).answer([SENTENCES[0]])
    assert drafted.plan_passes == alone.plan_passes
    assert drafted.positions == alone.positions + drafted.draft_passes


def test_models_that_cannot_draft_are_refused(tokenizer, tmp_path):
    model = small_model(tokenizer.vocab_size)
    with pytest.raises(ValueError, match="autoregressive"):
        Speculator(Sampler(model, tokenizer, SampleConfig()), model)
    with pytest.raises(ValueError, match="temperature 0"):
        Speculator(Sampler(model, tokenizer, SampleConfig(temperature=1.0), AR), model)
    other = Tokenizer(tokenizer.tokens[:-1], tokenizer.unit)
    for name, saved in (("large", tokenizer), ("small", other)):
        path = tmp_path / f"{name}.safetensors"
        save_checkpoint(path, small_model(saved.vocab_size), saved, {"method": vars(AR)})
    with pytest.raises(ValueError, match="small.safetensors has another tokenizer"):
        Speculator.load(tmp_path / "large.safetensors", tmp_path / "small.safetensors", SampleConfig())
