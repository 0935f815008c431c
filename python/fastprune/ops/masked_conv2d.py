"""2-d convolution with an unstructured mask on its weight."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastprune import reference
from fastprune.ops.backend import has_kernel
from fastprune.ops.layout import is_batch_last
from fastprune.ops.pattern import (
    Pattern,
    as_pattern,
    autocast,
    below_autograd,
    check_operands,
    check_weight_grad,
    needs_grad,
    recorder,
)
from fastprune.ops.plan import LIKE_INPUT, READ_ANEW, planned

Size2 = int | tuple[int, int] | list[int]


def pair(name: str, value: Size2, least: int) -> tuple[int, int]:
    """(height, width) from an int or two ints, each at least ``least``."""
    both = (value, value) if isinstance(value, int) else tuple(value)
    if len(both) != 2 or any(not isinstance(v, int) or v < least for v in both):
        raise ValueError(
            f"masked_conv2d: {name}: expected an int or two ints of at least {least}, got {value!r}"
        )
    return both


def masked_conv2d(
    x: Tensor,
    weight: Tensor,
    mask: Tensor | Pattern,
    bias: Tensor | None = None,
    stride: Size2 = 1,
    padding: Size2 = 0,
    dilation: Size2 = 1,
    groups: int = 1,
    *,
    weight_grad: Literal["sampled", "dense"] = "sampled",
) -> Tensor:
    r"""2-d convolution of which only the weights under ``mask`` exist.

    As ``torch.nn.functional.conv2d`` with the weight W * M; a weight outside the mask is absent (a
    NaN or infinity that only it would have read does not reach the output).

    Args:
        x: (batch, in, height, width) or (in, height, width); float32, float64, bfloat16 or
            float16. Any strides; channels_last is read through a copy.
        weight: (out, in / groups, kernel height, kernel width), dtype and device of ``x``.
        mask: bool tensor shaped like ``weight``, True where kept, or the :class:`Pattern` that
            ``fastprune.pack(mask, groups=groups)`` made of it. A tensor is packed at every call.
        bias: (out,) or None.
        stride, padding, dilation: ints or (height, width), in pixels; padding is zeros.
        groups: any divisor of in and out; groups = in is a depthwise convolution.
        weight_grad: ``"sampled"`` at the mask or ``"dense"``, as in
            :func:`fastprune.masked_linear`.
    Returns:
        (batch, out, height, width), contiguous, in the dtype of ``x``; bfloat16 and float16 are
        accumulated in float32 and rounded once. The same bits for any number of threads.
    Raises:
        TypeError: a dtype is unsupported or differs between arguments, or ``mask`` is neither.
        ValueError: shapes, devices or the geometry do not fit; the message names the argument.
    Cost: 2 * nnz * batch * output pixels flops; each input pixel is packed once per block of
    channels and row strip. Differentiable once. A build without CUDA kernels runs the
    plain-torch reference there.
    """
    given = weight
    x, weight, bias = autocast(x, weight, bias)
    check_operands("masked_conv2d", x, weight, bias)
    dense_grad = check_weight_grad("masked_conv2d", weight_grad)
    if weight.dim() != 4:
        raise ValueError(
            f"masked_conv2d: weight: expected 4 dimensions, got shape {tuple(weight.shape)}"
        )
    if groups < 1 or weight.shape[0] % groups:
        raise ValueError(
            f"masked_conv2d: groups: expected a positive divisor of the {weight.shape[0]} output "
            f"channels, got {groups}"
        )
    geometry = (
        pair("stride", stride, 1),
        pair("padding", padding, 0),
        pair("dilation", dilation, 1),
    )
    if x.dim() not in (3, 4) or x.shape[-3] != weight.shape[1] * groups:
        raise ValueError(
            f"masked_conv2d: x: expected shape (batch, {weight.shape[1] * groups}, height, width), "
            f"got {tuple(x.shape)}"
        )
    check_room(x, weight, geometry[1], geometry[2])
    pattern = as_pattern(mask, weight, groups)
    kept = weight is given
    return apply_conv2d(x, weight, bias, pattern, *geometry, groups, dense_grad, kept=kept)


def check_room(
    x: Tensor, weight: Tensor, padding: tuple[int, int], dilation: tuple[int, int]
) -> None:
    """The padded input must hold the dilated kernel once."""
    height, width = x.shape[-2:]
    spans = weight.shape[2] - 1, weight.shape[3] - 1
    if (
        0 < height >= dilation[0] * spans[0] + 1 - 2 * padding[0]
        and 0 < width >= dilation[1] * spans[1] + 1 - 2 * padding[1]
    ):
        return
    for axis in (0, 1):
        room = x.shape[axis - 2] + 2 * padding[axis]
        span = dilation[axis] * (weight.shape[axis + 2] - 1) + 1
        if room < span or x.shape[axis - 2] < 1:
            raise ValueError(
                f"masked_conv2d: x: expected a padded {('height', 'width')[axis]} of at least "
                f"{span}, got {room}"
            )


def apply_conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    pattern: Pattern,
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
    groups: int,
    dense_weight_grad: bool,
    layout: int = LIKE_INPUT,
    kept: bool = True,
    residual: Tensor | None = None,
    relu: bool = False,
) -> Tensor:
    """The op on arguments that are known to fit: what the layer calls in its forward pass.

    ``kept``: ``weight`` is the caller's own tensor, whose values may be kept for the next call.
    ``residual`` is added to the result and ReLU applied, without a gradient (inference only).
    """
    images = x if x.dim() == 4 else x.unsqueeze(0)
    geometry = (stride, padding, dilation, groups)
    y: Tensor
    if planned(x, weight, pattern):
        assert pattern.plan is not None
        number = pattern.plan.number(pattern)
        recorded = needs_grad(x, weight, bias)
        training = recorded and weight.requires_grad
        version = pattern.plan.version(weight, training) if kept else -1
        if recorded:
            y = PlannedConv2dFunction.apply(
                images, weight, bias, pattern, number, version, geometry, dense_weight_grad, layout
            )
        else:
            y = torch.ops.fastprune.planned_conv2d.default(
                images, weight, bias, number, version, *geometry, residual, relu, layout
            )
            residual, relu = None, False
    else:
        y = recorder(MaskedConv2dFunction, torch.ops.fastprune.masked_conv2d)(
            images,
            weight,
            bias,
            pattern.row_ptr,
            pattern.offset,
            pattern.transposed_row_ptr,
            pattern.transposed_offset,
            pattern.block_depth,
            pattern.transposed_block_depth,
            *geometry,
            dense_weight_grad,
        )
    if residual is not None:
        y = y + residual
    if relu:
        y = torch.relu(y)
    return y if x.dim() == 4 else y.squeeze(0)


class PlannedConv2dFunction(torch.autograd.Function):
    """The convolution of a plan, with its gradients."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        pattern: Pattern,
        number: int,
        version: int,
        geometry: tuple[Any, ...],
        dense_weight_grad: bool,
        layout: int,
    ) -> Tensor:
        """The op itself; autograd is off here."""
        ctx.save_for_backward(x, weight)
        ctx.pattern = pattern  # keeps the plan alive
        read = version | READ_ANEW if version >= 0 and weight.requires_grad else version
        ctx.number, ctx.version, ctx.geometry = number, version, geometry
        ctx.dense_weight_grad = dense_weight_grad
        with below_autograd():
            y: Tensor = torch.ops.fastprune.planned_conv2d.default(
                x, weight, bias, number, read, *geometry, None, False, layout
            )
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of x, weight and bias."""
        x, weight = ctx.saved_tensors
        ops = torch.ops.fastprune
        x_grad = weight_grad = bias_grad = None
        if ctx.needs_input_grad[0]:
            x_grad = ops.planned_conv2d_input_grad.default(
                grad, weight, ctx.number, ctx.version, x.shape, *ctx.geometry
            )
        if ctx.needs_input_grad[1]:
            weight_grad = (
                _dense_weight_grad(grad, x, weight, *ctx.geometry)
                if ctx.dense_weight_grad
                else ops.planned_conv2d_weight_grad.default(
                    grad, x, ctx.number, weight.shape, *ctx.geometry
                )
            )
        if ctx.needs_input_grad[2]:
            bias_grad = grad.sum(dim=(0, 2, 3))
        return (x_grad, weight_grad, bias_grad, *[None] * 6)


@torch.library.register_fake("fastprune::masked_conv2d")
def _(x: Tensor, weight: Tensor, bias: Tensor | None, *rest: Any) -> Tensor:
    stride, padding, dilation = rest[6:9]
    out = [
        (x.shape[i + 2] + 2 * padding[i] - dilation[i] * (weight.shape[i + 2] - 1) - 1) // stride[i]
        + 1
        for i in (0, 1)
    ]
    return x.new_empty(x.shape[0], weight.shape[0], *out)


@torch.library.register_fake("fastprune::masked_conv2d_input_grad")
def _(grad: Tensor, weight: Tensor, *rest: Any) -> Tensor:
    return grad.new_empty(rest[6])  # x_sizes


@torch.library.register_fake("fastprune::masked_conv2d_weight_grad")
def _(grad: Tensor, x: Tensor, row_ptr: Tensor, offset: Tensor, *rest: Any) -> Tensor:
    return x.new_empty(rest[1])  # weight_sizes


@torch.library.register_fake("fastprune::conv_weight_grad")
def _(grad: Tensor, x: Tensor, weight_sizes: Any, *_: Any) -> Tensor:
    return x.new_empty(weight_sizes)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, bias, *pattern = inputs[:7]
    ctx.save_for_backward(x, weight, *pattern)
    ctx.blocks = inputs[7:9]
    ctx.geometry = inputs[9:13]
    ctx.dense_weight_grad = inputs[13]
    ctx.has_bias = bias is not None


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, *pattern = ctx.saved_tensors
    x_grad = weight_grad = bias_grad = None
    if ctx.needs_input_grad[0]:
        x_grad = torch.ops.fastprune.masked_conv2d_input_grad(
            grad, weight, *pattern, *ctx.blocks, x.shape, *ctx.geometry
        )
    if ctx.needs_input_grad[1]:
        if ctx.dense_weight_grad:
            weight_grad = _dense_weight_grad(grad, x, weight, *ctx.geometry)
        else:
            weight_grad = torch.ops.fastprune.masked_conv2d_weight_grad(
                grad, x, pattern[0], pattern[1], ctx.blocks[0], weight.shape, *ctx.geometry
            )
    if ctx.has_bias and ctx.needs_input_grad[2]:
        bias_grad = grad.sum(dim=(0, 2, 3))
    return (x_grad, weight_grad, bias_grad, *[None] * 11)


def _dense_weight_grad(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
) -> Tensor:
    # Nothing of the pattern enters this gradient. torch's kernels would convert both tensors.
    innermost = is_batch_last(grad) or is_batch_last(x)
    if innermost and x.device.type == "cpu" and x.dtype in (torch.float32, torch.float64):
        return torch.ops.fastprune.conv_weight_grad(  # type: ignore[no-any-return]
            grad, x, weight.shape, stride, padding, dilation, groups
        )
    wanted = [False, True, False]
    return torch.ops.aten.convolution_backward(  # type: ignore[no-any-return]
        grad, x, weight, None, stride, padding, dilation, False, [0, 0], groups, wanted
    )[1]


torch.library.register_autograd("fastprune::masked_conv2d", _backward, setup_context=_setup_context)


class MaskedConv2dFunction(torch.autograd.Function):
    """The op with the same formula, recorded directly: a third of the cost of a small call."""

    # No setup_context method: with one, every call binds its arguments through inspect.signature.
    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        """The op itself; autograd is off here."""
        with below_autograd():
            y: Tensor = torch.ops.fastprune.masked_conv2d(*inputs)
        _setup_context(ctx, inputs, y)
        return y

    backward = staticmethod(once_differentiable(_backward))  # type: ignore[assignment]


# In a build without CUDA kernels the oracle runs on CUDA tensors.


def on_cuda(x: Tensor, weight: Tensor, bias: Tensor | None, *rest: Any) -> Tensor:
    """The op's arguments, by the oracle."""
    row_ptr, offset, _, _, block, _, *geometry, _ = rest
    mask = reference.unpack(row_ptr, offset, tuple(weight.shape), block)
    return reference.masked_conv2d(x, weight, mask, bias, *geometry)


def input_grad_on_cuda(grad: Tensor, weight: Tensor, *rest: Any) -> Tensor:
    """Likewise, the gradient of x."""
    row_ptr, offset, _, _, block, _, x_sizes, *geometry = rest
    mask = reference.unpack(row_ptr, offset, tuple(weight.shape), block)
    return reference.masked_conv2d_input_grad(grad, weight, mask, x_sizes, *geometry)


def weight_grad_on_cuda(
    grad: Tensor, x: Tensor, row_ptr: Tensor, offset: Tensor, *rest: Any
) -> Tensor:
    """Likewise, the gradient of the weight at the mask."""
    block, weight_sizes, *geometry = rest
    mask = reference.unpack(row_ptr, offset, tuple(weight_sizes), block)
    return reference.masked_conv2d_weight_grad(grad, x, mask, *geometry)


if not has_kernel("masked_conv2d", "cuda"):
    torch.library.register_kernel("fastprune::masked_conv2d", "cuda", on_cuda)
    torch.library.register_kernel("fastprune::masked_conv2d_input_grad", "cuda", input_grad_on_cuda)
    torch.library.register_kernel(
        "fastprune::masked_conv2d_weight_grad", "cuda", weight_grad_on_cuda
    )
