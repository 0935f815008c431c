"""The three iterative methods: Lottery Ticket, One Shot, and SAP."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor, nn

from fastprune.checks import fraction as checked_fraction
from fastprune.iterative.base import IterativePruning
from fastprune.iterative.sap import SAPSettings, sap_masks
from fastprune.iterative.snapshot import snapshot
from fastprune.iterative.units import UnitScope, keep_largest, unit_sizes
from fastprune.masks import Masks
from fastprune.pruners.targets import Selection


class _FixedShare(IterativePruning):
    """Every round prunes floor(fraction * d) of the d weights that are left in each unit."""

    settings_names = (*IterativePruning.settings_names, "fraction")

    def __init__(
        self,
        model: nn.Module,
        fraction: float = 0.2,
        *,
        scope: UnitScope = "global",
        p: float = 0.5,
        q: float = 1.0,
        include: Selection = None,
        exclude: Selection = None,
    ) -> None:
        self.fraction = checked_fraction(fraction, f"{type(self).__name__}: fraction")
        super().__init__(model, scope=scope, p=p, q=q, include=include, exclude=exclude)

    def _select(
        self, weights: Mapping[str, Tensor], masks: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        counts = [d - math.floor(self.fraction * d) for d in unit_sizes(masks, self.scope)]
        return keep_largest(weights, masks, counts, self.scope)


class LotteryTicket(_FixedShare):
    r"""Iterative magnitude pruning with rewinding::

        ticket = LotteryTicket(model, fraction=0.2)    # remembers the initial state
        for _ in range(rounds):
            train(model)                               # your loop, with a new optimizer
            masks = ticket.prune()                     # prunes by |w|, rewinds
        train(model)
        model = ticket.finish()

    Each round prunes the floor(fraction * d) smallest magnitudes of the d weights left, in float64,
    and sets the model (parameters and buffers) back to its initial state, or to the one that
    :meth:`remember` has copied, pruned weights being 0. Equal magnitudes: the earlier flat index
    stays, parameters in ``named_parameters()`` order.

    Args:
        model: changed in place by :meth:`prune`; its state now is the initial one.
        fraction: share of what is left that a round prunes, in [0, 1].
        scope: ``"global"``: d counts all weights; ``"layer"``: each layer apart; ``"neuron"``: each
            row of each weight viewed as (out, everything else).
        p, q: of the PQ index in :attr:`history`; no effect on the masks.
        include, exclude: which weights, as in :func:`fastprune.prune`; by default all linear and
            convolution weights. Their layers must be ``nn.Linear`` or ``nn.Conv2d``, which have
            masked forms; exclude others.
    Raises:
        ValueError: an argument out of range; a layer without a masked form, by name.

    Memory: one copy of the model's state for each remembered state, one byte per weight.
    Papers: Frankle & Carbin 2019; as in Diao et al. 2023, Section 4.
    """


class OneShotIterative(_FixedShare):
    r"""One training, then round after round of the same share, without retraining.

    As :class:`LotteryTicket`, except that all rounds rank by the weights w_0 that the model has at
    the first :meth:`prune`, and that the model is then w_0 under the new masks (buffers as they
    were then), whatever was done to it between the rounds. :meth:`remember` is an error.

    Args:
        model, fraction, scope, p, q, include, exclude: as :class:`LotteryTicket`.

    Paper: Diao et al. 2023, Section 4 ("One Shot").
    """

    points: ClassVar[tuple[str, ...]] = ("init", "trained")

    def prune(self, *, optimizer: torch.optim.Optimizer | None = None) -> Masks:
        """As :meth:`IterativePruning.prune`; the first call keeps a copy of the trained state."""
        self._refuse_finished("prune")
        first = "trained" not in self._states
        if first:
            self._states["trained"] = snapshot(self.model)
        try:
            return super().prune(optimizer=optimizer)
        except BaseException:
            if first and not self.history:
                del self._states["trained"]
            raise

    def _ranked(self) -> Mapping[str, Tensor]:
        return self._states["trained"]

    def _target(self) -> Mapping[str, Tensor]:
        return self._states["trained"]


class SAP(IterativePruning):
    r"""Sparsity-informed Adaptive Pruning: each round prunes what :func:`sap_step` says, rewinds.

    Use, scopes, ties and rewinding as :class:`LotteryTicket`.

    Args:
        model, scope, include, exclude: as :class:`LotteryTicket`.
        p, q, eta_r, gamma, beta: as in :func:`sap_step`.

    Paper: Diao et al. 2023, Algorithm 1.
    """

    settings_names = (*IterativePruning.settings_names, "eta_r", "gamma", "beta")

    def __init__(
        self,
        model: nn.Module,
        *,
        p: float = 0.5,
        q: float = 1.0,
        eta_r: float = 0.0,
        gamma: float = 1.0,
        beta: float = 0.9,
        scope: UnitScope = "global",
        include: Selection = None,
        exclude: Selection = None,
    ) -> None:
        self._settings = SAPSettings.check(type(self).__name__, p, q, eta_r, gamma, beta)
        self.eta_r, self.gamma = self._settings.eta_r, self._settings.gamma
        self.beta = self._settings.beta
        super().__init__(model, scope=scope, p=p, q=q, include=include, exclude=exclude)

    def _select(
        self, weights: Mapping[str, Tensor], masks: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        return sap_masks(weights, masks, self._settings, self.scope, self._op)
