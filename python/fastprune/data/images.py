"""Tiny-ImageNet and ImageNet: folders of image files, decoded as they are asked for."""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from fastprune.data._common import DatasetInfo, normalize_, not_found

TINY_IMAGENET = DatasetInfo(
    "tiny-imagenet", (3, 64, 64), 200, (0.4802, 0.4481, 0.3975), (0.2770, 0.2691, 0.2821)
)
IMAGENET = DatasetInfo(
    "imagenet", (3, 224, 224), 1000, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
)

# The same as torchvision's, so that both find the same files.
EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
_RESIZE = 256


def _pillow() -> Any:
    try:
        return importlib.import_module("PIL.Image")
    except ImportError as error:
        raise ImportError("reading image files needs Pillow: pip install pillow") from error


class RgbLoader:
    """Decode an image file to a Pillow RGB image.

    Args:
        size: (width, height) that every file must have; None for any.
    Raises (when called):
        ValueError: the file does not decode, or has another size; names the file.
        ImportError: Pillow is not installed.
    """

    def __init__(self, size: tuple[int, int] | None = None) -> None:
        self.size = size

    def __call__(self, path: str) -> Any:
        """Decode ``path``."""
        pillow = _pillow()
        try:
            with open(path, "rb") as stream, pillow.open(stream) as image:
                rgb = image.convert("RGB")
        except (OSError, SyntaxError, ValueError, pillow.DecompressionBombError) as error:
            # SyntaxError: Pillow's word for a damaged PNG.
            raise ValueError(f"{path}: not a readable image ({error})") from error
        if self.size is not None and rgb.size != self.size:
            raise ValueError(f"{path}: an image of {rgb.size} pixels, expected {self.size}")
        return rgb


class ToInput:
    """Turn a Pillow RGB image into a float32 tensor (3, height, width).

    Larger pictures: the shorter side is brought to 256 (bilinear) and the central 224 x 224 kept,
    as in the usual ImageNet evaluation. The same arithmetic with and without torchvision, so that
    results do not depend on what is installed.

    Args:
        info: gives the size, mean and std.
        resize: whether to resize and crop, or take the image as it is.
        normalize: subtract the mean and divide by std; otherwise values are in [0, 1].
    """

    def __init__(self, info: DatasetInfo, resize: bool, normalize: bool) -> None:
        self.info = info
        self.resize = resize
        self.normalize = normalize

    def __call__(self, image: Any) -> Tensor:
        """Convert one image."""
        if self.resize:
            width, height = image.size
            short = min(width, height)
            # The longer side is rounded down, as torchvision's Resize does.
            size = (_RESIZE * width // short, _RESIZE * height // short)
            image = image.resize(size, resample=_pillow().Resampling.BILINEAR)
            crop = self.info.in_shape[1]
            left, top = (round((side - crop) / 2.0) for side in size)
            image = image.crop((left, top, left + crop, top + crop))
        pixels = torch.from_numpy(np.array(image, np.uint8)).permute(2, 0, 1)
        tensor = pixels.to(torch.float32, memory_format=torch.contiguous_format).div_(255.0)
        return normalize_(tensor, self.info) if self.normalize else tensor


class ImageFiles(Dataset[tuple[Tensor, int]]):
    """Image files with labels, decoded on access. Can be sent to DataLoader workers.

    Attributes:
        samples: (path, label) of each item; targets: the labels; classes: names, by label.
        transform: called on each Pillow image; replace it to augment.
    """

    def __init__(
        self,
        samples: list[tuple[str, int]],
        classes: list[str],
        loader: Callable[[str], Any],
        transform: Callable[[Any], Tensor],
    ) -> None:
        self.samples = samples
        self.targets = [label for _, label in samples]
        self.classes = classes
        self.loader = loader
        self.transform = transform

    def __len__(self) -> int:
        """Number of images."""
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        """Decode one: (float32 (3, height, width), label)."""
        path, label = self.samples[index]
        return self.transform(self.loader(path)), label


def _class_folders(folder: Path) -> list[str]:
    """Class names, sorted: a class's label is its place in this list, as in torchvision."""
    return sorted(entry.name for entry in os.scandir(folder) if entry.is_dir())


def _is_image(name: str) -> bool:
    return name.lower().endswith(EXTENSIONS)


def _walk(folder: Path, classes: list[str]) -> list[tuple[str, int]]:
    """All image files below each class folder, in sorted order."""
    samples: list[tuple[str, int]] = []
    for label, name in enumerate(classes):
        before = len(samples)
        for base, _, files in sorted(os.walk(folder / name, followlinks=True)):
            samples += [(os.path.join(base, f), label) for f in sorted(files) if _is_image(f)]
        if len(samples) == before:
            raise ValueError(f"{folder / name}: no image files ({', '.join(EXTENSIONS)})")
    return samples


def open_class_folders(
    folder: Path, loader: Callable[[str], Any], transform: Callable[[Any], Tensor]
) -> Dataset[tuple[Tensor, int]]:
    """A folder with one folder per class: torchvision's ImageFolder if installed, else ours.

    Raises:
        ValueError: there is no class folder, or one holds no image.
    """
    classes = _class_folders(folder)
    if not classes:
        raise ValueError(f"{folder}: no class folders inside")
    try:
        datasets = importlib.import_module("torchvision.datasets")
    except (ImportError, RuntimeError, OSError):
        # RuntimeError and OSError: a torchvision built for another torch.
        return ImageFiles(_walk(folder, classes), classes, loader, transform)
    try:
        found: Dataset[tuple[Tensor, int]] = datasets.ImageFolder(
            str(folder), transform=transform, loader=loader
        )
    except FileNotFoundError as error:
        raise ValueError(f"{folder}: {error}") from error
    return found


def _check_classes(classes: list[str], info: DatasetInfo, source: Path) -> None:
    if not 0 < len(classes) <= info.num_classes:
        raise ValueError(f"{source}: {len(classes)} classes, expected 1 .. {info.num_classes}")


def _tiny_classes(folder: Path) -> list[str]:
    listing = folder / "wnids.txt"
    if listing.is_file():
        classes = sorted(set(listing.read_text("utf-8", errors="replace").split()))
    elif (folder / "train").is_dir():
        classes = _class_folders(folder / "train")
    else:
        raise not_found(folder, TINY_IMAGENET.name, ["wnids.txt", "train/<wnid>/"])
    _check_classes(classes, TINY_IMAGENET, listing)
    return classes


def load_tiny(root: Path, split: str, normalize: bool) -> Dataset[tuple[Tensor, int]]:
    """Tiny-ImageNet; ``"test"`` is its val folder, whose labels are public.

    Raises:
        FileNotFoundError: files are missing.
        ValueError: unknown classes, malformed annotations.
        ImportError: Pillow is not installed.
    """
    _pillow()
    part = "train" if split == "train" else "val"
    own = root / "tiny-imagenet-200"
    folder = own if own.is_dir() else root
    if not (folder / part).is_dir():
        tail = "<wnid>/images/*.JPEG" if part == "train" else "val_annotations.txt"
        raise not_found(root, TINY_IMAGENET.name, [f"tiny-imagenet-200/{part}/{tail}"])
    classes = _tiny_classes(folder)
    loader = RgbLoader((64, 64))
    transform = ToInput(TINY_IMAGENET, False, normalize)
    if part == "train":
        present = _class_folders(folder / part)
        if present != classes:
            odd = sorted(set(present) ^ set(classes))
            raise ValueError(f"{folder / part}: folders differ from wnids.txt at {odd[0]!r}")
        return open_class_folders(folder / part, loader, transform)
    samples = _annotations(folder / "val", classes)
    return ImageFiles(samples, classes, loader, transform)


def _annotations(folder: Path, classes: list[str]) -> list[tuple[str, int]]:
    """Parse val_annotations.txt: image name, wnid, then a box that is not used, tab-separated."""
    source = folder / "val_annotations.txt"
    if not source.is_file():
        raise not_found(folder, TINY_IMAGENET.name, ["val_annotations.txt"])
    labels = {name: label for label, name in enumerate(classes)}
    samples: list[tuple[str, int]] = []
    for number, line in enumerate(source.read_text("utf-8", errors="replace").splitlines(), 1):
        fields = line.split("\t")
        if len(fields) < 2 or not _is_image(fields[0]) or Path(fields[0]).name != fields[0]:
            raise ValueError(f"{source}: line {number} is not '<image>\\t<wnid>\\t...': {line!r}")
        if fields[1] not in labels:
            raise ValueError(f"{source}: line {number}: unknown class {fields[1]!r}")
        path = folder / "images" / fields[0]
        if not path.is_file():
            raise FileNotFoundError(f"{source}: line {number}: no file {str(path)!r}")
        samples.append((str(path), labels[fields[1]]))
    if not samples:
        raise ValueError(f"{source}: empty")
    return samples


def load_imagenet(root: Path, split: str, normalize: bool) -> Dataset[tuple[Tensor, int]]:
    """ImageNet with one folder per class below train/ and val/; ``"test"`` is val.

    Raises:
        FileNotFoundError: files are missing.
        ValueError: too many classes, or train and val have different ones.
        ImportError: Pillow is not installed.
    """
    _pillow()
    part, other = ("train", "val") if split == "train" else ("val", "train")
    own = root / "imagenet"
    base = own if own.is_dir() else root
    folder = base / part
    if not folder.is_dir():
        raise not_found(root, IMAGENET.name, [f"{part}/<class>/*.JPEG"])
    classes = _class_folders(folder)
    _check_classes(classes, IMAGENET, folder)
    if (base / other).is_dir():
        # Labels are places in a sorted list: a class missing on one side would shift them.
        odd = sorted(set(classes) ^ set(_class_folders(base / other)))
        if odd:
            raise ValueError(f"{base}: class {odd[0]!r} is not both in train and in val")
    return open_class_folders(folder, RgbLoader(), ToInput(IMAGENET, True, normalize))
