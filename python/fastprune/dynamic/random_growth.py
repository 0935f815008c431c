"""Methods that grow at random positions: SET and DSR."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from fastprune.checks import fraction, whole
from fastprune.dynamic.layers import all_but_ends_and_shortcuts
from fastprune.dynamic.regrowth import RegrowingPruner, share_out
from fastprune.pruners.plan import Quota
from fastprune.pruners.targets import Selection


class SET(RegrowingPruner):
    r"""Sparse evolutionary training: drop the smallest weights of each layer, grow random ones.

    After every ``every`` steps each layer drops int(zeta nnz) of its kept weights, those of
    smallest magnitude (of equal ones the later), and grows as many at absent positions, drawn
    uniformly; what was dropped just now may be drawn too. A layer without absent positions stays
    as it is. Only kept weights have gradients.

    Args:
        model: changed in place; see :class:`fastprune.dynamic.DynamicPruner`. The last linear
            layer, biases and normalization stay dense.
        sparsity: pruned fraction of the prunable weights, in [0, 1]: exactly
            k = floor((1 - sparsity) N + 0.5) are kept at all times.
        every: steps between refreshes; the paper's is one epoch.
        zeta: fraction of a layer's kept weights that move at a refresh.
        until: no refresh from this step on; None: to the end. The paper's last epoch has none.
        quota: how the kept weights are shared out among the layers: ``"erk"`` (the paper's
            Erdos-Renyi, extended to kernels), ``"uniform"``, any other of
            :mod:`fastprune.quotas`.
        optimizer: its state of a weight that grows (momentum) starts at 0 too; None: it stays.
        seed, generator: of the random numbers; ``generator`` instead of a new one from ``seed``.
            Ranks that train together need the same.
        include, exclude: which weights are prunable; :func:`fastprune.pruners.prunable`.
            ``include`` overrides that the last linear layer stays dense.
        example_input: times the kernels at once (:meth:`measure_kernels`).
        group: a ``torch.distributed`` group whose ranks train the same model: after every refresh
            the masks are compared, and differing ones are an error.
    Raises:
        ValueError: an argument is out of range; no weights are prunable; a kept weight is NaN; a
            weight is not the optimizer's.
        TypeError: ``optimizer`` or ``generator`` is something else.

    Cost: training on the packed pattern, all three products; a refresh is two selections
    (:func:`fastprune.global_topk_mask`), one write of the weights and a packing.
    Where it strays: the paper draws grown weights at random, ours start at 0; it drops a fraction
    of the positive and one of the negative weights, ours of the magnitudes.
    Paper: Mocanu et al. 2018, *Scalable training of artificial neural networks with adaptive sparse
    connectivity inspired by network science*, Algorithm 1.
    """

    name = "set"

    def __init__(
        self,
        model: nn.Module,
        sparsity: float,
        every: int,
        zeta: float = 0.3,
        *,
        until: int | None = None,
        quota: Quota = "erk",
        optimizer: Optimizer | None = None,
        seed: int = 0,
        generator: torch.Generator | None = None,
        include: Selection = None,
        exclude: Selection = None,
        example_input: Any = None,
        group: Any = None,
    ) -> None:
        self.zeta = fraction(zeta, "zeta")
        super().__init__(
            model,
            sparsity,
            every=every,
            until=until,
            quota=quota,
            optimizer=optimizer,
            seed=seed,
            generator=generator,
            include=include,
            exclude=exclude,
            example_input=example_input,
            group=group,
        )

    def new_masks(self, step: int) -> dict[str, Tensor]:
        """The smallest dropped, as many random ones grown, layer by layer."""
        moved = [
            0 if n == m.numel() else int(self.zeta * n)
            for n, m in zip(self.kept(), self.current.values(), strict=True)
        ]
        return self.grow(self.survivors(moved), moved)


class DSR(RegrowingPruner):
    r"""Dynamic sparse reparameterization: one threshold for all layers, growth where weights live.

    After every ``every`` steps all kept weights with abs(w) < H are dropped, K in all. K < (1 -
    tolerance) ``target`` doubles H for the next refresh, K > (1 + tolerance) ``target`` halves it.
    Layer l, of whose weights l_i != 0 are left, of L in all, grows K l_i / L random absent ones
    (whole numbers that add up to K, by largest remainder; what does not fit into a full layer goes
    to the others in the same proportion; what was dropped just now may be drawn too). Only kept
    weights have gradients.

    Args:
        model: changed in place. The first convolution (the first in ``named_modules()``), 1x1
            convolutions that downsample (of stride above 1, or in a module called ``downsample`` or
            ``shortcut``), the last linear layer, biases and normalization stay dense.
        sparsity: as in :class:`SET`.
        every: steps between refreshes; in the paper from 100 up to 1000 and more as training goes
            on.
        target: weights to drop at a refresh; None: a twentieth of the kept ones, and at least one.
        threshold: the first H.
        tolerance: see above.
        until, optimizer, seed, generator, include, exclude, example_input, group: as in
            :class:`SET`. ``include`` overrides that some layers stay dense.
        quota: of the initial masks; uniform in the paper.
    Attributes:
        threshold: H as the next refresh will use it.
    Raises: as :class:`SET`.

    Cost: as :class:`SET`, and one more read of the weights per refresh.
    Where the paper is silent: how shares are rounded, and the default ``target``, which it tunes.
    Paper: Mostafa & Wang 2019, *Parameter efficient training of deep convolutional neural networks
    by dynamic sparse reparameterization*, Algorithm 1; what stays dense: Lin et al. 2020, section
    5.1.
    """

    name = "dsr"

    def __init__(
        self,
        model: nn.Module,
        sparsity: float,
        every: int,
        target: int | None = None,
        threshold: float = 0.001,
        tolerance: float = 0.1,
        *,
        until: int | None = None,
        quota: Quota = "uniform",
        optimizer: Optimizer | None = None,
        seed: int = 0,
        generator: torch.Generator | None = None,
        include: Selection = None,
        exclude: Selection = None,
        example_input: Any = None,
        group: Any = None,
    ) -> None:
        self._target = None if target is None else whole(target, "target", 1, None)
        if isinstance(threshold, bool) or not isinstance(threshold, (int, float)):
            raise ValueError(f"threshold: expected a positive number, got {threshold!r}")
        if not 0 < threshold < float("inf"):
            raise ValueError(f"threshold: expected a positive number, got {threshold!r}")
        self.threshold = float(threshold)
        self.tolerance = fraction(tolerance, "tolerance")
        super().__init__(
            model,
            sparsity,
            every=every,
            until=until,
            quota=quota,
            optimizer=optimizer,
            seed=seed,
            generator=generator,
            include=include,
            exclude=exclude,
            example_input=example_input,
            group=group,
        )

    @classmethod
    def prunable(
        cls, model: nn.Module, include: Selection, exclude: Selection
    ) -> dict[str, nn.Parameter]:
        """See ``model`` above."""
        return all_but_ends_and_shortcuts(model, include, exclude)

    @property
    def target(self) -> int:
        """Weights that a refresh is meant to drop."""
        return max(sum(self.kept()) // 20, 1) if self._target is None else self._target

    def new_masks(self, step: int) -> dict[str, Tensor]:
        """Small weights dropped, as many grown in proportion to what is left of each layer."""
        target = self.target
        current = self.current.values()
        dropped = [
            int((m & (w.abs() < self.threshold)).sum())
            for m, w in zip(current, self._values(), strict=True)
        ]
        kept = self.survivors(dropped)
        left = [n - d for n, d in zip(self.kept(), dropped, strict=True)]
        total = sum(dropped)
        room = [m.numel() - n for m, n in zip(kept, left, strict=True)]
        masks = self.grow(kept, share_out(total, left, room))
        if total < (1 - self.tolerance) * target:
            self.threshold *= 2
        elif total > (1 + self.tolerance) * target:
            self.threshold /= 2
        return masks

    def extra_state(self) -> dict[str, Any]:
        """The threshold as well."""
        return {**super().extra_state(), "threshold": self.threshold}

    def load_extra_state(self, state: Mapping[str, Any]) -> None:
        """The inverse of :meth:`extra_state`."""
        super().load_extra_state(state)
        self.threshold = float(state["threshold"])
