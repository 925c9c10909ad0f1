"""`qalora eval`: benchmarks of a model by lm-evaluation-harness."""

import argparse
import json
from pathlib import Path
from typing import Any

from .options import at_least
from .say import say


def add_parser(subparsers: Any) -> None:
    """Add the subcommand."""
    parser = subparsers.add_parser(
        "eval",
        help="run benchmarks (lm-evaluation-harness) on a model or an adapter",
        description="Run tasks of lm-evaluation-harness on a merged or quantized model, on a "
        "16-bit one, or on an adapter beside its base, not merged. Needs the extra `eval`.",
        epilog="example: qalora eval out/merged --tasks commonsense; MMLU with five examples: "
        "--tasks mmlu --num-fewshot 5",
    )
    add = parser.add_argument
    add("model", metavar="DIR", help="a model or an adapter: directory or Hub id")
    about = (
        "names of tasks and groups of the harness, separated by commas; commonsense stands for "
        "the seven tasks of the paper"
    )
    add("--tasks", required=True, metavar="NAMES", help=about)
    about = "of an adapter: its quantized base (default: what the adapter's config names)"
    add("--base", metavar="DIR", help=about)
    add("--include", type=Path, metavar="FOLDER", help="task files (YAML) of your own")
    add("--num-fewshot", type=at_least(0), help="examples before a question (default: the task's)")
    add("--limit", type=at_least(1), metavar="N", help="rows of each task (default: all)")
    add("--batch-size", type=at_least(1), default=8, help="rows at a time (default: %(default)s)")
    choices = ("auto", "float32", "bfloat16", "float16")
    about = "of the model (default: %(default)s, that of config.json)"
    add("--dtype", choices=choices, default="auto", help=about)
    add("--device", default="cpu", help="cpu or cuda (default: %(default)s)")
    add("--json", action="store_true", help="print results as JSON on stdout")
    parser.set_defaults(func=main)


def main(args: argparse.Namespace) -> int:
    """Run it; progress goes to stderr, the results to stdout."""
    from ..evaluate.run import EvalOptions, evaluate, table

    options = EvalOptions(
        include=args.include,
        num_fewshot=args.num_fewshot,
        limit=args.limit,
        batch_size=args.batch_size,
        dtype=args.dtype,
        device=args.device,
    )
    tasks = [name.strip() for name in args.tasks.split(",") if name.strip()]
    found = evaluate(args.model, tasks, args.base, options)
    say(json.dumps(found) if args.json else table(found["results"]))
    return 0
