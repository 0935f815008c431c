"""Exact selection over many ranks: what ``global_topk_mask`` does with ``group`` or DTensors.

Ranks exchange small integer tensors only: sums of histograms and counts. :func:`record_traffic`
counts them; :func:`on_threads` runs several ranks in one process.
"""

from fastprune.distributed.layout import is_sharded
from fastprune.distributed.link import Ranks, Traffic, record_traffic
from fastprune.distributed.threads import ThreadRank, on_threads

__all__ = ["Ranks", "ThreadRank", "Traffic", "is_sharded", "on_threads", "record_traffic"]
