"""`qalora export`: write a merged model for another runtime."""

import argparse
import json
import sys
from typing import Any


def add_parser(subparsers: Any) -> None:
    """Add the subcommand."""
    from ..export import FORMATS

    parser = subparsers.add_parser(
        "export",
        help="write a merged model for another runtime",
        description="Write a merged model as another runtime reads it: the same integers, scales "
        "and offsets, one layer in memory at a time. What a format cannot hold is written dense "
        "and named, or refused before anything is written.",
        epilog="gguf: llama.cpp. mlx: mlx-lm. torchao: stock transformers. gptq: AutoGPTQ, "
        "GPTQModel, vLLM, SGLang. lora: an adapter (not a merged model) as plain LoRA, for PEFT, "
        "vLLM or SGLang on the quantized base.",
    )
    parser.add_argument("model", help="the merged model (for lora: the adapter); a Hub id works")
    parser.add_argument("--format", required=True, choices=FORMATS, help="what to write")
    parser.add_argument(
        "--out", required=True, metavar="PATH", help="directory to make (for gguf: the file)"
    )
    parser.add_argument(
        "--base",
        metavar="DIR",
        help="lora: the quantized base (default: what the adapter's config names)",
    )
    parser.add_argument(
        "--convention",
        choices=("auto", "sum", "mean", "peft"),
        help="lora: how the adapter pools, where its config does not say (see `qalora merge`)",
    )
    parser.add_argument(
        "--checkpoint-format",
        choices=("gptq", "gptq_v2"),
        help="gptq: gptq (default) for AutoGPTQ and GPTQModel, gptq_v2 for GPTQModel alone",
    )
    parser.add_argument("--json", action="store_true", help="print the result as JSON on stdout")
    parser.set_defaults(func=main)


def main(args: argparse.Namespace) -> int:
    """Run it; progress goes to stderr, the result to stdout."""
    from tqdm import tqdm

    from ..export import export_model

    given = ("base", "convention", "checkpoint_format")
    options = {key: getattr(args, key) for key in given if getattr(args, key) is not None}
    with tqdm(desc="exporting", unit="tensor", file=sys.stderr) as bar:

        def progress(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        result = export_model(args.model, args.out, args.format, progress=progress, **options)
    print(json.dumps(result.as_dict()) if args.json else result.as_text())
    return 0
