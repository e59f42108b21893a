"""The methods: what each learns of an example."""

import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import OTTER, in_span, random_example
from naive_masks import oracle_target, read_tags
from naive_sampler import Token, hidden_states

from config import METHODS, MethodConfig, TrainConfig
from masks import GIVEN, PLAN, PROMPT, SLOT, encode_example
from methods import DECODERS, encode, fitted
from noise import IGNORE, Sequence, Term, make_batch
from tags import Example, Round, Span, plain_text
from train import JointLoss, counts

CAUSAL, BLOCKS = MethodConfig("parallel-ar"), MethodConfig("block", block=6)
GIVEN_PLANS = [BLOCKS, MethodConfig("block", block=1), MethodConfig("diffusion", block=40)]
ALL = [*map(MethodConfig, (name for name in DECODERS if METHODS[name].plan != "given")), *GIVEN_PLANS,
       MethodConfig(topics="numbers"), MethodConfig("parallel-ar", repeat_topic=False), MethodConfig(rounds="one"),
       MethodConfig("dense", topics="numbers", repeat_topic=False, rounds="one")]  # fmt: skip


def examples(tokenizer, n=15):
    return [random_example(seed, tokenizer) for seed in range(n)]


def contents(layout):
    """Slot tokens of each span, a list a round."""
    rounds = [{} for _ in range(max(layout.round) + 1)]
    for token, kind, round_, span in zip(layout.token, layout.kind, layout.round, layout.span):
        if kind == SLOT:
            rounds[round_].setdefault(span, []).append(token)
    return [list(spans.values()) for spans in rounds]


# ---------------------------------------------------------------- layouts


def test_an_autoregressive_layout_is_prompt_and_plain_text_alone(tokenizer):
    for example in examples(tokenizer):
        layout = encode(example, tokenizer, MethodConfig("ar"))
        prompt = [tokenizer.user, *tokenizer.encode(example.prompt), tokenizer.assistant]
        text = [*tokenizer.encode(plain_text(example.rounds)), tokenizer.eos]
        assert layout.token == prompt + text
        assert layout.kind == [PROMPT] * len(prompt) + [PLAN] * len(text)
        assert Sequence(layout).ranges.tolist() == [[i + 1, 0, 0] for i in range(len(layout))]


@pytest.mark.parametrize("method", GIVEN_PLANS)
def test_blocks_hold_the_plain_text_then_pad_and_each_learns_with_clean_copies_of_those_before_it(tokenizer, method):
    for example in examples(tokenizer):
        layout, tokens = encode(example, tokenizer, method), tokenizer.encode(plain_text(example.rounds))
        sequence, size = Sequence(layout), method.block + 2
        (blocks,) = contents(layout)  # the noised copies are in one round
        pads = sum(map(len, blocks)) - len(tokens)
        assert sum(blocks, []) == tokens + [tokenizer.pad] * pads and 0 < pads <= method.block
        start = len(tokenizer.encode(example.prompt)) + 2
        noised = start + (len(blocks) - 1) * size  # the last has no clean copy: nobody sees it
        for number, block in enumerate(blocks):
            for at in (start, noised)[number == len(blocks) - 1 :]:
                entries = slice(at, at + size)
                assert layout.token[entries] == [tokenizer.async_, *block, tokenizer.async_end]
                middle = SLOT if at == noised else GIVEN
                assert layout.kind[entries] == [GIVEN] + [middle] * method.block + [GIVEN]
                assert layout.position[entries] == list(range(start, start + size))
                assert sequence.ranges[entries].tolist() == [[start, at, at + size]] * size
            start, noised = start + size, noised + size
        assert len(layout) == noised and set(layout.round) == {0} and (sequence.next == IGNORE).all()


@torch.no_grad()
@pytest.mark.parametrize("method", GIVEN_PLANS)
def test_the_loss_of_all_blocks_at_once_is_that_of_one_after_the_other(model, tokenizer, method):
    """Each alone, after the prompt and clean blocks: what the sampler will compute."""
    for seed, example in enumerate(examples(tokenizer, 2)):
        sequence, expected = Sequence(encode(example, tokenizer, method)), 0.0
        batch = make_batch([sequence], [0], tokenizer, np.random.default_rng(seed), "elbo")
        tokens = [Token(int(t), 0) for t, kind in zip(sequence.token, sequence.kind) if kind == PROMPT]
        for number in range(sequence.span.max() + 1):
            place = np.flatnonzero(sequence.span == number)[
                -method.block - 2 :
            ]  # the copy for the loss is the later one
            noised = [Token(int(i), number, 0) for i in batch.token[0, place]]
            hidden = hidden_states(model, tokens + noised, "sparse")[len(tokens) :]
            loss = F.cross_entropy(model.logits(hidden, tokenizer.pad + 1), batch.target[0, place], reduction="none")
            expected += float(loss @ batch.weight[0, place])
            tokens += [Token(int(i), number, 0) for i in sequence.token[place]]
        assert float(JointLoss(model, tokenizer.pad + 1)(batch)[1]) == pytest.approx(expected, rel=1e-5)


def test_numbered_topics_count_spans_and_merged_rounds_are_one_whose_later_texts_are_spans_called_end(tokenizer):
    first, second, third = OTTER.rounds
    more, short = (Span("end", r.text, tokenizer.units(r.text)) for r in (second, third))
    one = Example(OTTER.prompt, (Round("Here:", (*first.spans, more, *second.spans, short)),))
    for topics in ("names", "numbers"):
        expected = encode(one, tokenizer, MethodConfig(topics=topics))
        assert encode(OTTER, tokenizer, MethodConfig(rounds="one", topics=topics)) == expected
    for example in examples(tokenizer):
        rounds = tuple(Round(r.text, tuple(Span(f"topic {n + 1}", s.text, s.length) for n, s in enumerate(r.spans)))
                       for r in example.rounds)  # fmt: skip
        expected = encode_example(Example(example.prompt, rounds), tokenizer)
        assert encode(example, tokenizer, MethodConfig(topics="numbers")) == expected
        layout = encode(example, tokenizer, MethodConfig(rounds="one"))
        assert tokenizer.sync not in layout.token and set(layout.round) == {0}
        spans = sum(len(r.spans) for r in example.rounds) + sum(r.text != "" for r in example.rounds[1:])
        assert layout.token.count(tokenizer.async_) == spans


@pytest.mark.parametrize("method, attention", [("planned", "sparse"), ("dense", "dense"), ("parallel-ar", "causal")])
def test_layouts_have_their_attention_and_without_repeated_topics_no_heads_of_spans(tokenizer, method, attention):
    for example in examples(tokenizer):
        whole, bare = (encode(example, tokenizer, MethodConfig(method, **r)) for r in ({}, {"repeat_topic": False}))
        assert whole == encode_example(example, tokenizer, attention)
        given = {token for token, kind in zip(bare.token, bare.kind) if kind == GIVEN}
        assert given <= {tokenizer.async_, tokenizer.async_end}
        assert bare.kind.count(GIVEN) == 2 * sum(len(r.spans) for r in example.rounds)
        assert contents(bare) == contents(whole)
        plans = [[t for t, kind in zip(y.token, y.kind) if kind in (PROMPT, PLAN)] for y in (whole, bare)]
        assert plans[0] == plans[1]


def test_fitted_blocks_are_32_or_hold_the_longest_answer_and_its_pad_and_a_given_size_stays(tokenizer):
    several = examples(tokenizer)
    for method, n in itertools.product(("block", "diffusion"), range(1, 64)):
        example = Example("", (Round("~" * n),))
        known, tokens = fitted(MethodConfig(method), [example], tokenizer), len(tokenizer.encode("~" * n))
        assert tokenizer.pad in encode(example, tokenizer, known).token
        assert known.block == {"block": 32, "diffusion": (tokens // tokenizer.unit + 1) * tokenizer.unit}[method]
    longest = max(len(tokenizer.encode(plain_text(e.rounds))) for e in several)
    known = fitted(MethodConfig("diffusion"), several, tokenizer)
    assert longest < known.block <= longest + tokenizer.unit and known.block % tokenizer.unit == 0
    assert all(len(contents(encode(e, tokenizer, known))[0]) == 1 for e in several)
    assert fitted(MethodConfig("block"), several, tokenizer) == MethodConfig("block", block=32)
    assert [fitted(method, several, tokenizer) for method in ALL] == ALL


def test_a_bad_setting_is_refused_by_name_and_value():
    for setting, value in dict(method="planed", topics="words", rounds="two", block=-1, history="none").items():
        with pytest.raises(ValueError, match=f"--{setting} {value}: expected"):
            (TrainConfig if setting == "history" else MethodConfig)(**{setting: value})


@pytest.mark.parametrize("history", ["clean", "noised"])
def test_causal_slots_up_to_the_first_pad_are_targets_of_the_token_before_and_nothing_is_masked(tokenizer, history):
    for seed in range(12):
        several = [random_example(10 * seed + n, tokenizer) for n in range(3)]
        layouts = [encode(e, tokenizer, CAUSAL) for e in several]
        rounds = [seed % len(e.rounds) for e in several]
        batch = make_batch([*map(Sequence, layouts)], rounds, tokenizer, np.random.default_rng(0), history=history)
        assert (batch.weight == 1).all()
        for b, (layout, round_) in enumerate(zip(layouts, rounds)):
            places = read_tags(layout.token, tokenizer)
            target, read = oracle_target(places, layout.token), set()
            for p in places:
                earlier = [q.i for q in places[: p.i] if q.content and q.same_span(p)]
                if p.content and p.round == round_ and not any(layout.token[i] == tokenizer.pad for i in earlier):
                    target[p.i - 1] = layout.token[p.i]
                    read.add(p.i - 1)
            place = batch.position[b].tolist()  # of each entry: the trained spans follow after all else
            for e in range(batch.token.shape[1]):
                if batch.ranges[b, e].tolist() != [1, 0, 0] or e == 0:  # not padding
                    assert batch.token[b, e] == layout.token[place[e]] and batch.target[b, e] == target[place[e]]
            assert {place[e] for e in in_span(batch)[b].nonzero()[:, 0]} == read
        assert counts(batch, "elbo")[Term.CAUSAL] == counts(batch, "uniform")[Term.CAUSAL] == in_span(batch).sum()


@pytest.mark.parametrize("method", [MethodConfig(), MethodConfig("dense"), BLOCKS])
def test_clean_history_noises_the_picked_round_and_noised_history_all_up_to_it(tokenizer, method):
    layout = encode(OTTER, tokenizer, method)
    sequence, token = Sequence(layout), torch.tensor(layout.token)
    for history, round_ in itertools.product(("clean", "noised"), range(sequence.n_rounds)):
        stop, changed = sequence.stop(round_), set()
        noised = [r == round_ or (history == "noised" and r < round_) for r in layout.round[:stop]]
        slots = torch.tensor(noised) & (torch.tensor(layout.kind[:stop]) == SLOT)
        for seed in range(5):
            batch = make_batch([sequence], [round_], tokenizer, np.random.default_rng(seed), history=history)
            masked = batch.token[0] == tokenizer.mask
            assert torch.equal(in_span(batch)[0], slots) and not (masked & ~slots).any()
            assert torch.equal(torch.where(masked, batch.target[0], batch.token[0]), token[:stop])
            assert (batch.target[0][slots & ~masked] == IGNORE).all()
            changed |= {layout.round[i] for i in masked.nonzero()}
            spans = {(layout.round[i], layout.span[i] * (method.attention != "dense")) for i in slots.nonzero()}
            assert len(set(batch.weight[0][slots].tolist())) == len(spans), "each span, or dense round, draws its own t"
        assert changed == {r for r, kind in zip(layout.round[:stop], slots) if kind}


@torch.no_grad()
@pytest.mark.parametrize("repeat_topic", [True, False])
def test_the_loss_of_causal_spans_is_their_log_probability_token_by_token(model, tokenizer, repeat_topic):
    """Chain rule: each token given all before the spans and its own span up to it; what comes later is still [MASK]."""
    layout = encode(OTTER, tokenizer, MethodConfig("parallel-ar", repeat_topic=repeat_topic))
    sequence = Sequence(layout)
    for round_ in range(2):
        stop, expected = sequence.stop(round_), 0.0
        for span in set(sequence.span[sequence.round == round_]) - {-1}:
            slots = [i for i in range(stop) if sequence.span[i] == span and layout.kind[i] == SLOT]
            masked = [tokenizer.mask if kind == SLOT and r == round_ else t
                      for t, r, kind in zip(layout.token, layout.round, layout.kind)]  # fmt: skip
            tokens = [Token(t, r, None if s < 0 else s) for t, r, s in zip(masked, layout.round, layout.span)]
            for slot in slots:
                hidden = hidden_states(model, tokens[:stop], "causal")[slot - 1]
                expected -= float(model.logits(hidden, tokenizer.pad + 1).log_softmax(-1)[layout.token[slot]])
                tokens[slot].id = layout.token[slot]
                if layout.token[slot] == tokenizer.pad:
                    break
        batch = make_batch([sequence], [round_], tokenizer, np.random.default_rng(0), "elbo")
        assert float(JointLoss(model, tokenizer.pad + 1)(batch)[Term.CAUSAL]) == pytest.approx(expected, rel=1e-5)
