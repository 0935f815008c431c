"""One network of paper 000: trained, pruned or not, and measured."""

from __future__ import annotations

import copy
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastprune import timing
from fastprune.convert import finalize
from fastprune.kernel_choice import layer_step
from fastprune.training.data import Batch, Split, order


@dataclass(frozen=True)
class Recipe:
    """How a network is trained: Adam, the rate cut to a tenth every ``decay_epochs``.

    Paper 000, Table D1.
    """

    epochs: int
    batch: int
    lr: float
    decay_epochs: int


def train_(model: nn.Module, data: Split, recipe: Recipe, seed: int) -> float:
    """Train in place; the seconds that it took.

    Raises:
        ValueError: the loss is not finite any more; FloatingPointError: a solve diverged.
    """
    optimizer = torch.optim.Adam(model.parameters(), lr=recipe.lr)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, recipe.decay_epochs, 0.1)
    model.train()
    began = time.perf_counter()
    for epoch in range(recipe.epochs):
        for x, y in data.fetch(order(len(data), recipe.batch, seed, epoch)):
            loss = F.cross_entropy(model(x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        if not bool(torch.isfinite(loss)):
            raise ValueError(f"training diverged: the loss is {float(loss)} in epoch {epoch + 1}")
        schedule.step()
    return time.perf_counter() - began


def batches_of(data: Split, size: int) -> list[Batch]:
    """The samples in their order; the last batch may be smaller."""
    return list(zip(data.x.split(size), data.y.split(size), strict=True))


@torch.no_grad()
def measure(model: nn.Module, layer: Any, batches: Sequence[Batch]) -> dict[str, Any]:
    """Accuracy, and iterations of the forward solves of ``layer``, means over the batches.

    ``unconverged`` counts batches whose solve stopped above its tolerance.
    """
    model.eval()
    right = samples = unconverged = 0
    iterations = 0.0
    for x, y in batches:
        right += int((model(x).argmax(1) == y).sum())
        samples += len(y)
        iterations += float(torch.as_tensor(layer.info.iterations).double().mean()) * len(y)
        unconverged += not bool(torch.as_tensor(layer.info.converged).all())
    return {
        "accuracy": right / samples,
        "iterations": iterations / samples,
        "unconverged": unconverged,
    }


def time_solves(
    model: nn.Module, name: str, x: Tensor, min_time: float
) -> dict[str, Mapping[str, float]]:
    """Seconds of one forward pass of the layer ``name`` on what it gets from ``x``.

    ``sparse``: with its masks; ``dense``: the same layer with plain weights, zeros where pruned.
    Interleaved: median and quartiles, as :func:`fastprune.timing.measure` gives.
    """
    seen: list[Tensor] = []
    layer = model.get_submodule(name)
    handle = layer.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    try:
        with torch.no_grad():
            model.eval()(x)
    finally:
        handle.remove()
    forms = {"sparse": copy.deepcopy(layer), "dense": finalize(layer)}
    for form in forms.values():
        form.on_failure = "ignore"  # type: ignore[assignment]
    steps = {kind: layer_step(form.eval(), seen[0], False) for kind, form in forms.items()}
    return {k: t.to_dict() for k, t in timing.measure(steps, min_time=min_time).items()}
