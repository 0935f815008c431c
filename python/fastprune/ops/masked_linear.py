"""Linear layer with an unstructured mask: y = x (W * M)^T + b."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastprune import reference
from fastprune.ops.backend import has_kernel
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
from fastprune.ops.plan import LIKE_INPUT, READ_ANEW, planned, tf32


def masked_linear(
    x: Tensor,
    weight: Tensor,
    mask: Tensor | Pattern,
    bias: Tensor | None = None,
    *,
    weight_grad: Literal["sampled", "dense"] = "sampled",
) -> Tensor:
    r"""Apply a linear layer of which only the weights under ``mask`` exist: y = x (W * M)^T + b.

    A weight outside the mask is absent: a NaN or infinity stored there, or in an activation that
    only absent weights read, does not reach the output.

    Args:
        x: activations (..., in); float32, float64, bfloat16 or float16, any strides.
        weight: (out, in), dense storage, dtype and device of ``x``.
        mask: bool tensor (out, in), True where kept, or the :class:`Pattern` that
            :func:`fastprune.pack` made of it. A tensor is packed at every call; pack once when
            the mask stays.
        bias: (out,) or None.
        weight_grad: ``"sampled"``: the gradient of ``weight`` is computed at the mask only and is
            zero elsewhere (training with a fixed mask). ``"dense"``: it is the full x^T grad,
            the gradient taken at the pruned weight, as methods that keep a dense weight need
            (dynamic pruning with feedback: Lin et al. 2020, Algorithm 1).
    Returns:
        (..., out) in the dtype of ``x``. bfloat16 and float16 are accumulated in float32 and
        rounded once. The same bits for any number of threads; the order in which a sum is made
        depends on dtype, density and the number of rows of ``x``.
    Raises:
        TypeError: a dtype is unsupported or differs between arguments, or ``mask`` is neither.
        ValueError: shapes or devices do not fit; the message names the argument.
    Cost: 2 * nnz * batch flops; reads the kept weights once per 64 rows of ``x``. An autocast
    region casts the arguments as it does for ``torch.nn.functional.linear``. Differentiable once.
    A build without CUDA kernels runs the plain-torch reference there.
    """
    given = weight
    x, weight, bias = autocast(x, weight, bias)
    check_operands("masked_linear", x, weight, bias)
    dense_grad = check_weight_grad("masked_linear", weight_grad)
    if weight.dim() != 2:
        raise ValueError(
            f"masked_linear: weight: expected 2 dimensions, got shape {tuple(weight.shape)}"
        )
    if x.dim() < 1 or x.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"masked_linear: x: expected shape (..., {weight.shape[1]}), got {tuple(x.shape)}"
        )
    pattern = as_pattern(mask, weight)
    return apply_linear(x, weight, bias, pattern, dense_grad, kept=weight is given)


def apply_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    pattern: Pattern,
    dense_weight_grad: bool,
    layout: int = LIKE_INPUT,
    kept: bool = True,
) -> Tensor:
    """The op on arguments that are known to fit: what the layer calls in its forward pass.

    ``kept``: ``weight`` is the caller's own tensor, whose values may be kept for the next call.
    """
    flat = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
    y: Tensor
    if planned(x, weight, pattern):
        assert pattern.plan is not None
        number = pattern.plan.number(pattern)
        recorded = needs_grad(x, weight, bias)
        training = recorded and weight.requires_grad
        version = pattern.plan.version(weight, training) if kept else -1
        if recorded:
            y = PlannedLinearFunction.apply(
                flat, weight, bias, pattern, number, version, dense_weight_grad, layout
            )
        else:
            y = torch.ops.fastprune.planned_linear.default(
                flat, weight, bias, number, version, None, False, layout, tf32(x)
            )
    else:
        y = recorder(MaskedLinearFunction, torch.ops.fastprune.masked_linear)(
            flat,
            weight,
            bias,
            pattern.row_ptr,
            pattern.offset,
            pattern.transposed_row_ptr,
            pattern.transposed_offset,
            pattern.block_depth,
            pattern.transposed_block_depth,
            dense_weight_grad,
        )
    return y if x.dim() == 2 else y.reshape(*x.shape[:-1], weight.shape[0])


class PlannedLinearFunction(torch.autograd.Function):
    """The product of a plan, with its gradients."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        pattern: Pattern,
        number: int,
        version: int,
        dense_weight_grad: bool,
        layout: int,
    ) -> Tensor:
        """The op itself; autograd is off here."""
        ctx.save_for_backward(x, weight)
        ctx.pattern = pattern  # keeps the plan alive
        read = version | READ_ANEW if version >= 0 and weight.requires_grad else version
        ctx.number, ctx.version, ctx.dense_weight_grad = number, version, dense_weight_grad
        ctx.tf32 = tf32(x)
        with below_autograd():
            y: Tensor = torch.ops.fastprune.planned_linear.default(
                x, weight, bias, number, read, None, False, layout, ctx.tf32
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
            x_grad = ops.planned_linear_input_grad.default(
                grad, weight, ctx.number, ctx.version, ctx.tf32
            )
        if ctx.needs_input_grad[1]:
            weight_grad = (
                grad.t() @ x
                if ctx.dense_weight_grad
                else ops.planned_linear_weight_grad.default(grad, x, ctx.number, ctx.tf32)
            )
        if ctx.needs_input_grad[2]:
            bias_grad = grad.sum(dim=0)
        return x_grad, weight_grad, bias_grad, None, None, None, None, None


@torch.library.register_fake("fastprune::masked_linear")
def _(x: Tensor, weight: Tensor, *_rest: Any) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[0])


@torch.library.register_fake("fastprune::masked_linear_input_grad")
def _(grad: Tensor, weight: Tensor, *_rest: Any) -> Tensor:
    return grad.new_empty(grad.shape[0], weight.shape[1])


@torch.library.register_fake("fastprune::masked_linear_weight_grad")
def _(grad: Tensor, x: Tensor, *_rest: Any) -> Tensor:
    return x.new_empty(grad.shape[1], x.shape[1])


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, bias, *pattern, block, block_t, dense_weight_grad = inputs
    ctx.save_for_backward(x, weight, *pattern)
    ctx.blocks = block, block_t
    ctx.dense_weight_grad = dense_weight_grad
    ctx.has_bias = bias is not None


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, *pattern = ctx.saved_tensors
    row_ptr, offset, _, _ = pattern
    x_grad = weight_grad = bias_grad = None
    if ctx.needs_input_grad[0]:
        x_grad = torch.ops.fastprune.masked_linear_input_grad(grad, weight, *pattern, *ctx.blocks)
    if ctx.needs_input_grad[1]:
        if ctx.dense_weight_grad:
            weight_grad = grad.t() @ x
        else:
            weight_grad = torch.ops.fastprune.masked_linear_weight_grad(
                grad, x, row_ptr, offset, ctx.blocks[0], tf32(x)
            )
    if ctx.has_bias and ctx.needs_input_grad[2]:
        bias_grad = grad.sum(dim=0)
    return (x_grad, weight_grad, bias_grad, *[None] * 7)


torch.library.register_autograd("fastprune::masked_linear", _backward, setup_context=_setup_context)


class MaskedLinearFunction(torch.autograd.Function):
    """The op with the same formula, recorded directly: a third of the cost of a small call."""

    # No setup_context method: with one, every call binds its arguments through inspect.signature.
    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        """The op itself; autograd is off here."""
        with below_autograd():
            y: Tensor = torch.ops.fastprune.masked_linear(*inputs)
        _setup_context(ctx, inputs, y)
        return y

    backward = staticmethod(once_differentiable(_backward))  # type: ignore[assignment]


# In a build without CUDA kernels the oracle runs on CUDA tensors.


def on_cuda(x: Tensor, weight: Tensor, bias: Tensor | None, *rest: Any) -> Tensor:
    """The op's arguments, by the oracle."""
    row_ptr, offset, _, _, block, _, _ = rest
    mask = reference.unpack(row_ptr, offset, tuple(weight.shape), block)
    return reference.masked_linear(x, weight, mask, bias)


def input_grad_on_cuda(grad: Tensor, weight: Tensor, *rest: Any) -> Tensor:
    """Likewise, the gradient of x."""
    row_ptr, offset, _, _, block, _ = rest
    mask = reference.unpack(row_ptr, offset, tuple(weight.shape), block)
    return reference.masked_linear_input_grad(grad, weight, mask)


def weight_grad_on_cuda(
    grad: Tensor, x: Tensor, row_ptr: Tensor, offset: Tensor, block: int, _tf32: bool = False
) -> Tensor:
    """Likewise, the gradient of the weight at the mask; torch itself knows of TF32."""
    mask = reference.unpack(row_ptr, offset, (grad.shape[1], x.shape[1]), block)
    return reference.masked_linear_weight_grad(grad, x, mask)


if not has_kernel("masked_linear", "cuda"):
    torch.library.register_kernel("fastprune::masked_linear", "cuda", on_cuda)
    torch.library.register_kernel("fastprune::masked_linear_input_grad", "cuda", input_grad_on_cuda)
    torch.library.register_kernel(
        "fastprune::masked_linear_weight_grad", "cuda", weight_grad_on_cuda
    )
