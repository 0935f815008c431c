"""What is timed against what: dense, weight x mask, and fastprune, in one interleaved run."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

from fastprune import folding, timing
from fastprune.cli.common import Batch
from fastprune.cli.training import MOMENTUM, WEIGHT_DECAY
from fastprune.convert import accelerate
from fastprune.report import Report
from fastprune.timing import Timing

Mode = Literal["training", "inference"]
MODES: tuple[Mode, ...] = ("training", "inference")


@dataclass(frozen=True)
class Form:
    """One way to run a dense network; none is the fastest everywhere."""

    channels_last: bool = False
    folded: bool = False

    def __str__(self) -> str:
        layout = "channels_last" if self.channels_last else "contiguous"
        return f"{layout}, BatchNorm folded" if self.folded else layout


@dataclass(frozen=True)
class Baseline:
    """The fastest form of the dense network, and the timings of all forms."""

    form: Form
    step: Callable[[], object]
    tried: Mapping[Form, Timing]

    def to_dict(self) -> dict[str, Any]:
        """For JSON; seconds."""
        return {
            "form": str(self.form),
            **self.tried[self.form].to_dict(),
            "tried": {str(form): t.to_dict() for form, t in self.tried.items()},
        }


@dataclass(frozen=True)
class Stopwatch:
    """How long to measure, and where."""

    min_time: float
    device: torch.device
    min_rounds: int = 5

    def measure(self, fns: Mapping[str, Callable[[], object]]) -> dict[str, Timing]:
        """:func:`fastprune.timing.measure`, waiting for the GPU where there is one."""
        wait = torch.cuda.synchronize if self.device.type == "cuda" else None
        return timing.measure(
            fns, min_time=self.min_time, min_rounds=self.min_rounds, synchronize=wait
        )


def step_of(model: nn.Module, batch: Batch, mode: Mode) -> Callable[[], object]:
    """One inference pass, or one whole training step, of ``model``; the model's state changes.

    A training step is forward, cross entropy, backward and SGD with momentum and weight decay. Its
    learning rate is 0, so that the weights stay as they are through hundreds of timed steps; the
    arithmetic is the same.
    """
    x, y = batch
    if mode == "inference":
        model.eval()

        def infer() -> None:
            with torch.inference_mode():
                model(x)

        return infer
    model.train()
    optimizer = torch.optim.SGD(
        model.parameters(), lr=0.0, momentum=MOMENTUM, weight_decay=WEIGHT_DECAY, nesterov=True
    )

    def train() -> None:
        optimizer.zero_grad()
        F.cross_entropy(model(x).float(), y).backward()
        optimizer.step()

    return train


def arranged(model: nn.Module, batch: Batch, form: Form) -> tuple[nn.Module, Batch]:
    """A copy of ``model`` in a form, and the batch laid out to suit it."""
    model = copy.deepcopy(model)
    if form.folded:
        folding.fold_batchnorm_(model.eval())
    x, y = batch
    if form.channels_last:
        model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        x = x.contiguous(memory_format=torch.channels_last)
    return model, (x, y)


def forms(model: nn.Module, batch: Batch, mode: Mode) -> list[Form]:
    """The forms that apply: channels_last to convolutions, folding to inference with BatchNorm."""
    layouts = [False]
    if batch[0].dim() == 4 and any(isinstance(m, nn.Conv2d) for m in model.modules()):
        layouts.append(True)
    folded = [False]
    if mode == "inference" and folding.fold_batchnorm_(copy.deepcopy(model).eval()):
        folded.append(True)
    return [Form(layout, fold) for fold in folded for layout in layouts]


def best_dense(model: nn.Module, batch: Batch, mode: Mode, watch: Stopwatch) -> Baseline:
    """Time the unpruned network in every form, interleaved, and pick the fastest."""
    steps = {f: step_of(*arranged(model, batch, f), mode) for f in forms(model, batch, mode)}
    times = watch.measure({str(form): step for form, step in steps.items()})
    tried = {form: times[str(form)] for form in steps}
    form = min(tried, key=lambda f: tried[f].median)
    return Baseline(form, steps[form], tried)


class _TimesMask(nn.Module):
    """weight x mask, computed anew in each forward pass."""

    mask: Tensor

    def __init__(self, mask: Tensor) -> None:
        super().__init__()
        self.register_buffer("mask", mask)

    def forward(self, weight: Tensor) -> Tensor:
        return weight * self.mask


def masked_dense(
    model: nn.Module, masks: Mapping[str, Tensor], batch: Batch, mode: Mode, form: Form
) -> Callable[[], object]:
    """The step of a network whose weights are multiplied by their masks: the usual simulation.

    It runs in ``form``, the fastest of the dense network.
    """
    model, batch = arranged(model, batch, form)
    for name, mask in masks.items():
        owner, _, parameter = name.rpartition(".")
        weight = model.get_parameter(name)
        factor = torch.empty_like(weight).copy_(mask)  # in the weight's memory format and dtype
        parametrize.register_parametrization(
            model.get_submodule(owner), parameter, _TimesMask(factor.detach())
        )
    return step_of(model, batch, mode)


@dataclass(frozen=True)
class Case:
    """Timings of one pruned network in one mode; ``masked`` is None where it was not asked for.

    ``alone`` is what the dense network took when it was timed against its other forms only.
    """

    dense: Timing
    masked: Timing | None
    sparse: Timing
    form: Form
    report: Report
    alone: Timing

    @property
    def disturbed(self) -> bool:
        """Whether something else kept the machine busy, so that the speedup means little.

        The dense network then takes 1.5 times as long, or as short, as it did before, or the middle
        half of the runs of either network is spread over more than half of their median.
        """
        drift = self.dense.median / self.alone.median
        wide = any(t.high - t.low > 0.5 * t.median for t in (self.dense, self.sparse))
        return wide or not 1 / 1.5 < drift < 1.5

    @property
    def speedup(self) -> float:
        """Best dense over fastprune, medians."""
        return self.dense.median / self.sparse.median

    @property
    def sparse_layers(self) -> int:
        """Layers that run on sparse kernels."""
        return sum(layer.chosen == "sparse" for layer in self.report.layers)

    def to_dict(self) -> dict[str, Any]:
        """For JSON; seconds."""
        result: dict[str, Any] = {
            "dense": {"form": str(self.form), **self.dense.to_dict()},
            "sparse": self.sparse.to_dict(),
            "speedup": self.speedup,
            "disturbed": self.disturbed,
            "layers": len(self.report.layers),
            "sparse_layers": self.sparse_layers,
        }
        if self.masked is not None:
            result["masked"] = self.masked.to_dict()
            result["speedup_over_masked"] = self.masked.median / self.sparse.median
        return result


def sparse_network(
    model: nn.Module, masks: Mapping[str, Tensor], batch: Batch, mode: Mode, watch: Stopwatch
) -> tuple[nn.Module, Report]:
    """:func:`fastprune.accelerate` for a mode: BatchNorm is folded for inference, as for dense."""
    model = copy.deepcopy(model).train(mode == "training")
    return accelerate(
        model,
        masks,
        batch[0],
        training=mode == "training",
        fold_batchnorm=mode == "inference",
        min_time=watch.min_time / 4,
    )


def measure_case(
    fast: nn.Module,
    report: Report,
    batch: Batch,
    mode: Mode,
    baseline: Baseline,
    watch: Stopwatch,
    masked: Callable[[], object] | None = None,
) -> Case:
    """Time a copy of ``fast`` against the dense network, and against ``masked`` where given."""
    candidates = {"dense": baseline.step}
    if masked is not None:
        candidates["masked"] = masked
    candidates["sparse"] = step_of(copy.deepcopy(fast), batch, mode)
    times = watch.measure(candidates)
    alone = baseline.tried[baseline.form]
    return Case(times["dense"], times.get("masked"), times["sparse"], baseline.form, report, alone)
