"""Linear products, forward: fastprune against cuBLAS, cuSPARSE and 2:4."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import fastprune as fp
from bench.cases import (
    GPU_BATCH_1,
    GPU_FLOAT32,
    GPU_LARGE_BATCH,
    GPU_LEAST_OVER_CSR,
    GPU_SMALL_BATCH,
    Aims,
    Linear,
)
from bench.cuda.clock import Call, reason
from bench.cuda.session import Row, Session, aim, check_close, copies_of, strict_float32

TINY = (Linear(24, 40, 1), Linear(17, 33, 5))


def sparse_bytes(rows: int, cols: int, nnz: int, size: int) -> float:
    """The kept values, and the cheaper of one bit per weight and one byte per kept weight."""
    return size * nnz + min(rows * cols / 8, nnz)


def csr_calls(pruned: Tensor, xs: list[Tensor]) -> list[Call]:
    """torch's CSR product with int32 indices, one copy of the weight per activation copy."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch calls its CSR tensors a beta feature
        csr = pruned.to_sparse_csr()
        crow, col, values = csr.crow_indices().int(), csr.col_indices().int(), csr.values()

        def one(x: Tensor) -> Call:
            own = torch.sparse_csr_tensor(
                crow.clone(), col.clone(), values.clone(), tuple(pruned.shape)
            )
            columns = x[0].clone() if x.shape[0] == 1 else x.t().contiguous()
            return lambda: own @ columns

        return [one(x) for x in xs]


def half_calls(weight: Tensor, xs: list[Tensor]) -> list[Call]:
    """torch's 2:4 product. Its mask is another one, so that only its time can be compared."""
    from torch.sparse import to_sparse_semi_structured

    pruned = weight.clone()
    pruned.view(weight.shape[0], weight.shape[1] // 4, 4)[..., 2:] = 0.0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a prototype, torch says

        def one(x: Tensor) -> Call:
            packed = to_sparse_semi_structured(pruned.clone())
            return lambda: F.linear(x, packed)

        return [one(x) for x in xs]


def measure_row(session: Session, row: Row, case: Linear, density: float, dtype: torch.dtype,
                tf32: bool) -> None:  # fmt: skip
    """Fill in one row."""
    size = torch.empty((), dtype=dtype).element_size()
    shape = (case.rows, case.cols)
    mask = session.mask(shape, density, 1)
    nnz = int(mask.count_nonzero())
    moved = sparse_bytes(*shape, nnz, size) + size * case.batch * (case.rows + case.cols)
    number = session.clock.copies(moved)
    weight = session.randn(shape, dtype, 2)
    pruned = torch.where(mask, weight, torch.zeros((), dtype=dtype, device=weight.device))
    xs = [session.randn((case.batch, case.cols), dtype, 3 + i) for i in range(number)]
    patterns = copies_of(mask, number)
    # One weight per pattern: a plan keeps the values of the weight that it saw last.
    weights = [weight.clone() for _ in range(number)]
    dense_number = session.clock.copies(size * weight.numel())
    dense_weights = [pruned.clone() for _ in range(dense_number)]

    def ours(i: int) -> Tensor:
        return fp.masked_linear(xs[i], weights[i], patterns[i])

    def dense(i: int) -> Tensor:
        return F.linear(xs[i % number], dense_weights[i])

    exact = F.linear(xs[0].double(), pruned.double()) if row["section"] == "float32" else F.linear(
        xs[0].float(), pruned.float()
    )  # fmt: skip
    check_close(row, ours(0), exact, dtype, tf32)
    del exact
    candidates: dict[str, list[Call]] = {
        "fastprune": [functools.partial(ours, i) for i in range(number)],
        "dense": [functools.partial(dense, i) for i in range(dense_number)],
    }
    failed: dict[str, str] = {}
    peers: dict[str, Any] = {"torch CSR": lambda: csr_calls(pruned, xs)}
    if dtype in (torch.bfloat16, torch.float16):
        peers["2:4"] = lambda: half_calls(weight, xs)
    for name, prepare in peers.items():
        try:
            candidates[name] = prepare()
        except Exception as error:  # not for this dtype, shape or build of torch
            failed[name] = reason(error)
    session.time(row, candidates, launched=("torch CSR", "2:4"))
    row["failed"] = failed | row.get("failed", {})
    row |= {
        "nnz": nnz,
        "bytes": moved,
        "dense_bytes": size * (weight.numel() + case.batch * (case.rows + case.cols)),
        "flops": 2 * nnz * case.batch,
        "dense_flops": 2 * weight.numel() * case.batch,
        "rate": "tf32" if tf32 else str(dtype).removeprefix("torch."),
    }


def run_table(session: Session, aims: Aims, kinds: Iterable[tuple[torch.dtype, bool]]) -> None:
    """Every case at every sparsity in every kind: (dtype, TF32 allowed)."""
    cases = TINY if session.clock.dry else aims.cases
    for dtype, tf32 in kinds:
        strict_float32(tf32)
        for case in cases:
            for sparsity, least in aims.speedups.items():
                facts = {
                    "sparsity": sparsity,
                    "dtype": str(dtype).removeprefix("torch."),
                    "tf32": tf32,
                    "aims": aim("dense", least) + aim("torch CSR", GPU_LEAST_OVER_CSR),
                }
                with session.row(str(case), **facts) as row:
                    if row is not None:
                        measure_row(session, row, case, 1 - sparsity, dtype, tf32)
    strict_float32(False)


def batch_1(session: Session) -> None:
    """bfloat16, one sample."""
    run_table(session, GPU_BATCH_1, [(torch.bfloat16, False)])


def small_batch(session: Session) -> None:
    """bfloat16, 16 to 64 samples."""
    run_table(session, GPU_SMALL_BATCH, [(torch.bfloat16, False)])


def float32(session: Session) -> None:
    """Strict float32 on both sides."""
    run_table(session, GPU_FLOAT32, [(torch.float32, False)])


def large_batch(session: Session) -> None:
    """TF32 and bfloat16, where the dense product is compute bound."""
    run_table(session, GPU_LARGE_BATCH, [(torch.float32, True), (torch.bfloat16, False)])
