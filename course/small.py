"""What probes run on: a small tokenizer, random examples, and small random models that plan and write.

Everything is imported inside the functions, because a probe runs on the project of a submission.
"""

import inspect
from collections.abc import Callable
from typing import Any

TEXT = (
    "Tell me about the otter: its habitat, its food and its play.",
    "Rivers and coasts, lakes and marshes; the otter swims in all of them.",
    "It eats fish, crabs and frogs. In short: a playful river animal.",
    "Top 5 tips for the kitchen: sharpen the knife, taste, and rest the dough.",
)
PARTS = ("rivers and lakes", "fish", "", "crabs and frogs", "the otter")
TOPICS = ("habitat", "food", "top 5 tips", "the kitchen")
BIAS = dict(topic=8.0, length=9.0, sync=6.0, eos=4.0, pad=9.0)  # added to logits, so that plans of several rounds come


def tokenizer(unit=4):
    """Bytes, tags, lengths and about 40 merges; a unit of length is 4 tokens."""
    from tokenizer import Tokenizer

    return Tokenizer.train(TEXT, 256 + 74 + 40, unit=unit)


def prompts(rng, n):
    """A few words each."""
    words = " ".join(TEXT).split()
    return [" ".join(rng.choice(words, int(rng.integers(1, 9)))) for _ in range(n)]


def example(rng, tok, spans):
    """An example whose rounds have so many spans each, some planned longer than their text needs."""
    from tags import Example, Round, Span

    pick = lambda: PARTS[rng.integers(len(PARTS))]

    def span(name):
        text = pick()
        return Span(name, text, tok.units(text) + int(rng.integers(2)))

    return Example(TEXT[0][:20], tuple(Round(pick(), tuple(map(span, TOPICS[:n]))) for n in spans))


def planner(rng, tokenizer, lengths=3, **bias):
    """A random model whose weights are so large that every token it sees moves its output, with some tokens likelier.

    `bias`: by the name of a tag what is added to its logit; `length` for the first few `lengths`.
    """
    import torch

    from model import ModelConfig, Transformer

    torch.manual_seed(int(rng.integers(1 << 30)))
    size = dict(n_layer=2, d_model=32, n_head=4, n_kv_head=2, d_ff=48)
    model = Transformer(ModelConfig(vocab_size=tokenizer.vocab_size, **size)).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(std=0.3) if p.ndim == 2 else p.uniform_(0.5, 1.5)
    weight, added = 0.7 * torch.randn(tokenizer.vocab_size, 32), torch.zeros(tokenizer.vocab_size)
    for name, value in (BIAS | bias).items():
        first = tokenizer.length_id(1) if name == "length" else getattr(tokenizer, name)
        added[first : first + (lengths if name == "length" else 1)] = value
    model.logits = lambda hidden, n=None: hidden @ weight[:n].T + added[:n]
    return model


def bigrams(rng, tokenizer, tokens):
    """Stands for a model whose next token depends on position and last token; a draft slot's guess, on position."""
    from types import SimpleNamespace

    import torch

    from model import ModelConfig

    class Bigrams:
        config = ModelConfig(tokenizer.vocab_size, n_layer=1, d_model=4, n_head=1, n_kv_head=1)
        embedding = SimpleNamespace(weight=torch.zeros(tokenizer.vocab_size, 1))
        table = torch.full((tokenizer.vocab_size, 64, tokenizer.vocab_size), -1e9)

        def eval(self):
            return self

        def __call__(self, token, position, ranges, cache, index, n_keys, columns=None):
            hidden = torch.stack([token, position], dim=-1)
            return hidden if columns is None else hidden.take_along_dim(columns[..., None], dim=1)

        def logits(self, hidden, n_tokens=None):
            return self.table[hidden[..., 0], hidden[..., 1], :n_tokens]

    Bigrams.table[:, :, tokens] = (
        1.5 * torch.from_numpy(rng.standard_normal((tokenizer.vocab_size, 64, len(tokens)))).float()
    )
    return Bigrams()


def enumerated(model, last, position, tokens, eos, left):
    """Probability of each text of at most `left` tokens, by enumeration."""
    if not left:
        return {"": 1.0}
    p = model.table[last, position].softmax(-1)
    texts = {"": float(p[eos])}
    for token in tokens:
        for rest, q in enumerated(model, token, position + 1, tokens, eos, left - 1).items():
            texts[chr(token) + rest] = float(p[token]) * q
    return texts


def without_cache(model, layout):
    """Hidden states (T, D) of a whole layout, computed afresh."""
    import torch

    ranges = torch.tensor([layout.prefix, layout.begin, layout.end]).T
    with torch.inference_mode():
        return model(torch.tensor([layout.token]), torch.tensor([layout.position]), ranges[None])[0]


def call(function: Callable, **inputs: Any) -> Any:
    """What a function returns, given those of the inputs that it has parameters for: its signature may change."""
    return function(**{name: inputs[name] for name in inspect.signature(function).parameters if name in inputs})


def ranges_of(entries):
    """Layout entries as text: "0-12 20-31"."""
    runs = []
    for i in entries:
        if runs and runs[-1][1] == i - 1:
            runs[-1][1] = i
        else:
            runs.append([i, i])
    return " ".join(f"{a}-{b}" if b > a else f"{a}" for a, b in runs)


def names(tokens, tokenizer):
    """Token ids as text, one piece per token."""
    return [tokenizer.name(i) for i in tokens]
