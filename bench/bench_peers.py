"""Layers against other libraries: ``python -m bench.bench_peers [OPTIONS]``.

The same as ``python -m fastprune bench --peers [OPTIONS]``, whose ``--help`` lists the options.
"""

from __future__ import annotations

import sys

from fastprune.cli import main

if __name__ == "__main__":
    sys.exit(main(["bench", "--peers", *sys.argv[1:]]))
