"""`qalora push`: upload a merged checkpoint or an export to the Hugging Face Hub."""

import argparse
import json
from pathlib import Path
from typing import Any

from .options import add_no_hash_check
from .say import say


def add_parser(subparsers: Any) -> None:
    """Add the subcommand."""
    parser = subparsers.add_parser(
        "push",
        help="upload a quantized model or an export to the Hub, with a model card",
        description="Upload a merged checkpoint, a quantized base, or what `qalora export` wrote, "
        "in one commit, after comparing its files with their hashes. A "
        "model card says what it is, how exact, and how it is loaded; a README.md that is there "
        "already is kept. The token is the one of `hf auth login` or HF_TOKEN.",
    )
    add = parser.add_argument
    add("dir", metavar="DIR", help="checkpoint, export, or .gguf file")
    add("repo", metavar="REPO", help="repository: NAME, or ORG/NAME")
    about = "whether a repository that has to be made is private (default: it is)"
    add("--private", action=argparse.BooleanOptionalAction, default=True, help=about)
    add("--revision", "--branch", metavar="NAME", help="branch to push to, made if needed")
    add("--data", metavar="NAME", help="name of the training data, for the card")
    about = "trainer_state.json of the training, for the losses in the card"
    add("--trainer-state", type=Path, metavar="FILE", help=about)
    add("--dry-run", action="store_true", help="upload nothing, print the files and the card")
    add_no_hash_check(parser)
    add("--json", action="store_true", help="print the result as JSON on stdout")
    parser.set_defaults(func=main)


def main(args: argparse.Namespace) -> int:
    """Run it; the result goes to stdout."""
    from ..hub.card import read_log_history
    from ..hub.push import push

    history = read_log_history(args.trainer_state) if args.trainer_state else ()
    names = ("private", "revision", "data", "dry_run")
    options = {name: getattr(args, name) for name in names}
    result = push(args.dir, args.repo, log_history=history, **options)
    say(json.dumps(result.as_dict()) if args.json else result.as_text())
    return 0
