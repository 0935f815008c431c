"""From a model and an example input to a program, by way of ``torch.export``."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn

from fastprune.effective.program import Program, Value, Weight
from fastprune.nn.feedback import marking_feedback
from fastprune.pruners.state import evaluating

Rule = Callable[..., Any]
_rules: dict[str, Rule] = {}
# What takes the place of a module's forward in a traced graph, by type.
_stand_ins: dict[type[nn.Module], Callable[..., Any]] = {}


class UnknownOperationError(ValueError):
    """An operation of the model has no rule."""


def register_rule(*operations: str) -> Callable[[Rule], Rule]:
    """Say how an operation hands on what its inputs reach::

        @fp.effective.register_rule("mylib::scale")
        def scale(trace, node, x, factor):
            return trace.elementwise(node, x)

    Args:
        operations: names as ``torch.export`` knows them, with their namespace and without
            overload: ``"aten::relu"``, ``"mylib::scale"``.
    The rule gets the :class:`Trace`, the ``fx.Node`` and the node's arguments: a
    :class:`fastprune.effective.Value` for a tensor that depends on the input, a
    :class:`fastprune.effective.Weight` for a parameter or constant, anything else as it is. It
    returns a Value, or a tuple of them, shaped as the node's result.
    """

    def register(rule: Rule) -> Rule:
        for name in operations:
            _rules[name] = rule
        return rule

    return register


def registered() -> dict[str, Rule]:
    """The rules of all operations, by name."""
    return dict(_rules)


def register_stand_in(kind: type[nn.Module]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Say what modules of a type, and of types made from it, run while a model is traced.

    For modules that ``torch.export`` cannot look into: the function gets the module and its inputs,
    and calls an operator that has a rule.
    """

    def register(forward: Callable[..., Any]) -> Callable[..., Any]:
        _stand_ins[kind] = forward
        return forward

    return register


@contextmanager
def _standing_in(model: nn.Module) -> Iterator[None]:
    found = [
        (module, forward)
        for module in model.modules()
        for kind, forward in _stand_ins.items()
        if isinstance(module, kind)
    ]
    before = [module.__dict__.get("forward") for module, _ in found]
    try:
        for module, forward in found:
            module.__dict__["forward"] = partial(forward, module)
        yield
    finally:
        for (module, _), old in zip(found, before, strict=True):
            module.__dict__.pop("forward", None)
            if old is not None:
                module.__dict__["forward"] = old


def shape_of(node: fx.Node) -> tuple[int, ...]:
    """The shape of a node's result."""
    return tuple(int(n) for n in node.meta["val"].shape)


class Trace:
    """A program under construction: what rules build with."""

    def __init__(self) -> None:
        self.program = Program()

    def elementwise(self, node: fx.Node, *operands: Any) -> Value | Weight:
        """Every element of the result depends on the elements of the operands at its place."""
        shape = shape_of(node)
        values = [self.broadcast(v, shape) for v in operands if isinstance(v, Value)]
        if not values:
            weights = [w for w in operands if isinstance(w, Weight)]
            named = [w for w in weights if w.name is not None and w.shape == shape]
            return Weight(named[0].name if len(named) == 1 else None, shape)
        if len(values) == 1:
            return self.program.reshaped(values[0], shape)
        return self.program.join(shape, values)

    def broadcast(self, value: Value, shape: tuple[int, ...]) -> Value:
        """The map as ``torch.broadcast_to`` repeats its elements."""
        if value.numel == math.prod(shape):
            return self.program.reshaped(value, shape)
        return self.moved(value, lambda index: index.broadcast_to(shape))

    def moved(self, value: Value, how: Callable[[Tensor], Tensor]) -> Value:
        """The map of a result whose elements are elements of ``value``.

        ``how`` does to a float64 tensor of flat indices what the operation does to ``value``; an
        index of -1 stands for an element from nowhere (padding).
        """
        source = how(torch.arange(value.numel, dtype=torch.float64).view(value.shape))
        if source.numel() == value.numel and _in_order(source):
            return self.program.reshaped(value, tuple(source.shape))
        return self.program.moved(value, source)

    def mixed(self, value: Value, kept: Tensor, shape: Sequence[int], wanted: Tensor) -> Value:
        """A result in which all elements of ``value`` with the same label meet.

        ``kept``: labels of the elements of ``value``, ``wanted``: of the result's, both integer
        tensors that count from 0; -1: none.
        """
        out = self.program.value(tuple(shape))
        count = int(max(kept.max() if kept.numel() else -1, wanted.max() if wanted.numel() else -1))
        self.program.group(value, out, kept, wanted, count + 1)
        return out


def _in_order(source: Tensor) -> bool:
    flat = source.flatten()
    return torch.equal(flat, torch.arange(len(flat), dtype=source.dtype))


@dataclass(frozen=True)
class Graph:
    """An exported model: its nodes, which of them are inputs and outputs, names of parameters."""

    nodes: list[fx.Node]
    inputs: set[str]
    outputs: set[str]
    parameters: dict[str, str]  # placeholder -> first name of the parameter
    buffers: dict[str, str]  # placeholder -> name of the buffer


def graph_of(model: nn.Module, arguments: tuple[Any, ...]) -> Graph:
    """The model in evaluation mode as ``torch.export`` sees it, for one example.

    Raises:
        ValueError: ``torch.export`` cannot trace the model.
    """
    with evaluating(model), marking_feedback(), _standing_in(model), torch.no_grad():
        try:
            exported = torch.export.export(model, one_example(arguments), strict=False)
        except Exception as error:
            raise ValueError(f"model: torch.export cannot trace it: {error}") from error
    signature = exported.graph_signature
    first = {id(p): name for name, p in model.named_parameters()}
    every = dict(model.named_parameters(remove_duplicate=False))
    nodes = list(exported.graph.nodes)
    for node in nodes:
        if node.op not in ("placeholder", "call_function", "output"):
            raise UnknownOperationError(f"model: {node.op} {node.target} in the exported graph")
    return Graph(
        nodes,
        set(signature.user_inputs),
        set(signature.user_outputs),
        {own: first[id(every[p])] for own, p in signature.inputs_to_parameters.items()},
        dict(signature.inputs_to_buffers),
    )


def walk(
    graph: Graph,
    start: Callable[[fx.Node], Any],
    apply: Callable[[fx.Node, tuple[Any, ...], dict[str, Any]], Any],
) -> list[Any]:
    """Interpret a graph: ``start`` for placeholders, ``apply`` for calls; what the outputs are."""
    known: dict[fx.Node, Any] = {}
    results = []
    for node in graph.nodes:
        if node.op == "placeholder":
            known[node] = start(node)
        elif node.op == "call_function":
            args: Any = fx.node.map_arg(node.args, lambda n: known[n])
            kwargs: Any = fx.node.map_arg(node.kwargs, lambda n: known[n])
            if getattr(node.target, "__name__", "") == "getitem":
                parts, which = args
                known[node] = parts[which] if isinstance(parts, (tuple, list)) else parts
            else:
                known[node] = apply(node, args, kwargs)
        else:
            returned: Any = node.args[0]
            wanted = [r for r in returned if isinstance(r, fx.Node) and r.name in graph.outputs]
            results += [known[r] for r in wanted]
    return results


def trace(model: nn.Module, arguments: tuple[Any, ...]) -> Program:
    """The program of a model in evaluation mode, for inputs shaped like ``arguments``.

    Raises:
        UnknownOperationError: an operation has no rule; the message names it.
        ValueError: ``torch.export`` cannot trace the model.
    """
    return build(graph_of(model, arguments))[0]


def build(
    graph: Graph, rules: Mapping[str, Rule] | None = None
) -> tuple[Program, dict[fx.Node, tuple[Any, ...]]]:
    """The program of a graph, and what each call was given; ``rules`` precede the registered."""
    built = Trace()
    chosen = {**_rules, **(rules or {})}
    given: dict[fx.Node, tuple[Any, ...]] = {}

    def start(node: fx.Node) -> Any:
        if node.name in graph.inputs:
            return _input(built.program, node)
        return Weight(graph.parameters.get(node.name), shape_of(node))

    def apply(node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        given[node] = args
        return _apply(built, chosen, node, args, kwargs)

    for result in walk(graph, start, apply):
        if isinstance(result, Value):
            built.program.output(result)
    return built.program, given


def _input(program: Program, node: fx.Node) -> Any:
    return program.input(shape_of(node)) if isinstance(node.meta.get("val"), Tensor) else None


def one_example(arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    """The first example of a batch; alone as it is."""
    sizes = {a.shape[0] for a in arguments if isinstance(a, Tensor) and a.dim() > 1}
    if len(sizes) != 1 or sizes == {1}:
        return arguments
    return tuple(a[:1] if isinstance(a, Tensor) and a.dim() > 1 else a for a in arguments)


def _apply(
    built: Trace,
    rules: Mapping[str, Rule],
    node: fx.Node,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    name = name_of(node)
    rule = rules.get(name)
    if rule is not None:
        return rule(built, node, *args, **kwargs)
    found: list[Value] = []
    fx.node.map_aggregate((args, kwargs), lambda a: found.append(a) if isinstance(a, Value) else a)
    if not found:  # of constants: a constant
        return _constant(node)
    raise UnknownOperationError(
        f"model: no rule for the operation {name} (node {node.name}); say how it hands on what its "
        f'inputs reach with @fastprune.effective.register_rule("{name}")'
    )


def name_of(node: fx.Node) -> str:
    """The operation of a call, with its namespace and without overload."""
    schema = getattr(node.target, "_schema", None)
    return str(schema.name) if schema is not None else getattr(node.target, "__name__", "?")


def _constant(node: fx.Node) -> Any:
    val = node.meta.get("val")
    if isinstance(val, Tensor):
        return Weight(None, shape_of(node))
    if isinstance(val, (tuple, list)):
        return tuple(Weight(None, tuple(v.shape)) for v in val if isinstance(v, Tensor))
    return val


class _Kept:
    """Programs of one model, as long as its modules stay the same."""

    def __init__(self, model: nn.Module) -> None:
        # Every module, and which its children are: compared at each call, so without recursion.
        self.structure = [(weakref.ref(m), _children(m)) for m in model.modules()]
        self.programs: dict[Any, Program] = {}
        # Where every parameter hangs, by its first name.
        self.places: dict[str, tuple[weakref.ref[nn.Module], str]] = {}
        seen: set[int] = set()
        for prefix, module in model.named_modules():
            for attribute, parameter in module._parameters.items():
                if parameter is not None and id(parameter) not in seen:
                    seen.add(id(parameter))
                    name = f"{prefix}.{attribute}" if prefix else attribute
                    self.places[name] = (weakref.ref(module), attribute)

    def fits(self) -> bool:
        for reference, children in self.structure:
            module = reference()
            if module is None or _children(module) != children:
                return False
        return True

    def parameter(self, name: str) -> Tensor | None:
        """The parameter of that first name, or None where there is none any more."""
        place = self.places.get(name)
        module = None if place is None else place[0]()
        return None if module is None or place is None else module._parameters.get(place[1])


def _children(module: nn.Module) -> tuple[int, ...]:
    return tuple(map(id, module._modules.values()))


_kept: weakref.WeakKeyDictionary[nn.Module, _Kept] = weakref.WeakKeyDictionary()


def arguments_of(model: nn.Module, example_input: Any) -> tuple[Any, ...]:
    """``example_input`` as positional arguments, once model and input are of the right kinds."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    arguments = example_input if isinstance(example_input, tuple) else (example_input,)
    for a in arguments:
        if not isinstance(a, Tensor):
            raise TypeError(
                f"example_input: expected a tensor or a tuple of tensors, got {type(a).__name__}"
            )
    return arguments


def kept_of(model: nn.Module) -> _Kept:
    """What is kept of a model, made anew where its modules have changed."""
    kept = _kept.get(model)
    if kept is None or not kept.fits():
        kept = _kept[model] = _Kept(model)
    return kept


def program_of(model: nn.Module, example_input: Any) -> Program:
    """The model's program, kept between calls while its modules and the input's shapes stay."""
    arguments = arguments_of(model, example_input)
    key = tuple((tuple(a.shape), a.dtype) for a in arguments)
    kept = kept_of(model)
    program = kept.programs.get(key)
    if program is None:
        program = kept.programs[key] = trace(model, arguments)
    return program
