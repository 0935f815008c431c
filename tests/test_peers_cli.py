"""``bench --peers``: arguments, files, what is printed."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from fastprune import models
from fastprune.cli import main, peers
from fastprune.peers import compare, layers, masks
from fastprune.peers.candidates import Case, Dense
from fastprune.peers.layers import Conv, LayerSet, Linear

needs_matplotlib = pytest.mark.skipif(
    importlib.util.find_spec("matplotlib") is None, reason="needs matplotlib"
)
PEERS = ["bench", "--peers", "--min-time", "0.0001", "--threads", "1"]


@pytest.fixture
def _tiny(monkeypatch: pytest.MonkeyPatch, threads: None) -> None:
    """A set of four layers that takes no time."""
    tiny = LayerSet("four layers", {Linear(9, 8): 2, Linear(8, 9): 1, Conv(4, 3, 6): 1}, (1, 3))
    monkeypatch.setitem(layers.SETS, "kernels", tiny)


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["bench"], "--peers"),
        ([*PEERS, "--model", "vgg-19"], "--model"),
        ([*PEERS, "--methods", "snip"], "--methods"),
        ([*PEERS, "--dtype", "float32"], "--dtype"),
        ([*PEERS, "--device", "cpu"], "--device"),
        ([*PEERS, "--layers"], "--layers"),
        ([*PEERS, "--no-training"], "--training"),
        ([*PEERS, "--input-shape", "3,32,32", "--data", "."], "--input-shape, --data"),
        (["bench", "--model", "vgg-19", "--set", "vgg19"], "--set: only with --peers"),
        (["bench", "--model", "vgg-19", "--masks", "uneven"], "--masks"),
        (["bench", "--model", "vgg-19", "--quick"], "--quick"),
        ([*PEERS, "--set", "alexnet"], "alexnet"),
        ([*PEERS, "--masks", "checkerboard"], "random, uneven"),
        ([*PEERS, "--masks", ","], "--masks"),
        ([*PEERS, "--masks", "snip"], "resnet50, vgg19, wrn-28-8"),
        ([*PEERS, "--sparsities", "90"], "--sparsities"),
        ([*PEERS, "--batch", "0"], "--batch"),
        ([*PEERS, "--json", "/dev/null/x.json"], "/dev/null"),
        ([*PEERS, "--plot", "/dev/null/x.png"], "/dev/null"),
    ],
)
def test_wrong_arguments_give_one_line(
    argv: list[str], expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(argv) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    (line,) = captured.err.splitlines()
    assert "error: " in line
    assert expected in line


def is_timing(candidate: dict[str, Any]) -> bool:
    return 0 < candidate["low"] <= candidate["median"] <= candidate["high"]


@needs_matplotlib
@pytest.mark.usefixtures("_tiny")
def test_files_and_tables(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    json_path, plot_path = tmp_path / "new" / "p.json", tmp_path / "p.png"
    argv = [*PEERS, "--sparsities", "0.5,0.8", "--json", str(json_path), "--plot", str(plot_path)]
    assert main(argv) == 0
    document = json.loads(json_path.read_text())
    assert document["command"] == "bench --peers"
    assert document["interrupted"] is False
    assert document["machine"]["threads"] == 1
    assert document["machine"]["isa"] in ("scalar", "avx2", "avx512", "avx512_bf16")
    assert document["settings"]["masks"] == ["random", "uneven"]
    assert document["settings"]["batches"] == [1, 3]
    assert document["ceilings"].keys() == {"flops", "bandwidth"}
    assert document["peers"].keys() == {peer.name for peer in compare.PEERS}
    for peer in document["peers"].values():
        assert peer.keys() == {"dtype", "dense_torch", "reason", "versions"}
    assert len(document["results"]) == 6 * 2 * 2
    for result in document["results"]:
        for name, candidate in result["candidates"].items():
            if document["peers"][name]["reason"] is None:
                assert is_timing(candidate)
                dense = result["candidates"][result["dense"]]["median"]
                assert candidate["speedup"] == dense / candidate["median"]
            else:
                assert candidate["status"] == "not available"
        best = result["candidates"][result["best_peer"]]["median"]
        own = result["candidates"]["fastprune"]["median"]
        assert result["speedup_over_best_peer"] == best / own
        assert result["roofline"] == result["floor"]["seconds"] / own
        assert 0 < result["density"] < 1
    assert {r["count"] for r in document["results"]} == {1, 2}
    assert [(m["mask"], m["sparsity"], m["batch"]) for m in document["means"]] == [
        (mask, sparsity, batch)
        for mask in ("random", "uneven")
        for sparsity in (0.5, 0.8)
        for batch in (1, 3)
    ]
    assert plot_path.read_bytes().startswith(b"\x89PNG")
    captured = capsys.readouterr()
    assert "GFLOP/s of multiply-adds" in captured.out
    assert "kernels: matrix products, uneven masks, 80 %" in captured.out
    assert "kernels: convolutions, random masks, 50 %" in captured.out
    assert "geometric means" in captured.out
    assert "than the best peer in" in captured.out
    assert "[24/24] " in captured.err


@needs_matplotlib
@pytest.mark.usefixtures("_tiny")
def test_a_plot_of_many_layers_shows_means(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    many = LayerSet("ten layers", {Linear(n, 8): 1 for n in range(1, 11)}, (2,))
    monkeypatch.setitem(layers.SETS, "kernels", many)
    path = tmp_path / "p.png"
    argv = [*PEERS, "--masks", "random", "--sparsities", "0.5", "--plot", str(path)]
    assert main(argv) == 0
    assert path.read_bytes().startswith(b"\x89PNG")


@pytest.mark.usefixtures("_tiny")
def test_a_missing_package_is_listed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    find = importlib.util.find_spec
    hidden = {"scipy", "onnxruntime", "openvino"}
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name in hidden else find(name, *a)
    )
    assert main([*PEERS, "--quick"]) == 0
    out = capsys.readouterr().out
    assert "without onnxruntime: onnxruntime is not installed" in out
    assert "without SciPy CSR: scipy is not installed" in out
    assert "quick: few layers" in out
    assert "OpenVINO " not in out


@pytest.mark.usefixtures("_tiny")
def test_a_wrong_result_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def negative(self: Dense, raw: torch.Tensor, case: Case) -> torch.Tensor:
        return -raw if case.layer.kind == "conv" else raw

    monkeypatch.setattr(Dense, "result", negative)
    path = tmp_path / "p.json"
    assert main([*PEERS, "--quick", "--batch", "2", "--json", str(path)]) == 1
    assert "dense wrong: " in capsys.readouterr().out
    wrong = [r for r in json.loads(path.read_text())["results"] if r["kind"] == "conv"]
    assert [r["candidates"]["dense"]["status"] for r in wrong] == ["wrong"]
    assert wrong[0]["dense"] == "dense channels_last"


@pytest.mark.usefixtures("_tiny")
def test_ctrl_c_keeps_what_is_finished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    whole, calls = compare.compare, []

    def interrupted(*args: Any) -> Any:
        calls.append(args)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return whole(*args)

    monkeypatch.setattr(compare, "compare", interrupted)
    path = tmp_path / "p.json"
    assert main([*PEERS, "--quick", "--json", str(path)]) == 130
    assert "interrupted: 2 cases finished, kept in" in capsys.readouterr().err
    document = json.loads(path.read_text())
    assert document["interrupted"] is True
    assert len(document["results"]) == 2


def test_masks_of_a_real_pruner() -> None:
    model = models.create("vgg-small")
    shapes = masks.walk(model, (1, 8, 8))
    found = peers.pruned("vgg-small", "snip", 0.9, 0)
    assert found.keys() == set(shapes.values())
    for layer, mask in found.items():
        assert mask.shape == layer.weight_shape
        assert mask.dtype == torch.bool
    assert all(
        torch.equal(mask, found[layer])
        for layer, mask in peers.pruned("vgg-small", "snip", 0.9, 0).items()
    )


def test_a_network_pruned_for_the_bench(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, threads: None
) -> None:
    shapes = masks.walk(models.create("vgg-small"), (1, 8, 8))
    small = LayerSet("VGG, small", dict.fromkeys(shapes.values(), 1), (2,), model="vgg-small")
    monkeypatch.setitem(layers.SETS, "vgg19", small)
    path = tmp_path / "p.json"
    argv = [*PEERS, "--set", "vgg19", "--masks", "Magnitude", "--sparsities", "0.9"]
    assert main([*argv, "--json", str(path)]) == 0
    document = json.loads(path.read_text())
    assert document["settings"]["masks"] == ["magnitude"]
    assert len({r["density"] for r in document["results"]}) > 1
