"""The joint loss of planned diffusion, and the likelihoods that validation and evaluation report."""

from collections.abc import Iterator

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from model import Transformer
from noise import IGNORE, TERMS, Arrange, Batch, Sequence, Term, make_batch
from plumbing.device import autocast
from tokenizer import Tokenizer


class JointLoss(nn.Module):
    """Sums of the terms of the loss over a batch, in nats: one per name in `noise.TERMS`.

        loss = sum over terms of weight * sum / targets of the term        (`counts` says how many there are)

    Training minimises this sum of means. It is not -log p(z, x | c), in which each token of plan and spans would
    count once: here plan and spans count alike, however many tokens each of them has.

    Plan and text positions, and the draft slots after them, predict the next token over the whole vocabulary. A masked
    slot predicts its original token, and a causal span's token or draft slot the next one, among text and [PAD]: never
    a tag (zero masking probability, MDLM section 3.2.3).

    `dtype`: in which matrix products are computed; training and validation both get it here, and nowhere else.
    """

    def __init__(self, model: Transformer, slot_tokens: int, dtype: torch.dtype = torch.float32):
        super().__init__()
        self.model, self.slot_tokens, self.dtype = model, slot_tokens, dtype

    def forward(self, batch: Batch) -> torch.Tensor:
        """The sums, (len(TERMS),); those of slots weighted by `batch.weight`."""
        target, (any_token, slot_token) = batch.target.flatten(), batch.places
        with autocast(batch.token.device, self.dtype):
            hidden = self.model(batch.token, batch.position, batch.ranges).flatten(0, 1)  # (B * T, D)
            any_logits = self.model.logits(hidden[any_token])  # (targets, vocabulary)
            slot_logits = self.model.logits(hidden[slot_token], self.slot_tokens)  # (targets, slot_tokens)
        any_loss = F.cross_entropy(any_logits.float(), target[any_token], reduction="none")
        slot_loss = F.cross_entropy(slot_logits.float(), target[slot_token], reduction="none")
        loss = torch.cat([any_loss, slot_loss * batch.weight.flatten()[slot_token]])
        term = batch.term.flatten()[torch.cat(batch.places)]
        return torch.stack([torch.where(term == number, loss, 0).sum() for number in Term])


def counts(batch: Batch, weight: str) -> torch.Tensor:
    """What the sums are divided by: how many targets each term has (span: slots, if `elbo`). (len(TERMS),) float64."""
    targets = torch.bincount(batch.term[batch.target != IGNORE], minlength=len(TERMS)).double()
    if weight == "elbo":
        targets[Term.SPAN] = (batch.term == Term.SPAN).sum()
    return targets


def term_weights(span: float, draft: float) -> torch.Tensor:
    """What each term weighs in the joint loss beside plan and text. (len(TERMS),)"""
    by_term = {Term.PLAN: 1.0, Term.SPAN: span, Term.CAUSAL: span, Term.PLAN_DRAFT: draft, Term.SPAN_DRAFT: draft}
    return torch.tensor([by_term[term] for term in Term])


# ---------------------------------------------------------------- validation


@torch.no_grad()
def validate(loss: JointLoss, sequences: list[Sequence], tokenizer: Tokenizer, device: torch.device | str = "cpu",
             causal: float = 0.0, arrange: Arrange | None = None, draws: int = 1, seed: int = 0,
             batch: int = 16) -> dict[str, float]:  # fmt: skip
    """Negative log-likelihoods in nats per token, by the name of the term (noise.TERMS).

    "plan" and "causal" are exact. "span" is the negative ELBO, a Monte-Carlo mean over `draws` noisings of each round,
    and with more than one "span_error" its standard error; [PAD] slots count as tokens of a span. `causal`: 0 noises
    spans, 1 reads them left to right, and in between, for a model that trains both, both are measured. With `arrange`
    the terms that it adds are measured too.
    """

    def sums(terms: tuple[Term, ...], rng: np.random.Generator, causal: float,
             arrange: Arrange | None = None) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
        """Of these terms the losses and their targets, (len(TERMS),) float64 each, over all rounds."""
        total, targets = torch.zeros(len(TERMS)).double(), torch.zeros(len(TERMS)).double()
        for some, numbers in validation_rounds(sequences, batch):
            noised = make_batch(some, numbers, tokenizer, rng, "elbo", causal=causal, arrange=arrange)
            last = torch.tensor([r == s.n_rounds - 1 for s, r in zip(some, numbers)])  # it holds all rounds' plans
            other = ~torch.isin(noised.term, torch.tensor(terms)) | (noised.term == Term.PLAN) & ~last[:, None]
            noised.target[other] = IGNORE
            total, targets = total + loss(noised.to(device)).cpu(), targets + counts(noised, "elbo")
        return total, targets

    found, rng, spans = {}, np.random.default_rng(seed), []
    for _ in range(draws):
        total, targets = sums((Term.PLAN, Term.SPAN, Term.CAUSAL), rng, float(causal == 1))
        found |= {TERMS[term]: float(total[term] / targets[term]) for term in Term if targets[term]}
        spans.append(found.get("span", 0.0))
    if "span" in found:
        found["span"] = float(np.mean(spans))
        found |= {"span_error": float(np.std(spans, ddof=1) / draws**0.5)} if draws > 1 else {}
    more = [((Term.CAUSAL,), 1.0, None)] if 0 < causal < 1 else []
    more += [((Term.PLAN_DRAFT, Term.SPAN_DRAFT), float(causal > 0), arrange)] if arrange else []
    for terms, share, arranged in more:
        total, targets = sums(terms, np.random.default_rng(seed), share, arranged)
        found |= {TERMS[term]: float(total[term] / targets[term]) for term in terms if targets[term]}
    return found


def validation_rounds(sequences: list[Sequence], size: int) -> Iterator[tuple[list[Sequence], list[int]]]:
    """Each round of each sequence once, in batches of similar length."""
    rounds = [(s, r) for s in sequences for r in range(s.n_rounds)]
    rounds.sort(key=lambda pair: pair[0].stop(pair[1]))
    for i in range(0, len(rounds), size):
        yield tuple(zip(*rounds[i : i + size]))
