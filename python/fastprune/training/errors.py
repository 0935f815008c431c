"""What ends a run before its time."""

from __future__ import annotations


class RunError(Exception):
    """Something that the user can put right; one line says what."""

    def __str__(self) -> str:
        return " ".join(super().__str__().split())


class RunStopped(Exception):  # noqa: N818  # no error: the user asked for it
    """Ctrl-C, after everything needed to go on has been written; says where."""
