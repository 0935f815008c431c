"""Other settings for a while, in all equilibrium layers of a model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final

from torch import nn

from fastprune.nn.mon_deq import Activation, MonDEQLayer, Solver
from fastprune.ops.mon_splitting import check_settings
from fastprune.ops.solve_info import OnFailure


class _Kept:
    def __repr__(self) -> str:
        return "as it is"


KEPT: Final = _Kept()


@contextmanager
def equilibrium_settings(
    model: nn.Module,
    *,
    activation: Activation | None = None,
    solver: Solver | None = None,
    alpha: float | _Kept | None = KEPT,
    tol: float | None = None,
    max_iter: int | None = None,
    per_sample: bool | None = None,
    on_failure: OnFailure | None = None,
) -> Iterator[None]:
    """Change all monotone equilibrium layers of a model, and put them back whatever happens.

    Scores of second order need a smooth nonlinearity and close solves. Paper 000 scores GraSP and
    SynFlow at a network of sigmoids (Appendix C), and trains the pruned network with ReLU::

        with fp.nn.equilibrium_settings(model, activation="sigmoid", tol=1e-8, max_iter=1000):
            masks = fp.prune(model, "grasp", 0.9, data=data, loss=loss, include="mon")

    Args:
        model: any module; its layers of :class:`fastprune.nn.MonDEQLinear` and
            :class:`fastprune.nn.MonDEQConv2d` are changed, each once.
        activation, solver, tol, max_iter, per_sample, on_failure: as those layers take them;
            None: as it is.
        alpha: the step; None: one that is safe; left out: as it is.
    Raises:
        ValueError: a value that the layers do not take, or a model without such a layer; nothing is
            changed.
        TypeError: ``model`` is no module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    layers = [m for m in model.modules() if isinstance(m, MonDEQLayer)]
    if not layers:
        raise ValueError("model: it has no monotone equilibrium layer")
    named = {
        "activation": activation,
        "solver": solver,
        "tol": tol,
        "max_iter": max_iter,
        "per_sample": per_sample,
        "on_failure": on_failure,
    }
    new: dict[str, Any] = {name: value for name, value in named.items() if value is not None}
    if not isinstance(alpha, _Kept):
        new["alpha"] = alpha
    if on_failure not in (None, "warn", "error", "ignore"):
        raise ValueError(f"on_failure: expected 'warn', 'error' or 'ignore', got {on_failure!r}")
    for layer in layers:
        checked = {n: new.get(n, getattr(layer, n)) for n in _CHECKED}
        check_settings(**checked)
    before = [{name: getattr(layer, name) for name in new} for layer in layers]
    try:
        for layer in layers:
            for name, value in new.items():
                setattr(layer, name, value)
        yield
    finally:
        for layer, old in zip(layers, before, strict=True):
            for name, value in old.items():
                setattr(layer, name, value)


_CHECKED = ("activation", "solver", "alpha", "tol", "max_iter")
