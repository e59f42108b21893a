"""Which tokens are drawn, and which slots of a denoising pass keep theirs (Planned Diffusion, section 4)."""

import torch

ORDERS = ("entropy", "confidence", "margin", "random")


def probabilities(logits, config):
    """(N, V) probabilities that tokens are drawn from; at temperature 0 those of temperature 1."""
    probs = torch.softmax(logits.float() / (config.temperature or 1.0), dim=-1)
    if config.top_p < 1:  # nucleus (Holtzman et al. 2020): drop what the likelier tokens leave no room for
        ranked, order = probs.sort(dim=-1, descending=True)
        ranked[ranked.cumsum(-1) - ranked >= config.top_p] = 0
        probs = torch.zeros_like(probs).scatter(-1, order, ranked)
        probs /= probs.sum(-1, keepdim=True)
    return probs


def draw(probs, config, generators):
    """Token ids (N,) from probabilities (N, V). `generators`: a pair of generator and number of rows an answer."""
    if config.temperature == 0:
        return probs.argmax(-1)
    parts = probs.split([n for _, n in generators])
    return torch.cat([torch.multinomial(p, 1, generator=g)[:, 0] for p, (g, _) in zip(parts, generators)])


def certainty(probs, token, config, generators):
    """(N,) how certain each slot's token is, by config.order; a threshold is one of confidence."""
    if config.threshold or config.order == "confidence":
        return probs.gather(-1, token[:, None])[:, 0]
    if config.order == "entropy":
        return (probs * probs.clamp_min(1e-30).log()).sum(-1)  # torch.special.entr takes five times as long on a CPU
    if config.order == "margin":
        top = probs.topk(2, dim=-1).values
        return top[:, 0] - top[:, 1]
    return torch.cat([torch.rand(n, generator=g, device=probs.device) for g, n in generators])


def ranks(sure, group):
    """(N,) the place of each slot among those of its group, the most certain first. group: (N,) rising numbers."""
    order = sure.argsort(descending=True, stable=True)
    order = order[group[order].argsort(stable=True)]
    first = torch.searchsorted(group, group)  # where the group begins
    return torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device) - first)


def fill(probs, group, share, all_kept, config, generators):
    """Tokens (N,) for slots of probabilities (N, V), and which of them are kept.

    Of each group the `share` (N,) most certain, and with a threshold all that reach it. `all_kept`: the host
    knows that all are, and asks the device for no order.
    """
    token = draw(probs, config, generators)
    if all_kept and config.order != "random":  # random numbers are drawn anyway: an answer must not depend on others
        return token, torch.ones_like(token, dtype=torch.bool)
    sure = certainty(probs, token, config, generators)
    kept = ranks(sure, group) < share
    return token, kept | (sure >= config.threshold) if config.threshold else kept
