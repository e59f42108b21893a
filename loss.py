"""The joint loss of planned diffusion, and the likelihoods that validation and evaluation report."""

import math
from collections.abc import Iterator

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from drafts import IGNORE, TERMS, Term
from model import Transformer
from noise import Batch, Sequence, make_batch
from plumbing.device import autocast
from tokenizer import Tokenizer


class JointLoss(nn.Module):
    """Sums of the terms of the loss over a batch, in nats: one per name in `drafts.TERMS`.

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

    def flops(self, batch: Batch) -> float:
        """Floating-point operations of an update with this batch (forward and twice that backward).

        Padding, keys that the mask hides and logits that no target needs are not counted.
        """
        model, (any_token, slot_token) = self.model, batch.places
        size, width = model.config.vocab_size, model.config.d_model
        blocks = batch.n_tokens * (model.flops_per_token(batch.n_keys / batch.n_tokens) - 2 * size * width)
        logits = len(any_token) * size + len(slot_token) * self.slot_tokens
        return 3 * (blocks + 2 * width * logits)


def counts(batch: Batch, weight: str) -> torch.Tensor:
    """What the sums are divided by: how many targets each term has (span: slots, if `elbo`). (len(TERMS),) float64."""
    targets = torch.bincount(batch.term[batch.target != IGNORE], minlength=len(TERMS)).double()
    if weight == "elbo":
        targets[Term.SPAN] = (batch.term == Term.SPAN).sum()
    return targets


def validation_rounds(sequences: list[Sequence], size: int) -> Iterator[tuple[list[Sequence], list[int]]]:
    """Each round of each sequence once, in batches of similar length."""
    rounds = [(s, r) for s in sequences for r in range(s.n_rounds)]
    rounds.sort(key=lambda pair: pair[0].stop(pair[1]))
    for i in range(0, len(rounds), size):
        yield tuple(zip(*rounds[i : i + size]))


@torch.no_grad()
def validate(loss: JointLoss, sequences: list[Sequence], tokenizer: Tokenizer, device: torch.device | str = "cpu",
             draws: int = 1, seed: int = 0, batch: int = 16, causal: float = 0.0) -> tuple[float, float, float]:  # fmt: skip
    """Negative log-likelihoods in nats per token: (plan, span, standard error of span).

    Plan and text exactly, and causal spans too (with `causal` 1 those of a joint model, read left to right); other
    spans as the negative ELBO, a Monte-Carlo mean over `draws` noisings of each round. [PAD] slots count as tokens of
    a span.
    """
    rng = np.random.default_rng(seed)
    plan, total, spans = 0.0, np.zeros(2), []
    for draw in range(draws):
        spans.append(0.0)
        for some, numbers in validation_rounds(sequences, batch):
            noised = make_batch(some, numbers, tokenizer, rng, "elbo", causal=causal)
            last = torch.tensor([r == s.n_rounds - 1 for s, r in zip(some, numbers)])  # it holds all rounds' plans
            noised.target[~last[:, None] & (noised.term == Term.PLAN)] = IGNORE
            sums, targets = loss(noised.to(device)).tolist(), counts(noised, "elbo").numpy()
            spans[-1] += sums[Term.SPAN] + sums[Term.CAUSAL]
            if draw == 0:
                plan += sums[Term.PLAN]
                total += targets[Term.PLAN], targets[Term.SPAN] + targets[Term.CAUSAL]
    spans = np.array(spans) / max(total[1], 1)
    error = spans.std(ddof=1) / len(spans) ** 0.5 if len(spans) > 1 else float("nan")
    return plan / max(total[0], 1), float(spans.mean()), float(error)


@torch.no_grad()
def validate_streams(loss: JointLoss, sequences: list[Sequence], tokenizer: Tokenizer,
                     device: torch.device | str = "cpu", causal: float = 0.0, ahead: int = 0, seed: int = 0,
                     batch: int = 16) -> dict[str, float]:  # fmt: skip
    """What `validate` leaves out of the terms of training, in nats per token, by name.

    Of a model that trains its spans in both ways (`causal` between 0 and 1) those read left to right, exactly; with
    `ahead` drafts after random places, of spans too if any are causal.
    """
    rng, sums, targets, parts = np.random.default_rng(seed), torch.zeros(len(TERMS)), torch.zeros(len(TERMS)), []
    if 0 < causal < 1:
        parts.append(([Term.CAUSAL], dict(causal=1.0)))
    if ahead:
        parts.append(([Term.PLAN_DRAFT, Term.SPAN_DRAFT], dict(causal=math.ceil(causal), ahead=ahead)))
    for some, numbers in validation_rounds(sequences, batch):
        for terms, settings in parts:
            part = make_batch(some, numbers, tokenizer, rng, **settings)
            part.target[~torch.isin(part.term, torch.tensor(terms))] = IGNORE
            sums, targets = sums + loss(part.to(device)).cpu(), targets + counts(part, "uniform")
    return {name: float(s / n) for name, s, n in zip(TERMS, sums, targets) if n}
