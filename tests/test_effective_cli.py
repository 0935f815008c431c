"""``fastprune effective``, and the plots of masks behind it."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path

import pytest
import torch

import fastprune as fp
from fastprune.cli import main
from fastprune.effective import plots

needs_matplotlib = pytest.mark.skipif(
    importlib.util.find_spec("matplotlib") is None, reason="needs matplotlib"
)
LENET = ["effective", "--model", "lenet-300-100", "--batch", "4", "--input-shape", "1,8,8"]


@needs_matplotlib
def test_methods_side_by_side(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, png = tmp_path / "new" / "e.json", tmp_path / "e.png"
    argv = [*LENET, "--methods", "random,SNIP,lamp", "--sparsities", "0.99,0.5", "--seeds", "2"]
    assert main([*argv, "--layers", "--json", str(out), "--plot", str(png)]) == 0
    document = json.loads(out.read_text())
    assert document["settings"]["methods"] == ["random", "snip", "lamp"]
    assert document["settings"]["seeds"] == [0, 1]
    results = document["results"]
    assert len(results) == 12
    for r in results:
        assert r["kept"] == sum(layer["kept"] for layer in r["layers"])
        assert r["active"] == sum(layer["active"] for layer in r["layers"]) <= r["kept"]
        assert r["direct_sparsity"] == pytest.approx(r["sparsity"], abs=1e-4)
        assert r["effective_sparsity"] == pytest.approx(1 - r["active"] / r["prunable"])
        if r["active"]:
            assert r["effective_compression"] == pytest.approx(r["prunable"] / r["active"])
        else:
            assert r["effective_compression"] is None
        assert set(r["emptied"]) <= set(r["collapsed"])
    # The same as by hand.
    one = next(r for r in results if (r["method"], r["sparsity"], r["seed"]) == ("lamp", 0.99, 1))
    torch.manual_seed(1)
    model = fp.models.create("lenet-300-100", in_shape=(1, 8, 8))
    masks = fp.prune(model, "lamp", 0.99)
    x = torch.zeros(1, 1, 8, 8)
    assert fp.effective_sparsity(model, masks, example_input=x) == one["effective_sparsity"]
    assert png.read_bytes().startswith(b"\x89PNG")
    captured = capsys.readouterr()
    assert re.search(r"random +50\.000 % +5\d\.\d+ % +2\.0x", captured.out)
    assert "lamp at 99 %, seed 0, by layer" in captured.out
    assert "[12/12] lamp 99 %, seed 1: effective" in captured.err


def test_quota_and_what_collapses(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "e.json"
    argv = [*LENET, "--methods", "magnitude,random", "--sparsities", "0.9", "--seeds", "1"]
    assert main([*argv, "--quota", "uniform", "--json", str(out)]) == 0
    for r in json.loads(out.read_text())["results"]:
        assert all(abs(c["kept"] - 0.1 * c["weights"]) <= 1 for c in r["layers"])
    assert "quota: uniform" in capsys.readouterr().out
    argv = [*LENET, "--methods", "magnitude", "--sparsities", "0.9999", "--seeds", "1"]
    assert main([*argv, "--json", str(out)]) == 0
    (r,) = json.loads(out.read_text())["results"]
    assert r["active"] == 0
    assert r["effective_compression"] is None
    assert r["effective_sparsity"] == 1.0
    assert len(r["collapsed"]) == 3
    text = capsys.readouterr().out
    assert "none left" in text
    assert "1/1" in text
    assert "layers emptied" in text


def test_a_method_that_fails_does_not_hide_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fastprune.cli import effective

    def fails(*args: object, **kwargs: object) -> None:
        if args[1] == "lamp":
            raise ValueError("no\nscore")
        return original(*args, **kwargs)

    original = effective.common.prune_at_init
    monkeypatch.setattr(effective.common, "prune_at_init", fails)
    out = tmp_path / "e.json"
    argv = [*LENET, "--methods", "lamp,magnitude", "--sparsities", "0.9", "--seeds", "1"]
    assert main([*argv, "--json", str(out)]) == 1
    failed, done = json.loads(out.read_text())["results"]
    assert failed["error"] == "ValueError: no score"
    assert done["active"] > 0


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["effective"], "--model"),
        ([*LENET, "--methods", "snap"], "snap"),
        ([*LENET, "--quota", "snap"], "--quota"),
        ([*LENET, "--seeds", "0"], "--seeds"),
        ([*LENET, "--sparsities", "1"], "--sparsities"),
        ([*LENET, "--json", "/dev/null/x.json"], "/dev/null"),
    ],
)
def test_wrong_arguments(
    argv: list[str], expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(argv) == 2
    assert expected in capsys.readouterr().err


def masks() -> fp.Masks:
    kept = {"conv.weight": torch.zeros(4, 2, 3, 3).bool(), "fc.weight": torch.ones(3, 36).bool()}
    kept["conv.weight"][0, 1, 0, :2] = True
    kept["bias"] = torch.ones(3).bool()
    return fp.Masks(kept)


@needs_matplotlib
def test_heat_map_averages_kernels(tmp_path: Path) -> None:
    figure = plots.heat_map(masks(), path=tmp_path / "m.png")
    assert (tmp_path / "m.png").read_bytes().startswith(b"\x89PNG")
    images = [ax.images[0].get_array() for ax in figure.axes if ax.images]
    assert [i.shape for i in images] == [(4, 2), (3, 36)]
    assert images[0][0, 1] == pytest.approx(2 / 9)
    assert images[0].sum() == pytest.approx(2 / 9)
    with pytest.raises(ValueError, match="two dimensions"):
        plots.heat_map({"bias": torch.ones(3).bool()})
    with pytest.raises(TypeError, match="masks"):
        plots.heat_map([1])  # type: ignore[arg-type]


@needs_matplotlib
def test_bars_are_compressions(tmp_path: Path) -> None:
    counts = plots.layer_counts(masks(), {n: m & False for n, m in masks().items()})
    assert counts[0] == plots.LayerCount("conv.weight", 72, 2, 0)
    only_direct = plots.layer_counts(masks())
    figure = plots.layer_bars({"a": counts, "b": only_direct}, path=tmp_path / "b.png")
    tops = {round(p.get_height() + 1, 6) for p in figure.axes[0].patches}
    assert tops == {36.0, 1.0, 100.0}  # nothing active: to the top
    with pytest.raises(ValueError, match="same names"):
        plots.layer_counts(masks(), {})
    with pytest.raises(ValueError, match="same layers"):
        plots.layer_bars({"a": counts, "b": counts[:1]})
    with pytest.raises(ValueError, match="layers"):
        plots.layer_bars({})


@needs_matplotlib
def test_curves_average_the_seeds_that_are_connected(tmp_path: Path) -> None:
    points = [
        plots.Point("a", 0.01, 0.002),
        plots.Point("a", 0.01, 0.004),
        plots.Point("a", 0.01, 0.0),
        plots.Point("a", 0.1, 0.1),
        plots.Point("b", 0.01, 0.0),
    ]
    figure = plots.compression_curves(points, path=tmp_path / "c.png")
    curve, diagonal = figure.axes[0].lines
    assert curve.get_xydata().tolist() == [pytest.approx([10, 10]), pytest.approx([100, 1000 / 3])]
    assert list(diagonal.get_xdata()) == list(diagonal.get_ydata())
    with pytest.raises(ValueError, match="points"):
        plots.compression_curves([])


def test_without_matplotlib(monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.import_module

    def missing(name: str, *args: object) -> object:
        if name.startswith("matplotlib"):
            raise ModuleNotFoundError(name)
        return real(name, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(importlib, "import_module", missing)
    with pytest.raises(ModuleNotFoundError, match=r"pip install \"fastprune\[demo\]\""):
        plots.heat_map(masks())
