"""fastprune: neural network pruning whose speedups are measured.

Prune a PyTorch model with any of the published methods, swap its layers for sparse ones with one
call, and see wall-clock time fall. See :func:`prune`, :func:`accelerate` and the README.
"""

from fastprune import _extension

_C = _extension.load()

import fastprune.ops  # noqa: E402, F401  # first: the other packages meet in it
from fastprune import (  # noqa: E402
    data,
    distributed,
    dynamic,
    effective,
    iterative,
    metrics,
    models,
    nn,
    ops,
    quotas,
    reference,
    timing,
)
from fastprune.build import build_info  # noqa: E402
from fastprune.convert import accelerate, finalize  # noqa: E402
from fastprune.dynamic import (  # noqa: E402
    DPF,
    DSR,
    SET,
    SFP,
    FeedbackCompression,
    Incremental,
    MaskUpdate,
    OneShot,
    RigL,
    SparseMomentum,
)
from fastprune.effective import (  # noqa: E402
    effective_compression,
    effective_masks,
    effective_sparsity,
    path_norms,
    trim,
)
from fastprune.iterative import (  # noqa: E402
    SAP,
    IterativePruning,
    LotteryTicket,
    OneShotIterative,
    sap_step,
)
from fastprune.masks import Masks  # noqa: E402
from fastprune.metrics import (  # noqa: E402
    Macs,
    MaskChanges,
    direct_compression,
    macs,
    mask_changes,
    mask_flips,
    mask_iou,
)
from fastprune.ops import (  # noqa: E402
    KeptScores,
    MonSolution,
    Pattern,
    SolveInfo,
    SparsityIndex,
    TensorStatistics,
    gini_index,
    global_topk_mask,
    global_topk_sweep,
    kept_scores,
    masked_conv2d,
    masked_linear,
    mon_splitting,
    pack,
    pq_bound,
    pq_index,
    pq_index_rows,
    tensor_statistics,
)
from fastprune.pruners import Pruner, prune, score  # noqa: E402
from fastprune.report import LayerReport, Report  # noqa: E402

__version__: str = _C.build_info()["version"]

__all__ = [
    "DPF",
    "DSR",
    "SAP",
    "SET",
    "SFP",
    "FeedbackCompression",
    "Incremental",
    "IterativePruning",
    "KeptScores",
    "LayerReport",
    "LotteryTicket",
    "Macs",
    "MaskChanges",
    "MaskUpdate",
    "Masks",
    "MonSolution",
    "OneShot",
    "OneShotIterative",
    "Pattern",
    "Pruner",
    "Report",
    "RigL",
    "SolveInfo",
    "SparseMomentum",
    "SparsityIndex",
    "TensorStatistics",
    "accelerate",
    "build_info",
    "data",
    "direct_compression",
    "distributed",
    "dynamic",
    "effective",
    "effective_compression",
    "effective_masks",
    "effective_sparsity",
    "finalize",
    "gini_index",
    "global_topk_mask",
    "global_topk_sweep",
    "iterative",
    "kept_scores",
    "macs",
    "mask_changes",
    "mask_flips",
    "mask_iou",
    "masked_conv2d",
    "masked_linear",
    "metrics",
    "models",
    "mon_splitting",
    "nn",
    "ops",
    "pack",
    "path_norms",
    "pq_bound",
    "pq_index",
    "pq_index_rows",
    "prune",
    "quotas",
    "reference",
    "sap_step",
    "score",
    "tensor_statistics",
    "timing",
    "trim",
]
