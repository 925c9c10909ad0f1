"""`qalora report`: a run as one HTML page."""

import argparse
from pathlib import Path
from typing import Any

from .say import say


def add_parser(subparsers: Any) -> None:
    """Add the subcommand."""
    parser = subparsers.add_parser(
        "report",
        help="write one HTML page about a run: losses, changes, proof, sizes, commands",
        description="Write report.html and report.json into the directory of a run: loss curves, "
        "what training changed in each layer, the proof of the merge, sizes, and the commands that "
        "run the result. The page needs no network.",
    )
    add = parser.add_argument
    add("run", type=Path, metavar="RUN_DIR", help="output_dir of a training, or of a quickstart")
    add("--merged", type=Path, help="the merged model (default: RUN_DIR/merged)")
    add("--no-verify", action="store_true", help="do not prove the merge, which reads all of it")
    add("--json", action="store_true", help="print the figures as JSON on stdout")
    parser.set_defaults(func=main)


def main(args: argparse.Namespace) -> int:
    """Write it, and print its path or the figures."""
    from ..errors import AdapterError
    from ..report.figures import FIGURES_FILE
    from ..report.page import write_report

    try:
        page = write_report(args.run, merged=args.merged, verify=not args.no_verify)
    except AdapterError as error:  # such as a base that was quantized while it was loaded
        if args.no_verify:
            raise
        hint = "A report without the proof of the merge: --no-verify"
        raise AdapterError(f"{error} {hint}") from error
    say(page.with_name(FIGURES_FILE).read_text() if args.json else page)
    return 0
