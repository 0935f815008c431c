"""Device time of a call with cold caches, candidates in turn.

A candidate is a list of calls that do the same work on different copies of its operands. The calls
are captured in one CUDA graph that goes round the copies, so that what a call reads was evicted by
the others and no launch from Python is in the time; a buffer larger than the L2 cache is written
before each replay. What cannot be captured is launched as it is, once per reading, behind a pause
that lets the processor run ahead of the GPU.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from fastprune import timing

Call = Callable[[], object]

# Long enough that the two events and the launch of a graph, about 2 us, hardly count.
_GRAPH_SECONDS = 100e-6
_MOST_CALLS = 64
_MOST_ROUNDS = 200
_PAUSE_CYCLES = 400_000  # 0.2 ms at 2 GHz


@dataclass(frozen=True)
class Measured:
    """Seconds per call, and how they were taken."""

    timing: timing.Timing
    how: str

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self.timing), "how": self.how}


class Clock:
    """On the CPU, for trying the code without a GPU: one reading of each call."""

    device = torch.device("cpu")
    l2_bytes = 0
    dry = True

    def copies(self, bytes_per_call: float, most: int = 24) -> int:
        """How many copies of operands keep a call from finding its own in the cache."""
        del bytes_per_call, most
        return 2

    def measure(
        self,
        candidates: Mapping[str, Sequence[Call]],
        seconds: float,
        launched: Collection[str] = (),
    ) -> tuple[dict[str, Measured], dict[str, str]]:
        """Time every candidate.

        Args:
            candidates: name -> calls on different copies.
            seconds: to spend on the timed calls of each candidate; at least five readings.
            launched: candidates that are not to be captured.
        Returns:
            name -> :class:`Measured`, and name -> reason for those that failed.
        """
        del seconds, launched
        done, failed = {}, {}
        for name, calls in candidates.items():
            try:
                samples = []
                for call in calls:
                    began = time.perf_counter()
                    call()
                    samples.append(time.perf_counter() - began)
                done[name] = Measured(timing.quartiles(samples), "dry run")
            except Exception as error:  # peers raise anything
                failed[name] = reason(error)
        return done, failed

    def synchronize(self) -> None:
        """Wait for the device."""

    def release(self) -> None:
        """Give memory back between cases."""


class CudaClock(Clock):
    """On the current CUDA device."""

    dry = False

    def __init__(self) -> None:
        self.device = torch.device("cuda", torch.cuda.current_device())
        properties = torch.cuda.get_device_properties(self.device)
        self.l2_bytes = int(getattr(properties, "L2_cache_size", 0)) or 64 << 20
        self._flushed = torch.empty(2 * self.l2_bytes, dtype=torch.uint8, device=self.device)

    def copies(self, bytes_per_call: float, most: int = 24) -> int:
        return max(2, min(most, math.ceil(2 * self.l2_bytes / max(bytes_per_call, 1)) + 1))

    def synchronize(self) -> None:
        torch.cuda.synchronize(self.device)

    def release(self) -> None:
        with contextlib.suppress(RuntimeError):  # the allocator refuses after a failed capture
            torch.cuda.empty_cache()

    def measure(
        self,
        candidates: Mapping[str, Sequence[Call]],
        seconds: float,
        launched: Collection[str] = (),
    ) -> tuple[dict[str, Measured], dict[str, str]]:
        ready: dict[str, _Ready] = {}
        failed: dict[str, str] = {}
        for name, calls in candidates.items():
            try:
                ready[name] = self._ready(calls, name not in launched)
            except Exception as error:  # one that cannot run must not hide the others
                failed[name] = reason(error)
                raise_if_lost(error)
        samples: dict[str, list[float]] = {name: [] for name in ready}
        began, rounds = time.perf_counter(), 0
        while ready and (
            rounds < 5
            or (rounds < _MOST_ROUNDS and time.perf_counter() - began < seconds * len(ready))
        ):
            events = {name: self._reading(one, rounds) for name, one in ready.items()}
            self.synchronize()
            for name, (start, end) in events.items():
                samples[name].append(start.elapsed_time(end) * 1e-3 / ready[name].calls)
            rounds += 1
        return {
            name: Measured(timing.quartiles(samples[name]), one.how) for name, one in ready.items()
        }, failed

    def _ready(self, calls: Sequence[Call], graph: bool) -> _Ready:
        stream = torch.cuda.Stream(self.device)
        stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(stream):  # what a first call prepares must not be in the graph
            for call in calls:
                call()
            stream.synchronize()
            began = time.perf_counter()
            for call in calls:
                call()
            stream.synchronize()
            once = (time.perf_counter() - began) / len(calls)
        torch.cuda.current_stream(self.device).wait_stream(stream)
        if graph:
            turns = max(1, math.ceil(_GRAPH_SECONDS / (once * len(calls))))
            number = len(calls) * min(turns, max(1, _MOST_CALLS // len(calls)))
            captured = torch.cuda.CUDAGraph()
            try:
                with torch.cuda.stream(stream):
                    # Not torch.cuda.graph, which may collect garbage at every capture.
                    captured.capture_begin()
                    try:
                        for i in range(number):
                            calls[i % len(calls)]()
                    finally:
                        captured.capture_end()
                captured.replay()
                self.synchronize()
                return _Ready(lambda _: captured.replay(), number, "graph")
            except Exception as error:  # a call that waits for the GPU
                raise_if_lost(error)
        return _Ready(lambda turn: calls[turn % len(calls)](), 1, "launched")

    def _reading(self, one: _Ready, turn: int) -> tuple[torch.cuda.Event, torch.cuda.Event]:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self._flushed.fill_(turn & 1)
        if one.how == "launched":
            torch.cuda._sleep(_PAUSE_CYCLES)
        start.record()
        one.run(turn)
        end.record()
        return start, end


@dataclass(frozen=True)
class _Ready:
    run: Callable[[int], object]
    calls: int
    how: str


class LostDeviceError(RuntimeError):
    """The CUDA context cannot be used any more: this process has to end."""


def raise_if_lost(error: Exception) -> None:
    """Raise :class:`LostDeviceError` unless the device still answers after ``error``."""
    try:
        torch.cuda.synchronize()
    except Exception as worse:
        raise LostDeviceError(reason(error)) from worse


def reason(error: Exception) -> str:
    """One line of it."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]
