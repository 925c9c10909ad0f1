"""`qalora verify`: prove what a merged checkpoint, or an export of one, is."""

import argparse
import json
from typing import Any

from ..errors import ConfigError
from ..files.progress import progress_bar
from .options import add_no_hash_check
from .say import say


def add_parser(subparsers: Any) -> None:
    """Add the subcommand."""
    parser = subparsers.add_parser(
        "verify",
        help="prove that a merged checkpoint is its base with its adapter, or an export exact",
        description="Compare a merged checkpoint with base and adapter: every tensor bit for bit, "
        "and every layer's outputs with the formula of the code that trained the adapter. "
        "Or compare what `qalora export` wrote with the merged model, dequantized by the library "
        "of the runtime that it is for, and run it there where the runtime is installed. Exit "
        "status 1 if anything differs.",
    )
    add = parser.add_argument
    add("merged", help="the merged checkpoint, or with --against an export")
    kind = parser.add_mutually_exclusive_group(required=True)
    kind.add_argument("--adapter", help="the adapter that was merged")
    about = "compare an export with the merged model (a lora export: with the adapter)"
    kind.add_argument("--against", metavar="MERGED", help=about)
    about = "of the adapter: its quantized base (default: what the adapter's config names)"
    add("--base", metavar="DIR", help=about)
    about = "with --against: compare weights only, do not run the export in its runtime"
    add("--no-run", action="store_true", default=None, help=about)
    about = "interpreter of the environment that has the runtime (default: this one)"
    add("--python", metavar="PYTHON", help=f"with --against: {about}")
    about = "with --adapter: also build both models and compare their logits"
    add("--logits", action="store_true", default=None, help=about)
    about = (
        "with --adapter: .safetensors with input_ids [B, T] and logits [B, T, V] that base and "
        "adapter gave in the code that trained the adapter: proves the convention where the "
        "adapter's config does not state it"
    )
    add("--reference", metavar="FILE", help=about)
    add_no_hash_check(parser)
    add("--json", action="store_true", help="print the report as JSON on stdout")
    parser.set_defaults(func=main)


def main(args: argparse.Namespace) -> int:
    """Run it; progress goes to stderr, the report to stdout."""
    _refuse_other(args)
    report: Any
    with progress_bar("verifying", "layer") as progress:
        if args.against is not None:
            from ..verify.export import verify_export

            options = {"run": not args.no_run, "python": args.python, "progress": progress}
            report = verify_export(args.merged, args.against, args.base, **options)
        else:
            from ..verify.merge import verify_merge

            options = {"logits": args.logits, "reference": args.reference, "progress": progress}
            report = verify_merge(args.merged, args.adapter, args.base, **options)
    say(json.dumps(report.as_dict()) if args.json else report.as_text())
    return 0


def _refuse_other(args: argparse.Namespace) -> None:
    """Refuse options of the other kind of comparison, which would be ignored."""
    kind, others = ("--adapter", ("no_run", "python"))
    if args.against is not None:
        kind, others = "--against", ("logits", "reference")
    given = [f"--{name.replace('_', '-')}" for name in others if getattr(args, name) is not None]
    if given:
        raise ConfigError(f"{', '.join(given)}: has no meaning with {kind}; leave it out")
    if args.no_run and args.python is not None:
        raise ConfigError("--python has no meaning with --no-run; leave one of them out")
