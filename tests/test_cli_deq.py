"""``python -m fastprune deq``: a small run from end to end, and what its numbers say."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fastprune.cli import deq, deq_tables, main
from fastprune.equilibrium.findings import deviation, findings, mean

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")


def tiny(out: Path, *more: str) -> list[str]:
    return [
        "deq", "--data", "digits", "--epochs", "1", "--features", "6", "--batch", "256",
        "--sparsities", "50,90", "--seeds", "1", "--min-time", "0.001", "--threads", "1",
        "--out", str(out), *more,
    ]  # fmt: skip


@pytest.mark.parametrize("arch", ["fc", "conv"])
def test_a_run_from_end_to_end(arch, tmp_path, capsys):
    methods = "random,magnitude,snip,grasp,synflow" if arch == "fc" else "snip,grasp"
    assert main(tiny(tmp_path, "--arch", arch, "--methods", methods)) == 0
    out = capsys.readouterr().out
    for title in ("Figures 1 and D1, Table 1", "Table 2", "Table D2", "findings"):
        assert title in out
    document = json.loads((tmp_path / "results.json").read_text())
    assert {p.name for p in tmp_path.iterdir()} == {
        "results.json",
        "figure-1.png",
        "figure-2.png",
        "figure-d1.png",
    }
    results = document["results"]
    kinds = [r["kind"] for r in results]
    count = len(methods.split(","))
    assert kinds.count("parametrization") == 4
    assert kinds.count("pruned") == 2 * count
    assert kinds.count("equal size") == 2 * len(document["settings"]["equal_size"])
    assert not any("error" in r for r in results)
    assert all(0.0 <= r["accuracy"] <= 1.0 for r in results)
    assert all(1.0 <= r["iterations"] <= 300 for r in results)
    for r in results:
        if r["kind"] == "pruned":
            assert r["kept"] == int((1 - r["sparsity"]) * r["prunable"] + 0.5)
            assert set(r["matrices"]) == {"U", "A", "B"}
            assert 0 <= r["effective_parameters"] < document["parameters"]
            assert set(r["solve"]) == {"sparse", "dense"}
            assert r["solve"]["sparse"]["low"] <= r["solve"]["sparse"]["high"]
    assert len(document["findings"]) == 5
    assert document["findings"] == json.loads(json.dumps(findings(document)))


def test_the_residual_network(tmp_path, capsys):
    """Its matrices have no names of their own, and its size is a multiple of 8."""
    more = ("--arch", "resnet", "--methods", "snip", "--sparsities", "50", "--features", "16")
    assert main(tiny(tmp_path, *more)) == 0
    assert "Table 2" not in capsys.readouterr().out
    document = json.loads((tmp_path / "results.json").read_text())
    assert document["settings"]["max_iter"] == 25
    kinds = [r["kind"] for r in document["results"]]
    assert kinds == ["parametrization", "pruned", "equal size"]
    assert document["results"][1]["matrices"] == {}
    assert document["results"][2]["features"] % 8 == 0


def test_the_same_seed_gives_the_same_results(tmp_path):
    for name in ("a", "b"):
        assert main(tiny(tmp_path / name, "--methods", "snip", "--sparsities", "90")) == 0
    first, second = (
        json.loads((tmp_path / n / "results.json").read_text())["results"] for n in ("a", "b")
    )
    for r in (*first, *second):
        del r["train_seconds"]
        r.pop("solve", None)
    assert first == second


def test_wrong_arguments(tmp_path, capsys):
    assert main(["deq", "--methods", "nothing"]) == 2
    assert "unknown method 'nothing'" in capsys.readouterr().err
    assert main(["deq", "--sparsities", "120"]) == 2
    assert "per cents between 0 and 100" in capsys.readouterr().err
    assert main(["deq", "--data", str(tmp_path / "none")]) == 2
    assert "is no folder" in capsys.readouterr().err
    assert main(["deq", "--data", str(tmp_path), "--dataset", "svhn"]) == 2
    assert "unknown data set 'svhn'" in capsys.readouterr().err


def test_sparsities_are_per_cents_or_fractions():
    assert deq.sparsities("10,50,99.9") == [0.1, 0.5, 0.999]
    assert deq.sparsities("0.9,0.5") == [0.5, 0.9]
    assert deq.sparsities("0.5,90") == [0.005, 0.9]


# -- findings --------------------------------------------------------------------------------------


def document(accuracy: dict[float, float], iterations: dict[float, float], **variants: float):
    """A run of one method and two seeds whose results have these means."""
    wanted = sorted(accuracy)
    results = [
        {"kind": "parametrization", "variant": v.replace("_", " "), "seed": seed, "accuracy": a,
         "iterations": 10.0}
        for v, a in variants.items()
        for seed in (0, 1)
    ]  # fmt: skip
    for s in wanted:
        for seed, shift in ((0, -0.001), (1, 0.001)):
            result = {
                "kind": "pruned", "method": "snip", "sparsity": s, "seed": seed,
                "accuracy": accuracy[s] + shift, "iterations": iterations[s],
                "matrices": {"U": 0.1, "A": 0.99, "B": 0.8},
            }  # fmt: skip
            results.append(result)
            results.append({**result, "kind": "equal size", "accuracy": accuracy[s] - 0.02})
    settings = {"methods": ["snip"], "sparsities": wanted, "equal_size": ["snip"]}
    return {"settings": settings, "results": results}


PAPER = document(
    {0.5: 0.95, 0.9: 0.90}, {0.5: 8.0, 0.9: 5.0}, full=0.955, without_A=0.956, without_B=0.9
)


def test_the_findings_of_the_paper_hold_for_its_numbers():
    assert [f["holds"] for f in findings(PAPER)] == [True] * 5
    assert "U 10.00 %, A 99.00 %, B 80.00 %" in findings(PAPER)[3]["numbers"]


def test_findings_that_do_not_hold():
    other = document({0.5: 0.90, 0.9: 0.91}, {0.5: 12.0, 0.9: 15.0}, full=0.955, without_A=0.90)
    for r in other["results"]:
        if r["kind"] == "pruned":
            r["matrices"]["A"] = 0.5
        if r["kind"] == "equal size":
            r["accuracy"] += 0.05
    assert [f["holds"] for f in findings(other)] == [False] * 5


def test_cases_that_failed_are_left_out():
    results = [{"accuracy": 0.5}, {"error": "x"}, {"accuracy": 0.7}]
    assert mean(results, "accuracy") == pytest.approx(0.6)
    assert deviation(results, "accuracy") == pytest.approx(0.1 * 2**0.5)
    assert mean([], "accuracy") is None
    assert deviation(results[:1], "accuracy") is None
    assert deq_tables.spread(results, "accuracy", 100) == "60.0 ±14.1"
    assert deq_tables.spread([], "accuracy") == "-"
    nothing = {"settings": PAPER["settings"], "results": []}
    assert findings(nothing) == []


def test_a_failing_case_does_not_hide_the_others(tmp_path, capsys, monkeypatch):
    prune = deq.common.prune_at_init

    def failing(model, method, *args, **kwargs):
        if method == "magnitude":
            raise ValueError("no such luck")
        return prune(model, method, *args, **kwargs)

    monkeypatch.setattr(deq.common, "prune_at_init", failing)
    assert main(tiny(tmp_path, "--methods", "snip,magnitude", "--sparsities", "90")) == 1
    assert "no such luck" in capsys.readouterr().out
    results = json.loads((tmp_path / "results.json").read_text())["results"]
    assert sum("error" in r for r in results) == 2  # and its dense counterpart
