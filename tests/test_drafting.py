"""Drafting ahead: what is written is what one token per pass would have written, in fewer passes."""

import itertools
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import SENTENCES, each, random_example
from test_methods_answers import Perfect, fluent, sampled  # noqa: F401  (a fixture)
from test_sample import ids, steered

from config import MethodConfig, SampleConfig
from course.small import bigrams, enumerated
from decode import Reply
from drafting import decoding
from methods import encode
from sample import Sampler
from tags import Example, Round

WRITERS = [MethodConfig(name) for name in ("ar", "planned", "dense", "parallel-ar")]
PROMPTS = (SENTENCES[3], SENTENCES[0], "the otter swims", "")


class Forgetful(Perfect):
    """Predicts an example's tokens, but at a third of the draft slots a wrong one."""

    def __init__(self, layout, tokenizer, wrong=3):
        super().__init__(layout, tokenizer)
        self.mask, self.wrong, self.causal = tokenizer.mask, wrong, layout.attention == "causal"
        self.table = torch.cat([self.table, (self.table + 1) % 256])

    def __call__(self, token, position, ranges, cache, index, n_keys, columns=None):
        draft_slot = (token == self.mask) & (self.causal | (ranges[..., 2] == 0))  # not a slot that is denoised
        astray = draft_slot & (position % self.wrong == 0)
        position = position + len(self.table) // 2 * astray
        return super().__call__(token, position, ranges, cache, index, n_keys, columns)


@pytest.mark.parametrize("method", WRITERS, ids=lambda m: m.method)
@pytest.mark.parametrize("ahead", [1, 8])
def test_greedy_drafted_text_is_the_undrafted_text(tokenizer, method, ahead):
    """With a random model, most of whose drafts are wrong, and at any limit."""
    model = steered(tokenizer, topic=8.0, length=9.0, sync=6.0, eos=4.0, pad=9.0)
    for limit in (1, 2, 7, 80):
        plain = Sampler(model, tokenizer, SampleConfig(max_tokens=limit), method).answer(PROMPTS)
        drafted = Sampler(model, tokenizer, SampleConfig(max_tokens=limit, ahead=ahead), method).answer(PROMPTS)
        assert [(ids(a), a.cut, a.layout) for a in drafted] == [(ids(a), a.cut, a.layout) for a in plain]
        assert all(a.accepted <= a.drafted for a in drafted)
        assert all(a.plan_passes <= b.plan_passes for a, b in zip(drafted, plain))


@pytest.mark.parametrize("method", WRITERS, ids=lambda m: m.method)
@pytest.mark.parametrize("constrained", [True, False])
def test_right_drafts_save_passes_and_wrong_ones_only_themselves(fluent, method, constrained):  # noqa: F811
    example = random_example(4, fluent, rounds=3, spans=3)
    layout = encode(example, fluent, method)
    config = dict(max_tokens=1500, constrained=constrained, steps_ratio=0.1)
    passes = {}
    for name, model in {"perfect": Perfect(layout, fluent), "forgetful": Forgetful(layout, fluent)}.items():
        for ahead in (0, 4):
            (answer,) = Sampler(model, fluent, SampleConfig(ahead=ahead, **config), method).answer([example.prompt])
            assert answer.layout == sampled(encode(example, fluent, method)) and not answer.broken and not answer.cut
            passes[name, ahead] = answer.plan_passes
            if not constrained:  # then no token is forced, so each pass is a step of the critical path
                assert answer.critical_path == answer.plan_passes + answer.denoise_passes
            if name == "perfect":
                assert answer.accepted == answer.drafted
            elif ahead:
                assert 0 < answer.accepted < answer.drafted
    assert passes["perfect", 0] == passes["forgetful", 0] > passes["forgetful", 4] > passes["perfect", 4]


@pytest.mark.parametrize("constrained", [True, False])
def test_drafts_end_with_their_round_also_if_it_has_no_spans(fluent, constrained):  # noqa: F811
    example = Example("Tell me", (Round("Here: fish"), Round("And more of the otter"), Round("In short")))
    layout = encode(example, fluent, MethodConfig())
    config = SampleConfig(ahead=8, max_tokens=300, constrained=constrained)
    (answer,) = Sampler(Perfect(layout, fluent), fluent, config).answer([example.prompt])
    assert answer.layout == sampled(layout) and answer.accepted == answer.drafted


def test_a_perfect_draft_of_k_tokens_takes_one_pass_for_k_plus_1(fluent):  # noqa: F811
    """The first pass has nothing to check yet; then each pass checks k drafts and gains one token more."""
    method, example = MethodConfig("ar"), random_example(2, fluent, rounds=3, spans=3)
    layout = encode(example, fluent, method)
    written = layout.kind.count(1) + 1
    for ahead in (1, 4, 8):
        config = SampleConfig(max_tokens=1500, ahead=ahead, constrained=False)
        (answer,) = Sampler(Perfect(layout, fluent), fluent, config, method).answer([example.prompt])
        assert answer.plan_passes - 1 == -(-(written - 2) // (ahead + 1))


def test_a_batch_with_drafts_answers_each_prompt_as_if_alone(tokenizer):
    for method, temperature in itertools.product(WRITERS, (0.0, 0.8)):
        model = steered(tokenizer, topic=8.0, length=9.0, sync=6.0, eos=4.0, pad=9.0)
        settings = dict(max_tokens=60, ahead=3, temperature=temperature)
        batch = Sampler(model, tokenizer, SampleConfig(seed=5, **settings), method).answer(PROMPTS)
        for i, (prompt, answer) in enumerate(zip(PROMPTS, batch)):
            (alone,) = Sampler(model, tokenizer, SampleConfig(seed=5 + i, **settings), method).answer([prompt])
            assert (answer.layout, answer.drafted, answer.accepted) == (alone.layout, alone.drafted, alone.accepted)


# ---------------------------------------------------------------- at temperature 1, by enumeration


def distribution(n, p, q, vocabulary):
    """Frequencies of the token that follows, where a draft from q is checked against p."""
    config = SampleConfig(temperature=1.0, ahead=1)
    generator = torch.Generator().manual_seed(1)
    draft = torch.multinomial(q, n, replacement=True, generator=generator)
    logits, draft_probs = p.log().expand(n, -1), q.expand(n, -1)
    token, accepted, _ = decoding.check_drafts(logits, draft, draft_probs, config, [(generator, n)])
    return torch.bincount(token, minlength=vocabulary) / n, accepted.float().mean()


def test_checked_drafts_are_distributed_as_if_drawn_from_the_model():
    for seed in each(range(4)):
        torch.manual_seed(seed)
        p, q = (torch.randn(6) * 1.5).softmax(-1), (torch.randn(6) * 1.5).softmax(-1)
        p[0] = 0  # the grammar forbids a token that the draft may hold
        p /= p.sum()
        allowed = q.clone()
        allowed[0] = 0
        allowed /= allowed.sum()
        frequency, accepted = distribution(40_000, p, allowed, 6)
        torch.testing.assert_close(frequency, p, atol=0.012, rtol=0)
        assert accepted == pytest.approx(float(torch.minimum(p, allowed).sum()), abs=0.012)


def test_a_draft_that_was_not_drawn_is_checked_as_one_that_was_certain():
    """As a drafter's are that its grammar left no choice in."""
    n, config = 20_000, SampleConfig(temperature=1.0, ahead=1, constrained=False)
    asked, generators = [decoding.DraftReading([0], draft=3)] * n, [(torch.Generator().manual_seed(1), n)]
    token, accepted = decoding.draw_checked(torch.zeros(n, 8), asked, config, generators, 0)
    torch.testing.assert_close(torch.bincount(token) / n, torch.full((8,), 1 / 8), atol=0.012, rtol=0)
    assert accepted.float().mean() == pytest.approx(1 / 8, abs=0.012)


@pytest.mark.parametrize("ahead, residual", [(0, True), (1, True), (3, True), (3, False)])
def test_drafted_texts_are_distributed_as_undrafted_ones(tokenizer, monkeypatch, ahead, residual):
    """By enumeration of all texts of up to four tokens. Without the residual draw the same test must fail."""
    tokens, n = [*range(65, 67)], 2000
    model = bigrams(np.random.default_rng(3), tokenizer, [*tokens, tokenizer.eos])
    if not residual:
        monkeypatch.setattr(decoding, "residual", lambda p, q: p)
    config = SampleConfig(temperature=1.0, max_tokens=5, ahead=ahead)
    answers = Sampler(model, tokenizer, config, MethodConfig("ar")).answer([""] * n)
    drawn = Counter("".join(map(chr, a.rounds[0].text)) for a in answers)
    expected = enumerated(model, tokenizer.assistant, 1, tokens, tokenizer.eos, 4)
    assert sum(expected.values()) == pytest.approx(1) and drawn.keys() <= expected.keys()
    chi_square = sum((drawn[text] - n * p) ** 2 / (n * p) for text, p in expected.items())
    if residual or not ahead:
        assert chi_square < 60, "30 degrees of freedom exceed 60 once in 1000 cases"
        assert not ahead or sum(a.accepted for a in answers) > n / 4
    else:
        assert chi_square > 150


@pytest.mark.parametrize("ahead", [0, 3])
def test_without_constraints_drafted_answers_break_as_often_as_undrafted_ones(tokenizer, ahead):
    """The grammar decides which drafts are checked, so what they were drawn from is what it allows."""
    tokens, n = [65, tokenizer.topic_end], 2000  # after text no topic can end
    model = bigrams(np.random.default_rng(3), tokenizer, [*tokens, tokenizer.eos])
    config = SampleConfig(temperature=1.0, max_tokens=5, ahead=ahead, constrained=False)
    answers = Sampler(model, tokenizer, config, MethodConfig("ar")).answer([""] * n)
    drawn = Counter("A" * len(a.rounds[0].text) + "!" * a.broken for a in answers)
    expected, alive, last = {}, 1.0, tokenizer.assistant
    for length in range(4):
        p = model.table[last, 1 + length].softmax(-1)
        expected |= {"A" * length: alive * float(p[tokenizer.eos]), "A" * length + "!": alive * float(p[tokens[1]])}
        alive, last = alive * float(p[65]), 65
    chi_square = sum((drawn[text] - n * p) ** 2 / (n * p) for text, p in expected.items())
    assert chi_square < 30, "8 degrees of freedom exceed 26 once in 1000 cases"


def test_drafts_are_kept_while_they_are_likely_enough_together():
    """0.5 x 0.5 x 0.3 = 0.075 is enough, times 0.6 = 0.045 is not, and nothing is kept after that."""
    stream = decoding.DraftStream(0, 5)
    stream.slots, confidence = 5, (0.5, 0.5, 0.3, 0.6, 1.0)
    readings, probs = stream.readings() * 2, torch.zeros(12, 100)  # of two answers, a check and five draft slots each
    for row, p in zip(probs, (1.0, *confidence, 1.0, 0.04, *confidence[1:])):
        row[:] = (1 - p) / 99
        row[4] = p
    logits = probs.log()
    tokens, kept = decoding.draw_checked(logits, readings, SampleConfig(ahead=5), [], 0)
    assert kept.tolist() == [0, 1, 1, 1, 0, 0] + [0] * 6
    replies = [Reply(reading, [n], [k]) for reading, n, k in zip(readings, tokens.tolist(), kept.tolist())]
    assert stream.check(iter(replies[:6]), SimpleNamespace(drafted=0, accepted=0)) == [4]
    assert len(stream.drafts) == 3


@pytest.mark.parametrize(
    "accepted, ends, counted", [(0, False, 1), (2, False, 3), (3, False, 4), (3, True, 3), (1, True, 2)]
)
def test_what_a_pass_says_after_its_first_wrong_draft_counts_for_nothing(tokenizer, accepted, ends, counted):
    """Neither its tokens nor whether room was short: of three drafts, some right ones, then one that is wrong."""
    stream = decoding.DraftStream(0, 5)
    stream.drafts, stream.probs, stream.counted, stream.ends = [1, 2, 3], [None] * 3, [True] * 3, ends
    replies = [Reply(reading, [7 + n], [n != accepted]) for n, reading in enumerate(stream.readings())]
    tokens, checks = stream.checked(iter(replies), SimpleNamespace(drafted=0, accepted=0))
    assert checks == replies[:counted]
    assert tokens == [1, 2, 3][:accepted] + [7 + accepted] * (counted > accepted)


def test_an_answer_is_cut_by_replies_that_count_alone(tokenizer):
    """Replies of one pass: the first draft is wrong, so that those to drafts behind it say nothing of the answer."""
    for short, cut in each([((False, True, True), False), ((True, False, False), True)]):
        sampler = Sampler(steered(tokenizer), tokenizer, SampleConfig(max_tokens=40, ahead=2), MethodConfig("ar"))
        (answer,) = sampler.begin(["the otter"])
        phase = answer.phase
        phase.stream.drafts, phase.stream.probs = [97, 98], [None, None]
        phase.prepare()
        checks = [n < 3 for n, _ in enumerate(phase.readings())]
        replies = [Reply(reading, [100], [False], check and short[n % 3])
                   for n, (reading, check) in enumerate(zip(phase.readings(), checks))]  # fmt: skip
        phase.take(replies)
        assert answer.cut == cut and answer.rounds[0].text == [100]
