"""`qalora inspect`: what a directory holds, how large its parts are, and whether it is sound."""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from ..errors import printable
from ..files.progress import progress_bar
from .say import say


def add_parser(subparsers: Any) -> None:
    """Add the subcommand."""
    parser = subparsers.add_parser(
        "inspect",
        help="say what a directory holds, and check it",
        description="Say what a directory holds (16-bit model, quantized base, merged model, stock "
        "GPTQ model, adapter or export), how large its parts are, and whether its config, shapes, "
        "values and hashes agree. Exits with 1 if they do not. Values of our own format are read "
        "where no hashes show that the files are as this package wrote them; of a base in another "
        "format they are looked through for NaN and infinity.",
    )
    parser.add_argument("model", help="directory, .gguf file, or Hub id")
    parser.add_argument(
        "--quick", action="store_true", help="check config and shapes only, not values and hashes"
    )
    about = "read all values in any case, and compare the tensors with the architecture"
    parser.add_argument("--values", action="store_true", help=about)
    about = (
        "enter tokenizer, chat template, generation config and the like as they are now into "
        "the manifest, after edits of your own; weights and config.json have to be as they "
        "were written"
    )
    parser.add_argument("--accept-edits", action="store_true", help=about)
    parser.add_argument("--json", action="store_true", help="print the result as JSON on stdout")
    parser.set_defaults(func=main)


def main(args: argparse.Namespace) -> int:
    """Run it; progress goes to stderr, the result to stdout."""
    from ..checkpoint.describe import describe
    from ..checkpoint.kind import find_kind, find_model
    from ..formats.record import read_record

    directory = find_model(args.model)
    is_export = find_kind(directory).export is not None
    if directory.is_file():  # ours, or one that came from elsewhere
        is_export = read_record(directory) is not None
    if args.accept_edits:
        from ..files.manifest import accept_edits

        for name in accept_edits(directory):
            say(f"qalora: accepted: {name}", file=sys.stderr)
    if not is_export:
        with progress_bar("checking", "layer") as progress:
            found = describe(directory, args.quick, progress, args.values)
    else:
        found = _describe_export(directory, args.quick)
    say(json.dumps(found) if args.json else table(found))
    return 0 if found["valid"] else 1


def _describe_export(path: Path, quick: bool) -> dict[str, Any]:
    """Return what an export says of itself."""
    from ..errors import CheckpointError
    from ..files.manifest import check_manifest
    from ..hub.card import find_subject

    subject = find_subject(path)
    files = subject.files().values()
    found: dict[str, Any] = {
        "kind": "export",
        "directory" if path.is_dir() else "file": str(path),
        "format": subject.format,
        **{key: value for key, value in subject.facts.items() if key != "exactness"},
        "exactness": subject.exactness,
        **subject.measured,
        "weights": f"not read here; `qalora verify {path} --against MODEL` compares them with the "
        "model that it was made from",
        "files": len(files),
        "bytes": {"total": sum(file.stat().st_size for file in files)},
        "valid": True,
        "problem": None,
    }
    if not quick and path.is_dir():
        try:
            found["hashes_checked"] = check_manifest(path)
        except CheckpointError as error:
            found["valid"], found["problem"] = False, str(error)
    return found


def table(found: dict[str, Any]) -> str:
    """Return the result of `describe` as text, one line a property."""
    rows = []
    for key, value in found.items():
        if key in ("bytes", "valid", "problem") or value in (None, {}):
            continue
        if isinstance(value, dict):
            value = ", ".join(f"{name}: {item}" for name, item in value.items())
        rows.append((key.replace("_", " "), str(value)))
    rows += [(f"size, {part.replace('_', ' ')}", _size(n)) for part, n in found["bytes"].items()]
    rows.append(("check", "passed" if found["valid"] else f"FAILED: {found['problem']}"))
    width = max(len(key) for key, _ in rows)
    return "\n".join(printable(f"{key:<{width}}  {value}") for key, value in rows)


def _size(nbytes: int) -> str:
    if nbytes < 1000:
        return f"{nbytes} B"
    size, units = nbytes / 1000, ["KB", "MB", "GB"]
    while size >= 1000 and units[1:]:
        size, units = size / 1000, units[1:]
    return f"{size:.1f} {units[0]}"
