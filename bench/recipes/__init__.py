"""The papers' tables and figures as recipes; see ``python -m bench.recipes --help``.

``tables/NAME.toml`` holds a protocol and the paper's numbers. ``recipe`` reads and checks it,
``jobs`` turns it into trainings, ``running`` runs those through ``python -m fastprune train``,
``results`` reads what they logged, ``report`` sets it beside the paper.
"""
