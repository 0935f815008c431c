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
from fastprune.ops.mon_splitting import MonSolution, mon_splitting  # noqa: E402
from fastprune.ops.pattern import Pattern, pack  # noqa: E402
from fastprune.ops.pq_bound import pq_bound  # noqa: E402
from fastprune.ops.solve_info import SolveInfo  # noqa: E402
from fastprune.ops.sparsity_index import (  # noqa: E402
    SparsityIndex,
    gini_index,
    pq_index,
    pq_index_rows,
)
from fastprune.ops.tensor_statistics import TensorStatistics, tensor_statistics  # noqa: E402

__all__ = [
    "KeptScores",
    "MonSolution",
    "Pattern",
    "SolveInfo",
    "SparsityIndex",
    "TensorStatistics",
    "gini_index",
    "global_topk_mask",
    "global_topk_sweep",
    "kept_scores",
    "masked_conv2d",
    "masked_linear",
    "mon_splitting",
    "pack",
    "pq_bound",
    "pq_index",
    "pq_index_rows",
    "tensor_statistics",
]
