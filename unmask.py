"""Which tokens are drawn, and which slots of a denoising pass keep theirs (Planned Diffusion, section 4)."""

import torch
from torch import Tensor

ORDERS = ("entropy", "confidence", "margin", "random")
Generators = list[tuple[torch.Generator, int]]  # of each answer: its random numbers, and how many rows are its own


def probabilities(logits: Tensor, config) -> Tensor:
    """(N, V) probabilities that tokens are drawn from, above temperature 0."""
    probs = torch.softmax(logits / config.temperature, dim=-1)
    if config.top_p < 1:  # nucleus (Holtzman et al. 2020): drop what the likelier tokens leave no probability for
        ranked, order = probs.sort(dim=-1, descending=True)
        ranked[ranked.cumsum(-1) - ranked >= config.top_p] = 0
        probs = torch.zeros_like(probs).scatter(-1, order, ranked)
        probs /= probs.sum(-1, keepdim=True)
    return probs


def draw(probs: Tensor, generators: Generators) -> Tensor:
    """Token ids (N,) drawn from probabilities (N, V), each answer's with its own generator."""
    parts = probs.split([rows for _, rows in generators])
    return torch.cat([torch.multinomial(p, 1, generator=g)[:, 0] for p, (g, _) in zip(parts, generators)])


def uniform(generators: Generators, device: torch.device) -> Tensor:
    """(N,) random numbers from [0, 1), each answer's from its own generator."""
    return torch.cat([torch.rand(rows, generator=g, device=device) for g, rows in generators])


def certainty(logits: Tensor, token: Tensor, config, generators: Generators) -> Tensor:
    """(N,) how certain each slot's token is, by `config.order`; a threshold is one of confidence.

    A property of the model: its probabilities at temperature 1 without top-p, whatever tokens are drawn with. Else
    a low temperature would make every token certain.
    """
    if config.order == "random" and not config.threshold:
        return uniform(generators, logits.device)
    probs = torch.softmax(logits, dim=-1)
    if config.threshold or config.order == "confidence":
        return probs.gather(-1, token[:, None])[:, 0]
    if config.order == "margin":
        likeliest, second = probs.topk(2, dim=-1).values.unbind(-1)
        return likeliest - second
    # negative entropy; slots exclude no token, so no 0 * -inf
    return torch.linalg.vecdot(probs, torch.log_softmax(logits, dim=-1))


def ranks(sure: Tensor, group: Tensor) -> Tensor:
    """(N,) the rank of each slot in its group, the most certain first. group: (N,) rising numbers."""
    order = sure.argsort(descending=True, stable=True)
    order = order[group[order].argsort(stable=True)]
    first = torch.searchsorted(group, group)  # where the group begins
    return torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device) - first)


def sum_before(values: Tensor, rank: Tensor, group: Tensor) -> Tensor:
    """(N,) of each slot the sum of the values (N,) of those in its group that have a lower rank."""
    order = (group * len(group) + rank).argsort()
    values = values[order].double()  # a sum over all groups must not blur a small one
    total = values.cumsum(0) - values
    return torch.empty_like(total).scatter_(0, order, total - total[torch.searchsorted(group, group)])


def divergence(logits: Tensor, before: Tensor) -> Tensor:
    """(N,) KL divergence, in nats, of each prediction, logits (N, V), from probabilities `before` (N, V)."""
    now = torch.log_softmax(logits, dim=-1)
    return (now.exp() * (now - before.clamp_min(1e-30).log())).sum(-1)


def beside_its_like(token: Tensor, sure: Tensor, group: Tensor, entry: Tensor) -> Tensor:
    """(N,) whether a neighbour would get the same token and is more certain of it (of two as certain the left one)."""
    pair = (token[1:] == token[:-1]) & (group[1:] == group[:-1]) & (entry[1:] == entry[:-1] + 1)
    left_is_surer, none = sure[:-1] >= sure[1:], pair.new_zeros(1)
    return torch.cat([none, pair & left_is_surer]) | torch.cat([pair & ~left_is_surer, none])


def before_text(token: Tensor, pad: int, group: Tensor, entry: Tensor) -> Tensor:
    """(N,) whether a slot would get [PAD] and one of the masked slots right before it text."""
    text = (token != pad).long()
    breaks = (group[1:] != group[:-1]) | (entry[1:] != entry[:-1] + 1)
    run = torch.cat([breaks.new_zeros(1), breaks]).cumsum(0)  # number of the row of neighbours that a slot is in
    first, texts = torch.searchsorted(run, run), text.cumsum(0)
    return (token == pad) & (texts > texts[first] - text[first])


def fill(logits: Tensor, group: Tensor, entry: Tensor, quota: Tensor, pad: int, config, generators: Generators,
         before: Tensor | None = None) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Tokens (N,) for slots with logits (N, V), and which of them are kept: of each group the `quota` (N,) most certain.

    - With a threshold also all that reach it; with `config.stable` only those whose prediction has not moved further
      than that from `before`, the probabilities (N, V) of the last pass (KLASS, arXiv 2511.05664).
    - With `config.entropy_bound` also as many of the most certain as those before them have entropies, in nats, that
      add up to at most that (EB-sampler, arXiv 2505.24857).
    - With `config.apart`, of two neighbours that would get the same token only the more certain is kept: drawn
      independently, they are often one word that either could hold. [PAD] may follow [PAD].
    - With `config.pads_last`, [PAD] waits for the text before it: how long that is shows only once it is there.

    What waits is kept nonetheless if it reaches the threshold. `entry` (N,): where in the layout a slot is.
    """
    token = draw(probabilities(logits, config), generators) if config.temperature else logits.argmax(-1)
    sure = certainty(logits, token, config, generators)
    waits = torch.zeros_like(token, dtype=torch.bool)
    if config.apart:
        waits = beside_its_like(token, sure, group, entry) & (token != pad)
    if config.pads_last:
        waits |= before_text(token, pad, group, entry)
    rank = ranks(sure.where(~waits, -torch.inf), group)
    kept = rank < quota
    if config.entropy_bound:
        entropy = torch.special.entr(torch.softmax(logits, dim=-1)).sum(-1)
        kept |= sum_before(entropy, rank, group) <= config.entropy_bound
    kept &= ~waits
    if config.threshold:
        reaches = sure >= config.threshold
        kept |= reaches & (divergence(logits, before) <= config.stable) if config.stable else reaches
    return token, kept


def check_drafts(logits: Tensor, draft: Tensor, draft_probs: Tensor, config, generators: Generators) -> tuple:
    """The next token after each of N tokens, where a draft (N,) for it may exist (-1: none).

    A draft is accepted with probability min(1, p / q); a rejected one is replaced by a draw from max(0, p - q),
    normalised: tokens are distributed as if drawn from p (Leviathan et al. 2023, arXiv 2211.17192). `draft_probs`
    (N, V) is q, what the draft was drawn from, not normalised: 0 for tokens that would not have been checked.
    Returns tokens (N,), accepted (N,), and p (N, V) (None at temperature 0).
    """
    if not config.temperature:
        token = logits.argmax(-1)
        return token, token == draft, None
    p = probabilities(logits, config)
    if not config.ahead:
        return draw(p, generators), draft >= 0, p
    q = draft_probs / draft_probs.sum(-1, keepdim=True).clamp_min(1e-30)
    at = draft.clamp_min(0)[:, None]
    accepted = (draft >= 0) & (uniform(generators, p.device) * q.gather(1, at)[:, 0] < p.gather(1, at)[:, 0])
    return torch.where(accepted, draft, draw(residual(p, q), generators)), accepted, p


def residual(p: Tensor, q: Tensor) -> Tensor:
    """(N, V) what replaces a rejected draft is drawn from, not normalised."""
    left = (p - q).clamp_min(0)
    return torch.where(left.sum(-1, keepdim=True) > 0, left, p)  # where p is q, nothing is rejected
