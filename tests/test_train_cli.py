"""``train``: the same bits after any interruption, files, errors, ranks."""

from __future__ import annotations

import importlib.util
import json
import os
import random
import shutil
import signal
import socket
import time
from pathlib import Path

import pytest
import safetensors.torch
import torch

import fastprune as fp
from fastprune.cli import main
from fastprune.training import checkpoint, run
from fastprune.training.checkpoint import Checkpoints
from fastprune.training.data import Augmentation
from training_runs import Running, bits, command, lines, steps_stored

needs = [importlib.util.find_spec(p) for p in ("sklearn", "matplotlib")]
pytestmark = [
    pytest.mark.skipif(not all(needs), reason='needs pip install "fastprune[demo]"'),
    pytest.mark.skipif(os.name != "posix", reason="needs signals and fork"),
]
FIELDS = {
    "epoch", "phase", "step", "loss", "train_accuracy", "test_accuracy", "sparsity", "kept",
    "pq_index", "gini_index", "macs", "flips", "iou", "pruning_error",
    "pruned_test_accuracy", "pruned_pq_index", "lr", "seconds",
    "update_seconds",
}  # fmt: skip
DPF = ["--method", "dpf", "--sparsity", "0.9", "--every", "2", "--epochs", "3"]
STEPS = 5  # of an epoch: 1297 samples in batches of 256


@pytest.fixture(autouse=True)
def _threads(threads: None) -> None:
    """``--threads`` sets them for the whole process."""


CASES = {
    "dense, Adam, one cycle": ["--method", "dense", "--optimizer", "adam", "--epochs", "2"],
    "snip": ["--method", "snip", "--sparsity", "0.9", "--epochs", "2", "--lr-schedule", "cosine"],
    "random, by layer": ["--method", "random", "--sparsity", "0.8", "--quota", "erk", "--epochs=2"],
    "dpf, fine-tuned": [*DPF, "--finetune-epochs", "1", "--lr-schedule", "step:0.4,0.8x0.1"],
    "incremental": ["--method", "incremental", "--sparsity", "0.9", "--epochs", "3"],
    "one-shot": ["--method", "one-shot", "--sparsity", "0.9", "--epochs", "2"],
    "set": ["--method", "set", "--sparsity", "0.9", "--epochs", "3", "--every", "3"],
    "rigl": ["--method", "rigl", "--sparsity", "0.9", "--epochs", "3", "--every", "3"],
    "dsr": ["--method", "dsr", "--sparsity", "0.9", "--epochs", "3", "--every", "3"],
    "sparse-momentum": ["--method", "sparse-momentum", "--sparsity", "0.9", "--epochs", "3"],
    "sfp": ["--method", "sfp", "--sparsity", "0.5", "--epochs", "3"],
    "lottery-ticket": ["--method", "lottery-ticket", "--rounds", "2", "--epochs", "1"],
    "one-shot-iterative": ["--method", "one-shot-iterative", "--rounds", "2", "--epochs", "1"],
    "sap": ["--method", "sap", "--rounds", "2", "--epochs", "1", "--finetune-epochs", "1"],
    "convolutions, batch norm, augmentation": [
        "--model", "vgg-small", *DPF, "--augment", "--epochs", "2", "--batch", "400",
    ],
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_every_checkpoint_leads_to_the_same_bits(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run from each checkpoint, of each phase and in the middle of epochs, ends alike."""
    monkeypatch.setattr(run, "curves", lambda *_: False)  # drawing would take most of the time
    whole = tmp_path / "whole"
    argv = [*CASES[case], "--checkpoint-every", "2"]
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "KEPT", 10**6)
        assert main(command(*argv, out=whole)) == 0
    expected = bits(whole)
    paths = Checkpoints(whole).paths()
    assert len(paths) >= 4
    for path in paths:
        out = tmp_path / "part"
        out.mkdir()
        shutil.copy(whole / "config.json", out)
        shutil.copy(path, out)
        # Of lines past the checkpoint nothing may be left.
        shutil.copy(whole / "log.jsonl", out)
        assert main(command(*argv, out=out)) == 0
        assert bits(out) == expected, path.name
        shutil.rmtree(out)


def test_the_kernels_that_were_timed_are_kept(tmp_path: Path) -> None:
    """Timings differ from run to run; a run that goes on must not time again."""
    first, second = tmp_path / "a", tmp_path / "b"
    argv = [*DPF, "--kernels", "measured", "--checkpoint-every", "4"]
    started = Running(command(*argv, out=first), tmp_path / "text")
    if started.until(lambda: steps_stored(first)):
        started.kill()
    started.wait()
    shutil.copytree(first, second)
    for out in (first, second):
        assert Running(command(*argv, out=out), tmp_path / "text").wait() == 0
    assert bits(first) == bits(second)


@pytest.mark.parametrize("seed", [0, 1])
def test_killed_at_random_points(seed: int, tmp_path: Path) -> None:
    whole, out, text = tmp_path / "whole", tmp_path / "killed", tmp_path / "text"
    argv = [*DPF, "--finetune-epochs", "2", "--checkpoint-every", "3", "--epochs", "6"]
    started = Running(command(*argv, out=whole), text)
    assert started.until(lambda: steps_stored(whole))
    began = time.monotonic()
    assert started.wait() == 0
    seconds = time.monotonic() - began
    rnd, kills = random.Random(seed), 0
    for _ in range(12):
        started = Running(command(*argv, out=out), text)
        before = text.stat().st_size
        assert started.until(lambda n=before: text.stat().st_size > n), started.text()
        time.sleep(rnd.uniform(0, 0.5) * seconds)
        started.kill()
        kills += started.wait() == -signal.SIGKILL
    assert kills >= 3
    assert Running(command(*argv, out=out), text).wait() == 0, text.read_text()
    assert bits(out) == bits(whole)
    assert len(steps_stored(out)) <= 2
    assert not list(out.glob("*.tmp")) + list(out.glob(".*.tmp"))
    assert "Traceback" not in text.read_text()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_stops_at_a_step_and_says_how_to_go_on(number: int, tmp_path: Path) -> None:
    whole, out, text = tmp_path / "whole", tmp_path / "stopped", tmp_path / "text"
    argv = [*DPF, "--epochs", "60"]
    started = Running(command(*argv, out=out), text)
    assert started.until(lambda: (out / "log.jsonl").exists() and lines(out))
    started.kill(number)
    began = time.monotonic()
    assert started.wait() == 130
    assert time.monotonic() - began < 2
    last = started.text().splitlines()[-1]
    assert last.startswith("fastprune train: interrupted: after step ")
    assert f"kept in {out / 'checkpoint-'}" in last
    assert "run the same command again" in last
    assert f"after step {steps_stored(out)[0]}," in last
    for folder in (out, whole):
        assert Running(command(*argv, out=folder), tmp_path / "more").wait() == 0
    assert bits(out) == bits(whole)


def test_ctrl_c_before_training(tmp_path: Path) -> None:
    text = tmp_path / "text"
    argv = ["--method", "synflow", "--sparsity", "0.9", "--epochs", "1", "--model", "resnet-18"]
    started = Running([*command(*argv, out=tmp_path / "out")], text)
    if started.until(lambda: "pruning with synflow" in started.text()):
        started.kill(signal.SIGINT)
    assert started.wait() == 130, started.text()
    assert "run the same command again" in started.text()
    assert "Traceback" not in started.text()


# -- files ---------------------------------------------------------------------------------------


def test_what_a_run_leaves(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "new" / "run"
    argv = command(*DPF, "--finetune-epochs", "1", out=out)
    assert main(argv) == 0
    said = capsys.readouterr()
    assert "fine-tuning" in said.out
    assert "[4/4] fine-tuning, epoch 1 of 1: loss " in said.err
    entries = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert all(e.keys() == FIELDS for e in entries)
    assert [e["epoch"] for e in entries] == [1, 2, 3, 4]
    assert [e["step"] for e in entries] == [STEPS, 2 * STEPS, 3 * STEPS, 4 * STEPS]
    assert [e["phase"] for e in entries] == ["train"] * 3 + ["fine-tuning"]
    masks = fp.Masks.load(out / "masks.safetensors")
    assert masks.nnz() == round(0.1 * masks.numel()) == entries[2]["kept"] == entries[3]["kept"]
    weights = safetensors.torch.load_file(out / "model.safetensors")
    model = fp.models.create("lenet-300-100", in_shape=(1, 8, 8))
    model.load_state_dict(weights)
    assert all(bool((weights[n][~masks[n]] == 0).all()) for n in masks)
    test = fp.data.load("digits", None, "test").tensors
    right = (model.eval()(test[0]).argmax(1) == test[1]).float().mean()
    assert float(right) == pytest.approx(entries[-1]["test_accuracy"])
    assert (out / "curves.png").read_bytes().startswith(b"\x89PNG")
    settings = json.loads((out / "config.json").read_text())["settings"]
    assert settings["sparsity"] == 0.9
    assert settings["epochs"] == 3
    # A second time: nothing is trained, everything is written again.
    before = bits(out)
    (out / "model.safetensors").unlink()
    assert main(argv) == 0
    assert "finished" in capsys.readouterr().err
    assert bits(out) == before


def test_training_learns_and_its_order_follows_the_seed(tmp_path: Path) -> None:
    argv = ["--method", "magnitude", "--sparsity", "0.5", "--epochs", "8", "--batch", "64"]
    for name, seed in (("a", "3"), ("b", "3"), ("c", "4")):
        assert main(command(*argv, "--seed", seed, out=tmp_path / name)) == 0
    assert lines(tmp_path / "a")[-1]["test_accuracy"] > 0.9
    assert bits(tmp_path / "a") == bits(tmp_path / "b")
    assert bits(tmp_path / "a")["log"][0] != bits(tmp_path / "c")["log"][0]


def test_found_masks_are_trained_from_scratch(tmp_path: Path) -> None:
    argv = ["--method", "dpf", "--sparsity", "0.9", "--exclude", "2", "--epochs", "2"]
    names = [n for n, _ in fp.models.create("lenet-300-100").named_parameters()]
    first = names[0].removesuffix(".weight")
    argv[5] = first
    assert main(command(*argv, out=tmp_path / "found")) == 0
    masks = fp.Masks.load(tmp_path / "found" / "masks.safetensors")
    assert names[0] not in masks
    again = ["--method", "masks", "--masks", str(tmp_path / "found" / "masks.safetensors")]
    assert main(command(*again, "--epochs", "2", out=tmp_path / "again")) == 0
    assert fp.Masks.load(tmp_path / "again" / "masks.safetensors") == masks
    assert {e["kept"] for e in lines(tmp_path / "again")} == {masks.nnz()}


def test_a_round_logs_the_network_that_it_pruned(tmp_path: Path) -> None:
    argv = ["--method", "one-shot-iterative", "--rounds", "3", "--epochs", "8", "--batch", "64"]
    assert main(command(*argv, out=tmp_path)) == 0
    entries = lines(tmp_path)
    assert [e["phase"] for e in entries] == ["train"] * 8 + ["round 1", "round 2", "round 3"]
    assert all(e["pruned_test_accuracy"] is None for e in entries[:8])
    for entry in entries[8:]:  # without retraining the two are one network
        assert entry["pruned_test_accuracy"] == entry["test_accuracy"]
        assert entry["pruned_pq_index"] == pytest.approx(entry["pq_index"])
    sap = ["--method", "sap", "--epochs", "4", "--rounds", "1"]
    assert main(command(*sap, out=tmp_path / "s")) == 0
    assert [e["pruned_test_accuracy"] is None for e in lines(tmp_path / "s")] == [
        True,
        True,
        True,
        True,
        False,
        True,
        True,
        True,
    ]


def test_another_run_in_the_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"
    assert main(command("--method", "dense", "--epochs", "1", out=out)) == 0
    (out / "notes.txt").write_text("mine")
    capsys.readouterr()
    other = command("--method", "dense", "--epochs", "1", "--lr", "0.01", out=out)
    assert main(other) == 2
    error = capsys.readouterr().err
    assert "other settings: lr 0.05, not 0.01" in error
    assert "--restart" in error
    assert main([*other, "--restart"]) == 0
    assert (out / "notes.txt").read_text() == "mine"
    (out / "config.json").unlink()
    assert main(other) == 2
    assert "no config.json" in capsys.readouterr().err


def test_a_second_process_is_kept_out(tmp_path: Path) -> None:
    out = tmp_path / "run"
    argv = command(*DPF, "--epochs", "500", out=out)
    first = Running(argv, tmp_path / "first")
    assert first.until(lambda: steps_stored(out))
    second = Running(argv, tmp_path / "second")
    assert second.wait() == 2
    assert "another process is training into" in second.text()
    first.kill()
    first.wait()


# -- damage --------------------------------------------------------------------------------------


def damaged(content: bytes, how: str) -> bytes:
    if how == "truncated":
        return content[: len(content) // 2]
    if how == "empty":
        return b""
    at = {"flipped header": 40, "flipped data": len(content) - 100}[how]
    return content[:at] + bytes([content[at] ^ 4]) + content[at + 1 :]


@pytest.mark.parametrize("how", ["truncated", "empty", "flipped header", "flipped data"])
def test_a_damaged_checkpoint_falls_back_to_the_one_before(
    how: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, argv = tmp_path / "run", [*DPF, "--checkpoint-every", "4"]
    assert main(command(*argv, out=out)) == 0
    expected = bits(out)
    newest, before = Checkpoints(out).paths()
    newest.write_bytes(damaged(newest.read_bytes(), how))
    capsys.readouterr()
    assert main(command(*argv, out=out)) == 0
    assert "damaged checkpoint" in capsys.readouterr().err
    assert bits(out) == expected
    for path in Checkpoints(out).paths():
        path.write_bytes(damaged(path.read_bytes(), how))
    assert main(command(*argv, out=out)) == 2
    assert "no checkpoint can be read" in capsys.readouterr().err
    assert before in Checkpoints(out).paths()


def test_a_full_disk_is_an_error_that_leaves_a_run_to_go_on_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    whole, out = tmp_path / "whole", tmp_path / "run"
    argv = [*DPF, "--checkpoint-every", "2"]
    assert main(command(*argv, out=whole)) == 0
    write, count = fp.files.os.fsync, 0

    def full(descriptor: int) -> None:
        nonlocal count
        count += 1
        if count > 12:
            raise OSError(28, "No space left on device")
        write(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(fp.files.os, "fsync", full)
        assert main(command(*argv, out=out)) == 2
    error = capsys.readouterr().err
    assert "No space left on device" in error
    assert 1 <= len(steps_stored(out)) <= 2
    assert main(command(*argv, out=out)) == 0
    assert bits(out) == bits(whole)


def test_the_checkpoint_of_another_run_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    a, b = tmp_path / "a", tmp_path / "b"
    assert main(command(*DPF, out=a)) == 0
    assert main(command(*DPF, "--seed", "1", out=b)) == 0
    for path in Checkpoints(b).paths():
        shutil.copy(path, a)
    capsys.readouterr()
    assert main(command(*DPF, "--seed", "0", out=a)) == 2
    assert "of another run" in capsys.readouterr().err


def test_divergence_is_an_error_in_words(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, method in (("a", ["--method", "dense", "--epochs", "2"]), ("b", DPF)):
        assert main(command(*method, "--lr", "1e30", out=tmp_path / name)) == 2
        assert "diverged" in capsys.readouterr().err


# -- ranks ---------------------------------------------------------------------------------------


def ranks(argv: list[str], texts: list[Path]) -> list[Running]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(len(texts))}
    places = [{"RANK": str(r), "LOCAL_RANK": str(r)} for r in range(len(texts))]
    return [Running(argv, t, address | p) for t, p in zip(texts, places, strict=True)]


def test_two_ranks_train_as_one_process(tmp_path: Path) -> None:
    """Stopped on the way by Ctrl-C of one rank, and gone on with; only rank 0 writes."""
    alone, out, plain = tmp_path / "alone", tmp_path / "two", tmp_path / "plain"
    argv = [*DPF, "--finetune-epochs", "1", "--epochs", "5"]
    texts = [tmp_path / f"rank{r}" for r in range(2)]
    assert main(command(*argv, out=alone)) == 0
    both = ranks(command(*argv, out=out), texts)
    assert both[1].until(lambda: len(steps_stored(out)) > 1)
    both[1].kill(signal.SIGINT)
    assert [r.wait() for r in both] == [130, 130], both[0].text() + both[1].text()
    for folder in (out, plain):
        both = ranks(command(*argv, out=folder), texts)
        assert [r.wait() for r in both] == [0, 0], both[0].text() + both[1].text()
    assert bits(out) == bits(plain)
    assert "train, epoch" not in both[1].text()
    model, expected = (safetensors.torch.load_file(p / "model.safetensors") for p in (out, alone))
    masks, wanted = (fp.Masks.load(p / "masks.safetensors") for p in (out, alone))
    # A weight at the threshold may fall on either side; the others agree.
    assert fp.mask_iou(masks, wanted) > 0.999
    for name, w in model.items():
        both_keep = masks[name] & wanted[name] if name in masks else torch.ones_like(w).bool()
        torch.testing.assert_close(w[both_keep], expected[name][both_keep], rtol=1e-4, atol=1e-5)
    for a, b in zip(lines(out)[:2], lines(alone)[:2], strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-4)
        assert a["kept"] == b["kept"]


def test_a_rank_that_dies_is_an_error(tmp_path: Path) -> None:
    texts = [tmp_path / f"rank{r}" for r in range(2)]
    out = tmp_path / "out"
    both = ranks(command(*DPF, "--epochs", "2000", "--timeout", "20", out=out), texts)
    assert both[0].until(lambda: steps_stored(out))
    both[1].kill()
    assert both[0].wait(60) == 2
    assert "lost the others" in both[0].text()
    assert "Traceback" not in both[0].text()


# -- arguments -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--method", "snap"], "snap"),
        (["--method", "dpf"], "--sparsity"),
        (["--method", "dpf", "--sparsity", "1"], "--sparsity"),
        (["--method", "dpf", "--sparsity", "-0.1"], "--sparsity"),
        (["--method", "dense", "--sparsity", "0.5"], "--sparsity: dense does not use it"),
        (["--method", "snip", "--sparsity", "0.5", "--every", "3"], "--every: snip"),
        (["--method", "dpf", "--sparsity", "0.5", "--quota", "erk"], "--quota: dpf"),
        (["--method", "dpf", "--sparsity", "0.5", "--rounds", "2"], "--rounds: dpf"),
        (["--method", "one-shot", "--sparsity", "0.5", "--every", "2"], "--every: one-shot"),
        (["--method", "dpf", "--sparsity", "0.5", "--scope", "galaxy"], "galaxy"),
        (["--method", "dpf", "--sparsity", "0.5", "--schedule", "square"], "square"),
        (["--method", "masks"], "--masks: method masks needs the file"),
        (["--method", "masks", "--masks", "/nowhere"], "/nowhere"),
        (["--method", "snip", "--sparsity", "0.5", "--masks", "x"], "--masks: snip"),
        (["--method", "dense", "--exclude", "4"], "--exclude: dense does not use it"),
        (["--method", "dpf", "--sparsity", "0.5", "--include", "layer9"], "layer9"),
        (["--method", "dense", "--lr-schedule", "step:0.7,0.5x0.1"], "--lr-schedule"),
        (["--method", "dense", "--lr-schedule", "step:0.5"], "--lr-schedule"),
        (["--method", "dense", "--epochs", "0"], "--epochs"),
        (["--method", "dense", "--batch", "5000"], "--batch"),
        (["--method", "dense", "--momentum", "0.5,0.9"], "--momentum"),
        (["--method", "dense", "--model", "alexnets"], "alexnets"),
        (["--method", "dense", "--model", "vgg-19"], "in_shape"),
        (["--method", "dense", "--data", "/nowhere"], "/nowhere"),
        (["--method", "dense", "--dataset", "cifar-10"], "needs the folder"),
        (["--method", "dense", "--data", "/", "--dataset", "cifar-11"], "cifar-11"),
        (["--method", "dense", "--data", "/dev"], "name the data set"),
    ],
)
def test_wrong_arguments_give_one_line(
    words: list[str], expected: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(command(*words, out=tmp_path / "out")) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert len(captured.err.splitlines()) == 1, captured.err
    assert expected in captured.err


def test_an_unwritable_folder(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(command("--method", "dense", out=Path("/dev/null/run"))) == 2
    assert "/dev/null" in capsys.readouterr().err


def test_cifar_is_found_and_augmented(tmp_path: Path) -> None:
    small_cifar(tmp_path / "data", 8)
    argv = ["--method", "dpf", "--sparsity", "0.5", "--model", "resnet20", "--epochs", "1"]
    argv += ["--batch", "20", "--data", str(tmp_path / "data")]
    assert main(command(*argv, out=tmp_path / "a")) == 0
    settings = json.loads((tmp_path / "a" / "config.json").read_text())["settings"]
    assert settings["dataset"] == "cifar-10"
    assert settings["augment"] is True
    assert settings["lr_schedule"] == "step:0.5,0.75x0.1"
    assert main(command(*argv, "--no-augment", out=tmp_path / "b")) == 0
    assert lines(tmp_path / "a")[0]["loss"] != lines(tmp_path / "b")[0]["loss"]


def test_augmentation_crops_and_flips() -> None:
    info = fp.data.info("cifar-10")
    augment = Augmentation(info)
    x = torch.randn(3, 3, 32, 32)
    still = (torch.tensor([4, 4, 4]), torch.tensor([4, 4, 4]), torch.tensor([False, True, False]))
    got = augment(x, still)
    assert torch.equal(got[0], x[0])
    assert torch.equal(got[1], x[1].flip(2))
    moved = augment(x, (torch.tensor([0, 8, 4]), torch.tensor([4, 4, 6]), still[2]))
    assert torch.equal(moved[0][:, 4:], x[0][:, :-4])
    black = -torch.tensor(info.mean) / torch.tensor(info.std)
    assert torch.equal(moved[0][:, :4], black.view(3, 1, 1).expand(3, 4, 32))
    assert torch.equal(moved[2][:, :, :-2], x[2][:, :, 2:])
    drawn, again = (Augmentation.draw(500, 0, 1, 2) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(drawn, again, strict=True))
    assert set(drawn[0].tolist()) == set(range(9))


def small_cifar(folder: Path, samples: int) -> None:
    """CIFAR-10's binary files, cut."""
    base = folder / "cifar-10-batches-bin"
    base.mkdir(parents=True)
    g = torch.Generator().manual_seed(0)
    for name in (*(f"data_batch_{i}.bin" for i in range(1, 6)), "test_batch.bin"):
        rows = torch.randint(256, (samples, 3073), generator=g, dtype=torch.uint8)
        rows[:, 0] %= 10
        (base / name).write_bytes(rows.numpy().tobytes())
