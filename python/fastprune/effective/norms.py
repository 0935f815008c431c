"""Path norms: how much weight the paths through each connection carry."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from fastprune.effective.rules.names import ELEMENTWISE, MOVES
from fastprune.effective.trace import (
    UnknownOperationError,
    arguments_of,
    graph_of,
    name_of,
    shape_of,
    walk,
)
from fastprune.pruners.arguments import masks_of

_ADDS = {"add", "add_", "sub", "sub_", "rsub", "maximum", "minimum", "where", "lerp"}
_PRODUCTS = {"mul", "mul_", "div", "div_"}
_TORCH = {"cat", "concat", "stack", "sum", "mean", "pad", "constant_pad_nd", "cumsum"}
# True values are given up to this power of two; beyond it, only their proportions.
_REPRESENTABLE = 900


class PathNorms(dict[str, Tensor]):
    """Path norms by parameter name, float64; the true value is ``self[name] * 2**exponent``.

    Attributes:
        exponent: 0 wherever the true values can be represented.
    """

    exponent: int = 0


@dataclass(frozen=True)
class _Scaled:
    """``tensor * 2**exponent``, all entries >= 0."""

    tensor: Tensor
    exponent: int = 0

    def rescaled(self) -> _Scaled:
        """The same with its largest entry in [1/2, 1)."""
        top = float(self.tensor.detach().max()) if self.tensor.numel() else 0.0
        if top == 0.0 or not math.isfinite(top):
            return self
        shift = math.frexp(top)[1]
        return _Scaled(_times(self.tensor, -shift), self.exponent + shift)


def _times(t: Tensor, power: int) -> Tensor:
    """t * 2**power: in two steps, as the power itself may not be representable."""
    half = power // 2
    return t * math.ldexp(1.0, half) * math.ldexp(1.0, power - half) if power else t


def _sum(parts: list[_Scaled]) -> _Scaled:
    """What is below 2**-1074 of the largest part is lost; nothing overflows."""
    top = max(p.exponent for p in parts)
    aligned = [_times(p.tensor, max(p.exponent - top, -1100)) for p in parts]
    total = aligned[0]
    for t in aligned[1:]:
        total = total + t
    return _Scaled(total, top)


def path_norms(model: nn.Module, masks: Mapping[str, Tensor], *, example_input: Any) -> PathNorms:
    r"""\|dR / d theta\| for R = 1^T f\*(\|theta\| . M, 1): the sum over paths through a weight.

    f\* is the linearized network: no biases, activations and normalization layers left out, pooling
    by averages, every weight replaced by its absolute value, M the masks (ones where there is
    none), on an input of ones of the example's size. The norm of a kept weight is the sum, over the
    paths that pass through it, of the products of the other weights' magnitudes; a pruned weight
    has 0. (Times \|theta\|, it is SynFlow's score of such a network.) All terms are positive and
    are added up in float64, activations scaled by powers of two from layer to layer: finite at any
    depth and for weights of any size.

    Args:
        model: any module that ``torch.export`` can trace; not changed.
        masks: parameter name -> bool tensor, True where kept.
        example_input: a tensor or a tuple of them; only shapes count, one example is used.
    Returns:
        :class:`PathNorms`: name -> float64 tensor of the weight's shape, on its device, for the
        names in ``masks``. Where true values would over- or underflow, all are scaled by
        ``2**exponent``. For which weights are on a path at all, :func:`effective_masks` is exact.
    Raises:
        UnknownOperationError: an operation that is not linear, elementwise, pooling, or a move.
        ValueError, TypeError: as :func:`fastprune.effective_sparsity`; the model has an equilibrium
            layer, around which paths have no end.

    Cost: a forward and a backward pass in float64. Attention adds up all tokens of a head; two
    activations are multiplied.
    Source: Vysogorets and Kempe 2023, section 3; Tanaka et al. 2020.
    """
    arguments = arguments_of(model, example_input)
    graph = graph_of(model, arguments)
    known = masks_of(model, masks)
    parameters = dict(model.named_parameters())
    with torch.inference_mode(False), torch.enable_grad():
        weights = {n: parameters[n].detach().double().abs().requires_grad_() for n in known}

        def start(node: fx.Node) -> Any:
            if node.name in graph.inputs:
                return _Scaled(
                    torch.ones(shape_of(node), dtype=torch.float64, device=_device(node))
                )
            name = graph.parameters.get(node.name)
            if name is None:
                return None
            if name in known:
                return weights[name] * known[name]
            return parameters[name].detach().double().abs()

        results = walk(graph, start, _apply)
        outputs = [_Scaled(r.tensor.sum(), r.exponent) for r in results if isinstance(r, _Scaled)]
        total = _sum(outputs).rescaled() if outputs else None
        if total is None or not total.tensor.requires_grad:
            gradients: list[Tensor | None] = [None] * len(weights)
        else:
            gradients = list(
                torch.autograd.grad(total.tensor, list(weights.values()), allow_unused=True)
            )
    return _collected(dict(zip(weights, gradients, strict=True)), weights, total)


def _device(node: fx.Node) -> torch.device:
    return node.meta["val"].device  # type: ignore[no-any-return]


def _collected(
    gradients: dict[str, Tensor | None], weights: dict[str, Tensor], total: _Scaled | None
) -> PathNorms:
    found = PathNorms()
    for name, gradient in gradients.items():
        found[name] = torch.zeros_like(weights[name].detach()) if gradient is None else gradient
    if total is None:
        return found
    positive = [g[g > 0] for g in found.values() if bool((g > 0).any())]
    if not positive:
        return found
    low = math.frexp(min(float(g.min()) for g in positive))[1] + total.exponent
    high = math.frexp(max(float(g.max()) for g in positive))[1] + total.exponent
    if low < -_REPRESENTABLE or high > _REPRESENTABLE:
        found.exponent = total.exponent
        return found
    for name in found:
        found[name] = _times(found[name], total.exponent)
    return found


def _apply(node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """One operation of the linearized network."""
    name = name_of(node)
    short = name.partition("::")[2]
    values: list[_Scaled] = []
    fx.node.map_aggregate(
        (args, kwargs), lambda a: values.append(a) if isinstance(a, _Scaled) else a
    )
    if not values:
        return next((a for a in args if isinstance(a, Tensor)), None)  # of parameters: themselves
    x = values[0]
    if short.startswith("feedback_") or short == "traced_equilibrium":
        raise ValueError(
            "model: it has an equilibrium layer, whose output is also its input: paths go round "
            "without end, and their sum need not be finite, so no path norms"
        )
    if short in ("linear", "masked_linear"):
        return _linear(args) if len(values) == 1 else _product(args[0], args[1], transposed=True)
    if short.startswith(("conv", "masked_conv2d")):
        return _convolution(node, short, args)
    if short in _PRODUCTS and len(values) == 2:
        product = values[0].tensor * values[1].tensor
        return _Scaled(product, values[0].exponent + values[1].exponent).rescaled()
    if short in _ADDS and len(values) > 1:
        return _sum(values)
    if short in ("matmul", "bmm", "mm"):
        if len(values) == 2:
            return _product(args[0], args[1])
        parts = [a.tensor if isinstance(a, _Scaled) else a for a in args[:2]]
        return _Scaled(parts[0] @ parts[1], x.exponent).rescaled()
    if short == "scaled_dot_product_attention":
        return _attention(args)
    if "pool" in short:
        return _pooled(node, short, x, args)
    if short in _TORCH:
        return _by_torch(node, args, kwargs, values)
    if short in ("softmax", "log_softmax", "_softmax"):
        return _Scaled(x.tensor.sum(args[1], keepdim=True).expand(x.tensor.shape), x.exponent)
    if short in ("split", "split_with_sizes", "chunk", "unbind", "tensor_split"):
        pieces = node.target(x.tensor, *args[1:], **kwargs)  # type: ignore[operator]
        return tuple(_Scaled(t, x.exponent) for t in pieces)
    if short in MOVES:
        rest = [a.tensor if isinstance(a, _Scaled) else a for a in args[1:]]
        moved = node.target(x.tensor, *rest, **kwargs)  # type: ignore[operator]
        return _Scaled(moved, x.exponent)
    if short in ELEMENTWISE:
        return (x, None, None) if isinstance(node.meta["val"], (tuple, list)) else x
    raise UnknownOperationError(f"model: {name} has no linearized form, so no path norms")


def _linear(args: tuple[Any, ...]) -> _Scaled:
    x, weight = args[:2]
    return _Scaled(F.linear(x.tensor, weight), x.exponent).rescaled()


def _product(a: _Scaled, b: _Scaled, transposed: bool = False) -> _Scaled:
    right = b.tensor.transpose(-1, -2) if transposed else b.tensor
    return _Scaled(a.tensor @ right, a.exponent + b.exponent).rescaled()


def _attention(args: tuple[Any, ...]) -> _Scaled:
    q, k, v = args[:3]
    parts = [_Scaled(v.tensor.sum(-2, keepdim=True), v.exponent)]
    parts += [_Scaled(t.tensor.sum((-1, -2), keepdim=True), t.exponent) for t in (q, k)]
    total = _sum(parts)
    shape = (*q.tensor.shape[:-1], v.tensor.shape[-1])
    return _Scaled(total.tensor.expand(shape), total.exponent).rescaled()


def _convolution(node: fx.Node, short: str, args: tuple[Any, ...]) -> _Scaled:
    x, weight = args[:2]
    rest = [None, *args[3:]]
    if short == "masked_conv2d":
        y = F.conv2d(x.tensor, weight, None, *args[9:13])
    elif "transpose" in short:
        y = getattr(F, short)(x.tensor, weight, *rest)
    else:
        y = getattr(F, short)(x.tensor, weight, *rest)
    return _Scaled(y, x.exponent).rescaled()


def _pooled(node: fx.Node, short: str, x: _Scaled, args: tuple[Any, ...]) -> Any:
    """Averages, of the windows that the pooling has."""
    val = node.meta["val"]
    dims = int(short.split("pool")[1][0])
    shape = tuple((val[0] if isinstance(val, tuple) else val).shape)
    if short.startswith("adaptive"):
        y = getattr(F, f"adaptive_avg_pool{dims}d")(x.tensor, args[1])
    else:
        y = _averages(x.tensor, dims, short, args[1:], shape)
    result = _Scaled(y, x.exponent)
    return (result, None) if isinstance(val, tuple) else result


def _averages(
    x: Tensor, dims: int, short: str, args: tuple[Any, ...], shape: tuple[int, ...]
) -> Tensor:
    """Means over windows, as a convolution of every channel; past the border are zeros."""

    def given(i: int, default: Any) -> Any:
        value = args[i] if len(args) > i else default
        return ([value] * dims if isinstance(value, int) else list(value)) or default

    kernel = given(0, 1)
    kernel = kernel * dims if len(kernel) == 1 else kernel
    stride, padding = given(1, kernel), given(2, [0] * dims)
    dilation = given(3, [1] * dims) if short.startswith("max") else [1] * dims
    around: list[int] = []  # of the last dimension first, as F.pad wants it
    for d in reversed(range(dims)):
        reach = (shape[d - dims] - 1) * stride[d] + dilation[d] * (kernel[d] - 1) + 1
        around += [padding[d], max(0, reach - x.shape[d - dims] - padding[d])]
    channels = x.shape[-dims - 1]
    ones = x.new_ones((channels, 1, *kernel)) / math.prod(kernel)
    convolve = (F.conv1d, F.conv2d, F.conv3d)[dims - 1]
    y = convolve(F.pad(x, around), ones, None, stride, 0, dilation, channels)
    for d in range(dims):
        y = y.narrow(d - dims, 0, shape[d - dims])
    return y


def _by_torch(
    node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any], values: list[_Scaled]
) -> _Scaled:
    """Concatenation, sums and padding: torch's own, the parts brought to one exponent."""
    top = max(v.exponent for v in values)

    def plain(a: Any) -> Any:
        if isinstance(a, _Scaled):
            return _times(a.tensor, max(a.exponent - top, -1100))
        return a

    if isinstance(args[0], (list, tuple)):  # a constant part carries no path
        like = values[0].tensor
        parts = [
            plain(a) if isinstance(a, _Scaled) else like.new_zeros(n.meta["val"].shape)
            for a, n in zip(args[0], node.args[0], strict=True)  # type: ignore[arg-type]
        ]
        return _Scaled(node.target(parts, *args[1:], **kwargs), top)  # type: ignore[operator]
    rest = {k: v for k, v in kwargs.items() if k != "dtype"}
    return _Scaled(node.target(plain(args[0]), *args[1:], **rest), top)  # type: ignore[operator]
