"""One rank of the tests in test_distributed.py: ``distributed_worker.py cases|kill ...``.

Ends by os._exit after a line that says so: torch's gloo group can wait for the GIL for ever when it
is destroyed.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

import fastprune as fp
from distributed_cases import Case, case_of, filled, sharded_shape, small_or_large
from fastprune.distributed import record_traffic

MOST_BYTES = 300_000


def same(got: list[Tensor], right: list[Tensor], what: object) -> None:
    assert len(got) == len(right), what
    for i, (a, b) in enumerate(zip(got, right, strict=True)):
        assert a.dtype == torch.bool, what
        assert a.shape == b.shape, f"mask {i}: {a.shape} {b.shape} {what}"
        assert torch.equal(a, b), f"mask {i} of {what}"


def error_of(act: Callable[[], object]) -> Exception:
    try:
        act()
    except Exception as error:
        return error
    raise AssertionError("no error")


def distinct(rank: int, size: int) -> None:
    for seed in range(40):
        case = case_of(seed, small_or_large, most=6)
        owner = [random.Random(seed + 1).randrange(size) for _ in case.values]
        mine = sorted(range(len(owner)), key=lambda i: (owner[i], i))  # rank-major
        every = case.lists(mine)
        mixed = Case(
            seed,
            every["scores"],
            every["other"],
            every["within"],
            case.score,
            case.scope,
            case.k,
            every["scale"],
            every["frozen"],
        )
        own = [place for place, i in enumerate(mine) if owner[i] == rank]
        right = mixed.expected()
        with record_traffic() as traffic:
            got = fp.global_topk_mask(
                **mixed.lists(own), group=dist.group.WORLD, **case.arguments()
            )
        same(got, [right[i] for i in own], case)
        assert traffic.bytes <= MOST_BYTES, (traffic, case)
    # Scopes that concern a rank's own tensors, and filters over all ranks.
    rows = [[torch.randn(5 + r, 4), torch.randn(r, 3)] for r in range(size)]
    for scope in ("layer", "neuron"):
        got = fp.global_topk_mask(rows[rank], 0.5, scope=scope, group=dist.group.WORLD)
        same(got, fp.global_topk_mask(rows[rank], 0.5, scope=scope), scope)
    g = torch.Generator().manual_seed(5)
    rows = [[torch.randint(-2, 3, (5 + r, 4), generator=g).float()] for r in range(size)]
    right = fp.global_topk_mask([t for part in rows for t in part], 0.4, scope="filter")
    got = fp.global_topk_mask(rows[rank], 0.4, scope="filter", group=dist.group.WORLD)
    same(got, [right[rank]], "filter")


def placements_of(rnd: random.Random, dims: int, rows: bool, mesh: Any) -> list[Any]:
    from torch.distributed.tensor import Replicate, Shard

    cut = [Shard(0)] if rows else [Shard(d) for d in range(dims)]
    return [rnd.choice([*cut, *cut, Replicate()]) for _ in range(mesh.ndim)]


def sharded(rank: int, size: int) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, distribute_tensor

    meshes = [init_device_mesh("cpu", (size,))]
    if size == 4:
        meshes.append(init_device_mesh("cpu", (2, 2), mesh_dim_names=("a", "b")))
    scopes = ("global", "global", "layer", "neuron", "filter")
    for mesh in meshes:
        for seed in range(60):
            case = case_of(1000 * mesh.ndim + seed, sharded_shape, scopes=scopes)
            rnd = random.Random(seed)
            rows = case.scope in ("neuron", "filter")
            places = [placements_of(rnd, v.dim(), rows, mesh) for v in case.values]

            def spread(
                tensors: list[Tensor] | None,
                places: list[list[Any]] = places,
                mesh: Any = mesh,
            ) -> list[Tensor] | None:
                return tensors and [
                    distribute_tensor(t, mesh, p, src_data_rank=None)
                    for t, p in zip(tensors, places, strict=True)
                ]

            got = fp.global_topk_mask(
                spread(case.values),
                other=spread(case.other),
                within=spread(case.within),
                scale=case.scale,
                frozen=case.frozen,
                **case.arguments(),
            )
            right = spread(case.expected())
            for a, p in zip(got, places, strict=True):
                assert isinstance(a, DTensor)
                assert list(a.placements) == p
                assert a.device_mesh == mesh
            what = f"{case}, placements {places}"
            assert [a.shape for a in got] == [b.shape for b in right], what
            same([a.to_local() for a in got], [b.to_local() for b in right], what)
    large = torch.randn(1000, 700, generator=torch.Generator().manual_seed(0))
    from torch.distributed.tensor import Shard

    for cut in (0, 1):
        for x in (large, large.double(), torch.zeros_like(large)):
            t = distribute_tensor(x, meshes[0], [Shard(cut)], src_data_rank=None)
            with record_traffic() as traffic:
                (mask,) = fp.global_topk_mask([t], 0.3, score="magnitude")
            assert traffic.bytes <= MOST_BYTES, traffic
            (right,) = fp.global_topk_mask([x], 0.3, score="magnitude")
            assert torch.equal(mask.full_tensor(), right)


def fully_sharded(rank: int, size: int) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor

    def build() -> nn.Module:
        torch.manual_seed(3)
        return nn.Sequential(nn.Linear(7, 13), nn.ReLU(), nn.Linear(13, 5), nn.Linear(5, 1))

    x = torch.randn(4 * size, 7)
    plain = build()
    plain(x).square().mean().backward()
    shapes = [(size,)] + ([(2, 2)] if size == 4 else [])
    for shape in shapes:
        names = ("replicate", "shard")[-len(shape) :]
        model = build()
        fully_shard(model, mesh=init_device_mesh("cpu", shape, mesh_dim_names=names))
        own = x.chunk(size)[rank]
        model(own).square().mean().backward()
        weights = [p for p in model.parameters() if p.dim() > 1]
        assert all(isinstance(p, DTensor) for p in weights)
        for score in ("magnitude", "saliency"):
            grads = [p.grad for p in weights] if score == "saliency" else None
            full = [g.full_tensor() for g in grads] if grads else None
            got = fp.global_topk_mask(weights, 0.3, score=score, other=grads)
            right = fp.global_topk_mask(
                [p.full_tensor() for p in weights], 0.3, score=score, other=full
            )
            same([m.full_tensor() for m in got], right, (shape, score))


def tensor_parallel(rank: int, size: int) -> None:
    """FSDP2 over tensor parallelism: both cut dimension 0, or one each."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor.parallel import (
        ColwiseParallel,
        RowwiseParallel,
        parallelize_module,
    )

    if size != 4:
        return
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    for wide in (12, 10, 6):  # 10 and 6: uneven pieces of even ones
        torch.manual_seed(wide)
        model = nn.Sequential(nn.Linear(7, wide), nn.Linear(wide, 8))
        with torch.no_grad():
            model[0].weight.copy_(torch.randint(-3, 4, (wide, 7)))  # ties across the cuts
        plan = {"0": ColwiseParallel(), "1": RowwiseParallel()}
        parallelize_module(model, mesh["tp"], plan)
        fully_shard(model, mesh=mesh["dp"])
        weights = [model[0].weight, model[1].weight]
        assert weights[0].device_mesh.ndim == 2
        full = [p.full_tensor() for p in weights]
        for density in (0.1, 0.3, 0.5, 0.8):
            got = fp.global_topk_mask(weights, density, score="magnitude")
            right = fp.global_topk_mask(full, density, score="magnitude")
            same([m.full_tensor() for m in got], right, (wide, density, weights[0].placements))


def replicated(rank: int, size: int) -> None:
    world = dist.group.WORLD
    for seed in range(20):
        case = case_of(seed, small_or_large, scopes=("global", "layer"))
        if case.score == "magnitude":
            right = case.expected()
        elif case.other is None:
            # Integers differ by rank: their mean is exact where size is a power of two.
            case.values = [
                filled(v.shape, "integers", v.dtype, torch.Generator().manual_seed(i))
                for i, v in enumerate(case.values)
            ]
            steps = [torch.full_like(v, 1.0) for v in case.values]
            total = sum(range(size)) / size
            own = [v + rank * s for v, s in zip(case.values, steps, strict=True)]
            case.values = [
                (v.double() + total).to(
                    torch.float64 if v.dtype == torch.float64 else torch.float32
                )
                for v in case.values
            ]
            right = case.expected()
            case.values = own
        else:
            right = case.expected()
        exact = size in (1, 2, 4) or case.other is not None or case.score == "magnitude"
        got = fp.global_topk_mask(
            case.values,
            other=case.other,
            within=case.within,
            scale=case.scale,
            frozen=case.frozen,
            group=world,
            ranks="replicated",
            **case.arguments(),
        )
        if exact:
            same(got, right, case)
    w = torch.arange(1.0, 41.0).view(5, 8)
    g = [
        torch.randint(-8, 9, w.shape, generator=torch.Generator().manual_seed(r)).float()
        for r in range(size)
    ]
    mean = sum(g[1:], g[0].clone()) / size
    with record_traffic() as traffic:
        got = fp.global_topk_mask(
            [w], 0.3, score="saliency", other=[g[rank]], group=world, ranks="replicated"
        )
    same(got, fp.global_topk_mask([w], 0.3, score="saliency", other=[mean]), "mean")
    assert traffic.averaged == 4 * w.numel()
    error = error_of(
        lambda: fp.global_topk_mask(
            [w + rank], 0.3, score="magnitude", group=world, ranks="replicated"
        )
    )
    assert "scores[0]: expected the same on every rank" in str(error), error


def network() -> nn.Module:
    torch.manual_seed(11)
    return nn.Sequential(
        nn.Linear(9, 30), nn.Tanh(), nn.Linear(30, 17), nn.Tanh(), nn.Linear(17, 4)
    )


def pruners(rank: int, size: int) -> None:
    """Every method on replicated models: as one machine with the batches of all ranks."""
    from torch.distributed.fsdp import fully_shard

    world, loss = dist.group.WORLD, nn.functional.cross_entropy
    # Unlike batches: ranks with more samples count more.
    batches = [
        [(torch.randn(3 + 2 * r + b, 9), torch.randint(4, (3 + 2 * r + b,))) for b in range(1 + r)]
        for r in range(size)
    ]
    every = [batch for own in batches for batch in own]
    for method in ("magnitude", "snip", "grasp", "synflow", "force", "iter-snip", "grasp-it"):
        for among in ({"scope": "global"}, {"scope": "layer"}, {"quota": "igq"}):
            more: dict[str, Any] = {"loss": loss, "sparsity": 0.7, **among}
            if method not in ("magnitude", "snip", "grasp"):
                more["steps"] = 3
            right = fp.prune(network(), method, data=every, **more)
            got = fp.prune(network(), method, data=batches[rank], group=world, **more)
            # Sums of gradients are rounded in another order: not more than a swap or two.
            differ = sum(int((got[n] != right[n]).sum()) for n in right)
            assert differ <= 4, (method, among, differ)
            assert sum(int(m.sum()) for m in got.values()) == sum(
                int(m.sum()) for m in right.values()
            )
    masks = fp.prune(network(), "random", 0.5, group=world)  # each rank draws other noise
    assert sum(int(m.sum()) for m in masks.values()) == sum(m.numel() for m in masks.values()) // 2

    def bad_loss(output: Tensor, y: Tensor) -> Tensor:
        if rank == size - 1:
            raise ZeroDivisionError("no such loss")
        return loss(output, y)

    arguments: dict[str, Any] = {"data": batches[rank], "group": world}
    calls: list[tuple[dict[str, Any], type[Exception], str]] = [
        ({"sparsity": 0.7, "loss": bad_loss}, ZeroDivisionError, "no such loss"),
        ({"sparsity": 7 if rank == size - 1 else 0.7, "loss": loss}, ValueError, "sparsity: "),
        ({"sparsity": 0.7, "loss": None if rank == size - 1 else loss}, ValueError, "loss: "),
    ]
    for more, kind, message in calls:
        error = error_of(lambda more=more: fp.prune(network(), "snip", **more, **arguments))
        if rank == size - 1:
            assert type(error) is kind, error
        else:
            assert f"rank {size - 1} failed" in str(error), error
        assert message in str(error), error
    # DDP has averaged the gradients already.
    from torch.nn.parallel import DistributedDataParallel

    ddp = DistributedDataParallel(network())
    x, y = batches[rank][0]
    loss(ddp(x), y).backward()
    weights = [p for p in ddp.parameters() if p.dim() > 1]
    grads = [p.grad for p in weights]
    with record_traffic() as traffic:
        got = fp.global_topk_mask(
            weights, 0.3, score="saliency", other=grads, group=world, ranks="replicated"
        )
    assert traffic.averaged == 0
    same(got, fp.global_topk_mask(weights, 0.3, score="saliency", other=grads), "ddp")
    masks = fp.prune(ddp.module, "snip", 0.7, data=batches[rank], loss=loss, group=world)
    assert masks == fp.prune(network(), "snip", 0.7, data=batches[rank], loss=loss, group=world)
    # And with FSDP2, where the parameters say themselves where they are.
    model = network()
    fully_shard(model)
    for among in ({}, {"quota": "igq"}):
        sharded = fp.prune(model, "magnitude", 0.7, **among)
        right = fp.prune(network(), "magnitude", 0.7, **among)
        for name, mask in sharded.items():
            assert torch.equal(mask.full_tensor(), right[name]), (name, among)


def errors(rank: int, size: int) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Partial, Shard, distribute_tensor

    world, bad = dist.group.WORLD, size - 1
    g = torch.Generator().manual_seed(rank)
    good: dict[str, Any] = {"scores": [torch.randn(30000, generator=g)], "k": 5000, "names": ["w"]}

    def expect(change: dict[str, Any], own: tuple[type[Exception], str]) -> None:
        """The bad rank gets its own error, the others one that names it."""
        for ranks in ("distinct", "replicated"):
            arguments = good | {"group": world, "ranks": ranks}
            if ranks == "replicated":
                arguments["scores"] = [torch.arange(30000.0)]
            if rank == bad:
                arguments |= change
            error = error_of(lambda arguments=arguments: fp.global_topk_mask(**arguments))
            if rank == bad:
                assert isinstance(error, own[0]), error
                assert own[1] in str(error), error
            elif f"rank {bad} failed" not in str(error):
                assert "differ in density" in str(error) or "same on every" in str(error), error

    nan = torch.randn(30000)
    nan[77] = torch.nan
    expect({"scores": [torch.ones(3).long()]}, (TypeError, "scores[0] (w): expected dtype"))
    expect({"scores": torch.ones(3)}, (TypeError, "scores: expected a sequence"))
    expect({"within": [torch.ones(3).bool()]}, (ValueError, "within[0]: expected the shape"))
    expect({"density": 0.5}, (ValueError, "exactly one of them"))
    expect({"score": "best"}, (ValueError, "score: expected one of"))
    expect({"scope": "rows"}, (ValueError, "scope: expected one of"))
    expect({"k": 2.5}, (TypeError, "k: expected an int"))
    expect({"k": True}, (TypeError, "k: expected an int"))
    expect({"other": [nan]}, (ValueError, "other: score 'identity' does not use it"))
    scores = [nan] if rank == bad else good["scores"]
    error = error_of(lambda: fp.global_topk_mask(scores, 0.5, group=world, names=["w"]))
    own = "scores[0] (w): a candidate's score is NaN"
    assert (own if rank == bad else f"rank {bad} failed") in str(error), error
    assert isinstance(error, ValueError if rank == bad else RuntimeError)
    if rank != bad:
        assert own in str(error), error  # says what the other one said
    everywhere: list[tuple[dict[str, Any], str]] = [
        ({"k": -1}, "k: expected 0 to"),
        ({"k": 30000 * size + 1}, f"k: expected 0 to {30000 * size}, got"),
        ({"k": 5000 + rank}, "the ranks of the group differ in"),
        ({"within": [torch.arange(30000) < 10]}, f"at most the {10 * size} candidates of all"),
        ({"scores": [], "names": None}, "expected at least one tensor, got none on any rank"),
        ({"ranks": "same"}, "ranks: expected distinct or replicated"),
    ]
    for change, message in everywhere:
        error = error_of(
            lambda change=change: fp.global_topk_mask(**({**good, "group": world} | change))
        )
        assert message in str(error), error
    assert "ranks: it needs a group" in str(
        error_of(lambda: fp.global_topk_mask([nan], 0.5, ranks="replicated"))
    )
    error = error_of(lambda: fp.global_topk_mask([nan], 0.5, group="world"))
    assert "expected a torch.distributed process group" in str(error), error
    mesh = init_device_mesh("cpu", (size,))
    whole, half = torch.ones(8, 8), DTensor.from_local(torch.ones(8, 8), mesh, [Shard(0)])
    part = DTensor.from_local(whole, mesh, [Partial()])
    cases: list[tuple[dict[str, Any], str]] = [
        ({"scores": [half, part]}, "scores[1]: expected placements Shard and Replicate, got"),
        ({"scores": [half, whole]}, "scores[1]: expected a DTensor"),
        ({"scores": [half], "within": [half.full_tensor() > 0]}, "within[0]: expected a DTensor"),
        ({"scores": [half], "group": world}, "leave both out"),
        (
            {
                "scores": [half],
                "score": "product",
                "other": [distribute_tensor(torch.ones(8 * size, 8), mesh, [Shard(1)])],
            },
            "other[0]: expected the placements",
        ),
        (
            {"scores": [DTensor.from_local(whole, mesh, [Shard(1)])], "scope": "filter"},
            "scores[0]: expected whole rows",
        ),
    ]
    for change, message in cases:
        error = error_of(lambda change=change: fp.global_topk_mask(k=3, **change))
        assert message in str(error), error
    refused: list[tuple[dict[str, Any], str]] = [
        ({"score": "lamp"}, "score: expected one of identity"),
        ({"score": "noise", "seed": 3}, "score: expected one of identity"),
        ({"min_per_tensor": 1}, "min_per_tensor: expected 0"),
        ({"packed": True, "scores": [half]}, "packed: expected False with DTensors"),
        ({"frozen": [True, False]}, "frozen: expected 1 bools"),
        ({"frozen": [True], "k": 3}, f"at least the {9 * size} units of frozen tensors"),
    ]
    for change, message in refused:
        arguments = {"scores": [torch.ones(9)], "k": 3, "group": world} | change
        if "packed" in change:
            del arguments["group"]
        error = error_of(lambda arguments=arguments: fp.global_topk_mask(**arguments))
        assert message in str(error), error
    # What concerns a rank's own tensors, or the same ones on all, may be all that one machine does.
    x = torch.arange(24.0).view(4, 6) - 9
    for more in (
        {"score": "lamp"},
        {"score": "noise", "seed": 5},
        {"min_per_tensor": 2},
        {"packed": True},
    ):
        got = fp.global_topk_mask([x, 2 * x], k=7, group=world, ranks="replicated", **more)
        right = fp.global_topk_mask([x, 2 * x], k=7, **more)
        assert all(torch.equal(a, b) for a, b in zip(got, right, strict=True)), more
    got = fp.global_topk_mask([x], k=7, group=world, packed=True)
    right = fp.global_topk_mask([x] * size, k=7, packed=True)
    assert torch.equal(got[0], right[rank])
    # After all these errors the group still works.
    assert int(fp.global_topk_mask([torch.ones(9)], k=3, group=world)[0].sum()) == (
        3 if rank == 0 else 0
    )


def subgroup(rank: int, size: int) -> None:
    """Global and group ranks differ."""
    group = dist.new_group(list(range(1, size)))
    if rank == 0:
        error = error_of(lambda: fp.global_topk_mask([torch.ones(3)], k=2, group=group))
        assert "this rank is not in it" in str(error), error
        return
    k = min(4, 3 * (size - 1))
    got = fp.global_topk_mask([torch.ones(3)], k=k, group=group)
    kept = min(max(k - 3 * (rank - 1), 0), 3)
    assert got[0].tolist() == [i < kept for i in range(3)]


def run_cases() -> None:
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    torch.set_num_threads(1)
    rank, size = dist.get_rank(), dist.get_world_size()
    for part in (
        distinct,
        sharded,
        fully_sharded,
        tensor_parallel,
        replicated,
        pruners,
        errors,
        subgroup,
    ):
        began = time.perf_counter()
        part(rank, size)
        dist.barrier()
        if rank == 0:
            print(f"{part.__name__} {time.perf_counter() - began:.1f} s", flush=True)


def run_kill(rank: int, size: int, store: str, how: str, at: int) -> None:
    """The last rank dies, or stays away, in its at-th collective: the others raise."""
    from fastprune.distributed.link import ProcessGroups

    timeout = timedelta(seconds=3 if how == "sleep" else 30)
    dist.init_process_group(
        "gloo", init_method="file://" + store, rank=rank, world_size=size, timeout=timeout
    )
    dist.barrier()
    count = 0
    real = ProcessGroups.all_reduce

    def counted(self: ProcessGroups, tensor: Tensor, reduction: Any) -> None:
        nonlocal count
        count += 1
        if rank == size - 1 and count == at:
            if how == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            time.sleep(60)
        real(self, tensor, reduction)

    ProcessGroups.all_reduce = counted  # type: ignore[method-assign]
    x = torch.randn(50000, generator=torch.Generator().manual_seed(rank))
    began = time.perf_counter()
    error = error_of(lambda: fp.global_topk_mask([x], 0.3, group=dist.group.WORLD))
    took = time.perf_counter() - began
    assert isinstance(error, RuntimeError), error
    assert "a collective failed on rank" in str(error), error
    assert took < 20, took


if __name__ == "__main__":
    if sys.argv[1] == "cases":
        run_cases()
    else:
        run_kill(int(sys.argv[2]), int(sys.argv[3]), sys.argv[4], sys.argv[5], int(sys.argv[6]))
    print("passed", flush=True)
    os._exit(0)
