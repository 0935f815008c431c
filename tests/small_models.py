"""What the tests of ``prune`` share: a small network, its task, and a watch on its state."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Dropout(0.4),
        nn.Flatten(),
        nn.Linear(4 * 4, 5),
        nn.Tanh(),
        nn.Linear(5, 3),
    )


def batch(size: int = 6, seed: int = 0) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(size, 1, 4, 4, generator=g), torch.randint(0, 3, (size,), generator=g)


TASK = {"data": [batch()], "loss": F.cross_entropy}


class Snapshot:
    """Everything about a model and torch's random state that scoring must leave alone."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.state = {n: (t, t.clone()) for n, t in model.state_dict(keep_vars=True).items()}
        self.grads = {n: (p.grad, self._copy(p.grad)) for n, p in model.named_parameters()}
        self.flags = {n: (p.requires_grad, id(p)) for n, p in model.named_parameters()}
        self.modes = [m.training for m in model.modules()]
        self.hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()]
        self.random = torch.get_rng_state()

    @staticmethod
    def _copy(t: Tensor | None) -> Tensor | None:
        return None if t is None else t.clone()

    def check(self) -> None:
        model = self.model
        now = model.state_dict(keep_vars=True)
        assert list(now) == list(self.state)
        for n, (tensor, bits) in self.state.items():
            assert now[n] is tensor
            a, b = (t.detach().contiguous().view(-1).view(torch.uint8) for t in (tensor, bits))
            assert torch.equal(a, b), n
        for n, p in model.named_parameters():
            grad, bits = self.grads[n]
            assert p.grad is grad, n
            assert grad is None or torch.equal(grad, bits)
        assert self.flags == {n: (p.requires_grad, id(p)) for n, p in model.named_parameters()}
        assert self.modes == [m.training for m in model.modules()]
        assert self.hooks == [
            (len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()
        ]
        assert torch.equal(self.random, torch.get_rng_state())
