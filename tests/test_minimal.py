"""minimal.py and the fast code are one method: the same layouts, masks, targets, losses and passes.

Both get the same examples, random numbers and weights. What then differs is a mistake in one of them.
"""

import ast
import random
import runpy
import sys
from pathlib import Path

import pytest
import torch
from conftest import each
from torch.testing import assert_close

import minimal
from config import SampleConfig
from grammar import Grammar
from loss import JointLoss, counts
from masks import encode_example, visible
from model import ModelConfig, Transformer
from noise import IGNORE, Sequence, Term, make_batch
from sample import Sampler
from tags import Example, Round, Span
from tokenizer import Tokenizer


class Words(Tokenizer):
    """The words of minimal.py as a tokenizer of the fast code, with the same ids."""

    def __init__(self):
        self.tokens, self.unit = [word.encode() for word in minimal.WORDS], minimal.UNIT
        self.vocab_size, n = len(minimal.VOCABULARY), len(minimal.WORDS)
        self.pad, self.mask, self.user, self.assistant, self.topic, self.topic_end = range(n, n + 6)
        self.async_, self.async_end, self.sync, self.eos = range(n + 6, n + 10)
        self.colon = minimal.ID[":"]

    def encode(self, text):
        return minimal.encode(text)

    def decode(self, ids):
        return " ".join(minimal.WORDS[i] for i in ids)


class TorchNumbers:
    """The random numbers of torch, asked for as numpy's: both codes draw the same after the same seed."""

    def permutation(self, n):
        return torch.randperm(n).numpy()

    def random(self, n):
        return torch.rand(n).numpy()


# ---------------------------------------------------------------- the same examples, batches and weights for both


def some_words(rng, fewest, most):
    return " ".join(rng.choices(minimal.WORDS, k=rng.randint(fewest, most)))


def random_examples(seed, n=5):
    """Examples of two rounds, with up to three spans of any length each; and the round that each of them trains.

    The first trains its second round and has spans in both: there is always a history that might be noised.
    """
    rng, examples = random.Random(seed), []
    for number in range(n):
        rounds = []
        for _ in range(2):
            topics = [some_words(rng, 1, minimal.MAX_NAME) for _ in range(rng.randint(2 if number == 0 else 0, 3))]
            spans = [(topic, some_words(rng, 1, minimal.LONGEST * minimal.UNIT)) for topic in topics]
            rounds.append((some_words(rng, 0, 4), spans))
        examples.append((some_words(rng, 1, 6), rounds))
    return examples, [1, *(rng.randint(0, 1) for _ in range(n - 1))]


def fast_layout(prompt, rounds, tokenizer):
    spans = [tuple(Span(topic, text, tokenizer.units(text)) for topic, text in pairs) for _, pairs in rounds]
    rounds = tuple(Round(text, mine) for (text, _), mine in zip(rounds, spans))
    return encode_example(Example(prompt, rounds), tokenizer)


def both_batches(seed, tokenizer):
    """A batch of minimal.py, the same batch of the fast code, and how many tokens of each row are no padding."""
    examples, rounds = random_examples(seed)
    torch.manual_seed(seed)
    batch = minimal.make_batch(examples, rounds)
    sequences = [Sequence(fast_layout(*example, tokenizer)) for example in examples]
    torch.manual_seed(seed)
    fast = make_batch(sequences, rounds, tokenizer, TorchNumbers(), weight="uniform")
    sizes = [sum(token.round <= r for token in minimal.write_example(*e)) for e, r in zip(examples, rounds)]
    return batch, fast, sizes


def fast_model(model):
    """The fast transformer with the weights of minimal.py's."""
    m, weights = minimal, model.state_dict()
    for part in ("qkv", "out", "q_norm", "k_norm"):
        weights = {name.replace(f".{part}.", f".attention.{part}."): weight for name, weight in weights.items()}
    config = ModelConfig(
        len(m.VOCABULARY), n_layer=m.LAYERS, n_head=m.HEADS, n_kv_head=m.HEADS, d_model=m.WIDTH, d_ff=m.HIDDEN
    )
    fast = Transformer(config)
    fast.load_state_dict(weights)
    return fast.eval()


def easy_example(rng):
    """An example that is learnt in a second: two rounds, both with spans of different lengths."""
    subject = rng.choice(minimal.SUBJECTS.split())
    first = [(f"river {subject}", "The river flows past the tower and down to the sea with salt , wool and barges ."),
             ("tower", "Climb the tower ."),
             (f"dish {subject}", "In the tower they bake from rye and plums .")]  # fmt: skip
    second = [("feast", f"Each year {subject} keeps"), ("ruler", "with a light hand and plays chess with anyone .")]
    return f"Tell me about {subject} .", [("", first), ("Come for the view :", second)]


@pytest.fixture(scope="module")
def words():
    return Words()


@pytest.fixture(scope="module")
def learnt():
    """A small model that has learnt to plan the easy examples, and its losses on some before and after."""
    small = dict(WIDTH=32, LAYERS=2, HEADS=2, HIDDEN=64, BATCH=6, WARM_UP=5, RATE=1e-2, SECOND_ROUND=0.5)
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {**small, "make_example": easy_example}.items():
            patch.setattr(minimal, name, value)
        torch.manual_seed(0)
        rng, model = random.Random(0), minimal.Transformer()
        batch = minimal.make_batch([easy_example(rng) for _ in range(6)], [0, 1] * 3)
        losses = lambda: torch.stack(minimal.joint_loss(model, *batch)).detach()
        before = losses()
        minimal.train(model, rng, {}, 80)
        yield model, before, losses()


# ---------------------------------------------------------------- minimal.py by itself


def test_it_is_short_and_needs_torch_alone():
    text = Path(minimal.__file__).read_text(encoding="utf-8")
    imports = [node for node in ast.walk(ast.parse(text)) if isinstance(node, (ast.Import, ast.ImportFrom))]
    names = {name.name for node in imports if isinstance(node, ast.Import) for name in node.names}
    names |= {node.module for node in imports if isinstance(node, ast.ImportFrom)}
    assert len(text.splitlines()) <= 300
    assert {name.split(".")[0] for name in names} <= {"torch", *sys.stdlib_module_names}


def test_importing_it_does_not_train(capsys):
    runpy.run_path(minimal.__file__, run_name="minimal")
    assert capsys.readouterr() == ("", "")


def test_a_few_updates_reduce_both_losses(learnt):
    _, before, after = learnt
    assert (after < 0.5 * before).all()


# ---------------------------------------------------------------- training


def test_layouts_are_the_same(words):
    for seed in each(range(10)):
        for prompt, rounds in [*random_examples(seed)[0], minimal.make_example(random.Random(seed))]:
            tokens = [token.id for token in minimal.write_example(prompt, rounds)]
            assert tokens == fast_layout(prompt, rounds, words).token


def test_masks_are_the_same(words):
    for seed in each(range(10)):
        (_, round_, span, _, _), fast, sizes = both_batches(seed, words)
        mask, fast_mask = minimal.hybrid_mask(round_, span), visible(fast.ranges, fast.token.shape[1])
        for b, n in enumerate(sizes):
            assert torch.equal(mask[b, :n, :n], fast_mask[b, :n, :n])
            assert not mask[b, :n, n:].any() and not fast_mask[b, :n, n:].any()  # nothing sees padding
            assert torch.equal(fast.position[b, :n], torch.arange(n))


def test_the_same_slots_are_noised_and_targets_are_the_same(words):
    for seed in each(range(10)):
        (token, _, _, target, noised), fast, sizes = both_batches(seed, words)
        for b, n in enumerate(sizes):
            assert torch.equal(token[b, :n], fast.token[b, :n])
            assert torch.equal(target[b, :n], fast.target[b, :n])
            assert torch.equal(noised[b, :n], fast.term[b, :n] == Term.SPAN)
            assert (target[b, n:] == IGNORE).all() and (fast.target[b, n:] == IGNORE).all()


def test_losses_are_the_same(words, learnt):
    model = learnt[0]
    joint_loss = JointLoss(fast_model(model), words.pad + 1)
    for seed in each(range(5)):
        batch, fast, _ = both_batches(seed, words)
        with torch.no_grad():
            means, losses = joint_loss(fast) / counts(fast, "uniform"), minimal.joint_loss(model, *batch)
        assert_close(means[[Term.PLAN, Term.SPAN]].float(), torch.stack(losses), rtol=1e-4, atol=1e-4)


# ---------------------------------------------------------------- sampling


def naive_passes(model, prompt):
    """Before each pass the ids of all tokens, and what it predicts: (ids, logits) per pass; and all ids at the end."""
    passes = []

    def watched(token, round_, span):
        logits = model(token, round_, span)
        passes.append((token[0].tolist(), logits[0]))
        return logits

    *_, (_, tokens) = minimal.answer(watched, prompt)
    return passes, [token.id for token in tokens]


def fast_passes(model, tokenizer, prompts, steps_ratio):
    """The same of each prompt, (ids, where predictions are read, logits) per pass; and the answers."""
    config = SampleConfig(steps_ratio=steps_ratio, apart=False, pads_last=False, max_tokens=1000)
    passes = {prompt: [] for prompt in prompts}

    def probe(answer, replies, logits):
        entries = [entry for reply in replies for entry in reply.reading.entries]
        passes[answer.prompt].append(([*answer.layout.token], entries, logits.clone()))

    return passes, Sampler(model, tokenizer, config).answer(prompts, probe=probe)


def test_passes_are_the_same(words, learnt, monkeypatch):
    """Each pass knows the same tokens, so the one before filled the same slots; and it predicts the same."""
    monkeypatch.setattr("grammar.MAX_NAME", minimal.MAX_NAME)
    prompts = [f"Tell me about {subject} ." for subject in minimal.SUBJECTS.split()[:6]]
    telling = 0
    for steps_ratio in each([0.25, 0.5, 1.0]):
        monkeypatch.setattr(minimal, "STEPS_RATIO", steps_ratio)
        passes, answers = fast_passes(fast_model(learnt[0]), words, prompts, steps_ratio)
        for answer in each(answers):
            naive, ids = naive_passes(learnt[0], answer.prompt)
            fast = passes[answer.prompt]
            assert len(ids) < minimal.MAX_TOKENS
            assert [known for known, _ in naive] == [known for known, _, _ in fast]
            assert ids == [*answer.layout.token, words.eos]
            for (_, logits), (_, entries, fast_logits) in zip(naive, fast):
                seen = fast_logits.isfinite()  # the others, the grammar forbids
                assert_close(logits[entries][:, : seen.shape[1]][seen], fast_logits[seen], rtol=1e-3, atol=1e-3)
            lengths = {len(answer.slots(span)) for span in answer.rounds[0].spans}
            telling += len(lengths) > 1 and len(answer.rounds) > 1
    assert telling  # spans that finish at different times, and a round that reads them


def test_the_same_tokens_may_come_next_in_a_plan(words, monkeypatch):
    """The two grammars allow the same along random plans and texts."""
    monkeypatch.setattr("grammar.MAX_NAME", minimal.MAX_NAME)
    for seed in each(range(20)):
        rng, grammar, plan = random.Random(seed), Grammar(words, 1_000_000), []
        while not plan or plan[-1] not in (minimal.SYNC, minimal.EOS):
            choices = minimal.allowed(plan, full=False)
            assert sorted(choices) == grammar.allowed().nonzero()[0].tolist()
            tags = [i for i in choices if i >= minimal.PAD]
            plan.append(rng.choice(tags if tags and rng.random() < 0.5 else choices))
            grammar.advance(plan[-1])
