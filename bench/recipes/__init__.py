"""The papers' tables and figures as recipes: ``python -m bench.recipes list | show | run | report``.

``tables/NAME.toml`` holds a protocol and the paper's numbers. ``recipe`` reads and checks it,
``jobs`` turns it into trainings, ``running`` runs those through ``python -m fastprune train``,
``results`` reads what they logged, ``report`` sets it beside the paper.
"""
