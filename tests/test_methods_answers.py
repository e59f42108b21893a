"""The methods: the answers of each, against a naive sampler's and against what was learnt."""

import itertools
from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from conftest import SENTENCES, TOPICS, each, random_example, small_model
from naive_sampler import NaiveSampler
from test_methods import ALL, BLOCKS, CAUSAL, GIVEN_PLANS, examples
from test_sample import Exact, costs, ids, steered

from config import METHODS, MethodConfig, SampleConfig
from grammar import Grammar
from masks import PLAN, PROMPT, SLOT, Layout
from methods import DECODERS, decoded_as, encode
from model import ModelConfig, Transformer
from noise import IGNORE, Sequence
from sample import Sampler
from tags import parse_answer
from tokenizer import Tokenizer
from training.checkpoint import save_checkpoint

COLUMNS = ("token", "kind", "round", "span", "position", "prefix", "begin", "end")
PROMPTS = ("the otter swims", SENTENCES[3], "", "play")


class Perfect:
    """Stands for a model that predicts each token of one layout wherever training asks for it."""

    def __init__(self, layout, tokenizer):
        sequence, self.table = Sequence(layout), torch.full((5000,), tokenizer.pad)
        self.config = ModelConfig(tokenizer.vocab_size, n_layer=1, d_model=4, n_head=1, n_kv_head=1)
        self.embedding = SimpleNamespace(weight=torch.zeros(tokenizer.vocab_size, 1))
        for i in range(len(layout)):
            if sequence.next[i] != IGNORE:
                self.table[i] = int(sequence.next[i])
            if layout.kind[i] == SLOT:
                self.table[layout.position[i] - (layout.attention == "causal")] = layout.token[i]

    def eval(self):
        return self

    def __call__(self, token, position, ranges, cache, index, n_keys, columns=None):
        return (position if columns is None else position.gather(1, columns))[..., None]

    def logits(self, hidden, n_tokens=None):
        return 30.0 * F.one_hot(self.table[hidden[..., 0]], len(self.embedding.weight))[..., :n_tokens]


def sampled(layout):
    """The layout that sampling writes: no <eos>, and of blocks the copies for the loss alone, a round each."""
    if PLAN in layout.kind:
        for column in COLUMNS:
            getattr(layout, column).pop()
        return layout
    blocks, entries = Layout(), sorted(range(len(layout)), key=lambda i: (layout.position[i], i))
    for i in (i for i, after in zip(entries, [*entries[1:], None]) if after is None
              or layout.position[i] != layout.position[after]):  # fmt: skip
        block = layout.span[i] >= 0
        shift = layout.begin[i] - layout.prefix[i] if block else 0
        row = (layout.token[i], layout.kind[i], max(layout.span[i], 0), block - 1, layout.position[i], layout.prefix[i],
               layout.begin[i] - shift, layout.end[i] - shift)  # fmt: skip
        for column, value in zip(COLUMNS, row):
            getattr(blocks, column).append(value)
    return blocks


@pytest.fixture(scope="module")
def fluent():
    """A tokenizer whose names of topics begin with a whole word: the grammar lets none begin with a lone space."""
    return Tokenizer.train([*SENTENCES, *TOPICS * 3, "topic end" * 3], 500, unit=4)


@pytest.mark.parametrize("method", ALL)
def test_a_perfect_model_writes_the_layout_that_was_learnt(fluent, method):
    """Training and sampling agree on every token and on who sees whom, with the grammar's help and without."""
    for example in examples(fluent, 5):
        names = [span.topic for round_ in example.rounds for span in round_.spans]
        if method.rounds == "one" and len({*names}) < len(names):
            continue  # in one round it would name a topic twice, which no answer does
        layout = encode(example, fluent, method)
        model = Perfect(layout, fluent)
        layout = sampled(layout)
        for constrained in (True, False):
            config = SampleConfig(max_tokens=1500, constrained=constrained, steps_ratio=0.1)
            answer = Sampler(model, fluent, config, method).answer([example.prompt])[0]
            assert answer.layout == layout and not answer.broken and not answer.cut
            if method == MethodConfig():
                assert answer.decoded() == list(example.rounds)
        if method.plan != "given":
            assert answer.plan_passes == layout.kind.count(PLAN) + 1, "without grammar nothing is forced"


def test_what_a_joint_model_has_read_left_to_right_it_sees_as_in_training(fluent):
    """Both ways, as training shows finished spans: else later rounds read what the model has never seen."""
    joint = MethodConfig("joint")
    causal, config = decoded_as(joint, "parallel-ar"), SampleConfig(max_tokens=1500)
    for example in examples(fluent, 5):
        model = Perfect(encode(example, fluent, causal), fluent)
        (answer,) = Sampler(model, fluent, config, causal).answer([example.prompt])
        layout = sampled(encode(example, fluent, joint))
        assert all(getattr(answer.layout, column) == getattr(layout, column) for column in COLUMNS)


@pytest.fixture(scope="module")
def planner(tokenizer):
    return steered(tokenizer, topic=8.0, length=9.0, sync=6.0, eos=4.0, pad=9.0)


@pytest.fixture(scope="module")
def writer(tokenizer):
    """A model that fills a few blocks before its first [PAD]."""
    return steered(tokenizer, 1, pad=6.0)


SETTINGS = [(CAUSAL, {}), (CAUSAL, dict(temperature=1.0, seed=3)), (BLOCKS, {}), (BLOCKS, dict(threshold=0.4)),
            (CAUSAL, dict(temperature=0.7, length_scale=0.6, seed=8)),
            (MethodConfig("parallel-ar", repeat_topic=False), dict(temperature=0.5)),
            (BLOCKS, dict(temperature=0.8, order="margin", seed=2)),
            (MethodConfig("block", block=1), dict(temperature=1.0, seed=1)),
            (MethodConfig("diffusion", block=32), dict(steps_ratio=0.4, order="confidence")),
            (MethodConfig("diffusion", block=32), dict(threshold=0.3, temperature=0.6))]  # fmt: skip


@pytest.mark.parametrize("method, settings", SETTINGS)
def test_answers_and_costs_equal_the_naive_ones(planner, writer, tokenizer, method, settings):
    given, spans = method.plan == "given", 0
    model = writer if given else planner
    for prompt, room in zip(PROMPTS[::2], (50, 33) if given else (60, 60)):
        config = SampleConfig(max_tokens=room, **settings)
        answer = Sampler(model, tokenizer, config, method).answer([prompt])[0]
        naive = NaiveSampler(model, tokenizer, config, method.attention, method.repeat_topic)
        expected = naive.answer_blocks(prompt, method.block) if given else naive.answer(prompt)
        assert answer.cut == expected.pop("cut") and not answer.broken
        if given:
            blocks = [answer.contents(span) for draft in answer.rounds for span in draft.spans]
            assert blocks == expected.pop("blocks")
        else:
            assert ids(answer) == expected.pop("rounds")
        assert costs(answer) == expected
        spans += sum(len(d.spans) for d in answer.rounds)
    assert spans >= 2


@pytest.mark.parametrize("method", [method for method in ALL if method.plan == "written"])
def test_each_pass_reads_what_one_without_a_cache_would(planner, tokenizer, method):
    Exact(planner, tokenizer, SampleConfig(max_tokens=60), method).answer(PROMPTS[:2])


def test_a_causal_span_ends_at_its_first_pad_and_the_round_with_its_longest_span(planner, tokenizer):
    early, config = 0, SampleConfig(max_tokens=90, temperature=0.8)
    for answer in Sampler(planner, tokenizer, config, CAUSAL).answer(PROMPTS):
        passes = 0
        for draft in answer.rounds:
            lengths = [0]
            for slots in map(answer.contents, draft.spans):
                end = slots.index(tokenizer.pad) if tokenizer.pad in slots else len(slots)
                assert set(slots[end:]) <= {tokenizer.pad}
                lengths.append(min(end + 1, len(slots)))
                early += 0 < end < len(slots) - 1
            passes += max(lengths)
        assert answer.denoise_passes == passes
    assert early, "some span ended before its last slot"


@pytest.mark.parametrize("method", GIVEN_PLANS)
def test_blocks_end_with_the_first_pad_or_are_cut_and_read_as_one_text(writer, tokenizer, method):
    cuts = set()
    for room in (1, 2, 3, 9, 17, 60):
        config = SampleConfig(max_tokens=room, temperature=1.0)
        for answer in Sampler(writer, tokenizer, config, method).answer(PROMPTS):
            blocks, result = [answer.contents(s) for d in answer.rounds for s in d.spans], answer.result()
            assert len(answer.layout) - answer.layout.kind.count(PROMPT) == sum(len(b) + 2 for b in blocks) <= room
            assert all(len(b) == method.block and tokenizer.pad not in b for b in blocks[:-1])
            shrunk = not blocks or len(blocks[-1]) < method.block  # of a size that training never has
            assert result["cut"] == (shrunk or tokenizer.pad not in blocks[-1])
            assert not result["cut"] or sum(len(b) + 2 for b in blocks) > room - 3, "no room for one more slot"
            text = tokenizer.decode(sum(blocks, []))
            assert result["rounds"] == [{"text": text, "plan": [], "spans": []}] and result["text"] == text
            assert [r.text for r in parse_answer(result["tagged"])] == [text.strip()]
            assert result["plan_passes"] == 0 and result["critical_path"] == result["denoise_passes"]
            cuts.add((bool(blocks), result["cut"]))
    assert cuts == {(False, True), (True, True), (True, False)} or method.block == 1


def test_a_threshold_fills_at_least_one_slot_of_a_block_a_pass(writer, tokenizer):
    for threshold, passes in each([(1e-9, {1}), (0.4, {2, 3, 4, 5}), (1.0, {6})]):

        class Counting(Sampler):
            def step(self, live, rows, probe=None):
                masked[len(live[0].rounds)].append(live[0].layout.token.count(tokenizer.mask))
                super().step(live, rows, probe)

        masked = defaultdict(list)  # number of the block -> how many [MASK] each of its passes sees
        config = SampleConfig(max_tokens=40, threshold=threshold)  # room for 5 blocks of 6 slots
        Counting(writer, tokenizer, config, BLOCKS).answer(PROMPTS[:1])
        assert len(masked) > 1 and {len(seen) for seen in masked.values()} <= passes
        for seen in masked.values():
            assert seen[0] == 6 and all(after < before for before, after in zip(seen, seen[1:]))


@pytest.mark.parametrize("method, settings", [*SETTINGS[:4], (GIVEN_PLANS[2], dict(temperature=1.0))])
def test_a_batch_answers_each_prompt_as_if_alone(planner, writer, tokenizer, method, settings):
    def answers(prompts, seed):
        config = SampleConfig(max_tokens=50, **{**settings, "seed": seed})
        return Sampler(writer if method.plan == "given" else planner, tokenizer, config, method).answer(prompts)

    for i, (prompt, batched) in enumerate(zip(PROMPTS, answers(PROMPTS, 5))):
        (alone,) = answers([prompt], 5 + i)
        assert (batched.layout, batched.cut, costs(batched)) == (alone.layout, alone.cut, costs(alone))


def test_an_answer_that_leaves_the_grammar_is_broken_and_finished(tokenizer):
    for tag in each(["topic_end", "async_", "mask", "user", "sync"]):
        method = MethodConfig("ar") if tag == "sync" else MethodConfig()
        sampler = Sampler(steered(tokenizer, **{tag: 99.0}), tokenizer, SampleConfig(constrained=False), method)
        for answer in sampler.answer(PROMPTS):
            result = answer.result()
            assert answer.phase is None and result["broken"] and not result["cut"]
            assert (result["plan_passes"], result["text"], result["tagged"]) == (1, "", "<eos>")


@pytest.mark.parametrize("method", ["planned", "dense", "parallel-ar", "ar"])
def test_an_unconstrained_answer_is_well_formed_up_to_where_it_breaks(fluent, method):
    """Of an untrained model, and of one that knows an example but now and then draws any other token."""
    method, example = MethodConfig(method), random_example(4, fluent, rounds=3, spans=2)
    untrained, seen = steered(fluent, 0, 0.2, topic=6.0, length=8.0, lengths=1, topic_end=8.0, eos=9.0), set()
    for model, temperature in ((untrained, 1.5), (Perfect(encode(example, fluent, method), fluent), 3.3)):
        config = SampleConfig(temperature=temperature, max_tokens=300, constrained=False, steps_ratio=0.05)
        for answer in Sampler(model, fluent, config, method).answer([example.prompt] * 20):
            grammar = Grammar(fluent, config.max_tokens, plans=method.plan == "written")
            for token in [t for t, kind in zip(answer.layout.token, answer.layout.kind) if kind == PLAN]:
                assert grammar.allowed()[token]
                grammar.advance(token)
            assert answer.plan_passes == answer.layout.kind.count(PLAN) + 1
            assert answer.broken or grammar.allowed()[fluent.eos]
            assert answer.phase is None and fluent.mask not in answer.layout.token and not answer.cut
            assert len(parse_answer(answer.result()["tagged"])) == len(answer.rounds)
            seen.add((answer.broken, SLOT in answer.layout.kind))
    assert seen == set(itertools.product((True, False), (False,) if method.plan == "none" else (True, False)))


def test_untrained_models_answer_within_any_limit(tokenizer):
    for method in each(ALL):
        assert {m.method for m in ALL} == {*DECODERS} >= {name for name, m in METHODS.items() if not m.decodes}
        sizes = dict(n_layer=1, d_model=16, n_head=2, n_kv_head=1, d_ff=16)
        fresh, wild = (
            Transformer(ModelConfig(tokenizer.vocab_size, **sizes)),
            small_model(tokenizer.vocab_size, n_layer=1),
        )
        models = (fresh, dict(temperature=1.5, threshold=0.5)), (wild, {})
        for (model, settings), limit, constrained in itertools.product(models, (1, 2, 3, 25), (True, False)):
            config = SampleConfig(max_tokens=limit, constrained=constrained, **settings)
            for answer in Sampler(model, tokenizer, config, method).answer(PROMPTS[:2]):
                ends = method.plan != "given" and not answer.broken  # <eos> is written, not kept
                assert len(answer.layout) - answer.layout.kind.count(PROMPT) + ends <= limit
                assert answer.phase is None and tokenizer.mask not in answer.layout.token
                assert parse_answer(answer.result()["tagged"]) and not (constrained and answer.broken)


def test_a_joint_model_is_sampled_by_each_method_that_it_was_trained_for(tokenizer, tmp_path):
    path = tmp_path / "joint.safetensors"
    save_checkpoint(path, small_model(tokenizer.vocab_size), tokenizer, {"method": vars(MethodConfig("joint"))})
    for name, method in (("", "planned"), ("planned", "planned"), ("parallel-ar", "parallel-ar")):
        assert Sampler.load(path, SampleConfig(decode=name)).method == MethodConfig(method, trained="joint")
    with pytest.raises(
        ValueError, match="--decode ar: a model trained with --method joint decodes as planned, parallel-ar"
    ):
        Sampler.load(path, SampleConfig(decode="ar"))
