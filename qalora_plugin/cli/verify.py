"""`qalora verify`: prove that a merged checkpoint is its base with its adapter."""

import argparse
import json
import sys
from typing import Any


def add_parser(subparsers: Any) -> None:
    """Add the subcommand."""
    parser = subparsers.add_parser(
        "verify",
        help="prove that a merged checkpoint is its base with its adapter",
        description="Compare a merged checkpoint with base and adapter: every tensor bit for bit, "
        "and every layer's outputs with the formula of the code that trained the adapter. "
        "Exit status 1 if anything differs.",
    )
    parser.add_argument("merged", help="directory of the merged checkpoint")
    parser.add_argument("--adapter", required=True, help="the adapter that was merged")
    parser.add_argument(
        "--base",
        metavar="DIR",
        help="its quantized base (default: what the adapter's config names)",
    )
    parser.add_argument(
        "--logits", action="store_true", help="also build both models and compare their logits"
    )
    parser.add_argument(
        "--reference",
        metavar="FILE",
        help=".safetensors with input_ids [B, T] and logits [B, T, V] that base and adapter gave "
        "in the code that trained the adapter: proves the convention where the adapter's config "
        "does not state it",
    )
    parser.add_argument("--json", action="store_true", help="print the report as JSON on stdout")
    parser.set_defaults(func=main)


def main(args: argparse.Namespace) -> int:
    """Run it; progress goes to stderr, the report to stdout."""
    from tqdm import tqdm

    from ..verify import verify_merge

    with tqdm(desc="verifying", unit="layer", file=sys.stderr) as bar:

        def progress(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        report = verify_merge(
            args.merged,
            args.adapter,
            args.base,
            logits=args.logits,
            reference=args.reference,
            progress=progress,
        )
    print(json.dumps(report.as_dict()) if args.json else report.as_text())
    return 0
