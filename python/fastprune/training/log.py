"""The log of a run: one JSON object per line and epoch."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fastprune.files import remove_temporaries, write_atomically

TIME_FIELDS = ("seconds", "update_seconds")
"""Fields that differ from run to run; all others are the same bits whenever a run is repeated."""


class Log:
    """Lines in memory and, where there is a path, in a file.

    Args:
        path: of the file; None on ranks that do not write.
        entries: what was logged before, as the checkpoint has it. The file is made to hold these
            lines and no others.
    """

    def __init__(self, path: Path | None, entries: Sequence[Mapping[str, Any]] = ()) -> None:
        self.path = path
        self.entries = [dict(entry) for entry in entries]
        if path is not None:
            remove_temporaries(path.parent, path.name)
            write_atomically(path, "".join(map(_line, self.entries)).encode())

    def add(self, entry: Mapping[str, Any]) -> None:
        """One more line; NaN and infinities become null."""
        finite = {
            k: None if isinstance(v, float) and not math.isfinite(v) else v
            for k, v in entry.items()
        }
        if self.path is not None:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(_line(finite))
        self.entries.append(finite)


def _line(entry: Mapping[str, Any]) -> str:
    return json.dumps(entry, allow_nan=False) + "\n"
