"""The float32 gradient of a linear weight: at the mask alone, or dense and then masked."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

import fastprune as fp
from bench.cases import GPU_WEIGHT_GRADIENT_DENSITIES, GPU_WEIGHT_GRADIENTS, Linear
from bench.cuda.clock import Call
from bench.cuda.forms import form
from bench.cuda.session import Row, Session, check_close, strict_float32

FORMS = ("auto", "sampled", "dense")


def measure(session: Session, row: Row, case: Linear) -> None:
    """Fill in one row."""
    shape = (case.rows, case.cols)
    mask = session.mask(shape, row["density"], 1)
    x = session.randn((case.batch, case.cols), torch.float32, 2)
    grad = session.randn((case.batch, case.rows), torch.float32, 3)
    pattern = fp.pack(mask)
    assert pattern.plan is not None
    plan = pattern.plan.number(pattern)
    exact = torch.where(mask, grad.double().t() @ x.double(), 0)

    def ours(name: str) -> Tensor:
        with form(name):
            return torch.ops.fastprune.planned_linear_weight_grad(grad, x, plan, False)

    for name in FORMS:
        check_close(row, ours(name), exact, torch.float32, tf32=False)
    del exact
    candidates: dict[str, list[Call]] = {name: [functools.partial(ours, name)] for name in FORMS}
    candidates["unmasked matmul"] = [lambda: grad.t() @ x]
    session.time(row, candidates, ours="auto")
    times = {name: row["times"][name]["median"] for name in FORMS[1:] if name in row["times"]}
    if times:
        row["winner"] = min(times, key=lambda name: times[name])
    nnz = int(mask.count_nonzero())
    row |= {"nnz": nnz, "flops": 2 * nnz * case.batch, "rate": "float32"}


def weight_gradients(session: Session) -> None:
    """Strict float32 over shape, batch and density: the crossing is the rule of the dispatch."""
    strict_float32(False)
    cases = (Linear(24, 40, 5),) if session.clock.dry else GPU_WEIGHT_GRADIENTS
    densities = GPU_WEIGHT_GRADIENT_DENSITIES[:2] if session.clock.dry else (
        GPU_WEIGHT_GRADIENT_DENSITIES
    )  # fmt: skip
    for case in cases:
        for density in densities:
            facts = {"density": density, "sparsity": 1 - density, "batch": case.batch}
            with session.row(str(case), **facts, dtype="float32", tf32=False) as row:
                if row is not None:
                    measure(session, row, case)
