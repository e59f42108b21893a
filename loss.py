"""The joint loss of planned diffusion, and the likelihoods that validation and evaluation report."""

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from model import Transformer
from noise import IGNORE, Batch, Sequence, make_batch
from plumbing.device import autocast
from tokenizer import Tokenizer


class JointLoss(nn.Module):
    """Sums of the plan loss and of the weighted span loss over a batch, in nats.

        loss = plan sum / plan targets + span_weight * span sum / slots        (`counts` says how many there are)

    Training minimises this sum of two means. It is not -log p(z, x | c), in which each token of plan and spans would
    count once: here plan and spans count alike, however many tokens each of them has.

    Plan and text positions predict the next token over the whole vocabulary. A masked slot predicts its original
    token among text and [PAD]: never a tag (zero masking probability, MDLM section 3.2.3).

    `dtype`: in which matrix products are computed; training and validation both get it here, and nowhere else.
    """

    def __init__(self, model: Transformer, slot_tokens: int, dtype: torch.dtype = torch.float32):
        super().__init__()
        self.model, self.slot_tokens, self.dtype = model, slot_tokens, dtype

    def forward(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        target, (plan, span) = batch.target.flatten(), batch.places
        with autocast(batch.token.device, self.dtype):
            hidden = self.model(batch.token, batch.position, batch.ranges).flatten(0, 1)  # (B * T, D)
            plan_logits = self.model.logits(hidden[plan])  # (plan targets, vocabulary)
            span_logits = self.model.logits(hidden[span], self.slot_tokens)  # (masked slots, slot_tokens)
        plan_loss = F.cross_entropy(plan_logits.float(), target[plan], reduction="sum")
        span_loss = F.cross_entropy(span_logits.float(), target[span], reduction="none")
        return plan_loss, (span_loss * batch.weight.flatten()[span]).sum()

    def flops(self, batch: Batch) -> float:
        """Floating-point operations of an update with this batch (forward and twice that backward).

        Padding, keys that the mask hides and logits that no target needs are not counted.
        """
        model, (plan, span) = self.model, batch.places
        embedding = model.embedding.weight
        blocks = batch.n_tokens * (model.flops_per_token(batch.n_keys / batch.n_tokens) - 2 * embedding.numel())
        logits = len(plan) * len(embedding) + len(span) * self.slot_tokens
        return 3 * (blocks + 2 * embedding.shape[1] * logits)


def counts(batch: Batch, weight: str) -> torch.Tensor:
    """What the two sums are divided by: plan targets, and slots (elbo) or masked slots (uniform). (2,) float64."""
    predicted = batch.target != IGNORE
    slots = batch.in_span if weight == "elbo" else predicted & batch.in_span
    return torch.stack([(predicted & ~batch.in_span).sum(), slots.sum()]).double()


@torch.no_grad()
def validate(loss: JointLoss, sequences: list[Sequence], tokenizer: Tokenizer, device: torch.device | str = "cpu",
             draws: int = 1, seed: int = 0, batch: int = 16) -> tuple[float, float, float]:  # fmt: skip
    """Negative log-likelihoods in nats per token: (plan, span, standard error of span).

    Plan and text exactly; spans as the negative ELBO, a Monte-Carlo mean over `draws` noisings of
    each round. [PAD] slots count as tokens of a span.
    """
    rng = np.random.default_rng(seed)
    rounds = [(s, r) for s in sequences for r in range(s.n_rounds)]
    rounds.sort(key=lambda pair: pair[0].stop(pair[1]))
    plan, total, spans = 0.0, np.zeros(2), []
    for draw in range(draws):
        spans.append(0.0)
        for i in range(0, len(rounds), batch):
            some, numbers = zip(*rounds[i : i + batch])
            noised = make_batch(some, numbers, tokenizer, rng, "elbo")
            last = torch.tensor([r == s.n_rounds - 1 for s, r in zip(some, numbers)])  # it holds all rounds' plans
            noised.target[~last[:, None] & ~noised.in_span] = IGNORE
            plan_sum, span_sum = loss(noised.to(device))
            spans[-1] += float(span_sum)
            if draw == 0:
                plan, total = plan + float(plan_sum), total + counts(noised, "elbo").numpy()
    spans = np.array(spans) / max(total[1], 1)
    error = spans.std(ddof=1) / len(spans) ** 0.5 if len(spans) > 1 else float("nan")
    return plan / max(total[0], 1), float(spans.mean()), float(error)
