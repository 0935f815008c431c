"""What the sections share: the clock, the random numbers, the time that is left, the rows."""

from __future__ import annotations

import contextlib
import copy
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import fastprune as fp
from bench.cuda.clock import Call, Clock, LostDeviceError, raise_if_lost, reason

Row = dict[str, Any]


@dataclass
class Session:
    """One section's run.

    Attributes:
        clock: of the device.
        emit: takes a finished row.
        deadline: ``time.monotonic()`` after which no row is begun.
        seconds: spent on each candidate of a row.
    """

    clock: Clock
    emit: Callable[[Row], None]
    deadline: float = float("inf")
    seconds: float = 0.05
    section: str = ""

    @property
    def device(self) -> torch.device:
        return self.clock.device

    def generator(self, seed: int = 0) -> torch.Generator:
        """Apart from torch's own, which a failed capture leaves unusable."""
        return torch.Generator(self.device).manual_seed(seed)

    def randn(self, shape: Sequence[int], dtype: torch.dtype, seed: int) -> Tensor:
        g = self.generator(seed)
        # By rows: one float32 copy of the largest weight would take a gigabyte.
        out = torch.empty(tuple(shape), dtype=dtype, device=self.device)
        for part in out.flatten().split(1 << 26):
            part.copy_(torch.randn(part.shape, generator=g, device=self.device))
        return out

    def mask(self, shape: Sequence[int], density: float, seed: int) -> Tensor:
        g = self.generator(seed)
        out = torch.empty(tuple(shape), dtype=torch.bool, device=self.device)
        for part in out.flatten().split(1 << 26):
            part.copy_(torch.rand(part.shape, generator=g, device=self.device) < density)
        return out

    @contextlib.contextmanager
    def row(self, case: str, **facts: Any) -> Iterator[Row | None]:
        """A row to fill: emitted at the end, with the error that ended it if one did."""
        row: Row = {"section": self.section, "case": case, **facts}
        if time.monotonic() > self.deadline:
            row["skipped"] = "out of time"
            self.emit(row)
            yield None
            return
        try:
            yield row
        except LostDeviceError as error:
            self.emit(row | {"error": reason(error)})
            raise
        except Exception as error:  # the other rows are wanted all the same
            self.emit(row | {"error": reason(error)})
            if not self.clock.dry:
                raise_if_lost(error)
        else:
            self.emit(row)
        self.clock.release()

    def time(
        self,
        row: Row,
        candidates: Mapping[str, Sequence[Call]],
        launched: Collection[str] = (),
        ours: str = "fastprune",
    ) -> None:
        """Fill in ``times``, ``failed`` and ``ours`` of a row."""
        done, failed = self.clock.measure(candidates, self.seconds, launched)
        row["times"] = {name: one.to_dict() for name, one in done.items()}
        row["ours"] = ours
        if failed:
            row["failed"] = failed


def strict_float32(tf32: bool) -> None:
    """Whether torch's float32 products may round their operands to TF32."""
    torch.backends.cuda.matmul.allow_tf32 = tf32
    torch.backends.cudnn.allow_tf32 = tf32


def copies_of(mask: Tensor, number: int, groups: int = 1) -> list[fp.Pattern]:
    """A pattern packed once, and copies that share no memory with it."""
    pattern = fp.pack(mask, groups=groups)
    return [pattern, *(copy.deepcopy(pattern) for _ in range(number - 1))]


def check_close(row: Row, got: Tensor, exact: Tensor, dtype: torch.dtype, tf32: bool) -> None:
    """Note ``wrong`` when a result is further from the float32 or float64 one than rounding goes.

    Errors of single elements are for the tests; this only keeps a fast wrong kernel from a table.
    """
    tolerance = {torch.bfloat16: 8e-3, torch.float16: 2e-3, torch.float64: 1e-12}.get(dtype, 1e-5)
    tolerance = max(tolerance, 2e-3 if tf32 else 0.0)
    size = float(exact.double().norm())
    error = float((got.double() - exact.double()).norm()) / max(size, 1e-30)
    row["relative_error"] = error
    if not error <= tolerance:  # NaN too
        row["wrong"] = f"relative error {error:.2e}, expected at most {tolerance:.0e}"


def aim(what: str, at_least: float | None) -> list[dict[str, Any]]:
    """The aim of a row, as the report reads it."""
    return [] if at_least is None else [{"over": what, "at_least": at_least}]
