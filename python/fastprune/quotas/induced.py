"""The quotas that masks have, and so those that a pruning method induces."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from fastprune.masks import Masks

if TYPE_CHECKING:
    from fastprune.pruners import Pruner


def of(masks: Mapping[str, Tensor]) -> dict[str, float]:
    """The sparsity of every layer of ``masks``, by parameter name.

    As ``quota`` of :func:`fastprune.prune`, it gives any method the layer counts of ``masks``,
    exactly: ``fp.prune(model, "random", quota=fp.quotas.of(masks))`` shuffles the weights that
    ``masks`` keeps within each layer (paper 003, Figure 5).

    Args:
        masks: a :class:`fastprune.Masks` or any mapping of names to bool tensors.
    Returns:
        (n - kept) / n for each mask; 0.0 for an empty tensor.
    Raises:
        TypeError, ValueError: as :class:`fastprune.Masks`.
    """
    return {row.name: row.sparsity for row in Masks.of(masks).summary().rows}


def induced(
    model: nn.Module, method: str | Pruner | type[Pruner], sparsity: float, **arguments: Any
) -> dict[str, float]:
    """The quotas that a pruning method induces: the layer sparsities of its masks.

    ``magnitude`` gives those of global magnitude pruning, ``lamp``, ``snip``, ``grasp``,
    ``synflow`` and the others theirs. Where they empty a layer, its sparsity is 1, against
    Definition 1 of paper 003; :func:`fastprune.prune` warns and names it.

    Args:
        model, method, sparsity: as for :func:`fastprune.prune`.
        arguments: any other argument of :func:`fastprune.prune`.
    Returns:
        Parameter name -> sparsity; see :func:`of`.
    Raises:
        As :func:`fastprune.prune`, whose cost this has.
    Paper: 003, section 4 and Figure 7.
    """
    from fastprune.pruners import prune  # the pruners build on the quotas

    return of(prune(model, method, sparsity, **arguments))
