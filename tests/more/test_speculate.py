"""Speculative decoding writes what the larger model writes alone, in fewer of its passes."""

import itertools

import pytest
import torch
from conftest import SENTENCES, each, small_model

from config import MethodConfig, SampleConfig
from measure.speculate import Drafter, drafted_by
from sample import Sampler
from tokenizer import Tokenizer
from training.checkpoint import save_checkpoint

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


def both(tokenizer, large, small, prompts, ahead=4, method=AR, **settings):
    """The answers of the large model alone, and with the small one's drafts."""
    alone = Sampler(large, tokenizer, SampleConfig(**settings), method).answer(prompts)
    drafter = Drafter(small)
    return alone, Sampler(large, tokenizer, SampleConfig(ahead=ahead, **settings), method, drafted_by(drafter)).answer(
        prompts
    )


def test_the_text_is_what_the_larger_model_writes_alone(tokenizer):
    for seed, (noise, max_tokens, method) in each(
        enumerate(itertools.product([0, 0.02, 1], [1, 2, 3, 5, 40], ["ar", "planned"]))
    ):
        large, small = related(tokenizer, seed, noise)
        answers = both(tokenizer, large, small, SENTENCES, method=MethodConfig(method), max_tokens=max_tokens)
        for alone, drafted in zip(*answers):
            assert drafted.layout.token == alone.layout.token
            assert (drafted.phase, drafted.cut) == (alone.phase, alone.cut) == (None, alone.cut)


def test_a_perfect_draft_costs_one_pass_of_the_larger_model_for_all_its_tokens_and_one_more(tokenizer):
    """So with 4 tokens ahead no draft can make more than 5 tokens of a pass: a ceiling of the setting."""
    for ahead in each([1, 3, 4, 16]):
        large, small = related(tokenizer, 0, 0)
        _, (answer,) = both(tokenizer, large, small, SENTENCES[:1], ahead, max_tokens=1 + 20 * (ahead + 1))
        assert len(answer.rounds[0].text) == 20 * (ahead + 1), "the model is to write until the limit"
        assert answer.plan_passes == 20 and answer.draft_passes == 20 * ahead
        assert answer.accepted == answer.drafted == 20 * ahead
        assert answer.critical_path == answer.plan_passes + answer.draft_passes + 1, "the forced <eos>"


def test_a_hopeless_draft_costs_a_pass_per_token_and_positions_count_what_the_larger_model_computed(tokenizer):
    large, small = related(tokenizer, 0, 0)
    small.logits = lambda hidden, n=None: -large.logits(hidden, n)
    (alone,), (drafted,) = both(tokenizer, large, small, SENTENCES[:1], 2, max_tokens=30)
    assert drafted.plan_passes == alone.plan_passes
    assert drafted.accepted == 0 and drafted.positions == alone.positions + drafted.drafted


def test_a_drafter_with_another_tokenizer_is_refused(tokenizer, tmp_path):
    other, path = Tokenizer(tokenizer.tokens[:-1], tokenizer.unit), tmp_path / "small.safetensors"
    save_checkpoint(path, small_model(other.vocab_size), other, {"method": vars(AR)})
    with pytest.raises(ValueError, match="small.safetensors has another tokenizer"):
        Drafter.load(path, tokenizer, "cpu")
