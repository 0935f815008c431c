"""The checked arguments of a selection, and what all selections do with them."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from numbers import Integral
from typing import Any, Literal

import torch
from torch import Tensor

from fastprune import reference
from fastprune.ops.backend import has_kernel
from fastprune.ops.topk_checks import OP, expected_float, labels_of, scales_of, tensors
from fastprune.reference.global_topk_mask import fuse_score, pack_bits, rows_of

Scope = Literal["global", "layer", "neuron", "filter"]
# In calls made by row_topk_mask: as neuron, with one count for each row of each tensor.
AnyScope = Literal["global", "layer", "neuron", "filter", "row"]
Score = Literal["identity", "magnitude", "product", "saliency", "square", "noise", "lamp"]
SCOPES = ("global", "layer", "neuron", "filter")
SCORES = ("identity", "magnitude", "product", "saliency", "square", "noise", "lamp")
NOTHING_WRONG = 2**63 - 1  # in the status of a selection on CUDA
FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class TopkCall:
    """Checked arguments: what competes, and how it is scored."""

    values: list[Tensor]
    other: list[Tensor]
    within: list[Tensor]
    scope: AnyScope
    score: Score
    scale: list[float]
    seed: int
    packed: bool
    labels: list[str]  # what follows an argument's name in messages

    @classmethod
    def check(
        cls,
        scores: Any,
        scope: Any,
        score: Any,
        other: Any,
        within: Any,
        scale: Any,
        seed: Any,
        packed: Any,
        names: Any,
    ) -> TopkCall:
        values = tensors(scores, "scores", None)
        if not values:
            raise ValueError(f"{OP}: scores: expected at least one tensor, got none")
        labels = labels_of(names, len(values))
        for i, t in enumerate(values):
            if t.dtype not in FLOATS:
                raise TypeError(f"{OP}: scores{labels[i]}: {expected_float(t)}")
            if t.device != values[0].device:
                raise ValueError(
                    f"{OP}: scores{labels[i]}: expected the device {values[0].device} of the "
                    f"first tensor, got {t.device}"
                )
        if scope not in SCOPES:
            raise ValueError(f"{OP}: scope: expected one of {', '.join(SCOPES)}, got {scope!r}")
        if score not in SCORES:
            raise ValueError(f"{OP}: score: expected one of {', '.join(SCORES)}, got {score!r}")
        if (other is not None) != (score in ("product", "saliency")):
            raise ValueError(
                f"{OP}: other: score {score!r} "
                + ("does not use it, leave it out" if other is not None else "needs it, got None")
            )
        if (seed is not None) != (score == "noise"):
            raise ValueError(
                f"{OP}: seed: score {score!r} "
                + ("does not use it, leave it out" if seed is not None else "needs it, got None")
            )
        if seed is not None and (isinstance(seed, bool) or not isinstance(seed, Integral)):
            raise TypeError(f"{OP}: seed: expected an int, got {type(seed).__name__}")
        factors = [] if other is None else tensors(other, "other", values)
        allowed: list[Tensor] = [] if within is None else tensors(within, "within", values)
        for i, t in enumerate(factors):
            if t.dtype not in FLOATS:
                raise TypeError(f"{OP}: other{labels[i]}: {expected_float(t)}")
        for i, t in enumerate(allowed):
            if t.dtype != torch.bool:
                raise TypeError(
                    f"{OP}: within{labels[i]}: expected dtype torch.bool, got {t.dtype}"
                )
        if not isinstance(packed, bool):
            raise TypeError(f"{OP}: packed: expected a bool, got {type(packed).__name__}")
        if scope in ("neuron", "filter"):
            for i, t in enumerate(values):
                if t.dim() == 0:
                    raise ValueError(
                        f"{OP}: scores{labels[i]}: expected at least 1 dimension with scope "
                        f"{scope!r}, got a scalar"
                    )
        if score == "lamp" and scope in ("neuron", "filter"):  # the kernel ranks whole layers
            values, score = lamp_of(values, allowed), "identity"
        # Torch's integers have 64 bits and a sign.
        wrapped = 0 if seed is None else (int(seed) + 2**63) % 2**64 - 2**63
        return cls(
            values,
            factors,
            allowed,
            scope,
            score,
            scales_of(scale, score, labels),
            wrapped,
            packed,
            labels,
        )

    def subset(self, chosen: Sequence[int]) -> TopkCall:
        """The call for some of the tensors."""

        def some(items: list[Any]) -> list[Any]:
            return [items[i] for i in chosen] if items else []

        return replace(
            self,
            values=some(self.values),
            other=some(self.other),
            within=some(self.within),
            scale=some(self.scale),
            labels=some(self.labels),
        )

    def units(self) -> list[int]:
        """What counts choose from: of all tensors, or of each (each row, with scope neuron)."""
        if self.scope == "global":
            return [sum(t.numel() for t in self.values)]
        if self.scope == "filter":
            return [sum(t.shape[0] for t in self.values)]
        if self.scope == "layer":
            return [t.numel() for t in self.values]
        return [math.prod(t.shape[1:]) for t in self.values]

    def candidates(self, i: int) -> int:
        """Units of one tensor that may be kept, with scope global or filter."""
        if self.scope == "filter":
            rows = rows_of(self.within[i]).any(dim=1) if self.within else None
            return self.values[i].shape[0] if rows is None else int(rows.sum())
        return int(self.within[i].sum()) if self.within else self.values[i].numel()

    def all_of(self, i: int) -> Tensor:
        """The mask of a tensor that is kept whole."""
        v = self.values[i]
        mask = self.within[i].clone() if self.within else torch.ones_like(v, dtype=torch.bool)
        return pack_bits(mask) if self.packed else mask.contiguous()

    def run(self, counts: list[int]) -> list[list[Tensor]]:
        """The masks of every selection: one per count with scope global or filter, else one."""
        with torch.no_grad():
            device = self.values[0].device.type
            if device == "cuda" and has_kernel(OP, device) and self.scope != "row":
                return self.run_on_cuda(torch.ops.fastprune, counts)
            if device not in ("cpu", "meta"):
                return self._by_reference(counts)
            return self._parts(self._masks(torch.ops.fastprune.global_topk_mask, counts))

    def run_on_cuda(self, ops: Any, counts: list[int]) -> list[list[Tensor]]:
        """By the kernels behind ``ops``; one synchronisation, to learn of bad scores."""
        if self.score == "lamp":
            return self._with_lamp_scores().run_on_cuda(ops, counts)
        if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
            return self._parts(self._masks(ops.global_topk_mask, counts))
        *masks, status = self._masks(ops.global_topk_mask_status, counts)
        nan, short = status.tolist()
        if nan < NOTHING_WRONG:
            raise ValueError(f"{OP}: scores{self.labels[nan]}: a candidate's score is NaN")
        if short < NOTHING_WRONG:
            raise ValueError(self._renamed(self._too_few(counts, short)))
        return self._parts(masks)

    def _with_lamp_scores(self) -> TopkCall:
        return replace(self, values=lamp_of(self.values, self.within), score="identity")

    def _masks(self, op: Any, counts: list[int]) -> list[Tensor]:
        # With scope filter the op takes or leaves whole rows; see _inside.
        bits = self.packed and not (self.scope == "filter" and self.within)
        try:
            masks: list[Tensor] = op(
                self.values,
                self.other,
                self.within,
                counts,
                self.scope,
                self.score,
                self.scale,
                self.seed,
                bits,
            )
        except RuntimeError as error:
            message = str(error).partition("\n")[0]
            if f"{OP}: " not in message or "earlier call" in message:
                raise
            raise ValueError(self._renamed(message)) from None
        return masks

    def _parts(self, masks: list[Tensor]) -> list[list[Tensor]]:
        n = len(self.values)
        parts = [masks[i : i + n] for i in range(0, len(masks), n)]
        return [self._inside(part) for part in parts]

    def _too_few(self, counts: list[int], selection: int) -> str:
        """What the op says on the CPU when a selection has fewer candidates than its count."""
        if self.scope in ("global", "filter"):
            candidates = sum(self.candidates(i) for i in range(len(self.values)))
            where = "all values" if self.scope == "global" else "all filters"
            count = counts[selection]
        elif self.scope == "layer":
            candidates, where = self.candidates(selection), f"values[{selection}]"
            count = counts[selection]
        else:
            i = 0
            while selection >= self.values[i].shape[0]:
                selection -= self.values[i].shape[0]
                i += 1
            candidates = int(rows_of(self.within[i])[selection].sum())
            where, count = f"row {selection} of values[{i}]", counts[i]
        return f"{OP}: counts: expected at most the {candidates} candidates of {where}, got {count}"

    def _inside(self, masks: list[Tensor]) -> list[Tensor]:
        """The op takes or leaves whole filters; what an earlier mask took stays taken."""
        if self.scope != "filter" or not self.within:
            return masks
        inside = [mask & w for mask, w in zip(masks, self.within, strict=True)]
        return [pack_bits(mask) for mask in inside] if self.packed else inside

    def _by_reference(self, counts: list[int]) -> list[list[Tensor]]:
        """The reference, behind the checks that the op makes on the data."""
        available: list[Tensor] = []  # candidates of every group of units that compete
        for i, v in enumerate(self.values):
            fused = fuse_score(
                v,
                self.other[i] if self.other else None,
                self.score,
                self.scale[i] if self.scale else 1.0,
                within=self.within[i] if self.within else None,
            )
            allowed = self.within[i] if self.within else torch.ones_like(fused, dtype=torch.bool)
            if self.scope == "filter":
                allowed = (
                    rows_of(allowed).any(dim=1) if self.within else allowed.new_ones(v.shape[0])
                )
                bad = rows_of(fused).isnan().any(dim=1) & allowed
            else:
                bad = fused.isnan() & allowed
            if bool(bad.any()):
                raise ValueError(f"{OP}: scores{self.labels[i]}: a candidate's score is NaN")
            if self.scope == "row":
                available.extend(rows_of(allowed).sum(dim=1))
                continue
            neuron = self.scope == "neuron"
            available.append(rows_of(allowed).sum(dim=1) if neuron else allowed.sum())
        if self.scope in ("global", "filter"):
            available = [torch.stack(available).sum()] * len(counts)
        for count, candidates in zip(counts, available, strict=True):
            fewest = int(candidates.min()) if candidates.numel() else count
            if count > fewest:
                raise ValueError(f"{OP}: k: expected at most {fewest} candidates, got {count}")
        selections = [[count] for count in counts]
        if self.scope == "layer":
            selections = [counts]
        elif self.scope == "neuron":
            pairs = zip(counts, self.values, strict=True)
            selections = [[count for count, v in pairs for _ in range(v.shape[0])]]
        elif self.scope == "row":
            selections = [counts]
        results = []
        for chosen in selections:
            masks = reference.global_topk_mask(
                self.values,
                chosen,
                "neuron" if self.scope == "row" else self.scope,
                self.score,
                self.other or None,
                self.within or None,
                self.scale or None,
                self.seed,
            )
            if self.scope == "filter" and self.within:
                results.append(self._inside(masks))
            else:
                results.append([pack_bits(m) for m in masks] if self.packed else masks)
        return results

    def _renamed(self, message: str) -> str:
        """The op's message in the words of the public function."""
        message = message[message.index(f"{OP}: ") :]
        message = re.sub(
            r"(values|other|within)\[(\d+)\]",
            lambda m: ("scores" if m[1] == "values" else m[1]) + self.labels[int(m[2])],
            message,
        )
        return re.sub(r"counts(\[\d+\])?", "k", message).replace("all values", "all scores")


def row_topk_mask(
    values: Sequence[Tensor], counts: list[int], within: Sequence[Tensor], names: Sequence[str]
) -> list[Tensor]:
    """The largest magnitudes of every row, as many as ``counts`` says for it.

    What :func:`fastprune.global_topk_mask` does with scope ``neuron``, score ``magnitude``, and one
    count per row, tensor after tensor. On CUDA the plain torch reference runs, row by row.
    """
    call = TopkCall.check(
        list(values), "neuron", "magnitude", None, list(within), None, None, False, list(names)
    )
    return replace(call, scope="row").run(counts)[0]


def lamp_of(values: list[Tensor], within: list[Tensor]) -> list[Tensor]:
    """LAMP's scores as tensors."""
    return [
        fuse_score(v, None, "lamp", within=within[i] if within else None)
        for i, v in enumerate(values)
    ]
