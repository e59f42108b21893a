r"""Speculative decoding: a second, smaller model drafts plan and text, and the sampler's own checks them.

    python measure/eval.py --checkpoint runs/tasks-ar/model.safetensors --ahead 8 \
      --draft runs/tasks-small/model.safetensors

The text is what the larger model alone would write (Leviathan et al. 2023, arXiv 2211.17192). A baseline for
planned diffusion, which finds work to do in parallel without a second model.
"""

from weakref import WeakKeyDictionary

import torch

from answer import Answer
from masks import PLAN
from model import KVCache
from plumbing.checkpoint import load_checkpoint
from plumbing.settings import locate
from tokenizer import Tokenizer
from unmask import draw, probabilities


class Drafter:
    """A source of drafts (decode.WrittenPlan asks it): a model with a KV cache of its own for each answer."""

    def __init__(self, model):
        self.model, self.caches = model.eval(), WeakKeyDictionary()  # answer -> its cache, and entries read into it

    @classmethod
    def load(cls, path: str, tokenizer: Tokenizer, device) -> "Drafter":
        """From a checkpoint. Raises ValueError if its tokenizer is not that of the model that checks."""
        model, own, *_ = load_checkpoint(locate(path), device)
        if own.tokens != tokenizer.tokens:
            raise ValueError(f"{path} has another tokenizer than the model that it is to draft for")
        return cls(model)

    def draft(self, answer: Answer) -> tuple[list[int], list]:
        """The next `--ahead` tokens of an answer's plan or text, and what each was drawn from (None if greedy)."""
        layout, known, grammar = answer.layout, len(answer.layout), answer.grammar.copy()
        cache, read = self.caches.get(answer) or (self.new_cache(answer), 0)
        tokens, probs = [], []
        while len(tokens) < answer.config.ahead and not grammar.done and answer.tokenizer.sync not in tokens:
            forced = grammar.forced()
            if forced is None:
                logits, read = self.next_logits(layout, cache, read), len(layout)
                logits[~torch.from_numpy(grammar.allowed()).to(logits.device)] = -torch.inf
                answer.draft_passes += 1
                answer.critical_path += 1
            token, p = (forced, None) if forced is not None else self.choose(logits, answer)
            tokens.append(token)
            probs.append(p)
            grammar.advance(token)
            layout.write([token], PLAN, layout.round[-1])
        layout.cut(known)
        self.caches[answer] = cache, min(read, known)  # what is drafted may be wrong
        return tokens, probs

    def new_cache(self, answer):
        weight = self.model.embedding.weight
        return KVCache(self.model.config, 1, answer.max_length, weight.device, weight.dtype)

    def next_logits(self, layout, cache, read):
        """(V,) logits of the token after the layout's last, of which the cache holds the entries before `read`."""
        columns = (layout.token, layout.position, layout.prefix, layout.begin, layout.end)
        table = torch.tensor([column[read:] for column in columns], device=self.model.embedding.weight.device)
        entry = torch.arange(read, len(layout), device=table.device)[None]
        hidden = self.model(table[:1], table[1:2], table[2:].T[None], cache, entry)
        return self.model.logits(hidden[0, -1]).float()

    def choose(self, logits, answer):
        """A token, and (V,) what it was drawn from; None if it is the likeliest."""
        if not answer.config.temperature:
            return int(logits.argmax()), None
        p = probabilities(logits[None], answer.config)
        return int(draw(p, [(answer.generator, 1)])), p[0]
