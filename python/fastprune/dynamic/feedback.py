"""Training dense weights through any compressor: DPF with something else than a mask."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from fastprune.checks import whole
from fastprune.dynamic.layers import all_but_last_linear
from fastprune.ops.tensor_statistics import tensor_statistics
from fastprune.pruners.targets import Selection

Compressor: TypeAlias = Callable[[Tensor], Tensor]


class CompressionError(NamedTuple):
    """The error of a compressor after some steps.

    Attributes:
        step: training steps done before.
        error: delta = |w - C(w)|^2 / |w|^2 of all compressed weights together (paper 001, eq. 1).
    """

    step: int
    error: float


class FeedbackCompression:
    r"""Train dense weights w through a compressor C: the model computes with C(w).

    The gradient taken at C(w) updates w, whole, as if C were the identity:

    .. math:: w_{t+1} = w_t - \gamma_t g(C(w_t))

    With C(w) = sign(w) this is BinaryConnect; for C = a mask of the largest weights that changes
    now and then :class:`DPF` is the same and runs sparse kernels. ::

        training = fp.FeedbackCompression(model, lambda w: w.sign() * w.abs().mean())
        for x, y in loader:
            loss(model(x), y).backward()
            optimizer.step()
            optimizer.zero_grad()
            training.step()
        training.finish()

    The weights are parametrized (:mod:`torch.nn.utils.parametrize`) until :meth:`finish`. The
    Parameters stay the same objects, so an optimizer made before or after serves; meanwhile their
    names, their order and the keys of ``state_dict()`` are those of a parametrized model
    (``layer.parametrizations.weight.original``).

    Args:
        model: changed in place. The last linear layer, biases and normalization stay as they are.
        compressor: from a weight to a tensor of its shape, dtype and device. Called on every weight
            in every forward pass, without gradients, on a tensor that shares the weight's memory:
            it must not change it. It may be random.
        every: steps between records of the error.
        include, exclude: which weights are compressed; :func:`fastprune.pruners.prunable`.
            ``include`` overrides that the last linear layer stays as it is.
    Attributes:
        steps: training steps done, calls of :meth:`step`.
        history: one :class:`CompressionError` per record, that before the first step included.
    Raises:
        ValueError: no weights are compressible; the compressor returns another shape, dtype or
            device: then the model is as it was; a weight is NaN.
        TypeError: the compressor is not callable or returns no tensor.

    Cost: C of every weight per forward pass; a record is another C and three reads of the weights.
    Paper: Lin et al. 2020, *Dynamic Model Pruning with Feedback*, section 4, "Extension to other
    compression schemes"; Courbariaux et al. 2015, *BinaryConnect*, without its clipping of w to
    [-1, 1].
    """

    def __init__(
        self,
        model: nn.Module,
        compressor: Compressor,
        every: int = 16,
        *,
        include: Selection = None,
        exclude: Selection = None,
    ) -> None:
        if not callable(compressor):
            raise TypeError(f"compressor: expected a function, got {type(compressor).__name__}")
        self.every = whole(every, "every", 1, None)
        self.model = model
        self.compressor = compressor
        self.steps = 0
        self._finished = False
        self._weights = all_but_last_linear(model, include, exclude)
        self.history = [CompressionError(0, self.error())]
        chosen = {id(w) for w in self._weights.values()}
        self._places: list[tuple[nn.Module, str]] = [
            (layer, attribute)
            for layer in model.modules()
            for attribute, p in layer._parameters.items()
            if id(p) in chosen
        ]
        self._orders = [(layer, list(layer._parameters)) for layer, _ in self._places]
        for layer, attribute in self._places:
            # The compressor has been seen to keep shape and dtype.
            parametrize.register_parametrization(
                layer, attribute, _Compressed(compressor), unsafe=True
            )

    def step(self) -> CompressionError | None:
        """Count one training step, after the optimizer's, and record the error if it is time.

        Returns:
            The record, also kept in ``history``; None between records.
        Raises:
            RuntimeError: after :meth:`finish`.
        """
        if self._finished:
            raise RuntimeError(f"{type(self).__name__}: step() after finish()")
        self.steps += 1
        if self.steps % self.every:
            return None
        self.history.append(CompressionError(self.steps, self.error()))
        return self.history[-1]

    @torch.no_grad()
    def error(self) -> float:
        """delta = |w - C(w)|^2 / |w|^2 now, in float64; 0.0 where all weights are 0."""
        names = list(self._weights)
        values = [w.detach() for w in self._weights.values()]
        lost = [
            w - _compressed(w, self.compressor, f" of {n}")
            for n, w in zip(names, values, strict=True)
        ]
        powers = []
        for tensors in (lost, values):
            total = tensor_statistics(tensors, p=(2.0,), names=names).total
            assert total is not None
            powers.append(float(total.power_sums))
        return powers[0] / powers[1] if powers[1] > 0 else 0.0

    def finish(self) -> None:
        """Store C(w) in the weights and make the layers plain again; a second call does nothing.

        A weight that several layers share is compressed once.
        """
        if self._finished:
            return
        with torch.no_grad():
            new = {
                n: _compressed(w.detach(), self.compressor, "") for n, w in self._weights.items()
            }
            for name, w in self._weights.items():
                w.copy_(new[name])
        for layer, attribute in self._places:
            parametrize.remove_parametrizations(layer, attribute, leave_parametrized=False)
        for layer, order in self._orders:
            for attribute in order:  # a parametrization has moved its weight behind the bias
                layer._parameters[attribute] = layer._parameters.pop(attribute)
        self._finished = True

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}(step {self.steps}, {len(self._weights)} weights, "
            f"error {self.history[-1].error:.4g} at step {self.history[-1].step})"
        )


class _Compressed(nn.Module):
    """C as a parametrization."""

    def __init__(self, compressor: Compressor) -> None:
        super().__init__()
        # In a tuple: a compressor that is a module must not become a part of the model.
        self._compressor = (compressor,)

    def forward(self, weight: Tensor) -> Tensor:
        result: Tensor = _StraightThrough.apply(weight, self._compressor[0])
        return result


class _StraightThrough(torch.autograd.Function):
    """C(w) forward, the whole gradient to w backward."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, compressor: Compressor) -> Tensor:
        return _compressed(weight.detach(), compressor, "")

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


def _compressed(weight: Tensor, compressor: Compressor, where: str) -> Tensor:
    result = compressor(weight)
    if not isinstance(result, Tensor):
        raise TypeError(f"compressor: expected a tensor{where}, got {type(result).__name__}")
    expected = (weight.shape, weight.dtype, weight.device)
    if (result.shape, result.dtype, result.device) != expected:
        raise ValueError(
            f"compressor: expected {weight.dtype} of shape {tuple(weight.shape)}{where} on "
            f"{weight.device}, got {result.dtype} of shape {tuple(result.shape)} on {result.device}"
        )
    return result
