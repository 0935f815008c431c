"""The command line: arguments, files, exit codes, and Ctrl-C."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from fastprune.cli import common, main, measuring, render
from fastprune.pruners.registry import PRUNERS
from fastprune.report import Report
from fastprune.timing import Timing

HAS_DEMO = all(importlib.util.find_spec(p) for p in ("sklearn", "matplotlib"))
needs_demo = pytest.mark.skipif(not HAS_DEMO, reason='needs pip install "fastprune[demo]"')
needs_matplotlib = pytest.mark.skipif(
    importlib.util.find_spec("matplotlib") is None, reason="needs matplotlib"
)

BENCH = ["bench", "--model", "lenet-300-100", "--batch", "4", "--min-time", "0.001"]
SMALL_BENCH = [*BENCH, "--input-shape", "1,8,8", "--methods", "random", "--sparsities", "0.9"]
TIMING = {"median", "low", "high", "runs"}


def one_error_line(capsys: pytest.CaptureFixture[str]) -> str:
    """The only line on stderr, which nothing on stdout accompanies."""
    captured = capsys.readouterr()
    assert captured.out == ""
    lines = captured.err.splitlines()
    assert len(lines) == 1, captured.err
    assert "error: " in lines[0]
    return lines[0]


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        ([], "COMMAND"),
        (["prune"], "prune"),
        (["bench"], "--model"),
        (["bench", "--model", "lenet-301"], "lenet-301"),
        ([*BENCH, "--methods", "snap"], "snap"),
        ([*BENCH, "--methods", ","], "--methods"),
        ([*BENCH, "--sparsities", "90"], "90"),
        ([*BENCH, "--sparsities", "1"], "--sparsities"),
        ([*BENCH, "--sparsities", "nan"], "nan"),
        ([*BENCH, "--batch", "0"], "--batch"),
        ([*BENCH, "--threads", "two"], "two"),
        ([*BENCH, "--min-time", "inf"], "--min-time"),
        ([*BENCH, "--seed", "-1"], "--seed"),
        ([*BENCH, "--input-shape", "3,32"], "C,H,W"),
        ([*BENCH, "--device", "tpu"], "tpu"),
        ([*BENCH, "--dtype", "int8"], "int8"),
        ([*BENCH, "--dataset", "cifar-11"], "cifar-11"),
        ([*BENCH, "--data", "somewhere"], "--dataset"),
        ([*BENCH, "--dataset", "mnist", "--data", "/nowhere"], "/nowhere"),
        (["bench", "--model", "vgg-small", "--input-shape", "1,2,2"], "in_shape"),
        ([*BENCH, "--json", "/dev/null/x.json"], "/dev/null"),
        pytest.param(["demo", "--methods", "snap"], "snap", marks=needs_demo),
        pytest.param(["demo", "--models", "alexnets"], "alexnets", marks=needs_demo),
        pytest.param(["demo", "--models", "vgg-19"], "in_shape", marks=needs_demo),
        pytest.param(["demo", "--out", "/dev/null/out"], "/dev/null", marks=needs_demo),
        (["demo", "--sparsities", "0.9,-0.1"], "-0.1"),
        (["demo", "--epochs", "0"], "--epochs"),
    ],
)
def test_wrong_arguments_give_one_line(
    argv: list[str], expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(argv) == 2
    assert expected in one_error_line(capsys)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_cuda_without_a_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*BENCH, "--device", "cuda"]) == 2
    assert "--device cuda" in one_error_line(capsys)


def test_missing_packages_are_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    find = importlib.util.find_spec
    hidden = {"sklearn", "matplotlib"}
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name in hidden else find(name, *a)
    )
    assert main(["demo"]) == 2
    line = one_error_line(capsys)
    assert 'pip install "fastprune[demo]"' in line
    assert "scikit-learn" in line
    assert "matplotlib" in line
    assert main([*BENCH, "--plot", "x.png"]) == 2
    assert "matplotlib" in one_error_line(capsys)


def test_help_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    assert {"demo", "bench"} <= set(capsys.readouterr().out.split())


def is_timing(entry: dict[str, Any]) -> bool:
    return entry.keys() >= TIMING and 0 < entry["low"] <= entry["median"] <= entry["high"]


def check_machine(machine: dict[str, Any]) -> None:
    assert machine["threads"] >= 1
    assert machine["isa"] in ("scalar", "avx2", "avx512", "avx512_bf16")
    assert machine["dtype"] == "float32"
    assert {"cpu", "cores", "torch", "fastprune", "python", "os"} <= machine.keys()


@needs_matplotlib
def test_bench_writes_json_and_png(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    json_path, plot_path = tmp_path / "new" / "bench.json", tmp_path / "bench.png"
    argv = [*SMALL_BENCH, "--layers", "--json", str(json_path), "--plot", str(plot_path)]
    argv[argv.index("random")] = "random,Synflow"
    assert main(argv) == 0
    document = json.loads(json_path.read_text())
    assert document["command"] == "bench"
    assert document["interrupted"] is False
    check_machine(document["machine"])
    settings = document["settings"]
    assert settings["methods"] == ["random", "synflow"]
    assert settings["modes"] == ["inference", "training"]
    assert settings["input_shape"] == [1, 8, 8]
    assert settings["data"] == "random"
    assert [(r["method"], r["sparsity"]) for r in document["results"]] == [
        ("random", 0.9),
        ("synflow", 0.9),
    ]
    for mode in settings["modes"]:
        assert is_timing(document["dense"][mode])
        for result in document["results"]:
            case = result[mode]
            assert all(is_timing(case[key]) for key in ("dense", "masked", "sparse"))
            assert case["speedup"] == case["dense"]["median"] / case["sparse"]["median"]
            assert case["layers"] == len(case["report"]["layers"]) == 3
            assert 0 <= case["sparse_layers"] <= 3
    prunable = 64 * 300 + 300 * 100 + 100 * 10
    assert all(r["prunable"] == prunable for r in document["results"])
    assert all(r["kept"] == round(0.1 * prunable) for r in document["results"])
    assert plot_path.read_bytes().startswith(b"\x89PNG")
    out = capsys.readouterr().out
    assert "random inputs" in out
    assert "weight x mask" in out
    assert len(re.findall(r"^ 3 +Linear +100x300 ", out, re.M)) == 4  # two methods, two modes
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["bench.json", "bench.png", "new"]


def test_bench_forward_only(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "b.json"
    assert main([*SMALL_BENCH, "--no-training", "--json", str(path)]) == 0
    document = json.loads(path.read_text())
    assert document["settings"]["modes"] == ["inference"]
    assert "training" not in document["results"][0]
    assert "training step" not in capsys.readouterr().out


def test_bench_tries_every_dense_form(tmp_path: Path) -> None:
    path = tmp_path / "b.json"
    argv = ["bench", "--model", "vgg-small", "--batch", "2", "--min-time", "0.001"]
    argv += ["--methods", "random", "--sparsities", "0.9", "--json", str(path)]
    assert main(argv) == 0
    dense = json.loads(path.read_text())["dense"]
    plain = {"contiguous", "channels_last"}
    assert dense["training"]["tried"].keys() == plain
    assert dense["inference"]["tried"].keys() == plain | {f"{p}, BatchNorm folded" for p in plain}
    for mode in dense.values():
        assert mode["median"] == min(t["median"] for t in mode["tried"].values())


def test_bench_goes_on_after_a_failed_case(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = common.prune

    def prune(model: Any, method: str, **options: Any) -> Any:
        if method == "magnitude":
            raise ValueError("score: features.0 is NaN")
        return whole(model, method, **options)

    monkeypatch.setattr(common, "prune", prune)
    path = tmp_path / "b.json"
    argv = [*SMALL_BENCH, "--json", str(path)]
    argv[argv.index("random")] = "magnitude,random"
    assert main(argv) == 1
    failed, fine = json.loads(path.read_text())["results"]
    assert "features.0 is NaN" in failed["error"]
    assert "error" not in fine
    assert "features.0 is NaN" in capsys.readouterr().out


@pytest.mark.skipif(importlib.util.find_spec("sklearn") is None, reason="needs scikit-learn")
def test_bench_on_real_data(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = [*BENCH, "--dataset", "digits", "--no-training", "--methods", "snip"]
    assert main([*argv, "--sparsities", "0.8"]) == 0
    assert "data: digits" in capsys.readouterr().out
    assert main([*argv, "--num-classes", "2"]) == 2
    assert "--num-classes" in one_error_line(capsys)


@needs_demo
def test_demo_in_miniature(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["demo", "--quick", "--epochs", "1", "--models", "vgg-small", "--methods", "snip"]
    assert main([*argv, "--sparsities", "0.95", "--out", str(tmp_path / "out")]) == 0
    document = json.loads((tmp_path / "out" / "demo.json").read_text())
    assert document["command"] == "demo"
    assert document["interrupted"] is False
    check_machine(document["machine"])
    assert document["settings"]["steps"] == {"snip": 1}
    (network,) = document["models"]
    assert network["model"] == "vgg-small"
    assert 0.1 < network["dense"]["accuracy"] <= 1
    (result,) = network["results"]
    assert result["kept"] == round(0.05 * result["prunable"])
    for mode in ("training", "inference"):
        assert is_timing(network["dense"][mode])
        assert is_timing(result[mode]["dense"])
        assert is_timing(result[mode]["sparse"])
    assert (tmp_path / "out" / "demo.png").read_bytes().startswith(b"\x89PNG")
    captured = capsys.readouterr()
    assert "left out: random, magnitude" in captured.out
    assert re.search(r"snip +95 % ", captured.out)
    assert "[2/2] vgg-small snip 95 %" in captured.err


@needs_demo
@pytest.mark.skipif(os.name != "posix", reason="needs SIGINT")
def test_ctrl_c_keeps_what_is_finished(tmp_path: Path) -> None:
    path = tmp_path / "demo.json"
    argv = [sys.executable, "-m", "fastprune", "demo", "--models", "lenet-300-100", "--epochs", "1"]
    argv += ["--methods", "random,magnitude", "--json", str(path), "--out", str(tmp_path)]
    process = subprocess.Popen(
        argv,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        # A background job inherits an ignored SIGINT.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL) and None,
    )
    assert process.stderr is not None
    lines = [process.stderr.readline(), process.stderr.readline()]
    assert lines[1].startswith("[2/9] lenet-300-100 random"), lines
    process.send_signal(signal.SIGINT)
    began = time.monotonic()
    out, err = process.communicate(timeout=30)
    assert time.monotonic() - began < 5
    assert process.returncode == 130
    assert "Traceback" not in out + err
    assert err.splitlines()[-1].startswith("fastprune demo: interrupted: ")
    document = json.loads(path.read_text())
    assert document["interrupted"] is True
    (network,) = document["models"]
    assert 1 <= len(network["results"]) < 8
    assert not (tmp_path / "demo.png").exists()


def test_write_json_is_all_or_nothing(tmp_path: Path) -> None:
    path = tmp_path / "r.json"
    common.write_json(path, {"a": 1, "b": [float("nan"), {"c": -float("inf")}]})
    with pytest.raises(TypeError):
        common.write_json(path, {"a": object()})
    assert json.loads(path.read_text()) == {"a": 1, "b": [None, {"c": None}]}
    assert [p.name for p in tmp_path.iterdir()] == ["r.json"]


def test_methods_get_the_arguments_they_use() -> None:
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(16, 8), torch.nn.Linear(8, 4))
    batches = [(torch.randn(6, 1, 4, 4), torch.arange(6) % 4) for _ in range(2)]
    for method in PRUNERS:
        steps = common.steps_of(method, 3)
        assert steps <= 3 or method == "synflow"
        loss = torch.nn.functional.cross_entropy
        masks, _ = common.prune_at_init(model, method, 0.5, batches, loss, steps, 0)
        assert masks.nnz() == (16 * 8 + 8 * 4) // 2


def test_random_masks_follow_the_seed() -> None:
    model = torch.nn.Linear(40, 30)
    loss = torch.nn.functional.cross_entropy
    a, b, c = (
        common.prune_at_init(model, "random", 0.5, [(torch.zeros(2, 40), None)], loss, 1, seed)[0]
        for seed in (0, 0, 1)
    )
    assert a == b
    assert a != c


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.12345, "123"), (0.0123, "12.3"), (0.00123, "1.23"), (0.000123, "0.123"), (12, "12000")],
)
def test_milliseconds(seconds: float, text: str) -> None:
    assert render.milliseconds(seconds) == text


def test_slowdowns_are_told() -> None:
    fine = {"speedup": 2.0, "disturbed": False}
    assert render.verdict([fine, fine], "step") == [
        "step: no case slower than the best dense form."
    ]
    lines = render.verdict([fine, {"speedup": 0.5, "disturbed": True}], "step")
    assert "1 of 2 cases slower" in lines[0]
    assert "0.50x" in lines[0]
    assert "1 marked ?" in lines[1]
    assert render.speedup(0.5).style == "bold red"
    assert render.speedup(2.0).style == "green"
    assert render.speedup(2.0, disturbed=True).plain == "2.00x?"


def test_a_disturbed_timing_is_noticed() -> None:
    steady = Timing(1.0, 0.95, 1.05, 9)
    slow, wide = Timing(1.6, 1.55, 1.65, 9), Timing(1.0, 0.7, 1.25, 9)
    report = Report([], training=False)

    def case(dense: Timing, sparse: Timing) -> measuring.Case:
        return measuring.Case(dense, None, sparse, measuring.Form(), report, steady)

    assert not case(steady, steady).disturbed
    assert not case(steady, slow).disturbed  # slower, but as steady
    assert case(slow, steady).disturbed
    assert case(steady, wide).disturbed
