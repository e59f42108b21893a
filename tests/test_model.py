"""The transformer against a naive one, and its cache against a fresh forward."""

import itertools

import numpy as np
import pytest
import torch
from conftest import OTTER, each, in_span, random_example, small_model
from naive_model import naive_forward, naive_scaling

from kernels.backends import BACKENDS
from masks import ATTENTION, LINKED, PROMPT, SLOT, Layout, encode_example, visible
from model import KVCache, ModelConfig, Transformer
from noise import Sequence, make_batch
from tags import Example, Round, Span
from train import JointLoss


def inputs(layout):
    """Token, position and ranges of a layout as a batch of one."""
    ranges = torch.tensor([layout.prefix, layout.begin, layout.end]).T
    return torch.tensor([layout.token]), torch.tensor([layout.position]), ranges[None]


@torch.no_grad()
def fresh(model, layout):
    """Hidden states (T, D) without a cache."""
    return model(*inputs(layout))[0]


def span_entries(layout, round_, span):
    return [i for i in range(len(layout)) if (layout.round[i], layout.span[i]) == (round_, span)]


# ---------------------------------------------------------------- the transformer, written naively


LLAMA3 = {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 3.0,
          "original_max_position_embeddings": 40.0}  # fmt: skip


@pytest.mark.parametrize("attention", ATTENTION)
def test_forward_is_the_naive_softmax_over_the_visible_keys(tokenizer, attention):
    for config in each([
    {}, {"qk_norm": False}, {"n_kv_head": 4}, {"n_kv_head": 1, "rope_theta": 100.0}, {"head_dim": 16, "norm_eps": 0.1},
    {"qkv_bias": True, "rope_scaling": {"rope_type": "linear", "factor": 3.0}},
    {"rope_scaling": LLAMA3, "rope_theta": 100.0},
]):  # fmt: skip
        model = small_model(tokenizer.vocab_size, **config)
        example = Example("", (Round("", (Span("food", "fish", 1), Span("play", "", 1))), Round("In")))
        token, position, ranges = inputs(encode_example(example, tokenizer, attention))
        with torch.no_grad():
            fast = model(token, position, ranges)[0]
            naive = naive_forward(model.double(), token[0], position[0], ranges[0])
        assert fast.std() > 0.5
        torch.testing.assert_close(fast, naive.float(), atol=1e-5, rtol=1e-5)


def test_only_relative_positions_matter(model, tokenizer):
    token, position, ranges = inputs(encode_example(OTTER, tokenizer))
    with torch.no_grad():
        here, shifted, stretched = (model(token, p, ranges) for p in (position, position + 100, position * 2))
    torch.testing.assert_close(here, shifted, atol=1e-4, rtol=1e-4)
    assert (here - stretched).abs().max() > 0.1


def test_the_waves_of_the_test_are_stretched_partly_stretched_and_kept():
    waves = [100.0 ** (-2 * i / 8) for i in range(4)]
    ratios = [round(naive_scaling(f, **LLAMA3) / f, 6) for f in waves]
    assert ratios[0] == 1 and ratios[-1] == 0.25 and any(0.25 < ratio < 1 for ratio in ratios)


def test_an_output_layer_of_its_own_gives_the_logits(tokenizer):
    model = small_model(tokenizer.vocab_size, tied=False)
    hidden = torch.randn(2, model.config.d_model, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(model.logits(hidden, 17), hidden @ model.output.weight[:17].T)


def test_recomputed_blocks_give_the_same_gradients(tokenizer):
    grads, sizes = [], []
    for recompute in (False, True):
        model, kept = small_model(tokenizer.vocab_size), []
        model.recompute = recompute
        with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.numel()) or x, lambda x: x):
            hidden = model(*inputs(encode_example(OTTER, tokenizer)))
        hidden.square().sum().backward()
        grads.append([p.grad for p in model.parameters()])
        sizes.append(sum(kept))
    torch.testing.assert_close(*grads)
    assert sizes[1] < sizes[0] / 3


def test_logits_can_be_restricted_to_the_first_ids_and_are_tied_to_the_embedding(model):
    hidden = torch.randn(2, 3, model.config.d_model, generator=torch.Generator().manual_seed(0))
    every, few = model.logits(hidden), model.logits(hidden, 17)
    assert every.shape == (2, 3, model.config.vocab_size) and few.shape == (2, 3, 17)
    torch.testing.assert_close(every, hidden @ model.embedding.weight.T, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(few, every[..., :17], atol=1e-4, rtol=1e-4)


def test_the_plan_loss_is_over_the_whole_vocabulary_and_the_span_loss_over_text_and_pad_alone(model, tokenizer):
    batch = make_batch([Sequence(encode_example(OTTER, tokenizer))], [1], tokenizer, np.random.default_rng(3))
    with torch.no_grad():
        plan, span = JointLoss(model, tokenizer.pad + 1)(batch)[:2]
        logits = model(batch.token, batch.position, batch.ranges)[0] @ model.embedding.weight.T
    expected = [0.0, 0.0]
    for i, target in enumerate(batch.target[0].tolist()):
        if target >= 0 and in_span(batch)[0, i]:
            expected[1] -= float(batch.weight[0, i] * logits[i, : tokenizer.pad + 1].log_softmax(-1)[target])
        elif target >= 0:
            expected[0] -= float(logits[i].log_softmax(-1)[target])
    assert (float(plan), float(span)) == pytest.approx(expected, rel=1e-4)
    assert min(expected) > 1


# ---------------------------------------------------------------- size and work


def test_the_number_of_parameters_is_that_of_the_formula():
    for qk_norm in each([True, False]):
        model = small_model(300, qk_norm=qk_norm)
        V, D, L, H, H_kv, FF, hd = 300, 32, 2, 4, 2, 48, 8
        attention = D * (H + 2 * H_kv) * hd + H * hd * D + (2 * hd if qk_norm else 0)
        assert model.n_params() == V * D + L * (attention + 3 * D * FF + 2 * D) + D


NO_MODELS = [
    ("--d_model 30: expected an even multiple of --n_head 4", dict(d_model=30)),
    ("--d_model 12: expected an even multiple", dict(d_model=12)), ("--n_head 4: expected a multiple", dict(n_kv_head=3)),
    ("--n_head 0", dict(n_head=0)), ("--n_kv_head 0", dict(n_kv_head=0)), ("--n_layer 0", dict(n_layer=0)),
    ("--d_ff -1", dict(d_ff=-1)), ("--rope_theta 0", dict(rope_theta=0)), ("--rope_theta nan", dict(rope_theta=float("nan"))),
]  # fmt: skip


def test_a_config_that_is_no_model_is_refused_by_the_name_of_the_setting():
    for said, config in each(NO_MODELS):
        with pytest.raises(ValueError, match=said):
            ModelConfig(**{"d_model": 32, **config})


def test_weights_start_small_and_those_of_residual_branches_smaller(tokenizer):
    """As GPT-2: 0.02, and 0.02 / sqrt(2 layers) where a block adds to the residual stream."""
    torch.manual_seed(0)
    model = Transformer(
        ModelConfig(vocab_size=tokenizer.vocab_size, n_layer=8, d_model=128, n_head=2, n_kv_head=2, d_ff=128)
    )
    for name, p in model.named_parameters():
        if p.ndim == 1:
            assert torch.equal(p, torch.ones_like(p))
        else:
            expected = 0.02 / 16**0.5 if name.endswith(("attention.out.weight", "down.weight")) else 0.02
            assert float(p.detach().std()) == pytest.approx(expected, rel=0.05), name


# ---------------------------------------------------------------- what the mask forbids


@pytest.mark.parametrize("attention", ATTENTION)
def test_gradients_flow_exactly_where_the_mask_allows(model, tokenizer, attention):
    """What one layer forbids, no number of layers allows: the mask is its own closure."""
    layout = encode_example(OTTER, tokenizer, attention)
    token, position, ranges = (x.expand(len(layout), *x.shape[1:]) for x in inputs(layout))
    embedded = []
    hook = model.embedding.register_forward_hook(lambda module, args, out: embedded.append(out))
    hidden = model(token, position, ranges)
    hook.remove()
    each = torch.arange(len(layout))
    probe = torch.randn(model.config.d_model, generator=torch.Generator().manual_seed(0))
    (grad,) = torch.autograd.grad((hidden[each, each] @ probe).sum(), embedded)  # row i: gradients of query i
    mask = visible(ranges[:1], len(layout))[0]
    assert torch.equal(grad.abs().amax(-1) > 0, mask)
    assert torch.equal((mask.long() @ mask.long()) > 0, mask)


def moved_by_a_change(model, layout, entries):
    """Which tokens get other hidden states when the tokens of some entries change."""
    before = fresh(model, layout)
    kept = list(layout.token)
    for i in entries:
        layout.token[i] = (layout.token[i] + 7) % 256
    moved = (fresh(model, layout) - before).abs().amax(-1) > 1e-3
    layout.token = kept
    return moved


@pytest.mark.parametrize("attention", ATTENTION)
def test_a_change_in_a_span_moves_neither_its_plan_nor_its_siblings(model, tokenizer, attention):
    layout = encode_example(OTTER, tokenizer, attention)
    mine, sibling = span_entries(layout, 0, 0), span_entries(layout, 0, 1)
    moved = moved_by_a_change(model, layout, mine)
    assert moved[mine].all() if attention != "causal" else moved[mine[-1]]
    assert not moved[: mine[0]].any(), "prompt and plan"
    assert moved[sibling].all() if attention in LINKED else not moved[sibling].any()
    assert moved[sibling[-1] + 1 :].all(), "<sync/> and what follows see the finished spans"


def test_a_change_in_a_later_round_moves_nothing_before_it(model, tokenizer):
    for attention in ATTENTION:
        layout = encode_example(OTTER, tokenizer, attention)
        later = [i for i in range(len(layout)) if layout.round[i] == 1]
        moved = moved_by_a_change(model, layout, later)
        assert not moved[: later[0]].any() and moved[later[0]] and moved[-1]


# ---------------------------------------------------------------- batches


@pytest.mark.parametrize("attention", ATTENTION)
def test_a_row_of_a_ragged_batch_is_what_it_is_alone(model, tokenizer, attention):
    sequences = [Sequence(encode_example(random_example(n, tokenizer), tokenizer, attention)) for n in range(6)]
    rounds = [n % s.n_rounds for n, s in enumerate(sequences)]
    batch = make_batch(sequences, rounds, tokenizer, np.random.default_rng(0))
    with torch.no_grad():
        together = model(batch.token, batch.position, batch.ranges)
        assert together.isfinite().all()
        for b, (s, r) in enumerate(zip(sequences, rounds)):
            n = s.stop(r)
            alone = model(batch.token[b : b + 1, :n], batch.position[b : b + 1, :n], batch.ranges[b : b + 1, :n])
            torch.testing.assert_close(together[b, :n], alone[0], atol=1e-5, rtol=1e-5)


# ---------------------------------------------------------------- the cache


@torch.no_grad()
def cached_pass(model, cache, layouts, entries):
    """Hidden states of some entries of each layout, as rows of one padded pass over a cache."""
    width = max(map(len, entries))
    token, position, index = (torch.zeros(len(layouts), width, dtype=torch.long) for _ in range(3))
    ranges = torch.tensor([1, 0, 0]).repeat(len(layouts), width, 1)
    index[:] = cache.junk
    for row, (layout, mine) in enumerate(zip(layouts, entries)):
        columns = [x[0, mine] for x in inputs(layout)]
        token[row, : len(mine)], position[row, : len(mine)], ranges[row, : len(mine)] = columns
        index[row, : len(mine)] = torch.tensor(mine)
    hidden = model(token, position, ranges, cache, index)
    return [h[: len(mine)] for h, mine in zip(hidden, entries)]


def cuts(layout, rng):
    """Chunks of a layout in order, of random sizes; what sees itself in both directions stays in one chunk."""
    chunks = [[0]]
    for i in range(1, len(layout)):
        both = layout.begin[i] < i and layout.end[i - 1] > i and layout.span[i] >= 0
        if both or rng.random() < 0.7:
            chunks[-1].append(i)
        else:
            chunks.append([i])
    return chunks


@pytest.mark.parametrize("attention", ATTENTION)
def test_chunks_read_in_order_give_what_a_fresh_forward_gives(model, tokenizer, attention):
    for seed in range(8):
        layout = encode_example(random_example(seed, tokenizer), tokenizer, attention)
        cache = KVCache(model.config, 1, len(layout))
        chunks = cuts(layout, np.random.default_rng(seed))
        hidden = torch.cat([cached_pass(model, cache, [layout], [chunk])[0] for chunk in chunks])
        torch.testing.assert_close(hidden, fresh(model, layout), atol=1e-5, rtol=1e-5)


def masked_layout(example, tokenizer, attention):
    """The first round's prompt, plan and scaffold of [MASK], where its spans are, and their finished tokens."""
    whole = encode_example(example, tokenizer, attention)
    stop = max(i for i in range(len(whole)) if whole.round[i] == 0) + 1
    layout = Layout(attention, *(column[:stop] for name, column in vars(whole).items() if name != "attention"))
    finished = list(layout.token)
    for i in range(stop):
        if layout.kind[i] == SLOT:
            layout.token[i] = tokenizer.mask
    return layout, [span_entries(layout, 0, n) for n in range(len(example.rounds[0].spans))], finished


@pytest.mark.parametrize("attention", ATTENTION)
def test_a_denoising_pass_over_the_cached_prefix_computes_only_spans_and_is_exact(model, tokenizer, attention):
    """Slots are filled pass by pass; the entries of spans in the cache are stale in between, and never matter."""
    layout, spans, finished = masked_layout(OTTER, tokenizer, attention)
    cache, first, rng = KVCache(model.config, 1, len(layout)), spans[0][0], np.random.default_rng(0)
    cached_pass(model, cache, [layout], [list(range(first))])
    for step in range(6):
        entries = list(range(first, len(layout)))
        hidden = cached_pass(model, cache, [layout], [entries])[0]
        torch.testing.assert_close(hidden, fresh(model, layout)[entries], atol=1e-5, rtol=1e-5)
        for i in rng.permutation(entries)[: len(entries) // 3]:
            layout.token[i] = finished[i]


@pytest.mark.parametrize("attention", ["sparse", "causal"])
def test_a_finished_span_may_leave_the_denoising_passes(model, tokenizer, attention):
    layout, spans, finished = masked_layout(OTTER, tokenizer, attention)
    cache = KVCache(model.config, 1, len(layout))
    cached_pass(model, cache, [layout], [list(range(spans[0][0]))])
    for i in spans[0]:
        layout.token[i] = finished[i]
    hidden = cached_pass(model, cache, [layout], [spans[1]])[0]
    torch.testing.assert_close(hidden, fresh(model, layout)[spans[1]], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("attention", ATTENTION)
def test_spans_read_once_more_with_the_sync_leave_an_exact_cache(model, tokenizer, attention):
    whole = encode_example(OTTER, tokenizer, attention)
    layout, spans, _ = masked_layout(OTTER, tokenizer, attention)
    cache, first, stop = KVCache(model.config, 1, len(whole)), spans[0][0], len(layout)
    cached_pass(model, cache, [layout], [list(range(first))])
    cached_pass(model, cache, [layout], [list(range(first, stop))])  # all [MASK]: stale entries
    stale = cached_pass(model, cache, [whole], [[stop]])[0]
    exact = cached_pass(model, cache, [whole], [list(range(first, stop + 1))])[0][-1:]
    torch.testing.assert_close(exact, fresh(model, whole)[stop : stop + 1], atol=1e-5, rtol=1e-5)
    assert (stale - exact).abs().max() > 0.01, "with spans not read again the next plan would differ"


def test_ragged_rows_of_a_cached_pass_are_what_they_are_alone_and_rows_can_leave(model, tokenizer):
    layouts = [encode_example(random_example(seed, tokenizer), tokenizer) for seed in range(4)]
    cache = KVCache(model.config, 4, max(map(len, layouts)))  # the longest row uses every entry
    first = [[i for i in range(len(y)) if y.kind[i] == PROMPT] for y in layouts]
    rest = [[i for i in range(len(y)) if y.kind[i] != PROMPT] for y in layouts]
    cached_pass(model, cache, layouts, first)
    cache.select(torch.tensor([3, 1]))
    hidden = cached_pass(model, cache, [layouts[3], layouts[1]], [rest[3], rest[1]])
    for n, h in zip((3, 1), hidden):
        torch.testing.assert_close(h, fresh(model, layouts[n])[rest[n]], atol=1e-5, rtol=1e-5)


def test_a_row_that_only_pads_a_pass_keeps_its_cache(model, tokenizer):
    layout = encode_example(OTTER, tokenizer)
    cache, every = KVCache(model.config, 2, len(layout)), list(range(len(layout)))  # full to its last entry
    cached_pass(model, cache, [layout, layout], [every, every])
    before = [layer.clone() for layer in (*cache.k, *cache.v)]
    cached_pass(model, cache, [layout, layout], [every, []])
    for now, then in zip((*cache.k, *cache.v), before):
        assert torch.equal(now[1, :-1], then[1, :-1])


def test_junk_and_unwritten_entries_are_never_seen(model, tokenizer):
    layouts = [encode_example(random_example(seed, tokenizer), tokenizer) for seed in (1, 2)]
    first = [[i for i in range(len(y)) if y.kind[i] == PROMPT] for y in layouts]
    rest = [[i for i in range(len(y)) if y.kind[i] != PROMPT] for y in layouts]
    outcomes = []
    for poison in (0.0, 1e4):
        cache = KVCache(model.config, 2, max(map(len, layouts)))
        for layer in (*cache.k, *cache.v):
            layer.fill_(poison)
        outcomes.append([*cached_pass(model, cache, layouts, first), *cached_pass(model, cache, layouts, rest)])
    for clean, poisoned in zip(*outcomes):
        torch.testing.assert_close(poisoned, clean, atol=1e-5, rtol=1e-5)


# ---------------------------------------------------------------- what makes sampling on a CPU fast


def test_attention_by_span_is_attention_under_the_dense_mask():
    """In a batch of two rows, whose spans have other sizes and see prefixes of other lengths."""
    for sizes, heads in each(itertools.product([[40, 40], [40, 25, 33], [60]], [4, 2])):
        torch.manual_seed(0)
        rows = []
        for prefix, row in ((30, sizes), (17, sizes[::-1])):
            starts = [prefix + sum(row[:n]) for n in range(len(row))]
            rows.append([[prefix, start, start + size] for start, size in zip(starts, row) for _ in range(size)])
        ranges, n_keys = torch.tensor(rows), 30 + sum(sizes)
        q, k, v = (torch.randn(2, n, length, 8) for n, length in ((4, sum(sizes)), (heads, n_keys), (heads, n_keys)))
        prepared = BACKENDS["spans"][0](ranges, n_keys)
        assert not torch.is_tensor(prepared), "long enough for a run each"
        expected = BACKENDS["dense"][1](q, k, v, BACKENDS["dense"][0](ranges, n_keys))
        torch.testing.assert_close(BACKENDS["spans"][1](q, k, v, prepared), expected, rtol=1e-4, atol=1e-5)
