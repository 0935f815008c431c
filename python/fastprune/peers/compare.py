"""Check every peer against the exact product, then time those that are right, in turn."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fastprune import timing
from fastprune.peers.candidates import (
    Case,
    Dense,
    DenseBfloat16,
    DenseChannelsLast,
    DenseOneDnn,
    Fastprune,
    Peer,
    TorchCsr,
    WeightTimesMask,
)
from fastprune.peers.layers import Layer
from fastprune.peers.libraries import MklCsr, OnnxRuntime, OpenVino, ScipyCsr

PEERS: tuple[Peer, ...] = (
    Dense(),
    DenseChannelsLast(),
    DenseOneDnn(),
    DenseBfloat16(),
    WeightTimesMask(),
    TorchCsr(),
    ScipyCsr(),
    MklCsr(),
    OnnxRuntime(),
    OpenVino(),
    Fastprune(),
)
"""In the order of the tables."""

OWN = Fastprune.name

# Half the distance from 1 to the next number.
_FLOAT32, _BFLOAT16 = 2.0**-24, 2.0**-8


def make_case(layer: Layer, mask: Tensor, seed: int) -> Case:
    """Normal activations and weights for a layer and its mask."""
    generator = torch.Generator().manual_seed(seed + 1)  # other numbers than the mask's
    x = torch.randn(layer.input_shape, generator=generator)
    return Case(layer, x, torch.randn(layer.weight_shape, generator=generator), mask)


def exact(case: Case) -> tuple[Tensor, Tensor]:
    """The product in float64, and S, the sum of the magnitudes of its terms."""
    x, w = case.x.double(), case.pruned.double()
    return case.dense(x, w), case.dense(x.abs(), w.abs())


def tolerance(case: Case, dtype: str, magnitudes: Tensor) -> Tensor:
    """The largest error that rounding can explain, for each output.

    (n + 2) u S for the n terms of the dense product in float32; in bfloat16 also both factors and
    the result are rounded: three times 2^-8 S, and a little for their products.
    """
    terms = case.weight[0].numel()
    bound = (terms + 2) * _FLOAT32 * magnitudes
    return bound if dtype == "float32" else bound + 3.1 * _BFLOAT16 * magnitudes


def verdict(got: Tensor, want: Tensor, bound: Tensor) -> str | None:
    """What is wrong with a result; None if nothing is."""
    if got.shape != want.shape:
        return f"shape {tuple(got.shape)}, expected {tuple(want.shape)}"
    error = (got.double() - want).abs()
    bad = ~(error <= bound)  # a NaN is not within any bound
    if not bad.any():
        return None
    worst = float(torch.where(bad, error, 0.0).max())
    return f"{int(bad.sum())} of {bad.numel()} outputs wrong, the worst by {worst:.3g}"


def compare(
    case: Case, peers: Sequence[Peer], reasons: Mapping[str, str | None], min_time: float
) -> dict[str, dict[str, Any]]:
    """Prepare, check and time the peers of one case.

    Args:
        case: the operands.
        peers: those to compare; of these, the ones for this kind of layer are.
        reasons: name -> why it is not available, or None.
        min_time: seconds of timing per candidate.
    Returns:
        Name -> ``{"status": "timed", "median", "low", "high", "runs", "prepare_seconds"}``,
        seconds; or ``{"status": "not available" | "failed" | "wrong", "reason"}``.
        ``prepare_seconds`` was measured once.
    """
    found: dict[str, dict[str, Any]] = {}
    calls: dict[str, Callable[[], object]] = {}
    with torch.inference_mode():
        want, magnitudes = exact(case)
        for peer in peers:
            if case.layer.kind not in peer.kinds:
                continue
            if (reason := reasons[peer.name]) is not None:
                found[peer.name] = {"status": "not available", "reason": reason}
                continue
            try:
                began = time.perf_counter()
                call = peer.prepare(case)
                prepare_seconds = time.perf_counter() - began
                got = peer.result(call(), case)
            except Exception as error:  # whatever a peer raises, the others go on
                reason = " ".join(f"{type(error).__name__}: {error}".split())
                found[peer.name] = {"status": "failed", "reason": reason}
                continue
            reason = verdict(got, want, tolerance(case, peer.dtype, magnitudes))
            if reason is not None:
                found[peer.name] = {"status": "wrong", "reason": reason}
                continue
            found[peer.name] = {"status": "timed", "prepare_seconds": prepare_seconds}
            calls[peer.name] = call
        del want, magnitudes
        times = timing.measure(calls, min_time=min_time) if calls else {}
    for name, timed in times.items():
        found[name] |= timed.to_dict()
    return found
