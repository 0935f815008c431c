"""What :func:`fastprune.accelerate` decided, and the timings behind it."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass
class LayerReport:
    """One masked layer.

    Attributes:
        name: the weight's parameter name.
        kind: type of the layer.
        shape: the weight's shape; ``input_shape``: that of the input it was timed on.
        density: fraction of weights kept.
        dense_ms, sparse_ms: median milliseconds of torch's dense kernel (the better memory format)
            and of the sparse kernel; None where not timed.
        chosen: ``"sparse"`` or ``"dense"``.
        reason: why dense was kept, else empty.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    input_shape: tuple[int, ...]
    density: float
    dense_ms: float | None
    sparse_ms: float | None
    chosen: str
    reason: str

    @classmethod
    def kept(
        cls, name: str, kind: str, mask: Tensor, reason: str, input_shape: tuple[int, ...] = ()
    ) -> LayerReport:
        """A layer that stays dense."""
        density = float(mask.float().mean()) if mask.numel() else 0.0
        return cls(name, kind, tuple(mask.shape), input_shape, density, None, None, "dense", reason)

    @property
    def speedup(self) -> float | None:
        """dense_ms / sparse_ms, whichever was chosen; None where not timed."""
        if self.dense_ms is None or not self.sparse_ms:
            return None
        return self.dense_ms / self.sparse_ms


@dataclass
class Report:
    """The outcome of :func:`fastprune.accelerate`; ``print`` it for a table.

    Attributes:
        layers: one :class:`LayerReport` per masked parameter.
        training: whether forward and backward were timed, or inference.
        folded: number of BatchNorm layers folded away.
        dense_ms, fast_ms: medians end to end: the pruned model on dense kernels, and the fast one,
            each in its better memory format.
        reverted: True when the fast model lost end to end and was put back on dense kernels;
            ``fast_ms`` is then the time of the attempt.
        channels_last: whether the dense convolutions' weights were stored channels_last.
        form: further form of the fast model that was taken: "fused", "fused, batch last",
            "batch last", "fused, batch last, 16 samples at a time", or empty.
        timings: median and quartiles of every candidate, in seconds.
        device: name of the GPU, empty where the model is on the CPU.
        tf32: whether torch's float32 products may use TF32 there.
        threads, isa, torch_version: where this was measured.
    """

    layers: list[LayerReport]
    training: bool
    folded: int = 0
    dense_ms: float = float("nan")
    fast_ms: float = float("nan")
    reverted: bool = False
    channels_last: bool = False
    form: str = ""
    timings: dict[str, dict[str, float]] = field(default_factory=dict)
    device: str = ""
    tf32: bool = False
    threads: int = field(default_factory=torch.get_num_threads)
    isa: str = field(default_factory=lambda: _isa())
    torch_version: str = torch.__version__

    @property
    def speedup(self) -> float:
        """End to end, of the model that was returned: 1.0 when it was put back on dense kernels."""
        return 1.0 if self.reverted else self.dense_ms / self.fast_ms

    def to_dict(self) -> dict[str, Any]:
        """The whole report as plain numbers and strings, for JSON."""
        return {**asdict(self), "speedup": self.speedup}

    def __str__(self) -> str:
        def ms(value: float | None) -> str:
            return "-" if value is None else f"{value:.3f}"

        head = ("layer", "type", "weight", "kept", "dense ms", "sparse ms", "speedup", "runs", "")
        rows = [
            (
                row.name,
                row.kind,
                "x".join(map(str, row.shape)),
                f"{100 * row.density:.1f} %",
                ms(row.dense_ms),
                ms(row.sparse_ms),
                "-" if row.speedup is None else f"{row.speedup:.2f}",
                row.chosen,
                row.reason,
            )
            for row in self.layers
        ]
        widths = [max(len(r[i]) for r in (head, *rows)) for i in range(len(head))]
        left = {0, 1, 2, 7, 8}
        lines = [
            "  ".join(
                cell.ljust(w) if i in left else cell.rjust(w)
                for i, (cell, w) in enumerate(zip(line, widths, strict=True))
            ).rstrip()
            for line in (head, *rows)
        ]
        what = "forward + backward" if self.training else "inference"
        lines.append(
            f"end to end, {what}: dense {self.dense_ms:.3f} ms, fast {self.fast_ms:.3f} ms, "
            f"speedup {self.dense_ms / self.fast_ms:.2f}"
            + (" -> put back on dense kernels" if self.reverted else "")
        )
        where = f"threads {self.threads}, ISA {self.isa}"
        if self.device:
            where = f"{self.device}, TF32 {'on' if self.tf32 else 'off'}"
        lines.append(
            f"{where}, torch {self.torch_version}"
            + (f", {self.folded} BatchNorm folded" if self.folded else "")
            + (", dense convolutions channels_last" if self.channels_last else "")
            + (f", {self.form}" if self.form else "")
        )
        return "\n".join(lines)


def _isa() -> str:
    from fastprune import _extension

    return str(_extension.load().isa())


def machine(device: torch.device) -> tuple[Any, ...]:
    """What a timing on ``device`` depends on, besides the work."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device), torch.backends.cuda.matmul.allow_tf32
    return torch.get_num_threads(), _isa()
