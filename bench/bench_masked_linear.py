"""masked_linear against dense, weight x mask, torch CSR and SciPy CSR."""

from __future__ import annotations

import warnings

import scipy.sparse
import torch
import torch.nn.functional as F

import fastprune as fp
from bench.cases import LINEAR, SPARSITIES, Linear
from bench.harness import CHANGED, Row, time_all


def run(
    flops: float, bandwidth: float, min_time: float, sparsities: tuple[float, ...] = SPARSITIES
) -> dict[str, list[Row]]:
    """Forward, input gradient and sampled weight gradient, float32, random masks."""
    tables: dict[str, list[Row]] = {"forward": [], "input grad": [], "weight grad": []}
    for case in LINEAR:
        for sparsity in sparsities:
            for name, row in _case(case, sparsity, flops, bandwidth, min_time).items():
                tables[name].append(row)
    return tables


def _case(
    case: Linear, sparsity: float, flops: float, bandwidth: float, min_time: float
) -> dict[str, Row]:
    torch.manual_seed(0)
    x, w = torch.randn(case.batch, case.cols), torch.randn(case.rows, case.cols)
    grad = torch.randn(case.batch, case.rows)
    mask = torch.rand(case.rows, case.cols) < 1 - sparsity
    pattern = fp.pack(mask)
    pruned = torch.where(mask, w, 0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch calls its CSR tensors a beta feature
        csr = pruned.to_sparse_csr()
    columns = x.t().contiguous()
    scipy_csr, scipy_x = scipy.sparse.csr_matrix(pruned.numpy()), columns.numpy()
    ops, plan = torch.ops.fastprune, pattern.plan.number(pattern)
    forward = time_all(
        {
            "dense": lambda: F.linear(x, pruned),
            "fastprune": lambda: fp.masked_linear(x, w, pattern),
            "weight x mask": lambda: F.linear(x, w * mask),
            "torch CSR": lambda: csr @ columns,
            "SciPy CSR": lambda: scipy_csr @ scipy_x,
        },
        min_time,
    )
    input_grad = time_all(
        {
            "dense": lambda: grad @ pruned,
            "fastprune": lambda: ops.planned_linear_input_grad(grad, w, plan, CHANGED),
        },
        min_time,
    )
    weight_grad = time_all(
        {
            "dense": lambda: grad.t() @ x,
            "fastprune": lambda: ops.planned_linear_weight_grad(grad, x, plan),
        },
        min_time,
    )
    pack = time_all({"pack": lambda: fp.pack(mask)}, min_time / 3)["pack"]["median"]
    # Activations in and out once, the kept weights once per tile of 64 rows of x.
    tiles = -(-case.batch // 64)
    moved = 4 * case.batch * (case.rows + case.cols) + 6 * pattern.nnz * tiles
    floor = max(2 * pattern.nnz * case.batch / flops, moved / bandwidth)
    return {
        name: Row("masked_linear", str(case), sparsity, times, ("dense",), 1e3 * floor, 1e3 * pack)
        for name, times in (
            ("forward", forward),
            ("input grad", input_grad),
            ("weight grad", weight_grad),
        )
    }
