"""The `qalora` command: one file a subcommand, each with `add_parser(subparsers)`."""

import argparse
import importlib
import os
import sys
from collections.abc import Sequence

from qalora_plugin.errors import QALoRAError

COMMANDS = ("quickstart", "quantize", "merge", "verify", "export", "push", "inspect", "plan")


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of `qalora` with all its subcommands."""
    parser = argparse.ArgumentParser(
        prog="qalora",
        description="QA-LoRA: quantize a base, train an adapter, merge it exactly, ship INT-n.",
        epilog="`qalora COMMAND --help` tells about one command; `qalora quickstart` shows the "
        "whole way on an embedded model.",
    )
    parser.add_argument("--version", action="store_true", help="print the version and exit")
    subparsers = parser.add_subparsers(title="commands", metavar="COMMAND")
    for name in COMMANDS:
        importlib.import_module(f".{name}", __name__).add_parser(subparsers)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; return 0, 1 for an error in the input, 2 for wrong usage, 130 for Ctrl-C."""
    parser = build_parser()
    args = parser.parse_args(argv)
    if args.version:
        from qalora_plugin._version import __version__

        print(__version__)
        return 0
    if not hasattr(args, "func"):
        parser.print_help(sys.stderr)
        return 2
    try:
        return int(args.func(args) or 0)
    except QALoRAError as error:
        if os.environ.get("QALORA_TRACEBACK"):
            raise
        print(f"qalora: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("qalora: interrupted", file=sys.stderr)
        return 130
