"""Quotas by formula: each says which share of every layer to prune, from the layers' shapes alone.

A quota takes the weights' shapes and the sparsity of the whole network, and returns one sparsity
per layer, unrounded. All here meet Definition 1 of paper 003 wherever they return: the layers'
sparsities, weighted by their sizes, add up to the network's (to less than one weight), and below
sparsity 1 no layer is at 1. :func:`fastprune.quotas.counts` turns them into whole numbers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Literal, TypeAlias

from fastprune.checks import fraction, whole

Shapes: TypeAlias = Sequence[Sequence[int]]
QuotaFunction: TypeAlias = Callable[[Shapes, float], Sequence[float]]
OnInvalid: TypeAlias = Literal["redistribute", "error"]

ON_INVALID = ("redistribute", "error")
LAST_LINEAR = 0.8
"""The most that ``uniform_plus`` prunes of the last linear layer."""

# A density of less than half an ulp of 1 must not round to "the whole layer goes".
_BELOW_ONE = math.nextafter(1.0, 0.0)


def uniform(shapes: Shapes, sparsity: float) -> list[float]:
    """The same sparsity in every layer.

    Args:
        shapes: L >= 1 weight shapes, of at least one dimension each; sizes of 0 are legal.
        sparsity: pruned fraction of all weights, in [0, 1].
    Returns:
        L sparsities.
    Raises:
        ValueError: an argument is out of range; the message names it.
    Paper: 003, section 4.
    """
    sizes, sparsity = _checked(shapes, sparsity)
    return [sparsity] * len(sizes)


def uniform_plus(shapes: Shapes, sparsity: float) -> list[float]:
    """Uniform, but the first convolution dense and the last linear layer at most 80 % pruned.

    A weight of two dimensions is a linear layer's, one of three or more a convolution's. A rule
    for a kind of layer that the network lacks has no effect.

    Args:
        shapes, sparsity: as :func:`uniform`.
    Returns:
        L sparsities: 0 for the first convolution, at most 0.8 for the last linear layer, and one
        and the same for all others.
    Raises:
        ValueError: an argument is out of range, or the sparsity is out of reach: it would empty
            the other layers, or there are none. The message says what can be reached.
    Paper: 003, section 4 (Gale et al. 2019).
    """
    sizes, sparsity = _checked(shapes, sparsity)
    dims = [len(shape) for shape in shapes]
    first = next((i for i, d in enumerate(dims) if d > 2), None)
    last = next((i for i in reversed(range(len(dims))) if dims[i] == 2), None)
    total = sum(sizes)
    dense = 0 if first is None else sizes[first]
    capped = 0 if last is None else sizes[last]
    free = total - dense - capped
    pruned = sparsity * total
    common = pruned / (free + capped) if free + capped else 0.0
    # One rounding of the division must not push the last layer past its bound.
    if last is not None and capped and common > LAST_LINEAR * (1 + 1e-12):
        common = (pruned - LAST_LINEAR * capped) / free if free else math.inf
    out_of_reach = common >= 1.0 and dense + capped > 0  # 1 is legal where nothing is protected
    if out_of_reach or (pruned > 0 and free + capped == 0):
        reachable = (free + LAST_LINEAR * capped) / total
        bound = "less than" if free else "at most"
        raise ValueError(
            f"sparsity: uniform_plus keeps the first convolution and {1 - LAST_LINEAR:.0%} of the "
            f"last linear layer, so expected {bound} {reachable:.6g} here, got {sparsity!r}"
        )
    quotas = [min(common, 1.0)] * len(sizes)
    if first is not None:
        quotas[first] = 0.0
    if last is not None:
        quotas[last] = min(quotas[last], LAST_LINEAR) if capped else 0.0
    return quotas


def erk(shapes: Shapes, sparsity: float, *, on_invalid: OnInvalid = "redistribute") -> list[float]:
    """Erdos-Renyi-Kernel: density proportional to (sum of dimensions) / (product of dimensions).

    Args:
        shapes, sparsity: as :func:`uniform`.
        on_invalid: where densities would pass 1. ``redistribute``: those layers are dense, and the
            densities of the others are scaled again, until none passes 1. ``error``: an error.
    Returns:
        L sparsities.
    Raises:
        ValueError: an argument is out of range; a density would pass 1 and ``on_invalid`` is
            ``error`` (the message names the layers by index and shape).
    Paper: 003, section 4 (Mocanu et al. 2018; Evci et al. 2020).
    """
    sizes, sparsity = _checked(shapes, sparsity)
    wanted = [sum(s) / n if n else 1.0 for s, n in zip(shapes, sizes, strict=True)]
    return _proportional("erk", wanted, shapes, sizes, sparsity, on_invalid)


def smart_ratio(
    shapes: Shapes, sparsity: float, *, on_invalid: OnInvalid = "redistribute"
) -> list[float]:
    """Smart-Ratios: density of layer l of L proportional to (L - l + 1)^2 + (L - l + 1).

    l counts from 1, in the order of ``shapes``. Arguments, result and errors as :func:`erk`.
    Paper: 003, section 4 (Su et al. 2020).
    """
    sizes, sparsity = _checked(shapes, sparsity)
    places = range(len(sizes), 0, -1)
    wanted = [float(p * p + p) for p in places]
    return _proportional("smart_ratio", wanted, shapes, sizes, sparsity, on_invalid)


def igq(shapes: Shapes, sparsity: float) -> list[float]:
    """Ideal Gas Quotas: layer l of n_l weights keeps 1 / (F n_l + 1) of them.

    The force F >= 0 is found by bisection, to the last bit of a float64, so that the network as a
    whole has the sparsity asked for. Valid for every sparsity, and monotone in it layer by layer;
    larger layers are pruned more.

    Args:
        shapes, sparsity: as :func:`uniform`.
    Returns:
        L sparsities, s_l = 1 - 1 / (F n_l + 1); all 0 at sparsity 0, all 1 at sparsity 1.
    Raises:
        ValueError: an argument is out of range.
    Paper: 003, section 4, "Ideal Gas Quotas". About 60 sums over the layers.
    """
    sizes, sparsity = _checked(shapes, sparsity)
    largest, least = max(sizes), min((n for n in sizes if n), default=0)
    if sparsity in (0.0, 1.0) or not largest:
        return [sparsity] * len(sizes)

    def pressures(force: float) -> list[float]:
        return [force * (n / largest) for n in sizes]

    def too_weak(force: float) -> bool:
        # What is pruned is added up, or what is kept: the smaller of the two, to lose no digits.
        if sparsity <= 0.5:
            pruned = math.fsum(
                n * _squeezed(x) for n, x in zip(sizes, pressures(force), strict=True)
            )
            return pruned < sparsity * sum(sizes)
        kept = math.fsum(n / (1.0 + x) for n, x in zip(sizes, pressures(force), strict=True))
        return kept > (1.0 - sparsity) * sum(sizes)

    # The sparsity of the whole lies between those of the least and of the largest layer. The
    # force is in units of 1 / largest, so that nothing overflows or underflows.
    low = sparsity / (1.0 - sparsity) / 2
    high = 4 * low * (largest / least)
    while True:
        middle = math.sqrt(low) * math.sqrt(high) if high > 2 * low else low + (high - low) / 2
        if not low < middle < high:
            break
        low, high = (middle, high) if too_weak(middle) else (low, middle)
    return [min(_squeezed(x), _BELOW_ONE) for x in pressures(high)]


def _squeezed(pressure: float) -> float:
    """1 - 1 / (x + 1), accurate for small x too, and monotone as computed."""
    return 1.0 / (1.0 + 1.0 / pressure) if pressure > 1e-300 else pressure


def check_on_invalid(on_invalid: object) -> None:
    """Refuse what is neither ``redistribute`` nor ``error``."""
    if on_invalid not in ON_INVALID:
        raise ValueError(f"on_invalid: expected one of {', '.join(ON_INVALID)}, got {on_invalid!r}")


def _proportional(
    quota: str,
    wanted: Sequence[float],
    shapes: Shapes,
    sizes: Sequence[int],
    sparsity: float,
    on_invalid: OnInvalid,
) -> list[float]:
    """Sparsities 1 - min(1, c w_l), the one c such that the total is right; every w_l > 0."""
    check_on_invalid(on_invalid)
    # What the dense layers leave is exact: large layers may take all but a millionth.
    budget = (1 - Fraction(sparsity)) * sum(sizes)
    filled = [i for i, n in enumerate(sizes) if n]
    layers, scale = filled, 0.0
    while layers:
        left = budget - sum(n for i, n in enumerate(sizes) if i not in layers)
        scale = max(float(left), 0.0) / math.fsum(sizes[i] * wanted[i] for i in layers)
        # A density of 1 that rounding has put beside 1 is dense either way.
        over = [i for i in layers if scale * wanted[i] > 1.0 + 1e-12]
        if over and on_invalid == "error":
            found = ", ".join(
                f"layer {i} of shape {tuple(shapes[i])} {scale * wanted[i]:.4g}" for i in over
            )
            raise ValueError(
                f"sparsity: at {sparsity!r}, {quota} asks for densities above 1: {found}; "
                "on_invalid='redistribute' makes these layers dense and scales the others"
            )
        if not over:
            break
        layers = [i for i in layers if i not in over]
    quotas = [0.0] * len(sizes)
    for i in layers if sparsity > 0.0 else ():
        density = min(scale * wanted[i], 1.0)
        quotas[i] = min(1.0 - density, _BELOW_ONE) if sparsity < 1.0 else 1.0
    return quotas


def _checked(shapes: Shapes, sparsity: float) -> tuple[list[int], float]:
    """Sizes of the layers, and the sparsity as a float."""
    given: object = shapes
    if isinstance(given, str) or not isinstance(given, Sequence):
        raise TypeError(f"shapes: expected a sequence of weight shapes, got {type(given).__name__}")
    if not given:
        raise ValueError("shapes: expected at least one weight shape, got none")
    sizes = []
    for i, shape in enumerate(given):
        if isinstance(shape, str) or not isinstance(shape, Sequence) or len(shape) == 0:
            raise ValueError(
                f"shapes[{i}]: expected a weight shape of at least one dimension, got {shape!r}"
            )
        sizes.append(math.prod(whole(d, f"shapes[{i}]", 0, None) for d in shape))
    return sizes, fraction(sparsity, "sparsity")
