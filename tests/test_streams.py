"""Streams and draft slots of a training batch, against the sentences that specify them (drafting/training.py)."""

from collections import Counter

import numpy as np
import pytest
import torch
from conftest import OTTER, each, random_example
from naive_masks import oracle_target, read_tags, sees

from config import METHODS, MethodConfig, TrainConfig
from drafting.training import ArrangeDrafts
from loss import JointLoss, counts, validate
from masks import PLAN, Layout, encode_example, visible
from noise import IGNORE, TERMS, Sequence, Term, make_batch, noise_levels
from plumbing.settings import refuse_idle
from tags import Example, Round

AHEAD = 3
KINDS = [("sparse", 0.0), ("sparse", 0.5), ("sparse", 1.0), ("dense", 0.0), ("causal", 0.0)]


class Row:
    """One row of a batch, entry by entry. No two entries but drafts come from one place, which is their position."""

    def __init__(self, batch, b, layout, tokenizer):
        self.token, self.position, self.target, self.term = (
            getattr(batch, name)[b].tolist() for name in ("token", "position", "target", "term")
        )
        self.places, self.layout, self.tokenizer = read_tags(layout.token, tokenizer), layout, tokenizer
        self.mask = visible(batch.ranges[b : b + 1], len(self.token))[0].numpy()
        drafts = {e for e, term in enumerate(self.term) if term in (Term.PLAN_DRAFT, Term.SPAN_DRAFT)}
        padding = len(self.token)
        while padding and batch.ranges[b, padding - 1].tolist() == [1, 0, 0] and padding - 1:
            padding -= 1
        self.entries, self.drafts = range(padding), sorted(drafts)
        self.entry = {self.position[e]: e for e in self.entries if e not in drafts}
        assert len(self.entry) + len(drafts) == padding

    def seen(self, e):
        return set(np.flatnonzero(self.mask[e]).tolist())

    def is_causal(self, e):
        return self.term[e] in (Term.CAUSAL, Term.SPAN_DRAFT)


def rows(tokenizer, attention, causal, ahead=AHEAD, seeds=range(12)):
    for seed in seeds:
        rng = np.random.default_rng(seed)
        examples = [random_example(100 * seed + n, tokenizer) for n in range(3)]
        layouts = [encode_example(e, tokenizer, attention) for e in examples]
        rounds = [int(rng.integers(len(e.rounds))) for e in examples]
        batch = make_batch(
            [*map(Sequence, layouts)], rounds, tokenizer, rng, causal=causal, arrange=ArrangeDrafts(ahead)
        )
        for b, (layout, round_) in enumerate(zip(layouts, rounds)):
            yield Row(batch, b, layout, tokenizer), round_


# ---------------------------------------------------------------- who sees whom


@pytest.mark.parametrize("attention, causal", KINDS)
def test_tokens_see_what_the_sentences_say_wherever_their_copy_is(tokenizer, attention, causal):
    checked = Counter()
    for row, _ in rows(tokenizer, attention, causal):
        for e in row.entry.values():
            place = row.places[row.position[e]]
            if place.name != "<eos>":  # after the last spans, which it would have to see; it predicts nothing
                span_attention = "causal" if row.is_causal(e) else attention
                expected = {row.entry[k.i] for k in row.places if sees(place, k, span_attention)}
                assert row.seen(e) == expected
                checked[row.term[e]] += 1
    assert checked[Term.CAUSAL] > 50 if causal or attention == "causal" else checked[Term.CAUSAL] == 0


@pytest.mark.parametrize("attention, causal", KINDS)
def test_a_draft_slot_of_text_sees_the_text_before_its_group_and_the_group_up_to_itself(tokenizer, attention, causal):
    lengths = Counter()
    for row, _ in rows(tokenizer, attention, causal):
        for e in row.drafts:
            if row.term[e] == Term.PLAN_DRAFT:
                group = sorted(row.seen(e) & set(row.drafts))
                known = row.position[e] - len(group)
                assert group == [*range(e - len(group) + 1, e + 1)]
                assert [row.position[k] for k in group] == [*range(known + 1, row.position[e] + 1)]
                assert row.seen(e) - set(group) == {row.entry[i] for i in range(known + 1)}
                assert row.places[known].part == "outside" or row.places[known].name == "<assistant>"
                lengths[len(group)] += 1
    assert set(lengths) == {1, 2, 3}


def test_plan_and_text_have_a_group_of_draft_slots_for_16_targets_and_at_least_three(tokenizer):
    for words in (1, 40, 200):
        sequence = Sequence(encode_example(Example("p", (Round("otter " * words),)), tokenizer))
        targets = int((sequence.next != IGNORE).sum())
        pieces = list(ArrangeDrafts(AHEAD).beside(sequence, len(sequence.next), 0, tokenizer, np.random.default_rng(0)))
        assert len(pieces) == min(max(3, targets // 16), targets - 1)
        assert len({piece.position[0] for piece in pieces}) == len(pieces), "each after another place"


@pytest.mark.parametrize("attention, causal", [k for k in KINDS if k[1] or k[0] == "causal"])
def test_a_draft_slot_of_a_span_sees_what_a_causal_token_in_its_place_would(tokenizer, attention, causal):
    checked = 0
    for row, _ in rows(tokenizer, attention, causal):
        draft = {row.position[e]: e for e in row.drafts if row.term[e] == Term.SPAN_DRAFT}
        for i, e in draft.items():
            place = row.places[i]
            assert place.content, "never past the span's slots"
            known = {k.i for k in row.places if sees(place, k, "causal")} - set(draft)
            group = {k for k in draft if row.places[k].same_span(place) and k <= i}
            assert i not in row.entry and row.seen(e) == {row.entry[k] for k in known} | {draft[k] for k in group}
            assert known | group == {k.i for k in row.places if sees(place, k, "causal")}
            checked += 1
    assert checked > 40


def test_nothing_but_its_group_sees_a_draft_slot(tokenizer):
    for row, _ in rows(tokenizer, "sparse", 0.5):
        for e in row.entry.values():
            assert not row.seen(e) & set(row.drafts)


# ---------------------------------------------------------------- what is predicted


def after_first_pad(row, i):
    place = row.places[i]
    return any(row.layout.token[k.i] == row.tokenizer.pad for k in row.places[:i] if k.content and k.same_span(place))


@pytest.mark.parametrize("attention, causal", KINDS)
def test_known_tokens_predict_the_next_token_of_their_stream(tokenizer, attention, causal):
    for row, round_ in rows(tokenizer, attention, causal):
        text = oracle_target(row.places, row.layout.token)
        for i, e in row.entry.items():
            if row.is_causal(e):
                place, after = row.places[i], row.places[i + 1]
                predicts = after.content and not after_first_pad(row, after.i)
                assert row.target[e] == (row.layout.token[after.i] if predicts else IGNORE)
                assert row.token[e] == row.layout.token[i] and place.round == round_
            elif row.places[i].part != "span":
                assert (row.target[e], row.term[e]) == (text[i], Term.PLAN)


@pytest.mark.parametrize("attention, causal", KINDS)
def test_draft_slots_predict_one_place_further_each_as_far_as_there_is_a_target(tokenizer, attention, causal):
    for row, round_ in rows(tokenizer, attention, causal):
        stream = [p.i for p in row.places if p.part == "outside"]
        trained = [i for i in stream if row.places[i].round <= round_]
        last = next((i for i in stream if i > trained[-1]), trained[-1])  # a plan's last token predicts the next round
        groups = {}
        for e in row.drafts:
            assert row.token[e] == tokenizer.mask
            if row.term[e] == Term.SPAN_DRAFT:
                after = row.places[row.position[e] + 1]
                assert after.content and not after_first_pad(row, after.i)
                assert row.target[e] == row.layout.token[after.i]
            else:
                drafted = len(row.seen(e) & set(row.drafts))
                known = row.position[e] - drafted
                expected = [i for i in stream if known < i <= last]
                assert row.target[e] == row.layout.token[expected[drafted]]
                groups[e - drafted + 1] = drafted, len(expected) - 1  # the last slot of a group has the last word
        assert all(drafted == min(AHEAD, there) for drafted, there in groups.values())


def test_a_cut_span_drafts_as_far_as_it_has_targets_and_each_cut_comes_up(tokenizer):
    cuts, spans = Counter(), 0
    layout = encode_example(OTTER, tokenizer)
    for seed in range(300):
        batch = make_batch(
            [Sequence(layout)], [0], tokenizer, np.random.default_rng(seed), causal=1.0, arrange=ArrangeDrafts(AHEAD)
        )
        row = Row(batch, 0, layout, tokenizer)
        span = [p for p in row.places if (p.round, p.span) == (0, 0)]
        known = [p for p in span if p.content and not after_first_pad(row, p.i) and p.i - 1 in row.entry]
        targets = [p for p in span if p.content and not after_first_pad(row, p.i)]
        drafted = [p for p in span if p.i in {row.position[e] for e in row.drafts if row.term[e] == Term.SPAN_DRAFT}]
        assert len(drafted) == min(AHEAD, len(targets) - len(known))
        cuts[len(known)] += 1
        spans = len(targets)
    assert set(cuts) == set(range(1, spans + 1)) and 60 < cuts[spans] < 120, "0.3 of them whole"


# ---------------------------------------------------------------- the model's view


@torch.no_grad()
def test_a_draft_slot_gets_the_logits_that_a_sampler_would_compute(tokenizer, model):
    """A group after a place of the text, and [MASK]s written after the text up to there, are the same computation."""
    layout = encode_example(OTTER, tokenizer)
    batch = make_batch(
        [Sequence(layout)], [1], tokenizer, np.random.default_rng(0), causal=1.0, arrange=ArrangeDrafts(AHEAD)
    )
    hidden = model(batch.token, batch.position, batch.ranges)[0]
    row, seen_terms = Row(batch, 0, layout, tokenizer), set()
    for e in row.drafts:
        sampled, place = Layout("causal"), row.places[row.position[e]]
        if row.term[e] == Term.SPAN_DRAFT:
            first = next(p.i for p in row.places if p.same_span(place))
            prefix = next(p.i for p in row.places if p.part == "span" and p.round == place.round)
            known = [layout.token[i] for i in range(first, place.i) if i in row.entry]
        else:
            prefix = row.position[e] - len(row.seen(e) & set(row.drafts)) + 1
            first, known = prefix, []
        for column in ("token", "kind", "round", "span", "position", "prefix", "begin", "end"):
            getattr(sampled, column).extend(getattr(layout, column)[:prefix])
        tokens = known + [tokenizer.mask] * (row.position[e] - first - len(known) + 1)
        sampled._columns(tokens, [PLAN] * len(tokens), 0, -1, first)
        sampled.prefix += [prefix] * len(tokens)
        sampled.begin += [prefix] * len(tokens)
        sampled.end += range(prefix + 1, prefix + len(tokens) + 1)
        ranges = torch.tensor([sampled.prefix, sampled.begin, sampled.end]).T[None]
        alone = model(torch.tensor([sampled.token]), torch.tensor([sampled.position]), ranges)[0, -1]
        torch.testing.assert_close(hidden[e], alone, rtol=1e-4, atol=1e-4)
        seen_terms.add(row.term[e])
    assert seen_terms == {Term.PLAN_DRAFT, Term.SPAN_DRAFT}


def test_the_gradient_of_the_loss_reaches_every_term(tokenizer, model):
    layouts = [encode_example(random_example(seed, tokenizer, rounds=2, spans=3), tokenizer) for seed in range(4)]
    sequences = [*map(Sequence, layouts)]
    batch = make_batch(
        sequences, [0] * 4, tokenizer, np.random.default_rng(0), "uniform", causal=0.5, arrange=ArrangeDrafts(AHEAD)
    )
    assert (counts(batch, "uniform") > 0).all()
    sums = JointLoss(model, tokenizer.pad + 1)(batch)
    for term in Term:
        gradients = torch.autograd.grad(sums[term], list(model.parameters()), retain_graph=True)
        assert all(g.isfinite().all() and g.abs().max() > 0 for g in gradients), TERMS[term]


@torch.no_grad()
def test_the_terms_are_sums_over_their_targets_alone(tokenizer, model):
    layouts = [encode_example(random_example(seed, tokenizer, rounds=2, spans=3), tokenizer) for seed in range(4)]
    rng = np.random.default_rng(1)
    batch = make_batch(
        [*map(Sequence, layouts)], [0] * 4, tokenizer, rng, "elbo", causal=0.5, arrange=ArrangeDrafts(AHEAD)
    )
    logits, expected = model.logits(model(batch.token, batch.position, batch.ranges)), [0.0] * len(TERMS)
    for b, t in (batch.target != IGNORE).nonzero().tolist():
        term = int(batch.term[b, t])
        n = None if term in (Term.PLAN, Term.PLAN_DRAFT) else tokenizer.pad + 1
        expected[term] -= float(logits[b, t, :n].log_softmax(-1)[batch.target[b, t]] * batch.weight[b, t])
    assert JointLoss(model, tokenizer.pad + 1)(batch).tolist() == pytest.approx(expected, rel=1e-4)


# ---------------------------------------------------------------- nothing drafted, nothing changed


def test_without_drafts_and_causal_spans_a_row_is_its_sequence_with_slots_noised(tokenizer):
    """The draws of the noise, too, are those of a batch that knows of no streams."""
    layouts = [encode_example(random_example(seed, tokenizer), tokenizer) for seed in range(6)]
    sequences = [*map(Sequence, layouts)]
    rounds = [s.n_rounds - 1 for s in sequences]
    batch, rng = make_batch(sequences, rounds, tokenizer, np.random.default_rng(5)), np.random.default_rng(5)
    spans = [(b, n) for b, s in enumerate(sequences) for n in np.unique(s.span[s.round == rounds[b]]) if n >= 0]
    t, _ = noise_levels(len(spans), 0.0, rng)
    slots = [(b, i, t[n]) for n, (b, span) in enumerate(spans) for i in np.flatnonzero(sequences[b].span == span)
             if read_tags(layouts[b].token, tokenizer)[i].content]  # fmt: skip
    masked = {(b, i): level for (b, i, level), draw in zip(slots, rng.random(len(slots))) if draw < level}
    for b, s in enumerate(sequences):
        n = len(s.token)
        expected = [tokenizer.mask if (b, i) in masked else token for i, token in enumerate(s.token)]
        assert batch.token[b, :n].tolist() == expected and batch.n_tokens == sum(len(s.token) for s in sequences)
        assert batch.position[b, :n].tolist() == [*range(n)] and batch.ranges[b, :n].tolist() == s.ranges.tolist()
        target = [s.token[i] if (b, i) in masked else after for i, after in enumerate(s.next)]
        assert batch.target[b, :n].tolist() == target


def test_each_span_of_the_joint_method_trains_in_one_of_the_two_ways(tokenizer):
    layout, ways = encode_example(OTTER, tokenizer), Counter()
    for seed in range(40):
        batch = make_batch(
            [Sequence(layout)], [1], tokenizer, np.random.default_rng(seed), causal=0.5, arrange=ArrangeDrafts(AHEAD)
        )
        row = Row(batch, 0, layout, tokenizer)
        spans = {}
        for e in row.entry.values():
            place = row.places[row.position[e]]
            if place.round == 1 and (place.content or row.is_causal(e)):
                spans.setdefault(place.span, set()).add(row.term[e])
        assert all(len(terms) == 1 for terms in spans.values()) and set(spans) == {0, 1, 2}
        ways.update(next(iter(terms)) for terms in spans.values())
    assert 35 < ways[Term.SPAN] < 85 and ways[Term.SPAN] + ways[Term.CAUSAL] == 120


# ---------------------------------------------------------------- settings


def test_what_writes_nothing_left_to_right_cannot_draft():
    for method in each([name for name, method in METHODS.items() if method.plan == "given"]):
        with pytest.raises(ValueError, match=f"--ahead 2: nothing is written left to right with {method}"):
            refuse_idle(TrainConfig(ahead=2), MethodConfig(method))


def test_validation_reports_the_terms_that_training_has(tokenizer, model):
    loss = JointLoss(model, tokenizer.pad + 1)
    sequences = [Sequence(encode_example(random_example(seed, tokenizer, spans=2), tokenizer)) for seed in range(4)]
    drafts, plain = ArrangeDrafts(2), validate(loss, sequences, tokenizer)
    assert set(plain) == {"plan", "span"}
    assert set(validate(loss, sequences, tokenizer, draws=2)) == {"plan", "span", "span_error"}
    assert set(validate(loss, sequences, tokenizer, arrange=drafts)) == {"plan", "span", "plan_draft"}
    assert set(validate(loss, sequences, tokenizer, causal=0.5)) == {"plan", "span", "causal"}
    both = validate(loss, sequences, tokenizer, causal=0.5, arrange=drafts)
    assert set(both) == {"plan", "span", "causal", "plan_draft", "span_draft"}
    assert (both["plan"], both["span"]) == pytest.approx((plain["plan"], plain["span"]))
    causal = validate(loss, sequences, tokenizer, causal=1.0)
    assert causal == pytest.approx({name: both[name] for name in ("plan", "causal")})
