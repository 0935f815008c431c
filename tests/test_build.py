"""The installation: what is inside, which ISA runs, and the layout of the sources."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fastprune as fp

ROOT = Path(__file__).resolve().parent.parent
STEMS = ["masked_linear", "masked_conv2d", "global_topk_mask", "tensor_statistics", "path_norm"]
STEMS += ["mon_splitting"]


def python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    import os

    return subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
        check=False,
    )


def test_build_info() -> None:
    info = fp.build_info()
    assert info["version"] == fp.__version__
    assert info["cpu_isa"] in info["cpu_isas"]
    assert "scalar" in info["cpu_isas"]
    assert info["torch"] == torch.__version__
    assert bool(info["cuda_version"]) == bool(info["cuda_architectures"])


@pytest.mark.parametrize("name", ["scalar", "avx2", "avx512", "avx512_bf16"])
def test_environment_caps_the_isa(name: str) -> None:
    best = fp.build_info()["cpu_isas"]
    run = python("import fastprune; print(fastprune._C.isa())", FASTPRUNE_ISA=name)
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip() in best
    order = ["scalar", "avx2", "avx512", "avx512_bf16"]
    assert order.index(run.stdout.strip()) <= order.index(name)


def test_unknown_isa_is_refused() -> None:
    with pytest.raises(ValueError, match="isa: expected one of scalar"):
        fp._C.set_isa("sse9")


def test_import_under_too_old_a_torch_says_what_is_needed() -> None:
    run = python("import torch; torch.__version__ = '2.10.1+cpu'; import fastprune")
    assert run.returncode != 0
    assert "fastprune needs torch 2.11 or newer" in run.stderr
    assert "found torch 2.10.1+cpu" in run.stderr


def test_every_public_name_is_documented() -> None:
    for name in fp.__all__:
        assert (getattr(fp, name).__doc__ or "").strip(), name


@pytest.mark.skipif(not (ROOT / "csrc").is_dir(), reason="sources are not beside the tests")
@pytest.mark.parametrize("stem", STEMS)
def test_every_stem_has_all_its_files(stem: str) -> None:
    siblings = [
        f"csrc/ops/{stem}.h",
        f"csrc/ops/{stem}.cpp",
        f"csrc/kernels/cpu/{stem}.h",
        f"csrc/kernels/cpu/{stem}.cpp",
        f"python/fastprune/ops/{stem}.py",
        f"python/fastprune/reference/{stem}.py",
        f"tests/test_{stem}.py",
        f"bench/bench_{stem}.py",
    ]
    missing = [path for path in siblings if not (ROOT / path).is_file()]
    assert not missing
    for path in ("csrc/ops", "csrc/kernels/cpu", "python/fastprune/ops"):
        # And no stem of an op that this list does not know.
        known = {*STEMS, "common", "pattern", "isa", "simd", "panel", "scalar_types", "__init__"}
        known |= {"activations", "batch_norm", "layout", "product", "sparsity_index", "pq_bound"}
        known |= {"plan", "plan_registry", "planned", "convert", "backend", "cuda_op"}
        # Of an op's kernels:
        parts = ("topk", "conv_", "masked_conv2d_", "masked_linear_", "statistics_")
        parts += ("tensor_statistics_",)
        parts += ("path_norm_", "reach_", "mon_")
        known |= {
            "snapshot",
            "solve_info",
            "panel_pack",
            "cuda_form",
            "device_plan",
            "panel_weight",
            "kept_panel",
            "planned_conv",
        }
        found = {p.name.split(".")[0].removesuffix("_cuda") for p in (ROOT / path).glob("*.*")}
        assert found <= known | {p for p in found if p.startswith(parts)}, path
