"""Fully connected equilibria for tests: random weights, the op beside the textbook's loop."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastprune.ops.mon_operator import LinearOperator, LinearStructure, Settings
from fastprune.reference import mon_splitting as plain

SIZES = [1, 2, 3, 5, 6, 7, 12, 13, 31, 87, 130]
BATCHES = [1, 2, 7, 15, 16, 17, 33, 64, 65, 129]
ACTIVATIONS = ["relu", "tanh", "sigmoid", "softplus"]


def matrices(n: int, g: torch.Generator, density: float | None) -> list[Tensor | None]:
    """A, B and their masks; None: whole."""
    found: list[Tensor | None] = []
    masks: list[Tensor | None] = []
    for _ in range(2):
        weight = (torch.rand(n, n, generator=g, dtype=torch.float64) * 2 - 1) / math.sqrt(n)
        mask = None if density is None else torch.rand(n, n, generator=g) < density
        found.append(weight if mask is None else weight * mask)
        masks.append(mask)
    return found + masks


def operators(
    n: int, m: float, parts: list[Tensor | None], like: Tensor
) -> tuple[LinearOperator, plain.Operator]:
    A, B, a_mask, b_mask = parts
    cast = [None if t is None else t.to(like.dtype) for t in (A, B)]
    structure = LinearStructure(n, A is not None, B is not None, a_mask, b_mask)
    own = LinearOperator(cast[0], cast[1], m, n, like, structure)
    wide = [None if t is None else t.double() for t in cast]
    w = plain.linear_matrix(wide[0], wide[1], m, n, like.double())
    return own, plain.linear_operator(w)


def safe_settings(
    own: LinearOperator, activation: str, solver: str, per_sample: bool, tol: float = 1e-4
) -> Settings:
    alpha = 0.7 if solver == "pr" else min(0.9 * own.m / own.lipschitz**2, 1.0)
    return Settings(activation, solver, alpha, tol, 60, per_sample)


def assert_same(got: plain.Solution, wanted: plain.Solution, s: Settings, what: str) -> None:
    """Equal counts and results; in float32 a sample on the edge of the tolerance may differ."""
    single = got.out.dtype == torch.float32
    counts = got.iterations != wanted.iterations
    if single:
        # The residual of the shorter of the two runs is the tolerance itself, to rounding.
        shorter = torch.where(got.iterations < wanted.iterations, got.residual, wanted.residual)
        counts &= (shorter - s.tol).abs() > 2e-3 * s.tol
    assert not counts.any(), (what, got.iterations, wanted.iterations, wanted.residual)
    equal = (got.iterations == wanted.iterations).expand(len(got.out))
    bound = 3e-5 if single else 1e-11
    scale = wanted.out.abs().amax().clamp_min(1.0)
    error = (got.out.double() - wanted.out).abs()[equal].amax() if equal.any() else torch.zeros(())
    assert error <= bound * scale, (what, float(error), float(scale))
    error = (got.z.double() - wanted.z).abs()[equal].amax() if equal.any() else torch.zeros(())
    assert error <= bound * scale, (what, float(error))
