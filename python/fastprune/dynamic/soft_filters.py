"""Soft filter pruning: filters are set to zero now and then, and trained on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fastprune.checks import fraction, whole
from fastprune.dynamic.base import DynamicPruner
from fastprune.dynamic.kernels import Kernels
from fastprune.dynamic.layers import all_but_last_linear
from fastprune.nn.masked import MaskedLayer
from fastprune.ops.global_topk_mask import global_topk_mask
from fastprune.pruners.targets import Selection
from fastprune.swapping import users_of


class SFP(DynamicPruner):
    r"""Soft filter pruning: set the weakest filters of each layer to zero, and train them on.

    After every ``every`` steps, in each layer of n filters, the int(n * sparsity) with the smallest
    l2 norm of their weights (in float64; of equal ones the later) are set to zero where they are
    stored. Nothing else happens: the model stays dense, its layers plain, and gradients bring the
    filters back. :meth:`finish` does it a last time, turns the layers into masked ones and fixes
    the masks.

    Args:
        model: its weights change at a refresh, its layers at :meth:`finish`. The last linear layer,
            biases and normalization stay dense: a zeroed filter keeps its bias, as in the authors'
            program.
        sparsity: pruned fraction of each layer's filters (rows of a linear weight), in [0, 1].
        every: steps between refreshes; the paper's is one epoch.
        include, exclude: which weights are prunable; :func:`fastprune.pruners.prunable`.
            ``include`` overrides that the last linear layer stays dense.
        group: a ``torch.distributed`` group whose ranks train the same model: after every refresh
            the masks are compared, and differing ones are an error.
    Attributes:
        masks: the filters that were not zeroed at the last refresh; all before the first.
    Raises:
        ValueError: an argument is out of range; no weights are prunable; a weight is NaN; a
            prunable weight is of a layer other than ``nn.Linear`` and ``nn.Conv2d``.

    Cost: dense training; a refresh is one selection per layer and a write of the weights.
    Where it strays: the authors' program prunes once before training too, and leaves what the
    user names, such as the downsampling convolutions, dense; name them in ``exclude``.
    Paper: He et al. 2018, *Soft filter pruning for accelerating deep convolutional neural
    networks*, Algorithm 1.
    """

    name = "sfp"

    def __init__(
        self,
        model: nn.Module,
        sparsity: float,
        every: int,
        *,
        include: Selection = None,
        exclude: Selection = None,
        group: Any = None,
    ) -> None:
        self.sparsity = fraction(sparsity, "sparsity")
        self.every = whole(every, "every", 1, None)
        super().__init__(model, include=include, exclude=exclude, group=group)

    @classmethod
    def prunable(
        cls, model: nn.Module, include: Selection, exclude: Selection
    ) -> dict[str, nn.Parameter]:
        """All linear and convolution weights but that of the last linear layer."""
        return all_but_last_linear(model, include, exclude)

    def initial_masks(self) -> dict[str, Tensor]:
        """Everything."""
        for name, w in self._weights.items():
            users_of(self.model, name, w)  # what finish() cannot mask is an error now
        return {n: torch.ones_like(w, dtype=torch.bool) for n, w in self._weights.items()}

    def adopt_masks(self, masks: dict[str, Tensor]) -> dict[str, list[MaskedLayer]]:
        """None: the layers stay plain."""
        return {}

    def is_due(self, step: int) -> bool:
        """Every ``every`` steps."""
        return step % self.every == 0

    def new_masks(self, step: int) -> dict[str, Tensor]:
        """The filters with the largest norms, layer by layer."""
        masks = {}
        for name, w in self._weights.items():
            n = w.shape[0]
            keep = n - int(n * self.sparsity)
            (masks[name],) = global_topk_mask(
                [w.detach()], k=keep, scope="filter", score="identity", names=[name]
            )
        self._zero(masks)
        return masks

    def final_masks(self) -> dict[str, Tensor]:
        """Those of a last refresh."""
        return self.new_masks(self.steps)

    @torch.no_grad()
    def _zero(self, masks: Mapping[str, Tensor]) -> None:
        for name, mask in masks.items():
            self._weights[name].masked_fill_(~mask, 0)

    def _measure(self, min_time: float) -> None:
        if self._users:  # plain layers have no choice
            super()._measure(min_time)

    def _fix(self) -> None:
        super()._fix()
        times = self.kernels.times
        self.kernels = Kernels(self.model, {m for users in self._users.values() for m in users})
        self.kernels.times = times
        if not times and self._watch.seen:
            self._measure(0.01)
        self.kernels.choose()
