"""`qalora import`: convert a quantized base in a foreign format to our own."""

import argparse
import dataclasses
import json
from typing import Any

from ..files.progress import progress_bar
from .say import say


def add_parser(subparsers: Any) -> None:
    """Add the subcommand."""
    parser = subparsers.add_parser(
        "import",
        help="make a base of a file that is quantized already",
        description="Convert a base in a foreign format to our own: the same integers, scales and "
        "offsets, a few layers in memory, nothing rounded. The result remembers the source and its "
        "hash: what is merged into it is written back into a copy of the source with `qalora "
        "export MERGED --format original`.",
    )
    add = parser.add_argument
    add("source", help="the quantized model: a directory, a file, or a Hub id")
    add("--out", required=True, metavar="DIR", help="directory to make")
    add("--revision", help="branch, tag or commit of the Hub repository")
    add("--json", action="store_true", help="print the result as JSON on stdout")
    parser.set_defaults(func=main)


def main(args: argparse.Namespace) -> int:
    """Run it; progress goes to stderr, the result to stdout."""
    from ..checkpoint.convert import import_model

    with progress_bar("importing", "tensor") as progress:
        result = import_model(args.source, args.out, revision=args.revision, progress=progress)
    if args.json:
        say(json.dumps(dataclasses.asdict(result), default=str))
        return 0
    say(f"{result.out}: {result.layers} layers of a {result.format} model, nothing rounded")
    frozen = {mode: len(names) for mode, names in result.source["frozen"].items()}
    taken = [mode for mode in ("zeros", "scales", "both") if mode not in frozen]
    say(f"written back with --format original: adapt {', '.join(taken) or 'none'}")
    return 0
