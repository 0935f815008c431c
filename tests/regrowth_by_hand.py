"""The methods that drop and grow weights, in plain torch with sorts, dense and slow."""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import functional_call

import fastprune as fp
from fastprune.reference.global_topk_mask import uniform_noise
from test_dynamic import PRUNED, X, Y, sgd, small


def best(scores: Tensor, k: int, within: Tensor) -> Tensor:
    """The k largest scores of those within, by a stable sort."""
    flat = scores.flatten().double().clone()
    flat[~within.flatten()] = -math.inf
    mask = torch.zeros(len(flat), dtype=torch.bool)
    mask[torch.sort(flat, descending=True, stable=True).indices[:k]] = True
    return mask.view(scores.shape) & within


def shared(total: int, wants: list[Any], room: list[int]) -> list[int]:
    """Largest remainder in exact arithmetic; what a full layer cannot take goes to the others."""
    full: set[int] = set()
    while True:
        rest = [i for i, r in enumerate(room) if r and i not in full]
        left = total - sum(room[i] for i in full)
        pull = [Fraction(w) for w in wants]
        if not any(pull[i] for i in rest):
            pull = [Fraction(r) for r in room]
        share = [Fraction(room[i] if i in full else 0) for i in range(len(room))]
        for i in rest:
            share[i] = left * pull[i] / sum(pull[j] for j in rest)
        over = [i for i in rest if share[i] > room[i]]
        if not over:
            break
        full |= set(over)
    counts = [math.floor(s) for s in share]
    for i in sorted(range(len(room)), key=lambda i: (counts[i] - share[i], i)):
        if sum(counts) < total and counts[i] < room[i]:
            counts[i] += 1
    assert sum(counts) == total
    return counts


class ByHand:
    """A training run of the small model.

    Attributes:
        masks, parameters, optimizer: now.
        gradients: the dense ones of the last step.
    """

    def __init__(
        self,
        sparsity: float,
        quota: Callable[..., Any],
        pruned: list[str] = PRUNED,
        seed: int = 0,
        optimizer: Callable[..., Any] = sgd,
        *,
        dense: bool = False,
    ) -> None:
        self.model = small()
        self.optimizer = optimizer(self.model)
        self.parameters = dict(self.model.named_parameters())
        self.names, self.dense = pruned, dense
        self.generator = torch.Generator().manual_seed(seed)
        shapes = [tuple(self.parameters[n].shape) for n in pruned]
        sizes = [math.prod(s) for s in shapes]
        k = math.floor((1 - sparsity) * sum(sizes) + 0.5)
        counts = fp.quotas.counts(sizes, quota(shapes, sparsity), total=k)
        everything = [torch.ones(s, dtype=torch.bool) for s in shapes]
        self.masks = self.random(counts, everything)
        self.gradients: dict[str, Tensor] = {}
        self.apply()

    def weights(self) -> list[Tensor]:
        return [self.parameters[n].detach() for n in self.names]

    def nnz(self) -> list[int]:
        return [int(m.sum()) for m in self.masks]

    def random(self, counts: list[int], within: list[Tensor]) -> list[Tensor]:
        seed = int(torch.randint(2**63 - 1, (), generator=self.generator))
        first, chosen = 0, []
        for k, w in zip(counts, within, strict=True):
            noise = uniform_noise(w.shape, seed, first, w.device)
            chosen.append(best(noise, k, w))
            first += w.numel()
        return chosen

    def apply(self) -> None:
        with torch.no_grad():
            for name, mask in zip(self.names, self.masks, strict=True):
                self.parameters[name].mul_(mask)

    def train(self) -> None:
        """One step, with gradients of kept weights only or of all; absent ones stay zero."""
        leaves = {n: p.detach().clone().requires_grad_() for n, p in self.parameters.items()}
        buffers = {n: b.clone() for n, b in self.model.named_buffers()}
        loss = F.cross_entropy(functional_call(self.model, leaves | buffers, X), Y)
        given = torch.autograd.grad(loss, [*leaves.values()])
        self.gradients = dict(zip(leaves, given, strict=True))
        masks = dict(zip(self.names, self.masks, strict=True))
        for n, p in self.parameters.items():
            g = self.gradients[n]
            p.grad = g.clone() if self.dense or n not in masks else g * masks[n]
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.apply()

    def dropped(self, counts: list[int]) -> list[Tensor]:
        return [
            best(w.abs(), int(m.sum()) - d, m)
            for w, m, d in zip(self.weights(), self.masks, counts, strict=True)
        ]

    def grow(self, kept: list[Tensor], grown: list[Tensor], reset: list[Tensor]) -> None:
        self.masks = [a | b for a, b in zip(kept, grown, strict=True)]
        self.apply()
        with torch.no_grad():
            for name, new in zip(self.names, reset, strict=True):
                p = self.parameters[name]
                p[new] = 0
                for value in self.optimizer.state[p].values():
                    if isinstance(value, Tensor) and value.shape == p.shape:
                        value[new] = 0

    # -- refreshes -------------------------------------------------------------------------------

    def set_refresh(self, zeta: float) -> None:
        moved = [
            0 if n == m.numel() else int(zeta * n)
            for n, m in zip(self.nnz(), self.masks, strict=True)
        ]
        kept = self.dropped(moved)
        grown = self.random(moved, [~m for m in kept])
        self.grow(kept, grown, grown)

    def dsr_refresh(self, threshold: float, target: int, tolerance: float) -> float:
        kept = [m & (w.abs() >= threshold) for m, w in zip(self.masks, self.weights(), strict=True)]
        total = sum(self.nnz()) - sum(int(m.sum()) for m in kept)
        left = [int((w[m] != 0).sum()) for w, m in zip(self.weights(), kept, strict=True)]
        counts = shared(total, left, [int((~m).sum()) for m in kept])
        grown = self.random(counts, [~m for m in kept])
        self.grow(kept, grown, grown)
        if total < (1 - tolerance) * target:
            return threshold * 2
        return threshold / 2 if total > (1 + tolerance) * target else threshold

    def momentum_refresh(self, t: int, total_steps: int, rate: float) -> None:
        rate = rate / 2 * (1 + math.cos(math.pi * t / total_steps))
        momenta = []
        for name in self.names:
            state = self.optimizer.state[self.parameters[name]]
            if "momentum_buffer" in state:
                momenta.append(state["momentum_buffer"].abs())
            else:
                momenta.append((state["exp_avg"] / (state["exp_avg_sq"].sqrt() + 1e-6)).abs())
        means = [
            float(v[m].mean()) if m.any() else 0.0 for v, m in zip(momenta, self.masks, strict=True)
        ]
        drop = [math.ceil(rate * n) for n in self.nnz()]
        kept = self.dropped(drop)
        counts = shared(sum(drop), means, [int((~m).sum()) for m in kept])
        grown = [best(v, n, ~m) for v, n, m in zip(momenta, counts, kept, strict=True)]
        self.grow(kept, grown, grown)

    def rigl_refresh(self, t: int, alpha: float, end: float) -> None:
        rate = alpha / 2 * (1 + math.cos(math.pi * t / end))
        moved = [int(rate * n) for n in self.nnz()]
        kept = self.dropped(moved)
        grown = [
            best(self.gradients[name].abs(), n, ~m)
            for name, n, m in zip(self.names, moved, kept, strict=True)
        ]
        self.grow(kept, grown, [g & ~m for g, m in zip(grown, self.masks, strict=True)])
