"""Who is the fastest, and the means over a set: arithmetic on made-up timings."""

from __future__ import annotations

from typing import Any

import pytest

from fastprune.peers import compare, masks, summary
from fastprune.peers.candidates import Case
from fastprune.peers.layers import Conv, Layer, Linear
from fastprune.peers.roofline import Ceilings

LAYER = Linear(33, 20, 17)
CEILINGS = Ceilings(flops=1e9, bandwidth=1e9)


def case_of(layer: Layer) -> Case:
    return compare.make_case(layer, masks.make("random", layer.weight_shape, 0.6, 0), 0)


def timed(**medians: float) -> dict[str, dict[str, Any]]:
    return {
        name.replace("_", " "): {
            "status": "timed",
            "median": t,
            "low": 0.9 * t,
            "high": 1.1 * t,
            "prepare_seconds": 1.0,
        }
        for name, t in medians.items()
    }


def result_of(layer: Layer, count: int, **medians: float) -> dict[str, Any]:
    found = summary.summarize(case_of(layer), timed(**medians), compare.PEERS, CEILINGS)
    head = {"case": str(layer), "kind": layer.kind, "batch": layer.batch, "count": count}
    return {**head, "mask": "random", "sparsity": 0.6, **found}


def test_summary_of_a_case() -> None:
    result = result_of(
        LAYER,
        1,
        dense=4.0,
        dense_oneDNN=2.0,
        dense_bfloat16=0.1,
        onnxruntime=1.0,
        fastprune=0.5,
    )
    assert result["dense"] == "dense oneDNN"
    assert result["best_peer"] == "onnxruntime"  # bfloat16 is another dtype
    assert result["speedup"] == 4
    assert result["speedup_over_best_peer"] == 2
    assert result["pays_after"] == pytest.approx(1 / 1.5)
    assert result["roofline"] == pytest.approx(result["floor"]["seconds"] / 0.5)
    assert result["candidates"]["dense"]["speedup"] == 0.5
    assert result["nnz"] == round(0.4 * 33 * 20)
    assert result["density"] == pytest.approx(0.4)
    assert summary.spread(result) == pytest.approx(0.1)


def test_summary_of_a_loss_and_of_a_wrong_result() -> None:
    lost = result_of(LAYER, 1, dense=1.0, fastprune=2.0)
    assert lost["speedup"] == 0.5
    assert lost["pays_after"] is None
    candidates = timed(dense=1.0) | {"fastprune": {"status": "wrong", "reason": "all of it"}}
    wrong = summary.summarize(case_of(LAYER), candidates, compare.PEERS, CEILINGS)
    for key in ("speedup", "speedup_over_best_peer", "roofline", "pays_after"):
        assert wrong[key] is None
    assert wrong["best_peer"] == "dense"


def test_means_count_layers_as_often_as_the_network_has_them() -> None:
    results = [
        result_of(Linear(8, 8), 3, dense=4.0, SciPy_CSR=1.0, fastprune=2.0),
        result_of(Linear(9, 8), 1, dense=1.0, fastprune=2.0),
        result_of(Conv(4, 4, 5), 1, dense=8.0, fastprune=1.0),
    ]
    (mean,) = summary.means(results, by_batch=False)  # one convolution is no group of its own
    assert mean["kind"] == "all"
    assert mean["cases"] == 3
    assert mean["speedup"] == {
        "dense": 1.0,
        "fastprune": pytest.approx((2.0**3 * 0.5 * 8) ** (1 / 5)),
    }
    over = pytest.approx((0.5**3 * 0.5 * 8) ** (1 / 5))
    assert mean["speedup_over_best_peer"] == over
    assert mean["slower_than_dense"] == 1
    assert mean["slower_than_best_peer"] == 2
    assert mean["seconds"] == {"dense": 3 * 4 + 1 + 8, "best_peer": 3 + 1 + 8, "fastprune": 9.0}
    results.append(result_of(Conv(4, 4, 6, batch=2), 1, dense=1.0, fastprune=1.0))
    assert [m["kind"] for m in summary.means(results, by_batch=False)] == ["all", "linear", "conv"]
    assert [m["batch"] for m in summary.means(results, by_batch=True)] == [1, 2]
