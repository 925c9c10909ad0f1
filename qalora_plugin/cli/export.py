"""`qalora export`: write a merged model for another runtime."""

import argparse
import json
from typing import Any

from ..files.progress import progress_bar
from .options import add_no_hash_check
from .say import say


def add_parser(subparsers: Any) -> None:
    """Add the subcommand; formats and their options are those of the records."""
    from ..checkpoint.format import exports

    known = list(exports())
    parser = subparsers.add_parser(
        "export",
        help="write a merged model for another runtime",
        description="Write a merged model as another runtime reads it: the same integers, scales "
        "and offsets, a few layers in memory at a time. What a format cannot hold is written dense "
        "and named, or refused before anything is written. `qalora verify OUT --against MODEL` "
        "proves the result.",
        epilog="Formats: " + "; ".join(f"{f.name} for {f.runs_in}" for f in known) + ".",
    )
    adapters = ", ".join(f.name for f in known if f.of_adapter)
    files = ", ".join(f.name for f in known if f.suffix)
    add = parser.add_argument
    add("model", help=f"the merged model (for {adapters}: the adapter); a Hub id works")
    add("--format", required=True, choices=[f.name for f in known], help="what to write")
    about = f"directory to make (for {files}: the file)"
    add("--out", required=True, metavar="PATH", help=about)
    add_no_hash_check(parser)
    add("--json", action="store_true", help="print the result as JSON on stdout")
    for title, options in _option_groups(known).items():
        group = parser.add_argument_group(f"options of {title}")
        for option in options:
            group.add_argument(f"--{option.name.replace('_', '-')}", **_keywords(option))
    parser.set_defaults(func=main)


def _option_groups(known: list[Any]) -> dict[str, list[Any]]:
    """Return every option once, under the names of the formats that have it."""
    owners: dict[Any, list[str]] = {}
    for format in known:
        for option in format.options:
            owners.setdefault(option, []).append(format.name)
    groups: dict[str, list[Any]] = {}
    for option, names in owners.items():
        groups.setdefault(" and ".join(names), []).append(option)
    return groups


def _keywords(option: Any) -> dict[str, Any]:
    """Return what argparse takes for an `Option`; None means that it was not given."""
    if option.type is bool:
        return {"help": option.help, "action": "store_true", "default": None}
    value = {"type": option.type, "choices": option.choices or None, "metavar": option.metavar}
    return {"help": option.help, **value}


def main(args: argparse.Namespace) -> int:
    """Run it; progress goes to stderr, the result to stdout."""
    from ..checkpoint.format import formats
    from ..formats.export import export_model

    names = {option.name for format in formats() for option in format.options}
    options = {key: getattr(args, key) for key in names if getattr(args, key) is not None}
    with progress_bar("exporting", "tensor") as progress:
        result = export_model(args.model, args.out, args.format, progress=progress, **options)
    say(json.dumps(result.as_dict()) if args.json else result.as_text())
    return 0
