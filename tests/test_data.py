"""Loaders on small files of the standard formats, whole and broken."""

from __future__ import annotations

import gzip
import io
import os
import pickle
import sys
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from fastprune import data
from fastprune.data import images as image_folders
from fastprune.data.safe_pickle import as_bytes, load_batch

Array = NDArray[np.uint8]


def pixels(*shape: int, seed: int = 0) -> Array:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def normalized(images: Array, name: str) -> torch.Tensor:
    info = data.info(name)
    mean = np.array(info.mean).reshape(-1, 1, 1)
    std = np.array(info.std).reshape(-1, 1, 1)
    return torch.from_numpy((images / 255.0 - mean) / std).float()


# --- names, infos, arguments -------------------------------------------------------------------


def test_infos() -> None:
    assert data.names() == [
        "digits", "mnist", "fashion-mnist", "cifar-10", "cifar-100", "tiny-imagenet", "imagenet",
    ]  # fmt: skip
    for name in data.names():
        info = data.info(name)
        assert info.name == name
        assert len(info.mean) == len(info.std) == info.in_shape[0]
    assert data.info("CIFAR_100") is data.info("cifar100")
    assert data.info("cifar100").num_classes == 100


def test_bad_arguments(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"name: unknown data set 'cifar-11'; close: cifar-10"):
        data.load("cifar-11", tmp_path)
    with pytest.raises(ValueError, match="split: expected"):
        data.load("mnist", tmp_path, "val")
    with pytest.raises(ValueError, match="root: mnist needs the folder"):
        data.load("mnist")
    with pytest.raises(ValueError, match="root: digits are read from"):
        data.load("digits", tmp_path)


@pytest.mark.parametrize("name", data.names()[1:])
def test_missing_files(name: str, tmp_path: Path) -> None:
    if "imagenet" in name:
        pytest.importorskip("PIL")
    with pytest.raises(FileNotFoundError, match="expected there") as caught:
        data.load(name, tmp_path)
    assert str(tmp_path) in str(caught.value)
    with pytest.raises(FileNotFoundError, match="no such folder"):
        data.load(name, tmp_path / "nowhere", "test")


# --- digits ------------------------------------------------------------------------------------


def test_digits() -> None:
    pytest.importorskip("sklearn")
    train, test = data.digits("train"), data.load("digits", split="test")
    x, y = train.tensors
    assert x.shape == (1297, 1, 8, 8)
    assert x.dtype == torch.float32
    assert y.dtype == torch.int64
    assert isinstance(test, torch.utils.data.TensorDataset)
    assert test.tensors[0].shape == (500, 1, 8, 8)
    assert x.mean().item() == pytest.approx(0, abs=1e-3)
    assert x.std(correction=0).item() == pytest.approx(1, abs=1e-3)
    counts = torch.bincount(y) + torch.bincount(test.tensors[1])
    assert counts.tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]
    share = torch.bincount(test.tensors[1]) / counts
    assert ((share - 500 / 1797).abs() < 1 / 174).all()
    raw = data.digits("train", normalize=False).tensors[0]
    assert raw.min() == 0
    assert raw.max() == 1
    assert torch.equal(data.digits("train").tensors[0], x)
    rows = {r.numpy().tobytes() for r in x} & {r.numpy().tobytes() for r in test.tensors[0]}
    assert not rows
    with pytest.raises(ValueError, match="split"):
        data.digits("val")


def test_digits_split_is_frozen() -> None:
    """The same test rows with every version of numpy, or results stop being comparable."""
    pytest.importorskip("sklearn")
    labels = data.digits("test").tensors[1]
    expected = [3, 5, 7, 3, 6, 9, 2, 6, 0, 8, 7, 7, 1, 0, 8, 0, 3, 7, 3, 6]
    assert labels[:20].tolist() == expected


def test_digits_without_sklearn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(ImportError, match=r'pip install "fastprune\[demo\]"'):
        data.digits()


# --- MNIST, FashionMNIST -----------------------------------------------------------------------


def idx(array: Array) -> bytes:
    header = bytes([0, 0, 8, array.ndim])
    return header + b"".join(n.to_bytes(4, "big") for n in array.shape) + array.tobytes()


def write_mnist(folder: Path, suffix: str = "", dot: bool = False) -> tuple[Array, Array]:
    folder.mkdir(parents=True, exist_ok=True)
    for part, n in (("train", 6), ("t10k", 3)):
        images, labels = pixels(n, 28, 28, seed=n), np.arange(n, dtype=np.uint8)
        for stem, array in ((f"{part}-images-idx3", images), (f"{part}-labels-idx1", labels)):
            name = (stem.replace("-idx", ".idx") if dot else stem) + "-ubyte" + suffix
            blob = gzip.compress(idx(array)) if suffix else idx(array)
            (folder / name).write_bytes(blob)
    return pixels(6, 28, 28, seed=6), pixels(3, 28, 28, seed=3)


@pytest.mark.parametrize("suffix", ["", ".gz"])
@pytest.mark.parametrize(
    ("name", "place"),
    [("mnist", "."), ("mnist", "MNIST/raw"), ("fashion-mnist", "FashionMNIST/raw")],
)
def test_mnist(name: str, place: str, suffix: str, tmp_path: Path) -> None:
    train, test = write_mnist(tmp_path / place, suffix, dot=place == ".")
    x, y = data.load(name, tmp_path).tensors  # type: ignore[attr-defined]
    torch.testing.assert_close(x, normalized(train[:, None], name))
    assert y.tolist() == [0, 1, 2, 3, 4, 5]
    assert y.dtype == torch.int64
    x, y = data.load(name, str(tmp_path), "test", normalize=False).tensors  # type: ignore[attr-defined]
    assert torch.equal(x, torch.from_numpy(test[:, None]).float() / 255)
    assert y.tolist() == [0, 1, 2]


def test_own_folder_goes_first(tmp_path: Path) -> None:
    write_mnist(tmp_path)
    folder = tmp_path / "FashionMNIST" / "raw"
    write_mnist(folder)
    (folder / "train-labels-idx1-ubyte").write_bytes(idx(np.full(6, 9, np.uint8)))
    assert data.load("fashion-mnist", tmp_path)[0][1] == 9
    assert data.load("mnist", tmp_path)[0][1] == 0


IMAGES, LABELS = "train-images-idx3-ubyte", "train-labels-idx1-ubyte"


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        (IMAGES, b"", "wrong magic number"),
        (IMAGES, b"\0\0\x08\x03\0\0", "truncated"),
        (IMAGES, idx(pixels(6, 28, 28))[:-1], "truncated"),
        (IMAGES, idx(pixels(6, 28, 28)) + b"x", "more than the expected"),
        (IMAGES, b"\0\0\x0d\x03" + idx(pixels(6, 28, 28))[4:], "wrong magic number"),
        (IMAGES, idx(pixels(6, 28)), "wrong magic number"),
        (IMAGES, idx(pixels(6, 28, 27)), "shape"),
        (IMAGES, idx(pixels(0, 28, 28)), "shape"),
        (IMAGES, b"\0\0\x08\x03" + b"\xff" * 12 + b"data", "truncated"),
        (LABELS, idx(pixels(5)), "5 labels for the 6 images"),
        (LABELS, idx(np.array([0, 1, 2, 3, 10, 5], np.uint8)), "label 10 of sample 4"),
    ],
)
def test_broken_idx(file: str, content: bytes, message: str, tmp_path: Path) -> None:
    write_mnist(tmp_path)
    (tmp_path / file).write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        data.load("mnist", tmp_path)
    assert file in str(caught.value)


@pytest.mark.parametrize("damage", ["cut", "flip", "plain"])
def test_broken_gzip(damage: str, tmp_path: Path) -> None:
    write_mnist(tmp_path, ".gz")
    path = tmp_path / (IMAGES + ".gz")
    blob = bytearray(path.read_bytes())
    if damage == "cut":
        blob = blob[: len(blob) // 2]
    elif damage == "flip":
        blob[len(blob) // 2] ^= 0xFF
    else:
        blob = bytearray(b"not gzip at all")
    path.write_bytes(blob)
    with pytest.raises(ValueError, match=IMAGES):
        data.load("mnist", tmp_path)


# --- CIFAR -------------------------------------------------------------------------------------


def python2_pickle(images: Array, labels: list[int]) -> bytes:
    """A batch as Python 2 wrote the original files: protocol 2, byte strings, numpy.core names."""

    def short(text: bytes) -> bytes:
        return b"U" + bytes([len(text)]) + text

    def integer(value: int) -> bytes:
        return b"J" + value.to_bytes(4, "little", signed=True)

    dtype = b"cnumpy\ndtype\n(" + short(b"u1") + integer(0) + integer(1) + b"tR"
    dtype += b"(" + integer(3) + short(b"|") + b"NNN" + integer(-1) * 2 + integer(0) + b"tb"
    raw = images.tobytes()
    array = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(" + integer(0) + b"t"
    array += short(b"b") + b"tR(" + integer(1) + b"(" + b"".join(map(integer, images.shape)) + b"t"
    array += dtype + b"\x89T" + len(raw).to_bytes(4, "little") + raw + b"tb"
    items = (
        short(b"data") + array + short(b"labels") + b"](" + b"".join(map(integer, labels)) + b"e"
    )
    return b"\x80\x02}(" + items + b"u."


def cifar_batches(seed: int = 0) -> dict[str, tuple[Array, list[int]]]:
    names = [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]
    return {
        name: (pixels(2, 3072, seed=seed + i), [(i + j) % 10 for j in range(2)])
        for i, name in enumerate(names)
    }


def as_tar(folder: str, files: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for name, blob in files.items():
            member = tarfile.TarInfo(f"{folder}/{name}")
            member.size = len(blob)
            archive.addfile(member, io.BytesIO(blob))
    return buffer.getvalue()


def cifar_files(kind: str) -> dict[str, bytes]:
    batches = cifar_batches()
    if kind == "bin":
        return {
            f"{name}.bin": b"".join(
                bytes([label]) + row.tobytes() for row, label in zip(x, y, strict=True)
            )
            for name, (x, y) in batches.items()
        }
    if kind == "python2":
        return {name: python2_pickle(x, y) for name, (x, y) in batches.items()}
    protocol = int(kind)
    return {
        name: pickle.dumps({b"data": x, b"labels": y, b"batch_label": b"b"}, protocol)
        for name, (x, y) in batches.items()
    }


@pytest.mark.parametrize("kind", ["python2", "2", "3", "4", "5", "bin"])
@pytest.mark.parametrize("place", ["folder", "inside", "tar", "tar-itself"])
def test_cifar10(kind: str, place: str, tmp_path: Path) -> None:
    folder = "cifar-10-batches-bin" if kind == "bin" else "cifar-10-batches-py"
    archive = "cifar-10-binary.tar.gz" if kind == "bin" else "cifar-10-python.tar.gz"
    files = cifar_files(kind)
    root = tmp_path
    if place.startswith("tar"):
        (tmp_path / archive).write_bytes(as_tar(folder, files))
        root = tmp_path / archive if place == "tar-itself" else tmp_path
    else:
        (tmp_path / folder).mkdir()
        for name, blob in files.items():
            (tmp_path / folder / name).write_bytes(blob)
        root = tmp_path / folder if place == "inside" else tmp_path
    batches = cifar_batches()
    expected = np.concatenate([batches[f"data_batch_{i}"][0] for i in range(1, 6)])
    x, y = data.load("cifar10", root).tensors  # type: ignore[attr-defined]
    torch.testing.assert_close(x, normalized(expected.reshape(-1, 3, 32, 32), "cifar-10"))
    assert y.tolist() == [0, 1, 1, 2, 2, 3, 3, 4, 4, 5]
    x, y = data.load("cifar-10", root, "test").tensors  # type: ignore[attr-defined]
    assert x.shape == (2, 3, 32, 32)
    assert y.tolist() == [5, 6]
    assert sorted(p.name for p in tmp_path.iterdir()) in ([folder], [archive])


@pytest.mark.parametrize("binary", [False, True])
def test_cifar100_takes_the_fine_label(binary: bool, tmp_path: Path) -> None:
    x, fine, coarse = pixels(2, 3072), [99, 7], [3, 4]
    folder = tmp_path / ("cifar-100-binary" if binary else "cifar-100-python")
    folder.mkdir()
    if binary:
        blob = b"".join(
            bytes([c, f]) + r.tobytes() for c, f, r in zip(coarse, fine, x, strict=True)
        )
        (folder / "test.bin").write_bytes(blob)
    else:
        batch = {b"data": x, b"fine_labels": fine, b"coarse_labels": coarse}
        (folder / "test").write_bytes(pickle.dumps(batch))
    images, labels = data.load("cifar-100", tmp_path, "test", normalize=False).tensors  # type: ignore[attr-defined]
    assert labels.tolist() == fine
    assert torch.equal(images, torch.from_numpy(x.reshape(-1, 3, 32, 32)).float() / 255)


class _Attack:
    """A pickle that would create a file when loaded by an ordinary unpickler."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (self.path,)


def test_malicious_pickle_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    trap = tmp_path / "trap"
    blob = pickle.dumps({b"data": _Attack(trap), b"labels": [0]})
    (folder / "test_batch").write_bytes(blob)
    with pytest.raises(ValueError, match=r"test_batch: refused.*mkdir, which is not allowed"):
        data.load("cifar-10", tmp_path, "test")
    assert not trap.exists()
    pickle.loads(blob)
    assert trap.is_dir(), "the attack must be a real one"


@pytest.mark.parametrize(
    "blob",
    [
        b"cbuiltins\neval\n(S'1'\ntR.",
        b"cos\nsystem\n(S'true'\ntR.",
        b"cnumpy\nload\n(S'x'\ntR.",
        b"cnumpy.core.multiarray\nscalar\n.",
        b"c_codecs\ndecode\n.",
        b"c_codecs\nencode\n(S'x'\nS'rot13'\ntR.",
        # Attempts to change a stand-in for the next load.
        b"cnumpy\nndarray\n}S'parts'\nS'x'\nsb.",
        b"cnumpy.core.multiarray\n_reconstruct\nN}S'__new__'\nS'x'\ns\x86b.",
        b"\x80\x02cnumpy\nndarray\n)\x81}b.",
        b"\x80\x02]q\x00.",
        b"",
        b"garbage",
        b"\x80\x05\x95",
        # A terabyte announced, and a memo place that would need as much.
        b"\x80\x05\x96" + (1 << 40).to_bytes(8, "little") + b"x.",
        b"\x80\x02}r\xff\xff\xff\xff.",
        pickle.dumps([1, 2]),
    ],
)
def test_other_pickles_are_refused(blob: bytes) -> None:
    with pytest.raises(ValueError, match="file: "):
        load_batch(blob, "file")
    array = pixels(2, 3)
    batch = load_batch(pickle.dumps({b"data": array}), "file")
    assert np.array_equal(as_bytes(batch[b"data"], "file"), array)


@pytest.mark.parametrize("array", [np.zeros(3), np.zeros(3, np.int8), np.array([None])])
def test_arrays_of_other_types_are_refused(array: NDArray[Any]) -> None:
    batch = load_batch(pickle.dumps({b"data": array}), "file")
    with pytest.raises(ValueError, match="file: expected an array of unsigned bytes"):
        as_bytes(batch[b"data"], "file")


def test_fortran_order_and_half_made_arrays() -> None:
    array = np.asfortranarray(pixels(3, 4))
    for protocol in (2, 5):
        batch = load_batch(pickle.dumps({b"data": array}, protocol), "file")
        assert np.array_equal(as_bytes(batch[b"data"], "file"), array)
    batch = load_batch(b"\x80\x02}U\x04datacnumpy\nndarray\n)\x81s.", "file")
    with pytest.raises(ValueError, match="expected a numpy array"):
        as_bytes(batch[b"data"], "file")
    blob = python2_pickle(pixels(2, 5), [0]).replace((5).to_bytes(4, "little"), b"\xff\xff\xff\x7f")
    with pytest.raises(ValueError, match="10 bytes for an array of shape"):
        as_bytes(load_batch(blob, "file")[b"data"], "file")


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ({b"data": pixels(2, 3072)}, "no entry 'labels'"),
        ({b"labels": [0]}, "no entry 'data'"),
        ({b"data": pixels(2, 3071), b"labels": [0, 1]}, "expected .N, 3072"),
        ({b"data": pixels(0, 3072), b"labels": []}, "N >= 1"),
        ({b"data": pixels(2, 3072), b"labels": [0]}, "1 labels for 2 images"),
        ({b"data": pixels(2, 3072), b"labels": [0, 10]}, "label 10 of sample 1"),
        ({b"data": pixels(2, 3072), b"labels": [0, -1]}, "outside 0 .. 255"),
        ({b"data": pixels(2, 3072), b"labels": [0, 1.5]}, "not a list of integers"),
        ({b"data": b"bytes", b"labels": [0]}, "expected a numpy array"),
    ],
)
def test_broken_cifar_batches(batch: Any, message: str, tmp_path: Path) -> None:
    path = tmp_path / "test_batch"
    path.write_bytes(pickle.dumps(batch))
    with pytest.raises(ValueError, match=message) as caught:
        data.load("cifar-10", tmp_path, "test")
    assert str(path) in str(caught.value)


def test_broken_cifar_files(tmp_path: Path) -> None:
    path = tmp_path / "test_batch.bin"
    for blob in (b"", b"x" * 3072, b"x" * 3074):
        path.write_bytes(blob)
        with pytest.raises(ValueError, match=r"test_batch\.bin: .*multiple of 3073"):
            data.load("cifar-10", tmp_path, "test")
    path.write_bytes(b"\x0a" + b"x" * 3072)
    with pytest.raises(ValueError, match=r"test_batch\.bin: label 10"):
        data.load("cifar-10", tmp_path, "test")
    whole = as_tar("cifar-100-python", {"train": os.urandom(5000), "test": os.urandom(5000)})
    archive = tmp_path / "cifar-100-python.tar.gz"
    for blob in (whole[: len(whole) // 2], b"not an archive"):
        archive.write_bytes(blob)
        with pytest.raises(ValueError, match=r"cifar-100-python\.tar\.gz: "):
            data.load("cifar-100", tmp_path, "test")
    archive.write_bytes(as_tar("cifar-100-python", {"train": b"x"}))
    with pytest.raises(ValueError, match="no cifar-100-python/test inside"):
        data.load("cifar-100", tmp_path, "test")
    (tmp_path / "data_batch_1").write_bytes(b"x")
    with pytest.raises(FileNotFoundError, match="data_batch_2, data_batch_3"):
        data.load("cifar-10", tmp_path)


# --- folders of images -------------------------------------------------------------------------


def write_image(path: Path, array: Array) -> None:
    image = pytest.importorskip("PIL.Image")
    path.parent.mkdir(parents=True, exist_ok=True)
    # The content decides the format, so lossless PNG under the standard .JPEG name will do.
    image.fromarray(array).save(path, "PNG" if path.stem.startswith("png") else None)


def write_tiny(root: Path) -> dict[str, Array]:
    base, written = root / "tiny-imagenet-200", {}
    for i, wnid in enumerate(("n02", "n01")):
        for j in range(2):
            name = f"png_{wnid}_{j}.JPEG"
            written[name] = pixels(64, 64, 3, seed=10 * i + j)
            write_image(base / "train" / wnid / "images" / name, written[name])
        (base / "train" / wnid / f"{wnid}_boxes.txt").write_text("box\n")
    (base / "wnids.txt").write_text("n02\nn01\n")
    lines = []
    for j, wnid in enumerate(("n02", "n01", "n02")):
        name = f"png_val_{j}.JPEG"
        written[name] = pixels(64, 64, 3, seed=50 + j)
        write_image(base / "val" / "images" / name, written[name])
        lines.append(f"{name}\t{wnid}\t0\t0\t63\t63\n")
    (base / "val" / "val_annotations.txt").write_text("".join(lines))
    return written


def test_tiny_imagenet(tmp_path: Path) -> None:
    written = write_tiny(tmp_path)
    train: Any = data.load("tiny-imagenet", tmp_path)
    assert [label for _, label in train.samples] == [0, 0, 1, 1]
    assert train.classes == ["n01", "n02"]
    for (path, label), (x, y) in zip(train.samples, train, strict=True):
        assert label == y
        assert x.dtype == torch.float32
        expected = normalized(written[Path(path).name].transpose(2, 0, 1), "tiny-imagenet")
        torch.testing.assert_close(x, expected)
    test: Any = data.load("tiny-imagenet", tmp_path / "tiny-imagenet-200", "test", normalize=False)
    assert test.targets == [1, 0, 1]
    x, _ = test[2]
    assert torch.equal(x, torch.from_numpy(written["png_val_2.JPEG"]).permute(2, 0, 1) / 255)
    loader = torch.utils.data.DataLoader(test, batch_size=3)
    x, y = next(iter(loader))
    assert x.shape == (3, 3, 64, 64)
    assert y.dtype == torch.int64
    assert len(pickle.loads(pickle.dumps(test))) == 3


def test_broken_tiny_imagenet(tmp_path: Path) -> None:
    write_tiny(tmp_path)
    base = tmp_path / "tiny-imagenet-200"
    listing = base / "val" / "val_annotations.txt"
    for text, message in [
        ("png_val_0.JPEG\tn09\t0\t0\t1\t1\n", "line 1: unknown class 'n09'"),
        ("png_val_0.JPEG n01\n", "line 1 is not"),
        ("../../wnids.png\tn01\n", "line 1 is not"),
        ("", "empty"),
    ]:
        listing.write_text(text)
        with pytest.raises(ValueError, match=message) as caught:
            data.load("tiny-imagenet", tmp_path, "test")
        assert "val_annotations.txt" in str(caught.value)
    listing.write_text("png_val_9.JPEG\tn01\n")
    with pytest.raises(FileNotFoundError, match=r"png_val_9\.JPEG"):
        data.load("tiny-imagenet", tmp_path, "test")
    listing.write_text("png_val_0.JPEG\tn01\npng_val_1.JPEG\tn01\n")
    write_image(base / "val" / "images" / "png_val_0.JPEG", pixels(32, 64, 3))
    (base / "val" / "images" / "png_val_1.JPEG").write_bytes(b"not an image")
    test = data.load("tiny-imagenet", tmp_path, "test")
    with pytest.raises(ValueError, match=r"png_val_0\.JPEG: an image of \(64, 32\)"):
        test[0]
    with pytest.raises(ValueError, match=r"png_val_1\.JPEG: not a readable image"):
        test[1]
    listing.unlink()
    with pytest.raises(FileNotFoundError, match="val_annotations"):
        data.load("tiny-imagenet", tmp_path, "test")
    (base / "train" / "n03").mkdir()
    with pytest.raises(ValueError, match=r"differ from wnids\.txt at 'n03'"):
        data.load("tiny-imagenet", tmp_path)


def test_imagenet(tmp_path: Path) -> None:
    for wnid, side in (("n01", 300), ("n02", 260)):
        write_image(tmp_path / "val" / wnid / "a.png", pixels(side, 400, 3))
        write_image(tmp_path / "train" / wnid / "b.JPEG", np.full((280, 256, 3), 128, np.uint8))
    write_image(tmp_path / "val" / "n02" / "grey.png", pixels(256, 256))
    test: Any = data.load("imagenet", tmp_path, "test")
    assert [Path(path).name for path, _ in test.samples] == ["a.png", "a.png", "grey.png"]
    assert test.targets == [0, 1, 1]
    assert all(x.shape == (3, 224, 224) and x.is_contiguous() for x, _ in test)
    x = data.load("imagenet", tmp_path, "test", normalize=False)[2][0]
    grey = torch.from_numpy(pixels(256, 256)[16:240, 16:240]) / 255
    assert torch.equal(x, grey.expand(3, -1, -1))
    x, _ = data.load("imagenet", tmp_path, normalize=False)[0]
    assert (x - 128 / 255).abs().max() < 0.02
    (tmp_path / "train" / "n03").mkdir()
    with pytest.raises(ValueError, match="'n03' is not both in train and in val"):
        data.load("imagenet", tmp_path)
    (tmp_path / "val" / "n03").mkdir()
    with pytest.raises(ValueError, match="n03"):
        data.load("imagenet", tmp_path)


def test_resize_and_listing_agree_with_torchvision(tmp_path: Path) -> None:
    try:
        from torchvision import transforms
    except (ImportError, RuntimeError, OSError) as error:
        pytest.skip(f"torchvision does not import: {error}")
    pillow = pytest.importorskip("PIL.Image")
    theirs = transforms.Compose(
        [transforms.Resize(256), transforms.CenterCrop(224), transforms.ToTensor()]
    )
    ours = image_folders.ToInput(image_folders.IMAGENET, True, False)
    for height, width in ((301, 417), (500, 333), (224, 225)):
        image = pillow.fromarray(pixels(height, width, 3))
        assert torch.equal(ours(image), theirs(image))
    for wnid in ("n02", "n01"):
        for part in ("images", "more"):
            write_image(tmp_path / wnid / part / "a.png", pixels(8, 8, 3))
    found: Any = image_folders.open_class_folders(tmp_path, image_folders.RgbLoader(), ours)
    assert found.samples == image_folders._walk(tmp_path, ["n01", "n02"])


def test_without_pillow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "PIL.Image", None)
    for name in ("tiny-imagenet", "imagenet"):
        with pytest.raises(ImportError, match="pip install pillow"):
            data.load(name, tmp_path)
