"""Masks in files: safetensors with a checksum, written atomically, read with every check."""

from __future__ import annotations

import hashlib
import json
import os
import struct
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import safetensors
import safetensors.torch
import torch
from torch import Tensor

from fastprune.files import write_atomically

FORMAT = "fastprune.masks"
VERSION = "1"
_KEYS = {"format", "version", "names", "sha256"}


def digest(masks: Mapping[str, Tensor]) -> str:
    """SHA-256, in hexadecimal, of the names, shapes and packed bits of bool tensors.

    Names are taken in sorted order, so the order of the mapping does not matter; every length is
    written before what it measures, so different masks never give the same bytes.
    """
    sha = hashlib.sha256(f"{FORMAT}/{VERSION}".encode())
    for name in sorted(masks):
        mask = masks[name]
        label = name.encode("utf-8", "surrogatepass")
        sha.update(struct.pack("<QQ", len(label), mask.dim()))
        sha.update(label)
        sha.update(struct.pack(f"<{mask.dim()}Q", *mask.shape))
        sha.update(np.packbits(mask.cpu().contiguous().numpy().reshape(-1)).tobytes())
    return sha.hexdigest()


def save(masks: Mapping[str, Tensor], checksum: str, path: str | os.PathLike[str]) -> None:
    """Write ``masks`` and their ``checksum`` to ``path``; see :meth:`fastprune.Masks.save`."""
    if "__metadata__" in masks:
        raise ValueError("masks['__metadata__']: safetensors files reserve this name")
    metadata = {
        "format": FORMAT,
        "version": VERSION,
        "names": json.dumps(list(masks)),  # the file itself does not keep their order
        "sha256": checksum,
    }
    tensors = {name: mask.cpu().contiguous() for name, mask in masks.items()}
    write_atomically(path, safetensors.torch.save(tensors, metadata))


def load(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], str]:
    """The bool tensors in ``path``, in their saved order, and the checksum they must have.

    Everything but the checksum has been verified.
    """
    # Read whole, not mapped: a file that shrinks while mapped kills the process with SIGBUS.
    content = Path(path).read_bytes()
    try:
        return _parse(content)
    except (safetensors.SafetensorError, ValueError, KeyError, TypeError, RecursionError) as e:
        raise ValueError(f"{os.fspath(path)}: not a readable file of masks: {e}") from e


def _parse(content: bytes) -> tuple[dict[str, Tensor], str]:
    tensors = safetensors.torch.load(content)  # checks the header, every offset and every length
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    metadata = header.get("__metadata__") or {}
    if metadata.get("format") != FORMAT:
        raise ValueError(f"format is {metadata.get('format')!r}, expected {FORMAT!r}")
    if metadata.get("version") != VERSION:
        raise ValueError(f"version is {metadata.get('version')!r}, this release reads {VERSION!r}")
    if metadata.keys() != _KEYS:
        raise ValueError(f"metadata holds {sorted(metadata)}, expected {sorted(_KEYS)}")
    names = json.loads(metadata["names"])
    if not isinstance(names, list) or sorted(names) != sorted(tensors):
        raise ValueError("the list of names does not match the tensors")
    for name, mask in tensors.items():
        if mask.dtype != torch.bool:
            raise ValueError(f"{name!r} has dtype {mask.dtype}, expected torch.bool")
        if mask.numel() and int(mask.view(torch.uint8).max()) > 1:
            raise ValueError(f"{name!r} holds bytes that are neither 0 nor 1")
    return {name: tensors[name] for name in names}, metadata["sha256"]
