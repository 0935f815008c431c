"""What the tests of a GPU share. FASTPRUNE_TEST_DEVICE=cpu runs them on the CPU, to try the tests.

Without that variable they need a CUDA device, and are skipped where there is none.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

import fastprune as fp
from layouts import Bound
from oracle import assert_within

DEVICE = torch.device(os.environ.get("FASTPRUNE_TEST_DEVICE") or "cuda")
ON_CUDA = DEVICE.type == "cuda"
_usable = not ON_CUDA or torch.cuda.is_available()
needs_device = pytest.mark.skipif(not _usable, reason="no GPU, and FASTPRUNE_TEST_DEVICE unset")
# Streams, graphs, a second device: nothing to try on the CPU.
needs_cuda = pytest.mark.skipif(not (ON_CUDA and _usable), reason="needs a GPU")

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
FORMS = ("auto", "deltas", "bitmap", "tensor_core", "panel", "dense", "sampled")


@pytest.fixture(autouse=True)
def strict_products() -> Iterator[None]:
    """float32 in float32, sums of half floats in float32: what the error bounds are for.

    After each test the device is waited for, so that an error belongs to the test that made it;
    after one the context is lost, and a worker of pytest-xdist makes place for a fresh one.
    """
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    names = ("allow_bf16_reduced_precision_reduction", "allow_fp16_reduced_precision_reduction")
    before = matmul.allow_tf32, cudnn.allow_tf32, *(getattr(matmul, name) for name in names)
    matmul.allow_tf32 = cudnn.allow_tf32 = False
    for name in names:
        setattr(matmul, name, False)
    yield
    matmul.allow_tf32, cudnn.allow_tf32 = before[:2]
    for name, value in zip(names, before[2:], strict=True):
        setattr(matmul, name, value)
    try:
        synchronize()
    except RuntimeError:
        if "PYTEST_XDIST_WORKER" in os.environ:
            os._exit(70)
        raise


def synchronize() -> None:
    """Wait for the device."""
    if ON_CUDA:
        torch.cuda.synchronize()


def on(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors on the device, with the strides they have."""
    return tuple(t.to(DEVICE) for t in tensors)


def chooses_forms() -> bool:
    """Whether the build lets a test choose the form of a product on the GPU."""
    return ON_CUDA and hasattr(fp._C, "set_cuda_form")


@pytest.fixture(params=FORMS)
def form(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs the test once per form of the product."""
    if request.param != "auto" and not chooses_forms():
        pytest.skip("the form cannot be chosen in this build or on this device")
    if not chooses_forms():
        yield request.param
        return
    fp._C.set_cuda_form(request.param)
    yield request.param
    fp._C.set_cuda_form("auto")


def uneven_mask(shape: tuple[int, ...], density: float, g: torch.Generator) -> Tensor:
    """About that density; rows differ, the first is empty and one is full."""
    mask = torch.rand(shape, generator=g) < density * (
        0.5 + torch.rand(shape[0], generator=g)
    ).view(-1, *[1] * (len(shape) - 1))
    if 0.0 < density < 1.0 and shape[0] > 2:
        mask[0], mask[shape[0] // 2] = False, True
    return mask if density < 1.0 else torch.ones_like(mask)


def linear_products(
    x: Tensor, weight: Tensor, mask: Tensor, bias: Tensor | None, grad: Tensor
) -> tuple[Bound, Bound, Bound]:
    """(value, S, n) of y, of the gradient of x, and of that of the weight at the mask, in float64.

    From CPU tensors narrower than float64: the error of this reference is 2^-29 of their bound.
    """
    x, w, grad = x.double(), torch.where(mask, weight, 0).double(), grad.double()
    kept, m = w.abs(), mask.double()
    y, s, n = x @ w.t(), x.abs() @ kept.t(), m.sum(1).expand(x.shape[0], -1)
    if bias is not None:
        b = bias.double()
        y, s, n = y + b, s + b.abs(), n + 1
    terms = torch.full(mask.shape, x.shape[0], dtype=torch.float64)
    return (
        (y.numpy(), s.numpy(), n.numpy()),
        ((grad @ w).numpy(), (grad.abs() @ kept).numpy(), m.sum(0).expand(x.shape).numpy()),
        ((grad.t() @ x * m).numpy(), (grad.abs().t() @ x.abs() * m).numpy(), terms.numpy()),
    )


def assert_all_within(got: tuple[Tensor, ...], bounds: tuple[Bound, ...], what: str) -> None:
    """y, the gradient of x, that of the weight: each within its bound."""
    for name, value, bound in zip(("y", "dx", "dw"), got, bounds, strict=True):
        assert_within(value.detach().cpu(), *bound, f"{what} {name}")
