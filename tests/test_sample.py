"""The sampler against a naive one without cache (naive_sampler.py), and against the sentences of its schedule."""

import itertools
import json
import math

import pytest
import torch
from conftest import SENTENCES, each, small_model
from naive_sampler import NaiveSampler, Token, hidden_states

from config import MethodConfig, SampleConfig
from decode import Decoder, Denoise, WrittenPlan
from grammar import Grammar
from masks import GIVEN, PLAN, PROMPT, SLOT
from methods import DECODERS
from sample import Passes, Sampler
from tags import EOS, TAGS, parse_answer

PROMPTS = (SENTENCES[3], SENTENCES[0], "the otter swims", "", "play")
METHOD = {"sparse": MethodConfig("planned"), "dense": MethodConfig("dense"),
          "joint": MethodConfig("parallel-ar", trained="joint")}  # fmt: skip
CHOSEN = dict(
    topic=8.0, length=9.0, sync=6.0, eos=4.0, pad=11.0
)  # logits added, so that plans of several rounds come about


def steered(tokenizer, seed=0, scale=0.7, lengths=3, **bias):
    """A random model whose output layer is no transposed embedding, so that no token predicts itself, with some tokens
    made likelier. `bias`: name -> what is added to the logit of that tag, or of the first few `lengths`."""
    model = small_model(tokenizer.vocab_size, seed)
    weight = torch.randn(tokenizer.vocab_size, 32, generator=torch.Generator().manual_seed(seed)) * scale
    added = torch.zeros(tokenizer.vocab_size)
    for name, value in (bias or CHOSEN).items():
        first = tokenizer.length_id(1) if name == "length" else getattr(tokenizer, name)
        added[first : first + (lengths if name == "length" else 1)] = value
    model.logits = lambda hidden, n=None: hidden @ weight[:n].T + added[:n]
    return model


@pytest.fixture(scope="module")
def planner(tokenizer):
    return steered(tokenizer)


@pytest.fixture(scope="module")
def one_span(tokenizer):
    """A model that plans a single span, of any length from 1 to 8 units, when `max_tokens` allows no more."""
    return steered(tokenizer, lengths=8, topic=90.0, length=80.0)


class Recorder(Sampler):
    """A sampler that notes what each pass computes: (whether it is over spans, entries, the answer)."""

    def answer(self, prompts, watch=None):
        self.recorded = []
        return super().answer(prompts, watch)

    def step(self, live, rows, probe=None):
        forward = self.passes.forward
        self.passes.forward = lambda *given: self.forward(live, forward, *given)
        super().step(live, rows, probe)
        self.passes.forward = forward

    def forward(self, live, forward, layouts, entries, readings, rows):
        self.recorded.append((live[0].phase.in_spans, entries[0], live[0]))
        return forward(layouts, entries, readings, rows)


class Exact(Recorder):
    """A sampler that compares each pass with a forward of the whole sequence without cache."""

    def forward(self, live, forward, layouts, entries, readings, rows):
        hidden = super().forward(live, forward, layouts, entries, readings, rows)
        for answer, asked, h in zip(live, readings, hidden):
            mine = [entry for reading in asked for entry in reading.entries]
            y = answer.layout
            tokens = [Token(*t) for t in zip(y.token, y.round, (None if s < 0 else s for s in y.span))]
            fresh = hidden_states(self.model, tokens, self.method.attention)[mine]
            torch.testing.assert_close(h[: len(mine)], fresh, atol=1e-5, rtol=0)
        return hidden


def ids(answer):
    """An answer in token ids, as NaiveSampler gives it."""
    return [(d.text, [(t.name, t.length, answer.contents(s)) for t, s in zip(d.topics, d.spans)])
            for d in answer.rounds]  # fmt: skip


def costs(answer):
    names = ("plan_passes", "denoise_passes", "critical_path", "positions", "content_tokens")
    return {name: answer.result()[name] for name in names}


def denoising(sampler, prompt):
    """The answer, and for each round with spans its passes, each the slots of every span after it."""
    rounds, seen = {}, [0]

    def watch(answer):
        if answer.denoise_passes > seen[0]:
            number, draft = max((n, d) for n, d in enumerate(answer.rounds) if d.spans)
            rounds.setdefault(number, []).append([answer.contents(span) for span in draft.spans])
            seen[0] = answer.denoise_passes

    return sampler.answer([prompt], watch)[0], list(rounds.values())


# ---------------------------------------------------------------- the naive sampler

SETTINGS = [
    ("sparse", dict()),
    ("sparse", dict(order="confidence", steps_ratio=0.3)),
    ("sparse", dict(order="margin", steps_ratio=1.0)),
    ("sparse", dict(threshold=0.6)),
    ("sparse", dict(threshold=0.6, steps_ratio=0.3)),
    ("sparse", dict(length_scale=1.4, steps_ratio=0.8)),
    ("dense", dict()),
    ("dense", dict(order="margin", steps_ratio=0.7)),
    ("dense", dict(threshold=0.6)),
    ("dense", dict(threshold=0.6, steps_ratio=0.3)),
    ("joint", dict()),
    ("joint", dict(length_scale=1.4)),
]


@pytest.mark.parametrize("attention, settings", SETTINGS)
def test_answers_and_costs_equal_the_naive_ones(planner, tokenizer, attention, settings):
    config = SampleConfig(max_tokens=90, **settings)
    for prompt in PROMPTS[:3]:
        answer = Sampler(planner, tokenizer, config, METHOD[attention]).answer([prompt])[0]
        expected = NaiveSampler(planner, tokenizer, config, attention).answer(prompt)
        assert ids(answer) == expected.pop("rounds")
        assert answer.cut == expected.pop("cut")
        assert costs(answer) == expected


def test_an_answer_is_cut_if_what_was_likeliest_does_not_fit_any_more(planner, tokenizer):
    found = set()
    for max_tokens in (10, 30, 60, 120):
        config = SampleConfig(max_tokens=max_tokens)
        for prompt, answer in zip(PROMPTS, Sampler(planner, tokenizer, config).answer(PROMPTS)):
            assert answer.cut == NaiveSampler(planner, tokenizer, config).answer(prompt)["cut"]
            found.add(answer.cut)
    assert found == {False, True}


def test_the_steered_answers_are_worth_comparing(planner, tokenizer):
    answers = Sampler(planner, tokenizer, SampleConfig(max_tokens=90)).answer(PROMPTS[:3])
    spans = [[len(d.spans) for d in a.rounds] for a in answers]
    assert max(map(len, spans)) >= 3, "several rounds"
    assert len({n for s in spans for n in s} & {1, 2, 3, 4}) >= 2, "one to four spans"
    assert any(sum(n > 0 for n in s) > 1 for s in spans), "spans again after a <sync/>"
    assert any(d.text for a in answers for d in a.rounds), "text"
    slots = [i for a in answers for d in a.rounds for s in d.spans for i in a.contents(s)]
    assert tokenizer.pad in slots and len(set(slots)) > 5, "[PAD] and text"


@pytest.mark.parametrize("attention", ["sparse", "dense"])
def test_the_cache_is_exact_also_after_sync(planner, tokenizer, attention):
    sampler = Exact(planner, tokenizer, SampleConfig(max_tokens=90), METHOD[attention])
    after = [len(sampler.answer([prompt])[0].rounds) for prompt in PROMPTS[:2]]
    assert max(after) > 1


@pytest.mark.parametrize("attention, settings", [SETTINGS[0], SETTINGS[3], SETTINGS[5], SETTINGS[7]])
def test_a_batch_answers_each_prompt_as_if_alone(planner, tokenizer, attention, settings):
    sampler = Sampler(planner, tokenizer, SampleConfig(max_tokens=60, **settings), METHOD[attention])
    answers = sampler.answer(PROMPTS)
    for prompt, batched in zip(PROMPTS, answers):
        alone = sampler.answer([prompt])[0]
        assert ids(batched) == ids(alone)
        assert costs(batched) == costs(alone)
    sampler.turns = ((False, True),)  # as on a GPU: prompts of both stages in one pass
    assert [(ids(a), costs(a)) for a in sampler.answer(PROMPTS)] == [(ids(a), costs(a)) for a in answers]


# ---------------------------------------------------------------- plans


def test_an_autoregressive_model_never_plans(planner, tokenizer):
    for answer in Sampler(planner, tokenizer, SampleConfig(max_tokens=30), MethodConfig("ar")).answer(PROMPTS):
        assert [draft.topics for draft in answer.rounds] == [[]]
        assert answer.denoise_passes == 0
        assert answer.plan_passes == answer.critical_path - answer.cut  # the <eos> of a full answer is forced


# ---------------------------------------------------------------- schedule


def test_after_step_s_of_S_a_span_of_n_slots_has_at_least_ns_over_S_filled(planner, tokenizer):
    for ratio in each([0.05, 0.3, 0.5, 1.0]):
        sampler = Sampler(
            planner, tokenizer, SampleConfig(max_tokens=90, steps_ratio=ratio, apart=False, pads_last=False)
        )
        for prompt in PROMPTS[:3]:
            for passes in denoising(sampler, prompt)[1]:
                steps = math.ceil(ratio * max(map(len, passes[0])))
                assert len(passes) == steps
                for step, spans in enumerate(passes, 1):
                    for slots in spans:
                        assert len(slots) - slots.count(tokenizer.mask) >= math.ceil(len(slots) * step / steps)


def test_what_is_filled_stays(planner, tokenizer):
    for passes in denoising(Sampler(planner, tokenizer, SampleConfig(max_tokens=90)), PROMPTS[0])[1]:
        for before, after in zip(passes, passes[1:]):
            for b, a in zip(sum(before, []), sum(after, [])):
                assert a == b or b == tokenizer.mask


def test_a_threshold_above_all_confidences_fills_one_slot_of_each_span_a_pass(planner, tokenizer):
    _, rounds = denoising(Sampler(planner, tokenizer, SampleConfig(max_tokens=60, threshold=1.0)), PROMPTS[0])
    for passes in rounds:
        for step, spans in enumerate(passes, 1):
            assert [s.count(tokenizer.mask) for s in spans] == [max(0, len(s) - step) for s in spans]


def test_dense_spans_fill_one_slot_of_the_round_then(planner, tokenizer):
    _, rounds = denoising(
        Sampler(planner, tokenizer, SampleConfig(max_tokens=60, threshold=1.0), METHOD["dense"]), PROMPTS[0]
    )
    assert max(len(passes[0]) for passes in rounds) > 1
    for passes in rounds:
        assert [sum(passes[0], []).count(tokenizer.mask) for passes[0] in passes] == list(range(len(passes)))[::-1]


@pytest.mark.parametrize("attention", ["sparse", "dense"])
def test_a_threshold_below_all_confidences_fills_a_round_in_one_pass(planner, tokenizer, attention):
    sampler = Sampler(planner, tokenizer, SampleConfig(max_tokens=60, threshold=1e-9), METHOD[attention])
    answer, rounds = denoising(sampler, PROMPTS[0])
    assert answer.denoise_passes == len(rounds) >= 1


def test_a_threshold_fills_every_slot_at_least_that_confident_and_no_other(one_span, tokenizer):
    """A span fills alone, so its first pass shows the rule: all that are sure enough, or else the surest."""
    for threshold in each([0.2, 0.5, 0.8]):
        config = SampleConfig(max_tokens=30, threshold=threshold)
        answer, (passes,) = denoising(Sampler(one_span, tokenizer, config), "the otter")
        y = answer.layout
        tokens = [
            Token(tokenizer.mask if k == SLOT else i, 0, None if s < 0 else s)
            for i, k, s in zip(y.token, y.kind, y.span)
        ]
        slots = [n for n in range(*answer.rounds[0].spans[0]) if y.kind[n] == SLOT]
        best = (
            one_span.logits(hidden_states(one_span, tokens, "sparse")[slots], tokenizer.pad + 1)
            .softmax(-1)
            .max(-1)
            .values
        )
        filled = torch.tensor([i != tokenizer.mask for i in passes[0][0]])
        assert filled.tolist() == ((best >= threshold) if best.max() >= threshold else best == best.max()).tolist()


@pytest.mark.parametrize("attention", ["sparse", "dense"])
def test_only_unfinished_spans_are_computed_but_dense_ones_until_the_round_ends(planner, tokenizer, attention):
    sampler = Recorder(planner, tokenizer, SampleConfig(max_tokens=90, threshold=1.0), METHOD[attention])
    answer, rounds = denoising(sampler, PROMPTS[0])
    drafts = [d for d in answer.rounds if d.spans]
    computed = [set(entries) for stage, entries, _ in sampler.recorded if stage]
    for draft, passes in zip(drafts, rounds):
        masked = [[True] * len(draft.spans)] + [[tokenizer.mask in slots for slots in spans] for spans in passes]
        for unfinished in masked[:-1]:
            now = computed.pop(0)
            for span, open_ in zip(draft.spans, unfinished):
                assert now.isdisjoint(range(*span)) != (open_ or attention == "dense")
                assert open_ != now.isdisjoint(range(*span)) or attention == "dense"


def test_nothing_outside_spans_is_computed_twice(planner, tokenizer):
    sampler = Recorder(planner, tokenizer, SampleConfig(max_tokens=90))
    for prompt in PROMPTS[:3]:
        answer = sampler.answer([prompt])[0]
        computed = [i for _, entries, _ in sampler.recorded for i in entries if answer.layout.kind[i] in (PROMPT, PLAN)]
        assert len(computed) == len(set(computed))
        assert answer.positions == sum(len(entries) for _, entries, _ in sampler.recorded)


def test_finished_spans_are_computed_once_more_by_the_pass_that_reads_sync(planner, tokenizer):
    sampler = Recorder(planner, tokenizer, SampleConfig(max_tokens=90))
    answer = sampler.answer([PROMPTS[0]])[0]
    assert any(draft.spans for draft in answer.rounds[:-1])
    after = [entries for (before, *_), (stage, entries, _) in zip(sampler.recorded, sampler.recorded[1:])
             if (before, stage) == (True, False)]  # fmt: skip
    for draft in (d for d in answer.rounds[:-1] if d.spans):
        begin, sync = draft.spans[0][0], draft.spans[-1][1]
        assert answer.layout.token[sync] == tokenizer.sync
        assert list(range(begin, sync + 1)) in after


def test_forced_tokens_cost_no_pass_and_every_other_token_of_plan_and_text_one(planner, tokenizer):
    config = SampleConfig(max_tokens=90)
    for prompt in PROMPTS[:3]:
        answer = Sampler(planner, tokenizer, config).answer([prompt])[0]
        grammar, free = Grammar(tokenizer, config.max_tokens), 0
        written = [i for i, kind in zip(answer.layout.token, answer.layout.kind) if kind == PLAN] + [tokenizer.eos]
        for token in written:
            free += grammar.forced() is None
            grammar.advance(token)
        assert free < len(written)
        assert answer.plan_passes == free


def test_the_critical_path_is_plan_tokens_and_the_steps_of_the_longest_spans(planner, tokenizer):
    answer, rounds = denoising(Sampler(planner, tokenizer, SampleConfig(max_tokens=90)), PROMPTS[0])
    steps = sum(math.ceil(0.5 * max(map(len, passes[0]))) for passes in rounds)
    assert answer.critical_path == answer.layout.kind.count(PLAN) + 1 + steps  # <eos> is written, not kept


def test_length_scale_scales_slots_but_no_plan(planner, tokenizer):
    for scale in each([0.1, 0.5, 1.0, 2.5]):
        answer = Sampler(planner, tokenizer, SampleConfig(max_tokens=60, length_scale=scale)).answer([PROMPTS[0]])[0]
        lengths = [(t.length, len(answer.contents(s))) for d in answer.rounds for t, s in zip(d.topics, d.spans)]
        assert lengths and all(slots == max(1, math.ceil(length * 4 * scale)) for length, slots in lengths)


# ---------------------------------------------------------------- limits


def test_every_limit_ends_in_an_answer_that_fits_and_says_if_it_was_cut(planner, tokenizer):
    for limit in range(1, 61):
        for answer in Sampler(planner, tokenizer, SampleConfig(max_tokens=limit)).answer(PROMPTS[:1]):
            written = len(answer.layout) - answer.layout.kind.count(PROMPT) + 1  # <eos> is written, not kept
            assert written <= limit
            assert answer.cut >= (written == limit)  # full: nothing but <eos> could come


def test_any_prompt_is_answered(planner, tokenizer):
    for prompt in each(
        ["", " ", "".join(TAGS) * 3, f"\\{EOS} x\\", "\x00\x1b[2J\r\t", "é水🦦\u2028\u200d", "otter " * 300]
    ):
        result = Sampler(planner, tokenizer, SampleConfig(max_tokens=25)).answer([prompt])[0].result()
        assert result["prompt"] == prompt and parse_answer(result["tagged"])
    assert json.loads(json.dumps(result)) == result


def test_tags_typed_in_a_prompt_are_text(planner, tokenizer):
    layout = Sampler(planner, tokenizer, SampleConfig(max_tokens=1)).answer(["".join(TAGS)])[0].layout
    assert [i for i in layout.token if i >= tokenizer.pad] == [tokenizer.user, tokenizer.assistant]
    assert GIVEN not in layout.kind


class Stuck(Denoise):
    """A way to denoise that asks for no slot."""

    def quota(self, slots, left):
        return 0


def test_a_pass_that_fills_nothing_ends_the_answer_with_an_error(planner, tokenizer, monkeypatch):
    monkeypatch.setitem(DECODERS, "planned", Decoder(WrittenPlan, Stuck))
    with pytest.raises(RuntimeError, match="filled no slot of the answer to 'Tell me"):
        Sampler(planner, tokenizer, SampleConfig(max_tokens=60)).answer([PROMPTS[1]])


def test_predictions_that_are_not_finite_are_refused(planner, tokenizer):
    for value, settings in each(
        itertools.product([math.nan, math.inf], [dict(), dict(temperature=1.0), dict(temperature=1.0, ahead=4)])
    ):
        broken = steered(tokenizer)
        broken.logits = lambda hidden, n=None: planner.logits(hidden, n) + value
        with pytest.raises(ValueError, match="not finite"):
            Sampler(broken, tokenizer, SampleConfig(max_tokens=60, **settings)).answer([PROMPTS[1]])


def test_a_prompt_too_long_is_refused_before_anything_is_computed(planner, tokenizer):
    with pytest.raises(ValueError, match=r"the prompt 'otter otter.*tokens.*--max_tokens 10.*more than 4096"):
        Sampler(planner, tokenizer, SampleConfig(max_tokens=10)).answer(["short", "otter " * 20_000])


@pytest.mark.parametrize("attention", METHOD)
def test_the_last_layer_computes_what_is_read_as_if_it_computed_all(planner, tokenizer, attention):
    """Hidden states of some columns, against those of a pass that returns all."""

    class Both(Passes):
        def one_pass(self, table, rows, columns=None, *, n_keys, first):
            some = super().one_pass(table, rows, columns, n_keys=n_keys, first=first)
            if columns is not None:
                every = super().one_pass(table, rows, n_keys=n_keys, first=first)
                torch.testing.assert_close(some, every.take_along_dim(columns[..., None], dim=1))
                compared.append(columns.shape)
            return some

    compared = []
    sampler = Sampler(planner, tokenizer, SampleConfig(max_tokens=60), METHOD[attention])
    sampler.passes = Both(planner)
    sampler.answer(PROMPTS)
    assert len(compared) > 5


BAD = [("steps_ratio", -0.1), ("steps_ratio", 1.1), ("threshold", -0.1), ("threshold", 1.1), ("length_scale", 0), ("top_p", 0),
       ("top_p", 1.5), ("temperature", -1), ("temperature", math.nan), ("temperature", 1e-300), ("seed", -1), ("seed", 2**64),
       ("max_tokens", 5000), ("ahead", -1), ("max_tokens", 0), ("order", "surest"), ("steps_ratio", math.nan)]  # fmt: skip


def test_a_bad_setting_is_refused_by_name_and_value():
    for name, value in each(BAD):
        with pytest.raises(ValueError, match=rf"{name}.*{value}"):
            SampleConfig(**{name: value})
