"""Recipes: read, checked, and reduced to what a small machine trains in seconds."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tomllib

from bench.recipes.schema import RecipeError, check
from bench.recipes.train import ITERATIVE, METHODS, decays

TABLES = Path(__file__).parent / "tables"

# What a reduced recipe trains where it does not say otherwise. The schedules are fractions of
# training, so they scale by themselves; fine-tuning keeps its share of the epochs.
REDUCED: dict[str, Any] = {
    "dataset": "digits",
    "epochs": 4,
    "batch": 64,
    "lr": 0.05,
    "rounds": 3,
    "sparsities": [0.9],
    "seeds": 1,
}
SMALL = {"linear": "linear", "mlp": "mlp"}
SMALL_OTHER = "vgg-small"


@dataclass(frozen=True)
class Recipe:
    """One TOML file.

    Attributes:
        name: the file's stem.
        document: its content, as checked.
        reduced: whether cases and protocol are those of the reduced form.
    """

    name: str
    document: Mapping[str, Any] = field(repr=False)
    reduced: bool = False

    @property
    def title(self) -> str:
        """One line."""
        return str(self.document["title"])

    @property
    def covers(self) -> list[str]:
        """Tables and figures of the paper."""
        return list(self.document["covers"])

    @property
    def measures(self) -> list[str]:
        """Names in ``MEASURES``; the first is the one that methods are ranked by."""
        return list(self.document["measures"])

    @property
    def methods(self) -> dict[str, dict[str, Any]]:
        """By key."""
        return dict(self.document["methods"])

    @property
    def protocol(self) -> dict[str, Any]:
        """What cases and methods do not override."""
        return dict(self.document["protocol"])

    @property
    def cases(self) -> dict[str, dict[str, Any]]:
        """Networks on data sets, by key: the protocol with what the case overrides.

        Reduced, one case stands for all that would train the same small network.
        """
        full = {k: {"model": k, **self.protocol, **c} for k, c in self.document["cases"].items()}
        if not self.reduced:
            return full
        own = dict(self.document.get("reduced", {}))
        chosen = own.pop("cases", list(full))
        made: dict[str, dict[str, Any]] = {}
        seen = set()
        for key in chosen:
            case = self._reduce(full[key], own)
            if "cases" in self.document.get("reduced", {}) or case["model"] not in seen:
                seen.add(case["model"])
                made[key] = case
        return made

    def _reduce(self, case: dict[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
        small = {**REDUCED, "model": SMALL.get(case["model"], SMALL_OTHER), **own}
        if "rounds" not in case and not self._iterates():
            small.pop("rounds")
        if "sparsities" not in case:
            small.pop("sparsities")
        if "finetune-epochs" in case:
            tuning = self.scaled(case["finetune-epochs"], case["epochs"], small["epochs"])
            small.setdefault("finetune-epochs", tuning)
        reduced = {**case, **small, "full-epochs": case["epochs"]}
        return {k: v for k, v in reduced.items() if k not in ("every", "augment")}

    def _iterates(self) -> bool:
        return any(m.get("method", k) in ITERATIVE for k, m in self.methods.items())

    @staticmethod
    def scaled(epochs: int, of: int, to: int) -> int:
        """Epochs of fine-tuning that are the same share of ``to`` as of ``of``, at least one."""
        return 0 if epochs == 0 else max(1, round(epochs * to / of))

    def label(self, method: str) -> str:
        """A method's name in tables."""
        return str(self.methods[method].get("label", method))

    def numbers(self, case: str, measure: str, sparsity: float | None) -> dict[str, Any]:
        """The paper's numbers by method key; without sparsity those that have none (dense)."""
        found: dict[str, Any] = {}
        for row in self.document.get("numbers", []):
            same = (row.get("case"), row.get("measure", self.measures[0])) == (case, measure)
            if same and row.get("sparsity") == sparsity:
                found |= {k: v for k, v in row.items() if k in self.methods}
        return found


def names() -> list[str]:
    """Names of the recipes, in a fixed order."""
    return sorted(path.stem for path in TABLES.glob("*.toml"))


def load(name: str, *, reduced: bool = False) -> Recipe:
    """A recipe by name, or by the path of a TOML file.

    Raises:
        RecipeError: there is none, or it is wrong.
    """
    path = Path(name) if name.endswith(".toml") else TABLES / f"{name}.toml"
    if not path.is_file():
        raise RecipeError(f"no recipe {name!r}; known: {', '.join(names())}")
    try:
        document = tomllib.loads(path.read_text(encoding="utf-8"))
    except tomllib.TOMLDecodeError as error:
        raise RecipeError(f"{path.name}: {error}") from error
    check(path.stem, document)
    recipe = Recipe(path.stem, document, reduced)
    for problem in _problems(Recipe(path.stem, document)):
        raise RecipeError(f"{path.stem}: {problem}")
    return recipe


def _problems(recipe: Recipe) -> Iterator[str]:
    """What the shapes of the values do not show."""
    import fastprune

    methods = recipe.methods
    for key, method in methods.items():
        if method.get("method", key) not in METHODS:
            yield f"[methods.{key}]: no method {method.get('method', key)!r}"
        for link in ("reads", "masks-from"):
            if link in method and method[link] not in methods:
                yield f"[methods.{key}]: {link}: no method {method[link]!r} in this recipe"
        if "p" in method and method["p"] >= method.get("q", float("inf")):
            yield f"[methods.{key}]: p is not below q"
    for key, case in recipe.cases.items():
        where = f"[cases.{key}]"
        if case["model"] not in fastprune.models.names():
            yield f"{where}: no model {case['model']!r}"
        if case.get("dataset") not in fastprune.data.names():
            yield f"{where}: no data set {case.get('dataset')!r}"
        for needed in ("batch", "epochs", "lr", "lr-schedule", "weight-decay", "seeds"):
            if needed not in case:
                yield f"{where}: {needed} is missing"
        for method in case.get("methods", methods):
            if method not in methods:
                yield f"{where}: no method {method!r} in this recipe"
                continue
            kind = methods[method].get("method", method)
            needs = "rounds" if kind in ITERATIVE else "sparsities"
            if kind != "dense" and needs not in {**case, **methods[method]}:
                yield f"{where}: {method} needs {needs}"
        try:
            decays(case["lr-schedule"])
        except ValueError as error:
            yield f"{where}: {error}"
    cases = recipe.document["cases"]
    for row in [*recipe.document.get("numbers", []), *recipe.document.get("claims", [])]:
        if "case" in row and row["case"] not in cases:
            yield f"no case {row['case']!r}"
        for method in row.get("order", []):
            if method not in methods:
                yield f"claims: no method {method!r} in this recipe"
    for case in recipe.document.get("reduced", {}).get("cases", []):
        if case not in cases:
            yield f"[reduced]: no case {case!r}"
