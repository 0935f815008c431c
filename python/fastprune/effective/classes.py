"""Classes of channels, under their labels: made one by one, tied, or known already."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx

from fastprune.effective.program import Weight

PINNED = 0
"""The class of all that cannot be removed."""


class MismatchError(ValueError):
    """A smaller graph is not the larger one without the removed elements; ``node`` is where."""

    def __init__(self, node: fx.Node | None = None) -> None:
        super().__init__(str(node))
        self.node = node


class Classes:
    """Labels of axes of parameters, and the classes that they have been tied into."""

    def __init__(self) -> None:
        self._parent = [PINNED]
        self._axes: dict[tuple[str, int], Tensor] = {}
        self._table: Tensor | None = None  # label -> class, until the next tie

    def axis(self, name: str, dim: int, size: int) -> Tensor:
        """Labels of the entries along a dimension of a parameter or buffer."""
        key = (name, dim)
        if key not in self._axes:
            first, self._table = len(self._parent), None
            self._parent += range(first, first + size)
            # float64: some operations that move elements take no integers.
            self._axes[key] = torch.arange(first, first + size, dtype=torch.float64)
        return self._axes[key]

    def axes(self) -> dict[tuple[str, int], Tensor]:
        """Classes of the entries along every dimension that a layer gave labels to."""
        return {key: self.of(labels) for key, labels in self._axes.items()}

    def of(self, labels: Tensor) -> Tensor:
        """The classes of labels: int64, the smallest label of each."""
        if self._table is None:
            self._table = torch.tensor([self._find(i) for i in range(len(self._parent))])
        return self._table[_thin(labels).long()].broadcast_to(labels.shape)

    def tie(self, a: Tensor, b: Tensor) -> None:
        """Make one class of the labels at each place of two tensors that broadcast."""
        a, b = torch.broadcast_tensors(a, b)
        # Expanded dimensions repeat themselves: one entry tells all.
        for d in range(a.dim()):
            if a.stride(d) == 0 == b.stride(d) and a.shape[d]:
                a, b = a.narrow(d, 0, 1), b.narrow(d, 0, 1)
        differ = a != b
        self._table = None
        pairs = torch.stack([a[differ], b[differ]], 1).long().unique(dim=0)
        for one, other in pairs.tolist():
            one, other = self._find(one), self._find(other)
            self._parent[max(one, other)] = min(one, other)

    def _find(self, label: int) -> int:
        parent = self._parent
        while parent[label] != label:
            parent[label] = parent[parent[label]]
            label = parent[label]
        return label


class Settled(Classes):
    """Classes that are known: tying what is not one class already is an error."""

    def __init__(self, axes: dict[tuple[str, int], Tensor]) -> None:
        super().__init__()
        self._axes = {key: labels.double() for key, labels in axes.items()}

    def axis(self, name: str, dim: int, size: int) -> Tensor:
        """As there; a size that does not fit is an error."""
        labels = self._axes.get((name, dim))
        if labels is None or len(labels) != size:
            raise MismatchError
        return labels

    def of(self, labels: Tensor) -> Tensor:
        """Labels are classes."""
        return labels.long()

    def tie(self, a: Tensor, b: Tensor) -> None:
        """Compare."""
        if not bool((a == b).all()):
            raise MismatchError


def _thin(labels: Tensor) -> Tensor:
    for d in range(labels.dim()):
        if labels.stride(d) == 0 and labels.shape[d]:
            labels = labels.narrow(d, 0, 1)
    return labels


def pinned(shape: Sequence[int]) -> Tensor:
    """Labels of a tensor of which nothing can be removed; of one entry, whatever its size."""
    return torch.zeros((), dtype=torch.float64).expand(tuple(shape))


def labelled(what: Any) -> list[Any]:
    """The label tensors and weights among (nested) arguments or results."""
    found: list[Any] = []

    def note(a: Any) -> Any:
        if isinstance(a, (Tensor, Weight)):
            found.append(a)
        return a

    fx.node.map_aggregate(what, note)
    return found
