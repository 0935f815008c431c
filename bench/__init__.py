"""Benchmarks: one module per op, run by ``python -m bench``. Every table has its own baseline."""
