"""What CUDA takes of a build: ``python cmake/cuda_build_time.py [--limit SECONDS] [LOG ...]``.

From ninja's log, which has every command's start and end. A moment in which n commands ran counts
1/n towards each of them, so the sum over the CUDA sources and their torch sides is the time that
they alone would have kept the same cores busy. Exit status 1 above the limit.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from pathlib import Path


def shares(log: str) -> dict[str, float]:
    """Output of a command -> its share of the seconds, the last time that it ran; CUDA's only."""
    found: dict[str, float] = {}
    for run in _runs(log):
        edges = sorted({edge for begin, end, _ in run for edge in (begin, end)})
        here = dict.fromkeys((output for _, _, output in run), 0.0)
        for low, high in itertools.pairwise(edges):
            active = [output for begin, end, output in run if begin <= low and high <= end]
            for output in active:
                here[output] += (high - low) / len(active) / 1000
        found |= {output: took for output, took in here.items() if "fastprune_cuda" in output}
    return found


def _runs(log: str) -> list[list[tuple[int, int, str]]]:
    """(start, end, output) in milliseconds, by call of ninja: ends grow within a call."""
    runs: list[list[tuple[int, int, str]]] = [[]]
    for line in log.splitlines():
        fields = line.split("\t")
        if len(fields) != 5:
            continue
        begin, end = int(fields[0]), int(fields[1])
        if runs[-1] and end < runs[-1][-1][1]:
            runs.append([])
        runs[-1].append((begin, end, fields[3]))
    return runs


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--limit", type=float, default=300.0, help="seconds [300]")
    parser.add_argument("log", nargs="*", type=Path, help="ninja logs [build/*/.ninja_log]")
    args = parser.parse_args()
    took: dict[str, float] = {}
    for path in args.log or Path("build").glob("*/.ninja_log"):
        took |= shares(path.read_text(encoding="utf-8"))
    if not took:
        print("CUDA: nothing was built")
        return 0
    for output, seconds in sorted(took.items(), key=lambda item: -item[1])[:10]:
        print(f"{seconds:7.1f} s  {output.partition('.dir/')[2]}")
    total = sum(took.values())
    print(f"CUDA, {len(took)} sources: {total:.0f} s of the build, limit {args.limit:.0f} s")
    return 0 if total <= args.limit else 1


if __name__ == "__main__":
    sys.exit(main())
