"""torch's pooling and normalization layers, taught to keep the batch innermost.

Same parameters, buffers, results and ``state_dict`` as torch's own; they only look at how the input
is stored (see :mod:`fastprune.ops.layout`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from fastprune.ops import layout
from fastprune.ops.pattern import below_autograd


class Apply(nn.Module):
    """A function as a layer."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the function returns."""
        return self.function(*args, **kwargs)

    def extra_repr(self) -> str:
        """The function's name."""
        return str(self.function.__name__)


class MaxPool2d(nn.MaxPool2d):
    """``nn.MaxPool2d`` in the layout of its input."""

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, C, out height, out width)."""
        return super().forward(x) if self.return_indices else layout.pool(super().forward, x)


class AvgPool2d(nn.AvgPool2d):
    """``nn.AvgPool2d`` in the layout of its input."""

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, C, out height, out width)."""
        return layout.pool(super().forward, x)


class AdaptiveAvgPool2d(nn.AdaptiveAvgPool2d):
    """``nn.AdaptiveAvgPool2d`` in the layout of its input."""

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, C, out height, out width)."""
        return layout.pool(super().forward, x)


def versions(tensors: Iterable[Tensor | None]) -> tuple[Any, ...] | None:
    """What changes when one of the tensors is replaced or changed in place; None: not known."""
    try:
        return tuple((id(t), t._version) if t is not None else None for t in tensors)
    except RuntimeError:  # inference tensors count no changes
        return None


def scale_and_shift(norm: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """What a BatchNorm multiplies by and adds in evaluation mode, per channel, in float64."""
    assert norm.running_mean is not None
    assert norm.running_var is not None
    scale = (norm.running_var.double() + norm.eps).rsqrt()
    if norm.weight is not None:
        scale = scale * norm.weight.detach().double()
    shift = -norm.running_mean.double() * scale
    if norm.bias is not None:
        shift = shift + norm.bias.detach().double()
    return scale, shift


class _Normalize(torch.autograd.Function):
    """Batch statistics, normalization and ReLU: (y, mean, biased variance)."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, relu: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        with below_autograd():  # the result is no view: it may be changed in place
            y, mean, variance, invstd = torch.ops.fastprune.batch_norm(x, weight, bias, eps, relu)
        ctx.save_for_backward(x, weight, bias, mean, invstd)
        ctx.relu = relu
        ctx.mark_non_differentiable(mean, variance)
        return y, mean, variance

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, mean, invstd = ctx.saved_tensors
        x_grad, weight_grad, bias_grad = torch.ops.fastprune.batch_norm_grad(
            grad, x, weight, bias, mean, invstd, ctx.relu
        )
        return (
            x_grad,
            None if weight is None else weight_grad,
            None if bias is None else bias_grad,
            None,
            None,
        )


class BatchNorm2d(nn.BatchNorm2d):
    """``nn.BatchNorm2d`` in the layout of its input, with a ReLU where one was fused.

    Training makes one pass from memory forward and one back, the others over one channel in the
    cache; differentiable once. Evaluation without gradients is one scale and shift per channel,
    kept until a parameter or statistic is changed in place or replaced.
    """

    # Set where a ReLU that follows was fused into the layer.
    fused_relu = False
    _kept: tuple[Any, Tensor, Tensor] | None = None

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> the same."""
        if self._is_affine(x):
            return self._affine(x)
        if self.training and self._is_plain(x):
            return self._normalize(x)
        if layout.is_batch_last(x):  # to torch, one image per channel
            n, c, h, w = x.shape
            y = super().forward(x.permute(1, 2, 3, 0).reshape(1, c, h * w * n, 1))
            y = y.view(c, h, w, n).permute(3, 0, 1, 2)
        else:
            y = super().forward(x)
        return torch.relu(y) if self.fused_relu else y

    def train(self, mode: bool = True) -> BatchNorm2d:
        """As ``nn.Module.train``; what was kept is forgotten."""
        self._kept = None
        return super().train(mode)

    def _is_affine(self, x: Tensor) -> bool:
        return (
            not self.training
            and self.running_mean is not None
            and x.dim() == 4
            and x.device.type == "cpu"
            and x.dtype == self.running_mean.dtype
            and not (torch.is_grad_enabled() and (x.requires_grad or self.affine))
            and not torch.compiler.is_compiling()
        )

    def _is_plain(self, x: Tensor) -> bool:
        kind = torch.float64 if x.dtype == torch.float64 else torch.float32
        return (
            x.dim() == 4
            and x.device.type == "cpu"
            and x.is_floating_point()
            and x.shape[1] == self.num_features
            and x.numel() > x.shape[1]  # torch's own error where a channel has one value
            and all(t is None or t.dtype == kind for t in (self.weight, self.bias))
            and (self.running_mean is None or self.running_mean.dtype == kind)
            and not torch.compiler.is_compiling()
        )

    def _normalize(self, x: Tensor) -> Tensor:
        y, mean, variance = _Normalize.apply(x, self.weight, self.bias, self.eps, self.fused_relu)
        if self.track_running_stats and self.running_mean is not None:
            assert self.running_var is not None
            assert self.num_batches_tracked is not None
            self.num_batches_tracked.add_(1)
            momentum = self.momentum
            if momentum is None:  # the mean of all batches
                momentum = 1.0 / float(self.num_batches_tracked)
            count = x.numel() // x.shape[1]
            with torch.no_grad():
                self.running_mean.lerp_(mean, momentum)
                self.running_var.lerp_(variance * (count / (count - 1)), momentum)
        return y  # type: ignore[no-any-return]

    def _affine(self, x: Tensor) -> Tensor:
        now = versions((self.running_mean, self.running_var, self.weight, self.bias))
        kept = self._kept
        if kept is None or now is None or kept[0] != now:
            scale, shift = scale_and_shift(self)
            kind = torch.float64 if x.dtype == torch.float64 else torch.float32
            kept = self._kept = (now, scale.to(kind), shift.to(kind))
        y: Tensor = torch.ops.fastprune.channel_affine(x, kept[1], kept[2], self.fused_relu)
        return y


_TAUGHT = {
    nn.MaxPool2d: MaxPool2d,
    nn.AvgPool2d: AvgPool2d,
    nn.AdaptiveAvgPool2d: AdaptiveAvgPool2d,
    nn.BatchNorm2d: BatchNorm2d,
}


def understand_batch_last_(model: nn.Module) -> None:
    """Turn the pooling and normalization layers of a model into those above, in place.

    Exact types only: a subclass may compute something else.
    """
    for module in model.modules():
        taught = _TAUGHT.get(type(module))
        if taught is not None:
            module.__class__ = taught


def forget_batch_last_(model: nn.Module) -> None:
    """The inverse of :func:`understand_batch_last_`, but for layers with a fused ReLU."""
    own = {taught: kind for kind, taught in _TAUGHT.items()}
    for module in model.modules():
        kind = own.get(type(module))
        if kind is not None and not getattr(module, "fused_relu", False):
            module.__dict__.pop("_kept", None)
            module.__dict__.pop("fused_relu", None)
            module.__class__ = kind


@torch.library.register_fake("fastprune::batch_norm")
def _(x: Tensor, weight: Any, bias: Any, eps: float, relu: bool) -> tuple[Tensor, ...]:
    kind = torch.float64 if x.dtype == torch.float64 else torch.float32
    return (torch.empty_like(x), *(x.new_empty(x.shape[1], dtype=kind) for _ in range(3)))


@torch.library.register_fake("fastprune::batch_norm_grad")
def _(
    y_grad: Tensor, x: Tensor, weight: Any, bias: Any, mean: Tensor, *_: Any
) -> tuple[Tensor, ...]:
    return torch.empty_like(x), torch.empty_like(mean), torch.empty_like(mean)
