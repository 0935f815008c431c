"""Ctrl-C that waits for the end of a training step."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class Interrupts:
    """SIGINT and SIGTERM: noted while deferred, KeyboardInterrupt otherwise.

    A second SIGINT is a KeyboardInterrupt at once; not SIGTERM, which ``torchrun`` sends after a
    Ctrl-C that its workers have seen too. Outside the main thread, which alone receives
    signals, nothing is changed.
    """

    def __init__(self) -> None:
        self.requested = False
        self._deferring = False

    @contextmanager
    def watching(self) -> Iterator[Interrupts]:
        """Handles both signals inside the block."""
        if threading.current_thread() is not threading.main_thread():
            yield self
            return
        before = {s: signal.signal(s, self._handle) for s in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """Signals only set ``requested`` inside the block."""
        self._deferring = True
        try:
            yield
        finally:
            self._deferring = False

    def _handle(self, number: int, _frame: FrameType | None) -> None:
        if not self._deferring or (self.requested and number == signal.SIGINT):
            raise KeyboardInterrupt
        self.requested = True
