"""What the tests share: a small tokenizer, small random models, random examples, and loops over cases."""

import itertools
import random
import shutil
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from kernels import graphs
from model import ModelConfig, Transformer
from noise import IGNORE, Term
from tags import EOS, TAGS, TOPIC, Example, Round, Span
from tokenizer import MAX_LENGTH, Tokenizer

LOOPS = []  # the cases that loops of the running test are at


def each(cases):
    """Go through cases. If the test fails, its report names the case."""
    depth = len(LOOPS)
    for case in cases:
        LOOPS[depth:] = [case]
        yield case
    del LOOPS[depth:]


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item, call):
    outcome = yield
    if call.when == "call":
        if call.excinfo and LOOPS:
            outcome.get_result().sections.append(("the loop was at", " of ".join(map(repr, LOOPS[::-1]))[:2000]))
        LOOPS.clear()


@pytest.fixture
def fresh(tmp_path):
    """A function that makes an empty folder, another one at each call."""
    numbers = itertools.count()

    def make():
        folder = tmp_path / str(next(numbers))
        folder.mkdir()
        return folder

    return make


SENTENCES = (
    "Tell me about the otter: its habitat, its food and its play.",
    "Rivers and coasts, lakes and marshes; the otter swims in all of them.",
    "It eats fish, crabs and frogs.\nIn short: a playful river animal.",
    "Top 5 tips for the kitchen: sharpen the knife, taste, and rest the dough.",
)
WORDS = " ".join(SENTENCES).split(" ")
TOPICS = ("habitat", "food", "play", "top 5 tips", "the kitchen")
OTTER = Example(
    "Tell me about the otter.",
    (
        Round("Here:", (Span("habitat", "Rivers and lakes.", 3), Span("food", "fish", 2))),
        Round("And more.", (Span("play", "", 1), Span("top 5 tips", "swims", 2), Span("food", "crabs", 1))),
        Round("In short: a river animal."),
    ),
)


ODD_SPACE = [" ", "\n", "\t", "\r\n", "\x0b", "\x1c", "\x85", "\u00a0", "\u2028", "\u3000"]
NASTY = [
    *TAGS, *ODD_SPACE, "\\", "\\\\", "\\" + EOS, "\\\\" + TOPIC, "<topic", "topic>", "<", ">", ":", ": ", "a:",
    "0", "3", "12", "top 5 tips 3", "food 2", "otter", "Straße", "水獺", "🦦", "e\u0301", "\u200b", "\ufeff", "\x00",
    "\x7f", "٣", "[PAD", "",
]  # fmt: skip


def hostile(rng, pieces=6):
    """Text made to confuse a parser, without white space at its ends (which is not stored)."""
    return "".join(rng.choice(NASTY) for _ in range(rng.randint(0, pieces))).strip()


CORPUS = [
    "The otter eats fish, crabs and frogs; the otters of the coast eat crabs.",
    "Top 5 tips: eat 10 fish, 100 crabs or 1000 frogs!",
    "The river otter lives in rivers, the sea otter lives in the sea.",
    "Straße, Straßen und Flüsse: 水獺吃魚。水獺 eats 🦦🦦?!",
    "banana bandana, bananas and bandanas; aaaaaaaa aaaa aaa abababab",
]
BYTES = [bytes([b]) for b in range(256)]
OVERHEAD = 256 + len(TAGS) + MAX_LENGTH  # ids that no training can save


@pytest.fixture(scope="session")
def tok():
    return Tokenizer.train(CORPUS, OVERHEAD + 60, unit=4)


@pytest.fixture(scope="session")
def tokenizer():
    """Bytes and about 40 merges; a unit of length is 4 tokens."""
    return Tokenizer.train((sentence.replace("\n", "") for sentence in SENTENCES), 256 + 74 + 40, unit=4)


def small_model(vocab_size, seed=0, **config):
    """A random float32 model with weights so large that every token it sees moves its output visibly."""
    small = {"n_layer": 2, "d_model": 32, "n_head": 4, "n_kv_head": 2, "d_ff": 48}
    torch.manual_seed(seed)
    model = Transformer(ModelConfig(vocab_size=vocab_size, **{**small, **config}))
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(std=0.3) if p.ndim == 2 else p.uniform_(0.5, 1.5)
    return model.eval()


@pytest.fixture(scope="session")
def model(tokenizer):
    return small_model(tokenizer.vocab_size)


def random_text(rng, longest):
    return " ".join(rng.choices(WORDS, k=rng.randint(0, longest))).strip()


def random_round(rng, tokenizer, spans=None):
    """Text, a plan of up to 5 spans, or both, or neither; some spans are planned longer than their text needs."""
    made = []
    for _ in range(rng.choice((0, 1, 2, 3, 5)) if spans is None else spans):
        text, names = random_text(rng, 4), [span.topic for span in made]
        at = TOPICS.index(rng.choice(TOPICS))
        topic = next(name for name in TOPICS[at:] + TOPICS[:at] if name not in names)  # no plan names a topic twice
        made.append(Span(topic, text, tokenizer.units(text) + rng.choice((0, 0, 0, 1, 2))))
    return Round(random_text(rng, 5) if rng.random() < 0.6 else "", tuple(made))


def random_example(seed, tokenizer, rounds=None, spans=None):
    """An example of 1 to 4 rounds; `rounds` and `spans` (of each round) fix the numbers."""
    rng = random.Random(seed)
    rounds = rounds or rng.randint(1, 4)
    return Example(random_text(rng, 6), tuple(random_round(rng, tokenizer, spans) for _ in range(rounds)))


@pytest.fixture(scope="module")
def folder(tokenizer, tmp_path_factory):
    """A small data set to train on."""
    from runs import data_set  # which imports this file

    return data_set(tmp_path_factory.mktemp("data"), tokenizer)


@pytest.fixture(scope="module")
def whole(folder, tmp_path_factory):
    """A run of 12 updates without interruption: (method, losses)."""
    from runs import losses, run

    out = tmp_path_factory.mktemp("whole")
    run(folder, out)
    return "planned", losses(out)


def in_span(batch):
    """(B, T) bool: slots of the noised round, masked or not, and the tokens that predict those of causal spans."""
    return (batch.term == Term.SPAN) | (batch.term == Term.CAUSAL) & (batch.target != IGNORE)


# ---------------------------------------------------------------- stand-ins for a GPU


@pytest.fixture
def recordings(monkeypatch):
    """The functions that were recorded, in their order."""
    made = []

    def record(function):
        output = function()
        made.append(function)
        output.fill_(float("nan"))  # a graph that is recorded has not run
        return lambda: output.copy_(function()), output

    monkeypatch.setattr(graphs, "record", record)
    return made


@pytest.fixture
def as_on_a_gpu(recordings, monkeypatch):
    """Samplers have the shapes and the graphs that they have on a GPU."""
    monkeypatch.setattr("plumbing.device.has_graphs", lambda device: True)


@pytest.fixture
def emulated_kernel(as_on_a_gpu, monkeypatch):
    """As on a GPU, attention is by the kernel: here its source runs under the emulator, in the types of a GPU."""
    if not shutil.which("g++"):
        pytest.skip("needs g++, which emulates the kernel")
    monkeypatch.setattr("kernels.backends.choose", lambda *args, **options: "kernel")
    monkeypatch.setattr("plumbing.device.sampling_dtype", lambda device: torch.float16)
    monkeypatch.setattr("plumbing.device.fast_dtype", lambda device: torch.bfloat16)
