"""Peers: what else multiplies by a pruned weight, timed against fastprune on the same operands.

``python -m fastprune bench --peers`` is the command. ``layers`` holds the shapes, ``masks`` how
the weights are pruned, ``candidates`` and ``libraries`` one small class per peer, ``roofline`` the
floor that the machine sets, ``compare`` the check and the timing, ``summary`` the means.
Optional packages are imported only when a peer needs them.
"""
