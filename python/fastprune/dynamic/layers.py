"""Which weights the methods that prune while training leave dense."""

from __future__ import annotations

from torch import nn

from fastprune.pruners.targets import Selection, prunable

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_SHORTCUT_NAMES = ("downsample", "shortcut")


def all_but_last_linear(
    model: nn.Module, include: Selection, exclude: Selection
) -> dict[str, nn.Parameter]:
    """All linear and convolution weights but that of the last linear layer (paper 001, 5.1)."""
    weights = prunable(model, include, exclude)
    if include is None:
        linear = [m.weight for m in model.modules() if isinstance(m, nn.Linear)]
        last = next((w for w in reversed(linear)), None)
        weights = {n: w for n, w in weights.items() if w is not last}
        if not weights:
            raise ValueError(
                "the model has no prunable weights but those of its last linear layer, which "
                "stays dense: name it in include to prune it"
            )
    return weights


def all_but_ends_and_shortcuts(
    model: nn.Module, include: Selection, exclude: Selection
) -> dict[str, nn.Parameter]:
    """The same without the first convolution and the 1x1 ones that downsample (paper 001, 5.1).

    A 1x1 convolution downsamples if its stride is above 1, or if the name of the module or of one
    that it is in says so: ``downsample`` or ``shortcut``.
    """
    weights = all_but_last_linear(model, include, exclude)
    if include is not None:
        return weights
    found = [(n, m) for n, m in model.named_modules() if isinstance(m, _CONVOLUTIONS)]
    dense = {id(m.weight) for _, m in found[:1]}
    dense |= {id(m.weight) for n, m in found if _downsamples(n, m)}
    weights = {n: w for n, w in weights.items() if id(w) not in dense}
    if not weights:
        raise ValueError(
            "the model has no prunable weights but those of its first convolution, of 1x1 "
            "convolutions that downsample and of its last linear layer, which stay dense: name "
            "some in include to prune them"
        )
    return weights


def _downsamples(name: str, layer: nn.Module) -> bool:
    assert isinstance(layer, _CONVOLUTIONS)
    if any(size != 1 for size in layer.kernel_size):
        return False
    return any(s > 1 for s in layer.stride) or any(s in name for s in _SHORTCUT_NAMES)
