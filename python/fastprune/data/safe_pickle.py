"""Read a pickled CIFAR batch without letting the pickle run anything.

A pickle names the functions that rebuild its objects, so a hostile one runs any function it likes.
Here a name is looked up only among stand-ins for what a pickle of numpy byte arrays uses, and the
stand-ins only record what they are given: no numpy code sees state that a file chose.
"""

from __future__ import annotations

import io
import pickle
import pickletools
from typing import Any

import numpy as np

from fastprune.data._common import Bytes


class _StandIn:
    """Base of the stand-ins. ``__setstate__`` exists so that a pickle cannot set attributes."""

    def __setstate__(self, state: object) -> None:
        raise pickle.UnpicklingError(f"{type(self).__name__} takes no state")


class _Dtype(_StandIn):
    """numpy.dtype(spec, align, copy)."""

    spec: object = None  # A pickle can make one without calling __init__.

    def __init__(self, spec: object = None, *_: object) -> None:
        self.spec = spec

    def __setstate__(self, state: object) -> None:
        """Byte order and fields: of no use for single bytes."""


class _Array(_StandIn):
    """numpy.ndarray: shape, dtype and raw bytes, still unchecked."""

    parts: tuple[object, ...] = ()

    def __init__(self, *_: object) -> None:
        pass

    def __setstate__(self, state: object) -> None:
        if not isinstance(state, tuple) or len(state) != 5:
            raise pickle.UnpicklingError("an array's state is not a tuple of five")
        _, shape, dtype, fortran, raw = state
        self.parts = (shape, dtype, bool(fortran), raw)


class _Reconstruct(_StandIn):
    """numpy's _reconstruct(subtype, shape, typecode): an empty array that gets its state later."""

    def __new__(cls, *_: object) -> Any:
        return _Array()


class _FromBuffer(_StandIn):
    """numpy's _frombuffer(buffer, dtype, shape, order), which pickle protocol 5 uses."""

    def __new__(cls, raw: object, dtype: object, shape: object, order: object) -> Any:
        array = _Array()
        array.parts = (shape, dtype, order == "F", raw)
        return array


class _Encode(_StandIn):
    """codecs.encode(text, "latin1"): how protocol 2 of Python 3 spells bytes."""

    def __new__(cls, text: object, encoding: object = "latin1") -> Any:
        if not isinstance(text, str) or encoding not in ("latin1", "latin-1"):
            raise pickle.UnpicklingError("_codecs.encode is allowed for latin1 text only")
        return text.encode("latin1")


_ALLOWED: dict[tuple[str, str], type[_StandIn]] = {
    ("numpy", "dtype"): _Dtype,
    ("numpy", "ndarray"): _Array,
    ("numpy.core.multiarray", "_reconstruct"): _Reconstruct,
    ("numpy._core.multiarray", "_reconstruct"): _Reconstruct,
    ("numpy.core.numeric", "_frombuffer"): _FromBuffer,
    ("numpy._core.numeric", "_frombuffer"): _FromBuffer,
    ("_codecs", "encode"): _Encode,
}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        stand_in = _ALLOWED.get((module, name))
        if stand_in is None:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which is not allowed")
        return stand_in


def _check_sizes(data: bytes) -> None:
    """Refuse sizes and memo places that the file itself could not fill.

    The unpickler allocates what an opcode states before it looks whether the bytes are there;
    ``genops`` raises on the first opcode whose bytes are missing.
    """
    for opcode, argument, _ in pickletools.genops(data):
        if opcode.name not in ("PUT", "BINPUT", "LONG_BINPUT"):
            continue
        if not isinstance(argument, int) or not 0 <= argument <= len(data):
            raise pickle.UnpicklingError(f"memo place {argument} in {len(data)} bytes")


def load_batch(data: bytes, source: str) -> dict[bytes, Any]:
    """Unpickle a dictionary of byte arrays, lists, numbers and strings, and nothing else.

    Args:
        data: the pickle, of any protocol; strings of Python 2 come back as bytes.
        source: the file's name, for messages.
    Returns:
        The dictionary; its keys as bytes. Turn its arrays into numpy with ``as_bytes``.
    Raises:
        ValueError: damaged, not a dictionary, or it asks for anything outside the short list of
            names that a pickle of numpy byte arrays needs; names ``source``.
    """
    try:
        _check_sizes(data)
        batch = _Unpickler(io.BytesIO(data), encoding="bytes").load()
    except Exception as error:  # A damaged pickle can raise almost anything; nothing ran.
        raise ValueError(f"{source}: refused or damaged pickle: {error}") from error
    if not isinstance(batch, dict):
        raise ValueError(f"{source}: expected a pickled dictionary, got {type(batch).__name__}")
    return {key.encode() if isinstance(key, str) else key: batch[key] for key in batch}


def as_bytes(value: object, source: str) -> Bytes:
    """Turn an array of ``load_batch`` into a uint8 array that owns its memory.

    Raises:
        ValueError: not an array, not unsigned bytes, or its shape does not fit its data.
    """
    if not isinstance(value, _Array) or len(value.parts) != 4:
        raise ValueError(f"{source}: expected a numpy array, got {type(value).__name__}")
    shape, dtype, fortran, raw = value.parts
    spec = dtype.spec if isinstance(dtype, _Dtype) else None
    if spec not in ("u1", b"u1", "|u1", b"|u1"):
        raise ValueError(f"{source}: expected an array of unsigned bytes (u1), got {spec!r}")
    if not isinstance(raw, (bytes, bytearray)):
        raise ValueError(f"{source}: the array's data are {type(raw).__name__}, not bytes")
    if not isinstance(shape, tuple) or any(type(n) is not int or n < 0 for n in shape):
        raise ValueError(f"{source}: the array's shape is {shape!r}")
    flat = np.frombuffer(bytearray(raw), np.uint8)
    try:
        return flat.reshape(shape, order="F" if fortran else "C")
    except (ValueError, OverflowError) as error:
        raise ValueError(f"{source}: {flat.size} bytes for an array of shape {shape}") from error
