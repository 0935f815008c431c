"""What was measured beside what the paper says, as one document of plain values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from bench.recipes import compare
from bench.recipes.jobs import Cell, jobs_of
from bench.recipes.measures import MEASURES
from bench.recipes.recipe import Recipe
from bench.recipes.results import Results, Summary


def document(recipe: Recipe, cells: Sequence[Cell], results: Results) -> dict[str, Any]:
    """Everything that a report shows.

    Args:
        cells: of the recipe, as run; results: of their jobs.
    Returns:
        For JSON. ``tables`` has one entry for each case and measure: ``rows`` at a sparsity or, in
        recipes of rounds alone, after a number of prunings; a row's ``cells`` by method.
    """
    tables = [
        _table(recipe, case, measure, cells, results)
        for case in recipe.cases
        for measure in recipe.measures
        if any(c.case == case for c in cells)
    ]
    jobs: dict[str, Any] = {}
    machines: list[dict[str, Any]] = []
    for job in jobs_of(cells, recipe):
        found = results.status(job.name)
        jobs[job.name] = {"state": found["state"], "message": found.get("message", "")}
        if found.get("machine") and found["machine"] not in machines:
            machines.append(found["machine"])
    return {
        "recipe": recipe.name,
        "title": recipe.title,
        "paper": recipe.document["paper"],
        "covers": recipe.covers,
        "reduced": recipe.reduced,
        "notes": recipe.document.get("notes", []),
        "findings": recipe.document.get("findings", []),
        "methods": {m: recipe.label(m) for m in recipe.methods},
        "machines": machines,
        "tables": tables,
        "claims": _claims(recipe, cells, results),
        "jobs": jobs,
    }


def _methods(recipe: Recipe, case: str, cells: Sequence[Cell]) -> list[str]:
    present = {c.method for c in cells if c.case == case}
    return [m for m in recipe.methods if m in present]


def _of(cells: Sequence[Cell], case: str, method: str, sparsity: float | None) -> list[Cell]:
    """The seeds of a place in the table; dense and iterative trainings serve every sparsity."""
    return [
        c for c in cells if (c.case, c.method) == (case, method) and c.sparsity in (None, sparsity)
    ]


def _table(
    recipe: Recipe, case: str, measure: str, cells: Sequence[Cell], results: Results
) -> dict[str, Any]:
    own = recipe.cases[case]
    methods = _methods(recipe, case, cells)
    mine = [c for c in cells if c.case == case]
    places: list[float | int | None] = list(_sparsities(recipe, case, mine))
    by_round = not places
    if by_round:
        places = list(range(results.rounds(mine) + 1))
    rows = []
    for at in places:
        summaries = {
            m: results.summary(_of(cells, case, m, None if by_round else at), measure, at)
            for m in methods
        }
        rows.append(_row(recipe, case, measure, at, by_round, summaries))
    return {
        "case": case,
        "label": own.get("label", case),
        "figure": own.get("figure", ""),
        "trained": f"{own['model']} on {own['dataset']}, {own['epochs']} epochs",
        "measure": measure,
        "unit": MEASURES[measure].label,
        "by": "round" if by_round else "sparsity",
        "rows": rows,
    }


def _sparsities(recipe: Recipe, case: str, cells: Sequence[Cell]) -> list[float]:
    asked = {c.sparsity for c in cells if c.sparsity is not None}
    # Without a method of one sparsity, an iterative one is still read at those of the case.
    return sorted(asked) if asked else list(recipe.cases[case].get("sparsities", []))


def _row(
    recipe: Recipe,
    case: str,
    measure: str,
    at: float | int | None,
    by_round: bool,
    summaries: Mapping[str, Summary],
) -> dict[str, Any]:
    sign = compare.sign_of(measure)
    paper = {} if by_round else recipe.numbers(case, measure, at)
    paper = {**recipe.numbers(case, measure, None), **paper}
    found: dict[str, Any] = {}
    for method, summary in summaries.items():
        said = paper.get(method)
        mean = said[0] if isinstance(said, list) else said
        difference = None
        if isinstance(mean, (int, float)) and summary.mean is not None:
            difference = summary.mean - mean
        found[method] = {
            **summary.to_dict(),
            "converged": summary.converged,
            "paper": said,
            "difference": difference,
        }
    here = {m: n for m, s in summaries.items() if (n := compare.of_summary(s, sign)) is not None}
    theirs = {m: n for m in summaries if (n := compare.of_paper(paper.get(m), sign)) is not None}
    return {
        "round" if by_round else "sparsity": at,
        "cells": found,
        "order": compare.orders(here, theirs) if len(theirs) > 1 else None,
    }


def _claims(recipe: Recipe, cells: Sequence[Cell], results: Results) -> list[dict[str, Any]]:
    out = []
    for claim in recipe.document.get("claims", []):
        order = claim.get("order")
        if order is None:
            out.append({"text": claim["text"], "verdict": "not compared"})
            continue
        cases = [claim["case"]] if "case" in claim else list(recipe.cases)
        for case in cases:
            mine = [c for c in cells if c.case == case]
            places: list[float | None] = list(_sparsities(recipe, case, mine)) or [None]
            if "sparsity" in claim:
                places = [s for s in places if s == claim["sparsity"]]
            for at in places if mine else []:
                out.append(_claim(recipe, case, claim, at, cells, results))
    return out


def _claim(
    recipe: Recipe,
    case: str,
    claim: Mapping[str, Any],
    at: float | None,
    cells: Sequence[Cell],
    results: Results,
) -> dict[str, Any]:
    measure = claim.get("measure", recipe.measures[0])
    sign = compare.sign_of(measure)
    here = {}
    lone = False
    for method in claim["order"]:
        summary = results.summary(_of(cells, case, method, at), measure, at)
        number = compare.of_summary(summary, sign)
        if number is not None:
            here[method] = number
            lone |= len(summary.values) == 1
    found = compare.claim(claim["order"], here)
    if lone and len(here) > 1:
        found["verdict"] += ", by one seed"
    return {
        "text": claim["text"],
        "case": recipe.cases[case].get("label", case),
        "sparsity": at,
        "measure": measure,
        "order": list(claim["order"]),
        **found,
    }
