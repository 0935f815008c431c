"""Beside the tables: ceilings, packing, and every form of the product by itself."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

import fastprune as fp
from bench.cases import GPU_FORM_BATCHES, GPU_FORM_DENSITIES, GPU_FORMS, GPU_PACK, Linear
from bench.cuda.clock import Call, reason
from bench.cuda.session import Session, copies_of, strict_float32
from fastprune import timing

FORMS = ("deltas", "bitmap", "tensor_core", "panel", "dense")
# The largest batches that a form takes (csrc/ops/masked_linear_choice_cuda.cpp): above, another one
# would run in its place, and be taken for it.
MOST = {"deltas": 8, "bitmap": 8, "tensor_core": 128}
ON_TENSOR_CORES = ("bitmap", "tensor_core")
KINDS = ((torch.bfloat16, False), (torch.float32, False), (torch.float32, True))


def _copy(session: Session) -> None:
    size = 1 << (12 if session.clock.dry else 31)
    source = torch.empty(size, dtype=torch.uint8, device=session.device)
    target = torch.empty_like(source)
    with session.row("copy, read and written") as row:
        if row is not None:
            session.time(row, {"copy": [lambda: target.copy_(source)]}, ours="copy")
            row["bytes"] = 2 * size


def roofline(session: Session) -> None:
    """Bytes per second of a large copy; flops per second of large dense products, random data."""
    _copy(session)
    session.clock.release()
    dry = session.clock.dry
    n = 32 if dry else 8192
    for name, dtype, tf32 in (
        ("bfloat16", torch.bfloat16, False),
        ("float16", torch.float16, False),
        ("tf32", torch.float32, True),
        ("float32", torch.float32, False),
    ):
        strict_float32(tf32)
        with session.row(f"{n} x {n} x {n}, {name}", rate=name) as row:
            if row is not None:
                a, b = (session.randn((n, n), dtype, seed) for seed in (1, 2))
                session.time(row, {"dense": [functools.partial(torch.mm, a, b)]}, ours="dense")
                row["flops"] = 2 * n**3
    strict_float32(False)


def packing(session: Session) -> None:
    """Once per mask: :func:`fastprune.pack`, and the first product, which arranges the values."""
    cases = (Linear(24, 40, 1),) if session.clock.dry else GPU_PACK
    for case in cases:
        weight = session.randn((case.rows, case.cols), torch.bfloat16, 2)
        x = session.randn((1, case.cols), torch.bfloat16, 3)
        for density in (0.5, 0.1):
            facts = {"sparsity": 1 - density, "dtype": "bfloat16"}
            with session.row(f"{case.rows} x {case.cols}", **facts) as row:
                if row is None:
                    continue
                mask = session.mask(weight.shape, density, 1)
                ready: list[fp.Pattern] = []

                def pack(mask: Tensor = mask, ready: list[fp.Pattern] = ready) -> None:
                    ready.append(fp.pack(mask))

                def first(
                    weight: Tensor = weight, x: Tensor = x, ready: list[fp.Pattern] = ready
                ) -> None:
                    fp.masked_linear(x, weight, ready.pop())

                times = timing.measure(  # in turn: each first product takes the last pack
                    {"pack": pack, "first product": first},
                    min_time=session.seconds,
                    min_rounds=2,
                    max_rounds=20,
                    warmup=1,
                    synchronize=session.clock.synchronize,
                )
                row["ours"] = "pack"
                row["times"] = {
                    name: {**t.to_dict(), "how": "wall clock"} for name, t in times.items()
                }


def serves(name: str, dtype: torch.dtype, tf32: bool, batch: int) -> bool:
    """Whether a form that is asked for is the one that runs."""
    if name in ON_TENSOR_CORES and dtype == torch.float32 and not tf32:
        return False
    return batch <= MOST.get(name, batch)


@contextlib.contextmanager
def form(name: str) -> Iterator[None]:
    """The product's form chosen by hand, where the build lets one choose."""
    choose = getattr(fp._C, "set_cuda_form", None)
    if choose is None:
        yield
        return
    choose(name)
    try:
        yield
    finally:
        choose("auto")


def forms(session: Session) -> None:
    """All forms over batch, density and dtype: the crossings are the dispatch table."""
    dry = session.clock.dry
    names: tuple[str, ...] = ("auto", *FORMS)
    if not hasattr(fp._C, "set_cuda_form"):
        names = ("auto",)
    shape = (24, 40) if dry else (GPU_FORMS.rows, GPU_FORMS.cols)
    batches = (1, 3) if dry else GPU_FORM_BATCHES
    for dtype, tf32 in KINDS:
        strict_float32(tf32)
        for density in GPU_FORM_DENSITIES[:2] if dry else GPU_FORM_DENSITIES:
            mask = session.mask(shape, density, 1)
            weight = session.randn(shape, dtype, 2)
            nnz = int(mask.count_nonzero())
            number = session.clock.copies(weight.element_size() * nnz * 1.25, most=6)
            patterns, weights = copies_of(mask, number), [weight.clone() for _ in range(number)]
            pruned = torch.where(mask, weight, torch.zeros((), dtype=dtype, device=weight.device))
            for batch in batches:
                x = session.randn((batch, shape[1]), dtype, 3)
                facts = {"batch": batch, "density": density, "sparsity": 1 - density}
                facts |= {"dtype": str(dtype).removeprefix("torch."), "tf32": tf32}
                with session.row(f"{shape[0]} x {shape[1]}, batch {batch}", **facts) as row:
                    if row is None:
                        continue

                    def ours(i: int, name: str, x: Tensor = x) -> Tensor:
                        with form(name):
                            return fp.masked_linear(x, weights[i], patterns[i])  # noqa: B023

                    candidates: dict[str, list[Call]] = {
                        "F.linear": [functools.partial(F.linear, x, pruned)]
                    }
                    failed: dict[str, str] = {}
                    exact = F.linear(x.float(), pruned.float())
                    for name in names:
                        if not serves(name, dtype, tf32, batch):
                            continue
                        try:
                            error = float((ours(0, name).float() - exact).norm() / exact.norm())
                        except Exception as no:  # the form does not take this dtype or batch
                            failed[name] = reason(no)
                            continue
                        if not error < 1e-2:
                            row["wrong"] = f"{name}: relative error {error:.2e}"
                        candidates[name] = [functools.partial(ours, i, name) for i in range(number)]
                    session.time(row, candidates, ours="auto")
                    row["failed"] = failed | row.get("failed", {})
                    single = {n: t["median"] for n, t in row["times"].items() if n in FORMS}
                    if single:
                        row["winner"] = min(single, key=lambda name: single[name])
    strict_float32(False)
