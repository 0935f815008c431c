"""What the subcommands share: errors, arguments, methods by name, files."""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import os
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastprune.masks import Masks
from fastprune.pruners import prune
from fastprune.pruners.registry import PRUNERS

Batch = tuple[Tensor, Tensor]


class UsageError(Exception):
    """Something that the user can put right: printed on one line, exit code 2."""

    def __str__(self) -> str:
        return " ".join(super().__str__().split())


class InterruptedRunError(Exception):
    """Ctrl-C, after everything finished so far has been written; says where."""


@contextmanager
def usage_errors(
    kinds: tuple[type[Exception], ...] = (ValueError, TypeError, OSError, ImportError),
) -> Iterator[None]:
    """Turn exceptions that bad arguments cause into :class:`UsageError`."""
    try:
        yield
    except kinds as error:
        raise UsageError(str(error)) from error


def require(*packages: str) -> None:
    """Check that optional packages are installed, without importing them.

    Raises:
        UsageError: one is not; names the command that installs it.
    """
    missing = [p for p in packages if importlib.util.find_spec(p) is None]
    if missing:
        known = {"sklearn": "scikit-learn"}
        raise UsageError(
            f'needs {" and ".join(known.get(p, p) for p in missing)}: pip install "fastprune[demo]"'
        )


def comma_separated(text: str) -> list[str]:
    """The non-empty parts of a comma-separated argument."""
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if not parts:
        raise argparse.ArgumentTypeError("expected at least one name")
    return parts


def sparsities(text: str) -> list[float]:
    """Comma-separated sparsities, each in [0, 1)."""
    values = []
    for part in comma_separated(text):
        try:
            value = float(part)
        except ValueError:
            value = -1.0
        if not 0 <= value < 1:
            raise argparse.ArgumentTypeError(f"{part!r} is not a fraction in [0, 1), such as 0.9")
        values.append(value)
    return list(dict.fromkeys(values))


def positive_int(text: str) -> int:
    """An integer of at least 1."""
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not an integer >= 1")
    return value


def seed(text: str) -> int:
    """A seed that torch's generators take: an integer in [0, 2**31)."""
    try:
        value = int(text)
    except ValueError:
        value = -1
    if not 0 <= value < 2**31:
        raise argparse.ArgumentTypeError(f"{text!r} is not an integer in [0, 2**31)")
    return value


def positive_float(text: str) -> float:
    """A finite number above 0."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0")
    return value


def known_methods(names: Sequence[str]) -> list[str]:
    """Method names as fastprune spells them; case, hyphens and underscores do not matter."""

    def folded(name: str) -> str:
        return name.lower().replace("-", "").replace("_", "")

    by_key = {folded(name): name for name in PRUNERS}
    for name in names:
        if folded(name) not in by_key:
            raise UsageError(f"unknown method {name!r}; known: {', '.join(PRUNERS)}")
    return list(dict.fromkeys(by_key[folded(name)] for name in names))


def steps_of(method: str, iterative: int | None = None) -> int:
    """How many steps a method runs here.

    ``iterative`` caps the methods that score on data at every step; others keep their default.
    """
    kind = PRUNERS[method]
    if iterative is not None and kind.needs_data:
        return min(kind.default_steps, iterative)
    return kind.default_steps


def prune_at_init(
    model: nn.Module,
    method: str,
    sparsity: float,
    batches: Sequence[Batch],
    loss: Callable[[Tensor, Tensor], Tensor],
    steps: int,
    seed: int,
    quota: str | None = None,
    include: Sequence[str] | None = None,
    exclude: Sequence[str] | None = None,
) -> tuple[Masks, list[str]]:
    """Prune with the arguments that the method uses; random pruning draws from ``seed``.

    A method of one step takes the mean over ``batches``, one of several takes a fresh batch at
    each step, as in paper 002.

    Returns:
        The masks, and the warnings that pruning gave (a layer left empty).
    """
    kind = PRUNERS[method]
    options: dict[str, Any] = {}
    if kind.needs_data:
        options = {"data": list(batches), "loss": loss}
        if steps > 1:
            options["batches_per_step"] = 1
    if "example_input" in kind.options:
        options["example_input"] = batches[0][0]
    if "generator" in kind.options:
        options["generator"] = torch.Generator().manual_seed(seed)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        masks = prune(
            model,
            method,
            sparsity=sparsity,
            steps=steps,
            quota=quota,
            include=include,
            exclude=exclude,
            **options,
        )
    return masks, [str(w.message) for w in caught if issubclass(w.category, UserWarning)]


def fill(args: argparse.Namespace, defaults: Mapping[str, Any]) -> None:
    """Give the options that were not given (None) their defaults."""
    for name, value in defaults.items():
        if getattr(args, name) is None:
            setattr(args, name, value)


def refuse(args: argparse.Namespace, names: Sequence[str], why: str) -> None:
    """Check that options which would have no effect were not given.

    Raises:
        UsageError: one is not None; names it, followed by ``why``.
    """
    given = [f"--{name.replace('_', '-')}" for name in names if getattr(args, name) is not None]
    if given:
        raise UsageError(f"{', '.join(given)}: {why}")


def use_threads(threads: int | None) -> None:
    """Give torch ``threads`` threads; None leaves torch's own choice."""
    if threads is not None:
        torch.set_num_threads(threads)


def writable(path: Path) -> Path:
    """Make the folder of an output file, so that a wrong path fails before the work, not after."""
    with usage_errors((OSError,)):
        path.parent.mkdir(parents=True, exist_ok=True)
    if path.is_dir() or not os.access(path.parent, os.W_OK):
        raise UsageError(f"cannot write to {str(path)!r}")
    return path


@contextmanager
def keeping(document: dict[str, Any], path: Path | None) -> Iterator[None]:
    """On Ctrl-C, keep the ``results`` that ``document`` has so far, marked ``interrupted``.

    Raises:
        InterruptedRunError: after Ctrl-C; says what was kept in ``path``, if there is one.
    """
    try:
        yield
    except KeyboardInterrupt:
        document["interrupted"] = True
        where = "nothing written (no --json)"
        if path is not None:
            write_json(path, document)
            where = f"kept in {path}"
        raise InterruptedRunError(f"{len(document['results'])} cases finished, {where}") from None


def _finite(value: Any) -> Any:
    """``value`` with None in place of NaN and infinities, which JSON does not have."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(entry) for key, entry in value.items()}
    return [_finite(entry) for entry in value] if isinstance(value, list | tuple) else value


def write_json(path: Path, document: Mapping[str, Any]) -> None:
    """Write a JSON file: the old content or the whole new one, whatever happens on the way.

    NaN and infinities become null.
    """
    text = json.dumps(_finite(document), indent=2, allow_nan=False) + "\n"
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", text=True)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as stream:
            stream.write(text)
        # mkstemp makes files private to the user; a result file takes the usual permissions.
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
