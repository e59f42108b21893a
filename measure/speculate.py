r"""Speculative decoding: a second, smaller model drafts plan and text, and the sampler's own checks them.

    python measure/eval.py --checkpoint runs/tasks-ar/model.safetensors --ahead 8 \
      --draft runs/tasks-small/model.safetensors

The text is what the larger model alone would write (Leviathan et al. 2023, arXiv 2211.17192). A baseline for
planned diffusion, which finds work to do in parallel without a second model.
"""

from weakref import WeakKeyDictionary

import torch

from decode import Answer, Decoder, WrittenPlan
from drafting.decoding import DraftedPlan
from masks import PLAN
from methods import DECODERS
from model import KVCache, Transformer
from plumbing.settings import locate
from tokenizer import Tokenizer
from training.checkpoint import load_checkpoint
from unmask import draw, probabilities


class Drafter:
    """A source of drafts: a model with a KV cache of its own for each answer."""

    def __init__(self, model: Transformer):
        self.model, self.caches = model.eval(), WeakKeyDictionary()  # answer -> its cache, and entries read into it

    @classmethod
    def load(cls, path: str, tokenizer: Tokenizer, device: torch.device | str) -> "Drafter":
        """From a checkpoint. Raises ValueError if its tokenizer is not that of the model that checks."""
        model, own, *_ = load_checkpoint(locate(path), device)
        if own.tokens != tokenizer.tokens:
            raise ValueError(f"{path} has another tokenizer than the model that it is to draft for")
        return cls(model)

    def draft(self, answer: Answer) -> tuple[list[int], list]:
        """The next `--ahead` tokens of an answer's plan or text, and what each was drawn from (None if greedy)."""
        layout, known, grammar = answer.layout, len(answer.layout), answer.grammar.copy()
        cache, read = self.caches.get(answer) or (self.new_cache(answer), 0)
        read = min(read, known - 1)  # a topic may have been taken back
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


def drafted_by(drafter: Drafter) -> dict[str, Decoder]:
    """The ways to decode whose plan and text are drafted by a second model."""

    class SpeculatedPlan(DraftedPlan):
        def proposed(self) -> tuple[list[int], list]:
            return drafter.draft(self.answer)

        def n_slots(self) -> int:
            return 0

    return {name: decoder._replace(plan=SpeculatedPlan if decoder.plan is WrittenPlan else decoder.plan)
            for name, decoder in DECODERS.items()}  # fmt: skip
