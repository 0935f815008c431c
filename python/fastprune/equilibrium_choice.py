"""Equilibrium layers in a model that is accelerated: masked, and timed against dense W."""

from __future__ import annotations

import copy
from collections.abc import Mapping

from torch import Tensor, nn

from fastprune import timing
from fastprune.kernel_choice import MARGIN, layer_step, waiting_for
from fastprune.nn import MonDEQLayer
from fastprune.report import LayerReport


def choose_equilibrium(
    names: Mapping[str, str],
    dense: nn.Module,
    masked: MonDEQLayer,
    x: Tensor | None,
    training: bool,
    min_time: float,
) -> list[LayerReport]:
    """Time whole solves of one layer, and set ``masked.sparse``.

    Args:
        names: parameter name -> ``"A"`` or ``"B"``: the masked ones.
        dense: the layer with zeros stored in plain A and B.
        masked: the layer with its masks; in training a dense W has to enforce them too.
        x: the input that the layer gets; None: it is not reached.
    Returns:
        One row per name, all with the layer's times.
    """
    kind, shape = type(dense).__name__, tuple(x.shape) if x is not None else ()
    rows = [
        LayerReport.kept(name, kind, getattr(masked, f"{own}_mask"), "", shape)
        for name, own in names.items()
    ]
    masked.sparse = False
    if x is None:
        for row in rows:
            row.reason = "not reached by example_input"
        return rows
    sparse = copy.deepcopy(masked)
    sparse.sparse = True
    plain = copy.deepcopy(masked if training else dense)
    assert isinstance(plain, MonDEQLayer)
    steps = {}
    for name, layer in (("sparse", sparse), ("dense", plain)):
        layer.on_failure = "ignore"  # the model's own solves say so, once each
        steps[name] = layer_step(layer.train(training), x, training)
    times = timing.measure(steps, min_time=min_time, synchronize=waiting_for([x]))
    taken = {name: 1e3 * t.median for name, t in times.items()}
    masked.sparse = taken["sparse"] * MARGIN < taken["dense"]
    for row in rows:
        row.sparse_ms, row.dense_ms = taken["sparse"], taken["dense"]
        row.chosen = "sparse" if masked.sparse else "dense"
        row.reason = "" if masked.sparse else "W as a dense matrix is as fast or faster"
    return rows
