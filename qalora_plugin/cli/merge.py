"""`qalora merge`: fold an adapter into its quantized base, on files alone."""

import argparse
import dataclasses
import json
from typing import Any

from ..files.progress import progress_bar
from .options import add_no_hash_check
from .say import say


def add_parser(subparsers: Any) -> None:
    """Add the subcommand."""
    parser = subparsers.add_parser(
        "merge",
        help="fold an adapter into its INT-n base",
        description="Fold an adapter into its quantized base and write the merged checkpoint. "
        "Works on files alone, a few layers in memory; the integers stay as they are. Nothing that "
        "exists is overwritten, and the output appears only when it is complete.",
    )
    add = parser.add_argument
    add("adapter", help="directory of the adapter, or a Hub id")
    add("--out", required=True, metavar="DIR", help="directory to make")
    about = "the quantized base, in any format (default: what the adapter's config names)"
    add("--base", metavar="DIR", help=about)
    about = (
        "how the adapter was trained to pool its inputs, where its config does not say: mean "
        "(the QA-LoRA authors' released code), peft (PEFT's use_qalora), sum (the paper)"
    )
    add("--convention", choices=("auto", "sum", "mean", "peft"), default="auto", help=about)
    add_no_hash_check(parser)
    add("--json", action="store_true", help="print the result as JSON on stdout")
    parser.set_defaults(func=main)


def main(args: argparse.Namespace) -> int:
    """Run it; progress goes to stderr, the result to stdout."""
    from ..merge.merge import merge_adapter

    with progress_bar("merging", "tensor") as progress:
        result = merge_adapter(
            args.adapter, args.out, args.base, convention=args.convention, progress=progress
        )
    if args.json:
        say(json.dumps(dataclasses.asdict(result), default=str))
    else:
        saved = f" and {len(result.replaced)} whole tensors" if result.replaced else ""
        say(f"{result.out}: {result.layers} layers merged{saved} (convention {result.convention})")
    return 0
