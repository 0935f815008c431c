"""Recipes as trainings: one job for each network, method, sparsity and seed, shared where equal."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bench.recipes.recipe import Recipe
from bench.recipes.schema import RecipeError
from bench.recipes.train import DYNAMIC, ITERATIVE, OPTIONS, decays, ramp_steps

_RAMPED = ("dpf", "incremental", "sfp")
_MASK_OPTIONS = ("every", "schedule")
FILTERS = ("case", "method", "sparsity", "seed", "dataset", "model")


@dataclass(frozen=True)
class Job:
    """One training.

    Attributes:
        name: of its folder; equal settings have equal names.
        settings: dataset, model, method, sparsity, seed and options, as ``train.command`` takes
            them.
        after: the job whose final masks it trains with.
    """

    name: str
    settings: Mapping[str, Any]
    after: str | None = None


@dataclass(frozen=True)
class Cell:
    """A place in a recipe's table, and the job that fills it.

    Attributes:
        case, method: keys in the recipe; sparsity: None for dense and iterative methods.
        phase: the phase of the training that is read; None: the last.
    """

    case: str
    method: str
    sparsity: float | None
    seed: int
    job: Job
    phase: str | None = None


def expand(recipe: Recipe, seeds: int | None = None, only: Sequence[str] = ()) -> list[Cell]:
    """All cells of a recipe, in the order of cases, methods, sparsities and seeds.

    Args:
        seeds: 1 .. seeds are used; None: as many as the recipe says.
        only: filters such as ``method=dpf`` and ``sparsity=0.9,0.95``; all must hold.
    Raises:
        RecipeError: a filter is none of ``FILTERS``, or leaves nothing.
    """
    wanted = _filters(only)
    cells = [
        cell
        for key, case in recipe.cases.items()
        for method in case.get("methods", recipe.methods)
        for sparsity in _sparsities(recipe, case, method)
        for seed in range(1, (seeds or case["seeds"]) + 1)
        if _matches(cell := _cell(recipe, key, case, method, sparsity, seed), wanted)
    ]
    if not cells:
        raise RecipeError(f"{recipe.name}: --only {' '.join(only)} leaves nothing")
    return cells


def jobs_of(cells: Iterable[Cell], recipe: Recipe) -> list[Job]:
    """The different jobs behind cells, each after the one that it waits for."""
    found: dict[str, Job] = {}
    for cell in cells:
        if cell.job.after is not None and cell.job.after not in found:
            found[cell.job.after] = _source(recipe, cell)
        found.setdefault(cell.job.name, cell.job)
    return list(found.values())


def _filters(only: Sequence[str]) -> dict[str, set[str]]:
    wanted: dict[str, set[str]] = {}
    for text in only:
        key, _, values = text.partition("=")
        if key not in FILTERS or not values:
            raise RecipeError(f"--only {text}: expected one of {', '.join(FILTERS)}=VALUE[,VALUE]")
        wanted.setdefault(key, set()).update(values.split(","))
    return wanted


def _matches(cell: Cell, wanted: Mapping[str, set[str]]) -> bool:
    have = {
        "case": cell.case,
        "method": cell.method,
        "sparsity": None if cell.sparsity is None else f"{cell.sparsity:g}",
        "seed": str(cell.seed),
        "dataset": cell.job.settings["dataset"],
        "model": cell.job.settings["model"],
    }
    return all(have[key] is None or have[key] in values for key, values in wanted.items())


def _sparsities(recipe: Recipe, case: Mapping[str, Any], key: str) -> list[float | None]:
    method = recipe.methods[key]
    kind = _root(recipe, key).get("method", key)
    if kind == "dense" or kind in ITERATIVE:
        return [None]
    own = case.get("sparsities")
    if recipe.reduced or "sparsities" not in method:
        return list(own or method["sparsities"])
    return [s for s in method["sparsities"] if own is None or s in own]


def _root(recipe: Recipe, key: str) -> dict[str, Any]:
    """The method whose training a method reads."""
    method = recipe.methods[key]
    source = method.get("reads")
    return method if source is None else {"method": source, **recipe.methods[source]}


def _cell(
    recipe: Recipe,
    key: str,
    case: Mapping[str, Any],
    method: str,
    sparsity: float | None,
    seed: int,
) -> Cell:
    source = recipe.methods[method].get("reads")
    job = _job(recipe, case, source or method, sparsity, seed)
    return Cell(key, method, sparsity, seed, job, None if source is None else "train")


def _source(recipe: Recipe, cell: Cell) -> Job:
    source = recipe.methods[cell.method]["masks-from"]
    return _job(recipe, recipe.cases[cell.case], source, cell.sparsity, cell.seed)


def _job(
    recipe: Recipe, case: Mapping[str, Any], key: str, sparsity: float | None, seed: int
) -> Job:
    method = recipe.methods[key]
    kind = method.get("method", key)
    # Shares of training and options of methods hold for the reduced form too.
    own = dict(method)
    if recipe.reduced:
        for name in ("epochs", "rounds"):
            own.pop(name, None)
        if "finetune-epochs" in own:
            full = case["full-epochs"]
            own["finetune-epochs"] = recipe.scaled(own["finetune-epochs"], full, case["epochs"])
    merged = {"finetune-epochs": 0, **case, **own}
    if kind not in ITERATIVE:
        merged.pop("rounds", None)
    if kind not in DYNAMIC:
        for name in _MASK_OPTIONS:
            merged.pop(name, None)
    settings: dict[str, Any] = {
        "dataset": merged["dataset"],
        "model": merged["model"],
        "method": kind,
        "sparsity": sparsity,
        "seed": seed + method.get("seed-shift", 0),
    }
    settings |= {name: merged[name] for name in (*OPTIONS, "augment") if name in merged}
    if kind in _RAMPED and "ramp-end" in merged:
        falls = decays(merged["lr-schedule"])
        # The training's own default is the second decay.
        if merged["ramp-end"] != (falls[1] if len(falls) > 1 else 0.75):
            settings["ramp-steps"] = ramp_steps(merged)
    after = None
    if "masks-from" in method:
        after = _job(recipe, case, method["masks-from"], sparsity, seed).name
        settings["masks"] = after
    return Job(_name(settings), settings, after)


def _name(settings: Mapping[str, Any]) -> str:
    """A folder's name, from what the training's result depends on."""
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:8]
    parts = [settings["dataset"], settings["model"], settings["method"]]
    if settings["sparsity"] is not None:
        parts.append(f"{100 * settings['sparsity']:g}%".replace("%", "pc"))
    parts += [f"e{settings['epochs']}", f"seed{settings['seed']}", digest]
    return "-".join(parts)
