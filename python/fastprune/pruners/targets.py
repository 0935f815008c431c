"""Which weights are pruned: linear and convolution weights, less what the user leaves out."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TypeAlias

import torch
from torch import nn
from torch.nn.utils import parametrize

from fastprune.nn import MonDEQLayer

Selector: TypeAlias = str | type[nn.Module]
Selection: TypeAlias = Selector | Iterable[Selector] | None

TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
PRUNABLE_TYPES: tuple[type[nn.Module], ...] = (
    nn.Linear,
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    *TRANSPOSED,
)
_NORMALIZATION = (
    nn.modules.batchnorm._NormBase,
    nn.LayerNorm,
    nn.GroupNorm,
    nn.LocalResponseNorm,
    nn.RMSNorm,
)
_PARAMETRIZED = "is parametrized: call torch.nn.utils.parametrize.remove_parametrizations first"
_FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class _Place:
    """One place where a parameter hangs: a shared parameter or module has several."""

    module_name: str
    module: nn.Module
    attribute: str

    @property
    def name(self) -> str:
        return f"{self.module_name}.{self.attribute}" if self.module_name else self.attribute

    @property
    def by_default(self) -> bool:
        if self.attribute == "weight" and isinstance(self.module, PRUNABLE_TYPES):
            return True
        return self.attribute in _named_by_class(self.module)


def prunable(
    model: nn.Module, include: Selection = None, exclude: Selection = None
) -> dict[str, nn.Parameter]:
    """The weights to prune, by parameter name, in the order of ``named_parameters()``.

    By default: the ``weight`` of every linear and convolution layer (transposed ones too, the
    output projection of attention too), the last layer included; never biases or normalization; and
    what a module's class names in ``prunable_parameters``: A and B of monotone equilibrium layers,
    beside the weight of their U. A parameter that several modules share appears once, under its
    first name. ``requires_grad`` does not matter.

    A module of your own may name some of its parameters too::

        class Low(nn.Module):
            prunable_parameters = ("left", "right")

    Args:
        model: any module.
        include: keep only what one of these matches; None keeps all.
        exclude: drop what one of these matches.

    ``include`` and ``exclude`` take one selector or several. A selector is the exact name of a
    parameter; the exact name of a module, for all that is in it; a glob pattern (``*``, ``?``,
    ``[...]``) matched against both; or a module type, for all that is in a module of that type.
    The exact name of another floating-point parameter of two or more dimensions (an embedding, the
    parameter of a module of your own) in ``include`` makes it prunable.

    Raises:
        TypeError: a selector is neither a string nor a module type.
        ValueError: a selector of ``include`` matches no prunable weight, or one of ``exclude``
            matches nothing; a chosen weight is parametrized, lazy, inside a recurrent or attention
            module, or not float32, float64, bfloat16 or float16; nothing is left.
    """
    places = [
        _Place(module_name, module, attribute)
        for module_name, module in model.named_modules(remove_duplicate=False)
        for attribute in _attributes(module)
    ]
    modules = list(model.named_modules(remove_duplicate=False))
    chosen = {p.name for p in places if p.by_default}
    if include is not None:
        chosen = {n for s in _selectors(include, "include") for n in _include(s, places, modules)}
    if exclude is not None:
        for selector in _selectors(exclude, "exclude"):
            matched = _matches(selector, places, modules)
            if matched is None:
                raise ValueError(f"exclude: {_show(selector)} matches nothing in the model")
            chosen -= _aliases(model, matched)
    kept = [p for p in places if p.name in chosen]
    for place in kept:
        _refuse_unusable(place)
    identities = {id(getattr(p.module, p.attribute)) for p in kept}
    weights = {n: p for n, p in model.named_parameters() if id(p) in identities}
    if not weights:
        raise ValueError(
            "the model has no prunable weights: no linear, convolution or equilibrium layer"
            + (" is left by include and exclude" if include or exclude else "")
        )
    return weights


def refuse_rowless(model: nn.Module, weights: Mapping[str, nn.Parameter], scope: str) -> None:
    """Refuse row scopes on weights whose rows are not what one output unit reads.

    Those are the weights of transposed convolutions, whose first dimension is the input's, and A
    and B of equilibrium layers, each entry of which joins two units in both directions.

    Raises:
        ValueError: ``scope`` is ``neuron`` or ``filter`` and one of ``weights`` is of that kind.
    """
    if scope not in ("neuron", "filter"):
        return
    why: dict[int, str] = {}
    for m in model.modules():
        if isinstance(m, TRANSPOSED):
            why[id(m.weight)] = (
                "the rows of a transposed convolution's weight are inputs, not outputs"
            )
        elif isinstance(m, MonDEQLayer):
            for matrix in (m.A, m.B):
                why[id(matrix)] = "its entries act in both directions, A and A^T, B and -B^T"
    for name, weight in weights.items():
        if id(weight) in why:
            raise ValueError(
                f"scope: {scope!r} is not supported for {name}: {why[id(weight)]}; exclude it"
            )


def _attributes(module: nn.Module) -> Iterator[str]:
    """Names of a module's own parameters; the ``weight`` of a linear layer even if it has gone."""
    yield from (name for name, p in module._parameters.items() if p is not None)
    if isinstance(module, PRUNABLE_TYPES) and module._parameters.get("weight") is None:
        yield "weight"
    yield from (a for a in _named_by_class(module) if parametrize.is_parametrized(module, a))


def _named_by_class(module: nn.Module) -> tuple[str, ...]:
    return tuple(getattr(type(module), "prunable_parameters", ()))


def _selectors(selection: Selection, argument: str) -> list[Selector]:
    if isinstance(selection, (str, type)):
        selection = [selection]
    if isinstance(selection, nn.Module) or not isinstance(selection, Iterable):
        raise TypeError(
            f"{argument}: expected names, patterns or module types, got {type(selection).__name__}"
        )
    selectors = list(selection)
    for s in selectors:
        if not (isinstance(s, str) or (isinstance(s, type) and issubclass(s, nn.Module))):
            raise TypeError(f"{argument}: expected a name, a pattern or a module type, got {s!r}")
    if not selectors and argument == "include":
        raise ValueError("include: the selection is empty, so nothing would be prunable")
    return selectors


def _matches(
    selector: Selector, places: list[_Place], modules: list[tuple[str, nn.Module]]
) -> set[str] | None:
    """Names of the parameters that a selector covers; None if it fits nothing in the model."""
    if isinstance(selector, str):
        # An exact name first: a name may hold characters that mean something in a pattern.
        hit = [n for n, _ in modules if n == selector] or [
            n for n, _ in modules if fnmatchcase(n, selector)
        ]
        own = {p.name for p in places if p.name == selector or fnmatchcase(p.name, selector)}
    else:
        hit = [n for n, m in modules if isinstance(m, selector)]
        own = set()
    if not hit and not own:
        return None
    roots = tuple(f"{n}." if n else "" for n in hit)
    return own | {p.name for p in places if roots and p.name.startswith(roots)}


def _include(
    selector: Selector, places: list[_Place], modules: list[tuple[str, nn.Module]]
) -> set[str]:
    matched = _matches(selector, places, modules)
    if matched is None:
        raise ValueError(f"include: {_show(selector)} matches nothing in the model")
    found = {p.name for p in places if p.by_default and p.name in matched}
    if found:
        return found
    exact = next((p for p in places if p.name == selector), None)
    if exact is not None and (reason := _never_prunable(exact)) is not None:
        raise ValueError(f"include: {_show(selector)} cannot be pruned: it {reason}")
    if exact is None:
        raise ValueError(f"include: {_show(selector)} matches no linear or convolution weight")
    return {exact.name}


def _never_prunable(place: _Place) -> str | None:
    """Why a parameter that is not prunable by default cannot be made so, or None."""
    if isinstance(place.module, (nn.RNNBase, nn.RNNCellBase, nn.MultiheadAttention)):
        return f"is inside {type(place.module).__name__}, whose own parameters are not supported"
    if isinstance(place.module, _NORMALIZATION):
        return "belongs to a normalization layer"
    if place.attribute.endswith("bias"):
        return "is a bias"
    if isinstance(place.module, PRUNABLE_TYPES):
        return _parametrized(place.module) or "is not the weight of its layer"
    value = getattr(place.module, place.attribute)
    if isinstance(value, nn.parameter.UninitializedParameter):
        return None  # refused below, in the words for lazy layers
    if value.dim() < 2:
        return f"has {value.dim()} dimensions: a bias or a scale"
    return None


def _parametrized(module: nn.Module) -> str | None:
    if parametrize.is_parametrized(module, "weight"):
        return _PARAMETRIZED
    if "weight_orig" in module._parameters:
        return (
            "is computed from weight_orig by a hook (torch.nn.utils.prune or spectral_norm): "
            "call torch.nn.utils.prune.remove or remove_spectral_norm first"
        )
    if "weight_g" in module._parameters:
        return "is computed by weight_norm: call torch.nn.utils.remove_weight_norm first"
    if module._parameters.get("weight") is None:
        return f"is not a parameter of this {type(module).__name__}"
    return None


def _refuse_unusable(place: _Place) -> None:
    if isinstance(place.module, PRUNABLE_TYPES) and (why := _parametrized(place.module)):
        raise ValueError(f"{place.name}: the weight {why}")
    if parametrize.is_parametrized(place.module, place.attribute):
        raise ValueError(f"{place.name}: the parameter {_PARAMETRIZED}")
    weight = getattr(place.module, place.attribute)
    if isinstance(weight, nn.parameter.UninitializedParameter):
        raise ValueError(f"{place.name}: not initialized yet: run the model once first")
    if weight.dtype not in _FLOATS:
        raise ValueError(
            f"{place.name}: expected float32, float64, bfloat16 or float16, got {weight.dtype}"
        )
    if weight.device.type == "meta":
        raise ValueError(f"{place.name}: on the meta device: it has no data")


def _aliases(model: nn.Module, names: set[str]) -> set[str]:
    """``names`` and every other name of the same parameters: excluding one name excludes all."""
    every = dict(model.named_parameters(remove_duplicate=False))
    identities = {id(every[n]) for n in names if n in every}
    return names | {n for n, p in every.items() if id(p) in identities}


def _show(selector: Selector) -> str:
    return repr(selector) if isinstance(selector, str) else selector.__name__
