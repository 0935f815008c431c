"""Batches for scoring: what ``data`` may be, and which batches a step sees."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset

Batch: TypeAlias = tuple[Any, Any]


class Batches:
    """The batches of each step.

    Args:
        data: an iterable of (x, y) batches (a list, a ``DataLoader``, a generator) or one pair
            (x, y). x is a tensor, or a list, tuple or dict of tensors for several inputs.
        per_step: batches that one step sees: None for all of ``data`` at every step, n for the
            next n, beginning again when ``data`` ends.

    An iterator can be read only once: with ``per_step=None`` it is read to its end and kept in
    memory, with n it must last for all the steps.
    """

    def __init__(self, data: object, per_step: int | None) -> None:
        self._source = _as_iterable(data)
        self._per_step = per_step
        self._once = isinstance(self._source, Iterator)
        if self._once and per_step is None:
            self._source, self._once = list(self._source), False
        self._running: Iterator[object] | None = None
        self._current: list[object] = []

    def first_input(self) -> Any:
        """x of the first batch; an iterator is read no further."""
        for index, batch in enumerate(self._source):
            return _pair(batch, index)[0]
        raise ValueError("data: no batches")

    def begin_step(self) -> None:
        """Move on to the batches of the next step."""
        if self._per_step is not None:
            self._current = [self._next() for _ in range(self._per_step)]

    def __iter__(self) -> Iterator[Batch]:
        """The batches of the current step; may be iterated several times."""
        source = self._source if self._per_step is None else self._current
        empty = True
        for index, batch in enumerate(source):
            empty = False
            yield _pair(batch, index)
        if empty:
            raise ValueError("data: no batches")

    def _next(self) -> object:
        for _ in range(2):
            if self._running is None:
                self._running = iter(self._source)
            for batch in self._running:
                return batch
            if self._once:
                raise ValueError(
                    "data: the iterator ran out of batches before the last step; give a list or a "
                    "DataLoader, which can begin again"
                )
            self._running = None
        raise ValueError("data: no batches")


def _as_iterable(data: object) -> Iterable[object]:
    if isinstance(data, Dataset) and not isinstance(data, IterableDataset):
        raise TypeError(
            "data: a Dataset gives samples, not batches; wrap it in a torch.utils.data.DataLoader"
        )
    if isinstance(data, (Tensor, str, bytes, Mapping)) or not isinstance(data, Iterable):
        raise TypeError(
            f"data: expected (x, y) batches or one pair (x, y), got {type(data).__name__}"
        )
    one_pair = (
        isinstance(data, Sequence) and len(data) == 2 and any(isinstance(e, Tensor) for e in data)
    )
    return [data] if one_pair else data


def _pair(batch: object, index: int) -> Batch:
    if isinstance(batch, (tuple, list)) and len(batch) == 2:
        return batch[0], batch[1]
    got = f"{len(batch)} entries" if isinstance(batch, (tuple, list)) else type(batch).__name__
    raise ValueError(f"data: batch {index} must be a pair (x, y), got {got}")


def map_tensors(function: Callable[[Tensor], Tensor], value: Any) -> Any:
    """``value`` with ``function`` applied to every tensor in its tuples, lists and dicts."""
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, Mapping):
        return {k: map_tensors(function, v) for k, v in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(map_tensors(function, v) for v in value))
    if isinstance(value, (tuple, list)):
        return type(value)(map_tensors(function, v) for v in value)
    return value


def tensors_in(value: Any) -> list[Tensor]:
    """Every tensor in ``value`` and its tuples, lists and dicts, in order."""
    found: list[Tensor] = []

    def collect(t: Tensor) -> Tensor:
        found.append(t)
        return t

    map_tensors(collect, value)
    return found


def batch_size(x: Any) -> int:
    """Samples in a batch: the first size of the first tensor of x."""
    found = tensors_in(x)
    if not found or found[0].dim() == 0:
        raise ValueError("data: x holds no tensor with a batch dimension")
    if found[0].shape[0] == 0:
        raise ValueError(f"data: a batch is empty: x has shape {tuple(found[0].shape)}")
    return found[0].shape[0]


def call_arguments(x: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """How a model is called: ``model(x)``, ``model(*x)`` for a list or tuple, ``model(**x)``."""
    if isinstance(x, Mapping):
        return (), dict(x)
    if isinstance(x, (tuple, list)):
        return tuple(x), {}
    return (x,), {}


def prepared(value: Any, device: torch.device, dtype: torch.dtype | None) -> Any:
    """``value`` on ``device``, floating tensors in ``dtype``, ready to be saved for backward."""

    def move(t: Tensor) -> Tensor:
        wide = dtype if dtype is not None and t.is_floating_point() else t.dtype
        t = t.to(device, wide)
        return t.clone() if t.is_inference() else t

    return map_tensors(move, value)
