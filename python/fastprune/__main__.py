"""``python -m fastprune``: see :mod:`fastprune.cli`."""

from __future__ import annotations

import sys

from fastprune.cli import main

if __name__ == "__main__":
    sys.exit(main())
