"""The command line: ``python -m fastprune demo``, ``train``, ``bench``, ``effective``, ...

Each subcommand is a module of this package with ``SUMMARY``, ``add_arguments(parser)`` and
``run(args) -> int``; a new one is one more name in ``COMMANDS``.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence
from typing import NoReturn

from fastprune.cli.common import InterruptedRunError, UsageError

__all__ = ["COMMANDS", "main"]

COMMANDS = ("demo", "train", "bench", "effective", "deq", "gpu-check")
"""Names of the subcommands, each a module of this package (with _ in place of -)."""

EXIT_USAGE = 2
EXIT_INTERRUPTED = 130  # 128 + SIGINT, as shells report it


class _Parser(argparse.ArgumentParser):
    """argparse, with errors on one line: the usage text would bury them."""

    def error(self, message: str) -> NoReturn:
        self.exit(EXIT_USAGE, f"{self.prog}: error: {message} (see {self.prog} --help)\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="fastprune",
        description="Neural network pruning whose speedups are measured.",
    )
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name in COMMANDS:
        command = importlib.import_module(f"fastprune.cli.{name.replace('-', '_')}")
        sub = subparsers.add_parser(name, help=command.SUMMARY, description=command.SUMMARY)
        command.add_arguments(sub)
        sub.set_defaults(run=command.run)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one subcommand.

    Args:
        argv: the arguments without the program's name; None takes ``sys.argv[1:]``.
    Returns:
        The exit code: 0; 1 if a case failed (the others are reported all the same); 2 for wrong
        arguments and missing packages or devices, with one line on stderr; 130 after Ctrl-C.
    """
    try:
        args = _parser().parse_args(argv)
    except SystemExit as stop:  # argparse has said why
        return stop.code if isinstance(stop.code, int) else EXIT_USAGE
    try:
        return int(args.run(args))
    except UsageError as error:
        print(f"fastprune {args.command}: error: {error}", file=sys.stderr)
        return EXIT_USAGE
    except InterruptedRunError as stop:
        print(f"fastprune {args.command}: interrupted: {stop}", file=sys.stderr)
        return EXIT_INTERRUPTED
    except KeyboardInterrupt:
        print(f"fastprune {args.command}: interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED
