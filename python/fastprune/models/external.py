"""Networks of torchvision and timm, by name, where those packages are installed."""

from __future__ import annotations

import difflib
import importlib
from types import ModuleType
from typing import Any

from torch import nn

from fastprune.models._common import Shape

PACKAGES = ("torchvision", "timm")
"""The packages tried, in this order, for a name that is not in fastprune's own table."""


def import_package(package: str) -> tuple[ModuleType | None, str]:
    """Import ``package`` ("torchvision" or "timm"); return it, or None, and its state in words.

    A torchvision built for another torch raises RuntimeError or OSError on import instead of
    ImportError: it then counts as unusable and the words say why.
    """
    try:
        if package == "torchvision":
            return importlib.import_module("torchvision.models"), "installed"
        return importlib.import_module(package), "installed"
    except ModuleNotFoundError as error:
        if error.name == package:
            return None, "not installed"
        return None, f"installed, but does not import ({error})"
    except (ImportError, RuntimeError, OSError) as error:
        return None, f"installed, but does not import ({error})"


def _spelling(package: str, name: str) -> str:
    """``name`` as the package spells it: torchvision's names are lower case with underscores."""
    return name.lower().replace("-", "_") if package == "torchvision" else name


def _has(package: str, module: ModuleType, name: str) -> bool:
    if package == "torchvision":
        return _spelling(package, name) in module.list_models()
    return bool(module.is_model(name))


def split_prefix(name: str) -> tuple[str | None, str]:
    """Split ``"torchvision:NAME"`` or ``"timm:NAME"``; without a colon the package is None.

    Raises:
        ValueError: the part before the colon is neither package.
    """
    prefix, colon, rest = name.partition(":")
    if not colon:
        return None, name
    package = prefix.strip().lower()
    if package not in PACKAGES:
        raise ValueError(
            f"name: {name!r} asks for {prefix!r}, expected one of "
            + ", ".join(f"'{p}:NAME'" for p in PACKAGES)
        )
    return package, rest.strip()


def find(name: str, own_names: list[str]) -> tuple[str, ModuleType, str]:
    """Find who has the network ``name``: (package, its module, the name as spelled there).

    Raises:
        ValueError: nobody has it; the message lists close matches and says which packages can be
            used.
    """
    wanted, bare = split_prefix(name)
    states: list[str] = []
    known: list[str] = [] if wanted else list(own_names)
    for package in (wanted,) if wanted else PACKAGES:
        module, state = import_package(package)
        states.append(f"{package} is {state}")
        if module is None:
            continue
        if _has(package, module, bare):
            return package, module, _spelling(package, bare)
        known += module.list_models()
    close = difflib.get_close_matches(bare.lower(), known, n=5, cutoff=0.5)
    hint = f"; close: {', '.join(dict.fromkeys(close))}" if close else ""
    own = "" if wanted else f"; fastprune's own: {', '.join(own_names)}"
    raise ValueError(f"name: unknown network {name!r}{hint} ({'; '.join(states)}){own}")


def create(
    name: str,
    own_names: list[str],
    num_classes: int | None,
    in_shape: Shape | None,
    kwargs: dict[str, Any],
) -> nn.Module:
    """Build a torchvision or timm network; pretrained only if ``kwargs`` ask for it.

    Args:
        name: with or without a package prefix.
        own_names: fastprune's names, for the error message.
        num_classes: None leaves the package's default (usually 1000).
        in_shape: only the channels matter; torchvision's networks take 3.
        kwargs: passed on to the package's function.
    Raises:
        ValueError: the name is unknown, or torchvision is asked for other than 3 channels.
    """
    package, module, spelled = find(name, own_names)
    options = dict(kwargs)
    if num_classes is not None:
        options["num_classes"] = num_classes
    if package == "torchvision":
        if in_shape is not None and in_shape[0] != 3:
            raise ValueError(
                f"in_shape: torchvision's {spelled} takes 3 channels, got {tuple(in_shape)!r}"
            )
        build = module.get_model
    else:
        build = module.create_model
        if in_shape is not None:
            options["in_chans"] = in_shape[0]
    model: nn.Module = build(spelled, **options)
    return model
