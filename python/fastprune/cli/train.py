"""``fastprune train``: train a network, pruned by any method, into a folder.

The folder holds ``config.json`` (the settings), ``log.jsonl``, the newest two checkpoints, and at
the end ``masks.safetensors``, ``model.safetensors`` (plain dense keys) and ``curves.png``. The same
command goes on with a run that was interrupted in any way, to the same bits. Under ``torchrun`` the
batch is shared out among the ranks.

A line of the log, one per epoch (``macs`` of one sample, under the masks; ``flips`` summed over the
epoch's refreshes, ``iou`` and ``pruning_error`` of its last, null if there was none; ``pruned_*``
of the network just pruned, in the first epoch of a round)::

    {"epoch", "phase", "step", "loss", "train_accuracy", "test_accuracy", "sparsity", "kept",
     "pq_index", "gini_index", "macs", "flips", "iou", "pruning_error",
     "pruned_test_accuracy", "pruned_pq_index", "lr", "seconds", "update_seconds"}
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F

from fastprune import data
from fastprune.cli import common, inputs, machine, render, train_report
from fastprune.masks import Masks
from fastprune.pruners.registry import PRUNERS
from fastprune.training import run as runs
from fastprune.training import settings as defaults
from fastprune.training.data import Augmentation, Batch, find_dataset, load_split, order
from fastprune.training.errors import RunError, RunStopped
from fastprune.training.interrupts import Interrupts
from fastprune.training.loop import Trainer
from fastprune.training.methods import Task, method_of, refuse_unused
from fastprune.training.parts import Progress, create
from fastprune.training.ranks import World
from fastprune.training.rates import OPTIMIZERS, Rates
from fastprune.training.settings import DYNAMIC, ITERATIVE, Settings, selection

SUMMARY = "Train a network, pruned by any method; resumable at any moment to the same bits."

_METHODS = ("dense", "masks", *PRUNERS, *DYNAMIC, *ITERATIVE)
_QUOTAS = ("uniform", "uniform-plus", "erk", "smart-ratio", "igq")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``train``."""
    add = parser.add_argument
    add("--model", required=True, help="fastprune's, torchvision's or timm's name")
    add("--method", required=True, help=f"one of {','.join(_METHODS)}")
    add("--sparsity", type=_fraction, help="final fraction to prune, in [0, 1)")
    add("--data", default="digits", metavar="DIR", help="folder of the data set's files [digits]")
    add("--dataset", help=f"one of {', '.join(data.names())} [what is in DIR]")
    add("--out", type=Path, required=True, metavar="RUN", help="folder of the run")
    add("--restart", action="store_true", help="remove the run that --out holds, and begin anew")
    training = parser.add_argument_group("training (defaults: the paper's for such a network)")
    add = training.add_argument
    add("--epochs", type=common.positive_int, help="passes over the data; of each round")
    add("--batch", type=common.positive_int, help="samples per step, of all ranks together")
    add("--optimizer", choices=OPTIMIZERS, default="sgd", help="sgd has Nesterov momentum [sgd]")
    add("--lr", type=common.positive_float, help="highest learning rate")
    add("--lr-schedule", help="step:0.5,0.75x0.1, cosine, onecycle or constant")
    add("--momentum", type=_fraction, default=0.9, help="Adam: beta_1 [0.9]")
    add("--weight-decay", type=_not_negative, help="of all parameters")
    add("--augment", action=argparse.BooleanOptionalAction, help="crops and flips [small colour]")
    add("--finetune-epochs", type=_count, help="with the masks fixed [0; one-shot: a fifth]")
    add("--finetune-lr", type=common.positive_float, help="[a tenth of --lr]")
    methods = parser.add_argument_group("methods (an option that has no effect is an error)")
    add = methods.add_argument
    add("--include", metavar="NAMES", help="prune these only: names, patterns, between commas")
    add("--exclude", metavar="NAMES", help="leave these dense")
    add("--masks", type=Path, metavar="FILE", help="method masks: a masks.safetensors")
    add("--quota", choices=_QUOTAS, help="before training: sparsity of each layer")
    add("--score-batches", type=common.positive_int, help="before training: batches to score on")
    add("--scope", help="during training, in rounds: global, layer, neuron, filter")
    add("--schedule", help="during training: cubic, linear, exponential, constant")
    add("--every", type=common.positive_int, help="during training: steps between mask refreshes")
    add("--ramp-steps", type=common.positive_int, help="steps until the target [second lr decay]")
    add("--rounds", type=common.positive_int, help=f"in rounds: prunings [{defaults.ROUNDS}]")
    add("--p", type=common.positive_float, help="SAP: of the PQ index [0.5]")
    add("--q", type=common.positive_float, help="SAP: of the PQ index, above p [1]")
    add("--eta-r", type=_not_negative, help="SAP: larger prunes more [0]")
    add("--gamma", type=_not_negative, help="SAP: factor on the share that goes [1]")
    add("--beta", type=_fraction, help="SAP: the largest share that may go [0.9]")
    add(
        "--kernels",
        choices=("measured", "dense", "sparse"),
        default="measured",
        help="what masked layers run: measured may differ, and round differently, from one run to "
        "another; a run that goes on keeps its choice [measured]",
    )
    run_group = parser.add_argument_group("the run")
    add = run_group.add_argument
    add("--seed", type=common.seed, default=0, help="of weights, batches and masks [0]")
    add("--threads", type=common.positive_int, help="threads [torch's choice]")
    add("--device", choices=("cpu", "cuda"), default="cpu", help="[cpu]")
    add("--workers", type=_count, default=0, help="processes that decode images [0]")
    add("--timeout", type=common.positive_float, default=600.0, help="torchrun: seconds [600]")
    add(
        "--checkpoint-every",
        type=common.positive_int,
        metavar="STEPS",
        help="steps between checkpoints [an epoch]",
    )


def run(args: argparse.Namespace) -> int:
    """Train; see :func:`fastprune.cli.main` for the exit code.

    Raises:
        UsageError: wrong arguments, another run in ``--out``, a full disk, a lost rank.
        InterruptedRunError: after Ctrl-C; the checkpoint is written.
    """
    device = inputs.device(args.device)
    common.use_threads(args.threads)
    world = None
    try:
        world = World.join(device, args.timeout)
        return _train(args, world)
    except (RunError, OSError) as error:
        raise common.UsageError(str(error)) from error
    except RunStopped as stop:
        raise common.InterruptedRunError(str(stop)) from None
    finally:
        if world is not None:
            world.leave()


def _train(args: argparse.Namespace, world: World) -> int:
    settings = _settings(args, world)
    refuse_unused(settings)
    if settings.device == "cuda":
        torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = True, False
    root = None if settings.data is None else Path(settings.data)
    with common.usage_errors():
        train, test = (
            load_split(settings.dataset, split, root, args.workers) for split in ("train", "test")
        )
    if settings.batch > len(train) or settings.batch < world.size:
        raise RunError(f"--batch {settings.batch}: not in {world.size} .. {len(train)} samples")
    steps = len(train) // settings.batch
    with common.usage_errors((ValueError, TypeError, RuntimeError)), torch.no_grad():
        _check_network(settings)
    console = render.stdout()

    def batches(count: int, epoch: int) -> list[Batch]:
        rows = order(len(train), settings.batch, settings.seed, epoch)[:count]
        return list(train.fetch(rows))

    def scoring() -> Sequence[Batch]:
        pruning_steps = common.steps_of(settings.method)
        one_shot = settings.score_batches or defaults.ONE_SHOT_BATCHES
        found = batches(min(one_shot if pruning_steps == 1 else pruning_steps, steps), -1)
        return [(x.to(world.device), y.to(world.device)) for x, y in found]

    example = batches(1, -1)[0][0][: max(1, settings.batch // world.size)].to(world.device)
    progress = train_report.Lines(world.first)
    task = Task(settings, steps, example, scoring, _prune, world.group, progress.say)
    method = method_of(task)
    trial = create(settings)
    with common.usage_errors((ValueError, TypeError, RuntimeError)):
        method.check(
            trial, lambda: torch.optim.SGD(trial.parameters(), lr=settings.lr, momentum=0.9)
        )

    def make(interrupts: Interrupts, to: Progress, save: object) -> Trainer:
        every = args.checkpoint_every
        return Trainer(settings, train, test, world, method, interrupts, to, save, every)  # type: ignore[arg-type]

    folder = runs.Run(args.out, settings, machine.describe(world.device, torch.float32))
    with progress.epochs(sum(p.epochs for p in method.phases)):
        outcome = runs.execute(
            folder, world, make, progress, restart=args.restart, say=progress.say
        )
    if world.first:
        train_report.summary(console, settings, outcome)
    return 0


def _prune(
    model: torch.nn.Module, settings: Settings, batches: Sequence[Batch]
) -> tuple[Masks, list[str]]:
    assert settings.sparsity is not None
    with common.usage_errors((ValueError, TypeError)):
        return common.prune_at_init(
            model,
            settings.method,
            settings.sparsity,
            batches,
            F.cross_entropy,
            common.steps_of(settings.method),
            settings.seed,
            quota=settings.quota,
            include=selection(settings.include),
            exclude=selection(settings.exclude),
        )


def _check_network(settings: Settings) -> None:
    """Fails where the network does not take the data."""
    info = data.info(settings.dataset)
    model = create(settings).eval()
    logits = model(torch.zeros(2, *info.in_shape))
    if not isinstance(logits, torch.Tensor) or logits.shape != (2, info.num_classes):
        raise ValueError(f"--model {settings.model}: expected (batch, classes)")


def _settings(args: argparse.Namespace, world: World) -> Settings:
    method = _method(args.method)
    with common.usage_errors():
        if args.data == "digits":
            dataset, root = args.dataset or "digits", None
            if data.info(dataset).name != "digits":
                raise ValueError(f"--data: {dataset} needs the folder with its files")
        else:
            root = str(Path(args.data).absolute())
            dataset = args.dataset or find_dataset(Path(root))
        info = data.info(dataset)
        if info.name == "digits":
            common.require("sklearn")
        usual = defaults.recipe(args.model, info.name, method)
        lr_schedule = args.lr_schedule or usual.lr_schedule
        try:
            Rates.parse(lr_schedule)
        except ValueError as error:
            raise ValueError(f"--lr-schedule: {error}") from error
    epochs = args.epochs or usual.epochs
    tuning = defaults.finetune_epochs(method, epochs)
    lr = args.lr or usual.lr
    return Settings(
        model=args.model,
        dataset=info.name,
        data=root,
        method=method,
        sparsity=args.sparsity,
        quota=args.quota,
        scope=args.scope,
        schedule=args.schedule,
        every=args.every,
        ramp_steps=args.ramp_steps,
        rounds=args.rounds or (defaults.ROUNDS if method in ITERATIVE else None),
        score_batches=args.score_batches,
        include=args.include,
        exclude=args.exclude,
        masks=None if args.masks is None else str(args.masks.absolute()),
        p=args.p,
        q=args.q,
        eta_r=args.eta_r,
        gamma=args.gamma,
        beta=args.beta,
        kernels=args.kernels,
        optimizer=args.optimizer,
        lr=lr,
        momentum=args.momentum,
        weight_decay=usual.weight_decay if args.weight_decay is None else args.weight_decay,
        batch=args.batch or usual.batch,
        epochs=epochs,
        lr_schedule=lr_schedule,
        finetune_epochs=tuning if args.finetune_epochs is None else args.finetune_epochs,
        finetune_lr=args.finetune_lr or lr / 10,
        augment=Augmentation.usual(info) if args.augment is None else args.augment,
        seed=args.seed,
        threads=torch.get_num_threads(),
        device=args.device,
        ranks=world.size,
    )


def _method(name: str) -> str:
    def folded(text: str) -> str:
        return text.lower().replace("-", "").replace("_", "")

    by_key = {folded(known): known for known in _METHODS}
    if folded(name) not in by_key:
        raise RunError(f"--method: unknown {name!r}; known: {', '.join(_METHODS)}")
    return by_key[folded(name)]


def _fraction(text: str) -> float:
    (value,) = common.sparsities(text) if "," not in text else (None,)
    if value is None:
        raise argparse.ArgumentTypeError(f"{text!r} is not a fraction in [0, 1), such as 0.9")
    return value


def _count(text: str) -> int:
    return 0 if text == "0" else common.positive_int(text)


def _not_negative(text: str) -> float:
    return 0.0 if text == "0" else common.positive_float(text)
