"""A layer's output that is also its input, marked for those who follow a network's structure.

``torch.export`` cannot record a solve that stops when it has converged. While a graph is made for
:mod:`fastprune.effective`, an equilibrium layer instead applies its cell once, between two marks:
the state that the cell reads, and the place where its result becomes that state.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor

_marking: ContextVar[bool] = ContextVar("marking", default=False)

_library = torch.library.Library("fastprune", "FRAGMENT")
_library.define("feedback_state(Tensor like, SymInt[] shape) -> Tensor")
_library.define("feedback_close(Tensor state, Tensor result) -> Tensor")


@contextmanager
def marking_feedback() -> Iterator[None]:
    """Equilibrium layers that are called here mark their cycle and do not solve."""
    token = _marking.set(True)
    try:
        yield
    finally:
        _marking.reset(token)


def marks_feedback() -> bool:
    """Whether cycles are to be marked."""
    return _marking.get()


def feedback_state(like: Tensor, shape: Sequence[int]) -> Tensor:
    """The state at the start of the cycle: zeros of ``shape``, placed like ``like``."""
    return torch.ops.fastprune.feedback_state(like, list(shape))  # type: ignore[no-any-return]


def feedback_close(state: Tensor, result: Tensor) -> Tensor:
    """``result``, which is also what ``state`` becomes."""
    return torch.ops.fastprune.feedback_close(state, result)  # type: ignore[no-any-return]


@torch.library.impl(_library, "feedback_state", "CompositeExplicitAutograd")
def _state(like: Tensor, shape: Sequence[int]) -> Tensor:
    return like.new_zeros(shape)


@torch.library.impl(_library, "feedback_close", "CompositeExplicitAutograd")
def _close(state: Tensor, result: Tensor) -> Tensor:
    return result.clone()


torch.library.register_fake("fastprune::feedback_state", _state, lib=_library)
torch.library.register_fake("fastprune::feedback_close", _close, lib=_library)
