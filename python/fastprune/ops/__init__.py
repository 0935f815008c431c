"""The torch ops: public function, fake kernel and autograd formula of each, one module per op."""

from fastprune import _extension

_extension.load()  # the ops must be registered before their Python halves are

from fastprune.ops.global_topk_mask import (  # noqa: E402
    KeptScores,
    global_topk_mask,
    global_topk_sweep,
    kept_scores,
)
from fastprune.ops.masked_conv2d import masked_conv2d  # noqa: E402
from fastprune.ops.masked_linear import masked_linear  # noqa: E402
from fastprune.ops.pattern import Pattern, pack  # noqa: E402
from fastprune.ops.tensor_statistics import (  # noqa: E402
    SparsityIndex,
    TensorStatistics,
    gini_index,
    pq_index,
    tensor_statistics,
)

__all__ = [
    "KeptScores",
    "Pattern",
    "SparsityIndex",
    "TensorStatistics",
    "gini_index",
    "global_topk_mask",
    "global_topk_sweep",
    "kept_scores",
    "masked_conv2d",
    "masked_linear",
    "pack",
    "pq_index",
    "tensor_statistics",
]
