"""One small class per peer: what it needs, how it holds the operands, one call of it.

Each peer gets the operands in the layout that suits it best and leaves its result in its own:
packing, transposing and loading happen in ``prepare``, outside the timing. The exception is what
a peer must do at every call because activations change: unfolding for a CSR convolution, the
conversion to oneDNN's tensors and back.
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import importlib.util
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

import fastprune
from fastprune.peers.layers import Conv, Layer, Linear

Call = Callable[[], Any]


@dataclass(frozen=True)
class Case:
    """The operands of one layer, float32, contiguous.

    Attributes:
        layer: the shape.
        x: activations, (batch, in) or (batch, in, height, width).
        weight: dense values, (out, in) or (out, in, kernel, kernel).
        mask: bool, shaped like ``weight``; True where kept.
    """

    layer: Layer
    x: Tensor
    weight: Tensor
    mask: Tensor

    @functools.cached_property
    def pruned(self) -> Tensor:
        """The weight with zeros outside the mask."""
        return torch.where(self.mask, self.weight, 0.0)

    def dense(self, x: Tensor, weight: Tensor) -> Tensor:
        """torch's dense product of this shape."""
        layer = self.layer
        if isinstance(layer, Linear):
            return F.linear(x, weight)
        return F.conv2d(x, weight, None, layer.stride, layer.padding)


class Peer:
    """One way to multiply.

    Attributes:
        name: in tables and files.
        kinds: "linear", "conv" or both.
        dtype: what it computes in.
        packages: imported names -> names to install; all are needed.
        dense_torch: a dense float32 form of torch: the best of these is the baseline.
    """

    name: ClassVar[str]
    kinds: ClassVar[tuple[str, ...]] = ("linear", "conv")
    dtype: ClassVar[str] = "float32"
    packages: ClassVar[dict[str, str]] = {}
    dense_torch: ClassVar[bool] = False

    def available(self) -> str | None:
        """Why the peer cannot run here; None if it can."""
        for package in self.packages:
            if importlib.util.find_spec(package) is None:
                return f"{package} is not installed"
        for package in self.packages:
            try:
                importlib.import_module(package)
            except Exception as error:  # a broken binary raises anything
                why = " ".join(str(error).split())
                return f"{package} is installed, but does not import ({why})"
        return None

    def versions(self) -> dict[str, str]:
        """Package -> installed version."""
        found = {}
        for name in self.packages.values():
            try:
                found[name] = importlib.metadata.version(name)
            except importlib.metadata.PackageNotFoundError:
                found[name] = "unknown"
        return found

    def prepare(self, case: Case) -> Call:
        """Load the operands; the result is one call of the product, in any layout."""
        raise NotImplementedError

    def result(self, raw: Any, case: Case) -> Tensor:
        """What the call returned, as the dense product's shape on the CPU."""
        del case
        return torch.as_tensor(raw)


class Dense(Peer):
    """``F.linear`` or ``F.conv2d`` on the weight with zeros, contiguous."""

    name = "dense"
    dense_torch = True

    def prepare(self, case: Case) -> Call:
        x, w = case.x, case.pruned
        return lambda: case.dense(x, w)


class DenseChannelsLast(Peer):
    """``F.conv2d`` on channels_last operands."""

    name = "dense channels_last"
    kinds = ("conv",)
    dense_torch = True

    def prepare(self, case: Case) -> Call:
        last = torch.channels_last
        x, w = (t.contiguous(memory_format=last) for t in (case.x, case.pruned))
        return lambda: case.dense(x, w)


class DenseOneDnn(Peer):
    """``F.linear`` with the weight kept as an oneDNN tensor, where torch would call its BLAS.

    Convolutions run on oneDNN anyway.
    """

    name = "dense oneDNN"
    kinds = ("linear",)
    dense_torch = True

    def available(self) -> str | None:
        return None if torch.backends.mkldnn.is_available() else "torch is built without oneDNN"

    def prepare(self, case: Case) -> Call:
        x, w = case.x, case.pruned.to_mkldnn()
        return lambda: F.linear(x.to_mkldnn(), w).to_dense()


class DenseBfloat16(Peer):
    """The dense product of bfloat16 operands: another dtype, for reference."""

    name = "dense bfloat16"
    dtype = "bfloat16"

    def prepare(self, case: Case) -> Call:
        x, w = case.x.bfloat16(), case.pruned.bfloat16()
        if isinstance(case.layer, Conv):
            x, w = (t.contiguous(memory_format=torch.channels_last) for t in (x, w))
        return lambda: case.dense(x, w)


class WeightTimesMask(Peer):
    """The dense product of ``weight * mask``, multiplied at every call."""

    name = "weight x mask"

    def prepare(self, case: Case) -> Call:
        x, w, mask = case.x, case.weight, case.mask
        return lambda: case.dense(x, w * mask)


class TorchCsr(Peer):
    """torch's CSR product; a convolution unfolds its input first, at every call."""

    name = "torch CSR"

    def prepare(self, case: Case) -> Call:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch calls its CSR tensors a beta feature
            csr = case.pruned.flatten(1).to_sparse_csr()
        layer, x = case.layer, case.x
        if isinstance(layer, Linear):
            columns = x.t().contiguous()
            return lambda: csr @ columns
        size = layer.out_size
        out = x.new_empty(layer.batch, layer.rows, size * size)
        plain = layer.kernel == 1 and layer.stride == 1

        def convolve() -> Tensor:
            unfolded = (
                x.flatten(2)
                if plain
                else F.unfold(x, layer.kernel, padding=layer.padding, stride=layer.stride)
            )
            for sample, y in zip(unfolded, out, strict=True):
                torch.mm(csr, sample, out=y)
            return out.view(layer.batch, layer.rows, size, size)

        return convolve

    def result(self, raw: Any, case: Case) -> Tensor:
        return raw.t() if isinstance(case.layer, Linear) else raw  # type: ignore[no-any-return]


class Fastprune(Peer):
    """``fastprune.masked_linear`` or ``masked_conv2d`` with the mask packed before."""

    name = "fastprune"

    def prepare(self, case: Case) -> Call:
        x, w, layer, pattern = case.x, case.weight, case.layer, fastprune.pack(case.mask)
        if isinstance(layer, Linear):
            return lambda: fastprune.masked_linear(x, w, pattern)
        return lambda: fastprune.masked_conv2d(x, w, pattern, None, layer.stride, layer.padding)
