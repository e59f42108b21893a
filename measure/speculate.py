"""Speculative decoding: a smaller autoregressive model drafts, the larger one checks the draft in one pass.

    python measure/eval.py --checkpoint runs/tasks-ar/model.safetensors --draft runs/tasks-small/model.safetensors

Greedy and exact: the text is what the larger model alone would write (Leviathan et al. 2023, arXiv 2211.17192,
at temperature 0). A baseline for planned diffusion, which has something to compute in parallel without a second model.
"""

import time

import torch

from checkpoint import load_checkpoint
from model import KVCache
from sample import Answer, Sampler
from settings import locate


class Reader:
    """A model that reads a growing list of tokens; what it has read stays in its KV cache."""

    def __init__(self, model, length):
        self.model, self.device, self.read = model, model.embedding.weight.device, 0
        self.cache = KVCache(model.config, 1, length, self.device, model.embedding.weight.dtype)

    def next(self, tokens, allowed):
        """The likeliest allowed token after each token not read before."""
        entry = torch.arange(self.read, len(tokens), device=self.device)[None]
        see = torch.stack([entry + 1, 0 * entry, 0 * entry], dim=-1)
        hidden = self.model(torch.tensor([tokens[self.read :]], device=self.device), entry, see, self.cache, entry)
        self.read = len(tokens)
        return self.model.logits(hidden[0]).masked_fill(~allowed, float("-inf")).argmax(-1).tolist()


class Drafted(Answer):
    """An answer of which a part of the passes were the smaller model's."""

    draft_passes = 0

    def result(self):
        return super().result() | {"draft_passes": self.draft_passes}


class Speculator(Sampler):
    """A greedy autoregressive `Sampler` that checks `ahead` tokens of the `draft` model a pass."""

    def __init__(self, sampler, draft, ahead=4):
        super().__init__(sampler.model, sampler.tokenizer, sampler.config, sampler.method)
        self.draft, self.ahead = draft.eval(), ahead
        if self.method.plan != "none" or self.config.temperature:
            raise ValueError("speculative decoding needs an autoregressive model and temperature 0")

    @classmethod
    def load(cls, path, draft, config, device="cpu", ahead=4):
        """From two checkpoints of the same tokenizer."""
        sampler, (model, tokenizer, *_) = Sampler.load(path, config, device), load_checkpoint(locate(draft), device)
        if tokenizer.tokens != sampler.tokenizer.tokens:
            raise ValueError(f"{draft} has another tokenizer than {path}")
        return cls(sampler, model, ahead)

    @torch.inference_mode()
    def answer(self, prompts, watch=None):
        """Answer prompts, one after the other. Returns a list of finished answers."""
        return [self.one(prompt, watch) for prompt in prompts]

    def one(self, prompt, watch):
        start, answer = time.perf_counter(), Drafted(prompt, self, self.config.seed)
        large, small = (Reader(model, answer.room) for model in (self.model, self.draft))
        while answer.stage != "done":
            self.step(answer, large, small)
            answer.seconds = time.perf_counter() - start
            if watch:
                watch(answer)
        return answer

    def step(self, answer, large, small):
        """Draft a few tokens, keep those that the larger model would have written, and its next one."""
        allowed = torch.from_numpy(answer.grammar.allowed()).to(self.device)
        tokens, known = list(answer.layout.token), len(answer.layout)
        while len(tokens) < min(known + self.ahead, answer.room - 2) and tokens[-1] != self.tokenizer.eos:
            tokens.append(small.next(tokens, allowed)[-1])
            answer.draft_passes += 1
        answer.positions += len(tokens) - large.read
        right = large.next(tokens, allowed)[known - len(tokens) - 1 :]  # after the last known token and each draft
        agreed = next((i for i, token in enumerate(tokens[known:]) if token != right[i]), len(tokens) - known)
        answer.plan_passes += 1
        for token in right[: agreed + 1]:
            if answer.stage != "done":
                answer.append(token)
        answer.force()
        answer.critical_path = answer.plan_passes + answer.draft_passes
        large.read, small.read = (min(reader.read, known + agreed) for reader in (large, small))
