"""Files that are the old content or the whole new one, whatever happens while they are written."""

from __future__ import annotations

import contextlib
import os
import secrets
from pathlib import Path


def write_atomically(path: str | os.PathLike[str], content: bytes) -> None:
    """Write a file in one step: a temporary file beside it, forced to disk, takes its name.

    On an error the temporary file is removed and ``path`` is as it was. A process that is killed
    in between leaves the temporary file (:func:`remove_temporaries`).

    Raises:
        OSError: the file cannot be written (no such folder, disk full, ...).
    """
    # Through a symbolic link, as open() would: the link stays, its target is replaced.
    path = Path(os.path.realpath(path))
    temporary = path.with_name(f".{path.name[:100]}.{secrets.token_hex(8)}.tmp")
    try:
        # 0o666 less the umask: the permissions that a plain open() gives.
        with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666), "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise
    _sync_folder(path.parent)


def remove_temporaries(folder: Path, prefix: str) -> None:
    """Remove what killed writers of files ``prefix*`` left in ``folder``; none may be at work."""
    for left in folder.glob(f".{prefix}*.tmp"):
        left.unlink(missing_ok=True)


def _sync_folder(folder: Path) -> None:
    """Force the new name to disk, where folders can be opened (not on Windows)."""
    if os.name != "posix":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
