"""The ladder's first rung holds the others: minimal.py and the fast code have the same masks, targets, losses and passes.

Both get the same examples, random numbers and weights; whatever then differs is a mistake in one of them.
"""

import ast
import random
import runpy
import sys
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

import minimal
from config import SampleConfig
from loss import JointLoss, counts
from masks import encode_example, visible
from model import ModelConfig, Transformer
from noise import IGNORE, Sequence, Term, make_batch
from sample import Sampler

# The fast code.
from tags import Example, Round, Span
from tokenizer import Tokenizer

FAR = 99  # the round of padding in minimal.py


class Words(Tokenizer):
    """The words of minimal.py as a tokenizer of the fast code, with the same ids."""

    def __init__(self):
        self.tokens, self.unit = [word.encode() for word in minimal.WORDS], minimal.UNIT
        self.pattern = self.normal = None
        self.vocab_size, n = len(minimal.VOCABULARY), len(minimal.WORDS)
        self.pad, self.mask, self.user, self.assistant, self.topic, self.topic_end = range(n, n + 6)
        self.async_, self.async_end, self.sync, self.eos = range(n + 6, n + 10)
        self.colon = minimal.ID[":"]

    def encode(self, text):
        return minimal.encode(text)


class TorchNumbers:
    """The random numbers of torch, asked for as numpy's: both codes draw the same after the same seed."""

    def permutation(self, n):
        return torch.randperm(n).numpy()

    def random(self, n):
        return torch.rand(n).numpy()


def words(rng, fewest, most):
    return " ".join(rng.choices(minimal.WORDS, k=rng.randint(fewest, most)))


def random_examples(seed, n=5):
    """Examples of two rounds, with up to three spans of any length each; and the round that each of them trains.

    One has spans in both rounds and trains the second, so there is always a history that might be noised.
    """
    rng, examples = random.Random(seed), []
    for number in range(n):
        fewest, rounds = 2 if number == 0 else 0, []
        for _ in range(2):
            topics = [words(rng, 1, minimal.MAX_NAME) for _ in range(rng.randint(fewest, 3))]
            spans = [(topic, words(rng, 1, minimal.LONGEST * minimal.UNIT)) for topic in topics]
            rounds.append((words(rng, 0, 4), spans))
        examples.append((words(rng, 1, 6), rounds))
    return examples, [1, *(rng.randint(0, 1) for _ in range(n - 1))]


def fast_example(prompt, rounds, tokenizer):
    spans = [[Span(topic, text, tokenizer.units(text)) for topic, text in pairs] for _, pairs in rounds]
    return Example(prompt, tuple(Round(text, tuple(s)) for (text, _), s in zip(rounds, spans)))


def both_batches(seed, tokenizer):
    """A batch of minimal.py, the same batch of the fast code, and how many tokens each row has."""
    examples, rounds = random_examples(seed)
    torch.manual_seed(seed)
    batch = minimal.make_batch(examples, rounds)
    layouts = [encode_example(fast_example(*example, tokenizer), tokenizer) for example in examples]
    torch.manual_seed(seed)
    fast = make_batch([Sequence(y) for y in layouts], rounds, tokenizer, TorchNumbers(), weight="uniform")
    return batch, fast, (batch[1] != FAR).sum(1).tolist()


def fast_model(model):
    """The fast transformer with the weights of minimal.py's."""
    c = minimal
    config = ModelConfig(len(c.VOCABULARY), c.LAYERS, c.HEADS, c.HEADS, c.WIDTH, c.HIDDEN)
    weights = model.state_dict()
    for part in ("qkv", "out", "q_norm", "k_norm"):
        weights = {name.replace(f".{part}.", f".attention.{part}."): weight for name, weight in weights.items()}
    fast = Transformer(config)
    fast.load_state_dict(weights)
    return fast.eval()


@pytest.fixture(scope="module")
def words_tokenizer():
    return Words()


def easy_example(rng):
    """An example that is learnt in a second: two rounds, of them both with spans of different lengths."""
    subject = rng.choice(minimal.SUBJECTS.split())
    first = [(f"river {subject}", "The river flows past the tower and down to the sea with salt , wool and barges ."),
             ("tower", "Climb the tower ."), (f"dish {subject}", "In the tower they bake from rye and plums .")]  # fmt: skip
    second = [("feast", f"Each year {subject} keeps"), ("ruler", "with a light hand and plays chess with anyone .")]
    return f"Tell me about {subject} .", [("", first), ("Come for the view :", second)]


@pytest.fixture(scope="module")
def learnt():
    """A small model that has learnt the easy examples, and its losses on some before and after."""
    with pytest.MonkeyPatch.context() as patch:
        small = dict(WIDTH=32, LAYERS=2, HEADS=2, HIDDEN=64, BATCH=6, WARM_UP=5, RATE=1e-2, SECOND_ROUND=0.5)
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


def test_importing_it_does_nothing(capsys):
    runpy.run_path(minimal.__file__, run_name="minimal")
    assert capsys.readouterr() == ("", "")


def test_a_few_updates_reduce_both_losses(learnt):
    _, before, after = learnt
    assert (after < 0.5 * before).all()


# ---------------------------------------------------------------- training


@pytest.mark.parametrize("seed", range(10))
def test_layouts_are_the_same(seed, words_tokenizer):
    for prompt, rounds in [*random_examples(seed)[0], minimal.make_example(random.Random(seed))]:
        layout = encode_example(fast_example(prompt, rounds, words_tokenizer), words_tokenizer)
        assert [token.id for token in minimal.write(prompt, rounds)] == layout.token


@pytest.mark.parametrize("seed", range(10))
def test_masks_are_the_same(seed, words_tokenizer):
    (token, round_, span, _, _), fast, sizes = both_batches(seed, words_tokenizer)
    mask, fast_mask = minimal.hybrid_mask(round_, span), visible(fast.ranges, fast.token.shape[1])
    for b, n in enumerate(sizes):
        assert torch.equal(mask[b, :n, :n], fast_mask[b, :n, :n])
        assert not mask[b, :n, n:].any() and not fast_mask[b, :n, n:].any()
        assert torch.equal(fast.position[b, :n], torch.arange(n))


@pytest.mark.parametrize("seed", range(10))
def test_the_same_slots_are_noised_and_targets_are_the_same(seed, words_tokenizer):
    (token, _, _, target, noised), fast, sizes = both_batches(seed, words_tokenizer)
    for b, n in enumerate(sizes):
        assert torch.equal(token[b, :n], fast.token[b, :n])
        assert torch.equal(target[b, :n], fast.target[b, :n])
        assert torch.equal(noised[b, :n], fast.term[b, :n] == Term.SPAN)
        assert (target[b, n:] == IGNORE).all() and (fast.target[b, n:] == IGNORE).all()


@pytest.mark.parametrize("seed", range(5))
def test_losses_are_the_same(seed, words_tokenizer, learnt):
    batch, fast, _ = both_batches(seed, words_tokenizer)
    with torch.no_grad():
        sums = JointLoss(fast_model(learnt[0]), words_tokenizer.pad + 1)(fast)
        losses = torch.stack(minimal.joint_loss(learnt[0], *batch))
    assert_close((sums / counts(fast, "uniform"))[[Term.PLAN, Term.SPAN]].float(), losses, rtol=1e-4, atol=1e-4)


# ---------------------------------------------------------------- sampling


def naive_passes(model, prompt):
    """What each pass reads and predicts (ids, logits), and all ids of the answer."""
    passes = []

    def watched(token, round_, span):
        logits = model(token, round_, span)
        passes.append((token[0].tolist(), logits[0]))
        return logits

    *_, (_, tokens) = minimal.answer(watched, prompt)
    return passes, tokens


def fast_passes(model, tokenizer, prompts, steps_ratio):
    """Of each prompt what each pass knows, and what it predicts where (ids, entries, logits); and the answers."""
    config = SampleConfig(steps_ratio=steps_ratio, apart=False, pads_last=False, max_tokens=1000)
    passes = {prompt: [] for prompt in prompts}

    def probe(answer, replies, logits):
        entries = [entry for reply in replies for entry in reply.reading.entries]
        passes[answer.prompt].append(([*answer.layout.token], entries, logits))

    return passes, Sampler(model, tokenizer, config).answer(prompts, probe=probe)


@pytest.mark.parametrize("steps_ratio", [0.25, 0.5, 1.0])
def test_passes_are_the_same(steps_ratio, words_tokenizer, learnt, monkeypatch):
    """Before each pass the same tokens are known, so the last one filled the same slots; and it predicts the same."""
    monkeypatch.setattr(minimal, "STEPS_RATIO", steps_ratio)
    monkeypatch.setattr("grammar.MAX_NAME", minimal.MAX_NAME)
    prompts, model = [f"Tell me about {subject} ." for subject in minimal.SUBJECTS.split()[:6]], learnt[0]
    passes, answers = fast_passes(fast_model(model), words_tokenizer, prompts, steps_ratio)
    telling = 0
    for prompt, answer in zip(prompts, answers):
        naive, tokens = naive_passes(model, prompt)
        assert len(tokens) < minimal.MAX_TOKENS
        assert [ids for ids, _ in naive] == [ids for ids, _, _ in passes[prompt]]
        assert [token.id for token in tokens[:-1]] == answer.layout.token and tokens[-1].id == minimal.EOS
        for (_, logits), (_, entries, fast_logits) in zip(naive, passes[prompt]):
            allowed = fast_logits.isfinite()  # -inf: what may not be drawn
            assert_close(logits[entries][:, : allowed.shape[1]][allowed], fast_logits[allowed], rtol=1e-3, atol=1e-3)
        lengths = {len(answer.slots(span)) for span in answer.rounds[0].spans}
        telling += len(lengths) > 1 and len(answer.rounds) > 1 and answer.denoise_passes > 1
    assert telling  # spans that finish at different times, and a round that reads them
