"""Selection over many ranks: processes over gloo, and the same driver on threads of this one."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import fastprune as fp
from conftest import runnable_isas
from distributed_cases import Case, case_of, small_or_large
from fastprune.distributed import ThreadRank, Traffic, link, on_threads, record_traffic, selection
from fastprune.distributed.digest import digest
from fastprune.distributed.layout import box_of
from fastprune.distributed.parts import EmptyPart, Inputs, NativePart, TorchPart

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="torch without distributed")
HERE = Path(__file__).resolve().parent
WORKER = str(HERE / "distributed_worker.py")
MOST_BYTES = 300_000


@pytest.fixture(autouse=True)
def _two_threads_at_most(threads: None) -> None:
    """Ranks that are threads already fill the processor; cuts are tested apart."""
    torch.set_num_threads(1)


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE)}


@pytest.mark.parametrize("size", [2, 3, 4])
def test_ranks_in_processes(size: int) -> None:
    """Random cases, layouts, errors: everything in tests/distributed_worker.py."""
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={size}"]
    run = subprocess.run(
        [*command, "--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0", WORKER, "cases"],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        env=environment(),
    )
    assert run.stdout.count("passed") == size, run.stdout + run.stderr[-6000:]
    assert run.returncode == 0


@pytest.mark.parametrize(("how", "at"), [("kill", 1), ("kill", 4), ("sleep", 3)])
def test_a_rank_that_dies_or_stays_away_is_an_error(how: str, at: int, tmp_path: Path) -> None:
    """The survivors raise within the timeout, and have no masks."""
    ranks = [
        subprocess.Popen(
            [sys.executable, WORKER, "kill", str(r), "3", str(tmp_path / "store"), how, str(at)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment(),
        )
        for r in range(3)
    ]
    try:
        for survivor in ranks[:2]:
            out, err = survivor.communicate(timeout=120)
            assert out == "passed\n", err
        if how == "kill":
            assert ranks[2].wait(timeout=60) == -signal.SIGKILL
    finally:
        for r in ranks:
            r.kill()
            r.communicate()


def together(size: int, work: Any) -> list[Any]:
    """What ``work(rank)`` returned on every thread."""
    results = on_threads(size, work)
    for r in results:
        if isinstance(r, BaseException):
            raise r
    return results


def spread(case: Case, owner: list[int], rank: int) -> dict[str, Any]:
    """One rank's arguments."""
    own = [i for i, o in enumerate(owner) if o == rank]

    return {**case.lists(own), **case.arguments()}


@pytest.mark.parametrize("isa", runnable_isas(), indirect=True)
def test_threads_as_ranks(isa: str) -> None:
    for seed in range(100, 160):
        case, rnd = case_of(seed, small_or_large, most=7), random.Random(seed)
        size = rnd.randint(1, 5)
        owner = sorted(rnd.randrange(size) for _ in case.values)

        def work(rank: ThreadRank, case: Case = case, owner: list[int] = owner) -> Any:
            with record_traffic() as traffic:
                masks = fp.global_topk_mask(**spread(case, owner, rank.rank), group=rank)
            return masks, traffic

        results = together(size, work)
        got = [mask for masks, _ in results for mask in masks]
        assert all(torch.equal(a, b) for a, b in zip(got, case.expected(), strict=True)), case
        traffic: Traffic = results[0][1]
        assert traffic.bytes <= MOST_BYTES, (traffic, case)
        assert all(t == traffic for _, t in results)


def test_plain_torch_as_on_other_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    """The passes that run where there are no kernels, ranked by the same driver."""

    def plain(self: Inputs) -> Any:
        filled = [i for i, v in enumerate(self.values) if v.numel()]
        return TorchPart(self.chosen(filled)) if filled else EmptyPart()

    monkeypatch.setattr(Inputs, "part", plain)
    for seed in range(300, 330):
        case, rnd = case_of(seed, small_or_large, most=5), random.Random(seed)
        size = rnd.randint(1, 3)
        owner = sorted(rnd.randrange(size) for _ in case.values)

        def work(rank: ThreadRank, case: Case = case, owner: list[int] = owner) -> Any:
            return fp.global_topk_mask(**spread(case, owner, rank.rank), group=rank)

        got = [mask for masks in together(size, work) for mask in masks]
        assert all(torch.equal(a, b) for a, b in zip(got, case.expected(), strict=True)), case


@pytest.mark.skipif(not (HERE.parent / "bench").is_dir(), reason="no bench beside the tests")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_the_table_sends_what_a_selection_sends(dtype: torch.dtype) -> None:
    """The figures of the README: real weights take as many rounds, or one more or less."""
    sys.path.insert(0, str(HERE.parent))
    try:
        from bench.bench_distributed import simulated
    finally:
        sys.path.pop(0)
    x = torch.randn(4, 500_000, generator=torch.Generator().manual_seed(1)).to(dtype)

    def work(rank: ThreadRank) -> Traffic:
        with record_traffic() as traffic:
            fp.global_topk_mask([x[rank.rank]], 0.1, score="magnitude", group=rank)
        return traffic

    real, (table, _, _) = together(4, work)[0], simulated(x.numel(), 4, dtype, True)
    assert abs(real.rounds - table.rounds) <= 2, (real, table)
    assert abs(real.bytes - table.bytes) <= 2 * 17_000, (real, table)
    for n in (7 * 10**9, 10**12):
        for size in (8, 4096):
            for distinct in (True, False):
                traffic, _, _ = simulated(n, size, dtype, distinct)
                assert traffic.bytes <= MOST_BYTES


def test_samples_that_mislead_and_candidates_that_crowd(monkeypatch: pytest.MonkeyPatch) -> None:
    """Brackets that miss are replaced by exact ones; a rank makes room for what it finds."""
    x = torch.full((400_000,), 5.0)
    x[1000:1700] = torch.linspace(1, 2, 700)
    within = torch.zeros(x.shape, dtype=torch.bool)
    within[900:2000] = True
    crowd = torch.cat([torch.zeros(300_000), torch.linspace(1, 1.001, 50_000)])
    for values, allowed, counts in (
        (x, within, (1, 399, 400, 401, 750, 1099, 1100)),
        (crowd, None, (1, 24_999, 49_999, 50_000, 50_001, 200_000)),
    ):
        pieces = values.split([250_000, values.numel() - 250_000])
        allowed_pieces = None if allowed is None else allowed.split([250_000, 150_000])
        for k in counts:

            def work(
                rank: ThreadRank, pieces: Any = pieces, allowed: Any = allowed_pieces, k: int = k
            ) -> Tensor:
                return fp.global_topk_mask(
                    [pieces[rank.rank]],
                    k=k,
                    within=None if allowed is None else [allowed[rank.rank]],
                    group=rank,
                )[0]

            got = torch.cat(together(2, work))
            right = fp.global_topk_mask(
                [values], k=k, within=None if allowed is None else [allowed]
            )[0]
            assert torch.equal(got, right), k

    # A bracket below, above or beside the threshold, whatever the sample said.
    def wrong(p: selection.Problem) -> Any:
        yield selection.Request(0, lambda: None)
        return wrong_bounds, 10

    monkeypatch.setattr(selection, "_guess", wrong)
    y = torch.randn(200_000, generator=torch.Generator().manual_seed(0))
    y[::7] = 1.25
    one, two = (int(torch.tensor(v).view(torch.int32)) for v in (1.25, 2.0))
    for wrong_bounds in (
        (two + 9, two + 9, two, two),
        (two + 9, two, two - 1, two - 2),
        (9, 9, 1, 1),
        (one, one - 1, one - 1, one - 1),
        (one + 5, one + 5, one, one - 1),
    ):
        for k in (10, 2000, 15_000, 40_000, 150_000):
            halves = y.split([150_000, 50_000])

            def part(rank: ThreadRank, halves: Any = halves, k: int = k) -> Tensor:
                return fp.global_topk_mask([halves[rank.rank]], k=k, group=rank)[0]

            got = torch.cat(together(2, part))
            assert torch.equal(got, fp.global_topk_mask([y], k=k)[0]), (wrong_bounds, k)


def inputs_of(case: Case, wide: bool) -> Inputs:
    boxes, base = [], 0
    for v in case.values:
        boxes.append(box_of(base, v.shape, [0] * v.dim(), v.shape))
        base += 3 * v.numel()  # as if two other ranks' parts followed
    masks = [torch.zeros(v.shape, dtype=torch.bool) for v in case.values]
    labels = [f"[{i}]" for i in range(len(masks))]
    other, within, scale = case.other or [], case.within or [], case.scale or []
    return Inputs(case.values, other, within, masks, boxes, labels, scale, case.score, wide)


@pytest.mark.parametrize("isa", runnable_isas(), indirect=True)
def test_the_local_passes_against_plain_torch(isa: str) -> None:
    for seed in range(60):
        case, rnd = case_of(seed, small_or_large), random.Random(seed)
        every = case.lists([i for i, v in enumerate(case.values) if v.numel()])
        case.values, case.other = every["scores"], every["other"]
        case.within, case.scale = every["within"], every["scale"]
        wide = any(v.dtype == torch.float64 for v in case.values) or rnd.random() < 0.3
        if not case.values:
            continue
        ours, plain = inputs_of(case, wide), inputs_of(case, wide)
        a, b = NativePart(ours), TorchPart(plain)
        keys = sorted(b._all_keys().tolist())
        lowest = -(2**63) if wide else -(2**31)
        real = [key for key in keys if key > lowest] or [0]
        lo, hi = sorted(rnd.choice(real) for _ in range(2))
        assert torch.equal(a.histogram(lo, hi), b.histogram(lo, hi)), case
        assert a.sample(0).numel() == 0
        assert set(a.sample(50).tolist()) <= set(real)
        for top, bottom in ((0, 0), (1, 1)):
            bounds = [hi, hi - top, max(lo - 1 + bottom, lowest), lo - 1]
            if not bounds[0] >= bounds[1] >= bounds[2] >= bounds[3] >= lowest:
                continue
            counts = a.filter(bounds, rnd.choice([0, 10**6]))
            assert counts == b.filter(bounds, 0), case
            assert a.inside_histogram(bounds[2] + 1, hi).sum() == counts[2]
            for members, key in (("top", hi), ("inside", rnd.choice(real)), ("bottom", lo)):
                if members != "inside" and counts[1 if members == "top" else 3] == 0:
                    continue
                if members == "inside" and not bounds[2] < key <= bounds[1]:
                    continue
                ties = a.count_ties(members, key)
                assert ties == b.count_ties(members, key)
                for low, shift in ((0, 0), (0, 9), (100, 3), (0, 18)):
                    got = a.tie_bins(members, key, low, shift)
                    assert torch.equal(got, b.tie_bins(members, key, low, shift)), case
                kept = rnd.randint(0, ties)
                for part in (a, b):
                    if members == "inside":
                        part.accept(key, kept)
                    else:
                        part.settle(members, key, kept)
                for x, y in zip(ours.masks, plain.masks, strict=True):
                    assert torch.equal(x, y), (case, members)


def test_same_bits_for_any_number_of_threads() -> None:
    x = torch.randint(-40, 40, (3, 90_000), generator=torch.Generator().manual_seed(1)).float()
    right = fp.global_topk_mask([*x], k=70_001, score="magnitude")
    for n in (1, 2, 3, 7):

        def work(rank: ThreadRank, n: int = n) -> list[Tensor]:
            torch.set_num_threads(n)
            return fp.global_topk_mask([x[rank.rank]], k=70_001, score="magnitude", group=rank)

        got = [mask for masks in together(3, work) for mask in masks]
        assert all(torch.equal(a, b) for a, b in zip(got, right, strict=True)), n


def test_bins_hold_the_whole_range_of_keys() -> None:
    keys = torch.tensor([-(2**63) + 1, -5, -1, 0, 1, 2**62, 2**63 - 2])
    lo, hi = -(2**63) + 1, 2**63 - 1
    shift = selection.shift_of(lo, hi)
    right = torch.zeros(selection.BINS, dtype=torch.int64)
    for key in keys.tolist():
        right[(key - lo) >> shift] += 1
    assert torch.equal(selection.bins_of(keys, lo, hi), right)
    assert torch.equal(selection.bins_by_torch(keys, lo, hi), right)


def test_one_rank_fails_and_all_raise() -> None:
    """Out of memory, or whatever else: the failing rank raises its own, no masks anywhere."""
    x = torch.randn(60_000)
    real = NativePart.filter

    def broken(self: NativePart, bounds: Any, capacity: int) -> list[int]:
        if self.elements == 19_999:
            raise MemoryError("no room")
        return real(self, bounds, capacity)

    NativePart.filter = broken  # type: ignore[method-assign]
    try:
        pieces = x.split([20_000, 19_999, 20_001])
        results = on_threads(3, lambda r: fp.global_topk_mask([pieces[r.rank]], 0.5, group=r))
    finally:
        NativePart.filter = real  # type: ignore[method-assign]
    assert isinstance(results[1], MemoryError)
    for r in (results[0], results[2]):
        assert isinstance(r, RuntimeError)
        assert "rank 1 failed, so no rank has masks: MemoryError: no room" in str(r)


def test_a_rank_that_leaves_is_an_error() -> None:
    def work(rank: ThreadRank) -> Any:
        if rank.rank == 1:
            raise KeyboardInterrupt
        return fp.global_topk_mask([torch.ones(5)], 0.5, group=rank)

    results = on_threads(2, work, timeout=0.5)
    assert isinstance(results[0], RuntimeError)
    assert "a collective failed on rank 0 of 2" in str(results[0])


def test_several_failing_ranks_are_counted() -> None:
    def work(rank: ThreadRank) -> Any:
        x = torch.ones(5)
        if rank.rank > 0:
            x = x * torch.nan
        return fp.global_topk_mask([x], 0.5, group=rank)

    results = on_threads(3, work)
    assert "rank 1 (and 1 more) failed" in str(results[0])
    assert all(isinstance(r, ValueError) and "NaN" in str(r) for r in results[1:])


def test_layers_share_their_rounds() -> None:
    """One more layer is more bytes, not more rounds."""
    rounds = []
    for layers in (1, 6):
        x = [torch.randn(30_000, generator=torch.Generator().manual_seed(9))] * layers
        mine = link.Link(ThreadRank(0, _alone()))
        problems = [
            selection.Problem(
                inputs_of(Case(0, [v], None, None, "magnitude", "layer", 0), False).part(),
                inputs_of(Case(0, [], None, None, "magnitude", "layer", 0), False).part(),
                3_000,
                30_000,
                30_000,
                30_000,
                False,
                30_000,
                1,
            )
            for v in x
        ]
        with record_traffic() as traffic:
            selection.run(mine, [selection.select(p) for p in problems])
        rounds.append(traffic.rounds)
    assert rounds[0] == rounds[1]


def _alone() -> Any:
    from fastprune.distributed.threads import _Shared

    return _Shared(1, 5.0)


def test_digests_see_every_word() -> None:
    g = torch.Generator().manual_seed(0)
    for n in (0, 1, 7, 8, 9, 65536 * 8, 65536 * 8 + 3, 5_000_000):
        x = torch.rand(n, generator=g) < 0.5
        before = digest(x)
        assert before == digest(x.clone())
        for i in {0, n // 2, n - 1} if n else ():
            y = x.clone()
            y[i] = ~y[i]
            assert digest(y) != before, (n, i)
    x = torch.rand(100, generator=g)
    assert digest(x[3:]) == digest(x[3:].clone())


def test_boxes() -> None:
    whole = torch.arange(3 * 5 * 7 * 2).view(3, 5, 7, 2)
    for offset, shape in (
        ((0, 0, 0, 0), (3, 5, 7, 2)),
        ((1, 0, 0, 0), (2, 5, 7, 2)),
        ((0, 2, 0, 0), (3, 2, 7, 2)),
        ((1, 1, 1, 1), (2, 3, 4, 1)),
        ((0, 0, 6, 0), (3, 5, 1, 2)),
    ):
        ends = zip(offset, shape, strict=True)
        part = whole[tuple(slice(o, o + s) for o, s in ends)].flatten()
        box = box_of(1000, whole.shape, offset, shape)
        assert torch.equal(box.indices(torch.arange(part.numel())), part + 1000)
