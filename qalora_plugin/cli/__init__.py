"""The `qalora` command: one file a subcommand, each with `add_parser(subparsers)`."""

import argparse
import importlib
import json
import os
import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import qalora_plugin
from qalora_plugin.errors import QALoRAError

from .parser import Parser, PrintCompletion
from .say import say

_FILES_ONLY = ("inspect", "push")
"""Commands that load no model, and need neither transformers nor PEFT to know us."""

COMMANDS = (
    "quickstart",
    "quantize",
    "import",
    "merge",
    "verify",
    "eval",
    "export",
    "push",
    "inspect",
    "report",
    "plan",
)


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of `qalora` with all its subcommands."""
    parser = Parser(
        prog="qalora",
        description="QA-LoRA: quantize a base, train an adapter, merge it exactly, ship INT-n.",
        epilog="The way: `quantize` a 16-bit model, or `import` a quantized one; train on it with "
        "PEFT, TRL or Axolotl; `merge`, `verify`, `export`. `qalora COMMAND --help` tells about "
        "one command; `qalora quickstart` shows the whole way on a small language model.",
    )
    parser.add_argument("--version", action="store_true", help="print the version and exit")
    about = "print a script that completes commands and options in a shell, and exit"
    parser.add_argument("--print-completion", action=PrintCompletion, help=about)
    subparsers = parser.add_subparsers(title="commands", metavar="COMMAND", dest="command")
    for name in COMMANDS:
        importlib.import_module(f".{name}", __name__).add_parser(subparsers)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; return 0, 1 for an error in the input, 2 for wrong usage, 130 for Ctrl-C."""
    parser = build_parser()
    args = parser.parse_args(argv)
    if args.version:
        from qalora_plugin._version import __version__

        say(__version__)
        return 0
    if not hasattr(args, "func"):
        parser.print_help(sys.stderr)
        return 2
    try:
        if args.command not in _FILES_ONLY:
            qalora_plugin.register()
        with _hash_checks(args):
            return int(args.func(args) or 0)
    except (QALoRAError, PermissionError) as error:
        if os.environ.get("QALORA_TRACEBACK"):
            raise
        message = str(error)
        if isinstance(error, PermissionError) and error.filename is not None:
            message = f"{error.filename}: {error.strerror}. Name another place, or ask its owner."
        say(f"qalora: error: {message}", file=sys.stderr)
        if getattr(args, "json", False):
            say(json.dumps({"error": type(error).__name__, "message": message}))
        return 1
    except KeyboardInterrupt:
        say("qalora: interrupted", file=sys.stderr)
        return 130


def _hash_checks(args: argparse.Namespace) -> AbstractContextManager[None]:
    """Return the context that --no-hash-check asks for."""
    if not getattr(args, "no_hash_check", False):
        return nullcontext()
    from qalora_plugin.files.manifest import unchecked_hashes

    return unchecked_hashes()
