"""Which tokens are drawn, and which slots of a denoising pass keep theirs (Planned Diffusion, section 4)."""

import torch
from torch import Tensor

from config import SampleConfig

Generators = list[tuple[torch.Generator, int]]  # of each answer: its random numbers, and how many rows are its own


def probabilities(logits: Tensor, config: SampleConfig) -> Tensor:
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


def certainty(logits: Tensor, token: Tensor, config: SampleConfig, generators: Generators) -> Tensor:
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


def fill(logits: Tensor, group: Tensor, entry: Tensor, quota: Tensor, pad: int, config: SampleConfig,
         generators: Generators) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Tokens (N,) for slots with logits (N, V), and which of them are kept: of each group the `quota` (N,) most certain.

    - With a threshold also all that reach it.
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
    kept = (ranks(sure.where(~waits, -torch.inf), group) < quota) & ~waits
    if config.threshold:
        kept |= sure >= config.threshold
    return token, kept
