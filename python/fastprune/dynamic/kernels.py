"""Which kernel each layer runs while its sparsity changes: measured once, then looked up.

The times of a layer depend on its mask almost only through the density, and are close to a straight
line in it. So each kind of layer is timed at a few densities, and from then on the choice is a
function of the masks alone: a run that is resumed with the same table, or on several ranks, makes
the same choices and computes the same bits.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd

from fastprune import timing
from fastprune.dynamic.watching import Seen
from fastprune.kernel_choice import MARGIN, layer_step, waiting_for
from fastprune.nn import MaskedConv2d, MaskedLayer
from fastprune.nn.batch_last import understand_batch_last_
from fastprune.ops import layout
from fastprune.ops.backend import has_kernels
from fastprune.ops.plan import BATCH_LAST, LIKE_INPUT

DENSITIES = (0.02, 0.1, 0.3)
UNTIMED_DENSITY = 0.25
# What the times of single layers do not show (WideResNet-28-2): with the batch innermost BatchNorm,
# ReLU and additions save a tenth of a step, and a dense convolution converts both ways.
NORMALIZATION, CONVERSIONS = 1.05, 1.5


@dataclass(frozen=True)
class LayerTimes:
    """Seconds of one forward and backward pass of a layer.

    Attributes:
        dense: with torch's kernel on the masked weight.
        sparse: with the sparse kernel, at each of ``DENSITIES``.
        chained: the same with the batch innermost; empty where that is not possible.
    """

    dense: float
    sparse: tuple[float, ...]
    chained: tuple[float, ...]

    def at(self, density: float) -> tuple[float, float, float | None]:
        """(dense, sparse, chained) at a density, between and beyond the measured ones."""
        chained = _line(self.chained, density) if self.chained else None
        return self.dense, _line(self.sparse, density), chained


def _line(times: Sequence[float], density: float) -> float:
    """The straight line through the two measured points next to a density."""
    i = 0 if density < DENSITIES[1] else 1
    slope = (times[i + 1] - times[i]) / (DENSITIES[i + 1] - DENSITIES[i])
    return times[i] + slope * (density - DENSITIES[i])


class Kernels:
    """The table of a model's masked layers, by module name, and the choices that follow from it."""

    def __init__(self, model: nn.Module, layers: Collection[nn.Module]) -> None:
        self._model = model
        self._layers = {
            n: m for n, m in model.named_modules() if m in layers and isinstance(m, MaskedLayer)
        }
        self.times: dict[str, LayerTimes] = {}

    def measure(self, seen: Mapping[str, Seen], min_time: float) -> None:
        """Time every layer that was seen running; layers of the same sizes once.

        Warns:
            UserWarning: a layer cannot be timed on what it was seen with; it is named, and goes by
                its density alone.
        """
        known: dict[tuple[Any, ...], LayerTimes] = {}
        for name, layer in self._layers.items():
            if name not in seen or not has_kernels(seen[name].device):
                continue
            key = (*_sizes(layer), seen[name])
            if key not in known:
                try:
                    with seen[name].context():
                        known[key] = _measured(layer, seen[name].example(layer.weight), min_time)
                except (RuntimeError, ValueError, TypeError) as error:
                    message = str(error).partition("\n")[0]
                    warnings.warn(f"{name}: not timed: {message}", UserWarning, stacklevel=3)
                    continue
            self.times[name] = known[key]

    def choose(self) -> None:
        """Set the kernel of every layer from the density of its mask.

        The batch is innermost throughout or nowhere: a convolution between two that keep it so
        pays for no conversion, and a dense one among them for two. A layer that was not timed is
        sparse up to a density of 1/4.
        """
        apart, chained, possible = 0.0, 0.0, False
        plan: dict[str, tuple[bool, bool]] = {}
        for name, layer in self._layers.items():
            density = 1.0 - layer.sparsity
            if name not in self.times:
                guess = has_kernels(layer.weight.device) and density <= UNTIMED_DENSITY
                plan[name] = guess, guess
                continue
            dense, sparse, chain = self.times[name].at(density)
            wins = sparse * MARGIN < dense
            apart += sparse if wins else dense
            if chain is None:
                plan[name] = wins, wins
                chained += sparse if wins else dense
                continue
            plan[name] = wins, chain < dense * CONVERSIONS
            chained += chain if plan[name][1] else dense
            possible = True
        # Dropout draws in the order in which its input is stored: a seed keeps its meaning.
        draws = any(isinstance(m, _DropoutNd) and m.p > 0 for m in self._model.modules())
        together = possible and not draws and chained < apart * NORMALIZATION
        if together:
            understand_batch_last_(self._model)
        for name, (wins, chain_wins) in plan.items():
            layer = self._layers[name]
            layer.sparse = chain_wins if together else wins
            keeps = together and isinstance(layer, MaskedConv2d)
            layer._layout = BATCH_LAST if keeps else LIKE_INPUT

    def state_dict(self) -> dict[str, Any]:
        """The table as plain values."""
        return {name: asdict(times) for name, times in self.times.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The inverse of :meth:`state_dict`."""
        self.times = {
            name: LayerTimes(t["dense"], tuple(t["sparse"]), tuple(t["chained"]))
            for name, t in state.items()
        }


def _sizes(layer: MaskedLayer) -> tuple[Any, ...]:
    """What a layer's times depend on beside its mask and its input."""
    options = ("stride", "padding", "padding_mode", "dilation", "groups", "weight_grad")
    shape = (tuple(layer.weight.shape), layer.weight.dtype, layer.weight.requires_grad)
    return (type(layer), *shape, *(getattr(layer, o, None) for o in options))


def _measured(layer: MaskedLayer, x: Tensor, min_time: float) -> LayerTimes:
    steps: dict[str, Callable[[], object]] = {}
    plain = copy.deepcopy(layer).train()
    for hooks in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"):
        getattr(plain, hooks).clear()  # the user's see real data only
    trial = copy.deepcopy(plain)
    trial.sparse = False
    steps["dense"] = layer_step(trial, x, training=True)
    chains = isinstance(layer, MaskedConv2d) and x.shape[0] > 1 and x.device.type == "cpu"
    generator = torch.Generator().manual_seed(0)
    order = torch.rand(layer.weight_mask.shape, generator=generator)
    for density in DENSITIES:
        trial = copy.deepcopy(plain)
        trial.set_mask(order < density)
        trial.sparse, trial._layout = True, LIKE_INPUT
        steps[f"sparse {density}"] = layer_step(trial, x, training=True)
        if chains:
            trial = copy.deepcopy(trial)
            trial._layout = BATCH_LAST
            steps[f"chained {density}"] = layer_step(trial, layout.batch_last(x), training=True)
    times = timing.measure(
        steps, min_time=min_time, min_rounds=3, warmup=1, synchronize=waiting_for([x])
    )
    medians = {name: t.median for name, t in times.items()}
    return LayerTimes(
        medians["dense"],
        tuple(medians[f"sparse {d}"] for d in DENSITIES),
        tuple(medians[f"chained {d}"] for d in DENSITIES) if chains else (),
    )
