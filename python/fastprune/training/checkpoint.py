"""Nested states (of a model, an optimizer, a schedule, a pruner) in safetensors files, and back.

A state is any nesting of dicts, lists and tuples around tensors and plain values. The file is one
safetensors file: the tensors, the nesting as compressed JSON in one more, and in the header's
metadata a checksum over everything. No pickle: reading a file runs nothing.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import zlib
from collections import Counter, OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from fastprune.files import remove_temporaries, write_atomically

__all__ = ["Checkpoints", "dumps", "load", "loads", "save"]

FORMAT = "fastprune.state"
VERSION = "1"
KEPT = 2
"""Checkpoints that stay: should the disk damage the newest, the one before is there."""

_KEYS = {"format", "version", "sha256"}
# A tensor, not metadata: the format ends at 100 MB of header, which a long history can pass.
_NESTING = "__state__"
_DAMAGE = (safetensors.SafetensorError, zlib.error)
_SEQUENCES: dict[str, Callable[[list[Any]], Any]] = {
    "list": list,
    "tuple": tuple,
    "size": torch.Size,
}
_DICTS: dict[str, Callable[[list[tuple[Any, Any]]], Any]] = {
    "dict": dict,
    "ordered": OrderedDict,
    "counter": lambda pairs: Counter(dict(pairs)),
}
_TAGS: dict[type, str] = {
    list: "list",
    tuple: "tuple",
    torch.Size: "size",
    dict: "dict",
    OrderedDict: "ordered",
    Counter: "counter",
}


def save(state: Any, path: str | os.PathLike[str]) -> None:
    """Write ``state`` to ``path``, atomically: the old file or the whole new one.

    Args:
        state: None, bool, int, float (NaN, infinities and -0.0 too), str, torch.dtype,
            tensors (strided, any device), and lists, tuples, torch.Size, dicts, OrderedDicts and
            Counters of these, nested in any way. Keys of dicts may be anything but tensors.
    Raises:
        TypeError: something else is in ``state`` (subclasses included); names where.
        OSError: the file cannot be written; ``path`` is as it was.
    Cost: two copies of the tensors in memory. A tensor that occurs twice is written once.
    """
    write_atomically(path, dumps(state))


def load(path: str | os.PathLike[str]) -> Any:
    """The state in a file that :func:`save` wrote: equal in types, keys, order and bits.

    Tensors are contiguous, on the CPU, and share nothing.

    Raises:
        ValueError: the file is truncated, altered, or no such file; names ``path``.
        OSError: it cannot be read.
    """
    # Read whole, not mapped: a file that shrinks while mapped kills the process with SIGBUS.
    content = Path(path).read_bytes()
    try:
        return loads(content)
    except ValueError as error:
        raise ValueError(f"{os.fspath(path)}: {error}") from error


def dumps(state: Any) -> bytes:
    """The bytes of the file that :func:`save` writes."""
    tensors: dict[str, Tensor] = {}
    text = json.dumps(_Flattening(tensors).node(state, ()))
    packed = bytearray(zlib.compress(text.encode(), 1))
    tensors[_NESTING] = torch.frombuffer(packed, dtype=torch.uint8)
    metadata = {"format": FORMAT, "version": VERSION, "sha256": _checksum(tensors)}
    content: bytes = safetensors.torch.save(tensors, metadata)
    return content


def loads(content: bytes) -> Any:
    """The state in the bytes that :func:`dumps` gave; ValueError if they are damaged."""
    try:
        tensors = safetensors.torch.load(content)  # checks the header, every offset and length
        header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
        metadata = header.get("__metadata__") or {}
        if metadata.get("format") != FORMAT:
            raise ValueError(f"format is {metadata.get('format')!r}, expected {FORMAT!r}")
        if metadata.get("version") != VERSION:
            raise ValueError(
                f"version is {metadata.get('version')!r}, this release reads {VERSION!r}"
            )
        if metadata.keys() != _KEYS:
            raise ValueError(f"metadata holds {sorted(metadata)}, expected {sorted(_KEYS)}")
        if _checksum(tensors) != metadata["sha256"]:
            raise ValueError("the checksum does not match: the file is damaged")
        text = zlib.decompress(tensors.pop(_NESTING).numpy().tobytes())
        return _nested(json.loads(text), tensors, set())
    except (*_DAMAGE, ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"not a readable state: {error}") from error


def _checksum(tensors: dict[str, Tensor]) -> str:
    sha = hashlib.sha256(f"{FORMAT}/{VERSION}/".encode())
    for name in sorted(tensors):
        t = tensors[name]
        sha.update(json.dumps([name, str(t.dtype), list(t.shape)]).encode())
        sha.update(t.reshape(-1).view(torch.uint8).numpy().data if t.numel() else b"")
    return sha.hexdigest()


class _Flattening:
    """Turns a state into JSON nodes, and collects its tensors by name.

    None, bool, int, str and finite floats stand for themselves; all else is [tag, content].
    """

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self.tensors = tensors
        self.names: dict[tuple[Any, ...], str] = {}
        self.sources: list[Tensor] = []  # alive, so that no address is used twice

    def node(self, value: Any, path: tuple[Any, ...]) -> Any:
        kind = type(value)
        if value is None or kind in (bool, int, str):
            return value
        if kind is float:
            # JSON has repr's digits, which read back exactly; it has no NaN and no infinity.
            return value if abs(value) < float("inf") else ["float", repr(value)]
        if isinstance(value, Tensor):
            return ["tensor", self.tensor(value.detach(), path)]
        if kind is torch.dtype:
            return ["dtype", str(value).removeprefix("torch.")]
        tag = _TAGS.get(kind)
        if tag in _SEQUENCES:
            return [tag, [self.node(v, (*path, i)) for i, v in enumerate(value)]]
        if tag is not None:
            return [tag, [[self.key(k, path), self.node(v, (*path, k))] for k, v in value.items()]]
        raise TypeError(f"state{_shown(path)}: cannot be stored: {kind.__name__}")

    def key(self, key: Any, path: tuple[Any, ...]) -> Any:
        if isinstance(key, Tensor):
            raise TypeError(f"state{_shown(path)}: a key is a tensor")
        return self.node(key, (*path, key))

    def tensor(self, t: Tensor, path: tuple[Any, ...]) -> str:
        if t.layout != torch.strided or t.is_meta or t.is_quantized:
            raise TypeError(f"state{_shown(path)}: expected a strided tensor with data")
        seen = (t.device, t.dtype, t.data_ptr(), t.storage_offset(), t.shape, t.stride())
        if t.numel() and seen in self.names:
            return self.names[seen]
        name = base = "/".join(map(str, path)).encode(errors="replace").decode() or "state"
        number = 1
        while name in self.tensors or name in ("__metadata__", _NESTING):
            number += 1
            name = f"{base}#{number}"
        self.sources.append(t)
        self.names[seen] = name
        # A copy where it shares memory with another: safetensors stores none twice.
        self.tensors[name] = t.cpu().contiguous().clone()
        return name


def _nested(node: Any, tensors: dict[str, Tensor], used: set[str]) -> Any:
    if not isinstance(node, list):
        return node
    tag, content = node
    if tag in _SEQUENCES:
        return _SEQUENCES[tag]([_nested(v, tensors, used) for v in content])
    if tag in _DICTS:
        return _DICTS[tag](
            [(_nested(k, tensors, used), _nested(v, tensors, used)) for k, v in content]
        )
    if tag == "float":
        return float(content)
    if tag == "dtype":
        return getattr(torch, content)
    if tag == "tensor":
        t = tensors[content]
        if content in used:
            return t.clone()
        used.add(content)
        return t
    raise ValueError(f"unknown tag {tag!r}")


def _shown(path: tuple[Any, ...]) -> str:
    return "".join(f"[{key!r}]" for key in path)


class Checkpoints:
    """The checkpoints ``checkpoint-000000120.safetensors`` of a folder: the newest two.

    One process at a time may write.

    Args:
        folder: exists.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def paths(self) -> list[Path]:
        """Those that there are, the newest first."""
        named = [p for p in self.folder.glob("checkpoint-*") if _NAME.fullmatch(p.name)]
        return sorted(named, key=lambda p: int(p.name[11:-12]), reverse=True)

    def write(self, number: int, state: Any) -> Path:
        """Add one, then remove all but the newest two.

        Raises:
            OSError: it cannot be written; the others are as they were.
        """
        path = self.folder / f"checkpoint-{number:09d}.safetensors"
        save(state, path)
        for old in self.paths()[KEPT:]:
            old.unlink(missing_ok=True)
        return path

    def newest(self) -> tuple[Any, Path | None, list[str]]:
        """The newest that can be read.

        Returns:
            Its state and path, (None, None) if there is no checkpoint; and for each newer one that
            cannot be read, why.
        Raises:
            ValueError: there are checkpoints, and none can be read; the message says why.
        """
        failures: list[str] = []
        for path in self.paths():
            try:
                return load(path), path, failures
            except (ValueError, OSError) as error:
                failures.append(str(error))
        if failures:
            raise ValueError(f"no checkpoint can be read: {'; '.join(failures)}")
        return None, None, []

    def clear(self) -> None:
        """Remove all checkpoints, and what interrupted writers left."""
        for path in self.paths():
            path.unlink(missing_ok=True)
        self.clean()

    def clean(self) -> None:
        """Remove what interrupted writers left."""
        remove_temporaries(self.folder, "checkpoint-")


_NAME = re.compile(r"checkpoint-\d+\.safetensors")
