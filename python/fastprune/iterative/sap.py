"""Sparsity-informed Adaptive Pruning: how much to remove, from the PQ index of what is left."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fastprune.iterative.units import UnitScope, check_scope, keep_largest
from fastprune.masks import Masks
from fastprune.ops.pq_bound import bound_of, number, pq_of
from fastprune.ops.sparsity_index import index_of, rows_pq
from fastprune.ops.tensor_statistics import Checked, statistics_of
from fastprune.pruners.arguments import masks_of, weights_of
from fastprune.pruners.base import warn_of_empty_layers
from fastprune.pruners.targets import refuse_rowless


@dataclass(frozen=True)
class SAPSettings:
    """Checked numbers of a step: those of :func:`sap_step`."""

    p: float
    q: float
    eta_r: float
    gamma: float
    beta: float

    @classmethod
    def check(
        cls, op: str, p: float, q: float, eta_r: float, gamma: float, beta: float
    ) -> SAPSettings:
        low, high = pq_of(p, q, op)
        return cls(
            low,
            high,
            number(eta_r, f"{op}: eta_r", 0.0, math.inf),
            number(gamma, f"{op}: gamma", 0.0, math.inf),
            number(beta, f"{op}: beta", 0.0, 1.0),
        )

    def removed(self, d: int, index: float) -> int:
        """c of a unit with d kept weights and PQ index ``index``, in float64, in this order."""
        if d == 0:
            return 0
        r: float = bound_of(d, index, self.p, self.q, self.eta_r)
        return math.floor(d * min(self.gamma * (1.0 - r / d), self.beta))


def sap_step(
    model: nn.Module,
    masks: Mapping[str, Tensor] | None = None,
    *,
    p: float = 0.5,
    q: float = 1.0,
    eta_r: float = 0.0,
    gamma: float = 1.0,
    beta: float = 0.9,
    scope: UnitScope = "global",
) -> Masks:
    r"""One pruning of SAP: as many of the smallest weights as their PQ index says can go.

    For each unit (all weights, a layer, or a neuron) with d weights under the mask, in float64 and
    in this order:

    .. math::
        I &= 1 - (\sum |w|^p / d)^{1/p} / (\sum |w|^q / d)^{1/q} \\
        r &= d (1 + \eta_r)^{-q/(q-p)} (1 - I)^{pq/(q-p)} \\
        c &= \lfloor d \min(\gamma (1 - r / d), \beta) \rfloor

    and the c smallest of the d magnitudes are pruned. Equal magnitudes: the earlier flat index
    stays, parameters in ``named_parameters()`` order. A unit without weights, or with zeros only,
    loses none (with eta_r = 0; I is 0 there). r is not rounded, as the authors' program does. The
    model is not changed; ``masks.apply_(model)`` sets pruned weights to zero.

    Args:
        model: any module; trained weights are what the method is meant for.
        masks: parameter name -> bool tensor: what is still there, and which weights count at all:
            other parameters are left alone. None: all prunable weights, dense.
        p, q: 0 < p < q, both in [2^-20, 2^20].
        eta_r: >= 0; larger removes more.
        gamma: factor on the share that goes, >= 0.
        beta: the largest share that may go, in [0, 1].
        scope: what a unit is. ``"global"``: all weights; ``"layer"``: each weight tensor;
            ``"neuron"``: each row of each weight viewed as (out, everything else).
    Returns:
        Masks inside ``masks``, in ``named_parameters()`` order, each under its parameter's first
        name, on the weights' devices.
    Raises:
        ValueError: a weight under the mask is NaN or infinite (the message names the layer); an
            argument is out of range; a mask fits no parameter; no masks at all; a transposed
            convolution with scope ``neuron``.
        TypeError: an argument is of another kind.
    Warns:
        UserWarning: a layer is left without a weight; the message names it.

    Cost: two reads of the weights under the masks, one for the indices and one for the selection;
    p = 1/2, 1, 2 are the fast exponents.
    Paper: Diao et al. 2023, Algorithm 1 and Section 4 (scopes).
    """
    op = "sap_step"
    settings = SAPSettings.check(op, p, q, eta_r, gamma, beta)
    scope = check_scope(scope, op)
    weights, given = weights_and_masks(model, masks, op)
    refuse_rowless(model, {n: weights[n] for n in given}, scope)
    kept = sap_masks(weights, given, settings, scope, op)
    warn_of_empty_layers(kept, op)
    return Masks(kept)


def weights_and_masks(
    model: nn.Module, masks: Mapping[str, Tensor] | None, op: str
) -> tuple[dict[str, nn.Parameter], dict[str, Tensor]]:
    """Weights by name, and their masks, both in the model's order."""
    if masks is None:
        weights = weights_of(model, None, None)
        return weights, {n: torch.ones_like(w, dtype=torch.bool) for n, w in weights.items()}
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    known = masks_of(model, masks)
    if not known:
        raise ValueError(f"{op}: masks: expected at least one, got none")
    weights = {n: w for n, w in model.named_parameters() if n in known}
    return weights, {n: known[n] for n in weights}


def sap_masks(
    weights: Mapping[str, Tensor],
    masks: Mapping[str, Tensor],
    settings: SAPSettings,
    scope: UnitScope,
    op: str,
) -> dict[str, Tensor]:
    """The step on tensors; see :func:`sap_step`."""
    sizes, indices = unit_indices(weights, masks, settings, scope, op)
    counts = [d - settings.removed(d, i) for d, i in zip(sizes, indices, strict=True)]
    return keep_largest(weights, masks, counts, scope)


def unit_indices(
    weights: Mapping[str, Tensor],
    masks: Mapping[str, Tensor],
    settings: SAPSettings,
    scope: UnitScope,
    op: str,
) -> tuple[list[int], list[float]]:
    """Kept weights and PQ index of each unit."""
    names = list(masks)
    checked = Checked.check(
        op,
        [weights[n].detach() for n in names],
        [masks[n] for n in names],
        [f"[{n!r}]" for n in names],
        ("weights", "masks"),
    )
    exponents = [settings.p, settings.q]
    if scope == "neuron":
        sizes, indices = rows_pq(checked, exponents)
    else:
        stats = statistics_of(checked, exponents, False)
        assert stats.total is not None
        part = stats if scope == "layer" else stats.total
        sizes, indices = part.count.reshape(-1), index_of(part.power_means).reshape(-1)
    if bool(indices.isnan().any()):
        bad = next(
            n
            for n, v, m in zip(names, checked.values, checked.within, strict=True)
            if bool((v.isinf() & m).any())
        )
        raise ValueError(f"{op}: weights[{bad!r}]: an element is infinite: it has no PQ index")
    return sizes.tolist(), indices.tolist()
