"""The papers' tables and figures as trainings.

python -m bench.recipes list | show NAME | run NAME... --out DIR [--data DIR] | report DIR

``run`` may be interrupted and repeated: finished trainings stay. ``all`` stands for every recipe;
``--reduced`` trains a small network on digits with the same schedules instead.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console

import fastprune
from bench.recipes import recipe as recipes
from bench.recipes import render, report, running, train
from bench.recipes.jobs import FILTERS, Cell, expand, jobs_of
from bench.recipes.recipe import Recipe
from bench.recipes.results import Results
from bench.recipes.schema import RecipeError

RUNS = "runs.json"


def _names(asked: list[str]) -> list[str]:
    return recipes.names() if asked == ["all"] else asked


def list_recipes(args: argparse.Namespace) -> int:
    """One line for each recipe."""
    for name in recipes.names():
        found = recipes.load(name)
        covers = ", ".join(found.covers)
        where = f"paper {found.document['paper']}: {covers}" if covers else "README"
        print(f"{name:26}{len(jobs_of(expand(found), found)):5} runs  {found.title} ({where})")
    return 0


def show(args: argparse.Namespace) -> int:
    """The protocol, the jobs, and what the paper says."""
    found = recipes.load(args.name, reduced=args.reduced)
    cells = expand(found)
    print(f"{found.title}\npaper {found.document['paper']}: {', '.join(found.covers)}")
    for key, case in found.cases.items():
        print(f"\n{key}: " + ", ".join(f"{k} {v}" for k, v in case.items()))
        for sparsity in [None, *case.get("sparsities", [])]:
            said = found.numbers(key, found.measures[0], sparsity)
            if said:
                at = "dense" if sparsity is None else f"{100 * sparsity:g} %"
                print(f"  paper, {at}: " + ", ".join(f"{k} {v}" for k, v in said.items()))
    print()
    for key, method in found.methods.items():
        print(f"{key}: " + ", ".join(f"{k} {v}" for k, v in method.items()))
    for kind in ("findings", "notes"):
        for text in found.document.get(kind, []):
            print(f"{kind[:-1]}: {text}")
    jobs = jobs_of(cells, found)
    print(f"\n{len(jobs)} trainings, for example\n  " + _example(jobs[0].settings))
    return 0


def _example(settings: Any) -> str:
    argv = train.command(settings, Path("RUN"), data=Path("DIR"))
    return " ".join(["python", *argv[1:]])


def run(args: argparse.Namespace) -> int:
    """Train what is not done yet, then report."""
    where = running.Where(args.out, args.data, args.parallel, args.threads, args.device)
    plan = []
    for name in _names(args.names):
        found = recipes.load(name, reduced=args.reduced)
        try:
            cells = expand(found, args.seeds, args.only)
        except RecipeError:
            if len(_names(args.names)) == 1:
                raise
            continue  # a filter may leave some of several recipes without a job
        plan.append((found, cells))
    if not plan:
        raise RecipeError(f"--only {' '.join(args.only)} leaves nothing")
    missing = {
        ds: why
        for ds in sorted({c.job.settings["dataset"] for _, cells in plan for c in cells})
        if (why := train.missing_data(ds, args.data)) is not None
    }
    if missing:
        for why in missing.values():
            print(f"missing: {why}", file=sys.stderr)
        print("--reduced runs on digits, without files", file=sys.stderr)
        return 2
    _remember(args, plan)
    jobs = {job.name: job for found, cells in plan for job in jobs_of(cells, found)}
    print(f"{len(jobs)} trainings into {args.out}")
    counts = running.run_all(list(jobs.values()), where)
    print(", ".join(f"{n} {state}" for state, n in sorted(counts.items())))
    _reports(args.out, png=args.png)
    return 1 if counts.get("failed") else 0


def _remember(args: argparse.Namespace, plan: list[tuple[Recipe, list[Cell]]]) -> None:
    """What was run, so that ``report`` needs the folder alone; later calls replace earlier ones."""
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / RUNS
    runs = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    for found, _ in plan:
        key = found.name + (":reduced" if found.reduced else "")
        asked = next(n for n in _names(args.names) if Path(n).stem == found.name)
        name = str(Path(asked).absolute()) if asked.endswith(".toml") else asked
        runs[key] = {"name": name, "reduced": args.reduced, "seeds": args.seeds, "only": args.only}
    path.write_text(json.dumps(runs, indent=1) + "\n", encoding="utf-8")


def _reports(out: Path, *, png: bool, say: Callable[..., None] | None = None) -> None:
    where = running.Where(out)
    path = out / RUNS
    if not path.exists():
        raise RecipeError(f"{out} holds no {RUNS}: nothing was run into it")
    results = Results(
        lambda name: running.status(where, name),
        lambda name: running.log_of(where, name),
        lambda dataset: fastprune.data.info(dataset).num_classes,
    )
    console = Console(width=None if sys.stdout.isatty() else 180)
    for key, asked in json.loads(path.read_text(encoding="utf-8")).items():
        found = recipes.load(asked["name"], reduced=asked["reduced"])
        cells = expand(found, asked["seeds"], asked["only"])
        document = report.document(found, cells, results)
        stem = out / ("report-" + key.replace(":", "-"))
        stem.with_suffix(".json").write_text(json.dumps(document, indent=1), encoding="utf-8")
        stem.with_suffix(".md").write_text(render.markdown(document), encoding="utf-8")
        render.text(document, console)
        drawn = png and render.png(document, stem.with_suffix(".png"))
        print(f"written to {stem}.json, .md{', .png' if drawn else ''}\n")


def main(argv: list[str] | None = None) -> int:
    """The command line; 2 for wrong arguments and missing data, 1 if a training failed."""
    doc = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        prog="python -m bench.recipes", description=__doc__, formatter_class=doc
    )
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("list", help="all recipes").set_defaults(do=list_recipes)
    one = commands.add_parser("show", help="a protocol, its trainings, the paper's numbers")
    one.add_argument("name")
    one.add_argument("--reduced", action="store_true")
    one.set_defaults(do=show)
    go = commands.add_parser("run", help="train and report")
    go.add_argument("names", nargs="+", metavar="NAME", help="recipes, TOML files, or all")
    go.add_argument("--out", type=Path, required=True)
    go.add_argument("--data", type=Path, help="folder of the data sets, or of DIR/cifar-10 etc.")
    go.add_argument("--reduced", action="store_true")
    go.add_argument("--seeds", type=int, help="1 .. N [the recipe's number]")
    go.add_argument(
        "--only", nargs="+", default=[], metavar="KEY=VALUE[,VALUE]", help=", ".join(FILTERS)
    )
    go.add_argument("--parallel", type=int, default=1, help="trainings at once [1]")
    go.add_argument("--threads", type=int, default=1, help="of each training [1]")
    go.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    go.add_argument("--png", action="store_true", help="plots too")
    go.set_defaults(do=run)
    again = commands.add_parser("report", help="of what was run into a folder")
    again.add_argument("out", type=Path, metavar="DIR")
    again.add_argument("--png", action="store_true", help="plots too")
    again.set_defaults(do=lambda args: _reports(args.out, png=args.png) or 0)
    args = parser.parse_args(argv)
    try:
        return int(args.do(args))
    except RecipeError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted: the same command goes on", file=sys.stderr)
        return running.INTERRUPTED


if __name__ == "__main__":
    sys.exit(main())
