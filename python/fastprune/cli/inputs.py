"""What ``bench`` times: the device, the network and one batch, from the arguments."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch
from torch import nn
from torch.utils.data import DataLoader, Subset

from fastprune import data, models
from fastprune.cli import common

DTYPES = {
    "float32": torch.float32,
    "float64": torch.float64,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


def shape(text: str) -> tuple[int, int, int]:
    """``3,32,32`` as three integers."""
    parts = [common.positive_int(part) for part in common.comma_separated(text)]
    if len(parts) != 3:
        raise argparse.ArgumentTypeError(f"{text!r} is not C,H,W, such as 3,32,32")
    return parts[0], parts[1], parts[2]


def device(name: str) -> torch.device:
    """The device, if it is there."""
    if name == "cuda" and not torch.cuda.is_available():
        why = "finds no GPU" if torch.version.cuda else "is a CPU-only build"
        raise common.UsageError(f"--device cuda: torch {torch.__version__} {why}")
    return torch.device(name)


def network(args: argparse.Namespace) -> tuple[nn.Module, tuple[int, ...]]:
    """The network, freshly initialized from the seed, and its input shape.

    Raises:
        UsageError: an unknown name, or a shape that the network does not take.
    """
    with common.usage_errors(), torch.random.fork_rng():
        torch.manual_seed(args.seed)
        in_shape, classes = args.input_shape, args.num_classes
        if args.data is not None and args.dataset is None:
            raise ValueError(f"--data needs --dataset, one of {', '.join(data.names())}")
        if args.dataset is not None:
            info = data.info(args.dataset)
            if info.name == "digits":
                common.require("sklearn")
            in_shape, classes = in_shape or info.in_shape, classes or info.num_classes
        in_shape = in_shape or models.default_input_shape(args.model)
        return models.create(args.model, num_classes=classes, in_shape=in_shape), in_shape


def batch(args: argparse.Namespace, model: nn.Module, in_shape: Sequence[int]) -> common.Batch:
    """One batch that the network takes: real data, or normal noise and uniform labels.

    Raises:
        UsageError: the data cannot be read, or the network does not turn the batch into logits.
    """
    generator = torch.Generator().manual_seed(args.seed)
    if args.dataset is not None:
        with common.usage_errors():
            dataset = data.load(args.dataset, args.data, "train")
            size = len(dataset)  # type: ignore[arg-type]
            if size < args.batch:
                raise ValueError(f"--batch {args.batch}: the data set has {size} samples")
            rows = torch.randperm(size, generator=generator)[: args.batch].tolist()
            x, y = next(iter(DataLoader(Subset(dataset, rows), batch_size=args.batch)))
        y, classes = torch.as_tensor(y), _classes(args.model, model, x)
        if int(y.max()) >= classes:
            raise common.UsageError(
                f"--num-classes: {classes} logits, but the data has label {int(y.max())}"
            )
        return x, y
    x = torch.randn(args.batch, *in_shape, generator=generator)
    classes = _classes(args.model, model, x)
    return x, torch.randint(classes, (args.batch,), generator=generator)


def _classes(name: str, model: nn.Module, x: torch.Tensor) -> int:
    """The number of logits that the network gives for ``x``; its mode is put back."""
    training = model.training
    with (
        common.usage_errors((RuntimeError, ValueError, TypeError, AssertionError)),
        torch.inference_mode(),
    ):
        logits = model.eval()(x)
    model.train(training)
    if not isinstance(logits, torch.Tensor) or logits.dim() != 2:
        raise common.UsageError(f"--model {name}: expected a network that gives (batch, classes)")
    return int(logits.shape[1])
