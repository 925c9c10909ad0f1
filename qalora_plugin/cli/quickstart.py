"""`qalora quickstart`: the whole way on the embedded model, or on one's own."""

import argparse
import itertools
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

from .options import OFFSETS_AT_HELP, bits, group_size, note_what_gguf_cannot_hold


def add_parser(subparsers: Any) -> None:
    """Add the subcommand."""
    parser = subparsers.add_parser(
        "quickstart",
        help="quantize, train, merge and verify on an embedded model: see it work",
        description="Quantize a small embedded Llama with GPTQ, train a QA-LoRA adapter on it "
        "with TRL's SFTTrainer, merge, verify, and print what each stage measured. No network, "
        "no GPU. Or do the same with a model and data of one's own.",
    )
    default = "default: %(default)s"
    add = parser.add_argument
    add("--bits", type=bits, default=4, help=f"2, 3, 4 or 8 ({default})")
    add("--group-size", type=group_size, default=32, help=default)
    about = f"which weight of a group fp16 holds; {OFFSETS_AT_HELP} ({default})"
    add("--offsets-at", choices=("middle", "minimum"), default="minimum", help=about)
    add("--model", help="name or directory of a 16-bit causal LM")
    about = (
        ".jsonl (prompt + completion, question + answer, instruction + output, or text) "
        "or .txt; default: docstring -> function pairs from the standard library"
    )
    add("--dataset", type=Path, help=about)
    add("--rank", type=int, default=16, help=default)
    add("--learning-rate", type=float, default=3e-3, help=default)
    add("--steps", type=int, default=160, help=default)
    add("--batch-size", type=int, default=16, help=default)
    add("--seed", type=int, default=0, help=default)
    about = "directory to write to (default: the next free out/quickstart…)"
    add("--out", type=Path, help=about)
    add("--json", action="store_true", help="print the result as JSON on stdout")
    parser.set_defaults(func=main)


def next_free(path: Path) -> Path:
    """Return the path, or the first of path-2, path-3, ... at which there is nothing yet."""
    others = (path.with_name(f"{path.name}-{number}") for number in itertools.count(2))
    return next(free for free in itertools.chain([path], others) if not free.exists())


def main(args: argparse.Namespace) -> int:
    """Run the quickstart; progress goes to stderr, the result to stdout."""
    from ..quickstart import report
    from ..quickstart.run import Settings, run

    if args.out is None:
        args.out = next_free(Path("out") / f"quickstart-int{args.bits}")
    settings = Settings(**{field.name: getattr(args, field.name) for field in fields(Settings)})
    note_what_gguf_cannot_hold(args)
    result = run(settings, say=lambda line: print(line, file=sys.stderr, flush=True))
    print(report.as_json(result) if args.json else report.as_text(result))
    return 0
