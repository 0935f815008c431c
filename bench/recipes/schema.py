"""What a recipe's TOML may hold: every key and its shape. An unknown key is an error."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from typing import Any

from bench.recipes.measures import MEASURES

Check = Callable[[Any], bool]


class RecipeError(ValueError):
    """A recipe is wrong; the message says where."""


def _number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _fraction(value: Any) -> bool:
    return _number(value) and 0 <= value < 1


def _positive(value: Any) -> bool:
    return _number(value) and value > 0


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _count(value: Any) -> bool:
    return value == 0 or _whole(value)


def _text(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _flag(value: Any) -> bool:
    return isinstance(value, bool)


def _list(check: Check) -> Check:
    return lambda value: isinstance(value, list) and bool(value) and all(map(check, value))


def _either(*allowed: str) -> Check:
    return lambda value: value in allowed


def _rising(value: Any) -> bool:
    return _list(_fraction)(value) and value == sorted(set(value))


def cell(value: Any) -> bool:
    """A number of a paper: mean, [mean, deviation], "*" (no convergence) or "-" (missing)."""
    if isinstance(value, list):
        return len(value) == 2 and all(map(_number, value)) and value[1] >= 0
    return value in ("*", "-") or _number(value)


# How a network is trained: in [protocol], and where it differs, in a case or a method.
TRAINING: dict[str, Check] = {
    "dataset": _text,
    "batch": _whole,
    "optimizer": _either("sgd", "adam"),
    "momentum": _fraction,
    "lr": _positive,
    "lr-schedule": _text,
    "weight-decay": lambda v: _number(v) and v >= 0,
    "epochs": _whole,
    "finetune-epochs": _count,
    "finetune-lr": _positive,
    "augment": _flag,
    "kernels": _either("measured", "dense", "sparse"),
    "ramp-end": lambda v: _positive(v) and v <= 1,
    "rounds": _whole,
}
AXES: dict[str, Check] = {"sparsities": _rising, "seeds": _whole, "methods": _list(_text)}
CASE: dict[str, Check] = {**TRAINING, **AXES, "model": _text, "label": _text, "figure": _text}
METHOD: dict[str, Check] = {
    **TRAINING,
    "sparsities": _rising,
    "method": _text,
    "label": _text,
    "note": _text,
    "every": _whole,
    "schedule": _either("cubic", "linear", "exponential", "constant"),
    "scope": _either("global", "layer", "neuron", "filter"),
    "quota": _text,
    "include": _text,
    "score-batches": _whole,
    "p": _positive,
    "q": _positive,
    "eta-r": lambda v: _number(v) and v >= 0,
    "gamma": lambda v: _number(v) and v >= 0,
    "beta": _fraction,
    # The same training as another method's, read at the end of its first phase.
    "reads": _text,
    # Trained with the masks that another method ended with; "seed-shift": from other weights.
    "masks-from": _text,
    "seed-shift": _count,
}
REDUCED: dict[str, Check] = {
    **TRAINING,
    **AXES,
    "cases": _list(_text),
    "model": _text,
    "every": _whole,
}
# "order": best first; of weights left, MACs and times the smallest first.
CLAIM: dict[str, Check] = {
    "text": _text,
    "order": lambda v: _list(_text)(v) and len(v) >= 2,
    "sparsity": _fraction,
    "case": _text,
    "measure": lambda v: v in MEASURES,
}
NUMBERS: dict[str, Check] = {
    "case": _text,
    "sparsity": _fraction,
    "measure": _text,  # also what the runs cannot measure, such as top-5 accuracy
}
TOP: dict[str, Check] = {
    "title": _text,
    "paper": _either("001", "004", "none"),
    "covers": lambda v: isinstance(v, list) and all(map(_text, v)),
    "measures": lambda v: _list(_text)(v) and all(m in MEASURES for m in v),
    "notes": _list(_text),
    "findings": _list(_text),
    "protocol": lambda v: isinstance(v, dict),
    "cases": lambda v: isinstance(v, dict) and bool(v),
    "methods": lambda v: isinstance(v, dict) and bool(v),
    "reduced": lambda v: isinstance(v, dict),
    "numbers": _list(lambda v: isinstance(v, dict)),
    "claims": _list(lambda v: isinstance(v, dict)),
}
REQUIRED = ("title", "paper", "covers", "measures", "protocol", "cases", "methods")


def check_table(where: str, table: Mapping[str, Any], known: Mapping[str, Check]) -> None:
    """Raise RecipeError unless all keys are known and their values have the right shape."""
    for key, value in table.items():
        if key not in known:
            close = difflib.get_close_matches(key, known, n=1)
            hint = f", did you mean {close[0]!r}?" if close else ""
            raise RecipeError(f"{where}: unknown key {key!r}{hint}")
        if not known[key](value):
            raise RecipeError(f"{where}: {key} = {value!r} has the wrong type or range")


def check(name: str, document: Mapping[str, Any]) -> None:
    """Check a recipe's shape; names of models, methods and data sets are checked in ``recipe``.

    Raises:
        RecipeError: the first thing that is wrong.
    """
    check_table(name, document, TOP)
    for key in REQUIRED:
        if key not in document:
            raise RecipeError(f"{name}: {key} is missing")
    check_table(f"{name}: [protocol]", document["protocol"], {**TRAINING, **AXES})
    check_table(f"{name}: [reduced]", document.get("reduced", {}), REDUCED)
    for group, known in (("cases", CASE), ("methods", METHOD)):
        for key, table in document[group].items():
            if not isinstance(table, dict):
                raise RecipeError(f"{name}: [{group}.{key}] is no table")
            check_table(f"{name}: [{group}.{key}]", table, known)
    methods = document["methods"]
    cells: dict[str, Check] = {**NUMBERS, **dict.fromkeys(methods, cell)}
    for number, row in enumerate(document.get("numbers", []), 1):
        where = f"{name}: numbers, row {number}"
        check_table(where, row, cells)
        if not any(m in row for m in methods):
            raise RecipeError(f"{where}: holds no number")
    for number, claim in enumerate(document.get("claims", []), 1):
        check_table(f"{name}: claims, row {number}", claim, CLAIM)
        if "text" not in claim:
            raise RecipeError(f"{name}: claims, row {number}: text is missing")
