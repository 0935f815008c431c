"""One run of some sections: ``python -m bench.cuda --out FILE [--seconds S] [SECTION ...]``.

Appends a line of JSON per row to FILE, as soon as the row is finished: a run that is stopped keeps
what it has. ``python -m fastprune gpu-check`` starts this, and makes the report.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch

from bench.cuda import convolutions, equilibria, forms, products, selection, weight_gradients
from bench.cuda.clock import Clock, CudaClock, LostDeviceError, reason
from bench.cuda.session import Session

# name -> function, share of the time, seconds per candidate; what matters most comes first.
SECTIONS = {
    "roofline": (forms.roofline, 1.0, 0.3),
    "batch_1": (products.batch_1, 2.0, 0.1),
    "small_batch": (products.small_batch, 2.5, 0.05),
    "selection": (selection.selection, 2.0, 0.1),
    "float32": (products.float32, 2.0, 0.05),
    "large_batch": (products.large_batch, 2.0, 0.05),
    "convolutions": (convolutions.convolutions, 3.0, 0.03),
    "gradients": (convolutions.gradients, 2.0, 0.03),
    "weight_gradients": (weight_gradients.weight_gradients, 1.0, 0.03),
    "equilibria": (equilibria.equilibria, 1.0, 0.05),
    "packing": (forms.packing, 1.0, 0.3),
    "forms": (forms.forms, 4.0, 0.01),
}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.cuda", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, metavar="FILE")
    parser.add_argument("--seconds", type=float, default=180.0, help="for all sections [180]")
    parser.add_argument("--dry-run", action="store_true", help="tiny shapes on the CPU, no claims")
    parser.add_argument("sections", nargs="*", metavar="SECTION", help=", ".join(SECTIONS))
    args = parser.parse_args()
    chosen = args.sections or list(SECTIONS)
    if unknown := [name for name in chosen if name not in SECTIONS]:
        parser.error(f"unknown sections: {', '.join(unknown)}")
    end = time.monotonic() + args.seconds
    clock = Clock() if args.dry_run else CudaClock()
    with args.out.open("a", encoding="utf-8") as file, torch.no_grad():

        def emit(line: dict[str, Any]) -> None:
            file.write(json.dumps(line) + "\n")
            file.flush()

        emit({"sections": chosen})
        for at, name in enumerate(chosen):
            run, share, seconds = SECTIONS[name]
            emit({"begin": name})
            began = time.monotonic()
            rest = sum(SECTIONS[other][1] for other in chosen[at:])
            deadline = began + (end - began) * share / rest
            error = None
            try:
                run(Session(clock, emit, deadline, seconds, name))
            except LostDeviceError as lost:
                emit({"end": name, "error": reason(lost), "seconds": time.monotonic() - began})
                os._exit(3)  # destructors would only meet the lost context again
            except Exception as problem:  # the other sections are wanted all the same
                error = reason(problem)
            emit({"end": name, "error": error, "seconds": time.monotonic() - began})
            clock.release()
    return 0


if __name__ == "__main__":
    sys.exit(main())
