"""Muon for the matrices of the blocks, AdamW for embedding and norms, one schedule for both."""

from collections.abc import Iterable

import torch

from config import TrainConfig
from model import Transformer
from plumbing.device import fast_dtype


class Muon(torch.optim.Optimizer):
    """Nesterov momentum whose update is made orthogonal by five Newton-Schulz steps (Jordan et al. 2024).

    torch has it only since 2.9.
    """

    def __init__(self, params: Iterable, lr: float, momentum: float = 0.95, weight_decay: float = 0.0,
                 rows: list[int] | None = None):  # fmt: skip
        """`rows`: if each parameter is several matrices, one below the other, how many rows each of them has."""
        super().__init__(params, dict(lr=lr, momentum=momentum, weight_decay=weight_decay, rows=rows))

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            matrices, updates = [], []
            for p in group["params"]:
                if p.grad is None:
                    continue
                buffer = self.state[p].setdefault("momentum", torch.zeros_like(p))
                buffer.lerp_(p.grad, 1 - group["momentum"])
                update = p.grad.lerp(buffer, group["momentum"])
                p.mul_(1 - group["lr"] * group["weight_decay"])
                rows = group["rows"] or p.shape[0]
                # as one matrix, queries and keys would get what the larger gradient of values leaves them
                matrices += p.split(rows)
                updates += update.split(rows)
            for shape in dict.fromkeys(u.shape for u in updates):  # all of a shape together: few, large products
                same = [i for i, u in enumerate(updates) if u.shape == shape]
                step = -group["lr"] * max(1, shape[0] / shape[1]) ** 0.5
                stack = torch.stack([updates[i] for i in same]).to(fast_dtype(updates[0].device))
                for i, u in zip(same, orthogonalize(stack)):
                    matrices[i].add_(u, alpha=step)


def orthogonalize(g: torch.Tensor) -> torch.Tensor:
    """The nearest matrices with singular values near 1, by a quintic iteration. g: (..., rows, columns)."""
    x = g / (g.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    x = x.mT if g.shape[-2] > g.shape[-1] else x
    for _ in range(5):
        a = x @ x.mT
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    return x.mT if g.shape[-2] > g.shape[-1] else x


def only_new_tokens(model: Transformer, first: int) -> None:
    """Drop all gradients but those of the embeddings of the tokens from `first` on."""
    for name, p in model.named_parameters():
        if name in ("embedding.weight", "output.weight"):
            p.grad[:first] = 0
        elif name not in ("embedding.new", "output.new"):
            p.grad = None


class Optimizer:
    """Muon for the matrices of the blocks, AdamW for embedding and norms, and their shared schedule.

    A model with adapters (pretrained/lora.py) has AdamW alone.
    """

    def __init__(self, model: Transformer, config: TrainConfig):
        self.config, self.peaks = config, (config.lr, config.adam_lr)
        trained = [p for p in model.parameters() if p.requires_grad]
        if len(trained) < len([*model.parameters()]):
            self.parts, self.peaks = (torch.optim.AdamW(trained, betas=(0.9, 0.99), weight_decay=0.0),), self.peaks[1:]
            return
        attention, c = [block.attention for block in model.blocks], model.config
        kv = c.head_dim * c.n_kv_head
        groups = [
            dict(params=[layer.qkv.weight for layer in attention], rows=[c.head_dim * c.n_head, kv, kv]),
            dict(params=[block.gate_up.weight for block in model.blocks], rows=[c.d_ff, c.d_ff]),
            dict(params=[layer.out.weight for layer in attention] + [block.down.weight for block in model.blocks]),
        ]
        muon = Muon(groups, config.lr, weight_decay=config.weight_decay)
        norms = [p for p in model.parameters() if p.ndim == 1]
        embeddings = [p for name, p in model.named_parameters() if name in ("embedding.weight", "output.weight")]
        decayed, others = dict(params=embeddings), dict(params=norms, weight_decay=0.0)
        adam = torch.optim.AdamW([decayed, others], config.adam_lr, (0.9, 0.99), weight_decay=config.weight_decay)
        self.parts = muon, adam

    def step(self, step: int) -> None:
        """Update the weights with their gradients at the rates of update number `step`."""
        c = self.config
        warmup = min(c.warmup, c.steps // 2)
        falling = c.decay * max(c.steps - warmup, 1)
        fraction = min((step + 1) / max(warmup, 1), (c.steps - step) / falling, 1)
        if len(self.parts) > 1:  # with --new_only old embeddings have no gradient, so must not decay either
            self.parts[1].param_groups[0]["weight_decay"] = c.weight_decay if step >= c.new_only else 0.0
        for part, peak in zip(self.parts, self.peaks):
            for group in part.param_groups:
                group["lr"] = peak * fraction
            part.step()

    def state(self) -> dict[str, torch.Tensor]:
        """All state as named tensors: `part.parameter.name`."""
        return {f"{i}.{n}.{name}": value for i, part in enumerate(self.parts)
                for n, state in part.state_dict()["state"].items() for name, value in state.items()}  # fmt: skip

    def load(self, tensors: dict[str, torch.Tensor]) -> None:
        """Go on with what `state` returned. Raises ValueError if the names or shapes are those of another model."""
        for i, part in enumerate(self.parts):
            saved, params = part.state_dict(), [p for group in part.param_groups for p in group["params"]]
            for key, value in tensors.items():
                number, n, name = key.split(".")
                if int(number) == i:
                    if int(n) >= len(params) or value.ndim and value.shape != params[int(n)].shape:
                        raise ValueError(f"its optimizer state {key} is that of another model")
                    saved["state"].setdefault(int(n), {})[name] = value
            part.load_state_dict(saved)
