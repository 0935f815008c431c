"""What the CUDA part of the last build took: ``python cmake/cuda_build_time.py [--limit SECONDS]``.

From ninja's log, which has every command's start and end: the sum over the CUDA sources and their
torch sides, spread over two cores. Commands that ran beside others took longer for it, so this is
rather too much than too little. Exit status 1 above the limit.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

CORES = 2


def durations(log: str) -> dict[str, float]:
    """Output of a command -> its seconds, the last time that it ran; CUDA's only."""
    found = {}
    for line in log.splitlines():
        fields = line.split("\t")
        if len(fields) == 5 and "fastprune_cuda" in fields[3]:
            found[fields[3]] = (int(fields[1]) - int(fields[0])) / 1000
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--limit", type=float, default=300.0, help="seconds [300]")
    parser.add_argument("log", nargs="*", type=Path, help="ninja logs [build/*/.ninja_log]")
    args = parser.parse_args()
    took: dict[str, float] = {}
    for path in args.log or Path("build").glob("*/.ninja_log"):
        took |= durations(path.read_text(encoding="utf-8"))
    if not took:
        print("CUDA: nothing was built")
        return 0
    for output, seconds in sorted(took.items(), key=lambda item: -item[1])[:10]:
        print(f"{seconds:7.1f} s  {output.partition('.dir/')[2]}")
    total = sum(took.values()) / CORES
    print(f"CUDA, {len(took)} sources on {CORES} cores: {total:.0f} s, limit {args.limit:.0f} s")
    return 0 if total <= args.limit else 1


if __name__ == "__main__":
    sys.exit(main())
