"""Random selections for several ranks, with what one machine makes of the same tensors."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

import fastprune as fp

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
KINDS = ["normal", "integers", "equal", "zeros", "infinite", "signed_zeros"]
SCORES = ["identity", "magnitude", "product", "saliency", "square"]


def filled(shape: Any, kind: str, dtype: torch.dtype, g: torch.Generator) -> Tensor:
    """A tensor of one of KINDS."""
    t, pick = torch.randn(shape, generator=g), torch.rand(shape, generator=g)
    if kind == "integers":
        t = torch.randint(-3, 4, shape, generator=g).float()
    elif kind == "equal":
        t = torch.full(shape, -1.5)
    elif kind == "zeros":
        t = t * (pick < 0.1)
    elif kind == "infinite":
        t = torch.where(pick < 0.1, torch.inf, torch.where(pick > 0.9, -torch.inf, t))
    elif kind == "signed_zeros":
        t = torch.where(pick < 0.4, 0.0, torch.where(pick < 0.8, -0.0, t))
    return t.to(dtype)


@dataclass
class Case:
    """The arguments of one selection; ``repr`` is the seed that makes it again."""

    seed: int
    values: list[Tensor] = field(repr=False)
    other: list[Tensor] | None = field(repr=False)
    within: list[Tensor] | None = field(repr=False)
    score: str
    scope: str
    k: Any
    scale: list[float] | None = None
    frozen: list[bool] | None = None

    def lists(self, places: list[int] | None = None) -> dict[str, Any]:
        """The arguments that have one entry per tensor, or those of some tensors."""
        every = {
            "scores": self.values,
            "other": self.other,
            "within": self.within,
            "scale": self.scale,
            "frozen": self.frozen,
        }
        if places is None:
            return every
        return {name: part and [part[i] for i in places] for name, part in every.items()}

    def arguments(self) -> dict[str, Any]:
        """Those that the ranks share."""
        return {"k": self.k, "score": self.score, "scope": self.scope}

    def expected(self) -> list[Tensor]:
        """Of one machine."""
        return fp.global_topk_mask(**self.lists(), **self.arguments())


def case_of(
    seed: int, shape: Callable[[random.Random], Any], most: int = 4, scopes: tuple[str, ...] = ()
) -> Case:
    """A random case; ``shape`` draws the shape of a tensor."""
    rnd, g = random.Random(seed), torch.Generator().manual_seed(seed)
    kind, score = rnd.choice(KINDS), rnd.choice(SCORES)
    scope = rnd.choice(scopes or ("global",))
    dtypes = DTYPES if rnd.random() < 0.3 else [rnd.choice(DTYPES)]
    shapes = [shape(rnd) for _ in range(rnd.randint(1, most))]
    values = [filled(s, kind, rnd.choice(dtypes), g) for s in shapes]
    other = within = None
    if score in ("product", "saliency"):
        # Not with infinities: their products with zeros are NaN.
        other = [
            torch.randint(1, 4, v.shape, generator=g).to(v.dtype)
            if kind == "infinite"
            else filled(v.shape, rnd.choice(["normal", "integers"]), v.dtype, g)
            for v in values
        ]
    if rnd.random() < 0.3:
        share = rnd.choice([0.02, 0.5, 1.0])
        within = [torch.rand(v.shape, generator=g) < share for v in values]
    allowed = within or [torch.ones(v.shape, dtype=torch.bool) for v in values]
    if scope == "layer":
        units = [int(a.sum()) for a in allowed]
    elif scope == "neuron":
        units = [int(a.reshape(a.shape[0], -1).sum(1).min()) if a.numel() else 0 for a in allowed]
    elif scope == "filter":
        rows = [a.flatten(1).any(1) if a.dim() > 1 else a for a in allowed]
        whole = [r.numel() if within is None else int(r.sum()) for r in rows]
        units = [sum(whole)]
    else:
        units = [sum(int(a.sum()) for a in allowed)]
    place = rnd.choice([0.0, 1.0, 0.5, rnd.random(), rnd.random()])
    counts = [round(place * u) for u in units]
    k = counts if scope in ("layer", "neuron") else counts[0]
    case = Case(seed, values, other, within, score, scope, k)
    if rnd.random() < 0.2:
        case.scale = [rnd.choice([1.0, 0.5, 3.0, -1.0]) for _ in values]
    if scope == "global" and rnd.random() < 0.2:
        case.frozen = [rnd.random() < 0.3 for _ in values]
        whole = [int(a.sum()) for a, f in zip(allowed, case.frozen, strict=True) if f]
        case.k = sum(whole) + round(place * (units[0] - sum(whole)))
    return case


def small_or_large(rnd: random.Random) -> tuple[int, ...]:
    """Shapes on both sides of the direct selection, and of a chunk."""
    return rnd.choice([(0,), (1,), (7,), (3, 5), (100,), (5000,), (40, 33), (20000,), (300, 400)])


def sharded_shape(rnd: random.Random) -> tuple[int, ...]:
    """Shapes of two or three dimensions, small ones too: some shards are uneven, some empty."""
    return rnd.choice(
        [(1, 3), (2, 2), (5, 7), (3, 1), (64, 9), (7, 2, 5), (130, 257), (200, 300), (33, 8, 70)]
    )
