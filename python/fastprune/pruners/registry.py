"""Method names."""

from __future__ import annotations

from typing import Any

from fastprune.pruners.base import Pruner
from fastprune.pruners.force import FORCE, GraSPIt, IterSNIP
from fastprune.pruners.grasp import GraSP
from fastprune.pruners.lamp import LAMP
from fastprune.pruners.magnitude import Magnitude
from fastprune.pruners.random import Random
from fastprune.pruners.snip import SNIP
from fastprune.pruners.synflow import SynFlow

PRUNERS: dict[str, type[Pruner]] = {
    p.name: p for p in (Random, Magnitude, LAMP, SNIP, GraSP, SynFlow, FORCE, IterSNIP, GraSPIt)
}


def methods() -> list[str]:
    """Names that ``prune`` and ``score`` take as ``method``."""
    return list(PRUNERS)


def make_pruner(method: str | Pruner | type[Pruner], options: dict[str, Any]) -> Pruner:
    """The pruner called ``method``, with those of ``options`` that are not None.

    Args:
        method: a name (case, hyphens and underscores do not matter), a :class:`Pruner` subclass,
            or an instance, which has its options already.
        options: argument name -> value; None means not given.
    Raises:
        ValueError: unknown name, or an option that the method does not use.
        TypeError: ``method`` is none of the above.
    """
    given = {name: value for name, value in options.items() if value is not None}
    if isinstance(method, Pruner):
        if given:
            raise ValueError(
                f"{', '.join(given)}: not used when method is an instance; set it on {method!r}"
            )
        return method
    kind = _find(method) if isinstance(method, str) else method
    if not (isinstance(kind, type) and issubclass(kind, Pruner)):
        raise TypeError(f"method: expected a name or a Pruner, got {method!r}")
    for option in given:
        if option not in kind.options:
            raise ValueError(f"{option}: the method {kind.name or kind.__name__} does not use it")
    return kind(**given)


def _find(name: str) -> type[Pruner]:
    wanted = folded(name)
    for known, kind in PRUNERS.items():
        if folded(known) == wanted:
            return kind
    raise ValueError(f"method: unknown name {name!r}; expected one of {', '.join(PRUNERS)}")


def folded(name: str) -> str:
    """``name`` without what does not matter in it."""
    return name.lower().replace("-", "").replace("_", "")
