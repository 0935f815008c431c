"""Recipes as jobs, their runs with a fake training, and the reports on them."""

from __future__ import annotations

import argparse
import importlib.util
import inspect
import json
from pathlib import Path

import pytest
from bench.recipes import compare, render, running, train
from bench.recipes import recipe as recipes
from bench.recipes.__main__ import main
from bench.recipes.jobs import expand, jobs_of
from bench.recipes.measures import MEASURES
from bench.recipes.recipe import Recipe
from bench.recipes.results import points
from bench.recipes.schema import RecipeError

import fastprune
from recipe_cases import ALL_OPTIONS, Fake, entry, fake_document, load_tiny

has_train = importlib.util.find_spec("fastprune.training") is not None


@pytest.fixture
def tiny(tmp_path: Path) -> Recipe:
    return load_tiny(tmp_path)


def test_jobs_are_shared(tiny: Recipe) -> None:
    cells = expand(tiny)
    jobs = jobs_of(cells, tiny)
    # Two seeds each of: dense, DPF at two sparsities, SNIP at two, Lottery Ticket.
    assert len(jobs) == 2 * (1 + 2 + 2 + 1)
    assert len(cells) == 2 * (1 + 2 * 2 + 2 + 1)
    by_method = {c.method: c for c in cells if c.seed == 1 and c.sparsity in (None, 0.9)}
    assert by_method["dpf"].job == by_method["dpf-ft"].job
    assert by_method["dpf"].phase == "train"
    settings = by_method["dpf-ft"].job.settings
    assert settings["finetune-epochs"] == 2
    # 1297 // 64 = 20 steps in each of 4 epochs; the second decay would be at 60.
    assert settings["ramp-steps"] == 40
    assert "ramp-steps" not in by_method["snip"].job.settings
    assert by_method["lottery-ticket"].job.settings["rounds"] == 2
    assert by_method["lottery-ticket"].sparsity is None


def test_filters(tiny: Recipe) -> None:
    assert {c.seed for c in expand(tiny, seeds=3)} == {1, 2, 3}
    only = expand(tiny, only=["method=dpf,dense", "sparsity=0.9"])
    assert {(c.method, c.sparsity) for c in only} == {("dpf", 0.9), ("dense", None)}
    with pytest.raises(RecipeError, match="leaves nothing"):
        expand(tiny, only=["method=sap"])
    with pytest.raises(RecipeError, match="--only color=red"):
        expand(tiny, only=["color=red"])


def test_command_line(tiny: Recipe) -> None:
    (cell,) = expand(tiny, 1, ["method=dpf", "sparsity=0.9"])
    argv = train.command(cell.job.settings, Path("out"), data=None)
    assert argv[1:4] == ["-m", "fastprune", "train"]
    options = dict(zip(argv[4::2], argv[5::2], strict=True))
    assert options["--method"] == "dpf"
    assert options["--sparsity"] == "0.9"
    assert options["--data"] == "digits"
    assert options["--every"] == "2"
    assert options["--weight-decay"] == "0.0001"


@pytest.mark.skipif(not has_train, reason="fastprune cannot train")
@pytest.mark.parametrize("name", recipes.names())
def test_train_takes_the_options_of_every_job(name: str) -> None:
    command = importlib.import_module("fastprune.cli.train")
    settings = importlib.import_module("fastprune.training.settings")
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    known = train.known_options()
    for reduced in (False, True):
        recipe = recipes.load(name, reduced=reduced)
        for job in jobs_of(expand(recipe), recipe):
            if train.unsupported(job.settings, known) is not None:
                continue
            parser.parse_args(train.command(job.settings, Path("run"), data=Path("data"))[4:])
            method = job.settings["method"]
            if method in settings.DYNAMIC:
                taken = inspect.signature(getattr(fastprune, settings.DYNAMIC[method])).parameters
                for option in ("every", "schedule", "scope", "ramp-steps"):
                    assert option not in job.settings or option.replace("-", "_") in taken


def test_methods_are_those_of_train() -> None:
    settings = pytest.importorskip("fastprune.training.settings")
    assert set(train.DYNAMIC) == set(settings.DYNAMIC)
    assert set(train.ITERATIVE) == set(settings.ITERATIVE)


def test_masks_of_another_job() -> None:
    recipe = recipes.load("dpf-lottery", reduced=True)
    jobs = jobs_of(expand(recipe, 1, ["method=scratch-random"]), recipe)
    source, job = jobs
    assert job.after == source.name
    assert source.settings["method"] == "dpf"
    assert job.settings["seed"] == 1001
    argv = train.command(job.settings, Path("out"), data=None, masks=Path("m.safetensors"))
    assert argv[argv.index("--masks") + 1] == "m.safetensors"


def test_data_folder(tmp_path: Path) -> None:
    (tmp_path / "cifar-10").mkdir()
    assert train.data_folder("cifar-10", tmp_path) == tmp_path / "cifar-10"
    assert train.data_folder("imagenet", tmp_path) == tmp_path
    assert "cifar-10-batches-py" in str(train.missing_data("cifar-10", tmp_path))
    assert "needs --data" in str(train.missing_data("cifar-10", None))


def test_missing_data_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert main(["run", "dpf-table-1", "--out", str(out), "--data", str(tmp_path)]) == 2
    assert "missing: cifar-10: " in capsys.readouterr().err
    assert not out.exists()


@pytest.fixture
def all_supported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train, "unsupported", lambda settings, known: None)


@pytest.mark.usefixtures("all_supported")
def test_report_of_fake_results(tiny: Recipe, tmp_path: Path) -> None:
    document, _, _ = fake_document(tiny, tmp_path)
    json.dumps(document)
    table = document["tables"][0]
    assert table["measure"] == "test_accuracy"
    eighty, ninety = table["rows"]
    cells = ninety["cells"]
    assert cells["dpf"]["mean"] == pytest.approx(95.15)
    assert cells["dpf"]["deviation"] == pytest.approx(0.1 / 2**0.5)
    assert cells["dpf"]["difference"] == pytest.approx(1.15)
    assert cells["dpf"]["epochs"] == 4
    assert cells["dpf-ft"]["mean"] == pytest.approx(97.15)
    assert cells["dpf-ft"]["epochs"] == 6
    assert cells["snip"]["states"] == {"done": 1, "diverged": 1}
    assert cells["snip"]["paper"] == "*"
    # The nearest of 0, 20 and 36 % to 90 % is the last round's.
    assert cells["lottery-ticket"]["sparsity"] == pytest.approx(0.36)
    assert cells["lottery-ticket"]["epochs"] == 12
    assert eighty["cells"]["snip"]["states"] == {"done": 1, "failed": 1}
    order = ninety["order"]
    assert order["paper"] == ["dense", "dpf-ft", "dpf", "snip"]
    assert order["here"] == ["dense", "dpf-ft", "dpf", "snip"]
    assert order["disagree"] == []
    assert order["within"] == [["dense", "dpf-ft"]]
    (claim,) = document["claims"]
    assert claim["verdict"] == "disagrees, by one seed"  # one of SNIP's diverged
    assert claim["against"] == [["snip", "lottery-ticket"]]
    shown = render.markdown(document)
    assert "95.15 ± 0.07 [94.00 ± 0.10] +1.15" in shown
    assert "93.10 (1 of 2 *) [*]" in shown
    assert "93.10 (1 of 2 runs)" in shown
    assert "at 36.00 %" in shown
    assert "diverged: digits-mlp-snip-90pc-e4-seed2-" in shown
    assert "failed: digits-mlp-snip-80pc-e4-seed2-" in shown
    assert "MemoryError" in shown


@pytest.mark.usefixtures("all_supported")
def test_text_and_plot(tiny: Recipe, tmp_path: Path) -> None:
    from rich.console import Console

    document, _, _ = fake_document(tiny, tmp_path)
    with open(tmp_path / "report.txt", "w+") as file:
        render.text(document, Console(file=file, width=200))
        file.seek(0)
        shown = file.read()
    assert "95.15 ± 0.07 [94.00 ± 0.10] +1.15" in shown
    assert "Claim: DPF is ahead at 90 % (mlp): DISAGREES, BY ONE SEED" in shown
    if importlib.util.find_spec("matplotlib"):
        assert render.png(document, tmp_path / "report.png")
        assert (tmp_path / "report.png").stat().st_size > 10_000


@pytest.mark.usefixtures("all_supported")
def test_a_second_call_runs_what_failed_only(tiny: Recipe, tmp_path: Path) -> None:
    _, cells, first = fake_document(tiny, tmp_path)
    again, where = Fake(), running.Where(tmp_path / "out")
    running.run_all(jobs_of(cells, tiny), where, lambda line: None, run=again, known=ALL_OPTIONS)
    assert len(first.calls) == 12
    assert [c["--method"] for c in again.calls] == ["snip"]
    assert again.calls[0]["--sparsity"] == "0.8"


@pytest.mark.usefixtures("all_supported")
def test_an_interrupted_job_stays_missing(tiny: Recipe, tmp_path: Path) -> None:
    where = running.Where(tmp_path / "out")
    jobs = jobs_of(expand(tiny), tiny)
    with pytest.raises(KeyboardInterrupt):
        running.run_all(jobs, where, run=lambda argv: (130, ""), known=ALL_OPTIONS)
    assert all(running.status(where, j.name)["state"] == "missing" for j in jobs)


def test_unsupported_options_are_named() -> None:
    recipe = recipes.load("sap-ablation-pq", reduced=True)
    job = expand(recipe)[0].job
    reason = train.unsupported(job.settings, {"epochs"})
    assert reason is not None
    assert "--p, --q" in reason
    assert train.unsupported(job.settings, None) == "this version of fastprune has no train command"


def test_points_are_phases_in_order() -> None:
    log = [entry(1, "train", 0.9, 0.0), entry(2, "train", 0.91, 0.0), entry(4, "round 1", 0.8, 0.2)]
    found = points(log)
    assert [(p.epochs, p.round, p.sparsity) for p in found] == [(2, 0, 0.0), (4, 1, 0.2)]
    assert found[0].value("test_accuracy") == pytest.approx(91.0)


def test_every_measure_reads_a_log() -> None:
    log = [entry(e, "train", 0.9, 0.5) for e in range(1, 5)]
    values = {name: m.of(log) for name, m in MEASURES.items()}
    assert None not in values.values()
    assert values["late_flips"] == pytest.approx(1.0)  # 10 flips of 1000 weights
    assert values["overhead"] == pytest.approx(5.0)
    dense = [{**entry(1, "train", 0.9, 0.0), "iou": None, "pruning_error": None}]
    assert MEASURES["iou"].of(dense) is None


def test_orders() -> None:
    of = compare.of_paper
    paper = {"a": of([90, 0.1]), "b": of([89.9, 0.1]), "c": of(80), "d": of("*")}
    here = {"a": of([70, 1]), "b": of([60, 1]), "c": of([69.5, 1]), "d": of([75, 1])}
    found = compare.orders(here, paper)  # type: ignore[arg-type]
    assert found["here"] == ["d", "a", "c", "b"]
    assert found["paper"] == ["a", "b", "c", "d"]
    assert found["agree"] == 0
    assert found["within"] == [["a", "c"]]  # a and b are within the paper's deviations
    assert found["disagree"] == [["a", "d"], ["b", "c"], ["b", "d"], ["c", "d"]]
    assert compare.of_paper("-") is None
