"""Whole inference models: what follows a sparse convolution is fused into it, layouts are kept."""

from __future__ import annotations

import copy
import operator
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn
from torch.fx.passes.shape_prop import ShapeProp

from fastprune.nn import MaskedConv2d, MaskedLayer
from fastprune.nn.batch_last import Apply, BatchNorm2d, understand_batch_last_
from fastprune.ops import layout
from fastprune.ops.plan import BATCH_LAST

_ADDS = (operator.add, operator.iadd, torch.add)
_RELUS = (F.relu, torch.relu, F.relu_, torch.relu_)
_POOLS = {
    F.max_pool2d: layout.max_pool2d,
    torch.max_pool2d: layout.max_pool2d,
    F.avg_pool2d: layout.avg_pool2d,
    F.adaptive_avg_pool2d: layout.adaptive_avg_pool2d,
    F.adaptive_max_pool2d: layout.adaptive_max_pool2d,
}


class _Tracer(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, name: str) -> bool:
        return type(m).__module__.startswith("fastprune.nn.") or super().is_leaf_module(m, name)


def fuse(
    model: nn.Module, arguments: tuple[Any, ...], *, batch_last: bool
) -> fx.GraphModule | None:
    """A copy of an inference model as a graph, with fewer passes over its activations.

    A BatchNorm, a residual addition and a ReLU that follow a sparse convolution are done as its
    results are written; other BatchNorms take the ReLU after them. All modules stay where they are,
    with their parameters: the ``state_dict`` is the model's, and may be loaded. With ``batch_last``
    the sparse convolutions keep their activations with the batch innermost, so that a chain of them
    converts once; pooling, padding and BatchNorm follow, and dense convolutions get a contiguous
    copy.

    Args:
        model: in evaluation mode; not changed.
        arguments: positional example inputs.
    Returns:
        The graph module, or None where the model cannot be traced or nothing can be gained.
    """
    model = copy.deepcopy(model)
    try:
        graph = _Tracer().trace(model)
        traced = fx.GraphModule(model, graph, type(model).__name__)
        with torch.no_grad():
            ShapeProp(traced).propagate(*arguments)
    except Exception:  # tracing fails in as many ways as models are written
        return None
    for node in list(graph.nodes):
        node.type = None  # annotations as strings would stand in the way of pickling
        # Folded BatchNorms, empty shortcuts.
        if isinstance(_module(traced, node), nn.Identity | nn.Dropout | nn.Dropout2d):
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
    calls = Counter(str(node.target) for node in graph.nodes if node.op == "call_module")
    changed = 0
    if batch_last:  # the choice was made with activations stored so
        for module in traced.modules():
            if isinstance(module, MaskedLayer):
                module.sparse = module.sparse_in_chain
    for node in list(graph.nodes):
        changed += _fuse_convolution(traced, node, calls)
    for node in list(graph.nodes):
        changed += _fuse_norm(traced, node, calls)
    if batch_last:
        changed += _keep_batch_last(traced)
    if not changed:
        return None
    graph.eliminate_dead_code()
    graph.lint()
    traced.recompile()
    traced.eval()
    return traced


def unfuse_(traced: fx.GraphModule) -> None:
    """Give a fused convolution's BatchNorm, addition and ReLU nodes of their own again, in place.

    For a graph whose sparse convolutions are to become plain ones, which do none of these.
    """
    names = {id(m): name for name, m in traced.named_modules()}
    for node in list(traced.graph.nodes):
        layer = _module(traced, node)
        if not isinstance(layer, MaskedConv2d):
            continue
        users, last = list(node.users), node
        if layer._norm:
            with traced.graph.inserting_after(last):
                last = traced.graph.call_module(names[id(layer._norm[0])], (last,))
        if len(node.args) > 1:
            residual = node.args[1]
            node.args = node.args[:1]
            with traced.graph.inserting_after(last):
                last = traced.graph.call_function(torch.add, (last, residual))
        if layer.fused_relu:
            with traced.graph.inserting_after(last):
                last = traced.graph.call_function(torch.relu, (last,))
        for user in users:
            user.replace_input_with(node, last)
    traced.graph.lint()
    traced.recompile()


def fuse_relu_(model: nn.Module) -> int:
    """Give each BatchNorm the ``nn.ReLU`` that follows it, in place; for training too.

    Only where both are called once and nobody else sees what is between them. The ReLU becomes an
    ``nn.Identity``. Returns how many; 0 where the model cannot be traced.
    """
    understand_batch_last_(model)
    try:
        graph = _Tracer().trace(model)
    except Exception:  # tracing fails in as many ways as models are written
        return 0
    calls = Counter(str(node.target) for node in graph.nodes if node.op == "call_module")
    fused = 0
    for node in graph.nodes:
        user = _only_user(node)
        if node.op != "call_module" or user is None or user.op != "call_module":
            continue
        if calls[str(node.target)] != 1 or calls[str(user.target)] != 1:
            continue
        norm, relu = model.get_submodule(str(node.target)), model.get_submodule(str(user.target))
        if type(norm) is not BatchNorm2d or type(relu) is not nn.ReLU:
            continue
        norm.fused_relu = True
        parent, _, child = str(user.target).rpartition(".")
        setattr(model.get_submodule(parent), child, nn.Identity())
        fused += 1
    return fused


def _module(traced: fx.GraphModule, node: fx.Node) -> nn.Module | None:
    return traced.get_submodule(str(node.target)) if node.op == "call_module" else None


def _sparse_convolution(traced: fx.GraphModule, node: fx.Node) -> bool:
    module = _module(traced, node)
    return isinstance(module, MaskedConv2d) and module.sparse and len(_shape(node)) == 4


def _shape(node: Any) -> tuple[int, ...]:
    meta = node.meta.get("tensor_meta") if isinstance(node, fx.Node) else None
    return tuple(meta.shape) if meta is not None and hasattr(meta, "shape") else ()


def _only_user(node: fx.Node) -> fx.Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


def _is_relu(traced: fx.GraphModule, node: fx.Node | None) -> bool:
    if node is None:
        return False
    if node.op == "call_function":
        return node.target in _RELUS
    if node.op == "call_method":
        return node.target in ("relu", "relu_")
    return type(_module(traced, node)) is nn.ReLU


def _addend(node: fx.Node | None, of: fx.Node) -> fx.Node | None:
    """What ``node`` adds to ``of``, if it is a plain addition of two tensors of one shape."""
    if node is None or node.kwargs or len(node.args) != 2:
        return None
    if not (
        (node.op == "call_function" and node.target in _ADDS)
        or (node.op == "call_method" and node.target in ("add", "add_"))
    ):
        return None
    left, right = node.args
    other = right if left is of else left
    if left is right or not isinstance(other, fx.Node) or not _shape(of):
        return None
    return other if _shape(other) == _shape(of) else None


def _fuse_convolution(traced: fx.GraphModule, node: fx.Node, calls: Counter[str]) -> int:
    if not _sparse_convolution(traced, node) or calls[str(node.target)] != 1:
        return 0
    module = traced.get_submodule(str(node.target))
    assert isinstance(module, MaskedConv2d)
    last, residual = node, None
    user = _only_user(node)
    if _foldable(traced, user, calls):
        assert user is not None
        module.fuse_norm(traced.get_submodule(str(user.target)))  # type: ignore[arg-type]
        calls[str(user.target)] = -1
        last, user = user, _only_user(user)
    if (other := _addend(user, last)) is not None and not _later_convolution(traced, other, node):
        assert user is not None
        # An addition in place changes its left side, which nobody else may look at.
        inplace = user.target is operator.iadd or user.target == "add_"
        if not inplace or user.args[0] is last or len(other.users) == 1:
            residual, last = other, user
            user = _only_user(last)
    if _is_relu(traced, user):
        assert user is not None
        module.fused_relu = True
        last = user
    if last is node:
        return 0
    with traced.graph.inserting_before(last):
        args = (node.args[0],) if residual is None else (node.args[0], residual)
        fused = traced.graph.call_module(str(node.target), args)
        fused.meta = dict(last.meta)
    last.replace_all_uses_with(fused)
    calls[str(node.target)] = -1  # fused once
    for dead in reversed([node, *_chain(node, last)]):
        traced.graph.erase_node(dead)
    return 1


def _chain(first: fx.Node, last: fx.Node) -> list[fx.Node]:
    """The nodes after ``first`` up to ``last``, each the only user of the one before."""
    chain = []
    while first is not last:
        first = next(iter(first.users))
        chain.append(first)
    return chain


def _later_convolution(traced: fx.GraphModule, other: fx.Node, node: fx.Node) -> bool:
    """Of two convolutions that are added, the later one takes the other as its residual."""
    if not _sparse_convolution(traced, other) or len(other.users) != 1:
        return False
    order = {n: i for i, n in enumerate(traced.graph.nodes)}
    return order[other] > order[node]


def _foldable(traced: fx.GraphModule, node: fx.Node | None, calls: Counter[str]) -> bool:
    """A BatchNorm that is one scale and shift per channel, called once."""
    norm = _module(traced, node) if node is not None else None
    return (
        node is not None
        and type(norm) in (nn.BatchNorm2d, BatchNorm2d)
        and calls[str(node.target)] == 1
        and norm.running_mean is not None  # type: ignore[union-attr]
        and norm.running_var is not None  # type: ignore[union-attr]
    )


def _fuse_norm(traced: fx.GraphModule, node: fx.Node, calls: Counter[str]) -> int:
    if not _foldable(traced, node, calls):
        return 0
    norm = traced.get_submodule(str(node.target))
    norm.__class__ = BatchNorm2d
    user = _only_user(node)
    if _is_relu(traced, user):
        assert user is not None
        norm.fused_relu = True  # type: ignore[assignment]
        user.replace_all_uses_with(node)
        traced.graph.erase_node(user)
    return 1


def _keep_batch_last(traced: fx.GraphModule) -> int:
    changed = 0
    for node in list(traced.graph.nodes):
        module = _module(traced, node)
        if _sparse_convolution(traced, node):
            assert isinstance(module, MaskedConv2d)
            module._layout = BATCH_LAST
            changed += 1
        elif isinstance(module, nn.Conv2d) and len(_shape(node)) == 4:
            _between_layouts(traced, node)
        elif node.op == "call_function" and node.target in _POOLS:
            if not node.kwargs.get("return_indices", False):
                _redirect(traced, node, _POOLS[node.target])
        elif node.op == "call_function" and node.target is F.pad:
            _redirect(traced, node, layout.pad)
        elif node.op == "output":
            with traced.graph.inserting_before(node):
                node.args = fx.node.map_arg(node.args, lambda n: _contiguous(traced, n))
    understand_batch_last_(traced)
    return changed


def _between_layouts(traced: fx.GraphModule, node: fx.Node) -> None:
    """A dense convolution reads a contiguous tensor; what follows it works on a batch-last one."""
    with traced.graph.inserting_before(node):
        source = _call(traced, layout.contiguous, (node.args[0],))
    node.args = (source, *node.args[1:])
    last, user = node, _only_user(node)
    if _is_relu(traced, user):
        assert user is not None
        with traced.graph.inserting_after(node):
            last = traced.graph.call_function(torch.relu_, (node,))
        last.meta = dict(user.meta)
        user.replace_all_uses_with(last)
        traced.graph.erase_node(user)
    if all(isinstance(_module(traced, u), nn.Conv2d) for u in last.users) and not any(
        _sparse_convolution(traced, u) for u in last.users
    ):
        return
    with traced.graph.inserting_after(last):
        moved = _call(traced, layout.batch_last, (last,))
    moved.meta = dict(last.meta)
    last.replace_all_uses_with(moved, delete_user_cb=lambda u: u is not moved)


def _contiguous(traced: fx.GraphModule, node: fx.Node) -> fx.Node:
    if len(_shape(node)) != 4:
        return node
    return _call(traced, layout.contiguous, (node,))


def _call(
    traced: fx.GraphModule,
    function: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any] | None = None,
) -> fx.Node:
    """A call of one of our functions, by a module: unpickling a graph traces into functions."""
    name = f"fastprune_{function.__name__}"
    if not hasattr(traced, name):
        traced.add_submodule(name, Apply(function))
    return traced.graph.call_module(name, args, kwargs)


def _redirect(traced: fx.GraphModule, node: fx.Node, function: Callable[..., Any]) -> None:
    with traced.graph.inserting_before(node):
        called = _call(traced, function, node.args, dict(node.kwargs))
    called.meta = dict(node.meta)
    node.replace_all_uses_with(called)
    traced.graph.erase_node(node)
