"""Masks: mapping, set algebra, application, files."""

from __future__ import annotations

import copy
import errno
import json
import os
import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from fastprune import masks_io
from fastprune.masks import Masks

SHAPES = {"a.weight": (2, 3), "b.weight": (5,), "empty": (0, 4), "scalar": ()}


def bits(seed: int, density: float = 0.5) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    return {n: torch.rand(s, generator=g) < density for n, s in SHAPES.items()}


def one_pair() -> tuple[nn.Sequential, Masks]:
    model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
    g = torch.Generator().manual_seed(0)
    return model, Masks(
        {n: torch.rand(p.shape, generator=g) < 0.5 for n, p in model.named_parameters()}
    )


def test_mapping_keeps_order_and_owns_its_tensors():
    source = bits(1)
    masks = Masks(source)
    before = masks.digest()
    source["a.weight"].logical_not_()
    masks["a.weight"].fill_(True)
    assert list(masks) == list(SHAPES)
    assert len(masks) == 4
    assert "b.weight" in masks
    assert "c" not in masks
    assert Masks(masks).digest() == before == masks_io.digest(dict(masks))
    with pytest.raises(TypeError):
        masks["a.weight"] = source["a.weight"]  # type: ignore[index]
    with pytest.raises(KeyError):
        masks["c"]


def test_of_returns_masks_unchanged_and_views_are_made_plain():
    masks = Masks({"w": torch.ones(1, dtype=torch.bool).expand(3)})
    assert Masks.of(masks) is masks
    assert masks["w"].is_contiguous()
    assert isinstance(Masks.of(dict(masks)), Masks)
    with torch.inference_mode():
        made = Masks({"w": torch.ones(3, dtype=torch.bool)})
    assert not made["w"].is_inference()


@pytest.mark.parametrize(
    ("value", "error", "text"),
    [
        (3, TypeError, "mapping"),
        ([("a", torch.ones(2).bool())], TypeError, "mapping"),
        ({1: torch.ones(2).bool()}, TypeError, "strings"),
        ({"": torch.ones(2).bool()}, ValueError, "empty"),
        ({"w": [True]}, TypeError, "'w'"),
        ({"w": torch.ones(2)}, ValueError, r"'w'.*bool.*float32"),
        ({"w": torch.ones(2, dtype=torch.uint8)}, ValueError, r"'w'.*uint8"),
        ({"w": torch.ones(2, dtype=torch.bool, device="meta")}, ValueError, "meta"),
    ],
)
def test_construction_errors(value, error, text):
    with pytest.raises(error, match=text):
        Masks(value)


def test_counts_and_summary():
    masks = Masks(
        {"conv.weight": torch.ones(2, 3, 1, 1).bool(), "fc.weight": torch.tensor([[True, False]])}
    )
    assert (masks.nnz(), masks.numel()) == (7, 8)
    assert masks.density() == 7 / 8
    assert masks.sparsity() == 1 / 8
    summary = masks.summary()
    assert [(r.name, r.shape, r.weights, r.kept) for r in summary.rows] == [
        ("conv.weight", (2, 3, 1, 1), 6, 6),
        ("fc.weight", (1, 2), 2, 1),
    ]
    assert (summary.total.weights, summary.total.kept) == (8, 7)
    assert summary.rows[1].density == summary.rows[1].sparsity == 0.5
    lines = str(summary).splitlines()
    assert lines[0].split() == ["name", "shape", "weights", "kept", "density", "sparsity"]
    assert lines[2].split() == ["conv.weight", "2x3x1x1", "6", "6", "1.0000", "0.0000"]
    assert lines[-1].split() == ["total", "8", "7", "0.8750", "0.1250"]
    assert len({len(line) for line in lines}) == 1  # aligned
    assert "7 of 8" in repr(masks)
    assert len(repr(masks)) < 100


def test_table_prints_zero_and_one_only_when_exact():
    mask = torch.ones(100_000, dtype=torch.bool)
    mask[0] = False
    line = str(Masks({"w": mask}).summary()).splitlines()[2]
    assert line.split()[-2:] == ["0.9999", "0.0001"]


def test_empty_masks():
    for masks in (Masks({}), Masks({"w": torch.ones(0, 3).bool()})):
        assert (masks.density(), masks.sparsity(), masks.nnz()) == (1.0, 0.0, 0)
        assert "total" in str(masks.summary())
        assert masks == ~masks  # nothing to invert
    assert Masks({}) != Masks({"w": torch.ones(0, 3).bool()})


# -- set algebra ---------------------------------------------------------------------------------


@st.composite
def three(draw: st.DrawFn) -> tuple[Masks, Masks, Masks]:
    shapes = draw(st.dictionaries(st.text(min_size=1, max_size=3), st.integers(0, 9), max_size=3))

    def one() -> Masks:
        rows = {n: draw(st.lists(st.booleans(), min_size=s, max_size=s)) for n, s in shapes.items()}
        return Masks({n: torch.tensor(r, dtype=torch.bool) for n, r in rows.items()})

    return one(), one(), one()


@settings(deadline=None, max_examples=150)
@given(three())
def test_set_algebra(abc):
    a, b, c = abc
    assert a & b == b & a
    assert a | b == b | a
    assert a & (b | c) == (a & b) | (a & c)
    assert ~(a & b) == ~a | ~b
    assert a - b == a & ~b
    assert a ^ b == (a | b) - (a & b)
    assert ~~a == a
    assert (a | b).nnz() + (a & b).nnz() == a.nnz() + b.nnz()
    assert (a == b) == (a.digest() == b.digest())
    assert a != b or hash(a) == hash(b)


def test_set_operations_need_the_same_names_and_shapes():
    a = Masks({"w": torch.ones(2).bool()})
    for op in ("__and__", "__or__", "__sub__", "__xor__"):
        with pytest.raises(ValueError, match=r"\['v', 'w'\]"):
            getattr(a, op)(Masks({"v": torch.ones(2).bool()}))
        with pytest.raises(ValueError, match=r"'w' is \(2,\).*\(3,\)"):
            getattr(a, op)({"w": torch.ones(3).bool()})
        with pytest.raises(TypeError):
            getattr(a, op)(3)


def test_equality_and_hash_ignore_order_and_see_everything_else():
    a = Masks(bits(3))
    assert a == Masks(dict(reversed(list(a.items()))))
    assert hash(a) == hash(Masks(dict(reversed(list(a.items())))))
    changed = dict(a)
    changed["b.weight"] = changed["b.weight"].clone()
    changed["b.weight"][2] = ~changed["b.weight"][2]
    for other in (
        Masks(changed),
        Masks({**a, "a.weight": a["a.weight"].view(3, 2)}),
        Masks({n.replace("b.", "c."): m for n, m in a.items()}),
        Masks({n: m for n, m in a.items() if n != "empty"}),
    ):
        assert a != other
        assert a.digest() != other.digest()
    assert a != dict(a)
    assert len({a, Masks(bits(3)), Masks(bits(4))}) == 2


def test_digest_is_the_same_in_every_process():
    masks = Masks({"w": torch.tensor([True, False, True]), "v": torch.zeros(2, 2).bool()})
    # A golden value: files written today must still verify in later releases.
    golden = "c45b5e7663e5b14101fe9e7baae43f5db82380a0534834c91ad280b85d175d44"
    assert masks.digest() == golden
    code = (
        "import torch; from fastprune.masks import Masks;"
        "m = Masks({'w': torch.tensor([True, False, True]), 'v': torch.zeros(2, 2).bool()});"
        "print(m.digest(), hash(m))"
    )
    out = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout.split()
    assert out == [masks.digest(), str(hash(masks))]


def test_copies():
    masks = Masks(bits(5))
    for other in (copy.deepcopy(masks), copy.copy(masks), pickle.loads(pickle.dumps(masks))):
        assert other == masks
        assert hash(other) == hash(masks)
        assert list(other) == list(masks)
    assert masks.to("cpu") == masks
    with pytest.raises(ValueError, match="meta"):
        masks.to("meta")


# -- models --------------------------------------------------------------------------------------


def test_apply_zeroes_the_pruned_weights_and_nothing_else():
    model, masks = one_pair()
    with torch.no_grad():
        for n, p in model.named_parameters():
            p[~masks[n]] = float("nan")
    model[0].weight.grad = grad = torch.ones(3, 4)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    assert masks.apply_(model) is None
    for n, p in model.named_parameters():
        assert (p[~masks[n]] == 0).all()
        assert not p[~masks[n]].signbit().any()
        assert torch.equal(p[masks[n]], before[n][masks[n]])
        assert p.requires_grad
    assert model[0].weight.grad is grad


@pytest.mark.parametrize("fault", ["name", "shape", "expanded", "inference", "integer"])
def test_apply_is_all_or_nothing(fault):
    model, masks = one_pair()
    other = dict(masks)
    if fault == "name":
        other["nowhere"] = torch.ones(2).bool()
    elif fault == "shape":
        other["2.bias"] = torch.ones(3).bool()
    elif fault == "expanded":
        model[2].bias = nn.Parameter(torch.ones(1).expand(2))
    elif fault == "inference":
        with torch.inference_mode():
            model[2].bias = nn.Parameter(torch.ones(2))
    else:
        model[2].bias = nn.Parameter(torch.ones(2, dtype=torch.int64), requires_grad=False)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    with pytest.raises(ValueError, match="nowhere" if fault == "name" else r"2\.bias"):
        Masks(other).apply_(model)
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())


def test_apply_takes_any_name_of_a_shared_parameter():
    model = nn.ModuleDict({"first": nn.Linear(3, 3), "second": nn.Linear(3, 3)})
    model["second"].weight = model["first"].weight
    Masks({"second.weight": torch.zeros(3, 3).bool()}).apply_(model)
    assert not model["first"].weight.any()


def test_masks_of_a_model():
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Linear(2, 2))
    ones = Masks.ones(model)
    assert list(ones) == ["0.weight", "2.weight"]
    assert ones.sparsity() == 0
    assert list(Masks.ones(model, include=nn.Linear)) == ["2.weight"]
    with torch.no_grad():
        model[2].weight.copy_(torch.tensor([[0.0, -0.0], [float("nan"), 1e-45]]))
    assert Masks.from_zeros(model, exclude="0")["2.weight"].tolist() == [
        [False, False],
        [True, True],
    ]


# -- files ---------------------------------------------------------------------------------------


def test_save_and_load(tmp_path):
    masks = Masks(bits(6))
    path = tmp_path / "m.safetensors"
    masks.save(path)
    loaded = Masks.load(str(path))
    assert loaded == masks
    assert list(loaded) == list(masks)
    assert os.listdir(tmp_path) == ["m.safetensors"]
    umask = os.umask(0)
    os.umask(umask)
    assert path.stat().st_mode & 0o777 == 0o666 & ~umask
    Masks({}).save(path)
    assert len(Masks.load(path)) == 0
    with pytest.raises(ValueError, match="__metadata__"):
        Masks({"__metadata__": torch.ones(1).bool()}).save(path)


def test_save_goes_through_a_symbolic_link(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real" / "m")
    Masks(bits(6)).save(tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert Masks.load(tmp_path / "real" / "m") == Masks(bits(6))


def test_load_refuses_truncation_at_every_length(tmp_path):
    path = tmp_path / "m"
    Masks(bits(7)).save(path)
    content = path.read_bytes()
    for length in range(len(content)):
        path.write_bytes(content[:length])
        with pytest.raises(ValueError, match=str(path)):
            Masks.load(path)
    path.write_bytes(content + b"\0")
    with pytest.raises(ValueError, match=str(path)):
        Masks.load(path)


def test_load_refuses_every_flipped_bit(tmp_path):
    path = tmp_path / "m"
    Masks({"w": torch.tensor([[True, False, True]]), "v": torch.zeros(2).bool()}).save(path)
    content = bytearray(path.read_bytes())
    for place in range(len(content) * 8):
        content[place // 8] ^= 1 << place % 8
        path.write_bytes(content)
        with pytest.raises(ValueError, match=str(path)):
            Masks.load(path)
        content[place // 8] ^= 1 << place % 8


def test_load_refuses_other_files(tmp_path):
    path = tmp_path / "m"
    mask = torch.ones(3).bool()
    good = {
        "format": "fastprune.masks",
        "version": "1",
        "names": '["w"]',
        "sha256": Masks({"w": mask}).digest(),
    }
    cases = [
        ({"w": mask}, None, "format"),
        ({"w": mask}, {**good, "format": "pt"}, "format"),
        ({"w": mask}, {**good, "version": "2"}, "version"),
        ({"w": mask}, {**good, "more": "x"}, "metadata"),
        ({"w": mask}, {**good, "names": '["v"]'}, "names"),
        ({"w": mask}, {**good, "names": "{}"}, "names"),
        ({"w": mask}, {**good, "names": "[1]"}, "not a readable"),
        ({"w": mask}, {**good, "names": "[" * 100_000}, "not a readable"),
        ({"w": ~mask}, good, "checksum"),
        ({"w": mask[:2]}, good, "checksum"),
        ({"w": mask.to(torch.uint8)}, good, "uint8"),
        ({"w": mask.float()}, good, "float32"),
    ]
    for tensors, metadata, text in cases:
        path.write_bytes(safetensors.torch.save(tensors, metadata))
        with pytest.raises(ValueError, match=text) as error:
            Masks.load(path)
        assert str(path) in str(error.value)
    for content in (b"", b"not a file of masks", json.dumps(good).encode(), os.urandom(500)):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=str(path)):
            Masks.load(path)
    with pytest.raises(FileNotFoundError):
        Masks.load(tmp_path / "missing")


@pytest.mark.parametrize("call", ["fsync", "replace"])
@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "no space"), KeyboardInterrupt()])
def test_a_failed_save_leaves_the_old_file_and_no_other(tmp_path, monkeypatch, call, error):
    path = tmp_path / "m"
    Masks(bits(8)).save(path)

    def fail(*_: object) -> None:
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(masks_io.os, call, fail)
        with pytest.raises(type(error)):
            Masks(bits(9)).save(path)
    assert Masks.load(path) == Masks(bits(8))
    assert os.listdir(tmp_path) == ["m"]
    with pytest.raises(OSError, match="nowhere"):
        Masks(bits(8)).save(tmp_path / "nowhere" / "m")


@pytest.mark.skipif(sys.platform == "win32", reason="resource limits are POSIX")
def test_a_full_disk_leaves_the_old_file(tmp_path):
    path = tmp_path / "m"
    Masks(bits(8)).save(path)
    code = f"""
import resource, torch
from fastprune.masks import Masks
masks = Masks({{"w": torch.ones(100_000).bool()}})
resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
try:
    masks.save({str(path)!r})
except OSError as e:
    print("OSError", e.errno)
"""
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.split() == ["OSError", str(errno.EFBIG)]
    assert Masks.load(path) == Masks(bits(8))
    assert os.listdir(tmp_path) == ["m"]


@pytest.mark.skipif(sys.platform == "win32", reason="SIGKILL is POSIX")
def test_killed_while_saving_the_old_or_the_new_file_loads(tmp_path):
    path = tmp_path / "m"
    sides = [Masks({"w": torch.full((300, 300), side).bool()}) for side in (0, 1)]
    sides[0].save(path)
    code = f"""
import torch
from fastprune.masks import Masks
sides = [Masks({{"w": torch.full((300, 300), side).bool()}}) for side in (0, 1)]
print("ready", flush=True)
while True:
    for masks in sides:
        masks.save({str(path)!r})
"""
    seen = set()
    for trial in range(3):
        child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
        assert child.stdout is not None
        child.stdout.readline()
        for wait in range(10):  # readers meanwhile see whole files only
            time.sleep(0.002 * (trial + 1) + 0.0007 * wait)
            seen.add(Masks.load(path))
        child.send_signal(signal.SIGKILL)
        child.wait()
        seen.add(Masks.load(path))
    assert seen == set(sides)


def test_paths_may_be_relative(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Masks(bits(1)).save("m")
    assert Masks.load(Path("m")) == Masks(bits(1))
