"""`qalora export`: write a merged model for another runtime."""

import argparse
import json
import sys
from typing import Any


def add_parser(subparsers: Any) -> None:
    """Add the subcommand."""
    from ..formats.export import FORMATS

    parser = subparsers.add_parser(
        "export",
        help="write a merged model for another runtime",
        description="Write a merged model as another runtime reads it: the same integers, scales "
        "and offsets, one layer in memory at a time. What a format cannot hold is written dense "
        "and named, or refused before anything is written. `qalora verify OUT --against MODEL` "
        "proves the result.",
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
    parser.add_argument(
        "--exact",
        action="store_true",
        default=None,
        help="gguf: layers in fp32, 6.4 times the size, where Q4_1 would round minima to f16",
    )
    again = parser.add_argument_group("gptq of a model with real-valued zero-points")
    again.add_argument(
        "--requantize",
        action="store_true",
        default=None,
        help="quantize the merged weights again, with integer zero-points, and print what that "
        "costs in held-out loss and KL divergence",
    )
    again.add_argument(
        "--calibration",
        metavar="FILE",
        help="text to quantize on, and other text of it to measure on, as `qalora quantize` takes "
        "it (default: functions of the Python standard library; the model's own training data "
        "is better)",
    )
    again.add_argument("--samples", type=int, help="calibration windows (default: 128)")
    again.add_argument(
        "--seq-len", type=int, help="tokens in a window (default: 512, or the model's limit)"
    )
    again.add_argument("--seed", type=int, help="of the choice of windows (default: 0)")
    parser.add_argument("--json", action="store_true", help="print the result as JSON on stdout")
    parser.set_defaults(func=main)


def main(args: argparse.Namespace) -> int:
    """Run it; progress goes to stderr, the result to stdout."""
    from tqdm import tqdm

    from ..formats.export import OPTIONS, export_model

    given = sorted(set().union(*OPTIONS.values()))
    options = {key: getattr(args, key) for key in given if getattr(args, key) is not None}
    with tqdm(desc="exporting", unit="tensor", file=sys.stderr) as bar:

        def progress(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        result = export_model(args.model, args.out, args.format, progress=progress, **options)
    print(json.dumps(result.as_dict()) if args.json else result.as_text())
    return 0
